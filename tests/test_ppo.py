"""PPO and GRPO as functions of tensors: every law that their mathematics promises."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from minillm.ppo import (
    KL_ESTIMATORS,
    adapted_beta,
    gae,
    group_advantages,
    moments,
    penalised_rewards,
    policy_losses,
    value_losses,
)
from minillm.run import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
# All of these run in float64 and are compared with sums of a few dozen terms.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
UNIT = st.floats(0, 1, allow_subnormal=False)


@st.composite
def grids(draw) -> tuple[Tensor, torch.Generator]:
    """A mask of responses of 1 to 9 tokens, and the randomness for what stands on it."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask, torch.Generator().manual_seed(draw(st.integers(0, 2**32)))


def normal(shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- Rewards


@given(grids(), st.floats(0, 2))
def test_the_score_is_on_the_last_token_and_nowhere_else(grid, beta):
    mask, generator = grid
    kl, scores = normal(mask.shape, generator), normal(len(mask), generator)
    rewards = penalised_rewards(scores, kl, mask, beta)
    paid = penalised_rewards(torch.zeros_like(scores), kl, mask, beta)
    difference = rewards - paid
    for row, own, score in zip(difference, mask, scores, strict=True):
        last = int(own.sum()) - 1
        torch.testing.assert_close(row[last], score, **CLOSE)
        assert row[:last].eq(0).all() and row[last + 1 :].eq(0).all()
    torch.testing.assert_close(paid[mask], -beta * kl[mask], **CLOSE)
    assert rewards[~mask].eq(0).all()


# ---- GAE


def brute_force(rewards, values, length, gamma, lam) -> list[float]:
    """A_r = Σ_k (γλ)^k δ_{r+k}, as it is defined: every sum anew."""
    values = [*values[:length], 0.0]
    deltas = [rewards[r] + gamma * values[r + 1] - values[r] for r in range(length)]
    return [sum((gamma * lam) ** k * deltas[r + k] for k in range(length - r)) for r in range(length)]


@given(grids(), UNIT, UNIT)
@example((torch.tensor([[True]]), torch.Generator().manual_seed(0)), 1.0, 1.0)
def test_gae_equals_the_sum_it_is_defined_as_whatever_stands_on_padding(grid, gamma, lam):
    mask, generator = grid
    rewards = normal(mask.shape, generator) * mask
    values = normal(mask.shape, generator).masked_fill(~mask, float("inf"))
    found = gae(rewards, values, mask, gamma, lam)
    for b, row in enumerate(mask):
        length = int(row.sum())
        expected = brute_force(rewards[b].tolist(), values[b].tolist(), length, gamma, lam)
        np.testing.assert_allclose(found[b, :length], expected, rtol=1e-9, atol=1e-9)
        assert found[b, length:].eq(0).all()


# ---- Moments


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
@example([1e4, 1e4 + 1] * 50)  # a small deviation beside a large mean
def test_moments_are_the_mean_and_the_root_of_the_mean_square_distance_from_it(numbers):
    mean, deviation = moments(torch.tensor(numbers), CPU)
    assert mean == pytest.approx(np.mean(numbers), abs=1e-6)
    assert deviation == pytest.approx(np.std(numbers), abs=1e-4)


# ---- KL from samples


@given(st.integers(0, 1000), st.integers(2, 6))
def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient_of_the_kl(seed, size):
    generator = torch.Generator().manual_seed(seed)
    logits = normal(size, generator).requires_grad_()
    logp, logq = logits.log_softmax(0), normal(size, generator).log_softmax(0)
    p, exact = logp.exp(), (logp.exp() * (logp - logq)).sum()
    k1, k2, k3 = (estimate(logp - logq) for estimate in KL_ESTIMATORS.values())
    for estimated in (k1, k3):
        torch.testing.assert_close((p * estimated).sum(), exact, **CLOSE)
    # E_p[∇ k2(token)], the sample's probability held still, against ∇ KL.
    (gradient,) = torch.autograd.grad((p.detach() * k2).sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0], **CLOSE)


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative_and_all_are_zero_where_both_agree(logprob, ref_logprob):
    assert KL_ESTIMATORS["k3"](torch.tensor(logprob - ref_logprob, dtype=torch.float64)) >= 0
    assert all(estimate(torch.zeros(())) == 0 for estimate in KL_ESTIMATORS.values())


# ---- Losses


def tokens(seed: int, count: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -normal(count, generator).abs()
    return old, old + 0.3 * normal(count, generator), normal(count, generator)


@given(st.integers(0, 1000), st.floats(0.01, 0.5))
def test_a_token_has_the_plain_loss_or_where_it_is_counted_as_clipped_no_gradient_and_no_smaller_one(
    seed, clip
):
    old, new, advantages = tokens(seed)
    new.requires_grad_()
    losses, clipped = policy_losses(new, old, advantages, clip)
    losses.sum().backward()
    assert torch.equal(new.grad == 0, clipped | (advantages == 0))
    ratio = (new - old).exp()
    assert torch.equal(clipped, torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip))
    plain = -ratio * advantages
    torch.testing.assert_close(losses[~clipped], plain[~clipped], **CLOSE)
    assert (losses >= plain - 1e-12).all()


def test_the_value_clip_is_around_the_old_value():
    # V 2 and returns 2 agree, but V has moved from 0 by more than .2: ½ (.2 - 2)². Inside: ½ (2 - 1)².
    two, zero = torch.tensor([2.0]), torch.tensor([0.0])
    assert value_losses(two, zero, two, 0.2).item() == pytest.approx(0.5 * 1.8**2)
    assert value_losses(two, torch.tensor([1.9]), torch.tensor([1.0]), 0.2).item() == pytest.approx(0.5)


@pytest.mark.parametrize(("kl", "beta"), [(5.5, 2.02), (4.5, 1.98), (50.0, 2.04), (0.0, 1.96), (5.0, 2.0)])
def test_beta_moves_by_a_tenth_of_the_relative_error_and_at_most_by_a_fiftieth(kl, beta):
    assert adapted_beta(2.0, kl, 5.0) == pytest.approx(beta)


# ---- GRPO


@given(st.integers(1, 5), st.integers(2, 8), st.integers(0, 1000), st.floats(0.1, 100), st.floats(-50, 50))
def test_group_advantages_sum_to_zero_and_ignore_a_groups_level_and_scale(groups, size, seed, scale, shift):
    scores = normal(groups * size, torch.Generator().manual_seed(seed))
    found = group_advantages(scores, size, eps=0.0)
    torch.testing.assert_close(found.view(groups, size).sum(1), torch.zeros(groups).double(), **CLOSE)
    torch.testing.assert_close(
        group_advantages(scores * scale + shift, size, eps=0.0), found, rtol=1e-6, atol=1e-6
    )


def test_a_groups_advantages_are_in_units_of_its_own_deviation():
    # [1, 3] lie one deviation from their mean: the root of the mean square, not of the unbiased one.
    torch.testing.assert_close(
        group_advantages(torch.tensor([1.0, 3.0, 7.0, 5.0]), 2, eps=0.0), torch.tensor([-1.0, 1.0, 1.0, -1.0])
    )
    assert group_advantages(torch.tensor([1.0, 3.0]), 2, eps=1.0).tolist() == [-0.5, 0.5]
    assert group_advantages(torch.tensor([3.0, 3.0, 3.0, 1.0, 2.0, 3.0]), 3)[:3].eq(0).all(), "all alike"
