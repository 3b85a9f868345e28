"""From a batch to an update: gradients by plain autograd, optimizers by their algorithms, and the restart."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import document_starts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import optim
from minillm.data import IGNORED, Batch
from minillm.model import LanguageModel, ModelConfig, initialize
from minillm.optim import (
    LearningRates,
    Muon,
    backward,
    build_optimizers,
    lr_schedule,
    orthogonalized,
    validation_loss,
)
from minillm.run import Runtime, TrainingState
from minillm.tools.folder import optimizer_tensors, restore_state, save_state

LAW = settings(max_examples=15)
ONE = Runtime(torch.device("cpu"), torch.float32)
RATES = LearningRates(matrix=0.02, embedding=0.01, norm=0.005, weight_decay=0.1)
KINDS = pytest.mark.parametrize("kind", ["muon", "adamw"])
V = 31
BYTES = torch.arange(V) % 7  # token 0, 7, … stand for no bytes, as special tokens do
# Sums of a few hundred float32 terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def model_of(tied: bool = False, seed: int = 0, causal: bool = True, grown: bool = False) -> LanguageModel:
    """A new model; `grown`: no matrix is zero, as after some steps."""
    shape = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 32}  # fmt: skip
    torch.manual_seed(0)  # the weights torch draws by itself; any do
    model = LanguageModel(ModelConfig(V, **shape, tie_word_embeddings=tied, causal=causal))
    if not grown:
        initialize(model, torch.Generator().manual_seed(seed))
    return model


def gradients(model: LanguageModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


# ---- A batch -> its loss and gradient


@st.composite
def batches(draw) -> Batch:
    """Rows with documents of any lengths (token 0 opens one) and any share of ignored targets, not all."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = torch.randint(V, (rows, length), generator=random)
    tokens[torch.rand(rows, length, generator=random) < 0.3] = 0
    targets = torch.randint(V, (rows, length), generator=random)
    ignored = torch.rand(rows, length, generator=random) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    ignored[0, 0] = False
    return Batch(tokens, targets.masked_fill(ignored, IGNORED), document_starts(tokens, 0))


def random_batch(rows: int, seed: int = 0) -> Batch:
    tokens = torch.randint(V, (rows, 4), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens, document_starts(tokens, 0))


def plain_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """-log p of every target that counts, by log_softmax over whole logits; rows and documents apart."""
    losses = []
    for tokens, targets, start in zip(batch.tokens, batch.targets, batch.start, strict=True):
        for first in start.unique():
            document = start == first
            logits = model.logits(model.model(tokens[document][None]))[0]
            counted = (targets[document] != IGNORED).nonzero()[:, 0]
            losses.append(-logits.log_softmax(-1)[counted, targets[document][counted]])
    return torch.cat(losses)


@given(batches(), st.booleans(), st.booleans(), st.integers(1, 60))
@LAW
def test_any_micro_batch_gives_the_mean_loss_and_adds_its_weighted_gradient(
    batch, causal, tied, micro_tokens
):
    model = model_of(tied, causal=causal, grown=True)
    mean = plain_losses(model, batch).mean()
    mean.backward()
    expected = gradients(model)
    model.zero_grad()
    for weight in (1.0, 0.5):
        loss = backward(model, batch, micro_tokens, ONE, weight)
        assert loss == pytest.approx(mean.item(), rel=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, 1.5 * theirs, **CLOSE)


@dataclass(frozen=True)
class OneOf(Runtime):
    """A process among several that all have the same."""

    totals: list[Tensor] = field(default_factory=list)

    def total(self, value):
        self.totals.append(value.clone())
        return self.world_size * value


def as_parallel(model: LanguageModel) -> list[int]:
    """Gives it DistributedDataParallel's `no_sync`; counts the forward passes outside and inside of that."""
    passes, inside = [0, 0], [False]

    @contextmanager
    def no_sync():
        inside[0] = True
        yield
        inside[0] = False

    def count(*_):
        passes[inside[0]] += 1

    model.no_sync = no_sync
    model.register_forward_pre_hook(count)
    return passes


@given(batches(), st.integers(2, 3))
@LAW
def test_the_shares_of_the_processes_average_to_the_gradient_of_the_whole(batch, world):
    """What DistributedDataParallel averages, computed one rank after the other."""
    model = model_of(grown=True)
    whole = backward(model, batch, 10, ONE).item()
    expected = gradients(model)
    as_parallel(model)
    shares, losses = [], []
    for rank in range(world):
        model.zero_grad(set_to_none=False)
        losses.append(backward(model, batch, 10, OneOf(ONE.device, ONE.dtype, rank, world)))
        shares.append(gradients(model))
    assert sum(losses).item() / world == pytest.approx(whole, rel=1e-5)
    for theirs, *ours in zip(expected, *shares, strict=True):
        torch.testing.assert_close(sum(ours) / world, theirs, **CLOSE)


def test_gradients_are_averaged_once_a_step_with_the_last_micro_batch():
    model = model_of()
    passes = as_parallel(model)
    backward(model, random_batch(8), 4, OneOf(ONE.device, ONE.dtype, 1, 2))
    assert passes == [1, 3]


@given(st.lists(batches(), min_size=1, max_size=3), st.booleans())
@LAW
def test_held_out_loss_is_all_loss_over_all_targets_or_all_bytes_of_text(some, causal):
    model = model_of(causal=causal, grown=True)
    with torch.no_grad():
        nats = sum(plain_losses(model, batch).sum().item() for batch in some)
    targets = torch.cat([batch.targets[batch.targets != IGNORED] for batch in some])
    size = max(1, BYTES[targets].sum().item())  # no bytes divide nothing by zero
    loss = validation_loss(model, some, BYTES, ONE)
    assert loss.per_target == pytest.approx(nats / len(targets), rel=1e-5)
    assert loss.per_byte == pytest.approx(nats / size, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = validation_loss(model, some[:1], BYTES, ONE)
    targets = some[0].targets[some[0].targets != IGNORED]
    expected = alone.per_target * len(targets) / max(1, int(BYTES[targets].sum()))
    assert alone.per_byte == pytest.approx(expected, rel=1e-5)


def test_each_process_validates_its_own_batches_and_the_sums_are_of_all():
    model, all_batches = model_of(), [random_batch(2, seed) for seed in range(5)]
    for rank in (0, 1):
        here, own = OneOf(ONE.device, ONE.dtype, rank, 2), all_batches[rank::2]
        loss = validation_loss(model, all_batches, BYTES, here)
        nats = sum(model(b.tokens, b.start, targets=b.targets).item() for b in own)
        size = sum(int(BYTES[b.targets].sum()) for b in own)
        (totals,) = here.totals
        assert totals.tolist() == pytest.approx([nats, 8 * len(own), size])
        assert totals.dtype == torch.float64 and totals.device.type == "cpu"
        assert loss.per_byte == pytest.approx(nats / size)


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model, batch = model_of(), random_batch(2)
    batch = Batch(batch.tokens, torch.full_like(batch.tokens, IGNORED), batch.start)
    assert backward(model, batch, 4, ONE) == validation_loss(model, [batch], BYTES, ONE).per_target == 0.0
    assert all(not gradient.any() for gradient in gradients(model))


# ---- Groups and their updates


class Numbers:
    """A stream of batches as a run has one: it can be stopped and continued."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> Batch:
        self.position += 1
        return random_batch(3, self.position)

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def new_state(kind: str, tied: bool, seed: int = 0) -> TrainingState:
    model = model_of(tied, seed)
    return TrainingState(model, build_optimizers(model, RATES, kind), Numbers())


def train(state: TrainingState, steps: int) -> None:
    for _ in range(steps):
        backward(state.model, state.data.next(), 100, ONE)
        state.optimizers.step(lr_schedule(state.step, 20, 3, 0.5), 1.0)
        state.step += 1


def groups_of(state: TrainingState) -> list[dict]:
    return [group for optimizer in state.optimizers.optimizers for group in optimizer.param_groups]


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_is_in_one_group_by_its_kind_and_only_block_matrices_decay(kind, tied):
    state = new_state(kind, tied)
    found = {}
    for optimizer in state.optimizers.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in found
                found[id(p)] = (type(optimizer), group["lr"], group["weight_decay"])
    assert {id(p) for p in state.optimizers.parameters} == set(found)
    adamw, muon = torch.optim.AdamW, Muon
    for name, parameter in state.model.named_parameters():
        expected = (muon if kind == "muon" else adamw, RATES.matrix, RATES.weight_decay)
        if parameter.ndim == 1:
            expected = (adamw, RATES.norm, 0.0)
        elif name.startswith(("model.embed_tokens", "lm_head")):
            expected = (adamw, RATES.embedding, 0.0)
        assert found.pop(id(parameter)) == expected, name
    assert not found


@KINDS
def test_a_step_scales_the_base_rates_and_clears_the_gradients(kind):
    state = new_state(kind, tied=False)
    train(state, 1)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    for multiplier in (0.5, 0.25, 1.0):  # always of the base, never of the rate before
        state.optimizers.step(multiplier, 1.0)
        for group in groups_of(state):
            assert group["lr"] == multiplier * group["base_rate"]


@KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_no_weight_and_is_returned_as_it_is(kind, bad):
    state = new_state(kind, tied=False)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    backward(state.model, random_batch(2), 100, ONE)
    state.model.lm_head.weight.grad[0, 0] = bad
    assert not math.isfinite(state.optimizers.step(1.0, 1.0)[0])
    for parameter, old in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None


def test_adamws_steps_are_those_of_its_algorithm_by_hand():
    """Algorithm 2 of Loshchilov & Hutter, β = (.9, .95), over gradients so small that eps counts."""
    model, random = model_of(tied=False), torch.Generator().manual_seed(0)
    optimizers = build_optimizers(model, RATES, "adamw", eps=1e-3)
    groups = {id(p): group for group in optimizers.optimizers[0].param_groups for p in group["params"]}
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    m, v = ({name: torch.zeros_like(x) for name, x in expected.items()} for _ in range(2))
    for step in range(1, 5):
        for name, parameter in model.named_parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=random)
            g, group = parameter.grad.double(), groups[id(parameter)]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            update = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-3)
            rate = 0.5 * group["base_rate"]
            expected[name] = expected[name] * (1 - rate * group["weight_decay"]) - rate * update
        optimizers.step(0.5, 1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_adam_trusts_the_smallest_gradients_unless_told_otherwise():
    """With eps at 1e-10 the first step of a gradient of 1e-7 is a whole one."""
    model = model_of(tied=False)
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.grad = torch.full_like(before, 1e-7)
    build_optimizers(model, RATES, "muon").step(1.0, 1.0)
    torch.testing.assert_close(model.lm_head.weight, before - RATES.embedding, rtol=0, atol=1e-4)


@given(
    shapes=st.lists(st.tuples(*[st.sampled_from([1, 3, 8])] * 2), min_size=1, max_size=6),
    idle=st.integers(0, 6),
    most=st.sampled_from([1, 24, 1 << 22]),
    seed=st.integers(0, 99),
)
@LAW
def test_muons_steps_are_those_of_torchs(shapes, idle, most, seed):
    """Torch takes one matrix after the other; a matrix without a gradient stays as it is.

    Both multiply in float64 here. In bfloat16 a product of several matrices now and then rounds a sum the
    other way than the product of one, and a small direction grows by the factor 3.4 in each step.
    """
    random = torch.Generator().manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=random).double()) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "TOGETHER", most)
        patch.setattr(Tensor, "bfloat16", Tensor.clone)  # torch 2.13; 2.15 says .to(torch.bfloat16)
        patch.setattr(torch, "bfloat16", torch.float64)
        one = Muon({"params": ours, "lr": 0.3, "weight_decay": 0.2}, momentum=0.95, dtype=torch.float64)
        other = torch.optim.Muon(theirs, lr=0.3, weight_decay=0.2, momentum=0.95)
        for _ in range(3):
            for number, (weight, copy) in enumerate(zip(ours, theirs, strict=True)):
                if number != idle:
                    weight.grad = torch.randn(weight.shape, generator=random).double()
                    copy.grad = weight.grad.clone()
            one.step()
            other.step()
            for weight, copy in zip(ours, theirs, strict=True):
                torch.testing.assert_close(weight, copy, rtol=0, atol=1e-10)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
@LAW
def test_the_orthogonalized_update_keeps_all_directions_and_makes_them_alike(rows, columns, seed):
    update = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    sizes = u.T @ orthogonalized(update[None], torch.float64)[0] @ v.T
    torch.testing.assert_close(sizes, sizes.diag().diag(), rtol=0, atol=1e-6)
    large = s / s.norm() > 0.02  # smaller ones would take more than five steps
    assert ((sizes.diag() > 0.65) & (sizes.diag() < 1.25))[large].all()


def test_muon_multiplies_in_the_dtype_of_the_models_computation():
    """A CPU without instructions for bfloat16 took twenty times as long for a step of train.py."""
    for dtype in (torch.float32, torch.bfloat16):
        model = LanguageModel(model_of().config, dtype)
        optimizers = build_optimizers(model, LearningRates(1.0, 0.0, 0.0, 0.0), "muon")
        assert optimizers.optimizers[0].param_groups[0]["momentum"] == 0.95
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Products() as products:
            optimizers.step(1.0, 1.0)
        assert products.dtypes == {dtype}


class Products(TorchDispatchMode):
    """Notes the dtypes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


# ---- The schedule and clipping


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400), decay=st.floats(0, 1))
@LAW
def test_the_rate_rises_and_then_falls_within_its_base_and_never_reaches_zero(steps, warmup, decay):
    rates = [lr_schedule(step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    falls_from = steps - decay * steps
    for step in range(steps - 1):
        if step + 1 <= min(warmup, falls_from):
            assert rates[step] < rates[step + 1]
        if step >= max(warmup, falls_from):
            assert rates[step] > rates[step + 1]
    if warmup < falls_from:
        assert rates[warmup] == 1


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "expected"),
    [
        (10, 3, 0.4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (5, 0, 0.0, [1.0] * 5),
        (5, 0, 1.0, [1.0, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_the_rate_of_a_small_run_by_hand(steps, warmup, decay, expected):
    assert [lr_schedule(step, steps, warmup, decay) for step in range(steps)] == pytest.approx(expected)


@given(st.floats(0.01, 100), st.floats(0.01, 10), st.integers(0, 2**32))
@LAW
def test_clipping_bounds_the_common_norm_and_keeps_the_direction(size, largest, seed):
    model, random = model_of(tied=False), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=random)
    before = torch.cat([gradient.flatten() for gradient in gradients(model)])
    still = LearningRates(0.0, 0.0, 0.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:  # keeps the gradients of a step
        patch.setattr(torch.optim.Optimizer, "zero_grad", lambda *_, **__: None)
        (returned,) = build_optimizers(model, still, "adamw").step(1.0, largest)
    after = torch.cat([gradient.flatten() for gradient in gradients(model)])
    assert returned == pytest.approx(before.norm().item(), rel=1e-4)
    # torch divides by norm + 1e-6, hence a relative 1e-4 at the smallest norms.
    scale = min(1.0, largest / before.norm().item())
    torch.testing.assert_close(after, before * scale, rtol=1e-4, atol=0)
    assert after.norm() <= largest * (1 + 1e-5)


# ---- The restart


@KINDS
@pytest.mark.parametrize(("stop", "tied"), [(0, False), (1, True), (4, False), (4, True)])
def test_a_restored_run_goes_on_bit_by_bit_as_if_never_stopped(tmp_path, kind, tied, stop):
    whole, first = new_state(kind, tied), new_state(kind, tied)
    train(whole, 8)
    train(first, stop)
    first.tokens, first.seconds = 17, 2.5
    save_state(first, tmp_path)
    second = new_state(kind, tied, seed=1)  # other weights: all must come from the file
    rates = [group["base_rate"] for group in groups_of(second)]
    restore_state(second, tmp_path)
    assert (second.step, second.tokens, second.seconds) == (stop, 17, 2.5)
    assert [group["base_rate"] for group in groups_of(second)] == rates
    for state in (first, second):  # saving changed nothing, and restoring brought all back
        train(state, 8 - stop)
        for one, other in zip(whole.model.parameters(), state.model.parameters(), strict=True):
            assert torch.equal(one, other)
        states = [optimizer_tensors(run.optimizers) for run in (whole, state)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert whole.data.state_dict() == state.data.state_dict()
