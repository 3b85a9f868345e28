"""PPO with a KL penalty: its mathematics, as functions of tensors that know no model.

A response is an episode: its state is prompt and response so far, its action the next token. The responses
of a rollout lie in grids [B, R], token r of response b at [b, r], with `mask` true where there is one; losses
are of the tokens alone, flat [N].

    scores [B] ──penalised_rewards──► rewards [B, R] ──gae──► advantages [B, R] ──► losses of tokens [N]

What a run does, in the order in which it happens; the defaults are those of rlhf.py.

     1  policy and reference both start as the SFT assistant                       InstructGPT, 3.5
     2  the critic is a network of its own that starts as the reward model         InstructGPT, C.4
     3  at first the critic learns alone, for critic_warmup iterations              (measured here)
     4  responses are sampled with kept keys and values and stop at the end token  generate.py
     5  log-probabilities are those of the distribution that was sampled from:
        temperature, top-k and top-p included                                      rollout.py; Huang
     6  a response that does not end scores -1, whatever it says                    Huang, after Ziegler
     7  scores are divided by the deviation of all scores so far                    Engstrom, 3 (2)
     8  a token is paid -β (log π - log π_ref), the last one the score as well       Ziegler, 2.2
     9  γ 1, λ 0.95                                                                 InstructGPT, C.4; Huang
    10  advantages are whitened over all tokens of a rollout, padding left out      Huang
    11  ratios count up to 0.2 from 1, and values up to 0.2 from what they were    PPO, eq. 7; Engstrom, 3 (1)
    12  the value loss weighs 0.1; both networks share one gradient norm           Huang
    13  a rollout is seen inner_epochs times, in minibatches                       PPO, algorithm 1
    14  no further pass once the policy has moved stop_kl from its own samples      (measured here)
    15  Adam's ε is 1e-5; there is no dropout                                      Huang
    16  learning rates fall linearly at the end of the run                         Engstrom, 3 (4)
    17  a multiple of the pretraining loss may be added (ptx)                       InstructGPT, eq. 2
    18  β is fixed, or follows a target KL                                         Ziegler, eq. 2 of 2.2
    19  what is validated and kept may be a moving average of the policy            Ramé, 3

Left out: one trunk for policy and critic, an entropy bonus, rewards of single tokens.
Sources: Schulman et al. 2017, "PPO" (arXiv 1707.06347); Schulman et al. 2016, "GAE" (arXiv 1506.02438),
equation 16; Ziegler et al. 2019 (arXiv 1909.08593); Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155);
Engstrom et al. 2020, "Implementation matters in deep policy gradients" (arXiv 2005.12729); Huang et al. 2024,
"The N+ implementation details of RLHF with PPO" (arXiv 2403.17031) and its forerunner of 2023; Ramé et al.
2024, "WARP" (arXiv 2406.16768).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# ---- KL(π || π_ref) from samples of π


def k1(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log π - log π_ref: unbiased, and negative for about half of the tokens."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(log π - log π_ref)² / 2: biased, but its gradient is, in expectation, that of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """π_ref/π - 1 - log π_ref/π: unbiased and never negative (Schulman 2020,
    "Approximating KL divergence")."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


# ---- Scores -> rewards -> advantages


def penalised_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], beta: float
) -> Float[Tensor, "B R"]:
    """-β · KL of every token, and the score at the last one; 0 behind it. `kl` is `k1` of the rollout."""
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "B R"]:
    """The advantage of every token, 0 where there is none.

    values[b, r] is of the state in which token r is chosen; behind the last token there is nothing more:

        δ_r = reward_r + γ V_{r+1} - V_r        A_r = δ_r + γλ A_{r+1} = Σ_k (γλ)^k δ_{r+k}

    λ = 1 gives the discounted sum of the rewards to come less the value, λ = 0 the one step δ_r.
    """
    values = torch.where(mask, values, 0.0)
    advantages, following, value_after = [], torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for r in reversed(range(mask.shape[1])):
        delta = rewards[:, r] + gamma * value_after - values[:, r]
        following = torch.where(mask[:, r], delta + gamma * lam * following, 0.0)
        value_after = values[:, r]
        advantages.append(following)
    return torch.stack(advantages[::-1], dim=1)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of numbers that lie in several places; they add up."""

    count: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / max(1.0, self.count)

    @property
    def deviation(self) -> float:
        """The root of the mean square distance from the mean."""
        return max(0.0, self.squares / max(1.0, self.count) - self.mean**2) ** 0.5

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)


def moments(values: Float[Tensor, "..."]) -> Moments:
    """Of all these values; in float64, for the deviation is a difference of large sums."""
    values = values.double()
    return Moments(float(values.numel()), values.sum().item(), values.square().sum().item())


def whiten(values: Float[Tensor, "..."], of: Moments, eps: float = 1e-8) -> Float[Tensor, "..."]:
    """The values shifted and scaled so that those that `of` was taken of have mean 0 and deviation 1."""
    return (values - of.mean) / (of.deviation + eps)


# ---- Losses of tokens, and β


def policy_losses(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip: float,
) -> Float[Tensor, " N"]:
    """-min(ρ A, clamp(ρ, 1 - clip, 1 + clip) A) with ρ = π / π_old, equation 7 of PPO with its sign turned.

    Where the minimum is the clamped one, a token has no gradient: it has moved far enough.
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_losses(
    values: Float[Tensor, " N"], old_values: Float[Tensor, " N"], returns: Float[Tensor, " N"], clip: float
) -> Float[Tensor, " N"]:
    """½ max((V - returns)², (V held within clip of the old V - returns)²)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def clipped(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip: float,
) -> Bool[Tensor, " N"]:
    """Which tokens have no gradient because the ratio has left the clip on the side of the advantage."""
    ratio = (logprobs - old_logprobs).exp()
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def adapted_beta(beta: float, kl: float, target: float, rate: float = 0.1) -> float:
    """β after an iteration whose KL was `kl`: up where that exceeds the target, down where it falls short.

    β ← β (1 + rate · e), e = KL / target - 1 held within ±0.2 (Ziegler et al. 2019, equation 2).
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + rate * error)


def explained_variance(errors: Moments, returns: Moments) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that says a constant."""
    return 1 - (errors.deviation / returns.deviation) ** 2 if returns.deviation else 0.0
