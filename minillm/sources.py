"""Where text comes from: files, folders, globs and the little world, each a stream of documents.

    text files ──► Source(name, weight, documents)    then data.py: documents ──► tokens ──► batches

A text file is one document; a line of a .jsonl file is one document (its field "text" or
"content"). One document at a time is in memory: a text file longer than `DOCUMENT_LIMIT` bytes
becomes several documents, each cut after a newline. Documents are encoded one by one and none
attends to another, so no token depends on where another document was cut.

Left out: other formats (make .txt or .jsonl of them first), downloads, cleaning of text.
"""

import glob
import hashlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from gzip import BadGzipFile, GzipFile
from io import BufferedIOBase
from typing import Any, Literal, TypeVar

from minillm.errors import InputError
from minillm.world import SHARES, World

EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")
DOCUMENT_LIMIT = 8 * 2**20  # bytes; longer than any novel, so that only dumps of many texts are cut

Errors = Literal["strict", "replace"]
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A named stream of documents with a weight in the mixture.

    `documents()` starts a new pass, over the same documents in the same order each time.
    `fingerprint` is a digest of their content. `skipped` counts what was left out, by reason: files
    when the source was opened, documents and lines in the latest pass.
    """

    name: str
    weight: float
    documents: Callable[[], Iterator[str]]
    fingerprint: str
    skipped: Counter[str] = field(default_factory=Counter)


def open_sources(specs: Sequence[str], errors: Errors = "strict") -> list[Source]:
    """Open data given as text: a path with, if wanted, a name before it and a weight after it.

    `books=../books:0.15`, `code=src:0.045`, `../books`, `a.txt:2`, `notes/**/*.md`. The weight is 1
    unless given, whatever the size; the name is the path's last component. A path may itself hold
    '=' and ':': of all readings the most literal one that exists on disk is taken.

    A folder is read recursively, in sorted order, without hidden files; files that do not end in
    one of EXTENSIONS are counted in `skipped`. A file given by itself is read whatever its name.
    `errors="replace"` reads invalid UTF-8 as U+FFFD, and skips and counts lines of .jsonl that do
    not parse. Every byte is read here once, for the fingerprint.

    Raises InputError for specs and files that are wrong; what only decoding can show (invalid
    UTF-8, a bad line) is raised by `documents()`.
    """
    return [_open_source(name, path, weight, errors) for name, path, weight in parse_specs(specs)]


def world_sources(world: World, megabytes: float) -> list[Source]:
    """The little world's sources: `megabytes` of text, shared out by what are also the weights."""
    sources = []
    for name, share in SHARES.items():
        size = megabytes * share / sum(SHARES.values())
        fingerprint = digest(world.fingerprint, name, repr(size))
        sources.append(Source(name, share, partial(world.documents, name, size), fingerprint))
    return sources


# ---- What the user wrote -> name, path, weight


def parse_specs(specs: Sequence[str]) -> list[tuple[str, str, float]]:
    """The name, path and weight of each spec (see `open_sources`). Raises InputError for wrong ones."""
    if not specs:
        raise InputError("no data given: name a file or folder, as in books=../books:0.15")
    parsed = [_parse(spec) for spec in specs]
    check_names(name for name, _, _ in parsed)
    return parsed


def check_names(names: Iterable[str]) -> None:
    """Raises InputError where two sources have one name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{count} data sources are named {name!r}: name them apart, as in other=PATH")


def _parse(spec: str) -> tuple[str, str, float]:
    """The name, path and weight that `spec` means: its most literal reading that exists on disk."""
    readings = _readings(spec)
    for name, path, weight in readings:
        if os.path.exists(path) or _matches(path):
            name = name or os.path.basename(os.path.abspath(path)) or path
            return name, path, _weight(weight, spec)
    path = min((path for _, path, _ in readings), key=len)
    what = "no file matches" if glob.has_magic(path) else "no such file or folder:"
    raise InputError(f"data source {spec!r}: {what} {path!r}; check the path")


def _readings(spec: str) -> list[tuple[str, str, str]]:
    """The ways to read `spec` as [name=]path[:weight], from the most literal to the least."""
    name, _, path = spec.partition("=")
    named = [(name, path)] if name and path and "/" not in name else []
    whole = [(name, path, "1") for name, path in [("", spec), *named]]
    weighted = [(name, *path.rpartition(":")[::2]) for name, path, _ in whole if ":" in path]
    return [(name, os.path.expanduser(path), weight) for name, path, weight in whole + weighted]


def _matches(path: str) -> list[str]:
    return glob.glob(path, recursive=True) if glob.has_magic(path) else []


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"data source {spec!r}: weight {text!r} is not a positive number, as in books:0.15")
    return weight


# ---- A path -> the files to read


def _open_source(name: str, path: str, weight: float, errors: Errors) -> Source:
    files, skipped = list_files(name, path, EXTENSIONS)
    digests = [_digest_file(file) + str(_is_jsonl(file)) for file in files]
    fingerprint = digest(errors, str(DOCUMENT_LIMIT), *digests)
    return Source(name, weight, partial(_documents, name, files, errors, skipped), fingerprint, skipped)


def list_files(name: str, path: str, extensions: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """The files to read under `path`, sorted, and a count of those left out, by reason.

    Raises InputError, for the source `name`, where there are none.
    """
    skipped = Counter[str]()
    if os.path.isfile(path):
        found = [path]
    else:
        tops = [path] if os.path.exists(path) else _matches(path)
        every = {file for top in tops for file in _walk(top)}
        # A pipe or device would block, or differ at the second reading.
        wanted = [file for file in every if file.lower().endswith(extensions) and os.path.isfile(file)]
        found = sorted(wanted, key=lambda file: file.split(os.sep))
        skipped["files of another kind"] = len(every) - len(found)
    files = [file for file in found if os.path.getsize(file)]
    skipped["empty files"] = len(found) - len(files)
    if not files:
        why = ", ".join(f"{what}: {count}" for what, count in (+skipped).items()) or "an empty folder"
        raise InputError(
            f"data source {name!r}: nothing to read in {path!r} ({why}); give {', '.join(extensions)} files"
        )
    return files, +skipped


def _walk(top: str) -> Iterator[str]:
    """Every file under `top` that is not hidden; `top` itself where it is not a folder."""
    if not os.path.isdir(top):
        yield top
        return
    for folder, folders, files in os.walk(top, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename!r}: {error.strerror}; check its permissions") from error


def _is_jsonl(file: str) -> bool:
    return file.lower().endswith((".jsonl", ".jsonl.gz"))


# ---- A file -> documents


def _documents(name: str, files: list[str], errors: Errors, skipped: Counter[str]) -> Iterator[str]:
    """One pass over the documents of `files`; counts in `skipped` what it leaves out."""
    for reason in ("empty documents", "lines that do not parse"):
        skipped.pop(reason, None)
    found = False
    for file in files:
        lines = (text for _, text in json_lines(file, errors, skipped, _json_text))
        for text in lines if _is_jsonl(file) else text_pieces(file, errors):
            if text:
                found = True
                yield text
            else:
                skipped["empty documents"] += 1
    if not found:
        raise InputError(
            f"data source {name!r}: no document with text in {files[0]!r} "
            f"and {len(files) - 1} more files; check what they hold"
        )


def text_pieces(path: str, errors: Errors = "strict", limit: int = DOCUMENT_LIMIT) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of at most `limit` bytes, cut after a newline if any.

    Joined, the pieces are the file without its byte order mark. Raises InputError with the offset
    of invalid UTF-8.
    """
    offset, rest = 0, b""
    with reading(path) as file:
        while raw := rest + file.read(limit - len(rest)):
            cut = _last_cut(raw) if len(raw) == limit else len(raw)
            text = decode(raw[:cut], path, offset, errors)
            yield text if offset else text.removeprefix("\ufeff")
            offset, rest = offset + cut, raw[cut:]


def _last_cut(raw: bytes) -> int:
    """Where to cut `raw`: after its last newline, else before its last character."""
    if newline := raw.rfind(b"\n") + 1:
        return newline
    last = next((i for i in range(1, 5) if raw[-i] & 0xC0 != 0x80), 1)
    return len(raw) - last


def json_lines(
    path: str, errors: Errors, skipped: Counter[str], read: Callable[[str], T]
) -> Iterator[tuple[int, T]]:
    """The number of every line but blank ones and what `read` makes of it.

    A line for which `read` raises ValueError raises InputError, or is counted in `skipped`.
    """
    offset = 0
    with reading(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                if text := decode(line, path, offset, errors).removeprefix("\ufeff").strip():
                    yield number, read(text)
            except ValueError as error:
                if errors == "strict":
                    raise InputError(
                        f"{path!r}, line {number}: {error}; mend it or use --errors replace"
                    ) from error
                skipped["lines that do not parse"] += 1
            offset += len(line)


def _json_text(line: str) -> str:
    """The text in a line of JSON. Raises ValueError with the reason where there is none."""
    record = parse_json(line)
    texts = [record.get(key) for key in ("text", "content")] if isinstance(record, dict) else []
    text = next((text for text in texts if isinstance(text, str)), None)
    if text is None:
        raise ValueError('no text in a field "text" or "content"')
    text.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 can: also a ValueError
    return text


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError, with a short reason, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error


def decode(raw: bytes, path: str, offset: int, errors: Errors) -> str:
    """The text of the bytes from `offset` of a file. Raises InputError for invalid UTF-8."""
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise InputError(
            f"{path!r}: invalid UTF-8 at byte {where}; convert it or use --errors replace"
        ) from error


@contextmanager
def reading(path: str) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked if it ends in .gz; what goes wrong becomes an InputError."""
    try:
        with open(path, "rb") as packed:
            yield GzipFile(fileobj=packed) if path.lower().endswith(".gz") else packed
    except (EOFError, BadGzipFile, zlib.error) as error:
        raise InputError(f"{path!r}: truncated or corrupt gzip; fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path!r}: {error.strerror}; check its permissions") from error


def _digest_file(path: str) -> str:
    """A digest of a file's content, read as a stream. Raises InputError for a binary file."""
    with reading(path) as file:
        if b"\0" in file.read(8192):
            raise InputError(f"{path!r}: binary, not UTF-8 text; leave it out or convert it")
        file.seek(0)
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def digest(*parts: str) -> str:
    """A fingerprint of strings, which keeps them apart."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
