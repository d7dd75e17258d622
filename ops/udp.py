"""Top-down pose without files: boxes, the crop of one person, target heatmaps and their decoding.

    clip_box -> center_scale -> [flip_keypoints, half_body, random_box] -> fix_aspect     a person
    udp_matrix -> warp (image), transform (keypoints)                                     its crop
    heatmap_targets -> keypoint_mse, pck                                                  training
    flip_heatmaps -> decode -> to_image                                                   testing

Sizes are (height, width), points and scales (x, y). An integer coordinate is the centre of a pixel.
A person's `center` and `scale` (width, height of the padded box) are in pixels of the image.

The rules are those of mmpose 1.x: UDP ("The Devil is in the Details", Huang et al. 2020) for the
transform and the targets, DARK ("Distribution-Aware Coordinate Representation", Zhang et al. 2020)
as UDP words it for the decoding.
"""
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KEYPOINTS = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
             "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip",
             "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle")   # COCO's order
FLIP = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)  # left <-> right
UPPER, LOWER = tuple(range(11)), tuple(range(11, 17))
SKELETON = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7),
            (6, 8), (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))

PADDING = 1.25                   # of the box, per axis
HALF_BODY_PADDING = 1.5          # of the rectangle around half the joints
HALF_BODY_JOINTS = 9             # labelled joints below which a person is never cut in half
HALF_BODY_ODDS, UPPER_ODDS = 0.3, 0.7
SHIFT, SHIFT_ODDS = 0.16, 0.3    # of the padded box
ZOOM = 0.5                       # a box grows or shrinks by up to half
ROTATION, ROTATION_ODDS = 80.0, 0.6  # degrees
EPSILON = 1.1920929e-7           # of float32; keeps a flat peak's Hessian invertible


# ------------------------------------------------------------------------------------------------
# A person: box, centre, scale

def clip_box(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """COCO's (left, top, width, height) -> (x1, y1, x2, y2) float64 inside an image of `size`.

    Source: mmpose 1.x, `CocoDataset`: the last column is width - 1.
    """
    box = np.asarray(box, np.float64)
    last = np.array([size[1] - 1, size[0] - 1])
    return np.concatenate([np.clip(box[:2], 0, last), np.clip(box[:2] + box[2:], 0, last)])


def center_scale(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and padded scale, each (2,) float64 pixels, of a box (x1, y1, x2, y2)."""
    low, high = np.asarray(box, np.float64).reshape(2, 2)
    return (low + high) / 2, (high - low) * PADDING


def fix_aspect(scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`scale` with its shorter axis enlarged to the aspect of a crop of `size`."""
    width, height = scale
    aspect = size[1] / size[0]
    return np.array([max(width, height * aspect), max(height, width / aspect)])


# ------------------------------------------------------------------------------------------------
# Training augmentation: every draw comes from `rng`, in the order written here

def flip_keypoints(keypoints: np.ndarray, width: int) -> np.ndarray:
    """(17, 3) keypoints x, y, v of the mirror image, `width` pixels wide; left joints turn right.
    """
    flipped = keypoints[list(FLIP)]
    flipped[:, 0] = width - 1 - flipped[:, 0]
    return flipped


def half_body(keypoints: np.ndarray, center: np.ndarray, scale: np.ndarray,
              rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sometimes the centre and scale of the upper or the lower body's joints, else those given.

    keypoints (17, 3): x, y in pixels of the image, v > 0 if labelled. With 17 labelled joints 70 %
    are left alone, 21 % upper, 9 % lower. Source: mmpose 1.x `RandomHalfBody`.
    """
    labelled = keypoints[:, 2] > 0
    if labelled.sum() < HALF_BODY_JOINTS or rng.random() > HALF_BODY_ODDS:
        return center, scale
    prefer_upper = rng.random() < UPPER_ODDS
    lower = [i for i in LOWER if labelled[i]]
    # mmpose also asks for two upper joints: with nine labelled, at most six of them lower, there
    # are three.
    use_upper = prefer_upper or len(lower) < 3
    chosen = [i for i in UPPER if labelled[i]] if use_upper else lower
    points = keypoints[chosen, :2].astype(np.float64)
    extent = points.max(axis=0) - points.min(axis=0)
    if not extent.any():                             # DEVIATION: mmpose would warp to a scale of 0
        return center, scale
    return points.mean(axis=0), extent * HALF_BODY_PADDING


def truncated_normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) float64 draws of a standard normal cut to [-1, 1]; their deviation is 0.5396."""
    normal = NormalDist()
    low, high = normal.cdf(-1), normal.cdf(1)
    return np.array([normal.inv_cdf(low + u * (high - low)) for u in rng.random(count)])


def random_box(center: np.ndarray, scale: np.ndarray, rng: np.random.Generator
               ) -> tuple[np.ndarray, np.ndarray, float]:
    """Shifted centre, zoomed scale, and a rotation in degrees that is often 0.

    `scale` is padded, its aspect not yet fixed. Source: mmpose 1.x `RandomBBoxTransform`.
    """
    z = truncated_normal(rng, 4)
    if rng.random() < SHIFT_ODDS:
        center = center + SHIFT * z[:2] * scale
    rotation = ROTATION * z[3] if rng.random() < ROTATION_ODDS else 0.0
    return center, scale * (1 + ZOOM * z[2]), float(rotation)


# ------------------------------------------------------------------------------------------------
# The crop

def udp_matrix(center: np.ndarray, scale: np.ndarray, size: tuple[int, int],
               rotation: float = 0.0) -> np.ndarray:
    """(2, 3) float64 matrix from points of the image to points of a crop of `size`.

    center - scale / 2 lands on (0, 0), center + scale / 2 on the centre of the crop's last pixel:
    n pixels span n - 1 steps. rotation: degrees, clockwise on screen; `scale` has its aspect fixed.
    Source: UDP; mmpose 1.x `get_udp_warp_matrix`.
    """
    cos, sin = np.cos(np.deg2rad(rotation)), np.sin(np.deg2rad(rotation))
    steps = np.array([size[1] - 1, size[0] - 1]) / scale             # crop pixels per image pixel
    turn = steps[:, None] * np.array([[cos, -sin], [sin, cos]])
    shift = steps * scale / 2 - turn @ center
    return np.column_stack([turn, shift])


def transform(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (..., 2) under a (2, 3) matrix, float64."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The crop (h, w, C) uint8 of `size` that `matrix` (2, 3) cuts from an image (H, W, C) uint8.

    Bilinear without antialiasing, black outside the image, rounded to nearest: cv2's `warpAffine`,
    whose positions are coarser before cv2 5. Raises ValueError for another dtype or rank, or for an
    image with a side of 1 pixel.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"need a (H, W, C) uint8 image, got {image.shape} {image.dtype}")
    if min(image.shape[:2]) < 2:
        raise ValueError(f"need an image of 2 x 2 pixels or more, got {image.shape[:2]}")
    inverse = np.linalg.inv(matrix[:, :2])
    rows = np.arange(size[0])[:, None, None] * inverse[:, 1]         # (h, 1, 2)
    columns = np.arange(size[1])[:, None] * inverse[:, 0]            # (w, 2)
    source = rows + columns - inverse @ matrix[:, 2]                 # (h, w, 2) image pixels
    last = np.array([image.shape[1] - 1, image.shape[0] - 1])
    grid = torch.from_numpy((2 * source / last - 1).astype(np.float32))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    crop = F.grid_sample(pixels[None], grid[None], mode="bilinear", padding_mode="zeros",
                         align_corners=True)[0]
    return crop.round().to(torch.uint8).permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------
# Targets and loss

def heatmap_targets(keypoints: Tensor, crop: tuple[int, int], size: tuple[int, int],
                    sigma: float) -> tuple[Tensor, Tensor]:
    """A Gaussian per joint: target (B, 17, h, w) and weight (B, 17), float32, 0 or 1.

    keypoints (B, 17, 3) float32, x, y in pixels of the crop, last column 1 if labelled else 0, on
    any device; sigma in pixels of the heatmap. A blob is cut to 3 sigma around its centre's nearest
    pixel; a joint whose blob misses the map has weight 0 and an empty map. Raises ValueError if
    3 sigma is no integer. Source: UDP; mmpose 1.x `UDPHeatmap`.
    """
    if 3 * sigma != int(3 * sigma):                  # the window would be cut off centre
        raise ValueError(f"3 * sigma must be an integer, got sigma {sigma}")
    h, w = size
    stride = keypoints.new_tensor([(crop[1] - 1) / (w - 1), (crop[0] - 1) / (h - 1)])
    center = keypoints[..., :2] / stride             # (B, 17, 2), float32 as in the reference
    first = torch.trunc(center + 0.5) - 3 * sigma    # of the window; toward zero, not floor
    last = first + 6 * sigma
    outside = (first[..., 0] >= w) | (first[..., 1] >= h) | (last + 1 < 0).any(-1)
    weight = ((keypoints[..., 2] >= 0.5) & ~outside).float()

    def profile(axis: int, length: int) -> Tensor:
        """(B, 17, length): the blob along one axis."""
        at = torch.arange(length, device=keypoints.device, dtype=torch.float64)
        inside = (at >= first[..., axis, None]) & (at <= last[..., axis, None])
        distance = at - center[..., axis, None].double()
        return torch.exp(-distance ** 2 / (2 * sigma ** 2)) * inside

    blob = profile(1, h)[..., :, None] * profile(0, w)[..., None, :]  # e^-(x+y) = e^-x e^-y
    return (blob * weight[..., None, None]).float(), weight


def keypoint_mse(out: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean of weight * (out - target)^2; maps (B, 17, h, w), weight (B, 17).

    The divisor counts every pixel, those of joints with weight 0, too. Source: mmpose 1.x
    `KeypointMSELoss` with target weights.
    """
    return ((out - target) ** 2 * weight[..., None, None]).mean()


def pck(out: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, count) of joints with weight: hit if the two maps' peaks are within 5 % of their size.

    x is divided by the height and y by the width, as in mmpose's `pose_pck_accuracy`.
    """
    h, w = out.shape[-2:]
    (x1, y1, _), (x2, y2, _) = peaks(out), peaks(target)
    distance = torch.hypot((x1 - x2) / h, (y1 - y2) / w)
    counted = weight > 0
    return ((distance < 0.05) & counted).sum(), counted.sum()


# ------------------------------------------------------------------------------------------------
# Decoding

def flip_heatmaps(heatmaps: Tensor) -> Tensor:
    """Heatmaps (B, 17, h, w) of a mirrored crop as those of the crop itself; no shift under UDP."""
    return heatmaps.flip(-1)[:, list(FLIP)]


def peaks(heatmaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y (int64 columns, rows) and value of each map's first maximum; all (B, 17)."""
    value, at = heatmaps.flatten(2).max(dim=2)
    return at % heatmaps.shape[-1], at // heatmaps.shape[-1], value


def blur_matrix(length: int, kernel: int, device=None) -> Tensor:
    """(length, length) float64: the Gaussian blur of a line, zeros beyond its ends, as a matrix.

    kernel: taps, odd; its deviation is cv2's choice for that size. Raises ValueError if it is even.
    """
    if kernel % 2 == 0:
        raise ValueError(f"a blur kernel has an odd number of taps, got {kernel}")
    reach = kernel // 2
    deviation = 0.3 * (reach - 1) + 0.8
    at = torch.arange(length, device=device, dtype=torch.float64)
    taps = torch.arange(-reach, reach + 1, device=device, dtype=torch.float64)
    distance = at[:, None] - at
    total = torch.exp(-taps ** 2 / (2 * deviation ** 2)).sum()
    return torch.exp(-distance ** 2 / (2 * deviation ** 2)) * (distance.abs() <= reach) / total


def decode(heatmaps: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Joints from heatmaps (B, 17, h, w): xy (B, 17, 2) float64 heatmap pixels, score (B, 17).

    The highest pixel of each map, whose value is the score, moved by one Newton step on the
    logarithm of the blurred map. A map without a positive value gives (-1, -1). Source: DARK as in
    UDP; mmpose 1.x `refine_keypoints_dark_udp`.
    """
    h, w = heatmaps.shape[-2:]
    x, y, score = peaks(heatmaps)
    # float64, on any device: a GPU would take these products in TF32, the logarithm magnifies that
    maps = heatmaps.double()
    blurred = blur_matrix(h, kernel, maps.device) @ maps @ blur_matrix(w, kernel, maps.device)
    gain = score.double() / blurred.amax(dim=(-2, -1))               # the blur lowers the peak

    def near(dx: int, dy: int) -> Tensor:
        """(B, 17) logarithm at an offset from the peak; edges replicated."""
        at = (y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1)
        value = blurred.flatten(2).gather(2, at[..., None])[..., 0] * gain
        return value.clamp(0.001, 50).log()

    here, left, right, above, below = near(0, 0), near(-1, 0), near(1, 0), near(0, -1), near(0, 1)
    gx, gy = (right - left) / 2, (below - above) / 2
    hxx, hyy = right - 2 * here + left + EPSILON, below - 2 * here + above + EPSILON
    hxy = (near(1, 1) - right - below + 2 * here - left - above + near(-1, -1)) / 2
    determinant = hxx * hyy - hxy ** 2
    step = torch.stack([hyy * gx - hxy * gy, hxx * gy - hxy * gx], dim=-1) / determinant[..., None]
    xy = torch.stack([x, y], dim=-1) - step.nan_to_num(0, 0, 0)      # a determinant of exactly 0
    # DEVIATION: without a peak mmpose goes on from (-1, -1) and indexes out of the map
    return torch.where(score[..., None] > 0, xy, -1.0), score


def to_image(xy: Tensor, center: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Heatmap pixels (B, 17, 2) -> pixels of the image; center, scale (B, 2), `size` of the maps.

    `scale` has its aspect fixed, as `udp_matrix` had it.
    """
    last = xy.new_tensor([size[1] - 1, size[0] - 1])
    return xy / last * scale[:, None] + (center - scale / 2)[:, None]


def to_crop(xy: Tensor, center: Tensor, scale: Tensor, crop: tuple[int, int]) -> Tensor:
    """Pixels of the image (17, 2 or 3) -> pixels of a crop of that size that was not rotated."""
    last = xy.new_tensor([crop[1] - 1, crop[0] - 1])
    return torch.cat([(xy[:, :2] - center + scale / 2) / scale * last, xy[:, 2:]], dim=1)
