"""torch.hub.load: a model in three lines from any folder, or a clear word why not; no installation.

    pytest tests/test_hubconf.py
"""
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from documents import ROOT
from helpers import command, noise, read_png, save_image, write_run

import eval as evaluation
import hubconf
from model import MetaPromptModel
from ops.errors import InputError

SCRIPT = """
import json, sys
import torch
model = torch.hub.load({root!r}, "metaprompts", {run!r}, source="local", device="cpu",
                       precision="float32")
model.predict("photo.jpg").tofile("labels.bin")
names = {{name.split(".")[0] for name, module in sys.modules.items()
          if {root!r} in (getattr(module, "__file__", None) or "")
          and "site-packages" not in module.__file__}}   # of a virtual environment in our folder
print(json.dumps([sorted(names), {root!r} in sys.path]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder."""
    return write_run("seg", tmp_path_factory.mktemp("hub") / "run")


def test_a_script_elsewhere_gets_the_file_of_eval(run, tmp_path, monkeypatch):
    """Three lines in another folder, which has a model.py and a data folder of its own: the labels
    are eval.py's to the byte; nothing but the named modules is left behind.
    """
    save_image(tmp_path / "photo.jpg", noise(90, 120))
    (tmp_path / "model.py").write_text("raise SystemExit('not mine')")
    (tmp_path / "data").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), run=str(run)))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [sorted(hubconf.NAMES), False]
    command(evaluation.main, monkeypatch, "--checkpoint", run, "--image", tmp_path / "photo.jpg",
            "--out", tmp_path / "o", "--device", "cpu", "--precision", "float32")
    wanted = read_png(tmp_path / "o" / "photo_labels.png")
    assert (tmp_path / "labels.bin").read_bytes() == wanted.tobytes()
    assert len(np.unique(wanted)) > 1


def load(run):
    """torch.hub.load in this process."""
    return torch.hub.load(str(ROOT), "metaprompts", str(run), source="local", device="cpu")


def test_the_entry_point_refuses_what_the_commands_refuse(run, tmp_path):
    """A strange folder is an InputError; a run is its model, in evaluation mode."""
    with pytest.raises(InputError, match="neither it nor its best/"):
        load(tmp_path)
    model = load(run).model
    assert isinstance(model, MetaPromptModel) and not model.training


@pytest.mark.parametrize("name", ["data", "model", "weights", "ops.device"])
def test_a_process_with_modules_of_these_names_is_refused(run, tmp_path, monkeypatch, name):
    """Already imported: the message names the module and its file."""
    (tmp_path / "theirs.py").touch()
    place = importlib.util.spec_from_file_location(name, tmp_path / "theirs.py")
    monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(place))
    with pytest.raises(ImportError, match=f"the module {name} of this process is .*theirs.py"):
        load(run)


def test_a_package_that_python_would_find_first_is_refused(run, tmp_path, monkeypatch):
    """Not imported yet, but a package with an __init__.py goes before our folder of that name."""
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ops")
    with pytest.raises(ImportError, match=f"the module ops of this process is .*{tmp_path}"):
        load(run)


@pytest.mark.slow
def test_an_installation_is_refused_in_a_line(tmp_path):
    """pip says what pyproject.toml says: what to use instead."""
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode and "Not meant to be installed: use its folder" in done.stderr
