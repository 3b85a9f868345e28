"""Several processes for one function: an ordered map over a stream, with bounded memory.

The processes are plain ones and not `multiprocessing`'s, which either fork, unsafe beside the
threads of torch, or import the main script, and torch with it, in every worker. These import only
the module of the function they are given, and they end when the main process does, however it
ends.
"""

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from minillm.errors import InputError


def map_in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`function(item)` for each item, in order, worked out by `workers` processes.

    One thread for each process hands it an item and waits; at most two items or results a process
    are in memory. The function (at the start, once) and the items travel by pickle. InputError if
    a process dies; what it says of a failure is on stderr.
    """
    idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
    processes = [_start() for _ in range(workers)]
    threads = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for process in processes:
            _send(process.stdin, function)
            idle.put(process)
        for item in items:
            pending.append(threads.submit(_ask, idle, item))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except (EOFError, OSError, pickle.UnpicklingError):
        raise InputError("a worker process died (no memory?): use fewer workers") from None
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _start() -> subprocess.Popen:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import minillm.fast.workers as w; w._serve()"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    # A session of its own, so that Ctrl-C reaches the main process only.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def _serve() -> None:
    """What a worker runs: reads the function, then answers items until its input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # a print must not mix with the answers
    with suppress(EOFError):
        function = pickle.load(sys.stdin.buffer)
        while True:
            _send(answers, function(pickle.load(sys.stdin.buffer)))


def _ask(idle: "SimpleQueue[subprocess.Popen]", item: Any) -> Any:
    process = idle.get()
    try:
        _send(process.stdin, item)
        answers: Any = process.stdout
        return pickle.load(answers)
    finally:
        idle.put(process)


def _send(stream: Any, message: Any) -> None:
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()
