"""Evaluation, the command: which model, which protocol, which files, and what is refused.

    pytest tests/test_eval.py
"""
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from helpers import command, noise, read_png, refused, save_image, write_run
from PIL import Image

import eval as evaluation
from model import MetaPromptModel
from ops.errors import InputError
from ops.settings import comments
from sets import shapes
from sets.embedded import COLOURS
from sets.files import load_label
from tasks import TASKS, methods
from tasks.flags import show
from tasks.recipes import RECIPES, read_recipe

MADE = {"seg": ("labels", "overlay"), "depth": ("depth", "depth_colour"), "pose": ("people",)}
CPU = ("--device", "cpu", "--precision", "float32", "--workers", 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder per task: untrained tiny models on the embedded scenes."""
    folder = tmp_path_factory.mktemp("runs")
    for task in MADE:
        write_run(task, folder / task)
    return folder


def asked(monkeypatch, *words):
    """Run eval.py's main with these words, on the CPU."""
    command(evaluation.main, monkeypatch, *words, *CPU)


# ------------------------------------------------------------------------------------------------
# Which model, which settings

@pytest.mark.parametrize("key", RECIPES, ids="-".join)
def test_protocols_in_words(key):
    """A line per field: its name, its value and what it means."""
    protocol = RECIPES[key].protocol
    head, *lines = evaluation.in_words(RECIPES[key]).splitlines()
    assert head == f"{key[0]} on {key[1]}"
    for line, (name, value) in zip(lines, vars(protocol).items(), strict=True):
        fields, why = line.split("  # ")
        assert fields.strip().split(maxsplit=1) == [name, show(value)]
        assert len(why) > 5 and why == comments(type(protocol))[name]


def test_the_protocol_is_said_and_nothing_done(runs, monkeypatch, capsys):
    """--protocol prints what would be done, flags and the other data set's row included."""
    asked(monkeypatch, "--checkpoint", runs / "seg", "--protocol", "--tta", "--dataset", "ade20k",
          "--stride", 300)
    out = capsys.readouterr().out
    words = {line.split()[0]: line.split("  #")[0].split()[1:] for line in out.splitlines()}
    assert words["scale"] == ["2048", "512"] and words["window"] == ["512"]
    assert words["stride"] == ["300"] and words["flip"] == ["True"]
    assert words["ratios"] == "0.5 0.75 1.0 1.25 1.5 1.75 2.0".split()
    assert "model  " not in out and not (runs / "seg" / "eval").exists()


def test_help_shows_the_runs_values(runs, monkeypatch, capsys):
    """Of the flags of its protocol and its data set; none of training, with --image none of data.
    """
    monkeypatch.setenv("COLUMNS", "300")
    shown = []
    for words in ([], ["--image", "x"]):
        with pytest.raises(SystemExit) as stop:
            asked(monkeypatch, "--checkpoint", runs / "seg", *words, "--help")
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert "to validate on [2]" in shown[0] and "twice the crop [128]" in shown[0]
    assert "--lr" not in shown[0] and "--val-scenes" not in shown[1] and "--window" in shown[1]


# ------------------------------------------------------------------------------------------------
# A labelled set

@pytest.mark.parametrize("task, metric, width", [("seg", "mIoU", 3 * 192), ("depth", "rmse", 768),
                                                 ("pose", "AP", 3 * 576)])
def test_a_set_is_evaluated(runs, tmp_path, monkeypatch, capsys, task, metric, width):
    """Says what it will do, prints the metrics, writes them and pictures; poses as COCO results."""
    asked(monkeypatch, "--checkpoint", runs / task, "--out", tmp_path / "o")
    out = capsys.readouterr().out
    assert f"model      {runs / task / 'best'}" in out and "2 scenes" in out
    assert metric in out and f"wrote {tmp_path / 'o' / 'metrics.json'}" in out
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["dataset"] == "shapes" and metric in report and report["images"] >= 2
    assert report["protocol"] == json.loads(json.dumps(vars(
        read_recipe(runs / task / "recipe.json").protocol)))
    assert read_png(tmp_path / "o" / "pictures.png").shape[1] == width
    assert (tmp_path / "o" / "keypoints.json").is_file() == (task == "pose")


def test_default_places_of_results():
    """RUN/eval, with boxes one per file of boxes; of pictures RUN/predictions."""
    def place(**given):
        args = Namespace(**{"checkpoint": "r", "image": None, "boxes": None, "out": None, **given})
        return str(evaluation.default_out(args, RECIPES["pose", "coco"], Path("r/best")))

    assert (place(), place(boxes="d/a.json")) == ("r/eval", "r/eval-a")
    assert (place(image="x"), place(out="o")) == ("r/predictions", "o")
    assert place(checkpoint=None) == "runs/official-coco"


def test_a_set_with_tta_and_flags(runs, monkeypatch, tmp_path):
    """Evaluation reports the 14 passes, and what flags changed, in its protocol."""
    asked(monkeypatch, "--checkpoint", runs / "seg", "--tta", "--at-once", 1, "--val-scenes", 1,
          "--out", tmp_path)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["protocol"]["ratios"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert report["protocol"]["flip"] and report["protocol"]["at_once"] == 1
    assert report["images"] == 1


def test_a_compiled_model_has_the_same_metrics(runs, monkeypatch, tmp_path):
    """--compile replaces the model's parts by their graphs, whose answers are the same."""
    graphs, make = [], methods.compile_parts
    monkeypatch.setattr(methods, "compile_parts", lambda model: make(
        model, lambda graph, inputs: graphs.append(graph) or graph))
    reports = []
    for flags in ((), ("--compile",)):
        assert not graphs
        asked(monkeypatch, "--checkpoint", runs / "seg", "--out", tmp_path / f"o{flags}", *flags)
        reports.append(json.loads((tmp_path / f"o{flags}" / "metrics.json").read_text()))
    assert reports[0] == reports[1] and len(graphs) > 5


def test_reports_are_strict_json(tmp_path):
    """nan, which JSON does not know, becomes null, in lists too."""
    evaluation.write_report(tmp_path / "new" / "m.json", {"a": float("nan"), "b": [1.5, np.nan]})
    assert json.loads((tmp_path / "new" / "m.json").read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, None]}
    assert evaluation.summary({"AP": 0.5, "AR": -1.0, "IoU": [1.0]}) == "AP 0.5000  AR n/a"


# ------------------------------------------------------------------------------------------------
# Your own pictures

def test_find_images(tmp_path):
    """Subfolders too, sorted, other files left out, and so are results of an earlier run inside."""
    for name in ("b/x.PNG", "a.jpg", "out/a_overlay.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    root, files = evaluation.find_images(str(tmp_path), tmp_path / "out")
    assert root == tmp_path and files == [Path("a.jpg"), Path("b/x.PNG")]
    assert evaluation.find_images(str(tmp_path / "b"), tmp_path)[1] == [Path("x.PNG")]
    assert evaluation.find_images(str(tmp_path / "a.jpg"), tmp_path) == (tmp_path, [Path("a.jpg")])
    (tmp_path / "out" / "a_overlay.png").unlink()
    with pytest.raises(InputError, match="out holds no image .*.jpg"):
        evaluation.find_images(str(tmp_path / "out"), tmp_path / "other")


@pytest.mark.parametrize("files, names", [
    (["a/x.png", "b/x.jpg"], ["a/x", "b/x"]),
    (["x.jpg", "x.png", "y.png"], ["x.jpg", "x.png", "y"]),
    (["x.jpg", "x.png", "x.png.jpg"], ["x.jpg", "x.png", "x.png.jpg"])])
def test_output_names_are_unique(files, names):
    """Relative paths are kept; the suffix stays where two files would share a name."""
    assert evaluation.output_names([Path(f) for f in files]) == [Path(n) for n in names]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a portrait, a landscape, a tiny, a 16-bit and a broken file; names collide."""
    folder = tmp_path_factory.mktemp("photos")
    save_image(folder / "a" / "x.png", noise(150, 90))
    save_image(folder / "b" / "x.jpg", noise(70, 200))
    save_image(folder / "b" / "x.png", noise(12, 20))
    save_image(folder / "deep.png", np.arange(80 * 70, dtype=np.uint16).reshape(80, 70) * 11)
    (folder / "broken.png").write_text("junk")
    return folder


SIZES = {"a/x": (150, 90), "b/x.jpg": (70, 200), "b/x.png": (12, 20), "deep": (80, 70)}


@pytest.mark.parametrize("task", MADE)
def test_a_folder(runs, photos, tmp_path, monkeypatch, capsys, task):
    """Every readable image gets its files, of its own size, under its own name; the rest is told.

    A file alone gives the very bytes that it gives among others.
    """
    everything, alone = tmp_path / "all", tmp_path / "one"
    asked(monkeypatch, "--checkpoint", runs / task, "--image", photos, "--out", everything)
    out = capsys.readouterr().out
    assert "images     5 in" in out and "images/s; 1 skipped" in out and "4 images in" in out
    assert f"skipped    {photos / 'broken.png'} cannot be decoded" in out
    files = {str(p.relative_to(everything)) for p in everything.rglob("*") if p.is_file()}
    wanted = {f"{name}_{kind}.png" for name in SIZES for kind in MADE[task]}
    assert files == wanted | ({"keypoints.json"} if task == "pose" else set())
    asked(monkeypatch, "--checkpoint", runs / task, "--image", photos / "a" / "x.png", "--out",
          alone)
    for kind in MADE[task]:
        assert ((alone / f"x_{kind}.png").read_bytes()
                == (everything / "a" / f"x_{kind}.png").read_bytes())
    if task == "pose":
        people = json.loads((everything / "keypoints.json").read_text())
        person, = json.loads((alone / "keypoints.json").read_text())
        assert [p["file_name"] for p in people] == ["a/x.png", "b/x.jpg", "b/x.png", "deep.png"]
        assert {**people[0], "file_name": "x.png"} == person and len(person["keypoints"]) == 51
    else:
        for name, size in SIZES.items():
            assert read_png(everything / f"{name}_{MADE[task][0]}.png").shape == size


def test_label_files_have_the_palette(runs, photos, tmp_path, monkeypatch):
    """Pixels are class numbers, coloured as in pictures."""
    asked(monkeypatch, "--checkpoint", runs / "seg", "--image", photos / "a" / "x.png", "--out",
          tmp_path)
    labels = load_label(tmp_path / "x_labels.png")
    with Image.open(tmp_path / "x_labels.png") as image:
        colours = np.array(image.convert("RGB"))
    assert labels.max() < 7 and np.array_equal(colours, np.array(COLOURS, np.uint8)[labels])


def test_the_model_gets_at_most_max_side_pixels(runs, photos, tmp_path, monkeypatch):
    """By default twice the run's crop; results have the image's size all the same."""
    shapes, forward = [], MetaPromptModel.forward

    def noting(model, images, *target):
        shapes.append(tuple(images.shape[-2:]))
        return forward(model, images, *target)

    monkeypatch.setattr(MetaPromptModel, "forward", noting)
    for words in ([], ["--max-side", 100]):
        asked(monkeypatch, "--checkpoint", runs / "depth", "--image", photos / "a" / "x.png",
              "--out", tmp_path, *words)
    assert shapes == [(128, 77)] * 2 + [(100, 64)] * 2
    assert read_png(tmp_path / "x_depth.png").shape == (150, 90)


def test_boxes_through_the_command(runs, photos, tmp_path, monkeypatch):
    """People are looked for in the boxes; an image without boxes has nobody and is still drawn."""
    (tmp_path / "boxes.json").write_text(json.dumps(
        {"b/x.jpg": [[10, 10, 50, 50], [100, 5, 60, 60]]}))
    asked(monkeypatch, "--checkpoint", runs / "pose", "--image", photos, "--out", tmp_path / "o",
          "--boxes", tmp_path / "boxes.json")
    found = json.loads((tmp_path / "o" / "keypoints.json").read_text())
    assert sorted(p["bbox"] for p in found) == [[10, 10, 50, 50], [100, 5, 60, 60]]
    assert {p["file_name"] for p in found} == {"b/x.jpg"}
    assert (tmp_path / "o" / "deep_people.png").is_file()


def test_a_model_without_a_run_predicts_pictures(runs, photos, tmp_path, monkeypatch, capsys):
    """Saved by --save, it carries its recipe and a card; results lie beside it."""
    model = tmp_path / "saved" / "model"
    asked(monkeypatch, "--checkpoint", runs / "depth", "--image", photos / "deep.png", "--out",
          tmp_path / "o", "--save", model)
    asked(monkeypatch, "--checkpoint", model, "--image", photos / "deep.png")
    assert "metres = value / 256" in capsys.readouterr().out
    beside = tmp_path / "saved" / "predictions" / "deep_depth.png"
    assert beside.read_bytes() == (tmp_path / "o" / "deep_depth.png").read_bytes()
    assert read_recipe(model / "recipe.json").dataset == "shapes"
    assert "Not evaluated here" in (model / "README.md").read_text()


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_labelled_images_have_any_size(runs, tmp_path, monkeypatch, task):
    """Down to a pixel, and several sizes at once: the figures are those of one image at a time."""
    for i, size in enumerate([(1, 1), (3, 5), (70, 80), (70, 80), (2, 90)]):
        save_image(tmp_path / "images" / "val" / f"{i}.png", noise(*size))
        label = np.full(size, i % 2, np.uint8) if task == "seg" else np.full(size, 5000, np.uint16)
        folder = tmp_path / {"seg": "labels", "depth": "depths"}[task]
        save_image(folder / "val" / f"{i}.png", label)
    (tmp_path / "classes.txt").write_text("\n".join(shapes.CLASSES))
    reports = []
    for at_once in (1, 2):
        asked(monkeypatch, "--checkpoint", runs / task, "--dataset", "folder", "--data", tmp_path,
              "--at-once", at_once, "--out", tmp_path / "o")
        reports.append(json.loads((tmp_path / "o" / "metrics.json").read_text()))
    for name in ("images", TASKS[task].METRIC[0]):
        assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-3)
    assert reports[0]["images"] == 5


# ------------------------------------------------------------------------------------------------
# Refused

def test_the_recipe_of_another_model_is_refused(runs, tmp_path, monkeypatch):
    """A recipe.json that was put beside a model by hand must describe it."""
    shutil.copytree(runs / "seg" / "best", tmp_path / "r" / "best")
    for named, value in (("num_prompts", 5), ("class_names", [])):
        values = json.loads((runs / "seg" / "recipe.json").read_text())
        values["model"][named] = value
        (tmp_path / "r" / "recipe.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=f"r.recipe.json disagree about {named}"):
            asked(monkeypatch, "--checkpoint", tmp_path / "r")
    shutil.copy(runs / "depth" / "recipe.json", tmp_path / "r" / "recipe.json")
    with pytest.raises(InputError, match="disagree about task"):
        asked(monkeypatch, "--checkpoint", tmp_path / "r")


@pytest.mark.parametrize("task, flags, message", [
    ("seg", ["--image", "nowhere"], "--image nowhere does not exist"),
    ("seg", ["--image", "EMPTY"], "holds no image"),
    ("seg", ["--image", "BAD"], "broken.png cannot be decoded"),
    ("seg", ["--image", "BADS"], "none of the 2 images can be read: .*a.png cannot"),
    ("seg", ["--image", "GOOD", "--out", "BAD"], "broken.png can't be written"),
    ("seg", ["--image", "EMPTY", "--out", "EMPTY"], "is the folder of the images"),
    ("seg", ["--image", "GOOD", "--max-side", "63"], "--max-side 63: 64 pixels or more"),
    ("seg", ["--max-side", "128"], "--max-side is about your own pictures"),
    ("seg", ["--image", "GOOD", "--export", "x"], "--export is about a labelled data set"),
    ("seg", ["--image", "GOOD", "--boxes", "x"], "--boxes x: seg on shapes takes none"),
    ("depth", ["--image", "GOOD", "--boxes", "x"], "--boxes x: depth on shapes takes none"),
    ("seg", ["--export", "BAD"], "--export .*broken.png can't be written"),
    ("seg", ["--save", ""], "--save is '': leave it out"),
    ("seg", ["--image", ""], "--image is '': leave it out"),
    ("seg", ["--out", "a\nb"], r"--out is 'a\\nb'"),
    ("seg", ["--tta", "--ratios", "1", "2"], "--ratios would do nothing: the recipe has --tta"),
    ("seg", ["--tta", "--no-flip"], "--flip would do nothing: the recipe has --tta"),
    ("seg", ["--scale", "512", "128"], "--scale would do nothing"),
    ("depth", ["--min-depth-eval", "9", "--max-depth-eval", "9"], "9: must be below --max-depth"),
    ("depth", ["--max-depth-eval", "0.1"], "no depth of the 2 labels checked is within"),
    ("seg", ["--boxes", "x"], "--boxes x: seg on shapes takes none"),
    ("seg", ["--image", "GOOD", "--dataset", "ade20k"], "predicts 7 classes.*ade20k has 150"),
    ("seg", ["--image", "GOOD", "--val-scenes", "1"], "--val-scenes is no flag of this command"),
    ("seg", ["--lr", "1"], "--lr is no flag of this command"),
    ("seg", ["--nms", "0.5"], "--nms is no setting of seg on shapes; it is one of pose on shapes"),
    ("seg", ["--stride", "32"], "--stride would do nothing: the recipe has no --window"),
    ("seg", ["--window", "64"], "--window 64 needs a --stride"),
    ("seg", ["--task", "depth"], "--task depth: the model's task is seg"),
    ("seg", ["--dataset", "coco"], "coco is unknown for seg: choose from shapes"),
    ("seg", ["--dataset", "ade20k"], "--data is missing"),
    ("depth", ["--image", "GOOD", "--tta"], "--tta is for segmentation"),
    ("depth", ["--flip", "3"], "3 stands alone"),
    ("pose", ["--image", "GOOD", "--max-side", "128"], "--max-side is no setting of pose"),
    ("seg", ["--image", "GOOD", "--at-once", "2"], "--at-once would do nothing"),
    ("depth", ["--image", "GOOD", "--box", "garg"], "--box would do nothing"),
    ("depth", ["--units", "10"], "--units is about exported maps: it needs --export or --image"),
    ("seg", ["--train-scenes", "9"], "--train-scenes is no flag of this command: it would do not"),
    ("pose", ["--no-augment"], "--no-augment is no flag of this command: it would do nothing"),
    ("seg", ["--protocol", "--save", "new"], "--protocol says what would be done and stops"),
    ("pose", ["--image", "GOOD", "--boxes", "JSON"], "no box for any of the 1 images")])
def test_what_is_refused(runs, photos, tmp_path, monkeypatch, task, flags, message):
    """One line that names the flag or file, before any prediction."""
    for folder in ("empty", "bads"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "bads" / name).write_text("junk")
    (tmp_path / "boxes.json").write_text(json.dumps({"other.png": [[1, 2, 3, 4]]}))
    places = {"EMPTY": tmp_path / "empty", "BAD": photos / "broken.png", "BADS": tmp_path / "bads",
              "GOOD": photos / "deep.png", "JSON": tmp_path / "boxes.json"}
    monkeypatch.chdir(tmp_path)
    if "--out" not in flags:
        flags = [*flags, "--out", "here"]
    with pytest.raises(InputError, match=message) as error:
        asked(monkeypatch, "--checkpoint", runs / task, *(places.get(f, f) for f in flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags,message", [
    ([], "give --checkpoint RUN, or --official FILE with --task and --dataset"),
    (["--official", "x.pth"], "give --checkpoint RUN, or --official FILE with --task"),
    (["--official", "x.pth", "--task", "depth", "--dataset", "nyu"], "x.pth does not exist"),
    (["--official", "x.pth", "--task", "flow", "--dataset", "nyu"], "flow is unknown"),
    (["--official", "x.pth", "--task", "depth", "--dataset", "ade20k"], "unknown for depth"),
    (["--checkpoint", "nowhere"], "neither it nor its best/")])
def test_commands_without_a_model_are_refused_in_one_line(monkeypatch, capsys, tmp_path, flags,
                                                          message):
    """Exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    code, stderr = refused(evaluation.main, monkeypatch, capsys, *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr


def test_two_models_are_refused():
    """--official and --checkpoint each name one."""
    with pytest.raises(InputError, match="name two models: give one"):
        evaluation.check(Namespace(checkpoint="a", official="b", image=None))


def test_a_set_of_other_classes_is_refused(runs, tmp_path, monkeypatch):
    """The model must predict as many as the data set has."""
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for kind in ("images", "labels"):
        save_image(tmp_path / kind / "val" / "x.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(InputError, match="predicts 7 classes, the data set has 2"):
        asked(monkeypatch, "--checkpoint", runs / "seg", "--dataset", "folder", "--data", tmp_path)


def test_a_model_is_not_replaced(tmp_path):
    """--save into a folder that holds a model, a checkpoint or a run is refused before the work."""
    (tmp_path / "config.json").write_text("{}")
    parser = evaluation.command_parser(RECIPES["seg", "shapes"], ("protocol",))
    with pytest.raises(InputError, match="holds a model already"):
        evaluation.check(parser.parse_args(["--checkpoint", "x", "--save", str(tmp_path)]))


def test_answers_are_not_written_among_the_truth(tmp_path):
    """--export into a folder below --data that holds files is refused; a new one is not."""
    (tmp_path / "labels" / "val").mkdir(parents=True)
    (tmp_path / "labels" / "val" / "a.png").touch()
    with pytest.raises(InputError, match="answers could replace the truth"):
        evaluation.check_export(str(tmp_path / "labels" / "val"), str(tmp_path))
    for export in (None, str(tmp_path / "new"), str(tmp_path.parent)):
        evaluation.check_export(export, str(tmp_path))


@pytest.mark.parametrize("name, place, flags", [
    ("keypoints.json", "--export", ["--val-json", "HERE"]),
    ("keypoints.json", "--out", ["--val-json", "HERE"]),
    ("metrics.json", "--out", ["--boxes", "HERE"]),
    ("keypoints.json", "--out", ["--boxes", "HERE", "--image", "x.png"])])
def test_no_result_replaces_what_is_read(runs, tmp_path, monkeypatch, name, place, flags):
    """Annotations or boxes that have the name of a result, where the results go, are kept."""
    (tmp_path / name).write_text("mine")
    save_image(tmp_path / "pictures" / "x.png", noise(64, 64))
    words = {"HERE": tmp_path / name, "x.png": tmp_path / "pictures" / "x.png"}
    dataset = [] if "--image" in flags else ["--dataset", "folder"]
    with pytest.raises(InputError, match=f"{name} is read by this command and would be replaced"):
        asked(monkeypatch, "--checkpoint", runs / "pose", *dataset, place, tmp_path,
              *(words.get(word, word) for word in flags))
    assert (tmp_path / name).read_text() == "mine"
