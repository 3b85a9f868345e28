"""Logits in chunks of rows: those of a tensor that exists, or of a product that never does.

Logits are the largest tensors of a training step: N = 8192 rows over V = 128,000 tokens fill 2 GB even
in bfloat16, and their gradient as much again. With z = h W^T a chunk of rows is one matrix product, which
can be made when it is needed, and once more in the backward pass. Its gradient goes into the operands at
once:

    dh = dz W,    dW = sum over chunks of dz^T h

so that no more than a chunk ever exists. dW is summed in float32.
"""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.rows_torch import accumulator

# A chunk has about this many logits: on a CPU few, on a GPU 256 MB in bfloat16, so that adding to dW,
# a pass over a [V, D] tensor for every chunk, costs little beside the product that it adds ...
CHUNK_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 27}
# ... and for the same reason never fewer rows than this.
CHUNK_ROWS = 256
# So few logits are kept for the backward pass: making them again would be a quarter of its products.
KEPT_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}


def row_functions(impl: str) -> ModuleType:
    """`rows_torch` or `rows_triton`, which is imported only where it runs."""
    return import_module(f"kernels.rows_{impl}")


def autocast(hidden: Tensor) -> Tensor:
    """hidden in autocast's type where one is in force: products run in hidden's type."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def multiplied(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(logits, None) where there are few, else the operands, for `Logits` to multiply chunk by chunk."""
    if len(hidden) * len(weight) > _of_device(KEPT_LOGITS, hidden):
        return hidden, weight
    return hidden @ weight.to(hidden.dtype).T, None


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """IndexError naming the first target outside 0..vocabulary - 1.

    On a GPU nothing is checked, for reading the answer would stall it: PyTorch's kernels assert their
    bounds themselves, and Triton's give nan for such a row.
    """
    if targets.is_cuda:
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"target {int(targets[row])} in row {row} is outside 0..{vocabulary - 1}")


def _of_device(sizes: dict[str, int], x: Tensor) -> int:
    return sizes.get(x.device.type, sizes["cpu"])


class Logits:
    """z = hidden @ weight.T [N, V] chunk by chunk, or hidden itself where there is no weight."""

    def __init__(self, hidden: Tensor, weight: Tensor | None):
        self.hidden, self.weight = hidden, weight
        self.matrix = None if weight is None else weight.to(hidden.dtype)
        self.vocabulary = hidden.shape[1] if weight is None else len(weight)

    def chunks(self) -> Iterator[slice]:
        """Slices of the rows; logits that exist anyhow are one chunk."""
        N = len(self.hidden)
        most = _of_device(CHUNK_LOGITS, self.hidden) // self.vocabulary
        size = max(1, N) if self.weight is None else max(CHUNK_ROWS, most)
        return (slice(i, i + size) for i in range(0, max(1, N), size))

    def __getitem__(self, rows: slice) -> Tensor:
        if self.matrix is None:
            return self.hidden[rows]
        with torch.autocast(self.hidden.device.type, enabled=False):
            return self.hidden[rows] @ self.matrix.T


class Gradients:
    """d hidden and d weight of some `Logits`, as far as they are wanted, from chunks of dz."""

    def __init__(self, logits: Logits, hidden: bool, weight: bool):
        h, w = logits.hidden, logits.weight
        self.logits, self.wanted = logits, hidden or weight
        self.d_hidden = torch.empty_like(h, memory_format=torch.contiguous_format) if hidden else None
        self.d_weight = torch.zeros_like(w, dtype=accumulator(h.dtype)) if weight and w is not None else None

    def room(self, rows: slice, z: Tensor) -> Tensor | None:
        """Where a chunk's dz may go: over its z if that was made for it, or straight into the result."""
        if self.logits.matrix is not None:
            return z if self.wanted else None
        return None if self.d_hidden is None else self.d_hidden[rows]

    def add(self, rows: slice, dz: Tensor | None) -> None:
        """One chunk's share of both, from the dz that `room` got."""
        h, matrix = self.logits.hidden, self.logits.matrix
        if dz is None or matrix is None:
            return
        with torch.autocast(dz.device.type, enabled=False):
            if self.d_hidden is not None:
                torch.mm(dz, matrix, out=self.d_hidden[rows])
            if self.d_weight is None:
                return
            if dz.dtype == self.d_weight.dtype:
                self.d_weight.addmm_(dz.T, h[rows])
            else:
                self.d_weight += dz.T @ h[rows]

    def result(self) -> tuple[Tensor, Tensor]:
        """(d hidden, d weight) in their operands' types; an empty tensor for what was not wanted."""
        h, w = self.logits.hidden, self.logits.weight
        d_hidden = h.new_empty(0) if self.d_hidden is None else self.d_hidden
        if self.d_weight is None or w is None:
            return d_hidden, h.new_empty(0)
        return d_hidden, self.d_weight.to(w.dtype)
