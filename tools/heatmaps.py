"""What the meta prompts respond to: their maps laid over pictures (paper, section 5 and B.1).

    python eval.py --checkpoint RUN --image FOLDER --heatmaps            the 6 that say most
    python eval.py --checkpoint RUN --image FOLDER --heatmaps 3,17,40    these

NAME_heatmaps.png: a picture and each prompt's map on it, its lowest value blue, its highest red.
prompts.png: a row per prompt, up to 8 pictures side by side, one range of values per row, so that
a prompt that does not respond to a picture stays blue there.

The maps are those that the head reads, after the rearrangement of the last pass, of the whole
picture at once: no windows, no mirror image.  Segmentation has four per prompt; drawn is the
finest, of stride 4.  For pose the picture is the crop of the box with the highest score.
"""
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw

from ops.errors import InputError
from model import Config, MetaPromptModel
from ops.draw import TEXT_HEIGHT, blend_heat, colour_heat, fit
from predict import autocast, device_of, to_batch

PROMPTS = 6  # drawn unless said otherwise
COLUMNS = 8  # pictures side by side in prompts.png
CELL = 240  # side of the square, in pixels, that a picture in a sheet fits into


def parse(text: str, config: Config) -> int | list[int]:
    """"6" -> how many prompts to choose; "some": six, or all if the model has fewer; "3,17" or "3,"
    -> which ones; InputError if impossible.
    """
    if not config.rearrange:
        raise InputError("--heatmaps: this model was trained without the rearrangement, it has no "
                         "map per prompt")
    if text == "some":
        return min(PROMPTS, config.num_prompts)
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(part.isdecimal() for part in numbers):
        raise InputError(f"--heatmaps {text}: how many prompts (6), or which ones (3,17,40)")
    values, N = [int(part) for part in numbers], config.num_prompts
    if "," in text:
        if max(values) >= N:
            raise InputError(f"--heatmaps {text}: the model has the prompts 0 to {N - 1}")
        return values
    if not 1 <= values[0] <= N:
        raise InputError(f"--heatmaps {text}: the model has {N} prompts")
    return values[0]


@torch.inference_mode()
def picture_maps(model: MetaPromptModel, picture: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The finest maps (N, h, w) float32 of a picture (H, W, 3) uint8."""
    images = to_batch(picture, device_of(model))
    with autocast(images.device, dtype):
        maps = model.responses(images)[0]
    return maps[0].float().cpu().numpy()


# ------------------------------------------------------------------------------------------------
# Which prompts

def moments(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared means over the picture (N,) and covariances (N, N) of maps (N, h, w)."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    mean = flat.mean(axis=1)
    flat = flat - mean[:, None]
    return mean ** 2, flat @ flat.T / flat.shape[1]


def choose(squared_means: np.ndarray, covariance: np.ndarray, count: int) -> list[int]:
    """The `count` prompts that say most, best first, from `moments` averaged over pictures.

    A prompt's score is the share of its energy that varies within a picture, variance / (variance
    + squared mean); greedily the best of score * (1 - largest |correlation| with those chosen).
    """
    variance = covariance.diagonal()
    score = variance / np.maximum(variance + squared_means, 1e-12)
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    likeness = np.abs(covariance / np.outer(deviation, deviation)).clip(max=1)
    chosen, gain = [], score.copy()
    for _ in range(count):
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        gain = score * (1 - likeness[chosen].max(axis=0))
    return chosen


# ------------------------------------------------------------------------------------------------
# Drawing

def lay_heat(picture: np.ndarray, values: np.ndarray, low: float, high: float,
             weight: float = 0.5) -> np.ndarray:
    """(h, w) values laid over an (H, W, 3) uint8 picture, `low` and below blue, `high` red."""
    heat = ((values - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float32)
    heat = np.asarray(Image.fromarray(heat).resize(picture.shape[1::-1], Image.BILINEAR))
    return (picture * (1 - weight) + colour_heat(heat) * weight).astype(np.uint8)


def into_cell(picture: np.ndarray) -> np.ndarray:
    """A picture enlarged or reduced to just fit into a cell of a sheet."""
    factor = CELL / max(picture.shape[:2])
    return fit(picture, *(max(1, round(side * factor)) for side in picture.shape[:2]))


def save_grid(path: Path, panels: list[tuple[str, np.ndarray]], columns: int) -> None:
    """Write panels (title, picture (H, W, 3) uint8) row by row as a PNG, titles above."""
    cells = [(title, into_cell(picture)) for title, picture in panels]
    height = max(cell.shape[0] for _, cell in cells) + TEXT_HEIGHT + 6
    width = max(80, *(cell.shape[1] for _, cell in cells)) + 4
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(cells)), height * rows), "white")
    for place, (title, cell) in enumerate(cells):
        x, y = place % columns * width, place // columns * height
        ImageDraw.Draw(sheet).text((x + 2, y + 2), title[:width // 7], fill="black")
        sheet.paste(Image.fromarray(cell), (x, y + TEXT_HEIGHT + 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_prompts(path: Path, pictures: list[np.ndarray], maps: list[np.ndarray], names: list[str],
                 chosen: list[int]) -> None:
    """Write the pictures (H, W, 3) in a row and below them a row per prompt; maps (K, h, w) each.
    """
    panels = list(zip(names, pictures))
    for row, prompt in enumerate(chosen):
        low, high = min(m[row].min() for m in maps), max(m[row].max() for m in maps)
        panels += [(f"prompt {prompt}", lay_heat(picture, m[row], low, high))
                   for picture, m in zip(pictures, maps)]
    save_grid(path, panels, len(pictures))


def draw(model: MetaPromptModel, names: list[Path], load, out: Path, wanted: int | list[int],
         dtype: torch.dtype) -> list[int]:
    """Write OUT/NAME_heatmaps.png for each picture and OUT/prompts.png; returns the prompts drawn.

    load(i): picture number i, (H, W, 3) uint8, at the size that the model gets.  To choose prompts
    every picture is looked at once more: its maps would take too much memory to be kept.
    """
    if isinstance(wanted, int):
        squared_means, covariance = 0, 0
        for i in tqdm(range(len(names)), desc="choose prompts", leave=False):
            one, two = moments(picture_maps(model, load(i), dtype))
            squared_means, covariance = squared_means + one, covariance + two
        wanted = choose(squared_means / len(names), covariance / len(names), wanted)
    count = min(COLUMNS, len(names))
    shown = {len(names) * i // count for i in range(count)}
    kept = []
    for i in tqdm(range(len(names)), desc="heatmaps", leave=False):
        picture = load(i)
        maps = picture_maps(model, picture, dtype)[wanted]
        panels = [(f"prompt {n}", blend_heat(picture, m)) for n, m in zip(wanted, maps)]
        save_grid(out / f"{names[i]}_heatmaps.png", [(names[i].name, picture), *panels], 4)
        if i in shown:
            kept.append((into_cell(picture), maps, names[i].name))
    pictures, maps, titles = map(list, zip(*kept))
    save_prompts(out / "prompts.png", pictures, maps, titles, wanted)
    return wanted
