"""The authors' three kinds of VPD checkpoint are read whole, told apart, and refused if spoiled.

    pytest tests/test_official_vpd.py

That what is read predicts and learns as theirs does is shown in tests/test_vpd_model.py.
"""
import argparse
import json
from pathlib import Path

import pytest
import torch
from vpd_fixture import TASKS, fixture, load_vpd, read_golden, vpd_contents

from model import MetaPromptModel
from ops.errors import InputError
from ops.settings import from_dict
from unet import UNetConfig
from vae import VAEConfig
from vpd.model import VPDConfig, VPDModel
from weights import official_vpd

KEYS = {"seg": 874, "depth": 839, "refer": 839}  # tensors of a full-size file


@pytest.mark.parametrize("task", TASKS)
def test_full_width_names_and_shapes_fit_with_none_left_over(task):
    """Every official name at SD1.5's width becomes one of ours, of the same size, or is a named
    ignored one; every one of ours is reached, but for depth's noise prediction.  Shapes only.
    """
    shapes, path = read_golden("vpd_full_width")[task], Path("official.pth")
    assert len(shapes) == KEYS[task]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    values, tensors = official_vpd.convert(state, path)
    config = from_dict(VPDConfig, {**vars(VPDConfig()), **values}, "official")
    assert (config.task, config.unet, config.vae) == (task, UNetConfig(), VAEConfig())
    wanted = {"seg": (150, 256), "depth": (27, 192)}
    assert task == "refer" and config.num_tokens == 40 or \
        (config.num_classes, config.head_channels) == wanted[task]
    with torch.device("meta"):
        ours = VPDModel(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tensors.items()}
    reached = [official_vpd.our_name(name) for name in shapes]
    ignored = sum(name is None for name in reached)
    assert ignored == {"seg": 14, "depth": 2, "refer": 2}[task]
    assert len(set(reached) - {None}) == len(shapes) - ignored
    left = ours.keys() - set(reached)
    assert left == ({f"unet.{layer}.{kind}" for layer in ("conv_norm_out", "conv_out")
                     for kind in ("weight", "bias")} if task == "depth" else set())


@pytest.mark.parametrize("task", TASKS)
def test_configuration_is_read_off_the_tensors(task, tmp_path):
    """Task, tokens or classes, widths come from the shapes, here with `module.` before the names.
    """
    info = fixture(task)[0]
    contents = vpd_contents(info)
    key = "state_dict" if task == "seg" else "model"
    contents[key] = {"module." + name: tensor for name, tensor in contents[key].items()}
    torch.save(contents, tmp_path / "c.pth")
    config = VPDModel.from_official(tmp_path / "c.pth", max_depth=7.0).config
    assert (config.task, config.max_depth) == (task, 7.0)
    assert (config.unet.channels, config.vae.channels) == ((32, 32, 64, 64), (32, 64, 128, 128))
    if task == "refer":
        assert (config.num_tokens, config.unet.context_dim) == (12, 64)
    else:
        assert (config.num_classes, config.head_channels) == ((11, 32) if task == "seg" else
                                                              (27, 24))


@pytest.mark.parametrize("task", TASKS)
def test_every_value_arrives_and_stays(task, tmp_path):
    """Each tensor of the file is in the model, under its name; our own format keeps them."""
    info = fixture(task)[0]
    model = load_vpd(info, tmp_path).float()
    contents, ours = vpd_contents(info), model.state_dict()
    for name, tensor in contents["state_dict" if task == "seg" else "model"].items():
        target = official_vpd.our_name(name)
        if target is not None:
            assert torch.equal(ours[target].flatten(), tensor.flatten()), name
    model.save_pretrained(tmp_path / "ours")
    again = VPDModel.from_pretrained(tmp_path / "ours")
    after = again.state_dict()
    assert again.config == model.config
    assert all(torch.equal(value, after[name]) for name, value in ours.items())


class Foreign:
    """A class that a pickle must not bring to life."""


@pytest.mark.parametrize("task,kind,expected", [
    ("refer", "alias", r"encoder\.gamma should be another name of gamma"),
    ("seg", "missing", r"lacks neck\.lateral_convs\.2\.conv\.bias"),
    ("depth", "missing", r"lacks neck\.layer1\.3\.weight"),
    ("refer", "missing", r"lacks head\.stages\.1\.4\.bias"),
    ("seg", "shape", r"gamma has shape \(3,\)"),
    ("seg", "unknown", r"unknown tensor extra\.weight"),
    ("refer", "foreign", "class test_official_vpd.Foreign"),
    ("seg", "embeddings", "lacks class_embeddings")])
def test_spoiled_checkpoints_are_refused(task, kind, expected, tmp_path):
    """One clear line: unequal aliases, missing, misshapen, unknown tensors, foreign classes."""
    contents = vpd_contents(fixture(task)[0])
    state = contents["state_dict" if task == "seg" else "model"]
    if kind == "alias":
        state["encoder.gamma"] = state["gamma"] + 1
    elif kind == "missing":
        del state[{"seg": "neck.lateral_convs.2.conv.bias", "depth": "encoder.layer1.3.weight",
                   "refer": "classifier.bn2_3.bias"}[task]]
    elif kind == "shape":
        state["gamma"] = torch.zeros(3)
    elif kind == "unknown":
        state["extra.weight"] = torch.zeros(3)
    elif kind == "embeddings":
        del state["class_embeddings"]
    else:
        contents["args"].hook = Foreign()
    torch.save(contents, tmp_path / "c.pth")
    with pytest.raises(InputError, match=expected):
        VPDModel.from_official(tmp_path / "c.pth")


def test_a_namespace_is_allowed_here_only(tmp_path):
    """refer's `args` is read, by VPD alone; Meta Prompts' files need no such class."""
    torch.save({"model": {}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="class argparse.Namespace"):
        MetaPromptModel.from_official(tmp_path / "c.pth")
    with pytest.raises(InputError, match="c.pth lacks"):
        VPDModel.from_official(tmp_path / "c.pth")


def test_the_two_methods_do_not_read_each_other(tmp_path):
    """A VPD file is no Meta Prompts file and the other way round: a tensor is named."""
    torch.save(vpd_contents(fixture("seg")[0]), tmp_path / "vpd.pth")
    with pytest.raises(InputError, match="unknown tensor gamma"):
        MetaPromptModel.from_official(tmp_path / "vpd.pth")
    golden = Path(__file__).parent / "golden" / "official_seg_ade20k.json"
    names = json.loads(golden.read_text())
    torch.save({"state_dict": {name: torch.zeros(1) for name in names}}, tmp_path / "meta.pth")
    with pytest.raises(InputError, match="unknown tensor (meta_prompts|t1|cross_unet|aux|up)"):
        VPDModel.from_official(tmp_path / "meta.pth")
