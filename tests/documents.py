"""README.md and docs/*.md as the tests read them: their texts and the commands in them."""
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SHELLS = ("", "bash", "sh", "shell", "console")  # other languages are no commands
PRINTED = re.compile(r"(step \d+: |best |wrote )")  # first words of a quoted output
STARTS = re.compile(r"(python3?|torchrun|pytest|pip|accelerate|bash|git|hf) \S|--task \w+ --")


def collect(text):
    """Every command of a Markdown text, once, in order.

    Lines of fenced blocks, and inline code that begins like a command or, where `python train.py`
    is left out, with --task.
    """
    found = []
    for block in FENCE.finditer(text):
        if block[1] in SHELLS and not PRINTED.match(block[2]):
            lines = re.sub(r"(^|\s)#.*", "", block[2].replace("\\\n", " "), flags=re.M).splitlines()
            found += [(block.start(), " ".join(line.split())) for line in lines if line.strip()]
    outside = FENCE.sub(lambda block: " " * len(block[0]), text)
    for span in re.finditer(r"`([^`]+)`", outside):
        command = " ".join(span[1].split())
        if STARTS.match(command):
            left_out = "python train.py " if command.startswith("--task") else ""
            found.append((span.start(), left_out + command))
    found.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys(command for _, command in found))


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in collect(text)))


def rows_of(text):
    """Every row of every table of a Markdown text, as {column: cell}."""
    found, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif set(line) - set("|-: "):
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def words_of(command):
    """Its words as `python PROGRAM ...`, without an installation before it."""
    words = shlex.split(re.sub(r"^pip install -r \S+ && ", "", command))
    if words[0] == "torchrun":
        return ["python", "-m", "torch.distributed.run", *words[1:]]
    return ["python", "-m", *words] if words[0] == "pytest" else words


def option(words, flag, default=None):
    """The value after a flag."""
    return words[words.index(flag) + 1] if flag in words else default


def key_of(words):
    """(task, data set) of a command, which also name the run that it writes."""
    run = option(words, "--checkpoint", "")
    if run.startswith("runs/"):
        return tuple(run.removeprefix("runs/").split("-", 1))
    return option(words, "--task", "seg"), option(words, "--dataset", "shapes")


def snippets():
    """Python of the documents that is not quoted from a file."""
    return [block[2] for text in TEXTS.values() for block in FENCE.finditer(text)
            if block[1] == "python" and not text[:block.start()].endswith("-->\n")]
