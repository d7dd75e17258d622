"""Every command of README.md and docs/*.md runs: none can rot.

Each is a case of `test_command_runs`, in a process of its own, in the documents' order and in one
working directory, so that what reads a run finds the one that an earlier command wrote.  Its flags
are kept.  Paths become miniature data sets in the released layouts, placeholders become what they
stand for, Stable Diffusion 1.5 is a miniature in the Hub's cache, and tiny settings are appended.
A command that nothing here knows how to run fails.

    pytest tests/test_commands.py               the first set-up command on a tiny model
    pytest tests/test_commands.py -m slow       all others
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import COMMANDS, ROOT, TEXTS, collect, key_of, snippets, words_of
from official_fixture import official_file
from oracles import diffusers_unet, diffusers_vae
from transformers import CLIPTextConfig, CLIPTextModel
from trees import TREES, random_image, write
from vpd_fixture import fixture, vpd_contents

from weights import files as weights
from weights.official import our_name

def program_of(words):
    """Which of the PROGRAMS the words run; fails if it is none."""
    program = next((w for w in words if w in PROGRAMS), None)
    if words[0] != "python" or program is None or {"&&", "|", ">", ";", "&"} & set(words):
        pytest.fail("tests/test_commands.py does not know how to run this command of the documents:"
                    f" {shlex.join(words)}")
    return program


def writer_of(run):
    """The documents' first command that writes runs/TASK-DATASET."""
    for command in COMMANDS:
        words = words_of(command)
        trains = "train.py" in words and not {"--resume", "--help", "--out"} & set(words)
        if trains and f"runs/{'-'.join(key_of(words))}" == run:
            return command
    pytest.fail(f"no command of the documents writes {run}, which another one reads")


# ------------------------------------------------------------------------------------------------
# What the data, files and placeholders of the documents become

PLACEHOLDERS = {"RUN": "runs/seg-shapes", "DIR": "out", "OUT": "saved", "...": "",
                "SOURCE": str(ROOT / "weights" / "tiny-sd")}


def make_official(path, key):
    """A checkpoint in the authors' layout, at a tiny width: for segmentation with ADE20K's classes,
    for depth with one pass and 8 channels in the head, as KITTI's 32 large windows take long.
    """
    golden = Path(__file__).parent / "golden" / f"official_{key[0]}.json"
    info, state = json.loads(golden.read_text()), {}
    for name, shape in info["state"].items():
        if ".conv_seg." in name:
            shape = [150, *shape[1:]]
        if name.startswith(("decoder.conv_layers.", "last_layer_depth.")):
            shape = [8 if size == 192 else size for size in shape]
        later_pass = re.match(r"(temb|prompts) [12]|adapters\.[12]\.", our_name(name) or "")
        if info["task"] == "seg" or not later_pass:
            state[name] = shape
    official_file({**info, "state": state}, path)


def make_stable_diffusion(hub):
    """SD1.5's repository in a Hub cache: diffusers' own files, at a tiny width."""
    repository = hub / f"models--{weights.SD15.replace('/', '--')}"
    snapshot = repository / "snapshots" / "main"
    diffusers_unet((32,) * 4, heads=1, context_dim=16, layers=1).save_pretrained(snapshot / "unet")
    diffusers_vae((32,) * 4, layers=1).save_pretrained(snapshot / "vae")
    CLIPTextModel(CLIPTextConfig(vocab_size=698, hidden_size=16, intermediate_size=16,
                                 num_hidden_layers=1, num_attention_heads=1, eos_token_id=697)
                  ).save_pretrained(snapshot / "text_encoder")
    shutil.copytree(weights.TINY_SD / "tokenizer", snapshot / "tokenizer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("main")


def stand_ins(place, key):
    """Flag -> what its value becomes, for the data set `key`."""
    name = "-".join(key)
    tree = place / "data" / name
    return {"--data": tree, "--train-list": tree / "train.txt", "--val-list": tree / "val.txt",
            "--train-json": tree / "annotations" / "train.json", "--images": tree / "images/train",
            "--val-json": tree / "annotations" / "val.json", "--boxes": tree / "found.json",
            "--classes": place / "names.txt", "--official": place / f"{name}.pth",
            "--image": place / "photos",
            "--nproc-per-node": 2, "--nnodes": 1, "--rdzv-endpoint": "localhost:0"}


# ------------------------------------------------------------------------------------------------
# What is appended, and what is expected

def train_settings(words, key):
    """One step of a tiny model on few images; a resumed run has its own recipe."""
    if {"--resume", "--help"} & set(words):
        return []
    size = {"seg": "--crop 64 --head-channels 8", "depth": "--crop 128 --head-channels 8",
            "pose": "--crop 128 --crop-width 64 --deconv-channels 8",
            "refer": "--crop 128"}[key[0]]
    scenes = "--val-scenes 2" if key[1] == "shapes" else ""
    prompts = "" if key[0] == "refer" or "vpd" in words else "--num-prompts 18"
    return (f"{size} {prompts} --batch 4 --micro-batch 2 --iterations 1 --eval-every 1 "
            f"--save-every 1 --workers 0 --device cpu {scenes}").split()


def no_settings(words, key):
    """A command that looks at its flags only."""
    return ["--device", "cpu"]


BENCHMARK = ("--width tiny --size 8 --rounds 1 --dtype float32 --T 1 --mode eager "
             "--device cpu").split()
PROGRAMS = {  # script or module -> (flags to append, what it must print)
    "train.py": (train_settings, r"^wrote (runs/\S+)/ \(|^usage: "),
    "eval.py": (lambda words, key: ["--workers", "0", "--device", "cpu"],
                r"^wrote ([^\s:]+)|^(seg|depth|pose|refer) on \S+$"),
    "tools.ablate": (lambda words, key: train_settings(words, key) + ["--seeds", "1"],
                     r"^wrote (\S+)/ \("),
    "tools.export": (lambda words, key: [], r"^wrote ([^\s:]+): torch.export.load"),
    "tools.features": (no_settings, r"^wrote ([^\s:]+): \d+ pictures"),
    "tools.heatmaps": (no_settings, r"^wrote ([^\s:]+): .*prompts.png$"),
    "tools.judge": (lambda words, key: ["--captions", "2", "--sample-steps", "1"],
                    r"^wrote ([^\s:]+)/: captions.json"),
    "tools.prompts": (lambda words, key: [], r"^wrote (\S+): \d+ names, \d+ wide"),
    "tools.memory": (lambda words, key: ["--backbone", "tiny", "--crop", "64", "--device", "cpu"],
                     r"^about .* GB|^fits .*--micro-batch \d+$"),
    "tests/benchmark.py": (lambda words, key: BENCHMARK, r'^{"torch": .*"rows": \['),
    "pytest": (lambda words, key: ["--collect-only", "-p", "no:cacheprovider"],
               r"^\d+(/\d+)? tests collected"),
}


def translate(command, place):
    """The words of a command as they are run here; fails where nothing stands for one of them."""
    words = words_of(command)
    program = program_of(words)
    words = [PLACEHOLDERS.get(w, w) for w in words if PLACEHOLDERS.get(w, w)]
    key = key_of(words)
    if "--data" in words and key not in TREES:
        pytest.fail(f"tests/test_commands.py has no miniature data set {'-'.join(key)}, for: "
                    f"{command}")
    values = stand_ins(place, key)
    words[1:] = [str(values.get(flag.replace("_", "-"), word))
                 for flag, word in zip(words, words[1:])]
    unknown = [w for w in words if re.fullmatch(r"[A-Z][A-Z_|/:]*|<.*>", w)]
    if unknown:
        pytest.fail(f"tests/test_commands.py does not know what {unknown[0]} stands for, in: "
                    f"{command}")
    scripts = {"python": sys.executable, **{p: str(ROOT / p) for p in PROGRAMS if ".py" in p}}
    return [scripts.get(w, w) for w in words] + PROGRAMS[program][0](words, key)


class Stage:
    """A working directory in which each command is run once, after those whose runs it reads."""

    def __init__(self, place):
        self.place, self.outputs = place, {}
        make_stable_diffusion(place / "hub")
        (place / "names.txt").write_text("chair\nliving_room\n")
        for name, size in (("a.png", (70, 100)), ("b/c.jpg", (96, 80))):
            write(place / "photos" / name, random_image(*size))

    def prepare(self, words):
        """Make the data set, the checkpoint and the runs that translated words name."""
        key = key_of(words)
        tree = self.place / "data" / "-".join(key)
        if key in TREES and not tree.exists():
            tree.mkdir(parents=True)
            TREES[key](tree)
        if "--official" in words and "vpd" in words:
            torch.save(vpd_contents(fixture(key[0])[0]), self.place / f"{'-'.join(key)}.pth")
        elif "--official" in words:
            make_official(self.place / f"{'-'.join(key)}.pth", key)
        for word in words:
            if word.startswith("runs/") and not (self.place / word).exists():
                self.run(writer_of(word))

    def start(self, words, folder=None):
        """What words print; fails unless they end with exit code 0."""
        environment = {**os.environ, "HF_HUB_CACHE": str(self.place / "hub"),
                       "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=folder or self.place, env=environment,
                              capture_output=True, text=True, timeout=3600)
        if done.returncode:
            pytest.fail(f"{shlex.join(words)}\nexit code {done.returncode}\n{done.stdout}"
                        f"{done.stderr}", pytrace=False)
        return done.stdout

    def run(self, command):
        """What a command of the documents prints."""
        if command not in self.outputs:
            words = translate(command, self.place)
            self.prepare(words)
            self.outputs[command] = self.start(words, ROOT if "pytest" in words else None)
        return self.outputs[command]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """One working directory for all commands."""
    return Stage(tmp_path_factory.mktemp("commands"))


# ------------------------------------------------------------------------------------------------
# Tests

def is_quick(command):
    """Whether it runs by default: the set-up command that trains."""
    return command.startswith("pip ") and "train.py" in command


CASES = [pytest.param(c, id=c, marks=() if is_quick(c) else pytest.mark.slow) for c in COMMANDS]


def test_commands_are_found_in_blocks_and_lines():
    """Shell blocks line by line, inline code in text and tables; neither output nor Python."""
    text = ("Do `python eval.py --checkpoint RUN` or `--lr`, `model.py`.\n\n```\nmake all\n"
            "python train.py \\\n  --lr 1\n# no\n```\n```python\nimport os\n```\n"
            "```\nstep 3: mIoU 1\n```\n| `--task seg --lr 1` | `torchrun\ntrain.py` |\n"
            "`python eval.py --checkpoint RUN`\n")
    assert collect(text) == ["python eval.py --checkpoint RUN", "make all",
                             "python train.py --lr 1", "python train.py --task seg --lr 1",
                             "torchrun train.py"]


def test_every_command_of_the_documents_is_known(tmp_path):
    """For each there is a program, a data set and something for each placeholder."""
    assert len(COMMANDS) >= 25
    for command in COMMANDS:
        assert translate(command, tmp_path)[0] == sys.executable
        for word in words_of(command):
            if word.startswith("runs/"):
                assert writer_of(word) in COMMANDS


@pytest.mark.parametrize("command,message", [
    ("make all", "does not know how to run .*make all"),
    ("python new.py --task seg", "does not know how to run .*new.py"),
    ("python -m tools.new --task seg", "does not know how to run .*tools.new"),
    ("git clone x && python train.py", "does not know how to run .*git clone"),
    ("python eval.py --protocol > file", "does not know how to run .*file"),
    ("python train.py --task seg --dataset new --data DATA", "no miniature data set seg-new"),
    ("python train.py --task seg --new FILE", "does not know what FILE stands for")])
def test_an_unknown_command_fails(tmp_path, command, message):
    """A new program, data set or placeholder is named until a case is written for it."""
    with pytest.raises(pytest.fail.Exception, match=message):
        translate(command, tmp_path)


def test_the_requirements_are_the_promised_packages():
    """What the set-up commands install: these packages with their least versions, nothing else."""
    allowed = {"requirements.txt": {"torch", "safetensors", "huggingface_hub", "numpy", "pillow"},
               "requirements-test.txt": {"-r requirements.txt", "pytest", "diffusers",
                                         "transformers", "pycocotools"}}
    files = re.findall(r"pip install -r (\S+)", TEXTS[ROOT / "README.md"])
    assert sorted(files) == sorted(allowed)
    for name in files:
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert {re.sub(r">=[\d.]+$", "", line) for line in lines if line} == allowed[name]


@pytest.mark.parametrize("command", CASES)
def test_command_runs(stage, command):
    """The command ends without error, prints its result line, and wrote what that line names."""
    printed = stage.run(command)
    expected = PROGRAMS[program_of(words_of(command))][1]
    result = re.search(expected, printed, re.M)
    assert result, f"{expected} is not in what was printed:\n{printed}"
    if result[0].startswith("wrote"):
        assert (stage.place / result[1]).exists(), result[0]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", snippets(), ids=lambda s: s.splitlines()[0])
def test_snippet_runs(stage, snippet):
    """Python of the documents that is not quoted runs, given `images` and the names in capitals."""
    given = "import torch\nimages = torch.rand(2, 3, 64, 128)\n"
    for name, value in (("FOLDER", str(ROOT)), ("RUN", PLACEHOLDERS["RUN"])):
        snippet = snippet.replace(f'"{name}"', repr(value))
    if PLACEHOLDERS["RUN"] in snippet:
        stage.prepare([PLACEHOLDERS["RUN"]])
    write(stage.place / "photo.jpg", random_image(70, 100))
    stage.start([sys.executable, "-c", given + snippet])
