"""Resizing and colour spaces are cv2 4.8's, to the bit.

Against figures that cv2 printed (tests/golden/augment.json), and the textbook's formula.

    python -m pytest tests/test_pixels.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
from trees import random_image

from ops import pixels

GOLDEN = json.loads((Path(__file__).parent / "golden" / "augment.json").read_text())


def row(colours):
    """Colours as an image one pixel high."""
    return np.array(colours, np.uint8)[None]


def test_bilinear_golden():
    """Bilinear enlarging of a colour image gives cv2's bytes."""
    case = GOLDEN["cv2_bilinear_u8"]
    out = pixels.resize_bilinear(np.array(case["img_rgb"], np.uint8), case["out_hw"])
    assert out.dtype == np.uint8 and out.tolist() == case["out"]


@pytest.mark.parametrize("case", GOLDEN["cv2_extra_bilinear"])
def test_bilinear_truncates_where_cv2_does(case):
    """Dropped bits are cv2's: between the passes, and in the two shares of an edge row."""
    out = pixels.resize_bilinear(np.array(case["img"], np.uint8), case["out_hw"])
    assert out.tolist() == case["out"]


@pytest.mark.parametrize("case", GOLDEN["cv2_extra_bilinear_far"])
def test_bilinear_positions_are_float32(case):
    """Two thousand pixels from the origin a position keeps float32 precision, and no more."""
    source, target, expected = case
    line = (np.arange(source) * 37 % 256).astype(np.uint8)
    assert pixels.resize_bilinear(line[None], (1, target)).tolist() == [expected]


@pytest.mark.parametrize("size", [(70, 100), (150, 41), (64, 64), (33, 200)])
def test_bilinear_is_the_textbook_formula(size):
    """Beyond the golden sizes, and across row blocks, it is float interpolation within 1 level."""
    image = random_image(97, 83).astype(np.float64)
    weights = []
    for source, target in zip(image.shape, size):
        centre = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        weights.append(np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(source))))
    expected = np.einsum("yh,xw,hwc->yxc", *weights, image)
    out = pixels.resize_bilinear(image.astype(np.uint8), size)
    assert np.abs(out - expected).max() <= 1 and np.abs(out - expected).mean() < 0.3


def test_bilinear_keeps_equal_size():
    """Resizing to the size an image already has returns the same bytes."""
    image = random_image(70, 45)
    assert np.array_equal(pixels.resize_bilinear(image, (70, 45)), image)


def test_bilinear_layouts_agree():
    """A single channel, and a view that is not contiguous, resize like the image they belong to."""
    image = random_image(40, 50)
    out = pixels.resize_bilinear(image, (61, 33))
    assert np.array_equal(pixels.resize_bilinear(image[..., 1], (61, 33)), out[..., 1])
    turned = pixels.resize_bilinear(image[:, :, ::-1], (61, 33))
    assert np.array_equal(turned, out[:, :, ::-1])


@pytest.mark.parametrize("case", GOLDEN["cv2_nearest_index"] + GOLDEN["cv2_extra_nearest"])
def test_nearest_index(case):
    """Nearest picks cv2's indices along both axes, down to the last bit of its float64 scale."""
    source, target, index = case
    line = np.arange(source) * 1000                              # int64: not only bytes
    assert pixels.resize_nearest(line[None], (1, target))[0].tolist() == line[index].tolist()
    assert pixels.resize_nearest(line[:, None], (target, 1))[:, 0].tolist() == line[index].tolist()


def test_rgb_to_hsv_golden():
    """RGB -> HSV gives cv2's bytes, ties and greys included."""
    case = GOLDEN["rgb_to_hsv_u8"]
    assert pixels.rgb_to_hsv(row(case["rgb"])).tolist() == [case["hsv"]]


def test_hsv_to_rgb_golden():
    """HSV -> RGB gives cv2's bytes, half of them where another float32 rounding would be off."""
    case = GOLDEN["cv2_extra_hsv_to_rgb"]
    assert pixels.hsv_to_rgb(row(case["hsv"])).tolist() == [case["rgb"]]


def test_hsv_round_trip():
    """There and back, greys and full colours return within 1 level, everything within 6."""
    levels = np.arange(256, dtype=np.uint8)
    zero = np.zeros_like(levels)
    for channels in ((levels, levels, levels), (levels, zero, zero), (zero, levels, levels)):
        image = np.stack(channels, -1)[None]
        back = pixels.hsv_to_rgb(pixels.rgb_to_hsv(image)).astype(int)
        assert np.abs(back - image).max() <= 1
    image = random_image(200, 200)                               # 180 hues for 1530 shades of edge
    back = pixels.hsv_to_rgb(pixels.rgb_to_hsv(image)).astype(int)
    assert np.abs(back - image).max() <= 6


def test_hue_wraps():
    """A hue of 180 and more names the same colour as 180 less, within 1 level."""
    hsv = random_image(64, 64)
    hsv[..., 0] %= 76
    wrapped = hsv + np.array([180, 0, 0], np.uint8)
    difference = pixels.hsv_to_rgb(hsv).astype(int) - pixels.hsv_to_rgb(wrapped)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("call", [
    lambda image: pixels.resize_bilinear(image / 255, (2, 2)),
    lambda image: pixels.resize_bilinear(image, (0, 2)),
    lambda image: pixels.resize_nearest(image[:0], (2, 2)),
    lambda image: pixels.rgb_to_hsv(image / 255),
    lambda image: pixels.hsv_to_rgb(image[..., :2]),
])
def test_wrong_input_is_refused(call):
    """Wrong dtypes, shapes and sizes raise ValueError instead of a silent black image."""
    with pytest.raises(ValueError, match="need"):
        call(random_image(4, 4))
