"""The one exception for everything a user can cause, and how a script ends on it.

A bad file, option or folder ends in one line that says what is wrong, where, and what to do about it;
the script prints that line and exits with code 2, without a traceback. Every other exception is a bug
of ours and keeps its traceback.
"""

import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


# What reading a file of somebody else can raise: the system, gzip, text that is no UTF-8 or no JSON, and
# content of another form than expected.
BAD_FILE = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@contextmanager
def reading(path: Path | str, hint: str) -> Iterator[None]:
    """The edge where files come in: whatever is wrong with `path` becomes one line that ends in `hint`."""
    try:
        yield
    except BAD_FILE as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); {hint}") from error


@contextmanager
def writing(path: Path | str, hint: str) -> Iterator[None]:
    """The edge where files go out: what the system refuses becomes one line that ends in `hint`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason_of(error)}); {hint}") from error


def reason_of(error: BaseException) -> str:
    """What an exception says, in words for a line: the system's own where it has some."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an InputError into one line on standard error and exit code 2."""
    try:
        yield
    except InputError as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has gone, as head does; Python must not try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def printable(text: str) -> str:
    """Without control characters: what a model says must command neither a terminal nor a page."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
