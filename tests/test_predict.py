"""Prediction on whole images: devices, windows, averaging, mirror images.

Proven here: window positions against figures that mmsegmentation and the official depth code
printed (tests/golden); that sliding averages logits, window by window, before the softmax; that
windows and flips of models whose answer is known change nothing.

    python -m pytest tests/test_predict.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import randomise
from torch import nn

import predict
from ops.errors import InputError
from model import Config, MetaPromptModel
from unet import UNetConfig
from vae import VAEConfig
from predict import PROTOCOLS, Protocol

GOLDEN = json.loads((Path(__file__).parent / "golden" / "seg.json").read_text())
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# Devices

def test_pick_device():
    """Names torch knows are taken; unknown names and absent GPUs are an InputError."""
    assert predict.pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert predict.pick_device("auto").type == expected
    for name in ("gpu", "cuda:x", ""):
        with pytest.raises(InputError, match=f"--device {name} is unknown: auto, cpu, cuda"):
            predict.pick_device(name)
    with pytest.raises(InputError, match=r"--device cuda:99: torch .* sees \d+ GPUs"):
        predict.pick_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    """Asking for a GPU where there is none is refused, not silently run on the CPU."""
    with pytest.raises(InputError, match="--device cuda: torch .* sees 0 GPUs"):
        predict.pick_device("cuda")


def test_pick_precision():
    """A named precision is taken as it is; auto decides for one of the two."""
    assert predict.pick_precision("float32", CPU) == torch.float32
    assert predict.pick_precision("bfloat16", CPU) == torch.bfloat16
    assert predict.pick_precision("auto", CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Inside, matrix products have the precision asked for."""
    with predict.autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("task", ["seg", "depth", "pose"])
def test_settled_weights_give_the_same_answers(task):
    """Under autocast a settled model answers bit for bit as before; nearly all bytes are halved."""
    torch.manual_seed(0)
    model = randomise(MetaPromptModel(Config(
        task, num_prompts=5, refine_steps=2, shared_prompts=task == "seg",
        prompt_adapter=task != "seg", num_classes=4, head_channels=16,
        unet=UNetConfig((32,) * 4, num_heads=4, context_dim=32), vae=VAEConfig((32,) * 4))).eval())
    images = torch.rand(1, 3, 64, 128)
    answers, sizes = [], []
    for _ in range(2):
        with torch.inference_mode(), predict.autocast(CPU, torch.bfloat16):
            answers.append(model(images))
        sizes.append(sum(p.nbytes for p in model.parameters()))
        predict.settle(model, torch.bfloat16)
    assert torch.equal(*answers) and sizes[1] < 0.55 * sizes[0]


# ------------------------------------------------------------------------------------------------
# Sliding windows

@pytest.mark.parametrize("case", GOLDEN["windows"])
def test_golden_windows(case):
    """Windows are mmsegmentation's, in its order; the last is shifted back to the edge."""
    places = predict.windows(*case["hw"], case["crop"], case["stride"])
    assert places == [tuple(window) for window in case["windows"]]


def test_official_protocol():
    """ADE20K: short side 512, windows of 512 every 341 pixels, one image at a time."""
    protocol = PROTOCOLS["seg", "ade20k"]
    assert (protocol.scale, protocol.window, protocol.stride) == ((2048, 512), 512, 341)
    assert protocol.batch == 1


def test_windows_cover_everything():
    """For random sizes every pixel is covered, by windows inside the image and of full size."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, crop = rng.integers(1, 60, 3).tolist()
        stride = int(rng.integers(1, crop + 1))
        count = np.zeros((height, width), int)
        for y1, y2, x1, x2 in predict.windows(height, width, crop, stride):
            assert 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
            assert (y2 - y1, x2 - x1) == (min(crop, height), min(crop, width))
            count[y1:y2, x1:x2] += 1
        assert count.min() >= 1


def pointwise(images):
    """A model that looks at one pixel at a time."""
    return torch.cat([images.sin(), images.sum(dim=1, keepdim=True) ** 2], dim=1)


def position(images):
    """A model whose answer is the column within the window, in one channel."""
    return torch.arange(images.shape[-1]).float().expand(len(images), 1, *images.shape[-2:])


@pytest.mark.parametrize("size", [(30, 41), (7, 50), (9, 9), (16, 16)])
def test_slide_of_pointwise_function(size):
    """Sliding a function of single pixels is that function, also on an image below one window."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    out = predict.slide(pointwise, images, crop=16, stride=11)
    torch.testing.assert_close(out, pointwise(images))


def test_slide_of_constant():
    """However often a pixel is covered, a constant stays that constant."""
    out = predict.slide(lambda x: torch.full((len(x), 5, *x.shape[-2:]), 1.7),
                           torch.zeros(1, 3, 37, 45), crop=16, stride=5)
    torch.testing.assert_close(out, torch.full((1, 5, 37, 45), 1.7))


def test_slide_averages():
    """Where windows overlap the answer is their mean: 6 columns, windows 0..3 and 2..5."""
    out = predict.slide(position, torch.zeros(1, 3, 4, 6), crop=4, stride=2)
    assert out[0, 0].tolist() == [[0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]] * 4


@pytest.mark.parametrize("batch", [2, 3, 8, 100])
def test_batched_windows(batch):
    """Several windows and images per call give what one window at a time gives."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 5, padding=2)
    images, calls = torch.rand(2, 3, 30, 41), []

    def counted(x):
        calls.append(len(x))
        return net(x)

    with torch.no_grad():
        together = predict.slide(counted, images, 16, 11, batch=batch)
        alone = torch.cat([predict.slide(net, image[None], 16, 11, batch=1)
                           for image in images])
    torch.testing.assert_close(together, alone)
    assert max(calls) <= batch and sum(calls) == 2 * len(predict.windows(30, 41, 16, 11))


def test_probabilities_come_last():
    """Logits are averaged, then resized, and only then made probabilities (spec A.5)."""
    def model(x):
        return torch.cat([position(x), 3 - position(x) ** 2], dim=1)

    images = torch.zeros(1, 3, 4, 6)
    probs = predict.predict_seg(model, images, (9, 11), Protocol(None, 4, 2), torch.float32)
    logits = F.interpolate(predict.slide(model, images, 4, 2), size=(9, 11), mode="bilinear",
                           align_corners=False)
    torch.testing.assert_close(probs, logits.softmax(dim=1))
    whole = predict.predict_seg(model, images, (4, 6), Protocol(None, None, None), torch.float32)
    torch.testing.assert_close(whole, model(images).softmax(dim=1))


# ------------------------------------------------------------------------------------------------
# Depth

def test_shifted_windows_meet_the_golden_starts():
    """NYU 0 and 160; KITTI every 57 columns, the last window moved to the edge (ours)."""
    golden = json.loads((Path(__file__).parent / "golden" / "depth.json").read_text())
    nyu, kitti = golden["shift_windows"]["nyu"], golden["shift_windows"]["kitti"]
    assert predict.shifted_windows(640, 480, 2) == nyu["starts"]
    assert predict.shifted_windows(1216, 352, 16) == kitti["starts"][:-1] + [1216 - 352]
    assert predict.shifted_windows(480, 480, 2) == [0]


class Brightness(torch.nn.Module):
    """A pointwise depth model: metres from the red channel."""

    def forward(self, images):
        """(B, 3, H, W) -> (B, 1, H, W)."""
        return images[:, :1] * 9 + 0.5


class Columns(torch.nn.Module):
    """Predicts each pixel's column, counted from the left edge of what it is shown."""

    def forward(self, images):
        """(B, 3, H, W) -> (B, 1, H, W)."""
        B, _, H, W = images.shape
        return torch.arange(W, dtype=torch.float32).expand(B, 1, H, W)


@pytest.mark.parametrize("count,flip", [(1, False), (1, True), (2, True), (5, False), (16, True)])
def test_windows_of_a_pointwise_depth_model_change_nothing(count, flip):
    """Windows and mirror images of a pointwise model average to its prediction on the whole."""
    images = torch.rand(2, 3, 8, 37)
    protocol = predict.DepthProtocol(count, flip, None, 10.0, 0, 1000.0)
    depth = predict.predict_depth(Brightness(), images, protocol, torch.float32)
    assert torch.allclose(depth, Brightness()(images)[:, 0], atol=1e-6)


def test_mirror_images_are_turned_back():
    """With flip, a model that sees columns 0..W-1 averages to their middle everywhere."""
    protocol = predict.DepthProtocol(1, True, None, 10.0, 0, 1000.0)
    depth = predict.predict_depth(Columns(), torch.rand(1, 3, 4, 11), protocol, torch.float32)
    assert torch.equal(depth, torch.full((1, 4, 11), 5.0))


def test_portrait_images_are_predicted_whole():
    """An image that is taller than wide is one window, not an error."""
    protocol = predict.DepthProtocol(2, True, None, 10.0, 0, 1000.0)
    images = torch.rand(1, 3, 20, 12)
    depth = predict.predict_depth(Brightness(), images, protocol, torch.float32)
    assert torch.allclose(depth, Brightness()(images)[:, 0], atol=1e-6)
