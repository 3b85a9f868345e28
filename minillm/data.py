"""Documents -> train and validation -> tokens on disk -> a weighted mixture -> batches.

    sources.py: documents ──► tokenize ──► streams.py: tokens on disk ──► Mixture ──► Batch

Conversations (packing.py) are another kind of source for the same mixture.

A row of text is `block_size` consecutive tokens of a stream, wherever documents begin and end in it.
`Batch.start` keeps their bounds and attention does not cross them; so neither the order of
documents nor that of rows changes what a row means, and packing equals running every piece of a
document alone. A document cut by the end of a row goes on in another row without its beginning:
that context is lost, and no position is.

Left out: best-fit packing (Ding et al. 2024, arXiv 2404.10830), which cuts fewer documents.
The recipe of the masked objective is BERT's (Devlin et al. 2019, arXiv 1810.04805, section 3.1).
"""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Int64, UInt
from torch import Tensor
from tqdm import tqdm

from minillm.errors import InputError
from minillm.sources import Source, check_names
from minillm.streams import Side, Tokens, open_streams, token_dtype, write_streams
from minillm.tokenizer import Tokenizer

Item = TypeVar("Item")
IGNORED = -100
"""A target that counts for nothing, as in torch."""
FEW_DOCUMENTS = 20  # below this, validation takes the tail of every document, not whole documents
FORMAT_VERSION = 1  # of the document format and the split: part of every cache's name


# ---- Documents -> train and validation


def split_documents(documents: Iterable[str], val_fraction: float) -> Iterator[tuple[Side, str]]:
    """Give every document to train or validation, about `val_fraction` of them to validation.

    A document goes to validation when a hash of its text, read as a number in [0, 1), is below
    `val_fraction`: the copies of a document in a source land on one side. So that validation
    is never empty, the smallest hash of a source's first 20 documents goes there too. Where there
    are fewer than 20 documents (a few books), each is cut instead: its last `val_fraction` of
    bytes, from the beginning of a character, is validation.
    """
    stream = iter(documents)
    first = list(itertools.islice(stream, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        for text in first:
            yield from _cut_tail(text, val_fraction)
        return
    smallest = min(map(unit_hash, first)) if val_fraction else -1
    for text in itertools.chain(first, stream):
        value = unit_hash(text)
        yield "val" if value < val_fraction or value == smallest else "train", text


def _cut_tail(text: str, val_fraction: float) -> Iterator[tuple[Side, str]]:
    raw = text.encode()
    train = raw[: int(len(raw) * (1 - val_fraction))].decode(errors="ignore")
    if train:
        yield "train", train
    if len(train) < len(text):
        yield "val", text[len(train) :]


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: what the split goes by."""
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48  # exact: 48 bits fit a float


def split_by_hash(
    items: Sequence[Item], key: Callable[[Item], str], held_out: float
) -> tuple[list[Item], list[Item]]:
    """Those to train on, and about a share `held_out`; items of one key stay together.

    The side follows from a hash of the key alone. The smallest hash is always held out and the largest
    never, so that neither side is empty, unless there are fewer than two keys: then nothing is held out.
    """
    hashes = [unit_hash(key(item)) for item in items]
    smallest, largest = min(hashes, default=0.0), max(hashes, default=0.0)
    sides: tuple[list[Item], list[Item]] = [], []
    for value, item in zip(hashes, items, strict=True):
        sides[(value < held_out or value == smallest) and value < largest].append(item)
    return sides


# ---- Documents -> tokens on disk


@dataclass(frozen=True)
class TokenizedSource:
    """A source as two token streams mapped from disk. Bytes are those of the text in UTF-8."""

    name: str
    weight: float
    fingerprint: str  # of content, tokenizer and split: the name of the cache
    bos_id: int
    train: UInt[np.ndarray, " L"]
    val: UInt[np.ndarray, " M"]
    train_bytes: int
    val_bytes: int
    train_documents: int
    val_documents: int
    skipped: dict[str, int]  # what reading left out, by reason

    def rows(self, block_size: int, seed: int) -> "RowStream":
        """The rows of the training text. Raises InputError where it is shorter than one row."""
        if len(self.train) <= block_size:
            raise InputError(
                f"data source {self.name!r}: {len(self.train)} training tokens, fewer than "
                f"one row of {block_size} + 1; give more text or a smaller block size"
            )
        return _ShuffledRows(self, block_size, seed)


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float = 0.1,
    workers: int = 1,
) -> TokenizedSource:
    """The token streams of `source`: from the cache in `folder`, or written there now.

    The cache's name is a digest of content, tokenizer and `val_fraction`; a damaged cache is
    written anew. `workers` processes encode. Raises InputError for a fraction outside [0, 1),
    for what is wrong in the source, and where the disk refuses.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"validation fraction {val_fraction}: give at least 0 and less than 1")
    bos, eos = document_marks(tokenizer)
    parts = [FORMAT_VERSION, source.fingerprint, tokenizer.fingerprint, bos, eos, val_fraction]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    cache = folder / key
    if (found := open_streams(cache)) is None:
        documents = _encoded(source, tokenizer, val_fraction, workers)
        write_streams(cache, documents, token_dtype(tokenizer.vocab_size), bos, eos, source.skipped)
        if (found := open_streams(cache)) is None:
            raise InputError(f"{str(cache)!r} does not read back as written; check the disk")
    streams, counts = found
    sizes = {f"{s}_{what}": counts[s][what] for s in streams for what in ("bytes", "documents")}
    return TokenizedSource(
        source.name,
        source.weight,
        key,
        bos,
        streams["train"],
        streams["val"],
        **sizes,
        skipped=counts["notes"] | source.skipped,
    )


def document_marks(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens (bos, eos) around a document; one the tokenizer lacks is replaced by the other."""
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not ids:
        raise InputError("the tokenizer has no bos or eos token to mark documents with: add one")
    return ids[0], ids[-1]


def _encoded(
    source: Source, tokenizer: Tokenizer, val_fraction: float, workers: int
) -> Iterator[tuple[Side, Tokens, int]]:
    """Every document as its side, its tokens and its bytes; where it takes long, a bar shows how far."""
    # The encoder reads ahead of what it gives back: the queue holds what was said of each text.
    ahead: deque[tuple[Side, int]] = deque()

    def texts() -> Iterator[str]:
        for side, text in split_documents(source.documents(), val_fraction):
            ahead.append((side, len(text.encode())))
            yield text

    title = f"tokenize {source.name}"
    with tqdm(desc=title, unit="B", unit_scale=True, delay=1, leave=False, dynamic_ncols=True) as bar:
        for ids in tokenizer.encode_documents(texts(), workers=workers):
            side, size = ahead.popleft()
            yield side, ids, size
            bar.update(size)


# ---- Tokens -> batches


@dataclass(frozen=True)
class Batch:
    """Rows of a token stream and what comes next at each position, IGNORED where nothing does."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    start: Int32[Tensor, "B T"]  # the position in the row where this position's document begins

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.start.to(device))

    def rows(self, begin: int, end: int) -> "Batch":
        """Rows `begin` to `end`, exclusive: a micro-batch, or the share of one process."""
        return Batch(self.tokens[begin:end], self.targets[begin:end], self.start[begin:end])


def document_starts(tokens: Int64[Tensor, "B T"], bos_id: int) -> Int32[Tensor, "B T"]:
    """For every position the last position of `bos_id` up to it, or 0: its document's beginning."""
    return _starts(tokens == bos_id)


def _starts(opens: Bool[Tensor, "B T"]) -> Int32[Tensor, "B T"]:
    positions = torch.arange(opens.shape[1], device=opens.device)
    return torch.where(opens, positions, 0).cummax(dim=1).values.to(torch.int32)


class Row(NamedTuple):
    """One row of a batch; the numbers in any type of integers."""

    tokens: Int[np.ndarray, " T"] | UInt[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"] | UInt[np.ndarray, " T"]
    opens: Bool[np.ndarray, " T"]  # whether a document begins here; the row's first position need not say


def stack(rows: Sequence[Row], block_size: int) -> Batch:
    """The batch of `rows`, which may be none."""
    tokens, targets = (np.empty((len(rows), block_size), np.int64) for _ in range(2))
    opens = np.empty((len(rows), block_size), bool)
    for i, row in enumerate(rows):
        tokens[i], targets[i], opens[i] = row
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), _starts(torch.from_numpy(opens)))


def _batch(rows: Int64[np.ndarray, "B T_plus_1"], bos_id: int) -> Batch:
    """A batch of rows that carry one token more at their end, for the last target."""
    tokens, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
    return Batch(tokens, targets, document_starts(tokens, bos_id))


@runtime_checkable
class RowStream(Protocol):
    """The rows of one source, epoch after epoch, each epoch in another order.

    Which row it is follows from seed, name, epoch and position alone: only the last two need saving,
    and no other source and no weight changes it.
    """

    epoch: int
    position: int  # rows of this epoch given so far
    length: int  # rows of this epoch

    def seek(self, epoch: int, position: int) -> None:
        """Go to the `position`-th row of an epoch."""

    def next(self) -> Row:
        """The next row, of the next epoch where this one is over."""


@runtime_checkable
class RowSource(Protocol):
    """What a mixture draws from: text (TokenizedSource) or conversations (packing.EncodedSource)."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def skipped(self) -> dict[str, int]: ...

    def rows(self, block_size: int, seed: int) -> RowStream:
        """Its training rows of `block_size` tokens."""


class _ShuffledRows:
    """The rows of one stream of text, a RowStream.

    Row i is tokens[phase + i·T : phase + (i+1)·T + 1]; its last token is the first of row i+1. An
    epoch leaves out fewer than 2T tokens, before the phase and behind the last whole row. Phase
    and order are drawn anew for each epoch. The order takes 8 bytes a row in memory.
    """

    def __init__(self, source: TokenizedSource, block_size: int, seed: int):
        self.source, self.block_size, self.seed = source, block_size, seed
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        size, length = self.block_size, len(self.source.train)
        random = epoch_generator(self.seed, self.source.name, epoch)
        self.phase = int(random.integers(min(size, length - size)))
        self.length = (length - 1 - self.phase) // size
        self.order = random.permutation(self.length)

    def next(self) -> Row:
        if self.position == self.length:
            self.seek(self.epoch + 1, 0)
        begin = self.phase + int(self.order[self.position]) * self.block_size
        self.position += 1
        ids = self.source.train[begin : begin + self.block_size + 1]
        return Row(ids[:-1], ids[1:], ids[:-1] == self.source.bos_id)


class Mixture:
    """Rows drawn from several sources: each row's source by weight, its rows in shuffled order.

    All rows are equally long, so in expectation a source's share of the tokens is exactly its share
    of the weights. The sequence of rows is a function of sources, weights, block size and seed
    alone: not of how many are asked for at a time, nor of being stopped and resumed.
    """

    def __init__(self, sources: Sequence[RowSource], block_size: int, seed: int):
        """Raises InputError for two sources of one name and for one too short to give a row."""
        check_names(source.name for source in sources)
        weights = np.array([source.weight for source in sources])
        self.sources, self.block_size, self.seed = list(sources), block_size, seed
        self.shares = weights / weights.sum()
        self.drawn = [0] * len(sources)
        self.streams = [source.rows(block_size, seed) for source in sources]
        self.choices = _generator(seed)

    def next_rows(self, n: int) -> Batch:
        """The next `n` rows."""
        # The shares divide [0, 1): each row's number falls into the part of its source.
        bounds = self.shares.cumsum()[:-1]
        chosen = np.searchsorted(bounds, self.choices.random(n), side="right").tolist()
        rows = []
        for source in chosen:
            rows.append(self.streams[source].next())
            self.drawn[source] += 1
        return stack(rows, self.block_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture stands, in a few numbers that JSON can hold."""
        own = zip(self.sources, self.drawn, self.streams, strict=True)
        sources = {
            source.name: {
                "fingerprint": source.fingerprint,
                "rows": drawn,
                "epoch": stream.epoch,
                "position": stream.position,
            }
            for source, drawn, stream in own
        }
        return {"block_size": self.block_size, "seed": self.seed, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a mixture stood. Raises InputError, naming what differs, for another one."""
        for what in ("block_size", "seed"):
            _check_same(what, state[what], getattr(self, what))
        saved = state["sources"]
        _check_same("data sources", ", ".join(saved), ", ".join(s.name for s in self.sources))
        for i, source in enumerate(self.sources):
            at = saved[source.name]
            _check_same(f"content of {source.name!r}", at["fingerprint"], source.fingerprint)
            self.drawn[i] = at["rows"]
            self.streams[i].seek(at["epoch"], at["position"])
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
                "epochs": stream.epoch + stream.position / stream.length,
                "skipped": source.skipped,
            }
            for source, share, drawn, stream in own
        ]


def source_line(report: Mapping[str, Any]) -> str:
    """What a mixture reports of one source, as a line to read."""
    line = "{name}: {tokens:,} tokens, {realised:.1%} of all, {epochs:.2f} epochs".format(**report)
    return line + "".join(f", {count} {what} skipped" for what, count in report["skipped"].items())


def _check_same(what: str, was: Any, now: Any) -> None:
    if was != now:
        raise InputError(f"cannot resume: {what} was {was} and is now {now}; put back the old one")


class Shuffled(Generic[Item]):
    """Items without end, every one once an epoch, in an order that follows from (seed, name, epoch)."""

    def __init__(self, items: Sequence[Item], name: str, seed: int, fingerprint: str) -> None:
        """`name` says what the items are, in the plural; their `fingerprint` changes with their content."""
        self.items, self.name, self.seed, self.fingerprint = items, name, seed, fingerprint
        self._seek(0, 0)

    def _seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self.order = epoch_generator(self.seed, self.name, epoch).permutation(len(self.items)).tolist()

    def next(self, count: int) -> list[Item]:
        """The next `count` items."""
        taken = []
        for _ in range(count):
            if self.position == len(self.order):
                self._seek(self.epoch + 1, 0)
            taken.append(self.items[self.order[self.position]])
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                f"cannot resume: the {self.name} are other ones than the run's; put the old ones back"
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self.items):
            raise ValueError(f"no position {position} in epoch {epoch}")
        self._seek(epoch, position)


def epoch_generator(seed: int, name: str, epoch: int) -> np.random.Generator:
    """The randomness of one epoch of one source."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _generator(seed, int.from_bytes(digest), epoch)


def _generator(*key: int) -> np.random.Generator:
    # Not numpy's default, which may change; the length tells (s,) from (s, 0, 0).
    return np.random.Generator(np.random.PCG64((len(key), *key)))


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
    rows = np.where(inside, source.val[positions * inside], source.bos_id).astype(np.int64)
    batch = _batch(rows, source.bos_id)
    targets = batch.targets.masked_fill(~torch.from_numpy(inside[:, 1:]), IGNORED)
    return Batch(batch.tokens, targets, batch.start)


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
