"""Softmax cross-entropy, over logits and fused with the output projection that makes them.

The loss of one row is its target's log-probability with the sign turned,

    -log softmax(logits)[target] = logsumexp(logits) - logits[target],

and `cross_entropy` of logits that exist is just that (`logprob.py`), or PyTorch's own function.
`linear_cross_entropy` takes the hidden states and the output matrix, and walks through the rows in chunks
(`linear.py`): the [N, V] logits, which for a real vocabulary are the largest tensor of a whole training
step, never exist. For "mean" and "sum" all rows have the same upstream gradient, and but for that factor
the gradient of a chunk's logits is at hand the moment its loss is: the forward pass multiplies it straight
into both operands, and the backward pass only scales the result. For "none" the backward pass goes through
the chunks once more.

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

from kernels.dispatch import choose_impl
from kernels.linear import Gradients, Logits, autocast, check_targets, multiplied, row_functions
from kernels.logprob import row_logprobs
from kernels.rows_torch import accumulator


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
    for float64 logits. IndexError for a target outside 0..V-1, on a GPU nan; ValueError for an unknown
    option.
    """
    _check(reduction)
    if choose_impl(impl, logits) == "torch":
        targets = _checked(targets, ignore_index, logits.shape[1])
        logits = logits.to(accumulator(logits.dtype))
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    return _row_losses(logits, None, targets, ignore_index, reduction, impl)


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Float[Tensor, "*rows"]:
    """`cross_entropy(hidden @ weight.T, targets)` that never holds more than a chunk of the logits.

    The products run in hidden's dtype (under autocast, in autocast's), d weight is summed in
    float32, and each gradient comes back in its operand's dtype. On a CPU "mean" and "sum" skip ignored
    rows, which then cost nothing. Loss, reductions and errors as in `cross_entropy`.
    """
    _check(reduction)
    hidden = autocast(hidden)
    if reduction == "none":
        return _row_losses(*multiplied(hidden, weight), targets, ignore_index, reduction, impl)
    grad = torch.is_grad_enabled()
    want = hidden.requires_grad and grad, weight.requires_grad and grad
    total, _, _ = _summed(hidden, weight, targets, ignore_index, *want, choose_impl(impl, hidden))
    return _mean(total, targets != ignore_index) if reduction == "mean" else total


def _check(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: there are 'mean', 'sum' and 'none'")


@torch.library.custom_op("minillm::checked_targets", mutates_args=())
def _checked(targets: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """The targets as int64, once they are known to be good: an operator, for the check reads them."""
    check_targets(targets.where(targets != ignore_index, 0), vocabulary)
    return targets.to(torch.int64, copy=True)


@_checked.register_fake
def _(targets, ignore_index, vocabulary):
    return torch.empty_like(targets, dtype=torch.int64)


def _row_losses(hidden, weight, targets, ignore_index, reduction, impl):
    """The losses, or their sum or mean, from log-probabilities; an ignored row looks up token 0."""
    kept = targets != ignore_index
    logprobs = row_logprobs(hidden, weight, targets.where(kept, 0), impl)
    losses = (-logprobs).where(kept, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else _mean(losses.sum(), kept)


def _mean(total: Tensor, kept: Tensor) -> Tensor:
    """total over the rows kept; over no rows nan, with gradients of 0."""
    count = kept.sum()
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)


@torch.library.custom_op("minillm::summed_cross_entropy", mutates_args=())
def _summed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses [], its d hidden [N, D], its d weight [V, D]); what is not wanted is empty."""
    kept = targets != ignore_index
    check_targets(targets.where(kept, 0), len(weight))
    if hidden.is_cuda:  # to know how many rows are kept would stall the GPU: ignored ones get a share of 0
        return _run(hidden, weight, targets.where(kept, 0), kept, want_hidden, want_weight, impl)
    if kept.all():
        return _run(hidden, weight, targets, None, want_hidden, want_weight, impl)
    rows = kept.nonzero().squeeze(1)
    chosen = hidden[rows], weight, targets[rows], None
    total, d_hidden, d_weight = _run(*chosen, want_hidden, want_weight, impl)
    if want_hidden:
        d_hidden = d_hidden.new_zeros(hidden.shape).index_copy_(0, rows, d_hidden)
    return total, d_hidden, d_weight


def _run(hidden, weight, targets, kept, want_hidden, want_weight, impl):
    """With logits z = h W^T and p = softmax(z):  dz = p - onehot(target),  0 in rows that are not kept."""
    logits, functions = Logits(hidden, weight), row_functions(impl)
    gradients = Gradients(logits, want_hidden, want_weight)
    total = hidden.new_zeros((), dtype=accumulator(hidden.dtype))
    for rows in logits.chunks():
        z = logits[rows]
        share = None if kept is None else kept[rows].to(total.dtype)
        if gradients.wanted:
            losses, dz = functions.loss_and_gradient(z, targets[rows], share)
            gradients.add(rows, dz)
        else:
            losses = -functions.logprob(z, targets[rows], 1.0, False)[0]
        total += losses.sum() if kept is None else losses.where(kept[rows], 0.0).sum()
    return total, *gradients.result()


@_summed.register_fake
def _(hidden, weight, targets, ignore_index, want_hidden, want_weight, impl):
    total = hidden.new_empty((), dtype=accumulator(hidden.dtype))
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    return total, d_hidden, weight.new_empty(weight.shape if want_weight else 0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _scale(ctx, upstream, *_):
    upstream = upstream.reshape(1)  # not a scalar, so that half gradients are scaled in float32
    gradients = (
        (d * upstream).to(d.dtype) if wanted else None
        for d, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    )
    return *gradients, None, None, None, None, None


_summed.register_autograd(_scale, setup_context=_save)
