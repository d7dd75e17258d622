"""Muon: matrices move by orthogonalised momentum (K. Jordan et al. 2024, "Muon").

Not in the paper, which uses AdamW.  The recipes on the tiny backbone have minutes, in which AdamW
gets less far, and from random weights nowhere: its first updates all have the sign of one dominant
direction (sky above, ground below), the latents' effective rank falls from 11 to 1.4 within 25
steps, and what small objects need is never seen again.  An orthogonalised update moves every
direction alike.
"""
import torch
from torch import Tensor, nn

MOMENTUM = 0.9
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at 0, all values end near 1
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(K, m, n) -> about U V^T of each U S V^T, by five Newton-Schulz steps.

    x <- (a + b G + c G^2) x, G = x x^T, where every factor is a polynomial of the first G: so they
    are multiplied among themselves, small and square, and x is touched only at both ends.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-12)               # (K, m, n), m <= n
    a, b, c = COEFFICIENTS
    gram = x @ x.mT                                                        # (K, m, m)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(5):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x if wide is matrices else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, but groups with "muon": True take orthogonalised steps.

    A step of such a weight, flattened to (out, rest), is lr * sqrt(max(1, out / rest)) * U V^T,
    U V^T from the gradient's Nesterov momentum.  torch.optim.Muon (torch 2.9 on) is the same, but
    takes no convolutions and computes in bfloat16.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step; frees the gradients of Muon's groups, so that AdamW passes over them."""
        for group in self.param_groups:
            if group["muon"]:
                shapes: dict[tuple, list[nn.Parameter]] = {}
                for p in filter(lambda p: p.grad is not None, group["params"]):
                    shapes.setdefault(tuple(p.flatten(1).shape), []).append(p)
                for same in shapes.values():             # a narrow model: many small products
                    self.move(same, group["lr"], group["weight_decay"])
        super().step()

    def move(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        """Update weights of one flattened shape, together."""
        grads, moments = [p.grad for p in params], []
        for p in params:
            moments.append(self.state[p].setdefault("momentum", torch.zeros_like(p)))
            p.grad = None
        torch._foreach_lerp_(moments, grads, 1 - MOMENTUM)
        nesterov = torch._foreach_lerp(grads, moments, MOMENTUM)
        updates = orthogonalize(torch.stack([u.flatten(1) for u in nesterov]))
        rate = lr * max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
        for p, update in zip(params, updates):
            p.mul_(1 - lr * decay).add_(update.view_as(p), alpha=-rate)


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
