"""How far annotators agree; how far to trust a reward model, and what fools it.

    rankings of one prompt by several annotators ──► agreement
    held-out rankings ──► scores ──► accuracy, calibration, length ──► report.json, report.png
    answers, and tricks made of them ──► scores ──► the share of tricks that do not pay

A pair counts where the annotator preferred one of two different texts. Equal scores are half right.

The ceiling that annotators' noise sets: let every rater tell the true order of a pair with probability
q ≥ ½, independently of other raters. Two raters agree with probability

    p = q² + (1 - q)²    ⟹    q = (1 + √(2p - 1)) / 2

and a judge who is always right agrees with one rater in a share q of pairs: none can be expected to do
better. Where q differs from pair to pair, 2p - 1 is the mean of (2q - 1)²; the mean of 2q - 1 is no less
than that and no more than its root. So the ceiling lies between p and the q of this formula. Where the
rubric's score of every response is known, how often it has the annotators' order is the ceiling itself.

Against the rubric only pairs count whose scores differ by at least the margin below which annotators see no
difference: which of two wrong answers is a letter shorter, nobody is asked to know.

Two annotators agree on a share of the pairs of responses on which both have a preference; chance gives 1/2.
Labelers of Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.4, agreed on 72.6 ± 1.5 %.

Sources: calibration error, Guo et al. 2017 (arXiv 1706.04599), section 2; length as what reward models
mistake for quality, Singhal et al. 2023 (arXiv 2310.03716).
Left out: agreement beyond chance (Cohen's κ, Krippendorff's α), and a significance test between two models.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from minillm.chat import ChatTemplate
from minillm.errors import InputError
from minillm.files import write_json
from minillm.model import ScalarModel
from minillm.preferences import MARGIN, Message, Ranking, ResponseSet
from minillm.reward import EncodedSet, distinct_pairs, prompt_key, score_rows
from minillm.tools.annotators import by_reward, prefer
from minillm.tools.measures import Estimate, Rows, estimate, mean, reliability
from minillm.tools.streams import render, tables

# ---- How far annotators agree

ALL = "all"


def agreement_report(rankings: Iterable[Ranking]) -> dict[str, Any]:
    """The rows of `agreements`. InputError where no prompt has the rankings of two annotators."""
    if rows := agreements(rankings):
        return {"rows": rows}
    raise InputError(
        "no prompt was ranked by two annotators; rank with more --opinions, or by another --name"
    )


def agreements(rankings: Iterable[Ranking]) -> Rows:
    """Of all annotators, then of each two who share a prompt: the share of pairs on which they agree, the
    prompts, the pairs, and the ties: pairs left out, for one of the two holds the responses equal. Of two
    rankings of a set by one annotator the later counts."""
    by_prompt: dict[str, dict[str, Int64[np.ndarray, " _"]]] = defaultdict(dict)
    for ranking in rankings:
        by_prompt[ranking.key][ranking.annotator] = preferences(ranking)
    counts: dict[str, list[Sequence[int]]] = defaultdict(list)  # of each prompt: +, -, ties
    for own in by_prompt.values():
        compared = {f"{a} and {b}": own[a] * own[b] for a, b in combinations(sorted(own), 2)}
        for pair, products in compared.items():
            counts[pair].append([int((products == product).sum()) for product in (1, -1, 0)])
        if compared:
            counts[ALL].append(np.sum([counts[pair][-1] for pair in compared], axis=0))
    rows = {}
    for names in sorted(counts, key=lambda names: (names != ALL, names)):
        agreed, differed, ties = np.array(counts[names]).T
        found = mean(agreed, agreed + differed)
        whole = {"prompts": len(agreed), "pairs": found["count"], "ties": int(ties.sum())}
        rows[names] = {"agreement": found} | {n: estimate(x, x, form="whole") for n, x in whole.items()}
    return rows


def preferences(ranking: Ranking) -> Int64[np.ndarray, " _"]:
    """What a ranking says of each two different texts, in the order of the alphabet: 1 for the first, -1 for
    the second, 0. Of equal texts the best place counts."""
    places = reversed(list(enumerate(ranking.ranking)))
    rank = {ranking.responses[index]: place for place, tied in places for index in tied}
    ranks = np.array([rank[text] for text in sorted(rank)], np.int64)
    first, second = np.triu_indices(len(ranks), 1)
    return np.sign(ranks[second] - ranks[first])


# ---- A reward model

MARGINS = (MARGIN, 0.05, 0.1, 0.2, 0.4, 1.0)  # bounds of the classes of how far two rubric scores are apart

RubricScore = Callable[[Sequence[Message], str], float | None]
"""What the rubric gives a reply to these messages; None where it knows nothing of them."""


def unknown_score(messages: Sequence[Message], text: str) -> float | None:
    """Where there is no rubric."""
    return None


@dataclass(frozen=True)
class Scored:
    """A ranking with the score and the length in tokens of each response."""

    ranking: Ranking
    scores: Sequence[float | int]
    lengths: Sequence[int]


def score_rankings(model: ScalarModel, encoded: Sequence[EncodedSet]) -> list[Scored]:
    """The scores of the responses, for every ranking of them. InputError where one is not finite."""
    scores = iter(score_rows(model, [row for one in encoded for row in one.rows]))
    of_set = [[next(scores) for _ in one.rows] for one in encoded]
    return [
        Scored(ranking, own, [len(row) for row in one.rows])
        for one, own in zip(encoded, of_set, strict=True)
        for ranking in one.rankings
    ]


# ---- Shares of pairs

Pairs = np.ndarray
"""A record for each pair of different texts that an annotator ordered: the key of its prompt, which the pairs
of all rankings of the prompt share; annotator and kind; and by how much more the response preferred has of
score, of length in tokens, and of what the rubric gives, 0 where that is unknown."""
PAIR = [(name, "O") for name in ("prompt", "annotator", "kind")]
PAIR += [(name, "f8") for name in ("score", "length", "rubric")]


def pairs_of(scored: Iterable[Scored], rubric: RubricScore = unknown_score) -> Pairs:
    """All pairs of different texts that their annotators ordered."""
    pairs = []
    for one in scored:
        ranking = one.ranking
        values = [rubric(ranking.messages, text) for text in ranking.responses]
        known = [0.0 if value is None or None in values else value for value in values]
        who, what = (prompt_key(ranking), ranking.annotator, ranking.kind), (one.scores, one.lengths, known)
        pairs += [(*who, *(own[i] - own[j] for own in what)) for i, j in distinct_pairs(ranking)]
    return np.array(pairs, PAIR)


def accuracy(pairs: Pairs, *orders: str) -> Estimate:
    """The share of pairs of which two orders are the same, one being the annotator's unless two are named;
    equal scores are half right. The pairs of one prompt are not independent."""
    same = np.prod([np.sign(pairs[order]) for order in orders], axis=0)
    _, prompt = np.unique(pairs["prompt"], return_inverse=True)
    return mean(np.bincount(prompt, (1 + same) / 2), np.bincount(prompt))


def rater_accuracy(agreed: float) -> float:
    """How often a rater is right if two agree with this probability and all pairs are equally hard; ½ if
    they agree less than by chance."""
    return (1 + sqrt(max(0.0, 2 * agreed - 1))) / 2


def against_rubric(pairs: Pairs) -> dict[str, Any]:
    """How often scores and annotators have the rubric's order, of all pairs that differ by MARGIN, by
    annotator and in classes of the difference; and `ceiling`, how often the rubric has the annotators' order,
    of any."""
    known, apart = pairs[pairs["rubric"] != 0], np.abs(pairs["rubric"])

    def shares(low: float, high: float) -> dict[str, Any]:
        own = pairs[(low <= apart) & (apart < high)]
        return {"scores": accuracy(own, "score", "rubric"), "annotators": accuracy(own, "rubric")}

    far = pairs[apart >= MARGIN]
    return {
        **shares(MARGIN, inf),
        "by_annotator": by("annotator", far, "rubric"),
        "ceiling": accuracy(known, "rubric"),
        "by_margin": [
            {"from": low, "to": min(high, MARGINS[-1]), **shares(low, high)}
            for low, high in pairwise((*MARGINS[:-1], inf))
        ],
    }


def by(field: str, pairs: Pairs, order: str) -> dict[str, Estimate]:
    """The accuracy of an order among the pairs of each annotator, or of each kind."""
    return {name: accuracy(pairs[pairs[field] == name], order) for name in sorted({*pairs[field]} - {None})}


def length_correlation(scored: Sequence[Scored]) -> float | None:
    """The correlation of score and length within prompts: each less the mean of its ranking. None where
    either never varies."""
    own = [np.array([one.lengths, one.scores], np.float64) for one in scored]
    within = np.concatenate([values - values.mean(1, keepdims=True) for values in own], axis=1)
    return float(np.corrcoef(within)[0, 1]) if within.any(axis=1).all() else None


# ---- Tricks

TRICKS: dict[str, str] = tables(__file__)["tricks"]
"""What might score without being good, made of an honest answer and of the next prompt's. A good reward
model puts each below the honest answer."""


def trick_pairs(rankings: Sequence[Ranking], rubric: RubricScore) -> dict[str, list[ResponseSet]]:
    """For every trick, to each prompt an honest answer and the trick in its place; none where the trick
    leaves the answer as it is, or where the rubric gives it no less."""
    of_prompt: dict[str, Ranking] = {}
    for ranking in rankings:
        of_prompt.setdefault(prompt_key(ranking), ranking)
    first = list(of_prompt.values())
    honest = [_honest(ranking, rubric) for ranking in first]
    return {
        name: [
            ResponseSet(ranking.messages, [answer, trick])
            for ranking, answer, other in zip(first, honest, [*honest[1:], *honest[:1]], strict=True)
            for trick in [made.format(answer=answer, other=other)]
            if answer.strip() and answer != trick
            if prefer(rubric(ranking.messages, text) for text in (answer, trick)) in (1, None)
        ]
        for name, made in TRICKS.items()
    }


def _honest(ranking: Ranking, rubric: RubricScore) -> str:
    """The response that the rubric gives most, or the annotator's best where it is unknown."""
    scored = [(rubric(ranking.messages, text), text) for text in ranking.responses]
    known = [(score, text) for score, text in scored if score is not None]
    return max(known)[1] if known else ranking.responses[ranking.ranking[0][0]]


def trick_shares(
    model: ScalarModel, template: ChatTemplate, of_trick: dict[str, list[ResponseSet]]
) -> dict[str, Estimate]:
    """The share of honest answers that score above the trick, per trick; where both fit the model."""
    found = iter(by_reward(model, template)([pair for pairs in of_trick.values() for pair in pairs]))
    outcomes = {name: islice(found, len(pairs)) for name, pairs in of_trick.items()}
    return {name: mean([won == 1 for won in own if won is not None]) for name, own in outcomes.items()}


# ---- The card


def report_card(
    model: ScalarModel,
    template: ChatTemplate,
    scored: Sequence[Scored],
    rankings: Sequence[Ranking],
    rubric: RubricScore = unknown_score,
) -> dict[str, Any]:
    """All metrics, as report.json holds them. `scored` are held-out rankings; `rankings` are all there are,
    for annotators can be compared on those too that the model has seen."""
    pairs, held_out = pairs_of(scored, rubric), [one.ranking for one in scored]
    # σ(|difference|) is how sure the scores are of their order.
    sure = 1 / (1 + np.exp(-np.abs(pairs["score"])))
    error, bins = reliability(sure, (1 + np.sign(pairs["score"])) / 2, lowest=0.5)
    agreed = agreements(rankings).get(ALL, {"agreement": estimate(None, 0)})["agreement"]
    return {
        "prompts": len(set(map(prompt_key, held_out))),
        "rankings": len(scored),
        "accuracy": accuracy(pairs, "score"),
        "annotators": agreed
        | {"ceiling": None if agreed["value"] is None else rater_accuracy(agreed["value"])},
        "truth": against_rubric(pairs),
        "by_kind": by("kind", pairs, "score"),
        "calibration": {"error": error, "bins": bins},
        "longer": accuracy(pairs, "length"),
        "length_correlation": length_correlation(scored),
        "probes": trick_shares(model, template, trick_pairs(held_out, rubric)),
    }


def report_text(card: dict[str, Any]) -> str:
    """The card in a few lines."""

    def percent(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.1%}"

    return render(Path(__file__).with_name("report.txt.j2"), card, percent=percent).rstrip()


def write_report(folder: Path, card: dict[str, Any]) -> None:
    """report.json, and report.png: how often the scores' order is right where they are so sure of it."""
    write_json(folder / "report.json", card)
    from minillm.tools.plots import Figure, save  # a second of import that only the end of a run needs

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, bins = figure.add_subplot(), card["calibration"]["bins"]
    axes.plot([0.5, 1], [0.5, 1], ":", color="black")
    axes.plot([b["sure"] for b in bins], [b["accuracy"] for b in bins], "o-")
    axes.set(xlabel="σ(difference of scores)", ylabel="accuracy", title="calibration")
    save(figure, folder / "report.png")
