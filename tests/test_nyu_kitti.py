"""Depth sets in their released layouts, from 16-bit PNG to metres, through the real commands.

    pytest tests/test_nyu_kitti.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HEAD, TINY, refused
from PIL import Image
from safetensors.torch import load_file
from trees import KITTI_RGB, cut, make_kitti, make_nyu, write_pair

import eval as evaluation
import train
from ops.errors import InputError, run_command
from sets.nyu_kitti import DepthFolder, Kitti, Nyu, read_list
from tasks.recipes import find_recipe

SETS = {"nyu": (Nyu, make_nyu), "kitti": (Kitti, make_kitti)}


def opened(name, root, split, **options):
    """A split of a miniature set."""
    files = SETS[name][0](str(root), str(root / "train.txt"), str(root / "val.txt"))
    return files.open(cut(split, **options))


def flags_of(name, root):
    """The flags that name a miniature set, which is made."""
    SETS[name][1](root)
    return ["--task", "depth", "--dataset", name, "--data", root, "--train-list",
            root / "train.txt", "--val-list", root / "val.txt"]


# ------------------------------------------------------------------------------------------------
# Samples

def test_nyu_is_read_in_metres(tmp_path):
    """Millimetres become metres, 0 stays unknown; counts and roots follow the released layout."""
    make_nyu(tmp_path)
    train_set, val_set = opened("nyu", tmp_path, "train", side=480), opened("nyu", tmp_path, "val")
    assert (len(train_set), len(val_set)) == (4, 2)
    sample = val_set[0, 0]
    assert sample["image"].shape == (3, 480, 640) and sample["target"].shape == (480, 640)
    assert sample["target"][-1, 0] == pytest.approx(2.0, abs=1e-3)
    assert sample["target"][-1, -1] == pytest.approx(8.0, abs=1e-3)
    assert (sample["target"][:120] == 0).all()
    assert train_set[0, 0]["image"].shape == (3, 480, 480)
    assert "2.00 to 8.00 m" in val_set.check()


def test_kitti_is_cropped_at_the_bottom_centre(tmp_path):
    """352 x 1216 from the last rows and the middle columns, for image and depth, in both splits."""
    make_kitti(tmp_path)
    sample = opened("kitti", tmp_path, "val")[0, 0]
    whole = np.asarray(Image.open(tmp_path / KITTI_RGB.format("0002", 0).lstrip("/")))
    assert sample["image"].shape == (3, 352, 1216)
    expected = torch.from_numpy(whole[23:, 13:1229].astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(sample["image"], expected)
    assert sample["target"][-1, 0] == pytest.approx(2 + 6 * 13 / 1241, abs=0.01)
    assert opened("kitti", tmp_path, "train", side=352)[0, 0]["target"].shape == (352, 352)


def test_same_key_gives_the_same_sample(tmp_path):
    """Augmentation depends on (seed, epoch, index) alone."""
    dataset = opened("nyu", make_nyu(tmp_path), "train")
    a, b, other = dataset[3, 1], dataset[3, 1], dataset[4, 1]
    assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])
    assert not torch.equal(a["image"], other["image"])


def test_folder_depth_uses_the_given_units(tmp_path):
    """images/ and depths/ of the same names; --depth-scale units per metre."""
    write_pair(tmp_path, "images/val/a.png", "depths/val/a.png", (64, 96), 100)
    target = DepthFolder(str(tmp_path), 100.0).open(cut("val"))[0, 0]["target"]
    assert target[-1, -1] == pytest.approx(8.0, abs=0.01)


# ------------------------------------------------------------------------------------------------
# Bad input

def test_a_shared_drive_is_refused(tmp_path):
    """A drive in both lists would make the test set part of the training set."""
    make_kitti(tmp_path)
    (tmp_path / "val.txt").write_text((tmp_path / "train.txt").read_text())
    with pytest.raises(InputError, match="2011_09_26_drive_0001_sync is in the training and"):
        opened("kitti", tmp_path, "val")


def test_images_smaller_than_their_crop_are_refused(tmp_path):
    """NYU's are compared with the training crop, KITTI's with the benchmark's."""
    with pytest.raises(InputError, match="rgb_00000.jpg is 640x480: at least 512x512 is needed"):
        opened("nyu", make_nyu(tmp_path), "train", side=512)[0, 0]
    (tmp_path / "k").mkdir()
    make_kitti(tmp_path / "k")
    dataset = opened("kitti", tmp_path / "k", "val")
    write_pair(Path("/"), *map(str, dataset.pairs[0]), (300, 1242), 256)
    with pytest.raises(InputError, match="png is 1242x300: at least 1216x352 is needed"):
        dataset[0, 0]


def test_maps_without_any_depth_are_refused(tmp_path):
    """0 means unknown: maps of zeros cannot be trained on."""
    dataset = opened("nyu", make_nyu(tmp_path), "val")
    for _, path in dataset.pairs:
        Image.fromarray(np.zeros((480, 640), np.uint16)).save(path)
    with pytest.raises(InputError, match="no depth in the 2 maps checked"):
        dataset.check()


def spoil(root, kind):
    """Damage the miniature NYU tree; returns what the message must name."""
    image = root / "sync" / "kitchen_0002" / "rgb_00002.jpg"
    depth = root / "sync" / "kitchen_0002" / "sync_depth_00002.png"
    if kind == "missing":
        depth.unlink()
        return depth.name
    if kind == "8 bit":
        Image.fromarray(np.zeros((480, 640), np.uint8)).save(depth)
        return f"{depth.name} is uint8"
    if kind == "size":
        Image.fromarray(np.zeros((10, 10), np.uint16)).save(depth)
        return f"{depth.name} is 10x10"
    if kind == "corrupt":
        image.write_bytes(image.read_bytes()[:500])
        return image.name
    (root / "train.txt").write_text({"line": "just-one-word\n", "empty": "a.jpg None\n"}[kind])
    return "line 1: 'just-one-word'" if kind == "line" else "train.txt names no pair of files"


@pytest.mark.parametrize("kind", ["missing", "8 bit", "size", "corrupt", "line", "empty"])
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    """Exit code 2 and one line that names the file or line, before the model is built."""
    flags = flags_of("nyu", tmp_path)
    named = spoil(tmp_path, kind)
    code, stderr = refused(train.main, monkeypatch, capsys, *flags, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and named in stderr, stderr
    assert not (tmp_path / "r").exists()


def test_lists_are_asked_for(tmp_path, monkeypatch, capsys):
    """Without --train-list the message says what it is; one that isn't there is named."""
    flags = flags_of("nyu", tmp_path)
    for given, named in ((flags[:6], "--train-list is missing"),
                         ([*flags[:6], "--train-list", "nowhere.txt"], "nowhere.txt cannot be")):
        code, stderr = refused(train.main, monkeypatch, capsys, *given, "--out", tmp_path / "r")
        assert code == 2 and named in stderr


# ------------------------------------------------------------------------------------------------
# The commands

SMALL = [*TINY, *HEAD, "--backbone", "tiny", "--crop", "128", "--batch", "2", "--iterations", "2",
         "--save-every", "1", "--eval-every", "2", "--resize-scale", "0", "--refine-steps", "1"]


@pytest.mark.parametrize("name, windows", [("nyu", 2), ("kitti", 16)])
def test_windows_are_the_released_protocols(name, windows):
    """How many of them a prediction is averaged over."""
    assert find_recipe("depth", name).protocol.windows == windows


@pytest.mark.parametrize("name, windows, exported", [
    ("nyu", 2, "bathroom_rgb_00040.png"),
    ("kitti", 4, "2011_09_26_drive_0002_sync_0000000000.png")])
def test_miniature_sets_train_resume_and_evaluate(tmp_path, monkeypatch, capsys, name, windows,
                                                  exported):
    """The real commands: train, resume after the end, evaluate with the run's own protocol."""
    def run(command, *flags):
        monkeypatch.setattr("sys.argv", ["command", *map(str, flags)])
        run_command(command)

    out, folder = tmp_path / "run", tmp_path / "d"
    folder.mkdir()
    flags = flags_of(name, folder)
    pairs = [line for line in (folder / "val.txt").open() if " None" not in line]
    (folder / "val.txt").write_text(pairs[0])            # a whole image takes seconds
    run(train.main, *flags, *SMALL, "--windows", windows, "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [1, 2, 2]
    assert {"silog", "loss"} <= records[0].keys() and {"rmse", "d1", "abs_rel"} <= records[2].keys()
    before = load_file(out / "last" / "model.safetensors")
    run(train.main, "--resume", out)
    after = load_file(out / "last" / "model.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    run(evaluation.main, "--checkpoint", out, "--workers", 0, "--precision", "float32",
        "--export", out / "png")
    report = json.loads((out / "eval" / "metrics.json").read_text())
    assert report["rmse"] == pytest.approx(records[2]["rmse"], rel=1e-5)
    assert report["protocol"]["windows"] == windows
    written = sorted((out / "png").iterdir())
    assert written[0].name == exported and np.asarray(Image.open(written[0])).dtype == np.uint16
    assert "rmse" in capsys.readouterr().out


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    """Lists that Windows wrote begin with one."""
    (tmp_path / "list.txt").write_bytes("\ufeffa.jpg b.png\r\n".encode())
    assert read_list(str(tmp_path / "list.txt"), tmp_path, "--val-list") == [
        (tmp_path / "a.jpg", tmp_path / "b.png")]
