"""The depth numbers are the authors': nine metrics, evaluation boxes, valid ranges.

    pytest tests/test_metrics.py         (mIoU and its kin: tests/test_eval.py)
"""
import json
import math
from pathlib import Path

import pytest
import torch

import metrics

GOLDEN = json.loads((Path(__file__).parent / "golden" / "depth.json").read_text())


def test_nine_metrics_meet_the_golden_values():
    """d1..d3, abs_rel, sq_rel, rmse, rmse_log, log10, silog of the authors' function (1e-6)."""
    i = torch.arange(64, dtype=torch.float64)
    truth = (3 + 2 * torch.sin(0.7 * i)).float()
    prediction = torch.maximum(torch.tensor(0.3), truth + (0.4 * torch.cos(1.9 * i)).float())
    found = metrics.depth_metrics(prediction, truth)
    assert found.keys() == GOLDEN["depth_metrics"]["metrics"].keys()
    for name, value in GOLDEN["depth_metrics"]["metrics"].items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_metrics_by_hand():
    """Two pixels, 1 m seen as 2 m and 4 m seen as 4 m."""
    found = metrics.depth_metrics(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 4.0]))
    assert found["d1"] == 0.5 and found["d3"] == 0.5
    assert found["abs_rel"] == 0.5 and found["sq_rel"] == 0.5
    assert found["rmse"] == pytest.approx(math.sqrt(0.5))
    assert found["log10"] == pytest.approx(math.log10(2) / 2)


@pytest.mark.parametrize("crop,size,key,pixels", [
    ("nyu", (480, 640), "nyu_rows_cols", "nyu_pixels"),
    ("garg", (352, 1216), "garg_rows_cols_352x1216", "garg_pixels"),
    ("eigen", (352, 1216), "eigen_rows_cols_352x1216", "eigen_pixels")])
def test_boxes_meet_the_golden_values(crop, size, key, pixels):
    """The benchmark's rows and columns, and how many pixels they hold."""
    golden = GOLDEN["depth_eval_crop"]
    assert list(metrics.evaluation_box(*size, crop)) == golden[key]
    valid = metrics.valid_depth(torch.full(size, 5.0), crop, 1e-3, 10.0)
    assert valid.sum().item() == golden[pixels]


def test_range_is_strict():
    """Depth at or below the minimum, at or above the maximum, does not count."""
    target = torch.tensor([[0.0, 1e-3, 0.5, 9.99, 10.0, 11.0]])
    valid = metrics.valid_depth(target, None, 1e-3, 10.0)
    assert valid.tolist() == [[False, False, True, True, False, False]]
