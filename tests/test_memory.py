"""The estimate of a step's memory, against the same step with real tensors; what --memory does.

    pytest tests/test_memory.py
"""
from dataclasses import replace

import pytest
import test_train
import torch

from tools import memory
import train
from ops.errors import InputError
from model import Config, MetaPromptModel
from unet import UNetConfig
from vae import VAEConfig
from tasks.recipes import RECIPES, read_recipe

CPU = torch.device("cpu")
SMALL = dict(num_prompts=8, refine_steps=2, head_channels=16, num_classes=5,
             unet=UNetConfig((32, 32, 64, 64), layers=1, num_heads=2, context_dim=64),
             vae=VAEConfig((32, 32, 32, 32), layers=1))


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimiser of a training run."""
    groups = model.param_groups(1e-3, 0.1, 0.01)
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


def fit(monkeypatch, task: str, **changes):
    """Micro-batch that `memory.fit` chooses if the weights take 13 GB and every image 3.5."""
    monkeypatch.setattr(memory, "step_peak",
                        lambda config, shape, *_: round(13e9 + 3.5e9 * shape[0]))
    recipe = replace(RECIPES[task, {"seg": "ade20k", "depth": "nyu"}[task]], **changes)
    chosen = memory.fit(recipe, None, lambda: (3, 64, 64), None, CPU, torch.float32)
    assert replace(chosen, micro_batch=recipe.micro_batch) == recipe
    return chosen.micro_batch


@pytest.mark.parametrize("task,gigabytes,chosen", [
    ("seg", 20.9, None), ("seg", 21, 2), ("seg", 24, 2), ("seg", 48, 8), ("seg", 80, 16),
    ("depth", 17, None), ("depth", 17.5, 1), ("depth", 24, 2), ("depth", 48, 8), ("depth", 80, 12)])
def test_memory_takes_the_largest_micro_batch_that_fits(monkeypatch, task, gigabytes, chosen):
    """A divisor of the batch, two or more for seg; nothing else changes; refused if none fits."""
    if chosen is None:
        with pytest.raises(InputError, match=f"--memory {gigabytes:g}: the smallest step"):
            fit(monkeypatch, task, memory=gigabytes)
    else:
        assert fit(monkeypatch, task, memory=gigabytes) == chosen


def test_memory_divides_a_processs_share(monkeypatch):
    """With four processes a micro-batch divides a quarter of the batch."""
    monkeypatch.setattr(memory.parallel, "world", lambda: 4)
    assert fit(monkeypatch, "seg", memory=80) == 4


def test_a_run_keeps_what_memory_chose(tmp_path, monkeypatch):
    """recipe.json holds the micro-batch; a resumed run does not choose again."""
    asked = []
    monkeypatch.setattr(memory, "step_peak",
                        lambda config, shape, *_: asked.append(shape) or 10**9 * shape[0])
    recipe = test_train.recipe(tmp_path, "--memory", 5.5, "--iterations", 1)
    train.train(recipe, resume=False)
    kept = read_recipe(tmp_path / "recipe.json")
    assert asked == [(2, 3, 64, 64), (4, 3, 64, 64)]
    assert kept == replace(recipe, micro_batch=4)
    train.train(replace(kept, iterations=2), resume=True)
    assert len(asked) == 2


def real_peak(config: Config, shape: tuple[int, ...]) -> int:
    """Bytes of all tensors alive at the peak of two real steps with all classes."""
    with memory.Alive() as alive:
        model = MetaPromptModel(config).train()
        optimizer = adamw(model)
        for _ in range(2):
            B, _, H, W = shape
            batch, target = torch.rand(shape), torch.randint(config.num_classes, (B, H, W))
            losses = model.loss(batch, target)
            sum(losses.values()).backward()
            del batch, target, losses
            optimizer.step()
            optimizer.zero_grad()
    return alive.peak


@pytest.mark.slow
def test_the_estimate_is_what_a_real_step_needs():
    """Fake tensors give the bytes that real ones take, within 3 %."""
    config = Config(**SMALL)
    shape = (2, 3, 64, 128)
    estimate = memory.step_peak(config, shape, False, False, adamw, CPU, torch.float32)
    assert estimate == pytest.approx(real_peak(config, shape), rel=0.03)


@pytest.mark.slow
def test_checkpointing_and_accumulation_are_seen():
    """Less without stored activations; more where gradients wait for the next micro-batch."""
    config = Config(**SMALL)
    peaks = [memory.step_peak(config, (2, 3, 128, 128), accumulate, checkpointing, adamw, CPU,
                              torch.float32)
             for accumulate, checkpointing in ((False, False), (False, True), (True, True))]
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[1] < peaks[2]
