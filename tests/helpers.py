"""What several test files share: tiny models and recipes, commands run in this process."""
import numpy as np
import pytest
from PIL import Image

from ops.errors import run_command
from tasks.flags import resolve

TINY = ["--unet-channels", "16", "16", "32", "32", "--unet-groups", "8", "--unet-context-dim", "16",
        "--unet-latent-channels", "4", "--vae-channels", "8", "8", "16", "16", "--vae-groups", "8",
        "--vae-latent-channels", "4", "--num-prompts", "4", "--refine-steps", "2", "--crop", "64",
        "--batch", "4", "--micro-batch", "2", "--workers", "0", "--precision", "float32",
        "--log-every", "1"]  # a model of any task that trains in a second; needs --backbone tiny
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
