"""Packed rows: prompts with their responses side by side in the rows of a forward pass.

    sequences ──forward_passes──► rows ──pack_sequences──► tokens, start [P, T] ──model──► numbers [P, T, *X]
                                              └──► begins, ends ──► mask, index [N] ──► padded [B, R]

A sequence is a prompt and one response to it. A forward pass has P rows of T positions; a row holds whole
sequences, none attending to another, so that hardly a position is padding. An index counts the positions of
all rows end to end; the B responses have N tokens, at most R each. Reward model, critic and policies are run
in this way. Left out: responses that share their prompt (fast/shared_prompts.py).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from minillm.data import best_fit

# ---- Sequences -> rows


def forward_passes(
    numbers: Sequence[int], sequences: Sequence[Sequence[int]], micro_tokens: int
) -> list[list[list[int]]]:
    """Which of the sequences, by number, are side by side in each row of each forward pass.

    Rows are as long as the longest sequence; a pass has at most `micro_tokens` positions, or one row.
    """
    sizes = np.array([len(sequences[i]) for i in numbers], np.int64)
    if not len(sizes):
        return []
    rows = [[numbers[i] for i in row] for row in best_fit(sizes, np.arange(len(sizes)), int(sizes.max()))]
    count = max(1, micro_tokens // int(sizes.max()))
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def pack_sequences(
    sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[Int64[Tensor, "P T"], Int32[Tensor, "P T"], Int64[Tensor, " B"]]:
    """The tokens of these rows; for each position the start of its sequence, before which it sees nothing;
    and the index of each sequence's first token. Each position of padding is a sequence of its own."""
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    start = torch.arange(width, dtype=torch.int32).repeat(len(rows), 1)
    begins = []
    for r, row in enumerate(rows):
        t = 0
        for i in row:
            end = t + len(sequences[i])
            tokens[r, t:end], start[r, t:end] = torch.tensor(sequences[i]), t
            begins.append(r * width + t)
            t = end
    return tokens, start, torch.tensor(begins)


# ---- Where responses are


def flat_index(
    begins: Int64[Tensor, " B"], ends: Int64[Tensor, " B"]
) -> tuple[Bool[Tensor, "B R"], Int64[Tensor, " N"]]:
    """Of responses from index begins[b] to ends[b] (exclusive): the mask, true where response b has a token
    r, R being the size of the longest; and the index of all their tokens."""
    sizes = ends - begins
    offsets = torch.arange(int(sizes.max()), device=sizes.device)
    mask = offsets < sizes[:, None]
    return mask, (begins[:, None] + offsets)[mask]


def pad(per_token: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Numbers of the tokens [N] as rows [B, R], 0 where a response has no token."""
    padded = torch.zeros(mask.shape, dtype=per_token.dtype, device=per_token.device)
    padded[mask] = per_token
    return padded
