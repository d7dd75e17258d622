"""Training: accumulation, resuming to the bit, signals, and every refusal.

    pytest tests/test_train.py
"""
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HEAD, SCENES, TINY, command, make_folder, recipe, refused
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import train
from ops.errors import InputError
from tasks import methods, seg
from tasks.flags import resolve
from tasks.recipes import read_recipe
from weights import checkpoint
from weights.checkpoint import State

FLAGS = [*TINY, *HEAD, *SCENES]


def test_accumulation_sums_the_micro_batches(tmp_path):
    """One step of 2 x 2 images has the mean gradient of its two micro-batches."""
    r = recipe(tmp_path / "r")
    torch.manual_seed(0)
    model = train.build_model(r, ("a", "b"))
    batches = [{"image": torch.rand(2, 3, 64, 64), "target": torch.randint(0, 2, (2, 64, 64)),
                "name": ["x", "y"]} for _ in range(2)]
    expected = torch.zeros_like(model.prompts)
    for batch in batches:
        model.zero_grad()
        sum(model.loss(batch["image"], batch["target"]).values()).backward()
        expected += model.prompts.grad / 2
    model.zero_grad()
    seen = []
    optimizer = train.build_optimizer(model, r)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.prompts.grad.clone()))
    train.train_step(model.loss, optimizer, iter(batches), r, 0, torch.device("cpu"), torch.float32)
    assert torch.allclose(seen[0], expected, atol=1e-6)


@pytest.mark.parametrize("stops, flags", [
    ((1, 3), []), ((2,), ["--weights", "bfloat16", "--precision", "bfloat16", "--muon-lr", 0.0])])
def test_resuming_is_exact_to_the_bit(tmp_path, stops, flags):
    """Stopped after any step and resumed, all weights and moments end as without the stop; also
    where they are rounded at random.
    """
    whole = recipe(tmp_path / "whole", "--iterations", 4, "--eval-every", 4, "--save-every", 4,
                   "--dropout", 0.3, *flags)
    train.train(whole, resume=False)
    for stop in stops:
        run_folder = tmp_path / f"stopped{stop}"
        part = replace(whole, out=str(run_folder), save_every=1)

        class Stop(Exception):
            pass

        saved = checkpoint.save_last

        def save_then_stop(run, model, optimizer, state, *rest):
            saved(run, model, optimizer, state, *rest)
            if state.step == stop:
                raise Stop

        checkpoint.save_last = save_then_stop
        try:
            with pytest.raises(Stop):
                train.train(part, resume=False)
        finally:
            checkpoint.save_last = saved
        train.train(read_recipe(run_folder / "recipe.json"), resume=True)
        for name in ("model.safetensors", "optimizer.safetensors"):
            a = load_file(tmp_path / "whole" / "last" / name)
            b = load_file(run_folder / "last" / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), (stop, name)
        steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").open()]
        assert steps == [1, 2, 3, 4, 4]


def test_the_rounding_draws_by_seed_and_step(tmp_path):
    """Before the optimiser's step torch's generator starts anew: elsewhere for every seed and step,
    and elsewhere than dropout did.
    """
    model = train.build_model(recipe(tmp_path / "r"), ("a", "b"))
    batch = {"image": torch.rand(2, 3, 64, 64), "name": ["x", "y"],
             "target": torch.randint(0, 2, (2, 64, 64))}
    seen = []

    def loss_of(*inputs):
        seen.append(torch.initial_seed())
        return model.loss(*inputs)

    for seed, step in ((0, 0), (0, 1), (1, 0)):
        made = recipe(tmp_path / "r", "--batch", 2, "--seed", seed)
        optimizer = train.build_optimizer(model, made)
        optimizer.register_step_post_hook(lambda *_: seen.append(torch.initial_seed()))
        train.train_step(loss_of, optimizer, iter([batch]), made, step, torch.device("cpu"),
                         torch.float32)
    assert len(set(seen)) == 6


def test_weights_in_bfloat16_are_saved_as_they_are(tmp_path):
    """Layers' weights in bfloat16, norms and statistics in float32; read back, as always, in
    float32, and of the same values.
    """
    made = recipe(tmp_path / "r", "--weights", "bfloat16", "--precision", "bfloat16",
                  "--iterations", 1, "--warmup", 0)
    train.train(made, resume=False)
    saved = load_file(tmp_path / "r" / "best" / "model.safetensors")
    assert {name: saved[name].dtype for name in (
        "unet.conv_in.weight", "vae.encoder.conv_in.bias", "unet.conv_norm_out.weight", "prompts",
        "head.decode_head.fpn_bottleneck.bn.weight",
        "head.decode_head.fpn_bottleneck.bn.running_var")} == {
        "unet.conv_in.weight": torch.bfloat16, "vae.encoder.conv_in.bias": torch.bfloat16,
        "unet.conv_norm_out.weight": torch.float32, "prompts": torch.float32,
        "head.decode_head.fpn_bottleneck.bn.weight": torch.float32,
        "head.decode_head.fpn_bottleneck.bn.running_var": torch.float32}
    read = methods.load(tmp_path / "r" / "best").state_dict()
    for name, tensor in read.items():
        assert torch.equal(tensor, saved[name].to(tensor.dtype)) and tensor.dtype in (
            torch.float32, torch.int64), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(tmp_path, monkeypatch, capsys, number):
    """Asked to stop in step 2 of 4: saved there, exit without error, the command to go on printed;
    resumed, the weights are those of a run that was never stopped.
    """
    whole = recipe(tmp_path / "whole", "--iterations", 4, "--eval-every", 4)
    train.train(whole, resume=False)
    out, step = tmp_path / "stopped", train.train_step

    def interrupted(*arguments):
        if arguments[4] == 1:
            signal.raise_signal(number)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        command(train.main, patch, *FLAGS, "--iterations", 4, "--eval-every", 4, "--out", out)
    assert json.loads((out / "last" / "state.json").read_text())["step"] == 2
    assert f"stopped after 2 of 4 steps; go on with\npython train.py --resume {out}" in \
        capsys.readouterr().out
    train.train(*resolve(["--resume", str(out)]))
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (Path(whole.out), out))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("kind, message", [
    ("config", "disagree about num_prompts"), ("classes", "was trained on the classes"),
    ("steps", "state.json: step 2 of 1"), ("state", "state.json lacks the field best"),
    ("best", "state.json: step 2 of 2, best mIoU 1.5: no run gets there"),
    ("worst", "state.json: step 2 of 2, best mIoU -7: no run gets there")])
def test_a_run_that_does_not_fit_its_recipe_is_not_resumed(tmp_path, kind, message):
    """The line names the files that disagree, or the classes then and now."""
    data = make_folder(tmp_path / "d")
    flags = [*TINY, *HEAD, "--dataset", "folder", "--backbone", "tiny", "--data", str(data),
             "--iterations", "2"]
    train.train(*resolve([*flags, "--out", str(tmp_path / "r")]))
    made = read_recipe(tmp_path / "r" / "recipe.json")
    if kind == "config":
        made = replace(made, model=replace(made.model, num_prompts=5))
    elif kind == "classes":
        (data / "classes.txt").write_text("left\nother\n")
    elif kind == "steps":
        made = replace(made, iterations=1)
    else:
        best = {"best": ', "best": 1.5', "worst": ', "best": -7'}.get(kind, "")
        (tmp_path / "r" / "last" / "state.json").write_text(f'{{"step": 2, "evaluated": 2{best}}}')
    with pytest.raises(InputError, match=message):
        train.train(made, resume=True)


def test_what_was_edited_in_a_recipe_is_said(tmp_path, capsys):
    """Resumed with other settings than those of the save, a run goes on; a line names them."""
    train.train(recipe(tmp_path / "r", "--iterations", 1), resume=False)
    made = read_recipe(tmp_path / "r" / "recipe.json")
    capsys.readouterr()
    train.train(replace(made, iterations=2, lr=1e-3), resume=True)
    assert "at step 1; recipe.json was edited since: iterations 1 is now 2, lr 0.005 is now 0.001" \
        in capsys.readouterr().out
    train.train(replace(made, iterations=3, lr=1e-3), resume=True)
    assert "edited since: iterations 2 is now 3\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--max-depth", 0.1], ["--max-depth-eval", 0.1],
                                   ["--max-depth-eval", 90, "--min-depth-eval", 85]])
def test_a_range_of_depths_without_a_label_is_refused(tmp_path, monkeypatch, capsys, flags):
    """Before training, not at its end; nothing is written."""
    code, stderr = refused(train.main, monkeypatch, capsys, "--task", "depth", *FLAGS, "--out",
                           tmp_path / "r", *flags)
    assert code == 2 and "no depth of the 2 labels checked is within" in stderr
    assert not (tmp_path / "r").exists()


def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys):
    """If the newest cannot be read, the one before is taken, and the end is the same to the bit."""
    whole = recipe(tmp_path / "r", "--iterations", 4, "--save-every", 1, "--eval-every", 4)
    train.train(whole, resume=False)
    expected = load_file(tmp_path / "r" / "last" / "model.safetensors")
    path = tmp_path / "r" / "last" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    train.train(*resolve(["--resume", str(tmp_path / "r")]))
    assert "unreadable" in (out := capsys.readouterr().out) and "last.previous at step 3" in out
    found = load_file(tmp_path / "r" / "last" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def run_and_kill(arguments, delay):
    """Start a training process and SIGKILL it after `delay` seconds; whether it ended before."""
    process = subprocess.Popen([sys.executable, "train.py", *map(str, arguments)],
                               cwd=Path(train.__file__).parent, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        return process.wait(timeout=delay) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kills", [50])
def test_kills_at_any_moment_lose_nothing(tmp_path, kills):
    """SIGKILL at random moments, again and again: every start resumes, and the last weights are
    bit-identical to those of a run that was left alone.
    """
    flags = ["--iterations", 30 * kills, "--eval-every", 5 * kills, "--save-every", 1]
    train.train(recipe(tmp_path / "whole", *flags), resume=False)
    out, rng, killed = tmp_path / "killed", np.random.default_rng(0), 0
    while True:
        begun = any((out / name / "state.json").is_file()
                    for name in ("last", "last.tmp", "last.previous"))
        delay = rng.uniform(3, 10) if killed < kills else 1200
        if run_and_kill(["--resume", out] if begun else [*FLAGS, *flags, "--out", out], delay):
            break
        killed += 1
    a = load_file(tmp_path / "whole" / "last" / "model.safetensors")
    b = load_file(out / "last" / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert killed == kills, f"the run was over after {killed} kills: give it more iterations"


def test_training_learns_and_writes_everything(tmp_path, capsys):
    """The loss falls on a fixed set; the run folder holds what the command promises."""
    out = tmp_path / "run"
    flags = [*TINY, *HEAD, "--dataset", "folder", "--backbone", "tiny", "--data",
             str(make_folder(tmp_path / "d")), "--out", str(out), "--iterations", "12", "--lr",
             "3e-3", "--warmup", "1"]
    train.train(resolve(flags)[0], resume=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert records[11]["loss"] < 0.8 * records[0]["loss"]
    assert {"loss", "ce", "lovasz", "aux", "lr", "images_per_s", "data_wait", "peak_gb"} < \
        records[0].keys()
    assert "mIoU" in records[-1]
    card = (out / "best" / "README.md").read_text()
    assert "license: mit" in card and "mIoU" in card and '"lr": 0.003' in card
    assert str(tmp_path) not in card                     # no path of the machine goes to the Hub
    assert read_recipe(out / "best" / "recipe.json").lr == 0.003
    for name in ("recipe.json", "best/model.safetensors", "last/optimizer.safetensors",
                 "last/state.json", "pictures/step_000012.png"):
        assert (out / name).is_file(), name
    assert "RANDOM weights" in capsys.readouterr().out


def test_evaluating_the_run_repeats_its_numbers(tmp_path, monkeypatch, capsys):
    """eval.py on the run folder finds data set and model by itself and prints the same mIoU."""
    out = tmp_path / "run"
    train.train(recipe(out, "--iterations", 1), resume=False)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").open()][-1]["mIoU"]
    command(evaluation.main, monkeypatch, "--checkpoint", out, "--workers", 0, "--precision",
            "float32")
    report = json.loads((out / "eval" / "metrics.json").read_text())
    assert report["mIoU"] == pytest.approx(logged, abs=1e-6)
    assert (out / "eval" / "pictures.png").is_file()
    assert "wrote" in capsys.readouterr().out


def test_a_non_finite_loss_stops_with_step_and_images(tmp_path, monkeypatch, capsys):
    """NaN ends the run with one line that names the step and the images; nothing is updated."""
    r = recipe(tmp_path / "r")
    model = train.build_model(r, ("a", "b"))
    optimizer = train.build_optimizer(model, r)
    before = model.prompts.detach().clone()
    batch = {"image": torch.full((2, 3, 64, 64), float("nan")), "name": ["one.jpg", "two.jpg"],
             "target": torch.zeros(2, 64, 64, dtype=torch.long)}
    step = lambda: train.train_step(model.loss, optimizer, iter([batch] * 2), r, 7,  # noqa: E731
                                    torch.device("cpu"), torch.float32)
    with pytest.raises(FloatingPointError, match=r"step 7.*one\.jpg, two\.jpg"):
        step()
    assert torch.equal(model.prompts, before)
    code, stderr = refused(step, monkeypatch, capsys)
    assert code == 1 and stderr.count("\n") == 1 and "step 7" in stderr


def test_a_non_finite_gradient_stops_too(tmp_path, monkeypatch):
    """A loss may be finite where its gradient is not: no weight is moved."""
    r = recipe(tmp_path / "r")
    model = train.build_model(r, ("a", "b"))
    before = model.prompts.detach().clone()
    model.prompts.register_hook(lambda gradient: gradient * float("inf"))
    batch = {"image": torch.rand(2, 3, 64, 64), "name": ["one.jpg", "two.jpg"],
             "target": torch.zeros(2, 64, 64, dtype=torch.long)}
    with pytest.raises(FloatingPointError, match="gradient's norm is .* step 7; .*one.jpg"):
        train.train_step(model.loss, train.build_optimizer(model, r), iter([batch] * 2), r, 7,
                         torch.device("cpu"), torch.float32)
    assert torch.equal(model.prompts, before)


def spoil(data, kind):
    """Damage one file of the training split; returns its name."""
    image, label = data / "images" / "train" / "2.jpg", data / "labels" / "train" / "2.png"
    if kind == "no label":
        label.unlink()
        return image.name
    if kind == "label value":
        Image.fromarray(np.full((70, 80), 9, np.uint8)).save(label)
        return label.name
    if kind == "corrupt JPEG":
        image.write_bytes(image.read_bytes()[:300])
        return image.name
    if kind == "other size":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(label)
        return label.name
    (data / "classes.txt").unlink()
    return "classes.txt"


@pytest.mark.parametrize("kind", ["no label", "label value", "corrupt JPEG", "other size",
                                  "no classes"])
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    """Exit code 2 and one line that names the file, before the model is built."""
    data = make_folder(tmp_path / "d")
    name = spoil(data, kind)
    code, stderr = refused(train.main, monkeypatch, capsys, *TINY, *HEAD, "--dataset", "folder",
                           "--backbone", "tiny", "--data", data, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and name in stderr, stderr
    assert not (tmp_path / "r").exists()


def test_no_run_is_overwritten(tmp_path, monkeypatch, capsys):
    """An explicit --out that holds a run is refused, with the command that goes on."""
    out = tmp_path / "r"
    (out / "last").mkdir(parents=True)
    code, stderr = refused(train.main, monkeypatch, capsys, *FLAGS, "--out", out)
    assert code == 2 and f"--resume {out}" in stderr


def test_validation_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """It predicts in evaluation mode, and goes on in training mode."""
    seen, evaluate = [], train.TASKS["seg"].evaluate

    def noting(model, *arguments, **options):
        seen.append((model, model.training))
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(train.TASKS["seg"], "evaluate", noting)
    train.train(recipe(tmp_path / "r", "--iterations", 1), resume=False)
    (model, training), = seen
    assert not training and model.training


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "truncated"])
def test_broken_weights_are_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    """Exit code 2 and one line that names file and tensor, from eval.py and from --backbone."""
    model = train.build_model(recipe(tmp_path / "r"), ("a", "b"))
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    if kind == "missing":
        del tensors["prompts"]
    elif kind == "extra":
        tensors["foo"] = torch.zeros(1)
    elif kind == "shape":
        tensors["prompts"] = torch.zeros(1, 2, 3)
    save_file({k: v.clone() for k, v in tensors.items()}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:9999])
    named = {"missing": "lacks prompts", "extra": "foo", "shape": "prompts has shape (1, 2, 3)",
             "truncated": "not a complete .safetensors"}[kind]
    capsys.readouterr()
    code, stderr = refused(evaluation.main, monkeypatch, capsys, "--dataset", "shapes",
                           "--checkpoint", tmp_path / "m")
    assert code == 2 and stderr.count("\n") == 1 and named in stderr, stderr
    assert "model.safetensors" in stderr
    code, stderr = refused(train.main, monkeypatch, capsys, "--backbone", path, "--out",
                           tmp_path / "r", "--workers", "0")
    assert code == 2 and stderr.count("\n") == 1 and "model.safetensors" in stderr, stderr


def test_out_of_memory_names_the_command_that_helps(tmp_path, monkeypatch, capsys):
    """One line: what the allocator said, and how the flags that fit are found."""
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train, "train", full)
    code, stderr = refused(train.main, monkeypatch, capsys, *FLAGS, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and "Tried to allocate 2 GiB" in stderr
    assert "python -m tools.memory --task seg --dataset shapes --fit" in stderr


# ------------------------------------------------------------------------------------------------
# What an adversary found

def test_the_steps_are_saved_before_they_are_validated(tmp_path, monkeypatch):
    """Whatever goes wrong in a validation, last/ holds the steps; resumed, it is validated first,
    and recipe.json stays the file that it was.
    """
    made, evaluate = recipe(tmp_path / "r", "--iterations", 2, "--eval-every", 2), seg.evaluate

    def broken(*arguments, **options):
        raise InputError("a.jpg cannot be decoded")

    monkeypatch.setattr(seg, "evaluate", broken)
    with pytest.raises(InputError, match="a.jpg"):
        train.train(made, resume=False)
    assert checkpoint.read_state(tmp_path / "r" / "last") == State(2, None, 0)
    monkeypatch.setattr(seg, "evaluate", evaluate)
    before = (tmp_path / "r" / "recipe.json").stat()
    result = train.train(*resolve(["--resume", str(tmp_path / "r")]))
    assert result["best"] > 0 and (tmp_path / "r" / "best" / "README.md").is_file()
    assert (tmp_path / "r" / "recipe.json").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("flag", ["--clip", "--weight-decay", "--lr", "--muon-lr",
                                  "--unet-lr-mult", "--min-lr", "--warmup-ratio"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_rates_are_finite_and_not_negative(tmp_path, flag, value):
    """Uphill, or to nonsense, is no direction to train in."""
    with pytest.raises(InputError, match=f"{flag} is {value}|{flag} would do nothing"):
        recipe(tmp_path / "r", f"{flag}={value}")


@pytest.mark.parametrize("flags", [
    ["--batch", "0"], ["--batch=-4"], ["--micro-batch=-1"], ["--workers", "-1"], ["--seed", "-1"],
    ["--seed", "1e20"], ["--crop", "0"], ["--unet-groups", "0"], ["--unet-num-heads", "0"],
    ["--unet-layers", "10000"], ["--dropout", "2"], ["--train-scenes", "-1"], ["--val-scenes", "0"],
    ["--task", "depth", "--max-depth", "-5"], ["--task", "depth", "--max-depth", "0"],
    ["--task", "pose", "--sigma", "0"], ["--prompts", ""], ["--init-from", ""], ["--resume", ""],
    ["--device", "mps"], ["--device", "meta"], ["--data", "X"], ["--train-json", "X"],
    ["--boxes", "X"]])
def test_absurd_flags_are_refused_in_one_line(monkeypatch, capsys, tmp_path, flags):
    """Nothing is trained backwards, not at all, or without the flag that was given."""
    monkeypatch.chdir(tmp_path)
    code, stderr = refused(train.main, monkeypatch, capsys, *flags)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert not list(tmp_path.glob("runs/*"))


def test_a_metric_without_a_value_is_replaced_by_the_first_that_has_one(tmp_path, monkeypatch):
    """A first best of nan would stay for ever."""
    values = iter([math.nan, 0.25])
    monkeypatch.setattr(seg, "evaluate", lambda *a, **b: {"mIoU": next(values)})
    made = recipe(tmp_path / "r", "--iterations", 2, "--eval-every", 1)
    assert train.train(made, resume=False)["best"] == 0.25
    assert "mIoU 0.2500" in (tmp_path / "r" / "best" / "README.md").read_text()


@pytest.mark.parametrize("system, gigabytes", [("linux", 1024e-6), ("darwin", 1e-6)])
def test_peak_memory_is_in_the_systems_unit(monkeypatch, system, gigabytes):
    """Linux counts KiB, macOS bytes, Windows does not say."""
    usage = type("Usage", (), {"ru_maxrss": 1000})
    monkeypatch.setattr(train.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(train.sys, "platform", system)
    assert train.peak_gb(torch.device("cpu")) == pytest.approx(gigabytes)
    monkeypatch.setattr(train, "resource", None)
    assert train.peak_gb(torch.device("cpu")) == 0.0


def test_it_is_imported_where_there_is_no_resource_and_no_fcntl():
    """Windows has neither module."""
    code = "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None; import train"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
