"""From a batch to a loss: the few lines between the model and the kernels.

A loss is summed here and divided by the caller, which alone knows how many targets the whole step
has over all micro-batches and processes. Losses are in nats; divided by the bytes that the targets
stand for they are comparable across tokenizers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from minillm.data import IGNORED, Batch
from minillm.model import LanguageModel
from minillm.run import Runtime


def document_ends(start: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The first position behind each position's document, from the documents' first positions.

    Starts never fall along a row, so a document ends where the starts exceed its own.
    """
    start = start.contiguous()
    return torch.searchsorted(start, start, right=True).to(start.dtype)


def summed_loss(forward: Callable[..., Tensor], model: LanguageModel, batch: Batch) -> Float[Tensor, ""]:
    """Σ -log p(target) over the batch. `forward` is the model, or what the runtime wrapped it in."""
    end = None if model.config.causal else document_ends(batch.start)
    hidden = forward(batch.tokens, batch.start, end)
    return linear_cross_entropy(
        hidden.flatten(0, 1), model.lm_head.weight, batch.targets.flatten(), IGNORED, reduction="sum"
    )


def accumulate(
    forward: Callable[..., Tensor],
    summed: Callable[[Any], Tensor],
    micro_batches: Sequence[Any],
    count: int,
    runtime: Runtime,
    weight: float = 1.0,
) -> float:
    """Adds `weight` times the gradient of Σ summed(micro-batch) / count to the weights; returns that mean.

    `micro_batches` are this process's share of a step and `count` is the whole step's, so that the result
    is the same however the step is shared out. DistributedDataParallel averages over processes, hence the
    factor `world`.
    """
    total = torch.zeros((), device=runtime.device)
    for number, micro in enumerate(micro_batches, start=1):
        with runtime.sync_gradients(forward, last=number == len(micro_batches)):
            loss = summed(micro)
            (loss * (weight * runtime.world_size / count)).backward()
        total += loss.detach()
    return runtime.total(total).item() / count


def backward(
    forward: Callable[..., Tensor],
    model: LanguageModel,
    batch: Batch,
    micro_tokens: int,
    runtime: Runtime,
    weight: float = 1.0,
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
        return summed_loss(forward, model, micro.to(runtime.device))

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
            totals[0] += summed_loss(model, model, batch.to(runtime.device)).item()
            totals[1] += int((batch.targets != IGNORED).sum())
            totals[2] += target_bytes(batch, token_bytes)
    nats, targets, size = runtime.total(totals.to(runtime.device)).tolist()
    return HeldOut(nats / max(1, targets), nats / max(1, size))
