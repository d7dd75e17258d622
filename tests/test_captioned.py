"""Caption prompts: each image is read with the states of its own caption, all else is model.py's.

    pytest tests/test_captioned.py
"""
import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers import command, noise, refused, repeat_last_step, save_image
from safetensors.torch import load_file

import data
import eval as evaluation
import train
from model import Config, MetaPromptModel
from ops.errors import InputError
from tasks import methods
from tasks.captioned import CaptionConfig, CaptionModel, read_config
from tasks.flags import resolve
from tools import heatmaps, memory
from unet import UNetConfig
from vae import VAEConfig

SIZES = {"num_prompts": 5, "refine_steps": 2, "head_channels": 16, "num_classes": 3,
         "prompt_adapter": True, "fixed_prompts": True,
         "unet": UNetConfig((16, 16, 32, 32), 1, 2, 16, 4, 8),
         "vae": VAEConfig((8, 8, 16, 16), 1, 4, 8)}
SMALL = ["--prompts", "captions", "--crop", "64", "--batch", "2", "--micro-batch", "2",
         "--iterations", "2", "--val-scenes", "2", "--eval-every", "2", "--save-every", "1",
         "--precision", "float32"]


@pytest.fixture(scope="module")
def model():
    """An untrained model of segmentation."""
    torch.manual_seed(0)
    return CaptionModel(CaptionConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def batch():
    """Two images and the states of their captions."""
    draws = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 64, 64, generator=draws), torch.randn(2, 5, 16, generator=draws)


@torch.no_grad()
def test_captions_take_the_place_of_the_prompts(model, batch):
    """The answer for an image is that of model.py's model whose prompts are its caption's states,
    whatever the other images' captions are."""
    images, text = batch
    plain = MetaPromptModel(Config(**SIZES)).eval()
    plain.load_state_dict(model.state_dict())
    answers = model(images, text=text)
    for image, states, answer in zip(images, text, answers):
        plain.prompts.copy_(states[None])
        assert torch.allclose(plain(image[None])[0], answer, atol=1e-4)
    assert not torch.allclose(model(images, text=text.flip(0)), answers, atol=1e-2)


@torch.no_grad()
def test_windows_and_mirror_images_are_read_with_their_images_captions(model, batch):
    """Of three times as many images, each copy of the batch has the batch's captions."""
    images, text = batch
    thrice = model(torch.cat([images, images.flip(-1), images]), text=text)
    for part, pictures in zip(thrice.chunk(3), (images, images.flip(-1), images)):
        assert torch.allclose(part, model(pictures, text=text), atol=1e-4)


def test_without_a_caption_nothing_is_read(model, batch):
    """One line says who has captions; none is left from the batch before."""
    images, text = batch
    for ask in (model, model.features, lambda x: model.loss(x, x[:, 0].long())):
        with pytest.raises(InputError, match="only the embedded scenes"):
            model(images, text=text)
            ask(images)
    with pytest.raises(InputError, match="only the embedded scenes"):
        methods.text_of(model, {"name": ["a.jpg"]})


def test_the_adapter_is_trained_and_the_text_is_not(model, batch):
    """Every pass's adapter gets a gradient from the losses, neither states nor prompts do."""
    images, text = batch
    made = CaptionModel(replace(model.config, shared_prompts=False)).train()
    sum(made.loss(images, torch.zeros(2, 64, 64, dtype=torch.long), text).values()).backward()
    assert len(made.adapters) == 2 and all(p.grad.any() for p in made.adapters.parameters())
    assert made.prompts.grad is None and text.grad is None
    made = CaptionModel(replace(model.config, prompt_adapter=False))
    made.text = text
    assert made.context(0) is text


def test_a_folder_tells_its_kind(model, tmp_path):
    """config.json says that captions are read, and gives the same model back; model.py's reader
    refuses it, and its own configs are as they were."""
    model.save_pretrained(tmp_path)
    again = methods.load(tmp_path)
    assert type(again) is CaptionModel and again.config == model.config
    assert read_config(tmp_path / "config.json") == model.config
    assert all(torch.equal(tensor, again.state_dict()[name])
               for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="unknown field 'caption_prompts'"):
        MetaPromptModel.from_pretrained(tmp_path)
    assert "caption_prompts" not in asdict(Config())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "caption_prompts": False}))
    with pytest.raises(InputError, match="unknown field 'caption_prompts'"):
        methods.load(tmp_path)


# ------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="module", params=["seg", "depth"])
def run(request, tmp_path_factory):
    """(recipe, folder) of a finished run of two steps on the pretrained backbone."""
    folder = tmp_path_factory.mktemp("captions") / request.param
    made = resolve(["--task", request.param, *SMALL, "--out", str(folder)])[0]
    train.train(made, resume=False)
    return made, folder


def test_a_run_reads_true_captions_of_a_fixed_length(run):
    """N is the tokenizer's 32, whatever the caption; the samples' captions are what is read, and
    the text encoder is no part of the model."""
    made, folder = run
    model = methods.with_reader(methods.load(folder / "best"), made.backbone)
    assert made.model.num_prompts == model.config.num_prompts == 32
    sample = data.open_set(made, "val")[0, 0]
    assert methods.text_of(model, {"caption": [sample["caption"]]}).shape == (1, 32, 64)
    assert not any("text" in name for name in load_file(folder / "best" / "model.safetensors"))


def test_a_stopped_run_goes_on_to_the_same_weights(run, tmp_path):
    """From the checkpoint of the first step the second one gives the same weights, to the bit."""
    resumed = repeat_last_step(run[1], tmp_path / "r")
    assert type(resumed.model) is CaptionConfig


def test_a_run_evaluates_and_refuses_pictures(run, tmp_path, monkeypatch, capsys):
    """eval.py gives the figures of training; one's own pictures have no captions, heatmaps no
    learned prompts."""
    made, folder = run
    command(evaluation.main, monkeypatch, "--checkpoint", folder, "--workers", "0", "--out",
            tmp_path, "--precision", "float32")
    name = {"seg": "mIoU", "depth": "rmse"}[made.task]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    expected = [line[name] for line in lines if name in line][-1]
    found = json.loads((tmp_path / "metrics.json").read_text())[name]
    assert found == pytest.approx(expected, rel=1e-4)
    image = save_image(tmp_path / "a.png", noise(64, 64))
    for main, message in ((evaluation.main, "only the embedded scenes"),
                          (heatmaps.main, "no learned prompts")):
        code, stderr = refused(main, monkeypatch, capsys, "--checkpoint", folder, "--image", image,
                               "--out", tmp_path / "p")
        assert code == 2 and message in stderr and stderr.strip().count("\n") == 0, stderr


def test_memory_is_estimated_with_captions(model, batch):
    """The estimate's stand-in for text is what the model reads."""
    text, = memory.fake_text(model.config, 2)
    assert text.shape == batch[1].shape and memory.fake_text(Config(**SIZES), 2) == []


@pytest.mark.parametrize("flags, message", [
    (["--task", "pose"], "pose on shapes has none"),
    (["--dataset", "folder"], "seg on folder has none"),
    (["--init", "random-unet"], "leave out --init"),
    (["--num-prompts", "8"], "holds 32, which is N")])
def test_captions_that_there_are_not_are_refused_in_one_line(flags, message, tmp_path):
    """Other data sets, random weights, another N."""
    with pytest.raises(InputError) as error:
        resolve(["--prompts", "captions", "--out", str(tmp_path), *flags])
    assert message in str(error.value) and "\n" not in str(error.value)
