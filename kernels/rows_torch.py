"""Operations on rows of logits in PyTorch: what a CPU runs. `losses.py` says what each computes.

Each takes a chunk of logits z [N, V], which on a CPU should fit into a core's cache: a pass over it then
costs a fraction of one over memory. The algebra stands in `reference.py`. Throughout

    y = z / temperature,    p = softmax(y),    u = y - max y,    log p = u - log S,    S = sum e^u

The result has a row of N numbers for everything that is said of the rows of z. It begins with what a
backward pass needs again, max y and log S, of either side for kl. They are kept apart, for their sum would
round: behind logits of size 10^4 float32 knows it to 10^-3 only. As the largest p is 1 / S, no sum of
exponentials is needed beside the softmax. Operations were chosen by measurement: on one core torch's softmax
takes less time than its exp, and `masked_fill` more than twice that.

`rows_triton.py` has the same functions for GPUs. Gradients are written to `out`, which may be z itself. A
row whose upstream gradients are 0 passes a gradient of 0, whatever is in it.
"""

import torch
from torch import Tensor

# Stands in for a lower u: its p is 0 even in float64, and so is p log p, but 0 * -inf would be nan.
LOWEST = -1e4


def logprob(z: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Tensor:
    """[max y, log S, log p[target]], and -sum p log p = log S - sum p u if the entropy is wanted."""
    y = _scaled(z, temperature)
    p = y.softmax(1)
    top, log_sum = y.amax(1), -p.amax(1).log()
    said = [top, log_sum, y.gather(1, targets[:, None])[:, 0] - top - log_sum]
    if entropy:
        u = (y - top[:, None]).clamp_(min=LOWEST)
        said.append(log_sum - u.mul_(p).sum(1))
    return torch.stack(said)


def logprob_backward(z, targets, temperature: float, result, d_result, out: Tensor) -> None:
    """out = dz = (d_logprob (onehot(target) - p) - d_entropy p (log p + H)) / temperature."""
    y, d_y = _scaled(z, temperature), d_result / temperature
    p, g = y.softmax(1), d_y[2][:, None]
    if len(result) == 3:
        dz = p.mul_(-g)
    else:
        top, log_sum, _, entropy = result
        g_entropy, u = d_y[3][:, None], (y - top[:, None]).clamp_(min=LOWEST)
        dz = u.mul_(-g_entropy).sub_(g + g_entropy * (entropy - log_sum)[:, None]).mul_(p)
    out.copy_(_quiet(dz.scatter_add_(1, targets[:, None], g), result[:2], d_result[2:]))


def loss_and_gradient(z, targets, kept: Tensor, out: Tensor | None) -> Tensor:
    """-log p[target] [N], and out = dz = p - onehot(target); 0 in rows that are not `kept`. May use z up."""
    target, top = targets[:, None], z.amax(1)
    z_target = z.gather(1, target)[:, 0]
    p = torch.softmax(z, 1, out=out if out is not None and out.dtype == z.dtype else None)
    losses = top - z_target - p.amax(1).log()
    if out is not None:
        p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
        if z.is_cuda or not kept.all():
            p.mul_(kept[:, None])
        if p is not out:
            out.copy_(p)
    return losses.where(kept, 0.0)


def kl(z_p: Tensor, z_q: Tensor) -> Tensor:
    """[max of y_p, log S_p, max of y_q, log S_q, KL(p || q)]."""
    exact = torch.promote_types(torch.promote_types(z_p.dtype, z_q.dtype), torch.float32)
    y_p, y_q = z_p.to(exact), z_q.to(exact)
    p = y_p.softmax(1)
    part = torch.stack((y_p.amax(1), -p.amax(1).log(), y_q.amax(1), -y_q.softmax(1).amax(1).log()))
    # Only p = 0 makes a nan, with q = 0; a row that is nan throughout is so in log S too.
    ratio = (y_p - part[0][:, None]).sub_(y_q - part[2][:, None])  # log p - log q but for the log S
    divergence = ratio.mul_(p).nansum(1) - part[1] + part[3]
    return torch.cat((part, divergence[None]))


def kl_backward(z_p, z_q, result, d_result, out_p: Tensor | None, out_q: Tensor | None) -> None:
    """out_p = d_kl p (log p - log q - KL) and out_q = d_kl (q - p); None for what is not wanted."""
    g, y_p, y_q = d_result[4][:, None], z_p.to(result.dtype), z_q.to(result.dtype)
    p, dz_p = y_p.softmax(1), (y_p - result[0][:, None]).sub_(y_q - result[2][:, None])
    if out_q is not None:  # which may be z_q: y_q is used up
        out_q.copy_(_quiet(y_q.softmax(1).sub_(p).mul_(g), result, g.T))
    if out_p is not None:
        dz_p.sub_((result[1] - result[3] + result[4])[:, None]).mul_(p)
        dz_p.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # p = 0, as above
        # nan where KL is inf or nan
        out_p.copy_(_quiet(dz_p.mul_(g + 0 * result[4][:, None]), result, g.T))


def _scaled(z: Tensor, temperature: float) -> Tensor:
    """y in the type of softmaxes and sums: float32, or float64 for float64."""
    y = z.to(torch.promote_types(z.dtype, torch.float32))
    return y if temperature == 1.0 else y / temperature


def _quiet(dz: Tensor, result: Tensor, upstream: Tensor) -> Tensor:
    """dz with zeros in rows that are not finite and that no upstream gradient [_, N] asks for."""
    dead = (upstream == 0).all(0) & ~result.isfinite().all(0)
    return dz.masked_fill_(dead[:, None], 0.0) if dz.is_cuda or dead.any() else dz
