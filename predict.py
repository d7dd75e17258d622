"""Prediction: one trained model, whole images of any size, by a protocol.

    seg     overlapping windows, their logits averaged (mmsegmentation 0.30.0, spec A.5)
    depth   shifted windows and their mirror images averaged (official code, spec B.6)
    pose    heatmaps of a person's crop and of its mirror image, decoded (UDP, pose spec 6)
"""
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import pose
from errors import InputError
from heads import resize
from model import MetaPromptModel


@dataclass(frozen=True)
class Protocol:
    """How whole images are segmented; one row per data set below."""

    scale: tuple[int, int] | None  # (long, short) bounds of the resize before prediction
    window: int | None  # side of the sliding window in pixels; None: the whole image at once
    stride: int | None
    batch: int = 1  # images at once; more than 1 only where all have one size
    source: str = ""


@dataclass(frozen=True)
class DepthProtocol:
    """How depth is predicted and what counts; one row per data set below."""

    windows: int  # square windows of full height, evenly shifted; 1: the whole image at once
    flip: bool  # average with the mirror image's prediction
    box: str | None  # "nyu", "garg", "eigen": the benchmark's crop; None: all pixels
    max_depth: float  # metres; pixels at or beyond it, or at or below min_depth, don't count
    resize_scale: int  # for the authors' checkpoints, which don't hold it
    units: float  # of exported 16-bit PNGs, per metre
    min_depth: float = 1e-3
    batch: int = 1
    source: str = ""


@dataclass(frozen=True)
class PoseProtocol:
    """How joints are predicted from people's boxes, and which people are kept."""

    flip: bool = True  # average with the mirror image's heatmaps (ViTPose's default)
    nms: float = 0.9  # OKS above which the lower of two people of an image is dropped
    batch: int = 16  # people at once
    source: str = ""


PROTOCOLS = {
    ("seg", "shapes"): Protocol(None, None, None, batch=16, source="ours"),
    ("seg", "folder"): Protocol(None, None, None, source="ours: whole images at their own size"),
    ("seg", "ade20k"): Protocol((2048, 512), 512, 341, source="official: configs/ade.py"),
    ("seg", "cityscapes"): Protocol((2048, 1024), 1024, 512,
                                    source="official: configs/cityscapes.py"),
    ("seg", "cityscapes-extra"): Protocol((2048, 1024), 1024, 512,
                                          source="official: configs/cityscapes_extra.py"),
    ("seg", "mapillary"): Protocol((2048, 1024), 1024, 512, source="ours: as Cityscapes"),
    ("depth", "shapes"): DepthProtocol(1, True, None, 80.0, 0, 256.0, batch=16, source="ours"),
    ("depth", "folder"): DepthProtocol(1, True, None, 80.0, 1, 256.0, source="ours"),
    ("depth", "nyu"): DepthProtocol(2, True, "nyu", 10.0, 1, 1000.0,
                                    source="official: depth/test.sh, NYU v2"),
    ("depth", "kitti"): DepthProtocol(16, True, "garg", 80.0, 2, 256.0,
                                      source="official: depth/test.sh, KITTI"),
    ("pose", "shapes"): PoseProtocol(batch=32, source="ours"),
    ("pose", "folder"): PoseProtocol(source="as COCO"),
    ("pose", "coco"): PoseProtocol(source="mmpose 1.x and ViTPose: flip test, UDP, OKS-NMS 0.9"),
}


def find_protocol(task: str, dataset: str) -> Protocol | DepthProtocol | PoseProtocol:
    """The protocol of a data set; InputError naming the possible ones."""
    if (task, dataset) not in PROTOCOLS:
        known = sorted({t for t, _ in PROTOCOLS})
        if task not in known:
            raise InputError(f"--task {task} is unknown: choose from {', '.join(known)}")
        names = ", ".join(name for t, name in PROTOCOLS if t == task)
        raise InputError(f"--dataset {dataset} is unknown for {task}: choose from {names}")
    return PROTOCOLS[task, dataset]


# ------------------------------------------------------------------------------------------------
# Devices

def pick_device(name: str) -> torch.device:
    """"auto", "cpu" or "cuda[:i]" -> device; InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown: auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch {torch.__version__} sees "
                         f"{torch.cuda.device_count()} GPUs here; cpu works everywhere")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """"auto", "bfloat16" or "float32" -> dtype; auto is bfloat16 where the device is fast at it."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
        fast = "amx_bf16" in flags or "avx512_bf16" in flags
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision around forward passes; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


# ------------------------------------------------------------------------------------------------
# Sliding windows

def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(y1, y2, x1, x2) of the windows, row by row; the last ones are shifted back to the edge.

    An image smaller than `crop` gives one smaller window, without padding (spec A.5).
    """
    def starts(length: int) -> list[int]:
        count = max(length - crop + stride - 1, 0) // stride + 1
        return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]

    return [(y, min(y + crop, height), x, min(x + crop, width))
            for y in starts(height) for x in starts(width)]


def slide(predict, images: Tensor, crop: int, stride: int, batch: int = 8) -> Tensor:
    """Average of predict(window) over overlapping windows; `batch` windows per call.

    images (B, 3, H, W); predict: (b, 3, h, w) -> (b, C, h, w).  Returns (B, C, H, W) float32.
    """
    B, _, H, W = images.shape
    places = windows(H, W, crop, stride)
    total, count = None, images.new_zeros(1, 1, H, W)
    per_call = max(1, batch // B)
    for first in range(0, len(places), per_call):
        group = places[first:first + per_call]
        crops = torch.cat([images[:, :, y1:y2, x1:x2] for y1, y2, x1, x2 in group])
        outputs = predict(crops).float()
        if total is None:
            total = outputs.new_zeros(B, outputs.shape[1], H, W)
        for output, (y1, y2, x1, x2) in zip(outputs.split(B), group):
            total[:, :, y1:y2, x1:x2] += output
            count[:, :, y1:y2, x1:x2] += 1
    return total / count


@torch.inference_mode()
def predict_seg(model: MetaPromptModel, images: Tensor, size, protocol: Protocol,
                dtype: torch.dtype) -> Tensor:
    """Class probabilities at `size`, (B, classes, *size), of images (B, 3, H, W) in [0, 1]."""
    with autocast(images.device, dtype):
        if protocol.window is None:
            logits = model(images).float()
        else:
            logits = slide(model, images, protocol.window, protocol.stride)
    return resize(logits, size).softmax(dim=1)


def shifted_windows(width: int, side: int, count: int) -> list[int]:
    """Left edges of `count` square windows of `side` over an image `width` wide.

    DEVIATION: the last window is moved to the right edge; the official code leaves up to `count`
    columns of a KITTI image without prediction, outside what its metrics count (decisions 15).
    """
    if count == 1 or width <= side:
        return [0]
    interval = (width - side) // (count - 1)
    starts = [i * interval for i in range(count - 1)] + [width - side]
    if max(interval, starts[-1] - starts[-2]) <= side:
        return starts
    count = max(count, -(-width // side))                # so wide that these windows leave gaps
    return [i * (width - side) // (count - 1) for i in range(count)]


@torch.inference_mode()
def predict_depth(model: MetaPromptModel, images: Tensor, protocol: DepthProtocol,
                  dtype: torch.dtype, batch: int = 8) -> Tensor:
    """Metres (B, H, W) of images (B, 3, H, W) in [0, 1]: mean over windows and mirror images."""
    B, _, H, W = images.shape
    side = min(H, W) if protocol.windows > 1 else W
    places = shifted_windows(W, side, protocol.windows)
    total, count = images.new_zeros(B, H, W), images.new_zeros(W)
    for first in range(0, len(places), max(1, batch // B)):
        group = places[first:first + max(1, batch // B)]
        crops = torch.cat([images[..., x:x + side] for x in group])
        with autocast(images.device, dtype):
            depth = model(crops)[:, 0].float()
            if protocol.flip:
                depth = (depth + model(crops.flip(-1))[:, 0].float().flip(-1)) / 2
        for output, x in zip(depth.split(B), group):
            total[..., x:x + side] += output
            count[x:x + side] += 1
    return total / count


@torch.inference_mode()
def predict_pose(model: MetaPromptModel, images: Tensor, center: Tensor, scale: Tensor,
                 protocol: PoseProtocol, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Joints (B, 17, 2) in pixels of the image, their scores (B, 17), heatmaps (B, 17, h, w).

    images (B, 3, H, W): the crops that `center` and `scale`, (B, 2) each, cut from the images.
    """
    with autocast(images.device, dtype):
        heatmaps = model(images).float()
        if protocol.flip:
            heatmaps = (heatmaps + pose.flip_heatmaps(model(images.flip(-1)).float())) / 2
    kernel = int(6 * model.config.sigma) - 1             # the widest blur inside a blob's window
    xy, score = pose.decode(heatmaps, kernel)
    return pose.to_image(xy, center, scale, heatmaps.shape[-2:]), score, heatmaps
