"""Training augmentation: what happens to image, label and depth before the network.

The official model was trained through mmsegmentation 0.30.0, which does its pixel work in cv2 4.8.
Here are the same geometry and colour rules in plain numpy, without cv2. In pipeline order:

    random_rescale -> resize_bilinear (image), resize_nearest (label)    `Resize`
    crop_offset -> crop (both)                                           `RandomCrop`
    flip (both, with odds 1/2)                                           `RandomFlip`
    photometric_distortion (image)                                       `PhotoMetricDistortion`
    pad_to (both; the image after normalisation)                         `Pad`

and for depth `depth_augmentation`, the chain of the official depth model.

Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 = ignore. (cv2 loads BGR, but only the
HSV rules can tell the channels apart, and those are written for RGB here.)

What must agree, bit for bit, with cv2 4.8 on uint8: `resize_bilinear`, `resize_nearest`,
`rgb_to_hsv`. `hsv_to_rgb` reproduces cv2's vector path (x86 with AVX2 and fused multiply-add). cv2
finishes each row, the last W mod 32 pixels, in a scalar loop that rounds where the vector path
truncates; there, and on machines without fused multiply-add, the two may differ by 1 grey level.

Randomness comes only from the `rng` argument. mmseg draws from numpy's global generator; we draw
in the same order from the same distributions, so the statistics agree but the streams do not.
"""
import functools

import numpy as np

IGNORE = 255                     # label value that no loss and no statistic counts
CROP_CHECKS = 10                 # draws RandomCrop inspects before it takes what comes
BRIGHTNESS_DELTA = 32.0          # grey levels
FACTOR_RANGE = (0.5, 1.5)        # contrast (all channels) and saturation (S of HSV)
HUE_DELTA = 18                   # hue steps
HUE_STEPS = 180                  # cv2 stores hue in steps of 2 degrees, to fit a byte
WEIGHT_ONE = 2048                # bilinear weights are integers; 2048 stands for 1.0
HSV_SHIFT, HSV_HALF = 12, 2048   # RGB -> HSV multiplies with reciprocals in 12-bit fixed point
ROW_BLOCK = 32                   # rows worked on at a time: temporaries stay in the L2 cache


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


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) or (H, W) uint8 to size = (h, w), bilinear, without antialiasing.

    Integers throughout: columns are blended first, then rows, with weights out of 2048. Raises
    ValueError for another dtype or rank, or if empty. Source: cv2 4.8 `resize`, INTER_LINEAR.
    """
    is_image = image.dtype == np.uint8 and image.ndim in (2, 3) and min(*image.shape, *size) > 0
    _require(is_image, f"a uint8 image to resize to {size}, neither empty", image)
    height, width, channels = (*image.shape, 1)[:3]
    left, right, left_weight, right_weight = _column_taps(width, size[1], channels)
    upper, lower, upper_weight, lower_weight = _taps(height, size[0])
    rows = np.ascontiguousarray(image).reshape(height, width * channels)
    out = np.empty((size[0], size[1] * channels), np.uint8)
    for start in range(0, size[0], ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        first, source = upper[start], rows[upper[start]:lower[block][-1] + 1]
        blended = np.take(source, left, axis=1) * left_weight      # (rows, w*C) int32, 2048 = 1.0
        blended += np.take(source, right, axis=1) * right_weight
        blended >>= 4                            # these shifts drop bits: they are part of the rule
        top = blended[upper[block] - first] * upper_weight[block, None] >> 16
        top += blended[lower[block] - first] * lower_weight[block, None] >> 16
        out[block] = (top + 2) >> 2
    return out.reshape(*size, *image.shape[2:])


def _taps(source: int, target: int) -> tuple[np.ndarray, ...]:
    """For each of `target` samples: its two source indices and their int32 weights out of 2048."""
    # Pixel centres sit at +0.5. cv2 computes in float64, then keeps a float32: both steps matter.
    position = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
    index = np.floor(position).astype(np.int64)
    fraction = position - index.astype(np.float32)
    weights = (np.rint(f * np.float32(WEIGHT_ONE)) for f in (1 - fraction, fraction))
    # Past the outermost centres both taps are the edge pixel, weights as they are: cv2 truncates
    # the two shares of an edge row separately, so a weight of (1, 0) would be off by 1 at times.
    return (*(np.clip(i, 0, source - 1) for i in (index, index + 1)),
            *(w.astype(np.int32) for w in weights))


def _column_taps(source: int, target: int, channels: int) -> tuple[np.ndarray, ...]:
    """`_taps` along a row of interleaved channels: every array has target * channels entries."""
    left, right, *weights = _taps(source, target)
    left, right = (index[:, None] * channels + np.arange(channels) for index in (left, right))
    return left.ravel(), right.ravel(), *(weight.repeat(channels) for weight in weights)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, ...) of any dtype to size = (h, w) by picking pixels; labels never blend.

    Sample i reads floor(i * source / target): a pixel's corner, not its centre as in Pillow.
    Raises ValueError if empty. Source: cv2 4.8 `resize`, INTER_NEAREST.
    """
    _require(min(*array.shape, *size) > 0, f"an array to resize to {size}, neither empty", array)
    # 1 / (target / source) is not always source / target in float64, and floor sees the last bit.
    rows, columns = (np.minimum(np.floor(np.arange(target) * (1 / (target / source))), source - 1)
                     for source, target in zip(array.shape, size))
    return array[rows.astype(np.int64)[:, None], columns.astype(np.int64)]


def crop_offset(label: np.ndarray, size: tuple[int, int], rng: np.random.Generator,
                max_ratio: float = 0.75, ignore: int = IGNORE) -> tuple[int, int]:
    """Top-left (y, x) of a random crop in which no class fills max_ratio of the label.

    A draw passes if its crop holds two classes or more and the largest covers less than max_ratio
    of the pixels that count. Ten draws are checked, the eleventh is taken as it comes; max_ratio
    >= 1 takes the first. Raises ValueError unless label is (H, W) uint8. mmseg 0.30.0 `RandomCrop`.
    """
    _require(label.dtype == np.uint8 and label.ndim == 2, "(H, W) uint8", label)
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
    _require(min(y, x) >= 0, f"an offset >= 0 for a crop, not {(y, x)}", array)
    return array[y:y + size[0], x:x + size[1]]


def flip(array: np.ndarray) -> np.ndarray:
    """Mirror (H, W, ...) left to right; a copy, as torch.from_numpy refuses negative strides."""
    return np.ascontiguousarray(array[:, ::-1])


def pad_to(array: np.ndarray, size: tuple[int, int], value: float) -> np.ndarray:
    """Extend (H, W, ...) right and down to size = (h, w) with value; mmseg 0.30.0 `Pad`.

    After normalisation the image gets mid-grey, the label 255. ValueError if array exceeds size.
    """
    height, width = array.shape[:2]
    _require(height <= size[0] and width <= size[1], f"no more than {size} to pad", array)
    out = np.full((*size, *array.shape[2:]), value, array.dtype)
    out[:height, :width] = array
    return out


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> uint8 HSV: hue in 0..179 (steps of 2 degrees), S and V in 0..255.

    Raises ValueError for another dtype or shape. Source: cv2 4.8 `cvtColor`, COLOR_RGB2HSV.
    """
    _require(image.dtype == np.uint8 and image.shape[2:] == (3,), "(H, W, 3) uint8", image)
    out = np.empty(image.shape, np.uint8)
    per_value, per_chroma = _reciprocals(255), _reciprocals(HUE_STEPS // 6)
    for start in range(0, len(image), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        red, green, blue = (image[block, :, k].astype(np.int32) for k in range(3))
        value = np.maximum(np.maximum(red, green), blue)
        chroma = value - np.minimum(np.minimum(red, green), blue)
        hue = np.where(value == red, green - blue,               # a tie goes to red, then to green
                       np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma))
        hue = (hue * per_chroma[chroma] + HSV_HALF) >> HSV_SHIFT
        out[block, :, 0] = hue + HUE_STEPS * (hue < 0)
        out[block, :, 1] = (chroma * per_value[value] + HSV_HALF) >> HSV_SHIFT
        out[block, :, 2] = value
    return out


def _reciprocals(numerator: int) -> np.ndarray:
    """(256,) int32: numerator / n in 12-bit fixed point; 0 at n = 0, so grey gets H = S = 0."""
    return np.array([0, *np.rint((numerator << HSV_SHIFT) / np.arange(1, 256))], np.int32)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 HSV -> uint8 RGB. A hue of 180 or more wraps round the colour circle.

    Raises ValueError for another dtype or shape. Source: cv2 4.8 `cvtColor`, COLOR_HSV2RGB.
    """
    _require(hsv.dtype == np.uint8 and hsv.shape[2:] == (3,), "(H, W, 3) uint8", hsv)
    out = np.empty(hsv.shape, np.uint8)
    for start in range(0, len(hsv), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        hue, saturation, value = np.moveaxis(hsv[block], -1, 0)
        rgb = np.take(_shades(), saturation * np.int32(256) + hue, axis=0)
        rgb *= (value * np.float32(1 / 255))[..., None]
        rgb *= np.float32(255)     # does not cancel the line above: cv2 rounds, then truncates
        out[block] = rgb           # float to uint8 truncates
    return out


@functools.cache
def _shades() -> np.ndarray:
    """(256 * 256, 3) float32, row S * 256 + H: the R, G, B at that saturation and hue for V = 1.

    A channel is V * (1 - S * fade). Once round the circle of six sectors its fade is 0 for two, up
    to 1 in one, 1 for two, and back in one. No fade depends on V: one table holds all H and S.
    """
    position = (np.arange(256, dtype=np.float32) * np.float32(6 / HUE_STEPS)).astype(np.float64)
    since_full = (position[:, None] + [5, 3, 1]) % 6             # R, G, B start to fade at 1, 3, 5
    fade = np.clip(np.minimum(since_full, 4 - since_full), 0, 1).astype(np.float32)[None]
    saturation = (np.arange(256, dtype=np.float32) * np.float32(1 / 255))[:, None, None]
    # cv2 fuses this multiply-subtract, rounding once; float64 holds a product of float32 exactly.
    shade = 1 - saturation.astype(np.float64) * fade.astype(np.float64)
    return shade.astype(np.float32).reshape(-1, 3)


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation, hue of an (H, W, 3) uint8 RGB image, each with odds 1/2.

    A fifth coin puts contrast before or after the two HSV steps. Every step ends in uint8, and each
    HSV step makes its own round trip, so that no rounding is lost. Raises ValueError for another
    dtype or shape. Source: mmseg 0.30.0 `PhotoMetricDistortion`.
    """
    _require(image.dtype == np.uint8 and image.shape[2:] == (3,), "(H, W, 3) uint8", image)
    if rng.integers(2):
        image = _convert(image, beta=rng.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA))
    contrast_first = rng.integers(2)
    if contrast_first and rng.integers(2):
        image = _convert(image, alpha=rng.uniform(*FACTOR_RANGE))
    if rng.integers(2):
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = _convert(hsv[..., 1], alpha=rng.uniform(*FACTOR_RANGE))
        image = hsv_to_rgb(hsv)
    if rng.integers(2):
        hsv = rgb_to_hsv(image)
        shift = rng.integers(-HUE_DELTA, HUE_DELTA)              # -18..17: upper end left out
        hsv[..., 0] = (hsv[..., 0] + np.int32(shift)) % HUE_STEPS
        image = hsv_to_rgb(hsv)
    if not contrast_first and rng.integers(2):
        image = _convert(image, alpha=rng.uniform(*FACTOR_RANGE))
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
    """The whole training chain of the official depth model (spec B.3), in its order.

    image (H, W, 3) uint8, depth (H, W) float32 in the file's units; both come back at `size`.
    DEVIATION: CutDepth hits a quarter of the samples by chance; the official code counts samples
    per worker and takes every fourth (decisions 17).
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


def _convert(pixels: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """uint8 alpha * x + beta in float32, clipped to 0..255 and truncated, not rounded, as mmseg."""
    scaled = pixels.astype(np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def _require(met: bool, need: str, array: np.ndarray) -> None:
    """Refuse wrong input by name: a float image in 0..1, say, would turn black without a word."""
    if not met:
        raise ValueError(f"need {need}, got {array.shape} {array.dtype}")
