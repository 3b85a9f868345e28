"""What comes in over the network and what goes out: who may ask, bodies, server-sent events, errors.

Only pages of this server may ask it: the Host must be ours, so that no name of somebody else's can be made to
point here, and so must the Origin where there is one. Away from this machine a token is asked for besides. A
body is at most a megabyte. What models and visitors write goes out as JSON alone and into the page as text.
"""

import hmac
import inspect
import json
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, get_origin

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minillm.errors import InputError
from minillm.play.worker import Event
from minillm.tools.ending import last_words

LARGEST_BODY = 1_000_000
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'self'; "
    "base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Of every answer that has none of its own: nothing is loaded from elsewhere, nothing inline is run."""

Fields = Mapping[str, tuple[Any, Any]]
"""Of a body: by name the type and the default, which is ... for what must be there."""


def posted(path: str, answer: Callable[..., Awaitable[Event | Response]]) -> Route:
    """An address where JSON objects are posted whose fields are the parameters of `answer`."""
    fields = {
        name: (get_origin(one.annotation) or one.annotation, ... if one.default is one.empty else one.default)
        for name, one in inspect.signature(answer).parameters.items()
    }

    async def respond(request: Request) -> Response:
        found = await answer(**await fields_of(request, fields))
        return found if isinstance(found, Response) else JSONResponse(found)

    return Route(path, respond, methods=["POST"])


async def fields_of(request: Request, fields: Fields) -> dict[str, Any]:
    """The fields of the JSON object that came, those left out by default. InputError for what is wrong."""
    try:
        body = b""
        async for part in request.stream():
            if len(body := body + part) > LARGEST_BODY:
                raise InputError(f"the body is larger than {LARGEST_BODY:,} bytes")
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()  # half a character of UTF-16 is no text
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON in UTF-8") from error
    if not isinstance(found, dict):
        raise InputError("the body is no JSON object")
    if unknown := sorted(set(found) - set(fields)):
        raise InputError(f"{unknown[0]!r:.60}: not known here; leave it out")
    values = {}
    for name, (kind, default) in fields.items():
        value = default if found.get(name) is None else found[name]
        right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
        right |= kind is float and type(value) is int
        right &= type(value) is not int or abs(value) < 2**63
        if value is ... or (value is not default and not right):
            wanted = getattr(kind, "__name__", "another type")
            raise InputError(f"{name} is {found.get(name)!r:.60}; give {wanted}")
        values[name] = float(value) if kind is float and value is not None else value
    return values


def stream_of(
    events: AsyncGenerator[Event],
    error_of: Callable[[Exception], Event] = lambda error: {"error": words_for(error)},
    end: str = "",
) -> StreamingResponse:
    """Server-sent events, and the end; or, as the last of them, an error."""

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(events):
                async for event in events:
                    yield f"data: {json.dumps(event)}\n\n"
            if end:
                yield end
        except Exception as error:
            yield f"data: {json.dumps(error_of(error))}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def words_for(error: Exception) -> str:
    """The line of what a visitor can cause; of a fault of ours its name, all of it going to the terminal."""
    if (last := last_words(error)) is not None:
        return last[0].removeprefix("error: ")
    traceback.print_exception(error)
    return f"a fault of the server: {type(error).__name__}"


def status_of(error: Exception) -> int:
    return getattr(error, "status", 400) if isinstance(error, InputError) else 500


class Door:
    """Lets in what comes from our own pages."""

    def __init__(self, app: ASGIApp, hosts: set[str], token: str | None) -> None:
        """`hosts` are the names, with the port, under which the server may be asked; none for any."""
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        if objection := self._objection(request):
            await JSONResponse({"error": objection}, 403)(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if self._is_token(request.query_params.get("token", "")):
                    headers["set-cookie"] = f"minillm={self.token}; HttpOnly; SameSite=Strict; Path=/"
            await send(message)

        await self.app(scope, receive, sealed)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def _objection(self, request: Request) -> str:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.hosts and host not in self.hosts:
            return f"host {host!r:.80} is not served here"
        if origin is not None and origin.rpartition("://")[2] != host:
            return f"origin {origin!r:.80} may not ask this server"
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = (bearer, request.cookies.get("minillm", ""), request.query_params.get("token", ""))
        if self.token and not any(map(self._is_token, given)):
            return "a token is needed: open the address that the server printed"
        return ""
