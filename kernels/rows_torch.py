"""Log-probability, entropy and KL of rows of logits in PyTorch: the functions that a CPU runs.

Each takes logits z [N, V] and works through them in parts that fit into a core's cache, where a pass
over them costs a fraction of one over memory. The algebra stands in `reference.py`. Throughout

    y = z / temperature,    p = softmax(y),    u = y - max y,    log p = u - log S,    S = sum e^u

and what a backward pass needs again of a row is `stats`, its max y and log S. They are kept apart, for
their sum would round: behind logits of size 10^4 float32 knows it to 10^-3 only. As the largest p is
1 / S, no sum of exponentials is needed beside the softmax. What is chosen over what is measured: on one
core torch's softmax takes less time than its exp, and `masked_fill` more than twice that.

`rows_triton.py` has the same five functions for GPUs. Gradients are written to `out`, which has z's type
and may be z itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED_LOGITS = 1 << 19  # 2 MB in float32
# Stands in for a lower u: its p is 0 even in float64, and so is p log p, but 0 * -inf would be nan.
LOWEST = -1e4


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of softmaxes and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def logprob(z: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log p[target] [N], entropy [N] or, unless asked for, [0], stats [2, N])."""
    N, dtype = len(z), accumulator(z.dtype)
    logprobs, stats = z.new_empty(N, dtype=dtype), z.new_empty(2, N, dtype=dtype)
    entropies = z.new_empty(N if entropy else 0, dtype=dtype)
    for rows in _parts(z):
        y = _scaled(z[rows], dtype, temperature)
        p = y.softmax(1)
        top, log_sum = y.amax(1), -p.amax(1).log()
        stats[0, rows], stats[1, rows] = top, log_sum
        logprobs[rows] = y.gather(1, targets[rows, None].long())[:, 0] - top - log_sum
        if entropy:  # -sum p log p = log S - sum p u
            entropies[rows] = log_sum - _lowered(y, top).mul_(p).sum(1)
    return logprobs, entropies, stats


def logprob_backward(
    z: Tensor,
    targets: Tensor,
    stats: Tensor,
    entropy: Tensor | None,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """out = dz = (d_logprob (onehot(target) - p) - d_entropy p (log p + H)) / temperature."""
    for rows in _parts(z):
        y = _scaled(z[rows], stats.dtype, temperature)
        g = (d_logprob[rows, None] / temperature).to(y.dtype)
        p = y.softmax(1)
        if entropy is None or d_entropy is None:
            dz = p.mul_(-g)
        else:
            top, log_sum = stats[:, rows]
            h = (d_entropy[rows, None] / temperature).to(y.dtype)
            rest = g + h * (entropy[rows] - log_sum)[:, None]
            dz = _lowered(y, top).mul_(-h).sub_(rest).mul_(p)
        out[rows] = dz.scatter_add_(1, targets[rows, None].long(), g)


def loss_and_gradient(z: Tensor, targets: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """(-log p[target] [N], its dz = share (p - onehot(target))), where no share is 1. Uses z up."""
    target, y = targets[:, None].long(), z.to(accumulator(z.dtype))
    p = y.softmax(1)
    losses = y.amax(1) - y.gather(1, target)[:, 0] - p.amax(1).log()
    dz = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
    return losses, (dz if share is None else dz.mul_(share[:, None])).to(z.dtype)


def kl(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q) [N], stats [4, N]: those of p, then those of q)."""
    N, dtype = len(z_p), accumulator(torch.promote_types(z_p.dtype, z_q.dtype))
    divergence, stats = z_p.new_empty(N, dtype=dtype), z_p.new_empty(4, N, dtype=dtype)
    for rows in _parts(z_p):
        y_p, y_q = z_p[rows].to(dtype), z_q[rows].to(dtype)
        p = y_p.softmax(1)
        part = y_p.amax(1), -p.amax(1).log(), y_q.amax(1), -y_q.softmax(1).amax(1).log()
        stats[:, rows] = torch.stack(part)
        # Only p = 0 makes a nan, with q = 0; a row that is nan throughout is so in log S too.
        divergence[rows] = _ratio(y_p, y_q, part).mul_(p).nansum(1) - part[1] + part[3]
    return divergence, stats


def kl_backward(
    z_p: Tensor,
    z_q: Tensor,
    stats: Tensor,
    divergence: Tensor,
    d_kl: Tensor,
    out_p: Tensor | None,
    out_q: Tensor | None,
) -> None:
    """out_p = d_kl p (log p - log q - KL) and out_q = d_kl (q - p); None for what is not wanted."""
    for rows in _parts(z_p):
        part, K = stats[:, rows], divergence[rows]
        y_p, y_q = z_p[rows].to(stats.dtype), z_q[rows].to(stats.dtype)
        g = d_kl[rows, None].to(stats.dtype)
        p = y_p.softmax(1)
        if out_q is not None:
            dz_q = y_q.softmax(1).sub_(p).mul_(g)
        if out_p is not None:
            dz_p = _ratio(y_p, y_q, part).sub_((part[1] - part[3] + K)[:, None]).mul_(p)
            dz_p.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # p = 0, as above
            out_p[rows] = dz_p.mul_(g + 0 * K[:, None])  # nan where KL is inf or nan
        if out_q is not None:
            out_q[rows] = dz_q


def _parts(z: Tensor) -> Iterator[slice]:
    """The rows in runs whose intermediate results stay in a core's cache; on a GPU all at once."""
    N, V = z.shape
    size = max(1, CACHED_LOGITS // V if z.device.type == "cpu" else N)
    return (slice(i, i + size) for i in range(0, N, size))


def _scaled(z: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    return z.to(dtype) if temperature == 1.0 else z.to(dtype) / temperature


def _lowered(y: Tensor, top: Tensor) -> Tensor:
    """u, but for the place of -inf: LOWEST."""
    return (y - top[:, None]).clamp_(min=LOWEST)


def _ratio(y_p: Tensor, y_q: Tensor, stats) -> Tensor:
    """u_p - u_q, which is log p - log q but for a constant of the row."""
    return (y_p - stats[0][:, None]).sub_(y_q - stats[2][:, None])
