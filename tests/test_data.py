"""Data sets give the right pairs, labels and samples, name every broken file, and are resumable.

Proven here, on miniature trees of files made in tmp_path: layouts, label values, error messages;
that a training sample is a function of (seed, epoch, index) alone and keeps image and label
aligned; the order of the batches; and that embedded validation scenes are never trained on.

    python -m pytest tests/test_data.py
"""
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ops import augment
import data
from sets import shapes
from data import SegFiles, Shapes, Stream
from ops.errors import InputError


def write(path, array, palette=None, **options):
    """An array as an image file; with `palette` as a palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette is not None:
        image.putpalette([c for colour in palette for c in colour])
    image.save(path, **options)
    return path


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(values, side=16):
    """(h, w) values -> label of square blocks."""
    return np.asarray(values, np.uint8).repeat(side, axis=0).repeat(side, axis=1)


@pytest.fixture
def folder(tmp_path):
    """A `folder` tree: 3 training pairs (one in a subfolder, one palette PNG), 1 for validation."""
    (tmp_path / "classes.txt").write_text("sky\nroad\nred car\n")
    for i, name in enumerate(("train/b", "train/a", "train/sub/c", "val/d")):
        label = np.full((20, 30), i % 3)
        label[0, 0], label[0, 1] = 255, 2
        palette = [(9, 9, 9), (200, 0, 0), (0, 0, 77)] + [(i, i, i) for i in range(3, 256)]
        write(tmp_path / f"labels/{name}.png", label, palette if i == 1 else None)
        write(tmp_path / f"images/{name}.{'jpg' if i else 'png'}", random_image(20, 30, i))
    return tmp_path


@pytest.fixture
def ade(tmp_path):
    """An `ade20k` tree as released: 2 training pairs, 1 for validation."""
    root = tmp_path / "ADEChallengeData2016"
    for split, name, raw in (("training", "ADE_train_00000001", 1),
                             ("training", "ADE_train_00000002", 150),
                             ("validation", "ADE_val_00000001", 13)):
        label = np.full((24, 40), raw)
        label[0, :3] = 0, 255, 2
        write(root / f"annotations/{split}/{name}.png", label)
        write(root / f"images/{split}/{name}.jpg", random_image(24, 40))
    return tmp_path


def opened(name, root, split="train", **options):
    return data.open_dataset(name, str(root), split, **{"size": 64, "scale": None, **options})


# ------------------------------------------------------------------------------------------------
# Layouts and label values

def test_folder_pairs(folder):
    """Images of a split with their labels, recursively, sorted, whatever the image suffix."""
    dataset = opened("folder", folder)
    names = [(str(a.relative_to(folder)), str(b.relative_to(folder))) for a, b in dataset.pairs]
    assert names == [("images/train/a.jpg", "labels/train/a.png"),
                     ("images/train/b.png", "labels/train/b.png"),
                     ("images/train/sub/c.jpg", "labels/train/sub/c.png")]
    assert len(opened("folder", folder, "val")) == 1
    assert dataset.classes.names == ("sky", "road", "red car")
    assert dataset.check().startswith("3 images; 3 checked: 3 of 3 classes seen")


def test_pairs_are_sorted(tmp_path):
    """The order of the pairs, and with it a run, does not depend on how the disk lists files."""
    for kind in ("images", "labels"):
        for i in np.random.default_rng(0).permutation(40):
            write(tmp_path / kind / f"{i:02}.png", np.zeros((2, 2)))
    pairs = data.list_pairs(tmp_path / "images", tmp_path / "labels")
    names = [f"{i:02}" for i in range(40)]
    assert [a.stem for a, _ in pairs] == [b.stem for _, b in pairs] == names


def test_folder_labels(folder):
    """Label values stay as they are, 255 included; a palette PNG gives indices, not colours."""
    dataset = opened("folder", folder)
    for index, value in enumerate((1, 0, 2)):                              # a (palette), b, c
        label = dataset.load(index)[1]
        assert label[0, :3].tolist() == [255, 2, value] and label[1:].max() == value


def test_ade20k(ade):
    """As released, also without the outer folder: counts, 0 -> 255, k -> k - 1, 255 stays."""
    train, val = opened("ade20k", ade), opened("ade20k", ade / "ADEChallengeData2016", "val")
    assert (len(train), len(val)) == (2, 1)
    assert train.load(0)[1][0, :4].tolist() == [255, 255, 1, 0]
    assert train.load(1)[1][0, :4].tolist() == [255, 255, 1, 149]
    assert val.load(0)[1][5, 5] == 12 and val.classes.names[12] == "person"


def test_ade20k_classes():
    """150 names and colours, from wall to flag; the table of labels in full."""
    classes = data.ade20k_classes()
    assert len(set(classes.names)) == len(classes.palette) == 150
    assert (classes.names[0], classes.names[149]) == ("wall", "flag")
    assert classes.palette[0] == (120, 120, 120)
    assert classes.lut.tolist() == [255, *range(150), *[255] * 105]


@pytest.mark.parametrize("n", [2, 150, 255])
def test_spread_palette(n):
    """Every class has a colour of its own, none of them black, the colour of ignored pixels."""
    palette = data.spread_palette(n)
    assert len(set(palette)) == n
    assert min(max(colour) for colour in palette) >= 100


def test_embedded_classes_have_colours():
    """The embedded set has one colour per class."""
    classes = Shapes(1, training=True, size=64).classes
    assert classes.names == shapes.CLASSES
    assert len(set(classes.palette)) == len(classes.names)


# ------------------------------------------------------------------------------------------------
# Broken input

def test_missing_folders(folder, tmp_path):
    """Without --data, with a --data that isn't there, or without a split: what is missing."""
    with pytest.raises(InputError, match="--dataset folder needs --data"):
        data.open_dataset("folder", None, "train", size=64, scale=None)
    with pytest.raises(InputError, match="--data .*nowhere is no folder"):
        opened("folder", tmp_path / "nowhere")
    (folder / "labels/val").rename(folder / "labels/test")
    with pytest.raises(InputError, match="folder .*labels/val does not exist"):
        opened("folder", folder, "val")
    (folder / "images/val/d.jpg").rename(folder / "images/val/d.txt")
    (folder / "labels/test").rename(folder / "labels/val")
    with pytest.raises(InputError, match="images/val holds no image"):
        opened("folder", folder, "val")


@pytest.mark.parametrize("text, message", [
    (None, "classes.txt is missing"), ("sky\n", "classes.txt names 1 classes"),
    ("sky\n\nroad\n", "classes.txt, line 2 is empty"), ("", "classes.txt names 0 classes"),
    ("x\n" * 256, "classes.txt names 256 classes"),
    (b"caf\xe9\nroad\n", "classes.txt is no UTF-8")])
def test_bad_classes_txt(folder, text, message):
    """A classes.txt that is missing, not text, too short, too long or has a gap is refused."""
    file = folder / "classes.txt"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        opened("folder", folder)


def test_classes_txt_spelling(folder):
    """A byte-order mark, Windows line ends and blank lines at the end change no name."""
    (folder / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\n red car \r\ncaf\xc3\xa9\r\n\r\n")
    assert opened("folder", folder).classes.names == ("sky", "red car", "café")


def test_image_without_label(folder):
    """An image without a label is named, with the label that was looked for and how many lack."""
    (folder / "labels/train/sub/c.png").unlink()
    with pytest.raises(InputError, match=r"sub/c.jpg has no label .*sub/c.png \(1 of 3"):
        opened("folder", folder)


def test_label_out_of_range(folder, ade):
    """A value that is no class is refused with the file, the value and the legal ones."""
    write(folder / "labels/train/b.png", np.full((20, 30), 3))
    with pytest.raises(InputError, match=r"train/b.png holds the label 3: 0\.\.2 and 255"):
        opened("folder", folder).check()
    path = next(ade.rglob("ADE_val_00000001.png"))
    write(path, np.full((24, 40), 151))
    with pytest.raises(InputError, match=r"val_00000001.png holds the label 151: 0\.\.150 and 255"):
        opened("ade20k", ade, "val").check()


def test_16_bit_label(folder):
    """A 16-bit label is read as it is, and refused rather than wrapped if a value exceeds 255."""
    path, label = folder / "labels/train/b.png", np.ones((20, 30), np.uint16)
    Image.fromarray(label).save(path)
    assert opened("folder", folder).load(1)[1].max() == 1
    label[3, 4] = 257
    Image.fromarray(label).save(path)
    with pytest.raises(InputError, match="train/b.png holds the value 257"):
        opened("folder", folder).load(1)


@pytest.mark.parametrize("kept", [0, 3, 150, -40])
@pytest.mark.parametrize("name", ["images/train/a.jpg", "images/train/b.png", "labels/train/a.png"])
def test_truncated_file(folder, name, kept):
    """A file cut short anywhere is named, never half read."""
    path = folder / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{name} cannot be decoded"):
        opened("folder", folder).check()


def test_absurd_image_size(folder):
    """A header that promises 10 gigapixels (corrupt, or a bomb) is refused by name."""
    path = folder / "images/train/b.bmp"
    (folder / "images/train/b.png").unlink()
    write(path, random_image(20, 30))
    raw = bytearray(path.read_bytes())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2                       # width, height
    path.write_bytes(raw)
    with pytest.raises(InputError, match="train/b.bmp cannot be decoded .*exceeds limit"):
        opened("folder", folder).check()


def test_rgb_label(folder):
    """A label of colours is refused: it should hold class numbers."""
    write(folder / "labels/train/b.png", random_image(20, 30))
    with pytest.raises(InputError, match="train/b.png has 3 channels: .*class numbers"):
        opened("folder", folder).check()


def test_size_mismatch(folder):
    """A label of another size than its image is refused with both sizes, width first."""
    write(folder / "labels/train/b.png", np.zeros((30, 20)))
    with pytest.raises(InputError, match="train/b.png is 20x30, its image 30x20"):
        opened("folder", folder).check()


def test_deleted_file(folder):
    """Files that vanish after the set was opened are named."""
    dataset = opened("folder", folder)
    (folder / "labels/train/a.png").unlink()
    with pytest.raises(InputError, match="labels/train/a.png does not exist"):
        dataset[0, 0]
    (folder / "images/train/a.jpg").unlink()
    with pytest.raises(InputError, match="images/train/a.jpg does not exist"):
        dataset[0, 0]


def test_error_in_a_worker(folder):
    """From a worker process it is still an InputError, whose last line names the file."""
    path = folder / "images/train/a.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError) as error:
        next(iter(data.eval_loader(opened("folder", folder), batch=1, workers=1)))
    assert f"{path} cannot be decoded" in str(error.value).strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------
# Samples

@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)),
                                                 (8, (-1, 0))])
def test_exif_orientation(tmp_path, orientation, corner):
    """A photo stored turned is loaded upright: its dark first corner comes where it belongs."""
    pixels = np.full((32, 48, 3), 255)
    pixels[:8, :8] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = data.load_image(write(tmp_path / "a.jpg", pixels, exif=exif))
    assert image.shape == ((32, 48, 3) if orientation in (1, 3) else (48, 32, 3))
    corners = {(y, x): image[y, x].mean() for y in (0, -1) for x in (0, -1)}
    assert min(corners, key=corners.get) == corner and corners[corner] < 60


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_image_modes(tmp_path, mode):
    """Grey, transparent, palette and CMYK images all come as three channels of RGB."""
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (5, 4), (255, 0, 0)).convert(mode).save(path)
    image = data.load_image(path)
    assert image.shape == (4, 5, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == ([76] * 3 if mode in ("L", "LA") else [255, 0, 0])


def seg_files(tmp_path, image, label, classes=4, **options):
    """SegFiles of one pair."""
    pair = write(tmp_path / "a.png", image), write(tmp_path / "label.png", label)
    names = tuple(f"class {i}" for i in range(classes))
    return SegFiles([pair], data.plain_classes(names),
                    **{"training": True, "crop": 64, "scale": None, **options})


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
    dataset = seg_files(tmp_path, random_image(32, 48), label, crop=96, scale=(48, 32))
    flips, heights = 0, []
    for epoch in range(60):
        target = dataset[epoch, 0]["target"].numpy()
        h, w = (target < 4).any(1).sum(), (target < 4).any(0).sum()
        plain = augment.resize_nearest(label, (h, w))
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
    first, second = opened("folder", folder), opened("folder", folder)
    forward = {key: first[key] for key in keys}
    backward = {key: second[key] for key in reversed(keys)}
    for key in keys:
        assert torch.equal(forward[key]["image"], backward[key]["image"])
        assert torch.equal(forward[key]["target"], backward[key]["target"])
    assert len({sample["image"].numpy().tobytes() for sample in forward.values()}) == len(keys)
    other = opened("folder", folder, seed=1)
    assert not any(torch.equal(other[key]["image"], forward[key]["image"]) for key in keys)


def test_workers_change_nothing(folder):
    """Batches are the same, in the same order, from no worker and from two."""
    dataset = opened("folder", folder)
    alone, shared = (list(islice(data.train_loader(dataset, 2, 0, 0, workers), 5))
                     for workers in (0, 2))
    for a, b in zip(alone, shared, strict=True):
        assert a["name"] == b["name"]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])


def test_evaluation_sample(tmp_path):
    """The image is resized within `scale`; the target keeps its own size; nothing is random."""
    image, label = random_image(40, 70), blocks([[0, 1], [2, 3]], side=20).repeat(2, 1)[:, :70]
    dataset = seg_files(tmp_path, image, label, training=False, scale=(64, 32))
    sample = dataset[0, 0]
    size = augment.rescale_size(40, 70, (64, 32))
    assert size == (32, 56) and sample["image"].shape == (3, 32, 56)
    resized = torch.from_numpy(augment.resize_bilinear(image, size)).permute(2, 0, 1)
    torch.testing.assert_close(sample["image"], resized / 255)
    assert torch.equal(sample["target"], torch.from_numpy(label).long())
    assert torch.equal(sample["image"], dataset[5, 0]["image"])
    own = seg_files(tmp_path, image, label, training=False)[0, 0]["image"]
    torch.testing.assert_close(own, torch.from_numpy(image).permute(2, 0, 1) / 255)


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


@pytest.mark.parametrize("batch", [1, 2, 4, 50])
def test_eval_loader_covers_once(batch):
    """Every scene once, in order, the last batch as large as what is left."""
    dataset = Shapes(5, training=False, size=32)
    batches = list(data.eval_loader(dataset, batch, workers=0))
    names = [name for b in batches for name in b["name"]]
    assert names == [dataset[0, index]["name"] for index in range(5)]
    assert [len(b["image"]) for b in batches][:-1] == [batch] * (len(batches) - 1)


# ------------------------------------------------------------------------------------------------
# Embedded scenes

def test_shapes_sample():
    """A sample is the scene of its seed: RGB in [0, 1], labels untouched."""
    dataset = Shapes(7, training=True, size=64, seed=2)
    sample, scene = dataset[3, 4], shapes.render(dataset.scene_seed((3, 4)), 64, 64)
    image = torch.from_numpy(scene.image).permute(2, 0, 1) / 255
    torch.testing.assert_close(sample["image"], image)
    assert torch.equal(sample["target"], torch.from_numpy(scene.label).long())
    assert len(dataset) == 7


def test_shapes_depth_is_taken_by_one_camera():
    """Depth samples are metres of scenes through one lens; with a random one, the best constant
    guess at the factor that lens and stature leave open has a delta1 of 0.79, with one lens of 1.
    """
    dataset = Shapes(7, task="depth", training=True, size=64, seed=2)
    scene = shapes.render(dataset.scene_seed((3, 4)), 64, 64, data.DEPTH_LENS)
    assert torch.equal(dataset[3, 4]["target"], torch.from_numpy(scene.depth))

    def best_delta1(lens):
        drawn = [shapes.frame_person(np.random.default_rng(seed), 64, 64, lens)
                 for seed in range(2000)]
        scale = np.log([stature * camera.focal for camera, stature, _ in drawn])
        guesses = np.linspace(scale.min(), scale.max(), 200)
        return max(np.mean(np.abs(scale - guess) < np.log(1.25)) for guess in guesses)

    assert best_delta1(None) == pytest.approx(0.79, abs=0.02)
    assert best_delta1(data.DEPTH_LENS) > 0.99


def test_shapes_validation_is_never_trained_on():
    """No run's training scenes meet the validation scenes or another run's; none comes twice."""
    val, other = (Shapes(300, training=False, size=64, seed=seed) for seed in (5, 0))
    held_out = [val.scene_seed((0, index)) for index in range(len(val))]
    assert held_out == [other.scene_seed((9, index)) for index in range(300)]
    seen = [*held_out]
    for seed in (0, 1, 2, 3, 1000, 2 ** 20):
        train = Shapes(20_000, training=True, size=64, seed=seed)
        seen += [train.scene_seed((epoch, index)) for epoch in (0, 1, 2, 10 ** 6)
                 for index in (*range(300), *range(19_700, 20_000))]
    twice = len(seen) - len(set(seen))
    assert twice == 0
    assert len(seen) == 300 + 6 * 4 * 600 and min(seen) >= 0


def test_shapes_seed_changes_the_pictures():
    """Runs of two seeds, and two epochs of one run, see other pictures; a rerun the same."""
    def first(seed, epoch):
        return Shapes(4, training=True, size=32, seed=seed)[epoch, 0]["image"].numpy().tobytes()

    assert len({first(0, 0), first(1, 0), first(0, 1)}) == 3
    assert first(1, 0) == first(1, 0)
