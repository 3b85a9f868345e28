"""Tokens → packed rows → a weighted mixture → batches.

    text            TokenizedSource, on disk ────┐
    conversations   EncodedSource, in memory ────┴──► Mixture ──► Batch          (corpus.py makes both)

A row of text is `block_size` consecutive tokens of a stream, wherever documents begin and end in it: one that
the end of a row cuts continues in another row, which does not see its beginning. A row of conversations holds
whole ones side by side. `Batch.start` marks where each begins, and attention does not cross these bounds:
packing equals running every piece alone.

Which conversations share a row is found by best-fit decreasing (Johnson et al. 1974), as Ding et al. 2024
(arXiv 2404.10830) pack pretraining text. The masked objective is BERT's (Devlin et al. 2019,
arXiv 1810.04805, section 3.1). Left out: best-fit packing of text, conversations that do not fit in memory.
"""

import bisect
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt
from torch import Tensor

from minillm.errors import InputError
from minillm.tokenizer import Tokenizer

Item = TypeVar("Item")
Side = Literal["train", "val"]

IGNORED = -100
"""A target that counts for nothing, as in torch."""
BEGINNING_SHARE = 1 / 8  # of a source's rows: at least so many hold a document's beginning, or one made up
PARAGRAPH_TOKENS = 1024  # in which the beginning of a paragraph is looked for
LINE_END, BLANK_LINE = re.compile(rb"\n\s*\Z"), re.compile(rb"\n\s*\n\s*\Z")
STRETCH = 64  # rows whose conversations are packed together; each stretch leaves about one row half empty


class Batch(NamedTuple):
    """Rows of tokens and what comes next at each position, IGNORED where nothing does; of one row, the axis B
    is left out."""

    tokens: Int64[Tensor, "*B T"]
    targets: Int64[Tensor, "*B T"]
    start: Int32[Tensor, "*B T"]  # the position in the row where this position's document begins


# ---- Text: rows of a stream


@dataclass(frozen=True)
class TokenizedSource:
    """A source as two token streams mapped from disk.

    A stream is one long array: [bos] and the tokens of a document, then [eos] where that is another token.
    Where it is the same (in our own tokenizers), the one that opens a document also ends the one before it,
    and one more closes the stream: every token of text has a next token to predict.
    """

    name: str
    weight: float
    fingerprint: str
    """Of content, tokenizer and split: the name of the cache."""
    bos_id: int
    train: UInt[np.ndarray, " L"]
    val: UInt[np.ndarray, " M"]
    counts: Mapping[Side, Mapping[str, int]]
    """Of each side its tokens, bytes (of the text in UTF-8) and documents."""
    skipped: Mapping[str, int]
    """What reading left out or replaced, by reason."""
    vocabulary: Sequence[bytes] = field(repr=False)
    """The bytes of every token."""

    def epoch(self, block_size: int, random: np.random.Generator) -> Int64[np.ndarray, "R 2"]:
        """The rows of the training text: where each begins, and whether bos is put before it.

        They follow one another from a random place on, which leaves out fewer than 2T tokens at the ends, T
        being `block_size`; the last token of one is the first of the next. A sample begins with bos, so the
        model must have seen what follows it. Where fewer than BEGINNING_SHARE of the rows can hold the
        beginning of a document (a book, a play), others, chosen at random, are made to begin like one.
        """
        length, documents = len(self.train), self.counts["train"]["documents"]
        if length <= block_size:
            short = f"{length} training tokens, fewer than one row of {block_size} + 1"
            raise InputError(f"data source {self.name!r}: {short}; give more text or a smaller block size")
        phase = int(random.integers(min(block_size, length - block_size)))
        order = random.permutation((length - 1 - phase) // block_size)
        adds_bos = random.random(len(order)) < BEGINNING_SHARE - documents * block_size / length
        return np.stack([phase + order * block_size, adds_bos[order]], axis=1)

    def held_out(self, block_size: int, most: int) -> list[tuple[int, bool]]:
        """The rows of the held-out text from its first token on: all or `most` evenly spaced ones."""
        if len(self.val) < 2:
            what = f"data source {self.name!r}: no text for validation"
            raise InputError(f"{what}; give more text or a larger validation fraction")
        windows = -(-(len(self.val) - 1) // block_size)
        count = min(windows, most)
        return [(i * windows // count * block_size, False) for i in range(count)]

    def row(self, side: Side, block_size: int, which: Any) -> Batch:
        """One of these rows. bos put before a paragraph is an input only, never a target; behind the end of
        the stream are bos, of targets IGNORED."""
        tokens, (begin, adds_bos) = getattr(self, side), map(int, which)
        own = tokens[begin : begin + block_size + 1]
        ids = np.full(block_size + 1, self.bos_id)
        ids[: len(own)] = own
        if adds_bos and self.bos_id not in ids:
            begin = min(self._paragraph(begin), len(tokens) - block_size)
            ids[1:] = tokens[begin : begin + block_size]
            ids[0] = self.bos_id
        targets = ids[1:].copy()
        targets[len(own) - 1 :] = IGNORED
        begins = np.where(ids[:-1] == self.bos_id, np.arange(block_size, dtype=np.int32), 0)
        return Batch(*map(torch.from_numpy, (ids[:-1], targets, np.maximum.accumulate(begins))))

    def _paragraph(self, begin: int) -> int:
        """Where the next paragraph begins, from `begin` on, else the next line, else `begin`. A token begins
        a paragraph if the two before it end in a blank line (a line: in a line end) and it has no indent."""
        near = [self.vocabulary[i] for i in self.train[begin : begin + PARAGRAPH_TOKENS].tolist()]
        for ending in (BLANK_LINE, LINE_END):
            for i in range(2, len(near)):
                before, last, this = near[i - 2 : i + 1]
                if b"\n" in last and ending.search(before + last) and not this[:1].isspace():
                    return begin + i
        return begin


# ---- Conversations: rows of several


Encoded = tuple[np.ndarray, np.ndarray]
"""A conversation's tokens and its loss mask (chat.Dialogue). One of L tokens takes L - 1 positions of a row:
every token but the last goes in, and the next one is the target where the mask is true."""


class Skipped(Counter[str]):
    """What was left out, by reason."""

    first: str | None = None
    """A line about the first of it."""

    def add(self, reason: str, line: str) -> None:
        self[reason] += 1
        self.first = self.first or line


@dataclass(frozen=True)
class EncodedSource:
    """A source of conversations as tokens, none longer than a row; to a mixture the same as a
    TokenizedSource."""

    name: str
    weight: float
    fingerprint: str
    """Of the tokens, their split, and which are the assistant's."""
    train: list[Encoded]
    val: list[Encoded]
    skipped: Skipped
    """What reading and encoding left out."""

    def epoch(self, block_size: int, random: np.random.Generator) -> list[list[int]]:
        """The rows of the training conversations: every one once, each epoch with other neighbours."""
        sizes = positions(self.train)
        rows = best_fit(sizes, random.permutation(len(sizes)), block_size)
        return [rows[i] for i in random.permutation(len(rows)).tolist()]

    def held_out(self, block_size: int, most: int) -> list[list[int]]:
        """At most `most` rows of the held-out conversations."""
        return best_fit(positions(self.val), np.arange(len(self.val)), block_size)[:most]

    def row(self, side: Side, block_size: int, which: Any) -> Batch:
        """One of these rows. Its end is padding: token 0, no target, each a document."""
        tokens, targets = np.zeros(block_size, np.int64), np.full(block_size, IGNORED)
        start, begin = np.arange(block_size, dtype=np.int32), 0
        for ids, loss_mask in [getattr(self, side)[i] for i in which]:
            end = begin + len(ids) - 1
            tokens[begin:end], start[begin:end] = ids[:-1], begin
            targets[begin:end] = np.where(loss_mask[1:], ids[1:].astype(np.int64), IGNORED)
            begin = end
        return Batch(*map(torch.from_numpy, (tokens, targets, start)))


def positions(conversations: Sequence[Encoded]) -> Int64[np.ndarray, " M"]:
    """How many positions of a row each conversation takes."""
    return np.array([len(ids) - 1 for ids, _ in conversations], np.int64)


def best_fit(
    sizes: Int64[np.ndarray, " M"], order: Int64[np.ndarray, " M"], block_size: int
) -> list[list[int]]:
    """Which conversations each row holds. They are taken in this order in stretches of STRETCH rows;
    of each stretch the longest first, each put into the row that it fills best, or into a new one."""
    stretches = sizes[order].cumsum() // (STRETCH * block_size)
    packed: list[list[int]] = []
    for part in np.split(order, np.flatnonzero(np.diff(stretches)) + 1):
        rows: list[list[int]] = []
        spaces: list[tuple[int, int]] = []  # of every row what is free in it and its number, sorted
        for i in part[np.argsort(-sizes[part], kind="stable")].tolist():
            size = int(sizes[i])
            at = bisect.bisect_left(spaces, (size, 0))
            if at == len(spaces):
                spaces.append((block_size, len(rows)))
                rows.append([])
            space, row = spaces.pop(at)
            rows[row].append(i)
            bisect.insort(spaces, (space - size, row))
        packed += rows
    return packed


# ---- Shuffled rows of several sources


@dataclass
class Shuffled(Generic[Item]):
    """Items without end, every one once an epoch, in an order that follows from (seed, name, epoch).

    Its position is two numbers, the epoch and how many of its items were given: only they need saving.
    """

    name: str
    """What the items are."""
    seed: int
    fingerprint: str
    """Changes with the content of the items."""
    arrange: Callable[[np.random.Generator], Any]
    """The order of an epoch: a sequence of what to ask `take` for."""
    take: Callable[[Any], Item]

    @classmethod
    def of(cls, items: Sequence[Item], name: str, seed: int, fingerprint: str) -> "Shuffled[Item]":
        return cls(name, seed, fingerprint, lambda random: random.permutation(len(items)), items.__getitem__)

    def __post_init__(self) -> None:
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        """Go to the `position`-th item of an epoch."""
        self.epoch, self.position = epoch, position
        self.order = self.arrange(generator_of(self.seed, self.name, epoch))

    def next(self, count: int = 1) -> list[Item]:
        taken = []
        for _ in range(count):
            if self.position == len(self.order):
                self.seek(self.epoch + 1, 0)
            taken.append(self.take(self.order[self.position]))
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Its position, as JSON can hold it."""
        return {"fingerprint": self.fingerprint, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. InputError if the items have changed since."""
        check_same(f"content of {self.name!r}", state["fingerprint"], self.fingerprint)
        self.seek(state["epoch"], state["position"])


def generator_of(*key: int | str) -> np.random.Generator:
    """Randomness of its own for each key, such as an epoch of a source: (seed, name, epoch)."""
    numbers = [seed_of(part, size=8) if isinstance(part, str) else part for part in key]
    # PCG64 by name, for numpy's default may change; with the length, (s,) and (s, 0, 0) differ.
    return np.random.Generator(np.random.PCG64((len(numbers), *numbers)))


def seed_of(*parts: str | int, size: int = 7) -> int:
    """A number of `size` bytes that follows from the parts alone."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest())


RowSource = TokenizedSource | EncodedSource


class Mixture:
    """Rows drawn from several sources: each row's source by weight, its rows in shuffled order.

    All rows are equally long, so in expectation a source's share of the tokens is exactly its share of the
    weights. The rows follow from sources (each with a name of its own), weights, block size and seed alone:
    not from how many are asked for at a time, nor from being stopped and resumed.
    """

    def __init__(self, sources: Sequence[RowSource], block_size: int, seed: int) -> None:
        weights = np.array([source.weight for source in sources])
        self.sources, self.block_size, self.seed = list(sources), block_size, seed
        self.shares = weights / weights.sum()
        self.drawn = [0] * len(sources)
        self.streams: list[Shuffled[Batch]] = []
        for source in sources:
            how = partial(source.epoch, block_size), partial(source.row, "train", block_size)
            self.streams.append(Shuffled(source.name, seed, source.fingerprint, *how))
        self.choices = generator_of(seed)

    def next_rows(self, n: int) -> Batch:
        # The shares divide [0, 1): each row's number falls into the part of its source.
        bounds = self.shares.cumsum()[:-1]
        chosen = np.searchsorted(bounds, self.choices.random(n), side="right").tolist()
        rows = []
        for source in chosen:
            rows += self.streams[source].next()
            self.drawn[source] += 1
        return Batch(*map(torch.stack, zip(*rows, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The position of the mixture, in a few numbers that JSON can hold."""
        own = zip(self.drawn, self.streams, strict=True)
        sources = {stream.name: {"rows": drawn, **stream.state_dict()} for drawn, stream in own}
        return {"block_size": self.block_size, "seed": self.seed, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. InputError, naming what differs, for that of another mixture."""
        for what in ("block_size", "seed"):
            check_same(what, state[what], getattr(self, what))
        saved = state["sources"]
        check_same("data sources", ", ".join(saved), ", ".join(s.name for s in self.sources))
        for i, stream in enumerate(self.streams):
            stream.load_state_dict(saved[stream.name])
            self.drawn[i] = saved[stream.name]["rows"]
        self.choices = generator_of(self.seed)  # takes one step for each row drawn
        self.choices.bit_generator.advance(sum(self.drawn))  # type: ignore[attr-defined]


def check_same(what: str, was: Any, now: Any) -> None:
    if was != now:
        raise InputError(f"cannot resume: {what} was {was} and is now {now}; put back the old one")


def validation_batches(
    sources: Sequence[RowSource], block_size: int, max_tokens: int, batch_rows: int = 64
) -> list[Batch]:
    """The same rows each time, of every source up to its share of `max_tokens`, at least one if it has any;
    a batch holds up to `batch_rows` rows of one source."""
    total, batches = sum(source.weight for source in sources), []
    for source in sources:
        most = max(1, round(max_tokens * source.weight / total / block_size))
        rows = [source.row("val", block_size, which) for which in source.held_out(block_size, most)]
        for first in range(0, len(rows), batch_rows):
            parts = zip(*rows[first : first + batch_rows], strict=True)
            batches.append(Batch(*map(torch.stack, parts)))
    return batches


def mask_tokens(batch: Batch, tokenizer: Tokenizer, seed: int) -> Batch:
    """The batch with BERT's objective: to predict the tokens at 15% of the positions, chosen at random.

    Of the chosen positions 80% show the mask token, 10% a random ordinary token, 10% their own token; all
    others have target IGNORED. Special tokens are neither chosen nor put in. Where no position is chosen, the
    one whose random number came nearest is, so a batch with an ordinary token has a target.
    """
    tokens, generator = batch.tokens, torch.Generator().manual_seed(seed)
    if tokenizer.mask_id is None:
        raise InputError(
            "--objective masked: this tokenizer has no <|mask|> token; train one, without --init"
        )
    special = torch.tensor([*tokenizer.special_tokens.values(), tokenizer.mask_id])
    ids = torch.arange(tokenizer.vocab_size)
    ids = ids[~torch.isin(ids, special)]
    draw, kind = torch.rand((2, *tokens.shape), generator=generator)
    draw = draw.masked_fill(torch.isin(tokens, special), 1.0)
    chosen = (draw < 1) & (draw <= draw.min().clamp(min=0.15))
    pick = torch.randint(len(ids), tokens.shape, generator=generator)
    shown = torch.where(kind < 0.8, tokenizer.mask_id, torch.where(kind < 0.9, ids[pick], tokens))
    return batch._replace(
        tokens=torch.where(chosen, shown, tokens), targets=torch.where(chosen, tokens, IGNORED)
    )


# ---- Prompts with their responses, packed
#
# A sequence is a prompt and one response to it. A forward pass has P rows of T positions; a row holds whole
# sequences, so that hardly a position is padding. Reward model, critic and policies are run in this way:
#
#     sequences ──forward_passes──► tokens, start [P, T] ──model──► numbers [P, T]
#                        └──► begins [B] ──► index [N] of the responses' tokens ──► padded [B, R]
#
# An index counts the positions of all rows end to end; the B responses have N tokens, at most R each.


class ForwardPass(NamedTuple):
    """Rows of whole sequences side by side."""

    numbers: Int64[Tensor, " B"]  # which sequences they are, in the order in which they stand
    begins: Int64[Tensor, " B"]  # the index of each one's first token
    tokens: Int64[Tensor, "P T"]
    start: Int32[Tensor, "P T"]  # where the sequence of each position begins in its row


def forward_passes(
    numbers: Sequence[int], sequences: Sequence[Sequence[int]], micro_tokens: int
) -> list[ForwardPass]:
    """The sequences of these numbers, packed. Rows are as long as the longest; a pass has at most
    `micro_tokens` positions, or one row. Each position of padding is a sequence of its own."""
    sizes, passes = np.array([len(sequences[i]) for i in numbers], np.int64), list[ForwardPass]()
    longest = int(sizes.max(initial=1))
    rows, count = best_fit(sizes, np.arange(len(sizes)), longest), max(1, micro_tokens // longest)
    for own in (rows[first : first + count] for first in range(0, len(rows), count)):
        width = max(int(sizes[row].sum()) for row in own)
        tokens = torch.zeros(len(own), width, dtype=torch.int64)
        start = torch.arange(width, dtype=torch.int32).repeat(len(own), 1)
        there, begins = list[int](), list[int]()
        for r, row in enumerate(own):
            t = 0
            for number in (numbers[i] for i in row):
                end = t + len(sequences[number])
                tokens[r, t:end], start[r, t:end] = torch.tensor(sequences[number]), t
                there.append(number)
                begins.append(r * width + t)
                t = end
        passes.append(ForwardPass(torch.tensor(there), torch.tensor(begins), tokens, start))
    return passes


def pad(per_token: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Numbers of the tokens [N] as rows [B, R], 0 where a response has no token."""
    # Not padded[mask] = per_token: a device would be waited for, to learn how many places that are.
    index = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)
    return torch.where(mask, per_token[index], 0)
