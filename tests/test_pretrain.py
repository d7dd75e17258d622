"""Pretraining: the autoencoder is diffusers', stages resume to the bit, the export is a pipeline.

    pytest tests/test_pretrain.py        (with -m slow: diffusers' own pipeline, picture by picture)
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from helpers import refused
from oracles import ROUNDING, diffusers_vae, randomise, relative_error
from safetensors.torch import load_file, save_file

from ops.errors import InputError
from ops.settings import LIMITS
from pretraining import diffusion, start
from pretraining.cache import load_cache, load_held_out, read_metrics
from pretraining.decoder import Autoencoder
from pretraining.export import write_card
from pretraining.settings import flag
from sets.embedded import VAL_SEED
from tools import pretrain
from tools.pretrain import Settings
from unet import UNet
from vae import VAEConfig
from vpd.text import TextEncoder, Tokenizer
from weights.files import TINY_SD
from weights.runs import Lock

TOY = Settings(size=64, crop=32, vae_channels=(8, 8, 16, 16), latent_channels=8, vae_scenes=8,
               vae_batch=2, vae_steps=4, scenes=12, shard=8, captions=2, held_out=8, merges=50,
               unet_channels=(16, 16, 32, 32), width=16, text_layers=1, batch=4, steps=4,
               sample_steps=2, save_every=2, warmup=2)


def toy(folder: Path, **changes) -> Settings:
    """Settings of a run that takes seconds, in `folder`."""
    return replace(TOY, out=str(folder), export=str(folder / "tiny-sd"), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished toy run."""
    folder = tmp_path_factory.mktemp("run")
    pretrain.train_autoencoder(toy(folder))
    pretrain.train_diffusion(toy(folder))
    return folder


def test_decoder_equals_diffusers():
    """Autoencoder has AutoencoderKL's names, posterior and pictures."""
    for layers in (1, 2):
        oracle = diffusers_vae(layers=layers).double()
        ours = Autoencoder(VAEConfig((32, 64, 96, 128), layers)).double()
        ours.load_state_dict(oracle.state_dict())
        images = torch.rand(2, 3, 64, 40).double() * 2 - 1
        with torch.no_grad():
            posterior = oracle.encode(images).latent_dist
            mean, log_variance = ours.posterior(images)
            assert relative_error(mean, posterior.mean) < ROUNDING
            assert relative_error(log_variance, posterior.logvar) < ROUNDING
            assert relative_error(ours.decode(mean), oracle.decode(mean).sample) < ROUNDING


def test_absorbed_scale_changes_no_picture():
    """absorb() gives the latents mean 0 and spread 1 and leaves pictures and noise as they were."""
    model = randomise(Autoencoder(VAEConfig((8, 8, 16, 16), 1, 4, 8))).double()
    images = torch.rand(4, 3, 32, 32).double() * 2 - 1
    with torch.no_grad():
        mean, log_variance = model.posterior(images)
        before = model.decode(mean + (0.5 * log_variance).exp())
        model.absorb(mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3)))
        mean, log_variance = model.posterior(images)
        assert relative_error(model.decode(mean + (0.5 * log_variance).exp()), before) < ROUNDING
    assert mean.mean(dim=(0, 2, 3)).abs().max() < ROUNDING
    assert (mean.std(dim=(0, 2, 3)) - 1).abs().max() < ROUNDING


def test_scenes_are_not_the_tasks():
    """Training of the tasks has seeds 2 k VAL_SEED + [0, VAL_SEED), validation follows VAL_SEED."""
    last = pretrain.HELD_OUT + VAL_SEED // 2 - 1
    for seed in (pretrain.FIRST_SCENE, pretrain.HELD_OUT, last):
        assert seed // VAL_SEED % 2 == 1 and seed // VAL_SEED != 1
    assert pretrain.FIRST_SCENE + Settings().scenes < pretrain.HELD_OUT


def test_noise_schedule_is_stable_diffusions():
    """Shares of signal and noised latents equal diffusers' DDIMScheduler's."""
    oracle = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert relative_error(diffusion.signal_shares(), oracle.alphas_cumprod) < 1e-6
    latents, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 9, 999])
    assert relative_error(diffusion.add_noise(latents, noise, t),
                          oracle.add_noise(latents, noise, t)) < 1e-6


def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path, monkeypatch):
    """Both stages, stopped after two of four steps, end with the same bits."""
    for stage, judged in ((pretrain.train_autoencoder, "judge_autoencoder"),
                          (pretrain.train_diffusion, "judge_diffusion")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain, judged, stop)                # just after the checkpoint
            stage(toy(tmp_path))
        stage(toy(tmp_path))
    for name in ("vae.safetensors", "diffusion.safetensors", "latents/00000008.safetensors"):
        ours, expected = load_file(tmp_path / name), load_file(run / name)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours), name


def stop(*_):
    """As Ctrl-C does."""
    raise KeyboardInterrupt


def test_cache_makes_what_is_missing(run):
    """A lost file of latents is made again, the same; nothing else is touched."""
    path = run / "latents" / "00000008.safetensors"
    before = load_file(path)
    kept = (run / "latents" / "00000000.safetensors").stat().st_mtime_ns
    path.unlink()
    pretrain.make_cache(toy(run))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(path).items())
    assert (run / "latents" / "00000000.safetensors").stat().st_mtime_ns == kept
    latents, ids = load_cache(toy(run))
    assert latents.shape == (12, 8, 8, 8) and ids.shape == (12, 2, 32)


def test_figures_and_pictures(run):
    """metrics.jsonl has a line per checkpoint; pictures and the card are written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line.get("step")) for line in lines[:5]] == [
        ("autoencoder", 2), ("autoencoder", 4), ("vae", None), ("diffusion", 2), ("diffusion", 4)]
    assert len(lines[4]["quarters"]) == 4 and lines[4]["images"] == 16
    assert (run / "pictures" / "samples.png").exists()
    assert "licence" in (run / "tiny-sd" / "README.md").read_text().lower()


def test_export_holds_the_averaged_weights(run):
    """UNet and text encoder predict what the run's averaged ones do, rounded to float16; the text's
    states have spread 1; the tokenizer is the run's."""
    model, vae, tokenizer = pretrain.load_run(toy(run))
    folder, (latents, ids) = str(run / "tiny-sd"), load_held_out(toy(run))
    exported = diffusion.Denoiser(UNet.from_pretrained(folder), TextEncoder.from_pretrained(folder))
    texts, times = ids[:, 0].long(), torch.arange(len(latents)) * 100
    with torch.no_grad():
        ours, wanted = (m(latents.float(), times, texts) for m in (exported, model))
        assert relative_error(ours, wanted) < 0.01
        assert exported.text_encoder(texts)[0].std().item() == pytest.approx(1, abs=0.01)
    assert Tokenizer.from_pretrained(folder).vocabulary == tokenizer.vocabulary
    stored = load_file(run / "tiny-sd" / "vae" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == vae.state_dict().keys()
    assert json.loads((run / "tiny-sd/vae/config.json").read_text())["scaling_factor"] == 1.0


def test_prompt_is_sampled(run):
    """`sample` writes eight pictures."""
    pretrain.sample_prompt(toy(run))
    assert (run / "sample.png").exists()


def test_wrong_order_and_other_settings_are_refused(run, tmp_path):
    """A stage without the one before it, or with a checkpoint of other widths: one line says so."""
    with pytest.raises(InputError, match="run `python -m tools.pretrain autoencoder` first"):
        pretrain.train_diffusion(toy(tmp_path))
    with pytest.raises(InputError, match="is of other settings"):
        pretrain.train_diffusion(toy(run, unet_channels=(32, 32, 32, 32)))


def test_flags_are_the_settings():
    """Every field is a flag; tuples take several values."""
    stage, settings = pretrain.parse(["cache", "--unet-channels", "16", "16", "32", "32",
                                      "--kl", "0.1", "--scenes", "9"])
    assert stage == "cache" and settings.kl == 0.1 and settings.scenes == 9
    assert settings.unet_channels == (16, 16, 32, 32) and settings.seed == 0


@pytest.mark.parametrize("words, message", [
    ("cache --batch 0", "--batch is 0, possi"), ("cache --vae-steps -1", "--vae-steps is -1"),
    ("cache --lr nan", "--lr is nan, but should be a finite"), ("cache --kl=-inf", "--kl is -inf"),
    ("cache --steps 1.5", "--steps is 1.5, but should be an integer"), ("cache --se 1", "--se 1"),
    ("cache --seed 2147483648", "--seed is 2147483648, possible is 0 to 2.14748e+09"),
    ("cache --out=", "--out is '': leave it out"),
    ("cache --sample-steps 1000", "--sample-steps is 1000"),
    ("cache --vae-channels 16 16 16", "(16, 16, 16): four multiples of --groups 8"),
    ("cache --unet-channels 16 16 16 24 --heads 16", "24): four multiples of --heads 16"),
    ("cache --vae-channels 20 32 64 64", "(20, 32, 64, 64): four multiples of --groups 8"),
    ("cache --width 24", "multiples of 16"), ("cache --size 100", "--size 100 must be a multiple"),
    ("cache --crop 192", "--crop 192"), ("cache RUN --out a", "unrecognized arguments: RUN"),
    ("RUN --out a", "invalid choice: 'RUN'"), ("--out a", "required: stage"), ("", ": stage"),
    ("cache --learning-rate 1", "--learning-rate"), ("cache --prompt", "--prompt")])
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    """Exit code 2 and one line that names the flag; nothing is written; nothing is shortened."""
    monkeypatch.chdir(tmp_path)
    code, stderr = refused(pretrain.main, monkeypatch, capsys, *words.split())
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not list(tmp_path.iterdir())


def test_every_number_has_limits_and_every_seed_has_draws():
    """A field without limits would take any number; the largest seed and step give numbers."""
    numbers = {name for name, value in vars(TOY).items() if not isinstance(value, str)}
    assert numbers <= LIMITS.keys()
    assert pretrain.generator(replace(TOY, seed=LIMITS["seed"][1]), LIMITS["steps"][1])


# ------------------------------------------------------------------------------------------------
# The folder of a run

def flags(settings: Settings) -> list[str]:
    """The command line of settings."""
    words = []
    for name, value in vars(settings).items():
        many = value if isinstance(value, tuple) else [value]
        words += [flag(name), *map(str, many)] if value != "" else []
    return words


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


def test_a_command_goes_on_with_other_habits_only(copy, monkeypatch, capsys):
    """What the files were made of must stay: the field, both values and the way on are named;
    settings.json stays as it was, or is written when a stage begins."""
    pretrain.main(["cache", *flags(toy(copy))])
    before = (copy / "settings.json").read_text()
    capsys.readouterr()
    for change in ({"unet_channels": (16,) * 4}, {"captions": 1}, {"batch": 2}, {"seed": 1}):
        name = flag(*change)
        code, stderr = refused(pretrain.main, monkeypatch, capsys, "diffusion",
                               *flags(toy(copy, **change)))
        assert code == 2 and stderr.count("\n") == 1
        assert f"settings.json has {list(change)[0]} " in stderr and f"same {name}," in stderr
    pretrain.main(["sample", *flags(toy(copy, prompt="a cone", guidance=1.0))])
    assert (copy / "settings.json").read_text() == before
    pretrain.main(["diffusion", *flags(toy(copy, lr=0.1, save_every=3))])
    assert json.loads((copy / "settings.json").read_text())["save_every"] == 3


@pytest.mark.parametrize("stage, changes, message", [
    ("diffusion", {}, "autoencoder` first"), ("cache", {}, "autoencoder` first"),
    ("sample", {}, "diffusion` first"), ("export", {}, "diffusion` first"),
    ("autoencoder", {"out": "file"}, "--out file can't be written"),
    ("autoencoder", {"out": "file/below"}, "--out file/below can't be written"),
    ("diffusion", {"export": "file"}, "--export file is there and no exported model"),
    ("diffusion", {"export": "."}, "--export . is there and no exported model"),
    ("diffusion", {"export": "new", "out": "new/run"}, "--export new would replace --out new/run"),
    ("cache", {"start": "nowhere"}, "--start nowhere is no folder")])
def test_what_cannot_begin_leaves_nothing(tmp_path, monkeypatch, capsys, stage, changes, message):
    """Order, places and start are checked before anything is written."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    settings = replace(TOY, **{"out": "run", "export": "model", **changes})
    code, stderr = refused(pretrain.main, monkeypatch, capsys, stage, *flags(settings))
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_replaces_an_export_only(copy, monkeypatch, capsys):
    """A file of somebody's in the folder is not lost."""
    (copy / "tiny-sd" / "notes.txt").write_text("mine")
    code, stderr = refused(pretrain.main, monkeypatch, capsys, "export", *flags(toy(copy)))
    assert code == 2 and "notes.txt lost: move it away" in stderr
    assert (copy / "tiny-sd" / "notes.txt").read_text() == "mine"


def test_an_export_replaces_no_other_model(copy, tmp_path, monkeypatch, capsys):
    """One of other widths, or one without the card that says them, stays."""
    for name, content, message in (
            ("other", None, "whose card has size 128, of this run 64: it is not replaced; move"),
            ("bare", "# mine", "whose card has seed None, of this run 0: it is not replaced")):
        place = shutil.copytree(TINY_SD, tmp_path / name)
        if content:
            (place / "README.md").write_text(content)
        before = (place / "unet" / "config.json").read_text()
        settings = replace(toy(copy), export=str(place))
        code, stderr = refused(pretrain.main, monkeypatch, capsys, "export", *flags(settings))
        assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
        assert (place / "unet" / "config.json").read_text() == before


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", "export"])
def test_a_run_is_held_by_one_process(copy, monkeypatch, capsys, stage):
    """A second command that writes its checkpoints, or its export, is told; `sample` goes on."""
    with Lock(copy):
        code, stderr = refused(pretrain.main, monkeypatch, capsys, stage, *flags(toy(copy)))
        assert code == 2 and "copy is in use by another process" in stderr
        pretrain.main(["sample", *flags(toy(copy))])
    with Lock(copy, ".cache.lock"):                      # latents have a lock of their own
        code, stderr = refused(pretrain.main, monkeypatch, capsys, "cache", *flags(toy(copy)))
        assert code == 2 and "copy is in use by another process" in stderr


def test_latents_keep_their_autoencoder(copy):
    """More of its steps would leave them of another one; finished, it stays as it is to the bit."""
    before = (copy / "vae.safetensors").read_bytes()
    with pytest.raises(InputError, match="latents is of the autoencoder after 4 steps: delete it"):
        pretrain.train_autoencoder(toy(copy, vae_steps=6))
    pretrain.train_autoencoder(toy(copy))
    assert (copy / "vae.safetensors").read_bytes() == before
    shutil.rmtree(copy / "latents")
    pretrain.train_autoencoder(toy(copy, vae_steps=6))
    assert (copy / "vae.safetensors").read_bytes() != before


def test_fewer_steps_than_done_are_refused(copy, capsys):
    """They would do nothing; as many are said to be done."""
    for stage, name in ((pretrain.train_autoencoder, "vae_steps"), (pretrain.train_diffusion,
                                                                    "steps")):
        with pytest.raises(InputError, match=f"has done 4 steps already, {flag(name)} is 3"):
            stage(toy(copy, **{name: 3}))
        stage(toy(copy))
        assert "has done its 4 steps" in capsys.readouterr().out


MOMENTS = "optimizer.model:unet.conv_in.weight:momentum"


@pytest.mark.parametrize("edit, step, message", [
    (lambda tensors: tensors.pop(MOMENTS), 4, "lacks unet.conv_in.weight:momentum"),
    (lambda tensors: tensors.update({MOMENTS: torch.ones(1)}), 4, r"torch.float32 of \(16"),
    (lambda tensors: tensors[MOMENTS].fill_(torch.nan), 4, "that no optimiser has after step 4"),
    (lambda tensors: None, -5, "is damaged .step is -5"),
    (lambda tensors: None, 3, "that no optimiser has after step 3"),
    (lambda tensors: tensors["averaged:unet.conv_in.bias"].fill_(torch.nan), 4, "is damaged"),
    (lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}), 4, "float16")])
def test_an_edited_checkpoint_is_refused(copy, edit, step, message):
    """Moments of all parameters, of their shape, finite, after so many steps; weights in float32.
    """
    path = copy / "diffusion.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"step": str(step)})
    with pytest.raises(InputError, match=message):
        pretrain.train_diffusion(toy(copy, steps=6))


def test_edited_figures_are_left_out(copy, capsys):
    """A line of metrics.jsonl that lacks a figure, or has a text for one, is none for the card."""
    before = read_metrics(copy, "diffusion")
    with (copy / "metrics.jsonl").open("a") as log:
        for change in ({"step": "x"}, {"quarters": [None]}, {"seconds": None}):
            log.write(json.dumps({**before[-1], **change}) + "\n")
        log.write('{"stage": "diffusion"}\n{"stage": "vae", "psnr": NaN}\n' + "[" * 100000 + "\n")
    assert read_metrics(copy, "diffusion") == before
    pretrain.export_last(toy(copy))


def test_latents_of_other_settings_or_damaged_are_refused(copy):
    """A line names the file and the way on, for each of the settings that a shard is made with."""
    for change in ({"size": 128}, {"latent_channels": 4}, {"shard": 4}, {"captions": 3},
                   {"tokens": 16}, {"held_out": 4}):
        with pytest.raises(InputError, match=r"latents.\w+.safetensors holds .* and run `pyth"):
            load_cache(toy(copy, **change)), load_held_out(toy(copy, **change))
    path = copy / "latents" / "00000008.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    for stage in (pretrain.make_cache, pretrain.train_diffusion):
        with pytest.raises(InputError, match="00000008.safetensors is damaged .* delete it and r"):
            stage(toy(copy))
    path.unlink()
    pretrain.make_cache(toy(copy))
    assert len(load_cache(toy(copy))[0]) == 12


def test_scenes_may_grow_and_shrink(run, copy):
    """A last file that is too short is made again, the same where it was; fewer scenes are read."""
    pretrain.make_cache(toy(copy, scenes=14))
    latents, ids = load_cache(toy(copy, scenes=14))
    old, old_ids = load_cache(toy(run))
    assert len(latents) == len(ids) == 14 and torch.equal(ids[:12], old_ids)
    assert torch.equal(latents[:12], old)
    assert torch.equal(load_cache(toy(copy, scenes=9))[0], old[:9])


@pytest.mark.parametrize("name, content, message", [
    ("vocab.json", "{", "vocab.json is not valid JSON"), ("vocab.json", "[]", "damaged"),
    ("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1}', "tokenizer is damaged"),
    ("merges.txt", "#\na b c", "tokenizer is damaged"), ("merges.txt", b"\xff", "is damaged"),
    ("vocab.json", None, "vocab.json does not exist"), ("tokenizer_config.json", "[]", "damaged")])
def test_a_damaged_tokenizer_is_refused(copy, name, content, message):
    """A line names it, whatever of it is broken."""
    path = copy / "tokenizer" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="tokenizer is damaged.*copy it from") as error:
        pretrain.load_run(toy(copy))
    assert message in str(error.value)


def test_a_lost_tokenizer_is_not_learnt_anew(copy):
    """From another file's captions it would be another one than that of the ids there are."""
    shutil.rmtree(copy / "tokenizer")
    (copy / "latents" / "00000008.safetensors").unlink()
    with pytest.raises(InputError, match="tokenizer is incomplete, and its ids are in"):
        pretrain.make_cache(toy(copy))


def test_damaged_weights_are_refused(copy):
    """A line names the file."""
    for name, stage in (("diffusion", pretrain.load_run), ("vae", pretrain.load_run),
                        ("autoencoder", pretrain.train_autoencoder)):
        path = copy / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        with pytest.raises(InputError, match=f"{name}.safetensors is (damaged|not a complete)"):
            stage(toy(copy))
        path.write_bytes(whole)


def test_the_card_survives_torn_and_lost_lines(copy):
    """A torn line is left out, the next one begins anew; without the autoencoder's figures, it is
    judged again; what was redone counts once."""
    path = copy / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"vae"' not in line]
    path.write_text("\n".join([*lines, *lines, '{"stage": "diff']))
    with pytest.raises(InputError, match="lacks the figures of the autoencoder"):
        pretrain.export_last(toy(copy))
    pretrain.train_diffusion(toy(copy))
    pretrain.export_last(toy(copy))
    assert "16 images seen in 4 steps" in (copy / "tiny-sd" / "README.md").read_text()
    write_card(copy / "card", vars(TOY), 1, {"psnr": 1.0},
               [{**line, "seconds": 1800.0} for line in read_metrics(copy, "diffusion")])
    assert "1.0 hours" in (copy / "card").read_text()


# ------------------------------------------------------------------------------------------------
# A run that starts from an exported model

def test_a_run_starts_from_an_exported_model(run, tmp_path):
    """Autoencoder, tokenizer, model and averaged twin are the folder's; the card says so and counts
    the images of both runs; a second start adds up; what is begun needs the folder no more."""
    begun = toy(tmp_path / "a", start=str(run / "tiny-sd"))
    pretrain.make_cache(begun)
    stored = load_file(run / "tiny-sd" / "vae" / "diffusion_pytorch_model.safetensors")
    ours = load_file(tmp_path / "a" / "vae.safetensors")
    assert all(torch.equal(ours[name], tensor.float()) for name, tensor in stored.items())
    words = (run / "tiny-sd" / "tokenizer" / "vocab.json").read_text()
    assert (tmp_path / "a" / "tokenizer" / "vocab.json").read_text() == words
    line, = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert (line["stage"], line["start"], line["before"]) == ("vae", "tiny-sd", 16)
    assert line["psnr"] > 0

    small = replace(begun, steps=2, lr=1e-12, muon_lr=0.0)       # the weights hardly move
    pretrain.train_diffusion(small)
    state = load_file(tmp_path / "a" / "diffusion.safetensors")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        for key, tensor in load_file(run / "tiny-sd" / part / f"{name}.safetensors").items():
            for twin in ("model", "averaged"):
                assert torch.allclose(state[f"{twin}:{part}.{key}"], tensor.float(), atol=1e-6)
    card = " ".join((tmp_path / "a" / "tiny-sd" / "README.md").read_text().split())
    assert "8 images seen in 2 steps of 4" in card and str(tmp_path) not in card
    assert "**Started from** tiny-sd" in card and "16 images seen there" in card
    assert start.images_seen(str(tmp_path / "a" / "tiny-sd")) == 24
    pretrain.train_diffusion(replace(small, steps=3, start="gone"))


@pytest.mark.parametrize("changes, message", [
    ({"unet_channels": (32, 32, 32, 32)}, "/unet: channels is .16, 16, 32, 32., of this run .32"),
    ({"vae_channels": (8, 8, 8, 8)}, "/vae: channels is"), ({"heads": 1}, "/unet: num_heads is 2"),
    ({"latent_channels": 4}, "/vae: latent_channels is 8, of this run 4"),
    ({"text_layers": 2}, "/text_encoder: num_hidden_layers is 1, of this run 2"),
    ({"tokens": 16}, "model_max_length is 32"), ({"start": "nowhere"}, "nowhere is no folder")])
def test_a_model_of_other_sizes_is_no_start(run, tmp_path, changes, message):
    """One line names the part and its size, before anything is written."""
    settings = replace(toy(tmp_path / "a", start=str(run / "tiny-sd")), **changes)
    with pytest.raises(InputError, match=message):
        pretrain.make_cache(settings)
    assert not (tmp_path / "a" / "tokenizer").exists()
    assert not (tmp_path / "a" / "vae.safetensors").exists()


def test_a_start_leaves_no_autoencoder_to_train(run, tmp_path):
    """The stage `autoencoder` is refused."""
    with pytest.raises(InputError, match="^--start: the autoencoder is that folder's"):
        pretrain.main(["autoencoder", "--start", str(run / "tiny-sd"), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [7, 20])
def test_pipeline_of_diffusers_draws_the_same_picture(run, steps):
    """StableDiffusionPipeline reads the folder; from the same noise its picture is ours (1e-4)."""
    folder = run / "tiny-sd"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    model, vae, tokenizer = pretrain.load_run(toy(run))
    for module in (model, vae):                                  # as rounded by the export
        module.half().float()
    prompts = ["two balls and a cone", "a red box"]
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = diffusion.sample(model, noise, tokenizer(prompts), tokenizer([""]), steps, 3.0)
        ours = (vae.decode(ours) / 2 + 0.5).clamp(0, 1)
    expected = pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, latents=noise,
                    output_type="pt").images
    assert isinstance(pipe.vae, AutoencoderKL) and (ours - expected).abs().max() < 1e-4
