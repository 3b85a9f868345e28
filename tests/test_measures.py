"""Estimates with their intervals: laws that hold for any values."""

from math import comb

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.tools.measures import estimate, mean, reliability, win_rates, written

hits = st.lists(st.booleans(), min_size=1, max_size=60)
outcomes = st.lists(st.sampled_from((-1, 0, 1)), min_size=1, max_size=60)
texts = st.lists(st.sampled_from(("the", "cat", "met", "The")), max_size=30).map(" ".join)
ROUNDING = 1e-9  # of sums of some eighty float64 values


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
@example([1.0])
@example([0.0] * 3)
def test_the_interval_of_a_share_holds_it_is_never_empty_and_mirrors_the_opposite(values):
    found, other = mean(values), mean([1 - value for value in values])
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert found["value"] == pytest.approx(np.mean(values)) and found["count"] == len(values)
    assert found["high"] - found["low"] > 0.01
    assert (other["value"], other["low"], other["high"]) == pytest.approx(
        (1 - found["value"], 1 - found["high"], 1 - found["low"])
    )


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_the_interval_of_a_share_holds_the_truth_about_95_times_of_100(p):
    # Exact, over the binomial law of 80 draws; beside 95 % by what a share with 81 values must be.
    n = 80
    held = 0.0
    for k in range(n + 1):
        found = mean([i < k for i in range(n)])
        held += comb(n, k) * p**k * (1 - p) ** (n - k) * (found["low"] <= p <= found["high"])
    assert 0.92 < held < 0.985


def test_the_interval_of_a_ratio_holds_the_truth_about_95_times_of_100():
    random = np.random.default_rng(0)
    b = random.integers(1, 9, (2000, 60)).astype(float)
    a = b * (0.7 + random.normal(size=b.shape))
    found = [mean(*rows, form="score") for rows in zip(a.tolist(), b.tolist(), strict=True)]
    assert 0.92 < np.mean([one["low"] <= 0.7 <= one["high"] for one in found]) < 0.97


def test_several_values_a_prompt_that_have_nothing_in_common_count_one_by_one():
    draws = np.random.default_rng(0).random((2000, 6)) < 0.3
    found, alone = mean(draws.sum(1), [6] * 2000), mean(draws.flatten())
    width, expected = (one["high"] - one["low"] for one in (found, alone))
    assert found["value"] == alone["value"] and width == pytest.approx(expected, rel=0.08)


def test_intervals_worked_out_by_hand():
    """Wilson's of 8 in 10; 1.96 standard errors of a mean; of a ratio with residuals -.5, -1 and 1.5."""
    eight = mean([True] * 8 + [False] * 2)
    assert (eight["low"], eight["high"]) == pytest.approx((0.4901625, 0.9433178), abs=1e-4)
    three = mean([1, 2, 3], form="score")
    assert (three["value"], three["high"] - three["value"]) == pytest.approx((2, 1.96 / 3**0.5))
    rate = mean([1, 2, 6], [1, 2, 3], "score")
    assert (rate["value"], rate["value"] - rate["low"]) == pytest.approx(
        (1.5, 1.96 * (3 / 2 * 3.5) ** 0.5 / 6)
    )


def test_nothing_has_no_estimate_and_one_score_no_interval():
    for found in (mean([]), mean([], form="score"), mean([0.0, 0.0], [0, 0])):
        assert (found["value"], found["low"], found["count"]) == (None, None, 0)
    assert mean([3.0], form="score") == estimate(3.0, 1, form="score")


@given(outcomes)
def test_wins_ties_and_losses_are_all_there_is_and_mirrored_from_the_other_side(values):
    found, mirrored = win_rates(values), win_rates([-value for value in values])
    assert sum(found[name]["value"] for name in ("win", "tie", "loss")) == pytest.approx(1)
    assert found["win"]["value"] == pytest.approx(values.count(1) / len(values))
    assert found["rate"]["value"] == pytest.approx(found["win"]["value"] + found["tie"]["value"] / 2)
    assert (found["win"], found["tie"]) == (mirrored["loss"], mirrored["tie"])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(any), min_size=1, max_size=30))
@example([(3, 0), (2, 0)])
@example([(2, 1), (2, 1)])
def test_a_share_of_several_values_a_prompt_is_theirs_with_an_interval_around_it_that_is_never_empty(pairs):
    right, wrong = np.array(pairs).T
    found = mean(right, right + wrong)
    assert found["value"] == pytest.approx(right.sum() / (right + wrong).sum())
    assert found["count"] == (right + wrong).sum()
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1 and found["low"] < found["high"]


@given(hits, st.integers(2, 5))
def test_to_count_the_same_values_several_times_in_their_prompt_makes_nobody_surer(values, times):
    once, more = mean(values), mean([times * value for value in values], [times] * len(values))
    assert (more["low"], more["high"]) == pytest.approx((once["low"], once["high"]))


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (estimate(0.72, 9, 0.64, 0.8), ("72.0%", "(64–80)")),
        (estimate(-0.25, 9, -0.75, 0.25, "signed"), ("-0.250", "(-0.750 to +0.250)")),
        (estimate(None, 0), ("–", "")),
        (estimate(0.5, 1, form="score"), ("0.50", "")),
        (estimate(1234, 1, form="whole"), ("1,234", "")),
    ],
)
def test_an_estimate_is_written_in_its_form_with_its_interval_if_it_has_one(found, shown):
    assert written(found) == shown


# ---- Calibration


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
@example([(1.0, True), (0.0, False)])
@example([(1.0, False)] * 5)
def test_the_calibration_error_is_the_mean_distance_of_sureness_and_accuracy_by_tenths(pairs):
    sure, right = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    error, bins = reliability(sure, right)
    tenths = np.minimum((sure * 10).astype(int), 9)
    expected = sum(abs((sure - right)[tenths == i].sum()) for i in range(10)) / len(pairs)
    assert error == pytest.approx(expected, abs=ROUNDING)
    assert sum(b["count"] for b in bins) == len(pairs)
    assert sum(b["count"] * b["accuracy"] for b in bins) == pytest.approx(right.sum())


def test_bins_divide_what_lies_between_the_lowest_and_one():
    """From .5 they are .05 wide: .52 and .54 are together, .56 is not."""
    _, bins = reliability(np.array([0.52, 0.54, 0.56, 1.0]), np.array([1.0, 0.0, 1.0, 1.0]), lowest=0.5)
    assert [(b["sure"], b["accuracy"], b["count"]) for b in bins] == [
        (pytest.approx(0.53), 0.5, 2),
        (pytest.approx(0.56), 1.0, 1),
        (1.0, 1.0, 1),
    ]
    assert reliability(np.ones(0), np.zeros(0)) == (None, [])
