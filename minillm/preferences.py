"""Rankings of a prompt's responses, and the file they are kept in.

    responses.jsonl ──► annotators ──► rankings.jsonl ──► pairs for the reward model

A ranking is one line of JSON:

    {"messages": […], "responses": […], "ranking": [[1], [0, 3], [2]],
     "annotator": "Ada", "seed": 0, "time": "2026-01-31T12:00:00+00:00"}

best first, ties together, and "kind" where the prompt is the little world's. The file only ever grows:
a ranking taken back stays, and a later line withdraws it. So an undo can destroy nobody's work, however
many people write into one file, and a crash can spoil the line being written and no other.

Method: all K responses ranked at once, as in Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155),
section 3.5: K (K - 1) / 2 comparisons for one reading of the prompt.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from minillm.chat import check_messages
from minillm.errors import InputError
from minillm.files import sync_file, sync_folder
from minillm.sources import digest

Message = dict[str, str]
Record = dict[str, Any]

LETTERS = "ABCDEFGHI"
"""Names for the responses while they are ranked: nine are as many as anybody can keep apart."""


def set_key(messages: Sequence[Message], responses: Sequence[str]) -> str:
    """The same for the same responses to the same prompt, in whatever order."""
    return digest(json.dumps(messages), *sorted(responses))


@dataclass(frozen=True)
class ResponseSet:
    """A prompt and the responses to be ranked."""

    messages: list[Message]
    responses: list[str]
    kind: str | None = None
    """The little world's kind of prompt."""
    world: int | None = None
    """The seed of that world."""

    def __post_init__(self) -> None:
        _check_count(self.responses)

    @property
    def key(self) -> str:
        """See `set_key`."""
        return set_key(self.messages, self.responses)


@dataclass(frozen=True)
class Ranking:
    """Someone's ranking of the responses to a prompt. InputError where it is not one."""

    messages: list[Message]
    responses: list[str]
    ranking: list[list[int]]
    """Indices of responses: best first, ties together. Each stands here once."""
    annotator: str
    seed: int
    """Of whatever was random: the blind order for a person, the noise of a simulated one."""
    time: str
    """ISO 8601."""
    kind: str | None = None

    def __post_init__(self) -> None:
        _check_count(self.responses)
        named = sorted(index for tied in self.ranking for index in tied)
        if named != list(range(len(self.responses))) or not all(self.ranking):
            raise InputError(
                f"its ranking is {self.ranking!r:.60}; let every index below {len(self.responses)} "
                "stand in it once, and no group be empty"
            )
        if not self.annotator.strip():
            raise InputError("its annotator has no name; give one")
        try:
            datetime.fromisoformat(self.time)
        except ValueError:
            raise InputError(f"its time is {self.time!r:.40}; give it as 2026-01-31T12:00:00") from None

    @property
    def key(self) -> str:
        """Of the set that was ranked, see `set_key`."""
        return set_key(self.messages, self.responses)

    def ranks(self) -> list[int]:
        """The place of each response, 0 for the best; ties share one."""
        place = {index: rank for rank, tied in enumerate(self.ranking) for index in tied}
        return [place[index] for index in range(len(self.responses))]

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for all pairs of responses but those that tie."""
        return [
            (better, worse)
            for first, second in combinations(self.ranking, 2)
            for better in first
            for worse in second
        ]


def new_ranking(given: ResponseSet, ranking: Sequence[Sequence[int]], annotator: str, seed: int) -> Ranking:
    """The ranking of a set, made now."""
    tied = [sorted(group) for group in ranking]
    return Ranking(given.messages, given.responses, tied, annotator, seed, now(), given.kind)


def ranking_by(values: Sequence[float | int], margin: float | int = 0) -> list[list[int]]:
    """Highest value first; those within `margin` of the first of a group tie with it.

    [0.5, 0.9, 0.88] by a margin of 0.05 → [[1, 2], [0]].
    """
    ranking: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda index: -values[index]):
        if ranking and values[ranking[-1][0]] - values[index] <= margin:
            ranking[-1].append(index)
        else:
            ranking.append([index])
    return [sorted(tied) for tied in ranking]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_count(responses: Sequence[str]) -> None:
    if len(responses) < 2:
        raise InputError(f"it has {len(responses)} responses; give at least 2 to compare")


# ---- As typed: "B > A = D > C"


def parse_ranking(text: str, count: int) -> list[list[int]]:
    """The ranking of `count` responses in letters: "B > A = D > C" → [[1], [0, 3], [2]].

    Capitals or not, with any spaces. Raises InputError that says what is wrong.
    """
    letters = LETTERS[:count]
    groups = [[name.strip().upper() for name in tied.split("=")] for tied in text.split(">")]
    named = [name for tied in groups for name in tied]
    for name in named:
        if len(name) != 1 or name not in letters:
            raise InputError(
                f"{name!r:.40} is none of {', '.join(letters)}; rank them all, as in {_example(count)}"
            )
        if named.count(name) > 1:
            raise InputError(f"{name} stands there {named.count(name)} times; let each stand once")
    if missing := [letter for letter in letters if letter not in named]:
        raise InputError(f"{', '.join(missing)} missing; rank them all, as in {_example(count)}")
    return [sorted(letters.index(name) for name in tied) for tied in groups]


def format_ranking(ranking: Sequence[Sequence[int]]) -> str:
    """[[1], [0, 3], [2]] → "B > A = D > C"."""
    return " > ".join(" = ".join(LETTERS[index] for index in tied) for tied in ranking)


def _example(count: int) -> str:
    return " > ".join(LETTERS[1::-1]) + "".join(f" = {letter}" for letter in LETTERS[2:count])


# ---- On disk


class JsonLines:
    """A file of JSON lines that only grows. An appended line is on the disk when `append` returns.

    One process writes at a time. A last line that a crash tore is moved to FILE.torn at opening, and
    `mended` says so.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.mended = path, ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a write that fails leaves nothing behind for close() to try again.
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115
            sync_folder(path.parent)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give another --out") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise InputError(f"{path}: another process is writing there; wait for it or end it") from error
        self._mend()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, records: Iterable[Record]) -> None:
        """Writes a line for each record and waits until they are on the disk."""
        # In ASCII: JSON can spell what UTF-8 cannot hold, and no reader splits a line elsewhere.
        self._write("".join(json.dumps(record) + "\n" for record in records).encode())

    def _write(self, data: bytes) -> None:
        try:
            if self.file.write(data) != len(data):
                raise OSError(28, "the disk is full")
            sync_file(self.file)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); what was there before is unchanged; "
                "free some space and go on"
            ) from error

    def _mend(self) -> None:
        content = self.path.read_bytes()
        lines, torn = _split_lines(content)
        if torn:
            with open(f"{self.path}.torn", "ab") as kept:
                kept.write(torn + b"\n")
                sync_file(kept)
            os.ftruncate(self.file.fileno(), len(content) - len(torn))
            self.mended = (
                f"{self.path}: line {len(lines) + 1} was cut short, by a crash perhaps; "
                f"it now stands in {self.path.name}.torn"
            )
        elif content and not content.endswith(b"\n"):
            self._write(b"\n")


def read_json_lines(path: Path, hint: str) -> Iterator[tuple[str, Record]]:
    """Each line's place and record. A torn last line is left out, with a word on standard error.

    Raises InputError for a file that cannot be read, which ends in `hint`, and for a line that is no
    JSON object.
    """
    try:
        lines, torn = _split_lines(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    if torn:
        print(f"{path}: its last line was cut short and is left out", file=sys.stderr)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _json_object(line)
            if record is None:
                raise InputError(f"{path}, line {number}: is no JSON object; mend it or take it out")
            yield f"{path}, line {number}", record


def _split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """All whole lines, and what stands behind them: the beginning of a line whose writing was cut off.

    A last line that lacks only its newline is whole: no beginning of a JSON object is one.
    """
    *lines, rest = content.split(b"\n")
    if _json_object(rest) is not None:
        return [*lines, rest], b""
    return lines, rest


def _json_object(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_responses(path: Path) -> list[ResponseSet]:
    """The sets of responses.jsonl. Raises InputError naming file and line, and where there are none."""
    sets = []
    for place, record in read_json_lines(path, "python rlhf.py --stage sample makes it"):
        with _at(place):
            sets.append(_set_of(record))
    if not sets:
        raise InputError(f"{path}: holds no responses; python rlhf.py --stage sample makes them")
    return sets


def read_rankings(path: Path) -> list[Ranking]:
    """The rankings that stand, in the order of the file. Raises InputError naming file and line."""
    rankings: list[Ranking] = []
    for place, record in read_json_lines(path, "python rlhf.py --stage rank makes it"):
        with _at(place):
            if "withdraws" in record:
                _withdraw(rankings, record.get("annotator"), record["withdraws"])
            else:
                rankings.append(_ranking_of(record))
    return rankings


def _set_of(record: Record) -> ResponseSet:
    return ResponseSet(
        check_messages(record.get("messages")),
        _list(record, "responses", str),
        _value(record, "kind", str, None),
        _value(record, "world", int, None),
    )


def _ranking_of(record: Record) -> Ranking:
    return Ranking(
        check_messages(record.get("messages")),
        _list(record, "responses", str),
        [_list({"ranking": tied}, "ranking", int) for tied in _list(record, "ranking", list)],
        _value(record, "annotator", str),
        _value(record, "seed", int),
        _value(record, "time", str),
        _value(record, "kind", str, None),
    )


def _value(record: Record, name: str, kind: type, *default: object) -> Any:
    """A field of a type, or the default, if one is given, where there is none."""
    value = record.get(name, *default)
    if type(value) is not kind and value not in default:  # a bool is no number here
        raise InputError(f"its {name} is {value!r:.40}; give a {kind.__name__}")
    return value


def _list(record: Record, name: str, kind: type) -> list[Any]:
    value = _value(record, name, list)
    for element in value:
        _value({name: element}, name, kind)
    return value


def _withdraw(rankings: list[Ranking], annotator: object, key: object) -> Ranking:
    """Takes the last ranking that the annotator gave to the set out of the list."""
    for index in reversed(range(len(rankings))):
        if (rankings[index].annotator, rankings[index].key) == (annotator, key):
            return rankings.pop(index)
    raise InputError("withdraws a ranking that does not stand before it; take the line out")


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Puts the place before what an InputError says."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


class RankingFile:
    """rankings.jsonl, to add to: each ranking is on the disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        """Opens or starts the file, mended if need be. Raises InputError as `read_rankings` does."""
        self.lines = JsonLines(path)
        try:
            self.rankings = read_rankings(path)
        except InputError:
            self.lines.file.close()
            raise

    def __enter__(self) -> "RankingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.file.close()

    @property
    def mended(self) -> str:
        """What was repaired at opening, or nothing."""
        return self.lines.mended

    def ranked(self) -> set[tuple[str, str]]:
        """Who has ranked which set: (annotator, key)."""
        return {(ranking.annotator, ranking.key) for ranking in self.rankings}

    def append(self, rankings: Sequence[Ranking]) -> None:
        self.lines.append(_record_of(ranking) for ranking in rankings)
        self.rankings += rankings

    def withdraw(self, annotator: str) -> Ranking | None:
        """Takes back the last ranking of an annotator that stands, and returns it."""
        own = [ranking for ranking in self.rankings if ranking.annotator == annotator]
        if not own:
            return None
        self.lines.append([{"withdraws": own[-1].key, "annotator": annotator, "time": now()}])
        return _withdraw(self.rankings, annotator, own[-1].key)


def _record_of(ranking: Ranking) -> Record:
    return {name: value for name, value in vars(ranking).items() if value is not None}
