"""Any picture reads as RGB, labels as they are; every missing, broken or odd file is named.

    python -m pytest tests/test_set_files.py
"""
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import random_image, write

from ops.errors import InputError
from sets import files


def saved(path, image, **options):
    """A Pillow image as a file."""
    image.save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------
# Finding

def test_pairs_are_sorted(tmp_path):
    """The order of the pairs, and with it a run, does not depend on how the disk lists files."""
    for kind in ("images", "labels"):
        for i in np.random.default_rng(0).permutation(40):
            write(tmp_path / kind / f"{i:02}.png", np.zeros((2, 2)))
    pairs = files.list_pairs(tmp_path / "images", tmp_path / "labels")
    names = [f"{i:02}" for i in range(40)]
    assert [a.stem for a, _ in pairs] == [b.stem for _, b in pairs] == names


def test_missing_folders_images_and_labels(tmp_path):
    """Without --data, with one that isn't there, without images or a label: what is missing."""
    with pytest.raises(InputError, match="--data is missing"):
        files.find_root(None)
    with pytest.raises(InputError, match="--data .*nowhere is no folder"):
        files.find_root(str(tmp_path / "nowhere"))
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    with pytest.raises(InputError, match="folder .*labels does not exist"):
        files.list_pairs(images, labels)
    labels.mkdir()
    (images / "d.txt").write_text("")
    with pytest.raises(InputError, match="images holds no image"):
        files.list_pairs(images, labels)
    for name in ("images/a.jpg", "images/._a.jpg", "images/sub/c.jpg", "labels/a.png"):
        write(tmp_path / name, np.zeros((2, 2)))         # ._: macOS' shadows, no images
    with pytest.raises(InputError, match=r"sub/c.jpg has no label .*sub/c.png \(1 of 2"):
        files.list_pairs(images, labels)


@pytest.mark.parametrize("length", [1, 49, 50, 99, 100, 20_210])
def test_checked_files_are_spread(length):
    """All of a small set, about fifty of a large one, from its beginning to its end."""
    chosen = files.check_some(lambda i: i, length)
    assert len(chosen) == length if length <= 50 else 50 <= len(chosen) < 100
    assert chosen[0] == 0 and chosen[-1] >= length - length // 50 - 1


@pytest.mark.parametrize("length, bad, refused", [
    (100, [8], False), (100, [8, 10], True), (99, [7], True), (1, [0], True),
    (20_210, range(0, 404 * 49, 404), False), (20_210, range(20_210), True)])
def test_a_set_is_checked_as_it_is_trained_on(length, bad, refused):
    """One broken file in a hundred is skipped, more are refused, and all, with the last's name."""
    def load(i):
        if i in bad:
            raise InputError(f"file {i} is broken")
        return i

    if refused:
        with pytest.raises(InputError, match=r"^file \d+ is broken$"):
            files.check_some(load, length)
    else:
        assert not {*files.check_some(load, length)} & {*bad}


def test_names_of_exported_files():
    """Flat where they differ, else below the images' common folder."""
    assert files.relative_names(["/d/a/x.png", "/d/b/y.1.jpg"]) == {
        "/d/a/x.png": Path("x"), "/d/b/y.1.jpg": Path("y.1")}
    assert files.relative_names(["/d/v/a/x.png", "/d/v/b/x.png"]) == {
        "/d/v/a/x.png": Path("a/x"), "/d/v/b/x.png": Path("b/x")}


def test_names_of_dots_keep_their_suffix():
    """Of "..png" only "." would be left, a name that leads out of the folder of the results."""
    assert files.output_names([Path("a/..png"), Path("a/...jpg"), Path("a/x.png")]) == [
        Path("a/..png"), Path("a/...jpg"), Path("a/x")]


# ------------------------------------------------------------------------------------------------
# Images

@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)),
                                                 (8, (-1, 0))])
def test_exif_orientation(tmp_path, orientation, corner):
    """A photo stored turned is loaded upright: its dark first corner comes where it belongs."""
    pixels = np.full((32, 48, 3), 255)
    pixels[:8, :8] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = files.load_image(write(tmp_path / "a.jpg", pixels, exif=exif))
    assert image.shape == ((32, 48, 3) if orientation in (1, 3) else (48, 32, 3))
    corners = {(y, x): image[y, x].mean() for y in (0, -1) for x in (0, -1)}
    assert min(corners, key=corners.get) == corner and corners[corner] < 60


@pytest.mark.parametrize("mode, name", [("1", "a.png"), ("L", "a.png"), ("LA", "a.png"),
                                        ("RGBA", "a.png"), ("P", "a.png"), ("CMYK", "a.tif")])
def test_image_modes(tmp_path, mode, name):
    """Bilevel, grey, transparent, palette and CMYK images come as the colours they stand for."""
    colours = np.array([[[255, 0, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], np.uint8)
    if mode in ("1", "L", "LA"):
        colours = colours[:, [2, 3, 3, 2]]
    image = Image.fromarray(colours).convert(mode)
    found = files.load_image(saved(tmp_path / name, image))
    assert found.dtype == np.uint8 and np.array_equal(found, colours)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    """65535 is white and 32896 mid-grey: divided by 257, not cut off at 255."""
    pixels = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    path = saved(tmp_path / f"a.{suffix}", pixels)
    assert files.load_image(path)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_transparent_pixels_show_white(tmp_path):
    """Full transparency is white, half blends with white; in RGBA, grey with alpha and palettes."""
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    out = files.load_image(write(tmp_path / "a.png", rgba))
    assert out[0, :2].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert abs(int(out[0, 2, 0]) - 127) <= 1
    grey = Image.merge("LA", [Image.fromarray(np.array([row], np.uint8))
                              for row in ([9, 9], [255, 0])])
    assert files.load_image(saved(tmp_path / "la.png", grey))[0, :, 2].tolist() == [9, 255]
    palette = write(tmp_path / "p.png", [[0, 1]], [(9, 9, 9), (50, 60, 70)], transparency=1)
    assert files.load_image(palette)[0].tolist() == [[9] * 3, [255] * 3]


def test_values_of_unknown_range_are_refused(tmp_path):
    """Floating-point pixels, and integers beyond 16 bits, have no white: they are not guessed."""
    for values, message in ((np.ones((2, 2), np.float32), "floating-point pixels: 8 or 16 bits"),
                            (np.full((2, 2), 70_000, np.int32), "values 70000 to 70000")):
        path = saved(tmp_path / "a.tif", Image.fromarray(values))
        with pytest.raises(InputError, match=f"a.tif cannot be decoded .ValueError: {message}"):
            files.load_image(path)


def test_the_first_frame_is_read(tmp_path):
    """Of an animation the first picture."""
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "a.webp", frames[0], save_all=True, append_images=frames[1:],
                 lossless=True)
    assert (files.load_image(path) == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------
# Labels and depth

def test_16_bit_label(tmp_path):
    """A 16-bit label is read as it is, and refused rather than wrapped if a value exceeds 255."""
    label = np.ones((20, 30), np.uint16)
    path = saved(tmp_path / "b.png", Image.fromarray(label))
    assert files.load_label(path).max() == 1
    label[3, 4] = 257
    saved(path, Image.fromarray(label))
    with pytest.raises(InputError, match="b.png holds the value 257 .*: labels are 0..255"):
        files.load_label(path)


def test_labels_and_depth_of_another_kind(tmp_path):
    """Colours are no labels; colours, eight bits, floats and negative numbers no depth."""
    path = write(tmp_path / "b.png", random_image(20, 30))
    with pytest.raises(InputError, match="b.png has 3 channels: .*class numbers"):
        files.load_label(path)
    with pytest.raises(InputError, match=r"b.png is uint8 of shape \(20, 30, 3\): .* 16-bit PNG"):
        files.load_depth(path)
    with pytest.raises(InputError, match="b.png is uint8 of shape"):
        files.load_depth(write(path, np.zeros((20, 30))))
    with pytest.raises(InputError, match="a.tif is float32 of shape"):
        files.load_depth(saved(tmp_path / "a.tif", Image.fromarray(np.ones((2, 2), np.float32))))
    with pytest.raises(InputError, match="a.tif holds the value -7: depth is 0"):
        files.load_depth(saved(tmp_path / "a.tif", Image.fromarray(np.array([[9, -7]], np.int32))))


@pytest.mark.parametrize("size, orientation, shown", [
    ((20, 30), 1, (20, 30)), ((20, 30), 6, (30, 20)), ((20, 30), 3, None), ((20, 20), 6, None)])
def test_pairs_with_exif(tmp_path, size, orientation, shown):
    """A turned image fits a label that was saved upright; where sizes can't tell it is refused."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = write(tmp_path / "a.jpg", random_image(*size), exif=exif)
    label = write(tmp_path / "b.png", np.zeros(shown or size))
    if shown is None:
        with pytest.raises(InputError, match=f"a.jpg is to be turned .* orientation {orientation}"):
            files.load_pair(image, label, files.load_label)
    else:
        found = files.load_pair(image, label, files.load_label)
        assert found[0].shape[:2] == found[1].shape == shown


def test_pairs_of_two_sizes(tmp_path):
    """Both are named, width first."""
    paths = [write(tmp_path / name, pixels) for name, pixels in (
        ("a.png", random_image(20, 30)), ("b.png", np.zeros((7, 9))))]
    with pytest.raises(InputError, match="b.png is 9x7, its image 30x20"):
        files.load_pair(*paths, files.load_label)


# ------------------------------------------------------------------------------------------------
# Broken files

@pytest.mark.parametrize("kept", [0, 3, 150, -40])
@pytest.mark.parametrize("name", ["a.jpg", "b.png", "label.png"])
def test_truncated_file(tmp_path, name, kept):
    """A file cut short anywhere is named, never half read."""
    path, label = tmp_path / name, name == "label.png"
    write(path, random_image(20, 30)[..., 0] if label else random_image(20, 30))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{name} cannot be decoded"):
        (files.load_label if label else files.load_image)(path)


def test_absurd_image_size(tmp_path):
    """A header that promises 10 gigapixels (corrupt, or a bomb) is refused by name."""
    path = write(tmp_path / "b.bmp", random_image(20, 30))
    raw = bytearray(path.read_bytes())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2                       # width, height
    path.write_bytes(raw)
    with pytest.raises(InputError, match="b.bmp cannot be decoded .*exceeds limit"):
        files.load_image(path)


def test_missing_file(tmp_path):
    """A file that has vanished is named."""
    for load in (files.load_image, files.load_label, files.load_depth):
        with pytest.raises(InputError, match="a.png does not exist"):
            load(tmp_path / "a.png")


# ------------------------------------------------------------------------------------------------
# Classes

@pytest.mark.parametrize("n", [2, 150, 255])
def test_spread_palette(n):
    """Every class has a colour of its own, none of them black, the colour of ignored pixels."""
    palette = files.spread_palette(n)
    assert len(set(palette)) == n
    assert min(max(colour) for colour in palette) >= 100


def test_plain_classes():
    """Labels of one's own are 0..n-1 and 255, in the files, in training and in what is exported."""
    classes = files.plain_classes(("sky", "road", "car"))
    assert classes.lut.tolist() == [0, 1, 2, *[255] * 253]
    assert classes.raw_values == {0, 1, 2, 255}
    assert classes.export[[0, 1, 2, 255]].tolist() == [0, 1, 2, 255]


# ------------------------------------------------------------------------------------------------
# What an adversary found

@pytest.mark.parametrize("error", [TypeError, struct.error, RuntimeError, NotImplementedError,
                                   EOFError, KeyError, MemoryError])
def test_whatever_a_decoder_raises_is_that_files_error(tmp_path, monkeypatch, error):
    """Pillow's plugins raise anything for broken EXIF, AVIF, DDS: the file is named and skipped."""
    path = write(tmp_path / "a.png", np.zeros((2, 2)))

    def broken(*arguments):
        raise error("odd")

    monkeypatch.setattr(files.Image, "open", broken)
    for load in (files.load_image, files.load_label, files.load_depth):
        with pytest.raises(InputError, match=f"a.png cannot be decoded .{error.__name__}"):
            load(path)


def test_exif_that_cannot_be_rewritten(tmp_path):
    """A photo whose EXIF is torn, but whose pixels are fine, is read or named; never a traceback.
    """
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    good = write(tmp_path / "a.jpg", random_image(20, 30), exif=exif).read_bytes()
    start, refused = good.index(b"Exif"), 0
    for place in range(start, start + 100):
        for value in (0, 255):
            path = tmp_path / "b.jpg"
            path.write_bytes(good[:place] + bytes([value]) + good[place + 1:])
            try:
                assert files.load_image(path).size == 20 * 30 * 3
                files.load_pair(path, write(tmp_path / "b.png", np.zeros((30, 20))),
                                files.load_label)
            except InputError:
                refused += 1
    assert 0 < refused < 200


def test_a_png_is_checked_by_its_checksums(tmp_path):
    """A flipped bit of a PNG's pixels is seen: Pillow does not look at the chunks' CRC-32."""
    pixels = np.arange(600, dtype=np.uint16).reshape(20, 30)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), compress_level=0)
    good = bytearray(path.read_bytes())
    place = good.index(b"IDAT") + 200
    good[place] ^= 1
    path.write_bytes(good)
    for load in (files.load_image, files.load_label, files.load_depth):
        with pytest.raises(InputError, match="a.png cannot be decoded"):
            load(path)


def test_absurdly_long_images_are_refused(tmp_path):
    """A small file that claims millions of columns would take long to decode."""
    path = saved(tmp_path / "a.png", Image.new("1", (70_000, 2)))
    with pytest.raises(InputError, match="a.png cannot be decoded .*claims to be 70000x2"):
        files.load_image(path)


def test_bits_and_floats_are_no_depth_and_floats_no_labels(tmp_path):
    """A 1-bit picture is no depth map, whatever its name; a float one neither that nor a label."""
    bits = saved(tmp_path / "a.png", Image.new("1", (4, 4), 1))
    with pytest.raises(InputError, match="a.png is bool of shape"):
        files.load_depth(bits)
    floats = saved(tmp_path / "b.tif", Image.fromarray(np.full((4, 4), np.inf, np.float32)))
    with pytest.raises(InputError, match="b.tif is float32"):
        files.load_depth(floats)
    with pytest.raises(InputError, match="b.tif holds the value inf .float32.: labels are"):
        files.load_label(floats)


def test_shadow_files_are_no_images(tmp_path):
    """macOS' ._0.jpg beside 0.jpg has no label, and needs none."""
    for name in ("images/0.jpg", "images/._0.jpg", "labels/0.png"):
        write(tmp_path / name, np.zeros((2, 2)))
    assert len(files.list_pairs(tmp_path / "images", tmp_path / "labels")) == 1


def test_results_do_not_lie_among_the_images(tmp_path):
    """A run in the folder of the images would give the next one its pictures as images."""
    for out in (tmp_path / "images", tmp_path / "images" / "train" / "run"):
        with pytest.raises(InputError, match="its pictures would be taken for images"):
            files.check_outside(out, str(tmp_path))
    files.check_outside(tmp_path / "run", str(tmp_path))
    files.check_outside(tmp_path / "run", None)
