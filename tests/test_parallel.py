"""Two processes (gloo, CPU) against one: losses, gradients, weights, metrics, the command line.

    pytest tests/test_parallel.py

Equality is tested in float64.  In float32 one ReLU whose input is 1e-6 from 0 falls to this side or
that, as the processor's kernels add up a batch of 2 or of 4, and one ReLU of 16384 in the
segmentation head moves all gradients by 5e-3 of their norm.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import HEAD, TINY
from safetensors.torch import load_file
from torch import nn

import data
import heads
import train
from ops import parallel
from ops.errors import InputError
from tasks import TASKS
from tasks.flags import resolve
from tasks.recipes import read_recipe

FLAGS = [*TINY, "--refine-steps", "3", "--gradient-checkpointing", "--batch", "8", "--val-scenes",
         "11", "--device", "cpu", "--iterations", "5", "--warmup", "1"]
SMALL = {"seg": HEAD, "depth": [*HEAD, "--prompt-adapter"],
         "pose": ["--deconv-channels", "16", "--crop-width", "64", "--sigma", "1"]}


# ------------------------------------------------------------------------------------------------
# Two processes that wait for work

def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def serve(rank, port, pipe):
    """One process of the pair: runs each (function, arguments) that comes, sends what it gives."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with parallel.group():
        for function, arguments in iter(pipe.recv, None):
            try:
                pipe.send((True, function(*arguments)))
            except Exception:
                pipe.send((False, traceback.format_exc()))


class Pair:
    """pair(function, *arguments): what the two processes give, as a list."""

    def __init__(self):
        context, port = torch.multiprocessing.get_context("spawn"), free_port()
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(rank, port, theirs),
                                                  daemon=True))
            self.processes[-1].start()

    def __call__(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return [self.receive(pipe) for pipe in self.pipes]

    def receive(self, pipe):
        """The next result; fails with the process's traceback."""
        assert pipe.poll(600), "no answer: the processes wait for each other"
        good, value = pipe.recv()
        assert good, value
        return value

    def end(self):
        """Let both go home."""
        for pipe, process in zip(self.pipes, self.processes):
            pipe.send(None)
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def pair():
    """The two processes, started once; this one has one thread, too, so that rounding agrees."""
    threads, pair = torch.get_num_threads(), Pair()
    torch.set_num_threads(1)
    yield pair
    pair.end()
    torch.set_num_threads(threads)


def mine(x):
    """This process's part of a batch: all of it, or the half."""
    return x.chunk(parallel.world())[parallel.rank()]


def distance(a, b):
    """|a - b| / |b| of two lists of tensors, each taken as one vector."""
    a, b = (torch.cat([tensor.double().flatten() for tensor in x]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def recipe(task, out, *flags):
    """A recipe that trains in seconds."""
    given = [*FLAGS, *SMALL[task], "--task", task, "--out", str(out), *map(str, flags)]
    return resolve(given)[0]


# ------------------------------------------------------------------------------------------------
# Pieces

def normalised(module, x):
    """(output, gradient of x, gradients of the parameters, buffers) of one training step."""
    module = deepcopy(module)                            # what a pipe brings is shared memory
    x = mine(x).clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y[0].numel()).view(y[0].shape) * y.exp()).sum().backward()
    return [y.detach(), x.grad, module.weight.grad, module.bias.grad, *module.buffers()]


@pytest.mark.parametrize("offset,digits", [(0.0, 1e-12), (1e7, 1e-7)])
def test_batchnorm_pools_over_processes(pair, offset, digits):
    """Output, gradients and running statistics are those of torch's on the whole batch, also far
    from 0, where a difference of squares would have no digits left.
    """
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3).double() + offset + torch.arange(6.0).view(6, 1, 1, 1)
    one, two = nn.BatchNorm2d(5).double(), parallel.BatchNorm2d(5).double()
    nn.init.normal_(one.weight), nn.init.normal_(one.bias)
    two.load_state_dict(one.state_dict())
    expected, found = normalised(one, x), list(zip(*pair(normalised, two, x)))
    assert all(torch.equal(*values) for values in found[4:])
    # y and dx: a half each; gradients of weight and bias: a part each; running statistics: all
    found = [*map(torch.cat, found[:2]), *map(sum, found[2:4]), *(a for a, _ in found[4:])]
    assert all(distance([a], [b]) < digits for a, b in zip(found, expected))


def test_batchnorm_of_bfloat16_counts_in_float32(pair):
    """Under autocast the statistics are those of the same values in float32; bfloat16's own would
    be 4e-3 off.
    """
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3).bfloat16()
    expected = normalised(nn.BatchNorm2d(5), x.float())
    for y, gradient, *_, mean, variance, _ in pair(normalised, parallel.BatchNorm2d(5), x):
        assert y.dtype == gradient.dtype == torch.bfloat16
        assert distance([mean, variance], expected[4:6]) < 1e-5


def test_batchnorm_in_evaluation_and_its_names_are_torchs(pair):
    """The same state_dict, and running statistics used as they are."""
    one, two = nn.BatchNorm2d(3).eval(), parallel.BatchNorm2d(3).eval()
    assert list(one.state_dict()) == list(two.state_dict()) and isinstance(two, nn.BatchNorm2d)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(torch.cat([y for y, *_ in pair(normalised, two, x)]), one(x))


def pooled(loss, x, target):
    """(value, gradient of x) of a loss on this process's part of a batch."""
    x = mine(x).clone().requires_grad_()
    value = loss(x, mine(target))
    value.backward()
    return value.detach(), x.grad


def seg_batch(classes, kind):
    """Logits and labels (4, 6, 5); class 0 is in the second half only."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(1, classes, (4, 6, 5), generator=generator)
    labels[2:, :2] = 0
    labels[1:, 3] = heads.IGNORE
    labels[:2 if kind == "half ignored" else 4 if kind == "ignored" else 0] = heads.IGNORE
    return 3 * torch.randn(4, classes, 6, 5, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("classes,kind", [(5, ""), (6, ""), (5, "half ignored"), (3, "ignored"),
                                          (255, "")])
def test_lovasz_pools_over_processes(pair, classes, kind):
    """Value and gradient of the whole batch, with classes that don't divide by 2, a class that one
    process has not, ignored pixels, nothing but ignored pixels.
    """
    logits, labels = seg_batch(classes, kind)
    value, gradient = pooled(heads.lovasz_softmax, logits, labels)
    values, gradients = zip(*pair(pooled, heads.lovasz_softmax, logits, labels))
    assert value.dtype == torch.float64 and torch.allclose(sum(values) / 2, value, rtol=1e-12)
    assert torch.allclose(torch.cat(gradients) / 2, gradient, rtol=1e-10, atol=1e-14)
    assert (value > 0) == (kind != "ignored")


@pytest.mark.parametrize("valid", [(4, 9, 0, 3), (0, 0, 7, 30), (0, 0, 0, 0)])
def test_silog_pools_over_processes(pair, valid):
    """Value and gradient of the whole batch, whose images have 0 to 30 valid pixels."""
    generator = torch.Generator().manual_seed(0)
    depth, target = torch.rand(2, 4, 6, 5, generator=generator, dtype=torch.float64) + 0.1
    for i, count in enumerate(valid):
        target[i].view(-1)[count:] = 0
    value, gradient = pooled(heads.silog, depth, target)
    values, gradients = zip(*pair(pooled, heads.silog, depth, target))
    assert value.dtype == torch.float64 and torch.allclose(sum(values) / 2, value, rtol=1e-12)
    assert torch.allclose(torch.cat(gradients) / 2, gradient, rtol=1e-10, atol=1e-14)
    assert (value > 0) == any(valid)


def test_every_process_has_its_slice_of_the_stream():
    """The slices of W processes, laid side by side, are one process's larger micro-batches; also
    from a later start, and across epochs.
    """
    whole = list(islice(data.Stream(7, 6, seed=1, start=2), 9))
    parts = [islice(data.Stream(7, 2, 1, 2, (r, 3)), 9) for r in range(3)]
    assert [sum(slices, []) for slices in zip(*parts)] == whole


def test_a_batch_that_does_not_divide_is_refused(pair):
    """The message names batch, micro-batch and processes, and what would be possible."""
    with pytest.raises(InputError, match="--batch 6 is no multiple of --micro-batch 4 x 1"):
        parallel.accumulation(6, 4)
    for message in pair(refusal, 8, 8):
        assert "--batch 8 is no multiple of --micro-batch 8 x 2 processes: at most --micro-batch " \
            "4" in message


def refusal(batch, micro_batch):
    """Why it isn't possible."""
    with pytest.raises(InputError) as error:
        parallel.accumulation(batch, micro_batch)
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# Training

def widened(batch):
    """A batch whose images, metres and joints are float64."""
    return {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for key, x in batch.items()}


def descend(recipe, steps, plain):
    """(losses per step, gradients of the first step, weights) in float64, by plain gradient descent
    or AdamW.
    """
    training = data.open_set(recipe, "train")
    names = training.classes.names if recipe.task == "seg" else ()
    model, optimizer, _ = train.begin(recipe, False, names, torch.device("cpu"))
    model.double()
    if plain:
        optimizer = torch.optim.SGD(model.param_groups(recipe.lr, 1.0, 0.0))
    batches = map(widened, data.train_loader(training, recipe.micro_batch, 0, 0, 0))
    seen, losses, loss_of = [], [], parallel.distribute(model)

    def note(*_):
        if not seen:
            seen.append({name: p.grad.clone() for name, p in model.named_parameters()
                         if p.requires_grad})

    optimizer.register_step_pre_hook(note)
    for step in range(steps):
        losses.append(train.train_step(loss_of, optimizer, batches, recipe, step,
                                       torch.device("cpu"), torch.float32))
    return losses, seen[0], model.state_dict()


@pytest.mark.parametrize("task", ["seg", *(pytest.param(task, marks=pytest.mark.slow)
                                           for task in ("depth", "pose"))])
def test_two_processes_train_like_one(pair, tmp_path, task):
    """With T = 3, checkpointing and 2 accumulated micro-batches of 2 x 2 images: losses and
    gradients of the first step, weights after three are those of micro-batches of 4.
    """
    one, *both = twice(pair, task, tmp_path, 2, 0.01, True)
    assert_equal(one, *both)
    for _, _, weights in both:
        assert distance(weights.values(), one[2].values()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("task", ["seg", "depth", "pose"])
def test_adamw_takes_the_same_steps_in_two_processes(pair, tmp_path, task):
    """The recipe's optimiser, without accumulation; the weights of both are the same to the bit.

    Those of one process are not compared: AdamW divides by a gradient's size, and where that should
    be 0 (a convolution's bias before a norm), rounding decides the update.
    """
    one, *both = twice(pair, task, tmp_path, 4, 1e-3, False)
    assert_equal(one, *both)
    assert all(torch.equal(a, b) for a, b in zip(both[0][2].values(), both[1][2].values()))


def narrow_steps(recipe):
    """State of the model after two steps."""
    training = data.open_set(recipe, "train")
    model, optimizer, _ = train.begin(recipe, False, training.classes.names, torch.device("cpu"))
    batches = iter(data.train_loader(training, recipe.micro_batch, 0, 0, 0))
    loss_of = parallel.distribute(model)
    for step in range(2):
        train.train_step(loss_of, optimizer, batches, recipe, step, torch.device("cpu"),
                         torch.bfloat16)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_in_bfloat16_are_rounded_alike_in_all_processes(pair, tmp_path):
    """Dropout differs between processes, what an optimiser's step draws does not: the weights stay
    the same to the bit.
    """
    a, b = pair(narrow_steps, recipe("seg", tmp_path, "--micro-batch", 2, "--dropout", 0.3,
                                     "--weights", "bfloat16", "--precision", "bfloat16"))
    assert a["unet.conv_in.weight"].dtype == torch.bfloat16
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_equal(one, *both):
    """All losses and the first gradients of both processes are one's, but for rounding."""
    for losses, gradients, _ in both:
        assert [step.keys() for step in losses] == [step.keys() for step in one[0]]
        for found, expected in zip(losses, one[0]):
            assert found == pytest.approx(expected, rel=1e-10)
        assert distance(gradients.values(), one[1].values()) < 1e-10


def twice(pair, task, out, micro, lr, plain):
    """Three steps in one process with 2 * micro images at once, and in two with micro each."""
    flags = ("--lr", lr, "--micro-batch")
    return (descend(recipe(task, out, *flags, 2 * micro), 3, plain),
            *pair(descend, recipe(task, out, *flags, micro), 3, plain))


def measure(recipe, sheet):
    """Metrics of a new model on the validation set; the first process draws the sheet."""
    held = data.open_set(recipe, "val")
    names = held.classes.names if recipe.task == "seg" else ()
    model = train.build_model(recipe, names).eval()
    for module in model.modules():                       # else all answers are the same class
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.01)
    return TASKS[recipe.task].evaluate(model, held, replace(recipe.protocol, at_once=2),
                                       torch.float32, sheet=sheet if parallel.rank() == 0 else None)


@pytest.mark.parametrize("task", ["seg", *(pytest.param(task, marks=pytest.mark.slow)
                                           for task in ("depth", "pose"))])
def test_metrics_and_pictures_are_one_process_s(pair, tmp_path, task):
    """11 images in batches of 2 for two processes: every metric and every picture is the same."""
    r = recipe(task, tmp_path, "--micro-batch", 2)
    one = measure(r, tmp_path / "one.png")
    for two in pair(measure, r, tmp_path / "two.png"):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(torch.tensor(one[name]).nan_to_num(-1),
                               torch.tensor(two[name]).nan_to_num(-1)), name
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def interrupted(recipe):
    """Train, with a SIGTERM to the second process only, in the second step; steps done."""
    step = train.train_step

    def train_step(*arguments):
        if arguments[4] == 1 and parallel.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    with mock.patch.object(train, "train_step", train_step):
        return train.train(recipe, resume=False)["steps"]


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_after_the_same_step(pair, tmp_path):
    """The first one saves; resumed by both, the run ends as if it had not been stopped."""
    whole, r = (recipe("seg", tmp_path / name, "--micro-batch", 2, "--iterations", 3, "--dropout",
                       0.3, "--val-scenes", 3) for name in ("whole", "stopped"))
    assert pair(interrupted, r) == [2, 2]
    assert json.loads((tmp_path / "stopped" / "last" / "state.json").read_text())["step"] == 2
    pair(train.train, r, True)
    pair(train.train, whole, False)
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors")
            for name in ("whole", "stopped"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]


def poisoned(recipe):
    """The error of a run whose second process meets a NaN, and the weights' change."""
    model, optimizer, _ = train.begin(recipe, False, ("a", "b"), torch.device("cpu"))
    before, r = model.prompts.detach().clone(), parallel.rank()
    batch = {"image": torch.full((2, 3, 64, 64), float("nan") if r else 0.5),
             "target": torch.zeros(2, 64, 64, dtype=torch.long), "name": [f"{r}.jpg"] * 2}
    with pytest.raises(FloatingPointError) as error:
        train.train_step(parallel.distribute(model), optimizer, iter([batch] * 4), recipe, 7,
                         torch.device("cpu"), torch.float32)
    return str(error.value), (model.prompts - before).abs().max().item()


def test_a_non_finite_loss_ends_all_processes(pair, tmp_path):
    """All name the step and the images of all, and none has changed its weights."""
    for message, change in pair(poisoned, recipe("seg", tmp_path, "--micro-batch", 2)):
        assert "nan at step 7" in message and "0.jpg, 0.jpg, 1.jpg, 1.jpg" in message
        assert change == 0


def unreadable():
    """Messages that a process knows after a micro-batch that was bad in the other one only."""
    batches = data.Timed(iter([{"image": torch.zeros(2, 1),
                                 "unreadable": ["", f"{parallel.rank()}.jpg"]}]), 200,
                          lambda batch: None)
    next(batches)
    return list(batches.unreadable), batches.images


def test_unreadable_images_are_counted_over_all_processes(pair):
    """Each process knows everyone's, and how many images all have read."""
    assert pair(unreadable) == [(["0.jpg", "1.jpg"], 4)] * 2


# ------------------------------------------------------------------------------------------------
# The command

@pytest.mark.slow
def test_torchrun_makes_a_run_that_one_process_resumes(tmp_path):
    """The documented command: output of one process, one run folder; resumed without torchrun."""
    out = tmp_path / "run"
    flags = [*FLAGS, *HEAD, "--iterations", "2", "--micro-batch", "4", "--val-scenes", "3", "--out",
             str(out)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--master-port", str(free_port()), "train.py", "--task", "seg", *flags],
                          cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1 and "2 x cpu" in done.stdout
    assert not list(tmp_path.glob("run-*"))
    for name in ("best/model.safetensors", "last/state.json", "pictures/step_000002.png"):
        assert (out / name).is_file(), name
    longer = replace(read_recipe(out / "recipe.json"), iterations=3)
    assert train.train(longer, resume=True)["steps"] == 3
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == [1, 2, 2, 3, 3]
