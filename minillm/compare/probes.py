"""What a model holds likely: the measurements that read probabilities and sample nothing.

    pair_differences    of two replies to one prompt, how much likelier the better one is
    text_nats           what held-out text costs, as in pretraining
    reply_kl            how far a model has moved from another, on its own replies
    choices, choose     which of several answers a model believes, and how firmly
    sureness            how probable its own words were to it

All of them score rows, a context and the tokens said after it, each model in its own form: a chat model after
its chat template, a base model after the question as a line of text. Only the tokens said count.

Sources: KL between policies over the whole vocabulary, Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155),
section 3.5; answers chosen by likelihood, Kadavath et al. 2022 (arXiv 2207.05221), section 2; what alignment
does to calibration, OpenAI 2023, "GPT-4" (arXiv 2303.08774), figure 8.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from math import ceil

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.logprob import linear_kl, linear_token_logprobs
from minillm.data import Source, document_marks, split_documents
from minillm.model import LanguageModel
from minillm.preferences import ChatModel as Respondent
from minillm.preferences import Message
from minillm.world import World
from minillm.world.facts import state
from minillm.world.rubric import Prompt

ROWS = 64  # scored together
CANDIDATES = 8  # answers to choose from, of which chance picks the right one in 1/8

Row = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, at least one, and those said after it."""
ReplyPair = tuple[Sequence[Message], str, str]
"""A prompt, a better and a worse reply."""
Choice = tuple[Sequence[Message], list[str]]
"""A prompt and answers to it, the right one first."""
PerToken = list[Float64[np.ndarray, " n"]]
"""For every row a value at each token said."""


# ---- Rows → a value for each token said


def said_hidden(model: LanguageModel, rows: Sequence[Row]) -> Float[Tensor, "N D"]:
    """The hidden states that predict the tokens said, row after row."""
    inputs = [torch.tensor([*context, *said[:-1]]) for context, said in rows]
    hidden = model(pad_sequence(inputs, batch_first=True).to(model.lm_head.weight.device))
    return torch.cat([
        own[len(context) - 1 : len(context) - 1 + len(said)]
        for own, (context, said) in zip(hidden, rows, strict=True)
    ])  # fmt: skip


@torch.no_grad()
def in_batches(rows: Sequence[Row], score: Callable[[list[int]], Float[Tensor, " N"]]) -> PerToken:
    """Calls `score` with the numbers of rows of similar lengths, for little padding; back in their order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    found: dict[int, np.ndarray] = {}
    for first in range(0, len(order), ROWS):
        batch = order[first : first + ROWS]
        parts = score(batch).double().cpu().split([len(rows[i][1]) for i in batch])
        found |= {i: part.numpy() for i, part in zip(batch, parts, strict=True)}
    return [found[i] for i in range(len(rows))]


def logprobs(model: LanguageModel, rows: Sequence[Row]) -> PerToken:
    """log p of each token said."""

    def score(batch: list[int]) -> Float[Tensor, " N"]:
        hidden = said_hidden(model, [rows[i] for i in batch])
        targets = torch.tensor([token for i in batch for token in rows[i][1]], dtype=torch.int64)
        return linear_token_logprobs(hidden, model.lm_head.weight, targets.to(hidden.device))[0]

    return in_batches(rows, score)


def row_kl(
    later: LanguageModel, later_rows: Sequence[Row], earlier: LanguageModel, earlier_rows: Sequence[Row]
) -> PerToken:
    """KL(later ‖ earlier) of the next token's distribution at each token said.

    The rows say the same tokens, each model's after a context of its own. The models have one vocabulary.
    """

    def score(batch: list[int]) -> Float[Tensor, " N"]:
        p = said_hidden(later, [later_rows[i] for i in batch])
        q = said_hidden(earlier, [earlier_rows[i] for i in batch])
        return linear_kl(p, later.lm_head.weight, q, earlier.lm_head.weight)

    return in_batches(later_rows, score)


# ---- Helpful and harmful


def pair_rows(one: Respondent, pairs: Sequence[ReplyPair]) -> list[Row]:
    """The better and the worse reply of each pair in turn, without the tokens that would end them."""
    return [
        (one.prompt(messages), one.tokenizer.encode(reply))
        for messages, *replies in pairs
        for reply in replies
    ]


def pair_differences(one: Respondent, pairs: Sequence[ReplyPair]) -> list[float]:
    """log p per byte of the better reply less that of the worse: above 0 the better one is likelier."""
    found = logprobs(one.model, pair_rows(one, pairs))
    sizes = [len(reply.encode()) for _, *replies in pairs for reply in replies]
    rates = [values.sum() / size for values, size in zip(found, sizes, strict=True)]
    return [float(better - worse) for better, worse in zip(rates[::2], rates[1::2], strict=True)]


# ---- What was known before


def held_out_documents(sources: Iterable[Source], val_fraction: float, size: int) -> list[str]:
    """Documents that no training with this fraction has seen, `size` bytes of them, each source giving its
    share of the weights, the last one cut; all there are where that is less."""
    sources, documents = list(sources), []
    total = sum(source.weight for source in sources)
    for source in sources:
        left = ceil(size * source.weight / total)
        held_out = (
            text
            for side, text in split_documents(source.documents(), val_fraction, source.size)
            if side == "val"
        )
        for text in held_out:
            cut = text.encode()[:left].decode(errors="ignore")
            documents.append(cut)
            left -= len(cut.encode())
            if cut != text or not left:
                break
    return documents


def text_nats(one: Respondent, documents: Sequence[str]) -> tuple[list[float], list[int]]:
    """Of every document -log p in nats, its end included, and its size in bytes.

    A document longer than the context is scored in windows side by side.
    """
    bos, eos = document_marks(one.tokenizer)
    longest, rows, owners = one.model.config.max_position_embeddings, [], []
    for number, text in enumerate(documents):
        tokens = [bos, *one.tokenizer.encode(text), eos]
        for first in range(0, len(tokens) - 1, longest):
            rows.append((tokens[first : first + 1], tokens[first + 1 : first + 1 + longest]))
            owners.append(number)
    nats = [0.0] * len(documents)
    for number, values in zip(owners, logprobs(one.model, rows), strict=True):
        nats[number] -= float(values.sum())
    return nats, [len(text.encode()) for text in documents]


# ---- What moved


def same_vocabulary(one: Respondent, other: Respondent) -> bool:
    """Whether both mean the same by every token; their chat templates may differ."""
    sizes = one.model.config.vocab_size == other.model.config.vocab_size
    return sizes and one.tokenizer.vocabulary == other.tokenizer.vocabulary


def reply_rows(
    one: Respondent, prompts: Sequence[Sequence[Message]], replies: Sequence[Sequence[int]]
) -> list[Row]:
    return [(one.prompt(messages), said) for messages, said in zip(prompts, replies, strict=True)]


def reply_kl(
    later: Respondent,
    earlier: Respondent,
    prompts: Sequence[Sequence[Message]],
    replies: Sequence[Sequence[int]],
) -> PerToken:
    """KL(later ‖ earlier) in nats at each token of the later model's own replies."""
    return row_kl(
        later.model, reply_rows(later, prompts, replies), earlier.model, reply_rows(earlier, prompts, replies)
    )


# ---- How sure it is


def sureness(
    one: Respondent, prompts: Sequence[Sequence[Message]], replies: Sequence[Sequence[int]]
) -> Float64[np.ndarray, " N"]:
    """The geometric mean of the probabilities of each reply's tokens."""
    found = logprobs(one.model, reply_rows(one, prompts, replies))
    return np.exp([values.mean() for values in found])


def choices(world: World, prompts: Sequence[Prompt], seed: int) -> list[Choice]:
    """To each question of fact its right answer and others in the same words, with other values."""
    entities = {entity.name: entity for entity in world.entities}
    values: dict[str, set[str]] = {}
    for fact in world.facts:
        values.setdefault(fact.attribute, set()).add(fact.value)
    found: list[Choice] = []
    for prompt in prompts:
        wrong = sorted(values[prompt.topic] - {prompt.answer, prompt.entity})
        others = random.Random(f"{seed} {prompt.text}").sample(wrong, min(CANDIDATES - 1, len(wrong)))
        entity = entities[prompt.entity]
        said = [state(prompt.topic, entity, value, "answers")[0] for value in (prompt.answer, *others)]
        found.append((prompt.messages, said))
    return found


def choose(
    one: Respondent, questions: Sequence[Choice]
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """How sure the model is of the likeliest answer to each, among those given, and whether it is right."""
    rows = [
        (context, one.tokenizer.encode(answer))
        for messages, answers in questions
        for context in [one.prompt(messages)]
        for answer in answers
    ]
    totals = iter([float(values.sum()) for values in logprobs(one.model, rows)])
    own = [np.array([next(totals) for _ in answers]) for _, answers in questions]
    sure = [1 / np.exp(logs - logs.max()).sum() for logs in own]
    return np.array(sure, np.float64), np.array([logs.argmax() == 0 for logs in own], np.float64)
