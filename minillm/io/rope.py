"""Rotary positions stretched to longer rows than a model was first trained on, as other people's models are.

The pairs of channels that turn often within the original length keep their frequencies; the others are slowed
down by a factor, so that positions beyond that length stay within known angles. The ramp between the two is
linear in the turns (Llama 3.1), or in the number of the pair (YaRN: Peng et al. 2023, arXiv 2309.00071,
section 3.2). The older linear stretching slows down all pairs alike. What the numbers are called in
config.json: config.py.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.model import ModelConfig


def stretched(frequencies: Float[Tensor, " half"], config: ModelConfig) -> Float[Tensor, " half"]:
    """The frequencies, in radians per position, as `config` stretches them."""
    kind, factor, *more = config.rope
    if kind == "llama3":
        low, high, length = more
        turns = length * frequencies / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        fast, slow, _, length = more
        C, theta = config.head_dim, config.rope_theta
        first, last = (
            C * math.log(length / (2 * math.pi) / turns) / (2 * math.log(theta)) for turns in (fast, slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), C - 1)
        pair = torch.arange(len(frequencies))
        kept = 1 - ((pair - first) / ((last - first) or 0.001)).clamp(0, 1)
    else:
        return frequencies / factor
    return frequencies * (kept + (1 - kept) / factor)
