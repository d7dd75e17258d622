"""Polygons -> pixels, exactly as COCO's own tool does it (pycocotools, `rleFrPoly`).

Its masks are what COCO's data sets mean by a polygon: RefCOCO's, for one.  The rule is its own, no
library's even-odd filling agrees with it at the borders: corners are rounded to fifths of a pixel,
each edge becomes a staircase of such fifths, and the staircase's crossings of pixel columns start
and end runs of the mask.
"""
import numpy as np

FINE = 5  # steps per pixel, in each direction


def truncate(values: np.ndarray) -> np.ndarray:
    """To integers, towards zero, as C does."""
    return np.trunc(values).astype(np.int64)


def outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows, in fifths of a pixel, of all points of a closed polygon's staircase.

    corners: (K, 2) x, y in pixels.  An edge has a point per step of its longer direction, both ends
    included; it is walked upwards in that direction, whichever way the polygon runs, so that two
    polygons that share an edge share its points.
    """
    start = truncate(FINE * corners + 0.5)
    end = np.roll(start, -1, axis=0)
    span = np.abs(end - start)                           # (K, 2)
    wide = span[:, 0] >= span[:, 1]
    length = span.max(axis=1)
    flipped = np.where(wide, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])
    low, high = (np.where(flipped[:, None], a, b) for a, b in ((end, start), (start, end)))
    slope = np.where(wide, high[:, 1] - low[:, 1], high[:, 0] - low[:, 0]) / np.maximum(length, 1)
    edge = np.repeat(np.arange(len(start)), length + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    step = np.where(flipped[edge], length[edge] - step, step)
    along = step + np.where(wide, low[:, 0], low[:, 1])[edge]
    across = truncate(np.where(wide, low[:, 1], low[:, 0])[edge] + slope[edge] * step + 0.5)
    return np.where(wide[edge], along, across), np.where(wide[edge], across, along)


def fill(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool: the pixels of one polygon, (K, 2) x, y; what lies outside is cut off.

    Time and memory grow with its length: the caller refuses corners far outside the picture.
    """
    u, v = outline(np.asarray(corners, np.float64))
    moved = np.flatnonzero(u[1:] != u[:-1])
    before, after = (u[moved], v[moved]), (u[moved + 1], v[moved + 1])
    column = (np.where(after[0] < before[0], after[0], after[0] - 1) + 0.5) / FINE - 0.5
    row = np.ceil(((np.minimum(before[1], after[1]) + 0.5) / FINE - 0.5).clip(0, height))
    inside = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    # Down the columns, one after another, each crossing turns the mask on or off.
    crossings = (column[inside] * height + row[inside]).astype(np.int64)
    counts = np.bincount(crossings, minlength=height * width)[:height * width]
    return (np.cumsum(counts) % 2 == 1).reshape(width, height).T


def coverage(polygons: list, height: int, width: int) -> np.ndarray:
    """(height, width) uint8: how many of the polygons, lists x1 y1 x2 y2 ..., cover each pixel.

    More than 0: the union, the mask that COCO means by them.
    """
    total = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        total += fill(np.reshape(polygon, (-1, 2)), height, width)
    return total
