"""The authors' VPD at a tiny width: inputs, outputs, gradients; weights drawn by name."""
import argparse
import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from official_fixture import NOISE_SCHEDULE, draw
from torch import Tensor

from vpd.model import VPDModel
from vpd.text import TextConfig, TextEncoder

GOLDEN = Path(__file__).parent / "golden"
TASKS = ("seg", "depth", "refer")


def read_golden(name: str) -> dict:
    """A gzipped JSON file of tests/golden."""
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def fixture(task: str) -> tuple[dict, dict[str, Tensor]]:
    """(what is known of the authors' model, its tensors: inputs whole, of others every n-th value).
    """
    with np.load(GOLDEN / f"vpd_{task}.npz") as arrays:
        return read_golden(f"vpd_{task}"), {k: torch.from_numpy(arrays[k]) for k in arrays.files}


@cache
def drawn(task: str) -> dict[str, Tensor]:
    """All tensors of a fixture, by the authors' names; not to be changed."""
    info = read_golden(f"vpd_{task}")
    return {name: draw(name, shape, info["seed"]) for name, shape in info["state"].items()}


def vpd_contents(info: dict) -> dict:
    """What is in a file of the authors: wrapped as each of the three tasks is."""
    state = dict(drawn(info["task"]))
    if info["task"] == "depth":
        return {"model": state, "optimizer": {"state": {}, "param_groups": []}}
    if info["task"] == "refer":
        return {"model": state, "optimizer": {}, "epoch": 3, "lr_scheduler": {"last_epoch": 9},
                "args": argparse.Namespace(lr=5e-5, dataset="refcoco", device="cuda")}
    state.update({f"sd_model.{name}": torch.zeros(1000) for name in NOISE_SCHEDULE})
    meta = {"CLASSES": ("a", "b"), "iter": 80000, "env": {"lr": torch.tensor(8e-5).numpy()[()]}}
    return {"meta": meta, "state_dict": state, "optimizer": {}}


def load_vpd(info: dict, folder: Path) -> VPDModel:
    """Our model of a fixture in float64, through a file in the authors' layout."""
    path = folder / f"{info['task']}.pth"
    torch.save(vpd_contents(info), path)
    return VPDModel.from_official(path, max_depth=info.get("max_depth", 10.0)).double()


def inputs(info: dict, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(images in [0, 1], target, text) in float64, the text as `VPDModel.context` wants it."""
    if info["task"] == "depth":
        return (tensors["image_uint8"].double() / 255, tensors["gt_mm"].double() / 1000,
                tensors["class_ids"])
    images = (tensors["image"].double() + 1) / 2
    if info["task"] == "seg":
        return images, tensors["gt"][:, 0].long(), None
    return images, tensors["target"].long(), text_encoder(info)(tensors["input_ids"])[0]


def text_encoder(info: dict) -> TextEncoder:
    """The authors' frozen CLIP of the refer fixture, in float64."""
    config = {k: v for k, v in info["clip"].items() if k in TextConfig.__dataclass_fields__}
    encoder = TextEncoder(TextConfig(**config)).eval()
    encoder.load_state_dict({name: draw(name, shape, info["seed"])
                             for name, shape in info["clip_state"].items()})
    return encoder.double().requires_grad_(False)
