"""Caption prompts, the paper's comparison in Table 5: a model that reads words about each image.

In place of N prompts for all images it has, for each, the states of the N tokens of its caption,
padding included.  As label prompts, they go through a trained adapter; all else is model.py's.  It
is a class of its own because the method is to need no words: model.py takes none.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from model import Config, MetaPromptModel
from ops.errors import InputError, read_json
from ops.settings import from_dict
from weights.files import load_model, modern_config

CAPTIONS = "captions"  # as --prompts, in place of a file
NO_CAPTION = ("the model reads a caption of each image: only the embedded scenes of segmentation "
              "and depth (--dataset shapes) have one")


@dataclass(frozen=True)
class CaptionConfig(Config):
    """num_prompts is the number of tokens of a caption."""

    caption_prompts: bool = True  # tells this config.json from those of model.py


class CaptionModel(MetaPromptModel):
    """model(images, text=text), model(images, target, text): see `forward`.

    `reader`, which makes text of captions, is no part of it (tasks/methods.py).
    """

    text: Tensor | None = None  # while a batch is read

    def context(self, step: int) -> Tensor:
        """The prompts of pass `step`, (B, N, D); InputError if there is no caption."""
        if self.text is None:
            raise InputError(NO_CAPTION)
        row = 0 if self.config.shared_prompts else step
        return self.adapters[row](self.text) if self.config.prompt_adapter else self.text

    def forward(self, images: Tensor, target: Tensor | None = None, text: Tensor | None = None):
        """RGB in [0, 1] and the captions' states (B, N, D) -> as MetaPromptModel's.

        With k times as many images, such as windows and mirror images, the captions come k times.
        """
        self.text = None if text is None else text.repeat(len(images) // len(text), 1, 1)
        try:
            return super().forward(images, target)
        finally:
            self.text = None

    def loss(self, images: Tensor, target: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses of a batch; their sum is what training minimises."""
        return self(images, target, text)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "CaptionModel":
        """As MetaPromptModel's."""
        return load_model(cls, read_config, str(source))


def read_config(path: Path) -> CaptionConfig:
    """config.json -> CaptionConfig; InputError naming the field that is wrong."""
    values = modern_config(read_json(path), asdict(CaptionConfig()))
    return from_dict(CaptionConfig, values, str(path))
