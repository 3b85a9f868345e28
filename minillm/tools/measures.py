"""Estimates with their uncertainty, as pure functions of numbers and texts, and how they are written.

An `Estimate` is a metric and its 95 % interval: in 95 of 100 repetitions with other prompts it holds the
truth. It goes into JSON as it is and knows the form in which it is shown. Every interval of the project comes
from here, by one of two formulas:

    share      Wilson's interval, for one value in [0, 1] per prompt. It is never empty, not even where all
               values are 0 or all 1. Values between 0 and 1 (a tie is half a win) vary less than shares of
               the same mean, so that it is then too wide rather than too narrow.
    mean       Σa / Σb over prompts, each with its own a and b (1 where none is given): the delta method. A
               share of which each prompt gives several values uses it too, for these are not independent.

Sources: Wilson 1927; the delta method for ratios, Cochran 1977, "Sampling Techniques", section 2.11;
calibration error, Guo et al. 2017 (arXiv 1706.04599), section 2; distinct n-grams, Li et al. 2016
(arXiv 1510.03055), section 5.
Left out: corrections for many comparisons. One interval in twenty misses.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float64, Real

Z = 1.96  # standard errors to each side of a 95 % interval
BINS = 10  # of the predicted probability

Values = Sequence[float | int] | Real[np.ndarray, " N"] | Bool[np.ndarray, " N"]


FORMS = {
    "share": ("{:.1%}", "({:.0f}–{:.0f})", 100),
    "score": ("{:.2f}", "({:.2f}–{:.2f})", 1),
    "nats": ("{:.3f}", "({:.3f}–{:.3f})", 1),
    "count": ("{:.1f}", "({:.1f}–{:.1f})", 1),
    "whole": ("{:,.0f}", "", 1),
    "signed": ("{:+.3f}", "({:+.3f} to {:+.3f})", 1),
}
"""How a value is written, how its interval is, and by what that is multiplied."""


class Estimate(TypedDict):
    """A metric, its interval (None where it is unknown), the number of values it rests on, and its form."""

    value: float | int | None
    low: float | None
    high: float | None
    count: int
    form: str


def estimate(
    value: float | int | None,
    count: int,
    low: float | None = None,
    high: float | None = None,
    form: str = "share",
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


def share(values: Values, counts: Values | None = None) -> Estimate:
    """The mean of values in [0, 1]. With `counts`, each value is the sum of so many from one prompt."""
    n = len(values)
    if counts is not None:
        found = mean(values, counts)
        low, high = (None if x is None else min(1.0, max(0.0, x)) for x in (found["low"], found["high"]))
        return estimate(found["value"], int(np.sum(counts)), low, high)
    if not n:
        return estimate(None, 0)
    p = float(np.mean(values))
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(max(0.0, p * (1 - p)) / n + Z**2 / (4 * n**2))
    # p lies inside but for rounding, which shows where p is 0 or 1.
    return estimate(p, n, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def mean(values: Values, counts: Values | None = None, form: str = "score") -> Estimate:
    """Σ values / Σ counts; without `counts` the mean. Of one prompt alone no interval is known.

    With r = Σa / Σb and n prompts, var r ≈ n / (n - 1) · Σ (a - r b)² / (Σb)².
    """
    a = np.asarray(values, np.float64)
    b = np.ones(len(a)) if counts is None else np.asarray(counts, np.float64)
    n, total = len(a), float(b.sum())
    if not total:
        return estimate(None, n, form=form)
    r = float(a.sum() / total)
    if n == 1:
        return estimate(r, 1, form=form)
    half = Z * sqrt(n / (n - 1) * float(((a - r * b) ** 2).sum())) / total
    return estimate(r, n, r - half, r + half, form)


def win_rates(outcomes: Sequence[int]) -> dict[str, Estimate]:
    """Shares of wins (1), ties (0) and losses (-1), and the rate of wins, ties counting half."""
    shares = {
        name: share([outcome == sign for outcome in outcomes])
        for name, sign in (("win", 1), ("tie", 0), ("loss", -1))
    }
    return shares | {"rate": share([(1 + outcome) / 2 for outcome in outcomes])}


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
    bins = [
        {
            "sure": float(sure[number == i].mean()),
            "accuracy": float(right[number == i].mean()),
            "count": int((number == i).sum()),
        }
        for i in np.unique(number)
    ]
    distance = sum(b["count"] * abs(b["sure"] - b["accuracy"]) for b in bins)
    return distance / len(sure), bins


def repetition(text: str, n: int = 2) -> float:
    """The share of a text's runs of n words that it has had before; 0 of a text too short for two."""
    different = distinct([text], n)
    return 0.0 if different is None else 1 - different


def distinct(texts: Sequence[str], n: int = 2) -> float | None:
    """The share of different ones among all runs of n words of all texts: little where all sound alike."""
    words = [text.lower().split() for text in texts]
    runs = [run for own in words for run in zip(*(own[i:] for i in range(n)), strict=False)]
    return len(set(runs)) / len(runs) if runs else None
