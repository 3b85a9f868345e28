"""Interval attention in Triton, forward and backward, as one custom operator that torch.compile keeps whole.

The law stands in attention.py, the algebra and the softmax over blocks in reference.py. `simple_kernel` is
the idea alone: the scores never leave the chip. A program holds one block of rows and walks over the keys
with the softmax's running maximum and sum; a larger maximum rescales what has been summed so far. What the
kernels behind it add, and what each addition buys:

    1. Grouped rows. The G query heads of one key head are rows of one matrix: row r is query r // G of head
       r % G. So a key is loaded once for all of them, a token decoded over a cache fills its block with
       heads, and the gradients of a shared key are sums over rows like any other.
    2. Bounds. Blocks of keys that no row of a block sees are skipped, which makes a window or packed
       documents as fast as they are short. Blocks that every row sees wholly run without masks, as most do,
       and only those at an edge compare positions.
    3. Any strides, and heads of any width, by masks on the columns.
    4. The scale is applied to the maximum of a row rather than to every score: one fused multiply-add a
       score. So it must be positive.
    5. Keys that are not finite do not reach rows that do not see them: cleared at the edges, where rows
       that see a key share a block with rows that do not.
    6. A backward pass, which recomputes  p = 2^(z - lse)  from the logarithm lse of the sum.
       `_backward_dq` goes over keys, `_backward_dkdv` over rows: two more products than one kernel for all
       three would take, but every sum has one owner and a fixed order, so gradients are equal bit for bit
       from run to run. Bounds may be in any order, so `_list_row_blocks` finds the rows that see a block.

All logarithms have base 2, the one base in which GPUs have instructions.

Left out: heads wider than 256, float32 products in TF32 (they are exact, and slow), keys split over programs
(a few rows over many keys leave a GPU idle), second derivatives.
Method: Dao 2023, "FlashAttention-2" (arXiv 2307.08691), sections 3.1 and 3.2.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

MAX_WIDTH = 256
DECODE_ROWS = 16  # the smallest tile of a product
LIST_CHUNK = 32  # blocks of rows looked at in one step
# z * scale - lse as one instruction: Triton's default up to 3.9.
FUSED = {"enable_fp_fusion": True}

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: finite, so that no difference of maxima is ever inf - inf.
LOWEST = tl.constexpr(-3.0e38)


# --- The idea --------------------------------------------------------------------------------------


@triton.jit
def simple_kernel(
    q, k, v, out, T, SCALE: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Causal attention over contiguous q, k, v [heads, T, C]: one block of rows of one head.

    With z the scores of a block of keys, in units of log2, and m' the new maximum:

        p = 2^(z - m')    total' = 2^(m - m') total + sum p    acc' = 2^(m - m') acc + p v

    and in the end out = acc / total.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64) * T * C
    column = tl.arange(0, C)[None, :]
    row_offsets = head + rows[:, None] * C + column
    q_rows = tl.load(q + row_offsets, rows[:, None] < T, 0.0)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for first_key in range(0, (tl.program_id(0) + 1) * BLOCK_M, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        key_offsets = head + keys[:, None] * C + column
        k_rows = tl.load(k + key_offsets, keys[:, None] < T, 0.0)
        v_rows = tl.load(v + key_offsets, keys[:, None] < T, 0.0)
        z = _dot(q_rows, tl.trans(k_rows), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * (SCALE * LOG2_E)
        z = tl.where(keys[None, :] <= rows[:, None], z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        p = tl.exp2(z - top[:, None])
        fade = tl.exp2(m - top)
        m, total = top, fade * total + tl.sum(p, 1)
        acc = _dot(_narrow(p, v_rows.dtype), v_rows, fade[:, None] * acc)
    mean = _narrow(acc / total[:, None], out.dtype.element_ty)
    tl.store(out + row_offsets, mean, rows[:, None] < T)


def simple_attention(q: Tensor, k: Tensor, v: Tensor, BLOCK_M: int = 64, BLOCK_N: int = 64) -> Tensor:
    """Causal attention of contiguous q, k, v [B, H, T, C] for C a power of two from 16 on, forward only."""
    B, H, T, C = q.shape
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        simple_kernel[(triton.cdiv(T, BLOCK_M), B * H)](q, k, v, out, T, C**-0.5, C, BLOCK_M, BLOCK_N)
    return out


# --- Blocks and products -------------------------------------------------------------------------
#
# The kernels take each operand x as a tensor [B, heads, tokens, C] with its strides: (x, x.stride()).


@triton.jit
def _pointers(x, b, head, rows, G: tl.constexpr, WIDTH: tl.constexpr):
    """To rows [len(rows), WIDTH] of x: row r is token r // G of head `head + r % G`."""
    tensor, strides = x[0], x[1]
    token, head = (rows // G).to(tl.int64), (head + rows % G).to(tl.int64)
    first = tensor + b * strides[0] + head * strides[1] + token * strides[2]
    return first[:, None] + tl.arange(0, WIDTH).to(tl.int64)[None, :] * strides[3]


@triton.jit
def _load(x, b, head, rows, count, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Those rows, with zeros from column C on and, unless `count` is None, from row `count` on."""
    pointers, column = _pointers(x, b, head, rows, G, WIDTH), tl.arange(0, WIDTH)[None, :]
    if count is not None:
        return tl.load(pointers, (rows[:, None] < count) & (column < C), 0.0)
    if C < WIDTH:
        return tl.load(pointers, column < C, 0.0)
    return tl.load(pointers)


@triton.jit
def _store(x, b, head, rows, count, values, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_load`, for the rows below `count`."""
    pointers, column = _pointers(x, b, head, rows, G, WIDTH), tl.arange(0, WIDTH)[None, :]
    values = _narrow(values, x[0].dtype.element_ty)
    tl.store(pointers, values, mask=(rows[:, None] < count) & (column < C))


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
def _bound(bound, default, b, t, T, S):
    """Row by row a given bound, within 0..S."""
    if bound is None:
        return tl.zeros_like(t) + default
    else:  # or else it would be compiled for None
        given = tl.load(bound[0] + b * bound[1][0] + t.to(tl.int64) * bound[1][1], t < T, 0)
        return tl.minimum(tl.maximum(given, 0), S).to(tl.int32)


@triton.jit
def _visible(rows, start, end, b, T, S, G: tl.constexpr, CAUSAL: tl.constexpr):
    """Row by row the first key seen and the one past the last; (S, 0) for none, or past the last row."""
    t = rows // G
    low, high = _bound(start, 0, b, t, T, S), _bound(end, S, b, t, T, S)
    if CAUSAL:
        high = tl.minimum(high, t + (S - T) + 1)
    # An empty interval must not widen what its block walks over.
    seen = (low < high) & (t < T)
    return tl.where(seen, low, S), tl.where(seen, high, 0)


@triton.jit
def _row_block(start, end, T, S, K, CAUSAL: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """(batch, key head, rows, the rows to load, their first keys and those past the last) of this program."""
    blocks = tl.cdiv(T * G, BLOCK_M)
    block, b, head = _program(blocks, K)
    # Under causality the last rows see most: the longest programs start first.
    rows = (blocks - 1 - block) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, T * G - 1)  # rows past the last one repeat it and are not stored
    low, high = _visible(row, start, end, b, T, S, G, CAUSAL)
    return b, head, rows, row, low, high


@triton.jit
def _key_blocks(low, high, BLOCK_N: tl.constexpr):
    """(first, first whole, wholes, edges): where the blocks of keys begin that a row sees, where among them
    those which every row sees wholly, how many these are, and how many others."""
    first = tl.min(low, 0) // BLOCK_N
    past = tl.maximum(tl.cdiv(tl.max(high, 0), BLOCK_N), first)
    first_whole = tl.minimum(tl.maximum(tl.cdiv(tl.max(low, 0), BLOCK_N), first), past)
    wholes = tl.minimum(tl.maximum(tl.min(high, 0) // BLOCK_N, first_whole), past) - first_whole
    return first, first_whole, wholes, past - first - wholes


@triton.jit
def _block(i, first, first_whole, wholes, EDGE: tl.constexpr):
    """The i-th block that needs no mask, or the i-th of those around them that do."""
    if not EDGE:
        return first_whole + i
    block = first + i
    return tl.where(block < first_whole, block, block + wholes)


@triton.jit
def _cleared(x, ACC: tl.constexpr):
    """x with 0 for all that is not finite, and which of its rows held such."""
    finite = tl.abs(x.to(ACC)) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), tl.min(finite.to(tl.int32), 1) == 0


# --- Forward -------------------------------------------------------------------------------------


@triton.jit
def _forward(
    q, k, v, start, end, out, lse, T, S, K,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of rows over the keys they see."""
    ACC: tl.constexpr = lse.dtype.element_ty
    R = T * G
    b, head, rows, row, low, high = _row_block(start, end, T, S, K, CAUSAL, G, BLOCK_M)
    first, first_whole, wholes, edges = _key_blocks(low, high, BLOCK_N)
    q_rows = _load(q, b, head * G, row, None, G, C, WIDTH)
    m = tl.full([BLOCK_M], LOWEST, ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, WIDTH], ACC)
    for EDGE in tl.static_range(2):  # first the blocks that all rows see wholly, then those at an edge
        count = S if EDGE else None
        for i in range(edges if EDGE else wholes):
            keys = _block(i, first, first_whole, wholes, EDGE) * BLOCK_N + tl.arange(0, BLOCK_N)
            k_rows = _load(k, b, head, keys, count, 1, C, WIDTH)
            z = _dot(q_rows, tl.trans(k_rows), tl.zeros([BLOCK_M, BLOCK_N], ACC))
            v_rows = _load(v, b, head, keys, count, 1, C, WIDTH)
            if EDGE:  # a value that is not finite is 0 to rows that do not see it, and nan to those that do
                v_rows, spoilt = _cleared(v_rows, ACC)
                z += tl.where(spoilt, float("nan"), 0.0)[None, :]
                seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
                z = tl.where(seen, z, float("-inf"))
            top = tl.maximum(m, tl.max(z, 1) * (SCALE * LOG2_E))
            p = tl.exp2(z * (SCALE * LOG2_E) - top[:, None])
            fade = tl.exp2(m - top)
            m, total = top, total * fade + tl.sum(p, 1)
            acc = _dot(_narrow(p, v_rows.dtype), v_rows, acc * fade[:, None])
    divisor = tl.where(total == 0, 1.0, total)
    _store(out, b, head * G, rows, R, acc / divisor[:, None], G, C, WIDTH)
    # +inf for a row that sees nothing, so that p = 2^(z - inf) = 0 in the backward pass.
    log_sum = tl.where(total == 0, float("inf"), m + tl.log2(divisor))
    tl.store(lse + (b * K + head) * R + rows, log_sum, mask=rows < R)


# --- Backward ------------------------------------------------------------------------------------
#
#     dv = p^T d_out    dp = d_out v^T    dz = p * (dp - delta)    dq = scale * dz k    dk = scale * dz^T q
#
# delta = sum_c d_out * out, one number a row, is what reference.py writes as sum_s p * dp.


@triton.jit
def _backward_dq(
    q, k, v, start, end, out, d_out, dq, lse, delta, T, S, K,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and delta of one block of rows, over the keys that they see."""
    ACC: tl.constexpr = lse.dtype.element_ty
    R = T * G
    b, head, rows, row, low, high = _row_block(start, end, T, S, K, CAUSAL, G, BLOCK_M)
    first, first_whole, wholes, edges = _key_blocks(low, high, BLOCK_N)
    q_rows = _load(q, b, head * G, row, None, G, C, WIDTH)
    d_rows = _load(d_out, b, head * G, row, None, G, C, WIDTH)
    lse_rows = tl.load(lse + (b * K + head) * R + row)
    out_rows = _load(out, b, head * G, row, None, G, C, WIDTH)
    delta_rows = tl.sum(d_rows.to(ACC) * out_rows.to(ACC), 1)
    tl.store(delta + (b * K + head) * R + rows, delta_rows, mask=rows < R)
    acc = tl.zeros([BLOCK_M, WIDTH], ACC)
    for EDGE in tl.static_range(2):
        count = S if EDGE else None
        for i in range(edges if EDGE else wholes):
            keys = _block(i, first, first_whole, wholes, EDGE) * BLOCK_N + tl.arange(0, BLOCK_N)
            k_rows = _load(k, b, head, keys, count, 1, C, WIDTH)
            z = _dot(q_rows, tl.trans(k_rows), tl.zeros([BLOCK_M, BLOCK_N], ACC))
            v_rows = _load(v, b, head, keys, count, 1, C, WIDTH)
            dp = _dot(d_rows, tl.trans(v_rows), tl.zeros([BLOCK_M, BLOCK_N], ACC))
            dz = tl.exp2(z * (SCALE * LOG2_E) - lse_rows[:, None]) * (dp - delta_rows[:, None])
            if EDGE:
                seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
                dz = tl.where(seen, dz, 0.0)
                k_rows, _ = _cleared(k_rows, ACC)
            acc = _dot(_narrow(dz, k_rows.dtype), k_rows, acc)
    _store(dq, b, head * G, rows, R, acc * SCALE, G, C, WIDTH)


@triton.jit
def _backward_dkdv(
    q, k, v, start, end, d_out, dk, dv, lse, delta, blocks_of, counts_of, T, S, K,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over the rows that see them. Scores lie transposed, keys x rows."""
    ACC: tl.constexpr = lse.dtype.element_ty
    R = T * G
    blocks = tl.cdiv(R, BLOCK_M)
    key_blocks = tl.cdiv(S, BLOCK_N)
    block, b, head = _program(key_blocks, K)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_rows = _load(k, b, head, keys, S, 1, C, WIDTH)
    v_rows = _load(v, b, head, keys, S, 1, C, WIDTH)
    lse += (b * K + head) * R
    delta += (b * K + head) * R
    counts_of += (b * key_blocks + block) * 2
    blocks_of += (b * key_blocks + block) * blocks
    edges, wholes = tl.load(counts_of), tl.load(counts_of + 1)
    d_k = tl.zeros([BLOCK_N, WIDTH], ACC)
    d_v = tl.zeros([BLOCK_N, WIDTH], ACC)
    for EDGE in tl.static_range(2):
        count = R if EDGE else None
        for i in range(edges if EDGE else wholes):
            rows = tl.load(blocks_of + (i if EDGE else blocks - 1 - i)) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = rows < R if EDGE else None
            lse_rows, delta_rows = tl.load(lse + rows, inside), tl.load(delta + rows, inside)
            q_rows = _load(q, b, head * G, rows, count, G, C, WIDTH)
            z = _dot(k_rows, tl.trans(q_rows), tl.zeros([BLOCK_N, BLOCK_M], ACC))
            p = tl.exp2(z * (SCALE * LOG2_E) - lse_rows[None, :])
            if EDGE:
                low, high = _visible(rows, start, end, b, T, S, G, CAUSAL)
                seen = (keys[:, None] >= low[None, :]) & (keys[:, None] < high[None, :])
                p = tl.where(seen, p, 0.0)
            d_rows = _load(d_out, b, head * G, rows, count, G, C, WIDTH)
            d_v = _dot(_narrow(p, d_rows.dtype), d_rows, d_v)
            dp = _dot(v_rows, tl.trans(d_rows), tl.zeros([BLOCK_N, BLOCK_M], ACC))
            dz = p * (dp - delta_rows[None, :])
            if EDGE:
                dz = tl.where(seen, dz, 0.0)
            d_k = _dot(_narrow(dz, q_rows.dtype), q_rows, d_k)
    _store(dk, b, head, keys, S, d_k * SCALE, 1, C, WIDTH)
    _store(dv, b, head, keys, S, d_v, 1, C, WIDTH)


@triton.jit
def _list_row_blocks(
    start, end, blocks_of, counts_of, T, S,
    CAUSAL: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For one block of keys, the blocks of rows that see it: in part from the front of its list, wholly
    from the back. Bounds may be in any order, so all are read; this runs once for all heads."""
    R = T * G
    blocks = tl.cdiv(R, BLOCK_M)
    key_blocks = tl.cdiv(S, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    b = program // key_blocks
    first_key = (program % key_blocks * BLOCK_N).to(tl.int32)
    past_key = tl.minimum(first_key + BLOCK_N, S)
    blocks_of += program * blocks
    edges, wholes = 0, 0
    for chunk in range(0, blocks, CHUNK):
        block = chunk + tl.arange(0, CHUNK)
        rows = block[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        low, high = _visible(rows, start, end, b, T, S, G, CAUSAL)
        seen = tl.max(((low < past_key) & (high > first_key)).to(tl.int32), 1)
        whole = tl.min(((low <= first_key) & (high >= past_key)).to(tl.int32), 1)
        edge = seen - whole
        tl.store(blocks_of + edges + tl.cumsum(edge, 0) - 1, block, mask=edge != 0)
        tl.store(blocks_of + blocks - wholes - tl.cumsum(whole, 0), block, mask=whole != 0)
        edges += tl.sum(edge, 0)
        wholes += tl.sum(whole, 0)
    tl.store(counts_of + program * 2, edges)
    tl.store(counts_of + program * 2 + 1, wholes)


# --- Launches ------------------------------------------------------------------------------------


SMALLEST = (16, 16, 8, 1)


@cache
def tiles() -> dict[str, dict[str, Any]]:
    """Of each kernel by type and device what tiles.toml says."""
    return tomllib.loads(Path(__file__).with_name("tiles.toml").read_text(encoding="utf-8"))


def configuration(kernel: str, C: int, dtype: torch.dtype) -> dict[str, int]:
    """The blocks, warps and stages for one of the kernels of tiles.toml on the current device."""
    width = max(16, triton.next_power_of_2(C))
    sizes = SMALLEST
    # Interpreted, small blocks let tests of a few dozen tokens cross many borders; float64 is for tests too.
    if not INTERPRETED.value and dtype != torch.float64:
        known = tiles()[kernel]["float32" if dtype == torch.float32 else "half"]
        device = {90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(driver.active.get_current_target().arch)
        sizes = known.get(device, known["any"])[(width > 64) + (width > 128)]
    named = zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True)
    return {"C": C, "WIDTH": width, **dict(named), **FUSED}


@torch.library.custom_op("minillm::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, C] and lse [B, K, T * H / K], the logarithms of the softmax's sums, of base 2."""
    (B, H, T, C), (K, S) = q.shape, k.shape[1:3]
    out, lse = outputs(q, K)
    with torch.cuda.device_of(q):
        options = configuration("forward" if lse.shape[2] > DECODE_ROWS else "decode", C, q.dtype)
        _forward[(triton.cdiv(lse.shape[2], options["BLOCK_M"]) * B * K,)](
            *strided(q, k, v, start, end, out), lse, T, S, K, SCALE=scale, CAUSAL=causal, G=H // K, **options
        )
    return out, lse


def outputs(q: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Room for out, which lies in memory as [B, T, H, C], ready to be flattened, and for lse."""
    B, H, T, C = q.shape
    lse = q.new_empty((B, K, H // K * T), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((B, T, H, C)).transpose(1, 2), lse


def strided(*tensors: Tensor | None) -> list:
    """Each with its strides, as the kernels take them."""
    return [None if x is None else (x, x.stride()) for x in tensors]


@attention_op.register_fake
def _(q, k, v, start, end, causal, scale):
    return outputs(q, k.shape[1])


@torch.library.custom_op("minillm::attention_backward", mutates_args=())
def attention_backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    (B, H, T, C), (K, S) = q.shape, k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta, R, G = torch.empty_like(lse), lse.shape[2], H // K
    shared = {"SCALE": scale, "CAUSAL": causal, "G": G}
    with torch.cuda.device_of(q):
        options = configuration("dq", C, q.dtype)
        _backward_dq[(triton.cdiv(R, options["BLOCK_M"]) * B * K,)](
            *strided(q, k, v, start, end, out, d_out, dq), lse, delta, T, S, K, **shared, **options
        )
        options = configuration("dkdv", C, q.dtype)
        BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]
        blocks, key_blocks = triton.cdiv(R, BLOCK_M), triton.cdiv(S, BLOCK_N)
        blocks_of = q.new_empty((B, key_blocks, blocks), dtype=torch.int32)
        counts_of = q.new_empty((B, key_blocks, 2), dtype=torch.int32)
        _list_row_blocks[(B * key_blocks,)](
            *strided(start, end), blocks_of, counts_of, T, S, causal, G, BLOCK_M, BLOCK_N, LIST_CHUNK, **FUSED
        )
        _backward_dkdv[(key_blocks * B * K,)](
            *strided(q, k, v, start, end, d_out, dk, dv), lse, delta, blocks_of, counts_of, T, S, K,
            **shared, **options,
        )  # fmt: skip
    return dq, dk, dv


@attention_backward_op.register_fake
def _(d_out, q, k, v, start, end, out, lse, causal, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, d_out, d_lse):
    return *attention_backward_op(d_out, *ctx.saved_tensors, ctx.causal, ctx.scale), *[None] * 4


attention_op.register_autograd(_backward, setup_context=_save)
