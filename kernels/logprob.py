"""Log-probability of tokens, entropy and KL divergence of their distributions, each with its gradient.

What PPO, DPO and GRPO ask of a row of logits z, or of the hidden state that makes it, z = h W^T:

    token_logprobs    log p[target]  and  H = -sum p log p    of  p = softmax(z / temperature)
    kl                KL(p || q) = sum p (log p - log q)      of  p, q = softmax of either logits

All are exact sums over the whole vocabulary, in one pass over the logits. The `linear_` versions take
hidden states and the output matrix instead, and hold the [N, V] logits only where they are few: a chunk
of rows at a time is made, and made once more in the backward pass (`linear.py`).

A logit of -inf is a token that cannot be: p log p is 0 there, and so is p (log p - log q), whatever q is.
KL is inf where q cannot be but p can, and then its gradient is not a number.

Left out: second derivatives, KL estimates from samples (`k3` and its like), top-k and top-p.
Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5, for log-probabilities and KL in
PPO; Rafailov et al. 2023, "DPO" (arXiv 2305.18290), section 4; recomputed logits as in Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009), section 4.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.dispatch import choose_impl
from kernels.linear import Gradients, Logits, autocast, check_targets, multiplied, row_functions
from kernels.rows_torch import accumulator


def token_logprobs(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(log p[target], entropy of p) in nats, for p = softmax(logits / temperature).

    Both are float32, or float64 for float64 logits. IndexError for a target outside 0..V-1, on a GPU nan;
    ValueError for a temperature that is not positive or an unknown `impl`.
    """
    return _token_logprobs(logits, None, targets, temperature, True, impl)


def linear_token_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """`token_logprobs(hidden @ weight.T, targets, temperature)` that never holds many logits.

    The products run in hidden's dtype (under autocast, in autocast's), d weight is summed in float32, and
    each gradient comes back in its operand's dtype.
    """
    return _token_logprobs(*multiplied(autocast(hidden), weight), targets, temperature, True, impl)


def kl(
    p_logits: Float[Tensor, "N V"], q_logits: Float[Tensor, "N V"], impl: str | None = None
) -> Float[Tensor, " N"]:
    """KL(p || q) in nats, for p = softmax(p_logits) and q = softmax(q_logits).

    float32, or float64 if either is. ValueError for an unknown `impl`.
    """
    return _divergence(p_logits, None, q_logits, None, choose_impl(impl, p_logits))[0]


def linear_kl(
    p_hidden: Float[Tensor, "N P"],
    p_weight: Float[Tensor, "V P"],
    q_hidden: Float[Tensor, "N Q"],
    q_weight: Float[Tensor, "V Q"],
    impl: str | None = None,
) -> Float[Tensor, " N"]:
    """`kl(p_hidden @ p_weight.T, q_hidden @ q_weight.T)` that never holds many logits.

    The two models may differ in width. Dtypes as in `linear_token_logprobs`.
    """
    p, q = multiplied(autocast(p_hidden), p_weight), multiplied(autocast(q_hidden), q_weight)
    return _divergence(*p, *q, choose_impl(impl, p_hidden))[0]


# --- Log-probability and entropy -------------------------------------------------------------------


def row_logprobs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, impl: str | None
) -> Float[Tensor, " N"]:
    """log p[target] alone, of the logits `hidden` or, if there is a weight, of hidden @ weight.T."""
    return _token_logprobs(hidden, weight, targets, 1.0, False, impl)[0]


def _token_logprobs(hidden, weight, targets, temperature, entropy, impl):
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    impl = choose_impl(impl, hidden)
    return _logprobs(hidden, weight, targets, float(temperature), entropy, impl)[:2]


@torch.library.custom_op("minillm::logprobs", mutates_args=())
def _logprobs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, temperature: float, entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p[target] [N], entropy [N] if asked for, stats [2, N]); hidden is the logits without a weight."""
    logits, rows = Logits(hidden, weight), row_functions(impl)
    check_targets(targets, logits.vocabulary)
    parts = [rows.logprob(logits[i], targets[i], temperature, entropy) for i in logits.chunks()]
    logprobs, entropies, stats = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies), torch.cat(stats, 1)


@_logprobs.register_fake
def _(hidden, weight, targets, temperature, entropy, impl):
    N, dtype = len(hidden), accumulator(hidden.dtype)
    shapes = (N,), (N if entropy else 0,), (2, N)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("minillm::logprobs_backward", mutates_args=())
def _logprobs_backward(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    stats: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    want_hidden: bool,
    want_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(d hidden, d weight); an empty tensor for one that is not wanted."""
    logits, rows = Logits(hidden, weight), row_functions(impl)
    gradients = Gradients(logits, want_hidden, want_weight)
    for i in logits.chunks():
        z = logits[i]
        out = gradients.room(i, z)
        H, d_H = (None, None) if d_entropy is None else (entropy[i], d_entropy[i])
        rows.logprob_backward(z, targets[i], stats[:, i], H, d_logprob[i], d_H, temperature, out)
        gradients.add(i, out)
    return gradients.result()


@_logprobs_backward.register_fake
def _(hidden, weight, *rest):
    return _fake_gradients((hidden, weight), rest[-3:-1])


def _save_logprobs(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.entropy, ctx.impl = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _logprobs_gradients(ctx, d_logprob, d_entropy, _):
    hidden, weight, targets, entropy, stats = ctx.saved_tensors
    want = ctx.needs_input_grad[:2]
    d_entropy = d_entropy if ctx.entropy else None
    options = ctx.temperature, *want, ctx.impl
    gradients = _logprobs_backward(hidden, weight, targets, entropy, stats, d_logprob, d_entropy, *options)
    return *_wanted(gradients, want), None, None, None, None


_logprobs.register_autograd(_logprobs_gradients, setup_context=_save_logprobs)


# --- KL --------------------------------------------------------------------------------------------


@torch.library.custom_op("minillm::kl", mutates_args=())
def _divergence(
    p_hidden: Tensor, p_weight: Tensor | None, q_hidden: Tensor, q_weight: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """(KL(p || q) [N], stats [4, N]); a hidden without a weight is the logits."""
    p, q, rows = Logits(p_hidden, p_weight), Logits(q_hidden, q_weight), row_functions(impl)
    parts = [rows.kl(p[i], q[i]) for i in p.chunks()]
    divergence, stats = zip(*parts, strict=True)
    return torch.cat(divergence), torch.cat(stats, 1)


@_divergence.register_fake
def _(p_hidden, p_weight, q_hidden, q_weight, impl):
    N, dtype = len(p_hidden), accumulator(torch.promote_types(p_hidden.dtype, q_hidden.dtype))
    return p_hidden.new_empty(N, dtype=dtype), p_hidden.new_empty(4, N, dtype=dtype)


@torch.library.custom_op("minillm::kl_backward", mutates_args=())
def _divergence_backward(
    p_hidden: Tensor,
    p_weight: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor | None,
    divergence: Tensor,
    stats: Tensor,
    d_kl: Tensor,
    want: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first four, in their order; an empty tensor for one that is not wanted."""
    p, q, rows = Logits(p_hidden, p_weight), Logits(q_hidden, q_weight), row_functions(impl)
    p_gradients, q_gradients = Gradients(p, *want[:2]), Gradients(q, *want[2:])
    for i in p.chunks():
        z_p, z_q = p[i], q[i]
        out_p, out_q = p_gradients.room(i, z_p), q_gradients.room(i, z_q)
        rows.kl_backward(z_p, z_q, stats[:, i], divergence[i], d_kl[i], out_p, out_q)
        p_gradients.add(i, out_p)
        q_gradients.add(i, out_q)
    return *p_gradients.result(), *q_gradients.result()


@_divergence_backward.register_fake
def _(p_hidden, p_weight, q_hidden, q_weight, divergence, stats, d_kl, want, impl):
    return _fake_gradients((p_hidden, p_weight, q_hidden, q_weight), want)


def _save_divergence(ctx, inputs, output):
    *operands, ctx.impl = inputs
    ctx.save_for_backward(*operands, *output)


def _divergence_gradients(ctx, d_kl, _):
    want = list(ctx.needs_input_grad[:4])
    gradients = _divergence_backward(*ctx.saved_tensors, d_kl, want, ctx.impl)
    return *_wanted(gradients, want), None


_divergence.register_autograd(_divergence_gradients, setup_context=_save_divergence)


def _fake_gradients(operands, want):
    """Gradients as `Gradients.result` lays them out."""
    return tuple(
        x.new_empty(x.shape) if wanted else operands[0].new_empty(0)
        for x, wanted in zip(operands, want, strict=True)
    )


def _wanted(gradients, want):
    return (gradient if wanted else None for gradient, wanted in zip(gradients, want, strict=True))
