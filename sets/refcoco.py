"""Sentences and the objects that they mean: RefCOCO, RefCOCO+ and RefCOCOg as released, your own.

    refcoco, refcoco+, refcocog   DATA/NAME/refs(SPLITTER).p, DATA/NAME/instances.json, and COCO's
                                  DATA/images/mscoco/images/train2014/*.jpg
    folder                        DATA/expressions.json, DATA/images/*, DATA/masks/*.png

A sample is one sentence about one image: "image" (3, H, W) float32 RGB in [0, 1]; "sentence";
"target" (H, W) int64, 1 where the object is, else 0; "name" of the image; "id", the sample's
number.  Image and target are resized to the crop, whatever their aspect: bilinear and nearest, by
Pillow's rules.  Training: an object per sample, one of its sentences drawn anew in every epoch.
Evaluation: every sentence of every object.

Released rules that surprise (VPD: refer/dataset, REFER's refer.py): pixels inside two polygons of
one object are background; what is compared in evaluation has the crop's size, not the image's.
"""
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ops.errors import InputError, read_json
from ops.polygons import coverage
from sets.coco import check_keys, read_images, read_lists
from sets.files import (LONGEST, Cut, check_some, find_root, load_image, load_label, load_pair,
                        to_sample)

MAX_WORDS = 75  # of a sentence of one's own: CLIP reads 77 tokens, its start and end among them
PUBLISHED = {  # (set, who split it): objects and sentences of each split
    ("refcoco", "unc"): {"train": (42404, 120624), "val": (3811, 10834), "testA": (1975, 5657),
                         "testB": (1810, 5095)},
    ("refcoco+", "unc"): {"train": (42278, 120191), "val": (3805, 10758), "testA": (1975, 5726),
                          "testB": (1798, 4889)},
    ("refcocog", "umd"): {"train": (42226, 80512), "val": (2573, 4896), "test": (5023, 9602)},
    ("refcocog", "google"): {"train": (44822, 85474), "val": (5000, 9536)}}


@dataclass(frozen=True)
class Ref:
    """An object on an image, and the sentences that mean it."""

    image: Path
    sentences: tuple[str, ...]
    mask: Path | None = None  # of a folder: PNG, 0 = background
    polygons: tuple[np.ndarray, ...] = ()  # else: x1 y1 x2 y2 ... in pixels
    size: tuple[int, int] = (0, 0)  # (height, width) of the image that the polygons are meant for


@dataclass(frozen=True)
class ReferFolder:
    """Your own images, masks and sentences."""

    data: str | None = None  # folder of expressions.json, images/ and masks/
    val_split: str = "val"  # the split to validate on
    own_size: bool = False  # compare at the images' own size; no: at the crop's, as released

    def open(self, cut: Cut) -> "ReferFiles":
        """The split; InputError if a file is missing or a sentence can't be used."""
        split = "train" if cut.training else self.val_split
        refs = read_expressions(find_root(self.data), split)
        return ReferFiles(refs, cut, f"split {split}", own_size=self.own_size)


@dataclass(frozen=True)
class RefCoco:
    """RefCOCO: 142,210 sentences about 50,000 objects."""

    data: str | None = None  # folder of refcoco/, refcoco+/, refcocog/ and images/
    images: str | None = None  # folder of COCO's train2014 images, instead of the layout's
    val_split: str = "val"  # the split to validate on: val, testA (people), testB (other objects)
    union: bool = False  # pixels in two polygons belong to the object; no: background, as released
    own_size: bool = False  # compare at the images' own size; no: at the crop's, as released

    def source(self) -> tuple[str, str]:
        """Name of the set, and who split it."""
        return "refcoco", "unc"

    def open(self, cut: Cut) -> "ReferFiles":
        """The split; InputError if it is unknown, or a file missing or not as released."""
        name, splitter = self.source()
        split = "train" if cut.training else self.val_split
        if (name, splitter) not in PUBLISHED:
            raise InputError(f"--split-by {splitter}: {name} was split by umd and by google")
        splits = PUBLISHED[name, splitter]
        if split not in splits:
            raise InputError(f"--val-split {split}: {name} ({splitter}) has {', '.join(splits)}")
        root = find_root(self.data)
        refs = read_refs(root / name / f"refs({splitter}).p", root / name / "instances.json",
                         Path(self.images) if self.images else image_folder(root), split)
        published = "%d objects and %d sentences" % splits[split]
        return ReferFiles(refs, cut, f"{name} ({splitter}), split {split}; published: {published}",
                          self.union, self.own_size)


@dataclass(frozen=True)
class RefCocoPlus(RefCoco):
    """RefCOCO+: 141,564 sentences without words of place about 49,856 objects."""

    def source(self) -> tuple[str, str]:
        """Name of the set, and who split it."""
        return "refcoco+", "unc"


@dataclass(frozen=True)
class RefCocoG(RefCoco):
    """RefCOCOg: 95,010 longer sentences about 49,822 objects."""

    val_split: str = "val"  # the split to validate on: val, or test (umd)
    split_by: str = "umd"  # whose splits: umd or google

    def source(self) -> tuple[str, str]:
        """Name of the set, and who split it."""
        return "refcocog", self.split_by


# ------------------------------------------------------------------------------------------------
# RefCOCO's files

def image_folder(root: Path) -> Path:
    """The first place below --data that holds COCO's images."""
    places = [root / "images" / "mscoco" / "images" / "train2014", root / "images" / "train2014",
              root / "train2014"]
    return next((place for place in places if place.is_dir()), places[0])


def unpickle(path: Path):
    """What a pickle of lists, dicts, texts and numbers holds; InputError for anything else in it.

    A pickle names the classes and functions that loading it calls.  None is let in.
    """
    class Plain(pickle.Unpickler):
        """Knows no class."""

        def find_class(self, module: str, name: str):
            """What the pickle asks for by name: refused."""
            raise InputError(f"{path} holds {module}.{name}, which could run code: it is not "
                             "loaded; get the file again from REFER")

    if not path.is_file():
        raise InputError(f"{path} does not exist: see the layouts in docs/DATASETS.md")
    try:
        with open(path, "rb") as file:
            return Plain(file, encoding="utf-8").load()
    except InputError:
        raise
    except Exception as error:                           # a broken pickle raises whatever happens
        raise InputError(f"{path} is not a complete pickle ({type(error).__name__}: "
                         f"{str(error)[:200]}): get it again") from None


def in_split(ref: dict, split: str) -> bool:
    """Whether a ref counts for a split.  testA and testB need only that letter in the ref's own
    split, test that word (REFER: getRefIds).
    """
    if split in ("testA", "testB"):
        return split[-1] in ref["split"]
    return "test" in ref["split"] if split == "test" else ref["split"] == split


def read_refs(path: Path, instances: Path, folder: Path, split: str) -> list[Ref]:
    """The objects of a split; InputError naming the first entry that is not as released."""
    kinds = {"ann_id": int, "image_id": int, "split": str, "sentences": list}
    entries = unpickle(path)
    if not isinstance(entries, list):
        raise InputError(f"{path} holds no list of refs")
    for position, ref in enumerate(entries):
        wrong = [key for key, kind in kinds.items()
                 if not isinstance(ref, dict) or type(ref.get(key)) is not kind]
        if wrong or not ref["sentences"] or not all(
                isinstance(s, dict) and isinstance(s.get("sent"), str) for s in ref["sentences"]):
            raise InputError(f"{path}, ref number {position}: {wrong[0] if wrong else 'sentences'} "
                             "is not as released (ann_id, image_id, split, sentences with sent)")
    refs = [ref for ref in entries if in_split(ref, split)]
    if not refs:
        raise InputError(f"{path} has no ref of split {split}, but "
                         f"{', '.join(sorted({ref['split'] for ref in entries})) or 'none at all'}")
    images, objects = read_instances(instances, {ref["ann_id"] for ref in refs})
    found = []
    for ref in refs:
        if ref["ann_id"] not in objects or ref["image_id"] not in images:
            raise InputError(f"{instances} lacks annotation {ref['ann_id']} or image "
                             f"{ref['image_id']} of {path}")
        image = images[ref["image_id"]]
        found.append(Ref(folder / image["file_name"], tuple(s["sent"] for s in ref["sentences"]),
                         polygons=objects[ref["ann_id"]], size=(image["height"], image["width"])))
    return found


def read_instances(path: Path, wanted: set[int]) -> tuple[dict, dict]:
    """(images by id, polygons of the `wanted` annotations by id) of an instances.json."""
    parts, objects = read_lists(path), {}
    for position, entry in enumerate(parts[1]):
        check_keys(entry, {"id": int}, f"{path}, annotation number {position}")
        if entry["id"] in wanted:
            objects[entry["id"]] = read_polygons(entry.get("segmentation"),
                                                 f"{path}, annotation {entry['id']}")
    return {image["id"]: image for image in read_images(path, parts[0])}, objects


def read_polygons(value, where: str) -> tuple[np.ndarray, ...]:
    """The polygons of a segmentation; InputError that begins with `where` if it is none."""
    if not isinstance(value, list) or not value or not all(
            isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
            and all(type(v) in (int, float) and abs(v) <= LONGEST for v in p) for p in value):
        raise InputError(f"{where}: segmentation is {value!r:.60}, but should be polygons "
                         "[[x1, y1, x2, y2, x3, y3, ...], ...] in pixels")
    return tuple(np.array(polygon, np.float64) for polygon in value)


# ------------------------------------------------------------------------------------------------
# One's own file

def read_expressions(root: Path, split: str) -> list[Ref]:
    """The objects of a split of expressions.json, a list of {"split", "image", "mask",
    "sentences"}; InputError naming a bad entry.
    """
    path = root / "expressions.json"
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{path} must be a list of {{"split": "train", "image": "a.jpg", "mask": '
                         '"a_1.png", "sentences": ["the left dog"]}')
    refs = [read_expression(root, entry, f"{path}, entry number {position}")
            for position, entry in enumerate(entries) if entry.get("split") == split]
    if not refs:
        found = sorted({str(entry.get("split")) for entry in entries})
        raise InputError(f"{path} has no entry whose split is {split}, but "
                         f"{', '.join(found)[:80] or 'none at all'}")
    return refs


def read_expression(root: Path, entry: dict, where: str) -> Ref:
    """One entry; InputError that begins with `where`."""
    for key, folder in (("image", "images"), ("mask", "masks")):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise InputError(f"{where} has no {key}: the name of a file in {root / folder}")
        if not (root / folder / entry[key]).is_file():
            raise InputError(f"{where}: {root / folder / entry[key]} does not exist")
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise InputError(f"{where} has no sentences, a list of texts")
    for sentence in sentences:
        check_sentence(sentence, where)
    return Ref(root / "images" / entry["image"], tuple(sentences), root / "masks" / entry["mask"])


def check_sentence(sentence, where: str) -> None:
    """InputError that begins with `where` for a sentence that is none, or too long to be read."""
    if not isinstance(sentence, str) or not sentence.strip():
        raise InputError(f"{where}: a sentence is {sentence!r:.40}, but should be a text that says "
                         "which object is meant")
    if len(sentence.split()) > MAX_WORDS:
        raise InputError(f"{where}: a sentence has {len(sentence.split())} words, '{sentence:.40}"
                         f"...': at most {MAX_WORDS} can be read")


# ------------------------------------------------------------------------------------------------
# Samples

def make_refer_sample(image: np.ndarray, sentence: str, mask: np.ndarray, name: str, number: int,
                      crop: tuple[int, int], own_size: bool = False) -> dict:
    """An image (H, W, 3) uint8, the object's pixels (H, W) bool -> a sample of the crop's size.

    own_size: the target keeps the image's.
    """
    size = crop[::-1]
    if image.shape[:2] != tuple(crop):
        image = np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR))
    if mask.shape != tuple(crop) and not own_size:
        mask = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.NEAREST))
    return {**to_sample(image, mask.astype(np.uint8), name), "sentence": sentence, "id": number}


class ReferFiles(Dataset):
    """Objects on image files; `about` says which, for messages.

    `union`: pixels in several polygons belong to the object.  `own_size`: targets of the image's
    own size in evaluation.
    """

    def __init__(self, refs: list[Ref], cut: Cut, about: str, union: bool = False,
                 own_size: bool = False):
        self.refs, self.cut, self.about = refs, cut, about
        self.union, self.own_size = union, own_size and not cut.training
        self.last = np.cumsum([len(ref.sentences) for ref in refs])  # sentences up to each object

    def __len__(self) -> int:
        return len(self.refs) if self.cut.training else int(self.last[-1])

    def place(self, key: tuple[int, int]) -> tuple[Ref, str]:
        """The object and the sentence of key = (epoch, index)."""
        epoch, index = key
        if self.cut.training:
            rng = np.random.default_rng([self.cut.seed, epoch, index])
            ref = self.refs[index]
            return ref, ref.sentences[int(rng.integers(len(ref.sentences)))]
        number = int(np.searchsorted(self.last, index, side="right"))
        return self.refs[number], self.refs[number].sentences[index - int(self.last[number])]

    def names(self) -> list[str]:
        """Paths of the images, a sample each."""
        counts = [1 if self.cut.training else len(ref.sentences) for ref in self.refs]
        return [str(ref.image) for ref, count in zip(self.refs, counts) for _ in range(count)]

    def load(self, ref: Ref) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, the object's pixels (H, W) bool); InputError if they don't fit."""
        if ref.mask is not None:
            image, label = load_pair(ref.image, ref.mask, load_label)
            if not label.any():
                raise InputError(f"{ref.mask} marks no object: its pixels are all 0")
            return image, label > 0
        image, (height, width) = load_image(ref.image), ref.size
        if image.shape[:2] != ref.size:
            raise InputError(f"{ref.image} is {image.shape[1]}x{image.shape[0]}, in instances.json "
                             f"{width}x{height}: the object would be off")
        covered = coverage(ref.polygons, height, width)
        return image, covered > 0 if self.union else covered == 1

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        ref, sentence = self.place(key)
        image, mask = self.load(ref)
        return make_refer_sample(image, sentence, mask, str(ref.image), key[1], self.cut.crop,
                                 self.own_size)

    def check(self) -> str:
        """Open some images; InputError if they can't be used.  Returns a summary."""
        files = list(dict.fromkeys(ref.image for ref in self.refs))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{missing[0]} does not exist ({len(missing)} of {len(files)} images "
                             "are missing)")
        loaded = check_some(lambda i: self.load(self.refs[i])[1].mean(), len(self.refs))
        return (f"{len(self.refs)} objects and {self.last[-1]} sentences on {len(files)} images "
                f"({self.about}); {len(loaded)} opened: an object covers "
                f"{100 * np.mean(loaded):.0f} % of its image")
