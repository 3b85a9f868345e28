"""The edge: what a user can cause ends in one line, and an interrupt ends without a traceback.

A bad file, option or folder ends in one line that says what is wrong, where, and what to do about it;
the script prints that line and exits with code 2. So does whatever else the system refuses: a file that
cannot be opened anywhere, a full disk behind an output, no memory. Every other exception is a bug of ours
and keeps its traceback.
"""

import io
import os
import signal
import sys
import threading
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
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text: {error.reason}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def printable(text: str) -> str:
    """Without control characters: text of others must command neither a terminal nor a page."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class PrintableStream:
    """A stream on which names, messages and a model's output are made printable, whoever prints them."""

    def __init__(self, stream: Any, kept: str = "") -> None:
        """`kept` are control characters that pass: the carriage return where a bar is drawn."""
        self.stream, self.kept = stream, kept

    def write(self, text: str) -> int:
        """Writes all of a text but its control characters."""
        return self.stream.write("".join(c if c in self.kept else printable(c) for c in text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# ---- How a script ends


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What `main` runs in: errors in one line with exit code 2, interrupts without a traceback."""
    open_streams()
    with (
        signals(_interrupt),
        redirect_stdout(PrintableStream(sys.stdout)),  # type: ignore[type-var]
        redirect_stderr(PrintableStream(sys.stderr, kept="\r")),  # type: ignore[type-var]
    ):
        try:
            try:
                yield
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except InputError as error:
            _end(f"error: {' '.join(str(error).split())}", 2)
        except BrokenPipeError:  # whoever read the output has gone, as head does
            _end("", 141)
        except OSError as error:
            place = error.filename if isinstance(error.filename, str | Path) else "a file or the output"
            _end(f"error: {place}: {reason_of(error)}; check its permissions and the space there", 2)
        except KeyboardInterrupt as stop:
            _end("interrupted", 128 + (stop.args[0] if stop.args else signal.SIGINT))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _end(f"error: not enough memory ({str(error)[:200]}); give smaller numbers", 2)


def open_streams() -> None:
    """Gives a script started without standard streams empty ones, and lets no character stop an output."""
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:  # else the next file opened would receive what libraries print
        handle = os.dup(handle)
    os.close(handle)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the script runs)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def signals(handler: Handler) -> Iterator[None]:
    """Lets `handler` meet Ctrl-C, SIGTERM and SIGHUP; what nohup made deaf to SIGHUP stays so."""
    previous = _handle_signals(handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)


def end_at_interrupts() -> None:
    """For the first lines of a script: importing torch takes seconds, and Ctrl-C then is no defect."""
    open_streams()
    _handle_signals(_leave)


def _handle_signals(handler: Handler) -> dict[int, Any]:
    """Sets the handler of all three; returns those there were. Only the main thread can."""
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    if len(numbers) and signal.getsignal(numbers[2] or signal.SIGINT) is signal.SIG_IGN:
        numbers.pop()
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers if number}


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _end(line: str, code: int) -> NoReturn:
    with suppress(OSError):
        if line:
            print(line, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python must not try once more at its end
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
