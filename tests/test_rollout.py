"""Rollouts: what stands where, and that neither padding nor company nor the kind of sampling changes it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.chat import ChatTemplate, with_chat_template
from minillm.generate import SamplingOptions, generate
from minillm.layout import gather_previous
from minillm.model import (
    LanguageModel,
    ScalarModel,
    config_of_depth,
    initialize,
    scalar_from_language_model,
)
from minillm.options import PolicyOptions
from minillm.ppo import Aligner, Prompt, Responses, Rollout
from minillm.preferences import sample_responses
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
    found = sample_responses(POLICY, PROMPTS, sampling, [seed * 100 + i for i in range(len(PROMPTS))])
    prompts = [Prompt([], tokens) for tokens in PROMPTS]
    scores = 0.5 * torch.arange(len(PROMPTS))
    return Responses(prompts, found.rows, found.ended, [""] * len(PROMPTS), scores)


def observed(
    responses: Responses, numbers: list[int], sampling: SamplingOptions = PLAIN, each: int = 100
) -> list[Rollout]:
    return aligner_of(sampling, each=each).observe(POLICY, responses, numbers, CRITIC)


ALL = list(range(len(PROMPTS)))


@pytest.mark.parametrize("kind", KINDS_OF_SAMPLING)
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities_of_scoring_are_those_of_sampling(kind, seed):
    sampling = KINDS_OF_SAMPLING[kind]
    (rollout,) = observed(sampled(sampling, seed), ALL, sampling)
    samples = generate(POLICY, PROMPTS, sampling, [seed * 100 + i for i in ALL])
    for number, row, mask in zip(rollout.numbers, rollout.logprobs, rollout.mask, strict=True):
        torch.testing.assert_close(row[mask], samples.logprobs[number, : int(mask.sum())], **ROUNDED)


@pytest.mark.parametrize("kind", KINDS_OF_SAMPLING)
def test_the_ratio_is_exactly_one_before_the_first_update(kind):
    """The update's forward pass is the rollout's, gradients or not: the same sums in the same order."""
    sampling = KINDS_OF_SAMPLING[kind]
    for rollout in observed(sampled(sampling), [3, 1, 4], sampling, each=2):
        hidden = gather_previous(POLICY(rollout.tokens, rollout.start), rollout.index)
        taken = rollout.tokens.flatten()[rollout.index]
        logprobs = POLICY.token_logprobs(hidden, taken, sampling.temperature, rollout.allowed).logprobs
        assert logprobs.requires_grad
        assert (logprobs - rollout.logprobs[rollout.mask]).exp().eq(1).all()


@given(st.permutations(ALL), st.integers(1, len(PROMPTS)), st.integers(1, 5), st.integers(0, 3))
@LAW
def test_order_company_padding_and_packing_change_nothing(order, count, each, seed):
    responses = sampled(PLAIN, seed)
    found = {}
    for rollout in observed(responses, order[:count], each=each):
        for place, number in enumerate(rollout.numbers):
            found[number] = (rollout, place, rollout.mask[place])
    assert sorted(found) == sorted(order[:count])
    for number, (part, place, mask) in found.items():
        (alone,) = observed(responses, [number])
        assert mask.sum() == alone.mask.sum()
        for name in ("logprobs", "ref_logprobs", "kl", "entropy", "values"):
            one, other = getattr(part, name)[place][mask], getattr(alone, name)[alone.mask]
            torch.testing.assert_close(one, other, **ROUNDED)
        assert part.scores[place] == 0.5 * number


def test_kl_to_the_reference_is_zero_at_the_start_and_never_negative_elsewhere():
    responses = sampled(PLAIN)
    (start,) = aligner_of(ref_model=POLICY, each=100).observe(POLICY, responses, ALL, None)
    assert start.kl.abs().max() < 1e-6
    torch.testing.assert_close(start.logprobs, start.ref_logprobs, rtol=0, atol=0)
    assert observed(responses, ALL)[0].kl[start.mask].min() > 0


def test_entropy_is_that_of_the_distribution_sampled_from():
    sampling = replace(PLAIN, temperature=0.6)
    (rollout,) = observed(sampled(sampling), [2], sampling)
    p = POLICY.logits(POLICY(rollout.tokens))[0, rollout.index - 1].div(0.6).log_softmax(1)
    torch.testing.assert_close(rollout.entropy[0], -(p.exp() * p).sum(1), **ROUNDED)


def test_the_critic_speaks_of_the_state_before_each_token_and_equals_its_model_everywhere():
    (rollout,) = observed(sampled(PLAIN), [0, 2])
    everywhere = CRITIC(rollout.tokens, rollout.start).flatten()
    torch.testing.assert_close(rollout.values[rollout.mask], everywhere[rollout.index - 1], rtol=0, atol=0)
    assert rollout.values[~rollout.mask].eq(0).all()


def test_without_a_critic_every_value_is_zero():
    assert aligner_of().observe(POLICY, sampled(PLAIN), [0, 1], None)[0].values.eq(0).all()


def test_no_prompt_token_gets_a_gradient_from_the_loss_of_a_response():
    """The embedding of a token that stands only behind a response's last state has none; of a prompt's logits
    none is asked for."""
    (rollout,) = observed(sampled(PLAIN), [2])
    hidden = POLICY(rollout.tokens, rollout.start).detach().requires_grad_()
    before = gather_previous(hidden, rollout.index)
    taken = rollout.tokens.flatten()[rollout.index]
    POLICY.token_logprobs(before, taken).logprobs.sum().backward()
    touched = hidden.grad[0].ne(0).any(dim=1)
    assert touched.nonzero()[:, 0].tolist() == (rollout.index - 1).tolist()


def test_top_k_leaves_k_tokens_to_choose_from_and_the_one_taken_is_among_them():
    sampling = replace(PLAIN, top_k=5)
    (rollout,) = observed(sampled(sampling), [0, 1, 2], sampling)
    allowed: Tensor | None = rollout.allowed
    assert allowed is not None and allowed.sum(1).eq(5).all()
    assert allowed.gather(1, rollout.tokens.flatten()[rollout.index][:, None]).all()
    assert rollout.logprobs[rollout.mask].isfinite().all()
    assert rollout.ref_logprobs[rollout.mask].isfinite().all()
    assert observed(sampled(PLAIN), [0])[0].allowed is None
