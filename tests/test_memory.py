"""The estimate of a step's memory, against the same step with real tensors; the flags that fit.

    pytest tests/test_memory.py
"""
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from helpers import HEAD, TINY, refused
from torch import nn

import train
from model import Config, MetaPromptModel
from ops.device import autocast, cast_weights
from ops.errors import InputError
from ops.rounding import AdamW
from tasks.flags import resolve
from tasks.recipes import find_recipe
from tools import ablate, memory
from unet import UNetConfig
from vae import VAEConfig

CPU = torch.device("cpu")
SMALL = dict(num_prompts=8, refine_steps=2, head_channels=16, num_classes=5,
             unet=UNetConfig((32, 32, 64, 64), layers=1, num_heads=2, context_dim=64),
             vae=VAEConfig((32, 32, 32, 32), layers=1))


def adamw(model: nn.Module) -> AdamW:
    """The optimiser of a training run."""
    groups = model.param_groups(1e-3, 0.1, 0.01)
    return AdamW(groups, lr=1e-3, fused=True)


# ------------------------------------------------------------------------------------------------
# The flags that fit

@pytest.mark.parametrize("task,gigabytes,chosen", [
    ("seg", 14.4, None), ("seg", 14.5, "2 bfloat16"), ("seg", 20.9, "2 bfloat16"),
    ("seg", 21, "2 float32"), ("seg", 24, "2 float32"), ("seg", 48, "8 float32"),
    ("seg", 80, "16 float32"),
    ("depth", 10.9, None), ("depth", 11, "1 bfloat16"), ("depth", 17, "2 bfloat16"),
    ("depth", 17.5, "1 float32"), ("depth", 48, "8 float32"), ("depth", 80, "12 float32")])
def test_the_largest_micro_batch_that_fits(monkeypatch, task, gigabytes, chosen):
    """A divisor of the batch, two or more for seg; weights in bfloat16 only where float32 has no
    room; refused if none fits.

    Weights are taken to need 13 GB, half of it in bfloat16, every image 3.5.
    """
    monkeypatch.setattr(memory, "step_peak", lambda *given: round(
        (6.5e9 if given[-1] == torch.bfloat16 else 13e9) + 3.5e9 * given[1][0]))
    recipe = find_recipe(task, {"seg": "ade20k", "depth": "nyu"}[task])
    if chosen is None:
        with pytest.raises(InputError, match=f"--fit {gigabytes:g}: the smallest step needs"):
            memory.fit(recipe, gigabytes, [])
    else:
        found = memory.fit(recipe, gigabytes, [])
        assert f"{found.micro_batch} {found.weights}" == chosen
        assert replace(found, micro_batch=recipe.micro_batch, weights="float32",
                       precision="auto") == recipe


@pytest.mark.parametrize("given, tried", [
    ([], ["", "checkpointing", "checkpointing bfloat16"]),
    (["--weights"], ["", "checkpointing"]), (["--no-gradient-checkpointing"], ["", "bfloat16"]),
    (["--weights", "--no-gradient-checkpointing"], [""]), (["--precision"], ["", "checkpointing"])])
def test_what_fit_tries(given, tried):
    """Checkpointing, then weights in bfloat16; what was given stays, and what needs more than was
    given is not tried.
    """
    recipe = replace(find_recipe("seg", "ade20k"), gradient_checkpointing=False,
                     precision="float32" if "--precision" in given else "auto")
    found = memory.settings(recipe, given)
    assert [" ".join(["checkpointing"] * r.gradient_checkpointing
                     + ["bfloat16"] * (r.weights == r.precision == "bfloat16"))
            for r in found] == tried
    assert memory.settings(find_recipe("seg", "ade20k"), ["--weights"]) == \
        [find_recipe("seg", "ade20k")]


def test_the_command_prints_flags_that_train_takes(monkeypatch, capsys):
    """Without data: the estimate of the recipe's step, or a command line for train.py."""
    monkeypatch.setattr(memory, "step_peak", lambda config, shape, *_: 10**9 * shape[0])
    words = ["--task", "depth", "--dataset", "nyu", "--crop", "448", "--data", "my data"]
    monkeypatch.setattr(sys, "argv", ["memory", *words])
    memory.main()
    assert capsys.readouterr().out == "about 4.0 GB for a step with --micro-batch 3\n"
    monkeypatch.setattr(sys, "argv", ["memory", *words, "--fit", "9.5"])
    memory.main()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("fits 9.5 GB: python train.py ")
    made = resolve(shlex.split(line.split("train.py ")[1]))[0]
    assert made.micro_batch == 8 and made.files.data == "my data" and made.weights == "float32"
    monkeypatch.setattr(memory, "step_peak", lambda *given: round(
        20e9 - 8e9 * given[3] - 8e9 * (given[-1] == torch.bfloat16)))
    monkeypatch.setattr(sys, "argv", ["memory", *words, "--fit", "9.5"])
    memory.main()
    made = resolve(shlex.split(capsys.readouterr().out.split("train.py ")[1]))[0]
    assert made.weights == "bfloat16" and made.gradient_checkpointing


@pytest.mark.parametrize("flags,message", [
    (["--fit", "0"], "--fit 0: gigabytes of one GPU"), (["--fit", "inf"], "--fit inf: gigabytes"),
    (["--fit", "nan"], "--fit nan: gigabytes"),
    (["--fit", "24", "--micro-batch", "2"], "--micro-batch is what --fit finds"),
    (["--fit", "24", "--micro-batch=2"], "--micro-batch is what --fit finds"),
    (["--fit", "much"], "--fit"),
    (["--memory", "24"], "--memory")])
def test_bad_flags_are_refused_in_one_line(monkeypatch, capsys, flags, message):
    """Exit code 2 and one line."""
    code, stderr = refused(memory.main, monkeypatch, capsys, *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr


@pytest.mark.parametrize("tool, flag", [(memory, "--fit GB"), (ablate, "--seeds K")])
def test_help_says_what_the_command_takes(monkeypatch, capsys, tool, flag):
    """Its docstring and its flags."""
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        tool.main()
    printed = capsys.readouterr().out
    assert "train.py's flags, too" in printed and flag in printed


def test_a_resumed_run_keeps_its_micro_batch(tmp_path, monkeypatch, capsys):
    """--resume is refused."""
    flags = [*TINY, *HEAD, "--val-scenes", "2", "--iterations", "1", "--out", str(tmp_path)]
    train.train(resolve(flags)[0], resume=False)
    capsys.readouterr()
    code, stderr = refused(memory.main, monkeypatch, capsys, "--resume", tmp_path)
    assert code == 2 and "--resume: a run keeps its micro-batch" in stderr


# ------------------------------------------------------------------------------------------------
# The estimate

def real_peak(config: Config, shape: tuple[int, ...], weights: torch.dtype) -> int:
    """Bytes of all tensors alive at the peak of two real steps with all classes."""
    with memory.Alive() as alive:
        model = cast_weights(MetaPromptModel(config).train(), weights)
        optimizer = adamw(model)
        for _ in range(2):
            B, _, H, W = shape
            batch, target = torch.rand(shape), torch.randint(config.num_classes, (B, H, W))
            with autocast(CPU, weights):
                losses = model.loss(batch, target)
            sum(losses.values()).backward()
            del batch, target, losses
            optimizer.step()
            optimizer.zero_grad()
    return alive.peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_is_what_a_real_step_needs(monkeypatch, dtype):
    """Fake tensors give the bytes that real ones take, within 3 %, with everything in float32 and
    with weights in bfloat16, whose bytes are half; on a CPU norms stay narrow.
    """
    monkeypatch.setattr(memory, "widen_norms", lambda model, dtype: model)
    config = Config(**SMALL)
    shape = (2, 3, 64, 128)
    estimate = memory.step_peak(config, shape, False, False, adamw, CPU, dtype, dtype)
    assert estimate == pytest.approx(real_peak(config, shape, dtype), rel=0.03)


def test_norms_are_counted_as_on_a_gpu():
    """Under bfloat16 they read and give float32; in float32 nothing changes."""
    for dtype in (torch.float32, torch.bfloat16):
        norms = memory.widen_norms(nn.Sequential(nn.GroupNorm(1, 4), nn.LayerNorm(4)), dtype)
        assert norms(torch.ones(2, 4).to(dtype)).dtype == torch.float32
        assert len(norms[0]._forward_pre_hooks) == (dtype == torch.bfloat16)


@pytest.mark.slow
def test_checkpointing_and_accumulation_are_seen():
    """Less without stored activations; more where gradients wait for the next micro-batch."""
    config = Config(**SMALL)
    peaks = [memory.step_peak(config, (2, 3, 128, 128), accumulate, checkpointing, adamw, CPU,
                              torch.float32)
             for accumulate, checkpointing in ((False, False), (False, True), (True, True))]
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[1] < peaks[2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["seg", "depth", "pose"])
def test_every_task_is_estimated(task):
    """A step of each embedded recipe, its optimiser and targets included."""
    assert 0.01 < memory.step_gb(find_recipe(task, "shapes")) - memory.OTHER_GB < 20
