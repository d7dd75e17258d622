"""Where and in which precision a model runs, and whether a tensor has values at all."""
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ops.errors import InputError

LONG = 5000  # training steps that win back the minutes which compiling takes


def pick_device(name: str) -> torch.device:
    """"auto", "cpu" or "cuda[:i]" -> device; InputError if it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown: auto, cpu, cuda or cuda:NUMBER") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported: auto, cpu, cuda or cuda:NUMBER")
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
        flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
        fast = "amx_bf16" in flags or "avx512_bf16" in flags
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def to_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """An image (H, W, 3) uint8 as a batch of one, (1, 3, H, W) float32 in [0, 1]."""
    return torch.tensor(image, device=device).permute(2, 0, 1)[None].float() / 255


def compiles(wanted: str, device: torch.device, steps: int) -> bool:
    """Whether `steps` training steps are compiled: "on", "off", or "auto", which is on for a GPU
    that Triton serves, from LONG steps on.

    On CPUs it is off: no compiled UNet has been faster there than an eager one.
    """
    if wanted != "auto":
        return wanted == "on"
    return device.type == "cuda" and steps >= LONG and find_spec("triton") is not None \
        and torch.cuda.get_device_capability(device) >= (7, 0)


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision around forward passes; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model, which now holds its layers' weights in `dtype`: to predict, or to be trained so
    (ops/rounding.py).

    Half the memory; autocast, which rounds them in every call, finds that done: same answers.
    The rest, a thousandth of all, is read in float32: norms, of which a GPU's autocast computes in
    it, BatchNorm's running statistics, which move by less than bfloat16 resolves, prompts, temb.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            layer.to(dtype)
    return model


def has_data(x: Tensor) -> bool:
    """Whether code may branch on the values of x, and shapes depend on them.

    Not in a graph of torch.compile, nor where x is a fake tensor, a shape without values.
    """
    return not torch.compiler.is_compiling() and type(x) is Tensor


def descending(x: Tensor) -> Tensor:
    """Indices that sort the rows of (C, P), x >= 0, largest first.

    On a CPU float32 by two passes of numpy's radix sort, over the lower and the upper half of the
    bits, whose order is that of the numbers: four times as fast as comparing them.
    """
    if x.dtype != torch.float32 or x.is_cuda or not has_data(x):
        return x.argsort(dim=1, descending=True)
    order = np.empty(x.shape, dtype=np.int64)
    for row, bits in zip(order, ~x.numpy().view(np.uint32)):
        lower = bits.astype(np.uint16).argsort(kind="stable")
        upper = (bits >> 16).astype(np.uint16)[lower].argsort(kind="stable")
        row[:] = lower[upper]
    return torch.from_numpy(order)

