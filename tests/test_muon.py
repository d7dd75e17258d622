"""Muon, for backbones from random weights, against torch's own.

    pytest tests/test_muon.py
"""
from copy import deepcopy

import pytest
import torch
from oracles import ROUNDING, relative_error
from torch import nn

from ops import muon


def gradients(layers: nn.Module, seed: int) -> None:
    """The same random gradients for every module of this shape."""
    generator = torch.Generator().manual_seed(seed)
    for p in layers.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("shape", [(8, 8), (4, 36), (36, 4)])
def test_orthogonalize(shape):
    """All singular values come near 1, whatever they were, as in Newton and Schulz's iteration; the
    singular vectors stay.
    """
    torch.manual_seed(0)
    u, s, vt = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    steep = u @ torch.diag(torch.logspace(0, -1.5, len(s), dtype=torch.float64)) @ vt
    inside = u.T @ muon.orthogonalize([steep[None]])[0][0] @ vt.T
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()
    assert (inside - torch.diag(inside.diagonal())).abs().max() < ROUNDING
    x = steep / steep.norm()
    for _ in range(5):                                   # as Jordan writes it
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    assert relative_error(muon.orthogonalize([steep[None]])[0][0], x) < ROUNDING


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_steps_equal_torchs_muon(shape, monkeypatch):
    """Five steps of a linear layer are torch.optim.Muon's, kept from rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    torch.manual_seed(0)
    ours = nn.Linear(*shape, bias=False, dtype=torch.float64)
    theirs = nn.Linear(*shape, bias=False, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": [ours.weight], "lr": 0.1, "weight_decay": 0.05, "lr_scale": 1.0}]
    optimizers = (muon.Muon(muon.split(groups, ours, 0.1, 0.02)),
                  torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.05,
                                   momentum=muon.MOMENTUM, adjust_lr_fn="original"))
    for step in range(5):
        for layer, optimizer in zip((ours, theirs), optimizers):
            gradients(layer, step)
            optimizer.step()
    assert relative_error(ours.weight, theirs.weight) < ROUNDING


def test_a_convolution_moves_as_its_flattened_matrix():
    """A weight (out, in, 3, 3) takes the step of the linear layer (out, in * 9)."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(27, 8, bias=False)
    linear.weight.data.copy_(conv.weight.data.flatten(1))
    for layer in (conv, linear):
        group = {"params": [layer.weight], "lr": 1.0, "weight_decay": 0.0, "lr_scale": 1.0}
        generator = torch.Generator().manual_seed(1)
        layer.weight.grad = torch.randn(8 * 27, generator=generator).view_as(layer.weight)
        muon.Muon(muon.split([group], layer, 1.0, 0.02)).step()
    assert torch.equal(conv.weight.flatten(1), linear.weight)


def test_layers_of_one_shape_step_as_if_alone():
    """Weights that are orthogonalised together don't mix: each steps as by itself, also when one of
    them got no gradient.
    """
    torch.manual_seed(0)
    alone = [nn.Linear(4, 6, bias=False, dtype=torch.float64) for _ in range(3)]
    together = deepcopy(alone)
    gradients(nn.ModuleList(alone[:2]), 1), gradients(nn.ModuleList(together[:2]), 1)
    group = {"params": [x.weight for x in together], "lr": 1.0, "weight_decay": 0.1,
             "lr_scale": 1.0}
    muon.Muon(muon.split([group], nn.ModuleList(together), 1.0, 0.02)).step()
    for layer in alone:
        group = {"params": [layer.weight], "lr": 1.0, "weight_decay": 0.1, "lr_scale": 1.0}
        muon.Muon(muon.split([group], layer, 1.0, 0.02)).step()
    for a, b in zip(alone, together):
        assert relative_error(a.weight, b.weight) < ROUNDING


def test_everything_but_layers_stays_with_adamw():
    """Biases, norms and bare parameters are in one group each, at AdamW's rate, and step as there.
    """
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": [*ours.parameters()], "lr": 0.01, "lr_scale": 1.0, "weight_decay": 0.1}]
    parts = muon.split(groups, ours, 0.01, 0.02)
    assert [len(part["params"]) for part in parts] == [1, 3]
    assert [part["lr"] for part in parts] == [0.02, 0.01]
    optimizers = muon.Muon(parts), torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for layers, optimizer in zip((ours, theirs), optimizers):
        gradients(layers, 0)
        optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q) is (name != "0.weight"), name
