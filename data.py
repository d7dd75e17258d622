"""Data sets: what a sample is, where its files lie, and what is done to it before the network.

    shapes     scenes rendered on the fly (shapes.py); no files, no download
    folder     images/{train,val}/*, labels/{train,val}/*.png, classes.txt        your own images
    ade20k     {images,annotations}/{training,validation}/ADE_{train,val}_%08d.{jpg,png}
    cityscapes, cityscapes-extra, mapillary                                   see city_data.py

A sample is a dict: "image" (3, H, W) float32 RGB in [0, 1], "target" (H, W) int64 labels with 255 =
ignore, "name".  In evaluation the image is at the protocol's scale, the target at its own size.

Every random draw for a training sample comes from (seed, epoch, index): the sample does not depend
on which worker makes it or when, which makes an interrupted run resumable to the bit.
"""
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from ops import augment
from ops import parallel
from sets import shapes
from ops.errors import InputError

IGNORE = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
UNREADABLE = (Image.DecompressionBombError, OSError, SyntaxError, ValueError)  # Pillow raises these
STAND_INS = 8  # samples tried in place of an unreadable one
CHECKED_FILES = 50  # pairs opened when a data set is opened, evenly spread
# Degrees. Depth scenes have one camera, like NYU's and KITTI's: under a random lens, an answer that
# is right but for the factor which lens and stature leave open has a delta1 of 0.79.
DEPTH_LENS = 57.0
VAL_SEED = 1 << 40  # first scene seed of the embedded validation set, out of training's reach
COLOURS = ((128, 178, 255), (150, 140, 120), (230, 60, 60), (250, 200, 40), (60, 160, 70),
           (150, 80, 200), (255, 140, 200))  # of the embedded classes, for pictures


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
    return json.loads((Path(__file__).parent / "sets" / "classes.json").read_text())[name]


def inverse(lut: np.ndarray) -> np.ndarray:
    """(256,) uint8: label -> the value that `lut` maps to it; 0, "other", for labels without."""
    table = np.zeros(256, np.uint8)
    raw = np.flatnonzero(lut != IGNORE)
    table[lut[raw]] = raw
    return table


def ade20k_classes() -> Classes:
    """ADE20K's classes; files hold 0 = other (ignored), 1..150 (official: reduce_zero_label)."""
    table = class_table("ade20k")
    lut = np.full(256, IGNORE, np.uint8)
    lut[1:151] = np.arange(150)
    return Classes(tuple(table["names"]), tuple(map(tuple, table["palette"])), lut,
                   frozenset((*range(151), IGNORE)), inverse(lut))


# ------------------------------------------------------------------------------------------------
# Files

def load_image(path: Path) -> np.ndarray:
    """Any image file as (H, W, 3) uint8 RGB, upright (EXIF); InputError naming an unusable one.

    Of several frames the first.  Transparent pixels show white; 16 bits are divided by 257, so that
    white stays white.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (*UNREADABLE, EOFError) as error:
        raise InputError(f"{path} cannot be decoded ({error}): replace or remove it") from None


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
    try:
        with Image.open(path) as image:
            label = np.array(image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be decoded ({error}): replace or remove it") from None
    if label.ndim != 2:
        raise InputError(f"{path} has {label.shape[-1]} channels: a label file is a single-channel "
                         "or palette PNG of class numbers")
    if label.min() < 0 or label.max() > 255:
        raise InputError(f"{path} holds the value {label.max()}: labels are 0..255")
    return label.astype(np.uint8)


def list_pairs(images: Path, labels: Path, image_end: str = "",
               label_end: str = ".png") -> list[tuple[Path, Path]]:
    """(image, label) files of the same relative name, sorted; InputError if any lacks its label.

    Image names end in `image_end` and an image suffix, label names in `label_end` instead.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist: see the layouts in data.py")
    found = sorted(p for p in images.rglob("*")
                   if p.suffix.lower() in IMAGE_SUFFIXES and p.stem.endswith(image_end))
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


def folder_layout(root: Path, split: str) -> tuple[list[tuple[Path, Path]], Classes]:
    """Pairs and classes of a user's folder; classes.txt: a name per line, line number = label."""
    names_file = root / "classes.txt"
    if not names_file.is_file():
        raise InputError(f"{names_file} is missing: one class name per line, in label order from 0")
    try:
        lines = names_file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{names_file} is no UTF-8 text") from None
    names = tuple(line.strip() for line in lines)
    if "" in names:                                  # skipping it would shift the later labels
        raise InputError(f"{names_file}, line {names.index('') + 1} is empty: a class needs a name")
    if not 2 <= len(names) <= 255:
        raise InputError(f"{names_file} names {len(names)} classes: 2 to 255 are possible")
    return list_pairs(root / "images" / split, root / "labels" / split), plain_classes(names)


def ade20k_layout(root: Path, split: str) -> tuple[list[tuple[Path, Path]], Classes]:
    """Pairs and classes of ADEChallengeData2016 as released (20,210 training, 2,000 validation)."""
    inner = root / "ADEChallengeData2016"
    root = inner if inner.is_dir() else root
    name = {"train": "training", "val": "validation"}[split]
    return list_pairs(root / "images" / name, root / "annotations" / name), ade20k_classes()


def export_labels(folder: Path, name: str, labels: np.ndarray, classes: Classes) -> Path:
    """Write predicted labels (H, W), ints, as the benchmark's server wants them; returns the file.

    A single-channel PNG under the name of the image `name`: Cityscapes' label ids in
    CITY_SEQUENCE_FRAME_leftImg8bit.png, ADE20K's labels + 1 (spec A.6).  ValueError for a value
    that is no label.
    """
    wrong = sorted(set(np.unique(labels).tolist()) - {*range(len(classes.names)), IGNORE})
    if wrong:
        raise ValueError(f"{name}: {wrong[0]} is no label of {len(classes.names)} classes")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(name).stem}.png"
    Image.fromarray(classes.export[labels]).save(path)
    return path


# ------------------------------------------------------------------------------------------------
# Samples

def to_sample(image: np.ndarray, target: np.ndarray, name: str) -> dict:
    """(H, W, 3) uint8 or float32 in [0, 1] and (H, W) labels (uint8) or metres -> a sample."""
    if image.dtype == np.uint8:
        image = image.astype(np.float32) / 255
    target = target.astype(np.int64 if target.dtype == np.uint8 else np.float32)
    return {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "target": torch.from_numpy(np.ascontiguousarray(target)), "name": name}


class SegFiles(Dataset):
    """Image and label files.  Training: the official pipeline (spec A.3).  Else: the whole image.

    `crop` is the side of the training crop; `scale` = (long, short) bounds of the resize, None to
    keep an image's own size (times the random ratio in training).
    """

    def __init__(self, pairs: list[tuple[Path, Path]], classes: Classes, *, training: bool,
                 crop: int, scale: tuple[int, int] | None, seed: int = 0):
        self.pairs, self.classes, self.training = pairs, classes, training
        self.crop, self.scale, self.seed = crop, scale, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Path of the image, for messages."""
        return str(self.pairs[index][0])

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, labels uint8); InputError if the two files don't fit each other."""
        image_path, label_path = self.pairs[index]
        image, raw = load_image(image_path), load_label(label_path)
        if image.shape[:2] != raw.shape:
            raise InputError(f"{label_path} is {raw.shape[1]}x{raw.shape[0]}, its image "
                             f"{image.shape[1]}x{image.shape[0]}")
        wrong = sorted(set(np.unique(raw).tolist()) - self.classes.raw_values)
        if wrong:
            legal = sorted(self.classes.raw_values - {IGNORE})
            raise InputError(f"{label_path} holds the label {wrong[0]}: {legal[0]}..{legal[-1]} "
                             f"and {IGNORE} (ignore) are possible{self.classes.hint}")
        return image, self.classes.lut[raw]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        epoch, index = key
        image, label = self.load(index)
        if self.training:
            rng = np.random.default_rng([self.seed, epoch, index])
            image, label = self.augmented(image, label, rng)
        elif self.scale is not None:
            size = augment.rescale_size(*image.shape[:2], self.scale)
            image = augment.resize_bilinear(image, size)
        return to_sample(image, label, self.name(index))

    def augmented(self, image: np.ndarray, label: np.ndarray,
                  rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rescale, crop, flip, distort colours, pad: the official order (spec A.3)."""
        base = self.scale or (max(image.shape[:2]), min(image.shape[:2]))
        size = augment.random_rescale(*image.shape[:2], base, rng)
        image, label = augment.resize_bilinear(image, size), augment.resize_nearest(label, size)
        crop = (self.crop, self.crop)
        y, x = augment.crop_offset(label, crop, rng)
        image, label = augment.crop(image, y, x, crop), augment.crop(label, y, x, crop)
        if rng.random() < 0.5:
            image, label = augment.flip(image), augment.flip(label)
        image = augment.photometric_distortion(np.ascontiguousarray(image), rng)
        image = image.astype(np.float32) / 255           # the padding's mid-grey, 0.5, is no uint8
        return augment.pad_to(image, crop, 0.5), augment.pad_to(label, crop, IGNORE)

    def check(self) -> str:
        """Open some pairs, evenly spread; InputError on the first bad one.  Returns a summary."""
        step = max(1, len(self) // CHECKED_FILES)
        counts = np.zeros(256, np.int64)
        for index in range(0, len(self), step):
            counts += np.bincount(self.load(index)[1].ravel(), minlength=256)
        seen = (counts[:len(self.classes.names)] > 0).sum()
        share = 100 * counts[IGNORE] / max(1, counts.sum())
        return (f"{len(self)} images; {len(range(0, len(self), step))} checked: {seen} of "
                f"{len(self.classes.names)} classes seen, {share:.1f} % of the pixels ignored")


class Shapes(Dataset):
    """Embedded scenes, `length` per epoch, new ones in each: labels for seg, metres for depth."""

    def __init__(self, length: int, *, task: str = "seg", training: bool, size: int, seed: int = 0):
        self.length, self.task, self.training = length, task, training
        self.size, self.seed = size, seed
        self.classes = plain_classes(shapes.CLASSES, COLOURS)

    def __len__(self) -> int:
        return self.length

    def scene_seed(self, key: tuple[int, int]) -> int:
        """Seed of the scene of (epoch, index); validation scenes are the same in every run."""
        epoch, index = key
        if not self.training:
            return VAL_SEED + index
        return self.seed * VAL_SEED * 2 + epoch * self.length + index

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        lens = DEPTH_LENS if self.task == "depth" else None
        scene = shapes.render(self.scene_seed(key), self.size, self.size, lens)
        target = scene.label if self.task == "seg" else scene.depth  # metres; the sky has none: 0
        return to_sample(scene.image, target, f"scene {self.scene_seed(key)}")

    def check(self) -> str:
        """Summary line, like SegFiles.check."""
        return f"{self.length} scenes of {self.size}x{self.size} pixels, rendered on the fly"


def find_root(root: str | None, dataset: str) -> Path:
    """The folder of --data; InputError if it was not given or is none."""
    if root is None:
        raise InputError(f"--dataset {dataset} needs --data: the folder that holds it")
    if not Path(root).is_dir():
        raise InputError(f"--data {root} is no folder")
    return Path(root)


def open_dataset(name: str, root: str | None, split: str, *, size: int,
                 scale: tuple[int, int] | None, seed: int = 0) -> SegFiles:
    """The segmentation set `name` for `split` = "train" or "val"; InputError if its files aren't
    there.  `size`: side of the training crop.
    """
    layout = folder_layout if name == "folder" else ade20k_layout
    pairs, classes = layout(find_root(root, name), split)
    return SegFiles(pairs, classes, training=split == "train", crop=size, scale=scale, seed=seed)


# ------------------------------------------------------------------------------------------------
# Order and loading

class Stream(Sampler):
    """Endless micro-batches of (epoch, index): shuffled epochs laid end to end, from `start` on.

    `part` = (r, W): of each group of W * batch keys, which `start` counts, the r-th batch.
    DEVIATION: a batch may span two epochs; mmsegmentation drops an epoch's last partial batch.
    """

    def __init__(self, length: int, batch: int, seed: int, start: int = 0,
                 part: tuple[int, int] = (0, 1)):
        self.length, self.batch, self.seed, self.start = length, batch, seed, start
        self.part = part

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of the indices in `epoch`: a function of (seed, epoch) alone."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def __iter__(self):
        number, parts = self.part
        together = self.batch * parts
        epoch, position = divmod(self.start * together, self.length)
        keys = []
        while True:
            for index in self.order(epoch)[position:].tolist():
                keys.append((epoch, index))
                if len(keys) == together:
                    yield keys[number * self.batch:][:self.batch]
                    keys = []
            epoch, position = epoch + 1, 0


class Tolerant(Dataset):
    """A training set in which the next sample stands in for one whose file cannot be read.

    "unreadable" of a sample says why it was needed, "" if it was not; train.py counts.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index); InputError if `STAND_INS` in a row are unreadable."""
        epoch, index = key
        message = ""
        for place in range(index, index + STAND_INS):
            try:
                sample = self.dataset[epoch, place % len(self.dataset)]
                return {**sample, "unreadable": message}
            except InputError as error:
                message = message or str(error)
        raise InputError(message)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one, which saves, minds it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_loader(dataset: Dataset, batch: int, seed: int, start: int, workers: int) -> DataLoader:
    """This process's micro-batches from number `start` on, without end."""
    stream = Stream(len(dataset), batch, seed, start, (parallel.rank(), parallel.world()))
    return DataLoader(Tolerant(dataset), worker_init_fn=ignore_interrupts,
                      batch_sampler=stream, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None)


def eval_loader(dataset: Dataset, batch: int, workers: int) -> DataLoader:
    """The whole set once, in order; batch > 1 needs images of one size.

    Of several processes, the r-th of W has batches r, r + W, r + 2W, ...
    """
    keys = [(0, index) for index in range(len(dataset))]
    batches = [keys[i:i + batch] for i in range(0, len(keys), batch)]
    batches = batches[parallel.rank()::parallel.world()]
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      pin_memory=torch.cuda.is_available())
