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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from minillm.annotators import MARGIN
from minillm.chat import ChatTemplate
from minillm.files import write_atomically, write_json
from minillm.model import ScalarModel
from minillm.preferences import Message, Ranking
from minillm.reward import (
    EncodedSet,
    collate,
    encode_response,
    micro_batches,
    prompt_key,
    require_finite,
    score_rows,
    scores_of,
    telling_pairs,
)
from minillm.tools.agreement import agreed_pairs
from minillm.tools.measures import Estimate, clustered, estimate, reliability, share

MARGINS = (MARGIN, 0.05, 0.1, 0.2, 0.4, 1.0)  # bounds of the classes of how far two rubric scores are apart

RubricScore = Callable[[Sequence[Message], str], float | None]
"""What the rubric gives a reply to these messages; None where it knows nothing of them."""


@dataclass(frozen=True)
class Judged:
    """A ranking with the score and the length in tokens of each response."""

    ranking: Ranking
    scores: list[float]
    lengths: list[int]


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses that their annotator did not tie: one entry of each array for each pair."""

    prompt: np.ndarray
    """The number of its prompt; several rankings of one prompt share it."""
    kind: np.ndarray
    """Of the prompt; "" where it has none."""
    annotator: np.ndarray
    difference: np.ndarray
    """Score of the response that the annotator preferred less that of the other."""
    rubric: np.ndarray
    """The same difference of the rubric's scores; 0 where it is unknown."""

    @property
    def right(self) -> Float64[np.ndarray, " P"]:
        """1 where the scores have the annotator's order, 0 where the opposite, a half where equal."""
        return (1 + np.sign(self.difference)) / 2

    def accuracy(self, right: Float64[np.ndarray, " P"], some: Any = slice(None)) -> Estimate:
        """The share of these pairs that are right; the pairs of one prompt are not independent."""
        numbers = self.prompt[some]
        prompts = np.unique(numbers, return_inverse=True)[1]
        return clustered(np.bincount(prompts, right[some]), np.bincount(prompts))


def unknown_score(messages: Sequence[Message], text: str) -> float | None:
    """Where there is no rubric."""
    return None


@torch.no_grad()
def judge(model: ScalarModel, encoded: Sequence[EncodedSet], micro_tokens: int = 16_384) -> list[Judged]:
    """The scores of the responses, for every ranking of them. InputError where one is not finite."""
    device, judged = model.bias.device, []
    for micro in micro_batches(encoded, micro_tokens):
        scores = iter(require_finite(scores_of(model)(collate(micro).to(device)).tolist()))
        for one in micro:
            own, lengths = [next(scores) for _ in one.rows], [len(row) for row in one.rows]
            judged += [Judged(ranking, own, lengths) for ranking in one.rankings]
    return judged


def pairs_of(judged: Iterable[Judged], rubric: RubricScore = unknown_score) -> Pairs:
    """All pairs of different texts that their annotators ordered."""
    numbers: dict[str, int] = {}
    rows = []
    for one in judged:
        ranking = one.ranking
        number = numbers.setdefault(prompt_key(ranking), len(numbers))
        values = [rubric(ranking.messages, text) for text in ranking.responses]
        known = [value for value in values if value is not None]
        for i, j in telling_pairs(ranking):
            difference = known[i] - known[j] if len(known) == len(values) else 0.0
            rows.append(
                (number, ranking.kind or "", ranking.annotator, one.scores[i] - one.scores[j], difference)
            )
    columns = list(zip(*rows, strict=True)) or [()] * 5
    types = (np.int64, str, str, np.float64, np.float64)
    return Pairs(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


# ---- Metrics


def by_margin(pairs: Pairs) -> list[dict[str, Any]]:
    """The accuracy in each quarter of the pairs, from the closest scores to the farthest."""
    margin = np.abs(pairs.difference)
    quarters = [part for part in np.array_split(np.argsort(margin, kind="stable"), 4) if len(part)]
    return [
        {"from": float(margin[part[0]]), "to": float(margin[part[-1]]), **pairs.accuracy(pairs.right, part)}
        for part in quarters
    ]


def rater_accuracy(agreed: float) -> float:
    """How often a rater is right if two agree with this probability and all pairs are equally hard; ½ if
    they agree less than by chance."""
    return (1 + sqrt(max(0.0, 2 * agreed - 1))) / 2


def against_rubric(pairs: Pairs) -> dict[str, Any]:
    """How often scores and annotators have the rubric's order, of all pairs that differ by MARGIN, by
    annotator and in classes of the difference; and `ceiling`, how often the rubric has the annotators' order,
    of any."""
    distance, annotators = np.abs(pairs.rubric), (1 + np.sign(pairs.rubric)) / 2
    scores = (1 + np.sign(pairs.rubric) * np.sign(pairs.difference)) / 2

    def shares(low: float, high: float) -> dict[str, Any]:
        within = (low <= distance) & (distance < high)
        return {"scores": pairs.accuracy(scores, within), "annotators": pairs.accuracy(annotators, within)}

    far = distance >= MARGIN
    classes = pairwise((*MARGINS[:-1], np.inf))
    return {
        **shares(MARGIN, np.inf),
        "by_annotator": {
            str(name): pairs.accuracy(annotators, far & (pairs.annotator == name))
            for name in np.unique(pairs.annotator[distance > 0])
        },
        "ceiling": pairs.accuracy(annotators, distance > 0),
        "by_margin": [
            {"from": low, "to": min(high, MARGINS[-1]), **shares(low, high)} for low, high in classes
        ],
    }


Side = Callable[[Ranking, int, int], int]
SIDES: dict[str, tuple[str, str, Side]] = {
    "length": (
        "longer",
        "shorter",
        lambda ranking, i, j: len(ranking.responses[i]) - len(ranking.responses[j]),
    ),
    "majority": ("listed first", "listed last", lambda ranking, i, j: j - i),
}
"""What response i is beside j, known without reading either: above 0 the first word, below 0 the second."""


def baselines(training: Sequence[Ranking], held_out: Sequence[Ranking]) -> dict[str, dict[str, Any]]:
    """The accuracy on held-out pairs of taking one side always: that which wins more of the training pairs.

    `side` is None where there is no choice: in a format that lists the better response first, the place
    is the label itself, and knows nothing.
    """

    def sides(rankings: Sequence[Ranking], side: Side) -> Float64[np.ndarray, " P"]:
        """On which side the better response of each pair is: 1, -1, or 0 for neither."""
        return np.sign([float(side(one, *pair)) for one in rankings for pair in telling_pairs(one)])

    result: dict[str, dict[str, Any]] = {}
    for name, (positive, negative, side) in SIDES.items():
        own = sides(training, side)
        if not len(own) or (name == "majority" and abs(own.sum()) == len(own)):
            result[name] = {"side": None, **estimate(None, 0)}
            continue
        sign = 1 if own.sum() >= 0 else -1
        right = (1 + sign * sides(held_out, side)) / 2
        result[name] = {"side": positive if sign > 0 else negative, **share(right)}
    return result


def within_prompts(judged: Sequence[Judged]) -> tuple[Float64[np.ndarray, " R"], Float64[np.ndarray, " R"]]:
    """All lengths and scores, each less the mean of its ranking."""
    lengths = [np.array(one.lengths, np.float64) - np.mean(one.lengths) for one in judged]
    scores = [np.array(one.scores, np.float64) - np.mean(one.scores) for one in judged]
    return np.concatenate(lengths), np.concatenate(scores)


def length_correlation(judged: Sequence[Judged]) -> float | None:
    """The correlation of score and length within prompts; None where either never varies."""
    lengths, scores = within_prompts(judged)
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


@dataclass(frozen=True)
class Probe:
    """An honest answer to a ranking's prompt and a trick in its place."""

    ranking: Ranking
    honest: str
    trick: str


def probes(rankings: Sequence[Ranking], rubric: RubricScore) -> dict[str, list[Probe]]:
    """For every trick one probe to a prompt; none where the trick leaves the answer as it is, or where
    the rubric gives it no less."""
    of_prompt: dict[str, Ranking] = {}
    for ranking in rankings:
        of_prompt.setdefault(prompt_key(ranking), ranking)
    first = list(of_prompt.values())
    honest = [_honest(ranking, rubric) for ranking in first]

    def is_worse(ranking: Ranking, trick: str, answer: str) -> bool:
        low, high = rubric(ranking.messages, trick), rubric(ranking.messages, answer)
        return trick != answer and (low is None or high is None or low < high)

    return {
        name: [
            Probe(ranking, answer, trick)
            for i, (ranking, answer) in enumerate(zip(first, honest, strict=True))
            for trick in [make(answer, honest[_another(first, i)])]
            if answer.strip() and is_worse(ranking, trick, answer)
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


def probe_shares(
    model: ScalarModel, template: ChatTemplate, of_trick: dict[str, list[Probe]]
) -> dict[str, Estimate]:
    """The share of honest answers that score above the trick, per trick; where both fit the model."""
    longest = model.config.max_position_embeddings

    def rows(probe: Probe) -> list[tuple[int, ...]]:
        texts = (probe.honest, probe.trick)
        return [tuple(encode_response(template, probe.ranking.messages, text)) for text in texts]

    fitting = {
        name: [pair for pair in map(rows, own) if max(map(len, pair)) <= longest]
        for name, own in of_trick.items()
    }
    # An honest answer meets every trick, and is scored once.
    distinct = list(dict.fromkeys(row for pairs in fitting.values() for pair in pairs for row in pair))
    scores = dict(zip(distinct, score_rows(model, distinct), strict=True))
    return {
        name: share([scores[honest] > scores[trick] for honest, trick in pairs])
        for name, pairs in fitting.items()
    }


# ---- The card


def report_card(
    model: ScalarModel,
    template: ChatTemplate,
    judged: Sequence[Judged],
    rankings: Sequence[Ranking],
    rubric: RubricScore = unknown_score,
) -> dict[str, Any]:
    """All metrics, as report.json holds them. `judged` are held-out rankings; `rankings` are all there are,
    for annotators can be compared on those too that the model has seen."""
    pairs, held_out = pairs_of(judged, rubric), [one.ranking for one in judged]
    # σ(|difference|) is how sure the scores are of their order.
    error, bins = reliability(1 / (1 + np.exp(-np.abs(pairs.difference))), pairs.right, lowest=0.5)
    agreed, ordered = agreed_pairs(rankings)
    agreement = agreed / ordered if ordered else None
    prompts = set(map(prompt_key, held_out))
    training = [ranking for ranking in rankings if prompt_key(ranking) not in prompts]
    kinds = [str(kind) for kind in np.unique(pairs.kind) if kind]
    return {
        "prompts": len(prompts),
        "rankings": len(judged),
        "accuracy": pairs.accuracy(pairs.right),
        "annotators": estimate(agreement, ordered)
        | {"ceiling": None if agreement is None else rater_accuracy(agreement)},
        "baselines": baselines(training, held_out),
        "truth": against_rubric(pairs),
        "by_margin": by_margin(pairs),
        "by_kind": {kind: pairs.accuracy(pairs.right, pairs.kind == kind) for kind in kinds},
        "calibration": {"error": error, "bins": bins},
        "length_correlation": length_correlation(judged),
        "probes": probe_shares(model, template, probes(held_out, rubric)),
    }


def report_text(card: dict[str, Any]) -> str:
    """The card in a few lines."""
    accuracy, annotators = card["accuracy"], card["annotators"]
    error, correlation = card["calibration"]["error"], card["length_correlation"]
    lines = [
        f"held out       {card['rankings']} rankings of {card['prompts']} prompts, "
        f"{accuracy['count']} untied pairs",
        f"accuracy       {_percent(accuracy['value'])} of pairs in the annotator's order "
        f"(95%: {_percent(accuracy['low'])} to {_percent(accuracy['high'])})",
        (
            f"ceiling        between {_percent(annotators['value'])} and {_percent(annotators['ceiling'])}, "
            f"for two annotators agree on {_percent(annotators['value'])} of {annotators['count']} pairs"
            if annotators["count"]
            else "ceiling        unknown: no two annotators ranked the same responses"
        ),
        *(
            f"{name:15}{_percent(own['value'])} by taking the response that is {own['side']}"
            for name, own in card["baselines"].items()
            if own["side"]
        ),
        *_rubric_lines(card["truth"], accuracy["value"]),
        f"by margin      {'  '.join(_percent(quarter['value']) for quarter in card['by_margin'])}"
        "  (quarters of the pairs, from close scores to far)",
        *(f"  {kind:13}{_line(own)}" for kind, own in card["by_kind"].items()),
        f"calibration    {'unknown' if error is None else f'{error:.3f}'} expected error",
        f"length         {'unknown' if correlation is None else f'{correlation:+.2f}'} "
        "correlation with the score, within prompts",
        "tricks that score below the honest answer",
        *(f"  {name:13}{_line(own)}" for name, own in card["probes"].items()),
    ]
    return "\n".join(lines)


def _rubric_lines(truth: dict[str, Any], accuracy: float | None) -> list[str]:
    """What the rubric says, where it is known."""
    lines = []
    if truth["ceiling"]["count"] and accuracy is not None:
        ceiling = truth["ceiling"]["value"]
        lines.append(
            f"rubric         has the annotator's order in {_percent(ceiling)} of pairs: this is the ceiling, "
            f"and the accuracy {_percent(accuracy / ceiling if ceiling else None)} of it"
        )
    if truth["scores"]["count"]:
        best = max(own["value"] or 0.0 for own in truth["by_annotator"].values())
        lines.append(
            f"truth          {_percent(truth['scores']['value'])} of {truth['scores']['count']} pairs in the "
            f"rubric's order; annotators {_percent(truth['annotators']['value'])}, the best of them "
            f"{_percent(best)}"
        )
    return lines + [
        f"  {own['from']:.2f} to {own['to']:.2f} {_line(own['scores'])}; "
        f"annotators {_percent(own['annotators']['value'])}"
        for own in truth["by_margin"]
        if own["scores"]["count"]
    ]


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _line(own: Estimate) -> str:
    return f"{_percent(own['value']):>7} of {own['count']}"


def write_report(folder: Path, card: dict[str, Any], judged: Sequence[Judged]) -> None:
    """report.json and report.png."""
    write_json(folder / "report.json", card)
    from matplotlib.figure import Figure  # a second of import that only the end of a run needs

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
    length.scatter(*within_prompts(judged), s=4)
    labels = {what: f"{what}, less the prompt's mean" for what in ("tokens", "score")}
    length.set(xlabel=labels["tokens"], ylabel=labels["score"], title="length")
    write_atomically(folder / "report.png", lambda file: figure.savefig(file, format="png", dpi=120))


def _bars(axes: Any, shares: dict[str, Estimate], title: str) -> None:
    names = [f"{name} ({own['count']})" for name, own in shares.items()]
    axes.barh(names, [own["value"] or 0.0 for own in shares.values()])
    axes.set(xlim=(0, 1), title=title)
    axes.invert_yaxis()
