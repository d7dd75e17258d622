"""The authors' released checkpoints (fudan-zvg/meta-prompts): read safely, renamed by one table.

    {'meta', 'state_dict', 'optimizer'}    mmcv, segmentation: ADE20K, Cityscapes
    {'model', 'optimizer'}                 depth: NYU v2, KITTI; names begin with `encoder.`

They are pickles, so only tensors, plain containers and numpy scalars are allowed in.  Task, T, N,
classes and all widths are read off the tensors.  What is ignored is IGNORED, nothing else.
"""
import pickle
import re
import zipfile
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
    for prefix, part in ((UNET, "unet"), ("encoder_vq.", "vae")):
        if name.startswith(prefix):
            renamed = hf_name(name.removeprefix(prefix), part)
            return renamed and f"{part}.{renamed}"
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None


def unpickle(path: Path) -> dict:
    """The file's contents, with nothing executed; InputError naming a class that is not allowed."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give one of the authors' .pth or .ckpt files")
    try:
        check_archive(path)
        with torch.serialization.safe_globals(SAFE_CLASSES):
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


def rename(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Official names -> ours, rows stacked; InputError on unknown names and unequal aliases."""
    tensors, rows = {}, {"prompts": {}, "temb": {}}
    for name, tensor in state.items():
        target = our_name(name)
        if target is None:
            if not name.removeprefix("encoder.").startswith(IGNORED):
                raise InputError(f"{path} has the unknown tensor {name}")
            continue
        if " " in target:
            stacked, row = target.split()
            rows[stacked][int(row)] = tensor.reshape(-1, tensor.shape[-1])
        elif target in tensors and not torch.equal(tensors[target], tensor):
            raise InputError(f"{path}: {name} should be another name of {target}, but its values "
                             "differ")
        else:
            tensors[target] = tensor
    for stacked, found in rows.items():
        if sorted(found) != list(range(len(found))) or not found:
            raise InputError(f"{path} lacks a row of {stacked}: it has {sorted(found)}")
    tensors["prompts"] = torch.stack([rows["prompts"][i] for i in range(len(rows["prompts"]))])
    tensors["temb"] = torch.cat([rows["temb"][i] for i in range(len(rows["temb"]))])
    vae = {k[4:]: tensors.pop(k) for k in list(tensors) if k.startswith("vae.")}
    tensors.update({f"vae.{k}": v for k, v in modern_vae_attention(vae).items()})
    return tensors


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
        tensors = rename(state_of(unpickle(path), path), path)
    except (IndexError, RuntimeError) as error:          # rows of other shapes, or of none
        raise InputError(f"{path}: its tensors don't fit each other ({error})") from None
    values = describe(tensors, path)
    add_time_embedding(tensors)
    return values, tensors
