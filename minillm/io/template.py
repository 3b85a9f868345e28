"""Chat templates: a list of messages to tokens, and the tokens of it that the model must produce.

A template is a Jinja program kept in tokenizer_config.json, in the dialect of transformers: rendered
there or here it gives the same text. It is run in a sandbox, for it comes with other people's models.

Rendering alone loses what matters: which characters were a message's. So each sequence of roles is
rendered once with a marker for every content. What stands between the markers is the template's own
text, read with its control tokens; the contents are encoded apart, as plain text. Hence nobody can end a
turn by typing "<|end|>", and no token straddles the border of a reply. Every conversation is rendered
as it is, too: if the contents are not found between the same texts, the template is refused.

Left out: tools, documents, images, reasoning fields: messages have a role and a text. Added tokens that
a vocabulary reads in any text, such as <think> in some, are read in contents too.

Source: ChatML (OpenAI 2023), where roles and ends of turns are tokens that no text can contain.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from json import dumps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minillm.errors import InputError
from minillm.tokenizer import Tokenizer

__all__ = [
    "CONTROL_TOKENS",
    "DEFAULT_TEMPLATE",
    "PLAIN_TEMPLATE",
    "ROLES",
    "ChatTemplate",
    "Completion",
    "Dialogue",
    "chat_format",
    "check_messages",
    "with_chat_template",
]

ROLES = ("system", "user", "assistant")
CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

DEFAULT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('the role ' + message['role'] + ' is not system, user or assistant') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
"""<|endoftext|><|user|>Hello<|end|><|assistant|>Good day!<|end|>"""

PLAIN_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {{- message['role'] | capitalize + ':\\n' + message['content'] }}
    {{- eos_token if message['role'] == 'assistant' else '' }}
    {{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""
"""For a vocabulary without our control tokens. Headers are text here, so a user can imitate them, but not
the end of a reply; each content starts a line, as text the model knows does."""


@dataclass(frozen=True)
class Dialogue:
    """A conversation as tokens."""

    tokens: list[int]
    assistant: list[bool]
    """Whether the model must produce this token: contents of the assistant's, each with its end."""


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template in its config: its own, if it has one.

    Else DEFAULT_TEMPLATE if the vocabulary has CONTROL_TOKENS, or PLAIN_TEMPLATE, which needs only the
    token that ends a document. InputError without one: no reply could end.
    """
    if tokenizer.config.get("chat_template") is not None:
        return tokenizer
    ours = all(name in tokenizer.special_tokens for name in CONTROL_TOKENS)
    if not ours and tokenizer.eos_id is None:
        raise InputError(
            f"tokenizer: has neither the tokens {' '.join(CONTROL_TOKENS)} nor an eos_token, so no reply "
            "could end; name an eos_token in tokenizer_config.json"
        )
    template = DEFAULT_TEMPLATE if ours else PLAIN_TEMPLATE
    return Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "chat_template": template})


def check_messages(messages: object) -> list[dict[str, str]]:
    """The messages with their role and content alone; InputError says which one is not a message."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages: give a list of at least one {role, content}")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number}: is {message!r:.40}; give an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"message {number}: its role is {role!r:.40}; give {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"message {number}: its content is {content!r:.40}; give a text")
        checked.append({"role": role, "content": content})
    return checked


class ChatTemplate:
    """The chat format of a tokenizer: messages in, tokens out.

    Tokens include what the template writes of bos: add none. A prompt is a beginning of the tokens
    of the same conversation with a reply, unless the template writes earlier turns anew.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """InputError if the tokenizer has no chat template, or one that does not work."""
        self.tokenizer = tokenizer
        # The clock stands still, so that a template that writes the time cannot change its text in the
        # middle of a conversation.
        self._template = _compile(_source(tokenizer), datetime.now())
        names = {name: _name(token) for name, token in tokenizer.config.items() if name.endswith("_token")}
        self._variables = {name: token for name, token in names.items() if token is not None}
        self._frames: dict[tuple[tuple[str, ...], bool], _Frame] = {}
        self._header = self._rest_of_header()
        frame = self._frame(("user", "assistant"), False)
        last = frame.order.index(1) + 1
        self.end_id: int = frame.ids[last][frame.owed[last] - 1]
        """The token that ends a reply."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which a reply is over: its end, and the end of a document."""
        eos = self.tokenizer.eos_id
        return (self.end_id,) if eos in (None, self.end_id) else (self.end_id, eos)

    def encode(self, messages: object) -> Dialogue:
        """A whole conversation. InputError for what `check_messages` or the template refuses."""
        return self._encode(check_messages(messages), generate=False)

    def prompt(self, messages: object) -> list[int]:
        """The tokens after which the model is to reply to these messages."""
        return self._encode(check_messages(messages), generate=True).tokens

    def _encode(self, messages: list[dict[str, str]], generate: bool) -> Dialogue:
        frame = self._frame(tuple(message["role"] for message in messages), generate)
        contents = frame.find(messages, self._render(messages, generate))
        tokens, assistant = list(frame.ids[0]), [False] * len(frame.ids[0])
        for content, ids, owed in zip(contents, frame.ids[1:], frame.owed[1:], strict=True):
            said = self.tokenizer.encode(content)
            tokens += said + ids
            assistant += [owed > 0] * (len(said) + owed) + [False] * (len(ids) - owed)
        return Dialogue(tokens, assistant)

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=generate,
                tools=None,
                documents=None,
                **self._variables,
            )
        except Exception as error:  # a template is someone's program: whatever it raises is bad input
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template refuses these messages: {reason}") from error

    def _rest_of_header(self) -> str:
        """What stands before a reply and is not in the generation prompt, often nothing.

        A model trained on " [/INST] Hello" with "Hello" to produce is to be asked with the space.
        """
        messages = _marked(("user", "assistant"))
        prompt, whole = self._render(messages[:1], True), self._render(messages, False)
        before_reply = whole.partition(messages[1]["content"])[0]
        return before_reply[len(prompt) :] if before_reply.startswith(prompt) else ""

    def _frame(self, roles: tuple[str, ...], generate: bool) -> "_Frame":
        if (roles, generate) not in self._frames:
            self._frames[roles, generate] = self._new_frame(roles, generate)
        return self._frames[roles, generate]

    def _new_frame(self, roles: tuple[str, ...], generate: bool) -> "_Frame":
        pieces = MARKER.split(self._render(_marked(roles), generate))
        order, parts = [ord(marker) - FIRST_MARKER for marker in pieces[1::2]], pieces[::2]
        for number, role in enumerate(roles):
            if order.count(number) != 1:
                raise InputError(
                    f"the chat template writes the content of message {number} ({role}) "
                    f"{order.count(number)} times; it must once, in these messages: {', '.join(roles)}"
                )
        texts = [*parts[:-1], parts[-1] + self._header] if generate else parts
        ids = [self.tokenizer.encode(text, special=True) for text in texts]
        after_reply = [False, *(roles[number] == "assistant" for number in order)]
        owed = [self._end(part) if after else 0 for part, after in zip(ids, after_reply, strict=True)]
        return _Frame(parts, order, ids, owed)

    def _end(self, ids: list[int]) -> int:
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


class Completion:
    """What a base model has in place of a chat template: it goes on with the last message as a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token that ends a document, if there is one."""
        return () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of the last message, as the beginning of a document."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(messages[-1]["content"])


def chat_format(tokenizer: Tokenizer) -> ChatTemplate | Completion:
    """How a model is asked: by its chat template, or as the base model it is without one."""
    return Completion(tokenizer) if tokenizer.config.get("chat_template") is None else ChatTemplate(tokenizer)


# --- where the contents are -----------------------------------------------------------------------

FIRST_MARKER = 0xF0000
"""Message i is marked by the character for private use FIRST_MARKER + i: no trimming takes it away."""
MARKER = re.compile("([\U000f0000-\U0010ffff])")


def _marked(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": chr(FIRST_MARKER + i)} for i, role in enumerate(roles)]


@dataclass(frozen=True)
class _Frame:
    """The template's own text in a conversation of certain roles."""

    parts: list[str]
    """Before the first content, between contents, and after the last."""
    order: list[int]
    """The message whose content stands behind each part but the last."""
    ids: list[list[int]]
    """The tokens of each part."""
    owed: list[int]
    """How many tokens of each part the model must produce: those that complete the reply before it."""

    def find(self, messages: list[dict[str, str]], rendered: str) -> list[str]:
        """The contents as the template wrote them, trimmed perhaps, in the order of its text."""
        written, position = [], len(self.parts[0])
        for number, after in zip(self.order, self.parts[1:], strict=True):
            forms = _trimmed(messages[number]["content"])
            found = [form for form in forms if rendered.startswith(form + after, position)]
            if not found or not rendered.startswith(self.parts[0]):
                raise _untraceable(number)
            written.append(found[0])
            position += len(found[0] + after)
        if position != len(rendered):
            raise _untraceable(self.order[-1])
        return written


def _trimmed(content: str) -> tuple[str, ...]:
    """What templates make of a content: most leave it as it is, some trim an end or both."""
    return (
        content, content.strip(), content.lstrip(), content.rstrip(),
        content.strip("\n"), content.lstrip("\n"), content.rstrip("\n"),
    )  # fmt: skip


def _untraceable(number: int) -> InputError:
    return InputError(
        f"at message {number} the chat template alters a content, or its own text because of one, beyond "
        "trimming: what the model must produce cannot be told; change the messages or the template"
    )


# --- Jinja as transformers runs it ----------------------------------------------------------------


def _source(tokenizer: Tokenizer) -> str:
    """The template in a tokenizer's config; of several named ones, the default."""
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise InputError("tokenizer_config.json: has no chat_template; train a chat model from it first")
    return source


def _name(token: object) -> str | None:
    """A special token's text, which some files wrap in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _compile(source: str, now: datetime) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise InputError(f"tokenizer_config.json: chat_template is not valid Jinja: {error}") from error


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which some templates mark a reply, writes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML reads as markup; a model reads no HTML."""
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
