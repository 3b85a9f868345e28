"""The kernels in NumPy float64, forward and backward: read this first.

Every fast version in this folder computes what a function here computes, and the tests hold it to
that. Clarity comes before speed: whole matrices, no tricks but the subtraction of the maximum inside
the softmax. Two functions, `..._over_blocks`, show how the fast versions do without whole rows.
A backward pass takes the upstream gradient `d_out` (the derivative of some final scalar with respect
to the output) and returns the derivative with respect to each operand; its docstring derives it.
Left out: dropout, label smoothing, second derivatives.

Method: the chain rule on matrix products and softmaxes; Vaswani et al. 2017 (arXiv 1706.03762),
section 3.2.1, for attention; Goodfellow, Bengio and Courville 2016, "Deep Learning", section
6.2.2.3, for the softmax and its loss.

Two facts carry everything below.

1. A product. If  y = a b^T  then  da = dy b  and  db = dy^T a.
2. A softmax. If  p = softmax(z)  then  dp_i / dz_j = p_i (1[i = j] - p_j), and therefore
   dz_j = sum_i dp_i p_i (1[i = j] - p_j) = p_j (dp_j - sum_i p_i dp_i).

Shape letters: B batch, T queries, S keys, H query heads, K key/value heads, C head width,
N rows, D model width, V vocabulary.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy import ndarray

Queries = Float64[ndarray, "B H T C"]
Keys = Float64[ndarray, "B K S C"]
Bounds = Int[ndarray, "B T"] | None
Logits = Float64[ndarray, "N V"]
Targets = Int[ndarray, " N"]
PerRow = Float64[ndarray, " N"]


def softmax(z: Float64[ndarray, "..."]) -> Float64[ndarray, "..."]:
    """exp(z) / sum exp(z) over the last axis; a row of nothing but -inf gives zeros."""
    top = z.max(axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(z - np.where(np.isfinite(top), top, 0.0))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0.0, 1.0, total)


# --- Attention -----------------------------------------------------------------------------------


def visible_keys(
    B: int, T: int, S: int, start: Bounds = None, end: Bounds = None, causal: bool = True
) -> Bool[ndarray, "B T S"]:
    """True where query t of row b sees key s: start <= s < end and, if causal, s <= t + S - T."""
    seen = np.ones((B, T, S), dtype=bool)
    for b, t, s in np.ndindex(B, T, S):
        after_start = start is None or s >= start[b, t]
        before_end = end is None or s < end[b, t]
        seen[b, t, s] = after_start and before_end and (not causal or s <= t + S - T)
    return seen


def attention_weights(q, k, start=None, end=None, causal=True, scale=None):
    """p [B, H, T, S] = softmax over the visible keys of z = scale * q k^T; 0 where not visible."""
    B, H, T, C = q.shape
    k = repeat_heads(k, H)
    z = (C**-0.5 if scale is None else scale) * np.einsum("bhtc,bhsc->bhts", q, k)
    seen = visible_keys(B, T, k.shape[2], start, end, causal)[:, None]
    return softmax(np.where(seen, z, -np.inf))


def attention(
    q: Queries, k: Keys, v: Keys, start: Bounds = None, end: Bounds = None,
    causal: bool = True, scale: float | None = None,
) -> Queries:  # fmt: skip
    """out = p v, the mean of the visible values weighted by p; zeros where no key is visible."""
    p = attention_weights(q, k, start, end, causal, scale)
    return np.einsum("bhts,bhsc->bhtc", p, repeat_heads(v, q.shape[1]))


def attention_over_blocks(
    q: Float64[ndarray, "T C"], k: Float64[ndarray, "T C"], v: Float64[ndarray, "T C"], BLOCK_N: int
) -> Float64[ndarray, "T C"]:
    """Causal attention of one head that holds one block of scores at a time: the idea of every fast version.

    A softmax must know its row's maximum and sum before it can weigh a value. Both can be running
    quantities, m and total, if what has been summed so far is rescaled whenever the maximum grows:

        m' = max(m, max z)    p = exp(z - m')    fade = exp(m - m')
        total' = fade total + sum p    acc' = fade acc + p v    and in the end  out = acc / total
    """
    T, C = q.shape
    m, total, acc = np.full((T, 1), -np.inf), np.zeros((T, 1)), np.zeros((T, C))
    for first in range(0, T, BLOCK_N):
        keys = np.arange(first, min(first + BLOCK_N, T))
        z = C**-0.5 * q @ k[keys].T
        z = np.where(keys <= np.arange(T)[:, None], z, -np.inf)
        top = np.maximum(m, z.max(axis=1, keepdims=True))
        p, fade = np.exp(z - top), np.exp(m - top)
        total = fade * total + p.sum(axis=1, keepdims=True)
        acc = fade * acc + p @ v[keys]
        m = top
    return acc / total


def attention_backward(
    d_out: Queries, q: Queries, k: Keys, v: Keys, start: Bounds = None, end: Bounds = None,
    causal: bool = True, scale: float | None = None,
) -> tuple[Queries, Keys, Keys]:  # fmt: skip
    """(dq, dk, dv) for one head, with z = scale * q k^T, p = softmax(z), out = p v:

        dv = p^T d_out                    product
        dp = d_out v^T                    product
        dz = p * (dp - sum_s p * dp)      softmax; the sum over keys is one number a query, and
                                          equals sum_c d_out * out, which is how fast kernels get it
        dq = scale * dz k                 product
        dk = scale * dz^T q               product

    Invisible keys have p = 0, hence dz = 0: nothing flows through them, and a query that sees no
    key passes nothing at all. A key head shared by several query heads sums what they send it.
    """
    H, K = q.shape[1], k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    p = attention_weights(q, k, start, end, causal, scale)
    dv = np.einsum("bhts,bhtc->bhsc", p, d_out)
    dp = np.einsum("bhtc,bhsc->bhts", d_out, repeat_heads(v, H))
    dz = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dq = scale * np.einsum("bhts,bhsc->bhtc", dz, repeat_heads(k, H))
    dk = scale * np.einsum("bhts,bhtc->bhsc", dz, q)
    return dq, sum_heads(dk, K), sum_heads(dv, K)


def repeat_heads(x: Float64[ndarray, "B K S C"], H: int) -> Float64[ndarray, "B H S C"]:
    """Each key/value head once for every query head of its group: a a b b for H = 4, K = 2."""
    return np.repeat(x, H // x.shape[1], axis=1)


def sum_heads(dx: Float64[ndarray, "B H S C"], K: int) -> Float64[ndarray, "B K S C"]:
    """The gradient of `repeat_heads`: what was copied out is summed back."""
    B, H, S, C = dx.shape
    return dx.reshape(B, K, H // K, S, C).sum(axis=2)


# --- Cross-entropy -------------------------------------------------------------------------------


def row_losses(logits: Logits, targets: Targets, ignore_index: int | None = -100) -> PerRow:
    """-log softmax(z)[target] = max z + log sum exp(z - max z) - z[target]; 0 for ignored rows."""
    losses = np.zeros(len(logits))
    for n, (z, target) in enumerate(zip(logits, targets, strict=True)):
        if target != ignore_index:
            losses[n] = z.max() + np.log(np.exp(z - z.max()).sum()) - z[target]
    return losses


def cross_entropy(
    logits: Logits, targets: Targets, ignore_index: int = -100, reduction: str = "mean"
) -> Float64[ndarray, "*rows"]:
    """The rows' losses in nats ("none"), their sum, or their mean over the rows not ignored."""
    losses, count = row_losses(logits, targets, ignore_index), (targets != ignore_index).sum()
    mean = losses.sum() / count if count else np.nan
    return np.asarray({"none": losses, "sum": losses.sum(), "mean": mean}[reduction])


def cross_entropy_backward(
    d_out: Float64[ndarray, "*rows"], logits: Logits, targets: Targets,
    ignore_index: int = -100, reduction: str = "mean",
) -> Logits:  # fmt: skip
    """d logits. With loss = log sum exp(z) - z[target], p = softmax(z), u the row's share of d_out:

        d log sum exp(z) / dz = p,   so   dz = u (p - onehot(target))

    which sums to zero: the loss does not change when all logits of a row move together. u is
    d_out[n] for "none", d_out for "sum", d_out over the count of rows for "mean", and 0 for an
    ignored row.
    """
    kept = targets != ignore_index
    u = np.broadcast_to(d_out, targets.shape) * kept
    if reduction == "mean":
        u = u / max(kept.sum(), 1)
    d_logits = softmax(logits)
    d_logits[kept, targets[kept]] -= 1.0
    return np.where(kept[:, None], u[:, None] * d_logits, 0.0)


def row_losses_over_blocks(logits: Logits, targets: Targets, BLOCK: int) -> PerRow:
    """`row_losses` that reads each row once, block by block, as the fast versions do.

    It keeps the maximum m so far and s = sum exp(z - m); a larger maximum rescales s.
    """
    rows = np.arange(len(logits))
    m, s = np.full(len(logits), -np.inf), np.zeros(len(logits))
    for first in range(0, logits.shape[1], BLOCK):
        z = logits[:, first : first + BLOCK]
        top = np.maximum(m, z.max(axis=1))
        s = s * np.exp(m - top) + np.exp(z - top[:, None]).sum(axis=1)
        m = top
    return m + np.log(s) - logits[rows, targets]


# --- Log-probability, entropy and KL -------------------------------------------------------------


def token_logprobs(logits: Logits, targets: Targets, temperature: float = 1.0) -> tuple[PerRow, PerRow]:
    """(log p[target], H) with p = softmax(z / temperature) and H = -sum p log p, where 0 log 0 is 0."""
    p = softmax(logits / temperature)
    return -row_losses(logits / temperature, targets, ignore_index=None), -xlogy(p, p).sum(axis=1)


def token_logprobs_backward(
    d_logprob: PerRow, d_entropy: PerRow, logits: Logits, targets: Targets, temperature: float = 1.0
) -> Logits:
    """d logits. With y = z / temperature and p = softmax(y):

        d log p[target] / dy = onehot(target) - p       cross-entropy with the sign turned
        dH / dp = -(log p + 1),   so by the softmax rule
        dH / dy = -p (log p + 1 - sum p (log p + 1)) = -p (log p + H)
        dz = dy / temperature

    Both sum to zero: neither changes when all logits of a row move together.
    """
    p = softmax(logits / temperature)
    H = -xlogy(p, p).sum(axis=1, keepdims=True)
    d_y = -d_logprob[:, None] * p - d_entropy[:, None] * (xlogy(p, p) + p * H)
    d_y[np.arange(len(targets)), targets] += d_logprob
    return d_y / temperature


def kl(p_logits: Logits, q_logits: Logits) -> PerRow:
    """KL(p || q) = sum p (log p - log q): 0 where p is 0 whatever q is, inf where only q is 0."""
    p, q = softmax(p_logits), softmax(q_logits)
    return (xlogy(p, p) - xlogy(p, q)).sum(axis=1)


def kl_backward(d_kl: PerRow, p_logits: Logits, q_logits: Logits) -> tuple[Logits, Logits]:
    """(d p_logits, d q_logits), by the softmax rule for either side:

        dKL / dp = log p - log q + 1,   so   dKL / dz_p = p (log p - log q - KL)
        dKL / dq = -p / q,              so   dKL / dz_q = q (-p / q + sum p) = q - p

    Both sum to zero along a row.
    """
    p, q = softmax(p_logits), softmax(q_logits)
    d_p = xlogy(p, p) - xlogy(p, q) - p * kl(p_logits, q_logits)[:, None]
    return d_kl[:, None] * d_p, d_kl[:, None] * (q - p)


# --- Logits that a product makes -------------------------------------------------------------------


def linear_backward(
    dz: Logits, hidden: Float64[ndarray, "N D"], weight: Float64[ndarray, "V D"]
) -> tuple[Float64[ndarray, "N D"], Float64[ndarray, "V D"]]:
    """(d hidden, d weight) of the logits z = h W^T:  dh = dz W  and  dW = dz^T h.

    `linear_cross_entropy`, `linear_token_logprobs` and `linear_kl` are the functions above on such logits.
    """
    return dz @ weight, dz.T @ hidden


def xlogy(x: Float64[ndarray, "*n"], y: Float64[ndarray, "*n"]) -> Float64[ndarray, "*n"]:
    """x log y, and 0 where x is 0."""
    with np.errstate(divide="ignore"):
        return np.where(x == 0.0, 0.0, x * np.log(np.where(x == 0.0, 1.0, y)))
