"""What goes to the Hub with a model: a recipe without paths, and a card that the Hub can read.

    pytest tests/test_card.py
"""
import json
from dataclasses import asdict, fields, replace

import pytest
from huggingface_hub import ModelCard

from tasks import card
from tasks.recipes import RECIPES, VPD, read_recipe
from weights.files import SD15

ROWS = [*RECIPES.values(), *VPD.values()]
ADE = RECIPES["seg", "ade20k"]


def private(settings):
    """Every text of some settings that may be a path, and every field that may be a text, set to
    one of this machine.
    """
    return {field.name: f"/home/me/{field.name}" for field in fields(settings)
            if field.name not in card.KEPT and "str" in str(field.type)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method}-{row.task}-{row.dataset}")
def test_no_path_leaves_the_machine(row, tmp_path):
    """Whatever texts a recipe has: neither in recipe.json, which is still one, nor in the card."""
    recipe = replace(row, files=replace(row.files, **private(row.files)), **private(row))
    recipe = replace(recipe, backbone=str(tmp_path), unet=str(tmp_path))
    shared = card.shareable(recipe)
    text = json.dumps(asdict(shared)) + card.model_card(recipe, {"mIoU": 0.5}, 7)
    assert "/home" not in text and str(tmp_path) not in text
    assert shared.backbone == shared.unet == shared.init_from == card.LOCAL
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(shared)))
    assert read_recipe(tmp_path / "recipe.json") == shared
    assert (shared.model, shared.protocol, shared.lr) == (row.model, row.protocol, row.lr)


RAIL, ELSE = "creativeml-openrail-m", "owner/unet"


@pytest.mark.parametrize("changes, licence, bases", [
    ({"backbone": "tiny"}, "mit", None), ({"init": "random"}, "mit", None), ({}, RAIL, [SD15]),
    ({"init": "random-unet"}, RAIL, [SD15]), ({"unet": ELSE}, RAIL, [SD15, ELSE]),
    ({"backbone": "tiny", "init_from": "/home/me/first"}, RAIL, None),
    ({"backbone": "tiny", "unet": "."}, RAIL, None), ({"backbone": "."}, RAIL, None),
    ({"backbone": "/gone/sd.safetensors"}, RAIL, None)])
def test_the_licence_is_that_of_the_weights(changes, licence, bases):
    """Stable Diffusion's passes on, also from a recipe that was shared once; its repository is
    named, and a UNet's own.
    """
    recipe = replace(ADE, **changes)
    for made in (recipe, card.shareable(recipe)):
        data = ModelCard(card.model_card(made)).data
        assert (data.license, data.base_model) == (licence, bases)


@pytest.mark.parametrize("key, pipeline, line", [
    (("seg", "shapes"), "image-segmentation", 'labels = model.predict("photo.jpg")'),
    (("depth", "nyu"), "depth-estimation", 'metres = model.predict("photo.jpg")'),
    (("pose", "coco"), "keypoint-detection", "boxes=[["),
    (("refer", "refcoco+"), "image-segmentation", "sentence=")], ids=lambda key: "-".join(key)
    if isinstance(key, tuple) else "")
def test_the_hub_reads_the_card(tmp_path, key, pipeline, line):
    """Its front matter is read strictly: licence, library, pipeline, data, figures; a second time
    written it is the same.  The text has the recipe, the protocol and the three lines.
    """
    recipe = {**RECIPES, **VPD}[key]
    metrics = {"first": 0.123456789, "AP": -1.0, "nan": float("nan"), "IoU": [0.25], "images": 3}
    (tmp_path / "README.md").write_text(card.model_card(recipe, metrics, 7), encoding="utf-8")
    read = ModelCard.load(tmp_path / "README.md")
    data = read.data.to_dict()
    assert data["library_name"] == "metaprompts" and data["pipeline_tag"] == pipeline
    assert data["tags"] == [recipe.method, recipe.task] and len(data["metrics"]) == 1
    assert data.get("datasets") == {"nyu": ["nyu"], "coco": ["coco"],
                                    "refcoco+": ["refcoco"]}.get(key[1])
    result, = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("first", 0.123457)
    assert result.task_type == pipeline and key[1] in result.dataset_name
    assert str(ModelCard(str(read))) == str(read)
    for text in ("after step 7: first 0.1235, by this protocol", line, "torch.hub.load(",
                 f'"iterations": {recipe.iterations}', "at_once "):
        assert text in read.text


def test_a_card_without_metrics_says_so():
    """Nothing was evaluated, or nothing was there to be counted."""
    for metrics in (None, {"AP": -1.0}):
        read = ModelCard(card.model_card(ADE, metrics, 3))
        assert read.data.eval_results is None and "Not evaluated here" in read.text


def test_the_protocol_tells_whose_boxes_and_which_split():
    """Poses of detected people and of annotated ones are not to be compared."""
    coco = RECIPES["pose", "coco"]
    for boxes, word in ((None, "boxes annotated"), ("/home/me/b.json", "boxes detected")):
        made = replace(coco, files=replace(coco.files, boxes=boxes))
        assert word in card.model_card(made, {"AP": 0.5}, 1)
    assert "val_split val" in card.model_card(VPD["refer", "refcoco"], {"oIoU": 0.5}, 1)
