"""Interval attention in both versions: against its NumPy float64 reference, and the laws any attention obeys.

Without a GPU Triton's kernels run interpreted, with blocks of 16 to 64 rows and keys: sizes from 17 on
cross their borders.
"""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import losses, reference
from kernels.attention import attention
from kernels.dispatch import runs_triton

# Sums of at most a few hundred products of standard normals: float32 rounds each at 6e-8 of values
# near ten, float64 at 1e-16.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}
LAYOUTS = ("contiguous", "transposed", "sliced", "stride 0")
BLOCKS = ((16, 16), (16, 32), (32, 16), (64, 16))  # rows and keys of Triton's, where it is interpreted
# "wide" bounds leave blocks of keys which every query sees wholly, as random ones hardly ever do.
BOUNDS = ("none", "start", "end", "both", "wide")

both_versions = pytest.mark.parametrize("impl", ["torch", "triton"])
cases = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "T": st.sampled_from([1, 2, 3, 8, 17]),
        "S": st.sampled_from([1, 2, 3, 8, 17, 33]),
        "K": st.integers(1, 2),
        "group": st.integers(1, 2),
        "C": st.sampled_from([1, 2, 7, 16, 40]),
        "bounds": st.sampled_from(BOUNDS),
        "causal": st.booleans(),
        "layout": st.sampled_from(LAYOUTS),
        "scale": st.sampled_from([None, 0.3, 1.0, 0.0, -0.5]),
        "blocks": st.sampled_from(BLOCKS),
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


def draw(case, device, dtype=torch.float32):
    """Operands that require gradients, an upstream gradient, and the options."""
    generator = torch.Generator().manual_seed(case["seed"])
    B, T, S, K, C = (case[name] for name in "BTSKC")
    queries, keys = (B, K * case["group"], T, C), (B, K, S, C)
    shapes = [queries, keys, keys, queries]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    q, k, v, upstream = (lay_out(x, case["layout"]).detach() for x in tensors)
    wide = case["bounds"] == "wide"
    low = torch.randint(-2, S // 3 + 1 if wide else S + 2, (B, T), generator=generator, dtype=torch.int32)
    high = torch.randint(S - S // 3 if wide else -2, S + 3, (B, T), generator=generator, dtype=torch.int32)
    options = {
        "start": low.to(device) if case["bounds"] in ("start", "both", "wide") else None,
        "end": high.to(device) if case["bounds"] in ("end", "both", "wide") else None,
        "causal": case["causal"],
        "scale": case["scale"],
    }
    return [x.requires_grad_() for x in (q, k, v)], upstream, options


@contextmanager
def blocks_of(case):
    """Triton's blocks of rows and keys, and lists of blocks of rows that are made two at a time."""
    attention_triton = pytest.importorskip("kernels.attention_triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_triton, "SMALLEST", (*case["blocks"], 8, 1))
        patch.setattr(attention_triton, "LIST_CHUNK", 2)
        yield


def run(f, operands, upstream, **options):
    """[output, dq, dk, dv] of a PyTorch attention."""
    out = f(*operands, **options)
    return [out.detach(), *torch.autograd.grad(out, operands, upstream)]


def float64(x):
    return x.detach().double().cpu().numpy()


def run_reference(operands, upstream, **options):
    arrays = [float64(x) for x in operands]
    options = {n: x.cpu().numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out = reference.attention(*arrays, **options)
    return [out, *reference.attention_backward(float64(upstream), *arrays, **options)]


def plain_attention(q, k, v, start=None, end=None, causal=True, scale=None):
    """What one writes in PyTorch without thinking about it; the peer of the low-precision rule."""
    B, H, T, C = q.shape
    S = k.shape[2]
    bounds = [None if x is None else x.cpu().numpy() for x in (start, end)]
    seen = torch.from_numpy(reference.visible_keys(B, T, S, *bounds, causal))[:, None].to(q.device)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    z = (q @ k.mT) * (C**-0.5 if scale is None else scale)
    p = z.masked_fill(~seen, -torch.inf).softmax(-1)
    return p.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v


def delta_noise(operands, upstream, out, **options):
    """What rounding `out` does to dq and dk, in units of eps, if delta = sum_c d_out * out is taken from it.

    Every fused attention does. Four standard deviations of delta are about |d_out * out| eps; each moves
    all dz of its row by p times as much, hence dq by scale * p k and dk by scale * p^T q times as much.
    """
    q, k, _ = (float64(x) for x in operands)
    options = {n: x.cpu().numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    scale = q.shape[3] ** -0.5 if options["scale"] is None else abs(options["scale"])
    p = reference.attention_weights(q, k, **options)
    delta = np.linalg.norm(float64(upstream) * out, axis=-1, keepdims=True)
    dq = delta * np.abs(p @ reference.repeat_heads(k, q.shape[1]))
    dk = np.sqrt(reference.sum_heads(np.swapaxes(p**2, 2, 3) @ (delta * q) ** 2, k.shape[1]))
    return scale * dq.max(), scale * dk.max()


def normal(device, *shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def positions(device, rows):
    return torch.tensor(rows, dtype=torch.int32, device=device)


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(float64(actual), float64(expected), atol=tolerance, rtol=tolerance)


EMPTY_ROWS = {"B": 2, "T": 8, "S": 3, "K": 1, "group": 2, "C": 7, "bounds": "both"}
EMPTY_ROWS |= {"causal": True, "layout": "contiguous", "scale": None, "seed": 0, "blocks": (16, 16)}
# Several blocks of rows and keys: skipped ones, masked ones, and ones without a mask.
MANY = EMPTY_ROWS | {"B": 1, "T": 25, "S": 50, "C": 16, "bounds": "wide", "blocks": (16, 32)}
CAUSAL_BLOCKS = MANY | {"T": 50, "S": 50, "group": 1, "bounds": "none", "blocks": (32, 16)}
# More queries than keys, and a group that does not divide the blocks of rows.
TALL_BLOCKS = MANY | {"T": 33, "S": 20, "group": 3, "bounds": "start", "causal": False, "blocks": (32, 16)}
# A few rows over many keys; with random bounds some see none.
DECODING = MANY | {"B": 2, "T": 2, "S": 100, "bounds": "both"}
# Here the rounding of `out` shows in dq.
ROUNDED_DELTA = MANY | {"T": 17, "S": 2, "group": 1, "C": 40, "bounds": "none", "seed": 1}
PLAIN_DECODING = DECODING | {"T": 1, "C": 40, "bounds": "none"}


@both_versions
@settings(max_examples=18)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
@example(case=EMPTY_ROWS, dtype=torch.float32)
@example(case=MANY, dtype=torch.float64)
@example(case=MANY | {"blocks": (64, 16), "T": 70, "group": 1, "scale": -0.5}, dtype=torch.float64)
@example(case=CAUSAL_BLOCKS, dtype=torch.float64)
@example(case=CAUSAL_BLOCKS | {"blocks": (16, 32), "S": 70}, dtype=torch.float64)
@example(case=TALL_BLOCKS, dtype=torch.float64)
@example(case=DECODING, dtype=torch.float64)
@example(case=PLAIN_DECODING, dtype=torch.float32)
def test_output_and_every_gradient_equal_the_reference(device, impl, case, dtype):
    operands, upstream, options = draw(case, device, dtype)
    with blocks_of(case):
        actual = run(attention, operands, upstream, **options, impl=impl)
    expected = run_reference(operands, upstream, **options)
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(float64(a), e, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name)


@both_versions
@settings(max_examples=11)
@given(case=cases, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
@example(case=EMPTY_ROWS, dtype=torch.bfloat16)
@example(case=MANY, dtype=torch.bfloat16)
@example(case=CAUSAL_BLOCKS, dtype=torch.float16)
@example(case=ROUNDED_DELTA, dtype=torch.bfloat16)
@example(case=DECODING, dtype=torch.bfloat16)
def test_low_precision_is_at_most_twice_as_far_from_float64_as_plain_pytorch(device, impl, case, dtype):
    operands, upstream, options = draw(case, device, dtype)
    actual = run(attention, operands, upstream, **options, impl=impl)
    peer = run(plain_attention, operands, upstream, **options)
    expected = run_reference(operands, upstream, **options)
    noises = (0, *delta_noise(operands, upstream, expected[0], **options), 0)
    for name, a, p, e, noise in zip(("out", "dq", "dk", "dv"), actual, peer, expected, noises, strict=True):
        # Floor: two roundings of the largest value, whose sum of products may be rounded midway.
        floor = torch.finfo(dtype).eps * (2 * np.abs(e).max() + 2e-2 + noise)
        error, plain = (np.abs(float64(x) - e).max() for x in (a, p))
        assert a.dtype == dtype and error <= 2 * plain + floor, f"{name}: {error}, plain {plain}"


@pytest.mark.parametrize("bounds", ["none", "both"])
def test_gradients_are_equal_bit_for_bit_from_run_to_run(device, bounds):
    case = MANY | {"T": 40, "S": 300 if device == "cuda" else 40, "bounds": bounds, "C": 64}
    operands, upstream, options = draw(case, device, torch.bfloat16)
    first, second = (run(attention, operands, upstream, **options, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_visible_key_hands_over_its_value_exactly(device, impl, dtype):
    q = normal(device, 1, 1, 3, 8, dtype=dtype)
    k, v = (normal(device, 1, 1, 1, 8, seed=i, dtype=dtype) for i in (1, 2))
    assert torch.equal(attention(q, k, v, causal=False, impl=impl), v.expand(1, 1, 3, 8))
    keys = [normal(device, 1, 1, 3, 8, seed=i, dtype=dtype) for i in (3, 4)]
    own = positions(device, [[0, 1, 2]])
    assert torch.equal(attention(q, *keys, start=own, end=own + 1, impl=impl), keys[1])


@both_versions
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_beyond_the_range_of_exp_stay_finite_and_pick_the_largest(device, impl, sign):
    q = torch.full((1, 1, 1, 4), sign * 1e4, device=device, requires_grad=True)
    v = normal(device, 1, 1, 3, 4)
    k = torch.tensor([1e4, 2e4, 3e4], device=device).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    out = attention(q, k, v, impl=impl)
    assert torch.equal(out, v[:, :, 2:] if sign > 0 else v[:, :, :1])
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.isfinite().all()


@both_versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "S"), [(0, 2, 2), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_attend_from_or_to_gives_zeros_of_the_right_shape(device, impl, B, T, S, dtype):
    q = normal(device, B, 4, T, 8, dtype=dtype).requires_grad_()
    k, v = (normal(device, B, 2, S, 8, dtype=dtype).requires_grad_() for _ in range(2))
    end = torch.ones(B, T, dtype=torch.int32, device=device)
    for options in ({}, {"end": end, "causal": False}):
        out, *gradients = run(attention, (q, k, v), torch.ones_like(q), **options, impl=impl)
        assert out.shape == q.shape and (S > 0 or not out.any())
        assert not any(x.any() for x in gradients if 0 in (B, T, S))


@both_versions
def test_bounds_of_any_integer_type_and_layout_say_the_same(device, impl):
    operands, upstream, options = draw(MANY | {"B": 2}, device)
    expected = run(attention, operands, upstream, **options, impl=impl)
    far = {"start": options["start"].long() * 1, "end": options["end"].long().T.contiguous().T}
    far["end"][far["end"] >= MANY["S"]] += 2**40
    actual = run(attention, operands, upstream, **(options | far), impl=impl)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


@both_versions
def test_autocast_changes_nothing(device, impl):
    q, k, v = (normal(device, 1, 2, 6, 8, seed=seed) for seed in range(3))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attention(q, k, v, impl=impl)
    assert torch.equal(out, attention(q, k, v, impl=impl))


@pytest.mark.parametrize("bounds", ["none", "both"])
def test_the_triton_operator_keeps_the_contract_of_torch_library(device, bounds):
    from kernels.attention_triton import attention_op

    operands, _, options = draw(EMPTY_ROWS | {"bounds": bounds}, device)
    torch.library.opcheck(attention_op, (*operands, options["start"], options["end"], True, 0.5))


Q, K, BOUND = (2, 4, 6, 8), (2, 2, 9, 8), (2, 6)
INTS = torch.int32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": (2, 2, 8, 8)}, r"v has the shape \[2, 2, 9, 8\], not \[B, K, S, C\] with .*S=8"),
        ({"v": (1, 2, 9, 8)}, "v has the shape"),
        ({"k": (3, 2, 9, 8), "v": (3, 2, 9, 8)}, "k has the shape"),
        ({"v": (2, 1, 9, 8)}, "v has the shape"),
        ({"v": (2, 2, 9, 7)}, "v has the shape"),
        ({"q": (4, 6, 8)}, "q has the shape"),
        ({"k": (2, 3, 9, 8), "v": (2, 3, 9, 8)}, "4 query heads do not share 3 key heads evenly"),
        ({"k": (2, 0, 9, 8), "v": (2, 0, 9, 8)}, "4 query heads do not share 0"),
        ({"start": (1, 6)}, "start has the shape"),
        ({"end": (2, 5)}, "end has the shape"),
        ({"end": (2,)}, "end has the shape"),
        ({"q": (2, 4, 6, 8, torch.bfloat16)}, r"torch\.bfloat16, torch\.float32 and torch\.float32"),
        ({"q": (2, 4, 6, 8, INTS)}, "q is torch.int32; give floats"),
        ({"start": (2, 6, torch.float32)}, "start is torch.float32; give integers"),
        ({"impl": "flash"}, "'flash': there are None, 'triton' and 'torch'"),
    ],
)
@both_versions
def test_arguments_that_do_not_fit_end_in_one_line_that_names_them(impl, changes, words, monkeypatch):
    """The same of both versions; shapes that do not fit would be read out of bounds on a GPU."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {"q": Q, "k": K, "v": K, "start": BOUND, "end": BOUND, "impl": impl} | changes
    impl, made = given.pop("impl"), {}
    for name, shape in given.items():
        dtype = INTS if name in ("start", "end") else torch.float32
        if isinstance(shape[-1], torch.dtype):
            *shape, dtype = shape
        made[name] = torch.zeros(shape, dtype=dtype)
    with pytest.raises((ValueError, TypeError), match=words):
        attention(**made, impl=impl)


def test_triton_refuses_heads_wider_than_its_tiles():
    wide = normal("cpu", 1, 1, 2, 257)
    with pytest.raises(ValueError, match="257 wide, Triton's take up to 256"):
        attention(wide, wide, wide, impl="triton")


# --- Faults that were, each with its test ----------------------------------------------------------


@both_versions
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_nobody_sees_may_hold_anything(device, impl, bad, causal):
    """Past `end`, in another document, later in time: neither results nor gradients of others change."""
    q, k, v = (normal(device, 1, 2, 40, 16, seed=i) for i in range(3))
    upstream = normal(device, 1, 2, 40, 16, seed=3)
    start = positions(device, [[0] * 18 + [18] * 22])
    end = positions(device, [[18] * 18 + [37] * 22])
    spoilt = [x.clone() for x in (k, v)]
    for x in spoilt:
        x[:, :, 37:] = bad  # nobody's
        x[:, 0, 5, 3] = bad  # the first document's, of one head
    actual, expected = (
        run(attention, [x.requires_grad_() for x in (q, *keys)], upstream, start=start, end=end,
            causal=causal, impl=impl)
        for keys in (spoilt, (k, v))
    )  # fmt: skip
    touched = slice(5, 18) if causal else slice(18)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = a.clone(), e.clone()
        for x in (a, e):
            x[:, 0, :18] = 0.0  # the head and document that do see it
        assert_close(a, e)
        if i == 0:
            assert not actual[0][:, 0, touched].isfinite().all(-1).any()
    if causal:  # and with no bounds: what comes later
        keys = [x.detach().clone() for x in (k, v)]
        for x in keys:
            x[:, :, 30:] = bad
        assert attention(q, *keys, impl=impl)[:, :, :30].isfinite().all()


@both_versions
def test_an_infinite_key_that_nobody_sees_reaches_no_gradient_behind_a_finite_result(device, impl):
    q, k, v = (normal(device, 1, 1, 20, 16, seed=i) for i in range(3))
    q, end = q.abs().requires_grad_(), positions(device, [[15] * 20])
    k[:, :, 15:] = -torch.inf
    out = attention(q, k, v, end=end, causal=False, impl=impl)
    assert out.isfinite().all() and torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_half_types_on_a_cpu_are_as_exact_as_torchs_fused_kernel():
    """At scores of deviation 4 and 16, and beyond the range of float16; with and without gradients."""
    for spread, dtype in ((2.0, torch.bfloat16), (4.0, torch.bfloat16), (4.0, torch.float16)):
        q, k, v = (normal("cpu", 2, 4, 60, 32, seed=i) for i in range(3))
        q, k, v = (x.to(dtype) for x in (q * spread, k * spread, v))
        exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
        fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        bound = 1.2 * float((fused - exact).abs().max())
        for x in (q, q.clone().requires_grad_()):
            assert float((attention(x, k, v) - exact).abs().max()) <= bound
    huge = torch.full((1, 1, 4, 64), 60.0, dtype=torch.float16)  # scores of 230,400
    assert attention(huge, huge, huge).isfinite().all()
    assert attention(huge.clone().requires_grad_(), huge, huge).isfinite().all()


@both_versions
@pytest.mark.parametrize("bounds", ["none", "both"])
def test_a_compiled_graph_holds_all_of_it_and_serves_every_length(device, impl, bounds, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no graph holds a check of shapes
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, start, end: attention(q * 1, k, v, start, end, impl=impl) + 0,
        fullgraph=True,
        backend="aot_eager",
    )
    for T in (5, 9, 1):
        operands, upstream, options = draw(MANY | {"T": T, "S": T, "bounds": bounds}, device)
        start, end = options["start"], options["end"]
        expected = run(attention, operands, upstream, start=start, end=end, impl=impl)
        for a, e in zip(run(compiled, operands, upstream, start=start, end=end), expected, strict=True):
            assert_close(a, e)


@both_versions
def test_forward_mode_derivatives_are_refused_rather_than_zero(device, impl):
    q, k, v = (normal(device, 1, 1, 3, 8, seed=i) for i in range(3))
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(lambda x: attention(x, k, v, impl=impl), (q,), (torch.ones_like(q),))


@both_versions
def test_a_query_that_is_no_number_gives_nan_rather_than_zero(device, impl):
    q, k, v = (normal(device, 1, 1, 20, 16, seed=i).requires_grad_() for i in range(3))
    with torch.no_grad():
        q[:, :, 18] = torch.nan
    out, dq, _, _ = run(attention, (q, k, v), torch.ones_like(q), impl=impl)
    for x in (out, dq):
        assert x[:, :, 18].isnan().all() and x[:, :, :18].isfinite().all()


def test_the_kernels_are_imported_without_torchs_compiler():
    """It takes as long to load as all the rest of torch; only --compile needs it."""
    code = "import sys, kernels.attention, kernels.losses; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_older_gpus_get_torchs_version(monkeypatch):
    """sm_75 has neither the shared memory that the tiles need nor bfloat16."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    operand = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", 0))
    for major, minor, expected in ((7, 5, False), (8, 0, True), (9, 0, True)):
        found = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert runs_triton(operand) == expected
    operand.dtype = torch.float64
    assert not runs_triton(operand)


# --- What the interpreter cannot show by results ----------------------------------------------------


def test_every_kernel_is_launched_on_its_tensors_device(device, monkeypatch):
    """On a machine of several GPUs Triton launches on the current one."""
    from kernels import attention_triton, rows_triton

    inside, launched = [], set()

    @contextmanager
    def guard(x):
        inside.append(x.device)
        yield
        inside.pop()

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert inside, f"{self.kernel} is launched on whatever device is current"
            launched.add(id(self.kernel))
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    names = "simple_kernel _forward _backward_dq _backward_dkdv _list_row_blocks logprob_kernel"
    names += " logprob_backward_kernel kl_kernel kl_backward_kernel"
    for name in names.split():
        module = attention_triton if hasattr(attention_triton, name) else rows_triton
        monkeypatch.setattr(module, name, Watched(getattr(module, name)))
    operands, upstream, options = draw(EMPTY_ROWS, device)
    run(attention, operands, upstream, **options, impl="triton")
    attention_triton.simple_attention(*(normal(device, 1, 1, 4, 16) for _ in range(3)))
    z = normal(device, 2, 5).requires_grad_()
    said = losses.token_logprobs(z, torch.tensor([0, 1], device=device), impl="triton")
    (said[0] + losses.kl(z, z * 2, impl="triton")).sum().backward()
    assert len(launched) == len(names.split())


def test_float32_products_are_exact_and_not_tf32(device, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if device != "cpu":
        pytest.skip("watches the interpreter")
    asked, product = set(), interpreter.InterpreterBuilder.create_dot

    def watched(self, a, b, d, input_precision, *rest):
        asked.add(str(input_precision))
        return product(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", watched)
    operands, upstream, options = draw(EMPTY_ROWS, device)
    run(attention, operands, upstream, **options, impl="triton")
    assert len(asked) == 1 and "IEEE" in asked.pop()


def test_rows_whose_offsets_pass_31_bits_are_found(device):
    """Rows 2^30 elements apart, in memory of which nearly nothing is touched."""
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=device)
    rows = far.as_strided((1, 1, 3, 8), (0, 0, 2**30, 1))
    rows.copy_(normal(device, 1, 1, 3, 8))
    targets = torch.tensor([3, 0, 7], device=device)

    def outcome(x):
        x = x.detach().requires_grad_()
        said = losses.token_logprobs(x[0, 0], targets, impl="triton")
        divergence = losses.kl(x[0, 0], x[0, 0].flip(0), impl="triton")
        out = attention(x, x, x, impl="triton")
        total = out.sum() + sum(said).sum() + divergence.sum()
        return [out, *said, divergence, *torch.autograd.grad(total, x)]

    for a, e in zip(outcome(rows), outcome(rows.clone()), strict=True):
        assert torch.equal(a, e)


# --- The rungs below --------------------------------------------------------------------------------


@pytest.mark.parametrize("BLOCK_N", [1, 5, 16, 40])
def test_the_softmax_over_blocks_is_the_softmax_in_numpy(BLOCK_N):
    q, k, v = (float64(normal("cpu", 33, 4, seed=i)) for i in range(3))
    whole = reference.attention(*(x[None, None] for x in (q * 9, k, v)))[0, 0]
    np.testing.assert_allclose(reference.attention_over_blocks(q * 9, k, v, BLOCK_N), whole, atol=1e-13)


@pytest.mark.parametrize(("BLOCK_M", "BLOCK_N"), BLOCKS)
@pytest.mark.parametrize("T", [1, 16, 41])
def test_the_simplest_kernel_is_causal_attention(device, T, BLOCK_M, BLOCK_N):
    from kernels.attention_triton import simple_attention

    q, k, v = (normal(device, 2, 2, T, 16, seed=i) for i in range(3))
    assert_close(simple_attention(q, k, v, BLOCK_M, BLOCK_N), reference_of(q, k, v))


def reference_of(*operands):
    return torch.from_numpy(reference.attention(*(float64(x) for x in operands)))
