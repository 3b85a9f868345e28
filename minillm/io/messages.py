"""What is a conversation and what is none: every message from outside is checked here, once."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.chat import Conversation, Message, new_call
from minillm.errors import InputError

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: object) -> Conversation:
    """The messages without fields that are not used; InputError says which one is not a message."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages: give a list of at least one {role, content}")
    checked, due = [], iter(())
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number}: is {message!r:.40}; give an object with role and content")
        role, content, calls = (message.get(name) for name in ("role", "content", "tool_calls"))
        if role not in ROLES:
            raise InputError(f"message {number}: its role is {role!r:.40}; give {', '.join(ROLES)}")
        calls = check_calls(calls, f"message {number}") if calls and role == "assistant" else []
        if role != "tool":
            due = iter([call["id"] for call in calls])
        elif message.get("tool_call_id") not in (None, next(due, None)):
            raise InputError(f"message {number}: answers another call than is next; keep the order of calls")
        content = "" if calls and content is None else content
        if not isinstance(content, str):
            raise InputError(f"message {number}: its content is {content!r:.40}; give a text")
        more: Message = {"tool_calls": calls} if calls else {}
        more |= {} if message.get("train", True) else {"train": False}
        checked.append({"role": role, "content": content, **more})
    return checked


def check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """The calls of a message, their arguments as text; InputError for what is no call."""
    checked = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, Mapping) else None
        name, given = map((function if isinstance(function, Mapping) else {}).get, ("name", "arguments"))
        if not isinstance(name, str) or name.split() != [name] or not isinstance(given, str | Mapping):
            wanted = 'give {"function": {"name": …, "arguments": …}}, the name one word'
            raise InputError(f"{where}: its call {number} is {call!r:.60}; {wanted}")
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        checked.append(new_call(call.get("id") or f"call_{number}", name, arguments))
    return checked


def with_tools(messages: Conversation, tools: Sequence[Mapping[str, Any]]) -> Conversation:
    """The messages with what TEMPLATE tells of `tools` (in OpenAI's form), which ends the system message."""
    if not tools:
        return messages
    told = "\n".join(["Tools:", *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]
