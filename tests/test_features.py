"""The picture of features: the components it shows, after the passes it names, of any model.

    python -m pytest tests/test_features.py
"""
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import command, refused
from PIL import Image
from test_heatmaps import TINY, saved_run
from trees import random_image, write

from model import Config, MetaPromptModel
from tools import features
from vpd.model import VPDConfig, VPDModel


def test_components_are_the_principal_ones_of_all_pictures_together():
    """Three patterns of falling strength in many channels come back as red, green and blue; noise
    that is weaker, and each channel's mean, do not show.
    """
    rng = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 10, 30, generator=rng) * torch.tensor([9.0, 5.0, 2.0])[:, None, None]
    axes = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0][:3]        # orthogonal
    maps = torch.einsum("khw,kc->chw", patterns, axes) + 50
    maps = maps + 0.01 * torch.randn(maps.shape, generator=rng)
    left, right = features.components([maps[:, :, :12], maps[:, :, 12:]])
    assert left.shape == (10, 12, 3) and right.shape == (10, 18, 3) and left.dtype == np.uint8
    found = np.concatenate([left, right], axis=1).reshape(-1, 3)
    for channel, pattern in enumerate(patterns):
        assert abs(np.corrcoef(found[:, channel], pattern.flatten())[0, 1]) > 0.97


def test_fewer_passes_are_the_first_ones():
    """After one pass of a model of two: what a model of one pass with its first rows gives."""
    torch.manual_seed(0)
    model = MetaPromptModel(Config(**{**TINY, "shared_prompts": False})).eval()
    first = MetaPromptModel(replace(model.config, refine_steps=1)).eval()
    first.load_state_dict({**model.state_dict(), "prompts": model.prompts[:1],
                           "temb": model.temb[:1]})
    picture = random_image(64, 128)
    found = {T: features.features_of(model, [picture], T)[0] for T in (1, 2)}
    images = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    for T, like in ((1, first), (2, model)):
        for a, b in zip(found[T], like.features(images)[:3], strict=True):
            assert torch.equal(a, b[0])
    assert model.config.refine_steps == 2 and not torch.equal(found[1][0], found[2][0])


def sheet(path):
    """The size of a written picture, (height, width)."""
    with Image.open(path) as image:
        return image.height, image.width


@pytest.mark.parametrize("method", ["meta-prompts", "vpd"])
def test_a_runs_features_are_drawn(tmp_path, monkeypatch, capsys, method):
    """A row per readable picture; a column per stride and number of passes beside it."""
    for i, size in enumerate(((64, 80), (90, 70), (64, 64))):
        write(tmp_path / "photos" / f"{i}.png", random_image(*size))
    (tmp_path / "photos" / "2.png").write_bytes(b"torn")
    if method == "vpd":
        VPDModel(VPDConfig(unet=TINY["unet"], vae=TINY["vae"], num_classes=2, head_channels=8)
                 ).save_pretrained(tmp_path)
    passes = ["--passes", "1", "2"] if method == "meta-prompts" else []
    run = saved_run(tmp_path) if passes else tmp_path
    command(features.main, monkeypatch, "--checkpoint", run, "--image", tmp_path / "photos",
            "--out", tmp_path / "new" / "a.png", *passes)
    printed = capsys.readouterr().out
    assert "2.png" in printed and f"a.png: 2 pictures, after {'1, 2' if passes else '1'}" in printed
    height, width = sheet(tmp_path / "new" / "a.png")
    assert (height, width) == (2 * (160 + 20), (7 if passes else 4) * (160 + 4))


def test_a_backbone_alone_has_features(tmp_path, monkeypatch):
    """Our own Stable Diffusion on one picture, untrained: the same sheet every time."""
    write(tmp_path / "a.png", random_image(64, 64))
    for name in ("1.png", "2.png"):
        command(features.main, monkeypatch, "--backbone", "tiny", "--image", tmp_path / "a.png",
                "--out", tmp_path / name)
    assert sheet(tmp_path / "1.png") == (180, 4 * 164)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_without_pictures_scenes_are_shown():
    """Embedded ones, in the size that a sheet shows well."""
    names, pictures = features.scenes()
    assert names == ["scene 0", "scene 1", "scene 2", "scene 3"]
    assert all(p.shape == (256, 256, 3) and p.dtype == np.uint8 for p in pictures)


def test_refusals(tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line, before anything is computed or written."""
    saved_run(tmp_path)
    run, out = ["--checkpoint", tmp_path], tmp_path / "out.png"
    VPDModel(VPDConfig(task="refer", unet=TINY["unet"], vae=TINY["vae"], num_tokens=4)
             ).save_pretrained(tmp_path / "refer")
    (tmp_path / "there.png").touch()
    for flags, message in (
            ([], "give --checkpoint RUN or --backbone SOURCE"),
            ([*run, "--backbone", "tiny"], "give --checkpoint RUN or --backbone SOURCE"),
            ([*run, "--unet", "x"], "--unet would do nothing"),
            ([*run, "--passes", "1", "3"], "--passes 3: "), ([*run, "--passes", "0"], "1 or more"),
            ([*run, "--image", tmp_path / "nowhere"], "nowhere does not exist"),
            ([*run, "--image", tmp_path / "there.png"], "there.png"),
            ([*run, "--max-side", "32"], "64 pixels or more"),
            ([*run, "--out", tmp_path / "out.jpg"], "must end in .png"),
            ([*run, "--out", tmp_path / "there.png"], "there.png exists"),
            (["--checkpoint", tmp_path / "refer"], "reads a sentence"),
            (["--backbone", tmp_path / "nowhere"], "nowhere does not exist")):
        code, stderr = refused(features.main, monkeypatch, capsys, "--out", out, *flags)
        assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not out.exists()
