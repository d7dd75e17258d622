"""Checkpoints of a training run: complete at every instant, loaded strictly, no pickle.

    RUN/last/            config.json, model.safetensors, optimizer.safetensors, state.json; and
                         recipe.json, as it was then
    RUN/last.previous/   the one before, in case the newest proves unreadable
    RUN/best/            config.json, model.safetensors, recipe.json without paths, README.md

A folder is written under another name, NAME.tmp, flushed to the disk, and its last file written
marks it as complete.  Only then NAME becomes NAME.previous and NAME.tmp becomes NAME.  Whenever the
program dies, NAME or NAME.tmp is complete; `recover` finishes what was begun, at the next save or
start, however often that dies, too.
"""
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ops.errors import InputError, read_json
from ops.settings import from_dict
from weights.files import read_tensors

LAST = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")
BEST = ("config.json", "model.safetensors", "README.md")  # the last of both marks completeness


@dataclass(frozen=True)
class State:
    """Where a run is: state.json."""

    step: int = 0  # steps done
    best: float | None = None  # best value of the main metric
    evaluated: int = 0  # step of the last validation


# ------------------------------------------------------------------------------------------------
# Files that a kill cannot tear

def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":                # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file; whenever the program dies, the old or the new one is complete."""
    new = path.with_name(path.name + ".tmp")
    new.write_text(text, encoding="utf-8")
    flush(new)
    os.replace(new, path)
    flush(path.parent)


def write_json(path: Path, value) -> None:
    """The same for a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def complete(folder: Path, files: tuple[str, ...]) -> bool:
    """Whether a folder was written to its end."""
    return all((folder / name).is_file() for name in files)


def remove(path: Path) -> None:
    """Remove a folder, or the link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def recover(folder: Path, files: tuple[str, ...]) -> None:
    """Finish, or undo, what a killed save of `folder` began."""
    new, previous = (folder.with_name(folder.name + end) for end in (".tmp", ".previous"))
    if complete(new, files):
        if complete(folder, files):                      # else `previous` is the only old one
            remove(previous)
            os.rename(folder, previous)
        remove(folder)                                   # what is left of it is torn
        os.rename(new, folder)
        flush(folder.parent)
    remove(new)
    if complete(previous, files) and not complete(folder, files):
        remove(folder)
        os.rename(previous, folder)


def begin(folder: Path, files: tuple[str, ...]) -> Path:
    """An empty folder to write the next `folder` into."""
    recover(folder, files)
    new = folder.with_name(folder.name + ".tmp")
    new.mkdir(parents=True)
    return new


def finish(folder: Path, files: tuple[str, ...], last: str) -> None:
    """Put the written folder into its place; `last`: text of the file that marks it complete.

    If the disk is full, what was written of it is removed and the old one stays.
    """
    new = folder.with_name(folder.name + ".tmp")
    for path in new.iterdir():
        os.chmod(path, 0o666 & ~UMASK)                   # safetensors' files are the user's alone
        flush(path)
    write_text(new / files[-1], last)
    recover(folder, files)


def find_umask() -> int:
    """The bits that new files of this process must not have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = find_umask()


# ------------------------------------------------------------------------------------------------
# Saving

def check_finite(model: nn.Module) -> None:
    """FloatingPointError naming a weight that is not finite: it is not worth saving."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is no longer finite: the weights are not saved, the "
                                     "last checkpoint is good; try --clip 1 or a smaller --lr")


def save_best(run: Path, model: nn.Module, card: str = "", recipe: dict | None = None) -> None:
    """Write RUN/best, ready for the Hub: `card` is its README.md, `recipe` has no path in it."""
    check_finite(model)
    folder = begin(run / "best", BEST)
    try:
        model.save_pretrained(folder)
        if recipe is not None:
            write_json(folder / "recipe.json", recipe)
        finish(run / "best", BEST, card)
    except BaseException:
        remove(folder)
        raise
    remove(run / "best.previous")


def save_last(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State,
              recipe: dict | None = None) -> None:
    """Write RUN/last: weights, optimiser, `state`, and the recipe that led there."""
    check_finite(model)
    folder = begin(run / "last", LAST)
    try:
        model.save_pretrained(folder)
        moments = {f"{name}:{key}": value.detach().cpu().contiguous()
                   for name, parameter in model.named_parameters()
                   for key, value in optimizer.state.get(parameter, {}).items()}
        save_file(moments, folder / "optimizer.safetensors")
        if recipe is not None:
            write_json(folder / "recipe.json", recipe)
        finish(run / "last", LAST, json.dumps(vars(state), indent=2) + "\n")
    except BaseException:
        remove(folder)
        raise


# ------------------------------------------------------------------------------------------------
# Loading

def find_last(run: Path) -> list[Path]:
    """Complete checkpoints of a run, newest first; InputError if there is none."""
    recover(run / "last", LAST)
    found = [folder for folder in (run / "last", run / "last.previous") if complete(folder, LAST)]
    if not found:
        raise InputError(f"{run} holds no checkpoint: it was not trained by train.py, or ended "
                         "before its first save; the same command without --resume starts again")
    return found


def read_state(folder: Path) -> State:
    """state.json of a checkpoint; InputError if it is no state."""
    state = from_dict(State, read_json(folder / "state.json"), f"{folder}/state.json")
    if state.step < 1 or not 0 <= state.evaluated <= state.step:
        raise InputError(f"{folder}/state.json: step {state.step}, evaluated {state.evaluated}: "
                         "a saved run has done a step, and validated none that it has not")
    return state


def own_memory(model: nn.Module) -> nn.Module:
    """The model with its tensors copied out of the file that from_pretrained maps.

    There they lie at odd addresses, for which matrix kernels may round otherwise.  Copies are
    aligned as in a fresh run, so that resuming is exact to the bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def expected_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name -> a tensor of the shape and type that it has after a step, for every moment."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            kinds = ({"momentum": p} if group.get("muon") else
                     {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p})
            found.update({f"{names[p]}:{kind}": tensor for kind, tensor in kinds.items()})
    return found


def check_moments(found: dict[str, Tensor], expected: dict[str, Tensor], step: int,
                  path: Path) -> None:
    """InputError unless the moments of a file are the `expected_moments` after `step` steps: names,
    shapes, types, finite values.
    """
    for name in sorted(expected.keys() ^ found.keys()):
        raise InputError(f"{path} {'lacks' if name in expected else 'has the unknown'} {name}")
    for key, value in found.items():
        wanted, kind = expected[key], key.rpartition(":")[2]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise InputError(f"{path}: {key} is {value.dtype} of shape {tuple(value.shape)}, "
                             f"expected {wanted.dtype} of {tuple(wanted.shape)}")
        if not value.isfinite().all() or kind == "exp_avg_sq" and value.min() < 0 \
                or kind == "step" and value != step:
            raise InputError(f"{path}: {key} holds a value that no optimiser has after step {step}")


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
                   step: int) -> None:
    """Give the optimiser the moments saved in `folder` after `step` steps.

    InputError if they are not exactly those of this model: see `check_moments`.
    """
    path = folder / "optimizer.safetensors"
    found, parameters = read_tensors(path), dict(model.named_parameters())
    check_moments(found, expected_moments(model, optimizer), step, path)
    for key, value in found.items():
        name, _, kind = key.rpartition(":")
        device = "cpu" if kind == "step" and not parameters[name].is_cuda \
            else parameters[name].device
        optimizer.state[parameters[name]][kind] = value.clone().to(device)


# ------------------------------------------------------------------------------------------------
# Another run's weights

def adapt(source: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of `source` for `model`, two of model.py's; whatever does not fit is new, as `model`
    has it: the classifier if the number of classes differs, the rows of temb, prompts and the
    adapters of passes that `source` lacks.  Says so.
    """
    old, new = source.state_dict(), model.state_dict()
    theirs, ours = source.config, model.config
    tensors = {name: old.get(name, value) for name, value in new.items()}
    if theirs.num_classes != ours.num_classes:
        layers = [name for name in new if ".conv_seg." in name]
        tensors.update({name: new[name] for name in layers})
        print(f"classes    {theirs.num_classes} there, {ours.num_classes} here: new random values "
              f"for {', '.join(layers)}")
    elif theirs.class_names != ours.class_names:
        print("classes    as many, but other names: the classifier is taken over as it is")
    if theirs.refine_steps != ours.refine_steps:
        rows = [n for n in ("temb", "prompts") if n in new and len(new[n]) != len(old[n])]
        for name in rows:                                # adapters come and go by their names
            tensors[name] = torch.cat([old[name][:len(new[name])], new[name][len(old[name]):]])
        kept = min(theirs.refine_steps, ours.refine_steps)
        print(f"passes     {theirs.refine_steps} there, {ours.refine_steps} here: first {kept} of "
              f"{', '.join(rows) or 'nothing'}" + ("; the later ones are new random values"
                                                   if ours.refine_steps > kept else ""))
    return tensors
