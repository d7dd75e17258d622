"""Weights held in bfloat16: stochastic rounding, and AdamW that rounds so.

Not in the paper.  A bfloat16 has 8 significant bits: an update below 1/512 of its weight is lost
whenever it is rounded to the nearest, and most of a fine-tuning's updates are.  Rounded up or down
at random, up with a probability that is the part of the step that is left, it counts in expectation
(P. Zamirai et al. 2020, "Revisiting BFloat16 Training").  So do exp_avg_sq's updates, which move it
by a thousandth.  A weight, its gradient and both moments then take 8 bytes instead of 16.
"""
import torch
from torch import Tensor
from torch.optim.adamw import adamw

LIMIT = torch.finfo(torch.bfloat16).max


def round_stochastically(x: Tensor) -> Tensor:
    """float32 -> one of the two nearest bfloat16, whose mean is x; draws from torch's generator.

    What bfloat16 has stays as it is, so do infinities and NaN; no finite number becomes infinite.
    """
    bits = x.clamp(-LIMIT, LIMIT).view(torch.int32)      # sign, 8 bits of exponent, 7 + 16 of value
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def widen(x: Tensor) -> Tensor:
    """x in float32; itself if it is that already, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def store(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Write `values`, which are the tensors widened and then changed in place, back into them."""
    for tensor, value in zip(tensors, values):
        if value is not tensor:
            tensor.copy_(round_stochastically(value))


class AdamW(torch.optim.AdamW):
    """torch's; weights in bfloat16 take its step in float32, which is then rounded at random.

    Their moments are in bfloat16, too.  All else is torch's own step.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step; frees the gradients of bfloat16 weights, so that torch's passes over them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype == torch.bfloat16 and p.grad is not None:
                    self.move_narrow(p, group)
                    p.grad = None
        super().step()

    def move_narrow(self, p: Tensor, group: dict) -> None:
        """Update a weight in bfloat16; one at a time, so that one is in float32 at a time."""
        state = self.state[p]
        if not state:
            state.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                         exp_avg_sq=torch.zeros_like(p))
        narrow = [p, state["exp_avg"], state["exp_avg_sq"]]
        wide = [widen(x) for x in narrow]
        beta1, beta2 = group["betas"]
        adamw([wide[0]], [widen(p.grad)], [wide[1]], [wide[2]], [], [state["step"]], fused=True,
              amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], eps=group["eps"],
              weight_decay=group["weight_decay"], maximize=False)
        store(narrow, wide)
