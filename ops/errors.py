"""The exceptions that a user can cause, and how every command reports them."""
import errno
import json
import sys
from pathlib import Path

from safetensors import SafetensorError


def printable(text: str) -> str:
    """One line that can be printed and written as UTF-8 anywhere: control characters, line breaks
    and bytes of a file name that are no UTF-8 are escaped.
    """
    text = " ".join(str(text).splitlines())
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class InputError(ValueError):
    """Something given to the program is wrong: a file, a value, a combination of flags.

    The message is one line that names the file or flag, the value found and what would be right.
    """

    def __init__(self, message: str):
        lines = str(message).splitlines()
        if lines and lines[0].startswith("Caught InputError in"):  # by a data-loader worker, which
            message = lines[-1].removeprefix(f"{__name__}.InputError: ")  # adds its traceback
        super().__init__(printable(message))


def run_command(command) -> None:
    """Run `command()`; what a user can cause becomes one line on stderr and an exit code.

    2: InputError, a file name that is too long.  1: a value that is not finite, memory, or the disk
    (full, not writable).  130: Ctrl-C.
    """
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # consoles that know fewer letters
        command()
    except InputError as error:
        fail(error, 2)
    except (FloatingPointError, OSError, SafetensorError) as error:  # the last: of a full disk
        fail(error, 2 if getattr(error, "errno", None) == errno.ENAMETOOLONG else 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        fail(f"out of memory {error}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(error, code: int) -> None:
    """End the program with one line."""
    message = (str(error).strip() or type(error).__name__).splitlines()[-1]
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(code) from None


def read_json(path: str | Path):
    """What a JSON file holds; InputError naming it if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors add a mark
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_object(path: str | Path) -> dict:
    """The same, of a file that holds one object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object {{...}}")
    return values
