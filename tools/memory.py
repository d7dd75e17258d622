"""How much memory a training step will need, before anything is loaded.

The step runs on fake tensors (shapes without values) while a dispatch mode adds up the bytes of all
tensors that are alive: weights, gradients, the optimiser's moments, activations, and what
checkpointing recomputes.  Half a minute at full width, and no memory.  The CUDA context, workspaces
and fragmentation are taken to be OTHER_GB; the loader's processes are not counted.
"""
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops import parallel
import predict
from ops.errors import InputError
from model import Config, MetaPromptModel
from tasks.recipes import Recipe

OTHER_GB = 1.0  # CUDA context, workspaces, fragmentation


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


def step_peak(config: Config, images: tuple[int, ...], accumulate: bool, checkpointing: bool,
              optimizer_of, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes at the peak of an optimiser's second step, when its moments are there.

    images: shape (B, 3, H, W) of a micro-batch.  accumulate: whether a step has several.
    optimizer_of(model) makes the optimiser.  On a CPU without CUDA, the figure is a CPU's: its
    autocast keeps norms in bfloat16, a GPU's in float32.
    """
    with torch.device("meta"):
        model = MetaPromptModel(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), Alive() as alive:
        model.to_empty(device=device).train()
        model.unet.gradient_checkpointing = checkpointing
        optimizer = optimizer_of(model)
        for _ in range(2):
            for _ in range(1 + accumulate):
                batch, target = torch.rand(images), fake_target(config, images)
                with predict.autocast(device, dtype):
                    losses = model.loss(batch, target)
                sum(losses.values()).backward()
                del batch, target, losses
            optimizer.step()
            optimizer.zero_grad()
    return alive.peak


def fake_target(config: Config, images: tuple[int, ...]) -> torch.Tensor:
    """A target of the task's shape and kind for images (B, 3, H, W)."""
    B, _, H, W = images
    if config.task == "seg":
        return torch.zeros(B, H, W, dtype=torch.long)
    return torch.ones(B, H, W) if config.task == "depth" else torch.ones(B, 17, 3)


# ------------------------------------------------------------------------------------------------
# Before a run.  In all functions below, shape_of() gives an image's shape, (3, H, W), and
# optimizer_of(model) makes the optimiser.

def step_gb(recipe: Recipe, config: Config, shape_of, optimizer_of, device, dtype) -> float:
    """GB that a GPU must have for a step of the recipe, in each process."""
    several = parallel.accumulation(recipe.batch, recipe.micro_batch) > 1
    peak = step_peak(config, (recipe.micro_batch, *shape_of()), several,
                     recipe.gradient_checkpointing, optimizer_of, device, dtype)
    return OTHER_GB + peak / 1e9


def tell(recipe: Recipe, config: Config, shape_of, optimizer_of, device, dtype) -> None:
    """Print what a step will need, and what to do if the GPU has less."""
    try:
        need = step_gb(recipe, config, shape_of, optimizer_of, device, dtype)
    except Exception as error:                           # an estimate must never end a run
        print(f"memory     not estimated ({type(error).__name__}: {error})")
        return
    print(f"memory     about {need:.1f} GB for a step with --micro-batch {recipe.micro_batch}")
    if device.type == "cuda" and need > (has := torch.cuda.mem_get_info(device)[1] / 1e9):
        print(f"memory     TOO MUCH for this GPU's {has:.1f} GB: take a smaller --micro-batch (the "
              "batch stays, it is accumulated), --gradient-checkpointing")


def fit(recipe: Recipe, config: Config, shape_of, optimizer_of, device, dtype) -> Recipe:
    """The recipe with the largest micro-batch whose step takes at most recipe.memory GB.

    The total batch stays.  Raises InputError if not even the smallest fits.
    """
    best, total = None, recipe.batch // parallel.world()
    smallest = 2 if recipe.task == "seg" else 1          # BatchNorm of a 1x1 map
    for micro_batch in (m for m in range(smallest, total + 1) if total % m == 0):
        tried = replace(recipe, micro_batch=micro_batch)
        need = step_gb(tried, config, shape_of, optimizer_of, device, dtype)
        fits = need <= recipe.memory
        print(f"memory     about {need:.1f} GB for a step with --micro-batch {micro_batch}"
              + ("" if fits else f": more than --memory {recipe.memory:g}"), flush=True)
        if not fits:
            break
        best = tried
    if best is None:
        raise InputError(f"--memory {recipe.memory:g}: the smallest step needs more, see above"
                         + ("" if recipe.gradient_checkpointing else
                            "; --gradient-checkpointing takes less"))
    return best
