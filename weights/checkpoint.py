"""Checkpoints of a training run: written atomically, loaded strictly, no pickle.

    RUN/last/            config.json, model.safetensors, optimizer.safetensors, state.json
    RUN/last.previous/   the one before, in case the newest proves unreadable
    RUN/best/            config.json, model.safetensors, README.md (model card)

A checkpoint is written to a folder of another name, flushed to the disk and then renamed: whenever
the program dies, `last` or `last.previous` is complete.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ops.errors import InputError
from weights.files import read_tensors


def flush(folder: Path) -> None:
    """Force a folder and the files in it to the disk."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def replace_folder(new: Path, old: Path, keep: bool) -> None:
    """Put the complete folder `new` in the place of `old`; the old one becomes OLD.previous."""
    flush(new)
    previous = old.with_name(old.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if old.exists():
        os.rename(old, previous)
    os.rename(new, old)
    flush(old.parent)
    if not keep:
        shutil.rmtree(previous, ignore_errors=True)


def empty_folder(path: Path) -> Path:
    """`path`, made anew: a leftover of a run that died while writing is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


CARD = """---
tags: [meta-prompts, {task}]
license: {licence}
---
# Meta Prompts: {task}, {dataset}

Trained with `train.py` of Meta Prompts in plain PyTorch (Wan et al. 2023, arXiv:2312.14733); load
it with `MetaPromptModel.from_pretrained`.  Images are RGB in [0, 1].

Metrics on the validation set after step {step}: {metrics}

{note}

Recipe:
```json
{recipe}
```
"""
LICENCES = {  # (licence of what is uploaded, what its user must know)
    True: ("mit", "The backbone started from random weights: no Stable Diffusion in it."),
    False: ("creativeml-openrail-m", "Fine-tuned from Stable Diffusion 1.x, whose CreativeML "
            "OpenRAIL-M licence and use restrictions pass on to this model.  The data set has "
            "terms of its own."),
}


def model_card(recipe: dict, metrics: dict, step: int) -> str:
    """Text of the Hub's README.md: task, recipe, metrics (scalars only), licence."""
    licence, note = LICENCES[recipe["backbone"] == "tiny" or recipe["init"] == "random"]
    scalars = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
    shown = {k: v for k, v in recipe.items() if k not in ("out", "data", "device")}
    return CARD.format(task=recipe["task"], dataset=recipe["dataset"], licence=licence, note=note,
                       step=step, metrics=scalars, recipe=json.dumps(shown, indent=2))


def save_best(run: Path, model: nn.Module, card: str = "") -> None:
    """Write RUN/best, ready for the Hub; `card` is its README.md."""
    folder = empty_folder(run / "best.tmp")
    model.save_pretrained(folder)
    (folder / "README.md").write_text(card)
    replace_folder(folder, run / "best", keep=False)


def save_last(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
              state: dict) -> None:
    """Write RUN/last: weights, optimiser and `state` (step, best result so far)."""
    folder = empty_folder(run / "last.tmp")
    model.save_pretrained(folder)
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}:{key}"] = value.detach().cpu().contiguous()
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    replace_folder(folder, run / "last", keep=True)


def find_last(run: Path) -> Path:
    """RUN/last, or RUN/last.previous if the program died between two renames; or InputError."""
    for folder in (run / "last", run / "last.previous"):
        if (folder / "state.json").is_file():
            return folder
    raise InputError(f"--resume {run}: no last/state.json in it; is it a run folder of train.py?")


def own_memory(model: nn.Module) -> nn.Module:
    """The model, its tensors copied out of the file that they are mapped to.

    Mapped tensors lie at odd addresses, for which matrix kernels may round otherwise.  Copies are
    aligned as in a fresh run, so that resuming is exact to the bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser the moments saved in `folder`; InputError if they don't fit the model."""
    path = folder / "optimizer.safetensors"
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for key, value in read_tensors(path).items():
        name, _, kind = key.rpartition(":")
        if name not in parameters:
            raise InputError(f"{path} has moments of {name}, which the model does not train")
        parameter = parameters[name]
        if value.ndim > 0 and value.shape != parameter.shape:
            raise InputError(f"{path}: {key} has shape {tuple(value.shape)}, expected "
                             f"{tuple(parameter.shape)}")
        device = parameter.device if value.ndim > 0 or parameter.is_cuda else "cpu"
        optimizer.state[parameter][kind] = value.clone().to(device)
