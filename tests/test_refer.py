"""Referring segmentation: VPD's metrics, masks from log-odds, pictures with their sentence.

    pytest tests/test_refer.py
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import colours, noise, read_png
from test_refcoco import ARRAYS, FIGURES, write_folder, write_refcoco
from torch import nn
from trees import cut

from ops import draw
from ops.errors import InputError
from sets.embedded import ReferScenes
from sets.refcoco import RefCoco, ReferFolder
from tasks import refer
from tasks.recipes import RECIPES, lr_factor
from tasks.refer import Protocol
from vpd.text import TextReader

TINY_SD = str(Path(__file__).parents[1] / "weights" / "tiny-sd")


class Sided(nn.Module):
    """A model that looks left if it is told "left", else right; notes what it was told."""

    def __init__(self):
        super().__init__()
        self.anything, self.told = nn.Parameter(torch.zeros(1)), []

    def reader(self, sentences):
        """(B, 1, 1): 1 for left, -1 for right."""
        self.told += sentences
        return torch.tensor([[[1.0 if "left" in s else -1.0]] for s in sentences])

    def forward(self, images, text):
        """(B, 3, H, W) -> (B, 2, H, W)."""
        B, _, H, W = images.shape
        side = (W / 2 - 0.5 - torch.arange(W)).expand(B, 1, H, W) * text[..., None]
        return torch.cat([-side, side], dim=1)


@dataclass(frozen=True)
class Settings:
    """What `refer` reads of a recipe."""

    protocol: Protocol
    model: object = type("Config", (), {"num_tokens": 12})
    crop: int = 64
    crop_width: int | None = None


# ------------------------------------------------------------------------------------------------
# Numbers

def test_metrics_are_vpds():
    """Eleven sentences' masks: the released evaluate()'s figures, an empty union counted as 0."""
    found, truth = (torch.from_numpy(ARRAYS[name]) == 1 for name in ("prediction", "target"))
    counts = [refer.overlap(a, b) for a, b in zip(found, truth)]
    assert [i / max(u, 1) for i, u in counts] == pytest.approx(FIGURES["ious"], rel=1e-12)
    ours, names = refer.refer_metrics(counts), {"oIoU": "overall_iou", "mIoU": "mean_iou"}
    assert counts[-1] == (0, 0) and len(ours) == 7
    for name, value in ours.items():
        assert 100 * value == pytest.approx(FIGURES["metrics"][names.get(name, name)], rel=1e-12)


def test_thresholds_are_reached_by_equality():
    """An IoU of exactly 0.5 counts for P@0.5."""
    metrics = refer.refer_metrics([(1, 2), (4, 5)])
    assert metrics["P@0.5"] == 1 and metrics["P@0.8"] == 0.5 and metrics["P@0.9"] == 0
    assert metrics["oIoU"] == pytest.approx(5 / 7) and metrics["mIoU"] == pytest.approx(0.65)


def test_learning_rate_meets_the_golden_values():
    """Power 0.9, down to 0 after 40 epochs, without warm-up."""
    recipe = replace(RECIPES["seg", "ade20k"], lr=5e-5, schedule="power", iterations=40_000)
    for step, lr in FIGURES["lr"].items():
        assert recipe.lr * lr_factor(int(step), recipe) == pytest.approx(lr, rel=1e-12)


# ------------------------------------------------------------------------------------------------
# Whole sets

def test_evaluation_of_a_set(tmp_path):
    """Sentences reach the model, masks the counts, the sheet and the exported files."""
    entry = {"split": "val", "mask": "b.png", "sentences": ["the left half", "the other one"]}
    entries = [{**entry, "image": name} for name in ("a.png", "b.png")]
    root = write_folder(tmp_path / "own", entries)
    model, files = Sided(), ReferFolder(data=str(root)).open(cut("val"))
    metrics = refer.evaluate(model, files, Protocol(at_once=3), torch.float32,
                             sheet=tmp_path / "sheet.png", export=tmp_path / "masks")
    assert metrics == {"oIoU": 1 / 3, "mIoU": 0.5} | {f"P@0.{i}": 0.5 for i in range(5, 10)}
    assert model.told == ["the left half", "the other one"] * 2
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [
        "a_0.png", "a_1.png", "b_2.png", "b_3.png"]
    left = read_png(tmp_path / "masks" / "a_0.png")
    assert (left[:, :32] == 255).all() and not left[:, 32:].any()
    assert len(colours(read_png(tmp_path / "sheet.png"))) > 3


def test_own_size_is_compared(tmp_path):
    """With own_size the answer is enlarged to the image's size, where it is compared."""
    root = write_refcoco(tmp_path)
    files = RefCoco(data=str(root), val_split="testA", own_size=True).open(cut("val"))
    shown = []
    model = Sided()
    model.register_forward_hook(lambda _, args, out: shown.append(out.shape))
    metrics = refer.evaluate(model, files, Protocol(), torch.float32)
    assert shown == [(1, 2, 64, 64)] * 3
    truth = ARRAYS["sum"].shape
    found = refer.predict(model, torch.zeros(1, 3, 64, 64), ["left"], truth, torch.float32)
    assert found.shape == (1, 48, 80) and (found[..., :40] > 0).all() and 0 < metrics["oIoU"] < 1


def test_embedded_scenes_and_their_reader(capsys):
    """The embedded set's sentences go through tiny-sd's own reader; the report is in percent."""
    model, read = Sided(), TextReader.from_pretrained(TINY_SD, 32)
    sided = model.reader
    model.reader = lambda sentences: sided(sentences) + 0 * read(sentences)[:, :1, :1]
    files = ReferScenes(2, 6).open(cut("val"))
    metrics = refer.evaluate(model, files, Protocol(at_once=4), torch.float32)
    assert 0 < metrics["oIoU"] < 1 and len(model.told) == 6
    refer.report(metrics, files)
    said = capsys.readouterr().out
    assert said.startswith(f"oIoU {100 * metrics['oIoU']:.2f}  mIoU ") and "P@0.9" in said


# ------------------------------------------------------------------------------------------------
# Pictures, and the user's own

def test_sheet_shows_truth_prediction_and_sentence(tmp_path):
    """Three panels, dark where the masks are not; another sentence, another sheet."""
    image, left = torch.full((3, 96, 96), 0.8), np.arange(96)[None].repeat(96, 0) < 48
    sheets, grey = [], [{(204,) * 3}, {(51,) * 3}]
    for text in ("the left one", "the dark one", "a sentence of very many words " * 9):
        refer.save_sheet(tmp_path / "s.png", [(image, text, left, ~left)])
        sheets.append(read_png(tmp_path / "s.png"))
    body = sheets[0][60:200]
    assert colours(body[:, :192]) == grey[0]
    assert [colours(body[:, 192:288]), colours(body[:, 288:384])] == grey
    assert [colours(body[:, 480:576]), colours(body[:, 384:480])] == grey
    assert (sheets[0] != sheets[1]).any() and sheets[2].shape[0] > sheets[0].shape[0]


def test_own_pictures(tmp_path):
    """A mask of the picture's own size and an overlay, from the sentence that was given."""
    recipe = Settings(Protocol(sentence="the left half"))
    ready, image = refer.prepare(recipe, None), noise(50, 120)
    assert refer.view(image, Path("x.jpg"), recipe, ready).shape == (64, 64, 3)
    assert refer.apply(Sided(), image, Path("x.jpg"), tmp_path / "x", recipe, torch.float32,
                       ready) == []
    mask = read_png(tmp_path / "x_mask.png")
    assert mask.shape == (50, 120) and (mask[:, :60] == 255).all() and not mask[:, 60:].any()
    assert read_png(tmp_path / "x_overlay.png").shape[0] > draw.MIN_SIDE
    assert "255: 'the left half'" in refer.written(recipe, ready)


@pytest.mark.parametrize("sentence, said", [
    (None, "--sentence is missing: it says which object is meant"),
    ("  ", "--sentence: a sentence is '  ', but should be a text"),
    ("dog " * 500, "--sentence: a sentence has 500 words, 'dog"),
    ("dog " * 11, "--sentence has 11 words: the model reads 10 tokens")])
def test_sentences_that_cannot_be_read_are_refused(sentence, said):
    """None, an empty one, one of 500 words, one of more words than the model has tokens for."""
    with pytest.raises(InputError, match=said):
        refer.prepare(Settings(Protocol(sentence=sentence)), None)
    with pytest.raises(InputError, match="--boxes is for pose"):
        refer.prepare(Settings(Protocol(sentence="x")), "boxes.json")
