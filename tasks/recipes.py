"""Recipes: every setting of a run, and its value per task and data set with its source.

A run is one Recipe: where the data lie (`files`, sets/), what the model is (`model`, model.py), how
it is asked (`protocol`, tasks/) and how it is trained.  Every field is a flag of train.py (see
flags.py); its comment is the flag's help.  recipe.json in a run folder is one Recipe.
"""
from dataclasses import dataclass, replace
from pathlib import Path

from model import Config
from ops.errors import InputError, read_object
from ops.settings import check_widths, from_dict
from sets.ade20k import Ade20k, SegFolder
from sets.cityscapes import Cityscapes, CityscapesExtra, Mapillary
from sets.coco import Coco, PoseFolder
from sets.embedded import DepthScenes, PoseScenes, ReferScenes, Scenes
from sets.nyu_kitti import DepthFolder, Kitti, Nyu
from sets.refcoco import RefCoco, RefCocoG, RefCocoPlus, ReferFolder
from tasks import depth, pose, refer, seg
from tasks.methods import METHODS, config_kind, method_of
from unet import UNetConfig
from vae import VAEConfig
from vpd.model import VPDConfig
from weights.files import SD15


@dataclass(frozen=True)
class Recipe:
    """One run, resolved.  Defaults: ADE20K as in the paper (Tables 2 and 6)."""

    dataset: str = "ade20k"  # a row of RECIPES
    files: object = Ade20k()  # where the data set lies: a settings class of sets/
    model: object = Config()  # what the model is: of model.py, or of vpd/model.py
    protocol: object = seg.Protocol((2048, 512), 512, 341)  # how it is asked: of tasks/

    backbone: str = SD15  # hub id, folder, .safetensors; "tiny": our own, weights/tiny-sd
    unet: str | None = None  # its UNet from elsewhere: hub id, folder, .safetensors (CleanDIFT's)
    init: str = "pretrained"  # "random-unet": its encoder only; "random": neither, both are trained
    init_from: str | None = None  # run to start from, for a second stage (Mapillary -> Cityscapes)
    prompts: str | None = None  # .safetensors of one (N, D), fixed text embeddings; or "captions"
    scene_types: str | None = None  # of VPD's depth: a file, one per line; none: NYU v2's 27

    iterations: int = 80_000  # optimiser steps; paper Table 2
    batch: int = 16  # images per optimiser step; paper Table 6 (released configs: 8)
    micro_batch: int = 2  # images at once; the rest of the batch is accumulated
    lr: float = 8e-5  # paper A.1
    schedule: str = "poly"  # linear decay to 0; "two-phase": depth; "step": pose; "power": refer
    min_lr: float = 0.0  # of the two-phase schedule
    unet_lr_mult: float = 0.1  # the UNet's rate over lr; official: configs/ade.py
    muon_lr: float = 0.0  # above 0: of all layers' weights, which Muon moves (ops/muon.py); ours
    weight_decay: float = 1e-3  # paper Table 6
    warmup: int = 1500  # steps; paper Table 6
    warmup_ratio: float = 1e-6  # of the rate at the first step; official
    clip: float = 0.0  # largest norm of the gradient; 0: not clipped
    crop: int = 512  # height and width of a training crop or embedded scene; paper Table 2
    crop_width: int | None = None  # width where it is another; pose

    out: str | None = None  # run folder; default runs/TASK-DATASET, numbered if it exists
    seed: int = 0  # of everything random
    precision: str = "auto"  # bfloat16 autocast where it is fast; or float32
    weights: str = "float32"  # or bfloat16: half the bytes to train a weight, see ops/rounding.py
    compile: str = "auto"  # on, off; auto: on for 5000 steps or more on a GPU with Triton
    gradient_checkpointing: bool = True  # recompute UNet blocks instead of storing them; official
    device: str = "auto"  # cpu, cuda or cuda:NUMBER
    workers: int = 4  # processes that load data
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 8000  # steps between validations; official
    save_every: int = 1000  # steps between checkpoints

    @property
    def task(self) -> str:
        """"seg", "depth", "pose" or "refer"."""
        return self.model.task

    @property
    def method(self) -> str:
        """"meta-prompts" or "vpd"."""
        return method_of(self.model)


# ------------------------------------------------------------------------------------------------
# The rows

SEG = Recipe()
CITY = Recipe(  # paper A.1 and Table 6; official: configs/cityscapes.py
    dataset="cityscapes", files=Cityscapes(), model=Config(dropout=0.1, num_classes=19),
    protocol=seg.Protocol((2048, 1024), 1024, 512), crop=1024)
DEPTH = Recipe(  # paper Table 7 and A.2; official: depth/train.sh, depth/test.sh, depth/train.py
    dataset="nyu", files=Nyu(),
    model=Config(task="depth", num_prompts=50, shared_prompts=False, prompt_adapter=True,
                 head_channels=192, max_depth=10.0, resize_scale=1),
    protocol=depth.Protocol(2, box="nyu", max_depth_eval=10.0, units=1000.0),
    iterations=25 * 1009, batch=24, micro_batch=3, lr=5e-4, schedule="two-phase", min_lr=3e-5,
    unet_lr_mult=0.01, weight_decay=0.1, warmup=0, crop=480, eval_every=1009)
POSE = Recipe(  # paper A.3; what it leaves open: docs/DIFFERENCES.md
    dataset="coco", files=Coco(),
    model=Config(task="pose", shared_prompts=False, prompt_adapter=True),
    protocol=pose.Protocol(),  # mmpose 1.x, ViTPose
    iterations=210 * 2341, batch=64, micro_batch=4, lr=5e-4, schedule="step", unet_lr_mult=0.01,
    weight_decay=0.1, warmup=500, warmup_ratio=1e-3, clip=1.0, crop=576, crop_width=448,
    eval_every=10 * 2341, save_every=2341)

# Our own small Stable Diffusion (weights/tiny-sd), which the embedded scenes are trained on.
TINY_UNET = UNetConfig((64, 64, 96, 96), layers=1, num_heads=2, context_dim=64, latent_channels=16,
                       groups=8)
TINY_VAE = VAEConfig((16, 32, 64, 64), layers=1, latent_channels=16, groups=8)


def tiny(recipe: Recipe) -> Recipe:
    """The recipe on the tiny backbone, for a CPU and minutes: ours.

    Optimiser, rates and passes are what segmentation did best with on a narrower backbone; sizes,
    what people and photographs did: the UNet sees an eighth of them (docs/RESULTS.md).
    """
    side = 192 if recipe.dataset == "folder" or recipe.task == "pose" else 128
    model = replace(recipe.model, unet=TINY_UNET, vae=TINY_VAE)
    recipe = replace(recipe, backbone="tiny", iterations=550, batch=16, micro_batch=16, lr=5e-3,
                     unet_lr_mult=0.15, muon_lr=0.02, weight_decay=1e-2, warmup=20, crop=side,
                     workers=0, gradient_checkpointing=False, log_every=10, eval_every=275,
                     save_every=275)
    if recipe.method == "vpd":
        model = replace(model, head_channels=32 if recipe.task == "depth" else 64, num_tokens=24)
    else:
        model = replace(model, num_prompts=32 if recipe.task == "seg" else 64, head_channels=32,
                        refine_steps=1)
    if recipe.task == "seg":
        return replace(recipe, model=model, protocol=replace(recipe.protocol, scale=None))
    if recipe.task == "refer":                           # words take longer than classes
        return replace(recipe, model=model, iterations=6000, eval_every=1000, save_every=500)
    recipe = replace(recipe, schedule="poly")
    if recipe.task == "depth":
        model = replace(model, max_depth=80.0)
        model = model if recipe.method == "vpd" else replace(model, resize_scale=0)
        return replace(recipe, model=model, iterations=1000, eval_every=500, save_every=500)
    model = replace(model, sigma=3.0, deconv_channels=(64,))
    return replace(recipe, model=model, crop_width=side, clip=0.0, iterations=450, eval_every=225,
                   save_every=225)


RECIPES = {
    # 128 pixels are enlarged to 192, by the rule of depth's images; Muon's rate: best of three
    ("seg", "shapes"): replace(
        tiny(replace(SEG, model=Config(resize_scale=1))), dataset="shapes", files=Scenes(),
        protocol=seg.Protocol(at_once=16), iterations=520, batch=8, micro_batch=8, muon_lr=0.014,
        eval_every=260, save_every=260),
    ("seg", "folder"): replace(SEG, dataset="folder", files=SegFolder(),  # ours: ADE20K's, at
                               protocol=seg.Protocol()),                  # the images' own size
    ("seg", "ade20k"): SEG,
    ("seg", "cityscapes"): CITY,
    ("seg", "cityscapes-extra"): replace(CITY, dataset="cityscapes-extra", files=CityscapesExtra(),
                                         model=replace(CITY.model, refine_steps=1)),
    ("seg", "mapillary"): replace(CITY, dataset="mapillary", files=Mapillary()),  # ours: as CITY
    ("depth", "shapes"): replace(tiny(DEPTH), dataset="shapes", files=DepthScenes(val_scenes=200),
                                 protocol=depth.Protocol(at_once=16)),
    ("depth", "folder"): replace(DEPTH, dataset="folder", files=DepthFolder(),  # ours
                                 model=replace(DEPTH.model, max_depth=80.0),
                                 protocol=depth.Protocol()),
    ("depth", "nyu"): DEPTH,
    ("depth", "kitti"): replace(DEPTH, dataset="kitti", files=Kitti(),
                                model=replace(DEPTH.model, max_depth=80.0, resize_scale=2),
                                protocol=depth.Protocol(16, box="garg", max_side=4 * 352),
                                iterations=25 * 965, crop=352, eval_every=965),
    ("pose", "shapes"): replace(tiny(POSE), dataset="shapes", files=PoseScenes(val_scenes=100),
                                protocol=pose.Protocol(at_once=32)),
    ("pose", "folder"): replace(POSE, dataset="folder", files=PoseFolder()),
    ("pose", "coco"): POSE,
}

# VPD as released (wl-zhao/VPD): what it has in common with Meta Prompts is taken from there.
VPD_SEG = replace(SEG, model=VPDConfig())  # segmentation/configs: batch, rates, decay are SEG's
VPD_DEPTH = replace(DEPTH, model=VPDConfig(task="depth", num_classes=27, head_channels=192))
VPD_REFER = Recipe(  # refer/args.py, refer/train.sh; the UNet's rate as it ran: param_groups
    dataset="refcoco", files=RefCoco(), model=VPDConfig(task="refer"), protocol=refer.Protocol(),
    iterations=40 * 1325, batch=32, micro_batch=4, lr=5e-5, schedule="power", unet_lr_mult=1.0,
    weight_decay=1e-2, warmup=0, crop=512, eval_every=1325, save_every=1325)
VPD = {
    ("seg", "shapes"): replace(tiny(VPD_SEG), dataset="shapes", files=Scenes(),
                               protocol=seg.Protocol(at_once=16)),
    ("seg", "folder"): replace(VPD_SEG, dataset="folder", files=SegFolder(),  # ours
                               protocol=seg.Protocol()),
    ("seg", "ade20k"): VPD_SEG,
    ("depth", "shapes"): replace(tiny(VPD_DEPTH), dataset="shapes",
                                 files=DepthScenes(val_scenes=200),
                                 protocol=depth.Protocol(at_once=16)),
    ("depth", "folder"): replace(VPD_DEPTH, dataset="folder", files=DepthFolder(),  # ours
                                 model=replace(VPD_DEPTH.model, max_depth=80.0),
                                 protocol=depth.Protocol()),
    ("depth", "nyu"): VPD_DEPTH,
    ("refer", "shapes"): replace(tiny(VPD_REFER), dataset="shapes", files=ReferScenes(),
                                 protocol=refer.Protocol(at_once=16)),
    ("refer", "folder"): replace(VPD_REFER, dataset="folder", files=ReferFolder()),  # ours
    ("refer", "refcoco"): VPD_REFER,
    ("refer", "refcoco+"): replace(VPD_REFER, dataset="refcoco+", files=RefCocoPlus()),
    ("refer", "refcocog"): replace(VPD_REFER, dataset="refcocog", files=RefCocoG(),
                                   model=replace(VPD_REFER.model, num_tokens=77)),
}
ROWS = {"meta-prompts": RECIPES, "vpd": VPD}


def find_recipe(task: str, dataset: str, method: str | None = None) -> Recipe:
    """A row; InputError naming the possible ones.  No method: Meta Prompts, but VPD for refer."""
    if method not in (None, *METHODS):
        raise InputError(f"--method {method} is unknown: choose from {', '.join(METHODS)}")
    method = method or ("vpd" if task == "refer" else "meta-prompts")
    rows = ROWS[method]
    if (task, dataset) not in rows:
        tasks = sorted({t for t, _ in rows})
        if task not in tasks:
            raise InputError(f"--task {task} is unknown for --method {method}: choose from "
                             f"{', '.join(tasks)}")
        names = ", ".join(name for t, name in rows if t == task)
        raise InputError(f"--dataset {dataset} is unknown for {task}: choose from {names}")
    return rows[task, dataset]


# ------------------------------------------------------------------------------------------------
# What a recipe says

def lr_factor(step: int, recipe: Recipe) -> float:
    """Learning rate at `step` (0-based) over recipe.lr.

    poly: linear decay to 0 under a linear warm-up (official: mmcv's PolyLrUpdaterHook, power 1).
    two-phase: from min_lr up for 12/25 of the run, down again for as long, then min_lr; power 0.9
    (official: depth/train.py).
    power: decay to 0 with power 0.9, no warm-up (VPD: refer/train.py).
    step: x 0.1 after 170 and after 200 of 210 parts of the run, linear warm-up (paper A.3; mmpose).
    """
    if recipe.schedule == "step":
        decay = 0.1 ** sum(step >= recipe.iterations * part // 210 for part in (170, 200))
        low = recipe.warmup_ratio
        return decay * min(1.0, low + (1 - low) * step / max(1, recipe.warmup - 1))
    if recipe.schedule == "power":
        return (1 - step / recipe.iterations) ** 0.9
    if recipe.schedule == "two-phase":
        x, low = (step + 1) / (recipe.iterations / 25 * 12), recipe.min_lr / recipe.lr
        return (1 - low) * x ** 0.9 + low if x < 1 else max(low, 1 - (1 - low) * (x - 1) ** 0.9)
    factor = 1 - step / recipe.iterations
    if step < recipe.warmup:
        factor *= 1 - (1 - step / recipe.warmup) * (1 - recipe.warmup_ratio)
    return factor


def backbone_of(recipe: Recipe) -> str:
    """The pretrained backbone, in words."""
    unet = f"UNet of {recipe.unet}, " if recipe.unet else ""
    return f"{recipe.backbone}: pretrained, {unet}VAE encoder frozen"


def check(recipe: Recipe) -> None:
    """InputError if settings that are possible one by one can't work together."""
    if recipe.task == "seg" and recipe.micro_batch < 2:
        raise InputError(f"--micro-batch {recipe.micro_batch}: segmentation needs 2 or more images "
                         "at once, BatchNorm cannot normalise a single 1x1 map")
    if recipe.batch % recipe.micro_batch:
        raise InputError(f"--batch {recipe.batch} is no multiple of --micro-batch "
                         f"{recipe.micro_batch}")
    sides = recipe.crop, recipe.crop_width or 0
    if getattr(recipe.model, "resize_scale", 1) == 0 and any(side % 64 for side in sides):
        raise InputError(f"--crop {recipe.crop}, --crop-width {recipe.crop_width}: a side that is "
                         "no multiple of 64, the UNet's coarsest stride")
    if recipe.weights == "bfloat16" and recipe.precision != "bfloat16":
        raise InputError(f"--precision {recipe.precision}: weights held in bfloat16 are multiplied "
                         "in it; leave --precision or --weights out")
    if recipe.min_lr > recipe.lr:
        raise InputError(f"--min-lr {recipe.min_lr:g} is above --lr {recipe.lr:g}")
    if 0 < getattr(recipe.protocol, "max_side", 0) < 64:
        raise InputError(f"--max-side {recipe.protocol.max_side}: 64 pixels or more")
    if getattr(recipe.protocol, "min_depth_eval", 0) >= getattr(recipe.protocol, "max_depth_eval",
                                                                1):
        raise InputError(f"--min-depth-eval {recipe.protocol.min_depth_eval}: must be below "
                         f"--max-depth-eval {recipe.protocol.max_depth_eval}")
    check_widths(recipe.model.unet, "--unet-")
    check_widths(recipe.model.vae, "--vae-")


# ------------------------------------------------------------------------------------------------
# recipe.json

def read_recipe(path: Path) -> Recipe:
    """recipe.json -> Recipe; InputError naming what does not fit."""
    values = read_object(path)
    if isinstance(values.get("task"), str):
        raise InputError(f"{path} was written by an older version, whose settings were flat: "
                         "move it away to evaluate best/ with --dataset and --data, or start a new "
                         f"run with --init-from {path.parent}")
    model, dataset = values.get("model"), values.get("dataset")
    task = model.get("task") if isinstance(model, dict) else None
    rows = VPD if isinstance(model, dict) and model.get("method") == "vpd" else RECIPES
    if not isinstance(task, str) or not isinstance(dataset, str) or (task, dataset) not in rows:
        raise InputError(f"{path} is no recipe: its model.task and its dataset, {task!r:.40} and "
                         f"{dataset!r:.40}, are no row of tasks/recipes.py")
    row, nested = rows[task, dataset], {}
    for name in ("files", "model", "protocol"):
        kind = config_kind(values.get(name)) if name == "model" else type(getattr(row, name))
        nested[name] = from_dict(kind, values.get(name), f"{path}: {name}")
    newer = {"unet": None, "weights": "float32"}         # which files of older versions lack
    if isinstance(values.get("compile"), bool):          # as they wrote it
        values["compile"] = "on" if values["compile"] else "off"
    recipe = from_dict(Recipe, {**newer, **values, **nested}, str(path))
    check(recipe)
    return recipe


def check_model(recipe: Recipe, path: Path, config, folder: Path) -> None:
    """InputError if the model in `folder` is not the one of the recipe that `path` holds."""
    differing = [name for name, value in vars(config).items()
                 if value != getattr(recipe.model, name, None)]
    if differing:
        raise InputError(f"{folder}/config.json and {path} disagree about {', '.join(differing)}")
