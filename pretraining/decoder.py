"""The decoder of Stable Diffusion's autoencoder, in full: latents -> RGB image at 8 times the size.

Perception never decodes, so it lies here and not in vae.py; pretraining and sampling do.  It must
agree with AutoencoderKL of Hugging Face diffusers (tests/test_pretrain.py) and carries its
parameter names.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vae


class Upsample(nn.Module):
    """Double the size by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    """Residual blocks, one more than the encoder has, then twice the size on all levels but one."""

    def __init__(self, c_in: int, c_out: int, groups: int, layers: int, upsample: bool):
        super().__init__()
        inputs = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList([vae.ResnetBlock(c, c_out, groups) for c in inputs])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, 2H, 2W), or (B, c_out, H, W) on the finest level."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Latents after `post_quant_conv` -> image."""

    def __init__(self, config: vae.VAEConfig):
        super().__init__()
        (c0, c1, c2, c3), groups, layers = config.channels, config.groups, config.layers
        latent_channels = config.latent_channels
        self.conv_in = nn.Conv2d(latent_channels, c3, 3, padding=1)
        self.mid_block = vae.MidBlock(c3, groups)
        self.up_blocks = nn.ModuleList([
            UpBlock(c3, c3, groups, layers, upsample=True),                        # 1/8 -> 1/4
            UpBlock(c3, c2, groups, layers, upsample=True),                        # 1/4 -> 1/2
            UpBlock(c2, c1, groups, layers, upsample=True),                        # 1/2 -> 1/1
            UpBlock(c1, c0, groups, layers, upsample=False),                       # 1/1
        ])
        self.conv_norm_out = nn.GroupNorm(groups, c0, eps=vae.EPS)
        self.conv_out = nn.Conv2d(c0, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, 8h, 8w), about -1..1."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(vae.VAEEncoder):
    """The encoder of vae.py with a decoder: diffusers' AutoencoderKL, name for name."""

    def __init__(self, config: vae.VAEConfig):
        super().__init__(config)
        self.decoder = Decoder(config)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """RGB images (B, 3, H, W) in [-1, 1] -> mean and log-variance, (B, C, H/8, W/8) each."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)                 # diffusers' limits

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> RGB images (B, 3, 8h, 8w), about -1..1."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def absorb(self, mean: Tensor, spread: Tensor) -> None:
        """Shift and scale the latents, (C,) each, inside the two 1x1 convolutions.

        What was `z` becomes `(z - mean) / spread` between them; pictures stay as they were.
        """
        C, quant, post = self.config.latent_channels, self.quant_conv, self.post_quant_conv
        quant.bias[:C] -= mean
        quant.weight[:C] /= spread[:, None, None, None]
        quant.bias[:C] /= spread
        quant.bias[C:] -= 2 * spread.log()                        # the log-variances
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= spread[None, :, None, None]


def reconstruction_error(ours: Tensor, images: Tensor, gradients: float) -> Tensor:
    """Mean absolute error at 1/1 and 1/4, plus that of the differences between neighbours."""
    error = ours - images
    across, down = error[..., 1:] - error[..., :-1], error[:, :, 1:] - error[:, :, :-1]
    coarse = F.avg_pool2d(error, 4)
    return (error.abs().mean() + coarse.abs().mean()
            + gradients / 2 * (across.abs().mean() + down.abs().mean()))


def autoencoder_loss(model: Autoencoder, images: Tensor, kl: float, gradients: float,
                     draws: torch.Generator) -> Tensor:
    """Reconstruction from a draw of the posterior, and `kl` of its divergence from N(0, 1)."""
    mean, log_variance = model.posterior(images)
    noise = torch.randn(mean.shape, generator=draws)
    ours = model.decode(mean + (0.5 * log_variance).exp() * noise)
    divergence = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction_error(ours, images, gradients) + kl * divergence
