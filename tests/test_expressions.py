"""Sentences about the embedded scenes mean exactly one object, and the mask is that object's.

    pytest tests/test_expressions.py
"""
import re
from pathlib import Path

import numpy as np
import pytest
from trees import cut

from sets.captions import TEXTURES, colour_name
from sets.embedded import ReferScenes, ShapesRefer
from sets.expressions import EXTREMES, LOOKS, VISIBLE, Phrase, Thing, expressions, meaning, words
from sets.raycast import CHECKER, SOLID, Material
from sets.shapes import CLASSES, SHIRT, render_world
from vpd.text import WORD_END, Tokenizer

TINY_SD = Path(__file__).parents[1] / "weights" / "tiny-sd"
COUNT = 3  # sentences per scene
NOUN = (r"the (?:(\w+est|\w+most) )?(?:(%s) )?(%s)(?: in an? (\w+) shirt)?"
        r"(?: (nearest to the camera|farthest from the camera|farthest left|farthest right))?"
        % ("|".join(LOOKS), "|".join(CLASSES[2:])))
SENTENCE = re.compile(f"{NOUN}(?: (on the left|on the right|in the middle))?(?: (left of|right of|"
                      f"in front of|behind|smaller than|larger than) {NOUN})?")
BEST = {"smallest": ("share", min), "largest": ("share", max), "biggest": ("share", max),
        "nearest": ("depth", min), "farthest": ("depth", max), "leftmost": ("x", min),
        "rightmost": ("x", max), "nearest to the camera": ("depth", min),
        "farthest from the camera": ("depth", max), "farthest left": ("x", min),
        "farthest right": ("x", max)}
HOLDS = {"left of": lambda a, b: a["x"] < b["x"], "right of": lambda a, b: a["x"] > b["x"],
         "in front of": lambda a, b: a["depth"] < b["depth"],
         "behind": lambda a, b: a["depth"] > b["depth"],
         "smaller than": lambda a, b: a["share"] < b["share"],
         "larger than": lambda a, b: a["share"] > b["share"]}


@pytest.fixture(scope="module")
def rows():
    """300 scenes of 64 x 64 pixels, their worlds and three sentences of each."""
    made = [(seed, *render_world(seed, 64, 64)) for seed in range(3000, 3300)]
    return [(scene, world, expressions(scene, world, seed, COUNT)) for seed, scene, world in made]


def objects(scene, world):
    """What the pixels say of each object: class, look, mask, share, mean column, mean depth."""
    owners = np.array([-1, -1] + [p.owner for p in world.parts])[world.surface]
    found = []
    for owner in sorted({p.owner for p in world.parts}):
        mask, mine = owners == owner, [p for p in world.parts if p.owner == owner]
        if mask.any():
            person = CLASSES[mine[0].label] == "person"
            material = world.materials[min(p.material for p in mine) + (SHIRT if person else 0)]
            look = colour_name(material.colours[0]) if material.kind == SOLID \
                else TEXTURES.get(material.kind)
            found.append({"name": CLASSES[mine[0].label], "look": look, "mask": mask,
                          "share": mask.mean(), "x": np.nonzero(mask)[1].mean() / 63,
                          "depth": scene.depth[mask].mean()})
    return found


def noun_means(things, extreme, look, name, shirt, end):
    """The objects that a noun phrase fits, taken at its word, without any margin."""
    found = [t for t in things if t["name"] == name and (look or shirt) in (None, t["look"])]
    if (extreme or end) and found:
        measure, best = BEST[extreme or end]
        found = [best(found, key=lambda t: t[measure])]
    return found


def means(sentence, things):
    """The objects that a sentence fits, read from its words alone."""
    *noun, place, relation, a, b, c, d, e = SENTENCE.fullmatch(sentence).groups()
    found = noun_means(things, *noun)
    if place:
        low, high = {"on the left": (0, 0.45), "in the middle": (0.3, 0.7),
                     "on the right": (0.55, 1)}[place]
        found = [t for t in found if low <= t["x"] <= high]
    if relation:
        other, = noun_means(things, a, b, c, d, e)
        found = [t for t in found if t is not other and HOLDS[relation](t, other)]
    return found


def test_a_sentence_means_one_object(rows):
    """Read at its word, each of 900 sentences fits one object only, whose pixels the mask has."""
    read = 0
    for scene, world, pairs in rows:
        things = objects(scene, world)
        for sentence, mask in pairs:
            found = means(sentence, things)
            assert len(found) == 1 and np.array_equal(found[0]["mask"], mask), sentence
            assert mask.mean() >= VISIBLE and mask.dtype == bool
            read += 1
    assert read > 0.97 * COUNT * len(rows)


def test_sentences_are_seeded_and_varied(rows):
    """Same seed, same words; every kind of sentence occurs; none twice about a scene."""
    scene, world, pairs = rows[0]
    again = expressions(scene, world, 3000, COUNT)
    assert [s for s, _ in again] == [s for s, _ in pairs]
    assert [s for s, _ in expressions(scene, world, 1, COUNT)] != [s for s, _ in pairs]
    texts = [sentence for _, _, pairs in rows for sentence, _ in pairs]
    assert all(len({s for s, _ in pairs}) == len(pairs) for _, _, pairs in rows)
    assert len(set(texts)) > 250
    for words_ in (*BEST, *HOLDS, "on the left", "on the right", "in the middle", "shirt",
                   *TEXTURES.values(), *CLASSES[2:]):
        assert sum(words_ in text for text in texts) >= 3, words_


def test_superlatives_have_something_to_compare(rows):
    """"the smallest box" is only said where there are two boxes."""
    for scene, world, pairs in rows:
        names = [t["name"] for t in objects(scene, world)]
        for sentence, _ in pairs:
            extreme, _, name, _, end = SENTENCE.fullmatch(sentence).groups()[:5]
            assert not (extreme or end) or names.count(name) > 1, sentence


def test_the_tokenizer_reads_them(rows):
    """weights/tiny-sd's tokenizer loses nothing of any sentence; at most 32 tokens."""
    tokenizer = Tokenizer.from_pretrained(str(TINY_SD))
    tokens = {i: token for token, i in tokenizer.vocabulary.items()}
    for _, _, pairs in rows:
        for sentence, _ in pairs:
            ids = tokenizer.encode(sentence)
            text = "".join(tokens[i] for i in ids).replace(WORD_END, " ").strip()
            assert text == sentence and len(ids) + 2 <= 32


def thing(owner, name="ball", share=0.1, x=0.5, depth=5.0, kind=SOLID, colours=None):
    """An object as the phrases see it, red unless said otherwise."""
    return Thing(name, owner, share, x, depth, Material(kind, colours or ((0.9, 0.1, 0.1),) * 2))


RED = Phrase("ball", look="red")
SMALLEST = Phrase("ball", extreme="smallest")
LEFT = Phrase("ball", relation="left of", other=Phrase("box"))
BOX = thing(9, "box", x=0.5)


@pytest.mark.parametrize("phrase, things, owner", [
    (Phrase("ball"), [thing(0), BOX], 0),
    (Phrase("ball"), [thing(0), thing(1)], None),                        # which one?
    (Phrase("ball"), [thing(0), thing(1, share=0.001)], None),           # a sliver may be a ball
    (Phrase("cone"), [thing(0)], None),
    (SMALLEST, [thing(0), thing(1, share=0.05)], 1),
    (SMALLEST, [thing(0), thing(1, share=0.09)], None),                  # of nearly one size
    (RED, [thing(0), thing(1, colours=((0.1, 0.1, 0.9),) * 2)], 0),
    (RED, [thing(0, colours=((0.9, 0.28, 0.1),) * 2)], None),            # nearly orange
    (RED, [thing(0), thing(1, kind=CHECKER, colours=((0.9, 0.1, 0.1), (1, 1, 1)))], None),
    (Phrase("ball", look="checkered"), [thing(0, kind=CHECKER)], None),  # without contrast
    (Phrase("ball", place="on the left"), [thing(0, x=0.2), thing(1, x=0.8)], 0),
    (Phrase("ball", place="on the left"), [thing(0, x=0.2), thing(1, x=0.42)], None),
    (LEFT, [thing(0, x=0.2), thing(1, x=0.8), BOX], 0),
    (LEFT, [thing(0, x=0.2), thing(1, x=0.45), BOX], None),              # hardly beside it
    (LEFT, [thing(0, x=0.2), BOX, thing(8, "box")], None),               # of which box?
    (Phrase("ball", extreme="nearest"), [thing(0, depth=4), thing(1, depth=6)], 0)])
def test_what_is_unclear_means_nothing(phrase, things, owner):
    """Two candidates, a sliver, nearly equal sizes, hues between two names, places between two: no
    object is meant.
    """
    found = meaning(phrase, things)
    assert (found.owner if found else None) == owner


def test_words():
    """Superlatives in front, shirts behind, the other object last."""
    rng = np.random.default_rng(0)
    other = Phrase("person", look="orange", extreme="nearest")
    text = words(Phrase("box", look="striped", relation="behind", other=other), rng)
    assert text == "the striped box behind the nearest person in an orange shirt"
    said = {words(Phrase("cone", extreme=name), rng) for name in EXTREMES for _ in range(20)}
    assert len(said) == sum(len(patterns) for _, _, patterns in EXTREMES.values())


def test_samples():
    """The embedded set: new scenes in every epoch, the same to validate on; the mask as target."""
    dataset = ReferScenes(val_scenes=5).open(cut())
    assert isinstance(dataset, ShapesRefer) and "20000 scenes" in dataset.check()
    first, again, later = dataset[0, 3], dataset[0, 3], dataset[1, 3]
    assert first["sentence"] == again["sentence"] and (first["image"] == again["image"]).all()
    assert (first["image"] != later["image"]).any()
    assert set(first["target"].unique().tolist()) == {0, 1} and first["target"].shape == (64, 64)
    validation = ReferScenes(val_scenes=5).open(cut("val"))
    assert len(validation) == 5 and validation[0, 2]["name"] == validation[9, 2]["name"]
