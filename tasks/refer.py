"""Referring segmentation: the pixels of the object that a sentence means; overall and mean IoU.

Follows VPD's code (refer/train.py, refer/test.py): every sentence of every object is a sample;
intersections and unions are counted at the size that the model gets, not the image's own.

A model has `reader` (vpd/text.py, TextReader), which makes of sentences what it reads beside the
images; two logits per pixel, background and object, come out.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from heads import resize
from ops import draw
from ops.device import autocast, device_of, to_batch
from ops.errors import InputError
from sets.files import relative_names
from sets.refcoco import check_sentence
from tasks.common import batches, merged

METRIC = ("oIoU", 1)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of P@X, the share of sentences with an IoU of X or more
DIM = 4  # by what the surroundings of the object are divided in pictures


@dataclass(frozen=True)
class Protocol:
    """How an object is looked for."""

    at_once: int = 1  # images in a batch, of neighbours that have one size
    sentence: str | None = None  # your own pictures: which object is meant


# ------------------------------------------------------------------------------------------------
# Prediction

@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, sentences: list[str], size,
            dtype: torch.dtype) -> Tensor:
    """Log-odds of the object (B, *size), above 0 on it, of images (B, 3, H, W) in [0, 1] and a
    sentence for each.
    """
    text = model.reader(sentences)
    with autocast(images.device, dtype):
        logits = model(images, text=text).float()
    return resize(logits[:, 1:] - logits[:, :1], size)[:, 0]


# ------------------------------------------------------------------------------------------------
# Numbers

def overlap(prediction: Tensor, target: Tensor) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks (H, W) bool."""
    return (prediction & target).sum().item(), (prediction | target).sum().item()


def refer_metrics(counts: list[tuple[int, int]]) -> dict[str, float]:
    """oIoU, mIoU and P@0.5 to P@0.9, all in 0..1, from (intersection, union) of each sentence.

    oIoU divides the sums, mIoU averages the quotients, where an empty union counts as 0 (official:
    refer/test.py, evaluate).
    """
    shared, either = np.array(counts, np.float64).reshape(-1, 2).T
    ious = shared / np.maximum(either, 1)
    return {"oIoU": float(shared.sum() / max(either.sum(), 1)), "mIoU": float(ious.mean()),
            **{f"P@{x}": float((ious >= x).mean()) for x in THRESHOLDS}}


def evaluate(model: nn.Module, dataset, protocol: Protocol, dtype: torch.dtype, *,
             workers: int = 0, sheet: Path | None = None, export: Path | None = None) -> dict:
    """Metrics of the whole set.

    `sheet`: a PNG of some sentences, truth and prediction.  `export`: a folder for the predicted
    masks, IMAGE_NUMBER.png with the sentence's number in the set, 255 on the object.
    """
    places = relative_names(list(dict.fromkeys(dataset.names()))) if export is not None else {}
    counts, rows = [], []
    for batch, images, target, drawn in batches(dataset, protocol.at_once, workers,
                                                device_of(model)):
        found = predict(model, images, batch["sentence"], target.shape[-2:], dtype) > 0
        counts.append([overlap(mask, truth == 1) for mask, truth in zip(found, target)])
        if export is not None:
            for name, number, mask in zip(batch["name"], batch["id"].tolist(), found):
                save_mask(export / f"{places[name]}_{number}.png", mask.cpu().numpy())
        rows.append([(images[i].cpu(), batch["sentence"][i], target[i].cpu().numpy() == 1,
                      found[i].cpu().numpy()) for i in drawn])
    counts, rows = merged(counts), merged(rows)
    if sheet is not None:
        save_sheet(sheet, rows)
    return refer_metrics(counts)


def report(metrics: dict, dataset) -> None:
    """Print the metrics in percent, in one line."""
    print("  ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items()))


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask (H, W) bool as a PNG, 255 on the object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


# ------------------------------------------------------------------------------------------------
# Pictures

def light(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8, dark where its mask (h, w) bool is not: scenes have all colours.
    """
    small = np.asarray(Image.fromarray(mask).resize(image.shape[1::-1], Image.NEAREST))
    return np.where(small[..., None], image, image // DIM)


def save_sheet(path: Path, rows: list[tuple]) -> None:
    """Write rows of (image (3, H, W) in [0, 1], sentence, true and predicted mask (h, w) bool).

    Columns: input | truth | prediction; the sentence above.
    """
    panels = []
    for image, sentence, truth, found in rows:
        image = draw.to_uint8(image)
        row = [draw.enlarge(panel) for panel in (image, light(image, truth), light(image, found))]
        panels.append([draw.caption(np.concatenate(row, axis=1), sentence)])
    draw.save_stack(path, panels, ("input", "truth: bright", "prediction: bright"),
                    lambda width: draw.legend([], width))


# ------------------------------------------------------------------------------------------------
# The user's own pictures

def prepare(recipe, boxes: str | None) -> str:
    """The sentence; InputError if there is none, or one that the model can't read whole."""
    if boxes:
        raise InputError("--boxes is for pose: the model's task is refer")
    sentence = recipe.protocol.sentence
    if sentence is None:
        raise InputError("--sentence is missing: it says which object is meant, such as 'the left "
                         "dog'")
    check_sentence(sentence, "--sentence")
    count, most = len(sentence.split()), recipe.model.num_tokens - 2
    if count > most:
        raise InputError(f"--sentence has {count} words: the model reads {most} tokens, a word or "
                         "less each")
    return sentence


def predict_mask(model: nn.Module, image: np.ndarray, sentence: str, recipe,
                 dtype: torch.dtype) -> np.ndarray:
    """Where in an image (H, W, 3) uint8 the object is that a sentence means, (H, W) bool."""
    x = to_batch(view(image, Path(), recipe, sentence), device_of(model))
    return predict(model, x, [sentence], image.shape[:2], dtype)[0].cpu().numpy() > 0


def apply(model: nn.Module, image: np.ndarray, file: Path, out: Path, recipe, dtype: torch.dtype,
          sentence: str) -> list[dict]:
    """Write OUT_mask.png and OUT_overlay.png; no results."""
    mask = predict_mask(model, image, sentence, recipe, dtype)
    save_mask(Path(f"{out}_mask.png"), mask)
    picture = light(draw.fit(image, *draw.look_size(*image.shape[:2])), mask)
    draw.save(Path(f"{out}_overlay.png"), draw.caption(picture, sentence))
    return []


def view(image: np.ndarray, file: Path, recipe, sentence: str) -> np.ndarray:
    """The picture as the model gets it: the crop's size, whatever its own aspect."""
    return draw.fit(image, recipe.crop, recipe.crop_width or recipe.crop)


def written(recipe, sentence: str) -> str:
    """What `apply` writes, in words."""
    return f"*_mask.png (255: '{sentence}', 0: the rest) and *_overlay.png"
