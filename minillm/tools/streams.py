"""Text on its way out: standard streams that are there for every script, a reply as its tokens come, tables
of words, templates, columns.

Whatever is written of a text of others is made printable, and on a page escaped, so that it is shown and
never obeyed.
"""

import codecs
import io
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from html import unescape
from pathlib import Path
from typing import Any


def stream_text(decode_bytes: Callable[[list[int]], bytes], tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as tokens come, holding back bytes until they make whole characters.

    `decode_bytes` is the tokenizer's. The pieces join to the text of all tokens decoded at once,
    with U+FFFD for bytes that are not UTF-8.
    """
    return codecs.iterdecode((decode_bytes([token]) for token in tokens), "utf-8", errors="replace")


def printable(text: str, kept: str = "\n\t") -> str:
    """Without control characters: text of others must command neither a terminal nor a page."""
    text = text.replace("\r\n", "\n")  # as a model writes that has learned it from a text
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


def tables(module: str) -> dict[str, Any]:
    """The words and tables of a module, in the TOML file of its name beside it."""
    return tomllib.loads(Path(module).with_suffix(".toml").read_text(encoding="utf-8"))


def render(template: Path, content: Mapping[str, Any], **helpers: Any) -> str:
    """A template filled in; text, unless its name says that it is HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    made = environment.get_template(template.name).render(content, **helpers)
    return made if ".html." in template.name else unescape(made)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells below one another, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
