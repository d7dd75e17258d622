"""The folder of a run: held by one process, and its log, metrics.jsonl."""
import json
from pathlib import Path

try:
    import fcntl
except ImportError:                                      # Windows
    fcntl = None

from ops import parallel
from ops.errors import InputError
from weights.checkpoint import LAST, complete, write_text


PLACES = ("best", "last", "pictures", "metrics.jsonl", "recipe.json", "unreadable.txt")  # of a run


class Lock:
    """A folder, made if it is not there, for one process at a time: a second one is told.

    It is removed again if nothing was written into it.  Raises InputError if it can't be written or
    is in use.  `name`: of the file that is locked, for each of several kinds of work.
    """

    def __init__(self, run: Path, name: str = ".lock"):
        self.run, self.path = run, run / name

    def __enter__(self) -> None:
        self.new = [path for path in (self.run, *self.run.parents) if not path.exists()]
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {self.run} can't be written: {error}") from None
        if not lock_file(self.file):
            self.file.close()
            raise InputError(f"{self.run} is in use by another process that writes into it")

    def __exit__(self, *error) -> None:
        self.file.close()                                # also unlocks it
        if self.new and len(list(self.run.iterdir())) == 1:
            self.path.unlink()                           # refused before anything was written
            for path in self.new:
                path.rmdir()


class RunFolder(Lock):
    """The folder of a run of train.py, held by the first of its processes.

    Raises InputError, too, if a new run would overwrite another.
    """

    def __init__(self, run: Path, resume: bool):
        super().__init__(run)
        self.resume = resume

    def __enter__(self) -> None:
        if parallel.rank() > 0:
            return
        kept = [name for name in ("last", "last.previous", "best", "best.previous")
                if (self.run / name).exists()]
        if (kept or complete(self.run / "last.tmp", LAST)) and not self.resume:
            raise InputError(f"--out {self.run} holds a run already: --resume {self.run}, or give "
                             "another folder")
        if (self.run / "settings.json").exists():
            raise InputError(f"--out {self.run} holds a run of tools.pretrain: give another folder")
        for path in self.run.iterdir() if self.run.is_dir() else ():
            place = path.name.removesuffix(".tmp").removesuffix(".previous")
            if place in PLACES and path.is_dir() == place.endswith((".json", ".jsonl", ".txt")):
                raise InputError(f"{path} is in the way: a run writes a file or folder of another "
                                 "kind there; move it")
        super().__enter__()

    def __exit__(self, *error) -> None:
        if parallel.rank() == 0:
            super().__exit__(*error)


def lock_file(file) -> bool:
    """Whether this process now holds the lock of an open file; where there are no locks, True."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                                      # a file system without locks
        return True
    return True


def read_log(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; says how many lines cannot be read, as a kill leaves one."""
    records, lost = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (RecursionError, ValueError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            lost += 1
    if lost:
        print(f"left out   {lost} lines of {path} that are no records (a kill tears the last one)")
    return records


class Log:
    """metrics.jsonl: one line per record; on resuming, records after the checkpoint are dropped.

    The first of several processes writes it.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if parallel.rank() == 0 and path.is_file():
            kept = [record for record in read_log(path) if record["step"] <= step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict) -> None:
        """Append a record."""
        if parallel.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
