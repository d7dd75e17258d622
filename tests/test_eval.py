"""Evaluation is mmsegmentation's: windows, averaging, the counts behind mIoU, and the command.

Proven here: window positions and metrics against figures that mmsegmentation printed
(tests/golden/seg.json); that sliding averages logits, window by window, before the softmax; the
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
import torch.nn.functional as F
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image
from torch import nn

import data
import errors
import eval as evaluation
from errors import InputError
from eval import PROTOCOLS, Protocol
from model import Config, MetaPromptModel

GOLDEN = json.loads((Path(__file__).parent / "golden" / "seg.json").read_text())
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# Devices

def test_pick_device():
    """Names torch knows are taken; unknown names and absent GPUs are an InputError."""
    assert evaluation.pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert evaluation.pick_device("auto").type == expected
    for name in ("gpu", "cuda:x", ""):
        with pytest.raises(InputError, match=f"--device {name} is unknown: auto, cpu, cuda"):
            evaluation.pick_device(name)
    with pytest.raises(InputError, match=r"--device cuda:99: torch .* sees \d+ GPUs"):
        evaluation.pick_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    """Asking for a GPU where there is none is refused, not silently run on the CPU."""
    with pytest.raises(InputError, match="--device cuda: torch .* sees 0 GPUs"):
        evaluation.pick_device("cuda")


def test_pick_precision():
    """A named precision is taken as it is; auto decides for one of the two."""
    assert evaluation.pick_precision("float32", CPU) == torch.float32
    assert evaluation.pick_precision("bfloat16", CPU) == torch.bfloat16
    assert evaluation.pick_precision("auto", CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Inside, matrix products have the precision asked for."""
    with evaluation.autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


# ------------------------------------------------------------------------------------------------
# Sliding windows

@pytest.mark.parametrize("case", GOLDEN["windows"])
def test_golden_windows(case):
    """Windows are mmsegmentation's, in its order; the last is shifted back to the edge."""
    places = evaluation.windows(*case["hw"], case["crop"], case["stride"])
    assert places == [tuple(window) for window in case["windows"]]


def test_official_protocol():
    """ADE20K: short side 512, windows of 512 every 341 pixels, one image at a time."""
    protocol = PROTOCOLS["seg", "ade20k"]
    assert (protocol.scale, protocol.window, protocol.stride) == ((2048, 512), 512, 341)
    assert protocol.batch == 1


def test_windows_cover_everything():
    """For random sizes every pixel is covered, by windows inside the image and of full size."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, crop = rng.integers(1, 60, 3).tolist()
        stride = int(rng.integers(1, crop + 1))
        count = np.zeros((height, width), int)
        for y1, y2, x1, x2 in evaluation.windows(height, width, crop, stride):
            assert 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
            assert (y2 - y1, x2 - x1) == (min(crop, height), min(crop, width))
            count[y1:y2, x1:x2] += 1
        assert count.min() >= 1


def pointwise(images):
    """A model that looks at one pixel at a time."""
    return torch.cat([images.sin(), images.sum(dim=1, keepdim=True) ** 2], dim=1)


def position(images):
    """A model whose answer is the column within the window, in one channel."""
    return torch.arange(images.shape[-1]).float().expand(len(images), 1, *images.shape[-2:])


@pytest.mark.parametrize("size", [(30, 41), (7, 50), (9, 9), (16, 16)])
def test_slide_of_pointwise_function(size):
    """Sliding a function of single pixels is that function, also on an image below one window."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    out = evaluation.slide(pointwise, images, crop=16, stride=11)
    torch.testing.assert_close(out, pointwise(images))


def test_slide_of_constant():
    """However often a pixel is covered, a constant stays that constant."""
    out = evaluation.slide(lambda x: torch.full((len(x), 5, *x.shape[-2:]), 1.7),
                           torch.zeros(1, 3, 37, 45), crop=16, stride=5)
    torch.testing.assert_close(out, torch.full((1, 5, 37, 45), 1.7))


def test_slide_averages():
    """Where windows overlap the answer is their mean: 6 columns, windows 0..3 and 2..5."""
    out = evaluation.slide(position, torch.zeros(1, 3, 4, 6), crop=4, stride=2)
    assert out[0, 0].tolist() == [[0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]] * 4


@pytest.mark.parametrize("batch", [2, 3, 8, 100])
def test_batched_windows(batch):
    """Several windows and images per call give what one window at a time gives."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 5, padding=2)
    images, calls = torch.rand(2, 3, 30, 41), []

    def predict(x):
        calls.append(len(x))
        return net(x)

    with torch.no_grad():
        together = evaluation.slide(predict, images, 16, 11, batch=batch)
        alone = torch.cat([evaluation.slide(net, image[None], 16, 11, batch=1)
                           for image in images])
    torch.testing.assert_close(together, alone)
    assert max(calls) <= batch and sum(calls) == 2 * len(evaluation.windows(30, 41, 16, 11))


def test_probabilities_come_last():
    """Logits are averaged, then resized, and only then made probabilities (spec A.5)."""
    def model(x):
        return torch.cat([position(x), 3 - position(x) ** 2], dim=1)

    images = torch.zeros(1, 3, 4, 6)
    probs = evaluation.predict_seg(model, images, (9, 11), Protocol(None, 4, 2), torch.float32)
    logits = F.interpolate(evaluation.slide(model, images, 4, 2), size=(9, 11), mode="bilinear",
                           align_corners=False)
    torch.testing.assert_close(probs, logits.softmax(dim=1))
    whole = evaluation.predict_seg(model, images, (4, 6), Protocol(None, None, None), torch.float32)
    torch.testing.assert_close(whole, model(images).softmax(dim=1))


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
    probs = evaluation.predict_seg(ByColour(), torch.zeros(1, 3, 8, 8), (8, 8),
                                   Protocol(None, None, None), torch.float32)
    assert not probs.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(training):
    """The model predicts in evaluation mode and is given back in the mode it came in."""
    model = ByColour().train(training)
    evaluation.evaluate_seg(model, Painted([(8, 8)]), Protocol(None, None, None), torch.float32)
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
                    unet_channels=(32, 32, 32, 32), num_heads=2, context_dim=32,
                    vae_channels=(32, 32, 32, 32))
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
# Depth

def test_shifted_windows_meet_the_golden_starts():
    """NYU 0 and 160; KITTI every 57 columns, the last window moved to the edge (ours)."""
    golden = json.loads((Path(__file__).parent / "golden" / "depth.json").read_text())
    nyu, kitti = golden["shift_windows"]["nyu"], golden["shift_windows"]["kitti"]
    assert evaluation.shifted_windows(640, 480, 2) == nyu["starts"]
    assert evaluation.shifted_windows(1216, 352, 16) == kitti["starts"][:-1] + [1216 - 352]
    assert evaluation.shifted_windows(480, 480, 2) == [0]


class Brightness(torch.nn.Module):
    """A pointwise depth model: metres from the red channel."""

    def forward(self, images):
        """(B, 3, H, W) -> (B, 1, H, W)."""
        return images[:, :1] * 9 + 0.5


class Columns(torch.nn.Module):
    """Predicts each pixel's column, counted from the left edge of what it is shown."""

    def forward(self, images):
        """(B, 3, H, W) -> (B, 1, H, W)."""
        B, _, H, W = images.shape
        return torch.arange(W, dtype=torch.float32).expand(B, 1, H, W)


@pytest.mark.parametrize("count,flip", [(1, False), (1, True), (2, True), (5, False), (16, True)])
def test_windows_of_a_pointwise_depth_model_change_nothing(count, flip):
    """Windows and mirror images of a pointwise model average to its prediction on the whole."""
    images = torch.rand(2, 3, 8, 37)
    protocol = evaluation.DepthProtocol(count, flip, None, 10.0, 0, 1000.0)
    depth = evaluation.predict_depth(Brightness(), images, protocol, torch.float32)
    assert torch.allclose(depth, Brightness()(images)[:, 0], atol=1e-6)


def test_mirror_images_are_turned_back():
    """With flip, a model that sees columns 0..W-1 averages to their middle everywhere."""
    protocol = evaluation.DepthProtocol(1, True, None, 10.0, 0, 1000.0)
    depth = evaluation.predict_depth(Columns(), torch.rand(1, 3, 4, 11), protocol, torch.float32)
    assert torch.equal(depth, torch.full((1, 4, 11), 5.0))


def test_portrait_images_are_predicted_whole():
    """An image that is taller than wide is one window, not an error."""
    protocol = evaluation.DepthProtocol(2, True, None, 10.0, 0, 1000.0)
    images = torch.rand(1, 3, 20, 12)
    depth = evaluation.predict_depth(Brightness(), images, protocol, torch.float32)
    assert torch.allclose(depth, Brightness()(images)[:, 0], atol=1e-6)


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
