"""Documents and conversations → tokens → packed rows → a weighted mixture → batches.

    text:           Source ──tokenize──► TokenizedSource, on disk ──┐
    conversations:  messages ──encode_source──► EncodedSource ──────┴──► Mixture ──► Batch

A row of text is `block_size` consecutive tokens of a stream, wherever documents begin and end in it. A row of
conversations holds whole ones side by side. `Batch.start` keeps the bounds of both and attention does not
cross them: packing equals running every piece alone. A document cut by the end of a row goes on in another
row without its beginning: that context is lost, and no position is.

A sample begins with the document token, so the model must have seen what follows it. Where documents are few
(a book, a play), some rows are therefore made to begin as documents do: the document token, then the text
from the beginning of a paragraph (`TextRows`).

Which conversations share a row is found by best-fit decreasing (Johnson et al. 1974), as Ding et al. 2024
(arXiv 2404.10830) pack pretraining text. The masked objective is BERT's (Devlin et al. 2019,
arXiv 1810.04805, section 3.1). Left out: best-fit packing of text, conversations that do not fit in memory.
"""

import bisect
import hashlib
import itertools
import json
import shutil
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Int64, UInt
from torch import Tensor
from tqdm import tqdm

from minillm.errors import InputError, writing
from minillm.files import digest, hold, write_json
from minillm.tokenizer import Tokenizer

Item = TypeVar("Item")
Side = Literal["train", "val"]
SIDES: tuple[Side, Side] = ("train", "val")
Tokens = UInt[np.ndarray, " L"]

IGNORED = -100
"""A target that counts for nothing, as in torch."""
FEW_DOCUMENTS = 20  # below this, validation takes the tail of every document, not whole documents
LARGE_DOCUMENT = (
    1 / 16
)  # of the text to be held out: a larger document is cut, else validation is all or none
BEGINNING_SHARE = 1 / 8  # of a source's rows at least begin a document, or are made to
PARAGRAPH_TOKENS = 1024  # in which the beginning of a paragraph is looked for
STRETCH = 64  # rows whose conversations are packed together; each stretch leaves about one row half empty
FORMAT_VERSION = 2  # of the tokens on disk and the split: part of every cache's name


# ---- Documents → train and validation


@dataclass(frozen=True)
class Source:
    """A named stream of documents with a weight in the mixture.

    `documents()` starts a new pass, over the same documents in the same order each time.
    """

    name: str
    weight: float
    documents: Callable[[], Iterator[str]]
    fingerprint: str
    """Changes with the documents."""
    size: int | None = None
    """About how many bytes they have; None where they are many, small and in no order."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files that were left out, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What the latest pass left out or replaced, by reason."""


def split_documents(
    documents: Iterable[str], val_fraction: float, size: int | None = None
) -> Iterator[tuple[Side, str]]:
    """Give every document to train or validation, about `val_fraction` of the text to validation.

    A document goes to validation when a hash of its text, read as a number in [0, 1), is below
    `val_fraction`: the copies of a document in a source land on one side. One that is much of the text, of
    `size` bytes, is cut instead, and so is each where there are fewer than 20: its last `val_fraction` of
    bytes, from the beginning of a character, is validation. So that validation is never empty, the smallest
    hash of the first 20 documents goes there too.
    """
    stream = iter(documents)
    first = list(itertools.islice(stream, FEW_DOCUMENTS))
    largest = 0.0 if len(first) < FEW_DOCUMENTS else (size or np.inf) * val_fraction * LARGE_DOCUMENT
    smallest = min(map(unit_hash, first), default=0.0)
    for text in itertools.chain(first, stream):
        if len(text.encode()) > largest:
            yield from _cut_tail(text, val_fraction)
        else:
            value = unit_hash(text)
            held_out = value < val_fraction or (value == smallest and val_fraction > 0)
            yield "val" if held_out else "train", text


def _cut_tail(text: str, val_fraction: float) -> Iterator[tuple[Side, str]]:
    raw = text.encode()
    train = raw[: int(len(raw) * (1 - val_fraction))].decode(errors="ignore")
    if train:
        yield "train", train
    if len(train) < len(text):
        yield "val", text[len(train) :]


def text_sample(sources: Sequence[Source], val_fraction: float, characters: int = 4_000_000) -> Iterator[str]:
    """Training text for a tokenizer: of every source as much as its share, evenly from all of it.

    Where documents are in no order, from the first of them.
    """
    total = sum(source.weight for source in sources)
    for source in sources:
        wanted = characters * source.weight / total
        rate, owed, taken = wanted / (source.size or wanted), 0.0, 0.0
        for side, text in split_documents(source.documents(), val_fraction, source.size):
            if taken >= wanted:
                break
            for i in range(0, len(text) if side == "train" else 0, 16_384):
                part = text if rate >= 1 else text[i : i + 16_384]
                owed += rate * len(part)
                if owed > 0:
                    yield part
                    owed, taken = owed - len(part), taken + len(part)
                if part is text:
                    break


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: what every split goes by."""
    return _number_of(text, 6) / 2**48  # exact: 48 bits fit a float


def _number_of(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest())


def split_by_hash(
    items: Sequence[Item], key: Callable[[Item], str], held_out: float
) -> tuple[list[Item], list[Item]]:
    """Those to train on, and about a share `held_out`; items of one key stay together.

    Nothing is held out where there are fewer than two keys.
    """
    sides: tuple[list[Item], list[Item]] = [], []
    for held, item in zip(_held_out([unit_hash(key(item)) for item in items], held_out), items, strict=True):
        sides[held].append(item)
    return sides


def _held_out(hashes: Sequence[float], fraction: float) -> list[bool]:
    """Whether each is held out: the smallest hash always and the largest never, so that no side is empty."""
    smallest, largest = min(hashes, default=0.0), max(hashes, default=0.0)
    return [fraction > 0 and (value < fraction or value == smallest) and value < largest for value in hashes]


# ---- Documents → tokens on disk


@dataclass(frozen=True)
class TokenizedSource:
    """A source as two token streams mapped from disk.

    A stream is one long array of tokens: every document is [bos] + its tokens, followed by [eos] only where
    eos is another token than bos. Where they are the same token (in our own tokenizers), the one that opens
    a document also ends the one before it, and one more closes the stream: every token of text has a next
    token to predict.
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
    line_ends: Int[np.ndarray, " V"]
    """How every token of the vocabulary ends, see `line_ends_of`."""

    def rows(self, block_size: int, seed: int) -> "TextRows":
        """The rows of the training text. Raises InputError where it is shorter than one row."""
        if len(self.train) <= block_size:
            raise InputError(
                f"data source {self.name!r}: {len(self.train)} training tokens, fewer than "
                f"one row of {block_size} + 1; give more text or a smaller block size"
            )
        return TextRows(self, block_size, seed)


def tokenize(
    source: Source, tokenizer: Tokenizer, folder: Path, val_fraction: float = 0.1, workers: int = 1
) -> TokenizedSource:
    """The token streams of `source`: from the cache in `folder`, or written there now.

        folder/KEY/train.bin  val.bin     token ids, uint16 or uint32, nothing else
        folder/KEY/counts.json            of each side tokens, bytes, documents and a checksum; written last

    KEY is a digest of content, tokenizer and `val_fraction`. A cache that is not as counted is written anew.
    One process writes; others that want the same tokens wait for it, however long it takes. `workers`
    processes encode. Raises InputError for what is wrong in the source, and where the disk refuses.
    """
    bos, _ = document_marks(tokenizer)
    key = digest(FORMAT_VERSION, source.fingerprint, source.size, tokenizer.fingerprint, val_fraction)
    cache, vocab_size = folder / key, tokenizer.vocab_size
    with writing(cache, "free some space or give another --cache"), hold(cache, wait=True):
        if (found := _open_cache(cache, vocab_size)) is None:
            try:
                _write_cache(cache, source, tokenizer, val_fraction, workers)
            except BaseException:
                shutil.rmtree(cache, ignore_errors=True)
                raise
            if (found := _open_cache(cache, vocab_size)) is None:
                raise InputError(f"{cache}: does not read back as written; check the disk")
    streams, counts, dropped = found
    skipped = dict(source.skipped + Counter(dropped))
    return TokenizedSource(
        source.name, source.weight, key, bos, streams["train"], streams["val"], counts, skipped,
        line_ends_of(tokenizer.vocabulary.tokens),
    )  # fmt: skip


def document_marks(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens (bos, eos) around a document; one the tokenizer lacks is replaced by the other."""
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not ids:
        raise InputError("the tokenizer has no bos or eos token to mark documents with: add one")
    return ids[0], ids[-1]


def _token_dtype(vocab_size: int) -> str:
    """The smaller of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _write_cache(
    cache: Path, source: Source, tokenizer: Tokenizer, val_fraction: float, workers: int
) -> None:
    for damaged in cache.iterdir():  # what another process has mapped outlives its name
        damaged.unlink()
    dtype, (bos, eos) = _token_dtype(tokenizer.vocab_size), document_marks(tokenizer)
    opening, closing = np.array([bos], dtype), np.array([eos] if eos != bos else [], dtype)
    counts = {side: dict.fromkeys(("tokens", "bytes", "documents", "checksum"), 0) for side in SIDES}
    with open(cache / "train.bin", "wb") as train, open(cache / "val.bin", "wb") as val:
        files = dict(zip(SIDES, (train, val), strict=True))

        def append(side: Side, ids: Tokens) -> None:
            raw = ids.astype(dtype).tobytes()
            files[side].write(raw)
            counts[side]["tokens"] += len(raw) // np.dtype(dtype).itemsize
            counts[side]["checksum"] = zlib.crc32(raw, counts[side]["checksum"])

        for side, ids, size in _encoded(source, tokenizer, val_fraction, workers):
            append(side, np.concatenate([opening, ids, closing]))
            counts[side]["bytes"] += size
            counts[side]["documents"] += 1
        for side in SIDES:
            if counts[side]["documents"] and bos == eos:
                append(side, opening)
    sealed = {"sides": counts, "dropped": dict(source.dropped)}
    write_json(cache / "counts.json", {**sealed, "checksum": digest(sealed)})


def _encoded(
    source: Source, tokenizer: Tokenizer, val_fraction: float, workers: int
) -> Iterator[tuple[Side, Tokens, int]]:
    """Every document as its side, its tokens and its bytes; where it takes long, a bar shows how far."""
    # The encoder reads ahead of what it gives back: the queue holds what was said of each text.
    ahead: deque[tuple[Side, int]] = deque()

    def texts() -> Iterator[str]:
        for side, text in split_documents(source.documents(), val_fraction, source.size):
            ahead.append((side, len(text.encode())))
            yield text

    title = f"tokenize {source.name}"
    with tqdm(
        desc=title, total=source.size, unit="B", unit_scale=True, delay=1, leave=False, dynamic_ncols=True
    ) as bar:
        for ids in tokenizer.encode_documents(texts(), workers=workers):
            side, size = ahead.popleft()
            yield side, ids, size
            bar.update(size)


def _open_cache(
    cache: Path, vocab_size: int
) -> tuple[dict[Side, Tokens], dict[Side, dict[str, int]], dict[str, int]] | None:
    """Streams, counts and what reading dropped; None where any of it is missing or not as it was written."""
    try:
        sealed = json.loads((cache / "counts.json").read_text())
        checksum = sealed.pop("checksum")
        if checksum != digest(sealed):
            return None
        counts, dropped = sealed["sides"], sealed["dropped"]
        numbers = [*dropped.values(), *(n for side in SIDES for n in counts[side].values())]
        if any(type(number) is not int for number in numbers):
            return None
        return {s: _map(cache / f"{s}.bin", vocab_size, counts[s]) for s in SIDES}, counts, dropped
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _map(path: Path, vocab_size: int, counts: Mapping[str, int]) -> Tokens:
    """One stream, mapped. ValueError unless size and checksum are as counted and every id has a token."""
    dtype, checksum, largest = np.dtype(_token_dtype(vocab_size)), 0, -1
    with open(path, "rb") as file:  # read and not mapped: what is mapped counts as memory
        while raw := file.read(2**24):
            checksum = zlib.crc32(raw, checksum)
            largest = max(largest, int(np.frombuffer(raw, dtype).max()))
    size = path.stat().st_size
    if (size, checksum) != (counts["tokens"] * dtype.itemsize, counts["checksum"]) or largest >= vocab_size:
        raise ValueError(f"{path} is damaged")
    # An empty file cannot be mapped; and a plain view is quicker to slice than a np.memmap.
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)


def source_sides(source: TokenizedSource) -> str:
    """What a source holds on both sides, and what was left out of it, as a line to read."""
    sides = [
        f"{name} {n['bytes']:,} bytes, {n['tokens']:,} tokens, {n['documents']:,} documents"
        for name, n in (("train", source.counts["train"]), ("held out", source.counts["val"]))
        if n["documents"]
    ]
    skipped = [f"{count:,} {what}" for what, count in source.skipped.items()]
    return f"{source.name}: {'; '.join(sides)}" + (f"; skipped: {', '.join(skipped)}" if skipped else "")


# ---- Conversations → tokens in memory


@runtime_checkable
class Encoded(Protocol):
    """A conversation as tokens, and for each whether it is the assistant's to produce."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def assistant(self) -> list[bool]: ...


Encode = Callable[[list[dict[str, str]]], Encoded]
"""How messages become tokens. It raises InputError for messages that it refuses."""


@dataclass(frozen=True)
class EncodedConversations:
    """Conversations end to end: the i-th is tokens[offsets[i] : offsets[i + 1]].

    One of L tokens takes L - 1 positions of a row: every token but the last goes in, and the next one is the
    target where it is the assistant's. They take 3 bytes a token, or 5 with ids beyond 65,535.
    """

    tokens: UInt[np.ndarray, " L"]
    assistant: Bool[np.ndarray, " L"]
    offsets: Int64[np.ndarray, " M_plus_1"]

    @property
    def sizes(self) -> Int64[np.ndarray, " M"]:
        """The positions that each conversation takes in a row."""
        return np.diff(self.offsets) - 1

    def row(self, chosen: Sequence[int], block_size: int) -> "Row":
        """These conversations side by side; together they fit. The end of the row is padding: token 0, no
        target, every position a document of its own."""
        tokens, targets = np.zeros(block_size, np.int64), np.full(block_size, IGNORED)
        document_start = np.ones(block_size, bool)
        begin = 0
        for i in chosen:
            own = slice(self.offsets[i], self.offsets[i + 1])
            ids, assistant = self.tokens[own].astype(np.int64), self.assistant[own]
            end = begin + len(ids) - 1
            tokens[begin:end] = ids[:-1]
            targets[begin:end] = np.where(assistant[1:], ids[1:], IGNORED)
            document_start[begin + 1 : end] = False
            begin = end
        return Row(tokens, targets, document_start)


@dataclass(frozen=True)
class EncodedSource:
    """A source of conversations as tokens; to a mixture the same as a TokenizedSource."""

    name: str
    weight: float
    fingerprint: str
    """Of the tokens, their split, and which are the assistant's."""
    train: EncodedConversations
    val: EncodedConversations
    skipped: Mapping[str, int]
    """What reading and encoding left out, by reason."""
    first_skipped: str | None
    """A line about the first of it."""

    def rows(self, block_size: int, seed: int) -> "PackedRows":
        """The rows of the training conversations, which are no longer than `block_size`."""
        return PackedRows(self, block_size, seed)


def encode_source(source: Any, encode: Encode, block_size: int, val_fraction: float = 0.05) -> EncodedSource:
    """The conversations of `source` (io/conversations.py) as tokens, none longer than a row.

    A longer one is cut behind the last reply with which it fits. Where none does, where `encode` refuses it,
    or where no token of it is the assistant's, it is left out; all is counted. Raises InputError where
    nothing is left to train on. There may be none to validate on.
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
    if not len(train.sizes):
        raise InputError(
            f"data source {source.name!r}: no conversation to train on ({first or 'too few'}); "
            "give more, a larger block size or another validation fraction"
        )
    content = [(side.offsets, side.tokens.astype(np.uint32), side.assistant) for side in (train, val)]
    fingerprint = digest(*itertools.chain(*content))
    return EncodedSource(source.name, source.weight, fingerprint, train, val, dict(skipped), first)


def split_conversations(source: Any, val_fraction: float) -> Iterator[tuple[Side, list[dict[str, str]]]]:
    """Every conversation of `source` and its side, about `val_fraction` of them held out.

    The side follows from a hash of the first user message: two answers to one question never land on two
    sides. Where all begin alike, it is that of the whole conversation. InputError for a fraction outside
    [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"validation fraction {val_fraction}: give at least 0 and less than 1")
    for key in (_first_question, json.dumps):
        hashes = [unit_hash(key(conversation)) for conversation in source.conversations()]
        if len(set(hashes)) > 1:
            break
    for held, conversation in zip(_held_out(hashes, val_fraction), source.conversations(), strict=True):
        yield SIDES[held], conversation


def _first_question(conversation: list[dict[str, str]]) -> str:
    return next((message["content"] for message in conversation if message["role"] == "user"), "")


def _fitted(
    conversation: list[dict[str, str]], encode: Encode, limit: int
) -> tuple[Encoded | None, str | None]:
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
        tokens = tokens.astype(_token_dtype(int(tokens.max(initial=0)) + 1))
        return EncodedConversations(tokens, assistant, np.array(self.offsets, np.int64))


# ---- Tokens → rows


class Row(NamedTuple):
    """One row of a batch; the numbers in any type of integers."""

    tokens: Int[np.ndarray, " T"] | UInt[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"] | UInt[np.ndarray, " T"]
    document_start: Bool[np.ndarray, " T"]  # whether a document begins here; the first position need not say


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what comes next at each position, IGNORED where nothing does."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    start: Int32[Tensor, "B T"]  # the position in the row where this position's document begins

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.start.to(device))

    def rows(self, begin: int, end: int) -> "Batch":
        """Rows `begin` to `end`, exclusive: a micro-batch, or the share of one process."""
        return Batch(self.tokens[begin:end], self.targets[begin:end], self.start[begin:end])


def stack(rows: Sequence[Row], block_size: int) -> Batch:
    """The batch of `rows`, which may be none."""
    tokens, targets = (np.empty((len(rows), block_size), np.int64) for _ in range(2))
    begins = np.empty((len(rows), block_size), bool)
    for i, row in enumerate(rows):
        tokens[i], targets[i], begins[i] = row
    start = _last_true(torch.from_numpy(begins))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), start)


def document_starts(tokens: Int64[Tensor, "B T"], bos_id: int) -> Int32[Tensor, "B T"]:
    """For every position the last position of `bos_id` up to it, or 0: its document's beginning."""
    return _last_true(tokens == bos_id)


def _last_true(begins: Bool[Tensor, "B T"]) -> Int32[Tensor, "B T"]:
    positions = torch.arange(begins.shape[1], device=begins.device)
    return torch.where(begins, positions, 0).cummax(dim=1).values.to(torch.int32)


class Shuffled(Generic[Item]):
    """Items without end, every one once an epoch, in an order that follows from (seed, name, epoch).

    Where it stands is two numbers, the epoch and how many of its items were given: only they need saving.
    """

    def __init__(self, items: Sequence[Item], name: str, seed: int, fingerprint: str) -> None:
        """`name` says what the items are; their `fingerprint` changes with their content."""
        self.items, self.name, self.seed, self.fingerprint = items, name, seed, fingerprint
        self.seek(0, 0)

    def arrange(self, random: np.random.Generator) -> Any:
        """The items of an epoch in their order, each as `take` knows it."""
        return random.permutation(len(self.items))

    def take(self, which: Any) -> Item:
        """The item that is so known."""
        return self.items[which]

    def seek(self, epoch: int, position: int) -> None:
        """Go to the `position`-th item of an epoch."""
        self.epoch, self.position = epoch, position
        self.order = self.arrange(epoch_generator(self.seed, self.name, epoch))

    def next(self, count: int = 1) -> list[Item]:
        """The next `count` items."""
        taken = []
        for _ in range(count):
            if self.position == len(self.order):
                self.seek(self.epoch + 1, 0)
            taken.append(self.take(self.order[self.position]))
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in what JSON can hold."""
        return {"fingerprint": self.fingerprint, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another one stood. InputError if the items are others, ValueError for no such place."""
        _check_same(f"content of {self.name!r}", state["fingerprint"], self.fingerprint)
        self.seek(_whole(state["epoch"]), _whole(state["position"]))
        if self.position > len(self.order):
            raise ValueError(f"no position {self.position} in epoch {self.epoch}")


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no count")
    return number


def epoch_generator(seed: int, name: str, epoch: int) -> np.random.Generator:
    """The randomness of one epoch of one source."""
    return _generator(seed, _number_of(name, 8), epoch)


def _generator(*key: int) -> np.random.Generator:
    # Not numpy's default, which may change; the length tells (s,) from (s, 0, 0).
    return np.random.Generator(np.random.PCG64((len(key), *key)))


class TextRows(Shuffled[Row]):
    """The rows of one stream of text.

    Row i is tokens[phase + i·T : phase + (i+1)·T + 1]; its last token is the first of row i+1. An
    epoch leaves out fewer than 2T tokens, before the phase and behind the last whole row. Phase
    and order are drawn anew for each epoch. The order takes 8 bytes a row in memory.

    Where fewer than BEGINNING_SHARE of the rows can hold the beginning of a document, chance chooses others
    that begin as one: with bos in front of the next paragraph's beginning. Such a row sees no less before
    its tokens than any other, and nothing teaches that a document ends before a paragraph.
    """

    def __init__(self, source: TokenizedSource, block_size: int, seed: int) -> None:
        self.source, self.block_size = source, block_size
        documents = source.counts["train"]["documents"]
        self.made_share = max(0.0, BEGINNING_SHARE - documents * block_size / len(source.train))
        super().__init__((), source.name, seed, source.fingerprint)

    def arrange(self, random: np.random.Generator) -> Any:
        size, length = self.block_size, len(self.source.train)
        self.phase = int(random.integers(min(size, length - size)))
        order = random.permutation((length - 1 - self.phase) // size)
        self.made = random.random(len(order)) < self.made_share
        return order

    def take(self, which: Any) -> Row:
        tokens, size, bos = self.source.train, self.block_size, self.source.bos_id
        begin = self.phase + int(which) * size
        ids = tokens[begin : begin + size + 1]
        if self.made[which] and bos not in ids:
            begin = min(self._paragraph(begin), len(tokens) - size)
            ids = np.concatenate([np.array([bos], tokens.dtype), tokens[begin : begin + size]])
        return Row(ids[:-1], ids[1:], ids[:-1] == bos)

    def _paragraph(self, begin: int) -> int:
        """Where the first paragraph from `begin` on begins; the first line where none is near, or `begin`."""
        near = self.source.line_ends[self.source.train[begin : begin + PARAGRAPH_TOKENS]]
        before, last, this = (near[i : len(near) + i - 2] for i in range(3))
        blank = (last & BLANK > 0) | ((last & EMPTY > 0) & (before & LINE > 0))
        for ends in (blank, last & LINE > 0):
            if len(found := np.flatnonzero(ends & (this & INDENT == 0))):
                return begin + int(found[0]) + 2
        return begin


LINE, BLANK, EMPTY, INDENT = 1, 2, 4, 8


def line_ends_of(tokens: Sequence[bytes]) -> Int[np.ndarray, " V"]:
    """Of every token, as bits, whether it ends a line, whether that line is blank, whether the token is
    nothing else, and whether it begins with white space."""
    bits = np.zeros(len(tokens), np.int8)
    for i, token in enumerate(tokens):
        *_, line, behind = (b"x" + token).split(b"\n") if b"\n" in token else (b"x", b"x")
        bits[i] = (
            LINE * (not behind.strip())
            | BLANK * (not behind.strip() and not line.strip())
            | EMPTY * (not behind.strip() and not token.strip())
            | INDENT * token[:1].isspace()
        )
    return bits


class PackedRows(Shuffled[Row]):
    """The rows of a source of conversations: every one once an epoch, each epoch with other neighbours."""

    def __init__(self, source: EncodedSource, block_size: int, seed: int) -> None:
        if source.train.sizes.max() > block_size:
            raise ValueError(f"{source.name!r} holds conversations encoded for longer rows than {block_size}")
        self.source, self.block_size = source, block_size
        super().__init__((), source.name, seed, source.fingerprint)

    def arrange(self, random: np.random.Generator) -> Any:
        sizes = self.source.train.sizes
        rows = pack(sizes, random.permutation(len(sizes)), self.block_size)
        return [rows[i] for i in random.permutation(len(rows)).tolist()]

    def take(self, which: Any) -> Row:
        return self.source.train.row(which, self.block_size)

    @property
    def fill(self) -> float:
        """The share of this epoch's positions that are not padding."""
        return float(self.source.train.sizes.sum()) / (len(self.order) * self.block_size)


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


# ---- Rows → batches


RowSource = TokenizedSource | EncodedSource
"""What a mixture draws from."""


class Mixture:
    """Rows drawn from several sources: each row's source by weight, its rows in shuffled order.

    All rows are equally long, so in expectation a source's share of the tokens is exactly its share
    of the weights. The sequence of rows is a function of sources, weights, block size and seed
    alone: not of how many are asked for at a time, nor of being stopped and resumed.
    """

    def __init__(self, sources: Sequence[RowSource], block_size: int, seed: int) -> None:
        """Raises InputError for two sources of one name and for one too short to give a row."""
        check_names(source.name for source in sources)
        weights = np.array([source.weight for source in sources])
        self.sources, self.block_size, self.seed = list(sources), block_size, seed
        self.shares = weights / weights.sum()
        self.drawn = [0] * len(sources)
        self.streams: list[Shuffled[Row]] = [source.rows(block_size, seed) for source in sources]
        self.choices = _generator(seed)

    def next_rows(self, n: int) -> Batch:
        """The next `n` rows."""
        # The shares divide [0, 1): each row's number falls into the part of its source.
        bounds = self.shares.cumsum()[:-1]
        chosen = np.searchsorted(bounds, self.choices.random(n), side="right").tolist()
        rows = []
        for source in chosen:
            rows += self.streams[source].next()
            self.drawn[source] += 1
        return stack(rows, self.block_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture stands, in a few numbers that JSON can hold."""
        own = zip(self.drawn, self.streams, strict=True)
        sources = {stream.name: {"rows": drawn, **stream.state_dict()} for drawn, stream in own}
        return {"block_size": self.block_size, "seed": self.seed, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a mixture stood. Raises InputError, naming what differs, for another one."""
        for what in ("block_size", "seed"):
            _check_same(what, state[what], getattr(self, what))
        saved = state["sources"]
        _check_same("data sources", ", ".join(saved), ", ".join(s.name for s in self.sources))
        for i, stream in enumerate(self.streams):
            stream.load_state_dict(saved[stream.name])
            self.drawn[i] = _whole(saved[stream.name]["rows"])
        self.choices = _generator(self.seed)
        # One step of the generator for each row drawn.
        self.choices.bit_generator.advance(sum(self.drawn))  # type: ignore[attr-defined]

    def report(self) -> list[dict[str, Any]]:
        """For each source its share by weight and as drawn so far, the positions drawn, and epochs."""
        own = zip(self.sources, self.shares, self.drawn, self.streams, strict=True)
        return [
            {
                "name": source.name,
                "share": float(share),
                "realised": drawn / max(1, sum(self.drawn)),
                "tokens": drawn * self.block_size,
                "epochs": stream.epoch + stream.position / len(stream.order),
                "skipped": dict(source.skipped),
            }
            for source, share, drawn, stream in own
        ]


def check_names(names: Iterable[str]) -> None:
    """Raises InputError where two sources have one name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(
                f"{count} data sources are named {name!r}: name them apart, as in other=PATH, or make one of "
                "them by a glob in quotes, as in 'PATH/*.txt'"
            )


def source_line(report: Mapping[str, Any]) -> str:
    """What a mixture reports of one source, as a line to read."""
    line = "{name}: {tokens:,} tokens, {realised:.1%} of all, {epochs:.2f} epochs".format(**report)
    return line + "".join(f", {count} {what} skipped" for what, count in report["skipped"].items())


def _check_same(what: str, was: Any, now: Any) -> None:
    if was != now:
        raise InputError(f"cannot resume: {what} was {was} and is now {now}; put back the old one")


# ---- Validation


def validation_rows(
    sources: Sequence[TokenizedSource], block_size: int, max_tokens: int, batch_rows: int = 64
) -> Iterator[Batch]:
    """The same rows each time, of every source up to its share of `max_tokens`, at least one.

    Rows are windows side by side from the stream's first token, so that every token but the first
    is a target once; where they are more than the source's share, that many evenly spaced ones. A
    last window is filled up on the right with `bos` and targets IGNORED. A batch holds up to
    `batch_rows` rows of one source. Raises InputError for a source without validation text.
    """
    total = sum(source.weight for source in sources)
    for source in sources:
        if len(source.val) < 2:
            raise InputError(
                f"data source {source.name!r}: no text for validation; "
                "give more text or a larger validation fraction"
            )
        windows = -(-(len(source.val) - 1) // block_size)
        count = min(windows, max(1, round(max_tokens * source.weight / total / block_size)))
        chosen = np.arange(count) * windows // count
        for i in range(0, count, batch_rows):
            yield _windows(source, chosen[i : i + batch_rows], block_size)


def _windows(source: TokenizedSource, chosen: Int[np.ndarray, " B"], block_size: int) -> Batch:
    positions = chosen[:, None] * block_size + np.arange(block_size + 1)
    inside = positions < len(source.val)
    rows = torch.from_numpy(np.where(inside, source.val[positions * inside], source.bos_id).astype(np.int64))
    tokens = rows[:, :-1].contiguous()
    targets = rows[:, 1:].masked_fill(~torch.from_numpy(inside[:, 1:]), IGNORED)
    return Batch(tokens, targets.contiguous(), document_starts(tokens, source.bos_id))


def packed_batches(
    conversations: EncodedConversations, block_size: int, batch_rows: int = 64
) -> Iterator[Batch]:
    """Every conversation once, in the same batches of up to `batch_rows` rows each time."""
    sizes = conversations.sizes
    rows = pack(sizes, np.arange(len(sizes)), block_size)
    for i in range(0, len(rows), batch_rows):
        yield stack([conversations.row(row, block_size) for row in rows[i : i + batch_rows]], block_size)


# ---- The masked objective


def mask_tokens(
    tokens: Int64[Tensor, "B T"],
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    special_ids: Collection[int],
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """Inputs and targets of BERT's objective: what stood at 15% of the positions is to be found.

    Of the chosen positions 80% show the mask token, 10% a random ordinary token, 10% what stood
    there; all others have target IGNORED. Special tokens (`special_ids` and `mask_id`) are neither
    chosen nor put in. Where chance chooses no position, the one that came nearest is chosen, so a
    batch with an ordinary token has a target. `generator` is on the device of `tokens`.
    """
    special = torch.tensor(sorted({*special_ids, mask_id}), device=tokens.device)
    ids = torch.arange(vocab_size, device=tokens.device)
    ids = ids[~torch.isin(ids, special)]
    ordinary = ~torch.isin(tokens, special)
    draw, kind = torch.rand((2, *tokens.shape), generator=generator, device=tokens.device)
    draw = draw.masked_fill(~ordinary, 1.0)
    chosen = ordinary & (draw <= draw.min().clamp(min=0.15))
    pick = torch.randint(len(ids), tokens.shape, generator=generator, device=tokens.device)
    shown = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, ids[pick], tokens))
    return torch.where(chosen, shown, tokens), torch.where(chosen, tokens, IGNORED)
