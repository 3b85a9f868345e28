"""tokenizer.json, the file in which a vocabulary lives: ours, and those of other programs.

Ours is a byte-level BPE with one split pattern (tokenizer.py); the `tokenizers` library reads what is
written here and gives the same ids. Every other file (GPT-2's, Llama's, Qwen's, SentencePiece's and
Unigram's, WordPiece's) is run by that library itself, which the extra [hf] installs.

A SentencePiece vocabulary puts a space before every text, and decoding shows it. WordPiece forgets white
space, and often capitals: what it decodes, and its bytes, are near the text and not the same.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from minillm.errors import InputError, reading
from minillm.io.disk import read_json, read_text, write_json, write_text
from minillm.tokenizer import Tokenizer, Vocabulary, splitter

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The last, as newer tools write it, wins over a chat template in the second."""
SWITCHES = ("single_word", "lstrip", "rstrip", "normalized")
"""What an added token can ask for beside its name; ours ask for nothing."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, and what tokenizer_config.json beside it says of roles, chat
    template and tokens. InputError if a file is absent or broken, or needs the `tokenizers` library and that
    is absent."""
    file, settings, template = (folder / name for name in FILES)
    document, config = read_json(file), read_json(settings) if settings.exists() else None
    with reading(file, "give a tokenizer.json as the tokenizers library writes it"):
        document["added_tokens"] = _added_tokens(document, config or {})
        vocabulary = _read_own(document) or _read_foreign(file, document)
    if config is not None and template.exists():
        config["chat_template"] = read_text(template)
    tokenizer = Tokenizer(vocabulary, config)
    try:  # so that an unknown name is an error here, not in the middle of a run
        _ = tokenizer.bos_id, tokenizer.mask_id
    except InputError as error:
        raise InputError(f"{settings}: {error}") from None
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes tokenizer.json and tokenizer_config.json, each whole or not at all."""
    file, settings, template = (folder / name for name in FILES)
    config = {"clean_up_tokenization_spaces": False, **tokenizer.config}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class that reads tokenizer.json as it is
    write_text(file, to_json(tokenizer.vocabulary))
    write_json(settings, config)
    template.unlink(missing_ok=True)  # another tokenizer's, which would win


def _added_tokens(document: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All added tokens, numbered as transformers does: by the model's vocabulary, else behind all others."""
    vocab, extra = document["model"]["vocab"], config.get("extra_special_tokens") or []
    # Unigram's is a list of pieces and scores.
    ids = dict(vocab) if isinstance(vocab, Mapping) else {piece: i for i, (piece, _) in enumerate(vocab)}
    added = {token["content"]: dict(token) for token in document.get("added_tokens") or []}
    ids |= {name: token["id"] for name, token in added.items()}
    listed = (config.get("added_tokens_decoder") or {}).items()
    named = [{**token, "id": int(i)} for i, token in sorted(listed, key=lambda item: int(item[0]))]
    special = [*(config.get("additional_special_tokens") or []), *getattr(extra, "values", lambda: extra)()]
    named += [token if isinstance(token, dict) else {"content": token} for token in special]
    for token in named:
        name, settings = token["content"], {switch: token.get(switch, False) for switch in SWITCHES}
        i = ids.setdefault(name, max(ids.values(), default=-1) + 1)
        if token.get("id", i) != i:
            raise ValueError(f"tokenizer_config.json numbers {name!r} {token['id']}, which comes to be {i}")
        known = added.setdefault(name, {"id": i, "content": name, **settings, "special": False})
        known["special"] = known["special"] or token.get("special", True)
    return list(added.values())


def to_json(vocabulary: "Vocabulary | LibraryVocabulary") -> str:
    """The text of tokenizer.json, of ours one token or merge a line."""
    if isinstance(vocabulary, LibraryVocabulary):
        return vocabulary.json
    spelled = {spell(token): i for token, i in vocabulary.vocab.items()}
    # Readers number added tokens after all others; one that comes earlier must stand among them.
    last = max(vocabulary.vocab.values())
    spelled |= {name: i for name, i in vocabulary.special_tokens.items() if i < last}
    added = [
        {"id": i, "content": name, **dict.fromkeys(SWITCHES, False), "special": True}
        for name, i in sorted(vocabulary.special_tokens.items(), key=itemgetter(1))
    ]
    form = _form(vocabulary.pattern) | {"post_processor": vocabulary.post_processor}
    form["model"] |= {
        "vocab": dict(sorted(spelled.items(), key=itemgetter(1))),
        "merges": [f"{spell(left)} {spell(right)}" for left, right in vocabulary.merges],
    }
    return json.dumps({"version": "1.0", "added_tokens": added, **form}, ensure_ascii=False, indent=1) + "\n"


# ---- Ours


def _read_own(document: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary in a file of the form that `to_json` writes; None for any other form."""
    model, added = document["model"], document.get("added_tokens", [])
    match document.get("pre_tokenizer"):
        case {"pretokenizers": [{"pattern": {"Regex": str(pattern)}}, _]}:
            form = _form(pattern)
        case _:
            return None
    found = {name: document.get(name) for name in form}
    found["model"] = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    special = all(token["special"] is True and not any(map(token.get, SWITCHES)) for token in added)
    if not special or _bare(found) != _bare(form):
        return None
    names = {token["content"]: token["id"] for token in added}
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    vocab = {unspell(name): i for name, i in model["vocab"].items() if name not in names}
    pairs = [(unspell(left), unspell(right)) for left, right in merges]
    _check(vocab, pairs, names)
    splitter(pattern)
    return Vocabulary(vocab, pairs, names, pattern, document.get("post_processor"))


def _check(vocab: dict[bytes, int], merges: list[tuple[bytes, bytes]], special: dict[str, int]) -> None:
    """ValueError where some text would have no ids, or an id no token."""
    if missing := sum(bytes([byte]) not in vocab for byte in range(256)):
        raise ValueError(f"{missing} of the 256 bytes have no token, so some texts have no ids")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(f"the merge {left!r} {right!r} lacks a token {token!r}")
    ids = sorted([*vocab.values(), *special.values()])
    if ids != list(range(len(ids))) or not all(type(i) is int for i in ids):
        raise ValueError(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    if not all(isinstance(name, str) and name for name in special):
        raise ValueError("a special token must be a text of at least one character")


def _form(pattern: str) -> dict[str, Any]:
    """What a file of ours says besides its tokens and merges."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE"},
    }


def _bare(value: Any) -> Any:
    """JSON without the fields that say nothing, which other writers spell out."""
    if isinstance(value, dict):
        return {name: kept for name, inner in value.items() if (kept := _bare(inner))}
    return [_bare(inner) for inner in value] if isinstance(value, list) else value


PRINTING = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTING]
LETTERS = {b: chr(b) for b in PRINTING} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
"""A byte that prints is written as itself, the others as the letters from U+0100 on (GPT-2)."""
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def spell(token: bytes) -> str:
    """The letters that stand for a token's bytes on disk: b" the" → "Ġthe"."""
    return token.decode("latin-1").translate(LETTERS)


def unspell(letters: str) -> bytes:
    """The bytes that letters stand for: "Ġthe" → b" the". KeyError for any other letter."""
    return bytes(map(BYTES.__getitem__, letters))


# ---- Other programs'


@dataclass(frozen=True)
class LibraryVocabulary:
    """A tokenizer.json of any kind, run by the `tokenizers` library; to a Tokenizer just a vocabulary."""

    json: str

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text that UTF-8 can hold."""
        self._library.encode_special_tokens = not special  # "encode" them as text, that is
        ids = self._ids(text)
        if special or not self._marks.intersection(ids):
            return ids
        # Unigram's pieces hold the special tokens' names too: cut within each name, no text can give one.
        starts = "".join({re.escape(name[0]) for name in self.special_tokens})
        parts = re.split(f"(?<=[{starts}])", text)
        return [i for part in parts if part for i in self._ids(part)]

    def _ids(self, text: str) -> list[int]:
        try:
            return self._library.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if _is_the_librarys(error):
                what = f"the tokenizers library cannot encode a text ({error})"
                raise InputError(f"{what}; use another tokenizer.json") from None
            raise

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self.json)
        library.no_truncation()
        library.no_padding()
        return library

    @cached_property
    def _marks(self) -> set[int]:
        """The special tokens but the one for what is unknown, which a text may give."""
        model = json.loads(self.json)["model"]
        unknown = {model.get("unk_id"), self.special_tokens.get(model.get("unk_token") or "")}
        return {*self.special_tokens.values()} - unknown

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that are read in a text only when asked for."""
        decoder = self._library.get_added_tokens_decoder()
        return {name: i for name, i in self.added_tokens.items() if decoder[i].special}

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Special tokens, and others that are read in any text."""
        return {token.content: i for i, token in sorted(self._library.get_added_tokens_decoder().items())}

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of every id, none where no token has it; an added token's are its name."""
        ids = self._library.get_vocab(with_added_tokens=True)
        bytes_of, added = _bytes_of_token(json.loads(self.json)), self.added_tokens
        tokens = [b""] * (max(ids.values()) + 1)
        for name, i in ids.items():
            tokens[i] = name.encode() if name in added else bytes_of(name)
        return tokens

    def __reduce__(self) -> tuple:
        return LibraryVocabulary, (self.json,)  # each process opens its own


def _read_foreign(file: Path, document: Mapping[str, Any]) -> LibraryVocabulary:
    vocabulary = LibraryVocabulary(json.dumps(document, ensure_ascii=False))
    try:
        vocabulary.tokens  # noqa: B018
    except ImportError:
        what = f"{file}: is another program's vocabulary"
        raise InputError(f"{what}; pip install tokenizers, which opens it") from None
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        raise ValueError(f"the tokenizers library says: {error}") from None
    return vocabulary


def _is_the_librarys(error: BaseException) -> bool:
    """Whether it is no interrupt of ours: where the library panics, what it raises is no Exception either."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _bytes_of_token(document: Mapping[str, Any]) -> Any:
    """What turns the name of an ordinary token into its bytes, by the kind of the file."""
    model, decoder = document["model"], json.dumps(document.get("decoder"))
    if '"ByteLevel"' in decoder or '"ByteLevel"' in json.dumps(document.get("pre_tokenizer")):
        return lambda name: bytes(BYTES.get(letter, 0x3F) for letter in name)
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        return lambda name: (name[len(prefix) :] if name.startswith(prefix) else f" {name}").encode()
    suffix = model.get("end_of_word_suffix") or None

    def bytes_of(name: str) -> bytes:
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if suffix and name.endswith(suffix):
            name = name.removesuffix(suffix) + " "
        return name.replace("▁", " ").encode()

    return bytes_of
