"""Weight files of Stable Diffusion 1.x: finding them, reading them, loading them strictly.

Three layouts are read, all safetensors (pickles are refused):
  * a Hugging Face repository id     only unet/ or vae/ of it is downloaded
  * a local Hugging Face folder      unet/config.json, unet/diffusion_pytorch_model.safetensors, ...
  * one single file in LDM naming    v1-5-pruned-emaonly.safetensors and its kin

Our modules carry the Hugging Face parameter names, so those files load as they are.  LDM names
(CompVis's code, hence also the authors' checkpoints) go through the two tables below.  Tensors stay
mapped to the file until they are touched: nothing is copied, and unread parts cost nothing.
"""
import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HfHubHTTPError
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ops.errors import InputError

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # decisions: the runwayml repository is gone
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
LDM_PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
IGNORED = {"unet": (), "vae": ("decoder.", "post_quant_conv.")}  # not part of the method

# ------------------------------------------------------------------------------------------------
# LDM -> Hugging Face names

LDM_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",
}
LDM_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
                     "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
VAE_ATTENTION = "encoder.mid_block.attentions.0."


def ldm_unet_table() -> dict[str, str]:
    """LDM module name -> Hugging Face module name, for the UNet of Stable Diffusion 1.x."""
    table = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    for n in range(1, 12):  # 1..11: two layers and a downsampler per level
        level, layer = divmod(n - 1, 3)
        if layer == 2:
            table[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            continue
        table[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{layer}"
        if level < 3:
            table[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{layer}"
    for n in range(12):  # three layers per level, the third one followed by an upsampler
        level, layer = divmod(n, 3)
        table[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{layer}"
        if level > 0:
            table[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if layer == 2 and level < 3:  # LDM counts the modules of a block: no attention at level 0
            slot = 2 if level > 0 else 1
            table[f"output_blocks.{n}.{slot}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def ldm_vae_table() -> dict[str, str]:
    """LDM module name -> Hugging Face module name, for the VAE encoder."""
    table = {
        "encoder.conv_in": "encoder.conv_in", "encoder.conv_out": "encoder.conv_out",
        "encoder.norm_out": "encoder.conv_norm_out", "quant_conv": "quant_conv",
        "encoder.mid.block_1": "encoder.mid_block.resnets.0",
        "encoder.mid.block_2": "encoder.mid_block.resnets.1",
        "encoder.mid.attn_1": "encoder.mid_block.attentions.0",
    }
    for level in range(4):
        for layer in range(2):
            name = f"encoder.down_blocks.{level}.resnets.{layer}"
            table[f"encoder.down.{level}.block.{layer}"] = name
        name = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"encoder.down.{level}.downsample.conv"] = name
    return table


LDM_MODULES = {"unet": ldm_unet_table(), "vae": ldm_vae_table()}


def hf_name(name: str, part: str) -> str | None:
    """Hugging Face name of one LDM tensor of `part` ("unet" or "vae"); None if it has none."""
    words, table = name.split("."), LDM_MODULES[part]
    for depth in (5, 4, 3, 2, 1):  # the longest module name that the table knows
        module = table.get(".".join(words[:depth]))
        if module is not None:
            inner = LDM_VAE_ATTENTION if module + "." == VAE_ATTENTION else LDM_RESNET
            leaf, _, kind = ".".join(words[depth:]).rpartition(".")
            return ".".join(filter(None, (module, inner.get(leaf, leaf), kind)))
    return None


def modern_vae_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the pre-2023 spelling of the VAE's attention (the published SD1.5 file has it).

    LDM stores these four matrices as 1x1 convolutions (C, C, 1, 1); ours and HF's are (C, C).
    """
    modern = {}
    for name, tensor in tensors.items():
        if name.startswith(VAE_ATTENTION):
            leaf, _, kind = name.removeprefix(VAE_ATTENTION).rpartition(".")
            name = f"{VAE_ATTENTION}{OLD_VAE_ATTENTION.get(leaf, leaf)}.{kind}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        modern[name] = tensor
    return modern


# ------------------------------------------------------------------------------------------------
# Finding and reading

def find_files(source: str, part: str) -> tuple[Path | None, Path]:
    """Paths of (config.json or None for a single file, weights) of `part` = "unet" or "vae".

    `source` is a local folder, a local .safetensors file or a Hugging Face repository id; a local
    source touches no network.  Raises InputError naming what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / part / name).is_file():
                config = path / part / "config.json"
                if not config.is_file():
                    raise InputError(f"{config} is missing: copy it next to {name}")
                return config, path / part / name
        raise InputError(f"{path / part} holds no {WEIGHT_FILES[0]}: copy it there from {SD15}")
    if path.suffix in (".ckpt", ".pth", ".pt", ".bin"):
        raise InputError(f"{source} is a pickle, which can run code: get the .safetensors file")
    if path.is_file():
        return None, path
    if path.suffix == ".safetensors" or path.is_absolute() or source.startswith((".", "~")):
        raise InputError(f"{source} does not exist: give a folder with {part}/, or a .safetensors")
    return download(source, part)


def download(repo_id: str, part: str) -> tuple[Path, Path]:
    """Fetch the two files of `part` from the hub (or its cache); InputError if they can't be had.

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

    Raises InputError if the file is truncated or no safetensors file, or no name fits.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no complete safetensors file ({error}): reload it") from None
    if not tensors:
        raise InputError(f"{path} holds no tensor named {prefix}*: is it a Stable Diffusion file?")
    return tensors


def read_part(source: str, part: str) -> tuple[dict[str, Tensor], dict, Path]:
    """(tensors by Hugging Face name, config.json as a dict, path read) of "unet" or "vae".

    The config is empty for a single LDM file, whose widths must be read off its tensors.
    """
    config_path, path = find_files(source, part)
    if config_path is None:
        tensors = {}
        for name, tensor in read_tensors(path, LDM_PREFIX[part]).items():
            tensors[hf_name(name, part) or name] = tensor
    else:
        tensors = read_tensors(path)
    tensors = modern_vae_attention(tensors) if part == "vae" else tensors
    tensors = {k: v for k, v in tensors.items() if not k.startswith(IGNORED[part] or "\0")}
    return tensors, read_json(config_path) if config_path else {}, path


def read_json(path: Path) -> dict:
    """A JSON file as a dict; InputError naming it if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


# ------------------------------------------------------------------------------------------------
# Loading

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
    widened = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    module.load_state_dict(widened, assign=True)


def widths(tensors: dict[str, Tensor], names: list[str], path: Path) -> tuple[int, ...]:
    """Output channels of the convolutions `names`; InputError if one is missing."""
    for name in names:
        if name not in tensors:
            raise InputError(f"{path} lacks {name}")
    return tuple(tensors[name].shape[0] for name in names)
