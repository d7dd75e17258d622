"""What a step of pretraining is made of, besides its loss: random numbers, optimiser, rate."""
import torch
from torch import nn

from ops.muon import Muon, split
from pretraining.settings import Settings


def generator(settings: Settings, step: int) -> torch.Generator:
    """The random numbers of one step: a stopped run goes on with the ones it would have had."""
    return torch.Generator().manual_seed((settings.seed << 32) + step)


def optimizer_of(settings: Settings, model: nn.Module) -> Muon:
    """Muon for the matrices, AdamW for the rest, no weight decay."""
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = Muon(split(groups, model, settings.lr, settings.muon_lr), lr=settings.lr)
    for group in optimizer.param_groups:
        group["full_lr"] = group["lr"]
    return optimizer


def set_rate(optimizer: Muon, settings: Settings, step: int, steps: int) -> None:
    """Linear warm-up, then the full rate, then linear decay to 0 over the last `decay` share."""
    warmup, decay = max(settings.warmup, 1), max(settings.decay * steps, 1)
    share = min(1.0, (step + 1) / warmup, (steps - step) / decay)
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * share
