"""Read an exported model; begin a pretraining run with one instead of random weights."""
import re
import shutil
from dataclasses import fields
from pathlib import Path

from torch import nn

from ops.errors import InputError, read_object
from pretraining.decoder import Autoencoder
from pretraining.diffusion import Denoiser
from unet import UNet
from vae import VAEEncoder
from vpd.text import TextEncoder
from weights.checkpoint import remove
from weights.files import assemble, find_files, read_tensors


def fill(module: nn.Module, config, loaded: nn.Module, where: str) -> None:
    """Give `module` the values of `loaded`, whose sizes are `config`; InputError unless they agree.
    """
    for field in fields(module.config):
        ours, theirs = (getattr(c, field.name) for c in (module.config, config))
        if ours != theirs:
            raise InputError(f"--start {where}: {field.name} is {theirs}, of this run {ours}")
    module.load_state_dict(loaded.state_dict())


def read_autoencoder(folder: str, flag: str) -> Autoencoder:
    """The autoencoder of an exported folder; InputError if it is no such folder."""
    if not Path(folder).is_dir():
        raise InputError(f"{flag} {folder} is no folder: one that `export` wrote")
    sizes = VAEEncoder.from_pretrained(folder).config
    values, path = find_files(folder, "vae")
    if (factor := read_object(values).get("scaling_factor")) != 1.0:
        raise InputError(f"{values}: scaling_factor is {factor}, `export` writes 1.0")
    return assemble(Autoencoder, sizes, read_tensors(path), path)


def start_autoencoder(folder: str, model: Autoencoder) -> None:
    """Give `model` the autoencoder of an exported folder; InputError if it is another one."""
    loaded = read_autoencoder(folder, "--start")
    fill(model, loaded.config, loaded, f"{folder}/vae")


def start_denoiser(folder: str, model: Denoiser) -> None:
    """The same for UNet and text encoder."""
    for part, module, kind in (("unet", model.unet, UNet),
                               ("text_encoder", model.text_encoder, TextEncoder)):
        loaded = kind.from_pretrained(folder)
        fill(module, loaded.config, loaded, f"{folder}/{part}")


def start_tokenizer(folder: str, run: Path) -> None:
    """Copy the tokenizer; what a killed copy left is replaced."""
    run.mkdir(parents=True, exist_ok=True)
    remove(run / "tokenizer")
    shutil.copytree(Path(folder) / "tokenizer", run / "tokenizer")


def images_seen(folder: str) -> int:
    """How many images an exported model has been trained on, by its card; 0 if that is not said."""
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return sum(int(n.replace(",", "")) for n in re.findall(r"(\d[\d,]*) images seen", text))
