"""The documents keep their promises: two commands, every deviation listed, flags that exist.

    pytest tests/test_readme.py
"""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import COMMANDS, ROOT, TEXTS, key_of, option, words_of

import eval as evaluation
from tasks.flags import resolve
from tasks.recipes import find_recipe

README = TEXTS[ROOT / "README.md"]
SOURCES = [path for folder in (".", "ops", "sets", "tasks", "tools", "weights")
           for path in sorted((ROOT / folder).glob("*.py"))]


def test_there_are_two_set_up_commands_of_one_line_each():
    """One line runs the main job, one line runs the tests."""
    for marker, command in (("run", "python train.py --task seg"), ("test", "python -m pytest")):
        block = re.search(rf"<!-- {marker} command -->\n```\n(.*?)```", README, re.S)[1]
        assert block.count("\n") == 1 and block.strip().endswith(command)
    assert len(re.findall(r"<!-- \w+ command -->", README)) == 2


def test_every_deviation_in_the_code_is_listed():
    """What is marked DEVIATION in a file has a row in docs/DIFFERENCES.md that names file and
    function, and the rows name functions that there are."""
    table = TEXTS[ROOT / "docs" / "DIFFERENCES.md"]
    for path in SOURCES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        for mark in re.finditer("DEVIATION", text):
            before = re.findall(r"^(?:def|class) (\w+)", text[:mark.start()], re.M)[-1]
            assert f"`{name}`, `{before}`" in table, f"{name}, {before}"
    for name, function in re.findall(r"`([\w/]+\.py)`, `(\w+)`", table):
        assert re.search(rf"^(def|class) {function}\b", (ROOT / name).read_text(), re.M), function


def test_every_train_command_of_the_documents_parses():
    """The flags of each train.py command exist and give a recipe that passes its checks."""
    found = [words[words.index("train.py") + 1:] for words in map(words_of, COMMANDS)
             if "train.py" in words and not {"--resume", "--help"} & set(words)]
    assert len(found) >= 10
    for words in found:
        resolve(words)


def test_every_eval_command_of_the_documents_parses(monkeypatch, tmp_path):
    """The flags of each eval.py command exist for its task and data set."""
    found = [words[2:] for words in map(words_of, COMMANDS) if words[1:2] == ["eval.py"]]
    assert len(found) >= 5
    monkeypatch.setattr(evaluation, "find_checkpoint", Path)
    for words in found:
        row = find_recipe(*key_of(words), option(words, "--method"))
        model = SimpleNamespace(config=row.model)
        monkeypatch.setattr(evaluation.methods, "load", lambda folder: model)
        monkeypatch.setattr(evaluation.methods, "load_official", lambda path, config: model)
        monkeypatch.setattr(evaluation.methods, "method_of", lambda config: row.method)
        monkeypatch.setattr(evaluation, "recipe_of", lambda *_: row)
        words = [str(tmp_path) if w in ("FILE", "FILE_OR_FOLDER") else w for w in words]
        assert evaluation.load(words)[1].task == row.task


def test_quoted_code_is_the_codes():
    """Each block quoted from a file is in that file, line by line."""
    quoted = [pair for text in TEXTS.values() for pair in
              re.findall(r"<!-- quoted from (\S+) -->\n```python\n(.*?)```", text, re.S)]
    assert len(quoted) >= 3
    for name, block in quoted:
        assert block in (ROOT / name).read_text(), f"{name} no longer holds:\n{block}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    """Every relative link and picture of a document exists."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[path], flags=re.S)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_files_exist(path):
    """Every Python file that a document names in inline code exists."""
    text = re.sub(r"```.*?```", "", TEXTS[path], flags=re.S)
    for target in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / target).exists(), target
