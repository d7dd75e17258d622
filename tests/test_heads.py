"""The segmentation heads and losses are mmsegmentation's: figures, names, shapes, gradients.

Proven here: cross-entropy and Lovasz-softmax against figures that mmsegmentation printed
(tests/golden/seg.json) and against a plain loop over the classes; the edge cases of both; parameter
names, shapes, counts and initial values at full width; UPerHead against a second, functional
computation; what the auxiliary head reads and weighs.

    python -m pytest tests/test_heads.py
"""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import ROUNDING, relative_error
from torch import nn

import heads
from ops import udp
from heads import IGNORE, ConvBNReLU, FCNHead, PyramidNeck, SegHead, UPerHead

GOLDEN = json.loads((Path(__file__).parent / "golden" / "seg.json").read_text())["losses"]


def golden_inputs():
    """The logits (by formula, rounded to float32) and labels that the golden losses belong to."""
    i = torch.arange(96, dtype=torch.float64)
    logits = (2 * torch.sin(1.7 * i) + torch.cos(0.31 * i)).float().double().reshape(2, 4, 3, 4)
    return logits.requires_grad_(), torch.tensor(GOLDEN["labels"])


def maps(c_in, sizes, B=2, seed=0):
    """Four random maps of the given sizes that want gradients, in float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, c_in, *size, generator=g).double().requires_grad_() for size in sizes]


def perturbed(module, seed=0):
    """`module` in evaluation mode and float64, random weights, biases and running statistics."""
    g = torch.Generator().manual_seed(seed)
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=g) + 0.5 if name.endswith("running_var")
                    else 0.3 * torch.randn(t.shape, generator=g))
    return module.double().eval()


# ------------------------------------------------------------------------------------------------
# Losses

def test_golden_lovasz():
    """The Lovasz-softmax loss and its gradient are mmsegmentation's."""
    logits, labels = golden_inputs()
    loss = heads.lovasz_softmax(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["lovasz"], abs=1e-6)
    assert logits.grad.abs().sum().item() == pytest.approx(GOLDEN["lovasz_grad_abs_sum"], abs=1e-6)
    assert logits.grad.flatten()[:8].tolist() == pytest.approx(GOLDEN["lovasz_grad_first8"],
                                                               abs=1e-6)


def test_golden_cross_entropy():
    """The cross-entropy and its gradient are mmsegmentation's."""
    logits, labels = golden_inputs()
    loss = heads.cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["ce_mean_over_all_pixels"], abs=1e-6)
    assert logits.grad.abs().sum().item() == pytest.approx(GOLDEN["ce_grad_abs_sum"], abs=1e-6)


def test_cross_entropy_counts_ignored_pixels():
    """The denominator is every pixel: the mean over valid ones is larger by total / valid."""
    logits, labels = golden_inputs()
    valid_only = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    assert valid_only.item() == pytest.approx(GOLDEN["ce_mean_over_valid_only"], abs=1e-6)
    share = (labels != IGNORE).double().mean()
    assert 0 < share < 1
    torch.testing.assert_close(heads.cross_entropy(logits, labels), valid_only * share)


def naive_lovasz(logits, labels):
    """Lovasz-softmax as the paper's algorithm 1 tells it: valid pixels, one class at a time."""
    probs = logits.softmax(dim=1).movedim(1, -1)[labels != IGNORE]         # (valid, C)
    labels = labels[labels != IGNORE]
    losses = []
    for c in labels.unique():
        truth = (labels == c).to(probs.dtype)
        errors, order = (truth - probs[:, c]).abs().sort(descending=True)
        truth, jaccard, loss = truth[order], 0.0, 0.0
        for k in range(len(truth)):
            missed = truth[:k + 1].sum()                                   # of the k + 1 worst
            grown = 1 - (truth.sum() - missed) / (truth.sum() + (1 - truth[:k + 1]).sum())
            loss, jaccard = loss + errors[k] * (grown - jaccard), grown
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(4))
def test_lovasz_equals_naive_loop(seed):
    """Batched over classes = a loop over classes: values and gradients, in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(2, 6, 5, 7, generator=g)).double().requires_grad_()
    labels = torch.randint(0, 4, (2, 5, 7), generator=g)                   # 4 and 5 are absent
    labels[torch.rand(labels.shape, generator=g) < 0.3] = IGNORE
    exact = logits.detach().clone().requires_grad_()
    ours, naive = heads.lovasz_softmax(logits, labels), naive_lovasz(exact, labels)
    ours.backward()
    naive.backward()
    assert ours.item() == pytest.approx(naive.item(), abs=ROUNDING)
    assert relative_error(logits.grad, exact.grad) < ROUNDING


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    """Of certain predictions it is the mean of 1 - IoU over the classes that are present."""
    g = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(0, 3, (2, 2, 6, 6), generator=g)
    predicted[0, 0, 0] = 3                                     # absent in the truth: does not count
    loss = heads.lovasz_softmax(200.0 * F.one_hot(predicted, 5).movedim(-1, 1), labels)
    ious = [((labels == c) & (predicted == c)).sum() / ((labels == c) | (predicted == c)).sum()
            for c in range(3)]
    assert loss.item() == pytest.approx(1 - (sum(ious) / 3).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [heads.lovasz_softmax, heads.cross_entropy])
def test_no_valid_pixel(loss):
    """Without a valid pixel both losses are 0, still in the graph, with a gradient of 0."""
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((1, 4, 4), IGNORE))
    value.backward()
    assert value.item() == 0
    assert logits.grad.eq(0).all()


def test_one_valid_pixel():
    """With a single valid pixel of class y the Lovasz loss is 1 - p_y."""
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.full((1, 4, 4), IGNORE)
    labels[0, 2, 1] = 2
    expected = 1 - logits.softmax(dim=1)[0, 2, 2, 1]
    torch.testing.assert_close(heads.lovasz_softmax(logits, labels), expected)


@pytest.mark.parametrize("loss", [heads.lovasz_softmax, heads.cross_entropy])
def test_perfect_prediction(loss):
    """A certain and right prediction costs nothing, a certain and wrong one a lot."""
    labels = torch.arange(16).reshape(1, 4, 4) % 3
    logits = 50.0 * F.one_hot(labels, 3).movedim(-1, 1)
    assert loss(logits, labels).item() < 1e-6
    assert loss(-logits, labels).item() > 0.7


@pytest.mark.parametrize("loss", [heads.lovasz_softmax, heads.cross_entropy])
def test_ignored_pixels_get_no_gradient(loss):
    """Gradients reach every valid pixel and no ignored one, and the value ignores their logits."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 6, generator=g, requires_grad=True)
    labels = torch.randint(0, 3, (2, 6, 6), generator=g)
    ignored = torch.rand(labels.shape, generator=g) < 0.4
    labels[ignored] = IGNORE
    value = loss(logits, labels)
    value.backward()
    reached = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(reached, ~ignored)
    other = logits.detach() + 5 * torch.randn(logits.shape, generator=g) * ignored[:, None]
    assert loss(other, labels).item() == pytest.approx(value.item(), abs=1e-6)


def test_losses_take_half_precision_logits():
    """bfloat16 logits are raised to float32 before the sums: only their rounding remains."""
    logits, labels = golden_inputs()
    rounded = logits.detach().bfloat16()
    low, high = (heads.lovasz_softmax(x, labels) for x in (rounded, rounded.float()))
    assert low.dtype == torch.float32
    assert torch.equal(low, high)


# ------------------------------------------------------------------------------------------------
# Names, shapes, initial values

def block(name, c_in, kernel, c=512):
    """State of one convolution + BatchNorm, as mmcv names it."""
    return {f"{name}.conv.weight": (c, c_in, kernel, kernel),
            **{f"{name}.bn.{x}": (c,) for x in ("weight", "bias", "running_mean", "running_var")},
            f"{name}.bn.num_batches_tracked": ()}


def classifier(classes):
    """State of the last convolution."""
    return {"conv_seg.weight": (classes, 512, 1, 1), "conv_seg.bias": (classes,)}


def shapes_of(module):
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("classes", [150, 19])
def test_head_names_are_official(classes):
    """At full width both heads have the official names and shapes, no more and no fewer."""
    with torch.device("meta"):
        head = SegHead(150, 512, classes, 0.0)
    decode = classifier(classes) | block("bottleneck", 2198, 3) | block("fpn_bottleneck", 2048, 3)
    for i in range(4):
        decode |= block(f"psp_modules.{i}.1", 150, 1)
    for i in range(3):
        decode |= block(f"lateral_convs.{i}", 150, 1) | block(f"fpn_convs.{i}", 512, 3)
    assert shapes_of(head.decode_head) == decode
    assert shapes_of(head.auxiliary_head) == classifier(classes) | block("convs.0", 150, 3)


def test_neck_names_are_official():
    """The neck has the official upconv1..4, numbered from 0."""
    with torch.device("meta"):
        neck = PyramidNeck((320, 640, 1280, 1280), 768)
    expected = {}
    for i, c in enumerate((320, 640, 1280, 1280)):
        expected |= {f"{i}.0.weight": (768, c, 3, 3), f"{i}.0.bias": (768,),
                     f"{i}.1.weight": (768,), f"{i}.1.bias": (768,)}
    assert shapes_of(neck) == expected


@pytest.mark.parametrize("classes, decode, auxiliary", [(150, 27.27, 0.769), (19, 27.20, 0.702)])
def test_parameter_counts(classes, decode, auxiliary):
    """Parameter counts, in millions, are the official model's."""
    with torch.device("meta"):
        head = SegHead(150, 512, classes, 0.0)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6
                for part in (head.decode_head, head.auxiliary_head)]
    assert millions == [pytest.approx(decode, abs=0.005), pytest.approx(auxiliary, abs=0.0005)]


def test_initial_values():
    """conv_seg N(0, 0.01) and 0; convolutions Kaiming normal by fan-out; BatchNorm 1 and 0."""
    torch.manual_seed(0)
    head = SegHead(16, 64, 40, 0.0)
    for part in (head.decode_head, head.auxiliary_head):
        assert part.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert part.conv_seg.bias.eq(0).all()
    blocks = [m for m in head.modules() if isinstance(m, ConvBNReLU)]
    assert len(blocks) == 13
    for module in blocks:
        weight = module.conv.weight
        expected = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
        assert weight.std().item() == pytest.approx(expected, rel=0.15)
        assert module.bn.weight.eq(1).all() and module.bn.bias.eq(0).all()
        assert (module.bn.eps, module.bn.momentum) == (1e-5, 0.1)


# ------------------------------------------------------------------------------------------------
# What the modules compute

def test_neck_computation():
    """Each feature: x2 bilinear first, then 3x3 convolution, GroupNorm of 16 groups, ReLU."""
    channels, sizes = (4, 6, 8, 8), [(6, 10), (3, 5), (2, 3), (1, 2)]
    neck = perturbed(PyramidNeck(channels, 32))
    features = [maps(c, [size])[0] for c, size in zip(channels, sizes)]
    for i, (out, feature) in enumerate(zip(neck(features), features)):
        conv, norm = neck[i][0], neck[i][1]
        x = F.interpolate(feature, size=[2 * s for s in sizes[i]], mode="bilinear",
                          align_corners=False)
        x = F.group_norm(F.conv2d(x, conv.weight, conv.bias, padding=1), 16, norm.weight,
                         norm.bias, 1e-5)
        assert relative_error(out, x.relu()) < ROUNDING


def uper_functional(state, levels):
    """UPerHead's logits from its tensors alone, written after mmsegmentation 0.30.0's UPerHead."""
    def cbr(name, x):
        weight = state[f"{name}.conv.weight"]
        mean, var, gain, bias = (state[f"{name}.bn.{k}"][:, None, None] for k in
                                 ("running_mean", "running_var", "weight", "bias"))
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return ((x - mean) / (var + 1e-5).sqrt() * gain + bias).clamp(min=0)

    def to(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    l0, l1, l2, l3 = levels
    pools = [to(cbr(f"psp_modules.{i}.1", F.adaptive_avg_pool2d(l3, s)), l3)
             for i, s in ((0, 1), (1, 2), (2, 3), (3, 6))]
    t3 = cbr("bottleneck", torch.cat([l3] + pools, dim=1))
    t2 = cbr("lateral_convs.2", l2) + to(t3, l2)
    t1 = cbr("lateral_convs.1", l1) + to(t2, l1)
    t0 = cbr("lateral_convs.0", l0) + to(t1, l0)
    out = torch.cat([cbr("fpn_convs.0", t0), to(cbr("fpn_convs.1", t1), t0),
                     to(cbr("fpn_convs.2", t2), t0), to(t3, t0)], dim=1)
    return F.conv2d(cbr("fpn_bottleneck", out), state["conv_seg.weight"], state["conv_seg.bias"])


@pytest.mark.parametrize("sizes", [
    [(24, 32), (12, 16), (6, 8), (3, 4)], [(27, 21), (13, 11), (7, 5), (4, 3)],
    [(9, 8), (5, 4), (3, 2), (1, 1)]])
def test_uper_head_equals_functional(sizes):
    """Pooled branches, their order, the top-down path and the fusion, also at odd sizes."""
    head = perturbed(UPerHead(5, 8, 6, 0.0))
    levels = maps(5, sizes)
    out, expected = head(levels), uper_functional(head.state_dict(), levels)
    assert out.shape == (2, 6, *sizes[0])
    assert expected.std() > 0.01                                  # the ReLUs did not kill it
    assert relative_error(out, expected) < ROUNDING


@pytest.mark.parametrize("size", [(27, 21), (6, 8), (1, 1)])
def test_fcn_head_reads_stride_16(size):
    """The auxiliary head works at the size of map 2 and depends on no other map."""
    head = perturbed(FCNHead(5, 8, 6, 0.0))
    levels = maps(5, [(9, 7), (4, 4), size, (2, 2)])
    out = head(levels)
    assert out.shape == (2, 6, *size)
    weight = head.convs[0].conv.weight
    assert weight.shape == (8, 5, 3, 3)
    (out ** 2).sum().backward()
    assert [level.grad is not None for level in levels] == [False, False, True, False]


def test_dropout_drops_whole_channels():
    """In training a share of channels is zeroed everywhere, the rest scaled up; in eval none."""
    head = FCNHead(1, 64, 64, dropout=0.25)
    nn.init.eye_(head.conv_seg.weight.data[:, :, 0, 0])
    torch.manual_seed(0)
    out = head.classify(torch.ones(8, 64, 3, 3))
    assert out.eq(out[:, :, :1, :1]).all()                         # constant within a channel
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert out.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert head.eval().classify(torch.ones(1, 64, 3, 3)).eq(1).all()


def test_seg_head_resizes_logits():
    """The prediction is the decode head's, resized to the image without aligning corners."""
    head = perturbed(SegHead(5, 8, 6, 0.0))
    levels = maps(5, [(9, 7), (5, 4), (3, 2), (2, 1)])
    expected = F.interpolate(head.decode_head(levels), size=(35, 28), mode="bilinear",
                             align_corners=False)
    assert relative_error(head(levels, (35, 28)), expected) < ROUNDING


def test_seg_head_losses():
    """CE and Lovasz of the decode head, 0.4 CE of the auxiliary head, all at label size."""
    head = perturbed(SegHead(5, 8, 6, 0.0))
    levels = maps(5, [(8, 8), (4, 4), (2, 2), (1, 1)])
    labels = torch.randint(0, 6, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    labels[:, :9] = IGNORE
    losses = head.loss(levels, labels)
    logits, auxiliary = (F.interpolate(part(levels), size=(32, 32), mode="bilinear")
                         for part in (head.decode_head, head.auxiliary_head))
    assert set(losses) == {"ce", "lovasz", "aux"}
    assert relative_error(losses["ce"], heads.cross_entropy(logits, labels)) < ROUNDING
    assert relative_error(losses["lovasz"], heads.lovasz_softmax(logits, labels)) < ROUNDING
    assert relative_error(losses["aux"], 0.4 * heads.cross_entropy(auxiliary, labels)) < ROUNDING


def test_losses_train_every_parameter():
    """In training mode the sum of the losses sends a gradient to every parameter and map."""
    torch.manual_seed(0)
    head = SegHead(5, 8, 3, 0.0).double().train()
    levels = maps(5, [(8, 8), (4, 4), (2, 2), (1, 1)])
    labels = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    sum(head.loss(levels, labels).values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert all(level.grad.abs().sum() > 0 for level in levels)


# ------------------------------------------------------------------------------------------------
# Depth

def test_silog_is_the_papers_formula():
    """sqrt(mean d^2 - 0.5 (mean d)^2) over the valid pixels of the whole batch."""
    torch.manual_seed(0)
    depth, target = torch.rand(2, 2, 5, 6).double() * 9 + 0.5
    target[0, 0] = 0
    d = target[target > 0].log() - depth[target > 0].log()
    expected = (d.square().mean() - 0.5 * d.mean().square()).sqrt()
    assert heads.silog(depth, target).item() == pytest.approx(expected.item(), rel=ROUNDING)


def test_silog_meets_the_golden_value():
    """The authors' loss on 64 pixels: 0.15217126."""
    i = torch.arange(64, dtype=torch.float64)
    target = (3 + 2 * torch.sin(0.7 * i)).float()
    depth = torch.maximum(torch.tensor(0.3), target + (0.4 * torch.cos(1.9 * i)).float()).double()
    assert heads.silog(depth[None, None], target.double()[None, None]).item() == pytest.approx(
        0.1521712690591812, rel=1e-6)


def test_silog_without_valid_pixels_is_zero_and_attached():
    """No valid pixel: loss 0 with a finite (zero) gradient; perfect depth: finite gradient too."""
    for target in (torch.zeros(1, 3, 3), torch.full((1, 3, 3), 2.0)):
        depth = torch.full((1, 3, 3), 2.0, requires_grad=True)
        loss = heads.silog(depth, target)
        loss.backward()
        assert loss.item() < 1e-5 and torch.isfinite(depth.grad).all()


def test_silog_ignores_unknown_pixels():
    """Pixels without truth get no gradient."""
    target = torch.rand(1, 4, 4) + 1
    target[0, 1, 2] = 0
    depth = (torch.rand(1, 4, 4) + 1).requires_grad_()
    heads.silog(depth, target).backward()
    assert depth.grad[0, 1, 2] == 0 and (depth.grad != 0).sum() == 15


def test_fusion_neck_meets_at_the_finest_level():
    """Four levels become one map of D channels at the size of the finest feature."""
    neck = heads.FusionNeck((32, 32, 64, 64), 48).eval()
    features = [torch.randn(1, c, 16 // s, 24 // s) for c, s in zip((32, 32, 64, 64), (1, 2, 4, 8))]
    with torch.no_grad():
        maps = neck(features)
    assert len(maps) == 1 and maps[0].shape == (1, 48, 16, 24)


@pytest.mark.parametrize("size", [(64, 96), (70, 101)])
def test_depth_lies_between_zero_and_the_maximum(size):
    """Metres at image size, strictly inside (0, max_depth), half of it at the start."""
    torch.manual_seed(0)
    head = heads.DepthHead(5, 16, max_depth=10.0)
    maps = [torch.randn(2, 5, 12, 12)]
    depth = head(maps, size)
    assert depth.shape == (2, 1, *size)
    assert (depth - 5).abs().max() < 0.1
    with torch.no_grad():
        for p in head.last_layer_depth.parameters():
            p.normal_(std=5)
        depth = head(maps, size)
    assert depth.min() >= 0 and depth.max() <= 10 and depth.std() > 0.1


# ------------------------------------------------------------------------------------------------
# Pose

@pytest.mark.parametrize("widths,count,factor", [((256,), 619_281, 2), ((256, 256), 1_668_369, 4)])
def test_pose_head_doubles_per_deconvolution(widths, count, factor):
    """150 maps of 9 x 7 -> 17 heatmaps, twice as large per width; parameters counted by hand."""
    head = heads.PoseHead(150, widths, 4.0)
    assert sum(p.numel() for p in head.parameters()) == count
    assert head([torch.randn(2, 150, 9, 7)]).shape == (2, 17, 9 * factor, 7 * factor)
    assert head.stride == 8 / factor


def test_pose_head_starts_as_simple_baselines_do():
    """Weights N(0, 0.001), no bias, so the first heatmaps are flat: the loss is the targets'."""
    head = heads.PoseHead(64, (32,), 2.0)
    for module in (head.deconv_layers[0], head.final_layer):
        assert module.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not head.final_layer.bias.any()
    joints = torch.full((2, 17, 3), 32.0)
    joints[..., 2] = 1
    loss = head.loss([torch.randn(2, 64, 8, 8)], joints)["mse"]
    blob = 2 * math.pi * 2 ** 2 / 2 / 16 ** 2            # mean of a squared Gaussian, sigma 2
    assert loss.item() == pytest.approx(blob, rel=0.05)


def test_pose_loss_is_the_weighted_mean_square_over_everything():
    """By hand: squared differences of labelled joints, divided by all joints and pixels."""
    torch.manual_seed(0)
    head = heads.PoseHead(6, (8,), 1.0).eval()
    nn.init.normal_(head.final_layer.weight)
    head, maps = head.double(), [torch.randn(2, 6, 8, 6).double()]
    joints = torch.rand(2, 17, 3) * torch.tensor([48.0, 64.0, 1.0])
    joints[..., 2] = joints[..., 2].round()
    wanted, _ = udp.heatmap_targets(joints, (64, 48), (16, 12), 1.0)
    squares = (head(maps) - wanted).square().mean(dim=(2, 3)) * joints[..., 2]
    loss = head.loss(maps, joints)["mse"]
    assert loss.item() == pytest.approx(squares.mean().item(), rel=ROUNDING)
    unlabelled = joints * torch.tensor([1.0, 1.0, 0.0])
    assert head.loss(maps, unlabelled)["mse"].item() == 0
