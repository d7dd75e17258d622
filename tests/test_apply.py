"""Your own images: every kind of file, any size, three tasks, nothing depends on the neighbours.

Proven here: colours of odd files at known pixels; the sizes that the model gets and those of the
results; labels, metres and joints of models whose answer is known; averaging over scales and mirror
images; the command, its files, and what it refuses.

    python -m pytest tests/test_apply.py
"""
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import apply
from ops import augment
import data
from sets import nyu_kitti as depth_data
import eval as evaluation
from ops import udp as pose
import predict
from ops.errors import InputError
from model import Config, MetaPromptModel
from unet import UNetConfig
from vae import VAEConfig
from predict import PROTOCOLS, DepthProtocol, PoseProtocol, Protocol


def noise(height, width):
    """(height, width, 3) uint8 of random pixels."""
    rng = np.random.default_rng([height, width])
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels, **options):
    """Write an array or a Pillow image, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------
# Files

def test_grey_palette_bilevel_and_cmyk(tmp_path):
    """They get the colours that they stand for."""
    colours = np.array([[[255, 0, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], np.uint8)
    image = Image.fromarray(colours)
    for name, picture in (("p.png", image.quantize(4)), ("c.tif", image.convert("CMYK"))):
        assert np.array_equal(data.load_image(save(tmp_path / name, picture)), colours), name
    grey = save(tmp_path / "l.png", np.array([[0, 7, 255]], np.uint8))
    assert data.load_image(grey).tolist() == [[[0] * 3, [7] * 3, [255] * 3]]
    two = save(tmp_path / "1.png", Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert data.load_image(two).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    """65535 is white and 32896 mid-grey: divided by 257, not cut off at 255."""
    path = save(tmp_path / f"a.{suffix}", np.array([[0, 257, 32896, 65535]], np.uint16))
    assert data.load_image(path)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_transparent_pixels_show_white(tmp_path):
    """Full transparency is white, half blends with white; in RGBA, grey with alpha and palettes."""
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    out = data.load_image(save(tmp_path / "a.png", rgba))
    assert out[0, :2].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert abs(int(out[0, 2, 0]) - 127) <= 1
    grey = Image.merge("LA", [Image.fromarray(np.array([[9, 9]], np.uint8)),
                              Image.fromarray(np.array([[255, 0]], np.uint8))])
    assert data.load_image(save(tmp_path / "la.png", grey))[0, :, 2].tolist() == [9, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([0, 0, 0, 50, 60, 70])
    path = save(tmp_path / "p.png", palette, transparency=0)
    assert data.load_image(path).tolist() == [[[255] * 3, [50, 60, 70]]]


@pytest.mark.parametrize("orientation, turn", [
    (3, lambda x: x[::-1, ::-1]), (6, lambda x: x.transpose(1, 0, 2)[:, ::-1]),
    (8, lambda x: x.transpose(1, 0, 2)[::-1]), (2, lambda x: x[:, ::-1])])
def test_exif_orientation(tmp_path, orientation, turn):
    """A photo that is stored turned or mirrored is read upright."""
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / "a.png", noise(5, 8), exif=exif)
    assert np.array_equal(data.load_image(path), turn(noise(5, 8)))


def test_unusable_files(tmp_path):
    """Floating-point, 32-bit, truncated and missing files are an InputError that names them."""
    save(tmp_path / "f.tif", np.array([[0.1, 2.5]], np.float32))
    save(tmp_path / "i.tif", np.array([[0, 70000]], np.int32))
    save(tmp_path / "t.png", noise(30, 30))
    (tmp_path / "t.png").write_bytes((tmp_path / "t.png").read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (("f.tif", "floating-point"), ("i.tif", "70000"), ("t.png", "decoded"),
                          ("text.jpg", "decoded"), ("none.png", "does not exist")):
        with pytest.raises(InputError, match=f"{name} .*{message}"):
            data.load_image(tmp_path / name)


def test_find_images(tmp_path):
    """Subfolders too, sorted, other files left out, and so are results of an earlier run inside."""
    for name in ("b/x.PNG", "a.jpg", "out/a_overlay.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    root, files = apply.find_images(str(tmp_path), tmp_path / "out")
    assert root == tmp_path and files == [Path("a.jpg"), Path("b/x.PNG")]
    assert apply.find_images(str(tmp_path / "b"), tmp_path)[1] == [Path("x.PNG")]
    assert apply.find_images(str(tmp_path / "a.jpg"), tmp_path) == (tmp_path, [Path("a.jpg")])
    with pytest.raises(InputError, match="out holds no image .*.jpg"):
        (tmp_path / "out" / "a_overlay.png").unlink()
        apply.find_images(str(tmp_path / "out"), tmp_path / "other")


@pytest.mark.parametrize("files, names", [
    (["a/x.png", "b/x.jpg"], ["a/x", "b/x"]),
    (["x.jpg", "x.png", "y.png"], ["x.jpg", "x.png", "y"]),
    (["x.jpg", "x.png", "x.png.jpg"], ["x.jpg", "x.png", "x.png.jpg"])])
def test_output_names_are_unique(files, names):
    """Relative paths are kept; the suffix stays where two files would share a name."""
    assert apply.output_names([Path(f) for f in files]) == [Path(n) for n in names]


# ------------------------------------------------------------------------------------------------
# Sizes

@pytest.mark.parametrize("size, expected", [
    ((100, 200), (100, 200)), ((256, 256), (256, 256)), ((3000, 4000), (192, 256)),
    ((4000, 3000), (256, 192)), ((20, 30), (64, 96)), ((1, 1), (64, 64)), ((5, 2000), (64, 256)),
    ((100, 1000), (64, 256))])
def test_bounded(size, expected):
    """The longer side is at most 256, none below 64, the aspect kept if possible."""
    image = np.zeros((*size, 3), np.uint8)
    out = apply.bounded(image, 256)
    assert out.shape == (*expected, 3)
    assert (out is image) == (size == expected)


class Pointwise(nn.Module):
    """A model whose answer at a pixel is a fixed function of that pixel: labels, metres, both."""

    def __init__(self, config):
        super().__init__()
        self.config, self.prompts = config, nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        if self.config.task == "depth":
            return images[:, :1] * 9 + 0.5
        return 20 * torch.stack([images[:, 0], images[:, 1], 0.5 + 0 * images[:, 2]], dim=1)


def seg_setup(protocol, **changes):
    """A setup for `Pointwise` of three classes."""
    return replace(apply.Setup(protocol, torch.float32, (64, 64), 128,
                               classes=data.plain_classes(("red", "green", "dark"))), **changes)


SEG = Config(num_classes=3)


@pytest.mark.parametrize("size", [(300, 200), (70, 500), (20, 30), (90, 90)])
@pytest.mark.parametrize("scale", [(512, 128), None])
def test_labels_are_those_of_evaluation(tmp_path, size, scale):
    """The model gets the very pixels that the data set would give it, so labels are the same."""
    protocol = Protocol(scale, 64, 43) if scale else Protocol(None, None, None)
    pair = (save(tmp_path / "a.png", noise(*size)), save(tmp_path / "l.png", noise(*size)[..., 0]))
    classes = data.plain_classes(tuple(map(str, range(255))))
    dataset = data.SegFiles([pair], classes, training=False, crop=64, scale=scale)
    model, sample = Pointwise(SEG), dataset[0, 0]
    image = data.load_image(pair[0])
    setup = seg_setup(protocol, max_side=512)
    assert min(size) < 64 or np.array_equal(
        apply.model_input(image, protocol, 512),
        (sample["image"] * 255).round().byte().permute(1, 2, 0).numpy())
    labels = apply.predict_labels(model, image, setup)
    expected = predict.predict_seg(model, sample["image"][None], size, protocol, torch.float32)
    assert labels.shape == size and labels.dtype == np.uint8
    assert min(size) < 64 or np.array_equal(labels, expected.argmax(dim=1)[0].numpy())


def test_long_thin_images_at_a_scale():
    """Sides that the protocol's scale would make smaller than 64 pixels become 64."""
    out = apply.model_input(noise(10, 900), Protocol((512, 128), 64, 43), 128)
    assert out.shape == (64, 512, 3)


def test_large_images_in_bounded_memory(monkeypatch):
    """Labels above the bound are predicted at fewer pixels, and still have the image's size."""
    monkeypatch.setattr(apply, "PROBABILITIES", 3 * 40 * 30)
    image = np.zeros((120, 90, 3), np.uint8)
    image[:60, :, 0] = image[60:, :, 1] = 255
    labels = apply.predict_labels(Pointwise(SEG), image, seg_setup(Protocol(None, None, None)))
    assert labels.shape == (120, 90)
    assert (labels[:57] == 0).all() and (labels[63:] == 1).all()


# ------------------------------------------------------------------------------------------------
# Scales and mirror images

def test_tta_scales_are_mmsegmentations():
    """600 x 800 at (2048, 512) times 0.5 to 2: both bounds rounded down, sides to the nearest."""
    protocol = predict.with_tta(Protocol((2048, 512), None, None))
    model = Pointwise(SEG)
    probs = predict.predict_seg(model, torch.rand(1, 3, 600, 800), (6, 8), protocol, torch.float32)
    assert probs.shape == (1, 3, 6, 8)
    assert model.shapes == [(2, 3, h, w) for h, w in (
        (256, 341), (384, 512), (512, 683), (640, 853), (768, 1024), (896, 1195), (1024, 1365))]


def test_tta_averages_probabilities():
    """Two scales with different answers give the mean of the softmaxes, not of the logits."""
    def by_height(x):
        logit = torch.full((len(x), 1, *x.shape[-2:]), {128: 4.0, 64: -1.0}[x.shape[-2]])
        return torch.cat([logit, 0 * logit], dim=1)

    protocol = Protocol(None, None, None, ratios=(0.5, 1.0))
    probs = predict.predict_seg(by_height, torch.zeros(1, 3, 128, 130), (5, 5), protocol,
                                torch.float32)
    mean = (torch.tensor([4.0, -1.0]).sigmoid()).mean()
    torch.testing.assert_close(probs[0, 0], mean.expand(5, 5))


def columns(images):
    """A model that is anything but symmetric: two classes, one the likelier the farther right."""
    ramp = torch.linspace(-2, 3, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
    return torch.cat([ramp * (1 + images[:, :1]), images[:, 1:2]], dim=1)


def test_flipped_images_give_flipped_probabilities():
    """With the mirror image averaged, prediction commutes with flipping, for any model: exactly
    where nothing is resized.
    """
    images = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    protocol = Protocol(None, 16, 11, flip=True)
    there, back = (predict.predict_seg(columns, x, (40, 50), protocol, torch.float32)
                   for x in (images, images.flip(-1)))
    torch.testing.assert_close(back.flip(-1), there, rtol=0, atol=1e-6)
    plain = predict.predict_seg(columns, images, (40, 50), Protocol(None, 16, 11), torch.float32)
    assert (plain - there).abs().max() > 0.1
    whole = [predict.predict_seg(Pointwise(SEG), x, (20, 33),
                                 Protocol(None, None, None, flip=True), torch.float32)
             for x in (images, images.flip(-1))]
    assert torch.equal(whole[1].flip(-1), whole[0])


@pytest.mark.parametrize("window, stride", [(None, None), (16, 11)])
def test_one_ratio_and_flips_of_a_pointwise_model_change_nothing(window, stride):
    """Windows, ratio 1 and mirror images leave a model of single pixels as it is."""
    images = torch.rand(2, 3, 30, 41, generator=torch.Generator().manual_seed(0))
    expected = Pointwise(SEG)(images).softmax(dim=1)
    for flip in (False, True):
        protocol = Protocol(None, window, stride, ratios=(1.0,), flip=flip)
        probs = predict.predict_seg(Pointwise(SEG), images, (30, 41), protocol, torch.float32)
        torch.testing.assert_close(probs, expected)


def test_rescale_is_cv2s():
    """Each ratio is resized by the training pipeline's bilinear rule, from uint8; 1 is exact."""
    images = torch.from_numpy(noise(100, 130)).permute(2, 0, 1)[None].float() / 255
    smaller = augment.resize_bilinear(noise(100, 130), (75, 97))           # 97.5 is rounded down
    out = predict.rescale(images, None, 0.75)
    assert torch.equal(out[0], torch.from_numpy(smaller).permute(2, 0, 1).float() / 255)
    assert torch.equal(predict.rescale(images, None, 1.0), images)
    assert predict.rescale(images, None, 0.5).shape[-2:] == (64, 65)       # never below 64


# ------------------------------------------------------------------------------------------------
# Depth

@pytest.mark.parametrize("size", [(100, 64), (64, 200), (9, 5)])
@pytest.mark.parametrize("windows", [1, 2])
def test_depth_png_holds_metres(tmp_path, size, windows):
    """value / units is the predicted depth, at the image's size, portraits too."""
    protocol = DepthProtocol(windows, True, None, 10.0, 0, 1000.0)
    setup = apply.Setup(protocol, torch.float32, (64, 64), 256, units=1000.0)
    image = np.full((*size, 3), 51, np.uint8)
    apply.apply_depth(Pointwise(Config(task="depth")), image, Path("x.png"), tmp_path / "x", setup)
    depth = depth_data.load_depth(tmp_path / "x_depth.png") / 1000
    assert depth.shape == size and np.allclose(depth, 0.2 * 9 + 0.5, atol=0.0006)
    with Image.open(tmp_path / "x_depth_colour.png") as picture:
        assert picture.mode == "RGB" and picture.width >= 360


def test_units():
    """The benchmark's units, unless the model sees too far for 16 bits of them."""
    assert apply.find_units(PROTOCOLS["depth", "nyu"], 10.0) == 1000
    assert apply.find_units(PROTOCOLS["depth", "nyu"], 80.0) == 256
    assert apply.find_units(PROTOCOLS["depth", "kitti"], 80.0) == 256
    assert apply.find_units(PROTOCOLS["depth", "kitti"], 300.0) == 100
    assert apply.find_units(PROTOCOLS["depth", "kitti"], 20000.0) == 1


# ------------------------------------------------------------------------------------------------
# Pose

def boxes_file(path, content):
    """Write content as JSON."""
    path.write_text(json.dumps(content))
    return path


def test_boxes_formats(tmp_path):
    """A list with names, a list with image ids and a mapping give the same boxes."""
    by_name = apply.read_boxes(boxes_file(tmp_path / "a", [
        {"file_name": "s/7.jpg", "bbox": [1, 2, 3, 4]}, {"file_name": "s/7.jpg",
                                                         "bbox": [5, 6, 7, 8]}]))
    mapping = apply.read_boxes(boxes_file(tmp_path / "b", {
        "s/7.jpg": [[1, 2, 3, 4], [5, 6, 7, 8]]}))
    by_id = apply.read_boxes(boxes_file(tmp_path / "c", [
        {"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 1},
        {"image_id": 7, "bbox": [5, 6, 7, 8], "category_id": 2}]))
    file = Path("s/7.jpg")
    assert by_name == mapping and len(apply.boxes_of(by_name, file)) == 2
    assert apply.boxes_of(by_id, Path("s/000007.png")) == [
        {"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}]
    for boxes, other in ((by_name, "7.jpg"), (by_id, "8.jpg"), (by_id, "x7.jpg")):
        assert apply.boxes_of(boxes, Path(other)) == []


@pytest.mark.parametrize("content, message", [
    (3, "no boxes file"), ([3], "no boxes file"), ({"a.png": 3}, "no boxes file"),
    ([{"bbox": [1, 2, 3, 4]}], "entry number 0: file_name .* or image_id"),
    ([{"file_name": "a", "bbox": [1, 2, 3]}], "entry number 0: bbox is .* of 4 finite"),
    ({"a": [[1, 2, 3, 0]]}, "entry number 0: its box is 3 wide and 0 high"),
    ([{"file_name": "a", "bbox": [1, 2, 3, 4], "score": "x"}], "score is 'x', but should be")])
def test_bad_boxes(tmp_path, content, message):
    """A file that holds no boxes is refused by entry."""
    with pytest.raises(InputError, match=f"boxes.json.*{message}"):
        apply.read_boxes(boxes_file(tmp_path / "boxes.json", content))


class Brightest(nn.Module):
    """A pose model that finds white dots: every heatmap is the crop's brightness, blurred."""

    def __init__(self):
        super().__init__()
        self.config, self.prompts = Config(task="pose", sigma=2.0), nn.Parameter(torch.zeros(1))

    def forward(self, images):
        blurred = F.avg_pool2d(F.avg_pool2d(images[:, :1], 9, 1, 4), 9, 1, 4)
        return blurred.expand(-1, 17, -1, -1)


def pose_setup(**changes):
    """A setup with crops of 128 x 96."""
    return replace(apply.Setup(PoseProtocol(batch=2), torch.float32, (128, 96), 256), **changes)


def dotted(size, x, y):
    """An image with a white dot around pixel (x, y)."""
    image = np.zeros((*size, 3), np.uint8)
    image[y - 3:y + 4, x - 3:x + 4] = 255
    return image


@pytest.mark.parametrize("size", [(120, 300), (300, 120)])
def test_joints_are_in_pixels_of_the_image(size):
    """A dot is found where it is, from the whole image as one box and from a box around it."""
    x, y = size[1] // 3, size[0] // 2
    for boxes in (None, {"a.png": [{"image_id": None, "bbox": [x - 30, y - 40, 60, 70],
                                    "score": 1.0}]}):
        setup, file = pose_setup(boxes=boxes), Path("a.png")
        image = dotted(size, x, y)
        person, = apply.predict_people(Brightest(), image, apply.image_boxes(image, file, setup),
                                       setup)
        joints = np.array(person["keypoints"]).reshape(17, 3)
        assert np.abs(joints[:, :2] - (x, y)).max() < 1.5
        assert set(person) == {"category_id", "bbox", "score", "keypoints"}


def test_people_best_first_without_near_copies():
    """Of boxes on one person the best is kept; the order is by score; batches change nothing."""
    image = np.maximum(dotted((200, 300), 60, 100), dotted((200, 300), 240, 90))
    boxes = [{"image_id": 4, "bbox": box, "score": score} for box, score in (
        ([30, 60, 60, 80], 0.3), ([210, 50, 60, 80], 0.9), ([30, 60, 60, 80], 0.6))]
    found = [apply.predict_people(Brightest(), image, boxes,
                                  pose_setup(protocol=PoseProtocol(batch=n))) for n in (1, 2, 8)]
    assert [(p["bbox"][0], p["image_id"]) for p in found[0]] == [(210, 4), (30, 4)]
    assert found[0][1]["score"] / found[0][0]["score"] == pytest.approx(0.6 / 0.9, rel=0.05)
    assert all(np.allclose([p["keypoints"] for p in f], [p["keypoints"] for p in found[0]])
               for f in found)
    assert apply.predict_people(Brightest(), image, [], pose_setup()) == []


def test_tiny_images_hold_a_person():
    """A single pixel is cropped, too."""
    image = np.full((1, 1, 3), 255, np.uint8)
    boxes = apply.image_boxes(image, Path("a.png"), pose_setup())
    assert len(apply.predict_people(Brightest(), image, boxes, pose_setup())) == 1


# ------------------------------------------------------------------------------------------------
# The command

TINY = dict(num_prompts=5, refine_steps=2, head_channels=16,
            unet=UNetConfig((16,) * 4, layers=1, num_heads=1, context_dim=16, groups=4),
            vae=VAEConfig((8,) * 4, layers=1, groups=4), sigma=2.0,
            deconv_channels=(8,), num_classes=7, max_depth=80.0)
MADE = {"seg": ("labels", "overlay"), "depth": ("depth", "depth_colour"), "pose": ("people",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder per task: untrained tiny models on the embedded scenes."""
    folder = tmp_path_factory.mktemp("runs")
    for task in MADE:
        torch.manual_seed(0)
        MetaPromptModel(Config(task=task, **TINY)).save_pretrained(folder / task / "best")
        recipe = {"task": task, "dataset": "shapes", "crop": 64, "val_scenes": 2}
        (folder / task / "recipe.json").write_text(json.dumps(recipe))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a portrait, a landscape, a tiny, a 16-bit and a broken file; names collide."""
    folder = tmp_path_factory.mktemp("photos")
    save(folder / "a" / "x.png", noise(150, 90))
    save(folder / "b" / "x.jpg", noise(70, 200))
    save(folder / "b" / "x.png", noise(12, 20))
    save(folder / "deep.png", np.arange(80 * 70, dtype=np.uint16).reshape(80, 70) * 11)
    (folder / "broken.png").write_text("junk")
    return folder


def command(monkeypatch, *arguments):
    """Run eval.py's main with these arguments."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments), "--device", "cpu",
                                      "--precision", "float32"])
    evaluation.main()


def read(path):
    """A PNG's array."""
    with Image.open(path) as image:
        return np.array(image)


NAMES = {"a/x": (150, 90), "b/x.jpg": (70, 200), "b/x.png": (12, 20), "deep": (80, 70)}


@pytest.mark.parametrize("task", MADE)
def test_a_folder(runs, photos, tmp_path, monkeypatch, capsys, task):
    """Every readable image gets its files, of its own size, under its own name; the rest is told.

    A file alone gives the very bytes that it gives among others.
    """
    command(monkeypatch, "--checkpoint", runs / task, "--image", photos, "--out", tmp_path / "all")
    out = capsys.readouterr().out
    assert "images     5 in" in out and "images/s; 1 skipped" in out and "4 images in" in out
    assert f"skipped    {photos / 'broken.png'} cannot be decoded" in out
    files = {str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*.*")}
    files -= {"b/x.jpg", "b/x.png"}
    wanted = {f"{name}_{kind}.png" for name in NAMES for kind in MADE[task]}
    assert files == wanted | ({"keypoints.json"} if task == "pose" else set())
    command(monkeypatch, "--checkpoint", runs / task, "--image", photos / "a" / "x.png", "--out",
            tmp_path / "one")
    for kind in MADE[task]:
        assert ((tmp_path / "one" / f"x_{kind}.png").read_bytes()
                == (tmp_path / "all" / "a" / f"x_{kind}.png").read_bytes())
    if task == "pose":
        everyone = json.loads((tmp_path / "all" / "keypoints.json").read_text())
        alone, = json.loads((tmp_path / "one" / "keypoints.json").read_text())
        assert [p["file_name"] for p in everyone] == ["a/x.png", "b/x.jpg", "b/x.png", "deep.png"]
        assert {**everyone[0], "file_name": "x.png"} == alone and len(alone["keypoints"]) == 51
    else:
        for name, size in NAMES.items():
            assert read(tmp_path / "all" / f"{name}_{MADE[task][0]}.png").shape == size


def test_label_files_have_the_palette(runs, photos, tmp_path, monkeypatch, capsys):
    """Pixels are class numbers, coloured as in pictures; the model got at most --max-side pixels.
    """
    command(monkeypatch, "--checkpoint", runs / "seg", "--image", photos / "a" / "x.png", "--out",
            tmp_path, "--max-side", 100)
    assert "at most 100 pixels for the model" in capsys.readouterr().out
    labels = data.load_label(tmp_path / "x_labels.png")
    assert labels.max() < 7
    with Image.open(tmp_path / "x_labels.png") as image:
        colours = np.array(image.convert("RGB"))
    assert np.array_equal(colours, np.array(data.COLOURS, np.uint8)[labels])


def test_boxes_through_the_command(runs, photos, tmp_path, monkeypatch):
    """People are looked for in the boxes; an image without boxes has nobody and is still drawn."""
    boxes = boxes_file(tmp_path / "boxes.json", {"b/x.jpg": [[10, 10, 50, 50], [100, 5, 60, 60]]})
    command(monkeypatch, "--checkpoint", runs / "pose", "--image", photos, "--out", tmp_path / "o",
            "--boxes", boxes)
    found = json.loads((tmp_path / "o" / "keypoints.json").read_text())
    assert sorted(p["bbox"] for p in found) == [[10, 10, 50, 50], [100, 5, 60, 60]]
    assert {p["file_name"] for p in found} == {"b/x.jpg"}
    assert (tmp_path / "o" / "deep_people.png").is_file()


def test_default_output_and_crop(runs, photos, monkeypatch, capsys):
    """Without --out results go to RUN/predictions; --max-side is twice the run's crop."""
    command(monkeypatch, "--checkpoint", runs / "depth", "--image", photos / "deep.png")
    assert (runs / "depth" / "predictions" / "deep_depth.png").is_file()
    out = capsys.readouterr().out
    assert "at most 128 pixels" in out and "metres = value / 256" in out
    assert apply.training_crop(Path("x.ckpt"), "depth", "nyu") == (480, 480)
    assert apply.training_crop(Path("x.ckpt"), "pose", "coco") == (576, 448)


@pytest.mark.parametrize("task, flags, message", [
    ("seg", ["--image", "nowhere"], "--image nowhere does not exist"),
    ("seg", ["--image", "EMPTY"], "holds no image"),
    ("seg", ["--image", "BAD"], "broken.png cannot be decoded"),
    ("seg", ["--image", "BADS"], "none of the 2 images can be read: .*a.png cannot"),
    ("seg", ["--image", "GOOD", "--out", "BAD"], "is a file: a folder is needed"),
    ("seg", ["--image", "EMPTY", "--out", "EMPTY"], "is the folder of the images"),
    ("seg", ["--image", "GOOD", "--max-side", "63"], "--max-side 63: 64 pixels or more"),
    ("seg", ["--image", "GOOD", "--export", "x"], "--export is about a labelled data set"),
    ("seg", ["--image", "GOOD", "--boxes", "x"], "--boxes is for pose: the model's task is seg"),
    ("seg", ["--image", "GOOD", "--dataset", "ade20k"], "predicts 7 classes.*ade20k has 150"),
    ("seg", ["--heatmaps"], "--heatmaps needs --image"),
    ("seg", ["--max-side", "128"], "--max-side needs --image"),
    ("seg", ["--image", "GOOD", "--heatmaps", "6"], "--heatmaps 6: the model has 5 prompts"),
    ("depth", ["--image", "GOOD", "--tta"], "--tta is for segmentation"),
    ("pose", ["--image", "GOOD", "--max-side", "128"], "not for pose"),
    ("pose", ["--image", "GOOD", "--boxes", "JSON"], "no box for any of the 1 images")])
def test_what_is_refused(runs, photos, tmp_path, monkeypatch, task, flags, message):
    """One line that names the flag or file, before any prediction."""
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "bads").mkdir(exist_ok=True)
        (tmp_path / "bads" / name).write_text("junk")
    boxes_file(tmp_path / "boxes.json", {"other.png": [[1, 2, 3, 4]]})
    places = {"EMPTY": tmp_path / "empty", "BAD": photos / "broken.png", "BADS": tmp_path / "bads",
              "GOOD": photos / "deep.png", "JSON": tmp_path / "boxes.json"}
    monkeypatch.chdir(tmp_path)
    if "--out" not in flags:
        flags = [*flags, "--out", "here"]
    with pytest.raises(InputError, match=message) as error:
        command(monkeypatch, "--checkpoint", runs / task, *(places.get(f, f) for f in flags))
    assert "\n" not in str(error.value)


def test_a_data_set_with_tta(runs, monkeypatch, tmp_path):
    """Evaluation reports the 14 passes in its protocol."""
    command(monkeypatch, "--checkpoint", runs / "seg", "--tta", "--workers", 0, "--out", tmp_path)
    protocol = json.loads((tmp_path / "metrics.json").read_text())["protocol"]
    assert protocol["flip"] and protocol["ratios"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


@pytest.mark.parametrize("key", PROTOCOLS, ids="-".join)
def test_protocols_in_words(key):
    """Every number of a protocol is in its description; another value gives another one."""
    protocol = PROTOCOLS[key]
    text = predict.in_words(protocol)
    others = {bool: lambda v: not v, int: lambda v: v + 3, float: lambda v: v + 0.25,
              str: lambda v: {"nyu": "garg", "garg": None}.get(v, v + "!"),
              tuple: lambda v: (*v[:-1], v[-1] + 7), type(None): lambda v: "eigen"}
    for field in fields(protocol):
        value = getattr(protocol, field.name)
        if isinstance(protocol, Protocol) and value is None:
            continue                                     # scale, window and stride come together
        changed = replace(protocol, **{field.name: others[type(value)](value)})
        assert predict.in_words(changed) != text, field.name


def test_protocol_flag(runs, monkeypatch, capsys):
    """--protocol says what would be done, and does nothing."""
    command(monkeypatch, "--checkpoint", runs / "seg", "--protocol", "--tta", "--dataset", "ade20k")
    out = capsys.readouterr().out
    for words in ("2048 x 512 pixels", "512 x 512 pixels, every 341", "official: configs/ade.py",
                  "0.5, 0.75, 1, 1.25, 1.5, 1.75, 2 of that; probabilities averaged"):
        assert words in out
    assert "model  " not in out and not (runs / "seg" / "eval").exists()
