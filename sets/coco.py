"""Pose data sets: COCO keypoints as released, your own in COCO's format, and the embedded scenes.

    coco     DATA/annotations/person_keypoints_{train,val}2017.json, DATA/[images/]{train,val}2017/*
    folder   DATA/annotations/{train,val}.json, DATA/images/{train,val}/*
    shapes   scenes rendered on the fly (shapes.py); no files, no download

`train_json`, `val_json` and `images` (one folder for both splits) replace a layout's paths. `boxes`
names a file of detected boxes, a list of {image_id, category_id, bbox, score}: validation then uses
those people instead of the annotated ones.

A sample is one person: "image" (3, H, W) float32 RGB in [0, 1], the crop; "target" (17, 3) float32,
x and y in pixels of the crop and 1 if labelled else 0; "name". In evaluation also "center" and
"scale" (2,) float64, the box that was cropped, in pixels of the image; "score" of the box;
"image_id"; "id", the sample's number.
"""
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch.utils.data import Dataset

from ops import augment
from ops import udp as pose
from sets import shapes
from data import CHECKED_FILES, VAL_SEED, find_root, load_image, to_sample
from ops.errors import InputError
from ops.oks import numbers
from weights.files import read_json

PERSON = 1                       # COCO's category; others are left out
GROUND_TRUTH = "ground-truth boxes"
VISIBLE_JOINTS = 6               # of a person of an embedded scene that is worth training on
SCENE_SIDE = 256                 # pixels of an embedded scene, from which people are cropped
SCENE_TRIES = 16                 # scenes looked at for such a person; nearly all have one
CATEGORY = {"id": PERSON, "name": "person", "keypoints": list(pose.KEYPOINTS),
            "skeleton": [[a + 1, b + 1] for a, b in pose.SKELETON]}


@dataclass(frozen=True)
class People:
    """The samples of a split as columns, N people on some of M images; sections 1.2 and 1.3.

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

def read_images(path: Path, entries: list) -> list[dict]:
    """The images of a COCO file, only the keys in use; InputError naming a bad one."""
    images, seen = [], set()
    for position, entry in enumerate(entries):
        kinds = {"id": int, "width": int, "height": int, "file_name": str}
        wrong = [key for key, kind in kinds.items()
                 if not isinstance(entry, dict) or not isinstance(entry.get(key), kind)]
        if wrong:
            raise InputError(f"{path}, image number {position}: {wrong[0]} must be there, "
                             f"{'a text' if wrong[0] == 'file_name' else 'an integer'}")
        if min(entry["width"], entry["height"]) < 2:
            raise InputError(f"{path}, image {entry['id']} is {entry['width']}x{entry['height']}: "
                             "both sides must be 2 pixels or more")
        if entry["id"] in seen:
            raise InputError(f"{path}, image {entry['id']} is there twice: ids must differ")
        seen.add(entry["id"])
        images.append({key: entry[key] for key in kinds})
    return images


def read_person(path: Path, position: int, entry, images: set) -> dict | None:
    """One annotation with every key that scoring needs; None for other categories, or InputError.

    A missing box or missing keypoints become zeros: such a person is no sample and scores nothing.
    """
    where = f"{path}, annotation number {position}"
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
        raise InputError(f"{where}: an annotation is an object with an integer id")
    where = f"{path}, annotation {entry['id']}"
    image = entry.get("image_id")
    if not isinstance(image, int) or image not in images:
        raise InputError(f"{where}: image_id {image} is not among the file's images")
    if entry.get("category_id") != PERSON:
        return None
    entry = {"bbox": [0] * 4, "keypoints": [0] * 51, "iscrowd": 0, **entry}
    joints = numbers(entry, "keypoints", 51, where)
    if "num_keypoints" not in entry:
        entry["num_keypoints"] = sum(max(xy) != 0 for xy in zip(joints[0::3], joints[1::3]))
    return {"id": entry["id"], "image_id": image, "category_id": PERSON, "keypoints": joints,
            "bbox": numbers(entry, "bbox", 4, where),
            **{key: numbers(entry, key, 0, where) for key in ("area", "iscrowd", "num_keypoints")}}


def read_coco(path: Path) -> dict:
    """A COCO keypoint file reduced to people and to the keys in use; InputError if it is none."""
    content = read_json(path)
    parts = [content.get(key) if isinstance(content, dict) else None
             for key in ("images", "annotations")]
    if not all(isinstance(part, list) for part in parts):
        raise InputError(f"{path} is no COCO keypoint file: it must be an object with the lists "
                         "'images' and 'annotations'")
    images = read_images(path, parts[0])
    known = {image["id"] for image in images}
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

    Raises InputError naming `path` for a box outside its image. Source: mmpose 1.x (section 1.2).
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
            box = pose.clip_box(person["bbox"], (image["height"], image["width"]))
            if (box[2:] > box[:2]).all():
                found.append((index, box, joints, 1.0))
    return columns(coco["images"], found)


def detected_people(path: Path, coco: dict, source: Path) -> People:
    """The people of a detections file, in its order, as they are: no threshold, no clipping.

    coco: `read_coco` of the file `source`, which must know their images. Raises InputError naming a
    bad entry. Source: mmpose 1.x (section 1.3).
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} is no detections file: it must be a list of "
                         "{image_id, category_id, bbox, score}")
    index_of = {image["id"]: index for index, image in enumerate(coco["images"])}
    found = []
    for position, entry in enumerate(entries):
        where = f"{path}, entry number {position}"
        image = entry.get("image_id")
        if not isinstance(image, int) or image not in index_of:
            raise InputError(f"{where}: image_id {image} is not in {source}: the detections must "
                             "be of its images")
        if entry.get("category_id") != PERSON:
            continue
        x, y, w, h = numbers(entry, "bbox", 4, where)
        if w <= 0 or h <= 0:
            raise InputError(f"{where}: its box is {w:g} wide and {h:g} high: bbox is (left, top, "
                             "width, height)")
        found.append((index_of[image], (x, y, x + w, y + h), [0] * 51,
                      numbers(entry, "score", 0, where)))
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
    center, scale = pose.center_scale(people.boxes[index])
    if rng is not None:
        if rng.random() < 0.5:
            image, keypoints = augment.flip(image), pose.flip_keypoints(keypoints, image.shape[1])
            center = np.array([image.shape[1] - 1 - center[0], center[1]])
        center, scale = pose.half_body(keypoints, center, scale, rng)
        center, scale, rotation = pose.random_box(center, scale, rng)
    scale = pose.fix_aspect(scale, crop)
    matrix = pose.udp_matrix(center, scale, crop, rotation)
    target = np.column_stack([pose.transform(keypoints[:, :2], matrix), keypoints[:, 2]])
    source = people.images[people.image[index]]
    sample = to_sample(pose.warp(image, matrix, crop), target, source["file_name"])
    if rng is None:
        sample |= {"center": torch.from_numpy(center), "scale": torch.from_numpy(scale),
                   "score": float(people.scores[index]), "image_id": source["id"], "id": index}
    return sample


class CocoPose(Dataset):
    """People on image files in `folder`.  Training: the augmentation of mmpose 1.x, if `augmented`.

    crop = (height, width). coco: `read_coco` of the split, kept in evaluation as `annotations` to
    score against. boxes: where the boxes of `people` come from, for messages.
    """

    def __init__(self, people: People, folder: Path, coco: dict, *, training: bool,
                 crop: tuple[int, int], boxes: str = GROUND_TRUTH, augmented: bool = True,
                 seed: int = 0):
        self.people, self.folder, self.augmented = people, folder, training and augmented
        self.crop, self.boxes, self.seed = crop, boxes, seed
        self.annotations = None if training else coco

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
        rng = np.random.default_rng([self.seed, epoch, index]) if self.augmented else None
        sample = make_sample(self.people, index, self.load(index), self.crop, rng)
        sample["name"] = self.name(index)
        return sample

    def check(self) -> str:
        """Open some images, evenly spread; InputError on the first bad one.  Returns a summary."""
        on_image = np.unique(self.people.image, return_index=True)[1]    # a person of each image
        chosen = on_image[::max(1, len(on_image) // CHECKED_FILES)]
        for index in chosen:
            self.load(index)
        heights = self.people.boxes[:, 3] - self.people.boxes[:, 1]
        labelled = self.people.keypoints[:, :, 2].sum() / len(self)
        joints = f", {labelled:.1f} joints labelled" if labelled else ""
        return (f"{len(self)} people on {len(on_image)} images, {self.boxes}: "
                f"{heights.min():.0f} to {heights.max():.0f} pixels high{joints}; "
                f"{len(chosen)} images opened")


# ------------------------------------------------------------------------------------------------
# Embedded scenes

def scenes_as_coco(scenes: list[shapes.Scene], names: list[str]) -> dict:
    """What `read_coco` would give for these scenes; ids count from 1."""
    images, annotations = [], []
    for number, (scene, name) in enumerate(zip(scenes, names), 1):
        height, width = scene.label.shape
        images.append({"id": number, "width": width, "height": height, "file_name": name})
        for keypoints, box, area in zip(scene.keypoints, scene.boxes, scene.areas):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": PERSON,
                "bbox": box.tolist(), "area": float(area), "iscrowd": 0,
                "keypoints": keypoints.ravel().tolist(),
                "num_keypoints": int((keypoints[:, 2] > 0).sum())})
    return {"images": images, "annotations": annotations, "categories": [CATEGORY]}


class ShapesPose(Dataset):
    """People in embedded scenes, `size` x `size` pixels each; crop = (height, width).

    Training: `length` samples per epoch, one person of a new scene each, augmented as CocoPose's if
    `augmented`: new scenes in every epoch can do without. Evaluation: every person
    of `length` scenes, the same in every run, rendered when first asked for.
    """

    boxes = GROUND_TRUTH

    def __init__(self, length: int, *, training: bool, crop: tuple[int, int], size: int,
                 augmented: bool = True, seed: int = 0):
        self.length, self.training, self.crop = length, training, crop
        self.size, self.augmented, self.seed = size, augmented, seed

    def __len__(self) -> int:
        return self.length if self.training else len(self.rendered[2])

    def scene_seed(self, key: tuple[int, int], attempt: int = 0) -> int:
        """Seed of the scene of (epoch, index), as in data.Shapes; further attempts lie between."""
        epoch, index = key
        if not self.training:
            return VAL_SEED + index
        between = attempt * (VAL_SEED // SCENE_TRIES)
        return self.seed * VAL_SEED * 2 + between + epoch * self.length + index

    def render(self, seed: int) -> shapes.Scene:
        """Scene number `seed` at this set's size."""
        return shapes.render(seed, self.size, self.size)

    @functools.cached_property
    def rendered(self) -> tuple[list[np.ndarray], dict, People]:
        """(images, annotations, people) of the validation scenes."""
        seeds = [self.scene_seed((0, index)) for index in range(self.length)]
        scenes = [self.render(seed) for seed in tqdm(seeds, desc="render", unit="scene",
                                                     leave=False, delay=2)]
        coco = scenes_as_coco(scenes, [f"scene {seed}" for seed in seeds])
        return [scene.image for scene in scenes], coco, annotated_people(coco, "the scenes")

    @property
    def annotations(self) -> dict:
        """The validation scenes' people in COCO's format, to score against."""
        return self.rendered[1]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        if not self.training:
            images, _, people = self.rendered
            return make_sample(people, key[1], images[people.image[key[1]]], self.crop)
        rng = np.random.default_rng([self.seed, *key])
        image, people = self.find_people(key)
        person = int(rng.integers(len(people)))
        return make_sample(people, person, image, self.crop, rng if self.augmented else None)

    def find_people(self, key: tuple[int, int]) -> tuple[np.ndarray, People]:
        """Image and well visible people of the first scene of `key` that has any."""
        for attempt in range(SCENE_TRIES):
            seed = self.scene_seed(key, attempt)
            scene = self.render(seed)
            coco = scenes_as_coco([scene], [f"scene {seed}"])
            coco["annotations"] = [person for person in coco["annotations"]
                                   if person["keypoints"][2::3].count(2) >= VISIBLE_JOINTS]
            people = annotated_people(coco, f"scene {seed}")
            if len(people):
                return scene.image, people
        raise RuntimeError(f"no person in {SCENE_TRIES} scenes of {self.size} pixels")

    def check(self) -> str:
        """Summary line, like CocoPose.check."""
        if self.training:
            return f"{self.length} scenes of {self.size}x{self.size} pixels, rendered on the fly"
        return f"{len(self)} people in {self.length} scenes of {self.size}x{self.size} pixels"


# ------------------------------------------------------------------------------------------------
# Opening

def locate(spec: dict, split: str) -> tuple[Path, Path]:
    """(annotation file, folder of the images) of a split; InputError if the folder isn't there."""
    file, folder = spec.get(f"{split}_json"), spec.get("images")
    if not (file and folder):
        root = find_root(spec["data"], spec["dataset"])
        name = f"person_keypoints_{split}2017" if spec["dataset"] == "coco" else split
        file = file or root / "annotations" / f"{name}.json"
        places = [root / "images" / split]
        if spec["dataset"] == "coco":
            places = [root / f"{split}2017", root / "images" / f"{split}2017"]
        folder = folder or next((place for place in places if place.is_dir()), places[0])
    if not Path(folder).is_dir():
        raise InputError(f"the folder {folder} does not exist: see the layouts in pose_data.py")
    return Path(file), Path(folder)


def open_dataset(spec: dict, split: str) -> CocoPose:
    """The set of people that `spec`, a recipe as a dict, names, for "train" or "val".

    Keys: dataset ("coco" or "folder"), data, crop (height), crop_width, seed; optional: boxes (val
    only), train_json, val_json, images, augment (False: training crops as in evaluation). Raises
    InputError if a file isn't there or holds what can't be used.
    """
    file, folder = locate(spec, split)
    coco = read_coco(file)
    people, boxes, origin = annotated_people(coco, file), GROUND_TRUTH, file
    if split == "val" and spec.get("boxes"):
        origin = Path(spec["boxes"])
        people, boxes = detected_people(origin, coco, file), origin.name
    if not len(people):
        raise InputError(f"{origin} holds no usable person: needed are a box on the image and, "
                         f"unless detected, a labelled joint (category_id {PERSON}, no crowd)")
    files = [folder / people.images[index]["file_name"] for index in np.unique(people.image)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} of {len(files)} images of "
                         f"{file} are missing)")
    return CocoPose(people, folder, coco, training=split == "train",
                    crop=(spec["crop"], spec["crop_width"]), boxes=boxes,
                    augmented=spec.get("augment", True), seed=spec["seed"])
