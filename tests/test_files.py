"""Weight files are found, read and loaded strictly; every defect is refused by name.

    pytest tests/test_files.py
"""
import json
import os
from dataclasses import asdict

import pytest
import torch
from ldm_names import to_ldm
from oracles import LEVELS, randomise
from safetensors.torch import save_file

from model import Config, read_config
from ops.errors import InputError
from unet import UNet, UNetConfig
from vae import VAEConfig
from weights import files


@pytest.fixture
def unet_folder(tmp_path):
    """A miniature Stable Diffusion folder, made from our own random UNet."""
    unet = randomise(UNet(UNetConfig(LEVELS, context_dim=48)))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"attention_head_dim": 8}))
    save_file(unet.state_dict(), tmp_path / "unet" / files.WEIGHT_FILES[0])
    return tmp_path


def tensors_of(folder):
    """(path, tensors) of the folder's UNet file, detached from it."""
    path = folder / "unet" / files.WEIGHT_FILES[0]
    return path, {k: v.clone() for k, v in files.read_tensors(path).items()}


def test_a_single_ldm_file_loads_without_config(unet_folder, tmp_path):
    """Widths and context come from the tensors; other parts of the file are left alone."""
    _, tensors = tensors_of(unet_folder)
    single = {"model.diffusion_model." + to_ldm(k, "unet"): v for k, v in tensors.items()}
    single["cond_stage_model.transformer.weight"] = torch.zeros(3)
    save_file(single, tmp_path / "single.safetensors")
    unet = UNet.from_pretrained(str(tmp_path / "single.safetensors"))
    assert unet.config == UNetConfig(LEVELS, context_dim=48)
    assert all(torch.equal(v, tensors[k]) for k, v in unet.state_dict().items())


def test_a_unet_alone_loads_from_one_file_or_its_own_folder(unet_folder, tmp_path):
    """Named as diffusers names it, in half precision and without a config, as CleanDIFT's; or with
    one, as diffusers' save_pretrained writes a UNet.  It has no encoder, and is strict, too."""
    _, tensors = tensors_of(unet_folder)
    file = tmp_path / "cleandift_sd15_unet.safetensors"
    save_file({k: v.half() for k, v in tensors.items()}, file)
    unet = UNet.from_pretrained(str(file))
    assert unet.config == UNetConfig(LEVELS, context_dim=48)
    assert all(torch.equal(v, tensors[k].half().float()) for k, v in unet.state_dict().items())
    with pytest.raises(InputError, match=r"holds no tensor named first_stage_model\.\*"):
        files.read_part(str(file), "vae")
    unet = UNet.from_pretrained(str(unet_folder / "unet"))
    assert all(torch.equal(v, tensors[k]) for k, v in unet.state_dict().items())
    with pytest.raises(InputError, match="holds no diffusion_pytorch_model"):
        files.find_files(str(unet_folder / "unet"), "vae")
    save_file({**tensors, "lora.up": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"cleandift.*unknown tensor lora\.up"):
        UNet.from_pretrained(str(file))


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
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.*not a complete .safetensors"):
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
            files.find_files(str(source), "unet")


def test_offline_hub_says_which_files_to_copy(monkeypatch):
    """Without network the message names the two files and the folder layout."""
    def refuse(repo_id, filename):
        raise OSError("no network")
    monkeypatch.setattr(files, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"copy unet/config\.json and unet/diffusion_py"):
        files.find_files("owner/name", "unet")


def test_only_the_needed_files_are_downloaded(monkeypatch, tmp_path):
    """Two files per part are asked of the hub: the config and the float32 files."""
    asked = []

    def fetch(repo_id, filename):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)
    monkeypatch.setattr(files, "hf_hub_download", fetch)
    files.find_files(files.SD15, "vae")
    assert asked == [(files.SD15, "vae/config.json"),
                     (files.SD15, "vae/diffusion_pytorch_model.safetensors")]


def test_flat_sizes_of_before_find_their_place():
    """Each flat field lands where it is now, alone or with others; what is modern stays."""
    defaults = {"task": "seg", "unet": {"channels": [1], "groups": 32, "latent_channels": 4},
                "vae": {"channels": [2], "groups": 32, "latent_channels": 4}}
    assert files.modern_config({}, defaults) == defaults
    assert files.modern_config({"task": "pose", "norm_groups": 8, "vae_channels": [3]}, defaults) \
        == {"task": "pose", "unet": {"channels": [1], "groups": 8, "latent_channels": 4},
            "vae": {"channels": [3], "groups": 8, "latent_channels": 4}}
    modern = {"task": "seg", "unet": {"channels": [5]}, "vae": 7}
    assert files.modern_config(modern, defaults) == modern
    assert defaults["unet"]["groups"] == 32


def test_every_flat_size_has_a_field():
    """The table of flat names covers all fields of both configurations and nothing else."""
    places = [place for places in files.FLAT_SIZES.values() for place in places]
    fields = [(part, name) for part, kind in (("unet", UNetConfig), ("vae", VAEConfig))
              for name in kind.__dataclass_fields__]
    assert sorted(places) == sorted(fields)


def test_a_model_is_a_folder_or_on_the_hub(monkeypatch, tmp_path):
    """find_model: the folder itself, the hub's snapshot of three files, or what is wrong."""
    asked = []

    def fetch(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        if repo_id == "owner/gone":
            raise OSError("no network")
        return str(tmp_path)
    monkeypatch.setattr(files, "snapshot_download", fetch)
    assert files.find_model(str(tmp_path)) == tmp_path and asked == []
    assert files.find_model("owner/name") == tmp_path
    assert asked == [("owner/name", ["config.json", "model.safetensors", "recipe.json"])]
    with pytest.raises(InputError, match=r"neither a folder nor available from the hub \(OSError"):
        files.find_model("owner/gone")
    with pytest.raises(InputError, match="is not a folder"):
        files.find_model("./owner/name")


def test_a_checkpoint_is_uploaded_whole(monkeypatch, tmp_path):
    """Weights, config, recipe and card, nothing else; without its card nothing is uploaded."""
    asked = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            asked.append((repo_id, private, exist_ok))
            if repo_id == "owner/closed":
                raise OSError("no token")

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            asked.append((repo_id, folder_path, allow_patterns))
            return "https://address"

    monkeypatch.setattr(files, "HfApi", Api)
    names = [*files.MODEL_FILES, "README.md"]
    for name in names[:3]:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="lacks README.md: best/ of a run holds config.json"):
        files.upload_model(tmp_path, "owner/name", None)
    (tmp_path / "README.md").touch()
    assert asked == [] and files.upload_model(tmp_path, "owner/name", True) == "https://address"
    assert asked == [("owner/name", True, True), ("owner/name", tmp_path, names)]
    with pytest.raises(InputError, match="can't be uploaded to owner/closed: no token"):
        files.upload_model(tmp_path, "owner/closed", None)


def test_loaded_tensors_are_mapped_not_copied(unet_folder):
    """The parameters of a loaded UNet lie in the mapping of the file: no second copy in memory."""
    unet = UNet.from_pretrained(str(unet_folder))
    maps = open("/proc/self/maps").read().splitlines() if os.path.exists("/proc/self/maps") else []
    if not maps:
        pytest.skip("needs /proc")
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps
              if files.WEIGHT_FILES[0] in line]
    inside = [any(a <= p.data_ptr() < b for a, b in ranges) for p in unet.parameters()]
    assert all(inside)


@pytest.mark.parametrize("change, message", [
    (lambda x: torch.full_like(x, float("nan")), "holds values that are not finite"),
    (lambda x: x.to(torch.complex64), "is torch.complex64, expected torch.float32"),
    (lambda x: x.to(torch.int32), "is torch.int32"), (lambda x: x > 0, "is torch.bool"),
    (lambda x: x.to(torch.float8_e5m2), "is torch.float8_e5m2")])
def test_weights_that_are_no_finite_floats_are_refused(unet_folder, change, message):
    """Of whatever source: an answer would be nonsense without a word."""
    path, tensors = tensors_of(unet_folder)
    name = "conv_in.bias"
    path.unlink()
    save_file({**tensors, name: change(tensors[name])}, path)
    with pytest.raises(InputError, match=f"{name} {message}"):
        UNet.from_pretrained(str(unet_folder))


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "3"])
def test_a_config_that_is_no_object_is_refused(unet_folder, text):
    """Of Stable Diffusion's folder, and of one of our models."""
    (unet_folder / "unet" / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json holds no JSON object"):
        UNet.from_pretrained(str(unet_folder))
    with pytest.raises(InputError, match="config.json must be an object"):
        read_config(unet_folder / "unet" / "config.json")


@pytest.mark.parametrize("part, sizes", [
    ("unet", {"channels": [32, 64, 96]}), ("unet", {"groups": 7}), ("unet", {"num_heads": 3}),
    ("unet", {"context_dim": 7}), ("unet", {"channels": [8] * 4, "groups": 8}),
    ("vae", {"groups": 7}), ("vae", {"channels": [32, 64, 96, 128, 160]})])
def test_sizes_that_make_no_model_are_refused(tmp_path, part, sizes):
    """Not four levels, or widths that groups or heads do not divide."""
    values = asdict(Config())
    values[part].update(sizes)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"config.json: {part}: channels .*multiples of"):
        read_config(tmp_path / "config.json")
