"""Random 3-D scenes with exact labels: a data set that is made, not downloaded.

``render(seed)`` builds a small world (ground, sky, solids, one or two articulated people), casts
one ray per pixel (raycast.py), and returns the picture with the class of every pixel, its depth
in metres and the 17 COCO joints of every person. All answers come from the same geometry.
Colours, textures, light and camera are random for every surface, ground and sky included: colour
does not tell the class, only shape does.

Coordinates are those of raycast.py: metres, x right, y up, z away from the camera, ground y = 0.
A person's own axes are left, up, forward, from between the hips. Angles are in radians.

Same seed, same bytes, on every machine: this file computes with scalars, and raycast.py says
which array operations are allowed. The order of the random draws is part of the data set.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sets.raycast import (BARS, BLOTCHES, CHECKER, GRADIENT, GROUND, NEAR, RINGS, SKY, SOLID,
                          Camera, Material, Part, along, cast, cos_sin, expose, minus, shade,
                          to_camera, uniform)

CLASSES = ("sky", "ground", "box", "ball", "cylinder", "cone", "person")
PERSON = 6

MIN_SIDE = 32          # pixels; below this the people have no visible limbs
PLACE_TRIES = 12       # attempts to find free room for one object
PERSON_ROOM = 0.6      # metres; radius of the floor area that a person keeps free

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


class World(NamedTuple):
    """What a scene was made from; lengths in metres."""

    camera: Camera
    parts: list            # `Part`s; owners 0, 1, ... are the people, in the order of `people`
    materials: list        # `Material`s; 0 is the sky's, 1 the ground's, a person has six in a row
    people: list           # of each person the 17 joints, (x, y, z)
    surface: np.ndarray    # (H, W) uint8, what a pixel shows, as `cast` says


def project(cam: Camera, point: tuple) -> tuple:
    """Column and row in pixels and z-depth in metres of one world point."""
    x, y, z = to_camera(cam, point)
    f = cam.focal / max(z, NEAR)
    return f * x + 0.5 * (cam.width - 1), f * y + 0.5 * (cam.height - 1), z


def limb(start, swing: float, spread: float, length: float) -> tuple:
    """End of a limb that hangs from ``start``, raised ``swing`` forward and ``spread`` left."""
    (ca, sa), (cb, sb) = cos_sin(swing), cos_sin(spread)
    return along(start, (ca * sb, -ca * cb, sa), length)


def pose(rng: np.random.Generator, poses: tuple) -> list:
    """Angles in radians, one from each range of a pose chosen among ``poses``."""
    return [uniform(rng, low, high) for low, high in poses[int(rng.integers(len(poses)))]]


def face(rng: np.random.Generator, head, r: float) -> tuple:
    """A head of radius ``r`` metres: its five joints, on the ball's surface, and its parts."""
    look = uniform(rng, -0.6, 0.6)                              # the head turns on the neck

    def point(left, up):
        """On the ball, at angles in radians from the look."""
        (cl, sl), (cu, su) = cos_sin(look + left), cos_sin(up)
        return along(head, (cu * sl, su, cu * cl), r)

    nose, *eyes = point(0, -0.1), point(0.42, 0.25), point(-0.42, 0.25)
    hair = along(along(head, minus(point(0, 0), head), -0.32), (0, 1, 0), 0.25 * r)
    parts = [(head, head, r, SKIN), (hair, hair, 1.03 * r, HAIR), (nose, nose, 0.2 * r, SKIN)]
    parts += [(p, p, 0.17 * r, EYES) for p in eyes]
    return [nose, *eyes, point(1.5, 0.05), point(-1.5, 0.05)], parts


def leg(rng: np.random.Generator, side: int, tall: float, wide: float, angles, shin: int) -> tuple:
    """Hip, knee and ankle of the left (side 1) or right (-1) leg, and its parts."""
    swing, bend = angles
    spread = side * uniform(rng, 0.0, 0.15)
    hip = (side * 0.055 * wide * tall, 0.0, 0.0)
    knee = limb(hip, swing, spread, 0.245 * tall)
    ankle = limb(knee, swing - bend, spread, 0.24 * tall)
    heel, toe = (along(ankle, (side * 0.15 * k, -0.3, k), 0.06 * tall) for k in (-0.3, 1.9))
    return (hip, knee, ankle), [(hip, knee, 0.05 * tall, TROUSERS),
                                (knee, ankle, 0.034 * tall, shin),
                                (heel, toe, 0.025 * tall, SHOES)]


def arm(rng: np.random.Generator, side: int, tall: float, shoulder: tuple, sleeve: int) -> tuple:
    """Shoulder, elbow and wrist of the left (side 1) or right (-1) arm, and its parts."""
    swing, spread, bend = pose(rng, ARM_POSES)
    elbow = limb(shoulder, swing, side * spread, 0.175 * tall)
    wrist = limb(elbow, swing + bend, side * spread, 0.145 * tall)
    hand = along(wrist, minus(wrist, elbow), 0.35)
    return (shoulder, elbow, wrist), [(shoulder, elbow, 0.03 * tall, SHIRT),
                                      (elbow, hand, 0.025 * tall, sleeve)]


def body(rng: np.random.Generator, tall: float) -> tuple:
    """A posed person: the 17 joints, and parts (start, end, radius, material), person axes.

    Lengths are fractions of the stature ``tall`` (metres), about those of an average adult.
    """
    wide, angles = uniform(rng, 0.9, 1.2), pose(rng, LEG_POSES)
    swings = [angles[:2], angles[2:]] if rng.random() < 0.5 else [angles[2:], angles[:2]]
    lean = uniform(rng, -0.05, 0.2) + max(0.4 * min(angles[0], angles[2]), 0)
    neck = limb((0.0, 0.0, 0.0), math.pi - lean, uniform(rng, -0.1, 0.1), 0.29 * tall)
    head = along(neck, (0, 1, 0.2), 0.112 * tall)
    joints, parts = face(rng, head, 0.068 * tall)
    sleeve = SHIRT if rng.random() < 0.5 else SKIN
    shin = TROUSERS if rng.random() < 0.6 else SKIN
    arms, legs = [], []
    for side, angles in zip((1, -1), swings):
        shoulder = along(neck, (side, 0, 0), 0.108 * wide * tall)
        chest = along(shoulder, (side, 0.6, 0), -0.04 * tall)
        leg_joints, leg_parts = leg(rng, side, tall, wide, angles, shin)
        arm_joints, arm_parts = arm(rng, side, tall, shoulder, sleeve)
        parts += [(chest, leg_joints[0], 0.066 * wide * tall, SHIRT), *leg_parts, *arm_parts]
        arms.append(arm_joints)
        legs.append(leg_joints)
    parts += [(arms[0][0], arms[1][0], 0.035 * tall, SHIRT), (neck, head, 0.032 * tall, SKIN),
              (legs[0][0], legs[1][0], 0.068 * wide * tall, TROUSERS)]
    return joints + [p for chain in (arms, legs) for pair in zip(*chain) for p in pair], parts


def stand(rng, tall: float, x: float, z: float, owner: int, material: int) -> tuple:
    """World joints and ``Part``s of a person whose lowest point touches the ground at (x, z)."""
    joints, parts = body(rng, tall)
    c, s = cos_sin(uniform(rng, -math.pi, math.pi))             # facing (s, 0, c)
    lift = -min(p[1] - r for start, end, r, _ in parts for p in (start, end))

    def world(p):
        """From the body's coordinates to the scene's, metres."""
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
    """The six materials of a person, in the order SKIN to EYES."""
    skin, hair, shoes = (random_material(rng, (SOLID,), 1) for _ in range(3))
    clothes = (SOLID, SOLID, CHECKER, RINGS, BARS, BLOTCHES)
    shirt, trousers = random_material(rng, clothes, 0.12), random_material(rng, clothes, 0.12)
    eye = (0.04, 0.04, 0.06) if skin.colours[0][1] > 0.45 else (0.95, 0.95, 0.9)  # must stand out
    return [skin, shirt, trousers, hair, shoes, Material(SOLID, (eye, eye))]


def frame_person(rng: np.random.Generator, height: int, width: int, lens: float | None) -> tuple:
    """The camera, and a stature and distance (metres) at which a person fits its picture."""
    view = uniform(rng, 45, 70)                                 # drawn with a given lens, too
    tan_half = round(math.tan(math.radians(view if lens is None else lens) / 2), 9)
    tall, share = uniform(rng, 1.5, 1.95), uniform(rng, 0.38, 0.85)
    z = tall / (2 * tan_half * share)
    # A high camera close by would have to look steeply down: limit its height by the distance.
    eye = min(uniform(rng, 0.8, 2.6), 0.5 * tall + 0.4 * z)
    pitch = math.atan((eye - 0.5 * tall) / z) + uniform(rng, -1, 1) * (0.92 - share) * tan_half
    (cp, sp), (cr, sr) = cos_sin(pitch), cos_sin(uniform(rng, -0.06, 0.06))
    axes = (cr, -sr * cp, -sr * sp), (-sr, -cr * cp, -cr * sp), (0.0, -sp, cp)
    return Camera((0.0, eye, 0.0), axes, 0.5 * height / tan_half, height, width), tall, z


def is_free(spots: list, x: float, z: float, room: float) -> bool:
    """True if a circle of radius ``room`` at (x, z) overlaps none of ``spots``, (x, z, radius)."""
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


def people_of(cam: Camera, people: list, owner: np.ndarray, depth: np.ndarray) -> tuple:
    """Keypoints, boxes and areas, as in `Scene`, of the people with any pixel in owner (H, W)."""
    keypoints, boxes, areas = [], [], []
    for i, joints in enumerate(people):
        mine = owner == i
        rows, cols = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        if len(rows):
            keypoints.append(keypoints_of(cam, joints, mine, depth))
            boxes.append((cols[0], rows[0], cols[-1] - cols[0] + 1, rows[-1] - rows[0] + 1))
            areas.append(np.count_nonzero(mine))
    return (np.array(keypoints, np.float32).reshape(-1, 17, 3),
            np.array(boxes, np.float32).reshape(-1, 4), np.array(areas, np.float32))


def render(seed: int, height: int = 128, width: int = 128, lens: float | None = None) -> Scene:
    """The random scene number ``seed``; the same on every machine.

    seed: 0 or more. height, width: picture size in pixels, each 32 or more. lens: vertical field
    of view in degrees; None: a random one, 45 to 70.
    Raises ValueError for a negative seed or a smaller picture.
    """
    return render_world(seed, height, width, lens)[0]


def render_world(seed: int, height: int = 128, width: int = 128,
                 lens: float | None = None) -> tuple[Scene, World]:
    """As `render`, with the world that the picture shows."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if height < MIN_SIDE or width < MIN_SIDE:
        raise ValueError(f"height and width must be at least {MIN_SIDE}, got {height} x {width}")
    rng = np.random.Generator(np.random.PCG64(seed))
    cam, tall, z = frame_person(rng, height, width, lens)
    sky = random_material(rng, (SOLID, GRADIENT, GRADIENT, BLOTCHES), 8.0)
    sky = sky._replace(offset=(0.0, 0.0, 0.0)) if sky.kind == GRADIENT else sky
    materials = [sky, random_material(rng, (SOLID, CHECKER, BARS, BLOTCHES), 0.8)]
    people, parts, spots = place_people(rng, cam, tall, z, materials)
    parts += place_solids(rng, cam, spots, materials)
    with np.errstate(divide="ignore", invalid="ignore"):       # rays that miss give NaN
        rays, depth, surface = cast(cam, parts)
        image = expose(rng, shade(rng, cam, rays, depth, surface, parts, materials))
    label = np.array([SKY, GROUND] + [part.label for part in parts], np.uint8).take(surface)
    owner = np.array([-2, -1] + [part.owner for part in parts]).take(surface)
    scene = Scene(image, label, np.where(surface == SKY, np.float32(0), depth),
                  *people_of(cam, people, owner, depth))
    return scene, World(cam, parts, materials, people, surface)
