"""Training on several GPUs or machines: all that the processes of one run tell each other.

    torchrun --nproc-per-node 8 train.py --task seg --dataset ade20k --data PATH
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST train.py ...

THE NUMBER OF PROCESSES CHANGES NOTHING BUT THE SPEED.  The images that all W processes handle at
once are what one process would handle as a single micro-batch of that size: W processes with
--micro-batch m train like one with --micro-batch W*m.  BatchNorm, Lovasz-softmax and SiLog pool
over all of them; everything else is a mean over images of equal size.  Only dropout draws other
numbers.  A run resumed with another W keeps its batch and the order of its images.

The rule for losses: a process returns l_r such that the MEAN over processes is one process's loss.
A collective's backward pass gives d(sum of all l_r)/dx, and DDP averages gradients, so that the
trained gradient is that of the mean.

Every function here also works without torchrun, as one process, and then changes nothing: the
guard `world() == 1` is one that torch.compile can trace.  All processes must call them in the same
order.  Nothing here knows models, data or recipes.
"""
import os
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from ops.errors import InputError

PATIENCE = timedelta(minutes=30)  # for the others, while the first process saves


# ------------------------------------------------------------------------------------------------
# The group

def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to world() - 1.  The first one prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def group():
    """The processes that torchrun started, joined; without torchrun (or with 1) nothing happens.

    Tensors on GPUs go through NCCL, all others through gloo.  Only the first process has a stdout.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        yield
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local < gpus:
        torch.cuda.set_device(local)                     # what "cuda" means from here on
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere) if rank() else nullcontext():
            yield
    # Not after an error: the others may be waiting in a collective until torchrun ends them.
    dist.destroy_process_group()


def accumulation(batch: int, micro_batch: int) -> int:
    """Micro-batches per optimiser step: `batch` images, `micro_batch` at once in each process."""
    if batch % (micro_batch * world()):
        hint = f": at most --micro-batch {batch // world()}" if batch % world() == 0 else ""
        raise InputError(f"--batch {batch} is no multiple of --micro-batch {micro_batch} x "
                         f"{world()} processes{hint}")
    return batch // (micro_batch * world())


def check_device(device: torch.device) -> None:
    """InputError if processes would share a GPU."""
    if world() == 1 or device.type != "cuda":
        return
    if device.index is not None:
        raise InputError(f"--device {device}: each of {world()} processes has a GPU of its own; "
                         "give --device cuda")
    if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise InputError(f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: this machine has "
                         f"{torch.cuda.device_count()} GPUs")


def distribute(model: nn.Module):
    """(images, target) -> losses of `model`, whose gradients are averaged over the processes."""
    if world() == 1:
        return model.loss
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def exchange_gradients(loss_of, now: bool):
    """Context of a forward and backward pass; `now` is False for all but a step's last one."""
    return nullcontext() if world() == 1 or now else loss_of.no_sync()


# ------------------------------------------------------------------------------------------------
# Plain values

def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean over processes of each value; nan or infinite where one of them is."""
    sums = total(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, (sums / world()).tolist()))


def anyone(flag: bool) -> bool:
    """Whether `flag` is true in any process.  Nobody goes on before all have asked."""
    return bool(total(torch.tensor(int(flag))))


def gather(value) -> list:
    """Everyone's `value`, in the processes' order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def first(value):
    """The first process's `value`."""
    return gather(value)[0]


def in_order(values: list) -> list:
    """One list from everyone's, where process r has those of batches r, r + W, r + 2W, ...; where a
    process has more of them than another, the rest follow.
    """
    every = gather(values)
    return [mine[i] for i in range(max(map(len, every))) for mine in every if i < len(mine)]


# ------------------------------------------------------------------------------------------------
# Tensors, with gradients.  torch.compile leaves the graph at a collective.
#
# AllReduceSum and AllToAll are torch.distributed.nn.functional's all_reduce and all_to_all_single.
# Those warn since torch 2.13 that they are deprecated, and what they name instead is private.

def total(x: Tensor) -> Tensor:
    """Sum of x over the processes."""
    return x if world() == 1 else apply_eagerly(AllReduceSum, x)


def by_class(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """probs (C, P), labels (P,) -> this process's share of the classes, with everyone's pixels:
    probs (C', W*P), labels (W*P,), classes (C',), their numbers.

    C' = C / W, rounded up; a row that is no class has the number -1.
    """
    classes = torch.arange(len(probs), device=labels.device)
    if world() == 1:
        return probs, labels, classes
    padding = -len(probs) % world()
    share = (len(probs) + padding) // world()
    received = apply_eagerly(AllToAll, F.pad(probs, (0, 0, 0, padding)))              # (W * C', P)
    rows = received.unflatten(0, (world(), share)).transpose(0, 1).flatten(1)
    classes = F.pad(classes, (0, padding), value=-1)[share * rank():][:share]
    return rows, everyones(labels).flatten(), classes


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, with the statistics of all processes' images in training.

    torch.nn.SyncBatchNorm does the same, but not on CPUs, and is to be swapped in.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same; B, H, W are equal in all processes."""
        if world() == 1 or not self.training:
            return super().forward(x)
        y, mean, variance = apply_eagerly(Normalise, x, self.weight, self.bias, self.eps)
        count = world() * x.numel() / x.shape[1]
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return y


class AllReduceSum(Function):
    """Sum over processes; its gradient is the sum of everyone's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """x of any shape -> the sum over processes."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Everyone's sum depends on this process's x."""
        return AllReduceSum.forward(ctx, grad)


class AllToAll(Function):
    """(W * n, P) -> the same: the r-th n rows go to process r; its gradient goes back that way."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """(W * n, P) -> n rows of each process."""
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous())
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The exchange is its own inverse."""
        return AllToAll.forward(ctx, grad)


class Normalise(Function):
    """x (B, C, H, W), weight and bias (C,) -> BatchNorm over all processes, its mean and variance.

    In weight's precision, whatever x has.  Gradients of weight and bias are this process's part.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        """(B, C, H, W) normalised; mean and variance (C,), without gradient."""
        own = torch.stack(torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0))
        variances, means = everyones(own).unbind(1)                              # (W, C)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)           # no cancellation
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        """Gradients of x, weight and bias: x's depends on everyone's mean and variance."""
        x, weight, mean, scale = ctx.saved_tensors
        mean, scale, gain = (v[:, None, None] for v in (mean, scale, weight * scale))
        grad, normal = grad.to(weight.dtype), (x.to(weight.dtype) - mean) * scale
        own = torch.stack([(grad * normal).sum((0, 2, 3)), grad.sum((0, 2, 3))])
        count = world() * x.numel() / x.shape[1]
        along, constant = AllReduceSum.forward(ctx, own)[..., None, None] / count
        return ((grad - constant - normal * along) * gain).to(x.dtype), *own, None


def everyones(x: Tensor) -> Tensor:
    """x of all processes, (W, *x.shape), without a gradient."""
    received = x.new_empty(world(), *x.shape)
    dist.all_gather(list(received.unbind()), x.contiguous())
    return received


@torch.compiler.disable
def apply_eagerly(function: type[Function], *values):
    """Apply `function`, outside of any compiled graph."""
    return function.apply(*values)
