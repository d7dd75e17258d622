"""Training: recipes, schedule, accumulation, resuming to the bit, and every refusal.

    pytest tests/test_train.py
"""
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from weights import checkpoint
import data
from ops import errors
import eval as evaluation
import predict
from tasks import recipes
import train
from ops.errors import InputError

TINY = ["--unet-channels", "16", "16", "32", "32", "--vae-channels", "8", "8", "16", "16",
        "--norm-groups", "8", "--context-dim", "16", "--num-heads", "1", "--num-prompts", "4",
        "--head-channels", "16", "--refine-steps", "2", "--crop", "64", "--batch", "4",
        "--micro-batch", "2", "--workers", "0", "--val-scenes", "2", "--precision", "float32",
        "--log-every", "1"]


def recipe(out, *flags):
    """The shapes recipe at a size that trains in a second."""
    return recipes.resolve(recipes.parse([*TINY, "--out", str(out), *map(str, flags)]))


def run(command, monkeypatch, capsys, *flags):
    """(exit code, stderr) of a command line, run in this process."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        errors.run_command(command)
    return stop.value.code, capsys.readouterr().err


def make_folder(root, sizes=((80, 70),) * 4):
    """A `folder` data set of random images with two classes."""
    rng = np.random.default_rng(0)
    root.mkdir()
    (root / "classes.txt").write_text("left\nright\n")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.jpg")
            label = np.zeros((h, w), np.uint8)
            label[:, w // 2:] = 1
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    return root


def test_learning_rate_meets_the_golden_values():
    """Linear decay over 80,000 steps under a 1,500-step warm-up, as mmcv computes it."""
    paper = recipes.RECIPES["seg", "ade20k"]
    golden = {0: 8.000000000230046e-11, 1: 5.34126123340009e-08, 750: 3.9625039625000005e-05,
              1499: 7.844866605233402e-05, 1500: 7.85e-05, 1501: 7.849900000000001e-05,
              40000: 4e-05, 79999: 9.999999999976695e-10}
    for step, lr in golden.items():
        assert paper.lr * recipes.lr_factor(step, paper) == pytest.approx(lr, rel=1e-9), step


@pytest.mark.parametrize("dataset,per_epoch", [("nyu", 1009), ("kitti", 965)])
def test_depth_learning_rate_meets_the_golden_values(dataset, per_epoch):
    """Up to the end of epoch 12, down to epoch 24, then the minimum; power 0.9."""
    golden = json.loads((Path(__file__).parent / "golden" / "depth.json").read_text())["depth_lr"]
    recipe = recipes.RECIPES["depth", dataset]
    assert recipe.iterations == 25 * per_epoch
    if dataset == "nyu":
        for step, lr in golden["values"].items():
            found = recipe.lr * recipes.lr_factor(int(step) - 1, recipe)
            assert found == pytest.approx(lr, rel=1e-9), step


def test_the_ade20k_recipe_is_the_papers():
    """Table 6 and the released configuration, field by field."""
    paper = recipes.RECIPES["seg", "ade20k"]
    assert (paper.lr, paper.weight_decay, paper.batch, paper.warmup) == (8e-5, 1e-3, 16, 1500)
    assert (paper.num_prompts, paper.refine_steps, paper.iterations) == (150, 3, 80_000)
    assert (paper.crop, paper.scale, paper.unet_lr_mult) == (512, (2048, 512), 0.1)
    assert set(recipes.RECIPES) == set(predict.PROTOCOLS)


def test_every_field_is_a_flag(tmp_path):
    """Each field of Recipe can be set on the command line and arrives with its type."""
    changed = replace(recipes.RECIPES["seg", "shapes"], seed=3, lr=0.5, compile=True, dropout=0.1,
                      scale=(64, 32), out=str(tmp_path / "x"), crop=64, num_prompts=7,
                      rearrange=False, modulated_timestep=False, init_from="y")
    flags = []
    for name, value in asdict(changed).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, (tuple, list)):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags += [flag, str(value)]
    assert recipes.resolve(recipes.parse(flags)) == changed


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


def test_resuming_is_exact_to_the_bit(tmp_path):
    """Stopped after any step and resumed, all weights and moments end as without the stop."""
    whole = recipe(tmp_path / "whole", "--iterations", 4, "--eval-every", 4, "--save-every", 4,
                   "--dropout", 0.3)
    train.train(whole, resume=False)
    for stop in (1, 3):
        run_folder = tmp_path / f"stopped{stop}"
        part = replace(whole, out=str(run_folder), save_every=1)

        class Stop(Exception):
            pass

        saved = checkpoint.save_last

        def save_then_stop(run, model, optimizer, state):
            saved(run, model, optimizer, state)
            if state["step"] == stop:
                raise Stop

        checkpoint.save_last = save_then_stop
        try:
            with pytest.raises(Stop):
                train.train(part, resume=False)
        finally:
            checkpoint.save_last = saved
        train.train(part, resume=True)
        for name in ("model.safetensors", "optimizer.safetensors"):
            a = load_file(tmp_path / "whole" / "last" / name)
            b = load_file(run_folder / "last" / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), (stop, name)
        steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").open()]
        assert steps == [1, 2, 3, 4, 4]


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
        patch.setattr("sys.argv", ["train.py", *TINY, "--iterations", "4", "--eval-every", "4",
                                   "--out", str(out)])
        train.main()
    assert json.loads((out / "last" / "state.json").read_text())["step"] == 2
    assert f"stopped after 2 of 4 steps; go on with\npython train.py --resume {out}" in \
        capsys.readouterr().out
    train.train(replace(whole, out=str(out)), resume=True)
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (Path(whole.out), out))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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
    flags = [*TINY, "--iterations", 30 * kills, "--eval-every", 5 * kills, "--save-every", 1]
    train.train(recipe(tmp_path / "whole", *flags[len(TINY):]), resume=False)
    out, rng, killed = tmp_path / "killed", np.random.default_rng(0), 0
    while True:
        begun = (out / "last" / "state.json").is_file() or (out / "last.previous").is_dir()
        if not begun and out.exists():
            shutil.rmtree(out)
        delay = rng.uniform(3, 10) if killed < kills else 1200
        if run_and_kill(["--resume", out] if begun else [*flags, "--out", out], delay):
            break
        killed += 1
    a = load_file(tmp_path / "whole" / "last" / "model.safetensors")
    b = load_file(out / "last" / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert killed == kills, f"the run was over after {killed} kills: give it more iterations"


def test_an_unreadable_image_is_replaced_and_counted():
    """The next sample stands in; the message is kept once; more than 1 % of the set is an error."""
    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return 200

        def __getitem__(self, key):
            if key[1] in (5, 6, 9):
                raise InputError(f"{key[1]}.jpg cannot be decoded")
            return {"image": torch.full((1,), float(key[1])), "name": str(key[1])}

    tolerant = data.Tolerant(Files())
    assert tolerant[0, 5]["name"] == "7" and "5.jpg" in tolerant[0, 5]["unreadable"]
    batches = train.Timed(iter([{"image": torch.zeros(2, 1), "unreadable": ["", "5.jpg bad"]}] * 2
                               + [{"image": torch.zeros(1, 1), "unreadable": ["6.jpg bad"]},
                                  {"image": torch.zeros(1, 1), "unreadable": ["9.jpg bad"]}]), 200)
    for _ in range(3):
        next(batches)
    assert list(batches.unreadable) == ["5.jpg bad", "6.jpg bad"]
    with pytest.raises(InputError, match="3 of 200 training images cannot be read.*9.jpg"):
        next(batches)


def test_training_learns_and_writes_everything(tmp_path, capsys):
    """The loss falls on a fixed set; the run folder holds what the command promises."""
    data = make_folder(tmp_path / "d")
    out = tmp_path / "run"
    flags = [*TINY, "--dataset", "folder", "--backbone", "tiny", "--data", str(data), "--out",
             str(out), "--iterations", "12", "--lr", "3e-3", "--warmup", "1"]
    train.train(recipes.resolve(recipes.parse(flags)), resume=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert records[11]["loss"] < 0.8 * records[0]["loss"]
    assert {"loss", "ce", "lovasz", "aux", "lr", "images_per_s", "data_wait", "peak_gb"} < \
        records[0].keys()
    assert "mIoU" in records[-1]
    card = (out / "best" / "README.md").read_text()
    assert "license: mit" in card and "mIoU" in card and '"lr": 0.003' in card
    assert str(tmp_path) not in card                     # no path of the machine goes to the Hub
    for name in ("recipe.json", "best/model.safetensors", "last/optimizer.safetensors",
                 "last/state.json", "pictures/step_000012.png"):
        assert (out / name).is_file(), name
    assert "RANDOM weights" in capsys.readouterr().out


def test_evaluating_the_run_repeats_its_numbers(tmp_path, monkeypatch, capsys):
    """eval.py on the run folder finds data set and model by itself and prints the same mIoU."""
    out = tmp_path / "run"
    train.train(recipe(out, "--iterations", 1), resume=False)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").open()][-1]["mIoU"]
    monkeypatch.setattr("sys.argv", ["eval.py", "--checkpoint", str(out), "--workers", "0",
                                     "--precision", "float32"])
    evaluation.main()
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
    code, stderr = run(step, monkeypatch, capsys)
    assert code == 1 and stderr.count("\n") == 1 and "step 7" in stderr


BAD_FLAGS = [
    (["--dataset", "imagenet"], "imagenet is unknown"),
    (["--task", "flow"], "flow is unknown"),
    (["--micro-batch", "1"], "BatchNorm"),
    (["--batch", "5"], "no multiple of --micro-batch"),
    (["--memory", "-1"], "gigabytes of one GPU"),
    (["--crop", "100"], "no multiple of 64"),
    (["--unet-channels", "320", "640", "1280", "1280"], "--init random"),
    (["--unet-channels", "32", "44", "64", "64"], "multiples of"),
    (["--iterations", "0"], "--iterations 0"),
    (["--device", "cuda"], "sees 0 GPUs"),
    (["--dataset", "ade20k"], "needs --data"),
    (["--dataset", "folder", "--data", "/nowhere"], "no folder"),
]


@pytest.mark.parametrize("flags,message", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    """Exit code 2 and one line, before any work: nothing is written."""
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, stderr = run(train.main, monkeypatch, capsys, *TINY, "--out", tmp_path / "r", *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "r").exists()


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
    code, stderr = run(train.main, monkeypatch, capsys, *TINY, "--dataset", "folder", "--backbone",
                       "tiny", "--data", data, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and name in stderr, stderr
    assert not (tmp_path / "r").exists()


def test_no_run_is_overwritten(tmp_path, monkeypatch, capsys):
    """An explicit --out that holds a run is refused; the default finds a free folder."""
    out = tmp_path / "r"
    out.mkdir()
    (out / "recipe.json").write_text("{}")
    code, stderr = run(train.main, monkeypatch, capsys, *TINY, "--out", out)
    assert code == 2 and "--resume" in stderr
    monkeypatch.chdir(tmp_path)
    assert recipes.free_folder("r") == "r-2"
    assert recipes.free_folder("s") == "s"


def test_resume_takes_no_other_flags(tmp_path, monkeypatch, capsys):
    """The recipe of a run is its own: a flag beside --resume is refused."""
    code, stderr = run(train.main, monkeypatch, capsys, "--resume", tmp_path, "--lr", "1")
    assert code == 2 and "--lr" in stderr


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
    code, stderr = run(evaluation.main, monkeypatch, capsys, "--checkpoint", tmp_path / "m")
    assert code == 2 and stderr.count("\n") == 1 and named in stderr, stderr
    assert "model.safetensors" in stderr
    code, stderr = run(train.main, monkeypatch, capsys, "--backbone", path, "--out",
                       tmp_path / "r", "--workers", "0")
    assert code == 2 and stderr.count("\n") == 1 and "model.safetensors" in stderr, stderr
