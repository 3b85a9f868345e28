"""Cross-entropy, log-probability with entropy, and KL: over logits and fused with their projection, against
NumPy float64 and the laws that each obeys."""

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

from kernels import losses, reference
from kernels.losses import (
    cross_entropy,
    kl,
    linear_cross_entropy,
    linear_kl,
    linear_token_logprobs,
    token_logprobs,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, on -inf

IMPLS = ("torch", "triton")
REDUCTIONS = ("mean", "sum", "none")
LINEAR = ("linear_cross_entropy", "linear_token_logprobs", "linear_kl")
KINDS = ("cross_entropy", "token_logprobs", "kl", *LINEAR)
# Losses, values and gradients of size ten or so, from float32 sums of a few hundred terms; and in float64.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-11}
NEVER = -torch.inf

both_versions = pytest.mark.parametrize("impl", IMPLS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
cases = st.fixed_dictionaries(
    {
        "impl": st.sampled_from(IMPLS),
        "N": st.sampled_from([1, 2, 4, 17, 300]),
        "D": st.sampled_from([1, 3, 16, 33]),
        # Below, at and above whole numbers of blocks, which hold 16 to 64.
        "V": st.sampled_from([1, 2, 5, 15, 16, 17, 32, 61, 129]),
        "temperature": st.sampled_from([1.0, 0.5, 0.75, 3.0]),  # exact in float32, as a GPU gets them
        "reduction": st.sampled_from(REDUCTIONS),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "ignore_index": st.sampled_from([-100, 0, -1]),
        "layout": st.sampled_from(["contiguous", "transposed", "sliced", "columns", "stride 0"]),
        "seed": st.integers(0, 2**16),
    }
)
CASE = {"impl": "triton", "N": 4, "D": 3, "V": 37, "temperature": 0.5, "reduction": "mean", "ignored": 0.3}
CASE |= {"ignore_index": -100, "layout": "contiguous", "seed": 3}  # one row of the four is ignored


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 128 bytes, so that a hundred tokens are several blocks and most rows begin inside one.

    And no logits are so few that they are one chunk.
    """
    rows_triton = pytest.importorskip("kernels.rows_triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_triton, "LANES", 4)
        planned(patch, once=0)
        yield


def planned(patch, **changes):
    """The walk over logits with other sizes."""
    patch.setattr(losses, "PLANS", {name: replace(plan, **changes) for name, plan in losses.PLANS.items()})


def lay_out(x, layout):
    """x under other strides; "columns": rows apart by more than their length; "stride 0": all the first."""
    if layout == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "columns" and x.dim() == 2:
        return torch.cat([x[:, :1], x, x[:, :2]], 1)[:, 1 : 1 + x.shape[1]]
    return x[:1].expand_as(x) if layout == "stride 0" else x


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw(kind, case, device, dtype=torch.float32, weight_dtype=None):
    """(operands, options, one upstream gradient for each output): targets reach 0 and V - 1, and of
    cross-entropy some or all are ignored. Triton's interpreter takes its time for each row: there are few."""
    generator = torch.Generator().manual_seed(case["seed"])
    N, D, V = case["N"] if case["impl"] == "torch" else min(case["N"], 4), case["D"], case["V"]
    sides = 2 if "kl" in kind else 1
    shapes = [s for i in range(sides) for s in ([(N, D + i), (V, D + i)] if "linear" in kind else [(N, V)])]
    # Logits of spread 1.5 or so, whatever the width.
    spread = 1.2 * D**-0.25 if "linear" in kind else 1.5
    operands = [lay_out((torch.randn(s, generator=generator) * spread).to(device, dtype), case["layout"])
                for s in shapes]  # fmt: skip
    if weight_dtype:
        operands[1::2] = [x.to(weight_dtype) for x in operands[1::2]]
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = V - 1, 0
    options = {"targets": targets.to(device), "temperature": case["temperature"]} if "token" in kind else {}
    upstream = torch.randn(N, 2, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    upstream = list(lay_out(upstream, case["layout"]).unbind(1))[: 2 if "token" in kind else 1]
    if "entropy" in kind:
        targets[torch.rand(N, generator=generator) < case["ignored"]] = case["ignore_index"]
        options = {name: case[name] for name in ("ignore_index", "reduction")} | {
            "targets": targets.to(device)
        }
        upstream = upstream if case["reduction"] == "none" else [upstream[0][0]]
    return [x.detach().requires_grad_() for x in operands], options, upstream


def listed(x):
    return list(x) if isinstance(x, tuple) else [x]


def products(operands):
    """The logits of each pair of hidden states and output matrix."""
    return [h @ w.to(h.dtype).T for h, w in zip(operands[::2], operands[1::2], strict=True)]


def plain(kind, operands, targets=None, temperature=1.0, **options):
    """The code in PyTorch that an operation replaces."""
    logits = products(operands) if "linear" in kind else operands
    if "entropy" in kind:
        return F.cross_entropy(*logits, targets, **options)
    log_p, *rest = ((z / temperature).log_softmax(1) for z in logits)
    if rest:
        return (log_p.exp() * (log_p - rest[0])).sum(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def with_gradients(f, operands, upstream):
    """[what f gives of the operands, then the gradient of each operand], on the CPU."""
    outputs = listed(f(*operands))
    upstream = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    return [x.detach().cpu() for x in (*outputs, *torch.autograd.grad(outputs, operands, upstream))]


def run(kind, operands, options, upstream, impl):
    return with_gradients(lambda *x: getattr(losses, kind)(*x, **options, impl=impl), operands, upstream)


def run_plain(kind, operands, options, upstream):
    return with_gradients(lambda *x: plain(kind, x, **options), operands, upstream)


def run_reference(kind, operands, options, upstream):
    arrays = [x.detach().cpu().double().numpy() for x in operands]
    upstream = [u.cpu().double().numpy() for u in upstream]
    options = {n: x.cpu().numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    linear, kind = "linear" in kind, kind.removeprefix("linear_")
    logits = [h @ w.T for h, w in zip(arrays[::2], arrays[1::2], strict=True)] if linear else arrays
    outputs = listed(getattr(reference, kind)(*logits, **options))
    gradients = listed(getattr(reference, f"{kind}_backward")(*upstream, *logits, **options))
    if linear:
        pairs = zip(gradients, arrays[::2], arrays[1::2], strict=True)
        gradients = [d for dz, h, w in pairs for d in reference.linear_backward(dz, h, w)]
    return [*outputs, *gradients]


def largest(x):
    """The largest magnitude; the nan of a mean over no rows counts as nothing."""
    return np.nan_to_num(np.abs(x)).max(initial=0.0)


def distance(actual, expected):
    actual = actual.double().numpy()
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    return largest(actual - expected)


# --- Every operation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=36)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
@example(case=CASE | {"V": 1}, dtype=torch.float32)  # shorter than the way back to a 16-byte border
def test_values_and_every_gradient_equal_the_reference(device, kind, case, dtype):
    drawn = draw(kind, case, device, dtype)
    for a, e in zip(run(kind, *drawn, case["impl"]), run_reference(kind, *drawn), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.double(), e, atol=TOLERANCE[dtype] * max(1.0, largest(e)), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=18)
@given(case=cases, dtype=st.sampled_from([torch.bfloat16, torch.float16]), mixed=st.booleans())
def test_half_types_are_at_most_twice_as_far_from_float64_as_plain_pytorch(device, kind, case, dtype, mixed):
    weight_dtype = torch.float32 if mixed and "linear" in kind else None
    drawn = draw(kind, case, device, dtype, weight_dtype)
    actual, peer, expected = (
        run(kind, *drawn, case["impl"]),
        run_plain(kind, *drawn),
        run_reference(kind, *drawn),
    )
    operands, _, upstream = drawn
    logits = products(operands) if "linear" in kind else operands
    # Floor: a logit is rounded by eps of itself and moves a value by as much, a gradient by that share.
    size = 1 + max(float(z.detach().abs().max()) for z in logits) / min(case["temperature"], 1.0)
    for i, (a, p, e) in enumerate(zip(actual, peer, expected, strict=True)):
        assert a.dtype == (torch.float32 if i < len(upstream) else operands[i - len(upstream)].dtype)
        scale = max(1.0, largest(e)) if i < len(upstream) else largest(e) + 1e-3
        assert distance(a, e) <= 2 * distance(p, e) + torch.finfo(dtype).eps * size * scale


@pytest.mark.parametrize("kind", LINEAR)
@settings(max_examples=16)
@given(case=cases, rows=st.integers(1, 40), plan=st.sampled_from(sorted(losses.PLANS)), once=st.booleans())
@example(case=CASE, rows=2, plan="cuda", once=False)
@example(case=CASE | {"impl": "torch", "N": 17, "reduction": "none"}, rows=5, plan="cuda", once=False)
def test_however_the_logits_are_walked_over_the_result_is_the_same(device, kind, case, rows, plan, once):
    """In chunks of any size, as a CPU walks and as a GPU does, whose rows of logits are padded."""
    drawn = draw(kind, case, device, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        other = replace(losses.PLANS[plan], chunk=1, rows=rows, once=10**6 if once else 0)
        patch.setitem(losses.PLANS, device, other)
        actual = run(kind, *drawn, case["impl"])
    for a, e in zip(actual, run_reference(kind, *drawn), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-10, rtol=1e-10)


@both_versions
@pytest.mark.parametrize(("kind", "reduction"), [(k, "none") for k in KINDS] + [(KINDS[3], "sum")])
def test_compiled_into_one_graph_they_give_the_same(device, kind, reduction, impl, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no graph holds a check of shapes
    torch.compiler.reset()  # every case is another graph of the same code
    operands, options, upstream = draw(kind, CASE | {"reduction": reduction}, device)

    def weighted(*x):
        outputs = listed(getattr(losses, kind)(*x, **options, impl=impl))
        return sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True))

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    eager, whole = (torch.autograd.grad(f(*operands), operands) for f in (weighted, compiled))
    for a, e in zip(whole, eager, strict=True):
        assert torch.equal(a, e)


@both_versions
@pytest.mark.parametrize("kind", KINDS[1:3] + LINEAR[1:])
def test_the_operators_keep_the_contract_of_torch_library(device, kind, impl):
    operands, options, _ = draw(kind, CASE | {"layout": "transposed"}, device)
    sides = (operands[::2], operands[1::2]) if "linear" in kind else (operands, [])
    arguments = *map(list, sides), options.get("targets"), 0.5 if options else 1.0, "token" in kind, impl
    torch.library.opcheck(torch.ops.minillm.rows.default, arguments)


@both_versions
@pytest.mark.parametrize(("kind", "reduction"), [(k, "none") for k in KINDS] + [(KINDS[3], "mean")])
def test_second_derivatives_are_refused_rather_than_wrong(device, kind, reduction, impl):
    operands, options, _ = draw(kind, CASE | {"reduction": reduction, "ignored": 0.0}, device)
    values = listed(getattr(losses, kind)(*operands, **options, impl=impl))[0].square().sum()
    (gradient,) = torch.autograd.grad(values, operands[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        gradient.sum().backward()


@both_versions
@pytest.mark.parametrize(("kind", "reduction"), [(k, "none") for k in LINEAR] + [(KINDS[3], "mean")])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for_are_made(device, kind, reduction, wanted, impl):
    operands, options, _ = draw(kind, CASE | {"reduction": reduction}, device)

    def gradients(operands):
        total = sum(x.sum() for x in listed(getattr(losses, kind)(*operands, **options, impl=impl)))
        assert total.requires_grad == any(x.requires_grad for x in operands)
        if total.requires_grad:
            total.backward()
        return [x.grad for x in operands]

    some = [x.detach().requires_grad_(wanted[i % 2]) for i, x in enumerate(operands)]
    for b, s, x in zip(gradients(operands), gradients(some), some, strict=True):
        assert torch.equal(b, s) if x.requires_grad else s is None


@both_versions
@every_reduction
def test_operands_used_elsewhere_and_backward_run_twice_give_the_whole_gradient(device, reduction, impl):
    """Weights tied to an embedding, hidden states with a second head, two backward passes."""

    def gradients(loss_of, **options):
        hidden, weight = (normal(n, 4, seed=n).to(device).requires_grad_() for n in (7, 9))
        h, w = hidden * 2, weight.tanh()
        loss = loss_of(h, w, targets=targets, reduction=reduction, **options).square().sum()
        total = loss + (h**2).sum() + (w * w).sum()
        total.backward(retain_graph=True)
        total.backward()
        return hidden.grad, weight.grad

    targets = torch.tensor([0, 8, 1, -100, 3, 3, 5], device=device)
    expected = gradients(lambda *x, **options: plain("linear_cross_entropy", x, **options))
    for a, e in zip(gradients(linear_cross_entropy, impl=impl), expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-5)


@both_versions
@pytest.mark.parametrize(
    ("kind", "N", "reduction"),
    [(k, 0, "none") for k in KINDS] + [(k, N, r) for k in KINDS[::3] for N in (0, 5) for r in REDUCTIONS],
)
def test_no_row_left_behaves_as_torch_does(device, kind, N, reduction, impl):
    """There are none, or all of them are ignored."""
    case = CASE | {"impl": "torch", "N": 6, "reduction": reduction, "ignored": 1.0}
    operands, options, upstream = draw(kind, case, device)
    operands = [x.detach()[:N] if len(x) == 6 else x.detach() for x in operands]
    operands = [x.requires_grad_() for x in operands]
    options |= {"targets": options["targets"][:N]} if options else {}
    upstream = [u[:N] if u.dim() else u for u in upstream]
    drawn = operands, options, upstream
    for a, e in zip(run(kind, *drawn, impl), run_plain(kind, *drawn), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@both_versions
def test_autocast_changes_nothing(device, impl):
    """Float32 products inside would be cast, and fit nothing."""
    hidden, weight = (normal(n, 4, seed=n).to(device).requires_grad_() for n in (7, 9))
    targets = torch.arange(7, device=device)

    def outcome():
        values, entropy = linear_token_logprobs(hidden, weight, targets, impl=impl)
        divergence = linear_kl(hidden, weight, hidden.detach() + 1, weight.detach(), impl=impl)
        total = (values + entropy + divergence).sum()
        total = total + linear_cross_entropy(hidden, weight, targets, impl=impl)
        return total, *torch.autograd.grad(total, (hidden, weight))

    with torch.autocast(device, dtype=torch.bfloat16):
        inside = outcome()
    assert all(torch.equal(a, e) for a, e in zip(inside, outcome(), strict=True))


@settings(max_examples=12)
@given(case=cases, offset=st.sampled_from([1.0, -3.0, 1e4, -1e4]))
def test_moving_all_logits_of_a_row_changes_nothing_and_gradients_sum_to_zero(device, case, offset):
    """In float32 and with logits it holds exactly, so that behind 10^4 not a bit of them is lost."""
    (p, q), _, (u,) = draw("kl", case, device)
    p, q = ((x.detach() * 64).round().div(64).requires_grad_() for x in (p, q))
    targets = torch.arange(len(p), device=device) % case["V"]
    for kind, operands, moved in (
        ("token_logprobs", [p], [p + offset]),
        ("kl", [p, q], [p + offset, q]),
        ("kl", [p, q], [p, q + offset]),
    ):
        options, upstream = ({}, [u]) if kind == "kl" else ({"targets": targets}, [u, u.flip(0)])
        base, other = (run(kind, x, options, upstream, case["impl"]) for x in (operands, moved))
        for a, e in zip(other, base, strict=True):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)
        for gradient in base[len(upstream) :]:
            torch.testing.assert_close(gradient.sum(1), torch.zeros(len(p)), atol=1e-5, rtol=0)


# --- The walk, ignored rows and precision ----------------------------------------------------------


def test_a_chunk_has_at_least_the_rows_that_make_adding_to_the_weight_worth_it():
    """Logits that are given are cut as they fit into a cache."""
    hidden, weight = torch.zeros(1000, 3), torch.zeros(50, 3)

    def sizes(*arguments):
        return [len(z) for _, z, _ in losses._walk(*arguments)]

    with pytest.MonkeyPatch.context() as patch:
        for chunk, rows, expected in ((1, 300, [300, 300, 300, 100]), (50 * 700, 300, [600, 400])):
            planned(patch, chunk=chunk, rows=rows, once=0)
            assert sizes(hidden, weight) == expected
        planned(patch, chunk=3 * 400)
        assert sizes(hidden, None) == [400, 400, 200] and sizes(hidden[:0], None) == [0]
        planned(patch, once=50 * 1000)
        assert sizes(hidden, weight) == [1000]
        assert len(sizes(hidden, weight, None, None, False)) > 1


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_weight_is_summed_in_float32_over_many_chunks(dtype, reduction):
    """600 rows say nearly the same. In bfloat16 the sum would stay at 256; products of float16 rounded one
    by one would be inf before the mean divides them. The walk is one for both versions."""
    N, size = 600, 1.0 if dtype == torch.bfloat16 else 250.0
    hidden, weight = torch.full((N, 2), size, dtype=dtype), torch.zeros(3, 2, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        planned(patch, chunk=1, rows=7, once=0)
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss / N, weight)
    expected = torch.tensor([[-2 / 3], [1 / 3], [1 / 3]]).expand(3, 2) * size
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)


def test_an_upstream_gradient_scales_half_types_in_float32():
    """2^17, as losses are scaled for float16, is inf in it: a scalar would be taken into its dtype."""
    halves = torch.ones(3, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    ctx = SimpleNamespace(saved_tensors=halves, dtypes=[torch.float32] * 2, needs_input_grad=[True] * 7)
    scaled = losses._scale(ctx, torch.tensor(2.0**17), None, None)
    assert [x.unique().item() for x in scaled[:2]] == [2.0**17] * 2


@both_versions
@pytest.mark.parametrize("plan", sorted(losses.PLANS))
@every_reduction
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


def test_a_very_large_common_offset_costs_no_more_than_the_rounding_of_the_logits():
    hidden, weight = torch.tensor([[1.0, 1e6]]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    for target, z in ((0, 0.0), (1, 1.0), (2, 3.0)):
        expected = np.log(1 + np.e + np.e**3) - z
        loss = linear_cross_entropy(hidden, weight, torch.tensor([target]))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@both_versions
def test_logits_of_half_hidden_states_are_not_rounded(device, impl):
    """At logits of deviation 4 bfloat16 would cost two digits, which PPO's ratios would inherit."""
    hidden = (normal(6, 64) * 4).to(device, torch.bfloat16)
    weight = (normal(50, 64, seed=1) / 8).to(device, torch.bfloat16)
    targets, other = torch.arange(6, device=device), hidden.flip(0)
    exact = [x.double() @ weight.double().T for x in (hidden, other)]
    found = (
        *linear_token_logprobs(hidden, weight, targets, impl=impl),
        linear_kl(hidden, weight, other, weight, impl),
    )
    expected = *plain("token_logprobs", exact[:1], targets), plain("kl", exact)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("BLOCK", [1, 4, 64])
def test_the_loss_over_blocks_is_the_loss_in_numpy(BLOCK):
    logits, targets = (normal(5, 37) * 30).double().numpy(), np.array([0, 36, 5, 5, 9])
    expected = reference.row_losses(logits, targets)
    np.testing.assert_allclose(reference.row_losses_over_blocks(logits, targets, BLOCK), expected, atol=1e-12)


# --- Logits that are not finite, rows of every place ----------------------------------------------


@both_versions
def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be(device, impl):
    z = torch.tensor([[1.0, NEVER, 2.0], [NEVER, NEVER, 0.0], [NEVER] * 3, [0.0, torch.inf, 1.0]])
    z = z.to(device).requires_grad_()
    values, entropy = token_logprobs(z, torch.tensor([2, 2, 0, 0], device=device), 1.0, impl)
    p = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(values.detach().cpu(), [np.log(p), 0.0, np.nan, np.nan], rtol=1e-6)
    expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(entropy.detach().cpu(), [expected, 0.0, np.nan, np.nan], atol=1e-6)
    (gradient,) = torch.autograd.grad((values + entropy).sum(), z)
    assert gradient[:2].isfinite().all() and not gradient[:2, 1].any() and not gradient[1].any()
    assert gradient[2:].isnan().all()
    never = token_logprobs(z[:2], torch.tensor([1, 0], device=device), 1.0, impl)[0]
    assert (never == NEVER).all()


@both_versions
def test_kl_is_infinite_only_where_p_can_be_what_q_cannot(device, impl):
    p = [[0.0, 0.0, NEVER], [0.0, 0.0, NEVER], [0.0, 0.0, -1e4], [0.0, 0.0, 0.0], [NEVER] * 3, [0.0] * 3]
    q = [[0.0, 0.0, 1.0], [0.0, 0.0, NEVER], [0.0, 0.0, NEVER], [0.0, 0.0, NEVER], [0.0] * 3, [NEVER] * 3]
    p, q = (torch.tensor(x, device=device, requires_grad=True) for x in (p, q))
    divergence = kl(p, q, impl)
    expected = [np.log(2 + np.e) - np.log(2), 0.0, 0.0, np.inf, np.nan, np.nan]
    np.testing.assert_allclose(divergence.detach().cpu(), expected, rtol=1e-6)
    for gradient in torch.autograd.grad(divergence[:3].sum(), (p, q)):
        assert gradient[:3].isfinite().all()


@both_versions
def test_a_row_without_an_upstream_gradient_passes_zeros_whatever_it_holds(device, impl):
    z = torch.full((2, 20), torch.nan, device=device)
    z[1] = 0.0
    q, targets = z + 0.5, torch.tensor([3, 4], device=device)
    p = z.clone().requires_grad_()
    values, entropy = token_logprobs(p, targets, 1.0, impl)
    for live in ((values,), (values, entropy)):
        (gradient,) = torch.autograd.grad([x[1] for x in live], p, retain_graph=True)
        assert not gradient[0].any() and gradient[1, 4] == 0.95
    q.requires_grad_()
    for gradient in torch.autograd.grad(kl(p, q, impl)[1], (p, q)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 20, 2**32 + 3, 2**40])
def test_a_target_outside_poisons_its_row_on_a_gpu_where_nobody_checks_it(device, wrong):
    from kernels import rows_triton

    z, out = torch.zeros(2, 20, device=device), torch.zeros(2, 20, device=device)
    targets = torch.tensor([3, wrong], device=device)
    result = rows_triton.logprob(z, targets, 1.0, False)
    rows_triton.logprob_backward(z, targets, 1.0, result, torch.ones_like(result), out)
    assert result[2, 0].isfinite() and out[0].isfinite().all()
    assert result[2, 1].isnan() and out[1].isnan().all()


@both_versions
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_rows_of_different_dtypes_and_places_in_memory_can_be_compared(device, dtypes, impl):
    p = normal(4, 53).to(device, dtypes[0])[:, 2:].requires_grad_()
    q = normal(4, 51, seed=1).to(device, dtypes[1]).requires_grad_()
    actual = torch.autograd.grad(kl(p, q, impl).sum(), (p, q))
    for a, e in zip(actual, torch.autograd.grad(plain("kl", (p.float(), q)).sum(), (p, q)), strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=2**-7)  # one rounding to bfloat16


def test_rows_are_read_16_bytes_at_a_time_only_where_all_begin_at_borders():
    from kernels.rows_triton import _launch

    class Watched:
        def __getitem__(self, grid):
            return lambda *rows, **options: found.append(options["ALIGN"])

    found, wide = list[int](), torch.empty(4, 64, dtype=torch.bfloat16)
    aligned = wide[:, :50]
    for rows in ([aligned], [aligned, None, wide], [wide[:, 1:]], [torch.empty(4, 51)]):
        _launch(Watched(), rows)
    _launch(Watched(), [aligned, torch.empty(4, 50)])
    assert found == [16, 16, 2, 4, 2]


# --- Arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_type_say_the_same(dtype, monkeypatch):
    """Compared as int64: 156 is -100 in int8, and 256 tokens have none that uint8 cannot name."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    hidden, weight = normal(4, 4), normal(256, 4)
    targets = torch.tensor([0, 100, 127, 156 if dtype == torch.uint8 else 5])
    for loss in (linear_cross_entropy, lambda h, w, t: cross_entropy(h @ w.T, t)):
        assert torch.equal(loss(hidden, weight, targets.to(dtype)), loss(hidden, weight, targets))


@both_versions
@pytest.mark.parametrize("bad", [9, -1, 10**6])
def test_a_target_outside_the_vocabulary_is_named_with_its_row(bad, impl):
    hidden, weight, targets = normal(4, 4), normal(9, 4), torch.tensor([0, 3, 1, bad])
    for operation in (
        linear_cross_entropy,
        linear_token_logprobs,
        lambda h, w, t, impl: cross_entropy(h @ w.T, t, impl=impl),
    ):
        with pytest.raises(IndexError, match=rf"^target {bad} in row 3 is outside 0\.\.8$"):
            operation(hidden, weight, targets, impl=impl)


@both_versions
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
    for operation in (linear_cross_entropy, linear_token_logprobs):
        with pytest.raises(ValueError, match=words):
            operation(*operands, impl=impl)
    for operation in (linear_kl, lambda h, w, g, v, impl: kl(h @ w.T, g @ v.T[:, :7], impl)):
        with pytest.raises(ValueError, match=r"q_[a-z]+ has the shape"):
            operation(normal(4, 3), normal(9, 3), normal(4, 2), normal(8, 2), impl=impl)
    with pytest.raises(TypeError, match="give integers"):
        linear_cross_entropy(operands[0], torch.zeros(9, 3), torch.zeros(4), impl=impl)
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(lambda x: kl(x, x, impl), (normal(2, 3),), (normal(2, 3),))


def test_unknown_options_end_in_one_line_that_lists_what_exists():
    hidden, weight, targets = normal(4, 4), normal(9, 4), torch.arange(4)
    for loss in (linear_cross_entropy, lambda h, w, t, **options: cross_entropy(h @ w.T, t, **options)):
        with pytest.raises(ValueError, match=r"'median'.*'mean', 'sum' and 'none'"):
            loss(hidden, weight, targets, reduction="median")
        with pytest.raises(ValueError, match=r"'liger'.*None, 'triton' and 'torch'"):
            loss(hidden, weight, targets, impl="liger")
    with pytest.raises(ValueError, match=r"'liger'.*None, 'triton' and 'torch'"):
        kl(hidden, hidden, "liger")
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature {temperature} is not positive"):
            token_logprobs(hidden, torch.arange(4), temperature)


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
