"""Estimated peak GB of one training step, before anything is loaded; the flags that fit a GPU.

    python -m tools.memory --task seg --dataset ade20k            what a step takes
    python -m tools.memory --task seg --dataset ade20k --fit 24   what fits a GPU of 24 GB

Takes train.py's flags, too; the data set need not be there.  The step runs on fake tensors (shapes
without values) while a dispatch mode adds up the bytes of all tensors that are alive: weights,
gradients, the optimiser's moments, activations, and what checkpointing recomputes.  Twenty seconds
at full width, and no memory.  The CUDA context, workspaces and fragmentation are taken to be
OTHER_GB; the loader's processes, and the text encoder of VPD's refer, are not counted.

--fit goes from the dearest setting to the cheapest and takes the first that fits: the recipe's own,
with --gradient-checkpointing, with --weights bfloat16; of that, the largest micro-batch.  What was
given stays as it is.
"""
import math
import shlex
import weakref
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.device import autocast, cast_weights, pick_device, pick_precision
from ops.errors import InputError, run_command
from tasks.captioned import CaptionConfig
from tasks.flags import Parser, resolve
from tasks.methods import kind_of
from tasks.recipes import Recipe
from train import build_optimizer

OTHER_GB = 1.0  # CUDA context, workspaces, fragmentation


def main() -> None:
    """Print the estimate, or the flags that fit."""
    own = Parser(__doc__)
    own.add_argument("--fit", type=float, metavar="GB", help="of one GPU")
    args, rest = own.parse_known_args()
    recipe, resumed = resolve(rest)
    if resumed:
        raise InputError("--resume: a run keeps its micro-batch; give the flags that began it")
    if args.fit is not None and not 0 < args.fit < math.inf:
        raise InputError(f"--fit {args.fit:g}: gigabytes of one GPU, such as 24")
    given = [word.split("=")[0] for word in rest]
    if args.fit is not None and "--micro-batch" in given:
        raise InputError("--micro-batch is what --fit finds: leave one of them out")
    if args.fit is None:
        print(f"about {step_gb(recipe):.1f} GB for a step with --micro-batch {recipe.micro_batch}")
        return
    found = fit(recipe, args.fit, given)
    print(f"fits {args.fit:g} GB: python train.py {shlex.join([*rest, *flags(found, recipe)])}")


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors made under it: `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return output

    def add(self, storage) -> None:
        """Count a storage until it is freed; views share theirs."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.known.discard(key)
        self.now -= size


def step_peak(config, images: tuple[int, ...], accumulate: bool, checkpointing: bool,
              optimizer_of, device: torch.device, dtype: torch.dtype,
              weights: torch.dtype = torch.float32) -> int:
    """Bytes at the peak of an optimiser's second step, when its moments are there.

    images: shape (B, 3, H, W) of a micro-batch.  accumulate: whether a step has several.
    optimizer_of(model) makes the optimiser.  weights: what the layers' are held in.  The figure is
    a GPU's, whatever the device.
    """
    with torch.device("meta"):
        model = widen_norms(cast_weights(kind_of(config)(config), weights), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), Alive() as alive:
        model.to_empty(device=device).train()
        model.unet.gradient_checkpointing = checkpointing
        optimizer = optimizer_of(model)
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.grad = torch.zeros_like(p)                 # of a first step, for the moments
        optimizer.step()
        optimizer.zero_grad()
        for p in filter(lambda p: p.requires_grad and accumulate, model.parameters()):
            p.grad = torch.zeros_like(p)                 # of the micro-batches before
        batch, target = torch.rand(images), fake_target(config, images)
        with autocast(device, dtype):
            losses = model.loss(batch, target, *fake_text(config, images[0]))
        sum(losses.values()).backward()
        del batch, target, losses
        optimizer.step()
    return alive.peak


def widen_norms(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as a GPU's autocast to `dtype` runs it: norms read and give float32, which they do
    not on a CPU.
    """
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and dtype != torch.float32:
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    return model


def fake_target(config, images: tuple[int, ...]) -> torch.Tensor:
    """A target of the task's shape and kind for images (B, 3, H, W)."""
    B, _, H, W = images
    if config.task in ("seg", "refer"):
        return torch.zeros(B, H, W, dtype=torch.long)
    return torch.ones(B, H, W) if config.task == "depth" else torch.ones(B, 17, 3)


def fake_text(config, B: int) -> list[torch.Tensor]:
    """What the model reads beside B images."""
    if config.task == "refer":
        return [torch.zeros(B, config.num_tokens, config.unet.context_dim)]
    return [torch.zeros(B, config.num_prompts, config.unet.context_dim)] \
        if isinstance(config, CaptionConfig) else []


def step_gb(recipe: Recipe) -> float:
    """GB that a GPU must have for a step of the recipe."""
    device, precision = pick_device(recipe.device), recipe.precision
    if precision == "auto" and device.type == "cpu":
        precision = "bfloat16"                           # what a GPU's would be
    images = (recipe.micro_batch, 3, recipe.crop, recipe.crop_width or recipe.crop)
    peak = step_peak(recipe.model, images, recipe.batch > recipe.micro_batch,
                     recipe.gradient_checkpointing, lambda model: build_optimizer(model, recipe),
                     device, pick_precision(precision, device),
                     pick_precision(recipe.weights, device))
    return OTHER_GB + peak / 1e9


def settings(recipe: Recipe, given: list[str]) -> list[Recipe]:
    """The recipe, and what takes less memory at the price of time, then of rounding; flags that are
    `given` stay.
    """
    found = [recipe]
    if not {"--gradient-checkpointing", "--no-gradient-checkpointing"} & set(given):
        found.append(replace(recipe, gradient_checkpointing=True))
    if "--weights" not in given and recipe.precision != "float32":
        found.append(replace(found[-1], weights="bfloat16", precision="bfloat16"))
    return [found[i] for i in range(len(found)) if found[i] not in found[:i]]


def flags(found: Recipe, recipe: Recipe) -> list[str]:
    """Words of the command line that make `found` of `recipe`."""
    words = ["--micro-batch", str(found.micro_batch)]
    words += ["--gradient-checkpointing"] * (found.gradient_checkpointing
                                             > recipe.gradient_checkpointing)
    return words + ["--weights", found.weights] * (found.weights != recipe.weights)


def fit(recipe: Recipe, limit: float, given: list[str]) -> Recipe:
    """The first of `settings` that takes at most `limit` GB, with its largest micro-batch; the
    total batch stays.

    Raises InputError if none fits.
    """
    for setting in settings(recipe, given):
        best, smallest = None, 2 if recipe.task == "seg" else 1      # BatchNorm of a 1x1 map
        for micro_batch in (m for m in range(smallest, recipe.batch + 1) if recipe.batch % m == 0):
            found = replace(setting, micro_batch=micro_batch)
            need = step_gb(found)
            print(f"about {need:.1f} GB for a step with {' '.join(flags(found, recipe))}",
                  flush=True)
            if need > limit:
                break
            best = found
        if best is not None:
            return best
    raise InputError(f"--fit {limit:g}: the smallest step needs {need:.1f} GB, see above; a "
                     "smaller --crop takes less, but is another recipe")


if __name__ == "__main__":
    run_command(main)
