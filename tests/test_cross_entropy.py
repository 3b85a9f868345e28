"""Cross-entropy, over logits and fused with its projection, against NumPy float64 and its laws."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import IMPLS, TOLERANCE, lay_out, normal, planned, small_blocks  # noqa: F401

from kernels import losses, reference
from kernels.losses import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, on -inf

REDUCTIONS = ("mean", "sum", "none")
LAYOUTS = ("contiguous", "transposed", "sliced", "stride 0")

cases = st.fixed_dictionaries(
    {
        "impl": st.sampled_from(IMPLS),
        "N": st.sampled_from([1, 2, 3, 17, 64, 257, 300]),
        "D": st.sampled_from([1, 3, 16, 33]),
        "V": st.sampled_from([1, 2, 5, 31, 64, 129]),
        "reduction": st.sampled_from(REDUCTIONS),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "ignore_index": st.sampled_from([-100, 0, -1]),
        "layout": st.sampled_from(LAYOUTS),
        "seed": st.integers(0, 2**16),
    }
)


MEAN = {"impl": "triton", "N": 3, "D": 3, "V": 31, "reduction": "mean", "ignored": 0.3, "ignore_index": -100}
MEAN |= {"layout": "contiguous", "seed": 1}


def draw(case, device, dtype=torch.float32, weight_dtype=None):
    """(hidden, weight, targets, upstream): targets reach 0 and V - 1, some or all are ignored.

    Triton's interpreter takes its time for each row, so that there are few.
    """
    generator = torch.Generator().manual_seed(case["seed"])
    N, D, V = case["N"] if case["impl"] == "torch" else min(case["N"], 3), case["D"], case["V"]
    hidden = lay_out(torch.randn(N, D, generator=generator).to(device, dtype), case["layout"]).detach()
    weight = (torch.randn(V, D, generator=generator) * D**-0.5).to(device, weight_dtype or dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = V - 1, 0
    targets[torch.rand(N, generator=generator) < case["ignored"]] = case["ignore_index"]
    upstream = torch.randn(N if case["reduction"] == "none" else (1,), generator=generator)
    upstream = lay_out(upstream.to(device, torch.promote_types(dtype, torch.float32)), case["layout"])
    upstream = upstream if case["reduction"] == "none" else upstream[0]
    weight = lay_out(weight, "transposed" if case["layout"] == "transposed" else "contiguous")
    return hidden.requires_grad_(), weight.detach().requires_grad_(), targets.to(device), upstream


def options_of(case):
    return {name: case[name] for name in ("ignore_index", "reduction", "impl")}


def numpy64(*tensors):
    return [(x.detach().double() if x.is_floating_point() else x).cpu().numpy() for x in tensors]


def run(f, operands, targets, upstream, **options):
    """[loss, gradient of each operand] of a PyTorch loss."""
    loss = f(*operands, targets, **options)
    return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, operands, upstream))]


def run_reference(operands, targets, upstream, impl=None, **options):
    """The same in NumPy, of logits or of (hidden, weight)."""
    *arrays, targets, upstream = numpy64(*operands, targets, upstream)
    z = arrays[0] if len(arrays) == 1 else arrays[0] @ arrays[1].T
    dz = reference.cross_entropy_backward(upstream, z, targets, **options)
    gradients = [dz] if len(arrays) == 1 else reference.linear_backward(dz, *arrays)
    return [reference.cross_entropy(z, targets, **options), *gradients]


def plain(hidden, weight, targets, impl=None, **options):
    """The one line of PyTorch that the fused loss replaces."""
    return F.cross_entropy(hidden @ weight.to(hidden.dtype).T, targets, **options)


def largest(x):
    """The largest magnitude; the nan of a mean over no rows counts as nothing."""
    return np.nan_to_num(np.abs(x)).max(initial=0.0)


def distance(actual, expected):
    actual = actual.double().numpy()
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    return largest(actual - expected)


@settings(max_examples=100)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
def test_loss_and_gradient_over_logits_equal_the_reference(device, case, dtype):
    hidden, weight, targets, upstream = draw(case, device, dtype)
    logits = lay_out((hidden @ weight.T).detach(), case["layout"]).requires_grad_()
    actual = run(cross_entropy, [logits], targets, upstream, **options_of(case))
    expected = run_reference([logits], targets, upstream, **options_of(case))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.double(), e, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=120)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
def test_fused_loss_and_both_gradients_equal_the_reference(device, case, dtype):
    *operands, targets, upstream = draw(case, device, dtype)
    actual = run(linear_cross_entropy, operands, targets, upstream, **options_of(case))
    expected = run_reference(operands, targets, upstream, **options_of(case))
    for name, a, e in zip(("loss", "d hidden", "d weight"), actual, expected, strict=True):
        assert a.dtype == dtype
        tolerance = TOLERANCE[dtype] * max(1.0, largest(e))
        np.testing.assert_allclose(a.double(), e, atol=tolerance, rtol=0, err_msg=name)


@settings(max_examples=60)
@given(case=cases, mixed=st.booleans())
def test_bfloat16_is_at_most_twice_as_far_from_float64_as_plain_pytorch(device, case, mixed):
    weight_dtype = torch.float32 if mixed else torch.bfloat16
    *operands, targets, upstream = draw(case, device, torch.bfloat16, weight_dtype)
    actual = run(linear_cross_entropy, operands, targets, upstream, **options_of(case))
    peer = run(plain, operands, targets, upstream.bfloat16(), **options_of(case))
    expected = run_reference(operands, targets, upstream, **options_of(case))
    largest_logit = largest(np.inner(*numpy64(*operands)))
    assert actual[1].dtype == torch.bfloat16 and actual[2].dtype == weight_dtype
    for name, a, p, e in zip(("loss", "d hidden", "d weight"), actual, peer, expected, strict=True):
        # Floor: a logit z rounded to 8 bits moves a loss by 2^-8 z and a gradient by that share.
        scale = max(1.0, largest(e)) if name == "loss" else largest(e) + 1e-3
        floor = 2**-8 * scale * (1.0 + largest_logit)
        error, allowed = distance(a, e), 2 * distance(p, e) + floor
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_into_one_graph_both_losses_give_the_same(device, reduction, impl, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no graph holds a check of shapes
    torch.compiler.reset()  # every case is another graph of the same code
    operands = [normal(n, 4, seed=n).to(device).requires_grad_() for n in (7, 37)]
    targets = torch.tensor([0, 36, 1, -100, 3, 3, 5], device=device)
    options = {"reduction": reduction, "impl": impl}

    def squares(hidden, weight):
        fused = linear_cross_entropy(hidden, weight, targets, **options)
        return (fused * cross_entropy(hidden @ weight.T, targets, **options)).sum()

    compiled = torch.compile(squares, fullgraph=True, backend="aot_eager")
    eager, whole = (torch.autograd.grad(f(*operands), operands) for f in (squares, compiled))
    for a, e in zip(whole, eager, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_refused_rather_than_wrong(device, reduction, impl):
    hidden, weight = (normal(n, 2, seed=n).to(device).requires_grad_() for n in (4, 5))
    targets = torch.arange(4, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for_are_made(device, reduction, wanted, impl):
    operands = [normal(7, 4).to(device), normal(9, 4, seed=1).to(device)]
    targets = torch.arange(7, device=device)
    both = [x.clone().requires_grad_() for x in operands]
    some = [x.clone().requires_grad_(w) for x, w in zip(operands, wanted, strict=True)]
    linear_cross_entropy(*both, targets, reduction=reduction, impl=impl).sum().backward()
    loss = linear_cross_entropy(*some, targets, reduction=reduction, impl=impl)
    assert loss.requires_grad == any(wanted)
    if loss.requires_grad:
        loss.sum().backward()
    for b, s, w in zip(both, some, wanted, strict=True):
        assert torch.equal(b.grad, s.grad) if w else s.grad is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operands_used_elsewhere_and_backward_run_twice_give_the_whole_gradient(device, reduction, impl):
    """Weights tied to an embedding, hidden states with a second head, two backward passes."""

    def gradients(loss_of):
        hidden, weight = (normal(n, 4, seed=n).to(device).requires_grad_() for n in (7, 9))
        h, w = hidden * 2, weight.tanh()
        loss = loss_of(h, w, targets, reduction=reduction, impl=impl).square().sum()
        total = loss + (h**2).sum() + (w * w).sum()
        total.backward(retain_graph=True)
        total.backward()
        return hidden.grad, weight.grad

    targets = torch.tensor([0, 8, 1, -100, 3, 3, 5], device=device)
    for a, e in zip(gradients(linear_cross_entropy), gradients(plain), strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-5)


def test_a_very_large_common_offset_costs_no_more_than_the_rounding_of_the_logits():
    hidden, weight = torch.tensor([[1.0, 1e6]]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    for target, z in ((0, 0.0), (1, 1.0), (2, 3.0)):
        expected = np.log(1 + np.e + np.e**3) - z
        loss = linear_cross_entropy(hidden, weight, torch.tensor([target]))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_left_behaves_as_torch_does(device, N, reduction, impl):
    operands = [normal(n, 4).to(device).requires_grad_() for n in (N, 9)]
    targets = torch.full((N,), -100, device=device)
    upstream = torch.ones((N,) if reduction == "none" else (), device=device)
    expected = run(plain, operands, targets, upstream, reduction=reduction)

    def over_logits(hidden, weight, targets, **options):
        return cross_entropy(hidden @ weight.T, targets, **options)

    for f in (linear_cross_entropy, over_logits):
        actual = run(f, operands, targets, upstream, reduction=reduction, impl=impl)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


@settings(max_examples=20)
@given(case=cases, rows=st.integers(1, 40), plan=st.sampled_from(sorted(losses.PLANS)))
@example(case=MEAN, rows=2, plan="cuda")
@example(case=MEAN | {"impl": "torch", "N": 17, "reduction": "none"}, rows=5, plan="cuda")
def test_however_the_logits_are_walked_over_the_result_is_the_same(device, case, rows, plan):
    """In chunks of any size, as a CPU walks and as a GPU does, whose rows of logits are padded."""
    hidden, weight, targets, upstream = draw(case, device, torch.float64)
    expected = run_reference((hidden, weight), targets, upstream, **options_of(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.PLANS, device, replace(losses.PLANS[plan], chunk=1, rows=rows, kept=0))
        actual = run(linear_cross_entropy, (hidden, weight), targets, upstream, **options_of(case))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-10, rtol=1e-10)


def test_a_chunk_has_at_least_the_rows_that_make_adding_to_the_weight_worth_it():
    """And logits that are given, or kept, are one chunk."""
    hidden, weight = torch.zeros(1000, 3), torch.zeros(50, 3)
    with pytest.MonkeyPatch.context() as patch:
        for chunk, rows, sizes in ((1, 300, [300, 300, 300, 100]), (50 * 700, 300, [600, 400])):
            planned(patch, chunk=chunk, rows=rows, kept=0)
            chunks = losses.Logits(hidden, weight).chunks()
            assert [len(hidden[i]) for i in chunks] == sizes
        assert len(list(losses.Logits(hidden, None).chunks())) == 1
        planned(patch, kept=50 * 1000)
        assert len(list(losses.Logits(hidden, weight).chunks())) == 1
        assert len(list(losses.Logits(hidden, weight, keep=False).chunks())) == 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_weight_is_summed_in_float32_over_many_chunks(device, dtype, reduction, impl):
    """600 rows say nearly the same. In bfloat16 the sum would stay at 256; products of float16 rounded one
    by one would be inf before the mean divides them."""
    N, size = 600, 1.0 if dtype == torch.bfloat16 else 250.0
    hidden, weight = torch.full((N, 2), size, device=device, dtype=dtype), torch.zeros(3, 2, device=device)
    weight.requires_grad_()
    targets = torch.zeros(N, dtype=torch.int64, device=device)
    with pytest.MonkeyPatch.context() as patch:
        planned(patch, chunk=1, rows=7, kept=0)
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl).sum()
        (gradient,) = torch.autograd.grad(loss / N, weight)
    expected = torch.tensor([[-2 / 3], [1 / 3], [1 / 3]]).expand(3, 2) * size
    torch.testing.assert_close(gradient.cpu(), expected, rtol=2e-3, atol=0)


def test_an_upstream_gradient_scales_half_types_in_float32():
    """2^17, as losses are scaled for float16, is inf in it: a scalar would be taken into its dtype."""
    halves = torch.ones(3, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    ctx = SimpleNamespace(saved_tensors=halves, dtypes=[torch.float32] * 2, needs_input_grad=[True] * 7)
    scaled = losses._scale(ctx, torch.tensor(2.0**17), None, None)
    assert [x.unique().item() for x in scaled[:2]] == [2.0**17] * 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", sorted(losses.PLANS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_an_ignored_row_holds_reaches_no_gradient(device, reduction, plan, impl):
    hidden, weight = normal(4, 3).to(device), normal(9, 3, seed=1).to(device).requires_grad_()
    hidden[1] = torch.nan
    hidden.requires_grad_()
    targets = torch.tensor([0, -100, 8, 3], device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.PLANS, device, losses.PLANS[plan])
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl).sum()
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and d_weight.isfinite().all() and d_hidden.isfinite().all()
    assert not d_hidden[1].any()


@pytest.mark.parametrize("BLOCK", [1, 4, 64])
def test_the_loss_over_blocks_is_the_loss_in_numpy(BLOCK):
    logits, targets = numpy64(normal(5, 37) * 30)[0], np.array([0, 36, 5, 5, 9])
    expected = reference.row_losses(logits, targets)
    np.testing.assert_allclose(reference.row_losses_over_blocks(logits, targets, BLOCK), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_type_say_the_same(dtype, monkeypatch):
    """Compared as int64: 156 is -100 in int8, and 256 tokens have none that uint8 cannot name."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    hidden, weight = normal(4, 4), normal(256, 4)
    targets = torch.tensor([0, 100, 127, 156 if dtype == torch.uint8 else 5])
    for loss in (linear_cross_entropy, lambda h, w, t: cross_entropy(h @ w.T, t)):
        assert torch.equal(loss(hidden, weight, targets.to(dtype)), loss(hidden, weight, targets))


@pytest.mark.parametrize("bad", [9, -1, 10**6])
def test_a_target_outside_the_vocabulary_is_named_with_its_row(bad):
    hidden, weight, targets = normal(4, 4), normal(9, 4), torch.tensor([0, -100, 1, bad])
    for loss in (linear_cross_entropy, lambda h, w, t: cross_entropy(h @ w.T, t)):
        with pytest.raises(IndexError, match=rf"^target {bad} in row 3 is outside 0\.\.8$"):
            loss(hidden, weight, targets)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "words"),
    [
        ((4, 3), (9, 4), (4,), "weight has the shape"),
        ((4, 3), (9, 3), (3,), "targets has the shape"),
        ((4, 3), (9, 3), (1,), "targets has the shape"),
        ((4, 3), (9, 3), (4, 1), "targets has the shape"),
        ((4, 3), (9,), (4,), "weight has the shape"),
        ((4, 3), (0, 3), (4,), "no tokens"),
    ],
)
def test_shapes_that_do_not_fit_end_in_one_line(impl, hidden, weight, targets, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    operands = torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(*operands, impl=impl)
    with pytest.raises(ValueError, match=words):
        losses.linear_token_logprobs(*operands, impl=impl)
    with pytest.raises(TypeError, match="give integers"):
        linear_cross_entropy(operands[0], torch.zeros(9, 3), torch.zeros(4), impl=impl)


def test_unknown_options_end_in_one_line_that_lists_what_exists():
    hidden, weight, targets = normal(4, 4), normal(9, 4), torch.arange(4)
    with pytest.raises(ValueError, match=r"'median'.*'mean', 'sum' and 'none'"):
        linear_cross_entropy(hidden, weight, targets, reduction="median")
    with pytest.raises(ValueError, match=r"'liger'.*None, 'triton' and 'torch'"):
        cross_entropy(hidden @ weight.T, targets, impl="liger")


PEAKS = """
import sys, torch, torch.nn.functional as F
from kernels.losses import linear_cross_entropy

def peak_kb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
N, D, V = map(int, sys.argv[1:])
hidden = torch.randn(N, D, requires_grad=True)
weight = torch.randn(V, D, requires_grad=True)
targets = torch.randint(0, V, (N,))
for rows in (slice(2), slice(2, 4)):  # the first call of either imports what it needs
    F.cross_entropy(hidden[rows] @ weight.T, targets[rows]).backward()
    linear_cross_entropy(hidden[rows], weight, targets[rows]).backward()
hidden.grad = weight.grad = None
before = peak_kb()
linear_cross_entropy(hidden, weight, targets).backward()
fused = peak_kb()
hidden.grad = weight.grad = None
F.cross_entropy(hidden @ weight.T, targets).backward()
print(fused - before, peak_kb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_peak_memory_is_below_a_third_of_plain_pytorch():
    command = [sys.executable, "-c", PEAKS, "2048", "64", "8192"]
    root = Path(__file__).parents[1]
    fused, plain = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.split()
    assert int(fused) < int(plain) / 3
