"""COCO keypoint evaluation is pycocotools', and OKS-NMS is mmpose's.

Proven here: the figures of tests/golden/oks.json, which another implementation computed; equality
with pycocotools, through the same json files, on those cases and on 200 random ones; each rule of
the evaluation by a case small enough to do by hand.

    python -m pytest tests/test_oks.py
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from trees import coco_file as coco
from trees import pycocotools_evaluation, random_case, write_case

from ops import oks

GOLDEN = json.loads((Path(__file__).parent / "golden" / "oks.json").read_text())
CASES = GOLDEN["cases"]
SEEDS = range(200)


# ------------------------------------------------------------------------------------------------
# Cases

def person(image: int, points, *, v: int = 2, **fields) -> dict:
    """An annotation: one (x, y) for all 17 keypoints or 17 of them, area 2500, box 100 x 100."""
    points = np.broadcast_to(points, (17, 2))
    keypoints = [int(n) for x, y in points for n in (x, y, v)]
    return {"id": 1, "image_id": image, "category_id": 1, "iscrowd": 0, "area": 2500,
            "bbox": [0, 0, 100, 100], "keypoints": keypoints, "num_keypoints": 17 if v else 0,
            **fields}


def result(image: int, points, score: float = 0.5, **fields) -> dict:
    """A result: one (x, y) for all 17 keypoints or 17 of them."""
    keypoints = [float(n) for x, y in np.broadcast_to(points, (17, 2)) for n in (x, y, 1)]
    return {"image_id": image, "category_id": 1, "keypoints": keypoints, "score": score, **fields}


def small_case(seed: int) -> tuple[dict, list[dict]]:
    """A random case of 1..5 images, 0..9 people and 1..50 results."""
    rng = np.random.default_rng(seed)
    return random_case(rng, int(rng.integers(1, 6)), int(rng.integers(0, 10)),
                       int(rng.integers(1, 51)))


def oks_by_image(annotations: dict, results: list[dict]) -> dict[int, np.ndarray]:
    """OKS of each image that has people: detections by score, people in file order."""
    truth = oks.truth_rows(annotations)
    found = oks.detection_rows(results)
    return {image: oks.oks_matrix(found["keypoints"][found["image"] == image],
                                  truth[truth["image"] == image])
            for image in np.unique(truth["image"]).tolist()}


def assert_same(found, expected) -> None:
    """Same shape, and equal to 1e-12."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def assert_pycocotools(folder: Path, annotations: dict, results: list[dict]) -> dict:
    """OKS, precision, recall, statistics are pycocotools', through files; returns the last."""
    paths = write_case(folder, annotations, results)
    oracle = pycocotools_evaluation(*paths)
    annotations, results = (json.loads(Path(path).read_text()) for path in paths)
    for image, matrix in oks_by_image(annotations, results).items():
        assert_same(matrix, np.reshape(oracle.ious[image, 1], matrix.shape))
    precision, recall = oks.precision_recall(annotations, results)
    assert_same(precision, oracle.eval["precision"][:, :, 0, :, 0])
    assert_same(recall, oracle.eval["recall"][:, 0, :, 0])
    stats = oks.evaluate(annotations, results)
    assert tuple(stats) == oks.STATS
    assert_same(list(stats.values()), oracle.stats)
    return stats


# ------------------------------------------------------------------------------------------------
# Against golden values and pycocotools

@pytest.mark.parametrize("name", CASES)
def test_golden_statistics(name):
    """The ten statistics and the recalls are the golden ones."""
    case = CASES[name]
    stats = oks.evaluate(case["annotations"], case["results"])
    assert_same(list(stats.values()), case["stats"])
    assert_same(oks.precision_recall(case["annotations"], case["results"])[1], case["recall"])


def test_golden_precision():
    """Precision by threshold, recall and area is the golden one."""
    case, golden = CASES["seed0"], GOLDEN["seed0"]["precision_by_threshold_area_recall"]
    precision, _ = oks.precision_recall(case["annotations"], case["results"])
    expected = np.repeat(golden["values"], golden["lengths"]).reshape(10, 3, 101)
    assert_same(precision, expected.transpose(0, 2, 1))


@pytest.mark.parametrize("image", GOLDEN["seed0"]["oks"])
def test_golden_oks(image):
    """The OKS of an image's detections, by score, with its people, in file order, are golden."""
    matrix = oks_by_image(CASES["seed0"]["annotations"], CASES["seed0"]["results"])[int(image)]
    # An image without detections: (0, people), which JSON holds as [].
    assert_same(matrix, GOLDEN["seed0"]["oks"][image] or np.zeros((0, 1)))


@pytest.mark.parametrize("name", CASES)
def test_golden_cases_through_pycocotools(name, tmp_path):
    """The golden cases are pycocotools' too."""
    assert_pycocotools(tmp_path, CASES[name]["annotations"], CASES[name]["results"])


@pytest.mark.parametrize("seed", SEEDS)
def test_random_cases_through_pycocotools(seed, tmp_path):
    """Whatever the case, the evaluation is pycocotools' to 1e-12."""
    assert_pycocotools(tmp_path, *small_case(seed))


def test_random_cases_are_hard():
    """Among the random cases are at least ten of each kind that is treated in its own way."""
    kinds = {}
    for seed in SEEDS:
        annotations, results = small_case(seed)
        truth, found = oks.truth_rows(annotations), [entry["image_id"] for entry in results]
        extents = [float(np.ptp(entry["keypoints"][0::3]) * np.ptp(entry["keypoints"][1::3]))
                   for entry in results]
        labelled = (truth["keypoints"][:, 2::3] > 0).any(axis=1)
        stats = oks.evaluate(annotations, results)
        for kind, present in {
                "crowd": truth["crowd"].any(), "no keypoints": (~labelled).any(),
                "crowd with keypoints": (truth["crowd"] & labelled).any(),
                "the field decides": (labelled & ~truth["crowd"] & truth["ignored"][:, 0]).any(),
                "nobody": len(truth) == 0, "all ignored": truth["ignored"][:, 0].all(),
                "no results": {image["id"] for image in annotations["images"]} - set(found),
                "false positives": set(found) - set(truth["image"]),
                "20 exceeded": max(map(found.count, found)) > oks.MAX_DETECTIONS,
                "boxes": "bbox" in results[0], "extents": "bbox" not in results[0],
                "person at border": np.isin(truth["area"], oks.AREAS[1]).any(),
                "result at border": np.isin(extents, oks.AREAS[1]).any(),
                "medium": stats["APm"] > 0, "large": stats["APl"] > 0,
                "neither": stats["APm"] == -1, "between": 0.2 < stats["AP"] < 0.8}.items():
            kinds[kind] = kinds.get(kind, 0) + bool(present)
    assert min(kinds.values()) >= 10, kinds


# ------------------------------------------------------------------------------------------------
# Rules of the evaluation, by hand

def test_oks_by_hand():
    """OKS of two labelled keypoints; without labels, by the distance to the enlarged box."""
    labels = np.zeros((17, 3))
    labels[0], labels[2] = (10, 10, 2), (20, 10, 1)
    fields = {"area": 400, "bbox": [5, 5, 20, 20]}
    posed = {**person(1, (0, 0), **fields), "keypoints": labels.ravel().tolist()}
    truth = oks.truth_rows(coco(posed, person(1, (0, 0), v=0, **fields)))
    points = np.full((3, 17, 3), 50.0)
    points[0, 0, :2], points[0, 2, :2], points[2] = (12, 10), (20, 13), (44, 10, 1)
    found = oks.oks_matrix(points.reshape(3, 51), truth)
    nose, eye = (math.exp(-d ** 2 / (2 * 400 * (2 * s) ** 2)) for d, s in ((2, .026), (3, .025)))
    assert found[0, 0] == pytest.approx((nose + eye) / 2, abs=1e-12)
    assert found[0, 0] == pytest.approx(0.0842429, abs=5e-8)
    assert found[1:, 1] == pytest.approx([0.0787637, 1.0], abs=5e-8)


def test_no_results():
    """Without results a statistic is 0 if there is somebody of that size, else -1."""
    found = oks.evaluate(coco(person(1, (9, 9), area=2000)), [])
    assert found == {name: -1.0 if name.endswith("l") else 0.0 for name in oks.STATS}
    assert set(oks.evaluate(coco(), []).values()) == {-1.0}


def test_id_zero(tmp_path):
    """An annotation with id 0 can be found like any other (pycocotools takes 0 for nobody)."""
    annotations = coco(person(1, (9, 9)))
    annotations["annotations"][0]["id"] = 0
    assert oks.evaluate(annotations, [result(1, (9, 9))])["AP"] == pytest.approx(1)
    files = write_case(tmp_path, annotations, [result(1, (9, 9))])
    assert pycocotools_evaluation(*files).stats[0] == 0  # so that it can't be the oracle here


def test_of_equals_the_later_person_is_taken(tmp_path):
    """Midway between two, the first detection takes the later; the second finds the earlier."""
    annotations = coco(person(1, (20, 20)), person(1, (24, 20)))
    results = [result(1, (22, 20), 0.9), result(1, (20, 20), 0.8)]
    similarity = oks_by_image(annotations, results)[1]
    assert similarity[0, 0] == similarity[0, 1] > 0.9 > 0.75 > similarity[1, 1]
    # Had the first detection taken the earlier person, the second would be wrong from 0.75 on.
    found = assert_pycocotools(tmp_path, annotations, results)
    assert found["AR"] == pytest.approx((9 * 2 + 1) / 20)


def test_ignored_people_come_last(tmp_path):
    """A detection takes somebody who counts before somebody ignored who is closer."""
    annotations = coco(person(1, (20, 20)), person(1, (21, 20), iscrowd=1))
    found = assert_pycocotools(tmp_path, annotations, [result(1, (21, 20))])
    assert found["AR50"] == 1.0


def test_crowd_forgives(tmp_path):
    """Any number of detections on a crowd are neither right nor wrong; on a person one is right."""
    found = [result(1, (20, 20), 0.9 - 0.1 * i) for i in range(3)] + [result(2, (9, 9), 0.1)]
    crowd = coco(person(1, (20, 20), iscrowd=1), person(2, (9, 9)))
    assert assert_pycocotools(tmp_path, crowd, found)["AP"] == pytest.approx(1)
    # Two people: the precision is 1 up to recall 0.5 (51 of 101 points), beyond it 2 of 4.
    nobody = coco(person(1, (20, 20)), person(2, (9, 9)))
    assert assert_pycocotools(tmp_path, nobody, found)["AP"] == pytest.approx((51 + 50 / 2) / 101)


def test_area_borders_are_inclusive(tmp_path):
    """9216 pixels^2 is medium and large, 1024 medium, less neither; all of them count for AP."""
    for area, medium, large in ((9216, 1, 1), (1024, 1, -1), (1023.99, -1, -1), (9216.01, -1, 1)):
        annotations = coco(person(1, (20, 20), area=area))
        found = assert_pycocotools(tmp_path, annotations, [result(1, (20, 20))])
        assert [found[name] for name in ("AR", "ARm", "ARl")] == [1, medium, large]


@pytest.mark.parametrize("side,precision", [(32, 0.5), (31.9, 1.0), (96, 0.5), (96.1, 1.0)])
def test_unmatched_area_decides(side, precision, tmp_path):
    """An unmatched detection is wrong for a range if its own area is in it, ends included."""
    corners = np.full((17, 2), 200.0)
    corners[0] += side
    annotations = coco(person(1, (20, 20)))
    results = [result(1, corners, 0.9), result(1, (20, 20), 0.1)]
    assert assert_pycocotools(tmp_path, annotations, results)["APm"] == pytest.approx(precision)


def test_first_box_decides(tmp_path):
    """Areas are the boxes' if the first entry has one, else the keypoints' extents."""
    annotations, small, medium = coco(person(1, (20, 20))), [0, 0, 9, 9], [0, 0, 40, 40]
    for boxes, precision in (((medium, small), 0.5), ((small, small), 1.0), (([], medium), 1.0)):
        results = [result(1, (200, 200), 0.9, bbox=boxes[0]), result(1, (20, 20), bbox=boxes[1])]
        found = assert_pycocotools(tmp_path, annotations, results)
        assert found["APm"] == pytest.approx(precision)


def test_twenty_detections(tmp_path):
    """The best 20 of an image count, by score and of equal scores by place in the file."""
    annotations = coco(person(1, (20, 20)))
    for before, recall in ((19, 1.0), (20, 0.0)):
        results = [result(1, (200, 200))] * before + [result(1, (20, 20))]
        assert assert_pycocotools(tmp_path, annotations, results)["AR"] == recall
    assert oks.evaluate(annotations, [*results[:-1], result(1, (20, 20), 0.6)])["AR"] == 1.0


def test_images_without_people_count(tmp_path):
    """A better scored detection where nobody is halves the precision."""
    annotations = coco(person(1, (20, 20)))
    results = [result(1, (20, 20), 0.1), result(2, (20, 20), 0.9)]
    assert assert_pycocotools(tmp_path, annotations, results)["AP"] == pytest.approx(0.5)


def test_other_categories(tmp_path):
    """Annotations and results of other categories than person don't count."""
    annotations = coco(person(1, (20, 20)), person(1, (60, 60), category_id=2))
    results = [result(1, (90, 90), 0.9, category_id=2), result(1, (20, 20), 0.5)]
    assert assert_pycocotools(tmp_path, annotations, results)["AP"] == pytest.approx(1)


# ------------------------------------------------------------------------------------------------
# Scores and NMS

@pytest.mark.parametrize("case", GOLDEN["nms"])
def test_golden_nms(case):
    """Scores of people, and which of them are kept in which order, are the golden ones."""
    scores = oks.instance_scores(np.array(case["kp_scores"]), np.array(case["box_scores"]))
    assert_same(scores, case["scores"])
    assert oks.oks_nms(np.array(case["kpts"]), scores, np.array(case["areas"])) == case["keep"]


def test_scores_by_hand():
    """Keypoints at 0.2 or less don't count; without any above, the score is 0."""
    keypoints = np.full((3, 17), 0.1)
    keypoints[0, :2], keypoints[1, 0], keypoints[2, :] = (0.4, 0.8), 0.9, 0.2
    found = oks.instance_scores(keypoints, np.array([0.5, 1.0, 1.0]))
    assert found.tolist() == pytest.approx([0.5 * 0.6, 0.9, 0.0])


def test_nms_by_hand():
    """Of equal poses the best stays; of equal scores, the later."""
    poses = np.zeros((4, 17, 3))
    poses[1] = 50
    areas = np.full(4, 100.0)
    assert oks.oks_nms(poses, np.array([0.1, 0.5, 0.3, 0.2]), areas) == [1, 2]
    assert oks.oks_nms(poses, np.full(4, 0.5), areas) == [3, 1]
    assert oks.oks_nms(poses[:0], areas[:0], areas[:0]) == []


def test_nms_threshold_is_float32_and_strict():
    """An OKS is too high if above the threshold once both are rounded to float32."""
    def kept(similarity):
        # One joint is far off; another as far as makes the mean (15 + e) / 17 the one wanted.
        poses, e = np.zeros((2, 17, 2)), 17 * similarity - 15
        poses[1, 16, 0] = 1e6
        poses[1, 0, 1] = math.sqrt(-2 * math.log(e) * 200) * 2 * 0.026
        return oks.oks_nms(poses, np.array([0.9, 0.8]), np.array([100.0, 300.0]))
    assert kept(0.9 - 1e-6) == [0, 1]
    assert kept(0.9 + 1e-9) == [0, 1]
    assert kept(0.9 + 1e-6) == [0]
