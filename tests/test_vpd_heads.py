"""VPD's decoders are the official ones: second computations, initial values, names, losses.

Their outputs inside the whole model are compared with the authors' in tests/test_vpd_model.py.

    pytest tests/test_vpd_heads.py
"""
import pytest
import torch
import torch.nn.functional as F
from oracles import ROUNDING, randomise, relative_error
from torch import nn

from vpd.heads import FPN, CoarseDepthHead, CoarseNeck, FPNHead, ReferHead, to_pixels

WIDTHS = (16, 24, 32, 40)


def features(widths=WIDTHS, size=(16, 8), B=2):
    """Four random features, each half as large as the one before, in float64."""
    made = torch.Generator().manual_seed(0)
    return [torch.randn(B, c, size[0] >> i, size[1] >> i, generator=made).double()
            for i, c in enumerate(widths)]


def resize(x, size, corners=False):
    """Bilinear resize."""
    return F.interpolate(x, size, mode="bilinear", align_corners=corners)


def conv_bn_relu(x, conv, bn):
    """A convolution without bias, a BatchNorm with its running statistics, a ReLU."""
    x = F.conv2d(x, conv.weight, padding=1)
    return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias))


@pytest.mark.parametrize("corners", [False, True])
def test_logits_are_enlarged_before_they_are_cut(corners):
    """x8 of what covers the padded image, then the image's part, its top left."""
    logits = torch.randn(2, 3, 8, 16).double()
    whole = resize(logits, (64, 128), corners)
    assert torch.equal(to_pixels(logits, (64, 128), corners), whole)
    assert torch.equal(to_pixels(logits, (50, 99), corners), whole[:, :, :50, :99])


def test_the_pyramid_adds_from_coarse_to_fine():
    """FPN written out: 1x1, nearest doubling of the sum so far, 3x3; no norm, no activation."""
    neck, inputs = randomise(FPN(WIDTHS, 12)).double(), features()
    l0, l1, l2, l3 = (F.conv2d(f, layer["conv"].weight, layer["conv"].bias)
                      for f, layer in zip(inputs, neck.lateral_convs))
    l2 = l2 + l3.repeat_interleave(2, 2).repeat_interleave(2, 3)
    l1 = l1 + l2.repeat_interleave(2, 2).repeat_interleave(2, 3)
    l0 = l0 + l1.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = neck(inputs)
    for x, layer, y in zip((l0, l1, l2, l3), neck.fpn_convs, found):
        expected = F.conv2d(x, layer["conv"].weight, layer["conv"].bias, padding=1)
        assert relative_error(y, expected) < ROUNDING


def test_the_seg_head_doubles_after_each_convolution():
    """FPNHead written out: 1, 1, 2, 3 convolutions, 0, 1, 2, 3 doublings, the sum, 1x1."""
    head, maps = randomise(FPNHead(12, 5, 0.1)).double(), features((12,) * 4)
    levels = []
    for layers, x in zip(head.scale_heads, maps):
        for layer in layers:
            x = resize(x, [2 * s for s in x.shape[-2:]]) if isinstance(layer, nn.Upsample) \
                else conv_bn_relu(x, layer.conv, layer.bn)
        levels.append(x)
    assert [len(layers) for layers in head.scale_heads] == [1, 2, 4, 6]
    expected = F.conv2d(sum(levels), head.conv_seg.weight, head.conv_seg.bias)
    assert relative_error(head.logits(maps), expected) < ROUNDING
    assert relative_error(head(maps, (128, 64)), resize(expected, (128, 64))) < ROUNDING


def test_the_depth_neck_brings_all_to_stride_32():
    """Two strided convolutions, one, none, a nearest doubling; GroupNorm of 16 groups."""
    neck, (f0, f1, f2, f3) = randomise(CoarseNeck(WIDTHS, 32)).double(), features()
    first, norm, _, second = neck.layer1
    a = F.conv2d(f0, first.weight, first.bias, stride=2, padding=1)
    a = F.relu(F.group_norm(a, 16, norm.weight, norm.bias))
    a = F.conv2d(a, second.weight, second.bias, stride=2, padding=1)
    b = F.conv2d(f1, neck.layer2[0].weight, neck.layer2[0].bias, stride=2, padding=1)
    c = f3.repeat_interleave(2, 2).repeat_interleave(2, 3)
    out, norm, _ = neck.out_layer
    y = F.conv2d(torch.cat([a, b, f2, c], dim=1), out.weight, out.bias)
    y = F.relu(F.group_norm(y, 16, norm.weight, norm.bias))
    found, = neck([f0, f1, f2, f3])
    assert relative_error(found, y) < ROUNDING


@pytest.mark.parametrize("size,rows,columns", [((64, 64), 2, 2), ((96, 33), 3, 2), ((40, 64), 2, 2),
                                               ((32, 20), 1, 1)])
def test_the_depth_head_drops_what_only_padding_fills(size, rows, columns):
    """Rows and columns of the stride-32 map that begin outside the image never reach the decoder:
    15 of 16 at 480 pixels, as in the official code.
    """
    head, x = randomise(CoarseDepthHead(4, 10.0)).double(), torch.randn(2, 32, 4, 4).double()
    depth, spoiled = head([x], size), x.clone()
    spoiled[:, :, rows:], spoiled[:, :, :, columns:] = 7.0, 7.0
    assert depth.shape == (2, 1, *size) and torch.equal(depth, head([spoiled], size))
    spoiled[:, :, rows - 1, columns - 1] += 1
    assert not torch.equal(depth, head([spoiled], size))


def test_depth_starts_in_the_middle():
    """With initial weights each pixel is at half of max_depth."""
    head = CoarseDepthHead(4, 10.0).eval()
    with torch.no_grad():
        assert (head([torch.rand(1, 32, 2, 2)], (64, 64)) - 5.0).abs().max() < 1e-3


def test_the_refer_head_aligns_corners():
    """ReferHead written out: enlarge, join, twice 3x3 without bias, norm, ReLU; two classes."""
    head, inputs = randomise(ReferHead(WIDTHS)).double(), features()
    y = inputs[3]
    for stage, finer in zip(head.stages, reversed(inputs[:3])):
        y = torch.cat([resize(y, finer.shape[-2:], corners=True), finer], dim=1)
        y = conv_bn_relu(conv_bn_relu(y, stage[0], stage[1]), stage[3], stage[4])
    expected = F.conv2d(y, head.classify.weight, head.classify.bias)
    assert expected.shape == (2, 2, 16, 8) and stage[0].out_channels == 20
    assert relative_error(head.logits(inputs), expected) < ROUNDING
    assert relative_error(head(inputs, (128, 64)), resize(expected, (128, 64), True)) < ROUNDING


def test_the_refer_loss_weighs_objects_more():
    """torch's weighted mean: 0.9 for background, 1.1 for the object, over their sum."""
    head, inputs = randomise(ReferHead(WIDTHS)).double(), features()
    target = torch.zeros(2, 128, 64, dtype=torch.uint8)
    target[0, :50], target[1, 9] = 1, 1
    expected = F.cross_entropy(head(inputs, (128, 64)), target.long(),
                               torch.tensor([0.9, 1.1], dtype=torch.float64))
    loss = head.loss(inputs, target)["ce"]
    assert abs(loss / expected - 1) < ROUNDING
    golden = F.cross_entropy(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]),
                             torch.tensor([0.9, 1.1]))
    by_hand = (0.9 * torch.log1p(torch.tensor(1.0).exp())
               + 1.1 * torch.log1p(torch.tensor(2.0).exp())) / 2.0
    assert torch.isclose(golden, by_hand)                # what torch's weights mean


def test_the_seg_loss_counts_ignored_pixels():
    """The mean over all pixels; those of label 255 add nothing to the sum."""
    head, maps = randomise(FPNHead(12, 5, 0.0)).double(), features((12,) * 4)
    target = torch.full((2, 128, 64), 255)
    target[0, :32] = 3
    logits = head(maps, (128, 64))
    valid = F.cross_entropy(logits, target, ignore_index=255)
    assert abs(head.loss(maps, target)["ce"] / (valid / 8) - 1) < ROUNDING


def test_initial_values_are_the_official_ones():
    """Seg: neck Xavier, bias 0; head kaiming by fan_out, classifier N(0, 0.01).  Depth's neck:
    N(0, 0.02), bias 0.  Refer: torch's own.
    """
    torch.manual_seed(0)
    neck, head = FPN((64, 64, 64, 64), 64), FPNHead(64, 50, 0.1)
    lateral, fine = neck.lateral_convs[1]["conv"], neck.fpn_convs[2]["conv"]
    assert lateral.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert fine.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.05)
    assert not lateral.bias.any() and not fine.bias.any()
    assert head.scale_heads[3][4].conv.weight.std().item() == \
        pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    depth = CoarseNeck((64, 64, 64, 64), 64)
    for conv in (depth.layer1[0], depth.layer1[3], depth.layer2[0], depth.out_layer[0]):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not conv.bias.any()
    stage = ReferHead((64, 64, 64, 64)).stages[1]
    bound = (1 / (stage[0].in_channels * 9)) ** 0.5      # kaiming_uniform with a = sqrt(5)
    assert stage[0].weight.abs().max().item() == pytest.approx(bound, rel=0.01)
