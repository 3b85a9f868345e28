"""Cross-entropy, over logits and fused with its projection, against NumPy float64 and its laws."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_entropy as module
from kernels import reference
from kernels.cross_entropy import cross_entropy, linear_cross_entropy

# Losses and gradients of size ten or so, from float32 sums of a few hundred terms; and in float64.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-11}
REDUCTIONS = ("mean", "sum", "none")
LAYOUTS = ("contiguous", "transposed", "sliced", "stride 0")

cases = st.fixed_dictionaries(
    {
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


def lay_out(x, layout):
    """x under other strides; "stride 0" repeats its first row."""
    if layout == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "stride 0":
        return x[:1].expand_as(x)
    return x


def draw(case, dtype=torch.float32, weight_dtype=None):
    """(hidden, weight, targets, upstream): targets reach 0 and V - 1, some or all are ignored."""
    generator = torch.Generator().manual_seed(case["seed"])
    N, D, V = case["N"], case["D"], case["V"]
    hidden = lay_out(torch.randn(N, D, generator=generator).to(dtype), case["layout"]).detach()
    weight = (torch.randn(V, D, generator=generator) * D**-0.5).to(weight_dtype or dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = V - 1, 0
    targets[torch.rand(N, generator=generator) < case["ignored"]] = case["ignore_index"]
    upstream = torch.randn(N if case["reduction"] == "none" else (1,), generator=generator)
    upstream = lay_out(upstream, case["layout"]).to(torch.promote_types(dtype, torch.float32))
    upstream = upstream if case["reduction"] == "none" else upstream[0]
    weight = lay_out(weight, "transposed" if case["layout"] == "transposed" else "contiguous")
    return hidden.requires_grad_(), weight.detach().requires_grad_(), targets, upstream


def options_of(case):
    return {name: case[name] for name in ("ignore_index", "reduction")}


def numpy64(*tensors):
    return [x.detach().double().numpy() if x.is_floating_point() else x.numpy() for x in tensors]


def run(f, operands, targets, upstream, **options):
    """[loss, gradient of each operand] of a PyTorch loss."""
    loss = f(*operands, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss, operands, upstream)]


def run_reference(f, backward, operands, targets, upstream, **options):
    """The same of a NumPy pair; a lone gradient becomes a list of one."""
    arrays = numpy64(*operands, targets)
    gradients = backward(*numpy64(upstream), *arrays, **options)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [f(*arrays, **options), *gradients]


def run_linear_reference(*arguments, **options):
    f, backward = reference.linear_cross_entropy, reference.linear_cross_entropy_backward
    return run_reference(f, backward, *arguments, **options)


def plain(hidden, weight, targets, **options):
    """The one line of PyTorch that the fused loss replaces."""
    return F.cross_entropy(hidden @ weight.to(hidden.dtype).T, targets, **options)


def largest(x):
    """The largest magnitude; the nan of a mean over no rows counts as nothing."""
    return np.nan_to_num(np.abs(x)).max(initial=0.0)


def distance(actual, expected):
    actual = actual.double().numpy()
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    return largest(actual - expected)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=120, deadline=None)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
def test_loss_and_gradient_over_logits_equal_the_reference(case, dtype):
    hidden, weight, targets, upstream = draw(case, dtype)
    logits = lay_out((hidden @ weight.T).detach(), case["layout"]).requires_grad_()
    actual = run(cross_entropy, [logits], targets, upstream, **options_of(case))
    expected = run_reference(
        reference.cross_entropy,
        reference.cross_entropy_backward,
        *([logits], targets, upstream),
        **options_of(case),
    )
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.double(), e, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=200, deadline=None)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
def test_fused_loss_and_both_gradients_equal_the_reference(case, dtype):
    *operands, targets, upstream = draw(case, dtype)
    actual = run(linear_cross_entropy, operands, targets, upstream, **options_of(case))
    expected = run_linear_reference(operands, targets, upstream, **options_of(case))
    for name, a, e in zip(("loss", "d hidden", "d weight"), actual, expected, strict=True):
        assert a.dtype == dtype
        tolerance = TOLERANCE[dtype] * max(1.0, largest(e))
        np.testing.assert_allclose(a.double(), e, atol=tolerance, rtol=0, err_msg=name)


@settings(max_examples=100, deadline=None)
@given(case=cases, mixed=st.booleans())
def test_bfloat16_is_at_most_twice_as_far_from_float64_as_plain_pytorch(case, mixed):
    weight_dtype = torch.float32 if mixed else torch.bfloat16
    *operands, targets, upstream = draw(case, torch.bfloat16, weight_dtype)
    actual = run(linear_cross_entropy, operands, targets, upstream, **options_of(case))
    peer = run(plain, operands, targets, upstream.bfloat16(), **options_of(case))
    expected = run_linear_reference(operands, targets, upstream, **options_of(case))
    largest_logit = largest(np.inner(*numpy64(*operands)))
    assert actual[1].dtype == torch.bfloat16 and actual[2].dtype == weight_dtype
    for name, a, p, e in zip(("loss", "d hidden", "d weight"), actual, peer, expected, strict=True):
        # Floor: a logit z rounded to 8 bits moves a loss by 2^-8 z and a gradient by that share.
        scale = max(1.0, largest(e)) if name == "loss" else largest(e) + 1e-3
        floor = 2**-8 * scale * (1.0 + largest_logit)
        error, allowed = distance(a, e), 2 * distance(p, e) + floor
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_passes_in_float64(reduction):
    hidden, weight = (normal(n, 3, seed=n, dtype=torch.float64).requires_grad_() for n in (6, 5))
    targets = torch.tensor([0, 4, -100, 2, 2, 1])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction), (hidden, weight)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for_are_made(reduction, wanted):
    operands = [normal(7, 4), normal(9, 4, seed=1)]
    targets = torch.arange(7)
    both = [x.clone().requires_grad_() for x in operands]
    some = [x.clone().requires_grad_(w) for x, w in zip(operands, wanted, strict=True)]
    linear_cross_entropy(*both, targets, reduction=reduction).sum().backward()
    loss = linear_cross_entropy(*some, targets, reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if loss.requires_grad:
        loss.sum().backward()
    for b, s, w in zip(both, some, wanted, strict=True):
        assert torch.equal(b.grad, s.grad) if w else s.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operands_used_elsewhere_and_backward_run_twice_give_the_whole_gradient(reduction):
    """Weights tied to an embedding, hidden states with a second head, two backward passes."""

    def gradients(loss_of):
        hidden, weight = (normal(n, 4, seed=n).requires_grad_() for n in (7, 9))
        h, w = hidden * 2, weight.tanh()
        loss = loss_of(h, w, targets, reduction=reduction).square().sum()
        total = loss + (h**2).sum() + (w * w).sum()
        total.backward(retain_graph=True)
        total.backward()
        return hidden.grad, weight.grad

    targets = torch.tensor([0, 8, 1, -100, 3, 3, 5])
    for a, e in zip(gradients(linear_cross_entropy), gradients(plain), strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases, offset=st.sampled_from([1.0, -30.0, 1e4]))
def test_moving_all_logits_of_a_row_changes_nothing_and_its_gradient_sums_to_zero(case, offset):
    hidden, weight, targets, _ = draw(case, torch.float64)
    logits = (hidden @ weight.T).detach().requires_grad_()
    ignore = case["ignore_index"]
    losses = cross_entropy(logits, targets, ignore, "none")
    moved = cross_entropy(logits + offset, targets, ignore, "none")
    torch.testing.assert_close(moved, losses, atol=1e-9, rtol=1e-9)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(len(logits), dtype=torch.float64))
    assert not gradient[targets == ignore].any() and not losses[targets == ignore].any()
    # The same through the projection: a column of ones in `hidden` meets the offset in `weight`.
    h = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    w = torch.cat([weight, torch.full((len(weight), 1), offset)], 1)
    fused = linear_cross_entropy(h, w, targets, ignore, "none")
    torch.testing.assert_close(fused, losses, atol=1e-9, rtol=1e-9)


def test_a_very_large_common_offset_costs_no_more_than_the_rounding_of_the_logits():
    hidden, weight = torch.tensor([[1.0, 1e6]]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    for target, z in ((0, 0.0), (1, 1.0), (2, 3.0)):
        expected = np.log(1 + np.e + np.e**3) - z
        loss = linear_cross_entropy(hidden, weight, torch.tensor([target]))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be():
    never = -torch.inf
    logits = torch.tensor([[1.0, never, 2.0], [never, never, 0.0]], requires_grad=True)
    targets = torch.tensor([2, 2])
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [never], [2.0]])
    loss = cross_entropy(logits, targets, reduction="none")
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), [np.log1p(np.exp(-1)), 0.0], rtol=1e-6)
    assert logits.grad.isfinite().all() and not logits.grad[:, 1].any() and not logits.grad[1].any()
    np.testing.assert_allclose(linear_cross_entropy(hidden, weight, targets[:1]), loss[0].detach())
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])) == torch.inf


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_left_behaves_as_torch_does(N, reduction):
    operands = normal(N, 4).requires_grad_(), normal(9, 4).requires_grad_()
    targets = torch.full((N,), -100)
    upstream = torch.ones(N) if reduction == "none" else torch.tensor(1.0)
    actual = run(linear_cross_entropy, operands, targets, upstream, reduction=reduction)
    expected = run(plain, operands, targets, upstream, reduction=reduction)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_a_permuted_vocabulary_permutes_the_gradient_of_the_weight(case):
    hidden, weight, targets, upstream = draw(case | {"ignore_index": -100}, torch.float64)
    order = torch.randperm(case["V"], generator=torch.Generator().manual_seed(case["seed"]))
    renamed = torch.where(targets < 0, targets, order.argsort()[targets.clamp(0)])
    options = {"reduction": case["reduction"]}
    base = run(linear_cross_entropy, (hidden, weight), targets, upstream, **options)
    moved_weight = weight.detach()[order].requires_grad_()
    moved = run(linear_cross_entropy, (hidden, moved_weight), renamed, upstream, **options)
    for a, e in zip(moved, (base[0], base[1], base[2][order]), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(case=cases, rows=st.integers(1, 40))
def test_the_size_of_a_chunk_is_invisible(case, rows):
    hidden, weight, targets, upstream = draw(case, torch.float64)
    whole = run(linear_cross_entropy, (hidden, weight), targets, upstream, **options_of(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_LOGITS", 1)
        patch.setattr(module, "CHUNK_ROWS", rows)
        parts = run(linear_cross_entropy, (hidden, weight), targets, upstream, **options_of(case))
    for a, e in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_under_autocast_the_products_run_in_its_dtype_and_gradients_return_in_the_operands():
    hidden, weight = normal(7, 4).requires_grad_(), normal(9, 4, seed=1).requires_grad_()
    targets = torch.arange(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
        loss.sum().backward()  # inside the context, where products of float32 would be cast as well
    expected = linear_cross_entropy(hidden.bfloat16(), weight, targets, reduction="none")
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_int32_targets_are_as_good_as_int64():
    hidden, weight, targets = normal(7, 4), normal(9, 4), torch.arange(7)
    for loss in (linear_cross_entropy, lambda h, w, t: cross_entropy(h @ w.T, t)):
        assert torch.equal(loss(hidden, weight, targets.int()), loss(hidden, weight, targets))


@pytest.mark.parametrize("bad", [9, -1, 10**6])
def test_a_target_outside_the_vocabulary_is_named_with_its_row(bad):
    hidden, weight, targets = normal(4, 4), normal(9, 4), torch.tensor([0, -100, 1, bad])
    for loss in (linear_cross_entropy, lambda h, w, t: cross_entropy(h @ w.T, t)):
        with pytest.raises(IndexError, match=rf"^target {bad} in row 3 is outside 0\.\.8$"):
            loss(hidden, weight, targets)


def test_unknown_options_end_in_one_line_that_lists_what_exists():
    hidden, weight, targets = normal(4, 4), normal(9, 4), torch.arange(4)
    with pytest.raises(ValueError, match=r"'median'.*'mean', 'sum' and 'none'"):
        linear_cross_entropy(hidden, weight, targets, reduction="median")
    with pytest.raises(ValueError, match=r"'liger'.*None and 'torch'"):
        cross_entropy(hidden @ weight.T, targets, impl="liger")


PEAKS = """
import sys, torch, torch.nn.functional as F
from kernels.cross_entropy import linear_cross_entropy

def peak_kb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
N, D, V = map(int, sys.argv[1:])
hidden = torch.randn(N, D, requires_grad=True)
weight = torch.randn(V, D, requires_grad=True)
targets = torch.randint(0, V, (N,))
F.cross_entropy(hidden[:2] @ weight.T, targets[:2]).backward()
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
