"""The runs by OpenAI's API, so that any chat front end and the official client can ask them.

/v1/models, /v1/chat/completions and /v1/completions, streamed or not. What a request asks for and is not done
here (n above 1, penalties, a call that is required) is refused by name rather than ignored. Calls of tools go
to whoever asked, who runs them. Log-probabilities are those at temperature 1, whatever the temperature of the
sampling.

Source: OpenAI's API reference, "Chat" and "Completions".
"""

import math
import random
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from minillm.errors import InputError
from minillm.play.shelf import Shelf, reply
from minillm.play.web import Fields, fields_of, status_of, stream_of, words_for
from minillm.play.worker import Event, Worker

COMMON: dict[str, tuple[Any, Any]] = {
    "model": (str, ...), "stream": (bool, False), "stream_options": (dict, {}), "user": (str, None),
    "temperature": (float, 1.0), "top_p": (float, 1.0), "stop": ((str, list), []), "seed": (int, None),
    "max_tokens": (int, None), "n": (int, 1), "presence_penalty": (float, 0.0),
    "frequency_penalty": (float, 0.0), "logit_bias": (dict, {}), "metadata": (dict, {}),
}  # fmt: skip
CHAT: Fields = COMMON | {
    "messages": (list, ...), "max_completion_tokens": (int, None), "logprobs": (bool, False),
    "top_logprobs": (int, 0), "response_format": (dict, {"type": "text"}), "tools": (list, []),
    "tool_choice": ((str, dict), "auto"), "parallel_tool_calls": (bool, True), "store": (bool, False),
}  # fmt: skip
COMPLETIONS: Fields = COMMON | {
    "prompt": (str, ...), "logprobs": (int, None), "echo": (bool, False), "suffix": (str, ""),
    "best_of": (int, 1), "max_tokens": (int, 16),
}  # fmt: skip
NOT_DONE = "n presence_penalty frequency_penalty logit_bias response_format echo suffix best_of".split()
"""Fields that must ask for nothing, as their defaults do."""
LONGEST = 8192
"""Tokens of a reply; a base model would go on for ever."""


def openai_routes(shelf: Shelf, worker: Worker) -> list[Route]:
    """The three addresses."""

    def models(request: Request) -> Response:
        listed = [
            {"id": run["name"], "object": "model", "created": 0, "owned_by": "minillm"}
            for run in shelf.look()[0]
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(request: Request) -> Response:
        try:
            asked = Asked(await fields_of(request, CHAT if "chat" in request.url.path else COMPLETIONS))
            shelf.folder_of(asked.model)  # NoSuchRun where there is none
            given = (shelf, asked.model, asked.messages, asked.tools, asked.top or 0, asked.stop)
            events = worker.events(partial(reply, *given, **asked.options))
            if not asked.given["stream"]:
                return JSONResponse(await asked.answer(events, request))
            while "waiting" in (first := await anext(events)):
                pass  # up to the first piece: what is refused is refused with its status
            return stream_of(asked.chunks(first, events), error_of, "data: [DONE]\n\n")
        except Exception as error:
            return JSONResponse(error_of(error), status_of(error))

    return [
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]


def error_of(error: Exception) -> Event:
    """What went wrong, as OpenAI has it."""
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status_of(error), "invalid_request_error")
    line = words_for(error).replace("--max-new-tokens", "max_tokens")
    return {"error": {"message": line, "type": kind, "param": None, "code": None}}


class Asked:
    """A request, and its answer in the form of its endpoint."""

    def __init__(self, given: dict[str, Any]) -> None:
        """InputError for what is not done here."""
        self.given, self.chat = given, "messages" in given
        fields = CHAT if self.chat else COMPLETIONS
        for name in NOT_DONE:
            if name in given and given[name] != fields[name][1]:
                raise InputError(f"{name} is {given[name]!r:.60}, which is not done here; leave it out")
        self.tools = tools_of(given) if self.chat else []
        self.model, stop = given["model"], given["stop"]
        self.stop = [stop] if isinstance(stop, str) else stop
        if len(self.stop) > 16 or not all(isinstance(one, str) and 0 < len(one) <= 256 for one in self.stop):
            raise InputError(f"stop is {stop!r:.60}; give up to 16 texts of 1 to 256 characters")
        self.top = given["logprobs"]  # how many alternatives are wanted; None for no log-probabilities
        if self.chat:
            self.top = given["top_logprobs"] if given["logprobs"] else None
        if not 0 <= (self.top or 0) <= 20:
            raise InputError(f"log-probabilities of {self.top} tokens: give 0 to 20")
        newer, longest = given.get("max_completion_tokens"), given["max_tokens"]
        longest = longest if newer is None else newer
        if (longest or 0) > LONGEST:
            raise InputError(f"max_tokens is {longest}; give {LONGEST} or less")
        seed = random.getrandbits(32) if given["seed"] is None else given["seed"]
        self.options = {"seed": seed, "max_new_tokens": longest}
        self.options |= {name: given[name] for name in ("temperature", "top_p")}
        messages = given["messages"] if self.chat else [{"role": "user", "content": given["prompt"]}]
        self.messages = [plain(one) for one in messages]
        self.id, self.created = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, text: str, last: Event | None, chunk: bool = False) -> Event:
        """An answer, or a chunk of one: the text, and with the last event why it ended and its calls."""
        said: Event = {"text": text}
        if self.chat:
            made = last["message"].get("tool_calls", []) if last else []
            calls = made if self.given["parallel_tool_calls"] else made[:1]
            said = {"role": "assistant", "content": text} | ({} if chunk else {"refusal": None})
            if calls:  # their ids are unlike any other's
                named = [call | {"id": f"call_{uuid.uuid4().hex}"} for call in calls]
                said["tool_calls"] = [{"index": i} | one for i, one in enumerate(named)] if chunk else named
            said = {"delta" if chunk else "message": said}
        more = {"finish_reason": last["end"], "logprobs": self.logprobs(last["tokens"])} if last else {}
        choice = {"index": 0, "logprobs": None, "finish_reason": None} | said | more
        kind = f"chat.completion{'.chunk' * chunk}" if self.chat else "text_completion"
        known = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return known | {"choices": [choice]} | ({"usage": usage_of(last)} if last and not chunk else {})

    async def answer(self, events: AsyncGenerator[Event], request: Request) -> Event:
        """The answer as one object. InputError once nobody waits for it any more, which ends the work."""
        text, last = "", Event()
        async with aclosing(events):
            async for last in events:
                text += last.get("piece", "")
                if await request.is_disconnected():
                    raise InputError("whoever asked has gone")
        return self.whole(text, last)

    async def chunks(self, first: Event, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        """The answer piece by piece; in one piece where log-probabilities are asked for, which are known at
        its end."""
        text, event = "", first
        async with aclosing(events):
            while event:
                text += event.get("piece", "")
                if "piece" in event and self.top is None:
                    yield self.whole(event["piece"], None, chunk=True)
                elif "end" in event:
                    yield self.whole("" if self.top is None else text, event, chunk=True)
                    if self.given["stream_options"].get("include_usage"):
                        yield self.whole("", None, chunk=True) | {"choices": [], "usage": usage_of(event)}
                event = await anext(events, Event())

    def logprobs(self, tokens: list[Event]) -> dict[str, Any] | None:
        """The log-probabilities of the tokens, in the form of the endpoint; None where none are asked for."""
        if self.top is None:
            return None
        tops = [token.get("instead", [])[: self.top] for token in tokens]
        if not self.chat:
            texts = [token["text"] for token in tokens]
            return {
                "tokens": texts, "token_logprobs": [log(token.get("p")) for token in tokens],
                "top_logprobs": [{text: log(p) for text, p in top} for top in tops],
                "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
            }  # fmt: skip

        def entry(text: str, p: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": log(p), "bytes": list(text.encode())}

        content = [entry(token["text"], token.get("p")) | {"top_logprobs": [entry(*one) for one in top]}
                   for token, top in zip(tokens, tops, strict=True)]  # fmt: skip
        return {"content": content, "refusal": None}


def tools_of(given: dict[str, Any]) -> list[Any]:
    """The tools that the model is told of. InputError for what is none, or must be called."""
    for tool in given["tools"]:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(
                f'tools: {tool!r:.60} is none; give {{"type": "function", "function": {{"name": …}}}}'
            )
    if given["tool_choice"] not in ("auto", "none"):
        raise InputError(f"tool_choice is {given['tool_choice']!r:.60}; give auto or none")
    return given["tools"] if given["tool_choice"] == "auto" else []


def log(p: float | None) -> float:
    """-9999 for none, as OpenAI has it."""
    return math.log(p) if p else -9999.0


def plain(message: Any) -> Any:
    """A message as ours are: a content in parts as one text, a developer as the system."""
    if not isinstance(message, dict):
        return message
    parts, role = message.get("content"), message.get("role")
    if isinstance(parts, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in parts):
        message = message | {"content": "".join(str(one.get("text", "")) for one in parts)}
    return message | ({"role": "system"} if role == "developer" else {})


def usage_of(last: Event) -> dict[str, int]:
    asked, new = last["prompt_tokens"], len(last["tokens"])
    return {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new}
