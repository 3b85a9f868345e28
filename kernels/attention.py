"""Interval attention: query t sees the keys from start[t] up to, not including, end[t].

One law covers every pattern in use (T queries, S keys, the last query level with the last key):

    causal                          no bounds
    bidirectional                   causal=False
    packed documents                start[b, t] = first position of t's document
    sliding window of w keys        start[b, t] = t + 1 - w
    right padding, bidirectional    end[b, t] = length of row b, causal=False
    one token over a KV cache       end[b, 0] = tokens in row b's cache so far

The law: query t sees key s when  start[b, t] <= s < end[b, t]  and, if causal,  s <= t + (S - T).
A bound not given does not bind. Causality only ever lowers `end`; a caller whose queries are not
the last T positions of the keys passes causal=False and says all in `end`. Bounds may lie outside
0..S. A query that sees no key gives zeros and passes zero gradients, never nan. What keys outside a
query's bounds hold never reaches it, be it nan or inf, as in memory of a cache not yet written.

PyTorch's version stands here, Triton's in attention_triton.py.

Left out: dropout, additive biases, returning the attention weights.
Method: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.2.1; grouped
queries: Ainslie et al. 2023, "GQA" (arXiv 2305.13245), section 2. `reference.py` has the algebra.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.dispatch import check

# Where gradients are wanted, half types on a CPU are computed in float32 up to this many scores a head: the
# backward pass of torch's fused kernel for them is up to ten times slower there, and nowhere more exact.
FLOAT32_SCORES = 1 << 17


def attention(
    q: Float[Tensor, "B H T C"], k: Float[Tensor, "B K S C"], v: Float[Tensor, "B K S C"],
    start: Int[Tensor, "B T"] | None = None, end: Int[Tensor, "B T"] | None = None,
    causal: bool = True, scale: float | None = None, impl: str | None = None,
) -> Float[Tensor, "B H T C"]:  # fmt: skip
    """softmax(scale * q k^T over the visible keys) v, for T queries over S keys.

    H is a multiple of K: consecutive groups of H / K query heads share a key/value head. `start`
    and `end` are positions in 0..S (int32); `scale` is 1 / sqrt(C) unless given. `impl` is "triton",
    "torch", or None for Triton on a GPU. Autocast changes nothing. ValueError for shapes that do not fit, H
    not a multiple of K, mixed dtypes, an unknown `impl`, and, in Triton, C > 256.
    """
    operands = {"q": (q, "B H T C"), "k": (k, "B K S C"), "v": (v, "B K S C")}
    impl = check(operands, {"start": (start, "B T"), "end": (end, "B T")}, impl)
    (_, H, T, C), (K, S) = q.shape, k.shape[1:3]
    if K == 0 or H % K:
        raise ValueError(f"{H} query heads do not share {K} key heads evenly")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v share no dtype: {q.dtype}, {k.dtype} and {v.dtype}")
    scale = C**-0.5 if scale is None else scale
    if scale <= 0:  # the fast versions compare scores before they are scaled
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if T == 1:  # a single query is the last one: nothing lies ahead of it
        causal = False
    if impl == "triton":  # imported here, because where the kernels never run Triton may be missing
        from kernels.attention_triton import MAX_WIDTH, attention_op

        if C > MAX_WIDTH:
            raise ValueError(f"heads are {C} wide, Triton's take up to {MAX_WIDTH}: use impl='torch'")
        return attention_op(q, k, v, start, end, causal, scale)[0]
    cpu, dtype, visible = q.device.type == "cpu", q.dtype, None
    eager = cpu and not torch.compiler.is_compiling()  # a result can be looked at without waiting for it
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if cpu and grad and dtype.itemsize == 2 and T * S <= FLOAT32_SCORES:
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        if start is not None or end is not None or (causal and T != S):
            if not eager:
                return _with_nonfinite_keys(q, k, v, start, end, causal, scale).to(dtype)
            visible = _visible(q, S, start, end, causal)
        out = F.scaled_dot_product_attention(
            q, k, v, visible, is_causal=causal and visible is None, scale=scale, enable_gqa=bool(H != K)
        )
        if eager:
            # Sums cost nothing beside the rest. Only what is not finite needs care; a masked key that is not
            # does not show in `out`, but would reach dq.
            sums = [x.detach().sum(dtype=torch.float32) for x in ((out, k) if grad else (out,))]
            if not torch.stack(sums).sum().isfinite():
                out = _with_nonfinite_keys(q, k, v, start, end, causal, scale)
    return out.to(dtype)


def _with_nonfinite_keys(q, k, v, start, end, causal, scale):
    """Keys that are not finite, which torch's attention lets reach queries that do not see them, count as 0,
    and the rows that see one are nan."""
    spoilt = ~(k.isfinite() & v.isfinite()).all(-1)  # [B, K, S]
    k, v = (x.masked_fill(spoilt[..., None], 0.0) for x in (k, v))
    visible, group = _visible(q, k.shape[2], start, end, causal), q.shape[1] // k.shape[1]
    hit = (visible & spoilt[:, :, None]).any(-1, keepdim=True).repeat_interleave(group, 1)
    empty = ~visible.any(-1, keepdim=True)  # these look at every key, and the answer is dropped
    out = F.scaled_dot_product_attention(q, k, v, visible | empty, scale=scale, enable_gqa=bool(group != 1))
    return out.masked_fill(empty, 0.0).masked_fill(hit, torch.nan)


def _visible(q, S, start, end, causal) -> Bool[Tensor, "#B 1 T {S}"]:
    """Which keys each query sees: every bound that is given must hold."""
    T, key = q.shape[2], torch.arange(S, dtype=torch.int32, device=q.device)
    seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(S - T)
    if start is not None:
        seen = seen & (key >= start[:, None, :, None])
    return seen if end is None else seen & (key < end[:, None, :, None])
