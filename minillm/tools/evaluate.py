"""Asking models, and what the little world's rubric says of their replies.

    python -m minillm.tools.evaluate out/base --text book.txt     the loss of any model on any text

A chat model is asked in its chat format. A base model, which has none, gets the question as the first
line of a text and goes on as it likes: that is what aligning it is compared with.

    in form   the reply ended by itself, as one speaker's answer: no other speaker's line, no question back
    right     in form, and right by the rubric (world/rubric.py): the fact, "I don't know" where nobody
              could know, the task done, a fitting word, a refusal of harm
    utility   the rubric's score of the whole reply, manners and brevity included

minillm/compare makes tables of that, of several models at once; sft.py shows one of before and after.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minillm.corpus import document_marks
from minillm.generate import SamplingOptions
from minillm.io.files import Errors
from minillm.io.huggingface import load_causal_model
from minillm.io.text import open_sources
from minillm.model import LanguageModel
from minillm.preferences import ChatModel
from minillm.tokenizer import Tokenizer
from minillm.tools.commandline import parse_options
from minillm.tools.device import start_runtime
from minillm.tools.ending import one_line_errors
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt

Row = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, at least one, and those said after it."""
ROWS = 64  # of a forward pass
IN_ROLE = 0.5  # the rubric gives less to another speaker's line and to a question back


@dataclass(frozen=True)
class Reply:
    """What a model said to a prompt, and what the rubric says of it."""

    prompt: Prompt
    text: str
    ended: bool
    """Whether it ended by itself rather than at the longest length."""
    tokens: tuple[int, ...] = ()
    """As the model chose them, the end token included."""
    score: Any = None
    """The rubric's; None where the prompt is none of the little world's."""

    @property
    def in_form(self) -> bool:
        """It has words, ended by itself, and one speaker says it."""
        return self.ended and bool(self.text.strip()) and self.score.in_role >= IN_ROLE

    @property
    def right(self) -> bool:
        """It is in form and nothing is missing or wrong in it."""
        return self.in_form and self.score.right > 0.99

    @property
    def utility(self) -> float:
        """The rubric's score of all of it."""
        return self.score.utility

    @property
    def words(self) -> int:
        """How many it has."""
        return len(self.text.split())

    @property
    def repetition(self) -> float:
        """The share of its pairs of words that it has had before; 0 where it has none."""
        pairs = list(pairwise(self.text.lower().split()))
        return 1 - len(set(pairs)) / max(1, len(pairs)) if pairs else 0.0


def sample_replies(
    one: ChatModel,
    prompts: Sequence[Prompt],
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    world: World | None = None,
) -> list[Reply]:
    """A reply to each prompt, the i-th drawn with `seed` + i; with the rubric's score in a `world`."""
    options, seeds = SamplingOptions(max_new_tokens, temperature), range(seed, seed + len(prompts))
    texts, said = one.replies([prompt.messages for prompt in prompts], options, seeds)
    scores = [world and world.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return list(map(Reply, prompts, texts, said.ended, map(tuple, said.responses), scores))


@torch.no_grad()
def values_of(
    model: LanguageModel, rows: Sequence[Row], values: Callable[[Float[Tensor, "N D"], list[int]], Tensor]
) -> list[Float64[np.ndarray, " _"]]:
    """For every row, of each token said, what `values` makes of the hidden states that predict the tokens of
    some rows, which it is given with the numbers of these rows."""
    # Rows of similar lengths together, for little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    found: dict[int, np.ndarray] = {}
    for first in range(0, len(order), ROWS):
        batch = order[first : first + ROWS]
        made = values(hidden_before(model, [rows[i] for i in batch]), batch).cpu().double()
        parts = made.split([len(rows[i][1]) for i in batch])
        found |= {i: part.numpy() for i, part in zip(batch, parts, strict=True)}
    return [found[i] for i in range(len(rows))]


def token_values(
    model: LanguageModel,
    rows: Sequence[Row],
    earlier: LanguageModel | None = None,
    earlier_rows: Sequence[Row] = (),
) -> list[Float64[np.ndarray, " _"]]:
    """For every row, of each token said: log p, or with an earlier model KL(model ‖ earlier) in nats.

    The earlier model's rows say the same tokens, after contexts of its own; the two have one vocabulary.
    """

    def values(hidden: Tensor, batch: list[int]) -> Tensor:
        said = torch.tensor([token for i in batch for token in rows[i][1]], dtype=torch.int64)
        others = [earlier_rows[i] for i in batch] if earlier else []
        reference = (hidden_before(earlier, others), earlier.lm_head.weight) if earlier else None
        scored = model.token_logprobs(hidden, said.to(hidden.device), reference=reference)
        return scored.logprobs if scored.kl is None else scored.kl

    return values_of(model, rows, values)


def hidden_before(model: LanguageModel, rows: Sequence[Row]) -> Float[Tensor, "N D"]:
    """The hidden states that predict the tokens said, row after row."""
    inputs = [torch.tensor([*context, *said[:-1]]) for context, said in rows]
    hidden = model.model(pad_sequence(inputs, batch_first=True).to(model.lm_head.weight.device))
    parts = [own[len(context) - 1 :][: len(said)] for own, (context, said) in zip(hidden, rows, strict=True)]
    return torch.cat(parts)


def prompts_of_each_kind(world: World, split: str, count: int) -> list[Prompt]:
    """The first `count` prompts of every kind, fewer where there are fewer."""
    return [prompt for kind in KINDS for prompt in world.prompts(split, kind)[:count]]


# ---- The loss on a text


class TextLoss(NamedTuple):
    """The sum of -log p over a text."""

    nats: float
    tokens: int
    bytes: int

    def __str__(self) -> str:
        token, byte = self.nats / self.tokens, self.nats / self.bytes
        return (
            f"{byte:.4f} nats/byte, {byte / math.log(2):.4f} bits/byte, {token:.4f} nats/token, "
            f"perplexity {math.exp(min(token, 700)):.4g} over {self.tokens:,} tokens, {self.bytes:,} bytes"
        )


def text_loss(model: LanguageModel, tokenizer: Tokenizer, text: str, ended: bool = False) -> TextLoss:
    """The loss on a document, in windows of the model's context; with `ended` also on the token that ends it.

    Every token is a target once, as in validation: a window's first follows the token before it alone, the
    text's first the token that opens documents.
    """
    T, (bos, eos) = model.config.max_position_embeddings, document_marks(tokenizer)
    tokens = [bos, *tokenizer.encode(text), *[eos] * ended]
    rows = [(tokens[i : i + 1], tokens[i + 1 : i + 1 + T]) for i in range(0, len(tokens) - 1, T)]
    nats = -sum(float(logprobs.sum()) for logprobs in token_values(model, rows))
    return TextLoss(nats, len(tokens) - 1, len(text.encode()))


@dataclass(frozen=True)
class Options:
    """The loss of a model on text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run folder, or a Hugging Face folder (Llama, Qwen, Mistral)."""
    text: str
    """A file, folder or glob, read as train.py reads its --data: of records each is a document."""
    errors: Errors = "strict"
    """Stop at text not in the encoding or a line that does not parse, or replace and skip them."""
    encoding: str = "utf-8"
    """Of text files."""
    field: tuple[str, ...] | None = None
    """The fields of a JSON record, or columns of a table, of which the first with text is the document.
    Default text and content."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        (source,) = open_sources([options.text], options.errors, options.encoding, options.field)
        documents = source.documents()
        first = next(documents)  # before the model, so that a wrong file costs no wait
        with start_runtime(options.device) as runtime:
            model = load_causal_model(Path(options.run), runtime.device, runtime.dtype)
            losses = [text_loss(*model, document) for document in chain([first], documents)]
            print(TextLoss(*map(sum, zip(*losses, strict=True))))
            for what, count in (source.skipped + source.dropped).items():
                print(f"  left out: {count:,} {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
