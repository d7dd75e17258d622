"""Muon for a backbone that starts from random weights: matrices move by orthogonalised momentum.

Not in the paper, which starts from Stable Diffusion and uses AdamW.  From random weights AdamW's
first updates all have the sign of one dominant direction (sky above, ground below): the latents'
effective rank falls from 11 to 1.4 within 25 steps, and what small objects need is never seen
again.  An orthogonalised update moves every direction alike (K. Jordan et al. 2024, "Muon").
"""
import torch
from torch import Tensor, nn

MOMENTUM = 0.9
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at 0, all values end near 1
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def orthogonalize(matrix: Tensor) -> Tensor:
    """(m, n) -> about U V^T of its singular value decomposition, by five Newton-Schulz steps."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    a, b, c = COEFFICIENTS
    x = wide / (wide.norm() + 1e-12)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.AdamW):
    """AdamW, but groups with "muon": True take orthogonalised steps.

    A step of such a weight, flattened to (out, rest), is lr * sqrt(max(1, out / rest)) * U V^T,
    U V^T from the gradient's Nesterov momentum.  torch.optim.Muon (torch 2.9 on) is the same, but
    takes no convolutions and calculates in bfloat16.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step; frees the gradients of Muon's groups, so that AdamW passes over them."""
        for group in self.param_groups:
            if group["muon"]:
                for p in filter(lambda p: p.grad is not None, group["params"]):
                    self.move(p, group["lr"], group["weight_decay"])
                    p.grad = None
        super().step()

    def move(self, p: nn.Parameter, lr: float, decay: float) -> None:
        """Update one weight."""
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        update = orthogonalize(p.grad.lerp(momentum, MOMENTUM).flatten(1))
        scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        p.mul_(1 - lr * decay).add_(update.view_as(p), alpha=-lr * scale)


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
