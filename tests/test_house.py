"""The house's rules: where files lie, which way they know each other, sizes, living references.

    pytest tests/test_house.py
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [{"tools", "hubconf"}, {"train"}, {"eval"}, {"tasks"}, {"pretraining"},
          {"model", "vpd", "data"}, {"unet", "vae", "sets"}, {"heads", "weights"},
          {"ops"}]  # imports go to later ones
ROOMS = ("tools", "tasks", "pretraining", "vpd", "sets", "weights", "ops")
CARD = {"model", "unet", "vae", "heads", "data", "train", "eval"}
SOURCES = sorted(path for room in (".", *ROOMS) for path in (ROOT / room).glob("*.py"))
EVERY = [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))]
DEAD = re.compile(r"\bspec [A-Z]\.\d|\bdecisions? \d|\b(pose|seg|depth)\sspec\b|\(section \d"
                  rf"|{re.escape(str(ROOT))}", re.I)  # nor a path of this machine
CITED = re.compile(rf"\b(?:docs|tests|{'|'.join(ROOMS)})/\w+\.(?:py|md)\b")
NAMES = pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT)))


def room(name):
    """The room of a module: the folder of the root, or the file of the root itself."""
    return name.split(".")[0]


def module(path):
    """The name by which a source file is imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def imported(path):
    """Modules of this repository that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(inner or {node.module})
    return {name for name in found if name in MODULES}


def test_the_root_is_the_card():
    """The seven files of the card, and hubconf.py if there is one."""
    assert {path.stem for path in ROOT.glob("*.py")} - {"hubconf"} == CARD
    assert {room(name) for name in MODULES} <= set().union(*LEVELS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    """From the tools down to the rules; rooms side by side do not know each other."""
    rank = {room: i for i, level in enumerate(LEVELS) for room in level}
    for other in imported(MODULES[name]):
        assert room(other) == room(name) or rank[room(other)] > rank[room(name)], other


def test_no_imports_run_in_a_circle():
    """Within a room neither: take away what imports nothing that is left, and nothing remains."""
    left = {name: imported(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@NAMES
def test_lines_and_functions_are_short(path):
    """100 columns, 60 lines of a function; 450 of a source file."""
    lines = path.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    assert path not in SOURCES or len(lines) <= 450
    long = [node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno >= 60]
    assert long == []


@NAMES
def test_references_are_alive(path):
    """Nothing cites, or reads, what is not in the repository."""
    text = path.read_text()
    if path.name != Path(__file__).name:
        assert not (found := DEAD.search(text)), found
    for cited in CITED.findall(text):
        assert (ROOT / cited).is_file(), cited


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_text_is_utf8_everywhere(path):
    """Without an encoding, files are read and written in whatever a Windows console prefers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node.func, "attr", getattr(node.func, "id", "")) \
            if isinstance(node, ast.Call) else ""
        words = [a.value for a in getattr(node, "args", ()) if isinstance(a, ast.Constant)] \
            if name in ("open", "read_text", "write_text") else []
        binary = any(isinstance(w, str) and "b" in w and len(w) <= 3 for w in words)
        if name in ("read_text", "write_text") or name == "open" and "a" in words:
            assert binary or any(k.arg == "encoding" for k in node.keywords) \
                or len(node.args) > 1, f"{path.name}:{node.lineno}"
