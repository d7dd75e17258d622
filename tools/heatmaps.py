"""What the meta prompts respond to: their maps laid over pictures (paper, section 5 and B.1).

    python -m tools.heatmaps --checkpoint RUN --image FOLDER                     the 6 that say most
    python -m tools.heatmaps --checkpoint RUN --image FOLDER --prompts 3,17,40   these

NAME_heatmaps.png: a picture and each prompt's map on it, its lowest value blue, its highest red.
prompts.png: a row per prompt, up to 8 pictures side by side, one range of values per row, so that
a prompt that does not respond to a picture stays blue there.

The maps are those that the head reads, after the rearrangement of the last pass, of the whole
picture at once: no windows, no mirror image.  Segmentation has four per prompt; drawn is the
finest, of stride 4.  For pose the picture is the crop of the box with the highest score.
Of eval.py's flags it takes --boxes, --dataset, --device, --max-side, --precision and --scale.
"""
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm

import eval as evaluation
from model import Config, MetaPromptModel
from ops import draw
from ops.device import autocast, cast_weights, device_of, pick_device, pick_precision, to_batch
from ops.errors import InputError, run_command
from sets.files import load_image, output_names
from tasks import TASKS
from tasks.captioned import CaptionConfig
from tasks.flags import Parser

PROMPTS = 6  # drawn unless said otherwise
COLUMNS = 8  # pictures side by side in prompts.png
TAKEN = ("--boxes", "--dataset", "--device", "--max-side", "--precision", "--scale")  # by eval.py
CELL = 240  # side of the square, in pixels, that a picture in a sheet fits into


def main() -> None:
    """Load, choose the prompts, draw."""
    own = Parser(__doc__)
    own.add_argument("--prompts", metavar="K|I,J,...", default="some",
                     help="maps of the K prompts that say most (6), or of these")
    own.add_argument("--checkpoint", required=True, help="run folder of train.py, or a saved model")
    own.add_argument("--image", required=True, metavar="FILE|FOLDER", help="your own pictures")
    own.add_argument("--out", help="folder for the sheets; default: RUN/predictions")
    chosen, rest = own.parse_known_args()
    for word in rest:
        if word.startswith("--") and word.split("=")[0] not in TAKEN:
            raise InputError(f"{word} would do nothing here: beside its own flags this command "
                             f"takes {', '.join(TAKEN)}")
    flags = ["--checkpoint", chosen.checkpoint, "--image", chosen.image, *rest]
    flags += [] if chosen.out is None else ["--out", chosen.out]
    args, recipe, model, source = evaluation.load(flags)
    if recipe.method == "vpd" or isinstance(recipe.model, CaptionConfig):
        kind = "VPD" if recipe.method == "vpd" else "captions"
        raise InputError(f"{source} is a model of {kind}, which has no learned prompts to map")
    wanted = parse(chosen.prompts, model.config)         # refused before any prediction
    device = pick_device(args.device)
    dtype = pick_precision(args.precision or "auto", device)
    cast_weights(model, dtype)
    out = evaluation.default_out(args, recipe, source)
    task, (root, files) = TASKS[recipe.task], evaluation.find_images(args.image, out)
    ready = task.prepare(recipe, args.boxes)

    def picture(i: int) -> np.ndarray:
        """The i-th file as the model gets it; InputError if it can't be read."""
        return task.view(load_image(root / files[i]), files[i], recipe, ready)

    good, skipped = readable(picture, len(files))
    names = output_names(files)
    drawn = draw_all(model.to(device).eval(), [names[i] for i in good], lambda i: picture(good[i]),
                     out, wanted, dtype)
    for message in skipped:
        print(f"skipped    {message}")
    print(f"prompts    {', '.join(map(str, drawn))}\n{len(good)} images"
          + (f"; {len(skipped)} skipped" if skipped else "")
          + f"\nwrote {out}/: *_heatmaps.png, prompts.png")


def readable(load, count: int) -> tuple[list[int], list[str]]:
    """Which of `count` pictures load(i) can read, and why not the others; InputError without any.
    """
    good, skipped = [], []
    for i in range(count):
        try:
            load(i)
            good.append(i)
        except InputError as error:
            skipped.append(str(error))
    if not good:
        raise InputError(skipped[0] if count == 1 else
                         f"none of the {count} images can be read: {skipped[0]}")
    return good, skipped


def parse(text: str, config: Config) -> int | list[int]:
    """"6" -> how many prompts to choose; "some": six, or all if the model has fewer; "3,17" or "3,"
    -> which ones; InputError if impossible.
    """
    if not config.rearrange:
        raise InputError("this model was trained without the rearrangement, it has no map per "
                         "prompt")
    if text == "some":
        return min(PROMPTS, config.num_prompts)
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(part.isdecimal() and len(part) < 9 for part in numbers):
        raise InputError(f"--prompts {text:.40}: how many prompts (6), or which ones (3,17,40)")
    values, N = [int(part) for part in numbers], config.num_prompts
    if "," in text:
        if max(values) >= N:
            raise InputError(f"--prompts {text}: the model has the prompts 0 to {N - 1}")
        return values
    if not 1 <= values[0] <= N:
        raise InputError(f"--prompts {text}: the model has {N} prompts")
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

def into_cell(picture: np.ndarray) -> np.ndarray:
    """A picture enlarged or reduced to just fit into a cell of a sheet."""
    factor = CELL / max(picture.shape[:2])
    return draw.fit(picture, *(max(1, round(side * factor)) for side in picture.shape[:2]))


def save_prompts(path: Path, pictures: list[np.ndarray], maps: list[np.ndarray], names: list[str],
                 chosen: list[int]) -> None:
    """Write the pictures (H, W, 3) in a row and below them a row per prompt; maps (K, h, w) each.
    """
    panels = list(zip(names, pictures))
    for row, prompt in enumerate(chosen):
        low, high = min(m[row].min() for m in maps), max(m[row].max() for m in maps)
        panels += [(f"prompt {prompt}", draw.lay_heat(picture, m[row], low, high))
                   for picture, m in zip(pictures, maps)]
    draw.save_grid(path, panels, len(pictures))


def draw_all(model: MetaPromptModel, names: list[Path], load, out: Path, wanted: int | list[int],
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
        panels = [(f"prompt {n}", draw.lay_heat(picture, m)) for n, m in zip(wanted, maps)]
        cells = [(title, into_cell(panel)) for title, panel in [(names[i].name, picture), *panels]]
        draw.save_grid(out / f"{names[i]}_heatmaps.png", cells, 4)
        if i in shown:
            kept.append((into_cell(picture), maps, names[i].name))
    pictures, maps, titles = map(list, zip(*kept))
    save_prompts(out / "prompts.png", pictures, maps, titles, wanted)
    return wanted


if __name__ == "__main__":
    run_command(main)
