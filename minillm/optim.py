"""From a batch to an update: the loss and its gradient, and which optimizer moves which weights how far.

A loss is summed over micro-batches and divided by the targets of the whole step, over all processes, so that
the result is the same however the step is cut. Losses are in nats; divided by the bytes that the targets
stand for they are comparable across tokenizers.

The matrices inside the blocks go to Muon (momentum, then the nearest orthogonal matrix by five
Newton-Schulz steps); the embedding, the output matrix and the norms go to AdamW. `optimizer="adamw"` gives
everything to AdamW.

    learning rate(step) = base · warm-up(step) · decay(step)

Left out: per-layer rates, schedules other than linear. Sources: Muon, Jordan et al. 2024
(kellerjordan.github.io/posts/muon); AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.data import IGNORED, Batch
from minillm.model import LanguageModel, ScalarModel
from minillm.run import Runtime

# ---- A batch -> its loss and gradient


def accumulate(
    forward: Any,
    summed_loss: Callable[[Any], Tensor],
    micro_batches: Sequence[Any],
    count: int,
    runtime: Runtime,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Adds `weight` (of this loss among several) times the gradient of Σ summed_loss(micro-batch) / count to
    the .grad of all weights; returns that mean, without `weight`. `micro_batches` are this process's share of
    a step, `count` is the whole step's. `summed_loss` calls `forward`, the model or what wraps it. Several
    processes' gradients are averaged, hence the factor `world_size`: DistributedDataParallel does so with the
    last micro-batch only, sharded weights with each.
    """
    total = torch.zeros((), device=runtime.device)
    for number, micro in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)
        with nullcontext() if is_last else getattr(forward, "no_sync", nullcontext)():
            loss = summed_loss(micro)
            (loss * (weight * runtime.world_size / count)).backward()
        total += loss.detach()
    return runtime.total(total) / count


def backward(
    forward: Callable[..., Tensor], batch: Batch, micro_tokens: int, runtime: Runtime, weight: float = 1.0
) -> Float[Tensor, ""]:
    """Adds `weight` times the gradient of the batch's mean loss; returns that mean, in nats per target.

    `batch` is the whole step's, the same in every process. Each takes its rows, in forward passes of at
    most `micro_tokens`.
    """
    rows, row_tokens = batch.tokens.shape
    begin, end = (rows * rank // runtime.world_size for rank in (runtime.rank, runtime.rank + 1))
    own, size = [part[begin:end].to(runtime.device) for part in batch], max(1, micro_tokens // row_tokens)
    micros = [Batch(*(part[row : row + size] for part in own)) for row in range(0, end - begin, size)]
    targets = max(1, int((batch.targets != IGNORED).sum()))
    return accumulate(
        forward, lambda micro: forward(micro.tokens, micro.start, targets=micro.targets),
        micros, targets, runtime, weight,
    )  # fmt: skip


@dataclass(frozen=True)
class ValidationLoss:
    """The loss over validation batches, in nats."""

    per_target: float
    per_byte: float
    """Over the bytes of text that the targets stand for; special tokens stand for none."""


@torch.no_grad()
def validation_loss(
    model: LanguageModel, batches: Sequence[Batch], token_bytes: Int[Tensor, " V"], runtime: Runtime
) -> ValidationLoss:
    """The loss over these batches (on the CPU), shared out among the processes."""
    totals = torch.zeros(3, dtype=torch.float64)
    idle = batches[0]._replace(targets=torch.full_like(batches[0].targets, IGNORED))
    for batch in runtime.even(list(batches[runtime.rank :: runtime.world_size]), idle):
        own = Batch(*(part.to(runtime.device) for part in batch))
        targets = batch.targets[batch.targets != IGNORED]
        nats = model(own.tokens, own.start, targets=own.targets).item()
        totals += torch.tensor([nats, len(targets), int(token_bytes[targets].sum())], dtype=torch.float64)
    nats, targets, size = runtime.total(totals).tolist()
    return ValidationLoss(nats / max(1, targets), nats / max(1, size))


# ---- A gradient -> an update


@dataclass(frozen=True)
class LearningRates:
    """Base learning rates, and what else the two optimizers ask for."""

    matrix: float
    """Of the matrices inside the blocks: Muon's, or AdamW's where that is the only optimizer."""
    embedding: float
    """Of the embedding and the output matrix or scalar head, by AdamW."""
    weight_decay: float
    """Decoupled, on the matrices inside the blocks only."""
    norm: float | None = None
    """Of the RMSNorm weights, by AdamW; None for a tenth of the matrices'."""


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: they lift small singular values fast, at the price of ending near 1, not at 1."""

TOGETHER = 1 << 22
"""Weights, in matrices of one shape, that are orthogonalized at once: many small products take long."""


def orthogonalized(
    updates: Float[Tensor, "matrices rows columns"], dtype: torch.dtype
) -> Float[Tensor, "matrices rows columns"]:
    """Close to U Vᵀ of each update's singular value decomposition U S Vᵀ: all directions made equally large.

    Each step takes the singular values s to a·s + b·s³ + c·s⁵, by products of matrices alone, in `dtype`. The
    first division makes them at most 1; after five steps nearly all lie between 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = updates.shape[1] > updates.shape[2]
    x: Any = updates.to(dtype)
    if hasattr(x, "redistribute"):  # sharded: gathered here, once, and not for each of the products
        from torch.distributed.tensor import Replicate

        x = x.redistribute(placements=[Replicate()])
    x = x.mT if tall else x  # the smaller product of the two
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For a gradient g of a matrix W, with a running mean m of gradients (Nesterov's look ahead):

        m ← μ m + (1-μ) g
        W ← (1 - rate · decay) W - rate · √max(1, rows/columns) · orthogonalized(μ m + (1-μ) g)

    torch.optim.Muon takes the same steps one matrix at a time, in bfloat16 on every device, which takes a CPU
    without instructions for it some twenty times as long as float32.
    """

    def __init__(self, group: dict[str, Any], momentum: float, dtype: torch.dtype) -> None:
        super().__init__([group], {"momentum": momentum})
        self.dtype = dtype
        alike = defaultdict[torch.Size, list[nn.Parameter]](list)
        for weight in group["params"]:
            alike[weight.shape].append(weight)
        self.stacks: list[list[nn.Parameter]] = []
        for shape, weights in alike.items():
            size = max(1, TOGETHER // shape.numel())
            self.stacks += [weights[first : first + size] for first in range(0, len(weights), size)]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the gradients are there
        (group,) = self.param_groups
        for stack in self.stacks:
            weights, updates = [], []
            for weight in stack:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                mean = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                weights.append(weight)
                updates.append(weight.grad.lerp(mean, group["momentum"]))
            found = orthogonalized(torch.stack(updates), self.dtype) if updates else ()
            for weight, update in zip(weights, found, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


class Optimizers:
    """Several torch optimizers driven as one."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["base_rate"] = group["lr"]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]

    def step(self, multiplier: float, clip: float, *metrics: Float[Tensor, ""]) -> list[float]:
        """One update at `multiplier` times the base rates; clears the gradients. Returns their norm over all
        weights, before they are clipped to at most `clip`, and the numbers of `metrics`, read with it: so a
        step waits for the device once. No weight moves where the norm is not finite.
        """
        total: Any = nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        whole = total.full_tensor() if hasattr(total, "full_tensor") else total  # of all shards
        norm, *numbers = torch.stack([whole, *metrics]).tolist()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = multiplier * group["base_rate"]
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [norm, *numbers]


def build_optimizers(
    model: LanguageModel | ScalarModel, rates: LearningRates, optimizer: str = "muon", eps: float = 1e-10
) -> Optimizers:
    """Every parameter of the model in exactly one group. `optimizer` is "muon" or "adamw", `eps` Adam's."""
    matrices, embeddings, norms = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            norms.append(parameter)
        elif ".layers." in name:
            matrices.append(parameter)
        else:
            embeddings.append(parameter)
    norm = 0.1 * rates.matrix if rates.norm is None else rates.norm
    groups = [
        {"params": embeddings, "lr": rates.embedding, "weight_decay": 0.0},
        {"params": norms, "lr": norm, "weight_decay": 0.0},
    ]
    blocks = {"params": matrices, "lr": rates.matrix, "weight_decay": rates.weight_decay}
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "eps": eps, "fused": True}
    if optimizer == "adamw":
        return Optimizers([torch.optim.AdamW([*groups, blocks], **adamw)])
    muon = Muon(blocks, momentum=0.95, dtype=model.model.compute_dtype)
    return Optimizers([muon, torch.optim.AdamW(groups, **adamw)])


def lr_schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The multiplier of the base rates at `step` of 0 … steps-1.

    Rises linearly over the first `warmup` steps, stays at 1, and falls linearly towards 0 over the
    last share `decay` of the run; the last step still moves.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return rise * fall
