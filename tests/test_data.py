"""Every recipe opens its data set; batches come in an order that a stopped run can take up again.

    python -m pytest tests/test_data.py
"""
from dataclasses import replace
from itertools import islice

import pytest
import torch
import trees
from helpers import make_folder

import data
from data import Stream, Tolerant
from ops.errors import InputError
from sets.embedded import Shapes
from tasks.recipes import RECIPES, VPD

ROWS = {**VPD, **RECIPES}


@pytest.mark.parametrize("task, name", ROWS)
def test_every_recipe_opens_its_data_set(tmp_path, task, name):
    """Samples of the recipe's crop and kind in training; whole images, or crops of people, else."""
    row = ROWS[task, name]
    crop, width = (32, 48) if task == "depth" else (64, 48 if task == "pose" else 64)
    recipe = replace(row, crop=crop, crop_width=None if width == crop else width)
    if name == "shapes":
        recipe = replace(recipe, files=replace(row.files, val_scenes=1))
    else:
        trees.TREES[task, name](tmp_path)
        lists = {"train_list": str(tmp_path / "train.txt"), "val_list": str(tmp_path / "val.txt")}
        recipe = replace(recipe, files=replace(row.files, data=str(tmp_path),
                                               **(lists if hasattr(row.files, "val_list") else {})))
    kind = {"seg": torch.int64, "depth": torch.float32, "pose": torch.float32,
            "refer": torch.int64}[task]
    for split in ("train", "val"):
        dataset = data.open_set(recipe, split)
        sample = dataset[0, 0]
        assert len(dataset) > 0 and dataset.check() and sample["target"].dtype == kind
        assert sample["image"].dtype == torch.float32 and sample["image"].max() <= 1
        if split == "train" or task == "pose":
            assert sample["image"].shape == (3, crop, width)
        if split == "train":
            size = (17, 3) if task == "pose" else (crop, width)
            assert sample["target"].shape == size


def test_every_data_set_has_a_miniature():
    """A data set that there is a recipe for has a tree here."""
    assert trees.TREES.keys() == {key for key in ROWS if key[1] != "shapes"}


# ------------------------------------------------------------------------------------------------
# Order

def test_stream_epochs_are_permutations():
    """Every index once per epoch, in another order each time, and by another seed."""
    keys = [key for batch in islice(Stream(10, 5, seed=3), 8) for key in batch]
    epochs = [keys[i:i + 10] for i in range(0, 40, 10)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(10))
    orders = {tuple(index for _, index in epoch) for epoch in epochs}
    assert len(orders) == 4
    assert tuple(i for _, i in sum(islice(Stream(10, 5, seed=4), 2), [])) not in orders


@pytest.mark.parametrize("length, batch", [(10, 4), (3, 7), (8, 2)])
def test_stream_resumes(length, batch):
    """Starting at batch k gives what follows k batches; batches are full and may span epochs."""
    whole = list(islice(Stream(length, batch, seed=0), 20))
    assert {len(keys) for keys in whole} == {batch}
    flat = sum(whole, [])
    assert [epoch for epoch, _ in flat] == [i // length for i in range(20 * batch)]
    for start in range(12):
        assert list(islice(Stream(length, batch, 0, start), 8)) == whole[start:start + 8]


def test_stream_parts():
    """The batches of several processes are, side by side, those of one with larger batches."""
    whole = list(islice(Stream(10, 6, seed=0, start=1), 7))
    parts = [list(islice(Stream(10, 2, seed=0, start=1, part=(r, 3)), 7)) for r in range(3)]
    assert [sum(keys, []) for keys in zip(*parts)] == whole


@pytest.mark.parametrize("batch", [1, 2, 4, 50])
def test_eval_loader_covers_once(batch):
    """Every scene once, in order, the last batch as large as what is left."""
    dataset = Shapes(5, "seg", trees.cut("val", side=32))
    batches = list(data.eval_loader(dataset, batch, workers=0))
    names = [name for (b,), _ in batches for name in b["name"]]
    assert names == [dataset[0, index]["name"] for index in range(5)] == dataset.names()
    assert [len(b["image"]) for (b,), _ in batches][:-1] == [batch] * (len(batches) - 1)


# ------------------------------------------------------------------------------------------------
# Workers and unreadable files

def opened(root, split="train"):
    """A set of one's own with four images."""
    files = replace(RECIPES["seg", "folder"].files, data=str(make_folder(root)))
    return files.open(trees.cut(split))


def spoil(dataset, *places):
    """Cut the image files at these places short; returns their paths."""
    paths = [dataset.pairs[place][0] for place in places]
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    return paths


def test_workers_change_nothing(tmp_path):
    """Batches are the same, in the same order, from no worker and from two."""
    dataset = opened(tmp_path / "d")
    alone, shared = (list(islice(data.train_loader(dataset, 2, 0, 0, workers), 5))
                     for workers in (0, 2))
    for a, b in zip(alone, shared, strict=True):
        assert a["name"] == b["name"]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])


def test_error_in_a_worker(tmp_path):
    """From a worker process it is still an InputError, whose last line names the file."""
    dataset = opened(tmp_path / "d")
    paths = spoil(dataset, 0, 1, 2, 3)
    with pytest.raises(InputError) as error:
        next(iter(data.train_loader(dataset, 1, 0, 0, workers=1)))
    line = str(error.value).strip().splitlines()[-1]
    assert any(f"{path} cannot be decoded" in line for path in paths)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_unreadable_files_out(tmp_path, workers):
    """Their messages come beside the batch of the others, if there are any."""
    dataset = opened(tmp_path / "d", "val")
    paths = spoil(dataset, 1, 2, 3)
    ((samples,), messages), (none, rest) = data.eval_loader(dataset, 2, workers)
    assert samples["name"] == [dataset.name(0)] and none == []
    assert all(f"{path} cannot be decoded" in message
               for path, message in zip(paths, messages + rest, strict=True))


def test_a_batch_has_one_size(tmp_path):
    """Of images of several sizes only neighbours of one are batched, in the set's order."""
    root = make_folder(tmp_path / "d", [(80, 70), (80, 70), (64, 70), (80, 70), (80, 70)])
    dataset = replace(RECIPES["seg", "folder"].files, data=str(root)).open(trees.cut("val"))
    ((first, second), _), ((third,), _) = data.eval_loader(dataset, 3, 0)
    assert [first["name"], second["name"], third["name"]] == \
        [dataset.names()[:2], dataset.names()[2:3], dataset.names()[3:]]


def test_the_next_sample_stands_in_for_an_unreadable_one(tmp_path):
    """Whatever else is drawn: its successor's sample and the reason; an error if all are broken."""
    dataset = opened(tmp_path / "d")
    tolerant = Tolerant(dataset)
    path, _ = spoil(dataset, 3, 0)
    sample = tolerant[5, 3]
    assert sample["unreadable"].startswith(f"{path} cannot be decoded")
    assert torch.equal(sample["image"], dataset[5, 1]["image"])
    assert tolerant[5, 1]["unreadable"] == "" and len(tolerant) == 4
    spoil(dataset, 1, 2)
    with pytest.raises(InputError, match=f"{path} cannot be decoded"):
        tolerant[5, 3]


def test_an_unreadable_image_is_replaced_and_counted():
    """The next sample stands in; the message is kept once; more than 1 % of the set is an error."""
    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return 200

        def __getitem__(self, key):
            if key[1] in (5, 6, 9):
                raise InputError(f"{key[1]}.jpg cannot be decoded")
            return {"image": torch.full((1,), float(key[1])), "name": str(key[1])}

    tolerant = data.Tolerant(Files())
    assert tolerant[0, 5]["name"] == "7" and "5.jpg" in tolerant[0, 5]["unreadable"]
    loader = [*[{"image": torch.zeros(2, 1), "unreadable": ["", "5.jpg bad"]}] * 2,
              {"image": torch.zeros(1, 1), "unreadable": ["6.jpg bad"]},
              {"image": torch.zeros(1, 1), "unreadable": ["9.jpg bad"]}]
    batches = data.Timed(iter(loader), 200, lambda batch: None)
    for _ in range(3):
        next(batches)
    assert list(batches.unreadable) == ["5.jpg bad", "6.jpg bad"]
    with pytest.raises(InputError, match="3 of 200 training images cannot be read.*9.jpg"):
        next(batches)
