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
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Float[Tensor, "*rows"]:
    """-log softmax(logits)[targets] in nats: a scalar, or [N] for reduction "none".

    Rows whose target is `ignore_index` count for nothing: loss 0, gradient 0 and not in the mean's
    denominator (with no row left the mean is nan and the sum 0). The loss is float32, or float64 for float64
    logits. IndexError for a target outside 0..V-1, on a GPU nan for loss and gradient; ValueError for an
    unknown option and for shapes that do not fit.
    """
    _check({"logits": (logits, "N V")}, targets, reduction)
    return _row_losses(logits, None, targets.long(), ignore_index, reduction, choose_impl(impl, logits))


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Float[Tensor, "*rows"]:
    """`cross_entropy(hidden @ weight.T, targets)` that never holds more than a chunk of the logits.

    The weight is cast to hidden's dtype (under autocast, both to its), and each gradient comes back in its
    operand's. On a CPU "mean" and "sum" skip ignored rows, which then cost nothing. Loss, reductions and
    errors as in `cross_entropy`.
    """
    _check({"hidden": (hidden, "N D"), "weight": (weight, "V D")}, targets, reduction)
    hidden, targets, impl = autocast(hidden), targets.long(), choose_impl(impl, hidden)
    if reduction == "none":
        return _row_losses(hidden, weight, targets, ignore_index, reduction, impl)
    grad = torch.is_grad_enabled()
    want = hidden.requires_grad and grad, weight.requires_grad and grad
    total = _summed(hidden, weight, targets, ignore_index, *want, impl)[0]
    return _mean(total, targets != ignore_index) if reduction == "mean" else total


def token_logprobs(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(log p[target], entropy of p) in nats, for p = softmax(logits / temperature).

    Dtypes and errors as in `cross_entropy`; ValueError for a temperature that is not positive.
    """
    _check({"logits": (logits, "N V")}, targets)
    return _logprobs(logits, None, targets, temperature, impl)


def linear_token_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """`token_logprobs(hidden @ weight.T, targets, temperature)` that never holds many logits."""
    _check({"hidden": (hidden, "N D"), "weight": (weight, "V D")}, targets)
    return _logprobs(autocast(hidden), weight, targets, temperature, impl)


def kl(
    p_logits: Float[Tensor, "N V"], q_logits: Float[Tensor, "N V"], impl: str | None = None
) -> Float[Tensor, " N"]:
    """KL(p || q) in nats, for p = softmax(p_logits) and q = softmax(q_logits).

    float32, or float64 if either is. ValueError for an unknown `impl` and for shapes that do not fit.
    """
    _check({"p_logits": (p_logits, "N V"), "q_logits": (q_logits, "N V")})
    return _rows("kl", p_logits, None, q_logits, None, None, 1.0, choose_impl(impl, p_logits))[0][4]


def linear_kl(
    p_hidden: Float[Tensor, "N P"],
    p_weight: Float[Tensor, "V P"],
    q_hidden: Float[Tensor, "N Q"],
    q_weight: Float[Tensor, "V Q"],
    impl: str | None = None,
) -> Float[Tensor, " N"]:
    """`kl(p_hidden @ p_weight.T, q_hidden @ q_weight.T)` that never holds many logits.

    The two models may differ in width.
    """
    p = {"p_hidden": (p_hidden, "N P"), "p_weight": (p_weight, "V P")}
    _check(p | {"q_hidden": (q_hidden, "N Q"), "q_weight": (q_weight, "V Q")})
    impl = choose_impl(impl, p_hidden)
    return _rows("kl", autocast(p_hidden), p_weight, autocast(q_hidden), q_weight, None, 1.0, impl)[0][4]


def _check(operands, targets: Tensor | None = None, reduction: str = "none") -> None:
    check(operands, {"targets": (targets, "N")})
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: there are 'mean', 'sum' and 'none'")


def _logprobs(hidden, weight, targets, temperature, impl):
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    impl = choose_impl(impl, hidden)
    result = _rows("logprob_entropy", hidden, weight, None, None, targets.long(), float(temperature), impl)[0]
    return result[2], result[3]


def _row_losses(hidden, weight, targets, ignore_index, reduction, impl):
    """The losses, or their sum or mean; an ignored row has the hidden state 0 and looks up token 0."""
    kept = targets != ignore_index
    if weight is not None:  # 0 * nan is nan: an ignored row must not reach dW
        hidden = hidden.where(kept[:, None], 0.0)
    logprobs = _rows("logprob", hidden, weight, None, None, targets.where(kept, 0), 1.0, impl)[0][2]
    losses = (-logprobs).where(kept, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else _mean(losses.sum(), kept)


def _mean(total: Tensor, kept: Tensor) -> Tensor:
    """total over the rows kept; over no rows nan, with gradients of 0."""
    count = kept.sum()
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)


# --- The walk ------------------------------------------------------------------------------------


class Logits:
    """z = hidden @ weight.T [N, V] chunk by chunk, and from chunks of dz the gradients that are wanted.

    Without a weight, hidden is the logits. Those, and those that are kept, are one chunk.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor | None, want=(False, False), kept: Tensor | None = None
    ):
        self.hidden, self.weight, self.kept = hidden, weight, kept
        self.plan = PLANS.get(hidden.device.type, PLANS["cpu"])
        self.N, self.V = len(hidden), hidden.shape[1] if weight is None else len(weight)
        self.few = weight is not None and self.plan.kept >= self.N * self.V
        self.exact = accumulator(hidden.dtype)
        self.factor = hidden.dtype if self.plan.half else self.exact
        self.d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want[0] else None
        self.d_weight = None
        self.rooms: dict[torch.dtype, Tensor] = {}
        if weight is not None:
            self.h, self.W = hidden.to(self.factor), weight.to(hidden.dtype).to(self.factor)
            self.d_weight = torch.zeros_like(weight, dtype=self.exact) if want[1] else None

    def chunks(self, keep: bool = True) -> Iterator[slice]:
        size = max(1, self.N)
        if self.weight is not None and not (keep and self.few):
            size = max(self.plan.chunk // self.V // self.plan.rows, 1) * self.plan.rows
        return (slice(i, i + size) for i in range(0, max(1, self.N), size))

    def room(self, N: int, dtype: torch.dtype) -> Tensor:
        """[N, V] whose rows begin at multiples of `align`; the next chunk gets the same memory."""
        if dtype not in self.rooms:
            stride = (self.V + self.plan.align - 1) // self.plan.align * self.plan.align
            self.rooms[dtype] = self.hidden.new_empty((N, stride), dtype=dtype)[:, : self.V]
        return self.rooms[dtype][:N]

    def __getitem__(self, rows: slice) -> Tensor:
        """A chunk's z in float32 (or float64); in their own dtype if the logits were given."""
        if self.weight is None:
            return self.hidden[rows]
        if self.kept is not None:
            return self.kept[rows]
        h = self.h[rows]
        return _product(h, self.W.T, self.room(len(h), self.exact))

    def gradient(self, rows: slice, z: Tensor) -> Tensor | None:
        """Where a chunk's dz goes: into the result, over its z if that was made for it, or into new room."""
        if self.weight is None:
            return None if self.d_hidden is None else self.d_hidden[rows]
        if self.d_hidden is None and self.d_weight is None:
            return None
        return z if self.kept is None and self.factor == z.dtype else self.room(len(z), self.factor)

    def add(self, rows: slice, dz: Tensor | None) -> None:
        """One chunk's share of both gradients."""
        if dz is None or self.weight is None:
            return
        if self.d_hidden is not None:
            _product(dz, self.W, self.d_hidden[rows])
        if self.d_weight is not None:
            _product(dz.T, self.h[rows], self.d_weight, accumulate=True)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(d hidden, d weight, not yet in its dtype); an empty tensor for what was not wanted."""
        d_hidden, d_weight = (
            self.hidden.new_empty(0) if x is None else x for x in (self.d_hidden, self.d_weight)
        )
        return d_hidden, d_weight


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
def _products(*hidden: Tensor) -> Iterator[None]:
    """Products as they stand: without autocast, and for bfloat16 on a CPU with factors rounded to it.

    h and W are so rounded already. A CPU's units for bfloat16 take several times less for the product, and
    still give it in float32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with torch.autocast(hidden[0].device.type, enabled=False):
        try:
            if all(not h.is_cuda and h.dtype == torch.bfloat16 for h in hidden):
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
    operation: str, p: Tensor, p_weight: Tensor | None, q: Tensor | None, q_weight: Tensor | None,
    targets: Tensor | None, temperature: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(What the operation of `rows_torch.py` says of each row, the logits of p and of q where they are kept).

    p and q are logits, or hidden states if they have a weight.
    """
    sides = _sides(p, p_weight, q, q_weight)
    if targets is not None:
        check_targets(targets, sides[0].V)
    with _products(*(side.hidden for side in sides)):
        results = []
        for i in sides[0].chunks():
            z = [side[i] for side in sides]
            results.append(_function(impl, operation)(*z, *_options(operation, targets, temperature, i)))
    kept = [chunk if side.few else p.new_empty(0) for side, chunk in zip(sides, z, strict=True)]
    return torch.cat(results, 1), kept[0], kept[1] if q is not None else p.new_empty(0)


@_rows.register_fake
def _(operation, p, p_weight, q, q_weight, targets, temperature, impl):
    sides = _sides(p, p_weight, q, q_weight)
    dtype = accumulator(torch.promote_types(p.dtype, sides[-1].hidden.dtype))
    kept = [side.room(side.N, side.exact) if side.few else p.new_empty(0) for side in sides]
    result = p.new_empty((import_module("kernels.rows_torch").RESULTS[operation], len(p)), dtype=dtype)
    return result, kept[0], kept[1] if q is not None else p.new_empty(0)


@torch.library.custom_op("minillm::rows_backward", mutates_args=())
def _rows_backward(
    operation: str, p: Tensor, p_weight: Tensor | None, q: Tensor | None, q_weight: Tensor | None,
    targets: Tensor | None, temperature: float, impl: str,
    result: Tensor, p_kept: Tensor, q_kept: Tensor, d_result: Tensor, want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of p, p_weight, q and q_weight; an empty tensor for one that is not wanted."""
    sides = _sides(p, p_weight, q, q_weight, want, (p_kept, q_kept))
    with _products(*(side.hidden for side in sides)):
        for i in sides[0].chunks():
            z = [side[i] for side in sides]
            outs = [side.gradient(i, chunk) for side, chunk in zip(sides, z, strict=True)]
            options = _options(operation, targets, temperature, i)
            _function(impl, f"{operation}_backward")(*z, *options, result[:, i], d_result[:, i], *outs)
            for side, out in zip(sides, outs, strict=True):
                side.add(i, out)
    found = [x for side in sides for x in side.gradients()] + [
        p.new_empty(0) for _ in range(4 - 2 * len(sides))
    ]
    weights = (p_weight, q_weight)
    d_p, d_q = (x if w is None else x.to(w.dtype) for x, w in zip(found[1::2], weights, strict=True))
    return found[0], d_p, found[2], d_q


@_rows_backward.register_fake
def _(
    operation, p, p_weight, q, q_weight, targets, temperature, impl, result, p_kept, q_kept, d_result, want
):
    operands = zip((p, p_weight, q, q_weight), want, strict=True)
    return tuple(x.new_empty(x.shape) if wanted else p.new_empty(0) for x, wanted in operands)


def _sides(p, p_weight, q, q_weight, want=(False,) * 4, kept=()) -> list[Logits]:
    p_kept, q_kept = (x if x.numel() else None for x in kept) if kept else (None, None)
    sides = [Logits(p, p_weight, want[:2], p_kept)]
    return sides if q is None else [*sides, Logits(q, q_weight, want[2:], q_kept)]


def _function(impl: str, name: str):
    """Of `rows_torch` or `rows_triton`, which is imported only where it runs."""
    return getattr(import_module(f"kernels.rows_{impl}"), name)


def _options(operation: str, targets: Tensor | None, temperature: float, rows: slice) -> tuple:
    return () if targets is None else (targets[rows], temperature)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no tensors of zeros for the outputs that nobody differentiates
    ctx.operation, *tensors, ctx.temperature, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, d_result, *_):
    if d_result is None:
        return (None,) * 8
    *operands, targets, result, p_kept, q_kept = ctx.saved_tensors
    want = list(ctx.needs_input_grad[1:5])
    options = targets, ctx.temperature, ctx.impl, result, p_kept, q_kept, d_result, want
    found = _rows_backward(ctx.operation, *operands, *options)
    return None, *(d if wanted else None for d, wanted in zip(found, want, strict=True)), None, None, None


_rows.register_autograd(_gradients, setup_context=_save)


# --- The sum of a cross-entropy, with its gradient at once -----------------------------------------


@torch.library.custom_op("minillm::summed_cross_entropy", mutates_args=())
def _summed(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    want_hidden: bool, want_weight: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(sum of losses [], its d hidden [N, D], its d weight [V, D], which overflows no half type before the
    upstream gradient scales it); what is not wanted is empty."""
    kept, want = targets != ignore_index, (want_hidden, want_weight)
    check_targets(targets.where(kept, 0), len(weight))
    if not PLANS.get(hidden.device.type, PLANS["cpu"]).skip:
        # 0 * nan is nan: an ignored row must not reach dW.
        return _run(hidden.where(kept[:, None], 0.0), weight, targets.where(kept, 0), kept, want, impl)
    if kept.all():
        return _run(hidden, weight, targets, None, want, impl)
    rows = kept.nonzero().squeeze(1)
    total, d_hidden, d_weight = _run(hidden[rows], weight, targets[rows], None, want, impl)
    if want_hidden:
        d_hidden = d_hidden.new_zeros(hidden.shape).index_copy_(0, rows, d_hidden)
    return total, d_hidden, d_weight


def _run(hidden, weight, targets, kept, want, impl):
    """With logits z = h W^T and p = softmax(z):  dz = p - onehot(target),  0 in rows that are not kept."""
    logits = Logits(hidden, weight, want)
    total = hidden.new_zeros((), dtype=logits.exact)
    with _products(hidden):
        for i in logits.chunks(keep=False):
            z = logits[i]
            share = None if kept is None else kept[i].to(total.dtype)
            out = logits.gradient(i, z)
            losses, dz = _function(impl, "loss_and_gradient")(z, targets[i], share, out)
            logits.add(i, dz)
            total += losses.sum() if kept is None else losses.where(kept[i], 0.0).sum()
    return total, *logits.gradients()


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
