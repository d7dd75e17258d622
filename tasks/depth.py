"""Depth: shifted windows and their mirror images averaged; nine metrics; a scale in metres.

Follows the official code (depth/test.py, depth/utils_depth/metrics.py): metrics per image, inside
the benchmark's box, then the mean over images.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import Counted
from heads import resize
from model import MetaPromptModel
from ops import draw
from ops.device import autocast, device_of, to_batch
from ops.errors import InputError
from sets.files import CHECKED_FILES, relative_names
from sets.nyu_kitti import recording
from tasks.common import batches, bounded, merged
from tasks.methods import text_of

METRIC = ("rmse", -1)
METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


@dataclass(frozen=True)
class Protocol:
    """How depth is predicted and what counts."""

    windows: int = 1  # square windows of full height, evenly shifted; 1: the whole image at once
    flip: bool = True  # average with the mirror image's metres
    box: str | None = None  # pixels that count: nyu, garg, eigen (KITTI), none for all
    max_depth_eval: float = 80.0  # metres; the truth counts strictly below this
    min_depth_eval: float = 1e-3  # metres; and strictly above this
    units: float = 256.0  # of exported 16-bit PNGs, per metre
    at_once: int = 1  # images in a batch, of neighbours that have one size
    max_side: int = 0  # your own pictures: longer side that the model gets; 0: twice the crop


# ------------------------------------------------------------------------------------------------
# Prediction

def shifted_windows(width: int, side: int, count: int) -> list[int]:
    """Left edges of `count` square windows of `side` over an image `width` wide.

    DEVIATION: the last window is moved to the right edge; the official code leaves up to `count`
    columns of a KITTI image without prediction, outside what its metrics count.
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
def predict(model: MetaPromptModel, images: Tensor, protocol: Protocol, dtype: torch.dtype,
            batch: int = 8, text: Tensor | None = None) -> Tensor:
    """Metres (B, H, W) of images (B, 3, H, W) in [0, 1]: mean over windows and mirror images.

    `batch` windows at once.  text: VPD's numbers of the images' scene types (B,), or states (B, N,
    D) of captions.
    """
    B, _, H, W = images.shape
    side = min(H, W) if protocol.windows > 1 else W
    places = shifted_windows(W, side, protocol.windows)
    total, count = images.new_zeros(B, H, W), images.new_zeros(W)
    for first in range(0, len(places), max(1, batch // B)):
        group = places[first:first + max(1, batch // B)]
        crops = torch.cat([images[..., x:x + side] for x in group])
        ask = model if text is None else partial(model, text=torch.cat([text] * len(group)))
        with autocast(images.device, dtype):
            depth = ask(crops)[:, 0].float()
            if protocol.flip:
                depth = (depth + ask(crops.flip(-1))[:, 0].float().flip(-1)) / 2
        for output, x in zip(depth.split(B), group):
            total[..., x:x + side] += output
            count[x:x + side] += 1
    return total / count


# ------------------------------------------------------------------------------------------------
# Numbers

def evaluation_box(height: int, width: int, box: str | None) -> tuple[int, int, int, int]:
    """(y1, y2, x1, x2) that a depth benchmark counts: "nyu", "garg", "eigen", or None for all.

    Official: depth/utils_depth/metrics.py, cropping_img (fractions of the KITTI crop's size).
    """
    if box is None:
        return 0, height, 0, width
    if box == "nyu":
        return 45, 471, 41, 601
    y1, y2, x1, x2 = {"garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
                      "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229)}[box]
    return int(y1 * height), int(y2 * height), int(x1 * width), int(x2 * width)


def valid_depth(target: Tensor, protocol: Protocol) -> Tensor:
    """Pixels of (H, W) metres that count: strictly inside the range, inside the benchmark's box."""
    y1, y2, x1, x2 = evaluation_box(*target.shape, protocol.box)
    inside = torch.zeros_like(target, dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    return inside & (target > protocol.min_depth_eval) & (target < protocol.max_depth_eval)


def check_range(dataset, recipe) -> None:
    """InputError if no depth of the labels looked at counts, or the model's depths reach none."""
    def counts(target: Tensor) -> bool:
        """Whether any metre of a label is judged."""
        valid = valid_depth(target, recipe.protocol)
        return bool((valid & (target <= recipe.model.max_depth)).any())

    places = range(0, len(dataset), max(1, len(dataset) // CHECKED_FILES))
    found = (Counted(dataset)[0, index] for index in places)
    if not any(counts(sample["target"]) for sample in found if not isinstance(sample, str)):
        raise InputError(f"no depth of the {len(places)} labels checked is within "
                         f"--min-depth-eval {recipe.protocol.min_depth_eval:g}, --max-depth-eval "
                         f"{recipe.protocol.max_depth_eval:g} and the model's maximum, --max-depth "
                         f"{recipe.model.max_depth:g} metres, inside the benchmark's box")


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """The nine metrics of one image from its valid pixels, both (P,) metres.

    REL in the paper is abs_rel; silog has factor 0.5 (official: depth/utils_depth/metrics.py).
    """
    p, g = prediction.double(), target.double()
    ratio, difference, log = torch.maximum(p / g, g / p), p - g, p.log() - g.log()
    values = ((ratio < 1.25), (ratio < 1.25 ** 2), (ratio < 1.25 ** 3), difference.abs() / g,
              difference.square() / g, difference.square(), log.square(),
              (p.log10() - g.log10()).abs())
    means = [value.double().mean().item() for value in values]
    means[5], means[6] = means[5] ** 0.5, means[6] ** 0.5
    silog = (log.square().mean() - 0.5 * log.mean().square()).clamp(min=0).sqrt().item()
    return dict(zip(METRICS, (*means, silog)))


def evaluate(model: MetaPromptModel, dataset, protocol: Protocol, dtype: torch.dtype, *,
             workers: int = 0, sheet: Path | None = None, export: Path | None = None) -> dict:
    """The nine metrics, each the mean over images with a valid pixel; `images` counts those.

    `sheet`: a PNG of some images, truth, prediction, error.  `export`: a folder for 16-bit PNGs in
    the benchmark's unit.
    """
    device = device_of(model)
    results, rows, places = [], [], depth_names(dataset.names()) if export is not None else {}
    for batch, images, target, drawn in batches(dataset, protocol.at_once, workers, device):
        depth = predict(model, images, protocol, dtype, text=text_of(model, batch))
        depth = resize(depth[None], target.shape[-2:])[0]
        depth = depth.nan_to_num(nan=protocol.min_depth_eval, posinf=protocol.max_depth_eval)
        results.append([])
        for i, name in enumerate(batch["name"]):
            valid = valid_depth(target[i], protocol)
            if valid.any():
                results[-1].append(depth_metrics(depth[i][valid], target[i][valid]))
            if export is not None:
                export_depth(export / places[name], depth[i].cpu().numpy(), protocol.units)
        rows.append([(images[i].cpu(), target[i].cpu(), depth[i].cpu()) for i in drawn])
    results, rows = merged(results), merged(rows)
    if sheet is not None:
        save_sheet(sheet, rows)
    if not results:
        raise InputError("no image of the set has a valid depth inside the benchmark's box")
    means = {name: sum(r[name] for r in results) / len(results) for name in METRICS}
    return {**means, "images": len(results)}


def report(metrics: dict, dataset) -> None:
    """Print the metrics in one line."""
    print("  ".join(f"{name} {metrics[name]:.4f}" for name in METRICS))


def depth_names(names: list[str]) -> dict[str, Path]:
    """Name of an image -> its exported file: SCENE_FILE.png as the official code has it, or below
    the images' common folder where two would share that name.
    """
    flat = {}
    for name in names:
        scene = recording(Path(name)) or "image"
        flat[name] = Path(f"{scene}_{Path(name).stem}.png".replace(" ", "_"))
    if len(set(flat.values())) == len(names):
        return flat
    return {name: Path(f"{place}.png") for name, place in relative_names(names).items()}


def export_depth(path: Path, depth: np.ndarray, units: float) -> None:
    """Write metres as a 16-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(depth * units, 0, 65535).astype(np.uint16)).save(path)


# ------------------------------------------------------------------------------------------------
# Pictures

COLOURS = ((255, 245, 180), (254, 170, 90), (220, 70, 90), (120, 30, 120), (25, 10, 60))
TICKS = (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80)  # metres, on the scale bar
UNKNOWN = 128  # grey level of pixels without depth


def colour_depth(depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """(H, W) metres -> (H, W, 3) uint8, near light, far dark, logarithmic; unknown (0) is grey."""
    span = np.log(max(farthest / nearest, 1.001))
    colours = draw.ramp(np.log(np.maximum(depth, nearest) / nearest) / span, COLOURS)
    colours[depth <= 0] = UNKNOWN
    return colours


def colour_error(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Relative error: white 0, red 25 % too far, blue 25 % too near; unknown truth is grey."""
    relative = np.clip((depth - truth) / np.maximum(truth, 1e-3) / 0.25, -1, 1)[..., None]
    red, blue = np.array([200, 30, 40]), np.array([30, 60, 200])
    target = np.where(relative > 0, red, blue)
    colours = (255 + (target - 255) * np.abs(relative)).astype(np.uint8)
    colours[truth <= 0] = UNKNOWN
    return colours


def scale_bar(nearest: float, farthest: float, width: int) -> np.ndarray:
    """A strip that shows which colour is how many metres."""
    values = np.exp(np.linspace(np.log(nearest), np.log(max(farthest, nearest * 1.001)), width))
    bar = np.repeat(colour_depth(values[None], nearest, farthest), draw.TEXT_HEIGHT, axis=0)
    strip = Image.fromarray(np.concatenate([bar, np.full_like(bar, 255)]))
    pen = ImageDraw.Draw(strip)
    for tick in TICKS:
        if nearest <= tick <= farthest:
            x = int(np.searchsorted(values, tick))
            pen.line((x, draw.TEXT_HEIGHT - 4, x, draw.TEXT_HEIGHT + 2), fill="black")
            pen.text((min(x + 3, width - 30), draw.TEXT_HEIGHT), f"{tick:g} m", fill="black")
    return np.asarray(strip)


def save_sheet(path: Path, rows: list[tuple]) -> None:
    """Write rows of (image (3,H,W) in [0,1], true metres, predicted metres) as one PNG.

    Columns: input | truth | prediction | relative error; one scale of metres for the whole sheet.
    """
    known = np.concatenate([np.asarray(truth)[np.asarray(truth) > 0] for _, truth, _ in rows])
    nearest, farthest = (known.min(), known.max()) if known.size else (1.0, 10.0)
    panels = [[draw.fit(draw.to_uint8(image), *np.asarray(truth).shape),
               colour_depth(np.asarray(truth), nearest, farthest),
               colour_depth(np.asarray(depth), nearest, farthest),
               colour_error(np.asarray(depth), np.asarray(truth))]
              for image, truth, depth in rows]
    titles = ("input", "truth (grey: unknown)", "prediction", "error: red 25 % too far, blue near")
    draw.save_stack(path, panels, titles,
                    lambda width: scale_bar(float(nearest), float(farthest), width))


def tick_range(depth: np.ndarray) -> tuple[float, float]:
    """Nearest and farthest metres of a scale that covers `depth`, both a labelled tick if possible.

    The 1 % of the pixels that are nearest, and the farthest 1 %, may lie outside.
    """
    near, far = np.percentile(depth, (1, 99)).tolist()
    below = [tick for tick in TICKS if tick <= near]
    above = [tick for tick in TICKS if tick >= far and tick not in below[-1:]]
    return below[-1] if below else max(near, 0.01), above[0] if above else max(far, near + 1)


def save_depth(path: Path, image: np.ndarray, depth: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8 and its metres (H, W) side by side, a scale in metres below.

    Light is near, dark is far; the scale is the image's own.
    """
    height, width = draw.look_size(*depth.shape, limit=draw.MAX_SIDE // 2)
    nearest, farthest = tick_range(depth)
    small = Image.fromarray(depth.astype(np.float32)).resize((width, height), Image.BILINEAR)
    colours = colour_depth(np.asarray(small).clip(nearest, farthest), nearest, farthest)
    picture = np.concatenate([draw.fit(image, height, width), colours], axis=1)
    draw.save_framed(path, picture, lambda width: scale_bar(nearest, farthest, width))


# ------------------------------------------------------------------------------------------------
# The user's own pictures

def prepare(recipe, boxes: str | None) -> float:
    """Per metre, of a 16-bit PNG: the benchmark's, or fewer if the model sees farther than fits."""
    units, max_depth = recipe.protocol.units, recipe.model.max_depth
    return next((u for u in (units, 256.0, 100.0, 10.0) if u <= units and u * max_depth <= 65535),
                1.0)


def predict_metres(model: MetaPromptModel, image: np.ndarray, recipe,
                   dtype: torch.dtype) -> np.ndarray:
    """Depth (H, W) float32 of an image (H, W, 3) uint8."""
    protocol = recipe.protocol
    x = to_batch(bounded(image, protocol.max_side), device_of(model))
    side = min(x.shape[-2:]) if protocol.windows > 1 else x.shape[-1]
    at_once = 8 * recipe.crop ** 2 // (x.shape[-2] * side)        # 8 windows of the training size
    depth = predict(model, x, protocol, dtype, batch=max(1, min(8, at_once)))
    depth = depth.nan_to_num(nan=protocol.min_depth_eval, posinf=model.config.max_depth)
    return resize(depth[None], image.shape[:2])[0, 0].cpu().numpy()


def apply(model: MetaPromptModel, image: np.ndarray, file: Path, out: Path, recipe,
          dtype: torch.dtype, units: float) -> list[dict]:
    """Write OUT_depth.png and OUT_depth_colour.png; no results."""
    depth = predict_metres(model, image, recipe, dtype)
    values = np.rint(depth * units).clip(1, 65535).astype(np.uint16)  # 0 would mean unknown
    Image.fromarray(values).save(f"{out}_depth.png")
    save_depth(Path(f"{out}_depth_colour.png"), image, depth)
    return []


def view(image: np.ndarray, file: Path, recipe, units: float) -> np.ndarray:
    """The picture as the model gets it, in one piece."""
    return bounded(image, recipe.protocol.max_side)


def written(recipe, units: float) -> str:
    """What `apply` writes, in words."""
    return f"*_depth.png (metres = value / {units:g}) and *_depth_colour.png"
