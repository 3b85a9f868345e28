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
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Int64

from minillm.errors import InputError
from minillm.preferences import Ranking
from minillm.tools.measures import share

ALL = ("all",)

Preferences = Int64[np.ndarray, " _"]
"""Of each two different responses, in the order of the alphabet: 1 for the first, -1 for the second, 0."""


@dataclass(frozen=True)
class Agreement:
    """Of two annotators, or of all pairs of them together."""

    annotators: tuple[str, ...]
    prompts: int
    pairs: int
    """On which both have a preference."""
    ties: int
    """Pairs left out, for one of the two at least holds the responses equal."""
    rate: float | None
    """None without a pair to judge by."""
    interval: tuple[float, float] | None
    """Of 95 %; None of a single prompt."""


@dataclass(frozen=True)
class AgreementReport:
    """All that is known about the agreement of some rankings."""

    rows: list[Agreement]
    """Of all, then of each two annotators who share a prompt."""
    alpha: float | None
    """None where there is nothing but ties."""


def agreement_report(rankings: Iterable[Ranking]) -> AgreementReport:
    """Raises InputError where no prompt has the rankings of two annotators."""
    opinions = opinions_of(rankings)
    rows = agreements(opinions)
    if not rows:
        raise InputError(
            "no prompt was ranked by two annotators; rank with more --opinions, or by another --name"
        )
    # Each pair is there in both orders: which response is called the first must not count.
    tables = [sign * np.stack(list(own.values()), axis=1) for own in opinions for sign in (1, -1)]
    return AgreementReport(rows, krippendorff_alpha([unit for table in tables for unit in table.tolist()]))


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


def agreements(opinions: Iterable[dict[str, Preferences]]) -> list[Agreement]:
    """Of all annotators, then of each two who share a prompt; empty where nobody does."""
    by_pair: dict[tuple[str, ...], list[Sequence[int]]] = defaultdict(list)
    for own in opinions:
        compared = {(a, b): own[a] * own[b] for a, b in combinations(sorted(own), 2)}
        for pair, products in compared.items():
            by_pair[pair].append([int((products == product).sum()) for product in (1, -1, 0)])
        if compared:
            by_pair[ALL].append(np.sum([by_pair[pair][-1] for pair in compared], axis=0))
    rows = []
    for annotators in sorted(by_pair, key=lambda names: (names != ALL, names)):
        agreed, differed, ties = np.array(by_pair[annotators]).T
        rate = share(agreed, agreed + differed)
        interval = None if rate["low"] is None or rate["high"] is None else (rate["low"], rate["high"])
        rows.append(
            Agreement(annotators, len(agreed), rate["count"], int(ties.sum()), rate["value"], interval)
        )
    return rows


def agreement_table(report: AgreementReport) -> str:
    """The report as text, a line for each two annotators."""
    names = [" and ".join(row.annotators) for row in report.rows]
    width = max(map(len, names))
    lines = [f"{'':{width}}  prompts  pairs  ties  agreement  95 % interval"]
    for name, row in zip(names, report.rows, strict=True):
        rate = "        –" if row.rate is None else f"{row.rate:9.1%}"
        interval = "" if row.interval is None else "{:.1%} to {:.1%}".format(*row.interval)
        counts = f"{row.prompts:7}  {row.pairs:5}  {row.ties:4}"
        lines.append(f"{name:{width}}  {counts}  {rate}  {interval}".rstrip())
    alpha = "–" if report.alpha is None else f"{report.alpha:.3f}"
    return "\n".join([*lines, f"Krippendorff's alpha (ordinal): {alpha}"])


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
