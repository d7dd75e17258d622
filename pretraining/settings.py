"""What a pretraining run is made of."""
import typing
from dataclasses import dataclass
from pathlib import Path

from ops.errors import InputError, read_object
from ops.settings import checked


@dataclass(frozen=True)
class Settings:
    """Everything that a run is made of; each field is a flag of tools/pretrain.py."""

    out: str = "runs/tiny-sd"  # folder of the run
    start: str = ""  # exported folder that a new run starts from, as weights/tiny-sd
    seed: int = 0  # of weights, order and noise; the scenes are the same for all seeds
    size: int = 128  # pixels; side of the scenes
    # Autoencoder
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)  # levels 1/1, 1/2, 1/4, 1/8
    latent_channels: int = 16  # 4 in Stable Diffusion
    vae_scenes: int = 8192  # rendered at the start and kept in memory
    crop: int = 64  # pixels; side of the crops that the autoencoder is trained on
    vae_batch: int = 16  # crops per step
    vae_steps: int = 4000  # the last `decay` share of them with a falling rate
    kl: float = 1e-6  # weight of the latents' divergence from N(0, 1), per latent value
    gradients: float = 1.0  # weight of the L1 error of differences between neighbouring pixels
    # Latents and captions, made once
    scenes: int = 61440  # rendered and encoded; `cache` may still be at work in `diffusion`
    shard: int = 2048  # scenes per file; the tokenizer is learnt from the first one's captions
    captions: int = 4  # per scene
    held_out: int = 512  # scenes for the figures
    tokens: int = 32  # per caption, start and end counted; 77 in Stable Diffusion
    merges: int = 1000  # of the tokenizer, at most
    # Diffusion
    unet_channels: tuple[int, ...] = (64, 64, 96, 96)  # 1/8 to 1/64; c0 a multiple of 16
    heads: int = 2  # at every level; 8 in Stable Diffusion
    width: int = 64  # of the text encoder, and so of what cross-attention reads
    text_layers: int = 2  # 12 in Stable Diffusion
    batch: int = 48  # latents per step; from 32 to 64 the optimiser's share of time halves
    steps: int = 100_000  # the last `decay` share of them with a falling rate
    drop: float = 0.1  # share of captions replaced by the empty one, for guidance
    average: float = 0.9995  # share of the averaged weights that stays in a step
    guidance: float = 3.0  # of samples: 1 is none
    sample_steps: int = 25  # of DDIM
    prompt: str = "two balls and a cone"  # of `sample`
    export: str = "weights/tiny-sd"  # folder of the exported model
    # Shared by both networks
    groups: int = 8  # of every GroupNorm; 32 in Stable Diffusion
    layers: int = 1  # residual blocks per level; 2 in Stable Diffusion
    muon_lr: float = 0.02  # of the matrices
    lr: float = 2e-3  # AdamW, of norms, biases and embeddings
    warmup: int = 100  # steps until the full rate
    decay: float = 0.3  # last share of the steps, in which the rate falls to 0
    # Habits
    save_every: int = 500  # steps between checkpoints, metrics and pictures

    def __post_init__(self):
        for name, hint in typing.get_type_hints(Settings).items():
            checked(hint, getattr(self, name), flag(name), name)
        if self.size % 64 or not 16 <= self.crop <= self.size or self.crop % 8:
            raise InputError(f"--size {self.size} must be a multiple of 64, and --crop {self.crop} "
                             "one of 8 up to it")
        for name, divisor in (("vae_channels", "groups"), ("unet_channels", "groups"),
                              ("unet_channels", "heads"), ("width", "heads")):
            check_multiples(self, name, divisor)
        if self.width % 16 or self.unet_channels[0] % 16:
            raise InputError(f"--width {self.width}, --unet-channels {self.unet_channels}: the "
                             "width and the first of the channels are multiples of 16")


# What the files of a run were made of: the rest, rates and habits, may change between commands.
FIXED = ("start", "seed", "size", "vae_channels", "latent_channels", "shard", "captions",
         "held_out", "tokens", "merges", "unet_channels", "heads", "width", "text_layers", "batch",
         "groups", "layers")


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def check_multiples(settings: Settings, name: str, divisor: str) -> None:
    """InputError unless a width, or the four of them, are multiples of the field `divisor`."""
    widths, number = getattr(settings, name), getattr(settings, divisor)
    widths, four = (widths, "four ") if isinstance(widths, tuple) else ((widths,) * 4, "")
    if len(widths) != 4 or any(width % number for width in widths):
        raise InputError(f"{flag(name)} {getattr(settings, name)}: {four}multiples of "
                         f"{flag(divisor)} {number}")


def check_same(settings: Settings, path: Path) -> None:
    """InputError if `path`, the settings.json of a run, has another value of what is FIXED."""
    for name, old in (read_object(path) if path.exists() else {}).items():
        old = tuple(old) if isinstance(old, list) else old
        if name in FIXED and old != getattr(settings, name):
            raise InputError(f"{path} has {name} {old}, this command {getattr(settings, name)}: "
                             f"give the same {flag(name)}, or another --out")
