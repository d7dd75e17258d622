"""The authors' models at a tiny width: their weights drawn by name, see the fixtures' README."""
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

from model import MetaPromptModel

UNET_OUT = "unet.unet.diffusion_model.out."
NOISE_SCHEDULE = (  # buffers that the authors' segmentation files also hold
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2")


def draw(name: str, shape: list[int], seed: int) -> Tensor:
    """One official tensor: a function of its name, the shape and the seed."""
    canonical = re.sub(r"cross_unet_conv\d\.", UNET_OUT, name)
    generator = torch.Generator().manual_seed((zlib.crc32(canonical.encode()) + seed) % 2 ** 32)
    r = torch.randn(shape, generator=generator)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if name.endswith("running_mean"):
        return 0.1 * r
    if re.fullmatch(r"(encoder\.)?(meta_prompts\d?|t\d|class_embeddings)", name):
        return r
    if len(shape) <= 1:
        return 0.1 * r + (1 if name.endswith("weight") else 0)
    return r / r[0].numel() ** 0.5


def official_file(info: dict, path: Path, prefix: str = "") -> Path:
    """Write the tensors of a fixture as the authors do: wrapped, aliased, with extra buffers."""
    state = {prefix + n: draw(n, s, info["seed"]) for n, s in info["state"].items()}
    if info["task"] == "depth":
        torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}}, path)
        return path
    state.update({f"{prefix}sd_model.{name}": torch.zeros(1000) for name in NOISE_SCHEDULE})
    meta = {"CLASSES": ("a", "b"), "iter": 80000, "env": {"lr": torch.tensor(8e-5).numpy()[()]}}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {}}, path)
    return path


def load_fixture(info: dict, folder: Path) -> MetaPromptModel:
    """Our model of a fixture, through a file in the authors' layout."""
    return MetaPromptModel.from_official(
        official_file(info, folder / f"{info['task']}.pth"),
        max_depth=info.get("max_depth", 10.0), resize_scale=info.get("resize_scale", 1))
