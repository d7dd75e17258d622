"""The prompts' maps: the very ones that the head reads, the most telling ones, drawn as they are.

Proven here: the rule by which prompts are chosen, on maps whose answer is known; colours and places
of what is drawn; the command.  tests/test_model.py proves that the head reads these maps.

    python -m pytest tests/test_heatmaps.py
"""
import sys

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from trees import random_image, write

from model import Config, MetaPromptModel
from ops import draw
from ops.errors import InputError
from tools import heatmaps
from unet import UNetConfig
from vae import VAEConfig

TINY = dict(num_prompts=5, refine_steps=2, head_channels=16,
            unet=UNetConfig((16,) * 4, layers=1, num_heads=1, context_dim=16, groups=4),
            vae=VAEConfig((8,) * 4, layers=1, groups=4), sigma=2.0,
            deconv_channels=(8,), num_classes=4)


# ------------------------------------------------------------------------------------------------
# The maps

def test_maps_of_a_picture():
    """A uint8 picture gives the finest maps, at stride 4 in segmentation."""
    torch.manual_seed(0)
    model = MetaPromptModel(Config(**TINY)).eval()
    picture = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    maps = heatmaps.picture_maps(model, picture, torch.float32)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    assert maps.shape == (5, 16, 32) and maps.dtype == np.float32
    assert np.array_equal(maps, model.responses(images)[0][0].detach().numpy())


# ------------------------------------------------------------------------------------------------
# Which prompts

def test_moments():
    """Squared means and covariances over positions, as numpy has them."""
    maps = np.random.default_rng(0).normal(2, 3, (4, 6, 7)).astype(np.float32)
    squared_means, covariance = heatmaps.moments(maps)
    assert np.allclose(squared_means, maps.mean(axis=(1, 2)) ** 2)
    assert np.allclose(covariance, np.cov(maps.reshape(4, -1), bias=True))


def waves():
    """Maps (6, 16, 16): a wave, a constant, the wave on a pedestal, its negative, an independent
    wave on a pedestal, nothing.
    """
    x, y = np.meshgrid(np.arange(16), np.arange(16))
    wave, other = np.sin(x * np.pi / 4), np.sin(y * np.pi / 4)
    return np.stack([wave, 5 + 0 * wave, 2 + wave, -wave, 1 + other, 0 * wave])


def test_choice():
    """First what varies most for its mean; then what is unlike that, before any copy or negative.
    """
    rule = heatmaps.moments(waves())
    assert heatmaps.choose(*rule, 1) == [0]
    assert heatmaps.choose(*rule, 2) == [0, 4]
    everyone = heatmaps.choose(*rule, 6)
    assert everyone[:2] == [0, 4] and sorted(everyone) == list(range(6))


def test_choice_ignores_scale():
    """A prompt that answers 100 times as strongly, mean included, is as good as before."""
    factors = np.array([1, 3, 100, 0.01, 7, 1])[:, None, None]
    for count in (1, 2):
        assert (heatmaps.choose(*heatmaps.moments(waves() * factors), count)
                == heatmaps.choose(*heatmaps.moments(waves()), count))


def test_choice_of_dead_prompts():
    """Maps of zeros everywhere give the first prompts, not an error."""
    assert heatmaps.choose(*heatmaps.moments(np.zeros((4, 3, 3))), 3) == [0, 1, 2]


@pytest.mark.parametrize("text, expected", [("3", 3), ("5", 5), ("some", 5), ("0,4", [0, 4]),
                                            ("2,", [2]), (" 1, 3 ", [1, 3])])
def test_parse(text, expected):
    """A number is how many, a list which ones."""
    assert heatmaps.parse(text, Config(**TINY)) == expected


@pytest.mark.parametrize("text, message", [
    ("6", "the model has 5 prompts"), ("0", "the model has 5 prompts"), ("1,5", "prompts 0 to 4"),
    ("x", "how many prompts"), ("", "how many prompts"), (",", "how many prompts"),
    ("-1", "how many prompts"), ("1,,x", "how many prompts")])
def test_parse_refuses(text, message):
    """Anything else is an InputError; so is a model without maps per prompt."""
    with pytest.raises(InputError, match=message):
        heatmaps.parse(text, Config(**TINY))
    with pytest.raises(InputError, match="without the rearrangement"):
        heatmaps.parse("2", Config(**TINY, rearrange=False))


# ------------------------------------------------------------------------------------------------
# Drawing

def test_lay_heat():
    """The lowest value is blue, the highest red, half transparent, and values outside are clipped.
    """
    picture = np.full((40, 40, 3), 100, np.uint8)
    values = np.full((2, 2), -7.0)
    values[:, 1] = 99
    out = draw.lay_heat(picture, values, 0.0, 10.0)
    assert out[20, 0].tolist() == [50, 50, 115] and out[20, -1].tolist() == [160, 50, 50]


def test_grid(tmp_path):
    """Panels fill rows from the left, each in the corner of a cell as large as the largest, under
    its title."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    panels = [(f"p{i}", np.full((120, 240 - 40 * i, 3), c, np.uint8))
              for i, c in enumerate(colours)]
    draw.save_grid(tmp_path / "new" / "a.png", panels, 2)
    with Image.open(tmp_path / "new" / "a.png") as image:
        sheet = np.array(image)
    cell_height, cell_width = sheet.shape[0] // 2, sheet.shape[1] // 2
    assert (cell_height, cell_width) == (120 + 20, 240 + 4)
    for place, colour in enumerate([*colours, (255, 255, 255)]):
        row, column = divmod(place, 2)
        y, x = row * cell_height + 16, column * cell_width
        assert sheet[y + 60, x + 120].tolist() == list(colour)
        assert sheet[y + 60, x + 239].tolist() == list(colour if place == 0 else (255,) * 3)
        assert (sheet[y - 14:y - 2, x:x + 30] < 128).any() == (place < 3)      # a title


@pytest.mark.parametrize("size, cell", [((60, 120), (120, 240)), ((480, 100), (240, 50))])
def test_pictures_fit_their_cells(size, cell):
    """The longer side becomes that of the cell, the aspect stays."""
    assert heatmaps.into_cell(random_image(*size)).shape == (*cell, 3)


def test_a_silent_prompt_stays_blue(tmp_path):
    """Side by side a row has one range: where a prompt answers one picture only, others are blue.
    """
    pictures = [np.full((240, 240, 3), 100, np.uint8)] * 2
    loud, silent = np.zeros((1, 4, 4)), np.zeros((1, 4, 4))
    loud[0, :, 2:], silent[0, 0, 0] = 8, 0.1
    heatmaps.save_prompts(tmp_path / "a.png", pictures, [loud, silent], ["one", "two"], [3])
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.array(image)
    row = sheet[sheet.shape[0] // 2 + 16:][:240].astype(int)
    assert (row[100, 200] - row[100, 40]).tolist()[0] > 90                 # loud: red at the right
    assert (row[20:220, 250:480, 2] > row[20:220, 250:480, 0]).all()


# ------------------------------------------------------------------------------------------------
# The command

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine small pictures, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(9):
        write(folder / ("sub" if i > 6 else "") / f"{i}.png", random_image(64 + 8 * (i % 2), 80, i))
    return folder


def saved_run(folder, task="seg", **changes):
    """A run folder with an untrained model."""
    torch.manual_seed(0)
    model = MetaPromptModel(Config(task=task, **{**TINY, **changes}))
    model.save_pretrained(folder / "best")
    return folder


def run(monkeypatch, *flags):
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["heatmaps", *map(str, flags), "--precision", "float32"])
    heatmaps.main()


@pytest.mark.parametrize("task, flag, count, folder, wide", [
    ("seg", "2", 2, ".", 244), ("pose", "4,1,0", 3, "sub", 187 + 4),
    ("depth", "3,", 1, "sub", 244)])
def test_command(tmp_path, photos, monkeypatch, capsys, task, flag, count, folder, wide):
    """A sheet for each picture, and one of up to 8 pictures by prompts; the prompts are told."""
    out, images = tmp_path / "out", photos / folder
    run(monkeypatch, "--checkpoint", saved_run(tmp_path, task), "--image", images, "--out", out,
        "--prompts", flag)
    line, = [x for x in capsys.readouterr().out.splitlines() if x.startswith("prompts")]
    chosen = line.removeprefix("prompts").replace(" ", "").split(",")
    assert len(chosen) == count and (task == "seg" or chosen == flag.strip(",").split(","))
    assert ({p.relative_to(out) for p in out.rglob("*_heatmaps.png")}
            == {p.relative_to(images).with_name(f"{p.stem}_heatmaps.png")
                for p in images.rglob("*.png")})
    with Image.open(out / "prompts.png") as image:
        assert image.width == min(8, len(list(images.rglob("*.png")))) * wide
        assert image.height % (count + 1) == 0
    with Image.open(next(out.rglob("*_heatmaps.png"))) as image:
        assert image.width == min(4, count + 1) * wide


def test_one_picture(tmp_path, photos, monkeypatch):
    """With a single picture six prompts are the default, one column is drawn."""
    run(monkeypatch, "--checkpoint", saved_run(tmp_path, num_prompts=7), "--image",
        photos / "0.png")
    with Image.open(tmp_path / "predictions" / "prompts.png") as image:
        assert image.width == 244 and image.height % 7 == 0
    assert (tmp_path / "predictions" / "0_heatmaps.png").is_file()


def test_unreadable_pictures_are_skipped_and_told(tmp_path, photos, monkeypatch, capsys):
    """All others are drawn, as if it were not there; without any that can be read, one line."""
    folder = tmp_path / "photos"
    for i in range(2):
        write(folder / f"{i}.png", random_image(64, 80, i))
    (folder / "1a.png").write_bytes((folder / "1.png").read_bytes()[:99])
    saved_run(tmp_path)
    run(monkeypatch, "--checkpoint", tmp_path, "--image", folder)
    printed = capsys.readouterr().out
    assert "skipped    " in printed and "1a.png" in printed and "2 images; 1 skipped" in printed
    out = tmp_path / "predictions"
    assert {p.name for p in out.iterdir()} == {"0_heatmaps.png", "1_heatmaps.png", "prompts.png"}
    (folder / "1a.png").rename(tmp_path / "1a.png")
    code, stderr = refused(heatmaps.main, monkeypatch, capsys, "--checkpoint", tmp_path, "--image",
                           tmp_path / "1a.png")
    assert code == 2 and "1a.png" in stderr.splitlines()[-1]


def test_refusals(tmp_path, photos, monkeypatch, capsys):
    """What cannot be drawn ends with exit code 2 and one line, and writes nothing."""
    saved_run(tmp_path)
    for flags, message in (
            (["--image", photos, "--prompts", "9"], "the model has 5 prompts"),
            (["--image", tmp_path / "nowhere"], "nowhere does not exist"),
            (["--image", photos, "--export", tmp_path], "--export would do nothing here"),
            (["--image", photos, "--save", tmp_path], "--save would do nothing here"),
            (["--image", photos, "--tta"], "--tta would do nothing here"),
            (["--image", photos, "--no-flip"], "--no-flip would do nothing here"),
            (["--image", photos, "--window=64"], "--window=64 would do nothing here"),
            (["--image", photos, "--protocol"], "--protocol would do nothing here"),
            (["--image", photos, "--out", ""], "--out is '': leave it out"),
            (["--image", photos, "stray"], "stray stands alone"),
            ([], "required: --image")):
        code, stderr = refused(heatmaps.main, monkeypatch, capsys, "--checkpoint", tmp_path, *flags)
        assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "predictions").exists()
