"""Files of a data set: finding pairs, reading images, labels and depth maps; one refusal for each.

A data set's own file (ade20k.py, coco.py, ...) has a frozen dataclass of its settings, each of
which is a flag, with two methods:
    open(cut)       -> the split as a torch Dataset of samples (data.py says what a sample is)
    classes(names)  -> segmentation: names, colours and label values; `names` are the model's own
"""
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ops.errors import InputError

IGNORE = 255  # label of pixels that count neither in losses nor in metrics
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
UNREADABLE_SHARE = 0.01  # of a set's images that may be skipped
ORIENTATION = 0x0112  # EXIF's tag
LONGEST = 65_535  # pixels of a side, as in a JPEG
CHECKED_FILES = 50  # pairs opened when a data set is opened, evenly spread


@dataclass(frozen=True)
class Cut:
    """Which split is opened, and how its samples are cut."""

    split: str  # "train" or "val"
    crop: tuple[int, int]  # (height, width) of a training crop; of a person's crop always
    scale: tuple[int, int] | None  # segmentation: (long, short) bounds of the resize
    seed: int  # of every random draw of a training sample
    captions: bool = False  # embedded seg and depth: whether a sample has "caption", too

    @property
    def training(self) -> bool:
        """Whether samples are augmented."""
        return self.split == "train"


def find_root(data: str | None) -> Path:
    """The folder of --data; InputError if it was not given or is none."""
    if data is None:
        raise InputError("--data is missing: the folder that holds the data set")
    if not Path(data).is_dir():
        raise InputError(f"--data {data} is no folder")
    return Path(data)


def check_outside(out: Path, data: str | None) -> None:
    """InputError if results in `out` would lie among a data set's images, and be taken for some."""
    images, out = Path(data or "/").resolve() / "images", out.resolve()
    if data and images in (out, *out.parents):
        raise InputError(f"--out {out} is below {images}: its pictures would be taken for images "
                         "of the data set; give another folder")


def list_pairs(images: Path, labels: Path, image_end: str = "",
               label_end: str = ".png") -> list[tuple[Path, Path]]:
    """(image, label) files of the same relative name, sorted; InputError if any lacks its label.

    Image names end in `image_end` and an image suffix, label names in `label_end` instead.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist: see the layouts in "
                             "docs/DATASETS.md")
    found = sorted(p for p in images.rglob("*")
                   if p.suffix.lower() in IMAGE_SUFFIXES and p.stem.endswith(image_end)
                   and not p.name.startswith("._"))      # macOS' shadows
    if not found:
        raise InputError(f"{images} holds no image "
                         f"({', '.join(image_end + suffix for suffix in IMAGE_SUFFIXES)})")
    pairs = [(p, (labels / p.relative_to(images)).with_name(p.stem.removesuffix(image_end)
                                                            + label_end)) for p in found]
    missing = [pair for pair in pairs if not pair[1].is_file()]
    if missing:
        raise InputError(f"{missing[0][0]} has no label {missing[0][1]} ({len(missing)} of "
                         f"{len(pairs)} images lack theirs)")
    return pairs


def check_some(load, length: int) -> list:
    """load(i) of about CHECKED_FILES of `length` items, evenly spread; InputError of the last bad
    one if more are bad than training skips, or all.
    """
    loaded, errors = [], []
    for index in range(0, length, max(1, length // CHECKED_FILES)):
        try:
            loaded.append(load(index))
        except InputError as error:
            errors.append(error)
    if len(errors) > UNREADABLE_SHARE * length or not loaded:
        raise errors[-1]
    return loaded


def output_names(files: list[Path]) -> list[Path]:
    """Each file's path without its suffix; with it where the rest is not unique, or only dots."""
    stems = Counter(file.with_suffix("") for file in files)
    names = [file if stems[file.with_suffix("")] > 1 or not file.stem.strip(".")
             else file.with_suffix("") for file in files]
    return names if len(set(names)) == len(names) else files  # x.png, x.jpg, x.png.jpg


def relative_names(names: list[str]) -> dict[str, Path]:
    """Name of an image -> where its exported answer goes, without suffix: flat, as the benchmarks'
    servers want it, or below the images' common folder where two would share a name.
    """
    stems = {name: Path(Path(name).stem) for name in names}
    if len(set(stems.values())) == len(names):
        return stems
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    return dict(zip(names, output_names([Path(os.path.relpath(name, root)) for name in names])))


class PairFiles(Dataset):
    """What sets of (image, label or depth map) files share; `cut` says how samples are cut."""

    def __init__(self, pairs: list[tuple[Path, Path]], cut: Cut):
        self.pairs, self.cut = pairs, cut

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Path of an image, for messages and for exported files."""
        return str(self.pairs[index][0])

    def names(self) -> list[str]:
        """Paths of all images."""
        return [str(image) for image, _ in self.pairs]


# ------------------------------------------------------------------------------------------------
# Decoding

def decode(path: Path, convert) -> np.ndarray:
    """convert(Pillow image) of a file; InputError naming a file that is missing or broken."""
    try:
        with Image.open(path) as image:
            if max(image.size) > LONGEST:                # decoding it may take minutes
                raise ValueError(f"it claims to be {image.width}x{image.height}")
            image.verify()                               # a PNG's checksums: loading ignores them
        with Image.open(path) as image:
            return convert(image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:                           # Pillow's plugins raise whatever happens
        raise InputError(f"{path} cannot be decoded ({type(error).__name__}: {error}): replace or "
                         "remove it") from None


def load_image(path: Path) -> np.ndarray:
    """Any image file as (H, W, 3) uint8 RGB, upright (EXIF); InputError naming an unusable one.

    Of several frames the first.  Transparent pixels show white; 16 bits are divided by 257, so that
    white stays white.
    """
    return decode(path, lambda image: to_rgb(ImageOps.exif_transpose(image)))


def load_pair(path: Path, other_path: Path, load_other) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label or depth map, of one size; InputError if they don't fit.

    An image that its EXIF orientation turns is refused where sizes can't tell whether the other
    file is turned, too.
    """
    turned = decode(path, lambda image: image.getexif().get(ORIENTATION, 1))
    image, other = load_image(path), load_other(other_path)
    if turned in (2, 3, 4) or turned in (5, 6, 7, 8) and image.shape[0] == image.shape[1]:
        raise InputError(f"{path} is to be turned by its EXIF orientation {turned}, {other_path} "
                         "can't say so: save the image upright")
    if image.shape[:2] != other.shape:
        raise InputError(f"{other_path} is {other.shape[1]}x{other.shape[0]}, its image "
                         f"{image.shape[1]}x{image.shape[0]}")
    return image, other


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as (H, W, 3) uint8; ValueError if its values' range is unknown."""
    if image.mode.startswith("I"):                       # Pillow's own conversion clips at 255
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()} to {values.max()}: 8 or 16 bits are needed")
        return np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels: 8 or 16 bits are needed")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def load_label(path: Path) -> np.ndarray:
    """A label file as (H, W) uint8 of the values it holds (palette indices, not colours)."""
    label = decode(path, np.array)
    if label.ndim != 2:
        raise InputError(f"{path} has {label.shape[-1]} channels: a label file is a single-channel "
                         "or palette PNG of class numbers")
    if label.dtype.kind == "f" or label.min() < 0 or label.max() > 255:
        raise InputError(f"{path} holds the value {label.max()} ({label.dtype}): labels are 0..255")
    return label.astype(np.uint8)


def load_depth(path: Path) -> np.ndarray:
    """A 16-bit depth PNG as (H, W) float32 of the values it holds; InputError naming a bad file."""
    depth = decode(path, np.array)
    if depth.ndim != 2 or depth.dtype not in (np.uint16, np.int32):
        raise InputError(f"{path} is {depth.dtype} of shape {depth.shape}: a depth map is a "
                         "single-channel 16-bit PNG")
    if depth.min() < 0:
        raise InputError(f"{path} holds the value {depth.min()}: depth is 0 (unknown) or more")
    return depth.astype(np.float32)


def to_sample(image: np.ndarray, target: np.ndarray, name: str) -> dict:
    """(H, W, 3) uint8 or float32 in [0, 1] and (H, W) labels (uint8) or metres -> a sample."""
    if image.dtype == np.uint8:
        image = image.astype(np.float32) / 255
    target = target.astype(np.int64 if target.dtype == np.uint8 else np.float32)
    return {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "target": torch.from_numpy(np.ascontiguousarray(target)), "name": name}


# ------------------------------------------------------------------------------------------------
# Classes

@dataclass(frozen=True)
class Classes:
    """Class names by label value, a colour for each, and the values that files hold for them."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    lut: np.ndarray  # (256,) uint8: value in the file -> label, 255 = ignore
    raw_values: frozenset  # what a label file may hold
    export: np.ndarray  # (256,) uint8: label -> value in an exported file
    hint: str = ""  # what else to say when a label file holds something else


def spread_palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """n well separated colours: hues by the golden angle, three brightnesses in turn."""
    hsv = [((i * 111) % 256, (200, 120, 255)[i % 3], (230, 255, 160)[i // 3 % 3]) for i in range(n)]
    image = Image.new("HSV", (n, 1))
    image.putdata(hsv)
    return tuple(map(tuple, np.asarray(image.convert("RGB"))[0].tolist()))


def plain_classes(names: tuple[str, ...], palette=None) -> Classes:
    """Classes whose label files hold 0..n-1, and 255 for pixels to ignore."""
    lut = np.full(256, IGNORE, np.uint8)
    lut[:len(names)] = np.arange(len(names))
    return Classes(names, palette or spread_palette(len(names)), lut,
                   frozenset((*range(len(names)), IGNORE)), np.arange(256, dtype=np.uint8))


def class_table(name: str) -> dict:
    """The entry of classes.json for a released set."""
    return json.loads(Path(__file__).with_name("classes.json").read_text(encoding="utf-8"))[name]


def inverse(lut: np.ndarray) -> np.ndarray:
    """(256,) uint8: label -> the value that `lut` maps to it; 0, "other", for labels without."""
    table = np.zeros(256, np.uint8)
    raw = np.flatnonzero(lut != IGNORE)
    table[lut[raw]] = raw
    return table
