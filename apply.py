"""A trained model on your own pictures: a file or a folder, any size and aspect, no labels.

    python eval.py --checkpoint runs/seg-shapes --image photo.jpg
    python eval.py --checkpoint runs/depth-nyu --image photos --out results --heatmaps
    python eval.py --checkpoint runs/pose-coco --image photos --boxes boxes.json

    task   for programs                                                 for people
    seg    NAME_labels.png: class numbers from 0, with a palette        NAME_overlay.png
    depth  NAME_depth.png: 16 bit, a fixed number per metre             NAME_depth_colour.png
    pose   keypoints.json: COCO results with "file_name", for all       NAME_people.png

NAME is the file's name without its suffix; with it where two files of a folder share the rest.
Each image is predicted alone, by its data set's protocol (predict.py).  Where that says nothing
about size, the image's longer side is reduced to `max_side`; results have the image's own size.

Boxes are a list of {"file_name" or "image_id", "bbox": [left, top, width, height], "score"?}, or
{file name: [bbox, ...]}, in pixels of the upright image; file names are relative to the folder, an
image_id is the number that a file is named after, as in COCO.  Without boxes there is one person,
who fills the image.
"""
import argparse
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image

from ops import augment
from sets import cityscapes as city_data
import data
from tools import heatmaps
from ops import oks
from ops import draw as pictures
from sets import coco as pose_data
from tasks import recipes
from sets import shapes
from ops.errors import InputError
from heads import resize
from model import Config, MetaPromptModel
from predict import (DepthProtocol, PoseProtocol, Protocol, device_of, predict_depth, predict_pose,
                     predict_seg, to_batch)
from weights.files import read_json

SMALLEST = 64  # sides below are enlarged: the UNet's coarsest stride
PROBABILITIES = 1 << 27  # held at once, 0.5 GB; labels of larger images are enlarged afterwards
SET_FLAGS = ("data", "val_list", "depth_scale", "val_json", "images", "export")


@dataclass(frozen=True)
class Setup:
    """What is the same for all images."""

    protocol: Protocol | DepthProtocol | PoseProtocol
    dtype: torch.dtype
    crop: tuple[int, int]  # (height, width) the model was trained on; of a person in pose
    max_side: int  # pixels; of what the model gets
    classes: data.Classes | None = None  # seg
    units: float = 1.0  # depth: of the 16-bit PNG, per metre
    boxes: dict[str, list] | None = None  # pose: see read_boxes; None: whole images


# ------------------------------------------------------------------------------------------------
# Files

def check(args: argparse.Namespace) -> None:
    """InputError for flags that don't go together, before anything is loaded."""
    if args.image is None:
        for name in ("heatmaps", "max_side"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} needs --image: a file or a folder")
        return
    for name in SET_FLAGS:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is about a labelled data set: leave it "
                             "out with --image")
    if args.max_side is not None and args.max_side < SMALLEST:
        raise InputError(f"--max-side {args.max_side}: {SMALLEST} pixels or more")
    out, source = Path(args.out or "."), Path(args.image).expanduser()
    if not source.exists():
        raise InputError(f"--image {source} does not exist: an image file or a folder of images")
    if args.out and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: a folder is needed")
    if args.out and source.is_dir() and out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the folder of the images: the next run would take the "
                         "results for images")


def find_images(source: str, out: Path) -> tuple[Path, list[Path]]:
    """(folder, image files relative to it, sorted) of an image file or a folder, subfolders too.

    What lies in `out` is left out: results of an earlier run.  InputError if there is no image.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [Path(path.name)]
    inside, out = path.resolve() in out.resolve().parents, out.resolve()
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES
                   and p.is_file() and not (inside and out in p.resolve().parents))
    if not found:
        raise InputError(f"{path} holds no image ({', '.join(data.IMAGE_SUFFIXES)})")
    return path, [p.relative_to(path) for p in found]


def output_names(files: list[Path]) -> list[Path]:
    """Each file's path without its suffix, with it where that is no longer unique."""
    stems = Counter(file.with_suffix("") for file in files)
    names = [file if stems[file.with_suffix("")] > 1 else file.with_suffix("") for file in files]
    return names if len(set(names)) == len(names) else files  # x.png, x.jpg, x.png.jpg


# ------------------------------------------------------------------------------------------------
# What the model gets

def bounded(image: np.ndarray, max_side: int) -> np.ndarray:
    """An image (H, W, 3) uint8 reduced to a longer side of `max_side`, no side below 64 pixels.

    Its aspect is kept unless it is so long that both cannot be had.
    """
    sides = image.shape[:2]
    factor = max(min(1.0, max_side / max(sides)), SMALLEST / min(sides))
    return pictures.fit(image, *(min(max(round(side * factor), SMALLEST), max_side)
                                 for side in sides))


def model_input(image: np.ndarray, protocol: Protocol | DepthProtocol,
                max_side: int) -> np.ndarray:
    """An image (H, W, 3) uint8 at the size that `predict_seg` or `predict_depth` wants.

    The protocol's scale if it has one, else as it is, but bounded.
    """
    scale = getattr(protocol, "scale", None)
    if scale is None:
        return bounded(image, max_side)
    if protocol.ratios != (1.0,):                        # each is made from the image's own size
        return pictures.fit(image, *(max(side, SMALLEST) for side in image.shape[:2]))
    size = augment.rescale_size(*image.shape[:2], scale)
    return augment.resize_bilinear(image, tuple(max(side, SMALLEST) for side in size))


# ------------------------------------------------------------------------------------------------
# Segmentation and depth

def find_classes(dataset: str, config: Config) -> data.Classes:
    """Names and colours of the model's classes; InputError if the data set has another number."""
    if dataset == "ade20k":
        classes = data.ade20k_classes()
    elif dataset in city_data.NAMES:
        classes = city_data.cityscapes_classes(label_ids=False)
    elif dataset == "shapes":
        classes = data.plain_classes(shapes.CLASSES, data.COLOURS)
    else:
        names = config.class_names or tuple(f"class {i}" for i in range(config.num_classes))
        classes = data.plain_classes(tuple(names))
    if len(classes.names) != config.num_classes:
        raise InputError(f"the model predicts {config.num_classes} classes, the data set "
                         f"{dataset} has {len(classes.names)}")
    return classes


def predict_labels(model: MetaPromptModel, image: np.ndarray, setup: Setup) -> np.ndarray:
    """Class numbers (H, W) uint8 of an image (H, W, 3) uint8."""
    H, W = image.shape[:2]
    values = H * W * model.config.num_classes * (2 if setup.protocol.flip else 1)
    shrink = min(1.0, math.sqrt(PROBABILITIES / values))
    size = (max(1, int(H * shrink)), max(1, int(W * shrink)))
    x = to_batch(model_input(image, setup.protocol, setup.max_side), device_of(model))
    probs = predict_seg(model, x, size, setup.protocol, setup.dtype)
    labels = probs.argmax(dim=1)[0].byte().cpu().numpy()
    return labels if size == (H, W) else augment.resize_nearest(labels, (H, W))


def apply_seg(model: MetaPromptModel, image: np.ndarray, file: Path, out: Path,
              setup: Setup) -> list[dict]:
    """Write OUT_labels.png and OUT_overlay.png; no results."""
    labels = predict_labels(model, image, setup)
    png = Image.fromarray(labels)
    png.putpalette([value for colour in setup.classes.palette for value in colour])
    png.save(f"{out}_labels.png")
    pictures.save_overlay(Path(f"{out}_overlay.png"), image, labels, setup.classes)
    return []


def find_units(protocol: DepthProtocol, max_depth: float) -> float:
    """Per metre, of a 16-bit PNG: the benchmark's, or fewer if the model sees farther than fits."""
    return next((units for units in (protocol.units, 256.0, 100.0, 10.0)
                 if units <= protocol.units and units * max_depth <= 65535), 1.0)


def predict_metres(model: MetaPromptModel, image: np.ndarray, setup: Setup) -> np.ndarray:
    """Depth (H, W) float32 of an image (H, W, 3) uint8."""
    x = to_batch(model_input(image, setup.protocol, setup.max_side), device_of(model))
    side = min(x.shape[-2:]) if setup.protocol.windows > 1 else x.shape[-1]
    at_once = 8 * setup.crop[0] ** 2 // (x.shape[-2] * side)      # 8 windows of the training size
    depth = predict_depth(model, x, setup.protocol, setup.dtype, batch=max(1, min(8, at_once)))
    depth = depth.nan_to_num(nan=setup.protocol.min_depth, posinf=model.config.max_depth)
    return resize(depth[None], image.shape[:2])[0, 0].cpu().numpy()


def apply_depth(model: MetaPromptModel, image: np.ndarray, file: Path, out: Path,
                setup: Setup) -> list[dict]:
    """Write OUT_depth.png and OUT_depth_colour.png; no results."""
    depth = predict_metres(model, image, setup)
    values = np.rint(depth * setup.units).clip(1, 65535).astype(np.uint16)  # 0 would mean unknown
    Image.fromarray(values).save(f"{out}_depth.png")
    pictures.save_depth(Path(f"{out}_depth_colour.png"), image, depth)
    return []


# ------------------------------------------------------------------------------------------------
# Pose

def read_boxes(path: Path) -> dict[str, list]:
    """Entries {bbox, score, image_id} of a boxes file by file name, or by "#image_id".

    InputError naming a bad entry.  Entries of another category than 1 are left out.
    """
    entries = read_json(path)
    if isinstance(entries, dict) and all(isinstance(v, list) for v in entries.values()):
        entries = [{"file_name": name, "bbox": box} for name, boxes in entries.items()
                   for box in boxes]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} is no boxes file: it must be a list of {{file_name or image_id, "
                         "bbox}, or {file name: [bbox, ...]}")
    found: dict[str, list] = {}
    for position, entry in enumerate(entries):
        where = f"{path}, entry number {position}"
        name, number = entry.get("file_name"), entry.get("image_id")
        if not isinstance(name, str) and not isinstance(number, int):
            raise InputError(f"{where}: file_name (a text) or image_id (an integer) must be there")
        box = oks.numbers(entry, "bbox", 4, where)
        if min(box[2:]) <= 0:
            raise InputError(f"{where}: its box is {box[2]:g} wide and {box[3]:g} high: bbox is "
                             "(left, top, width, height)")
        score = oks.numbers({"score": 1.0, **entry}, "score", 0, where)
        if entry.get("category_id", pose_data.PERSON) == pose_data.PERSON:
            key = Path(name).as_posix() if isinstance(name, str) else f"#{number}"
            found.setdefault(key, []).append({"image_id": number, "bbox": box, "score": score})
    return found


def boxes_of(boxes: dict[str, list], file: Path) -> list[dict]:
    """The entries for one image: by its name, else by the number it is named after."""
    number = f"#{int(file.stem)}" if file.stem.isdecimal() else ""
    return boxes.get(file.as_posix()) or boxes.get(number) or []


def image_boxes(image: np.ndarray, file: Path, setup: Setup) -> list[dict]:
    """The people to look at in an image: those of the boxes file, else one as large as it."""
    if setup.boxes is not None:
        return boxes_of(setup.boxes, file)
    return [{"image_id": None, "bbox": [0, 0, image.shape[1], image.shape[0]], "score": 1.0}]


def person_crops(image: np.ndarray, boxes: list[dict], setup: Setup) -> list[dict]:
    """A sample (pose_data.py) for each box of an image (H, W, 3) uint8."""
    low = [max(0, 2 - side) for side in image.shape[:2]]  # a crop needs 2 pixels to lie between
    image = np.pad(image, ((0, low[0]), (0, low[1]), (0, 0)), mode="edge")
    found = [(0, (x, y, x + w, y + h), [0] * 51, box["score"])
             for box in boxes for x, y, w, h in [box["bbox"]]]
    people = pose_data.columns([{"id": 0, "file_name": ""}], found)
    return [pose_data.make_sample(people, i, image, setup.crop) for i in range(len(people))]


def predict_people(model: MetaPromptModel, image: np.ndarray, boxes: list[dict],
                   setup: Setup) -> list[dict]:
    """COCO results of the people in `boxes`, near copies left out, best first (eval.coco_results).
    """
    found, areas, device = [], [], device_of(model)
    for first in range(0, len(boxes), setup.protocol.batch):
        samples = person_crops(image, boxes[first:first + setup.protocol.batch], setup)
        crops, center, scale = (torch.stack([s[key] for s in samples]).to(device)
                                for key in ("image", "center", "scale"))
        xy, score, _ = predict_pose(model, crops, center, scale, setup.protocol, setup.dtype)
        found.append(torch.cat([xy, score[..., None].double()], dim=-1).cpu().numpy())
        areas.append(scale.prod(dim=-1).cpu().numpy())
    if not found:
        return []
    joints, areas = np.concatenate(found), np.concatenate(areas)     # (P, 17, 3), (P,)
    scores = oks.instance_scores(joints[..., 2], np.array([box["score"] for box in boxes]))
    return [{"category_id": pose_data.PERSON, "bbox": boxes[i]["bbox"], "score": float(scores[i]),
             "keypoints": joints[i].ravel().tolist()}
            | ({} if boxes[i]["image_id"] is None else {"image_id": boxes[i]["image_id"]})
            for i in oks.oks_nms(joints, scores, areas, setup.protocol.nms)]


def apply_pose(model: MetaPromptModel, image: np.ndarray, file: Path, out: Path,
               setup: Setup) -> list[dict]:
    """Write OUT_people.png, without people that score 0.2 or less; returns all of the image's."""
    results = predict_people(model, image, image_boxes(image, file, setup), setup)
    pictures.save_people(Path(f"{out}_people.png"), image, [
        (np.array(person["keypoints"]).reshape(17, 3), person["bbox"])
        for person in results if person["score"] > pictures.DRAWN_ABOVE])
    return [{"file_name": file.as_posix(), **person} for person in results]


# ------------------------------------------------------------------------------------------------
# Command

APPLY = {"seg": apply_seg, "depth": apply_depth, "pose": apply_pose}


def training_crop(source: Path, task: str, dataset: str) -> tuple[int, int]:
    """(height, width) of the crops that a model was trained on: its run's, else the data set's."""
    file = source.parent / "recipe.json"
    recipe = read_json(file) if file.is_file() else {}
    crop, width = recipe.get("crop"), recipe.get("crop_width")
    if crop is None:
        crop = recipes.RECIPES[task, dataset].crop
        width = recipes.RECIPES[task, dataset].crop_width
    return crop, width or crop


def set_up(args: argparse.Namespace, config: Config, protocol, dataset: str, source: Path,
           dtype: torch.dtype) -> Setup:
    """Everything that is the same for all images; InputError if a flag doesn't fit the model.

    The default of --max-side is twice the training crop, so that objects have about the size they
    had in training; four times on KITTI, whose images are 3.5 crops wide.
    """
    if args.boxes and config.task != "pose":
        raise InputError(f"--boxes is for pose: the model's task is {config.task}")
    if args.max_side and config.task == "pose":
        raise InputError(f"--max-side {args.max_side}: not for pose, people are cropped")
    crop = training_crop(source, config.task, dataset)
    side = args.max_side or max(SMALLEST, crop[0] * (4 if dataset == "kitti" else 2))
    setup = Setup(protocol, dtype, crop, side)
    if config.task == "seg":
        return replace(setup, classes=find_classes(dataset, config))
    if config.task == "depth":
        return replace(setup, units=find_units(protocol, config.max_depth))
    return replace(setup, boxes=read_boxes(Path(args.boxes)) if args.boxes else None)


def input_size(setup: Setup) -> str:
    """What size the model gets, in words."""
    if isinstance(setup.protocol, PoseProtocol):
        return f"people's crops {setup.crop[1]} x {setup.crop[0]} pixels"
    if getattr(setup.protocol, "scale", None):
        return "resized to the protocol's scale"
    return f"longer side at most {setup.max_side} pixels for the model (--max-side)"


def written(setup: Setup, config: Config) -> str:
    """What lies in the output folder, in words."""
    if config.task == "seg":
        return (f"*_labels.png (pixel value = class, 0 to {config.num_classes - 1}) and "
                "*_overlay.png")
    if config.task == "depth":
        return f"*_depth.png (metres = value / {setup.units:g}) and *_depth_colour.png"
    return "keypoints.json and *_people.png"


def heat_input(image: np.ndarray, file: Path, setup: Setup) -> np.ndarray:
    """(h, w, 3) uint8 whose heatmaps are drawn: the whole image, bounded, or a person's crop."""
    if isinstance(setup.protocol, PoseProtocol):
        whole = replace(setup, boxes=None)
        boxes = image_boxes(image, file, setup) or image_boxes(image, file, whole)
        best = max(boxes, key=lambda box: box["score"])
        return pictures.to_uint8(person_crops(image, [best], setup)[0]["image"])
    if isinstance(setup.protocol, Protocol):
        image = model_input(image, replace(setup.protocol, ratios=(1.0,)), setup.max_side)
    return bounded(image, setup.max_side)


def apply_all(model: MetaPromptModel, setup: Setup, root: Path, files: list[Path],
              out: Path) -> tuple[list[int], list[str]]:
    """Predict and write every image; returns the positions of those done and why others weren't."""
    done, skipped, results = [], [], []
    names = output_names(files)
    for position, file in enumerate(tqdm(files, desc="apply", unit="image", leave=False)):
        try:
            image = data.load_image(root / file)
        except InputError as error:
            skipped.append(str(error))
            continue
        (out / names[position]).parent.mkdir(parents=True, exist_ok=True)
        results += APPLY[model.config.task](model, image, file, out / names[position], setup)
        done.append(position)
    if not done:
        raise InputError(skipped[0] if len(files) == 1 else
                         f"none of the {len(files)} images can be read: {skipped[0]}")
    if model.config.task == "pose":
        (out / "keypoints.json").write_text(json.dumps(results))
    return done, skipped


def run(args: argparse.Namespace, model: MetaPromptModel, setup: Setup, out: Path) -> None:
    """Predict the images of --image, write results and pictures into `out`, say what was done."""
    root, files = find_images(args.image, out)
    wanted = None
    if args.heatmaps is not None:                        # refused before any prediction
        wanted = heatmaps.parse(args.heatmaps, model.config)
    if setup.boxes is not None and not any(boxes_of(setup.boxes, file) for file in files):
        raise InputError(f"{args.boxes} has no box for any of the {len(files)} images, such as "
                         f"{files[0].as_posix()}: see the formats in apply.py")
    print(f"images     {len(files)} in {root}, {input_size(setup)}")
    start = time.perf_counter()
    done, skipped = apply_all(model, setup, root, files, out)
    seconds = time.perf_counter() - start
    if wanted is not None:
        names = output_names(files)
        chosen = heatmaps.draw(
            model, [names[i] for i in done],
            lambda i: heat_input(data.load_image(root / files[done[i]]), files[done[i]], setup),
            out, wanted, setup.dtype)
        print(f"prompts    {', '.join(map(str, chosen))}: *_heatmaps.png, prompts.png")
    for message in skipped:
        print(f"skipped    {message}")
    print(f"{len(done)} images in {seconds:.1f} s, reading and writing included: "
          f"{len(done) / seconds:.2f} images/s" + (f"; {len(skipped)} skipped" if skipped else ""))
    print(f"wrote {out}/: {written(setup, model.config)}")
