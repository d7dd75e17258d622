"""Pretrain a small Stable Diffusion on the embedded scenes, in three stages, each one command.

    python -m tools.pretrain autoencoder              RUN/vae.safetensors: image <-> latents
    python -m tools.pretrain diffusion                RUN/diffusion.safetensors: UNet, text encoder
    python -m tools.pretrain sample --prompt "two balls and a cone"           RUN/sample.png
    python -m tools.pretrain cache | export           latents for `diffusion` | the folder --export

Every command goes on where it was stopped, to the bit; more `--steps` continue a finished one.
RUN (--out) also holds settings.json, metrics.jsonl and pictures/.
"""
import argparse
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor, nn

from eval import check_folder
from ops.device import autocast, pick_precision
from ops.errors import InputError, run_command
from ops.settings import comments
from pretraining.bpe import save_tokenizer
from pretraining.cache import (load_cache, load_held_out, load_tokenizer, log, read_metrics,
                               read_shard, shard_path)
from pretraining.decoder import Autoencoder, autoencoder_loss
from pretraining.diffusion import TIMESTEPS, Denoiser, add_noise, average_weights, sample
from pretraining.export import check_place, export
from pretraining.settings import Settings, check_same, flag
from pretraining.start import images_seen, start_autoencoder, start_denoiser, start_tokenizer
from pretraining.state import check_steps, load_state, save_state, write_tensors
from pretraining.steps import generator, optimizer_of, set_rate
from sets.captions import captions
from sets.embedded import VAL_SEED
from sets.shapes import render_world
from unet import UNet, UNetConfig
from vae import VAEConfig
from tasks.flags import Parser, show, value_of
from vpd.text import TextConfig, TextEncoder, Tokenizer
from weights.checkpoint import write_json
from weights.files import assemble, read_tensors
from weights.runs import Lock

# Scenes for the tasks: training has seeds 2 k VAL_SEED + [0, VAL_SEED), k = 0, 1, ...; validation
# VAL_SEED + index.  From 3 VAL_SEED on for one VAL_SEED, neither has any.
FIRST_SCENE = 3 * VAL_SEED
HELD_OUT = FIRST_SCENE + VAL_SEED // 2  # first scene for this file's own figures
CPU = torch.device("cpu")  # where all of it runs


# ------------------------------------------------------------------------------------------------
# What the stages share

def save_grid(path: Path, rows: list[Tensor]) -> None:
    """Rows of images (B, 3, H, W) in [-1, 1] as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)       # (3, h, w)
    values = ((sheet + 1) * 127.5).round().clamp(0, 255).byte()
    Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)


def scenes(settings: Settings, first: int, count: int) -> tuple[Tensor, list[str]]:
    """Scenes from seed `first` on, (count, 3, H, W) uint8, and the captions, one after another."""
    images, texts = np.empty((count, settings.size, settings.size, 3), np.uint8), []
    for i in tqdm(range(count), desc="render", unit="scene", leave=False):
        scene, world = render_world(first + i, settings.size, settings.size)
        images[i] = scene.image
        texts += captions(scene, world, first + i, settings.captions)
    return torch.from_numpy(images).permute(0, 3, 1, 2), texts


def to_input(images: Tensor) -> Tensor:
    """uint8 RGB -> float32 in [-1, 1], in the layout that is fastest for convolutions here."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Stage 1: the autoencoder

def make_autoencoder(settings: Settings) -> Autoencoder:
    """Untrained, from the seed; the posterior starts narrow, else nothing is seen for long."""
    torch.manual_seed(settings.seed)
    model = Autoencoder(VAEConfig(settings.vae_channels, settings.layers, settings.latent_channels,
                                  settings.groups))
    nn.init.constant_(model.quant_conv.bias[settings.latent_channels:], -6.0)
    return model.to(memory_format=torch.channels_last)


def crops(settings: Settings, images: Tensor, draws: torch.Generator) -> Tensor:
    """A batch of random crops, half of them mirrored, (B, 3, crop, crop) in [-1, 1]."""
    room = settings.size - settings.crop + 1
    rows = torch.randint(len(images), (settings.vae_batch,), generator=draws).tolist()
    corners = torch.randint(room, (settings.vae_batch, 2), generator=draws).tolist()
    cut = [images[i, :, y:y + settings.crop, x:x + settings.crop]
           for i, (y, x) in zip(rows, corners)]
    return to_input(torch.stack([c.flip(-1) if i % 2 else c for i, c in enumerate(cut)]))


@torch.no_grad()
def judge_autoencoder(model: Autoencoder, images: Tensor) -> tuple[dict, Tensor]:
    """PSNR in dB and the latents' spread on uint8 images; their reconstructions from the mean."""
    inputs = to_input(images)
    latents = model(inputs)
    ours = torch.cat([model.decode(z) for z in latents.split(16)]).clamp(-1, 1)
    errors = ((ours - inputs) / 2).square().mean(dim=(1, 2, 3))          # of values 0..1, (B,)
    return {"psnr": -10 * errors.log10().mean().item(), "latent_std": latents.std().item(),
            "posterior_std": (0.5 * model.posterior(inputs)[1]).exp().mean().item()}, ours


def train_autoencoder(settings: Settings) -> None:
    """Stage 1, resumable; at the end the latents are given mean 0 and spread 1 per channel."""
    run = Path(settings.out)
    model = make_autoencoder(settings)
    optimizer = optimizer_of(settings, model)
    path = run / "autoencoder.safetensors"
    done = load_state(path, {"vae": model}, optimizer)
    check_steps(done, settings.vae_steps, "--vae-steps", path)
    if (run / "vae.safetensors").exists() and list(run.glob("latents/*.safetensors")):
        if done < settings.vae_steps:
            raise InputError(f"{run}/latents is of the autoencoder after {done or 'other'} steps: "
                             f"delete it to go on to --vae-steps {settings.vae_steps}")
        return                                           # not even by a rounding another one
    held_out, _ = scenes(settings, HELD_OUT, 64)
    images, _ = scenes(settings, FIRST_SCENE, settings.vae_scenes * (done < settings.vae_steps))
    bar = tqdm(range(done, settings.vae_steps), initial=done, total=settings.vae_steps,
               desc="autoencoder")
    for step in bar:
        draws = generator(settings, step)
        set_rate(optimizer, settings, step, settings.vae_steps)
        loss = autoencoder_loss(model, crops(settings, images, draws), settings.kl,
                                settings.gradients, draws)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.vae_steps:
            save_state(path, step + 1, {"vae": model}, optimizer)
            values, ours = judge_autoencoder(model, held_out)
            log(settings, stage="autoencoder", step=step + 1, loss=loss.item(), **values)
            bar.set_postfix(values)
            save_grid(run / "pictures" / "autoencoder.png", [to_input(held_out[:8]), ours[:8]])
    finish_autoencoder(settings, model, judged_scenes(settings))


def judged_scenes(settings: Settings) -> Tensor:
    """Images of held-out scenes for the finished autoencoder's figures."""
    return scenes(settings, HELD_OUT, min(256, settings.held_out))[0]


@torch.no_grad()
def finish_autoencoder(settings: Settings, model: Autoencoder, images: Tensor) -> None:
    """Write RUN/vae.safetensors: latents of mean 0 and spread 1, so that scaling_factor is 1."""
    latents = torch.cat([model(to_input(part)) for part in images.split(32)])
    model.absorb(latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    write_tensors(Path(settings.out) / "vae.safetensors", model.state_dict())
    log_autoencoder(settings, model, images)


def log_autoencoder(settings: Settings, model: Autoencoder, images: Tensor) -> None:
    """The line of metrics.jsonl that a card needs: figures, and where the weights are from."""
    source = {"start": Path(settings.start).name, "before": images_seen(settings.start)} \
        if settings.start else {}
    log(settings, stage="vae", **source, **judge_autoencoder(model, images)[0])


# ------------------------------------------------------------------------------------------------
# Latents and captions

def load_autoencoder(settings: Settings) -> Autoencoder:
    """RUN/vae.safetensors, frozen; of a new run with `start`, that folder's."""
    path = Path(settings.out) / "vae.safetensors"
    if settings.start and not path.exists():
        take_over(settings)
    if not path.exists():
        raise InputError(f"{path} does not exist: run `python -m tools.pretrain autoencoder` first")
    model = make_autoencoder(settings)
    loaded = assemble(Autoencoder, model.config, read_tensors(path), path)
    model.load_state_dict(loaded.state_dict())
    return model.requires_grad_(False).eval()


def load_start(settings: Settings) -> Autoencoder:
    """The autoencoder of `start`; InputError if it or the networks there are of other sizes."""
    if list(Path(settings.out).glob("latents/*.safetensors")):
        raise InputError(f"{settings.out}/latents is of another autoencoder: delete it, or give "
                         "another --out")
    model = make_autoencoder(settings)
    start_autoencoder(settings.start, model)
    start_denoiser(settings.start, make_denoiser(settings, settings.start)[0])
    return model


def take_over(settings: Settings) -> None:
    """Begin a run with the autoencoder and tokenizer of `start`."""
    model, run = load_start(settings), Path(settings.out)
    start_tokenizer(settings.start, run)
    log_autoencoder(settings, model, judged_scenes(settings))
    write_tensors(run / "vae.safetensors", model.state_dict())   # last: the run has begun


@torch.no_grad()
def write_shard(settings: Settings, model: Autoencoder, path: Path, first: int, count: int) -> None:
    """Posterior means (count, C, h, w), in float16, and caption ids (count, captions, tokens).

    Stable Diffusion learns from draws of the posterior; ours is narrow, and perception reads means.
    """
    images, texts = scenes(settings, first, count)
    folder = Path(settings.out)
    if not (folder / "tokenizer" / "special_tokens_map.json").exists():
        if list(path.parent.glob("*.safetensors")):
            raise InputError(f"{folder}/tokenizer is incomplete, and its ids are in {path.parent}: "
                             "copy it from an export of the run, or delete both")
        save_tokenizer(folder / "tokenizer", texts, settings.merges, settings.tokens)
    ids = load_tokenizer(settings.out, settings.tokens)(texts)
    latents = torch.cat([model(to_input(part)) for part in images.split(64)])
    write_tensors(path, {"latents": latents.half(),
                         "ids": ids.view(count, settings.captions, -1).int()})


def make_cache(settings: Settings) -> None:
    """RUN/latents/: the missing ones of the files that `diffusion` reads; the last one of a run
    with fewer `scenes` is made again.
    """
    with Lock(Path(settings.out), ".cache.lock"):
        (folder := Path(settings.out) / "latents").mkdir(parents=True, exist_ok=True)
        model = load_autoencoder(settings)
        for first in tqdm(range(0, settings.scenes, settings.shard), desc="cache", unit="file"):
            path, count = shard_path(settings, first), min(settings.shard, settings.scenes - first)
            if not path.exists() or len(read_shard(settings, path, settings.shard)["ids"]) < count:
                write_shard(settings, model, path, FIRST_SCENE + first, count)
            if not (folder / "held_out.safetensors").exists():
                write_shard(settings, model, folder / "held_out.safetensors", HELD_OUT,
                            settings.held_out)


# ------------------------------------------------------------------------------------------------
# Stage 2: diffusion

def diffusion_loss(model: Denoiser, latents: Tensor, ids: Tensor, settings: Settings,
                   tokenizer: Tokenizer, draws: torch.Generator) -> Tensor:
    """Mean squared error of the noise predicted for a random batch; timesteps evenly spread."""
    B = settings.batch
    rows = torch.randint(len(latents), (B,), generator=draws)
    texts = ids[rows, torch.randint(ids.shape[1], (B,), generator=draws)].long()
    dropped = torch.rand(B, generator=draws) < settings.drop
    texts = torch.where(dropped[:, None], tokenizer([""]), texts)
    timesteps = ((torch.arange(B) + torch.rand(B, generator=draws)) * (TIMESTEPS / B)).long()
    clean = latents[rows].float()
    noise = torch.randn(clean.shape, generator=draws)
    with autocast(CPU, pick_precision("auto", CPU)):
        guess = model(add_noise(clean, noise, timesteps), timesteps, texts)
    return F.mse_loss(guess.float(), noise)


@torch.no_grad()
def judge_diffusion(model: Denoiser, latents: Tensor, ids: Tensor) -> dict:
    """Loss on held-out scenes by quarter of the timesteps, and with others' captions."""
    draws = torch.Generator().manual_seed(0)
    timesteps = torch.randperm(len(latents), generator=draws) * TIMESTEPS // len(latents)
    clean = latents.float()
    noise = torch.randn(clean.shape, generator=draws)
    noisy, losses = add_noise(clean, noise, timesteps), []
    for texts in (ids[:, 0].long(), ids[:, 0].roll(1, 0).long()):
        guess = torch.cat([model(*part) for part in
                           zip(noisy.split(64), timesteps.split(64), texts.split(64))])
        losses.append((guess - noise).square().mean(dim=(1, 2, 3)))
    quarter = timesteps * 4 // TIMESTEPS
    return {"held_out": losses[0].mean().item(),
            "quarters": [round(losses[0][quarter == i].mean().item(), 4) for i in range(4)],
            "wrong_captions": losses[1].mean().item()}


def make_denoiser(settings: Settings, folder: str) -> tuple[Denoiser, Tokenizer]:
    """Untrained model for the tokenizer of a folder, and that tokenizer."""
    tokenizer = load_tokenizer(folder, settings.tokens)
    torch.manual_seed(settings.seed)
    unet = UNet(UNetConfig(settings.unet_channels, settings.layers, settings.heads, settings.width,
                           settings.latent_channels, settings.groups))
    text_encoder = TextEncoder(TextConfig(
        len(tokenizer.vocabulary), settings.width, 4 * settings.width, settings.text_layers,
        settings.heads, settings.tokens))
    return Denoiser(unet, text_encoder), tokenizer


def train_diffusion(settings: Settings) -> None:
    """Stage 2, resumable; every `save_every` steps a checkpoint, figures, pictures, an export."""
    run, vae = Path(settings.out), load_autoencoder(settings)
    if not shard_path(settings, 0).exists() or not (run / "latents/held_out.safetensors").exists():
        make_cache(settings)
    latents, ids = load_cache(settings)
    held_out = load_held_out(settings)
    if not read_metrics(run, "vae"):                     # killed when it was to be written
        log_autoencoder(settings, vae, judged_scenes(settings))
    model, tokenizer = make_denoiser(settings, settings.out)
    if settings.start and not (run / "diffusion.safetensors").exists():
        start_denoiser(settings.start, model)
    averaged = deepcopy(model).requires_grad_(False)
    optimizer = optimizer_of(settings, model)
    parts = {"model": model, "averaged": averaged}
    done = load_state(run / "diffusion.safetensors", parts, optimizer)
    check_steps(done, settings.steps, "--steps", run / "diffusion.safetensors")
    bar = tqdm(range(done, settings.steps), initial=done, total=settings.steps, desc="diffusion")
    losses, since = [], time.process_time()
    for step in bar:
        set_rate(optimizer, settings, step, settings.steps)
        loss = diffusion_loss(model, latents, ids, settings, tokenizer, generator(settings, step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = 1.0 if settings.start else (step + 1) / (step + 10)  # random weights are forgotten
        average_weights(averaged, model, min(settings.average, fresh))
        losses.append(loss.item())
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            save_state(run / "diffusion.safetensors", step + 1, parts, optimizer)
            log(settings, stage="diffusion", step=step + 1, images=(step + 1) * settings.batch,
                loss=sum(losses) / len(losses), scenes=len(latents),
                seconds=time.process_time() - since, **judge_diffusion(averaged, *held_out))
            draw(settings, run / "pictures" / "samples.png", list(PROMPTS) * 2, averaged, vae,
                 tokenizer)
            export_run(settings, averaged, vae)
            losses, since = [], time.process_time()
            if len(latents) < settings.scenes:                   # `cache` may still be at work
                latents, ids = load_cache(settings)


# ------------------------------------------------------------------------------------------------
# Stage 3: samples and the exported folder

PROMPTS = ("two balls and a cone", "a red ball on checkered ground under a blue sky",
           "a person in a green shirt and blue trousers seen from behind",
           "a large yellow box on the left and a person", "two people on a striped floor",
           "a purple cylinder in front of a cone under a cloudy sky",
           "a person with both arms up", "three boxes on gray ground")


@torch.no_grad()
def draw(settings: Settings, path: Path, prompts: list[str], model: Denoiser, vae: Autoencoder,
         tokenizer: Tokenizer) -> None:
    """Two rows of pictures of the prompts, from the same noise every time, as a PNG."""
    side, draws = settings.size // 8, torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(len(prompts), settings.latent_channels, side, side, generator=draws)
    latents = sample(model, noise, tokenizer(prompts), tokenizer([""]), settings.sample_steps,
                     settings.guidance)
    save_grid(path, list(vae.decode(latents).clamp(-1, 1).chunk(2)))


def load_run(settings: Settings) -> tuple[Denoiser, Autoencoder, Tokenizer]:
    """Averaged model, autoencoder, tokenizer of a run; InputError if one is missing or broken."""
    path = Path(settings.out) / "diffusion.safetensors"
    if not path.exists():
        raise InputError(f"{path} does not exist: run `python -m tools.pretrain diffusion` first")
    averaged, tokenizer = make_denoiser(settings, settings.out)
    load_state(path, {"averaged": averaged})
    return averaged, load_autoencoder(settings), tokenizer


def sample_prompt(settings: Settings) -> None:
    """Stage 3: RUN/sample.png, eight pictures for one prompt."""
    draw(settings, Path(settings.out) / "sample.png", [settings.prompt] * 8, *load_run(settings))
    print(f"wrote {settings.out}/sample.png")


@torch.no_grad()
def export_run(settings: Settings, model: Denoiser, vae: Autoencoder) -> None:
    """Write the averaged model, its text states of spread 1, in Stable Diffusion's layout."""
    run = Path(settings.out)
    judged, lines = read_metrics(run, "vae"), read_metrics(run, "diffusion")
    if not judged or not lines:
        raise InputError(f"{run}/metrics.jsonl lacks the figures of "
                         f"{'`diffusion`' if judged else 'the autoencoder'}: there is no card")
    model = deepcopy(model)
    model.absorb(model.text_encoder(load_held_out(settings)[1][:, 0].long())[0].std().item())
    export(Path(settings.export), asdict(settings), model.unet, vae, model.text_encoder,
           run / "tokenizer", judged[-1], lines)


def export_last(settings: Settings) -> None:
    """Export the last checkpoint."""
    export_run(settings, *load_run(settings)[:2])
    print(f"wrote {settings.export}")


STAGES = {"autoencoder": train_autoencoder, "cache": make_cache, "diffusion": train_diffusion,
          "sample": sample_prompt, "export": export_last}


def parse(arguments: list[str] | None) -> tuple[str, Settings]:
    """Stage and settings from the command line; every field of `Settings` is a flag."""
    parser, explained = Parser(__doc__), comments(Settings)
    parser.add_argument("stage", choices=STAGES)
    for field in fields(Settings):
        text = f"{explained[field.name]} [{show(field.default)}]".replace("%", "%%")
        many = "+" if isinstance(field.default, tuple) else None
        parser.add_argument(flag(field.name), nargs=many, default=argparse.SUPPRESS, metavar="X",
                            help=text)
    given = vars(parser.parse_args(arguments))
    stage = given.pop("stage")
    return stage, Settings(**{name: value_of(Settings(), name, words, flag(name))
                              for name, words in given.items()})


def check(stage: str, settings: Settings) -> None:
    """InputError for what the stage can't do with this run, before anything is written."""
    run, place = Path(settings.out), Path(settings.export)
    if settings.start and stage == "autoencoder":
        raise InputError("--start: the autoencoder is that folder's: run `cache` or `diffusion`")
    if (run / "recipe.json").exists():
        raise InputError(f"--out {run} holds a run of train.py")
    check_same(settings, run / "settings.json")
    if stage in ("diffusion", "export"):
        check_place(place, asdict(settings))
        if place.resolve() in (run.resolve(), *run.resolve().parents):
            raise InputError(f"--export {place} would replace --out {run}: give another folder")
        check_folder("--export", settings.export)
    if stage in ("sample", "export"):
        load_run(settings)
    elif settings.start and not (run / "vae.safetensors").exists():
        load_start(settings)
    elif stage != "autoencoder":
        load_autoencoder(settings)
    check_folder("--out", settings.out)


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    stage, settings = parse(arguments)
    check(stage, settings)
    alone = stage not in ("cache", "sample")             # these may run beside `diffusion`
    with Lock(Path(settings.out)) if alone else nullcontext():
        if stage not in ("sample", "export"):
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            write_json(Path(settings.out) / "settings.json", asdict(settings))
        STAGES[stage](settings)


if __name__ == "__main__":
    run_command(main)
