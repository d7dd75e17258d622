"""Checkpoints: complete or absent, never half; strict when read.

    pytest tests/test_checkpoint.py
"""
import os
import shutil

import pytest
import torch
from helpers import recipe
from safetensors.torch import load_file, save_file

import train
from model import MetaPromptModel
from ops.errors import InputError
from tasks.recipes import RECIPES, to_dict
from weights import checkpoint


@pytest.fixture
def stepped(tmp_path):
    """(model, optimiser) after one step on random gradients."""
    model = train.build_model(recipe(tmp_path / "run"), ("a", "b", "c"))
    optimizer = torch.optim.AdamW(model.param_groups(1e-3, 0.1, 0.01), fused=True)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def test_last_restores_model_and_optimiser(tmp_path, stepped):
    """Weights and moments come back bit for bit, under the parameters' names."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, {"step": 1, "best": 0.5})
    loaded = MetaPromptModel.from_pretrained(checkpoint.find_last(tmp_path)).train()
    fresh = torch.optim.AdamW(loaded.param_groups(1e-3, 0.1, 0.01), fused=True)
    checkpoint.load_optimizer(tmp_path / "last", loaded, fresh)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(a, b), name
        assert fresh.state[b].keys() == optimizer.state[a].keys()
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]), (name, key)


def test_loaded_tensors_have_memory_of_their_own(tmp_path, stepped):
    """After own_memory the files may go: nothing is mapped to them, all tensors are aligned."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, {"step": 1})
    loaded = checkpoint.own_memory(MetaPromptModel.from_pretrained(tmp_path / "last"))
    shutil.rmtree(tmp_path / "last")
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())
    assert torch.equal(loaded.prompts, model.prompts)


@pytest.mark.parametrize("dies_at", ["fsync", "rename 1", "rename 2"])
def test_dying_while_saving_leaves_a_complete_checkpoint(tmp_path, stepped, monkeypatch, dies_at):
    """Interrupted at the flush or between the renames, find_last still finds step 1."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, {"step": 1})
    calls, rename = [], os.rename

    def dying_rename(old, new):
        calls.append(old)
        if len(calls) == int(dies_at[-1]):
            raise KeyboardInterrupt
        rename(old, new)

    def dying_fsync(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if dies_at == "fsync":
            patch.setattr(os, "fsync", dying_fsync)
        else:
            patch.setattr(os, "rename", dying_rename)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_last(tmp_path, model, optimizer, {"step": 2})
    folder = checkpoint.find_last(tmp_path)
    assert '"step": 1' in (folder / "state.json").read_text()
    MetaPromptModel.from_pretrained(folder)
    checkpoint.save_last(tmp_path, model, optimizer, {"step": 3})
    assert '"step": 3' in (checkpoint.find_last(tmp_path) / "state.json").read_text()


def test_broken_checkpoints_are_refused_by_name(tmp_path, stepped):
    """Truncated weights, foreign or misshapen moments and a folder without a run are named."""
    model, optimizer = stepped
    checkpoint.save_last(tmp_path, model, optimizer, {"step": 1})
    path = tmp_path / "last" / "optimizer.safetensors"
    moments = load_file(path)
    save_file({**moments, "foo:exp_avg": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="optimizer.safetensors has moments of foo"):
        checkpoint.load_optimizer(tmp_path / "last", model, optimizer)
    save_file({"prompts:exp_avg": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(InputError, match=r"prompts:exp_avg has shape \(1, 2, 3\)"):
        checkpoint.load_optimizer(tmp_path / "last", model, optimizer)
    os.truncate(tmp_path / "last" / "model.safetensors", 5000)
    with pytest.raises(InputError, match="model.safetensors is not a complete .safetensors"):
        MetaPromptModel.from_pretrained(tmp_path / "last")
    with pytest.raises(InputError, match="is it a run folder"):
        checkpoint.find_last(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------
# The model card

@pytest.mark.parametrize("changes, licence", [
    ({"backbone": "tiny"}, "mit"), ({"init": "random"}, "mit"), ({}, "creativeml-openrail-m"),
    ({"backbone": "."}, "creativeml-openrail-m")])
def test_the_card_has_the_licence_of_its_weights_and_no_path(changes, licence):
    """Stable Diffusion's licence passes on; folders of the machine stay at home; scalars only."""
    recipe = {**to_dict(RECIPES["seg", "ade20k"]), "out": "/home/me/run",
              "init_from": "/home/me/first", "prompts": "/home/me/p", **changes}
    recipe["files"]["data"] = "/home/me/ade"
    card = checkpoint.model_card(recipe, {"mIoU": 0.5, "IoU": [0.25]}, 7)
    assert f"license: {licence}\n" in card and "after step 7: mIoU 0.5000\n" in card
    assert "/home" not in card and "0.25" not in card and '"num_prompts": 150' in card
    assert ('"backbone": "a local copy"' in card) == (changes.get("backbone") == ".")
