"""Pose: joints and people of models whose answer is known; what is kept; the drawings.

    pytest tests/test_pose.py
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import colours, noise, read_png
from PIL import Image
from torch import nn

from model import Config
from ops import draw, oks, udp
from sets.embedded import ShapesPose
from sets.files import Cut
from tasks import pose
from tasks.pose import Protocol
from tasks.recipes import RECIPES


# ------------------------------------------------------------------------------------------------
# A whole set

class TrueHeatmaps(nn.Module):
    """A pose model that knows the answers: the heatmaps of a set's people, one after the other."""

    def __init__(self, dataset, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = Config(task="pose", sigma=2.0)
        self.dataset, self.size, self.next = dataset, size, 0

    def forward(self, images):
        places = range(self.next, self.next + len(images))
        self.next += len(images)
        joints = torch.stack([self.dataset[0, i]["target"] for i in places])
        return udp.heatmap_targets(joints, images.shape[-2:], self.size, 2.0)[0]


def test_a_model_that_knows_the_heatmaps_has_ap_1(tmp_path, capsys):
    """Boxes, crops, targets, decoding, scores and COCO's statistics agree: AP, AR, PCK are 1."""
    dataset = ShapesPose(4, Cut("val", (256, 192), None, 0), False)
    model = TrueHeatmaps(dataset, (64, 48))
    metrics = pose.evaluate(model, dataset, Protocol(flip=False, at_once=4), torch.float32,
                            export=tmp_path, sheet=tmp_path / "a.png")
    assert metrics["AP"] > 0.999 and metrics["AR"] > 0.999 and metrics["PCK"] == 1
    results = json.loads((tmp_path / "keypoints.json").read_text())
    assert oks.evaluate(dataset.annotations, results)["AP"] == metrics["AP"]
    assert read_png(tmp_path / "a.png").std() > 10
    pose.report({**metrics, "AP_L": -1.0}, dataset)
    assert "AP_L n/a" in (line := capsys.readouterr().out) and "(ground-truth boxes)" in line


def test_results_are_per_image_without_near_copies():
    """Two boxes on one person give one result, the better; images don't compete."""
    joints = np.random.default_rng(0).uniform(0, 100, (4, 17, 3))
    joints[1] = joints[2] = joints[0]
    joints[..., 2] = np.array([0.5, 0.9, 0.4, 0.8])[:, None]
    columns = [np.arange(4), np.array([7, 7, 9, 7]), np.array([1, 1, 1, 0.5]), joints,
               np.full(4, 1e4)]
    results = pose.coco_results(columns, 0.9)
    scores = [(r["image_id"], round(r["score"], 6)) for r in results]
    assert scores == [(7, 0.9), (7, 0.4), (9, 0.4)]
    assert all(len(r["keypoints"]) == 51 and "bbox" not in r for r in results)


# ------------------------------------------------------------------------------------------------
# The user's own pictures

class Brightest(nn.Module):
    """A pose model that finds white dots: every heatmap is the crop's brightness, blurred."""

    def __init__(self):
        super().__init__()
        self.config, self.prompts = Config(task="pose", sigma=2.0), nn.Parameter(torch.zeros(1))

    def forward(self, images):
        blurred = F.avg_pool2d(F.avg_pool2d(images[:, :1], 9, 1, 4), 9, 1, 4)
        return blurred.expand(-1, 17, -1, -1)


def own(at_once=2):
    """A recipe with crops of 128 x 96."""
    return replace(RECIPES["pose", "folder"], crop=128, crop_width=96,
                   protocol=Protocol(at_once=at_once))


def people_of(image, boxes, recipe):
    """What `Brightest` finds in an image."""
    return pose.predict_people(Brightest(), image, boxes, recipe, torch.float32)


def dotted(size, x, y):
    """An image with a white dot around pixel (x, y)."""
    image = np.zeros((*size, 3), np.uint8)
    image[y - 3:y + 4, x - 3:x + 4] = 255
    return image


def boxes_file(path, content):
    """Write content as JSON."""
    path.write_text(json.dumps(content))
    return str(path)


def test_boxes_of_an_image(tmp_path):
    """By its relative name, or by the number that it is named after."""
    by_name = pose.prepare(own(), boxes_file(tmp_path / "a", [
        {"file_name": "s/7.jpg", "bbox": [1, 2, 3, 4]},
        {"file_name": "./s/7.jpg", "bbox": [5, 6, 7, 8]}]))
    mapping = pose.prepare(own(), boxes_file(tmp_path / "b", {
        "s/7.jpg": [[1, 2, 3, 4], [5, 6, 7, 8]]}))
    by_id = pose.prepare(own(), boxes_file(tmp_path / "c", [
        {"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 1},
        {"image_id": 7, "bbox": [5, 6, 7, 8], "category_id": 2}]))
    for boxes in (by_name, mapping):
        found = pose.boxes_of(boxes, Path("s/7.jpg"))
        assert [box["bbox"] for box in found] == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert [box["score"] for box in found] == [1, 1]
    person, = pose.boxes_of(by_id, Path("s/000007.png"))
    assert (person["image"], person["bbox"], person["score"]) == (7, [1, 2, 3, 4], 0.5)
    for boxes, other in ((by_name, "7.jpg"), (by_id, "8.jpg"), (by_id, "x7.jpg")):
        assert pose.boxes_of(boxes, Path(other)) == []
    assert pose.prepare(own(), None) is None


@pytest.mark.parametrize("size", [(120, 300), (300, 120)])
def test_joints_are_in_pixels_of_the_image(size):
    """A dot is found where it is, from the whole image as one box and from a box around it."""
    x, y = size[1] // 3, size[0] // 2
    for boxes in (None, {"a.png": [{"image": "a.png", "bbox": [x - 30, y - 40, 60, 70],
                                    "score": 1.0}]}):
        image = dotted(size, x, y)
        person, = people_of(image, pose.image_boxes(image, Path("a.png"), boxes), own())
        joints = np.array(person["keypoints"]).reshape(17, 3)
        assert np.abs(joints[:, :2] - (x, y)).max() < 1.5
        assert set(person) == {"category_id", "bbox", "score", "keypoints"}


def test_people_best_first_without_near_copies():
    """Of boxes on one person the best is kept; the order is by score; batches change nothing."""
    image = np.maximum(dotted((200, 300), 60, 100), dotted((200, 300), 240, 90))
    boxes = [{"image": 4, "bbox": box, "score": score} for box, score in (
        ([30, 60, 60, 80], 0.3), ([210, 50, 60, 80], 0.9), ([30, 60, 60, 80], 0.6))]
    found = [people_of(image, boxes, own(n)) for n in (1, 2, 8)]
    assert [(p["bbox"][0], p["image_id"]) for p in found[0]] == [(210, 4), (30, 4)]
    assert found[0][1]["score"] / found[0][0]["score"] == pytest.approx(0.6 / 0.9, rel=0.05)
    assert all(np.allclose([p["keypoints"] for p in f], [p["keypoints"] for p in found[0]])
               for f in found)
    assert people_of(image, [], own()) == []


def test_tiny_images_hold_a_person():
    """A single pixel is cropped, too."""
    image = np.full((1, 1, 3), 255, np.uint8)
    assert len(people_of(image, pose.image_boxes(image, Path("a.png"), None), own())) == 1


def test_files_of_a_picture(tmp_path):
    """Everyone is returned, with the file's name; who scores 0.2 or less is not drawn."""
    image, boxes = dotted((200, 300), 60, 100), {"a/b.png": [
        {"image": "a/b.png", "bbox": [30, 60, 60, 80], "score": score} for score in (1.0, 0.01)]}
    boxes["a/b.png"][1]["bbox"] = [200, 20, 60, 80]      # nothing there
    results = pose.apply(Brightest(), image, Path("a/b.png"), tmp_path / "b", own(), torch.float32,
                         boxes)
    assert [r["file_name"] for r in results] == ["a/b.png"] * len(results) and len(results) == 2
    picture = read_png(tmp_path / "b_people.png")
    frame = np.full(3, 255)
    assert np.array_equal(picture[60, 40], frame) and not np.array_equal(picture[20, 210], frame)


def test_the_view_is_the_crop_of_the_best_box():
    """Without boxes the whole image, padded to the crop's aspect."""
    image = np.maximum(dotted((200, 300), 60, 100), dotted((200, 300), 240, 90) // 2)
    boxes = {"a.png": [{"image": "a.png", "bbox": box, "score": score} for box, score in (
        ([30, 60, 60, 80], 0.3), ([210, 50, 60, 80], 0.9))]}
    best = pose.view(image, Path("a.png"), own(), boxes)
    assert best.shape == (128, 96, 3) and 120 < best.max() < 130
    assert pose.view(noise(40, 40), Path("b.png"), own(), boxes).shape == (128, 96, 3)
    assert pose.view(image, Path("a.png"), own(), None).max() > 200


# ------------------------------------------------------------------------------------------------
# Pictures

def skeleton(x, y, seen):
    """17 joints, the named ones at a place each that score 1, the others 0."""
    joints = np.zeros((17, 3))
    for i, name in enumerate(seen):
        joints[udp.KEYPOINTS.index(name)] = (x + 20 * i, y, 1)
    return joints


def test_limbs_have_the_colours_of_their_side():
    """Left, right, and what joins both; a limb needs both its ends, a joint more than 0.2."""
    for names, colour in ((("left_knee", "left_ankle"), pose.LEFT),
                          (("right_knee", "right_ankle"), pose.RIGHT),
                          (("left_hip", "right_hip"), pose.MIDDLE)):
        image = Image.new("RGB", (100, 50))
        pose.draw_skeleton(image, skeleton(30, 20, names))
        assert np.asarray(image)[20, 40].tolist() == list(colour)
        joints = skeleton(30, 20, names)
        joints[joints[:, 2] > 0, 2] = [1, 0.2]
        alone = Image.new("RGB", (100, 50))
        pose.draw_skeleton(alone, joints)
        assert np.asarray(alone)[20, 40].tolist() == [0, 0, 0]
        drawn = np.asarray(alone).any(axis=(0, 2)).nonzero()[0]
        assert len(drawn) and drawn.max() - drawn.min() < 10               # the one joint


def test_sheet_columns(tmp_path):
    """Truth, prediction, heatmaps: twice the picture with a skeleton, once with colours over it."""
    crop, heatmaps = torch.zeros(3, 192, 100), torch.zeros(17, 48, 25)
    heatmaps[3, 24, 12] = 1
    truth = skeleton(30, 50, ("left_knee", "left_ankle"))
    joints = torch.from_numpy(skeleton(30, 150, ("left_knee", "left_ankle")))
    pose.save_sheet(tmp_path / "s.png", [(crop, torch.from_numpy(truth), joints, heatmaps)])
    sheet, top = read_png(tmp_path / "s.png"), draw.TEXT_HEIGHT + 4
    assert sheet.shape[1] == 300
    rows = sheet[top:top + 192]
    assert rows[50, 40].tolist() == list(pose.LEFT) == rows[150, 140].tolist()
    assert not rows[150, :100].any() and not rows[50, 100:200].any()
    assert rows[:, 200:, 0].sum(axis=1).argmax() in range(92, 104)         # red at the peak
    assert colours(sheet[top + 196:]) >= {pose.LEFT, pose.RIGHT, pose.MIDDLE}


def test_people_on_a_picture(tmp_path):
    """Joints and boxes are scaled with a small picture; a box of the whole picture is not drawn."""
    people = [(skeleton(10, 20, ("left_knee", "left_ankle")), (5, 10, 40, 30))]
    pose.save_people(tmp_path / "p.png", np.zeros((64, 96, 3), np.uint8), people)
    picture = read_png(tmp_path / "p.png")               # 3 times as large
    assert np.abs(picture[61, 90] - np.array(pose.LEFT)).max() == 0
    assert picture[30, 15].tolist() == picture[119, 134].tolist() == [255] * 3
    pose.save_people(tmp_path / "w.png", np.zeros((64, 96, 3), np.uint8),
                     [(np.zeros((17, 3)), (0, 0, 96, 64))])
    assert not read_png(tmp_path / "w.png")[:192, :288].any()
