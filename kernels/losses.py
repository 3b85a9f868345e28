"""Losses over a vocabulary: cross-entropy, log-probability with entropy, and KL, each with its gradient.

For a row of logits z, or the hidden state that makes it, z = h W^T:

    cross_entropy     -log p[target]                          with  p = softmax(z)
    token_logprobs    log p[target]  and  H = -sum p log p    with  p = softmax(z / temperature)
    kl                KL(p || q) = sum p (log p - log q)      with  p, q = softmax of either logits

All are one idea: a walk over chunks of rows of logits, with an operation on rows (`rows_torch.py` or
`rows_triton.py`). Logits are the largest tensor of a training step: N = 8192 rows over V = 128,000 tokens
fill 4 GB in float32. The `linear_` versions make a chunk of them when it is needed, and once more in the
backward pass, whose dz goes into both operands at once:

    dh = dz W,    dW = sum over chunks of dz^T h

The mean or the sum of a cross-entropy does without the second time: its rows share one upstream gradient, so
that but for this factor dz is known the moment the loss is.

Precision: products of half types are summed and kept in float32, so a logit is never rounded to a half
type. dz is, once, as a factor of the last two products; dW is summed in float32 over all rows.

A logit of -inf is a token that cannot be: p log p is 0 there, and so is p (log p - log q), whatever q is. KL
is inf where q cannot be but p can, and then its gradient is not a number.

Left out: label smoothing, class weights, second derivatives, KL estimates from samples, top-k and top-p.
Method: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009),
section 4; gradients in the forward pass as in Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section
3.2. Uses: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5; Rafailov et al. 2023 (arXiv 2305.18290),
section 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import starmap, zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import check


@dataclass(frozen=True)
class Plan:
    """How the logits of a device are walked over."""

    chunk: int  # logits in a chunk ...
    rows: int  # ... but no fewer rows: adding to dW is a pass over a [V, D] tensor for every chunk
    once: int  # up to so many logits are one chunk where the backward pass makes them anew: larger products
    align: int  # logits between the starts of two rows are a multiple of this: wide loads, fast products
    gpu: bool  # half types are multiplied as they are, and ignored rows too: to count them would stall it


PLANS = {
    "cpu": Plan(chunk=1 << 19, rows=256, once=1 << 21, align=1, gpu=False),
    # 256 MB of float32 and 128 MB of their gradients in a half type.
    "cuda": Plan(chunk=1 << 26, rows=256, once=1 << 26, align=64, gpu=True),
}


# --- The operations ------------------------------------------------------------------------------


def cross_entropy(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"],
    ignore_index: int = -100, reduction: str = "mean", impl: str | None = None,
) -> Float[Tensor, "*rows"]:  # fmt: skip
    """-log softmax(logits)[targets] in nats: a scalar, or [N] for reduction "none".

    Rows whose target is `ignore_index` count for nothing: loss 0, gradient 0 and not in the mean's
    denominator (with no row left the mean is nan and the sum 0). The loss is float32, or float64 for float64
    logits. IndexError for a target outside 0..V-1, on a GPU nan for loss and gradient; ValueError for an
    unknown option and for shapes that do not fit.
    """
    impl = check({"logits": (logits, "N V")}, {"targets": (targets, "N")}, impl, reduction, ignore_index)
    targets = targets.long()
    losses = _row_losses([logits], [], targets, ignore_index, impl)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else _mean(losses.sum(), targets != ignore_index)


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"],
    ignore_index: int = -100, reduction: str = "mean", impl: str | None = None,
) -> Float[Tensor, "*rows"]:  # fmt: skip
    """`cross_entropy(hidden @ weight.T, targets)` that never holds more than a chunk of the logits.

    The weight is cast to hidden's dtype, and each gradient comes back in its operand's. On a CPU "mean" and
    "sum" skip ignored rows, which then cost nothing. Loss, reductions and errors as in `cross_entropy`.
    """
    operands = {"hidden": (hidden, "N D"), "weight": (weight, "V D")}
    impl = check(operands, {"targets": (targets, "N")}, impl, reduction, ignore_index)
    targets = targets.long()
    if reduction == "none":
        return _row_losses([hidden], [weight], targets, ignore_index, impl)
    want = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    total = _summed(hidden, weight, targets, ignore_index, *want, impl)[0]
    return total if reduction == "sum" else _mean(total, targets != ignore_index)


def token_logprobs(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"],
    temperature: float = 1.0, impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:  # fmt: skip
    """(log p[target], entropy of p) in nats, for p = softmax(logits / temperature).

    Dtypes and errors as in `cross_entropy`; ValueError for a temperature that is not positive.
    """
    impl = check({"logits": (logits, "N V")}, {"targets": (targets, "N")}, impl, temperature=temperature)
    return _rows([logits], [], targets.long(), float(temperature), True, impl)[2:].unbind()


def linear_token_logprobs(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"],
    temperature: float = 1.0, impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:  # fmt: skip
    """`token_logprobs(hidden @ weight.T, targets, temperature)` that never holds many logits."""
    operands = {"hidden": (hidden, "N D"), "weight": (weight, "V D")}
    impl = check(operands, {"targets": (targets, "N")}, impl, temperature=temperature)
    return _rows([hidden], [weight], targets.long(), float(temperature), True, impl)[2:].unbind()


def kl(
    p_logits: Float[Tensor, "N V"], q_logits: Float[Tensor, "N V"], impl: str | None = None
) -> Float[Tensor, " N"]:
    """KL(p || q) in nats, for p = softmax(p_logits) and q = softmax(q_logits).

    float32, or float64 if either is. ValueError for an unknown `impl` and for shapes that do not fit.
    """
    impl = check({"p_logits": (p_logits, "N V"), "q_logits": (q_logits, "N V")}, {}, impl)
    return _rows([p_logits, q_logits], [], None, 1.0, False, impl)[4]


def linear_kl(
    p_hidden: Float[Tensor, "N P"], p_weight: Float[Tensor, "V P"],
    q_hidden: Float[Tensor, "N Q"], q_weight: Float[Tensor, "V Q"], impl: str | None = None,
) -> Float[Tensor, " N"]:  # fmt: skip
    """`kl(p_hidden @ p_weight.T, q_hidden @ q_weight.T)` that never holds many logits.

    The two models may differ in width.
    """
    p = {"p_hidden": (p_hidden, "N P"), "p_weight": (p_weight, "V P")}
    q = {"q_hidden": (q_hidden, "N Q"), "q_weight": (q_weight, "V Q")}
    impl = check(p | q, {}, impl)
    return _rows([p_hidden, q_hidden], [p_weight, q_weight], None, 1.0, False, impl)[4]


def _row_losses(states, weights, targets, ignore_index, impl):
    """An ignored row looks up token 0; of a hidden state 0, for 0 * nan must not reach dW."""
    kept = targets != ignore_index
    if weights:
        states = [states[0].where(kept[:, None], 0.0)]
    return (-_rows(states, weights, targets.where(kept, 0), 1.0, False, impl)[2]).where(kept, 0.0)


def _mean(total, kept):
    """Over the rows that are kept; over none it is nan, with gradients of 0."""
    count = kept.sum()
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)


# --- The walk ------------------------------------------------------------------------------------


def _walk(
    hidden: Tensor, weight: Tensor | None, d_hidden: Tensor | None = None, d_weight: Tensor | None = None,
    once: bool = True,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:  # fmt: skip
    """Chunk by chunk some rows, their logits z = hidden @ weight.T in float32 (or float64), and the memory
    for their dz, which goes into the gradients that are given before the next chunk is made.

    Without a weight, hidden is the logits and dz their gradient. `once`: in one chunk if few (Plan.once).
    """
    plan, N = PLANS.get(hidden.device.type, PLANS["cpu"]), len(hidden)
    if weight is None:
        size = max(N if hidden.is_cuda else plan.chunk // hidden.shape[1], 1)
        for rows in (slice(first, first + size) for first in range(0, max(N, 1), size)):
            yield rows, hidden[rows], None if d_hidden is None else d_hidden[rows]
        return
    V, size = len(weight), N
    if not once or plan.once < N * V:
        size = min(N, max(plan.chunk // V // plan.rows, 1) * plan.rows)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    factor = hidden.dtype if plan.gpu else exact
    rounded = not plan.gpu and hidden.dtype == torch.bfloat16
    h, W = hidden.to(factor), weight.to(hidden.dtype).to(factor)
    # All chunks have the same memory, in which rows begin at multiples of `align`, and dz that of z if it has
    # its dtype.
    shape = size, -(-V // plan.align) * plan.align
    z, wanted = hidden.new_empty(shape, dtype=exact)[:, :V], d_hidden is not None or d_weight is not None
    dz = hidden.new_empty(shape, dtype=factor)[:, :V] if wanted and factor != exact else z
    for first in range(0, max(N, 1), max(size, 1)):
        rows = slice(first, first + size)
        z, dz = z[: len(h[rows])], dz[: len(h[rows])]  # the last chunk may be smaller
        yield rows, _product(h[rows], W.T, z, rounded), dz if wanted else None
        if d_hidden is not None:
            _product(dz, W, d_hidden[rows], rounded)
        if d_weight is not None:
            _product(dz.T, h[rows], d_weight, rounded, beta=1)


def _product(a: Tensor, b: Tensor, out: Tensor, rounded: bool, beta: int = 0) -> Tensor:
    """out = a b, or out += a b for a beta of 1, summed in float32 or better whatever the factors are.

    `rounded`: a CPU may round factors in float32 to bfloat16, as h and W are already. Its units for bfloat16
    take several times less for the product, and still give it in float32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16" if rounded else before
        if a.dtype == out.dtype:
            return torch.addmm(out, a, b, beta=beta, out=out)
        if not a.is_cuda:  # where tests and the compile gate walk as on a GPU
            return out.add_(a @ b) if beta else out.copy_(a @ b)
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    finally:
        matmul.fp32_precision = before


# --- Operations on rows, as operators that torch.compile keeps whole -------------------------------


@torch.library.custom_op("minillm::rows", mutates_args=())
def _rows(
    states: list[Tensor], weights: list[Tensor], targets: Tensor | None, temperature: float,
    entropy: bool, impl: str,
) -> Tensor:  # fmt: skip
    """What the operation of `rows_torch.py` says of each row. With targets it is `logprob` of one side:
    [max, log S, log p[target]] and, with `entropy`, H, as [3 or 4, N]. Without, `kl` of two: [max, log S, the
    same of q, KL], as [5, N]. A side is hidden states and a weight, or, without weights, logits.
    """
    module, results = import_module(f"kernels.rows_{impl}"), []
    for chunks in zip(*starmap(_walk, zip_longest(states, weights)), strict=True):
        rows, z = chunks[0][0], [z for _, z, _ in chunks]
        if targets is None:
            results.append(module.kl(*z))
        else:
            results.append(module.logprob(*z, targets[rows], temperature, entropy))
    return torch.cat(results, 1)


@_rows.register_fake
def _(states, weights, targets, temperature, entropy, impl):
    dtype = torch.promote_types(torch.promote_types(states[0].dtype, states[-1].dtype), torch.float32)
    return states[0].new_empty((5 if targets is None else 3 + entropy, len(states[0])), dtype=dtype)


@torch.library.custom_op("minillm::rows_backward", mutates_args=())
def _rows_backward(
    states: list[Tensor], weights: list[Tensor], targets: Tensor | None, temperature: float, impl: str,
    result: Tensor, d_result: Tensor, want: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of those states and, after them, weights for which they are wanted."""
    operands, sides = [*states, *weights], len(states)
    d_states = [torch.empty_like(h, memory_format=torch.contiguous_format) if wanted else None
                for h, wanted in zip(states, want[:sides], strict=True)]  # fmt: skip
    d_weights = [torch.zeros_like(W, dtype=torch.promote_types(h.dtype, torch.float32)) if wanted else None
                 for W, h, wanted in zip(weights, states, want[sides:], strict=bool(weights))]  # fmt: skip
    walks, module = zip_longest(states, weights, d_states, d_weights), import_module(f"kernels.rows_{impl}")
    for chunks in zip(*starmap(_walk, walks), strict=True):  # strict, for all to be walked to the end
        rows, z, outs = chunks[0][0], [z for _, z, _ in chunks], [dz for _, _, dz in chunks]
        if targets is None:
            module.kl_backward(*z, result[:, rows], d_result[:, rows], *outs)
        else:
            module.logprob_backward(*z, targets[rows], temperature, result[:, rows], d_result[:, rows], *outs)
    found = zip([*d_states, *d_weights], operands, strict=True)
    return [d.to(x.dtype) for d, x in found if d is not None]


@_rows_backward.register_fake
def _(states, weights, targets, temperature, impl, result, d_result, want):
    return [x.new_empty(x.shape) for x, wanted in zip([*states, *weights], want, strict=True) if wanted]


def _save(ctx, inputs, output):
    states, weights, targets, ctx.temperature, _, ctx.impl = inputs
    ctx.sides = len(states)
    ctx.save_for_backward(output, targets, *states, *weights)


def _gradients(ctx, d_result):
    result, targets, *operands = ctx.saved_tensors
    states, weights = operands[: ctx.sides], operands[ctx.sides :]
    want = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = iter(_rows_backward(states, weights, targets, ctx.temperature, ctx.impl, result, d_result, want))
    grads = [next(found) if wanted else None for wanted in want]
    return grads[: ctx.sides], grads[ctx.sides :], None, None, None, None


_rows.register_autograd(_gradients, setup_context=_save)


# --- The sum of a cross-entropy, with its gradient at once -----------------------------------------


@torch.library.custom_op("minillm::summed_cross_entropy", mutates_args=())
def _summed(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    want_hidden: bool, want_weight: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(sum of losses [], its d hidden [N, D], its d weight [V, D] in float32, for it could overflow a half
    type until the upstream gradient scales it); what is not wanted is empty. With z = h W^T, p = softmax(z):

    dz = p - onehot(target),  0 in rows that are ignored
    """
    rows, kept, N = None, targets != ignore_index, len(hidden)
    if PLANS.get(hidden.device.type, PLANS["cpu"]).gpu:
        # 0 * nan is nan: an ignored row must not reach dW.
        hidden, targets = hidden.where(kept[:, None], 0.0), targets.where(kept, 0)
    elif not kept.all():
        rows = kept.nonzero().squeeze(1)
        hidden, targets, kept = hidden[rows], targets[rows], kept[rows]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros((), dtype=exact)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
    d_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
    loss_and_gradient = import_module(f"kernels.rows_{impl}").loss_and_gradient
    for i, z, dz in _walk(hidden, weight, d_hidden, d_weight, once=False):
        total += loss_and_gradient(z, targets[i], kept[i], dz).sum()
    if d_hidden is not None and rows is not None:
        d_hidden = d_hidden.new_zeros(N, d_hidden.shape[1]).index_copy_(0, rows, d_hidden)
    d_hidden, d_weight = (hidden.new_empty(0) if d is None else d for d in (d_hidden, d_weight))
    return total, d_hidden, d_weight


@_summed.register_fake
def _(hidden, weight, targets, ignore_index, want_hidden, want_weight, impl):
    exact = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    d_weight = weight.new_empty(weight.shape, dtype=exact) if want_weight else hidden.new_empty(0)
    return hidden.new_empty((), dtype=exact), d_hidden, d_weight


def _save_summed(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _scale(ctx, upstream, *_):
    upstream = upstream.reshape(1)  # not a scalar, so that half gradients are scaled in float32
    found = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    return *((d * upstream).to(dtype) if wanted else None for d, dtype, wanted in found), *[None] * 5


_summed.register_autograd(_scale, setup_context=_save_summed)
