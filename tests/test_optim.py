"""From a batch to an update: the gradient of its loss however the step is cut, each against plain autograd;
parameter groups, the schedule, clipping, and an optimizer state that survives a restart bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.checkpoint import TrainingState
from minillm.data import IGNORED, Batch, document_starts
from minillm.model import LanguageModel, ModelConfig, initialize
from minillm.optim import (
    LearningRates,
    backward,
    build_optimizers,
    clip_gradients,
    held_out,
    lr_schedule,
    per_byte,
    target_bytes,
)
from minillm.runtime import Runtime

LAW = settings(deadline=None, max_examples=50)
FEW = settings(deadline=None, max_examples=15)
ONE = Runtime(torch.device("cpu"), torch.float32)
V = 30
# Sums of a few hundred float32 terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
RATES = LearningRates(matrix=0.02, embedding=0.01, norm=0.005, weight_decay=0.1)
KINDS = pytest.mark.parametrize("kind", ["muon", "adamw"])
SHAPES = pytest.mark.parametrize("tied", [False, True])


def model_of(tied: bool, seed: int = 0) -> LanguageModel:
    shape = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 32}  # fmt: skip
    model = LanguageModel(ModelConfig(31, **shape, tie_word_embeddings=tied))
    initialize(model, torch.Generator().manual_seed(seed))
    return model


class Numbers:
    """A stream of batches as a run has one: it can be stopped and continued."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> torch.Tensor:
        self.position += 1
        return torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(self.position))

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def new_state(kind: str, tied: bool, seed: int = 0) -> TrainingState:
    model = model_of(tied, seed)
    return TrainingState(model, build_optimizers(model, RATES, kind), Numbers())


def train(state: TrainingState, steps: int) -> None:
    for _ in range(steps):
        tokens = state.data.next()
        logits = state.model.logits(state.model(tokens[:, :-1]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        clip_gradients(state.optimizers.parameters(), 1.0)
        state.optimizers.step(lr_schedule(state.step, 20, 3, 0.5))
        state.step += 1


# ---- A batch -> its loss and gradient


def any_model(causal: bool, tied: bool = False) -> LanguageModel:
    torch.manual_seed(0)  # the weights torch draws by itself; any do
    shape = {"hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32}  # fmt: skip
    return LanguageModel(ModelConfig(V, **shape, causal=causal, tie_word_embeddings=tied))


@st.composite
def batches(draw, least_targets: int = 1) -> Batch:
    """Rows with documents of any lengths (token 0 opens one) and any share of ignored targets."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = torch.randint(V, (rows, length), generator=random)
    tokens[torch.rand(rows, length, generator=random) < 0.3] = 0
    targets = torch.randint(V, (rows, length), generator=random)
    ignored = torch.rand(rows, length, generator=random) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    ignored.flatten()[:least_targets] = False
    return Batch(tokens, targets.masked_fill(ignored, IGNORED), document_starts(tokens, 0))


def token_bytes() -> Tensor:
    return torch.arange(V) % 7  # token 0, 7, … stand for no bytes, as special tokens do


def plain_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """-log p of every target that counts, by log_softmax over whole logits; rows and documents apart."""
    losses = []
    for tokens, targets, start in zip(batch.tokens, batch.targets, batch.start, strict=True):
        for first in start.unique():
            document = start == first
            logits = model.logits(model(tokens[document][None]))[0]
            counted = (targets[document] != IGNORED).nonzero()[:, 0]
            losses.append(-logits.log_softmax(-1)[counted, targets[document][counted]])
    return torch.cat(losses)


@given(batches(), st.booleans())
@FEW
def test_the_loss_is_the_sum_over_documents_run_alone(batch, causal):
    model = any_model(causal)
    with torch.no_grad():
        expected = plain_losses(model, batch).sum()
        torch.testing.assert_close(model(batch.tokens, batch.start, targets=batch.targets), expected, **CLOSE)


def gradients(model: LanguageModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@given(batches(), st.booleans(), st.booleans(), st.integers(1, 60))
@FEW
def test_any_micro_batch_gives_the_mean_loss_and_its_gradient(batch, causal, tied, micro_tokens):
    model = any_model(causal, tied)
    mean = plain_losses(model, batch).mean()
    mean.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = backward(model, batch, micro_tokens, ONE)
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@given(batches(), st.integers(1, 60))
@FEW
def test_gradients_add_up_over_calls(batch, micro_tokens):
    model = any_model(causal=True)
    backward(model, batch, micro_tokens, ONE)
    once = gradients(model)
    backward(model, batch, micro_tokens, ONE)
    for ours, theirs in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, **CLOSE)


@given(batches(), st.integers(2, 3))
@FEW
def test_the_shares_of_the_processes_average_to_the_gradient_of_the_whole(batch, world):
    """What DistributedDataParallel averages, computed one rank after the other."""
    model = any_model(causal=True)
    whole = backward(model, batch, 10, ONE)
    expected = gradients(model)

    class Share(Runtime):
        def sync_gradients(self, model, last):
            return ONE.sync_gradients(model, last)

        def total(self, value):
            return value

    shares, losses = [], []
    for rank in range(world):
        model.zero_grad(set_to_none=False)
        losses.append(backward(model, batch, 10, Share(ONE.device, ONE.dtype, rank, world)))
        shares.append(gradients(model))
    assert sum(losses) == pytest.approx(whole, rel=1e-5)
    for theirs, *ours in zip(expected, *shares, strict=True):
        torch.testing.assert_close(sum(ours) / world, theirs, **CLOSE)


@given(batches())
@FEW
def test_ignored_targets_send_no_gradient(batch):
    model, seen = any_model(causal=True), []
    model.model.register_forward_hook(lambda _, inputs, hidden: seen.append(hidden) or hidden.retain_grad())
    model(batch.tokens, batch.start, targets=batch.targets).backward()
    reached = seen[0].grad.abs().sum(dim=2) > 0
    assert torch.equal(reached, batch.targets != IGNORED)


@given(st.lists(batches(), min_size=1, max_size=3), st.booleans())
@FEW
def test_held_out_loss_is_all_loss_over_all_targets_or_all_bytes_of_text(some, causal):
    model, sizes = any_model(causal), token_bytes()
    with torch.no_grad():
        nats = sum(plain_losses(model, batch).sum().item() for batch in some)
    size = sum(sizes[target].item() for b in some for target in b.targets.flatten() if target != IGNORED)
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in some)
    loss = held_out(model, some, sizes, ONE)
    if targets:
        assert loss.per_target == pytest.approx(nats / targets, rel=1e-5)
    if size:
        assert loss.per_byte == pytest.approx(nats / size, rel=1e-5)


@given(batches())
@FEW
def test_one_batch_has_the_same_nats_per_byte_in_training_and_in_validation(batch):
    model, sizes = any_model(causal=True), token_bytes()
    loss = backward(model, batch, 1000, ONE)
    if target_bytes(batch, sizes):
        expected = held_out(model, [batch], sizes, ONE).per_byte
        assert per_byte(loss, batch, sizes) == pytest.approx(expected, rel=1e-5)


def test_validation_leaves_no_gradient_and_no_graph():
    model = any_model(causal=True)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    held_out(model, [Batch(tokens, tokens, document_starts(tokens, 0))], token_bytes(), ONE)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_targets_that_stand_for_no_bytes_divide_nothing_by_zero():
    model = any_model(causal=True)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(tokens, tokens, document_starts(tokens, 0))
    value = held_out(model, [batch], token_bytes(), ONE).per_byte
    assert value == pytest.approx(model(batch.tokens, batch.start, targets=batch.targets).item(), rel=1e-5)


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model = any_model(causal=True)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    batch = Batch(tokens, torch.full_like(tokens, IGNORED), document_starts(tokens, 0))
    assert backward(model, batch, 4, ONE) == 0.0
    assert all(not gradient.any() for gradient in gradients(model))


# ---- Groups


@KINDS
@SHAPES
def test_every_parameter_is_in_exactly_one_group(kind, tied):
    model = model_of(tied)
    grouped = build_optimizers(model, RATES, kind).parameters()
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in model.parameters()}


@KINDS
@SHAPES
def test_each_kind_of_weight_has_its_rate_and_only_block_matrices_decay(kind, tied):
    model = model_of(tied)
    groups = list(build_optimizers(model, RATES, kind).groups())
    by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = (RATES.norm, 0.0)
        elif name.startswith(("model.embed_tokens", "lm_head")):
            expected = (RATES.embedding, 0.0)
        else:
            expected = (RATES.matrix, RATES.weight_decay)
        assert by_id[id(parameter)] == expected, name


def test_muon_moves_the_block_matrices_and_adamw_the_rest():
    model = model_of(tied=False)
    muon, adamw = build_optimizers(model, RATES, "muon").optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = [names[id(parameter)] for group in muon.param_groups for parameter in group["params"]]
    assert sorted(moved) == sorted(
        f"model.layers.{i}.{matrix}.weight"
        for i in range(2)
        for matrix in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    )  # fmt: skip


@KINDS
def test_a_step_scales_the_base_rates_and_clears_the_gradients(kind):
    state = new_state(kind, tied=False)
    train(state, 1)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    for multiplier in (0.5, 0.25, 1.0):  # always of the base, never of the rate before
        state.optimizers.step(multiplier)
        for group in state.optimizers.groups():
            assert group["lr"] == multiplier * group["base_rate"]


@KINDS
def test_a_multiplier_of_zero_moves_nothing(kind):
    state = new_state(kind, tied=True)
    train(state, 2)
    before = [parameter.clone() for parameter in state.model.parameters()]
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizers.step(0.0)
    for one, other in zip(before, state.model.parameters(), strict=True):
        assert torch.equal(one, other)


@KINDS
def test_training_on_one_batch_lowers_its_loss(kind):
    state = new_state(kind, tied=False)
    tokens = state.data.next()

    def loss() -> torch.Tensor:
        logits = state.model.logits(state.model(tokens[:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    before = loss().item()
    for _ in range(20):
        loss().backward()
        state.optimizers.step(1.0)
    assert loss().item() < before / 2


# ---- The schedule

RUNS = {
    "steps": st.integers(1, 300),
    "warmup": st.integers(0, 400),
    "decay": st.floats(0, 1),
}


@given(**RUNS)
@LAW
def test_the_rate_stays_within_its_base_and_never_reaches_zero(steps, warmup, decay):
    rates = [lr_schedule(step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


@given(**RUNS)
@LAW
def test_the_rate_rises_and_then_falls(steps, warmup, decay):
    rates = [lr_schedule(step, steps, warmup, decay) for step in range(steps)]
    falls_from = steps - decay * steps
    for step in range(steps - 1):
        if step + 1 <= min(warmup, falls_from):
            assert rates[step] < rates[step + 1]
        if step >= max(warmup, falls_from):
            assert rates[step] > rates[step + 1]
    if warmup < falls_from:
        assert rates[warmup] == 1


def test_the_rate_of_a_small_run_by_hand():
    rates = [lr_schedule(step, 10, 3, 0.4) for step in range(10)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4])


# ---- Clipping


@given(st.floats(0.01, 100), st.floats(0.01, 10), st.integers(0, 2**32))
@LAW
def test_clipping_bounds_the_common_norm_and_keeps_the_direction(size, largest, seed):
    model, random = model_of(tied=False), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=random)
    parameters = list(model.parameters())
    before = torch.cat([parameter.grad.flatten() for parameter in parameters])
    returned = clip_gradients(parameters, largest)
    after = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert returned == pytest.approx(before.norm().item(), rel=1e-4)
    # torch divides by norm + 1e-6, hence a relative 1e-4 at the smallest norms.
    scale = min(1.0, largest / before.norm().item())
    torch.testing.assert_close(after, before * scale, rtol=1e-4, atol=0)
    assert after.norm() <= largest * (1 + 1e-5)


# ---- The restart


@KINDS
@SHAPES
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_restored_run_goes_on_bit_by_bit_as_if_never_stopped(tmp_path, kind, tied, stop):
    whole = new_state(kind, tied)
    train(whole, 8)
    first = new_state(kind, tied)
    train(first, stop)
    first.tokens, first.seconds = 17, 2.5
    first.save(tmp_path)
    second = new_state(kind, tied, seed=1)  # other weights: all must come from the file
    second.restore(tmp_path)
    assert (second.step, second.tokens, second.seconds) == (stop, 17, 2.5)
    train(second, 8 - stop)
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [state.optimizers.state_tensors() for state in (whole, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.data.state_dict() == second.data.state_dict()


@KINDS
def test_the_rates_of_a_restored_run_are_those_it_was_built_with(tmp_path, kind):
    state = new_state(kind, tied=False)
    train(state, 3)
    state.save(tmp_path)
    again = new_state(kind, tied=False)
    again.restore(tmp_path)
    assert [g["base_rate"] for g in again.optimizers.groups()] == [
        g["base_rate"] for g in state.optimizers.groups()
    ]


@KINDS
def test_saving_changes_nothing(tmp_path, kind):
    saved, plain = new_state(kind, tied=True), new_state(kind, tied=True)
    for state in (saved, plain):
        train(state, 2)
    saved.save(tmp_path)
    for state in (saved, plain):
        train(state, 2)
    for one, other in zip(saved.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
