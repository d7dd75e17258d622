"""Our model is the authors' model: their checkpoints load, and predict, learn and decay alike.

    pytest tests/test_official.py        (with -m slow: all names at SD1.5's full width)

tests/golden holds inputs and outputs of the authors' code at a tiny width, and all tensor names and
shapes at the full one; the weights are drawn by name (official_fixture.py).
"""
import json
import zipfile
from pathlib import Path

import pytest
import torch
from official_fixture import draw, load_fixture, official_file
from oracles import relative_error
from safetensors.torch import load_file

import model as our
from tasks import seg
from weights import official
from ops.errors import InputError
from model import MetaPromptModel
from unet import UNetConfig
from vae import VAEConfig

GOLDEN = Path(__file__).parent / "golden"
TASKS = ("seg", "depth")


def fixture(task):
    """(config json, tensors, images in [0, 1]) of the authors' model at a tiny width."""
    info = json.loads((GOLDEN / f"official_{task}.json").read_text())
    tensors = load_file(GOLDEN / f"official_{task}.safetensors")
    images = tensors["image"] if task == "depth" else (tensors["image"] + 1) / 2
    return info, tensors, images


@pytest.fixture(autouse=True)
def positions_of_the_authors(monkeypatch):
    """Ours is compared in float64, where it is the same on any processor; what remains is the
    authors' rounding.  Only the resize of the input is float32's: 128 pixels off the origin its
    positions are 1e-5 of a pixel off, theirs as well as ours.
    """
    enlarge = our.enlarge
    monkeypatch.setattr(our, "enlarge", lambda images, scale:
                        enlarge(images.float(), scale).to(images.dtype))


def maps_and_output(model, images):
    """(rearranged maps, prediction) of one forward pass."""
    captured = []
    handle = model.head.register_forward_pre_hook(lambda m, args: captured.append(args[0]))
    with torch.no_grad():
        output = model(images)
    handle.remove()
    return captured[0], output


@pytest.mark.parametrize("task", TASKS)
def test_outputs_equal_the_authors(task, tmp_path):
    """Latents, rearranged maps and prediction of the authors' code (largest relative error < 5e-5).
    """
    info, tensors, images = fixture(task)
    model, images = load_fixture(info, tmp_path).double(), images.double()
    with torch.no_grad():
        errors = {"latents": relative_error(model.encode(images), tensors["latents"])}
    maps, output = maps_and_output(model, images)
    for i, m in enumerate(maps):
        name = f"rearranged{i}" if task == "seg" else "rearranged"
        errors[name] = relative_error(m.flatten()[::info["stride"]], tensors[name])
    errors["output"] = relative_error(output.flatten()[::info["output_stride"]], tensors["output"])
    print("\n" + "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    assert max(errors.values()) < 5e-5


def test_sliding_window_equals_the_authors(tmp_path):
    """Probabilities after the authors' sliding window (128, stride 85) on a 160x224 image."""
    info, tensors, _ = fixture("seg")
    model = load_fixture(info, tmp_path).double()
    protocol = seg.Protocol(None, info["slide"]["crop"][0], info["slide"]["stride"][0])
    images = (tensors["slide_image"].double() + 1) / 2
    probs = seg.predict(model, images, images.shape[-2:], protocol, torch.float32)
    error = relative_error(probs.flatten()[::info["output_stride"]], tensors["slide_prob"])
    print(f"\nslide {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_equal_the_authors(task, tmp_path):
    """The training losses (< 1e-6), the gradient norm of each trained tensor (< 5e-3, and 5e-6 for
    those that are zero but for rounding) and all of them as one vector (< 5e-4).

    The authors ran float32, whose own rounding moves single norms by up to 5e-3, all by 1e-4.
    """
    info, tensors, images = fixture(task)
    model, images = load_fixture(info, tmp_path).double().train(), images.double()
    if task == "seg":
        losses = model.loss(images, tensors["gt"][:, 0].long())
        expected = {"ce": "decode.loss_ce", "lovasz": "decode.loss_lovasz",
                    "aux": "aux.loss_ce_aux"}
        expected = {ours: info["losses"][theirs] for ours, theirs in expected.items()}
    else:
        losses = model.loss(images, tensors["gt"].double())
        expected = {"silog": info["train_loss"]}
    for name, value in expected.items():
        assert abs(losses[name].item() / value - 1) < 1e-6, name
    sum(losses.values()).backward()
    named, norms = dict(model.named_parameters()), []
    for name, norm in info["grad_norms"].items():
        target, _, row = official.our_name(name).partition(" ")
        grad = named[target].grad
        ours = (grad[int(row)] if row else grad).norm().item()
        assert abs(ours - norm) < 5e-3 * norm + 5e-6, (name, ours, norm)
        norms.append((ours, norm))
    ours, theirs = torch.tensor(norms, dtype=torch.float64).T
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"\n{len(norms)} gradient norms, distance {error:.1e}")
    assert error < 5e-4
    for name in info["no_grad"]:
        target = official.our_name(name)
        assert target is None or named[target].grad is None, name


@pytest.mark.parametrize("task", TASKS)
def test_optimiser_groups_equal_the_authors(task, tmp_path):
    """Learning rate and weight decay of every tensor as the authors' constructor assigns them."""
    info, _, _ = fixture(task)
    model = load_fixture(info, tmp_path)
    flags = (8e-5, 0.1, 1e-3) if task == "seg" else (1.0, 0.01, 0.1)
    groups = {}
    for group in model.param_groups(*flags):
        groups.update({id(p): (group["lr"], group["weight_decay"]) for p in group["params"]})
    named = dict(model.named_parameters())
    for name, (lr, decay, *_) in info["optimizer"].items():
        target = official.our_name(name)
        if target is None:
            continue
        parameter = named[target.split()[0]]
        if lr == 0 or "time_embed" in name:  # neither ever changes there; both are frozen here
            assert not parameter.requires_grad, name
        else:
            assert groups[id(parameter)] == pytest.approx((lr, decay)), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_configuration_is_read_off_the_tensors(prefix, tmp_path):
    """Task, T, N, classes and widths come from the shapes, with or without `module.` in front."""
    seg = MetaPromptModel.from_official(
        official_file(fixture("seg")[0], tmp_path / "seg.pth", prefix)).config
    assert (seg.task, seg.refine_steps, seg.num_prompts, seg.num_classes) == ("seg", 3, 32, 19)
    assert (seg.unet.channels, seg.vae.channels) == ((32, 32, 64, 64), (32, 64, 128, 128))
    assert (seg.shared_prompts, seg.prompt_adapter, seg.head_channels) == (True, False, 64)
    depth = MetaPromptModel.from_official(
        official_file(fixture("depth")[0], tmp_path / "depth.ckpt", prefix), max_depth=80.0,
        resize_scale=2).config
    assert (depth.task, depth.num_prompts, depth.max_depth, depth.resize_scale) == \
        ("depth", 50, 80.0, 2)
    assert (depth.shared_prompts, depth.prompt_adapter, depth.head_channels) == (False, True, 192)


def test_loading_and_saving_in_our_format_keeps_every_value(tmp_path):
    """from_official, save_pretrained, from_pretrained: same tensors, same configuration."""
    model = load_fixture(fixture("depth")[0], tmp_path)
    model.save_pretrained(tmp_path / "ours")
    again = MetaPromptModel.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


class Foreign:
    """A class that a pickle must not bring to life."""


def spoiled(kind, tmp_path):
    """A checkpoint with one defect, and what the message must say."""
    path = official_file(fixture("seg")[0], tmp_path / "c.pth")
    contents = torch.load(path, weights_only=False)
    state = contents["state_dict"]
    if kind == "alias":
        state["cross_unet_conv3.2.bias"] = state["cross_unet_conv3.2.bias"] + 1
        expected = r"cross_unet_conv3\.2\.bias should be another name of unet\.conv_out\.bias"
    elif kind == "missing":
        del state["upconv2.0.bias"]
        expected = r"lacks neck\.1\.0\.bias"
    elif kind == "row":
        del state["t2"]
        expected = "lacks a row of temb"
    elif kind == "shape":
        state["upconv2.0.bias"] = torch.zeros(3)
        expected = r"neck\.1\.0\.bias has shape \(3,\)"
    elif kind == "unknown":
        state["extra.weight"] = torch.zeros(3)
        expected = r"unknown tensor extra\.weight"
    else:
        contents["meta"]["hook"] = Foreign()
        expected = "class test_official.Foreign"
    torch.save(contents, path)
    return path, expected


@pytest.mark.parametrize("kind", ["alias", "missing", "row", "shape", "unknown", "foreign class"])
def test_spoiled_checkpoints_are_refused(kind, tmp_path):
    """One clear line: unequal aliases, missing, misshapen, unknown tensors, foreign classes."""
    path, expected = spoiled(kind, tmp_path)
    with pytest.raises(InputError, match=expected):
        MetaPromptModel.from_official(path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    """Truncated, empty, missing files and pickles of something else are named."""
    path = official_file(fixture("seg")[0], tmp_path / "c.pth")
    path.write_bytes(path.read_bytes()[:5000])
    for source, message in ((path, "not a complete checkpoint"),
                            (tmp_path / "no", "does not exist")):
        with pytest.raises(InputError, match=message):
            MetaPromptModel.from_official(source)
    for junk in (b"\x89PNG\r\n\x1a\n", b"\xff" * 300, b'{"a": 1}'):
        (tmp_path / "junk").write_bytes(junk)
        with pytest.raises(InputError, match="junk (holds no torch|is not a complete)") as error:
            MetaPromptModel.from_official(tmp_path / "junk")
        assert "weights_only" not in str(error.value)    # which torch's message advises against
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="neither a state_dict nor a model"):
        MetaPromptModel.from_official(tmp_path / "list.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name,keys", [("seg_ade20k", 918), ("depth_nyu", 912)])
def test_full_width_files_load_with_no_name_left_over(name, keys, tmp_path):
    """All official names and shapes at SD1.5's width; aliases share storage, values are checked."""
    shapes = json.loads((GOLDEN / f"official_{name}.json").read_text())
    assert len(shapes) == keys
    state = {n: draw(n, s, 0) for n, s in shapes.items()}
    path = tmp_path / "official.pth"
    torch.save({"state_dict" if name.startswith("seg") else "model": state}, path)
    model = MetaPromptModel.from_official(path)
    assert (model.config.unet, model.config.vae) == (UNetConfig(), VAEConfig())
    assert model.config.num_prompts == (150 if name.startswith("seg") else 50)
    ours = model.state_dict()
    reached = set()
    for n, tensor in state.items():
        target = official.our_name(n)
        if target is None:
            continue
        key, _, row = target.partition(" ")
        value = ours[key][int(row)] if row else ours[key]
        if key in ours:
            assert torch.equal(value.flatten(), tensor.flatten()), n
            reached.add(key)
    assert {k for k in ours if not k.startswith("unet.time_embedding")} <= reached


def test_broken_archives_are_refused(tmp_path):
    """An empty file, one byte, a zip whose checksum differs, one that is compressed."""
    good = official_file(fixture("seg")[0], tmp_path / "c.pth")
    raw = bytearray(good.read_bytes())
    raw[len(raw) // 2] ^= 1                              # inside a tensor: torch would not see it
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", bytes(10 ** 6))
    for content, message in ((b"", ""), (b"P", ""), (bytes(raw), "the checksum of .* differs"),
                             ((tmp_path / "bomb.pth").read_bytes(), "it is compressed")):
        good.write_bytes(content)
        with pytest.raises(InputError, match=f"c.pth .*{message}"):
            MetaPromptModel.from_official(good)


@pytest.mark.parametrize("contents", [
    None, [], 3, {"model": 3}, {"model": {1: torch.zeros(1)}}, {"state_dict": {"x": "y"}},
    torch.zeros(3), {"model": {"encoder.t1": torch.zeros(())}}, {"model": {}}])
def test_odd_containers_are_refused(tmp_path, contents):
    """Keys that are no text, tensors without dimensions, something else than a dict."""
    torch.save(contents, tmp_path / "c.pth")
    with pytest.raises(InputError, match="c.pth"):
        MetaPromptModel.from_official(tmp_path / "c.pth")
