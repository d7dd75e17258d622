"""What the reported numbers mean: confusion counts and mIoU, the nine depth metrics.

Pure functions of predictions and truth; how predictions are made is in eval.py.
"""
import torch
from torch import Tensor

from heads import IGNORE

DEPTH_METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


def confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(classes, classes) counts, row = truth, column = prediction; ignored pixels don't count."""
    valid = target != IGNORE
    pairs = target[valid] * num_classes + prediction[valid]
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def seg_metrics(counts: Tensor) -> dict:
    """mIoU, mAcc, aAcc and per-class IoU, Acc from the summed confusion counts, all in 0..1.

    A class that neither occurs nor is predicted is nan and left out of the means; one that is only
    predicted has IoU 0 (official: mmsegmentation `eval_metrics`, accumulated over the whole set).
    """
    counts = counts.double()
    hits, truth, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou, acc = hits / (truth + predicted - hits), hits / truth             # 0/0 = nan
    return {"mIoU": iou.nanmean().item(), "mAcc": acc.nanmean().item(),
            "aAcc": (hits.sum() / truth.sum()).item(), "IoU": iou.tolist(), "Acc": acc.tolist()}


def evaluation_box(height: int, width: int, crop: str | None) -> tuple[int, int, int, int]:
    """(y1, y2, x1, x2) that a depth benchmark counts: "nyu", "garg", "eigen", or None for all.

    Official: depth/utils_depth/metrics.py, cropping_img (fractions of the KITTI crop's size).
    """
    if crop is None:
        return 0, height, 0, width
    if crop == "nyu":
        return 45, 471, 41, 601
    y1, y2, x1, x2 = {"garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
                      "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229)}[crop]
    return int(y1 * height), int(y2 * height), int(x1 * width), int(x2 * width)


def valid_depth(target: Tensor, crop: str | None, min_depth: float, max_depth: float) -> Tensor:
    """Pixels of (H, W) metres that count: strictly inside the range, inside the benchmark's box."""
    y1, y2, x1, x2 = evaluation_box(*target.shape, crop)
    inside = torch.zeros_like(target, dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    return inside & (target > min_depth) & (target < max_depth)


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """The nine metrics of one image from its valid pixels, both (P,) metres.

    REL in the paper is abs_rel; silog has factor 0.5 (official: depth/utils_depth/metrics.py).
    """
    p, g = prediction.double(), target.double()
    ratio, difference, log = torch.maximum(p / g, g / p), p - g, p.log() - g.log()
    values = ((ratio < 1.25), (ratio < 1.25 ** 2), (ratio < 1.25 ** 3), difference.abs() / g,
              difference.square() / g, difference.square(), log.square(),
              (p.log10() - g.log10()).abs())
    means = [value.double().mean().item() for value in values]
    means[5], means[6] = means[5] ** 0.5, means[6] ** 0.5
    silog = (log.square().mean() - 0.5 * log.mean().square()).clamp(min=0).sqrt().item()
    return dict(zip(DEPTH_METRICS, (*means, silog)))
