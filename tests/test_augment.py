"""Training augmentation: mmseg 0.30.0's for segmentation, the official chain for depth.

Proven here: sizes and look-up tables against figures that the reference programs printed
(tests/golden/{augment,depth}.json); the crop rule and the order of every random draw against
scripted generators; and the properties any such pipeline owes its user.

    python -m pytest tests/test_augment.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
from trees import random_image

from ops import augment, pixels

GOLDEN, DEPTH_GOLDEN = (json.loads((Path(__file__).parent / "golden" / name).read_text())
                        for name in ("augment.json", "depth.json"))


class Script:
    """A generator that plays back given draws and keeps the bounds it was asked for."""

    def __init__(self, *draws):
        self.draws, self.asked = list(draws), []

    def integers(self, *bounds):
        self.asked.append(bounds)
        return self.draws.pop(0)

    uniform = integers


@pytest.mark.parametrize("case", GOLDEN["rescale_hw"])
def test_rescale_size(case):
    """Keep-ratio sizes are mmcv's, whichever of the two bounds binds."""
    assert augment.rescale_size(*case["hw"], case["scale"]) == tuple(case["out_hw"])
    assert augment.rescale_size(*case["hw"], case["scale"][::-1]) == tuple(case["out_hw"])


def test_random_rescale_bounds():
    """The short side runs over half to twice the base, evenly, and the bounds are whole pixels."""
    rng = np.random.default_rng(0)
    sides = np.array([augment.random_rescale(512, 512, (2048, 512), rng)[0] for _ in range(2000)])
    assert sides.min() >= 256 and sides.max() < 1024
    assert sides.min() < 262 and sides.max() > 1018 and abs(sides.mean() - 640) < 15
    scripted = Script(1.3999)
    assert augment.random_rescale(375, 500, (2048, 512), scripted) == (716, 955)
    assert scripted.asked == [(0.5, 2.0)]


def test_crop_rejects_a_dominant_class():
    """A draw where one class holds the limit of 75 % is refused, one just below it is taken."""
    label = np.zeros((4, 8), np.uint8)
    label[0, :4], label[:2, 4:], label[2, 4] = 1, 2, 2           # left: 12 of 16; right: 9 and 7
    draws = Script(0, 0, 0, 4)
    assert augment.crop_offset(label, (4, 4), draws) == (0, 4)
    assert not draws.draws
    label[1, 0] = 1                                              # left: 11 of 16
    assert augment.crop_offset(label, (4, 4), Script(0, 0)) == (0, 0)


def test_crop_does_not_count_ignored_pixels():
    """Ignored pixels are neither a class of their own nor part of the total."""
    label = np.full((4, 8), 255, np.uint8)
    label[0, :4] = 3                                             # left: one class and ignore
    label[:, 4:] = [[3, 3, 4, 4], [3, 3, 4, 4], [255] * 4, [255] * 4]
    assert augment.crop_offset(label, (4, 4), Script(0, 0, 0, 4)) == (0, 4)
    label[0, 4:], label[1, 4:] = 3, [3, 3, 4, 255]               # right: 6 of the 7 that count
    assert augment.crop_offset(label, (4, 4), Script(*[0, 4] * 10, 0, 1)) == (0, 1)


def test_crop_eleventh_draw_is_final():
    """On a single-class label ten draws fail and the eleventh is used without a check."""
    draws = Script(*[0, 0] * 10, 3, 5, 1, 1)
    assert augment.crop_offset(np.zeros((9, 9), np.uint8), (2, 2), draws) == (3, 5)
    assert draws.draws == [1, 1]
    first = Script(1, 2)
    assert augment.crop_offset(np.zeros((9, 9), np.uint8), (2, 2), first, max_ratio=1.0) == (1, 2)


def test_crop_offsets_are_inclusive():
    """y is drawn before x, and the crops reach the first and last row and column."""
    draws = Script(1, 2)
    augment.crop_offset(np.zeros((6, 9), np.uint8), (4, 4), draws, max_ratio=1.0)
    assert draws.asked == [(3,), (6,)]
    rng, label = np.random.default_rng(0), np.zeros((6, 9), np.uint8)
    offsets = {augment.crop_offset(label, (4, 4), rng) for _ in range(400)}
    assert offsets == {(y, x) for y in range(3) for x in range(6)}


def test_crop_larger_than_image_clamps():
    """A crop larger than the image is the image; padding makes up the rest, right and below."""
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    y, x = augment.crop_offset(label, (5, 6), np.random.default_rng(0))
    window = augment.crop(label, y, x, (5, 6))
    assert (y, x) == (0, 0) and np.array_equal(window, label)
    padded = augment.pad_to(window, (5, 6), 255)
    assert padded.shape == (5, 6) and padded.dtype == np.uint8
    assert np.array_equal(padded[:3, :4], label)
    assert (padded[3:] == 255).all() and (padded[:, 4:] == 255).all()


def test_crop_is_the_window():
    """Image and label cropped at one offset show the same place."""
    image = random_image(10, 12)
    assert np.array_equal(augment.crop(image, 2, 5, (3, 4)), image[2:5, 5:9])
    assert np.array_equal(augment.crop(image[..., 0], 2, 5, (3, 4)), image[2:5, 5:9, 0])


def test_flip_mirrors_columns():
    """Flipping swaps left and right only, twice is the identity, and strides stay positive."""
    image = random_image(5, 7)
    once = augment.flip(image)
    assert np.array_equal(once[:, 0], image[:, -1]) and np.array_equal(once[0, 3], image[0, 3])
    assert min(once.strides) > 0 and np.array_equal(augment.flip(once), image)


@pytest.mark.parametrize("case", GOLDEN["photometric_convert"])
def test_convert_truncates(case):
    """Brightness and contrast clip to 0..255 and then truncate."""
    value, alpha, beta, expected = case
    image = np.full((2, 2, 3), value, np.uint8)
    assert alpha == 1 or beta == 0                               # the pipeline never mixes the two
    draws = Script(1, beta, 1, 1, alpha, 0, 0)
    assert (augment.photometric_distortion(image, draws) == expected).all()


def test_photometric_draw_order():
    """Every coin precedes its parameter; contrast leads if its coin says so, else it closes."""
    image = random_image(4, 4)
    lead = Script(1, -7.6, 1, 1, 1.2, 1, 0.8, 1, -18)
    coin, contrast, hue = (2,), (0.5, 1.5), (-18, 18)
    augment.photometric_distortion(image, lead)
    assert lead.asked == [coin, (-32.0, 32.0), coin, coin, contrast, coin, contrast, coin, hue]
    close = Script(0, 0, 0, 1, 17, 1, 1.2)
    augment.photometric_distortion(image, close)
    assert close.asked == [coin, coin, coin, coin, hue, coin, contrast]


def test_photometric_order_matters_where_stated():
    """Contrast before hue and contrast after hue are different images, each as composed by hand."""
    image = random_image(8, 8)

    def contrast(colours):
        return np.clip(colours.astype(np.float32) * np.float32(1.4), 0, 255).astype(np.uint8)

    def shift(colours):
        hsv = pixels.rgb_to_hsv(colours).astype(int)
        hsv[..., 0] = (hsv[..., 0] - 18) % 180
        return pixels.hsv_to_rgb(hsv.astype(np.uint8))

    lead = augment.photometric_distortion(image, Script(0, 1, 1, 1.4, 0, 1, -18))
    close = augment.photometric_distortion(image, Script(0, 0, 0, 1, -18, 1, 1.4))
    assert np.array_equal(lead, shift(contrast(image)))
    assert np.array_equal(close, contrast(shift(image))) and not np.array_equal(lead, close)


def test_saturation_and_hue_round_separately():
    """Saturation scales S alone, truncated, with its own round trip before that of the hue."""
    image = random_image(8, 8)
    hsv = pixels.rgb_to_hsv(image)
    scaled = hsv[..., 1].astype(np.float32) * np.float32(1.3)
    hsv[..., 1] = np.minimum(scaled, 255).astype(np.uint8)
    expected = pixels.hsv_to_rgb(hsv)
    out = augment.photometric_distortion(image, Script(0, 0, 1, 1.3, 0, 0))
    assert np.array_equal(out, expected)
    hsv = pixels.rgb_to_hsv(expected)
    hsv[..., 0] = (hsv[..., 0].astype(int) + 17) % 180
    both = augment.photometric_distortion(image, Script(0, 0, 1, 1.3, 1, 17, 0))
    assert np.array_equal(both, pixels.hsv_to_rgb(hsv))


def test_photometric_odds():
    """One image in sixteen comes through untouched, and the input is never written to."""
    rng, image = np.random.default_rng(0), random_image(4, 4)
    before = image.copy()
    same = [np.array_equal(augment.photometric_distortion(image, rng), before) for _ in range(1600)]
    assert 60 < sum(same) < 180 and np.array_equal(image, before)


def test_seeds_reproduce():
    """Equal seeds give equal draws and pixels; another seed gives others."""
    image, label = random_image(60, 50), random_image(60, 50)[..., 0] // 100

    def sample(seed):
        rng = np.random.default_rng(seed)
        size = augment.random_rescale(60, 50, (256, 64), rng)
        corner = augment.crop_offset(pixels.resize_nearest(label, size), (32, 32), rng)
        window = augment.crop(pixels.resize_bilinear(image, size), *corner, (32, 32))
        return augment.pad_to(augment.photometric_distortion(window, rng), (32, 32), 0)

    assert np.array_equal(sample(1), sample(1)) and not np.array_equal(sample(1), sample(2))


@pytest.mark.parametrize("call", [
    lambda image: augment.rescale_size(4, 0, (8, 8)),
    lambda image: augment.crop_offset(image, (2, 2), np.random.default_rng(0)),
    lambda image: augment.crop_offset(image[..., 0].astype(np.int64), (2, 2), Script(0, 0)),
    lambda image: augment.crop(image, -1, 0, (2, 2)),
    lambda image: augment.pad_to(image, (4, 3), 0),
    lambda image: augment.photometric_distortion(image.astype(np.float32), Script()),
])
def test_wrong_input_is_refused(call):
    """Wrong dtypes, shapes, sizes and offsets raise ValueError instead of a silent black image."""
    with pytest.raises(ValueError, match="need|sides"):
        call(random_image(4, 4))


# ------------------------------------------------------------------------------------------------
# Depth

RAMP = np.arange(0, 256, 5, dtype=np.uint8)


def test_brightness_contrast_meets_the_golden_ramp():
    """albumentations' look-up table: i * alpha + 255 * beta, clipped, truncated."""
    golden = DEPTH_GOLDEN["albu_brightness_contrast"]
    out = augment.brightness_contrast(RAMP, golden["alpha"], golden["beta"])
    assert out.tolist() == golden["out"]


@pytest.mark.parametrize("exponent", ["0.83", "1.0", "1.17"])
def test_gamma_meets_the_golden_ramp(exponent):
    """albumentations' look-up table: 255 * (i / 255) ** g, truncated."""
    assert augment.gamma(RAMP, float(exponent)).tolist() == DEPTH_GOLDEN["albu_gamma"][exponent]


@pytest.mark.parametrize("golden", [GOLDEN["albu_hsv_shift"], DEPTH_GOLDEN["albu_hsv_shift"]])
def test_hsv_shift_meets_the_golden_colours(golden):
    """Hue, saturation and value shifted on cv2's uint8 HSV are albumentations' within 1 level."""
    image = np.array(golden["rgb"], np.uint8)[None]
    out = augment.shift_hsv(image, golden["hue"], golden["sat"], golden["val"])[0].astype(int)
    assert np.abs(out - np.array(golden["out"])).max() <= 1


def test_cut_depth_shows_the_low_byte():
    """Raw depth modulo 256 in a range of columns, all rows and channels (2713 -> 153)."""
    image = np.zeros((8, 40, 3), np.uint8)
    depth = np.full((8, 40), 2713, np.float32)
    for seed in range(20):
        cut = augment.cut_depth(image, depth, np.random.default_rng(seed))
        columns = np.flatnonzero((cut == 153).all(axis=(0, 2)))
        assert len(columns) >= 1 and (np.diff(columns) == 1).all()
        assert (np.delete(cut, columns, axis=1) == 0).all()
    assert (image == 0).all()


def test_depth_chain_moves_image_and_depth_alike():
    """Flip and crop hit both: where CutDepth did not, a horizontal ramp stays aligned."""
    columns = np.arange(200, dtype=np.float32)
    depth = np.repeat(columns[None], 100, axis=0) + 1
    image = np.repeat(depth.astype(np.uint8)[..., None], 3, axis=2)
    mirrored, corners = set(), set()
    for seed in range(200):
        out, moved = augment.depth_augmentation(image, depth, (64, 96), np.random.default_rng(seed))
        assert out.shape == (64, 96, 3) and moved.shape == (64, 96)
        steps = np.sign(np.diff(out[0].astype(int).sum(axis=1)))
        direction = np.sign(np.diff(moved[0]))[0]
        assert (steps * direction >= 0).mean() > 0.9
        mirrored.add(direction)
        corners.add(moved.min())
    assert mirrored == {-1, 1}
    assert min(corners) == 1 and max(corners) == 200 - 96 + 1              # both ends are reached


def test_cut_depth_hits_a_quarter():
    """CutDepth is applied to a quarter of the samples, and its width is at most 3/4 of the rest."""
    image, depth = np.zeros((4, 96, 3), np.uint8), np.full((4, 96), 200.0, np.float32)
    rngs = [np.random.default_rng(seed) for seed in range(400)]
    hits = [augment.depth_augmentation(image, depth, (4, 96), rng)[0].max() > 99 for rng in rngs]
    assert 0.18 < np.mean(hits) < 0.32
