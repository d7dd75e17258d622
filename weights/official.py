"""The authors' released checkpoints (fudan-zvg/meta-prompts): read safely, renamed by one table.

    {'meta', 'state_dict', 'optimizer'}    mmcv, segmentation: ADE20K, Cityscapes
    {'model', 'optimizer'}                 depth: NYU v2, KITTI; names begin with `encoder.`

They are pickles, so only tensors, plain containers and numpy scalars are allowed in.  Task, T, N,
classes and all widths are read off the tensors.  What is ignored is IGNORED, nothing else.
"""
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ops.errors import InputError
from weights.files import dimension, unet_sizes, vae_sizes
from weights.ldm import hf_name, modern_vae_attention

UNET = "unet.unet.diffusion_model."
PREFIXES = {  # official -> ours, after the depth model's `encoder.` has been cut off
    "upconv1.": "neck.0.", "upconv2.": "neck.1.", "upconv3.": "neck.2.", "upconv4.": "neck.3.",
    "decode_head.": "head.decode_head.", "auxiliary_head.": "head.auxiliary_head.",
    "layer1.": "neck.layer1.", "layer2.": "neck.layer2.", "layer3.": "neck.layer3.",
    "layer4.": "neck.layer4.", "out_layer.": "neck.out_layer.",
    "decoder.": "head.decoder.", "last_layer_depth.": "head.last_layer_depth.",
}
IGNORED = ("encoder_vq.post_quant_conv.",  # the VAE's decoder side
           "sd_model.")  # buffers of the noise schedule: no noise is added
NUMPY_CORE = getattr(np, "_core", None) or np.core
SAFE_CLASSES = [  # what numpy's scalars in mmcv's `meta` are made of, under its old and new names
    np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), type(np.dtype(np.int64)),
    NUMPY_CORE.multiarray.scalar, (NUMPY_CORE.multiarray.scalar, "numpy.core.multiarray.scalar")]


def our_name(name: str) -> str | None:
    """Our name of an official tensor; "prompts" / "temb" + " ROW" for a row of a stacked one.

    `cross_unet_conv2` and 3 are further names of the UNet's own output layers.  None: not ours.
    """
    name = name.removeprefix("encoder.")
    if match := re.fullmatch(r"t(\d)", name):
        return f"temb {int(match[1]) - 1}"
    if match := re.fullmatch(r"meta_prompts(\d?)", name):
        return f"prompts {int(match[1] or 1) - 1}"
    if match := re.fullmatch(r"text_adapter(\d)\.fc\.(.*)", name):
        return f"adapters.{int(match[1]) - 1}.{match[2]}"
    if match := re.match(r"cross_unet_conv\d\.(.*)", name):
        name = f"{UNET}out.{match[1]}"
    return backbone_name(name) or by_prefix(name, PREFIXES)


def backbone_name(name: str) -> str | None:
    """Our name of a tensor of the UNet or the VAE encoder; None if it is none of theirs."""
    for prefix, part in ((UNET, "unet"), ("encoder_vq.", "vae")):
        if name.startswith(prefix):
            renamed = hf_name(name.removeprefix(prefix), part)
            return renamed and f"{part}.{renamed}"
    return None


def by_prefix(name: str, prefixes: dict[str, str]) -> str | None:
    """The name with the first prefix that fits replaced; None if none does."""
    for prefix, ours in prefixes.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None


def unpickle(path: Path, classes: list = SAFE_CLASSES) -> dict:
    """The file's contents, with nothing executed; InputError naming a class that is not allowed."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give one of the authors' .pth or .ckpt files")
    try:
        check_archive(path)
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # the rest is advice to load it all the same
        what = f"the class {found[1]}, which could run code" if found else "no torch checkpoint"
        raise InputError(f"{path} holds {what}: it is not loaded") from None
    except Exception as error:                           # a broken file raises whatever happens
        raise InputError(f"{path} is not a complete checkpoint ({type(error).__name__}: "
                         f"{str(error)[:200]}): get it again") from None


def check_archive(path: Path) -> None:
    """ValueError if a zip's checksums, at which torch does not look, do not fit its contents, or if
    it is compressed, as torch writes none and a bomb would be.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("it is compressed")
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} differs")


def state_of(contents: dict, path: Path) -> dict[str, Tensor]:
    """The tensors of an mmcv file, a depth file or a bare state dict, without `module.`."""
    for key in ("state_dict", "model"):
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    if not isinstance(contents, dict) or not all(isinstance(k, str) and isinstance(v, Tensor)
                                                 for k, v in contents.items()):
        raise InputError(f"{path} holds neither a state_dict nor a model of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in contents.items()}


def rename(state: dict[str, Tensor], name_of: Callable[[str], str | None],
           path: Path) -> dict[str, Tensor]:
    """Official names -> ours by `name_of`; InputError on unknown names and unequal aliases."""
    tensors = {}
    for name, tensor in state.items():
        target = name_of(name)
        if target is None:
            if not name.removeprefix("encoder.").startswith(IGNORED):
                raise InputError(f"{path} has the unknown tensor {name}")
            continue
        if target in tensors and not torch.equal(tensors[target], tensor):
            raise InputError(f"{path}: {name} should be another name of {target}, but its values "
                             "differ")
        tensors[target] = tensor
    vae = {k[4:]: tensors.pop(k) for k in list(tensors) if k.startswith("vae.")}
    tensors.update({f"vae.{k}": v for k, v in modern_vae_attention(vae).items()})
    return tensors


def stack_rows(tensors: dict[str, Tensor], path: Path) -> None:
    """One tensor of "prompts 0", "prompts 1", ..., and of temb's; InputError if one is missing."""
    for stacked, join in (("prompts", torch.stack), ("temb", torch.cat)):
        rows = {int(name.split()[1]): tensors.pop(name) for name in list(tensors)
                if name.startswith(f"{stacked} ")}
        if sorted(rows) != list(range(len(rows))) or not rows:
            raise InputError(f"{path} lacks a row of {stacked}: it has {sorted(rows)}")
        tensors[stacked] = join([rows[i].reshape(-1, rows[i].shape[-1]) for i in range(len(rows))])


def describe(tensors: dict[str, Tensor], path: Path) -> dict:
    """Fields of model.Config that the tensors tell, those of "unet" and "vae" as dicts; InputError
    naming a tensor that is missing.  Heads and norm groups, which no tensor tells, are SD1.5's.
    """
    parts = {part: {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()
                    if name.startswith(f"{part}.")} for part in ("unet", "vae")}
    depth = "head.last_layer_depth.0.weight" in tensors
    values = {
        "task": "depth" if depth else "seg", "refine_steps": dimension(tensors, "temb", 0, path),
        "num_prompts": dimension(tensors, "prompts", 1, path),
        "shared_prompts": not depth, "prompt_adapter": depth,
        "unet": unet_sizes(parts["unet"], {}, path), "vae": vae_sizes(parts["vae"], {}, path),
    }
    if depth:
        values["head_channels"] = dimension(tensors, "head.last_layer_depth.0.weight", 0, path)
    else:
        classifier = "head.decode_head.conv_seg.weight"
        values["num_classes"] = dimension(tensors, classifier, 0, path)
        values["head_channels"] = dimension(tensors, classifier, 1, path)
    return values


def add_time_embedding(tensors: dict[str, Tensor]) -> None:
    """Zeros where the depth files lack Stable Diffusion's time embedding, which temb replaces."""
    width = tensors["temb"].shape[1]
    for layer, c_in in (("linear_1", width // 4), ("linear_2", width)):
        for kind, shape in (("weight", (width, c_in)), ("bias", (width,))):
            tensors.setdefault(f"unet.time_embedding.{layer}.{kind}", torch.zeros(shape))


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(values for model.Config, tensors by our names) of one of the authors' files."""
    path = Path(path)
    try:
        tensors = rename(state_of(unpickle(path), path), our_name, path)
        stack_rows(tensors, path)
    except (IndexError, RuntimeError) as error:          # rows of other shapes, or of none
        raise InputError(f"{path}: its tensors don't fit each other ({error})") from None
    values = describe(tensors, path)
    add_time_embedding(tensors)
    return values, tensors
