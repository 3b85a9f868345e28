"""Rollouts: what a policy answers to some prompts, and what the other three models say of it.

    prompts ──policy──► responses ──reward model──► scores ──┐
                            ├──policy, reference──► logprobs, ref_logprobs, KL ──► Rollout
                            └──critic──────────────► values ─┘

The critic's value of token r is of the state in which r is chosen, so it stands at the token before it, and
so does the hidden state from which its log-probability comes. Prompt tokens have neither: the grids [B, R]
hold responses only, and no prompt token can get an advantage, a loss or a gradient. What a policy learns
from a rollout is policy.py's; here nothing moves.

A step's responses are dealt once to minibatches, and packed once into the rows of forward passes. Sampling's
own log-probabilities are only compared: the old log-probabilities are computed in the very forward passes
that the update will repeat, so that its first ratios are exactly 1, in any precision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from minillm.chat import ChatTemplate
from minillm.data import Shuffled
from minillm.files import digest
from minillm.generate import SamplingOptions, filter_logits
from minillm.layout import flat_index, forward_passes, gather_previous, pack_rows, pad
from minillm.model import LanguageModel, ScalarModel
from minillm.preferences import Message, Question, Responses, sample_responses, seed_of
from minillm.reward import score_rows
from minillm.run import Runtime
from minillm.tokenizer import Tokenizer

# ---- Prompts

Worth = Callable[[Sequence[Message], str], float | None]
"""What the little world's rubric gives a response to these messages."""


@dataclass(frozen=True)
class Prompt:
    """A question and the tokens after which the policy answers it."""

    question: Question
    tokens: list[int]


def encode_prompts(
    questions: Sequence[Question], template: ChatTemplate, longest: int
) -> tuple[list[Prompt], int]:
    """The questions of at most `longest` tokens, and how many are left out."""
    prompts = [Prompt(question, template.prompt(question.messages)) for question in questions]
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= longest]
    return kept, len(prompts) - len(kept)


def shuffled_prompts(prompts: Sequence[Prompt], seed: int) -> Shuffled[Prompt]:
    """The prompts without end."""
    return Shuffled(prompts, "prompts", seed, digest([prompt.tokens for prompt in prompts]))


# ---- The distribution that was sampled from


def allowed_tokens(
    hidden: Float[Tensor, "N D"], model: LanguageModel, taken: Int64[Tensor, " N"], sampling: SamplingOptions
) -> Bool[Tensor, "N V"]:
    """What top-k and top-p left to choose from.

    The token taken always belongs to it: at the edge of a nucleus another pass may round otherwise.
    """
    logits = model.logits(hidden) / sampling.temperature
    kept = filter_logits(logits, sampling.top_k, sampling.top_p) > -torch.inf
    return kept.scatter(1, taken[:, None], True)


# ---- Responses -> rollouts


@dataclass(frozen=True)
class Rollout:
    """Some responses, frozen: one forward pass of each network."""

    numbers: list[int]
    """Which responses of the step these are."""
    tokens: Int64[Tensor, "P T"]
    """Prompts and responses, side by side in P rows."""
    start: Int32[Tensor, "P T"]
    """Where the prompt begins that a position belongs to: none attends to what lies before it."""
    places: Int64[Tensor, " N"]
    """Where the tokens of the responses stand in `tokens`, its rows end to end."""
    mask: Bool[Tensor, "B R"]
    logprobs: Float[Tensor, "B R"]
    """Of the policy that sampled, under the distribution sampled from."""
    ref_logprobs: Float[Tensor, "B R"]
    """Of the reference, under its distribution of the same temperature, over the same tokens."""
    kl: Float[Tensor, "B R"]
    """KL(policy || reference) of each state, exact over the vocabulary, at the temperature sampled at."""
    entropy: Float[Tensor, "B R"]
    """Of the distribution sampled from."""
    values: Float[Tensor, "B R"]
    """The critic's, of the state in which each token is chosen; 0 without a critic."""
    scores: Float[Tensor, " B"]
    allowed: Bool[Tensor, "N V"] | None
    """What each token was chosen from, where not from all."""

    @property
    def taken(self) -> Int64[Tensor, " N"]:
        return self.tokens.flatten()[self.places]


@torch.no_grad()
def observe(
    policy: LanguageModel,
    ref: LanguageModel,
    critic: ScalarModel | None,
    responses: Responses,
    scores: Sequence[float],
    rows: Sequence[Sequence[int]],
    sampling: SamplingOptions,
) -> Rollout:
    """The responses of these numbers as a rollout, those of a row side by side: one pass of each network."""
    device, T = policy.lm_head.weight.device, sampling.temperature
    numbers = [i for row in rows for i in row]
    lengths = torch.tensor([len(responses.rows[i]) for i in numbers])
    prompt_lengths = torch.tensor([responses.prompt_lengths[i] for i in numbers])
    tokens, start, begins = pack_rows(responses.rows, rows)
    mask, index = flat_index(begins + prompt_lengths, begins + lengths)
    tokens, start, mask, index = (t.to(device) for t in (tokens, start, mask, index))
    allowed = None
    if sampling.top_k or sampling.top_p < 1:
        hidden = gather_previous(policy(tokens, start), index)
        allowed = allowed_tokens(hidden, policy, tokens.flatten()[index], sampling)
    ref_hidden = gather_previous(ref(tokens, start), index)
    ref_logprobs = ref.token_logprobs(ref_hidden, tokens.flatten()[index], T, allowed).logprobs
    own = policy(
        tokens, start, of=index, temperature=T, allowed=allowed, reference=(ref_hidden, ref.lm_head.weight)
    )
    values = gather_previous(critic(tokens, start), index) if critic else torch.zeros_like(own.logprobs)
    return Rollout(
        numbers=numbers,
        tokens=tokens,
        start=start,
        places=index,
        mask=mask,
        logprobs=pad(own.logprobs, mask),
        ref_logprobs=pad(ref_logprobs, mask),
        kl=pad(own.kl, mask),
        entropy=pad(own.entropy, mask),
        values=pad(values, mask),
        scores=torch.tensor([scores[i] for i in numbers], device=device),
        allowed=allowed,
    )


# ---- The networks that look on, and what they see


@dataclass(frozen=True)
class Observers:
    """The frozen networks that look at what a policy says, and how it is made to say it."""

    ref: LanguageModel
    reward: ScalarModel | None
    """None where there is none (DPO needs none): every score is 0 then, and no figure tells it."""
    tokenizer: Tokenizer
    sampling: SamplingOptions
    unended_score: float | None
    """The score of a response that did not end; None for the reward model's own."""
    worth: Worth | None
    micro_tokens: int

    @property
    def fingerprint(self) -> str:
        """Changes with any weight of the networks."""
        parts = []
        for model in filter(None, (self.ref, self.reward)):
            for tensor in model.state_dict().values():
                parts.append(digest(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()))
        return digest(parts)

    def sample(self, policy: LanguageModel, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Responses:
        """A response to each prompt."""
        sampling = replace(self.sampling, stop_ids=ChatTemplate(self.tokenizer).stop_ids)
        return sample_responses(policy, [prompt.tokens for prompt in prompts], sampling, seeds)

    def scores(self, responses: Responses) -> list[float]:
        """What each response is worth to the reward model."""
        if self.reward is None:
            return [0.0] * len(responses.rows)
        scores = score_rows(self.reward, responses.rows)
        if self.unended_score is None:
            return scores
        return [s if ended else self.unended_score for s, ended in zip(scores, responses.ended, strict=True)]

    def rollouts(
        self,
        policy: LanguageModel,
        critic: ScalarModel | None,
        responses: Responses,
        scores: Sequence[float],
        numbers: Sequence[int],
    ) -> list[Rollout]:
        """The responses of these numbers, in as many forward passes as they need."""
        return [
            observe(policy, self.ref, critic, responses, scores, some, self.sampling)
            for some in forward_passes(numbers, responses.rows, self.micro_tokens)
        ]

    def figures(
        self,
        prompts: Sequence[Prompt],
        responses: Responses,
        rollouts: Sequence[Rollout],
        runtime: Runtime,
    ) -> dict[str, float]:
        """Means over the responses, of all processes."""
        texts = responses.texts(self.tokenizer.decode)
        sums = {
            "score": sum(float(r.scores.double().sum()) for r in rollouts),
            "score_square": sum(float(r.scores.double().square().sum()) for r in rollouts),
            "kl": sum(float(r.kl.double().sum()) for r in rollouts),
            "length": float(sum(int(r.mask.sum()) for r in rollouts)),
            "unended": float(responses.ended.count(False)),
            "entropy": sum(float(r.entropy.double().sum()) for r in rollouts),
        }
        if self.worth is not None:
            sums["rubric"] = sum(
                self.worth(p.question.messages, t) or 0.0 for p, t in zip(prompts, texts, strict=True)
            )
        totals = torch.tensor([*sums.values(), len(texts)], dtype=torch.float64, device=runtime.device)
        *found, count = runtime.total(totals).tolist()
        means = {name: total / count for name, total in zip(sums, found, strict=True)}
        means["entropy"] /= means["length"]  # a token's
        means["score_deviation"] = max(0.0, means.pop("score_square") - means["score"] ** 2) ** 0.5
        if self.reward is None:
            del means["score"], means["score_deviation"]
        return means


def held_out_figures(
    observers: Observers, policy: LanguageModel, prompts: Sequence[Prompt], seed: int, runtime: Runtime
) -> dict[str, float]:
    """Figures of one sampled response to each prompt, with the same seeds every time."""
    seeds = [seed_of(seed, i, 0, 1) for i in range(len(prompts))]
    own = slice(runtime.rank, None, runtime.world_size)
    responses = observers.sample(policy, prompts[own], seeds[own])
    numbers = range(len(responses.rows))
    rollouts = observers.rollouts(policy, None, responses, observers.scores(responses), numbers)
    return observers.figures(prompts[own], responses, rollouts, runtime)
