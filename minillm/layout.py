"""Prompts with their responses side by side in the rows of a forward pass, and where the responses lie.

    sequences ──forward_passes──► rows ──lay_out──► tokens, start [P, T] ──model──► numbers [P, T, *X]
                                               └──► begins, ends ──► mask, places [N] ──► grids [B, R]

A sequence is a prompt and one response to it. A row holds whole sequences, none attending to another, so that
hardly a position is padding; a place counts the positions of all rows end to end. The reward model, DPO and
the policy read their networks this way. To learn from rankings, where several responses follow one prompt,
the prompt is computed once (`lay_out_sets`): in the little world that leaves six positions of ten.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from minillm.data import pack
from minillm.model import Grid

# ---- Sequences -> rows


def forward_passes(
    numbers: Sequence[int], sequences: Sequence[Sequence[int]], micro_tokens: int
) -> list[list[list[int]]]:
    """Which of the sequences, by number, are side by side in each row of each forward pass.

    Rows are as long as the longest sequence; a pass has at most `micro_tokens` positions, or one row.
    """
    rows = side_by_side(numbers, sequences)
    count = max(1, micro_tokens // max((len(sequences[i]) for i in numbers), default=1))
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def side_by_side(numbers: Sequence[int], sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """These sequences, by number, in few rows as long as the longest."""
    sizes = np.array([len(sequences[i]) for i in numbers], np.int64)
    rows = pack(sizes, np.arange(len(sizes)), int(sizes.max())) if len(sizes) else []
    return [[numbers[i] for i in row] for row in rows]


def lay_out(
    sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[Int64[Tensor, "P T"], Int32[Tensor, "P T"], Int64[Tensor, " B"]]:
    """The tokens of these rows; where the sequence begins that a position belongs to: it attends to nothing
    before that; and the place of each sequence's first token. A row's padding is documents of one position.
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


# ---- Sets of sequences that begin alike -> tokens in a grid


def lay_out_sets(
    sets: Sequence[Sequence[Sequence[int]]], common: Sequence[int]
) -> tuple[Int64[Tensor, "1 T"], Int32[Tensor, "R W"], Grid, Int64[Tensor, " B"]]:
    """The tokens of these sets, of which the sequences of set i begin with the same common[i] tokens, which
    stand there once; the rows for attention, where all sequences stand whole, and their bounds; and for each
    sequence where it would begin if it stood whole among the tokens: token j ≥ common lies j behind that.

    Of a set [prompt, a], [prompt, b] the tokens are prompt, a, b and the rows prompt, a, prompt, b.
    """
    tokens: list[int] = []
    positions: list[int] = []
    places: list[list[int]] = []
    begins: list[int] = []
    for sequences, shared in zip(sets, common, strict=True):
        stem = range(len(tokens), len(tokens) + shared)
        tokens += sequences[0][:shared]
        positions += range(shared)
        for sequence in sequences:
            own = range(len(tokens), len(tokens) + len(sequence) - shared)
            tokens += sequence[shared:]
            positions += range(shared, len(sequence))
            places.append([*stem, *own])
            begins.append(own.start - shared)
    rows = side_by_side(range(len(places)), places)
    in_rows, start, firsts = lay_out(places, rows)
    back = torch.empty(len(tokens), dtype=torch.int64)
    for i, first in zip(chain(*rows), firsts.tolist(), strict=True):
        back[places[i]] = torch.arange(first, first + len(places[i]))
    grid = Grid(torch.tensor(positions), in_rows, back)
    return torch.tensor([tokens]), start, grid, torch.tensor(begins)


# ---- Where responses lie


def response_places(
    begins: Int64[Tensor, " B"], ends: Int64[Tensor, " B"]
) -> tuple[Bool[Tensor, "B R"], Int64[Tensor, " N"]]:
    """Of responses from places begins[b] to before ends[b]: the mask of their grid, true at [b, r] where
    response b has a token r, R being the longest's size; and the places of all their tokens."""
    sizes = ends - begins
    offsets = torch.arange(int(sizes.max()), device=sizes.device)
    mask = offsets < sizes[:, None]
    return mask, (begins[:, None] + offsets)[mask]


def before_tokens(
    per_position: Float[Tensor, "P T *X"], places: Int64[Tensor, " N"]
) -> Float[Tensor, "N *X"]:
    """What stands at the position before each of these places: its hidden state, or its value."""
    return per_position.flatten(0, 1)[places - 1]


def on_grid(per_token: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Numbers of the tokens [N] on the grid, 0 where there is none."""
    grid = torch.zeros(mask.shape, dtype=per_token.dtype, device=per_token.device)
    grid[mask] = per_token
    return grid
