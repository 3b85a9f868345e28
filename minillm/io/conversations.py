"""Where conversations and prompts come from: other people's files, and the little world.

    files ──► records ──► formats.py ──► ConversationSource(name, weight, conversations)

A conversation is a list of messages {"role", "content"}, the roles being system, user and assistant; it
ends with the assistant. A reply with "train": False is not learned. A record is an element of a JSON array
or a line of JSON. What cannot be used is left out and counted by reason, and the first such record is shown.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain
from typing import Any

from minillm.chat import Conversation
from minillm.errors import InputError
from minillm.io.formats import (
    FORMATS,
    LeftOutError,
    Purpose,
    demonstration,
    examples_of,
    known,
    nearest,
    prompt,
)
from minillm.io.text import Errors, decode, json_lines, list_files, parse_json, parse_specs, unpacked
from minillm.world import World

EXTENSIONS = (".json", ".json.gz", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class ConversationSource:
    """A named stream of conversations, or of prompts, with a weight in the mixture.

    `conversations()` starts a new pass, over the same ones in the same order each time. `fingerprint` is a
    digest of them. `skipped` counts what was left out, by reason; `first_skipped` is a line about the first
    of it: where it is, the reason, and the fields it has.
    """

    name: str
    weight: float
    conversations: Callable[[], Iterator[Conversation]]
    fingerprint: str
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: str | None = None


def open_conversations(specs: Sequence[str], errors: Errors = "strict") -> list[ConversationSource]:
    """Open conversations given as files, folders or globs of .json and .jsonl, each also as .gz.

    A spec is [NAME=]PATH[:WEIGHT], as for text (`text.open_sources`), and `errors="replace"` means
    the same. Every file is read whole once here, so that what is wrong shows before anything is
    trained. A JSON array is held in memory; lines are read one at a time.

    Raises InputError for specs and files that are wrong, and for a file that holds no conversation.
    """
    return _open(specs, errors, "conversation")


def open_prompts(specs: Sequence[str], errors: Errors = "strict") -> list[ConversationSource]:
    """As `open_conversations`, but what is read is what the model is asked: all messages before the last
    reply, or all where nobody has replied."""
    return _open(specs, errors, "prompt")


def _open(specs: Sequence[str], errors: Errors, purpose: Purpose) -> list[ConversationSource]:
    sources = []
    for name, path, weight in parse_specs(specs):
        files, unread = list_files(name, path, EXTENSIONS)
        skipped = Skipped(unread)
        fingerprint = _fingerprint(_read(files, errors, purpose, skipped))
        again = partial(_again, files, errors, purpose)
        sources.append(ConversationSource(name, weight, again, fingerprint, skipped.counts, skipped.first))
    return sources


def _again(files: Sequence[str], errors: Errors, purpose: Purpose) -> Iterator[Conversation]:
    return _read(files, errors, purpose, Skipped(Counter()))


def world_conversations(world: World, split: str, n: int) -> ConversationSource:
    """`n` demonstrations of the little world. Its splits share no question."""
    messages = [conversation.messages for conversation in world.conversations(split, n)]
    return ConversationSource("conversations", 1.0, lambda: iter(messages), _fingerprint(messages))


def _fingerprint(conversations: Iterable[Conversation]) -> str:
    digest = blake2b(digest_size=16)
    for conversation in conversations:
        digest.update(json.dumps(conversation).encode())
    return digest.hexdigest()


# ---- Files -> conversations


@dataclass
class Skipped:
    """What is left out: how often for which reason, and a line about the first record."""

    counts: Counter[str]
    first: str | None = None

    def add(self, reason: str, file: str, place: str, record: object, purpose: Purpose) -> None:
        self.counts[reason] += 1
        if self.first is None:
            fields = f"its fields: {', '.join(map(str, record)) or 'none'}" if isinstance(record, dict) else (
                "it is a list" if isinstance(record, list) else "it is no JSON object")  # fmt: skip
            advice = nearest(record, purpose)
            self.first = f"{place} of {file!r} is among the {reason}; {fields}; {advice}"


def conversations_of(record: object, purpose: Purpose = "conversation") -> list[Conversation | str]:
    """The conversations or prompts in a record, and the reasons why some or all of it is left out."""
    results: list[Conversation | str] = []
    try:
        for example in examples_of(record, purpose):
            results += demonstration(example) if purpose == "conversation" else [prompt(example)]
    except LeftOutError as reason:
        results.append(str(reason))
    return results


def _read(files: Sequence[str], errors: Errors, purpose: Purpose, skipped: Skipped) -> Iterator[Conversation]:
    """One pass over the conversations of `files`; puts into `skipped` what it leaves out."""
    for file in files:
        found, own = False, Skipped(skipped.counts)
        for place, record in records(file, errors, skipped.counts):
            for result in conversations_of(record, purpose):
                if isinstance(result, str):
                    own.add(result, file, place, record, purpose)
                else:
                    found = True
                    yield result
        skipped.first = skipped.first or own.first
        if not found:
            raise nothing_found(file, purpose, own.first)


def nothing_found(file: str, purpose: Purpose, first: str | None) -> InputError:
    """The error for a file that holds nothing usable."""
    names = "; ".join(form.name for form in FORMATS if purpose in form.gives)
    return InputError(f"{file!r} holds no {purpose}: {first or 'it has no record'}; known formats: {names}")


# ---- Files -> records

SIGNATURES = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a zip archive",
    b"SQLite": "a database", b"\x28\xb5\x2f\xfd": "packed by zstd", b"\x1f\x8b": "packed by gzip",
}  # fmt: skip


def records(path: str, errors: Errors, skipped: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Every record of a file and its place in it."""
    if _has_lines(path):
        for number, record in json_lines(path, errors, skipped, parse_json):
            yield from ((f"line {number}", held) for held in _unwrapped(record))
    else:
        whole = chain.from_iterable(map(_unwrapped, _documents(path, errors)))
        yield from ((f"record {number}", record) for number, record in enumerate(whole, start=1))


def _has_lines(path: str) -> bool:
    """Whether a file is a record a line, and not an array or objects over many lines."""
    with unpacked(path) as file:
        start = file.read(8192)
        kind = next((kind for sign, kind in SIGNATURES.items() if start.startswith(sign)), None)
        if kind or b"\0" in start:
            raise InputError(f"{path!r}: {kind or 'binary'}, not JSON text; convert it to lines of JSON")
        file.seek(0)
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
        first = next((line for line in lines if line), b"")
        if _is_json(first):
            return any(lines)
    if first.startswith(b"["):
        return False
    lines_by_name = path.lower().endswith((".jsonl", ".jsonl.gz"))
    return first != b"{" if lines_by_name else not first.endswith((b"{", b"[", b","))


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode("utf-8", "replace"))
    except ValueError:
        return False
    return True


def _documents(path: str, errors: Errors) -> Iterator[Any]:
    """The JSON texts that a file holds one behind the other, each perhaps over many lines."""
    with unpacked(path) as file:
        text = decode(file.read(), path, 0, errors).removeprefix("\ufeff").strip()
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path!r}: not valid JSON behind character {at}; is it whole?") from error
        yield record
        at += len(text[at : at + 64]) - len(text[at : at + 64].lstrip())


def _unwrapped(record: Any) -> Iterator[Any]:
    """The records in a list of them, or in an object that wraps one such list; else the record itself."""
    if isinstance(record, list) and not _are_turns(record):
        yield from record
        return
    if isinstance(record, dict):
        lists = [value for value in record.values() if isinstance(value, list) and not _are_turns(value)]
        lists = [value for value in lists if value and all(isinstance(held, dict) for held in value)]
        if len(lists) == 1 and (known(record)[0] is None or lists[0] is record.get("data")):
            yield from lists[0]
            return
    yield record


def _are_turns(value: list[Any]) -> bool:
    return bool(value) and (
        all(isinstance(turn, str) for turn in value)
        or all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in value)
    )
