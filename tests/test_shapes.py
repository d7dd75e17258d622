"""Proves that the made scenes are the same everywhere, agree with themselves, and are not easy.

Run from the project folder: ``python -m pytest tests/test_shapes.py``
"""

import zlib

import numpy as np
import pytest

from sets import shapes
from sets.raycast import FAR

SIDE = 128
GOLDEN = 4053932937


@pytest.fixture(scope="module")
def scenes():
    return [shapes.render(seed, SIDE, SIDE) for seed in range(150)]


def checksum(scene):
    """CRC-32 of everything in a scene, with depth to the millimetre, joints to 0.01 pixel."""
    arrays = (scene.image, scene.label, np.round(scene.depth * 1000).astype("<u4"),
              np.round(scene.keypoints * 100).astype("<i4"), scene.boxes.astype("<i4"))
    return zlib.crc32(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))


def test_same_seed_same_bytes():
    """The same seed gives the same bytes in every field."""
    first, second = shapes.render(5), shapes.render(5)
    for name in shapes.Scene.__dataclass_fields__:
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name


def test_different_seeds_differ(scenes):
    """Different seeds give different pictures."""
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)


def test_golden_checksum():
    """Scene 0 is the one that every other machine makes."""
    assert checksum(shapes.render(0)) == GOLDEN


def test_a_lens_changes_nothing_but_the_view():
    """A given field of view takes the random one's place: no later draw of the scene moves."""
    random, wide, narrow = (shapes.frame_person(np.random.default_rng(3), 64, 64, lens)
                            for lens in (None, 70.0, 45.0))
    assert random[1] == wide[1] == narrow[1]                   # stature
    assert wide[0].focal < random[0].focal < narrow[0].focal
    assert wide[0].focal == pytest.approx(32 / np.tan(np.radians(35)))
    assert shapes.render(0, lens=50.0).image.tobytes() != shapes.render(0).image.tobytes()


def test_shapes_and_types():
    """Fields have the documented shapes and types, also for a picture that is not square."""
    scene = shapes.render(1, 64, 96)
    people = len(scene.areas)
    expected = {"image": ((64, 96, 3), np.uint8), "label": ((64, 96), np.uint8),
                "depth": ((64, 96), np.float32), "keypoints": ((people, 17, 3), np.float32),
                "boxes": ((people, 4), np.float32), "areas": ((people,), np.float32)}
    for name, (shape, dtype) in expected.items():
        array = getattr(scene, name)
        assert (array.shape, array.dtype) == (shape, dtype), name


def test_every_class_appears(scenes):
    """Labels are class indices, and 50 scenes contain all of them."""
    seen = np.unique(np.stack([scene.label for scene in scenes[:50]]))
    assert seen.tolist() == list(range(len(shapes.CLASSES)))


def test_one_or_two_people(scenes):
    """Every scene has one or two people, and some have two."""
    assert {len(scene.areas) for scene in scenes} == {1, 2}


def test_depth_is_zero_exactly_in_the_sky(scenes):
    """Depth is 0 in the sky, and finite, positive and at most FAR elsewhere."""
    for scene in scenes:
        assert ((scene.depth == 0) == (scene.label == shapes.SKY)).all()
        assert (scene.depth >= 0).all() and (scene.depth <= FAR).all()


def test_keypoints_inside_and_on_the_person(scenes):
    """Labelled joints are in the image; 95 % of the visible ones are within 2 px of a person."""
    near = []
    for scene in scenes:
        person = np.pad(scene.label == shapes.PERSON, 2)
        for x, y, v in scene.keypoints.reshape(-1, 3):
            assert 0 <= x <= SIDE - 1 and 0 <= y <= SIDE - 1 and v in (0, 1, 2)
            assert v > 0 or x == y == 0
            if v == 2:
                row, col = round(float(y)), round(float(x))
                near.append(person[row:row + 5, col:col + 5].any())
    assert np.mean(near) >= 0.95


def test_most_joints_are_in_the_image_and_many_visible(scenes):
    """At least 85 % of all joints are in the image, and 45 to 90 % are visible."""
    v = np.concatenate([scene.keypoints[..., 2].ravel() for scene in scenes])
    assert (v > 0).mean() > 0.85 and 0.45 < (v == 2).mean() < 0.9


def test_boxes_are_tight(scenes):
    """With one person in the picture, box and area are those of the person's pixels."""
    for scene in (scene for scene in scenes if len(scene.areas) == 1):
        rows, cols = np.nonzero(scene.label == shapes.PERSON)
        box = cols.min(), rows.min(), np.ptp(cols) + 1, np.ptp(rows) + 1
        assert scene.boxes[0].tolist() == list(box) and scene.areas[0] == len(rows)


def test_areas_of_two_people_add_up(scenes):
    """Areas count every person pixel exactly once."""
    for scene in scenes:
        assert scene.areas.sum() == (scene.label == shapes.PERSON).sum()


def test_left_is_right_when_facing_the_camera(scenes):
    """Who shows nose and both eyes has the left shoulder, hip and eye further right in the image.

    Hips and shoulders may be turned away from a head that looks at the camera by 0.6 radians.
    """
    facing = []
    for person in np.concatenate([scene.keypoints for scene in scenes]):
        if (person[:7, 2] > 0).all() and (person[:3, 2] == 2).all():
            assert person[1, 0] > person[2, 0]
            facing.append(person[5, 0] > person[6, 0])
    assert len(facing) > 20 and np.mean(facing) > 0.85


def test_colour_does_not_reveal_the_class(scenes):
    """The best guess from a pixel's colour alone is poor, and blind to the small classes."""
    def bins(part):
        rgb = np.stack([scene.image for scene in part]).reshape(-1, 3) // 16
        return rgb @ np.array([256, 16, 1]), np.stack([s.label for s in part]).ravel()

    count = len(shapes.CLASSES)
    colour, label = bins(scenes[:100])
    table = np.bincount(colour * count + label, minlength=4096 * count).reshape(4096, count)
    table[:, shapes.GROUND] += table.sum(1) == 0     # colours never seen: the commonest class
    colour, label = bins(scenes[100:])
    guess = table.argmax(1)[colour]
    recall = [(guess[label == k] == k).mean() for k in range(count)]
    print(f"pixel accuracy {(guess == label).mean():.3f}, mean recall {np.mean(recall):.3f}")
    assert (guess == label).mean() < 0.75 and np.mean(recall) < 0.35


@pytest.mark.parametrize("args", [(-1,), (0, 31), (0, 128, 31)])
def test_bad_arguments(args):
    """A negative seed or a picture below 32 pixels is an error that says so."""
    with pytest.raises(ValueError, match="must be"):
        shapes.render(*args)
