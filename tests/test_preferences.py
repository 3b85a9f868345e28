"""Rankings: as typed, on disk, the responses they are of, and how far they agree."""

import errno
import io
import json
import os
import random
import re
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from runs import tiny_model

from minillm import generate as generate_module
from minillm.chat import with_chat_template
from minillm.data import seed_of
from minillm.errors import InputError
from minillm.generate import Samples, SamplingOptions, generate
from minillm.io import rankings as rankings_on_disk
from minillm.io.rankings import JsonLines, RankingFile, read_json_lines, read_rankings, read_responses
from minillm.preferences import (
    ATTEMPTS,
    ChatModel,
    Prompt,
    Ranking,
    ResponseSet,
    new_ranking,
    ranking_by,
    sample_sets,
)
from minillm.tokenizer import Tokenizer
from minillm.tools.measures import table_text
from minillm.tools.ranking import LETTERS, parse_ranking
from minillm.tools.report import agreements

TEXTS = st.text(st.characters(), max_size=20)  # lone surrogates too: JSON can spell them

NAMES = st.text(min_size=1, max_size=5).filter(str.strip)


@st.composite
def orders(draw, most=9):
    """A ranking of 2 to `most` responses, ties sorted."""
    count = draw(st.integers(2, most))
    ranks = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    return [[i for i in range(count) if ranks[i] == rank] for rank in sorted(set(ranks))]


@st.composite
def rankings(draw):
    order = draw(orders())
    count = sum(map(len, order))
    texts = draw(st.lists(TEXTS, min_size=count, max_size=count))
    given_set = ResponseSet([{"role": "user", "content": draw(TEXTS)}], texts, draw(st.none() | TEXTS))
    return new_ranking(given_set, order, draw(NAMES), draw(st.integers(0, 2**63)))


def ranking_of(order, annotator="Ada", question="Who?", texts=None) -> Ranking:
    texts = texts or [f"response {i}" for i in range(sum(map(len, order)))]
    return new_ranking(ResponseSet([{"role": "user", "content": question}], texts), order, annotator, 0)


# ---- As typed


def format_ranking(order: list[list[int]]) -> str:
    return " > ".join(" = ".join(LETTERS[index] for index in tied) for tied in order)


@given(orders(), st.data())
@example([[1], [0, 3], [2]], None)
def test_a_typed_ranking_is_read_as_it_was_written_with_any_spaces_and_case(order, data):
    typed = format_ranking(order)
    if data:
        spaces = st.sampled_from(["", " ", "\t", "   "])
        typed = "".join(data.draw(spaces) + c + data.draw(spaces) for c in typed if c != " ")
        typed = typed.lower() if data.draw(st.booleans()) else typed
    assert parse_ranking(typed, sum(map(len, order))) == order


# ---- A ranking


@given(rankings())
def test_pairs_are_all_pairs_of_different_rank_better_first(ranking):
    ranks = ranking.ranks()
    assert all(ranks[better] < ranks[worse] for better, worse in ranking.pairs())
    untied = sum(a != b for i, a in enumerate(ranks) for b in ranks[:i])
    assert len(ranking.pairs()) == len(set(ranking.pairs())) == untied


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9), st.floats(0, 0.5))
def test_ranking_by_value_puts_no_higher_value_behind_a_lower_one_and_ties_only_within_the_margin(
    values, margin
):
    order = ranking_by(values, margin)
    assert sorted(i for tied in order for i in tied) == list(range(len(values)))
    for tied, worse in pairwise(order):
        assert max(values[i] for i in tied) - max(values[i] for i in worse) > margin
        assert min(values[i] for i in tied) >= max(values[i] for i in worse)
    assert all(max(values[i] for i in t) - min(values[i] for i in t) <= margin for t in order)


def test_a_ranking_made_now_carries_all_of_its_set():
    given_set = ResponseSet([{"role": "user", "content": "Who?"}], ["a", "b"], "fact", 3, cut=[1])
    made = new_ranking(given_set, [[1, 0]], "Ada", 7)
    assert (made.messages, made.responses, made.kind) == (given_set.messages, ["a", "b"], "fact")
    assert (made.ranking, made.annotator, made.seed, made.cut) == ([[0, 1]], "Ada", 7, [1])
    assert ranking_of([[1], [0, 2]]).ranks() == [1, 0, 1]
    turned = replace(given_set, responses=["b", "a"])
    assert made.key == given_set.key == turned.key != replace(given_set, messages=[]).key


FAULTS = {
    "an index is missing": {"ranking": [[0], [1]]},
    "an index stands twice": {"ranking": [[0], [1], [1, 2]]},
    "an index is out of range": {"ranking": [[0], [1], [3]]},
    "an index is a boolean": {"ranking": [[0], [True], [2]]},
    "a group is empty": {"ranking": [[0], [], [1, 2]]},
    "the ranking is flat": {"ranking": [0, 1, 2]},
    "a response is no text": {"responses": ["a", "b", None]},
    "there is one response": {"responses": ["a"], "ranking": [[0]]},
    "there are no messages": {"messages": []},
    "a role is unknown": {"messages": [{"role": "robot", "content": "Hello"}]},
    "the annotator is missing": {"annotator": None},
    "the seed is a text": {"seed": "0"},
    "the time is no time": {"time": "yesterday"},
    "the kind is a number": {"kind": 3},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_line_that_is_no_ranking_is_refused_with_file_and_line(fault, tmp_path):
    path = tmp_path / "rankings.jsonl"
    good = vars(ranking_of([[0], [1, 2]]))
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | FAULTS[fault]) + "\n")
    with pytest.raises(InputError, match=r"rankings\.jsonl, line 3: "):
        read_rankings(path)


LACKING = object()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("ranking", LACKING, r"\(it has no ranking\)"),
        ("seed", "0", "seed is '0', which is no int"),
        ("annotator", " ", r"\(its annotator has no name\)"),
        ("cut", [9], r"its cut is \[9\]"),
    ],
)
def test_of_a_line_that_is_no_ranking_the_field_is_named_that_is_wrong(field, value, said, tmp_path):
    line = vars(ranking_of([[0], [1, 2]])) | {field: value}
    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps({name: held for name, held in line.items() if held is not LACKING}) + "\n")
    with pytest.raises(InputError, match=said):
        read_rankings(path)


# ---- On disk


@given(st.lists(rankings(), min_size=1, max_size=3), st.data())
def test_a_file_cut_at_any_byte_gives_back_all_whole_lines_and_goes_on(tmp_path_factory, made, data):
    path = tmp_path_factory.mktemp("file") / "rankings.jsonl"
    with RankingFile(path) as file:
        file.append(made)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    # A line is whole with its last bracket: its newline may be missing.
    whole = sum(cut >= len(b"\n".join(content.split(b"\n")[: i + 1])) for i in range(len(made)))
    assert read_rankings(path) == made[:whole]
    said = io.StringIO()
    with redirect_stdout(said), RankingFile(path) as file:
        assert file.rankings == made[:whole]
        torn = len(content[:cut].rpartition(b"\n")[2]) > 0 and content[cut : cut + 1] != b"\n"
        assert ("cut short" in said.getvalue()) == torn
        file.append(made)
    assert read_rankings(path) == made[:whole] + made
    if torn:
        assert Path(f"{path}.torn").read_bytes() == content[:cut].rpartition(b"\n")[2] + b"\n"


def test_a_ranking_taken_back_no_longer_stands_and_the_others_do(tmp_path):
    path = tmp_path / "rankings.jsonl"
    ada, bob = ranking_of([[0], [1]]), ranking_of([[1], [0]], "Bob")
    again = replace(ada, ranking=[[1], [0]])
    with RankingFile(path) as file:
        file.append([ada, bob, again])
        before = path.read_bytes()
        assert file.withdraw("Ada") == again
        assert path.read_bytes().startswith(before), "the file only grows"
        assert file.rankings == read_rankings(path) == [ada, bob]
        assert file.withdraw("Ada") == ada
        assert file.withdraw("Ada") is None
        other = ranking_of([[0], [1]], question="Why?")
        file.append([ada, other])
        assert file.withdraw("Ada") == other, "the last, whatever set it is of"
        assert file.withdraw("Ada") == ada
    assert read_rankings(path) == [bob]


def test_a_withdrawal_of_nothing_is_refused(tmp_path):
    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps({"withdraws": "0", "annotator": "Ada"}) + "\n")
    with pytest.raises(InputError, match=r"line 1: .*withdraws"):
        read_rankings(path)


def test_two_processes_never_write_to_one_file(tmp_path):
    with JsonLines(tmp_path / "x.jsonl"), pytest.raises(InputError, match="another process"):
        JsonLines(tmp_path / "x.jsonl")
    JsonLines(tmp_path / "x.jsonl").file.close()


def test_what_was_appended_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "x.jsonl"
    monkeypatch.setattr(rankings_on_disk.os, "fsync", lambda file: synced.append(path.read_text()))
    with JsonLines(path) as lines:
        synced.clear()  # its name was made safe at opening
        lines.append([{"a": 1}, {"b": 2}])
        assert synced == ['{"a": 1}\n{"b": 2}\n']
        lines.append([{"c": 3}])
        assert synced[-1].endswith('{"c": 3}\n') and len(synced) == 2


@pytest.mark.parametrize("taken", [0, 3])
def test_a_full_disk_is_one_line_and_leaves_the_file_as_it_was(tmp_path, taken):
    path = tmp_path / "x.jsonl"
    with JsonLines(path) as lines:
        lines.append([{"a": 1}])
        before, real = path.read_bytes(), lines.file

        def write(data: bytes) -> int:
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(data[:taken])

        lines.file = SimpleNamespace(write=write, fileno=real.fileno)
        with pytest.raises(InputError, match="free some space"):
            lines.append([{"b": 2}, {"c": 3}])
        assert path.read_bytes() == before
        lines.file = real
        lines.append([{"c": 3}])
    assert [record for _, record in read_json_lines(path, "")] == [{"a": 1}, {"c": 3}]
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_a_file_of_no_responses_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text("")
    with pytest.raises(InputError, match="--stage sample"):
        read_responses(path)
    path.write_text('{"messages": [{"role": "user", "content": "Who?"}], "responses": ["a"]}\n')
    with pytest.raises(InputError, match=r"line 1: .*it has 1 responses"):
        read_responses(path)
    path.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1: is no JSON object"):
        read_responses(path)


# ---- Sampling


@pytest.fixture(scope="module")
def model() -> ChatModel:
    model, tokenizer = tiny_model(longest=64)
    return ChatModel("tiny", model, with_chat_template(tokenizer))


QUESTIONS = [Prompt([{"role": "user", "content": f"{i}?"}]) for i in range(7)]
PLAN = {"count": 3, "distractors": 0, "sampling": SamplingOptions(6), "seed": 0}


def all_records(models, plan, questions=QUESTIONS):
    return [line for block in sample_sets(models, questions, **plan) for line in block]


def test_a_response_can_be_made_again_from_its_recorded_draw(model):
    record = all_records([model], PLAN)[4]
    for text, draw in zip(record["responses"], record["draws"], strict=True):
        prompt = [QUESTIONS[draw["prompt"]].messages]
        texts, samples = model.replies(prompt, PLAN["sampling"], [draw["seed"]])
        assert (texts, samples.ended) == ([text], [draw["ended"]])


def test_no_two_responses_of_a_set_are_alike_unless_the_note_says_so(model):
    # Two tokens to choose from and one token of response: of three, two must be alike.
    few = PLAN | {"sampling": SamplingOptions(1, top_k=2)}
    for record in all_records([model], few):
        different = len({text.strip() for text in record["responses"]})
        assert record["note"] == f"{3 - different} of the responses repeat another after {ATTEMPTS} attempts"
    # One pair of six tokens: an attempt or two suffices.
    seeds = [draw["seed"] for record in all_records([model], PLAN) for draw in record["draws"]]
    assert len(set(seeds)) == len(seeds)
    pair = PLAN | {"count": 2, "sampling": SamplingOptions(1, top_k=4)}
    redrawn = all_records([model], pair)
    assert all(len(set(record["responses"])) == 2 for record in redrawn if "note" not in record)
    first = {seed_of(0, i, 1, 0) for i in range(7)}
    assert any(record["draws"][1]["seed"] not in first for record in redrawn), "some were drawn again"


def test_a_response_that_differs_in_spaces_alone_repeats(model, monkeypatch):
    monkeypatch.setattr(
        Samples, "texts", lambda self, decode: [" " * (i % 3) + "Yes." for i in range(len(self.responses))]
    )
    records = all_records([model], PLAN)
    assert all(record["note"].startswith("2 of the responses repeat") for record in records)


def test_distractors_answer_other_prompts_and_the_others_their_own(model):
    for i, record in enumerate(all_records([model], PLAN | {"distractors": 2})):
        own, *others = [draw["prompt"] for draw in record["draws"]]
        assert own == i and i not in others and all(0 <= other < 7 for other in others)


def test_a_prompt_has_room_up_to_the_last_position(model):
    positions = model.model.config.max_position_embeddings
    messages = QUESTIONS[0].messages
    assert model.has_room(messages, positions - len(model.prompt(messages)))
    assert not model.has_room(messages, positions - len(model.prompt(messages)) + 1)


def test_a_models_fingerprint_follows_its_chat_template(model):
    config = {name: value for name, value in model.tokenizer.config.items() if name != "chat_template"}
    base = ChatModel("tiny", model.model, Tokenizer(model.tokenizer.vocabulary, config))
    assert base.fingerprint != model.fingerprint == ChatModel("x", model.model, model.tokenizer).fingerprint
    asked = base.prompt([*QUESTIONS[1].messages, *QUESTIONS[0].messages])
    assert model.tokenizer.decode(asked).endswith("0?\n") and "1?" not in model.tokenizer.decode(asked)


def test_each_response_has_the_seed_of_its_place_however_many_are_sampled_together(model, monkeypatch):
    prompts, seeds = [model.prompt(QUESTIONS[0].messages)] * 5, range(5)
    sampling = SamplingOptions(6, stop_ids=model.form.stop_ids)
    whole = generate(model.model, prompts, sampling, seeds)
    assert len(set(map(tuple, whole.responses))) == 5
    monkeypatch.setattr(generate_module, "ROWS", 2)
    parts = generate(model.model, prompts, sampling, seeds)
    assert (parts.responses, parts.ended) == (whole.responses, whole.ended)


def test_models_are_dealt_equally_over_places(model):
    other = ChatModel("other", model.model, model.tokenizer)
    records = all_records([model, other], PLAN | {"count": 2}, QUESTIONS[:6])
    for place in range(2):
        assert [r["draws"][place]["model"] for r in records].count("tiny") == 3
    assert all({draw["model"] for draw in record["draws"]} == {"tiny", "other"} for record in records)


# ---- Agreement


def rankings_of_two(count=30, k=4, seed=0):
    rng = random.Random(seed)
    made = []
    for i in range(count):
        for annotator in ("Ada", "Bob"):
            order = ranking_by([rng.randrange(5) for _ in range(k)])
            made.append(ranking_of(order, annotator, f"{i}?"))
    return made


def relabelled(ranking: Ranking, rng: random.Random) -> Ranking:
    """The same ranking with its responses listed in another order."""
    new = list(range(len(ranking.responses)))
    rng.shuffle(new)
    texts = [ranking.responses[new.index(i)] for i in range(len(new))]
    return replace(ranking, responses=texts, ranking=[sorted(new[i] for i in t) for t in ranking.ranking])


def overall(made: list[Ranking]) -> dict:
    """The agreement of all annotators."""
    return agreements(made)["all"]["agreement"]


@given(st.integers(0, 1000))
def test_agreement_does_not_depend_on_how_responses_are_listed_nor_on_who_comes_first(seed):
    made = rankings_of_two(6, seed=seed)
    rng = random.Random(seed)
    other = [relabelled(ranking, rng) for ranking in made]
    swap = {"Ada": "Bob", "Bob": "Ada"}
    swapped = [replace(ranking, annotator=swap[ranking.annotator]) for ranking in made]
    assert agreements(made) == agreements(other) == agreements(swapped)
    assert overall(made[::-1])["value"] == overall(made)["value"]


def test_the_interval_of_an_agreement_is_that_of_a_share_of_prompts():
    """400 prompts of one pair, agreed on by half: 1.96 · .5 / √400 to each side."""
    made = [ranking_of([[0], [1]], "Ada", f"{i}?") for i in range(400)]
    made += [replace(r, annotator="Bob", ranking=[[i % 2], [1 - i % 2]]) for i, r in enumerate(made)]
    row = overall(made)
    assert (row["value"], row["count"]) == (0.5, 400)
    assert (row["low"], row["high"]) == pytest.approx((0.451, 0.549), abs=0.001)  # Wilson's is a bit narrower


def test_of_equal_texts_the_best_place_counts():
    ada = ranking_of([[0], [1], [2]], "Ada", texts=["yes", "no", "yes"])
    assert overall([ada, replace(ada, annotator="Bob", ranking=[[0, 2], [1]])])["value"] == 1


def test_agreement_counts_by_hand():
    made = [ranking_of([[0], [1], [2]], "Ada"), ranking_of([[0], [2], [1]], "Bob"),
            ranking_of([[0, 1], [2]], "Cid"), ranking_of([[0], [1], [2]], "Dan", "alone?")]  # fmt: skip
    rows = agreements(made)
    shown = ("prompts", "pairs", "ties", "agreement")
    found = {names: tuple(own[name]["value"] for name in shown) for names, own in rows.items()}
    assert found == {
        "all": (1, 7, 2, 5 / 7),
        "Ada and Bob": (1, 3, 0, 2 / 3),  # they differ on 1 and 2
        "Ada and Cid": (1, 2, 1, 1.0),
        "Bob and Cid": (1, 2, 1, 0.5),
    }
    assert next(iter(rows)) == "all"
    assert re.search(r"Ada and Bob +66.7% .* 1 +3 +0", table_text(rows))


def test_the_later_of_two_rankings_of_a_set_by_one_annotator_counts():
    ada, bob = ranking_of([[0], [1]], "Ada"), ranking_of([[0], [1]], "Bob")
    assert overall([replace(ada, ranking=[[1], [0]]), bob, ada])["value"] == 1


def test_without_a_prompt_ranked_by_two_there_is_no_agreement_to_measure():
    assert not agreements([ranking_of([[0], [1]]), ranking_of([[0], [1]], "Bob", "Else?")])
