"""The folder of a run is held by one process; its log survives whatever stopped the run.

    pytest tests/test_runs.py
"""
import json
import os

import pytest

from ops.errors import InputError
from weights.checkpoint import find_last
from weights.runs import Log, RunFolder, read_log


def test_a_run_is_held_by_one_process(tmp_path):
    """A second one is told, until the first is done; then it may."""
    with RunFolder(tmp_path / "r", False):
        (tmp_path / "r" / "recipe.json").write_text("{}")
        with pytest.raises(InputError, match="r is in use by another process"):
            with RunFolder(tmp_path / "r", False):
                pass
    with RunFolder(tmp_path / "r", False):
        pass


@pytest.mark.parametrize("name", ["last", "last.previous", "best"])
def test_no_run_is_overwritten(tmp_path, name):
    """A folder that holds a checkpoint is refused, with how to go on; resumed, it is taken."""
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"holds a run already: --resume {tmp_path}"):
        with RunFolder(tmp_path, False):
            pass
    with RunFolder(tmp_path, True):
        pass


def test_a_start_that_failed_leaves_nothing(tmp_path):
    """The folder is removed if nothing was written into it, and kept if something was."""
    for kept in (False, True):
        with pytest.raises(ZeroDivisionError):
            with RunFolder(tmp_path / "r", False):
                if kept:
                    (tmp_path / "r" / "recipe.json").write_text("{}")
                raise ZeroDivisionError
        assert (tmp_path / "r").exists() == kept


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """A file in its place, or in the place of its parent."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "r"):
        with pytest.raises(InputError, match=f"--out {path} can't be written"):
            with RunFolder(path, False):
                pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.json", "recipe.json.tmp", "pictures",
                                  "best", "last.tmp", "last.previous"])
def test_what_is_in_the_way_is_named_at_the_start(tmp_path, name):
    """A folder where a file will be written, a file where a folder will be."""
    (tmp_path / name).touch() if "json" not in name else (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is in the way"):
        with RunFolder(tmp_path, True):
            pass


def test_the_log_goes_on_at_the_checkpoint(tmp_path, capsys):
    """Records after its step are dropped, and so is a line that was torn; new ones follow."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3)]
    path.write_bytes("\n".join([*lines, '{"step": 2, "lo']).encode() + b"\n\xff\xfe\n[3]\n")
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    assert f"left out   3 lines of {path} that are no records" in capsys.readouterr().out
    log = Log(path, 2)
    log.write({"step": 3, "loss": 0.25})
    assert path.read_text() == "\n".join([*lines[:2], '{"step": 3, "loss": 0.25}']) + "\n"
    assert read_log(tmp_path / "none") == [] and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_log_of_a_power_loss_goes_on(tmp_path):
    """NULs at the end, a torn line, a blank one: it is only a log."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"st\n{"step": 2}\n' + bytes(512))
    Log(path, 2).write({"step": 3})
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]


def test_a_run_without_a_save_starts_again(tmp_path):
    """Killed before its first save: --resume says what to do, and the same command does it."""
    with RunFolder(tmp_path / "r", False):
        (tmp_path / "r" / "recipe.json").write_text("{}")
        (tmp_path / "r" / "last.tmp").mkdir()
    with pytest.raises(InputError, match="without --resume starts again"):
        find_last(tmp_path / "r")
    with RunFolder(tmp_path / "r", False):
        pass


def test_a_first_checkpoint_that_was_not_renamed_is_one(tmp_path):
    """A complete last.tmp is all that a kill may leave of a run: no new run may start over it."""
    (tmp_path / "r" / "last.tmp").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "optimizer.safetensors"):
        (tmp_path / "r" / "last.tmp" / name).touch()
    with RunFolder(tmp_path / "r", False):               # torn: it may
        pass
    (tmp_path / "r" / "last.tmp" / "state.json").touch()
    with pytest.raises(InputError, match="holds a run already"):
        with RunFolder(tmp_path / "r", False):
            pass


def test_a_pretraining_run_is_not_trained_into(tmp_path):
    """Its metrics.jsonl would be lost."""
    (tmp_path / "settings.json").touch()
    with pytest.raises(InputError, match="holds a run of tools.pretrain"):
        with RunFolder(tmp_path, False):
            pass
