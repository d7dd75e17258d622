"""Miniature data sets in the released layouts, and random cases for COCO's evaluation.

Each function writes below the folder it is given.
"""
import contextlib
import io
import json
import math
import pickle
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ops import oks
from sets.files import Cut


def cut(split="train", side=64, scale=None, seed=0):
    """A split with square training crops."""
    return Cut(split, (side, side), scale, seed)


def write(path, array, palette=None, **options):
    """An array as an image file, with folders; with `palette` as a palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette is not None:
        image.putpalette([c for colour in palette for c in colour])
    image.save(path, **options)
    return path


def random_image(height, width, seed=0):
    """(height, width, 3) uint8 of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(values, side=16):
    """(h, w) values -> label of square blocks."""
    return np.asarray(values, np.uint8).repeat(side, axis=0).repeat(side, axis=1)


# ------------------------------------------------------------------------------------------------
# Segmentation

def make_seg(root):
    """A set of one's own: 3 training pairs (one in a subfolder, one palette PNG), 1 to validate."""
    (root / "classes.txt").write_text("sky\nroad\nred car\n")
    for i, name in enumerate(("train/b", "train/a", "train/sub/c", "val/d")):
        label = np.full((64, 80), i % 3)
        label[0, 0], label[0, 1] = 255, 2
        palette = [(9, 9, 9), (200, 0, 0), (0, 0, 77)] + [(i, i, i) for i in range(3, 256)]
        write(root / f"labels/{name}.png", label, palette if i == 1 else None)
        write(root / f"images/{name}.{'jpg' if i else 'png'}", random_image(64, 80, i))
    return root


def make_ade(root):
    """ADE20K as released: 2 training pairs, 1 to validate; the folder that holds the archive's."""
    inner = root / "ADEChallengeData2016"
    for split, name, raw in (("training", "ADE_train_00000001", 1),
                             ("training", "ADE_train_00000002", 150),
                             ("validation", "ADE_val_00000001", 13)):
        label = np.full((24, 40), raw)
        label[0, :3] = 0, 255, 2
        write(inner / f"annotations/{split}/{name}.png", label)
        write(inner / f"images/{split}/{name}.jpg", random_image(24, 40))
    return root


H, W = 24, 48  # of street scenes
BICYCLE_ID, ROAD_ID, PLATE_ID, CAR_ID = 33, 7, 255, 26  # in labelIds files; 255: -1 in 8 bits
AACHEN, BREMEN, ULM = "aachen_000000_000019", "bremen_000004_000019", "ulm_000017_000019"
FRANKFURT, ERBACH = "frankfurt_000001_000538", "erbach_000000_000001"


def label_of(value, *corner):
    """A label of one value, its first row beginning with `corner`."""
    label = np.full((H, W), value)
    label[0, :len(corner)] = corner
    return label


def write_image(root, split, name):
    """An image of Cityscapes; city and name as in "aachen_000000_000019"."""
    write(root / f"leftImg8bit/{split}/{name.split('_')[0]}/{name}_leftImg8bit.png",
          random_image(H, W))


def write_label(root, folder, name, kind, label):
    """A label file below `folder`, such as gtFine/train, whose name ends in `kind`.png."""
    return write(root / folder / name.split("_")[0] / f"{name}_{kind}.png", label)


def make_city(root):
    """Cityscapes as released, labelIds only: 3 images of 3 cities to train on, 1 to validate."""
    for split, name, value in (("train", ULM, 26), ("train", AACHEN, 7), ("train", BREMEN, 33),
                               ("val", FRANKFURT, 11)):
        write_image(root, split, name)
        label = label_of(value, PLATE_ID, 0, 14, BICYCLE_ID)
        write_label(root, f"gtFine/{split}", name, "gtFine_labelIds", label)
        write_label(root, f"gtFine/{split}", name, "gtFine_instanceIds", label)
        write_label(root, f"gtFine/{split}", name, "gtFine_color", np.zeros((H, W, 3)))
    return root


def make_extra(root):
    """`make_city`, an extra image and its label in the authors' layout."""
    write_image(make_city(root), "train_extra", ERBACH)
    write_label(root, "convert_autolabelled", ERBACH, "gtFine_labelTrainIds", label_of(16, 255))
    return root


def make_vistas(root):
    """Mapillary Vistas 1.2: 2 images to train on, 1 to validate; palette PNGs."""
    for split, name, value in (("training", "_b0X", 13), ("training", "-aZ", 55),
                               ("validation", "c c", 65)):
        write(root / f"{split}/images/{name}.jpg", np.zeros((H, W, 3)))
        write(root / f"{split}/labels/{name}.png", label_of(value, 66, 200, 255, 23, 24),
              [(i, 255 - i, 7) for i in range(256)])
        write(root / f"{split}/instances/{name}.png", label_of(1))
    return root


# ------------------------------------------------------------------------------------------------
# Depth

KITTI_RGB = "/raw_data/2011_09_26/2011_09_26_drive_{}_sync/image_02/data/{:010d}.png"
KITTI_DEPTH = ("/data_depth_annotated/train/2011_09_26_drive_{}_sync/proj_depth/groundtruth/"
               "image_02/{:010d}.png")


def write_pair(root, rgb, depth, size, units, seed=0):
    """A random image and a depth ramp of 2 to 8 metres with a hole; returns the list line."""
    height, width = size
    image, depth_file = (root / path.lstrip("/") for path in (rgb, depth))
    write(image, random_image(height // 8, width // 8, seed).repeat(9, 0).repeat(9, 1)
          [:height, :width])
    metres = np.linspace(2, 8, width)[None].repeat(height, axis=0)
    metres[: height // 4] = 0
    depth_file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((metres * units).astype(np.uint16)).save(depth_file)
    return f"{rgb} {depth} 518.8579\n"


def write_lists(root, train_lines, val_lines):
    """The two list files of a depth set, in its folder; returns that."""
    (root / "train.txt").write_text("".join(train_lines))
    (root / "val.txt").write_text("".join(val_lines))
    return root


def make_nyu(root):
    """NYU v2: 4 images of 4 kitchens to train on, 2 of a bathroom to test on."""
    return write_lists(
        root,
        [write_pair(root / "sync", f"/kitchen_000{i}/rgb_0000{i}.jpg",
                    f"/kitchen_000{i}/sync_depth_0000{i}.png", (480, 640), 1000, i)
         for i in range(4)],
        [write_pair(root / "official_splits" / "test", f"/bathroom/rgb_0004{i}.jpg",
                    f"/bathroom/sync_depth_0004{i}.png", (480, 640), 1000, 10 + i)
         for i in range(2)])


def make_kitti(root):
    """KITTI, 375 x 1242: 4 images of a drive to train on, 1 of another and a line without depth.

    One, because its 16 windows, and their mirror images, take long.
    """
    def line(drive, i):
        return write_pair(root, KITTI_RGB.format(drive, i), KITTI_DEPTH.format(drive, i),
                          (375, 1242), 256, i)

    return write_lists(root, [line("0001", i) for i in range(4)],
                       ["a.png None 1\n", line("0002", 0)])


def make_depth(root):
    """Images and depth maps of one's own, in 1/1000 m."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        write_pair(root, f"images/{split}/{name}.png", f"depths/{split}/{name}.png", (128, 192),
                   1000)
    return root


# ------------------------------------------------------------------------------------------------
# Pose

SIZE = (80, 100)                 # of the images, height and width
JOINTS = [[40, 20, 2], [44, 17, 2], [36, 17, 2], [47, 19, 1], [33, 19, 2], [52, 30, 2], [28, 30, 2],
          [57, 40, 2], [24, 41, 2], [60, 50, 1], [22, 52, 2], [48, 52, 2], [33, 52, 2], [49, 62, 2],
          [32, 62, 2], [50, 72, 2], [31, 72, 2]]


def person(number, image=7, **changes):
    """A COCO annotation; `changes` replace its entries, None removes them."""
    entry = {"id": number, "image_id": image, "category_id": 1, "bbox": [20.0, 12.0, 44.0, 64.0],
             "area": 1500.5, "iscrowd": 0, "num_keypoints": 17, "segmentation": [],
             "keypoints": [value for joint in JOINTS for value in joint], **changes}
    return {key: value for key, value in entry.items() if value is not None}


def image_entry(number, name, **changes):
    """A COCO image."""
    return {"id": number, "width": SIZE[1], "height": SIZE[0], "file_name": name, **changes}


def detection(image=7, **changes):
    """An entry of a file of boxes."""
    return {"image_id": image, "category_id": 1, "bbox": [-3.5, 2, 30, 90], "score": 0.003,
            **changes}


def make_people(root, annotations=None, images=None, content=None):
    """A set of one's own in COCO's format: two dark images, a white dot at the nose, a red one at
    the left wrist; found.json holds a detected box.
    """
    images = images or [image_entry(9, "b.png"), image_entry(7, "a.png")]
    annotations = [person(1), person(2, 9)] if annotations is None else annotations
    content = content or {"images": images, "annotations": annotations, "categories": []}
    (root / "annotations").mkdir(exist_ok=True)
    picture = np.full((*SIZE, 3), 30, np.uint8)
    picture[19:22, 39:42] = 255
    picture[49:52, 59:62, 0] = 255
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
        for name in ("a.png", "b.png"):
            write(root / "images" / split / name, picture)
    write_boxes(root, [detection(score=0.9)])
    return root


def write_boxes(root, entries):
    """A file of boxes; returns its path."""
    (root / "found.json").write_text(json.dumps(entries))
    return str(root / "found.json")


def make_coco(root, prefix=""):
    """`make_people`, laid out as COCO is released; images below `prefix`."""
    make_people(root)
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").rename(
            root / "annotations" / f"person_keypoints_{split}2017.json")
        (root / "images" / split).rename(root / prefix / f"{split}2017")
    return root


def make_refcoco(root: Path, name: str = "refcoco", splitter: str = "unc") -> None:
    """RefCOCO as released: a pickle, instances.json, an image with an object for each split."""
    square = [[10, 10, 50, 10, 50, 50, 10, 50]]
    write(root / "images/mscoco/images/train2014/a.jpg", random_image(80, 90))
    refs = [{"ref_id": i, "ann_id": i, "image_id": 1, "split": split, "category_id": 1,
             "sentences": [{"sent": "the left one"}]} for i, split in enumerate(("train", "val"))]
    (root / name).mkdir()
    (root / name / f"refs({splitter}).p").write_bytes(pickle.dumps(refs * 4, protocol=0))
    (root / name / "instances.json").write_text(json.dumps({
        "images": [{"id": 1, "width": 90, "height": 80, "file_name": "a.jpg"}],
        "annotations": [{"id": i, "image_id": 1, "segmentation": square} for i in range(2)]}))


def make_expressions(root: Path) -> None:
    """A folder of one's own sentences: two images, an object on each."""
    mask = np.zeros((80, 90), np.uint8)
    mask[:, :40] = 255
    entries = []
    for split in ("train", "val"):
        write(root / "images" / f"{split}.png", random_image(80, 90))
        write(root / "masks" / f"{split}.png", mask)
        entries += 4 * [{"split": split, "image": f"{split}.png", "mask": f"{split}.png",
                         "sentences": ["the left half"]}]
    (root / "expressions.json").write_text(json.dumps(entries))


TREES = {  # all data sets that have files
    ("seg", "folder"): make_seg, ("seg", "ade20k"): make_ade, ("seg", "cityscapes"): make_city,
    ("seg", "cityscapes-extra"): make_extra, ("seg", "mapillary"): make_vistas,
    ("depth", "folder"): make_depth, ("depth", "nyu"): make_nyu, ("depth", "kitti"): make_kitti,
    ("pose", "folder"): make_people, ("pose", "coco"): make_coco,
    ("refer", "refcoco"): make_refcoco,
    ("refer", "refcoco+"): partial(make_refcoco, name="refcoco+"),
    ("refer", "refcocog"): partial(make_refcoco, name="refcocog", splitter="umd"),
    ("refer", "folder"): make_expressions}


# ------------------------------------------------------------------------------------------------
# Random cases for COCO's evaluation, and pycocotools' answer

BORDERS = (32, 96)  # sides of squares whose area is at a border of the ranges


def coco_file(*people: dict, images=(1, 2)) -> dict:
    """A parsed annotation file; ids are given in turn."""
    return {"images": [{"id": image} for image in images],
            "annotations": [{**entry, "id": i} for i, entry in enumerate(people, 1)],
            "categories": [{"id": 1, "name": "person"}]}


def random_person(rng, image: int) -> dict:
    """A person of any size: 20 % crowds, 30 % nobody labelled, some areas exactly at a border.

    In some num_keypoints contradicts the keypoints: the field decides who is ignored.
    """
    side, corner = np.exp(rng.uniform(np.log(20), np.log(300), 2)).round(), rng.integers(0, 300, 2)
    visible = rng.integers(0, 3, 17) * (rng.random() > 0.3)
    points = (corner + rng.random((17, 2)) * side).astype(int) * (visible > 0)[:, None]
    count = int((visible > 0).sum())
    area = round(float(side.prod()) * 0.6, 2)
    return {"image_id": image, "category_id": 1, "iscrowd": int(rng.random() < 0.2),
            "bbox": [*map(float, corner), *map(float, side)],
            "area": area if rng.random() < 0.8 else float(rng.choice(BORDERS) ** 2),
            "keypoints": np.column_stack((points, visible)).ravel().tolist(),
            "num_keypoints": count if rng.random() < 0.95 else int(count == 0)}


def random_result(rng, image: int, target: dict | None, with_box: bool) -> dict:
    """A pose near that of `target` or anywhere, often tied in score, sometimes exact."""
    points = rng.integers(0, 300, 2) + rng.random((17, 2)) * rng.integers(10, 200)
    if target:
        x, y, w, h = target["bbox"]
        truth = np.reshape(target["keypoints"], (17, 3))
        near = truth[:, :2] + (rng.normal(size=(17, 2)) * 2 * oks.SIGMAS[:, None] * w ** 0.5
                               * h ** 0.5 * rng.choice([0, 0.2, 0.5, 1, 3]))
        points = np.where(truth[:, 2:] > 0, near, (x, y) + rng.random((17, 2)) * (w, h))
    if rng.random() < 0.2:  # an extent exactly at a border of the ranges
        corner, side = np.floor(points[0]), rng.choice(BORDERS)
        points = np.clip(points, corner, corner + side)
        points[:2] = corner, corner + side
    points = points.round(2)
    fields = {}
    if with_box:
        side = np.ptp(points, axis=0).round() + rng.integers(0, 2) * 10
        fields["bbox"] = [*points.min(axis=0).tolist(), *side.tolist()]
    keypoints = np.column_stack((points, rng.random(17).round(2))).ravel().tolist()
    return {"image_id": image, "category_id": 1, "keypoints": keypoints,
            "score": int(rng.integers(0, 40)) / 40, **fields}


def random_case(rng, images: int, people: int, results: int) -> tuple[dict, list[dict]]:
    """(annotations, results) of that size; a third of the images has no people, some no results.

    Some people are there twice, so that OKS are tied.  COCO's validation set: 5000, 11004, 104125.
    """
    ids = (rng.permutation(3 * images)[:images] + 1).tolist()
    crowded = ids[:math.ceil(images * 2 / 3)]
    truth = []
    for image in rng.choice(crowded, people).tolist():
        truth.append(random_person(rng, image))
        if len(truth) > 1 and rng.random() < 0.1:
            truth[-1] = {**truth[-2], "iscrowd": truth[-1]["iscrowd"], "area": truth[-1]["area"]}
    with_box = rng.random() < 0.3
    found = []
    for _ in range(results):
        target = truth[rng.integers(people)] if people and rng.random() < 0.7 else None
        image = target["image_id"] if target else int(rng.choice(ids))
        found.append(random_result(rng, image, target, with_box))
    return coco_file(*truth, images=ids), found


def write_case(folder: Path, annotations: dict, results: list[dict]) -> tuple[str, str]:
    """Paths of the annotation and the result file, written to `folder`."""
    paths = folder / "annotations.json", folder / "results.json"
    for path, content in zip(paths, (annotations, results)):
        path.write_text(json.dumps(content))
    return str(paths[0]), str(paths[1])


def pycocotools_evaluation(annotations: str, results) -> COCOeval:
    """pycocotools' evaluation of a file, and a file or list of results: its .stats, .ious, ..."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
