"""The policy and how it moves: where the mathematics of ppo.py and grpo.py meets the networks.

    Observers.rollouts ──► [minibatch][pass] of Rollout ──ppo_experience──► of Experience ──► Update.step

A minibatch is a list of forward passes. Each process holds its own share of every minibatch; means, moments
and gradients are of all processes, so that the result does not depend on how many share the work. The loop
stands in rlhf.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.data import Mixture, Shuffled, epoch_generator
from minillm.errors import InputError
from minillm.grpo import group_advantages, grpo_losses
from minillm.layout import gather_previous
from minillm.loss import accumulate, backward
from minillm.model import LanguageModel, ScalarModel
from minillm.optim import LearningRates, Optimizers, build_optimizers, clip_gradients, lr_schedule
from minillm.options import PolicyOptions
from minillm.ppo import (
    Moments,
    clipped,
    explained_variance,
    gae,
    k1,
    k2,
    k3,
    moments,
    penalised_rewards,
    policy_losses,
    value_losses,
    whiten,
)
from minillm.responses import seed_of
from minillm.rollout import Observers, Prompt, Rollout
from minillm.run import Run, Runtime

Minibatches = list[list[Rollout]]


# ---- Networks and state


class Networks(nn.Module):
    """Everything that moves: the policy, its critic, and the moving average of the policy, if any."""

    def __init__(
        self, policy: LanguageModel, critic: ScalarModel | None = None, average: LanguageModel | None = None
    ) -> None:
        super().__init__()
        self.policy, self.critic, self.average = policy, critic, average
        self.config = policy.config

    @property
    def kept(self) -> LanguageModel:
        """The one that is validated and saved."""
        return self.policy if self.average is None else self.average

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Moves the average by (1 - share) of the way to the policy."""
        if self.average is not None:
            for slow, fast in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                slow.lerp_(fast, 1 - share)


class Progress:
    """What else a restart must bring back: the place among the prompts, and numbers that run along."""

    def __init__(self, prompts: Shuffled[Any], text: Mixture | None, beta: float, origin: str) -> None:
        """`origin` is a fingerprint of the reference and the reward model, which do not move."""
        self.prompts, self.text, self.beta, self.origin = prompts, text, beta, origin
        self.scores = Moments(0.0, 0.0, 0.0)
        """Of all scores so far."""
        self.unit: float | None = None
        """The deviation of the scores of held-out prompts before the first update."""
        self.best: float | None = None
        """The highest validated objective so far."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.state_dict(),
            "text": self.text and self.text.state_dict(),
            "beta": self.beta,
            "scores": vars(self.scores),
            "unit": self.unit,
            "best": self.best,
            "origin": self.origin,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["origin"] != self.origin:
            raise InputError("cannot resume: --init or --reward is not the run's any more; put it back")
        self.prompts.load_state_dict(state["prompts"])
        if self.text is not None:
            self.text.load_state_dict(state["text"])
        self.beta, self.scores = float(state["beta"]), Moments(**state["scores"])
        self.unit, self.best = (None if state[n] is None else float(state[n]) for n in ("unit", "best"))


@dataclass(frozen=True)
class Experience:
    """A rollout, and of each of its tokens how much better it was than expected."""

    rollout: Rollout
    advantages: Float[Tensor, " N"]
    returns: Float[Tensor, " N"]
    """What the critic should have said."""


# ---- Prompts -> rollouts -> experience


def roll_out(
    run: Run,
    options: PolicyOptions,
    networks: Networks,
    observers: Observers,
    prompts: Sequence[Prompt],
) -> tuple[Minibatches, dict[str, float]]:
    """This process's share of a step's rollout, by minibatch, and figures of the whole.

    Prompts are dealt to minibatches at random, all responses to one staying together.
    """
    runtime, step = run.runtime, run.state.step
    order = epoch_generator(options.seed, "minibatches", step).permutation(len(prompts)).tolist()
    shares = [order[m :: options.minibatches] for m in range(options.minibatches)]
    own = [i for share in shares for i in share[runtime.rank :: runtime.world_size]]
    asked = [(i, k) for i in own for k in range(options.samples)]
    seeds = [seed_of(options.seed, step, i * options.samples + k, 0) for i, k in asked]

    responses = observers.sample(networks.policy, [prompts[i] for i, _ in asked], seeds)
    scores = observers.scores(responses)
    size = len(asked) // options.minibatches
    minibatches = [
        observers.rollouts(networks.policy, networks.critic, responses, scores, range(first, first + size))
        for first in range(0, len(asked), size)
    ]
    flat = list(chain(*minibatches))
    return minibatches, observers.figures([prompts[i] for i, _ in asked], responses, flat, runtime)


def all_moments(values: Sequence[Tensor], runtime: Runtime) -> Moments:
    """Of these values in all processes."""
    own = moments(torch.cat([value.flatten() for value in values]))
    sums = torch.tensor(list(vars(own).values()), dtype=torch.float64, device=runtime.device)
    return Moments(*runtime.total(sums).tolist())


def ppo_experience(
    minibatches: Minibatches, options: PolicyOptions, progress: Progress, runtime: Runtime
) -> tuple[list[list[Experience]], dict[str, float]]:
    """Advantages by GAE from penalised rewards, whitened; and how well the critic foresaw the returns."""
    flat = list(chain(*minibatches))
    progress.scores += all_moments([rollout.scores for rollout in flat], runtime)
    unit = progress.scores.deviation or 1.0 if options.scale_scores else 1.0

    def advantages_of(rollout: Rollout) -> Float[Tensor, " N"]:
        kl = k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = penalised_rewards(rollout.scores / unit, kl, rollout.mask, progress.beta)
        return gae(rewards, rollout.values, rollout.mask, options.gamma, options.lam)[rollout.mask]

    advantages = [[advantages_of(rollout) for rollout in minibatch] for minibatch in minibatches]
    of_all = all_moments(list(chain(*advantages)), runtime)
    experience = [
        [
            Experience(r, whiten(a, of_all) if options.whiten else a, a + r.values[r.mask])
            for r, a in zip(minibatch, some, strict=True)
        ]
        for minibatch, some in zip(minibatches, advantages, strict=True)
    ]
    returns = all_moments([e.returns for e in chain(*experience)], runtime)
    return experience, {"explained_variance": explained_variance(of_all, returns)}


def grpo_experience(
    minibatches: Minibatches, options: PolicyOptions, progress: Progress, runtime: Runtime
) -> tuple[list[list[Experience]], dict[str, float]]:
    """Advantages by comparing each response with the others to its prompt."""
    flat = list(chain(*minibatches))
    scores = torch.cat([rollout.scores for rollout in flat])
    numbers = torch.tensor([number for rollout in flat for number in rollout.numbers], device=scores.device)
    relative = group_advantages(scores[numbers.argsort()], options.samples)

    def experience_of(rollout: Rollout) -> Experience:
        own = relative[torch.tensor(rollout.numbers, device=relative.device)]
        advantages = own[:, None].expand_as(rollout.mask)[rollout.mask]
        return Experience(rollout, advantages, torch.zeros_like(advantages))

    return [[experience_of(rollout) for rollout in minibatch] for minibatch in minibatches], {}


# ---- Experience -> updates


def policy_optimizers(networks: Networks, options: PolicyOptions) -> Optimizers:
    """One AdamW for the policy and one for the critic: while that learns alone, the other has no state."""
    # Embedding and output matrix at the rate of the rest: SFT brought new tokens, this brings none.
    rate = options.policy_rate
    rates = LearningRates(rate, rate, 0.1 * rate, options.weight_decay)
    moving = filter(None, (networks.policy, networks.critic))
    return Optimizers([o for m in moving for o in build_optimizers(m, rates, "adamw", 1e-5).optimizers])


class Update:
    """The updates from rollouts, and what they did.

    For each rollout `begin`, then `step` by minibatch, `moved` after each pass, `figures` at the end.
    """

    def __init__(
        self, run: Run, options: PolicyOptions, networks: Networks, observers: Observers, progress: Progress
    ) -> None:
        self.run, self.options, self.runtime = run, options, run.runtime
        self.networks, self.observers, self.progress = networks, observers, progress
        self.policy = self.runtime.wrap(networks.policy)
        self.critic = self.runtime.wrap(networks.critic) if networks.critic else None

    def begin(self) -> None:
        """Forgets the figures of the rollout before."""
        self.means: defaultdict[str, list[float]] = defaultdict(list)
        self.sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.runtime.device))
        self.ratios = torch.ones(2, device=self.runtime.device)
        self.pass_moved, self.pass_tokens = 0.0, 0.0

    @property
    def policy_learns(self) -> bool:
        """Not while the critic is warming up."""
        return self.critic is None or self.run.state.step >= self.options.critic_warmup

    def step(self, minibatch: Sequence[Experience]) -> None:
        """One update of both networks."""
        options, runtime, optimizers = self.options, self.runtime, self.run.state.optimizers
        count = sum(len(experience.advantages) for experience in minibatch)
        tokens = round(runtime.total(torch.tensor(float(count), device=runtime.device)).item())
        weights = {"policy_loss": 1.0, "text_loss": options.ptx, "value_loss": options.value_weight}
        parts: dict[str, float] = {}
        if self.policy_learns:
            parts["policy_loss"] = accumulate(self.policy, self._policy_loss, minibatch, tokens, runtime)
            if self.progress.text:
                batch = self.progress.text.next_rows(self._text_rows(self.progress.text))
                parts["text_loss"] = backward(self.policy, batch, options.micro_tokens, runtime, options.ptx)
        if self.critic:
            parts["value_loss"] = accumulate(
                self.critic, self._value_loss, minibatch, tokens, runtime, options.value_weight
            )
        loss = sum(weights[name] * part for name, part in parts.items())
        norm = clip_gradients(optimizers.parameters(), options.clip)
        self.run.check_finite(loss=loss, gradient_norm=norm)
        rate = self._rate(len(self.means["loss"]))
        optimizers.step(rate)
        for name, value in (parts | {"loss": loss, "gradient_norm": norm, "rate": rate}).items():
            self.means[name].append(value)

    def _text_rows(self, text: Mixture) -> int:
        return self.runtime.rows_of_step(self.options.ptx_tokens, text.block_size)

    def _rate(self, update: int) -> float:
        """The share of the base rates at an update of this step."""
        options, each = self.options, self.options.inner_epochs * self.options.minibatches
        done = self.run.state.step * each + update
        return lr_schedule(done, options.iterations * each, options.warmup, options.decay)

    def _policy_loss(self, experience: Experience) -> Float[Tensor, ""]:
        rollout, options, T = experience.rollout, self.options, self.observers.sampling.temperature
        logprobs, _, exact_kl = self.policy(
            rollout.tokens, rollout.start, of=rollout.places, temperature=T, allowed=rollout.allowed,
            reference=self._reference(rollout),
        )  # fmt: skip
        old = rollout.logprobs[rollout.mask]
        self._record(logprobs.detach(), old, experience.advantages)
        if options.algorithm == "ppo":
            return policy_losses(logprobs, old, experience.advantages, options.ratio_clip).sum()
        kl = exact_kl
        if kl is None:
            estimate = {"k2": k2, "k3": k3}[options.kl_estimator]
            kl = estimate(logprobs, rollout.ref_logprobs[rollout.mask])
        losses = grpo_losses(logprobs, old, experience.advantages, kl, options.ratio_clip, self.progress.beta)
        return losses.sum()

    def _reference(self, rollout: Rollout) -> tuple[Tensor, Tensor] | None:
        """The reference's hidden states and output matrix, where GRPO's loss holds the exact KL to it."""
        if self.options.algorithm == "ppo" or self.options.kl_estimator != "exact":
            return None
        ref = self.observers.ref
        with torch.no_grad():
            return gather_previous(ref(rollout.tokens, rollout.start), rollout.places), ref.lm_head.weight

    def _value_loss(self, experience: Experience) -> Float[Tensor, ""]:
        assert self.critic is not None
        rollout = experience.rollout
        values = gather_previous(self.critic(rollout.tokens, rollout.start), rollout.places)
        old = rollout.values[rollout.mask]
        return value_losses(values, old, experience.returns, self.options.value_clip).sum()

    def _record(self, logprobs: Tensor, old: Tensor, advantages: Tensor) -> None:
        ratio = (logprobs - old).exp()
        self.sums["tokens"] += len(ratio)
        self.sums["clip_share"] += clipped(logprobs, old, advantages, self.options.ratio_clip).sum()
        self.sums["old_kl"] += k3(old, logprobs).sum()
        self.ratios[0] = torch.maximum(self.ratios[0], ratio.max())
        self.ratios[1] = torch.minimum(self.ratios[1], ratio.min())

    def moved(self) -> float:
        """KL of the policy from its samples' in the pass that has ended, in nats a token."""
        sums = torch.stack([self.sums["old_kl"], self.sums["tokens"]])
        total_moved, total_tokens = self.runtime.total(sums).tolist()
        moved = (total_moved - self.pass_moved) / max(1.0, total_tokens - self.pass_tokens)
        self.pass_moved, self.pass_tokens = total_moved, total_tokens
        return moved

    def figures(self) -> dict[str, float]:
        """Means over the updates or their tokens, and the largest and smallest ratio."""
        found = {name: sum(values) / len(values) for name, values in self.means.items()}
        found["updates"] = float(len(self.means["loss"]))
        if self.policy_learns:
            names = ("clip_share", "old_kl", "tokens")
            shares = self.runtime.total(torch.stack([self.sums[name] for name in names])).tolist()
            found |= {name: total / shares[-1] for name, total in zip(names[:2], shares, strict=False)}
            extremes = self.runtime.largest(self.ratios * self.ratios.new_tensor([1, -1]))
            found |= {"ratio_max": extremes[0].item(), "ratio_min": -extremes[1].item()}
        return found
