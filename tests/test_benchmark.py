"""The benchmark's peer is the same model, its table runs, and noise is not told as a ratio.

    pytest tests/test_benchmark.py
"""
import benchmark
import benchmark_growth
import pytest
import torch
from benchmark_measure import compare, spread
from composition import composed, lovasz_by_class, our_model, random_batch, sized_recipe
from heads import IGNORE, lovasz_softmax
from helpers import read_png
from oracles import ROUNDING, randomise, relative_error

CPU = torch.device("cpu")


def sides(task, passes):
    """(recipe, ours, peer) of tiny width and random weights, norms too."""
    args = benchmark.parse(["--width", "tiny", "--size", "8", "--batch", "2"])
    recipe = sized_recipe(args, task, passes, training=True)
    ours = randomise(our_model(recipe, CPU))
    return recipe, ours, composed(ours)


def gradients(model, ours, batch):
    """({name: loss}, {name of ours: gradient}) of a batch on either side."""
    ours.zero_grad(set_to_none=True)
    losses = model(batch["image"], batch["target"])
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task,passes", [("seg", 3), ("depth", 2), ("pose", 1),
                                         ("vpd", 1)])
def test_the_composed_peer_is_the_same_model(task, passes):
    """Predictions, losses and the gradient of every parameter (< 1e-7), in float64.

    In float32 the gradients differ by percents: sorting, ReLU and norms of few values decide on the
    last bits.  A BatchNorm of two values also magnifies what float64 rounds.
    """
    recipe, ours, peer = sides(task, passes)
    batch = random_batch(recipe, CPU)
    ours.double(), peer.double()
    batch["image"] = batch["image"].double()
    with torch.inference_mode():
        assert relative_error(ours(batch["image"]), peer(batch["image"])) < ROUNDING
    (losses, mine), (expected, theirs) = (gradients(m, ours, batch) for m in (ours, peer))
    assert all(torch.isclose(losses[n], expected[n], rtol=ROUNDING) for n in expected)
    assert mine.keys() == theirs.keys()
    # Some are zero but for rounding, as in test_unet.py.
    typical = torch.stack([g.abs().max() for g in theirs.values()]).median()
    for name, gradient in theirs.items():
        scale = max(gradient.abs().max(), 0.1 * typical)
        assert (mine[name] - gradient).abs().max() / scale < 1e-7, name


def test_weights_exist_once():
    """The peer trains the very Parameters that ours trains, and freezes those that it freezes."""
    _, ours, peer = sides("depth", 1)
    trained = {id(p) for p in ours.parameters() if p.requires_grad}
    assert {id(p) for p in peer.parameters() if p.requires_grad} == trained
    assert {id(p) for p in peer.parameters()} <= {id(p) for p in ours.parameters()}


def test_the_loop_over_classes_is_the_same_loss():
    """Value and gradient, with ignored pixels and absent classes."""
    logits = torch.randn(2, 7, 12, 12, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 4, (2, 12, 12))
    target[:, :3] = IGNORE
    values = [function(logits, target) for function in (lovasz_softmax, lovasz_by_class)]
    mine, theirs = (torch.autograd.grad(value, logits)[0] for value in values)
    assert torch.isclose(*values, rtol=ROUNDING) and relative_error(mine, theirs) < ROUNDING


def test_the_table_has_a_row_per_case():
    """A prediction and a step are measured and counted; a row has as many cells as the header."""
    args = benchmark.parse(["--items", "pose", "train-pose", "--width", "tiny", "--size", "8",
                            "--rounds", "1", "--T", "1", "--mode", "eager", "--dtype", "float32",
                            "--batch", "1"])
    rows = list(benchmark.measured(args, CPU))
    assert [row["case"] for row in rows] == ["pose T=1 inference", "pose T=1 training"]
    for row in rows:
        assert row["error"] < 1e-4 and row["ours_s"] > 0 and row["ours_gflop"] > 0
        assert row["ours_first_s"] > 0 and row["ratio"] == "too few rounds"
        assert abs(row["ours_gflop"] / row["peer_gflop"] - 1) < 0.1
        assert benchmark.line(row).count("|") == benchmark.HEADER.count("|")


@pytest.mark.parametrize("ours,peer,told", [
    ([0.8, 0.8, 0.8, 0.8], [1.0, 1.0, 1.0, 1.1], 0.8),
    ([0.97, 0.98, 0.97, 0.98], [0.9, 1.0, 1.0, 1.1], "within noise"),
    ([0.5, 0.8, 1.5, 0.8], [1.0, 1.0, 1.0, 1.0], "within noise"),
    ([0.5, 0.5], [1.0, 1.0], "too few rounds")])
def test_a_difference_below_the_noise_is_no_ratio(ours, peer, told):
    """It must exceed the spread of either side; two rounds show no spread."""
    found = compare({"ours": ours, "peer": peer})["ratio"]
    assert found == told if isinstance(told, str) else abs(found - told) < 1e-12


def test_spread():
    """A quarter of the times lies below, a quarter above the two whose distance it is."""
    assert abs(spread([1.0, 2.0, 3.0, 4.0, 5.0]) - 2 / 3) < 1e-12
    assert spread([2.0, 2.0, 2.0]) == 0 and spread([1.0, 9.0]) is None


def test_activations_are_what_a_call_makes():
    """Bytes at the peak, freed ones not, weights not even where a view of them is taken."""
    layer = torch.nn.Linear(1000, 1000, bias=False)

    def call():
        for _ in range(3):
            layer(torch.zeros(1000, 1000))               # two of 4 MB at once

    with torch.no_grad():
        assert abs(benchmark_growth.activations(layer, call, CPU) - 8e-3) < 1e-4


def test_growth_is_drawn(tmp_path):
    """A setting is measured, T passes of the UNet take longer than one; the picture has its size.
    """
    args = benchmark.parse(["--items", "growth", "--small", "--picture", str(tmp_path / "g.png")])
    args.rounds = 1
    row = benchmark_growth.point(args, CPU, 2, 5, 64)
    assert 0 < row["unet_gb"] <= row["gb"] and row["unet_s"] > 0
    rows = [{"axis": axis, "T": T, "N": N, "pixels": side, **row}
            for axis, T, N, side in benchmark_growth.settings(512)]
    benchmark_growth.draw_growth(args.picture, rows, "a machine")
    height = 2 * benchmark_growth.HEIGHT + 18
    assert read_png(args.picture).shape == (height, 3 * benchmark_growth.WIDTH, 3)
