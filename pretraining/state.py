"""Checkpoints of pretraining: modules and their optimiser's moments in one file, no pickle."""
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ops.errors import InputError
from ops.settings import checked
from weights.checkpoint import check_finite, check_moments, expected_moments


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
    """Fill modules (and the optimiser, of the first one) from a checkpoint; returns the steps done,
    0 without one.

    InputError if it is damaged or of other sizes.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            step = checked(int, int(file.metadata()["step"]), "step", "steps")
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to begin its stage again"
                         ) from None
    for part, module in modules.items():
        fill(module, of_part(tensors, f"{part}:"), path)
    if optimizer is not None:
        part, module = next(iter(modules.items()))
        found, parameters = of_part(tensors, f"optimizer.{part}:"), dict(module.named_parameters())
        check_moments(found, expected_moments(module, optimizer), step, path)
        for key, value in found.items():
            name, _, kind = key.rpartition(":")
            optimizer.state[parameters[name]][kind] = value.clone()
    return step


def of_part(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """Those whose names begin with `start`, which is cut off."""
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give a module its tensors; InputError unless they are of its sizes, in float32 and finite."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{path} is of other settings ({reason}): use another --out") from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise InputError(f"{path} is damaged ({name} is {tensor.dtype}, expected finite values "
                             f"in {torch.float32}): delete it to begin its stage again")


def check_steps(done: int, wanted: int, flag: str, path: Path) -> None:
    """InputError if a checkpoint is beyond the steps that are asked for; says if it is there."""
    if done > wanted:
        raise InputError(f"{path} has done {done} steps already, {flag} is {wanted}: give {done} "
                         "or more")
    if done == wanted:
        print(f"finished   {path} has done its {done} steps: more of {flag} continue it")
