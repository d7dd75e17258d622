"""The pictures show what they say: the right colours in the right places, on disk.

Proven here: palette colours at known pixels, black where there is no label, the legend's content,
the size and order of a sheet's columns, on PNG files that are written and read back.

    python -m pytest tests/test_pictures.py
"""
import numpy as np
import pytest
import torch
from PIL import Image

import data
from ops import draw as pictures

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 200, 0), (0, 0, 255), (250, 240, 0)
CLASSES = data.plain_classes(("sky", "road", "car", "a name that is far too long"),
                             (RED, GREEN, BLUE, YELLOW))
HEADER = pictures.TEXT_HEIGHT + 4


def colours(picture):
    """The set of colours in a picture."""
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def read(path):
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.format == "PNG"
        return np.asarray(image)


def test_colour_labels():
    """Each label gets its class's colour, 255 black; any integer type will do."""
    labels = [[0, 1, 255], [3, 2, 255]]
    for dtype in (np.uint8, np.int64):
        picture = pictures.colour_labels(np.array(labels, dtype), CLASSES)
        assert picture.dtype == np.uint8
        assert picture.tolist() == [[list(RED), list(GREEN), [0, 0, 0]],
                                    [list(YELLOW), list(BLUE), [0, 0, 0]]]


def test_colours_of_many_classes():
    """Also with the largest number of classes, 255, ignored pixels are black."""
    classes = data.plain_classes(tuple(str(i) for i in range(255)))
    picture = pictures.colour_labels(np.arange(256)[None], classes)
    assert [tuple(colour) for colour in picture[0].tolist()] == [*classes.palette, (0, 0, 0)]


def test_to_uint8():
    """0 and 1 become 0 and 255, values between are rounded, values outside clipped."""
    image = torch.tensor([[[0.0, 1.0]], [[0.5, 1.7]], [[-0.3, 100.6 / 255]]])
    assert pictures.to_uint8(image).tolist() == [[[0, 128, 0], [255, 255, 101]]]
    assert pictures.to_uint8(image.bfloat16()).shape == (1, 2, 3)


@pytest.mark.parametrize("height, times", [(1, 192), (64, 3), (128, 2), (191, 2), (192, 1),
                                           (500, 1)])
def test_enlarge(height, times):
    """A picture lower than 192 pixels is enlarged by a whole number, pixels staying sharp."""
    image = np.arange(height * 6, dtype=np.int64).reshape(height, 2, 3).astype(np.uint8)
    large = pictures.enlarge(image)
    assert large.shape == (height * times, 2 * times, 3)
    assert np.array_equal(large[::times, ::times], image)
    assert np.array_equal(large[times - 1::times, times - 1::times], image)


def test_legend_names_present_classes_only():
    """The colours in the legend are those of the classes that occur in any of the maps."""
    one = pictures.legend([np.array([[1, 255]])], CLASSES, 300)
    assert colours(one) >= {GREEN} and not colours(one) & {RED, BLUE, YELLOW}
    two = pictures.legend([np.array([[1, 255]]), np.array([[3, 3, 1]])], CLASSES, 300)
    assert colours(two) >= {GREEN, YELLOW} and not colours(two) & {RED, BLUE}
    none = pictures.legend([np.array([[255]])], CLASSES, 300)
    assert colours(none) <= {(255, 255, 255)}


@pytest.mark.parametrize("width, rows", [(60, 4), (119, 4), (240, 2), (479, 2), (480, 1)])
def test_legend_grows(width, rows):
    """As many columns as fit at 120 pixels each; the strip is as wide as the sheet."""
    strip = pictures.legend([np.arange(4)], CLASSES, width)
    assert strip.shape == (rows * pictures.TEXT_HEIGHT + 4, width, 3)
    assert colours(strip) >= {RED, GREEN, BLUE, YELLOW}                    # none cut off
    alone = pictures.legend([np.zeros(1, int)], CLASSES, width)
    assert alone.shape == (pictures.TEXT_HEIGHT + 4, width, 3)


def test_legend_text():
    """Beside its colour each class has its name: another name gives another picture."""
    renamed = data.plain_classes(("sea", *CLASSES.names[1:]), CLASSES.palette)
    strips = [pictures.legend([np.arange(3)], classes, 360) for classes in (CLASSES, renamed)]
    differs = (strips[0] != strips[1]).any(axis=(0, 2)).nonzero()[0]
    assert len(differs) and 18 <= differs.min() and differs.max() < 120    # the first column's text


def test_sheet_columns(tmp_path):
    """Input, truth, prediction from left to right; one row per image; the legend below."""
    image = torch.zeros(3, 96, 64)
    image[:, :48] = 1                                                      # white above black
    truth, prediction = torch.full((96, 64), 2), torch.full((96, 64), 3)
    truth[:48], prediction[48:] = 255, 0
    path = tmp_path / "new" / "folder" / "sheet.png"
    pictures.save_seg_sheet(path, [(image, truth, prediction)] * 2, CLASSES)
    sheet = read(path)
    panel = 2 * 64
    legend = pictures.legend([truth.numpy(), prediction.numpy()], CLASSES, 3 * panel)
    assert sheet.shape == (HEADER + 2 * (192 + 4) + len(legend), 3 * panel, 3)
    for top in (HEADER, HEADER + 196):
        panels = [sheet[top:top + 192, i * panel:(i + 1) * panel] for i in range(3)]
        upper, lower = ([colours(p[half]) for p in panels] for half in (slice(96), slice(96, 192)))
        assert upper == [{(255, 255, 255)}, {(0, 0, 0)}, {YELLOW}]
        assert lower == [{(0, 0, 0)}, {BLUE}, {RED}]
    assert np.array_equal(sheet[-len(legend):], legend)
    assert colours(sheet[:HEADER]) > {(255, 255, 255)}                     # the columns' titles


def test_sheet_of_different_sizes(tmp_path):
    """Images of different sizes share a sheet; the input takes the size of its own labels."""
    rows = [(torch.full((3, 20, 40), 0.2), torch.zeros(200, 300).long(), torch.ones(200, 300)
             .long()), (torch.full((3, 192, 50), 0.8), np.zeros((192, 50), int),
                        np.ones((192, 50), int))]
    pictures.save_seg_sheet(tmp_path / "sheet.png", rows, CLASSES)
    sheet = read(tmp_path / "sheet.png")
    assert sheet.shape == (HEADER + 204 + 196 + pictures.TEXT_HEIGHT + 4, 900, 3)
    first, second = sheet[HEADER:HEADER + 200], sheet[HEADER + 204:HEADER + 204 + 192]
    assert [colours(first[:, i:i + 300]) for i in (0, 300, 600)] == [{(51, 51, 51)}, {RED}, {GREEN}]
    assert [colours(second[:, i:i + 50]) for i in (0, 50, 100, 150)] == [
        {(204, 204, 204)}, {RED}, {GREEN}, {(255, 255, 255)}]              # white beside the row
