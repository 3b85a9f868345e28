"""Documents and conversations → what is trained on and what is held out → tokens.

    text:           Source ──split_documents──tokenize──► TokenizedSource, on disk
    conversations:  messages ──encode_source──split_by_hash──► EncodedSource, in memory

data.py makes rows and batches of both. Copies of a text, and two answers to one question, land on one side.
"""

import bisect
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt
from tqdm import tqdm

from minillm.chat import Conversation, Dialogue
from minillm.data import Encoded, EncodedSource, Side, Skipped, TokenizedSource, seed_of
from minillm.digest import digest
from minillm.errors import InputError
from minillm.tokenizer import ENDOFTEXT, Tokenizer

Item = TypeVar("Item")
SIDES: tuple[Side, Side] = ("train", "val")
Tokens = UInt[np.ndarray, " L"]

FEW_DOCUMENTS = 20  # below this, validation takes the tail of every document, not whole documents
LARGE_DOCUMENT = 1 / 16  # of the text to hold out: a larger one is cut, as it would be all of it or none
SAMPLE_PART = 16_384  # characters that a tokenizer's training text takes from one place
FORMAT_VERSION = 2  # of the tokens on disk and the split: part of every cache's name


# ---- What is trained on and what is held out


@dataclass(frozen=True)
class Source:
    """A named stream of documents (texts, conversations, prompts, comparisons) with a weight in the mixture;
    `documents()` starts a new pass over it."""

    name: str
    weight: float
    documents: Callable[[], Iterator[Any]]
    fingerprint: str = ""
    """Changes with the documents, if they are texts."""
    size: int | None = None
    """About how many bytes they have; None where the order is random: the first ones are a fair sample."""
    skipped: Skipped = field(default_factory=Skipped)
    """Files that were left out, by reason; and, but for texts, what the latest pass left out."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What the latest pass over texts left out or replaced, by reason."""


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


def split_by_hash(
    items: Sequence[Item], hashes: Sequence[float], fraction: float
) -> tuple[list[Item], list[Item]]:
    """The items to train on and those held out, by a hash of each: about a share `fraction` is held out,
    equal ones together, always the smallest hash and never the largest, so that no side is empty where there
    are two."""
    smallest, largest = min(hashes, default=0.0), max(hashes, default=0.0)
    train, val = list[Item](), list[Item]()
    for item, value in zip(items, hashes, strict=True):
        held_out = fraction > 0 and (value < fraction or value == smallest) and value < largest
        (val if held_out else train).append(item)
    return train, val


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
    """The tokens (bos, eos) around a document; one that it lacks is replaced by the other. What is called eos
    may be the end of a reply (Qwen, Llama 3): a token whose name says it ends a text goes first."""
    special, eos = tokenizer.special_tokens, tokenizer.eos_id
    eos = special.get("<|end_of_text|>", special.get(ENDOFTEXT, eos))
    bos = eos if tokenizer.config.get("bos_token") is None else tokenizer.bos_id
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


def encode_source(
    source: Source, encode: Callable[[Conversation], Dialogue], block_size: int, val_fraction: float = 0.05
) -> EncodedSource:
    """The conversations of `source` (io/conversations.py) as tokens, none longer than a row.

    A longer one is cut after the last reply with which it fits. Where none does, where `encode` raises
    InputError, or where no token of it is the assistant's, it is left out; all is counted. Two answers to one
    question land on one side: the first user message decides, or all messages where that is always the same.
    InputError where nothing is left to train on; there may be nothing to validate on.
    """
    skipped, kept, by_question, by_all = Skipped(), list[Encoded](), list[float](), list[float]()
    bar = tqdm(source.documents(), f"encode {source.name}", delay=1, leave=False, dynamic_ncols=True)
    for number, conversation in enumerate(bar, start=1):
        place = f"conversation {number} of {source.name!r}"
        try:
            dialogue, reason = _fitted(conversation, encode, block_size + 1)
        except InputError as error:
            skipped.add("conversations that the chat template refuses", f"{place}: {error}")
            continue
        if dialogue:
            ids = np.array(dialogue.tokens, np.uint32)
            small = ids.astype(np.uint16) if ids.max() < 2**16 else ids
            kept.append((small, np.array(dialogue.loss_mask)))
            question = next((m["content"] for m in conversation if m["role"] == "user"), "")
            by_question.append(unit_hash(question))
            by_all.append(unit_hash(json.dumps(conversation)))
            if dialogue.unlearned:
                skipped["replies not learned: the chat template writes them anew later"] += dialogue.unlearned
        if reason:
            skipped.add(reason, f"{place} is among the {reason}")
    skipped.update(source.skipped)
    skipped.first = source.skipped.first or skipped.first
    if not kept:
        what = f"data source {source.name!r}: no conversation to train on ({skipped.first or 'too few'})"
        raise InputError(f"{what}; give more, or a larger block size")
    train, val = split_by_hash(kept, by_question if len(set(by_question)) > 1 else by_all, val_fraction)
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
