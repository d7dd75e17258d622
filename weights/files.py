"""Weight files of Stable Diffusion 1.x: finding them, reading them, loading them strictly.

Four layouts are read, all safetensors (pickles are refused):
  * a Hugging Face repository id     only unet/ or vae/ of it is downloaded
  * a local Hugging Face folder      unet/config.json, unet/diffusion_pytorch_model.safetensors, ...
  * one single file in LDM naming    v1-5-pruned-emaonly.safetensors and its kin
  * a UNet alone, as diffusers names it: its folder, or one file such as CleanDIFT's

Our modules carry the Hugging Face parameter names, so those files load as they are.  LDM names
(CompVis's code, hence also the authors' checkpoints) go through the tables in ldm.py.  Tensors stay
mapped to the file until they are touched: nothing is copied, and unread parts cost nothing.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HfHubHTTPError
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ops.errors import InputError, read_object
from ops.settings import checked
from weights.ldm import hf_name, modern_vae_attention

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # runwayml's repository is gone
TINY_SD = Path(__file__).parent / "tiny-sd"  # pretrained by tools/pretrain.py
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
LDM_PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of weights
INTEGERS = (torch.int64,)  # of BatchNorm's counters
BARE = "conv_in.weight"  # is in a file that holds a UNet and nothing else
MODEL_FILES = ("config.json", "model.safetensors", "recipe.json")  # the last: how to ask the model
IGNORED = {"unet": (), "vae": ("decoder.", "post_quant_conv.")}  # not part of the method


# ------------------------------------------------------------------------------------------------
# Finding and reading

def local(source: str) -> Path:
    """The path that a source may be; "tiny" is our own small model."""
    return TINY_SD if source == "tiny" else Path(source).expanduser()


def find_files(source: str, part: str) -> tuple[Path | None, Path]:
    """Paths of (config.json or None for a single file, weights) of `part` = "unet" or "vae".

    `source` is a local folder, a local .safetensors file, a Hugging Face repository id or "tiny"; a
    local source touches no network.  A folder is a whole model's, or the UNet's own.  Raises
    InputError naming what was looked for.
    """
    path = local(source)
    if path.is_dir():
        for folder in (path / part, path) if part == "unet" else (path / part,):
            for name in WEIGHT_FILES:
                if (folder / name).is_file():
                    config = folder / "config.json"
                    if not config.is_file():
                        raise InputError(f"{config} is missing: copy it next to {name}")
                    return config, folder / name
        raise InputError(f"{path / part} holds no {WEIGHT_FILES[0]}: copy it there from {SD15}")
    if path.suffix in (".ckpt", ".pth", ".pt", ".bin"):
        raise InputError(f"{source} is a pickle, which can run code: get the .safetensors file")
    if path.is_file():
        return None, path
    if path.suffix == ".safetensors" or path.is_absolute() or source.startswith((".", "~")):
        raise InputError(f"{source} does not exist: give a folder with {part}/, or a .safetensors")
    return download(source, part)


def download(repo_id: str, part: str) -> tuple[Path, Path]:
    """Fetch the two files of `part` from the hub or its cache; InputError if not available.

    HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME are honoured by huggingface_hub.
    """
    try:
        config = hf_hub_download(repo_id, f"{part}/config.json")
        try:
            weights = hf_hub_download(repo_id, f"{part}/{WEIGHT_FILES[0]}")
        except EntryNotFoundError:
            weights = hf_hub_download(repo_id, f"{part}/{WEIGHT_FILES[1]}")
    except HFValidationError:
        raise InputError(f"{repo_id} is neither a local path nor OWNER/NAME on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot download {part}/ of {repo_id} ({reason}): copy {part}/config.json and "
            f"{part}/{WEIGHT_FILES[0]} into a folder and give that folder as the source"
        ) from None
    return Path(config), Path(weights)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a safetensors file whose names start with `prefix` (cut off), still mapped to it.

    Raises InputError if the file is missing, truncated or no .safetensors file, or no name fits.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except Exception as error:                           # a broken file raises whatever happens
        raise InputError(f"{path} is not a complete .safetensors file ({str(error)[:200]}): get it "
                         "again") from None
    if not tensors:
        raise InputError(f"{path} holds no tensor named {prefix}*: is it a Stable Diffusion file?")
    return tensors


def read_part(source: str, part: str) -> tuple[dict[str, Tensor], dict, Path]:
    """(tensors by Hugging Face name, config.json as a dict, path read) of "unet" or "vae".

    The config is empty for a single file, whose widths must be read off its tensors.
    """
    config_path, path = find_files(source, part)
    if config_path is None:
        bare = part == "unet" and BARE in read_tensors(path)
        found = read_tensors(path, "" if bare else LDM_PREFIX[part])
        tensors = {hf_name(name, part) or name: tensor for name, tensor in found.items()}
    else:
        tensors = read_tensors(path)
    tensors = modern_vae_attention(tensors) if part == "vae" else tensors
    tensors = {k: v for k, v in tensors.items() if not k.startswith(IGNORED[part] or "\0")}
    return tensors, read_object(config_path) if config_path else {}, path


# ------------------------------------------------------------------------------------------------
# Loading

def assemble(kind: type[nn.Module], config, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """kind(config) with the tensors of `path`, without memory of its own: see `load_strict`."""
    with torch.device("meta"):
        module = kind(config)
    load_strict(module, tensors, path)
    return module


def load_strict(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give a module built on the meta device its tensors; every name and shape must agree.

    The tensors are assigned, not copied; half precision is widened to float32 (master weights).
    Raises InputError with the first disagreeing name.
    """
    wanted = module.state_dict()
    check = [
        ("lacks", sorted(wanted.keys() - tensors.keys())),
        ("has the unknown tensor", sorted(tensors.keys() - wanted.keys())),
    ]
    for verb, names in check:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{path} {verb} {names[0]}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, "
                             f"expected {tuple(wanted[name].shape)}")
        if tensor.dtype not in (FLOATS if wanted[name].is_floating_point() else INTEGERS):
            raise InputError(f"{path}: {name} is {tensor.dtype}, expected {wanted[name].dtype}")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite")
    widened = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    module.load_state_dict(widened, assign=True)


# ------------------------------------------------------------------------------------------------
# Sizes: off the tensors; a config.json beside them must say the same, or nothing

SAME = "a Stable Diffusion 1.x {} has"  # else it is another model
SD1_UNET = {
    "act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
    "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "use_linear_projection": False, "only_cross_attention": False, "dual_cross_attention": False,
    "class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None,
    "resnet_time_scale_shift": "default", "transformer_layers_per_block": 1,
    "num_attention_heads": None, "attention_type": "default", "time_embedding_type": "positional",
    "time_embedding_act_fn": None, "timestep_post_act": None, "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD1_VAE = {"act_fn": "silu", "in_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4}


def unet_sizes(tensors: dict[str, Tensor], values: dict, path: Path) -> dict:
    """Fields of UNetConfig of a UNet's tensors; `values` is its config.json, which alone tells the
    heads and the norms' groups (else SD1.5's).

    Raises InputError if config.json contradicts the tensors or describes another architecture.
    """
    check_config(values, SD1_UNET, path, SAME.format("UNet"))
    channels, layers = level_sizes(tensors, "", path)
    keys = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    context_dim = dimension(tensors, keys, 1, path)
    latent_channels = dimension(tensors, "conv_out.weight", 0, path)
    check_config(values, {"block_out_channels": list(channels), "layers_per_block": layers,
                          "cross_attention_dim": context_dim, "in_channels": latent_channels,
                          "out_channels": latent_channels}, path, "its tensors say")
    return {"channels": channels, "layers": layers, "context_dim": context_dim,
            "latent_channels": latent_channels,
            "num_heads": divisor(values, "attention_head_dim", 8, channels, path),
            "groups": divisor(values, "norm_num_groups", 32, channels, path)}


def vae_sizes(tensors: dict[str, Tensor], values: dict, path: Path) -> dict:
    """Fields of VAEConfig of a VAE encoder's tensors, as `unet_sizes`."""
    check_config(values, SD1_VAE, path, SAME.format("VAE"))
    channels, layers = level_sizes(tensors, "encoder.", path)
    latent_channels = dimension(tensors, "quant_conv.weight", 0, path) // 2
    check_config(values, {"block_out_channels": list(channels), "layers_per_block": layers,
                          "latent_channels": latent_channels}, path, "its tensors say")
    return {"channels": channels, "layers": layers, "latent_channels": latent_channels,
            "groups": divisor(values, "norm_num_groups", 32, channels, path)}


def dimension(tensors: dict[str, Tensor], name: str, axis: int, path: Path) -> int:
    """Size of a tensor along an axis; InputError if the file `path` lacks the tensor."""
    if name not in tensors or tensors[name].ndim <= axis:
        raise InputError(f"{path} lacks {name}, or it has too few dimensions")
    return tensors[name].shape[axis]


def level_sizes(tensors: dict[str, Tensor], prefix: str, path: Path) -> tuple[tuple[int, ...], int]:
    """(output channels of each of the four levels, residual blocks per level).

    `prefix` is what the names have in front of "down_blocks".
    """
    channels = tuple(dimension(tensors, f"{prefix}down_blocks.{i}.resnets.0.conv1.weight", 0, path)
                     for i in range(4))
    return channels, sum(name.startswith(f"{prefix}down_blocks.0.resnets.")
                         and name.endswith(".conv1.weight") for name in tensors)


def check_config(values: dict, expected: dict, path: Path, whose: str) -> None:
    """InputError if the config.json beside `path`, `values`, says other than `expected`.

    A key that is left out or null says nothing.  `whose` introduces the expected value.
    """
    for key, wanted in expected.items():
        if values.get(key) not in (None, wanted):
            raise InputError(f"{path.parent / 'config.json'}: {key} is {values[key]}, {whose} "
                             f"{wanted}")


def divisor(values: dict, key: str, default: int, channels: tuple[int, ...], path: Path) -> int:
    """An integer of config.json that must divide the channels of every level; or InputError."""
    where = f"{path.parent / 'config.json'}: {key}"
    number = checked(int, values.get(key, default), where)
    if number < 1 or any(width % number for width in channels):
        raise InputError(f"{where} is {number}, which does not divide the channels {channels}")
    return number


# ------------------------------------------------------------------------------------------------
# Our own models

FLAT_SIZES = {  # fields of older config.json files -> where they are now
    "unet_channels": [("unet", "channels")], "unet_layers": [("unet", "layers")],
    "num_heads": [("unet", "num_heads")], "context_dim": [("unet", "context_dim")],
    "vae_channels": [("vae", "channels")], "vae_layers": [("vae", "layers")],
    "latent_channels": [("unet", "latent_channels"), ("vae", "latent_channels")],
    "norm_groups": [("unet", "groups"), ("vae", "groups")],
}


def find_model(source: str) -> Path:
    """Folder of a saved model: `source` itself, or the hub's snapshot of it."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or source.startswith((".", "~")):
        raise InputError(f"{source} is not a folder: give one that holds config.json and "
                         "model.safetensors, or OWNER/NAME on the hub")
    try:
        return Path(snapshot_download(source, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{source} is neither a folder nor available from the hub "
                         f"({type(error).__name__})") from None


def upload_model(folder: Path, repo_id: str, private: bool | None) -> str:
    """Upload a checkpoint's files to OWNER/NAME on the hub, made if need be; returns the commit's
    address.  InputError if one is missing, its card with the licence too, or the hub refuses.
    """
    names = [*MODEL_FILES, "README.md"]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}: best/ of a run holds {', '.join(names)}")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} can't be uploaded to {repo_id}: {reason}") from None


def load_model(kind: type[nn.Module], read_config, source: str) -> nn.Module:
    """The model of a class that `save_model` wrote, in evaluation mode; read_config(path) reads its
    config.json.
    """
    folder = find_model(source)
    config, path = read_config(folder / "config.json"), folder / "model.safetensors"
    return assemble(kind, config, read_tensors(path), path).eval()


def save_model(model: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors of a model into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n",
                                        encoding="utf-8")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def modern_config(values: dict, defaults: dict) -> dict:
    """A saved config.json in today's form: flat sizes moved into their part, newer fields added.

    `defaults` has every field, sizes in the parts "unet" and "vae".  What is no object stays.
    """
    if not isinstance(values, dict):
        return values
    modern = dict(defaults)
    for name in FLAT_SIZES.keys() & values.keys():
        for part, field in FLAT_SIZES[name]:
            modern[part] = {**modern[part], field: values[name]}
    modern.update({name: value for name, value in values.items() if name not in FLAT_SIZES})
    return modern
