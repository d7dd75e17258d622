"""Errors: one line on stderr and an exit code, for whatever a user can cause.

    pytest tests/test_errors.py
"""
import pytest
from helpers import refused
from safetensors import SafetensorError

from ops.errors import InputError, printable, read_json, read_object, run_command


def raising(error):
    """A command that ends with this error."""
    def command():
        raise error
    return command


WRAPPED = ("Caught InputError in DataLoader worker process 0.\nOriginal Traceback:\n  File ...\n"
           "ops.errors.InputError: a.png cannot be decoded\n")


@pytest.mark.parametrize("error, code, line", [
    (InputError("--lr 0: too little"), 2, "error: --lr 0: too little\n"),
    (InputError(WRAPPED), 2, "error: a.png cannot be decoded\n"),
    (FloatingPointError("the loss is nan at step 7"), 1, "error: the loss is nan at step 7\n")])
def test_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    """2 for what the user gave, 1 for a loss that is not finite; a worker's traceback goes."""
    assert refused(raising(error), monkeypatch, capsys) == (code, line)


def test_other_errors_keep_their_traceback():
    """A mistake of the program is no mistake of the user; without an error nothing happens."""
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))
    assert run_command(lambda: None) is None


def test_json_files_that_cannot_be_read_are_named(tmp_path):
    """Missing, broken, no text, too deep, a folder."""
    texts = {"broken": b"{", "binary": b"\xff\xfe", "deep": b"[" * 100_000, "empty": b""}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(InputError, match=f"{name} is not valid JSON"):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match="none does not exist"):
        read_json(tmp_path / "none")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(tmp_path)
    for encoding in ("utf-8", "utf-8-sig"):              # the latter: with a byte-order mark
        (tmp_path / "good").write_text('{"a": [1, null]}', encoding=encoding)
        assert read_json(tmp_path / "good") == {"a": [1, None]}


@pytest.mark.parametrize("text, shown", [
    ("a\x1b[31mred", r"a\x1b[31mred"), ("one\ntwo", "one two"), ("caf\udce9.jpg", r"caf\xe9.jpg"),
    ("\ufeff/kitchen", r"\xfeff/kitchen"), ("name\x00", r"name\x00"), ("café €", "café €")])
def test_messages_are_printable(monkeypatch, capsys, text, shown):
    """Terminal escapes, line breaks, NUL and names that are no UTF-8 come escaped, in one line."""
    assert str(InputError(text)) == printable(text) == shown
    assert refused(raising(InputError(text)), monkeypatch, capsys) == (2, f"error: {shown}\n")
    shown.encode()


@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (OSError(36, "File name too long", "x" * 300), 2,
     f"error: [Errno 36] File name too long: '{'x' * 300}'\n"),
    (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
    (SafetensorError("I/O error: No space left"), 1, "error: I/O error: No space left\n"),
    (MemoryError(), 1, "error: out of memory\n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
     "error: out of memory [enforce fail] DefaultCPUAllocator: can't allocate memory: you "
     "tried\n")])
def test_the_machines_limits_are_one_line(monkeypatch, capsys, error, code, line):
    """Ctrl-C, a full disk, memory."""
    assert refused(raising(error), monkeypatch, capsys) == (code, line)


def test_a_file_of_another_value_is_no_object(tmp_path):
    """Where an object is wanted, a list or null is named."""
    for text in ("[]", "null", "3"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match="a.json holds no JSON object"):
            read_object(tmp_path / "a.json")
