"""The one exception for everything a user can cause, and how a script ends on it.

A bad file, option or folder ends in one line that says what is wrong, where, and what to do about it;
the script prints that line and exits with code 2, without a traceback. Every other exception is a bug
of ours and keeps its traceback.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an InputError into one line on standard error and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has gone, as head does; Python must not try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
