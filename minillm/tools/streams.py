"""The standard streams: there for every script, and never commanding a terminal in the words of others."""

import io
import os
import sys
from contextlib import suppress
from typing import Any


def printable(text: str, kept: str = "\n\t") -> str:
    """Without control characters: text of others must command neither a terminal nor a page."""
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


class PrintableStream:
    """A stream on which names, messages and a model's output are made printable, whoever prints them."""

    def __init__(self, stream: Any, kept: str = "\n\t", ignored: tuple[type[Exception], ...] = ()) -> None:
        """`kept` are control characters that pass, `ignored` the failures of a stream that end no script."""
        self.stream, self.kept, self.ignored = stream, kept, ignored

    def write(self, text: str) -> int:
        with suppress(*self.ignored):
            self.stream.write(printable(text, self.kept))
        return len(text)

    def flush(self) -> None:
        with suppress(*self.ignored):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


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
