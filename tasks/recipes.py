"""Recipes: every setting of a training run, its value per task and data set, and the flags.

Each field of Recipe is a flag of train.py; RECIPES holds the resolved values, with their source
beside them where it isn't the paper's table.  recipe.json in a run folder is one Recipe.
"""
import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

import predict
from weights import files as weights
from ops.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """One training run, resolved.  Defaults: ADE20K as in the paper (Tables 2 and 6)."""

    task: str = "seg"
    dataset: str = "ade20k"
    data: str | None = None  # folder of the data set
    train_list: str | None = None  # nyu, kitti: '<rgb> <depth>' lines
    val_list: str | None = None
    depth_scale: float = 1000.0  # folder depth: PNG units per metre
    extra_images: str = "leftImg8bit/train_extra"  # cityscapes-extra: folders below --data
    extra_labels: str = "convert_autolabelled"  # official; others: see city_data.py
    extra_suffix: str = "_gtFine_labelTrainIds.png"  # instead of _leftImg8bit.png
    extra_label_ids: bool = False  # they hold label ids although their names don't say so
    train_json: str | None = None  # pose: annotations in COCO's format, instead of the layout's
    val_json: str | None = None
    images: str | None = None  # pose: folder of both splits' images, instead of the layout's
    augment: bool = True  # pose; False: crops as in evaluation, for endless scenes or to overfit
    boxes: str | None = None  # pose: file of detected boxes to evaluate on; None: annotated people
    out: str | None = None  # run folder; default runs/TASK-DATASET, numbered if it exists
    seed: int = 0

    backbone: str = weights.SD15  # hub id, folder, single file; "tiny": small, from random weights
    init: str = "auto"  # "random" must be given to train a full-width backbone from nothing
    init_from: str | None = None  # run to start from, for a second stage (Mapillary -> Cityscapes)
    num_prompts: int = 150  # N; paper Table 6
    refine_steps: int = 3  # T; paper Table 5
    shared_prompts: bool = True  # official: one matrix for all passes (seg), one per pass (depth)
    prompt_adapter: bool = False  # official: depth only; comes with `prompts`
    prompts: str | None = None  # .safetensors of one tensor (N, D): fixed text embeddings (Table 5)
    modulated_timestep: bool = True  # False: SD's embedding of t=0 in every pass (paper Table 5)
    rearrange: bool = True  # False: the head reads the projected features (paper Table 5)
    latent_scale: float = 1.0  # official; 0.18215 is Stable Diffusion's
    head_channels: int = 512  # official: UPerHead 512, depth decoder 192; not in pose
    max_depth: float = 10.0  # depth, metres
    resize_scale: int = 0  # depth: see model.enlarge
    deconv_channels: tuple[int, ...] = (256,)  # pose; ours, the paper does not say
    sigma: float = 4.0  # pose, heatmap pixels; ours
    dropout: float = 0.0  # official: 0 on ADE20K
    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # to norm_groups: for "tiny"
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    context_dim: int = 768  # D
    num_heads: int = 8
    latent_channels: int = 4
    norm_groups: int = 32
    unet_layers: int = 2
    vae_layers: int = 2

    iterations: int = 80_000  # optimiser steps; paper Table 2
    batch: int = 16  # images per optimiser step; paper Table 6 (released configs: 8)
    micro_batch: int = 2  # images at once; BatchNorm needs >= 2; the rest is accumulated
    memory: float = 0.0  # GB of a GPU; above 0: the largest micro-batch that fits replaces the above
    lr: float = 8e-5  # paper A.1
    schedule: str = "poly"  # linear decay to 0; "two-phase": official depth; "step": pose
    min_lr: float = 0.0  # two-phase only
    unet_lr_mult: float = 0.1  # official: configs/ade.py
    muon_lr: float = 0.0  # above 0: of all layers' weights, which Muon moves (muon.py); ours
    weight_decay: float = 1e-3  # paper Table 6
    warmup: int = 1500  # paper Table 6
    warmup_ratio: float = 1e-6  # official
    clip: float = 0.0  # largest norm of the gradient; 0: not clipped
    crop: int = 512  # paper Table 2; height of the crop; for shapes the side of a scene
    crop_width: int | None = None  # pose; None: as high
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


# What a tiny backbone from random weights gets instead: ours.  Cheap rather than good, and Muon,
# without which its features collapse (muon.py).
TINY = {
    "backbone": "tiny", "num_prompts": 32, "head_channels": 32, "context_dim": 64, "num_heads": 1,
    "unet_channels": (32, 32, 64, 64), "vae_channels": (8, 16, 32, 64), "latent_channels": 16,
    "norm_groups": 8, "unet_layers": 1, "vae_layers": 1, "refine_steps": 2, "iterations": 600,
    "batch": 8, "micro_batch": 8, "lr": 5e-3, "unet_lr_mult": 0.15, "muon_lr": 0.02,
    "weight_decay": 1e-2, "warmup": 20, "crop": 128, "scale": None, "workers": 0,
    "gradient_checkpointing": False, "log_every": 10, "eval_every": 300, "save_every": 300,
}

TINY_DEPTH = {**TINY, "max_depth": 80.0, "resize_scale": 0, "schedule": "poly", "val_scenes": 200,
              "unet_channels": (64, 64, 64, 64), "latent_channels": 32, "num_prompts": 64,
              "batch": 16, "micro_batch": 16, "iterations": 1500, "eval_every": 500}

TINY_POSE = {**TINY, "crop_width": 128, "sigma": 2.0, "deconv_channels": (64,), "clip": 0.0,
             "schedule": "poly", "lr": 1.5e-3, "unet_lr_mult": 1.0, "augment": False,
             "unet_channels": (64, 64, 64, 64), "latent_channels": 32, "num_prompts": 64,
             "batch": 16, "micro_batch": 16, "iterations": 500, "eval_every": 250,
             "save_every": 250, "val_scenes": 100}

CITYSCAPES = Recipe(  # paper A.1 and Table 6; official: configs/cityscapes.py
    dataset="cityscapes", crop=1024, scale=(2048, 1024), dropout=0.1)

DEPTH = Recipe(  # paper Table 7 and A.2; spec B.4
    task="depth", dataset="nyu", num_prompts=50, shared_prompts=False, prompt_adapter=True,
    head_channels=192, max_depth=10.0, resize_scale=1, iterations=25 * 1009, batch=24,
    micro_batch=3, lr=5e-4, schedule="two-phase", min_lr=3e-5, unet_lr_mult=0.01,
    weight_decay=0.1, warmup=0, crop=480, scale=None, eval_every=1009)

POSE = Recipe(  # paper A.3; what it leaves open as in decisions 10 and 11
    task="pose", dataset="coco", num_prompts=150, shared_prompts=False, prompt_adapter=True,
    iterations=210 * 2341, batch=64, micro_batch=4, lr=5e-4, schedule="step", unet_lr_mult=0.01,
    weight_decay=0.1, warmup=500, warmup_ratio=1e-3, clip=1.0, crop=576, crop_width=448,
    scale=None, eval_every=10 * 2341, save_every=2341)

RECIPES = {
    ("seg", "shapes"): replace(Recipe(dataset="shapes"), **TINY),
    ("seg", "folder"): Recipe(dataset="folder", scale=None),  # ours: ADE20K's, images at own size
    ("seg", "ade20k"): Recipe(),
    ("seg", "cityscapes"): CITYSCAPES,
    ("seg", "cityscapes-extra"): replace(CITYSCAPES, dataset="cityscapes-extra", refine_steps=1),
    ("seg", "mapillary"): replace(CITYSCAPES, dataset="mapillary"),  # ours: no schedule released
    ("depth", "shapes"): replace(DEPTH, dataset="shapes", **TINY_DEPTH),
    ("depth", "folder"): replace(DEPTH, dataset="folder", max_depth=80.0),  # ours
    ("depth", "nyu"): DEPTH,
    ("depth", "kitti"): replace(DEPTH, dataset="kitti", max_depth=80.0, resize_scale=2, crop=352,
                                iterations=25 * 965, eval_every=965),
    ("pose", "shapes"): replace(POSE, dataset="shapes", **TINY_POSE),
    ("pose", "folder"): replace(POSE, dataset="folder"),
    ("pose", "coco"): POSE,
}
TINY_OF = {"seg": TINY, "depth": TINY_DEPTH, "pose": TINY_POSE}


def lr_factor(step: int, recipe: Recipe) -> float:
    """Learning rate at `step` (0-based) over recipe.lr.

    poly: linear decay to 0 under a linear warm-up (official: mmcv, power 1, spec A.4).
    two-phase: from min_lr up for 12/25 of the run, down again for as long, then min_lr; power 0.9
    (official: depth/train.py, spec B.4).
    step: x 0.1 after 170 and after 200 of 210 parts of the run, linear warm-up (paper A.3; mmpose).
    """
    if recipe.schedule == "step":
        decay = 0.1 ** sum(step >= recipe.iterations * part // 210 for part in (170, 200))
        low = recipe.warmup_ratio
        return decay * min(1.0, low + (1 - low) * step / max(1, recipe.warmup - 1))
    if recipe.schedule == "two-phase":
        x, low = (step + 1) / (recipe.iterations / 25 * 12), recipe.min_lr / recipe.lr
        return (1 - low) * x ** 0.9 + low if x < 1 else max(low, 1 - (1 - low) * (x - 1) ** 0.9)
    factor = 1 - step / recipe.iterations
    if step < recipe.warmup:
        factor *= 1 - (1 - step / recipe.warmup) * (1 - recipe.warmup_ratio)
    return factor


# ------------------------------------------------------------------------------------------------
# Command line

COMMANDS = ("resume", "ablate", "ablate_seeds", "ablate_variants")  # flags that are no fields


def flag_type(annotation):
    """How argparse reads a field of this annotation."""
    kinds = {int: int, float: float, int | None: int}
    return kinds.get(annotation, int if "tuple" in str(annotation) else str)


def parse(arguments: list[str], description: str = "") -> argparse.Namespace:
    """One flag per field of Recipe, plus those in COMMANDS; a flag not given is None."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="RUN", help="continue RUN with its own recipe")
    parser.add_argument("--ablate", action="store_true", default=None,
                        help="run all variants of the paper's Table 5 (ablate.py)")
    parser.add_argument("--ablate-seeds", type=int, metavar="K", help="runs per variant, default 3")
    parser.add_argument("--ablate-variants", nargs="+", metavar="NAME", help="only these")
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
             for k, v in vars(args).items() if v is not None and k not in COMMANDS}
    if (args.ablate_seeds or args.ablate_variants) and not args.ablate:
        raise InputError("--ablate-seeds and --ablate-variants go with --ablate")
    if args.resume:
        if given or args.ablate:
            name = next(iter(given), "ablate")
            raise InputError(f"--resume takes the run's recipe: leave out --{name}")
        return replace(read_recipe(Path(args.resume) / "recipe.json"), out=args.resume)
    task, dataset = given.get("task", "seg"), given.get("dataset", "shapes")
    predict.find_protocol(task, dataset)
    recipe = RECIPES[task, dataset]
    if given.get("backbone") == "tiny":
        recipe = replace(recipe, **TINY_OF[task])
    recipe = replace(recipe, **given)
    check(recipe)
    if recipe.prompts:
        recipe = with_prompts(recipe, given)
    default = f"runs/{recipe.task}-{recipe.dataset}"     # an ablation goes on where it was stopped
    return replace(recipe, out=recipe.out or (default if args.ablate else free_folder(default)))


def with_prompts(recipe: Recipe, given: dict) -> Recipe:
    """The recipe for --prompts: N is the file's, and there is an adapter unless it was ruled out.

    The paper compares label and caption prompts (4.3) without saying how they enter the model; that
    they go through the depth model's adapter is ours.
    """
    count = len(read_prompts(Path(recipe.prompts), recipe.context_dim))
    if given.get("num_prompts", count) != count:
        raise InputError(f"--num-prompts {recipe.num_prompts}: --prompts {recipe.prompts} holds "
                         f"{count}, which is N; leave --num-prompts out")
    return replace(recipe, num_prompts=count, prompt_adapter=given.get("prompt_adapter", True))


def read_prompts(path: Path, dim: int) -> Tensor:
    """The one tensor of a .safetensors file, (N, dim), in float32; InputError for anything else."""
    wanted = f"one tensor (N, {dim}), a text embedding per row, is wanted"
    if not path.is_file():
        raise InputError(f"--prompts {path} does not exist")
    if path.suffix != ".safetensors":
        raise InputError(f"--prompts {path} is no .safetensors file: {wanted}")
    tensors = weights.read_tensors(path)
    if len(tensors) > 1:
        raise InputError(f"--prompts {path} holds {len(tensors)} tensors: {wanted}")
    (name, tensor), = tensors.items()
    if tensor.ndim != 2 or not len(tensor) or tensor.shape[1] != dim:
        raise InputError(f"--prompts {path}: {name} has shape {tuple(tensor.shape)}, {wanted}; "
                         f"{dim} is --context-dim, the width that the UNet reads")
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise InputError(f"--prompts {path}: {name} holds values that are no finite floats "
                         f"({tensor.dtype}); {wanted}")
    return tensor.float()


def check(recipe: Recipe) -> None:
    """InputError if a recipe cannot work, before anything is loaded."""
    if recipe.schedule not in ("poly", "two-phase", "step"):
        raise InputError(f"--schedule {recipe.schedule}: poly, two-phase or step")
    if recipe.task == "seg" and recipe.micro_batch < 2:
        raise InputError(f"--micro-batch {recipe.micro_batch}: segmentation needs 2 or more images "
                         "at once, BatchNorm cannot normalise a single 1x1 map")
    if recipe.batch % recipe.micro_batch:
        raise InputError(f"--batch {recipe.batch} is no multiple of --micro-batch "
                         f"{recipe.micro_batch}")
    if recipe.resize_scale == 0 and (recipe.crop % 64 or (recipe.crop_width or 0) % 64):
        raise InputError(f"--crop {recipe.crop}, --crop-width {recipe.crop_width}: a side that is "
                         "no multiple of 64, the UNet's coarsest stride")
    if recipe.task == "pose" and (3 * recipe.sigma) % 1:
        raise InputError(f"--sigma {recipe.sigma}: 3 sigma must be an integer")
    if recipe.memory < 0:
        raise InputError(f"--memory {recipe.memory:g}: gigabytes of one GPU, such as 24, or 0")
    if recipe.lr <= 0 or recipe.muon_lr < 0:
        raise InputError(f"--lr {recipe.lr}, --muon-lr {recipe.muon_lr}: rates must be positive (0 "
                         "for --muon-lr: AdamW moves all weights)")
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
