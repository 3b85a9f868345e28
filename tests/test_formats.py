"""Other people's records: read whole, or left out with a reason that names what was not understood."""

import json
from pathlib import Path

import pytest

from minillm.errors import InputError
from minillm.io.comparisons import comparisons_of, open_comparisons, rankings_of_file
from minillm.io.conversations import conversations_of, open_conversations, open_prompts
from minillm.preferences import Ranking

USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be kind."}
ASKED, EARLIER = [USER, BOT], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
TOOL = {"role": "tool", "content": "42"}


def turns(*pairs: tuple[str, object], **fields: object) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **fields}


CONVERSATIONS = [
    # the roles and contents of chats
    (turns(("developer", "Be kind."), ("user", "Why?"), ("model", "Because.")), [SYSTEM, *ASKED]),
    (turns(("user", [{"type": "text", "text": "Why?"}]), ("assistant", ["Because."])), ASKED),
    ({"messages": [{"from": "human", "value": "Why?"}, {"from": "chatgpt", "value": "Because."}]}, ASKED),
    ({"conversations": ASKED}, ASKED),
    ({"conversation": [{"input": "Why?", "output": "Because."}]}, ASKED),
    (ASKED, ASKED),
    ({"id": 1, "data": ["Why?", "Because."]}, ASKED),
    ({"conversations": ["Why?", "Because."], "source": "lima"}, ASKED),
    ({"messages": [USER, {**BOT, "weight": 1, "tool_calls": None}]}, ASKED),
    ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "Because."}]}, ASKED),
    ({"messages": [USER, {**BOT, "reasoning_content": "hm"}]},
     [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."}]),
    ({"messages": [{**EARLIER[0]}, {**EARLIER[1], "weight": 0}, *ASKED]},
     [EARLIER[0], {**EARLIER[1], "train": False}, *ASKED]),
    ({"messages": ASKED, "prompt": "Why?", "prompt_id": "7"}, ASKED),
    ({"messages": [USER], "answer": "Because."}, ASKED),
    # what stands beside the turns
    ({"system": "Be kind.", "messages": ASKED}, [SYSTEM, *ASKED]),
    ({"system": None, "tools": [], "messages": ASKED}, ASKED),
    ({"system_prompt": "Be kind.", "question": "Why?", "response": "Because."}, [SYSTEM, *ASKED]),
    ({"instruction": "Why?", "output": "Because.", "system": "Be kind.", "history": [["Hi", "Hello"]]},
     [SYSTEM, *EARLIER, *ASKED]),
    # a question and an answer
    *(({q: "Why?", a: "Because."}, ASKED) for q, a in (
        ("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("query", "response"),
        ("input", "output"), ("question", "answer"), ("inputs", "targets"), ("problem", "solution"),
        ("Question", "Answer"), ("context", "continuation"), ("instruction", "output"))),
    ({"problem": "Why?", "solution": "Because.", "answer": "cause"}, ASKED),
    ({"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"}, ASKED),
    ({"prompt": [USER], "completion": [BOT]}, ASKED),
    ({"prompt": [USER], "completion": [BOT], "label": True}, ASKED),
    ({"text": "### Human: Why?### Assistant: Because."}, ASKED),
    ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "response": " Because."}, ASKED),
    # of a preference, what is preferred
    ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, ASKED),
    ({"conversations": [*EARLIER, USER], "chosen": {"from": "gpt", "value": "Because."}, "rejected": BOT},
     [*EARLIER, *ASKED]),
    ({"prompt": "Why?", "completions": [{"text": "No", "rating": 1}, {"text": "Because.", "rating": 5}]},
     ASKED),
    # what cannot be learned
    ({"messages": [*ASKED, {"role": "user", "content": "So?"}, {"role": "assistant", "content": ""}]}, ASKED),
    ({"messages": [*ASKED, USER, CALL, TOOL, BOT]}, ASKED),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), CONVERSATIONS)
def test_a_record_is_the_conversation_it_says(record, expected):
    assert conversations_of(record)[0] == expected


@pytest.mark.parametrize("text", ["    y = x\n    return y\n", "\n\nx", "x \n"])
def test_the_white_space_of_a_completion_is_kept(text):
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        assert conversations_of({question: "def f(x):\n", answer: text})[0][1]["content"] == text


LEFT_OUT = [
    ({"messages": ASKED, "tools": [{"name": "search"}]}, "'tools'"),
    ({"messages": ASKED, "prompt": "Who?"}, "'prompt'"),
    ({"messages": ASKED, "images": ["a.png"]}, "'images'"),
    ({"messages": [SYSTEM, *ASKED], "system": "Be rude."}, "two system messages"),
    ({"prompt": "Why?", "completion": "Because.", "label": False}, "judged bad"),
    ({"prompt": "Why?", "response": "Because.", "helpfulness": 0, "verbosity": 2}, "judged bad"),
    ({"prompt": "Why?", "response": "Because.", "label": "spam"}, "'label'"),
    ({"messages": [USER, {**BOT, "weight": 0}]}, "weight 0"),
    ({"messages": [USER, {**BOT, "weight": 0.5}]}, "weight"),
    ({"messages": [USER, CALL, TOOL, BOT]}, "tool call"),
    ({"instruction": "What is it?\n<image>", "output": "A cat."}, "image"),
    ({"prompt": "Why?", "response": "Because.", "output": "No."}, "'response'"),
    ({"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "chosen_rating": 1, "rejected_rating": 2},
     "contradict"),
    ({"conversations": ASKED, "chosen": "Other.", "rejected": "No."}, "two replies"),
    ({"prompt": "Why?", "completion": "Because.", "weight": 0.5}, "'weight'"),
    ({"question": "Why?", "answers": {"text": ["x"], "answer_start": [0]}}, "rated|something else"),
    ({"prompt": "Who?", "chosen": ASKED, "rejected": [USER, {**BOT, "content": "No."}]}, "another prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason"), LEFT_OUT)
def test_a_field_that_changes_what_a_record_says_is_obeyed_or_the_record_is_left_out(record, reason):
    (why,) = conversations_of(record)
    assert isinstance(why, str) and any(word in why for word in reason.split("|")), why


PROMPTS = [
    ({"prompt": "Why?"}, [USER]),
    ({"prompt": [USER]}, [USER]),
    ({"messages": [*EARLIER, USER]}, [*EARLIER, USER]),
    ({"messages": [*EARLIER, *ASKED]}, [*EARLIER, USER]),
    ({"instruction": "Why?", "input": ""}, [USER]),
    ({"question": "Why?", "answer": "Because."}, [USER]),
    ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [USER]),
    ([USER], [USER]),
]


@pytest.mark.parametrize(("record", "expected"), PROMPTS)
def test_a_prompt_is_all_that_is_asked_and_no_earlier_question(record, expected):
    assert conversations_of(record, "prompt") == [expected]


def chat(reply: str) -> list[dict]:
    return [USER, {"role": "assistant", "content": reply}]


RANKINGS = [
    ({"prompt": "Why?", "chosen": "b", "rejected": "a"}, "b > a"),
    ({"chosen": chat("b"), "rejected": chat("a")}, "b > a"),
    ({"prompt": "Why?", "chosen": chat("b"), "rejected": chat("a"), "messages": chat("b"), "score_chosen": 9.0,  # noqa: E501
      "score_rejected": 2.0}, "b > a"),
    ({"prompt": [USER], "chosen": chat("b")[1:], "rejected": chat("a")[1:]}, "b > a"),
    ({"input": {"messages": [USER]}, "preferred_output": chat("b")[1:], "non_preferred_output": chat("a")[1:]},  # noqa: E501
     "b > a"),
    ({"prompt": "Why?", "chosen": "b", "rejected": "a", "chosen_score": 3, "rejected_score": 3}, "b = a"),
    ({"instruction": "Why?", "input": "", "output_1": "a", "output_2": "b", "preference": 2}, "b > a"),
    ({"prompt": "Why?", "response_a": "a", "response_b": "b", "winner": "B"}, "b > a"),
    ({"prompt": "Why?", "response_a": "a", "response_b": "b", "winner": "tie"}, "a = b"),
    ({"conversation_a": chat("a"), "conversation_b": chat("b"), "winner": "model_b"}, "b > a"),
    ({"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 1}, "b > a"),
    ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": 3}, "b > a"),
    ({"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -2}, "a > b"),
    ({"question": "Why?", "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}, "b > a"),
    ({"post": "Why?", "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "b > a"),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [1, 2.5, 1]}, "b > a = c"),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}, "b > c > a"),
    ({"messages": [USER], "responses": ["a", "b"], "ranking": [[1], [0]], "seed": 0}, "b > a"),
    ({"instruction": "Why?", "models": ["x"], "completions": [
        {"response": "a", "overall_score": 4}, {"response": "b", "overall_score": 7.5},
        {"response": "c", "overall_score": 4}]}, "b > a = c"),
    ({"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": [
        {"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]},
     "b > a"),
]  # fmt: skip


def spelled(ranking: Ranking) -> str:
    return " > ".join(" = ".join(ranking.responses[i] for i in tied) for tied in ranking.ranking)


@pytest.mark.parametrize(("record", "expected"), RANKINGS)
def test_a_record_is_the_ranking_it_says(record, expected):
    (ranking,) = comparisons_of(record, "x")
    assert not isinstance(ranking, str), ranking
    assert spelled(ranking) == expected and ranking.messages == [USER]


NO_RANKINGS = [
    ({"prompt": "Why?", "response_a": "a", "response_b": "b", "winner": "c"}, "verdict"),
    ({"prompt": "Why?", "response_a": "a", "response_b": "b", "label": 1}, "verdict"),
    ({"prompt": "Why?", "response_a": "a", "response_b": "b"}, "no verdict"),
    ({"prompt": "Why?", "responses": ["a", "b"]}, "no two rated"),
    ({"prompt": "Why?", "completion": "a"}, "nothing that compares"),
    ({"prompt": "Why?", "completion": "a", "label": True}, "judged one by one"),
    ({"prompt": "Why?"}, "without a reply"),
]


@pytest.mark.parametrize(("record", "reason"), NO_RANKINGS)
def test_what_ranks_nothing_is_left_out_for_what_it_is(record, reason):
    (why,) = comparisons_of(record, "x")
    assert isinstance(why, str) and reason in why


def lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def judged(question: str, reply: str, label: object) -> dict:
    return {"prompt": question, "completion": reply, "label": label}


def test_replies_judged_one_by_one_are_compared_where_their_prompts_repeat(tmp_path):
    rows = [
        judged("Why?", "a", False),
        judged("Who?", "x", True),
        judged("Why?", "b", True),
        judged("Why?", "c", False),
    ]
    (source,) = open_comparisons([lines(tmp_path / "kto.jsonl", *rows)])
    assert [spelled(ranking) for ranking in source.rankings] == ["b > a = c"]
    assert source.skipped.total() == 1 and "each alone" in source.first_skipped
    with pytest.raises(InputError, match="judged one by one"):
        open_comparisons([lines(tmp_path / "none.jsonl", rows[0], rows[1])])
    (source,) = open_conversations([lines(tmp_path / "good.jsonl", *rows)])
    assert len(list(source.conversations())) == 2 and source.skipped.total() == 2


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (json.dumps(ASKED) + "\n" + json.dumps(ASKED), 2),
        (json.dumps(ASKED), 1),
        (json.dumps([{"messages": ASKED}] * 3), 3),
        (json.dumps([{"messages": ASKED}]) + "\n" + json.dumps([{"messages": ASKED}] * 2), 3),
        (json.dumps({"version": 1, "data": [{"prompt": "Why?", "completion": "Because."}] * 2}, indent=2), 2),
        (json.dumps({"rows": [{"messages": ASKED}] * 2}), 2),
        (json.dumps({"messages": ASKED}, indent=1) + "\n" + json.dumps({"messages": ASKED}, indent=1), 2),
    ],
)
def test_records_are_found_however_a_file_holds_them(tmp_path, content, count):
    path = tmp_path / "a.json"
    path.write_text(content)
    (source,) = open_conversations([str(path)])
    assert list(source.conversations()) == [ASKED] * count and not source.skipped


def test_prompts_are_opened_as_such(tmp_path):
    path = lines(tmp_path / "p.jsonl", *(record for record, _ in PROMPTS), {"id": 1})
    (source,) = open_prompts([path])
    assert list(source.conversations()) == [expected for _, expected in PROMPTS]
    assert source.skipped == {"records in no known format": 1}


@pytest.mark.parametrize(
    ("open_them", "record", "words"),
    [
        (
            open_conversations,
            {"instruction": "x", "id": 1},
            ("instruction, id", "a question and an answer", "output"),
        ),
        (open_conversations, {"foo": 1, "rejected": "x"}, ("foo, rejected", "chosen and rejected", "chosen")),
        (
            open_comparisons,
            {"prompt": "x", "chosen": "y"},
            ("prompt, chosen", "chosen and rejected", "rejected"),
        ),
        (open_prompts, {"name": "x"}, ("name", "messages", "conversations")),
    ],
)
def test_a_file_of_nothing_usable_is_told_its_fields_and_the_nearest_format(
    tmp_path, open_them, record, words
):
    with pytest.raises(InputError) as caught:
        open_them([lines(tmp_path / "x.jsonl", record)])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rankings_may_be_anybodys_file_of_preferences_or_ours(tmp_path, capsys):
    theirs = rankings_of_file(lines(tmp_path / "pairs.jsonl", RANKINGS[0][0], {"id": 1}))
    assert [spelled(ranking) for ranking in theirs] == ["b > a"]
    assert "1 rankings" in capsys.readouterr().out
    ours = rankings_of_file(lines(tmp_path / "rankings.jsonl", vars(theirs[0])))
    assert [ranking.key for ranking in ours] == [theirs[0].key]
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        rankings_of_file(str(tmp_path / "missing.jsonl"))
