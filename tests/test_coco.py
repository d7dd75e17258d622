"""People as samples: COCO's rules, the crop that belongs to the joints, bad files, embedded scenes.

    pytest tests/test_pose_data.py
"""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
from ops import errors
import eval as eval_command
from ops import oks
from ops import udp as pose
from sets import coco as pose_data
from tasks import recipes
from sets import shapes
import train
from ops.errors import InputError

CROP = (64, 48)
SIZE = (80, 100)                 # of the images of the miniature set, height and width
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


def write_set(root, annotations=None, images=None, content=None):
    """A folder of two dark images, white dot at the nose, red one at the left wrist; its recipe."""
    images = images or [image_entry(9, "b.png"), image_entry(7, "a.png")]
    annotations = [person(1), person(2, 9)] if annotations is None else annotations
    content = content or {"images": images, "annotations": annotations, "categories": []}
    (root / "annotations").mkdir(exist_ok=True)
    picture = np.full((*SIZE, 3), 30, np.uint8)
    picture[19:22, 39:42] = 255
    picture[49:52, 59:62, 0] = 255
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
        for name in ("a.png", "b.png"):
            Image.fromarray(picture).save(root / "images" / split / name)
    return {"dataset": "folder", "data": str(root), "crop": CROP[0], "crop_width": CROP[1],
            "boxes": None, "seed": 0}


def write_boxes(root, entries):
    """A detections file; the key that names it."""
    (root / "found.json").write_text(json.dumps(entries))
    return {"boxes": str(root / "found.json")}


def detection(image=7, **changes):
    """An entry of a detections file."""
    return {"image_id": image, "category_id": 1, "bbox": [-3.5, 2, 30, 90], "score": 0.003,
            **changes}


# ------------------------------------------------------------------------------------------------
# Which people

def test_people_come_in_file_order_image_by_image(tmp_path):
    """Image 9 is first in the file, so is its person; hidden and visible joints count alike."""
    dataset = pose_data.open_dataset(write_set(tmp_path), "val")
    assert len(dataset) == 2
    assert [dataset[0, i]["image_id"] for i in (0, 1)] == [9, 7]
    assert dataset.name(0) == str(tmp_path / "images" / "val" / "b.png")
    assert (dataset.people.keypoints[:, :, 2] == 1).all()
    assert (dataset.people.keypoints[0, :, :2] == np.array(JOINTS)[:, :2]).all()
    assert dataset.people.boxes.tolist() == [[20, 12, 64, 76]] * 2


@pytest.mark.parametrize("changes", [
    {"bbox": None}, {"keypoints": None}, {"iscrowd": 1}, {"num_keypoints": 0}, {"category_id": 2},
    {"keypoints": [0] * 51}, {"keypoints": [0] * 51, "num_keypoints": None},
    {"bbox": [20, 12, 0, 9]}, {"bbox": [99.2, 12, 0.8, 9]}, {"bbox": [20, 12, 9, -3]}])
def test_unusable_people_are_left_out(tmp_path, changes):
    """mmpose's rules: no box, no joints, a crowd, an empty box, also after clipping."""
    dataset = pose_data.open_dataset(write_set(tmp_path, [person(1, **changes), person(5)]), "val")
    assert len(dataset) == 1 and dataset.people.image.tolist() == [1]


def test_a_missing_count_is_no_reason_to_drop_a_person(tmp_path):
    """Without num_keypoints the placed joints are counted; without iscrowd nobody is a crowd."""
    someone = person(1, num_keypoints=None, iscrowd=None, keypoints=[5, 6, 2] * 3 + [0] * 42)
    dataset = pose_data.open_dataset(write_set(tmp_path, [someone]), "val")
    assert dataset.annotations["annotations"][0]["num_keypoints"] == 3
    assert dataset.people.keypoints[0, :, 2].tolist() == [1] * 3 + [0] * 14


def test_annotations_keep_everyone_who_matters_for_scoring(tmp_path):
    """Crowds and people without joints stay, areas too; other categories go; none in training."""
    entries = [person(1), person(2, iscrowd=1), person(3, num_keypoints=0),
               person(4, keypoints=None, num_keypoints=None), person(5, category_id=3)]
    spec = write_set(tmp_path, entries)
    kept = pose_data.open_dataset(spec, "val").annotations
    assert [entry["id"] for entry in kept["annotations"]] == [1, 2, 3, 4]
    assert [entry["num_keypoints"] for entry in kept["annotations"]] == [17, 17, 0, 0]
    assert kept["annotations"][0] == {k: v for k, v in person(1).items() if k != "segmentation"}
    assert [image["id"] for image in kept["images"]] == [9, 7]
    assert pose_data.open_dataset(spec, "train").annotations is None


def test_detections_are_taken_as_they_are(tmp_path):
    """In the file's order, unclipped, whatever their score; only people; validation only."""
    found = [detection(), detection(9, score=0.5), detection(category_id=18), detection(9)]
    spec = write_set(tmp_path) | write_boxes(tmp_path, found)
    dataset = pose_data.open_dataset(spec, "val")
    assert dataset.boxes == "found.json" and len(dataset) == 3
    samples = [dataset[0, i] for i in range(3)]
    assert [(s["image_id"], s["score"], s["id"]) for s in samples] == [(7, 0.003, 0), (9, 0.5, 1),
                                                                       (9, 0.003, 2)]
    assert dataset.people.boxes[0].tolist() == [-3.5, 2, 26.5, 92]
    assert (samples[0]["target"][:, 2] == 0).all()
    assert samples[0]["center"].tolist() == [11.5, 47] and samples[0]["scale"][1] == 90 * 1.25
    assert len(pose_data.open_dataset(spec, "train")) == 2
    assert pose_data.open_dataset(spec | {"boxes": None}, "val").boxes == "ground-truth boxes"


# ------------------------------------------------------------------------------------------------
# Samples

def test_evaluation_sample(tmp_path):
    """The crop shows the padded box; its target goes back to the annotated joints."""
    dataset = pose_data.open_dataset(write_set(tmp_path), "val")
    sample = dataset[0, 1]
    assert sample["image"].shape == (3, *CROP) and sample["image"].dtype == torch.float32
    assert sample["target"].shape == (17, 3) and sample["target"].dtype == torch.float32
    assert sample["name"].endswith("a.png") and (sample["score"], sample["id"]) == (1.0, 1)
    assert sample["center"].tolist() == [42, 44] and sample["scale"].tolist() == [60, 80]
    back = pose.to_image(sample["target"][None, :, :2].double(), sample["center"][None],
                         sample["scale"][None], CROP)
    assert np.abs(back[0].numpy() - np.array(JOINTS)[:, :2]).max() < 1e-4
    x, y = sample["target"][0, :2].round().long().tolist()
    assert sample["image"][:, y, x].min() > 0.99 and sample["image"].mean() < 0.2
    assert dataset[3, 1]["target"].equal(sample["target"])        # the epoch plays no part


def test_evaluation_samples_are_collated(tmp_path):
    """A loader stacks what evaluation needs."""
    dataset = pose_data.open_dataset(write_set(tmp_path), "val")
    batch = next(iter(data.eval_loader(dataset, 2, 0)))
    assert batch["image"].shape == (2, 3, *CROP) and batch["scale"].shape == (2, 2)
    assert batch["image_id"].tolist() == [9, 7] and batch["id"].tolist() == [0, 1]
    assert batch["scale"].dtype == torch.float64


def test_training_sample_depends_on_seed_epoch_and_index(tmp_path):
    """The same key gives the same sample, another epoch, index or seed another one."""
    spec = write_set(tmp_path)
    dataset = pose_data.open_dataset(spec, "train")
    first, again = dataset[3, 1], dataset[3, 1]
    assert first["image"].equal(again["image"]) and first["target"].equal(again["target"])
    other_seed = pose_data.open_dataset(spec | {"seed": 1}, "train")
    for other in (dataset[4, 1], dataset[3, 0], other_seed[3, 1]):
        assert not first["target"].equal(other["target"])
    assert set(first) == {"image", "target", "name"}


def test_augmented_joints_stay_on_their_pixels(tmp_path):
    """Flipped, cut, shifted, zoomed or turned, dots of the picture stay where the joints are.

    About half of the samples are mirrored: the dot of the left wrist is then at the right one.
    """
    dataset = pose_data.open_dataset(write_set(tmp_path), "train")
    noses, wrists = 0, []
    for epoch in range(80):
        sample = dataset[epoch, 0]
        red, green, _ = sample["image"]
        for joints, dot in (((0,), green - 30 / 255), ((9, 10), red - green)):
            at = torch.nonzero(dot > 0.3).double().mean(dim=0).flip(0)       # nan if there is none
            if not ((at > 5) & (at < torch.tensor([CROP[1] - 6, CROP[0] - 6]))).all():
                continue
            distance, nearest = (sample["target"][joints, :2] - at).norm(dim=1).min(dim=0)
            assert distance < 0.8
            noses += len(joints) == 1
            wrists += [nearest.item()] * (len(joints) == 2)
    assert noses > 40 and len(wrists) > 40 and 0.35 < np.mean(wrists) < 0.65


def test_check_opens_images_and_says_what_the_boxes_are(tmp_path):
    """One line: how many people on how many images, from which boxes, how large."""
    dataset = pose_data.open_dataset(write_set(tmp_path), "val")
    assert dataset.check() == (
        "2 people on 2 images, ground-truth boxes: 64 to 64 pixels high, 17.0 joints labelled; "
        "2 images opened")
    (tmp_path / "images" / "val" / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="b.png cannot be decoded"):
        dataset.check()


# ------------------------------------------------------------------------------------------------
# Layouts and bad input

@pytest.mark.parametrize("prefix", ["", "images"])
def test_coco_layout(tmp_path, prefix):
    """As released, images beside the annotations or below images/."""
    spec = write_set(tmp_path) | {"dataset": "coco"}
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"{split}.json").rename(
            tmp_path / "annotations" / f"person_keypoints_{split}2017.json")
        (tmp_path / "images" / split).rename(tmp_path / prefix / f"{split}2017")
        dataset = pose_data.open_dataset(spec, split)
        assert dataset.name(0) == str(tmp_path / prefix / f"{split}2017" / "b.png")
        assert dataset[0, 0]["image"].shape == (3, *CROP)


def test_paths_replace_the_layout(tmp_path):
    """With an annotation file and a folder of images --data isn't needed."""
    spec = write_set(tmp_path) | {"data": None}
    spec |= {"val_json": str(tmp_path / "annotations" / "train.json"),
             "images": str(tmp_path / "images" / "train")}
    dataset = pose_data.open_dataset(spec, "val")
    assert dataset.name(1) == str(tmp_path / "images" / "train" / "a.png")
    with pytest.raises(InputError, match="needs --data"):
        pose_data.open_dataset(spec, "train")


@pytest.mark.parametrize("entry,named", [
    (person(8, image=70), "annotation 8: image_id 70 is not among"),
    (person(8, keypoints=[1] * 48),
     r"annotation 8: keypoints is .*\(48 values\), but should be a list of 51"),
    (person(8, keypoints=["x"] * 51), "annotation 8: keypoints is .* a list of 51 finite numbers"),
    (person(8, keypoints=[float("nan")] * 51),
     "annotation 8: keypoints is .*nan.* a list of 51 finite numbers"),
    (person(8, bbox=[1, 2, 3]), r"annotation 8: bbox is .*\(3 values\), but should be a list of 4"),
    (person(8, bbox="all"),
     "annotation 8: bbox is 'all', but should be a list of 4 finite numbers"),
    (person(8, area=None), "annotation 8: area is None, but should be a finite number"),
    (person(8, bbox=[120, 5, 9, 9]), r"annotation 8: its box \[120, 5, 9, 9\].*image 7, 100x80"),
    (person(8, bbox=[5, -30, 9, 9]), "annotation 8: its box.*is outside image 7"),
    (person("8"), "annotation number 1: an annotation is an object with an integer id"),
    ("text", "annotation number 1: an annotation is an object")])
def test_bad_annotations_are_named(tmp_path, entry, named):
    """File, annotation and what would be right, in one line."""
    spec = write_set(tmp_path, [person(1), entry])
    with pytest.raises(InputError, match=named) as error:
        pose_data.open_dataset(spec, "train")
    assert "train.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("images,named", [
    ([image_entry(7, "a.png"), image_entry(7, "b.png")], "image 7 is there twice"),
    ([image_entry(7, "a.png", height=1)], "image 7 is 100x1: both sides must be 2"),
    ([image_entry(7, "a.png", width="80")], "image number 0: width must be there, an integer"),
    ([{"id": 7, "width": 5, "height": 5}], "image number 0: file_name must be there, a text"),
    ([image_entry(7, "c.png")], "c.png does not exist .1 of 1 images of .*train.json are missing")])
def test_bad_images_are_named(tmp_path, images, named):
    """An image twice, too small, half described or without its file."""
    with pytest.raises(InputError, match=named):
        pose_data.open_dataset(write_set(tmp_path, [person(1)], images), "train")


@pytest.mark.parametrize("content,named", [
    ([1, 2], "is no COCO keypoint file: it must be an object with the lists"),
    ({"images": {}, "annotations": []}, "is no COCO keypoint file"),
    ({"annotations": []}, "is no COCO keypoint file"),
    ({"images": [image_entry(7, "a.png")], "annotations": [person(1, iscrowd=1)]},
     "holds no usable person")])
def test_files_without_people_are_refused(tmp_path, content, named):
    """A json of another kind, or one in which nobody is left."""
    with pytest.raises(InputError, match=f"train.json {named}"):
        pose_data.open_dataset(write_set(tmp_path, content=content), "train")


def test_missing_and_broken_files_are_named(tmp_path):
    """No json, broken json, no folder of images."""
    spec = write_set(tmp_path)
    (tmp_path / "annotations" / "val.json").write_text("{")
    with pytest.raises(InputError, match="val.json is not valid JSON"):
        pose_data.open_dataset(spec, "val")
    (tmp_path / "annotations" / "val.json").unlink()
    with pytest.raises(InputError, match="val.json does not exist"):
        pose_data.open_dataset(spec, "val")
    with pytest.raises(InputError, match="train2017 does not exist: see the layouts"):
        pose_data.open_dataset(spec | {"dataset": "coco"}, "train")


@pytest.mark.parametrize("entry,named", [
    (detection(70), "entry number 1: image_id 70 is not in .*val.json"),
    (detection(bbox=[1, 2, 3]), "entry number 1: bbox is .* a list of 4 finite numbers"),
    (detection(bbox=[1, 2, 0, 3]), "entry number 1: its box is 0 wide and 3 high"),
    (detection(score=None), "entry number 1: score is None, but should be a finite number"),
    ([1], "is no detections file: it must be a list")])
def test_bad_detections_are_named(tmp_path, entry, named):
    """File, entry and what would be right."""
    spec = write_set(tmp_path) | write_boxes(tmp_path, [detection(), entry])
    with pytest.raises(InputError, match=f"found.json.*{named}"):
        pose_data.open_dataset(spec, "val")


def test_an_image_of_another_size_is_refused_when_loaded(tmp_path):
    """The joints of another version of the picture would be off."""
    dataset = pose_data.open_dataset(write_set(tmp_path), "val")
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "val" / "a.png")
    with pytest.raises(InputError, match="a.png is 50x40, in the annotations 100x80"):
        dataset[0, 1]


# ------------------------------------------------------------------------------------------------
# Embedded scenes

class Silhouettes(pose_data.ShapesPose):
    """Scenes whose picture is white where people are; hidden joints count as unlabelled."""

    def render(self, seed):
        scene = super().render(seed)
        mask = (scene.label == shapes.PERSON)[..., None].repeat(3, axis=2)
        keypoints = scene.keypoints * (scene.keypoints[:, :, 2:] == 2)
        return replace(scene, image=(255 * mask).astype(np.uint8), keypoints=keypoints)


@pytest.mark.parametrize("training", [True, False])
def test_joints_of_scenes_land_on_people(training):
    """Visible joints of a sample lie on a person's pixels of its crop, augmented or not."""
    dataset = Silhouettes(20, training=training, crop=(96, 72), size=96, seed=1)
    on, total = 0, 0
    for index in range(20):
        sample = dataset[2, index]
        for x, y, labelled in sample["target"].round().long().tolist():
            if labelled and 0 <= x < 72 and 0 <= y < 96:
                on += sample["image"][0, y, x].item() > 0.3
                total += 1
    assert total > 100 and on > 0.97 * total
    assert 0.03 < sample["image"].mean() < 0.9


def test_training_scenes_are_new_in_every_epoch_and_reproducible():
    """The key alone decides; training never meets the seeds of the validation scenes."""
    dataset = pose_data.ShapesPose(5, training=True, crop=CROP, size=48)
    first, again, other = dataset[0, 2], dataset[0, 2], dataset[1, 2]
    assert len(dataset) == 5 and first["image"].equal(again["image"])
    assert first["name"] == "scene 2" and other["name"] == "scene 7"
    last = max(dataset.scene_seed((10 ** 6, 4), attempt) for attempt in range(16))
    assert last < data.VAL_SEED
    assert pose_data.ShapesPose(5, training=True, crop=CROP, size=48, seed=1).scene_seed(
        (0, 0)) > data.VAL_SEED + 10 ** 9


def test_scenes_without_a_visible_person_are_skipped(monkeypatch):
    """Further seeds are tried in a fixed order."""
    dataset = pose_data.ShapesPose(5, training=True, crop=CROP, size=48)
    render = pose_data.shapes.render

    def hide(seed, height, width):
        scene = render(seed, height, width)
        return scene if seed > 100 else replace(scene, keypoints=scene.keypoints * [1, 1, 0.5])

    monkeypatch.setattr(pose_data.shapes, "render", hide)
    assert dataset[0, 3]["name"] == f"scene {3 + data.VAL_SEED // 16}"


def test_validation_scenes_are_fixed_and_everyone_in_them_is_annotated():
    """Independent of the run's seed; ids count from 1; samples point to their images."""
    sets = [pose_data.ShapesPose(12, training=False, crop=CROP, size=64, seed=s) for s in (0, 1)]
    scenes = [shapes.render(data.VAL_SEED + i, 64, 64) for i in range(12)]
    people = [p for scene in scenes for p in scene.keypoints]
    truth = sets[0].annotations
    assert truth == sets[1].annotations and len(sets[0]) <= len(people)
    assert len(people) > 12                          # some scene shows two
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(people) + 1))
    assert [a["num_keypoints"] for a in truth["annotations"]] == [(p[:, 2] > 0).sum()
                                                                  for p in people]
    assert [a["area"] for a in truth["annotations"]] == [x for s in scenes for x in s.areas]
    assert [i["id"] for i in truth["images"]] == list(range(1, 13))
    sample = sets[0][0, len(sets[0]) - 1]
    assert sample["image_id"] == 12 and sample["score"] == 1
    assert sample["name"] == f"scene {data.VAL_SEED + 11}"
    assert sets[0].check() == f"{len(sets[0])} people in 12 scenes of 64x64 pixels"


def test_perfect_heatmaps_score_one(capsys):
    """Targets decoded and sent back to the image get AP 1 from pycocotools on the annotations."""
    dataset = pose_data.ShapesPose(6, training=False, crop=(256, 192), size=96)
    results = []
    for batch in data.eval_loader(dataset, 4, 0):
        maps, _ = pose.heatmap_targets(batch["target"], (256, 192), (64, 48), 2)
        xy, score = pose.decode(maps, 11)
        xy = pose.to_image(xy, batch["center"], batch["scale"], (64, 48))
        results += [{"image_id": image, "category_id": 1, "score": 1.0, "keypoints": joints}
                    for image, joints in zip(batch["image_id"].tolist(), torch.cat(
                        [xy, score[..., None]], dim=-1).flatten(1).tolist())]
    truth = COCO()
    truth.dataset = json.loads(json.dumps(dataset.annotations))
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert len(results) >= 6 and evaluation.stats[0] > 0.999


# ------------------------------------------------------------------------------------------------
# The commands

SMALL = ["--backbone", "tiny", "--unet-channels", "32", "32", "64", "64", "--vae-channels", "32",
         "32", "32", "32", "--context-dim", "16", "--num-prompts", "4", "--deconv-channels", "8",
         "--refine-steps", "2", "--batch", "2", "--micro-batch", "2", "--precision", "float32",
         "--workers", "0", "--log-every", "1", "--iterations", "2", "--save-every", "1",
         "--eval-every", "2", "--crop", "128", "--crop-width", "64", "--sigma", "1"]


def test_a_miniature_set_trains_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    """The real commands on a COCO-format folder: train, resume, evaluate on both kinds of boxes."""
    write_set(tmp_path)
    out, boxes = tmp_path / "run", write_boxes(tmp_path, [detection(score=0.9)])["boxes"]
    for command, flags in (
            (train.main, ["--task", "pose", "--dataset", "folder", "--data", str(tmp_path), *SMALL,
                          "--out", str(out)]),
            (train.main, ["--resume", str(out)]),
            (eval_command.main, ["--checkpoint", str(out), "--workers", "0", "--precision",
                                 "float32"]),
            (eval_command.main, ["--checkpoint", str(out), "--workers", "0", "--precision",
                                 "float32", "--boxes", boxes, "--out", str(tmp_path / "found")])):
        monkeypatch.setattr("sys.argv", ["command", *flags])
        errors.run_command(command)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert {"mse", "loss"} <= records[0].keys() and {"AP", "AR", "PCK"} <= records[-1].keys()
    report = json.loads((out / "eval" / "metrics.json").read_text())
    assert report["images"] == 2 and report["PCK"] == pytest.approx(records[-1]["PCK"])
    found = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert found["images"] == 1 and "PCK" not in found
    assert [r["image_id"] for r in oks.read_results(tmp_path / "found" / "keypoints.json")] == [7]
    assert "(found.json)" in capsys.readouterr().out


def test_the_embedded_people_train_and_evaluate(tmp_path, monkeypatch, capsys):
    """`train.py --task pose` needs no files; eval.py on its run prints the same figures."""
    out = tmp_path / "run"
    for command, flags in (
            (train.main, ["--task", "pose", *SMALL, "--val-scenes", "2", "--out", str(out)]),
            (eval_command.main, ["--checkpoint", str(out), "--workers", "0", "--precision",
                                 "float32"])):
        monkeypatch.setattr("sys.argv", ["command", *flags])
        errors.run_command(command)
    record = [json.loads(line) for line in (out / "metrics.jsonl").open()][-1]
    report = json.loads((out / "eval" / "metrics.json").read_text())
    assert report["images"] >= 2 and report["AP"] == pytest.approx(record["AP"])
    assert (out / "pictures" / "step_000002.png").is_file()


@pytest.mark.slow
def test_the_full_recipe_takes_a_step_in_bfloat16(tmp_path):
    """COCO's recipe at SD1.5's width, 576 x 448, T = 3: one optimiser step, in less than 22 GB."""
    recipe = replace(recipes.RECIPES["pose", "coco"], backbone="tiny", init="random", batch=2,
                     micro_batch=2, out=str(tmp_path))
    recipes.check(recipe)
    torch.manual_seed(0)
    model = train.build_model(recipe, ())
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    optimizer = train.build_optimizer(model, recipe)
    people = pose_data.ShapesPose(2, training=True, crop=(576, 448), size=448)
    batch = next(iter(data.train_loader(people, 2, 0, 0, 0)))
    before = model.prompts.detach().clone()
    losses = train.train_step(model.loss, optimizer, iter([batch]), recipe, 400,
                              torch.device("cpu"), torch.bfloat16)
    peak = train.peak_gb(torch.device("cpu"))
    print(f"loss {losses['loss']:.6f}, peak memory {peak:.1f} GB")
    assert losses["loss"] > 0 and not torch.equal(before, model.prompts)
    assert sum(p.numel() for p in model.parameters()) > 859_520_964 + 34_000_000
    assert peak < 22


def test_without_augmentation_training_sees_the_crops_of_evaluation(tmp_path):
    """--no-augment: every epoch the same crop, the one that is evaluated."""
    spec = {**write_set(tmp_path), "augment": False}
    train_set, val_set = (pose_data.open_dataset(spec, split) for split in ("train", "val"))
    for epoch in (0, 1):
        sample, expected = train_set[epoch, 0], val_set[0, 0]
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["target"], expected["target"])
