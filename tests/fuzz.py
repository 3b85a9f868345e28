"""Fuzzers: damaged files, nonsense as command lines, random chat templates, bodies for the page and its API.

    python tests/fuzz.py --cases 10000 --json benchmarks/fuzz.json       six minutes on two cores
    python tests/fuzz.py --cases 80                                      as test_accidents.py runs it
    python tests/fuzz.py --only templates --first 217 --cases 1          a case again, by its number

Whatever comes, a reader, a command and the server end well or in one line of bad input (an InputError, exit
code 2, a status below 500); they take no longer than a minute, and every file that was there is as it was.
Each case follows from the seed, the kind and its number. All run in this process, at the readers and the
commands' options. test_bad_input.py runs whole commands on files that are damaged in the same ways.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from harness import at_least_one, parser, write  # which finds the minillm beside it

# isort: split

import torch
from safetensors.torch import load, save
from starlette.testclient import TestClient

from minillm.chat import with_chat_template
from minillm.digest import digest_of
from minillm.errors import InputError
from minillm.io import sandbox
from minillm.io.conversations import open_conversations, rankings_of_file
from minillm.io.disk import write_json
from minillm.io.huggingface import load_model, load_scalar_model, save_model, save_scalar_model
from minillm.io.rankings import RankingFile, read_responses
from minillm.io.template import ForeignFormat
from minillm.io.text import open_sources
from minillm.io.vocabulary import load_tokenizer
from minillm.model import LanguageModel, config_of_depth, initialize, scalar_from_language_model
from minillm.play import __main__ as play
from minillm.tokenizer import Tokenizer
from minillm.tools.commandline import parse_options
from minillm.tools.ending import last_words
from minillm.tools.folder import read_metrics
from minillm.tools.stage import ROOT

LONGEST = 60
"""Seconds that a case may take."""
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, -(2**70), 10**40, "", "x",
    "x" * 200, "\ud800", "\0", "NaN", "../..", [], {}, [[]], [0], [-1], ["x"], {"a": 1}, [[0, 1]], [{}],
)  # fmt: skip
WORDS = (
    "", " ", "x", "-1", "0", "1", "nan", "inf", "1e400", "0x10", str(10**40), "None", "True", "cpu",
    "a=b:c", "=", "\udce9", "\x1b[2J", "/dev/null/x", "..", "~", "*", "x" * 300, "--", "-h", "{", "ppo",
)  # fmt: skip
COMMANDS = (
    "train", "sft", "rlhf", "minillm.tools.chat", "minillm.compare.__main__", "minillm.tools.evaluate",
    "minillm.tools.export", "minillm.play.__main__", "common",
)  # fmt: skip
PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "<|end|>", "<think>",
    "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{% set x = [messages] %}", "{{ x }}",
    "{{ 9**9**9 }}", "{{ 'a' * 9999999 }}", "{{ m.content | upper }}", "{% generation %}",
    "{% endgeneration %}", "{{ eos_token }}", "{% for a in range(99999) %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception(1) }}",
    "{{ messages.__class__ }}", "{{ ''.center(10**9) }}", "{% if add_generation_prompt %}", "\n",
    "\U000f0000", "{#", "{{ messages | tojson }}", "{% include 'x' %}", "{{ strftime_now(3) }}",
    "{{ '%s' | format(messages) }}", "{{",
)  # fmt: skip
PATHS = (
    "/", "/results", "/lessons/x.png", "/api/lessons", "/api/state", "/api/guess", "/api/rank",
    "/api/chat", "/api/change", "/api/export", "/v1/models", "/v1/chat/completions", "/v1/completions",
    "/static/../x", "/api/train",
)  # fmt: skip


def make(folder: Path) -> None:
    """Files of every kind, and the runs that the page shows."""
    tokenizer = Tokenizer.train(["How many cats? 7 cats, and it is a fine day."], 300)
    model = LanguageModel(config_of_depth(1, tokenizer.vocab_size, 64))
    initialize(model, torch.Generator().manual_seed(0))
    save_model(folder / "base", model, tokenizer)
    tokenizer = with_chat_template(tokenizer)
    save_model(folder / "sft", model, tokenizer)
    reward = scalar_from_language_model(model, torch.Generator().manual_seed(0))
    save_scalar_model(folder / "rlhf" / "reward", reward, tokenizer)
    for run, stage in (("base", "train"), ("sft", "sft")):
        options = asdict(importlib.import_module(stage).Options(out=str(folder / run)))
        write_json(folder / run / "run.json", {"stage": stage, "options": options})
        events = [{"event": event, "step": 1, "loss": 0.5} for event in ("train", "val", "final")]
        (folder / run / "metrics.jsonl").write_text(lines(events))
    asked = [[{"role": "user", "content": f"{i} cats?"}] for i in range(12)]
    sets = [{"messages": messages, "responses": ["No.", "Yes", ""]} for messages in asked]
    how = {"annotator": "Ada", "seed": 0, "time": "2026-01-31T12:00:00+00:00", "ranking": [[1], [0, 2]]}
    (folder / "rlhf" / "responses.jsonl").write_text(lines(sets))
    (folder / "rankings.jsonl").write_text(lines([one | how for one in sets]))
    (folder / "pairs.jsonl").write_text(lines([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3))
    chats = [[*messages, {"role": "assistant", "content": "Yes."}] for messages in asked]
    (folder / "chats.jsonl").write_text(lines([{"messages": chat} for chat in chats]))
    (folder / "chats.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 3))
    (folder / "text.txt").write_text("On a fine day some cats met a dog.\n" * 40)
    (folder / "text.csv").write_text("text,other\n" + "A cat.,1\n" * 40)


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- Damage


def altered(content: Any, rng: random.Random) -> Any:
    """A JSON value with another value, or none, in one place."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.2:
        return rng.choice(VALUES)
    content, keys = content.copy(), list(content) if isinstance(content, dict) else range(len(content))
    key = rng.choice(keys)
    if rng.random() < 0.1:
        del content[key]
    else:
        content[key] = altered(content[key], rng)
    return content


def damaged(raw: bytes, name: str, rng: random.Random) -> bytes:
    """The content of a file, spoiled: as bytes, or in what it says."""
    if name.endswith("safetensors") and rng.random() < 0.3:
        tensors, number = load(raw), rng.choice((float("nan"), float("inf"), 3e38, 1e30, 0.0, -1.0))
        spoiled = rng.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
        return save(tensors | {spoiled: torch.full_like(tensors[spoiled], number)})
    if name.endswith("safetensors") and rng.random() < 0.6:
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.dumps(altered(json.loads(raw[8 : 8 + size]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + raw[8 + size :]
    if name.endswith(".json") and rng.random() < 0.6:
        return json.dumps(altered(json.loads(raw), rng)).encode()
    if name.endswith(".jsonl") and rng.random() < 0.6:
        records = raw.splitlines()
        number = rng.randrange(len(records))
        records[number] = json.dumps(altered(json.loads(records[number]), rng)).encode()
        return b"\n".join(records) + b"\n"
    at, flipped = rng.randrange(len(raw) + 1), bytearray(raw)
    for _ in range(rng.choice((1, 9)) if raw else 0):
        flipped[rng.randrange(min(len(raw), rng.choice((20, 2000, 10**9))))] ^= 1 << rng.randrange(8)
    part = rng.choice((b"\xff\xc3\0", b"[" * 10**5, b'{"a":' * 5000 + b"\n", b"[]\n", b"\n\n", b'{"a'))
    return rng.choice([
        raw[:at], bytes(flipped), b"", raw[:at] + part + raw[at:], raw + part, bytes(len(raw)), raw * 2,
        b"\x1f\x8b" + raw, b"PAR1" + raw,
    ])  # fmt: skip


# ---- The kinds of cases, each given the folder and a generator


def files(folder: Path, rng: random.Random) -> None:
    """A file is damaged, and read by whatever may read it."""
    path = rng.choice(files_of(folder))
    whole, run = path.read_bytes(), folder / rng.choice(("base", "sft"))
    how = "strict", "replace"
    readers: list[Callable[[], Any]] = [
        lambda: load_model(path.parent, torch.device("cpu"), torch.float32),
        lambda: load_scalar_model(folder / "rlhf" / "reward", torch.device("cpu"), torch.float32),
        lambda: list(open_sources([str(path)], errors=rng.choice(how))[0].documents()),
        lambda: list(open_conversations([str(path)], errors=rng.choice(how))[0].documents()),
        lambda: rankings_of_file(str(path)), lambda: read_responses(path),
        lambda: RankingFile(path).file.close(), lambda: read_metrics(path.parent),
        lambda: parse_options(importlib.import_module("train").Options, ["--resume", "--out", str(run)]),
    ]  # fmt: skip
    path.write_bytes(damaged(whole, path.name, rng))
    before = path.read_bytes()
    try:
        for reader in readers:
            with contextlib.suppress(InputError):
                reader()
        torn = path.with_name(f"{path.name}.torn")
        kept = path.read_bytes() + (torn.read_bytes() if torn.exists() else b"")
        assert kept.replace(b"\n", b"") == before.replace(b"\n", b""), f"{path.name} lost something"
    finally:
        path.write_bytes(whole)
        path.with_name(f"{path.name}.torn").unlink(missing_ok=True)


def commands(folder: Path, rng: random.Random) -> None:
    """Words for a script or a tool, up to its options; where it opens a run that is not there, all of it."""
    name = rng.choice(COMMANDS)
    module = importlib.import_module(name)
    flags = [f"--{field.name.replace('_', rng.choice('-_'))}" for field in fields(module.Options)]
    words = [rng.choice([*flags, *flags, *WORDS, f"{rng.choice(flags)}={rng.choice(WORDS)}"])
             for _ in range(rng.randrange(7))]  # fmt: skip
    if name in ("minillm.tools.evaluate", "minillm.tools.export"):
        module.main([str(folder / "nothing"), *words])
    else:
        parse_options(module.Options, words)


def templates(folder: Path, rng: random.Random) -> None:
    """A template of pieces, some of them of a good one, asked as training and chatting ask."""
    pieces = ["{% for m in messages %}", "{{ m.content }}", "<|end|>", "{% endfor %}"]
    for _ in range(rng.randrange(8)):
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(PIECES))
    source = "".join(rng.sample(pieces, rng.randrange(len(pieces))) if rng.random() < 0.3 else pieces)
    tokenizer = load_tokenizer(folder / "sft")
    form = ForeignFormat(Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "chat_template": source}))
    asked, answer = {"role": "user", "content": "Hi"}, rng.choice(("Yes", "", "<|end|>"))
    form.encode([asked, {"role": "assistant", "content": answer}])
    form.prompt([asked], rng.random() < 0.5)


BODIES: tuple[dict[str, Any], ...] = (
    {"run": "base", "number": 1, "temperature": 1.0}, {"name": "Ada", "key": "", "action": "B > A = C"},
    {"run": "sft", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7, "seed": 1},
    {"what": "undo", "name": "x", "new": "y"}, {"beside": False, "iterations": 1},
    {"model": "sft", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stop": ["a"],
     "logprobs": True, "top_logprobs": 2, "seed": 1, "stream": False},
    {"model": "base", "prompt": "Hi", "max_tokens": 3, "logprobs": 2, "stream": True},
)  # fmt: skip


@functools.cache
def client_of(folder: Path) -> TestClient:
    """Who asks the page of minillm.play."""
    app, _ = play.build(play.Options(runs=str(folder), text=(str(folder / "text.txt"),), port=0), 80)
    client = TestClient(app, "http://localhost:80", raise_server_exceptions=False)
    client.headers["host"] = "localhost:80"
    return client


def page(folder: Path, rng: random.Random) -> None:
    """A request to the page or its API."""
    body = rng.choice(BODIES)
    raw = json.dumps(body if rng.random() < 0.2 else altered(body, rng)).encode()
    if rng.random() < 0.2:
        raw = damaged(raw, "", rng)
    path, name = rng.choice(PATHS), rng.choice(("run", "number", "name"))
    query = {name: rng.choice(("base", "1", "\0", "..", "9" * 99))}
    method = rng.choice(("GET", "POST", "POST", "POST", "PUT", "HEAD"))
    if path == "/api/train":  # of which a stream follows that waits
        method = "POST"
    answer = client_of(folder).request(method, path, content=raw, params=query)
    asked = f"{method} {path} {query} {raw[:300]!r}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code < 500 and "a fault of the server" not in answer.text, asked


KINDS = {"files": files, "commands": commands, "templates": templates, "page": page}


# ---- All of them


def case(kind: str, number: int, folder: Path, seed: int) -> str:
    """What is wrong with a case, or nothing."""
    before, said, wrong = state_of(folder), io.StringIO(), ""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            KINDS[kind](folder, random.Random(f"{seed} {kind} {number}"))
    except SystemExit as end:
        wrong = "" if end.code in (0, 2) else f"exit code {end.code}"
    except BaseException as error:
        if last_words(error) is None or isinstance(error, KeyboardInterrupt):
            wrong = "".join(traceback.format_exception(error)[-4:])
    finally:
        signal.alarm(0)
    if "Traceback" in said.getvalue():
        wrong = wrong or said.getvalue()[-1500:]
    return wrong or ("a file has changed" if state_of(folder) != before else "")


def too_long(*_: object) -> NoReturn:
    raise AssertionError(f"takes longer than {LONGEST} s")


def files_of(folder: Path) -> list[Path]:
    """All but what visitors of the page make."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "play" not in path.parts]


def state_of(folder: Path) -> str:
    """A digest of every file."""
    return digest_of(part for path in files_of(folder) for part in (str(path), path.read_bytes()))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", type=at_least_one, default=10_000, help="of all kinds together")
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    given, began = options.parse_args(), time.monotonic()
    sys.path.insert(0, str(ROOT / "lessons"))
    sandbox.SECONDS = 1.0
    counts, failures = dict.fromkeys(given.only, 0), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        os.chdir(folder)
        for number in range(given.first, given.first + given.cases):
            kind = given.only[number % len(given.only)]
            counts[kind] += 1
            if wrong := case(kind, number, folder, given.seed):
                failures.append({"kind": kind, "number": number, "found": wrong})
                print(f"{kind} {number}: {wrong}", flush=True)
        os.chdir(ROOT)
    print(f"{given.cases - len(failures)} of {given.cases} ended well or in one line")
    figures = {"seed": given.seed, "cases": given.cases, "kinds": counts, "failures": failures}
    write(given.json, {**figures, "seconds": time.monotonic() - began})
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
