"""Rollouts: what stands where, and that neither padding nor company nor the kind of sampling changes it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.chat import ChatTemplate, with_chat_template
from minillm.generate import SamplingOptions, generate
from minillm.layout import forward_passes, gather_previous
from minillm.model import (
    LanguageModel,
    ScalarModel,
    config_of_depth,
    initialize,
    scalar_from_language_model,
)
from minillm.options import PolicyOptions
from minillm.ppo import Aligner, Rollout, pack_responses
from minillm.preferences import Responses, sample_responses
from minillm.run import Runtime
from minillm.tokenizer import Tokenizer

LAW = settings(max_examples=15)
V, STOP = 290, 3
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11], [12, 13]]
# One network, two paths through it (kept keys and values, and whole rows) and two orders of adding.
ROUNDED = {"rtol": 1e-4, "atol": 2e-5}


def tiny_model(seed: int) -> LanguageModel:
    model = LanguageModel(config_of_depth(2, V, 40, hidden_size=16, head_dim=8))
    initialize(model, torch.Generator().manual_seed(seed))
    for name, weight in model.named_parameters():  # those start at zero: blocks that do nothing
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(seed))
    return model


POLICY, REF = tiny_model(0), tiny_model(1)
CRITIC: ScalarModel = scalar_from_language_model(tiny_model(2), torch.Generator().manual_seed(2))
PLAIN = SamplingOptions(max_new_tokens=12, stop_ids=(STOP,))
KINDS_OF_SAMPLING = {
    "plain": PLAIN,
    "cold": replace(PLAIN, temperature=0.6),
    "hot": replace(PLAIN, temperature=1.7),
    "top-k": replace(PLAIN, top_k=5),
    "nucleus": replace(PLAIN, top_p=0.8),
    "all of it": replace(PLAIN, temperature=0.7, top_k=9, top_p=0.9),
}


TEMPLATE = ChatTemplate(with_chat_template(Tokenizer.train(["No cats."], 262)))


def aligner_of(sampling: SamplingOptions = PLAIN, ref_model: LanguageModel = REF, each: int = 2) -> Aligner:
    """The models, with about so many sequences in a forward pass."""
    options = PolicyOptions(out="nowhere", micro_tokens=each * 16)
    runtime = Runtime(torch.device("cpu"), torch.float32)
    aligner = Aligner(options, sampling, runtime, TEMPLATE, POLICY, None, None, None)
    aligner.ref_model, aligner.sampling = ref_model, sampling
    return aligner


def sampled(sampling: SamplingOptions, seed: int = 0) -> Responses:
    seeds = [seed * 100 + i for i in range(len(PROMPTS))]
    return sample_responses(POLICY, PROMPTS, sampling, seeds, lambda tokens: "")


def chosen(responses: Responses, numbers: list[int]) -> Responses:
    """Some of the responses alone."""
    return Responses(*([values[i] for i in numbers] for values in vars(responses).values()))


def observed(responses: Responses, sampling: SamplingOptions = PLAIN, each: int = 100, parts=None) -> Rollout:
    numbers = range(len(responses.rows))
    return aligner_of(sampling, each=each).observe(
        POLICY, responses, 0.5 * torch.arange(len(numbers)), parts or [numbers], CRITIC
    )


ALL = list(range(len(PROMPTS)))


@pytest.mark.parametrize("kind", KINDS_OF_SAMPLING)
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities_of_scoring_are_those_of_sampling(kind, seed):
    sampling = KINDS_OF_SAMPLING[kind]
    rollout = observed(sampled(sampling, seed), sampling)
    samples = generate(POLICY, PROMPTS, sampling, [seed * 100 + i for i in ALL])
    for number, (row, mask) in enumerate(zip(rollout.logprobs, rollout.mask, strict=True)):
        torch.testing.assert_close(row[mask], samples.logprobs[number, : int(mask.sum())], **ROUNDED)


@pytest.mark.parametrize("kind", KINDS_OF_SAMPLING)
def test_the_ratio_is_exactly_one_before_the_first_update(kind):
    """The update's forward pass is the rollout's, gradients or not: the same sums in the same order."""
    sampling = KINDS_OF_SAMPLING[kind]
    responses, parts = sampled(sampling), [range(2), range(2, 5)]
    rollout = observed(responses, sampling, each=2, parts=parts)
    for rows in (rows for part in parts for rows in forward_passes(part, responses.rows, 2 * 16)):
        numbers, tokens, start, index = pack_responses(responses, rows, torch.device("cpu"))
        hidden, taken = gather_previous(POLICY(tokens, start), index), tokens.flatten()[index]
        allowed = torch.cat([rollout.allowed[i] for i in numbers]) if rollout.allowed else None
        logprobs = POLICY.token_logprobs(hidden, taken, sampling.temperature, allowed).logprobs
        assert logprobs.requires_grad
        assert (logprobs - rollout.logprobs[numbers][rollout.mask[numbers]]).exp().eq(1).all()


@given(st.permutations(ALL), st.integers(1, len(PROMPTS)), st.integers(1, 5), st.integers(0, 3))
@LAW
def test_order_company_padding_and_packing_change_nothing(order, count, each, seed):
    responses = sampled(PLAIN, seed)
    together = observed(chosen(responses, order[:count]), each=each)
    for place, number in enumerate(order[:count]):
        alone, mask = observed(chosen(responses, [number])), together.mask[place]
        assert mask.sum() == alone.mask.sum()
        for name in ("logprobs", "ref_logprobs", "kl", "entropy", "values"):
            one, other = getattr(together, name)[place][mask], getattr(alone, name)[alone.mask]
            torch.testing.assert_close(one, other, **ROUNDED)
        assert together.scores[place] == 0.5 * place


def test_kl_to_the_reference_is_zero_at_the_start_and_never_negative_elsewhere():
    responses = sampled(PLAIN)
    start = aligner_of(ref_model=POLICY, each=100).observe(POLICY, responses, torch.zeros(5), [range(5)])
    assert start.kl.abs().max() < 1e-6
    torch.testing.assert_close(start.logprobs, start.ref_logprobs, rtol=0, atol=0)
    assert observed(responses).kl[start.mask].min() > 0


def test_entropy_is_that_of_the_distribution_sampled_from():
    sampling = replace(PLAIN, temperature=0.6)
    responses = chosen(sampled(sampling), [2])
    rollout, (row,), (begin,) = observed(responses, sampling), responses.rows, responses.prompt_lengths
    p = POLICY.logits(POLICY(torch.tensor([row])))[0, begin - 1 : -1].div(0.6).log_softmax(1)
    torch.testing.assert_close(rollout.entropy[0], -(p.exp() * p).sum(1), **ROUNDED)


def test_the_critic_speaks_of_the_state_before_each_token_and_equals_its_model_everywhere():
    responses = chosen(sampled(PLAIN), [0, 2])
    rollout = observed(responses)
    for i, row in enumerate(responses.rows):
        alone = CRITIC(torch.tensor([row]))[0, responses.prompt_lengths[i] - 1 : -1]
        torch.testing.assert_close(rollout.values[i][rollout.mask[i]], alone, **ROUNDED)
    assert rollout.values[~rollout.mask].eq(0).all()


def test_without_a_critic_every_value_is_zero():
    responses = sampled(PLAIN)
    assert aligner_of().observe(POLICY, responses, torch.zeros(5), [range(5)]).values.eq(0).all()


def test_no_prompt_token_gets_a_gradient_from_the_loss_of_a_response():
    """The embedding of a token that stands only behind a response's last state has none; of a prompt's logits
    none is asked for."""
    responses = sampled(PLAIN)
    _, tokens, start, index = pack_responses(responses, [[2]], torch.device("cpu"))
    hidden = POLICY(tokens, start).detach().requires_grad_()
    POLICY.token_logprobs(gather_previous(hidden, index), tokens.flatten()[index]).logprobs.sum().backward()
    touched = hidden.grad[0].ne(0).any(dim=1)
    states = range(responses.prompt_lengths[2] - 1, len(responses.rows[2]) - 1)
    assert touched.nonzero()[:, 0].tolist() == list(states)


def test_top_k_leaves_k_tokens_to_choose_from_and_the_one_taken_is_among_them():
    sampling = replace(PLAIN, top_k=5)
    responses = sampled(sampling)
    rollout = observed(responses, sampling)
    for i, allowed in rollout.allowed.items():
        taken = torch.tensor(responses.rows[i][responses.prompt_lengths[i] :])
        assert allowed.sum(1).eq(5).all() and allowed.gather(1, taken[:, None]).all()
    assert sorted(rollout.allowed) == ALL
    assert rollout.logprobs[rollout.mask].isfinite().all()
    assert rollout.ref_logprobs[rollout.mask].isfinite().all()
    assert not observed(responses).allowed
