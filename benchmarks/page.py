"""How fast the page is, and whether its server's memory stays flat: asked of one that runs, as visitors do.

    python benchmarks/page.py http://127.0.0.1:8017                       four chats at once
    python benchmarks/page.py http://127.0.0.1:8017 --train --pid N       then ten picks and a training
    python benchmarks/page.py http://127.0.0.1:8017 --soak 600 --pid N    then ten minutes of four visitors

Of each chat: seconds to the first token, and tokens/s. Of the training: seconds from the tenth pick to the
first answer that is not the assistant's any more, also in seconds of a core, and all answers. Of the soak:
the memory of the server's process, which N is.
"""

import itertools
import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

import harness

QUESTION = "Tell me a long story about a goose, a king and a river."
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 1}


def ask(address: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def events(address: str, path: str, body: Any = None) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each event of a stream and the seconds since it was asked for; who stops listening has gone."""
    began = time.perf_counter()
    with ask(address, path, body) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                yield time.perf_counter() - began, json.loads(line[len(b"data: ") :])


def chat(address: str, seed: int) -> dict[str, float]:
    asked = CHAT | {"run": "base", "seed": seed}
    heard = [one for one in events(address, "/api/chat", asked) if "waiting" not in one[1]]
    tokens, seconds = len(heard) - 1, heard[-1][0]  # the last event is the end; a reply may be empty
    return {"first_token": heard[0][0], "tokens": tokens, "tokens_per_second": tokens / seconds}


def pick_longest(address: str, name: str, shown: dict[str, Any]) -> Any:
    """The longest response picked, the next shorter one second, and so on; what is to be ranked next."""
    longest = sorted(range(len(shown["responses"])), key=lambda i: -len(shown["responses"][i]))
    order = " > ".join("ABCDEFGHI"[i] for i in longest)
    return json.load(ask(address, "/api/rank", {"name": name, "key": shown["key"], "action": order}))


def train(address: str, pid: int) -> dict[str, Any]:
    shown = json.load(ask(address, "/api/rank", {"name": "measure"}))
    while shown["done"] < 10:
        shown = pick_longest(address, "measure", shown)
    ask(address, "/api/train", {}).read()
    first, before = list[str](), cpu_seconds(pid)
    changed, told = None, {}
    for seconds, event in events(address, "/api/train"):
        if "answers" in event:
            told[event["step"]] = [answer["text"] for answer in event["answers"]]
            first = first or told[event["step"]]
            if changed is None and told[event["step"]] != first:
                changed = {"seconds": seconds, "core_seconds": cpu_seconds(pid) - before}
        if event.get("stage") in ("done", "failed"):
            whole = {"seconds": seconds, "core_seconds": cpu_seconds(pid) - before}
            return {"to_a_changed_answer": changed, "whole": whole, "end": event, "answers": told}
    raise AssertionError("the stream ended before the training")


def visit(address: str, seed: int) -> None:
    """One of the things that visitors do, drawn by the seed; a pick is taken back."""
    rng = random.Random(seed)
    match rng.randrange(5):
        case 0:
            asked = {"run": "base", "number": seed, "temperature": 1 + rng.random()}
            ask(address, "/api/guess", asked).read()
        case 1:
            name = f"visitor {seed}"
            pick_longest(address, name, json.load(ask(address, "/api/rank", {"name": name})))
            ask(address, "/api/rank", {"name": name, "action": "undo"}).read()
        case 2:  # left in the middle
            list(itertools.islice(events(address, "/api/chat", CHAT | {"run": "sft", "seed": seed}), 3))
        case 3:
            asked = {"model": "base", "prompt": QUESTION, "seed": seed, "logprobs": 2}
            ask(address, "/v1/completions", asked).read()
        case 4:
            for path in ("/", "/api/state", "/api/lessons"):
                ask(address, path).read()


def soak(address: str, seconds: float, pid: int) -> dict[str, Any]:
    """Four visitors at once for so long; the memory of the process in MB, in twenty parts of the time."""
    began, visits, memory = time.monotonic(), itertools.count(), list[float]()
    with ThreadPoolExecutor(4) as pool:
        for part in range(20):
            end, found = began + seconds * (part + 1) / 20, list[float]()
            while time.monotonic() < end:
                list(pool.map(lambda seed: visit(address, seed), itertools.islice(visits, 16)))
                found.append(resident(pid))
            memory.append(fmean(found or [resident(pid)]))
    return {"visits": next(visits), "megabytes": memory, "halves": [fmean(memory[:10]), fmean(memory[10:])]}


def cpu_seconds(pid: int) -> float:
    """Of a process and those that it started: what a busy machine does not change much."""
    spent = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile, and is counted with its parent
            _, parent, *rest = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(path.parent.name) == pid:
                spent += sum(map(int, rest[9:13]))  # its own, and of children that have ended
            elif int(parent) == pid:
                spent += sum(map(int, rest[9:11]))
    return spent / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """Memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def wait_for(address: str, seconds: int = 60) -> bytes:
    """What the server answers, once it does; its last error where it does not."""
    for _ in range(seconds - 1):
        with suppress(OSError):
            return ask(address, "/api/state").read()
        time.sleep(1)
    return ask(address, "/api/state").read()


def main(arguments: list[str]) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("address", help="of the server, as in http://127.0.0.1:8017")
    parser.add_argument(
        "--train", action="store_true", help="ten picks of the longest response, and a training"
    )
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS", help="visits for so long")
    parser.add_argument("--pid", type=int, help="--train, --soak: the server's process")
    options = parser.parse_args(arguments)
    if (options.soak or options.train) and not options.pid:
        parser.error("--pid: is missing; give the server's process")
    address = options.address
    wait_for(address)
    chat(address, 0)  # the model is opened once
    with ThreadPoolExecutor(4) as pool:
        chats = list(pool.map(lambda seed: chat(address, seed), range(1, 5)))
    found: dict[str, Any] = {"chats": chats}
    found |= {name: median(one[name] for one in chats) for name in ("first_token", "tokens_per_second")}
    if options.train:
        found["training"] = train(address, options.pid)
    if options.soak:
        found["soak"] = soak(address, options.soak, options.pid)
    print(json.dumps(found, indent=1))
    harness.write(options.json, found)


if __name__ == "__main__":
    main(sys.argv[1:])
