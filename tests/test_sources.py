"""Reading text: what a spec means, which files are read, and one line for all that is wrong."""

import gzip
import json
import os
import random
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.corpus import Source
from minillm.errors import InputError
from minillm.io import files as files_module
from minillm.io.text import EXTENSIONS, open_sources, world_sources
from minillm.world import SHARES, World


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def open_one(spec: object, **options) -> Source:
    (source,) = open_sources([str(spec)], **options)
    return source


def texts(spec: object, **options) -> list[str]:
    return list(open_one(spec, **options).documents())


def refusal(spec: object, **options) -> str:
    """The one line with which opening or reading `spec` is refused."""
    with pytest.raises(InputError) as caught:
        texts(spec, **options)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


# ---- What a spec means


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [
        ("{}/books", "books", 1),
        ("{}/books/", "books", 1),
        ("{}/books:0.15", "books", 0.15),
        ("prose={}/books", "prose", 1),
        ("prose={}/books:1e-3", "prose", 1e-3),
        ("{}/books/a.txt:2", "a.txt", 2),
        ("a={}/b*/*.txt:3", "a", 3),
        ("{}/odd:0.5", "odd:0.5", 1),
        ("{}/odd:0.5:2", "odd:0.5", 2),
        ("{}/x=y", "x=y", 1),
        ("n={}/x=y:4", "n", 4),
        ("{}/[draft]", "[draft]", 1),
    ],
)
def test_a_spec_means_its_most_literal_reading_on_disk(tmp_path, spec, name, weight):
    for file in ("books/a.txt", "odd:0.5/a.txt", "x=y/a.txt", "[draft]/a.txt"):
        write(tmp_path / file, "text")
    source = open_one(spec.format(tmp_path))
    assert (source.name, source.weight, list(source.documents())) == (name, weight, ["text"])


def test_a_relative_name_with_an_equals_sign_is_a_file_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.txt", "other")
    assert (open_one("a=b.txt").name, texts("a=b.txt")) == ("a", ["other"])
    write(tmp_path / "a=b.txt", "literal")
    assert (open_one("a=b.txt").name, texts("a=b.txt")) == ("a=b.txt", ["literal"])
    assert open_one(".").name == tmp_path.name


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-inf", "1e308", "1e-320", "x", "", "1,5"])
def test_a_weight_that_is_no_positive_number_is_refused(tmp_path, weight):
    file = write(tmp_path / "a.txt", "text")
    assert str(file) in (message := refusal(f"{file}:{weight}")) and "weight" in message


def test_two_sources_of_one_name_are_refused(tmp_path):
    specs = [str(write(tmp_path / folder / "a.txt", "text")) for folder in "xy"]
    with pytest.raises(InputError, match=r"'a\.txt'"):
        open_sources(specs)
    assert [s.name for s in open_sources([specs[0], "b=" + specs[1]])] == ["a.txt", "b"]
    with pytest.raises(InputError, match="no data given"):
        open_sources([])


# ---- Which files are read


def test_a_folder_is_read_in_sorted_order_and_what_is_left_out_of_it_is_counted(tmp_path):
    # By path component: the folder "a" comes before "a-b.txt", though "-" sorts before "/".
    names = ["B.txt", "a/z.md", "a/b/c.py", "a-b.txt", "c.jsonl", "d.TXT"]
    for name in [*reversed(names), ".hidden.txt", ".git/b.txt", "c.png", "README"]:
        write(tmp_path / name, json.dumps({"text": name}) if name == "c.jsonl" else name)
    write(tmp_path / "empty.txt", "")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would block for ever
    write(tmp_path / "package.json", '{\n  "name": "x"\n}\n')
    write(tmp_path / "elf.txt", b"\x7fELF\0\0\0" * 10)
    source = open_one(tmp_path)
    assert list(source.documents()) == ["B.txt", "a/b/c.py", "a/z.md", "a-b.txt", "c.jsonl", "d.TXT"]
    (kind,) = [what for what in source.skipped if "another kind" in what]
    assert "1 .png" in kind and "1 without an extension" in kind
    assert (source.skipped[kind], source.skipped["empty files"], source.skipped.total()) == (3, 1, 6)


def test_every_extension_of_the_documentation_is_read_from_a_folder(tmp_path):
    wanted = [e + packed for e in EXTENSIONS if e != ".parquet" for packed in ("", ".gz")]
    for i, suffix in enumerate(wanted):
        line = b"text\nx\n" if ".csv" in suffix or ".tsv" in suffix else b'{"text": "x"}'
        write(tmp_path / f"{i}{suffix}", gzip.compress(line) if suffix.endswith("gz") else line)
    assert len(texts(tmp_path)) == len(wanted)


def test_a_file_given_by_itself_or_by_a_glob_is_read_once_whatever_its_name(tmp_path):
    for name in ("README", ".hidden", "b.log", "c.c"):
        assert texts(write(tmp_path / name, "{ some text\n")) == ["{ some text\n"]
    assert texts(f"{tmp_path}/*.c") == ["{ some text\n"]
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/d.png"):
        write(tmp_path / "g" / name, name)
    assert texts(f"{tmp_path}/g/*.txt") == ["a.txt"]
    assert texts(f"{tmp_path}/g/**/*.txt") == ["a.txt", "x/b.txt", "x/y/c.txt"]
    assert texts(f"{tmp_path}/g/**") == ["a.txt", "x/b.txt", "x/d.png", "x/y/c.txt"]


def test_linked_folders_and_files_are_read_once_and_loops_end(tmp_path):
    write(tmp_path / "elsewhere/b.txt", "b")
    write(tmp_path / "data/a.txt", "a")
    for name, target in (("link", "../elsewhere"), ("again", "../elsewhere"), ("up", "..")):
        (tmp_path / "data" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "data" / "a2.txt").symlink_to("a.txt")
    for spec in (tmp_path / "data", f"{tmp_path}/data/**/*.txt"):
        assert sorted(texts(spec)) == ["a", "b"]


def test_files_that_a_shell_expanded_are_one_source(tmp_path):
    paths = [str(write(tmp_path / "lua" / f"{i}.c", f"file {i}")) for i in range(3)]
    other = str(write(tmp_path / "notes.md", "note"))
    sources = open_sources([*paths, other])
    assert [source.name for source in sources] == ["lua/*.c", "notes.md"]
    assert list(sources[0].documents()) == ["file 0", "file 1", "file 2"]
    apart = open_sources([f"{path}:1" for path in paths])
    assert [source.name for source in apart] == ["0.c", "1.c", "2.c"]


# ---- What is refused

PACKED = gzip.compress(random.Random(0).randbytes(1000).hex().encode(), mtime=0)  # the same in every process
FLIPPED = PACKED[:500] + bytes([PACKED[500] ^ 1]) + PACKED[501:]
ZSTD = b"\x28\xb5\x2f\xfd"
REFUSED = [
    ("no/such.txt", None, "no such file or folder"),
    ("no-*.txt", None, "no file matches"),
    ("a\nb.txt", b"\0", "binary"),
    ("a.txt", "", "empty files: 1"),
    ("a.jsonl", "\n\n", "no document with text"),
    ("a.txt", b"\xef\xbb\xbf", "no document with text"),
    ("pictures/a.png", "x", "another kind (1 .png): 1"),
    ("pictures/a.png", "x", "by a glob"),
    ("a.txt", b"\x7fELF\0\0\0" * 10, "binary"),
    ("a.txt", "text".encode("utf-16"), "binary"),
    ("a.txt", "你好世界".encode("gb18030"), "--encoding"),
    ("a.json", '{\n  "name": "x"\n}\n', "neither records, one a line, nor an array"),
    ("a.jsonl", '{"body": "x"}\n', "it has body); name it by --field"),
    ("a.jsonl", '{"text": "x", "text": "y"}\n{"text": "z"}', "line 1: an object has the field 'text' twice"),
    ("a.csv", "id,text\n1,one, and more\n2,two\n", "record 1: has more values"),
    *(
        ("a.jsonl.gz", damaged, "cannot be unpacked")
        for damaged in (PACKED[:-6], PACKED[:5], PACKED[1:], FLIPPED)
    ),
    ("a.jsonl.zst", ZSTD, "install backports.zstd" if sys.version_info < (3, 14) else "zstd -d"),
    ("a.parquet", b"PAR1", "pip install pyarrow"),
]


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, name, content, words):
    for library in (files_module.ZSTD, "pyarrow"):
        monkeypatch.setitem(sys.modules, library, None)
    if content is not None:
        write(tmp_path / name, content)
    top, *below = name.split("/")
    message = refusal(tmp_path / (name if content is None else top))
    assert words in message and (repr(top)[1:-1] in message or below)


def test_the_reason_of_the_system_is_given(tmp_path, monkeypatch):
    file, scan = write(tmp_path / "closed/b.txt", "text"), os.scandir

    def deny(path, *arguments):
        if str(path).endswith(("closed", "b.txt")):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    # Root may read everything, so the refusals are played.
    monkeypatch.setattr("os.scandir", deny)
    assert "closed" in refusal(tmp_path), "and not passed over"
    monkeypatch.setattr("builtins.open", deny)
    assert "b.txt" in (message := refusal(file)) and "Permission denied" in message
    for name in ("no-such", "base64", "rot13", "undefined"):
        assert "--encoding" in refusal(tmp_path, encoding=name)


class ZstdError(Exception):
    """Stands for the library's."""


def open_zstd(file: IO[bytes]) -> IO[bytes]:
    """Stands for the library's: what gzip packed, behind the mark of zstd."""
    if file.read(4) != ZSTD:
        raise ZstdError
    return gzip.GzipFile(fileobj=file)


def test_packed_files_of_several_parts_are_whole_and_one_that_is_cut_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, files_module.ZSTD, SimpleNamespace(open=open_zstd, ZstdError=ZstdError))
    lines = [json.dumps({"text": os.urandom(600).hex()}).encode() + b"\n" for _ in range(9)]
    for name, mark in (("a.gz", b""), ("a.zst", ZSTD)):
        whole = mark + gzip.compress(b"".join(lines[:6])) + gzip.compress(b"".join(lines[6:]))
        for padding in (b"", b"\0" * 3000):
            found = texts(write(tmp_path / name, whole + padding))
            assert found == [json.loads(line)["text"] for line in lines]
        for size in (len(whole) - 1, len(whole) // 2, 8):
            assert "cannot be unpacked" in refusal(write(tmp_path / name, whole[:size]))
    assert "cannot be unpacked" in refusal(write(tmp_path / "b.zst", "no zstd"))


class ParquetFile:
    """Stands for the library's, which seeks in what it is given."""

    def __init__(self, file: IO[bytes]) -> None:
        file.seek(4)
        self.text = file.read().decode()

    def iter_batches(self, batch_size: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(to_pylist=lambda: [{"text": self.text}])]


def test_parquet_may_be_packed_too(tmp_path, monkeypatch):
    library = SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", library)
    for name, content in (("a.parquet", b"PAR1rows"), ("a.parquet.gz", gzip.compress(b"PAR1rows"))):
        assert texts(write(tmp_path / name, content)) == ["rows"]


# ---- Documents


@given(
    text=st.text(st.sampled_from("ab\n\r\u00e9\u20ac\U0001f600 "), min_size=1, max_size=200),
    limit=st.integers(8, 40),
    encoding=st.sampled_from(["utf-8", "utf-16", "gb18030"]),
)
def test_pieces_of_a_file_join_to_its_text_within_the_limit_and_end_at_newlines(
    tmp_path_factory, text, limit, encoding
):
    file = write(tmp_path_factory.getbasetemp() / "pieces.txt", text.encode(encoding))
    with mock.patch("minillm.io.text.DOCUMENT_LIMIT", limit):
        pieces = texts(file, encoding=encoding)
    assert "".join(pieces) == text
    for piece in pieces[:-1]:
        assert 0 < len(piece) <= limit
        assert piece.endswith("\n") or ("\n" not in piece and len(piece) == limit)


def test_a_file_and_a_line_of_any_length_take_bounded_memory(tmp_path, monkeypatch):
    limit = 2**20
    long = write(tmp_path / "a.txt", b"a line of text\n" * (20 * limit // 15))
    monkeypatch.setattr(files_module, "LINE_LIMIT", 2**16)
    monkeypatch.setattr("minillm.io.text.DOCUMENT_LIMIT", limit)
    bomb = b'{"text": "' + b"x" * 2**24 + b'"}\n'
    lines = gzip.compress(b'{"text": "a"}\n' + bomb + b'{"text": "b"}\n')
    packed = write(tmp_path / "a.jsonl.gz", lines)
    assert "line 2" in (message := refusal(packed)) and "longer than" in message
    tracemalloc.start()
    assert sum(1 for _ in open_one(long).documents()) >= 20
    assert texts(packed, errors="replace") == ["a", "b"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * limit


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"other": "x"}', '{"text": 3}', '{"text": "\\ud800"}', "[" * 100_000]
)
def test_a_bad_line_is_refused_by_number_or_skipped_and_counted(tmp_path, line):
    file = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"text": ""}}\n\n{line}\n{{"text": "b"}}\n')
    message = refusal(file)
    assert "a.jsonl" in message and "line 4" in message
    source = open_one(file, errors="replace")
    for _ in range(2):  # the count is that of one pass
        assert list(source.documents()) == ["a", "b"]
        assert source.dropped == {"lines that do not parse": 1, "empty documents": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("size", [3, 1000])
def test_invalid_utf8_is_refused_with_its_offset_or_replaced_and_counted(tmp_path, name, size):
    good = b'{"text": "\xc3\xa9"}\n' * size
    raw = good + b'{"text": "\xc3\xa9\xff"}\n'  # behind a character cut in two
    file = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert name in (message := refusal(file)) and f"byte {len(good) + 12};" in message
    source = open_one(file, errors="replace")
    assert "\ufffd" in list(source.documents())[-1] and list(source.dropped.values()) == [1]


RECORDS = [{"text": "o\n\u2028e"}, {"text": "", "content": "two"}, {"text": "three", "content": "no"}]
LINES = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4.json.gz", gzip.compress(LINES, mtime=0)),
        ("packed.txt", gzip.compress(LINES, mtime=0)),
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("plain.log", LINES),
        ("array.json", json.dumps(RECORDS, indent=2).encode()),
        ("array.txt", json.dumps(RECORDS).encode()),
        ("table.csv", '\ufeffid,text\r\n1,"o\n\u2028e"\r\n2,two\r\n3,three\r\n'.encode()),
        ("german.csv", 'id;"text"\r\n1;"o\n\u2028e"\r\n2;two\r\n3;three\r\n'.encode()),
        ("table.tsv", 'text\tid\n"o\n\u2028e"\t1\ntwo\t2\nthree\t3\n'.encode()),
    ],
)
def test_records_are_known_by_their_content_and_never_read_as_raw_text(tmp_path, name, content):
    assert texts(write(tmp_path / name, content)) == ["o\n\u2028e", "two", "three"]


def test_text_is_kept_as_it_is_and_options_say_how_it_is_read(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\n")) == ["a\r\nb\n"]
    nul = "text with a \0 in it " + "and more " * 100
    assert texts(write(tmp_path / "b.txt", nul)) == [nul]
    assert texts(write(tmp_path / "c.txt", "你好".encode("gb18030")), encoding="gb18030") == ["你好"]
    mixed = '{"body": "x"}\n{"title": "", "text": "y", "body": "z"}\n'
    assert texts(write(tmp_path / "d.jsonl", mixed), field=("title", "body", "text")) == ["x", "z"]
    row = write(tmp_path / "e.csv", "id,text\n1,one, and more\n2,two\n")
    assert texts(row, errors="replace") == ["two"], "a row of more values than columns is not read in part"


def test_endoftext_parts_documents_unless_somebody_writes_about_it(tmp_path, monkeypatch):
    stories = (
        "Once upon a time.\n<|endoftext|>\nThere was a cat.\n\nIt sat.<|endoftext|>The end.\n<|endoftext|>\n"
    )
    expected = ["Once upon a time.", "There was a cat.\n\nIt sat.", "The end."]
    assert texts(write(tmp_path / "a.txt", stories)) == expected
    code = 'END = "<|endoftext|>"\n'
    assert texts(write(tmp_path / "b.py", code)) == [code]
    long = write(tmp_path / "c.txt", stories * 400)
    monkeypatch.setattr("minillm.io.text.DOCUMENT_LIMIT", 64)
    assert texts(long) == expected * 400


# ---- Fingerprints and the rest


def test_a_fingerprint_follows_the_content_and_its_order_and_nothing_else(tmp_path):
    def fingerprint(*contents: str, folder: str = "", suffix: str = ".txt", **options) -> str:
        place = tmp_path / (folder or "-".join(contents) + suffix)
        for i, content in enumerate(contents):
            write(place / f"{folder}{i}{suffix}", content)
        return open_one(place, **options).fingerprint

    assert fingerprint("ab", "c") == fingerprint("ab", "c", folder="elsewhere")
    different = [
        fingerprint("ab", "c"),
        fingerprint("a", "bc"),
        fingerprint("c", "ab"),
        fingerprint("abc"),
        fingerprint("abc", suffix=".jsonl"),
        fingerprint("abc", errors="replace"),
    ]
    assert len(set(different)) == len(different)


def test_every_pass_over_a_source_gives_the_same_documents(shared_data):
    source = open_one(shared_data / "text" / "books")
    first = list(source.documents())
    assert len(first) == 6 and first == list(source.documents())
    # Universal newlines would translate \r\n: the bytes are compared.
    raw = [file.read_bytes() for file in sorted((shared_data / "text" / "books").glob("*.txt"))]
    assert [text.encode() for text in first] == [r.removeprefix(b"\xef\xbb\xbf") for r in raw]


def test_the_little_world_is_shared_out_by_its_weights():
    sources = world_sources(World(0), 0.2)
    assert {source.name: source.weight for source in sources} == SHARES
    assert len({source.fingerprint for source in sources}) == len(SHARES)
    sizes = [sum(len(text.encode()) for text in source.documents()) for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        # A source ends with the document that reaches its size; none is longer than 20 kB.
        wanted = 0.2e6 * source.weight / sum(SHARES.values())
        assert wanted <= size < wanted + 20_000
    others = [*world_sources(World(1), 0.2), *world_sources(World(0), 0.3)]
    assert {s.fingerprint for s in sources}.isdisjoint(s.fingerprint for s in others)
