"""One table of the formats in which people publish conversations, prompts and preferences.

    a record ──► the first row of FORMATS whose fields it has ──► Example ──► conversation, prompt or ranking

A row names the fields by which its format is known and those that it obeys. A record with another field
that would change what it says (MEANING: a system message, tools, a label, an image, …) is left out and
counted, never half-read. Whatever else a record holds (an id, a source, a category) is ignored.

Known are: messages as OpenAI and ShareGPT have them; UltraChat; Alpaca (Taori et al. 2023) and other pairs
of a question and an answer, Dolly among them; Self-Instruct (Wang et al. 2022, arXiv 2212.10560);
transcripts and pairs of them as in Bai et al. 2022 (arXiv 2204.05862); OpenAssistant's ranked trees (Köpf
et al. 2023, arXiv 2304.07327); two replies and a verdict, as in LLMBar (Zeng et al. 2023,
arXiv 2310.07641); lists of rated replies, as in UltraFeedback (Cui et al. 2023, arXiv 2310.01377); single
replies judged good or bad, as in KTO (Ethayarajh et al. 2024, arXiv 2402.01306). Left out: tool calls,
images, and roles beside system, user and assistant.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from minillm.chat import Conversation, Message

Record = dict[str, Any]
Purpose = Literal["conversation", "prompt", "ranking"]


class LeftOutError(Exception):
    """Why a record is left out, as a plural that a count can precede."""


@dataclass(frozen=True)
class Example:
    """Conversations alike but for their last message. One alone is a demonstration, or a prompt that nobody
    has answered."""

    candidates: list[Conversation]
    ranks: Sequence[int] = (0,)
    """One a candidate: the lowest is the best, equal ones tie."""
    rating: float | None = None
    """What a reply that stands alone was rated; 0 or less is bad."""


@dataclass(frozen=True)
class Format:
    """A row of the table."""

    name: str
    known_by: tuple[tuple[str, ...], ...]
    """Of each group a record has one field or more."""
    obeys: tuple[str, ...]
    """Further fields that change what a record says, and are understood."""
    gives: tuple[Purpose, ...]
    read: Callable[[Record], list[Example]]
    rank: Callable[[Record], list[Example]] | None = None
    """What reads rankings, where that is something else."""


def examples_of(record: object, purpose: Purpose) -> list[Example]:
    """What a record holds. LeftOutError says why nothing can be used."""
    form, fields = known(record)
    if form is None:
        raise LeftOutError("records in no known format")
    understood = {name for group in form.known_by for name in group} | set(form.obeys)
    for name, value in fields.items():
        if name in MEANING and name not in understood and not _is_empty(value):
            raise LeftOutError(f"records with {name!r}, which changes what they say and is not understood")
    try:
        read = (form.rank if purpose == "ranking" else None) or form.read
        return read(fields)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise LeftOutError("records whose fields hold something else than their format has") from error


def known(record: object) -> tuple[Format | None, Record]:
    """The format of a record, and its fields, with names in small letters."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        return None, {}
    fields = {str(name).lower(): value for name, value in record.items()}
    fields |= _numbered(fields)
    has = {name for name, value in fields.items() if value is not None}
    return next((form for form in FORMATS if all(has & set(group) for group in form.known_by)), None), fields


def nearest(record: object, purpose: Purpose) -> str:
    """The format that a record misses by least, and what it lacks."""
    fields = known(record)[1]

    def lacking(form: Format) -> list[tuple[str, ...]]:
        return [group for group in form.known_by if not set(group) & fields.keys()]

    forms = [form for form in FORMATS if purpose in form.gives]
    form = min(forms, key=lambda form: (len(lacking(form)) / len(form.known_by), form.name != "messages"))
    wanted = " and ".join(" or ".join(group[:6]) for group in lacking(form)) or "other content in its fields"
    wanted = wanted.replace("numbered", "response_a and response_b")
    return f"the nearest format is {form.name}, for which it lacks {wanted}"


# ---- Fields

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "data")
QUESTIONS = ("instruction", "prompt", "query", "question", "problem", "inputs", "user", "post")
ABOUT = ("input", "context")
"""What a question is about; the question itself where there is no other."""
ANSWERS = (
    "completion", "response", "output", "answer", "reply", "targets", "target", "solution", "assistant",
    "continuation",
)  # fmt: skip
REPLIES = (
    "completions", "responses", "answers", "candidates", "outputs", "replies", "summaries", "generations",
)  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)
THOUGHT = ("reasoning_content", "reasoning", "thinking")
CHOSEN = ("chosen", "preferred_output", "chosen_response")
REJECTED = ("rejected", "non_preferred_output", "rejected_response")
VERDICTS = ("label", "preference", "choice", "winner", "better", "better_response_id")
SIGNED = ("overall_preference", "preference_strength")
"""Verdicts on two replies below 0 for the first, above for the second."""
RATING = (
    "label",
    "kto_tag",
    "desirable",
    "helpfulness",
    "overall_score",
    "score",
    "rating",
    "pm_score",
    "reward",
)
RATINGS = ("ratings", "scores", "rewards", "ranks", "ranking", *VERDICTS)
PAIR_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
)  # fmt: skip
PLACEHOLDER = re.compile(r"<(image|video|audio)>")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, and no UTF-8 can hold it
ASKED = (*QUESTIONS, *ABOUT, *SYSTEM, *HISTORY)
MEANING = {
    *TURNS, *QUESTIONS, *ABOUT, *ANSWERS, *REPLIES, *SYSTEM, *HISTORY, *THOUGHT, *CHOSEN, *REJECTED,
    *VERDICTS, *SIGNED, *RATING, *RATINGS, *(name for pair in PAIR_SCORES for name in pair), "numbered",
    "tools", "functions", "tool_calls", "weight", "train", "loss", "transcript", "instances",
    "image", "images", "video", "videos", "audio", "audios",
}  # fmt: skip
NOT_MEANING = {"data", "user"}  # too common as the name of an origin
MEANING -= NOT_MEANING


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {}, "[]")


def _first(fields: Record, names: Sequence[str]) -> Any:
    """The first of these fields. KeyError where there is none."""
    return fields[next((name for name in names if name in fields), names[0])]


def _one(fields: Record, names: Sequence[str]) -> Any:
    """The field of these names that holds something. LeftOutError where two of them say different things.

    Where one says all that the others do, it counts: a solution that ends with the answer, say.
    """
    found = {name: fields[name] for name in names if not _is_empty(fields.get(name))}
    if not found:
        return next((fields[name] for name in names if fields.get(name) is not None), None)
    longest = max(found.values(), key=lambda value: len(str(value)))
    for name, value in found.items():
        if value != longest and not (
            isinstance(longest, str) and isinstance(value, str) and value in longest
        ):
            raise LeftOutError(f"records with {name!r} and {' and '.join(n for n in found if n != name)!r}")
    return longest


# ---- Messages

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "ai": "assistant", "bard": "assistant", "bing": "assistant", "claude": "assistant",
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response", "function_response",
                     "tool_call", "function_call"), "tool"),
}  # fmt: skip
"""By the names that people give them, what a message can be; a "tool" message is never learned."""


def _message(role: str, content: Any) -> Message:
    return {"role": ROLES.get(role.lower(), role), "content": _text(content)}


def _text(content: Any) -> str:
    """The text of a content, which may be a list of parts."""
    if isinstance(content, list):
        return "\n".join(map(_text, content))
    if isinstance(content, dict) and content.get("type") in ("text", "input_text", "output_text"):
        content = content["text"]
    if not isinstance(content, str | None):
        raise LeftOutError("conversations with a message that is not text")
    return content or ""


def _turn(turn: Record) -> list[Message]:
    """The message in an element of a list of turns, or the two of an exchange."""
    role: Any = turn.get("role") or turn.get("from")
    if role is None and (turn.keys() & set(QUESTIONS + ABOUT)) and turn.keys() & set(ANSWERS):
        return [_message("user", _one(turn, QUESTIONS + ABOUT)), _message("assistant", _one(turn, ANSWERS))]
    if any(not _is_empty(turn.get(name)) for name in ("image", "images", "audio", "video", "videos")):
        raise LeftOutError("conversations with a message that is not text")
    content = _first(turn, ("content", "value", "text"))
    message = _message(role, content if content is not None else turn.get("refusal"))
    if message["role"] == "assistant":
        message["content"] = _thought_of(turn) + message["content"]
        if any(not _is_empty(turn.get(name)) for name in ("tool_calls", "function_call")):
            message["role"] = "tool"
        weights = [turn[name] for name in ("weight", "train", "loss") if turn.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):
            raise LeftOutError("conversations with a weight other than 0 and 1")
        if 0 in weights:
            message["train"] = False
    return [message]


def _thought_of(fields: Mapping[str, Any]) -> str:
    """What was thought before a reply, as models that think write it."""
    thought = next((_text(fields[name]) for name in THOUGHT if not _is_empty(fields.get(name))), "")
    return f"<think>\n{thought}\n</think>\n\n" if thought else ""


def _turns(turns: Any) -> Conversation:
    """The messages of a list of turns, of one turn, or of a list of texts that the user begins."""
    turns = [turns] if isinstance(turns, dict) else turns
    if turns and all(isinstance(turn, str) for turn in turns):
        return [_message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return [message for turn in turns for message in _turn(turn)]


def _as_messages(said: Any, role: str, may_be_transcript: bool = False) -> Conversation:
    """A text as a message of `role`, or as the transcript that it may be; a list of messages as it is."""
    if isinstance(said, str):
        return (_parse_transcript(said) if may_be_transcript else []) or [_message(role, said)]
    if isinstance(said, dict) and "messages" in said:
        if not _is_empty(said.get("tools")):
            raise LeftOutError("records with 'tools', which changes what they say and is not understood")
        said = said["messages"]
    if not isinstance(said, list | dict):
        raise TypeError(said)
    return _turns(said)


SPEAKER = re.compile(r"\n\n(Human|Assistant|User|System):|(?:^|\n|(?<=\S))### (Human|Assistant):")


def _parse_transcript(text: str) -> Conversation:
    """The conversation in a transcript; nothing where the text is not one. An open last turn is no message.

    Where somebody speaks twice in a row, the second is a paragraph of the first: replies that begin a
    paragraph with their speaker's name look like that.
    """
    before, *parts = SPEAKER.split("\n\n" + text.lstrip())
    if before.strip() or not parts:
        return []
    messages: Conversation = []
    for first, second, said in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        message = _message(first or second, said.strip())
        if messages and messages[-1]["role"] == message["role"]:
            message["content"] = _paragraphs(messages.pop()["content"], message["content"])
        messages.append(message)
    return messages


def _paragraphs(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


# ---- What is asked, and what is replied


def _asked(fields: Record) -> Conversation:
    """All that stands before a reply: the system message, earlier turns, the question."""
    return _with_system(fields, _history(fields) + _question(fields))


def _question(fields: Record) -> Conversation:
    turns = _one(fields, TURNS[:-1])
    turns = fields.get("data") if turns is None else turns
    if turns is not None:
        messages = _turns(turns)
        said = "\n".join(message["content"] for message in messages)
        for name in QUESTIONS + ABOUT:
            beside = fields.get(name)
            if isinstance(beside, str) and beside not in said:
                raise LeftOutError(f"records with a {name!r} that is not among their turns")
        return messages
    question, about = _one(fields, QUESTIONS), [fields.get(name) for name in ABOUT]
    if question is None and isinstance(fields.get("history"), str):
        question = fields["history"]
    if question is None:
        context, question = about[::-1] if about[0] is not None else (None, about[1])
        return _as_messages(_paragraphs(context, question) if context else question, "user")
    if any(about):
        task, context = about
        question = (_paragraphs(question, task, context) if "instruction" in fields
                    else _paragraphs(task, context, question))  # fmt: skip
    messages = _as_messages(question, "user", may_be_transcript=True)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        return messages[:-1]  # a transcript that ends with the name of who is to speak
    return messages if not isinstance(question, str) else [_message("user", question)]


def _history(fields: Record) -> Conversation:
    history = fields.get("history") or []
    if isinstance(history, str):
        return []
    pairs = all(isinstance(turn, list) for turn in history)
    return _turns([text for turn in history for text in turn] if pairs else history)


def _with_system(fields: Record, messages: Conversation) -> Conversation:
    text = _one(fields, SYSTEM)
    if _is_empty(text):
        return messages
    system = _message("system", text)
    if messages and messages[0]["role"] == "system":
        if messages[0] != system:
            raise LeftOutError("records with two system messages")
        return messages
    return [system, *messages]


def _reply(asked: Conversation, said: Any) -> Conversation:
    """The conversation that a reply makes of what was asked; the reply may hold that, too."""
    messages = _as_messages(said, "assistant", may_be_transcript=not asked)
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


# ---- A record -> examples


def _conversation(fields: Record) -> list[Example]:
    messages, rating = _asked(fields), _rating(fields)
    answer = _one(fields, ANSWERS) if messages and messages[-1]["role"] == "user" else None
    return [Example([messages if answer is None else _reply(messages, answer)], rating=rating)]


def _answered(fields: Record) -> list[Example]:
    answer, thought = _one(fields, ANSWERS), _thought_of(fields)
    return [
        Example([_reply(_asked(fields), thought + answer if thought else answer)], rating=_rating(fields))
    ]


def _rating(fields: Mapping[str, Any]) -> float | None:
    """What a reply is rated: a truth, or a number."""
    name = next((name for name in RATING if fields.get(name) is not None), None)
    if name is None:
        return None
    if not isinstance(fields[name], bool | int | float):
        raise LeftOutError(f"records with a {name!r} that is no truth and no number")
    return float(fields[name])


def _asks(fields: Record) -> list[Example]:
    return [Example([_asked(fields)])]


def _self_instruct(fields: Record) -> list[Example]:
    tasks = [{"instruction": fields["instruction"], **instance} for instance in fields["instances"]]
    if not tasks:
        raise LeftOutError("records without a conversation")
    return [example for task in tasks for example in _answered(task)]


def _transcript(fields: Record) -> list[Example]:
    text = next(fields[name] for name in ("transcript", "chosen", "text") if fields.get(name) is not None)
    messages = _parse_transcript(text) if isinstance(text, str) else _turns(text)
    if not messages:
        raise LeftOutError("records without a conversation")
    return [Example([_with_system(fields, messages)])]


def _pair(fields: Record) -> list[Example]:
    chosen, rejected = _one(fields, CHOSEN), _one(fields, REJECTED)
    asked = _asked(fields) if any(not _is_empty(fields.get(name)) for name in (*TURNS, *ASKED)) else []
    whole = _as_messages(chosen, "assistant", may_be_transcript=not asked)
    if asked and asked[-1]["role"] == "assistant" and asked[-len(whole) :] == whole:
        asked = asked[:-1]  # turns that hold the chosen reply already
    ranks = [0, 1]
    for names in PAIR_SCORES:
        scores: list[Any] = [fields.get(name) for name in names]
        if None not in scores:
            ranks = places([-float(score) for score in scores])
    if ranks == [1, 0]:
        raise LeftOutError("pairs whose scores contradict their order")
    return [Example([_reply(asked, said) for said in (chosen, rejected)], ranks)]


def places(costs: Sequence[float]) -> list[int]:
    """The place of each: 0 for the lowest cost, equal ones together."""
    return [sorted(set(costs)).index(cost) for cost in costs]


NUMBERED = re.compile(r"(output|response|answer|completion|reply|conversation|summary|human_ref)_?(\d|[a-i])")


def _numbered(fields: Record) -> Record:
    """The replies that several fields hold, as in response_a and response_b: {"numbered": {"a": …}}."""
    stems: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        if (match := NUMBERED.fullmatch(name)) and not _is_empty(value):
            stems.setdefault(match[1], {})[match[2]] = value
    replies = max(stems.items(), key=lambda stem: len(stem[1]), default=("", {}))
    return {"numbered": replies} if len(replies[1]) > 1 else {}


def _numbered_replies(fields: Record) -> list[Example]:
    stem, replies = fields["numbered"]
    marks = sorted(replies)
    forms = ("score_{}", "rating_{}", "score{}", f"{stem}_{{}}_score", f"{stem}_{{}}_rating")
    ratings: list[list[Any]] = [[fields.get(form.format(mark)) for mark in marks] for form in forms]
    rated = next((values for values in ratings if None not in values), None)
    names = [{mark, f"{stem}_{mark}", f"{stem}{mark}", f"model_{mark}", f"option_{mark}"} for mark in marks]
    ranks = _verdict(fields, names) or (rated and places([-float(rating) for rating in rated]))
    if not ranks:
        raise LeftOutError("records with replies and no verdict on them")
    asked = _asked(fields) if any(not _is_empty(fields.get(name)) for name in (*TURNS, *ASKED)) else []
    return [Example([_reply(asked, replies[mark]) for mark in marks], ranks)]


def _verdict(fields: Record, names: Sequence[set[str]]) -> list[int] | None:
    """The ranks by a field that names the best of some replies, or a tie; None where there is none."""
    verdict = next((fields[name] for name in VERDICTS if fields.get(name) is not None), None)
    signed = next((fields[name] for name in SIGNED if fields.get(name) is not None), None)
    if verdict is None and signed is not None and len(names) == 2:
        return places([float(signed), 0.0])
    if verdict is None:
        return None
    if isinstance(verdict, float) and verdict.is_integer():
        verdict = int(verdict)
    word = str(verdict).strip().lower()
    if word.startswith("tie") or word in ("both", "equal", "same"):
        return [0] * len(names)
    best = [word in name for name in names]
    if sum(best) != 1:
        raise LeftOutError("records with a verdict that names none of their replies")
    return [int(not is_best) for is_best in best]


def _listed_replies(fields: Record) -> list[Example]:
    name = next(name for name in REPLIES if fields.get(name) is not None)
    replies = [reply if isinstance(reply, dict) else {"text": reply} for reply in fields[name]]
    ranks = _verdict(fields, [{str(i)} for i in range(len(replies))])
    costs: Sequence[float | int | None] = (
        ranks or _costs_beside(fields, len(replies)) or [_cost(reply) for reply in replies]
    )
    rated = [(reply, cost) for reply, cost in zip(replies, costs, strict=True) if cost is not None]
    if len(rated) < 2:
        raise LeftOutError("records with no two rated replies")
    asked, texts = _asked(fields), ("text", "response", "answer", "completion", "content", "output", "value")
    said = [_first(reply, texts) for reply, _ in rated]
    return [Example([_reply(asked, text) for text in said], places([float(cost) for _, cost in rated]))]


def _costs_beside(fields: Record, count: int) -> list[Any] | None:
    """What a list beside the replies says of them; our own rankings hold lists of places, best first."""
    if ranking := fields.get("ranking"):
        place = {i: rank for rank, tied in enumerate(ranking) for i in tied}
        return [place[i] for i in range(count)]
    name = next((name for name in ("ratings", "scores", "rewards", "ranks") if fields.get(name)), None)
    sign = 1 if name == "ranks" else -1
    return None if name is None else [None if v is None else sign * float(v) for v in fields[name]]


def _cost(reply: Record) -> float | None:
    """Less for a better reply; None for one that is not rated."""
    if reply.get("rank") is not None:
        return float(reply["rank"])
    if (rating := _rating(reply)) is not None:
        return -rating
    aspects = reply.get("annotations") or {}
    found = [float(a["Rating"]) for a in aspects.values() if str(a.get("Rating", "")).isdigit()]
    return -fmean(found) if found else None


def _best_path(fields: Record) -> list[Example]:
    """From the prompt of a tree along the replies ranked best: unranked ones last, ties to the first."""
    path, nodes = [], [fields["prompt"]]
    while nodes:
        node = min(nodes, key=lambda node: (node.get("rank") is None, node.get("rank") or 0))
        path.append(node)
        nodes = node.get("replies") or []
    return [Example([_turns(path)])]


def _ranked_replies(fields: Record) -> list[Example]:
    """The replies to each message of a tree that bear a rank, where there are two or more."""
    examples, paths = [], [[fields["prompt"]]]
    while paths:
        path = paths.pop()
        replies = path[-1].get("replies") or []
        paths += [[*path, reply] for reply in reversed(replies)]
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if len(ranked) >= 2 and all(reply["role"] == "assistant" for reply in ranked):
            examples.append(
                Example([_turns([*path, reply]) for reply in ranked], [r["rank"] for r in ranked])
            )
    if not examples:
        raise LeftOutError("records with no two ranked responses")
    return examples


def _prompt_or_tree(fields: Record) -> list[Example]:
    return _best_path(fields) if _is_tree(fields) else _asks(fields)


def _prompt_or_ranks(fields: Record) -> list[Example]:
    return _ranked_replies(fields) if _is_tree(fields) else _asks(fields)


def _is_tree(fields: Record) -> bool:
    return isinstance(fields.get("prompt"), dict) and "text" in fields["prompt"]


ANYTHING: tuple[Purpose, ...] = ("conversation", "prompt", "ranking")
FORMATS = (
    Format("chosen and rejected replies", (CHOSEN, REJECTED),
           (*TURNS, *ASKED, *ANSWERS, *REPLIES, "rating", "ratings", "score", "scores",
            *(name for pair in PAIR_SCORES for name in pair)), ANYTHING, _pair),
    Format("numbered replies with a verdict", (("numbered",),),
           (*TURNS, *ASKED, *VERDICTS, *SIGNED), ANYTHING, _numbered_replies),
    Format("rated replies", ((*TURNS, *QUESTIONS, *ABOUT), REPLIES),
           (*ASKED, *RATINGS), ANYTHING, _listed_replies),
    Format("messages", (TURNS,), (*ASKED, *ANSWERS, *RATING), ANYTHING, _conversation),
    Format("Self-Instruct", (("instruction",), ("instances",)), ABOUT, ("conversation", "prompt"),
           _self_instruct),
    Format("a question and an answer", ((*QUESTIONS, *ABOUT), ANSWERS),
           (*SYSTEM, *HISTORY, *THOUGHT, *RATING), ANYTHING, _answered),
    Format("a transcript", (("transcript", "text", "chosen"),), SYSTEM, ("conversation", "prompt"),
           _transcript),
    Format("a prompt, or OpenAssistant's tree of replies", ((*QUESTIONS, *ABOUT),), (*SYSTEM, *HISTORY),
           ("prompt",), _prompt_or_tree, _prompt_or_ranks),
)  # fmt: skip
"""The first row that fits counts."""

# ---- An example -> a conversation or a prompt


def demonstration(example: Example) -> Iterator[Conversation | str]:
    """The conversation to learn from, and why some or all of it is left out.

    It ends at the last reply: nothing behind that is learned.
    """
    best = min(range(len(example.candidates)), key=lambda i: example.ranks[i])
    if example.rating is not None and example.rating <= 0:
        raise LeftOutError("replies judged bad, by a label or a rating of 0 or less")
    messages = said(example.candidates[best])
    calls = next((i for i, m in enumerate(messages) if m["role"] == "tool"), len(messages))
    kept, empty = messages[:calls], False
    while kept and (kept[-1]["role"] != "assistant" or not kept[-1]["content"].strip()):
        empty |= kept[-1]["role"] == "assistant"
        kept.pop()
    if not kept and calls < len(messages):
        raise LeftOutError("conversations with a tool call and no reply before it")
    if not kept:
        what = "with an empty message" if empty else "without a message of the assistant's"
        raise LeftOutError(f"conversations {what}")
    if not any(m.get("train", True) for m in kept if m["role"] == "assistant"):
        raise LeftOutError("conversations whose replies all have weight 0")
    yield checked(kept)
    if calls < len(messages):
        yield "ends of conversations from a tool call on"
    elif empty:
        yield "empty last replies"


def prompt(example: Example) -> Conversation:
    """What is asked: all before the last reply, or all where nobody has replied."""
    messages = said(example.candidates[0])
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise LeftOutError("replies to nothing")
    return checked([{"role": message["role"], "content": message["content"]} for message in messages])


def said(messages: Conversation) -> Conversation:
    """Without a system message of nothing, which is how some data says that there is none."""
    return [m for m in messages if m["role"] != "system" or m["content"]]


def checked(messages: Conversation) -> Conversation:
    """The messages, if our roles can have said them. LeftOutError says what is wrong with them."""
    contents = [message["content"] for message in messages]
    if any(message["role"] == "tool" for message in messages):
        raise LeftOutError("conversations with a tool call")
    if not all(message["role"] in ("system", "user", "assistant") for message in messages):
        raise LeftOutError("conversations with a role other than system, user and assistant")
    if not all(content.strip() for content in contents):
        raise LeftOutError("conversations with an empty message")
    if any(SURROGATE.search(content) for content in contents):
        raise LeftOutError("conversations with half a surrogate pair")
    if any(PLACEHOLDER.search(content) for content in contents):
        raise LeftOutError("conversations about an image, a video or a sound")
    return messages
