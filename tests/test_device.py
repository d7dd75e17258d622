"""Devices and precisions; no branch on values that are not there.

    pytest tests/test_device.py
"""
import numpy as np
import pytest
import torch
from oracles import randomise
from torch._subclasses.fake_tensor import FakeTensorMode

from heads import lovasz_softmax
from model import Config, MetaPromptModel
from ops import device as rules
from ops.device import (autocast, cast_weights, compiles, descending, device_of, has_data,
                        pick_device, pick_precision, to_batch)
from ops.errors import InputError
from unet import UNetConfig
from vae import VAEConfig

CPU = torch.device("cpu")


def test_pick_device():
    """Names torch knows are taken; unknown names and absent GPUs are an InputError."""
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:x", ""):
        with pytest.raises(InputError, match=f"--device {name} is unknown: auto, cpu, cuda"):
            pick_device(name)
    with pytest.raises(InputError, match="--device meta is not supported"):
        pick_device("meta")
    with pytest.raises(InputError, match=r"--device cuda:99: torch .* sees \d+ GPUs"):
        pick_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    """Asking for a GPU where there is none is refused, not silently run on the CPU."""
    with pytest.raises(InputError, match="--device cuda: torch .* sees 0 GPUs"):
        pick_device("cuda")


def test_pick_precision():
    """A named precision is taken as it is; auto decides for one of the two."""
    assert pick_precision("float32", CPU) == torch.float32
    assert pick_precision("bfloat16", CPU) == torch.bfloat16
    assert pick_precision("auto", CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Inside, matrix products have the precision asked for."""
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_picture_becomes_a_batch():
    """(H, W, 3) uint8 -> (1, 3, H, W) in [0, 1], where the model is."""
    image = np.array([[[0, 51, 255], [1, 2, 3]]], np.uint8)
    batch = to_batch(image, device_of(torch.nn.Linear(1, 1)))
    assert batch.shape == (1, 3, 1, 2) and batch.device == CPU
    assert torch.equal(batch[0, :, 0, 0], torch.tensor([0, 0.2, 1]))


@pytest.mark.parametrize("task", ["seg", "depth", "pose"])
def test_cast_weights_give_the_same_answers(task):
    """Under autocast the model answers bit for bit as before; nearly all bytes are halved."""
    torch.manual_seed(0)
    model = randomise(MetaPromptModel(Config(
        task, num_prompts=5, refine_steps=2, shared_prompts=task == "seg",
        prompt_adapter=task != "seg", num_classes=4, head_channels=16,
        unet=UNetConfig((32,) * 4, num_heads=4, context_dim=32), vae=VAEConfig((32,) * 4))).eval())
    images = torch.rand(1, 3, 64, 128)
    answers, sizes = [], []
    for _ in range(2):
        with torch.inference_mode(), autocast(CPU, torch.bfloat16):
            answers.append(model(images))
        sizes.append(sum(p.nbytes for p in model.parameters()))
        cast_weights(model, torch.bfloat16)
    assert torch.equal(*answers) and sizes[1] < 0.55 * sizes[0]


def test_what_is_compiled(monkeypatch):
    """What is said; on its own long runs on a GPU, if Triton is there and serves it."""
    gpu, ability, found = torch.device("cuda"), [(8, 0)], ["triton"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ability[0])
    monkeypatch.setattr(rules, "find_spec", lambda name: name if name in found else None)
    assert compiles("on", CPU, 1) and not compiles("off", gpu, 10**6)
    assert compiles("auto", gpu, 5000) and not compiles("auto", gpu, 4999)
    assert not compiles("auto", CPU, 10**6)
    ability[0] = (6, 1)
    assert not compiles("auto", gpu, 5000)
    ability[0] = (8, 0)
    found.clear()
    assert not compiles("auto", gpu, 5000)


def test_only_eager_tensors_have_data():
    """True for a tensor and a view, also one that wants a gradient; False when fake or compiled."""
    x = torch.ones(2, 3, requires_grad=True)
    assert has_data(x) and has_data(x[0]) and has_data(2 * x)
    with FakeTensorMode():
        assert not has_data(torch.ones(2, 3))
    seen = []

    def note(x):
        seen.append(has_data(x))
        return x + 1
    torch.compile(note, backend="eager", fullgraph=True)(torch.ones(2))
    assert seen == [False]


def test_descending_sorts_rows():
    """In the order found the values fall, whichever library sorts; a fake tensor works, too."""
    x = torch.rand(5, 200, generator=torch.Generator().manual_seed(0))
    x[0], x[1, ::2], x[2] = 0, 1, x[2] * 1e-7             # ties; values that differ in a lower half
    for rows in (x, x.double()):
        order = descending(rows)
        assert torch.equal(rows.gather(1, order), rows.sort(dim=1, descending=True).values)
        assert torch.equal(order.sort(dim=1).values, torch.arange(200).expand(5, 200))
    with FakeTensorMode():
        assert descending(torch.ones(5, 200)).shape == (5, 200)


def test_the_loss_of_fixed_shapes_is_the_loss():
    """Lovasz-softmax over all classes, as compiled, equals that over the present ones only; a fake
    batch goes through it.
    """
    torch.manual_seed(0)
    logits, target = torch.randn(2, 9, 6, 5), torch.randint(0, 4, (2, 6, 5))
    fixed = torch.compile(lovasz_softmax, backend="eager", fullgraph=True)
    torch.testing.assert_close(fixed(logits, target), lovasz_softmax(logits, target))
    with FakeTensorMode():
        assert lovasz_softmax(torch.randn(2, 9, 6, 5), torch.zeros(2, 6, 5).long()).shape == ()
