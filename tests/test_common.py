"""What the tasks share: the size of the user's own pictures, batches in order.

    pytest tests/test_common.py          (which pictures are drawn: test_seg.py)
"""
import numpy as np
import pytest
import torch

from ops.errors import InputError
from tasks import common
from tasks.common import batches, bounded, merged


@pytest.mark.parametrize("size, expected", [
    ((100, 200), (100, 200)), ((256, 256), (256, 256)), ((3000, 4000), (192, 256)),
    ((4000, 3000), (256, 192)), ((20, 30), (64, 96)), ((1, 1), (64, 64)), ((5, 2000), (64, 256)),
    ((100, 1000), (64, 256))])
def test_bounded(size, expected):
    """What models get: the longer side at most 256, none below 64, the aspect kept if possible."""
    image = np.zeros((*size, 3), np.uint8)
    out = bounded(image, 256)
    assert out.shape == (*expected, 3)
    assert (out is image) == (size == expected)


class Numbers:
    """A set of images that are their own number."""

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return {"image": torch.full((1, 64, 64), float(key[1])), "target": torch.tensor(key[1]),
                "name": "x"}


@pytest.mark.parametrize("at_once, sizes", [(1, [1] * 10), (4, [4, 4, 2]), (16, [10])])
def test_batches_are_the_set_in_order(at_once, sizes):
    """Every sample once; up to eight of them, evenly spread, are to be drawn."""
    parts = list(batches(Numbers(), at_once, 0, torch.device("cpu")))
    assert [len(images) for _, images, _, _ in parts] == sizes
    assert merged([target.tolist() for _, _, target, _ in parts]) == list(range(10))
    drawn = [int(images[i, 0, 0, 0]) for _, images, _, chosen in parts for i in chosen]
    assert drawn == [0, 1, 2, 3, 5, 6, 7, 8]


class Broken(Numbers):
    """The same, of 200; some cannot be read."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 200

    def __getitem__(self, key):
        if key[1] in self.bad:
            raise InputError(f"{key[1]}.jpg cannot be decoded")
        return super().__getitem__(key)


def test_unreadable_images_are_skipped_and_counted(capsys):
    """Up to 1 % of a validation set; the others are measured.  More end the evaluation."""
    parts = list(batches(Broken((3, 8, 9)[:2]), 4, 0, torch.device("cpu")))
    found = [int(n) for _, _, target, _ in parts for n in target]
    assert found == [n for n in range(200) if n not in (3, 8)]
    out = "".join(capsys.readouterr())
    assert "3.jpg cannot be decoded" in out and "2 unreadable images" in out
    with pytest.raises(InputError, match="3 of 200 images to validate on .* 9.jpg"):
        list(batches(Broken((3, 8, 9)), 4, 0, torch.device("cpu")))


@pytest.mark.parametrize("at_once", [1, 16, 300])
def test_the_bar_ends_at_the_sets_size(monkeypatch, at_once):
    """Last batches that are not full, and images that cannot be read, are counted as they are."""
    ends = set()

    class Bar(common.tqdm):
        def close(self):
            ends.add((self.n, self.total))
            super().close()

    monkeypatch.setattr(common, "tqdm", Bar)
    list(batches(Broken((3, 8)), at_once, 0, torch.device("cpu")))
    assert ends == {(200, 200)}
