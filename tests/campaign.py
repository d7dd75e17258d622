"""Corrupted inputs and kills without end: what becomes of them, in one table.

    python tests/campaign.py --minutes 60 --seed 0

A command, not part of the test suite (test_campaign.py runs a short form).  Cases are drawn from
the seed: another seed, other cases.  Each kind runs in forked workers with a limit of 20 seconds
per case, so that a crash and a hang are seen; NOTES of what failed or was wrong follow the table.

    clean      one line: InputError, or FloatingPointError
    failed     any other exception, a crash, a hang
    harmless   accepted, and the same as the good file
    payload    accepted with other values, which nobody can see without a checksum
    wrong      accepted although a check could tell, see each kind
"""
import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from multiprocessing import Pipe, get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import campaign_cases as cases
import campaign_data as sets
import campaign_kills as kills
import numpy as np
import torch

from ops.errors import InputError
from weights.files import read_tensors

LIMIT = 20  # seconds that a case may take; a whole command 60, most of which it starts
MEMORY = 12 << 30  # bytes that a worker may map
KINDS = {  # name -> (setup, case, share of the time)
    "model.safetensors, bytes": (cases.run_setup, cases.model_bytes, 2),
    "model.safetensors, well-formed": (cases.run_setup, cases.model_tensors, 3),
    "optimizer.safetensors, bytes": (cases.run_setup, cases.moments_bytes, 2),
    "optimizer.safetensors, well-formed": (cases.run_setup, cases.moments_tensors, 3),
    "config.json": (cases.run_setup, cases.config_json, 3),
    "recipe.json": (cases.run_setup, cases.recipe_json, 3),
    "state.json": (cases.run_setup, cases.state_json, 2),
    "metrics.jsonl, torn": (cases.run_setup, cases.torn_log, 0.1),
    "authors' file, bytes": (cases.official_setup, cases.official_bytes, 3),
    "authors' file, well-formed": (cases.official_setup, cases.official_tensors, 3),
    "hostile pickles": (cases.official_setup, cases.hostile_pickle, 1.5),
    "Hugging Face config.json": (cases.sd_setup, cases.hf_config, 2),
    "LDM file, bytes": (cases.sd_setup, cases.ldm_bytes, 2),
    "LDM file, well-formed": (cases.sd_setup, cases.ldm_tensors, 2),
    "images": (sets.pictures_setup, sets.images, 1),
    "images, EXIF": (sets.pictures_setup, sets.exif, 1),
    "labels": (sets.pictures_setup, sets.labels, 0.5),
    "depth maps": (sets.pictures_setup, sets.depths, 0.5),
    "COCO": (sets.people_setup, sets.coco_json, 0.7),
    "boxes": (sets.people_setup, sets.boxes_json, 0.3),
    "list files": (sets.people_setup, sets.list_file, 0.2),
    "classes.txt": (sets.people_setup, sets.class_names, 0.2),
    "flags of train.py": (cases.run_setup, sets.train_flags, 6),
    "flags of eval.py": (sets.eval_setup, sets.eval_flags, 4),
    "whole commands": (sets.whole_setup, sets.whole_command, 4),
}
COLUMNS = ("clean", "failed", "same", "payload", "wrong")


def main() -> None:
    """Inputs, headers, kills; each for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    campaign(args.minutes * 60, args.seed, args.workers, args.only)


def campaign(seconds: float, seed: int, workers: int, only: str = "") -> int:
    """Print the table; returns how many cases failed or were wrong."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base, prefix="campaign-") as folder:
        chosen = {name: kind for name, kind in KINDS.items() if only in name}
        notes = run_inputs(chosen, seconds * 0.5 if not only else seconds, seed, workers,
                           Path(folder))
        found = {name: counts for name, (counts, _) in notes.items()}
        show(found, notes)
        bad = sum(counts["failed"] + counts["wrong"] for counts in found.values())
        return bad + (0 if only else run_headers(seconds * 0.1, seed, Path(folder))
                      + run_kills(seconds * 0.4, seed, Path(folder)))


def show(found: dict, notes: dict) -> None:
    """The table of the inputs, then what failed or was wrong."""
    print(f"{'kind':36}{'cases':>8}" + "".join(f"{column:>10}" for column in
                                               ("clean", "failed", "harmless", "payload", "wrong")))
    total = Counter()
    for name, counts in [*found.items(), ("all", total)]:
        row = "".join(f"{counts[column]:10}" for column in COLUMNS)
        print(f"{name:36}{sum(counts.values()):8}{row}")
        total += counts
    for name, (_, lines) in notes.items():
        for line, count in Counter(lines).most_common(12):
            print(f"NOTE {name}: {count} x {line}")
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------
# Workers

def work(pipe, kind: str, seed: int, first: int, until: float, most: int, box) -> None:
    """Cases of one kind from number `first` on, each reported before and after."""
    null = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(null, output)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(box.folder)
    case, number = KINDS[kind][1], first
    while number < first + most and time.monotonic() < until or number == first:
        pipe.send(("start", number))
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), number])
        try:
            verdict, note = case(rng, box)
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__)
                    if "tests" not in f.filename and "site-packages" not in f.filename]
            where = f"{Path((ours or [last])[-1].filename).name}:{(ours or [last])[-1].lineno}"
            verdict, note = "failed", f"{type(error).__name__} at {where}: {str(error)[:100]}"
        pipe.send(("done", number, verdict, note))
        number += 1
    pipe.send(("end", number))


class Worker:
    """A forked process that works on one kind."""

    def __init__(self, kind: str, seed: int, first: int, until: float, most: int, box):
        self.kind, self.until, self.box = kind, until, box
        self.pipe, theirs = Pipe()
        self.number, self.since = first, time.monotonic()
        self.process = get_context("fork").Process(
            target=work, args=(theirs, kind, seed, first, until, most, box))
        self.process.start()
        theirs.close()

    def read(self, counts: Counter, lines: list) -> bool:
        """Take in what it reports; returns whether it goes on."""
        try:
            while self.pipe.poll(0.01):
                message = self.pipe.recv()
                self.number, self.since = message[1], time.monotonic()
                if message[0] == "end":
                    return self.stop()
                if message[0] == "done":
                    self.number += 1
                    counts[message[2]] += 1
                    if message[2] in ("failed", "wrong"):
                        lines.append(f"{message[2]} {message[3][:200]} [{message[1]}]"
                                     if message[2] == "wrong" else message[3][:200])
        except EOFError:
            self.process.join()
            return self.fail(counts, lines, f"crash, exit {self.process.exitcode}")
        if time.monotonic() - self.since > (60 if self.kind == "whole commands" else LIMIT):
            return self.fail(counts, lines, f"too slow [{self.number}]")
        return True

    def fail(self, counts: Counter, lines: list, why: str) -> bool:
        """The case at work ended the worker."""
        counts["failed"] += 1
        lines.append(why)
        self.number += 1
        return self.stop()

    def stop(self) -> bool:
        """End it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return False


def prepared(kinds: dict, folder: Path) -> dict:
    """Kind -> a Box of its own, made once per setup and copied."""
    made, boxes = {}, {}
    for number, (name, (setup, _, _)) in enumerate(kinds.items()):
        if setup not in made:
            first = folder / f"first-{number}"
            first.mkdir()
            with contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()):
                made[setup] = setup(first)
        boxes[name] = made[setup]._replace(folder=folder / str(number))
        shutil.copytree(made[setup].folder, boxes[name].folder)
    return boxes


def run_inputs(kinds: dict, seconds: float, seed: int, workers: int, folder: Path,
               most: int = 1 << 40) -> dict:
    """Kind -> (Counter of verdicts, notes); as many cases as the seconds allow, or `most`."""
    found = {name: (Counter(), []) for name in kinds}
    parts = sum(share for _, _, share in kinds.values())
    waiting, running, ready = list(kinds), [], prepared(kinds, folder)
    while waiting or running:
        while waiting and len(running) < workers:
            kind = waiting.pop(0)
            until = time.monotonic() + seconds * workers * kinds[kind][2] / parts
            running.append(Worker(kind, seed, 0, until, most, ready[kind]))
        for worker in list(running):
            if worker.read(*found[worker.kind]):
                continue
            running.remove(worker)
            done = sum(found[worker.kind][0].values())
            if time.monotonic() < worker.until and done < most:      # it crashed: the next cases
                running.append(Worker(worker.kind, seed, worker.number, worker.until, most - done,
                                      worker.box))
    return found


# ------------------------------------------------------------------------------------------------
# Headers of safetensors files

SIZES = {"F32": 4, "I64": 8, "F16": 2, "U8": 1}
TEMPLATE = {"a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
            "c": {"dtype": "F16", "shape": [2, 0], "data_offsets": [32, 32]},
            "d": {"dtype": "U8", "shape": [4, 1, 2], "data_offsets": [32, 40]}}
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16", torch.uint8: "U8"}


def table_of(raw: bytes) -> dict | None:
    """Name -> (dtype, shape, bytes) of a safetensors file, by its specification; None if it is not
    one of the four types above.
    """
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    table, data = {}, raw[8 + size:]
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in SIZES:
            return None
        assert end - begin == SIZES[entry["dtype"]] * int(np.prod(entry["shape"], dtype=object))
        table[name] = entry["dtype"], tuple(entry["shape"]), data[begin:end]
    return table


def draw_header(rng) -> bytes:
    """A header with something wrong: of its bytes, or of its JSON."""
    if rng.random() < 0.5:
        raw = cases.corrupt(json.dumps(TEMPLATE).encode(), rng)
    else:
        raw = cases.mutate(TEMPLATE, rng)[0].encode("utf-8", "surrogatepass")
    size = len(raw) if rng.random() < 0.9 else int(rng.integers(1 << 8))
    return struct.pack("<Q", size if rng.random() < 0.99 else int(rng.integers(1 << 62))) + raw


def headers(pipe, seed: int, until: float, most: int, path: Path) -> None:
    """Read mutated headers until the time is over; reports counts."""
    rng, counts, data = np.random.default_rng([seed, 9]), Counter(), bytes(range(40))
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    while time.monotonic() < until and counts.total() < most:
        raw = draw_header(rng) + data
        os.ftruncate(handle, 0)
        os.pwrite(handle, raw, 0)
        try:
            found = read_tensors(path)
        except InputError:
            counts["clean"] += 1
            continue
        except Exception as error:
            counts["failed"] += 1
            pipe.send((None, f"{type(error).__name__}: {error}"))
            continue
        try:
            table = table_of(raw)
            same = table is None or table == {
                name: (DTYPES[t.dtype], tuple(t.shape), t.contiguous().numpy().tobytes())
                for name, t in found.items()}
        except Exception as error:
            same = False
            pipe.send((None, f"{type(error).__name__}: {error}: {raw[:200]!r}"))
        counts["as written" if same else "wrong"] += 1
        del found
    pipe.send((counts, ""))


def run_headers(seconds: float, seed: int, folder: Path, most: int = 1 << 40) -> int:
    """Print what became of the headers; returns how many failed or were wrong."""
    until, running, total, notes = time.monotonic() + seconds, [], Counter(), []
    for i in range(2):
        pipe, theirs = Pipe()
        process = get_context("fork").Process(target=headers, args=(
            theirs, 2 * seed + i, until, most, folder / f"header{i}"))
        process.start()
        theirs.close()
        running.append((process, pipe))
    for process, pipe in running:
        try:
            while True:
                counts, note = pipe.recv()
                notes += [note] if note else []
                total += counts or Counter()
        except EOFError:
            process.join()
            total["failed"] += process.exitcode != 0
    print(f"\nsafetensors headers: {total.total()}, {dict(total)}")
    for note, count in Counter(notes).most_common(5):
        print(f"NOTE headers: {count} x {note[:300]}")
    return total["failed"] + total["wrong"]


# ------------------------------------------------------------------------------------------------
# Kills

def run_kills(seconds: float, seed: int, folder: Path) -> int:
    """Print what the kills lost; returns in how many cases something was."""
    rng, bad = np.random.default_rng([seed, 7]), 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, work, share in (("before every file operation", kills.every_kill, 0),
                              ("pairs of them", kills.every_pair, 0.45),
                              ("random, small run", kills.random_kills, 0.15),
                              ("random, train.py's", kills.real_kills, 0.3),
                              ("full disk", kills.full_disk, 0.1)):
        result, until = kills.Kills(), time.monotonic() + seconds * share
        work(folder, result, until, rng) if share else work(folder, result)
        print(f"kills, {name:30}{result.cases:8} cases{result.wrong:6} lost or different")
        for note in result.notes[:8]:
            print(f"NOTE {note[:400]}")
        sys.stdout.flush()
        bad += result.wrong
    return bad


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
