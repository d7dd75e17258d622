"""COCO keypoints: object keypoint similarity (OKS), OKS-NMS, and the ten COCO statistics, in numpy.

OKS is the mean over a person's keypoints of exp(-d^2 / (2 area (2 sigma)^2)): 1 for a perfect pose,
with a tolerance that grows with the person and depends on the joint.  The evaluation is that of
pycocotools 2.0.11; it also adds in the same order, so that ties fall the same way.
All lengths are pixels; the 51 numbers of a pose are x, y, v of each of COCO's 17 joints in turn.
"""
import numpy as np

# Joint by joint, in COCO's order.  Tenths, because .26 / 10 is not .026 to the last bit.
SIGMAS = np.array([.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62,
                   1.07, 1.07, .87, .87, .89, .89]) / 10
VARIANCES = (2 * SIGMAS) ** 2
EPS = np.spacing(1.0)
KEYPOINT_THRESHOLD = 0.2  # keypoints that score less say nothing about the person's score

STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # OKS from which a detection counts as right
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [32 ** 2, 96 ** 2], [96 ** 2, 1e10]])  # all, medium, large; inclusive
MAX_DETECTIONS = 20  # per image
PERSON = 1  # the category's id

TRUTH = np.dtype([("image", np.int64), ("keypoints", float, 51), ("box", float, 4),
                  ("area", float), ("crowd", bool), ("ignored", bool, len(AREAS))])
DETECTION = np.dtype([("image", np.int64), ("keypoints", float, 51), ("score", float),
                      ("area", float)])


# ------------------------------------------------------------------------------------------------
# From network output to results

def instance_scores(keypoint_scores: np.ndarray, box_scores: np.ndarray) -> np.ndarray:
    """(P,) scores of people from (P, 17) keypoint scores and (P,) box scores.

    The mean of the keypoint scores above 0.2 (0 if there is none) times the box score; ground-truth
    boxes score 1 (official: mmpose CocoMetric, score_mode "bbox_keypoint").
    """
    above = keypoint_scores > KEYPOINT_THRESHOLD
    total = np.where(above, keypoint_scores, 0).sum(axis=1)
    return box_scores * total / np.maximum(above.sum(axis=1), 1)


def oks_nms(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray,
            threshold: float = 0.9) -> list[int]:
    """Indices of the people of one image to keep, best first: no two are closer than `threshold`.

    keypoints (P, 17, 2 or 3) pixels, scores (P,), areas (P,) pixels^2: of the padded boxes with the
    crop's aspect ratio.  All 17 keypoints count, whatever their score (official: mmpose oks_nms).
    """
    points, kept = keypoints[..., :2], []
    order = np.argsort(scores, kind="stable")[::-1]  # of equal scores the later comes first
    while len(order):
        best, rest = order[0], order[1:]
        squared = ((points[rest] - points[best]) ** 2).sum(axis=-1)
        area = (areas[rest] + areas[best]) / 2 + EPS
        oks = np.exp(-squared / VARIANCES / area[:, None] / 2).mean(axis=1)
        kept.append(int(best))
        order = rest[oks.astype(np.float32) <= np.float32(threshold)]
    return kept


# ------------------------------------------------------------------------------------------------
# COCO's dictionaries as rows

def truth_rows(annotations: dict) -> np.ndarray:
    """The annotated people as rows of TRUTH, by image id, within an image in file order.

    A person is ignored in an area range outside of which its area lies, and in all of them if it is
    a crowd or its num_keypoints is 0.
    """
    images, rows = {image["id"] for image in annotations["images"]}, []
    for entry in annotations["annotations"]:
        if entry["category_id"] != PERSON or entry["image_id"] not in images:
            continue
        area, crowd = entry["area"], bool(entry.get("iscrowd"))
        nothing = crowd or entry["num_keypoints"] == 0
        ignored = [nothing or area < low or area > high for low, high in AREAS]
        rows.append((entry["image_id"], entry["keypoints"], entry["bbox"], area, crowd, ignored))
    rows = np.array(rows, TRUTH)
    return rows[np.argsort(rows["image"], kind="stable")]


def detection_rows(results: list[dict]) -> np.ndarray:
    """The results as rows of DETECTION, by image id, the best 20 of an image, best first.

    Equal scores keep their order.  The area is the box's if the first entry has a box, else that of
    the keypoints' extent (as in pycocotools).
    """
    with_box = bool(results) and bool(results[0].get("bbox"))
    rows = np.array([(entry["image_id"], entry["keypoints"], entry["score"],
                      entry["bbox"][2] * entry["bbox"][3] if with_box else 0)
                     for entry in results if entry["category_id"] == PERSON], DETECTION)
    if not with_box:
        x, y = rows["keypoints"][:, 0::3], rows["keypoints"][:, 1::3]
        rows["area"] = np.ptp(x, axis=1) * np.ptp(y, axis=1)
    rows = rows[np.lexsort((-rows["score"], rows["image"]))]
    rank = np.arange(len(rows)) - np.searchsorted(rows["image"], rows["image"])
    return rows[rank < MAX_DETECTIONS]


# ------------------------------------------------------------------------------------------------
# Evaluation

def oks_matrix(keypoints: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(D, G) OKS of the (D, 51) keypoints of detections with the G rows of TRUTH of one image.

    Only labelled keypoints (v > 0) count.  A person with none is compared by how far all 17 lie
    outside of its box, enlarged three times.  `area` is the annotation's, of the segmentation.
    """
    x, y = keypoints[:, None, 0::3], keypoints[:, None, 1::3]                     # (D, 1, 17)
    true_x, true_y, labelled = (truth["keypoints"][:, i::3] for i in range(3))    # (G, 17)
    labelled = labelled > 0
    posed = labelled.any(axis=1, keepdims=True)
    left, top, width, height = truth["box"].T[..., None]                          # (G, 1)
    # (D, G, 17); without labels how far outside of the enlarged box, 0 inside
    dx = np.where(posed, x - true_x, x - x.clip(left - width, left + 2 * width))
    dy = np.where(posed, y - true_y, y - y.clip(top - height, top + 2 * height))
    area = truth["area"][:, None] + EPS
    closeness = np.exp(-(dx ** 2 + dy ** 2) / VARIANCES / area / 2)
    # Person by person: adding zeros for the rest would change the order of addition, and with it
    # the last bit, which decides between equals.
    return np.stack([closeness[:, i].compress(counted, axis=1).mean(axis=1)
                     for i, counted in enumerate(labelled | ~posed)], axis=1)


def match(oks: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of an image find a person, and which of those only an ignored one.

    oks (D, G), detections best first; ignored (areas, G), crowd (G,).  Returns two arrays (areas,
    thresholds, D).  Each detection takes, of the people not taken yet whose OKS reaches the
    threshold, the closest that isn't ignored, else the closest; of equals the last.  A crowd can be
    taken any number of times.
    """
    # Last person first, because argmax takes the first of equals.
    oks, ignored, crowd = oks[:, ::-1], ignored[:, None, ::-1], crowd[::-1]
    found = np.zeros((len(AREAS), len(THRESHOLDS), len(oks)), bool)
    found_ignored, taken = found.copy(), np.zeros((*found.shape[:2], oks.shape[1]), bool)
    for d in np.flatnonzero(oks.max(axis=1) >= THRESHOLDS[0]):
        free = (oks[d] >= THRESHOLDS[:, None]) & ~taken                           # (areas, t, G)
        proper = free & ~ignored
        free = np.where(proper.any(axis=-1, keepdims=True), proper, free)
        best = np.where(free, oks[d], -1).argmax(axis=-1)[..., None]
        chosen = free & (np.arange(len(crowd)) == best)
        found[..., d], found_ignored[..., d] = chosen.any(-1), (chosen & ignored).any(-1)
        taken |= chosen & ~crowd
    return found, found_ignored


def match_images(truth: np.ndarray, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong detections: two arrays (areas, thresholds, D), for sorted rows.

    Neither right nor wrong: one that found an ignored person, or found nobody and has itself an
    area outside of the range.
    """
    found = np.zeros((len(AREAS), len(THRESHOLDS), len(detections)), bool)
    found_ignored = found.copy()
    images = np.intersect1d(truth["image"], detections["image"])
    ends = [np.searchsorted(rows["image"], images, side)
            for rows in (truth, detections) for side in ("left", "right")]
    for g0, g1, d0, d1 in zip(*ends):
        people = truth[g0:g1]
        oks = oks_matrix(detections["keypoints"][d0:d1], people)
        found[..., d0:d1], found_ignored[..., d0:d1] = match(oks, people["ignored"].T,
                                                             people["crowd"])
    low, high = AREAS.T[..., None]
    elsewhere = (detections["area"] < low) | (detections["area"] > high)          # (areas, D)
    return found & ~found_ignored, ~found & ~elsewhere[:, None]


def precision_recall(annotations: dict, results: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(10 thresholds, 101 recalls, 3 areas) precision and (10, 3) recall; -1 without any person.

    Precision at a recall is the best at that recall or beyond, 0 where it is never reached.
    """
    truth = truth_rows(annotations)
    detections = detection_rows(results)
    order = np.argsort(-detections["score"], kind="stable")
    right, wrong = (np.cumsum(flags[..., order], axis=-1)
                    for flags in match_images(truth, detections))
    precision = np.full((len(THRESHOLDS), len(RECALLS), len(AREAS)), -1.0)
    recall = np.full((len(THRESHOLDS), len(AREAS)), -1.0)
    for a, people in enumerate((~truth["ignored"]).sum(axis=0)):
        if people == 0:
            continue
        reached, precise = right[a] / people, right[a] / (right[a] + wrong[a] + EPS)
        recall[:, a] = reached.max(axis=1, initial=0)
        best = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
        best = np.pad(best, ((0, 0), (0, 1)))  # beyond the last: 0
        for t in range(len(THRESHOLDS)):
            precision[t, :, a] = best[t, np.searchsorted(reached[t], RECALLS)]
    return precision, recall


def evaluate(annotations: dict, results: list[dict]) -> dict[str, float]:
    """The ten COCO statistics by name (STATS), in 0..1; -1: nobody of that size is annotated.

    annotations: a COCO keypoint file as sets/coco.py reads it; results: a list of COCO's result
    dictionaries (image_id, category_id, keypoints, score, bbox?).  Other categories don't count.
    """
    precision, recall = precision_recall(annotations, results)
    every = slice(None)
    columns = ((every, 0), (0, 0), (5, 0), (every, 1), (every, 2))  # threshold, area
    values = [table[t, ..., a].mean() for table in (precision, recall) for t, a in columns]
    return dict(zip(STATS, map(float, values)))
