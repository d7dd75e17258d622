"""Polygons become the pixels that pycocotools gives them.

    pytest tests/test_polygons.py
"""
import numpy as np
import pytest
from pycocotools import mask

from ops.polygons import coverage, fill


# pycocotools calls numpy in a way that numpy 2 announces to end.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def expected(polygons, height, width):
    """How many of the polygons cover each pixel, by pycocotools."""
    return mask.decode(mask.frPyObjects(polygons, height, width)).sum(axis=2)


def random_polygon(rng, kind, height, width):
    """(K, 2): anywhere, outside too; tiny; on halves; on whole pixels; a star; corners repeated."""
    count = int(rng.integers(3, 13))
    if kind == "tiny":
        return rng.uniform(0, min(height, width), 2) + rng.uniform(-0.7, 0.7, (count, 2))
    corners = rng.uniform(-0.5, 1.5, (count, 2)) * (width, height)
    if kind == "halves":
        return np.floor(corners) + 0.5
    if kind == "whole":
        return np.floor(corners)
    if kind == "star":
        angle = np.sort(rng.uniform(0, 2 * np.pi, count))
        reach = rng.uniform(0.1, 0.6, count)
        return (0.5 + reach * (np.cos(angle), np.sin(angle))).T * (width, height)
    return np.repeat(corners, 2, axis=0) if kind == "repeated" else corners


@pytest.mark.parametrize("kind", ["anywhere", "tiny", "halves", "whole", "star", "repeated"])
def test_equals_pycocotools(kind):
    """200 polygons of a kind, most self-crossing, partly outside the picture: equal to the pixel.
    """
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        height, width = rng.integers(1, 80, 2).tolist()
        corners = random_polygon(rng, kind, height, width)
        ours = fill(corners, height, width)
        assert np.array_equal(ours, expected([corners.ravel().tolist()], height, width) == 1)
        covered += ours.sum()
    assert covered > 1000 or kind == "tiny" and covered > 0


def test_several_polygons_are_counted():
    """The sum over a segmentation's polygons, and its union, are pycocotools'."""
    polygons = [[5, 5, 35, 5, 35, 45, 5, 45], [25, 15, 55, 15, 55, 35, 25, 35]]
    ours = coverage(polygons, 48, 80)
    assert np.array_equal(ours, expected(polygons, 48, 80)) and ours.max() == 2
    union = mask.decode(mask.merge(mask.frPyObjects(polygons, 48, 80)))
    assert np.array_equal(ours > 0, union == 1)


def test_a_photograph_takes_milliseconds():
    """A polygon of 500 corners on 640 x 480 pixels has the area that it should have."""
    angle = np.arange(500) * 2 * np.pi / 500
    circle = np.stack((320 + 200 * np.cos(angle), 240 + 200 * np.sin(angle)), axis=1)
    assert abs(fill(circle, 480, 640).sum() / (np.pi * 200 ** 2) - 1) < 1e-3
