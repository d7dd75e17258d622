"""People on files as samples: COCO's rules, the crop that belongs to the joints, bad files.

    pytest tests/test_coco.py
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image
from trees import JOINTS, detection, image_entry, make_coco, make_people, person, write_boxes

import data
import eval as evaluation
import train
from ops import udp
from ops.errors import InputError, run_command
from sets.coco import Coco, PoseFolder, read_boxes, read_coco
from sets.embedded import PoseScenes
from sets.files import Cut
from tasks.recipes import RECIPES, check

CROP = (64, 48)


def opened(root, split="val", seed=0, **options):
    """A split of a set of one's own."""
    return PoseFolder(str(root), **options).open(Cut(split, CROP, None, seed))


# ------------------------------------------------------------------------------------------------
# Which people

def test_people_come_in_file_order_image_by_image(tmp_path):
    """Image 9 is first in the file, so is its person; hidden and visible joints count alike."""
    dataset = opened(make_people(tmp_path))
    assert len(dataset) == 2
    assert [dataset[0, i]["image_id"] for i in (0, 1)] == [9, 7]
    assert dataset.name(0) == str(tmp_path / "images" / "val" / "b.png")
    assert (dataset.people.keypoints[:, :, 2] == 1).all()
    assert (dataset.people.keypoints[0, :, :2] == np.array(JOINTS)[:, :2]).all()
    assert dataset.people.boxes.tolist() == [[20, 12, 64, 76]] * 2


@pytest.mark.parametrize("changes", [
    {"bbox": None}, {"keypoints": None, "num_keypoints": None}, {"iscrowd": 1},
    {"num_keypoints": 0}, {"category_id": 2},
    {"keypoints": [0] * 51, "num_keypoints": 0}, {"keypoints": [0] * 51, "num_keypoints": None},
    {"bbox": [20, 12, 0, 9]}, {"bbox": [99.2, 12, 0.8, 9]}, {"bbox": [20, 12, 9, -3]}])
def test_unusable_people_are_left_out(tmp_path, changes):
    """mmpose's rules: no box, no joints, a crowd, an empty box, also after clipping."""
    dataset = opened(make_people(tmp_path, [person(1, **changes), person(5)]))
    assert len(dataset) == 1 and dataset.people.image.tolist() == [1]


def test_a_missing_count_is_no_reason_to_drop_a_person(tmp_path):
    """Without num_keypoints the placed joints are counted; without iscrowd nobody is a crowd."""
    someone = person(1, num_keypoints=None, iscrowd=None, keypoints=[5, 6, 2] * 3 + [0] * 42)
    dataset = opened(make_people(tmp_path, [someone]))
    assert dataset.annotations["annotations"][0]["num_keypoints"] == 3
    assert dataset.people.keypoints[0, :, 2].tolist() == [1] * 3 + [0] * 14


def test_annotations_keep_everyone_who_matters_for_scoring(tmp_path):
    """Crowds and people without joints stay, areas too; other categories go; none in training."""
    entries = [person(1), person(2, iscrowd=1), person(3, num_keypoints=0),
               person(4, keypoints=None, num_keypoints=None), person(5, category_id=3)]
    make_people(tmp_path, entries)
    kept = opened(tmp_path).annotations
    assert [entry["id"] for entry in kept["annotations"]] == [1, 2, 3, 4]
    assert [entry["num_keypoints"] for entry in kept["annotations"]] == [17, 17, 0, 0]
    assert kept["annotations"][0] == {k: v for k, v in person(1).items() if k != "segmentation"}
    assert [image["id"] for image in kept["images"]] == [9, 7]
    assert opened(tmp_path, "train").annotations is None


def test_detections_are_taken_as_they_are(tmp_path):
    """In the file's order, unclipped, whatever their score; only people; validation only."""
    found = [detection(), detection(9, score=0.5), detection(category_id=18), detection(9)]
    boxes = write_boxes(make_people(tmp_path), found)
    dataset = opened(tmp_path, boxes=boxes)
    assert dataset.boxes == "found.json" and len(dataset) == 3
    samples = [dataset[0, i] for i in range(3)]
    assert [(s["image_id"], s["score"], s["id"]) for s in samples] == [(7, 0.003, 0), (9, 0.5, 1),
                                                                       (9, 0.003, 2)]
    assert dataset.people.boxes[0].tolist() == [-3.5, 2, 26.5, 92]
    assert (samples[0]["target"][:, 2] == 0).all()
    assert samples[0]["center"].tolist() == [11.5, 47] and samples[0]["scale"][1] == 90 * 1.25
    assert len(opened(tmp_path, "train", boxes=boxes)) == 2
    assert opened(tmp_path).boxes == "ground-truth boxes"


# ------------------------------------------------------------------------------------------------
# Samples

def test_evaluation_sample(tmp_path):
    """The crop shows the padded box; its target goes back to the annotated joints."""
    dataset = opened(make_people(tmp_path))
    sample = dataset[0, 1]
    assert sample["image"].shape == (3, *CROP) and sample["image"].dtype == torch.float32
    assert sample["target"].shape == (17, 3) and sample["target"].dtype == torch.float32
    assert sample["name"].endswith("a.png") and (sample["score"], sample["id"]) == (1.0, 1)
    assert sample["center"].tolist() == [42, 44] and sample["scale"].tolist() == [60, 80]
    back = udp.to_image(sample["target"][None, :, :2].double(), sample["center"][None],
                         sample["scale"][None], CROP)
    assert np.abs(back[0].numpy() - np.array(JOINTS)[:, :2]).max() < 1e-4
    x, y = sample["target"][0, :2].round().long().tolist()
    assert sample["image"][:, y, x].min() > 0.99 and sample["image"].mean() < 0.2
    assert dataset[3, 1]["target"].equal(sample["target"])        # the epoch plays no part


def test_evaluation_samples_are_collated(tmp_path):
    """A loader stacks what evaluation needs."""
    dataset = opened(make_people(tmp_path))
    (batch,), _ = next(iter(data.eval_loader(dataset, 2, 0)))
    assert batch["image"].shape == (2, 3, *CROP) and batch["scale"].shape == (2, 2)
    assert batch["image_id"].tolist() == [9, 7] and batch["id"].tolist() == [0, 1]
    assert batch["scale"].dtype == torch.float64


def test_training_sample_depends_on_seed_epoch_and_index(tmp_path):
    """The same key gives the same sample, another epoch, index or seed another one."""
    dataset = opened(make_people(tmp_path), "train")
    first, again = dataset[3, 1], dataset[3, 1]
    assert first["image"].equal(again["image"]) and first["target"].equal(again["target"])
    other_seed = opened(tmp_path, "train", seed=1)
    for other in (dataset[4, 1], dataset[3, 0], other_seed[3, 1]):
        assert not first["target"].equal(other["target"])
    assert set(first) == {"image", "target", "name"}


def test_augmented_joints_stay_on_their_pixels(tmp_path):
    """Flipped, cut, shifted, zoomed or turned, dots of the picture stay where the joints are.

    About half of the samples are mirrored: the dot of the left wrist is then at the right one.
    """
    dataset = opened(make_people(tmp_path), "train")
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


def test_without_augmentation_training_sees_the_crops_of_evaluation(tmp_path):
    """--no-augment: every epoch the same crop, the one that is evaluated."""
    make_people(tmp_path)
    train_set, val_set = (opened(tmp_path, split, augment=False) for split in ("train", "val"))
    for epoch in (0, 1):
        sample, expected = train_set[epoch, 0], val_set[0, 0]
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["target"], expected["target"])


def test_check_opens_images_and_says_what_the_boxes_are(tmp_path):
    """One line: how many people on how many images, from which boxes, how large."""
    dataset = opened(make_people(tmp_path))
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
    make_coco(tmp_path, prefix)
    for split in ("train", "val"):
        dataset = Coco(str(tmp_path)).open(Cut(split, CROP, None, 0))
        assert dataset.name(0) == str(tmp_path / prefix / f"{split}2017" / "b.png")
        assert dataset[0, 0]["image"].shape == (3, *CROP)


def test_paths_replace_the_layout(tmp_path):
    """With an annotation file and a folder of images --data isn't needed."""
    make_people(tmp_path)
    files = PoseFolder(val_json=str(tmp_path / "annotations" / "train.json"),
                       images=str(tmp_path / "images" / "train"))
    dataset = files.open(Cut("val", CROP, None, 0))
    assert dataset.name(1) == str(tmp_path / "images" / "train" / "a.png")
    with pytest.raises(InputError, match="--data is missing"):
        files.open(Cut("train", CROP, None, 0))


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
    (person(8, keypoints=[0] * 51), "annotation 8: .*num_keypoints 17: .*labels some"),
    (person(8, area=None), "annotation 8: area is None, but should be a finite number"),
    (person(8, bbox=[120, 5, 9, 9]), r"annotation 8: its box \[120, 5, 9, 9\].*image 7, 100x80"),
    (person(8, bbox=[5, -30, 9, 9]), "annotation 8: its box.*is outside image 7"),
    (person(8, category_id="1"), "annotation number 1: category_id must be there, an integer"),
    (person(8, category_id=True), "annotation number 1: category_id must be there, an integer"),
    (person(8, num_keypoints=-1), "annotation 8: .* num_keypoints 0 to 17"),
    (person(8, num_keypoints=0.5), "annotation 8: .* num_keypoints 0.5: iscrowd is 0 or 1, num_k"),
    (person(8, iscrowd=2), "annotation 8: iscrowd 2, area 1500.5, .*: iscrowd is 0 or 1"),
    (person(8, area=0), "annotation 8: iscrowd 0, area 0, .* has an area above 0"),
    (person(8, area=-3.5), "annotation 8: iscrowd 0, area -3.5"),
    (person(8, keypoints=[50, 40, 2] * 16 + [1e6, 40, 1]),
     r"annotation 8: a joint is \(1000000.0, 40, 1\): .* in or near its image, 100x80"),
    (person(8, keypoints=[50, 40, 2] * 16 + [50, -81, 2]), r"a joint is \(50, -81, 2"),
    (person(8, keypoints=[50, 40, 3] * 17), "annotation 8: a joint is .*: v is 0, 1 or 2"),
    (person("8"), "annotation number 1: id must be there, an integer"),
    ("text", "annotation number 1: id must be there")])
def test_bad_annotations_are_named(tmp_path, entry, named):
    """File, annotation and what would be right, in one line."""
    make_people(tmp_path, [person(1), entry])
    with pytest.raises(InputError, match=named) as error:
        opened(tmp_path, "train")
    assert "train.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("images,named", [
    ([image_entry(7, "a.png"), image_entry(7, "b.png")], "image 7 is there twice"),
    ([image_entry(7, "a.png"), image_entry(8, "a.png")], "image a.png is there twice: each file"),
    ([image_entry(7, "a.png", height=1)], "image 7 is 100x1: both sides must be 2"),
    ([image_entry(7, "a.png", width="80")], "image number 0: width must be there, an integer"),
    ([{"id": 7, "width": 5, "height": 5}], "image number 0: file_name must be there, a text"),
    ([image_entry(7, "c.png")], "c.png does not exist .1 of 1 images of .*train.json are missing")])
def test_bad_images_are_named(tmp_path, images, named):
    """An image twice, too small, half described or without its file."""
    with pytest.raises(InputError, match=named):
        opened(make_people(tmp_path, [person(1)], images), "train")


@pytest.mark.parametrize("content,named", [
    ([1, 2], "is no COCO file: it must be an object with the lists"),
    ({"images": {}, "annotations": []}, "is no COCO file"),
    ({"annotations": []}, "is no COCO file"),
    ({"images": [image_entry(7, "a.png")], "annotations": [person(1, iscrowd=1)]},
     "holds no usable person")])
def test_files_without_people_are_refused(tmp_path, content, named):
    """A json of another kind, or one in which nobody is left."""
    with pytest.raises(InputError, match=f"train.json {named}"):
        opened(make_people(tmp_path, content=content), "train")


def test_missing_and_broken_files_are_named(tmp_path):
    """No json, broken json, no folder of images."""
    make_people(tmp_path)
    (tmp_path / "annotations" / "val.json").write_text("{")
    with pytest.raises(InputError, match="val.json is not valid JSON"):
        opened(tmp_path)
    (tmp_path / "annotations" / "val.json").unlink()
    with pytest.raises(InputError, match="val.json does not exist"):
        opened(tmp_path)
    with pytest.raises(InputError, match="train2017 does not exist: see the layouts"):
        Coco(str(tmp_path)).open(Cut("train", CROP, None, 0))


@pytest.mark.parametrize("entry,named", [
    (detection(bbox=[1, 2, 3]), "bbox is .* a list of 4 finite numbers"),
    (detection(bbox=[1, 2, 0, 3]), "its box is 0 wide and 3 high"),
    (detection(bbox=[1, 2, float("inf"), 3]), "bbox is .* a list of 4 finite numbers"),
    (detection(score=None), "score is None, but should be a finite number"),
    (detection(score="0.9"), "score is '0.9', but should be a finite number"),
    (detection(score=10 ** 400), "score is 1000.*, but should be a finite number"),
    (detection(category_id="1"), "category_id must be there, an integer"),
    (detection("1"), "file_name .a text. or image_id .an integer. must be there")])
def test_bad_boxes_are_named(tmp_path, entry, named):
    """File, entry and what would be right."""
    with pytest.raises(InputError, match=f"found.json, entry number 1: {named}") as error:
        read_boxes(Path(write_boxes(tmp_path, [detection(), entry])))
    assert "\n" not in str(error.value)


def test_joints_need_not_lie_inside(tmp_path):
    """A labelled one a little outside is data, and an unlabelled one has no place."""
    joints = [50, 40, 2] * 15 + [130, -20, 1] + [1e6, 1e6, 0]
    assert len(opened(make_people(tmp_path, [person(1, keypoints=joints)]), "train")) == 1


@pytest.mark.parametrize("content,named", [
    ("[{]", "is not valid JSON"), ("[3]", "is no file of boxes: it must be a list of {image_id or"),
    ('{"a.png": 3}', "is no file of boxes")])
def test_files_of_another_kind_are_no_boxes(tmp_path, content, named):
    """Broken JSON, a list of something else, an object of something else."""
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(InputError, match=f"found.json {named}"):
        read_boxes(tmp_path / "found.json")


def test_boxes_by_image_or_by_name(tmp_path):
    """COCO's detections, the same with file names, or a list of boxes per name; others left out."""
    found = [detection(7, score=0.5), {"file_name": "sub/a.png", "bbox": [1, 2, 3, 4]},
             detection(category_id=18)]
    boxes = read_boxes(Path(write_boxes(tmp_path, found)))
    assert [(b["image"], b["score"]) for b in boxes] == [(7, 0.5), ("sub/a.png", 1.0)]
    boxes = read_boxes(Path(write_boxes(tmp_path, {"a.png": [[1, 2, 3, 4], [5, 6, 7, 8]]})))
    assert [(b["image"], b["bbox"]) for b in boxes] == [("a.png", [1, 2, 3, 4]),
                                                        ("a.png", [5, 6, 7, 8])]


def test_detections_must_be_of_the_annotations_images(tmp_path):
    """By id or by file name; another one is named with both files."""
    make_people(tmp_path)
    named = write_boxes(tmp_path, [{"file_name": "b.png", "bbox": [1, 2, 30, 40]}])
    assert opened(tmp_path, boxes=named).people.image.tolist() == [0]
    with pytest.raises(InputError, match="found.json, entry number 0: image 70 is not in .*val.js"):
        opened(tmp_path, boxes=write_boxes(tmp_path, [detection(70)]))


def test_an_image_of_another_size_is_refused_when_loaded(tmp_path):
    """The joints of another version of the picture would be off."""
    dataset = opened(make_people(tmp_path))
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "val" / "a.png")
    with pytest.raises(InputError, match="a.png is 50x40, in the annotations 100x80"):
        dataset[0, 1]


# ------------------------------------------------------------------------------------------------
# The commands

SMALL = [*TINY, "--backbone", "tiny", "--deconv-channels", "8", "--batch", "2", "--iterations", "2",
         "--save-every", "1", "--eval-every", "2", "--crop", "128", "--crop-width", "64", "--sigma",
         "1"]
EVALUATE = ["--workers", "0", "--precision", "float32"]


def run(command, monkeypatch, *flags):
    """A command line in this process."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, flags)])
    run_command(command)


def test_a_miniature_set_trains_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    """The real commands on a COCO-format folder: train, resume, evaluate on both kinds of boxes."""
    make_people(tmp_path)
    out = tmp_path / "run"
    run(train.main, monkeypatch, "--task", "pose", "--dataset", "folder", "--data", tmp_path,
        *SMALL, "--out", out)
    run(train.main, monkeypatch, "--resume", out)
    run(evaluation.main, monkeypatch, "--checkpoint", out, *EVALUATE)
    run(evaluation.main, monkeypatch, "--checkpoint", out, *EVALUATE, "--boxes",
        tmp_path / "found.json", "--out", tmp_path / "found")
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert {"mse", "loss"} <= records[0].keys() and {"AP", "AR", "PCK"} <= records[-1].keys()
    report = json.loads((out / "eval" / "metrics.json").read_text())
    assert report["images"] == 2 and report["PCK"] == pytest.approx(records[-1]["PCK"])
    found = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert found["images"] == 1 and "PCK" not in found
    results = json.loads((tmp_path / "found" / "keypoints.json").read_text())
    assert [(r["image_id"], r["category_id"], len(r["keypoints"])) for r in results] == [(7, 1, 51)]
    assert "(found.json)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_full_recipe_takes_a_step_in_bfloat16(tmp_path):
    """COCO's recipe at SD1.5's width, 576 x 448, T = 3: one optimiser step, in less than 22 GB."""
    row = RECIPES["pose", "coco"]
    recipe = replace(row, backbone="tiny", init="random", batch=2, micro_batch=2, out=str(tmp_path),
                     model=replace(row.model, train_encoder=True))
    check(recipe)
    model = train.build_model(recipe, ())
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    optimizer = train.build_optimizer(model, recipe)
    people = PoseScenes(2).open(Cut("train", (recipe.crop, recipe.crop_width), None, 0))
    batch = next(iter(data.train_loader(people, 2, 0, 0, 0)))
    before = model.prompts.detach().clone()
    losses = train.train_step(model.loss, optimizer, iter([batch]), recipe, 400,
                              torch.device("cpu"), torch.bfloat16)
    peak = train.peak_gb(torch.device("cpu"))
    print(f"loss {losses['loss']:.6f}, peak memory {peak:.1f} GB")
    assert losses["loss"] > 0 and not torch.equal(before, model.prompts)
    assert sum(p.numel() for p in model.parameters()) > 859_520_964 + 34_000_000
    assert peak < 22


def test_numbers_that_are_no_measurements_are_refused(tmp_path):
    """True is no id, 1e12 no place in an image."""
    for entry, named in ((person(True), ": id must be there, an integer"),
                         (person(8, image=True), "image_id must be there, an integer"),
                         (person(8, keypoints=[1e12, 1, 2] * 17), "finite numbers")):
        make_people(tmp_path, [person(1), entry])
        with pytest.raises(InputError, match=named):
            read_coco(tmp_path / "annotations" / "train.json")
