"""From a batch to a loss: accumulation, and nats per byte, each against plain autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.data import IGNORED, Batch, document_starts
from minillm.loss import backward, held_out, per_byte, target_bytes
from minillm.model import LanguageModel, ModelConfig
from minillm.run import Runtime

LAW = settings(deadline=None, max_examples=15)
ONE = Runtime(torch.device("cpu"), torch.float32)
V = 30
# Sums of a few hundred float32 terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def model_of(causal: bool, tied: bool = False) -> LanguageModel:
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
@LAW
def test_the_loss_is_the_sum_over_documents_run_alone(batch, causal):
    model = model_of(causal)
    with torch.no_grad():
        expected = plain_losses(model, batch).sum()
        torch.testing.assert_close(model(batch.tokens, batch.start, targets=batch.targets), expected, **CLOSE)


def gradients(model: LanguageModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@given(batches(), st.booleans(), st.booleans(), st.integers(1, 60))
@LAW
def test_any_micro_batch_gives_the_mean_loss_and_its_gradient(batch, causal, tied, micro_tokens):
    model = model_of(causal, tied)
    mean = plain_losses(model, batch).mean()
    mean.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = backward(model, batch, micro_tokens, ONE)
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@given(batches(), st.integers(1, 60))
@LAW
def test_gradients_add_up_over_calls(batch, micro_tokens):
    model = model_of(causal=True)
    backward(model, batch, micro_tokens, ONE)
    once = gradients(model)
    backward(model, batch, micro_tokens, ONE)
    for ours, theirs in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, **CLOSE)


@given(batches(), st.integers(2, 3))
@LAW
def test_the_shares_of_the_processes_average_to_the_gradient_of_the_whole(batch, world):
    """What DistributedDataParallel averages, computed one rank after the other."""
    model = model_of(causal=True)
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
@LAW
def test_ignored_targets_send_no_gradient(batch):
    model, seen = model_of(causal=True), []
    model.model.register_forward_hook(lambda _, inputs, hidden: seen.append(hidden) or hidden.retain_grad())
    model(batch.tokens, batch.start, targets=batch.targets).backward()
    reached = seen[0].grad.abs().sum(dim=2) > 0
    assert torch.equal(reached, batch.targets != IGNORED)


@given(st.lists(batches(), min_size=1, max_size=3), st.booleans())
@LAW
def test_held_out_loss_is_all_loss_over_all_targets_or_all_bytes_of_text(some, causal):
    model, sizes = model_of(causal), token_bytes()
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
@LAW
def test_one_batch_has_the_same_nats_per_byte_in_training_and_in_validation(batch):
    model, sizes = model_of(causal=True), token_bytes()
    loss = backward(model, batch, 1000, ONE)
    if target_bytes(batch, sizes):
        expected = held_out(model, [batch], sizes, ONE).per_byte
        assert per_byte(loss, batch, sizes) == pytest.approx(expected, rel=1e-5)


def test_validation_leaves_no_gradient_and_no_graph():
    model = model_of(causal=True)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    held_out(model, [Batch(tokens, tokens, document_starts(tokens, 0))], token_bytes(), ONE)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_targets_that_stand_for_no_bytes_divide_nothing_by_zero():
    model = model_of(causal=True)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(tokens, tokens, document_starts(tokens, 0))
    value = held_out(model, [batch], token_bytes(), ONE).per_byte
    assert value == pytest.approx(model(batch.tokens, batch.start, targets=batch.targets).item(), rel=1e-5)


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model = model_of(causal=True)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    batch = Batch(tokens, torch.full_like(tokens, IGNORED), document_starts(tokens, 0))
    assert backward(model, batch, 4, ONE) == 0.0
    assert all(not gradient.any() for gradient in gradients(model))


# ---- Several processes


class Recorder(Runtime):
    """One of two processes: what it asks of the other is written down, and the other has the same."""

    def __init__(self, rank: int) -> None:
        super().__init__(ONE.device, ONE.dtype, rank, 2)
        object.__setattr__(self, "last", [])
        object.__setattr__(self, "totals", [])

    def sync_gradients(self, forward, last):
        self.last.append(last)
        return ONE.sync_gradients(forward, last)

    def total(self, value):
        self.totals.append(value.clone())
        return 2 * value


def test_gradients_are_averaged_once_a_step_with_the_last_micro_batch():
    tokens = torch.randint(V, (8, 4), generator=torch.Generator().manual_seed(0))
    here = Recorder(1)
    backward(model_of(causal=True), Batch(tokens, tokens, document_starts(tokens, 0)), 4, here)
    assert here.last == [False, False, False, True]


def test_the_loss_of_a_step_is_summed_over_the_processes():
    tokens = torch.randint(V, (4, 4), generator=torch.Generator().manual_seed(0))
    model, batch = model_of(causal=True), Batch(tokens, tokens, document_starts(tokens, 0))
    own = batch.rows(2, 4)
    found = backward(model, batch, 100, Recorder(1))
    assert found == pytest.approx(2 * model(own.tokens, own.start, targets=own.targets).item() / 16, rel=1e-5)


def test_each_process_validates_its_own_batches_and_the_sums_are_of_all():
    model, sizes, batches = model_of(causal=True), token_bytes(), []
    for seed in range(5):
        tokens = torch.randint(V, (2, 4), generator=torch.Generator().manual_seed(seed))
        batches.append(Batch(tokens, tokens, document_starts(tokens, 0)))
    for rank in (0, 1):
        here, own = Recorder(rank), batches[rank::2]
        loss = held_out(model, batches, sizes, here)
        nats = sum(model(b.tokens, b.start, targets=b.targets).item() for b in own)
        size = sum(target_bytes(b, sizes) for b in own)
        (totals,) = here.totals
        assert totals.tolist() == pytest.approx([nats, 8 * len(own), size])
        assert loss.per_byte == pytest.approx(nats / size)
        assert totals.dtype == torch.float64 and totals.device.type == "cpu"
