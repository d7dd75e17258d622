"""Checkpoints of pretraining: modules and their optimiser's moments in one file, no pickle."""
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ops.errors import InputError
from weights.checkpoint import check_finite


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """Write a .safetensors file, under another name until it is complete."""
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def save_state(path: Path, step: int, modules: dict[str, nn.Module],
               optimizer: torch.optim.Optimizer) -> None:
    """Write modules and moments to one file."""
    tensors = {}
    for part, module in modules.items():
        check_finite(module)
        tensors |= {f"{part}:{name}": t.contiguous() for name, t in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{part}:{name}:{kind}"] = value.contiguous()
    write_tensors(path, tensors, {"step": str(step)})


def load_state(path: Path, modules: dict[str, nn.Module],
               optimizer: torch.optim.Optimizer | None = None) -> int:
    """Fill modules (and the optimiser) from a checkpoint; returns the steps done, 0 without one.

    InputError if it is damaged or of other sizes.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            step = int(file.metadata()["step"])
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to begin its stage again"
                         ) from None
    for part, module in modules.items():
        start = part + ":"
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise InputError(f"{path} is of other settings ({reason}): use another --out") from None
        for name, parameter in module.named_parameters() if optimizer else ():
            start = f"optimizer.{part}:{name}:"
            kinds = [key.removeprefix(start) for key in tensors if key.startswith(start)]
            if kinds:
                optimizer.state[parameter] = {k: tensors[start + k].clone() for k in kinds}
    return step
