"""How well a model answers the little world's held-out prompts, by kind of prompt.

    python -m minillm.evaluate out/base out/sft              greedy, on the development prompts
    python -m minillm.evaluate out/base out/sft --show 2     and some replies side by side
    python -m minillm.evaluate out/sft --split test --temperature 1

A chat model is asked in its chat format. A base model, which has none, gets the question as the first
line of a text and goes on as it likes: that is what aligning it is compared with.

    in form   the reply ended by itself, as one speaker's answer: no other speaker's line, no question back
    right     in form, and right by the rubric (world/rubric.py): the fact, "I don't know" where nobody
              could know, the task done, a fitting word, a refusal of harm
    utility   the rubric's price of the whole reply, manners and brevity included
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Literal

import tyro

from minillm.errors import InputError, one_line_errors
from minillm.files import write_json
from minillm.generate import SamplingOptions, generate
from minillm.huggingface import load_model
from minillm.model import LanguageModel
from minillm.options import options_json, parse_options
from minillm.provenance import provenance
from minillm.runtime import start_runtime
from minillm.template import Completion, chat_format
from minillm.tokenizer import Tokenizer
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt, Score

ROWS = 256  # prompts sampled together
IN_ROLE = 0.5  # the rubric gives less to another speaker's line and to a question back


@dataclass(frozen=True)
class Reply:
    """What a model said to a prompt."""

    text: str
    ended: bool
    """Whether it ended by itself rather than at the longest length."""


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
    form = chat_format(tokenizer)
    if isinstance(form, Completion):  # the question stands on a line of its own
        conversations = [[{"role": "user", "content": c[-1]["content"] + "\n"}] for c in conversations]
    options = SamplingOptions(max_new_tokens, temperature, stop_ids=form.stop_ids)
    prompts = [form.prompt(messages) for messages in conversations]
    for first in range(0, len(prompts), ROWS):
        part = prompts[first : first + ROWS]
        samples = generate(model, part, options, range(seed + first, seed + first + len(part)))
        for tokens, ended in zip(samples.responses(), samples.stopped.tolist(), strict=True):
            yield Reply(tokenizer.decode(tokens[:-1] if ended else tokens), ended)


def judged_replies(
    model: LanguageModel,
    tokenizer: Tokenizer,
    world: World,
    split: str,
    prompts_per_kind: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, list[Judged]]:
    """By kind, the replies to its first prompts of a split (fewer where there are fewer), judged."""
    prompts = [
        prompt
        for kind in KINDS
        for prompt in world.prompts(split, kind, min(prompts_per_kind, len(world.prompts(split, kind))))
    ]
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
            fmean(one.in_form and one.score.right > 0.99 for one in some),
            fmean(one.score.utility for one in some),
        )
        for kind, some in judged.items()
    }


def side_by_side(judged: Mapping[str, Mapping[str, Sequence[Judged]]], count: int) -> str:
    """The first `count` prompts of every kind, with what each model said."""
    lines = []
    width = max(map(len, judged))
    for kind in KINDS:
        for row in zip(*(of_model[kind][:count] for of_model in judged.values()), strict=True):
            lines.append(f"\n{kind}: {row[0].prompt.text}")
            lines += [
                f"    {name:{width}}  {shorten(' '.join(one.reply.text.split()), 100, placeholder=' …')}"
                for name, one in zip(judged, row, strict=True)
            ]
    return "\n".join(lines)


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


# ---- The command


@dataclass(frozen=True)
class Options:
    """Ask models the little world's held-out prompts and let its rubric judge what they say."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders or Hugging Face folders."""
    split: Literal["dev", "test"] = "dev"
    """Prompts to choose by, or prompts to report on."""
    prompts: int = 100
    """Of each kind, at most."""
    show: int = 0
    """Prompts of each kind to print with every model's reply."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token."""
    seed: int = 0
    """Of the little world and of sampling."""
    json: str | None = None
    """Also write the figures to this file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the computation; sampling on a CPU is fastest in float32."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run given: name at least one, as in out/sft")
        if self.prompts < 1:
            raise InputError(f"--prompts {self.prompts}: give at least 1")
        if self.show < 0:
            raise InputError(f"--show {self.show}: give 0 or more")


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        with start_runtime(options.device, options.precision) as runtime:
            world, judged = World(options.seed), {}
            for run in options.runs:
                model, tokenizer = load_model(Path(run), runtime.device, runtime.dtype)
                judged[run] = judged_replies(
                    model, tokenizer, world, options.split, options.prompts, options.temperature, options.seed
                )
        figures = {run: summarise(of_run) for run, of_run in judged.items()}
        print(figures_table(figures))
        print(side_by_side(judged, options.show))
        if options.json:
            content = {run: {kind: asdict(f) for kind, f in of.items()} for run, of in figures.items()}
            write_json(
                Path(options.json), {"options": options_json(options), "figures": content} | provenance()
            )


if __name__ == "__main__":
    main(sys.argv[1:])
