"""How far annotators agree, over the prompts that several of them ranked.

Of two responses to a prompt an annotator prefers one, or holds them equal. Two metrics:

    agreement   the share of pairs of responses on which two annotators agree, of those on which both
                have a preference. Chance gives 1/2. The pairs of one prompt are not independent: its
                interval counts prompts (measures.py, `clustered`).
    alpha       Krippendorff's, over all preferences, ties included: 1 for perfect agreement, 0 for
                what chance would give.

Labelers of Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.4, agreed on 72.6 ± 1.5 %.
Alpha: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D, for any number of
annotators with missing values; its ordinal difference, for a tie lies between the two preferences.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from minillm.errors import InputError
from minillm.preferences import Ranking
from minillm.tools.measures import clustered

ALL = "all"

Preferences = dict[tuple[str, str], int]
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
    by_prompt = _preferences(rankings)
    counts: dict[tuple[str, ...], list[Counter[int]]] = defaultdict(list)
    for opinions in by_prompt:
        compared = _compare(opinions)
        for pair, count in compared.items():
            counts[pair].append(count)
        if compared:
            counts[ALL,].append(sum(compared.values(), Counter()))
    if not counts:
        raise InputError(
            "no prompt was ranked by two annotators; rank with more --opinions, or by another --name"
        )
    pairs = sorted(counts.keys() - {(ALL,)})
    rows = [_agreement(pair, counts[pair]) for pair in [(ALL,), *pairs]]
    return AgreementReport(rows, krippendorff_alpha(_units(by_prompt)))


def agreed_pairs(rankings: Iterable[Ranking]) -> tuple[int, int]:
    """On how many pairs two annotators agree, and of how many on which both have a preference."""
    compared = [count for opinions in _preferences(rankings) for count in _compare(opinions).values()]
    agreed = sum(count[1] for count in compared)
    return agreed, agreed + sum(count[-1] for count in compared)


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


def _preferences(rankings: Iterable[Ranking]) -> list[dict[str, Preferences]]:
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
    return {
        (first, second): int(np.sign(rank[second] - rank[first]))
        for first, second in combinations(sorted(rank), 2)
    }


def _compare(opinions: Mapping[str, Preferences]) -> dict[tuple[str, str], Counter[int]]:
    """For each two annotators of one prompt on how many pairs they agree (1), differ (-1) or one ties (0)."""
    return {
        (a, b): Counter(opinions[a][pair] * opinions[b][pair] for pair in opinions[a])
        for a, b in combinations(sorted(opinions), 2)
    }


def _agreement(annotators: tuple[str, ...], counts: Sequence[Counter[int]]) -> Agreement:
    agreed, differed, ties = ([count[product] for count in counts] for product in (1, -1, 0))
    rate = clustered(agreed, np.add(agreed, differed))
    interval = None if rate["low"] is None or rate["high"] is None else (rate["low"], rate["high"])
    return Agreement(annotators, len(counts), rate["count"], sum(ties), rate["value"], interval)


def _units(prompts: Iterable[Mapping[str, Preferences]]) -> list[list[int]]:
    """For each two responses of a prompt what all its annotators prefer.

    Each pair stands there in both orders: which response is called the first must not count.
    """
    units = []
    for opinions in prompts:
        for pair in next(iter(opinions.values())):
            unit = [opinion[pair] for opinion in opinions.values()]
            units += [unit, [-value for value in unit]]
    return units


def krippendorff_alpha(units: Iterable[Sequence[int]]) -> float | None:
    """Krippendorff's alpha for ordinal values: those that annotators gave to each unit, in any order.

    With o(c, k) the number of pairs of values c and k within units, each unit of m values counting
    1 / (m - 1), n(c) = Σ_k o(c, k) and n = Σ_c n(c):

        alpha = 1 - (n - 1) Σ o(c, k) δ²(c, k) / Σ n(c) n(k) δ²(c, k)
        δ²(c, k) = (Σ_{g = c..k} n(g) - (n(c) + n(k)) / 2)²

    None where no two values differ, for then nothing is known of what chance would give.
    """
    coincidences: defaultdict[tuple[int, int], float] = defaultdict(float)
    for unit in units:
        for pair in permutations(unit, 2):
            coincidences[pair] += 1 / (len(unit) - 1)
    marginals: defaultdict[int, float] = defaultdict(float)
    for (value, _), count in coincidences.items():
        marginals[value] += count
    # δ is the distance from the middle of the one value's share of all values to that of the other.
    middle, below = {}, 0.0
    for value in sorted(marginals):
        middle[value] = below + marginals[value] / 2
        below += marginals[value]
    difference = {(c, k): (middle[c] - middle[k]) ** 2 for c in middle for k in middle}
    expected = sum(marginals[c] * marginals[k] * d for (c, k), d in difference.items())
    if not expected:
        return None
    observed = sum(count * difference[pair] for pair, count in coincidences.items())
    return 1 - (below - 1) * observed / expected
