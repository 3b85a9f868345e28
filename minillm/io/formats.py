"""One table of the formats in which people publish conversations, prompts and preferences.

    a record ──► the first row of FORMATS whose fields it has ──► what is asked, and the replies ──► Example

A row names the fields by which its format is known and those that it obeys. A record with another field
that would change what it says (MEANING: a system message, tools, a label, an image, …) is left out and
counted, never half-read. Whatever else a record holds (an id, a source, a category) is ignored.

Known are: messages as OpenAI and ShareGPT have them; UltraChat; pairs of a question and an answer, as in
Alpaca and Dolly; Self-Instruct (arXiv 2212.10560); transcripts and pairs of them (arXiv 2204.05862);
OpenAssistant's ranked trees (arXiv 2304.07327); two replies and a verdict, as in LLMBar (arXiv 2310.07641);
lists of rated replies, as in UltraFeedback (arXiv 2310.01377); single replies judged good or bad, as in KTO
(arXiv 2402.01306). Calls of tools are read in conversations as OpenAI writes them. Left out: calls in prompts
and preferences, and calls as a text; images; roles beside system, user, assistant and tool.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations
from json import loads
from math import isnan
from operator import itemgetter
from statistics import fmean
from typing import Any, Literal

from minillm.chat import Conversation, Message
from minillm.errors import InputError
from minillm.io.files import UNNAMED
from minillm.io.messages import ROLES as OURS
from minillm.io.messages import check_calls, check_messages, with_tools
from minillm.tools.streams import tables

Record = dict[str, Any]
Purpose = Literal["conversation", "prompt", "ranking"]
Score = float | None
"""The highest is the best, equal ones tie; None is that of a reply alone which nobody judged."""
BAD = -1e9
"""The score of replies of which a verdict says that all are bad: they tie, and none is an example."""
Replies = Sequence[tuple[Any, Score]]
"""The replies in a record, each a text, a message or a whole conversation."""
Example = Sequence[tuple[Conversation, Score]]
"""Conversations alike but for their last message. One alone is a demonstration, or a prompt without reply."""
Firsts = Callable[[], Sequence[int] | None]
"""The numbers by which verdicts may call the first of several replies; with none, by that in its name."""
Comparison = tuple[Conversation, dict[str, float]]
"""What is asked, and the score of each reply: of one alone, until others to the same prompt are found."""


class LeftOutError(Exception):
    """Why a record is left out, as a plural that a count can precede."""


@dataclass(frozen=True)
class Format:
    """A row of the table."""

    name: str
    known_by: tuple[tuple[str, ...], ...]
    """Of each group a record has one field or more."""
    obeys: tuple[str, ...]
    """Further fields that change what a record says, and are understood."""
    gives: tuple[Purpose, ...]
    replies: Callable[[Record], Replies] = lambda fields: ()
    """The replies to what is asked."""
    parts: Callable[[Record, Purpose], list[Record]] | None = None
    """The records of other rows that a record holds in place of replies of its own."""


def read_record(record: object, purpose: Purpose, firsts: Firsts = tuple) -> Iterator[Any]:
    """What a record gives for a purpose and, as texts, the reasons why some or all of it is left out."""
    try:
        for example in _examples(record, purpose, firsts):
            yield from USES[purpose](example)
    except LeftOutError as reason:
        yield str(reason)


def _examples(record: object, purpose: Purpose, firsts: Firsts) -> list[Example]:
    form, fields = known(record, firsts)
    if form is None:
        raise LeftOutError("records in no known format")
    _check_understood(fields, [*chain(*form.known_by, form.obeys)])
    try:
        if form.parts:
            if not (parts := form.parts(fields, purpose)):
                raise LeftOutError(f"records that hold no {purpose}")
            return [example for part in parts for example in _examples(part, purpose, firsts)]
        try:
            replies = form.replies(fields)
        except LeftOutError:
            if purpose != "prompt" or not _asked(fields):
                raise
            replies = ()  # a prompt is one whichever reply is right
        return [_example(fields, replies)]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise LeftOutError("records whose fields hold something else than their format has") from error


def known(record: object, firsts: Firsts = tuple) -> tuple[Format | None, Record]:
    """The format of a record, and its fields, with names in small letters."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        return None, {}
    fields = {re.sub("[- ]", "_", str(name).strip().lower()): value for name, value in record.items()}
    fields[TWICE] = len(fields) < len(record) or None
    if isinstance(fields.get("turns"), int):
        del fields["turns"]  # how many there are
    if isinstance(fields.get("history"), list):
        fields["earlier turns"] = fields.pop("history")  # a text is the question
    # "reasoning": "on" says that a reply holds its thoughts, and is none.
    fields = {n: value for n, value in fields.items() if n not in THOUGHT or value not in ("on", "off")}
    if isinstance(fields.get("label"), dict):
        del fields["label"]  # of what kind a record is
    for name in TURNS:  # as tables hold them
        if isinstance(held := fields.get(name), str) and SPELLED.match(held):
            with suppress(ValueError, RecursionError):
                fields[name] = loads(held)
    for name in ("input", "info", "chat_template_kwargs"):  # where OpenAI and SmolTalk2 have what is asked
        fields |= fields.pop(name) if isinstance(fields.get(name), dict) else {}
    if "instruction" in fields and "### Instruction:" in str(fields.get("prompt")):
        del fields["prompt"]  # the other fields, put into a template
    if fields.keys() & set(ANSWERS) and not fields.keys() & {*RATINGS, *VERDICTS, "ranking"}:
        for name in REPLIES:  # samples that nobody judged
            if isinstance(held := fields.get(name), list) and not any(isinstance(r, dict) for r in held):
                del fields[name]
    fields |= _numbered(fields) | {FIRSTS: firsts}
    if isinstance(fields.get("prompt"), dict) and "text" in fields["prompt"]:
        fields[TREE] = fields["prompt"]
    has = {name for name, value in fields.items() if value is not None}
    return next((form for form in FORMATS if all(has & set(group) for group in form.known_by)), None), fields


def nearest(record: object, purpose: Purpose) -> str:
    """The fields of a record, and the format that it misses by least, with what it lacks, if it has none."""
    if not isinstance(record, dict):
        return "it is a list" if isinstance(record, list) else "it is no JSON object"
    fields = known(record)[1]
    lacking = {form: [group for group in form.known_by if not set(group) & fields.keys()]
               for form in FORMATS if purpose in form.gives}  # fmt: skip
    form = min(lacking, key=lambda form: (len(lacking[form]) / len(form.known_by), form.name != "messages"))
    wanted = " and ".join(" or ".join(group[:6]) for group in lacking[form])
    near = f"; the nearest format is {form.name}, for which it lacks {wanted}" if wanted else ""
    return f"its fields: {', '.join(map(str, record)) or 'none'}{near}"


# ---- Fields

NAMES: dict[str, Any] = tables(__file__)
FIELDS = {of: tuple(names) for of, names in NAMES["fields"].items()}
TURNS, QUESTIONS, ABOUT, ANSWERS = (FIELDS[of] for of in ("turns", "questions", "about", "answers"))
REPLIES, SYSTEM, HISTORY, THOUGHT = (FIELDS[of] for of in ("replies", "system", "history", "thought"))
CHOSEN, REJECTED, VERDICTS, SIGNED = (FIELDS[of] for of in ("chosen", "rejected", "verdicts", "signed"))
RATING, RATINGS, SCORES = (FIELDS[of] for of in ("rating", "ratings", "scores"))
IN_TURNS = (*THOUGHT, *FIELDS["weights"], "tool_calls", "function_call", "rank", "replies")
IN_REPLIES, IN_MESSAGE = (*ANSWERS, *RATING, "rank", "replies"), " in a message"
PAIR_SCORES = tuple(form.format(name) for form in SCORES for name in ("chosen", "rejected"))
NUMBERED, TREE = "response_a and response_b", "a prompt with replies"  # made by `known`
CALLED, FIRSTS = "called by a verdict", "numbers of a first reply"  # made by `_numbered` and `known`
TWICE = "one name spelled in two ways"
PLACEHOLDER = re.compile(r"<\|?(image|video|audio|extra_id)[ _]?\d*\|?>")  # of NeMo's, the last opens a turn
SPELLED = re.compile(r"\s*\[\s*\{\s*[\"'](role|content|from|value)[\"']")  # as tables hold messages
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, and no UTF-8 can hold it
ASKED = (*QUESTIONS, *ABOUT, *SYSTEM, *HISTORY)
MEANING = {*PAIR_SCORES, NUMBERED, UNNAMED, TWICE}.union(*FIELDS.values()).difference(FIELDS["origins"])
"""The fields that change what a record says."""


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {}, "[]", "<noinput>")


def _check_understood(fields: Record, understood: Iterable[str], where: str = "") -> None:
    """LeftOutError where one of these fields changes what a record says, and is not understood."""
    for name in sorted(fields.keys() & MEANING.difference(understood)):
        if not _is_empty(fields[name]):
            raise LeftOutError(f"records with {name!r}{where}, which changes them and is not understood")


def _first(fields: Record, names: Iterable[str]) -> Any:
    """The first of these fields that holds something, else None."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _one(fields: Record, names: Sequence[str]) -> Any:
    """The field of these names that holds something. LeftOutError where two of them say different things.
    Where one says all that the others do, it counts: a solution that ends with the answer, say."""
    found = {name: fields[name] for name in names if not _is_empty(fields.get(name))}
    if not found:
        return _first(fields, names)
    longest = max(found.values(), key=lambda value: len(str(value)))
    for name, value in found.items():
        if str(value) not in str(longest):
            raise LeftOutError(f"records with {name!r} and {' and '.join(n for n in found if n != name)!r}")
    return longest


# ---- Messages

ROLES = {name: role for role, names in NAMES["roles"].items() for name in names}
"""By the names that people give them, what a message can be."""
TEXTS = ("content", "value", "text", "full_text", "parts", "refusal")
PARTS = ("text", "input_text", "output_text")


def _message(role: str, content: Any) -> Message:
    return {"role": ROLES.get(role.lower(), role), "content": _text(content)}


def _text(content: Any) -> str:
    """The text of a content, which may be a list of parts."""
    if isinstance(content, list):
        return "\n".join(map(_text, content))
    if isinstance(content, dict) and content.get("type", "text") in PARTS and not content.get("thought"):
        _check_understood(content, (), IN_MESSAGE)
        return _text(content["text"] if "text" in content else content["parts"])
    if not isinstance(content, str | None):
        raise LeftOutError("conversations with a message that is not text")
    return content or ""


def _turn(turn: Record) -> list[Message]:
    """The message in an element of a list of turns, or the two of an exchange."""
    role: Any = turn.get("role") or turn.get("from")
    if role is None and (turn.keys() & set(QUESTIONS + ABOUT)) and turn.keys() & set(ANSWERS):
        _check_understood(turn, QUESTIONS + ABOUT + ANSWERS, IN_MESSAGE)
        return [_message("user", _one(turn, QUESTIONS + ABOUT)), _message("assistant", _one(turn, ANSWERS))]
    _check_understood(turn, IN_TURNS, IN_MESSAGE)
    if turn.get("channel") not in (None, "final"):
        raise LeftOutError("conversations with a message in another channel than the final one")
    calls = turn.get("tool_calls") or [{"function": one} for one in [turn.get("function_call")] if one]
    if not calls and not turn.keys() & set(TEXTS):
        raise KeyError("content")
    message = _message(role, _one(turn, TEXTS))
    if message["role"] == "assistant":
        message["content"] = _thought_of(turn) + message["content"]
        try:
            message |= {"tool_calls": check_calls(calls, "a turn")} if calls else {}
        except InputError:  # spelled in another way
            message["role"] = "tool"
        weights = [turn[name] for name in FIELDS["weights"] if turn.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):
            raise LeftOutError("conversations with a weight other than 0 and 1")
        if 0 in weights:
            message["train"] = False
    if message["role"] == "tool" and turn.get("tool_call_id") is not None:
        message["tool_call_id"] = turn["tool_call_id"]
    # Some data says by a system message of nothing that there is none.
    return [message] if message["role"] != "system" or message["content"] else []


def _thought_of(fields: Record) -> str:
    """What was thought before a reply, as models that think write it."""
    thought = next((_text(fields[name]) for name in THOUGHT if not _is_empty(fields.get(name))), "")
    return f"<think>\n{thought}\n</think>\n\n" if thought else ""


def _messages(said: Any, role: str = "", may_be_transcript: bool = True) -> Conversation:
    """The messages in a list of turns, in one turn, in a transcript, in a list of texts that the user
    begins, or in a text that `role` says: it says no several."""
    if isinstance(said, str):
        found = _parse_transcript(said) if may_be_transcript else []
        if not (found or role):
            raise TypeError(said)
        return found or [_message(role, said)]
    if isinstance(said, dict):
        said = [said if "from" in said or not role else {**said, "role": said.get("role") or role}]
    if not isinstance(said, list):
        raise TypeError(said)
    if _are_texts(said) and not (role and len(said) > 1):
        return [_message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    return [message for turn in said for message in _turn(turn)]


SPEAKER = r"{}(Human|Assistant|User|System):|(?:^|\n|(?<=\S))### (Human|Assistant):"


def _parse_transcript(text: str) -> Conversation:
    """The conversation in a transcript; nothing where the text is not one. An open last turn is no message.
    Turns follow empty lines, or just begin lines, where none does. Where somebody speaks twice in a row, the
    second is a paragraph of the first: replies that begin a paragraph with their speaker's name look like
    that."""
    apart = "\n\n" if re.search(SPEAKER.format("\n\n"), text.lstrip()) else "\n"
    before, *parts = re.split(SPEAKER.format(apart), apart + text.lstrip())
    if before.strip() or not parts:
        return []
    messages: Conversation = []
    for first, second, said in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        message = _message(first or second, said.strip())
        if messages and messages[-1]["role"] == message["role"]:
            message["content"] = "\n\n".join(filter(None, (messages.pop()["content"], message["content"])))
        messages.append(message)
    return messages


# ---- What is asked, and what is replied


def _example(fields: Record, replies: Replies) -> Example:
    """What a record asks, before each of its replies."""
    asked = _asked(fields)
    last = [_messages(said, "assistant", may_be_transcript=False)[-1:] for said, _ in replies]
    if len(replies) > 1 and asked[-1:] in last:
        asked = asked[:-1]  # turns that hold a reply already
    found = [(_reply(asked, said), score) for said, score in replies]
    return found if len(found) > 1 else [(found[0][0] if found else asked, _rating(fields))]


def _asked(fields: Record) -> Conversation:
    """All that stands before a reply: the system message, earlier turns, the question."""
    earlier, tools = fields.get("earlier turns") or [], fields.get("tools") or []
    if all(isinstance(turn, list) for turn in earlier):
        earlier = [text for turn in earlier for text in turn]
    messages, system = _messages(earlier) + _question(fields), _one(fields, SYSTEM)
    tools = loads(tools) if isinstance(tools, str) else tools
    tools = [dict(loads(tool) if isinstance(tool, str) else tool) for tool in tools]
    if not _is_empty(system) and messages[:1] != [first := _message("system", system)]:
        if messages and messages[0]["role"] == "system":
            raise LeftOutError("records with two system messages")
        messages = [first, *messages]
    return with_tools(messages, tools)


def _question(fields: Record) -> Conversation:
    if turns := _one(fields, TURNS[:-1]) or fields.get("data"):
        messages = _messages(turns, "user" if turns is fields.get("turns") else "")  # as MT-Bench has them
        said = "\n".join(message["content"] for message in messages)
        for name in QUESTIONS + ABOUT:
            if isinstance(beside := fields.get(name), str) and beside not in said:
                raise LeftOutError(f"records with a {name!r} that is not among their turns")
        return messages
    parts = [_one(fields, QUESTIONS), *map(fields.get, ABOUT)]
    if "instruction" not in fields:  # a task stands before what it is about, a question behind it
        parts.reverse()
    parts = [part for part in parts if not _is_empty(part)]
    if not parts:
        return []
    question = "\n\n".join(parts) if len(parts) > 1 else parts[0]
    messages = _messages(question, "user")
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        return messages[:-1]  # a transcript that ends with the name of who is to speak
    return messages if not isinstance(question, str) else [_message("user", question)]


def _reply(asked: Conversation, said: Any) -> Conversation:
    """The conversation that a reply makes of what was asked; the reply may hold that, too."""
    nothing_asked = all(message["role"] == "system" for message in asked)
    said = said[0] if not nothing_asked and isinstance(said, list) and len(said) == 1 else said
    messages = _messages(said, "assistant", may_be_transcript=nothing_asked)
    if not messages or messages[0]["role"] in ("assistant", "tool"):
        if asked and asked[-1]["role"] == "assistant":
            raise LeftOutError("records with two replies in a row")
        # A continuation begins with the one space that joins it to its context; indentation is kept.
        if isinstance(said, str) and re.match(r" \S", said) and not asked[-1]["content"][-1:].isspace():
            messages = [{**messages[0], "content": messages[0]["content"].removeprefix(" ")}]
        return asked + messages
    system = asked[:1] if asked and asked[0]["role"] == "system" and messages[0]["role"] != "system" else []
    whole = system + messages
    if asked not in (whole, system) and whole[: len(asked)] != asked:
        raise LeftOutError("replies to another prompt than stands beside them")
    return whole


# ---- The replies in a record, by its format


def _answer(fields: Record) -> Replies:
    """The one answer, if it is not among the turns already."""
    thought, turns = _thought_of(fields), _first(fields, TURNS)
    if (turns and _messages(turns)[-1]["role"] != "user") or (answer := _one(fields, ANSWERS)) is None:
        return ()
    return [(thought + answer if thought else answer, None)]


def _transcript(fields: Record) -> Replies:
    text = _first(fields, ("transcript", "chosen", "text"))
    if isinstance(text, str) and not _parse_transcript(text):
        raise LeftOutError("records without a conversation")
    return [(text, None)]


def _chosen_and_rejected(fields: Record) -> Replies:
    scores: list[Any] = [_score_beside(fields, name) for name in ("chosen", "rejected")]
    if isinstance(ratings := fields.get("rating"), list) and len(ratings) == 2:  # in any order
        scores = sorted(map(float, ratings), reverse=True)
    better, worse = (1.0, 0.0) if {"None", "nan", ""} & {*map(str, scores)} else map(float, scores)
    if better < worse:
        raise LeftOutError("pairs whose scores contradict their order")
    both = (_one(fields, CHOSEN), better), (_one(fields, REJECTED), worse)
    return [(reply, score) for side, score in both for reply in (side if _are_texts(side) else [side])]


def _are_texts(held: Any) -> bool:
    """Whether this is a list of texts: of replies, as in RewardBench 2, or of turns; and not of messages."""
    return isinstance(held, list) and bool(held) and all(isinstance(text, str) for text in held)


def _score_beside(fields: Record, *names: str) -> Any:
    """The score that the record has for a reply of one of these names."""
    return _first(fields, [form.format(name) for name in names for form in SCORES])


MARKED = re.compile(
    r"(output|response|answer|completion|reply|conversation|summary|human_ref|generation)_?(\d|[a-i])"
)


def _numbered(fields: Record) -> Record:
    """The replies that several fields hold, as in response_a and response_b: a list of them, with the names
    by which a verdict may call each."""
    stems: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        if (match := MARKED.fullmatch(name)) and not _is_empty(value):
            stems.setdefault(match[1], {})[match[2]] = value
    stem, replies = max(stems.items(), key=lambda stem: len(stem[1]), default=("", {}))
    named = {
        mark: (mark, f"{stem}_{mark}", f"{stem}{mark}", f"model_{mark}", f"option_{mark}")
        for mark in sorted(replies)
    }
    found = [{"text": replies[m], "score": _score_beside(fields, *of), CALLED: of} for m, of in named.items()]
    return {NUMBERED: found} if len(found) > 1 else {}


def firsts_of(records: Iterable[object]) -> Sequence[int] | None:
    """The numbers by which the verdicts of `records` may call a first reply, such as response_1: 0, 1, either
    where a `label` is 1 in all of them; none where the replies' own names do. None where nothing does: of two
    replies, one of the labels 0, 1 and 2 is a tie, the first or the last."""
    numbers, count, name, named = set[int](), 0, "", True
    for fields in (known(record)[1] for record in records):
        if (word := _verdict_of(fields)).isdecimal() and (held := _first(fields, (NUMBERED, *REPLIES))):
            numbers.add(int(word))
            named &= any(word in reply.get(CALLED, ()) for reply in held if isinstance(reply, dict))
            count, name = max(count, len(held)), next(name for name in VERDICTS if name in fields)
    fit = tuple(first for first in (0, 1) if all(first <= number < first + count for number in numbers))
    if not (fit or named):
        return None
    return fit if len(fit) == 1 or name == "label" else ()


def _listed_replies(fields: Record) -> Replies:
    """Replies by a field that names the best of them, else by their own scores; without those of none."""
    texts = ("text", "response", "answer", "completion", "content", "output", "value")
    held = _first(fields, (NUMBERED, *REPLIES))
    replies = [reply if isinstance(reply, dict) else {"text": reply} for reply in _listed(held)]
    for reply in replies:
        _check_understood(reply, IN_REPLIES, " in a reply")
    names = [reply.get(CALLED) or (str(i),) for i, reply in enumerate(replies)]
    signed = _first(fields, SIGNED) if len(replies) == 2 else None
    given: list[Any] = [_verdict(fields, names), None if signed is None else [0.0, float(signed)]]
    given += [_scores_beside(fields, len(replies)), list(map(_score, replies))]
    scores = _agreed([scores for scores in given if scores is not None])
    rated = [(_first(reply, texts), score) for reply, score in zip(replies, scores, strict=True)]
    if len(known := [(t, float(s)) for t, s in rated if s is not None and not isnan(float(s))]) < 2:
        raise LeftOutError("records with no verdict on two replies")
    return known


def _agreed(given: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The first of these scores. LeftOutError where others have two replies in the other order."""
    for one, other in combinations(zip(*given, strict=True), 2):
        if {1, -1} <= {(a > b) - (a < b) for a, b in zip(one, other, strict=True) if None not in (a, b)}:
            raise LeftOutError("records with verdicts or scores that contradict each other")
    return given[0]


def _verdict(fields: Record, names: Sequence[tuple[str, ...]]) -> list[float] | None:
    """The scores by a field that names the best of some replies, or a tie; None where there is none."""
    _one(fields, VERDICTS)  # PKU-SafeRLHF has two, the better reply and the safer one
    if not (word := _verdict_of(fields)):
        return None
    if len(names) == 2 and (order := re.fullmatch(r"\[*(\w)(>+|=)\w\]*", word)):  # as in A>B
        word = order[1] if ">" in order[2] else "tie"
    if word.endswith(("bad", "bad)")) or word in ("neither", "none"):
        return [BAD] * len(names)
    if word.startswith(("tie", "both")) or word in ("equal", "same"):
        return [0.0] * len(names)
    scores = [float(word in name) for name in names]
    if word.isdecimal() and (starts := fields[FIRSTS]()) != ():
        scores = [float(starts is None or int(word) - i in starts) for i in range(len(names))]
    if sum(scores) != 1:
        how = "names none of their replies" if not sum(scores) else "may count them from 0 or from 1"
        raise LeftOutError(f"records with a verdict that {how}")
    return scores


def _verdict_of(fields: Record) -> str:
    """The word or number by which a field names the best of some replies; nothing where there is none."""
    verdict = _first(fields, VERDICTS)
    return "" if verdict is None else str(verdict).strip().lower().removesuffix(".0")


def _scores_beside(fields: Record, count: int) -> list[Any] | None:
    """The scores by a list beside the replies; our own rankings hold lists of places, best first."""
    if ranking := fields.get("ranking"):
        place = {i: rank for rank, tied in enumerate(_listed(ranking)) for i in tied}
        return [-place[i] for i in range(count)]
    for names, sign in ((RATINGS[:3], 1), (RATINGS[3:], -1)):
        if values := next((fields[name] for name in names if fields.get(name)), None):
            return [None if value is None else sign * float(value) for value in _listed(values)]
    return None


def _listed(values: Any) -> list[Any]:
    """A list, and nothing else that has members: the keys of an object, the letters of a text."""
    if not isinstance(values, list):
        raise LeftOutError("records whose replies or their ratings are no list")
    return values


def _score(reply: Record) -> Score:
    """The score by a reply's own rank or rating; None for one that has none."""
    if reply.get("rank") is not None:
        return -float(reply["rank"])
    if (rating := _rating(reply)) is not None:
        return rating
    aspects = reply.get("annotations") or {}
    found = [float(a["Rating"]) for a in aspects.values() if str(a.get("Rating", "")).isdigit()]
    return fmean(found) if found else None


def _rating(fields: Record) -> float | None:
    """What a reply is rated: a truth, or a number."""
    name, value = next(((n, fields[n]) for n in RATING if not _is_empty(fields.get(n))), ("", None))
    truths, word = {"true": "1", "false": "0"}, str(value).lower()  # as tables spell them
    try:
        return None if value is None else float(truths.get(word, word))
    except ValueError:
        raise LeftOutError(f"records with a {name!r} that is no truth and no number") from None


# ---- The records in a record


def _instances(fields: Record, purpose: Purpose) -> list[Record]:
    return [{"instruction": fields["instruction"], **instance} for instance in fields["instances"]]


def _branches(fields: Record, purpose: Purpose) -> list[Record]:
    """Of a tree, the path along the replies ranked best (unranked ones last, ties to the first); or, to rank,
    the replies to each message that bear a rank, where there are two or more. Those that its readers have
    thrown out are no part of it."""
    records, paths = [], [[fields[TREE]]]
    while paths:
        path = paths.pop()
        found = path[-1].get("replies") or []
        replies = [r for r in found if not r.get("deleted") and r.get("review_result") is not False]
        replies.sort(key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
        if purpose != "ranking" and not replies:
            return [{"messages": path}]
        paths += [[*path, reply] for reply in reversed(replies)]
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if len(ranked) >= 2 and all(reply["role"] == "assistant" for reply in ranked):
            records.append({"messages": path, "replies": ranked})
    return records


ANYTHING: tuple[Purpose, ...] = ("conversation", "prompt", "ranking")
TEACHES: tuple[Purpose, ...] = ("conversation", "prompt")
FORMATS = (
    Format("chosen and rejected replies", (CHOSEN, REJECTED),
           (*TURNS, *ASKED, *ANSWERS, *REPLIES, "rating", "ratings", "score", "scores",
            *PAIR_SCORES), ANYTHING, _chosen_and_rejected),
    Format("numbered replies with a verdict", ((NUMBERED,),),
           (*TURNS, *ASKED, *VERDICTS, *SIGNED), ANYTHING, _listed_replies),
    Format("OpenAssistant's tree of replies", ((TREE,),), ("prompt",), ANYTHING, parts=_branches),
    Format("rated replies", ((*TURNS, *QUESTIONS, *ABOUT), REPLIES),
           (*ASKED, *RATINGS, *VERDICTS, "ranking"), ANYTHING, _listed_replies),
    Format("messages", (TURNS,), (*ASKED, *ANSWERS, *RATING, "tools"), ANYTHING, _answer),
    Format("Self-Instruct", (("instruction",), ("instances",)), ABOUT, TEACHES, parts=_instances),
    Format("a question and an answer", ((*QUESTIONS, *ABOUT), ANSWERS),
           (*SYSTEM, *HISTORY, *THOUGHT, *RATING), ANYTHING, _answer),
    Format("a transcript", (("transcript", "text", "chosen"),), SYSTEM, TEACHES, _transcript),
    Format("a prompt", ((*QUESTIONS, *ABOUT),), (*SYSTEM, *HISTORY), ("prompt",)),
)  # fmt: skip
"""The first row that fits counts."""

# ---- An example → a conversation, a prompt or a comparison


def demonstration(example: Example) -> Iterator[Conversation | str]:
    """The conversation to learn from, and why some or all of it is left out. It ends at the last reply:
    nothing behind that is learned."""
    messages, score = max(example, key=itemgetter(1))
    if score is not None and (score == BAD or isnan(score) or (len(example) == 1 and score <= 0)):
        raise LeftOutError("replies judged bad, by a label or a rating of 0 or less")
    end = _first_unread_call(messages)
    kept, empty = messages[:end], False
    while kept and (kept[-1]["role"] != "assistant" or not _says(kept[-1])):
        empty |= kept.pop()["role"] == "assistant"
    if not kept:
        what = "with an empty message" if empty else "without a message of the assistant's"
        what = "with a tool call and no reply before it" if end < len(messages) else what
        raise LeftOutError(f"conversations {what}")
    if not any(m.get("train", True) for m in kept if m["role"] == "assistant"):
        raise LeftOutError("conversations whose replies all have weight 0")
    yield checked(kept, may_call=True)
    if end < len(messages):
        yield "ends of conversations from a tool call on"
    elif empty:
        yield "empty last replies"


def _first_unread_call(messages: Conversation) -> int:
    """Where the first call stands that is a text and not in the form of OpenAI's, or else the end."""
    answers = False
    for i, message in enumerate(messages):
        answers = "tool_calls" in message or (answers and message["role"] == "tool")
        if message["role"] == "tool" and not answers:
            return i - (i > 0 and messages[i - 1]["role"] == "assistant")
    return len(messages)


def _says(message: Message) -> bool:
    """Whether there is something in a message; of what a tool gives, nothing is a result too."""
    return bool(message["content"].strip()) or "tool_calls" in message or message["role"] == "tool"


def prompt(example: Example) -> Iterator[Conversation | str]:
    """What is asked: all before the last reply, or all where nobody has replied."""
    said = example[0][0]
    asked = said[:-1] if said and said[-1]["role"] == "assistant" else said
    yield [{"role": message["role"], "content": message["content"]} for message in checked(asked)]


def checked(messages: Conversation, may_call: bool = False) -> Conversation:
    """The messages, if our roles can have said them. LeftOutError says what is wrong with them."""
    roles, contents = ([message[name] for message in messages] for name in ("role", "content"))
    wrong = {
        "that are replies to nothing": "user" not in roles,
        "with a tool call": not may_call and any(m["role"] == "tool" or "tool_calls" in m for m in messages),
        "with a role other than system, user, assistant and tool": set(roles).difference(OURS),
        "with an empty message": not all(map(_says, messages)),
        "with half a surrogate pair": any(map(SURROGATE.search, contents)),
        "with a placeholder, as of an image or a turn": any(map(PLACEHOLDER.search, contents)),
        "with a list of messages spelled as a text": any(map(SPELLED.match, contents)),
    }
    if reason := next((reason for reason, found in wrong.items() if found), None):
        raise LeftOutError(f"conversations {reason}")
    try:
        check_messages(messages)
    except InputError as error:
        raise LeftOutError("conversations with results in another order than their calls") from error
    return messages


def comparison(example: Example) -> Iterator[Comparison]:
    """What is asked, and the scores of the different replies."""
    if not all(messages and messages[-1]["role"] == "assistant" for messages, _ in example):
        raise LeftOutError("records without a reply of the assistant's to rank")
    asked = checked(example[0][0])[:-1]
    if any(checked(messages)[:-1] != asked for messages, _ in example):
        raise LeftOutError("comparisons of replies to different prompts")
    if example[0][1] is None or isnan(example[0][1]):
        raise LeftOutError("records with one reply and nothing that compares it")
    yield asked, different([(messages[-1]["content"], score) for messages, score in example])


def different(replies: Replies) -> dict[str, float]:
    """The scores of replies, which must be as different as they are."""
    scores: dict[str, Any] = dict(replies)
    if len(scores) < min(2, len(replies)) or any(scores[text] != score for text, score in replies):
        raise LeftOutError("comparisons of equal responses")
    return scores


USES: dict[Purpose, Callable[[Example], Iterator[Any]]] = {
    "conversation": demonstration, "prompt": prompt, "ranking": comparison,
}  # fmt: skip
