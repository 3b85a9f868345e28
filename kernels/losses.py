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
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import autocast, check, choose_impl
from kernels.rows_torch import accumulator


@dataclass(frozen=True)
class Plan:
    """How the logits of a device are walked over."""

    chunk: int  # logits in a chunk ...
    rows: int  # ... but no fewer rows: adding to dW is a pass over a [V, D] tensor for every chunk
    kept: int  # so few logits are kept for the backward pass: making them again is a quarter of its products
    align: int  # logits between the starts of two rows are a multiple of this: wide loads, fast products
    skip: bool  # leave ignored rows out; on a GPU, to know how many they are would stall it
    half: bool  # half types are multiplied as they are; a CPU takes them as float32 (see `_products`)


PLANS = {
    "cpu": Plan(chunk=1 << 19, rows=256, kept=1 << 21, align=1, skip=True, half=False),
    # 256 MB of float32 and 128 MB of their gradients in a half type.
    "cuda": Plan(chunk=1 << 26, rows=256, kept=1 << 26, align=64, skip=False, half=True),
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
    check({"logits": (logits, "N V")}, {"targets": (targets, "N")})
    return _cross_entropy(logits, None, targets.long(), ignore_index, reduction, impl)


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"],
    ignore_index: int = -100, reduction: str = "mean", impl: str | None = None,
) -> Float[Tensor, "*rows"]:  # fmt: skip
    """`cross_entropy(hidden @ weight.T, targets)` that never holds more than a chunk of the logits.

    The weight is cast to hidden's dtype (under autocast, both to its), and each gradient comes back in its
    operand's. On a CPU "mean" and "sum" skip ignored rows, which then cost nothing. Loss, reductions and
    errors as in `cross_entropy`.
    """
    check({"hidden": (hidden, "N D"), "weight": (weight, "V D")}, {"targets": (targets, "N")})
    return _cross_entropy(autocast(hidden), weight, targets.long(), ignore_index, reduction, impl)


def token_logprobs(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"],
    temperature: float = 1.0, impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:  # fmt: skip
    """(log p[target], entropy of p) in nats, for p = softmax(logits / temperature).

    Dtypes and errors as in `cross_entropy`; ValueError for a temperature that is not positive.
    """
    check({"logits": (logits, "N V")}, {"targets": (targets, "N")})
    return _logprobs([logits], targets, temperature, impl)


def linear_token_logprobs(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"],
    temperature: float = 1.0, impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:  # fmt: skip
    """`token_logprobs(hidden @ weight.T, targets, temperature)` that never holds many logits."""
    check({"hidden": (hidden, "N D"), "weight": (weight, "V D")}, {"targets": (targets, "N")})
    return _logprobs([autocast(hidden), weight], targets, temperature, impl)


def kl(
    p_logits: Float[Tensor, "N V"], q_logits: Float[Tensor, "N V"], impl: str | None = None
) -> Float[Tensor, " N"]:
    """KL(p || q) in nats, for p = softmax(p_logits) and q = softmax(q_logits).

    float32, or float64 if either is. ValueError for an unknown `impl` and for shapes that do not fit.
    """
    check({"p_logits": (p_logits, "N V"), "q_logits": (q_logits, "N V")}, {})
    return _rows([p_logits, q_logits], None, 1.0, False, choose_impl(impl, p_logits))[0][4]


def linear_kl(
    p_hidden: Float[Tensor, "N P"], p_weight: Float[Tensor, "V P"],
    q_hidden: Float[Tensor, "N Q"], q_weight: Float[Tensor, "V Q"], impl: str | None = None,
) -> Float[Tensor, " N"]:  # fmt: skip
    """`kl(p_hidden @ p_weight.T, q_hidden @ q_weight.T)` that never holds many logits.

    The two models may differ in width.
    """
    p = {"p_hidden": (p_hidden, "N P"), "p_weight": (p_weight, "V P")}
    check(p | {"q_hidden": (q_hidden, "N Q"), "q_weight": (q_weight, "V Q")}, {})
    operands = [autocast(p_hidden), p_weight, autocast(q_hidden), q_weight]
    return _rows(operands, None, 1.0, False, choose_impl(impl, p_hidden))[0][4]


def _logprobs(operands: list[Tensor], targets, temperature, impl):
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    impl, targets = choose_impl(impl, operands[0]), targets.long()
    result = _rows(operands, targets, float(temperature), True, impl)[0]
    return result[2], result[3]


def _cross_entropy(hidden, weight, targets, ignore_index, reduction, impl):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: there are 'mean', 'sum' and 'none'")
    impl, kept = choose_impl(impl, hidden), targets != ignore_index
    if weight is not None and reduction != "none":
        grad = torch.is_grad_enabled()
        want = hidden.requires_grad and grad, weight.requires_grad and grad
        total = _summed(hidden, weight, targets, ignore_index, *want, impl)[0]
    else:  # an ignored row looks up token 0; of a hidden state 0, for 0 * nan must not reach dW
        operands = [hidden] if weight is None else [hidden.where(kept[:, None], 0.0), weight]
        logprobs = _rows(operands, targets.where(kept, 0), 1.0, False, impl)[0][2]
        losses = (-logprobs).where(kept, 0.0)
        if reduction == "none":
            return losses
        total = losses.sum()
    if reduction == "sum":
        return total
    count = kept.sum()  # the mean over no rows is nan, with gradients of 0
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)


# --- The walk ------------------------------------------------------------------------------------


class Logits:
    """z = hidden @ weight.T [N, V] chunk by chunk, and from chunks of dz the gradients that are wanted.

    Without a weight, hidden is the logits. Those, and those that are kept, are one chunk.
    """

    def __init__(self, hidden: Tensor, weight: Tensor | None, want=(False, False), kept=None, keep=True):
        plan = PLANS.get(hidden.device.type, PLANS["cpu"])
        self.hidden, self.weight, self.want = hidden, weight, want
        N, self.V = len(hidden), hidden.shape[1] if weight is None else len(weight)
        self.exact = accumulator(hidden.dtype)
        self.few = weight is not None and keep and plan.kept >= N * self.V
        self.made = self.few and kept is not None  # z was made, and kept, in the forward pass
        self.size = N  # rows of a chunk
        self.d_hidden, self.d_weight = hidden.new_empty(0), hidden.new_empty(0)
        if want[0]:
            self.d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if weight is None:
            return
        if not self.few:
            self.size = min(N, max(plan.chunk // self.V // plan.rows, 1) * plan.rows)
        # Every chunk has the same memory, in which rows begin at multiples of `align`.
        shape = self.size, (self.V + plan.align - 1) // plan.align * plan.align
        factor = hidden.dtype if plan.half else self.exact
        self.h, self.W = hidden.to(factor), weight.to(hidden.dtype).to(factor)
        self.z = kept if self.made else hidden.new_empty(shape, dtype=self.exact)[:, : self.V]
        self.dz = self.z  # written over z, if that was made for it in dz's dtype
        if any(want) and (self.made or factor != self.exact):
            self.dz = hidden.new_empty(shape, dtype=factor)[:, : self.V]
        if want[1]:
            self.d_weight = torch.zeros_like(weight, dtype=self.exact)

    def chunks(self) -> Iterator[slice]:
        N, size = len(self.hidden), max(1, self.size)
        return (slice(i, i + size) for i in range(0, max(1, N), size))

    def __getitem__(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A chunk's z, in float32 (or float64) or as they were given, and the memory for its dz if wanted."""
        if self.weight is None:
            return self.hidden[rows], self.d_hidden[rows] if self.want[0] else None
        h = self.h[rows]
        z, dz = self.z[: len(h)], self.dz[: len(h)] if any(self.want) else None
        return z if self.made else _product(h, self.W.T, z), dz

    def add(self, rows: slice, dz: Tensor | None) -> None:
        """One chunk's share of both gradients."""
        if self.weight is None or dz is None:
            return
        if self.want[0]:
            _product(dz, self.W, self.d_hidden[rows])
        if self.want[1]:
            _product(dz.T, self.h[rows], self.d_weight, accumulate=True)


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a b, or out += a b, summed in float32 or better whatever the factors are."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if not a.is_cuda:  # where tests and the compile gate walk as on a GPU
        return out.add_(a @ b) if accumulate else out.copy_(a @ b)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


@contextmanager
def _products(*sides: Logits) -> Iterator[None]:
    """Products as they stand: without autocast, and for bfloat16 on a CPU with factors rounded to it.

    h and W are so rounded already. A CPU's units for bfloat16 take several times less for the product, and
    still give it in float32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with torch.autocast(sides[0].hidden.device.type, enabled=False):
        try:
            if all(not s.hidden.is_cuda and s.hidden.dtype == torch.bfloat16 for s in sides):
                matmul.fp32_precision = "bf16"
            yield
        finally:
            matmul.fp32_precision = before


def check_targets(targets: Tensor, V: int) -> None:
    """IndexError naming the first target outside 0..V-1.

    On a GPU nothing is checked, for reading the answer would stall it: PyTorch's kernels assert their bounds
    themselves, and Triton's give nan for such a row.
    """
    if targets.is_cuda:
        return
    wrong = (targets < 0) | (targets >= V)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"target {int(targets[row])} in row {row} is outside 0..{V - 1}")


# --- Operations on rows, as operators that torch.compile keeps whole -------------------------------


@torch.library.custom_op("minillm::rows", mutates_args=())
def _rows(
    operands: list[Tensor], targets: Tensor | None, temperature: float, entropy: bool, impl: str
) -> list[Tensor]:
    """[what the operation of `rows_torch.py` says of each row, then of each side the logits if kept].

    With targets the operation is `logprob` on one side, without it is `kl` of two. A side is one operand, its
    logits, or two: hidden states and a weight.
    """
    sides, module = _sides(operands, targets), import_module(f"kernels.rows_{impl}")
    if targets is not None:
        check_targets(targets, sides[0].V)
    results = []
    with _products(*sides):
        for i in sides[0].chunks():
            z = [side[i][0] for side in sides]
            said = module.kl(*z) if targets is None else module.logprob(*z, targets[i], temperature, entropy)
            results.append(said)
    return [torch.cat(results, 1), *_kept(sides)]


@_rows.register_fake
def _(operands, targets, temperature, entropy, impl):
    sides = _sides(operands, targets)
    dtype = accumulator(torch.promote_types(sides[0].hidden.dtype, sides[-1].hidden.dtype))
    count = 5 if targets is None else 3 + entropy
    return [operands[0].new_empty((count, len(operands[0])), dtype=dtype), *_kept(sides)]


@torch.library.custom_op("minillm::rows_backward", mutates_args=())
def _rows_backward(
    operands: list[Tensor], targets: Tensor | None, temperature: float, impl: str,
    said: list[Tensor], d_result: Tensor, want: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of those operands for which they are wanted."""
    result, *kept = said
    sides, module = _sides(operands, targets, want, kept), import_module(f"kernels.rows_{impl}")
    with _products(*sides):
        for i in sides[0].chunks():
            z, outs = zip(*(side[i] for side in sides), strict=True)
            rows = result[:, i], d_result[:, i]
            if targets is None:
                module.kl_backward(*z, *rows, *outs)
            else:
                module.logprob_backward(*z, targets[i], temperature, *rows, *outs)
            for side, out in zip(sides, outs, strict=True):
                side.add(i, out)
    found = [x for side in sides for x in (side.d_hidden, side.d_weight)[: len(operands) // len(sides)]]
    return [d.to(x.dtype) for d, x, wanted in zip(found, operands, want, strict=True) if wanted]


@_rows_backward.register_fake
def _(operands, targets, temperature, impl, said, d_result, want):
    return [x.new_empty(x.shape) for x, wanted in zip(operands, want, strict=True) if wanted]


def _sides(operands, targets, want=(False,) * 4, kept=(None, None)) -> list[Logits]:
    if len(operands) == (2 if targets is None else 1):
        return [Logits(z, None, (wanted, False)) for z, wanted in zip(operands, want, strict=False)]
    pairs = zip(operands[::2], operands[1::2], zip(want[::2], want[1::2], strict=True), kept, strict=False)
    return [Logits(*pair) for pair in pairs]


def _kept(sides: list[Logits]) -> list[Tensor]:
    return [side.z if side.few else side.hidden.new_empty(0) for side in sides]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no tensors of zeros for the outputs that nobody differentiates
    operands, targets, ctx.temperature, _, ctx.impl = inputs
    ctx.count = len(operands)
    ctx.save_for_backward(*operands, targets, *output)


def _gradients(ctx, upstream):
    want = ctx.needs_input_grad[0]
    if upstream[0] is None:
        return [None] * ctx.count, None, None, None, None
    saved = list(ctx.saved_tensors)
    operands, targets, said = saved[: ctx.count], saved[ctx.count], saved[ctx.count + 1 :]
    found = iter(_rows_backward(operands, targets, ctx.temperature, ctx.impl, said, upstream[0], want))
    return [next(found) if wanted else None for wanted in want], None, None, None, None


_rows.register_autograd(_gradients, setup_context=_save)


# --- The sum of a cross-entropy, with its gradient at once -----------------------------------------


@torch.library.custom_op("minillm::summed_cross_entropy", mutates_args=())
def _summed(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    want_hidden: bool, want_weight: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(sum of losses [], its d hidden [N, D], its d weight [V, D], which overflows no half type before the
    upstream gradient scales it); what is not wanted is empty. With logits z = h W^T and p = softmax(z):

    dz = p - onehot(target),  0 in rows that are ignored
    """
    kept: Tensor | None
    kept, rows, shape = targets != ignore_index, None, hidden.shape
    targets = targets.where(kept, 0)
    check_targets(targets, len(weight))
    if not PLANS.get(hidden.device.type, PLANS["cpu"]).skip:
        hidden = hidden.where(kept[:, None], 0.0)  # 0 * nan is nan: an ignored row must not reach dW
    elif kept.all():
        kept = None
    else:
        rows, kept = kept.nonzero().squeeze(1), None
        hidden, targets = hidden[rows], targets[rows]
    logits = Logits(hidden, weight, (want_hidden, want_weight), keep=False)
    total = hidden.new_zeros((), dtype=logits.exact)
    loss_and_gradient = import_module(f"kernels.rows_{impl}").loss_and_gradient
    with _products(logits):
        for i in logits.chunks():
            share = None if kept is None else kept[i].to(total.dtype)
            z, dz = logits[i]
            losses, dz = loss_and_gradient(z, targets[i], share, dz)
            logits.add(i, dz)
            total += losses.sum() if kept is None else losses.where(kept[i], 0.0).sum()
    d_hidden = logits.d_hidden
    if rows is not None and want_hidden:
        d_hidden = d_hidden.new_zeros(shape).index_copy_(0, rows, d_hidden)
    return total, d_hidden, logits.d_weight


@_summed.register_fake
def _(hidden, weight, targets, ignore_index, want_hidden, want_weight, impl):
    exact = accumulator(hidden.dtype)
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    d_weight = weight.new_empty(weight.shape, dtype=exact) if want_weight else hidden.new_empty(0)
    return hidden.new_empty((), dtype=exact), d_hidden, d_weight


def _save_summed(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _scale(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 7
    upstream = upstream.reshape(1)  # not a scalar, so that half gradients are scaled in float32
    found = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    return *((d * upstream).to(dtype) if wanted else None for d, dtype, wanted in found), *[None] * 5


_summed.register_autograd(_scale, setup_context=_save_summed)
