"""Reading conversations: every format to the same messages, and one line for what is wrong."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.data import split_conversations
from minillm.errors import InputError
from minillm.io.conversations import (
    ConversationSource,
    conversations_of,
    open_conversations,
    world_conversations,
)
from minillm.world import SHARES, World, assistant, user

ASKED = [user("Why?"), assistant("Because.")]
GOOD = {"messages": ASKED}


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


def open_one(spec: object, **options) -> ConversationSource:
    (source,) = open_conversations([str(spec)], **options)
    return source


def refusal(spec: object, **options) -> str:
    with pytest.raises(InputError) as caught:
        open_one(spec, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- Formats


def tree(role: str, text: str, *replies: dict, **fields) -> dict:
    return {"role": role, "text": text, "replies": list(replies), **fields}


# One of each kind; the rest of the formats is test_formats.py's.
RECORDS = {
    "messages": {"messages": ASKED, "prompt": "Why?"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "Alpaca": {"instruction": "Why?", "input": "", "output": "Because."},
    "Alpaca and a pair": {"instruction": "Why?", "output": "x", "chosen": "Because.", "rejected": "x"},
    "Self-Instruct": {"instruction": "Why?", "instances": [{"input": "", "output": "Because."}]},
    "prompt/completion": {"prompt": "Why?", "completion": " Because."},
    "question/answer": {"question": "Why?", "answer": "Because."},
    "context/answer": {"context": "Why?", "chain_of_thought": "hm", "answer": "Because."},
    "labelled pair": {"input": "Why?", "output_1": "No.", "output_2": "Because.", "label": 2},
    "chosen transcript": {"chosen": "\n\nHuman: Why?\n\nAssistant: Because."},
    "transcript": {"transcript": "Human: Why?\n\nAssistant: Because."},
    "transcript as text": {"text": "\n\nHuman: Why?\n\nAssistant:Because."},
    "OpenAssistant tree": {"prompt": tree("prompter", "Why?", tree("assistant", "Because.", rank=0))},
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_says_the_same(name):
    assert conversations_of(RECORDS[name]) == [ASKED]


def test_a_task_of_several_instances_is_as_many_conversations_each_with_its_input():
    instances = [{"input": "1", "output": "a"}, {"input": "", "output": "b"}, {"output": "c"}]
    found = conversations_of({"instruction": "Do", "instances": instances})
    assert found == [
        [user("Do\n\n1"), assistant("a")],
        [user("Do"), assistant("b")],
        [user("Do"), assistant("c")],
    ]


def test_a_question_about_a_context_carries_it():
    record = {"context": "A cat sat.", "question": "Who sat?", "answer": "A cat."}
    assert conversations_of(record) == [[user("A cat sat.\n\nWho sat?"), assistant("A cat.")]]


texts = st.text("ab :\nHA", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(texts, min_size=1, max_size=6), st.sampled_from(["\n\n", "", "\n"]))
@example(["Human: a", "Assistant: b"], "\n\n")  # a name inside a message opens none
def test_a_transcript_gives_back_its_messages(contents, before):
    messages = [(user, assistant)[i % 2](text) for i, text in enumerate(contents)]
    names = {"user": "Human", "assistant": "Assistant"}
    text = "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in messages)
    expected = messages if len(messages) % 2 == 0 else messages[:-1]
    found = conversations_of({"chosen": before + text})
    assert found == ([expected] if expected else ["conversations without a message of the assistant's"])


def test_a_speaker_who_goes_on_says_one_message():
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c\n\nHuman: d\n\nAssistant: e"
    assert conversations_of({"chosen": text}) == [[user("a"), assistant("b\n\nc"), user("d"), assistant("e")]]


def test_a_text_that_only_mentions_speakers_is_no_transcript():
    for text in ("A play.\n\nHuman: Why?\n\nAssistant: Because.", "", "Humans: x"):
        assert conversations_of({"text": text}) == ["records without a conversation"]


nodes = st.recursive(
    st.just([]),
    lambda deeper: st.lists(st.tuples(st.none() | st.integers(0, 3), deeper), max_size=4),
    max_leaves=12,
)


def grow(children: list, depth: int = 0, name: str = "0") -> dict:
    role = ("prompter", "assistant")[depth % 2]
    replies = [
        {**grow(below, depth + 1, f"{name}.{i}"), **({} if rank is None else {"rank": rank})}
        for i, (rank, below) in enumerate(children)
    ]
    return tree(role, name, *replies)


@given(nodes)
@example([(None, []), (1, []), (0, [(None, [])]), (0, [])])
def test_of_a_tree_every_reply_on_the_path_is_the_best_ranked_then_the_first(children):
    path, level = ["0"], children
    while level:
        ranks = [99 if rank is None else rank for rank, _ in level]
        best = ranks.index(min(ranks))
        path.append(f"{path[-1]}.{best}")
        level = level[best][1]
    path = path[: len(path) // 2 * 2]  # ends with an assistant
    (found,) = conversations_of({"prompt": grow(children)})
    if path:
        assert [message["content"] for message in found] == path
        assert found[-1]["role"] == "assistant"
    else:
        assert isinstance(found, str)


# ---- What is left out


def said(*pairs: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


UNUSABLE = [
    (5, "in no known format"),
    ({}, "in no known format"),
    ({"foo": 1, "instruction": "x"}, "without a message of the assistant's"),
    ({"messages": []}, "without a message of the assistant's"),
    ({"messages": [3]}, "something else"),
    ({"messages": [{"role": "user"}]}, "something else"),
    ({"messages": 3}, "something else"),
    ({"prompt": "a string and no reply"}, "without a message of the assistant's"),
    ({"instruction": 3, "input": "x", "output": "y"}, "something else"),
    ({"instruction": "a", "instances": []}, "without a conversation"),
    ({"input": "a", "output_1": "b", "output_2": "c", "label": 3}, "verdict"),
    (said(("user", "a")), "without a message of the assistant's"),
    (said(("user", "a"), ("assistant", " ")), "empty message"),
    (said(("user", ""), ("assistant", "a")), "empty message"),
    (said(("user", "a"), ("assistant", 3)), "not text"),
    (said(("user", [{"type": "image_url"}]), ("assistant", "a")), "not text"),
    (said(("user", "a"), ("narrator", "b"), ("assistant", "c")), "role"),
    (said(("user", "\ud800"), ("assistant", "a")), "surrogate"),
    ({"instruction": "a", "input": "", "output": ""}, "empty message"),
]


@pytest.mark.parametrize(("record", "reason"), UNUSABLE)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_unusable_record_is_counted_by_reason_and_the_first_is_shown(tmp_path, record, reason, suffix):
    source = open_one(write(tmp_path / f"a{suffix}", [GOOD, record, record, GOOD]))
    for _ in range(2):  # the count is that of one pass
        assert list(source.conversations()) == [ASKED, ASKED]
        (named,) = source.skipped
        assert reason in named and source.skipped[named] == 2
    shown = source.first_skipped
    assert named in shown and "a.json" in shown
    assert ("record 2" if suffix == ".json" else "line 2") in shown
    assert all(field in shown for field in (record if isinstance(record, dict) else ()))
    assert reason in refusal(write(tmp_path / f"none{suffix}", [record]))


def test_of_several_files_the_first_unusable_record_is_shown(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.json", [GOOD, {name: 1}])
    source = open_one(tmp_path)
    assert source.skipped == {"records in no known format": 3}
    assert "a.json" in source.first_skipped and "its fields: a" in source.first_skipped


def test_what_cannot_be_learned_is_left_away_and_a_system_message_of_nothing_too():
    messages = [{"role": "system", "content": ""}, *ASKED, user("Thanks."), user("Bye.")]
    assert conversations_of({"messages": messages}) == [ASKED]
    system = {"role": "system", "content": "Be kind."}
    assert conversations_of({"messages": [system, *ASKED]}) == [[system, *ASKED]]


# ---- Files


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz", "a.JSONL", "noname"])
def test_arrays_and_lines_packed_or_not_hold_the_same_conversations(tmp_path, name):
    records = list(RECORDS.values())
    source = open_one(write(tmp_path / name, records))
    assert list(source.conversations()) == [ASKED] * len(records)
    assert source.fingerprint == open_one(write(tmp_path / "other" / "b.jsonl", records)).fingerprint
    assert (source.name, source.weight) == (name, 1)


def test_whether_a_file_is_an_array_is_read_from_it_and_not_from_its_name(tmp_path):
    lines, array = json.dumps(GOOD) + "\n" + json.dumps(GOOD), json.dumps([GOOD, GOOD], indent=2)
    for name, content in (("a.json", lines), ("a.jsonl", array), ("b.json", "\ufeff \n" + array)):
        assert len(list(open_one(write(tmp_path / name, content)).conversations())) == 2


def test_specs_folders_and_globs_are_those_of_text(tmp_path):
    for name in ("b.json", "a/c.jsonl", "d.txt", ".hidden.json"):
        write(tmp_path / "x" / name, [{"question": name, "answer": "yes"}])
    source = open_one(f"talk={tmp_path}/x:0.5")
    assert (source.name, source.weight) == ("talk", 0.5)
    assert [c[0]["content"] for c in source.conversations()] == ["a/c.jsonl", "b.json"]
    assert source.skipped == {"files of another kind (1 .txt)": 1}
    assert [c[0]["content"] for c in open_one(f"{tmp_path}/x/*.json").conversations()] == ["b.json"]
    with pytest.raises(InputError, match="'x'"):
        open_conversations([f"{tmp_path}/x", f"x={tmp_path}/x"])


def test_a_bad_line_is_refused_by_number_or_skipped_and_counted(tmp_path):
    file = write(tmp_path / "a.jsonl", f"{json.dumps(GOOD)}\n\n{{\n{json.dumps(GOOD)}\n")
    assert "line 3" in refusal(file)
    source = open_one(file, errors="replace")
    assert len(list(source.conversations())) == 2
    assert source.skipped == {"lines that do not parse": 1}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", '[{"a": 1}, ', "whole"),
        ("a.json", "[" * 100_000, "whole"),
        ("a.json", "[]", "no record"),
        ("a.jsonl", "\n \n", "no record"),
        ("a.jsonl", '{"text": "only text"}\n', "its fields: text"),
        ("a.jsonl", "[1]\nrest", "line 2"),
        ("a.jsonl", "5\n", "no JSON object"),
        ("a.json", b"[\xff]", "byte 1"),
        ("a.json", "", "empty files: 1"),
        ("a.json", b"\0\1\2", "binary"),
        ("a.json", b"PAR1 and so on", "Parquet"),
    ],
)
def test_a_file_without_a_conversation_is_refused_by_name(tmp_path, name, content, named):
    message = refusal(write(tmp_path / name, content))
    assert name in message and named in message


def test_one_file_without_a_conversation_is_refused_among_good_ones(tmp_path):
    write(tmp_path / "a.json", [GOOD])
    write(tmp_path / "b.json", [{"other": 1}])
    assert "b.json" in refusal(tmp_path)


def test_lines_are_read_one_at_a_time(tmp_path):
    line = json.dumps({"question": "w" * 5000, "answer": "w" * 5000}) + "\n"
    file = write(tmp_path / "a.jsonl", line * 1000)
    tracemalloc.start()
    source = open_one(file)
    count = sum(1 for _ in source.conversations())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000 and peak < file.stat().st_size / 20


def test_a_fingerprint_follows_the_conversations_and_their_order(tmp_path):
    other = {"question": "Who?", "answer": "I."}
    contents = [[GOOD], [other], [GOOD, other], [other, GOOD], [GOOD, GOOD]]
    files = [write(tmp_path / f"{i}.json", content) for i, content in enumerate(contents)]
    assert len({open_one(file).fingerprint for file in files}) == len(contents)
    assert (
        open_one(write(tmp_path / "more.json", [{"no": 1}, GOOD])).fingerprint
        == open_one(files[0]).fingerprint
    )


# ---- Real data and the little world

REAL = {
    "instructions/bigbench_qa_wikidata.jsonl": (20_321, 0),
    "instructions/instruction-data-with-preference.json": (1_100, 0),
    "instructions/instruction-data.json": (1_100, 0),
    "instructions/seed_tasks.jsonl": (175, 0),
    "instructions/simple_arithmetic_withspaces.jsonl": (1_000, 0),
    "instructions/svamp.jsonl": (300, 0),
    "instructions/user_oriented_instructions.jsonl": (252, 0),
    # Four end with an assistant who says nothing; one of them had said something before.
    "preferences/hh_rlhf_harmless_test.jsonl.gz": (2_309, 4),
    "preferences/llmbar_Adversarial_Manual.json": (46, 0),
    "preferences/llmbar_Adversarial_Neighbor.json": (134, 0),
    "preferences/llmbar_Natural.json": (100, 0),
    "rankings/oasst_en_100_tree.jsonl": (100, 0),
}


@pytest.mark.parametrize("file", REAL)
def test_published_data_is_read_in_full(shared_data, file):
    source = open_one(shared_data / file)
    conversations = list(source.conversations())
    assert (len(conversations), source.skipped.total()) == REAL[file]
    assert all(conversation[-1]["role"] == "assistant" for conversation in conversations)
    roles = {message["role"] for conversation in conversations for message in conversation}
    assert roles == {"user", "assistant"}


def test_the_little_world_speaks_in_the_same_form():
    world = World(0)
    source = world_conversations(world, "train", 50)
    conversations = list(source.conversations())
    assert (
        conversations
        == [c.messages for c in world.conversations("train", 50)]
        == list(source.conversations())
    )
    assert source.name not in SHARES  # so that it can be mixed with the world's text
    assert [conversations_of({"messages": messages}) for messages in conversations] == [
        [messages] for messages in conversations
    ]
    others = [world_conversations(world, "dev", 50), world_conversations(World(1), "train", 50)]
    assert source.fingerprint not in {other.fingerprint for other in others}


# ---- Train and validation


def a_source(conversations: list) -> ConversationSource:
    return ConversationSource("s", 1.0, lambda: iter(conversations), "f")


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [user(question), assistant(answer)]


words = st.text("abc", min_size=1, max_size=2)
exchanges = st.lists(st.builds(exchange, words, words), max_size=30)
fractions = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99])


@given(exchanges, fractions)
@example([exchange("a", "a"), exchange("a", "b")], 0.01)
@example([exchange("a", "a")] * 2, 0.5)
def test_the_split_keeps_every_conversation_and_no_question_on_two_sides(conversations, fraction):
    parts = list(split_conversations(a_source(conversations), fraction))
    assert [conversation for _, conversation in parts] == conversations
    sides = {"train": set(), "val": set()}
    questions = {"train": set(), "val": set()}
    for side, (question, answer) in parts:
        sides[side].add((question["content"], answer["content"]))
        questions[side].add(question["content"])
    assert not sides["train"] & sides["val"]
    every = sides["train"] | sides["val"]
    assert bool(sides["val"]) == (fraction > 0 and len(every) > 1)
    assert bool(sides["train"]) == bool(every)
    if len(questions["train"] | questions["val"]) > 1:
        assert not questions["train"] & questions["val"]


def test_a_question_stays_on_one_side_whatever_the_system_message_before_it():
    conversations = [[{"role": "system", "content": f"{i}"}, *exchange(f"{i % 7}", "yes")] for i in range(70)]
    sides = {"train": set(), "val": set()}
    for side, messages in split_conversations(a_source(conversations), 0.5):
        sides[side].add(messages[1]["content"])
    assert sides["train"] and sides["val"] and not sides["train"] & sides["val"]


@given(exchanges, fractions, st.randoms(use_true_random=False))
def test_the_side_of_a_conversation_does_not_depend_on_the_order(conversations, fraction, random):
    def key(parts):
        return sorted((side, json.dumps(conversation)) for side, conversation in parts)

    shuffled = random.sample(conversations, len(conversations))
    expected = key(split_conversations(a_source(conversations), fraction))
    assert key(split_conversations(a_source(shuffled), fraction)) == expected


def test_about_the_fraction_asked_for_goes_to_validation():
    # The hash is fixed, so this either always holds or never; 4 standard deviations.
    conversations = [exchange(str(i), "yes") for i in range(10_000)]
    sides = [side for side, _ in split_conversations(a_source(conversations), 0.1)]
    assert abs(sides.count("val") / 10_000 - 0.1) < 4 * (0.1 * 0.9 / 10_000) ** 0.5


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(InputError, match="fraction"):
        list(split_conversations(a_source([ASKED]), fraction))
