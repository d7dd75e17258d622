"""Exported models: one file, run by torch alone, whose answers are the model's.

Sizes and batches are others than those of the export, and answers are compared with what the model
gives, by the command itself before it writes, and here once more.

    pytest tests/test_export.py               the command, on a model of one layer
    pytest tests/test_export.py -m slow       every task of both methods
"""
import subprocess
import sys

import pytest
import torch
from helpers import command, refused
from test_heatmaps import TINY, saved_run
from torch import nn

from heads import resize
from model import Config, MetaPromptModel
from ops.errors import InputError
from tools import export
from vpd.model import VPDConfig, VPDModel

SMALL = dict(unet=TINY["unet"], vae=TINY["vae"], head_channels=8)
CASES = {
    "seg": Config(**TINY),
    "depth": Config(task="depth", shared_prompts=False, prompt_adapter=True, **TINY),
    "depth of enlarged images": Config(task="depth", resize_scale=1, **TINY),
    "pose": Config(task="pose", **TINY),
    "vpd seg": VPDConfig(num_classes=3, **SMALL),
    "vpd depth": VPDConfig(task="depth", num_classes=3, **SMALL),
    "vpd refer": VPDConfig(task="refer", num_tokens=4, **SMALL),
}


def export_and_ask(config, folder, monkeypatch, capsys):
    """Export a model of random weights; its answers at other sizes are the model's, in a process
    that knows torch only, too.
    """
    torch.manual_seed(0)
    kind = VPDModel if isinstance(config, VPDConfig) else MetaPromptModel
    kind(config).save_pretrained(folder / "model")
    command(export.main, monkeypatch, folder / "model", folder / "out.pt2")
    printed = capsys.readouterr().out
    assert printed.count("largest difference 0 of") == 2 and f"wrote {folder}/out.pt2" in printed
    assert {path.name for path in folder.iterdir()} == {"model", "out.pt2"}
    model = kind.from_pretrained(folder / "model")
    given = export.inputs(config, 4, 128, 128)
    torch.save(given, folder / "given.pt")
    script = ("import torch; g = torch.load('given.pt'); "
              "p = torch.export.load('out.pt2').module(); "
              "torch.save(p(g.pop('images'), **g), 'answer.pt')")
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    with torch.no_grad():
        expected = model(given.pop("images"), **given)
    torch.testing.assert_close(torch.load(folder / "answer.pt"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_task_of_both_methods_is_exported(tmp_path, monkeypatch, capsys, case):
    """Difference 0 at two sizes, and nothing of ours is needed to run it; refer takes `text`."""
    export_and_ask(CASES[case], tmp_path, monkeypatch, capsys)


class OneLayer(nn.Module):
    """A model of one convolution: export takes a second, not half a minute."""

    def __init__(self):
        super().__init__()
        self.config, self.conv = CASES["seg"], nn.Conv2d(3, 4, 3, stride=8, padding=1)

    def forward(self, images):
        """(B, 3, H, W) -> (B, 4, H, W)."""
        return resize(self.conv(images), images.shape[-2:])


def test_the_command_writes_what_it_compared(tmp_path, monkeypatch, capsys):
    """The file answers as the model does, in a batch and a size that nobody named before."""
    model = OneLayer().eval()
    monkeypatch.setattr(export.methods, "load", lambda folder: model)
    command(export.main, monkeypatch, saved_run(tmp_path), tmp_path / "out.pt2")
    printed = capsys.readouterr().out
    assert printed.count("largest difference 0 of") == 2 and f"wrote {tmp_path}/out.pt2" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"best", "out.pt2"}
    images = torch.rand(4, 3, 128, 320)
    program = torch.export.load(tmp_path / "out.pt2").module()
    torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-6)


def test_other_answers_are_found():
    """A program that is not the model's, in its values or its sizes, is refused."""
    torch.manual_seed(0)
    model, other = (MetaPromptModel(CASES["seg"]).eval() for _ in range(2))
    export.compare(model, model, 64)
    for program, message in ((other, "answers differ by"),
                             (lambda images: other(images)[:, :2], "answers \\(1, 2, 192, 128\\)")):
        with pytest.raises(InputError, match=message):
            export.compare(program, model, 64)


@pytest.mark.parametrize("run, out, message", [
    ("nowhere", "a.pt2", "RUN nowhere: neither it nor its best/"), ("best", "a.onnx", "in .pt2"),
    ("best", "there.pt2", "there.pt2 exists")])
def test_refusals(tmp_path, monkeypatch, capsys, run, out, message):
    """Exit code 2 and one line before any work; what is there stays."""
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path)
    (tmp_path / "there.pt2").write_text("mine")
    monkeypatch.setattr(export, "exported", None)
    code, stderr = refused(export.main, monkeypatch, capsys, run, out)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert (tmp_path / "there.pt2").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"best", "there.pt2"}
