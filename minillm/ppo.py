"""PPO with a KL penalty, and GRPO: from prompts to an update of the policy.

    prompts ──sample──► responses ──score──► scores [B]
                            │
                     policy, ref_model, critic ──► logprobs, ref_logprobs, kl, values [B, R]
                            │
           penalised_rewards ──► gae ──► advantages [B, R] ──update──► metrics

A response is an episode: its state is the prompt and the response so far, its action the next token. Numbers
of the tokens of a rollout's B responses are in rows [B, R], token r of response b at [b, r], with `mask` true
where there is one; losses are of the N tokens alone, flat [N]. What belongs to a token is computed from the
state before it, and only a response's tokens have advantages and losses. First come pure functions, then
`Pass` and `Rollout`, then `Aligner`, which holds the models. The loop is in rlhf.py.

What a run does, in the order in which it happens; the defaults are those of rlhf.py.

     1  policy and reference both start as the SFT assistant                       InstructGPT, 3.5
     2  the critic is a network of its own that starts as the reward model         InstructGPT, C.4
     3  at first the critic learns alone, for critic_warmup iterations             (measured here)
     4  responses are sampled with a key/value cache and stop at the end token     generate.py
     5  log-probabilities are those of the distribution that was sampled from:
        temperature, top-k and top-p included                                      Huang
     6  the reward model reads the text of a response as it read those it was
        trained on, with their end token, whatever token ended this one            (measured here)
     7  a response that does not end scores missing_eos_score standard deviations
        from the mean score of the assistant's own responses                       Huang, after Ziegler
     8  scores are divided by the standard deviation of the assistant's own        Engstrom, 3 (2)
     9  a token's reward is -β (log π - log π_ref), the last one's also the score   Ziegler, 2.2
    10  γ 1, λ 0.95                                                                InstructGPT, C.4; Huang
    11  advantages are whitened over all tokens of a rollout, padding left out     Huang
    12  ratios are clipped 0.2 from 1, and values 0.2 from what they were          PPO, eq. 7; Engstrom, 3 (1)
    13  the value loss weighs 0.1; both networks share one gradient norm           Huang
    14  ppo_epochs passes are made over a rollout, in minibatches                  PPO, algorithm 1
    15  no further pass once KL(π_old || π) exceeds target_kl, nats a token        (measured here)
    16  Adam's ε is 1e-5; there is no dropout                                      Huang
    17  learning rates fall linearly to the end of the run                         Engstrom, 3 (4)
    18  a multiple of the pretraining loss may be added (ptx)                      InstructGPT, eq. 2
    19  β is fixed, or follows adaptive_kl_target                                  Ziegler, eq. 2 of 2.2
    20  what is validated and kept may be a moving average of the policy           Ramé, 3

GRPO is PPO without a critic (not 2, 3, 8 to 11, 13): the advantage of all tokens of a response is how much
better it scored than the others to its prompt, and the KL is a term of the loss instead of the reward.

Left out: one trunk for policy and critic, an entropy bonus, rewards of single tokens. Of Dr. GRPO (Liu et al.
2025, arXiv 2503.20783) one half is here, the mean over all tokens of a minibatch instead of over each
response first; the other is not: advantages are divided by the deviation of their group.
Sources: Schulman et al. 2017, "PPO" (arXiv 1707.06347); Schulman et al. 2016, "GAE" (arXiv 1506.02438),
equation 16; Ziegler et al. 2019 (arXiv 1909.08593); Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155);
Engstrom et al. 2020, "Implementation matters in deep policy gradients" (arXiv 2005.12729); Huang et al. 2024,
"The N+ implementation details of RLHF with PPO" (arXiv 2403.17031) and its forerunner of 2023; Ramé et al.
2024, "WARP" (arXiv 2406.16768); GRPO: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1,
equations 3 and 4.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn

from kernels.losses import linear_token_logprobs
from minillm.chat import ChatTemplate
from minillm.data import Mixture, Shuffled, forward_passes, generator_of, seed_of
from minillm.errors import InputError
from minillm.generate import Samples, SamplingOptions, filter_logits, generate
from minillm.model import LanguageModel, ScalarModel, score_rows
from minillm.optim import LearningRates, Optimizers, accumulate, backward, build_optimizers
from minillm.options import PolicyOptions
from minillm.preferences import Message, Prompt, fingerprint
from minillm.reward import encode_response
from minillm.run import Runtime

# ---- KL(π || π_ref) from samples of π

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: (-log_ratio).expm1() + log_ratio,
}
"""What the log-ratio of a sampled token, log π - log π_ref, says of the KL (Schulman 2020, "Approximating KL
divergence"). k1 is unbiased, and negative for about half of the tokens; k2 is biased, but its gradient is, in
expectation, that of the KL; k3, π_ref/π - 1 - log π_ref/π, is unbiased and never negative."""


# ---- Scores -> rewards -> advantages


def penalised_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], beta: float
) -> Float[Tensor, "B R"]:
    """-β · KL of every token, plus the score at the last one; 0 after it. `kl` is k1 of the rollout."""
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "B R"]:
    """The advantage of every token, 0 where there is none.

    values[b, r] is of the state in which token r is chosen; after the last token V and A are 0:

        δ_r = reward_r + γ V_{r+1} - V_r        A_r = δ_r + γλ A_{r+1} = Σ_k (γλ)^k δ_{r+k}

    λ = 1 gives the discounted sum of the rewards to come less the value, λ = 0 the one step δ_r.
    """
    values = torch.where(mask, values, 0.0)
    advantages, following, value_after = [], torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for r in reversed(range(mask.shape[1])):
        delta = rewards[:, r] + gamma * value_after - values[:, r]
        following = torch.where(mask[:, r], delta + gamma * lam * following, 0.0)
        value_after = values[:, r]
        advantages.append(following)
    return torch.stack(advantages[::-1], dim=1)


def group_advantages(scores: Float[Tensor, " B"], size: int, eps: float = 1e-4) -> Float[Tensor, " B"]:
    """(score - mean of its group) / (deviation of its group + ε); each `size` scores in a row are a group.

    They sum to 0 in every group, and are 0 where all of it scored alike.
    """
    groups = scores.view(-1, size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + eps)).flatten()


def moments(values: Float[Tensor, "..."], runtime: Runtime) -> tuple[float, float]:
    """Mean and standard deviation (of the values as a population), over all processes.

    In float64, for the deviation is a difference of large sums; on the CPU, for not every device has it.
    """
    values = values.cpu().double()
    sums = torch.stack((values.new_tensor(float(values.numel())), values.sum(), values.square().sum()))
    count, total, squares = runtime.total(sums).tolist()
    mean = total / max(1.0, count)
    return mean, max(0.0, squares / max(1.0, count) - mean**2) ** 0.5


# ---- Losses of tokens, and β


def policy_losses(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """-min(ρ A, clamp(ρ, 1 - clip, 1 + clip) A) with ρ = π / π_old, equation 7 of PPO with its sign turned;
    and where the minimum is the clamped one. Such a token has no gradient: it has moved far enough."""
    ratio = (logprobs - old_logprobs).exp()
    free, clamped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, clamped), clamped < free


def value_losses(
    values: Float[Tensor, " N"], old_values: Float[Tensor, " N"], returns: Float[Tensor, " N"], clip: float
) -> Float[Tensor, " N"]:
    """½ max((V - returns)², (V held within clip of the old V - returns)²)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def adapted_beta(beta: float, kl: float, target: float, rate: float = 0.1) -> float:
    """β after an iteration whose KL was `kl`: up where that exceeds the target, down where it falls short.

    β ← β (1 + rate · e), e = KL / target - 1 held within ±0.2 (Ziegler et al. 2019, equation 2): at most 2%
    an iteration.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + rate * error)


# ---- Rollouts


@dataclass(frozen=True)
class Pass:
    """A forward pass (micro-batch): some responses side by side in P rows, and where their N tokens are."""

    tokens: Int64[Tensor, "P T"]
    start: Int32[Tensor, "P T"]
    """Where the sequence of each position begins in its row."""
    index: Int64[Tensor, " N"]
    """Where the responses' tokens are among those of all rows, end to end."""
    cells: tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]
    """Where they are in the rollout, as indices b and r: numbers [B, R] at `cells` are numbers [N]."""
    allowed: Bool[Tensor, "N V"] | None = None
    """What top-k and top-p left to choose each of them from; None where that is everything."""


@dataclass(frozen=True)
class Rollout:
    """Responses to some prompts, and the numbers that the models give to their tokens."""

    samples: Samples
    scores: Float[Tensor, " B"]
    minibatches: list[list[Pass]]
    """Each as its forward passes."""
    mask: Bool[Tensor, "B R"]
    logprobs: Float[Tensor, "B R"]
    """Of the policy that sampled, under the distribution it sampled from."""
    ref_logprobs: Float[Tensor, "B R"]
    """Of the reference at the same temperature, over all tokens: top-k and top-p are the policy's alone."""
    kl: Float[Tensor, "B R"]
    """KL(policy || reference) of these two distributions, exact; k1 of the sampled token estimates it."""
    entropy: Float[Tensor, "B R"]
    """Of the distribution sampled from."""
    values: Float[Tensor, "B R"]
    """The critic's, of the state in which each token is chosen; 0 without a critic."""
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"]
    """The critic's targets: advantages + values."""


def with_advantages(
    rollout: Rollout, unit: float, beta: float, options: PolicyOptions, runtime: Runtime
) -> tuple[Rollout, dict[str, float]]:
    """The rollout with PPO's advantages, by GAE from penalised scores and whitened over all tokens, or with
    GRPO's, by comparing the responses to each prompt; and, for PPO, the share of the variance of the returns
    that the critic explains: 1 for a perfect one, 0 for a constant."""
    mask = rollout.mask
    if options.algorithm == "grpo":
        advantages = group_advantages(rollout.scores, options.responses_per_prompt)
        return replace(rollout, advantages=advantages[:, None] * mask), {}
    k1 = rollout.logprobs - rollout.ref_logprobs
    rewards = penalised_rewards(rollout.scores / unit, k1, mask, beta)
    advantages = gae(rewards, rollout.values, mask, options.gamma, options.lam)
    returns = advantages + rollout.values
    mean, deviation = moments(advantages[mask], runtime)
    _, spread = moments(returns[mask], runtime)
    if options.whiten:
        advantages = (advantages - mean) / (deviation + 1e-8)
    explained = 1 - (deviation / spread) ** 2 if spread else 0.0  # advantages = returns - values
    return replace(rollout, advantages=advantages, returns=returns), {"explained_variance": explained}


# ---- The models


class Aligner:
    """A policy in training, the models that it is compared with, and what else changes with it."""

    def __init__(
        self,
        options: PolicyOptions,
        sampling: SamplingOptions,
        runtime: Runtime,
        template: ChatTemplate,
        policy: LanguageModel,
        reward_model: ScalarModel | None,
        critic: ScalarModel | None,
        rubric: Callable[[Sequence[Message], str], float | None] | None,
    ) -> None:
        """`policy` is the assistant to start from. Without a reward model, which DPO does not need, scores
        are 0 and not reported. `rubric`: the little world's score of a response to one of its prompts."""
        self.options, self.runtime, self.template = options, runtime, template
        self.sampling = replace(sampling, stop_ids=template.stop_ids)
        self.policy, self.ref_model = policy, deepcopy(policy).requires_grad_(False)
        self.reward_model, self.critic, self.rubric = reward_model, critic, rubric
        self.ema: Any = deepcopy(policy) if options.ema_decay else None
        self.best = self.ema or policy
        """The model that is validated and kept: the moving average, or the policy itself."""
        named = {"policy": policy, "critic": critic, "ema": self.ema}
        self.models = nn.ModuleDict({name: model for name, model in named.items() if model})
        self.models.__dict__["config"] = policy.config  # load_weights reads it
        self.origin = fingerprint(self.ref_model, reward_model)
        self.wrapped_policy: Any = runtime.wrap(policy)
        self.wrapped_critic: Any = runtime.wrap(critic) if critic else None
        for other in filter(None, (self.ref_model, reward_model, self.ema)):
            runtime.shard(other)
        self.optimizers = policy_optimizers(policy, critic, options)
        self.beta = options.beta
        self.scale: Sequence[float] | None = None
        """Mean and deviation of the scores of the first responses that were scored, the assistant's own."""
        self.kept: dict[str, float] = {}
        """Step and metrics of the validation whose policy is kept."""
        self.stream: Shuffled[Any]
        self.text: Mixture | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a restart must bring back beside weights and optimizers."""
        state = {name: getattr(self, name) for name in ("origin", "beta", "scale", "kept")}
        streams = {"prompts": self.stream, "text": self.text}
        return state | {name: stream and stream.state_dict() for name, stream in streams.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["origin"] != self.origin:
            raise InputError("cannot resume: --init or --reward is not the run's any more; put it back")
        self.beta, self.scale, self.kept = state["beta"], state["scale"], state["kept"]
        for name, stream in (("prompts", self.stream), ("text", self.text)):
            if stream:
                stream.load_state_dict(state[name])

    # -- Prompts -> rollouts

    def sample(
        self, model: LanguageModel, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> tuple[Samples, list[str], Float[Tensor, " B"]]:
        """A response of the model to each prompt, its text, and its score."""
        asked, model = [prompt.tokens for prompt in prompts], self.runtime.whole(model)
        samples = generate(model, asked, self.sampling, seeds)
        del model  # before another is gathered
        texts = samples.texts(self.template.tokenizer.decode)
        return samples, texts, self.score(prompts, texts, samples.ended)

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], ended: Sequence[bool]
    ) -> Float[Tensor, " B"]:
        """The reward model's scores of these texts, each with an end token, as in its training (detail 6)."""
        if self.reward_model is None:
            return torch.zeros(len(texts), device=self.runtime.device)
        longest = self.reward_model.config.max_position_embeddings
        both = zip(prompts, texts, strict=True)
        rows = [encode_response(self.template, prompt.messages, text) for prompt, text in both]
        rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
        model = self.runtime.whole(self.reward_model)
        scores = torch.tensor(score_rows(model, rows), device=self.runtime.device)
        if self.scale is None:
            mean, deviation = moments(scores, self.runtime)
            self.scale = mean, deviation or 1.0
        if self.options.missing_eos_score is None:
            return scores
        missing = self.scale[0] + self.options.missing_eos_score * self.scale[1]
        return torch.where(torch.tensor(ended, device=scores.device), scores, missing)

    def allowed(self, policy: LanguageModel, micro: Pass) -> Bool[Tensor, "N V"]:
        """What top-k and top-p left to choose each token from. The token taken is always allowed: rounding
        here may differ from sampling at the edge of a nucleus."""
        logits = policy.logits(policy(micro.tokens, micro.start)[micro.index - 1])
        kept = filter_logits(logits / self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return (kept > -torch.inf).scatter(1, micro.tokens.flatten()[micro.index, None], True)

    def reference(self, micro: Pass) -> tuple[Float[Tensor, "N D"], Float[Tensor, "V D"]]:
        """The reference's hidden state before each of a pass's tokens, and its output matrix."""
        hidden = self.ref_model(micro.tokens, micro.start)[micro.index - 1]
        return hidden, self.runtime.whole(self.ref_model.lm_head.weight)

    @torch.no_grad()
    def observe(
        self,
        policy: LanguageModel,
        samples: Samples,
        scores: Float[Tensor, " B"],
        minibatches: Sequence[Sequence[int]],
        critic: ScalarModel | None = None,
    ) -> Rollout:
        """The numbers of all models for the responses, from the same forward passes that the updates on these
        minibatches will make, so that the first ratios are exactly 1."""
        device, sampling, T = self.runtime.device, self.sampling, self.sampling.temperature
        sequences = [[*p, *r] for p, r in zip(samples.prompts, samples.responses, strict=True)]
        prompts, sizes = (torch.tensor(list(map(len, x))) for x in (samples.prompts, samples.responses))
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        names = ("logprobs", "ref_logprobs", "kl", "entropy", "values", "advantages", "returns")
        grids = {name: torch.zeros(mask.shape, device=device) for name in names}
        passes: list[list[Pass]] = []
        for minibatch in minibatches:
            own, made = forward_passes(minibatch, sequences, self.options.micro_tokens), list[Pass]()
            for i, (numbers, begins, tokens, start) in enumerate(self.runtime.even(own, own[0])):
                # Behind its own passes a process makes some of no tokens, see `Runtime.even`.
                which, r = (mask[numbers] & (i < len(own))).nonzero(as_tuple=True)
                index, b = (begins + prompts[numbers])[which] + r, numbers[which]
                tokens, start, index, b, r = (x.to(device) for x in (tokens, start, index, b, r))
                made.append(Pass(tokens, start, index, (b, r)))
            if sampling.top_k or sampling.top_p < 1:
                made = [replace(micro, allowed=self.allowed(policy, micro)) for micro in made]
            passes.append(made)
        for micro in chain(*passes):
            reference = self.reference(micro)
            how = {"temperature": T, "allowed": micro.allowed, "reference": reference}
            found = policy(micro.tokens, micro.start, index=micro.index, **how)._asdict()
            taken = micro.tokens.flatten()[micro.index]
            found["ref_logprobs"], _ = linear_token_logprobs(*reference, taken, T)
            if critic:
                found["values"] = critic(micro.tokens, micro.start).flatten(0, 1)[micro.index - 1]
            for name, per_token in found.items():
                grids[name][micro.cells] = per_token
        return Rollout(samples, scores, passes, mask.to(device), **grids)

    def rollout(self, prompts: Sequence[Prompt], step: int) -> tuple[Rollout, dict[str, float]]:
        """This process's share of a step's rollout, with advantages; and metrics of the whole.

        Prompts are dealt to minibatches at random, all responses to one staying together.
        """
        options, runtime = self.options, self.runtime
        size = options.rollout_batch // len(prompts)
        order = generator_of(options.seed, "minibatches", step).permutation(len(prompts)).tolist()
        shares = [order[m :: options.minibatches] for m in range(options.minibatches)]
        own = [i for share in shares for i in share[runtime.rank :: runtime.world_size]]
        asked = [(i, k) for i in own for k in range(size)]
        seeds = [seed_of(options.seed, step, i * size + k, 0) for i, k in asked]  # 0: training, 1: validation
        samples, _, scores = self.sample(self.policy, [prompts[i] for i, _ in asked], seeds)
        each = len(asked) // options.minibatches
        minibatches = [range(first, first + each) for first in range(0, len(asked), each)]
        rollout = self.observe(self.policy, samples, scores, minibatches, self.critic)
        rollout, explained = with_advantages(rollout, self.unit, self.beta, options, runtime)
        return rollout, self.metrics(rollout) | {"beta": self.beta} | explained

    def validate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Metrics of one response of the kept model to each prompt, with the same seeds every time."""
        own = range(self.runtime.rank, len(prompts), self.runtime.world_size)
        asked, seeds = [prompts[i] for i in own], [seed_of(self.options.seed, i, 0, 1) for i in own]
        samples, texts, scores = self.sample(self.best, asked, seeds)
        rollout = self.observe(self.best, samples, scores, [range(len(own))])
        sums = {}
        if self.rubric:
            pairs = zip(asked, texts, strict=True)
            sums["rubric"] = sum(self.rubric(prompt.messages, text) or 0.0 for prompt, text in pairs)
        return self.metrics(rollout, **sums)

    def metrics(self, rollout: Rollout, **sums: float) -> dict[str, float]:
        """Means over the responses of all processes; `sums` are further sums over those of this process."""
        sums = {
            "unended": float(rollout.samples.ended.count(False)),
            "length": float(rollout.mask.sum()),
            "kl": float(rollout.kl.cpu().double().sum()),
            "entropy": float(rollout.entropy.cpu().double().sum()),
        } | sums
        totals = torch.tensor([*sums.values(), len(rollout.mask)], dtype=torch.float64)
        *total_sums, count = self.runtime.total(totals).tolist()
        means = {name: total / count for name, total in zip(sums, total_sums, strict=True)}
        means["entropy"] /= means["length"]  # a token's
        if self.reward_model:
            means["score"], means["score_deviation"] = moments(rollout.scores, self.runtime)
        return means

    @property
    def unit(self) -> float:
        """What scores are divided by (detail 8)."""
        return self.scale[1] if self.scale and self.options.scale_scores else 1.0

    def objective(self, metrics: Mapping[str, float | int]) -> float:
        """What is maximised, at the present β: score / unit - β KL; for DPO, which needs no scores, minus the
        loss of held-out rankings."""
        if self.options.algorithm == "dpo":
            return -metrics["loss"]
        return metrics["score"] / self.unit - self.beta * metrics["kl"]

    # -- Rollouts -> updates

    def update(
        self, rollout: Rollout, passes: Sequence[Pass], multiplier: float, critic_only: bool = False
    ) -> dict[str, float]:
        """One step of the optimizers on a minibatch (its forward passes), at `multiplier` times their base
        rates; its metrics. No weight moves where the gradient is not finite.
        """
        options, runtime, metrics = self.options, self.runtime, dict[str, Tensor]()
        count = torch.tensor(float(sum(len(micro.index) for micro in passes)))
        tokens = round(runtime.total(count).item())
        if not critic_only:
            metrics |= self.learn_policy(rollout, passes, tokens)
            if self.text:
                rows = runtime.rows_of_step("--ptx-tokens", options.ptx_tokens, self.text.block_size)
                metrics["text_loss"] = backward(
                    self.wrapped_policy, self.text.next_rows(rows), options.micro_tokens, runtime, options.ptx
                )
        if critic := self.wrapped_critic:

            def value_loss(micro: Pass) -> Float[Tensor, ""]:
                values = critic(micro.tokens, micro.start).flatten(0, 1)[micro.index - 1]
                old, returns = rollout.values[micro.cells], rollout.returns[micro.cells]
                return value_losses(values, old, returns, options.value_clip).sum()

            metrics["value_loss"] = accumulate(critic, value_loss, passes, tokens, runtime, options.vf_coef)
        weights = {"policy_loss": 1.0, "text_loss": options.ptx, "value_loss": options.vf_coef}
        norm, *read = self.optimizers.step(multiplier, options.clip, *metrics.values())
        numbers = dict(zip(metrics, read, strict=True))
        loss = sum(weight * numbers.get(name, 0.0) for name, weight in weights.items())
        return numbers | {"loss": loss, "gradient_norm": norm, "rate": multiplier}

    def learn_policy(self, rollout: Rollout, passes: Sequence[Pass], tokens: int) -> dict[str, Tensor]:
        """Adds the gradient of a minibatch's loss, a mean over its `tokens`, to the policy's .grad; returns
        that loss, and how far the policy has moved since it sampled."""
        options, now = self.options, list[Tensor]()  # log π of the tokens, pass by pass
        grpo, estimate = options.algorithm == "grpo", KL_ESTIMATORS.get(options.kl_estimator)

        def policy_loss(micro: Pass) -> Float[Tensor, ""]:
            exact = self.reference(micro) if grpo and not estimate else None
            how = {"temperature": self.sampling.temperature, "allowed": micro.allowed, "reference": exact}
            logprobs, _, kl = self.wrapped_policy(micro.tokens, micro.start, index=micro.index, **how)
            now.append(logprobs.detach())
            old, advantages = rollout.logprobs[micro.cells], rollout.advantages[micro.cells]
            losses, _ = policy_losses(logprobs, old, advantages, options.clip_range)
            if grpo:
                kl = estimate(logprobs - rollout.ref_logprobs[micro.cells]) if estimate else kl
                losses = losses + self.beta * kl
            return losses.sum()

        loss = accumulate(self.wrapped_policy, policy_loss, passes, tokens, self.runtime)
        b, r = (torch.cat(numbers) for numbers in zip(*(micro.cells for micro in passes), strict=True))
        new, old = torch.cat(now), rollout.logprobs[b, r]
        ratio, old_kl = (new - old).exp(), KL_ESTIMATORS["k3"](old - new)
        _, clipped = policy_losses(new, old, rollout.advantages[b, r], options.clip_range)
        most, least = self.runtime.largest(torch.stack((ratio.max(), -ratio.min())))
        means = self.runtime.total(torch.stack((old_kl.sum(), clipped.to(new.dtype).sum()))) / tokens
        moved = {"ratio_max": most, "ratio_min": -least, "old_kl": means[0], "clip_share": means[1]}
        return {"policy_loss": loss} | moved

    @torch.no_grad()
    def update_ema(self) -> None:
        """Moves the moving average (1 - ema_decay) of the way to the policy."""
        for slow, fast in zip(self.ema.parameters(), self.policy.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.options.ema_decay)


def policy_optimizers(
    policy: LanguageModel, critic: ScalarModel | None, options: PolicyOptions
) -> Optimizers:
    """An AdamW for each: while the critic learns alone, the policy's has no state."""
    # Embedding and output matrix at the rate of the rest: unlike in SFT, no token is new.
    rates = LearningRates(options.policy_rate, options.policy_rate, options.weight_decay)
    models: list[LanguageModel | ScalarModel] = [policy, critic] if critic else [policy]
    return Optimizers([o for m in models for o in build_optimizers(m, rates, "adamw", 1e-5).optimizers])
