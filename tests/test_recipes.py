"""Recipes: the published numbers, the schedules, and recipe.json read back.

    pytest tests/test_recipes.py
"""
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ops.errors import InputError
from tasks.flags import resolve
from tasks.recipes import RECIPES, ROWS, find_recipe, lr_factor, read_recipe

EVERY = {(method, *key): row for method, rows in ROWS.items() for key, row in rows.items()}
KEYS = pytest.mark.parametrize("key", EVERY, ids="-".join)


def test_learning_rate_meets_the_golden_values():
    """Linear decay over 80,000 steps under a 1,500-step warm-up, as mmcv computes it."""
    paper = RECIPES["seg", "ade20k"]
    golden = {0: 8.000000000230046e-11, 1: 5.34126123340009e-08, 750: 3.9625039625000005e-05,
              1499: 7.844866605233402e-05, 1500: 7.85e-05, 1501: 7.849900000000001e-05,
              40000: 4e-05, 79999: 9.999999999976695e-10}
    for step, lr in golden.items():
        assert paper.lr * lr_factor(step, paper) == pytest.approx(lr, rel=1e-9), step


@pytest.mark.parametrize("dataset,per_epoch", [("nyu", 1009), ("kitti", 965)])
def test_depth_learning_rate_meets_the_golden_values(dataset, per_epoch):
    """Up to the end of epoch 12, down to epoch 24, then the minimum; power 0.9."""
    golden = json.loads((Path(__file__).parent / "golden" / "depth.json").read_text())["depth_lr"]
    recipe = RECIPES["depth", dataset]
    assert recipe.iterations == 25 * per_epoch
    if dataset == "nyu":
        for step, lr in golden["values"].items():
            found = recipe.lr * lr_factor(int(step) - 1, recipe)
            assert found == pytest.approx(lr, rel=1e-9), step


def test_pose_learning_rate_falls_in_steps():
    """mmpose: linear warm-up from a thousandth over 500 steps, x 0.1 after epochs 170 and 200."""
    recipe, epoch = RECIPES["pose", "coco"], 2341
    expected = {0: 1e-3, 499: 1.0, 170 * epoch - 1: 1.0, 170 * epoch: 0.1, 200 * epoch: 0.01,
                210 * epoch - 1: 0.01}
    assert {step: pytest.approx(lr_factor(step, recipe)) for step in expected} == expected


def test_the_ade20k_recipe_is_the_papers():
    """Tables 2 and 6 and the released configuration, field by field."""
    paper = RECIPES["seg", "ade20k"]
    assert (paper.lr, paper.weight_decay, paper.batch, paper.warmup) == (8e-5, 1e-3, 16, 1500)
    assert (paper.model.num_prompts, paper.model.refine_steps) == (150, 3)
    assert (paper.iterations, paper.crop, paper.unet_lr_mult) == (80_000, 512, 0.1)
    protocol = paper.protocol
    assert (protocol.scale, protocol.window, protocol.stride) == ((2048, 512), 512, 341)
    assert protocol.at_once == 1


@KEYS
def test_every_row_resolves(tmp_path, key):
    """Method, task and data set are enough; what is added follows from the row."""
    words = ["--method", key[0], "--task", key[1], "--dataset", key[2]]
    row, (recipe, resumed) = EVERY[key], resolve([*words, "--out", str(tmp_path / "r")])
    assert not resumed and (row.method, row.task, row.dataset) == key
    row = replace(row, out=str(tmp_path / "r"))
    if getattr(row.protocol, "max_side", None) == 0:
        row = replace(row, protocol=replace(row.protocol, max_side=2 * row.crop))
    assert recipe == row
    assert (row.backbone == "tiny") == (row.dataset == "shapes")
    assert not getattr(row.model, "train_encoder", False)


def test_unknown_rows_are_refused_with_the_possible_ones():
    """Tasks first, then the data sets of the task."""
    with pytest.raises(InputError, match="--task flow is unknown for --method meta-prompts: choose "
                                         "from depth, pose, seg"):
        find_recipe("flow", "shapes")
    with pytest.raises(InputError, match="nyu is unknown for pose: .* shapes, folder, coco"):
        find_recipe("pose", "nyu")


# ------------------------------------------------------------------------------------------------
# recipe.json

@KEYS
def test_a_recipe_is_read_back(tmp_path, key):
    """recipe.json holds every setting, those of the data set and the protocol included."""
    path = tmp_path / "recipe.json"
    values = asdict(EVERY[key])
    path.write_text(json.dumps(values))
    assert read_recipe(path) == EVERY[key]
    del values["unet"]                                   # which older runs do not have
    path.write_text(json.dumps(values))
    assert read_recipe(path) == EVERY[key]


def spoiled(kind):
    """The text of a recipe.json with one defect."""
    values = json.loads(json.dumps(asdict(RECIPES["depth", "nyu"])))
    if kind == "row":
        values["dataset"] = "coco"
    elif kind == "field":
        values["protocol"]["window"] = 3
    elif kind == "gap":
        del values["files"]["val_list"]
    elif kind == "type":
        values["model"]["unet"]["layers"] = "two"
    elif kind == "no files":
        del values["files"]
    return {"list": "[1]", "broken": "{", "empty": "{}"}.get(kind) or json.dumps(values)


@pytest.mark.parametrize("kind, message", [
    ("list", "holds no JSON object"), ("empty", "is no recipe"), ("broken", "is not valid JSON"),
    ("row", "'depth' and 'coco', are no row of"), ("field", "protocol: unknown field 'window'"),
    ("gap", "files lacks the field val_list"), ("no files", "files must be an object"),
    ("type", "model: unet: layers is 'two', but should be an integer")])
def test_a_spoiled_recipe_is_refused_by_name(tmp_path, kind, message):
    """The line names the file, the part, the field and what would be right."""
    path = tmp_path / "recipe.json"
    path.write_text(spoiled(kind))
    with pytest.raises(InputError) as error:
        read_recipe(path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_without_weights_is_of_an_older_version(tmp_path):
    """They were float32."""
    values = asdict(RECIPES["seg", "shapes"])
    del values["weights"]
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    assert read_recipe(tmp_path / "recipe.json") == RECIPES["seg", "shapes"]


def test_weights_in_bfloat16_are_multiplied_in_it(tmp_path):
    """Where the precision is left open, it follows; float32 is refused."""
    flags = ["--weights", "bfloat16", "--out", str(tmp_path)]
    assert resolve(flags)[0].precision == "bfloat16"
    with pytest.raises(InputError, match="--precision float32: weights held in bfloat16 are"):
        resolve([*flags, "--precision", "float32"])


def test_an_older_flat_recipe_is_refused_with_what_to_do(tmp_path):
    """Its settings stood beside each other: the line says how its model is used all the same."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"task": "seg", "dataset": "shapes", "lr": 1e-3, "crop": 64}))
    with pytest.raises(InputError, match="older version.* evaluate best/ with --dataset and --data"
                                         f".*--init-from {tmp_path}$"):
        read_recipe(path)
    with pytest.raises(InputError, match="older version"):
        resolve(["--resume", str(tmp_path)])


@pytest.mark.parametrize("written, read", [(False, "off"), (True, "on"), ("auto", "auto")])
def test_an_older_recipe_says_compile_as_a_bool(tmp_path, written, read):
    """false is off, so that such a run goes on as it was."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**asdict(RECIPES["seg", "shapes"]), "compile": written}))
    assert read_recipe(path) == replace(RECIPES["seg", "shapes"], compile=read)
