"""Preferences: K responses to each prompt, somebody's rankings of them, and the files of both.

    prompts ──models──► responses.jsonl ──annotators──► rankings.jsonl ──► reward.py, dpo.py

A line of responses.jsonl holds a prompt, its responses and how each was drawn; a line of rankings.jsonl a
ranking of such a set:

    {"messages": […], "responses": […], "ranking": [[1], [0, 3], [2]], "annotator": "Ada", "seed": 0,
     "time": "2026-01-31T12:00:00+00:00"}

best first, ties together; "kind" where the prompt is the little world's; "cut": [2] where response 2 did not
end but was cut at the longest length. Reading and writing them, safe from crashes: minillm/io/rankings.py.

Method: K responses ranked at once, as in Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), sections 3.2
and 3.5: K (K - 1) / 2 comparisons for one reading of the prompt.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import combinations
from typing import Any

import torch
from torch import nn

from minillm.chat import ChatTemplate, Completion, Message, chat_format
from minillm.data import seed_of
from minillm.digest import digest
from minillm.generate import ROWS, Samples, SamplingOptions, generate
from minillm.model import LanguageModel
from minillm.tokenizer import Tokenizer

Record = dict[str, Any]

MOST_RESPONSES = 9
"""In a set: as many as anybody can keep apart."""
ATTEMPTS = 4
"""Draws of a response before it may repeat another of its set."""


# ---- A prompt, its responses, and a ranking of them


@dataclass(frozen=True)
class Prompt:
    """Messages that wait for a reply."""

    messages: list[Message]
    kind: str | None = None
    """Its kind, if it is a prompt of the little world."""
    world: int | None = None
    """The seed of that world."""
    tokens: Sequence[int] = ()
    """The messages as tokens, if one model is asked in the whole run."""


@dataclass(frozen=True)
class ResponseSet:
    """A prompt (its fields, as in the files) and the responses to be ranked."""

    messages: list[Message]
    responses: list[str]
    kind: str | None = None
    world: int | None = None
    cut: list[int] = field(default_factory=list)
    """Which responses did not end but were cut at the longest length."""

    @property
    def key(self) -> str:
        """The same for the same responses to the same prompt, in whatever order."""
        return digest(json.dumps(self.messages), *sorted(self.responses))


@dataclass(frozen=True)
class Ranking:
    """Somebody's ranking of the responses to a prompt."""

    messages: list[Message]
    responses: list[str]
    ranking: list[list[int]]
    """Indices of responses: best first, ties together. Each is here once."""
    annotator: str
    seed: int
    """Of whatever was random: the blind order for a person, the noise of a simulated one."""
    time: str
    """ISO 8601."""
    kind: str | None = None
    cut: list[int] = field(default_factory=list)

    @property
    def key(self) -> str:
        """That of the set that was ranked."""
        return ResponseSet(self.messages, self.responses).key

    def ranks(self) -> list[int]:
        """The rank of each response, 0 for the best; ties share one."""
        rank = {index: rank for rank, tied in enumerate(self.ranking) for index in tied}
        return [rank[index] for index in range(len(self.responses))]

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for all pairs of responses but those that tie."""
        return [
            (better, worse)
            for first, second in combinations(self.ranking, 2)
            for better in first
            for worse in second
        ]


def now() -> str:
    """The time of day, for a ranking."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_ranking(given: ResponseSet, ranking: Sequence[Sequence[int]], annotator: str, seed: int) -> Ranking:
    """The ranking of a set, made now."""
    tied = [sorted(group) for group in ranking]
    return Ranking(given.messages, given.responses, tied, annotator, seed, now(), given.kind, given.cut)


def ranking_by(values: Sequence[float | int], margin: float | int = 0) -> list[list[int]]:
    """Highest value first; those within `margin` of the first of a group tie with it.

    [0.5, 0.9, 0.88] by a margin of 0.05 → [[1, 2], [0]].
    """
    ranking: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda index: -values[index]):
        if ranking and values[ranking[-1][0]] - values[index] <= margin:
            ranking[-1].append(index)
        else:
            ranking.append([index])
    return [sorted(tied) for tied in ranking]


# ---- Prompts → responses


def fingerprint(*models: nn.Module | None) -> str:
    """Changes with any weight of the models."""
    weights = blake2b(digest_size=16)
    for tensor in (tensor for model in models if model for tensor in model.state_dict().values()):
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


class ChatModel:
    """A model under the name it is recorded by, with the format in which it is asked."""

    def __init__(self, name: str, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.form: ChatTemplate | Completion = chat_format(tokenizer)

    @property
    def fingerprint(self) -> str:
        """Changes with any weight, with the vocabulary and with the chat template."""
        config = json.dumps(self.tokenizer.config, sort_keys=True, default=str)
        return digest(fingerprint(self.model), self.tokenizer.fingerprint, config)

    def prompt(self, messages: list[Message]) -> list[int]:
        """The tokens after which it is to reply; a base model gets the last message as a line of text."""
        if isinstance(self.form, Completion):
            return self.form.prompt([{"role": "user", "content": messages[-1]["content"] + "\n"}])
        return self.form.prompt(messages)

    def has_room(self, messages: list[Message], max_new_tokens: int) -> bool:
        """Whether a reply of that length fits after the prompt."""
        return len(self.prompt(messages)) + max_new_tokens <= self.model.config.max_position_embeddings

    def replies(
        self, prompts: Sequence[list[Message]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> tuple[list[str], Samples]:
        """The texts of a reply to each, and the replies as tokens."""
        sampling = replace(sampling, stop_ids=self.form.stop_ids)
        samples = generate(self.model, [self.prompt(messages) for messages in prompts], sampling, seeds)
        return samples.texts(self.tokenizer.decode), samples


def sample_sets(
    models: Sequence[ChatModel],
    prompts: Sequence[Prompt],
    count: int,
    distractors: int,
    sampling: SamplingOptions,
    seed: int,
    done: int = 0,
) -> Iterator[list[Record]]:
    """`count` responses to every prompt after the first `done`, as lines of responses.jsonl, in blocks.

    Response k to prompt i comes from one of the models, dealt in turn. The last `distractors` of a set answer
    another prompt: a reward model must learn to tell a fluent answer from one to this prompt. A response that
    says what an earlier one of its set says is drawn again, a few times.

    Blocks have a fixed size, and a seed follows from `seed`, i, k and the attempt alone: a resumed run must
    write the same, and the rounding of a matrix product depends on what else is in the batch.
    """

    def draw(slots: Sequence[tuple[int, int]], attempt: int) -> dict[tuple[int, int], Record]:
        drawn = {}
        for number, model in enumerate(models):
            own = [(i, k) for i, k in slots if (i + k) % len(models) == number]
            seeds = [seed_of(seed, i, k, attempt) for i, k in own]  # the same whatever else is sampled
            asked = [
                i if k < count - distractors else another(i, s) for (i, k), s in zip(own, seeds, strict=True)
            ]
            texts, samples = model.replies([prompts[j].messages for j in asked], sampling, seeds)
            for slot, j, s, text, ended in zip(own, asked, seeds, texts, samples.ended, strict=True):
                drawn[slot] = {"text": text, "model": model.name, "prompt": j, "seed": s, "ended": ended}
        return drawn

    def another(i: int, seed: int) -> int:
        other = random.Random(seed).randrange(len(prompts) - 1)
        return other + (other >= i)

    block = max(1, ROWS // count)
    for first in range(done - done % block, len(prompts), block):
        numbers = range(first, min(first + block, len(prompts)))
        slots = repeated = [(i, k) for i in numbers for k in range(count)]
        drawn: dict[tuple[int, int], Record] = {}
        for attempt in range(ATTEMPTS):
            drawn |= draw(repeated, attempt)
            texts = {slot: record["text"].strip() for slot, record in drawn.items()}
            repeated = [(i, k) for i, k in slots if texts[i, k] in [texts[i, j] for j in range(k)]]
        lines = []
        for i in numbers:
            draws = [drawn[i, k] for k in range(count)]
            line: Record = {
                name: value for name, value in vars(prompts[i]).items() if value not in (None, ())
            }
            line |= {"responses": [draw.pop("text") for draw in draws], "draws": draws}
            if alike := sum(j == i for j, _ in repeated):
                line["note"] = f"{alike} of the responses repeat another after {ATTEMPTS} attempts"
            lines.append(line)
        yield lines[max(0, done - first) :]
