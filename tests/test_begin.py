"""The beginning of a run in train.py: fixed prompts, and second stages on another run's weights.

    pytest tests/test_begin.py
"""
import json
from dataclasses import replace

import pytest
import torch
from helpers import HEAD, SCENES, TINY, recipe, refused
from safetensors.torch import load_file, save_file

import train
from model import MetaPromptModel
from ops.errors import InputError
from tasks.flags import resolve
from tasks.recipes import TINY_UNET, read_recipe
from unet import UNet
from weights import checkpoint
from weights.files import TINY_SD


# ------------------------------------------------------------------------------------------------
# The backbone

@pytest.mark.parametrize("init", ["pretrained", "random-unet"])
def test_the_default_backbone_is_our_own_stable_diffusion(tmp_path, init):
    """weights/tiny-sd, whose widths are the row's: its encoder, frozen, and with "pretrained" its
    UNet, too."""
    made = resolve(["--init", init, "--out", str(tmp_path / "r")])[0]
    model = train.build_model(made, ("a", "b"))
    assert (model.config.unet, model.config.vae) == (made.model.unet, made.model.vae)
    assert not any(p.requires_grad for p in model.vae.parameters())
    for part, own in (("vae", True), ("unet", init == "pretrained")):
        tensors = load_file(TINY_SD / part / "diffusion_pytorch_model.safetensors")
        found = getattr(model, part).state_dict()
        assert all(torch.equal(v, tensors[k].float()) for k, v in found.items()) == own, part


@pytest.mark.parametrize("method", ["meta-prompts", "vpd"])
def test_the_unet_may_come_from_elsewhere(tmp_path, capsys, method):
    """--unet FILE: its tensors, half precision widened, beside the encoder of the backbone."""
    unet = UNet(replace(TINY_UNET, groups=32)).half()                     # SD1.5's, where none says
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    made = resolve(["--method", method, "--unet", str(tmp_path / "unet.safetensors"),
                    "--unet-num-heads", "2", "--out", str(tmp_path / "r")])[0]
    model = train.build_model(made, ("a", "b"))
    assert f"tiny: pretrained, UNet of {tmp_path}/unet.safetensors, VAE" in capsys.readouterr().out
    assert model.config.unet == unet.config == model.unet.config
    encoder = load_file(TINY_SD / "vae" / "diffusion_pytorch_model.safetensors")
    for part, tensors in (("unet", unet.state_dict()), ("vae", encoder)):
        found = getattr(model, part).state_dict()
        assert all(torch.equal(v, tensors[k].float()) for k, v in found.items()), part
    save_file(UNet(replace(unet.config, latent_channels=4)).state_dict(), made.unet)
    with pytest.raises(InputError, match="the VAE gives 16 latent channels, the UNet reads 4"):
        train.build_model(made, ("a", "b"))


# ------------------------------------------------------------------------------------------------
# Fixed prompts

def prompt_file(path, *shape):
    """A file of random embeddings; returns its path."""
    save_file({"embeddings": torch.randn(*shape, generator=torch.Generator().manual_seed(1))}, path)
    return path


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_training_leaves_fixed_prompts_and_moves_their_adapters(tmp_path, task):
    """After a step the prompts are still the file's in each row, and the adapters are others;
    resuming does not need the file."""
    path = prompt_file(tmp_path / "p.safetensors", 4, 16)
    made = recipe(tmp_path / "r", "--task", task, "--prompts", path, "--iterations", 1, "--warmup",
                  0, "--schedule", "poly", "--batch", 2)
    before = train.build_model(made, ("a", "b")).adapters.state_dict()
    train.train(made, resume=False)
    model = MetaPromptModel.from_pretrained(tmp_path / "r" / "last")
    assert len(model.prompts) == (1 if task == "seg" else 2)
    assert all(torch.equal(row, load_file(path)["embeddings"]) for row in model.prompts)
    assert not any(torch.equal(v, before[k]) for k, v in model.adapters.state_dict().items())
    path.unlink()
    checkpoint.load_optimizer(tmp_path / "r" / "last", model, train.build_optimizer(model, made), 1)


def test_fixed_prompts_without_adapter(tmp_path):
    """--no-prompt-adapter is obeyed: the UNet then reads the embeddings themselves."""
    path = prompt_file(tmp_path / "p.safetensors", 4, 16)
    model = train.build_model(recipe(tmp_path / "r", "--prompts", path, "--no-prompt-adapter"),
                              ("a", "b"))
    assert torch.equal(model.context(1)[0], load_file(path)["embeddings"])


def test_prompts_must_fit_the_pretrained_unet(tmp_path):
    """D is compared with the width that the weight files have, too."""
    made = recipe(tmp_path / "r", "--unet-channels", 32, 32, 64, 64, "--vae-channels", 32, 32, 32,
                  32, "--unet-groups", 32, "--vae-groups", 32)          # SD1.5's groups are fixed
    donor = train.build_model(made, ("a", "b"))
    for part, config in (("unet", {"attention_head_dim": 1}), ("vae", {})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        save_file(getattr(donor, part).state_dict(),
                  tmp_path / part / "diffusion_pytorch_model.safetensors")
    path = prompt_file(tmp_path / "p.safetensors", 4, 768)
    made = replace(made, prompts=str(path), backbone=str(tmp_path), init="pretrained",
                   model=replace(made.model, train_encoder=False))
    with pytest.raises(InputError, match=r"\(4, 768\) and .* one of finite floats \(N, 16\)"):
        train.build_model(made, ("a", "b"))


# ------------------------------------------------------------------------------------------------
# Second stage

def first_stage(folder, *flags, classes=("a", "b", "c")):
    """A run folder with a best/ of random weights; returns that model."""
    best = train.build_model(replace(recipe(folder, *flags), seed=11), classes)
    best.save_pretrained(folder / "best")
    return best


def test_a_second_stage_starts_from_the_best_weights(tmp_path, capsys):
    """Same architecture: every tensor is that of RUN/best, or of RUN/last where there is none."""
    best = first_stage(tmp_path / "one")
    made = recipe(tmp_path / "two", "--init-from", tmp_path / "one")
    last = train.build_model(replace(made, init_from=None), ("a", "b", "c"))
    last.save_pretrained(tmp_path / "one" / "last")
    capsys.readouterr()
    model = train.build_model(made, ("a", "b", "c"))
    assert all(torch.equal(v, best.state_dict()[k]) for k, v in model.state_dict().items())
    assert model.training and "new" not in capsys.readouterr().out
    (tmp_path / "one" / "best").rename(tmp_path / "elsewhere")
    assert torch.equal(train.build_model(made, ("a", "b", "c")).prompts, last.prompts)


def test_other_classes_make_new_classifiers_only(tmp_path, capsys):
    """Four tensors are new and named in the output; all others are those of the first stage."""
    best = first_stage(tmp_path / "one").state_dict()
    capsys.readouterr()
    model = train.build_model(recipe(tmp_path / "two", "--init-from", tmp_path / "one"),
                              ("x", "y", "z", "w", "v"))
    new = [f"head.{head}.conv_seg.{kind}" for head in ("decode_head", "auxiliary_head")
           for kind in ("weight", "bias")]
    line, = [s for s in capsys.readouterr().out.splitlines() if s.startswith("classes")]
    assert "3 there, 5 here" in line and all(name in line for name in new)
    for name, tensor in model.state_dict().items():
        assert len(tensor) == 5 if name in new else torch.equal(tensor, best[name]), name
    assert model.config.class_names == ("x", "y", "z", "w", "v")


@pytest.mark.parametrize("before,after,sharing", [
    (1, 3, "--shared-prompts"), (1, 3, "--no-shared-prompts"), (3, 1, "--no-shared-prompts")])
def test_other_passes_take_over_the_first_rows(tmp_path, capsys, before, after, sharing):
    """temb, prompts and adapters of the common passes are taken over; what is more is new."""
    flags = [sharing, "--prompt-adapter"]
    best = first_stage(tmp_path / "one", *flags, "--refine-steps", before).state_dict()
    capsys.readouterr()
    made = recipe(tmp_path / "two", *flags, "--refine-steps", after, "--init-from",
                  tmp_path / "one")
    fresh = train.build_model(replace(made, init_from=None), ("a", "b", "c")).state_dict()
    model = train.build_model(made, ("a", "b", "c")).state_dict()
    assert f"{before} there, {after} here: first 1 of temb" in capsys.readouterr().out
    for name in ("temb", "prompts"):
        assert torch.equal(model[name][0], best[name][0])
        assert torch.equal(model[name][1:], fresh[name][1:])
    for name in model.keys() - {"temb", "prompts"}:
        assert torch.equal(model[name], best.get(name, fresh[name])), name


def test_a_second_stage_trains_from_step_0(tmp_path):
    """--init-from is an ordinary run: its own steps, optimiser and recipe."""
    first_stage(tmp_path / "one")
    second = recipe(tmp_path / "two", "--iterations", 1, "--batch", 2, "--init-from",
                    tmp_path / "one", "--refine-steps", 1)
    train.train(second, resume=False)
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "metrics.jsonl").open()]
    assert steps == [1, 1]
    config = MetaPromptModel.from_pretrained(tmp_path / "two" / "last").config
    assert read_recipe(tmp_path / "two" / "recipe.json") == replace(second, model=config)


BAD_STARTS = [(["--num-prompts", "5"], "num_prompts 4 (here 5)"),
              (["--no-rearrange"], "rearrange True (here False)"),
              (["--latent-scale", "0.5"], "latent_scale 1.0 (here 0.5)"),
              (["--task", "depth"], "task seg (here depth)"),
              (["--unet-channels", "32", "64", "64", "64"], "unet {'channels': (16, 16, 32, 32)")]


@pytest.mark.parametrize("flags,message", BAD_STARTS)
def test_misfitting_first_stages_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags,
                                                         message):
    """Exit code 2 and one line that names what differs; nothing is written."""
    first_stage(tmp_path / "one")
    code, stderr = refused(train.main, monkeypatch, capsys, *TINY, *HEAD, *SCENES, "--init-from",
                           tmp_path / "one", "--out", tmp_path / "two", *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "two").exists()


def test_a_first_stage_on_random_weights_is_none_for_a_pretrained_backbone(tmp_path):
    """Whether the encoder is trained may not differ; widths are the first stage's."""
    first_stage(tmp_path / "one")
    made = recipe(tmp_path / "two", "--init-from", tmp_path / "one")
    made = replace(made, backbone="a/b", model=replace(made.model, train_encoder=False))
    with pytest.raises(InputError, match=r"has train_encoder True \(here False\): only"):
        train.build_model(made, ("a", "b", "c"))


def test_a_folder_without_a_model_is_no_first_stage(tmp_path, monkeypatch, capsys):
    """The message says where a config.json was looked for."""
    code, stderr = refused(train.main, monkeypatch, capsys, *TINY, *HEAD, *SCENES, "--init-from",
                           tmp_path, "--out", tmp_path / "two")
    assert code == 2 and "best/ or last/" in stderr and str(tmp_path) in stderr
