"""Prediction: one trained model, whole images of any size, by a protocol.

    seg     overlapping windows, their logits averaged (mmsegmentation 0.30.0, spec A.5)
    depth   shifted windows and their mirror images averaged (official code, spec B.6)
    pose    heatmaps of a person's crop and of its mirror image, decoded (UDP, pose spec 6)
"""
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ops import augment
from ops import udp as pose
from ops.errors import InputError
from heads import resize
from model import MetaPromptModel


@dataclass(frozen=True)
class Protocol:
    """How whole images are segmented; one row per data set below."""

    scale: tuple[int, int] | None  # (long, short) bounds of the resize before prediction
    window: int | None  # side of the sliding window in pixels; None: the whole image at once
    stride: int | None
    batch: int = 1  # images at once; more than 1 only where all have one size
    ratios: tuple[float, ...] = (1.0,)  # of `scale`, the image's own size if None; averaged
    flip: bool = False  # average with the mirror image's prediction
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


TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # official: cityscapes_ms.py (decisions 12)


def with_tta(protocol: Protocol | DepthProtocol | PoseProtocol) -> Protocol:
    """The protocol with 7 scales and mirror images, 14 passes; InputError unless segmentation's."""
    if not isinstance(protocol, Protocol):
        raise InputError("--tta is for segmentation: depth and pose have their mirror images in "
                         "the protocol, other scales would change metres and joints' blobs")
    return replace(protocol, ratios=TTA_RATIOS, flip=True)


# ------------------------------------------------------------------------------------------------
# In words

def seg_words(protocol: Protocol) -> list[tuple[str, str]]:
    """(what, how) for every field."""
    resized, windows = "no, each image at its own size", "none, the whole image at once"
    if protocol.scale is not None:
        resized = (f"to at most {protocol.scale[0]} x {protocol.scale[1]} pixels, longer x shorter "
                   "side, aspect kept")
    if protocol.window is not None:
        windows = (f"{protocol.window} x {protocol.window} pixels, every {protocol.stride}, the "
                   "last moved back to the edge; logits averaged")
    scales = ", ".join(f"{ratio:g}" for ratio in protocol.ratios)
    return [("resized", resized),
            ("scales", f"{scales} of that; probabilities averaged"
             if len(protocol.ratios) > 1 else f"{scales} of that, no other"),
            ("mirror image", "predicted too, probabilities averaged" if protocol.flip else "no"),
            ("windows", windows),
            ("at once", f"{protocol.batch} images"),
            ("result", "logits resized to the label's size, softmax, the likeliest class"),
            ("metrics", "pixels labelled 255 don't count; intersections and unions summed over the "
             "set, IoU per class, its mean over the classes that are true or predicted somewhere")]


def depth_words(protocol: DepthProtocol) -> list[tuple[str, str]]:
    """(what, how) for every field."""
    box = {"nyu": "NYU's (Eigen's crop)", "garg": "Garg's", "eigen": "Eigen's (KITTI)"}
    count = protocol.windows
    return [("windows", "none, the whole image at once" if count == 1 else
             f"{count} squares as high as the image, evenly shifted over its width; averaged"),
            ("mirror image", "predicted too, metres averaged" if protocol.flip else "no"),
            ("sides", "enlarged by the model as its config.json says; the authors' files don't: to "
             f"(side // 64 + {protocol.resize_scale}) * 64"),
            ("at once", f"{protocol.batch} images"),
            ("metrics", f"inside {box[protocol.box]} box" if protocol.box else "all pixels"),
            ("", f"only where the truth is above {protocol.min_depth:g} and below "
             f"{protocol.max_depth:g} m; per image, then the mean over images"),
            ("--export", f"16-bit PNG, {protocol.units:g} per metre")]


def pose_words(protocol: PoseProtocol) -> list[tuple[str, str]]:
    """(what, how) for every field."""
    return [("people", "from --boxes, else the annotated boxes; enlarged by 1.25, cut out by UDP"),
            ("mirror image", "predicted too, heatmaps averaged" if protocol.flip else "no"),
            ("at once", f"{protocol.batch} people"),
            ("joints", "the highest pixel, refined on the blurred logarithm (DARK, UDP)"),
            ("score", "the box's times the mean of the joint scores above 0.2"),
            ("near copies", f"of two people with an OKS above {protocol.nms:g} the better is kept"),
            ("metrics", "COCO's, by OKS")]


def in_words(protocol: Protocol | DepthProtocol | PoseProtocol) -> str:
    """Exactly what a protocol does, a line per step."""
    words = {Protocol: seg_words, DepthProtocol: depth_words, PoseProtocol: pose_words}
    lines = [*words[type(protocol)](protocol), ("source", protocol.source or "not said")]
    return "\n".join(f"{what:13} {how}" for what, how in lines)


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


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def to_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """An image (H, W, 3) uint8 as a batch of one, (1, 3, H, W) float32 in [0, 1]."""
    return torch.tensor(image, device=device).permute(2, 0, 1)[None].float() / 255


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision around forward passes; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def settle(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Hold the layers' weights in `dtype`, for a model that is only to predict.

    Half the memory, and autocast, which rounds them in every call, finds that done: same answers.
    """
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.to(dtype)


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


def rescale(images: Tensor, scale: tuple[int, int] | None, ratio: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], multiples of 1/255, resized as mmsegmentation's `Resize` does.

    Both bounds of `scale`, (H, W) if None, are multiplied by `ratio` and rounded down.  No side of
    64 pixels or more, the UNet's coarsest stride, gets below that.
    """
    H, W = images.shape[-2:]
    bounds = [max(1, int(side * ratio)) for side in scale or (H, W)]
    size = augment.rescale_size(H, W, bounds)
    size = tuple(max(side, min(64, own)) for side, own in zip(size, (H, W)))
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # the rule is uint8's
    resized = np.stack([augment.resize_bilinear(image, size) for image in pixels])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).to(images.device).float() / 255


def predict_scale(model: MetaPromptModel, images: Tensor, size, protocol: Protocol,
                  dtype: torch.dtype) -> Tensor:
    """Class probabilities at `size` of images at one scale, averaged with their mirror images'."""
    if protocol.flip:
        images = torch.cat([images, images.flip(-1)])
    with autocast(images.device, dtype):
        if protocol.window is None:
            logits = model(images).float()
        else:
            logits = slide(model, images, protocol.window, protocol.stride)
    probs = resize(logits, size).softmax(dim=1)
    if not protocol.flip:
        return probs
    plain, mirrored = probs.chunk(2)
    return (plain + mirrored.flip(-1)) / 2


@torch.inference_mode()
def predict_seg(model: MetaPromptModel, images: Tensor, size, protocol: Protocol,
                dtype: torch.dtype) -> Tensor:
    """Class probabilities at `size`, (B, classes, *size), of images (B, 3, H, W) in [0, 1].

    Images come at the protocol's scale; with several ratios at their own size, from which each
    ratio is made.  Probabilities are averaged over ratios and mirror images, not logits (spec A.5).
    """
    if protocol.ratios == (1.0,):
        return predict_scale(model, images, size, protocol, dtype)
    total = 0
    for ratio in protocol.ratios:
        scaled = rescale(images, protocol.scale, ratio)
        total = total + predict_scale(model, scaled, size, protocol, dtype)
    return total / len(protocol.ratios)


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
