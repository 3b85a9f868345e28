"""responses.jsonl and rankings.jsonl: files that only grow, read and written line by line.

A ranking taken back stays, and a later line withdraws it. So an undo can destroy nobody's work, however many
people write into one file, and a crash can spoil the line being written and no other. What a line holds is
in preferences.py.
"""

import errno
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from minillm.errors import BAD_FILE, InputError, reading, writing
from minillm.io.disk import read_json, sync, sync_open, typed, write_json
from minillm.io.messages import check_messages
from minillm.preferences import Ranking, Record, ResponseSet, now
from minillm.tools.folder import lock
from minillm.tools.provenance import provenance

# ---- Lines


class JsonLines(AbstractContextManager):
    """A file of JSON lines that only grows. A line is on the disk when `append` returns. One process writes
    at a time. A last line that a crash tore is moved to FILE.torn at opening, which is said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path, "give another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a write that fails leaves nothing behind for close() to try again.
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115
            sync(path.parent)
            try:
                lock(self.file.fileno(), wait=False)
            except BlockingIOError:
                self.file.close()
                raise InputError(f"{path}: another process is writing there; wait for it or end it") from None
            self._mend(path.read_bytes())

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, records: Sequence[Any]) -> None:
        """Writes a line for each record and waits until they are on the disk."""
        # In ASCII: JSON can spell what UTF-8 cannot hold, and no reader splits a line elsewhere.
        data, handle = "".join(json.dumps(record) + "\n" for record in records).encode(), self.file.fileno()
        with writing(self.path, "what was there before is unchanged; free some space and go on"):
            size = os.fstat(handle).st_size
            try:
                if self.file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "the disk is full")
                sync_open(handle)
            except OSError:
                os.ftruncate(handle, size)  # or the next line would join what was written
                raise

    def _mend(self, content: bytes) -> None:
        lines, torn = _split_lines(content)
        if torn:
            aside = Path(f"{self.path}.torn")
            with open(aside, "ab") as kept:
                kept.write(torn + b"\n")
            sync(aside)
            os.ftruncate(self.file.fileno(), len(content) - len(torn))
            what = f"{self.path}: line {len(lines) + 1} was cut short, by a crash perhaps"
            print(f"{what}; it is now in {aside.name}")
        elif content and not content.endswith(b"\n"):
            self.file.write(b"\n")


def read_json_lines(path: Path, hint: str) -> Iterator[tuple[str, Record]]:
    """Each line's place and record; a torn last line is left out, with a word on standard error. `hint` says
    what to do where the file cannot be read."""
    with reading(path, hint):
        lines, torn = _split_lines(path.read_bytes())
    if torn:
        print(f"{path}: its last line was cut short and is left out", file=sys.stderr)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            if (record := _json_object(line)) is None:
                raise InputError(f"{path}, line {number}: is no JSON object; mend it or take it out")
            yield f"{path}, line {number}", record


def _split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """All whole lines, and what is behind them: the beginning of a line whose writing was cut off. A last
    line that lacks only its newline is whole: no beginning of a JSON object is one."""
    *lines, rest = content.split(b"\n")
    return ([*lines, rest], b"") if _json_object(rest) is not None else (lines, rest)


def _json_object(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


# ---- Responses and rankings


_kinds: Any = cache(get_type_hints)  # which takes longer than all else, for each of 35,000 lines
_mending = partial(reading, hint="mend the line or take it out", errors=(InputError, *BAD_FILE))


def read_responses(path: Path) -> list[ResponseSet]:
    """The sets of responses.jsonl, one at least."""
    sets = []
    for place, record in read_json_lines(path, "python rlhf.py --stage sample makes it"):
        with _mending(place):
            cut = [k for k, draw in enumerate(record.get("draws", ())) if draw.get("ended") is False]
            sets.append(_line_as(ResponseSet, record, cut=cut))
    if not sets:
        raise InputError(f"{path}: holds no responses; python rlhf.py --stage sample makes them")
    return sets


def read_rankings(path: Path) -> list[Ranking]:
    """The rankings that stand, in the order of the file."""
    rankings: list[Ranking] = []
    for place, record in read_json_lines(path, "python rlhf.py --stage rank makes it"):
        with _mending(place):
            if "withdraws" in record:
                _withdraw(rankings, record.get("annotator"), record["withdraws"])
            else:
                rankings.append(_ranking(record))
    return rankings


def _line_as(kind: type[Any], record: Record, **more: Any) -> Any:
    """What a line holds, as a set or a ranking. An exception says what is wrong."""
    kinds = _kinds(kind) | {"messages": Any}
    needed = (one.name for one in fields(kind) if one.default is one.default_factory is MISSING)
    if lacking := [name for name in needed if name not in record]:
        raise ValueError(f"it has no {', '.join(lacking)}")
    found = {name: typed(name, record[name], kinds[name]) for name in kinds if name in record}
    made = kind(**found | {"messages": check_messages(record.get("messages"))} | more)
    if len(made.responses) < 2:
        raise ValueError(f"it has {len(made.responses)} responses; give at least 2")
    return made


def _ranking(record: Record) -> Ranking:
    made = _line_as(Ranking, record)
    named = [index for tied in made.ranking for index in tied]
    if not all(made.ranking) or sorted(named) != list(range(len(made.responses))):
        wrong = f"its ranking is {made.ranking!r:.60}"
        raise ValueError(f"{wrong}; let every index be in it once, and no group empty")
    if not made.annotator.strip():
        raise ValueError("its annotator has no name")
    if set(made.cut) - set(named):
        raise ValueError(f"its cut is {made.cut!r:.60}; give indices of its responses")
    datetime.fromisoformat(made.time)
    return made


def _withdraw(rankings: list[Ranking], annotator: object, key: object) -> Ranking:
    """Takes the last ranking that the annotator gave to the set out of the list."""
    for index in reversed(range(len(rankings))):
        if (rankings[index].annotator, rankings[index].key) == (annotator, key):
            return rankings.pop(index)
    raise ValueError("withdraws a ranking that is not before it")


class RankingFile(JsonLines):
    """rankings.jsonl, to add to: each ranking is on the disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        """Opens or starts the file, mended if need be. InputError as `read_rankings` has it."""
        super().__init__(path)
        try:
            self.rankings = read_rankings(path)
        except InputError:
            self.file.close()
            raise

    def append(self, rankings: Sequence[Ranking]) -> None:
        super().append([{k: v for k, v in vars(r).items() if v not in (None, [])} for r in rankings])
        self.rankings += rankings

    def withdraw(self, annotator: str) -> Ranking | None:
        """Takes back the last ranking of an annotator that stands, and returns it."""
        own = [ranking for ranking in self.rankings if ranking.annotator == annotator]
        if not own:
            return None
        super().append([{"withdraws": own[-1].key, "annotator": annotator, "time": now()}])
        return _withdraw(self.rankings, annotator, own[-1].key)


# ---- How they were made, so that a file does not mix them


def open_rankings(options: Any, origin: Mapping[str, Any]) -> RankingFile:
    """rankings.jsonl to add to. InputError where rankings of this kind were made in another way before."""
    path, record = options.folder / "rankings.jsonl", options.folder / f"rank-{options.annotator}.json"
    if options.overwrite and path.exists():
        names = (path.with_name(f"{path.name}.old{n}") for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        print(f"{path}: begins anew; what it held, of all annotators, is kept in {aside.name}")
    elif path.exists() and record.exists():
        check_origin(record, origin)
    return RankingFile(path)


def record_ranking(options: Any, origin: Mapping[str, Any]) -> None:
    """Says beside the rankings how those of this kind of annotator are made."""
    how = {"options": asdict(options), "origin": dict(origin)}
    write_json(options.folder / f"rank-{options.annotator}.json", how | provenance())


def check_origin(record: Path, origin: Mapping[str, Any]) -> None:
    """InputError where what is to go on was begun with other prompts, weights or options, by the record."""
    if not isinstance(earlier := read_json(record).get("origin", {}), dict):
        raise InputError(f"{record}: does not say what was ranked; restore it, or --overwrite")
    for name, value in origin.items():
        if (was := earlier.get(name, value)) != value:
            what = f"{record}: was begun with other {name}, {was} and not {value}"
            raise InputError(f"{what}; put back the old ones, or --overwrite")
