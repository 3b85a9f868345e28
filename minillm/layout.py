"""Packed rows: prompts with their responses side by side in the rows of a forward pass.

    sequences ──forward_passes──► rows ──pack_rows──► tokens, start [P, T] ──model──► numbers [P, T, *X]
                                              └──► begins, ends ──► mask, index [N] ──► padded [B, R]

A sequence is a prompt and one response to it. A row holds whole sequences, none attending to another, so that
hardly a position is padding; an index counts the positions of all rows end to end. The reward model, DPO and
the policy read their networks this way. To learn from rankings, where several responses follow one prompt,
the prompt is computed once and attended to by every response (`pack_sets`): in the little world that saves
four positions of ten.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from kernels.attention import attention
from minillm.data import pack

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
    rows = [[numbers[i] for i in row] for row in pack(sizes, np.arange(len(sizes)), int(sizes.max()))]
    count = max(1, micro_tokens // int(sizes.max()))
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def pack_rows(
    sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[Int64[Tensor, "P T"], Int32[Tensor, "P T"], Int64[Tensor, " B"]]:
    """The tokens of these rows; the start of the sequence that each position belongs to, before which it sees
    nothing; and the index of each sequence's first token. A row's padding is sequences of one position.
    """
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


# ---- Sequences with a common prompt -> one row of tokens, and full rows for attention alone


@dataclass(frozen=True)
class SharedPrompts:
    """Attention for tokens [1, T] of which some belong to several sequences (a model.Attend).

    Everything else in the model is done once a token. For attention every sequence stands whole in rows
    [R, W]: the queries, keys and values of its tokens are gathered there, and the results gathered back.
    """

    of_tokens: Int64[Tensor, " T"]
    """The position of each token in its sequences."""
    rows: Int64[Tensor, "R W"]
    """Which token is at each position of the rows."""
    start: Int32[Tensor, "R W"]
    """Where the sequence of that position begins in its row."""
    back: Int64[Tensor, " T"]
    """The index in the rows, end to end, of one place of each token: all of them get the same result."""

    def to(self, device: torch.device | str) -> "SharedPrompts":
        """The same on `device`."""
        return SharedPrompts(*(tensor.to(device) for tensor in vars(self).values()))

    def positions(self, T: int) -> Int64[Tensor, " T"]:
        return self.of_tokens

    def __call__(
        self,
        block: int,
        q: Float[Tensor, "1 H T C"],
        k: Float[Tensor, "1 K T C"],
        v: Float[Tensor, "1 K T C"],
    ) -> Float[Tensor, "1 H T C"]:
        _, H, T, C = q.shape
        q, k, v = map(self._in_rows, (q, k, v))
        gathered = attention(q, k, v, start=self.start)
        by_position = gathered.transpose(1, 2).reshape(-1, H * C)
        return _gather(by_position, self.back).view(1, T, H, C).transpose(1, 2)

    def _in_rows(self, x: Float[Tensor, "1 heads T C"]) -> Float[Tensor, "R heads W C"]:
        heads, T = x.shape[1:3]
        first = T * torch.arange(heads, device=x.device)[:, None]
        return _gather(x.flatten(0, 2), self.rows[:, None] + first)


def _gather(x: Float[Tensor, "M C"], index: Int64[Tensor, "*X"]) -> Float[Tensor, "*X C"]:
    """x[index], by an operation whose gradient is fast on a CPU, too."""
    return x.gather(0, index.flatten()[:, None].expand(-1, x.shape[1])).view(*index.shape, -1)


def pack_sets(
    sets: Sequence[Sequence[Sequence[int]]], common: Sequence[int]
) -> tuple[Int64[Tensor, "1 T"], SharedPrompts, Int64[Tensor, " B"]]:
    """The tokens of these sets, of which the sequences of set i begin with the same common[i] tokens, which
    are there once; how they meet in attention; and for each sequence the index at which it would begin if it
    were whole among the tokens: its token j ≥ common is j further.

    Of a set [prompt, a], [prompt, b] the tokens are prompt, a, b and the rows prompt, a, prompt, b.
    """
    tokens: list[int] = []
    positions: list[int] = []
    whole: list[list[int]] = []
    begins: list[int] = []
    for sequences, shared in zip(sets, common, strict=True):
        stem = range(len(tokens), len(tokens) + shared)
        tokens += sequences[0][:shared]
        positions += range(shared)
        for sequence in sequences:
            own = range(len(tokens), len(tokens) + len(sequence) - shared)
            tokens += sequence[shared:]
            positions += range(shared, len(sequence))
            whole.append([*stem, *own])
            begins.append(own.start - shared)
    (rows,) = forward_passes(range(len(whole)), whole, 1 << 62)
    in_rows, start, firsts = pack_rows(whole, rows)
    back = torch.empty(len(tokens), dtype=torch.int64)
    for i, first in zip(chain(*rows), firsts.tolist(), strict=True):
        back[whole[i]] = torch.arange(first, first + len(whole[i]))
    shared_prompts = SharedPrompts(torch.tensor(positions), in_rows, start, back)
    return torch.tensor([tokens]), shared_prompts, torch.tensor(begins)


# ---- Where responses are


def flat_index(
    begins: Int64[Tensor, " B"], ends: Int64[Tensor, " B"]
) -> tuple[Bool[Tensor, "B R"], Int64[Tensor, " N"]]:
    """Of responses from index begins[b] to ends[b] (exclusive): the mask [B, R], R being the longest's size,
    true where response b has a token r; and the index of all their tokens."""
    sizes = ends - begins
    offsets = torch.arange(int(sizes.max()), device=sizes.device)
    mask = offsets < sizes[:, None]
    return mask, (begins[:, None] + offsets)[mask]


def gather_previous(
    per_position: Float[Tensor, "P T *X"], index: Int64[Tensor, " N"]
) -> Float[Tensor, "N *X"]:
    """What is at the position before each of these: its hidden state, or its value."""
    return per_position.flatten(0, 1)[index - 1]


def pad(per_token: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Numbers of the tokens [N] as rows, 0 where a response has none."""
    padded = torch.zeros(mask.shape, dtype=per_token.dtype, device=per_token.device)
    padded[mask] = per_token
    return padded
