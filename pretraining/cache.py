"""What the stages leave for each other in the folder of a run, read with every file checked."""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ops.errors import InputError
from ops.settings import fits
from pretraining.settings import Settings
from vpd.text import BYTES, WORD_END, Tokenizer

MAKE = "run `python -m tools.pretrain cache`"


def read_shard(settings: Settings, path: Path, most: int) -> dict[str, Tensor]:
    """Latents (n, C, h, w) and ids (n, captions, tokens) of a file of RUN/latents, n <= `most`.

    InputError if it is damaged, or made with other settings.
    """
    try:
        shard = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and {MAKE}") from None
    side = settings.size // 8
    wanted = {"latents": (settings.latent_channels, side, side),
              "ids": (settings.captions, settings.tokens)}
    counts = {len(tensor) if tensor.ndim else 0 for tensor in shard.values()}
    found = {name: tuple(tensor.shape[1:]) for name, tensor in shard.items()}
    if found != wanted or len(counts) != 1 or not 0 < max(counts) <= most:
        raise InputError(f"{path} holds {sorted(counts)} scenes of {found}, these settings make "
                         f"{most} of {wanted}: give those of the run, or delete {path.parent} and "
                         f"{MAKE}")
    if not shard["latents"].isfinite().all():
        raise InputError(f"{path} holds values that are not finite: delete it and {MAKE}")
    return shard


def shard_path(settings: Settings, first: int) -> Path:
    """File of the scenes from number `first` on."""
    return Path(settings.out) / "latents" / f"{first:08d}.safetensors"


def load_cache(settings: Settings) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, w) and ids (N, captions, tokens) of those `scenes` that have been made."""
    latents, ids = [], []
    for first in range(0, settings.scenes, settings.shard):
        if (path := shard_path(settings, first)).exists():
            shard = read_shard(settings, path, settings.shard)
            latents.append(shard["latents"][:settings.scenes - first])
            ids.append(shard["ids"][:settings.scenes - first])
    return torch.cat(latents), torch.cat(ids)


def load_held_out(settings: Settings) -> tuple[Tensor, Tensor]:
    """The same of the held-out scenes."""
    path = Path(settings.out) / "latents" / "held_out.safetensors"
    shard = read_shard(settings, path, settings.held_out)
    return shard["latents"], shard["ids"]


def load_tokenizer(folder: str, tokens: int) -> Tokenizer:
    """Tokenizer of FOLDER/tokenizer; InputError if it is damaged or not of that many tokens."""
    where = f"{folder}/tokenizer"
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
        words = tokenizer.vocabulary
        single = {character + end for character in BYTES.values() for end in ("", WORD_END)}
        sound = (sorted(words.values()) == list(range(len(words))) and single <= words.keys()
                 and all(len(pair) == 2 and "".join(pair) in words for pair in tokenizer.ranks))
    except InputError as error:
        raise InputError(f"{where} is damaged ({error}): copy it from an export of the run"
                         ) from None
    except (AttributeError, OSError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{where} is damaged: copy it from an export of the run")
    if tokenizer.length != tokens:
        raise InputError(f"{where}: model_max_length is {tokenizer.length}, --tokens {tokens}")
    return tokenizer


FIGURES = {  # that a line of a stage must have, for the card
    "autoencoder": ("step",), "vae": ("psnr",),
    "diffusion": ("step", "images", "scenes", "seconds", "held_out", "wrong_captions"),
}


def read_metrics(run: Path, stage: str) -> list[dict]:
    """The lines of a stage in RUN/metrics.jsonl; left out are those that a crash tore, and those
    that lack a figure.
    """
    path, found = run / "metrics.jsonl", []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (RecursionError, ValueError):
            continue
        if isinstance(line, dict) and line.get("stage") == stage \
                and all(fits(float, line.get(name)) for name in FIGURES[stage]) \
                and fits(tuple[float, ...], line.get("quarters", ())):
            found.append(line)
    return found


def log(settings: Settings, **values) -> None:
    """Append a line to metrics.jsonl, behind one that a crash tore."""
    path = Path(settings.out) / "metrics.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(values) + "\n")
