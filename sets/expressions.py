"""Sentences that mean one object of an embedded scene, and that object's pixels.

``expressions(scene, world, seed, count)`` gives pairs such as ("the striped box left of the ball",
mask). A sentence is the words of a `Phrase`; `meaning` evaluates a phrase over a scene's objects
and is the check of every sentence: it must find exactly one. Same seed, same words.

What a phrase says of an object is true, false or unclear: a hue between red and orange, two objects
of nearly one size, a sliver whose shape nobody could name. One unclear object and the phrase means
nothing, so that no sentence needs a lenient reader. Sizes are those in the picture, left and right
the spectator's; an object that a sentence means covers `VISIBLE` of the picture or more.
"""
import colorsys
import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sets.captions import SAME, TEXTURES, colour_name, with_article
from sets.raycast import SOLID, Material
from sets.shapes import CLASSES, PERSON, SHIRT, Scene, World

# Shares of the picture's pixels.
VISIBLE = 0.01           # of an object that is meant
SLIVER = 0.003           # whatever shows fewer is unclear in all but its class
CLOTHES = 0.002          # the same for a shirt
# Margins: how far apart two objects are at least, for one of them to be more than the other.
LARGER, DEEPER = 1.4, 1.2                                # ratios
ASIDE, SIDE, MIDDLE = 0.12, 0.07, 0.08                   # shares of the width
TINTS = tuple(itertools.product((-0.02, 0, 0.02), (-0.08, 0, 0.08), (-0.1, 0, 0.1)))  # of hsv

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black",
           "white", "gray")
LOOKS = (*COLOURS, *TEXTURES.values())
PLACES = ("on the left", "on the right", "in the middle")
EXTREMES = {  # what is compared, the sign with which more is meant, how it is said
    "smallest": ("share", -1, ("the smallest {}",)),
    "largest": ("share", 1, ("the largest {}", "the biggest {}")),
    "nearest": ("depth", -1, ("the nearest {}", "the {} nearest to the camera")),
    "farthest": ("depth", 1, ("the farthest {}", "the {} farthest from the camera")),
    "leftmost": ("x", -1, ("the leftmost {}", "the {} farthest left")),
    "rightmost": ("x", 1, ("the rightmost {}", "the {} farthest right"))}
RELATIONS = {  # the same, for two objects
    "left of": ("x", -1), "right of": ("x", 1), "in front of": ("depth", -1),
    "behind": ("depth", 1), "smaller than": ("share", -1), "larger than": ("share", 1)}
TRIES = 400              # phrases drawn per sentence that is wanted


@dataclass(frozen=True)
class Thing:
    """An object or person of which any pixel shows."""

    name: str                        # of its class
    owner: int                       # its number in the world
    share: float                     # of the picture's pixels
    x: float                         # mean column, share of the width
    depth: float                     # mean over its visible pixels, metres
    material: Material | None        # of a person its shirt's; None: too little of it shows


class Phrase(NamedTuple):
    """What a sentence says: a class, and whatever else is not empty."""

    name: str
    look: str = ""                   # one of LOOKS; a person's shirt has it
    extreme: str = ""                # one of EXTREMES: among all objects of that name and look
    place: str = ""                  # one of PLACES
    relation: str = ""               # one of RELATIONS, to the object that `other` means
    other: "Phrase | None" = None


# ------------------------------------------------------------------------------------------------
# What there is

def owner_map(world: World) -> np.ndarray:
    """(H, W) number of the object that a pixel shows; -1: sky or ground."""
    return np.array([-1, -1] + [part.owner for part in world.parts]).take(world.surface)


def find_things(scene: Scene, world: World) -> list[Thing]:
    """Every object of which a pixel shows, in the order of their numbers."""
    owners, things = owner_map(world).ravel() + 1, []
    width, counts = world.surface.shape[1], np.bincount(owners)
    columns = np.bincount(owners, np.tile(np.arange(width), world.surface.shape[0]))
    depths = np.bincount(owners, scene.depth.ravel())
    for owner in np.flatnonzero(counts[1:]).tolist():
        part, count = next(p for p in world.parts if p.owner == owner), counts[owner + 1]
        material = world.materials[part.material]
        things.append(Thing(CLASSES[part.label], owner, count / owners.size,
                            columns[owner + 1] / count / (width - 1), depths[owner + 1] / count,
                            shirt_of(world, owner) if part.label == PERSON else material))
    return things


def shirt_of(world: World, owner: int) -> Material | None:
    """The material of a person's shirt, None if less than CLOTHES of the picture shows it."""
    mine = [i for i, part in enumerate(world.parts) if part.owner == owner]
    shirt = min(world.parts[i].material for i in mine) + SHIRT
    parts = [i + 2 for i in mine if world.parts[i].material == shirt]
    seen = np.isin(world.surface, parts).mean()
    return world.materials[shirt] if seen >= CLOTHES else None


@functools.lru_cache(maxsize=256)
def possible_colours(rgb: tuple) -> set[str]:
    """The names that a colour (red, green, blue in 0..1) could be given."""
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    return {colour_name(colorsys.hsv_to_rgb((h + a) % 1, min(max(s + b, 0), 1),
                                            min(max(v + c, 0), 1))) for a, b, c in TINTS}


# ------------------------------------------------------------------------------------------------
# What is true of it: True, False, or None for unclear

def has_look(thing: Thing, look: str) -> bool | None:
    """Whether an object has a colour or a texture."""
    if thing.material is None:
        return None
    kind, colours = thing.material.kind, thing.material.colours
    contrast = max(abs(a - b) for a, b in zip(*colours))
    if look in COLOURS:
        names = [possible_colours(colour) for colour in colours[:1 if kind == SOLID else 2]]
        if kind == SOLID and names[0] == {look}:
            return True
        return None if any(look in found for found in names) else False
    if kind == SOLID or TEXTURES.get(kind) != look:
        return False
    return True if contrast >= SAME else None


def is_at(thing: Thing, place: str) -> bool | None:
    """Whether an object is in a place; between two places it is unclear."""
    if place == "in the middle":
        away = abs(thing.x - 0.5)
        return True if away < MIDDLE else False if away > MIDDLE + ASIDE else None
    across = thing.x if place == "on the left" else 1 - thing.x
    return True if across < 0.5 - ASIDE else False if across > 0.5 - ASIDE + SIDE else None


def compare(a: Thing, b: Thing, measure: str) -> int:
    """1 if `a` clearly has more of a measure than `b`, -1 if less, 0 if it is unclear."""
    first, second = getattr(a, measure), getattr(b, measure)
    if measure == "x":
        return 0 if abs(first - second) < ASIDE else 1 if first > second else -1
    ratio = LARGER if measure == "share" else DEEPER
    return 0 if max(first, second) < ratio * min(first, second) else 1 if first > second else -1


def is_related(thing: Thing, relation: str, other: Thing) -> bool | None:
    """Whether a relation to another object holds; no object has one to itself."""
    measure, sign = RELATIONS[relation]
    sides = compare(thing, other, measure)
    return False if thing is other else None if sides == 0 else sides == sign


def meaning(phrase: Phrase, things: list[Thing]) -> Thing | None:
    """The one object that a phrase means; None if it means none, several, or is unclear."""
    other = meaning(phrase.other, things) if phrase.other else None
    if phrase.other and other is None:
        return None
    found = []
    for thing in things:
        if thing.name != phrase.name:
            continue
        facts = [has_look(thing, phrase.look)] if phrase.look else []
        facts += [is_at(thing, phrase.place)] if phrase.place else []
        facts += [is_related(thing, phrase.relation, other)] if other else []
        if False in facts and thing.share >= SLIVER:
            continue
        if None in facts or thing.share < SLIVER:
            return None
        found.append(thing)
    if phrase.extreme and len(found) > 1:
        measure, sign, _ = EXTREMES[phrase.extreme]
        found = [a for a in found
                 if all(compare(a, b, measure) == sign for b in found if b is not a)]
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------
# What is said

def words(phrase: Phrase, rng: np.random.Generator, nested: bool = False) -> str:
    """A phrase in words; `nested` in another one it ends in nothing that could belong to that one.
    """
    noun, dressed = phrase.name, ""
    if phrase.look and phrase.name == CLASSES[PERSON]:
        dressed = f"in {with_article(phrase.look)} shirt"
    elif phrase.look:
        noun = f"{phrase.look} {noun}"
    pattern = "the {}"
    if phrase.extreme:
        patterns = EXTREMES[phrase.extreme][2]
        pattern = patterns[0 if nested else int(rng.integers(len(patterns)))]
    noun = " ".join(filter(None, (noun, dressed)))
    related = f"{phrase.relation} {words(phrase.other, rng, nested=True)}" if phrase.other else ""
    return " ".join(filter(None, (pattern.format(noun), phrase.place, related)))


def pick(rng: np.random.Generator, values) -> str:
    """One of several words."""
    return list(values)[int(rng.integers(len(values)))]


def draw_phrase(things: list[Thing], rng: np.random.Generator, nested: bool = False) -> Phrase:
    """A phrase about one of the objects' classes; many mean nothing."""
    thing = things[int(rng.integers(len(things)))]
    looks = [look for look in LOOKS if has_look(thing, look)] if rng.random() < 0.5 else []
    phrase, form = Phrase(thing.name, looks[0] if looks else ""), rng.random()
    others = [other for other in things if other is not thing]
    if form < 0.3:
        return phrase._replace(extreme=pick(rng, EXTREMES))
    if form < 0.55 and not nested:
        return phrase._replace(place=pick(rng, PLACES))
    if form < 0.85 and not nested and others:
        return phrase._replace(relation=pick(rng, RELATIONS),
                               other=draw_phrase(others, rng, nested=True))
    return phrase


def needs(phrase: Phrase, things: list[Thing]) -> bool:
    """Whether a superlative has anything to compare: "the smallest box" needs two boxes."""
    if phrase.other and not needs(phrase.other, things):
        return False
    same = [t for t in things if t.name == phrase.name
            and (not phrase.look or has_look(t, phrase.look))]
    return not phrase.extreme or len(same) > 1


def expressions(scene: Scene, world: World, seed: int,
                count: int = 1) -> list[tuple[str, np.ndarray]]:
    """Up to `count` pairs of a sentence and the pixels (H, W) bool of the object that it means.

    No two sentences are equal.  A scene about which nothing unambiguous can be said has none.
    """
    rng, things, owners = np.random.default_rng(seed), find_things(scene, world), owner_map(world)
    found = {}
    for _ in range(TRIES * count if things else 0):
        phrase = draw_phrase(things, rng)
        thing = meaning(phrase, things)
        if thing is not None and thing.share >= VISIBLE and needs(phrase, things):
            found.setdefault(words(phrase, rng), owners == thing.owner)
        if len(found) == count:
            break
    return list(found.items())
