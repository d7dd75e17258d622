"""Labels of ADE20K and of one's own folder, the official training pipeline, samples by key alone.

    python -m pytest tests/test_ade20k.py
"""
import numpy as np
import pytest
import torch
from trees import blocks, cut, make_ade, make_seg, random_image, write

from ops import augment, pixels
from ops.errors import InputError
from sets import files
from sets.ade20k import Ade20k, SegFiles, SegFolder
from tasks.seg import export_labels


@pytest.fixture
def folder(tmp_path):
    """A set of one's own: 3 training pairs, 1 for validation."""
    return make_seg(tmp_path)


@pytest.fixture
def ade(tmp_path):
    """The folder of the released archive."""
    return make_ade(tmp_path)


def opened(root, split="train", **options):
    """A set of one's own."""
    return SegFolder(str(root)).open(cut(split, **options))


# ------------------------------------------------------------------------------------------------
# Layouts and label values

def test_folder_pairs(folder):
    """Images of a split with their labels, recursively, sorted, whatever the image suffix."""
    dataset = opened(folder)
    names = [(str(a.relative_to(folder)), str(b.relative_to(folder))) for a, b in dataset.pairs]
    assert names == [("images/train/a.jpg", "labels/train/a.png"),
                     ("images/train/b.png", "labels/train/b.png"),
                     ("images/train/sub/c.jpg", "labels/train/sub/c.png")]
    assert len(opened(folder, "val")) == 1
    assert dataset.classes.names == ("sky", "road", "red car")
    assert dataset.check().startswith("3 images; 3 checked: 3 of 3 classes seen")


def test_folder_labels(folder):
    """Label values stay as they are, 255 included; a palette PNG gives indices, not colours."""
    dataset = opened(folder)
    for index, value in enumerate((1, 0, 2)):                              # a (palette), b, c
        label = dataset.load(index)[1]
        assert label[0, :3].tolist() == [255, 2, value] and label[1:].max() == value


def test_ade20k(ade):
    """As released, also without the outer folder: counts, 0 -> 255, k -> k - 1, 255 stays."""
    train = Ade20k(str(ade)).open(cut())
    val = Ade20k(str(ade / "ADEChallengeData2016")).open(cut("val"))
    assert (len(train), len(val)) == (2, 1)
    assert train.load(0)[1][0, :4].tolist() == [255, 255, 1, 0]
    assert train.load(1)[1][0, :4].tolist() == [255, 255, 1, 149]
    assert val.load(0)[1][5, 5] == 12 and val.classes.names[12] == "person"


def test_ade20k_classes():
    """150 names and colours, from wall to flag; the table of labels in full."""
    classes = Ade20k().classes()
    assert len(set(classes.names)) == len(classes.palette) == 150
    assert (classes.names[0], classes.names[149]) == ("wall", "flag")
    assert classes.palette[0] == (120, 120, 120)
    assert classes.lut.tolist() == [255, *range(150), *[255] * 105]


def test_ade20k_export(tmp_path):
    """ADE20K's labels + 1, 0 for none; they read back as predicted."""
    classes = Ade20k().classes()
    predicted = np.resize([*range(150), 255], (10, 151))
    export_labels(tmp_path / "ADE_test_00000007.png", predicted, classes)
    written = files.load_label(tmp_path / "ADE_test_00000007.png")
    assert written[0].tolist() == [*range(1, 151), 0]
    assert np.array_equal(classes.lut[written], predicted)


# ------------------------------------------------------------------------------------------------
# Broken input

@pytest.mark.parametrize("text, message", [
    (None, "classes.txt is missing"), ("sky\n", "classes.txt names 1 classes"),
    ("sky\n\nroad\n", "classes.txt, line 2, '', is empty"), ("", "line 1, '', is empty"),
    ("sky\nroad\nsky \n", "classes.txt, line 3, 'sky', is empty or there already"),
    ("".join(f"{i}\n" for i in range(256)), "classes.txt names 256 classes"),
    (b"caf\xe9\nroad\n", "classes.txt is no UTF-8")])
def test_bad_classes_txt(folder, text, message):
    """Refused: a file that is missing, no text, too short or long, with a gap or a name twice.
    """
    file = folder / "classes.txt"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        opened(folder)


def test_classes_txt_spelling(folder):
    """A byte-order mark, Windows line ends and blank lines at the end change no name."""
    (folder / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\n red car \r\ncaf\xc3\xa9\r\n\r\n")
    assert opened(folder).classes.names == ("sky", "red car", "café")


def test_label_out_of_range(folder, ade):
    """A value that is no class is refused with the file, the value and the legal ones."""
    write(folder / "labels/train/b.png", np.full((64, 80), 3))
    with pytest.raises(InputError, match=r"train/b.png holds the label 3: 0\.\.2 and 255"):
        opened(folder).check()
    path = next(ade.rglob("ADE_val_00000001.png"))
    write(path, np.full((24, 40), 151))
    with pytest.raises(InputError, match=r"val_00000001.png holds the label 151: 0\.\.150 and 255"):
        Ade20k(str(ade)).open(cut("val")).check()


def test_broken_pair(folder):
    """A label of another size than its image, or a broken file, is named by the first check."""
    write(folder / "labels/train/b.png", np.zeros((80, 64)))
    with pytest.raises(InputError, match="train/b.png is 64x80, its image 80x64"):
        opened(folder).check()
    write(folder / "labels/train/b.png", np.zeros((64, 80)))
    (folder / "images/train/a.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="images/train/a.jpg cannot be decoded"):
        opened(folder).check()


def test_labels_that_ignore_everything_are_refused(folder):
    """There would be nothing to learn or to measure."""
    write(folder / "labels/val/d.png", np.full((64, 80), 255))
    with pytest.raises(InputError, match="all pixels of the 1 labels checked, such as .*d.png"):
        opened(folder, "val").check()


# ------------------------------------------------------------------------------------------------
# Samples

def seg_files(tmp_path, image, label, classes=4, **options):
    """SegFiles of one pair."""
    pair = write(tmp_path / "a.png", image), write(tmp_path / "label.png", label)
    names = tuple(f"class {i}" for i in range(classes))
    return SegFiles([pair], files.plain_classes(names), cut(**options))


def test_training_sample_padding(tmp_path):
    """A small image fills the crop from the top left; the rest is 0.5 exactly, and label 255."""
    dataset = seg_files(tmp_path, random_image(20, 28), np.zeros((20, 28)))
    for epoch in range(8):
        sample = dataset[epoch, 0]
        image, target = sample["image"], sample["target"]
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32
        assert target.shape == (64, 64) and target.dtype == torch.int64
        assert 0 <= image.min() and image.max() <= 1
        inside = target == 0
        h, w = inside[:, 0].sum(), inside[0].sum()
        assert inside[:h, :w].all() and inside.sum() == h * w             # a rectangle, top left
        assert 10 <= h <= 40 and 14 <= w <= 56
        assert target[~inside].eq(255).all()
        padded = image.eq(0.5).all(dim=0)                    # k / 255 is never 0.5: padding only
        assert torch.equal(padded, ~inside)


def test_training_image_follows_label(tmp_path):
    """Scale, crop and flip are the same for image and label; the image alone changes colour.

    A black and white picture of the label: no colour step of the pipeline can bring its black over
    48 or its white below 111, so a threshold reads the label back, up to the blur at the borders.
    """
    label = blocks(np.random.default_rng(1).integers(0, 2, (6, 9)))
    picture = np.repeat(label[..., None] * 255, 3, axis=2)
    dataset = seg_files(tmp_path, picture, label)
    levels, inner_pixels = set(), 0
    for epoch in range(40):
        sample = dataset[epoch, 0]
        image, target = sample["image"], sample["target"].float()
        levels.add(image.max().item())
        window = torch.nn.functional.unfold(target[None, None], 5, padding=2).view(25, 64, 64)
        inner = (window.amin(0) == window.amax(0)) & (target < 2)          # away from borders
        inner_pixels += inner.sum().item()
        assert torch.equal(image.mean(0)[inner] > 80 / 255, target[inner] == 1)
    assert inner_pixels > 40 * 64 * 64 * 0.3
    assert len(levels) > 10                                                # colours did change


def test_training_scale_and_flip(tmp_path):
    """Labels are resized to half to twice `scale` and mirrored in about half of the samples."""
    label = blocks(np.arange(24).reshape(4, 6) % 4, side=8)                # 32 x 48, not symmetric
    dataset = seg_files(tmp_path, random_image(32, 48), label, side=96, scale=(48, 32))
    flips, heights = 0, []
    for epoch in range(60):
        target = dataset[epoch, 0]["target"].numpy()
        h, w = (target < 4).any(1).sum(), (target < 4).any(0).sum()
        plain = pixels.resize_nearest(label, (h, w))
        flipped = np.array_equal(target[:h, :w], plain[:, ::-1])
        assert flipped or np.array_equal(target[:h, :w], plain)
        flips += flipped
        heights.append(h)
    assert 15 <= flips <= 45
    assert 16 <= min(heights) < 20 and 56 < max(heights) <= 64


def test_crop_is_random(tmp_path):
    """Crops of a large image reach each of its four sides, and none shows all of it."""
    label = blocks(np.arange(100).reshape(10, 10), side=16)
    dataset = seg_files(tmp_path, random_image(160, 160), label, classes=100)
    seen = [set(dataset[epoch, 0]["target"].unique().tolist()) for epoch in range(30)]
    for side in (range(10), range(90, 100), range(0, 100, 10), range(9, 100, 10)):
        assert any(set(side) & values for values in seen)
    assert max(len(values - {255}) for values in seen) < 100


def test_same_key_same_sample(folder):
    """A sample depends on seed, epoch and index, not on what was drawn before it."""
    keys = [(epoch, index) for epoch in range(3) for index in range(3)]
    first, second = opened(folder), opened(folder)
    forward = {key: first[key] for key in keys}
    backward = {key: second[key] for key in reversed(keys)}
    for key in keys:
        assert torch.equal(forward[key]["image"], backward[key]["image"])
        assert torch.equal(forward[key]["target"], backward[key]["target"])
    assert len({sample["image"].numpy().tobytes() for sample in forward.values()}) == len(keys)
    other = opened(folder, seed=1)
    assert not any(torch.equal(other[key]["image"], forward[key]["image"]) for key in keys)


def test_evaluation_sample(tmp_path):
    """The image is resized within `scale`; the target keeps its own size; nothing is random."""
    image, label = random_image(40, 70), blocks([[0, 1], [2, 3]], side=20).repeat(2, 1)[:, :70]
    dataset = seg_files(tmp_path, image, label, split="val", scale=(64, 32))
    sample = dataset[0, 0]
    size = augment.rescale_size(40, 70, (64, 32))
    assert size == (32, 56) and sample["image"].shape == (3, 32, 56)
    resized = torch.from_numpy(pixels.resize_bilinear(image, size)).permute(2, 0, 1)
    torch.testing.assert_close(sample["image"], resized / 255)
    assert torch.equal(sample["target"], torch.from_numpy(label).long())
    assert torch.equal(sample["image"], dataset[5, 0]["image"])
    own = seg_files(tmp_path, image, label, split="val")[0, 0]["image"]
    torch.testing.assert_close(own, torch.from_numpy(image).permute(2, 0, 1) / 255)


def test_only_line_feeds_end_a_class_name(folder):
    """VT, FF, FS, NEL and U+2028 split no name: the labels after it would shift."""
    names = ["sky\x0bblue", "ro\x0cad", "c\x1car", "x\x85y", "p\u2028q"]
    (folder / "classes.txt").write_bytes("\n".join(names).encode())
    assert len(opened(folder).classes.names) == 5
