"""Latent diffusion with Stable Diffusion's noise schedule: what is learnt, and how it is sampled.

It must agree with DDIMScheduler and StableDiffusionPipeline of Hugging Face diffusers
(tests/test_pretrain.py).  Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models".
"""
import torch
from torch import Tensor, nn

from unet import TransformerBlock, UNet
from vpd.text import TextEncoder

TIMESTEPS = 1000
BETAS = 0.00085, 0.012  # of the first and the last timestep


class Denoiser(nn.Module):
    """UNet and text encoder: noisy latents, timestep and caption -> the noise in them."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """(B, C, h, w), (B,) in 0..999, token ids (B, L) -> (B, C, h, w)."""
        context, _ = self.text_encoder(ids)
        features = self.unet(noisy, self.unet.embed_timestep(timesteps), context)
        return self.unet.to_latents(features[0])

    @torch.no_grad()
    def absorb(self, spread: float) -> None:
        """Divide the text's states by `spread` inside the last norm, multiply what reads them.

        The prediction stays as it was.  States of spread 1 are what prompts are drawn like.
        """
        norm = self.text_encoder.text_model.final_layer_norm
        for tensor in (norm.weight, norm.bias):
            tensor /= spread
        for module in self.unet.modules():
            if isinstance(module, TransformerBlock):
                module.attn2.to_k.weight *= spread
                module.attn2.to_v.weight *= spread


def signal_shares() -> Tensor:
    """Share of the signal's variance that is left at each timestep, (1000,): alphas_cumprod.

    "Scaled linear": the standard deviation of the noise that a step adds grows linearly.
    """
    deviations = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TIMESTEPS)
    return torch.cumprod(1 - deviations ** 2, dim=0)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents (B, C, h, w) as they are at the timesteps (B,)."""
    share = signal_shares()[timesteps, None, None, None]
    return share.sqrt() * latents + (1 - share).sqrt() * noise


@torch.no_grad()
def average_weights(averaged: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the averaged weights towards the model's by 1 - keep."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)


@torch.no_grad()
def sample(model: Denoiser, noise: Tensor, ids: Tensor, empty: Tensor, steps: int,
           guidance: float) -> Tensor:
    """DDIM without fresh noise (Song et al. 2020), with guidance (Ho & Salimans 2022).

    noise (B, C, h, w), ids (B, L) of the prompts, empty (1, L) of "" -> latents (B, C, h, w).
    guidance 1 is none.  As Stable Diffusion has it, the timesteps are 1, 1 + 1000 // steps, ...,
    and the last step ends with timestep 0's share of signal, not with all of it.
    """
    shares, stride, x = signal_shares(), TIMESTEPS // steps, noise
    for t in [1 + i * stride for i in reversed(range(steps))]:
        now, then = shares[t], shares[max(t - stride, 0)]
        both = model(torch.cat([x, x]), torch.full((2 * len(x),), t),
                     torch.cat([empty.expand_as(ids), ids]))
        without, with_text = both.chunk(2)
        guess = without + guidance * (with_text - without)
        clean = (x - (1 - now).sqrt() * guess) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * guess
    return x
