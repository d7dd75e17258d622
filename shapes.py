"""Random 3-D scenes with exact labels: a data set that is made, not downloaded.

``render(seed)`` builds a small world (ground, sky, solids, one or two articulated people), casts
one ray per pixel with closed-form intersections, and returns the picture with the class of every
pixel, its depth in metres and the 17 COCO joints of every person. All answers come from the same
geometry. Colours, textures, light and camera are random for every surface, ground and sky
included: colour does not tell the class, only shape does.

Coordinates: the world is in metres, x right, y up, z away from the camera; the ground is y = 0
and the camera stands above the origin. The camera's axes are x right, y down, z forward; integer
pixel coordinates are pixel centres. Rays have a forward component of exactly 1, so the ray
parameter of a hit *is* its z-depth. A person's axes are left, up, forward, from between the hips.

Same seed, same bytes, on every machine: random numbers are uniform draws of PCG64, and arrays see
only operations that IEEE 754 defines to the last bit (+ - * / sqrt floor min max, comparisons),
one element at a time. No matrix products, no sums of floats, no vectorised sin, exp or pow, whose
last bits differ between CPUs; trigonometry is on scalars and rounded to 9 digits.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CLASSES = ("sky", "ground", "box", "ball", "cylinder", "cone", "person")
SKY, GROUND, PERSON = 0, 1, 6

MIN_SIDE = 32          # pixels; below this the people have no visible limbs
FAR = 80.0             # metres; ground beyond this keeps the depth FAR
NEAR = 0.05            # metres; nothing closer than this is projected
SKY_DOME = 20.0        # metres; where the sky's texture is evaluated (its depth is still 0)
PLACE_TRIES = 12       # attempts to find free room for one object
PERSON_ROOM = 0.6      # metres; radius of the floor area that a person keeps free
SHADOW_RADIUS = 0.047  # metres; thinner parts cast no shadow

# Metres of a person's own surface that may lie in front of a joint that still counts as visible:
# the flesh around the joint plus a margin, in the order of the COCO joints.
FLESH = (0.05,) * 5 + (0.14, 0.14, 0.10, 0.10, 0.09, 0.09, 0.18, 0.18, 0.13, 0.13, 0.10, 0.10)

# Ranges in radians. Legs: hip swing and knee bend of one leg, then of the other.
LEG_POSES = (((-0.1, 0.15), (0.0, 0.15), (-0.1, 0.15), (0.0, 0.15)),        # standing
             ((0.15, 0.4), (0.0, 0.3), (-0.35, -0.1), (0.1, 0.6)),          # walking
             ((0.4, 0.7), (0.0, 0.4), (-0.5, -0.3), (0.1, 0.9)),            # striding
             ((0.5, 1.1), (1.1, 1.8), (0.5, 1.1), (1.1, 1.8)))              # crouching
# Arms: shoulder swing forward, spread to the side, elbow bend.
ARM_POSES = (((-0.4, 0.4), (0.08, 0.4), (0.0, 1.2)),                        # hanging
             ((-0.6, 0.6), (0.05, 0.3), (0.1, 0.9)),                        # swinging
             ((0.6, 2.8), (0.0, 0.3), (0.0, 0.8)),                          # raised in front
             ((-0.1, 0.3), (0.8, 2.8), (0.0, 0.9)))                         # raised sideways

SOLID, CHECKER, RINGS, BARS, BLOTCHES, GRADIENT = range(6)      # texture kinds
SKIN, SHIRT, TROUSERS, HAIR, SHOES, EYES = range(6)             # a person's materials


@dataclass(frozen=True)
class Scene:
    """One picture and all that is known of it. H, W: size; P: people with any visible pixel.

    image      (H, W, 3) uint8, RGB.
    label      (H, W) uint8, index into ``CLASSES``.
    depth      (H, W) float32, metres along the optical axis, at most ``FAR`` on ground; 0 in sky.
    keypoints  (P, 17, 3) float32 in COCO order: x, y in pixels (integer = pixel centre) and v:
               2 visible, 1 in the image but hidden, 0 outside the image (then x = y = 0).
    boxes      (P, 4) float32, x, y, w, h: first column and row, and number of columns and rows,
               of the smallest rectangle around the person's visible pixels.
    areas      (P,) float32, number of visible pixels of each person.
    """

    image: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    keypoints: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray


class Camera(NamedTuple):
    eye: tuple         # metres
    axes: tuple        # right, down, forward in world coordinates
    focal: float       # pixels
    height: int
    width: int


class Part(NamedTuple):
    shape: str         # "ball", "capsule", or, upright on start: "box", "cylinder", "cone"
    start: tuple       # the two ends of its axis, metres; a ball's are equal
    end: tuple
    radius: float      # metres; a box's is that of the circle around its floor area
    label: int
    owner: int         # number of the object or person it belongs to
    material: int      # index into the list of materials
    half: tuple = ()   # box only: half its sides in its own x and z
    turn: tuple = ()   # box only: cosine and sine of its rotation about the vertical


class Material(NamedTuple):
    kind: int
    colours: tuple               # the two colours of the texture, 0..1
    frequency: float = 1.0       # texture cells per metre
    turn: tuple = (1.0, 0.0)     # cosine and sine of the texture's rotation about the vertical
    offset: tuple = (0.0, 0.0, 0.0)


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def cos_sin(angle: float) -> tuple:
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def dot(a, b):
    # In this order a camera ray, (row of x, column of y, 1), costs one full-size operation.
    return a[0] * b[0] + (a[1] * b[1] + a[2] * b[2])


def minus(a, b) -> tuple:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def along(start, direction, length) -> tuple:
    """The point ``start + length * direction``."""
    return (start[0] + length * direction[0], start[1] + length * direction[1],
            start[2] + length * direction[2])


# Rays o + t * d against parts. Components are floats or float32 arrays that broadcast. The
# result is t of the first hit, NaN or infinity without one: NaN arises from the square root of a
# negative number, and every later comparison with it is false. Nothing stands behind the camera
# or below the ground, so t > 0 needs no test for round parts.

def hit_ball(o, d, part: Part) -> np.ndarray:
    g = minus(part.start, o)
    a, b, c = dot(d, d), dot(d, g), dot(g, g) - part.radius * part.radius
    return (b - np.sqrt(b * b - a * c)) / a


def hit_capsule(o, d, part: Part) -> np.ndarray:
    axis, g = minus(part.end, part.start), minus(part.start, o)
    aa, ad, ag = dot(axis, axis), dot(d, axis), dot(g, axis)
    dd, dg, gg = dot(d, d), dot(d, g), dot(g, g) - part.radius * part.radius
    a, b = aa * dd - ad * ad, aa * dg - ad * ag
    t_side = (b - np.sqrt(b * b - a * (aa * gg - ag * ag))) / a     # the endless cylinder
    height = t_side * ad - ag
    # Beyond an end of the axis the surface is the ball around that end.
    low = height < 0
    b, c = np.where(low, dg, dg + ad), np.where(low, gg, gg + 2 * ag + aa)
    t_end = (b - np.sqrt(b * b - dd * c)) / dd
    return np.where((height >= 0) & (height <= aa), t_side, t_end)


def hit_box(o, d, part: Part) -> np.ndarray:
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
    """Cylinder or cone: at height y its radius is ``part.radius - slope * y``."""
    (x, y, z), tall = minus(o, part.start), part.end[1]
    slope = part.radius / tall if part.shape == "cone" else 0.0
    r = part.radius - slope * y
    a = d[0] * d[0] + d[2] * d[2] - slope * slope * d[1] * d[1]
    b = x * d[0] + z * d[2] + slope * r * d[1]
    root = np.sqrt(b * b - a * (x * x + z * z - r * r))
    nearest = np.inf
    for t in ((-b - root) / a, (root - b) / a):        # a < 0 swaps their order
        height = y + t * d[1]
        hit = (t > 0) & (height >= 0) & (height <= tall)
        nearest = np.where(hit & (t < nearest), t, nearest)
    t = (tall - y) / d[1]                              # the lid, of radius 0 on a cone
    u, v, lid = x + t * d[0], z + t * d[2], part.radius - slope * tall
    return np.where((u * u + v * v < lid * lid) & (t > 0) & (t < nearest), t, nearest)


HIT = {"ball": hit_ball, "capsule": hit_capsule, "box": hit_box, "cylinder": hit_upright,
       "cone": hit_upright}


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


def to_camera(cam: Camera, point) -> tuple:
    """Camera coordinates of a world point, or of arrays of them."""
    v = minus(point, cam.eye)
    return dot(v, cam.axes[0]), dot(v, cam.axes[1]), dot(v, cam.axes[2])


def project(cam: Camera, point) -> tuple:
    """Column and row in pixels and z-depth in metres of a world point."""
    x, y, z = to_camera(cam, point)
    f = cam.focal / max(z, NEAR)
    return f * x + 0.5 * (cam.width - 1), f * y + 0.5 * (cam.height - 1), z


def windows(cam: Camera, starts, ends, radii) -> list:
    """Slices (rows, columns) of the pixels that may see the capsule around each axis, (3, P)."""
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


def axes_of(parts: list) -> tuple:
    """Starts (3, P), ends (3, P) and radii (P,) of the capsules that contain the parts."""
    return (np.array([part.start for part in parts]).T, np.array([part.end for part in parts]).T,
            np.array([part.radius for part in parts]))


def limb(start, swing: float, spread: float, length: float) -> tuple:
    """End of a limb that hangs from ``start``, raised ``swing`` forward and ``spread`` left."""
    (ca, sa), (cb, sb) = cos_sin(swing), cos_sin(spread)
    return along(start, (ca * sb, -ca * cb, sa), length)


def pose(rng: np.random.Generator, poses: tuple) -> list:
    return [uniform(rng, low, high) for low, high in poses[int(rng.integers(len(poses)))]]


def face(rng: np.random.Generator, head, r: float) -> tuple:
    """A head of radius ``r`` metres: its five joints, on the ball's surface, and its parts."""
    look = uniform(rng, -0.6, 0.6)                              # the head turns on the neck

    def point(left, up):
        (cl, sl), (cu, su) = cos_sin(look + left), cos_sin(up)
        return along(head, (cu * sl, su, cu * cl), r)

    nose, *eyes = point(0, -0.1), point(0.42, 0.25), point(-0.42, 0.25)
    hair = along(along(head, minus(point(0, 0), head), -0.32), (0, 1, 0), 0.25 * r)
    parts = [(head, head, r, SKIN), (hair, hair, 1.03 * r, HAIR), (nose, nose, 0.2 * r, SKIN)]
    parts += [(p, p, 0.17 * r, EYES) for p in eyes]
    return [nose, *eyes, point(1.5, 0.05), point(-1.5, 0.05)], parts


def body(rng: np.random.Generator, tall: float) -> tuple:
    """A posed person: the 17 joints, and parts (start, end, radius, material), person axes.

    Lengths are fractions of the stature ``tall`` (metres), about those of an average adult.
    """
    wide, angles = uniform(rng, 0.9, 1.2), pose(rng, LEG_POSES)
    legs = [angles[:2], angles[2:]] if rng.random() < 0.5 else [angles[2:], angles[:2]]
    lean = uniform(rng, -0.05, 0.2) + max(0.4 * min(angles[0], angles[2]), 0)
    neck = limb((0.0, 0.0, 0.0), math.pi - lean, uniform(rng, -0.1, 0.1), 0.29 * tall)
    head = along(neck, (0, 1, 0.2), 0.112 * tall)
    joints, parts = face(rng, head, 0.068 * tall)
    sleeve = SHIRT if rng.random() < 0.5 else SKIN
    shin = TROUSERS if rng.random() < 0.6 else SKIN
    arms, lower = [], []
    for side, (swing, bend) in zip((1, -1), legs):
        spread = side * uniform(rng, 0.0, 0.15)
        hip = (side * 0.055 * wide * tall, 0.0, 0.0)
        knee = limb(hip, swing, spread, 0.245 * tall)
        ankle = limb(knee, swing - bend, spread, 0.24 * tall)
        heel, toe = (along(ankle, (side * 0.15 * k, -0.3, k), 0.06 * tall) for k in (-0.3, 1.9))
        shoulder = along(neck, (side, 0, 0), 0.108 * wide * tall)
        swing, spread, bend = pose(rng, ARM_POSES)
        elbow = limb(shoulder, swing, side * spread, 0.175 * tall)
        wrist = limb(elbow, swing + bend, side * spread, 0.145 * tall)
        hand = along(wrist, minus(wrist, elbow), 0.35)
        chest = along(shoulder, (side, 0.6, 0), -0.04 * tall)
        arms.append((shoulder, elbow, wrist))
        lower.append((hip, knee, ankle))
        parts += [(chest, hip, 0.066 * wide * tall, SHIRT), (hip, knee, 0.05 * tall, TROUSERS),
                  (knee, ankle, 0.034 * tall, shin), (heel, toe, 0.025 * tall, SHOES),
                  (shoulder, elbow, 0.03 * tall, SHIRT), (elbow, hand, 0.025 * tall, sleeve)]
    parts += [(arms[0][0], arms[1][0], 0.035 * tall, SHIRT), (neck, head, 0.032 * tall, SKIN),
              (lower[0][0], lower[1][0], 0.068 * wide * tall, TROUSERS)]
    return joints + [p for chain in (arms, lower) for pair in zip(*chain) for p in pair], parts


def stand(rng, tall: float, x: float, z: float, owner: int, material: int) -> tuple:
    """World joints and ``Part``s of a person whose lowest point touches the ground at (x, z)."""
    joints, parts = body(rng, tall)
    c, s = cos_sin(uniform(rng, -math.pi, math.pi))             # facing (s, 0, c)
    lift = -min(p[1] - r for start, end, r, _ in parts for p in (start, end))

    def world(p):
        return x - c * p[0] + s * p[2], p[1] + lift, z + s * p[0] + c * p[2]

    return [world(p) for p in joints], [
        Part("ball" if start == end else "capsule", world(start), world(end), r, PERSON, owner,
             material + kind) for start, end, r, kind in parts]


def random_material(rng: np.random.Generator, kinds: tuple, cell: float) -> Material:
    """Random colours and one of ``kinds``, with texture cells of about ``cell`` metres."""
    kind = kinds[int(rng.integers(len(kinds)))]
    colours = tuple(tuple(uniform(rng, 0.06, 1.0) for _ in range(3)) for _ in range(2))
    if kind == SOLID:
        return Material(kind, colours)
    return Material(kind, colours, 1 / (cell * uniform(rng, 0.6, 1.7)),
                    cos_sin(uniform(rng, 0, math.pi)), tuple(uniform(rng, 0, 8) for _ in range(3)))


def person_materials(rng: np.random.Generator) -> list:
    skin, hair, shoes = (random_material(rng, (SOLID,), 1) for _ in range(3))
    clothes = (SOLID, SOLID, CHECKER, RINGS, BARS, BLOTCHES)
    shirt, trousers = random_material(rng, clothes, 0.12), random_material(rng, clothes, 0.12)
    eye = (0.04, 0.04, 0.06) if skin.colours[0][1] > 0.45 else (0.95, 0.95, 0.9)  # must stand out
    return [skin, shirt, trousers, hair, shoes, Material(SOLID, (eye, eye))]


def frame_person(rng: np.random.Generator, height: int, width: int) -> tuple:
    """The camera, and a stature and distance (metres) at which a person fits its picture."""
    tan_half = round(math.tan(math.radians(uniform(rng, 45, 70)) / 2), 9)
    tall, share = uniform(rng, 1.5, 1.95), uniform(rng, 0.38, 0.85)
    z = tall / (2 * tan_half * share)
    # A high camera close by would have to look steeply down: limit its height by the distance.
    eye = min(uniform(rng, 0.8, 2.6), 0.5 * tall + 0.4 * z)
    pitch = math.atan((eye - 0.5 * tall) / z) + uniform(rng, -1, 1) * (0.92 - share) * tan_half
    (cp, sp), (cr, sr) = cos_sin(pitch), cos_sin(uniform(rng, -0.06, 0.06))
    axes = (cr, -sr * cp, -sr * sp), (-sr, -cr * cp, -cr * sp), (0.0, -sp, cp)
    return Camera((0.0, eye, 0.0), axes, 0.5 * height / tan_half, height, width), tall, z


def is_free(spots: list, x: float, z: float, room: float) -> bool:
    return all((x - a) * (x - a) + (z - b) * (z - b) > (room + r) * (room + r)
               for a, b, r in spots)


def place_people(rng, cam: Camera, tall: float, z: float, materials: list) -> tuple:
    """One or two people: their joints, their parts, and the (x, z, radius) they occupy."""
    joints, parts, spots = [], [], []
    for _ in range(1 + (rng.random() < 0.25)):
        for _ in range(PLACE_TRIES):
            reach = max(0.4 * cam.width / cam.focal * z - 0.3, 0)
            x = uniform(rng, -reach, reach)
            if is_free(spots, x, z, PERSON_ROOM):
                made = stand(rng, tall, x, z, len(joints), len(materials))
                spots.append((x, z, PERSON_ROOM))
                joints.append(made[0])
                parts += made[1]
                materials += person_materials(rng)
                break
            z *= 1.05
        tall, z = uniform(rng, 1.5, 1.95), z * uniform(rng, 0.95, 1.5)
    return joints, parts, spots


def random_solid(rng, cam: Camera, owner: int, material: int) -> Part:
    """A box, ball, cylinder or cone on the ground, 15 to 50 % of the picture high."""
    z = 1.8 * round(8 ** rng.random(), 9)
    x = uniform(rng, -0.42, 0.42) * cam.width / cam.focal * z
    size = uniform(rng, 0.15, 0.5) * cam.height / cam.focal * z
    label = 2 + int(rng.integers(4))
    if CLASSES[label] == "ball":
        return Part("ball", (x, size / 2, z), (x, size / 2, z), size / 2, label, owner, material)
    start, end, radius = (x, 0.0, z), (x, size, z), size * uniform(rng, 0.22, 0.55)
    if CLASSES[label] != "box":
        return Part(CLASSES[label], start, end, radius, label, owner, material)
    half = radius, size * uniform(rng, 0.22, 0.7)
    radius = math.sqrt(half[0] * half[0] + half[1] * half[1])
    return Part("box", start, end, radius, label, owner, material, half,
                cos_sin(uniform(rng, 0, math.pi)))


def place_solids(rng, cam: Camera, spots: list, materials: list) -> list:
    """Two to five solids that touch nothing, are in view and leave the people recognisable."""
    parts, people, spots = [], spots, list(spots)
    for _ in range(2 + int(rng.integers(4))):
        for _ in range(PLACE_TRIES):
            part = random_solid(rng, cam, len(spots), len(materials))
            (x, _, z), r = part.start, part.radius
            row = project(cam, (x, 0.5 * (part.start[1] + part.end[1]), z))[1]
            in_view = 0.05 * cam.height < row < 0.95 * cam.height and z - r > 1.0
            hides = any(z < b and abs(x / z - a / b) < 0.7 * r / z for a, b, _ in people)
            if in_view and not hides and is_free(spots, x, z, r):
                kinds = (SOLID, CHECKER, RINGS, BARS, BLOTCHES)
                materials.append(random_material(rng, kinds, 0.45 * r))
                spots.append((x, z, r))
                parts.append(part)
                break
    return parts


def cast(cam: Camera, parts: list) -> tuple:
    """Rays (3 arrays), depth and surface, all (H, W). Surface: 0 sky, 1 ground, 2 + i parts[i]."""
    x = ((np.arange(cam.width, dtype=np.float32) - 0.5 * (cam.width - 1)) / cam.focal)[None, :]
    y = ((np.arange(cam.height, dtype=np.float32) - 0.5 * (cam.height - 1)) / cam.focal)[:, None]
    rays = [dot((x, y, 1.0), column) for column in zip(*cam.axes)]
    surface = (rays[1] < 0).astype(np.intp)
    depth = np.where(surface == 1, np.minimum(-cam.eye[1] / rays[1], FAR), np.inf)
    starts, ends, radii = axes_of(parts)
    near = [np.stack(to_camera(cam, point)).T.tolist() for point in (starts, ends)]
    for i, (rows, cols) in enumerate(windows(cam, starts, ends, radii)):
        part = parts[i]
        if part.shape in ("ball", "capsule"):      # no upright axis: cheaper in camera axes
            seen = part._replace(start=near[0][i], end=near[1][i])
            t = HIT[part.shape]((0.0, 0.0, 0.0), (x[:, cols], y[rows], 1.0), seen)
        else:
            t = HIT[part.shape](cam.eye, [axis[rows, cols] for axis in rays], part)
        closer = t < depth[rows, cols]
        np.copyto(depth[rows, cols], t, where=closer)
        np.copyto(surface[rows, cols], i + 2, where=closer)
    return rays, depth, surface


def normals(points: np.ndarray, surface: np.ndarray, parts: list) -> np.ndarray:
    """Unit normals (3, N) at ``points`` (3, N) of ``surface`` (N,); the sky faces the camera."""
    out = np.zeros_like(points)
    out[1], out[2] = surface > 0, -(surface == 0).astype(np.float32)
    rounded = np.array([False, False] + [part.shape in ("ball", "capsule") for part in parts])
    at = np.flatnonzero(rounded[surface])
    starts, ends, _ = (values.astype(np.float32) for values in axes_of(parts))
    axes = ends - starts
    squares = np.maximum(dot(axes, axes), np.float32(1e-12))
    which = surface[at] - 2
    v, axis = points[:, at] - starts[:, which], axes[:, which]
    place = np.minimum(np.maximum(dot(v, axis) / squares[which], 0), 1)
    out[:, at] = v - place * axis                  # away from the nearest point of the axis
    for i in np.flatnonzero(~rounded[2:]):
        at = np.flatnonzero(surface == i + 2)
        out[:, at] = solid_normal(points[:, at], parts[i])
    return out / np.sqrt(dot(out, out))


def shadows(cam: Camera, points: np.ndarray, sun: tuple, parts: list) -> np.ndarray:
    """True (H, W) where the ray from a ground point (3, H, W) to the sun meets a solid."""
    dark = np.zeros(points.shape[1:], bool)
    casting = [part for part in parts if part.radius >= SHADOW_RADIUS]
    starts, ends, radii = axes_of(casting)
    # A ball's shadow on the ground lies within a ball of radius r / sin(elevation).
    feet = [np.stack(along(p, sun, -p[1] / sun[1])) for p in (starts, ends)]
    for part, (rows, cols) in zip(casting, windows(cam, *feet, radii / sun[1])):
        dark[rows, cols] |= HIT[part.shape](points[:, rows, cols], sun, part) < np.inf
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
    out = np.empty_like(points)
    for i, material in enumerate(materials):
        at = np.flatnonzero(rows == i)
        first, second = np.array(material.colours, np.float32)
        if material.kind == SOLID:
            out[:, at] = first[:, None]
            continue
        x, y, z = (axis[at] for axis in points)
        (c, s), (u, v, w) = material.turn, material.offset
        f = material.frequency
        c, s = c * f, s * f
        share = pattern(material.kind, x * c + z * s + u, y * f + v, z * c - x * s + w)
        # Cells smaller than a pixel would flicker: fade them to the mean of both colours.
        fade = np.minimum(np.maximum(1.6 - (2 * f) * extent[at], 0), 1)
        share = 0.5 + (share - 0.5) * fade
        for channel in range(3):
            out[channel, at] = first[channel] + share * (second[channel] - first[channel])
    return out


def shade(rng, cam: Camera, rays, depth, surface, parts: list, materials: list) -> np.ndarray:
    """Picture (3, H, W) float32, 0..1 and brighter: texture, sunlight, shadow and sky."""
    sky, flat = surface == 0, surface.ravel()
    reach = np.where(sky, SKY_DOME, depth)
    points = np.stack(along(cam.eye, rays, reach))
    normal = normals(points.reshape(3, -1), flat, parts).reshape(points.shape)
    (flat_part, rise), (c, s) = cos_sin(uniform(rng, 0.5, 1.3)), cos_sin(uniform(rng, 0, 6.2832))
    sun, ambient = (flat_part * c, rise, flat_part * s), uniform(rng, 0.4, 0.65)
    lambert = np.maximum(dot(normal, sun), 0)
    lambert[shadows(cam, points, sun, parts) & (surface == 1)] = 0
    light = np.where(sky, 1, ambient + (1.15 - ambient) * lambert)
    extent = reach / (np.maximum(np.abs(dot(normal, rays)), 0.02) * cam.focal)
    rows = np.array([SKY, GROUND] + [part.material for part in parts], np.uint8)[flat]
    colours = albedo(points.reshape(3, -1), extent.ravel(), rows, materials)
    return colours.reshape(points.shape) * light


def expose(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """What the sensor makes of (3, H, W): gain, slight lens blur, noise; (H, W, 3) uint8."""
    picture = picture * (255 * uniform(rng, 0.75, 1.25))
    soft = uniform(rng, 0.05, 0.2)
    for low, high in ((picture[:, :-1], picture[:, 1:]), (picture[..., :-1], picture[..., 1:])):
        flow = soft * (high - low)                 # neighbours exchange a share of their light
        low += flow
        high -= flow
    # The two halves of 32 random bits, added, have mean 65535 and standard deviation 26755.
    draws = rng.integers(0, 2 ** 32, picture.shape, dtype=np.uint32)
    noise = ((draws & 65535) + (draws >> 16)).astype(np.float32)
    strength = uniform(rng, 0.5, 4.0) / 26755
    picture += noise * strength
    picture += 0.5 - 65535 * strength
    levels = np.minimum(np.maximum(picture, 0), 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def keypoints_of(cam: Camera, joints: list, mine: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(17, 3) x, y, v of one person; ``mine`` (H, W) marks the person's visible pixels."""
    out = np.zeros((len(joints), 3), np.float32)
    for i, joint in enumerate(joints):
        x, y, z = project(cam, joint)
        if 0 <= x <= cam.width - 1 and 0 <= y <= cam.height - 1:
            at = math.floor(y + 0.5), math.floor(x + 0.5)
            hidden = depth[at] < z - (FLESH[i] if mine[at] else 0.0)
            out[i] = x, y, 1 if hidden else 2
    return out


def render(seed: int, height: int = 128, width: int = 128) -> Scene:
    """The random scene number ``seed``; the same on every machine.

    seed: 0 or more. height, width: picture size in pixels, each 32 or more.
    Raises ValueError for a negative seed or a smaller picture.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if height < MIN_SIDE or width < MIN_SIDE:
        raise ValueError(f"height and width must be at least {MIN_SIDE}, got {height} x {width}")
    rng = np.random.Generator(np.random.PCG64(seed))
    cam, tall, z = frame_person(rng, height, width)
    sky = random_material(rng, (SOLID, GRADIENT, GRADIENT, BLOTCHES), 8.0)
    sky = sky._replace(offset=(0.0, 0.0, 0.0)) if sky.kind == GRADIENT else sky
    materials = [sky, random_material(rng, (SOLID, CHECKER, BARS, BLOTCHES), 0.8)]
    people, parts, spots = place_people(rng, cam, tall, z, materials)
    parts += place_solids(rng, cam, spots, materials)
    with np.errstate(divide="ignore", invalid="ignore"):       # rays that miss give NaN
        rays, depth, surface = cast(cam, parts)
        image = expose(rng, shade(rng, cam, rays, depth, surface, parts, materials))
    label = np.array([SKY, GROUND] + [part.label for part in parts], np.uint8)[surface]
    owner = np.array([-2, -1] + [part.owner for part in parts])[surface]
    keypoints, boxes, areas = [], [], []
    for i, joints in enumerate(people):
        mine = owner == i
        rows, cols = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        if len(rows):
            keypoints.append(keypoints_of(cam, joints, mine, depth))
            boxes.append((cols[0], rows[0], cols[-1] - cols[0] + 1, rows[-1] - rows[0] + 1))
            areas.append(np.count_nonzero(mine))
    return Scene(image, label, np.where(surface == 0, np.float32(0), depth),
                 np.array(keypoints, np.float32).reshape(-1, 17, 3),
                 np.array(boxes, np.float32).reshape(-1, 4), np.array(areas, np.float32))
