"""Chat: messages → tokens, and which of them the model must produce. As a command: talk with a model.

    <|endoftext|><|user|>Hello<|end|><|assistant|>Good day!<|end|>
                                                 └── loss ───┘

In our own format every message is a token for its role, its content as plain text, and <|end|>. Nobody can
end a turn by typing "<|end|>", for a content is encoded without control tokens, and no token straddles the
border of a reply. TEMPLATE says the same in Jinja, for other people's tools. A tokenizer that brings another
template is asked by that one (minillm/io/template.py), a base model by none: it continues a text.

Source: ChatML (OpenAI 2023), where roles and ends of turns are tokens that no text can contain.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

from minillm.errors import InputError
from minillm.tokenizer import Tokenizer

Message = dict[str, Any]
"""role and content; "train": False where a reply is not to be learned."""
Conversation = list[Message]

ROLES = ("system", "user", "assistant")
CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('the role ' + message['role'] + ' is not system, user or assistant') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Dialogue:
    """A conversation as tokens."""

    tokens: list[int]
    assistant: list[bool]
    """Whether the model must produce this token: it is in the assistant's content, or ends it."""
    unlearned: int = 0
    """Replies that are context alone, because the template writes them anew once another message follows."""


class ChatTemplate:
    """The chat format of a tokenizer: messages in, tokens out.

    Tokens include bos where the format has one: add none. A prompt's tokens begin those of the same
    conversation with a reply.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """InputError if the tokenizer has no chat template, or one that does not work."""
        self.tokenizer, self._foreign, special = tokenizer, None, tokenizer.special_tokens
        if tokenizer.config.get("chat_template") == TEMPLATE:
            if missing := [name for name in CONTROL_TOKENS if name not in special]:
                raise InputError(f"tokenizer: lacks {' '.join(missing)}, which its chat template writes")
            bos = None if tokenizer.config.get("bos_token") is None else tokenizer.bos_id
            self._begin = [] if bos is None else [bos]
            ends = [special["<|end|>"]]
        else:
            from minillm.io.template import ForeignFormat

            self._foreign = ForeignFormat(tokenizer)
            ends = self._foreign.ends
        self.end_id = ends[0]
        """The token that ends a reply."""
        kept = tokenizer.config.get("minillm_stop_tokens") or []  # that an imported model came with
        stops = (*ends, tokenizer.eos_id, *(special.get(name) for name in kept))
        self.stop_ids = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
        """The tokens at which a reply is over: its end, and the end of a document."""

    def encode(self, messages: object) -> Dialogue:
        """A whole conversation. InputError for what `check_messages` or the template refuses."""
        checked = check_messages(messages)
        if self._foreign:
            return self._foreign.encode(checked)
        tokens, mask = list(self._begin), [False] * len(self._begin)
        for message in checked:
            said = [*self.tokenizer.encode(message["content"]), self.end_id]
            learned = message["role"] == "assistant" and message.get("train", True)
            tokens += [self.tokenizer.special_tokens[f"<|{message['role']}|>"], *said]
            mask += [False, *[learned] * len(said)]
        return Dialogue(tokens, mask)

    def prompt(self, messages: object, thinking: bool = False) -> list[int]:
        """The tokens after which the model is to reply to these messages; with `thinking`, where its
        template knows thoughts, it is to think first."""
        if self._foreign:
            return self._foreign.prompt(check_messages(messages), thinking)
        return [*self.encode(messages).tokens, self.tokenizer.special_tokens["<|assistant|>"]]


class Completion:
    """What a base model has in place of a chat template: it continues the last message as a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        """The token that ends a document, if there is one."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], thinking: bool = False) -> list[int]:
        """The tokens of the last message, as the beginning of a document."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(messages[-1]["content"])


def chat_format(tokenizer: Tokenizer) -> ChatTemplate | Completion:
    """How a model is asked: by its chat template, or as the base model it is without one."""
    return Completion(tokenizer) if tokenizer.config.get("chat_template") is None else ChatTemplate(tokenizer)


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template in its config: its own, if it has one.

    Else TEMPLATE if the vocabulary has CONTROL_TOKENS, or a plain one, which needs only the token that ends
    a document. InputError without one: no reply could end.
    """
    if tokenizer.config.get("chat_template") is not None:
        return tokenizer
    template = TEMPLATE
    if not all(name in tokenizer.special_tokens for name in CONTROL_TOKENS):
        from minillm.io.template import PLAIN_TEMPLATE as template

        if tokenizer.eos_id is None:
            raise InputError(
                f"tokenizer: has neither the tokens {' '.join(CONTROL_TOKENS)} nor an eos_token, so no reply "
                "could end; name an eos_token in tokenizer_config.json"
            )
    return Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "chat_template": template})


def check_messages(messages: object) -> Conversation:
    """The messages without fields that are not used; InputError says which one is not a message."""
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
        unlearned = {} if message.get("train", True) else {"train": False}
        checked.append({"role": role, "content": content, **unlearned})
    return checked


if __name__ == "__main__":
    from minillm.tools.chat import main

    main(sys.argv[1:])
