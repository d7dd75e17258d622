"""Stable Diffusion 1.5's image encoder, in full: RGB image -> latents at 1/8 of its size.

It must agree with AutoencoderKL of Hugging Face diffusers (tests/test_vae.py) and carries its
parameter names, so `vae/diffusion_pytorch_model.safetensors` loads with no remapping.  The decoder
is not needed and not written.  Three facts that rewrites get wrong:
  * stride-2 convolutions pad right and bottom only, (0, 1, 0, 1);
  * every GroupNorm uses eps 1e-6 (the UNet's residual blocks use 1e-5);
  * perception reads the posterior MEAN: no sampling, and no factor 0.18215 (see model.py).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights.files import SD15, assemble, read_part, vae_sizes

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an encoder.  Defaults: SD1.5."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # per level: 1/1, 1/2, 1/4, 1/8
    layers: int = 2  # residual blocks per level
    latent_channels: int = 4  # of the mean, as many of the variance
    groups: int = 32  # of every GroupNorm; divides all channels


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, around a skip connection."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all positions with a single head, only at 1/8 resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list: HF says to_out.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)             # (B, H*W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(B, C, H, W)


class Downsample(nn.Module):
    """Halve the size (floor)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H//2, W//2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownBlock(nn.Module):
    """Residual blocks, then half the size on all levels but the last."""

    def __init__(self, c_in: int, c_out: int, config: VAEConfig, downsample: bool):
        super().__init__()
        inputs = [c_in] + [c_out] * (config.layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, c_out, config.groups) for c in inputs])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H/2, W/2), or (B, c_out, H, W) on the last level."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image -> the 8 moments (4 means, 4 log-variances), before `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c0, c1, c2, c3 = config.channels
        self.conv_in = nn.Conv2d(3, c0, 3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock(c0, c0, config, downsample=True),                    # 1/1 -> 1/2
            DownBlock(c0, c1, config, downsample=True),                    # 1/2 -> 1/4
            DownBlock(c1, c2, config, downsample=True),                    # 1/4 -> 1/8
            DownBlock(c2, c3, config, downsample=False),                   # 1/8
        ])
        self.mid_block = MidBlock(c3, config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, c3, eps=EPS)
        self.conv_out = nn.Conv2d(c3, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 8, H/8, W/8)."""
        x = self.conv_in(x)
        if x.dtype == torch.bfloat16:  # half the time on CPUs; the UNet is faster without
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEEncoder(nn.Module):
    """SD1.5's VAE encoder."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config, moments = config, 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Posterior mean of RGB images in [-1, 1], unscaled.

        (B, 3, H, W) -> (B, 4, H/8, W/8); each of the three halvings rounds down.
        """
        moments = self.quant_conv(self.encoder(images))                    # (B, 8, H/8, W/8)
        return moments[:, :self.config.latent_channels].contiguous()

    @classmethod
    def from_pretrained(cls, source: str = SD15) -> "VAEEncoder":
        """Load from a hub id, a Hugging Face folder or a single LDM file, see weights/files.py.

        Raises InputError if it is missing, broken or another model.
        """
        tensors, values, path = read_part(source, "vae")
        return assemble(cls, VAEConfig(**vae_sizes(tensors, values, path)), tensors, path)
