"""Segmentation: overlapping windows, their logits averaged; mIoU; overlays.

Follows mmsegmentation 0.30.0 (`slide_inference`, `aug_test`, `eval_metrics`): windows' logits are
averaged and resized to the original image, probabilities are averaged over scales and mirror
images; intersections and unions are summed over the whole set.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from heads import resize
from model import MetaPromptModel
from ops import augment, draw, parallel, pixels
from ops.device import autocast, device_of, to_batch
from ops.errors import InputError, printable
from sets.files import IGNORE, Classes, relative_names
from tasks.common import SMALLEST, batches, bounded, merged
from tasks.methods import text_of

METRIC = ("mIoU", 1)
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # official: configs/cityscapes_ms.py
VPD_RATIOS = (1.0, 1.125, 1.25, 1.375, 1.5)  # official VPD: segmentation/test.py, --aug-test
PROBABILITIES = 1 << 27  # held at once, 0.5 GB; labels of larger images are enlarged afterwards


@dataclass(frozen=True)
class Protocol:
    """How whole images are segmented."""

    scale: tuple[int, int] | None = None  # (long, short) bounds of the resize; none: own size
    window: int | None = None  # side of the sliding window, pixels; none: the whole image at once
    stride: int | None = None  # of the windows; the last ones are moved back to the edge
    ratios: tuple[float, ...] = (1.0,)  # of `scale`; several: probabilities averaged
    flip: bool = False  # average with the mirror image's probabilities
    at_once: int = 1  # images in a batch, of neighbours that have one size
    max_side: int = 0  # your own pictures, without `scale`: longer side; 0: twice the crop

    def __post_init__(self):
        if self.window is not None and not 1 <= (self.stride or 0) <= self.window:
            raise InputError(f"--window {self.window} needs a --stride of 1 to {self.window} "
                             f"pixels: it is {self.stride}")


def with_tta(protocol: Protocol, method: str = "meta-prompts") -> Protocol:
    """The protocol with the method's scales and mirror images, 14 passes or VPD's 10."""
    return replace(protocol, ratios=VPD_RATIOS if method == "vpd" else TTA_RATIOS, flip=True)


# ------------------------------------------------------------------------------------------------
# Prediction

def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(y1, y2, x1, x2) of the windows, row by row; the last ones are shifted back to the edge.

    An image smaller than `crop` gives one smaller window, without padding.
    """
    def starts(length: int) -> list[int]:
        """Where the windows along one side begin."""
        count = max(length - crop + stride - 1, 0) // stride + 1
        return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]

    return [(y, min(y + crop, height), x, min(x + crop, width))
            for y in starts(height) for x in starts(width)]


def slide(predict_window, images: Tensor, crop: int, stride: int, batch: int = 8) -> Tensor:
    """Average of predict_window(window) over overlapping windows; `batch` windows per call.

    images (B, 3, H, W); predict_window: (b, 3, h, w) -> (b, C, h, w).  Returns (B, C, H, W).
    """
    B, _, H, W = images.shape
    places = windows(H, W, crop, stride)
    total, count = None, images.new_zeros(1, 1, H, W)
    per_call = max(1, batch // B)
    for first in range(0, len(places), per_call):
        group = places[first:first + per_call]
        crops = torch.cat([images[:, :, y1:y2, x1:x2] for y1, y2, x1, x2 in group])
        outputs = predict_window(crops).float()
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
    size = tuple(max(side, min(SMALLEST, own)) for side, own in zip(size, (H, W)))
    values = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # the rule is uint8's
    resized = np.stack([pixels.resize_bilinear(image, size) for image in values])
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
def predict(model: MetaPromptModel, images: Tensor, size, protocol: Protocol,
            dtype: torch.dtype) -> Tensor:
    """Class probabilities at `size`, (B, classes, *size), of images (B, 3, H, W) in [0, 1].

    Images come at the protocol's scale; with several ratios at their own size, from which each
    ratio is made.
    """
    if protocol.ratios == (1.0,):
        return predict_scale(model, images, size, protocol, dtype)
    total = 0
    for ratio in protocol.ratios:
        scaled = rescale(images, protocol.scale, ratio)
        total = total + predict_scale(model, scaled, size, protocol, dtype)
    return total / len(protocol.ratios)


# ------------------------------------------------------------------------------------------------
# Numbers

def confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(classes, classes) counts, row = truth, column = prediction; ignored pixels don't count."""
    valid = target != IGNORE
    pairs = target[valid] * num_classes + prediction[valid]
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def seg_metrics(counts: Tensor) -> dict:
    """mIoU, mAcc, aAcc and per-class IoU, Acc from the summed confusion counts, all in 0..1.

    A class that neither occurs nor is predicted is nan and left out of the means; one that is only
    predicted has IoU 0 (official: mmsegmentation `eval_metrics`, accumulated over the whole set).
    """
    counts = counts.double()
    hits, truth, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou, acc = hits / (truth + predicted - hits), hits / truth             # 0/0 = nan
    return {"mIoU": iou.nanmean().item(), "mAcc": acc.nanmean().item(),
            "aAcc": (hits.sum() / truth.sum()).item(), "IoU": iou.tolist(), "Acc": acc.tolist()}


def evaluate(model: MetaPromptModel, dataset, protocol: Protocol, dtype: torch.dtype, *,
             workers: int = 0, sheet: Path | None = None, export: Path | None = None) -> dict:
    """Metrics of the whole set.

    `sheet`: a PNG of some images, truth and prediction.  `export`: a folder for label PNGs as the
    benchmark's server wants them.  InputError if the model has another number of classes.
    """
    device, num_classes = device_of(model), len(dataset.classes.names)
    if model.config.num_classes != num_classes:
        raise InputError(f"the model predicts {model.config.num_classes} classes, the data set "
                         f"has {num_classes}")
    if model.config.class_names and model.config.class_names != dataset.classes.names:
        raise InputError(f"the model predicts the classes {', '.join(model.config.class_names)}; "
                         f"the data set has others, or another order: "
                         f"{', '.join(dataset.classes.names)}")
    if protocol.ratios != (1.0,):
        dataset.scale = None                             # `predict` makes all scales itself
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    rows, places = [], relative_names(dataset.names()) if export is not None else {}
    for batch, images, target, drawn in batches(dataset, protocol.at_once, workers, device):
        text = text_of(model, batch)
        ask = model if text is None else partial(model, text=text)
        probs = predict(ask, images, target.shape[-2:], protocol, dtype)
        prediction = probs.argmax(dim=1)
        counts += confusion(prediction, target, num_classes)
        if export is not None:
            for i, name in enumerate(batch["name"]):
                export_labels(export / f"{places[name]}.png", prediction[i].cpu().numpy(),
                              dataset.classes)
        rows.append([(images[i].cpu(), target[i].cpu(), prediction[i].cpu()) for i in drawn])
    rows = merged(rows)
    if sheet is not None:
        save_sheet(sheet, rows, dataset.classes)
    return seg_metrics(parallel.total(counts).cpu())


def report(metrics: dict, dataset) -> None:
    """Print per-class IoU and accuracy in percent, then the means; n/a: absent, not predicted."""
    def percent(value: float) -> str:
        """A share as text."""
        return "  n/a" if np.isnan(value) else f"{100 * value:5.2f}"

    names = dataset.classes.names
    width = max(len(name) for name in names)
    print(f"{'class':{width}}    IoU    Acc")
    for name, iou, acc in zip(names, metrics["IoU"], metrics["Acc"]):
        print(f"{printable(name):{width}}  {percent(iou)}  {percent(acc)}")
    print(f"mIoU {percent(metrics['mIoU'])}   mAcc {percent(metrics['mAcc'])}   "
          f"aAcc {percent(metrics['aAcc'])}")


def export_labels(path: Path, labels: np.ndarray, classes: Classes) -> None:
    """Write predicted labels (H, W), ints, as the benchmark's server wants them: a single-channel
    PNG of Cityscapes' label ids, or of ADE20K's labels + 1.  ValueError for a value that is no
    label.
    """
    wrong = sorted(set(np.unique(labels).tolist()) - {*range(len(classes.names)), IGNORE})
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is no label of {len(classes.names)} classes")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(classes.export[labels]).save(path)


# ------------------------------------------------------------------------------------------------
# Pictures

def colour_labels(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) labels -> (H, W, 3) uint8 in the palette; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(classes.palette)] = classes.palette
    return table[labels]                             # 255 = IGNORE has no colour in the palette


def legend(labels: list[np.ndarray], classes: Classes, width: int) -> np.ndarray:
    """A strip that names the colours of the classes that occur in `labels`."""
    present = sorted(set(np.unique(np.concatenate([x.ravel() for x in labels]))) - {IGNORE})
    return draw.legend([(classes.names[i], classes.palette[i]) for i in present], width)


def save_sheet(path: Path, rows: list[tuple], classes: Classes) -> None:
    """Write rows of (image (3,H,W) in [0,1], true labels, predicted labels) as one PNG.

    Columns: input | truth | prediction; pixels without a label are black in the truth.  The legend
    names the classes that occur.
    """
    labels = [np.asarray(x) for row in rows for x in row[1:]]
    panels = [[draw.fit(draw.to_uint8(image), *np.asarray(truth).shape),
               colour_labels(np.asarray(truth), classes),
               colour_labels(np.asarray(prediction), classes)]
              for image, truth, prediction in rows]
    draw.save_stack(path, panels, ("input", "truth (black: no label)", "prediction"),
                    lambda width: legend(labels, classes, width))


def save_overlay(path: Path, image: np.ndarray, labels: np.ndarray, classes: Classes) -> None:
    """Write labels (H, W) uint8 in colour over their image (H, W, 3) uint8, the legend below."""
    size = draw.look_size(*labels.shape)
    small = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.NEAREST))
    picture = draw.blend(draw.fit(image, *size), colour_labels(small, classes), 0.55)
    draw.save_framed(path, picture, lambda width: legend([labels], classes, width))


# ------------------------------------------------------------------------------------------------
# The user's own pictures

def prepare(recipe, boxes: str | None) -> Classes:
    """Names and colours of the model's classes; InputError if the data set has another number."""
    names = recipe.model.class_names or tuple(f"class {i}" for i in range(recipe.model.num_classes))
    classes = recipe.files.classes(names)
    if len(classes.names) != recipe.model.num_classes:
        raise InputError(f"the model predicts {recipe.model.num_classes} classes, the data set "
                         f"{recipe.dataset} has {len(classes.names)}")
    return classes


def model_input(image: np.ndarray, protocol: Protocol) -> np.ndarray:
    """An image (H, W, 3) uint8 at the size that `predict` wants: the protocol's scale if it has
    one, else as it is, but bounded.
    """
    if protocol.scale is None:
        return bounded(image, protocol.max_side)
    if protocol.ratios != (1.0,):                        # each is made from the image's own size
        return draw.fit(image, *(max(side, SMALLEST) for side in image.shape[:2]))
    size = augment.rescale_size(*image.shape[:2], protocol.scale)
    return pixels.resize_bilinear(image, tuple(max(side, SMALLEST) for side in size))


def predict_labels(model: MetaPromptModel, image: np.ndarray, protocol: Protocol,
                   dtype: torch.dtype) -> np.ndarray:
    """Class numbers (H, W) uint8 of an image (H, W, 3) uint8."""
    H, W = image.shape[:2]
    values = H * W * model.config.num_classes * (2 if protocol.flip else 1)
    shrink = min(1.0, math.sqrt(PROBABILITIES / values))
    size = (max(1, int(H * shrink)), max(1, int(W * shrink)))
    x = to_batch(model_input(image, protocol), device_of(model))
    labels = predict(model, x, size, protocol, dtype).argmax(dim=1)[0].byte().cpu().numpy()
    return labels if size == (H, W) else pixels.resize_nearest(labels, (H, W))


def apply(model: MetaPromptModel, image: np.ndarray, file: Path, out: Path, recipe,
          dtype: torch.dtype, classes: Classes) -> list[dict]:
    """Write OUT_labels.png and OUT_overlay.png; no results."""
    labels = predict_labels(model, image, recipe.protocol, dtype)
    png = Image.fromarray(labels)
    png.putpalette([value for colour in classes.palette for value in colour])
    png.save(f"{out}_labels.png")
    save_overlay(Path(f"{out}_overlay.png"), image, labels, classes)
    return []


def view(image: np.ndarray, file: Path, recipe, classes: Classes) -> np.ndarray:
    """The picture as the model gets it, in one piece and one scale, bounded."""
    image = model_input(image, replace(recipe.protocol, ratios=(1.0,)))
    return bounded(image, recipe.protocol.max_side)


def written(recipe, classes: Classes) -> str:
    """What `apply` writes, in words."""
    return (f"*_labels.png (pixel value = class, 0 to {recipe.model.num_classes - 1}) and "
            "*_overlay.png")
