"""Depth: shifted windows, the authors' nine metrics, pictures with a scale, 16-bit files.

    pytest tests/test_depth.py
"""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import colours, columns_of, noise, read_png
from torch import nn

from model import Config
from ops import draw
from ops.errors import InputError
from sets.files import load_depth
from tasks import depth
from tasks.depth import Protocol
from tasks.recipes import RECIPES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "depth.json").read_text())


class Brightness(nn.Module):
    """A pointwise depth model: metres from the red channel; notes what it is shown."""

    def __init__(self):
        super().__init__()
        self.config, self.prompts = Config(task="depth"), nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, images):
        """(B, 3, H, W) -> (B, 1, H, W)."""
        self.shapes.append(tuple(images.shape))
        return images[:, :1] * 9 + 0.5


# ------------------------------------------------------------------------------------------------
# Prediction

def test_shifted_windows_meet_the_golden_starts():
    """NYU 0 and 160; KITTI every 57 columns, the last window moved to the edge (ours)."""
    nyu, kitti = GOLDEN["shift_windows"]["nyu"], GOLDEN["shift_windows"]["kitti"]
    assert depth.shifted_windows(640, 480, 2) == nyu["starts"]
    assert depth.shifted_windows(1216, 352, 16) == kitti["starts"][:-1] + [1216 - 352]
    assert depth.shifted_windows(480, 480, 2) == [0]


@pytest.mark.parametrize("width, side, count", [(1000, 100, 2), (37, 8, 2), (201, 100, 2),
                                                (300, 100, 3), (11, 10, 16)])
def test_shifted_windows_leave_no_gap(width, side, count):
    """However wide the image: more windows than asked for, rather than columns without an answer.
    """
    starts = depth.shifted_windows(width, side, count)
    covered = {x for start in starts for x in range(start, start + side)}
    assert covered == set(range(width)) and len(starts) >= count


@pytest.mark.parametrize("size", [(8, 37), (20, 12)])
@pytest.mark.parametrize("count,flip", [(1, False), (1, True), (2, True), (5, False), (16, True)])
def test_windows_of_a_pointwise_depth_model_change_nothing(count, flip, size):
    """Windows and mirror images of a pointwise model average to its prediction on the whole; an
    image that is taller than wide is one window.
    """
    images, model = torch.rand(2, 3, *size), Brightness()
    found = depth.predict(model, images, Protocol(count, flip), torch.float32)
    assert torch.allclose(found, images[:, 0] * 9 + 0.5, atol=1e-6)
    assert not found.requires_grad and max(shape[0] for shape in model.shapes) <= 8


def test_mirror_images_are_turned_back():
    """With flip, a model that sees columns 0..W-1 averages to their middle everywhere."""
    found = depth.predict(columns_of, torch.rand(1, 3, 4, 11), Protocol(flip=True), torch.float32)
    assert torch.equal(found, torch.full((1, 4, 11), 5.0))


# ------------------------------------------------------------------------------------------------
# Numbers

def test_nine_metrics_meet_the_golden_values():
    """d1..d3, abs_rel, sq_rel, rmse, rmse_log, log10, silog of the authors' function (1e-6)."""
    i = torch.arange(64, dtype=torch.float64)
    truth = (3 + 2 * torch.sin(0.7 * i)).float()
    prediction = torch.maximum(torch.tensor(0.3), truth + (0.4 * torch.cos(1.9 * i)).float())
    found = depth.depth_metrics(prediction, truth)
    assert found.keys() == GOLDEN["depth_metrics"]["metrics"].keys()
    for name, value in GOLDEN["depth_metrics"]["metrics"].items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_metrics_by_hand():
    """Two pixels, 1 m seen as 2 m and 4 m seen as 4 m."""
    found = depth.depth_metrics(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 4.0]))
    assert found["d1"] == 0.5 and found["d3"] == 0.5
    assert found["abs_rel"] == 0.5 and found["sq_rel"] == 0.5
    assert found["rmse"] == pytest.approx(math.sqrt(0.5))
    assert found["log10"] == pytest.approx(math.log10(2) / 2)


@pytest.mark.parametrize("box,size,key,pixels", [
    ("nyu", (480, 640), "nyu_rows_cols", "nyu_pixels"),
    ("garg", (352, 1216), "garg_rows_cols_352x1216", "garg_pixels"),
    ("eigen", (352, 1216), "eigen_rows_cols_352x1216", "eigen_pixels")])
def test_boxes_meet_the_golden_values(box, size, key, pixels):
    """The benchmark's rows and columns, and how many pixels they hold."""
    golden = GOLDEN["depth_eval_crop"]
    assert list(depth.evaluation_box(*size, box)) == golden[key]
    valid = depth.valid_depth(torch.full(size, 5.0), Protocol(box=box, max_depth_eval=10.0))
    assert valid.sum().item() == golden[pixels]


def test_range_is_strict():
    """Depth at or below the minimum, at or above the maximum, does not count."""
    target = torch.tensor([[0.0, 1e-3, 0.5, 9.99, 10.0, 11.0]])
    valid = depth.valid_depth(target, Protocol(max_depth_eval=10.0))
    assert valid.tolist() == [[False, False, True, True, False, False]]


class Grey:
    """A set of grey images, each of one brightness and one true depth."""

    def __init__(self, values):
        self.values = values                             # (brightness, metres)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        grey, metres = self.values[key[1]]
        return {"image": torch.full((3, 8, 10), grey), "target": torch.full((8, 10), metres),
                "name": self.names()[key[1]]}

    def names(self):
        return [f"scene/rgb {i}.jpg" for i in range(len(self))]


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_sets_metrics_are_the_mean_over_its_images(tmp_path, at_once):
    """0.5 m seen as 1 m, 5 m as 5 m: images without a valid pixel don't count; sheet and 16-bit
    files, named after scene and file, are written.
    """
    dataset = Grey([(0.5 / 9, 0.5), (0.5, 5.0), (0.5, 0.0), (0.5, 90.0)])
    metrics = depth.evaluate(Brightness(), dataset, Protocol(at_once=at_once), torch.float32,
                             sheet=tmp_path / "s.png", export=tmp_path / "x")
    assert metrics["images"] == 2
    assert metrics["rmse"] == pytest.approx(0.25) and metrics["d1"] == 0.5
    assert metrics["abs_rel"] == pytest.approx(0.5)
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert files == [f"scene_rgb_{i}.png" for i in range(4)]
    assert (load_depth(tmp_path / "x" / files[1]) == 5 * 256).all()
    assert read_png(tmp_path / "s.png").std() > 10


def test_a_set_without_a_valid_pixel_is_refused():
    """There would be nothing to average."""
    with pytest.raises(InputError, match="no image of the set has a valid depth"):
        depth.evaluate(Brightness(), Grey([(0.5, 0.0)]), Protocol(), torch.float32)


# ------------------------------------------------------------------------------------------------
# Pictures

def test_colours_of_depth_and_error():
    """Near is the first colour, far the last, in between logarithmic; unknown is grey; an error of
    25 % is full red, too far, or blue, too near.
    """
    picture = depth.colour_depth(np.array([[1.0, 4.0, 16.0, 0.0, 99.0]]), 1.0, 16.0)
    first, middle, last = (list(depth.COLOURS[i]) for i in (0, 2, 4))
    assert picture[0].tolist() == [first, middle, last, [128] * 3, last]
    error = depth.colour_error(np.array([[2.0, 2.5, 1.5, 9.0, 1.0]]),
                               np.array([[2.0, 2.0, 2.0, 2.0, 0.0]]))
    assert error[0].tolist() == [[255] * 3, [200, 30, 40], [30, 60, 200], [200, 30, 40], [128] * 3]


@pytest.mark.parametrize("near, far, expected", [
    (1.2, 6.0, (1, 7)), (2.0, 40.0, (2, 40)), (0.1, 0.4, (0.1, 0.5)), (70, 300, (60, 300)),
    (3.0, 3.0, (3, 5))])
def test_scales_end_at_labelled_metres(near, far, expected):
    """The scale covers the depths, from tick to tick where there is one."""
    values = np.linspace(near, far, 1000)
    found = depth.tick_range(np.concatenate([np.full(20, near), values, np.full(20, far)]))
    assert found == pytest.approx(expected)


def test_the_bar_runs_from_near_to_far():
    """As wide as asked for, near on the left; labels in the lower half, another scale others."""
    bar, other = depth.scale_bar(1, 10, 400), depth.scale_bar(2, 20, 400)
    assert bar.shape == other.shape == (2 * draw.TEXT_HEIGHT, 400, 3)
    assert [tuple(bar[5, x].tolist()) for x in (0, -1)] == [depth.COLOURS[0], depth.COLOURS[-1]]
    assert not np.array_equal(bar[draw.TEXT_HEIGHT:], other[draw.TEXT_HEIGHT:])


def test_sheet_columns(tmp_path):
    """Input, truth, prediction, error; one scale of metres for all rows; nothing known: no error.
    """
    image, known = torch.zeros(3, 192, 100), torch.full((192, 100), 2.0)
    depth.save_sheet(tmp_path / "s.png", [(image, known, 2 * known),
                                          (image, 4 * known, 4 * known)])
    sheet, top = read_png(tmp_path / "s.png"), draw.TEXT_HEIGHT + 4
    first, second = ([colours(sheet[y:y + 192, x:x + 100]) for x in range(0, 400, 100)]
                     for y in (top, top + 196))
    near, far = depth.COLOURS[0], depth.COLOURS[-1]
    assert first == [{(0, 0, 0)}, {near}, {depth.COLOURS[2]}, {(200, 30, 40)}]
    assert second == [{(0, 0, 0)}, {far}, {far}, {(255, 255, 255)}]
    depth.save_sheet(tmp_path / "t.png", [(image, 0 * known, known)])


# ------------------------------------------------------------------------------------------------
# The user's own pictures

def own(**changes):
    """The recipe of a user's folder with another protocol."""
    return replace(RECIPES["depth", "folder"], crop=64,
                   protocol=Protocol(**{"max_side": 256, "units": 1000.0, **changes}))


@pytest.mark.parametrize("size", [(100, 64), (64, 200), (9, 5)])
@pytest.mark.parametrize("windows", [1, 2])
def test_depth_png_holds_metres(tmp_path, size, windows):
    """value / units is the predicted depth, at the image's size, portraits too."""
    image, recipe = np.full((*size, 3), 51, np.uint8), own(windows=windows)
    depth.apply(Brightness(), image, Path("x.png"), tmp_path / "x", recipe, torch.float32, 1000.0)
    found = load_depth(tmp_path / "x_depth.png") / 1000
    assert found.shape == size and np.allclose(found, 0.2 * 9 + 0.5, atol=0.0006)
    picture = read_png(tmp_path / "x_depth_colour.png")
    assert picture.ndim == 3 and picture.shape[1] >= draw.MIN_WIDTH


def test_large_pictures_are_predicted_in_small_batches():
    """At once no more pixels than 8 windows of the training size."""
    model = Brightness()
    depth.predict_metres(model, noise(128, 1024), own(windows=9, max_side=1024), torch.float32)
    assert {shape[0] for shape in model.shapes} <= {1, 2} and model.shapes[0][-2:] == (128, 128)
    assert depth.view(noise(128, 1024), Path("x"), own(), 1.0).shape == (64, 256, 3)


@pytest.mark.parametrize("dataset, max_depth, units", [
    ("nyu", 10.0, 1000), ("nyu", 80.0, 256), ("kitti", 80.0, 256), ("kitti", 300.0, 100),
    ("kitti", 20000.0, 1)])
def test_units(dataset, max_depth, units):
    """The benchmark's units, unless the model sees too far for 16 bits of them."""
    row = RECIPES["depth", dataset]
    recipe = replace(row, model=replace(row.model, max_depth=max_depth))
    assert depth.prepare(recipe, None) == units
    assert f"metres = value / {units})" in depth.written(recipe, float(units))
