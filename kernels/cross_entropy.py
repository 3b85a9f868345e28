"""Softmax cross-entropy, over logits and fused with the output projection that makes them.

The loss of one row is  -log softmax(logits)[target] = logsumexp(logits) - logits[target].

`cross_entropy` takes logits that already exist. `linear_cross_entropy` takes the hidden states and
the output matrix, and walks through the rows in chunks: the [N, V] logits, which for a real
vocabulary are the largest tensor of a whole training step, never exist.
The gradient of a chunk's logits is at hand the moment its loss is, so for "mean" and "sum" the
forward pass multiplies it straight into both operands and the backward pass only scales the result;
for "none" every row has an upstream gradient of its own, and the backward pass goes through the
chunks once more.

Left out: label smoothing, class weights, soft targets, second derivatives.
Method: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv
2411.09009), section 4; gradients in the forward pass as in Hsu et al. 2024, "Liger Kernel" (arXiv
2410.10989), section 3.2.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk has about this many logits (2 MB in float32, within one core's cache), ...
CHUNK_LOGITS = 1 << 19
# ... but never fewer rows: below that, adding to d weight costs as much as the product it adds.
CHUNK_ROWS = 256


def cross_entropy(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Float[Tensor, "*rows"]:
    """-log softmax(logits)[targets] in nats: a scalar, or [N] for reduction "none".

    Rows whose target is `ignore_index` count for nothing: loss 0, gradient 0, and not in the mean's
    denominator (with no row left the mean is nan and the sum 0). The loss is float32, or float64
    for float64 logits. IndexError for a target outside 0..V-1; ValueError for an unknown option.
    """
    _check(targets, logits.shape[1], ignore_index, reduction, impl)
    logits = logits.to(_accumulator(logits.dtype))
    return F.cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Float[Tensor, "*rows"]:
    """`cross_entropy(hidden @ weight.T, targets)` that never holds the [N, V] logits.

    The products run in hidden's dtype (under autocast, in autocast's), d weight is summed in
    float32, and each gradient comes back in its operand's dtype. Ignored rows cost nothing: they
    are skipped. Loss, reductions and errors as in `cross_entropy`.
    """
    _check(targets, weight.shape[0], ignore_index, reduction, impl)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    kept = (targets != ignore_index).nonzero().squeeze(1)
    return _LinearCrossEntropy.apply(hidden, weight, targets.long(), kept, reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    """Only the rows in `kept` take part; the others keep a loss and a gradient of zero."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, reduction):
        ctx.count = len(kept) if reduction == "mean" else 1
        ctx.per_row = reduction == "none"
        if ctx.per_row:
            ctx.save_for_backward(hidden, weight, targets, kept)
            return _run(hidden, weight, targets, kept)[0]
        losses, *gradients = _run(hidden, weight, targets, kept, ctx.needs_input_grad)
        ctx.save_for_backward(*gradients)
        return losses.sum() / ctx.count  # 0 / 0 is the nan of a mean over no rows

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.per_row:
            _, *gradients = _run(*ctx.saved_tensors, ctx.needs_input_grad, upstream)
        else:
            share = upstream.reshape(1) / max(ctx.count, 1)  # [1], so that d is scaled in float32
            gradients = [d if d is None else (d * share).to(d.dtype) for d in ctx.saved_tensors]
        return *gradients, None, None, None


def _run(hidden, weight, targets, kept, wanted=(False, False), upstream=None):
    """Losses [N] and the wanted ones of d hidden [N, D] and d weight [V, D], else None.

    With logits z = h W^T, p = softmax(z), loss = -log p[target] and u the row's upstream gradient
    (1 where none is given):
        dz = u (p - onehot(target)),   dh = dz W,   dW = sum over rows of dz^T h
    """
    dtype = _accumulator(hidden.dtype)
    losses = hidden.new_zeros(len(hidden), dtype=dtype)
    d_hidden = torch.zeros_like(hidden) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
    matrix = weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in kept.split(max(CHUNK_ROWS, CHUNK_LOGITS // len(weight))):
            h, target = hidden.index_select(0, rows), targets[rows, None]
            z = (h @ matrix.T).to(dtype)
            p = z.softmax(1)
            # log sum exp z = max z - log max p, and max p >= 1/V: no second pass of exponentials.
            losses[rows] = z.amax(1) - z.gather(1, target)[:, 0] - p.amax(1).log()
            if not (wanted[0] or wanted[1]):
                continue
            dz = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            dz = (dz if upstream is None else dz.mul_(upstream[rows, None])).to(hidden.dtype)
            if wanted[0]:
                d_hidden.index_copy_(0, rows, dz @ matrix)
            if wanted[1] and dz.dtype == dtype:
                d_weight.addmm_(dz.T, h)
            elif wanted[1]:
                d_weight += (dz.T @ h).to(dtype)
    return losses, d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmaxes and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _check(targets, vocabulary: int, ignore_index: int, reduction: str, impl: str | None) -> None:
    if impl not in (None, "torch"):
        raise ValueError(f"unknown impl {impl!r}: there are None and 'torch'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: there are 'mean', 'sum' and 'none'")
    if targets.is_cuda:
        return  # reading the answer would stall the GPU, whose own bounds checks catch it
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"target {int(targets[row])} in row {row} is outside 0..{vocabulary - 1}")
