"""Where text comes from: files, folders, globs and the little world, each a stream of documents.

    text files ──► Source(name, weight, documents)    then data.py: documents ──► tokens ──► batches

What a file is, its content says: text, which is one document, or several with <|endoftext|> between them;
JSON records, one a line or in one array, each a document (its field "text" or "content", or --field); a
table (.csv, .tsv) or a Parquet file, each row a document. All of them may be packed by gzip or zstd.

One document at a time is in memory: text longer than `DOCUMENT_LIMIT` characters becomes several documents,
each cut after a newline. Documents are encoded one by one and none attends to another, so no token depends
on where another document was cut. Left out: other formats, downloads, cleaning of text.
"""

import codecs
import csv
import fnmatch
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from gzip import BadGzipFile, GzipFile
from typing import IO, Any, Literal, TypeVar

from minillm.data import Source, check_names
from minillm.errors import InputError
from minillm.files import digest
from minillm.tokenizer import ENDOFTEXT
from minillm.world import SHARES, World

JSON_EXTENSIONS = (".jsonl", ".ndjson", ".json")
EXTENSIONS = (".txt", ".md", ".py", *JSON_EXTENSIONS, ".csv", ".tsv", ".parquet")
"""What is read of a folder, each also as .gz and .zst. A file given by name or glob may have any name."""
PACKED = (".gz", ".zst")
DOCUMENT_LIMIT = 8 * 2**20  # characters; longer than any novel, so that only dumps of many texts are cut
LINE_LIMIT = 32 * 2**20  # bytes of one record
ARRAY_LIMIT = 256 * 2**20  # bytes of a JSON array, which is held in memory
HEAD = 2**16  # bytes from which a file's kind is told
BLOCK = 2**20

Errors = Literal["strict", "replace"]
T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """How files are read."""

    errors: Errors = "strict"
    """Stop at bytes that are not of the encoding and at records that do not parse, or replace and skip them,
    counting."""
    encoding: str = "utf-8"
    field: str | None = None
    """Of a JSON record or the column of a table; None for "text" or "content"."""

    def __post_init__(self) -> None:
        try:
            codecs.getincrementaldecoder(self.encoding)
        except LookupError:
            raise InputError(
                f"--encoding {self.encoding}: no such encoding; give utf-8, utf-16, gb18030 …"
            ) from None


def open_sources(
    specs: Sequence[str], errors: Errors = "strict", encoding: str = "utf-8", field: str | None = None
) -> list[Source]:
    """Open data given as text: a path with, if wanted, a name before it and a weight after it.

    `books=../books:0.15`, `code=src:0.045`, `../books`, `a.txt:2`, `notes/**/*.md`. The weight is 1
    unless given, whatever the size; the name is the path's last component. A path may itself hold
    '=' and ':': of all readings the most literal one that exists on disk is taken. Files of one folder and
    one kind that are given without name and weight, as a shell expands *.txt, are one source.

    A folder is read recursively, in sorted order, links followed, without hidden files; files that do not
    end in one of EXTENSIONS, or are binary, are counted in `skipped`. Every byte is read here once, for the
    fingerprint.

    Raises InputError for specs and files that are wrong; what only decoding can show is raised by
    `documents()`.
    """
    read = Format(errors, encoding, field)
    parsed = parse_specs(specs)
    bare: dict[tuple[str, str], list[str]] = defaultdict(list)
    for spec, (_, path, _) in zip(specs, parsed, strict=True):
        if spec == path and os.path.isfile(path):
            bare[os.path.dirname(path), _extension(path)].append(path)
    together = {path: (key, paths) for key, paths in bare.items() if len(paths) > 1 for path in paths}
    sources: dict[str, Source] = {}
    for name, path, weight in parsed:
        (folder, extension), paths = together.get(path, (("", ""), [path]))
        if len(paths) > 1:
            name = f"{os.path.basename(os.path.abspath(folder))}/*{extension}"
        if name not in sources or len(paths) == 1:
            sources[name] = _open_source(name, paths, weight, read)
    return list(sources.values())


def world_sources(world: World, megabytes: float) -> list[Source]:
    """The little world's sources: `megabytes` of text, shared out by what are also the weights."""
    sources = []
    for name, share in SHARES.items():
        size = megabytes * share / sum(SHARES.values())
        fingerprint = digest(world.fingerprint, name, size)
        sources.append(Source(name, share, partial(world.documents, name, size), fingerprint))
    return sources


# ---- What the user wrote → name, path, weight


def parse_specs(specs: Sequence[str]) -> list[tuple[str, str, float]]:
    """The name, path and weight of each spec (see `open_sources`). Raises InputError for wrong ones."""
    if not specs:
        raise InputError("no data given: name a file or folder, as in books=../books:0.15")
    parsed = [_parse(spec) for spec in specs]
    check_names(name for name, _, _ in parsed)
    return parsed


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


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"data source {spec!r}: weight {text!r} is not a positive number, as in books:0.15")
    return weight


# ---- A path → the files to read


def list_files(name: str, path: str, extensions: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """The files to read under `path`, sorted, each once, and a count of those left out, by reason.

    A file that is named, or that a glob matches, is read whatever it ends in; of a folder only those with one
    of `extensions`. Raises InputError, for the source `name`, where there are none.
    """
    tops = [path] if os.path.exists(path) else _matches(path)
    asked = {top for top in tops if not os.path.isdir(top)}
    every = {os.path.realpath(file): file for top in reversed(tops) for file in reversed(list(_walk(top)))}
    # A pipe or device would block, or differ at the second reading.
    wanted = [
        f for f in every.values() if (f in asked or f.lower().endswith(extensions)) and os.path.isfile(f)
    ]
    found = sorted(wanted, key=lambda file: file.split(os.sep))
    files = [file for file in found if os.path.getsize(file)]
    kinds = Counter(_extension(file) or "without an extension" for file in {*every.values()} - {*found})
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    skipped = Counter(
        {f"files of another kind ({shown})": kinds.total(), "empty files": len(found) - len(files)}
    )
    if not files:
        why = ", ".join(f"{what}: {count}" for what, count in (+skipped).items()) or "an empty folder"
        raise InputError(
            f"data source {name!r}: nothing to read in {path!r} ({why}); give {', '.join(extensions)} files, "
            "or name others by a glob in quotes, as in 'src/**/*.c'"
        )
    return files, +skipped


def _extension(path: str) -> str:
    stem = path.lower().removesuffix(".gz").removesuffix(".zst")
    return os.path.splitext(stem)[1] + path.lower()[len(stem) :]


def _walk(top: str) -> Iterator[str]:
    """Every file under `top` that is not hidden, each folder once however it is linked; `top` where it is
    none."""
    if not os.path.isdir(top):
        yield top
        return
    seen = set()
    for folder, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        status = os.stat(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (os.path.join(folder, name) for name in sorted(files) if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename!r}: {error.strerror}; check its permissions") from error


def _matches(path: str) -> list[str]:
    """What a glob matches. Its ** are matched here: those of Python follow links round in circles."""
    parts = os.path.normpath(path).split(os.sep)
    if "**" not in parts:
        return sorted(glob.glob(path)) if glob.has_magic(path) else []
    first = parts.index("**")
    tops = glob.glob(os.sep.join(parts[:first]) or (os.sep if path.startswith(os.sep) else os.curdir))
    return [
        file
        for top in sorted(tops)
        for file in _walk(top)
        if _matches_parts(os.path.relpath(file, top).split(os.sep), parts[first:])
    ]


def _matches_parts(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _matches_parts(parts, patterns[1:] or ["*"]) or (
            len(parts) > 1 and _matches_parts(parts[1:], patterns)
        )
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches_parts(parts[1:], patterns[1:])
    )


# ---- Files → a source


def _open_source(name: str, paths: list[str], weight: float, read: Format) -> Source:
    files, skipped = [], Counter[str]()
    for path in paths:
        found, left_out = list_files(name, path, tuple(e + p for e in EXTENSIONS for p in ("", *PACKED)))
        files += found
        skipped += left_out
    kinds, digests, size = [], [], 0
    for file in files:
        kind = _kind(file, read)
        if kind not in READERS:
            if files == paths:
                raise InputError(f"{file!r}: {kind}")
            skipped[f"files left out ({kind})"] += 1
            continue
        file_digest, file_size = _digest_file(file)
        kinds.append((file, kind))
        digests.append((kind, file_digest))
        size += file_size
    if not kinds:
        raise InputError(f"data source {name!r}: nothing to read in {paths[0]!r} ({'; '.join(skipped)})")
    dropped = Counter[str]()
    fingerprint = digest(vars(read), DOCUMENT_LIMIT, digests)
    return Source(
        name, weight, partial(_documents, name, kinds, read, dropped), fingerprint, size, skipped, dropped
    )


def _kind(path: str, read: Format) -> str:
    """Which of READERS reads a file, by its content; else why none does."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    with unpacked(path) as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.count(0) * 256 > len(head) and read.encoding.lower()[:6] not in ("utf-16", "utf-32"):
        return "binary, not text; leave it out, or give --encoding utf-16 if it is that"
    if name.endswith((".csv", ".tsv")):
        return name[-3:]
    named_json, start = name.endswith(JSON_EXTENSIONS), head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"[") and (named_json or start[1:].lstrip()[:1] == b"{"):
        return "array"
    line, newline, _ = start.partition(b"\n")
    whole_record = start.startswith(b"{") and (_is_record(line) or (not newline and len(head) == HEAD))
    if whole_record or name.endswith((".jsonl", ".ndjson")):
        return "lines"
    if named_json:
        return "JSON, but neither records, one a line, nor an array of them; make lines of it"
    return "text"


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _documents(name: str, files: list[tuple[str, str]], read: Format, dropped: Counter[str]) -> Iterator[str]:
    """One pass over the documents of `files`; counts in `dropped` what it leaves out or replaces."""
    dropped.clear()
    found = False
    for file, kind in files:
        for text in READERS[kind](file, read, dropped):
            if read.errors == "replace" and (count := text.count("\ufffd")):
                dropped["characters U+FFFD, in place of what is not of the encoding"] += count
            if text:
                found = True
                yield text
            else:
                dropped["empty documents"] += 1
    if not found:
        raise InputError(
            f"data source {name!r}: no document with text in {files[0][0]!r} "
            f"and {len(files) - 1} more files; check what they hold"
        )


# ---- A file → documents


def text_documents(path: str, read: Format, dropped: Counter[str]) -> Iterator[str]:
    """The text of a file, or the several between its <|endoftext|>, without the line breaks around them."""
    rest, separated = "", False
    for piece in text_pieces(path, read.errors, read.encoding):
        *whole, rest = SEPARATOR.split(rest + piece)
        separated = separated or bool(whole)
        yield from (text.strip("\r\n") for text in whole)
        if not whole:
            yield rest.strip("\r\n") if separated else rest
            rest = ""
    if rest.strip("\r\n"):
        yield rest.strip("\r\n")


SEPARATOR = re.compile(rf"(?<![\"'`]){re.escape(ENDOFTEXT)}|{re.escape(ENDOFTEXT)}(?![\"'`])")
"""Between quotes somebody writes about it."""


def text_pieces(
    path: str, errors: Errors = "strict", encoding: str = "utf-8", limit: int = DOCUMENT_LIMIT
) -> Iterator[str]:
    """The text of a file in pieces of at most `limit` characters, cut after a newline if any.

    Joined, the pieces are the file without its byte order mark. Raises InputError with the offset
    of bytes that are not of the encoding.
    """
    decoder, rest, offset = codecs.getincrementaldecoder(encoding)(errors), "", 0
    with unpacked(path) as file:
        while raw := file.read(BLOCK):
            text = _decoded(decoder.decode, raw, path, offset, encoding)
            rest += text if offset else text.removeprefix("\ufeff")
            offset += len(raw)
            while len(rest) > limit:
                cut = rest.rfind("\n", 0, limit) + 1 or limit
                yield rest[:cut]
                rest = rest[cut:]
        rest += _decoded(partial(decoder.decode, final=True), b"", path, offset, encoding)
    if rest:
        yield rest


def decode(raw: bytes, path: str, offset: int, errors: Errors, encoding: str = "utf-8") -> str:
    """The text of the bytes from `offset` of a file. Raises InputError for bytes not of the encoding."""
    return _decoded(lambda raw: raw.decode(encoding, errors), raw, path, offset, encoding)


def _decoded(decode: Callable[[bytes], str], raw: bytes, path: str, offset: int, encoding: str) -> str:
    try:
        return decode(raw)
    except UnicodeError as error:
        # A decoder's own bytes may begin before `raw`, with those of a character cut in two.
        behind = len(error.object) - error.start if isinstance(error, UnicodeDecodeError) else len(raw)
        raise InputError(
            f"{path!r}: invalid {encoding.upper()} at byte {offset + len(raw) - behind}; convert it, give "
            "its --encoding, or use --errors replace"
        ) from error


def json_lines(
    path: str, errors: Errors, skipped: Counter[str], read: Callable[[str], T], encoding: str = "utf-8"
) -> Iterator[tuple[int, T]]:
    """The number of every line but blank ones and what `read` makes of it.

    A line for which `read` raises ValueError, or longer than LINE_LIMIT, raises InputError, or is counted in
    `skipped`.
    """
    offset = number = 0
    with unpacked(path) as file:
        while line := file.readline(LINE_LIMIT):
            number += 1
            with _counting(errors, skipped, f"{path!r}, line {number}"):
                begin, offset = offset, offset + len(line)
                if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LINE_LIMIT)
                        offset += len(line)
                    raise ValueError(f"longer than {LINE_LIMIT >> 20} MB")
                if text := decode(line, path, begin, errors, encoding).removeprefix("\ufeff").strip():
                    yield number, read(text)


@contextmanager
def _counting(errors: Errors, dropped: Counter[str], place: str) -> Iterator[None]:
    """Turns a ValueError into an InputError that begins with the place, or into a count."""
    try:
        yield
    except ValueError as error:
        if errors == "strict":
            raise InputError(f"{place}: {error}; mend it or use --errors replace") from error
        dropped["lines that do not parse"] += 1


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError, with a short reason, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error


def _record_text(record: Any, field: str | None) -> str:
    """The text in a record. Raises ValueError with the reason where there is none."""
    wanted = (field,) if field else ("text", "content")
    record = record if isinstance(record, dict) else {}
    texts = [text for name in wanted if isinstance(text := record.get(name), str)]
    if not texts:
        has = f"it has {', '.join(map(str, record))[:100]}" if record else "it is no JSON object"
        raise ValueError(f"no text in a field {' or '.join(map(repr, wanted))} ({has}); name it by --field")
    text = next(filter(None, texts), "")
    text.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 can: also a ValueError
    return text


def _lines(path: str, read: Format, dropped: Counter[str]) -> Iterator[str]:
    def text_of(line: str) -> str:
        return _record_text(parse_json(line), read.field)

    return (text for _, text in json_lines(path, read.errors, dropped, text_of, read.encoding))


def _array(path: str, read: Format, dropped: Counter[str]) -> Iterator[str]:
    with unpacked(path) as file:
        raw = file.read(ARRAY_LIMIT + 1)
    hint = "make one record a line of it, as by jq -c '.[]'"
    if len(raw) > ARRAY_LIMIT:
        raise InputError(f"{path!r}: a JSON array of over {ARRAY_LIMIT >> 20} MB; {hint}")
    try:
        records = parse_json(decode(raw, path, 0, read.errors, read.encoding).removeprefix("\ufeff"))
    except ValueError as error:
        raise InputError(f"{path!r}: {error}, though it begins as an array; is it whole?") from error
    yield from _texts(enumerate(records, start=1), path, read, dropped)


def _table(path: str, read: Format, dropped: Counter[str]) -> Iterator[str]:
    csv.field_size_limit(LINE_LIMIT)
    with unpacked(path) as file:
        lines = io.TextIOWrapper(file, read.encoding, read.errors, newline="")
        delimiter = "\t" if ".tsv" in path.lower() else ","
        try:
            yield from _texts(
                enumerate(csv.DictReader(lines, delimiter=delimiter), start=1), path, read, dropped
            )
        except (csv.Error, UnicodeError) as error:
            raise InputError(f"{path!r}: no table of {read.encoding} text ({error}); convert it") from error


def _parquet(path: str, read: Format, dropped: Counter[str]) -> Iterator[str]:
    parquet = _library("pyarrow.parquet", path, "pyarrow", "make .jsonl of it")
    try:
        table = parquet.ParquetFile(path)
        wanted = [name for name in (read.field, "text", "content") if name in table.schema_arrow.names]
        batches = table.iter_batches(batch_size=256, columns=wanted or None)
        records = (record for batch in batches for record in batch.to_pylist())
        yield from _texts(enumerate(records, start=1), path, read, dropped)
    except (OSError, ValueError) as error:
        raise InputError(f"{path!r}: no Parquet that can be read ({error}); fetch it again") from error


def _texts(
    records: Iterable[tuple[int, Any]], path: str, read: Format, dropped: Counter[str]
) -> Iterator[str]:
    for number, record in records:
        with _counting(read.errors, dropped, f"{path!r}, record {number}"):
            yield _record_text(record, read.field)


READERS: dict[str, Callable[[str, Format, Counter[str]], Iterator[str]]] = {
    "text": text_documents,
    "lines": _lines,
    "array": _array,
    "csv": _table,
    "tsv": _table,
    "parquet": _parquet,
}
"""By the kind of a file, what gives its documents."""


# ---- A file → bytes


@contextmanager
def unpacked(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is of gzip or zstd; what goes wrong becomes an InputError."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic == b"\x28\xb5\x2f\xfd":
                zstd = _library("zstandard", path, "zstandard", "unpack it by zstd -d")
                yield io.BufferedReader(zstd.ZstdDecompressor().stream_reader(file))
            elif magic[:2] == b"\x1f\x8b" or path.lower().endswith(".gz"):
                yield io.BufferedReader(GzipFile(fileobj=file))
            else:
                yield file
    except (EOFError, BadGzipFile, zlib.error) as error:
        raise InputError(f"{path!r}: truncated or corrupt gzip; fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path!r}: {error.strerror or error}; check its permissions") from error


def _library(module: str, path: str, package: str, instead: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{path!r}: needs {package} (pip install {package}); install it or {instead}"
        ) from None


def _digest_file(path: str) -> tuple[str, int]:
    """A digest of a file's content, read as a stream, and its bytes."""
    state, size = hashlib.blake2b(digest_size=16), 0
    with unpacked(path) as file:
        while raw := file.read(BLOCK):
            state.update(raw)
            size += len(raw)
    return state.hexdigest(), size
