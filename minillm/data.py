"""Documents and conversations → tokens → packed rows → a weighted mixture → batches.

    text:           Source ──tokenize──► TokenizedSource, on disk ──┐
    conversations:  messages ──encode_source──► EncodedSource ──────┴──► Mixture ──► Batch

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
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt
from torch import Tensor
from tqdm import tqdm

from minillm.chat import Conversation, Dialogue
from minillm.digest import digest
from minillm.errors import InputError
from minillm.tokenizer import ENDOFTEXT, Tokenizer

Item = TypeVar("Item")
Side = Literal["train", "val"]
SIDES: tuple[Side, Side] = ("train", "val")
Tokens = UInt[np.ndarray, " L"]

IGNORED = -100
"""A target that counts for nothing, as in torch."""
FEW_DOCUMENTS = 20  # below this, validation takes the tail of every document, not whole documents
LARGE_DOCUMENT = 1 / 16  # of the text to hold out: a larger one is cut, as it would be all of it or none
BEGINNING_SHARE = 1 / 8  # of a source's rows: at least so many hold a document's beginning, or one made up
SAMPLE_PART = 16_384  # characters that a tokenizer's training text takes from one place
PARAGRAPH_TOKENS = 1024  # in which the beginning of a paragraph is looked for
STRETCH = 64  # rows whose conversations are packed together; each stretch leaves about one row half empty
FORMAT_VERSION = 2  # of the tokens on disk and the split: part of every cache's name


# ---- What is trained on and what is held out


@dataclass(frozen=True)
class Source:
    """A named stream of documents with a weight in the mixture; `documents()` starts a new pass over it."""

    name: str
    weight: float
    documents: Callable[[], Iterator[str]]
    fingerprint: str
    """Changes with the documents."""
    size: int | None = None
    """About how many bytes they have; None where the order is random: the first ones are a fair sample."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files that were left out, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What the latest pass over the documents left out or replaced, by reason."""


def seed_of(*parts: str | int, size: int = 7) -> int:
    """A number of `size` bytes that follows from the parts alone."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest())


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone; every split into train and val is by it."""
    return seed_of(text, size=6) / 2**48  # exact: 48 bits fit a float


def split_documents(
    documents: Iterable[str], val_fraction: float, size: int | None = None
) -> Iterator[tuple[Side, str]]:
    """Give every document to train or validation, about `val_fraction` of the text to validation.

    A document is validation if its hash is below `val_fraction`, so that copies of it land on one side, or
    the smallest of the first 20's, so that there is some. A document that is much of the whole text, of
    `size` bytes, is cut instead: the last `val_fraction` of its bytes, from the beginning of a character, is
    validation. So is every document where there are fewer than 20.
    """
    stream = iter(documents)
    first = list(itertools.islice(stream, FEW_DOCUMENTS))
    few, smallest = len(first) < FEW_DOCUMENTS, min(map(unit_hash, first), default=0.0)
    stream = itertools.chain(first, stream)
    del first  # as the stream goes on, nothing holds these any more
    for text in stream:
        raw = text.encode()
        if few or (size and len(raw) > LARGE_DOCUMENT * val_fraction * size):
            train = raw[: int(len(raw) * (1 - val_fraction))].decode(errors="ignore")
            parts: dict[Side, str] = {"train": train, "val": text[len(train) :]}
            yield from ((side, part) for side, part in parts.items() if part)
        else:
            value = unit_hash(text)
            held_out = value < val_fraction or (value == smallest and val_fraction > 0)
            yield SIDES[held_out], text


def hold_out(hashes: Sequence[float], fraction: float) -> list[Side]:
    """The side of each item by its hash: about a share `fraction` is held out, equal ones together, always
    the smallest hash and never the largest, so that no side is empty where there are two."""
    smallest, largest = min(hashes, default=0.0), max(hashes, default=0.0)
    return [
        SIDES[fraction > 0 and (value < fraction or value == smallest) and value < largest]
        for value in hashes
    ]


def split_by_hash(
    items: Sequence[Item], key: Callable[[Item], str], fraction: float
) -> tuple[list[Item], list[Item]]:
    """The items to train on and those held out, see `hold_out`."""
    sides = hold_out([unit_hash(key(item)) for item in items], fraction)
    train, val = ([item for own, item in zip(sides, items, strict=True) if own == side] for side in SIDES)
    return train, val


def split_conversations(source: Any, val_fraction: float) -> Iterator[tuple[Side, Conversation]]:
    """Every conversation of `source` (io/conversations.py) and its side, by its first user message: two
    answers to one question never land on two sides. Where all first messages are equal, by all messages."""
    for key in (_first_question, json.dumps):
        hashes = [unit_hash(key(conversation)) for conversation in source.conversations()]
        if len(set(hashes)) > 1:
            break
    yield from zip(hold_out(hashes, val_fraction), source.conversations(), strict=True)


def _first_question(conversation: Conversation) -> str:
    return next((message["content"] for message in conversation if message["role"] == "user"), "")


def text_sample(sources: Sequence[Source], val_fraction: float, characters: int = 4_000_000) -> Iterator[str]:
    """Training text for a tokenizer: from every source its share of the characters, taken evenly from all of
    it where its size is known, else from its beginning."""
    total = sum(source.weight for source in sources)
    for source in sources:
        wanted, read, taken = characters * source.weight / total, 0, 0
        rate = wanted / source.size if source.size else 1.0  # of what is read, how much is taken
        for side, text in split_documents(source.documents(), val_fraction, source.size):
            if taken >= wanted:
                break
            length = SAMPLE_PART if rate < 1 else len(text)
            for begin in range(0, len(text), length) if side == "train" else ():
                part = text[begin : begin + length]
                read += len(part)
                if taken < rate * read:
                    yield part
                    taken += len(part)


# ---- Documents → tokens on disk


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

    def rows(self, block_size: int, seed: int) -> "TextRows":
        """The rows of the training text. Raises InputError where it is shorter than one row."""
        if len(self.train) <= block_size:
            short = f"{len(self.train)} training tokens, fewer than one row of {block_size} + 1"
            raise InputError(f"data source {self.name!r}: {short}; give more text or a smaller block size")
        return TextRows(self, block_size, seed)

    def val_rows(self, block_size: int, most: int) -> "list[Batch]":
        """The held-out text, cut into rows from its first token on: all of them or `most` evenly spaced ones,
        the same each time. The last row is padded with bos, of targets IGNORED."""
        if len(self.val) < 2:
            what = f"data source {self.name!r}: no text for validation"
            raise InputError(f"{what}; give more text or a larger validation fraction")
        windows, rows = -(-(len(self.val) - 1) // block_size), []
        count = min(windows, most)
        for begin in np.arange(count) * windows // count * block_size:
            ids = self.val[begin : begin + block_size + 1].astype(np.int64)
            tokens, targets = np.full(block_size, self.bos_id), np.full(block_size, IGNORED)
            tokens[: len(ids)], targets[: len(ids) - 1] = ids[:block_size], ids[1:]
            begins = np.where(tokens == self.bos_id, np.arange(block_size, dtype=np.int32), 0)
            row = tokens, targets, np.maximum.accumulate(begins)  # as Batch names them
            rows.append(Batch(*map(torch.from_numpy, row)))
        return rows


def tokenize(
    source: Source, tokenizer: Tokenizer, folder: Path, val_fraction: float = 0.1, workers: int = 1
) -> TokenizedSource:
    """The token streams of `source`: from the cache in `folder`, or written there now by `workers` processes.
    The name of a cache is a digest of content, tokenizer and `val_fraction`."""
    from minillm.fast.cache import cached_streams

    bos, eos = document_marks(tokenizer)
    version, fingerprint = (FORMAT_VERSION, bos, eos), tokenizer.fingerprint
    key = digest(version, source.fingerprint, source.size, fingerprint, val_fraction)
    parts = _marked_documents(source, tokenizer, val_fraction, workers)
    streams, counts, dropped = cached_streams(folder / key, tokenizer.vocab_size, parts, source.dropped)
    return TokenizedSource(
        source.name, source.weight, key, bos, streams["train"], streams["val"], counts,
        dict(source.skipped + Counter(dropped)), tokenizer.vocabulary.tokens,
    )  # fmt: skip


def document_marks(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens (bos, eos) around a document; one the tokenizer lacks is replaced by the other. Without a
    bos, eos may be the end of a chat's reply (Qwen's): then <|endoftext|> is both, if there is one."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if tokenizer.config.get("bos_token") is None:
        bos = eos = tokenizer.special_tokens.get(ENDOFTEXT, eos)
    if bos is None:
        raise InputError("the tokenizer has no bos or eos token to mark documents with: add one")
    return bos, bos if eos is None else eos


def _marked_documents(
    source: Source, tokenizer: Tokenizer, val_fraction: float, workers: int
) -> Iterator[tuple[Side, Tokens, int]]:
    """Every document as its side, its tokens and its number of bytes, then the token that closes each stream;
    a progress bar where it takes longer than a second."""
    bos, eos = document_marks(tokenizer)
    opening, closing = np.array([bos], np.uint32), np.array([eos] if eos != bos else [], np.uint32)
    title, sides, sizes = f"tokenize {source.name}", set(), deque[tuple[Side, int]]()

    def texts() -> Iterator[str]:
        for side, text in split_documents(source.documents(), val_fraction, source.size):
            sizes.append((side, len(text.encode())))
            yield text

    with tqdm(
        desc=title, total=source.size, unit="B", unit_scale=True, delay=1, leave=False, dynamic_ncols=True
    ) as bar:
        for ids in tokenizer.encode_documents(texts(), workers):  # some texts ahead, where workers do it
            side, size = sizes.popleft()
            yield side, np.concatenate([opening, ids, closing]), size
            bar.update(size)
            sides.add(side)
    yield from ((side, opening, 0) for side in sides if bos == eos)


# ---- Conversations → tokens in memory


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
    """A source of conversations as tokens; to a mixture the same as a TokenizedSource."""

    name: str
    weight: float
    fingerprint: str
    """Of the tokens, their split, and which are the assistant's."""
    train: list[Encoded]
    val: list[Encoded]
    skipped: Skipped
    """What reading and encoding left out."""

    def rows(self, block_size: int, seed: int) -> "PackedRows":
        """The rows of the training conversations, which are no longer than `block_size`."""
        return PackedRows(self, block_size, seed)

    def val_rows(self, block_size: int, most: int) -> "list[Batch]":
        """At most `most` rows of the held-out conversations, the same each time."""
        packed = best_fit(positions(self.val), np.arange(len(self.val)), block_size)[:most]
        return [pack_conversations([self.val[i] for i in chosen], block_size) for chosen in packed]


def encode_source(
    source: Any, encode: Callable[[Conversation], Dialogue], block_size: int, val_fraction: float = 0.05
) -> EncodedSource:
    """The conversations of `source` (io/conversations.py) as tokens, none longer than a row.

    A longer one is cut after the last reply with which it fits. Where none does, where `encode` raises
    InputError, or where no token of it is the assistant's, it is left out; all is counted. InputError where
    nothing is left to train on; there may be nothing to validate on.
    """
    skipped, kept = Skipped(), {side: list[Encoded]() for side in SIDES}
    parts = split_conversations(source, val_fraction)
    bar = tqdm(parts, f"encode {source.name}", delay=1, leave=False, dynamic_ncols=True)
    for number, (side, conversation) in enumerate(bar, start=1):
        place = f"conversation {number} of {source.name!r}"
        try:
            dialogue, reason = _fitted(conversation, encode, block_size + 1)
        except InputError as error:
            skipped.add("conversations that the chat template refuses", f"{place}: {error}")
            continue
        if dialogue:
            ids = np.array(dialogue.tokens, np.uint32)
            small = ids.astype(np.uint16) if ids.max() < 2**16 else ids
            kept[side].append((small, np.array(dialogue.loss_mask)))
            if dialogue.unlearned:
                skipped["replies not learned: the chat template writes them anew later"] += dialogue.unlearned
        if reason:
            skipped.add(reason, f"{place} is among the {reason}")
    skipped.update(source.skipped)
    skipped.first = source.skipped.first or skipped.first
    train, val = kept["train"], kept["val"]
    if not train:
        what = f"data source {source.name!r}: no conversation to train on ({skipped.first or 'too few'})"
        raise InputError(f"{what}; give more, a larger block size or another validation fraction")
    fingerprint = digest(len(train), *(numbers for dialogue in train + val for numbers in dialogue))
    return EncodedSource(source.name, source.weight, fingerprint, train, val, skipped)


def _fitted(
    conversation: Conversation, encode: Callable[[Conversation], Dialogue], limit: int
) -> tuple[Dialogue | None, str | None]:
    """The conversation in at most `limit` tokens, or None, and the reason if some of it is left out."""
    dialogue, reason = encode(conversation), None
    if len(dialogue.tokens) > limit:
        ends = [i for i, message in enumerate(conversation, start=1) if message["role"] == "assistant"]
        fitting = bisect.bisect_right(ends, limit, key=lambda end: len(encode(conversation[:end]).tokens))
        if not fitting:
            return None, "conversations longer than a row"
        dialogue = encode(conversation[: ends[fitting - 1]])
        reason = "ends of conversations longer than a row"
    if not any(dialogue.loss_mask[1:]):
        return None, "conversations without a token of the assistant's"
    return dialogue, reason


def positions(conversations: Sequence[Encoded]) -> Int64[np.ndarray, " M"]:
    """How many positions of a row each conversation takes."""
    return np.array([len(ids) - 1 for ids, _ in conversations], np.int64)


# ---- Tokens → rows, shuffled


class Batch(NamedTuple):
    """Rows of tokens and what comes next at each position, IGNORED where nothing does; of one row, the axis B
    is left out."""

    tokens: Int64[Tensor, "*B T"]
    targets: Int64[Tensor, "*B T"]
    start: Int32[Tensor, "*B T"]  # the position in the row where this position's document begins


def pack_conversations(conversations: Sequence[Encoded], block_size: int) -> Batch:
    """A row of conversations that fit in it. Its end is padding: token 0, no target, each a document."""
    tokens, targets = np.zeros(block_size, np.int64), np.full(block_size, IGNORED)
    start, begin = np.arange(block_size, dtype=np.int32), 0
    for ids, loss_mask in conversations:
        end = begin + len(ids) - 1
        tokens[begin:end], start[begin:end] = ids[:-1], begin
        targets[begin:end] = np.where(loss_mask[1:], ids[1:].astype(np.int64), IGNORED)
        begin = end
    return Batch(*map(torch.from_numpy, (tokens, targets, start)))


class Shuffled(Generic[Item]):
    """Items without end, every one once an epoch, in an order that follows from (seed, name, epoch).

    Its position is two numbers, the epoch and how many of its items were given: only they need saving.
    `name` says what the items are; their `fingerprint` changes with their content.
    """

    def __init__(self, items: Any, name: str, seed: int, fingerprint: str) -> None:
        self.items, self.name, self.seed, self.fingerprint = items, name, seed, fingerprint
        self.seek(0, 0)

    def arrange(self, random: np.random.Generator) -> Any:
        """The order of an epoch: a sequence of what to ask `take` for."""
        return random.permutation(len(self.items))

    def take(self, which: Any) -> Item:
        return self.items[which]

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
        _check_same(f"content of {self.name!r}", state["fingerprint"], self.fingerprint)
        self.seek(state["epoch"], state["position"])


def generator_of(*key: int | str) -> np.random.Generator:
    """Randomness of its own for each key, such as an epoch of a source: (seed, name, epoch)."""
    numbers = [seed_of(part, size=8) if isinstance(part, str) else part for part in key]
    # PCG64 by name, for numpy's default may change; with the length, (s,) and (s, 0, 0) differ.
    return np.random.Generator(np.random.PCG64((len(numbers), *numbers)))


LINE_END, BLANK_LINE = re.compile(rb"\n\s*\Z"), re.compile(rb"\n\s*\n\s*\Z")


class TextRows(Shuffled[Batch]):
    """The rows of one stream of text.

    Row i is tokens[phase + i·T : phase + (i+1)·T + 1], T being `block_size`; its last token is the first of
    row i+1. Phase and order are drawn anew for each epoch, which leaves out fewer than 2T tokens at the ends.

    A sample begins with bos, so the model must have seen what follows it. Where fewer than BEGINNING_SHARE of
    the rows can hold the beginning of a document (a book, a play), others, chosen at random, are made to
    begin like one: with bos before the next paragraph. There bos is an input only, never a target.
    """

    def __init__(self, source: TokenizedSource, block_size: int, seed: int) -> None:
        self.source, self.block_size = source, block_size
        documents = source.counts["train"]["documents"]
        self.bos_share = max(0.0, BEGINNING_SHARE - documents * block_size / len(source.train))
        super().__init__(source.train, source.name, seed, source.fingerprint)

    def arrange(self, random: np.random.Generator) -> Any:
        size, length = self.block_size, len(self.items)
        self.phase = int(random.integers(min(size, length - size)))
        order = random.permutation((length - 1 - self.phase) // size)
        self.adds_bos = random.random(len(order)) < self.bos_share
        return order

    def take(self, which: Any) -> Batch:
        tokens, size, bos = self.items, self.block_size, self.source.bos_id
        begin = self.phase + int(which) * size
        ids = tokens[begin : begin + size + 1].astype(np.int64)
        if self.adds_bos[which] and bos not in ids:
            begin = min(self._paragraph(begin), len(tokens) - size)
            ids[0], ids[1:] = bos, tokens[begin : begin + size]
        begins = np.where(ids[:-1] == bos, np.arange(size, dtype=np.int32), 0)
        return Batch(*map(torch.from_numpy, (ids[:-1], ids[1:], np.maximum.accumulate(begins))))

    def _paragraph(self, begin: int) -> int:
        """Where the next paragraph begins, from `begin` on, else the next line, else `begin`. A token begins
        a paragraph if the two before it end in a blank line (a line: in a line end) and it has no indent."""
        near = [self.source.vocabulary[i] for i in self.items[begin : begin + PARAGRAPH_TOKENS].tolist()]
        for ending in (BLANK_LINE, LINE_END):
            for i in range(2, len(near)):
                before, last, this = near[i - 2 : i + 1]
                if b"\n" in last and ending.search(before + last) and not this[:1].isspace():
                    return begin + i
        return begin


class PackedRows(Shuffled[Batch]):
    """The rows of a source of conversations: every one once an epoch, each epoch with other neighbours."""

    def __init__(self, source: EncodedSource, block_size: int, seed: int) -> None:
        self.block_size, self.sizes = block_size, positions(source.train)
        super().__init__(source.train, source.name, seed, source.fingerprint)

    def arrange(self, random: np.random.Generator) -> Any:
        rows = best_fit(self.sizes, random.permutation(len(self.sizes)), self.block_size)
        return [rows[i] for i in random.permutation(len(rows)).tolist()]

    def take(self, which: Any) -> Batch:
        return pack_conversations([self.items[i] for i in which], self.block_size)


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


# ---- Prompts with their responses, packed
#
# A sequence is a prompt and one response to it. A forward pass has P rows of T positions; a row holds whole
# sequences, so that hardly a position is padding. Reward model, critic and policies are run in this way:
#
#     sequences ──forward_passes──► rows ──pack_sequences──► tokens, start [P, T] ──model──► numbers [P, T]
#                                               └──► begins, ends ──► mask, index [N] ──► padded [B, R]
#
# An index counts the positions of all rows end to end; the B responses have N tokens, at most R each.


def forward_passes(
    numbers: Sequence[int], sequences: Sequence[Sequence[int]], micro_tokens: int
) -> list[list[list[int]]]:
    """Of each forward pass its rows, and of each row the numbers of the sequences that it holds.

    Rows are as long as the longest sequence; a pass has at most `micro_tokens` positions, or one row.
    """
    sizes = np.array([len(sequences[i]) for i in numbers], np.int64)
    if not len(sizes):
        return []
    rows = [[numbers[i] for i in row] for row in best_fit(sizes, np.arange(len(sizes)), int(sizes.max()))]
    count = max(1, micro_tokens // int(sizes.max()))
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def pack_sequences(
    sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[Int64[Tensor, "P T"], Int32[Tensor, "P T"], Int64[Tensor, " B"]]:
    """The tokens of these rows; for each position the start of its sequence, before which it sees nothing;
    and the index of each sequence's first token. Each position of padding is a sequence of its own."""
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    start = torch.arange(width, dtype=torch.int32).repeat(len(rows), 1)
    begins = []
    for r, row in enumerate(rows):
        t = 0
        for i in row:
            end = t + len(sequences[i])
            tokens[r, t:end], start[r, t:end] = torch.tensor(sequences[i]), t
            begins.append(r * width + t)
            t = end
    return tokens, start, torch.tensor(begins)


def flat_index(
    begins: Int64[Tensor, " B"], ends: Int64[Tensor, " B"]
) -> tuple[Bool[Tensor, "B R"], Int64[Tensor, " N"]]:
    """Of responses from index begins[b] to ends[b] (exclusive): the mask, true where response b has a token
    r, R being the size of the longest; and the index of all their tokens."""
    sizes = ends - begins
    offsets = torch.arange(int(sizes.max()), device=sizes.device)
    mask = offsets < sizes[:, None]
    return mask, (begins[:, None] + offsets)[mask]


def pad(per_token: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Numbers of the tokens [N] as rows [B, R], 0 where a response has no token."""
    # Not padded[mask] = per_token: a device would be waited for, to learn how many places that are.
    index = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)
    return torch.where(mask, per_token[index], 0)


# ---- Rows → batches


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
        self.streams: list[Shuffled[Batch]] = [source.rows(block_size, seed) for source in sources]
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
            _check_same(what, state[what], getattr(self, what))
        saved = state["sources"]
        _check_same("data sources", ", ".join(saved), ", ".join(s.name for s in self.sources))
        for i, stream in enumerate(self.streams):
            stream.load_state_dict(saved[stream.name])
            self.drawn[i] = saved[stream.name]["rows"]
        self.choices = generator_of(self.seed)  # takes one step for each row drawn
        self.choices.bit_generator.advance(sum(self.drawn))  # type: ignore[attr-defined]


def _check_same(what: str, was: Any, now: Any) -> None:
    if was != now:
        raise InputError(f"cannot resume: {what} was {was} and is now {now}; put back the old one")


def validation_batches(
    sources: Sequence[RowSource], block_size: int, max_tokens: int, batch_rows: int = 64
) -> list[Batch]:
    """The same rows each time, of every source up to its share of `max_tokens`, at least one if it has any;
    a batch holds up to `batch_rows` rows of one source."""
    total, batches = sum(source.weight for source in sources), []
    for source in sources:
        rows = source.val_rows(block_size, max(1, round(max_tokens * source.weight / total / block_size)))
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
