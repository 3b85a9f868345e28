"""Log-probability, entropy and KL of rows of logits in Triton: the functions of `rows_torch.py` for GPUs.

One program takes one row. There is little to compute, so a kernel is as fast as its loads:

    1. A row is read once. A thread loads pieces of 16 bytes, and for every place of a piece in the block
       keeps the maximum m so far and  s = sum e^(y - m);  a larger maximum rescales s. The places come
       together at the end of the row. Until then no thread waits for another, and as a place is no single
       logit but 4 or 8 of them, its sums take few registers and many threads can load at a time.
    2. Loads are 128 bits wide. Where V is no multiple of 8 (50,257 in GPT-2), rows begin between two
       16-byte borders. The walk then begins at the border before the row, and masks the strangers.
    3. Only a row's first and last block are masked, for masks that may change from lane to lane cut wide
       loads into single elements.

Sums are float32, or float64 for float64 logits. A target outside 0..V-1 reads nothing, and gives nan. A
row whose upstream gradients are 0 passes a gradient of 0 whatever is in it, unread.

Left out: columns with a stride (such logits are copied), several programs for one row.
Method: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv 1805.02867),
section 3. The algebra stands in `reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows_torch import accumulator

# One block of a row: 8 warps of 32 lanes, each with two loads of 16 bytes on the way.
LANES, LANE_BYTES, WARP = 256, 32, 32
# Where maxima start: finite, so that no difference of maxima is ever inf - inf. No float32 is lower.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


# --- The walk along a row --------------------------------------------------------------------------


@triton.jit
def _row(z, n, stride, SHIFTED: tl.constexpr, ALIGN: tl.constexpr):
    """The last 16-byte border up to the start of row n, and how many elements lie between the two."""
    row = z + n * stride
    shift = 0
    if SHIFTED:
        shift = ((row.to(tl.int64) % 16) // (z.dtype.element_ty.primitive_bitwidth // 8)).to(tl.int32)
    return tl.multiple_of(row - shift, ALIGN), shift


@triton.jit
def _blocks(shift, V, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Where blocks begin, as a range: those on a row's edge, which hold strangers too, or all others."""
    first = tl.minimum(shift, 1)  # the first block of a shifted row holds the end of the row before
    whole = (shift + V) // BLOCK
    if EDGE:
        return whole * (1 - first) * BLOCK, shift + V, tl.maximum(whole, 1) * BLOCK
    else:
        return first * BLOCK, whole * BLOCK, BLOCK


@triton.jit
def _load(block, column, V, EDGE: tl.constexpr, ACC: tl.constexpr):
    """The logits at these columns; -inf outside the row."""
    if EDGE:
        return tl.load(block, mask=(column >= 0) & (column < V), other=float("-inf")).to(ACC)
    else:
        return tl.load(block).to(ACC)


@triton.jit
def _store(block, column, V, value, EDGE: tl.constexpr):
    if EDGE:
        tl.store(block, value, mask=(column >= 0) & (column < V))
    else:
        tl.store(block, value)


@triton.jit
def _at(row, column, V, ACC: tl.constexpr):
    """One logit; nan outside the row."""
    return tl.load(row + column, mask=(column >= 0) & (column < V), other=float("nan")).to(ACC)


# --- Log-probability and entropy -------------------------------------------------------------------


@triton.jit
def logprob_kernel(
    z,
    targets,
    logprob,
    entropy,
    stats,
    stride,
    V,
    scale,
    ENTROPY: tl.constexpr,
    SHIFTED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With  y = scale z,  m = max y,  s = sum e^(y - m),  a = sum e^(y - m) (y - m):

    log p[target] = y[target] - m - log s,    H = -sum p (y - m - log s) = log s - a / s
    """
    ACC: tl.constexpr = logprob.dtype.element_ty
    PIECE: tl.constexpr = 128 // z.dtype.element_ty.primitive_bitwidth
    n = tl.program_id(0).to(tl.int64)
    row, shift = _row(z, n, stride, SHIFTED, ALIGN)
    offset = _pieces(BLOCK, PIECE)
    m = tl.full([BLOCK // PIECE], LOWEST, ACC)
    s = tl.zeros([BLOCK // PIECE], ACC)
    a = tl.zeros([BLOCK // PIECE], ACC)
    for EDGE in tl.static_range(1, -1, -1):
        begin, end, step = _blocks(shift, V, BLOCK, EDGE)
        for start in range(begin, end, step):
            y = _load(row + start + offset, start + offset - shift, V, EDGE, ACC) * scale
            new, keep, u, e = _step(m, y)
            if ENTROPY:
                a = _moved(a, s, keep, m - new) + tl.sum(tl.where(e > 0, e * u, 0.0), 1)
            s = s * keep + tl.sum(e, 1)
            m = new
    top = tl.max(m, 0)
    weight = tl.exp(m - top)
    total = tl.sum(weight * s, 0)
    log_sum = tl.log(total)
    target = tl.load(targets + n)
    at_target = _at(row + shift, target, V, ACC) * scale
    tl.store(logprob + n, at_target - top - log_sum)
    tl.store(stats + n, top)
    tl.store(stats + tl.num_programs(0) + n, log_sum)
    if ENTROPY:
        a = tl.sum(_moved(a, s, weight, m - top), 0)
        tl.store(entropy + n, log_sum - a / total)


@triton.jit
def _pieces(BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """0..BLOCK-1 as [BLOCK / PIECE, PIECE]: a piece is one load of one thread, which can sum it alone."""
    return tl.arange(0, BLOCK // PIECE)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]


@triton.jit
def _step(m, y):
    """One block more: the new maxima, e^(m - new), and for its logits  u = y - new  and e^u."""
    new = tl.maximum(m, tl.max(y, 1))
    u = y - new[:, None]
    return new, tl.exp(m - new), u, tl.exp(u)


@triton.jit
def _moved(a, s, keep, shift):
    """sum e^u f  after every u has lost log(1 / keep) and every f has gained `shift`, where s = sum e^u.

    Terms that vanish take even an infinite f with them.
    """
    return tl.where((keep > 0) & (s > 0), keep * (a + shift * s), 0.0)


@triton.jit
def logprob_backward_kernel(
    z,
    targets,
    stats,
    entropy,
    d_logprob,
    d_entropy,
    out,
    stride,
    out_stride,
    V,
    scale,
    ENTROPY: tl.constexpr,
    SHIFTED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz = scale (d_logprob (onehot(target) - p) - d_entropy p (log p + H))"""
    ACC: tl.constexpr = stats.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row, shift = _row(z, n, stride, SHIFTED, ALIGN)
    out_row = tl.multiple_of(out + n * out_stride - shift, ALIGN)
    lane = tl.arange(0, BLOCK)
    target = tl.load(targets + n).to(tl.int32)  # as wide as `column`, for registers are scarce here
    top = tl.load(stats + n)
    log_sum = tl.load(stats + tl.num_programs(0) + n)
    g = tl.load(d_logprob + n).to(ACC) * scale
    live = g != 0
    if ENTROPY:
        h = tl.load(entropy + n)
        g_entropy = tl.load(d_entropy + n).to(ACC) * scale
        live = live | (g_entropy != 0)
    for EDGE in tl.static_range(1, -1, -1):
        begin, end, step = _blocks(shift, V, BLOCK, EDGE)
        for start in range(begin, end, step):
            column = start + lane - shift
            dz = tl.zeros([BLOCK], ACC)
            if live:
                log_p = _load(row + start + lane, column, V, EDGE, ACC) * scale - top - log_sum
                p = tl.exp(log_p)
                factor = g
                if ENTROPY:
                    factor = g + g_entropy * (tl.where(p > 0, log_p, 0.0) + h)
                dz = tl.where(column == target, g, 0.0) - p * factor
            _store(out_row + start + lane, column, V, dz, EDGE)


# --- KL --------------------------------------------------------------------------------------------


@triton.jit
def kl_kernel(
    z_p,
    z_q,
    kl,
    stats,
    stride_p,
    stride_q,
    V,
    SHIFTED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With  u = z - max z  of either row,  d = sum e^u_p (u_p - u_q):

    KL = sum p (log p - log q) = d / s_p - log s_p + log s_q
    """
    ACC: tl.constexpr = kl.dtype.element_ty
    PIECE: tl.constexpr = 128 // z_p.dtype.element_ty.primitive_bitwidth
    n = tl.program_id(0).to(tl.int64)
    row_p, shift = _row(z_p, n, stride_p, SHIFTED, ALIGN)
    row_q = tl.multiple_of(z_q + n * stride_q - shift, ALIGN)
    offset = _pieces(BLOCK, PIECE)
    m_p = tl.full([BLOCK // PIECE], LOWEST, ACC)
    m_q = m_p
    s_p = tl.zeros([BLOCK // PIECE], ACC)
    s_q = s_p
    d = s_p
    for EDGE in tl.static_range(1, -1, -1):
        begin, end, step = _blocks(shift, V, BLOCK, EDGE)
        for start in range(begin, end, step):
            column = start + offset - shift
            new_p, keep_p, u_p, e_p = _step(m_p, _load(row_p + start + offset, column, V, EDGE, ACC))
            new_q, keep_q, u_q, e_q = _step(m_q, _load(row_q + start + offset, column, V, EDGE, ACC))
            d = _moved(d, s_p, keep_p, (m_p - new_p) - (m_q - new_q))
            d += tl.sum(tl.where(e_p > 0, e_p * (u_p - u_q), 0.0), 1)
            s_p = s_p * keep_p + tl.sum(e_p, 1)
            s_q = s_q * keep_q + tl.sum(e_q, 1)
            m_p, m_q = new_p, new_q
    top_p = tl.max(m_p, 0)
    top_q = tl.max(m_q, 0)
    weight = tl.exp(m_p - top_p)
    total_p = tl.sum(weight * s_p, 0)
    total_q = tl.sum(tl.exp(m_q - top_q) * s_q, 0)
    d = tl.sum(_moved(d, s_p, weight, (m_p - top_p) - (m_q - top_q)), 0)
    log_p = tl.log(total_p)
    log_q = tl.log(total_q)
    tl.store(kl + n, d / total_p - log_p + log_q)
    N = tl.num_programs(0)
    tl.store(stats + n, top_p)
    tl.store(stats + N + n, log_p)
    tl.store(stats + 2 * N + n, top_q)
    tl.store(stats + 3 * N + n, log_q)


@triton.jit
def kl_backward_kernel(
    z_p,
    z_q,
    stats,
    kl,
    d_kl,
    out_p,
    out_q,
    stride_p,
    stride_q,
    stride_out_p,
    stride_out_q,
    V,
    WANT_P: tl.constexpr,
    WANT_Q: tl.constexpr,
    SHIFTED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d z_p = d_kl p (log p - log q - KL),  d z_q = d_kl (q - p)"""
    ACC: tl.constexpr = stats.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row_p, shift = _row(z_p, n, stride_p, SHIFTED, ALIGN)
    row_q = tl.multiple_of(z_q + n * stride_q - shift, ALIGN)
    out_row_p = tl.multiple_of(out_p + n * stride_out_p - shift, ALIGN)
    out_row_q = tl.multiple_of(out_q + n * stride_out_q - shift, ALIGN)
    lane = tl.arange(0, BLOCK)
    N = tl.num_programs(0)
    top_p = tl.load(stats + n)
    sum_p = tl.load(stats + N + n)
    top_q = tl.load(stats + 2 * N + n)
    sum_q = tl.load(stats + 3 * N + n)
    divergence = tl.load(kl + n)
    g = tl.load(d_kl + n).to(ACC)
    live = g != 0
    for EDGE in tl.static_range(1, -1, -1):
        begin, end, step = _blocks(shift, V, BLOCK, EDGE)
        for start in range(begin, end, step):
            column = start + lane - shift
            dz_p = tl.zeros([BLOCK], ACC)
            dz_q = tl.zeros([BLOCK], ACC)
            if live:
                log_p = _load(row_p + start + lane, column, V, EDGE, ACC) - top_p - sum_p
                log_q = _load(row_q + start + lane, column, V, EDGE, ACC) - top_q - sum_q
                p = tl.exp(log_p)
                dz_p = g * p * (tl.where(p == 0, 0.0, log_p - log_q) - divergence)
                dz_q = g * (tl.exp(log_q) - p)
            if WANT_P:
                _store(out_row_p + start + lane, column, V, dz_p, EDGE)
            if WANT_Q:
                _store(out_row_q + start + lane, column, V, dz_q, EDGE)


# --- Launches --------------------------------------------------------------------------------------


def logprob(z: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log p[target] [N], entropy [N] or, unless asked for, [0], stats [2, N])."""
    z, (N, V), dtype = _rows(z), z.shape, accumulator(z.dtype)
    logprobs, stats = z.new_empty(N, dtype=dtype), z.new_empty(2, N, dtype=dtype)
    entropies = z.new_empty(N if entropy else 0, dtype=dtype)
    if N:
        with torch.cuda.device_of(z):
            logprob_kernel[(N,)](
                *(z, targets.contiguous(), logprobs, entropies, stats),
                *(z.stride(0), V, 1 / temperature, entropy),
                **_launch(z),
            )
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
    z, (N, V) = _rows(z), z.shape
    if N:
        with torch.cuda.device_of(z):
            logprob_backward_kernel[(N,)](
                *(z, targets.contiguous(), stats.contiguous(), entropy, d_logprob.contiguous()),
                *(None if d_entropy is None else d_entropy.contiguous(), out),
                *(z.stride(0), out.stride(0), V, 1 / temperature, d_entropy is not None),
                **_launch(z, out),
            )


def loss_and_gradient(z: Tensor, targets: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """(-log p[target] [N], its dz = share (p - onehot(target))), where no share is 1. Uses z up."""
    logprobs, _, stats = logprob(z, targets, 1.0, False)
    upstream = -torch.ones_like(logprobs) if share is None else -share
    logprob_backward(z, targets, stats, None, upstream, None, 1.0, z)
    return -logprobs, z


def kl(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q) [N], stats [4, N]: those of p, then those of q)."""
    z_p, z_q, (N, V) = _rows(z_p), _rows(z_q), z_p.shape
    dtype = accumulator(torch.promote_types(z_p.dtype, z_q.dtype))
    divergence, stats = z_p.new_empty(N, dtype=dtype), z_p.new_empty(4, N, dtype=dtype)
    if N:
        with torch.cuda.device_of(z_p):
            kl_kernel[(N,)](
                *(z_p, z_q, divergence, stats, z_p.stride(0), z_q.stride(0), V), **_launch(z_p, z_q)
            )
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
    z_p, z_q, (N, V) = _rows(z_p), _rows(z_q), z_p.shape
    outs = [out for out in (out_p, out_q) if out is not None]
    if N and outs:
        some_p, some_q = (outs[0] if out is None else out for out in (out_p, out_q))
        with torch.cuda.device_of(z_p):
            kl_backward_kernel[(N,)](
                *(z_p, z_q, stats.contiguous(), divergence, d_kl.contiguous(), some_p, some_q),
                *(x.stride(0) for x in (z_p, z_q, some_p, some_q)),
                *(V, out_p is not None, out_q is not None),
                **_launch(z_p, z_q, *outs),
            )


def _rows(z: Tensor) -> Tensor:
    """z with neighbouring columns side by side; rows may have any stride."""
    return z if z.stride(1) == 1 else z.contiguous()


def _launch(*rows: Tensor) -> dict[str, int | bool]:
    """Block, warps and what holds for the rows of all these tensors alike.

    Rows in step, which lie at the same distance from 16-byte borders in every tensor, are read and
    written 128 bits at a time. Others, such as a part of a tensor's columns next to a gradient without
    the rest, are still right, one element at a time.
    """
    steps = {(x.data_ptr() % 16, x.stride(0) * x.element_size() % 16, x.element_size()) for x in rows}
    aligned = all(start == stride == 0 for start, stride, _ in steps)
    in_step, size = len(steps) == 1, min(x.element_size() for x in rows)
    # At least 16 elements: no row is shifted by a whole block.
    block = min(max(16, triton.next_power_of_2(rows[0].shape[1])), LANES * LANE_BYTES // size)
    return {
        "SHIFTED": in_step and not aligned,
        "ALIGN": 16 if in_step or aligned else size,
        "BLOCK": block,
        "num_warps": max(1, block * size // (LANE_BYTES * WARP)),
    }
