"""Random 3-D scenes with exact labels: a data set that is made, not downloaded.

``render(seed)`` builds a small world (ground, sky, solids, one or two articulated people), casts
one ray per pixel with closed-form intersections, and returns the picture together with the class
of every pixel, its depth in metres and the 17 COCO joints of every person. All answers come from
the same geometry, so they agree with each other and with the picture. Colours, textures, light
and camera are random for every surface: colour does not tell the class, only shape does.

Coordinates
    World: metres, x right, y up, z away from the camera; the ground is the plane y = 0 and the
    camera stands above the origin. Camera: x right, y down, z forward. A pixel's integer
    coordinate is its centre. Rays have a forward component of exactly 1, so the ray parameter
    at a hit *is* the z-depth. Person: left, up, forward, with the origin between the hips.

Same seed, same bytes, on every machine
    Random numbers are uniform draws of PCG64. Arrays see only operations that IEEE 754 defines
    to the last bit (+ - * / sqrt floor min max, comparisons), one element at a time: no matrix
    products, no float sums, no vectorised sin/exp/pow, whose last bits differ between CPUs.
    Trigonometry happens on scalars and is rounded to 9 digits.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CLASSES = ("sky", "ground", "box", "ball", "cylinder", "cone", "person")
SKY, GROUND, PERSON = 0, 1, 6

MIN_SIDE = 32          # pixels; below this the people have no visible limbs
FAR = 80.0             # metres; ground beyond this keeps the depth FAR
NEAR = 0.05            # metres; nothing closer than this is windowed by projection
SKY_DOME = 20.0        # metres; where the sky's texture is evaluated (its depth is still 0)
PLACE_TRIES = 12       # attempts to find free room for one object
PERSON_ROOM = 0.6      # metres; radius of the floor area a person keeps free
NOISE_SIDE = 16        # cells per side of the repeating lattice of random values

# How far (metres) a person's own surface may lie in front of a joint that still counts as
# visible: the flesh around the joint plus a margin. Order of the 17 COCO joints.
FLESH = (0.05, 0.05, 0.05, 0.05, 0.05, 0.14, 0.14, 0.10, 0.10, 0.09, 0.09, 0.18, 0.18,
         0.13, 0.13, 0.10, 0.10)

SOLID, CHECKER, RINGS, BARS, BLOTCHES, GRADIENT = range(6)      # texture kinds
SKIN, SHIRT, TROUSERS, HAIR, SHOES, EYES = range(6)             # a person's materials

Vec = tuple    # (x, y, z), each a float or an array


@dataclass(frozen=True)
class Scene:
    """One picture and everything that is true about it. H, W: size; P: people with visible pixels.

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
    eye: Vec
    right: Vec
    down: Vec
    forward: Vec
    focal: float       # pixels
    height: int
    width: int


class Part(NamedTuple):
    """A solid, described by its axis. Box, cylinder and cone stand upright on ``start``."""

    shape: str         # "ball" (at start), "capsule", "box", "cylinder" or "cone" (apex at end)
    start: Vec
    end: Vec
    radius: float      # metres; for a box, of the circle around its footprint
    half: tuple        # box only: half its sides in its own x and z
    turn: tuple        # box only: cosine and sine of its rotation about the vertical
    label: int
    owner: int         # index of the object or person it belongs to
    material: int      # row of the material table


class Material(NamedTuple):
    kind: int
    first: tuple       # the two colours of the texture, 0..1
    second: tuple
    frequency: float   # texture cells per metre
    turn: tuple        # cosine and sine of the texture's rotation about the vertical
    offset: tuple      # texture cells


# ---------------------------------------------------------------- scalars and vectors

def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def cos_sin(angle: float) -> tuple:
    # Rounded, because the last digit differs between C libraries.
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def dot(a: Vec, b: Vec):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def minus(a: Vec, b: Vec) -> Vec:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def along(start: Vec, direction: Vec, length) -> Vec:
    """The point ``start + length * direction``."""
    return (start[0] + length * direction[0], start[1] + length * direction[1],
            start[2] + length * direction[2])


# ---------------------------------------------------------------- rays against solids
# Every function takes a ray o + t * d whose components are floats or float32 arrays that
# broadcast, and returns the smallest t > 0 of a hit, infinity where there is none.

def hit_ball(o: Vec, d: Vec, part: Part) -> np.ndarray:
    oc = minus(o, part.start)
    a, b, c = dot(d, d), dot(oc, d), dot(oc, oc) - part.radius * part.radius
    root = b * b - a * c
    t = -(b + np.sqrt(np.maximum(root, 0))) / a
    return np.where((root > 0) & (t > 0), t, np.inf)


def hit_capsule(o: Vec, d: Vec, part: Part) -> np.ndarray:
    axis, oc = minus(part.end, part.start), minus(o, part.start)
    aa, ad, ao = dot(axis, axis), dot(axis, d), dot(axis, oc)
    dd, do, oo = dot(d, d), dot(d, oc), dot(oc, oc) - part.radius * part.radius
    a = np.maximum(aa * dd - ad * ad, 1e-9)        # 0 for a ray along the axis
    b = aa * do - ao * ad
    root = b * b - a * (aa * oo - ao * ao)
    t = -(b + np.sqrt(np.maximum(root, 0))) / a    # the endless cylinder around the axis
    height = ao + t * ad
    # Beyond an end of the axis the surface is the ball around that end. A ray that misses the
    # endless cylinder misses both balls as well.
    low = height < 0
    b = np.where(low, do, do - ad)
    cap = b * b - dd * np.where(low, oo, oo - 2 * ao + aa)
    t_cap = -(b + np.sqrt(np.maximum(cap, 0))) / dd
    on_side = (height >= 0) & (height <= aa)
    t = np.where(on_side, t, t_cap)
    return np.where((root > 0) & (on_side | (cap > 0)) & (t > 0), t, np.inf)


def hit_box(o: Vec, d: Vec, part: Part) -> np.ndarray:
    c, s = part.turn
    oc = minus(o, part.start)
    tall = part.end[1] - part.start[1]
    slabs = ((oc[0] * c + oc[2] * s, d[0] * c + d[2] * s, -part.half[0], part.half[0]),
             (oc[1], d[1], 0.0, tall),
             (oc[2] * c - oc[0] * s, d[2] * c - d[0] * s, -part.half[1], part.half[1]))
    enter, leave = -np.inf, np.inf
    for origin, speed, low, high in slabs:
        speed = np.where(np.abs(speed) < 1e-9, np.float32(1e-9), speed)
        t_low, t_high = (low - origin) / speed, (high - origin) / speed
        enter = np.maximum(enter, np.minimum(t_low, t_high))
        leave = np.minimum(leave, np.maximum(t_low, t_high))
    return np.where((leave > enter) & (leave > 0), np.maximum(enter, 0), np.inf)


def hit_cylinder(o: Vec, d: Vec, part: Part) -> np.ndarray:
    oc = minus(o, part.start)
    tall = part.end[1] - part.start[1]
    rr = part.radius * part.radius
    a = np.maximum(d[0] * d[0] + d[2] * d[2], 1e-9)
    b = oc[0] * d[0] + oc[2] * d[2]
    root = b * b - a * (oc[0] * oc[0] + oc[2] * oc[2] - rr)
    t = -(b + np.sqrt(np.maximum(root, 0))) / a
    y = oc[1] + t * d[1]
    side = np.where((root > 0) & (t > 0) & (y >= 0) & (y <= tall), t, np.inf)
    t = (tall - oc[1]) / np.where(d[1] == 0, np.float32(1e-9), d[1])
    x, z = oc[0] + t * d[0], oc[2] + t * d[2]
    return np.minimum(side, np.where((x * x + z * z < rr) & (t > 0), t, np.inf))


def hit_cone(o: Vec, d: Vec, part: Part) -> np.ndarray:
    oc = minus(o, part.end)                        # from the apex, where the radius is 0
    tall = part.end[1] - part.start[1]
    kk = part.radius * part.radius / (tall * tall)
    a = d[0] * d[0] + d[2] * d[2] - kk * d[1] * d[1]
    a = np.where(np.abs(a) < 1e-6, np.float32(1e-6), a)
    b = oc[0] * d[0] + oc[2] * d[2] - kk * oc[1] * d[1]
    root = b * b - a * (oc[0] * oc[0] + oc[2] * oc[2] - kk * oc[1] * oc[1])
    reach = np.sqrt(np.maximum(root, 0))
    nearest = np.inf
    for t in ((-b - reach) / a, (reach - b) / a):  # a < 0 swaps the order, so test both
        y = oc[1] + t * d[1]                       # y > 0 is the mirror cone above the apex
        hit = (root > 0) & (t > 0) & (y <= 0) & (y >= -tall)
        nearest = np.minimum(nearest, np.where(hit, t, np.inf))
    return nearest


HIT = {"ball": hit_ball, "capsule": hit_capsule, "box": hit_box, "cylinder": hit_cylinder,
       "cone": hit_cone}


def normal_at(p: Vec, part: Part) -> Vec:
    """Outward direction, not of unit length, of ``part`` at points ``p`` of its surface."""
    v = minus(p, part.start)
    tall = part.end[1] - part.start[1]
    if part.shape == "ball":
        return v
    if part.shape == "capsule":
        axis = minus(part.end, part.start)
        place = np.minimum(np.maximum(dot(v, axis) / dot(axis, axis), 0), 1)
        return along(v, axis, -place)
    if part.shape == "cone":
        slope = part.radius / tall
        return v[0], slope * slope * (tall - v[1]), v[2]
    if part.shape == "cylinder":
        top = v[1] > tall - 1e-3
        return np.where(top, 0, v[0]), np.where(top, 1, 0), np.where(top, 0, v[2])
    c, s = part.turn                               # box: the face whose plane is nearest
    x, z = v[0] * c + v[2] * s, v[2] * c - v[0] * s
    off_x, off_z = part.half[0] - np.abs(x), part.half[1] - np.abs(z)
    top = tall - v[1] < np.minimum(off_x, off_z)
    nx = np.where(~top & (off_x <= off_z), np.sign(x), 0)
    nz = np.where(~top & (off_x > off_z), np.sign(z), 0)
    return nx * c - nz * s, np.where(top, 1, 0), nx * s + nz * c


# ---------------------------------------------------------------- camera

def make_camera(eye_height, pitch, roll, tan_half, height, width) -> Camera:
    """Camera above the origin, looking along +z, ``pitch`` radians down, ``roll`` clockwise."""
    (cp, sp), (cr, sr) = cos_sin(pitch), cos_sin(roll)
    level_down = (0.0, -cp, -sp)
    right = (cr, sr * level_down[1], sr * level_down[2])
    down = (-sr, cr * level_down[1], cr * level_down[2])
    focal = 0.5 * height / tan_half
    return Camera((0.0, eye_height, 0.0), right, down, (0.0, -sp, cp), focal, height, width)


def camera_rays(cam: Camera) -> Vec:
    """World directions of all pixels' rays, three (H, W) float32 arrays; forward part 1."""
    a = (np.arange(cam.width, dtype=np.float32) - 0.5 * (cam.width - 1)) / cam.focal
    b = (np.arange(cam.height, dtype=np.float32) - 0.5 * (cam.height - 1)) / cam.focal
    a, b = a[None, :], b[:, None]
    return tuple(a * cam.right[i] + (b * cam.down[i] + cam.forward[i]) for i in range(3))


def project(cam: Camera, point: Vec) -> tuple:
    """Pixel column, row and z-depth (metres) of a world point in front of the camera."""
    v = minus(point, cam.eye)
    z = max(dot(v, cam.forward), NEAR)
    return (cam.focal * dot(v, cam.right) / z + 0.5 * (cam.width - 1),
            cam.focal * dot(v, cam.down) / z + 0.5 * (cam.height - 1), z)


def hull_balls(part: Part) -> list:
    """(centre, radius) of balls whose convex hull contains the part."""
    if part.shape in ("ball", "capsule"):
        return [(part.start, part.radius), (part.end, part.radius)][:1 + (part.shape != "ball")]
    r, ends = part.radius, (part.start, part.end)
    return [((x + i * r, y, z + j * r), 0.0) for x, y, z in ends for i in (-1, 1) for j in (-1, 1)]


def window(cam: Camera, balls: list) -> tuple:
    """Slices (rows, columns) of the pixels that may see the hull of ``balls``."""
    sides = ([], [])
    for centre, r in balls:
        v = minus(centre, cam.eye)
        z = dot(v, cam.forward)
        if z - r < NEAR:
            return slice(0, cam.height), slice(0, cam.width)
        for axis, side in ((cam.down, sides[0]), (cam.right, sides[1])):
            x = dot(v, axis)
            side += [(x - r) / (z - r), (x - r) / (z + r), (x + r) / (z - r), (x + r) / (z + r)]
    slices = []
    for side, size in zip(sides, (cam.height, cam.width)):
        low = math.floor(min(side) * cam.focal + 0.5 * (size - 1))
        high = math.ceil(max(side) * cam.focal + 0.5 * (size - 1)) + 1
        slices.append(slice(min(max(low, 0), size), min(max(high, 0), size)))
    return tuple(slices)


# ---------------------------------------------------------------- people

def limb(start: Vec, swing: float, spread: float, length: float) -> Vec:
    """End of a limb that hangs from ``start``: raised ``swing`` forward, ``spread`` to the left."""
    (ca, sa), (cb, sb) = cos_sin(swing), cos_sin(spread)
    return along(start, (ca * sb, -ca * cb, sa), length)


def leg_angles(rng: np.random.Generator) -> tuple:
    """Hip swing and knee bend, radians, of the left and the right leg."""
    mode = rng.random()
    if mode < 0.4:                                                  # standing
        return tuple((uniform(rng, -0.1, 0.15), uniform(rng, 0, 0.15)) for _ in range(2))
    if mode < 0.85:                                                 # a step, either leg in front
        step = uniform(rng, 0.2, 0.6)
        front = (step, uniform(rng, 0.0, 0.4))
        back = (-0.8 * step, uniform(rng, 0.1, 0.9))
        return (front, back) if rng.random() < 0.5 else (back, front)
    bend = uniform(rng, 0.4, 1.2)                                   # half crouched
    return tuple((bend + uniform(rng, -0.1, 0.1), 1.8 * bend) for _ in range(2))


def arm_angles(rng: np.random.Generator, leg_swing: float) -> tuple:
    """Shoulder swing and spread, and elbow bend, radians; an idle arm swings against its leg."""
    mode = rng.random()
    if mode < 0.5:                                                  # hanging
        return (-0.9 * leg_swing + uniform(rng, -0.2, 0.2), uniform(rng, 0.08, 0.4),
                uniform(rng, 0, 1.2))
    if mode < 0.7:                                                  # raised forward, or overhead
        return uniform(rng, 0.6, 2.8), uniform(rng, 0.0, 0.3), uniform(rng, 0, 0.8)
    if mode < 0.9:                                                  # raised sideways, or up
        return uniform(rng, -0.1, 0.3), uniform(rng, 0.8, 2.8), uniform(rng, 0, 0.9)
    return uniform(rng, -0.7, -0.3), uniform(rng, 0.5, 0.8), uniform(rng, 1.2, 1.7)  # on the hip


def body(rng: np.random.Generator, tall: float) -> tuple:
    """A posed person: joints, 17 points, and parts, (start, end, radius, material), person frame.

    Lengths are fractions of the stature ``tall`` (metres), about those of an average adult.
    """
    wide = uniform(rng, 0.9, 1.2)
    legs = leg_angles(rng)
    crouch = 0.4 * min(legs[0][0], legs[1][0])
    lean = uniform(rng, -0.05, 0.2) + max(crouch, 0.0)
    neck = limb((0.0, 0.0, 0.0), math.pi - lean, uniform(rng, -0.1, 0.1), 0.29 * tall)
    head = along(neck, (0.0, 1.0, 0.2), 0.112 * tall)
    head = (head[0], head[1], head[2] + uniform(rng, -0.01, 0.02))
    joints, parts = face(rng, head, 0.068 * tall)
    arms, lower = [], []
    sleeve = SHIRT if rng.random() < 0.5 else SKIN
    trouser = TROUSERS if rng.random() < 0.6 else SKIN
    for side, (swing, knee) in zip((1, -1), legs):
        hip = (side * 0.055 * wide * tall, 0.0, 0.0)
        shoulder = (neck[0] + side * 0.108 * wide * tall, neck[1], neck[2])
        spread = side * uniform(rng, 0.0, 0.15)
        knee_at = limb(hip, swing, spread, 0.245 * tall)
        ankle = limb(knee_at, swing - knee, spread, 0.24 * tall)
        swing, spread, bend = arm_angles(rng, swing)
        elbow = limb(shoulder, swing, side * spread, 0.175 * tall)
        wrist = limb(elbow, swing + bend, side * spread, 0.145 * tall)
        hand = along(wrist, minus(wrist, elbow), 0.35)
        heel, toe = (along(ankle, (side * 0.15 * k, -0.3, k), 0.06 * tall) for k in (-0.3, 1.9))
        arms.append((shoulder, elbow, wrist))
        lower.append((hip, knee_at, ankle))
        inner = along(shoulder, (side, 0.6, 0.0), -0.04 * tall)
        parts += [(inner, hip, 0.066 * wide * tall, SHIRT),
                  (shoulder, elbow, 0.030 * tall, SHIRT), (elbow, wrist, 0.025 * tall, sleeve),
                  (wrist, hand, 0.024 * tall, SKIN), (hip, knee_at, 0.050 * tall, TROUSERS),
                  (knee_at, ankle, 0.034 * tall, trouser), (heel, toe, 0.025 * tall, SHOES)]
    parts += [(arms[0][0], arms[1][0], 0.035 * tall, SHIRT), (neck, head, 0.032 * tall, SKIN),
              (lower[0][0], lower[1][0], 0.068 * wide * tall, TROUSERS)]
    joints += [p for chain in (arms, lower) for pair in zip(*chain) for p in pair]
    return joints, parts


def face(rng: np.random.Generator, head: Vec, r: float) -> tuple:
    """Head of radius ``r``: its five joints, on the ball's surface, and its parts."""
    look = uniform(rng, -0.6, 0.6)                                  # the head turns on the neck
    def point(left, up):
        (cl, sl), (cu, su) = cos_sin(look + left), cos_sin(up)
        return along(head, (cu * sl, su, cu * cl), r)
    nose, ears = point(0, -0.1), [point(1.5, 0.05), point(-1.5, 0.05)]
    eyes = [point(0.42, 0.25), point(-0.42, 0.25)]
    hair = along(along(head, minus(point(0, 0), head), -0.32), (0.0, 1.0, 0.0), 0.25 * r)
    parts = [(head, head, r, SKIN), (hair, hair, 1.03 * r, HAIR), (nose, nose, 0.2 * r, SKIN)]
    parts += [(p, p, 0.17 * r, EYES) for p in eyes] + [(p, p, 0.24 * r, SKIN) for p in ears]
    return [nose, *eyes, *ears], parts


def stand(rng, tall: float, x: float, z: float, owner: int, material: int) -> tuple:
    """World joints and ``Part``s of a person of stature ``tall`` whose lowest foot is at y = 0."""
    joints, parts = body(rng, tall)
    c, s = cos_sin(uniform(rng, -math.pi, math.pi))                 # heading (s, 0, c)
    lift = -min(p[1] - r for start, end, r, _ in parts for p in (start, end))
    def world(p):
        return x - c * p[0] + s * p[2], p[1] + lift, z + s * p[0] + c * p[2]
    made = [Part("capsule" if start != end else "ball", world(start), world(end), r, (), (),
                 PERSON, owner, material + kind) for start, end, r, kind in parts]
    return [world(p) for p in joints], made


# ---------------------------------------------------------------- composing a scene

def colour(rng: np.random.Generator) -> tuple:
    return tuple(uniform(rng, 0.06, 1.0) for _ in range(3))


def material(rng: np.random.Generator, kinds: tuple, cell: float) -> Material:
    """Random material of one of ``kinds``, whose texture has cells of about ``cell`` metres."""
    kind = kinds[int(rng.integers(len(kinds)))]
    return Material(kind, colour(rng), colour(rng), 1.0 / (cell * uniform(rng, 0.6, 1.7)),
                    cos_sin(uniform(rng, 0, math.pi)),
                    tuple(uniform(rng, 0, NOISE_SIDE) for _ in range(3)))


def person_materials(rng: np.random.Generator) -> list:
    skin = material(rng, (SOLID,), 1.0)
    clothes = (SOLID, SOLID, CHECKER, RINGS, BARS, BLOTCHES)
    bright = skin.first[1] > 0.45                                   # eyes must stand out
    eyes = skin._replace(first=(0.04, 0.04, 0.06) if bright else (0.95, 0.95, 0.9))
    return [skin, material(rng, clothes, 0.12), material(rng, clothes, 0.12),
            material(rng, (SOLID,), 1.0), material(rng, (SOLID,), 1.0), eyes]


def frame_person(rng: np.random.Generator, height: int, width: int) -> tuple:
    """Camera, and the first person's stature and distance, chosen so that the person fits."""
    tan_half = round(math.tan(math.radians(uniform(rng, 45, 70)) / 2), 9)
    tall, share = uniform(rng, 1.5, 1.95), uniform(rng, 0.38, 0.85)
    z = tall / (2 * tan_half * share)
    # A high camera close by would have to look steeply down: limit its height by the distance.
    eye = min(uniform(rng, 0.8, 2.6), 0.5 * tall + 0.4 * z)
    spare = (0.92 - share) * tan_half                               # room above and below
    pitch = math.atan((eye - 0.5 * tall) / z) + uniform(rng, -1, 1) * spare
    return make_camera(eye, pitch, uniform(rng, -0.06, 0.06), tan_half, height, width), tall, z


def is_free(spots: list, x: float, z: float, room: float) -> bool:
    return all((x - a) * (x - a) + (z - b) * (z - b) > (room + r) * (room + r)
               for a, b, r in spots)


def place_people(rng, cam: Camera, tall: float, z: float, materials: list) -> tuple:
    """One or two people. Returns their joints, all parts and the (x, z, radius) they occupy."""
    joints, parts, spots = [], [], []
    half_width = 0.5 * cam.width / cam.focal
    for i in range(1 + (rng.random() < 0.25)):
        for _ in range(PLACE_TRIES):
            reach = max(0.8 * half_width * z - 0.3, 0.0)
            x = uniform(rng, -reach, reach)
            if is_free(spots, x, z, PERSON_ROOM):
                spots.append((x, z, PERSON_ROOM))
                made = stand(rng, tall, x, z, i, len(materials))
                joints.append(made[0])
                parts += made[1]
                materials += person_materials(rng)
                break
            z *= 1.05
        tall, z = uniform(rng, 1.5, 1.95), z * uniform(rng, 0.95, 1.5)
    return joints, parts, spots


def random_solid(rng, cam: Camera, owner: int, row: int) -> Part:
    """A box, ball, cylinder or cone on the ground, 15 to 50 % of the image high."""
    z = 1.8 * round(8.0 ** rng.random(), 9)
    size = uniform(rng, 0.15, 0.5) * cam.height / cam.focal * z
    x = uniform(rng, -0.42, 0.42) * cam.width / cam.focal * z
    label = 2 + int(rng.integers(4))
    shape = CLASSES[label]
    half, turn, lift = (), (), 0.0
    radius = size * uniform(rng, 0.22, 0.55)
    if shape == "ball":
        radius = lift = 0.5 * size
    if shape == "box":
        half = (size * uniform(rng, 0.22, 0.7), size * uniform(rng, 0.22, 0.7))
        turn = cos_sin(uniform(rng, 0, math.pi))
        radius = math.sqrt(half[0] * half[0] + half[1] * half[1])
    end = (x, lift if shape == "ball" else size, z)
    return Part(shape, (x, lift, z), end, radius, half, turn, label, owner, row)


def place_solids(rng, cam: Camera, spots: list, owner: int, materials: list) -> list:
    """Two to five solids that touch nothing, are in view and leave the people recognisable."""
    parts, people = [], list(spots)
    for _ in range(2 + int(rng.integers(4))):
        for _ in range(PLACE_TRIES):
            part = random_solid(rng, cam, owner, len(materials))
            x, y, z = along(part.start, minus(part.end, part.start), 0.5)
            r, row = part.radius, project(cam, (x, y, z))[1]
            hides = any(z < b and abs(x / z - a / b) < 0.7 * r / z for a, b, _ in people)
            seen = 0.05 * cam.height < row < 0.95 * cam.height and z - r > 1.0
            if seen and not hides and is_free(spots, x, z, r):
                kinds = (SOLID, CHECKER, RINGS, BARS, BLOTCHES)
                materials.append(material(rng, kinds, part.radius * 0.45))
                spots.append((x, z, r))
                parts.append(part)
                owner += 1
                break
    return parts


# ---------------------------------------------------------------- drawing

def cast(cam: Camera, rays: Vec, parts: list, windows: list) -> tuple:
    """Depth (H, W) float32 and surface (H, W) int16: 0 sky, 1 ground, 2 + i for ``parts[i]``."""
    below = rays[1] < 0
    depth = -cam.eye[1] / np.where(below, rays[1], np.float32(-1))
    depth = np.where(below, np.minimum(depth, np.float32(FAR)), np.float32(np.inf))
    surface = below.astype(np.int16)
    for i, (part, (rows, cols)) in enumerate(zip(parts, windows)):
        t = HIT[part.shape](cam.eye, [axis[rows, cols] for axis in rays], part)
        closer = t < depth[rows, cols]
        np.copyto(depth[rows, cols], t, where=closer)
        np.copyto(surface[rows, cols], i + 2, where=closer)
    return depth, surface


def normals(points: Vec, surface: np.ndarray, parts: list, windows: list) -> Vec:
    """Unit normals of all pixels, three (H, W) arrays; the sky's point at the camera."""
    sky = surface == 0
    flat = np.zeros(surface.shape, np.float32)
    out = (flat, np.where(sky, np.float32(0), np.float32(1)),
           np.where(sky, np.float32(-1), np.float32(0)))
    for i, (part, (rows, cols)) in enumerate(zip(parts, windows)):
        own = surface[rows, cols] == i + 2
        normal = normal_at([axis[rows, cols][own] for axis in points], part)
        for axis, value in zip(out, normal):
            axis[rows, cols][own] = value
    length = np.sqrt(dot(out, out))
    return tuple(axis / length for axis in out)


def shadows(cam: Camera, points: Vec, sun: Vec, parts: list) -> np.ndarray:
    """True (H, W) where the ray from a point of the ground to the sun meets a solid."""
    dark = np.zeros(points[0].shape, bool)
    direction = [np.full((1, 1), axis, np.float32) for axis in sun]
    for part in parts:
        if part.radius < 0.03:                     # eyes, noses: not worth a shadow
            continue
        # The shadow lies within the hull of the hull balls' shadows, each at most r / sin(sun).
        balls = [(along(c, sun, -c[1] / sun[1]), r / sun[1]) for c, r in hull_balls(part)]
        rows, cols = window(cam, balls)
        t = HIT[part.shape]([axis[rows, cols] for axis in points], direction, part)
        dark[rows, cols] |= t < np.inf
    return dark


def value_noise(q: Vec, lattice: np.ndarray) -> np.ndarray:
    """Trilinear interpolation of random values on the integer lattice; 0..1."""
    cells = [np.floor(axis) for axis in q]
    x, y, z = (axis - cell for axis, cell in zip(q, cells))
    low = [cell.astype(np.int32) for cell in cells]
    strides = (NOISE_SIDE * NOISE_SIDE, NOISE_SIDE, 1)
    (x0, x1), (y0, y1), (z0, z1) = (
        [((cell + k) & (NOISE_SIDE - 1)) * stride for k in (0, 1)]
        for cell, stride in zip(low, strides))
    edges = []
    for a in (x0 + y0, x0 + y1, x1 + y0, x1 + y1):
        near, far = lattice[a + z0], lattice[a + z1]
        edges.append(near + z * (far - near))
    left, right = edges[0] + y * (edges[1] - edges[0]), edges[2] + y * (edges[3] - edges[2])
    return left + x * (right - left)


def pattern(kind: int, q: Vec, lattice: np.ndarray) -> np.ndarray:
    """Share, 0..1, of the second colour at texture coordinates ``q``."""
    if kind == GRADIENT:
        return np.minimum(np.maximum(q[1], 0), 1)
    if kind == BLOTCHES:
        return np.minimum(np.maximum(3 * value_noise(q, lattice) - 1, 0), 1)
    if kind == CHECKER:
        cell = np.floor(q[0]) + np.floor(q[1]) + np.floor(q[2])
    else:
        cell = np.floor(q[1] if kind == RINGS else q[0])
    return cell - 2 * np.floor(0.5 * cell)


def albedo(points: Vec, blur: np.ndarray, rows: np.ndarray, materials: list, lattice) -> np.ndarray:
    """Surface colours (N, 3) at N points; ``blur`` is a pixel's extent there in metres."""
    spin = np.array([(m.turn[0] * m.frequency, m.turn[1] * m.frequency, m.frequency, *m.offset)
                     for m in materials], np.float32)
    first, second = (np.array([m[i] for m in materials], np.float32) for i in (1, 2))
    kinds = np.array([m.kind for m in materials])[rows]
    share = np.zeros(len(rows), np.float32)
    for kind in sorted({m.kind for m in materials} - {SOLID}):
        at = np.flatnonzero(kinds == kind)
        x, y, z = (axis[at] for axis in points)
        c, s, f, u, v, w = spin[rows[at]].T
        value = pattern(kind, (x * c + z * s + u, y * f + v, z * c - x * s + w), lattice)
        # Cells smaller than a pixel would flicker: fade them to the mean of both colours.
        fade = np.minimum(np.maximum(1.6 - 2 * blur[at] * f, 0), 1)
        share[at] = 0.5 + (value - 0.5) * fade
    return first[rows] + share[:, None] * (second - first)[rows]


def shade(rng, cam: Camera, rays: Vec, depth, surface, parts, windows, materials) -> np.ndarray:
    """Linear picture (H, W, 3) float32 before the sensor: texture, sun, shadow and sky."""
    sky, ground = surface == 0, surface == 1
    points = along(cam.eye, rays, np.where(sky, np.float32(SKY_DOME), depth))
    normal = normals(points, surface, parts, windows)
    (cos_up, sin_up), (c, s) = cos_sin(uniform(rng, 0.5, 1.3)), cos_sin(uniform(rng, 0, 6.2832))
    sun = (cos_up * c, sin_up, cos_up * s)
    ambient = uniform(rng, 0.35, 0.65)
    lambert = np.maximum(dot(normal, sun), 0)
    lambert[shadows(cam, points, sun, parts) & ground] = 0
    light = np.where(sky, 1, ambient + (1.1 - ambient) * lambert)
    facing = np.maximum(np.abs(dot(normal, rays)), 0.02)
    blur = np.where(sky, np.float32(SKY_DOME), depth) / (facing * cam.focal)
    rows = np.array([0, 1] + [part.material for part in parts])[surface].ravel()
    lattice = rng.random(NOISE_SIDE ** 3, dtype=np.float32)
    colours = albedo([axis.ravel() for axis in points], blur.ravel(), rows, materials, lattice)
    return (colours * light.reshape(-1, 1)).reshape(*surface.shape, 3)


def expose(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """What the sensor reports, (H, W, 3) uint8: gain, slight lens blur, noise, 8 bits."""
    picture = picture * uniform(rng, 0.7, 1.2)
    soft = uniform(rng, 0.05, 0.2)
    picture[1:-1] += soft * (picture[:-2] + picture[2:] - 2 * picture[1:-1])
    picture[:, 1:-1] += soft * (picture[:, :-2] + picture[:, 2:] - 2 * picture[:, 1:-1])
    # The sum of four random bytes is close to Gaussian; its standard deviation is 148.
    draws = rng.integers(0, 2 ** 32, picture.shape, dtype=np.uint32)
    total = (draws & 255) + (draws >> 8 & 255) + (draws >> 16 & 255) + (draws >> 24)
    noise = (total.astype(np.float32) - 510) * (uniform(rng, 0.5, 4.0) / 148)
    levels = np.floor(picture * 255 + noise + np.float32(0.5))
    return np.minimum(np.maximum(levels, 0), 255).astype(np.uint8)


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
    sky = material(rng, (SOLID, GRADIENT, GRADIENT, BLOTCHES), 8.0)
    sky = sky._replace(offset=(0, 0, 0)) if sky.kind == GRADIENT else sky
    materials = [sky, material(rng, (SOLID, CHECKER, BARS, BLOTCHES), 0.8)]
    people, parts, spots = place_people(rng, cam, tall, z, materials)
    parts += place_solids(rng, cam, spots, len(people), materials)
    windows = [window(cam, hull_balls(part)) for part in parts]
    rays = camera_rays(cam)
    depth, surface = cast(cam, rays, parts, windows)
    image = expose(rng, shade(rng, cam, rays, depth, surface, parts, windows, materials))
    owner = np.array([-2, -1] + [part.owner for part in parts])[surface]
    label = np.array([SKY, GROUND] + [part.label for part in parts], np.uint8)[surface]
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
