"""RefCOCO's files become VPD's samples; a folder of one's own; what does not fit is named.

    pytest tests/test_refcoco.py
"""
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ops.errors import InputError
from sets.files import Cut
from sets.refcoco import MAX_WORDS, RefCoco, RefCocoG, RefCocoPlus, ReferFolder

GOLDEN = Path(__file__).parent / "golden"
TRAIN, VAL = Cut("train", (64, 64), None, 0), Cut("val", (64, 64), None, 0)
ARRAYS = np.load(GOLDEN / "refer.npz")
FIGURES = json.loads((GOLDEN / "refer.json").read_text())


def write_refcoco(root, refs=FIGURES["refs"], instances=FIGURES["instances"], name="refcoco",
                  splitter="unc"):
    """A data set as released, with the golden's one image; the pickle as Python 2 wrote it."""
    images = root / "images" / "mscoco" / "images" / "train2014"
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ARRAYS["source_image"]).save(images / instances["images"][0]["file_name"])
    (root / name).mkdir(exist_ok=True)
    (root / name / f"refs({splitter}).p").write_bytes(pickle.dumps(refs, protocol=0))
    (root / name / "instances.json").write_text(json.dumps(instances))
    return root


def write_folder(root, entries=None):
    """A folder of one's own: two images, an object on each, expressions.json."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    mask = np.zeros((40, 60), np.uint8)
    mask[:, :30] = 255
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    entries = entries or [entry("train", "a"), entry("val", "b", ["left half", "the dark side"])]
    (root / "expressions.json").write_text(json.dumps(entries))
    return root


def entry(split, name, sentences=("left half",)):
    """One entry of expressions.json."""
    return {"split": split, "image": f"{name}.png", "mask": f"{name}.png",
            "sentences": list(sentences)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The golden's data set."""
    return write_refcoco(tmp_path_factory.mktemp("refer"))


def test_training_samples_are_vpds(root):
    """Image and target are VPD's loader's to the last bit, one sample per object, all of its
    sentences in turn.
    """
    files = RefCoco(data=str(root)).open(TRAIN)
    assert len(files) == 2 and len(files.names()) == 2
    for index, ref in enumerate((100, 101)):
        sample = files[0, index]
        assert np.array_equal((sample["image"] * 255).numpy(), ARRAYS["image"])
        assert np.array_equal(sample["target"].numpy(), ARRAYS[f"target_{ref}"])
    assert {files[epoch, 0]["sentence"] for epoch in range(20)} == {"man left",
                                                                   "the person on the left"}
    assert files[3, 0]["sentence"] == files[3, 0]["sentence"]


def test_evaluation_has_every_sentence(root):
    """testA: three sentences of one object, in order, under numbers of their own."""
    files = RefCoco(data=str(root), val_split="testA").open(VAL)
    samples = [files[0, i] for i in range(len(files))]
    assert [s["sentence"] for s in samples] == ["dog", "right dog's head", "animal 2"]
    assert [s["id"] for s in samples] == [0, 1, 2] and len(files.names()) == 3
    assert all(np.array_equal(s["target"].numpy(), ARRAYS["target_102"]) for s in samples)


def test_doubly_covered_pixels_are_background(root):
    """As released, 200 pixels inside two polygons don't count; with union they do; own_size keeps
    the image's size, in evaluation only.
    """
    settings = RefCoco(data=str(root), val_split="train", own_size=True)
    plain, union = (replace(settings, union=u).open(VAL)[0, 2]["target"].numpy()
                    for u in (False, True))
    assert np.array_equal(plain, ARRAYS["sum"] == 1) and np.array_equal(union, ARRAYS["sum"] > 0)
    assert (union - plain).sum() == 200
    assert settings.open(TRAIN)[0, 0]["target"].shape == (64, 64)


def test_check_prints_the_published_counts(root):
    """What was found, and what was published for the split."""
    said = RefCoco(data=str(root)).open(TRAIN).check()
    assert said.startswith("2 objects and 3 sentences on 1 images (refcoco (unc), split train; "
                           "published: 42404 objects and 120624 sentences); 2 opened")


@pytest.mark.parametrize("settings, name, splitter, own", [
    (RefCocoPlus(), "refcoco+", "unc", "testB"), (RefCocoG(val_split="test"), "refcocog", "umd",
                                                  "test"),
    (RefCocoG(split_by="google"), "refcocog", "google", "val")])
def test_all_three_sets(tmp_path, settings, name, splitter, own):
    """RefCOCO+ and RefCOCOg, both splitters'; testB is every split with that letter."""
    refs = [{**FIGURES["refs"][0], "split": "testAB" if own == "testB" else own}]
    write_refcoco(tmp_path, refs, name=name, splitter=splitter)
    settings = replace(settings, data=str(tmp_path), val_split=own)
    assert len(settings.open(VAL)) == 2 and "published" in settings.open(VAL).check()


@pytest.mark.parametrize("settings, said", [
    (RefCoco(val_split="test"), "--val-split test: refcoco .unc. has train, val, testA, testB"),
    (RefCocoG(split_by="unc"), "--split-by unc: refcocog was split by umd and by google"),
    (RefCoco(val_split="testB"), "has no ref of split testB, but testA, train"),
    (RefCocoPlus(), "refs.unc..p does not exist: see the layouts")])
def test_unknown_splits_are_refused(root, settings, said):
    """A split that the set, or the file, does not have: one line with those that there are."""
    with pytest.raises(InputError, match=said):
        replace(settings, data=str(root)).open(VAL)


class Foreign:
    """A class that a pickle may name."""


@pytest.mark.parametrize("refs, said", [
    ([Foreign()], "holds test_refcoco.Foreign|holds copy_reg._reconstructor|holds copyreg"),
    ([print], "holds (__builtin__|builtins).print, which could run code"),
    ([np.float64(1)], "holds numpy.* which could run code"),
    ({}, "holds no list of refs"),
    ([{"ann_id": 1}], "ref number 0: image_id is not as released"),
    ([{**FIGURES["refs"][0], "sentences": []}], "ref number 0: sentences is not as released"),
    ([{**FIGURES["refs"][0], "ann_id": 77}], "lacks annotation 77 or image 1")])
def test_pickles_hold_only_plain_values(tmp_path, refs, said):
    """A class or function in the pickle is named and not called; wrong entries are named."""
    write_refcoco(tmp_path, refs)
    with pytest.raises(InputError, match=said):
        RefCoco(data=str(tmp_path)).open(TRAIN)


def test_broken_files_are_named(tmp_path):
    """A cut pickle, a segmentation that is none, an image of another size, a missing image."""
    write_refcoco(tmp_path)
    pickled = tmp_path / "refcoco" / "refs(unc).p"
    pickled.write_bytes(pickled.read_bytes()[:100])
    with pytest.raises(InputError, match="is not a complete pickle"):
        RefCoco(data=str(tmp_path)).open(TRAIN)
    for bad in ({"counts": "abc", "size": [48, 80]}, [[1, 2, 3, 4]], [[1e9] * 6], [], [["x"] * 6]):
        broken = json.loads(json.dumps(FIGURES["instances"]))
        broken["annotations"][0]["segmentation"] = bad
        write_refcoco(tmp_path, instances=broken)
        with pytest.raises(InputError, match="annotation 10: segmentation is .* should be polyg"):
            RefCoco(data=str(tmp_path)).open(TRAIN)
    write_refcoco(tmp_path)
    image = tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000001.png"
    Image.new("RGB", (48, 80)).save(image)
    with pytest.raises(InputError, match="is 48x80, in instances.json 80x48"):
        RefCoco(data=str(tmp_path)).open(TRAIN).check()
    image.unlink()
    with pytest.raises(InputError, match="does not exist .1 of 1 images are missing"):
        RefCoco(data=str(tmp_path)).open(TRAIN).check()


def test_own_folder(tmp_path):
    """images/, masks/ and expressions.json: any value but 0 is the object."""
    settings = ReferFolder(data=str(write_folder(tmp_path / "own")))
    assert "1 objects and 2 sentences on 1 images (split val); 1 opened: an object covers 50 %" \
        in settings.open(VAL).check()
    sample = settings.open(VAL)[0, 1]
    assert sample["sentence"] == "the dark side" and sample["image"].shape == (3, 64, 64)
    assert sample["target"][:, :32].all() and not sample["target"][:, 32:].any()


@pytest.mark.parametrize("entries, said", [
    ({"a": 1}, "must be a list of"),
    ([entry("train", "a")], "has no entry whose split is val, but train"),
    ([{"split": "val", "image": "a.png", "sentences": ["x"]}], "entry number 0 has no mask: the "),
    ([{**entry("val", "a"), "mask": "c.png"}], "number 0: .*masks.c.png does not exist"),
    ([{**entry("val", "a"), "sentences": "left"}], "entry number 0 has no sentences"),
    ([entry("val", "a", ["x", "  "])], "entry number 0: a sentence is '  ', but should be a text"),
    ([entry("val", "a", ["left " * 500])], f"has 500 words, 'left .*at most {MAX_WORDS} can be")])
def test_wrong_expressions_are_named(tmp_path, entries, said):
    """Another file, an unknown split, no masks, an empty sentence, one of 500 words."""
    with pytest.raises(InputError, match=said):
        ReferFolder(data=str(write_folder(tmp_path / "own", entries))).open(VAL)


def test_mask_without_object_is_refused(tmp_path):
    """A mask of zeros says nothing."""
    root = write_folder(tmp_path / "own")
    Image.new("L", (60, 40)).save(root / "masks" / "b.png")
    with pytest.raises(InputError, match="b.png marks no object"):
        ReferFolder(data=str(root)).open(VAL).check()
