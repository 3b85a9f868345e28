"""The edge: what a user can cause ends in one line, and an interrupt ends without a traceback.

A bad file, option or folder ends in one line that says what is wrong, where, and what to do about it;
the script prints that line and exits with code 2. So does whatever else the system refuses: a file that
cannot be opened, a full disk, no memory. Every other exception is a bug of ours and keeps its traceback.
"""

import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], Any]


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


# ---- How a script ends


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What `main` runs in: errors in one line with exit code 2, interrupts without a traceback."""
    from minillm.tools.streams import PrintableStream, open_streams

    open_streams()
    stdout: Any = PrintableStream(sys.stdout)
    # A bar is drawn with carriage returns; none that a closed or full stream refuses is worth a run.
    stderr: Any = PrintableStream(sys.stderr, "\n\t\r", (OSError, ValueError))
    with signals(_interrupt), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            try:
                yield
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except BaseException as error:
            if (last := last_words(error)) is None:
                raise
            line, code = last
            if code == 2 and os.environ.get("RANK", "0") != "0":
                # Of torchrun's processes, which meet the same error, the first says it, and torchrun ends the
                # others. One that is still there later has met an error of its own.
                try:
                    time.sleep(PATIENCE)
                except Interrupted:
                    line = ""
            if line:
                print(line, file=sys.stderr)
            try:
                sys.stdout.flush()
            except OSError:  # Python must not try once more at its end
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(code)


def last_words(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code with which a script ends at an exception; None for a bug of ours."""
    match error:
        case InputError():
            return f"error: {' '.join(str(error).split())}", 2
        case BrokenPipeError():  # whoever read the output has gone, as head does
            return "", 141
        case OSError():
            place = error.filename if isinstance(error.filename, str | Path) else "a file or the output"
            return f"error: {place}: {reason_of(error)}; check its permissions and the space there", 2
        case KeyboardInterrupt():
            return "interrupted", 128 + (error.args[0] if error.args else signal.SIGINT)
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            return f"error: not enough memory ({str(error)[:200]}); give smaller numbers", 2
        case RuntimeError() if "by peer" in str(error):  # "Connection closed by peer"
            return "error: another process of this run has ended; see what it says", 2
    return None


PATIENCE = 20.0  # seconds that another process than the first waits before it says an error
NO_MEMORY = re.compile("allocate memory|out of memory|Storage size calculation overflowed")
"""What torch says in its RuntimeErrors."""


@contextmanager
def signals(handler: Handler) -> Iterator[None]:
    """Gives Ctrl-C, SIGTERM and SIGHUP to `handler`; under nohup SIGHUP stays ignored."""
    previous = handle_signals(handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)


def handle_signals(handler: Handler) -> dict[int, Any]:
    """Sets the handler of all three; returns those there were. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return {number: signal.signal(number, handler) for number in numbers}


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)
