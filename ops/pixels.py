"""Pixel rules of cv2 4.8 in plain numpy, to the bit: resizing and colour spaces.

The official models were trained through mmsegmentation 0.30.0, which does its pixel work in cv2.
On uint8 `resize_bilinear`, `resize_nearest` and `rgb_to_hsv` agree with cv2 4.8 bit for bit.
`hsv_to_rgb` reproduces cv2's vector path (x86 with AVX2 and fused multiply-add). cv2 finishes each
row, the last W mod 32 pixels, in a scalar loop that rounds where the vector path truncates; there,
and on machines without fused multiply-add, the two may differ by 1 grey level.
"""
import functools

import numpy as np

HUE_STEPS = 180                  # cv2 stores hue in steps of 2 degrees, to fit a byte
WEIGHT_ONE = 2048                # bilinear weights are integers; 2048 stands for 1.0
HSV_SHIFT, HSV_HALF = 12, 2048   # RGB -> HSV multiplies with reciprocals in 12-bit fixed point
ROW_BLOCK = 32                   # rows worked on at a time: temporaries stay in the L2 cache


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) or (H, W) uint8 to size = (h, w), bilinear, without antialiasing.

    Integers throughout: columns are blended first, then rows, with weights out of 2048. Raises
    ValueError for another dtype or rank, or if empty. Source: cv2 4.8 `resize`, INTER_LINEAR.
    """
    is_image = image.dtype == np.uint8 and image.ndim in (2, 3) and min(*image.shape, *size) > 0
    require(is_image, f"a uint8 image to resize to {size}, neither empty", image)
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
    require(min(*array.shape, *size) > 0, f"an array to resize to {size}, neither empty", array)
    # 1 / (target / source) is not always source / target in float64, and floor sees the last bit.
    rows, columns = (np.minimum(np.floor(np.arange(target) * (1 / (target / source))), source - 1)
                     for source, target in zip(array.shape, size))
    return array[rows.astype(np.int64)[:, None], columns.astype(np.int64)]


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> uint8 HSV: hue in 0..179 (steps of 2 degrees), S and V in 0..255.

    Raises ValueError for another dtype or shape. Source: cv2 4.8 `cvtColor`, COLOR_RGB2HSV.
    """
    require(image.dtype == np.uint8 and image.shape[2:] == (3,), "(H, W, 3) uint8", image)
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
    require(hsv.dtype == np.uint8 and hsv.shape[2:] == (3,), "(H, W, 3) uint8", hsv)
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


def require(met: bool, need: str, array: np.ndarray) -> None:
    """Refuse wrong input by name: a float image in 0..1, say, would turn black without a word."""
    if not met:
        raise ValueError(f"need {need}, got {array.shape} {array.dtype}")
