"""How far annotators agree, over the prompts that several of them ranked.

Of two responses to a prompt an annotator prefers one, or holds them equal. Agreement is the share of pairs of
responses on which two annotators agree, of those on which both have a preference. Chance gives 1/2. The pairs
of one prompt are not independent: its interval counts prompts (measures.py).

Labelers of Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.4, agreed on 72.6 ± 1.5 %.
Left out: agreement beyond chance, such as Krippendorff's alpha.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int64

from minillm.errors import InputError
from minillm.preferences import Ranking
from minillm.tools.measures import mean, written
from minillm.tools.render import columns

ALL = ("all",)


def agreement_report(rankings: Iterable[Ranking]) -> dict[str, Any]:
    """The rows of `agreements`. InputError where no prompt has the rankings of two annotators."""
    if rows := agreements(rankings):
        return {"rows": rows}
    raise InputError(
        "no prompt was ranked by two annotators; rank with more --opinions, or by another --name"
    )


def agreements(rankings: Iterable[Ranking]) -> list[dict[str, Any]]:
    """Of all annotators, then of each two who share a prompt, an estimate of the share of pairs on which they
    agree, with their names, the prompts, and the ties: pairs left out, for one of the two holds the responses
    equal. Empty where nobody shares a prompt. Of two rankings of a set by one annotator the later counts."""
    by_prompt: dict[str, dict[str, Int64[np.ndarray, " _"]]] = defaultdict(dict)
    for ranking in rankings:
        by_prompt[ranking.key][ranking.annotator] = preferences(ranking)
    counts: dict[tuple[str, ...], list[Sequence[int]]] = defaultdict(list)  # of each prompt: +, -, ties
    for own in by_prompt.values():
        compared = {(a, b): own[a] * own[b] for a, b in combinations(sorted(own), 2)}
        for pair, products in compared.items():
            counts[pair].append([int((products == product).sum()) for product in (1, -1, 0)])
        if compared:
            counts[ALL].append(np.sum([counts[pair][-1] for pair in compared], axis=0))
    rows = []
    for names in sorted(counts, key=lambda names: (names != ALL, names)):
        agreed, differed, ties = np.array(counts[names]).T
        row = {"annotators": list(names), "prompts": len(agreed), "ties": int(ties.sum())}
        rows.append(row | mean(agreed, agreed + differed))
    return rows


def preferences(ranking: Ranking) -> Int64[np.ndarray, " _"]:
    """What a ranking says of each two different texts, in the order of the alphabet: 1 for the first, -1 for
    the second, 0. Of equal texts the best place counts."""
    rank: dict[str, int] = {}
    for text, place in zip(ranking.responses, ranking.ranks(), strict=True):
        rank[text] = min(place, rank.get(text, place))
    ranks = np.array([rank[text] for text in sorted(rank)], np.int64)
    first, second = np.triu_indices(len(ranks), 1)
    return np.sign(ranks[second] - ranks[first])


def agreement_table(report: dict[str, Any]) -> str:
    """The report as text, a line for each two annotators."""
    rows = [["", "prompts", "pairs", "ties", "agreement"]]
    for row in report["rows"]:
        counts = [str(row[name]) for name in ("prompts", "count", "ties")]
        rows.append([" and ".join(row["annotators"]), *counts, " ".join(written(row))])
    return columns(rows)
