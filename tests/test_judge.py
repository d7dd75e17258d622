"""What a caption names, what a sample shows, and what is counted of both.

    pytest tests/test_judge.py
"""
import json

import pytest
import torch
from helpers import command, refused, tiny_recipe
from PIL import Image

import train
from sets.captions import VISIBLE, captions
from sets.shapes import CLASSES, render_world
from tasks.captioned import CaptionConfig, CaptionModel
from tools import judge
from tools.pretrain import HELD_OUT


@pytest.mark.parametrize("text, classes", [
    ("two boxes and a cone on red ground", {"box", "cone"}),
    ("people, a ball and three cylinders under a blue sky", {"person", "ball", "cylinder"}),
    ("a photo of a person with both arms up", {"person"}), ("an empty scene", set())])
def test_named_classes(text, classes):
    """Singular and plural; sky and ground are no objects."""
    assert judge.named(text) == classes


def test_what_is_named_is_in_the_scene():
    """Of true labels every held-out caption is found: the threshold is the captions' own."""
    for seed in range(HELD_OUT, HELD_OUT + 20):
        scene, world = render_world(seed)
        for text in captions(scene, world, seed, 4):
            assert judge.named(text) <= judge.seen(torch.from_numpy(scene.label))


def test_little_is_not_seen():
    """A class is seen from VISIBLE of the pixels on; ground never counts."""
    labels = torch.ones(100, 100, dtype=torch.uint8)
    least = round(VISIBLE * labels.numel())
    labels.view(-1)[:least] = CLASSES.index("ball")
    assert judge.seen(labels) == {"ball"}
    labels[0, 0] = 0
    assert judge.seen(labels) == set()


def test_shares_are_counted():
    """A text needs all its classes; the classes are counted one by one."""
    def picture(*names):
        return torch.stack([torch.full((8,), CLASSES.index(name)) for name in ("sky", *names)])

    texts = ["a ball", "a ball and a cone", "two cones"]
    own = [picture("ball", "box"), picture("ball", "ball"), picture("cone", "box")]
    found = judge.shares(texts, {"own": own, "shuffled": own[::-1]})
    assert found["shares"] == {"own": pytest.approx(2 / 3), "shuffled": 0.0}
    assert found["classes"]["ball"] == {"named": 2, "own": 2, "shuffled": 1}
    assert found["classes"]["cone"] == {"named": 2, "own": 1, "shuffled": 0}
    assert found["classes"]["box"] == {"named": 0, "own": 0, "shuffled": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained segmentation model of the scenes, saved."""
    folder = tmp_path_factory.mktemp("judge") / "run"
    train.build_model(tiny_recipe("seg", folder), CLASSES).save_pretrained(folder / "best")
    return folder


def test_one_command_judges_the_shipped_backbone(run, monkeypatch, capsys):
    """Samples of weights/tiny-sd, their labels, counts per class and shares, printed and written,
    and the same when it is called again."""
    path, texts = run / "captions" / "captions.json", []
    for _ in range(2):
        command(judge.main, monkeypatch, "--checkpoint", run, "--captions", "3", "--sample-steps",
                "2")
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    figures, printed = json.loads(texts[0]), capsys.readouterr().out
    assert {*figures["shares"]} == {"own", "shuffled", "scene"} and figures["captions"] == 3
    assert sum(row["named"] for row in figures["classes"].values()) >= 3
    assert f"{figures['shares']['own']:8.3f}" in printed
    assert Image.open(run / "captions" / "captions.png").width >= 128


@pytest.mark.parametrize("flags, message", [
    (["--captions", "1"], "possible is 2 to 10000"), (["--sample-steps", "0"], "sample-steps is 0"),
    (["--guidance", "inf"], "finite number"), (["--backbone", "nowhere"], "nowhere is no folder"),
    (["--checkpoint", "nowhere"], "neither it nor its best/")])
def test_bad_flags_are_refused_in_one_line(run, flags, message, monkeypatch, capsys):
    """Exit code 2 before anything is rendered."""
    monkeypatch.setattr(judge, "held_out", None)
    code, stderr = refused(judge.main, monkeypatch, capsys, "--checkpoint", run, *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr


def test_who_is_told_can_not_judge(run, monkeypatch, capsys, tmp_path):
    """Models of other classes, other tasks, and those that read captions."""
    known = CaptionConfig(**vars(train.methods.read_config(run / "best" / "config.json")))
    CaptionModel(known).save_pretrained(tmp_path / "captions")
    made = tiny_recipe("seg", tmp_path)
    train.build_model(made, ("a", "b")).save_pretrained(tmp_path / "classes")
    train.build_model(tiny_recipe("depth", tmp_path), ()).save_pretrained(tmp_path / "depth")
    for name in ("captions", "classes", "depth"):
        code, stderr = refused(judge.main, monkeypatch, capsys, "--checkpoint", tmp_path / name)
        assert code == 2 and "it can't judge" in stderr
