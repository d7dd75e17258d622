"""What several test files share: tiny models and recipes, commands run in this process."""
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from ops.errors import run_command
from sets import shapes
from tasks.flags import resolve
from tasks.recipes import read_recipe

TINY = ["--init", "random", "--unet-channels", "16", "16", "32", "32", "--unet-groups", "8",
        "--unet-context-dim", "16", "--unet-latent-channels", "4", "--vae-channels", "8", "8", "16",
        "16", "--vae-groups", "8", "--vae-latent-channels", "4", "--num-prompts", "4",
        "--refine-steps", "2", "--crop", "64", "--batch", "4", "--micro-batch", "2", "--workers",
        "0", "--precision", "float32", "--log-every", "1"]  # trains in a second, whatever the task
SCENES = ["--val-scenes", "2"]  # embedded sets only
HEAD = ["--head-channels", "16"]  # seg and depth only


def recipe(out, *flags):
    """The embedded segmentation recipe at a size that trains in a second."""
    return resolve([*TINY, *HEAD, *SCENES, "--out", str(out), *map(str, flags)])[0]


def refused(command, monkeypatch, capsys, *flags):
    """(exit code, stderr) of a command line that ends early, run in this process."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    return stop.value.code, capsys.readouterr().err


def repeat_last_step(folder, again):
    """Take up a copy of a finished run at the checkpoint before its last; the weights must come out
    the same, to the bit.  Returns the recipe as read from the copy.
    """
    shutil.copytree(folder, again)
    shutil.rmtree(again / "last")                        # last.previous is a step before
    resumed = replace(read_recipe(again / "recipe.json"), out=str(again))
    train.train(resumed, resume=True)
    before, after = (load_file(place / "last" / "model.safetensors") for place in (folder, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    return resumed


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


def tiny_recipe(task, out, *flags):
    """A tiny recipe of a task on its embedded set."""
    own = ["--sigma", "2", "--deconv-channels", "8"] if task == "pose" else HEAD
    return resolve([*TINY, *own, *SCENES, "--task", task, "--out", str(out), *map(str, flags)])[0]


def write_run(task, folder, made=None):
    """A run folder as train.py leaves it: an untrained tiny model on the embedded scenes."""
    made = made or tiny_recipe(task, folder)
    model = train.build_model(made, shapes.CLASSES if task == "seg" else ())
    model.save_pretrained(folder / "best")
    values = {**asdict(made), "model": json.loads((folder / "best" / "config.json").read_text())}
    (folder / "recipe.json").write_text(json.dumps(values))
    return folder


def command(main, monkeypatch, *words):
    """Run a command's main with these words as its command line."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
    main()


def noise(height, width):
    """(height, width, 3) uint8 of random pixels."""
    rng = np.random.default_rng([height, width])
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def save_image(path, pixels, **options):
    """Write an array or a Pillow image, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def read_png(path):
    """The array of a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image)


def colours(picture):
    """The set of colours in a picture (H, W, 3)."""
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def columns_of(images):
    """A model's answer that is the column within what it is shown, (B, 1, H, W)."""
    B, _, H, W = images.shape
    return torch.arange(W, dtype=torch.float32).expand(B, 1, H, W)
