"""DPO: from rankings straight to a policy, with neither reward model nor sampling.

The policy that is best for a reward r under a penalty of β KL to the reference is π ∝ π_ref exp(r / β), so a
policy says what reward it is best for: r = β log π/π_ref, up to a constant of the prompt. The loss is the
reward model's (reward.py), with these rewards as its scores. Its derivative with respect to log π of the
better of a pair is -β σ(r_worse - r_better), of the worse the opposite: ∓β/2 at the start, where all rewards
are 0, and nearly 0 once the order is clear.

Left out: label smoothing, IPO and other losses of the same log-ratios.
Method: Rafailov et al. 2023, "DPO" (arXiv 2305.18290), equations 5 to 7.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.data import pad
from minillm.model import LanguageModel
from minillm.reward import RankedBatch, Scores


def response_logprobs(forward: Callable[..., Any], batch: RankedBatch) -> Float[Tensor, " B"]:
    """log π(response | prompt), the end token included. `forward` is the model, or what wraps it."""
    found = forward(batch.tokens, attend=batch.shared, index=batch.index)
    return pad(found.logprobs, batch.mask).sum(dim=1)


def rewards_of(forward: Callable[..., Any], ref_model: LanguageModel, beta: float) -> Scores:
    """The implicit rewards of a batch's responses, β log π(response) / π_ref(response). `forward` is the
    policy, or what wraps it."""

    def rewards(batch: RankedBatch) -> Float[Tensor, " B"]:
        with torch.no_grad():
            ref_logprobs = response_logprobs(ref_model, batch)
        return beta * (response_logprobs(forward, batch) - ref_logprobs)

    return rewards
