"""Cityscapes, its extra images and Mapillary Vistas: right labels, clear refusals, true exports.

On miniature trees of files: which belong together, how each kind of label file becomes the 19
classes, what is refused, and that an exported prediction reads back as the labels predicted.

    python -m pytest tests/test_cityscapes.py
"""
import json

import numpy as np
import pytest
import torch
from helpers import HEAD, TINY
from PIL import Image
from trees import (AACHEN, BREMEN, CAR_ID, ERBACH, FRANKFURT, ROAD_ID, ULM, H, W, cut,
                   label_of, make_city, make_vistas, write, write_image, write_label)

import eval as evaluation
import train
from ops.errors import InputError, run_command
from sets.cityscapes import (Cityscapes, CityscapesExtra, Mapillary, cityscapes_classes,
                             mapillary_classes)
from sets.files import class_table, load_label
from tasks.seg import export_labels


@pytest.fixture
def city(tmp_path):
    """Cityscapes as released, labelIds only: 3 images of 3 cities to train on, 1 for validation."""
    return make_city(tmp_path)


def write_train_ids(root):
    """What cityscapesScripts adds to `city`, here with a class, 4, that the labelIds lack."""
    for split, names in (("train", (AACHEN, BREMEN, ULM)), ("val", (FRANKFURT,))):
        for name in names:
            write_label(root, f"gtFine/{split}", name, "gtFine_labelTrainIds", label_of(4, 255, 18))


@pytest.fixture
def extra(city):
    """`city` and one extra image, not labelled yet."""
    write_image(city, "train_extra", ERBACH)
    return city


@pytest.fixture
def vistas(tmp_path):
    """Mapillary Vistas 1.2: 2 images to train on, 1 for validation; palette PNGs."""
    return make_vistas(tmp_path)


def opened(files, root, split="train", scale=None, **options):
    """A split of a settings class."""
    return files(str(root), **options).open(cut(split, scale=scale))


def names(dataset, root):
    """Paths of the pairs below `root`."""
    return [tuple(str(path.relative_to(root)) for path in pair) for pair in dataset.pairs]


# ------------------------------------------------------------------------------------------------
# Tables

def test_label_ids():
    """All 34 label ids: the 19 evaluated ones become 0..18 in order, the others and -1 ignored."""
    classes = cityscapes_classes(label_ids=True)
    evaluated = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert [classes.lut[value] for value in evaluated] == list(range(19))
    assert set(np.delete(classes.lut, evaluated)) == {255}
    assert classes.raw_values == {*range(34), 255}
    by_name = {7: "road", 8: "sidewalk", 11: "building", 17: "pole", 19: "traffic light",
               20: "traffic sign", 21: "vegetation", 23: "sky", 24: "person", 25: "rider",
               26: "car", 31: "train", 32: "motorcycle", 33: "bicycle"}
    assert {value: classes.names[classes.lut[value]] for value in by_name} == by_name


def test_train_ids():
    """Train ids 0..18 and 255 stay as they are; 19 names, each with the colour of the benchmark."""
    classes = cityscapes_classes(label_ids=False)
    assert classes.lut.tolist() == [*range(19), *[255] * 237]
    assert classes.raw_values == {*range(19), 255}
    colours = dict(zip(classes.names, classes.palette, strict=True))
    assert len(set(classes.names)) == len(set(classes.palette)) == 19
    assert colours["road"] == (128, 64, 128) and colours["car"] == (0, 0, 142)
    assert colours["bicycle"] == (119, 11, 32) and colours["sky"] == (70, 130, 180)


def test_vistas_ids():
    """Every Vistas id: 25 of the 66 belong to the 19 classes; the rest, and all above, ignored."""
    classes = mapillary_classes()
    members = {"road": [13, 24, 41], "sidewalk": [2, 15], "building": [17], "wall": [6],
               "fence": [3], "pole": [45, 47], "traffic light": [48], "traffic sign": [50],
               "vegetation": [30], "terrain": [29], "sky": [27], "person": [19],
               "rider": [20, 21, 22], "car": [55], "truck": [61], "bus": [54], "train": [58],
               "motorcycle": [57], "bicycle": [52]}
    found = {name: np.flatnonzero(classes.lut == label).tolist()
             for label, name in enumerate(classes.names)}
    assert found == members and sum(map(len, members.values())) == 25
    assert set(np.delete(classes.lut, sum(members.values(), []))) == {255}
    table = class_table("mapillary")
    assert len(table["names"]) == 66 and (table["names"][0], table["names"][65]) == (
        "Bird", "Unlabeled")


# ------------------------------------------------------------------------------------------------
# Cityscapes

def test_label_ids_are_converted(city):
    """As released, without labelTrainIds: labelIds are paired, sorted by city, and converted."""
    dataset = opened(Cityscapes, city)
    assert names(dataset, city) == [
        (f"leftImg8bit/train/{name.split('_')[0]}/{name}_leftImg8bit.png",
         f"gtFine/train/{name.split('_')[0]}/{name}_gtFine_labelIds.png")
        for name in (AACHEN, BREMEN, ULM)]
    for index, label in enumerate((0, 18, 13)):
        target = dataset.load(index)[1]
        assert target[0, :4].tolist() == [255, 255, 255, 18] and (target[1:] == label).all()
    assert dataset.check().startswith("3 images; 3 checked: 3 of 19 classes seen")
    val = opened(Cityscapes, city, "val")
    assert len(val) == 1 and (val.load(0)[1][1:] == 2).all()


def test_train_ids_win(city):
    """Where labelTrainIds are there, they are read and the labelIds beside them are not."""
    write_train_ids(city)
    for split, count in (("train", 3), ("val", 1)):
        dataset = opened(Cityscapes, city, split)
        assert len(dataset) == count
        assert dataset.pairs[0][1].name.endswith("_gtFine_labelTrainIds.png")
        assert dataset.load(0)[1][0, :3].tolist() == [255, 18, 4]


def test_train_ids_alone(city):
    """A tree with labelTrainIds and no labelIds is complete."""
    write_train_ids(city)
    for path in city.rglob("*_labelIds.png"):
        path.unlink()
    assert len(opened(Cityscapes, city)) == 3


def test_samples(city):
    """Training crops and whole validation images carry labels 0..18 or 255, never label ids."""
    sample = opened(Cityscapes, city, scale=(48, 24))[0, 2]
    assert sample["image"].shape == (3, 64, 64)
    assert set(sample["target"].unique().tolist()) <= {13, 18, 255}
    whole = opened(Cityscapes, city, "val", scale=(96, 48))[0, 0]
    assert whole["image"].shape == (3, 48, 96) and whole["target"].shape == (H, W)
    assert whole["target"].dtype == torch.int64
    assert whole["name"].endswith("frankfurt_000001_000538_leftImg8bit.png")


def test_interrupted_conversion(city):
    """With labelTrainIds for some images only, the first that lacks its file is named."""
    write_label(city, "gtFine/train", AACHEN, "gtFine_labelTrainIds", label_of(0))
    with pytest.raises(InputError, match=rf"{BREMEN}_leftImg8bit.png has no label .*"
                                         rf"{BREMEN}_gtFine_labelTrainIds.png \(2 of 3"):
        opened(Cityscapes, city)


def test_missing_files(city):
    """Missing labels, images or folders are named; a label's place is that of its own city."""
    label = next((city / "gtFine/train/ulm").glob("*labelIds.png"))
    label.rename(city / "gtFine/train/aachen" / label.name)
    with pytest.raises(InputError, match=r"has no label .*ulm/ulm_\w+_labelIds.png \(1 of 3"):
        opened(Cityscapes, city)
    for path in city.rglob("val/*/*_leftImg8bit.png"):
        path.rename(path.with_name(path.name.replace("leftImg8bit", "rightImg8bit")))
    with pytest.raises(InputError, match="leftImg8bit/val holds no image .*_leftImg8bit.png"):
        opened(Cityscapes, city, "val")
    (city / "gtFine").rename(city / "gt")
    with pytest.raises(InputError, match="folder .*gtFine/train does not exist"):
        opened(Cityscapes, city)


@pytest.mark.parametrize("kind, value, message", [
    ("labelIds", 34, r"labelIds.png holds the label 34: 0\.\.33 and 255 \(ignore\) are possible$"),
    ("labelTrainIds", 19, r"holds the label 19: 0\.\.18 and 255 \(ignore\) are possible; label ids,"
                          r" 0\.\.33, are read from \*_labelIds.png")])
def test_wrong_values(city, kind, value, message):
    """A value that is no label is refused; label ids under the name of train ids: with the cure."""
    write_train_ids(city)
    if kind == "labelIds":
        for path in city.rglob("*TrainIds.png"):
            path.unlink()
    path = write_label(city, "gtFine/train", BREMEN, f"gtFine_{kind}", label_of(3, value))
    with pytest.raises(InputError, match=message) as error:
        opened(Cityscapes, city).check()
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# The extra images

def test_extra_as_released_by_the_authors(extra):
    """Official layout: fine images first, then the extra ones; fine may be labelIds, extra not."""
    write_label(extra, "convert_autolabelled", ERBACH, "gtFine_labelTrainIds", label_of(16, 255))
    dataset = opened(CityscapesExtra, extra)
    assert [path.name.split("_")[0] for path, _ in dataset.pairs] == [
        "aachen", "bremen", "ulm", "erbach"]
    assert [dataset.load(i)[1][5, 5] for i in range(4)] == [0, 18, 13, 16]
    assert dataset.load(3)[1][0, 0] == 255 and dataset.classes.names[16] == "train"
    assert dataset.name(3).endswith(f"{ERBACH}_leftImg8bit.png")
    assert dataset.check().startswith("4 images; 4 checked: 4 of 19 classes seen")
    assert set(dataset[0, 3]["target"].unique().tolist()) <= {16, 255}
    with pytest.raises(IndexError):
        dataset.load(4)


@pytest.mark.parametrize("kind, value", [("gtCoarse_labelTrainIds", 13),
                                         ("gtCoarse_labelIds", CAR_ID)])
@pytest.mark.parametrize("asked", ["gtCoarse_labelTrainIds", "gtCoarse_labelIds"])
def test_coarse_labels(extra, kind, value, asked):
    """Coarse labels are read by folder and suffix; train ids, or label ids if those are missing."""
    write_label(extra, "gtCoarse/train_extra", ERBACH, kind, label_of(value, 255))
    options = {"extra_labels": "gtCoarse/train_extra", "extra_suffix": f"_{asked}.png"}
    if asked == "gtCoarse_labelIds" and kind != asked:
        with pytest.raises(InputError, match=r"has no label .*_gtCoarse_labelIds.png \(1 of 1"):
            opened(CityscapesExtra, extra, **options)
        return
    label = opened(CityscapesExtra, extra, **options).load(3)[1]
    assert label[0, 0] == 255 and (label[1:] == 13).all()


def test_automatic_labels_as_released_by_nvidia(extra):
    """Label ids in files named like the images: converted if announced, else refused."""
    write_label(extra, "refinement_final/train_extra", ERBACH, "leftImg8bit",
                label_of(CAR_ID, ROAD_ID, 255))
    options = {"extra_labels": "refinement_final/train_extra", "extra_suffix": "_leftImg8bit.png"}
    label = opened(CityscapesExtra, extra, extra_label_ids=True, **options).load(3)[1]
    assert label[0, :3].tolist() == [0, 255, 13]
    with pytest.raises(InputError, match="holds the label 26: .*--extra-label-ids"):
        opened(CityscapesExtra, extra, **options).check()


def test_extra_images_elsewhere(extra):
    """The folder of the extra images is an option as well; without them: their label is named."""
    (extra / "leftImg8bit/train_extra").rename(extra / "more")
    write_label(extra, "convert_autolabelled", ERBACH, "gtFine_labelTrainIds", label_of(16))
    assert len(opened(CityscapesExtra, extra, extra_images="more")) == 4
    with pytest.raises(InputError, match="folder .*leftImg8bit/train_extra does not exist"):
        opened(CityscapesExtra, extra)


def test_extra_validation_is_fine(extra):
    """cityscapes-extra is validated on the fine images alone, without its extra folders."""
    dataset = opened(CityscapesExtra, extra, "val", extra_labels="nowhere")
    assert names(dataset, extra) == names(opened(Cityscapes, extra, "val"), extra)


# ------------------------------------------------------------------------------------------------
# Mapillary

def test_vistas(vistas):
    """Palette PNGs give ids: road 13 -> 0, car 55 -> 13, unlabelled and above 65 -> ignored."""
    train_set, val_set = opened(Mapillary, vistas), opened(Mapillary, vistas, "val")
    assert names(train_set, vistas) == [("training/images/-aZ.jpg", "training/labels/-aZ.png"),
                                        ("training/images/_b0X.jpg", "training/labels/_b0X.png")]
    assert train_set.load(0)[1][0, :6].tolist() == [255, 255, 255, 255, 0, 13]
    assert (train_set.load(1)[1][1:] == 0).all() and (val_set.load(0)[1][1:] == 255).all()
    assert train_set.classes.names[13] == "car" and len(train_set.classes.names) == 19
    assert train_set.check().startswith("2 images; 2 checked: 2 of 19 classes seen")


def test_vistas_2(vistas):
    """In the archive of version 2.0 its copy of the 1.2 labels is read, not the 2.0 labels."""
    for split in ("training", "validation"):
        for version in ("v1.2", "v2.0"):
            (vistas / split / version).mkdir()
        (vistas / split / "labels").rename(vistas / split / "v1.2/labels")
    write(vistas / "training/v2.0/labels/-aZ.png", label_of(99))
    dataset = opened(Mapillary, vistas)
    assert dataset.pairs[0][1].parent == vistas / "training/v1.2/labels"
    assert dataset.load(0)[1][5, 5] == 13 and len(opened(Mapillary, vistas, "val")) == 1


def test_vistas_instances_are_refused(vistas):
    """The 16-bit instance files in place of labels are refused: their values are no class ids."""
    label = np.full((H, W), 55 * 256 + 3, np.uint16)
    Image.fromarray(label).save(vistas / "training/labels/-aZ.png")
    with pytest.raises(InputError, match="-aZ.png holds the value 14083 .*: labels are"):
        opened(Mapillary, vistas).check()


# ------------------------------------------------------------------------------------------------
# Export

@pytest.mark.parametrize("trained_on", ["labelIds", "labelTrainIds"])
def test_cityscapes_export(city, tmp_path, trained_on):
    """Whatever was trained on, label ids, which read back as predicted."""
    if trained_on == "labelTrainIds":
        write_train_ids(city)
    dataset = opened(Cityscapes, city, "val")
    predicted = np.resize([*range(19), 255], (H, W))
    path = tmp_path / "out/deep/a.png"
    export_labels(path, predicted, dataset.classes)
    with Image.open(path) as image:
        assert image.mode == "L" and image.size == (W, H)
        written = np.array(image)
    assert written[0, :20].tolist() == [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33, 0]
    lut = cityscapes_classes(label_ids=True).lut
    assert np.array_equal(lut[load_label(path)], predicted)


def test_exported_files_are_a_data_set(city):
    """Predictions exported as the validation set's labels score as their own truth."""
    dataset = opened(Cityscapes, city, "val")
    path, predicted = dataset.pairs[0][1], np.resize(np.arange(19), (H, W))
    export_labels(path, predicted, dataset.classes)
    assert np.array_equal(opened(Cityscapes, city, "val").load(0)[1], predicted)


@pytest.mark.parametrize("value", [19, 33, 254])
def test_export_refuses_what_is_no_label(tmp_path, value):
    """A value outside the classes is an error and writes nothing, rather than becoming "other"."""
    classes = cityscapes_classes(label_ids=False)
    with pytest.raises(ValueError, match=f"a.png: {value} is no label of 19 classes"):
        export_labels(tmp_path / "a.png", label_of(0, value), classes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# The commands

SMALL = [*TINY, *HEAD, "--backbone", "tiny", "--scale", "96", "48", "--iterations", "1",
         "--save-every", "1", "--eval-every", "1"]


def test_the_real_commands_pretrain_and_finetune_and_export(city, vistas, tmp_path, monkeypatch):
    """Mapillary, then Cityscapes from its weights, then an export whose ids read back as labels."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "submission"
    for command, flags in (
            (train.main, ["--dataset", "mapillary", "--data", str(vistas), *SMALL,
                          "--out", str(first)]),
            (train.main, ["--dataset", "cityscapes", "--data", str(city), *SMALL, "--init-from",
                          str(first), "--out", str(second)]),
            (evaluation.main, ["--checkpoint", str(second), "--workers", "0", "--precision",
                               "float32", "--export", str(out)])):
        monkeypatch.setattr("sys.argv", ["command", *flags])
        run_command(command)
    report = json.loads((second / "eval" / "metrics.json").read_text())
    assert report["protocol"]["window"] == 1024 and len(report["IoU"]) == 19
    (exported,) = out.iterdir()
    assert exported.name == f"{FRANKFURT}_leftImg8bit.png"
    ids = np.asarray(Image.open(exported))
    labels = cityscapes_classes(label_ids=True).lut[ids]
    assert ids.shape == (H, W) and (labels < 19).all()
