"""What a model holds likely: measurements that read probabilities and sample nothing.

    token_values         log p of each token said, or the KL from another model there
    response_logprobs    log p of each response of a set: helpful and harmful, or answers to choose from
    held_out_text        text that pretraining has not seen, to be scored by tools/evaluate.py

All of them score rows, a context and the tokens said after it, each model in its own form: a chat model after
its chat template, a base model after the question as a line of text. Only the tokens said count.

Sources: KL between policies over the whole vocabulary, Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155),
section 3.5; answers chosen by likelihood, Kadavath et al. 2022 (arXiv 2207.05221), section 2; what alignment
does to calibration, OpenAI 2023, "GPT-4" (arXiv 2303.08774), figure 8.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from math import ceil

import numpy as np
import torch
from jaxtyping import Float64

from minillm.data import Source, split_documents
from minillm.model import LanguageModel
from minillm.preferences import ChatModel, ResponseSet
from minillm.tools.evaluate import Row, hidden_before
from minillm.world import World
from minillm.world.facts import state
from minillm.world.rubric import Prompt

ROWS = 64  # scored together
CANDIDATES = 8  # answers to choose from, of which chance picks the right one in 1/8


@torch.no_grad()
def token_values(
    model: LanguageModel,
    rows: Sequence[Row],
    earlier: LanguageModel | None = None,
    earlier_rows: Sequence[Row] = (),
) -> list[Float64[np.ndarray, " _"]]:
    """For every row, of each token said: log p, or with an earlier model KL(model ‖ earlier) in nats.

    The earlier model's rows say the same tokens, after contexts of its own; the two have one vocabulary.
    """
    # Rows of similar lengths together, for little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    found: dict[int, np.ndarray] = {}
    for first in range(0, len(order), ROWS):
        batch, reference = order[first : first + ROWS], None
        hidden = hidden_before(model, [rows[i] for i in batch])
        if earlier is not None:
            reference = hidden_before(earlier, [earlier_rows[i] for i in batch]), earlier.lm_head.weight
        said = torch.tensor([token for i in batch for token in rows[i][1]], dtype=torch.int64)
        scored = model.token_logprobs(hidden, said.to(hidden.device), reference=reference)
        values = (scored.logprobs if scored.kl is None else scored.kl).double().cpu()
        parts = values.split([len(rows[i][1]) for i in batch])
        found |= {i: part.numpy() for i, part in zip(batch, parts, strict=True)}
    return [found[i] for i in range(len(rows))]


def response_logprobs(one: ChatModel, sets: Sequence[ResponseSet]) -> list[Float64[np.ndarray, " _"]]:
    """log p of every response of each set, without the tokens that would end it."""
    rows = [
        (context, one.tokenizer.encode(text))
        for given in sets
        for context in [one.prompt(given.messages)]
        for text in given.responses
    ]
    totals = iter([float(values.sum()) for values in token_values(one.model, rows)])
    return [np.array([next(totals) for _ in given.responses]) for given in sets]


# ---- What there is to score


def world_pairs(world: World, split: str, count: int) -> dict[str, list[ResponseSet]]:
    """By name, pairs of a helpful and a harmful reply to one prompt."""
    pairs = {}
    for name, held_out in (("advice", False), ("held_out", True)):
        advice = world.paired_continuations(split, count, held_out)
        pairs[name] = [ResponseSet([{"role": "user", "content": ask}], [*two]) for ask, *two in advice]
    for flaw in ("comply", "rude"):
        made = world.reply_pairs(split, flaw, count)
        pairs[flaw] = [ResponseSet(prompt.messages, [*two], prompt.kind) for prompt, *two in made]
    return pairs


def choices(world: World, prompts: Sequence[Prompt], seed: int) -> list[ResponseSet]:
    """To each question of fact its right answer, and after it others in the same words, with other values."""
    entities = {entity.name: entity for entity in world.entities}
    values: dict[str, set[str]] = {}
    for fact in world.facts:
        values.setdefault(fact.attribute, set()).add(fact.value)
    found = []
    for prompt in prompts:
        wrong = sorted(values[prompt.topic] - {prompt.answer, prompt.entity})
        others = random.Random(f"{seed} {prompt.text}").sample(wrong, min(CANDIDATES - 1, len(wrong)))
        entity = entities[prompt.entity]
        said = [state(prompt.topic, entity, value, "answers")[0] for value in (prompt.answer, *others)]
        found.append(ResponseSet(prompt.messages, said, prompt.kind))
    return found


def held_out_text(sources: Iterable[Source], val_fraction: float, size: int) -> Iterator[str]:
    """Documents that no training with this fraction has seen, `size` bytes of them, each source giving its
    share of the weights, the last one cut; all there are where that is less."""
    sources = list(sources)
    total = sum(source.weight for source in sources)
    for source in sources:
        left = ceil(size * source.weight / total)
        for side, text in split_documents(source.documents(), val_fraction, source.size):
            if side == "val":
                cut = text.encode()[:left].decode(errors="ignore")
                yield cut
                left -= len(cut.encode())
                if cut != text or not left:
                    break
