"""Rankings that other people published, read as they are.

Every response of a record is read as a conversation (formats.py): what all of them begin with is the
prompt, and their last messages are the responses. Replies that were judged one by one are compared with
those to the same prompt, by their rating. What has no two responses to one prompt is left out and counted by
reason, and the first such record is shown.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minillm.chat import Conversation
from minillm.errors import InputError
from minillm.io.conversations import EXTENSIONS, Skipped, nothing_found, records
from minillm.io.formats import Example, LeftOutError, checked, examples_of, places, said
from minillm.preferences import Ranking, ResponseSet, new_ranking, read_rankings
from minillm.sources import Errors, digest, list_files, parse_specs


@dataclass
class ComparisonSource:
    """The rankings of a file, folder or glob, and what was left out of it."""

    name: str
    rankings: list[Ranking] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: str | None = None


def open_comparisons(specs: Sequence[str], errors: Errors = "strict") -> list[ComparisonSource]:
    """Reads rankings given as files, folders or globs of .json and .jsonl, each also as .gz.

    A spec is [NAME=]PATH; the name is the annotator's. Raises InputError for specs and files that are wrong
    and for a file that holds no ranking.
    """
    parsed = parse_specs(specs)
    for name, _, weight in parsed:
        if weight != 1:
            raise InputError(f"data source {name!r}: rankings have no weight; leave the {weight:g} out")
    return [_open(name, path, errors) for name, path, _ in parsed]


def rankings_of_file(file: str) -> list[Ranking]:
    """The rankings in a rankings.jsonl of ours, or in anybody's file of preferences, saying what was read."""
    if not Path(file).is_file():
        return read_rankings(Path(file))
    _, first = next(records(file, "replace", Counter()), ("", None))
    if first is None or (isinstance(first, dict) and first.keys() & {"ranking", "withdraws"}):
        return read_rankings(Path(file))
    (source,) = open_comparisons([file])
    print(f"{file}: {len(source.rankings):,} rankings")
    for reason, count in sorted(source.skipped.items()):
        print(f"  left out: {count:,} {reason}")
    return source.rankings


def _open(name: str, path: str, errors: Errors) -> ComparisonSource:
    files, unread = list_files(name, path, EXTENSIONS)
    source = ComparisonSource(name, skipped=unread)
    for file in files:
        before, skipped, lone = len(source.rankings), Skipped(unread), _Judged()
        for place, record in records(file, errors, unread):
            try:
                for example in examples_of(record, "ranking"):
                    if example.rating is not None:
                        lone.add(example, record)
                    else:
                        source.rankings.append(ranking_of(example, name))
            except LeftOutError as reason:
                skipped.add(str(reason), file, place, record, "ranking")
        for example in lone.examples():
            try:
                source.rankings.append(ranking_of(example, name))
            except LeftOutError as reason:
                skipped.add(str(reason), file, "one", lone.record, "ranking")
        if len(source.rankings) == before:
            raise nothing_found(file, "ranking", skipped.first)
        source.first_skipped = source.first_skipped or skipped.first
    return source


class _Judged:
    """Replies that were judged one by one, by their prompt."""

    def __init__(self) -> None:
        self.by_prompt: dict[str, list[Example]] = {}
        self.record: object = None

    def add(self, example: Example, record: object) -> None:
        self.record = record
        self.by_prompt.setdefault(digest(*map(str, example.candidates[0][:-1])), []).append(example)

    def examples(self) -> Iterator[Example]:
        """The replies to one prompt together, the best rated first."""
        for same in self.by_prompt.values():
            ranks = places([-(example.rating or 0.0) for example in same])
            yield Example([example.candidates[0] for example in same], ranks, same[0].rating)


def comparisons_of(record: object, annotator: str) -> Iterator[Ranking | str]:
    """The rankings that a record holds, or the reason why it is left out."""
    try:
        yield from (ranking_of(example, annotator) for example in examples_of(record, "ranking"))
    except LeftOutError as reason:
        yield str(reason)


def ranking_of(example: Example, annotator: str) -> Ranking:
    """The ranking of the last messages. LeftOutError where they do not reply to one prompt, or are alike."""
    candidates = [said(messages) for messages in example.candidates]
    if not all(messages and messages[-1]["role"] == "assistant" for messages in candidates):
        raise LeftOutError("records without a reply of the assistant's to rank")
    try:
        for messages in candidates:
            checked(messages)
    except LeftOutError as reason:
        raise LeftOutError(f"comparisons of {reason}") from None
    if len(candidates) < 2:
        single = "records with one reply and nothing that compares it"
        judged = "replies judged one by one, each alone with its prompt"
        raise LeftOutError(single if example.rating is None else judged)
    prompt: Conversation = candidates[0][:-1]
    if any(messages[:-1] != prompt for messages in candidates):
        raise LeftOutError("comparisons of replies to different prompts")
    if not prompt:
        raise LeftOutError("comparisons of replies to nothing")
    ranks: dict[str, int] = {}
    for messages, rank in zip(candidates, example.ranks, strict=True):
        response = messages[-1]["content"]
        if ranks.setdefault(response, rank) != rank:
            raise LeftOutError("comparisons of equal responses")
    responses, distinct = list(ranks), sorted(set(ranks.values()))
    if len(responses) < 2:
        raise LeftOutError("comparisons of equal responses")
    if len(distinct) < 2 and example.rating is not None:
        raise LeftOutError("replies judged one by one, all to their prompt alike")
    ranking = [[i for i, response in enumerate(responses) if ranks[response] == place] for place in distinct]
    return new_ranking(ResponseSet(prompt, responses), ranking, annotator, 0)
