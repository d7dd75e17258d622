"""VPD's decoders: what turns the joined features into a prediction, and the losses on it.

    task   neck                                             head -> output
    seg    FPN: 4 maps, `channels` wide                     FPNHead -> logits at 1/8
    depth  CoarseNeck: all four to one, stride 32           CoarseDepthHead -> metres
    refer  none                                             ReferHead -> 2 logits at 1/8

Parameter names inside the first two are the official code's; ReferHead's are numbered instead.  All
sizes are those of the padded image (model.py); a head cuts the prediction to the image.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads import Classifier, ConvBNReLU, DepthHead, cross_entropy, widen
from ops.parallel import BatchNorm2d, total


def to_pixels(logits: Tensor, size, align_corners: bool = False) -> Tensor:
    """Logits at 1/8 of the padded image -> at each pixel of the image, (B, C, *size), its top left.
    """
    padded = [8 * side for side in logits.shape[-2:]]
    whole = F.interpolate(logits, padded, mode="bilinear", align_corners=align_corners)
    return whole[:, :, :size[0], :size[1]]


# ------------------------------------------------------------------------------------------------
# Segmentation

class FPN(nn.Module):
    """Feature pyramid: every feature to the same width, each adds the coarser one, 3x3 convolution.

    Official: mmsegmentation 0.30.0 FPN, without norms and activations.
    """

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList([                               # mmcv says 0.conv
            nn.ModuleDict({"conv": nn.Conv2d(c, channels, 1)}) for c in widths])
        self.fpn_convs = nn.ModuleList([
            nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, padding=1)}) for _ in widths])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """4 x (B, C_i, h_i, w_i), each half as large as the one before -> 4 x (B, C, h_i, w_i)."""
        levels = [layer["conv"](f) for layer, f in zip(self.lateral_convs, features)]
        for i in (3, 2, 1):                              # top-down: each level adds the coarser one
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], scale_factor=2.0,
                                                          mode="nearest")
        return [layer["conv"](x) for layer, x in zip(self.fpn_convs, levels)]


class FPNHead(Classifier):
    """Each level to the finest one's size, a convolution before every doubling; their sum, classes.

    Official: mmsegmentation 0.30.0 FPNHead with strides 4, 8, 16, 32 (truly they are 8 to 64).
    """

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__(channels, num_classes, dropout)
        self.scale_heads = nn.ModuleList([nn.Sequential(ConvBNReLU(channels, channels, 3))])
        for doublings in (1, 2, 3):
            layers = []
            for _ in range(doublings):
                layers += [ConvBNReLU(channels, channels, 3),
                           nn.Upsample(scale_factor=2.0, mode="bilinear")]
            self.scale_heads.append(nn.Sequential(*layers))

    def logits(self, maps: list[Tensor]) -> Tensor:
        """4 x (B, C, h_i, w_i) -> (B, num_classes, h_0, w_0)."""
        return self.classify(sum(layers(m) for layers, m in zip(self.scale_heads, maps)))

    def forward(self, maps: list[Tensor], size) -> Tensor:
        """4 x (B, C, h_i, w_i) -> logits (B, num_classes, *size)."""
        return to_pixels(self.logits(maps), size)

    def loss(self, maps: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """4 x (B, C, h_i, w_i), labels (B, H, W) -> the cross-entropy."""
        logits = to_pixels(widen(self.logits(maps)), target.shape[-2:])
        return {"ce": cross_entropy(logits, target)}


# ------------------------------------------------------------------------------------------------
# Depth

class CoarseNeck(nn.Module):
    """All four features at stride 32, concatenated, to one width.

    Official: depth/models_depth/model.py, layer1, layer2 and out_layer.
    """

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__()
        c0, c1, _, _ = widths
        self.layer1 = nn.Sequential(
            nn.Conv2d(c0, c0, 3, stride=2, padding=1), nn.GroupNorm(16, c0), nn.ReLU(),
            nn.Conv2d(c0, c0, 3, stride=2, padding=1))
        self.layer2 = nn.Sequential(nn.Conv2d(c1, c1, 3, stride=2, padding=1))
        self.out_layer = nn.Sequential(nn.Conv2d(sum(widths), channels, 1),
                                       nn.GroupNorm(16, channels), nn.ReLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """4 x (B, C_i, h_i, w_i) -> [(B, C, h_2, w_2)]."""
        f0, f1, f2, f3 = features
        f3 = F.interpolate(f3, scale_factor=2.0, mode="nearest")
        return [self.out_layer(torch.cat([self.layer1(f0), self.layer2(f1), f2, f3], dim=1))]


class CoarseDepthHead(DepthHead):
    """The depth head that Meta Prompts took over, on a map of stride 32: three transposed
    convolutions, two bilinear doublings, then the last layers at the image's size.

    Official: depth/models_depth/model.py, decoder and last_layer_depth.
    """

    def __init__(self, channels: int, max_depth: float):
        super().__init__(8 * channels, channels, max_depth)

    def forward(self, maps: list[Tensor], size) -> Tensor:
        """[(B, C, h, w)] -> metres (B, 1, *size)."""
        rows, columns = (-(-side // 32) for side in size)
        x = self.decoder(maps[0][:, :, :rows, :columns])  # without what only padding fills
        for _ in range(2):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        depth = widen(self.last_layer_depth(x)).sigmoid() * self.max_depth
        return depth[:, :, :size[0], :size[1]]


# ------------------------------------------------------------------------------------------------
# Referring segmentation

class ReferHead(nn.Module):
    """From coarse to fine: enlarge, join the finer feature, two convolutions; then two classes.

    Official: refer/lib/mask_predictor.py (LAVT's), conv1_4 .. bn2_2 and conv1_1.
    """

    CLASS_WEIGHTS = (0.9, 1.1)  # of background and object in the loss; official: refer/train.py

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        c0, c1, c2, c3 = widths
        channels = c3 // 2
        self.stages = nn.ModuleList([nn.Sequential(
            nn.Conv2d(c_in, channels, 3, padding=1, bias=False), BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), BatchNorm2d(channels),
            nn.ReLU()) for c_in in (c3 + c2, channels + c1, channels + c0)])
        self.classify = nn.Conv2d(channels, 2, 1)

    def logits(self, features: list[Tensor]) -> Tensor:
        """4 x (B, C_i, h_i, w_i) -> (B, 2, h_0, w_0)."""
        y = features[3]
        for stage, finer in zip(self.stages, (features[2], features[1], features[0])):
            y = F.interpolate(y, finer.shape[-2:], mode="bilinear", align_corners=True)
            y = stage(torch.cat([y, finer], dim=1))
        return self.classify(y)

    def forward(self, features: list[Tensor], size) -> Tensor:
        """4 x (B, C_i, h_i, w_i) -> logits (B, 2, *size); class 1 is the object."""
        return to_pixels(self.logits(features), size, align_corners=True)

    def loss(self, features: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """4 x (B, C_i, h_i, w_i), 0 or 1 at each pixel (B, H, W) -> the cross-entropy: a mean in
        which an object's pixel counts for more, over all images that are handled at once.
        """
        logits = to_pixels(widen(self.logits(features)), target.shape[-2:], align_corners=True)
        weights, target = logits.new_tensor(self.CLASS_WEIGHTS), target.long()
        loss = F.cross_entropy(logits, target, weights, reduction="sum")
        loss, count = total(torch.stack([loss, weights[target].sum()]))
        return {"ce": loss / count}
