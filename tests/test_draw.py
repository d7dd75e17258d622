"""Drawing: the right colours in the right places, on PNG files that are written and read back.

    pytest tests/test_draw.py            (the tasks' pictures: test_seg.py, test_depth.py, ...)
"""
import numpy as np
import pytest
import torch
from helpers import colours, noise, read_png

from ops import draw

RED, GREEN, BLUE = (255, 0, 0), (0, 200, 0), (0, 0, 255)
ENTRIES = [("sky", RED), ("road", GREEN), ("car", BLUE), ("a name that is far too long", (9, 9, 9))]
HEADER = draw.TEXT_HEIGHT + 4


def plain(height, width, colour):
    """A picture of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


# ------------------------------------------------------------------------------------------------
# Sizes and colours

def test_to_uint8():
    """0 and 1 become 0 and 255, values between are rounded, values outside clipped."""
    image = torch.tensor([[[0.0, 1.0]], [[0.5, 1.7]], [[-0.3, 100.6 / 255]]])
    assert draw.to_uint8(image).tolist() == [[[0, 128, 0], [255, 255, 101]]]
    assert draw.to_uint8(image.bfloat16()).shape == (1, 2, 3)


@pytest.mark.parametrize("height, times", [(1, 192), (64, 3), (128, 2), (191, 2), (192, 1),
                                           (500, 1)])
def test_enlarge(height, times):
    """A picture lower than 192 pixels is enlarged by a whole number, pixels staying sharp."""
    image = np.arange(height * 6, dtype=np.int64).reshape(height, 2, 3).astype(np.uint8)
    large = draw.enlarge(image)
    assert large.shape == (height * times, 2 * times, 3)
    assert np.array_equal(large[::times, ::times], image)
    assert np.array_equal(large[times - 1::times, times - 1::times], image)


@pytest.mark.parametrize("size, shown", [
    ((200, 300), (200, 300)), ((96, 48), (384, 192)), ((4000, 3000), (1600, 1200)),
    ((1, 1), (192, 192)), ((10, 1000), (16, 1600)), ((1, 9000), (1, 1600))])
def test_look_size(size, shown):
    """The shorter side is 192 or more unless the longer one would exceed 1600."""
    assert draw.look_size(*size) == shown


def test_ramp_blend_and_heat():
    """Colours spread over 0 to 1, clipped; half of each; the lowest blue, the highest red."""
    values = np.array([[-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]])
    assert draw.ramp(values, ((0, 0, 0), (100, 0, 0), (100, 200, 0)))[0].tolist() == [
        [0, 0, 0], [0, 0, 0], [50, 0, 0], [100, 0, 0], [100, 200, 0], [100, 200, 0]]
    assert (draw.blend(plain(2, 2, 200), plain(2, 2, 100)) == 150).all()
    assert (draw.blend(plain(2, 2, 200), plain(2, 2, 100), 1) == 100).all()
    black = plain(1, 2, 0)
    assert draw.lay_heat(black, np.array([[1.0, 3.0]]))[0].tolist() == [[0, 0, 65], [110, 0, 0]]
    bounds = draw.lay_heat(black, np.array([[1.0, 3.0]]), 0.0, 1.0)
    assert (bounds == [110, 0, 0]).all()
    assert (draw.lay_heat(black, np.ones((1, 2))) == [0, 0, 65]).all()     # nothing stands out


# ------------------------------------------------------------------------------------------------
# Legends and sheets

@pytest.mark.parametrize("width, rows", [(60, 4), (119, 4), (240, 2), (479, 2), (480, 1)])
def test_legend_grows(width, rows):
    """As many columns as fit at 120 pixels each; the strip is as wide as the sheet."""
    strip = draw.legend(ENTRIES, width)
    assert strip.shape == (rows * draw.TEXT_HEIGHT + 4, width, 3)
    assert colours(strip) >= {colour for _, colour in ENTRIES}             # none cut off
    assert draw.legend(ENTRIES[:1], width).shape == (draw.TEXT_HEIGHT + 4, width, 3)
    assert colours(draw.legend([], width)) == {(255, 255, 255)}


def test_legend_text():
    """Beside its colour each entry has its name: another name gives another picture."""
    strips = [draw.legend([(name, RED), *ENTRIES[1:3]], 360) for name in ("sky", "sea")]
    differs = (strips[0] != strips[1]).any(axis=(0, 2)).nonzero()[0]
    assert len(differs) and 18 <= differs.min() and differs.max() < 120    # the first column's text


def test_captions_take_the_lines_they_need():
    """The picture is untouched below the text; a long text makes a higher strip."""
    pictures = [draw.caption(plain(50, 140, RED), text) for text in ("a ball", "a ball " * 9, "")]
    heights = [picture.shape[0] - 50 for picture in pictures]
    assert heights == [draw.TEXT_HEIGHT + 4, 3 * draw.TEXT_HEIGHT + 4, draw.TEXT_HEIGHT + 4]
    assert all(colours(picture[-50:]) == {RED} for picture in pictures)
    assert len(colours(pictures[0][:-50])) > 1 and colours(pictures[2][:-50]) == {(255,) * 3}


def test_stacks(tmp_path):
    """Rows under each other, small panels enlarged, white beside narrow rows, titles and footer."""
    rows = [[plain(96, 50, RED), plain(96, 50, GREEN)], [plain(200, 30, BLUE)] * 2]
    draw.save_stack(tmp_path / "new" / "s.png", rows, ("a", "b"), lambda w: plain(5, w, RED))
    sheet = read_png(tmp_path / "new" / "s.png")
    assert sheet.shape == (HEADER + 192 + 4 + 200 + 4 + 5, 200, 3)
    assert colours(sheet[HEADER:HEADER + 192, :100]) == {RED}
    assert colours(sheet[HEADER:HEADER + 192, 100:]) == {GREEN}
    second = sheet[HEADER + 196:HEADER + 396]
    assert colours(second[:, :60]) == {BLUE} and colours(second[:, 60:]) == {(255, 255, 255)}
    assert colours(sheet[-5:]) == {RED} and len(colours(sheet[:HEADER])) > 1


def test_framed_pictures_and_grids(tmp_path):
    """A narrow picture gets a footer of 360 pixels; cells of a grid share the largest one's size.
    """
    draw.save_framed(tmp_path / "f.png", plain(100, 40, RED), lambda w: plain(7, w, GREEN))
    picture = read_png(tmp_path / "f.png")
    assert picture.shape == (111, 360, 3) and colours(picture[:100, :40]) == {RED}
    assert colours(picture[104:]) == {GREEN} and colours(picture[:100, 40:]) == {(255, 255, 255)}
    draw.save_grid(tmp_path / "g.png", [("a", plain(30, 90, RED)), ("b", plain(50, 20, GREEN)),
                                        ("c", plain(9, 9, BLUE))], 2)
    grid, high, wide = read_png(tmp_path / "g.png"), 50 + draw.TEXT_HEIGHT + 6, 94
    assert grid.shape == (2 * high, 2 * wide, 3)
    top = draw.TEXT_HEIGHT + 2
    assert colours(grid[top:top + 30, :90]) == {RED}
    assert colours(grid[top:top + 50, wide:wide + 20]) == {GREEN}
    assert colours(grid[high + top:high + top + 9, :9]) == {BLUE}


# ------------------------------------------------------------------------------------------------
# Bars

@pytest.mark.parametrize("high, expected", [
    (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (7, [0, 2, 4, 6]),
    (13, [0, 5, 10]), (0.03, [0, 0.01, 0.02, 0.03])])
def test_ticks(high, expected):
    """Round numbers, three to six of them."""
    assert draw.ticks(high) == expected


def test_bars_are_as_long_as_the_means(tmp_path):
    """From 0 to the mean, the baseline's dark; a row without values has none; text is drawn."""
    table = [["variant", "what", "mean"], ["base", "all", "4.0"], ["less", "half", "2.0"],
             ["none", "-", "n/a"]]
    draw.save_table(tmp_path / "t.png", "Title", table, [[4.0], [1.0, 3.0], []], ["a note"])
    picture = read_png(tmp_path / "t.png")
    top = draw.MARGIN + 2 * draw.ROW
    middles = [top + draw.ROW * i + draw.ROW // 2 - 8 for i in range(3)]
    dark, blue = ((picture == colour).all(axis=2) for colour in (draw.DARK, draw.BLUE))
    long, short = dark[middles[0]].sum(), blue[middles[1]].sum()
    assert long == pytest.approx(draw.BAR / 1.05, abs=4) and short == pytest.approx(long / 2, abs=3)
    assert not blue[middles[2]].any() and dark[middles[2]].sum() <= 1      # the baseline's line
    draw.save_table(tmp_path / "u.png", "Title", table, [[], [], []], [])  # nothing to draw yet


def test_fit_keeps_what_fits():
    """A picture of the size asked for is handed back; others are resized."""
    picture = noise(20, 30)
    assert draw.fit(picture, 20, 30) is picture and draw.fit(picture, 7, 9).shape == (7, 9, 3)
