"""Interval attention in Triton, forward and backward, as one custom operator that torch.compile keeps whole.

The law stands in attention.py, the algebra in reference.py. Three ideas make it fast:

    1. The scores never leave the chip. A program holds one block of rows and walks over the keys with the
       softmax's running maximum and sum: a larger maximum rescales what has been summed so far. The backward
       pass recomputes  p = 2^(z - lse)  from the logarithm lse of the sum. All logarithms have base 2, the
       one base in which GPUs have instructions.
    2. Blocks of keys that no row of a block sees are skipped. Those which every row sees wholly run without
       masks, and only the rest compares positions.
    3. The G query heads of one key head are rows of one matrix: row r is query r // G of head r % G. So a
       key is loaded once for all of them, a token decoded over a cache fills its block with heads, and the
       gradients of a shared key are sums over rows like any other.

dq has a kernel of its own beside dk and dv: two more products than one kernel for all three would take,
but every sum has one owner and a fixed order, so gradients are equal bit for bit from run to run. Few
rows over many keys (decoding) do not fill a GPU: their keys are split over programs, and `_combine` joins
the parts.

Left out: heads wider than 256, float32 products in TF32 (they are exact, and slow), second derivatives.
Method: Dao 2023, "FlashAttention-2" (arXiv 2307.08691), sections 3.1 and 3.2; Dao et al. 2023,
"Flash-Decoding for long-context inference", for the split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

MAX_WIDTH = 256
DECODE_ROWS = 16  # the smallest tile of a product: up to here, splitting the keys is the only parallelism
PROGRAMS = 256  # what a split aims at: about two for each of the 108 to 148 multiprocessors of a large GPU
MAX_PARTS = 64  # what `_combine` holds in registers
LIST_CHUNK = 32  # blocks of rows looked at in one step
# z * scale - lse as one instruction: Triton's default up to 3.9.
FUSED = {"enable_fp_fusion": True}

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: finite, so that no difference of maxima is ever inf - inf.
LOWEST = tl.constexpr(-3.0e38)


# --- Blocks and products -------------------------------------------------------------------------


@triton.jit
def _load(x, strides, b, head, rows, count, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [len(rows), WIDTH] of x [B, heads, tokens, C]: row r is token r // G of head `head + r % G`.

    Zeros from column C on and, unless `count` is None, from row `count` on.
    """
    column = tl.arange(0, WIDTH)
    pointers = _row_pointers(x, strides, b, head, rows, G)[:, None] + column.to(tl.int64) * strides[3]
    if count is not None:
        return tl.load(pointers, (rows[:, None] < count) & (column[None, :] < C), 0.0)
    if C < WIDTH:
        return tl.load(pointers, column[None, :] < C, 0.0)
    return tl.load(pointers)


@triton.jit
def _store(x, strides, b, head, rows, count, values, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_load`, for the rows below `count`."""
    column = tl.arange(0, WIDTH)
    pointers = _row_pointers(x, strides, b, head, rows, G)[:, None] + column.to(tl.int64) * strides[3]
    values = _narrow(values, x.dtype.element_ty)
    tl.store(pointers, values, mask=(rows[:, None] < count) & (column[None, :] < C))


@triton.jit
def _row_pointers(x, strides, b, head, rows, G: tl.constexpr):
    token, head = (rows // G).to(tl.int64), (head + rows % G).to(tl.int64)
    return x + b * strides[0] + head * strides[1] + token * strides[2]


@triton.jit
def _dot(a, b, total):
    """total + a b, summed in the total's type. "ieee": float32 factors are not rounded to TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """x in `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the low half off: round it first
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _program(blocks, K):
    """(block, batch, key head) of this program. Heads run fastest: a block's neighbours start together."""
    program = tl.program_id(0)
    heads = tl.num_programs(0) // blocks
    return program // heads, (program % heads // K).to(tl.int64), program % heads % K


# --- What rows see -------------------------------------------------------------------------------


@triton.jit
def _visible(rows, start, end, start_strides, end_strides, b, T, S, G: tl.constexpr, CAUSAL: tl.constexpr):
    """Row by row the first key seen and the one past the last; (S, 0) for none, or past the last row."""
    t = rows // G
    low, high = tl.zeros_like(t), tl.zeros_like(t) + S
    if start is not None:
        bound = tl.load(start + b * start_strides[0] + t.to(tl.int64) * start_strides[1], t < T, 0)
        low = tl.minimum(tl.maximum(bound, 0), S).to(tl.int32)
    if end is not None:
        bound = tl.load(end + b * end_strides[0] + t.to(tl.int64) * end_strides[1], t < T, 0)
        high = tl.minimum(tl.maximum(bound, 0), S).to(tl.int32)
    if CAUSAL:
        high = tl.minimum(high, t + (S - T) + 1)
    # An empty interval must not widen what its block walks over.
    seen = (low < high) & (t < T)
    return tl.where(seen, low, S), tl.where(seen, high, 0)


@triton.jit
def _key_blocks(low, high, N: tl.constexpr):
    """(first, first_whole, past_whole, past): this split's share of the blocks of N keys from the first to
    the last that a row sees, and among them those which every row sees wholly."""
    first = tl.min(low, 0) // N
    past = tl.maximum(tl.cdiv(tl.max(high, 0), N), first)
    share = tl.cdiv(past - first, tl.num_programs(1))
    first = tl.minimum(first + tl.program_id(1) * share, past)
    past = tl.minimum(first + share, past)
    first_whole = tl.minimum(tl.maximum(tl.cdiv(tl.max(low, 0), N), first), past)
    past_whole = tl.minimum(tl.maximum(tl.min(high, 0) // N, first_whole), past)
    return first, first_whole, past_whole, past


@triton.jit
def _block(i, first, first_whole, past_whole, masked: tl.constexpr):
    """The i-th block that needs no mask, or the i-th of those around them that do."""
    if not masked:
        return first_whole + i
    block = first + i
    return tl.where(block < first_whole, block, block + past_whole - first_whole)


# --- Forward -------------------------------------------------------------------------------------


@triton.jit
def _forward(
    q, k, v, start, end, out, lse,
    q_strides, k_strides, v_strides, start_strides, end_strides, out_strides,
    T, S, K, part_stride,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of M rows over one split of the keys they see.

    With z the scores of a block of keys, in units of log2, and m' the new maximum:

        p = 2^(z - m')    total' = 2^(m - m') total + sum p    acc' = 2^(m - m') acc + p v

    and in the end out = acc / total.
    """
    R = T * G
    blocks = tl.cdiv(R, M)
    block, b, head = _program(blocks, K)
    block = blocks - 1 - block  # under causality the last rows see most: the longest programs start first
    rows = block * M + tl.arange(0, M)
    # Rows past the last one repeat it and are not stored.
    row = tl.minimum(rows, R - 1)
    low, high = _visible(row, start, end, start_strides, end_strides, b, T, S, G, CAUSAL)
    first, first_whole, past_whole, past = _key_blocks(low, high, N)
    q_rows = _load(q, q_strides, b, head * G, row, None, G, C, WIDTH)
    m = tl.full([M], LOWEST, lse.dtype.element_ty)
    total = tl.zeros([M], lse.dtype.element_ty)
    acc = tl.zeros([M, WIDTH], lse.dtype.element_ty)
    for masked in tl.static_range(2):
        count = S if masked else None
        for i in range(past - first - past_whole + first_whole if masked else past_whole - first_whole):
            keys = _block(i, first, first_whole, past_whole, masked) * N + tl.arange(0, N)
            k_rows = _load(k, k_strides, b, head, keys, count, 1, C, WIDTH)
            z = _dot(q_rows, tl.trans(k_rows), tl.zeros([M, N], m.dtype)) * (SCALE * LOG2_E)
            if masked:
                seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
                z = tl.where(seen, z, float("-inf"))
            top = tl.maximum(m, tl.max(z, 1))
            p = tl.exp2(z - top[:, None])
            fade = tl.exp2(m - top)
            m, total = top, total * fade + tl.sum(p, 1)
            v_rows = _load(v, v_strides, b, head, keys, count, 1, C, WIDTH)
            acc = _dot(_narrow(p, v_rows.dtype), v_rows, acc * fade[:, None])
    part = tl.program_id(1).to(tl.int64)
    mean = acc / tl.where(total > 0, total, 1.0)[:, None]
    _store(out + part * part_stride, out_strides, b, head * G, rows, R, mean, G, C, WIDTH)
    lse += (part * (tl.num_programs(0) // blocks) + b * K + head) * R
    tl.store(lse + rows, _log_sum(m, total), mask=rows < R)


@triton.jit
def _log_sum(m, total):
    """log2 of 2^m total; +inf where there is none, so that p = 2^(z - inf) = 0 in the backward pass."""
    return tl.where(total > 0, m + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))


@triton.jit
def _combine(
    parts, part_lse, out, lse, out_strides, T, K, part_count, part_stride,
    G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = sum_i 2^(lse_i - lse) out_i, lse = log2 sum_i 2^lse_i over the parts i of one row's keys."""
    R = T * G
    row, b, head = _program(R, K)
    part = tl.arange(0, PARTS)
    index = (b * K + head) * R + row
    z = tl.load(part_lse + part * tl.num_programs(0).to(tl.int64) + index, part < part_count, float("inf"))
    z = tl.where(z == float("inf"), float("-inf"), z)
    m = tl.maximum(tl.max(z, 0), LOWEST)
    weights = tl.exp2(z - m)
    total = tl.sum(weights, 0)
    tl.store(lse + index, _log_sum(m, total))
    column = tl.arange(0, WIDTH)
    of_parts = _row_pointers(parts, out_strides, b, head * G, row, G) + part.to(tl.int64) * part_stride
    mask = (part[:, None] < part_count) & (column[None, :] < C)
    values = tl.load(of_parts[:, None] + column[None, :], mask, 0.0)
    mean = tl.sum(weights[:, None] * values, 0) / tl.where(total > 0, total, 1.0)
    of_out = _row_pointers(out, out_strides, b, head * G, row, G)
    tl.store(of_out + column, _narrow(mean, out.dtype.element_ty), column < C)


# --- Backward ------------------------------------------------------------------------------------
#
#     dv = p^T d_out    dp = d_out v^T    dz = p * (dp - delta)    dq = scale * dz k    dk = scale * dz^T q
#
# delta = sum_c d_out * out, one number a row, is what reference.py writes as sum_s p * dp.


@triton.jit
def _backward_dq(
    q, k, v, start, end, out, lse, d_out, dq, delta,
    q_strides, k_strides, v_strides, start_strides, end_strides, out_strides, d_out_strides, dq_strides,
    T, S, K,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq and delta of one block of M rows, over the keys that they see."""
    R = T * G
    blocks = tl.cdiv(R, M)
    block, b, head = _program(blocks, K)
    block = blocks - 1 - block
    rows = block * M + tl.arange(0, M)
    row = tl.minimum(rows, R - 1)
    low, high = _visible(row, start, end, start_strides, end_strides, b, T, S, G, CAUSAL)
    first, first_whole, past_whole, past = _key_blocks(low, high, N)
    q_rows = _load(q, q_strides, b, head * G, row, None, G, C, WIDTH)
    d_rows = _load(d_out, d_out_strides, b, head * G, row, None, G, C, WIDTH)
    lse_rows = tl.load(lse + (b * K + head) * R + row)
    out_rows = _load(out, out_strides, b, head * G, row, None, G, C, WIDTH)
    delta_rows = tl.sum(d_rows.to(lse_rows.dtype) * out_rows.to(lse_rows.dtype), 1)
    tl.store(delta + (b * K + head) * R + rows, delta_rows, mask=rows < R)
    acc = tl.zeros([M, WIDTH], lse_rows.dtype)
    for masked in tl.static_range(2):
        count = S if masked else None
        for i in range(past - first - past_whole + first_whole if masked else past_whole - first_whole):
            keys = _block(i, first, first_whole, past_whole, masked) * N + tl.arange(0, N)
            k_rows = _load(k, k_strides, b, head, keys, count, 1, C, WIDTH)
            z = _dot(q_rows, tl.trans(k_rows), tl.zeros([M, N], acc.dtype)) * (SCALE * LOG2_E)
            if masked:
                seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
                z = tl.where(seen, z, float("-inf"))
            p = tl.exp2(z - lse_rows[:, None])
            v_rows = _load(v, v_strides, b, head, keys, count, 1, C, WIDTH)
            dp = _dot(d_rows, tl.trans(v_rows), tl.zeros([M, N], acc.dtype))
            dz = p * (dp - delta_rows[:, None])
            acc = _dot(_narrow(dz, k_rows.dtype), k_rows, acc)
    _store(dq, dq_strides, b, head * G, rows, R, acc * SCALE, G, C, WIDTH)


@triton.jit
def _backward_dkdv(
    q, k, v, start, end, lse, d_out, delta, dk, dv, blocks_of, counts_of,
    q_strides, k_strides, v_strides, start_strides, end_strides, d_out_strides, dk_strides, dv_strides,
    T, S, K,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of N keys, over the rows that see them. Scores lie transposed, keys x rows."""
    R = T * G
    blocks = tl.cdiv(R, M)
    key_blocks = tl.cdiv(S, N)
    block, b, head = _program(key_blocks, K)
    keys = block * N + tl.arange(0, N)
    k_rows = _load(k, k_strides, b, head, keys, S, 1, C, WIDTH)
    v_rows = _load(v, v_strides, b, head, keys, S, 1, C, WIDTH)
    lse += (b * K + head) * R
    delta += (b * K + head) * R
    if blocks_of is not None:
        counts_of += (b * key_blocks + block) * 2
        blocks_of += (b * key_blocks + block) * blocks
        some, whole = tl.load(counts_of), tl.load(counts_of + 1)
    else:
        first, first_whole = 0, 0
        if CAUSAL:  # key s is seen from query s - (S - T) on: the first key first, the last key last
            first = tl.minimum(tl.maximum(block * N + T - S, 0) * G // M, blocks)
            past_key = tl.minimum(block * N + N, S)
            first_whole = tl.minimum(tl.cdiv(tl.maximum(past_key - 1 + T - S, 0) * G, M), blocks)
        past_whole = tl.maximum(R // M, first_whole)
        whole = past_whole - first_whole
        some = blocks - first - whole
    d_k = tl.zeros([N, WIDTH], lse.dtype.element_ty)
    d_v = tl.zeros([N, WIDTH], lse.dtype.element_ty)
    for masked in tl.static_range(2):
        count = R if masked else None
        for i in range(some if masked else whole):
            if blocks_of is not None:
                row_block = tl.load(blocks_of + (i if masked else blocks - 1 - i))
            else:
                row_block = _block(i, first, first_whole, past_whole, masked)
            rows = row_block * M + tl.arange(0, M)
            q_rows = _load(q, q_strides, b, head * G, rows, count, G, C, WIDTH)
            z = _dot(k_rows, tl.trans(q_rows), tl.zeros([N, M], d_k.dtype)) * (SCALE * LOG2_E)
            if masked:
                low, high = _visible(rows, start, end, start_strides, end_strides, b, T, S, G, CAUSAL)
                seen = (keys[:, None] >= low[None, :]) & (keys[:, None] < high[None, :])
                z = tl.where(seen, z, float("-inf"))
                # Rows past the last one have p = 2^(z - inf) = 0.
                p = tl.exp2(z - tl.load(lse + rows, rows < R, float("inf"))[None, :])
                delta_rows = tl.load(delta + rows, rows < R, 0.0)
            else:
                p = tl.exp2(z - tl.load(lse + rows)[None, :])
                delta_rows = tl.load(delta + rows)
            d_rows = _load(d_out, d_out_strides, b, head * G, rows, count, G, C, WIDTH)
            d_v = _dot(_narrow(p, d_rows.dtype), d_rows, d_v)
            dp = _dot(v_rows, tl.trans(d_rows), tl.zeros([N, M], d_k.dtype))
            dz = p * (dp - delta_rows[None, :])
            d_k = _dot(_narrow(dz, q_rows.dtype), q_rows, d_k)
    _store(dk, dk_strides, b, head, keys, S, d_k * SCALE, 1, C, WIDTH)
    _store(dv, dv_strides, b, head, keys, S, d_v, 1, C, WIDTH)


@triton.jit
def _list_row_blocks(
    start, end, blocks_of, counts_of, start_strides, end_strides, T, S,
    CAUSAL: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For one block of keys, the blocks of rows that see it: in part from the front of its list, wholly
    from the back. Bounds may be in any order, so all are read; this runs once for all heads."""
    R = T * G
    blocks = tl.cdiv(R, M)
    key_blocks = tl.cdiv(S, N)
    program = tl.program_id(0).to(tl.int64)
    b = program // key_blocks
    first_key = (program % key_blocks * N).to(tl.int32)
    past_key = tl.minimum(first_key + N, S)
    blocks_of += program * blocks
    some, whole = 0, 0
    for chunk in range(0, blocks, CHUNK):
        block = chunk + tl.arange(0, CHUNK)
        rows = block[:, None] * M + tl.arange(0, M)[None, :]
        low, high = _visible(rows, start, end, start_strides, end_strides, b, T, S, G, CAUSAL)
        seen = tl.max(((low < past_key) & (high > first_key)).to(tl.int32), 1)
        all_seen = tl.min(((low <= first_key) & (high >= past_key)).to(tl.int32), 1)
        seen -= all_seen
        tl.store(blocks_of + some + tl.cumsum(seen, 0) - 1, block, mask=seen != 0)
        tl.store(blocks_of + blocks - whole - tl.cumsum(all_seen, 0), block, mask=all_seen != 0)
        some += tl.sum(seen, 0)
        whole += tl.sum(all_seen, 0)
    tl.store(counts_of + program * 2, some)
    tl.store(counts_of + program * 2 + 1, whole)


# --- Launches ------------------------------------------------------------------------------------


# (rows M, keys N, warps, stages) for heads of up to 64, 128 and 256: the largest blocks tried for which ptxas
# spills no register, in shared memory of 99 KB for "sm_80", which serves every device not named, and of 227
# KB for the others. 8 warps, as a rule, because 4 would hold sums of twice the size in their registers.
TILES = {
    # Rows stay in place and keys stream by: tall blocks reread the keys less often.
    ("forward", "half", "sm_80"): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    ("forward", "half", "sm_90"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    ("forward", "half", "sm_100"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    # d_out stays in place too.
    ("dq", "half", "sm_80"): ((128, 64, 8, 3), (128, 32, 8, 2), (32, 32, 4, 2)),
    ("dq", "half", "sm_90"): ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    ("dq", "half", "sm_100"): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    # Keys stay and rows stream by, into two sums as wide as a head. On sm_90 those of 64 keys and heads of
    # 256 leave too few registers, so that case takes 32 keys and does without wgmma.
    ("dkdv", "half", "sm_80"): ((64, 32, 4, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("dkdv", "half", "sm_90"): ((64, 128, 8, 2), (32, 128, 8, 2), (64, 32, 8, 2)),
    ("dkdv", "half", "sm_100"): ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
    # One tile of rows; what counts is how many keys are on their way.
    ("decode", "half", "any"): ((16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 3)),
    # Exact products run outside the tensor cores, with their factors in registers; dq at 256 spills a little.
    ("forward", "float32", "any"): ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    ("dq", "float32", "any"): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("dkdv", "float32", "any"): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("decode", "float32", "any"): ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}
SMALLEST = (16, 16, 8, 1)


def configuration(kernel: str, C: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of M rows and N keys, warps and stages for one of the kernels of TILES."""
    width = max(16, triton.next_power_of_2(C))
    M, N, warps, stages = SMALLEST
    # Interpreted, small blocks let tests of a few dozen tokens cross many borders; float64 is for tests too.
    if not INTERPRETED.value and dtype != torch.float64:
        kind = "float32" if dtype == torch.float32 else "half"
        names = {90: "sm_90", 100: "sm_100", 103: "sm_100"}
        device = names.get(driver.active.get_current_target().arch, "sm_80")
        tiles = TILES.get((kernel, kind, device)) or TILES[kernel, kind, "any"]
        M, N, warps, stages = tiles[(width > 64) + (width > 128)]
    return {"C": C, "WIDTH": width, "M": M, "N": N, "num_warps": warps, "num_stages": stages, **FUSED}


@torch.library.custom_op("minillm::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, C] and lse [B, K, T * H / K], the logarithms of the softmax's sums, of base 2."""
    B, H, T, C = q.shape
    K, S = k.shape[1:3]
    out, lse = outputs(q, k, 1)
    options = configuration("forward" if lse.shape[3] > DECODE_ROWS else "decode", C, q.dtype)
    blocks = triton.cdiv(lse.shape[3], options["M"]) * B * K
    count = split_count(lse.shape[3], blocks, S, options["N"])
    parts, part_lse = outputs(q, k, count) if count > 1 else (out, lse)
    _forward[(blocks, count)](
        q, k, v, start, end, parts, part_lse,
        q.stride(), k.stride(), v.stride(), strides(start), strides(end), parts.stride()[1:],
        T, S, K, parts.stride(0), SCALE=scale, CAUSAL=causal, G=H // K, **options,
    )  # fmt: skip
    if count > 1:
        _combine[(lse.numel(),)](
            parts, part_lse, out, lse, parts.stride()[1:], T, K, count, parts.stride(0),
            G=H // K, C=C, WIDTH=options["WIDTH"], PARTS=triton.next_power_of_2(count), **FUSED,
        )  # fmt: skip
    return out[0], lse[0]


def outputs(q: Tensor, k: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Room for out and lse, once for each part. out lies in memory as [B, T, H, C], ready to be flattened."""
    B, H, T, C = q.shape
    K = k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((parts, B, T, H, C), dtype=exact if parts > 1 else q.dtype).transpose(2, 3)
    return out, q.new_empty((parts, B, K, H // K * T), dtype=exact)


def split_count(rows: int, blocks: int, S: int, N: int) -> int:
    """Over how many programs the keys of a block of rows are split, two blocks of keys or more for each."""
    if rows > DECODE_ROWS or blocks == 0:
        return 1
    return max(1, min(PROGRAMS // blocks, S // (2 * N), MAX_PARTS))


def strides(bound: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if bound is None else bound.stride()


@attention_op.register_fake
def _(q, k, v, start, end, causal, scale):
    out, lse = outputs(q, k, 1)
    return out[0], lse[0]


@torch.library.custom_op("minillm::attention_backward", mutates_args=())
def attention_backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    B, H, T, C = q.shape
    K, S = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    shared = {"SCALE": scale, "CAUSAL": causal, "G": H // K}
    options = configuration("dq", C, q.dtype)
    _backward_dq[(triton.cdiv(lse.shape[2], options["M"]) * B * K,)](
        q, k, v, start, end, out, lse, d_out, dq, delta,
        q.stride(), k.stride(), v.stride(), strides(start), strides(end),
        out.stride(), d_out.stride(), dq.stride(), T, S, K, **shared, **options,
    )  # fmt: skip
    options = configuration("dkdv", C, q.dtype)
    lists = row_block_lists(start, end, B, T, S, causal, H // K, options["M"], options["N"], q.device)
    _backward_dkdv[(triton.cdiv(S, options["N"]) * B * K,)](
        q, k, v, start, end, lse, d_out, delta, dk, dv, *lists,
        q.stride(), k.stride(), v.stride(), strides(start), strides(end),
        d_out.stride(), dk.stride(), dv.stride(), T, S, K, **shared, **options,
    )  # fmt: skip
    return dq, dk, dv


def row_block_lists(start, end, B, T, S, causal, G, M, N, device):
    """The two tensors of `_list_row_blocks`; (None, None) without bounds, where they are plain ranges."""
    if start is None and end is None:
        return None, None
    blocks, key_blocks = triton.cdiv(T * G, M), triton.cdiv(S, N)
    blocks_of = torch.empty((B, key_blocks, blocks), dtype=torch.int32, device=device)
    counts_of = torch.empty((B, key_blocks, 2), dtype=torch.int32, device=device)
    _list_row_blocks[(B * key_blocks,)](
        start, end, blocks_of, counts_of, strides(start), strides(end), T, S,
        CAUSAL=causal, G=G, M=M, N=N, CHUNK=LIST_CHUNK, **FUSED,
    )  # fmt: skip
    return blocks_of, counts_of


@attention_backward_op.register_fake
def _(d_out, q, k, v, start, end, out, lse, causal, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, d_out, d_lse):
    return *attention_backward_op(d_out, *ctx.saved_tensors, ctx.causal, ctx.scale), *[None] * 4


attention_op.register_autograd(_backward, setup_context=_save)


def attention(q, k, v, start, end, causal: bool, scale: float) -> Tensor:
    """The operator's output; `attention.attention` says what it is. ValueError for a C above MAX_WIDTH."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v share no dtype: {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[3] > MAX_WIDTH:
        raise ValueError(f"heads are {q.shape[3]} wide, Triton's take up to {MAX_WIDTH}: use impl='torch'")
    return attention_op(q, k, v, start, end, causal and q.shape[2] > 1, scale)[0]
