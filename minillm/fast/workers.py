"""Encoding in several processes: an ordered map over a stream, with bounded memory.

The processes are plain ones and not those of `multiprocessing` or `concurrent.futures`, which either fork,
unsafe beside the threads of torch, or import the main script, and torch with it, in every worker. These
import only the module of the function they are given, and end when the main process does, however it ends.
"""

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from minillm.errors import InputError
from minillm.tokenizer import Tokenizer

BATCH_LENGTH = 1 << 20  # characters that go to a worker process at a time


def encode_in_processes(tokenizer: Tokenizer, texts: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """What `tokenizer.encode_documents` gives, of more than one batch by `workers` processes."""
    batches = _batches(texts)
    head = list(islice(batches, 2))
    run: Any = map if len(head) < 2 else partial(map_in_processes, workers=workers)
    yield from chain.from_iterable(run(partial(_encode, tokenizer), chain(head, batches)))


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return list(tokenizer.encode_documents(texts))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of BATCH_LENGTH characters together, or a little more."""
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def map_in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`function(item)` for each item, in order, worked out by `workers` processes in turn, each with one item
    or result at a time. The function (at the start, once) and the items travel by pickle. InputError if a
    process dies; what it says of a failure is on stderr."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import minillm.fast.workers as w; w._serve()"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # A session of its own, so that Ctrl-C reaches the main process only.
    processes: Any = [subprocess.Popen(command, start_new_session=True, **pipes) for _ in range(workers)]
    pending = deque[Any]()  # processes that have an item, the one with the earliest first
    try:
        for process in processes:
            _send(process.stdin, function)
        for number, item in enumerate(items):
            answers = [pickle.load(pending.popleft().stdout)] if number >= workers else []
            pending.append(processes[number % workers])
            _send(pending[-1].stdin, item)
            yield from answers
        while pending:
            yield pickle.load(pending.popleft().stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        raise InputError("a worker process died (no memory?): use fewer workers") from None
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def _serve() -> None:
    """What a worker runs: reads the function, then answers items until its input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # a print must not mix with the answers
    with suppress(EOFError):
        function = pickle.load(sys.stdin.buffer)
        while True:
            _send(answers, function(pickle.load(sys.stdin.buffer)))


def _send(stream: Any, message: Any) -> None:
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()
