"""Evaluation: how a trained model is run on whole images, for each data set's protocol.

    python eval.py --checkpoint runs/seg-shapes
    python eval.py --checkpoint runs/seg-ade20k --data /path/to/ADEChallengeData2016
    python eval.py --official nyu.ckpt --task depth --dataset nyu --data DATA --val-list LIST
    python eval.py --checkpoint runs/pose-coco --boxes COCO_val2017_detections_AP_H_56_person.json
    python eval.py --checkpoint RUN --image FILE|FOLDER [--heatmaps]      your own images: apply.py
    python eval.py --checkpoint RUN --protocol                            what would be done

Segmentation follows mmsegmentation 0.30.0 (spec A.5): overlapping windows, their logits averaged,
resized to the original image, argmax; intersections and unions summed over all images.
Depth follows the official code (spec B.6): shifted windows and their mirror images averaged,
metrics per image inside the benchmark's box, then the mean over images.
Pose follows mmpose 1.x (pose spec 6 and 7): people from their boxes, COCO's OKS statistics.
"""
import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image

import apply
from sets import cityscapes as city_data
import data
from sets import nyu_kitti as depth_data
from tools import heatmaps
from ops import oks
from ops import parallel
from ops import draw as pictures
from ops import udp as pose
from sets import coco as pose_data
from weights import files as weights
from ops.errors import InputError, run_command
from metrics import DEPTH_METRICS, confusion, depth_metrics, seg_metrics, valid_depth
from model import MetaPromptModel
from predict import (DepthProtocol, PoseProtocol, Protocol, find_protocol, in_words, pick_device,
                     pick_precision, predict_depth, predict_pose, predict_seg, settle, with_tta)

PICTURES = 8  # images of the set drawn in a report, evenly spread
# What "best" means, and its sign.
MAIN_METRIC = {"seg": ("mIoU", 1), "depth": ("rmse", -1), "pose": ("AP", 1)}


def open_set(spec: dict, split: str):
    """The data set that `spec`, a recipe as a dict, names, for "train" or "val"; or InputError."""
    protocol = find_protocol(spec["task"], spec["dataset"])
    if spec["task"] == "pose":
        spec = {**spec, "crop_width": spec["crop_width"] or spec["crop"]}
        if spec["dataset"] != "shapes":
            return pose_data.open_dataset(spec, split)
        return pose_data.ShapesPose(spec[f"{split}_scenes"], training=split == "train",
                                    crop=(spec["crop"], spec["crop_width"]),
                                    size=pose_data.SCENE_SIDE, augmented=spec["augment"],
                                    seed=spec["seed"])
    if spec["dataset"] == "shapes":
        return data.Shapes(spec[f"{split}_scenes"], task=spec["task"], training=split == "train",
                           size=spec["crop"], seed=spec["seed"])
    if spec["task"] == "depth":
        return depth_data.open_dataset(spec, split)
    scale = spec["scale"] if split == "train" else protocol.scale
    if spec["dataset"] in city_data.NAMES:
        return city_data.open_dataset(spec, split, scale)
    return data.open_dataset(spec["dataset"], spec["data"], split, size=spec["crop"], scale=scale,
                             seed=spec["seed"])


# ------------------------------------------------------------------------------------------------
# Whole sets

def on_device(dataset, batch: int, workers: int, device: torch.device):
    """This process's share of the set in order, with a progress bar: (batch, images, target,
    samples to draw).
    """
    chosen = {len(dataset) * i // PICTURES for i in range(PICTURES)}
    loader = data.eval_loader(dataset, batch, workers)
    with tqdm(total=sum(map(len, loader.batch_sampler)), desc="evaluate", unit="image",
              leave=False, disable=parallel.rank() > 0) as bar:
        for number, samples in enumerate(loader):
            first = batch * (number * parallel.world() + parallel.rank())
            images = samples["image"].to(device, non_blocking=True)
            drawn = [i for i in range(len(images)) if first + i in chosen]
            yield samples, images, samples["target"].to(device), drawn
            bar.update(len(images))


def merged(parts: list[list]) -> list:
    """Items of the whole set in order, from lists for each batch of this process."""
    return [item for part in parallel.in_order(parts) for item in part]


def evaluate_seg(model: MetaPromptModel, dataset, protocol: Protocol, dtype: torch.dtype, *,
                 workers: int = 0, sheet: Path | None = None, export: Path | None = None) -> dict:
    """Metrics of the whole set.

    `sheet`: a PNG of some images, truth and prediction.  `export`: a folder for label PNGs as the
    benchmark's server wants them.
    """
    device = next(model.parameters()).device
    num_classes = len(dataset.classes.names)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    rows = []
    for batch, images, target, drawn in on_device(dataset, protocol.batch, workers, device):
        probs = predict_seg(model, images, target.shape[-2:], protocol, dtype)
        prediction = probs.argmax(dim=1)
        counts += confusion(prediction, target, num_classes)
        if export is not None:
            for i, name in enumerate(batch["name"]):
                data.export_labels(export, name, prediction[i].cpu().numpy(), dataset.classes)
        rows.append([(images[i].cpu(), target[i].cpu(), prediction[i].cpu()) for i in drawn])
    rows = merged(rows)
    if sheet is not None:
        pictures.save_seg_sheet(sheet, rows, dataset.classes)
    return seg_metrics(parallel.total(counts).cpu())


def evaluate_depth(model: MetaPromptModel, dataset, protocol: DepthProtocol, dtype: torch.dtype,
                   *, workers: int = 0, sheet: Path | None = None,
                   export: Path | None = None) -> dict:
    """The nine metrics, each the mean over images with a valid pixel; `images` counts those.

    `sheet`: a PNG of some images, truth, prediction, error.  `export`: a folder for 16-bit PNGs in
    the benchmark's unit.
    """
    device = next(model.parameters()).device
    results, rows = [], []
    for batch, images, target, drawn in on_device(dataset, protocol.batch, workers, device):
        depth = predict_depth(model, images, protocol, dtype)
        depth = depth.nan_to_num(nan=protocol.min_depth, posinf=protocol.max_depth)
        results.append([])
        for i, name in enumerate(batch["name"]):
            valid = valid_depth(target[i], protocol.box, protocol.min_depth, protocol.max_depth)
            if valid.any():
                results[-1].append(depth_metrics(depth[i][valid], target[i][valid]))
            if export is not None:
                export_depth(export, name, depth[i].cpu().numpy(), protocol.units)
        rows.append([(images[i].cpu(), target[i].cpu(), depth[i].cpu()) for i in drawn])
    results, rows = merged(results), merged(rows)
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


def evaluate_pose(model: MetaPromptModel, dataset, protocol: PoseProtocol, dtype: torch.dtype, *,
                  workers: int = 0, sheet: Path | None = None, export: Path | None = None) -> dict:
    """COCO's ten OKS statistics (oks.py); with annotated boxes also PCK, the share of joints whose
    peak is within 5 % of the crop.

    `sheet`: a PNG of some people, truth, prediction, heatmaps.  `export`: a folder for
    keypoints.json, the results in COCO's format.
    """
    device = next(model.parameters()).device
    people, rows, hits, joints = [], [], 0, 0
    for batch, images, target, drawn in on_device(dataset, protocol.batch, workers, device):
        center, scale = batch["center"].to(device), batch["scale"].to(device)
        xy, score, heatmaps = predict_pose(model, images, center, scale, protocol, dtype)
        crop, size = images.shape[-2:], heatmaps.shape[-2:]
        wanted, weight = pose.heatmap_targets(target, crop, size, model.config.sigma)
        hit, labelled = pose.pck(heatmaps, wanted, weight)
        hits, joints = hits + int(hit), joints + int(labelled)
        found = torch.cat([xy, score[..., None].double()], dim=-1).cpu()       # (B, 17, 3)
        people.append((batch["id"], batch["image_id"], batch["score"], found,
                       batch["scale"].prod(dim=-1)))
        rows.append([(images[i].cpu(), target[i].cpu(), pose.to_crop(found[i], batch["center"][i],
                                                                     batch["scale"][i], crop),
                      heatmaps[i].cpu()) for i in drawn])
    people, rows = parallel.in_order(people), merged(rows)
    hits, joints = parallel.total(torch.tensor([hits, joints])).tolist()
    results = coco_results([torch.cat(column).numpy() for column in zip(*people)], protocol.nms)
    if export is not None:
        export.mkdir(parents=True, exist_ok=True)
        (export / "keypoints.json").write_text(json.dumps(results))
    if sheet is not None:
        pictures.save_pose_sheet(sheet, rows)
    metrics = oks.evaluate(dataset.annotations, results)
    return {**metrics, "PCK": hits / joints} if joints else metrics


def coco_results(people: list[np.ndarray], threshold: float) -> list[dict]:
    """COCO's results from columns over P people: (P,) ids, (P,) image ids, (P,) box scores,
    (P, 17, 3) joints x, y, score, (P,) areas of the padded boxes.

    Per image the people that OKS-NMS keeps, best first (pose spec 7.1 to 7.3).
    """
    ids, image_ids, box_scores, joints, areas = people
    scores = oks.instance_scores(joints[..., 2], box_scores)
    results = []
    for image in np.unique(image_ids):
        here = np.flatnonzero(image_ids == image)
        here = here[np.argsort(ids[here], kind="stable")]
        for i in here[oks.oks_nms(joints[here], scores[here], areas[here], threshold)]:
            results.append({"image_id": int(image), "category_id": 1, "score": float(scores[i]),
                            "keypoints": joints[i].ravel().tolist()})
    return results


EVALUATE = {"seg": evaluate_seg, "depth": evaluate_depth, "pose": evaluate_pose}


def evaluate(model: MetaPromptModel, dataset, protocol, dtype: torch.dtype, *, workers: int = 0,
             sheet: Path | None = None) -> dict:
    """Metrics of the whole set for the model's task; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    metrics = EVALUATE[model.config.task](model, dataset, protocol, dtype, workers=workers,
                                          sheet=sheet)
    model.train(was_training)
    return metrics


def summary(metrics: dict) -> str:
    """The scalar metrics in one line."""
    return "  ".join(f"{k} {v:.4f}" if v >= 0 else f"{k} n/a"  # n/a: nobody of that size
                     for k, v in metrics.items() if isinstance(v, float))


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

# Where neither the command nor the run's recipe says.
DEFAULTS = {"task": "seg", "dataset": "shapes", "data": None, "crop": 128, "scale": None, "seed": 0,
            "train_scenes": 20_000, "val_scenes": 300, "train_list": None, "val_list": None,
            "depth_scale": 1000.0, "crop_width": None, "train_json": None, "val_json": None,
            "images": None, "boxes": None, "augment": True}


def find_checkpoint(run: str, flag: str = "--checkpoint") -> Path:
    """Folder of a run's model: RUN/best, else RUN/last, else RUN itself; or InputError."""
    for folder in (Path(run) / "best", Path(run) / "last", Path(run)):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"{flag} {run}: neither it nor its best/ or last/ holds a config.json")


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
    parser.add_argument("--task", help="seg or depth; needed only with --official")
    parser.add_argument("--dataset", help="default: the run's")
    parser.add_argument("--data", help="folder of the data set; default: the run's")
    parser.add_argument("--val-list", help="nyu, kitti: list file; default: the run's")
    parser.add_argument("--depth-scale", type=float, help="folder depth: PNG units per metre")
    parser.add_argument("--val-json", help="pose: annotations in COCO's format")
    parser.add_argument("--images", help="pose: folder of their images")
    parser.add_argument("--boxes", help="pose: detected boxes; default: the annotated people's")
    parser.add_argument("--image", metavar="FILE|FOLDER",
                        help="predict your own images instead, see apply.py")
    parser.add_argument("--max-side", type=int, help="with --image: longer side that the model "
                        "gets if the protocol has no scale; default: twice the training crop")
    parser.add_argument("--heatmaps", nargs="?", const="some", metavar="K|I,J,...",
                        help="with --image: maps of the K prompts that say most (6), or of these")
    parser.add_argument("--tta", action="store_true", help="seg: 7 scales and mirror images")
    parser.add_argument("--protocol", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--out", help="folder for pictures and metrics; default: RUN/eval, "
                        "with --boxes RUN/eval-BOXES, with --image RUN/predictions")
    parser.add_argument("--export", help="folder for seg: label PNGs as the benchmark's server "
                        "wants them; depth: 16-bit PNGs in its unit; pose: keypoints.json")
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
        out = f"eval-{Path(args.boxes).stem}" if args.boxes else "eval"  # never mix box files
        return MetaPromptModel.from_pretrained(folder), spec, folder, folder.parent / out
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
    apply.check(args)
    model, spec, source, default_out = load(args)
    out = Path(args.out) if args.out else default_out
    if model.config.task != spec["task"]:
        raise InputError(f"{source} is a model of task {model.config.task}, not {spec['task']}")
    protocol = find_protocol(spec["task"], spec["dataset"])
    protocol = with_tta(protocol) if args.tta else protocol
    if args.protocol:
        print(in_words(protocol))
        return
    if args.save:
        model.save_pretrained(args.save)
    device = pick_device(args.device)
    dtype = pick_precision(args.precision or ("float32" if args.official else "auto"), device)
    settle(model, dtype)
    if args.image:
        folder = default_out.parent if args.checkpoint else default_out
        out = Path(args.out) if args.out else folder / "predictions"
        print(f"model      {source}: {model.config}\nprotocol   {asdict(protocol)}\n"
              f"device     {device}, {dtype}\nout        {out}")
        setup = apply.set_up(args, model.config, protocol, spec["dataset"], source, dtype)
        apply.run(args, model.to(device).eval(), setup, out)
        return
    dataset = open_set(spec, "val")
    if args.tta:
        dataset.scale = None                                 # predict_seg makes all scales itself
    print(f"model      {source}: {model.config}\ndata       {spec['dataset']}: {dataset.check()}\n"
          f"protocol   {asdict(protocol)}\ndevice     {device}, {dtype}\nout        {out}")
    if spec["task"] == "seg" and model.config.num_classes != len(dataset.classes.names):
        raise InputError(f"{source} predicts {model.config.num_classes} classes, the data set "
                         f"{spec['dataset']} has {len(dataset.classes.names)}")
    model.to(device)
    sheet, export = out / "pictures.png", Path(args.export) if args.export else None
    model.eval()
    if spec["task"] == "seg":
        metrics = evaluate_seg(model, dataset, protocol, dtype, workers=args.workers,
                               sheet=sheet, export=export)
        print_table(metrics, dataset.classes.names)
    elif spec["task"] == "depth":
        metrics = evaluate_depth(model, dataset, protocol, dtype, workers=args.workers,
                                 sheet=sheet, export=export)
        print(summary(metrics))
    else:
        metrics = evaluate_pose(model, dataset, protocol, dtype, workers=args.workers,
                                sheet=sheet, export=export or out)
        print(f"{summary(metrics)}  ({dataset.boxes})")
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
