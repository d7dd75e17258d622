"""What several test files share: random weights, relative errors, the diffusers oracles.

Whether two computations are the same is asked in float64.  There rounding is 1e-14 of the largest
value on any processor, for any order of summation, so that ROUNDING is far above all of it and far
below any mistake: an epsilon of 1e-6 in place of 1e-5 is 1e-6.
"""
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

ROUNDING = 1e-10  # in float64
LEVELS = (32, 64, 96, 128)  # tiny widths, all different so that a swapped level can't hide


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, norms too: default norms (1, 0) hide mistakes of order and epsilon."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return module.eval()


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference over the oracle's largest absolute value."""
    assert ours.shape == oracle.shape, f"{tuple(ours.shape)} is not {tuple(oracle.shape)}"
    return ((ours - oracle).abs().max() / oracle.abs().max()).item()


def diffusers_unet(channels=LEVELS, heads: int = 8, context_dim: int = 48, layers: int = 2,
                   groups: int = 32, latents: int = 4):
    """diffusers' UNet with SD1.5's configuration, at the given width, random weights."""
    return randomise(UNet2DConditionModel(
        block_out_channels=channels, attention_head_dim=heads, cross_attention_dim=context_dim,
        layers_per_block=layers, norm_num_groups=groups, in_channels=latents, out_channels=latents,
        sample_size=64))


def diffusers_vae(channels=LEVELS, layers: int = 2, groups: int = 32, latents: int = 4):
    """diffusers' AutoencoderKL with SD1.5's configuration, at the given width, random weights."""
    return randomise(AutoencoderKL(
        block_out_channels=channels, latent_channels=latents, layers_per_block=layers,
        norm_num_groups=groups,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4))


class KeepMaps:
    """Attention processor of diffusers that keeps the probabilities' mean over the heads."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (
            attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        probs = attn.get_attention_scores(q, k)                            # (B * heads, L, N)
        self.map = probs.unflatten(0, (-1, attn.heads)).mean(dim=1)        # (B, L, N)
        return attn.to_out[0](attn.batch_to_head_dim(probs @ v))


def mapped_features(unet: UNet2DConditionModel, latents, t, context) -> tuple:
    """(four features, map per level 0, 1, 2) of diffusers' UNet: per level the mean over its
    cross-attentions, finest first.
    """
    before, levels = unet.attn_processors, {0: [], 1: [], 2: []}
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            module.set_processor(KeepMaps())
            side, number = name.split(".")[:2]
            if side != "mid_block":
                level = int(number) if side == "down_blocks" else 3 - int(number)
                levels[level].append(module.processor)
    _, features = hooked_features(unet, latents, t, context)
    maps = [torch.stack([kept.map for kept in levels[i]]).mean(dim=0).transpose(1, 2)
            .unflatten(2, features[i].shape[-2:]) for i in levels]
    unet.set_attn_processor(before)
    return features, maps


def hooked_features(unet: UNet2DConditionModel, latents, temb_or_t, context) -> tuple:
    """(output, four features) of diffusers' UNet, the features read by forward hooks."""
    taps = [unet.up_blocks[3].attentions[-1], unet.up_blocks[2].attentions[-2],
            unet.up_blocks[1].attentions[-2], unet.up_blocks[0].resnets[-2]]
    features = {}
    handles = []
    for i, module in enumerate(taps):
        def keep(module, inputs, output, i=i):
            features[i] = output if isinstance(output, Tensor) else output[0]
        handles.append(module.register_forward_hook(keep))
    output = unet(latents, temb_or_t, context).sample
    for handle in handles:
        handle.remove()
    return output, [features[i] for i in range(4)]
