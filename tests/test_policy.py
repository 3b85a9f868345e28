"""What a policy learns from a rollout, on rollouts made by hand, and what an update says and moves."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from runs import tiny_model
from torch import Tensor

from minillm.dpo import response_logprobs, rewards_of
from minillm.generate import SamplingOptions
from minillm.io.template import ChatTemplate, with_chat_template
from minillm.model import LanguageModel, ScalarModel, scalar_from_language_model
from minillm.options import PolicyOptions
from minillm.policy import (
    Experience,
    Networks,
    Progress,
    Update,
    grpo_experience,
    policy_optimizers,
    ppo_experience,
    roll_out,
)
from minillm.ppo import gae, k1, k2, k3, penalised_rewards, policy_losses
from minillm.preferences import Ranking, ranking_by
from minillm.responses import Question, Responses
from minillm.reward import collate, encode_rankings
from minillm.rollout import Observers, Rollout, encode_prompts, observe, shuffled_prompts
from minillm.run import Run, Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ASKED = [[{"role": "user", "content": f"How many cats on day {i}?"}] for i in range(8)]
PLAIN = SamplingOptions(max_new_tokens=6)


def options_with(**given) -> PolicyOptions:
    return PolicyOptions(out="nowhere", **{"batch_responses": 16, "warmup": 0, "decay": 0.0} | given)


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
PROMPTS = encode_prompts([Question(messages) for messages in ASKED], TEMPLATE, 70)[0]


# ---- Advantages, from a rollout made by hand


def by_hand(scores: Sequence[float], spread: float = 1.0, seed: int = 0) -> Rollout:
    """Responses of 1, 2, 3, … tokens with numbers from nowhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(len(scores), len(scores), dtype=torch.bool).tril()
    logprobs, ref_logprobs, values = (
        spread * torch.randn(mask.shape, generator=generator) * mask for _ in range(3)
    )
    count = int(mask.sum())
    return Rollout(
        numbers=list(range(len(scores))),
        tokens=torch.zeros(1, count + 1, dtype=torch.int64),
        start=torch.zeros(1, count + 1, dtype=torch.int32),
        places=torch.arange(1, count + 1),
        mask=mask,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape),
        values=values,
        scores=torch.tensor(scores),
        allowed=None,
    )


def progress_of(beta: float = 0.3) -> Progress:
    return Progress(shuffled_prompts(PROMPTS, 0), None, beta, "origin")


def learned(rollout: Rollout, **given) -> Experience:
    """What PPO makes of one rollout, its advantages and returns."""
    found, _ = ppo_experience([[rollout]], options_with(**given), progress_of(), CPU)
    return found[0][0]


SCORES = (1.0, -2.0, 0.5, 3.0)


def test_advantages_are_gaes_of_penalised_scores_with_gamma_and_lambda_each_in_its_place():
    rollout = by_hand(SCORES)
    found = learned(rollout, gamma=0.5, lam=0.9, whiten=False, scale_scores=False)
    kl = rollout.logprobs - rollout.ref_logprobs
    rewards = penalised_rewards(rollout.scores, kl, rollout.mask, 0.3)
    expected = gae(rewards, rollout.values, rollout.mask, 0.5, 0.9)[rollout.mask]
    torch.testing.assert_close(found.advantages, expected, **CLOSE)
    torch.testing.assert_close(found.returns, expected + rollout.values[rollout.mask], **CLOSE)


def test_scores_are_measured_by_their_own_spread_unless_left_as_they_are():
    near, far = (by_hand([factor * score for score in SCORES], spread=0.0) for factor in (1, 100))
    as_scaled, as_given = {"whiten": False}, {"whiten": False, "scale_scores": False}
    scaled = [learned(rollout, **as_scaled).advantages for rollout in (near, far)]
    torch.testing.assert_close(scaled[0], scaled[1], **CLOSE)
    given = [learned(rollout, **as_given).advantages for rollout in (near, far)]
    torch.testing.assert_close(100 * given[0], given[1], **CLOSE)
    assert not torch.allclose(given[0], scaled[0])
    last = near.mask.sum(1).cumsum(0) - 1
    deviation = torch.tensor(SCORES).std(correction=0)
    torch.testing.assert_close(scaled[0][last], torch.tensor(SCORES) / deviation, **CLOSE)


def test_advantages_are_whitened_over_the_rollout_if_asked_and_returns_never():
    rollout = by_hand(SCORES)
    white, plain = (learned(rollout, whiten=whiten) for whiten in (True, False))
    assert white.advantages.mean().abs() < 1e-5
    assert white.advantages.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert plain.advantages.std(correction=0) != pytest.approx(1, abs=0.05)
    torch.testing.assert_close(white.returns, plain.returns, rtol=0, atol=0)


def test_whitening_and_the_scores_spread_are_of_all_minibatches_together():
    one, other = by_hand(SCORES), by_hand([9.0, 7.0, 8.0, 9.0], seed=1)
    found, _ = ppo_experience([[one], [other]], options_with(), progress_of(), CPU)
    whole = torch.cat([experience.advantages for minibatch in found for experience in minibatch])
    assert whole.mean().abs() < 1e-5 and whole.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert found[0][0].advantages.mean().abs() > 0.1


def test_the_deviation_of_scores_is_of_all_rollouts_so_far():
    progress = progress_of()
    for scores in ((0.0, 0.0, 2.0, 2.0), (10.0, 10.0, 12.0, 12.0)):
        found, _ = ppo_experience([[by_hand(scores, spread=0.0)]], options_with(whiten=False), progress, CPU)
    so_far = torch.tensor([0.0, 0.0, 2.0, 2.0, 10.0, 10.0, 12.0, 12.0]).std(correction=0)
    last = torch.tensor([0, 2, 5, 9])
    torch.testing.assert_close(
        found[0][0].advantages[last], torch.tensor([10.0, 10, 12, 12]) / so_far, **CLOSE
    )


def test_explained_variance_is_of_the_returns_that_the_critic_should_have_said():
    rollout = by_hand(SCORES)
    given = {"lam": 1.0, "whiten": False}
    truth = learned(replace(rollout, values=torch.zeros_like(rollout.values)), **given).returns
    grid = torch.zeros_like(rollout.values)
    grid[rollout.mask] = truth
    for share, expected in ((1.0, 1.0), (0.5, 0.75), (0.0, 0.0)):
        halfway = replace(rollout, values=share * grid)
        figures = ppo_experience([[halfway]], options_with(**given), progress_of(), CPU)[1]
        assert figures["explained_variance"] == pytest.approx(expected, abs=1e-3)


def test_grpos_advantages_compare_the_responses_of_one_prompt_however_they_are_dealt():
    one, other = by_hand([1.0, 3.0, 5.0, 5.0]), by_hand([9.0, 7.0, 2.0, 2.0])
    dealt = [replace(one, numbers=[0, 1, 4, 5]), replace(other, numbers=[3, 2, 7, 6])]
    options = options_with(algorithm="grpo", group=2)
    found, _ = grpo_experience([[rollout] for rollout in dealt], options, progress_of(), CPU)
    lengths = torch.tensor([1, 2, 3, 4])  # each token of a response has the response's
    for (experience,), expected in zip(found, ([-1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]), strict=True):
        each = torch.tensor(expected).repeat_interleave(lengths)
        torch.testing.assert_close(experience.advantages, each, rtol=0, atol=1e-3)


# ---- Rollouts


def observers_of(sampling: SamplingOptions = PLAIN, unended_score: float | None = -1.0) -> Observers:
    return Observers(REF, REWARD, TOKENIZER, sampling, unended_score, None, 400)


def run_at(step: int, networks: Networks, options: PolicyOptions) -> Run:
    """A run that is nothing but its step and its optimizers."""
    run = Run.__new__(Run)
    run.runtime = CPU
    run.state = SimpleNamespace(step=step, optimizers=policy_optimizers(networks, options))
    return run


def rolled_out(step: int = 0, sampling: SamplingOptions = PLAIN, **given):
    options, networks = options_with(**given), Networks(POLICY, REWARD)
    asked = PROMPTS[: options.batch_responses // options.samples]
    return roll_out(run_at(step, networks, options), options, networks, observers_of(sampling), asked)


def rows_of(rollout: Rollout) -> dict[int, tuple[int, ...]]:
    """The tokens of each response, by its number."""
    sizes = rollout.mask.sum(1).tolist()
    own = rollout.taken.split(sizes)
    return {number: tuple(row.tolist()) for number, row in zip(rollout.numbers, own, strict=True)}


def test_the_responses_of_a_group_differ_and_so_do_those_of_two_steps():
    found = [rolled_out(step, group=4, batch_responses=16)[0] for step in (0, 1)]
    rows = [{k: v for minibatch in some for r in minibatch for k, v in rows_of(r).items()} for some in found]
    for prompt in range(4):
        assert len({rows[0][prompt * 4 + k] for k in range(4)}) == 4
    assert all(rows[0][number] != rows[1][number] for number in rows[0])


def prompts_in(minibatch: Sequence[Rollout]) -> list[int]:
    """Which prompts are answered in it, once for each response."""
    rows = [row for rollout in minibatch for row in rollout.tokens.tolist()]
    asked = [(i, prompt.tokens) for i, prompt in enumerate(PROMPTS)]
    return [i for row in rows for at in range(len(row)) for i, own in asked if row[at : at + len(own)] == own]


def test_a_rollout_is_dealt_whole_to_its_minibatches_with_groups_together_and_anew_at_each_step():
    dealt = []
    for step in range(3):
        minibatches, figures = rolled_out(step, group=2, minibatches=4)
        dealt.append([sorted(prompts_in(minibatch)) for minibatch in minibatches])
        assert sorted(chain(*dealt[-1])) == sorted([*range(8), *range(8)])
        assert all(len(own) == 4 and own[::2] == own[1::2] for own in dealt[-1])
        tokens = sum(int(rollout.mask.sum()) for minibatch in minibatches for rollout in minibatch)
        assert figures["length"] == pytest.approx(tokens / 16)
    assert dealt[0] != dealt[1] != dealt[2]


def test_figures_of_a_rollout_are_sums_over_responses_and_of_entropy_over_tokens():
    minibatches, figures = rolled_out(batch_responses=8)
    flat = [rollout for some in minibatches for rollout in some]
    scores = torch.cat([rollout.scores for rollout in flat])
    kl = torch.cat([rollout.kl.sum(1) for rollout in flat])
    entropy = torch.cat([rollout.entropy[rollout.mask] for rollout in flat])
    assert figures["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert figures["score_deviation"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    assert figures["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert figures["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)


@pytest.mark.parametrize("unended_score", [-1.0, -3.0, None])
def test_a_response_without_an_end_scores_what_the_option_says(unended_score):
    rows = [[*PROMPTS[0].tokens, 66, 67, TEMPLATE.end_id], [*PROMPTS[0].tokens, 66, 67, 68]]
    lengths = [len(PROMPTS[0].tokens)] * 2
    ended, unended = observers_of(unended_score=unended_score).scores(
        Responses(rows, lengths, [True, False], [])
    )
    assert ended != unended and ended not in (-1.0, -3.0)
    assert unended == unended_score if unended_score is not None else unended not in (-1.0, -3.0)


def test_a_response_may_end_with_each_of_the_formats_stop_tokens():
    seen = set()
    for stop in TEMPLATE.stop_ids:
        model = deepcopy(POLICY)
        with torch.no_grad():
            model.lm_head.weight[stop] = model.lm_head.weight[stop] * 0 + 40 * model.lm_head.weight[65].sign()
        found = observers_of().sample(model, PROMPTS[:4], [1, 2, 3, 4])
        seen |= {row[-1] for row, ended in zip(found.rows, found.ended, strict=True) if ended}
    assert seen == set(TEMPLATE.stop_ids)


# ---- Updates


class Learner:
    """A policy that has moved from its samples already, and its update on them."""

    def __init__(
        self, step: int = 5, moved: float = 0.05, sampling: SamplingOptions = PLAIN, **given
    ) -> None:
        self.options = options_with(**given)
        ppo = self.options.algorithm == "ppo"
        self.policy, self.critic = deepcopy(POLICY), deepcopy(REWARD) if ppo else None
        self.networks = Networks(self.policy, self.critic)
        self.observers, self.progress = observers_of(sampling), progress_of()
        self.run = run_at(step, self.networks, self.options)
        self.run.check_finite = lambda **figures: None
        asked = PROMPTS[: self.options.batch_responses // self.options.samples]
        minibatches, _ = roll_out(self.run, self.options, self.networks, self.observers, asked)
        make = ppo_experience if ppo else grpo_experience
        self.batch, _ = make(minibatches, self.options, self.progress, CPU)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for weight in self.policy.parameters():
                weight += moved * torch.randn(weight.shape, generator=generator)
        self.start = {name: value.clone() for name, value in self.networks.state_dict().items()}
        self.update = Update(self.run, self.options, self.networks, self.observers, self.progress)

    def learn(self) -> dict[str, float]:
        """The figures after one pass over the rollout."""
        self.update.begin()
        for minibatch in self.batch:
            self.update.step(minibatch)
        self.update.moved()
        return self.update.figures()

    def moved_parts(self) -> set[str]:
        """Which networks have other weights than at the start."""
        now = self.networks.state_dict()
        return {name.split(".")[0] for name, value in self.start.items() if not torch.equal(value, now[name])}

    def now(self, policy: LanguageModel | None = None, temperature: float = 1.0) -> list[tuple]:
        """Of each minibatch the log-probabilities now and the old ones, by plain log_softmax."""
        found = []
        for minibatch in self.batch:
            new = torch.cat([plain(policy or self.policy, e.rollout, temperature) for e in minibatch])
            old = torch.cat([e.rollout.logprobs[e.rollout.mask] for e in minibatch])
            found.append((new, old, torch.cat([e.advantages for e in minibatch])))
        return found


def plain(model: LanguageModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log π of the tokens taken."""
    logits = model.logits(model(rollout.tokens, rollout.start)) / temperature
    return logits.log_softmax(-1).flatten(0, 1)[rollout.places - 1, rollout.taken]


@torch.no_grad()
def test_an_update_tells_the_loss_ratios_clipping_and_kl_of_its_tokens():
    # One minibatch: what it tells is of the weights before it moves them.
    learner = Learner(minibatches=1, ratio_clip=0.1)
    ((new, old, advantages),) = learner.now()
    with torch.enable_grad():
        figures = learner.learn()
    ratio = (new - old).exp()
    assert ratio.min() < 0.9 and ratio.max() > 1.1
    assert figures["ratio_min"] == pytest.approx(ratio.min().item(), rel=1e-3)
    assert figures["ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-3)
    assert figures["old_kl"] == pytest.approx(k3(old, new).mean().item(), rel=1e-3)
    outside = ((ratio > 1.1) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    assert figures["clip_share"] == pytest.approx(outside.float().mean().item(), abs=1e-6)
    loss = policy_losses(new, old, advantages, 0.1).mean().item()
    assert figures["policy_loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["updates"] == 1


@torch.no_grad()
def test_the_loss_is_the_policys_and_the_weighted_critics():
    learner = Learner(minibatches=1, value_weight=0.7)
    with torch.enable_grad():
        figures = learner.learn()
    assert figures["loss"] == pytest.approx(figures["policy_loss"] + 0.7 * figures["value_loss"], rel=1e-4)
    assert figures["value_loss"] > 0


def test_while_the_critic_warms_up_it_moves_alone():
    for step, parts in ((2, {"critic"}), (3, {"policy", "critic"})):
        learner = Learner(step=step, critic_warmup=3)
        figures = learner.learn()
        assert learner.moved_parts() == parts and ("policy_loss" in figures) == ("policy" in parts)
    grpo = Learner(step=0, critic_warmup=3, algorithm="grpo", group=2)
    grpo.learn()
    assert grpo.moved_parts() == {"policy"}, "without a critic there is none to wait for"


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_grpos_loss_adds_beta_times_the_kl_of_the_estimator_asked_for(estimator, temperature):
    sampling = replace(PLAIN, temperature=temperature)
    learner = Learner(
        algorithm="grpo", group=2, minibatches=1, kl_estimator=estimator, sampling=sampling, moved=0.02
    )
    rollouts = [experience.rollout for experience in learner.batch[0]]
    with torch.no_grad():
        ((new, old, advantages),) = learner.now(temperature=temperature)
        ref = torch.cat([plain(REF, rollout, temperature) for rollout in rollouts])
        exact = torch.cat([exact_kl(learner.policy, rollout, temperature) for rollout in rollouts])
    kl = {"k2": k2(new, ref), "k3": k3(new, ref), "exact": exact}[estimator]
    expected = policy_losses(new, old, advantages, 0.2).mean() + 0.3 * kl.mean()
    assert learner.learn()["policy_loss"] == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)


def exact_kl(model: LanguageModel, rollout: Rollout, temperature: float) -> Tensor:
    p, q = (
        (m.logits(m(rollout.tokens, rollout.start)) / temperature).log_softmax(-1).flatten(0, 1)
        for m in (model, REF)
    )
    return (p.exp() * (p - q)).sum(-1)[rollout.places - 1]


def test_the_kl_paid_is_k1_at_the_temperature_sampled_at():
    sampling = replace(PLAIN, temperature=0.5)
    learner = Learner(whiten=False, gamma=1.0, lam=1.0, scale_scores=False, sampling=sampling)
    for experience in learner.batch[0]:
        rollout = experience.rollout
        with torch.no_grad():
            paid = k1(plain(POLICY, rollout, 0.5), plain(REF, rollout, 0.5))
        scores = rollout.scores[torch.arange(len(rollout.scores)).repeat_interleave(rollout.mask.sum(1))]
        last = rollout.mask.sum(1).cumsum(0) - 1
        torch.testing.assert_close(
            experience.returns[last], (scores - 0.3 * paid)[last], rtol=1e-3, atol=1e-3
        )


def test_a_moving_average_keeps_its_share_and_takes_the_rest_from_the_policy():
    networks = Networks(deepcopy(POLICY), None, deepcopy(REF))
    networks.follow(0.9)
    for name, value in networks.average.named_parameters():
        expected = 0.9 * REF.get_parameter(name) + 0.1 * POLICY.get_parameter(name)
        torch.testing.assert_close(value, expected, **CLOSE)
    assert networks.kept is networks.average and Networks(POLICY).kept is POLICY


def test_the_kl_that_a_pass_moved_is_of_that_pass_alone():
    learner = Learner(minibatches=1, policy_rate=1e-12)
    learner.update.begin()
    moved = []
    for _ in range(2):
        learner.update.step(learner.batch[0])
        moved.append(learner.update.moved())
    assert moved[0] == pytest.approx(moved[1], rel=1e-2) and moved[0] > 1e-4


# ---- DPO


def test_dpos_log_probabilities_are_sums_over_each_response_with_its_end_and_without_its_prompt():
    texts = [["No cats.", "7 cats, and it is a fine day.", "1"], ["No cats.", "No dogs."]]
    sets = [
        Ranking(ASKED[i], some, ranking_by(range(len(some))), "a", 0, "2026-01-31")
        for i, some in enumerate(texts)
    ]
    encoded = encode_rankings(sets, TEMPLATE, 80)[0]
    with torch.no_grad():
        found = response_logprobs(POLICY, POLICY, collate(encoded))
        rewards = rewards_of(POLICY, POLICY, REF, 0.3)(collate(encoded))
    at = 0
    for i, some in enumerate(texts):
        for text in some:
            prompt = TEMPLATE.prompt(ASKED[i])
            row = [*prompt, *TOKENIZER.encode(text), TEMPLATE.end_id]
            with torch.no_grad():
                alone, ref = (
                    m.logits(m(torch.tensor([row])))[0].log_softmax(-1)[range(len(row) - 1), row[1:]]
                    for m in (POLICY, REF)
                )
            own = slice(len(prompt) - 1, None)
            assert found[at].item() == pytest.approx(alone[own].sum().item(), rel=1e-4)
            expected = 0.3 * (alone[own].sum() - ref[own].sum()).item()
            assert rewards[at].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
            at += 1


def test_dpo_gives_the_reference_no_gradient():
    ranking = Ranking(ASKED[0], ["No cats.", "1 cat."], ranking_by([1, 0]), "a", 0, "2026-01-31")
    batch = collate(encode_rankings([ranking], TEMPLATE, 80)[0])
    policy, ref = deepcopy(POLICY), deepcopy(REF)
    rewards_of(policy, policy, ref, 0.3)(batch).sum().backward()
    assert all(weight.grad is None for weight in ref.parameters())
    assert policy.lm_head.weight.grad.abs().sum() > 0


# ---- What a rollout sees


def test_a_rollout_carries_no_gradient():
    rollout = rolled_out()[0][0][0]
    seen = ("logprobs", "ref_logprobs", "kl", "entropy", "values")
    assert not any(getattr(rollout, name).requires_grad for name in seen)


def test_a_token_at_the_edge_of_the_nucleus_stays_possible():
    """Scoring may round a token out of the nucleus that sampling took it from."""
    sampling = replace(PLAIN, top_k=1)
    rows = [[*PROMPTS[0].tokens, 66, 67, 68]]  # nothing that top-k 1 would have taken
    responses = Responses(rows, [len(PROMPTS[0].tokens)], [False], [])
    rollout = observe(POLICY, REF, None, responses, [0.0], [[0]], sampling)
    assert rollout.logprobs.isfinite().all() and rollout.ref_logprobs.isfinite().all()
