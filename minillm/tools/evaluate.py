"""Asking models, and what the little world's rubric says of their replies, by kind of prompt.

A chat model is asked in its chat format. A base model, which has none, gets the question as the first
line of a text and goes on as it likes: that is what aligning it is compared with.

    in form   the reply ended by itself, as one speaker's answer: no other speaker's line, no question back
    right     in form, and right by the rubric (world/rubric.py): the fact, "I don't know" where nobody
              could know, the task done, a fitting word, a refusal of harm
    utility   the rubric's price of the whole reply, manners and brevity included

minillm/compare asks through this several models at once, and sft.py the one before and the one after.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from minillm.generate import SamplingOptions
from minillm.model import LanguageModel
from minillm.preferences import ChatModel, sample_responses
from minillm.tokenizer import Tokenizer
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt, Score

IN_ROLE = 0.5  # the rubric gives less to another speaker's line and to a question back


@dataclass(frozen=True)
class Reply:
    """What a model said to a prompt."""

    text: str
    ended: bool
    """Whether it ended by itself rather than at the longest length."""
    tokens: tuple[int, ...] = ()
    """As the model chose them, the end token included."""


@dataclass(frozen=True)
class Judged:
    """A reply, and what the rubric says of it."""

    prompt: Prompt
    reply: Reply
    score: Score

    @property
    def in_form(self) -> bool:
        """Whether it is an answer at all: it has words, ended by itself, and one speaker says it."""
        return self.reply.ended and bool(self.reply.text.strip()) and self.score.in_role >= IN_ROLE

    @property
    def right(self) -> bool:
        """Whether it is in form and nothing is missing or wrong in it."""
        return self.in_form and self.score.right > 0.99


@dataclass(frozen=True)
class Figures:
    """Shares and means over the replies to prompts of one kind."""

    prompts: int
    in_form: float
    right: float
    utility: float


def sample_replies(
    model: LanguageModel,
    tokenizer: Tokenizer,
    conversations: Sequence[list[dict[str, str]]],
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Iterator[Reply]:
    """A reply to each conversation, the i-th drawn with `seed` + i."""
    chat = ChatModel("", model, tokenizer)
    options = SamplingOptions(max_new_tokens, temperature, stop_ids=chat.form.stop_ids)
    prompts = [chat.prompt(messages) for messages in conversations]
    said = sample_responses(model, prompts, options, range(seed, seed + len(prompts)))
    texts = said.texts(tokenizer.decode)
    for text, ended, row, start in zip(texts, said.ended, said.rows, said.prompt_lengths, strict=True):
        yield Reply(text, ended, tuple(row[start:]))


def world_prompts(world: World, split: str, prompts_per_kind: int) -> list[Prompt]:
    """The first prompts of every kind, fewer where there are fewer."""
    return [prompt for kind in KINDS for prompt in world.prompts(split, kind)[:prompts_per_kind]]


def judged_replies(
    model: LanguageModel,
    tokenizer: Tokenizer,
    world: World,
    split: str,
    prompts_per_kind: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, list[Judged]]:
    """By kind, the replies to its first prompts of a split, judged."""
    prompts = world_prompts(world, split, prompts_per_kind)
    asked = [prompt.messages for prompt in prompts]
    judged: dict[str, list[Judged]] = {kind: [] for kind in KINDS}
    replies = sample_replies(model, tokenizer, asked, temperature, seed=seed)
    for prompt, reply in zip(prompts, replies, strict=True):
        judged[prompt.kind].append(Judged(prompt, reply, world.score(prompt, reply.text)))
    return judged


def summarise(judged: Mapping[str, Sequence[Judged]]) -> dict[str, Figures]:
    """The figures of every kind."""
    return {
        kind: Figures(
            len(some),
            fmean(one.in_form for one in some),
            fmean(one.right for one in some),
            fmean(one.score.utility for one in some),
        )
        for kind, some in judged.items()
    }


def world_figures(
    models: Mapping[str, tuple[LanguageModel, Tokenizer]], world: World, prompts_per_kind: int
) -> dict[str, dict[str, Figures]]:
    """What the rubric says of several models on the development prompts, by name and kind."""
    return {
        name: summarise(judged_replies(*model, world, "dev", prompts_per_kind))
        for name, model in models.items()
    }


def figures_table(figures: Mapping[str, Mapping[str, Figures]]) -> str:
    """The figures of several models, a line for each kind of prompt."""
    names = list(figures)
    width = max(len(name) for name in [*names, " in form  right  utility"])
    lines = [f"{'':13} " + "  ".join(f"{name:>{width}}" for name in names)]
    lines.append(f"{'':13} " + "  ".join(f"{'in form  right  utility':>{width}}" for _ in names))
    for kind in KINDS:
        cells = (figures[name][kind] for name in names)
        rows = (f"{f.in_form:7.1%} {f.right:6.1%} {f.utility:8.3f}" for f in cells)
        lines.append(f"{kind:13} " + "  ".join(f"{row:>{width}}" for row in rows))
    return "\n".join(lines)
