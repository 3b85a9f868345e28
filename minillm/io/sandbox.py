"""Chat templates of other people, run in a process of their own: for some seconds, in some memory.

A template is a Jinja program, in the dialect of transformers. Jinja's sandbox keeps it from the system, and
from nothing that takes for ever or all the memory: a single call may, and no signal or thread of Python's can
end that. A process can end itself, also once this one is gone. It starts with the first template, answers a
line of JSON by a line, and ends with its input.
"""

import faulthandler
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from minillm.errors import InputError, reason_of

SECONDS = 10.0
"""For one rendering; the longest conversation takes milliseconds."""
MEMORY = 2**30
"""Bytes of the process, where the system can limit them (not on Windows; macOS does not heed it)."""


class Program:
    """A template, compiled. InputError for what is no Jinja."""

    lock, waiting = threading.Lock(), list[Any]()
    """The process for all templates, while it waits for a question; begun anew where it had to be ended."""

    def __init__(self, source: str) -> None:
        # The clock stands still: a template that writes the time must not change in a conversation.
        self.source, self.now = source, datetime.now().isoformat()
        self.render(None)

    def render(self, variables: dict[str, Any] | None) -> str:
        """What it writes. InputError for whatever it raises, and for too much time or memory."""
        with self.lock:
            text, error = _ask(self.waiting, [self.source, self.now, variables, SECONDS])
        if error is not None:
            what = "the chat template refuses these messages"
            if variables is None:
                what = "tokenizer_config.json: chat_template is not valid Jinja"
            raise InputError(f"{what}: {' '.join(error.split())}")
        return text


def _ask(waiting: list[Any], question: Any) -> tuple[str, str | None]:
    """What was written, and what went wrong if anything did."""
    process = waiting.pop() if waiting else _start()  # until all has gone well: Ctrl-C leaves no answer there
    began = time.monotonic()
    try:
        with suppress(BrokenPipeError):
            _send(process.stdin, question)
        if not (answer := process.stdout.readline()).endswith("\n"):
            late = time.monotonic() > began + SECONDS
            return "", f"takes longer than {SECONDS:g} seconds" if late else "takes too much memory"
        waiting.append(process)
        text, error = json.loads(answer)
        return text, error
    finally:
        if not waiting:
            process.kill()
            process.communicate()


def _start() -> Any:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import minillm.io.sandbox as s; s._serve()"
    # A session of its own, so that Ctrl-C reaches the main process only.
    process: Any = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parents[2])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        encoding="utf-8", errors="surrogatepass", env=os.environ | {"PYTHONIOENCODING": "utf-8:surrogatepass"}
    )  # fmt: skip
    process.stdout.readline()  # when Jinja is imported the time begins
    return process


def _send(stream: Any, message: Any) -> None:
    # Not in ASCII, where two surrogates side by side would be read as one character.
    print(json.dumps(message, ensure_ascii=False), file=stream, flush=True)


# ---- In the process


def _serve() -> None:
    """Answers until the input ends."""
    program = lru_cache(maxsize=16)(_compile)
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    program("", datetime.now().isoformat())
    answers, sys.stdout = sys.stdout, sys.stderr
    _send(answers, "ready")
    for line in sys.stdin:
        text, error = "", None
        try:
            source, now, variables, most = json.loads(line)
            faulthandler.dump_traceback_later(most, exit=True)  # by a thread that needs nothing of Python's
            template = program(source, now)
            text = template.render(variables) if variables is not None else ""
        except Exception as wrong:  # someone's program: whatever it raises is bad input
            error = reason_of(wrong)
        faulthandler.cancel_dump_traceback_later()
        _send(answers, [text, error])


def _compile(source: str, now: str) -> Any:
    """The template as transformers compiles it."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # {% generation %} … {% endgeneration %}, with which some templates mark a reply, writes nothing.
    program = re.sub(r"({%[-+]?\s*(?:end)?)generation\b", r"\1with", source)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    # Jinja's own filter escapes what HTML reads as markup; a model reads no HTML.
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    clock = datetime.fromisoformat(now).strftime
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": clock}
    return environment.from_string(program)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
