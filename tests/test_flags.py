"""Flags: every setting of a row is one, explained by its comment; none is accepted in vain.

    pytest tests/test_flags.py
"""
import re
import typing
from dataclasses import replace

import pytest
import torch
from helpers import HEAD, TINY, recipe, refused
from safetensors.torch import save_file

import eval as evaluation
import train
from ops.errors import InputError
from ops.settings import LIMITS, leaves
from tasks.flags import (FOUND_OUT, SECTIONS, UNUSED, Parser, add_flags, flag_paths, free_folder,
                         owner_of, parse, resolve, show, with_flags)
from tasks.recipes import RECIPES, ROWS

EVERY = {(method, *key): row for method, rows in ROWS.items() for key, row in rows.items()}
KEYS = pytest.mark.parametrize("key", EVERY, ids="-".join)


def hint_of(row, path):
    """The annotated type of a setting, and whether it may be None."""
    owner = owner_of(row, path)
    hint = typing.get_type_hints(type(owner))[path[-1]]
    kinds = [k for k in typing.get_args(hint) if k is not type(None)]
    return kinds[0] if "None" in str(hint) else hint


def other(kind, value, name):
    """Another value of that type, within what is possible."""
    limits = LIMITS.get(name, (0, 10**9))
    if isinstance(limits[0], str):
        return next(word for word in limits if word != value)
    if typing.get_origin(kind) is tuple:
        return tuple(x + 1 for x in value) if value else (33, 34)
    if kind is bool:
        return not value
    if kind is str:
        return (value or "") + "x"
    return kind((value or limits[0]) + (2 if limits[1] > 10 else 0.03125))


def words_of(name, value):
    """A flag and its value as they are typed."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *show(value).split()]


@KEYS
def test_every_setting_is_a_flag_of_its_own(key):
    """No two settings share a name, and only what is found out, or not read, is left out."""
    row = EVERY[key]
    wanted = {path for path in leaves(row) if path != ("dataset",)
              and path[-1] not in (*FOUND_OUT, *UNUSED[row.method, row.task])}
    paths = flag_paths(row)
    assert set(paths.values()) == wanted and len(paths) == len(wanted)
    assert all(name.endswith(path[-1]) for name, path in paths.items())


@KEYS
def test_every_flag_arrives_with_its_type(key):
    """Another value for every setting of the row, all on one command line."""
    row = EVERY[key]
    paths = flag_paths(row)
    wanted = {path: other(hint_of(row, path), leaves(row)[path], path[-1])
              for path in paths.values()}
    parser = Parser("")
    add_flags(parser, row, SECTIONS)
    words = [word for name, path in paths.items() for word in words_of(name, wanted[path])]
    given = vars(parse(parser, words, row))
    assert given.keys() == paths.keys()
    found = leaves(with_flags(row, given))
    assert {path: found[path] for path in wanted} == wanted
    assert all(type(found[path]) is type(value) for path, value in wanted.items())
    rest = leaves(row).keys() - wanted.keys()
    assert all(found[path] == leaves(row)[path] for path in rest)


@pytest.mark.parametrize("task", ["seg", "depth", "pose"])
def test_a_rows_own_values_as_flags_give_the_row(tmp_path, task):
    """What is written out is what would have been taken, none included."""
    plain = resolve(["--task", task, "--out", str(tmp_path)])[0]
    idle = {"min_lr", *(["stride", "scale"] if task == "seg" else [])}
    widths = ("unet_c", "unet_g", "unet_la", "unet_num", "vae_")        # the files say them
    words = [word for name, path in flag_paths(plain).items()
             if name not in idle and not name.startswith(widths)
             for word in words_of(name, leaves(plain)[path])]
    assert resolve(["--task", task, *words])[0] == plain


@KEYS
def test_help_explains_every_flag_of_the_row_and_no_other(key, monkeypatch, capsys):
    """Per flag a text that is not empty, and the row's value."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        resolve(["--method", key[0], "--task", key[1], "--dataset", key[2], "--help"])
    text, row = capsys.readouterr().out, EVERY[key]
    assert stop.value.code == 0
    options = text.partition("options:")[2]
    own = {"--" + name.replace("_", "-"): path for name, path in flag_paths(row).items()}
    for flag, path in own.items():
        line = re.search(rf"^  {flag}(?:, --no\S+| X)?(?: \[X \.\.\.\])?\s+(.*)$", options, re.M)
        value = show(leaves(row)[path])
        assert line and line[1].endswith(f" [{value}]"), flag
        assert len(line[1].removesuffix(f"[{value}]")) > 5, f"{flag} has no comment"
    found = set(re.findall(r"^  (--[\w-]+)", options, re.M))
    assert found == {*own, "--resume", "--task", "--method", "--dataset"}


# ------------------------------------------------------------------------------------------------
# Refused

@pytest.mark.parametrize("flags, message", [
    (["--sigma", "3"], "--sigma is no setting of seg on shapes; it is one of pose on shapes"),
    (["--boxes", "x.json"], "it is one of pose on folder, pose on coco"),
    (["--max-depth", "3"], "depth on shapes, depth on folder, depth on nyu, depth on kitti"),
    (["--task", "depth", "--no-augment"], "--no-augment is no setting of depth on shapes; it is"),
    (["--data", "x"], "--data is no setting of seg on shapes; it is one of seg on folder"),
    (["--task", "depth", "--dataset", "kitti", "--val-scenes", "3"], "one of seg on shapes"),
    (["--task", "pose", "--head-channels=8"], "--head-channels=8 is no setting of pose on shapes"),
    (["--learning-rate", "1"], "--learning-rate is no setting of seg on shapes"),
    (["--num-classes", "3"], "--num-classes is no setting"),
    (["--lear", "1"], "--lear is no setting"), (["--iter", "1"], "--iter is no setting"),
    (["word"], "word stands alone")])
def test_flags_of_other_rows_are_refused_with_their_place(flags, message, monkeypatch, capsys):
    """Exit code 2 and one line, which names the rows that have the flag; none is shortened."""
    code, stderr = refused(train.main, monkeypatch, capsys, *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr


PRETRAINED = ["--dataset", "ade20k", "--data", "x"]


@pytest.mark.parametrize("flags, why", [
    (["--min-lr", "1e-6"], "--min-lr would do nothing: the recipe has --schedule poly"),
    (["--task", "depth", "--schedule", "two-phase", "--warmup", "3"], "has --schedule two-phase"),
    (["--schedule", "two-phase", "--warmup-ratio", "0.5"], "--warmup-ratio would do nothing"),
    (["--schedule", "power", "--warmup", "3"], "--warmup would do nothing: the recipe has --sched"),
    (["--stride", "32"], "--stride would do nothing: the recipe has no --window"),
    (["--scale", "512", "128"], "--scale would do nothing: the recipe has scenes rendered at"),
    ([*PRETRAINED, "--unet-channels", "32", "32", "32", "32"], "pretrained weights"),
    ([*PRETRAINED, "--unet-context-dim", "32"], "pretrained weights, whose files say the widths"),
    ([*PRETRAINED, "--unet-latent-channels", "8", "--vae-latent-channels", "8"],
     "--unet-latent-channels would do nothing"),
    ([*PRETRAINED, "--unet-layers", "1"], "--unet-layers would do nothing"),
    ([*PRETRAINED, "--unet-groups", "8"], "--unet-groups would do nothing"),
    ([*PRETRAINED, "--vae-groups", "8"], "--vae-groups would do nothing"),
    ([*PRETRAINED, "--unet-num-heads", "4"], "pretrained weights, whose config.json says it"),
    (["--init-from", "x", "--backbone", "x"], "--backbone would do nothing: the recipe has --in"),
    (["--init", "random", "--backbone", "x"], "--backbone would do nothing"),
    (["--init", "random", "--unet", "x"], "--unet would do nothing: the recipe has --init random"),
    (["--init", "random-unet", "--unet", "x"], "no other UNet is read"),
    (["--init-from", "x", "--unet", "x"], "no other UNet is read"),
    (["--unet-num-heads", "2", "--unet", "owner/name"], "whose config.json says it"),
    (["--init-from", "x", "--init", "random-unet"], "--init would do nothing"),
    (["--init", "random-unet", "--vae-groups", "8"], "a pretrained encoder, whose files say it")])
def test_idle_flags_are_refused(flags, why, monkeypatch, capsys):
    """A setting that another one makes idle is not accepted in silence."""
    code, stderr = refused(train.main, monkeypatch, capsys, *flags)
    assert code == 2 and stderr.count("\n") == 1 and why in stderr, stderr


def test_flags_that_are_not_idle_are_taken(tmp_path):
    """The same flags where they do something; the heads of a single LDM file are a setting."""
    out = ["--out", str(tmp_path)]
    made = resolve([*out, "--schedule", "two-phase", "--min-lr", "1e-6"])[0]
    assert made.min_lr == 1e-6
    protocol = resolve([*out, "--window", "64", "--stride", "32"])[0].protocol
    assert (protocol.window, protocol.stride) == (64, 32)
    (tmp_path / "ldm.safetensors").touch()
    single = [*PRETRAINED, "--backbone", str(tmp_path / "ldm.safetensors")]
    assert resolve([*out, *single, "--unet-num-heads", "4"])[0].model.unet.num_heads == 4
    made = resolve([*out, "--init", "random-unet", "--unet-layers", "2"])[0]
    assert made.model.unet.layers == 2
    assert resolve([*out, "--init-from", "x", "--backbone", "tiny"])[0].init_from == "x"
    made = resolve([*out, *PRETRAINED, "--init", "random", "--unet-layers", "1"])[0]
    assert made.model.unet.layers == 1 and made.model.train_encoder


BAD_FLAGS = [
    (["--dataset", "imagenet"], "imagenet is unknown"),
    (["--task", "flow"], "flow is unknown"),
    (["--micro-batch", "1"], "BatchNorm"),
    (["--batch", "5"], "no multiple of --micro-batch"),
    (["--crop", "100", "--resize-scale", "0"], "no multiple of 64"),
    (["--unet-channels", "32", "44", "64", "64"], "multiples of"),
    (["--vae-channels", "32", "32"], "--vae-channels (32, 32): four multiples of --vae-groups"),
    (["--unet-num-heads", "3"], "four multiples of --unet-num-heads 3"),
    (["--at-once", "0"], "--at-once is 0, possible is 1 to"),
    (["--unet-latent-channels", "8"], "the VAE gives 4 latent channels"),
    (["--iterations", "0"], "--iterations is 0, possible is 1 to"),
    (["--iterations", "1.5"], "--iterations is 1.5, but should be an integer"),
    (["--lr", "fast"], "--lr is 'fast', but should be a finite number"),
    (["--lr", "nan"], "--lr is nan"), (["--lr", "-1"], "--lr is -1, possible is"),
    (["--scale", "64"], "should be a list of 2 (an integer) or null"),
    (["--schedule", "cosine"], "--schedule is 'cosine', possible are poly, two-phase, step"),
    (["--init", "full"], "--init is 'full', possible are pretrained, random-unet, random"),
    (["--precision", "float16"], "--precision is 'float16', possible are"),
    (["--window", "64"], "--window 64 needs a --stride of 1 to 64 pixels: it is None"),
    (["--window", "64", "--stride", "65"], "needs a --stride"),
    (["--out", ""], "--out is ''"), (["--out", "a\nb"], r"--out is 'a\nb'"),
    (["--backbone=\x1b[31m"], r"--backbone is '\x1b[31m'"),
    (["--lr"], "expected one argument"),
    (["--device", "gpu"], "--device gpu is unknown"),
    (["--device", "cuda"], "sees 0 GPUs")]


@pytest.mark.parametrize("flags,message", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    """Exit code 2 and one line, before any work: nothing is written."""
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, stderr = refused(train.main, monkeypatch, capsys, *TINY, *HEAD, "--backbone", "tiny",
                           "--out", tmp_path / "r", *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "ade20k"], "--data is missing"),
    (["--dataset", "folder", "--data", "/nowhere"], "--data /nowhere is no folder")])
def test_a_missing_data_folder_is_named(tmp_path, monkeypatch, capsys, flags, message):
    """Before the weights are looked for."""
    code, stderr = refused(train.main, monkeypatch, capsys, *flags, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words, message", [
    (["--resume", "RUN", "--lr", "1"], "leave out --lr"),
    (["--resume", ""], "--resume is ''"), (["--resume", "RUN"], "recipe.json does not exist")])
def test_resume_takes_no_other_flags(tmp_path, monkeypatch, capsys, words, message):
    """The recipe of a run is its own: a flag beside --resume is refused."""
    words = [tmp_path if word == "RUN" else word for word in words]
    code, stderr = refused(train.main, monkeypatch, capsys, *words)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr


def test_flags_of_training_do_nothing_in_evaluation(tmp_path, monkeypatch, capsys):
    """eval.py has the protocol's flags; another one of the recipe is refused there."""
    code, stderr = refused(evaluation.main, monkeypatch, capsys, "--lr", "1")
    assert code == 2 and "--lr is no flag of this command: it would do nothing here" in stderr


def test_a_tiny_backbone_changes_a_row(tmp_path):
    """--backbone tiny makes a row of files small; what is given besides is kept."""
    made = resolve(["--dataset", "ade20k", "--data", "x", "--backbone", "tiny", "--crop", "64",
                    "--out", str(tmp_path)])[0]
    small = RECIPES["seg", "shapes"]                     # whose scenes are enlarged, as a whole
    assert made.model == replace(small.model, resize_scale=0) and made.crop == 64
    assert (made.lr, made.iterations, made.files.data) == (small.lr, 550, "x")


def test_runs_are_numbered(tmp_path, monkeypatch):
    """Without --out the first free folder is taken."""
    monkeypatch.chdir(tmp_path)
    assert free_folder("r") == "r"
    for name in ("r", "r-2"):
        (tmp_path / name).mkdir()
    assert free_folder("r") == "r-3"
    assert resolve([])[0].out == "runs/seg-shapes"


# ------------------------------------------------------------------------------------------------
# Fixed prompts

@pytest.mark.parametrize("flags, adapter", [([], True), (["--no-prompt-adapter"], False)])
def test_prompts_say_how_many_they_are(tmp_path, flags, adapter):
    """N is the file's, the prompts are fixed, and an adapter is trained unless it is ruled out."""
    save_file({"p": torch.ones(6, 64)}, tmp_path / "p.safetensors")
    made = resolve(["--prompts", str(tmp_path / "p.safetensors"), "--out", str(tmp_path), *flags])
    model = made[0].model
    assert model.num_prompts == 6 and model.fixed_prompts and model.prompt_adapter == adapter


BAD_PROMPTS = [
    ("missing", "does not exist"), ("pickle", "is not a complete .safetensors file"),
    ("truncated", "not a complete"), ("two", "holds 2 tensors"), ("width", "shape (4, 17)"),
    ("vector", "shape (16,)"), ("none", "shape (0, 16)"), ("integers", "int64"),
    ("nan", "one of finite floats (N, 16)"), ("vast", "one of finite floats"),
    ("other count", "--num-prompts 4")]


@pytest.mark.parametrize("kind,message", BAD_PROMPTS)
def test_bad_prompt_files_are_refused_in_one_line(tmp_path, kind, message):
    """The line names the file and what is wanted."""
    path = tmp_path / ("p.pt" if kind == "pickle" else "p.safetensors")
    tensors = {"width": torch.ones(4, 17), "vector": torch.ones(16), "none": torch.ones(0, 16),
               "integers": torch.ones(4, 16, dtype=torch.long), "other count": torch.ones(5, 16),
               "nan": torch.full((4, 16), float("nan")),
               "vast": torch.full((4, 16), 1e300, dtype=torch.float64)}
    more = {"q": torch.ones(4, 16)} if kind == "two" else {}
    if kind != "missing":
        save_file({"p": tensors.get(kind, torch.ones(4, 16)), **more}, path)
    if kind == "pickle":
        torch.save(torch.ones(4, 16), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError) as error:
        recipe(tmp_path / "r", "--prompts", path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--resume=runs/x", "--iterations=50"],
                                   ["--resume", "runs/x", "--lr=1"]])
def test_resume_takes_no_other_flag_however_it_is_written(words):
    """--resume=RUN --flag=value is refused like --resume RUN --flag value."""
    with pytest.raises(InputError, match="--resume RUN takes the run's recipe"):
        resolve(words)
