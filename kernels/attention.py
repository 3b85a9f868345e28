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
0..S. A query that sees no key gives zeros and passes zero gradients, never nan.

PyTorch's version stands here, Triton's in attention_triton.py.

Left out: dropout, additive biases, returning the attention weights.
Method: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.2.1; grouped
queries: Ainslie et al. 2023, "GQA" (arXiv 2305.13245), section 2. `reference.py` has the algebra.
"""

from functools import reduce
from operator import and_

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.dispatch import choose_impl

# Half types on a CPU take plain matrix products up to this many scores a head (see `_plain`).
PLAIN_SCORES = 1 << 20


def attention(
    q: Float[Tensor, "B H T C"],
    k: Float[Tensor, "B K S C"],
    v: Float[Tensor, "B K S C"],
    start: Int[Tensor, "B T"] | None = None,
    end: Int[Tensor, "B T"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Tensor, "B H T C"]:
    """softmax(scale * q k^T over the visible keys) v, for T queries over S keys.

    H is a multiple of K: consecutive groups of H / K query heads share a key/value head. `start`
    and `end` are positions in 0..S (int32); `scale` is 1 / sqrt(C) unless given. `impl` is "triton",
    "torch", or None for the faster one. Under autocast the operands are cast to its dtype first.
    ValueError for H not a multiple of K, an unknown `impl`, and, in Triton, C > 256 or mixed dtypes.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not share {k.shape[1]} key heads evenly")
    attend = _triton if choose_impl(impl, q) == "triton" else _torch
    device, scale = q.device.type, q.shape[3] ** -0.5 if scale is None else scale
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        with torch.autocast(device, enabled=False):
            return attend(q, k, v, start, end, causal, scale)
    return attend(q, k, v, start, end, causal, scale)


def _triton(q, k, v, start, end, causal, scale):
    from kernels import attention_triton  # here, because where the kernels never run Triton may be missing

    return attention_triton.attention(q, k, v, start, end, causal, scale)


def _torch(q, k, v, start, end, causal, scale):
    T, S = q.shape[2], k.shape[2]
    causal = causal and T > 1  # a single query is the last one: nothing lies ahead of it
    half_on_cpu = q.device.type == "cpu" and q.dtype.itemsize == 2
    if half_on_cpu and T * S <= PLAIN_SCORES:
        return _patched(_plain, q, k, v, _visible(q, S, start, end, causal), scale)
    if start is None and end is None and (not causal or T == S):
        return _sdpa(q, k, v, None, scale, is_causal=causal)
    visible = _visible(q, S, start, end, causal)
    if q.device.type == "cpu":  # its fused kernel already gives zeros for rows without keys
        return _sdpa(q, k, v, visible, scale)
    return _patched(_sdpa, q, k, v, visible, scale)


def _visible(q, S, start, end, causal) -> Bool[Tensor, "#B 1 T {S}"]:
    """Which keys each query sees: every bound that is given must hold."""
    T, key = q.shape[2], torch.arange(S, dtype=torch.int32, device=q.device)
    bounds = []
    if start is not None:
        bounds.append(key >= start[:, None, :, None])
    if end is not None:
        bounds.append(key < end[:, None, :, None])
    if causal or not bounds:
        every = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device)
        bounds.append(every.tril(S - T) if causal else every)
    return reduce(and_, bounds)


def _sdpa(q, k, v, visible, scale, is_causal=False):
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _plain(q, k, v, visible, scale):
    """Two batched products around a softmax, [T, S] scores and all.

    On a CPU in bfloat16 this beats torch's fused kernel by far while the scores are small: forward
    and backward on one core, 4 heads of 32: 3.5x at 16 x 64 tokens, 1.1x to 1.5x at 8 x 256.
    """
    B, H, T, C = q.shape
    K, S = k.shape[1:3]
    rows = H // K * T
    # A group's queries stand under one another, so that no key head is ever repeated.
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
    mask = mask[:, :, None].expand(B, K, H // K, T, S).reshape(B * K, rows, S)
    q, k, v = q.reshape(B * K, rows, C), k.reshape(B * K, S, C), v.reshape(B * K, S, C)
    p = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)
    return torch.bmm(p, v).view(B, H, T, C)


def _patched(f, q, k, v, visible, scale):
    """f with rows that see no key made zero: they look at every key, and the answer is dropped."""
    empty = ~visible.any(-1, keepdim=True)
    return f(q, k, v, visible | empty, scale).masked_fill(empty, 0.0)
