"""How fast the page is: asked of a server that runs, or is about to, as visitors ask it.

    python -m minillm.play.measure http://127.0.0.1:8017             four chats at once
    python -m minillm.play.measure http://127.0.0.1:8017 --train     then ten picks and a training

Prints one JSON object: seconds to the first token and tokens/s of each of the four chats; seconds from the
tenth pick to the first answer that is not the assistant's any more, and what the answers were.
"""

import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from minillm.tools.provenance import provenance

QUESTION = "Tell me a long story about a goose, a king and a river."


def ask(address: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def events(address: str, path: str, body: Any = None) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each event of a stream and the seconds since it was asked for."""
    began = time.perf_counter()
    for line in ask(address, path, body):
        if line.startswith(b"data: "):
            yield time.perf_counter() - began, json.loads(line[len(b"data: ") :])


def chat(address: str, seed: int) -> dict[str, float]:
    asked = {
        "run": "base",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 1,
        "seed": seed,
    }
    heard = [one for one in events(address, "/api/chat", asked) if "waiting" not in one[1]]
    tokens, seconds = len(heard) - 1, heard[-1][0]  # the last event is the end; a reply may be empty
    return {"first_token": heard[0][0], "tokens": tokens, "tokens_per_second": tokens / seconds}


def train(address: str) -> dict[str, Any]:
    while (shown := json.load(ask(address, "/api/rank?name=measure")))["done"] < 10:
        longest = sorted(range(len(shown["responses"])), key=lambda i: -len(shown["responses"][i]))
        order = " > ".join("ABCDEFGHI"[i] for i in longest)
        ask(address, "/api/rank", {"name": "measure", "key": shown["key"], "action": order}).read()
    ask(address, "/api/train", {"iterations": 20}).read()
    first: list[str] = []
    changed, told = None, {}
    for seconds, event in events(address, "/api/train"):
        if "answers" in event:
            told[event["step"]] = [answer["text"] for answer in event["answers"]]
            first = first or told[event["step"]]
            changed = changed or (seconds if told[event["step"]] != first else None)
        if event.get("stage") in ("done", "failed"):
            return {"to_a_changed_answer": changed, "whole": seconds, "end": event, "answers": told}
    raise AssertionError("the stream ended before the training")


def wait_for(address: str, seconds: int = 60) -> None:
    """Until the server answers; its last error where it does not."""
    for left in reversed(range(seconds)):
        try:
            ask(address, "/api/state").read()
            return
        except OSError:
            if not left:
                raise
            time.sleep(1)


def main(address: str, *flags: str) -> None:
    wait_for(address)
    chat(address, 0)  # the model is opened once
    with ThreadPoolExecutor(4) as pool:
        chats = list(pool.map(lambda seed: chat(address, seed), range(1, 5)))
    found: dict[str, Any] = {"chats": chats}
    found |= {name: median(one[name] for one in chats) for name in ("first_token", "tokens_per_second")}
    if "--train" in flags:
        found["training"] = train(address)
    print(json.dumps(found | provenance(), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
