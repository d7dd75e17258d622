"""The two methods, Meta Prompts (model.py) and VPD (vpd/model.py): which one a config, a folder or
one of the authors' files is of.

Both models are asked and trained alike.  VPD may read something beside the images, `text`: the
number of the scene's type (depth), a sentence's states (refer); see `text_of`.  So does Table 5's
comparison with captions (captioned.py).
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import model as meta_prompts
import vpd.model as vpd
from model import Config, MetaPromptModel
from ops.device import device_of
from ops.errors import InputError, read_json
from sets.nyu_kitti import SCENES
from tasks import captioned
from tasks.captioned import NO_CAPTION, CaptionConfig, CaptionModel
from vpd.model import VPDConfig, VPDModel
from vpd.prompts import IMAGENET, ONE, embed_names
from vpd.text import TextReader

METHODS = ("meta-prompts", "vpd")


def method_of(config: Config | VPDConfig) -> str:
    """"meta-prompts" or "vpd"."""
    return "vpd" if isinstance(config, VPDConfig) else "meta-prompts"


def kind_of(config: Config | VPDConfig) -> type[nn.Module]:
    """The model's class."""
    if isinstance(config, CaptionConfig):
        return CaptionModel
    return VPDModel if method_of(config) == "vpd" else MetaPromptModel


def config_kind(values) -> type:
    """The class of a config, by its JSON."""
    values = values if isinstance(values, dict) else {}
    if values.get("caption_prompts") is True:
        return CaptionConfig
    return VPDConfig if values.get("method") == "vpd" else Config


def read_config(path: Path) -> Config | VPDConfig:
    """config.json of either method; InputError naming the field that is wrong."""
    readers = {VPDConfig: vpd, CaptionConfig: captioned, Config: meta_prompts}
    return readers[config_kind(read_json(path))].read_config(path)


def load(folder: Path) -> MetaPromptModel | VPDModel:
    """What `save_pretrained` wrote into a folder, in evaluation mode; InputError if it is broken.
    """
    return kind_of(read_config(folder / "config.json")).from_pretrained(folder)


def load_official(path: Path, config: Config | VPDConfig) -> MetaPromptModel | VPDModel:
    """One of the authors' models; `config`, a recipe's, supplies what a depth file does not hold.

    InputError if it is of another task.
    """
    depth = config.task == "depth"
    names = ("max_depth", "resize_scale") if method_of(config) == "meta-prompts" else ("max_depth",)
    if depth:
        print(f"supplied   {({name: getattr(config, name) for name in names})}: the file does not "
              "hold them, the recipe does")
    if method_of(config) == "vpd":
        model = VPDModel.from_official(path, max_depth=config.max_depth)
        if depth and model.config.num_classes == len(SCENES):
            model.config = replace(model.config, class_names=SCENES)
    else:
        model = MetaPromptModel.from_official(path, max_depth=config.max_depth,
                                              resize_scale=config.resize_scale)
    if model.config.task != config.task:
        raise InputError(f"{path} is a model of task {model.config.task}, not {config.task}")
    return model


def compile_parts(model: nn.Module, backend="inductor") -> None:
    """Compile the encoder, the UNet's blocks and the neck, in place: T passes share their graphs,
    which are made in a T-th of the time of the whole model's.

    Every size is compiled anew, for a run has one crop: "dynamic" would make graphs of any size of
    all blocks but the first, as they have their code in common and not their sizes.
    """
    unet = model.unet
    for part in (model.vae, *unet.down_blocks, unet.mid_block, *unet.up_blocks, model.neck):
        part.compile(backend=backend, dynamic=False)


# ------------------------------------------------------------------------------------------------
# VPD's words

def new_vpd(config: VPDConfig, names: tuple[str, ...], source: str, embeddings: Tensor | None,
            unet: str | None) -> VPDModel:
    """A new model on the pretrained weights of `source`, its UNet of `unet` if that is given,
    prompted with `names`: classes (seg) or types of scenes (depth).

    Their embeddings (N, D) are the source's own text encoder's, as the released ones are made,
    unless they are given.  They are saved with the model, which needs no text encoder any more.
    """
    if config.task != "refer":
        config = replace(config, num_classes=len(names), class_names=names)
        if embeddings is None:
            templates = ONE if config.task == "seg" else IMAGENET
            embeddings = embed_names(names, templates, source)
    return VPDModel.from_stable_diffusion(config, source, embeddings, unet)


def with_reader(model: nn.Module, source: str) -> nn.Module:
    """The model; one that reads sentences gets what turns them into states, from `source`."""
    config, reads_captions = model.config, isinstance(model, CaptionModel)
    if config.task == "refer" or reads_captions:
        length = config.num_prompts if reads_captions else config.num_tokens
        model.reader = TextReader.from_pretrained(source, length)
        model.reader.encoder.to(device_of(model))
    return model


def text_of(model: nn.Module, samples: dict) -> Tensor | None:
    """What the model reads beside the images of a batch; None if nothing.

    A scene's type is told by the image's name, as in the official code; if one can't be told, the
    batch is read with the mean of all types.  InputError if a caption is missing.
    """
    config = model.config
    if isinstance(config, CaptionConfig):
        if "caption" not in samples:
            raise InputError(NO_CAPTION)
        return model.reader(samples["caption"])
    if config.task == "refer":
        return model.reader(samples["sentence"])
    if method_of(config) == "meta-prompts" or config.task == "seg":
        return None
    numbers = [scene_number(name, config.class_names) for name in samples["name"]]
    return None if None in numbers else torch.tensor(numbers, device=device_of(model))


def scene_number(name: str, scenes: tuple[str, ...]) -> int | None:
    """The first type that the image's folder and file name contain; None if none.

    So study_room is a study, office_kitchen a kitchen (official: depth/dataset/nyudepthv2.py).
    """
    path = Path(name)
    text = f"{path.parent.name}_{path.name}"
    return next((i for i, scene in enumerate(scenes) if scene in text), None)
