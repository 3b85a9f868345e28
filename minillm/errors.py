"""The edge: bad input ends in one line that says what is wrong, where, and what to do about it.

Whoever reads or writes a file does so `with reading(path, hint)` or `writing`; tools/ending.py prints the
line, and ends the script with exit code 2.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, by the number of the signal."""


# What reading a file of somebody else can raise: the system, gzip, text that is no UTF-8 or no JSON, and
# content of another form than expected.
BAD_FILE = (
    OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


@contextmanager
def reading(
    path: Path | str, hint: str, what: str = "read", errors: tuple[type[Exception], ...] = BAD_FILE
) -> Iterator[None]:
    """Where files are read: whatever is wrong with `path` becomes one line that ends in `hint`."""
    try:
        yield
    except errors as error:
        raise InputError(f"{path}: cannot be {what} ({reason_of(error)}); {hint}") from error


def writing(path: Path | str, hint: str) -> Any:
    """Where files are written: what the system refuses, and nothing else, becomes such a line."""
    return reading(path, hint, "written", (OSError,))


def reason_of(error: BaseException) -> str:
    """What an exception says, in words for a line: the system's own where it has some."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text: {error.reason}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
