"""The exceptions that a user can cause, and how every command reports them."""
import json
import sys
from pathlib import Path


class InputError(ValueError):
    """Something given to the program is wrong: a file, a value, a combination of flags.

    The message is one line that names the file or flag, the value found and what would be right.
    """


def run_command(command) -> None:
    """Run `command()`; an InputError becomes one line on stderr and exit code 2.

    A loss that is not finite (FloatingPointError) becomes one line and exit code 1.
    """
    try:
        command()
    except (InputError, FloatingPointError) as error:
        # A data-loader worker wraps the message in its traceback: the last line is ours.
        message = str(error).strip().splitlines()[-1]
        message = message.removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None


def read_json(path: str | Path):
    """What a JSON file holds; InputError naming it if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
