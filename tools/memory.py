"""Estimated peak GB of one training step, before anything is loaded; the flags that fit a GPU.

    python -m tools.memory --task seg --dataset ade20k            what a step takes
    python -m tools.memory --task seg --dataset ade20k --fit 24   what fits a GPU of 24 GB

Takes train.py's flags, too; the data set need not be there.  The step runs on fake tensors (shapes
without values) while a dispatch mode adds up the bytes of all tensors that are alive: weights,
gradients, the optimiser's moments, activations, and what checkpointing recomputes.  Half a minute
at full width, and no memory.  The CUDA context, workspaces and fragmentation are taken to be
OTHER_GB; the loader's processes, and the text encoder of VPD's refer, are not counted.
"""
import math
import shlex
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.device import autocast, pick_device, pick_precision
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
    if args.fit is not None and any(word.split("=")[0] == "--micro-batch" for word in rest):
        raise InputError("--micro-batch is what --fit finds: leave one of them out")
    if args.fit is None:
        print(f"about {step_gb(recipe):.1f} GB for a step with --micro-batch {recipe.micro_batch}")
        return
    micro_batch = fit(recipe, args.fit)
    print(f"fits {args.fit:g} GB: python train.py {shlex.join(rest)} --micro-batch {micro_batch}")


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
              optimizer_of, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes at the peak of an optimiser's second step, when its moments are there.

    images: shape (B, 3, H, W) of a micro-batch.  accumulate: whether a step has several.
    optimizer_of(model) makes the optimiser.  On a CPU without CUDA, the figure is a CPU's: its
    autocast keeps norms in bfloat16, a GPU's in float32.
    """
    with torch.device("meta"):
        model = kind_of(config)(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), Alive() as alive:
        model.to_empty(device=device).train()
        model.unet.gradient_checkpointing = checkpointing
        optimizer = optimizer_of(model)
        for _ in range(2):
            for _ in range(1 + accumulate):
                batch, target = torch.rand(images), fake_target(config, images)
                with autocast(device, dtype):
                    losses = model.loss(batch, target, *fake_text(config, images[0]))
                sum(losses.values()).backward()
                del batch, target, losses
            optimizer.step()
            optimizer.zero_grad()
    return alive.peak


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
    device = pick_device(recipe.device)
    images = (recipe.micro_batch, 3, recipe.crop, recipe.crop_width or recipe.crop)
    peak = step_peak(recipe.model, images, recipe.batch > recipe.micro_batch,
                     recipe.gradient_checkpointing, lambda model: build_optimizer(model, recipe),
                     device, pick_precision(recipe.precision, device))
    return OTHER_GB + peak / 1e9


def fit(recipe: Recipe, limit: float) -> int:
    """The largest micro-batch whose step takes at most `limit` GB; the total batch stays.

    Raises InputError if not even the smallest fits.
    """
    best, smallest = None, 2 if recipe.task == "seg" else 1          # BatchNorm of a 1x1 map
    for micro_batch in (m for m in range(smallest, recipe.batch + 1) if recipe.batch % m == 0):
        need = step_gb(replace(recipe, micro_batch=micro_batch))
        print(f"about {need:.1f} GB for a step with --micro-batch {micro_batch}", flush=True)
        if need > limit:
            break
        best = micro_batch
    if best is None:
        raise InputError(f"--fit {limit:g}: the smallest step needs more, see above"
                         + ("" if recipe.gradient_checkpointing else
                            "; --gradient-checkpointing takes less"))
    return best


if __name__ == "__main__":
    run_command(main)
