"""The authors' checkpoints of VPD (wl-zhao/VPD): three kinds, told apart by their tensors.

    {'meta', 'state_dict', 'optimizer'}           mmcv, segmentation: ADE20K; `decode_head.`
    {'model', 'optimizer'}                        depth: NYU v2; names begin with `encoder.`
    {'model', 'optimizer', 'epoch', 'args', ...}  refer: RefCOCO, +, g; `classifier.`

They are read as Meta Prompts' are (official.py), with argparse's Namespace, refer's `args`, as the
only further class.
"""
import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from ops.errors import InputError
from weights.files import dimension, unet_sizes, vae_sizes
from weights.official import SAFE_CLASSES, backbone_name, by_prefix, rename, state_of, unpickle

PREFIXES = {  # official -> ours, after the depth model's `encoder.` has been cut off
    "gamma": "gamma", "class_embeddings": "class_embeddings", "text_adapter.fc.": "text_adapter.",
    "neck.": "neck.", "decode_head.": "head.",
    "layer1.": "neck.layer1.", "layer2.": "neck.layer2.", "out_layer.": "neck.out_layer.",
    "decoder.": "head.decoder.", "last_layer_depth.": "head.last_layer_depth.",
    "classifier.conv1_1.": "head.classify.",
}
STAGES = {"4": 0, "3": 1, "2": 2}  # refer's head counts its levels from the finest, 1
LAYERS = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4}  # of a stage; a ReLU after each norm


def our_name(name: str) -> str | None:
    """Our name of an official tensor; None: not ours."""
    name = name.removeprefix("encoder.")
    if match := re.fullmatch(r"classifier\.(conv[12]|bn[12])_([432])\.(\w+)", name):
        return f"head.stages.{STAGES[match[2]]}.{LAYERS[match[1]]}.{match[3]}"
    return backbone_name(name) or by_prefix(name, PREFIXES)


def describe(tensors: dict[str, Tensor], path: Path) -> dict:
    """Fields of VPDConfig that the tensors tell, those of "unet" and "vae" as dicts; InputError
    naming a tensor that is missing.  Heads and norm groups, which no tensor tells, are SD1.5's.
    """
    parts = {part: {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()
                    if name.startswith(f"{part}.")} for part in ("unet", "vae")}
    values = {"unet": unet_sizes(parts["unet"], {}, path), "vae": vae_sizes(parts["vae"], {}, path)}
    if "head.classify.weight" in tensors:
        _, _, c2, c3 = values["unet"]["channels"]
        joined = dimension(tensors, "head.stages.0.0.weight", 1, path)
        return {"task": "refer", "num_tokens": joined - c2 - c3, **values}
    depth = "head.last_layer_depth.0.weight" in tensors
    width = ("head.last_layer_depth.0.weight", 0) if depth else ("head.conv_seg.weight", 1)
    return {"task": "depth" if depth else "seg", **values,
            "num_classes": dimension(tensors, "class_embeddings", 0, path),
            "head_channels": dimension(tensors, *width, path)}


def add_output_layers(tensors: dict[str, Tensor], path: Path) -> None:
    """Zeros where the depth files lack the UNet's noise prediction, which no task computes."""
    c0, latent_channels = (dimension(tensors, "unet.conv_in.weight", i, path) for i in (0, 1))
    for name, shape in (("conv_norm_out.weight", (c0,)), ("conv_norm_out.bias", (c0,)),
                        ("conv_out.weight", (latent_channels, c0, 3, 3)),
                        ("conv_out.bias", (latent_channels,))):
        tensors.setdefault(f"unet.{name}", torch.zeros(shape))


def convert(state: dict[str, Tensor], path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(values for VPDConfig, tensors by our names) of the authors' tensors."""
    try:
        tensors = rename(state, our_name, path)
        if "head.last_layer_depth.0.weight" in tensors:
            add_output_layers(tensors, path)
        return describe(tensors, path), tensors
    except (IndexError, RuntimeError) as error:          # shapes that no model has
        raise InputError(f"{path}: its tensors don't fit each other ({error})") from None


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(values for VPDConfig, tensors by our names) of one of the authors' files."""
    path = Path(path)
    contents = unpickle(path, [*SAFE_CLASSES, argparse.Namespace])
    return convert(state_of(contents, path), path)
