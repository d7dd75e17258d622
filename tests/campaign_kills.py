"""The campaign's kills: training ended by SIGKILL anywhere, and continued; full disks.

Each run is a forked child.  A small one does what train.py's loop does, in its order, on three
parameters: a kill before every single file operation, and every pair of kills, take minutes.
"""
import builtins
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from helpers import recipe
from safetensors.torch import load_file, save_file
from torch import nn

import train
from ops.errors import InputError, run_command
from tasks.flags import resolve
from weights import checkpoint
from weights.files import read_tensors
from weights.runs import Log, RunFolder

STEPS = 4


class Three(nn.Module):
    """Three parameters, saved as our models are."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))

    def save_pretrained(self, folder: Path) -> None:
        """config.json and model.safetensors."""
        (folder / "config.json").write_text("{}\n")
        save_file({k: v.detach() for k, v in self.state_dict().items()},
                  folder / "model.safetensors")


def toy_continued(run: Path, model: Three, optimizer) -> checkpoint.State:
    """As train.continued: the newest checkpoint that can be read."""
    folders = checkpoint.find_last(run)
    for folder in folders:
        try:
            state = checkpoint.read_state(folder)
            model.load_state_dict(read_tensors(folder / "model.safetensors"))
            checkpoint.load_optimizer(folder, model, optimizer, state.step)
            return state
        except InputError:
            if folder == folders[-1]:
                raise


def toy_run(run: Path, steps: int, say) -> None:
    """As train.train: start or continue, step, save, validate every second step, save the best."""
    model, state = Three(), checkpoint.State()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    resume = any((run / name).exists() for name in ("last", "last.tmp", "last.previous"))
    try:
        state = toy_continued(run, model, optimizer) if resume else state
    except InputError:
        resume = False                                   # before the first save: from the start
    say("at", state.step)
    with RunFolder(run, resume):
        if not resume:
            checkpoint.write_json(run / "recipe.json", {"steps": steps})
        log = Log(run / "metrics.jsonl", state.step)
        if state.step and state.step % 2 == 0 and state.evaluated < state.step:
            state = toy_validate(run, model, state, log)
        for step in range(state.step, steps):
            ((model.weight * (step + 1)).sum() + model.bias ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            state = checkpoint.State(step + 1, state.best, state.evaluated)
            log.write({"step": state.step, "loss": model.bias.item()})
            checkpoint.save_last(run, model, optimizer, state)
            say("saved", state.step)
            if state.step % 2 == 0:
                state = toy_validate(run, model, state, log)


def toy_validate(run: Path, model: Three, state, log: Log) -> checkpoint.State:
    """As train.validate: the later the better."""
    log.write({"step": state.step, "metric": float(state.step)})
    if state.best is None or state.step > state.best:
        state = checkpoint.State(state.step, float(state.step), state.evaluated)
        checkpoint.save_best(run, model, "card\n")
    state = checkpoint.State(state.step, state.best, state.step)
    checkpoint.write_json(run / "last" / "state.json", vars(state))
    return state


# ------------------------------------------------------------------------------------------------
# Children that die

class Killed(BaseException):
    """What stands for SIGKILL where a process is to go on as its own successor."""


class Watch:
    """Counts the file operations below a folder, and dies before number `end`.

    By SIGKILL; or, if `inside`, by Killed, after which every operation fails until `arm`: whatever
    is still caught or cleaned up then changes no file.  torn: what was written but not yet forced
    to the disk is then cut in half, as a power loss may.
    """

    def __init__(self, folder: Path, inside: bool = False):
        self.folder, self.inside = str(folder), inside
        self.arm(0, False)
        for module, names in ((os, ("rename", "replace", "unlink", "remove", "mkdir", "rmdir",
                                    "fsync", "chmod")), (builtins, ("open",)),
                              (checkpoint, ("save_file",)),
                              (sys.modules[__name__], ("save_file",))):
            for name in names:
                setattr(module, name, self.watched(getattr(module, name), name))
        watched_open = builtins.open                     # pathlib has the builtin's own

        def write_text(path, text, encoding=None):
            with watched_open(path, "w", encoding="utf-8") as file:
                file.write(text)

        Path.open = lambda path, *args, **named: watched_open(path, *args, **named)
        Path.write_text = write_text

    def arm(self, end: int, torn: bool) -> None:
        """Count from the start; die before operation `end`, never if it is 0."""
        self.end, self.torn, self.count, self.dead = end, torn, 0, False
        self.unsafe = set()                              # files written, not yet flushed

    def watched(self, function, name: str):
        """`function`, counted."""
        def call(*args, **named):
            file = str(args[1] if name == "save_file" else args[0])
            mode = str(args[1]) if name == "open" and len(args) > 1 else ""
            changes = name != "open" or "w" in mode or "a" in mode
            if changes and (file.startswith(self.folder) or name == "fsync"
                            or named.get("dir_fd") is not None):
                try:
                    self.operation()
                except Killed:
                    if name == "fsync":                  # whose handle nobody will close
                        os.close(args[0])
                    raise
                if name == "save_file" or "w" in mode:
                    self.unsafe.add(file)
            result = function(*args, **named)
            if name == "fsync":
                self.unsafe.discard(os.readlink(f"/proc/self/fd/{args[0]}"))
            return result
        return call

    def operation(self) -> None:
        """One more is about to happen."""
        self.count += 1
        if self.dead:
            raise Killed
        if self.count != self.end:
            return
        for file in self.unsafe if self.torn else ():
            if os.path.isfile(file):
                os.truncate(file, os.path.getsize(file) // 2)
        self.dead = True
        if self.inside:
            raise Killed
        os.kill(os.getpid(), signal.SIGKILL)


def child(work, folder: Path, end: int = 0, torn: bool = False,
          seconds: float = 120) -> tuple[int, list, int]:
    """(wait status, what it said, file operations) of work(say) in a forked child.

    It dies before file operation number `end`, or after `seconds`.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        for output in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        watch, code = Watch(folder), 1
        watch.arm(end, torn)
        try:
            work(lambda *words: os.write(writer, (json.dumps(words) + "\n").encode()))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            os.write(writer, (json.dumps(["error", f"{type(error).__name__}: {error}"]) + "\n"
                              ).encode())
        finally:
            os.write(writer, (json.dumps(["operations", watch.count]) + "\n").encode())
            os._exit(code if isinstance(code, int) else 1)
    os.close(writer)
    deadline = time.monotonic() + seconds
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        said = [json.loads(line) for line in file.read().splitlines() if line.endswith("]")]
    operations = next((words[1] for words in said if words[0] == "operations"), 0)
    return ended[1], said, operations


def lost(saids: list[list]) -> str:
    """What is wrong with the successive parts of a run, "" if nothing: every part goes on from the
    last save that was over, or a later one.
    """
    saved = 0
    for said in saids:
        for words in said:
            if words[0] == "error":
                return words[1]
            if words[0] == "at" and words[1] < saved:
                return f"saved step {saved}, resumed at {words[1]}"
            if words[0] == "saved":
                saved = words[1]
    return ""


def differs(run: Path, whole: Path) -> str:
    """What differs between a finished run and the uninterrupted one, "" if nothing."""
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"):
        if not (run / name).is_file():
            return f"{name} is missing"
        a, b = load_file(run / name), load_file(whole / name)
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            return f"{name} differs"
    state, wanted = ((x / "last/state.json").read_text() for x in (run, whole))
    left = [p.name for p in run.iterdir() if p.name.endswith(".tmp")]
    return "state.json differs" if state != wanted else f"left {left}" if left else ""


class Kills:
    """Counts of one kind of kill, and the first things that went wrong."""

    def __init__(self):
        self.cases, self.wrong, self.notes = 0, 0, []

    def add(self, problem: str, where: str) -> None:
        """One more."""
        self.cases += 1
        if problem:
            self.wrong += 1
            self.notes.append(f"{where}: {problem}")


def whole_toy(folder: Path) -> tuple[Path, int]:
    """(uninterrupted run, its file operations)."""
    run = folder / "whole"
    shutil.rmtree(run, ignore_errors=True)
    status, said, operations = child(lambda say: toy_run(run, STEPS, say), run)
    assert status == 0, said
    return run, operations


def toy_kills(folder: Path, ends: list, torn: bool, whole: Path) -> str:
    """What goes wrong if the run dies at each of `ends` in turn: numbers of file operations, or
    seconds; then it is run to its end.
    """
    run, saids = folder / "killed", []
    shutil.rmtree(run, ignore_errors=True)
    for end in ends:
        number, seconds = (end, 120) if isinstance(end, int) else (0, end)
        status, said, _ = child(lambda say: toy_run(run, STEPS, say), run, number, torn, seconds)
        saids.append(said)
    status, said, _ = child(lambda say: toy_run(run, STEPS, say), run)
    return lost([*saids, said]) or (f"exit {status}" if status else differs(run, whole))


def every_kill(folder: Path, result: Kills) -> None:
    """Before every file operation, once."""
    whole, operations = whole_toy(folder)
    for end in range(1, operations + 1):
        result.add(toy_kills(folder, [end], end % 2 == 0, whole), f"kill {end}")


def every_pair(folder: Path, result: Kills, until: float, rng) -> None:
    """Every pair of kills, in random order, as far as the time allows; in one forked process, in
    which Killed stands for SIGKILL.
    """
    whole, operations = whole_toy(folder)

    def pairs(say):
        watch, run, count = Watch(folder / "killed", inside=True), folder / "killed", 0
        for i in rng.permutation(operations ** 2).tolist():
            if time.monotonic() > until:
                break
            ends, said, torn = divmod(i, operations), [], bool(rng.random() < 0.5)
            watch.arm(0, False)
            shutil.rmtree(run, ignore_errors=True)
            for end in (ends[0] + 1, ends[1] + 1, 0):
                watch.arm(end, torn)
                try:
                    toy_run(run, STEPS, lambda *words: said.append(words))
                except Killed:
                    pass
                except Exception as error:
                    said.append(("error", f"{type(error).__name__}: {error}"))
            count += 1
            if problem := lost([said]) or differs(run, whole):  # a pipe holds little
                say("pair", ends, torn, problem)
        say("pairs", count)

    for words in child(pairs, folder / "killed", seconds=until - time.monotonic() + 60)[1]:
        if words[0] == "pair":
            result.add(words[3], f"kills {words[1]} torn {words[2]}")
        elif words[0] == "pairs":
            result.cases = words[1]


def random_kills(folder: Path, result: Kills, until: float, rng) -> None:
    """One to four kills at random moments of the small run."""
    start = time.monotonic()
    whole, _ = whole_toy(folder)
    seconds = time.monotonic() - start
    while time.monotonic() < until:
        ends = [float(rng.uniform(0, seconds)) for _ in range(int(rng.integers(1, 5)))]
        result.add(toy_kills(folder, ends, False, whole), f"kills after {ends}")
        result.cases += len(ends) - 1


# ------------------------------------------------------------------------------------------------
# The real thing

def real_run(run: Path, say) -> None:
    """train.train of a tiny recipe, from the start or on; says what was saved."""
    made = recipe(run, "--iterations", 6, "--eval-every", 3, "--save-every", 1, "--val-scenes", 1,
                  "--batch", 2)
    saved = checkpoint.save_last

    def save_and_say(folder, model, optimizer, state, recipe):
        saved(folder, model, optimizer, state, recipe)
        say("saved", state.step)

    checkpoint.save_last = save_and_say                  # in this child only
    resume = any((run / name).exists() for name in ("last", "last.tmp", "last.previous"))
    try:
        folder = checkpoint.find_last(run)[0] if resume else None
    except InputError:
        folder = None
    say("at", checkpoint.read_state(folder).step if folder else 0)
    if folder is not None:
        made = resolve(["--resume", str(run)])[0]
    with RunFolder(run, folder is not None):
        train.train(made, folder is not None)


def real_kills(folder: Path, result: Kills, until: float, rng) -> None:
    """Kills of train.train at random moments and before random file operations."""
    whole, run = folder / "real", folder / "real-killed"
    start = time.monotonic()
    status, said, operations = child(lambda say: real_run(whole, say), whole)
    assert status == 0, said
    seconds = time.monotonic() - start
    while time.monotonic() < until:
        shutil.rmtree(run, ignore_errors=True)
        saids = []
        for _ in range(int(rng.integers(1, 4))):
            end = int(rng.integers(1, operations)) if rng.random() < 0.5 else 0
            status, said, _ = child(lambda say: real_run(run, say), run, end, False,
                                    120 if end else float(rng.uniform(0, seconds)))
            saids.append(said)
        result.cases += len(saids) - 1
        status, said, _ = child(lambda say: real_run(run, say), run)
        result.add(lost([*saids, said]) or (f"exit {status}" if status else differs(run, whole)),
                   f"{[w for s in saids for w in s]}")


def mounted(disk: Path, options: str) -> bool:
    """Whether a file system in memory could be mounted there: only root may."""
    disk.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk],
                          capture_output=True).returncode == 0


def full_disk(folder: Path, result: Kills, until: float, rng) -> None:
    """A disk of a random size, or, for others than root, files of a random size at most; later
    there is space again: one line, nothing torn is left, nothing lost.
    """
    whole, _ = whole_toy(folder)
    disk, small = folder / "disk", shutil.which("mount") is not None
    while time.monotonic() < until:
        pages, limit = int(rng.integers(4, 40)), int(rng.integers(1, 700))
        small = small and mounted(disk, f"size={4 * pages}k")
        run = disk / "run" if small else folder / "killed"
        shutil.rmtree(run, ignore_errors=True)

        def confined(say):
            if not small:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run_command(lambda: toy_run(run, STEPS, say))

        try:
            status, said, _ = child(confined, run)
            torn = [p.name for p in run.glob("*.tmp") if p.is_dir()]
            code = os.waitstatus_to_exitcode(status)
            problem = f"exit {code} {said}" if code not in (0, 1, 2) else f"left {torn}" if torn \
                else ""
            if small:
                mounted(disk, "remount,size=1m")
            status, again, _ = child(lambda say: toy_run(run, STEPS, say), run)
            result.add(problem or lost([said, again]) or differs(run, whole),
                       f"{pages} pages" if small else f"limit {limit}")
        finally:
            if small:
                subprocess.run(["umount", disk], check=True)
