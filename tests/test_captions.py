"""Captions of the embedded scenes are true, varied, seeded, and short enough for the tokenizer.

    pytest tests/test_captions.py
"""
import colorsys
import re

import numpy as np
import pytest
from transformers import CLIPTokenizer

from sets.captions import (MAX_WORDS, VISIBLE, captions, colour_name, count_words,
                           without_sides)
from sets.shapes import CLASSES, render, render_world
from pretraining.bpe import save_tokenizer
from vpd.text import Tokenizer

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PLURALS = {"boxes": "box", "balls": "ball", "cylinders": "cylinder", "cones": "cone",
           "people": "person"}
HUES = {"red": (-0.06, 0.04), "orange": (0.04, 0.11), "yellow": (0.11, 0.19), "green": (0.19, 0.45),
        "cyan": (0.45, 0.54), "blue": (0.54, 0.71), "purple": (0.71, 0.81), "pink": (0.81, 0.94)}


@pytest.fixture(scope="module")
def rows():
    """200 scenes, their worlds and four captions of each."""
    made = [(seed, *render_world(seed)) for seed in range(1000, 1200)]
    return [(scene, world, captions(scene, world, seed, 4)) for seed, scene, world in made]


def masks(scene, world, name):
    """(H, W) masks of the objects of a class that have enough visible pixels."""
    owners = np.array([-1, -1] + [part.owner for part in world.parts])[world.surface]
    found = [owners == i for i in {p.owner for p in world.parts if CLASSES[p.label] == name}]
    assert all((scene.label[mask] == CLASSES.index(name)).all() for mask in found)
    return [mask for mask in found if mask.sum() >= VISIBLE * mask.size]


def test_scenes_stay_as_they_were():
    """render_world draws what render draws."""
    ours, scene = render_world(7)[0], render(7)
    assert np.array_equal(ours.image, scene.image) and np.array_equal(ours.label, scene.label)


def test_only_what_shows_is_counted(rows):
    """A caption speaks of no more objects of a class than there are with visible pixels, and a
    number is exact.
    """
    numbers = 0
    for scene, world, texts in rows:
        for text in texts:
            spoken = dict.fromkeys(CLASSES[2:], 0)
            for number, word in re.findall(f"({'|'.join(NUMBERS)}) ({'|'.join(PLURALS)})", text):
                assert NUMBERS[number] == len(masks(scene, world, PLURALS[word])), text
                numbers += 1
            for word in text.replace(",", "").split():
                if word in spoken:
                    spoken[word] += 1
            for name, count in spoken.items():
                assert count <= len(masks(scene, world, name)), text
    assert numbers > 50


def test_places_are_where_the_pixels_are(rows):
    """"on the left" and "on the right" of a solid: there is one with its pixels on that side."""
    checked = 0
    for scene, world, texts in rows:
        for text in texts:
            for name, side in re.findall(r"(box|ball|cylinder|cone) on the (left|right)", text):
                columns = [np.nonzero(mask)[1].mean() / (mask.shape[1] - 1)
                           for mask in masks(scene, world, name)]
                assert any((x < 0.4) if side == "left" else (x > 0.6) for x in columns), text
                checked += 1
    assert checked > 40


def test_without_sides_a_caption_is_true_of_the_mirror_image(rows):
    """It speaks of no side; the things it names, and whatever else it says, are still there."""
    gone, changed = {"left", "right", "on", "the", "facing", "of", "and"}, 0
    for _, _, texts in rows:
        for text in texts:
            words, short = (re.findall(r"\w+", t) for t in (text, without_sides(text)))
            assert not {"left", "right"} & {*short}, text
            assert [w for w in short if w not in gone] == [w for w in words if w not in gone], text
            changed += short != words
    assert changed > 200
    assert without_sides("a red box left of a person facing right with an arm up") \
        == "a red box and a person with an arm up"
    assert without_sides("a ball on the left, a cone in the middle and a box nearby") \
        == "a ball, a cone in the middle and a box nearby"


def test_colours_are_those_of_the_pixels(rows):
    """A plain colour of a solid is the hue of its visible pixels, 0.04 off at most."""
    checked = 0
    for scene, world, texts in rows:
        for text in texts:
            for colour, name in re.findall(r"(?:an?|large|small) (\w+) (box|ball|cylinder|cone)",
                                           text):
                if colour in HUES:
                    hues = [colorsys.rgb_to_hsv(*np.median(scene.image[mask], axis=0) / 255)[0]
                            for mask in masks(scene, world, name)]
                    low, high = HUES[colour]
                    assert any(low - 0.04 < hue - turn < high + 0.04
                               for hue in hues for turn in (0, 1)), (text, hues)
                    checked += 1
    assert checked > 40


def test_people_are_seen_from_the_side_that_is_told(rows):
    """From the front the left shoulder is on the right, from behind on the left; raised wrists are
    higher than the nose.
    """
    checked = 0
    for scene, _, texts in rows:
        people = [p for p in scene.keypoints if (p[[5, 6], 2] > 0).all()]
        for text in texts:
            if len(people) != len(scene.keypoints):
                continue
            if "from the front" in text or "from behind" in text:
                sides = {p[5, 0] > p[6, 0] for p in people}
                assert ("from the front" in text) in sides, text
                checked += 1
            if "arms up" in text:
                assert any((p[[9, 10], 1] < p[0, 1] + 4).all() for p in scene.keypoints), text
    assert checked > 30


def test_background_is_visible(rows):
    """A sky or ground that is spoken of covers at least 5 % of the picture."""
    for scene, _, texts in rows:
        for text in texts:
            for word, label in (("sky", 0), ("ground", 1), ("floor", 1)):
                assert word not in text or (scene.label == label).mean() >= 0.05, text


def test_captions_are_seeded_varied_and_short(rows):
    """Same seed, same words; most differ; none is longer than the tokenizer's 32 tokens."""
    scene, world = render_world(1000)
    assert captions(scene, world, 1000, 4) == rows[0][2]
    assert captions(scene, world, 1, 4) != rows[0][2]
    texts = [text for _, _, four in rows for text in four]
    assert len(set(texts)) > 0.9 * len(texts)
    assert max(count_words(text) for text in texts) <= MAX_WORDS


def test_transformers_reads_the_tokenizer(rows, tmp_path):
    """A tokenizer learnt from captions gives CLIPTokenizer's ids on all of them, at most 32, a word
    each, and can write any other text.
    """
    texts = [text for _, _, four in rows for text in four]
    size = save_tokenizer(tmp_path / "tokenizer", texts, 1000, 32)
    ours = Tokenizer.from_pretrained(str(tmp_path))
    oracle = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert oracle.model_max_length == 32 and len(ours.vocabulary) == size < 1000
    for text in (*texts, "Straße 12: 漢字?"):
        assert oracle(text).input_ids == [ours.start, *ours.encode(text), ours.end], text
    assert max(len(ours.encode(text)) for text in texts) <= 30


@pytest.mark.parametrize("rgb, name", [((0.9, 0.1, 0.1), "red"), ((0.9, 0.5, 0.1), "orange"),
                                       ((0.5, 0.3, 0.1), "brown"), ((0.1, 0.1, 0.9), "blue"),
                                       ((0.1, 0.12, 0.1), "black"), ((0.5, 0.5, 0.5), "gray"),
                                       ((0.95, 0.9, 0.95), "white"), ((0.9, 0.1, 0.6), "pink")])
def test_colour_names(rgb, name):
    """Plain words for plain colours."""
    assert colour_name(rgb) == name
