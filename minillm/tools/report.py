"""How far annotators agree; how far to trust a reward model, and what fools it.

    rankings of one prompt by several annotators ──► agreement
    held-out rankings ──► scores ──► shares of pairs, calibration, length ──► report.json, report.png
    answers, and tricks made of them ──► scores ──► the share of tricks that do not pay

All of it is said of pairs of different texts. A pair has a gap by each measure: the place in a ranking, the
score, the length, the rubric. Two measures order the pair alike where their gaps have one sign.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice, pairwise
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from minillm.chat import ChatTemplate
from minillm.io.disk import write_json
from minillm.model import ScalarModel, score_rows
from minillm.preferences import Message, Ranking
from minillm.reward import EncodedSet, encode_rankings, prompt_key
from minillm.tools.annotators import ranked
from minillm.tools.measures import Estimate, Rows, estimate, mean, reliability, table_text
from minillm.tools.streams import tables
from minillm.world.annotators import MARGIN

WORDS = tables(__file__)
"""What the tables say, and tricks: what might score without being good, made of an honest answer and of the
next prompt's. A good reward model puts each below the honest answer."""


def gaps(ranking: Ranking, values: Sequence[float | int]) -> Float64[np.ndarray, " _"]:
    """By how much the value of each response exceeds that of each further one in the order of the alphabet;
    of equal texts the highest value counts."""
    own = dict(sorted(zip(ranking.responses, values, strict=True))).values()
    return np.array([first - second for first, second in combinations(own, 2)], np.float64)


def preferences(ranking: Ranking) -> Float64[np.ndarray, " _"]:
    """The gaps between the places, a better place being the higher value."""
    return gaps(ranking, [-rank for rank in ranking.ranks()])


# ---- How far annotators agree

ALL = "all"


def agreements(rankings: Iterable[Ranking]) -> Rows:
    """Of all annotators, then of each two who share a prompt: the share of pairs on which they agree, the
    prompts, the pairs, and the ties: pairs left out, for one of the two holds the responses equal. Of two
    rankings of a set by one annotator the later counts."""
    by_prompt: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for ranking in rankings:
        by_prompt[ranking.key][ranking.annotator] = np.sign(preferences(ranking))
    products: dict[str, list[np.ndarray]] = defaultdict(list)  # of each prompt: 1, -1, or 0 for a tie
    for own in by_prompt.values():
        compared = {f"{a} and {b}": own[a] * own[b] for a, b in combinations(sorted(own), 2)}
        compared |= {ALL: np.concatenate([*compared.values()])} if compared else {}
        for names, product in compared.items():
            products[names].append(product)
    rows = {}
    for names in sorted(products, key=lambda names: (names != ALL, names)):
        of_prompts = products[names]
        found = mean(*np.array([[np.sum(one > 0), np.sum(one != 0)] for one in of_prompts]).T)
        ties = sum(map(len, of_prompts)) - found["count"]
        whole = {"prompts": len(of_prompts), "pairs": found["count"], "ties": ties}
        rows[names] = {"agreement": found} | {n: estimate(x, x, form="whole") for n, x in whole.items()}
    return rows


# ---- A reward model

MARGINS = (MARGIN, 0.05, 0.1, 0.2, 0.4, inf)  # bounds of the classes of how far two rubric scores are apart

RubricScore = Callable[[Sequence[Message], str], float | None]
"""What the rubric gives a reply to these messages; None where it knows nothing of them."""


Pairs = np.ndarray
"""A record for each pair of different texts of a ranking: the key of its prompt, which the pairs of all
rankings of the prompt share; annotator and kind; and its gaps: in place, in score, in length by tokens and in
what the rubric gives, 0 where that is unknown."""
PAIR = [(name, "O") for name in ("prompt", "annotator", "kind")]
PAIR += [(name, "f8") for name in ("place", "score", "length", "rubric")]


def pairs_of(encoded: Iterable[EncodedSet], scores: Iterable[float], rubric: RubricScore) -> Pairs:
    """All pairs of all rankings; the scores are those of the rows, set after set."""
    pairs, coming = list[tuple[Any, ...]](), iter(scores)
    for one in encoded:
        measured = list(islice(coming, len(one.rows))), list(map(len, one.rows))
        for ranking in one.rankings:
            given = [rubric(ranking.messages, text) for text in ranking.responses]
            known = [0.0 if value is None or None in given else value for value in given]
            own = (gaps(ranking, values) for values in (*measured, known))
            who = prompt_key(ranking), ranking.annotator, ranking.kind
            pairs += [(*who, *gap) for gap in zip(preferences(ranking), *own, strict=True)]
    return np.array(pairs, PAIR)


def alike(pairs: Pairs, one: str, other: str) -> Estimate:
    """The share of pairs that two measures order alike; a tie is half right. The pairs of one prompt are not
    independent."""
    same = (1 + np.sign(pairs[one] * pairs[other])) / 2
    _, prompt = np.unique(pairs["prompt"], return_inverse=True)
    return mean(np.bincount(prompt, same), np.bincount(prompt))


def shares(pairs: Pairs) -> Rows:
    """Of pairs that an annotator ordered, all, by kind, by annotator, and by how far the rubric's scores are
    apart: what report.toml says of "pairs". Truth is asked of those that differ by MARGIN."""
    apart, parts = np.abs(pairs["rubric"]), {ALL: pairs}
    for word, field in (("of", "kind"), ("by", "annotator")):
        for name in sorted({*pairs[field]} - {None}):
            parts[f"{word} {name}"] = pairs[pairs[field] == name]
    for low, high in pairwise(MARGINS):
        parts[f"{low:g} to {high:g} apart"] = pairs[(low <= apart) & (apart < high)]
    rows = Rows()
    for label, own in parts.items():
        known, far = (own[np.abs(own["rubric"]) >= least] for least in (1e-9, MARGIN))
        rows[label] = {
            "pairs": estimate(len(own), len(own), form="whole"),
            "accuracy": alike(own, "place", "score"),
            "longer": alike(own, "place", "length"),
            "ceiling": alike(known, "place", "rubric"),
            "truth": alike(far, "rubric", "score"),
            "annotators": alike(far, "rubric", "place"),
        }
    return {label: row for label, row in rows.items() if label == ALL or row["pairs"]["value"]}


def rater_accuracy(agreed: float) -> float:
    """How often a rater is right if two agree with this probability and all pairs are equally hard; ½ if
    they agree less than by chance."""
    return (1 + sqrt(max(0.0, 2 * agreed - 1))) / 2


def length_correlation(pairs: Pairs) -> float | None:
    """The correlation of score and length within rankings. None where either never varies."""
    score, length = pairs["score"], pairs["length"]
    size = sqrt((score**2).sum() * (length**2).sum())
    return float((score * length).sum()) / size if size else None


# ---- Tricks


def tricks(rankings: Sequence[Ranking], rubric: RubricScore) -> Iterator[Ranking]:
    """For every trick, of each prompt a ranking in its name: an honest answer, which is the response that the
    rubric gives most or else the annotator's best, above the trick in its place. None where the trick leaves
    the answer as it is, or where the rubric gives it no less."""
    first = {prompt_key(ranking): ranking for ranking in reversed(rankings)}
    asked, honest = [first[key] for key in dict.fromkeys(map(prompt_key, rankings))], []
    for one in asked:
        scored = [(rubric(one.messages, text), text) for text in one.responses]
        known = [(score, text) for score, text in scored if score is not None]
        honest.append(max(known)[1] if known else one.responses[one.ranking[0][0]])
    for name, made in WORDS["tricks"].items():
        for one, answer, other in zip(asked, honest, [*honest[1:], *honest[:1]], strict=True):
            trick = made.format(answer=answer, other=other)
            is_worse = ranked([rubric(one.messages, text) for text in (answer, trick)]) in ([[0], [1]], None)
            if answer.strip() and answer != trick and is_worse:
                yield replace(one, responses=[answer, trick], ranking=[[0], [1]], annotator=name, cut=[])


# ---- The card


def report_card(
    model: ScalarModel,
    template: ChatTemplate,
    held_out: Sequence[EncodedSet],
    rankings: Sequence[Ranking],
    rubric: RubricScore | None = None,
) -> dict[str, Any]:
    """All metrics, as report.json holds them. `rankings` are all there are, for annotators can be compared on
    those too that the model has seen. InputError where a score is not finite."""
    of_text = rubric or (lambda messages, text: None)

    def scored(sets: Sequence[EncodedSet]) -> Pairs:
        return pairs_of(sets, score_rows(model, [row for one in sets for row in one.rows]), of_text)

    pairs = scored(held_out)
    ordered, own = pairs[pairs["place"] != 0], [ranking for one in held_out for ranking in one.rankings]
    # σ(|difference|) is how sure the scores are of their order.
    sure = 1 / (1 + np.exp(-np.abs(ordered["score"])))
    right = (1 + np.sign(ordered["place"] * ordered["score"])) / 2
    error, bins = reliability(sure, right, lowest=0.5)
    agreed = agreements(rankings).get(ALL, {"agreement": estimate(None, 0)})["agreement"]
    best = None if agreed["value"] is None else rater_accuracy(agreed["value"])
    tricked = scored(encode_rankings(tricks(own, of_text), template, model.config.max_position_embeddings)[0])
    whole = {
        "two annotators agree: the ceiling is no lower": agreed,
        "and no higher, if all pairs are equally hard": estimate(best, agreed["count"]),
        "calibration error (ECE)": estimate(error, len(sure), form="nats"),
        "correlation of score and length": estimate(length_correlation(pairs), len(pairs), form="signed"),
    }
    return {
        "prompts": len(set(map(prompt_key, own))),
        "rankings": len(own),
        "pairs": shares(ordered),
        "whole": {label: {"value": found} for label, found in whole.items()},
        "tricks": {
            name: {"share": alike(tricked[tricked["annotator"] == name], "place", "score")}
            for name in WORDS["tricks"]
        },
        "bins": bins,
    }


def report_text(card: dict[str, Any]) -> str:
    """The card as tables."""
    said = [f"{card['rankings']:,} rankings of {card['prompts']:,} held-out prompts"]
    return "\n\n".join(
        said + [f"{title}\n{table_text(card[name])}" for name, title in WORDS["tables"].items()]
    )


def write_report(folder: Path, card: dict[str, Any]) -> None:
    """report.json, and report.png: how often the scores' order is right where they are so sure of it."""
    write_json(folder / "report.json", card)
    from minillm.tools.plots import Figure, save  # a second of import that only the end of a run needs

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, bins = figure.add_subplot(), card["bins"]
    axes.plot([0.5, 1], [0.5, 1], ":", color="black")
    axes.plot([b["sure"] for b in bins], [b["accuracy"] for b in bins], "o-")
    axes.set(xlabel="σ(difference of scores)", ylabel="accuracy", title="calibration")
    save(figure, folder / "report.png")
