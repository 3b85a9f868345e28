"""Where conversations come from: files in the formats people publish them in, and the little world.

    files ──► ConversationSource(name, weight, conversations)    then packing.py: conversations ──► rows

A conversation is a list of messages {"role", "content"}, the roles being system, user and assistant; it
ends with the assistant. A record is an element of a JSON array or a line of JSON, and FORMATS says by
which fields its format is known. What fits no format, or gives the assistant nothing to say, is left out
and counted by reason, and the first such record is shown.

Formats: OpenAI's and ShareGPT's messages; Alpaca (Taori et al. 2023); Self-Instruct (Wang et al. 2022,
arXiv 2212.10560); transcripts as in Bai et al. 2022 (arXiv 2204.05862); OpenAssistant's ranked trees
(Köpf et al. 2023, arXiv 2304.07327); pairs of a question and an answer under several names. Left out:
tool calls, images, and roles beside the three.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from minillm.data import Side, unit_hash
from minillm.errors import InputError
from minillm.io.text import Errors, decode, json_lines, list_files, parse_json, parse_specs, unpacked
from minillm.world import World

EXTENSIONS = (".json", ".json.gz", ".jsonl", ".jsonl.gz")

Message = dict[str, str]
Conversation = list[Message]


@dataclass(frozen=True)
class ConversationSource:
    """A named stream of conversations with a weight in the mixture.

    `conversations()` starts a new pass, over the same conversations in the same order each time.
    `fingerprint` is a digest of them. `skipped` counts what was left out, by reason; `first_skipped`
    is a line about the first of it: where it is, the reason, and the fields it has.
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
    return [_open_source(name, path, weight, errors) for name, path, weight in parse_specs(specs)]


def world_conversations(world: World, split: str, n: int) -> ConversationSource:
    """`n` demonstrations of the little world. Its splits share no question."""
    messages = [conversation.messages for conversation in world.conversations(split, n)]
    return ConversationSource("conversations", 1.0, lambda: iter(messages), _fingerprint(messages))


def split_conversations(
    source: ConversationSource, val_fraction: float
) -> Iterator[tuple[Side, Conversation]]:
    """Give every conversation to train or validation, about `val_fraction` of them to validation.

    The side follows from a hash of the first user message, read as a number in [0, 1): two answers to
    one question never land on two sides. The smallest hash is always held out and the largest never,
    so that neither side is empty. Where all begin alike, the hash is that of the whole conversation.
    Raises InputError for a fraction outside [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"validation fraction {val_fraction}: give at least 0 and less than 1")
    for key in (_first_question, json.dumps):
        hashes = [unit_hash(key(conversation)) for conversation in source.conversations()]
        if len(set(hashes)) > 1:
            break
    smallest, largest = min(hashes, default=0.0), max(hashes, default=0.0)
    for value, conversation in zip(hashes, source.conversations(), strict=True):
        held_out = val_fraction > 0 and (value < val_fraction or value == smallest) and value < largest
        yield "val" if held_out else "train", conversation


def _first_question(conversation: Conversation) -> str:
    return next((message["content"] for message in conversation if message["role"] == "user"), "")


# ---- Files -> records -> conversations


@dataclass
class _Skipped:
    counts: Counter[str]
    first: str | None = None


def _open_source(name: str, path: str, weight: float, errors: Errors) -> ConversationSource:
    files, unread = list_files(name, path, EXTENSIONS)
    skipped = _Skipped(unread)
    fingerprint = _fingerprint(_read(files, errors, skipped))

    def conversations() -> Iterator[Conversation]:
        return _read(files, errors, _Skipped(Counter()))

    return ConversationSource(name, weight, conversations, fingerprint, skipped.counts, skipped.first)


def _fingerprint(conversations: Iterable[Conversation]) -> str:
    digest = blake2b(digest_size=16)
    for conversation in conversations:
        digest.update(json.dumps(conversation).encode())
    return digest.hexdigest()


def _read(files: Sequence[str], errors: Errors, skipped: _Skipped) -> Iterator[Conversation]:
    """One pass over the conversations of `files`; puts into `skipped` what it leaves out."""
    for file in files:
        found, first = False, None
        for place, record in records(file, errors, skipped.counts):
            for result in conversations_of(record):
                if isinstance(result, str):
                    skipped.counts[result] += 1
                    first = first or f"{place} of {file!r} is among the {result}; {_fields(record)}"
                else:
                    found = True
                    yield result
        skipped.first = skipped.first or first
        if not found:
            raise InputError(
                f"{file!r} holds no conversation: {first or 'it has no record'}; give one of the formats "
                f"{', '.join(FORMATS)}"
            )


def _fields(record: Any) -> str:
    if not isinstance(record, dict):
        return "it is no JSON object"
    return f"its fields: {', '.join(record) or 'none'}"


def records(path: str, errors: Errors, skipped: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Every record of a file and its place in it."""
    with unpacked(path) as file:
        # No line of a known format begins with a bracket, but every array does.
        is_array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_array:
        for number, record in enumerate(_array(path, errors), start=1):
            yield f"record {number}", record
    else:
        for number, record in json_lines(path, errors, skipped, parse_json):
            yield f"line {number}", record


def _array(path: str, errors: Errors) -> list[Any]:
    with unpacked(path) as file:
        text = decode(file.read(), path, 0, errors).removeprefix("\ufeff")
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{path!r}: {error}, though it begins as an array; is it whole?") from error


# ---- A record -> conversations

Record = dict[str, Any]
ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, and no UTF-8 can hold it


def conversations_of(record: Any) -> list[Conversation | str]:
    """What a record holds: conversations, each in the form promised, or the reason why it is left out.

    Replies after which the user has another word end at the last reply: nothing behind it is learned.
    """
    fields = record.keys() if isinstance(record, dict) else ()
    read = next((read for required, read in FORMATS.values() if set(required) <= set(fields)), None)
    if read is None:
        return ["records in no known format"]
    try:
        return [_finished(messages) for messages in read(record)] or ["records without a conversation"]
    except (LookupError, TypeError, AttributeError):
        return ["records whose fields hold something else than their format has"]


def _finished(messages: list[Record]) -> Conversation | str:
    """The conversation in messages as they were read, or the reason why there is none."""
    # An empty system message is how some data says that there is none.
    kept = [message for message in messages if message != {"role": "system", "content": ""}]
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if not kept:
        return "conversations without a message of the assistant's"
    if not all(message["role"] in ROLES.values() for message in kept):
        return "conversations with a role other than system, user and assistant"
    if not all(isinstance(message["content"], str) for message in kept):
        return "conversations with a message that is not text"
    if not all(message["content"].strip() for message in kept):
        return "conversations with an empty message"
    if any(SURROGATE.search(message["content"]) for message in kept):
        return "conversations with half a surrogate pair"
    return kept


def _message(role: Any, content: Any) -> Record:
    return {"role": ROLES.get(role.lower(), role), "content": content}


def _exchange(question: Any, answer: Any) -> list[Record]:
    return [_message("user", question), _message("assistant", answer)]


def _paragraphs(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _alpaca(record: Record) -> list[list[Record]]:
    question = _paragraphs(record["instruction"], record.get("input"))
    return [_exchange(question, record["output"])]


def _self_instruct(record: Record) -> list[list[Record]]:
    tasks = [{"instruction": record["instruction"], **instance} for instance in record["instances"]]
    return [conversation for task in tasks for conversation in _alpaca(task)]


def _question(record: Record) -> list[list[Record]]:
    return [_exchange(_paragraphs(record.get("context"), record["question"]), record["answer"])]


def _pair(question: str, answer: str) -> Callable[[Record], list[list[Record]]]:
    # A continuation begins with the space that joins it to its context, and a reply with none.
    return lambda record: [_exchange(record[question].strip(), record[answer].strip())]


def _better(record: Record) -> list[list[Record]]:
    return [_exchange(record["input"], record[f"output_{record['label']}"])]


def _turns(turns: str, role: str, content: str) -> Callable[[Record], list[list[Record]]]:
    return lambda record: [[_message(turn[role], turn[content]) for turn in record[turns]]]


def _transcript(name: str) -> Callable[[Record], list[list[Record]]]:
    return lambda record: _parse_transcript(record[name])


def _parse_transcript(text: str) -> list[list[Record]]:
    """The one conversation in a transcript, none where the text is not one.

    Where somebody speaks twice in a row, the second is a paragraph of the first: replies that begin a
    paragraph with their speaker's name look like that.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if before or not parts:
        return []
    messages: list[Record] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        message = _message(speaker, said.strip())
        if messages and messages[-1]["role"] == message["role"]:
            message["content"] = _paragraphs(messages.pop()["content"], message["content"])
        messages.append(message)
    return [messages]


def _best_path(record: Record) -> list[list[Record]]:
    """From the prompt of a tree along the replies ranked best: unranked ones last, ties to the first."""
    messages, nodes = [], [record["prompt"]]
    while nodes:
        node = min(nodes, key=lambda node: (node.get("rank") is None, node.get("rank") or 0))
        messages.append(_message(node["role"], node["text"]))
        nodes = node.get("replies") or []
    return [messages]


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record], list[list[Record]]]]] = {
    "messages": (("messages",), _turns("messages", "role", "content")),
    "ShareGPT": (("conversations",), _turns("conversations", "from", "value")),
    "Alpaca": (("instruction", "output"), _alpaca),
    "Self-Instruct": (("instruction", "instances"), _self_instruct),
    "prompt/completion": (("prompt", "completion"), _pair("prompt", "completion")),
    "prompt/response": (("prompt", "response"), _pair("prompt", "response")),
    "question/answer": (("question", "answer"), _question),
    "context/continuation": (("context", "continuation"), _pair("context", "continuation")),
    "context/answer": (("context", "answer"), _pair("context", "answer")),
    "labelled pair": (("input", "output_1", "output_2", "label"), _better),
    "chosen transcript": (("chosen",), _transcript("chosen")),
    "transcript": (("transcript",), _transcript("transcript")),
    "transcript as text": (("text",), _transcript("text")),
    "OpenAssistant tree": (("prompt",), _best_path),
}
"""By name: the fields by which a format is known, and what reads a record. The first that fits counts."""
