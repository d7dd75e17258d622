"""Segmentation on label files: ADE20K as released, and your own folder.

    ade20k   {images,annotations}/{training,validation}/ADE_{train,val}_%08d.{jpg,png}
    folder   images/{train,val}/*, labels/{train,val}/*.png, classes.txt
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ops import augment, pixels
from ops.errors import InputError
from sets.files import (IGNORE, Classes, Cut, PairFiles, check_some, class_table, find_root,
                        inverse, list_pairs, load_label, load_pair, plain_classes, to_sample)


@dataclass(frozen=True)
class Ade20k:
    """ADEChallengeData2016 as released: 20,210 training and 2,000 validation images."""

    data: str | None = None  # folder of the released archive

    def classes(self, names: tuple[str, ...] = ()) -> Classes:
        """The 150; files hold 0 = other (ignored), 1..150 (official: reduce_zero_label)."""
        table = class_table("ade20k")
        lut = np.full(256, IGNORE, np.uint8)
        lut[1:151] = np.arange(150)
        return Classes(tuple(table["names"]), tuple(map(tuple, table["palette"])), lut,
                       frozenset((*range(151), IGNORE)), inverse(lut))

    def open(self, cut: Cut) -> "SegFiles":
        """The split; InputError if its files are missing."""
        root = find_root(self.data)
        inner = root / "ADEChallengeData2016"
        root = inner if inner.is_dir() else root
        name = {"train": "training", "val": "validation"}[cut.split]
        return SegFiles(list_pairs(root / "images" / name, root / "annotations" / name),
                        self.classes(), cut)


@dataclass(frozen=True)
class SegFolder:
    """Your own images and labels."""

    data: str | None = None  # folder of images/, labels/ and classes.txt

    def classes(self, names: tuple[str, ...] = ()) -> Classes:
        """Classes of these names, in colours of our choice."""
        return plain_classes(names)

    def open(self, cut: Cut) -> "SegFiles":
        """The split; InputError if its files are missing."""
        root = find_root(self.data)
        classes = plain_classes(read_names(root / "classes.txt"))
        pairs = list_pairs(root / "images" / cut.split, root / "labels" / cut.split)
        return SegFiles(pairs, classes, cut)


def read_names(path: Path) -> tuple[str, ...]:
    """Class names of classes.txt: one per line, line number = label; InputError if unusable."""
    if not path.is_file():
        raise InputError(f"{path} is missing: one class name per line, in label order from 0")
    try:
        lines = path.read_bytes().decode("utf-8-sig").rstrip().split("\n")  # no other ends
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text") from None
    names = tuple(line.strip() for line in lines)
    for i, name in enumerate(names):                 # skipping one would shift the later labels
        if name in ("", *names[:i]):
            raise InputError(f"{path}, line {i + 1}, {name!r}, is empty or there already: each "
                             "class needs a name of its own")
    if not 2 <= len(names) <= 255:
        raise InputError(f"{path} names {len(names)} classes: 2 to 255 are possible")
    return names


class SegFiles(PairFiles):
    """Image and label files.  Training: the official pipeline (`augmented`).  Else: whole images.

    In evaluation the image is at `cut.scale`, the target at its own size; scale None keeps an
    image's own size (times the random ratio in training).
    """

    def __init__(self, pairs: list[tuple[Path, Path]], classes: Classes, cut: Cut):
        super().__init__(pairs, cut)
        self.classes, self.scale = classes, cut.scale

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, labels uint8); InputError if the two files don't fit each other."""
        image_path, label_path = self.pairs[index]
        image, raw = load_pair(image_path, label_path, load_label)
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
        if self.cut.training:
            rng = np.random.default_rng([self.cut.seed, epoch, index])
            image, label = self.augmented(image, label, rng)
        elif self.scale is not None:
            size = augment.rescale_size(*image.shape[:2], self.scale)
            image = pixels.resize_bilinear(image, size)
        return to_sample(image, label, self.name(index))

    def augmented(self, image: np.ndarray, label: np.ndarray,
                  rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rescale, crop, flip, distort colours, pad: the order of the official configs/ade.py."""
        base = self.scale or (max(image.shape[:2]), min(image.shape[:2]))
        size, crop = augment.random_rescale(*image.shape[:2], base, rng), self.cut.crop
        image, label = pixels.resize_bilinear(image, size), pixels.resize_nearest(label, size)
        y, x = augment.crop_offset(label, crop, rng)
        image, label = augment.crop(image, y, x, crop), augment.crop(label, y, x, crop)
        if rng.random() < 0.5:
            image, label = augment.flip(image), augment.flip(label)
        image = augment.photometric_distortion(np.ascontiguousarray(image), rng)
        image = image.astype(np.float32) / 255           # the padding's mid-grey, 0.5, is no uint8
        return augment.pad_to(image, crop, 0.5), augment.pad_to(label, crop, IGNORE)

    def check(self) -> str:
        """Open some pairs; InputError if they can't be used.  Returns a summary."""
        names = self.classes.names
        loaded = check_some(lambda i: np.bincount(self.load(i)[1].ravel(), minlength=256),
                            len(self))
        counts = sum(loaded)
        seen = (counts[:len(names)] > 0).sum()
        if seen == 0:
            raise InputError(f"all pixels of the {len(loaded)} labels checked, such as "
                             f"{self.pairs[0][1]}, are ignored ({IGNORE}): there is nothing to "
                             "learn or to measure")
        share = 100 * counts[IGNORE] / counts.sum()
        return (f"{len(self)} images; {len(loaded)} checked: {seen} of {len(names)} classes seen, "
                f"{share:.1f} % of the pixels ignored")
