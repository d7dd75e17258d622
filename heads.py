"""Task heads: what turns the UNet's four features into a prediction, and the losses on it.

    task   neck (to the prompts' space, D = 768)   after rearrangement        head -> output
    seg    PyramidNeck: 4 maps, x2, strides 4..32  4 x (B, N, h, w)           UPerHead -> logits
    depth  FusionNeck: all four to one, stride 8   (B, N, h, w)               DepthHead -> metres
    pose   FusionNeck                              (B, N, h, w)               PoseHead -> heatmaps

Necks come before the dot product with the prompts (model.py), heads after it: a head sees N
channels and knows nothing of the backbone.  Parameter names inside the heads are the official
code's, so that the authors' checkpoints map by prefix.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import udp
from ops.device import descending, has_data
from ops.parallel import BatchNorm2d, by_class, total

IGNORE = 255  # label of pixels that count neither in losses nor in metrics
CHUNK = 16  # classes that Lovasz-softmax sorts at once: all 150 would take 4 GB at 2 x 512 x 512


def resize(x: Tensor, size) -> Tensor:
    """Bilinear resize of (B, C, H, W) to size = (h, w), pixel areas aligned, not corners."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def widen(x: Tensor) -> Tensor:
    """x in float32, in which losses are computed; float64, which tests use, stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------
# Segmentation

class PyramidNeck(nn.ModuleList):
    """Each of the four features: x2 bilinear, 3x3 conv to D, GroupNorm, ReLU.

    Official: segmentation/models/model.py, upconv1..4.
    """

    def __init__(self, channels: tuple[int, ...], c_prompt: int):
        super().__init__([
            nn.Sequential(nn.Conv2d(c, c_prompt, 3, padding=1), nn.GroupNorm(16, c_prompt),
                          nn.ReLU()) for c in channels])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """4 x (B, C_i, h, w) -> 4 x (B, D, 2h, 2w), finest first."""
        doubled = [F.interpolate(f, scale_factor=2.0, mode="bilinear") for f in features]
        return [layer(f) for layer, f in zip(self, doubled)]


class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; names and initial values as in mmcv."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.bn = BatchNorm2d(c_out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class Classifier(nn.Module):
    """Channel dropout and the 1x1 convolution to class logits, shared by both seg heads."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, num_classes, H, W)."""
        return self.conv_seg(self.dropout(x))


class UPerHead(Classifier):
    """UPerNet's decoder: pyramid pooling on the coarsest map, then a feature pyramid.

    Official: mmsegmentation 0.30.0 UPerHead, in 4 x N channels, `channels` wide inside.
    """

    def __init__(self, c_in: int, channels: int, num_classes: int, dropout: float):
        super().__init__(channels, num_classes, dropout)
        self.psp_modules = nn.ModuleList([
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), ConvBNReLU(c_in, channels, 1))
            for bins in (1, 2, 3, 6)])
        self.bottleneck = ConvBNReLU(c_in + 4 * channels, channels, 3)
        self.lateral_convs = nn.ModuleList([ConvBNReLU(c_in, channels, 1) for _ in range(3)])
        self.fpn_convs = nn.ModuleList([ConvBNReLU(channels, channels, 3) for _ in range(3)])
        self.fpn_bottleneck = ConvBNReLU(4 * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """4 x (B, c_in, h, w), finest first -> logits (B, num_classes, h_0, w_0)."""
        top = maps[3]
        pooled = [resize(pool(top), top.shape[-2:]) for pool in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for i in (3, 2, 1):                              # top-down: each level adds the coarser one
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        fine = [conv(x) for conv, x in zip(self.fpn_convs, levels)] + [levels[3]]
        fine = [fine[0]] + [resize(x, fine[0].shape[-2:]) for x in fine[1:]]
        return self.classify(self.fpn_bottleneck(torch.cat(fine, dim=1)))


class FCNHead(Classifier):
    """Auxiliary head on the map of stride 16: one 3x3 convolution, then classes.  Training only."""

    def __init__(self, c_in: int, channels: int, num_classes: int, dropout: float):
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.ModuleList([ConvBNReLU(c_in, channels, 3)])

    def forward(self, maps: list[Tensor]) -> Tensor:
        """4 x (B, c_in, h, w) -> logits (B, num_classes, h_2, w_2)."""
        return self.classify(self.convs[0](maps[2]))


class SegHead(nn.Module):
    """UPerHead for the prediction, FCNHead as an auxiliary loss; `channels` inside both."""

    def __init__(self, c_in: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.decode_head = UPerHead(c_in, channels, num_classes, dropout)
        self.auxiliary_head = FCNHead(c_in, channels, num_classes, dropout)

    def forward(self, maps: list[Tensor], size) -> Tensor:
        """4 x (B, N, h, w) -> logits (B, num_classes, *size)."""
        return resize(self.decode_head(maps), size)

    def loss(self, maps: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """4 x (B, N, h, w), labels (B, H, W) -> named losses, to be added up.

        Logits are resized to the labels first.  The auxiliary loss carries its weight, 0.4.
        """
        logits = resize(widen(self.decode_head(maps)), target.shape[-2:])
        auxiliary = resize(widen(self.auxiliary_head(maps)), target.shape[-2:])
        return {"ce": cross_entropy(logits, target), "lovasz": lovasz_softmax(logits, target),
                "aux": 0.4 * cross_entropy(auxiliary, target)}


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of (B, C, H, W) and (B, H, W), averaged over ALL pixels, ignored ones too.

    Official: mmsegmentation's CrossEntropyLoss with avg_non_ignore=False.
    """
    total = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum")
    return total / target.numel()


def lovasz_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz-softmax loss of (B, C, H, W) and (B, H, W), over the classes present in the batch.

    Per class: the errors of all pixels, weighted by `jaccard_growth`; then the mean over classes.
    An ignored pixel gets error 0: it sorts last and adds 0.  Of several processes each sums up a
    share of the classes, see ops/parallel.py.
    DEVIATION: zero where no pixel is valid, the official code gives NaN.
    """
    probs = widen(logits).softmax(dim=1).movedim(1, 0).flatten(1)         # (C, P)
    probs, labels, classes = by_class(probs, target.flatten())             # (C', P'), (P',), (C',)
    if has_data(probs):                                                    # else shapes stay fixed
        present = labels.long().bincount(minlength=IGNORE + 1)[classes] > 0
        probs, classes = probs[present], classes[present]
    truth, valid, losses = labels == classes[:, None], labels != IGNORE, []
    for p, t in zip(probs.split(CHUNK), truth.split(CHUNK)):
        with torch.no_grad():                                              # gradient: errors only
            weights = jaccard_growth((t.to(p.dtype) - p).abs() * valid, t) * valid
        losses.append((torch.where(t, 1 - p, p) * weights).sum(dim=1))
    present = truth.any(dim=1)
    loss = (torch.cat(losses) * present).sum()
    loss, count = total(torch.stack([loss, present.sum().to(loss.dtype)]))
    return loss / count.clamp(min=1)


def jaccard_growth(errors: Tensor, truth: Tensor) -> Tensor:
    """How much each pixel makes a class's Jaccard loss grow, where pixels are added in descending
    order of their errors; errors and truth (C, P) -> (C, P).
    """
    order = descending(errors)
    hits = truth.gather(1, order).to(errors.dtype).cumsum(dim=1)           # (C, P), so far
    area, rank = hits[:, -1:], torch.arange(1, 1 + hits.shape[1], device=hits.device)
    loss = 1 - (area - hits) / (area + rank - hits)                        # (C, P), Jaccard
    growth = torch.diff(loss, dim=1, prepend=torch.zeros_like(loss[:, :1]))
    return torch.empty_like(growth).scatter_(1, order, growth)


# ------------------------------------------------------------------------------------------------
# Depth

def deconvolutions(widths: tuple[int, ...], kernel: int) -> nn.Sequential:
    """Transposed convolution, BatchNorm, ReLU from each width to the next; each doubles the size.
    """
    layers = []
    for c_in, c_out in zip(widths, widths[1:]):
        layers += [nn.ConvTranspose2d(c_in, c_out, kernel, stride=2, padding=kernel // 2 - 1,
                                      bias=False), BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class UpLayer(nn.Module):
    """`doublings` transposed convolutions of width 32, then a 3x3 convolution to c_out.

    Official: depth/models_depth/model.py, layer2..layer4 and, with kernel 2, decoder.
    """

    def __init__(self, c_in: int, c_out: int, doublings: int, kernel: int = 4, width: int = 32):
        super().__init__()
        self.deconv_layers = deconvolutions((c_in, *[width] * doublings), kernel)
        self.conv_layers = nn.Sequential(nn.Conv2d(width, c_out, 3, padding=1),
                                         BatchNorm2d(c_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, h, w) -> (B, c_out, h * 2**doublings, w * 2**doublings)."""
        return self.conv_layers(self.deconv_layers(x))


class FusionNeck(nn.Module):
    """All four features at the finest one's size, concatenated, projected to the prompts' space.

    Official: depth/models_depth/model.py, layer1..layer4 and out_layer.
    """

    def __init__(self, channels: tuple[int, ...], c_prompt: int):
        super().__init__()
        c0, c1, c2, c3 = channels
        self.layer1 = nn.Sequential(nn.Conv2d(c0, c0, 3, padding=1), nn.GroupNorm(16, c0),
                                    nn.ReLU())
        self.layer2, self.layer3 = UpLayer(c1, c1, 1), UpLayer(c2, c2, 2)
        self.layer4 = UpLayer(c3, c3, 3)
        self.out_layer = nn.Sequential(nn.Conv2d(sum(channels), c_prompt, 3, padding=1),
                                       nn.GroupNorm(16, c_prompt), nn.ReLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):            # the transposed ones keep torch's default
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """4 x (B, C_i, h_i, w_i) -> [(B, D, h_0, w_0)]."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        maps = [layer(f) for layer, f in zip(layers, features)]
        return [self.out_layer(torch.cat(maps, dim=1))]


class DepthHead(nn.Module):
    """One response map per prompt -> metres in (0, max_depth).

    Official: depth/models_depth/model.py, decoder and last_layer_depth.  `channels` is 192 there.
    """

    def __init__(self, c_in: int, channels: int, max_depth: float):
        super().__init__()
        self.max_depth = max_depth
        self.decoder = UpLayer(c_in, channels, 3, kernel=2)
        self.last_layer_depth = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, 1, 3, padding=1))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)  # depth starts at max_depth / 2
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor], size) -> Tensor:
        """[(B, N, h, w)] -> metres (B, 1, *size)."""
        coarse = resize(maps[0], (size[0] // 8, size[1] // 8))
        logits = widen(self.last_layer_depth(self.decoder(coarse)))      # (B, 1, 8(H//8), 8(W//8))
        depth = logits.sigmoid() * self.max_depth
        return depth if depth.shape[-2:] == tuple(size) else resize(depth, size)

    def loss(self, maps: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """[(B, N, h, w)], metres (B, H, W) with 0 = unknown -> the SiLog loss."""
        return {"silog": silog(self(maps, target.shape[-2:])[:, 0], target)}


def silog(depth: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant log loss of (B, H, W) metres, pixels with target > 0, whole batch pooled.

    sqrt(mean d^2 - 0.5 (mean d)^2), d = ln target - ln depth (official: depth/utils_depth/
    criterion.py).  DEVIATION: variance clamped before the square root, whose gradient is unbounded
    at 0, and zero loss where no pixel is valid, the official code gives NaN.
    """
    valid = target > 0
    ratio = torch.where(valid, target, 1.0).log() - widen(depth).clamp(min=1e-6).log()
    d = torch.where(valid, ratio, 0.0)
    first, second, count = total(torch.stack([d.sum(), d.square().sum(), valid.sum().to(d.dtype)]))
    mean = first / count.clamp(min=1)
    variance = second / count.clamp(min=1) - 0.5 * mean.square()
    return variance.clamp(min=1e-12).sqrt() * (count > 0)


# ------------------------------------------------------------------------------------------------
# Pose

class PoseHead(nn.Module):
    """One response map per prompt -> one heatmap per COCO joint, twice as large per deconvolution.

    DEVIATION: the pose code was never released; this is ViTPose's classic decoder on maps of stride
    8, so one deconvolution gives the family's stride of 4.  Names are mmpose's.
    """

    def __init__(self, c_in: int, widths: tuple[int, ...], sigma: float):
        super().__init__()
        self.sigma = sigma
        self.deconv_layers = deconvolutions((c_in, *widths), kernel=4)
        self.final_layer = nn.Conv2d((c_in, *widths)[-1], len(udp.KEYPOINTS), 1)
        self.stride = 8 / 2 ** len(widths)               # of the heatmaps, in pixels of the crop
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, maps: list[Tensor], size=None) -> Tensor:
        """[(B, N, h, w)] -> heatmaps (B, 17, h * 2**n, w * 2**n); `size` isn't used."""
        return self.final_layer(self.deconv_layers(maps[0]))

    def loss(self, maps: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """[(B, N, h, w)], joints (B, 17, 3): x, y in crop pixels, 1 if labelled -> the MSE loss."""
        heatmaps = widen(self(maps))
        size = heatmaps.shape[-2:]
        crop = [int(side * self.stride) for side in size]
        wanted, weight = udp.heatmap_targets(target, crop, size, self.sigma)
        return {"mse": udp.keypoint_mse(heatmaps, wanted, weight)}
