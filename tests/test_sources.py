"""Reading text: what a spec means, which files are read, and one line for all that is wrong."""

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import Source
from minillm.errors import InputError
from minillm.io import files as files_module
from minillm.io.files import Reading, text_pieces
from minillm.io.text import EXTENSIONS, open_sources, world_sources
from minillm.world import SHARES, World

law = settings(deadline=None)  # a busy machine is no defect


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


@law
@given(weight=st.floats(min_value=1e-12, max_value=1e12))
def test_any_positive_weight_is_read_exactly(tmp_path_factory, weight):
    file = write(tmp_path_factory.getbasetemp() / "weight.txt", "text")
    assert open_one(f"{file}:{weight!r}").weight == weight


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-inf", "x", "", "1,5"])
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


def test_a_folder_is_read_recursively_in_sorted_order_whatever_the_order_on_disk(tmp_path):
    # By path component: the folder "a" comes before "a-b.txt", though "-" sorts before "/".
    names = ["B.txt", "a/z.md", "a/b/c.py", "a-b.txt", "c.jsonl", "d.TXT"]
    for name in reversed(names):
        write(tmp_path / name, json.dumps({"text": name}) if name == "c.jsonl" else name)
    assert texts(tmp_path) == ["B.txt", "a/b/c.py", "a/z.md", "a-b.txt", "c.jsonl", "d.TXT"]


def test_in_a_folder_hidden_files_are_passed_over_and_others_counted(tmp_path):
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", "c.png", "README"):
        write(tmp_path / name, "text")
    write(tmp_path / "empty.txt", "")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would block for ever
    source = open_one(tmp_path)
    assert list(source.documents()) == ["text"]
    assert source.skipped["empty files"] == 1
    (kind,) = [what for what in source.skipped if "another kind" in what]
    assert source.skipped[kind] == 3 and "1 .png" in kind and "1 without an extension" in kind


def test_a_file_given_by_itself_or_by_a_glob_is_read_whatever_its_name(tmp_path):
    for name in ("README", ".hidden", "b.log", "c.c"):
        assert texts(write(tmp_path / name, "{ some text\n")) == ["{ some text\n"]
    assert texts(f"{tmp_path}/*.c") == ["{ some text\n"]


def test_a_glob_reads_each_matching_file_once(tmp_path):
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/d.png"):
        write(tmp_path / name, name)
    assert texts(f"{tmp_path}/*.txt") == ["a.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["a.txt", "x/b.txt", "x/y/c.txt"]
    assert texts(f"{tmp_path}/**") == ["a.txt", "x/b.txt", "x/d.png", "x/y/c.txt"]


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
    sources = open_sources([*paths, other, f"{paths[0]}:2"][:4])
    assert [source.name for source in sources] == ["lua/*.c", "notes.md"]
    assert list(sources[0].documents()) == ["file 0", "file 1", "file 2"]
    apart = open_sources([f"{path}:1" for path in paths])
    assert [source.name for source in apart] == ["0.c", "1.c", "2.c"]


@pytest.mark.parametrize("name", ["no/such/file.txt", "no-*.txt", "no:x", "a=no:2"])
def test_a_path_that_is_not_there_is_refused_by_name(tmp_path, name):
    assert "no" in refusal(name if "=" in name else tmp_path / name)


def test_nothing_to_read_is_refused_with_what_was_left_out(tmp_path):
    assert "a.txt" in refusal(write(tmp_path / "a.txt", ""))
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(tmp_path / "empty")
    write(tmp_path / "pictures/a.png", "x")
    message = refusal(tmp_path / "pictures")
    assert "another kind (1 .png): 1" in message and "by a glob" in message
    assert "blank.jsonl" in refusal(write(tmp_path / "blank.jsonl", "\n\n"))
    assert "mark.txt" in refusal(write(tmp_path / "mark.txt", b"\xef\xbb\xbf"))


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", "text")

    def deny(path, *arguments):
        raise PermissionError(13, "Permission denied", path)

    # Root may read everything, so the refusal is played.
    monkeypatch.setattr("builtins.open", deny)
    assert "a.txt" in (message := refusal(file)) and "Permission denied" in message


def test_a_folder_that_may_not_be_listed_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "open/a.txt", "text")
    write(tmp_path / "closed/b.txt", "text")
    scan = os.scandir

    def deny(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", deny)
    assert "closed" in refusal(tmp_path)


def test_a_line_break_in_a_file_name_does_not_break_the_message(tmp_path):
    refusal(write(tmp_path / "a\nb.txt", b"\0"))
    refusal(tmp_path / "no\nsuch.txt")


# ---- Documents


@law
@given(
    text=st.text(st.sampled_from("ab\n\r\u00e9\u20ac\U0001f600 "), max_size=200),
    limit=st.integers(8, 40),
    encoding=st.sampled_from(["utf-8", "utf-16", "gb18030"]),
)
def test_pieces_of_a_file_join_to_its_text_within_the_limit_and_end_at_newlines(
    tmp_path_factory, text, limit, encoding
):
    file = write(tmp_path_factory.getbasetemp() / "pieces.txt", text.encode(encoding))
    pieces = list(text_pieces(str(file), Reading(encoding=encoding), limit))
    assert "".join(pieces) == text
    for piece in pieces[:-1]:
        assert 0 < len(piece) <= limit
        assert piece.endswith("\n") or ("\n" not in piece and len(piece) == limit)


def test_a_file_longer_than_memory_allows_is_read_in_pieces(tmp_path):
    limit = 2**20
    file = write(tmp_path / "a.txt", b"a line of text\n" * (20 * limit // 15))
    tracemalloc.start()
    pieces = sum(1 for _ in text_pieces(str(file), Reading(), limit))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces >= 20 and peak < 8 * limit


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\n")) == ["a\r\nb\n"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"other": "x"}', '{"text": 3}', '{"text": "\\ud800"}', "[" * 100_000]
)
def test_a_bad_line_is_refused_by_number_or_skipped_and_counted(tmp_path, line):
    file = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    message = refusal(file)
    assert "a.jsonl" in message and "line 3" in message
    source = open_one(file, errors="replace")
    for _ in range(2):  # the count is that of one pass
        assert list(source.documents()) == ["a", "b"]
        assert source.dropped == {"lines that do not parse": 1}


def test_empty_documents_are_left_out_and_counted(tmp_path):
    source = open_one(write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": "a"}\n{"text": ""}\n'))
    assert list(source.documents()) == ["a"]
    assert source.dropped == {"empty documents": 2}


def test_a_row_of_more_values_than_columns_is_not_read_in_part(tmp_path):
    file = write(tmp_path / "a.csv", "id,text\n1,one, and more\n2,two\n")
    assert "record 1: has more values" in refusal(file)
    source = open_one(file, errors="replace")
    assert list(source.documents()) == ["two"] and source.dropped.total() == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("block", [2**20, 16, 7])
def test_invalid_utf8_is_refused_with_its_offset_or_replaced(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(files_module, "BLOCK", block)
    good = b'{"text": "\xc3\xa9"}\n' * 3
    file = write(tmp_path / name, good + b'{"text": "\xc3\xa9\xff"}\n')  # behind a character cut in two
    assert name in (message := refusal(file)) and f"byte {len(good) + 12};" in message
    assert "\ufffd" in texts(file, errors="replace")[-1]


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
        ("table.tsv", 'text\tid\n"o\n\u2028e"\t1\ntwo\t2\nthree\t3\n'.encode()),
    ],
)
def test_records_are_known_by_their_content_and_never_read_as_raw_text(tmp_path, name, content):
    assert texts(write(tmp_path / name, content)) == ["o\n\u2028e", "two", "three"]


def test_json_without_records_is_refused_alone_and_counted_in_a_folder(tmp_path):
    write(tmp_path / "package.json", '{\n  "name": "x"\n}\n')
    write(tmp_path / "a.txt", "text")
    assert "records" in refusal(tmp_path / "package.json")
    source = open_one(tmp_path)
    assert list(source.documents()) == ["text"] and source.skipped.total() == 1


def test_a_field_of_any_name_can_be_asked_for_and_a_missing_one_is_named(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"body": "x"}\n')
    assert "--field" in refusal(file) and "body" in refusal(file)
    assert texts(file, field="body") == ["x"]


def test_endoftext_parts_documents_unless_somebody_writes_about_it(tmp_path, monkeypatch):
    stories = (
        "Once upon a time.\n<|endoftext|>\nThere was a cat.\n\nIt sat.<|endoftext|>The end.\n<|endoftext|>\n"
    )
    expected = ["Once upon a time.", "There was a cat.\n\nIt sat.", "The end."]
    file = write(tmp_path / "a.txt", stories)
    assert texts(file) == expected
    code = 'END = "<|endoftext|>"\n'
    assert texts(write(tmp_path / "b.py", code)) == [code]
    long = write(tmp_path / "c.txt", stories * 400)
    monkeypatch.setattr(files_module, "BLOCK", 64)
    assert texts(long) == expected * 400


def test_what_reads_zstd_and_parquet_is_named_where_it_is_missing(tmp_path, monkeypatch):
    for magic, library in ((b"\x28\xb5\x2f\xfd", "zstandard"), (b"PAR1", "pyarrow")):
        monkeypatch.setitem(sys.modules, library, None)
        assert f"pip install {library}" in refusal(write(tmp_path / "a", magic + b" rest"))


def test_replaced_characters_are_counted_and_an_encoding_can_be_given(tmp_path):
    file = write(tmp_path / "gb.txt", "你好世界".encode("gb18030"))
    source = open_one(file, errors="replace")
    count = "".join(source.documents()).count("\ufffd")
    assert count and list(source.dropped.values()) == [count]
    assert texts(file, encoding="gb18030") == ["你好世界"]
    assert "--encoding" in refusal(file)
    assert "--encoding" in refusal(file, encoding="no-such")


def test_one_nul_is_text_and_a_binary_file_leaves_the_rest_of_a_folder_alone(tmp_path):
    write(tmp_path / "a.txt", "text with a \0 in it " + "and more " * 100)
    for name, content in (("b.txt", b"\x7fELF\0\0\0" * 10), ("c.txt", "text".encode("utf-16"))):
        assert name in (message := refusal(write(tmp_path / name, content))) and "binary" in message
    source = open_one(tmp_path)
    assert list(source.documents()) == ["text with a \0 in it " + "and more " * 100]
    assert source.skipped.total() == 2


def test_a_line_of_any_length_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "LINE_LIMIT", 2**16)
    bomb = b'{"text": "' + b"x" * 2**24 + b'"}\n'
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' + bomb + b'{"text": "b"}\n'))
    assert "line 2" in (message := refusal(file)) and "longer than" in message
    tracemalloc.start()
    assert texts(file, errors="replace") == ["a", "b"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_a_damaged_gzip_is_refused(tmp_path):
    raw = gzip.compress(os.urandom(1000).hex().encode())
    flipped = raw[:500] + bytes([raw[500] ^ 1]) + raw[501:]
    for damaged in (raw[:-6], raw[:5], raw[1:], flipped):
        assert "a.jsonl.gz" in (message := refusal(write(tmp_path / "a.jsonl.gz", damaged)))
        assert "gzip" in message


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


def test_every_extension_of_the_documentation_is_read_from_a_folder(tmp_path):
    wanted = [e + packed for e in EXTENSIONS if e != ".parquet" for packed in ("", ".gz")]
    for i, suffix in enumerate(wanted):
        line = b"text\nx\n" if ".csv" in suffix or ".tsv" in suffix else b'{"text": "x"}'
        write(tmp_path / f"{i}{suffix}", gzip.compress(line) if suffix.endswith("gz") else line)
    assert len(texts(tmp_path)) == len(wanted)
