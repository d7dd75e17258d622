"""A trained model in one's own program: eval.py's answers, by the checkpoint's own protocol.

    pytest tests/test_predictor.py
"""
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import command, noise, read_png, save_image, tiny_recipe, write_run
from PIL import Image

import eval as evaluation
from model import MetaPromptModel
from ops.errors import InputError
from tasks import card, predictor
from tasks.flags import resolve
from tasks.predictor import Predictor, find_checkpoint, recipe_of
from tasks.recipes import RECIPES, read_recipe
from vpd.model import VPDModel

CPU = ("--device", "cpu", "--precision", "float32")
REFER = ["--task", "refer", "--crop", "64", "--val-scenes", "2", "--precision", "float32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder per task, untrained, and a photograph."""
    folder = tmp_path_factory.mktemp("runs")
    for task in ("seg", "depth", "pose"):
        write_run(task, folder / task)
    write_run("refer", folder / "refer", resolve([*REFER, "--out", str(folder / "refer")])[0])
    save_image(folder / "photo.jpg", noise(70, 150))
    return folder


def loaded(run, precision="float32"):
    """The predictor of a run, on the CPU."""
    return Predictor.from_pretrained(run, "cpu", precision)


@pytest.fixture(scope="module")
def models(runs):
    """The predictor of each task's run."""
    return {task: loaded(runs / task) for task in ("seg", "depth", "pose", "refer")}


def files_of_eval(runs, task, out, monkeypatch, *words):
    """Let eval.py predict the photograph."""
    command(evaluation.main, monkeypatch, "--checkpoint", runs / task, "--image",
            runs / "photo.jpg", "--out", out, *CPU, *words)


# ------------------------------------------------------------------------------------------------
# Answers

def test_labels_are_those_of_eval(runs, tmp_path, monkeypatch):
    """Of a file, a Pillow image and an array; in bfloat16, too, whose weights eval.py rounds."""
    for precision in ("float32", "bfloat16"):
        files_of_eval(runs, "seg", tmp_path, monkeypatch, "--precision", precision)
        model = loaded(runs / "seg", precision)
        wanted = read_png(tmp_path / "photo_labels.png")
        with Image.open(runs / "photo.jpg") as image:
            for given in (str(runs / "photo.jpg"), image, np.array(image)):
                found = model.predict(given)
                assert found.dtype == np.uint8 and np.array_equal(found, wanted)
        assert not model.model.training and isinstance(model.model, MetaPromptModel)


def test_metres_are_those_of_eval(runs, models, tmp_path, monkeypatch):
    """float32, which make eval.py's 16-bit file."""
    files_of_eval(runs, "depth", tmp_path, monkeypatch)
    metres = models["depth"].predict(runs / "photo.jpg")
    assert metres.dtype == np.float32 and metres.shape == (70, 150)
    file = np.rint(metres * 256).clip(1, 65535).astype(np.uint16)
    assert np.array_equal(file, read_png(tmp_path / "photo_depth.png"))


def test_people_are_those_of_eval(runs, models, tmp_path, monkeypatch):
    """The whole image, or boxes with and without a score: keypoints.json but for the file's name.
    """
    boxes = [{"file_name": "photo.jpg", "bbox": [5, 5, 60, 60], "score": 0.5},
             {"file_name": "photo.jpg", "bbox": [60, 0, 80, 70]}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    model = models["pose"]
    for words, given in (([], None), (["--boxes", tmp_path / "boxes.json"],
                                      [boxes[0], np.array(boxes[1]["bbox"])])):
        files_of_eval(runs, "pose", tmp_path, monkeypatch, *words)
        wanted = json.loads((tmp_path / "keypoints.json").read_text())
        found = model.predict(runs / "photo.jpg", boxes=given)
        assert [{"file_name": "photo.jpg", **person} for person in found] == wanted
    assert model.predict(runs / "photo.jpg", boxes=[]) == []


def test_masks_are_those_of_eval(runs, models, tmp_path, monkeypatch):
    """Of a sentence, which a model of VPD reads."""
    files_of_eval(runs, "refer", tmp_path, monkeypatch, "--sentence", "the red ball")
    model = models["refer"]
    mask = model.predict(runs / "photo.jpg", sentence="the red ball")
    assert mask.dtype == bool and isinstance(model.model, VPDModel)
    assert np.array_equal(mask * 255, read_png(tmp_path / "photo_mask.png"))


def test_features_are_the_models(models):
    """Of the picture as the model gets it: one piece, bounded; of a box; with a sentence."""
    model, image = models["seg"], noise(64, 128)
    images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    for a, b in zip(model.features(image), model.model.features(images), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    pose, refer = models["pose"], models["refer"]
    box, whole = (pose.features(image, boxes=boxes)[0] for boxes in ([[0, 0, 9, 9]], None))
    assert box.shape == whole.shape and not torch.equal(box, whole)
    left, right = (refer.features(image, sentence=text)[0] for text in ("the left", "the right"))
    assert left.shape == right.shape and not torch.equal(left, right)


@pytest.mark.parametrize("task, given, said", [
    ("seg", {"image": np.zeros((4, 4))}, r"not float64 of shape \(4, 4\)"),
    ("seg", {"image": np.zeros((0, 4, 3), np.uint8)}, r"of uint8, not uint8 of shape \(0, 4, 3\)"),
    ("seg", {"image": torch.zeros(4, 4, 3, dtype=torch.uint8)}, "not torch.uint8 of shape"),
    ("seg", {"image": None}, "not NoneType of shape"),
    ("seg", {"image": "nowhere.jpg"}, "nowhere.jpg does not exist"),
    ("seg", {"image": Image.new("F", (4, 4))}, "mode F can't be read: floating-point pixels"),
    ("seg", {"boxes": []}, "the model's task is seg: boxes are for pose"),
    ("pose", {"sentence": "x"}, "the model's task is pose: boxes are for pose, a sentence is"),
    ("pose", {"boxes": [[1, 2, 3]]}, r"box \[1, 2, 3\]: bbox is .*3 values.*a list of 4 finite"),
    ("pose", {"boxes": ["x"]}, "box 'x': bbox is 'x'"),
    ("pose", {"boxes": [[0, 0, 0, 5]]}, "its box is 0 wide and 5 high"),
    ("pose", {"boxes": [{"bbox": [0, 0, 5, 5], "category_id": 2}]}, "another category than person"),
    ("refer", {}, "--sentence is missing"), ("refer", {"sentence": " "}, "a sentence is ' '")])
def test_what_cannot_be_answered_is_refused(models, task, given, said):
    """No image, no box, no sentence, or one that the task does not read: one line."""
    with pytest.raises(InputError, match=said):
        models[task].predict(**{"image": noise(4, 4), **given})


# ------------------------------------------------------------------------------------------------
# Which model, which recipe

def test_a_checkpoint_carries_its_protocol(runs, tmp_path):
    """best/ alone, without its run, is asked as the run is: windows, crop, limits."""
    made = tiny_recipe("seg", tmp_path / "r", "--window", 64, "--stride", 32)
    model = MetaPromptModel.from_pretrained(runs / "seg" / "best")
    evaluation.save(model, made := replace(made, model=model.config), tmp_path / "alone")
    found = loaded(tmp_path / "alone")
    assert found.recipe == card.shareable(made) and found.recipe.protocol.window == 64
    (tmp_path / "alone" / "recipe.json").unlink()
    assert loaded(tmp_path / "alone").recipe.protocol == replace(
        RECIPES["seg", "folder"].protocol, max_side=1024)


def test_a_model_comes_from_the_hub(runs, tmp_path, monkeypatch):
    """OWNER/NAME is its snapshot; push_to_hub uploads the folder that was loaded."""
    monkeypatch.setattr(predictor, "find_model", lambda source: runs / "seg" / "best")
    monkeypatch.setattr(predictor, "upload_model", lambda *given: given)
    model = loaded("owner/name")
    assert model.recipe.dataset == "shapes"
    assert model.push_to_hub("me/new", private=True) == (runs / "seg" / "best", "me/new", True)


@pytest.mark.parametrize("source, given, said", [
    ("./nowhere", {}, "./nowhere is not a folder"), (".", {}, "the model .: neither it nor its b"),
    ("seg", {"device": "tpu"}, "--device tpu"),
    ("seg", {"precision": "half"}, "precision is 'half")])
def test_what_is_no_model_is_refused(runs, tmp_path, monkeypatch, source, given, said):
    """A folder without a model, a device or a precision that there is not."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        Predictor.from_pretrained(runs / source if source == "seg" else source, **given)


def test_find_checkpoint(tmp_path):
    """RUN/best, else RUN/last, else RUN itself, or what a killed save left of the first two; else
    an error that says what was looked for.
    """
    with pytest.raises(InputError, match=f"--checkpoint {tmp_path}: .* best/ or last/ holds a "
                                         "config.json"):
        find_checkpoint(str(tmp_path))
    for name in ("", "last.previous", "last", "best.previous", "best"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
        assert find_checkpoint(str(tmp_path)) == folder
    assert find_checkpoint(str(tmp_path / "last")) == tmp_path / "last"


@pytest.mark.parametrize("present, found", [
    (["best.previous", "last"], "best.previous"), (["last.previous"], "last.previous"),
    (["best", "best.previous"], "best")])
def test_the_folder_of_a_killed_save_is_found(tmp_path, present, found):
    """Killed between the renames of best/, evaluation takes the previous best, not last/."""
    for name in present:
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_text("")
    assert find_checkpoint(str(tmp_path)) == tmp_path / found


def test_recipe_of(runs, tmp_path):
    """The run's own, else the one in the model's folder; the row of another data set, or of a model
    without either; for pictures alone that of a user's folder.
    """
    best, alone = runs / "seg" / "best", tmp_path / "m"
    config = MetaPromptModel.from_pretrained(best).config
    made = read_recipe(runs / "seg" / "recipe.json")
    for dataset in (None, "shapes"):
        assert recipe_of(best, config, dataset) == made
    for folder, dataset, pictures, row in ((best, "ade20k", False, "ade20k"),
                                           (alone, "mapillary", False, "mapillary"),
                                           (alone, None, True, "folder")):
        assert recipe_of(folder, config, dataset, pictures) == RECIPES["seg", row]
    with pytest.raises(InputError, match="m is not part of a run.*: give --dataset"):
        recipe_of(alone, config)
    alone.mkdir()
    (alone / "recipe.json").write_text(json.dumps(asdict(replace(made, seed=5))))
    assert recipe_of(alone, config).seed == 5
