"""A small ray-caster in plain numpy: what a camera sees of solids on a plane under a sky.

    Camera, to_camera, windows      pinhole camera; which pixels can see a part at all
    hit_*                           where a ray meets a ball, capsule, box, cylinder or cone
    cast                            nearest hit of every pixel's ray: depth and surface
    normals, shadows                what light needs to know about a hit
    Material, albedo                colours and textures
    shade, expose                   the picture, and what a sensor makes of it

Closed-form intersections make depth and surface exact: no mesh, no step size, no tolerance.

Coordinates: the world is in metres, x right, y up, z away from the camera; the ground is y = 0
and the camera stands above the origin. The camera's axes are x right, y down, z forward; integer
pixel coordinates are pixel centres. Rays have a forward component of exactly 1, so the ray
parameter of a hit *is* its z-depth. Points, rays and normals are triples (x, y, z) of floats or
of float32 arrays that broadcast, or one array whose first axis is 3.

Same input, same bytes, on every machine: random numbers are uniform draws of PCG64, and arrays
see only operations that IEEE 754 defines to the last bit (+ - * / sqrt floor min max,
comparisons), one element at a time. No matrix products, no sums of floats, no vectorised sin, exp
or pow, whose last bits differ between CPUs; trigonometry is on scalars and rounded to 9 digits.
"""

import math
from typing import NamedTuple

import numpy as np

SKY, GROUND, FIRST_PART = 0, 1, 2   # surface numbers; of materials, too, 0 is sky and 1 ground

FAR = 80.0             # metres; ground beyond this keeps the depth FAR
NEAR = 0.05            # metres; nothing closer than this is projected
SKY_DOME = 20.0        # metres; where the sky's texture is evaluated (its depth is infinite)
SHADOW_RADIUS = 0.047  # metres; thinner parts cast no shadow

SOLID, CHECKER, RINGS, BARS, BLOTCHES, GRADIENT = range(6)      # texture kinds


class Camera(NamedTuple):
    """A pinhole camera above the origin, with the principal point in the picture's middle."""

    eye: tuple         # metres
    axes: tuple        # right, down, forward in world coordinates
    focal: float       # pixels
    height: int
    width: int


class Part(NamedTuple):
    """One convex piece of an object.

    Nothing may stand behind the camera or below the ground: `hit` then needs no test for t > 0 on
    balls and capsules.
    """

    shape: str         # "ball", "capsule", or, upright on start: "box", "cylinder", "cone"
    start: tuple       # the two ends of its axis, metres; a ball's are equal
    end: tuple
    radius: float      # metres; a box's is that of the circle around its floor area
    label: int         # its class; like owner, of no concern to light
    owner: int         # number of the object or person it belongs to
    material: int      # index into the list of materials
    half: tuple = ()   # box only: half its sides in its own x and z
    turn: tuple = ()   # box only: cosine and sine of its rotation about the vertical


class Material(NamedTuple):
    """A texture in space, from which objects are carved: no seams, no unwrapping."""

    kind: int
    colours: tuple               # the two colours of the texture, 0..1
    frequency: float = 1.0       # texture cells per metre
    turn: tuple = (1.0, 0.0)     # cosine and sine of the texture's rotation about the vertical
    offset: tuple = (0.0, 0.0, 0.0)


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One draw from [low, high)."""
    return low + (high - low) * rng.random()


def cos_sin(angle: float) -> tuple:
    """Cosine and sine of an angle in radians, without the digits that depend on the C library."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def dot(a, b):
    """Inner product of two triples, in an order that suits camera rays.

    Such a ray is (row of x, column of y, 1): its sum has one full-size operation, the last.
    """
    return a[0] * b[0] + (a[1] * b[1] + a[2] * b[2])


def minus(a, b) -> tuple:
    """The triple ``a - b``."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def along(start, direction, length) -> tuple:
    """The point ``start + length * direction``."""
    return (start[0] + length * direction[0], start[1] + length * direction[1],
            start[2] + length * direction[2])


def to_camera(cam: Camera, point) -> tuple:
    """Camera coordinates of a world point, metres."""
    v = minus(point, cam.eye)
    return dot(v, cam.axes[0]), dot(v, cam.axes[1]), dot(v, cam.axes[2])


def axes_of(parts: list) -> tuple:
    """Starts (3, P), ends (3, P) and radii (P,) of the capsules that contain the parts, metres."""
    return (np.array([part.start for part in parts]).T, np.array([part.end for part in parts]).T,
            np.array([part.radius for part in parts]))


def windows(cam: Camera, starts: np.ndarray, ends: np.ndarray, radii: np.ndarray) -> list:
    """Slices (rows, columns) of the pixels that may see the capsule around each axis, (3, P).

    They make casting affordable: most parts cover a small share of the picture.
    """
    x, y, z = to_camera(cam, np.stack((starts, ends), 2))
    r = radii[:, None]
    behind, limits = (z - r < NEAR).any(1), []
    for q, size in ((y / z, cam.height), (x / z, cam.width)):
        reach, middle = r / (z - r) * (1 + np.abs(q)), 0.5 * (size - 1)
        low = np.floor((q - reach).min(1) * cam.focal + middle)
        high = np.ceil((q + reach).max(1) * cam.focal + middle) + 1
        for limit, fallback in ((low, 0), (high, size)):
            limit = np.where(behind, fallback, np.minimum(np.maximum(limit, 0), size))
            limits.append(limit.astype(int).tolist())
    return [(slice(top, bottom), slice(left, right)) for top, bottom, left, right in zip(*limits)]


def hit_ball(o, d, part: Part) -> np.ndarray:
    """As `hit`, for a ball."""
    g = minus(part.start, o)
    a, b, c = dot(d, d), dot(d, g), dot(g, g) - part.radius * part.radius
    return (b - np.sqrt(b * b - a * c)) / a


def hit_capsule(o, d, part: Part) -> np.ndarray:
    """As `hit`, for a capsule: all points within ``part.radius`` of the axis."""
    axis, g = minus(part.end, part.start), minus(part.start, o)
    aa, ad, ag = dot(axis, axis), dot(d, axis), dot(g, axis)
    dd, dg, gg = dot(d, d), dot(d, g), dot(g, g) - part.radius * part.radius
    a, b = aa * dd - ad * ad, aa * dg - ad * ag
    t_side = (b - np.sqrt(b * b - a * (aa * gg - ag * ag))) / a     # the endless cylinder
    height = t_side * ad - ag
    # Beyond an end of the axis the surface is the ball around that end: 1 is the upper end.
    end = (height > 0).astype(np.float32)
    b, c = dg + ad * end, gg + (2 * ag + aa) * end
    t_end = (b - np.sqrt(b * b - dd * c)) / dd
    return np.where((height >= 0) & (height <= aa), t_side, t_end)


def hit_box(o, d, part: Part) -> np.ndarray:
    """As `hit`, for a box: the part of the ray that is inside all three pairs of planes."""
    (c, s), (x, y, z) = part.turn, minus(o, part.start)
    slabs = ((x * c + z * s, d[0] * c + d[2] * s, -part.half[0], part.half[0]),
             (y, d[1], 0.0, part.end[1]),
             (z * c - x * s, d[2] * c - d[0] * s, -part.half[1], part.half[1]))
    enter, leave = 0.0, np.inf
    for origin, speed, low, high in slabs:
        t_low, t_high = (low - origin) / speed, (high - origin) / speed
        enter = np.maximum(enter, np.minimum(t_low, t_high))
        leave = np.minimum(leave, np.maximum(t_low, t_high))
    return np.where(leave > enter, enter, np.inf)


def hit_upright(o, d, part: Part) -> np.ndarray:
    """As `hit`, for cylinder and cone: the radius at height y is ``part.radius - slope * y``."""
    (x, y, z), tall = minus(o, part.start), part.end[1]
    slope = part.radius / tall if part.shape == "cone" else 0.0
    r = part.radius - slope * y
    a = d[0] * d[0] + d[2] * d[2] - slope * slope * d[1] * d[1]
    b = x * d[0] + z * d[2] + slope * r * d[1]
    root = np.sqrt(b * b - a * (x * x + z * z - r * r))
    nearest = np.inf
    for t in ((-b - root) / a, (root - b) / a):        # a < 0 swaps their order
        height = y + t * d[1]
        hits = (t > 0) & (height >= 0) & (height <= tall)
        nearest = np.where(hits & (t < nearest), t, nearest)
    t = (tall - y) / d[1]                              # the lid, of radius 0 on a cone
    u, v, lid = x + t * d[0], z + t * d[2], part.radius - slope * tall
    return np.where((u * u + v * v < lid * lid) & (t > 0) & (t < nearest), t, nearest)


def hit(o, d, part: Part) -> np.ndarray:
    """Ray parameter t of the first point ``o + t * d`` on the part; NaN or infinity without one.

    NaN is the square root of a negative number; every comparison with it is false, so it loses
    to any surface. Call under ``np.errstate(divide="ignore", invalid="ignore")``.
    """
    if part.shape == "capsule":
        return hit_capsule(o, d, part)
    if part.shape == "ball":
        return hit_ball(o, d, part)
    return hit_box(o, d, part) if part.shape == "box" else hit_upright(o, d, part)


def cast(cam: Camera, parts: list) -> tuple:
    """Nearest hits: rays (three arrays), depth in metres and surface, all (H, W).

    Surface is SKY (depth infinite), GROUND or FIRST_PART + i for ``parts[i]``, as uint8.
    """
    x = ((np.arange(cam.width, dtype=np.float32) - 0.5 * (cam.width - 1)) / cam.focal)[None, :]
    y = ((np.arange(cam.height, dtype=np.float32) - 0.5 * (cam.height - 1)) / cam.focal)[:, None]
    rays = [dot((x, y, 1.0), column) for column in zip(*cam.axes)]
    surface = (rays[1] < 0).astype(np.uint8)           # GROUND below the horizon
    depth = np.where(surface == GROUND, np.minimum(-cam.eye[1] / rays[1], FAR), np.inf)
    starts, ends, radii = axes_of(parts)
    near = [np.stack(to_camera(cam, point)).T.tolist() for point in (starts, ends)]
    for i, (rows, cols) in enumerate(windows(cam, starts, ends, radii)):
        part = parts[i]
        if part.shape in ("ball", "capsule"):      # no upright axis: cheaper in camera axes
            seen = part._replace(start=near[0][i], end=near[1][i])
            t = hit((0.0, 0.0, 0.0), (x[:, cols], y[rows], 1.0), seen)
        else:
            t = hit(cam.eye, [axis[rows, cols] for axis in rays], part)
        closer = t < depth[rows, cols]
        np.copyto(depth[rows, cols], t, where=closer)
        np.copyto(surface[rows, cols], FIRST_PART + i, where=closer)
    return rays, depth, surface


def solid_normal(p, part: Part) -> tuple:
    """Outward direction (any length) of a box, cylinder or cone at its surface points ``p``."""
    (x, y, z), tall = minus(p, part.start), part.end[1]
    if part.shape != "box":
        slope = part.radius / tall if part.shape == "cone" else 0.0
        top = y > tall - 1e-3
        return (np.where(top, 0, x), np.where(top, 1, slope * (part.radius - slope * y)),
                np.where(top, 0, z))
    c, s = part.turn
    x, z = x * c + z * s, z * c - x * s
    gap_x, gap_z = part.half[0] - np.abs(x), part.half[1] - np.abs(z)   # the nearest face wins
    top = tall - y < np.minimum(gap_x, gap_z)
    x = np.where(~top & (gap_x <= gap_z), np.sign(x), 0)
    z = np.where(~top & (gap_x > gap_z), np.sign(z), 0)
    return x * c - z * s, np.where(top, 1, 0), x * s + z * c


def put(out: np.ndarray, at: np.ndarray, values) -> None:
    """``out[:, at] = values``, but several times faster; so is take(at, 1) than [:, at]."""
    for row, value in zip(out, values):
        row[at] = value


def normals(points: np.ndarray, surface: np.ndarray, parts: list) -> np.ndarray:
    """Unit normals (3, N) at ``points`` (3, N) of ``surface`` (N,); the sky faces the camera."""
    out = np.zeros_like(points)
    out[1], out[2] = surface > SKY, -(surface == SKY).astype(np.float32)
    rounded = np.array([False, False] + [part.shape in ("ball", "capsule") for part in parts])
    at = np.flatnonzero(rounded.take(surface))
    starts, ends, _ = (values.astype(np.float32) for values in axes_of(parts))
    axes = ends - starts
    squares = np.maximum(dot(axes, axes), np.float32(1e-12))
    which = surface[at] - FIRST_PART
    v, axis = points.take(at, 1) - starts.take(which, 1), axes.take(which, 1)
    place = np.minimum(np.maximum(dot(v, axis) / squares.take(which), 0), 1)
    put(out, at, v - place * axis)                 # away from the nearest point of the axis
    for i in np.flatnonzero(~rounded[FIRST_PART:]):
        at = np.flatnonzero(surface == FIRST_PART + i)
        put(out, at, solid_normal(points.take(at, 1), parts[i]))
    return out / np.sqrt(dot(out, out))


def across(sun: tuple, point) -> tuple:
    """A point's two coordinates, metres, in the plane across the sunlight (``sun``: unit)."""
    level = math.sqrt(sun[0] * sun[0] + sun[2] * sun[2])
    c, s = sun[0] / level, sun[2] / level
    return point[2] * c - point[0] * s, level * point[1] - sun[1] * (c * point[0] + s * point[2])


def in_stadium(u: np.ndarray, v: np.ndarray, start: tuple, end: tuple, radius: float):
    """True where (u, v) is within ``radius`` of a segment of the plane: a capsule's shadow."""
    a, b = end[0] - start[0], end[1] - start[1]
    square = max(a * a + b * b, 1e-12)             # a ball's segment is a point
    u, v = u - start[0], v - start[1]
    place = np.minimum(np.maximum((a / square) * u + (b / square) * v, 0), 1)
    u, v = u - a * place, v - b * place
    return u * u + v * v < radius * radius


def shadows(cam: Camera, points: np.ndarray, sun: tuple, parts: list) -> np.ndarray:
    """True (H, W) where the ray from a ground point (3, H, W) towards the sun meets a part."""
    dark = np.zeros(points.shape[1:], bool)
    casting = [part for part in parts if part.radius >= SHADOW_RADIUS]
    starts, ends, radii = axes_of(casting)
    # A ball's shadow on the ground lies within a ball of radius r / sin(elevation).
    feet = [np.stack(along(p, sun, -p[1] / sun[1])) for p in (starts, ends)]
    u, v = across(sun, (points[0], 0.0, points[2]))
    for part, (rows, cols) in zip(casting, windows(cam, *feet, radii / sun[1])):
        if part.shape in ("ball", "capsule"):      # the same question in the plane costs a third
            start, end = across(sun, part.start), across(sun, part.end)
            hits = in_stadium(u[rows, cols], v[rows, cols], start, end, part.radius)
        else:
            hits = hit(points[:, rows, cols], sun, part) < np.inf
        dark[rows, cols] |= hits
    return dark


def zigzag(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1, -1..1: a sine that has the same bits everywhere."""
    return 4 * np.abs(x - np.floor(x) - np.float32(0.5)) - 1


def pattern(kind: int, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Share, 0..1, of the second colour at texture coordinates in cells."""
    if kind == GRADIENT:
        return np.minimum(np.maximum(y, 0), 1)
    if kind == BLOTCHES:                           # waves that bend each other
        x, y, z = 0.31 * x, 0.37 * y, 0.29 * z
        bent = zigzag(x + 0.4 * zigzag(z + y)) + zigzag(z - 0.4 * zigzag(1.3 * x)) + zigzag(y)
        return np.minimum(np.maximum(0.5 + bent, 0), 1)
    cell = y if kind == RINGS else x
    cell = np.floor(x) + np.floor(y) + np.floor(z) if kind == CHECKER else np.floor(cell)
    return cell - 2 * np.floor(0.5 * cell)


def albedo(points: np.ndarray, extent: np.ndarray, rows: np.ndarray, materials: list):
    """Colours (3, N) at ``points`` (3, N) of materials ``rows`` (N,); pixel ``extent`` metres."""
    palette = np.array([material.colours for material in materials], np.float32)
    out = np.take(palette[:, 0].T, rows, axis=1)
    for i, material in enumerate(materials):
        if material.kind == SOLID:
            continue
        at = np.flatnonzero(rows == i)
        x, y, z = points.take(at, 1)
        (c, s), (u, v, w) = material.turn, material.offset
        f = material.frequency
        c, s = c * f, s * f
        share = pattern(material.kind, x * c + z * s + u, y * f + v, z * c - x * s + w)
        # Cells smaller than a pixel would flicker: fade them to the mean of both colours.
        fade = np.minimum(np.maximum(1.6 - (2 * f) * extent.take(at), 0), 1)
        share = 0.5 + (share - 0.5) * fade
        put(out, at, [first + share * (second - first) for first, second in palette[i].T])
    return out


def shade(rng, cam: Camera, rays, depth, surface, parts: list, materials: list) -> np.ndarray:
    """Picture (3, H, W) float32, 0..1 and brighter: texture, sunlight, shadow and sky.

    rays, depth, surface: what `cast` returned. Sunlight is Lambert's law plus ambient light.
    """
    sky, flat = surface == SKY, surface.ravel()
    reach = np.where(sky, SKY_DOME, depth)
    points = np.stack(along(cam.eye, rays, reach))
    normal = normals(points.reshape(3, -1), flat, parts).reshape(points.shape)
    (flat_part, rise), (c, s) = cos_sin(uniform(rng, 0.5, 1.3)), cos_sin(uniform(rng, 0, 6.2832))
    sun, ambient = (flat_part * c, rise, flat_part * s), uniform(rng, 0.4, 0.65)
    lambert = np.maximum(dot(normal, sun), 0)
    lambert[shadows(cam, points, sun, parts) & (surface == GROUND)] = 0
    light = np.where(sky, 1, ambient + (1.15 - ambient) * lambert)
    extent = reach / (np.maximum(np.abs(dot(normal, rays)), 0.02) * cam.focal)
    rows = np.array([SKY, GROUND] + [part.material for part in parts], np.uint8).take(flat)
    colours = albedo(points.reshape(3, -1), extent.ravel(), rows, materials)
    return colours.reshape(points.shape) * light


def expose(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """What the sensor makes of (3, H, W): gain, slight lens blur, noise; (H, W, 3) uint8."""
    picture = picture * (255 * uniform(rng, 0.75, 1.25))
    soft = uniform(rng, 0.05, 0.2)
    for low, high in ((picture[:, :-1], picture[:, 1:]), (picture[..., :-1], picture[..., 1:])):
        flow = high - low                          # neighbours exchange a share of their light
        flow *= soft
        low += flow
        high -= flow
    # The two halves of 32 random bits, added, have mean 65535 and standard deviation 26755.
    draws = rng.integers(0, 2 ** 32, picture.shape, dtype=np.uint32)
    noise = ((draws & 65535) + (draws >> 16)).astype(np.float32)
    strength = uniform(rng, 0.5, 4.0) / 26755
    picture += noise * strength
    picture += 0.5 - 65535 * strength
    image = np.empty((*picture.shape[1:], 3), np.uint8)
    for channel, values in enumerate(picture):
        image[..., channel] = np.minimum(np.maximum(values, 0), 255)
    return image
