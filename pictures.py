"""Pictures for people: what went in, what was true, what the model says."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import IGNORE, Classes

TEXT_HEIGHT = 14  # pixels per legend line
MIN_SIDE = 192  # smaller images are enlarged to this height


def to_uint8(image) -> np.ndarray:
    """(3, H, W) tensor in [0, 1] -> (H, W, 3) uint8."""
    return (image.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255 + 0.5).astype(np.uint8)


def colour_labels(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) labels -> (H, W, 3) uint8 in the palette; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(classes.palette)] = classes.palette
    return table[labels]                             # 255 = IGNORE has no colour in the palette


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat pixels of a small picture so that it can be looked at."""
    times = max(1, -(-MIN_SIDE // image.shape[0]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture to the size of its neighbours."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))


def legend(labels: list[np.ndarray], classes: Classes, width: int) -> np.ndarray:
    """A strip that names the colours of the classes that occur in `labels`."""
    present = sorted(set(np.unique(np.concatenate([x.ravel() for x in labels]))) - {IGNORE})
    columns = max(1, width // 120)
    rows = -(-len(present) // columns)
    strip = Image.new("RGB", (width, rows * TEXT_HEIGHT + 4), "white")
    draw = ImageDraw.Draw(strip)
    for place, value in enumerate(present):
        x, y = place % columns * (width // columns) + 4, place // columns * TEXT_HEIGHT + 2
        draw.rectangle((x, y + 2, x + 9, y + 11), fill=classes.palette[value], outline="grey")
        draw.text((x + 14, y), classes.names[value][:16], fill="black")
    return np.asarray(strip)


def save_seg_sheet(path: Path, rows: list[tuple], classes: Classes) -> None:
    """Write rows of (image (3,H,W) in [0,1], true labels, predicted labels) as one PNG.

    Columns: input | truth | prediction; pixels without a label are black in the truth.  The legend
    names the classes that occur.
    """
    strips = []
    for image, truth, prediction in rows:
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        photo = fit(to_uint8(image), *truth.shape)
        panels = [photo, colour_labels(truth, classes), colour_labels(prediction, classes)]
        strips.append(np.concatenate([enlarge(panel) for panel in panels], axis=1))
    width = max(strip.shape[1] for strip in strips)
    header = Image.new("RGB", (width, TEXT_HEIGHT + 4), "white")
    for i, title in enumerate(("input", "truth (black: no label)", "prediction")):
        ImageDraw.Draw(header).text((i * width // 3 + 4, 2), title, fill="black")
    strips = [np.pad(s, ((0, 4), (0, width - s.shape[1]), (0, 0)), constant_values=255)
              for s in strips]
    labels = [np.asarray(x) for row in rows for x in row[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate([np.asarray(header), *strips, legend(labels, classes, width)])
    Image.fromarray(sheet).save(path)
