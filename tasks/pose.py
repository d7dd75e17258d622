"""Pose, top-down: heatmaps of a person's crop and of its mirror image; OKS-NMS; COCO's statistics.

Follows mmpose 1.x and ViTPose: UDP crops and DARK decoding (ops/udp.py), score_mode
"bbox_keypoint" and OKS-NMS of its CocoMetric (ops/oks.py).
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model import MetaPromptModel
from ops import draw, oks, parallel, udp
from ops.device import autocast, device_of
from sets.coco import PERSON, columns, make_sample, read_boxes
from tasks.common import batches, merged
from weights.checkpoint import write_text

METRIC = ("AP", 1)


@dataclass(frozen=True)
class Protocol:
    """How joints are predicted from people's boxes, and which people are kept."""

    flip: bool = True  # average with the mirror image's heatmaps
    nms: float = 0.9  # of two people of an image with a higher OKS the better is kept
    at_once: int = 16  # people in a batch


# ------------------------------------------------------------------------------------------------
# Prediction

@torch.inference_mode()
def predict(model: MetaPromptModel, images: Tensor, center: Tensor, scale: Tensor,
            protocol: Protocol, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Joints (B, 17, 2) in pixels of the image, their scores (B, 17), heatmaps (B, 17, h, w).

    images (B, 3, H, W): the crops that `center` and `scale`, (B, 2) each, cut from the images.
    """
    with autocast(images.device, dtype):
        heatmaps = model(images).float()
        if protocol.flip:
            heatmaps = (heatmaps + udp.flip_heatmaps(model(images.flip(-1)).float())) / 2
    kernel = int(6 * model.config.sigma) - 1             # the widest blur inside a blob's window
    xy, score = udp.decode(heatmaps, kernel)
    return udp.to_image(xy, center, scale, heatmaps.shape[-2:]), score, heatmaps


def keep(joints: np.ndarray, box_scores: np.ndarray, areas: np.ndarray,
         threshold: float) -> list[dict]:
    """COCO's results of the people of one image that OKS-NMS keeps, best first, with their "index".

    joints (P, 17, 3): x, y, score; box_scores (P,); areas (P,) of the padded boxes, pixels^2.
    """
    scores = oks.instance_scores(joints[..., 2], box_scores)
    return [{"index": i, "category_id": PERSON, "score": float(scores[i]),
             "keypoints": joints[i].ravel().tolist()}
            for i in oks.oks_nms(joints, scores, areas, threshold)]


# ------------------------------------------------------------------------------------------------
# Numbers

def evaluate(model: MetaPromptModel, dataset, protocol: Protocol, dtype: torch.dtype, *,
             workers: int = 0, sheet: Path | None = None, export: Path | None = None) -> dict:
    """COCO's ten OKS statistics; with annotated boxes also PCK, the share of joints whose peak is
    within 5 % of the crop.

    `sheet`: a PNG of some people, truth, prediction, heatmaps.  `export`: a folder for
    keypoints.json, the results in COCO's format.
    """
    device = device_of(model)
    people, rows, hits, joints = [], [], 0, 0
    for batch, images, target, drawn in batches(dataset, protocol.at_once, workers, device):
        center, scale = batch["center"].to(device), batch["scale"].to(device)
        xy, score, heatmaps = predict(model, images, center, scale, protocol, dtype)
        crop, size = images.shape[-2:], heatmaps.shape[-2:]
        wanted, weight = udp.heatmap_targets(target, crop, size, model.config.sigma)
        hit, labelled = udp.pck(heatmaps, wanted, weight)
        hits, joints = hits + int(hit), joints + int(labelled)
        found = torch.cat([xy, score[..., None].double()], dim=-1).cpu()       # (B, 17, 3)
        people.append((batch["id"], batch["image_id"], batch["score"], found,
                       batch["scale"].prod(dim=-1)))
        rows.append([(images[i].cpu(), target[i].cpu(), udp.to_crop(found[i], batch["center"][i],
                                                                    batch["scale"][i], crop),
                      heatmaps[i].cpu()) for i in drawn])
    people, rows = parallel.in_order(people), merged(rows)
    hits, joints = parallel.total(torch.tensor([hits, joints])).tolist()
    results = coco_results([torch.cat(column).numpy() for column in zip(*people)], protocol.nms)
    if export is not None:
        export.mkdir(parents=True, exist_ok=True)
        write_text(export / "keypoints.json", json.dumps(results))
    if sheet is not None:
        save_sheet(sheet, rows)
    metrics = oks.evaluate(dataset.annotations, results)
    return {**metrics, "PCK": hits / joints} if joints else metrics


def coco_results(people: list[np.ndarray], threshold: float) -> list[dict]:
    """COCO's results from columns over P people: (P,) ids, (P,) image ids, (P,) box scores,
    (P, 17, 3) joints x, y, score, (P,) areas of the padded boxes.

    Per image the people that OKS-NMS keeps, best first.
    """
    ids, image_ids, box_scores, joints, areas = people
    results = []
    for image in np.unique(image_ids):
        here = np.flatnonzero(image_ids == image)
        here = here[np.argsort(ids[here], kind="stable")]
        for person in keep(joints[here], box_scores[here], areas[here], threshold):
            del person["index"]
            results.append({"image_id": int(image), **person})
    return results


def report(metrics: dict, dataset) -> None:
    """Print the metrics in one line; n/a: nobody of that size."""
    line = "  ".join(f"{k} {v:.4f}" if v >= 0 else f"{k} n/a" for k, v in metrics.items())
    print(f"{line}  ({dataset.boxes})")


# ------------------------------------------------------------------------------------------------
# Pictures

LEFT, RIGHT, MIDDLE = (0, 220, 60), (255, 128, 0), (51, 153, 255)  # the usual colours of limbs
DRAWN_ABOVE = 0.2  # score of a joint or person that is drawn, the one above which it counts


def joint_colour(joint: int) -> tuple[int, int, int]:
    """Left side, right side, or the nose."""
    name = udp.KEYPOINTS[joint]
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def draw_skeleton(image: Image.Image, joints: np.ndarray, zoom: float = 1.0,
                  radius: int | None = None) -> None:
    """Draw joints (17, 3), x, y in pixels and a score, onto `image`, `zoom` times as large.

    Joints that score 0.2 or less are left out; a limb needs both its ends.  `radius` of a joint, in
    pixels of `image`; None: as suits a person that fills the picture.
    """
    pen, seen = ImageDraw.Draw(image), joints[:, 2] > DRAWN_ABOVE
    points = [((x + 0.5) * zoom, (y + 0.5) * zoom) for x, y in joints[:, :2].tolist()]
    radius = radius or max(2, round(min(image.size) / 90))
    for a, b in udp.SKELETON:
        if seen[a] and seen[b]:
            sides = {joint_colour(a), joint_colour(b)} - {MIDDLE}
            colour = sides.pop() if len(sides) == 1 else MIDDLE
            pen.line([points[a], points[b]], fill=colour, width=max(2, radius))
    for joint in np.flatnonzero(seen):
        x, y = points[joint]
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=joint_colour(joint),
                    outline="black")


def legend(width: int) -> np.ndarray:
    """A strip that says what the limbs' colours mean."""
    return draw.legend([("their left", LEFT), ("right", RIGHT), ("middle", MIDDLE)], width)


def skeleton_on(picture: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """A small crop, enlarged, with the joints (17, 3) of its person."""
    large = draw.enlarge(picture)
    panel = Image.fromarray(large.copy())
    draw_skeleton(panel, joints, large.shape[0] / picture.shape[0])
    return np.asarray(panel)


def save_sheet(path: Path, rows: list[tuple]) -> None:
    """Write rows of (crop (3,H,W) in [0,1], true joints (17,3), predicted joints (17,3), heatmaps
    (17,h,w)) as one PNG; joints in pixels of the crop, with a weight or a score.

    Columns: truth | prediction | the highest of the 17 heatmaps.
    """
    panels = []
    for crop, truth, joints, heatmaps in rows:
        picture = draw.to_uint8(crop)
        skeletons = [skeleton_on(picture, np.asarray(points, np.float64))
                     for points in (truth, joints)]
        highest = np.asarray(heatmaps.amax(dim=0), np.float64)
        panels.append([*skeletons, draw.lay_heat(draw.enlarge(picture), highest)])
    draw.save_stack(path, panels, ("truth", "prediction", "heatmaps, highest"), legend)


def save_people(path: Path, image: np.ndarray, people: list[tuple]) -> None:
    """Write an image (H, W, 3) uint8 with people on it.

    people: (joints (17, 3) with scores, box (left, top, width, height)) in pixels of the image.
    """
    height, width = draw.look_size(*image.shape[:2])
    picture, zoom = Image.fromarray(draw.fit(image, height, width)), width / image.shape[1]
    for joints, box in people:
        left, top, wide, high = (value * zoom for value in box)
        if wide < width or high < height:                # a frame around everything says nothing
            corner = (left + max(0, wide - 1), top + max(0, high - 1))
            ImageDraw.Draw(picture).rectangle((left, top, *corner), outline="white",
                                              width=max(1, round(min(height, width) / 300)))
        draw_skeleton(picture, joints, zoom, radius=max(2, round(min(wide, high, height) / 60)))
    draw.save_framed(path, np.asarray(picture), legend)


# ------------------------------------------------------------------------------------------------
# The user's own pictures

def prepare(recipe, boxes: str | None) -> dict | None:
    """The boxes of a file by image (sets.coco.read_boxes); None without one."""
    if not boxes:
        return None
    found: dict = {}
    for box in read_boxes(Path(boxes)):
        found.setdefault(box["image"], []).append(box)
    return found


def boxes_of(boxes: dict, file: Path) -> list[dict]:
    """The boxes of one image: by its name, else by the number it is named after, as in COCO."""
    number = int(file.stem) if file.stem.isdecimal() else None
    return boxes.get(file.as_posix()) or boxes.get(number) or []


def image_boxes(image: np.ndarray, file: Path, boxes: dict | None) -> list[dict]:
    """The people to look at in an image: those of the boxes file, else one as large as it."""
    if boxes is not None:
        return boxes_of(boxes, file)
    return [{"image": None, "bbox": [0, 0, image.shape[1], image.shape[0]], "score": 1.0}]


def person_crops(image: np.ndarray, boxes: list[dict], recipe) -> list[dict]:
    """A sample (sets/coco.py) for each box of an image (H, W, 3) uint8."""
    low = [max(0, 2 - side) for side in image.shape[:2]]  # a crop needs 2 pixels to lie between
    image = np.pad(image, ((0, low[0]), (0, low[1]), (0, 0)), mode="edge")
    found = [(0, (x, y, x + w, y + h), [0] * 51, box["score"])
             for box in boxes for x, y, w, h in [box["bbox"]]]
    people = columns([{"id": 0, "file_name": ""}], found)
    crop = (recipe.crop, recipe.crop_width or recipe.crop)
    return [make_sample(people, i, image, crop) for i in range(len(people))]


def predict_people(model: MetaPromptModel, image: np.ndarray, boxes: list[dict], recipe,
                   dtype: torch.dtype) -> list[dict]:
    """COCO results of the people in `boxes`, near copies left out, best first."""
    found, areas, device, at_once = [], [], device_of(model), recipe.protocol.at_once
    for first in range(0, len(boxes), at_once):
        samples = person_crops(image, boxes[first:first + at_once], recipe)
        crops, center, scale = (torch.stack([s[key] for s in samples]).to(device)
                                for key in ("image", "center", "scale"))
        xy, score, _ = predict(model, crops, center, scale, recipe.protocol, dtype)
        found.append(torch.cat([xy, score[..., None].double()], dim=-1).cpu().numpy())
        areas.append(scale.prod(dim=-1).cpu().numpy())
    if not found:
        return []
    people = keep(np.concatenate(found), np.array([box["score"] for box in boxes]),
                  np.concatenate(areas), recipe.protocol.nms)
    for person in people:
        box = boxes[person.pop("index")]
        person["bbox"] = box["bbox"]
        if isinstance(box["image"], int):
            person["image_id"] = box["image"]
    return people


def apply(model: MetaPromptModel, image: np.ndarray, file: Path, out: Path, recipe,
          dtype: torch.dtype, boxes: dict | None) -> list[dict]:
    """Write OUT_people.png, without people that score 0.2 or less; returns all of the image's."""
    results = predict_people(model, image, image_boxes(image, file, boxes), recipe, dtype)
    save_people(Path(f"{out}_people.png"), image, [
        (np.array(person["keypoints"]).reshape(17, 3), person["bbox"])
        for person in results if person["score"] > DRAWN_ABOVE])
    return [{"file_name": file.as_posix(), **person} for person in results]


def view(image: np.ndarray, file: Path, recipe, boxes: dict | None) -> np.ndarray:
    """The crop of the best box, of the whole image without one."""
    people = image_boxes(image, file, boxes) or image_boxes(image, file, None)
    best = max(people, key=lambda box: box["score"])
    return draw.to_uint8(person_crops(image, [best], recipe)[0]["image"])


def written(recipe, boxes: dict | None) -> str:
    """What `apply` writes, in words."""
    return "keypoints.json and *_people.png"
