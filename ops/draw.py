"""Pictures for people: what went in, what was true, what the model says."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ops import udp as pose
from data import IGNORE, Classes

TEXT_HEIGHT = 14  # pixels per legend line
MIN_SIDE = 192  # smaller images are enlarged to this height
MAX_SIDE = 1600  # larger pictures of one image are reduced to this
MIN_WIDTH = 360  # of a picture with a legend or a scale bar


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
    labels = [np.asarray(x) for row in rows for x in row[1:]]
    stack(path, strips, ("input", "truth (black: no label)", "prediction"),
          lambda width: legend(labels, classes, width))


def stack(path: Path, strips: list[np.ndarray], titles: tuple[str, ...], footer) -> None:
    """Write strips under each other, column titles above, `footer(width)` below."""
    width = max(strip.shape[1] for strip in strips)
    header = Image.new("RGB", (width, TEXT_HEIGHT + 4), "white")
    column = strips[0].shape[1] // len(titles)
    for i, title in enumerate(titles):
        ImageDraw.Draw(header).text((i * column + 4, 2), title, fill="black")
    strips = [np.pad(s, ((0, 4), (0, width - s.shape[1]), (0, 0)), constant_values=255)
              for s in strips]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.asarray(header), *strips, footer(width)])).save(path)


# ------------------------------------------------------------------------------------------------
# Depth

DEPTH_COLOURS = ((255, 245, 180), (254, 170, 90), (220, 70, 90), (120, 30, 120), (25, 10, 60))
TICKS = (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80)  # metres, on the scale bar


def colour_depth(depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """(H, W) metres -> (H, W, 3) uint8, near light, far dark, logarithmic; unknown (0) is grey."""
    span = np.log(max(farthest / nearest, 1.001))
    place = np.log(np.maximum(depth, nearest) / nearest) / span * (len(DEPTH_COLOURS) - 1)
    anchors = np.arange(len(DEPTH_COLOURS))
    channels = [np.interp(place, anchors, [c[i] for c in DEPTH_COLOURS]) for i in range(3)]
    colours = np.stack(channels, axis=-1).astype(np.uint8)
    colours[depth <= 0] = 128
    return colours


def colour_error(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Relative error: white 0, red 25 % too far, blue 25 % too near; unknown truth is grey."""
    relative = np.clip((depth - truth) / np.maximum(truth, 1e-3) / 0.25, -1, 1)[..., None]
    red, blue = np.array([200, 30, 40]), np.array([30, 60, 200])
    target = np.where(relative > 0, red, blue)
    colours = (255 + (target - 255) * np.abs(relative)).astype(np.uint8)
    colours[truth <= 0] = 128
    return colours


def scale_bar(nearest: float, farthest: float, width: int) -> np.ndarray:
    """A strip that shows which colour is how many metres."""
    ramp = np.exp(np.linspace(np.log(nearest), np.log(max(farthest, nearest * 1.001)), width))
    bar = np.repeat(colour_depth(ramp[None], nearest, farthest), TEXT_HEIGHT, axis=0)
    strip = Image.fromarray(np.concatenate([bar, np.full_like(bar, 255)]))
    draw = ImageDraw.Draw(strip)
    for tick in TICKS:
        if nearest <= tick <= farthest:
            x = int(np.searchsorted(ramp, tick))
            draw.line((x, TEXT_HEIGHT - 4, x, TEXT_HEIGHT + 2), fill="black")
            draw.text((min(x + 3, width - 30), TEXT_HEIGHT), f"{tick:g} m", fill="black")
    return np.asarray(strip)


def save_depth_sheet(path: Path, rows: list[tuple]) -> None:
    """Write rows of (image (3,H,W) in [0,1], true metres, predicted metres) as one PNG.

    Columns: input | truth | prediction | relative error; one scale of metres for the whole sheet.
    """
    known = np.concatenate([np.asarray(truth)[np.asarray(truth) > 0] for _, truth, _ in rows])
    nearest, farthest = (known.min(), known.max()) if known.size else (1.0, 10.0)
    strips = []
    for image, truth, depth in rows:
        truth, depth = np.asarray(truth), np.asarray(depth)
        panels = [to_uint8(image), colour_depth(truth, nearest, farthest),
                  colour_depth(depth, nearest, farthest), colour_error(depth, truth)]
        strips.append(np.concatenate([enlarge(panel) for panel in panels], axis=1))
    titles = ("input", "truth (grey: unknown)", "prediction", "error: red 25 % too far, blue near")
    stack(path, strips, titles, lambda width: scale_bar(float(nearest), float(farthest), width))


# ------------------------------------------------------------------------------------------------
# Pose

LEFT, RIGHT, MIDDLE = (0, 220, 60), (255, 128, 0), (51, 153, 255)  # the usual colours of limbs
DRAWN_ABOVE = 0.2  # score of a joint that is drawn, the one above which it counts
HEAT_COLOURS = ((0, 0, 130), (0, 120, 255), (60, 255, 160), (255, 220, 0), (220, 0, 0))


def joint_colour(joint: int) -> tuple[int, int, int]:
    """Left side, right side, or the nose."""
    name = pose.KEYPOINTS[joint]
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def draw_skeleton(image: Image.Image, joints: np.ndarray, zoom: float = 1.0,
                  radius: int | None = None) -> None:
    """Draw joints (17, 3), x, y in pixels and a score, onto `image`, `zoom` times as large.

    Joints that score 0.2 or less are left out; a limb needs both its ends.  `radius` of a joint, in
    pixels of `image`; None: as suits a person that fills the picture.
    """
    draw, seen = ImageDraw.Draw(image), joints[:, 2] > DRAWN_ABOVE
    points = [((x + 0.5) * zoom, (y + 0.5) * zoom) for x, y in joints[:, :2].tolist()]
    radius = radius or max(2, round(min(image.size) / 90))
    for a, b in pose.SKELETON:
        if seen[a] and seen[b]:
            sides = {joint_colour(a), joint_colour(b)} - {MIDDLE}
            colour = sides.pop() if len(sides) == 1 else MIDDLE
            draw.line([points[a], points[b]], fill=colour, width=max(2, radius))
    for joint in np.flatnonzero(seen):
        x, y = points[joint]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=joint_colour(joint),
                     outline="black")


def colour_heat(values: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W, 3) uint8, blue to red."""
    place = np.clip(values, 0, 1) * (len(HEAT_COLOURS) - 1)
    channels = [np.interp(place, np.arange(len(HEAT_COLOURS)), [c[i] for c in HEAT_COLOURS])
                for i in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def blend_heat(image: np.ndarray, values: np.ndarray, weight: float = 0.5) -> np.ndarray:
    """(h, w) values laid over an (H, W, 3) uint8 picture, their highest red, their lowest blue."""
    values = values - values.min()
    heat = Image.fromarray((255 * values / max(values.max(), 1e-6)).astype(np.uint8))
    heat = np.asarray(heat.resize(image.shape[1::-1], Image.BILINEAR)) / 255
    return (image * (1 - weight) + colour_heat(heat) * weight).astype(np.uint8)


def save_pose_sheet(path: Path, rows: list[tuple]) -> None:
    """Write rows of (crop (3,H,W) in [0,1], true joints (17,3), predicted joints (17,3), heatmaps
    (17,h,w)) as one PNG; joints in pixels of the crop, with a weight or a score.

    Columns: truth | prediction | the highest of the 17 heatmaps.
    """
    strips = []
    for crop, truth, joints, heatmaps in rows:
        picture = to_uint8(crop)
        large = enlarge(picture)
        zoom = large.shape[0] / picture.shape[0]
        panels = []
        for points in (truth, joints):
            panel = Image.fromarray(large.copy())
            draw_skeleton(panel, np.asarray(points, np.float64), zoom)
            panels.append(np.asarray(panel))
        panels.append(blend_heat(large, np.asarray(heatmaps.amax(dim=0), np.float64)))
        strips.append(np.concatenate(panels, axis=1))
    titles = ("truth", "prediction", "heatmaps, highest")
    stack(path, strips, titles, skeleton_legend)


def skeleton_legend(width: int) -> np.ndarray:
    """A strip that says what the limbs' colours mean."""
    strip = Image.new("RGB", (width, TEXT_HEIGHT + 4), "white")
    draw = ImageDraw.Draw(strip)
    for i, (name, colour) in enumerate((("their left", LEFT), ("right", RIGHT),
                                        ("middle", MIDDLE))):
        x = 4 + i * 90
        draw.rectangle((x, 4, x + 9, 13), fill=colour)
        draw.text((x + 14, 2), name, fill="black")
    return np.asarray(strip)


# ------------------------------------------------------------------------------------------------
# One image of the user's (apply.py)

def look_size(height: int, width: int, limit: int = MAX_SIDE) -> tuple[int, int]:
    """Size at which an image is shown: shorter side MIN_SIDE or more, no side above `limit`."""
    factor = min(max(1.0, MIN_SIDE / min(height, width)), limit / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def save_framed(path: Path, picture: np.ndarray, footer) -> None:
    """Write a picture (H, W, 3) uint8 with `footer(width)` below it, on white."""
    width = max(MIN_WIDTH, picture.shape[1])
    picture = np.pad(picture, ((0, 4), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([picture, footer(width)])).save(path)


def save_overlay(path: Path, image: np.ndarray, labels: np.ndarray, classes: Classes,
                 weight: float = 0.55) -> None:
    """Write labels (H, W) uint8 in colour over their image (H, W, 3) uint8, the legend below."""
    size = look_size(*labels.shape)
    small = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.NEAREST))
    picture = fit(image, *size) * (1 - weight) + colour_labels(small, classes) * weight
    save_framed(path, picture.astype(np.uint8), lambda width: legend([labels], classes, width))


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
    height, width = look_size(*depth.shape, limit=MAX_SIDE // 2)
    nearest, farthest = tick_range(depth)
    small = Image.fromarray(depth.astype(np.float32)).resize((width, height), Image.BILINEAR)
    colours = colour_depth(np.asarray(small).clip(nearest, farthest), nearest, farthest)
    picture = np.concatenate([fit(image, height, width), colours], axis=1)
    save_framed(path, picture, lambda width: scale_bar(nearest, farthest, width))


def save_people(path: Path, image: np.ndarray, people: list[tuple]) -> None:
    """Write an image (H, W, 3) uint8 with people on it.

    people: (joints (17, 3) with scores, box (left, top, width, height)) in pixels of the image.
    """
    height, width = look_size(*image.shape[:2])
    picture, zoom = Image.fromarray(fit(image, height, width)), width / image.shape[1]
    for joints, box in people:
        left, top, wide, high = (value * zoom for value in box)
        if wide < width or high < height:                # a frame around everything says nothing
            corner = (left + max(0, wide - 1), top + max(0, high - 1))
            ImageDraw.Draw(picture).rectangle((left, top, *corner), outline="white",
                                              width=max(1, round(min(height, width) / 300)))
        draw_skeleton(picture, joints, zoom, radius=max(2, round(min(wide, high, height) / 60)))
    save_framed(path, np.asarray(picture), skeleton_legend)
