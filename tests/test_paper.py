"""docs/PAPER.md: its lines are the code's, its numbers the recipes', its findings the laboratory's.

    pytest tests/test_paper.py
"""
import ast
import json
import math
import re
from functools import reduce

import pytest
from documents import ROOT, TEXTS, rows_of

from tasks.recipes import RECIPES, lr_factor
from tools.ablate import VARIANTS

ROWS = rows_of(TEXTS[ROOT / "docs" / "PAPER.md"])
SENTENCES = [row for row in ROWS if "code" in row]
NUMBERS = [row for row in ROWS if "field" in row]
CLAIMS = [(row["variant"].strip("`"), row) for row in ROWS if "variant" in row]
OPEN = "not decided yet"


def definitions(path, name):
    """The lines of each function or class of a name in a file, without comments."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if getattr(node, "name", "") == name:
            lines = text.splitlines()[node.lineno - 1:node.end_lineno]
            yield [line.split(" #")[0].strip() for line in lines]


def number(text):
    """The product of the numbers in a cell."""
    return math.prod(map(float, re.findall(r"\d[\d.]*(?:e-?\d+)?", text.replace(",", ""))))


def finding(report, name):
    """What a laboratory's ablation.json has for a variant, in the table's words."""
    row = next((row for row in report["rows"] if row["variant"] == name), None)
    changes = next((v.changes for v in VARIANTS if v.name == name), None)
    if name == "baseline":
        return f"{row['mean']:.3f} ± {row['std']:.3f}" if row["std"] is not None else OPEN
    if changes and all(report.get(field) == value for field, value in changes.items()):
        return "the baseline"
    if row is None or row["interval"] is None:
        return OPEN
    return f"{row['difference']:+.3f} ± {row['interval']:.3f}, {row['verdict']}"


def test_quoted_lines_are_the_codes():
    """Each line beside a sentence of section 3 is a whole line of the function named there."""
    assert {row["§"] for row in SENTENCES} == {"3.1", "3.2.1", "3.2.2", "3.3"}
    for row in SENTENCES:
        file, name = re.fullmatch(r"`(\S+)`, `(\w+)`", row["where"]).groups()
        found, quoted = list(definitions(ROOT / file, name)), re.findall("`(.+?)`", row["code"])
        assert quoted
        assert any(set(quoted) <= set(lines) for lines in found), f"{file}, {name}: {quoted}"


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: f"{row['recipe'][:9]} {row['field']}")
def test_numbers_are_the_recipes(row):
    """Each value of the paper's tables is that of every recipe named beside it."""
    for key in row["recipe"].split(", "):
        recipe = RECIPES[tuple(key.split())]
        value = reduce(getattr, row["field"].strip("`").split("."), recipe)
        if isinstance(value, str):
            assert row["value"].lower() == value
        else:
            assert number(row["value"]) == value


def test_schedules_are_those_of_the_text():
    """Poly is linear after the warm-up; Step divides by ten at the two epochs named."""
    text = {row["value"]: row["what"] for row in NUMBERS if row["field"] == "`schedule`"}
    city, coco = RECIPES["seg", "cityscapes"], RECIPES["pose", "coco"]
    power = int(re.search(r"power of (\d)", text["Poly"])[1])
    assert lr_factor(60_000, city) == pytest.approx(0.25 ** power)
    for epoch in map(int, re.search(r"epochs (\d+) and (\d+)", text["Step"]).groups()):
        step = epoch * coco.iterations // 210
        assert lr_factor(step, coco) == pytest.approx(0.1 * lr_factor(step - 1, coco))


def test_claims_are_the_papers():
    """Every variant of the laboratory has a row, with Table 5's figures where it is there."""
    rows = dict(CLAIMS)
    for v in VARIANTS:
        assert (rows[v.name]["paper, mIoU"], rows[v.name]["paper, RMSE"]) == v.paper, v.name


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_findings_are_the_laboratorys(task):
    """The columns hold what docs/runs/ablation-TASK has, and where it has nothing, say so."""
    path = ROOT / "docs" / "runs" / f"ablation-{task}" / "ablation.json"
    report = json.loads(path.read_text()) if path.is_file() else None
    column = {"seg": "seg, mIoU", "depth": "depth, rmse"}[task]
    wanted = [(name, "-" if name == "-" else finding(report, name) if report else OPEN)
              for name, _ in CLAIMS]
    assert [(name, row[column]) for name, row in CLAIMS] == wanted
