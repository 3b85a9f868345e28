"""Parameter groups, the schedule, clipping, and an optimizer state that survives a restart bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.model import LanguageModel, ModelConfig, initialize
from minillm.optim import LearningRates, build_optimizers, clip_gradients, lr_schedule
from minillm.run import TrainingState

LAW = settings(deadline=None, max_examples=50)
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


def test_adamws_steps_are_those_of_its_algorithm_by_hand():
    """Algorithm 2 of Loshchilov & Hutter, β = (.9, .95), over gradients so small that eps counts."""
    model, random = model_of(tied=False), torch.Generator().manual_seed(0)
    optimizers = build_optimizers(model, RATES, "adamw", eps=1e-3)
    groups = {id(p): group for group in optimizers.groups() for p in group["params"]}
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
        optimizers.step(0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_adam_trusts_the_smallest_gradients_unless_told_otherwise():
    """With eps at 1e-10 the first step of a gradient of 1e-7 is a whole one."""
    model = model_of(tied=False)
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.grad = torch.full_like(before, 1e-7)
    build_optimizers(model, RATES, "muon").step(1.0)
    torch.testing.assert_close(model.lm_head.weight, before - RATES.embedding, rtol=0, atol=1e-4)


def test_muons_momentum_is_095_and_looks_ahead():
    """Its step is what Muon without momentum makes of μ · mean + (1 - μ) · gradient (Nesterov's)."""
    model, random = model_of(tied=False), torch.Generator().manual_seed(0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    optimizers = build_optimizers(model, LearningRates(1.0, 0.0, 0.0, 0.0), "muon")
    other, mean = torch.nn.Parameter(weight.detach().clone()), torch.zeros(weight.shape)
    plain = torch.optim.Muon([other], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    for _ in range(4):
        weight.grad = torch.randn(weight.shape, generator=random)
        mean = 0.95 * mean + 0.05 * weight.grad
        other.grad = 0.95 * mean + 0.05 * weight.grad
        optimizers.step(1.0)
        plain.step()
        # The five steps of Newton and Schulz run in bfloat16: of numbers below 1 the last bit is 1/256.
        torch.testing.assert_close(weight, other, rtol=0, atol=0.02)


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


def test_without_decay_the_rate_stays_and_without_warmup_it_starts_there():
    assert [lr_schedule(step, 5, 0, 0.0) for step in range(5)] == [1.0] * 5
    assert lr_schedule(0, 1, 0, 1.0) == 1.0
    assert lr_schedule(9, 10, 0, 1.0) == pytest.approx(0.1)


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
