"""What a checkpoint carries to the Hub beside its weights: its recipe without this machine's paths,
and the model card, best/README.md.
"""
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from tasks import TASKS
from tasks.captioned import CAPTIONS
from tasks.flags import show
from tasks.recipes import Recipe

LOCAL = "a local copy"  # of a recipe's backbone, UNet or first stage: instead of its path
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
KEPT = ("dataset", "backbone", "unet", "init", "schedule", "precision", "val_split",
        "split_by")  # texts of a recipe that are no paths
MADE = ("shapes", "folder")  # data sets that are rendered here, or the user's own
PIPELINES = {"seg": "image-segmentation", "depth": "depth-estimation",
             "pose": "keypoint-detection", "refer": "image-segmentation"}  # the Hub's words
METHODS = {"meta-prompts": "Meta Prompts (Wan et al. 2023, arXiv:2312.14733)",
           "vpd": "VPD (Zhao et al. 2023, arXiv:2303.02153)"}
ANSWERS = {  # task -> (the third line of use, what it gives)
    "seg": ('labels = model.predict("photo.jpg")', "class numbers, (H, W) uint8"),
    "depth": ('metres = model.predict("photo.jpg")', "(H, W) float32"),
    "pose": ('people = model.predict("photo.jpg", boxes=[[10, 20, 100, 200]])',
             "left, top, width, height"),
    "refer": ('mask = model.predict("photo.jpg", sentence="the left dog")', "(H, W) bool"),
}
LICENCES = {  # whether the weights are all ours -> (licence, what its user must know)
    True: ("mit", "The backbone started from random weights or from the small model that was "
           "pretrained here: nothing of Stable Diffusion's weights is in it."),
    False: ("creativeml-openrail-m", "Fine-tuned from pretrained weights.  Those of Stable "
            "Diffusion 1.x are under the CreativeML OpenRAIL-M licence, whose use restrictions "
            "pass on to this model.  The data set has terms of its own."),
}
CARD = """---
{data}
---
# {method}: {task}, {dataset}

Trained with `train.py` of Meta Prompts in plain PyTorch, whose folder is FOLDER.

```python
import torch
model = torch.hub.load("FOLDER", "metaprompts", "OWNER/MODEL", source="local")
{line}  # {gives}
```

{metrics}, by this protocol:
{protocol}.

{note}

Recipe:
```json
{recipe}
```
"""


def shareable(recipe: Recipe) -> Recipe:
    """The recipe as it may leave this machine: every text that may be a path has its default.

    Backbone and UNet stay if they are the Hub's or "tiny", else they are "a local copy", as is a
    first stage.
    """
    def without_paths(settings) -> dict:
        """Defaults of the texts that may be paths."""
        return {field.name: field.default for field in fields(settings)
                if isinstance(getattr(settings, field.name), str)
                and getattr(settings, field.name) != CAPTIONS and field.name not in KEPT}

    def public(source: str | None) -> str | None:
        """A source that others have, too, else LOCAL."""
        on_hub = HUB_ID.fullmatch(source or "") and not Path(source).exists()
        return source if source in ("tiny", None) or on_hub else LOCAL

    return replace(recipe, **{**without_paths(recipe), "init_from": recipe.init_from and LOCAL},
                   files=replace(recipe.files, **without_paths(recipe.files)),
                   backbone=public(recipe.backbone), unet=public(recipe.unet))


def is_ours(recipe: Recipe) -> bool:
    """Whether nothing of Stable Diffusion's weights is in the model; of a first stage's backbone,
    or a UNet from elsewhere, nothing is known.
    """
    others = recipe.init_from or recipe.unet
    return (recipe.backbone == "tiny" or recipe.init == "random") and not others


def model_card(recipe: Recipe, metrics: dict | None = None, step: int = 0) -> str:
    """Text of best/README.md, from the metrics on the validation set after a step, if known.

    Only figures are told, and none that is not a number or negative, which means that nothing was
    there to be counted.
    """
    licence, note = LICENCES[is_ours(recipe)]
    protocol = [f"{name} {show(value)}" for name, value in protocol_of(recipe).items()]
    recipe = shareable(recipe)
    figures = {name: value for name, value in (metrics or {}).items()
               if isinstance(value, float) and math.isfinite(value) and value >= 0}
    told = f"Metrics on the validation set after step {step}: " \
        + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    line, gives = ANSWERS[recipe.task]
    return CARD.format(
        data=front_matter(recipe, licence, figures).to_yaml(), method=METHODS[recipe.method],
        task=recipe.task, dataset=recipe.dataset, line=line, gives=gives, note=note,
        metrics=told if figures else "Not evaluated here; to be asked",
        protocol=", ".join(protocol), recipe=json.dumps(asdict(recipe), indent=2))


def protocol_of(recipe: Recipe) -> dict:
    """Everything that the metrics depend on but the model."""
    files = {name: value for name, value in vars(recipe.files).items()
             if name in ("val_split", "split_by", "own_size", "val_scenes")}
    if hasattr(recipe.files, "boxes"):
        files["boxes"] = "detected" if recipe.files.boxes else "annotated"
    return {**vars(recipe.protocol), "crop": (recipe.crop, recipe.crop_width or recipe.crop),
            **files}


def front_matter(recipe: Recipe, licence: str, figures: dict[str, float]) -> ModelCardData:
    """What the Hub reads of the card: https://huggingface.co/docs/hub/model-cards."""
    known = recipe.dataset not in MADE
    bases = [source for source in (recipe.backbone, recipe.unet)
             if source not in ("tiny", LOCAL, None)]
    named = recipe.init != "random" and not recipe.init_from
    results = [EvalResult(task_type=PIPELINES[recipe.task], dataset_type=recipe.dataset,
                          dataset_name=f"{recipe.dataset}, validation", metric_type=name,
                          metric_value=round(value, 6)) for name, value in figures.items()]
    return ModelCardData(
        license=licence, library_name="metaprompts", pipeline_tag=PIPELINES[recipe.task],
        tags=[recipe.method, recipe.task], metrics=[TASKS[recipe.task].METRIC[0]],
        datasets=[recipe.dataset.split("-")[0].rstrip("+")] if known else None,
        base_model=(bases if named else None) or None,
        model_name=f"{recipe.method} {recipe.task} {recipe.dataset}", eval_results=results or None)
