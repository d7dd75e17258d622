"""The benchmark's peer is the same model, and its table runs.

    pytest tests/test_benchmark.py
"""
import benchmark
import pytest
import torch
from composition import composed, lovasz_by_class, our_model, random_batch, sized_recipe
from heads import IGNORE, lovasz_softmax
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


@pytest.mark.parametrize("task,passes", [("seg", 3), ("depth", 2), ("pose", 1)])
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
    """A step is measured and counted; the row has a value or a dash in every column."""
    args = benchmark.parse(["--steps", "--width", "tiny", "--size", "8", "--rounds", "1", "--T",
                            "1", "--task", "pose", "--dtype", "float32", "--batch", "1"])
    rows = list(benchmark.measured(args, CPU))
    assert [row["case"] for row in rows] == ["pose T=1 inference", "pose T=1 training"]
    for row in rows:
        assert row["error"] < 1e-4 and row["ours_s"] > 0 and row["ours_gflop"] > 0
        assert abs(row["ours_gflop"] / row["peer_gflop"] - 1) < 0.1
        assert len(benchmark.line(row)) == len(benchmark.line({n: n for n in benchmark.COLUMNS}))
