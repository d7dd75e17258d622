"""Drawing for people: panels side by side, colours for values, legends, bars.  Knows no task."""
import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT_HEIGHT = 14  # pixels per line of a legend
MIN_SIDE = 192  # smaller pictures are enlarged to this height
MAX_SIDE = 1600  # larger pictures of one image are reduced to this
MIN_WIDTH = 360  # of a picture with a legend or a scale bar
HEAT = ((0, 0, 130), (0, 120, 255), (60, 255, 160), (255, 220, 0), (220, 0, 0))  # blue to red


# ------------------------------------------------------------------------------------------------
# Sizes and colours

def to_uint8(image) -> np.ndarray:
    """(3, H, W) tensor in [0, 1] -> (H, W, 3) uint8."""
    return (image.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255 + 0.5).astype(np.uint8)


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture to the size of its neighbours."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat pixels of a small picture so that it can be looked at."""
    times = max(1, -(-MIN_SIDE // image.shape[0]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def look_size(height: int, width: int, limit: int = MAX_SIDE) -> tuple[int, int]:
    """Size at which an image is shown: shorter side MIN_SIDE or more, no side above `limit`."""
    factor = min(max(1.0, MIN_SIDE / min(height, width)), limit / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def ramp(values: np.ndarray, colours) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W, 3) uint8, interpolated between evenly spaced colours."""
    place = np.clip(values, 0, 1) * (len(colours) - 1)
    channels = [np.interp(place, np.arange(len(colours)), [c[i] for c in colours])
                for i in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def blend(picture: np.ndarray, colours: np.ndarray, weight: float = 0.5) -> np.ndarray:
    """Colours laid over a picture of the same size, both (H, W, 3) uint8."""
    return (picture * (1 - weight) + colours * weight).astype(np.uint8)


def lay_heat(picture: np.ndarray, values: np.ndarray, low: float | None = None,
             high: float | None = None) -> np.ndarray:
    """(h, w) values laid over an (H, W, 3) uint8 picture, `low` and below blue, `high` red.

    None: the lowest and the highest of the values.
    """
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    heat = ((values - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float32)
    heat = np.asarray(Image.fromarray(heat).resize(picture.shape[1::-1], Image.BILINEAR))
    return blend(picture, ramp(heat, HEAT))


# ------------------------------------------------------------------------------------------------
# Sheets

def legend(entries: list[tuple[str, tuple[int, int, int]]], width: int) -> np.ndarray:
    """A strip that names colours, as many columns as fit."""
    columns = max(1, width // 120)
    rows = -(-len(entries) // columns)
    strip = Image.new("RGB", (width, rows * TEXT_HEIGHT + 4), "white")
    draw = ImageDraw.Draw(strip)
    for place, (name, colour) in enumerate(entries):
        x, y = place % columns * (width // columns) + 4, place // columns * TEXT_HEIGHT + 2
        draw.rectangle((x, y + 2, x + 9, y + 11), fill=colour, outline="grey")
        draw.text((x + 14, y), name[:16], fill="black")
    return np.asarray(strip)


def caption(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 with a text on white above it, in as many lines as it needs."""
    lines = textwrap.wrap(text, max(8, picture.shape[1] // 7)) or [""]
    strip = Image.new("RGB", (picture.shape[1], len(lines) * TEXT_HEIGHT + 4), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((4, i * TEXT_HEIGHT + 2), line, fill="black")
    return np.concatenate([np.asarray(strip), picture])


def save(path: Path, picture: np.ndarray) -> None:
    """Write (H, W, 3) uint8; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_stack(path: Path, rows: list[list[np.ndarray]], titles: tuple[str, ...], footer) -> None:
    """Write rows of panels under each other, column titles above, `footer(width)` below."""
    strips = [np.concatenate([enlarge(panel) for panel in row], axis=1) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    header = Image.new("RGB", (width, TEXT_HEIGHT + 4), "white")
    column = strips[0].shape[1] // len(titles)
    for i, title in enumerate(titles):
        ImageDraw.Draw(header).text((i * column + 4, 2), title, fill="black")
    strips = [np.pad(s, ((0, 4), (0, width - s.shape[1]), (0, 0)), constant_values=255)
              for s in strips]
    save(path, np.concatenate([np.asarray(header), *strips, footer(width)]))


def save_framed(path: Path, picture: np.ndarray, footer) -> None:
    """Write a picture (H, W, 3) uint8 with `footer(width)` below it, on white."""
    width = max(MIN_WIDTH, picture.shape[1])
    picture = np.pad(picture, ((0, 4), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
    save(path, np.concatenate([picture, footer(width)]))


def save_grid(path: Path, panels: list[tuple[str, np.ndarray]], columns: int) -> None:
    """Write panels (title, picture (H, W, 3) uint8) row by row as a PNG, titles above."""
    height = max(cell.shape[0] for _, cell in panels) + TEXT_HEIGHT + 6
    width = max(80, *(cell.shape[1] for _, cell in panels)) + 4
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(panels)), height * rows), "white")
    for place, (title, cell) in enumerate(panels):
        x, y = place % columns * width, place // columns * height
        ImageDraw.Draw(sheet).text((x + 2, y + 2), title[:width // 7], fill="black")
        sheet.paste(Image.fromarray(cell), (x, y + TEXT_HEIGHT + 2))
    save(path, np.asarray(sheet))


# ------------------------------------------------------------------------------------------------
# A table with bars

ROW, GAP, MARGIN, BAR = 30, 22, 16, 420  # pixels: heights and widths of the table's parts
INK, FAINT, DARK, BLUE, PALE = (20, 20, 30), (120, 120, 130), (40, 70, 120), (120, 160, 210), \
    (244, 245, 248)


def save_table(path: Path, title: str, table: list[list[str]], values: list[list[float]],
               notes: list[str]) -> None:
    """Write a table of text, header first, with a bar per row from 0 to the mean of its values.

    Whiskers are the standard deviation, dots the single values; the first row is the baseline, its
    mean a line through all rows.  Columns after the second are set to the right.
    """
    font = ImageFont.load_default(16)
    widths = [int(max(font.getlength(row[i]) for row in table)) for i in range(len(table[0]))]
    left, top = MARGIN + sum(widths) + GAP * len(widths), MARGIN + ROW
    size = (left + BAR + MARGIN, top + ROW * len(table) + 40 + 20 * len(notes))
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN - 4), title, fill=INK, font=ImageFont.load_default(18))
    for i, row in enumerate(table):
        y, x = top + i * ROW, MARGIN
        if i % 2:
            pen.rectangle((MARGIN - 6, y, image.width - MARGIN, y + ROW - 1), fill=PALE)
        for column, (cell, width) in enumerate(zip(row, widths)):
            shift = 0 if column < 2 else width - font.getlength(cell)
            pen.text((x + shift, y + 6), cell, fill=INK if i else FAINT, font=font)
            x += width + GAP
    draw_bars(pen, values, left, top + ROW)
    for i, note in enumerate(notes):
        pen.text((MARGIN, top + ROW * len(table) + 34 + 20 * i), note, fill=FAINT,
                 font=ImageFont.load_default(13))
    save(path, np.asarray(image))


def draw_bars(pen: ImageDraw.ImageDraw, values: list[list[float]], left: int, top: int) -> None:
    """Bars from 0 at (left, top) and an axis below them."""
    means = [float(np.mean(row)) if row else None for row in values]
    spreads = [float(np.std(row, ddof=1)) if len(row) > 1 else 0.0 for row in values]
    ends = [mean + spread for mean, spread in zip(means, spreads) if mean is not None]
    high = max([1e-9, *ends, *(value for row in values for value in row)]) * 1.05
    bottom, font = top + ROW * len(values), ImageFont.load_default(13)

    def at(value: float) -> float:
        """Where a bar of this value ends, pixels from the left."""
        return left + BAR * min(max(value / high, 0), 1)

    for row, mean, spread, y in zip(values, means, spreads, range(top + ROW // 2, bottom, ROW)):
        if mean is not None:
            pen.rectangle((left, y - 9, at(mean), y + 9), fill=DARK if row is values[0] else BLUE)
        for value in row:
            pen.ellipse((at(value) - 3, y - 7, at(value) + 3, y - 1), fill="white", outline=INK)
        if spread:
            low, far = at(mean - spread), at(mean + spread)
            for box in ((low, y + 4, far, y + 4), *((x, y + 1, x, y + 7) for x in (low, far))):
                pen.line(box, fill="white", width=4)     # a rim, visible on dark bars
                pen.line(box, fill=INK, width=2)
    if means[0] is not None:
        pen.line((at(means[0]), top, at(means[0]), bottom), fill=DARK)
    pen.line((left, bottom, left + BAR, bottom), fill=FAINT)
    for value in ticks(high):
        pen.line((at(value), bottom, at(value), bottom + 4), fill=FAINT)
        pen.text((at(value) - font.getlength(f"{value:g}") / 2, bottom + 6), f"{value:g}",
                 fill=FAINT, font=font)


def ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`, three to six of them."""
    power = 10.0 ** math.floor(math.log10(high))
    step = next(s * power for s in (0.1, 0.2, 0.5, 1, 2) if high / (s * power) < 6)
    return [round(i * step, 12) for i in range(int(high / step) + 1)]
