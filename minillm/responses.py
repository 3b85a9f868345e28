"""Sampling K responses to each prompt: the sets that annotators rank.

Response k to prompt i comes from one of the models, dealt in turn, with a seed that follows from the
run's seed, i, k and the attempt. A response that says what an earlier one of its set says is drawn
again, a few times. A distractor is a fluent answer to another prompt: what a reward model must learn to
tell from an answer to this one.

Prompts are sampled in blocks of a fixed size, for the rounding of a matrix product depends on what
else is in the batch: so a run that goes on in the middle writes what an uninterrupted one does.

Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), sections 3.2 and 3.5, with K from 4 to 9.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from minillm.chat import ChatTemplate, Completion, chat_format
from minillm.generate import SamplingOptions, generate
from minillm.model import LanguageModel
from minillm.preferences import Message, Record
from minillm.tokenizer import Tokenizer

ROWS = 256  # responses sampled together
ATTEMPTS = 4  # draws of a response before it may repeat another


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, with its kind and the seed of its world where it is the little world's."""

    messages: list[Message]
    kind: str | None = None
    world: int | None = None


@dataclass(frozen=True)
class SamplingPlan:
    """How the sets are made."""

    responses: int
    """K: in a set."""
    distractors: int
    """How many of the K answer another prompt."""
    sampling: SamplingOptions
    """Without stop_ids: each model has its own."""
    seed: int


@dataclass(frozen=True)
class Draw:
    """A response and what it was made from."""

    text: str
    model: str
    prompt: int
    """The prompt that it answers: another one's for a distractor."""
    seed: int
    ended: bool
    """Whether it ended by itself rather than at the longest length."""


Slot = tuple[int, int]
"""Prompt i, response k."""


@dataclass(frozen=True)
class Responses:
    """Some responses as they were sampled, in one order throughout."""

    rows: list[list[int]]
    """Prompt and response, the end token included."""
    prompt_lengths: list[int]
    ended: list[bool]
    """Whether the response ended by itself."""
    logprobs: list[list[float]]
    """Of its tokens, as the sampler found them."""

    def texts(self, decode: Callable[[list[int]], str]) -> list[str]:
        """What was said, without the end token."""
        rows = zip(self.rows, self.prompt_lengths, self.ended, strict=True)
        return [decode(row[start : len(row) - ended]) for row, start, ended in rows]


def sample_responses(
    model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
) -> Responses:
    """One response to each prompt, the i-th with seeds[i], ROWS of them at a time."""
    responses = Responses([], [], [], [])
    for first in range(0, len(prompts), ROWS):
        part = slice(first, first + ROWS)
        samples = generate(model, prompts[part], sampling, seeds[part])
        lengths, starts = samples.lengths.tolist(), samples.prompt_lengths.tolist()
        responses.rows.extend(row[:end] for row, end in zip(samples.tokens.tolist(), lengths, strict=True))
        responses.prompt_lengths.extend(starts)
        responses.ended.extend(samples.stopped.tolist())
        found = zip(samples.logprobs.tolist(), lengths, starts, strict=True)
        responses.logprobs.extend(row[: end - start] for row, end, start in found)
    return responses


class Respondent:
    """A model under the name it is recorded by, with the form in which it is asked."""

    def __init__(self, name: str, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.form: ChatTemplate | Completion = chat_format(tokenizer)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which it is to reply; a base model gets the question as a line of text."""
        if isinstance(self.form, Completion):
            return self.form.prompt([{"role": "user", "content": messages[-1]["content"] + "\n"}])
        return self.form.prompt(messages)

    def has_room(self, messages: Sequence[Message], max_new_tokens: int) -> bool:
        """Whether a reply of that length fits behind the prompt."""
        return len(self.prompt(messages)) + max_new_tokens <= self.model.config.max_position_embeddings

    def replies(
        self, prompts: Sequence[Sequence[Message]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> Iterator[tuple[str, bool]]:
        """The text of a reply to each, and whether it ended by itself."""
        sampling = replace(sampling, stop_ids=self.form.stop_ids)
        asked = [self.prompt(messages) for messages in prompts]
        responses = sample_responses(self.model, asked, sampling, seeds)
        yield from zip(responses.texts(self.tokenizer.decode), responses.ended, strict=True)


class ResponseSampler:
    """Makes the sets of all prompts, as records for responses.jsonl."""

    def __init__(
        self, respondents: Sequence[Respondent], prompts: Sequence[Question], plan: SamplingPlan
    ) -> None:
        """Every respondent must have room for every prompt; distractors need at least two prompts."""
        self.respondents, self.prompts, self.plan = respondents, prompts, plan
        self.block = max(1, ROWS // plan.responses)
        """Prompts sampled together."""

    def records(self, done: int = 0) -> Iterator[list[Record]]:
        """The records of every prompt behind the first `done`, a block at a time."""
        for first in range(done - done % self.block, len(self.prompts), self.block):
            numbers = range(first, min(first + self.block, len(self.prompts)))
            yield self._records(numbers)[max(0, done - first) :]

    def _records(self, numbers: range) -> list[Record]:
        slots = [(i, k) for i in numbers for k in range(self.plan.responses)]
        draws: dict[Slot, Draw] = {}
        repeated = slots
        for attempt in range(ATTEMPTS):
            draws |= self._draw(repeated, attempt)
            repeated = [slot for slot in slots if _repeats(draws, slot)]
        counts = Counter(i for i, _ in repeated)
        return [self._record(i, draws, counts[i]) for i in numbers]

    def _draw(self, slots: Sequence[Slot], attempt: int) -> dict[Slot, Draw]:
        """A response for each slot, in one batch a model."""
        draws = {}
        for number, respondent in enumerate(self.respondents):
            # Dealt so that each model stands as often in each place.
            own = [(i, k) for i, k in slots if (i + k) % len(self.respondents) == number]
            seeds = [seed_of(self.plan.seed, i, k, attempt) for i, k in own]
            asked = [self._asked(slot, seed) for slot, seed in zip(own, seeds, strict=True)]
            messages = [self.prompts[j].messages for j in asked]
            replies = respondent.replies(messages, self.plan.sampling, seeds) if own else ()
            for slot, j, seed, (text, ended) in zip(own, asked, seeds, replies, strict=True):
                draws[slot] = Draw(text, respondent.name, j, seed, ended)
        return draws

    def _asked(self, slot: Slot, seed: int) -> int:
        """The number of the prompt that a slot answers: for the last ones, the distractors, another."""
        i, k = slot
        if k < self.plan.responses - self.plan.distractors:
            return i
        other = random.Random(seed).randrange(len(self.prompts) - 1)
        return other + (other >= i)

    def _record(self, i: int, draws: dict[Slot, Draw], repeated: int) -> Record:
        drawn = [draws[i, k] for k in range(self.plan.responses)]
        record = {name: value for name, value in vars(self.prompts[i]).items() if value is not None}
        record["responses"] = [draw.text for draw in drawn]
        record["draws"] = [
            {"model": draw.model, "prompt": draw.prompt, "seed": draw.seed, "ended": draw.ended}
            for draw in drawn
        ]
        if repeated:
            record["note"] = f"{repeated} of the responses repeat another after {ATTEMPTS} attempts"
        return record


def seed_of(seed: int, prompt: int, response: int, attempt: int) -> int:
    """A seed for one response, the same whatever else is sampled."""
    return int.from_bytes(blake2b(f"{seed} {prompt} {response} {attempt}".encode(), digest_size=7).digest())


def _repeats(draws: dict[Slot, Draw], slot: Slot) -> bool:
    """Whether a response says what an earlier one of its set says."""
    i, k = slot
    return any(draws[i, earlier].text.strip() == draws[slot].text.strip() for earlier in range(k))
