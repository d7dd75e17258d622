"""Captions of the embedded scenes: weak labels, as the pictures on the web have them.

``captions(scene, world, seed, count)`` says in plain words what the renderer knows: which objects
there are, their colours and textures, sizes, places and relations, what people wear and do, ground
and sky. Same seed, same words.

Everything said is true of the visible pixels: what shows fewer than `VISIBLE` is not mentioned, and
numbers count what is mentioned. No caption says all there is to say. A caption has at most
`MAX_WORDS` words, commas counted.
"""
import colorsys
import math
import re
from dataclasses import dataclass

import numpy as np

from sets.raycast import BARS, BLOTCHES, CHECKER, GRADIENT, GROUND, RINGS, SKY, SOLID, Material
from sets.shapes import CLASSES, PERSON, SHIRT, TROUSERS, Scene, World

MAX_WORDS = 29
# Shares of the picture's pixels.
VISIBLE = 0.005          # an object with fewer is not mentioned
CLOTHES = 0.0015         # the same for a shirt or trousers
LARGE, SMALL = 0.05, 0.01
BACKGROUND = 0.05        # the same for ground and sky
# Places, as shares of the picture's width, and metres.
LEFT, RIGHT, MIDDLE = 0.35, 0.65, 0.06
NEAR, FAR = 3.5, 8.0

PREFIXES = ("a photo of ", "a picture of ")
NUMBERS = ("no", "a", "two", "three", "four", "five", "six")
PLURALS = {"box": "boxes", "person": "people"}                  # the others take an s
TEXTURES = {CHECKER: "checkered", RINGS: "ringed", BARS: "striped", BLOTCHES: "spotted"}
HUES = ((0.04, "red"), (0.11, "orange"), (0.19, "yellow"), (0.45, "green"), (0.54, "cyan"),
        (0.71, "blue"), (0.81, "purple"), (0.94, "pink"), (1.01, "red"))  # upper ends, 0..1
SAME = 0.25              # two colours that differ by less in every channel make no texture


@dataclass(frozen=True)
class Thing:
    """An object or person with enough visible pixels to be spoken of."""

    name: str            # of its class
    look: str            # colour or texture, "" if nothing can be said
    share: float         # of the picture's pixels
    x: float             # mean column, share of the width
    depth: float         # mean over its visible pixels, metres
    details: tuple = ()  # of a person, such as "in a red shirt"


def colour_name(rgb: tuple) -> str:
    """The plain word for a colour (red, green, blue in 0..1)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    if value < 0.2:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.8 else "gray"
    name = next(name for end, name in HUES if hue < end)
    return "brown" if name == "orange" and value < 0.6 else name


def describe_material(material: Material, rng: np.random.Generator) -> str:
    """A colour, a texture, or two colours and a texture; "" if the texture shows no contrast."""
    first, second = (colour_name(colour) for colour in material.colours)
    if material.kind == SOLID:
        return first
    if max(abs(a - b) for a, b in zip(*material.colours)) < SAME or material.kind not in TEXTURES:
        return ""
    texture = TEXTURES[material.kind]
    return f"{first} and {second} {texture}" if first != second and rng.random() < 0.4 else texture


def with_article(words: str) -> str:
    """"a" or "an" in front."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def join(phrases: list[str]) -> str:
    """"a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


# ------------------------------------------------------------------------------------------------
# What there is

def find_things(scene: Scene, world: World, rng: np.random.Generator) -> list[Thing]:
    """The objects and people to speak of, largest first."""
    height, width = world.surface.shape
    owners = np.array([0, 0] + [part.owner + 1 for part in world.parts]).take(world.surface.ravel())
    counts = np.bincount(owners)
    columns = np.bincount(owners, np.tile(np.arange(width), height))
    depths = np.bincount(owners, scene.depth.ravel())
    firsts = {part.owner: part for part in reversed(world.parts)}
    things = []
    for owner in np.flatnonzero(counts[1:] >= VISIBLE * width * height).tolist():
        part, count = firsts[owner], counts[owner + 1]
        person = part.label == PERSON
        look = "" if person else describe_material(world.materials[part.material], rng)
        details = describe_person(scene, world, owner, rng) if person else ()
        things.append(Thing(CLASSES[part.label], look, count / (width * height),
                            columns[owner + 1] / count / (width - 1), depths[owner + 1] / count,
                            details))
    return sorted(things, key=lambda thing: -thing.share)


def describe_person(scene: Scene, world: World, owner: int, rng: np.random.Generator) -> tuple:
    """Phrases about a person's clothes, side and pose that its visible pixels bear out."""
    mine = [i for i, part in enumerate(world.parts) if part.owner == owner]
    base = min(world.parts[i].material for i in mine)           # its first material, SKIN
    seen = np.bincount(world.surface.ravel(), minlength=2 + len(world.parts))[2:]
    clothes = []
    for kind, name in ((SHIRT, "shirt"), (TROUSERS, "trousers")):
        share = sum(seen[i] for i in mine if world.parts[i].material == base + kind)
        look = describe_material(world.materials[base + kind], rng)
        if share >= CLOTHES * world.surface.size and look:
            clothes.append(with_article(f"{look} {name}") if kind == SHIRT else f"{look} {name}")
    before = {part.owner for i, part in enumerate(world.parts) if part.owner < owner and seen[i]}
    visible = scene.keypoints[len(before), :, 2] == 2
    phrases = [f"in {join(clothes)}"] if clothes else []
    return tuple(phrases + describe_pose(world.people[owner], visible))


def describe_pose(joints: list, visible: np.ndarray) -> list[str]:
    """Phrases about the direction and pose of a person: 17 joints in metres, and which are seen."""
    (lx, _, lz), (rx, _, rz) = joints[5], joints[6]             # shoulders
    forward, towards = (lz - rz, rx - lx), (-lx - rx, -lz - rz)  # on the ground; to the camera
    scale = math.hypot(*forward) * math.hypot(*towards)
    front = (forward[0] * towards[0] + forward[1] * towards[1]) / scale
    side = (forward[0] * towards[1] - forward[1] * towards[0]) / scale
    phrases = []
    if abs(front) > 0.75:
        phrases.append("seen from the front" if front > 0 else "seen from behind")
    elif abs(side) > 0.75:
        phrases.append("facing left" if side > 0 else "facing right")
    raised = sum(joints[i][1] > joints[0][1] and bool(visible[i]) for i in (9, 10))  # wrists, nose
    if raised:
        phrases.append("with both arms up" if raised == 2 else "with an arm up")
    legs = [math.dist(joints[a], joints[a + 2]) + math.dist(joints[a + 2], joints[a + 4])
            for a in (11, 12)]                                  # hip to knee to ankle
    drops = [joints[a][1] - joints[a + 4][1] for a in (11, 12)]
    if max(drops) < 0.8 * max(legs) and visible[13:15].any():
        phrases.append("crouching")
    return phrases


def describe_background(scene: Scene, world: World, rng: np.random.Generator) -> list[str]:
    """Phrases about ground and sky."""
    sky, ground = ((world.surface == s).mean() >= BACKGROUND for s in (SKY, GROUND))
    phrases = []
    look = describe_material(world.materials[GROUND], rng)
    if ground and look:
        phrases.append(f"on {look} ground" if rng.random() < 0.6 else f"on a {look} floor")
    if sky:
        material = world.materials[SKY]
        if material.kind == GRADIENT:
            low, high = (colour_name(colour) for colour in material.colours)
            phrases.append(f"under {with_article(low)} and {high} sky" if low != high
                           else f"under {with_article(low)} sky")
        elif look := describe_material(material, rng):
            phrases.append(f"under {with_article(look.replace('spotted', 'cloudy'))} sky")
    return [phrase.replace("on a orange", "on an orange") for phrase in phrases]


# ------------------------------------------------------------------------------------------------
# What is said

def mention(thing: Thing, rng: np.random.Generator, full: float) -> str:
    """A noun phrase for a thing; each attribute is given with probability `full`."""
    size = "large" if thing.share > LARGE else "small" if thing.share < SMALL else ""
    words = [size if rng.random() < full / 2 else "", thing.look if rng.random() < full else "",
             thing.name]
    phrase = with_article(" ".join(filter(None, words)))
    details = [detail for detail in thing.details if rng.random() < full]
    return " ".join([phrase, *details])


def place(thing: Thing, rng: np.random.Generator) -> str:
    """Where a thing is, "" if nowhere in particular."""
    places = []
    if thing.x < LEFT or thing.x > RIGHT:
        places.append("on the left" if thing.x < LEFT else "on the right")
    elif abs(thing.x - 0.5) < MIDDLE:
        places.append("in the middle")
    if thing.depth < NEAR or thing.depth > FAR:
        places.append("nearby" if thing.depth < NEAR else "far away")
    return places[int(rng.integers(len(places)))] if places else ""


def relate(first: Thing, second: Thing, rng: np.random.Generator) -> str:
    """What holds between two things, "and" if nothing clear does."""
    relations = []
    if abs(first.x - second.x) > 0.15:
        relations.append("left of" if first.x < second.x else "right of")
    if max(first.depth, second.depth) > 1.3 * min(first.depth, second.depth):
        relations.append("in front of" if first.depth < second.depth else "behind")
    return relations[int(rng.integers(len(relations)))] if relations else "and"


def inventory(things: list[Thing], rng: np.random.Generator) -> str:
    """All things by class, with their numbers."""
    names = [thing.name for thing in things]
    kinds = list(dict.fromkeys(names))
    rng.shuffle(kinds)
    phrases = []
    for kind in kinds:
        count = names.count(kind)
        phrases.append(f"a {kind}" if count == 1
                       else f"{NUMBERS[count]} {PLURALS.get(kind, kind + 's')}")
    return join(phrases)


def sentence(things: list[Thing], rng: np.random.Generator) -> str:
    """An inventory, one to three things in detail, or the relation of two."""
    form = rng.random()
    if form < 0.25 or len(things) == 1:
        return inventory(things, rng)
    order = rng.permutation(len(things)).tolist()
    if form < 0.5:
        first, second = (things[i] for i in order[:2])
        return " ".join((mention(first, rng, 0.7), relate(first, second, rng),
                         mention(second, rng, 0.7)))
    chosen = [things[i] for i in order[:1 + int(rng.integers(3))]]
    full = 1.0 if len(chosen) == 1 else 0.6
    return join([" ".join(filter(None, (mention(thing, rng, full),
                                        place(thing, rng) if rng.random() < 0.7 else "")))
                 for thing in chosen])


def captions(scene: Scene, world: World, seed: int, count: int = 1) -> list[str]:
    """`count` captions of a scene, all true and most of them different."""
    texts = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        things, text = find_things(scene, world, rng), ""
        while not text or count_words(text) > MAX_WORDS:
            text = sentence(things, rng) if things else "an empty scene"
        background = describe_background(scene, world, rng)
        for phrase in background if rng.random() < 0.6 else background[:int(rng.integers(2))]:
            text = f"{text} {phrase}" if count_words(f"{text} {phrase}") <= MAX_WORDS else text
        if rng.random() < 0.15 and count_words(text) <= MAX_WORDS - 3:
            text = PREFIXES[int(rng.integers(2))] + text
        texts.append(text)
    return texts


def without_sides(text: str) -> str:
    """A caption that is true of the mirror image, too: it says nothing of left and right."""
    return re.sub("(left|right) of", "and", re.sub(" (on the|facing) (left|right)", "", text))


def count_words(text: str) -> int:
    """Words, commas counted."""
    return len(text.replace(",", " ,").split())
