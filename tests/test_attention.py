"""Interval attention against its NumPy float64 reference, and the laws any attention obeys."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.attention import attention

# Sums of at most a few hundred products of standard normals: float32 rounds each at 6e-8 of values
# near ten, float64 at 1e-16.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}
LAYOUTS = ("contiguous", "transposed", "sliced", "stride 0")
BOUNDS = ("none", "start", "end", "both")

sizes = st.sampled_from([1, 2, 3, 5, 8, 17, 33])
cases = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "T": sizes,
        "S": sizes,
        "K": st.integers(1, 3),
        "group": st.integers(1, 3),
        "C": st.sampled_from([1, 2, 7, 16, 40]),
        "bounds": st.sampled_from(BOUNDS),
        "causal": st.booleans(),
        "layout": st.sampled_from(LAYOUTS),
        "scale": st.sampled_from([None, 0.3, 1.0]),
        "seed": st.integers(0, 2**16),
    }
)


def lay_out(x, layout):
    """x under other strides; "stride 0" repeats its first entry along the first axis of many."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "stride 0":
        return x[:1, :, :1].expand_as(x)
    return x


def draw(case, dtype=torch.float32):
    """Operands that require gradients, the bounds, and an upstream gradient."""
    generator = torch.Generator().manual_seed(case["seed"])
    B, T, S, K, C = (case[name] for name in "BTSKC")
    queries, keys = (B, K * case["group"], T, C), (B, K, S, C)
    shapes = [queries, keys, keys, queries]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    q, k, v, upstream = (lay_out(x, case["layout"]).detach() for x in tensors)
    low = torch.randint(-2, S + 2, (B, T), generator=generator, dtype=torch.int32)
    high = torch.randint(-2, S + 3, (B, T), generator=generator, dtype=torch.int32)
    options = {
        "start": low if case["bounds"] in ("start", "both") else None,
        "end": high if case["bounds"] in ("end", "both") else None,
        "causal": case["causal"],
        "scale": case["scale"],
    }
    return [x.requires_grad_() for x in (q, k, v)], upstream, options


def run(f, operands, upstream, **options):
    """[output, dq, dk, dv] of a PyTorch attention."""
    out = f(*operands, **options)
    return [out.detach(), *torch.autograd.grad(out, operands, upstream)]


def run_reference(operands, upstream, **options):
    arrays = [x.detach().double().numpy() for x in operands]
    options = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    d_out = upstream.double().numpy()
    out = reference.attention(*arrays, **options)
    return [out, *reference.attention_backward(d_out, *arrays, **options)]


def plain_attention(q, k, v, start=None, end=None, causal=True, scale=None):
    """What one writes in PyTorch without thinking about it; the peer of the low-precision rule."""
    B, H, T, C = q.shape
    S = k.shape[2]
    bounds = [None if x is None else x.numpy() for x in (start, end)]
    seen = torch.from_numpy(reference.visible_keys(B, T, S, *bounds, causal))[:, None]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    z = (q @ k.mT) * (C**-0.5 if scale is None else scale)
    p = z.masked_fill(~seen, -torch.inf).softmax(-1)
    return p.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positions(rows):
    return torch.tensor(rows, dtype=torch.int32)


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual.detach(), expected.detach(), atol=tolerance, rtol=tolerance)


EMPTY_ROWS = {"B": 2, "T": 8, "S": 3, "K": 1, "group": 2, "C": 7, "bounds": "both"}
EMPTY_ROWS |= {"causal": True, "layout": "contiguous", "scale": None, "seed": 0}


@settings(max_examples=150, deadline=None)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
@example(case=EMPTY_ROWS, dtype=torch.float32)
def test_output_and_every_gradient_equal_the_reference(case, dtype):
    operands, upstream, options = draw(case, dtype)
    actual = run(attention, operands, upstream, **options)
    expected = run_reference(operands, upstream, **options)
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.double(), e, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name)


@settings(max_examples=100, deadline=None)
@given(case=cases, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
@example(case=EMPTY_ROWS, dtype=torch.bfloat16)
def test_low_precision_is_at_most_twice_as_far_from_float64_as_plain_pytorch(case, dtype):
    operands, upstream, options = draw(case, dtype)
    actual = run(attention, operands, upstream, **options)
    peer = run(plain_attention, operands, upstream, **options)
    expected = run_reference(operands, upstream, **options)
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, peer, expected, strict=True):
        # Floor: two roundings of the largest value, whose sum of products may be rounded midway.
        floor = 2 * torch.finfo(dtype).eps * (np.abs(e).max() + 1e-2)
        error, plain = (np.abs(x.double().numpy() - e).max() for x in (a, p))
        assert a.dtype == dtype and error <= 2 * plain + floor, f"{name}: {error}, plain {plain}"


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_passes_in_float64(bounds, causal):
    case = EMPTY_ROWS | {"T": 4, "C": 2, "bounds": bounds, "causal": causal, "seed": 3}
    operands, _, options = draw(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **options), operands)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 20), st.booleans(), st.integers(0, 99))
def test_what_comes_later_never_changes_a_causal_prefix(prefix, more, bfloat16, seed):
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    q, k, v = (normal(1, 2, prefix + more, 8, seed=seed + i, dtype=dtype) for i in range(3))
    short = attention(*(x[:, :, :prefix] for x in (q, k, v)))
    full = attention(q, k, v)[:, :, :prefix]
    assert_close(full.float(), short.float(), 2e-2 if bfloat16 else 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_packed_documents_equal_separate_runs_forward_and_backward(lengths, seed):
    T = sum(lengths)
    operands = [normal(1, 2, T, 8, seed=seed + i).requires_grad_() for i in range(3)]
    upstream = normal(1, 2, T, 8, seed=seed + 3)
    firsts = np.cumsum([0, *lengths[:-1]])
    packed = run(attention, operands, upstream, start=positions([np.repeat(firsts, lengths).tolist()]))
    pieces = [
        run(attention, [x[:, :, i : i + n] for x in operands], upstream[:, :, i : i + n])
        for i, n in zip(firsts, lengths, strict=True)
    ]
    for whole, *parts in zip(packed, *pieces, strict=True):
        assert_close(whole, torch.cat(parts, dim=2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 99))
def test_a_window_ignores_the_keys_before_it_and_a_wide_one_ignores_none(T, window, seed):
    q, k, v = (normal(1, 2, T, 8, seed=seed + i) for i in range(3))
    out = attention(q, k, v, start=positions([[t + 1 - window for t in range(T)]]))
    first = max(T - window, 0)
    last = attention(q[:, :, -1:], k[:, :, first:], v[:, :, first:])
    assert_close(out[:, :, -1:], last)
    if window >= T:
        assert_close(out, attention(q, k, v))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_padding_changes_no_row_whatever_it_holds(lengths, half, seed):
    dtype = torch.bfloat16 if half else torch.float32
    B, S = len(lengths), 10
    q = normal(B, 4, 1, 8, seed=seed, dtype=dtype)
    k, v = (normal(B, 2, S, 8, seed=seed + 1 + i, dtype=dtype) for i in range(2))
    out = attention(q, k, v, end=positions([[n] for n in lengths]), causal=False)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = 1e4, -1e4
        if n:
            alone = attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            assert_close(out[b : b + 1].float(), alone.float(), 2e-2 if half else 1e-5)
        else:
            assert not out[b].any()
    torch.testing.assert_close(attention(q, k, v, end=positions([[n] for n in lengths]), causal=False), out)


def test_decoding_one_token_at_a_time_over_a_cache_equals_the_whole_forward_pass():
    q, k, v = normal(2, 4, 12, 8), normal(2, 2, 12, 8, seed=1), normal(2, 2, 12, 8, seed=2)
    whole = attention(q, k, v)
    for t in range(12):
        token = q[:, :, t : t + 1]
        end = positions([[t + 1]] * 2)
        assert_close(attention(token, k, v, end=end, causal=False), whole[:, :, t : t + 1])
        # Queries are the last of the keys: a chunk of a prompt after its cached prefix.
        assert_close(attention(q[:, :, t:], k, v), whole[:, :, t:])


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_grouped_queries_equal_repeated_keys_and_sum_their_gradients(case):
    (q, k, v), upstream, options = draw(case)
    grouped = run(attention, (q, k, v), upstream, **options)
    repeated = [x.repeat_interleave(case["group"], dim=1) for x in (k, v)]
    out = attention(q, *repeated, **options)
    expected = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    for a, e in zip(grouped, expected, strict=True):
        assert_close(a, e, 3e-5)


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_the_bounds_say_the_same_as_causal_does(case):
    operands, upstream, _ = draw(case)
    T, S = case["T"], case["S"]
    end = positions([[t + S - T + 1 for t in range(T)]] * case["B"])
    implicit = run(attention, operands, upstream)
    explicit = run(attention, operands, upstream, end=end, causal=False)
    for a, e in zip(implicit, explicit, strict=True):
        assert_close(a, e, 3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_no_key_give_zeros_and_pass_no_gradient(dtype):
    q, k, v = (normal(2, 2, 5, 8, seed=i, dtype=dtype).requires_grad_() for i in range(3))
    start = positions([[0, 1, 5, 3, 0], [5] * 5])  # row 0: query 2 sees nothing; row 1: none does
    out, dq, dk, dv = run(attention, (q, k, v), torch.ones_like(q), start=start)
    for x in (out, dq):
        assert not x[0, :, 2].any() and not x[1].any()
        assert x[0, :, 4].any()
    for x in (dk, dv):
        assert not x[1].any() and x[0].any() and x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_visible_key_hands_over_its_value_exactly(dtype):
    q = normal(1, 1, 3, 8, dtype=dtype)
    k, v = (normal(1, 1, 1, 8, seed=i, dtype=dtype) for i in (1, 2))
    assert torch.equal(attention(q, k, v, causal=False), v.expand(1, 1, 3, 8))
    keys = [normal(1, 1, 3, 8, seed=i, dtype=dtype) for i in (3, 4)]
    own = positions([[0, 1, 2]])
    assert torch.equal(attention(q, *keys, start=own, end=own + 1), keys[1])


def test_scores_far_beyond_the_range_of_exp_stay_finite_and_pick_the_largest():
    q, v = torch.full((1, 1, 1, 4), 1e4), normal(1, 1, 3, 4)
    k = torch.tensor([1e4, 2e4, 3e4]).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    assert torch.equal(attention(q, k, v), v[:, :, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "S"), [(0, 2, 2), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_attend_from_or_to_gives_zeros_of_the_right_shape(B, T, S, dtype):
    q, k = normal(B, 4, T, 8, dtype=dtype), normal(B, 2, S, 8, dtype=dtype)
    for options in ({}, {"end": torch.ones(B, T, dtype=torch.int32), "causal": False}):
        out = attention(q, k, k, **options)
        assert out.shape == q.shape and (S > 0 or not out.any())


def test_a_gradient_can_be_asked_for_twice():
    operands, upstream, options = draw(EMPTY_ROWS | {"T": 3, "bounds": "start"})
    out = attention(*operands, **options)
    first = torch.autograd.grad(out, operands, upstream, retain_graph=True)
    second = torch.autograd.grad(out, operands, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_autocast_mixed_operands_meet_in_its_dtype():
    q, k, v = normal(1, 2, 6, 8), normal(1, 2, 6, 8, seed=1), normal(1, 2, 6, 8, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v)
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v))


def test_bad_arguments_end_in_one_line_that_names_them():
    q, k = normal(1, 3, 4, 8), normal(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"3 query heads .* 2 key heads"):
        attention(q, k, k)
    with pytest.raises(ValueError, match=r"'flash': there are None and 'torch'"):
        attention(q, q, q, impl="flash")
