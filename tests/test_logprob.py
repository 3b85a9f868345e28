"""Log-probability, entropy and KL, over logits and fused with their projection, against NumPy and laws."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import IMPLS, TOLERANCE, lay_out, normal, planned, small_blocks  # noqa: F401

from kernels import losses, reference
from kernels.losses import kl, linear_cross_entropy, linear_kl, linear_token_logprobs, token_logprobs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, on -inf

KINDS = ("token_logprobs", "linear_token_logprobs", "kl", "linear_kl")
NEVER = -torch.inf

cases = st.fixed_dictionaries(
    {
        "impl": st.sampled_from(IMPLS),
        "N": st.sampled_from([1, 2, 4]),
        "D": st.sampled_from([1, 3, 16, 33]),
        # Below, at and above whole numbers of blocks, which hold 16 to 64.
        "V": st.sampled_from([1, 2, 5, 15, 16, 17, 32, 61, 96]),
        "T": st.sampled_from([1.0, 0.5, 0.75, 3.0]),  # exact in float32, as a GPU gets them
        "layout": st.sampled_from(["contiguous", "transposed", "columns", "stride 0"]),
        "seed": st.integers(0, 2**16),
    }
)
EDGE = {"impl": "triton", "N": 4, "D": 3, "V": 1, "T": 1.0, "layout": "contiguous", "seed": 0}


def draw(kind, case, device, dtype=torch.float32):
    """(operands, targets, one upstream gradient for each output)."""
    generator = torch.Generator().manual_seed(case["seed"])
    N, D, V = case["N"], case["D"], case["V"]
    shapes = {
        "token_logprobs": [(N, V)],
        "linear_token_logprobs": [(N, D), (V, D)],
        "kl": [(N, V), (N, V)],
        "linear_kl": [(N, D), (V, D), (N, D + 1), (V, D + 1)],
    }[kind]
    # Logits of spread 1.5 or so, whatever the width.
    spread = 1.2 * D**-0.25 if "linear" in kind else 1.5
    operands = [torch.randn(shape, generator=generator) * spread for shape in shapes]
    operands = [lay_out(x.to(device, dtype), case["layout"]).requires_grad_() for x in operands]
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = V - 1, 0
    accumulator = torch.promote_types(dtype, torch.float32)
    upstream = torch.randn(N, 2, generator=generator).to(device, accumulator)  # its columns have stride 2
    upstream = upstream[:1].expand(N, 2) if case["layout"] == "stride 0" else upstream
    return operands, targets.to(device), list(upstream.unbind(1))[: 2 if "token" in kind else 1]


def call(kind, operands, targets, T, impl=None):
    """The operation's outputs as a tuple; `impl` "plain" is the code that it replaces."""
    options = (targets, T) if "token" in kind else ()
    if impl == "plain":
        return plain(kind, operands, *options)
    outputs = getattr(losses, kind)(*operands, *options, impl=impl)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def products(operands):
    """The logits of each pair of hidden states and output matrix."""
    return [h @ w.T for h, w in zip(operands[::2], operands[1::2], strict=True)]


def plain(kind, operands, targets=None, T=1.0):
    if "linear" in kind:
        operands = products(operands)
    log_p, *rest = ((z / T).log_softmax(1) for z in operands)
    if rest:
        return ((log_p.exp() * (log_p - rest[0])).sum(1),)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def run(kind, case, operands, targets, upstream, impl=None):
    """[outputs, then the gradient of each operand], on the CPU."""
    outputs = call(kind, operands, targets, case["T"], impl or case["impl"])
    upstream = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, operands, upstream)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def run_reference(kind, case, operands, targets, upstream):
    arrays = [x.detach().cpu().double().numpy() for x in operands]
    options = (targets.cpu().numpy(), case["T"]) if "token" in kind else ()
    upstream = [u.cpu().double().numpy() for u in upstream]
    logits = products(arrays) if "linear" in kind else arrays
    kind, linear = kind.removeprefix("linear_"), "linear" in kind
    outputs = getattr(reference, kind)(*logits, *options)
    gradients = getattr(reference, f"{kind}_backward")(*upstream, *logits, *options)
    gradients = list(gradients if isinstance(gradients, tuple) else [gradients])
    if linear:
        pairs = zip(gradients, arrays[::2], arrays[1::2], strict=True)
        gradients = [d for dz, h, w in pairs for d in reference.linear_backward(dz, h, w)]
    return [*(outputs if isinstance(outputs, tuple) else [outputs]), *gradients]


def largest(x):
    return np.abs(x).max(initial=0.0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=24)
@given(case=cases, dtype=st.sampled_from(list(TOLERANCE)))
@example(case=EDGE, dtype=torch.float32)  # a row shorter than the way back to a 16-byte border
def test_values_and_every_gradient_equal_the_reference(device, kind, case, dtype):
    operands, targets, upstream = draw(kind, case, device, dtype)
    actual = run(kind, case, operands, targets, upstream)
    expected = run_reference(kind, case, operands, targets, upstream)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.double(), e, atol=TOLERANCE[dtype] * max(1.0, largest(e)), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(case=cases, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_types_are_at_most_twice_as_far_from_float64_as_plain_pytorch(device, kind, case, dtype):
    operands, targets, upstream = draw(kind, case, device, dtype)
    actual = run(kind, case, operands, targets, upstream)
    peer = run(kind, case, operands, targets, upstream, "plain")
    expected = run_reference(kind, case, operands, targets, upstream)
    outputs = len(upstream)
    # Floor: a logit, of size 6 / T at most, is rounded by eps of itself and moves a value by as much, a
    # gradient by that share of itself.
    eps = torch.finfo(dtype).eps
    for i, (a, p, e) in enumerate(zip(actual, peer, expected, strict=True)):
        assert a.dtype == (torch.float32 if i < outputs else dtype)
        error, allowed = largest(a.double().numpy() - e), 2 * largest(p.double().numpy() - e)
        assert error <= allowed + eps * 6 / min(case["T"], 1.0) * max(1.0, largest(e))


@pytest.mark.parametrize("kind", ["linear_token_logprobs", "linear_kl"])
@settings(max_examples=12)
@given(case=cases, rows=st.integers(1, 10), kept=st.sampled_from([0, 100, 10**6]))
def test_the_linear_version_is_the_version_over_the_product_whatever_its_chunks(
    device, kind, case, rows, kept
):
    operands, targets, upstream = draw(kind, case, device, torch.float64)
    over_logits = call(kind.removeprefix("linear_"), products(operands), targets, case["T"], case["impl"])
    gradients = torch.autograd.grad(over_logits, operands, upstream)
    with pytest.MonkeyPatch.context() as patch:
        planned(patch, chunk=1, rows=rows)
        planned(patch, kept=kept)
        fused = run(kind, case, operands, targets, upstream)
    for a, e in zip(fused, (*over_logits, *gradients), strict=True):
        torch.testing.assert_close(a, e.detach().cpu(), atol=1e-11, rtol=1e-11)


@settings(max_examples=12)
@given(case=cases, offset=st.sampled_from([1.0, -3.0, 1e4, -1e4]))
def test_moving_all_logits_of_a_row_changes_nothing_and_gradients_sum_to_zero(device, case, offset):
    """In float32 and with logits it holds exactly, so that behind 10^4 not a bit of them is lost."""
    (p, q), targets, upstream = draw("kl", case | {"T": 1.0}, device)
    p, q = ((x.detach() * 64).round().div(64).requires_grad_() for x in (p, q))
    for kind, operands, moved in (
        ("token_logprobs", [p], [p + offset]),
        ("kl", [p, q], [p + offset, q]),
        ("kl", [p, q], [p, q + offset]),
    ):
        u = upstream if kind == "kl" else [upstream[0], upstream[0].flip(0)]
        base, other = (run(kind, case | {"T": 1.0}, x, targets, u) for x in (operands, moved))
        for a, e in zip(other, base, strict=True):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)
        for gradient in base[len(u) :]:
            torch.testing.assert_close(gradient.sum(1), torch.zeros(case["N"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_into_one_graph_they_give_the_same(device, kind, impl, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no graph holds a check of shapes
    torch.compiler.reset()  # every case is another graph of the same code
    case = {"N": 5, "D": 3, "V": 37, "T": 0.5, "layout": "contiguous", "seed": 1, "impl": impl}
    operands, targets, upstream = draw(kind, case, device)

    def weighted(*x):
        outputs = call(kind, x, targets, case["T"], impl)
        return sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True))

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    eager, whole = (torch.autograd.grad(f(*operands), operands) for f in (weighted, compiled))
    for a, e in zip(whole, eager, strict=True):
        assert torch.equal(a, e)
    first = operands[0].detach().requires_grad_()  # the others are constants now
    others = [x.detach() for x in operands[1:]]
    assert torch.equal(torch.autograd.grad(compiled(first, *others), first)[0], eager[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_keep_the_contract_of_torch_library_and_refuse_second_derivatives(device, kind, impl):
    case = {"N": 4, "D": 3, "V": 5, "T": 0.5, "layout": "transposed", "seed": 1}
    operands, targets, _ = draw(kind, case, device)
    arguments = (
        (operands, targets, 0.5, True, impl) if "token" in kind else (operands, None, 1.0, False, impl)
    )
    for kept in (0, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            planned(patch, kept=kept)
            torch.library.opcheck(torch.ops.minillm.rows.default, arguments)
    values = call(kind, operands, targets, case["T"], impl)[0].square().sum()
    (gradient,) = torch.autograd.grad(values, operands[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_is_infinite_only_where_p_can_be_what_q_cannot(device, impl):
    p = [[0.0, 0.0, NEVER], [0.0, 0.0, NEVER], [0.0, 0.0, -1e4], [0.0, 0.0, 0.0], [NEVER] * 3, [0.0] * 3]
    q = [[0.0, 0.0, 1.0], [0.0, 0.0, NEVER], [0.0, 0.0, NEVER], [0.0, 0.0, NEVER], [0.0] * 3, [NEVER] * 3]
    p, q = (torch.tensor(x, device=device, requires_grad=True) for x in (p, q))
    divergence = kl(p, q, impl)
    expected = [np.log(2 + np.e) - np.log(2), 0.0, 0.0, np.inf, np.nan, np.nan]
    np.testing.assert_allclose(divergence.detach().cpu(), expected, rtol=1e-6)
    for gradient in torch.autograd.grad(divergence[:3].sum(), (p, q)):
        assert gradient[:3].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_different_dtypes_and_places_in_memory_can_be_compared(device, impl):
    p = normal(4, 53).to(device, torch.bfloat16)[:, 2:].requires_grad_()
    q = normal(4, 51, seed=1).to(device).requires_grad_()
    actual = torch.autograd.grad(kl(p, q, impl).sum(), (p, q))
    for a, e in zip(actual, torch.autograd.grad(plain("kl", (p.float(), q))[0].sum(), (p, q)), strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=2**-7)  # one rounding to bfloat16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_values_and_gradients_of_zero(device, kind, impl):
    case = {"N": 1, "D": 3, "V": 5, "T": 1.0, "layout": "contiguous", "seed": 1, "impl": impl}
    operands, targets, upstream = draw(kind, case, device)
    operands = [x.detach()[: 0 if len(x) == 1 else None].requires_grad_() for x in operands]
    values = run(kind, case, operands, targets[:0], [u[:0] for u in upstream])
    assert not any(x.any() for x in values)
    assert [x.shape for x in values[len(upstream) :]] == [x.shape for x in operands]


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_of_half_hidden_states_are_not_rounded(device, impl):
    """At logits of deviation 4 bfloat16 would cost two digits, which PPO's ratios would inherit."""
    hidden = (normal(6, 64) * 4).to(device, torch.bfloat16)
    weight = (normal(50, 64, seed=1) / 8).to(device, torch.bfloat16)
    targets = torch.arange(6, device=device)
    exact = plain("token_logprobs", [hidden.double() @ weight.double().T], targets)
    for a, e in zip(linear_token_logprobs(hidden, weight, targets, impl=impl), exact, strict=True):
        torch.testing.assert_close(a.double(), e, atol=2e-5, rtol=2e-5)
    other = hidden.flip(0)
    exact = plain("kl", [x.double() @ weight.double().T for x in (hidden, other)])[0]
    actual = linear_kl(hidden, weight, other, weight, impl)
    torch.testing.assert_close(actual.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("p", "q", "words"),
    [((4, 9), (2, 9), "q_logits has"), ((4, 9), (4, 7), "q_logits has"), ((9,), (9,), "p_logits has")],
)
def test_logits_that_do_not_fit_end_in_one_line(impl, p, q, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=words):
        kl(torch.zeros(p), torch.zeros(q), impl)
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(lambda x: kl(x, x, impl), (normal(2, 3),), (normal(2, 3),))


def test_rows_are_read_16_bytes_at_a_time_only_where_all_begin_at_borders():
    from kernels.rows_triton import _launch

    wide = torch.empty(4, 64, dtype=torch.bfloat16)
    aligned = wide[:, :50]
    assert _launch(aligned)["ALIGN"] == _launch(aligned, wide)["ALIGN"] == 16
    assert _launch(wide[:, 1:])["ALIGN"] == 2 and _launch(torch.empty(4, 51))["ALIGN"] == 4
    assert _launch(aligned, torch.empty(4, 50))["ALIGN"] == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast_the_products_run_in_its_dtype_and_gradients_return_in_the_operands(device, impl):
    hidden, weight = (normal(n, 4, seed=n).to(device).requires_grad_() for n in (7, 9))
    targets = torch.arange(7, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        values, _ = linear_token_logprobs(hidden, weight, targets, impl=impl)
        losses_of = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
        divergence = linear_kl(hidden, weight, hidden.detach() + 1, weight.detach(), impl=impl)
        (values + divergence + losses_of).sum().backward()  # inside, where float32 products would be cast too
    expected, _ = linear_token_logprobs(hidden.bfloat16(), weight, targets, impl=impl)
    assert torch.equal(values, expected) and torch.equal(losses_of, -expected)
    assert values.dtype == divergence.dtype == losses_of.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_ends_in_one_line_that_says_what_is_wrong(impl):
    hidden, weight = normal(4, 4), normal(9, 4)
    for bad in (9, -1, 10**6):
        targets = torch.tensor([0, 3, 1, bad])
        with pytest.raises(IndexError, match=rf"^target {bad} in row 3 is outside 0\.\.8$"):
            linear_token_logprobs(hidden, weight, targets, impl=impl)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature {temperature} is not positive"):
            token_logprobs(hidden, torch.arange(4), temperature, impl)
    with pytest.raises(ValueError, match=r"'liger'.*None, 'triton' and 'torch'"):
        kl(hidden, hidden, "liger")
