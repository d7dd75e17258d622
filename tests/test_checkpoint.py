"""Checkpoints: complete at every instant, strict when read.

    pytest tests/test_checkpoint.py
"""
import json
import os
import shutil

import pytest
import torch
from helpers import recipe
from safetensors.torch import load_file, save_file

import train
from model import MetaPromptModel
from ops.errors import InputError
from weights import checkpoint
from weights.checkpoint import State


@pytest.fixture
def stepped(tmp_path):
    """(model, optimiser) after one step on random gradients."""
    model = train.build_model(recipe(tmp_path / "run"), ("a", "b", "c"))
    optimizer = adamw(model)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def light(stepped):
    """The same with the UNet frozen: no moments of its 700 tensors, which dozens of saves would
    write.
    """
    model, _ = stepped
    model.unet.requires_grad_(False)
    optimizer = adamw(model)
    optimizer.step()
    return model, optimizer


def adamw(model):
    """A fresh optimiser for a model."""
    return torch.optim.AdamW(model.param_groups(1e-3, 0.1, 0.01), fused=True)


def test_last_restores_model_and_optimiser(tmp_path, stepped):
    """Weights, moments and state come back bit for bit, under the parameters' names."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, State(1, 0.5, 1))
    folder, = checkpoint.find_last(tmp_path)
    assert checkpoint.read_state(folder) == State(1, 0.5, 1)
    loaded = MetaPromptModel.from_pretrained(folder).train()
    fresh = adamw(loaded)
    checkpoint.load_optimizer(folder, loaded, fresh, 1)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(a, b), name
        assert fresh.state[b].keys() == optimizer.state[a].keys()
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]), (name, key)


def test_loaded_tensors_have_memory_of_their_own(tmp_path, stepped):
    """After own_memory the files may go: nothing is mapped to them, all tensors are aligned."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, State(1))
    loaded = checkpoint.own_memory(MetaPromptModel.from_pretrained(tmp_path / "last"))
    shutil.rmtree(tmp_path / "last")
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())
    assert torch.equal(loaded.prompts, model.prompts)


# ------------------------------------------------------------------------------------------------
# Dying while saving

class Dead(BaseException):
    """The program is killed: nothing of it runs any more, not even what tidies up."""


def dying(monkeypatch, after):
    """Let the program die at file operation number `after`, from 0, and at each one thereafter."""
    count = iter(range(10 ** 6))

    def mortal(function):
        def call(*arguments, **options):
            if next(count) >= after:
                raise Dead
            return function(*arguments, **options)
        return call

    for name in ("fsync", "rename", "replace", "chmod"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", mortal(shutil.rmtree))


def saved_or_dead(monkeypatch, after, save):
    """Whether `save()` came to its end before file operation number `after`."""
    with monkeypatch.context() as patch:
        dying(patch, after)
        try:
            save()
            return True
        except Dead:
            return False


@pytest.mark.parametrize("saves", [1, 2])
def test_dying_at_any_file_operation_leaves_a_complete_checkpoint(tmp_path, light, monkeypatch,
                                                                  saves):
    """Killed anywhere in the next save, and again while that is put right: the newest is complete,
    of the old step or the new one, and the next save succeeds.
    """
    model, optimizer = light
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill loses no written byte
    for after in range(1000):
        run = tmp_path / str(after)
        for step in range(1, saves + 1):
            checkpoint.save_last(run, model, optimizer, State(step))
        finished = saved_or_dead(monkeypatch, after, lambda: checkpoint.save_last(
            run, model, optimizer, State(saves + 1)))
        saved_or_dead(monkeypatch, after % 3, lambda: checkpoint.find_last(run))
        newest = checkpoint.find_last(run)[0]
        assert checkpoint.read_state(newest).step in (saves, saves + 1)
        assert not finished or checkpoint.read_state(newest).step == saves + 1
        MetaPromptModel.from_pretrained(newest)
        checkpoint.save_last(run, model, optimizer, State(saves + 2))
        assert [checkpoint.read_state(f).step for f in checkpoint.find_last(run)][0] == saves + 2
        shutil.rmtree(run)
        if finished:
            break
    assert 8 < after < 100


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, stepped, monkeypatch):
    """What was written of the new one is removed, and the error is the disk's."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, State(1))
    checkpoint.save_best(tmp_path, model)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_last(tmp_path, model, optimizer, State(2))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_best(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["best", "last"]
    assert checkpoint.read_state(tmp_path / "last").step == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path, stepped):
    """The checkpoint before stays; the message names the tensor."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, State(1))
    model.prompts.data[0, 0, 0] = float("nan")
    for save in (lambda: checkpoint.save_last(tmp_path, model, optimizer, State(2)),
                 lambda: checkpoint.save_best(tmp_path, model)):
        with pytest.raises(FloatingPointError, match="prompts is no longer finite"):
            save()
    assert checkpoint.read_state(tmp_path / "last").step == 1


def test_saved_files_have_the_usual_permissions(tmp_path, stepped):
    """Readable for others as other new files are."""
    checkpoint.save_best(tmp_path, stepped[0], "card", {"seed": 3})
    (tmp_path / "other").write_text("")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "other",
                                                      *(tmp_path / "best").iterdir())}
    assert len(modes) == 1
    assert (tmp_path / "best" / "README.md").read_text() == "card"
    assert json.loads((tmp_path / "best" / "recipe.json").read_text()) == {"seed": 3}


# ------------------------------------------------------------------------------------------------
# Broken checkpoints

@pytest.mark.parametrize("change, message", [
    ({"foo:exp_avg": torch.zeros(1)}, "has the unknown foo:exp_avg"),
    ({"prompts:exp_avg": None}, "lacks prompts:exp_avg"),
    ({"prompts:exp_avg": torch.zeros(1, 2, 3)}, r"prompts:exp_avg is .* of shape \(1, 2, 3\)"),
    ({"prompts:exp_avg": torch.zeros(1, 4, 16).double()}, "prompts:exp_avg is torch.float64"),
    ({"prompts:exp_avg": torch.full((1, 4, 16), float("nan"))}, "a value that no optimiser has"),
    ({"prompts:exp_avg_sq": torch.full((1, 4, 16), -1.0)}, "a value that no optimiser has"),
    ({"prompts:step": torch.tensor(2.0)}, "prompts:step holds .* after step 1")])
def test_moments_of_another_model_are_refused_by_name(tmp_path, stepped, change, message):
    """Foreign, missing, misshapen, of another type, impossible: the file and the moment."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, State(1))
    path = tmp_path / "last" / "optimizer.safetensors"
    moments = {**load_file(path), **change}
    save_file({name: value for name, value in moments.items() if value is not None}, path)
    with pytest.raises(InputError, match=f"optimizer.safetensors.*{message}"):
        checkpoint.load_optimizer(tmp_path / "last", model, adamw(model), 1)


@pytest.mark.parametrize("values", [{"step": 0}, {"step": 3, "evaluated": 4}, {"step": 2.5},
                                    {"best": "high"}, {"more": 1}])
def test_impossible_states_are_refused(tmp_path, values):
    """state.json says something that no run has written."""
    (tmp_path / "state.json").write_text(
        json.dumps({"step": 3, "best": None, "evaluated": 0, **values}))
    with pytest.raises(InputError, match="state.json"):
        checkpoint.read_state(tmp_path)


def test_torn_folders_are_no_checkpoint(tmp_path, stepped):
    """Truncated weights are named; a folder that lacks a file is not taken for complete."""
    checkpoint.save_last(tmp_path, *stepped, State(1))
    os.truncate(tmp_path / "last" / "model.safetensors", 5000)
    with pytest.raises(InputError, match="model.safetensors is not a complete .safetensors"):
        MetaPromptModel.from_pretrained(tmp_path / "last")
    (tmp_path / "last" / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find_last(tmp_path)


# ------------------------------------------------------------------------------------------------
# What an adversary found

def test_two_kills_between_the_renames_lose_nothing(tmp_path, light, monkeypatch):
    """The first when last/ is gone, the second anywhere in the save after: at no moment is the
    newest checkpoint older than the last one that was saved.
    """
    model, optimizer = light
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for after in range(1000):
        run = tmp_path / str(after)
        checkpoint.save_last(run, model, optimizer, State(1))
        checkpoint.save_last(run, model, optimizer, State(2))
        os.rename(run / "last", run / "last.tmp")        # killed between the two renames
        finished = saved_or_dead(monkeypatch, after, lambda: checkpoint.save_last(
            run, model, optimizer, State(3)))
        assert checkpoint.read_state(checkpoint.find_last(run)[0]).step in (2, 3)
        shutil.rmtree(run)
        if finished:
            break
    assert 8 < after < 100


def test_a_text_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    """Killed at any operation of a rewrite, recipe.json is complete."""
    path = tmp_path / "recipe.json"
    for after in range(10):
        checkpoint.write_text(path, "old")
        finished = saved_or_dead(monkeypatch, after, lambda: checkpoint.write_text(path, "new"))
        assert path.read_text() == "new" if finished else path.read_text() in ("old", "new")
        if finished:
            break
    assert after > 1


def test_a_moment_without_dimensions_is_refused(tmp_path, stepped):
    """Fused AdamW would read past its end: the interpreter crashed."""
    checkpoint.save_last(tmp_path, *stepped, State(1))
    path = tmp_path / "last" / "optimizer.safetensors"
    save_file({**load_file(path), "prompts:exp_avg": torch.zeros(())}, path)
    with pytest.raises(InputError, match=r"prompts:exp_avg is .* of shape \(\)"):
        checkpoint.load_optimizer(tmp_path / "last", stepped[0], adamw(stepped[0]), 1)


def test_a_best_folder_caught_between_its_renames_comes_back(tmp_path, stepped):
    """best/ is gone, best.tmp/ and best.previous/ are there: the next save finishes it first."""
    checkpoint.save_best(tmp_path, stepped[0], "first")
    os.rename(tmp_path / "best", tmp_path / "best.previous")
    checkpoint.recover(tmp_path / "best", checkpoint.BEST)
    assert (tmp_path / "best" / "README.md").read_text() == "first"
    shutil.copytree(tmp_path / "best", tmp_path / "best.tmp")
    (tmp_path / "best.tmp" / "README.md").write_text("second")
    shutil.rmtree(tmp_path / "best")
    checkpoint.recover(tmp_path / "best", checkpoint.BEST)
    assert (tmp_path / "best" / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["best"]


def test_a_checkpoint_may_lie_on_another_disk_by_link(tmp_path, stepped):
    """last/ is a link: it is replaced, what it pointed to stays."""
    run, other = tmp_path / "r", tmp_path / "other"
    checkpoint.save_last(run, *stepped, State(1))
    os.rename(run / "last", other)
    (run / "last").symlink_to(other)
    for step in (2, 3, 4):
        checkpoint.save_last(run, *stepped, State(step))
    assert [checkpoint.read_state(f).step for f in checkpoint.find_last(run)] == [4, 3]
    assert checkpoint.read_state(other).step == 1
