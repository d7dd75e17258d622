"""Evaluation: how a trained model is run on whole images, and what the reported numbers mean.

    python eval.py --checkpoint runs/seg-shapes
    python eval.py --checkpoint runs/seg-ade20k --data /path/to/ADEChallengeData2016

Segmentation follows mmsegmentation 0.30.0 (spec A.5): overlapping windows, their logits averaged,
resized to the original image, argmax; intersections and unions summed over all images.
"""
import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

import data
import pictures
import weights
from errors import InputError, run_command
from heads import resize
from model import MetaPromptModel

PICTURES = 8  # images of the set drawn in a report, evenly spread


@dataclass(frozen=True)
class Protocol:
    """How whole images are predicted; one row per data set below."""

    scale: tuple[int, int] | None  # (long, short) bounds of the resize before prediction
    window: int | None  # side of the sliding window in pixels; None: the whole image at once
    stride: int | None
    batch: int = 1  # images at once; more than 1 only where all have one size
    source: str = ""


PROTOCOLS = {
    "shapes": Protocol(None, None, None, batch=16, source="ours"),
    "folder": Protocol(None, None, None, source="ours: whole images at their own size"),
    "ade20k": Protocol((2048, 512), 512, 341, source="official: configs/ade.py, single scale"),
}


# ------------------------------------------------------------------------------------------------
# Devices

def pick_device(name: str) -> torch.device:
    """"auto", "cpu" or "cuda[:i]" -> device; InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown: auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch {torch.__version__} sees "
                         f"{torch.cuda.device_count()} GPUs here; cpu works everywhere")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """"auto", "bfloat16" or "float32" -> dtype; auto is bfloat16 where the device is fast at it."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
        fast = "amx_bf16" in flags or "avx512_bf16" in flags
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision around forward passes; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


# ------------------------------------------------------------------------------------------------
# Sliding windows

def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(y1, y2, x1, x2) of the windows, row by row; the last ones are shifted back to the edge.

    An image smaller than `crop` gives one smaller window, without padding (spec A.5).
    """
    def starts(length: int) -> list[int]:
        count = max(length - crop + stride - 1, 0) // stride + 1
        return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]

    return [(y, min(y + crop, height), x, min(x + crop, width))
            for y in starts(height) for x in starts(width)]


def slide(predict, images: Tensor, crop: int, stride: int, batch: int = 8) -> Tensor:
    """Average of predict(window) over overlapping windows; `batch` windows per call.

    images (B, 3, H, W); predict: (b, 3, h, w) -> (b, C, h, w).  Returns (B, C, H, W) float32.
    """
    B, _, H, W = images.shape
    places = windows(H, W, crop, stride)
    total, count = None, images.new_zeros(1, 1, H, W)
    per_call = max(1, batch // B)
    for first in range(0, len(places), per_call):
        group = places[first:first + per_call]
        crops = torch.cat([images[:, :, y1:y2, x1:x2] for y1, y2, x1, x2 in group])
        outputs = predict(crops).float()
        if total is None:
            total = outputs.new_zeros(B, outputs.shape[1], H, W)
        for output, (y1, y2, x1, x2) in zip(outputs.split(B), group):
            total[:, :, y1:y2, x1:x2] += output
            count[:, :, y1:y2, x1:x2] += 1
    return total / count


@torch.inference_mode()
def predict_seg(model: MetaPromptModel, images: Tensor, size, protocol: Protocol,
                dtype: torch.dtype) -> Tensor:
    """Class probabilities at `size`, (B, classes, *size), of images (B, 3, H, W) in [0, 1]."""
    with autocast(images.device, dtype):
        if protocol.window is None:
            logits = model(images).float()
        else:
            logits = slide(model, images, protocol.window, protocol.stride)
    return resize(logits, size).softmax(dim=1)


# ------------------------------------------------------------------------------------------------
# Metrics

def confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(classes, classes) counts, row = truth, column = prediction; ignored pixels don't count."""
    valid = target != data.IGNORE
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


def evaluate_seg(model: MetaPromptModel, dataset, protocol: Protocol, dtype: torch.dtype, *,
                 workers: int = 0, sheet: Path | None = None) -> dict:
    """Metrics of the whole set; with `sheet` also a PNG of some images, truth and prediction."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    num_classes = len(dataset.classes.names)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    rows, drawn = [], {len(dataset) * i // PICTURES for i in range(PICTURES)}
    seen = 0                                         # bar.n stands still where bars are disabled
    with tqdm(total=len(dataset), desc="evaluate", unit="image", leave=False) as bar:
        for batch in data.eval_loader(dataset, protocol.batch, workers):
            target = batch["target"].to(device)
            images = batch["image"].to(device, non_blocking=True)
            probs = predict_seg(model, images, target.shape[-2:], protocol, dtype)
            prediction = probs.argmax(dim=1)
            counts += confusion(prediction, target, num_classes)
            for i in range(len(images)):
                if seen + i in drawn:
                    rows.append((images[i].cpu(), target[i].cpu(), prediction[i].cpu()))
            seen += len(images)
            bar.update(len(images))
    model.train(was_training)
    if sheet is not None:
        pictures.save_seg_sheet(sheet, rows, dataset.classes)
    return seg_metrics(counts.cpu())


def print_table(metrics: dict, names: tuple[str, ...]) -> None:
    """Per-class IoU and accuracy in percent, then the means; n/a: absent and not predicted."""
    def percent(value: float) -> str:
        return "  n/a" if np.isnan(value) else f"{100 * value:5.2f}"

    width = max(len(name) for name in names)
    print(f"{'class':{width}}    IoU    Acc")
    for name, iou, acc in zip(names, metrics["IoU"], metrics["Acc"]):
        print(f"{name:{width}}  {percent(iou)}  {percent(acc)}")
    print(f"mIoU {percent(metrics['mIoU'])}   mAcc {percent(metrics['mAcc'])}   "
          f"aAcc {percent(metrics['aAcc'])}")


# ------------------------------------------------------------------------------------------------
# Command

def find_checkpoint(run: str) -> Path:
    """Folder of the model to evaluate: RUN/best, else RUN/last, else RUN itself."""
    for folder in (Path(run) / "best", Path(run) / "last", Path(run)):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"--checkpoint {run}: neither it nor its best/ or last/ holds a config.json")


def recipe_of(folder: Path) -> dict:
    """The recipe saved with a run, {} if the folder is not part of one."""
    file = folder.parent / "recipe.json"
    return weights.read_json(file) if file.is_file() else {}


def parse() -> argparse.Namespace:
    """Command line; what is not given comes from the run's recipe."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder of train.py, or a model")
    parser.add_argument("--dataset", help=f"one of {', '.join(PROTOCOLS)}; default: the run's")
    parser.add_argument("--data", help="folder of the data set; default: the run's")
    parser.add_argument("--out", help="folder for pictures and metrics; default: RUN/eval")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--precision", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--workers", type=int, default=1, help="data loading processes")
    return parser.parse_args()


def main() -> None:
    """Load, say what will be done, evaluate, write metrics.json and pictures."""
    args = parse()
    folder = find_checkpoint(args.checkpoint)
    recipe = recipe_of(folder)
    name = args.dataset or recipe.get("dataset", "shapes")
    if name not in PROTOCOLS:
        raise InputError(f"--dataset {name} is unknown: choose from {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    own = recipe if name == recipe.get("dataset") else {}
    dataset = data.open_dataset(name, args.data or own.get("data"), "val",
                                size=own.get("crop", 128), scale=protocol.scale,
                                length=own.get("val_scenes", 300))
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    out = Path(args.out) if args.out else folder.parent / "eval"
    print(f"model      {folder}\ndata       {name}: {dataset.check()}\n"
          f"protocol   {asdict(protocol)}\ndevice     {device}, {dtype}\nout        {out}")
    model = MetaPromptModel.from_pretrained(folder).to(device)
    if model.config.num_classes != len(dataset.classes.names):
        raise InputError(f"{folder} predicts {model.config.num_classes} classes, the data set "
                         f"{name} has {len(dataset.classes.names)}")
    metrics = evaluate_seg(model, dataset, protocol, dtype, workers=args.workers,
                           sheet=out / "pictures.png")
    print_table(metrics, dataset.classes.names)
    metrics = {key: [None if np.isnan(v) else v for v in value] if isinstance(value, list) else value
               for key, value in metrics.items()}        # JSON has no nan
    report = {"checkpoint": str(folder), "dataset": name, "images": len(dataset),
              "protocol": asdict(protocol), **metrics}
    (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {out / 'metrics.json'} and {out / 'pictures.png'}")


if __name__ == "__main__":
    run_command(main)
