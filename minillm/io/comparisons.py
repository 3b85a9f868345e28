"""Rankings that other people published, read as they are.

Every response of a record is read as a conversation (conversations.py): what all of them begin with is the
prompt, and their last messages are the responses. What fits no format, or has no two responses to one
prompt, is left out and counted by reason, and the first such record is shown.

Formats: pairs of transcripts, Bai et al. 2022 (arXiv 2204.05862); instruction, chosen, rejected; LLMBar,
Zeng et al. 2023 (arXiv 2310.07641); OpenAssistant's trees, Köpf et al. 2023 (arXiv 2304.07327), where the
replies to one message are ranked, at every depth.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from minillm.errors import InputError
from minillm.io.conversations import EXTENSIONS, Conversation, Record, conversations_of, records
from minillm.io.text import Errors, list_files, parse_specs
from minillm.preferences import Ranking, ResponseSet, new_ranking


@dataclass(frozen=True)
class Comparison:
    """Records of conversations that end in the responses, and their ranks: the lowest is the best."""

    candidates: list[Record]
    ranks: list[int]


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


def _open(name: str, path: str, errors: Errors) -> ComparisonSource:
    files, unread = list_files(name, path, EXTENSIONS)
    source = ComparisonSource(name, skipped=unread)
    for file in files:
        before, first = len(source.rankings), None
        for place, record in records(file, errors, source.skipped):
            for result in comparisons_of(record, name):
                if isinstance(result, Ranking):
                    source.rankings.append(result)
                else:
                    source.skipped[result] += 1
                    first = first or f"{place} of {file!r} is among the {result}"
        if len(source.rankings) == before:
            raise InputError(
                f"{file!r} holds no ranking: {first or 'it has no record'}; give one of the formats "
                f"{', '.join(FORMATS)}"
            )
        source.first_skipped = source.first_skipped or first
    return source


def comparisons_of(record: object, annotator: str) -> Iterator[Ranking | str]:
    """The rankings that a record holds, or the reason why it is left out."""
    if not isinstance(record, dict):
        yield "records that are no JSON objects"
        return
    read = next((read for required, read in FORMATS.values() if set(required) <= record.keys()), None)
    if read is None:
        yield "records in no known format"
        return
    try:
        found = list(read(record))
    except (LookupError, TypeError, AttributeError, ValueError):
        yield "records whose fields hold something else than their format has"
        return
    if not found:
        yield "records with no two ranked responses"
    for comparison in found:
        yield _ranking(comparison, annotator)


def _ranking(comparison: Comparison, annotator: str) -> Ranking | str:
    conversations: list[Conversation] = []
    for candidate in comparison.candidates:
        for result in conversations_of(candidate):
            if isinstance(result, str):
                return f"comparisons of {result}"
            conversations.append(result)
    prompts = [conversation[:-1] for conversation in conversations]
    if len(conversations) != len(comparison.ranks) or any(prompt != prompts[0] for prompt in prompts):
        return "comparisons of replies to different prompts"
    if not prompts[0]:
        return "comparisons of replies to nothing"
    responses = [conversation[-1]["content"] for conversation in conversations]
    if len(set(responses)) < len(responses):
        return "comparisons of equal responses"
    places = sorted(set(comparison.ranks))
    ranking = [[i for i, rank in enumerate(comparison.ranks) if rank == place] for place in places]
    return new_ranking(ResponseSet(prompts[0], responses), ranking, annotator, 0)


# ---- A record -> comparisons


def _instruction(record: Record) -> Iterator[Comparison]:
    asked = {"instruction": record["instruction"], "input": record.get("input")}
    yield Comparison([{**asked, "output": record[name]} for name in ("chosen", "rejected")], [0, 1])


def _transcripts(record: Record) -> Iterator[Comparison]:
    yield Comparison([{"transcript": record[name]} for name in ("chosen", "rejected")], [0, 1])


def _labelled(record: Record) -> Iterator[Comparison]:
    candidates = [{"question": record["input"], "answer": record[f"output_{i}"]} for i in (1, 2)]
    yield Comparison(candidates, {"1": [0, 1], "2": [1, 0]}[str(record["label"])])


def _tree(record: Record) -> Iterator[Comparison]:
    """The replies to each message of a tree that bear a rank, where there are two or more."""
    paths = [[record["prompt"]]]
    while paths:
        path = paths.pop()
        replies = path[-1].get("replies") or []
        paths += [[*path, reply] for reply in reversed(replies)]
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if len(ranked) >= 2 and all(reply["role"] == "assistant" for reply in ranked):
            yield Comparison([_conversation([*path, reply]) for reply in ranked], [r["rank"] for r in ranked])


def _conversation(path: Sequence[Record]) -> Record:
    return {"messages": [{"role": node["role"], "content": node["text"]} for node in path]}


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record], Iterator[Comparison]]]] = {
    "instruction/chosen/rejected": (("instruction", "chosen", "rejected"), _instruction),
    "chosen/rejected transcripts": (("chosen", "rejected"), _transcripts),
    "labelled pair": (("input", "output_1", "output_2", "label"), _labelled),
    "OpenAssistant tree": (("prompt",), _tree),
}
"""By name: the fields by which a format is known, and what reads a record. The first that fits counts."""
