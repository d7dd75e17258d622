"""Our model is the authors' model: their outputs, losses, gradients and optimiser at tiny width.

    pytest tests/test_official.py

The reduced golden case of tests/golden always runs; the whole fixtures, which are too large to
ship, run where ../shared/fixtures exists.
"""
import json
from pathlib import Path

import pytest
import torch
from official_fixture import seg_model
from oracles import relative_error
from safetensors.torch import load_file

import eval as evaluation
import official

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/fixtures")


@pytest.fixture(scope="module")
def reduced():
    """(config json, tensors) of the reduced case: one image, subsampled outputs."""
    return (json.loads((GOLDEN / "official_seg.json").read_text()),
            load_file(GOLDEN / "official_seg.safetensors"))


@pytest.fixture(scope="module")
def full():
    """(config json, tensors) of the whole fixture."""
    return (json.loads((FIXTURES / "seg_tiny.json").read_text()),
            load_file(FIXTURES / "seg_tiny.safetensors"))


def maps_and_logits(model, images):
    """(rearranged maps, logits) of one forward pass."""
    captured = []
    handle = model.head.register_forward_pre_hook(lambda m, args: captured.append(args[0]))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return captured[0], logits


def test_reduced_case_gives_the_authors_numbers(reduced):
    """Latents, four rearranged maps and logits of the authors' code, subsampled (< 1e-4)."""
    info, tensors = reduced
    model = seg_model(info["state"], info["seed"]).eval()
    images = tensors["image"]
    with torch.no_grad():
        assert relative_error(model.encode(images), tensors["latents"]) < 1e-4
    maps, logits = maps_and_logits(model, images)
    for i in range(4):
        assert relative_error(maps[i].flatten()[::info["stride"]], tensors[f"rearranged{i}"]) < 1e-4
    assert relative_error(logits.flatten()[::info["logits_stride"]], tensors["logits"]) < 1e-4


@needs_fixtures
def test_outputs_equal_the_authors(full):
    """Whole fixture: latents, maps and logits (largest relative error < 1e-4, printed)."""
    info, tensors = full
    model = seg_model(info["state"], info["seed"]).eval()
    images = (tensors["image"] + 1) / 2
    with torch.no_grad():
        errors = {"latents": relative_error(model.encode(images), tensors["latents"])}
    maps, logits = maps_and_logits(model, images)
    for i in range(4):
        errors[f"rearranged{i}"] = relative_error(maps[i], tensors[f"rearranged{i}"])
    errors["logits"] = relative_error(logits, tensors["logits"])
    print("\n" + "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    assert max(errors.values()) < 1e-4


@needs_fixtures
def test_sliding_window_equals_the_authors(full):
    """Probabilities after the authors' sliding window (128, stride 85) on a 160x224 image."""
    info, tensors = full
    model = seg_model(info["state"], info["seed"]).eval()
    protocol = evaluation.Protocol(None, info["slide"]["crop"][0], info["slide"]["stride"][0])
    images = (tensors["slide_image"] + 1) / 2
    probs = evaluation.predict_seg(model, images, images.shape[-2:], protocol, torch.float32)
    error = relative_error(probs, tensors["slide_prob"])
    print(f"\nslide {error:.1e}")
    assert error < 1e-4


@needs_fixtures
def test_losses_and_gradients_equal_the_authors(full):
    """The three training losses (< 1e-5) and the gradient norm of each of 743 tensors.

    Norms that are zero but for rounding (a bias in front of a norm that removes it) are compared on
    the scale of 1e-3; the 1x1-pooled branch, a BatchNorm over two values, to 2 %.
    """
    info, tensors = full
    model = seg_model(info["state"], info["seed"]).train()
    losses = model.loss((tensors["image"] + 1) / 2, tensors["gt"][:, 0].long())
    for ours, theirs in (("ce", "decode.loss_ce"), ("lovasz", "decode.loss_lovasz"),
                         ("aux", "aux.loss_ce_aux")):
        assert abs(losses[ours].item() / info["losses"][theirs] - 1) < 1e-5
    sum(losses.values()).backward()
    named, worst = dict(model.named_parameters()), ("", 0.0)
    for name, expected in info["grad_norms"].items():
        target, _, row = official.our_name(name).partition(" ")
        grad = named[target].grad
        norm = (grad[int(row)] if row else grad).norm().item()
        error = abs(norm - expected) / max(expected, 1e-3)
        assert error < (0.02 if "psp_modules.0" in name else 2e-3), (name, norm, expected)
        if "psp_modules.0" not in name:
            worst = max(worst, (name, error), key=lambda pair: pair[1])
    print(f"\nlargest gradient-norm error {worst[1]:.1e} at {worst[0]}")
    for name in info["no_grad"]:
        target = official.our_name(name)
        assert target is None or named[target].grad is None, name


@needs_fixtures
def test_optimiser_groups_equal_the_authors(full):
    """Learning rate and weight decay of every tensor as the authors' constructor assigns them."""
    info, _ = full
    model = seg_model(info["state"], info["seed"])
    groups = {}
    for group in model.param_groups(lr=8e-5, unet_lr_mult=0.1, weight_decay=1e-3):
        groups.update({id(p): (group["lr"], group["weight_decay"]) for p in group["params"]})
    named = dict(model.named_parameters())
    for name, (lr, decay, _) in info["optimizer"].items():
        target = official.our_name(name)
        if target is None:
            continue
        parameter = named[target.split()[0]]
        if lr == 0 or "time_embed" in name:  # neither ever changes there; both are frozen here
            assert not parameter.requires_grad, name
        else:
            assert groups[id(parameter)] == pytest.approx((lr, decay)), name
