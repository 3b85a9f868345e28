"""Files of conversations, prompts and rankings: the same however they are held, or one line why not."""

import gzip
import json
import re
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.chat import Dialogue
from minillm.corpus import Source, encode_source
from minillm.errors import InputError
from minillm.io.conversations import (
    open_conversations,
    rankings_of_file,
    read_all,
    world_conversations,
)
from minillm.io.formats import read_record
from minillm.preferences import Ranking
from minillm.world import SHARES, World, assistant, user

ASKED = [user("Why?"), assistant("Because.")]
GOOD = {"messages": ASKED}
PAIR = {"prompt": "Why?", "chosen": "b", "rejected": "a"}


def write(path: Path, content: object) -> Path:
    """A file of text, or of a list of records: as an array in .json, else as lines."""
    if isinstance(content, list):
        lines = [json.dumps(record) for record in content]
        array = ".json" in path.suffixes
        content = "[" + ",\n".join(lines) + "]" if array else "\n".join(lines)
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def open_one(spec: object, **options) -> Source:
    (source,) = open_conversations([str(spec)], **options)
    return source


def conversations_of(specs: list[str], **options) -> list:
    return [held for source in open_conversations(specs, **options) for held in source.documents()]


rankings_of = partial(read_all, purpose="ranking")


def refusal(spec: object, opener=conversations_of) -> str:
    with pytest.raises(InputError) as caught:
        opener([str(spec)])
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- Files


QA = {"prompt": "Why?", "completion": "Because."}
LINES = [json.dumps(GOOD), json.dumps({"instruction": "Why?", "input": "", "output": "Because."})]
HELD = [
    *((name, "\n".join(LINES), 2) for name in ("a.jsonl", "a.jsonl.gz", "a.JSONL", "noname")),
    *((name, f"[{LINES[0]},\n{LINES[1]}]", 2) for name in ("a.json", "a.json.gz", "noname")),
    ("a.json", json.dumps(ASKED) + "\n" + json.dumps(ASKED), 2),
    ("a.json", json.dumps(ASKED), 1),
    ("a.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD), 2),
    ("a.jsonl", json.dumps([GOOD, GOOD], indent=2), 2),
    ("a.json", "\ufeff \n" + json.dumps([GOOD, GOOD], indent=2), 2),
    ("a.json", json.dumps([GOOD]) + "\n" + json.dumps([GOOD] * 2), 3),
    ("a.json", json.dumps({"version": 1, "data": [QA] * 2}, indent=2), 2),
    ("a.json", json.dumps({"rows": [GOOD] * 2}), 2),
    ("a.json", json.dumps(GOOD, indent=1) + "\n" + json.dumps(GOOD, indent=1), 2),
    ("noname", json.dumps(ASKED) + "\n" + json.dumps(ASKED), 2),
    ("a.ndjson", json.dumps(QA), 1),
    ("a.csv", "\ufeffid,instruction,output\r\n1,Why?,Because.\r\n2,Why?,Because.\r\n", 2),
    ("a.tsv", "question\tanswer\nWhy?\tBecause.\n", 1),
    ("a.json", json.dumps({"prompt": ["Why?"] * 2, "completion": ["Because."] * 2, "id": [1, 2]}), 2),
    ("a.json", json.dumps({"conversations": [ASKED] * 3, "id": [1, 2, 3]}), 3),
    ("a.json", json.dumps({"dialog": ["Why?", "Because."], "act": [3, 4]}), 1),
    ("a.jsonl", json.dumps({"id": "x" * 70_000, **GOOD}) + "\n" + json.dumps(GOOD), 2),
    ("a.json", json.dumps({"rows": [{"id": "x" * 70_000, **GOOD}, GOOD]}), 2),
]


@pytest.mark.parametrize(("name", "content", "count"), HELD)
def test_records_are_found_however_a_file_holds_them(tmp_path, name, content, count):
    source = open_one(write(tmp_path / name, content))
    assert list(source.documents()) == [ASKED] * count and not source.skipped
    assert (source.name, source.weight) == (name, 1)


def test_a_table_without_a_conversation_is_counted_where_other_files_of_its_folder_have_some(tmp_path):
    write(tmp_path / "chats.jsonl", '{"question": "Why?", "answer": "Because."}\n')
    write(tmp_path / "prices.csv.gz", "name,price\ntea,3\n")
    (source,) = open_conversations([str(tmp_path)])
    assert len(list(source.documents())) == 1
    assert source.skipped == {"tables without a conversation": 1, "records in no known format": 1}
    (tmp_path / "chats.jsonl").unlink()
    with pytest.raises(InputError, match=r"prices\.csv\.gz' holds no conversation"):
        list(open_conversations([str(tmp_path)])[0].documents())


@pytest.mark.parametrize("encoding", ["utf-16", "gb18030"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_conversations_in_another_encoding_are_read_where_it_is_named(tmp_path, name, encoding):
    text = "question, answer\n为什么?, 因为.\n" * 2 if name == "a.csv" else json.dumps(
        [{"question": "为什么?", "answer": "因为."}], ensure_ascii=False)  # fmt: skip
    file = write(tmp_path / name, (text[1:-1] if name == "a.jsonl" else text).encode(encoding))
    assert "convert it" in refusal(file)
    (source,) = open_conversations([str(file)], encoding=encoding)
    assert [m["content"] for m in next(source.documents())] == ["为什么?", "因为."]


def test_specs_folders_and_globs_are_those_of_text(tmp_path):
    for name in ("b.json", "a/c.jsonl", "d.txt", ".hidden.json"):
        write(tmp_path / "x" / name, [{"question": name, "answer": "yes"}])
    write(tmp_path / "x" / "e.csv", "question,answer\ne.csv,yes\n")
    source = open_one(f"talk={tmp_path}/x:0.5")
    assert (source.name, source.weight) == ("talk", 0.5)
    assert [c[0]["content"] for c in source.documents()] == ["a/c.jsonl", "b.json", "e.csv"]
    assert source.skipped == {"files of another kind (1 .txt)": 1}
    assert [c[0]["content"] for c in open_one(f"{tmp_path}/x/*.json").documents()] == ["b.json"]
    with pytest.raises(InputError, match="'x'"):
        open_conversations([f"{tmp_path}/x", f"x={tmp_path}/x"])


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", '[{"a": 1}, ', "whole"),
        ("a.json", "[" * 100_000, "whole"),
        ("a.json", "[]", "no record"),
        ("a.jsonl", "\n \n", "no record"),
        ("a.jsonl", '{"text": "only text"}\n', "its fields: text"),
        ("a.jsonl", "[1]\nrest", "line 2"),
        ("a.jsonl", json.dumps(GOOD) + "\n\n{\n", "line 3"),
        ("a.jsonl", "5\n", "no JSON object"),
        *(
            (
                name,
                '{"prompt": "Why?", "completion": "a", "meta": {"id": 1, "id": 2}}' + more,
                "field 'id' twice",
            )
            for name, more in (("a.jsonl", "\n{}"), ("a.json", ""), ("noname", "\n{}"), ("noname", ""))
        ),
        ("a.json", b"[\xff]", "byte 1"),
        ("a.json", "", "empty files: 1"),
        ("a.json", json.dumps({"system": "Be kind.", "rows": [QA]}), "its fields: system, rows"),
        ("a.json", b"\0\1\2", "binary"),
        ("a.json", b"PAR1 and so on", "Parquet"),
        ("a.json", b"PK\3\4 and so on", "zip"),
        ("a.jsonl.bz2", b"BZh91AY&SY and so on", "bzip2"),
        ("a.jsonl.xz", b"\xfd7zXZ\0 and so on", "xz"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.txt", "Why? Because.", "as JSON"),
        ("a.csv", "prompt,completion\nWhy?,Because, and so on.\n", "values_without_a_column"),
        ("a.csv", "prompt,completion,completion\nWhy?,Because.,No.\n", "'completion' is the name of two"),
        *(
            ("a.csv", f'prompt,completion\n"Why?,Because.\n{rest}', "as a table")
            for rest in ("", '"Who?,It.\n')
        ),
    ],
)
def test_a_file_without_a_conversation_is_refused_by_name(tmp_path, name, content, named):
    message = refusal(write(tmp_path / name, content))
    assert name in message and named in message
    write(tmp_path / "b.json", [GOOD])
    if content and name.endswith((".json", ".jsonl")):
        assert named in refusal(tmp_path), "among good ones, too"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_left_out_is_counted_by_reason_and_the_first_is_shown(tmp_path, suffix):
    unusable = {"title": 1, "text": "x"}
    source = open_one(write(tmp_path / f"a{suffix}", [GOOD, unusable, unusable, {"messages": []}, GOOD]))
    for _ in range(2):  # the count is that of one pass
        assert list(source.documents()) == [ASKED, ASKED]
        assert list(source.skipped.values()) == [2, 1]
    place, fields = "record 2" if suffix == ".json" else "line 2", "its fields: title, text"
    for words in (place, f"a{suffix}", fields, *source.skipped):
        assert words in source.skipped.first or words.startswith("conversations")
    write(tmp_path / f"0{suffix}", [GOOD, {"other": 1}])
    both = open_one(tmp_path)
    assert len(list(both.documents())) == 3
    assert both.skipped["records in no known format"] == 1 and f"0{suffix}" in both.skipped.first


def test_lines_are_read_one_at_a_time_and_one_that_does_not_parse_is_skipped_where_asked_for(tmp_path):
    line = json.dumps({"question": "w" * 5000, "answer": "w" * 5000}) + "\n"
    file = write(tmp_path / "a.jsonl", line + "\n{\n" + line * 999)
    assert "line 3" in refusal(file)
    tracemalloc.start()
    source = open_one(file, errors="replace")
    count = sum(1 for _ in source.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000 and peak < file.stat().st_size / 20
    assert source.skipped == {"lines that do not parse": 1}


@pytest.mark.parametrize(
    ("opener", "record", "words"),
    [
        (conversations_of, {"instruction": "x", "id": 1}, ("instruction, id", "an answer", "output")),
        (
            conversations_of,
            {"messages": [ASKED[0], {**ASKED[1], "content": ""}]},
            ("fields: messages; known",),
        ),
        (conversations_of, {"foo": 1, "rejected": "x"}, ("foo, rejected", "chosen and rejected", "chosen")),
        (rankings_of, {"prompt": "x", "chosen": "y"}, ("prompt, chosen", "lacks rejected")),
        (rankings_of, {**QA, "label": True}, ("judged one by one", "known formats")),
        (partial(conversations_of, purpose="prompt"), {"name": "x"}, ("name", "messages", "conversations")),
    ],
)
def test_a_file_of_nothing_usable_is_told_its_fields_and_the_nearest_format(tmp_path, opener, record, words):
    message = refusal(write(tmp_path / "x.jsonl", [record]), opener)
    assert all(word in message for word in words), message


# ---- Prompts and rankings


def test_prompts_and_rankings_are_opened_as_such(tmp_path, capsys):
    records = [PAIR, {**QA, "label": True}, {**QA, "label": False, "completion": "No."}, {"id": 1}]
    path = str(write(tmp_path / "p.jsonl", records))
    (source,) = open_conversations([path], purpose="prompt")
    assert list(source.documents()) == [ASKED[:1]] * 3
    rankings = rankings_of([f"friends={path}"])
    assert [ranking.responses for ranking in rankings] == [["b", "a"], ["Because.", "No."]]
    assert [ranking.annotator for ranking in rankings] == ["friends"] * 2
    said, left_out, first = capsys.readouterr().out.splitlines()
    assert (said, left_out) == ("friends: 2 rankings", "  left out or cut: 1 records in no known format")
    assert first.startswith("  the first: line 4 of ") and source.skipped == {"records in no known format": 1}
    for opener in (rankings_of, partial(open_conversations, purpose="prompt")):
        with pytest.raises(InputError, match="no weight"):
            opener([f"{path}:2"])


def test_replies_rated_one_by_one_are_compared_where_their_prompts_repeat(tmp_path, capsys):
    rows = [("Why?", "a", False), ("Who?", "x", True), ("Why?", "b", True), ("Why?", "c", False)]
    records = [{"prompt": question, "completion": reply, "label": label} for question, reply, label in rows]
    (ranking,) = rankings_of([str(write(tmp_path / "a.jsonl", records))])
    assert (ranking.responses, ranking.ranking) == (["a", "b", "c"], [[1], [0, 2]])
    assert "1 replies judged one by one, each alone with its prompt" in capsys.readouterr().out


def test_rankings_may_be_anybodys_file_of_preferences_or_ours(tmp_path, capsys):
    theirs = rankings_of_file(str(write(tmp_path / "pairs.jsonl", [PAIR, {"id": 1}])))
    assert [ranking.responses for ranking in theirs] == [["b", "a"]]
    assert "1 rankings" in capsys.readouterr().out
    for several in (tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/pair?.jsonl", f"{tmp_path}/pair[s].jsonl"):
        assert [ranking.key for ranking in rankings_of_file(str(several))] == [theirs[0].key]
    ours = rankings_of_file(str(write(tmp_path / "rankings.jsonl", [vars(theirs[0])])))
    assert [ranking.key for ranking in ours] == [theirs[0].key]
    with pytest.raises(InputError, match=r"no such file or folder: .*missing\.jsonl"):
        rankings_of_file(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("names", "numbers", "best"),
    [
        ("12", (1, 0, 1), "bab"), ("12", (1, 2, 1), "aba"), ("12", (0, 0), "aa"), ("12", (1, 1), None),
        ("01", (1, 0, 1), "bab"), ("01", (1, 2, 1), "aba"), ("01", (1, 1), None), ("ab", (1, 0), "ba"),
        ("12", (0, 1, 2), None), ("12", (0, 2), None), ("123", (0, 2), "ac"), ("34", (3, 4), "ab"),
        ("", (0, 2), "ac"), ("", (1, 3), "ac"), ("", (1, 2), None), ("", (0, 3), None),
    ],
)  # fmt: skip
def test_a_number_calls_a_reply_as_the_others_of_its_file_count_them_or_is_left_out(
    tmp_path, names, numbers, best
):
    replies = {f"response_{name}": text for name, text in zip(names, "abc", strict=False)}
    replies = replies or {"answers": ["a", "b", "c"]}
    records = [{"prompt": f"{i}?", **replies, "label": number} for i, number in enumerate(numbers)]
    for name in ("a.json", "a.jsonl"):
        file = str(write(tmp_path / name, records))
        if best is None:
            assert all("from 0 or from 1" in refusal(file, by) for by in (conversations_of, rankings_of))
            continue
        rankings = rankings_of([file])
        assert "".join(one.responses[one.ranking[0][0]] for one in rankings) == best
        assert "".join(said[1]["content"] for said in conversations_of([file])) == best


def test_a_winner_that_no_other_contradicts_is_the_reply_of_that_name(tmp_path):
    record = {"prompt": "Why?", "response_1": "Because.", "response_2": "No.", "winner": 1}
    assert conversations_of([str(write(tmp_path / "a.jsonl", [record] * 2))]) == [ASKED] * 2


# ---- Real data and the little world

REAL = {  # conversations and what is left out of them; the same of rankings, where the file holds some
    "instructions/instruction-data-with-preference.json": (1_100, 0, 1_094, 6),
    "instructions/instruction-data.json": (1_100, 0),
    "instructions/seed_tasks.jsonl": (175, 0),
    "instructions/simple_arithmetic_withspaces.jsonl": (1_000, 0),
    "instructions/svamp.jsonl": (300, 0),
    "instructions/user_oriented_instructions.jsonl": (252, 0),
    # Four end with an assistant who says nothing; one of them had said something before.
    "preferences/hh_rlhf_harmless_test.jsonl.gz": (2_309, 4, 2_308, 4),
    "preferences/llmbar_Adversarial_Manual.json": (46, 0, 46, 0),
    "preferences/llmbar_Adversarial_Neighbor.json": (134, 0, 134, 0),
    "preferences/llmbar_Natural.json": (100, 0, 100, 0),
    "rankings/oasst_en_100_tree.jsonl": (100, 0, 212, 0),
}


@pytest.mark.parametrize("file", REAL)
def test_published_data_is_read_in_full(shared_data, capsys, file):
    source = open_one(shared_data / file)
    conversations = list(source.documents())
    found = [len(conversations), source.skipped.total()]
    assert all(conversation[-1]["role"] == "assistant" for conversation in conversations)
    roles = {message["role"] for conversation in conversations for message in conversation}
    assert roles == {"user", "assistant"}
    if len(REAL[file]) > 2:
        rankings = rankings_of([str(shared_data / file)])
        left_out = re.findall(r"left out or cut: ([\d,]+)", capsys.readouterr().out)
        found += [len(rankings), sum(int(count.replace(",", "")) for count in left_out)]
        for ranking in rankings:
            assert isinstance(ranking, Ranking) and ranking.messages[-1]["role"] == "user"
            assert 2 <= len(ranking.responses) <= 9 and ranking.pairs()
    assert tuple(found) == REAL[file]


def test_the_little_world_speaks_in_the_same_form():
    world = World(0)
    source = world_conversations(world, "train", 50)
    conversations = list(source.documents())
    expected = [conversation.messages for conversation in world.conversations("train", 50)]
    assert conversations == expected == list(source.documents())
    assert source.name not in SHARES  # so that it can be mixed with the world's text
    assert [next(read_record({"messages": said}, "conversation")) for said in conversations] == conversations


# ---- Train and validation


def a_source(conversations: list) -> Source:
    return Source("s", 1.0, lambda: iter(conversations))


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [user(question), assistant(answer)]


words = st.text("abc", min_size=1, max_size=2)
exchanges = st.lists(st.builds(exchange, words, words), max_size=30)
fractions = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99])


def split(conversations: list, fraction: float) -> dict[str, list]:
    """The conversations of each side, as encode_source splits them."""

    def encode(conversation: list) -> Dialogue:
        return Dialogue([numbers[json.dumps(conversation)]] * 2, [True] * 2)

    texts = list(map(json.dumps, conversations))
    numbers = {text: i for i, text in enumerate(texts)}
    if not conversations:
        return {"train": [], "val": []}
    source = encode_source(a_source(conversations), encode, 4, fraction)
    parts = {"train": source.train, "val": source.val}
    return {side: [json.loads(texts[ids[0]]) for ids, _ in own] for side, own in parts.items()}


@given(exchanges, fractions, st.randoms(use_true_random=False))
@example([exchange("a", "a"), exchange("a", "b")], 0.01, Random(0))
@example([exchange("a", "a")] * 2, 0.5, Random(0))
@example([[{"role": "system", "content": str(i)}, *exchange(str(i % 7), "yes")] for i in range(70)], 0.5,
         Random(0))  # fmt: skip
def test_the_split_keeps_every_conversation_and_no_question_on_two_sides_in_whatever_order(
    conversations, fraction, random
):
    parts = split(conversations, fraction)
    assert Counter(map(json.dumps, parts["train"] + parts["val"])) == Counter(map(json.dumps, conversations))
    side_of = {json.dumps(conversation[-2:]): side for side in parts for conversation in parts[side]}
    assert all(side_of[json.dumps(one[-2:])] == side for side in parts for one in parts[side])
    sides = set(side_of.values())
    assert ("val" in sides) == (fraction > 0 and len(side_of) > 1) and ("train" in sides) == bool(side_of)
    questions = {side: {c[-2]["content"] for c in parts[side]} for side in parts}
    if len(questions["train"] | questions["val"]) > 1:
        assert not questions["train"] & questions["val"]
    shuffled = random.sample(conversations, len(conversations))
    for side, own in split(shuffled, fraction).items():
        assert all(side_of[json.dumps(conversation[-2:])] == side for conversation in own)


def test_about_the_fraction_asked_for_goes_to_validation():
    # The hash is fixed, so this either always holds or never; 4 standard deviations.
    conversations = [exchange(str(i), "yes") for i in range(10_000)]
    held_out = split(conversations, 0.1)["val"]
    assert abs(len(held_out) / 10_000 - 0.1) < 4 * (0.1 * 0.9 / 10_000) ** 0.5
