"""The reward model: what it learns from rankings, and how it scores.

    Rankings ──► EncodedSet ──► RankedBatch ──► ScalarModel ──► scores [B] ──► ranking_loss

A response's score is the scalar at its last token, the end token, in the row [messages + response + end]; a
response that was cut has no end token in its row. The scalar is read above the assistant's trunk and a new
block: which token the assistant expected is known only above its last block, and only there can it be
compared with the one that came.

A set of K responses is one element of a batch. All pairs of all its rankings share the forward pass of the K
responses, and together weigh as much as any other set's: each 1/C(K, 2) over the number of rankings. So more
annotators a set cost no more passes and reduce label noise.

In training, half of the loss is of the mean of the values over each response: so the gradient reaches every
token directly and not only through the last, and a small model learns in fewer steps to compare an answer
with its question. The values of unfinished responses are what a critic begins with.

Left out: ties in the loss (InstructGPT drops them; Rao & Kupper 1967 would model them), and margins.
Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5, equation 1; Bradley & Terry 1952;
the shift by which demonstrations score 0: InstructGPT, ibid., and Stiennon et al. 2020 (arXiv 2009.01325),
section 3.4.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from minillm.chat import ChatTemplate
from minillm.corpus import split_by_hash, unit_hash
from minillm.data import Shuffled, pad
from minillm.digest import digest
from minillm.errors import InputError
from minillm.model import ScalarModel, score_rows
from minillm.optim import accumulate
from minillm.preferences import Ranking
from minillm.run import Runtime

# ---- Rankings -> rows


@dataclass(frozen=True)
class EncodedSet:
    """A set of responses as rows of tokens, and all rankings of it."""

    rankings: list[Ranking]
    rows: list[list[int]]
    start: int = 1
    """The position at which the responses begin, after the prompt that they share."""

    @property
    def size(self) -> int:
        """Positions in a forward pass, where all share the prompt but for its last token: that predicts the
        response's first, so each response has one of its own."""
        return self.start - 1 + sum(len(row) - self.start + 1 for row in self.rows)


def encode_response(
    template: ChatTemplate, messages: Sequence[Any], response: str, ended: bool = True
) -> list[int]:
    """The row of a response: messages, response and, if it ended, its end token; nothing after that."""
    dialogue = template.encode([*messages, {"role": "assistant", "content": response}])
    last = max(i for i, learned in enumerate(dialogue.loss_mask) if learned)
    return dialogue.tokens[: last + ended]


def encode_rankings(
    rankings: Iterable[Ranking], template: ChatTemplate, longest: int
) -> tuple[list[EncodedSet], Counter[str]]:
    """The sets that were ranked as rows of at most `longest` tokens, in the order of their first rankings;
    how many rankings are left out, by reason. The same responses in another order are another set."""
    sets = defaultdict[str, list[Ranking]](list)
    for ranking in rankings:
        sets[json.dumps([ranking.messages, ranking.responses])].append(ranking)
    encoded, skipped = [], Counter[str]()
    for ranked in sets.values():
        messages, cut = ranked[0].messages, ranked[0].cut
        try:
            # A blank response, which a template may trim, keeps its end even if cut: it is scored at one.
            rows = [encode_response(template, messages, text, ended=k not in cut or not text.strip())
                    for k, text in enumerate(ranked[0].responses)]  # fmt: skip
            columns = zip(template.prompt(messages), *rows, strict=False)  # to the end of the shortest
        except InputError:
            skipped["rankings that the chat template refuses"] += len(ranked)
            continue
        start = sum(takewhile(bool, (len(set(tokens)) == 1 for tokens in columns)))  # equal from the front
        if max(map(len, rows)) > longest:
            skipped[f"rankings with a response behind the model's {longest} positions"] += len(ranked)
        else:
            encoded.append(EncodedSet(ranked, rows, max(1, start)))
    return encoded, skipped


def prompt_key(ranking: Ranking) -> str:
    """The same for every ranking of one prompt, whoever made it."""
    return json.dumps(ranking.messages, sort_keys=True)


def split_by_prompt(
    encoded: Sequence[EncodedSet], val_fraction: float
) -> tuple[list[EncodedSet], list[EncodedSet]]:
    """The sets to train on and those held out, of about a share `val_fraction` of the prompts. InputError
    where there is only one prompt."""
    hashes = [unit_hash(prompt_key(one.rankings[0])) for one in encoded]
    training, held_out = split_by_hash(encoded, hashes, val_fraction)
    if not held_out:
        raise InputError("the rankings are of one prompt or none: give some of at least two prompts")
    return training, held_out


def ranking_stream(encoded: Sequence[EncodedSet], seed: int) -> Shuffled[EncodedSet]:
    """The sets as an endless shuffled stream."""
    content = (json.dumps([one.rows, [ranking.ranking for ranking in one.rankings]]) for one in encoded)
    return Shuffled.of(encoded, "rankings", seed, digest(*content))


# ---- Scores -> loss


def ranking_loss(
    scores: Float[Tensor, "*views B"],
    better: Int64[Tensor, " M"],
    worse: Int64[Tensor, " M"],
    weight: Float[Tensor, " M"],
) -> Float[Tensor, ""]:
    """Σ weight · -log σ(score of the better - score of the worse), over pairs of rows of a batch; the mean of
    that where each row has several scores.

    P(better ≻ worse) = σ(s_b - s_w) is Bradley & Terry's model. The derivative with respect to s_b is
    -weight · σ(s_w - s_b): nearly 0 once the order is clear. No pairs, no loss.
    """
    return -(weight * F.logsigmoid(scores[..., better] - scores[..., worse])).sum(-1).mean()


@dataclass(frozen=True)
class RankedBatch:
    """The prompts of some sets with their responses, and the pairs of responses that are not tied."""

    tokens: Int64[Tensor, "1 T"]
    shared: Any
    """A prompt is there once among the tokens, and attended to by each of its responses (SharedPrompts)."""
    mask: Bool[Tensor, "B R"]
    """True where response b has a token r."""
    index: Int64[Tensor, " N"]
    """Which of the tokens those of the responses are, response by response."""
    better: Int64[Tensor, " M"]
    worse: Int64[Tensor, " M"]
    weight: Float[Tensor, " M"]
    """1/C(K, 2) over the number of rankings of the set, K being its responses, tied ones included."""


def collate(encoded: Sequence[EncodedSet], device: torch.device) -> RankedBatch:
    """Some sets as one batch: response b is the b-th of all."""
    from minillm.fast.shared_prompts import pack_sets

    tokens, shared, begins = pack_sets([one.rows for one in encoded], [one.start - 1 for one in encoded])
    bounds: list[tuple[int, int]] = []  # of each response in its row: begin and end (exclusive)
    pairs: list[tuple[int, int, float]] = []
    for one in encoded:
        first = len(bounds)
        for ranking in one.rankings:
            weight, texts = 1 / (comb(len(one.rows), 2) * len(one.rankings)), ranking.responses
            for high, low in ranking.pairs():
                if texts[high] != texts[low]:  # no score can order equal ones
                    pairs.append((first + high, first + low, weight))
        bounds += [(one.start, len(row)) for row in one.rows]
    starts, ends = (begins[:, None] + torch.tensor(bounds)).unbind(1)
    better, worse, weights = torch.tensor(pairs, dtype=torch.float64).view(-1, 3).unbind(1)  # indices too
    offsets = torch.arange(int((ends - starts).max()))
    mask = offsets < (ends - starts)[:, None]
    index = (starts[:, None] + offsets)[mask]
    batch: list[Any] = [tokens, shared, mask, index, better.long(), worse.long(), weights.float()]
    return RankedBatch(*(part.to(device) for part in batch))


def micro_batches(
    encoded: Sequence[EncodedSet], micro_tokens: int, runtime: Runtime
) -> list[list[EncodedSet]]:
    """This process's sets, dealt in turn, in groups of at most `micro_tokens` positions, or of one: its
    responses stay together."""
    groups: list[list[EncodedSet]] = []
    for one in encoded[runtime.rank :: runtime.world_size]:
        if not groups or sum(other.size for other in groups[-1]) + one.size > micro_tokens:
            groups.append([])
        groups[-1].append(one)
    return runtime.even(groups, [replace(encoded[0], rankings=[])])  # no pairs, no loss


Scores = Callable[[RankedBatch], Tensor]
"""What gives every response of a batch its score [B], or in training several [*views, B]."""


def scores_of(forward: Callable[..., Tensor], means: bool = False) -> Scores:
    """A reward model's scores; with `means`, for training, also the means of its values over the responses:
    [2, B]. `forward` is the model, or what the runtime wrapped it in."""

    def scores(batch: RankedBatch) -> Tensor:
        values = forward(batch.tokens, attend=batch.shared).flatten()[batch.index]
        sizes = batch.mask.sum(1)
        last = values[sizes.cumsum(0) - 1]
        return torch.stack((last, pad(values, batch.mask).sum(1) / sizes)) if means else last

    return scores


def ranking_backward(
    forward: Callable[..., Tensor],
    scores: Scores,
    step: Sequence[EncodedSet],
    micro_tokens: int,
    runtime: Runtime,
) -> Float[Tensor, ""]:
    """Adds the gradient of a step's mean loss per set to .grad; returns that mean, in nats.

    `scores` calls `forward`. Sorted by size, the sets are dealt to the processes in turn, for equal work.
    """

    def summed_loss(micro: Sequence[EncodedSet]) -> Tensor:
        batch = collate(micro, runtime.device)
        return ranking_loss(scores(batch), batch.better, batch.worse, batch.weight)

    micros = micro_batches(sorted(step, key=lambda one: one.size), micro_tokens, runtime)
    return accumulate(forward, summed_loss, micros, len(step), runtime)


@torch.no_grad()
def held_out_rankings(
    scores: Scores, encoded: Sequence[EncodedSet], micro_tokens: int, runtime: Runtime
) -> dict[str, float]:
    """How well scores agree with all rankings of these sets, shared out among the processes: the loss, nats a
    set as in training, and the accuracy, the share of untied pairs in order; equal scores count half."""
    totals = torch.zeros(3, dtype=torch.float64)
    for micro in micro_batches(encoded, micro_tokens, runtime):
        batch = collate(micro, runtime.device)
        s = scores(batch)
        totals[0] += ranking_loss(s, batch.better, batch.worse, batch.weight).item()
        totals[1] += (1 + (s[batch.better] - s[batch.worse]).sign()).sum().item() / 2
        totals[2] += len(batch.better)
    nats, right, pairs = runtime.total(totals).tolist()
    return {"loss": nats / max(1, len(encoded)), "accuracy": right / max(1, pairs)}


def center(model: ScalarModel, demonstrations: Sequence[Sequence[int]]) -> None:
    """Sets the bias so that these rows score 0 on average."""
    model.bias.zero_()
    scores = score_rows(model, demonstrations)
    model.bias.fill_(-sum(scores) / len(scores))
