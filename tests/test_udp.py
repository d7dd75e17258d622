"""The pose geometry is mmpose 1.x's: crops, augmentation, UDP targets, DARK decoding.

    pytest tests/test_udp.py

tests/golden/pose.npz holds what an independent numpy program gave for it, which agreed with
mmpose 1.x's own files, run one at a time, and with cv2 5.0's warp. Of the target and heatmap arrays
"s" (256x192) is complete, of "m" (384x288) four joints are kept, of "l" (576x448) two.
"""
from pathlib import Path

import numpy as np
import pytest
import torch

from ops import augment
from ops import udp

GOLDEN = np.load(Path(__file__).parent / "golden" / "pose.npz")
TAGS = ("s", "m", "l")


class Draws:
    """A generator whose uniform draws are given."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)


def golden(tag: str, name: str) -> torch.Tensor:
    """An array of one size as a batch of one person."""
    return torch.from_numpy(GOLDEN[f"udp_{tag}_{name}"])[None]


def sizes(tag: str) -> tuple:
    """Crop, heatmap size, sigma, blur kernel of one size."""
    W, H, w, h, sigma, kernel = GOLDEN[f"udp_{tag}_cfg"].tolist()
    return (H, W), (h, w), sigma, kernel


def golden_keypoints(tag: str) -> torch.Tensor:
    """(1, K, 3) joints with their visibility."""
    return torch.cat([golden(tag, "kpts"), golden(tag, "vis")[..., None]], dim=-1)


def with_peak(tag: str) -> torch.Tensor:
    """Joints whose recorded map has a peak: not the one far outside, not the unlabelled one."""
    labelled = (golden(tag, "vis") > 0) & (golden(tag, "weight") > 0)
    assert labelled.sum() == {"s": 15, "m": 4, "l": 2}[tag]
    return labelled[0]


def close(found, expected, tolerance: float) -> bool:
    """True if every entry agrees to `tolerance`, absolute."""
    return np.abs(np.asarray(found, np.float64) - np.asarray(expected)).max() <= tolerance


# ------------------------------------------------------------------------------------------------
# Joints

def test_flip_swaps_left_and_right():
    """FLIP pairs every left joint with the right one, and upper and lower body split the 17."""
    swap = {"left": "right", "right": "left"}
    for i, name in enumerate(udp.KEYPOINTS):
        side, _, rest = name.partition("_")
        assert udp.KEYPOINTS[udp.FLIP[i]] == (f"{swap[side]}_{rest}" if side in swap else name)
    assert (*udp.UPPER, *udp.LOWER) == tuple(range(17))
    assert {udp.KEYPOINTS[i].split("_")[1] for i in udp.LOWER} == {"hip", "knee", "ankle"}


def test_skeleton_joins_neighbours():
    """19 distinct bones that reach every joint and are their own mirror image."""
    bones = {frozenset(bone) for bone in udp.SKELETON}
    assert len(bones) == 19 and frozenset().union(*bones) == set(range(17))
    assert {frozenset(udp.FLIP[i] for i in bone) for bone in bones} == bones


# ------------------------------------------------------------------------------------------------
# Crops

def test_box_meets_the_golden_values():
    """Clipped box, centre, padded scale and scale of the crop's aspect."""
    for box, (W, H), (w, h), expected in zip(GOLDEN["box_xywh"], GOLDEN["box_image_wh"],
                                             GOLDEN["affine_out_wh"],
                                             GOLDEN["box_xyxy_center_scale_fixed"]):
        clipped = udp.clip_box(box, (H, W))
        center, scale = udp.center_scale(clipped)
        found = [*clipped, *center, *scale, *udp.fix_aspect(scale, (h, w))]
        assert close(found, expected, 1e-9)


def test_boxes_end_at_the_last_pixel():
    """mmpose's COCO reader gave [0, 10, 45, 79] for this box in a 100 x 80 image."""
    assert udp.clip_box([-5, 10, 50, 700], (80, 100)).tolist() == [0, 10, 45, 79]


def test_matrix_meets_the_golden_values():
    """UDP matrices with and without rotation, and points under them."""
    for (w, h), row, rotation, matrix, points, moved in zip(
            GOLDEN["affine_out_wh"], GOLDEN["box_xyxy_center_scale_fixed"], GOLDEN["affine_rot"],
            GOLDEN["affine_matrix"], GOLDEN["affine_points"], GOLDEN["affine_points_out"]):
        found = udp.udp_matrix(row[4:6], row[8:], (h, w), rotation)
        assert close(found, matrix, 1e-9)
        assert close(udp.transform(points, found), moved, 1e-9)


def test_box_spans_the_crop_from_pixel_centre_to_pixel_centre():
    """center -+ scale / 2 are the centres of the first and the last pixel."""
    center, scale = np.array([100.0, 80.0]), np.array([60.0, 80.0])
    matrix = udp.udp_matrix(center, scale, (64, 48))
    corners = udp.transform(np.stack([center - scale / 2, center + scale / 2]), matrix)
    assert close(corners, [[0, 0], [47, 63]], 1e-12)
    turned = udp.udp_matrix(center, scale, (64, 48), 90)
    assert close(turned, [[0, -0.783333, 86.166667], [0.7875, 0, -47.25]], 1e-6)


@pytest.mark.parametrize("case", range(3))
def test_warp_is_the_exact_bilinear_rule_rounded(case):
    """Within half a grey level of the golden float64 warp, black outside."""
    out = udp.warp(GOLDEN["warp_image"], GOLDEN[f"warp_{case}_matrix"], (32, 24))
    assert out.dtype == np.uint8 and close(out, GOLDEN[f"warp_{case}_out"], 0.501)


def test_warp_blends_with_black_at_the_rim():
    """Half a pixel beyond the edge an image of 200 is 100, a whole one beyond it is 0."""
    image = np.full((4, 6, 3), 200, np.uint8)
    row = udp.warp(image, np.array([[2.0, 0, 4], [0, 1, 0]]), (4, 16))[1, :, 0]
    assert row.tolist() == [0, 0, 0, 100] + [200] * 11 + [100]


@pytest.mark.parametrize("shape,dtype,named", [
    ((1, 9, 3), np.uint8, "2 x 2 pixels or more"), ((9, 1, 3), np.uint8, "2 x 2 pixels or more"),
    ((9, 9), np.uint8, r"\(9, 9\) uint8"), ((9, 9, 3), np.float32, "float32")])
def test_warp_refuses_what_it_cannot_warp(shape, dtype, named):
    """A side of one pixel has no coordinate range; other dtypes and ranks are named."""
    with pytest.raises(ValueError, match=named):
        udp.warp(np.zeros(shape, dtype), np.eye(2, 3), (8, 8))


def test_flip_then_crop_is_crop_then_flip():
    """Mirroring image, joints and centre first gives the mirrored crop and joints."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    keypoints = np.column_stack([rng.uniform(0, 40, (17, 2)), rng.integers(0, 2, 17)])
    center, scale, size = np.array([21.3, 18.9]), np.array([30.0, 40.0]), (64, 48)
    matrix = udp.udp_matrix(center, scale, size)
    mirrored = udp.udp_matrix(np.array([49 - center[0], center[1]]), scale, size)
    crop, other = udp.warp(image, matrix, size), udp.warp(augment.flip(image), mirrored, size)
    assert np.abs(crop[:, ::-1].astype(int) - other).max() <= 1
    moved = np.column_stack([udp.transform(keypoints[:, :2], matrix), keypoints[:, 2]])
    flipped = udp.flip_keypoints(keypoints, 50)
    assert close(udp.transform(flipped[:, :2], mirrored),
                 udp.flip_keypoints(moved, 48)[:, :2], 1e-9)
    assert (flipped[:, 2] == keypoints[list(udp.FLIP), 2]).all()


# ------------------------------------------------------------------------------------------------
# Augmentation

@pytest.mark.parametrize("half,draw", [("upper", 0.69), ("lower", 0.71)])
def test_half_body_meets_the_golden_values(half, draw):
    """Mean of half the joints, 1.5 times their extent; the second draw chooses the half."""
    keypoints = np.column_stack([GOLDEN["half_kpts"], np.ones(17)])
    found = udp.half_body(keypoints, None, None, Draws(0.3, draw))
    assert close(np.concatenate(found), GOLDEN[f"half_{half}_center_scale"], 1e-9)


def test_half_body_frequencies():
    """With 17 labelled joints 70 % are left alone, 21 % get the upper half, 9 % the lower."""
    keypoints = np.column_stack([GOLDEN["half_kpts"], np.ones(17)])
    rng, none = np.random.default_rng(0), np.zeros(2)
    upper = GOLDEN["half_upper_center_scale"][0]
    found = [udp.half_body(keypoints, none, none, rng)[0][0] for _ in range(5000)]
    shares = [np.mean(np.equal(found, 0)), np.mean(np.isclose(found, upper))]
    assert close([*shares, 1 - sum(shares)], [0.70, 0.21, 0.09], 0.015)


@pytest.mark.parametrize("labelled,draws", [(range(8), []), (range(9), [0.31])])
def test_half_body_leaves_the_box_alone(labelled, draws):
    """Eight labelled joints draw nothing; nine are left alone above 0.3."""
    keypoints = np.column_stack([GOLDEN["half_kpts"], np.zeros(17)])
    keypoints[list(labelled), 2] = 1
    center, scale = np.ones(2), np.full(2, 9.0)
    rng = Draws(*draws)
    found = udp.half_body(keypoints, center, scale, rng)
    assert found[0] is center and found[1] is scale and not rng.values


def test_half_body_takes_the_upper_half_when_few_lower_joints_are_known():
    """Two labelled lower joints are too few; three will do."""
    keypoints = np.column_stack([GOLDEN["half_kpts"], np.ones(17)])
    keypoints[13:, 2] = 0
    center, _ = udp.half_body(keypoints, None, None, Draws(0.1, 0.9))
    assert close(center, keypoints[:11, :2].mean(axis=0), 1e-9)
    keypoints[13, 2] = 1
    center, _ = udp.half_body(keypoints, None, None, Draws(0.1, 0.9))
    assert close(center, keypoints[11:14, :2].mean(axis=0), 1e-9)


def test_half_body_keeps_a_scale_above_zero():
    """All joints on one point would make an empty box: the given one stays."""
    keypoints, scale = np.ones((17, 3)), np.full(2, 9.0)
    assert udp.half_body(keypoints, np.ones(2), scale, Draws(0.1, 0.1))[1] is scale


def test_truncated_normal():
    """Within [-1, 1], symmetric, standard deviation 0.5396."""
    z = udp.truncated_normal(np.random.default_rng(0), 40_000)
    assert z.min() >= -1 and z.max() <= 1
    assert z.std() == pytest.approx(0.5396, abs=0.005) and z.mean() == pytest.approx(0, abs=0.01)


def test_random_box_statistics():
    """Shift in 30 %, by up to 0.16 of the box; zoom always, 0.5 to 1.5; rotation in 60 %, to 80.

    One coin decides both axes' shift; each amount has the truncated normal's deviation.
    """
    rng, scale = np.random.default_rng(0), np.array([100.0, 200.0])
    rows = [np.hstack(udp.random_box(np.zeros(2), scale, rng)) for _ in range(6000)]
    x, y, w, h, rotation = np.array(rows).T
    assert close([np.mean(x != 0), np.mean(rotation != 0)], [0.3, 0.6], 0.02)
    assert ((x != 0) == (y != 0)).all() and close(h, 2 * w, 1e-9)
    for amount, unit in ((x[x != 0], 16), (y[y != 0], 32), (w - 100, 50),
                         (rotation[rotation != 0], 80)):
        assert np.abs(amount).max() <= unit
        assert amount.std() == pytest.approx(0.5396 * unit, rel=0.04)
        assert abs(amount.mean()) < 0.05 * unit


# ------------------------------------------------------------------------------------------------
# Targets and loss

@pytest.mark.parametrize("tag", TAGS)
def test_targets_meet_the_golden_values(tag):
    """Maps to 1e-6 and weights exactly, with joints at the corner, outside and unlabelled."""
    crop, size, sigma, _ = sizes(tag)
    target, weight = udp.heatmap_targets(golden_keypoints(tag), crop, size, sigma)
    assert target.dtype == torch.float32 and target.shape[2:] == size
    assert close(target, golden(tag, "target"), 1e-6) and torch.equal(weight, golden(tag, "weight"))


def test_each_person_of_a_batch_gets_their_own_map():
    """A batch is the stack of its people."""
    crop, size, sigma, _ = sizes("s")
    people = torch.cat([golden_keypoints("s"), golden_keypoints("s").flip(1)])
    target, weight = udp.heatmap_targets(people, crop, size, sigma)
    assert torch.equal(target[1], target[0].flip(0)) and torch.equal(weight[1], weight[0].flip(0))
    assert not torch.equal(target[0], target[1])


@pytest.mark.parametrize("x,weight,filled", [
    (-7.4, 1, True), (-7.6, 1, False), (-8.4, 1, False), (-8.6, 0, False), (69.4, 1, True),
    (69.6, 0, False)])
def test_supervision_ends_three_sigma_outside(x, weight, filled):
    """On a map 64 wide, sigma 2: nearest pixels round toward 0, a window that just misses counts.

    A window that ends one pixel before the map has weight 1 and an empty map, as in mmudp.
    """
    keypoints = torch.tensor([[[x, 20.0, 1.0]] * 17])
    target, found = udp.heatmap_targets(keypoints, (64, 64), (64, 64), 2)
    assert (found == weight).all() and bool(target.any()) == filled


def test_sigma_must_fit_the_window():
    """3 sigma is a number of pixels."""
    with pytest.raises(ValueError, match="sigma 4.5"):
        udp.heatmap_targets(torch.zeros(1, 17, 3), (64, 64), (16, 16), 4.5)


def test_loss_meets_the_golden_value():
    """Weighted, divided by all pixels of all joints."""
    out, target, weight = (torch.from_numpy(GOLDEN[f"loss_{n}"]) for n in ("out", "target",
                                                                            "weight"))
    assert udp.keypoint_mse(out, target, weight).item() == pytest.approx(
        GOLDEN["loss_value"].item(), rel=1e-6)
    assert udp.keypoint_mse(out, target, torch.zeros_like(weight)) == 0


def test_pck_by_hand():
    """On maps 40 high and 20 wide a peak may be 1.9 columns off (of 40) but 0.9 rows (of 20).

    The axes are swapped as in mmpose; joints without weight don't count.
    """
    target, out = torch.zeros(1, 4, 40, 20), torch.zeros(1, 4, 40, 20)
    target[0, :, 10, 10] = 1
    for joint, (x, y) in enumerate([(11, 10), (10, 11), (12, 10), (10, 10)]):
        out[0, joint, y, x] = 1
    hits, count = udp.pck(out, target, torch.tensor([[1.0, 1, 1, 0]]))
    assert (hits.item(), count.item()) == (1, 3)


# ------------------------------------------------------------------------------------------------
# Decoding

@pytest.mark.parametrize("kernel", [11, 17, 23])
def test_blur_kernel_meets_the_golden_values(kernel):
    """cv2's Gaussian of that size along the rows of the matrix, zeros beyond it."""
    matrix = udp.blur_matrix(40, kernel)
    reach = kernel // 2
    assert close(matrix[20, 20 - reach:21 + reach], GOLDEN[f"kernel{kernel}"], 1e-12)
    assert (matrix > 0).sum(dim=1)[20] == kernel and (matrix > 0).sum(dim=1)[0] == reach + 1


def test_even_kernels_are_refused():
    """An even kernel would shift the map."""
    with pytest.raises(ValueError, match="got 12"):
        udp.decode(torch.rand(1, 17, 32, 32), 12)


@pytest.mark.parametrize("maps,expected", [("pred", "hm_xy"), ("target", "clean_hm_xy")])
@pytest.mark.parametrize("tag", TAGS)
def test_decoding_meets_the_golden_values(tag, maps, expected):
    """Scores exactly, positions to 1e-3 pixels of the heatmap where a map has a peak."""
    xy, score = udp.decode(golden(tag, maps).float(), sizes(tag)[3])
    peak = with_peak(tag)
    assert torch.equal(score, golden(tag, "clean_score" if maps == "target" else "score"))
    assert close(xy[:, peak], golden(tag, expected)[:, peak], 1e-3)
    if maps == "pred":
        x, y, _ = udp.peaks(golden(tag, "pred"))
        assert close(torch.stack([x, y], dim=-1), golden(tag, "peak"), 0)
        assert (xy[:, peak] - golden(tag, "peak")[:, peak]).abs().max() > 0.1


@pytest.mark.parametrize("tag", TAGS)
def test_decoded_joints_meet_the_golden_image_positions(tag):
    """Back to the image with the person's centre and scale, to 0.005 pixels of the image."""
    xy, _ = udp.decode(golden(tag, "pred").float(), sizes(tag)[3])
    found = udp.to_image(xy, golden(tag, "center"), golden(tag, "scale"), sizes(tag)[1])
    peak = with_peak(tag)
    assert close(found[:, peak], golden(tag, "image_xy")[:, peak], 5e-3)


def test_noise_free_round_trip():
    """Inner joints come back from their own target within 1e-4 pixels of the heatmap."""
    generator = torch.Generator().manual_seed(0)
    for tag in TAGS:
        crop, size, sigma, kernel = sizes(tag)
        span = torch.tensor([size[1] - 1, size[0] - 1])
        inner = 3 * sigma + 1 + torch.rand(3, 17, 2, generator=generator) * (span - 6 * sigma - 2)
        stride = torch.tensor([crop[1] - 1, crop[0] - 1]) / span
        keypoints = torch.cat([inner * stride, torch.ones(3, 17, 1)], dim=-1)
        xy, score = udp.decode(udp.heatmap_targets(keypoints, crop, size, sigma)[0], kernel)
        assert close(xy, inner, 1e-4) and score.min() > 0.9


def test_image_to_heatmap_and_back():
    """`to_image` undoes `udp_matrix` followed by the division by the stride, for each person."""
    points = np.random.default_rng(0).uniform(0, 200, (2, 17, 2))
    people = [(np.array([90.0, 70]), np.array([60.0, 80])), (np.array([30.0, 99]),
                                                             np.array([120.0, 160]))]
    stride = np.array([191 / 47, 255 / 63])
    heatmap = np.stack([udp.transform(xy, udp.udp_matrix(*person, (256, 192))) / stride
                        for xy, person in zip(points, people)])
    center, scale = (torch.from_numpy(np.stack(column)) for column in zip(*people))
    found = udp.to_image(torch.from_numpy(heatmap), center, scale, (64, 48))
    assert close(found, points, 1e-9)


def test_to_crop_is_the_matrix():
    """`to_crop` moves joints as an unrotated `udp_matrix` does, and keeps their scores."""
    joints = np.random.default_rng(0).uniform(0, 200, (17, 3))
    center, scale = np.array([90.0, 70]), np.array([60.0, 80])
    found = udp.to_crop(*map(torch.from_numpy, (joints, center, scale)), (256, 192)).numpy()
    expected = udp.transform(joints[:, :2], udp.udp_matrix(center, scale, (256, 192)))
    assert close(found, np.column_stack([expected, joints[:, 2]]), 1e-9)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_maps_without_a_positive_value_have_no_joint(value):
    """(-1, -1) and the value as score, without NaN, whatever the other maps hold."""
    maps = golden("s", "pred").float().clone()
    maps[0, 3] = value
    xy, score = udp.decode(maps, 11)
    assert xy[0, 3].tolist() == [-1, -1] and score[0, 3] == value
    assert torch.equal(xy[0, :3], udp.decode(golden("s", "pred").float(), 11)[0][0, :3])


def test_flat_maps_stay_where_they_are():
    """Below the logarithm's clip there is no slope: the first of the highest pixels, finite."""
    maps = torch.full((1, 17, 16, 12), 1e-4)
    maps[0, 1, 5, 4] = maps[0, 1, 5, 7] = 2e-4
    xy, _ = udp.decode(maps, 3)
    assert xy[0, 0].tolist() == [0, 0] and xy[0, 1].tolist() == [4, 5]


def test_flip_test_meets_the_golden_values():
    """The mean of a map and the un-mirrored map of the mirrored crop, decoded; no shift."""
    flipped = udp.flip_heatmaps(torch.from_numpy(GOLDEN["flip_pred"])[None].float())
    xy, _ = udp.decode((golden("s", "pred").float() + flipped) / 2, 11)
    peak = with_peak("s")
    assert close(xy[0, peak], GOLDEN["flip_hm_xy"][peak], 1e-3)


def test_flip_is_that_of_the_targets():
    """The target of mirrored joints, un-mirrored, is the target of the joints."""
    crop, size, sigma, _ = sizes("s")
    keypoints = golden_keypoints("s")[:, :12]
    keypoints = torch.cat([keypoints, keypoints[:, :5] + torch.tensor([3.0, 5.0, 0.0])], dim=1)
    mirrored = torch.from_numpy(udp.flip_keypoints(keypoints[0].numpy(), crop[1]))[None]
    target, _ = udp.heatmap_targets(keypoints, crop, size, sigma)
    other, _ = udp.heatmap_targets(mirrored, crop, size, sigma)
    # the window may be a pixel off where a joint lies half-way between two: compare the blobs' core
    core = target > 0.05
    assert core.sum() > 17 * 40 and close(udp.flip_heatmaps(other)[core], target[core], 1e-4)
