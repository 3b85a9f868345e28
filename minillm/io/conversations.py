"""Other people's conversations, prompts and rankings, and the little world's conversations.

    files ──► records (files.py) ──► formats.py ──► Source, or rankings

A conversation is a list of messages {"role", "content"}, the roles being system, user, assistant and tool;
it ends with the assistant. A reply with "train": False is not learned. What cannot be used is left out and
counted by reason, and the first such record is shown.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from glob import has_magic
from pathlib import Path
from typing import Any

from minillm.corpus import Source
from minillm.data import Skipped
from minillm.errors import InputError
from minillm.io import formats
from minillm.io.files import RECORD_EXTENSIONS, Reading, extension_of, list_files, parse_specs, records
from minillm.io.formats import Comparison, LeftOutError, Purpose
from minillm.io.rankings import read_json_lines, read_rankings
from minillm.preferences import Ranking, ResponseSet, new_ranking, ranking_by
from minillm.tools.folder import read_run
from minillm.tools.sources import counts_text
from minillm.world import KINDS, World


def open_conversations(
    specs: Sequence[str], purpose: Purpose = "conversation", *how: Any, **named: Any
) -> list[Source]:
    """Open conversations given as files, folders or globs of JSON, tables or Parquet; or prompts, which are
    all messages before the last reply, or all where nobody has replied; or what compares replies.

    A spec is [NAME=]PATH[:WEIGHT], as for text (`text.open_sources`); `how` they are read, too, is as there.
    Only a pass over a source meets what is wrong in its files.
    """
    sources, read = [], Reading(*how, **named)
    for name, path, weight in parse_specs(specs):
        if weight != 1 and purpose != "conversation":
            raise InputError(f"data source {name!r}: a {purpose} has no weight; leave the {weight:g} out")
        files, unread = list_files(name, [path], RECORD_EXTENSIONS)
        skipped = Skipped()
        read_again = partial(_read, files, read, purpose, unread, skipped)
        sources.append(Source(name, weight, read_again, skipped=skipped))
    return sources


def world_conversations(world: World, split: str, n: int) -> Source:
    """`n` demonstrations of the little world. Its splits share no question."""
    messages = [conversation.messages for conversation in world.conversations(split, n)]
    return Source("conversations", 1.0, lambda: iter(messages))


# ---- Prompts and rankings, all at once


def read_all(specs: Sequence[str], purpose: Purpose, *how: Any) -> list[Any]:
    """All prompts, or rankings, that files hold, saying what was read. The name of a spec [NAME=]PATH is that
    of the annotator; `how` they are read is as for `open_conversations`."""
    found: list[Any] = []
    for source in open_conversations(specs, purpose, *how):
        own = _rankings(source) if purpose == "ranking" else list(source.documents())
        if not own:
            raise _nothing_found(source.name, purpose, source.skipped.first)
        print(counts_text(f"{source.name}: {len(own):,} {purpose}s", source.skipped))
        found += own
    return found


def _rankings(source: Source) -> list[Ranking]:
    """The rankings in comparisons; replies that were judged one by one are compared with all others to their
    prompt."""
    compared, alone = list[Comparison](), dict[str, list[Comparison]]()
    for asked, scores in source.documents():
        (compared if len(scores) > 1 else alone.setdefault(repr(asked), [])).append((asked, scores))
    for same in alone.values():
        replies = [reply for _, scores in same for reply in scores.items()]
        try:
            if len({score for _, score in replies}) < 2:
                how = "all to their prompt alike" if len(same) > 1 else "each alone with its prompt"
                raise LeftOutError(f"replies judged one by one, {how}")
            compared.append((same[0][0], formats.different(replies)))
        except LeftOutError as reason:
            source.skipped.add(str(reason), f"one in {source.name!r} is among the {reason}")
    return [
        new_ranking(ResponseSet(asked, list(scores)), ranking_by(list(scores.values())), source.name, 0)
        for asked, scores in compared
    ]


def rankings_of_file(file: str) -> list[Ranking]:
    """The rankings in a rankings.jsonl of ours, or in anybody's preferences (a file, folder or glob), saying
    what was read."""
    is_ours = Path(file).exists() and are_ours(file)
    return read_rankings(Path(file)) if is_ours else read_all([file], "ranking")


def are_ours(file: str) -> bool:
    """Whether rankings or responses are a file of ours, or missing, and not anybody's preferences."""
    if not Path(file).is_file():
        return not Path(file).is_dir() and not has_magic(file)
    _, first = next(records(file, Reading("replace"), Counter(), _unwrapped), ("", None))
    own = {"ranking", "withdraws", "draws"}
    return first is None or (isinstance(first, dict) and not first.keys().isdisjoint(own))


def check_world_is_meant(options: Any) -> None:
    """InputError where a policy would train on the little world's prompts, none being named, but what was
    sampled or ranked were prompts of somebody's own alone; says so where some of them were."""
    out, reward = Path(options.out), Path(options.reward or Path(options.out) / "reward")
    stored = read_run(reward)[1].get("rankings")
    ranked = [reward.parent / "rankings.jsonl", *(stored if isinstance(stored, list) else [])]
    if options.algorithm == "dpo":
        ranked = options.rankings or [out / "rankings.jsonl"]
    for path in map(Path, (out / "responses.jsonl", *ranked)):
        kinds = [None]
        if are_ours(str(path)):
            kinds = [line.get("kind") for _, line in read_json_lines(path, "")] if path.exists() else []
        others = sum(kind not in KINDS for kind in kinds)
        if others and others == len(kinds):
            what = f"no --data: {path} holds no prompt of the little world's"
            raise InputError(f"{what}; name the prompts to train on, as in --data {path}")
        if others:
            what = f"{path}: {others:,} of {len(kinds):,} are of other prompts than the little world's"
            print(f"{what}, and the policy trains on the little world's alone; see --data")


# ---- Files → what their records hold


def _read(
    files: Sequence[str], read: Reading, purpose: Purpose, unread: Counter[str], skipped: Skipped
) -> Iterator[Any]:
    """One pass over what the records of `files` give for a purpose; `skipped` becomes what it leaves out, and
    the files that are `unread`. InputError for a file without any; tables beside others are counted, for much
    may lie in a folder that is none of it."""
    skipped.clear()
    skipped.update(unread)
    empty = list[InputError]()
    for file in files:
        found, own = False, Skipped()
        again = (record for _, record in records(file, read, Counter(), _unwrapped))
        firsts = cache(partial(formats.firsts_of, again))
        for place, record in records(file, read, skipped, _unwrapped):
            for result in formats.read_record(record, purpose, firsts):
                if isinstance(result, str):
                    line = f"{place} of {file!r} is among the {result}; {formats.nearest(record, purpose)}"
                    own.add(result, line)
                    skipped.add(result, line)
                else:
                    found = True
                    yield result
        if not found:
            empty.append(_nothing_found(file, purpose, own.first))
            if not extension_of(file).startswith((".csv", ".tsv")):
                raise empty[-1]
            skipped.add(f"tables without a {purpose}", str(empty[-1]))
    if len(empty) == len(files):
        raise empty[0]


def _nothing_found(file: str, purpose: Purpose, first: str | None) -> InputError:
    names = "; ".join(form.name for form in formats.FORMATS if purpose in form.gives)
    return InputError(f"{file!r} holds no {purpose}: {first or 'it has no record'}; known formats: {names}")


def _unwrapped(record: Any) -> list[Any]:
    """The records in a list of them, in an object of columns, or in an object that wraps one such list and
    says nothing of them; else the record itself."""
    if isinstance(record, list) and not _are_turns(record):
        return record
    if not isinstance(record, dict):
        return [record]
    if _are_columns(record):
        return [dict(zip(record, row, strict=True)) for row in zip(*record.values(), strict=True)]
    lists = [value for value in record.values() if isinstance(value, list) and not _are_turns(value)]
    lists = [value for value in lists if value and all(isinstance(held, dict) for held in value)]
    wraps = len(lists) == 1 and (formats.known(record)[0] is None or lists[0] is record.get("data"))
    beside = (name.lower() for name, value in record.items() if wraps and value is not lists[0])
    return lists[0] if wraps and formats.MEANING.isdisjoint(beside) else [record]


def _are_columns(record: dict[str, Any]) -> bool:
    """Whether each field of an object holds a list, with a value for each of several records."""
    if not all(isinstance(value, list) and len(value) > 1 for value in record.values()):
        return False
    turns = [v for n, v in record.items() if _are_turns(v) and (n in formats.TURNS or isinstance(v[0], dict))]
    return not turns and len(record) > 1 and len(set(map(len, record.values()))) == 1


def _are_turns(value: list[Any]) -> bool:
    return bool(value) and (
        all(isinstance(turn, str) for turn in value)
        or all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in value)
    )
