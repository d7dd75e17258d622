"""Weight files are found, read and loaded strictly; every defect is refused by name.

    pytest tests/test_weights.py
"""
import json
import os

import pytest
import torch
from ldm_names import to_ldm
from oracles import LEVELS, randomise
from safetensors.torch import save_file

from weights import files as weights
from ops.errors import InputError
from unet import UNet
from vae import VAEEncoder


@pytest.fixture
def unet_folder(tmp_path):
    """A miniature Stable Diffusion folder, made from our own random UNet."""
    unet = randomise(UNet(LEVELS, 8, 48))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"attention_head_dim": 8}))
    save_file(unet.state_dict(), tmp_path / "unet" / weights.WEIGHT_FILES[0])
    return tmp_path


def tensors_of(folder):
    """(path, tensors) of the folder's UNet file, detached from it."""
    path = folder / "unet" / weights.WEIGHT_FILES[0]
    return path, {k: v.clone() for k, v in weights.read_tensors(path).items()}


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_ldm_names_map_one_to_one(part):
    """The LDM table covers every tensor of SD1.5, and no two names meet."""
    with torch.device("meta"):
        names = list((UNet() if part == "unet" else VAEEncoder()).state_dict())
    ldm = [to_ldm(name, part) for name in names]
    assert len(set(ldm)) == len(names)
    assert [weights.hf_name(name, part) for name in ldm] == names


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "input_blocks.99.0.bias", "foo", "a.b"])
def test_unknown_ldm_names_have_no_translation(name):
    """A name outside the table gives None, never a guess."""
    assert weights.hf_name(name, "unet") is None


def test_a_single_ldm_file_loads_without_config(unet_folder, tmp_path):
    """Widths and context come from the tensors; other parts of the file are left alone."""
    _, tensors = tensors_of(unet_folder)
    single = {"model.diffusion_model." + to_ldm(k, "unet"): v for k, v in tensors.items()}
    single["cond_stage_model.transformer.weight"] = torch.zeros(3)
    save_file(single, tmp_path / "single.safetensors")
    unet = UNet.from_pretrained(str(tmp_path / "single.safetensors"))
    assert (unet.channels, unet.context_dim, unet.num_heads) == (LEVELS, 48, 8)
    assert all(torch.equal(v, tensors[k]) for k, v in unet.state_dict().items())


def test_missing_extra_and_misshapen_tensors_are_refused_by_name(unet_folder):
    """Loading is strict: the message names the file, the tensor and both shapes."""
    path, tensors = tensors_of(unet_folder)
    save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, path)
    with pytest.raises(InputError, match=r"unet.*lacks conv_out\.bias"):
        UNet.from_pretrained(str(unet_folder))
    save_file({**tensors, "lora.up": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"unknown tensor lora\.up"):
        UNet.from_pretrained(str(unet_folder))
    save_file({**tensors, "conv_out.bias": torch.zeros(5)}, path)
    with pytest.raises(InputError, match=r"conv_out\.bias has shape \(5,\), expected \(4,\)"):
        UNet.from_pretrained(str(unet_folder))


def test_a_truncated_file_is_named(unet_folder):
    """A download that broke off is recognised before anything is built."""
    path, _ = tensors_of(unet_folder)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.*no complete safetensors"):
        UNet.from_pretrained(str(unet_folder))


def test_wrong_sources_say_what_would_be_right(tmp_path):
    """Missing paths, pickles, empty folders and non-names each get their own sentence."""
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "unet").mkdir()
    for source, message in ((tmp_path / "nowhere", "does not exist"),
                            (tmp_path / "model.ckpt", "pickle"),
                            (tmp_path, "holds no diffusion_pytorch_model"),
                            ("no/such/repository", "neither a local path")):
        with pytest.raises(InputError, match=message):
            weights.find_files(str(source), "unet")


def test_offline_hub_says_which_files_to_copy(monkeypatch):
    """Without network the message names the two files and the folder layout."""
    def refuse(repo_id, filename):
        raise OSError("no network")
    monkeypatch.setattr(weights, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"copy unet/config\.json and unet/diffusion_py"):
        weights.find_files("owner/name", "unet")


def test_only_the_needed_files_are_downloaded(monkeypatch, tmp_path):
    """Two files per part are asked of the hub: the config and the float32 weights."""
    asked = []

    def fetch(repo_id, filename):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)
    monkeypatch.setattr(weights, "hf_hub_download", fetch)
    weights.find_files(weights.SD15, "vae")
    assert asked == [(weights.SD15, "vae/config.json"),
                     (weights.SD15, "vae/diffusion_pytorch_model.safetensors")]


def test_loaded_tensors_are_mapped_not_copied(unet_folder):
    """The parameters of a loaded UNet lie in the mapping of the file: no second copy in memory."""
    unet = UNet.from_pretrained(str(unet_folder))
    maps = open("/proc/self/maps").read().splitlines() if os.path.exists("/proc/self/maps") else []
    if not maps:
        pytest.skip("needs /proc")
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps
              if weights.WEIGHT_FILES[0] in line]
    inside = [any(a <= p.data_ptr() < b for a, b in ranges) for p in unet.parameters()]
    assert all(inside)
