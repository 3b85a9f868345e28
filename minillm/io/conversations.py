"""Other people's conversations, prompts and rankings, and the little world's conversations.

    files ──► records (files.py) ──► formats.py ──► ConversationSource, or ComparisonSource

A conversation is a list of messages {"role", "content"}, the roles being system, user and assistant; it
ends with the assistant. A reply with "train": False is not learned. What cannot be used is left out and
counted by reason, and the first such record is shown.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from minillm.chat import Conversation
from minillm.data import Skipped
from minillm.errors import InputError
from minillm.files import digest_of
from minillm.io.files import KINDS, Errors, Reading, kind_of, list_files, parse_specs, records
from minillm.io.formats import FORMATS, Purpose, compared, known, nearest, read_record
from minillm.io.rankings import read_rankings
from minillm.preferences import Ranking, ResponseSet, new_ranking, ranking_by
from minillm.world import World

EXTENSIONS = (".json", ".jsonl", ".ndjson", ".parquet")
"""What is read of a folder. A file given by name or glob may have any name."""


@dataclass(frozen=True)
class ConversationSource:
    """A named stream of conversations or prompts with a weight in the mixture; `conversations()` starts a new
    pass over it."""

    name: str
    weight: float
    conversations: Callable[[], Iterator[Conversation]]
    fingerprint: str
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class ComparisonSource:
    """The rankings of a file, folder or glob, and what was left out of it."""

    name: str
    rankings: list[Ranking]
    skipped: Skipped


def open_conversations(
    specs: Sequence[str],
    errors: Errors = "strict",
    purpose: Purpose = "conversation",
    encoding: str = "utf-8",
) -> list[ConversationSource]:
    """Open conversations given as files, folders or globs of JSON, tables or Parquet; or prompts, which are
    all messages before the last reply, or all where nobody has replied.

    A spec is [NAME=]PATH[:WEIGHT], as for text (`text.open_sources`); `errors` and `encoding` are as there.
    Every file is read whole once here, so that what is wrong shows before anything is trained.
    """
    sources, read = [], Reading(errors, encoding)
    for name, path, weight in parse_specs(specs):
        files, unread = list_files(name, [path], EXTENSIONS)
        skipped = Skipped(unread)
        fingerprint = digest_of(_read(files, read, purpose, skipped))
        again = partial(_read, files, read, purpose, Skipped())
        sources.append(ConversationSource(name, weight, again, fingerprint, skipped))
    return sources


def world_conversations(world: World, split: str, n: int) -> ConversationSource:
    """`n` demonstrations of the little world. Its splits share no question."""
    messages = [conversation.messages for conversation in world.conversations(split, n)]
    return ConversationSource("conversations", 1.0, lambda: iter(messages), digest_of(messages))


# ---- Rankings


def open_comparisons(specs: Sequence[str], errors: Errors = "strict") -> list[ComparisonSource]:
    """Opens rankings as `open_conversations` opens conversations; a spec is [NAME=]PATH, the name being the
    annotator's. Replies that were judged one by one are compared with those to the same prompt."""
    sources = []
    for name, path, weight in parse_specs(specs):
        if weight != 1:
            raise InputError(f"data source {name!r}: rankings have no weight; leave the {weight:g} out")
        files, unread = list_files(name, [path], EXTENSIONS)
        skipped = Skipped(unread)
        rankings = []
        for result in compared(_read(files, Reading(errors), "ranking", skipped)):
            if isinstance(result, str):
                skipped.add(result, f"one in {path!r} is among the {result}")
            else:
                asked, scores = result
                given = ResponseSet(asked, list(scores))
                rankings.append(new_ranking(given, ranking_by(list(scores.values())), name, 0))
        if not rankings:
            raise _nothing_found(path, "ranking", skipped.first)
        sources.append(ComparisonSource(name, rankings, skipped))
    return sources


def rankings_of_file(file: str) -> list[Ranking]:
    """The rankings in a rankings.jsonl of ours, or in anybody's file of preferences, saying what was read."""
    if not Path(file).is_file():
        return read_rankings(Path(file))
    _, first = next(_records(file, Reading("replace"), Counter()), ("", None))
    if first is None or (isinstance(first, dict) and first.keys() & {"ranking", "withdraws"}):
        return read_rankings(Path(file))
    (source,) = open_comparisons([file])
    print_counts(file, len(source.rankings), "rankings", source.skipped)
    return source.rankings


def print_counts(name: str, count: int, what: str, skipped: Skipped) -> None:
    """Says how much a source gave and what was left out of it."""
    print(f"{name}: {count:,} {what}")
    for reason, number in sorted(skipped.items()):
        print(f"  left out: {number:,} {reason}")
    if skipped.first:
        print(f"  the first: {skipped.first}")


# ---- Files → what their records hold


def _read(files: Sequence[str], read: Reading, purpose: Purpose, skipped: Skipped) -> Iterator[Any]:
    """One pass over what the records of `files` give for a purpose; puts into `skipped` what is left out."""
    for file in files:
        found, own = False, Skipped()
        for place, record in _records(file, read, skipped):
            for result in read_record(record, purpose):
                if isinstance(result, str):
                    line = f"{place} of {file!r} is among the {result}; {nearest(record, purpose)}"
                    own.add(result, line)
                    skipped.add(result, line)
                else:
                    found = True
                    yield result
        if not found:
            raise _nothing_found(file, purpose, own.first)


def _nothing_found(file: str, purpose: Purpose, first: str | None) -> InputError:
    names = "; ".join(form.name for form in FORMATS if purpose in form.gives)
    return InputError(f"{file!r} holds no {purpose}: {first or 'it has no record'}; known formats: {names}")


def _records(path: str, read: Reading, dropped: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Every record of a file and its place in it; InputError where it is of no kind that has any."""
    kind = kind_of(path, read)
    kind = "objects" if kind == "text" else kind
    if kind not in KINDS:
        raise InputError(f"{path!r}: {kind}; convert it to lines of JSON")
    return records(path, kind, read, dropped, _unwrapped)


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
