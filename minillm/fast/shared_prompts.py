"""Responses that share their prompt: it is computed once and attended to by every one of them.

To learn from rankings, several responses are read behind one prompt. Each could stand behind a copy of it, in
a row of its own (data.py); sharing saves four positions of ten in the little world, with the same results.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from kernels.attention import attention
from minillm.data import forward_passes


@dataclass(frozen=True)
class SharedPrompts:
    """Attention for tokens [1, T] of which some belong to several sequences (a model.Attend).

    Everything else in the model is done once a token. For attention every sequence stands whole in rows
    [R, W]: the queries, keys and values of its tokens are gathered there, and the results gathered back.
    """

    positions: Int64[Tensor, " T"]
    """Of each token in its sequences."""
    rows: Int64[Tensor, "R W"]
    """Which token is at each position of the rows."""
    start: Int32[Tensor, "R W"]
    """Where the sequence of that position begins in its row."""
    back: Int64[Tensor, " T"]
    """The index in the rows, end to end, of one place of each token: all of them get the same result."""

    def to(self, device: torch.device | str) -> "SharedPrompts":
        """The same on `device`."""
        return SharedPrompts(*(tensor.to(device) for tensor in vars(self).values()))

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the queries [1, H, T, C] gather from keys and values [1, K, T, C]."""
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
    whole: list[list[int]] = []
    begins: list[int] = []
    for sequences, shared in zip(sets, common, strict=True):
        stem = range(len(tokens), len(tokens) + shared)
        tokens += sequences[0][:shared]
        for sequence in sequences:
            own = range(len(tokens), len(tokens) + len(sequence) - shared)
            tokens += sequence[shared:]
            whole.append([*stem, *own])
            begins.append(own.start - shared)
    ((numbers, firsts, in_rows, start),) = forward_passes(range(len(whole)), whole, 1 << 62)
    back = torch.empty(len(tokens), dtype=torch.int64)
    for i, first in zip(numbers.tolist(), firsts.tolist(), strict=True):
        back[whole[i]] = torch.arange(first, first + len(whole[i]))
    positions = (torch.arange(start.shape[1]) - start).flatten()[back]
    shared_prompts = SharedPrompts(positions, in_rows, start, back)
    return torch.tensor([tokens]), shared_prompts, torch.tensor(begins)
