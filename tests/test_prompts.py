"""Names become the text embeddings that VPD is prompted with, in a file that train.py reads.

    pytest tests/test_prompts.py
"""
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import command, refused
from transformers import CLIPTextModel, CLIPTokenizer

from tasks.flags import read_prompts
from tools import prompts
from vpd.prompts import IMAGENET, ONE, embed_names, sentences_of

TINY_SD = Path(__file__).parents[1] / "weights" / "tiny-sd"
NAMES = ("chair", "living_room", "red ball")


@pytest.fixture(scope="module")
def oracle():
    """(names, templates) -> rows, by transformers: one name at a time, 32 tokens, the mean of the
    pooled states (official: the scripts behind nyu_class_embeddings.pth).
    """
    encoder = CLIPTextModel.from_pretrained(TINY_SD / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")

    def rows(names, templates):
        found = []
        for name in names:
            texts = [template.format(name.replace("_", " ")) for template in templates]
            ids = tokenizer(texts, padding="max_length", max_length=32, truncation=True,
                            return_tensors="pt").input_ids
            with torch.no_grad():
                found.append(encoder(ids).pooler_output.mean(dim=0))
        return torch.stack(found)
    return rows


def write_names(path, content=b"chair\nliving_room\nred ball\n"):
    """A file of names."""
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("templates", [ONE, IMAGENET], ids=["one", "imagenet"])
def test_rows_equal_transformers(oracle, templates):
    """Pooled, averaged over the sentences, not normalised: equal to CLIPTextModel's (1e-5)."""
    ours = embed_names(NAMES, templates, str(TINY_SD))
    assert ours.shape == (3, 64) and ours.dtype == torch.float32
    assert (ours - oracle(NAMES, templates)).abs().max() < 1e-5


def test_sentences():
    """One, or CLIP's 80, all different, full stop at the end; underscores are spaces."""
    assert sentences_of("living_room", ONE) == ["a photo of a living room"]
    assert len(IMAGENET) == len(set(IMAGENET)) == 80
    assert all(text.count("{}") == 1 and text.endswith(".") for text in IMAGENET)
    assert "itap of a red ball." in sentences_of("red ball", IMAGENET)


def test_an_average_is_shorter():
    """As in the released matrices, the mean of 80 sentences is shorter than a sentence."""
    one, mean = (embed_names(NAMES, t, str(TINY_SD)).norm(dim=1) for t in (ONE, IMAGENET))
    assert (mean < one).all()


def test_the_file_is_what_train_reads(tmp_path, monkeypatch, capsys):
    """One tensor (N, D), which --prompts takes; the command says what it wrote."""
    out = tmp_path / "new" / "prompts.safetensors"
    names = write_names(tmp_path / "names.txt")
    command(prompts.main, monkeypatch, "--classes", names, "--backbone", "tiny", "--out", out)
    assert torch.equal(read_prompts(out, 64), embed_names(NAMES, ONE, str(TINY_SD)))
    assert f"wrote {out}: 3 names, 64 wide, norms " in capsys.readouterr().out
    command(prompts.main, monkeypatch, "--classes", names, "--backbone", TINY_SD, "--out",
            tmp_path / "mean.safetensors", "--average")
    assert torch.equal(read_prompts(tmp_path / "mean.safetensors", 64),
                       embed_names(NAMES, IMAGENET, str(TINY_SD)))


@pytest.mark.parametrize("content, said", [
    (b"caf\xe9\nchair\n", "is no UTF-8 text"),
    (b"chair\n\nball\n", "line 2, '', is empty or there already"),
    (b"\n", "is empty|names"),
    (b"chair\n" + b"ball " * 500, "the name 'ball ball .* of 500 words makes a sentence of 506")])
def test_names_that_cannot_be_read_are_refused(tmp_path, monkeypatch, capsys, content, said):
    """Latin-1, an empty line, no line, a name of 500 words: one line, exit code 2, no file."""
    names, out = write_names(tmp_path / "classes.txt", content), tmp_path / "p.safetensors"
    code, stderr = refused(prompts.main, monkeypatch, capsys, "--classes", names, "--backbone",
                           TINY_SD, "--out", out)
    assert code == 2 and stderr.count("\n") == 1 and re.search(said, stderr), stderr
    assert not out.exists()


def test_sources_and_outputs_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys):
    """A folder without text_encoder/, a file that exists or is no .safetensors, no names."""
    names = write_names(tmp_path / "classes.txt")
    bare = tmp_path / "bare"
    shutil.copytree(TINY_SD / "tokenizer", bare / "tokenizer")
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    for flags, said in (
            (["--backbone", bare], "text_encoder/config.json does not exist"),
            (["--out", taken], "exists: give another name, or remove it"),
            (["--out", tmp_path / "p.pt"], "its name must end in .safetensors"),
            (["--classes", tmp_path / "none.txt"], "none.txt is missing: one class name per line")):
        code, stderr = refused(prompts.main, monkeypatch, capsys, "--classes", names, "--backbone",
                               TINY_SD, "--out", tmp_path / "p.safetensors", *flags)
        assert code == 2 and stderr.count("\n") == 1 and said in stderr, stderr
    assert taken.read_bytes() == b"mine"
