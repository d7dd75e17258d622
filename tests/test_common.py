"""What the tasks share: the size of the user's own pictures, batches in order.

    pytest tests/test_common.py          (which pictures are drawn: test_seg.py)
"""
import numpy as np
import pytest
import torch

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
        return {"image": torch.tensor([float(key[1])]), "target": torch.tensor(key[1]), "name": "x"}


@pytest.mark.parametrize("at_once, sizes", [(1, [1] * 10), (4, [4, 4, 2]), (16, [10])])
def test_batches_are_the_set_in_order(at_once, sizes):
    """Every sample once; up to eight of them, evenly spread, are to be drawn."""
    parts = list(batches(Numbers(), at_once, 0, torch.device("cpu")))
    assert [len(images) for _, images, _, _ in parts] == sizes
    assert merged([target.tolist() for _, _, target, _ in parts]) == list(range(10))
    drawn = [int(images[i]) for _, images, _, chosen in parts for i in chosen]
    assert drawn == [0, 1, 2, 3, 5, 6, 7, 8]
