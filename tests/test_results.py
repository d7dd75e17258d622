"""docs/RESULTS.md quotes what docs/runs/ holds, the records of its runs.

    pytest tests/test_results.py

A new row: copy a run's metrics.jsonl and recipe.json to docs/runs/NAME (several seeds: to
NAME/seedK), make the recipe's paths relative, link the folder under "record".  Of a laboratory copy
ablation.json to docs/runs/ablation-TASK; tests/test_paper.py prints what PAPER.md then has to say.
"""
import json
import re
import statistics

import pytest
from documents import ROOT, TEXTS, rows_of

from weights.runs import read_log

RUNS = ROOT / "docs" / "runs"
LOGS = sorted(RUNS.rglob("metrics.jsonl"))
FIGURE = re.compile(r"([A-Za-z]\w*(?:@[\d.]+)?) (\d+\.\d+)(?: ± (\d+\.\d+))?"
                    r"(?: \(([\d., ]+)\))?(?: after ([\d,]+) steps)?")
QUOTED = [row for row in rows_of(TEXTS[ROOT / "docs" / "RESULTS.md"])
          if "](runs/" in row.get("record", "")]


def last(record, name):
    """A metric's values in the runs of a folder of docs/runs, after their last steps."""
    return [read_log(path)[-1][name] for path in sorted(record.rglob("metrics.jsonl"))]


def at(record, name, step):
    """The same after an earlier validation."""
    return [found[name] for path in sorted(record.rglob("metrics.jsonl"))
            for found in read_log(path) if found["step"] == step and name in found]


def of_variant(record, name, variant):
    """The same in a laboratory's ablation.json."""
    report = json.loads((record / "ablation.json").read_text())
    assert report["metric"] == name
    values = [row["values"] for row in report["rows"] if row["variant"] == variant]
    return [value for value in values[0].values() if value is not None]


def folder_of(row):
    """docs/runs/NAME of a row."""
    return RUNS / re.search(r"\]\(runs/([^)]+)\)", row["record"])[1]


def texts_in(value):
    """Every text in parsed JSON."""
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return [text for item in inner for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("row", QUOTED, ids=lambda row: re.sub(r"\W+", "-", row["record"]))
def test_quoted_figures_are_the_records(row):
    """A row that links a record quotes its last validation, or that after N steps, to the digits
    shown; of several seeds their mean, standard deviation and, in brackets, the single values.
    """
    record, figures = folder_of(row), FIGURE.findall(row["result"])
    assert figures
    for name, mean, spread, single, step in figures:
        if (record / "ablation.json").is_file():
            values = of_variant(record, name, re.search("`(.+?)`", row["model"])[1])
        else:
            values = at(record, name, int(step.replace(",", ""))) if step else last(record, name)
        digits = len(mean.split(".")[1])
        assert f"{statistics.fmean(values):.{digits}f}" == mean, (name, values)
        assert (len(values) > 1) == bool(spread)
        assert not spread or f"{statistics.stdev(values):.{digits}f}" == spread, (name, values)
        assert not single or [f"{v:.{digits}f}" for v in values] == single.split(", "), values


def test_every_record_is_quoted():
    """docs/runs holds nothing that no row links, and there are rows."""
    assert {folder_of(row) for row in QUOTED} == set(RUNS.iterdir())


@pytest.mark.parametrize("path", LOGS, ids=lambda path: str(path.parent.relative_to(RUNS)))
def test_records_are_whole_runs(path):
    """Each line of a metrics.jsonl is a record of numbers, the last one the validation after the
    recipe's last step; the recipe is beside it.
    """
    records = read_log(path)
    assert len(records) == len(path.read_text().splitlines())
    assert {type(value) for record in records for value in record.values()} <= {int, float}
    recipe = json.loads((path.parent / "recipe.json").read_text())
    assert records[-1]["step"] == recipe["iterations"] and "loss" not in records[-1]
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)


def test_rows_are_about_their_recipes():
    """Task and seeds in the table of times are those of the recipes."""
    rows = [row for row in QUOTED if "seeds" in row]
    assert len(rows) >= 2
    for row in rows:
        recipes = [json.loads(path.read_text()) for path in folder_of(row).rglob("recipe.json")]
        assert {recipe["model"]["task"] for recipe in recipes} == {row["task"]}
        seeds = sorted(recipe["seed"] for recipe in recipes)
        assert ", ".join(map(str, seeds)) == row["seeds"]


@pytest.mark.parametrize("path", sorted(RUNS.rglob("*.json")),
                         ids=lambda path: str(path.relative_to(RUNS)))
def test_records_name_no_place_of_a_machine(path):
    """No text in a recipe or report is an absolute path, or one out of the repository."""
    found = [text for text in texts_in(json.loads(path.read_text()))
             if re.match(r"[/~\\]|[A-Za-z]:|\.\.", text)]
    assert found == []
