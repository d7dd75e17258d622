"""Stable Diffusion 1.5's image encoder, in full: RGB image -> latents at 1/8 of its size.

It must agree with AutoencoderKL of Hugging Face diffusers (tests/test_vae.py) and carries its
parameter names, so `vae/diffusion_pytorch_model.safetensors` loads with no remapping.  The decoder
is not needed and not written.  Three facts that rewrites get wrong:
  * stride-2 convolutions pad right and bottom only, (0, 1, 0, 1);
  * every GroupNorm uses eps 1e-6 (the UNet's residual blocks use 1e-5);
  * perception reads the posterior MEAN: no sampling, and no factor 0.18215 (see model.py).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights import files as weights

CHANNELS = (128, 256, 512, 512)  # SD1.5, per level: 1/1, 1/2, 1/4, 1/8
LATENT_CHANNELS = 4  # of SD1.5
GROUPS = 32  # of every GroupNorm, in SD1.5
LAYERS = 2  # residual blocks per level, in SD1.5
EPS = 1e-6


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
    """Residual blocks (two in SD1.5), then half the size on all levels but the last."""

    def __init__(self, c_in: int, c_out: int, groups: int, layers: int, downsample: bool):
        super().__init__()
        inputs = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, c_out, groups) for c in inputs])
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

    def __init__(self, channels: tuple[int, ...], moments: int, groups: int, layers: int):
        super().__init__()
        c0, c1, c2, c3 = channels
        self.conv_in = nn.Conv2d(3, c0, 3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock(c0, c0, groups, layers, downsample=True),                    # 1/1 -> 1/2
            DownBlock(c0, c1, groups, layers, downsample=True),                    # 1/2 -> 1/4
            DownBlock(c1, c2, groups, layers, downsample=True),                    # 1/4 -> 1/8
            DownBlock(c2, c3, groups, layers, downsample=False),                   # 1/8
        ])
        self.mid_block = MidBlock(c3, groups)
        self.conv_norm_out = nn.GroupNorm(groups, c3, eps=EPS)
        self.conv_out = nn.Conv2d(c3, moments, 3, padding=1)

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
    """SD1.5's VAE encoder; `channels` per level, multiples of the GroupNorms' `groups`."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS,
                 latent_channels: int = LATENT_CHANNELS, groups: int = GROUPS,
                 layers: int = LAYERS):
        super().__init__()
        self.channels, self.latent_channels = tuple(channels), latent_channels
        self.layers = layers
        self.encoder = Encoder(self.channels, 2 * latent_channels, groups, layers)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Posterior mean of RGB images in [-1, 1], unscaled.

        (B, 3, H, W) -> (B, 4, H/8, W/8); each of the three halvings rounds down.
        """
        moments = self.quant_conv(self.encoder(images))                    # (B, 8, H/8, W/8)
        return moments[:, :self.latent_channels].contiguous()

    @classmethod
    def from_pretrained(cls, source: str = weights.SD15) -> "VAEEncoder":
        """Load from a hub id, a local Hugging Face folder or a single LDM file (see weights.py).

        Widths and layers come from the file.  Raises InputError if it is missing, broken or another
        model.
        """
        tensors, _, path = weights.read_part(source, "vae")
        names = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(4)]
        channels = weights.widths(tensors, names, path)
        layers = 2 if "encoder.down_blocks.0.resnets.1.conv1.weight" in tensors else 1
        with torch.device("meta"):
            vae = cls(channels, layers=layers)
        weights.load_strict(vae, tensors, path)
        return vae
