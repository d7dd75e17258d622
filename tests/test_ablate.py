"""Ablations: every variant changes what it says, fixed prompts, second stages, the one command.

    pytest tests/test_ablate.py
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import TINY, recipe, run

from tools import ablate
from model import MetaPromptModel
from weights import checkpoint
from tasks import recipes
import train
from ops.errors import InputError

VARIANTS = {v.name: v for v in ablate.VARIANTS}


def build(base, name, classes=("a", "b", "c")):
    """The model that variant `name` of the recipe trains."""
    made = ablate.run_recipe(base, VARIANTS[name], seed=0)
    if made.prompts:
        Path(made.prompts).parent.mkdir(parents=True)
        save_file({"p": ablate.orthogonal_prompts(made.num_prompts, made.context_dim, 0)},
                  made.prompts)
    return train.build_model(made, classes)


def prompt_file(path, *shape):
    """A file of random embeddings; returns its path."""
    save_file({"embeddings": torch.randn(*shape, generator=torch.Generator().manual_seed(1))}, path)
    return path


# ------------------------------------------------------------------------------------------------
# Variants

def test_variants_of_prompts_and_passes_change_their_numbers(tmp_path):
    """prompts-N has N prompts and response maps, passes-T has T timesteps."""
    base = recipe(tmp_path / "r")
    for count in (8, 32, 64):
        model = build(base, f"prompts-{count}")
        assert model.prompts.shape == (1, count, 16)
        assert model.head.decode_head.lateral_convs[0].conv.in_channels == count
    for passes in (1, 2, 3):
        assert len(build(base, f"passes-{passes}").temb) == passes


def test_variants_without_rearrangement_and_with_static_timestep(tmp_path):
    """One head reads D channels instead of N; the other model has no temb; else all is alike."""
    base = recipe(tmp_path / "r")
    baseline = {k: v.shape for k, v in build(base, "baseline").state_dict().items()}
    plain = {k: v.shape for k, v in build(base, "no-rearrangement").state_dict().items()}
    changed = {k for k in baseline if plain[k] != baseline[k]}
    assert plain.keys() == baseline.keys() and all(k.startswith("head.") for k in changed)
    assert plain["head.auxiliary_head.convs.0.conv.weight"][1] == 16
    assert baseline["head.auxiliary_head.convs.0.conv.weight"][1] == 4
    static = {k: v.shape for k, v in build(base, "static-timestep").state_dict().items()}
    assert {**static, "temb": baseline["temb"]} == baseline


def test_the_variant_of_the_latent_scale(tmp_path):
    """latent-scale multiplies the latents by 0.18215, nothing else."""
    base = recipe(tmp_path / "r")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        scaled, plain = (build(base, n).encode(images) for n in ("latent-scale", "baseline"))
    assert torch.allclose(scaled, 0.18215 * plain)


def test_variants_equal_to_the_baseline_are_left_out():
    """The baseline's own N and T are no variants; a name picks its own."""
    for task, own in (("seg", ("prompts-32", "passes-2")), ("depth", ("prompts-64", "passes-2"))):
        names = [v.name for v in ablate.choose(recipes.RECIPES[task, "shapes"], None)]
        assert names == [n for n in VARIANTS if n not in own]
    base = recipes.RECIPES["seg", "shapes"]
    assert [v.name for v in ablate.choose(base, ["passes-1"])] == ["baseline", "passes-1"]


def test_the_stand_in_for_text_embeddings_is_orthogonal():
    """Rows of length sqrt(D) at right angles, other ones for another seed."""
    prompts = ablate.orthogonal_prompts(5, 16, 0)
    assert torch.allclose(prompts @ prompts.T, 16 * torch.eye(5), atol=1e-4)
    assert not torch.allclose(prompts, ablate.orthogonal_prompts(5, 16, 1))


# ------------------------------------------------------------------------------------------------
# Fixed prompts

@pytest.mark.parametrize("task", ["seg", "depth"])
def test_training_leaves_fixed_prompts_and_moves_their_adapters(tmp_path, task):
    """N is the file's; after a step the prompts are still the file's in each row, and the adapters
    are others; resuming does not need the file."""
    path = prompt_file(tmp_path / "p.safetensors", 6, 16)
    i = TINY.index("--num-prompts")
    made = recipes.resolve(recipes.parse([
        *TINY[:i], *TINY[i + 2:], "--task", task, "--prompts", str(path), "--out",
        str(tmp_path / "r"),
        "--iterations", "1", "--warmup", "0", "--batch", "2"]))
    assert made.num_prompts == 6 and made.prompt_adapter
    before = train.build_model(made, ("a", "b")).adapters.state_dict()
    train.train(made, resume=False)
    model = MetaPromptModel.from_pretrained(tmp_path / "r" / "last")
    assert len(model.prompts) == (1 if task == "seg" else 2)
    assert all(torch.equal(row, load_file(path)["embeddings"]) for row in model.prompts)
    assert not any(torch.equal(v, before[k]) for k, v in model.adapters.state_dict().items())
    path.unlink()
    checkpoint.load_optimizer(tmp_path / "r" / "last", model, train.build_optimizer(model, made))


def test_fixed_prompts_without_adapter(tmp_path):
    """--no-prompt-adapter is obeyed: the UNet then reads the embeddings themselves."""
    path = prompt_file(tmp_path / "p.safetensors", 4, 16)
    model = train.build_model(recipe(tmp_path / "r", "--prompts", path, "--no-prompt-adapter"),
                              ("a", "b"))
    assert torch.equal(model.context(1)[0], load_file(path)["embeddings"])


BAD_PROMPTS = [
    ("missing", "does not exist"), ("pickle", "no .safetensors file"),
    ("truncated", "not a complete"),
    ("two", "holds 2 tensors"), ("width", r"shape (4, 17)"), ("vector", r"shape (16,)"),
    ("none", r"shape (0, 16)"), ("integers", "int64"), ("nan", "no finite floats"),
    ("other count", "--num-prompts 4")]


@pytest.mark.parametrize("kind,message", BAD_PROMPTS)
def test_bad_prompt_files_are_refused_in_one_line(tmp_path, monkeypatch, capsys, kind, message):
    """Exit code 2 and one line that names the file, before anything is written."""
    path = tmp_path / ("p.pt" if kind == "pickle" else "p.safetensors")
    tensors = {"width": torch.ones(4, 17), "vector": torch.ones(16), "none": torch.ones(0, 16),
               "integers": torch.ones(4, 16, dtype=torch.long), "other count": torch.ones(5, 16),
               "nan": torch.full((4, 16), float("nan"))}
    more = {"q": torch.ones(4, 16)} if kind == "two" else {}
    if kind != "missing":
        save_file({"p": tensors.get(kind, torch.ones(4, 16)), **more}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    code, stderr = run(train.main, monkeypatch, capsys, *TINY, "--prompts", path, "--out",
                       tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and message in stderr and str(path) in stderr
    assert not (tmp_path / "r").exists()


def test_prompts_must_fit_the_pretrained_unet(tmp_path):
    """D is compared with the width that the weight files have, too."""
    widths = ("--unet-channels", 32, 32, 64, 64, "--vae-channels", 32, 32, 32, 32,
              "--norm-groups", 32, "--latent-channels", 4)  # SD1.5's groups are fixed
    donor = train.build_model(recipe(tmp_path / "r", *widths), ("a", "b"))
    for part, config in (("unet", {"attention_head_dim": 1}), ("vae", {})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        save_file(getattr(donor, part).state_dict(),
                  tmp_path / part / "diffusion_pytorch_model.safetensors")
    path = prompt_file(tmp_path / "p.safetensors", 4, 768)
    made = recipe(tmp_path / "r", "--prompts", path, "--context-dim", 768, "--backbone", tmp_path)
    with pytest.raises(InputError, match=r"\(4, 768\), one tensor \(N, 16\)"):
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
    assert recipes.read_recipe(tmp_path / "two" / "recipe.json") == second


BAD_STARTS = [(["--num-prompts", "5"], "num_prompts 4 (here 5)"),
              (["--no-rearrange"], "rearrange True (here False)"),
              (["--latent-scale", "0.5"], "latent_scale 1.0 (here 0.5)"),
              (["--task", "depth"], "task seg (here depth)"),
              (["--unet-channels", "32", "64", "64", "64"], "unet.channels"),
              (["--backbone", "a/b"], "train_encoder True (here False)")]


@pytest.mark.parametrize("flags,message", BAD_STARTS)
def test_misfitting_first_stages_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags,
                                                         message):
    """Exit code 2 and one line that names what differs; nothing is written."""
    first_stage(tmp_path / "one")
    code, stderr = run(train.main, monkeypatch, capsys, *TINY, "--init-from", tmp_path / "one",
                       "--out", tmp_path / "two", *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "two").exists()


def test_a_folder_without_a_model_is_no_first_stage(tmp_path, monkeypatch, capsys):
    """The message says where a config.json was looked for."""
    code, stderr = run(train.main, monkeypatch, capsys, *TINY, "--init-from", tmp_path, "--out",
                       tmp_path / "two")
    assert code == 2 and "best/ or last/" in stderr and str(tmp_path) in stderr


# ------------------------------------------------------------------------------------------------
# The command

def test_one_command_trains_and_reports_all_variants(tmp_path, monkeypatch, capsys):
    """Two variants of one step: run folders, JSON, Markdown, picture, table; called again, it
    trains nothing and reports the same."""
    out = tmp_path / "r" / "ablation"
    flags = [*TINY, "--batch", "2", "--out", str(tmp_path / "r"), "--iterations", "1",
             "--ablate", "--ablate-seeds", "1", "--ablate-variants", "fixed-prompts"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    train.main()
    printed = capsys.readouterr().out
    report = json.loads((out / "ablation.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["baseline", "fixed-prompts"]
    for row in report["rows"]:
        folder = out / f"{row['variant']}-seed0"
        final = [json.loads(line) for line in (folder / "metrics.jsonl").open()][-1]["mIoU"]
        assert row["values"] == {"0": final} and row["mean"] == final and row["std"] is None
        assert f"{final:.4f}" in printed and f"{final:.4f}" in (out / "ablation.md").read_text()
        assert "recipe" in (folder / "log.txt").read_text()
        assert (folder / "best" / "model.safetensors").is_file()
    assert "2 runs of 1 steps" in printed and "stand in for text embeddings" in printed
    assert "M parameters" not in printed                 # a run's own output is in its log
    assert Image.open(out / "ablation.png").width > 1000

    monkeypatch.setattr(train, "train", None)
    train.main()
    assert "2 of them finished" in capsys.readouterr().out
    assert json.loads((out / "ablation.json").read_text()) == report


class FakeTrain:
    """Stands in for train.train: notes its calls, writes `metric` into metrics.jsonl."""

    def __init__(self, metric="mIoU"):
        self.calls, self.metric = [], metric

    def __call__(self, made, resume):
        self.calls.append((Path(made.out).name, resume))
        if "passes-1" in made.out:
            raise FloatingPointError("the loss is nan at step 0; the images: scene 7")
        record = {"step": made.iterations, self.metric: 0.2 + 0.1 * made.seed}
        (Path(made.out) / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_an_interrupted_ablation_goes_on(tmp_path):
    """Finished runs are skipped, a run with a checkpoint is resumed, one without starts anew."""
    base = recipe(tmp_path / "r", "--iterations", 3)
    root = tmp_path / "r" / "ablation"
    for name, last_step in (("baseline-seed0", 3), ("latent-scale-seed0", 2),
                            ("static-timestep-seed0", 2)):
        (root / name).mkdir(parents=True)
        line = json.dumps({"step": last_step, "mIoU": 0.1}) + "\n"
        (root / name / "metrics.jsonl").write_text(line + '{"step": 3, "mIo')  # killed here
    (root / "latent-scale-seed0" / "last").mkdir()
    (root / "latent-scale-seed0" / "last" / "state.json").write_text("{}")
    fake = FakeTrain()
    ablate.ablate(base, 1, ["latent-scale", "static-timestep"], fake)
    assert fake.calls == [("static-timestep-seed0", False), ("latent-scale-seed0", True)]


def test_mean_spread_and_difference(tmp_path, capsys):
    """Mean and standard deviation (n - 1) over seeds, differences to the baseline; a diverged run
    is said so, has no value and is tried again."""
    base, fake = recipe(tmp_path / "r", "--task", "depth"), FakeTrain("rmse")
    for _ in range(2):
        ablate.ablate(base, 3, ["passes-1", "prompts-8"], fake)
    assert len(fake.calls) == 9 + 3
    report = json.loads((tmp_path / "r" / "ablation" / "ablation.json").read_text())
    assert (report["metric"], report["better"]) == ("rmse", "lower")
    baseline, eight, one = report["rows"]
    assert baseline["mean"] == pytest.approx(0.3) and baseline["std"] == pytest.approx(0.1)
    assert eight["difference"] == pytest.approx(0)
    assert one["mean"] is None and one["difference"] is None and one["diverged"] == [0, 1, 2]
    assert "0/3, 3 diverged" in capsys.readouterr().out
    log = tmp_path / "r" / "ablation" / "passes-1-seed0" / "log.txt"
    assert "scene 7" in log.read_text()


def test_differences_are_taken_over_common_seeds():
    """A variant that lacks a seed is compared with the baseline of its own seeds only."""
    base = recipes.RECIPES["seg", "shapes"]
    chosen = ablate.choose(base, ["latent-scale"])
    results = {("baseline", 0): 0.2, ("baseline", 1): 0.6, ("latent-scale", 0): 0.3}
    row = ablate.summarise(base, chosen, range(2), results)["rows"][1]
    assert row["difference"] == pytest.approx(0.1) and row["mean"] == 0.3


def test_the_picture_draws_bars_to_scale(tmp_path):
    """A mean of half the baseline's has a bar half as long."""
    base = recipes.RECIPES["seg", "shapes"]
    chosen = ablate.choose(base, ["latent-scale"])
    results = {("baseline", 0): 0.4, ("latent-scale", 0): 0.2}
    ablate.draw(tmp_path / "a.png", ablate.summarise(base, chosen, range(1), results))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    lengths = [(pixels == colour).all(-1).sum(1).max() for colour in (ablate.BASE, ablate.OTHER)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=3) and lengths[0] > 300


def test_ticks_are_round():
    """Three to six ticks from 0, whatever the scale."""
    assert ablate.ticks(0.275) == [0, 0.05, 0.1, 0.15, 0.2, 0.25]
    for high in (1e-9, 0.0012, 0.99, 1, 1.05, 5.9, 6, 84.7, 1000):
        assert 3 <= len(ablate.ticks(high)) <= 6 and ablate.ticks(high)[-1] <= high


def test_another_recipe_does_not_mix_with_finished_runs(tmp_path):
    """Other flags than those a run was made with are refused, naming field and both values."""
    base = recipe(tmp_path / "r")
    folder = tmp_path / "r" / "ablation" / "baseline-seed0"
    folder.mkdir(parents=True)
    made = ablate.run_recipe(base, VARIANTS["baseline"], 0)
    (folder / "recipe.json").write_text(json.dumps({**vars(made), "device": "cuda"}))
    assert ablate.run_recipe(base, VARIANTS["baseline"], 0) == made
    with pytest.raises(InputError, match="iterations 600, this command 9"):
        ablate.ablate(replace(base, iterations=9), 1, None, None)


BAD_ABLATIONS = [(["--ablate", "--ablate-seeds", "0"], "--ablate-seeds 0"),
                 (["--ablate", "--ablate-variants", "nothing"], "choose from baseline"),
                 (["--ablate", "--init-from", "x"], "leave out"),
                 (["--ablate", "--num-prompts", "20"], "at most --context-dim 16"),
                 (["--ablate", "--resume", "x"], "leave out"),
                 (["--ablate-seeds", "2"], "go with --ablate")]


@pytest.mark.parametrize("flags,message", BAD_ABLATIONS)
def test_bad_ablations_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    """Exit code 2 and one line, before the first run."""
    more = [] if "--resume" in flags else [*TINY, "--out", str(tmp_path / "r")]
    code, stderr = run(train.main, monkeypatch, capsys, *more, *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "r").exists()


def test_an_ablation_has_one_default_folder(tmp_path, monkeypatch):
    """Called again without --out it finds its runs: the default is not numbered."""
    monkeypatch.chdir(tmp_path)
    Path("runs/seg-shapes").mkdir(parents=True)
    assert recipes.resolve(recipes.parse(["--ablate"])).out == "runs/seg-shapes"
    assert recipes.resolve(recipes.parse([])).out == "runs/seg-shapes-2"
