"""Estimates with their uncertainty, as pure functions of numbers, and how they are written.

An `Estimate` is a metric and its 95 % interval: in 95 of 100 repetitions with other prompts it holds the
truth. It goes into JSON as it is and knows the form in which it is shown. Every interval of the project comes
from `mean`: Σa / Σb over prompts, each with its own a and b (1 where none is given), whose variance is the
delta method's,

    r = Σa / Σb        var r ≈ Σ (a - r b)² / (Σb)²

A share lies in [0, 1], so it has Wilson's interval, for as many independent values as would give the same
variance, r (1 - r) / var r. Where each prompt gives several values, which go together, these are fewer than
there are. Where each gives one, they are as many; a tie, half a win, varies less, so that the interval is too
wide rather than too narrow. It is never empty, not even where all values are alike.

Sources: Wilson 1927; the delta method for ratios, Cochran 1977, "Sampling Techniques", section 2.11;
calibration error, Guo et al. 2017 (arXiv 1706.04599), section 2.
Left out: corrections for many comparisons. One interval in twenty misses.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float64, Real

from minillm.tools.streams import columns, tables

Z = 1.96  # standard errors to each side of a 95 % interval
BINS = 10  # of the predicted probability

Values = Sequence[float | int] | Real[np.ndarray, " N"] | Bool[np.ndarray, " N"]
Known = float | int | None

FORMS = tables(__file__)
"""How a value is written, how its interval is, and by what that is multiplied."""


class Estimate(TypedDict):
    """A metric, its interval (None where it is unknown), the number of values it rests on, and its form."""

    value: Known
    low: Known
    high: Known
    count: int
    form: str


Rows = dict[str, dict[str, Estimate]]
"""A table: by row and column."""


def estimate(
    value: Known, count: int, low: Known = None, high: Known = None, form: str = "share"
) -> Estimate:
    return {"value": value, "low": low, "high": high, "count": count, "form": form}


def written(found: Mapping[str, Any]) -> tuple[str, str]:
    """An estimate and its interval as text: 72.0% and (64–80); a dash where nothing is known."""
    value, interval, scale = FORMS[found["form"]]
    if found["value"] is None:
        return "–", ""
    bounds = [found["low"], found["high"]]
    known = None not in bounds
    return value.format(found["value"]), interval.format(*(scale * x for x in bounds)) if known else ""


def table_text(rows: Rows) -> str:
    """A table as text."""
    cells = [[label, *(" ".join(written(x)) for x in own.values())] for label, own in rows.items()]
    return columns([["", *next(iter(rows.values()))], *cells])


def mean(values: Values, counts: Values | None = None, form: str = "share") -> Estimate:
    """Σ values / Σ counts, without `counts` the mean. Each value is of one prompt, the sum of so many."""
    a = np.asarray(values, np.float64)
    b = np.ones(len(a)) if counts is None else np.asarray(counts, np.float64)
    n, total = len(a), float(b.sum())
    if not total:
        return estimate(None, 0, form=form)
    r = float(a.sum() / total)
    variance = float(((a - r * b) ** 2).sum()) / total**2
    if form == "share":
        # Where prompts do not differ but for rounding, as one alone does not, each counts as one value.
        size = n if counts is None or variance < 1e-20 else r * (1 - r) / variance
        middle = (r + Z**2 / (2 * size)) / (1 + Z**2 / size)
        half = Z / (1 + Z**2 / size) * sqrt(max(0.0, r * (1 - r)) / size + Z**2 / (4 * size**2))
        # r lies inside but for rounding, which shows where r is 0 or 1.
        low, high = max(0.0, min(r, middle - half)), min(1.0, max(r, middle + half))
    elif n == 1:
        return estimate(r, int(total), form=form)
    else:
        half = Z * sqrt(n / (n - 1) * variance)
        low, high = r - half, r + half
    return estimate(r, int(total), low, high, form)


def win_rates(outcomes: Sequence[int]) -> dict[str, Estimate]:
    """Shares of wins (1), ties (0) and losses (-1), and the rate of wins, ties counting half."""
    signs = {"win": 1, "tie": 0, "loss": -1}
    shares = {name: mean([outcome == sign for outcome in outcomes]) for name, sign in signs.items()}
    return shares | {"rate": mean([(1 + outcome) / 2 for outcome in outcomes])}


def reliability(
    sure: Float64[np.ndarray, " N"], right: Float64[np.ndarray, " N"], lowest: float = 0.0
) -> tuple[float | None, list[dict[str, Any]]]:
    """The expected calibration error and its bins, equally wide from `lowest` to 1.

    The error is the mean over all of the distance between how sure they are on average in their bin and
    how often they are right there. None of nothing.
    """
    if not len(sure):
        return None, []
    number = np.clip(((sure - lowest) / (1 - lowest) * BINS).astype(int), 0, BINS - 1)
    own = [(sure[number == i], right[number == i]) for i in np.unique(number)]
    bins = [{"sure": float(s.mean()), "accuracy": float(r.mean()), "count": len(s)} for s, r in own]
    return sum(b["count"] * abs(b["sure"] - b["accuracy"]) for b in bins) / len(sure), bins
