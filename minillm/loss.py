"""From a batch to a loss and its gradient, over micro-batches and processes.

A loss is summed over micro-batches and divided by the targets of the whole step, over all processes, so that
the result is the same however the step is cut. Losses are in nats; divided by the bytes that the targets
stand for they are comparable across tokenizers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from minillm.data import IGNORED, Batch
from minillm.model import LanguageModel
from minillm.run import Runtime


def accumulate(
    forward: Callable[..., Tensor],
    summed: Callable[[Any], Tensor],
    micro_batches: Sequence[Any],
    count: int,
    runtime: Runtime,
    weight: float = 1.0,
) -> float:
    """Adds `weight` times the gradient of Σ summed(micro-batch) / count to the weights; returns that mean.

    `micro_batches` are this process's share of a step and `count` is the whole step's. `summed` calls
    `forward`, which is the model or what wraps it. DistributedDataParallel averages over processes, hence
    the factor `world_size`.
    """
    total = torch.zeros((), device=runtime.device)
    for number, micro in enumerate(micro_batches, start=1):
        with runtime.sync_gradients(forward, last=number == len(micro_batches)):
            loss = summed(micro)
            (loss * (weight * runtime.world_size / count)).backward()
        total += loss.detach()
    return runtime.total(total).item() / count


def backward(
    forward: Callable[..., Tensor], batch: Batch, micro_tokens: int, runtime: Runtime, weight: float = 1.0
) -> float:
    """Adds `weight` times the gradient of the batch's mean loss; returns that mean, in nats a target.

    `batch` is the whole step's, the same in every process. Each takes its rows, in forward passes of at
    most `micro_tokens`.
    """
    rows, row_tokens = batch.tokens.shape
    begin, end = (rows * rank // runtime.world_size for rank in (runtime.rank, runtime.rank + 1))
    micro_rows = max(1, micro_tokens // row_tokens)
    micros = [batch.rows(row, min(row + micro_rows, end)) for row in range(begin, end, micro_rows)]
    targets = max(1, int((batch.targets != IGNORED).sum()))

    def summed(micro: Batch) -> Tensor:
        micro = micro.to(runtime.device)
        return forward(micro.tokens, micro.start, targets=micro.targets)

    return accumulate(forward, summed, micros, targets, runtime, weight)


def target_bytes(batch: Batch, token_bytes: Int[Tensor, " V"]) -> int:
    """How many bytes of text the targets stand for; special tokens stand for none."""
    return int(token_bytes[batch.targets[batch.targets != IGNORED]].sum())


def per_byte(loss: float, batch: Batch, token_bytes: Int[Tensor, " V"]) -> float:
    """A batch's loss in nats per target, as nats per byte of text."""
    return loss * int((batch.targets != IGNORED).sum()) / max(1, target_bytes(batch, token_bytes))


@dataclass(frozen=True)
class HeldOut:
    """The loss over validation batches, in nats."""

    per_target: float
    per_byte: float
    """Over the bytes of text that the targets stand for."""


@torch.no_grad()
def held_out(
    model: LanguageModel, batches: Iterable[Batch], token_bytes: Int[Tensor, " V"], runtime: Runtime
) -> HeldOut:
    """The loss over validation batches (on the CPU), shared out among the processes."""
    totals = torch.zeros(3, dtype=torch.float64)
    for i, batch in enumerate(batches):
        if i % runtime.world_size == runtime.rank:
            own = batch.to(runtime.device)
            totals[0] += model(own.tokens, own.start, targets=own.targets).item()
            totals[1] += int((batch.targets != IGNORED).sum())
            totals[2] += target_bytes(batch, token_bytes)
    nats, targets, size = runtime.total(totals).tolist()
    return HeldOut(nats / max(1, targets), nats / max(1, size))
