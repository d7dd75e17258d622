"""Stable Diffusion 1.x's UNet, in full, as a feature extractor.

It must agree with UNet2DConditionModel of Hugging Face diffusers (tests/test_unet.py) and carries
its parameter names, so `unet/diffusion_pytorch_model.safetensors` loads with no remapping.

    latents 1/8   320 --down_blocks.0-----------------------up_blocks.3--> feature 0   320, 1/8
           1/16    640 --down_blocks.1-------------------up_blocks.2-----> feature 1   640, 1/16
           1/32    1280 --down_blocks.2---------------up_blocks.1--------> feature 2  1280, 1/32
           1/64     1280 --down_blocks.3--mid_block--up_blocks.0---------> feature 3  1280, 1/64

The coarse three features are read in the middle of their level: after its second layer, before
its third, last layer and upsampler (official: meta_prompts/models.py, output blocks 1, 4 and 7).

temb: time embedding, (B, 4*C0).   context: what cross-attention reads, (B, N, D).   Both may have
batch size 1, which means "the same for every image" and costs their projections only once.

maps: where cross-attention looked, (B, N, h, w), of the levels that are asked for; VPD reads them.
Below `forward` every block that attends returns a list of its maps, [] where they aren't wanted.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.rounding import widen
from weights.files import SD15, assemble, read_part, unet_sizes


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet.  Defaults: SD1.5.  BK-SDM-Base: layers=1."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level: 1/8, 1/16, 1/32, 1/64
    layers: int = 2  # per level on the way down, one more on the way up
    num_heads: int = 8  # per level; divides its channels; HF: attention_head_dim
    context_dim: int = 768  # D, the width of the prompts
    latent_channels: int = 4  # in and out
    groups: int = 32  # of every GroupNorm; divides all channels


class TimestepEmbedding(nn.Module):
    """Sinusoid of the timestep -> temb, by two linear layers."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) timesteps in 0..999 -> (B, c_out); cosines first, then sines."""
        half = self.linear_1.in_features // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(steps * (-math.log(10000) / half))
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1)          # (B, c_in)
        return self.linear_2(F.silu(self.linear_1(sinusoid.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, around a skip; the timestep shifts the middle."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.channels[0], c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """(B, c_in, H, W), SiLU of temb (B or 1, c_temb) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the last two dimensions, fused: (.., L, d), 2 x (.., N, d).

    On a CPU in float32 or wider: bfloat16's backward pass takes up to eight times as long there
    where N or d is small (torch 2.13).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        h = F.scaled_dot_product_attention(widen(q), widen(k), widen(v))
        return h.to(q.dtype)


class Attention(nn.Module):
    """Multi-head attention of tokens to a context; the context is the tokens in self-attention."""

    def __init__(self, channels: int, c_context: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(c_context, channels, bias=False)
        self.to_v = nn.Linear(c_context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list: HF says to_out.0

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, L, C), (B or 1, N, c_context) -> (B, L, C)."""
        B, L, C = x.shape
        G, N, _ = context.shape  # G = 1: all images read the same, so their queries form one row
        q = self.to_q(x).view(G, B * L // G, self.num_heads, -1)
        k = self.to_k(context).view(G, N, self.num_heads, -1)
        v = self.to_v(context).view(G, N, self.num_heads, -1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (G, heads, *, C/heads)
        h = attend(q, k, v)
        return self.to_out[0](h.transpose(1, 2).reshape(B, L, C))

    def map(self, x: Tensor, context: Tensor) -> Tensor:
        """How much each token attends to each of the context's, mean over the heads: (B, L, N).

        Beside `forward`, whose fused attention does not give its weights away.
        """
        q = self.to_q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k = self.to_k(context).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])            # (B, heads, L, N)
        return scores.softmax(dim=3).mean(dim=1)


class FeedForward(nn.Module):
    """GEGLU, a linear layer whose second half gates the first through GELU, then back to C."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)}),
                                  nn.Identity(),  # HF keeps a dropout here; ours keeps its number
                                  nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x, gate = self.net[0]["proj"](x).chunk(2, dim=-1)                  # 2 x (B, L, 4C)
        return self.net[2](x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention (where the meta prompts enter), feed-forward."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, config.num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, config.context_dim, config.num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, mapped: bool) -> tuple[Tensor, list[Tensor]]:
        """(B, L, C), (B or 1, N, D) -> (B, L, C), [the cross-attention's map, (B, L, N)]."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        h = self.norm2(x)
        maps = [self.attn2.map(h, context)] if mapped else []
        x = x + self.attn2(h, context)
        return x + self.ff(self.norm3(x)), maps


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, around a skip."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)  # 1e-5 in the residual blocks
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, mapped: bool) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W), (B or 1, N, D) -> (B, C, H, W), [map (B, N, H, W)]."""
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        h = pointwise(self.proj_in, h)
        h, maps = self.transformer_blocks[0](h, context, mapped)
        h = pointwise(self.proj_out, h)
        x = x + h.view(B, H, W, C).permute(0, 3, 1, 2)
        return x, [m.transpose(1, 2).unflatten(2, (H, W)) for m in maps]


def pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1x1 convolution on (B, L, C) tokens: the same sums without two changes of layout."""
    return F.linear(tokens, conv.weight[:, :, 0, 0], conv.bias)


class DownBlock(nn.Module):
    """A level of the encoder: its layers, then half the size on all levels but the last."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, *, attention: bool,
                 downsample: bool):
        super().__init__()
        inputs = [c_in] + [c_out] * (config.layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, c_out, config) for c in inputs])
        self.attentions = nn.ModuleList([SpatialTransformer(c_out, config)
                                         for _ in inputs if attention])
        self.downsamplers = nn.ModuleList([                                # HF says 0.conv
            nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)})
        ] if downsample else [])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor,
                mapped: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(The level's outputs in order; each is a skip connection, the last one goes on down), its
        maps (B, N, H, W).
        """
        skips, maps = [], []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if len(self.attentions) > 0:
                x, new = self.attentions[i](x, context, mapped)
                maps += new
            skips.append(x)
        for downsample in self.downsamplers:
            skips.append(downsample["conv"](x))          # sizes are rounded up
        return skips, maps


class MidBlock(nn.Module):
    """Layer at the bottom of the UNet: residual block, transformer, residual block."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialTransformer(channels, config)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, config) for _ in range(2)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x, _ = self.attentions[0](self.resnets[0](x, temb), context, mapped=False)
        return self.resnets[1](x, temb)


class UpBlock(nn.Module):
    """A level of the decoder: a layer more than on the way down, each joined by a skip, then
    twice the size.  The last skip comes from the finer level and has its width, `c_finer`.
    """

    def __init__(self, c_in: int, c_finer: int, c_out: int, config: UNetConfig, *,
                 attention: bool, upsample: bool):
        super().__init__()
        inputs = [c_in] + [c_out] * config.layers
        c_skips = [c_out] * config.layers + [c_finer]
        self.resnets = nn.ModuleList([ResnetBlock(c + c_skip, c_out, config)
                                      for c, c_skip in zip(inputs, c_skips)])
        self.attentions = nn.ModuleList([SpatialTransformer(c_out, config)
                                         for _ in inputs if attention])
        self.upsamplers = nn.ModuleList([                                  # HF says 0.conv
            nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, padding=1)})
        ] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor,
                mapped: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(B, c_in, H, W), a skip per layer -> (input of the next level, this level's feature, its
        maps (B, N, H, W)).
        """
        outputs, maps = [], []
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, fit_skip(skips[i], x)], dim=1), temb)
            if len(self.attentions) > 0:
                x, new = self.attentions[i](x, context, mapped)
                maps += new
            outputs.append(x)
        for upsample in self.upsamplers:
            x = upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x, outputs[-2] if len(self.upsamplers) > 0 else outputs[-1], maps


def fit_skip(skip: Tensor, x: Tensor) -> Tensor:
    """Resize a skip to x where an odd size was rounded up on the way down.

    Official: meta_prompts/models.py, before each concatenation.
    diffusers shrinks x to the skip instead; the two agree at multiples of 64 pixels.
    """
    if skip.shape[-2:] == x.shape[-2:]:
        return skip
    return F.interpolate(skip, x.shape[-2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """SD1.x's UNet."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        c0, c1, c2, c3 = config.channels
        self.config, self.temb_dim = config, 4 * c0
        self.gradient_checkpointing = False              # True: see `run`

        self.time_embedding = TimestepEmbedding(c0, self.temb_dim)
        self.conv_in = nn.Conv2d(config.latent_channels, c0, 3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock(c0, c0, config, attention=True, downsample=True),
            DownBlock(c0, c1, config, attention=True, downsample=True),
            DownBlock(c1, c2, config, attention=True, downsample=True),
            DownBlock(c2, c3, config, attention=False, downsample=False),
        ])
        self.mid_block = MidBlock(c3, config)
        self.up_blocks = nn.ModuleList([
            UpBlock(c3, c2, c3, config, attention=False, upsample=True),
            UpBlock(c3, c1, c2, config, attention=True, upsample=True),
            UpBlock(c2, c0, c1, config, attention=True, upsample=True),
            UpBlock(c1, c0, c0, config, attention=True, upsample=False),
        ])
        self.conv_norm_out = nn.GroupNorm(config.groups, c0, eps=1e-5)
        self.conv_out = nn.Conv2d(c0, config.latent_channels, 3, padding=1)

    def embed_timestep(self, timesteps: Tensor) -> Tensor:
        """Stable Diffusion's own embedding: (B,) timesteps in 0..999 -> temb (B, 4*C0)."""
        return self.time_embedding(timesteps)

    def forward(self, latents: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """One pass: (B, 4, h, w), (B or 1, 4*C0), (B or 1, N, D) -> four features, finest first.

        They have C0, C1, C2, C3 channels at 1, 1/2, 1/4, 1/8 of the latents' size rounded up to a
        multiple of 8.
        """
        return self.with_maps(latents, temb, context, levels=())[0]

    def with_maps(self, latents: Tensor, temb: Tensor, context: Tensor,
                  levels: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """One pass -> (four features, for each of `levels` 0, 1, 2 its map (B, N, h_i, w_i)).

        A map is the mean over the level's cross-attentions, on the way down and up; at each
        position it sums to 1.  Sides of the latents are multiples of 8.
        """
        temb = F.silu(temb)                              # every residual block begins with it
        x = self.conv_in(latents)                        # (B, C0, h, w)
        skips, features, maps = [x], [], {level: [] for level in range(4)}
        for level, block in enumerate(self.down_blocks):
            outputs, new = self.run(block, skips[-1], temb, context, level in levels)
            skips += outputs
            maps[level] += new
        x = self.run(self.mid_block, skips[-1], temb, context)  # (B, C3, h/8, w/8)
        for level, block in zip((3, 2, 1, 0), self.up_blocks):
            inputs = [skips.pop() for _ in block.resnets]
            x, feature, new = self.run(block, x, inputs, temb, context, level in levels)
            features.insert(0, feature)
            maps[level] += new
        return features, [torch.stack(maps[level]).mean(dim=0) for level in levels]

    def to_latents(self, feature: Tensor) -> Tensor:
        """The noise-prediction layers, finest feature -> (B, 4, h, w): the UNet's own output."""
        return self.conv_out(F.silu(self.conv_norm_out(feature)))

    def transformer_norms(self):
        """Parameters of the norms in the transformers: 128 tensors in SD1.5."""
        for transformer in self.modules():
            if isinstance(transformer, SpatialTransformer):
                for module in transformer.modules():
                    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                        yield from module.parameters()

    def run(self, block: nn.Module, *inputs):
        """Call a block; with gradient checkpointing keep its inputs only, recompute the rest."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @classmethod
    def from_pretrained(cls, source: str = SD15, num_heads: int = 8) -> "UNet":
        """Load from a hub id, a local Hugging Face folder or a single LDM file (weights/files.py).

        A single file does not hold the number of heads.  Raises InputError if the file is missing,
        broken or no SD1.x UNet.
        """
        tensors, values, path = read_part(source, "unet")
        sizes = unet_sizes(tensors, values or {"attention_head_dim": num_heads}, path)
        return assemble(cls, UNetConfig(**sizes), tensors, path)
