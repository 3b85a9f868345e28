"""Operations on rows of logits in Triton: the functions of `rows_torch.py` for GPUs.

One program takes one row. There is little to compute, so a kernel is as fast as its loads:

    1. A row is read once. A thread loads pieces of 16 bytes, and for every place of a piece in the block
       keeps the maximum m so far and  s = sum e^(y - m);  a larger maximum rescales s. The places come
       together at the end of the row. Until then no thread waits for another, and as a place is no single
       logit but 4 or 8 of them, its sums take few registers and many threads can load at a time.
    2. Loads are 128 bits wide where rows begin at multiples of 16 bytes: `losses.py` lays its own out so.
       Others, as of logits from outside with V = 50,257, are read an element at a time, neighbours by
       neighbouring threads.
    3. Only a row's end is masked, for masks that may change from lane to lane cut wide loads into single
       elements, and only the block that holds the target looks for it.
    4. Exponentials and logarithms have base 2, the one base in which GPUs have instructions: the factor
       log2 e goes into the temperature's.

Sums are float32, or float64 for float64 logits. A target outside 0..V-1 reads nothing, and gives nan for
the loss and the gradient. A row whose upstream gradients are 0 passes a gradient of 0, unread.

Left out: columns with a stride (such logits are copied), several programs for one row.
Method: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv 1805.02867),
section 3. The algebra stands in `reference.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# One block of a row: 8 warps of 32 lanes, each with two loads of 16 bytes on the way.
LANES, LANE_BYTES, WARP = 256, 32, 32
# Where maxima start: finite, so that no difference of maxima is ever inf - inf. No float32 is lower.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LN_2, LOG2_E = tl.constexpr(math.log(2)), tl.constexpr(1 / math.log(2))


# --- The walk along a row --------------------------------------------------------------------------
#
# The kernels take each tensor of rows with its stride: (x, x.stride(0)).


@triton.jit
def _row(x, n, ALIGN: tl.constexpr):
    """Where row n begins."""
    return tl.multiple_of(x[0] + n * x[1], ALIGN)


@triton.jit
def _load(row, column, V, END: tl.constexpr, ACC: tl.constexpr):
    """The logits at these columns; -inf past the row's end."""
    if END:
        return tl.load(row + column, mask=column < V, other=float("-inf")).to(ACC)
    else:
        return tl.load(row + column).to(ACC)


@triton.jit
def _range(V, BLOCK: tl.constexpr, END: tl.constexpr):
    """Where the whole blocks lie in a row, or the block at its end."""
    whole = V // BLOCK * BLOCK
    return (whole, V) if END else (0, whole)


@triton.jit
def _pieces(BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """0..BLOCK-1 as [BLOCK / PIECE, PIECE]: a piece is one load of one thread, which can sum it alone."""
    return tl.arange(0, BLOCK // PIECE)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]


@triton.jit
def _step(m, z, c):
    """One block more: the new maxima, 2^(c (m - new)), and for its logits  u = c (z - new)  and 2^u.

    z - new is exact where it matters, however far from 0 both are: c z - c new would not be.
    """
    new = tl.maximum(m, tl.max(z, 1))
    u = (z - new[:, None]) * c
    return new, tl.exp2((m - new) * c), u, tl.exp2(u)


@triton.jit
def _moved(a, s, fade, shift):
    """The sum  a = sum 2^u f,  rescaled as  s = sum 2^u  is by `fade`, where every f gains `shift`: a step's
    maximum was larger. Terms that vanish take even an infinite f with them.
    """
    return tl.where((fade > 0) & (s > 0), fade * (a + shift * s), 0.0)


# --- Log-probability and entropy -------------------------------------------------------------------


@triton.jit
def logprob_kernel(
    z, targets, result, V, N, scale,
    ENTROPY: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With  u = c (z - max z),  c = log2(e) / temperature,  s = sum 2^u,  a = sum 2^u u,  p = 2^u / s:

    log2 p[target] = u[target] - log2 s,    H = -sum p log p = ln 2 (log2 s - a / s)
    """
    ACC: tl.constexpr = result.dtype.element_ty
    PIECE: tl.constexpr = ALIGN * 8 // z[0].dtype.element_ty.primitive_bitwidth  # logits in ALIGN bytes
    c = tl.full([], LOG2_E, ACC) * scale
    n = tl.program_id(0).to(tl.int64)
    row = _row(z, n, ALIGN)
    target = tl.load(targets + n)
    valid = (target >= 0) & (target < V)
    z_target = tl.load(row + target, mask=valid, other=float("nan")).to(ACC)
    m = tl.full([BLOCK // PIECE], LOWEST, ACC)
    s = tl.zeros([BLOCK // PIECE], ACC)
    a = tl.zeros([BLOCK // PIECE], ACC)
    for END in tl.static_range(2):
        begin, end = _range(V, BLOCK, END)
        for start in range(begin, end, BLOCK):
            new, fade, u, e = _step(m, _load(row, start + _pieces(BLOCK, PIECE), V, END, ACC), c)
            if ENTROPY:
                a = _moved(a, s, fade, (m - new) * c) + tl.sum(tl.where(e > 0, e * u, 0.0), 1)
            s = s * fade + tl.sum(e, 1)
            m = new
    top = tl.max(m, 0)
    weight = tl.exp2((m - top) * c)
    total = tl.sum(weight * s, 0)
    log_sum = tl.log2(total)
    tl.store(result + n, top)
    tl.store(result + N + n, log_sum)
    tl.store(result + 2 * N + n, ((z_target - top) * c - log_sum) * LN_2)
    if ENTROPY:
        a = tl.sum(_moved(a, s, weight, (m - top) * c), 0)
        tl.store(result + 3 * N + n, (log_sum - a / total) * LN_2)


@triton.jit
def logprob_backward_kernel(
    z, out, targets, result, d_result, V, N, scale,
    ENTROPY: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = scale (d_logprob (onehot(target) - p) - d_entropy p (log p + H)), scale = 1 / temperature."""
    ACC: tl.constexpr = result.dtype.element_ty
    c = tl.full([], LOG2_E, ACC) * scale
    n = tl.program_id(0).to(tl.int64)
    row = _row(z, n, ALIGN)
    out_row = _row(out, n, ALIGN)
    target = tl.load(targets + n)
    top = tl.load(result + n)
    log_sum = tl.load(result + N + n)
    g = tl.load(d_result + 2 * N + n).to(ACC) * scale
    live = g != 0
    if ENTROPY:
        h = tl.load(result + 3 * N + n)
        g_entropy = tl.load(d_result + 3 * N + n).to(ACC) * scale
        live = live | (g_entropy != 0)
    if (target < 0) | (target >= V):
        g += float("nan")
    for END in tl.static_range(2):
        begin, end = _range(V, BLOCK, END)
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            dz = tl.zeros([BLOCK], ACC)
            if live:
                log_p = (_load(row, column, V, END, ACC) - top) * c - log_sum
                p = tl.exp2(log_p)
                factor = g
                if ENTROPY:
                    factor = g + g_entropy * (tl.where(p > 0, log_p * LN_2, 0.0) + h)
                dz = -p * factor
                if (target >= start) & (target < start + BLOCK):
                    dz += tl.where(column == target.to(tl.int32), g, 0.0)
            tl.store(out_row + column, dz, mask=column < V if END else None)


# --- KL --------------------------------------------------------------------------------------------


@triton.jit
def kl_kernel(z_p, z_q, result, V, N, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """With  u = c (z - max z)  of either row,  d = sum 2^u_p (u_p - u_q):

    KL = sum p (log p - log q) = ln 2 (d / s_p - log2 s_p + log2 s_q)
    """
    ACC: tl.constexpr = result.dtype.element_ty
    BITS: tl.constexpr = z_p[0].dtype.element_ty.primitive_bitwidth
    PIECE: tl.constexpr = ALIGN * 8 // BITS if ALIGN * 8 > BITS else 1  # z_q may be narrower
    n = tl.program_id(0).to(tl.int64)
    row_p = _row(z_p, n, ALIGN)
    row_q = _row(z_q, n, ALIGN)
    m_p = tl.full([BLOCK // PIECE], LOWEST, ACC)
    m_q = m_p
    s_p = tl.zeros([BLOCK // PIECE], ACC)
    s_q = s_p
    d = s_p
    for END in tl.static_range(2):
        begin, end = _range(V, BLOCK, END)
        for start in range(begin, end, BLOCK):
            column = start + _pieces(BLOCK, PIECE)
            new_p, fade_p, u_p, e_p = _step(m_p, _load(row_p, column, V, END, ACC), LOG2_E)
            new_q, fade_q, u_q, e_q = _step(m_q, _load(row_q, column, V, END, ACC), LOG2_E)
            d = _moved(d, s_p, fade_p, ((m_p - new_p) - (m_q - new_q)) * LOG2_E)
            d += tl.sum(tl.where(e_p > 0, e_p * (u_p - u_q), 0.0), 1)
            s_p = s_p * fade_p + tl.sum(e_p, 1)
            s_q = s_q * fade_q + tl.sum(e_q, 1)
            m_p, m_q = new_p, new_q
    top_p = tl.max(m_p, 0)
    top_q = tl.max(m_q, 0)
    weight = tl.exp2((m_p - top_p) * LOG2_E)
    total_p = tl.sum(weight * s_p, 0)
    total_q = tl.sum(tl.exp2((m_q - top_q) * LOG2_E) * s_q, 0)
    d = tl.sum(_moved(d, s_p, weight, ((m_p - top_p) - (m_q - top_q)) * LOG2_E), 0)
    log_sum_p = tl.log2(total_p)
    log_sum_q = tl.log2(total_q)
    tl.store(result + n, top_p)
    tl.store(result + N + n, log_sum_p)
    tl.store(result + 2 * N + n, top_q)
    tl.store(result + 3 * N + n, log_sum_q)
    tl.store(result + 4 * N + n, (d / total_p - log_sum_p + log_sum_q) * LN_2)


@triton.jit
def kl_backward_kernel(
    z_p, z_q, out_p, out_q, result, d_result, V, N, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """d z_p = d_kl p (log p - log q - KL),  d z_q = d_kl (q - p); an `out` of None is not wanted."""
    ACC: tl.constexpr = result.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row_p = _row(z_p, n, ALIGN)
    row_q = _row(z_q, n, ALIGN)
    top_p = tl.load(result + n)
    log_sum_p = tl.load(result + N + n)
    top_q = tl.load(result + 2 * N + n)
    log_sum_q = tl.load(result + 3 * N + n)
    divergence = tl.load(result + 4 * N + n)
    g = tl.load(d_result + 4 * N + n).to(ACC)
    live = g != 0
    for END in tl.static_range(2):
        begin, end = _range(V, BLOCK, END)
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            dz_p = tl.zeros([BLOCK], ACC)
            dz_q = tl.zeros([BLOCK], ACC)
            if live:
                log_p = (_load(row_p, column, V, END, ACC) - top_p) * LOG2_E - log_sum_p
                log_q = (_load(row_q, column, V, END, ACC) - top_q) * LOG2_E - log_sum_q
                p = tl.exp2(log_p)
                dz_p = g * p * (tl.where(p == 0, 0.0, (log_p - log_q) * LN_2) - divergence)
                dz_q = g * (tl.exp2(log_q) - p)
            mask = column < V if END else None
            if out_p is not None:
                tl.store(_row(out_p, n, ALIGN) + column, dz_p, mask=mask)
            if out_q is not None:
                tl.store(_row(out_q, n, ALIGN) + column, dz_q, mask=mask)


# --- Launches --------------------------------------------------------------------------------------


def logprob(z: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Tensor:
    """[max z, log2 sum 2^u, log p[target]], and the entropy if it is wanted."""
    result = z.new_empty(3 + entropy, len(z), dtype=torch.promote_types(z.dtype, torch.float32))
    _launch(logprob_kernel, [z], targets, result, scale=1 / temperature, ENTROPY=entropy)
    return result


def logprob_backward(z, targets, temperature: float, result, d_result, out: Tensor) -> None:
    """out = dz = (d_logprob (onehot(target) - p) - d_entropy p (log p + H)) / temperature."""
    given, entropy = (targets, result, d_result), len(result) == 4
    _launch(logprob_backward_kernel, [z, out], *given, scale=1 / temperature, ENTROPY=entropy)


def loss_and_gradient(z, targets, kept: Tensor, out: Tensor | None) -> Tensor:
    """-log p[target] [N], and out = dz = p - onehot(target); 0 in rows that are not `kept`. May use z up."""
    result = logprob(z, targets, 1.0, False)
    if out is not None:
        logprob_backward(z, targets, 1.0, result, -kept.to(result.dtype).expand_as(result), out)
    return (-result[2]).where(kept, 0.0)


def kl(z_p: Tensor, z_q: Tensor) -> Tensor:
    """[max z_p, log2 sum 2^u_p, the same of q, KL(p || q)]."""
    dtype = torch.promote_types(torch.promote_types(z_p.dtype, z_q.dtype), torch.float32)
    result = z_p.new_empty(5, len(z_p), dtype=dtype)
    _launch(kl_kernel, [z_p, z_q], result)
    return result


def kl_backward(z_p, z_q, result, d_result, out_p: Tensor | None, out_q: Tensor | None) -> None:
    """out_p = d_kl p (log p - log q - KL) and out_q = d_kl (q - p); None for what is not wanted."""
    _launch(kl_backward_kernel, [z_p, z_q, out_p, out_q], result, d_result)


def _launch(kernel, rows: list[Tensor | None], *others: Tensor, **options: float) -> None:
    """A program for each row of these tensors [N, V], of which inputs may have strides of any kind."""
    rows = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in rows]
    given = [x for x in rows if x is not None]
    (N, V), size = given[0].shape, min(x.element_size() for x in given)
    # The bytes that the rows of all these tensors begin at multiples of.
    aligned = all(x.data_ptr() % 16 == x.stride(0) * x.element_size() % 16 == 0 for x in given)
    options["ALIGN"] = 16 if aligned else size
    options["BLOCK"] = block = min(max(16, triton.next_power_of_2(V)), LANES * LANE_BYTES // size)
    options["num_warps"] = max(1, block * size // (LANE_BYTES * WARP))
    strided = [None if x is None else (x, x.stride(0)) for x in rows]
    if N:
        with torch.cuda.device_of(given[0]):
            kernel[(N,)](*strided, *(x.contiguous() for x in others), V=V, N=N, **options)
