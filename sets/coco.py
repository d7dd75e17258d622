"""People on files: COCO keypoints as released, and your own folder in COCO's format.

    coco     DATA/annotations/person_keypoints_{train,val}2017.json, DATA/[images/]{train,val}2017/*
    folder   DATA/annotations/{train,val}.json, DATA/images/{train,val}/*

A sample is one person: "image" (3, H, W) float32 RGB in [0, 1], the crop; "target" (17, 3) float32,
x and y in pixels of the crop and 1 if labelled else 0; "name". In evaluation also "center" and
"scale" (2,) float64, the box that was cropped, in pixels of the image; "score" of the box;
"image_id"; "id", the sample's number.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ops import augment, udp
from ops.errors import InputError, read_json
from sets.files import Cut, check_some, find_root, load_image, to_sample

PERSON = 1                       # COCO's category; others are left out
GROUND_TRUTH = "ground-truth boxes"
LIMIT = 1e9                      # pixels and scores beyond it are no measurements; NaN is not below
CATEGORY = {"id": PERSON, "name": "person", "keypoints": list(udp.KEYPOINTS),
            "skeleton": [[a + 1, b + 1] for a, b in udp.SKELETON]}


@dataclass(frozen=True)
class PoseFolder:
    """Your own images and annotations in COCO's format."""

    data: str | None = None  # folder of annotations/ and images/
    train_json: str | None = None  # annotations, instead of the layout's
    val_json: str | None = None  # the same
    images: str | None = None  # folder of both splits' images, instead of the layout's
    boxes: str | None = None  # file of detected boxes to validate on; none: the annotated people
    augment: bool = True  # mmpose's augmentation; no: crops as in evaluation, to overfit

    def layout(self, split: str) -> tuple[Path, Path]:
        """(annotation file, folder of the images) below --data."""
        root = find_root(self.data)
        return root / "annotations" / f"{split}.json", root / "images" / split

    def open(self, cut: Cut) -> "CocoPose":
        """The split's people; InputError if a file is missing or holds what can't be used."""
        file, folder = {"train": self.train_json, "val": self.val_json}[cut.split], self.images
        if not (file and folder):
            places = self.layout(cut.split)
            file, folder = file or places[0], folder or places[1]
        file, folder = Path(file), Path(folder)
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist: see the layouts in "
                             "docs/DATASETS.md")
        coco = read_coco(file)
        people, boxes, origin = annotated_people(coco, file), GROUND_TRUTH, file
        if self.boxes and not cut.training:
            origin = Path(self.boxes)
            people, boxes = detected_people(origin, coco, file), origin.name
        check_people(people, folder, file, origin)
        return CocoPose(people, folder, coco, cut, boxes, self.augment)


@dataclass(frozen=True)
class Coco(PoseFolder):
    """COCO 2017: 149,813 people to train on, 6,352 annotated ones to validate on."""

    data: str | None = None  # folder of annotations/ and {train,val}2017/

    def layout(self, split: str) -> tuple[Path, Path]:
        """(annotation file, folder of the images) below --data."""
        root = find_root(self.data)
        places = [root / f"{split}2017", root / "images" / f"{split}2017"]
        return (root / "annotations" / f"person_keypoints_{split}2017.json",
                next((place for place in places if place.is_dir()), places[0]))


def check_people(people: "People", folder: Path, file: Path, origin: Path) -> None:
    """InputError if there is nobody, or an image of the annotation `file` is missing."""
    if not len(people):
        raise InputError(f"{origin} holds no usable person: needed are a box on the image and, "
                         f"unless detected, a labelled joint (category_id {PERSON}, no crowd)")
    files = [folder / people.images[index]["file_name"] for index in np.unique(people.image)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} of {len(files)} images of "
                         f"{file} are missing)")


@dataclass(frozen=True)
class People:
    """The samples of a split as columns, N people on some of M images.

    images     M dicts: id, width, height, file_name.
    image      (N,) int64, index into `images`.
    boxes      (N, 4) float64, x1, y1, x2, y2 in pixels.
    keypoints  (N, 17, 3) float32, x, y in pixels and 1 if labelled else 0; all 0 if unknown.
    scores     (N,) float64, the detector's; 1 for annotated boxes.
    """

    images: list[dict]
    image: np.ndarray            # arrays: a worker that reads lists of objects copies their memory
    boxes: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.image)


# ------------------------------------------------------------------------------------------------
# COCO's files

def numbers(entry: dict, field: str, count: int, name: str) -> list:
    """entry[field], which must be a list of `count` finite numbers (count 0: one bare number).

    InputError begins with `name`, what the entry is called.
    """
    found = entry.get(field)
    values = found if count else [found]
    if not (isinstance(values, list) and len(values) == (count or 1)
            and all(type(v) in (int, float) and abs(v) < LIMIT for v in values)):
        kind = f"a list of {count} finite numbers" if count else "a finite number"
        size = f" ({len(found)} values)" if isinstance(found, list) else ""
        raise InputError(f"{name}: {field} is {found!r:.40}{size}, but should be {kind}")
    return found


def check_keys(entry, kinds: dict[str, type], where: str) -> None:
    """InputError, which begins with `where`, unless `entry` is an object that has all these keys,
    each of its type.
    """
    for key, kind in kinds.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind or kind is int and abs(value) >= 1 << 63:
            raise InputError(f"{where}: {key} must be there, "
                             f"{'a text' if kind is str else 'an integer of 64 bits'}")


def read_images(path: Path, entries: list) -> list[dict]:
    """The images of a COCO file, only the keys in use; InputError naming a bad one."""
    images, seen = [], set()
    kinds = {"id": int, "width": int, "height": int, "file_name": str}
    for position, entry in enumerate(entries):
        check_keys(entry, kinds, f"{path}, image number {position}")
        if min(entry["width"], entry["height"]) < 2:
            raise InputError(f"{path}, image {entry['id']} is {entry['width']}x{entry['height']}: "
                             "both sides must be 2 pixels or more")
        for key in ("id", "file_name"):
            if entry[key] in seen:
                raise InputError(f"{path}, image {entry[key]} is there twice: each {key} is an "
                                 "image's own")
            seen.add(entry[key])
        images.append({key: entry[key] for key in kinds})
    return images


def read_person(path: Path, position: int, entry, images: dict) -> dict | None:
    """One annotation with every key that scoring needs; None for other categories, or InputError.

    `images`: those of the file by their id.
    A missing box or missing keypoints become zeros: such a person is no sample and scores nothing.
    """
    kinds = {"id": int, "image_id": int, "category_id": int}
    check_keys(entry, kinds, f"{path}, annotation number {position}")
    where = f"{path}, annotation {entry['id']}"
    if entry["image_id"] not in images:
        raise InputError(f"{where}: image_id {entry['image_id']} is not among the file's images")
    if entry["category_id"] != PERSON:
        return None
    entry = {"bbox": [0] * 4, "keypoints": [0] * 51, "iscrowd": 0, **entry}
    joints = numbers(entry, "keypoints", 51, where)
    if "num_keypoints" not in entry:
        entry["num_keypoints"] = sum(max(xy) != 0 for xy in zip(joints[0::3], joints[1::3]))
    area, crowd, count = (numbers(entry, key, 0, where)
                          for key in ("area", "iscrowd", "num_keypoints"))
    if crowd not in (0, 1) or count not in range(18) \
            or count and not (area > 0 and any(joints[2::3])):
        raise InputError(f"{where}: iscrowd {crowd}, area {area}, num_keypoints {count}: iscrowd "
                         "is 0 or 1, num_keypoints 0 to 17; a person with joints has an area above "
                         "0, and labels some (v, every third number of keypoints, is 1 or 2)")
    width, height = (images[entry["image_id"]][side] for side in ("width", "height"))
    for x, y, v in zip(joints[0::3], joints[1::3], joints[2::3]):
        near = -width <= x <= 2 * width and -height <= y <= 2 * height
        if v not in (0, 1, 2) or v and not near:
            raise InputError(f"{where}: a joint is {x, y, v}: v is 0, 1 or 2, and a labelled joint "
                             f"lies in or near its image, {width}x{height}")
    return {**{key: entry[key] for key in kinds}, "keypoints": joints, "area": area,
            "bbox": numbers(entry, "bbox", 4, where), "iscrowd": crowd, "num_keypoints": count}


def read_lists(path: Path) -> tuple[list, list]:
    """Images and annotations of a COCO file, unchecked; InputError if it is none."""
    content = read_json(path)
    parts = [content.get(key) if isinstance(content, dict) else None
             for key in ("images", "annotations")]
    if not all(isinstance(part, list) for part in parts):
        raise InputError(f"{path} is no COCO file: it must be an object with the lists 'images' "
                         "and 'annotations'")
    return tuple(parts)


def read_coco(path: Path) -> dict:
    """A COCO keypoint file reduced to people and to the keys in use; InputError if it is none."""
    parts = read_lists(path)
    images = read_images(path, parts[0])
    known = {image["id"]: image for image in images}
    people = [read_person(path, position, entry, known) for position, entry in enumerate(parts[1])]
    return {"images": images, "annotations": [p for p in people if p], "categories": [CATEGORY]}


def columns(images: list[dict], found: list[tuple]) -> People:
    """`found`, a tuple (index of the image, box, 51 numbers, score) per person, as `People`."""
    image, boxes, keypoints, scores = zip(*found) if found else ((), (), (), ())
    keypoints = np.array(keypoints, np.float32).reshape(-1, 17, 3)
    keypoints[:, :, 2] = keypoints[:, :, 2].clip(max=1)  # hidden and visible joints count alike
    return People(images, np.array(image, np.int64),
                  np.array(boxes, np.float64).reshape(-1, 4), keypoints,
                  np.array(scores, np.float64))


def annotated_people(coco: dict, path: Path | str) -> People:
    """The people of `read_coco` that are samples, image by image; no crowd, none without joints.

    Raises InputError naming `path` for a box outside its image. Source: mmpose 1.x `CocoDataset`.
    """
    of_image = {image["id"]: [] for image in coco["images"]}
    for person in coco["annotations"]:
        of_image[person["image_id"]].append(person)
    found = []
    for index, image in enumerate(coco["images"]):
        for person in of_image[image["id"]]:
            joints = person["keypoints"]
            placed = max(*joints[0::3], *joints[1::3]) > 0
            if person["iscrowd"] or not person["num_keypoints"] or not placed:
                continue
            x, y, w, h = person["bbox"]
            inside = -w <= x <= image["width"] and -h <= y <= image["height"]
            if w > 0 and h > 0 and not inside:
                raise InputError(f"{path}, annotation {person['id']}: its box {person['bbox']} "
                                 f"(left, top, width, height) is outside image {image['id']}, "
                                 f"{image['width']}x{image['height']}")
            box = udp.clip_box(person["bbox"], (image["height"], image["width"]))
            if (box[2:] > box[:2]).all():
                found.append((index, box, joints, 1.0))
    return columns(coco["images"], found)


def read_boxes(path: Path) -> list[dict]:
    """Boxes of people: dicts of "image", a file name (str) or an image id (int), "bbox" (left, top,
    width, height) in pixels and "score".

    The file is a list of {"image_id" or "file_name", "bbox", "score"?, "category_id"?}, as COCO's
    detections are, or {file name: [bbox, ...]}.  Entries of other categories than person are left
    out.  InputError naming a bad entry.
    """
    entries = read_json(path)
    if isinstance(entries, dict) and all(isinstance(v, list) for v in entries.values()):
        entries = [{"file_name": name, "bbox": box} for name, boxes in entries.items()
                   for box in boxes]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} is no file of boxes: it must be a list of {{image_id or "
                         "file_name, category_id, bbox, score}, or {file name: [bbox, ...]}")
    return [box for position, entry in enumerate(entries)
            if (box := read_box(entry, f"{path}, entry number {position}"))]


def read_box(entry: dict, where: str) -> dict | None:
    """One of `read_boxes`, None for another category than person; InputError begins with `where`.
    """
    name, number = entry.get("file_name"), entry.get("image_id")
    if not isinstance(name, str) and (type(number) is not int or abs(number) >= 1 << 63):
        raise InputError(f"{where}: file_name (a text) or image_id (an integer) must be there")
    check_keys({"category_id": PERSON, **entry}, {"category_id": int}, where)
    if entry.get("category_id", PERSON) != PERSON:
        return None
    box = numbers(entry, "bbox", 4, where)
    if min(box[2:]) <= 0:
        raise InputError(f"{where}: its box is {box[2]:g} wide and {box[3]:g} high: bbox is (left, "
                         "top, width, height)")
    return {"image": Path(name).as_posix() if isinstance(name, str) else number, "bbox": box,
            "score": numbers({"score": 1.0, **entry}, "score", 0, where), "where": where}


def detected_people(path: Path, coco: dict, source: Path) -> People:
    """The people of a detections file, in its order, as they are: no threshold, no clipping.

    coco: `read_coco` of the file `source`, which must know their images. Raises InputError naming a
    bad entry. Source: mmpose 1.x `CocoDataset`, with a bbox_file.
    """
    index_of = {image[key]: index for index, image in enumerate(coco["images"])
                for key in ("id", "file_name")}
    found = []
    for box in read_boxes(path):
        if box["image"] not in index_of:
            raise InputError(f"{box['where']}: image {box['image']} is not in {source}: the "
                             "detections must be of its images")
        x, y, w, h = box["bbox"]
        found.append((index_of[box["image"]], (x, y, x + w, y + h), [0] * 51, box["score"]))
    return columns(coco["images"], found)


# ------------------------------------------------------------------------------------------------
# Samples

def make_sample(people: People, index: int, image: np.ndarray, crop: tuple[int, int],
                rng: np.random.Generator | None = None) -> dict:
    """The crop of person `index` from its image (H, W, 3) uint8; `crop` = (height, width).

    rng: draws the training augmentation, in mmpose 1.x's order: flip, half body, random box; None
    in evaluation, whose sample says where the crop was. "name" is the image's file name.
    """
    keypoints, rotation = people.keypoints[index], 0.0
    center, scale = udp.center_scale(people.boxes[index])
    if rng is not None:
        if rng.random() < 0.5:
            image, keypoints = augment.flip(image), udp.flip_keypoints(keypoints, image.shape[1])
            center = np.array([image.shape[1] - 1 - center[0], center[1]])
        center, scale = udp.half_body(keypoints, center, scale, rng)
        center, scale, rotation = udp.random_box(center, scale, rng)
    scale = udp.fix_aspect(scale, crop)
    matrix = udp.udp_matrix(center, scale, crop, rotation)
    target = np.column_stack([udp.transform(keypoints[:, :2], matrix), keypoints[:, 2]])
    source = people.images[people.image[index]]
    sample = to_sample(udp.warp(image, matrix, crop), target, source["file_name"])
    if rng is None:
        sample |= {"center": torch.from_numpy(center), "scale": torch.from_numpy(scale),
                   "score": float(people.scores[index]), "image_id": source["id"], "id": index}
    return sample


class CocoPose(Dataset):
    """People on image files in `folder`.  Training: mmpose 1.x's augmentation, if `augmented`.

    coco: `read_coco` of the split, kept in evaluation as `annotations` to score against. boxes:
    where the boxes of `people` come from, for messages.
    """

    def __init__(self, people: People, folder: Path, coco: dict, cut: Cut,
                 boxes: str = GROUND_TRUTH, augmented: bool = True):
        self.people, self.folder, self.cut, self.boxes = people, folder, cut, boxes
        self.augmented = cut.training and augmented
        self.annotations = None if cut.training else coco

    def __len__(self) -> int:
        return len(self.people)

    def name(self, index: int) -> str:
        """Path of the image that shows person `index`."""
        return str(self.folder / self.people.images[self.people.image[index]]["file_name"])

    def load(self, index: int) -> np.ndarray:
        """The image of person `index`, (H, W, 3) uint8; InputError if its size isn't the file's."""
        image = load_image(Path(self.name(index)))
        said = self.people.images[self.people.image[index]]
        if image.shape[:2] != (said["height"], said["width"]):
            raise InputError(f"{self.name(index)} is {image.shape[1]}x{image.shape[0]}, in the "
                             f"annotations {said['width']}x{said['height']}: joints would be off")
        return image

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        epoch, index = key
        rng = np.random.default_rng([self.cut.seed, epoch, index]) if self.augmented else None
        sample = make_sample(self.people, index, self.load(index), self.cut.crop, rng)
        sample["name"] = self.name(index)
        return sample

    def check(self) -> str:
        """Open some images; InputError if they can't be used.  Returns a summary."""
        on_image = np.unique(self.people.image, return_index=True)[1]    # a person of each image
        opened = len(check_some(lambda i: self.load(on_image[i]).shape, len(on_image)))
        heights = self.people.boxes[:, 3] - self.people.boxes[:, 1]
        labelled = self.people.keypoints[:, :, 2].sum() / len(self)
        joints = f", {labelled:.1f} joints labelled" if labelled else ""
        return (f"{len(self)} people on {len(on_image)} images, {self.boxes}: "
                f"{heights.min():.0f} to {heights.max():.0f} pixels high{joints}; "
                f"{opened} images opened")
