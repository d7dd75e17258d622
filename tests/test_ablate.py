"""Ablations: every variant changes what it says; one command runs, resumes and reports them.

    pytest tests/test_ablate.py
"""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HEAD, SCENES, TINY, recipe, refused
from PIL import Image
from safetensors.torch import load_file

import train
from model import Config
from ops import draw
from ops.errors import InputError
from sets import shapes
from tasks.captioned import CaptionConfig
from tasks.flags import resolve
from tasks.recipes import RECIPES, read_recipe
from tools import ablate
from vpd.text import TextEncoder, Tokenizer
from weights.files import TINY_SD

VARIANTS = {v.name: v for v in ablate.VARIANTS}


def build(base, name):
    """The model that variant `name` of the recipe trains."""
    return train.build_model(ablate.run_recipe(base, VARIANTS[name], seed=0), ("a", "b", "c"))


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
    for task, own in (("seg", ("prompts-32", "passes-1")), ("depth", ("prompts-64", "passes-1"))):
        names = [v.name for v in ablate.choose(RECIPES[task, "shapes"], None)]
        assert names == [n for n in VARIANTS if n not in own]
    base = RECIPES["seg", "shapes"]
    assert [v.name for v in ablate.choose(base, ["passes-3"])] == ["baseline", "passes-3"]


def test_the_stand_in_for_text_embeddings_is_orthogonal():
    """Rows of length sqrt(D) at right angles, other ones for another seed."""
    prompts = ablate.orthogonal_prompts(5, 16, 0)
    assert torch.allclose(prompts @ prompts.T, 16 * torch.eye(5), atol=1e-4)
    assert not torch.allclose(prompts, ablate.orthogonal_prompts(5, 16, 1))


# ------------------------------------------------------------------------------------------------
# The command

def test_one_command_trains_and_reports_all_variants(tmp_path, monkeypatch, capsys):
    """Two variants of one step: run folders, JSON, Markdown, picture, table; called again, it
    trains nothing and reports the same."""
    out = tmp_path / "r"
    flags = [*TINY, *HEAD, *SCENES, "--batch", "2", "--out", str(out), "--iterations", "1",
             "--seeds", "1", "--variants", "fixed-prompts"]
    monkeypatch.setattr("sys.argv", ["ablate", *flags])
    ablate.main()
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
    assert "2 runs of 1 steps" in printed and "a fixed prompt is worth" in printed
    assert "M parameters" not in printed                 # a run's own output is in its log
    assert Image.open(out / "ablation.png").width > 1000

    monkeypatch.setattr(ablate, "train", None)
    ablate.main()
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
        (Path(made.out) / "recipe.json").write_text(json.dumps(asdict(made)))
        record = {"step": made.iterations, self.metric: 0.2 + 0.1 * made.seed}
        (Path(made.out) / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return {"steps": made.iterations}


def test_a_signal_stops_the_whole_ablation(tmp_path, monkeypatch):
    """A run that a signal ended early is saved, not called diverged, and no other is started."""
    base, calls = recipe(tmp_path / "r", "--iterations", 3), []
    monkeypatch.setattr(ablate, "train", lambda made, resume: calls.append(made) or {"steps": 1})
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(base, 1, ["latent-scale"])
    assert len(calls) == 1


def test_an_interrupted_ablation_goes_on(tmp_path, monkeypatch):
    """Finished runs are skipped, a run with a checkpoint is resumed, one without starts anew."""
    base = recipe(tmp_path / "r", "--iterations", 3)
    root, fake = tmp_path / "r", FakeTrain()
    for name, last_step in (("baseline-seed0", 3), ("latent-scale-seed0", 2),
                            ("static-timestep-seed0", 2)):
        (root / name).mkdir(parents=True)
        line = json.dumps({"step": last_step, "mIoU": 0.1}) + "\n"
        (root / name / "metrics.jsonl").write_text(line + '{"step": 3, "mIo')  # killed here
        (root / name / "recipe.json").write_text(json.dumps(asdict(
            ablate.run_recipe(base, VARIANTS[name.removesuffix("-seed0")], 0))))
    (root / "latent-scale-seed0" / "last").mkdir()
    (root / "latent-scale-seed0" / "last" / "state.json").write_text("{}")
    monkeypatch.setattr(ablate, "train", fake)
    ablate.ablate(base, 1, ["latent-scale", "static-timestep"])
    assert fake.calls == [("static-timestep-seed0", False), ("latent-scale-seed0", True)]


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    """With train.py itself: the classes that its start found out are no other recipe."""
    base = recipe(tmp_path / "r", "--iterations", 2, "--save-every", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate", interrupted)
        ablate.ablate(base, 1, [])
    ablate.ablate(base, 1, [])
    folder = tmp_path / "r" / "baseline-seed0"
    assert "resuming" in (folder / "log.txt").read_text()
    with (folder / "metrics.jsonl").open("a") as log:    # edited: no figure is made of that
        log.write('{"step": 2, "mIoU": "x"}\n{"step": 2, "mIoU": NaN}\n{"step": 2, "mIoU": null}\n')
    assert 0 <= ablate.final_metric(replace(base, out=str(folder))) <= 1


def interrupted(*_):
    """As Ctrl-C does."""
    raise KeyboardInterrupt


def test_mean_spread_and_difference(tmp_path, monkeypatch, capsys):
    """Mean and standard deviation (n - 1) over seeds, differences to the baseline; a diverged run
    is said so, has no value and is tried again."""
    base, fake = recipe(tmp_path / "r", "--task", "depth"), FakeTrain("rmse")
    monkeypatch.setattr(ablate, "train", fake)
    for _ in range(2):
        ablate.ablate(base, 3, ["passes-1", "prompts-8"])
    assert len(fake.calls) == 9 + 3
    report = json.loads((tmp_path / "r" / "ablation.json").read_text())
    assert (report["metric"], report["better"]) == ("rmse", "lower")
    baseline, eight, one = report["rows"]
    assert baseline["mean"] == pytest.approx(0.3) and baseline["std"] == pytest.approx(0.1)
    assert eight["difference"] == pytest.approx(0) and eight["verdict"] == "not decided"
    assert one["mean"] is None and one["difference"] is None and one["diverged"] == [0, 1, 2]
    assert "0/3, 3 diverged" in capsys.readouterr().out
    assert "scene 7" in (tmp_path / "r" / "passes-1-seed0" / "log.txt").read_text()


def test_the_table_holds_what_earlier_commands_finished(tmp_path, monkeypatch, capsys):
    """Other variants and seeds of the same settings are in the table, at the seeds they have;
    unfinished runs and those of other settings are not, nor is anything of theirs written."""
    base, fake = recipe(tmp_path / "r"), FakeTrain()
    monkeypatch.setattr(ablate, "train", fake)
    ablate.ablate(base, 2, ["latent-scale"])
    ablate.ablate(replace(base, seed=5), 1, ["fixed-prompts"])
    other = replace(base, iterations=7)
    ablate.ablate(replace(other, out=str(tmp_path / "other")), 1, ["static-timestep"])
    (tmp_path / "other" / "static-timestep-seed0").rename(tmp_path / "r" / "static-timestep-seed0")
    (tmp_path / "r" / "static-timestep-seed1").mkdir()
    calls = len(fake.calls)
    capsys.readouterr()
    ablate.ablate(base, 1, ["prompts-8"])
    assert fake.calls[calls:] == [("prompts-8-seed0", False)]
    assert "(2 variants, 1 seeds), 1 of them finished" in capsys.readouterr().out
    report = json.loads((tmp_path / "r" / "ablation.json").read_text())
    found = {row["variant"]: [v and round(v, 4) for v in row["values"].values()]
             for row in report["rows"]}
    assert report["seeds"] == [0, 1, 5]
    assert found == {"baseline": [0.2, 0.3, 0.7], "prompts-8": [0.2, None, None],
                     "latent-scale": [0.2, 0.3, None], "fixed-prompts": [None, None, 0.7]}

    prompts = tmp_path / "r" / "fixed-prompts-seed5" / ablate.PROMPTS
    before = prompts.read_bytes()
    more = recipe(tmp_path / "r", "--num-prompts", 8)
    assert ablate.find_finished(more) == {} and prompts.read_bytes() == before
    with pytest.raises(InputError, match="does not hold 8 prompts"):
        ablate.run_recipe(more, VARIANTS["fixed-prompts"], 5)


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_label_prompts_are_the_class_names_embeddings(tmp_path, task):
    """Seven names through the text encoder of weights/tiny-sd, in their order, fixed, the same in
    every pass; the renderer knows them of depth's scenes, too."""
    base = resolve(["--task", task, "--refine-steps", "2", "--out", str(tmp_path)])[0]
    made = ablate.run_recipe(base, VARIANTS["label-prompts"], 0)
    assert (made.model.num_prompts, made.model.fixed_prompts) == (7, True)
    rows = load_file(made.prompts)["prompts"]
    tokenizer, encoder = (kind.from_pretrained(str(TINY_SD)) for kind in (Tokenizer, TextEncoder))
    for row, name in zip(rows, shapes.CLASSES, strict=True):
        assert torch.allclose(row, encoder(tokenizer([f"a photo of a {name}"]))[1][0], atol=1e-5)
    model = train.build_model(made, shapes.CLASSES)
    assert all(torch.equal(prompts, rows) for prompts in model.prompts)
    assert not model.prompts.requires_grad and model.adapters[-1][0].weight.requires_grad


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_caption_prompts_are_read_per_image(tmp_path, task):
    """The variant's model is the one that reads captions, all else as the baseline's recipe; the
    recipes of other variants have no new field, so that runs of older versions are found."""
    base = resolve(["--task", task, "--out", str(tmp_path)])[0]
    made, plain = (ablate.run_recipe(base, VARIANTS[name], 0)
                   for name in ("caption-prompts", "baseline"))
    assert type(made.model) is CaptionConfig and made.prompts == "captions"
    changed = {"caption_prompts", "num_prompts", "prompt_adapter", "fixed_prompts"}
    assert {k: v for k, v in vars(made.model).items() if k not in changed} \
        == {k: v for k, v in vars(plain.model).items() if k not in changed}
    assert type(plain.model) is Config and not list(tmp_path.iterdir())
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(asdict(made)))
    assert read_recipe(path) == made


def test_what_needs_pretrained_weights_is_left_out_without(tmp_path):
    """Random weights have no text encoder and no encoder that could stay frozen."""
    names = [v.name for v in ablate.choose(recipe(tmp_path / "r"), None)]
    assert not set(ablate.PRETRAINED) & set(names) and "passes-1" in names
    people = [v.name for v in ablate.choose(resolve(["--task", "pose", "--out", "x"])[0], None)]
    assert "random-unet" in people and "trained-encoder" in people
    assert "caption-prompts" not in people


@pytest.mark.parametrize("name, task, passes, differences, expected", [
    ("passes-1", "seg", 3, [-0.02, -0.03, -0.025], "agrees"),
    ("passes-1", "seg", 3, [0.02, 0.03, 0.025], "disagrees"),
    ("passes-3", "seg", 1, [0.02, 0.03, 0.025], "agrees"),
    ("passes-3", "seg", 1, [-0.02, -0.03, -0.025], "disagrees"),
    ("passes-1", "depth", 3, [0.2, 0.3, 0.25], "agrees"),
    ("no-rearrangement", "seg", 1, [-0.02, -0.03, -0.025], "agrees"),
    ("passes-1", "seg", 3, [-0.02, 0.03, -0.025], "not decided"),
    ("passes-1", "seg", 3, [-0.02], "not decided"), ("passes-1", "seg", 3, [], "not decided"),
    ("random-unet", "seg", 1, [-0.02, -0.03, -0.025], "worse"),
    ("random-unet", "depth", 1, [-0.2, -0.3, -0.25], "better")])
def test_verdicts(name, task, passes, differences, expected):
    """Nothing is decided unless the interval lies on one side of 0; then the sign is compared with
    the paper's: of passes, from as many as the baseline has."""
    base = resolve(["--task", task, "--refine-steps", str(passes), "--out", "x"])[0]
    sign = -1 if task == "depth" else 1
    assert ablate.verdict(VARIANTS[name], base, sign, differences) == expected


def test_the_interval_is_students():
    """Of 1, 2, 3: mean 2, standard deviation 1, t = 4.303 for two degrees of freedom."""
    assert ablate.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3 ** 0.5)
    assert ablate.half_width([0.0, 1.0] * 20) == pytest.approx(2 * 0.50637 / 40 ** 0.5, rel=1e-4)


def test_differences_are_taken_over_common_seeds():
    """A variant that lacks a seed is compared with the baseline of its own seeds only."""
    base = RECIPES["seg", "shapes"]
    chosen = ablate.choose(base, ["latent-scale"])
    results = {("baseline", 0): 0.2, ("baseline", 1): 0.6, ("latent-scale", 0): 0.3}
    row = ablate.summarise(base, chosen, range(2), results)["rows"][1]
    assert row["difference"] == pytest.approx(0.1) and row["mean"] == 0.3


def test_the_picture_draws_bars_to_scale(tmp_path):
    """A mean of half the baseline's has a bar half as long."""
    base = RECIPES["seg", "shapes"]
    chosen = ablate.choose(base, ["latent-scale"])
    results = {("baseline", 0): 0.4, ("latent-scale", 0): 0.2}
    ablate.write(tmp_path, ablate.summarise(base, chosen, range(1), results))
    pixels = np.asarray(Image.open(tmp_path / "ablation.png"))
    lengths = [(pixels == colour).all(-1).sum(1).max() for colour in (draw.DARK, draw.BLUE)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=3) and lengths[0] > 300


def test_ticks_are_round():
    """Three to six ticks from 0, whatever the scale."""
    assert draw.ticks(0.275) == [0, 0.05, 0.1, 0.15, 0.2, 0.25]
    for high in (1e-9, 0.0012, 0.99, 1, 1.05, 5.9, 6, 84.7, 1000):
        assert 3 <= len(draw.ticks(high)) <= 6 and draw.ticks(high)[-1] <= high


def test_another_recipe_does_not_mix_with_finished_runs(tmp_path):
    """Other flags than those a run was made with are refused, naming field and both values; where
    it runs may change."""
    base, folder = recipe(tmp_path / "r"), tmp_path / "r" / "baseline-seed0"
    folder.mkdir(parents=True)
    made = ablate.run_recipe(base, VARIANTS["baseline"], 0)
    (folder / "recipe.json").write_text(json.dumps({**asdict(made), "device": "cuda"}))
    assert ablate.run_recipe(base, VARIANTS["baseline"], 0) == made
    with pytest.raises(InputError, match=f"iterations {base.iterations}, this command 9"):
        ablate.ablate(replace(base, iterations=9), 1, None)


BAD_ABLATIONS = [(["--seeds", "0"], "--seeds is 0, possible is 1 to 1000"),
                 (["--seeds", "2", "--seed", "2147483647"], "the last seed is 2147483648"),
                 (["--variants", "nothing"], "choose from baseline"),
                 (["--init-from", "x"], "leave out"), (["--prompts", "x"], "x does not exist"),
                 (["--num-prompts", "20"], "at most --unet-context-dim 16"),
                 (["--resume", "x"], "recipe.json does not exist")]


@pytest.mark.parametrize("flags,message", BAD_ABLATIONS)
def test_bad_ablations_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    """Exit code 2 and one line, before the first run."""
    more = [] if "--resume" in flags else [*TINY, *HEAD, "--out", str(tmp_path / "r")]
    code, stderr = refused(ablate.main, monkeypatch, capsys, *more, *flags)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "r").exists()


def test_an_ablation_has_one_default_folder(tmp_path, monkeypatch):
    """Called again without --out it finds its runs: the default is not numbered."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "ablate", lambda base, seeds, names: asked.append(base.out))
    Path("runs/ablation-depth-shapes").mkdir(parents=True)
    for words in ([], [], ["--out", "there"], ["--out=there"]):
        monkeypatch.setattr("sys.argv", ["ablate", "--task", "depth", *words])
        ablate.main()
    assert asked == ["runs/ablation-depth-shapes"] * 2 + ["there"] * 2


def test_an_ablation_is_no_guest_of_a_run(tmp_path):
    """Its table and runs do not go into the folder of another run."""
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run of train.py: give another folder"):
        ablate.ablate(recipe(tmp_path), 1, [])
    assert len(list(tmp_path.iterdir())) == 1
