"""A rollout says what its models say, whatever else is in the batch, and what an update learns from it."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import a_stream, killed_at_update, tiny_model
from torch import Tensor

from minillm.chat import ChatTemplate, with_chat_template
from minillm.data import Mixture, Shuffled, seed_of
from minillm.dpo import response_logprobs, rewards_of
from minillm.errors import InputError
from minillm.generate import Samples, SamplingOptions, filter_logits
from minillm.model import LanguageModel, ScalarModel, scalar_from_language_model, score_rows
from minillm.options import PolicyOptions
from minillm.ppo import (
    KL_ESTIMATORS,
    Aligner,
    Pass,
    Rollout,
    gae,
    moments,
    penalised_rewards,
    policy_losses,
    value_losses,
    with_advantages,
)
from minillm.preferences import Prompt, Ranking, ranking_by
from minillm.reward import collate, encode_rankings, encode_response
from minillm.run import Runtime
from minillm.tokenizer import Tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# One network, two paths through it (kept keys and values, and whole rows) and two orders of adding.
ROUNDED = {"rtol": 1e-3, "atol": 1e-4}
ASKED = [[{"role": "user", "content": f"How many cats on day {i}?"}] for i in range(8)]
PLAIN = SamplingOptions(max_new_tokens=6)
KINDS_OF_SAMPLING = {
    "plain": PLAIN,
    "hot": replace(PLAIN, temperature=1.7),
    "top-k": replace(PLAIN, top_k=5),
    "nucleus": replace(PLAIN, top_p=0.7),
    "all of it": replace(PLAIN, temperature=0.7, top_k=9, top_p=0.9),
}


def options_with(**given) -> PolicyOptions:
    return PolicyOptions(out="nowhere", **{"rollout_batch": 16} | given)


def moving_model(seed: int = 0) -> LanguageModel:
    """A model in which every block does something: those start at zero."""
    model = tiny_model()[0]
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return model


POLICY, REF, TOKENIZER = moving_model(0), moving_model(1), with_chat_template(tiny_model()[1])
TEMPLATE = ChatTemplate(TOKENIZER)
REWARD: ScalarModel = scalar_from_language_model(moving_model(2), torch.Generator().manual_seed(2))
TOKENS = [TEMPLATE.prompt(messages) for messages in ASKED]
PROMPTS = [Prompt(messages, tokens=tokens) for messages, tokens in zip(ASKED, TOKENS, strict=True)]


# ---- Advantages, from a rollout made by hand


def by_hand(scores: Sequence[float], spread: float = 1.0, seed: int = 0) -> Rollout:
    """Responses of 1, 2, 3, … tokens with numbers from nowhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(len(scores), len(scores), dtype=torch.bool).tril()
    logprobs, ref_logprobs, values = (
        spread * torch.randn(mask.shape, generator=generator) * mask for _ in range(3)
    )
    responses = [[0] * (1 + i) for i in range(len(scores))]
    return Rollout(
        samples=Samples([[0]] * len(scores), responses, [True] * len(scores)),
        scores=torch.tensor(scores),
        minibatches=[],
        mask=mask,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape),
        values=values,
        advantages=torch.zeros(mask.shape),
        returns=torch.zeros(mask.shape),
    )


def learned(rollout: Rollout, unit: float = 1.0, **given) -> Rollout:
    """The rollout with what PPO makes of it at β .3."""
    return with_advantages(rollout, unit, 0.3, options_with(**given), CPU)[0]


SCORES = (1.0, -2.0, 0.5, 3.0)


def test_advantages_are_gaes_of_penalised_scores_with_gamma_and_lambda_each_in_its_place():
    rollout = by_hand(SCORES)
    found = learned(rollout, unit=2.0, gamma=0.5, lam=0.9, whiten=False)
    kl = rollout.logprobs - rollout.ref_logprobs
    rewards = penalised_rewards(rollout.scores / 2, kl, rollout.mask, 0.3)
    expected = gae(rewards, rollout.values, rollout.mask, 0.5, 0.9)
    torch.testing.assert_close(found.advantages, expected, **CLOSE)
    torch.testing.assert_close(found.returns, expected + rollout.values, **CLOSE)


def test_advantages_are_whitened_over_the_rollout_if_asked_and_returns_never():
    rollout = by_hand(SCORES)
    white, plain = (learned(rollout, whiten=whiten) for whiten in (True, False))
    own = white.advantages[rollout.mask]
    assert own.mean().abs() < 1e-5 and own.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert plain.advantages[rollout.mask].std(correction=0) != pytest.approx(1, abs=0.05)
    torch.testing.assert_close(white.returns, plain.returns, rtol=0, atol=0)


def test_explained_variance_is_of_the_returns_that_the_critic_should_have_said():
    rollout = by_hand(SCORES)
    options = options_with(lam=1.0, whiten=False)
    truth = learned(replace(rollout, values=torch.zeros_like(rollout.values)), lam=1.0, whiten=False).returns
    for share, expected in ((1.0, 1.0), (0.5, 0.75), (0.0, 0.0)):
        halfway = replace(rollout, values=share * truth)
        metrics = with_advantages(halfway, 1.0, 0.3, options, CPU)[1]
        assert metrics["explained_variance"] == pytest.approx(expected, abs=1e-3)


def test_grpos_advantages_compare_the_responses_of_one_prompt():
    rollout = by_hand([1.0, 3.0, 9.0, 7.0, 5.0, 5.0])
    found, none = with_advantages(rollout, 1.0, 0.3, options_with(algorithm="grpo", group_size=2), CPU)
    expected = torch.tensor([-1.0, 1.0, 1.0, -1.0, 0.0, 0.0])  # each token of a response has the response's
    torch.testing.assert_close(found.advantages, expected[:, None] * rollout.mask, rtol=0, atol=1e-3)
    assert not none


# ---- Rollouts


def aligner_of(
    sampling: SamplingOptions = PLAIN,
    policy: LanguageModel = POLICY,
    reward_model: ScalarModel | None = REWARD,
    **given,
) -> Aligner:
    """The policy, whose reference is another model; and copies of all that an update moves."""
    options = options_with(**given)
    critic = deepcopy(reward_model) if options.algorithm == "ppo" else None
    aligner = Aligner(options, sampling, CPU, TEMPLATE, deepcopy(policy), reward_model, critic, None)
    aligner.ref_model = REF
    aligner.beta = 0.3
    return aligner


def rolled_out(step: int = 0, sampling: SamplingOptions = PLAIN, **given) -> tuple[Rollout, dict[str, float]]:
    aligner = aligner_of(sampling, **given)
    return aligner.rollout(
        PROMPTS[: aligner.options.rollout_batch // aligner.options.responses_per_prompt], step
    )


def rows_of(samples: Samples) -> list[tuple[list[int], int]]:
    """Each prompt with its response, and where that begins."""
    own = zip(samples.prompts, samples.responses, strict=True)
    return [([*prompt, *response], len(prompt)) for prompt, response in own]


def numbers_of(passes: Sequence[Pass]) -> list[int]:
    """Which responses of a rollout a minibatch is of."""
    return sorted(set(chain(*(one.cells[0].tolist() for one in passes))))


def test_the_responses_of_a_group_differ_and_so_do_those_of_two_steps_and_two_runs():
    found = [rolled_out(step, group_size=4, seed=seed)[0] for step, seed in ((0, 0), (1, 0), (0, 1))]
    rows = [[tuple(row) for row, _ in rows_of(one.samples)] for one in found]
    for first in range(0, 16, 4):
        assert len(set(rows[0][first : first + 4])) == 4
    assert len(set(chain(*rows))) == 3 * 16


def test_a_rollout_is_dealt_whole_to_its_minibatches_with_groups_together_and_anew_at_each_step():
    dealt = []
    for step in range(3):
        rollout, metrics = rolled_out(step, group_size=2, minibatches=4)
        asked = [TOKENS.index(prompt) for prompt in rollout.samples.prompts]
        dealt.append([[asked[number] for number in numbers_of(passes)] for passes in rollout.minibatches])
        assert sorted(chain(*dealt[-1])) == sorted([*range(8), *range(8)])
        assert all(len(own) == 4 and own[::2] == own[1::2] for own in dealt[-1])
        assert metrics["length"] == pytest.approx(rollout.mask.sum().item() / 16)
    assert dealt[0] != dealt[1] != dealt[2]


def test_figures_of_a_rollout_are_sums_over_responses_and_of_entropy_over_tokens():
    rollout, figures = rolled_out(rollout_batch=8)
    assert figures["score"] == pytest.approx(rollout.scores.mean().item(), abs=1e-5)
    assert figures["score_deviation"] == pytest.approx(rollout.scores.std(correction=0).item(), abs=1e-5)
    assert figures["kl"] == pytest.approx(rollout.kl.sum(1).mean().item(), rel=1e-4)
    assert figures["entropy"] == pytest.approx(rollout.entropy[rollout.mask].mean().item(), rel=1e-4)
    assert figures["unended"] == rollout.samples.ended.count(False) / 8 and figures["beta"] == 0.3


def test_a_rollout_is_learned_from_by_the_critic_the_unit_of_scores_and_the_beta_of_now():
    aligner = aligner_of()
    rollout, metrics = aligner.rollout(PROMPTS, 0)
    expected, explained = with_advantages(rollout, aligner.unit, 0.3, aligner.options, CPU)
    assert aligner.unit != 1 and rollout.values[rollout.mask].ne(0).all()
    assert not any(one.requires_grad for one in vars(rollout).values() if isinstance(one, Tensor))
    assert torch.equal(rollout.advantages, expected.advantages) and explained.items() <= metrics.items()


def test_rollouts_are_the_policys_and_validations_are_of_the_moving_average_with_the_same_seeds():
    aligner = aligner_of(ema_decay=0.9)
    aligner.ema.load_state_dict(moving_model(3).state_dict())
    aligner.rubric = lambda messages, text: 0.5 * len(text + messages[0]["content"])
    assert set(aligner.models) == {"policy", "critic", "ema"}, "what a restart brings back"
    rollout, _ = aligner.rollout(PROMPTS, 0)
    assert rollout.samples.responses == aligner_of().rollout(PROMPTS, 0)[0].samples.responses
    with torch.no_grad():
        torch.testing.assert_close(rollout.logprobs[rollout.mask], plain(aligner.policy, rollout), **ROUNDED)
    seeds = [seed_of(0, i, 0, 1) for i in range(8)]
    samples, texts, scores = aligner.sample(aligner.ema, PROMPTS, seeds)
    expected = aligner.metrics(aligner.observe(aligner.ema, samples, scores, [range(8)]))
    given = [aligner.rubric(p.messages, text) for p, text in zip(PROMPTS, texts, strict=True)]
    for _ in range(2):
        assert aligner.validate(PROMPTS) == expected | {"rubric": sum(given) / 8}


# ---- What the models say of responses


def observed(
    samples: Samples, sampling: SamplingOptions = PLAIN, each: int = 100, parts: list[range] | None = None
) -> Rollout:
    """With about so many sequences in a forward pass."""
    count, aligner = len(samples.prompts), aligner_of(sampling, micro_tokens=each * 40)
    return aligner.observe(POLICY, samples, torch.zeros(count), parts or [range(count)], aligner.critic)


def sampled(sampling: SamplingOptions = PLAIN, seed: int = 0) -> Samples:
    return aligner_of(sampling).sample(POLICY, PROMPTS[:5], range(5 * seed, 5 * seed + 5))[0]


def chosen(samples: Samples, numbers: list[int]) -> Samples:
    """Some of the responses alone."""
    prompts, responses, stopped = (
        [values[i] for i in numbers] for values in (samples.prompts, samples.responses, samples.ended)
    )
    return Samples(prompts, responses, stopped)


@pytest.mark.parametrize("kind", KINDS_OF_SAMPLING)
def test_log_probabilities_of_a_rollout_are_those_of_sampling_and_ratios_begin_at_exactly_one(kind):
    """An update's forward passes are the rollout's, gradients or not: the same sums in the same order."""
    sampling = KINDS_OF_SAMPLING[kind]
    aligner = aligner_of(sampling, micro_tokens=2 * 40)
    parts = [range(2), range(2, 5)]
    rollout = observed(sampled(sampling), sampling, each=2, parts=parts)
    states, taken = read(POLICY, rollout.samples, sampling.temperature)
    expected = filter_logits(states, sampling.top_k, sampling.top_p).log_softmax(-1)
    own = rollout.logprobs[rollout.mask]
    torch.testing.assert_close(own, expected[range(len(taken)), taken], **ROUNDED)
    learned = replace(rollout, advantages=torch.ones(rollout.mask.shape))
    for passes in rollout.minibatches:
        metrics = aligner.update(learned, passes, 0.0)  # at a rate of 0, so that nothing moves
        assert metrics["ratio_max"] == metrics["ratio_min"] == 1.0


@given(st.permutations(range(5)), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=15)
def test_order_company_padding_and_packing_change_nothing(order, count, each, seed):
    samples = sampled(seed=seed)
    together = observed(chosen(samples, order[:count]), each=each)
    for place, number in enumerate(order[:count]):
        alone, mask = observed(chosen(samples, [number])), together.mask[place]
        assert mask.sum() == alone.mask.sum()
        for name in ("logprobs", "ref_logprobs", "kl", "entropy", "values"):
            one, other = getattr(together, name)[place][mask], getattr(alone, name)[alone.mask]
            torch.testing.assert_close(one, other, **ROUNDED)


@pytest.mark.parametrize("kind", KINDS_OF_SAMPLING)
def test_kl_and_entropy_are_exact_and_the_kl_shown_is_the_mean_of_the_kl_paid(kind):
    """In each state: k1 over the tokens that may be taken, each by its probability, is the exact KL. The
    critic speaks of the state before each token."""
    sampling = KINDS_OF_SAMPLING[kind]
    samples = sampled(sampling)
    rollout, mask = observed(samples, sampling), observed(samples, sampling).mask
    (p, taken), (q, _) = (read(model, samples, sampling.temperature) for model in (POLICY, REF))
    ((one,),) = rollout.minibatches
    assert (one.allowed is not None) == (kind not in ("plain", "hot"))
    if one.allowed is not None:
        allowed = one.allowed[(one.cells[0] * 100 + one.cells[1]).argsort()]
        assert kind != "top-k" or allowed.sum(1).eq(5).all()
        p = p.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    possible = p > -torch.inf
    torch.testing.assert_close(
        rollout.kl[mask], torch.where(possible, p.exp() * (p - q), 0.0).sum(-1), **ROUNDED
    )
    torch.testing.assert_close(
        rollout.entropy[mask], -torch.where(possible, p.exp() * p, 0.0).sum(-1), **ROUNDED
    )
    paid = (rollout.logprobs - rollout.ref_logprobs)[mask]
    torch.testing.assert_close(paid, (p - q)[range(len(taken)), taken], **ROUNDED)
    for i, (row, start) in enumerate(rows_of(samples)):
        values = REWARD(torch.tensor([row]))[0, start - 1 : -1]
        torch.testing.assert_close(rollout.values[i][mask[i]], values, **ROUNDED)
    assert not any(getattr(rollout, name)[~mask].any() for name in ("logprobs", "kl", "entropy", "values"))


def test_at_the_start_policy_and_reference_are_one_that_only_the_policy_leaves():
    aligner = Aligner(options_with(), PLAIN, CPU, TEMPLATE, deepcopy(POLICY), None, None, None)
    samples, _, scores = aligner.sample(aligner.policy, PROMPTS[:3], range(3))
    rollout = aligner.observe(aligner.policy, samples, scores, [range(3)])
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=0, atol=0)
    assert rollout.kl.abs().max() < 1e-6 and rollout.values.eq(0).all() and scores.eq(0).all()
    assert not {"score", "score_deviation"} & aligner.metrics(rollout).keys(), "nothing scored them"
    assert not any(weight.requires_grad for weight in aligner.ref_model.parameters())
    with torch.no_grad():
        aligner.policy.lm_head.weight.mul_(2)
    assert torch.equal(aligner.ref_model.lm_head.weight, POLICY.lm_head.weight)


def test_a_token_at_the_edge_of_the_nucleus_stays_possible():
    """Scoring may round a token out of the nucleus that sampling took it from."""
    samples = Samples(TOKENS[:1], [[66, 67, 68]], [False])  # top-k 1 takes none of them
    rollout = observed(samples, replace(PLAIN, top_k=1))
    assert rollout.logprobs.isfinite().all() and rollout.ref_logprobs.isfinite().all()


# ---- Scores

TEXTS = ["No cats.", "7 cats.", "a fine day", "1 cat, 7 cats and it"]


def test_a_cut_response_scores_deviations_from_the_mean_of_the_assistants_own_or_as_its_text():
    def scored(missing: float | None, ended: list[bool]) -> tuple[Tensor, Tensor]:
        """The scores of the assistant's own texts, which set the scale, and of four others."""
        aligner = aligner_of(missing_eos_score=missing)
        own = aligner.score(PROMPTS[4:], TEXTS, [True] * 4)
        return own, aligner.score(PROMPTS[:4], TEXTS, ended)

    cut, whole = [True, False, True, False], [True] * 4
    own, plain = scored(None, cut)
    assert torch.equal(plain, scored(None, whole)[1])
    for missing in (-1.0, -3.0):
        found = scored(missing, cut)[1]
        assert torch.equal(found[::2], plain[::2])
        expected = own.mean() + missing * own.std(correction=0)
        torch.testing.assert_close(found[1::2], expected.expand(2), **CLOSE)


def score_of(text: str, prompt: int) -> float:
    """Of a reply in the form that the reward model was trained on."""
    return score_rows(REWARD, [encode_response(TEMPLATE, ASKED[prompt], text)])[0]


def test_a_text_that_outgrows_the_reward_model_is_read_up_to_its_end_token():
    short = deepcopy(REWARD)
    longest = len(TOKENS[0]) + 9
    short.config = replace(short.config, max_position_embeddings=longest)
    aligner = aligner_of(reward_model=short, missing_eos_score=None)
    found = aligner.score(PROMPTS[:1], ["\ufffd" * 40], [False])
    row = encode_response(TEMPLATE, ASKED[0], "\ufffd" * 40)
    assert found.item() == pytest.approx(score_rows(REWARD, [[*row[: longest - 1], row[-1]]])[0], abs=1e-4)


def test_a_response_may_end_with_each_stop_token_and_its_text_has_one_score_whichever_it_was():
    """The reward model is never asked about a row with another end than the reply's, nor about tokens that
    spell a text in another way than its tokenizer does, as such a policy does."""
    seen = set()
    for stop in TEMPLATE.stop_ids:
        model = deepcopy(POLICY)
        with torch.no_grad():
            model.lm_head.weight[stop] = 40 * model.lm_head.weight[65].sign()
        found, texts, scores = aligner_of(missing_eos_score=None).sample(model, PROMPTS[:4], [1, 2, 3, 4])
        expected = [score_of(text, prompt) for prompt, text in enumerate(texts)]
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)
        own = list(zip(found.responses, found.ended, strict=True))
        seen |= {response[-1] for response, ended in own if ended}
        assert texts == [TOKENIZER.decode(response[: len(response) - ended]) for response, ended in own]
    assert seen == set(TEMPLATE.stop_ids)


TRIMMED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_where_a_chat_template_trims_replies_the_reward_model_is_asked_about_trimmed_ones():
    aligner = aligner_of(missing_eos_score=None)
    config = {**TOKENIZER.config, "chat_template": TRIMMED}
    aligner.template = ChatTemplate(Tokenizer(TOKENIZER.vocabulary, config))
    found = aligner.score(PROMPTS[:2], [" 7 cats.\n", "7 cats."], [True] * 2)
    rows = [encode_response(aligner.template, messages, "7 cats.") for messages in ASKED[:2]]
    assert found.tolist() == pytest.approx(score_rows(REWARD, rows), abs=1e-4)


# ---- Updates


class Learner:
    """A policy that has moved from its samples already, and its update on them."""

    def __init__(self, moved: float = 0.05, sampling: SamplingOptions = PLAIN, **given) -> None:
        self.aligner = aligner_of(sampling, **given)
        options = self.aligner.options
        self.policy, self.models = self.aligner.policy, self.aligner.models
        self.rollout, _ = self.aligner.rollout(
            PROMPTS[: options.rollout_batch // options.responses_per_prompt], 0
        )
        self.minibatches = self.rollout.minibatches
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for weight in self.models.parameters():
                weight += moved * torch.randn(weight.shape, generator=generator)
        self.start = {name: value.clone() for name, value in self.models.state_dict().items()}

    def learn(self, critic_only: bool = False) -> dict[str, float]:
        """The metrics of one pass over the rollout."""
        updates = [self.aligner.update(self.rollout, passes, 1.0, critic_only) for passes in self.minibatches]
        return {name: sum(one[name] for one in updates) / len(updates) for name in updates[0]}

    def moved_parts(self) -> set[str]:
        """Which networks have other weights than at the start."""
        now = self.models.state_dict()
        return {name.split(".")[0] for name, value in self.start.items() if not torch.equal(value, now[name])}

    def now(self, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first minibatch: log-probabilities now, by plain log_softmax; old ones; advantages."""
        one, which = self.rollout, torch.zeros_like(self.rollout.mask)
        which[numbers_of(self.minibatches[0])] = True
        new = plain(self.policy, one, temperature)[which[one.mask]]
        return new, one.logprobs[one.mask & which], one.advantages[one.mask & which]


def read(model: LanguageModel, samples: Samples, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π over the vocabulary in the state before each token of the responses, row by row; the tokens."""
    states, taken = [], []
    for row, start in rows_of(samples):
        logits = model.logits(model.model(torch.tensor([row])))[0, start - 1 : -1] / temperature
        states.append(logits.log_softmax(-1))
        taken += row[start:]
    return torch.cat(states), torch.tensor(taken)


def plain(model: LanguageModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log π of the tokens taken."""
    states, taken = read(model, rollout.samples, temperature)
    return states[range(len(taken)), taken]


@torch.no_grad()
def test_an_update_tells_the_loss_ratios_clipping_and_kl_of_the_tokens_of_its_minibatch():
    learner = Learner(minibatches=2, clip_range=0.1, micro_tokens=80)
    assert len(learner.minibatches[0]) > 1, "forward passes"
    new, old, advantages = learner.now()
    with torch.enable_grad():
        figures = learner.aligner.update(learner.rollout, learner.minibatches[0], 1.0)
    ratio = (new - old).exp()
    assert ratio.min() < 0.9 and ratio.max() > 1.1
    assert figures["ratio_min"] == pytest.approx(ratio.min().item(), rel=1e-3)
    assert figures["ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-3)
    assert figures["old_kl"] == pytest.approx(KL_ESTIMATORS["k3"](old - new).mean().item(), rel=1e-3)
    outside = ((ratio > 1.1) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    assert figures["clip_share"] == pytest.approx(outside.float().mean().item(), abs=1e-6)
    loss = policy_losses(new, old, advantages, 0.1)[0].mean().item()
    assert figures["policy_loss"] == pytest.approx(loss, abs=1e-4)


class Among(Runtime):
    """One of several processes, of which the others together have 1 of everything that is summed."""

    def total(self, value: Tensor) -> Tensor:
        return value + 1


@torch.no_grad()
def test_metrics_and_losses_are_of_all_processes_together():
    learner = Learner(minibatches=1)
    one, aligner = learner.rollout, learner.aligner
    aligner.runtime = Among(CPU.device, torch.float32)
    assert moments(torch.tensor([1.0, 3.0]), aligner.runtime)[0] == pytest.approx(5 / 3)
    assert aligner.metrics(one)["kl"] == pytest.approx((one.kl.sum().item() + 1) / (len(one.mask) + 1))
    new, old, advantages = learner.now()
    with torch.enable_grad():
        found = learner.learn()
    count = len(new) + 1
    assert found["old_kl"] == pytest.approx(
        (KL_ESTIMATORS["k3"](old - new).sum().item() + 1) / count, rel=1e-3
    )
    loss = policy_losses(new, old, advantages, 0.2)[0].sum().item()
    assert found["policy_loss"] == pytest.approx((loss + 1) / count, abs=1e-4)


def test_processes_share_a_rollout_and_a_validation_between_them():
    def asked(runtime: Runtime) -> tuple[list[list[int]], list[tuple[str, int]]]:
        aligner, validated = aligner_of(group_size=2, minibatches=2), []
        aligner.runtime, sample = runtime, aligner.sample
        rollout, _ = aligner.rollout(PROMPTS, 0)
        assert [len(numbers_of(own)) for own in rollout.minibatches] == [8 // runtime.world_size] * 2

        def noted(model, prompts, seeds):
            validated.extend(zip([str(p.messages) for p in prompts], seeds, strict=True))
            return sample(model, prompts, seeds)

        aligner.sample = noted
        aligner.validate(PROMPTS)
        return [row for row, _ in rows_of(rollout.samples)], validated

    (rows, validated), *shares = (
        asked(Among(CPU.device, torch.float32, *how)) for how in ((0, 1), (0, 2), (1, 2))
    )
    assert sorted(rows) == sorted(chain(*(share[0] for share in shares)))
    assert sorted(validated) == sorted(chain(*(share[1] for share in shares)))


def test_gradients_of_raw_text_and_of_the_critic_have_the_weights_asked_for():
    def norm(critic_only: bool, **given) -> dict[str, float]:
        aligner = aligner_of(**given)
        rollout, _ = aligner.rollout(
            PROMPTS[: aligner.options.rollout_batch // aligner.options.responses_per_prompt], 0
        )
        aligner.beta, still = 0.0, replace(rollout, advantages=torch.zeros(rollout.mask.shape))
        tokens = np.arange(600, dtype=np.uint16) % 250
        aligner.text = Mixture([a_stream(tokens, tokens)], 40, 0) if aligner.options.ptx else None
        return aligner.update(still, rollout.minibatches[0], 1.0, critic_only)

    one, two = (norm(False, algorithm="grpo", group_size=2, ptx=ptx, rollout_batch=8) for ptx in (0.5, 1.0))
    assert two["gradient_norm"] == pytest.approx(2 * one["gradient_norm"], rel=1e-4)
    assert one["loss"] == pytest.approx(one["policy_loss"] + 0.5 * one["text_loss"])
    one, two = (norm(True, vf_coef=vf_coef, rollout_batch=4) for vf_coef in (0.1, 0.3))
    assert two["gradient_norm"] == pytest.approx(3 * one["gradient_norm"], rel=1e-4)


def test_policy_and_critic_have_optimizers_of_their_own_at_one_rate_and_norms_at_a_tenth_of_it():
    optimizers = aligner_of(policy_rate=1e-3, weight_decay=0.2).optimizers.optimizers
    assert len(optimizers) == 2
    for optimizer in optimizers:
        groups = [(group["lr"], group["weight_decay"], group["eps"]) for group in optimizer.param_groups]
        assert groups == [(1e-3, 0.0, 1e-5), (pytest.approx(1e-4), 0.0, 1e-5), (1e-3, 0.2, 1e-5)]


def test_a_restart_brings_everything_back_that_moves_and_goes_on_with_the_same_models_alone():
    def made(**models) -> Aligner:
        aligner = aligner_of(ptx=0.5, **models)
        aligner.stream = Shuffled.of(PROMPTS, "prompts", 0, "f")
        tokens = np.arange(600, dtype=np.uint16) % 250
        aligner.text = Mixture([a_stream(tokens, tokens)], 40, 0)
        return aligner

    stopped = made()
    stopped.stream.next(5)
    stopped.text.next_rows(2)
    stopped.score(PROMPTS[:4], TEXTS, [True] * 4)
    stopped.beta, stopped.kept = 0.7, {"step": 4, "loss": 1.5, "kl": 2.0, "score": 0.5}
    state, again = json.loads(json.dumps(stopped.state_dict())), made()
    again.load_state_dict(state)
    assert json.loads(json.dumps(again.state_dict())) == state
    assert again.unit == stopped.unit and again.kept == stopped.kept
    assert again.stream.next(3) == stopped.stream.next(3)
    for other in ({"policy": moving_model(4)}, {"reward_model": deepcopy(REWARD)}):
        if "reward_model" in other:
            torch.nn.init.zeros_(other["reward_model"].score.weight)
        with pytest.raises(InputError, match="--init or --reward"):
            made(**other).load_state_dict(state)


@torch.no_grad()
def test_the_loss_is_the_policys_and_the_weighted_critics():
    learner = Learner(minibatches=1, vf_coef=0.7, value_clip=0.01)
    critic, rows = learner.models["critic"], rows_of(learner.rollout.samples)
    values = torch.cat([critic(torch.tensor([row]))[0, start - 1 : -1] for row, start in rows])
    mask = learner.rollout.mask
    old, returns = learner.rollout.values[mask], learner.rollout.returns[mask]
    assert (values - old).abs().max() > 0.02, "some are clipped"
    with torch.enable_grad():
        figures = learner.learn()
    expected = value_losses(values, old, returns, 0.01).mean().item()
    assert figures["value_loss"] == pytest.approx(expected, rel=1e-3)
    assert figures["loss"] == pytest.approx(figures["policy_loss"] + 0.7 * figures["value_loss"], rel=1e-4)


def test_an_update_is_at_the_rate_and_the_clip_asked_for():
    learner = Learner(clip=0.3)
    with killed_at_update(1) as updates:
        learner.aligner.update(learner.rollout, learner.minibatches[0], 0.25)
    assert updates == [(0.25, 0.3)]


def test_the_critic_can_learn_alone():
    for critic_only, parts in ((True, {"critic"}), (False, {"policy", "critic"})):
        learner = Learner()
        metrics = learner.learn(critic_only)
        assert learner.moved_parts() == parts and ("policy_loss" in metrics) == ("policy" in parts)
    grpo = Learner(algorithm="grpo", group_size=2)
    grpo.learn()
    assert grpo.moved_parts() == {"policy"}


def test_an_update_that_is_not_finite_moves_nothing():
    learner = Learner()
    broken = replace(learner.rollout, advantages=learner.rollout.advantages * float("nan"))
    assert not math.isfinite(learner.aligner.update(broken, learner.minibatches[0], 1.0)["loss"])
    assert not learner.moved_parts()


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_grpos_loss_adds_beta_times_the_kl_of_the_estimator_asked_for(estimator, temperature):
    sampling = replace(PLAIN, temperature=temperature)
    learner = Learner(
        algorithm="grpo", group_size=2, minibatches=1, kl_estimator=estimator, sampling=sampling, moved=0.02
    )
    with torch.no_grad():
        new, old, advantages = learner.now(temperature)
        ref = plain(REF, learner.rollout, temperature)
        p, q = (read(model, learner.rollout.samples, temperature)[0] for model in (learner.policy, REF))
        exact = (p.exp() * (p - q)).sum(-1)
    kl = exact if estimator == "exact" else KL_ESTIMATORS[estimator](new - ref)
    expected = policy_losses(new, old, advantages, 0.2)[0].mean() + 0.3 * kl.mean()
    assert learner.learn()["policy_loss"] == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)


def test_a_moving_average_keeps_its_share_and_takes_the_rest_from_the_policy():
    aligner = aligner_of(ema_decay=0.9)
    with torch.no_grad():
        for slow, fast in zip(aligner.ema.parameters(), REF.parameters(), strict=True):
            slow.copy_(fast)
    aligner.update_ema()
    for name, value in aligner.ema.named_parameters():
        expected = 0.9 * REF.get_parameter(name) + 0.1 * POLICY.get_parameter(name)
        torch.testing.assert_close(value, expected, **CLOSE)
    assert aligner.best is aligner.ema
    plain = aligner_of()
    assert plain.best is plain.policy and plain.ema is None


def test_scores_are_divided_by_the_deviation_of_the_first_unless_left_as_they_are():
    for scale_scores in (True, False):
        aligner = aligner_of(scale_scores=scale_scores)
        first = aligner.score(PROMPTS[:4], TEXTS, [True] * 4)
        aligner.score(PROMPTS[:4], ["7 cats."] * 4, [True] * 4)
        deviation = first.std(correction=0).item()
        assert aligner.unit == pytest.approx(deviation if scale_scores else 1.0, rel=1e-4)
        metrics = {"score": 6.0, "kl": 2.0}
        assert aligner.objective(metrics) == pytest.approx(6 / aligner.unit - 0.3 * 2)
        aligner.beta = 0.7
        assert aligner.objective(metrics) == pytest.approx(6 / aligner.unit - 0.7 * 2)


# ---- DPO


def test_dpos_log_probabilities_are_sums_over_each_response_with_its_end_and_without_its_prompt():
    texts = [["No cats.", "7 cats, and it is a fine day.", "1"], ["No cats.", "No dogs."]]
    sets = [
        Ranking(ASKED[i], some, ranking_by(range(len(some))), "a", 0, "2026-01-31")
        for i, some in enumerate(texts)
    ]
    encoded = encode_rankings(sets, TEMPLATE, 80)[0]
    with torch.no_grad():
        found = response_logprobs(POLICY, collate(encoded, CPU.device))
        rewards = rewards_of(POLICY, REF, 0.3)(collate(encoded, CPU.device))
    at = 0
    for i, some in enumerate(texts):
        for text in some:
            prompt = TEMPLATE.prompt(ASKED[i])
            row = [*prompt, *TOKENIZER.encode(text), TEMPLATE.end_id]
            with torch.no_grad():
                alone, ref = (
                    m.logits(m.model(torch.tensor([row])))[0].log_softmax(-1)[range(len(row) - 1), row[1:]]
                    for m in (POLICY, REF)
                )
            own = slice(len(prompt) - 1, None)
            assert found[at].item() == pytest.approx(alone[own].sum().item(), rel=1e-4)
            expected = 0.3 * (alone[own].sum() - ref[own].sum()).item()
            assert rewards[at].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
            at += 1


def test_dpo_gives_the_reference_no_gradient():
    ranking = Ranking(ASKED[0], ["No cats.", "1 cat."], ranking_by([1, 0]), "a", 0, "2026-01-31")
    batch = collate(encode_rankings([ranking], TEMPLATE, 80)[0], CPU.device)
    policy, ref = deepcopy(POLICY), deepcopy(REF)
    rewards_of(policy, ref, 0.3)(batch).sum().backward()
    assert all(weight.grad is None for weight in ref.parameters())
    assert policy.lm_head.weight.grad.abs().sum() > 0
