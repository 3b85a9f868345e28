"""The report card: every figure against its definition, and the tricks against an honest answer."""

import json
import re
from dataclasses import dataclass
from itertools import cycle, pairwise

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from minillm.chat import ChatTemplate, with_chat_template
from minillm.model import ModelConfig, ScalarModel, score_rows
from minillm.preferences import Ranking, ranking_by
from minillm.reward import EncodedSet, encode_rankings, encode_response
from minillm.tokenizer import Tokenizer
from minillm.tools import report as report_module
from minillm.tools.measures import written
from minillm.tools.report import (
    MARGINS,
    WORDS,
    alike,
    length_correlation,
    pairs_of,
    rater_accuracy,
    report_card,
    report_text,
    tricks,
    write_report,
)
from minillm.world.annotators import MARGIN

LAW = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def ranked(values: list[float], prompt: str = "Who?", texts: list[str] | None = None, **fields) -> Ranking:
    """A ranking by values, the highest first and equal ones tied."""
    texts = texts or [f"Response {i}." for i in range(len(values))]
    given = {"annotator": "a", "seed": 0, "time": "2026-01-31T12:00:00"} | fields
    return Ranking([{"role": "user", "content": prompt}], texts, ranking_by(values), **given)


@dataclass(frozen=True)
class Scored:
    """A ranking with the score and the length in tokens of each response."""

    ranking: Ranking
    scores: list[float]
    lengths: list[int]


def unknown_score(messages: list, text: str) -> None:
    """Where there is no rubric."""


def sets_of(scored: list[Scored]) -> tuple[list[EncodedSet], list[float]]:
    """The same as sets with rows of these lengths, and the scores of the rows."""
    sets = [EncodedSet([one.ranking], [[1] * length for length in one.lengths]) for one in scored]
    return sets, [score for one in scored for score in one.scores]


def pairs(scored: list[Scored], rubric=unknown_score) -> np.ndarray:
    return pairs_of(*sets_of(scored), rubric)


def some_scored(seed: int, prompts: int = 12, noise: float = 1.0) -> list[Scored]:
    """Rankings of random worth, scores that follow it with noise, some prompts ranked twice."""
    random, scored = generator(seed), []
    for i in range(prompts):
        worth = random.integers(6, size=4).astype(float)
        for annotator in "ab"[: 1 + i % 2]:
            seen = (worth + random.integers(-1, 2, size=4)).tolist()
            ranking = ranked(seen, f"{i}?", annotator=annotator, kind=("fact", "harm", None)[i % 3])
            scores = (worth + noise * random.standard_normal(4)).tolist()
            scored.append(Scored(ranking, scores, random.integers(1, 30, size=4).tolist()))
    return scored


def small_model(tokenizer: Tokenizer, positions: int = 400) -> ScalarModel:
    torch.manual_seed(0)
    return ScalarModel(ModelConfig(tokenizer.vocab_size, 12, 16, 1, 2, 1, 4, positions))


TOKENIZER = with_chat_template(Tokenizer.train(["a little world of words"], 270))
CHAT = ChatTemplate(TOKENIZER)
MODEL = small_model(TOKENIZER)

# ---- Shares of pairs


@given(SEEDS, st.floats(0.001, 0.2))
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
def test_every_share_of_the_card_is_that_of_its_pairs(seed, step):
    """Counted pair by pair. Prompt 0 is none of the rubric's, nor is a response to prompt 1; its scores are
    `step` apart."""
    scored = some_scored(seed)

    def rubric(messages: list, text: str) -> float | None:
        prompt = messages[0]["content"]
        if prompt == "0?" or not re.fullmatch(r"Response \d\.", text) or (prompt, text[9]) == ("1?", "2"):
            return None
        return step * generator(seed + int(prompt[:-1])).permutation(4)[int(text[9])]

    every = []
    for one in scored:
        known = [rubric(one.ranking.messages, text) for text in one.ranking.responses]
        for i, j in one.ranking.pairs():
            gap = 0.0 if None in known else known[i] - known[j]
            longer = np.sign(one.lengths[i] - one.lengths[j])
            every.append(
                (one.scores[i] - one.scores[j], gap, one.ranking.kind, one.ranking.annotator, longer)
            )

    sets, scores = sets_of(scored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "score_rows", lambda model, rows: cycle(scores))
        card = report_card(MODEL, CHAT, sets, [one.ranking for one in scored], rubric)
    parts = {"all": every}
    parts |= {f"of {kind}": [pair for pair in every if pair[2] == kind] for kind in ("fact", "harm")}
    parts |= {f"by {name}": [pair for pair in every if pair[3] == name] for name in "ab"}
    for low, high in pairwise(MARGINS):
        parts[f"{low:g} to {high:g} apart"] = [pair for pair in every if low <= abs(pair[1]) < high]
    assert card["pairs"].keys() == {label for label, own in parts.items() if own}
    for label, row in card["pairs"].items():
        known = [pair for pair in parts[label] if pair[1]]
        far = [pair for pair in known if abs(pair[1]) >= MARGIN]
        expected = {
            "pairs": [len(parts[label])] * len(parts[label]),
            "accuracy": [pair[0] > 0 for pair in parts[label]],
            "longer": [(1 + pair[4]) / 2 for pair in parts[label]],
            "ceiling": [pair[1] > 0 for pair in known],
            "truth": [(pair[0] > 0) == (pair[1] > 0) for pair in far],
            "annotators": [pair[1] > 0 for pair in far],
        }
        assert row.keys() == expected.keys()
        for name, own in expected.items():
            assert row[name]["count"] == len(own)
            assert row[name]["value"] == (pytest.approx(np.mean(own)) if own else None)
        assert f"{row['accuracy']['value']:.1%}" in report_text(card)
    bins: list[list[float]] = [[] for _ in range(10)]
    for difference, *_ in every:
        sure = 1 / (1 + np.exp(-abs(difference)))
        bins[min(9, int((sure - 0.5) * 20))].append(sure - (difference > 0))
    error = sum(abs(sum(own)) for own in bins) / len(every)
    assert card["whole"]["calibration error (ECE)"]["value"]["value"] == pytest.approx(error)


@pytest.mark.parametrize(("factor", "share"), [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_scores_are_right_reversed_ones_wrong_equal_ones_half_and_equal_texts_no_pair(factor, share):
    worth = [3.0, 1.0, 2.0, 1.0]
    found = pairs([Scored(ranked(worth), [factor * value for value in worth], [1] * 4)])
    untied = found[found["place"] != 0]
    assert alike(untied, "place", "score")["value"] == share
    assert (len(found), len(untied)) == (6, 5), "one of six pairs is tied"
    ranking = ranked([3.0, 2.0, 1.0], texts=["Yes.", "Yes.", "No."])
    (one,) = pairs([Scored(ranking, [0.0, 1.0, 0.5], [2, 2, 2])])
    assert (one["place"], one["score"]) == (-2, -0.5), "the best place and the highest score of equal texts"


def test_a_prompt_that_was_ranked_several_times_makes_nobody_surer():
    scored = some_scored(0)
    thrice = [one for one in scored for _ in range(3)]
    few, many = (alike(pairs(some), "place", "score") for some in (scored, thrice))
    assert (many["low"], many["high"]) == pytest.approx((few["low"], few["high"]))


# ---- Annotators


@given(st.floats(0.5, 1))
@example(0.5)
@LAW
def test_the_accuracy_of_raters_solves_the_equation_of_their_agreement(q):
    assert rater_accuracy(q**2 + (1 - q) ** 2) == pytest.approx(q, abs=1e-7)
    assert rater_accuracy(q / 2 - 0.01) == 0.5, "of raters who agree less than by chance"


# ---- Length


@given(SEEDS, st.floats(-50, 50))
@LAW
def test_length_and_score_are_correlated_within_prompts_alone(seed, shift):
    scored = some_scored(seed)
    moved = [Scored(j.ranking, [s + i * shift for s in j.scores], j.lengths) for i, j in enumerate(scored)]
    within = [[np.subtract(own, np.mean(own)) for own in (one.lengths, one.scores)] for one in scored]
    expected = np.corrcoef(*(np.concatenate(own) for own in zip(*within, strict=True)))[0, 1]
    assert length_correlation(pairs(scored)) == pytest.approx(expected, abs=1e-9)
    assert length_correlation(pairs(moved)) == pytest.approx(expected, abs=1e-6)
    flat = [Scored(one.ranking, [2.0] * 4, one.lengths) for one in scored]
    assert length_correlation(pairs(flat)) is None, "scores that never vary"


# ---- Tricks

KINDS_OF = [ranked([0.0, 1.0], f"{i}?", [f"Worse {i}.", f"Best {i}."], kind=kind)
            for i, kind in enumerate(["fact", "fact", "harm", "fact"])]  # fmt: skip


def pairs_by_trick(rankings: list[Ranking], rubric=unknown_score) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {name: [] for name in WORDS["tricks"]}
    for one in tricks(rankings, rubric):
        assert one.ranking == [[0], [1]] and one.responses[0] != one.responses[1]
        found[one.annotator].append(one.responses)
    return found


def test_every_prompt_meets_every_trick_once_in_the_place_of_its_best_answer():
    twice = [*KINDS_OF, ranked([1.0, 0.0], "0?", ["Worse 0.", "Best 0."], annotator="b", kind="fact")]
    found = pairs_by_trick(twice)
    for own in found.values():
        assert [honest for honest, _ in own] == [f"Best {i}." for i in range(4)]
    others = [trick for _, trick in found["another's"]]
    assert others == [f"Best {i}." for i in (1, 2, 3, 0)], "the next prompt's"


def test_a_trick_that_is_truly_no_worse_proves_nothing_and_the_truth_says_what_is_honest():
    found = pairs_by_trick(KINDS_OF, lambda messages, text: 1.0 if "Worse" in text else 0.0)
    assert {honest for honest, _ in found["empty"]} == {f"Worse {i}." for i in range(4)}
    assert not found["repeated"] and not found["praise"], "those hold the honest words too"


def test_a_share_of_tricks_is_what_the_scores_say_and_only_of_those_that_fit():
    encoded, _ = encode_rankings(KINDS_OF, CHAT, 400)
    shares = report_card(MODEL, CHAT, encoded, KINDS_OF)["tricks"]
    for name, own in pairs_by_trick(KINDS_OF).items():
        pairs = zip(KINDS_OF, own, strict=True)
        rows = [[encode_response(CHAT, one.messages, text) for text in two] for one, two in pairs]
        below = [honest > trick for honest, trick in (score_rows(MODEL, two) for two in rows)]
        assert (shares[name]["share"]["value"], shares[name]["share"]["count"]) == (np.mean(below), 4)
    short = report_card(small_model(TOKENIZER, positions=60), CHAT, encoded, KINDS_OF)["tricks"]
    padded, empty = (short[name]["share"] for name in ("padded", "empty"))
    assert (padded["count"], padded["value"], empty["count"]) == (0, None, 4)


# ---- The card


def whole_card(rankings: list[Ranking]) -> dict:
    encoded, _ = encode_rankings(rankings, CHAT, 400)
    return report_card(MODEL, CHAT, encoded, rankings)


def test_every_pair_has_the_gap_of_its_rows_whichever_set_they_are_of():
    rankings, rows = [ranked([1.0, 0.0, 3.0]), ranked([0.0, 0.0, 1.0])], [[1, 2], [3], [4, 5, 6]]
    sets = [EncodedSet(rankings, rows), EncodedSet(rankings[:1], rows[::-1])]
    found = pairs_of(sets, [3.0, 7.0, 1.0, 1.0, 7.0, 3.0], unknown_score)
    assert found["place"].tolist() == [1, -1, -2, 0, -1, -1, 1, -1, -2]
    assert found["score"].tolist() == [-4, 2, 6] * 2 + [-6, -2, 4]
    assert found["length"].tolist() == [1, -1, -2] * 2 + [2, 1, -1]


def test_the_card_is_written_as_numbers_and_as_a_picture(tmp_path):
    rankings = [one.ranking for one in some_scored(3)]
    card = whole_card(rankings)
    write_report(tmp_path, card)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(card))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    found = card["pairs"]["all"]["accuracy"]
    assert found["low"] <= found["value"] <= found["high"]
    assert card["prompts"] == 12 and card["rankings"] == 18
    text = report_text(card)
    for figure in (
        found,
        *(own for table in ("whole", "tricks") for row in card[table].values() for own in row.values()),
    ):
        assert written(figure)[0] in text
    assert card["pairs"]["all"]["ceiling"]["value"] is None, "nobody knows the truth here"


def test_what_is_unknown_is_said_to_be(tmp_path):
    card = whole_card([ranked([1.0, 1.0], texts=["", ""])])
    write_report(tmp_path, card)
    text = report_text(card)
    assert re.search(r"^all +0 +–( +–){4}$", text, re.MULTILINE) and "nan" not in text
    assert re.search(r"ceiling is no lower +–$", text, re.MULTILINE)
