"""The embedded data set: rendered scenes (shapes.py) as samples of each task; no files.

Training: new scenes without end, or --train-scenes of them, again in every epoch.  Validation: the
same scenes in every run, out of training's reach.
"""
import functools
from dataclasses import dataclass

import numpy as np
from huggingface_hub.utils import tqdm
from torch.utils.data import Dataset

from sets import shapes
from sets.captions import captions, without_sides
from sets.coco import CATEGORY, GROUND_TRUTH, PERSON, People, annotated_people, make_sample
from sets.expressions import expressions
from sets.files import Classes, Cut, plain_classes, to_sample
from sets.refcoco import make_refer_sample

VAL_SEED = 1 << 40  # first scene seed of the validation set
COLOURS = ((128, 178, 255), (150, 140, 120), (230, 60, 60), (250, 200, 40), (60, 160, 70),
           (150, 80, 200), (255, 140, 200))  # of the classes, for pictures
# Degrees. Depth scenes have one camera, like NYU's and KITTI's: with a random field of view,
# absolute scale is ambiguous, and an answer that is right but for that factor has a delta1 of 0.79.
DEPTH_LENS = 57.0
EPOCH = 20_000  # scenes per epoch, where they have no end
VISIBLE_JOINTS = 6  # of a person that is worth training on
SCENE_SIDE = 256  # pixels of a scene from which people are cropped
SCENE_TRIES = 16  # scenes looked at for such a person; nearly all have one


@dataclass(frozen=True)
class Scenes:
    """Scenes with the class of every pixel."""

    train_scenes: int = 0  # with labels, the same in every epoch; 0: new ones without end
    val_scenes: int = 300  # to validate on

    def classes(self, names: tuple[str, ...] = ()) -> Classes:
        """The seven."""
        return plain_classes(shapes.CLASSES, COLOURS)

    def length(self, cut: Cut) -> int:
        """Scenes of a split."""
        return (self.train_scenes or EPOCH) if cut.training else self.val_scenes

    def open(self, cut: Cut) -> "Shapes":
        """The split."""
        return Shapes(self.length(cut), "seg", cut, self.train_scenes > 0)


@dataclass(frozen=True)
class DepthScenes(Scenes):
    """Scenes with the depth of every pixel, all through one lens."""

    def open(self, cut: Cut) -> "Shapes":
        """The split."""
        return Shapes(self.length(cut), "depth", cut, self.train_scenes > 0)


@dataclass(frozen=True)
class ReferScenes(Scenes):
    """Scenes with a sentence that means one object, and that object's pixels."""

    def open(self, cut: Cut) -> "ShapesRefer":
        """The split."""
        return ShapesRefer(self.length(cut), cut, self.train_scenes > 0)


@dataclass(frozen=True)
class PoseScenes(Scenes):
    """The people of the scenes."""

    augment: bool = False  # mmpose's augmentation; scenes without end can do without

    def open(self, cut: Cut) -> "ShapesPose":
        """The split."""
        return ShapesPose(self.length(cut), cut, self.augment, self.train_scenes > 0)


def scene_seed(key: tuple[int, int], length: int, cut: Cut) -> int:
    """Seed of the scene of key = (epoch, index); `length` scenes per epoch."""
    epoch, index = key
    if not cut.training:
        return VAL_SEED + index
    return cut.seed * VAL_SEED * 2 + epoch * length + index


class Rendered(Dataset):
    """Scenes as high and wide as the crop; `again`: every epoch has those of the first one."""

    def __init__(self, length: int, cut: Cut, again: bool = False):
        self.length, self.cut, self.again = length, cut, again

    def __len__(self) -> int:
        return self.length

    def seed(self, key: tuple[int, int]) -> int:
        """Seed of the scene of key = (epoch, index)."""
        return scene_seed((0, key[1]) if self.again else key, self.length, self.cut)

    def names(self) -> list[str]:
        """Of all scenes of the first epoch."""
        return [f"scene {self.seed((0, index))}" for index in range(self.length)]

    def check(self) -> str:
        """Summary line, like SegFiles.check."""
        return (f"{self.length} scenes of {self.cut.crop[1]}x{self.cut.crop[0]} pixels, rendered "
                f"on the fly{self.endless()}")

    def endless(self) -> str:
        """End of a summary line: whether an epoch's scenes come back."""
        return ", new ones in every epoch" if self.cut.training and not self.again else ""


class Shapes(Rendered):
    """Labels for seg, metres for depth; a caption where the cut asks for one."""

    def __init__(self, length: int, task: str, cut: Cut, again: bool = False):
        super().__init__(length, cut, again)
        self.task, self.scale = task, cut.scale
        self.classes = plain_classes(shapes.CLASSES, COLOURS)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        seed = self.seed(key)
        scene, world = shapes.render_world(seed, *self.cut.crop,
                                           DEPTH_LENS if self.task == "depth" else None)
        target = scene.label if self.task == "seg" else scene.depth  # metres; the sky has none: 0
        sample = to_sample(scene.image, target, f"scene {seed}")
        if self.cut.captions:                            # mirror images are read with it, too
            sample["caption"] = without_sides(captions(scene, world, seed)[0])
        return sample


class ShapesRefer(Rendered):
    """One sentence about each scene, and the pixels of what it means."""

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        first = self.seed(key)
        for attempt in range(SCENE_TRIES):               # whose seeds lie between those of epochs
            seed = first + attempt * (VAL_SEED // SCENE_TRIES)
            scene, world = shapes.render_world(seed, *self.cut.crop)
            for sentence, mask in expressions(scene, world, seed):
                return make_refer_sample(scene.image, sentence, mask, f"scene {first}", key[1],
                                         self.cut.crop)
        raise RuntimeError(f"nothing can be said about {SCENE_TRIES} scenes")


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


class ShapesPose(Rendered):
    """People of scenes of SCENE_SIDE x SCENE_SIDE pixels.

    Training: `length` samples per epoch, one person of a new scene each.  Validation: every person
    of `length` scenes, rendered when first asked for.
    """

    boxes = GROUND_TRUTH

    def __init__(self, length: int, cut: Cut, augmented: bool, again: bool = False):
        super().__init__(length, cut, again)
        self.augmented = augmented

    def __len__(self) -> int:
        return self.length if self.cut.training else len(self.rendered[2])

    @functools.cached_property
    def rendered(self) -> tuple[list[np.ndarray], dict, People]:
        """(images, annotations, people) of the validation scenes."""
        seeds = [scene_seed((0, index), self.length, self.cut) for index in range(self.length)]
        scenes = [shapes.render(seed, SCENE_SIDE, SCENE_SIDE)
                  for seed in tqdm(seeds, desc="render", unit="scene", leave=False, delay=2)]
        coco = scenes_as_coco(scenes, [f"scene {seed}" for seed in seeds])
        return [scene.image for scene in scenes], coco, annotated_people(coco, "the scenes")

    @property
    def annotations(self) -> dict:
        """The validation scenes' people in COCO's format, to score against."""
        return self.rendered[1]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index)."""
        if not self.cut.training:
            images, _, people = self.rendered
            return make_sample(people, key[1], images[people.image[key[1]]], self.cut.crop)
        rng = np.random.default_rng([self.cut.seed, *key])
        image, people = self.find_people((0, key[1]) if self.again else key)
        person = int(rng.integers(len(people)))
        return make_sample(people, person, image, self.cut.crop, rng if self.augmented else None)

    def find_people(self, key: tuple[int, int]) -> tuple[np.ndarray, People]:
        """Image and well visible people of the first scene of `key` that has any."""
        for attempt in range(SCENE_TRIES):               # whose seeds lie between those of epochs
            seed = scene_seed(key, self.length, self.cut) + attempt * (VAL_SEED // SCENE_TRIES)
            scene = shapes.render(seed, SCENE_SIDE, SCENE_SIDE)
            coco = scenes_as_coco([scene], [f"scene {seed}"])
            coco["annotations"] = [person for person in coco["annotations"]
                                   if person["keypoints"][2::3].count(2) >= VISIBLE_JOINTS]
            people = annotated_people(coco, f"scene {seed}")
            if len(people):
                return scene.image, people
        raise RuntimeError(f"no person in {SCENE_TRIES} scenes of {SCENE_SIDE} pixels")

    def check(self) -> str:
        """Summary line, like CocoPose.check."""
        if self.cut.training:
            return (f"{self.length} scenes of {SCENE_SIDE}x{SCENE_SIDE} pixels, rendered on the fly"
                    f"{self.endless()}")
        return f"{len(self)} people in {self.length} scenes of {SCENE_SIDE}x{SCENE_SIDE} pixels"
