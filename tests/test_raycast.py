"""Proves the ray-caster by closed forms that share no code with it.

Run from the project folder: ``python -m pytest tests/test_raycast.py``
"""

import numpy as np
import pytest

from sets import raycast

CAM = raycast.Camera((0.0, 2.0, 0.0), ((1, 0, 0), (0, -0.96, -0.28), (0, -0.28, 0.96)), 128, 128,
                     128)


def test_ground_depth_is_a_plane():
    """1 / depth of ground is an affine function of the pixel, as for any plane in perspective."""
    far_away = raycast.Part("ball", (0, 0.1, 70), (0, 0.1, 70), 0.1, 2, 0, 0)
    with np.errstate(all="ignore"):
        _, depth, surface = raycast.cast(CAM, [far_away])
    rows, cols = np.nonzero((surface == raycast.GROUND) & (depth < 40))
    pixel = np.stack([rows, cols, np.ones_like(rows)], 1) / 128
    inverse = 1 / depth[rows, cols].astype(np.float64)
    fit = pixel @ np.linalg.lstsq(pixel, inverse, rcond=None)[0]
    assert len(rows) > 5000 and np.abs(fit - inverse).max() < 1e-5


@pytest.mark.parametrize("shape", ["ball", "capsule", "cylinder", "cone", "box"])
def test_hits_lie_on_the_surface(shape):
    """Every hit lies on the part's surface, by the distance to its axis or its faces."""
    end = {"ball": (0.3, 0.5, 4.0), "capsule": (-0.5, 1.5, 5.0)}.get(shape, (0.3, 1.4, 4.0))
    start = (0.3, 0.5 if shape in ("ball", "capsule") else 0.0, 4.0)
    part = raycast.Part(shape, start, end, 0.5, 2, 0, 0, (0.4, 0.3), (0.8, 0.6))
    with np.errstate(all="ignore"):
        rays, depth, surface = raycast.cast(CAM, [part])
    on = surface == raycast.FIRST_PART
    assert on.sum() > 200
    p = np.stack([axis[on] * depth[on] for axis in rays]) + np.array(CAM.eye)[:, None]
    v, axis = p - np.array(start)[:, None], np.subtract(end, start)
    if shape == "box":
        x, z = 0.8 * v[0] + 0.6 * v[2], 0.8 * v[2] - 0.6 * v[0]
        gap = np.max([np.abs(x) - 0.4, np.abs(z) - 0.3, v[1] - 1.4], 0)
    elif shape in ("cylinder", "cone"):
        radius = 0.5 * (1 - v[1] / 1.4) if shape == "cone" else 0.5
        gap = np.maximum(np.hypot(v[0], v[2]) - radius, v[1] - 1.4)
    else:
        place = np.clip(axis @ v / max(axis @ axis, 1e-9), 0, 1)
        gap = np.linalg.norm(v - place * axis[:, None], axis=0) - 0.5
    assert np.abs(gap).max() < 2e-4


@pytest.mark.parametrize("shape", ["ball", "capsule"])
def test_shadow_is_where_the_ray_to_the_sun_hits(shape):
    """The stadium in the plane across the sunlight decides as the ray in space does."""
    start = (0.3, 0.5, 4.0)
    end = start if shape == "ball" else (-0.5, 1.5, 5.0)
    part, sun = raycast.Part(shape, start, end, 0.3, 2, 0, 0), (0.48, 0.6, 0.64)
    with np.errstate(all="ignore"):
        rays, depth, _ = raycast.cast(CAM, [part])
        points = np.stack(raycast.along(CAM.eye, rays, depth))
        expected = raycast.hit(points, sun, part) < np.inf
        shadow = raycast.shadows(CAM, points, sun, [part])
    ground = np.abs(points[1]) < 1e-5
    assert (shadow & ground).sum() > 100 and (shadow != expected)[ground].sum() <= 1


def test_albedo_of_plain_and_checked_materials():
    """A solid colour is that colour; a checker has its two colours in alternating cells."""
    black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    materials = [raycast.Material(raycast.SOLID, ((0.2, 0.4, 0.6), white)),
                 raycast.Material(raycast.CHECKER, (black, white), 2.0)]
    points = np.array([[0.1, 0.1, 0.6, 0.6], [0.1] * 4, [0.1, 0.1, 0.1, 0.6]], np.float32)
    rows, extent = np.array([0, 1, 1, 1], np.uint8), np.full(4, 1e-3, np.float32)
    colours = raycast.albedo(points, extent, rows, materials)
    assert np.array_equal(colours.T[0], np.float32([0.2, 0.4, 0.6]))
    assert colours.T[1:].tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3]
