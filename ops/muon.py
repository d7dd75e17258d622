"""Muon: matrices move by orthogonalised momentum (K. Jordan et al. 2024, "Muon").

Not in the paper, which uses AdamW.  The recipes on the tiny backbone have minutes, in which AdamW
gets less far, and from random weights nowhere: its first updates all have the sign of one dominant
direction (sky above, ground below), the latents' effective rank falls from 11 to 1.4 within 25
steps, and what small objects need is never seen again.  An orthogonalised update moves every
direction alike.
"""
import torch
from torch import Tensor, nn

from ops.rounding import AdamW, store, widen

MOMENTUM = 0.9
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at 0, all values end near 1
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def orthogonalize(batches: list[Tensor]) -> list[Tensor]:
    """Batches (K, m, n) of several shapes -> about U V^T of each U S V^T, by five Newton-Schulz
    steps.

    x <- (a + b G + c G^2) x, G = x x^T, where every factor is a polynomial of the first G: so they
    are multiplied among themselves, small and square, and x is touched only at both ends.  In a
    narrow model many shapes have a G of one size: these go through the steps together.
    """
    wide = [x if x.shape[1] <= x.shape[2] else x.mT for x in batches]
    wide = [x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12) for x in wide]  # (K, m, n), m <= n
    sizes: dict[int, list[int]] = {}
    for i, x in enumerate(wide):
        sizes.setdefault(x.shape[1], []).append(i)
    for indices in sizes.values():
        products = newton_schulz(torch.cat([wide[i] @ wide[i].mT for i in indices]))
        for i, product in zip(indices, products.split([len(wide[i]) for i in indices])):
            wide[i] = product @ wide[i]
    return [x if x.shape == given.shape else x.mT for x, given in zip(wide, batches)]


def newton_schulz(gram: Tensor) -> Tensor:
    """(K, m, m) G -> the product of five steps' factors, about G^(-1/2)."""
    product = factor = quintic(gram)
    for _ in range(4):
        gram = factor @ gram @ factor                    # of x after the steps so far
        factor = quintic(gram)
        product = factor @ product
    return product


def quintic(gram: Tensor) -> Tensor:
    """(K, m, m) G -> a + b G + c G^2: x times it is one step."""
    a, b, c = COEFFICIENTS
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.baddbmm(b * gram, gram, gram, alpha=c) + a * identity


class Muon(AdamW):
    """AdamW, but groups with "muon": True take orthogonalised steps.

    A step of such a weight, flattened to (out, rest), is lr * sqrt(max(1, out / rest)) * U V^T,
    U V^T from the gradient's Nesterov momentum.  torch.optim.Muon (torch 2.9 on) is the same, but
    takes no convolutions and computes in bfloat16.  Here weights and momentum may be held in
    bfloat16: the step is float32's, rounded at random (ops/rounding.py).
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step; frees the gradients of Muon's groups, so that AdamW passes over them."""
        for group in self.param_groups:
            if group["muon"]:
                shapes: dict[tuple, list[nn.Parameter]] = {}
                for p in filter(lambda p: p.grad is not None, group["params"]):
                    shapes.setdefault(tuple(p.flatten(1).shape), []).append(p)
                self.move(list(shapes.values()), group["lr"], group["weight_decay"])
        super().step()

    def move(self, shapes: list[list[nn.Parameter]], lr: float, decay: float) -> None:
        """Update weights, given by flattened shape."""
        updates = orthogonalize([torch.stack(self.nesterov(same)) for same in shapes])
        for same, update in zip(shapes, updates):
            rate = lr * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            weights = [widen(p) for p in same]
            torch._foreach_mul_(weights, 1 - lr * decay)
            torch._foreach_add_(weights, [u.view_as(p) for u, p in zip(update, same)], alpha=-rate)
            store(same, weights)

    def nesterov(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Flattened momenta that already know this gradient, which is freed."""
        held = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        moments, grads = [widen(m) for m in held], [widen(p.grad) for p in params]
        for p in params:
            p.grad = None
        torch._foreach_lerp_(moments, grads, 1 - MOMENTUM)
        store(held, moments)
        return [u.flatten(1) for u in torch._foreach_lerp(grads, moments, MOMENTUM)]


def split(groups: list[dict], model: nn.Module, lr: float, muon_lr: float) -> list[dict]:
    """AdamW's `groups` at `lr`, with the weights of convolutions and linear layers in a group of
    Muon's at `muon_lr`, whatever their rate was.
    """
    layers = {id(m.weight) for m in model.modules() if isinstance(m, LAYERS)}
    ours = [p for group in groups for p in group["params"] if id(p) in layers]
    rest = [{**group, "muon": False, "params": [p for p in group["params"] if id(p) not in layers]}
            for group in groups]
    decay = groups[0]["weight_decay"]
    return [{"params": ours, "lr": muon_lr, "lr_scale": muon_lr / lr, "weight_decay": decay,
             "muon": True}, *(group for group in rest if group["params"])]
