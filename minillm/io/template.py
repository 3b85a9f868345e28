"""Chat templates of other people's models: messages to tokens, and the tokens the model must produce.

A template is a Jinja program kept in tokenizer_config.json, in the dialect of transformers: rendered
there or here it gives the same text. It is run in a sandbox, for it comes with other people's models.

Rendering alone loses what matters: which characters were a message's. So each sequence of roles is
rendered once with a marker for every content. What stands between the markers is the template's own
text, read with its control tokens; the contents are encoded apart, as plain text. Hence nobody can end a
turn by typing "<|end|>", and no token straddles the border of a reply. Every conversation is rendered
as it is, too: if the contents are not found between the same texts, the template is refused.

A reply is learned behind exactly the text with which the model is asked for one. Three things follow:
a thought, "<think> … </think>" before a reply, is a content of its own, which a template may drop from
earlier turns; a generation prompt that opens a thought, as DeepSeek-R1's does, is followed by the thought,
or by its end where there is none; and an earlier reply that the template writes anew once another message
follows (Qwen3's, without its thought) is context and not learned.

Left out: tools, documents, images: messages have a role and a text. Added tokens that a vocabulary reads
in any text, such as <think> in some, are read in contents too.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from json import dumps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minillm.chat import Conversation, Dialogue
from minillm.errors import InputError, reason_of
from minillm.tokenizer import Tokenizer

PLAIN_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {{- message['role'] | capitalize + ':\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
    {{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""
"""For a vocabulary without our control tokens. Headers are text here, so a user can imitate them, but not
the end of a reply; each content starts a line, as text the model knows does."""

MOST_MESSAGES = 1024
SECONDS = 10.0
"""For one rendering; the longest conversation takes milliseconds."""

Shape = tuple[tuple[str, bool], ...]
"""The role of each message, and whether a thought comes before its text."""
Piece = tuple[int, bool]
"""The thought (True) or the text (False) of a message."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around the contents of a conversation of a certain shape."""

    parts: list[str]
    """As rendered: before the first content, between contents, and after the last."""
    order: list[Piece]
    """The content behind each part but the last."""
    plan: list[tuple[list[int] | Piece, int]]
    """As encoded: tokens of the template's own, or a content; and the message whose reply they belong to, or
    -1 where nobody is to produce them."""
    learned: frozenset[int]
    """The messages that are learned."""


class ForeignFormat:
    """The format of a tokenizer's own template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """InputError if the template does not work."""
        self.tokenizer, source = tokenizer, _source(tokenizer)
        # The clock stands still, so that a template that writes the time cannot change its text in the
        # middle of a conversation.
        self._template = _compile(source, datetime.now())
        self._variables: dict[str, str] = {}
        for name, token in tokenizer.config.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                self._variables[name] = text
        self._frames: dict[tuple[Shape, bool, bool], Frame] = {}
        self._thinks = "think>" in source and self._knows_thoughts()
        exchange = (("user", False), ("assistant", False))
        self.ends = [self._end_behind(exchange)]
        """The token that ends a reply, and the one that ends it once another message follows."""
        with suppress(InputError):
            self.ends.append(self._end_behind(exchange + exchange))

    def encode(self, messages: Conversation) -> Dialogue:
        """As `ChatTemplate.encode`."""
        frame, pieces = self._fill(messages, generate=False, thinking=False)
        wanted = {i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)}
        mask = [owner in wanted for ids, owner in pieces for _ in ids]
        return Dialogue([token for ids, _ in pieces for token in ids], mask, len(wanted - frame.learned))

    def prompt(self, messages: Conversation, thinking: bool) -> list[int]:
        """As `ChatTemplate.prompt`."""
        _, pieces = self._fill(messages, True, thinking and self._thinks)
        return [token for ids, _ in pieces for token in ids]

    def _fill(
        self, messages: Conversation, generate: bool, thinking: bool
    ) -> tuple[Frame, list[tuple[list[int], int]]]:
        """The frame of a conversation, and the tokens of its plan, each piece with its owner."""
        if len(messages) > MOST_MESSAGES:
            raise InputError(f"{len(messages):,} messages: its chat template is read up to {MOST_MESSAGES:,}")
        contents: dict[Piece, str] = {}
        for i, message in enumerate(messages):
            thought, contents[i, False] = self._thought_and_text(message)
            if thought:
                contents[i, True] = thought
        shape = tuple((message["role"], (i, True) in contents) for i, message in enumerate(messages))
        thinking = thinking if generate else shape[-1][1]
        key = (shape, generate, thinking)
        if key not in self._frames:
            self._frames[key] = self._asking(shape, thinking) if generate else self._whole(shape)
        frame = self._frames[key]
        given = [_message(role, contents[i, False], contents.get((i, True)))
                 for i, (role, _) in enumerate(shape)]  # fmt: skip
        contents |= _find(frame, contents, self._render(given, generate, thinking))
        encode = self.tokenizer.encode
        return frame, [(w if isinstance(w, list) else encode(contents[w]), owner) for w, owner in frame.plan]

    def _knows_thoughts(self) -> bool:
        """Whether the template treats a thought in a reply otherwise than text, or asks for one."""
        plain, thought = (_marked((("user", False), ("assistant", thinks))) for thinks in (False, True))
        expected = self._render(plain, False, False).replace(plain[1]["content"], thought[1]["content"])
        asked = self._render(plain[:1], True, True)
        return asked.rstrip().endswith("<think>") or self._render(thought, False, False) != expected

    def _thought_and_text(self, message: dict[str, Any]) -> tuple[str, str]:
        """A reply's thought, "" where it has none or the template knows none, and what follows it."""
        content = message["content"]
        if not self._thinks or message["role"] != "assistant" or "</think>" not in content:
            return "", content
        thought, _, text = content.partition("</think>")
        return thought.strip().removeprefix("<think>").strip("\n"), text.lstrip("\n")

    # --- frames

    def _asking(self, shape: Shape, thinking: bool) -> Frame:
        """The frame of a prompt, of which nothing is learned."""
        rendered, asked = self._asked(shape, thinking)
        parts, order = _split(rendered, shape)
        return Frame(parts, order, self._plan(asked, {}), frozenset())

    def _asked(self, shape: Shape, thinking: bool) -> tuple[str, str]:
        """The generation prompt as rendered, and with all that stands between it and a reply.

        A model trained on " [/INST] Hello" with "Hello" to produce is to be asked with the space, and one
        trained on an empty thought with that.
        """
        prompt = self._render(_marked(shape), True, thinking)
        if thinking:
            return prompt, prompt
        try:
            whole = self._render(_marked((*shape, ("assistant", False))), False, False)
        except InputError:  # no reply may follow these messages
            return prompt, prompt
        before_reply = whole.partition(_mark(len(shape), False))[0]
        if before_reply.startswith(prompt):
            return prompt, before_reply
        opening = prompt.removeprefix(before_reply)
        if opening.rstrip().endswith("<think>") and prompt.startswith(before_reply):
            return prompt, prompt + ("\n" if opening.endswith("\n") else "\n\n") + "</think>\n\n"
        return prompt, prompt

    def _whole(self, shape: Shape) -> Frame:
        """The frame of a whole conversation: which of its replies are learned, and from where."""
        rendered = self._render(_marked(shape), False, shape[-1][1])
        parts, order = _split(rendered, shape)
        encoded, starts, last = rendered, {}, len(shape) - 1
        for i, (role, thought) in enumerate(shape):
            if role != "assistant":
                continue
            kept = thought and (i, True) in order
            before = rendered[: rendered.index(_mark(i, kept))]
            asked = self._asked(shape[:i], thought)[1] if i else before
            if kept == thought and (before == asked or (thought and before.startswith(asked))):
                starts[i] = len(asked)
            elif i == last:  # the last reply, and its thought, as they follow what the model is asked with
                plain = self._render(_marked((*shape[:-1], ("assistant", False))), False, thought)
                before, text, end = plain.partition(_mark(i, False))
                if not asked.startswith(before):
                    raise InputError(
                        "the chat template asks for a reply with another text than it writes before one, so "
                        "no reply can be learned; change the template"
                    )
                encoded = asked + (f"{_mark(i, True)}\n</think>\n\n" if thought else "") + text + end
                starts[i] = len(asked)
        return Frame(parts, order, self._plan(encoded, starts), frozenset(starts))

    def _plan(self, encoded: str, starts: dict[int, int]) -> list[tuple[list[int] | Piece, int]]:
        """A marked text as tokens and contents, cut where each reply begins to be learned."""
        plan: list[tuple[list[int] | Piece, int]] = []
        position, (message, is_thought) = 0, (-1, False)
        for text in MARKER.split(encoded):
            if MARKER.fullmatch(text):
                message, is_thought = _piece_of(text)
                plan.append(((message, is_thought), message if message in starts else -1))
            else:
                begun = {start - position: i for i, start in starts.items()}
                cut = next((at for at in begun if 0 < at < len(text)), len(text))
                ids = self.tokenizer.encode(text[:cut], special=True)
                owed = 0 if message not in starts else len(ids) if is_thought else self._owed(ids)
                plan += [(ids[:owed], message), (ids[owed:], -1)]
                plan.append((self.tokenizer.encode(text[cut:], special=True), begun.get(cut, -1)))
            position += len(text)
        return plan

    def _end_behind(self, shape: Shape) -> int:
        """The token that ends the first reply of a conversation."""
        parts, order = _split(self._render(_marked(shape), False, False), shape)
        ids = self.tokenizer.encode(parts[order.index((1, False)) + 1], special=True)
        return ids[self._owed(ids) - 1]

    def _owed(self, ids: list[int]) -> int:
        """How many tokens behind a reply complete it: up to the first control token, which ends it."""
        added = set(self.tokenizer.vocabulary.added_tokens.values())
        count = next((i for i, token in enumerate(ids, start=1) if token in added), 0)
        if not count:
            raise InputError("the chat template ends a reply with no control token; add eos_token behind it")
        if ids[count - 1] not in self.tokenizer.special_tokens.values():
            name = self.tokenizer.decode([ids[count - 1]])
            raise InputError(
                f"the chat template ends a reply with {name!r}, which any text may contain; "
                "make it special in tokenizer.json"
            )
        return count

    def _render(self, messages: list[dict[str, str]], generate: bool, thinking: bool) -> str:
        with _refusing("the chat template refuses these messages"):
            return self._template.render(
                messages=messages, add_generation_prompt=generate, tools=None, documents=None,
                enable_thinking=thinking, thinking=thinking, **self._variables,
            )  # fmt: skip


# --- markers and contents

FIRST_MARKER = 0xF0000
"""Contents are marked by characters for private use from here on: no trimming takes them away."""
MARKER = re.compile("([\U000f0000-\U0010ffff])")


def _mark(message: int, is_thought: bool) -> str:
    return chr(FIRST_MARKER + 2 * message + is_thought)


def _piece_of(marker: str) -> Piece:
    message, is_thought = divmod(ord(marker) - FIRST_MARKER, 2)
    return message, bool(is_thought)


def _message(role: str, text: str, thought: str | None) -> dict[str, str]:
    content = text if thought is None else f"<think>\n{thought}\n</think>\n\n{text}"
    return {"role": role, "content": content}


def _marked(shape: Shape) -> list[dict[str, str]]:
    return [_message(role, _mark(i, False), _mark(i, True) if thought else None)
            for i, (role, thought) in enumerate(shape)]  # fmt: skip


def _split(rendered: str, shape: Shape) -> tuple[list[str], list[Piece]]:
    """What stands around the markers, and the contents that they stand for."""
    pieces = MARKER.split(rendered)
    order = [_piece_of(marker) for marker in pieces[1::2]]
    for number, (role, thought) in enumerate(shape):
        count = order.count((number, False))
        if count != 1 or (thought and order.count((number, True)) > 1):
            raise InputError(
                f"the chat template writes the content of message {number} ({role}) {count} times; it "
                f"must once, in these messages: {', '.join(role for role, _ in shape)}"
            )
    return pieces[::2], order


def _find(frame: Frame, contents: dict[Piece, str], rendered: str) -> dict[Piece, str]:
    """The contents as the template wrote them: most leave a content as it is, some trim an end or both."""
    written, position = {}, len(frame.parts[0])
    for piece, after in zip(frame.order, frame.parts[1:], strict=True):
        said, last = contents[piece], piece == frame.order[-1]
        forms = [
            said,
            *(trim(said, of) for of in (None, "\n") for trim in (str.strip, str.lstrip, str.rstrip)),
        ]
        found = [form for form in forms if rendered.startswith(form + after, position)]
        end = position + len(found[0] + after) if found else 0
        if not found or not rendered.startswith(frame.parts[0]) or (last and end != len(rendered)):
            raise InputError(
                f"at message {piece[0]} the chat template alters a content, or its own text because of one, "
                "beyond trimming: what the model must produce cannot be told; change the messages or it"
            )
        written[piece], position = found[0], end
    return written


# --- Jinja as transformers runs it


def _source(tokenizer: Tokenizer) -> str:
    """The template in a tokenizer's config; of several named ones, the default."""
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise InputError("tokenizer_config.json: has no chat_template; train a chat model from it first")
    return source


def _compile(source: str, now: datetime) -> Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    # Jinja's own filter escapes what HTML reads as markup; a model reads no HTML.
    environment.filters["tojson"] = lambda value, **how: dumps(value, **{"ensure_ascii": False, **how})
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
    with _refusing("tokenizer_config.json: chat_template is not valid Jinja"):
        return environment.from_string(source)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which no single operation is long: Ctrl-C and the time limit wait for its end."""

    intercepted_binops = frozenset(("**", "*"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if max(sizes) > (most := 1000 if operator == "**" else 10**6):
            raise OverflowError(f"{operator} of a number above {most:,}")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which some templates mark a reply, writes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A template is someone's program: whatever it raises is bad input, and so is taking over SECONDS."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"takes longer than {SECONDS} seconds")

    is_main = threading.current_thread() is threading.main_thread()  # in others there are no signals
    previous = signal.signal(signal.SIGALRM, stop) if is_main else None
    try:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
    except Exception as error:
        raise InputError(f"{what}: {' '.join(reason_of(error).split())}") from error
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
