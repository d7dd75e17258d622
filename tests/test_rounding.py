"""Stochastic rounding to bfloat16 and the optimisers that use it.

    pytest tests/test_rounding.py
"""
import pytest
import torch
from torch import nn

from ops import muon
from ops.rounding import LIMIT, AdamW, round_stochastically

DRAWS = 20_000


def rounded(value, seed=0):
    """float64 of many roundings of one number."""
    torch.manual_seed(seed)
    return round_stochastically(torch.full((DRAWS,), value)).double()


def parts(seed=0):
    """A linear layer and the bare vector beside it, from a seed; the layer in bfloat16."""
    torch.manual_seed(seed)
    return nn.ParameterList([nn.Parameter(torch.randn(24, 40).bfloat16()),
                             nn.Parameter(torch.randn(7))])


def steps(optimizer, params, count, seed):
    """Steps on gradients that are the same for every list of parameters, seeded as train.py does.
    """
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        torch.manual_seed(seed + step)
        optimizer.step()


@pytest.mark.parametrize("part", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("low", [1.0, -1.0, 3.0, -2.0 ** -130, 2.0 ** 100])
def test_the_mean_is_the_number(part, low):
    """Only the two neighbours occur, the farther from zero with the part of the way to it as its
    probability: of both signs, of subnormal numbers, of large ones.
    """
    high = (torch.tensor(low).bfloat16().view(torch.int16) + 1).view(torch.bfloat16).double().item()
    found = rounded(torch.tensor(low + part * (high - low)).float().item())
    assert set(found.tolist()) == {low, high}
    share = (found == high).double().mean().item()
    assert abs(share - part) < 5 * (part * (1 - part) / DRAWS) ** 0.5


def test_what_bfloat16_has_stays():
    """All 65,536 patterns but NaN, both zeros and infinities among them, to the bit; NaN stays NaN,
    whatever its bits.
    """
    every = torch.arange(-2 ** 15, 2 ** 15).short().view(torch.bfloat16)
    numbers = every[~every.isnan()]
    torch.manual_seed(0)
    found = round_stochastically(numbers.float())
    assert torch.equal(found.view(torch.int16), numbers.view(torch.int16))
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    assert nans.view(torch.float32).isnan().all()
    for _ in range(20):
        assert round_stochastically(nans.view(torch.float32)).isnan().all()


def test_no_finite_number_becomes_infinite():
    """float32's largest, and what lies between it and bfloat16's, become bfloat16's largest."""
    for number in (torch.finfo(torch.float32).max, 3.395e38):
        assert set(rounded(number).tolist()) == {LIMIT}
        assert set(rounded(-number).tolist()) == {-LIMIT}


def test_noise_is_the_generators():
    """The same after the same seed, another after another, and in the next call."""
    first, again, other = rounded(1.001), rounded(1.001), rounded(1.001, seed=1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    x = torch.full((100,), 1.001)
    assert not torch.equal(round_stochastically(x), round_stochastically(x))


def test_updates_too_small_to_see_add_up():
    """400 updates of 1/10 of a step of bfloat16: rounded to the nearest, nothing has moved; rounded
    at random, the weights are where float32's are, within the noise.
    """
    nearest = torch.ones(4000).bfloat16()
    random, exact, update = nearest.clone(), nearest.double(), 2.0 ** -7 / 10
    torch.manual_seed(0)
    for _ in range(400):
        nearest = (nearest.float() + update).bfloat16()
        random, exact = round_stochastically(random.float() + update), exact + update
    assert (nearest == 1).all()
    moved = (random.double() - 1).mean().item()
    assert moved == pytest.approx(exact[0].item() - 1, rel=0.01)


def test_adamw_of_float32_is_torchs():
    """To the bit, beside a weight in bfloat16."""
    ours, theirs = parts(), parts()
    steps(AdamW(ours, lr=0.01, weight_decay=0.1, fused=True), ours, 3, seed=0)
    steps(torch.optim.AdamW(theirs[1:], lr=0.01, weight_decay=0.1, fused=True), theirs, 3, seed=0)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("by_muon", [False, True])
def test_a_step_of_bfloat16_is_float32s_step_rounded(by_muon):
    """Weight and moments are neighbours, below or above, of what the optimiser makes of the same
    values in float32; the mean of many draws is that value.
    """
    torch.manual_seed(0)
    weight, grad = torch.randn(24, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    exact = one_step(weight.float(), grad.float(), by_muon)
    below = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((exact.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    draws = torch.stack([one_step(weight, grad, by_muon, seed) for seed in range(DRAWS // 100)])
    assert draws.dtype == torch.bfloat16 and ((draws == below) | (draws == above)).all()
    errors = ((draws.double() - exact.double()) / (above - below).double()).flatten(2).mean(dim=0)
    assert (errors.mean(dim=1).abs() < 0.01).all()
    assert (errors.abs() < 0.25).all()                   # 7 standard deviations of a mean


def one_step(weight, grad, by_muon, seed=0):
    """(weight, its moments) after a step of AdamW or Muon, as one tensor."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight.clone())
    layer.weight.grad = grad.clone()
    group = {"params": [layer.weight], "lr": 0.01, "lr_scale": 1.0, "weight_decay": 0.1}
    optimizer = muon.Muon(muon.split([group], layer, 0.01, 0.02)) if by_muon else \
        AdamW([group], fused=True)
    torch.manual_seed(seed)
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert by_muon or state.pop("step") == 1
    assert layer.weight.grad is None or weight.dtype == torch.float32
    return torch.stack([layer.weight.detach(), *state.values()])


def test_the_mean_square_forgets():
    """Without gradients exp_avg_sq halves in 693 steps of 0.999; to the nearest, it would stay."""
    p = nn.Parameter(torch.ones(1000).bfloat16())
    optimizer = AdamW([p], lr=1e-3, fused=True)
    steps(optimizer, [p], 1, seed=0)
    before = optimizer.state[p]["exp_avg_sq"].double().mean()
    for _ in range(693):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    after = optimizer.state[p]["exp_avg_sq"].double().mean()
    assert after / before == pytest.approx(0.5, rel=0.03) and optimizer.state[p]["step"] == 694
