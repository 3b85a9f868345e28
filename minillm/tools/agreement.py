"""How far annotators agree, over the prompts that several of them ranked.

Of two responses to a prompt an annotator prefers one, or holds them equal. Two metrics:

    agreement   the share of pairs of responses on which two annotators agree, of those on which both
                have a preference. Chance gives 1/2. The pairs of one prompt are not independent: its
                interval counts prompts (measures.py, `share` with counts).
    alpha       Krippendorff's, over all preferences, ties included: 1 for perfect agreement, 0 for
                what chance would give.

Labelers of Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.4, agreed on 72.6 ± 1.5 %.
Alpha: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D, for any number of
annotators with missing values; its ordinal difference, for a tie lies between the two preferences.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int64

from minillm.errors import InputError
from minillm.preferences import Ranking
from minillm.tools.measures import share, written
from minillm.tools.render import columns

ALL = ("all",)

Preferences = Int64[np.ndarray, " _"]
"""Of each two different responses, in the order of the alphabet: 1 for the first, -1 for the second, 0."""


def agreement_report(rankings: Iterable[Ranking]) -> dict[str, Any]:
    """The rows of `agreements`, and alpha, None where there is nothing but ties.

    InputError where no prompt has the rankings of two annotators.
    """
    opinions = opinions_of(rankings)
    rows = agreements(opinions)
    if not rows:
        raise InputError(
            "no prompt was ranked by two annotators; rank with more --opinions, or by another --name"
        )
    # Each pair is there in both orders: which response is called the first must not count.
    tables = [sign * np.stack(list(own.values()), axis=1) for own in opinions for sign in (1, -1)]
    return {"rows": rows, "alpha": krippendorff_alpha([unit for table in tables for unit in table.tolist()])}


def opinions_of(rankings: Iterable[Ranking]) -> list[dict[str, Preferences]]:
    """For every prompt, by annotator; of two rankings of a set by one annotator the later counts."""
    by_prompt: dict[str, dict[str, Preferences]] = defaultdict(dict)
    for ranking in rankings:
        by_prompt[ranking.key][ranking.annotator] = preferences(ranking)
    return list(by_prompt.values())


def preferences(ranking: Ranking) -> Preferences:
    """What a ranking says of each two texts, whatever order they were listed in; of equal ones the best."""
    rank: dict[str, int] = {}
    for text, place in zip(ranking.responses, ranking.ranks(), strict=True):
        rank[text] = min(place, rank.get(text, place))
    ranks = np.array([rank[text] for text in sorted(rank)], np.int64)
    first, second = np.triu_indices(len(ranks), 1)
    return np.sign(ranks[second] - ranks[first])


def agreements(opinions: Iterable[dict[str, Preferences]]) -> list[dict[str, Any]]:
    """Of all annotators, then of each two who share a prompt, an estimate of the share of pairs on which they
    agree, with their names, the prompts, and the ties: pairs left out, for one of the two holds the responses
    equal. Empty where nobody shares a prompt."""
    counts: dict[tuple[str, ...], list[Sequence[int]]] = defaultdict(list)  # of each prompt: +, -, ties
    for own in opinions:
        compared = {(a, b): own[a] * own[b] for a, b in combinations(sorted(own), 2)}
        for pair, products in compared.items():
            counts[pair].append([int((products == product).sum()) for product in (1, -1, 0)])
        if compared:
            counts[ALL].append(np.sum([counts[pair][-1] for pair in compared], axis=0))
    rows = []
    for names in sorted(counts, key=lambda names: (names != ALL, names)):
        agreed, differed, ties = np.array(counts[names]).T
        row = {"annotators": list(names), "prompts": len(agreed), "ties": int(ties.sum())}
        rows.append(row | share(agreed, agreed + differed))
    return rows


def agreement_table(report: dict[str, Any]) -> str:
    """The report as text, a line for each two annotators."""
    rows = [["", "prompts", "pairs", "ties", "agreement", "95 % interval"]]
    for row in report["rows"]:
        counts = [str(row[name]) for name in ("prompts", "count", "ties")]
        interval = "" if row["low"] is None else "{low:.1%} to {high:.1%}".format(**row)
        rows.append([" and ".join(row["annotators"]), *counts, written(row)[0], interval])
    alpha = "–" if report["alpha"] is None else f"{report['alpha']:.3f}"
    return f"{columns(rows)}\nKrippendorff's alpha (ordinal): {alpha}"


def krippendorff_alpha(units: Sequence[Sequence[int]]) -> float | None:
    """Krippendorff's alpha for ordinal values: those that annotators gave to each unit, in any order.

    With o(c, k) the number of pairs of values c and k within units, each unit of m values counting
    1 / (m - 1), n(c) = Σ_k o(c, k) and n = Σ_c n(c):

        alpha = 1 - (n - 1) Σ o(c, k) δ²(c, k) / Σ n(c) n(k) δ²(c, k)
        δ²(c, k) = (Σ_{g = c..k} n(g) - (n(c) + n(k)) / 2)²

    None where no two values differ, for then nothing is known of what chance would give.
    """
    values = sorted({value for unit in units for value in unit})
    counts = np.array([[unit.count(value) for value in values] for unit in units if len(unit) > 1], float)
    counts = counts.reshape(-1, len(values))
    weighted = counts / (counts.sum(1, keepdims=True) - 1)
    o = weighted.T @ counts - np.diag(weighted.sum(0))  # no value is paired with itself
    n = o.sum(0)
    middle = n.cumsum() - n / 2  # δ is the distance between the middles of two values' shares
    difference = (middle[:, None] - middle) ** 2
    expected = float(n @ difference @ n)
    return None if not expected else 1 - float((n.sum() - 1) * (o * difference).sum()) / expected
