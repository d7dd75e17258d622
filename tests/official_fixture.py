"""The authors' model at a tiny width: its weights drawn by name, as the fixtures' README says."""
import re
import zlib

import torch
from torch import Tensor

import official
import weights
from model import Config, MetaPromptModel

SEG_CONFIG = Config(num_prompts=32, num_classes=19, head_channels=64,
                    unet_channels=(32, 32, 64, 64), vae_channels=(32, 64, 128, 128))


def draw(name: str, shape: list[int], seed: int) -> Tensor:
    """One official tensor: a function of its name, the shape and the seed."""
    canonical = re.sub(r"cross_unet_conv\d\.", "unet.unet.diffusion_model.out.", name)
    generator = torch.Generator().manual_seed((zlib.crc32(canonical.encode()) + seed) % 2 ** 32)
    r = torch.randn(shape, generator=generator)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if name.endswith("running_mean"):
        return 0.1 * r
    if re.fullmatch(r"meta_prompts\d?|t\d", name):
        return r
    if len(shape) <= 1:
        return 0.1 * r + (1 if name.endswith("weight") else 0)
    return r / r[0].numel() ** 0.5


def seg_model(state: dict[str, list[int]], seed: int) -> MetaPromptModel:
    """Our model with the official tensors `state` (name -> shape), all of them used."""
    model = MetaPromptModel(SEG_CONFIG)
    ours = model.state_dict()
    tensors = {}
    for name, shape in state.items():
        target = official.our_name(name)
        if target is None:
            assert name.startswith(("encoder_vq.post_quant_conv", "sd_model.")), name
        elif " " in target:
            stacked, row = target.split()
            tensors.setdefault(stacked, ours[stacked].clone())[int(row)] = draw(name, shape, seed)
        else:
            tensors[target] = draw(name, shape, seed)
    vae = {k[4:]: v for k, v in tensors.items() if k.startswith("vae.")}
    tensors.update({f"vae.{k}": v for k, v in weights.modern_vae_attention(vae).items()})
    model.load_state_dict(tensors)
    return model
