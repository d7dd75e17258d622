"""Depth maps on files: NYU v2 and KITTI (Eigen split) as released, and your own folder.

    nyu      DATA/sync/SCENE/{rgb_*.jpg,sync_depth_*.png}, DATA/official_splits/test/...; in mm
    kitti    DATA/raw_data/DATE/DRIVE/image_02/data/*.png, DATA/data_depth_annotated/...; 1/256 m
    folder   images/{train,val}/*, depths/{train,val}/*.png: 16-bit, --depth-scale per metre

List files are the community's: "<rgb> <depth>" per line, each with or without a leading slash,
relative to the root; further columns (focal lengths) and lines without depth ("None") are skipped.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ops import augment
from ops.errors import InputError
from sets.files import (Cut, PairFiles, check_some, find_root, list_pairs, load_depth, load_pair,
                        to_sample)

KITTI_SIZE = (352, 1216)  # of the benchmark's crop
SCENES = (  # NYU v2's types of scenes in VPD's order (depth/dataset/nyu_class_list.json), as spelt
    "printer_room", "bathroom", "living_room", "study", "conference_room", "study_room", "kitchen",
    "home_office", "bedroom", "dinette", "playroom", "indoor_balcony", "laundry_room", "basement",
    "excercise_room", "foyer", "home_storage", "cafe", "furniture_store", "office_kitchen",
    "student_lounge", "dining_room", "reception_room", "computer_lab", "classroom", "office",
    "bookstore")
Pairs = list[tuple[Path, Path]]  # (rgb, depth) files


@dataclass(frozen=True)
class DepthFolder:
    """Your own images and 16-bit depth maps."""

    data: str | None = None  # folder of images/ and depths/
    depth_scale: float = 1000.0  # PNG units per metre

    def open(self, cut: Cut) -> "DepthFiles":
        """The split; InputError if its files are missing."""
        root = find_root(self.data)
        pairs = list_pairs(root / "images" / cut.split, root / "depths" / cut.split)
        return DepthFiles(pairs, cut, self.depth_scale)


@dataclass(frozen=True)
class Nyu:
    """NYU v2: 24,231 training images of the BTS project's sync.zip, 654 test images."""

    data: str | None = None  # folder of sync/ and official_splits/
    train_list: str | None = None  # text file of '<rgb> <depth>' lines, below sync/
    val_list: str | None = None  # the same, below official_splits/test/

    def open(self, cut: Cut) -> "DepthFiles":
        """The split; InputError if lists or files are missing or share a scene."""
        root = find_root(self.data)
        places = {"train": root / "sync", "val": root / "official_splits" / "test"}
        return DepthFiles(listed(cut.split, places, self.train_list, self.val_list), cut, 1000.0)


@dataclass(frozen=True)
class Kitti:
    """KITTI's Eigen split: 23,158 training and 652 test images."""

    data: str | None = None  # folder of raw_data/ and data_depth_annotated/
    train_list: str | None = None  # text file of '<rgb> <depth>' lines, below --data
    val_list: str | None = None  # the same

    def open(self, cut: Cut) -> "DepthFiles":
        """The split; InputError if lists or files are missing or share a drive."""
        root = find_root(self.data)
        pairs = listed(cut.split, {"train": root, "val": root}, self.train_list, self.val_list)
        return DepthFiles(pairs, cut, 256.0, kitti=True)


def listed(split: str, roots: dict[str, Path], train_list: str | None,
           val_list: str | None) -> Pairs:
    """The pairs that a split's list names; InputError if one is missing or is in both lists."""
    lists, other = {"train": train_list, "val": val_list}, {"train": "val", "val": "train"}[split]
    pairs = read_list(lists[split], roots[split], f"--{split}-list")
    if lists[other]:
        check_leakage(pairs, read_list(lists[other], roots[other], f"--{other}-list"))
    missing = [path for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} of {2 * len(pairs)} files "
                         "of the list are missing)")
    return pairs


def kitti_crop(array: np.ndarray) -> np.ndarray:
    """The benchmark's crop of an image or depth map: 352 x 1216, bottom, centred
    (official: depth/dataset/kitti.py)."""
    height, width = array.shape[:2]
    top, left = height - KITTI_SIZE[0], (width - KITTI_SIZE[1]) // 2
    return array[top:top + KITTI_SIZE[0], left:left + KITTI_SIZE[1]]


def read_list(path: str | None, root: Path, flag: str) -> Pairs:
    """(rgb, depth) paths of a list file; InputError if it is missing, broken or names no pair."""
    if path is None:
        raise InputError(f"{flag} is missing: a text file of '<rgb> <depth>' lines, relative to "
                         f"{root}")
    try:
        lines = re.split(r"\r\n?|\n", Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path} cannot be read ({error})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or (len(words) > 1 and words[1] == "None"):
            continue
        if len(words) < 2:
            raise InputError(f"{path}, line {number}: '{line}' is no '<rgb> <depth>' pair")
        pairs.append((root / words[0].lstrip("/"), root / words[1].lstrip("/")))
    if not pairs:
        raise InputError(f"{path} names no pair of files")
    return pairs


def recording(path: Path) -> str:
    """The drive or scene that an image belongs to, for the check of leakage."""
    drives = [part for part in path.parts if re.fullmatch(r"\d{4}_\d\d_\d\d_drive_\d+\w*", part)]
    return drives[0] if drives else path.parent.name


def check_leakage(train: Pairs, val: Pairs) -> None:
    """InputError if a drive or scene is in both lists."""
    shared = {recording(rgb) for rgb, _ in train} & {recording(rgb) for rgb, _ in val}
    if shared:
        raise InputError(f"{sorted(shared)[0]} is in the training and the validation list "
                         f"({len(shared)} shared): the result would be no test")


class DepthFiles(PairFiles):
    """RGB images and 16-bit depth PNGs.  Training: the official chain, ops/augment.py.

    `units` per metre in the PNG; `kitti` cuts to 352 x 1216.
    """

    def __init__(self, pairs: Pairs, cut: Cut, units: float, kitti: bool = False):
        super().__init__(pairs, cut)
        self.units, self.kitti = units, kitti

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, raw depth float32 in the file's units), cropped on KITTI."""
        image_path, depth_path = self.pairs[index]
        image, depth = load_pair(image_path, depth_path, load_depth)
        smallest = KITTI_SIZE if self.kitti else (self.cut.crop if self.cut.training else (1, 1))
        if image.shape[0] < smallest[0] or image.shape[1] < smallest[1]:
            raise InputError(f"{image_path} is {image.shape[1]}x{image.shape[0]}: at least "
                             f"{smallest[1]}x{smallest[0]} is needed")
        return (kitti_crop(image), kitti_crop(depth)) if self.kitti else (image, depth)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        epoch, index = key
        image, depth = self.load(index)
        if self.cut.training:
            rng = np.random.default_rng([self.cut.seed, epoch, index])
            image, depth = augment.depth_augmentation(image, depth, self.cut.crop, rng)
        return to_sample(image, depth / self.units, self.name(index))

    def check(self) -> str:
        """Open some pairs; InputError if they can't be used.  Returns a summary."""
        loaded = check_some(lambda i: self.load(i)[1] / self.units, len(self))
        known = np.concatenate([depth[depth > 0] for depth in loaded])
        if not len(known):
            raise InputError(f"no depth in the {len(loaded)} maps checked, such as "
                             f"{self.pairs[0][1]}: 0 means unknown")
        share = 100 * len(known) / sum(depth.size for depth in loaded)
        return (f"{len(self)} images; {len(loaded)} checked: depth {known.min():.2f} to "
                f"{known.max():.2f} m, known at {share:.0f} % of the pixels")
