"""Every command of the README runs: none can rot.

Each is a case of `test_command_runs`, in a process of its own, in the README's order and in one
working directory, so that what reads a run finds the one that an earlier command wrote.  Its flags
are kept.  Paths become miniature data sets in the released layouts, placeholders become what they
stand for, Stable Diffusion 1.5 is a miniature in the Hub's cache, and tiny settings are appended.
A command that nothing here knows how to run fails.

    pytest tests/test_commands.py               the first set-up command on a tiny model
    pytest tests/test_commands.py -m slow       all others
"""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_apply
import test_cityscapes
import test_data
import test_nyu_kitti as test_depth_data
import test_official
import test_coco as test_pose_data
import test_train
from official_fixture import official_file
from oracles import diffusers_unet, diffusers_vae

from tasks import recipes
from weights import files as weights
from weights.official import our_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------------------
# The README's commands

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SHELLS = ("", "bash", "sh", "shell", "console")  # other languages are no commands
PRINTED = re.compile(r"(step \d+: |best |wrote )")  # first words of a quoted output
STARTS = re.compile(r"(python3?|torchrun|pytest|pip|accelerate|bash|git|hf) \S|--task \w+ --")


def collect(text):
    """Every command of a Markdown text, once, in order.

    Lines of fenced blocks, and inline code that begins like a command or, where `python train.py`
    is left out, with --task.
    """
    found = []
    for block in FENCE.finditer(text):
        if block[1] in SHELLS and not PRINTED.match(block[2]):
            lines = re.sub(r"(^|\s)#.*", "", block[2].replace("\\\n", " "), flags=re.M).splitlines()
            found += [(block.start(), " ".join(line.split())) for line in lines if line.strip()]
    outside = FENCE.sub(lambda block: " " * len(block[0]), text)
    for span in re.finditer(r"`([^`]+)`", outside):
        command = " ".join(span[1].split())
        if STARTS.match(command):
            left_out = "python train.py " if command.startswith("--task") else ""
            found.append((span.start(), left_out + command))
    found.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys(command for _, command in found))


COMMANDS = collect(README)


def words_of(command):
    """Its words as `python SCRIPT ...`, without an installation before it."""
    words = shlex.split(re.sub(r"^pip install -r \S+ && ", "", command))
    if words[0] == "torchrun":
        return ["python", "-m", "torch.distributed.run", *words[1:]]
    return ["python", "-m", *words] if words[0] == "pytest" else words


def program_of(words):
    """Which of the PROGRAMS the words run; fails if it is none."""
    program = next((w for w in words if w in PROGRAMS), None)
    if words[0] != "python" or program is None or {"&&", "|", ">", ";", "&"} & set(words):
        pytest.fail(f"tests/test_commands.py does not know how to run this command of the README: "
                    f"{shlex.join(words)}")
    return program


def option(words, flag, default=None):
    """The value after a flag."""
    return words[words.index(flag) + 1] if flag in words else default


def key_of(words):
    """TASK-DATASET of a command, which is also the name of the run that it writes."""
    run = option(words, "--checkpoint", "")
    if run.startswith("runs/"):
        return run.removeprefix("runs/")
    return f"{option(words, '--task', 'seg')}-{option(words, '--dataset', 'shapes')}"


def writer_of(run):
    """The README's command that writes runs/TASK-DATASET."""
    for command in COMMANDS:
        words = words_of(command)
        trains = "train.py" in words and not {"--resume", "--ablate"} & set(words)
        if trains and f"runs/{key_of(words)}" == run:
            return command
    pytest.fail(f"no command of the README writes {run}, which another one reads")


# ------------------------------------------------------------------------------------------------
# What the data, files and placeholders of the README become.  __wrapped__: the function that a
# fixture was made from

def make_city(root):
    """Cityscapes with an extra image and its automatic labels."""
    test_cityscapes.city.__wrapped__(root)
    test_cityscapes.extra.__wrapped__(root)
    test_cityscapes.write_label(root, "convert_autolabelled", test_cityscapes.ERBACH,
                                "gtFine_labelTrainIds", test_cityscapes.label_of(16, 255))


def make_depth_folder(root):
    """Images and depths of one's own, in 1/1000 m."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        test_depth_data.write_pair(root, f"images/{split}/{name}.png", f"depths/{split}/{name}.png",
                                   (128, 192), 1000, 0)


def make_kitti(root):
    """KITTI with one test image: its 16 windows, and their mirror images, take long."""
    test_depth_data.make_kitti(root)
    lines = (root / "val.txt").read_text().splitlines(keepends=True)
    (root / "val.txt").write_text("".join(lines[:2]))    # the first has no depth


def make_people(root):
    """Images and COCO-format annotations of one's own, and detected boxes."""
    root.mkdir()
    test_pose_data.write_set(root)
    test_pose_data.write_boxes(root, [test_pose_data.detection(score=0.9)])


def make_coco(root):
    """The same, laid out as COCO is released."""
    make_people(root)
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").rename(
            root / "annotations" / f"person_keypoints_{split}2017.json")
        (root / "images" / split).rename(root / f"{split}2017")


TREES = {
    "seg-folder": test_train.make_folder, "seg-ade20k": test_data.ade.__wrapped__,
    "seg-cityscapes": make_city, "seg-cityscapes-extra": make_city,
    "seg-mapillary": test_cityscapes.vistas.__wrapped__, "depth-folder": make_depth_folder,
    "depth-nyu": test_depth_data.make_nyu, "depth-kitti": make_kitti,
    "pose-folder": make_people, "pose-coco": make_coco,
}
PLACEHOLDERS = {"RUN": "runs/seg-shapes", "DIR": "out", "OUT": "saved", "...": ""}


def make_official(path, key):
    """A checkpoint in the authors' layout, at a tiny width: for segmentation with ADE20K's classes,
    for depth with one pass and 8 channels in the head, as KITTI's 32 large windows take long.
    """
    info = test_official.reduced(key.split("-")[0])[0]
    state = {}
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
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("main")


def stand_ins(place, key):
    """Flag -> what its value becomes, for the data set `key`."""
    tree = place / "data" / key
    return {"--data": tree, "--train-list": tree / "train.txt", "--val-list": tree / "val.txt",
            "--train-json": tree / "annotations" / "train.json", "--images": tree / "images/train",
            "--val-json": tree / "annotations" / "val.json", "--boxes": tree / "found.json",
            "--official": place / f"{key}.pth", "--image": place / "photos",
            "--nproc-per-node": 2, "--nnodes": 1, "--rdzv-endpoint": "localhost:0"}


# ------------------------------------------------------------------------------------------------
# What is appended, and what is expected

def train_settings(words, key):
    """One step of a tiny model on few images; a resumed run has its own recipe."""
    if "--resume" in words:
        return []
    task = key.split("-")[0]
    size = {"seg": "--crop 64 --head-channels 8", "depth": "--crop 128 --head-channels 8",
            "pose": "--crop 128 --crop-width 64 --deconv-channels 8"}[task]
    return (f"{size} --num-prompts 8 --batch 4 --micro-batch 2 --iterations 1 --eval-every 1 "
            f"--save-every 1 --val-scenes 2 --workers 0 --device cpu"
            f"{' --ablate-seeds 1' if '--ablate' in words else ''}").split()


BENCHMARK = "--width tiny --size 8 --rounds 1 --dtype float32 --task seg --T 1 --device cpu".split()
PROGRAMS = {  # script -> (flags to append, what it must print)
    "train.py": (train_settings, r"^wrote (runs/\S+)/ \("),
    "eval.py": (lambda words, key: ["--workers", "0", "--device", "cpu"],
                r"^wrote ([^\s:]+)|^ *resized "),
    "tests/benchmark.py": (lambda words, key: BENCHMARK, r'^{"torch": .*"rows": \[{'),
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
        pytest.fail(f"tests/test_commands.py has no miniature data set {key}, for: {command}")
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
        (place / "data").mkdir()
        make_stable_diffusion(place / "hub")
        for name, size in (("a.png", (70, 100)), ("b/c.jpg", (96, 80))):
            test_apply.save(place / "photos" / name, test_apply.noise(*size))

    def prepare(self, words):
        """Make the data set, the checkpoint and the runs that translated words name."""
        key = key_of(words)
        if key in TREES and not (self.place / "data" / key).exists():
            TREES[key](self.place / "data" / key)
        if "--official" in words:
            make_official(self.place / f"{key}.pth", key)
        for word in words:
            if word.startswith("runs/") and not (self.place / word).exists():
                self.run(writer_of(word))

    def run(self, command):
        """What a command of the README prints; fails unless it ends with exit code 0."""
        if command not in self.outputs:
            words = translate(command, self.place)
            self.prepare(words)
            environment = {**os.environ, "HF_HUB_CACHE": str(self.place / "hub"),
                           "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(words, cwd=ROOT if "pytest" in words else self.place,
                                  env=environment, capture_output=True, text=True, timeout=3600)
            if done.returncode:
                pytest.fail(f"{shlex.join(words)}\nexit code {done.returncode}\n{done.stdout}"
                            f"{done.stderr}", pytrace=False)
            self.outputs[command] = done.stdout
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


def test_every_command_of_the_readme_is_known(tmp_path):
    """For each there is a program, a data set and something for each placeholder."""
    assert len(COMMANDS) >= 25
    for command in COMMANDS:
        assert translate(command, tmp_path)[0] == sys.executable
        for word in words_of(command):
            if word.startswith("runs/"):
                assert writer_of(word) in COMMANDS


def test_every_data_set_has_a_miniature():
    """A data set that there is a recipe for has a tree here."""
    assert set(TREES) == {"-".join(key) for key in recipes.RECIPES if key[1] != "shapes"}


@pytest.mark.parametrize("command,message", [
    ("make all", "does not know how to run .*make all"),
    ("python new.py --task seg", "does not know how to run .*new.py"),
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
                                         "pycocotools"}}
    files = re.findall(r"pip install -r (\S+)", README)
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
    if result.re.groups and "wrote" in result[0]:
        assert (stage.place / result[1]).exists(), result[0]
