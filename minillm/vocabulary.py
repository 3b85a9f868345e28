"""A byte-level BPE vocabulary, and the file it lives in: Hugging Face's `tokenizer.json`.

The `tokenizers` library reads what this writes and gives the same ids. A file that asks for
something else (Unigram, WordPiece, SentencePiece's spaces and byte fallback, dropout, a normalizer
other than NFC, added tokens that swallow the spaces around them) is refused in one line, never
read with other ids. What a file says of truncation and padding is ignored: they belong to a call.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path

import regex

from minillm.errors import InputError
from minillm.files import read_json

# A contraction, a word, a number or a run of anything else, each with the space before it; the
# white space that is left. The step "ByteLevel" of a tokenizer.json means this one.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same with contractions of any case, at most three digits together, and line breaks apart.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What means the same to `regex` and to the engine of the `tokenizers` library. On the rest, such as
# sets within sets, they differ.
_ESCAPE = r"\\(?:[pP]\{\w+\}|u[0-9A-Fa-f]{4}|[sSdDrntfv]|[^\w\s])"
_SET = rf"\[\^?(?:{_ESCAPE}|[^][\\&])+\]"
_SHARED_SYNTAX = rf"(?:{_ESCAPE}|{_SET}|\((?:\?(?:i?:|=|!))?|\)|\{{\d+(?:,\d*)?\}}(?!\+)|[^][\\(){{}}^$])+"


def splitter(pattern: str) -> regex.Pattern:
    """Compile a split pattern, so that what lies between its matches is matched as well.

    Raises InputError if it is not valid, or if other libraries could read it in another way.
    """
    if not regex.fullmatch(_SHARED_SYNTAX, pattern):
        raise InputError(f"split pattern {pattern!r} has syntax on which libraries disagree")
    try:
        return regex.compile(rf"(?:{pattern})|(?s:.+?)(?=(?:{pattern})|\Z)")
    except regex.error as error:
        raise InputError(f"split pattern {pattern!r} is not valid: {error}") from None


@dataclass(frozen=True)
class Vocabulary:
    """All that determines the ids of a text. Raises InputError if it is not complete.

    vocab           ordinary tokens and their ids, among them all 256 bytes
    merges          the pairs to merge, lowest rank first
    special_tokens  names and ids of tokens that are read in a text only when asked for
    patterns        how a text is split: each pattern cuts the pieces that the one before left
    plain_tokens    names and ids of added tokens that are read in every text
    nfc             whether a text is put into Unicode's composed form first
    ignore_merges   whether a piece that is a token as a whole needs no merges
    post_processor  what another tool puts around a text, as its tokenizer.json has it; only kept
    """

    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]
    patterns: tuple[str, ...]
    plain_tokens: Mapping[str, int] | None = None
    nfc: bool = False
    ignore_merges: bool = False
    post_processor: dict | None = None

    def __post_init__(self) -> None:
        missing = sum(bytes([byte]) not in self.vocab for byte in range(256))
        if missing:
            raise InputError(f"{missing} of the 256 bytes have no token, so some texts have no ids")
        for rank, (left, right) in enumerate(self.merges):
            for token in (left, right, left + right):
                if token not in self.vocab:
                    raise InputError(f"merge {rank}, {left!r} {right!r}, lacks a token {token!r}")
        for name, i in self.added_tokens.items():
            with suppress(KeyError):  # on disk, ordinary tokens are written in letters too
                if self.vocab.get(unspell(name), i) != i:
                    raise InputError(f"special token {name!r} is spelled like an ordinary one")
        _ = self.tokens, *map(splitter, self.patterns)  # both raise what is wrong with them

    @property
    def added_tokens(self) -> dict[str, int]:
        """Special and plain added tokens."""
        return {**(self.plain_tokens or {}), **self.special_tokens}

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of every id; a special token's are its name."""
        tokens: dict[int, bytes] = {}
        added = ((name.encode(), i) for name, i in self.added_tokens.items())
        for token, i in chain(self.vocab.items(), added):
            if tokens.setdefault(i, token) != token:
                raise InputError(f"id {i} belongs to two tokens, {tokens[i]!r} and {token!r}")
        if tokens.keys() != set(range(len(tokens))):
            raise InputError(f"ids have holes: {len(tokens)} tokens need 0 to {len(tokens) - 1}")
        return [tokens[i] for i in range(len(tokens))]


# --- writing --------------------------------------------------------------------------------------


def to_json(vocabulary: Vocabulary) -> str:
    """The text of tokenizer.json, one token or merge a line."""
    added, vocab = vocabulary.added_tokens, dict(vocabulary.vocab)
    spelled = {spell(token): i for token, i in vocab.items()}
    # Readers number added tokens after all others; one that comes earlier must stand among them.
    spelled |= {name: i for name, i in added.items() if i < max(vocab.values())}
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in vocabulary.patterns
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(name, i, special=name in vocabulary.special_tokens)
            for name, i in sorted(added.items(), key=itemgetter(1))
        ],
        "normalizer": {"type": "NFC"} if vocabulary.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": vocabulary.post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.ignore_merges,
            "vocab": dict(sorted(spelled.items(), key=itemgetter(1))),
            "merges": [f"{spell(left)} {spell(right)}" for left, right in vocabulary.merges],
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _added_token(name: str, i: int, special: bool) -> dict:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **switches, "special": special}


# --- reading --------------------------------------------------------------------------------------


def read_vocabulary(file: Path) -> Vocabulary:
    """Read a tokenizer.json. Raises InputError if it is absent, broken or of another family."""
    document = read_json(file)
    try:
        return _from_json(document)
    except InputError as error:
        reason = f"{error} (accepted: byte-level BPE, such as GPT-2's, Llama 3's, Qwen's)"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        reason = f"not a complete tokenizer.json ({detail})"
    raise InputError(f"{file}: {reason}")


def _from_json(document: dict) -> Vocabulary:
    model, added = document["model"], document.get("added_tokens", [])
    normalizer = document.get("normalizer")
    _refuse_other_families(model, document.get("decoder"))
    _refuse_other_normalizers(normalizer, added)
    _refuse_other_added_tokens(added, model["vocab"])
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return Vocabulary(
        vocab=dict(_ordinary_tokens(model["vocab"], {token["content"] for token in added})),
        merges=[(unspell(left), unspell(right)) for left, right in merges],
        special_tokens={token["content"]: token["id"] for token in added if token["special"]},
        patterns=tuple(_split_patterns(document["pre_tokenizer"])),
        plain_tokens={token["content"]: token["id"] for token in added if not token["special"]},
        nfc=normalizer is not None,
        ignore_merges=model.get("ignore_merges", False),
        post_processor=document.get("post_processor"),
    )


def _refuse_other_families(model: dict, decoder: dict | None) -> None:
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"its model is {model['type']}, not BPE")
    for feature in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(feature):
            raise InputError(f"its model has {feature}")
    if decoder is not None and decoder["type"] != "ByteLevel":
        raise InputError(f"its decoder is {decoder['type']}, not ByteLevel")


def _refuse_other_normalizers(normalizer: dict | None, added: list[dict]) -> None:
    if normalizer not in (None, {"type": "NFC"}):
        raise InputError(f"its normalizer is {normalizer['type']}, not NFC")
    if normalizer and any(token["normalized"] for token in added):
        raise InputError("its added tokens are looked for in normalized text")


def _refuse_other_added_tokens(added: list[dict], vocab: dict[str, int]) -> None:
    for token in added:
        for switch in ("single_word", "lstrip", "rstrip"):
            if token[switch]:
                raise InputError(f"its added token {token['content']!r} has {switch}")
        if vocab.get(token["content"], token["id"]) != token["id"]:
            raise InputError(f"its added token {token['content']!r} has two ids")
    later = [token["id"] for token in added if token["content"] not in vocab]
    if later != list(range(len(vocab), len(vocab) + len(later))):
        raise InputError("the ids of its added tokens do not follow those of its vocabulary")


def _split_patterns(step: dict | None) -> list[str]:
    """The patterns that a pre_tokenizer amounts to. Bytes come last: patterns are about text."""
    match step:
        case {"type": "Sequence", "pretokenizers": [*splits, {"type": "ByteLevel"} as last]}:
            return [_split_pattern(split) for split in splits] + _split_patterns(last)
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return [GPT2_PATTERN] if rest.get("use_regex", True) else []
        case {"type": "ByteLevel"}:
            raise InputError("its pre_tokenizer adds a space before each text (add_prefix_space)")
    raise InputError(f"its pre_tokenizer is {step['type'] if step else 'absent'}, not ByteLevel")


def _split_pattern(step: dict) -> str:
    isolated = (step.get("behavior"), step.get("invert")) == ("Isolated", False)
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}} if isolated:
            return pattern
        case {"type": "Split", "pattern": {"String": literal}} if isolated:
            return regex.escape(literal)
        case {"type": "Digits", "individual_digits": individual}:
            return r"\p{N}" if individual else r"\p{N}+"
    raise InputError(f"its pre_tokenizer has a {step['type']} of another kind than Isolated")


def _ordinary_tokens(vocab: dict[str, int], added: set[str]) -> Iterator[tuple[bytes, int]]:
    for spelled, i in vocab.items():
        if type(i) is not int:
            raise InputError(f"its token {spelled!r} has the id {i!r}, not a whole number")
        try:
            yield unspell(spelled), i
        except KeyError:  # only an added token may have letters that stand for no byte
            if spelled not in added:
                raise InputError(f"its token {spelled!r} is not in byte-level letters") from None


# --- the letters that stand for bytes on disk -----------------------------------------------------


@cache
def _letter_of_byte() -> dict[int, str]:
    """A byte that prints is written as itself, the others as the letters from U+0100 on (GPT-2)."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in _letter_of_byte().items()}


def spell(token: bytes) -> str:
    """The letters that stand for a token's bytes: b" the" → "Ġthe"."""
    return token.decode("latin-1").translate(_letter_of_byte())


def unspell(letters: str) -> bytes:
    """The bytes that letters stand for: "Ġthe" → b" the". KeyError for any other letter."""
    return bytes(map(_byte_of_letter().__getitem__, letters))
