"""Segmentation: windows, scales, mirror images, mIoU, its pictures and label files.

Proven here: window positions and metrics against figures that mmsegmentation printed
(tests/golden/seg.json); that sliding averages logits, window by window, before the softmax; that
windows and flips of models whose answer is known change nothing; metrics of sets whose answer is
known; colours at known pixels of the files that are written.

    pytest tests/test_seg.py
"""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import colours, columns_of, noise, read_png, save_image
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from torch import nn

from model import Config
from ops import draw, pixels
from ops.errors import InputError
from sets.ade20k import SegFiles
from sets.files import Cut, load_image, plain_classes
from tasks import seg
from tasks.recipes import RECIPES
from tasks.seg import Protocol

GOLDEN = json.loads((Path(__file__).parent / "golden" / "seg.json").read_text())
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 200, 0), (0, 0, 255), (250, 240, 0)
CLASSES = plain_classes(("sky", "road", "car", "a name that is far too long"),
                        (RED, GREEN, BLUE, YELLOW))


# ------------------------------------------------------------------------------------------------
# Sliding windows

@pytest.mark.parametrize("case", GOLDEN["windows"])
def test_golden_windows(case):
    """Windows are mmsegmentation's, in its order; the last is shifted back to the edge."""
    places = seg.windows(*case["hw"], case["crop"], case["stride"])
    assert places == [tuple(window) for window in case["windows"]]


def test_windows_cover_everything():
    """For random sizes every pixel is covered, by windows inside the image and of full size."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, crop = rng.integers(1, 60, 3).tolist()
        stride = int(rng.integers(1, crop + 1))
        count = np.zeros((height, width), int)
        for y1, y2, x1, x2 in seg.windows(height, width, crop, stride):
            assert 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
            assert (y2 - y1, x2 - x1) == (min(crop, height), min(crop, width))
            count[y1:y2, x1:x2] += 1
        assert count.min() >= 1


def pointwise(images):
    """A model that looks at one pixel at a time."""
    return torch.cat([images.sin(), images.sum(dim=1, keepdim=True) ** 2], dim=1)


@pytest.mark.parametrize("size", [(30, 41), (7, 50), (9, 9), (16, 16)])
def test_slide_of_pointwise_function(size):
    """Sliding a function of single pixels is that function, also on an image below one window."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seg.slide(pointwise, images, crop=16, stride=11), pointwise(images))


def test_slide_averages():
    """Where windows overlap the answer is their mean: 6 columns, windows 0..3 and 2..5."""
    out = seg.slide(columns_of, torch.zeros(1, 3, 4, 6), crop=4, stride=2)
    assert out[0, 0].tolist() == [[0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]] * 4


@pytest.mark.parametrize("batch", [2, 3, 8, 100])
def test_batched_windows(batch):
    """Several windows and images per call give what one window at a time gives."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 5, padding=2)
    images, calls = torch.rand(2, 3, 30, 41), []

    def counted(x):
        calls.append(len(x))
        return net(x)

    with torch.no_grad():
        together = seg.slide(counted, images, 16, 11, batch=batch)
        alone = torch.cat([seg.slide(net, image[None], 16, 11, batch=1) for image in images])
    torch.testing.assert_close(together, alone)
    assert max(calls) <= batch and sum(calls) == 2 * len(seg.windows(30, 41, 16, 11))


def test_probabilities_come_last():
    """Logits are averaged, then resized, and only then made probabilities (mmsegmentation)."""
    def model(x):
        return torch.cat([columns_of(x), 3 - columns_of(x) ** 2], dim=1)

    images = torch.zeros(1, 3, 4, 6)
    probs = seg.predict(model, images, (9, 11), Protocol(None, 4, 2), torch.float32)
    logits = F.interpolate(seg.slide(model, images, 4, 2), size=(9, 11), mode="bilinear",
                           align_corners=False)
    torch.testing.assert_close(probs, logits.softmax(dim=1))
    whole = seg.predict(model, images, (4, 6), Protocol(), torch.float32)
    torch.testing.assert_close(whole, model(images).softmax(dim=1))


# ------------------------------------------------------------------------------------------------
# Scales and mirror images

class Pointwise(nn.Module):
    """Three classes: red, green, dark, by a fixed function of each pixel."""

    def __init__(self):
        super().__init__()
        self.config, self.prompts = Config(num_classes=3), nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return 20 * torch.stack([images[:, 0], images[:, 1], 0.5 + 0 * images[:, 2]], dim=1)


def test_tta_scales_are_mmsegmentations():
    """600 x 800 at (2048, 512) times 0.5 to 2: both bounds rounded down, sides to the nearest."""
    protocol, model = seg.with_tta(Protocol((2048, 512))), Pointwise()
    probs = seg.predict(model, torch.rand(1, 3, 600, 800), (6, 8), protocol, torch.float32)
    assert probs.shape == (1, 3, 6, 8)
    assert model.shapes == [(2, 3, h, w) for h, w in (
        (256, 341), (384, 512), (512, 683), (640, 853), (768, 1024), (896, 1195), (1024, 1365))]


def test_tta_averages_probabilities():
    """Two scales with different answers give the mean of the softmaxes, not of the logits."""
    def by_height(x):
        logit = torch.full((len(x), 1, *x.shape[-2:]), {128: 4.0, 64: -1.0}[x.shape[-2]])
        return torch.cat([logit, 0 * logit], dim=1)

    probs = seg.predict(by_height, torch.zeros(1, 3, 128, 130), (5, 5), Protocol(ratios=(0.5, 1.0)),
                        torch.float32)
    mean = (torch.tensor([4.0, -1.0]).sigmoid()).mean()
    torch.testing.assert_close(probs[0, 0], mean.expand(5, 5))


def lopsided(images):
    """A model that is anything but symmetric: two classes, one the likelier the farther right."""
    ramp = torch.linspace(-2, 3, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
    return torch.cat([ramp * (1 + images[:, :1]), images[:, 1:2]], dim=1)


def test_flipped_images_give_flipped_probabilities():
    """With the mirror image averaged, prediction commutes with flipping, for any model: exactly
    where nothing is resized.
    """
    images = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    protocol = Protocol(None, 16, 11, flip=True)
    there, back = (seg.predict(lopsided, x, (40, 50), protocol, torch.float32)
                   for x in (images, images.flip(-1)))
    torch.testing.assert_close(back.flip(-1), there, rtol=0, atol=1e-6)
    plain = seg.predict(lopsided, images, (40, 50), Protocol(None, 16, 11), torch.float32)
    assert (plain - there).abs().max() > 0.1
    whole = [seg.predict(Pointwise(), x, (20, 33), Protocol(flip=True), torch.float32)
             for x in (images, images.flip(-1))]
    assert torch.equal(whole[1].flip(-1), whole[0])


@pytest.mark.parametrize("window, stride", [(None, None), (16, 11)])
def test_windows_and_flips_of_a_pointwise_model_change_nothing(window, stride):
    """Windows, ratio 1 and mirror images leave a model of single pixels as it is, without a graph.
    """
    images = torch.rand(2, 3, 30, 41, generator=torch.Generator().manual_seed(0))
    expected = Pointwise()(images).softmax(dim=1)
    for flip in (False, True):
        protocol = Protocol(None, window, stride, ratios=(1.0,), flip=flip)
        probs = seg.predict(Pointwise(), images, (30, 41), protocol, torch.float32)
        torch.testing.assert_close(probs, expected)
        assert not probs.requires_grad


def test_rescale_is_cv2s():
    """Each ratio is resized by the training pipeline's bilinear rule, from uint8; 1 is exact."""
    images = torch.from_numpy(noise(100, 130)).permute(2, 0, 1)[None].float() / 255
    smaller = pixels.resize_bilinear(noise(100, 130), (75, 97))            # 97.5 is rounded down
    out = seg.rescale(images, None, 0.75)
    assert torch.equal(out[0], torch.from_numpy(smaller).permute(2, 0, 1).float() / 255)
    assert torch.equal(seg.rescale(images, None, 1.0), images)
    assert seg.rescale(images, None, 0.5).shape[-2:] == (64, 65)           # never below 64


# ------------------------------------------------------------------------------------------------
# Numbers

def golden_counts():
    """Confusion counts of each image of the golden example."""
    case = GOLDEN["miou"]
    return [seg.confusion(torch.tensor(p), torch.tensor(t), case["num_classes"])
            for p, t in zip(case["pred"], case["gt"])]


def test_golden_metrics():
    """IoU, accuracy and their means are mmsegmentation's, absent classes included."""
    metrics, case = seg.seg_metrics(sum(golden_counts())), GOLDEN["miou"]
    for key in ("mIoU", "mAcc", "aAcc"):
        assert metrics[key] == pytest.approx(case[key], abs=1e-6)
    for key in ("IoU", "Acc"):
        expected = [math.nan if value is None else value for value in case[key]]
        assert metrics[key] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_counts_add_up():
    """Counts summed over images are those of the whole set; mIoU is not the mean over images."""
    case, counts = GOLDEN["miou"], golden_counts()
    whole = seg.confusion(torch.tensor(case["pred"]), torch.tensor(case["gt"]), 5)
    assert torch.equal(sum(counts), whole)
    assert whole.sum() == sum(value != 255 for image in case["gt"] for row in image
                              for value in row)
    means = [seg.seg_metrics(c)["mIoU"] for c in counts]
    assert sum(means) / 2 != pytest.approx(case["mIoU"], abs=1e-3)


def test_confusion_layout():
    """Row = truth, column = prediction; what is predicted on ignored pixels does not matter."""
    truth, prediction = torch.tensor([[0, 0, 1, 255, 255]]), torch.tensor([[0, 2, 2, 0, 1]])
    assert seg.confusion(prediction, truth, 3).tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_absent_classes():
    """Predicted but nowhere true: IoU 0, counts in mIoU. Neither: nan, left out of both means."""
    metrics = seg.seg_metrics(torch.tensor([[6, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 0],
                                            [0, 0, 0, 0]]))
    assert metrics["IoU"] == pytest.approx([0.75, 1.0, 0.0, math.nan], nan_ok=True)
    assert metrics["Acc"] == pytest.approx([0.75, 1.0, math.nan, math.nan], nan_ok=True)
    assert metrics["mIoU"] == pytest.approx(1.75 / 3)
    assert (metrics["mAcc"], metrics["aAcc"]) == (pytest.approx(0.875), pytest.approx(0.8))


# ------------------------------------------------------------------------------------------------
# A whole set

PAINTS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


class ByColour(nn.Module):
    """A segmentation model that is right wherever colour tells the class; `only`: says just one."""

    def __init__(self, only=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.only, self.batches, self.config = only, [], Config(num_classes=4)

    def forward(self, images):
        self.batches.append(images.shape)
        distances = (images[:, None] - PAINTS[:, :, None, None]).abs().sum(dim=2)
        if self.only is not None:
            distances = torch.ones_like(distances)
            distances[:, self.only] = 0
        return -self.scale * distances


class Painted:
    """A data set whose images show the label in the colours above, ignored pixels in grey."""

    classes = plain_classes(("black", "red", "green", "blue"))

    def __init__(self, sizes, ignored=True):
        g = torch.Generator().manual_seed(0)
        self.samples = []
        for size in sizes:
            target = torch.randint(0, 3, size, generator=g)                # blue never occurs
            image = PAINTS[target].permute(2, 0, 1).clone()
            if ignored:
                hidden = torch.rand(size, generator=g) < 0.2
                target[hidden], image[:, hidden] = 255, 0.5
            self.samples.append({"image": image, "target": target, "name": f"{size}.jpg"})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        return self.samples[key[1]]

    def names(self):
        return [sample["name"] for sample in self.samples]


MIXED = [(30, 20), (16, 40), (9, 9)]


@pytest.mark.parametrize("protocol", [Protocol(), Protocol(None, 16, 11)])
def test_perfect_model(protocol, tmp_path):
    """A model that is always right gets 1 everywhere, nan for the class that never occurs; what it
    says is exported under the images' names.
    """
    dataset = Painted(MIXED)
    metrics = seg.evaluate(ByColour(), dataset, protocol, torch.float32, export=tmp_path)
    assert (metrics["mIoU"], metrics["mAcc"], metrics["aAcc"]) == (1, 1, 1)
    assert metrics["IoU"] == pytest.approx([1, 1, 1, math.nan], nan_ok=True)
    for size, sample in zip(MIXED, dataset.samples):
        said, truth = read_png(tmp_path / f"{size}.png"), sample["target"].numpy()
        assert np.array_equal(said[truth != 255], truth[truth != 255])


def test_one_answer_model():
    """A model that says one class everywhere gets that class's share of all valid pixels."""
    dataset = Painted(MIXED)
    metrics = seg.evaluate(ByColour(only=1), dataset, Protocol(), torch.float32)
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
    small = PAINTS[target].permute(2, 0, 1)[:, ::2, ::2].contiguous()
    dataset.samples = [{"image": small, "target": target, "name": "half"}]
    assert seg.evaluate(ByColour(), dataset, Protocol(), torch.float32)["aAcc"] == 1


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_batches_change_nothing(batch):
    """Several images at once give the metrics of one at a time, the last batch being smaller."""
    dataset = Painted([(12, 14)] * 5)
    for sample in dataset.samples[:3]:
        sample["image"] = sample["image"].roll(3, dims=2)                  # so that errors occur
    model = ByColour()
    results = [seg.evaluate(model, dataset, Protocol(at_once=n), torch.float32)
               for n in (1, batch)]
    assert 0 < results[0]["mIoU"] < 1
    assert str(results[0]) == str(results[1])                              # nan != nan
    assert model.batches[5][0] == min(batch, 5)


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
        seg.evaluate(ByColour(), dataset, Protocol(at_once=batch), torch.float32,
                     sheet=tmp_path / "out" / "sheet.png")
    finally:
        enable_progress_bars()
    sheet = read_png(tmp_path / "out" / "sheet.png")
    greys = [sheet[y, 10].tolist() for y in range(18 + 96, len(sheet) - 96, 192 + 4)]
    assert greys == [[5 * i + 2] * 3 for i in drawn]


def test_several_scales_are_made_from_the_images_own_size():
    """With more than one ratio the set hands out its images as they are."""
    dataset = Painted([(80, 70)])
    dataset.scale = (10, 10)
    protocol = Protocol((160, 140), ratios=(0.5, 1.0))
    model = ByColour()
    seg.evaluate(model, dataset, protocol, torch.float32)
    assert dataset.scale is None and [tuple(b[-2:]) for b in model.batches] == [(80, 70),
                                                                               (160, 140)]


def test_another_number_of_classes_is_refused():
    """Before anything is predicted."""
    dataset = Painted(MIXED)
    dataset.classes = plain_classes(("a", "b"))
    with pytest.raises(InputError, match="predicts 4 classes, the data set has 2"):
        seg.evaluate(ByColour(), dataset, Protocol(), torch.float32)


def test_report(capsys):
    """Percent with two decimals, a line per class, n/a for what is undefined, means last."""
    dataset = Painted([])
    dataset.classes = plain_classes(("red car", "sky"))
    seg.report({"IoU": [0.5, math.nan], "Acc": [1.0, math.nan], "mIoU": 0.5, "mAcc": 0.12345,
                "aAcc": math.nan}, dataset)
    head, car, sky, means = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "IoU", "Acc"]
    assert car == "red car  50.00  100.00"
    assert sky.split() == ["sky", "n/a", "n/a"]
    assert means.split() == ["mIoU", "50.00", "mAcc", "12.35", "aAcc", "n/a"]


# ------------------------------------------------------------------------------------------------
# Pictures

def test_colour_labels():
    """Each label gets its class's colour, 255 black; any integer type; 255 classes, too."""
    labels = [[0, 1, 255], [3, 2, 255]]
    for dtype in (np.uint8, np.int64):
        picture = seg.colour_labels(np.array(labels, dtype), CLASSES)
        assert picture.dtype == np.uint8
        assert picture.tolist() == [[list(RED), list(GREEN), [0, 0, 0]],
                                    [list(YELLOW), list(BLUE), [0, 0, 0]]]
    many = plain_classes(tuple(str(i) for i in range(255)))
    picture = seg.colour_labels(np.arange(256)[None], many)
    assert [tuple(colour) for colour in picture[0].tolist()] == [*many.palette, (0, 0, 0)]


def test_legend_names_present_classes_only():
    """The colours in the legend are those of the classes that occur in any of the maps."""
    one = seg.legend([np.array([[1, 255]])], CLASSES, 300)
    assert colours(one) >= {GREEN} and not colours(one) & {RED, BLUE, YELLOW}
    two = seg.legend([np.array([[1, 255]]), np.array([[3, 3, 1]])], CLASSES, 300)
    assert colours(two) >= {GREEN, YELLOW} and not colours(two) & {RED, BLUE}
    assert colours(seg.legend([np.array([[255]])], CLASSES, 300)) <= {(255, 255, 255)}


HEADER = draw.TEXT_HEIGHT + 4


def test_sheet_columns(tmp_path):
    """Input, truth, prediction from left to right; one row per image; the legend below."""
    image = torch.zeros(3, 96, 64)
    image[:, :48] = 1                                                      # white above black
    truth, prediction = torch.full((96, 64), 2), torch.full((96, 64), 3)
    truth[:48], prediction[48:] = 255, 0
    path = tmp_path / "new" / "folder" / "sheet.png"
    seg.save_sheet(path, [(image, truth, prediction)] * 2, CLASSES)
    sheet, panel = read_png(path), 2 * 64
    legend = seg.legend([truth.numpy(), prediction.numpy()], CLASSES, 3 * panel)
    assert sheet.shape == (HEADER + 2 * (192 + 4) + len(legend), 3 * panel, 3)
    for top in (HEADER, HEADER + 196):
        panels = [sheet[top:top + 192, i * panel:(i + 1) * panel] for i in range(3)]
        upper, lower = ([colours(p[half]) for p in panels] for half in (slice(96), slice(96, 192)))
        assert upper == [{(255, 255, 255)}, {(0, 0, 0)}, {YELLOW}]
        assert lower == [{(0, 0, 0)}, {BLUE}, {RED}]
    assert np.array_equal(sheet[-len(legend):], legend)
    assert colours(sheet[:HEADER]) > {(255, 255, 255)}                     # the columns' titles


def test_sheet_of_different_sizes(tmp_path):
    """Images of different sizes share a sheet; the input takes the size of its own labels."""
    rows = [(torch.full((3, 20, 40), 0.2), torch.zeros(200, 300).long(), torch.ones(200, 300)
             .long()), (torch.full((3, 192, 50), 0.8), np.zeros((192, 50), int),
                        np.ones((192, 50), int))]
    seg.save_sheet(tmp_path / "sheet.png", rows, CLASSES)
    sheet = read_png(tmp_path / "sheet.png")
    assert sheet.shape == (HEADER + 204 + 196 + draw.TEXT_HEIGHT + 4, 900, 3)
    first, second = sheet[HEADER:HEADER + 200], sheet[HEADER + 204:HEADER + 204 + 192]
    assert [colours(first[:, i:i + 300]) for i in (0, 300, 600)] == [{(51, 51, 51)}, {RED}, {GREEN}]
    assert [colours(second[:, i:i + 50]) for i in (0, 50, 100, 150)] == [
        {(204, 204, 204)}, {RED}, {GREEN}, {(255, 255, 255)}]              # white beside the row


def test_overlay(tmp_path):
    """The image, of its own size, 55 % of it the colours of its labels; black where there is none.
    """
    labels = np.full((200, 400), 2, np.uint8)
    labels[:, 200:] = 255
    seg.save_overlay(tmp_path / "o.png", np.full((200, 400, 3), 100, np.uint8), labels, CLASSES)
    picture = read_png(tmp_path / "o.png")
    assert picture.shape == (200 + 4 + HEADER, 400, 3)
    found = picture[100, [50, 300]]
    assert np.allclose(found, [[45, 45, 185], [45, 45, 45]], atol=1)
    assert BLUE in colours(picture[204:])


# ------------------------------------------------------------------------------------------------
# The user's own pictures

@pytest.mark.parametrize("size", [(300, 200), (70, 500), (20, 30), (90, 90)])
@pytest.mark.parametrize("scale", [(512, 128), None])
def test_labels_are_those_of_evaluation(tmp_path, size, scale):
    """The model gets the very pixels that the data set would give it, so labels are the same."""
    protocol = Protocol(scale, 64, 43, max_side=512) if scale else Protocol(max_side=512)
    pair = (save_image(tmp_path / "a.png", noise(*size)),
            save_image(tmp_path / "l.png", noise(*size)[..., 0]))
    classes = plain_classes(tuple(map(str, range(255))))
    sample = SegFiles([pair], classes, Cut("val", (64, 64), scale, 0))[0, 0]
    image, model = load_image(pair[0]), Pointwise()
    labels = seg.predict_labels(model, image, protocol, torch.float32)
    assert labels.shape == size and labels.dtype == np.uint8
    if min(size) >= 64:
        given = (sample["image"] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(seg.model_input(image, protocol), given)
        expected = seg.predict(model, sample["image"][None], size, protocol, torch.float32)
        assert np.array_equal(labels, expected.argmax(dim=1)[0].numpy())


def test_long_thin_images_at_a_scale():
    """Sides that the protocol's scale would make smaller than 64 pixels become 64."""
    out = seg.model_input(noise(10, 900), Protocol((512, 128), 64, 43, max_side=128))
    assert out.shape == (64, 512, 3)


def test_large_images_in_bounded_memory(monkeypatch):
    """Labels above the bound are predicted at fewer pixels, and still have the image's size."""
    monkeypatch.setattr(seg, "PROBABILITIES", 3 * 40 * 30)
    image = np.zeros((120, 90, 3), np.uint8)
    image[:60, :, 0] = image[60:, :, 1] = 255
    labels = seg.predict_labels(Pointwise(), image, Protocol(max_side=128), torch.float32)
    assert labels.shape == (120, 90)
    assert (labels[:57] == 0).all() and (labels[63:] == 1).all()


def test_a_models_own_class_names():
    """Of a user's folder they are the model's, numbers without; a released set has its own."""
    row = RECIPES["seg", "folder"]
    for names, found in (((), ("class 0", "class 1")), (("a", "b"), ("a", "b"))):
        recipe = replace(row, model=replace(row.model, num_classes=2, class_names=names))
        assert seg.prepare(recipe, None).names == found
    assert seg.prepare(RECIPES["seg", "ade20k"], None).names[0] == "wall"


def test_the_view_is_one_piece():
    """What the model gets, without windows and other scales, never above --max-side."""
    recipe = replace(RECIPES["seg", "ade20k"], protocol=seg.with_tta(
        Protocol((400, 100), 64, 43, max_side=256)))
    assert seg.view(noise(200, 300), Path("a"), recipe, CLASSES).shape == (100, 150, 3)
    assert seg.view(noise(100, 300), Path("a"), recipe, CLASSES).shape == (85, 256, 3)
