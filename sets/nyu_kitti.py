"""Depth data sets: NYU v2 and KITTI (Eigen split) as released, and your own folder.

    nyu      DATA/sync/SCENE/{rgb_*.jpg,sync_depth_*.png}, DATA/official_splits/test/...; in mm
    kitti    DATA/raw_data/DATE/DRIVE/image_02/data/*.png, DATA/data_depth_annotated/...; 1/256 m
    folder   images/{train,val}/*, depths/{train,val}/*.png: 16-bit, --depth-scale per metre

List files are the community's: "<rgb> <depth>" per line, each with or without a leading slash,
relative to the root; further columns (focal lengths) and lines without depth ("None") are skipped.

A sample: "image" (3, H, W) float32 RGB in [0, 1], "target" (H, W) float32 metres with 0 = unknown,
"name".
"""
import re
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ops import augment
from data import CHECKED_FILES, UNREADABLE, find_root, list_pairs, load_image, to_sample
from ops.errors import InputError

KITTI_SIZE = (352, 1216)  # of the benchmark's crop


def load_depth(path: Path) -> np.ndarray:
    """A 16-bit depth PNG as (H, W) float32 of the values it holds; InputError naming a bad file."""
    try:
        with Image.open(path) as image:
            depth = np.array(image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be decoded ({error}): replace or remove it") from None
    if depth.ndim != 2 or depth.dtype == np.uint8:
        raise InputError(f"{path} is {depth.dtype} of shape {depth.shape}: a depth map is a "
                         "single-channel 16-bit PNG")
    return depth.astype(np.float32)


def kitti_crop(array: np.ndarray) -> np.ndarray:
    """The benchmark's crop of an image or depth map: 352 x 1216, bottom, centred (spec B.5)."""
    height, width = array.shape[:2]
    top, left = height - KITTI_SIZE[0], (width - KITTI_SIZE[1]) // 2
    return array[top:top + KITTI_SIZE[0], left:left + KITTI_SIZE[1]]


def read_list(path: str | None, root: Path, flag: str) -> list[tuple[Path, Path]]:
    """(rgb, depth) paths of a list file; InputError if it is missing, broken or names no pair."""
    if path is None:
        raise InputError(f"{flag} is missing: a text file of '<rgb> <depth>' lines, relative to "
                         f"{root}")
    try:
        lines = Path(path).read_text().splitlines()
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


def check_leakage(train: list[tuple[Path, Path]], val: list[tuple[Path, Path]]) -> None:
    """InputError if a drive or scene is in both lists."""
    shared = {recording(rgb) for rgb, _ in train} & {recording(rgb) for rgb, _ in val}
    if shared:
        raise InputError(f"{sorted(shared)[0]} is in the training and the validation list "
                         f"({len(shared)} shared): the result would be no test")


class DepthFiles(Dataset):
    """RGB images and 16-bit depth PNGs.  Training: the official chain (spec B.3).

    `units` per metre in the PNG; `crop` = (height, width) in training; `kitti` cuts to 352 x 1216.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], *, training: bool, crop: tuple[int, int],
                 units: float, kitti: bool = False, seed: int = 0):
        self.pairs, self.training, self.crop = pairs, training, crop
        self.units, self.kitti, self.seed = units, kitti, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Path of the image, for messages and for exported files."""
        return str(self.pairs[index][0])

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, raw depth float32 in the file's units), cropped on KITTI."""
        image_path, depth_path = self.pairs[index]
        image, depth = load_image(image_path), load_depth(depth_path)
        if image.shape[:2] != depth.shape:
            raise InputError(f"{depth_path} is {depth.shape[1]}x{depth.shape[0]}, its image "
                             f"{image.shape[1]}x{image.shape[0]}")
        smallest = KITTI_SIZE if self.kitti else (self.crop if self.training else (1, 1))
        if image.shape[0] < smallest[0] or image.shape[1] < smallest[1]:
            raise InputError(f"{image_path} is {image.shape[1]}x{image.shape[0]}: at least "
                             f"{smallest[1]}x{smallest[0]} is needed")
        return (kitti_crop(image), kitti_crop(depth)) if self.kitti else (image, depth)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        epoch, index = key
        image, depth = self.load(index)
        if self.training:
            rng = np.random.default_rng([self.seed, epoch, index])
            image, depth = augment.depth_augmentation(image, depth, self.crop, rng)
        return to_sample(image, depth / self.units, self.name(index))

    def check(self) -> str:
        """Open some pairs, evenly spread; InputError on the first bad one.  Returns a summary."""
        step = max(1, len(self) // CHECKED_FILES)
        valid, nearest, farthest = 0.0, np.inf, 0.0
        for index in range(0, len(self), step):
            depth = self.load(index)[1] / self.units
            known = depth[depth > 0]
            valid += known.size / depth.size
            if known.size:
                nearest, farthest = min(nearest, known.min()), max(farthest, known.max())
        checked = len(range(0, len(self), step))
        if farthest == 0:
            raise InputError(f"no depth in the {checked} maps checked, such as {self.pairs[0][1]}: "
                             "0 means unknown")
        return (f"{len(self)} images; {checked} checked: depth {nearest:.2f} to {farthest:.2f} m, "
                f"known at {100 * valid / checked:.0f} % of the pixels")


def open_dataset(spec: dict, split: str) -> DepthFiles:
    """The depth set that `spec`, a recipe as a dict, names, for "train" or "val".

    Raises InputError if files or lists aren't there, or a drive or scene is in both lists.
    """
    name, root = spec["dataset"], find_root(spec["data"], spec["dataset"])
    if name == "folder":
        pairs, units = list_pairs(root / "images" / split, root / "depths" / split), \
            spec["depth_scale"]
    else:
        roots = {"train": root, "val": root}
        if name == "nyu":
            roots = {"train": root / "sync", "val": root / "official_splits" / "test"}
        pairs = read_list(spec[f"{split}_list"], roots[split], f"--{split}-list")
        other = "val" if split == "train" else "train"
        if spec[f"{other}_list"]:
            check_leakage(pairs, read_list(spec[f"{other}_list"], roots[other], f"--{other}-list"))
        units = 1000.0 if name == "nyu" else 256.0
    missing = [path for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} of {2 * len(pairs)} files "
                         "of the list are missing)")
    return DepthFiles(pairs, training=split == "train", crop=(spec["crop"], spec["crop"]),
                      units=units, kitti=name == "kitti", seed=spec["seed"])
