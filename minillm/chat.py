"""Chat: messages → tokens, and which of them the model must produce. As a command: talk with a model.

    <|endoftext|><|user|>Hello<|end|><|assistant|>Good day!<|end|>
                                                 └── loss ───┘
    <|user|>2+3?<|end|><|assistant|><|system|>calculator {"expression": "2+3"}<|end|>
                                    └───────────────── loss ─────────────────┘
    <|system|>5<|end|><|assistant|>It is 5.<|end|>
                                   └── loss ─┘

In our own format every message is a token for its role, its content as plain text, and <|end|>. Nobody can
end a turn by typing "<|end|>", for a content is encoded without control tokens, and no token straddles the
border of a reply. A call of a tool is what the assistant says to <|system|>: a name and arguments in JSON.
The tool's result is a turn of that role, so no user can imitate one; it is never a target. chat.j2 says the
same in Jinja, for other people's tools. A tokenizer that brings another template is asked by that one
(minillm/io/template.py), a base model by none: it continues a text.

Sources: ChatML (OpenAI 2023), where roles and ends of turns are tokens that no text can contain; calls inside
the assistant's turn, each result a turn of its own, as in Qwen3's template.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

from minillm.errors import InputError
from minillm.tokenizer import Tokenizer

Message = dict[str, Any]
"""role and content. As in OpenAI's API an assistant's may have tool_calls, a list of
{"id", "type": "function", "function": {"name", "arguments"}} with arguments in JSON, as a text; messages of
the role tool with the results follow in the same order. "train": False where a reply is not to be learned."""
Conversation = list[Message]

CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

TEMPLATE = Path(__file__).with_suffix(".j2").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Dialogue:
    """A conversation as tokens."""

    tokens: list[int]
    loss_mask: list[bool]
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
        self.call_id: int | None = None
        """The token that begins a call in a reply; None where another template than ours writes it."""
        if tokenizer.config.get("chat_template") == TEMPLATE:
            if missing := [name for name in CONTROL_TOKENS if name not in special]:
                raise InputError(f"tokenizer: lacks {' '.join(missing)}, which its chat template writes")
            bos = None if tokenizer.config.get("bos_token") is None else tokenizer.bos_id
            self._begin = [] if bos is None else [bos]
            ends, self.call_id = [special["<|end|>"]], special["<|system|>"]
        else:
            from minillm.io.template import ForeignFormat

            self._foreign = ForeignFormat(tokenizer)
            ends = self._foreign.ends
        self.end_id = ends[0]
        """The token that ends a reply."""
        kept = tokenizer.config.get("minillm_stop_tokens")  # that an imported model came with
        named = [i for name, i in special.items() if isinstance(kept, list) and name in kept]
        self.stop_ids = tuple(dict.fromkeys(i for i in (*ends, tokenizer.eos_id, *named) if i is not None))
        """The tokens at which a reply is over: its end, and the end of a document."""

    def encode(self, messages: Conversation) -> Dialogue:
        """A whole conversation. InputError for what the template refuses."""
        if self._foreign:
            return self._foreign.encode(messages)
        tokens, mask = list(self._begin), [False] * len(self._begin)
        for message in messages:
            role = message["role"].replace("tool", "system")
            said = self.tokenizer.encode(message["content"])
            for call in message.get("tool_calls", ()):
                text = "{name} {arguments}".format_map(call["function"])
                said += [self.tokenizer.special_tokens["<|system|>"], *self.tokenizer.encode(text)]
            learned = role == "assistant" and message.get("train", True)
            tokens += [self.tokenizer.special_tokens[f"<|{role}|>"], *said, self.end_id]
            mask += [False, *[learned] * (len(said) + 1)]
        return Dialogue(tokens, mask)

    def message(self, reply: Sequence[int]) -> Message:
        """The assistant's message in a reply's tokens, without the one that ended it: `encode`'s inverse."""
        parts: list[list[int]] = [[]]
        for token in reply:
            parts.append([]) if token == self.call_id else parts[-1].append(token)
        content, *said = map(self.tokenizer.decode, parts)
        calls = list[dict[str, Any]]()
        for name, _, given in (call.partition(" ") for call in said):  # "?": a call that names no tool
            calls.append(new_call(f"call_{len(calls)}", name if name.split() == [name] else "?", given))
        return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})

    def prompt(self, messages: Conversation, thinking: bool = False) -> list[int]:
        """The tokens after which the model is to reply to these messages; with `thinking`, where its
        template knows thoughts, it is to think first."""
        if self._foreign:
            return self._foreign.prompt(messages, thinking)
        return [*self.encode(messages).tokens, self.tokenizer.special_tokens["<|assistant|>"]]


class Completion:
    """What a base model has in place of a chat template: it continues the last message as a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        """The token that ends a document, if there is one."""
        self.call_id = None
        """It calls no tools."""

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
        print("the model comes without a chat template, and gets a plain one (minillm/io/plain.j2)")
    return Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "chat_template": template})


def new_call(number: object, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool as OpenAI's API has it."""
    return {"id": str(number), "type": "function", "function": {"name": name, "arguments": arguments}}


if __name__ == "__main__":
    from minillm.tools.chat import main

    main(sys.argv[1:])
