"""Other people's files: what the user wrote → files → what each of them is → its text or its records.

    data/*.jsonl:0.5 ──► parse_specs, list_files ──► kind_of ──► open_text, or records

What a file is, its content says: text; JSON, a record a line, in one array, or in objects over many lines;
a table (.csv, .tsv) or a Parquet file, a record a row. All may be packed by gzip or zstd. Lines, rows and
text are read as streams; a JSON array and a packed Parquet file are held in memory. Left out: other formats,
downloads.
"""

import codecs
import csv
import fnmatch
import glob
import gzip
import importlib
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, Any, Literal, cast

from minillm.errors import InputError, reading
from minillm.io.disk import fields_once

RECORD_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""What holds records, of a folder. A file given by name or glob may have any name."""
LINE_LIMIT = 256 * 2**20  # characters of one record
WHOLE_LIMIT = 2**31  # characters of JSON that is not a record a line, and is held in memory
UNNAMED = "values_without_a_column"  # the field of what a table's row has too much, as by a comma not quoted
HEAD = 2**16  # bytes from which a file's kind is told
BLOCK = 2**20
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"

Errors = Literal["strict", "replace"]


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    errors: Errors = "strict"
    """Stop at bytes that are not of the encoding and at records that do not parse, or replace and skip them,
    counting."""
    encoding: str = "utf-8"
    field: tuple[str, ...] | None = None
    """Where the text may be in a record; None for "text" or "content"."""

    def __post_init__(self) -> None:
        wrong = (LookupError, UnicodeError)
        with reading(f"--encoding {self.encoding}", "give utf-8, utf-16, gb18030 …", "used", wrong):
            "".encode(self.encoding)  # that of a text: Python has others, as base64


# ---- What the user wrote → name, path, weight


def parse_specs(specs: Sequence[str]) -> list[tuple[str, str, float]]:
    """The name, path and weight of each spec, [NAME=]PATH[:WEIGHT]. InputError for wrong ones. The weight is
    1 unless given; the name is the path's last component. A path may itself hold '=' and ':': of all readings
    the most literal one that exists on disk is taken."""
    if not specs:
        raise InputError("no data given: name a file or folder, as in books=../books:0.15")
    parsed = [_parse(spec) for spec in specs]
    check_names(name for name, _, _ in parsed)
    return parsed


def _parse(spec: str) -> tuple[str, str, float]:
    name, _, path = spec.partition("=")
    named = [(name, path)] if name and path and "/" not in name else []
    whole = [(name, path, "1") for name, path in [("", spec), *named]]
    weighted = [(name, *path.rpartition(":")[::2]) for name, path, _ in whole if ":" in path]
    readings = [(name, os.path.expanduser(path), weight) for name, path, weight in whole + weighted]
    for name, path, weight in readings:
        if os.path.exists(path) or _matches(path):
            with suppress(ValueError):
                if 1e-30 <= float(weight) <= 1e30:
                    return name or os.path.basename(os.path.abspath(path)) or path, path, float(weight)
            wrong = f"weight {weight!r} is no number from 1e-30 to 1e30, as in books:0.15"
            raise InputError(f"data source {spec!r}: {wrong}")
    path = min((path for _, path, _ in readings), key=len)
    what = "no file matches" if glob.has_magic(path) else "no such file or folder:"
    raise InputError(f"data source {spec!r}: {what} {path!r}; check the path")


def check_names(names: Iterable[str]) -> None:
    """InputError where two sources have one name."""
    for name, count in Counter(names).items():
        if count > 1:
            way = "as in other=PATH, or make them one by a glob in quotes, as in 'PATH/*.txt'"
            raise InputError(f"{count} data sources are named {name!r}: name them apart, {way}")


# ---- A path → the files to read


def list_files(name: str, paths: list[str], extensions: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """The files to read under `paths`, sorted, each once, and a count of those left out, by reason. A file
    that is named, or that a glob matches, is read whatever it ends in; of a folder only those with one of
    `extensions`, packed or not. InputError, for the source `name`, where there are none."""
    endings = tuple(extension + packed for extension in extensions for packed in ("", ".gz", ".zst"))
    tops = [top for path in paths for top in ([path] if os.path.exists(path) else _matches(path))]
    asked = {top for top in tops if not os.path.isdir(top)}
    every = {os.path.realpath(file): file for top in reversed(tops) for file in reversed(list(_walk(top)))}
    # A pipe or device would block, or differ at the second reading.
    wanted = [f for f in every.values() if (f in asked or f.lower().endswith(endings)) and os.path.isfile(f)]
    found = sorted(wanted, key=lambda file: file.split(os.sep))
    files = [file for file in found if os.path.getsize(file)]
    kinds = Counter(extension_of(file) or "without an extension" for file in {*every.values()} - {*found})
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    counts = {f"files of another kind ({shown})": kinds.total(), "empty files": len(found) - len(files)}
    skipped = +Counter(counts)
    if not files:
        why = ", ".join(f"{what}: {count}" for what, count in skipped.items()) or "an empty folder"
        way = f"give {', '.join(extensions)} files, or name others by a glob in quotes, as in 'src/**/*.c'"
        raise InputError(f"data source {name!r}: nothing to read in {paths[0]!r} ({why}); {way}")
    return files, skipped


def extension_of(path: str) -> str:
    """As in .txt or .jsonl.gz, in small letters."""
    stem = _unpacked_name(path)
    return os.path.splitext(stem)[1] + path.lower()[len(stem) :]


def _unpacked_name(path: str) -> str:
    return path.lower().removesuffix(".gz").removesuffix(".zst")


def _walk(top: str) -> Iterator[str]:
    """Every file under `top` that is not hidden, each folder once however it is linked; or a file itself."""
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
        if _fits(os.path.relpath(file, top).split(os.sep), parts[first:])
    ]


def _fits(parts: list[str], patterns: list[str]) -> bool:
    match patterns:
        case ["**", *rest]:
            return any(_fits(parts[i:], rest) for i in range(len(parts) + 1))
        case [first, *rest]:
            return bool(parts) and fnmatch.fnmatchcase(parts[0], first) and _fits(parts[1:], rest)
    return not parts


# ---- A file → bytes, and what they are


@contextmanager
def unpacked(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is of gzip or zstd; what goes wrong becomes an InputError."""
    damaged = partial(reading, repr(path), "it is cut off or corrupt: fetch or pack it again", "unpacked")
    with reading(repr(path), "check its permissions", errors=(OSError,)), open(path, "rb") as file:
        magic, name = file.read(4), path.lower()
        file.seek(0)
        if magic == b"\x28\xb5\x2f\xfd" or name.endswith(".zst"):
            zstd = _library(ZSTD, "backports.zstd", path, "packed by zstd", "unpack it by zstd -d")
            with damaged((EOFError, zstd.ZstdError)):
                yield zstd.open(file)
        elif magic[:2] == b"\x1f\x8b" or name.endswith(".gz"):
            with damaged((EOFError, zlib.error, gzip.BadGzipFile)):
                yield cast(IO[bytes], gzip.GzipFile(fileobj=file))
        else:
            yield file


def _library(module: str, package: str, path: str, what: str, instead: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        needs = f"which needs {package} (pip install {package})"
        raise InputError(f"{path!r}: is {what}, {needs}; install it or {instead}") from None


SIGNATURES = {
    b"PAR1": "parquet", b"ARROW1": "an Arrow file, not text", b"PK\x03\x04": "a zip archive, not text",
    b"SQLite format 3\0": "a database, not text", b"BZh": "packed by bzip2", b"\xfd7zXZ\0": "packed by xz",
    b"version https://git-lfs": "a pointer of Git LFS and not the file, which git lfs pull fetches",
}  # fmt: skip


def kind_of(path: str, read: Reading) -> str:
    """What a file is: "text", one of KINDS, or else a few words for why it cannot be read."""
    name = _unpacked_name(path)
    with unpacked(path) as file:
        head = file.read(HEAD)
    if kind := next((kind for sign, kind in SIGNATURES.items() if head.startswith(sign)), None):
        return kind
    if head.count(0) * 256 > len(head) and read.encoding.lower()[:6] not in ("utf-16", "utf-32"):
        return "binary, not text"
    if name.endswith((".csv", ".tsv")):
        return name[-3:]
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line, newline, rest = start.partition(b"\n")
    record, named = None, name.endswith((".json", ".jsonl", ".ndjson"))
    with suppress(ValueError, RecursionError):
        record = json.loads(line.decode("utf-8", "replace"))
    is_array = start[:1] == b"[" and (named or start[1:].lstrip()[:1] == b"{")
    begins_a_line = start[:1] == b"{" and not newline and len(head) == HEAD
    if isinstance(record, dict) or begins_a_line or (is_array and record is not None and rest.strip()):
        return "lines"
    if is_array:
        return "array"
    if name.endswith((".jsonl", ".ndjson")) and line.strip() != b"{":
        return "lines"
    return "objects" if named else "text"


# ---- A file → text


@contextmanager
def open_text(path: str, read: Reading) -> Iterator[io.TextIOWrapper]:
    """A file's text without its byte order mark, its line ends as they are."""
    encoding = "utf-8-sig" if codecs.lookup(read.encoding).name == "utf-8" else read.encoding
    with unpacked(path) as file:
        text = io.TextIOWrapper(file, encoding, read.errors, newline="\n")
        try:
            yield text
        except UnicodeError as error:
            rest = error.object[error.start :] if isinstance(error, UnicodeDecodeError) else b""
            wrong = f"{path!r}: invalid {read.encoding.upper()} at byte {file.tell() - len(rest)}"
            way = "convert it, give train.py or sft.py its --encoding, or use --errors replace"
            raise InputError(f"{wrong}; {way}") from error


# ---- A file → records


def records(
    path: str, read: Reading, dropped: Counter[str], unwrap: Callable[[Any], Iterable[Any]]
) -> Iterator[tuple[str, Any]]:
    """Every record of a file and its place, as in "line 3"; `unwrap` gives those in a line or a JSON text. A
    line that is no JSON, or longer than LINE_LIMIT, raises InputError or is counted in `dropped`."""
    kind = kind_of(path, read)
    if kind not in KINDS:
        raise InputError(f"{path!r}: {kind}; convert it to lines of JSON")
    if kind == "lines":
        for number, record in _lines(path, read, dropped):
            yield from ((f"line {number}", held) for held in unwrap(record))
    else:
        held = chain.from_iterable(map(unwrap, RECORDS[kind](path, read)))
        yield from ((f"record {number}", record) for number, record in enumerate(held, start=1))


def _lines(path: str, read: Reading, dropped: Counter[str]) -> Iterator[tuple[int, Any]]:
    number = 0
    with open_text(path, read) as file:
        while line := file.readline(LINE_LIMIT):
            number += 1
            with counting(read.errors, dropped, f"{path!r}, line {number}"):
                if len(line) == LINE_LIMIT and not line.endswith("\n"):
                    while line and not line.endswith("\n"):
                        line = file.readline(BLOCK)
                    raise ValueError(f"longer than {LINE_LIMIT >> 20} million characters")
                if line.strip():
                    yield number, json.loads(line, object_pairs_hook=fields_once)


@contextmanager
def counting(errors: Errors, dropped: Counter[str], place: str) -> Iterator[None]:
    """Turns what is wrong with a record into an InputError that begins with the place, or into a count."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        if errors == "strict":
            what = "not valid JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else error
            raise InputError(f"{place}: {what}; mend it or use --errors replace") from error
        dropped["lines that do not parse"] += 1


def _whole(path: str, read: Reading) -> Iterator[Any]:
    """The JSON texts that a file holds one behind the other, each perhaps over many lines."""
    with open_text(path, read) as file:
        text, at = file.read(WHOLE_LIMIT + 1).strip(), 0
    if len(text) > WHOLE_LIMIT:
        long = f"{path!r}: JSON of over {WHOLE_LIMIT >> 20} million characters"
        raise InputError(f"{long}; make a record a line of it, as by jq -c '.[]'")
    decoder = json.JSONDecoder(object_pairs_hook=fields_once)
    with reading(repr(path), "mend it; is it whole?", "read as JSON", (ValueError, RecursionError)):
        while at < len(text):
            record, at = decoder.raw_decode(text, at)
            yield record
            while text[at : at + 1].isspace():
                at += 1


def _table(path: str, read: Reading) -> Iterator[Any]:
    csv.field_size_limit(LINE_LIMIT)
    wrong = reading(repr(path), "make .jsonl of it", "read as a table", (csv.Error,))
    with open_text(path, read) as file, wrong:
        head = file.readline(LINE_LIMIT)
        marks = "\t" if _unpacked_name(path).endswith("tsv") else ",;\t"  # a spreadsheet's, by its country
        delimiter = max(marks, key=head.count)
        table = csv.DictReader(chain([head], file), restkey=UNNAMED, delimiter=delimiter, strict=True)
        if twice := [name for name, count in Counter(table.fieldnames).items() if name and count > 1]:
            raise csv.Error(f"{twice[0]!r} is the name of two columns")
        yield from table


def _parquet(path: str, read: Reading) -> Iterator[Any]:
    parquet = _library("pyarrow.parquet", "pyarrow", path, "Parquet", "make .jsonl of it")
    wrong = reading(repr(path), "fetch it again", "read as Parquet", (OSError, ValueError))
    with unpacked(path) as file, wrong:
        whole = file if isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
        for batch in parquet.ParquetFile(whole).iter_batches(batch_size=256):
            yield from batch.to_pylist()


RECORDS: dict[str, Callable[[str, Reading], Iterator[Any]]] = {
    "array": _whole, "objects": _whole, "text": _whole, "csv": _table, "tsv": _table, "parquet": _parquet,
}  # fmt: skip
"""What gives the records of a file that are not one a line, by its kind."""
KINDS = {"lines", *RECORDS}
