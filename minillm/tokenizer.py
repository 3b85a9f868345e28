"""Byte-level BPE: from text to token ids and back, for any text.

A regular expression cuts a text into words (here also numbers, runs of punctuation or of white space), and
the first tokens of a word are the bytes of its UTF-8. Training repeats one step: find the pair of
neighbouring tokens that is most frequent in all words, and make it a new token. Encoding replays those
merges in each word.

The method is from Sennrich et al. 2016 (arXiv 1508.07909, section 3.2), over bytes as in GPT-2
(Radford et al. 2019, section 2.2). Left out: dropout, the offsets of tokens in their text, and other
kinds of vocabulary, which io/vocabulary.py opens.

One trick makes this fast in plain Python: a word is a `str` whose characters are token ids
(`chr(id)`) and a pair is a `str` of two, so that splitting, joining, comparing and looking up run
in C.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, pairwise
from operator import add, itemgetter
from typing import Any, SupportsIndex

import numpy as np
import regex

from minillm.digest import digest
from minillm.errors import InputError

ENDOFTEXT = "<|endoftext|>"
SPECIAL_TOKENS = (ENDOFTEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|mask|>")

# A contraction; a word (letters with their combining marks, and the joiners inside words of Persian and
# Indic scripts) with the space or sign before it; at most three digits; signs with the line breaks after
# them; white space. GPT-4's pattern (tiktoken's cl100k_base), but there words end at every combining mark.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}\u200c\u200d]*|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's, which the step "ByteLevel" of a tokenizer.json means.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CACHED_WORDS = 1 << 18  # a few tens of megabytes at most
CACHED_WORD_LENGTH = 64  # in characters; longer words seldom come twice
LONGEST_WORD = 1 << 16  # in characters: a longer word is cut there, so that memory stays bounded
SPLIT_SECONDS = 60.0  # to split a text by a pattern from elsewhere, which may backtrack for ever

# --- training -------------------------------------------------------------------------------------


def count_words(texts: Iterable[str], special_tokens: Iterable[str], pattern: str) -> Counter[str]:
    """How often each word occurs; none spans two texts or the two sides of a special token."""
    special, split = _any_of(special_tokens), splitter(pattern)
    counts: Counter[str] = Counter()
    for text in map(without_surrogates, texts):
        for section in special.split(text)[::2] if special else [text]:
            counts.update(split(section))
    for word in [word for word in counts if len(word) > LONGEST_WORD]:
        count = counts.pop(word)
        for part in _parts(word):
            counts[part] += count
    return counts


def learn_merges(word_counts: Mapping[str, int], new_tokens: int) -> list[tuple[bytes, bytes]]:
    """The pairs to merge, in order, until `new_tokens` tokens are made or no pair is left.

    Each is the most frequent pair after the merges before it; of equally frequent ones, the lexicographically
    greatest pair of byte strings. The heap is lazy: an entry keeps the count its pair had when it
    was pushed, and is corrected when it surfaces. That suffices because a pair that grows is
    pushed again.
    """
    pairs = _PairIndex(word_counts)
    tokens = [bytes([byte]) for byte in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    merges: dict[tuple[bytes, bytes], None] = {}  # an ordered set: a merged pair can come up again

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
        self.words = [word.encode().decode("latin-1") for word in word_counts]  # a character per byte
        self.word_counts = list(word_counts.values())
        self.counts: dict[str, int] = defaultdict(int)  # pair → how often in the whole text
        self.where: dict[str, list[int]] = defaultdict(list)  # pair → numbers of words that have or had it
        for i, (word, count) in enumerate(zip(self.words, self.word_counts, strict=True)):
            for pair in map(add, word, word[1:]):
                self.counts[pair] += count
                self.where[pair].append(i)

    def merge(self, pair: str, product: str) -> set[str]:
        """Replaces `pair` by `product` in all words. Returns the pairs whose counts grew."""
        grown = set()
        for i in set(self.where.pop(pair)):
            parts, count = self.words[i].split(pair), self.word_counts[i]
            if len(parts) > 1:  # else an earlier merge has removed the pair
                self.words[i] = product.join(parts)
            for old, new in _changed_pairs(parts, pair, product):
                self.counts[old] -= count
                self.counts[new] += count
                self.where[new].append(i)
                grown.add(new)
        del self.counts[pair]
        return grown


def _changed_pairs(parts: list[str], pair: str, product: str) -> Iterator[tuple[str, str]]:
    """For each `pair` between two of `parts`, the pairs with its neighbours: (before, after) the merge."""
    first, second = pair[0], pair[1]
    for i, (before, after) in enumerate(pairwise(parts)):
        if before:
            yield before[-1] + first, before[-1] + product
        elif i:  # two occurrences of `pair` in a row
            yield second + first, product + product
        if after:
            yield second + after[0], product + after[0]


@cache
def _descending(token: bytes) -> str:
    """A key that sorts byte strings from the greatest to the smallest, prefixes last."""
    return "".join(chr(255 - byte) for byte in token) + chr(256)


# --- the vocabulary -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE: all that determines the ids of a text."""

    vocab: dict[bytes, int]
    """Ordinary tokens, among them all 256 bytes. With the special tokens their ids are 0 … V-1."""
    merges: list[tuple[bytes, bytes]]
    """The pairs to merge, lowest rank first."""
    special_tokens: dict[str, int]
    """Control tokens: found in a text only by `encode(text, special=True)`."""
    pattern: str = PATTERN
    """How a text is cut into words; what lies between two matches is a word too."""
    post_processor: dict | None = field(default=None, repr=False, compare=False)
    """What other programs put around a text, as tokenizer.json has it; only kept."""

    @property
    def added_tokens(self) -> dict[str, int]:
        """The same; in a vocabulary of others (io/vocabulary.py) also tokens that are found in any text."""
        return self.special_tokens

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of every id; a special token's are its name."""
        special = {name.encode(): i for name, i in self.special_tokens.items()}
        return [token for token, _ in sorted([*self.vocab.items(), *special.items()], key=itemgetter(1))]

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text; UnicodeEncodeError for a lone surrogate."""
        sections = self._find_special.split(text) if special and self._find_special else [text]
        ids: list[int] = []
        for i, section in enumerate(sections):
            if i % 2:  # every second one is a special token
                ids.append(self.special_tokens[section])
            else:
                ids.extend(chain.from_iterable(map(self._words.__getitem__, self._split(section))))
        return ids

    @cached_property
    def _split(self) -> Callable[[str], Iterator[str]]:
        return splitter(self.pattern)

    @cached_property
    def _find_special(self) -> regex.Pattern | None:
        return _any_of(self.special_tokens)

    @cached_property
    def _words(self) -> "_WordCache":
        return _WordCache(self.vocab, self.merges)

    def __reduce__(self) -> tuple:
        return Vocabulary, tuple(getattr(self, field.name) for field in fields(self))  # no caches


class _WordCache(dict[str, tuple[int, ...]]):
    """word → ids, worked out when first looked up; emptied when full."""

    def __init__(self, vocab: Mapping[bytes, int], merges: Iterable[tuple[bytes, bytes]]) -> None:
        super().__init__()
        symbol = {token: chr(i) for token, i in vocab.items()}
        self.symbol_of_byte = {byte: symbol[bytes([byte])] for byte in range(256)}
        # For each pair its rank and what it becomes.
        self.merge_of = {
            symbol[left] + symbol[right]: (rank, symbol[left + right])
            for rank, (left, right) in enumerate(merges)
        }

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(word) > CACHED_WORD_LENGTH:
            return tuple(chain.from_iterable(map(self._encode, _parts(word))))
        if len(self) >= CACHED_WORDS:
            self.clear()
        self[word] = ids = self._encode(word)
        return ids

    def _encode(self, word: str) -> tuple[int, ...]:
        """The ids of one word: merge the pair of lowest rank, leftmost first, until none is left.

        A heap over a linked list, so that even a long word takes n log n steps.
        """
        symbols = list(word.encode().decode("latin-1").translate(self.symbol_of_byte))
        end, merge_of = len(symbols), self.merge_of
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


def splitter(pattern: str) -> Callable[[str], Iterator[str]]:
    """What cuts a text into the matches of `pattern` and what lies between them.

    ValueError if it is not valid. TimeoutError where one from elsewhere takes minutes over a text.
    """
    try:
        compiled = regex.compile(rf"(?:{pattern})|(?s:.+?)(?=(?:{pattern})|\Z)")
    except regex.error as error:
        raise ValueError(f"split pattern {pattern!r} is not valid: {error}") from None
    limit = None if pattern in (PATTERN, GPT2_PATTERN) else SPLIT_SECONDS
    return lambda text: map(itemgetter(0), compiled.finditer(text, timeout=limit))


def _parts(word: str) -> Iterator[str]:
    """The word in parts of at most LONGEST_WORD characters."""
    return (word[i : i + LONGEST_WORD] for i in range(0, len(word), LONGEST_WORD))


# --- the tokenizer --------------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back. `train` makes one; io/vocabulary.py keeps it in a folder.

    `vocabulary` is ours or, of the same methods, another program's (io/vocabulary.py). `config` is what
    tokenizer_config.json holds: the names of bos_token, eos_token, pad_token and mask_token, and whatever
    else a caller or another tool puts there, such as chat_template.
    """

    def __init__(self, vocabulary: Any, config: dict | None = None) -> None:
        """Without `config`, <|endoftext|> is bos, eos and pad, and <|mask|> the mask, where they exist."""
        self.vocabulary, self.special_tokens = vocabulary, dict(vocabulary.special_tokens)
        self.config = _default_config(self.special_tokens) if config is None else dict(config)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        pattern: str = PATTERN,
    ) -> "Tokenizer":
        """Learn `vocab_size` tokens: the bytes by value, merges in order, the special tokens last.

        The result depends on the words and their counts alone; see `learn_merges` for ties. With too few
        different words there are fewer tokens, as `vocab_size` of the result shows. InputError for a number
        that bytes and special tokens exceed.
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
        return cls(Vocabulary(vocab, merges, special, pattern))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, without bos or eos.

        What looks like a special token is plain text unless `special`. A lone surrogate, which has
        no UTF-8, counts as U+FFFD.
        """
        try:
            return self.vocabulary.encode(text, special)
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text), special)
        except TimeoutError:
            raise InputError(
                f"the tokenizer's split pattern takes over {SPLIT_SECONDS:.0f} s; use another tokenizer"
            ) from None

    def encode_documents(self, texts: Iterable[str], workers: int = 1) -> Iterator[np.ndarray]:
        """The ids (uint32) of each text, in order, while the texts stream in.

        Above a megabyte of text `workers` processes share the work, with the same ids. InputError if one
        dies.
        """
        if workers > 1:
            from minillm.fast.workers import encode_in_processes

            return encode_in_processes(self, texts, workers)
        return (np.array(self.encode(text), np.uint32) for text in texts)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of the ids, a special token's being its name. InputError outside 0 … V-1."""
        ids, tokens = np.fromiter(ids, dtype=np.int64), self.vocabulary.tokens
        if ids.size and not 0 <= ids.min() <= ids.max() < len(tokens):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"token id {wrong} is not in this vocabulary of {len(tokens)}")
        return b"".join(map(tokens.__getitem__, ids.tolist()))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        """V: ordinary and special tokens together."""
        return len(self.vocabulary.tokens)

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """How many bytes of text each token stands for [V] (int64); 0 for a special token."""
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
        name, added = self.config.get(role), self.vocabulary.added_tokens
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not (isinstance(name, str) and name in added):
            raise InputError(f"{role} {name!r} is not among the special tokens of the vocabulary")
        return None if name is None else added[name]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that determines a document's ids."""
        return digest(repr(self.vocabulary), self.bos_id, self.eos_id)


def _any_of(names: Iterable[str]) -> regex.Pattern | None:
    """A pattern that captures the leftmost, then longest, of `names`; None if there are none."""
    pattern = "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))
    return regex.compile(f"({pattern})") if pattern else None


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _default_config(special_tokens: Mapping[str, int]) -> dict:
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), ENDOFTEXT)
    names["mask_token"] = "<|mask|>"
    return {role: name for role, name in names.items() if name in special_tokens}
