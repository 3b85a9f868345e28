"""How a script ends: an error in one line, an interrupt without a traceback.

Bad input, and whatever else the system refuses (a file that cannot be opened, a full disk, no memory), is one
line on stderr and exit code 2. Every other exception is a bug of ours and keeps its traceback.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from minillm.errors import InputError, Interrupted, reason_of
from minillm.tools.streams import PrintableStream, open_streams

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What `main` runs in: errors in one line with exit code 2, interrupts without a traceback."""
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
