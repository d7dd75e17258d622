"""Training augmentation: what happens to image, label and depth before the network.

The rules of mmsegmentation 0.30.0, through which the official model was trained, in numpy; its
pixel work, which cv2 does there, is in pixels.py. In pipeline order:

    random_rescale -> resize_bilinear (image), resize_nearest (label)    `Resize`
    crop_offset -> crop (both)                                           `RandomCrop`
    flip (both, with odds 1/2)                                           `RandomFlip`
    photometric_distortion (image)                                       `PhotoMetricDistortion`
    pad_to (both; the image after normalisation)                         `Pad`

and for depth `depth_augmentation`, the chain of the official depth model.

Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 = ignore. (cv2 loads BGR, but only the
HSV rules can tell the channels apart, and those are written for RGB here.)

Randomness comes only from the `rng` argument. mmseg draws from numpy's global generator; we draw
in the same order from the same distributions, so the statistics agree but the streams do not.
"""
import numpy as np

from ops.pixels import HUE_STEPS, hsv_to_rgb, require, rgb_to_hsv

IGNORE = 255                     # label value that no loss and no statistic counts
CROP_CHECKS = 10                 # draws RandomCrop inspects before it takes what comes
BRIGHTNESS_DELTA = 32.0          # grey levels
FACTOR_RANGE = (0.5, 1.5)        # contrast (all channels) and saturation (S of HSV)
HUE_DELTA = 18                   # hue steps


def rescale_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) of the same aspect within scale = (long side, short side), pixels.

    The bounds may come in either order. Raises ValueError if any side is below 1.
    Source: mmcv 1.7.1 `rescale_size`, as mmseg 0.30.0 `Resize` calls it.
    """
    if min(height, width, *scale) < 1:
        raise ValueError(f"sides must be >= 1, got image {(height, width)} and scale {scale}")
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def random_rescale(height: int, width: int, base_scale: tuple[int, int], rng: np.random.Generator,
                   ratio_range: tuple[float, float] = (0.5, 2.0)) -> tuple[int, int]:
    """`rescale_size` with both bounds times one ratio ~ U[ratio_range); mmseg 0.30.0 `Resize`.

    base_scale is (2048, 512) for ADE20K and (2048, 1024) for Cityscapes.
    """
    ratio = rng.uniform(*ratio_range)
    return rescale_size(height, width, (int(base_scale[0] * ratio), int(base_scale[1] * ratio)))


def crop_offset(label: np.ndarray, size: tuple[int, int], rng: np.random.Generator,
                max_ratio: float = 0.75, ignore: int = IGNORE) -> tuple[int, int]:
    """Top-left (y, x) of a random crop in which no class fills max_ratio of the label.

    A draw passes if its crop holds two classes or more and the largest covers less than max_ratio
    of the pixels that count. Ten draws are checked, the eleventh is taken as it comes; max_ratio
    >= 1 takes the first. Raises ValueError unless label is (H, W) uint8. mmseg 0.30.0 `RandomCrop`.
    """
    require(label.dtype == np.uint8 and label.ndim == 2, "(H, W) uint8", label)
    checks = CROP_CHECKS if max_ratio < 1 else 0
    for draw in range(checks + 1):
        # y before x, both ends included; 0 along a side that the crop covers
        y, x = (int(rng.integers(max(have - want, 0) + 1)) for have, want in zip(label.shape, size))
        if draw == checks:
            break
        counts = np.bincount(crop(label, y, x, size).ravel(), minlength=256)
        counts[ignore] = 0
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_ratio:
            break
    return y, x


def crop(array: np.ndarray, y: int, x: int, size: tuple[int, int]) -> np.ndarray:
    """View of the (h, w) window at (y, x), cut short at the array's end; ValueError if y, x < 0."""
    require(min(y, x) >= 0, f"an offset >= 0 for a crop, not {(y, x)}", array)
    return array[y:y + size[0], x:x + size[1]]


def flip(array: np.ndarray) -> np.ndarray:
    """Mirror (H, W, ...) left to right; a copy, as torch.from_numpy refuses negative strides."""
    return np.ascontiguousarray(array[:, ::-1])


def pad_to(array: np.ndarray, size: tuple[int, int], value: float) -> np.ndarray:
    """Extend (H, W, ...) right and down to size = (h, w) with value; mmseg 0.30.0 `Pad`.

    After normalisation the image gets mid-grey, the label 255. ValueError if array exceeds size.
    """
    height, width = array.shape[:2]
    require(height <= size[0] and width <= size[1], f"no more than {size} to pad", array)
    out = np.full((*size, *array.shape[2:]), value, array.dtype)
    out[:height, :width] = array
    return out


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation, hue of an (H, W, 3) uint8 RGB image, each with odds 1/2.

    A fifth coin puts contrast before or after the two HSV steps. Every step ends in uint8, and each
    HSV step makes its own round trip, so that no rounding is lost. Raises ValueError for another
    dtype or shape. Source: mmseg 0.30.0 `PhotoMetricDistortion`.
    """
    require(image.dtype == np.uint8 and image.shape[2:] == (3,), "(H, W, 3) uint8", image)
    if rng.integers(2):
        image = linear_levels(image, beta=rng.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA))
    contrast_first = rng.integers(2)
    if contrast_first and rng.integers(2):
        image = linear_levels(image, alpha=rng.uniform(*FACTOR_RANGE))
    if rng.integers(2):
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = linear_levels(hsv[..., 1], alpha=rng.uniform(*FACTOR_RANGE))
        image = hsv_to_rgb(hsv)
    if rng.integers(2):
        hsv = rgb_to_hsv(image)
        shift = rng.integers(-HUE_DELTA, HUE_DELTA)              # -18..17: upper end left out
        hsv[..., 0] = (hsv[..., 0] + np.int32(shift)) % HUE_STEPS
        image = hsv_to_rgb(hsv)
    if not contrast_first and rng.integers(2):
        image = linear_levels(image, alpha=rng.uniform(*FACTOR_RANGE))
    return image


# ----------------------------------------------------------------------------------------- depth
# The chain of the official depth model: VPD's CutDepth, then albumentations 1.3 on uint8.

def cut_depth(image: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """"Vertical CutDepth": a random range of columns shows the raw depth instead of the image.

    image (H, W, 3) uint8, depth (H, W) float32 in the file's units.  The official code casts the
    raw values to uint8, which keeps their low byte: 2713 mm become grey level 153.  Kept as it is.
    """
    width = image.shape[1]
    alpha, beta = rng.random(), rng.random()
    left, columns = int(alpha * width), int(max((width - alpha * width) * beta * 0.75, 1))
    image = image.copy()
    low_byte = (depth[:, left:left + columns].astype(np.int64) & 255).astype(np.uint8)
    image[:, left:left + columns] = low_byte[:, :, None]
    return image


def brightness_contrast(image: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Grey levels i -> i * alpha + 255 * beta, clipped and truncated, by a look-up table."""
    levels = np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta * 255)
    return np.clip(levels, 0, 255).astype(np.uint8)[image]


def gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    """Grey levels i -> 255 * (i / 255) ** exponent, truncated, by a look-up table."""
    levels = np.power(np.arange(256) * (1.0 / 255), exponent) * 255
    return levels.astype(np.uint8)[image]


def shift_hsv(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Shift H (in steps of 2 degrees, cyclic), S and V (grey levels, clipped), each truncated."""
    levels = np.arange(256, dtype=np.float64)
    tables = (np.mod(levels + hue, HUE_STEPS), np.clip(levels + saturation, 0, 255),
              np.clip(levels + value, 0, 255))
    hsv = rgb_to_hsv(image)
    shifted = [table.astype(np.uint8)[hsv[..., i]] for i, table in enumerate(tables)]
    return hsv_to_rgb(np.stack(shifted, axis=-1))


def depth_augmentation(image: np.ndarray, depth: np.ndarray, size: tuple[int, int],
                       rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The training chain of the official depth model, depth/dataset/base_dataset.py, in its order.

    image (H, W, 3) uint8, depth (H, W) float32 in the file's units; both come back at `size`.
    DEVIATION: CutDepth hits a quarter of the samples by chance; the official code counts samples
    per worker and takes every fourth.
    """
    if rng.random() < 0.25:
        image = cut_depth(image, depth, rng)
    if rng.random() < 0.5:
        image, depth = flip(image), flip(depth)
    y = int((image.shape[0] - size[0] + 1) * rng.random())
    x = int((image.shape[1] - size[1] + 1) * rng.random())
    image, depth = crop(image, y, x, size), crop(depth, y, x, size)
    if rng.random() < 0.5:
        image = brightness_contrast(image, 1 + rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2))
    if rng.random() < 0.5:
        image = gamma(image, rng.uniform(80, 120) / 100)
    if rng.random() < 0.5:
        image = shift_hsv(image, rng.uniform(-20, 20), rng.uniform(-30, 30), rng.uniform(-20, 20))
    return image, depth


def linear_levels(pixels: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """uint8 alpha * x + beta in float32, clipped to 0..255 and truncated, not rounded, as mmseg."""
    scaled = pixels.astype(np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)
