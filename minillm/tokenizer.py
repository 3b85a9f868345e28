"""Byte-level BPE: from text to token ids and back, for any text.

A text is cut into pieces (words, numbers, runs of punctuation or of white space) by a regular
expression, and a piece is first the bytes of its UTF-8. Training repeats one step: find the pair of
neighbouring tokens that is most frequent in all pieces, and make it a new token. Encoding replays
those merges in each piece.

The method is from Sennrich et al. 2016 (arXiv 1508.07909, section 3.2), over bytes as in GPT-2
(Radford et al. 2019, section 2.2). Left out: other kinds of vocabulary (see vocabulary.py),
dropout, and the offsets of tokens in their text.

One trick makes this fast in plain Python: a piece is a `str` whose characters are token ids
(`chr(id)`) and a pair is a `str` of two, so that splitting, joining, comparing and looking up run
in C.
"""

import hashlib
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, islice, pairwise
from operator import add, itemgetter
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import regex

from minillm.errors import InputError
from minillm.files import read_json, read_text, write_json, write_text
from minillm.vocabulary import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    Vocabulary,
    read_vocabulary,
    splitter,
    to_json,
)
from minillm.workers import map_in_processes

__all__ = ["ENDOFTEXT", "GPT2_PATTERN", "GPT4_PATTERN", "SPECIAL_TOKENS", "Tokenizer"]

ENDOFTEXT = "<|endoftext|>"
SPECIAL_TOKENS = (ENDOFTEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|mask|>")

CACHED_WORDS = 1 << 18  # a few tens of megabytes at most
CACHED_WORD_LENGTH = 64  # in characters; longer pieces seldom come twice
BATCH_LENGTH = 1 << 20  # characters that go to a worker process at a time

# --- training -------------------------------------------------------------------------------------


def count_words(texts: Iterable[str], special_tokens: Iterable[str], pattern: str) -> Counter[str]:
    """How often each piece occurs; none spans two texts or the two sides of a special token."""
    special, pieces = _any_of(special_tokens), splitter(pattern)
    counts: Counter[str] = Counter()
    for text in map(_without_surrogates, texts):
        for section in special.split(text)[::2] if special else [text]:
            counts.update(map(itemgetter(0), pieces.finditer(section)))
    return counts


def learn_merges(word_counts: Mapping[str, int], new_tokens: int) -> list[tuple[bytes, bytes]]:
    """The pairs to merge, in order, until `new_tokens` tokens are made or no pair is left.

    Each is the most frequent pair of its time; of equally frequent ones, the lexicographically
    greatest pair of byte strings. The heap is lazy: an entry keeps the count its pair had when it
    was pushed, and is corrected when it surfaces. That suffices because a pair that grows is
    pushed again.
    """
    pairs = _PairIndex(word_counts)
    tokens = [bytes([byte]) for byte in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    merges: dict[tuple[bytes, bytes], None] = {}

    def entry(pair: str) -> tuple[int, str, str, str]:
        left, right = (_descending(tokens[ord(symbol)]) for symbol in pair)
        return -pairs.counts[pair], left, right, pair

    heap = [entry(pair) for pair in pairs.counts]
    heapify(heap)
    while heap and len(tokens) < 256 + new_tokens:
        minus_count, _, _, pair = heap[0]
        if not pairs.counts.get(pair):
            heappop(heap)
        elif minus_count != -pairs.counts[pair]:
            heapreplace(heap, entry(pair))
        else:
            left, right = (tokens[ord(symbol)] for symbol in pair)
            merges[left, right] = None
            if left + right not in ids:  # another pair may have spelled the same token
                ids[left + right] = len(tokens)
                tokens.append(left + right)
            for grown in pairs.merge(pair, chr(ids[left + right])):
                heappush(heap, entry(grown))
    return list(merges)


class _PairIndex:
    """Words, and how often each pair of neighbours is in them, updated by each merge."""

    def __init__(self, word_counts: Mapping[str, int]) -> None:
        self.words = [word.encode().decode("latin-1") for word in word_counts]
        self.word_counts = list(word_counts.values())
        self.counts: dict[str, int] = defaultdict(int)  # pair → how often in the whole text
        self.where: dict[str, list[int]] = defaultdict(list)  # pair → words that had it once
        for i, (word, count) in enumerate(zip(self.words, self.word_counts, strict=True)):
            for pair in map(add, word, word[1:]):
                self.counts[pair] += count
                self.where[pair].append(i)

    def merge(self, pair: str, product: str) -> set[str]:
        """Put `product` for `pair` in all words. Returns the pairs whose counts grew."""
        grown = set()
        for i in set(self.where.pop(pair)):
            parts, count = self.words[i].split(pair), self.word_counts[i]
            if len(parts) > 1:  # else an earlier merge has taken it away
                self.words[i] = product.join(parts)
            for old, new in _changed_pairs(parts, pair, product):
                self.counts[old] -= count
                self.counts[new] += count
                self.where[new].append(i)
                grown.add(new)
        del self.counts[pair]
        return grown


def _changed_pairs(parts: list[str], pair: str, product: str) -> Iterator[tuple[str, str]]:
    """The (old, new) neighbours of each `pair` that stood between two of `parts`."""
    first, second = pair[0], pair[1]
    for i, (before, after) in enumerate(pairwise(parts)):
        if before:
            yield before[-1] + first, before[-1] + product
        elif i:  # it stood right behind another one
            yield second + first, product + product
        if after:
            yield second + after[0], product + after[0]


@cache
def _descending(token: bytes) -> str:
    """A key that sorts byte strings from the greatest to the smallest, prefixes last."""
    return "".join(chr(255 - byte) for byte in token) + chr(256)


# --- the tokenizer --------------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back. Make one with `train` or `load`.

    `config` is what tokenizer_config.json holds: the names of bos_token, eos_token, pad_token and
    mask_token, and whatever else a caller or another tool puts there, such as chat_template.
    """

    def __init__(self, vocabulary: Vocabulary, config: dict | None = None) -> None:
        """Without `config`, <|endoftext|> and <|mask|> play their parts where they exist."""
        self.vocabulary, self.special_tokens = vocabulary, dict(vocabulary.special_tokens)
        self.config = _default_config(self.special_tokens) if config is None else dict(config)
        self._added = vocabulary.added_tokens
        self._find_plain, self._find_added = _any_of(vocabulary.plain_tokens), _any_of(self._added)
        self._splitters = [splitter(pattern) for pattern in vocabulary.patterns]
        symbol = {token: chr(i) for token, i in vocabulary.vocab.items()}
        self._symbol_of_byte = {byte: symbol[bytes([byte])] for byte in range(256)}
        self._merge_of = {  # pair → (rank, what it becomes)
            symbol[left] + symbol[right]: (rank, symbol[left + right])
            for rank, (left, right) in enumerate(vocabulary.merges)
        }
        self._words = _WordCache(self._encode_word)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        pattern: str = GPT4_PATTERN,
    ) -> "Tokenizer":
        """Learn `vocab_size` tokens: the bytes by value, merges in order, the special tokens last.

        The words of the texts and their counts decide alone; see `learn_merges` for ties. With too
        few different words it ends early, as `vocab_size` then shows. InputError if it is too
        small.
        """
        special_tokens = list(dict.fromkeys(special_tokens))
        smallest = 256 + len(special_tokens)
        if not smallest <= vocab_size < sys.maxunicode:
            raise InputError(
                f"vocab_size {vocab_size}: must be at least {smallest} (256 bytes and "
                f"{len(special_tokens)} special tokens) and below {sys.maxunicode}"
            )
        words = count_words(texts, special_tokens, pattern)
        merges = learn_merges(words, vocab_size - smallest)
        tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in merges]
        vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        special = {name: i for i, name in enumerate(special_tokens, start=len(vocab))}
        return cls(Vocabulary(vocab, merges, special, (pattern,)))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, without bos or eos.

        What looks like a special token is plain text unless `special`. A lone surrogate, which has
        no UTF-8, counts as U+FFFD.
        """
        try:
            return self._encode(text, special)
        except UnicodeEncodeError:
            return self._encode(_without_surrogates(text), special)

    def _encode(self, text: str, special: bool) -> list[int]:
        find = self._find_added if special else self._find_plain
        ids: list[int] = []
        for i, section in enumerate(find.split(text) if find else [text]):
            if i % 2:  # every second one is an added token
                ids.append(self._added[section])
            else:
                ids.extend(chain.from_iterable(map(self._words.__getitem__, self._pieces(section))))
        return ids

    def _pieces(self, text: str) -> Iterable[str]:
        pieces: Iterable[str] = [unicodedata.normalize("NFC", text) if self.vocabulary.nfc else text]
        for pattern in self._splitters:
            matches = chain.from_iterable(map(pattern.finditer, pieces))
            pieces = map(itemgetter(0), matches)
        return pieces

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of one piece: merge the pair of lowest rank, leftmost first, until none is left.

        A heap over a linked list, so that even a piece of a million letters takes n log n steps.
        """
        data = word.encode()
        if self.vocabulary.ignore_merges and data in self.vocabulary.vocab:
            return (self.vocabulary.vocab[data],)
        symbols = list(data.decode("latin-1").translate(self._symbol_of_byte))
        end, merge_of = len(symbols), self._merge_of
        previous, following = list(range(-1, end - 1)), list(range(1, end + 1))
        pairs = enumerate(map(add, symbols, symbols[1:]))
        heap = [(merge_of[pair][0], i, pair) for i, pair in pairs if pair in merge_of]
        heapify(heap)
        while heap:
            _, i, pair = heappop(heap)
            j = following[i]
            if j == end or symbols[i] + symbols[j] != pair:
                continue  # one of the two has gone into another merge
            symbols[i], symbols[j] = merge_of[pair][1], ""
            following[i] = following[j]
            if following[i] < end:
                previous[following[i]] = i
            for left, right in ((previous[i], i), (i, following[i])):
                if left >= 0 and right < end:
                    pair = symbols[left] + symbols[right]
                    if pair in merge_of:
                        heappush(heap, (merge_of[pair][0], left, pair))
        return tuple(map(ord, "".join(symbols)))

    def encode_documents(self, texts: Iterable[str], workers: int = 1) -> Iterator[np.ndarray]:
        """The ids (uint32) of each text, in order, while the texts stream in.

        Above a megabyte of text, `workers` processes share the work, with the same ids; at most two
        megabytes for each of them (or its longest texts) are in memory. InputError if one dies.
        """
        if workers > 1:
            batches = _batches(texts)
            head = list(islice(batches, 2))
            if len(head) == 2:
                arrays = map_in_processes(self._encode_batch, chain(head, batches), workers)
                yield from chain.from_iterable(arrays)
                return
            texts = chain.from_iterable(head)
        for text in texts:
            yield np.array(self.encode(text), dtype=np.uint32)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return list(self.encode_documents(texts))

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of the ids, a special token's being its name. InputError outside 0 … V-1."""
        ids = np.fromiter(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"token id {wrong} is not in this vocabulary of {self.vocab_size}")
        return b"".join(map(self.vocabulary.tokens.__getitem__, ids.tolist()))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        """V: the bytes, merges and special tokens together."""
        return len(self.vocabulary.tokens)

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """The bytes of text in each token [V] (int64); 0 for a special token."""
        lengths = np.array([len(token) for token in self.vocabulary.tokens], dtype=np.int64)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    @property
    def bos_id(self) -> int | None:
        """The token that opens a document: if none is named, the one that ends it."""
        bos, eos = self._role("bos_token"), self.eos_id
        return eos if bos is None else bos

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document."""
        return self._role("eos_token")

    @property
    def mask_id(self) -> int | None:
        """The token that hides another one in masked training."""
        return self._role("mask_token")

    def _role(self, role: str) -> int | None:
        name = self.config.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not (isinstance(name, str) and name in self._added):
            raise InputError(f"{role} {name!r} is not among the special tokens of the vocabulary")
        return None if name is None else self._added[name]

    @cached_property
    def fingerprint(self) -> str:
        """A hex digest of all that determines a document's ids."""
        content = f"{to_json(self.vocabulary)}{self.bos_id} {self.eos_id}"
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read tokenizer.json, given its folder or its name, and tokenizer_config.json beside it.

        InputError if the file is absent, broken, or of a kind that this tokenizer is not.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        vocabulary, settings = read_vocabulary(file), file.with_name("tokenizer_config.json")
        tokenizer = cls(vocabulary, _read_config(settings) if settings.exists() else None)
        try:  # an unknown name is an error now, not in the middle of a run
            _ = tokenizer.bos_id, tokenizer.mask_id
        except InputError as error:
            raise InputError(f"{settings}: {error}") from None
        return tokenizer

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, or the first under a name
        in .json and the second beside it; each whole or not at all."""
        file = Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"
        config = {"clean_up_tokenization_spaces": False, **self.config}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one that obeys tokenizer.json
        write_text(file, to_json(self.vocabulary))
        write_json(file.with_name("tokenizer_config.json"), config)


class _WordCache(dict[str, tuple[int, ...]]):
    """word → ids, worked out when first looked up; emptied when full."""

    def __init__(self, encode_word: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self.encode_word(word)
        if len(self) >= CACHED_WORDS:
            self.clear()
        if len(word) <= CACHED_WORD_LENGTH:
            self[word] = ids
        return ids


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of BATCH_LENGTH characters together, or a little more."""
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _any_of(names: Iterable[str] | None) -> regex.Pattern | None:
    """A pattern that captures the leftmost, then longest, of `names`; None if there are none."""
    longest_first = sorted(names or (), key=len, reverse=True)
    if "" in longest_first:
        raise InputError("a special token must have at least one character")
    pattern = "|".join(map(regex.escape, longest_first))
    return regex.compile(f"({pattern})") if pattern else None


def _without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _default_config(special_tokens: Mapping[str, int]) -> dict:
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), ENDOFTEXT)
    names["mask_token"] = "<|mask|>"
    return {role: name for role, name in names.items() if name in special_tokens}


def _read_config(file: Path) -> dict:
    """tokenizer_config.json; a chat template in a file of its own, as newer tools write, wins."""
    config, template = read_json(file), file.with_name("chat_template.jinja")
    if template.exists():
        config["chat_template"] = read_text(template)
    return config
