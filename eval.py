"""Evaluation: how a trained model is run on whole images, for each data set's protocol.

    python eval.py --checkpoint runs/seg-shapes
    python eval.py --checkpoint runs/seg-ade20k --data /path/to/ADEChallengeData2016
    python eval.py --official nyu.ckpt --dataset nyu --data DATA --val-list nyu_test.txt

Segmentation follows mmsegmentation 0.30.0 (spec A.5): overlapping windows, their logits averaged,
resized to the original image, argmax; intersections and unions summed over all images.
Depth follows the official code (spec B.6): shifted windows and their mirror images averaged,
metrics per image inside the benchmark's box, then the mean over images.
"""
import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

import data
import depth_data
import pictures
import weights
from errors import InputError, run_command
from heads import resize
from metrics import DEPTH_METRICS, confusion, depth_metrics, seg_metrics, valid_depth
from model import MetaPromptModel

PICTURES = 8  # images of the set drawn in a report, evenly spread


MAIN_METRIC = {"seg": ("mIoU", 1), "depth": ("rmse", -1)}  # what "best" means, and its sign


@dataclass(frozen=True)
class Protocol:
    """How whole images are segmented; one row per data set below."""

    scale: tuple[int, int] | None  # (long, short) bounds of the resize before prediction
    window: int | None  # side of the sliding window in pixels; None: the whole image at once
    stride: int | None
    batch: int = 1  # images at once; more than 1 only where all have one size
    source: str = ""


@dataclass(frozen=True)
class DepthProtocol:
    """How depth is predicted and what counts; one row per data set below."""

    windows: int  # square windows of full height, evenly shifted; 1: the whole image at once
    flip: bool  # average with the mirror image's prediction
    box: str | None  # "nyu", "garg", "eigen": the benchmark's crop; None: all pixels
    max_depth: float  # metres; pixels at or beyond it, or at or below min_depth, don't count
    resize_scale: int  # for the authors' checkpoints, which don't hold it
    units: float  # of exported 16-bit PNGs, per metre
    min_depth: float = 1e-3
    batch: int = 1
    source: str = ""


PROTOCOLS = {
    ("seg", "shapes"): Protocol(None, None, None, batch=16, source="ours"),
    ("seg", "folder"): Protocol(None, None, None, source="ours: whole images at their own size"),
    ("seg", "ade20k"): Protocol((2048, 512), 512, 341, source="official: configs/ade.py"),
    ("depth", "shapes"): DepthProtocol(1, True, None, 80.0, 0, 256.0, batch=16, source="ours"),
    ("depth", "folder"): DepthProtocol(1, True, None, 80.0, 1, 256.0, source="ours"),
    ("depth", "nyu"): DepthProtocol(2, True, "nyu", 10.0, 1, 1000.0,
                                    source="official: depth/test.sh, NYU v2"),
    ("depth", "kitti"): DepthProtocol(16, True, "garg", 80.0, 2, 256.0,
                                      source="official: depth/test.sh, KITTI"),
}


def find_protocol(task: str, dataset: str) -> Protocol | DepthProtocol:
    """The protocol of a data set; InputError naming the possible ones."""
    if (task, dataset) not in PROTOCOLS:
        known = sorted({t for t, _ in PROTOCOLS})
        if task not in known:
            raise InputError(f"--task {task} is unknown: choose from {', '.join(known)}")
        names = ", ".join(name for t, name in PROTOCOLS if t == task)
        raise InputError(f"--dataset {dataset} is unknown for {task}: choose from {names}")
    return PROTOCOLS[task, dataset]


def open_set(spec: dict, split: str):
    """The data set that `spec`, a recipe as a dict, names, for "train" or "val"; or InputError."""
    protocol = find_protocol(spec["task"], spec["dataset"])
    if spec["dataset"] == "shapes":
        return data.Shapes(spec[f"{split}_scenes"], task=spec["task"], training=split == "train",
                           size=spec["crop"], seed=spec["seed"])
    if spec["task"] == "depth":
        return depth_data.open_dataset(spec, split)
    scale = spec["scale"] if split == "train" else protocol.scale
    return data.open_dataset(spec["dataset"], spec["data"], split, size=spec["crop"], scale=scale,
                             seed=spec["seed"])


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


def shifted_windows(width: int, side: int, count: int) -> list[int]:
    """Left edges of `count` square windows of `side` over an image `width` wide.

    DEVIATION: the last window is moved to the right edge; the official code leaves up to `count`
    columns of a KITTI image without prediction, outside what its metrics count (decisions 15).
    """
    if count == 1 or width <= side:
        return [0]
    interval = (width - side) // (count - 1)
    starts = [i * interval for i in range(count - 1)] + [width - side]
    if max(interval, starts[-1] - starts[-2]) <= side:
        return starts
    count = max(count, -(-width // side))                # so wide that these windows leave gaps
    return [i * (width - side) // (count - 1) for i in range(count)]


@torch.inference_mode()
def predict_depth(model: MetaPromptModel, images: Tensor, protocol: DepthProtocol,
                  dtype: torch.dtype, batch: int = 8) -> Tensor:
    """Metres (B, H, W) of images (B, 3, H, W) in [0, 1]: mean over windows and mirror images."""
    B, _, H, W = images.shape
    side = min(H, W) if protocol.windows > 1 else W
    places = shifted_windows(W, side, protocol.windows)
    total, count = images.new_zeros(B, H, W), images.new_zeros(W)
    for first in range(0, len(places), max(1, batch // B)):
        group = places[first:first + max(1, batch // B)]
        crops = torch.cat([images[..., x:x + side] for x in group])
        with autocast(images.device, dtype):
            depth = model(crops)[:, 0].float()
            if protocol.flip:
                depth = (depth + model(crops.flip(-1))[:, 0].float().flip(-1)) / 2
        for output, x in zip(depth.split(B), group):
            total[..., x:x + side] += output
            count[x:x + side] += 1
    return total / count


# ------------------------------------------------------------------------------------------------
# Whole sets

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


def evaluate_depth(model: MetaPromptModel, dataset, protocol: DepthProtocol, dtype: torch.dtype,
                   *, workers: int = 0, sheet: Path | None = None,
                   export: Path | None = None) -> dict:
    """The nine metrics, each the mean over images with a valid pixel; `images` counts those.

    `sheet`: a PNG of some images, truth, prediction, error.  `export`: a folder for 16-bit PNGs in
    the benchmark's unit.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    results, rows, seen = [], [], 0
    drawn = {len(dataset) * i // PICTURES for i in range(PICTURES)}
    with tqdm(total=len(dataset), desc="evaluate", unit="image", leave=False) as bar:
        for batch in data.eval_loader(dataset, protocol.batch, workers):
            images = batch["image"].to(device, non_blocking=True)
            target = batch["target"].to(device)
            depth = predict_depth(model, images, protocol, dtype)
            depth = depth.nan_to_num(nan=protocol.min_depth, posinf=protocol.max_depth)
            for i, name in enumerate(batch["name"]):
                valid = valid_depth(target[i], protocol.box, protocol.min_depth, protocol.max_depth)
                if valid.any():
                    results.append(depth_metrics(depth[i][valid], target[i][valid]))
                if seen + i in drawn:
                    rows.append((images[i].cpu(), target[i].cpu(), depth[i].cpu()))
                if export is not None:
                    export_depth(export, name, depth[i].cpu().numpy(), protocol.units)
            seen += len(images)
            bar.update(len(images))
    model.train(was_training)
    if sheet is not None:
        pictures.save_depth_sheet(sheet, rows)
    if not results:
        raise InputError("no image of the set has a valid depth inside the benchmark's box")
    means = {name: sum(r[name] for r in results) / len(results) for name in DEPTH_METRICS}
    return {**means, "images": len(results)}


def export_depth(folder: Path, name: str, depth: np.ndarray, units: float) -> None:
    """Write metres as a 16-bit PNG, named SCENE_FILE.png as the official code does."""
    path = Path(name)
    scene = depth_data.recording(path) if path.parent.name else "image"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(depth * units, 0, 65535).astype(np.uint16)).save(
        folder / f"{scene}_{path.stem}.png".replace(" ", "_"))


def evaluate(model: MetaPromptModel, dataset, protocol, dtype: torch.dtype, *, workers: int = 0,
             sheet: Path | None = None) -> dict:
    """Metrics of the whole set for the model's task; see evaluate_seg and evaluate_depth."""
    task = evaluate_seg if model.config.task == "seg" else evaluate_depth
    return task(model, dataset, protocol, dtype, workers=workers, sheet=sheet)


def summary(metrics: dict) -> str:
    """The scalar metrics in one line."""
    return "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))


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

DEFAULTS = {"task": "seg", "dataset": "shapes", "data": None, "crop": 128, "scale": None, "seed": 0,
            "train_scenes": 20_000, "val_scenes": 300, "train_list": None, "val_list": None,
            "depth_scale": 1000.0}  # where neither the command nor the run's recipe says


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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="run folder of train.py, or a saved model")
    source.add_argument("--official", metavar="FILE", help="one of the authors' .pth / .ckpt files")
    parser.add_argument("--task", help="seg or depth; needed only to check an --official file")
    parser.add_argument("--dataset", help="default: the run's")
    parser.add_argument("--data", help="folder of the data set; default: the run's")
    parser.add_argument("--val-list", help="nyu, kitti: list file; default: the run's")
    parser.add_argument("--depth-scale", type=float, help="folder depth: PNG units per metre")
    parser.add_argument("--out", help="folder for pictures and metrics; default: RUN/eval")
    parser.add_argument("--export", help="depth: folder for 16-bit PNGs in the benchmark's unit")
    parser.add_argument("--save", help="write the model in our format into this folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"],
                        help="default: auto; float32 for an --official file")
    parser.add_argument("--workers", type=int, default=1, help="data loading processes")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[MetaPromptModel, dict, Path, Path]:
    """(model, what to evaluate it on as a recipe dict, file or folder read, default output)."""
    given = {k: v for k, v in vars(args).items() if k in DEFAULTS and v is not None}
    if args.checkpoint:
        folder = find_checkpoint(args.checkpoint)
        recipe = recipe_of(folder)
        if given.get("dataset", recipe.get("dataset")) != recipe.get("dataset"):
            recipe = {"task": recipe.get("task", "seg")}
        spec = {**DEFAULTS, **{k: v for k, v in recipe.items() if k in DEFAULTS}, **given}
        find_protocol(spec["task"], spec["dataset"])
        return MetaPromptModel.from_pretrained(folder), spec, folder, folder.parent / "eval"
    if args.task is None or args.dataset is None:
        raise InputError("--official needs --task and --dataset: the file does not hold them")
    spec = {**DEFAULTS, **given}
    protocol = find_protocol(spec["task"], spec["dataset"])
    if spec["task"] == "depth":
        model = MetaPromptModel.from_official(args.official, max_depth=protocol.max_depth,
                                              resize_scale=protocol.resize_scale)
        print(f"supplied   max_depth {protocol.max_depth}, resize_scale {protocol.resize_scale}: "
              f"the file does not hold them, the protocol of {spec['dataset']} does")
    else:
        model = MetaPromptModel.from_official(args.official)
    return model, spec, Path(args.official), Path("runs") / f"official-{spec['dataset']}"


def main() -> None:
    """Load, say what will be done, evaluate, write metrics.json and pictures."""
    args = parse()
    model, spec, source, default_out = load(args)
    out = Path(args.out) if args.out else default_out
    if model.config.task != spec["task"]:
        raise InputError(f"{source} is a model of task {model.config.task}, not {spec['task']}")
    if args.save:
        model.save_pretrained(args.save)
    protocol, dataset = find_protocol(spec["task"], spec["dataset"]), open_set(spec, "val")
    device = pick_device(args.device)
    dtype = pick_precision(args.precision or ("float32" if args.official else "auto"), device)
    print(f"model      {source}: {model.config}\ndata       {spec['dataset']}: {dataset.check()}\n"
          f"protocol   {asdict(protocol)}\ndevice     {device}, {dtype}\nout        {out}")
    if spec["task"] == "seg" and model.config.num_classes != len(dataset.classes.names):
        raise InputError(f"{source} predicts {model.config.num_classes} classes, the data set "
                         f"{spec['dataset']} has {len(dataset.classes.names)}")
    model.to(device)
    if spec["task"] == "seg":
        metrics = evaluate_seg(model, dataset, protocol, dtype, workers=args.workers,
                               sheet=out / "pictures.png")
        print_table(metrics, dataset.classes.names)
    else:
        metrics = evaluate_depth(model, dataset, protocol, dtype, workers=args.workers,
                                 sheet=out / "pictures.png",
                                 export=Path(args.export) if args.export else None)
        print(summary(metrics))
    write_report(out / "metrics.json", {"checkpoint": str(source), "dataset": spec["dataset"],
                                        "images": len(dataset), "protocol": asdict(protocol),
                                        **metrics})
    print(f"wrote {out / 'metrics.json'} and {out / 'pictures.png'}"
          + (f", {args.export}/*.png" if args.export else "")
          + (f", {args.save}" if args.save else ""))


def write_report(path: Path, report: dict) -> None:
    """Write a report as strict JSON, which knows no nan: null stands for it."""
    def clean(value):
        if isinstance(value, list):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and np.isnan(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: clean(v) for k, v in report.items()}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
