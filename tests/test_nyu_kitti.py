"""Depth sets in their released layouts, from 16-bit PNG to metres, through the real commands.

    pytest tests/test_depth_data.py
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import TINY, run
from safetensors.torch import load_file

from ops import augment
from sets import nyu_kitti as depth_data
from ops import errors
import eval as evaluation
from tasks import recipes
import train
from ops.errors import InputError

KITTI_RGB = "/raw_data/2011_09_26/2011_09_26_drive_{}_sync/image_02/data/{:010d}.png"
KITTI_DEPTH = ("/data_depth_annotated/train/2011_09_26_drive_{}_sync/proj_depth/groundtruth/"
               "image_02/{:010d}.png")


def write_pair(root, rgb, depth, size, units, seed):
    """A random image and a depth ramp of 2 to 8 metres with a hole; returns the list line."""
    rng = np.random.default_rng(seed)
    height, width = size
    for path in (rgb, depth):
        (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(image).resize((width, height)).save(root / rgb.lstrip("/"))
    metres = np.linspace(2, 8, width)[None].repeat(height, axis=0)
    metres[: height // 4] = 0
    Image.fromarray((metres * units).astype(np.uint16)).save(root / depth.lstrip("/"))
    return f"{rgb} {depth} 518.8579\n"


def make_nyu(root):
    """A miniature NYU v2 tree with its two lists; returns the flags that name it."""
    train_lines = [write_pair(root / "sync", f"/kitchen_000{i}/rgb_0000{i}.jpg",
                              f"/kitchen_000{i}/sync_depth_0000{i}.png", (480, 640), 1000, i)
                   for i in range(4)]
    val_lines = [write_pair(root / "official_splits" / "test", f"/bathroom/rgb_0004{i}.jpg",
                            f"/bathroom/sync_depth_0004{i}.png", (480, 640), 1000, 10 + i)
                 for i in range(2)]
    return lists(root, "nyu", train_lines, val_lines)


def make_kitti(root):
    """A miniature KITTI tree (375 x 1242) with its two lists; returns the flags that name it."""
    train_lines = [write_pair(root, KITTI_RGB.format("0001", i), KITTI_DEPTH.format("0001", i),
                              (375, 1242), 256, i) for i in range(4)]
    val_lines = [write_pair(root, KITTI_RGB.format("0002", i), KITTI_DEPTH.format("0002", i),
                            (375, 1242), 256, 10 + i) for i in range(2)]
    return lists(root, "kitti", train_lines, ["a.png None 1\n", *val_lines])


def lists(root, dataset, train_lines, val_lines):
    """Write the two list files; returns the flags that name data set, folder and lists."""
    (root / "train.txt").write_text("".join(train_lines))
    (root / "val.txt").write_text("".join(val_lines))
    return ["--task", "depth", "--dataset", dataset, "--data", str(root), "--train-list",
            str(root / "train.txt"), "--val-list", str(root / "val.txt")]


def spec_of(flags):
    """The recipe as a dict that the flags give."""
    from dataclasses import asdict
    return asdict(recipes.resolve(recipes.parse([*flags, "--out", "nowhere"])))


def test_nyu_is_read_in_metres(tmp_path):
    """Millimetres become metres, 0 stays unknown; counts and roots follow the released layout."""
    spec = spec_of(make_nyu(tmp_path))
    train_set, val_set = (depth_data.open_dataset(spec, split) for split in ("train", "val"))
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
    spec = spec_of(make_kitti(tmp_path))
    sample = depth_data.open_dataset(spec, "val")[0, 0]
    whole = np.asarray(Image.open(tmp_path / KITTI_RGB.format("0002", 0).lstrip("/")))
    assert sample["image"].shape == (3, 352, 1216)
    expected = torch.from_numpy(whole[23:, 13:1229].astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(sample["image"], expected)
    assert sample["target"][-1, 0] == pytest.approx(2 + 6 * 13 / 1241, abs=0.01)
    assert depth_data.open_dataset(spec, "train")[0, 0]["target"].shape == (352, 352)


def test_same_key_gives_the_same_sample(tmp_path):
    """Augmentation depends on (seed, epoch, index) alone."""
    dataset = depth_data.open_dataset(spec_of(make_nyu(tmp_path)), "train")
    a, b, other = dataset[3, 1], dataset[3, 1], dataset[4, 1]
    assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])
    assert not torch.equal(a["image"], other["image"])


def test_a_shared_drive_is_refused(tmp_path):
    """A drive in both lists would make the test set part of the training set."""
    flags = make_kitti(tmp_path)
    (tmp_path / "val.txt").write_text((tmp_path / "train.txt").read_text())
    with pytest.raises(InputError, match="2011_09_26_drive_0001_sync is in the training and"):
        depth_data.open_dataset(spec_of(flags), "val")


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
    (root / "train.txt").write_text("just-one-word\n")
    return "line 1: 'just-one-word'"


@pytest.mark.parametrize("kind", ["missing", "8 bit", "size", "corrupt", "line"])
def test_bad_data_is_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    """Exit code 2 and one line that names the file or line, before the model is built."""
    flags = make_nyu(tmp_path)
    named = spoil(tmp_path, kind)
    code, stderr = run(train.main, monkeypatch, capsys, *flags, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and named in stderr, stderr
    assert not (tmp_path / "r").exists()


def test_lists_are_asked_for(tmp_path, monkeypatch, capsys):
    """Without --train-list the message says what it is."""
    flags = make_nyu(tmp_path)[:6]
    code, stderr = run(train.main, monkeypatch, capsys, *flags, "--out", tmp_path / "r")
    assert code == 2 and "--train-list is missing" in stderr


SMALL = ["--backbone", "tiny", "--unet-channels", "16", "16", "32", "32", "--vae-channels", "8",
         "8", "16", "16", "--context-dim", "16", "--num-prompts", "4", "--head-channels", "8",
         "--refine-steps", "2", "--batch", "2", "--micro-batch", "2", "--precision", "float32",
         "--workers", "0", "--log-every", "1", "--iterations", "2", "--save-every", "1",
         "--eval-every", "2", "--resize-scale", "0"]


@pytest.mark.parametrize("make,size", [(make_nyu, 128), (make_kitti, 128)])
def test_miniature_sets_train_resume_and_evaluate(tmp_path, monkeypatch, make, size, capsys):
    """The real commands: train, resume after the end, evaluate with the benchmark's protocol."""
    flags = make(tmp_path / "d") if (tmp_path / "d").mkdir() is None else []
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["train.py", *flags, *SMALL, "--crop", str(size), "--out",
                                     str(out)])
    errors.run_command(train.main)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [1, 2, 2]
    assert {"silog", "loss"} <= records[0].keys() and {"rmse", "d1", "abs_rel"} <= records[2].keys()
    before = load_file(out / "last" / "model.safetensors")
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(out)])
    errors.run_command(train.main)
    after = load_file(out / "last" / "model.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    monkeypatch.setattr("sys.argv", ["eval.py", "--checkpoint", str(out), "--workers", "0",
                                     "--precision", "float32", "--export", str(out / "png")])
    errors.run_command(evaluation.main)
    report = json.loads((out / "eval" / "metrics.json").read_text())
    assert report["rmse"] == pytest.approx(records[2]["rmse"], rel=1e-5)
    assert report["protocol"]["windows"] == (2 if make is make_nyu else 16)
    exported = sorted((out / "png").iterdir())
    names = ["bathroom_rgb_00040.png"] if make is make_nyu else \
        ["2011_09_26_drive_0002_sync_0000000000.png"]
    assert exported[0].name == names[0] and np.asarray(Image.open(exported[0])).dtype == np.uint16
    assert "rmse" in capsys.readouterr().out


def test_folder_depth_uses_the_given_units(tmp_path):
    """images/ and depths/ of the same names; --depth-scale units per metre."""
    for split in ("train", "val"):
        write_pair(tmp_path, f"images/{split}/a.png", f"depths/{split}/a.png", (64, 96), 100, 0)
    spec = spec_of(["--task", "depth", "--dataset", "folder", "--data", str(tmp_path),
                    "--depth-scale", "100"])
    target = depth_data.open_dataset(spec, "val")[0, 0]["target"]
    assert target[-1, -1] == pytest.approx(8.0, abs=0.01)


def test_cut_depth_shows_the_low_byte():
    """Raw depth modulo 256 in a range of columns, all rows and channels (2713 -> 153)."""
    image = np.zeros((8, 40, 3), np.uint8)
    depth = np.full((8, 40), 2713, np.float32)
    for seed in range(20):
        cut = augment.cut_depth(image, depth, np.random.default_rng(seed))
        columns = np.flatnonzero((cut == 153).all(axis=(0, 2)))
        assert len(columns) >= 1 and (np.diff(columns) == 1).all()
        assert (np.delete(cut, columns, axis=1) == 0).all()
    assert (image == 0).all()
