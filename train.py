"""Training: the recipe of each data set, and the loop, in execution order.

    python train.py --task seg                                       embedded scenes, tiny backbone
    python train.py --task seg --dataset ade20k --data PATH          the paper's recipe on SD1.5
    python train.py --task seg --dataset folder --data PATH          your own images and masks
    python train.py --task depth                                     the same scenes, metres
    python train.py --task depth --dataset nyu --data PATH --train-list FILE --val-list FILE
    python train.py --resume runs/seg-ade20k                         go on, exact to the bit

Every field of Recipe is a flag.  Writes RUN/{recipe.json, metrics.jsonl, last/, best/, pictures/}.
"""
import argparse
import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

import checkpoint
import data
import eval as evaluation
import weights
from errors import InputError, run_command
from model import Config, MetaPromptModel


@dataclass(frozen=True)
class Recipe:
    """One training run, resolved.  Defaults: ADE20K as in the paper (Tables 2 and 6)."""

    task: str = "seg"
    dataset: str = "ade20k"
    data: str | None = None  # folder of the data set
    train_list: str | None = None  # nyu, kitti: '<rgb> <depth>' lines
    val_list: str | None = None
    depth_scale: float = 1000.0  # folder depth: PNG units per metre
    out: str | None = None  # run folder; default runs/TASK-DATASET, numbered if it exists
    seed: int = 0

    backbone: str = weights.SD15  # hub id, folder, single file; "tiny": small, from random weights
    init: str = "auto"  # "random" must be given to train a full-width backbone from nothing
    num_prompts: int = 150  # N; paper Table 6
    refine_steps: int = 3  # T; paper Table 5
    shared_prompts: bool = True  # official: one matrix for all passes (seg), one per pass (depth)
    prompt_adapter: bool = False  # official: depth only
    latent_scale: float = 1.0  # official; 0.18215 is Stable Diffusion's
    head_channels: int = 512  # official: UPerHead 512, depth decoder 192
    max_depth: float = 10.0  # depth, metres
    resize_scale: int = 0  # depth: see model.enlarge
    dropout: float = 0.0  # official: 0 on ADE20K
    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # to norm_groups: for "tiny"
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    context_dim: int = 768  # D
    num_heads: int = 8
    latent_channels: int = 4
    norm_groups: int = 32

    iterations: int = 80_000  # optimiser steps; paper Table 2
    batch: int = 16  # images per optimiser step; paper Table 6 (released configs: 8)
    micro_batch: int = 2  # images at once; BatchNorm needs >= 2; the rest is accumulated
    lr: float = 8e-5  # paper A.1
    schedule: str = "poly"  # "poly": linear decay to 0; "two-phase": the official depth schedule
    min_lr: float = 0.0  # two-phase only
    unet_lr_mult: float = 0.1  # official: configs/ade.py
    weight_decay: float = 1e-3  # paper Table 6
    warmup: int = 1500  # paper Table 6
    warmup_ratio: float = 1e-6  # official
    crop: int = 512  # paper Table 2; side of a scene for shapes
    scale: tuple[int, ...] | None = (2048, 512)  # official; (long, short) bounds before the ratio
    train_scenes: int = 20_000  # shapes only: per epoch, new ones in each
    val_scenes: int = 300  # shapes only

    precision: str = "auto"  # bfloat16 autocast where it is fast; float32 otherwise
    compile: bool = False
    gradient_checkpointing: bool = True  # official; recompute UNet blocks instead of storing them
    device: str = "auto"
    workers: int = 4
    log_every: int = 50
    eval_every: int = 8000  # official
    save_every: int = 1000


# What a tiny backbone from random weights gets instead: ours, not yet tuned (see the README).
TINY = {
    "backbone": "tiny", "num_prompts": 32, "head_channels": 64, "context_dim": 64, "num_heads": 1,
    "unet_channels": (32, 64, 96, 128), "vae_channels": (16, 32, 64, 64), "latent_channels": 16,
    "norm_groups": 8,
    "refine_steps": 2, "iterations": 260, "batch": 8, "micro_batch": 8, "lr": 1e-3,
    "unet_lr_mult": 1.0, "weight_decay": 1e-2, "warmup": 20, "crop": 128, "scale": None,
    "workers": 0,
    "gradient_checkpointing": False, "log_every": 10, "eval_every": 130, "save_every": 130,
}

TINY_DEPTH = {**TINY, "head_channels": 32, "max_depth": 80.0, "resize_scale": 0, "schedule": "poly",
              "lr": 3e-3, "unet_lr_mult": 0.3, "iterations": 180, "eval_every": 90}

DEPTH = Recipe(  # paper Table 7 and A.2; spec B.4
    task="depth", dataset="nyu", num_prompts=50, shared_prompts=False, prompt_adapter=True,
    head_channels=192, max_depth=10.0, resize_scale=1, iterations=25 * 1009, batch=24,
    micro_batch=3, lr=5e-4, schedule="two-phase", min_lr=3e-5, unet_lr_mult=0.01,
    weight_decay=0.1, warmup=0, crop=480, scale=None, eval_every=1009)

RECIPES = {
    ("seg", "shapes"): replace(Recipe(dataset="shapes"), **TINY),
    ("seg", "folder"): Recipe(dataset="folder", scale=None),  # ours: ADE20K's, images at own size
    ("seg", "ade20k"): Recipe(),
    ("depth", "shapes"): replace(DEPTH, dataset="shapes", **TINY_DEPTH),
    ("depth", "folder"): replace(DEPTH, dataset="folder", max_depth=80.0),  # ours
    ("depth", "nyu"): DEPTH,
    ("depth", "kitti"): replace(DEPTH, dataset="kitti", max_depth=80.0, resize_scale=2, crop=352,
                                iterations=25 * 965, eval_every=965),
}


# ------------------------------------------------------------------------------------------------
# Command line

def flag_type(annotation):
    """How argparse reads a field of this annotation."""
    return {int: int, float: float}.get(annotation, int if "tuple" in str(annotation) else str)


def parse(arguments: list[str]) -> argparse.Namespace:
    """One flag per field of Recipe, plus --resume; a flag not given is None."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="RUN", help="continue RUN with its own recipe")
    for field in fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(name, type=flag_type(field.type), default=None,
                                nargs="+" if "tuple" in str(field.type) else None)
    return parser.parse_args(arguments)


def resolve(args: argparse.Namespace) -> Recipe:
    """Recipe of the data set, with what was given on the command line; InputError if impossible."""
    given = {k: tuple(v) if isinstance(v, list) else v
             for k, v in vars(args).items() if v is not None and k != "resume"}
    if args.resume:
        if given:
            raise InputError(f"--resume takes the run's recipe: leave out --{next(iter(given))}")
        return replace(read_recipe(Path(args.resume) / "recipe.json"), out=args.resume)
    task, dataset = given.get("task", "seg"), given.get("dataset", "shapes")
    evaluation.find_protocol(task, dataset)
    recipe = RECIPES[task, dataset]
    if given.get("backbone") == "tiny":
        recipe = replace(recipe, **(TINY if task == "seg" else TINY_DEPTH))
    recipe = replace(recipe, **given)
    check(recipe)
    return replace(recipe, out=recipe.out or free_folder(f"runs/{recipe.task}-{recipe.dataset}"))


def check(recipe: Recipe) -> None:
    """InputError if a recipe cannot work, before anything is loaded."""
    if recipe.schedule not in ("poly", "two-phase"):
        raise InputError(f"--schedule {recipe.schedule}: poly or two-phase")
    if recipe.task == "seg" and recipe.micro_batch < 2:
        raise InputError(f"--micro-batch {recipe.micro_batch}: segmentation needs 2 or more images "
                         "at once, BatchNorm cannot normalise a single 1x1 map")
    if recipe.batch % recipe.micro_batch:
        raise InputError(f"--batch {recipe.batch} is no multiple of --micro-batch "
                         f"{recipe.micro_batch}")
    if recipe.crop % 64 and recipe.resize_scale == 0:
        raise InputError(f"--crop {recipe.crop} is no multiple of 64, the UNet's coarsest stride")
    if recipe.init not in ("auto", "random"):
        raise InputError(f"--init {recipe.init}: auto or random")
    if recipe.precision not in ("auto", "bfloat16", "float32"):
        raise InputError(f"--precision {recipe.precision}: auto, bfloat16 or float32")
    if recipe.backbone == "tiny" and max(recipe.unet_channels) >= 640 and recipe.init != "random":
        raise InputError(f"--unet-channels {recipe.unet_channels} is a full-width backbone with "
                         "random weights, which learns little: give --backbone SOURCE, or --init "
                         "random if you mean it")
    for name in ("iterations", "log_every", "eval_every", "save_every", "num_prompts",
                 "refine_steps"):
        if getattr(recipe, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: at least 1")
    for name in ("unet_channels", "vae_channels"):
        widths, groups = getattr(recipe, name), recipe.norm_groups
        if len(widths) != 4 or any(c % groups for c in widths):
            raise InputError(f"--{name.replace('_', '-')} {widths}: four multiples of "
                             f"--norm-groups {groups}")


def free_folder(base: str) -> str:
    """`base`, or base-2, base-3, ... if it exists: no run overwrites another."""
    path, number = base, 1
    while Path(path).exists():
        number += 1
        path = f"{base}-{number}"
    return path


def read_recipe(path: Path) -> Recipe:
    """recipe.json -> Recipe; InputError naming what does not fit."""
    values = weights.read_json(path)
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise InputError(f"{path}: unknown field {unknown[0]}")
    return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ------------------------------------------------------------------------------------------------
# Pieces of the loop

def lr_factor(step: int, recipe: Recipe) -> float:
    """Learning rate at `step` (0-based) over recipe.lr.

    poly: linear decay to 0 under a linear warm-up (official: mmcv, power 1, spec A.4).
    two-phase: from min_lr up for 12/25 of the run, down again for as long, then min_lr; power 0.9
    (official: depth/train.py, spec B.4).
    """
    if recipe.schedule == "two-phase":
        x, low = (step + 1) / (recipe.iterations / 25 * 12), recipe.min_lr / recipe.lr
        return (1 - low) * x ** 0.9 + low if x < 1 else max(low, 1 - (1 - low) * (x - 1) ** 0.9)
    factor = 1 - step / recipe.iterations
    if step < recipe.warmup:
        factor *= 1 - (1 - step / recipe.warmup) * (1 - recipe.warmup_ratio)
    return factor


def build_model(recipe: Recipe, class_names: tuple[str, ...]) -> MetaPromptModel:
    """A new model: on pretrained weights, or from random ones (whose encoder is trained, too)."""
    tiny = recipe.backbone == "tiny"
    config = Config(
        task=recipe.task, num_prompts=recipe.num_prompts, refine_steps=recipe.refine_steps,
        shared_prompts=recipe.shared_prompts, prompt_adapter=recipe.prompt_adapter,
        latent_scale=recipe.latent_scale, num_classes=len(class_names), class_names=class_names,
        head_channels=recipe.head_channels, max_depth=recipe.max_depth,
        resize_scale=recipe.resize_scale, dropout=recipe.dropout,
        train_encoder=tiny or recipe.init == "random", unet_channels=recipe.unet_channels,
        vae_channels=recipe.vae_channels, context_dim=recipe.context_dim,
        num_heads=recipe.num_heads, latent_channels=recipe.latent_channels,
        norm_groups=recipe.norm_groups)
    torch.manual_seed(recipe.seed)
    if config.train_encoder:
        print("backbone   RANDOM weights (no Stable Diffusion): the VAE encoder is trained, too")
        model = MetaPromptModel(config)
    else:
        model = MetaPromptModel.from_stable_diffusion(config, recipe.backbone)
        print(f"backbone   {recipe.backbone}: pretrained, VAE encoder frozen")
    return model.train()


def build_optimizer(model: MetaPromptModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the model's groups; fused, which is faster and rounds the same on every call."""
    groups = model.param_groups(recipe.lr, recipe.unet_lr_mult, recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)


def train_step(loss_of, optimizer, batches, recipe: Recipe, step: int, device, dtype) -> dict:
    """One optimiser step from batch / micro_batch micro-batches; returns its mean losses.

    Raises FloatingPointError with the images' names if a loss is not finite; the weights are then
    still those of the step before.
    """
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout: a function of the step alone
    accumulate, means = recipe.batch // recipe.micro_batch, {}
    for _ in range(accumulate):
        batch = next(batches)
        images = batch["image"].to(device, non_blocking=True)
        target = batch["target"].to(device, non_blocking=True)
        with evaluation.autocast(device, dtype):
            losses = loss_of(images, target)
        total = sum(losses.values()) / accumulate
        if not math.isfinite(total.item()):
            optimizer.zero_grad()
            raise FloatingPointError(f"the loss is {total.item()} at step {step}; the images: "
                                     f"{', '.join(batch['name'])}")
        total.backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.item() / accumulate
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": sum(means.values()), **means}


def peak_gb(device: torch.device) -> float:
    """Peak memory so far in GB: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Log:
    """metrics.jsonl: one line per record; on resuming, records after the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
        self.path = path

    def write(self, record: dict) -> None:
        """Append a record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------
# The loop

def train(recipe: Recipe, resume: bool) -> dict:
    """Train to the end of the recipe; returns the best metrics."""
    run = Path(recipe.out)
    device = evaluation.pick_device(recipe.device)
    dtype = evaluation.pick_precision(recipe.precision, device)
    protocol = evaluation.find_protocol(recipe.task, recipe.dataset)
    main_metric, sign = evaluation.MAIN_METRIC[recipe.task]

    # Data, checked before anything slow.
    train_set, val_set = (evaluation.open_set(asdict(recipe), split) for split in ("train", "val"))
    print(f"training   {train_set.check()}\nvalidation {val_set.check()}")

    # Model and optimiser: new, or where the run left off.
    if resume:
        folder = checkpoint.find_last(run)
        state = weights.read_json(folder / "state.json")
        model = checkpoint.load_model(folder).to(device)
        optimizer = build_optimizer(model, recipe)
        checkpoint.load_optimizer(folder, model, optimizer)
        print(f"resuming   {folder} at step {state['step']}")
    else:
        state = {"step": 0, "best": None}
        names = train_set.classes.names if recipe.task == "seg" else ()
        model = build_model(recipe, names).to(device)
        optimizer = build_optimizer(model, recipe)
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    loss_of = torch.compile(model.loss) if recipe.compile else model.loss
    print_plan(recipe, run, model, device, dtype)

    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    log = Log(run / "metrics.jsonl", state["step"])
    accumulate = recipe.batch // recipe.micro_batch
    batches = Timed(data.train_loader(train_set, recipe.micro_batch, recipe.seed,
                                      state["step"] * accumulate, recipe.workers))
    bar = tqdm(total=recipe.iterations, initial=state["step"], desc="train", unit="step")
    mark = time.perf_counter()
    for step in range(state["step"], recipe.iterations):
        # One optimiser step at this step's learning rate.
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * group["lr_scale"] * lr_factor(step, recipe)
        losses = train_step(loss_of, optimizer, batches, recipe, step, device, dtype)
        bar.update()
        bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
        done = step + 1
        # Log.
        if done % recipe.log_every == 0 or done == recipe.iterations:
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            log.write({"step": done, **losses, "lr": recipe.lr * lr_factor(step, recipe),
                       "images_per_s": recipe.log_every * recipe.batch / seconds,
                       "data_wait": batches.waited / seconds, "peak_gb": peak_gb(device)})
            batches.waited = 0.0
        # Evaluate, draw, keep the best.
        if done % recipe.eval_every == 0 or done == recipe.iterations:
            metrics = evaluation.evaluate(
                model, val_set, protocol, dtype, workers=recipe.workers,
                sheet=run / "pictures" / f"step_{done:06d}.png")
            log.write({"step": done, **{k: v for k, v in metrics.items() if isinstance(v, float)}})
            bar.write(f"step {done}: {evaluation.summary(metrics)}  loss {losses['loss']:.3f}")
            if state["best"] is None or sign * (metrics[main_metric] - state["best"]) > 0:
                state["best"] = metrics[main_metric]
                checkpoint.save_best(run, model)
            mark = time.perf_counter()
        # Save, after the evaluation: a resumed run does not repeat it.
        if done % recipe.save_every == 0 or done == recipe.iterations:
            state["step"] = done
            checkpoint.save_last(run, model, optimizer, state)
    bar.close()
    return {"best": state["best"], "metric": main_metric, "run": str(run)}


class Timed:
    """Iterator over a loader that adds up the seconds it keeps the loop waiting."""

    def __init__(self, loader):
        self.iterator, self.waited = iter(loader), 0.0

    def __next__(self):
        start = time.perf_counter()
        batch = next(self.iterator)
        self.waited += time.perf_counter() - start
        return batch


def print_plan(recipe: Recipe, run: Path, model: MetaPromptModel, device, dtype) -> None:
    """Say what is about to happen."""
    print("recipe     " + json.dumps(asdict(recipe)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    every = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model      {every:.1f} M parameters, {trained:.1f} M trained; T = "
          f"{recipe.refine_steps}, N = {recipe.num_prompts}\ndevice     {device}, {dtype}, torch "
          f"{torch.__version__}\nout        {run}", flush=True)


def main() -> None:
    """Parse, train, say where the result is."""
    args = parse(sys.argv[1:])
    recipe = resolve(args)
    if not args.resume and (Path(recipe.out) / "recipe.json").exists():
        raise InputError(f"--out {recipe.out} holds a run already: --resume {recipe.out}, or give "
                         "another folder")
    start = time.perf_counter()
    result = train(recipe, resume=bool(args.resume))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"best {result['metric']} {result['best']:.4f} after {recipe.iterations} steps "
          f"in {minutes}:{seconds:02d}\nwrote {result['run']}/ (best/, last/, metrics.jsonl, pictures/)")


if __name__ == "__main__":
    run_command(main)
