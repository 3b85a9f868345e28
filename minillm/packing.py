"""Conversations packed whole into rows, for the batches that pretraining uses too.

    conversations.py: messages ──► encode_source ──► EncodedSource ──► data.Mixture ──► Batch
                                                          └──► packed_batches, for validation

A conversation of L tokens takes L - 1 positions of a row: every token but the last goes in, and the one
behind it is the target where it is the assistant's. A row holds whole conversations side by side, none
attending to another (`Batch.start`), so that packing equals running each alone. The end of a row is
padding: token 0, no target, every position a document of its own.

Which conversations share a row is found by best-fit decreasing (Johnson et al. 1974), as Ding et al. 2024
(arXiv 2404.10830) pack pretraining text, here within stretches of a shuffled epoch. Left out: streaming.
All tokens of a source are in memory, 3 bytes each (5 with ids beyond 65,535): a hundred million of them
take 0.3 GB.
"""

import bisect
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64, UInt
from tqdm import tqdm

from minillm.chat import Conversation
from minillm.data import IGNORED, Batch, Row, epoch_generator, stack
from minillm.errors import InputError
from minillm.io.conversations import ConversationSource, split_conversations
from minillm.streams import SIDES, token_dtype

STRETCH = 64  # rows whose conversations are packed together; each stretch leaves about one row half empty


@runtime_checkable
class Encoded(Protocol):
    """A conversation as tokens, and for each whether it is the assistant's to produce."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def assistant(self) -> list[bool]: ...


Encode = Callable[[Conversation], Encoded]
"""How messages become tokens. It raises InputError for messages that it refuses."""


# ---- Conversations -> flat arrays


@dataclass(frozen=True)
class EncodedConversations:
    """Conversations end to end: the i-th is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: UInt[np.ndarray, " L"]
    assistant: Bool[np.ndarray, " L"]
    offsets: Int64[np.ndarray, " M_plus_1"]

    @property
    def sizes(self) -> Int64[np.ndarray, " M"]:
        """The positions that each conversation takes in a row."""
        return np.diff(self.offsets) - 1

    def row(self, chosen: Sequence[int], block_size: int) -> Row:
        """These conversations side by side; together they fit."""
        tokens, targets = np.zeros(block_size, np.int64), np.full(block_size, IGNORED)
        opens = np.ones(block_size, bool)
        begin = 0
        for i in chosen:
            own = slice(self.offsets[i], self.offsets[i + 1])
            ids, assistant = self.tokens[own].astype(np.int64), self.assistant[own]
            end = begin + len(ids) - 1
            tokens[begin:end] = ids[:-1]
            targets[begin:end] = np.where(assistant[1:], ids[1:], IGNORED)
            opens[begin + 1 : end] = False
            begin = end
        return Row(tokens, targets, opens)


@dataclass(frozen=True)
class EncodedSource:
    """A source of conversations as tokens; to a mixture the same as a `data.TokenizedSource`."""

    name: str
    weight: float
    fingerprint: str  # of the tokens, their split, and which are the assistant's
    train: EncodedConversations
    val: EncodedConversations
    skipped: dict[str, int]  # what reading and encoding left out, by reason
    first_skipped: str | None  # a line about the first of it

    def rows(self, block_size: int, seed: int) -> "PackedRows":
        """The rows of the training conversations, which are no longer than `block_size`."""
        return PackedRows(self, block_size, seed)


def encode_source(
    source: ConversationSource, encode: Encode, block_size: int, val_fraction: float = 0.05
) -> EncodedSource:
    """The conversations of `source` as tokens, none longer than a row of `block_size`.

    A longer one is cut behind the last reply with which it fits. Where none does, where `encode`
    refuses it, or where no token of it is the assistant's, it is left out; all is counted. Raises
    InputError where nothing is left to train on, or, with a `val_fraction`, to validate on.
    """
    skipped, first = Counter(source.skipped), source.first_skipped
    writers = {side: _Writer() for side in SIDES}
    parts = split_conversations(source, val_fraction)
    bar = tqdm(parts, f"encode {source.name}", delay=1, leave=False, dynamic_ncols=True)
    for number, (side, conversation) in enumerate(bar, start=1):
        try:
            encoded, reason = _fitted(conversation, encode, block_size + 1)
        except InputError as error:
            encoded, reason = None, "conversations that the chat template refuses"
            first = first or f"conversation {number} of {source.name!r}: {error}"
        if rewritten := getattr(encoded, "unlearned", 0):
            skipped["replies not learned: the chat template writes them anew later"] += rewritten
        if reason:
            skipped[reason] += 1
            first = first or f"conversation {number} of {source.name!r} is among the {reason}"
        if encoded is not None:
            writers[side].add(encoded)
    train, val = (writers[side].finish() for side in SIDES)
    for purpose, part in (("train", train), ("validate", val if val_fraction else train)):
        if not len(part.sizes):
            raise InputError(
                f"data source {source.name!r}: no conversation to {purpose} on ({first or 'too few'}); "
                "give more, a larger block size or another validation fraction"
            )
    return EncodedSource(
        source.name, source.weight, _fingerprint(train, val), train, val, dict(skipped), first
    )


def _fitted(conversation: Conversation, encode: Encode, limit: int) -> tuple[Encoded | None, str | None]:
    """The conversation in at most `limit` tokens, or None, and the reason if some of it is left out."""
    encoded, reason = encode(conversation), None
    if len(encoded.tokens) > limit:
        ends = [i for i, message in enumerate(conversation, start=1) if message["role"] == "assistant"]
        fitting = bisect.bisect_right(ends, limit, key=lambda end: len(encode(conversation[:end]).tokens))
        if not fitting:
            return None, "conversations longer than a row"
        encoded = encode(conversation[: ends[fitting - 1]])
        reason = "ends of conversations longer than a row"
    if not any(encoded.assistant[1:]):
        return None, "conversations without a token of the assistant's"
    return encoded, reason


class _Writer:
    """Appends conversations to flat arrays."""

    def __init__(self) -> None:
        self.tokens, self.assistant, self.offsets = array("I"), bytearray(), array("q", [0])

    def add(self, encoded: Encoded) -> None:
        self.tokens.extend(encoded.tokens)
        self.assistant.extend(encoded.assistant)
        self.offsets.append(len(self.tokens))
        if len(self.assistant) != len(self.tokens):
            raise ValueError("an encoder must say of every token whether it is the assistant's")

    def finish(self) -> EncodedConversations:
        tokens, assistant = np.array(self.tokens, np.uint32), np.array(self.assistant, bool)
        tokens = tokens.astype(token_dtype(int(tokens.max(initial=0)) + 1))
        return EncodedConversations(tokens, assistant, np.array(self.offsets, np.int64))


def _fingerprint(*parts: EncodedConversations) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        for values in (part.offsets, part.tokens.astype(np.uint32), part.assistant):
            digest.update(values.tobytes())
    return digest.hexdigest()


# ---- Conversations -> rows


class PackedRows:
    """The rows of a source, a `data.RowStream`: every conversation once an epoch.

    Each epoch packs the conversations in another order, and so with other neighbours, and gives the
    rows in another order. Both follow from (seed, name, epoch).
    """

    def __init__(self, source: EncodedSource, block_size: int, seed: int):
        if source.train.sizes.max() > block_size:
            raise ValueError(f"{source.name!r} holds conversations encoded for longer rows than {block_size}")
        self.source, self.block_size, self.seed = source, block_size, seed
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        random = epoch_generator(self.seed, self.source.name, epoch)
        sizes = self.source.train.sizes
        rows = pack(sizes, random.permutation(len(sizes)), self.block_size)
        self.length = len(rows)
        self.order = [rows[i] for i in random.permutation(self.length).tolist()]

    def next(self) -> Row:
        if self.position == self.length:
            self.seek(self.epoch + 1, 0)
        row = self.source.train.row(self.order[self.position], self.block_size)
        self.position += 1
        return row

    @property
    def fill(self) -> float:
        """The share of this epoch's positions that are not padding."""
        return float(self.source.train.sizes.sum()) / (self.length * self.block_size)


def packed_batches(
    conversations: EncodedConversations, block_size: int, batch_rows: int = 64
) -> Iterator[Batch]:
    """Every conversation once, in the same batches of up to `batch_rows` rows each time."""
    sizes = conversations.sizes
    rows = pack(sizes, np.arange(len(sizes)), block_size)
    for i in range(0, len(rows), batch_rows):
        yield stack([conversations.row(row, block_size) for row in rows[i : i + batch_rows]], block_size)


def pack(sizes: Int64[np.ndarray, " M"], order: Int64[np.ndarray, " M"], block_size: int) -> list[list[int]]:
    """What each row holds: conversations of these sizes, taken in this order, a stretch at a time."""
    stretches = sizes[order].cumsum() // (STRETCH * block_size)
    bounds = np.flatnonzero(np.diff(stretches)) + 1
    return [row for part in np.split(order, bounds) for row in _best_fit(sizes, part, block_size)]


def _best_fit(
    sizes: Int64[np.ndarray, " M"], part: Int64[np.ndarray, " P"], block_size: int
) -> list[list[int]]:
    """The longest first, each to the row that it fills best, or to a new one."""
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
    return rows
