"""Chat templates of other people's models: messages to tokens, and the tokens the model must produce.

A template is a Jinja program kept in tokenizer_config.json, in the dialect of transformers: rendered there or
here it gives the same text. It is run in a sandbox (sandbox.py), for it comes with other people's models.

Rendering alone loses which characters were a message's. So each sequence of roles is rendered once with a
marker for every content. What stands between the markers is the template's own text, read with its control
tokens; contents are encoded apart, as plain text: nobody ends a turn by typing "<|end|>". Every conversation
is rendered as it is, too: if the contents are not found between the same texts, the template is refused.

A reply is learned behind exactly the text with which the model is asked for one. So a thought,
"<think> … </think>" before a reply, is a content of its own, which a template may drop from earlier turns; a
generation prompt that opens a thought, as DeepSeek-R1's does, is followed by the thought, or by its end where
there is none; and an earlier reply that the template writes anew once another message follows (Qwen3's,
without its thought) is context and not learned.

Left out: tools and their calls, documents, images. Added tokens that a vocabulary reads in any text, such as
<think> in some, are read in contents too.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from minillm.chat import Conversation, Dialogue
from minillm.errors import InputError
from minillm.io.sandbox import Program
from minillm.tokenizer import Tokenizer

PLAIN_TEMPLATE = Path(__file__).with_name("plain.j2").read_text(encoding="utf-8")
"""For a vocabulary without our control tokens. Headers are text here, so a user can imitate them, but not
the end of a reply; each content starts a line, as text the model knows does."""

MOST_MESSAGES = 1024

Shape = tuple[tuple[str, bool], ...]
"""The role of each message, and whether a thought comes before its text."""
FIRST_MARKER = 0xF0000
"""A content is marked by a character for private use from here on: no trimming takes it away."""
MARKER = re.compile("([\U000f0000-\U0010ffff])")
Plan = list[tuple[list[int] | str, int]]
"""What is encoded, in pieces: tokens of the template's own, or a marker; and the message whose reply they
belong to, or -1 where nobody is to produce them."""


class ForeignFormat:
    """The format of a tokenizer's own template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """InputError if the template does not work."""
        self.tokenizer = tokenizer
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several, of which one is the default
            several = {
                entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)
            }
            source = several.get("default")
        if not isinstance(source, str):
            raise InputError("tokenizer_config.json: has no chat_template; train a chat model from it first")
        self._program = Program(source)
        named = {name: token for name, token in tokenizer.config.items() if name.endswith("_token")}
        texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
        self._variables = {name: text for name, text in texts.items() if isinstance(text, str)}
        self._frame = cache(self._new_frame)
        self._thinks = "think>" in source
        exchange = (("user", False), ("assistant", False))
        self.ends = [self._end_behind(exchange)]
        """The token that ends a reply, and the one that ends it once another message follows."""
        with suppress(InputError):
            self.ends.append(self._end_behind(exchange + exchange))

    def encode(self, messages: Conversation) -> Dialogue:
        """As `ChatTemplate.encode`."""
        pieces = self._pieces(messages, generate=False, thinking=False)
        wanted = {i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)}
        mask = [owner in wanted for ids, owner in pieces for _ in ids]
        unlearned = len(wanted.difference(owner for ids, owner in pieces if ids))
        return Dialogue([token for ids, _ in pieces for token in ids], mask, unlearned)

    def prompt(self, messages: Conversation, thinking: bool) -> list[int]:
        """As `ChatTemplate.prompt`."""
        pieces = self._pieces(messages, True, thinking and self._thinks)
        return [token for ids, _ in pieces for token in ids]

    def _pieces(self, messages: Conversation, generate: bool, thinking: bool) -> list[tuple[list[int], int]]:
        """The tokens of a conversation, each piece with its owner."""
        if len(messages) > MOST_MESSAGES:
            raise InputError(f"{len(messages):,} messages: its chat template is read up to {MOST_MESSAGES:,}")
        if any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            raise InputError("calls of tools are read by minillm's own chat template only, not by this one")
        contents: dict[str, str] = {}
        for i, message in enumerate(messages):
            contents |= self._contents(i, message)
        shape = tuple((message["role"], _mark(i, True) in contents) for i, message in enumerate(messages))
        thinking = thinking if generate else shape[-1][1]
        around, plan = self._frame(shape, generate, thinking)
        rendered = self._render(_messages(shape, contents.__getitem__), generate, thinking)
        contents |= _find(around, contents, rendered)
        encode = self.tokenizer.encode
        return [(encode(contents[w]) if isinstance(w, str) else w, owner) for w, owner in plan]

    def _contents(self, i: int, message: dict[str, Any]) -> dict[str, str]:
        """The text of message i, and the thought before it where there is one and the template knows any."""
        content = message["content"]
        if not self._thinks or message["role"] != "assistant" or "</think>" not in content:
            return {_mark(i): content}
        thought, _, text = content.partition("</think>")
        thought = thought.strip().removeprefix("<think>").strip("\n")
        return {_mark(i): text.lstrip("\n")} | ({_mark(i, True): thought} if thought else {})

    # --- a shape: what is written around its contents, and what is encoded

    def _new_frame(self, shape: Shape, generate: bool, thinking: bool) -> tuple[list[str], Plan]:
        """What the template writes, every second text a marker, and the plan."""
        rendered = self._marked(shape, generate, thinking)
        encoded = (self._asked(shape, thinking), {}) if generate else self._learned(shape, rendered)
        return MARKER.split(rendered), self._plan(*encoded)

    def _marked(self, shape: Shape, generate: bool, thinking: bool) -> str:
        """What it writes, with markers. InputError unless each text is in it, and once."""
        rendered = self._render(_messages(shape), generate, thinking)
        for i, (role, _) in enumerate(shape):
            count = rendered.count(_mark(i))
            if count != 1 or rendered.count(_mark(i, True)) > 1:
                what = f"the chat template writes the content of message {i} ({role}) {count} times"
                roles = ", ".join(role for role, _ in shape)
                raise InputError(f"{what}; it must once, in these messages: {roles}")
        return rendered

    def _asked(self, shape: Shape, thinking: bool) -> str:
        """The generation prompt with all that stands between it and a reply, marked: a model trained to
        produce "Hello" of " [/INST] Hello" is to be asked with the space, one after an empty thought with it.
        """
        prompt = self._render(_messages(shape), True, thinking)
        if thinking:
            return prompt
        try:
            whole = self._render(_messages((*shape, ("assistant", False))), False, False)
        except InputError:  # no reply may follow these messages
            return prompt
        before_reply = whole.partition(_mark(len(shape)))[0]
        if before_reply.startswith(prompt):
            return before_reply
        opening = prompt.removeprefix(before_reply)
        if opening.rstrip().endswith("<think>") and prompt.startswith(before_reply):
            return prompt + ("\n" if opening.endswith("\n") else "\n\n") + "</think>\n\n"
        return prompt

    def _learned(self, shape: Shape, rendered: str) -> tuple[str, dict[int, int]]:
        """A whole conversation as it is encoded, marked, and where each reply that is learned begins."""
        encoded, starts, last = rendered, {}, len(shape) - 1
        for i, (role, thought) in enumerate(shape):
            if role != "assistant":
                continue
            kept = thought and _mark(i, True) in rendered
            before = rendered.partition(_mark(i, kept))[0]
            asked = self._asked(shape[:i], thought) if i else before
            if kept == thought and (before == asked or (thought and before.startswith(asked))):
                starts[i] = len(asked)
            elif i == last:  # the last reply, and its thought, as they follow what the model is asked with
                plain = self._render(_messages((*shape[:-1], ("assistant", False))), False, thought)
                before, text, end = plain.partition(_mark(i))
                if not asked.startswith(before):
                    what = "the chat template asks for a reply with another text than it writes before one"
                    raise InputError(f"{what}, so no reply can be learned; change the template")
                encoded = asked + (f"{_mark(i, True)}\n</think>\n\n" if thought else "") + text + end
                starts[i] = len(asked)
        return encoded, starts

    def _plan(self, encoded: str, starts: dict[int, int]) -> Plan:
        """A marked text as tokens and markers, cut where each reply begins to be learned."""
        plan: Plan = []
        position, message, is_thought = 0, -1, 0
        for text in MARKER.split(encoded):
            if MARKER.fullmatch(text):
                message, is_thought = divmod(ord(text) - FIRST_MARKER, 2)
                plan.append((text, message if message in starts else -1))
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
        behind = self._marked(shape, False, False).partition(_mark(1))[2]
        ids = self.tokenizer.encode(MARKER.split(behind)[0], special=True)
        return ids[self._owed(ids) - 1]

    def _owed(self, ids: list[int]) -> int:
        """How many tokens behind a reply complete it: up to the first control token, which ends it."""
        added = set(self.tokenizer.vocabulary.added_tokens.values())
        count = next((i for i, token in enumerate(ids, start=1) if token in added), 0)
        if not count:
            raise InputError("the chat template ends a reply with no control token; add eos_token behind it")
        if ids[count - 1] not in self.tokenizer.special_tokens.values():
            name = self.tokenizer.decode([ids[count - 1]])
            what = f"the chat template ends a reply with {name!r}, which any text may contain"
            raise InputError(f"{what}; make it special in tokenizer.json")
        return count

    def _render(self, messages: list[dict[str, str]], generate: bool, thinking: bool) -> str:
        given = {"messages": messages, "add_generation_prompt": generate, "tools": None, "documents": None}
        return self._program.render(
            given | {"enable_thinking": thinking, "thinking": thinking} | self._variables
        )


def _mark(message: int, is_thought: bool = False) -> str:
    return chr(FIRST_MARKER + 2 * message + is_thought)


def _messages(shape: Shape, content: Callable[[str], str] = str) -> list[dict[str, str]]:
    """The messages of a shape, with what `content` gives for each marker; the markers themselves without."""
    thoughts = [f"<think>\n{content(_mark(i, True))}\n</think>\n\n" if thinks else ""
                for i, (_, thinks) in enumerate(shape)]  # fmt: skip
    return [{"role": role, "content": thoughts[i] + content(_mark(i))} for i, (role, _) in enumerate(shape)]


def _find(pieces: list[str], contents: dict[str, str], rendered: str) -> dict[str, str]:
    """The contents as the template wrote them: most leave a content as it is, some trim an end or both."""
    written, position, whole = {}, len(pieces[0]), rendered.startswith(pieces[0])
    for marker, after in zip(pieces[1::2], pieces[2::2], strict=True):
        said = contents[marker]
        trims = [trim(said, of) for of in (None, "\n") for trim in (str.strip, str.lstrip, str.rstrip)]
        found = [form for form in (said, *trims) if rendered.startswith(form + after, position)]
        position += len(found[0] + after) if found else 0
        if not (whole and found) or (marker == pieces[-2] and position != len(rendered)):
            raise InputError(
                f"at message {(ord(marker) - FIRST_MARKER) // 2} the chat template alters a content, or its "
                "own text because of one, beyond trimming: what the model must produce cannot be told; "
                "change the messages or it"
            )
        written[marker] = found[0]
    return written
