"""The one exception that a user can cause, and how every command reports it."""
import sys


class InputError(ValueError):
    """Something given to the program is wrong: a file, a value, a combination of flags.

    The message is one line that names the file or flag, the value found and what would be right.
    """


def run_command(command) -> None:
    """Run `command()`; turn an InputError into one line on stderr and exit code 2."""
    try:
        command()
    except InputError as error:
        # A data-loader worker wraps the message in its traceback: the last line is ours.
        message = str(error).strip().splitlines()[-1]
        print(f"error: {message.removeprefix('errors.InputError: ')}", file=sys.stderr)
        raise SystemExit(2) from None
