"""Where text comes from: files, folders, globs and the little world, each a stream of documents.

    text files ──► Source(name, weight, documents)    then corpus.py: documents ──► tokens

A text is one document, or several with <|endoftext|> between them; a record (files.py) is a document, by
its field "text" or "content", or --field.

One document at a time is in memory: text longer than `DOCUMENT_LIMIT` characters becomes several documents,
each cut after a newline. Documents are encoded one by one and none attends to another, so no token depends
on where another document was cut. Left out: cleaning of text.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from minillm.corpus import Source
from minillm.data import Skipped
from minillm.digest import digest, digest_of
from minillm.errors import InputError
from minillm.io.files import (
    BLOCK,
    KINDS,
    RECORD_EXTENSIONS,
    UNNAMED,
    Reading,
    counting,
    extension_of,
    kind_of,
    list_files,
    open_text,
    parse_specs,
    records,
    unpacked,
)
from minillm.tokenizer import ENDOFTEXT
from minillm.world import SHARES, World

EXTENSIONS = (".txt", ".md", ".py", *RECORD_EXTENSIONS)
"""What is read of a folder. A file given by name or glob may have any name."""
DOCUMENT_LIMIT = 4 * 2**20  # characters; longer than War and Peace: only dumps of many texts are cut
SEPARATOR = re.compile(rf"{re.escape(ENDOFTEXT)}(?:(?<![\"'`]{re.escape(ENDOFTEXT)})|(?![\"'`]))")
"""Between quotes somebody writes about it. The word stands first: a search for it is thirty times as fast."""


def open_sources(specs: Sequence[str], *how: Any, **named: Any) -> list[Source]:
    """Open data given as text: a path with, if wanted, a name before it and a weight after it; read as a
    `Reading` of the further arguments says.

    `books=../books:0.15`, `code=src:0.045`, `../books`, `a.txt:2`, `notes/**/*.md`. Files of one folder and
    one kind that are given without name and weight, as a shell expands *.txt, are one source.

    A folder is read recursively, in sorted order, links followed, without hidden files; files that do not
    end in one of EXTENSIONS, or cannot be read, are counted in `skipped`. Every byte is read here once, for
    the fingerprint, but only `documents()` meets what is wrong in it.
    """
    read = Reading(*how, **named)
    alike: dict[Any, list[tuple[str, str, float]]] = defaultdict(list)
    for spec, parsed in zip(specs, parse_specs(specs), strict=True):
        path = parsed[1]
        is_bare = spec == path and os.path.isfile(path)
        alike[(os.path.dirname(path), extension_of(path)) if is_bare else spec].append(parsed)
    sources = []
    for (name, path, weight), *others in alike.values():
        if others:
            name = f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}/*{extension_of(path)}"
        sources.append(_open_source(name, [path, *(other for _, other, _ in others)], weight, read))
    return sources


def text_sources(specs: Sequence[str], seed: int, megabytes: float, *how: Any) -> list[Source]:
    """The text that is given, as `open_sources` opens it with `how`, or the little world's."""
    return open_sources(specs, *how) if specs else world_sources(World(seed), megabytes)


def world_sources(world: World, megabytes: float) -> list[Source]:
    """The little world's sources: `megabytes` of text, shared out by what are also the weights."""
    sizes = {name: megabytes * share / sum(SHARES.values()) for name, share in SHARES.items()}
    return [
        Source(n, SHARES[n], partial(world.documents, n, size), digest(world.fingerprint, n, size))
        for n, size in sizes.items()
    ]


def _open_source(name: str, paths: list[str], weight: float, read: Reading) -> Source:
    files, skipped = list_files(name, paths, EXTENSIONS)
    kinds, digests, size = [], [], 0
    for file in files:
        kind = kind_of(file, read)
        kind = "JSON, but neither records, one a line, nor an array of them" if kind == "objects" else kind
        if kind not in KINDS:
            if set(files) <= set(paths):
                raise InputError(f"{file!r}: {kind}; leave it out, or give its --encoding if it is text")
            skipped[f"files left out ({kind})"] += 1
            continue
        kinds.append((file, kind))
        with unpacked(file) as content:
            digests.append((kind, digest_of(iter(partial(content.read, BLOCK), b""))))
            size += content.tell()
    if not kinds:
        raise InputError(f"data source {name!r}: nothing to read in {paths[0]!r} ({'; '.join(skipped)})")
    dropped = Counter[str]()
    fingerprint = digest(vars(read), DOCUMENT_LIMIT, digests)
    documents = partial(_documents, name, kinds, read, dropped)
    return Source(name, weight, documents, fingerprint, size, Skipped(skipped), dropped)


# ---- Files → documents


def _documents(
    name: str, files: list[tuple[str, str]], read: Reading, dropped: Counter[str]
) -> Iterator[str]:
    """One pass over the documents of `files`; counts in `dropped` what it leaves out or replaces."""
    dropped.clear()
    found = False
    for file, kind in files:
        texts = _texts(file, read) if kind == "text" else _fields(file, read, dropped)
        for text in texts:
            if read.errors == "replace" and (count := text.count("\ufffd")):
                dropped["characters U+FFFD, in place of what is not of the encoding"] += count
            if text:
                found = True
                yield text
            else:
                dropped["empty documents"] += 1
    if not found:
        where = f"{files[0][0]!r} and {len(files) - 1} more files"
        raise InputError(f"data source {name!r}: no document with text in {where}; check what they hold")


def _texts(path: str, read: Reading) -> Iterator[str]:
    """The text of a file, or the several between its <|endoftext|>, without the line breaks around them."""
    rest, around = "", ""
    with open_text(path, read) as file:
        while piece := file.read(DOCUMENT_LIMIT):
            *whole, rest = SEPARATOR.split(rest + piece)
            around = "\r\n" if whole else around
            yield from (text.strip(around) for text in whole)
            while len(rest) > DOCUMENT_LIMIT:
                cut = rest.rfind("\n", 0, DOCUMENT_LIMIT) + 1 or DOCUMENT_LIMIT
                yield rest[:cut].strip(around)
                rest = rest[cut:]
    if rest := rest.strip(around):
        yield rest


def _fields(path: str, read: Reading, dropped: Counter[str]) -> Iterator[str]:
    """The texts of a file's records."""
    for place, record in records(path, read, dropped, lambda x: x if isinstance(x, list) and x else [x]):
        with counting(read.errors, dropped, f"{path!r}, {place}"):
            yield _text_of(record, read.field)


def _text_of(record: Any, named: Sequence[str] | None) -> str:
    """The text in a record. Raises ValueError with the reason where there is none."""
    fields = named or ("text", "content")
    record = record if isinstance(record, dict) else {}
    if UNNAMED in record:
        raise ValueError("has more values than the table has columns; put quotes around its text")
    texts = [text for name in fields if isinstance(text := record.get(name), str)]
    if not texts:
        has = f"it has {', '.join(map(str, record))[:100]}" if record else "it is no JSON object"
        raise ValueError(f"no text in a field {' or '.join(map(repr, fields))} ({has}); name it by --field")
    text = next(filter(None, texts), "")
    text.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 can: also a ValueError
    return text
