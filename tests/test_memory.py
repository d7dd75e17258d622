"""The estimate of a step's memory, against the same step with real tensors.

    pytest tests/test_memory.py
"""
import pytest
import torch

import memory
from model import Config, MetaPromptModel

CPU = torch.device("cpu")
SMALL = dict(num_prompts=8, refine_steps=2, head_channels=16, unet_channels=(32, 32, 64, 64),
             num_heads=2, context_dim=64, vae_channels=(32, 32, 32, 32), num_classes=5,
             unet_layers=1, vae_layers=1)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimiser of a training run."""
    groups = model.param_groups(1e-3, 0.1, 0.01)
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


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
