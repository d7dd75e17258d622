"""The README keeps its promises: two commands, every deviation listed, flags that exist.

    pytest tests/test_readme.py
"""
import re
from pathlib import Path

import eval as evaluation
import predict
from tasks import recipes
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_there_are_two_set_up_commands_of_one_line_each():
    """One line runs the main job, one line runs the tests."""
    for marker, command in (("run", "python train.py --task seg"), ("test", "python -m pytest")):
        block = re.search(rf"<!-- {marker} command -->\n```\n(.*?)```", README, re.S)[1]
        assert block.count("\n") == 1 and block.strip().endswith(command)
    assert len(re.findall(r"<!-- \w+ command -->", README)) == 2


def test_every_deviation_in_the_code_is_listed():
    """What is marked DEVIATION in a source file has its row in the table of differences."""
    table = README.split("## Differences")[1].split("\n## ")[0]
    rows = {"augment.py": "CutDepth", "city_data.py": "Mapillary", "data.py": "end of an epoch",
            "heads.py": "Lovasz", "pose.py": "half body", "predict.py": "16 windows"}
    marked = {path.name for path in ROOT.glob("*.py") if "DEVIATION" in path.read_text()}
    assert marked == rows.keys()
    assert all(text in table for text in (*rows.values(), "SiLog"))


def test_every_train_command_of_the_readme_parses():
    """The flags of each `python train.py` line exist and give a recipe that passes its checks."""
    lines = re.findall(r"^(?:.*&& )?python train\.py (.*)$", README, re.M)
    assert len(lines) >= 5
    for line in lines:
        arguments = line.split()
        if "--resume" not in arguments:
            recipes.resolve(recipes.parse(arguments))


def test_every_eval_command_of_the_readme_parses(monkeypatch):
    """The flags of each `python eval.py` command exist."""
    commands = re.findall(r"python eval\.py ([^`\n|]*)", README)
    assert len(commands) >= 4
    for command in commands:
        monkeypatch.setattr("sys.argv", ["eval.py", *command.split()])
        args = evaluation.parse()
        if args.official:
            predict.find_protocol(args.task, args.dataset)


def test_quoted_code_is_the_codes():
    """Each block quoted from a file is in that file, line by line."""
    quoted = re.findall(r"<!-- quoted from (\S+) -->\n```python\n(.*?)```", README, re.S)
    assert len(quoted) >= 3
    for name, block in quoted:
        assert block in (ROOT / name).read_text(), f"{name} no longer holds:\n{block}"


def test_links_lead_to_files():
    """Every relative link and picture of the README exists."""
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
