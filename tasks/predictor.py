"""A trained model in one's own program: what torch.hub.load gives (hubconf.py), what eval.py asks.

    model = Predictor.from_pretrained("runs/seg-shapes")        a run, a saved model, OWNER/NAME
    labels = model.predict("photo.jpg")                         what eval.py --image writes
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from model import Config
from ops.device import autocast, device_of, pick_device, pick_precision, to_batch
from ops.errors import InputError
from ops.settings import checked
from sets.coco import read_box
from sets.files import load_image, to_rgb
from tasks import TASKS, depth, methods, pose, refer, seg
from tasks.recipes import Recipe, check_model, find_recipe, read_recipe
from weights.files import find_model, upload_model


class Predictor:
    """A model and the recipe it was trained by, which says how to ask it.

    `predict` is no method of the models: model.py and vpd/model.py are the papers, tensors in and
    tensors out.  Protocols and pictures of any size are the tasks', which know the models, and not
    the other way round.  So `model` is a MetaPromptModel or VPDModel in evaluation mode, `recipe`
    its Recipe, `dtype` the precision of its passes, `folder` where its files are.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, dtype: torch.dtype, folder: Path):
        self.model, self.recipe, self.dtype, self.folder = model, recipe, dtype, folder

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "auto",
                        precision: str = "auto") -> "Predictor":
        """A run folder, a folder that holds a saved model, or OWNER/NAME on the Hub.

        device: auto, cpu, cuda; precision: auto, float32, bfloat16; auto as eval.py has it.
        Raises InputError for what eval.py refuses.
        """
        checked(str, precision, "precision", "precision")
        device, place = pick_device(device), Path(source).expanduser()
        folder = find_checkpoint(str(place), "the model") if place.is_dir() \
            else find_model(str(source))
        model = methods.load(folder)
        recipe = recipe_of(folder, model.config, pictures=True)
        recipe = with_max_side(replace(recipe, model=model.config))
        methods.with_reader(model.to(device), recipe.backbone)
        return cls(model, recipe, pick_precision(precision, device), folder)

    def predict(self, image, boxes: list | None = None, sentence: str | None = None):
        """The task's answer for a picture, at its own size: what eval.py --image writes.

        image     a file, a Pillow image, or an array (H, W, 3) uint8 RGB
        boxes     pose: of people, [left, top, width, height] or COCO's detections; none: one person
                  fills the image
        sentence  refer: which object is meant
        Returns   seg    (H, W) uint8, class numbers
                  depth  (H, W) float32, metres
                  pose   COCO's results, best first: dicts of "keypoints" (17 x (x, y, score)),
                         "score", "bbox", "category_id"
                  refer  (H, W) bool, on the object
        Raises InputError for an image, box or sentence that is none.
        """
        image, model, recipe = as_array(image), self.model, self.recipe
        ready = self.check(boxes, sentence)
        if recipe.task == "seg":
            return seg.predict_labels(model, image, recipe.protocol, self.dtype)
        if recipe.task == "depth":
            return depth.predict_metres(model, image, recipe, self.dtype)
        if recipe.task == "refer":
            return refer.predict_mask(model, image, ready, recipe, self.dtype)
        return pose.predict_people(model, image, pose.image_boxes(image, Path(), ready), recipe,
                                   self.dtype)

    @torch.no_grad()
    def features(self, image, boxes: list | None = None,
                 sentence: str | None = None) -> list[Tensor]:
        """The backbone's features of a picture as the model gets it in one piece (of the best box,
        for pose): 4 x (1, C_i, h_i, w_i), finest first; see the model's `features`.
        """
        ready, recipe = self.check(boxes, sentence), self.recipe
        view = TASKS[recipe.task].view(as_array(image), Path(), recipe, ready)
        x = to_batch(view, device_of(self.model))
        text = [self.model.reader([ready])] if recipe.task == "refer" else []
        with autocast(x.device, self.dtype):
            return self.model.features(x, *text)

    def check(self, boxes: list | None, sentence: str | None):
        """What the task is asked with besides the image: boxes by image, a sentence, or nothing;
        InputError for what does not fit.
        """
        task = self.recipe.task
        if boxes is not None and task != "pose" or sentence is not None and task != "refer":
            raise InputError(f"the model's task is {task}: boxes are for pose, a sentence is for "
                             "refer")
        if task == "refer":
            asked = replace(self.recipe.protocol, sentence=sentence)
            return refer.prepare(replace(self.recipe, protocol=asked), None)
        return None if boxes is None else {Path().as_posix(): list(map(as_box, boxes))}

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the checkpoint, its card and recipe included, to OWNER/NAME, which is made if it
        is not there; returns the commit's address.  InputError if a file is missing or the Hub
        refuses.
        """
        return upload_model(self.folder, repo_id, private)


def as_array(image) -> np.ndarray:
    """A file, a Pillow image or an array as (H, W, 3) uint8 RGB; InputError for anything else."""
    if isinstance(image, (str, Path)):
        return load_image(Path(image).expanduser())
    if isinstance(image, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        except (OSError, ValueError) as error:
            raise InputError(f"the image of mode {image.mode} can't be read: {error}") from None
    shape = getattr(image, "shape", ())
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or len(shape) != 3 \
            or shape[2] != 3 or 0 in shape:
        kind = getattr(image, "dtype", type(image).__name__)
        raise InputError(f"an image is a file, a Pillow image or an array (H, W, 3) of uint8, not "
                         f"{kind} of shape {tuple(shape)}")
    return image


def as_box(box) -> dict:
    """A box as `sets.coco.read_box` has it; InputError naming one that is none."""
    try:
        entry = box if isinstance(box, dict) else {"bbox": np.asarray(box, float).tolist()}
    except (TypeError, ValueError):
        entry = {"bbox": box}
    read = read_box({"file_name": "image", **entry}, f"box {box!r:.60}")
    if read is None:
        raise InputError(f"box {box!r:.60} is of another category than person")
    return read


# ------------------------------------------------------------------------------------------------
# Which model, which recipe

def find_checkpoint(run: str, flag: str = "--checkpoint") -> Path:
    """Folder of a run's model: RUN/best, else RUN/last, else RUN itself; or InputError.

    The .previous ones are there while, or after, a save was killed.
    """
    places = [Path(run) / name for name in ("best", "best.previous", "last", "last.previous", "")]
    for folder in places:
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise InputError(f"{flag} {run}: neither it nor its best/ or last/ holds a config.json and a "
                     "model.safetensors")


def recipe_of(folder: Path, config: Config, dataset: str | None = None,
              pictures: bool = False) -> Recipe:
    """The recipe of the run that a model is part of, or the one that it carries; else, or for
    another `dataset`, that row.

    A model without one, asked for pictures, predicts them whole, as those of a user's folder.
    """
    files = [place / "recipe.json" for place in (folder.parent, folder)]
    file = next((file for file in files if file.is_file()), None)
    if file:
        recipe = read_recipe(file)
        if dataset in (None, recipe.dataset):
            check_model(recipe, file, config, folder)
            return recipe
    elif dataset is None and not pictures:
        raise InputError(f"{folder} is not part of a run, whose recipe.json would say the data "
                         "set: give --dataset")
    return find_recipe(config.task, dataset or "folder", methods.method_of(config))


def with_max_side(recipe: Recipe) -> Recipe:
    """The recipe with a bound for the user's own pictures, which a row leaves open."""
    if getattr(recipe.protocol, "max_side", None) == 0:
        recipe = replace(recipe, protocol=replace(recipe.protocol, max_side=2 * recipe.crop))
    return recipe
