"""Names of classes or scenes -> text embeddings, (N, D): what a model is prompted with.

VPD's released matrices (class_embeddings) are of two kinds, both of the pooled state at the end
token, after the final norm, neither projected nor normalised:
    segmentation   one sentence per class, such as "a photo of a chair"; norms of 27.5 to 28.9
    depth          the mean over CLIP's 80 sentences for ImageNet; norms of 21.5 to 23.4, for a mean
                   is shorter than what it is made of
The script for the first was never released; its authors describe it (wl-zhao/VPD, issues 8 and 22).
"""
import torch
from torch import Tensor

from ops.errors import InputError
from vpd.text import TextEncoder, Tokenizer

ONE = ("a photo of a {}",)
# Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": the
# sentences by which CLIP was tried on ImageNet.
IMAGENET = (
    "a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.",
    "a photo of the hard to see {}.", "a low resolution photo of the {}.", "a rendering of a {}.",
    "graffiti of a {}.", "a bad photo of the {}.", "a cropped photo of the {}.",
    "a tattoo of a {}.", "the embroidered {}.", "a photo of a hard to see {}.",
    "a bright photo of a {}.", "a photo of a clean {}.", "a photo of a dirty {}.",
    "a dark photo of the {}.", "a drawing of a {}.", "a photo of my {}.", "the plastic {}.",
    "a photo of the cool {}.", "a close-up photo of a {}.", "a black and white photo of the {}.",
    "a painting of the {}.", "a painting of a {}.", "a pixelated photo of the {}.",
    "a sculpture of the {}.", "a bright photo of the {}.", "a cropped photo of a {}.",
    "a plastic {}.", "a photo of the dirty {}.", "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.", "a photo of the {}.", "a good photo of the {}.",
    "a rendering of the {}.", "a {} in a video game.", "a photo of one {}.", "a doodle of a {}.",
    "a close-up photo of the {}.", "a photo of a {}.", "the origami {}.", "the {} in a video game.",
    "a sketch of a {}.", "a doodle of the {}.", "a origami {}.", "a low resolution photo of a {}.",
    "the toy {}.", "a rendition of the {}.", "a photo of the clean {}.", "a photo of a large {}.",
    "a rendition of a {}.", "a photo of a nice {}.", "a photo of a weird {}.",
    "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.", "a sketch of the {}.",
    "a embroidered {}.", "a pixelated photo of a {}.", "itap of the {}.",
    "a jpeg corrupted photo of the {}.", "a good photo of a {}.", "a plushie {}.",
    "a photo of the nice {}.", "a photo of the small {}.", "a photo of the weird {}.",
    "the cartoon {}.", "art of the {}.", "a drawing of the {}.", "a photo of the large {}.",
    "a black and white photo of a {}.", "the plushie {}.", "a dark photo of a {}.", "itap of a {}.",
    "graffiti of the {}.", "a toy {}.", "itap of my {}.", "a photo of a cool {}.",
    "a photo of a small {}.", "a tattoo of the {}.")
AT_ONCE = 64  # sentences through the encoder


def sentences_of(name: str, templates: tuple[str, ...]) -> list[str]:
    """A name in each template; underscores are spaces."""
    return [template.format(name.replace("_", " ")) for template in templates]


def tokenize(names: tuple[str, ...], templates: tuple[str, ...], tokenizer: Tokenizer,
             length: int) -> list[Tensor]:
    """Ids (templates, length) of every name; InputError for a name that does not fit whole."""
    for name in names:
        longest = max(len(tokenizer.encode(text)) for text in sentences_of(name, templates)) + 2
        if longest > length:
            raise InputError(f"the name '{name:.40}' of {len(name.split())} words makes a sentence "
                             f"of {longest} tokens: this text encoder reads {length}")
    return [tokenizer(sentences_of(name, templates), length) for name in names]


@torch.no_grad()
def embed(ids: list[Tensor], encoder: TextEncoder) -> Tensor:
    """(N, D) float32 from each name's ids (templates, length): the mean of their pooled states."""
    states = [encoder(chunk)[1] for chunk in torch.cat(ids).split(AT_ONCE)]
    return torch.cat(states).reshape(len(ids), -1, states[0].shape[1]).mean(dim=1)


def embed_names(names: tuple[str, ...], templates: tuple[str, ...], source: str) -> Tensor:
    """(N, D) of names by the text encoder of a source (vpd/text.py); InputError if it has none, or
    a name is too long.
    """
    tokenizer = Tokenizer.from_pretrained(source)
    encoder = TextEncoder.from_pretrained(source)
    length = min(tokenizer.length, encoder.config.max_position_embeddings)
    return embed(tokenize(names, templates, tokenizer, length), encoder.eval())
