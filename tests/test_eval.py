"""Evaluation of whole sets: the counts behind mIoU, COCO results of people, and the command.

Proven here: metrics against figures that mmsegmentation printed (tests/golden/seg.json); the
metrics of whole data sets whose answer is known; what is drawn; how bad flags are refused.

    python -m pytest tests/test_eval.py
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image
from torch import nn

import data
from ops import errors
import eval as evaluation
from ops import oks
from ops import udp as pose
from sets import coco as pose_data
import predict
from ops.errors import InputError
from model import Config, MetaPromptModel
from unet import UNetConfig
from vae import VAEConfig
from predict import PoseProtocol, Protocol

GOLDEN = json.loads((Path(__file__).parent / "golden" / "seg.json").read_text())


# ------------------------------------------------------------------------------------------------
# Metrics

def golden_counts():
    """Confusion counts of each image of the golden example."""
    case = GOLDEN["miou"]
    return [evaluation.confusion(torch.tensor(p), torch.tensor(t), case["num_classes"])
            for p, t in zip(case["pred"], case["gt"])]


def test_golden_metrics():
    """IoU, accuracy and their means are mmsegmentation's, absent classes included."""
    metrics, case = evaluation.seg_metrics(sum(golden_counts())), GOLDEN["miou"]
    for key in ("mIoU", "mAcc", "aAcc"):
        assert metrics[key] == pytest.approx(case[key], abs=1e-6)
    for key in ("IoU", "Acc"):
        expected = [math.nan if value is None else value for value in case[key]]
        assert metrics[key] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_counts_add_up():
    """Counts summed over images are those of the whole set; mIoU is not the mean over images."""
    case, counts = GOLDEN["miou"], golden_counts()
    whole = evaluation.confusion(torch.tensor(case["pred"]), torch.tensor(case["gt"]), 5)
    assert torch.equal(sum(counts), whole)
    assert whole.sum() == sum(value != 255 for image in case["gt"] for row in image
                              for value in row)
    means = [evaluation.seg_metrics(c)["mIoU"] for c in counts]
    assert sum(means) / 2 != pytest.approx(case["mIoU"], abs=1e-3)


def test_confusion_layout():
    """Row = truth, column = prediction; what is predicted on ignored pixels does not matter."""
    truth, prediction = torch.tensor([[0, 0, 1, 255, 255]]), torch.tensor([[0, 2, 2, 0, 1]])
    assert evaluation.confusion(prediction, truth, 3).tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_absent_classes():
    """Predicted but nowhere true: IoU 0, counts in mIoU. Neither: nan, left out of both means."""
    metrics = evaluation.seg_metrics(torch.tensor([[6, 0, 2, 0], [0, 2, 0, 0],
                                                   [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert metrics["IoU"] == pytest.approx([0.75, 1.0, 0.0, math.nan], nan_ok=True)
    assert metrics["Acc"] == pytest.approx([0.75, 1.0, math.nan, math.nan], nan_ok=True)
    assert metrics["mIoU"] == pytest.approx(1.75 / 3)
    assert (metrics["mAcc"], metrics["aAcc"]) == (pytest.approx(0.875), pytest.approx(0.8))


# ------------------------------------------------------------------------------------------------
# A whole set

COLOURS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


class ByColour(nn.Module):
    """A segmentation model that is right wherever colour tells the class; `only`: says just one."""

    def __init__(self, only=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.only, self.modes, self.batches = only, set(), []
        self.config = Config(num_classes=4)

    def forward(self, images):
        self.modes.add(self.training)
        self.batches.append(images.shape)
        distances = (images[:, None] - COLOURS[:, :, None, None]).abs().sum(dim=2)
        if self.only is not None:
            distances = torch.ones_like(distances)
            distances[:, self.only] = 0
        return -self.scale * distances


class Painted:
    """A data set whose images show the label in the colours above, ignored pixels in grey."""

    classes = data.plain_classes(("black", "red", "green", "blue"))

    def __init__(self, sizes, ignored=True):
        g = torch.Generator().manual_seed(0)
        self.samples = []
        for size in sizes:
            target = torch.randint(0, 3, size, generator=g)                # blue never occurs
            image = COLOURS[target].permute(2, 0, 1).clone()
            if ignored:
                hidden = torch.rand(size, generator=g) < 0.2
                target[hidden], image[:, hidden] = 255, 0.5
            self.samples.append({"image": image, "target": target, "name": str(size)})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        return self.samples[key[1]]


MIXED = [(30, 20), (16, 40), (9, 9)]


@pytest.mark.parametrize("protocol", [Protocol(None, None, None), Protocol(None, 16, 11)])
def test_perfect_model(protocol):
    """A model that is always right gets 1 everywhere, nan for the class that never occurs."""
    metrics = evaluation.evaluate_seg(ByColour(), Painted(MIXED), protocol, torch.float32)
    assert (metrics["mIoU"], metrics["mAcc"], metrics["aAcc"]) == (1, 1, 1)
    assert metrics["IoU"] == pytest.approx([1, 1, 1, math.nan], nan_ok=True)


def test_one_answer_model():
    """A model that says one class everywhere gets that class's share of all valid pixels."""
    dataset = Painted(MIXED)
    metrics = evaluation.evaluate_seg(ByColour(only=1), dataset, Protocol(None, None, None),
                                      torch.float32)
    targets = torch.cat([sample["target"].flatten() for sample in dataset.samples])
    share = ((targets == 1).sum() / (targets != 255).sum()).item()
    assert metrics["IoU"] == pytest.approx([0, share, 0, math.nan], nan_ok=True)
    assert metrics["aAcc"] == pytest.approx(share)
    assert metrics["mAcc"] == pytest.approx(1 / 3)


def test_prediction_at_label_size():
    """Metrics are computed at the label's own size, whatever the image's."""
    dataset = Painted([(40, 60)], ignored=False)
    target = torch.zeros(40, 60, dtype=torch.long)
    target[:, 30:] = 1
    small = COLOURS[target].permute(2, 0, 1)[:, ::2, ::2].contiguous()
    dataset.samples = [{"image": small, "target": target, "name": "half"}]
    metrics = evaluation.evaluate_seg(ByColour(), dataset, Protocol(None, None, None),
                                      torch.float32)
    assert metrics["aAcc"] == 1


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_batches_change_nothing(batch):
    """Several images at once give the metrics of one at a time, the last batch being smaller."""
    dataset = Painted([(12, 14)] * 5)
    for sample in dataset.samples[:3]:
        sample["image"] = sample["image"].roll(3, dims=2)                  # so that errors occur
    results, model = [], ByColour()
    for n in (1, batch):
        results.append(evaluation.evaluate_seg(model, dataset, Protocol(None, None, None, batch=n),
                                               torch.float32))
    assert 0 < results[0]["mIoU"] < 1
    assert str(results[0]) == str(results[1])                              # nan != nan
    assert model.batches[5][0] == min(batch, 5)


def test_prediction_keeps_no_graph():
    """Predicting records nothing for a backward pass, which whole images have no memory for."""
    probs = predict.predict_seg(ByColour(), torch.zeros(1, 3, 8, 8), (8, 8),
                                   Protocol(None, None, None), torch.float32)
    assert not probs.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(training):
    """The model predicts in evaluation mode and is given back in the mode it came in."""
    model = ByColour().train(training)
    evaluation.evaluate(model, Painted([(8, 8)]), Protocol(None, None, None), torch.float32)
    assert model.modes == {False}
    assert model.training == training


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("length, batch, drawn", [
    (3, 1, [0, 1, 2]), (8, 3, range(8)), (15, 1, [0, 1, 3, 5, 7, 9, 11, 13]),
    (40, 16, range(0, 40, 5))])
def test_drawn_images_are_spread(tmp_path, length, batch, drawn, bars):
    """The sheet shows up to 8 images from all over the set, progress bars on or off."""
    dataset = Painted([(8, 8)] * length)
    for i, sample in enumerate(dataset.samples):
        sample["image"] = torch.full((3, 8, 8), (5 * i + 2) / 255)         # its number as grey
    (enable_progress_bars if bars else disable_progress_bars)()
    try:
        evaluation.evaluate_seg(ByColour(), dataset, Protocol(None, None, None, batch=batch),
                                torch.float32, sheet=tmp_path / "out" / "sheet.png")
    finally:
        enable_progress_bars()
    with Image.open(tmp_path / "out" / "sheet.png") as image:
        sheet = np.asarray(image)
    greys = [sheet[y, 10].tolist() for y in range(18 + 96, len(sheet) - 96, 192 + 4)]
    assert greys == [[5 * i + 2] * 3 for i in drawn]


def test_print_table(capsys):
    """Percent with two decimals, a line per class, n/a for what is undefined, means last."""
    evaluation.print_table({"IoU": [0.5, math.nan], "Acc": [1.0, math.nan], "mIoU": 0.5,
                            "mAcc": 0.12345, "aAcc": math.nan}, ("red car", "sky"))
    head, car, sky, means = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "IoU", "Acc"]
    assert car == "red car  50.00  100.00"
    assert sky.split() == ["sky", "n/a", "n/a"]
    assert means.split() == ["mIoU", "50.00", "mAcc", "12.35", "aAcc", "n/a"]


# ------------------------------------------------------------------------------------------------
# The command

def test_find_checkpoint(tmp_path):
    """RUN/best, else RUN/last, else RUN itself; else an error that says what was looked for."""
    with pytest.raises(InputError, match=f"--checkpoint {tmp_path}: .* best/ or last/ holds a "
                                         "config.json"):
        evaluation.find_checkpoint(str(tmp_path))
    for folder in (tmp_path, tmp_path / "last", tmp_path / "best"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        assert evaluation.find_checkpoint(str(tmp_path)) == folder
    assert evaluation.find_checkpoint(str(tmp_path / "last")) == tmp_path / "last"


def test_recipe_of(tmp_path):
    """The recipe lies beside the checkpoint's folder; a model without a run has none."""
    assert evaluation.recipe_of(tmp_path / "best") == {}
    (tmp_path / "recipe.json").write_text('{"dataset": "folder"}')
    assert evaluation.recipe_of(tmp_path / "best") == {"dataset": "folder"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it: an untrained tiny model on the embedded scenes."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = Config(num_prompts=6, refine_steps=2, num_classes=7, head_channels=16,
                    unet=UNetConfig((32, 32, 32, 32), num_heads=2, context_dim=32),
                    vae=VAEConfig((32, 32, 32, 32)))
    MetaPromptModel(config).save_pretrained(folder / "best")
    recipe = {"dataset": "shapes", "crop": 64, "val_scenes": 3}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def command(monkeypatch, *arguments):
    """Run eval.py's main with these arguments."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main()


def test_command(run, monkeypatch, capsys):
    """The command says what it will do, prints the table, and writes metrics and pictures."""
    command(monkeypatch, "--checkpoint", run, "--workers", 0, "--device", "cpu")
    out = capsys.readouterr().out
    assert f"model      {run / 'best'}" in out and "3 scenes of 64x64" in out and "mIoU" in out
    report = json.loads((run / "eval" / "metrics.json").read_text())
    assert report["dataset"] == "shapes" and report["images"] == 3
    assert len(report["IoU"]) == 7 and 0 <= report["mIoU"] <= 1
    with Image.open(run / "eval" / "pictures.png") as image:
        assert image.width == 3 * 192


def test_command_refuses(run, monkeypatch, tmp_path):
    """An unknown data set, or one with another number of classes, is an InputError."""
    with pytest.raises(InputError, match="--dataset coco is unknown for seg: choose from shapes"):
        command(monkeypatch, "--checkpoint", run, "--dataset", "coco")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
        Image.new("L", (64, 64)).save(tmp_path / kind / "val" / "x.png")
    with pytest.raises(InputError, match="predicts 7 classes, the data set folder has 2"):
        command(monkeypatch, "--checkpoint", run, "--dataset", "folder", "--data", tmp_path)


# ------------------------------------------------------------------------------------------------
# Pose

class TrueHeatmaps(nn.Module):
    """A pose model that knows the answers: the heatmaps of a set's people, one after the other."""

    def __init__(self, dataset, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config, self.dataset, self.size, self.next = Config(task="pose", sigma=2.0), dataset, \
            size, 0

    def forward(self, images):
        places = range(self.next, self.next + len(images))
        self.next += len(images)
        joints = torch.stack([self.dataset[0, i]["target"] for i in places])
        return pose.heatmap_targets(joints, images.shape[-2:], self.size, 2.0)[0]


def test_a_model_that_knows_the_heatmaps_has_ap_1(tmp_path):
    """Boxes, crops, targets, decoding, scores and COCO's statistics agree: AP, AR, PCK are 1."""
    dataset = pose_data.ShapesPose(6, training=False, crop=(256, 192), size=160)
    model = TrueHeatmaps(dataset, (64, 48))
    metrics = evaluation.evaluate_pose(model, dataset, PoseProtocol(flip=False, batch=4),
                                       torch.float32, export=tmp_path, sheet=tmp_path / "a.png")
    assert metrics["AP"] > 0.999 and metrics["AR"] > 0.999 and metrics["PCK"] == 1
    results = oks.read_results(tmp_path / "keypoints.json")
    assert oks.evaluate(dataset.annotations, results)["AP"] == metrics["AP"]
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10


def test_results_are_per_image_without_near_copies():
    """Two boxes on one person give one result, the better; images don't compete."""
    joints = np.random.default_rng(0).uniform(0, 100, (4, 17, 3))
    joints[1] = joints[2] = joints[0]
    joints[..., 2] = np.array([0.5, 0.9, 0.4, 0.8])[:, None]
    columns = [np.arange(4), np.array([7, 7, 9, 7]), np.array([1, 1, 1, 0.5]), joints,
               np.full(4, 1e4)]
    results = evaluation.coco_results(columns, 0.9)
    scores = [(r["image_id"], round(r["score"], 6)) for r in results]
    assert scores == [(7, 0.9), (7, 0.4), (9, 0.4)]
    assert all(len(r["keypoints"]) == 51 and "bbox" not in r for r in results)


@pytest.mark.parametrize("flags,message", [
    (["--official", "x.pth"], "needs --task and --dataset"),
    (["--official", "x.pth", "--task", "depth", "--dataset", "nyu"], "x.pth does not exist"),
    (["--official", "x.pth", "--task", "flow", "--dataset", "nyu"], "flow is unknown"),
    (["--official", "x.pth", "--task", "depth", "--dataset", "ade20k"], "unknown for depth"),
    (["--checkpoint", "nowhere"], "neither it nor its best/")])
def test_bad_commands_are_refused_in_one_line(monkeypatch, capsys, tmp_path, flags, message):
    """Exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eval.py", *flags])
    with pytest.raises(SystemExit) as stop:
        errors.run_command(evaluation.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1 and message in stderr
