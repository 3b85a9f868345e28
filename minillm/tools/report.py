"""The report card of a reward model: how far to trust its scores, and what fools it.

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

Sources: calibration error, Guo et al. 2017 (arXiv 1706.04599), section 2; length as what reward models
mistake for quality, Singhal et al. 2023 (arXiv 2310.03716).
Left out: agreement beyond chance (Cohen's κ), and a significance test between two models.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from minillm.chat import ChatTemplate
from minillm.files import write_json
from minillm.model import ScalarModel
from minillm.preferences import MARGIN, Message, Ranking, ResponseSet
from minillm.reward import EncodedSet, distinct_pairs, prompt_key, score_rows
from minillm.tools.agreement import agreements, opinions_of
from minillm.tools.judge import by_reward, prefer
from minillm.tools.measures import Estimate, estimate, reliability, share
from minillm.tools.render import render

MARGINS = (MARGIN, 0.05, 0.1, 0.2, 0.4, 1.0)  # bounds of the classes of how far two rubric scores are apart

RubricScore = Callable[[Sequence[Message], str], float | None]
"""What the rubric gives a reply to these messages; None where it knows nothing of them."""


@dataclass(frozen=True)
class Scored:
    """A ranking with the score and the length in tokens of each response."""

    ranking: Ranking
    scores: Sequence[float | int]
    lengths: list[int]


class Pair(NamedTuple):
    """Two responses of which their annotator preferred one."""

    prompt: str
    """The key of its prompt; the pairs of all rankings of a prompt share it."""
    ranking: Ranking
    difference: float
    """Score of the response that the annotator preferred less that of the other."""
    rubric: float
    """The same difference of the rubric's scores; 0 where it is unknown."""


def unknown_score(messages: Sequence[Message], text: str) -> float | None:
    """Where there is no rubric."""
    return None


def score_rankings(model: ScalarModel, encoded: Sequence[EncodedSet]) -> list[Scored]:
    """The scores of the responses, for every ranking of them. InputError where one is not finite."""
    scores = iter(score_rows(model, [row for one in encoded for row in one.rows]))
    of_set = [[next(scores) for _ in one.rows] for one in encoded]
    return [
        Scored(ranking, own, [len(row) for row in one.rows])
        for one, own in zip(encoded, of_set, strict=True)
        for ranking in one.rankings
    ]


def pairs_of(scored: Iterable[Scored], rubric: RubricScore = unknown_score) -> list[Pair]:
    """All pairs of different texts that their annotators ordered."""
    pairs = []
    for one in scored:
        prompt = prompt_key(one.ranking)
        values = [rubric(one.ranking.messages, text) for text in one.ranking.responses]
        known = [value for value in values if value is not None]
        known = known if len(known) == len(values) else [0.0] * len(values)
        pairs += [
            Pair(prompt, one.ranking, one.scores[i] - one.scores[j], known[i] - known[j])
            for i, j in distinct_pairs(one.ranking)
        ]
    return pairs


# ---- Metrics


def accuracy(
    pairs: Iterable[Pair], value: Callable[[Pair], float] = lambda pair: pair.difference
) -> Estimate:
    """The share of pairs that are right: whose value is above 0; 0 is half right. The pairs of one prompt are
    not independent."""
    of_prompt: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        found = value(pair)
        of_prompt[pair.prompt].append((1 + (found > 0) - (found < 0)) / 2)
    return share([sum(own) for own in of_prompt.values()], [len(own) for own in of_prompt.values()])


def by_margin(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The accuracy in each quarter of the pairs, from the closest scores to the farthest."""
    order = sorted(pairs, key=lambda pair: abs(pair.difference))
    quarters = [[order[i] for i in part] for part in np.array_split(np.arange(len(order)), 4) if len(part)]
    return [
        {"from": abs(own[0].difference), "to": abs(own[-1].difference), **accuracy(own)} for own in quarters
    ]


def rater_accuracy(agreed: float) -> float:
    """How often a rater is right if two agree with this probability and all pairs are equally hard; ½ if
    they agree less than by chance."""
    return (1 + sqrt(max(0.0, 2 * agreed - 1))) / 2


def against_rubric(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How often scores and annotators have the rubric's order, of all pairs that differ by MARGIN, by
    annotator and in classes of the difference; and `ceiling`, how often the rubric has the annotators' order,
    of any."""
    known = [pair for pair in pairs if pair.rubric]
    far = [pair for pair in known if abs(pair.rubric) >= MARGIN]

    def annotators(some: Sequence[Pair]) -> Estimate:
        return accuracy(some, lambda pair: pair.rubric)

    def shares(low: float, high: float) -> dict[str, Any]:
        within = [pair for pair in known if low <= abs(pair.rubric) < high]
        scores = accuracy(within, lambda pair: pair.rubric * pair.difference)
        return {"scores": scores, "annotators": annotators(within)}

    names = sorted({pair.ranking.annotator for pair in known})
    return {
        **shares(MARGIN, inf),
        "by_annotator": {n: annotators([pair for pair in far if pair.ranking.annotator == n]) for n in names},
        "ceiling": annotators(known),
        "by_margin": [
            {"from": low, "to": min(high, MARGINS[-1]), **shares(low, high)}
            for low, high in pairwise((*MARGINS[:-1], inf))
        ],
    }


BASELINES: dict[str, tuple[str, str, Callable[[Ranking], list[int]]]] = {
    "length": ("longer", "shorter", lambda ranking: [len(text) for text in ranking.responses]),
    "majority": ("listed first", "listed last", lambda ranking: [-i for i in range(len(ranking.responses))]),
}
"""Scores that read no response: what the higher and the lower is called, and the scores."""


def baselines(training: Sequence[Ranking], held_out: Sequence[Ranking]) -> dict[str, dict[str, Any]]:
    """The accuracy on held-out pairs of taking one side always: that which wins more of the training pairs.

    `side` is None where there is no choice: in a format that lists the better response first, the place
    is the label itself, and knows nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, (higher, lower, scores) in BASELINES.items():
        won = accuracy(pairs_of(Scored(one, scores(one), []) for one in training))["value"]
        if won is None or (name == "majority" and won in (0, 1)):
            found[name] = {"side": None, **estimate(None, 0)}
            continue
        sign, side = (1, higher) if won >= 0.5 else (-1, lower)
        sided = (Scored(one, [sign * score for score in scores(one)], []) for one in held_out)
        found[name] = {"side": side, **accuracy(pairs_of(sided))}
    return found


def within_prompts(scored: Sequence[Scored]) -> Float64[np.ndarray, "2 R"]:
    """All lengths and scores, each less the mean of its ranking."""
    own = [np.array([one.lengths, one.scores], np.float64) for one in scored]
    return np.concatenate([values - values.mean(1, keepdims=True) for values in own], axis=1)


def length_correlation(scored: Sequence[Scored]) -> float | None:
    """The correlation of score and length within prompts; None where either never varies."""
    lengths, scores = within_prompts(scored)
    if not lengths.any() or not scores.any():
        return None
    return float(lengths @ scores / sqrt((lengths @ lengths) * (scores @ scores)))


# ---- Tricks

FILLER = " Let me add a few words to that, for there is always more that one could say about it."
TRICKS: dict[str, Callable[[str, str], str]] = {
    "repeated": lambda answer, other: f"{answer} {answer} {answer}",
    "empty": lambda answer, other: "",
    "padded": lambda answer, other: answer + 3 * FILLER,
    "praise": lambda answer, other: (
        f"What a wonderful question, you are so clever! {answer} You are the best!"
    ),
    "another's": lambda answer, other: other,
}
"""What might score without being good, made of an honest answer and of another prompt's. A good reward
model puts each below the honest answer."""


def trick_pairs(rankings: Sequence[Ranking], rubric: RubricScore) -> dict[str, list[ResponseSet]]:
    """For every trick, to each prompt an honest answer and the trick in its place; none where the trick
    leaves the answer as it is, or where the rubric gives it no less."""
    of_prompt: dict[str, Ranking] = {}
    for ranking in rankings:
        of_prompt.setdefault(prompt_key(ranking), ranking)
    first = list(of_prompt.values())
    honest = [_honest(ranking, rubric) for ranking in first]
    others = [honest[_another(first, i)] for i in range(len(first))]

    return {
        name: [
            ResponseSet(ranking.messages, [answer, trick])
            for ranking, answer, other in zip(first, honest, others, strict=True)
            for trick in [make(answer, other)]
            if answer.strip() and answer != trick
            if prefer(rubric(ranking.messages, text) for text in (answer, trick)) in (1, None)
        ]
        for name, make in TRICKS.items()
    }


def _honest(ranking: Ranking, rubric: RubricScore) -> str:
    """The response that the rubric gives most, or the annotator's best where it is unknown."""
    known = [
        (value, text) for text in ranking.responses if (value := rubric(ranking.messages, text)) is not None
    ]
    return max(known)[1] if known else ranking.responses[ranking.ranking[0][0]]


def _another(rankings: Sequence[Ranking], i: int) -> int:
    """The next prompt of another kind, for one of the same might be answered alike; else the next."""
    later = [(i + step) % len(rankings) for step in range(1, len(rankings))]
    return next((j for j in later if rankings[j].kind != rankings[i].kind), (i + 1) % len(rankings))


def trick_shares(
    model: ScalarModel, template: ChatTemplate, of_trick: dict[str, list[ResponseSet]]
) -> dict[str, Estimate]:
    """The share of honest answers that score above the trick, per trick; where both fit the model."""
    found = iter(by_reward(model, template)([pair for pairs in of_trick.values() for pair in pairs]))
    outcomes = {name: [next(found) for _ in pairs] for name, pairs in of_trick.items()}
    return {name: share([won == 1 for won in own if won is not None]) for name, own in outcomes.items()}


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
    difference = np.array([pair.difference for pair in pairs], np.float64)
    # σ(|difference|) is how sure the scores are of their order.
    sure = 1 / (1 + np.exp(-np.abs(difference)))
    error, bins = reliability(sure, (1 + np.sign(difference)) / 2, lowest=0.5)
    agreed = next(iter(agreements(opinions_of(rankings))), estimate(None, 0))
    prompts = set(map(prompt_key, held_out))
    training = [ranking for ranking in rankings if prompt_key(ranking) not in prompts]
    kinds = sorted({pair.ranking.kind for pair in pairs if pair.ranking.kind})
    return {
        "prompts": len(prompts),
        "rankings": len(scored),
        "accuracy": accuracy(pairs),
        "annotators": estimate(agreed["value"], agreed["count"])
        | {"ceiling": None if agreed["value"] is None else rater_accuracy(agreed["value"])},
        "baselines": baselines(training, held_out),
        "truth": against_rubric(pairs),
        "by_margin": by_margin(pairs),
        "by_kind": {kind: accuracy(pair for pair in pairs if pair.ranking.kind == kind) for kind in kinds},
        "calibration": {"error": error, "bins": bins},
        "length_correlation": length_correlation(scored),
        "probes": trick_shares(model, template, trick_pairs(held_out, rubric)),
    }


def report_text(card: dict[str, Any]) -> str:
    """The card in a few lines."""

    def percent(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.1%}"

    return render(Path(__file__).with_name("report.txt.j2"), card, percent=percent).rstrip()


def write_report(folder: Path, card: dict[str, Any], scored: Sequence[Scored]) -> None:
    """report.json and report.png."""
    write_json(folder / "report.json", card)
    from minillm.tools.plots import Figure, save  # a second of import that only the end of a run needs

    figure = Figure(figsize=(10, 7), layout="constrained")
    (calibration, accuracy), (tricks, length) = figure.subplots(2, 2)
    bins = card["calibration"]["bins"]
    calibration.plot([0.5, 1], [0.5, 1], ":", color="black")
    calibration.plot([b["sure"] for b in bins], [b["accuracy"] for b in bins], "o-")
    calibration.set(xlabel="σ(difference of scores)", ylabel="accuracy", title="calibration")
    known = {f"{own['side']} (baseline)": own for own in card["baselines"].values() if own["side"]}
    _bars(accuracy, {"all": card["accuracy"], **known, **card["by_kind"]}, "pairs in the annotator's order")
    if (agreed := card["annotators"])["count"]:
        accuracy.axvspan(agreed["value"], agreed["ceiling"], alpha=0.2, label="ceiling")
        accuracy.legend()
    _bars(tricks, card["probes"], "tricks below the honest answer")
    length.scatter(*within_prompts(scored), s=4)
    labels = {what: f"{what}, less the prompt's mean" for what in ("tokens", "score")}
    length.set(xlabel=labels["tokens"], ylabel=labels["score"], title="length")
    save(figure, folder / "report.png")


def _bars(axes: Any, shares: dict[str, Estimate], title: str) -> None:
    names = [f"{name} ({own['count']})" for name, own in shares.items()]
    axes.barh(names, [own["value"] or 0.0 for own in shares.values()])
    axes.set(xlim=(0, 1), title=title)
    axes.invert_yaxis()
