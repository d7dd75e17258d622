"""Two methods, the same commands: VPD trains, goes on, evaluates and predicts like Meta Prompts.

    pytest tests/test_methods.py
"""
import json
from dataclasses import replace

import pytest
import torch
from helpers import command, noise, read_png, refused, repeat_last_step, save_image, write_run
from oracles import randomise
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager
from vpd_fixture import fixture, vpd_contents

import eval as evaluation
import train
from model import MetaPromptModel
from ops.errors import InputError
from sets import shapes
from sets.nyu_kitti import SCENES
from tasks import depth, methods
from tasks.flags import resolve
from tasks.recipes import ROWS, find_recipe
from tools import ablate, heatmaps, memory
from unet import UNetConfig
from vae import VAEConfig
from vpd.prompts import IMAGENET, ONE, embed_names
from weights.files import TINY_SD

SMALL = ["--method", "vpd", "--crop", "64", "--batch", "4", "--micro-batch", "2", "--val-scenes",
         "2", "--at-once", "1", "--eval-every", "2", "--save-every", "1", "--precision", "float32"]


def small(task, out, *flags):
    """The embedded VPD recipe of a task, two steps long."""
    return resolve(["--task", task, *SMALL, "--iterations", "2", "--out", str(out),
                    *map(str, flags)])[0]


@pytest.fixture(scope="module", params=["seg", "depth", "refer"])
def run(request, tmp_path_factory):
    """(recipe, folder) of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("vpd") / request.param
    made = small(request.param, folder)
    train.train(made, resume=False)
    return made, folder


def test_a_stopped_run_goes_on_to_the_same_weights(run, tmp_path):
    """From the checkpoint of the first step the second one gives the same weights, to the bit."""
    made, folder = run
    resumed = repeat_last_step(folder, tmp_path / "r")
    assert resumed.method == "vpd" and resumed.model.unet == made.model.unet


def test_a_run_evaluates_and_predicts(run, tmp_path, monkeypatch, capsys):
    """eval.py needs the run only: metrics of its set, an answer of a picture's own size."""
    made, folder = run
    command(evaluation.main, monkeypatch, "--checkpoint", folder, "--out", tmp_path / "e",
            "--precision", "float32")
    values = json.loads((tmp_path / "e" / "metrics.json").read_text())
    best = [json.loads(line) for line in (folder / "metrics.jsonl").open()][-1]
    name = {"seg": "mIoU", "depth": "rmse", "refer": "oIoU"}[made.task]
    assert name in values and values[name] == pytest.approx(best[name], rel=1e-5)
    save_image(tmp_path / "p" / "a.png", noise(70, 90))
    sentence = ["--sentence", "the red ball"] if made.task == "refer" else []
    command(evaluation.main, monkeypatch, "--checkpoint", folder, "--image", tmp_path / "p",
            "--out", tmp_path / "o", *sentence)
    file, = [f for f in (tmp_path / "o").iterdir()
             if f.name in ("a_labels.png", "a_depth.png", "a_mask.png")]
    assert read_png(file).shape == (70, 90)


def test_embeddings_are_made_from_names_and_kept(tmp_path):
    """Class names in one sentence, scene types in CLIP's 80; after that no text encoder is read."""
    for task, names, templates in (("seg", shapes.CLASSES, ONE), ("depth", SCENES, IMAGENET)):
        model = train.build_model(small(task, tmp_path / task), names)
        wanted = embed_names(names, templates, str(TINY_SD))
        assert torch.equal(model.class_embeddings, wanted)
        model.save_pretrained(tmp_path / task)
        assert torch.equal(methods.load(tmp_path / task).class_embeddings, wanted)
        assert not any(p.requires_grad for p in model.vae.parameters())


def test_given_embeddings_are_taken_if_there_is_one_per_name(tmp_path):
    """--prompts FILE, as tools.prompts writes it; another number of rows is refused."""
    for count in (7, 6):
        save_file({"p": torch.randn(count, 64)}, tmp_path / f"{count}.safetensors")
    given = [small("seg", tmp_path / "r", "--prompts", tmp_path / f"{n}.safetensors")
             for n in (7, 6)]
    model = train.build_model(given[0], shapes.CLASSES)
    assert torch.equal(model.class_embeddings, load_file(tmp_path / "7.safetensors")["p"])
    with pytest.raises(InputError, match=r"\(6, 64\): seg on .* wants \(7, 64\)"):
        train.build_model(given[1], shapes.CLASSES)


@pytest.mark.parametrize("name, scene", [
    ("sync/study_room_0004/rgb_1.jpg", "study"), ("a/office_kitchen_0001a/rgb_7.jpg", "kitchen"),
    ("official_splits/test/bathroom/rgb_00045.jpg", "bathroom"), ("scene 17", None)])
def test_a_scenes_type_is_the_first_name_that_fits(name, scene):
    """As released: the list's order decides, so that a study_room is a study."""
    number = methods.scene_number(name, SCENES)
    assert (None if number is None else SCENES[number]) == scene


def test_scene_types_reach_training_and_evaluation(tmp_path):
    """Names that tell the type give the numbers of its rows; one that doesn't, None: the mean."""
    (tmp_path / "scenes.txt").write_text("scene\nattic\n")
    made = small("depth", tmp_path / "r", "--scene-types", tmp_path / "scenes.txt")
    names = train.class_names(made, None)
    assert names == ("scene", "attic")
    model = train.build_model(made, names).eval()
    text = methods.text_of(model, {"name": ["scene 1", "an/attic/1.png"]})
    assert text.tolist() == [0, 1]
    assert methods.text_of(model, {"name": ["scene 1", "cellar"]}) is None
    seen, images = [], torch.rand(2, 3, 64, 64)
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    depth.predict(model, images, made.protocol, torch.float32, text=text)
    assert [given["text"].tolist() for given in seen] == [[0, 1], [0, 1]]      # and mirrored


def test_the_text_encoder_is_not_trained_and_not_saved(run):
    """A refer model reads sentences by the backbone's encoder, which its file does not hold."""
    made, folder = run
    tensors = load_file(folder / "best" / "model.safetensors")
    assert not any("reader" in name or "text_model" in name for name in tensors)


@pytest.mark.slow
def test_memory_is_estimated_for_vpd(tmp_path):
    """A step on fake tensors; referring takes its sentences' states, too."""
    assert 1 < memory.step_gb(small("refer", tmp_path / "r")) < 2


@pytest.mark.parametrize("task", ["seg", "refer"])
def test_the_authors_files_are_loaded_by_method(tmp_path, task):
    """--official with --method vpd; a file of another task or method is refused in a line."""
    path = tmp_path / "vpd.pth"
    torch.save(vpd_contents(fixture(task)[0]), path)
    row = ROWS["vpd"][task, "folder"]
    assert methods.load_official(path, row.model).config.task == task
    with pytest.raises(InputError, match=f"is a model of task {task}, not depth"):
        methods.load_official(path, ROWS["vpd"]["depth", "nyu"].model)
    with pytest.raises(InputError, match="has the unknown tensor|Namespace"):
        methods.load_official(path, ROWS["meta-prompts"]["seg", "ade20k"].model)


def test_nyus_scene_types_are_supplied(tmp_path):
    """The released depth file has 27 rows without names: they are NYU v2's."""
    info = fixture("depth")[0]
    path, rows = tmp_path / "vpd.pth", ROWS["vpd"]["depth", "nyu"].model
    contents = vpd_contents(info)
    table = contents["model"]["encoder.class_embeddings"]
    contents["model"]["encoder.class_embeddings"] = table[:1].expand(27, -1).clone()
    torch.save(contents, path)
    assert methods.load_official(path, rows).config.class_names == SCENES


def test_a_folder_tells_its_method(tmp_path):
    """Meta Prompts' config.json has no method, VPD's has; the class follows."""
    write_run("seg", tmp_path / "m")
    assert isinstance(methods.load(tmp_path / "m" / "best"), MetaPromptModel)


BAD = [(["--task", "pose", "--method", "vpd"], "pose is unknown for --method vpd: choose from"),
       (["--task", "refer", "--method", "meta-prompts"], "refer is unknown for --method meta-prom"),
       (["--method", "clip"], "--method clip is unknown: choose from meta-prompts, vpd"),
       (["--method", "vpd", "--refine-steps", "2"], "--refine-steps is no setting of seg"),
       (["--method", "vpd", "--init", "random"], "--init is no setting of seg on shapes"),
       (["--task", "refer", "--prompts", "x"], "--prompts is no setting of refer"),
       (["--task", "depth", "--scene-types", "x"], "--scene-types is no setting of depth"),
       (["--task", "depth", "--method", "vpd", "--scene-types", "nowhere.txt"], "nowhere.txt")]


@pytest.mark.parametrize("flags, message", BAD)
def test_what_a_method_has_not_is_refused_in_one_line(tmp_path, monkeypatch, capsys, flags,
                                                      message):
    """Exit code 2, before any work."""
    code, stderr = refused(train.main, monkeypatch, capsys, *flags, "--out", tmp_path / "r")
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not (tmp_path / "r").exists()


def gradients(model):
    """{name: gradient} of a batch's losses."""
    model.zero_grad()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    sum(model.loss(images, torch.zeros(2, 64, 64, dtype=torch.long)).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.METHODS)
def test_passes_share_compiled_parts(method):
    """Each part becomes one graph, whatever T, with checkpointing: the same gradients, in float64.
    """
    recipe = find_recipe("seg", "ade20k", method)
    model = replace(recipe.model, num_classes=3, head_channels=16, dropout=0.0,
                    unet=UNetConfig((32, 32, 64, 64), 1, num_heads=2, context_dim=16),
                    vae=VAEConfig((32,) * 4, 1))
    model = randomise(methods.kind_of(model)(model)).double().train()
    model.unet.gradient_checkpointing = True
    expected, graphs = gradients(model), []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    methods.compile_parts(model, count)
    for _ in range(2):
        found = gradients(model)
    assert len(graphs) == 11 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_tools_of_meta_prompts_refuse_vpd(run, tmp_path, monkeypatch, capsys):
    """There are no learned prompts to map, and Table 5 is not about it."""
    made, folder = run
    save_image(tmp_path / "a.png", noise(64, 64))
    if made.task == "refer":
        code, stderr = refused(evaluation.main, monkeypatch, capsys, "--checkpoint", folder,
                               "--sentence", "the ball")
        assert code == 2 and "--sentence is about your own pictures" in stderr
    if made.task == "seg":
        code, stderr = refused(heatmaps.main, monkeypatch, capsys, "--checkpoint", folder,
                               "--image", tmp_path / "a.png")
        assert code == 2 and "no learned prompts" in stderr
        code, stderr = refused(ablate.main, monkeypatch, capsys, "--method", "vpd")
        assert code == 2 and "about Meta Prompts" in stderr
    with pytest.raises(InputError, match="--method vpd"):
        find_recipe("pose", "coco", "vpd")
