"""The page's server: words, the queue, who is let in, OpenAI's API by its own client, rankings."""

import asyncio
import gc
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from itertools import pairwise

import httpx
import openai
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import ROOT, refusal
from served import a_model_that_calls, make_runs, serve

from minillm.errors import InputError
from minillm.io.disk import write_json
from minillm.io.rankings import read_rankings
from minillm.io.vocabulary import load_tokenizer
from minillm.play import __main__ as play
from minillm.play import app
from minillm.play.parts import Picking
from minillm.play.shelf import Shelf, Until
from minillm.play.training import Training
from minillm.play.words import kinds_of_tokens, likeliest_words
from minillm.play.worker import MOST_WAITING, Busy, Worker
from minillm.tools.folder import hold, read_metrics
from minillm.tools.streams import stream_text

TOKEN = "a" * 20


# ---- Words


def test_the_likeliest_words_have_the_probabilities_of_all_their_spellings_in_tokens(runs):
    """Each found word is spelled in all ways that tokens allow; none of the words of one token, or of a space
    and one, is more probable."""
    model, tokenizer = Shelf(runs, torch.device("cpu")).model("base")
    begins, goes_on, _ = kinds_of_tokens(tokenizer)
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    context, asked = tokenizer.encode("Who likes the"), {}

    @torch.inference_mode()
    def after(*prefix: int) -> torch.Tensor:
        if prefix not in asked:
            hidden = model.model(torch.tensor([[*context, *prefix]]))[0, -1]
            asked[prefix] = model.logits(hidden).softmax(0).double()
        return asked[prefix]

    def spelled(rest: str, *prefix: int) -> float:
        if not rest:
            return 1 - (after(*prefix) * goes_on).sum().item()
        fitting = [i for i, text in enumerate(texts) if text and rest.startswith(text)]
        return sum(after(*prefix)[i].item() * spelled(rest[len(texts[i]) :], *prefix, i) for i in fitting)

    space = texts.index(" ")
    any_word = (after() * begins).sum() - after()[space] * (1 - (after(space) * goes_on).sum())
    found, truth = likeliest_words(model, tokenizer, context, "zebra", 10)
    assert truth == pytest.approx(spelled(" zebra") / any_word.item(), rel=0.05)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    for word, p in found:
        exact = spelled(f" {word}") / any_word.item()
        assert 0.97 * exact <= p <= exact * (1 + 1e-4)
    whole = {texts[i].strip() for i in begins.nonzero().flatten().tolist()} - {""}
    whole |= {texts[i] for i in goes_on.nonzero().flatten().tolist()}
    missed = max(spelled(f" {word}") / any_word.item() for word in whole - {word for word, _ in found})
    assert missed <= found[-1][1] * 1.03


@given(
    st.lists(st.text("abc. ", max_size=4), max_size=8),
    st.lists(st.text("abc.", min_size=1, max_size=3), max_size=3),
)
@example(["ab", "ca", "b"], ["abc", "b"])
def test_a_reply_is_cut_before_its_first_stop_however_it_comes_in_pieces(texts, stops):
    whole = "".join(texts)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    until, said = Until(stops), ""
    for text in texts:
        said += "" if until.found else until.feed(text)
    said += until.feed("", last=True)
    # Two stops may end in one piece: then the one that begins first cuts. Else the first that is complete.
    assert whole.startswith(said) and not any(stop in said for stop in stops)
    assert until.found == bool(places)
    assert until.found or said == whole


def test_of_a_model_that_learns_the_newest_alone_is_in_memory(runs, tmp_path):
    folder = shutil.copytree(runs / "base", tmp_path / "base")
    shelf = Shelf(tmp_path, torch.device("cpu"))
    first, again = shelf.model("base"), shelf.model("base")
    assert first[0] is again[0]
    older = weakref.ref(first[0])
    del first, again
    os.utime(folder / "model.safetensors", ns=(1, 1))
    newer, _ = shelf.model("base")
    gc.collect()
    assert older() is None and newer is shelf.model("base")[0]


def test_pieces_join_to_the_text_whatever_characters_tokens_cut(runs):
    _, tokenizer = Shelf(runs, torch.device("cpu")).model("base")
    text = "naïve 🦊 Ωμέγα"
    assert "".join(stream_text(tokenizer.decode_bytes, tokenizer.encode(text))) == text
    assert (
        "".join(stream_text(tokenizer.decode_bytes, tokenizer.encode("🦊")[:2]))
        == "\N{REPLACEMENT CHARACTER}"
    )


# ---- The queue


def test_jobs_take_turns_wait_in_a_queue_that_says_so_and_end_when_nobody_listens():
    worker, log, closed = Worker(together=2), [], []

    def steps(name: str, count: int) -> Iterator[dict]:
        try:
            for i in range(count):
                log.append(name)
                yield {"n": i}
                time.sleep(0.01)
        finally:
            closed.append(name)

    async def listen(name: str, count: int, most: int | None = None) -> list[dict]:
        heard = []
        async with aclosing(worker.events(lambda: steps(name, count))) as events:
            async for event in events:
                heard.append(event)
                if len(heard) == most:
                    break
        return heard

    async def all_of_them() -> list[list[dict]]:
        first = [asyncio.create_task(listen(name, 6)) for name in "ab"]
        await asyncio.sleep(0.01)
        return await asyncio.gather(*first, listen("c", 2), listen("d", 10**6, most=4))

    a, b, c, d = asyncio.run(all_of_them())
    assert [event["n"] for event in a] == [event["n"] for event in b] == list(range(6))
    assert "abab" in "".join(log)  # in turn
    assert c[0] == {"waiting": 1} and d[0] == {"waiting": 2}
    for _ in range(100):  # the endless one ends soon after its listener has gone
        if "d" in closed:
            break
        time.sleep(0.05)
    assert "d" in closed and log.count("d") < 100


def test_what_one_job_raises_ends_no_other():
    worker = Worker()

    async def both() -> tuple[object, dict]:
        failing, working = worker.result(lambda: {"n": 1 // 0}), worker.result(lambda: {"n": 1})
        return await asyncio.gather(failing, working, return_exceptions=True)

    failed, worked = asyncio.run(both())
    assert isinstance(failed, ZeroDivisionError) and worked == {"n": 1}


def test_whoever_leaves_the_queue_is_no_longer_in_it_and_when_it_is_full_says_so():
    worker = Worker(together=1)

    def steps() -> Iterator[dict]:
        while True:
            yield {"n": 1}

    async def crowd() -> None:
        everybody = [worker.events(steps) for _ in range(1 + MOST_WAITING)]
        for place, one in enumerate(everybody):
            assert await anext(one) == ({"waiting": place} if place else {"n": 1})
        with pytest.raises(Busy, match="others are waiting"):
            await anext(worker.events(steps))
        await everybody[1].aclose()
        assert await anext(everybody[2]) == {"waiting": 1}
        await everybody[0].aclose()
        assert await anext(everybody[2]) == {"n": 1}
        for one in everybody[2:]:
            await one.aclose()

    asyncio.run(crowd())
    assert worker.jobs == []


# ---- Who is let in


@pytest.mark.parametrize(
    ("headers", "let_in"),
    [
        ({}, True),
        ({"Host": "localhost:PORT"}, True),
        ({"Host": "evil.example:PORT"}, False),
        ({"Host": "127.0.0.1"}, False),
        ({"Origin": "http://127.0.0.1:PORT"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
    ],
)
def test_only_our_own_pages_may_ask(headers, let_in, address):
    port = address.rpartition(":")[2]
    sent = {name: value.replace("PORT", port) for name, value in headers.items()}
    assert httpx.get(f"{address}/api/state", headers=sent).status_code == (200 if let_in else 403)


def test_elsewhere_a_token_opens_and_a_cookie_remembers_it(tmp_path):
    with httpx.Client() as client:
        for address in serve(play.Options(runs=str(tmp_path), port=0, host="0.0.0.0", token=TOKEN)):
            assert client.get(address).status_code == 403
            assert client.get(f"{address}/?token={TOKEN[:-1]}b").status_code == 403
            assert client.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).is_success
            assert client.get(f"{address}/v1/models").status_code == 403
            assert client.get(f"{address}/?token={TOKEN}").is_success
            assert client.get(f"{address}/v1/models").is_success


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/state", "/results"])
def test_no_answer_lets_a_browser_run_what_is_not_ours(path, address):
    headers = httpx.get(address + path).headers
    assert "unsafe-inline" not in headers["content-security-policy"].partition("style-src")[0]
    assert "default-src 'self'" in headers["content-security-policy"] or path == "/results"
    assert headers["x-content-type-options"] == "nosniff"


def test_a_body_that_is_too_large_is_refused(address):
    answer = httpx.post(f"{address}/v1/completions", content=b'{"prompt": "' + b"a" * 1_100_000 + b'"}')
    assert answer.status_code in (400, 413)


FIELDS = {
    "api/guess": "run number temperature",
    "api/rank": "name key action",
    "api/chat": "run messages temperature seed",
    "api/train": "beside iterations",
    "api/change": "what name new",
    "v1/completions": "model prompt max_tokens temperature top_p stop seed logprobs stream echo",
    "v1/chat/completions": "model messages max_tokens top_p stop logprobs top_logprobs stream_options n",
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
runs_there_or_not = st.sampled_from(["base", "sft", "sft", "rlhf/reward", "../sft", "sft\0", "play"])
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]), "content": json_values}
)
likely = {
    "run": runs_there_or_not,
    "model": runs_there_or_not,
    "messages": st.lists(messages, min_size=1, max_size=3),
    "max_tokens": st.integers(-1, 3),
    "prompt": st.text(max_size=9),
    "name": st.text(max_size=9),
    "what": st.sampled_from(["stop", "undo", "keep"]),
    "number": st.integers(),
    "temperature": st.floats(),
}
"""What a field of the name takes: one body in two has each of its fields so, or leaves it out."""


def bodies(path: str) -> st.SearchStrategy[bytes]:
    names = FIELDS[path].split()
    right = st.fixed_dictionaries({name: likely.get(name, st.none()) for name in names})
    wrong = st.dictionaries(st.sampled_from([*names, "else"]), json_values, max_size=3)
    both = st.builds(lambda one, other: json.dumps(one | other).encode(), right, st.just({}) | wrong)
    return both | st.binary(max_size=20)


GARBAGE = {
    "v1/chat/completions": [
        b'{"model": "sft", "messages": [1]}',
        b'{"model": "sft", "messages": []}',
        b"[" * 100_000,
    ],
    "v1/completions": [
        b'{"model": "base", "prompt": "a", "max_tokens": 1000000000}',
        b'{"model": "base", "prompt": "a", "temperature": NaN}',
        b'{"model": "base", "prompt": "a", "seed": 99999999999999999999999}',
        b'{"model": "base", "prompt": "\\ud800", "max_tokens": 1}',
        b'{"model": "base", "prompt": "a", "stop": "' + b"a" * 100_000 + b'"}',
    ],
    "api/guess": [b'{"run": "base", "number": 1, "temperature": 1e-30}'],
    "api/rank": [b'{"name": "", "action": "A"}', b'{"name": "a\\ud800", "action": "undo"}'],
    "api/change": [b'{"what": "undo", "name": "../rlhf"}', b'{"what": "keep", "name": "..", "new": "a/b"}'],
    "api/chat": [b'{"run": "sft", "messages": [{"role": "user", "content": 1}]}'],
    "api/train": [b'{"iterations": 0}'],
}


@pytest.mark.parametrize("path", FIELDS)
def test_garbage_is_refused_in_a_line_and_never_a_fault(path, asking):
    def ask(body: bytes) -> None:
        answer = asking.post(path, content=body)
        line = answer.text if answer.status_code == 200 else str(answer.json()["error"])
        assert answer.status_code in (200, 400, 404), line
        assert "fault of the server" not in line
        assert answer.status_code == 200 or "\n" not in line

    for body in GARBAGE[path]:
        ask(body)
    settings(max_examples=25)(given(bodies(path))(ask))()


@pytest.fixture(scope="module")
def asking(address) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.parametrize("name", ["07_none", "..%2f06_a", "06_a.png%00", "..%5c..%5csft"])
def test_only_pictures_of_lessons_are_shown_as_such(name, address):
    assert httpx.get(f"{address}/lessons/{name}.png").status_code in (400, 404)


# ---- OpenAI's API


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


TOOLS = [{"type": "function", "function": {"name": "calculator"}}]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


def test_the_official_client_gets_the_same_reply_whole_streamed_and_with_log_probabilities(client):
    assert {"base", "sft"} <= {model.id for model in client.models.list()}
    same = {"model": "sft", "messages": ASKED, "seed": 5, "temperature": 0.9, "max_tokens": 12}
    whole = client.chat.completions.create(**same)
    choice = whole.choices[0]
    streamed = list(
        client.chat.completions.create(**same, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in streamed if c.choices][-1] == choice.finish_reason
    assert streamed[-1].usage == whole.usage and whole.usage.completion_tokens <= 12
    told = client.chat.completions.create(**same, logprobs=True, top_logprobs=3)
    entries = told.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert len(entries) == whole.usage.completion_tokens
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and entry.logprob <= tops[0] + 1e-6
    cut = client.chat.completions.create(**same, stop=choice.message.content[2:4])
    assert cut.choices[0].finish_reason == "stop"
    assert choice.message.content[2:4] not in cut.choices[0].message.content


def test_the_official_client_is_given_calls_runs_them_and_gets_the_reply_to_their_results(client, runs):
    asked = {"model": "sft", "tools": TOOLS, "max_tokens": 40}
    messages: list = [{"role": "user", "content": "2+3?"}]
    with a_model_that_calls(load_tokenizer(runs / "sft")):
        whole = client.chat.completions.create(**asked, messages=messages).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.content == "Let me see."
        (call,) = whole.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("calculator", '{"expression": "2+3"}')
        with client.chat.completions.stream(**asked, messages=messages) as events:
            said = events.get_final_completion().choices[0]  # joined from the pieces by the client
        assert said.finish_reason == "tool_calls" and said.message.content == "Let me see."
        assert said.message.tool_calls[0].function.arguments == call.function.arguments
        messages += [whole.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        reply = client.chat.completions.create(**asked, messages=messages).choices[0]
    assert reply.finish_reason == "stop" and reply.message.content == "It is 5."


def test_a_completion_goes_on_with_a_text_past_the_context_too(client):
    same = {"model": "base", "prompt": "Who are you? " * 12, "seed": 1, "max_tokens": 130}
    whole = client.completions.create(**same)
    assert whole.usage.completion_tokens > 20
    pieces_of = client.completions.create(**same, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces_of) == whole.choices[0].text
    short = client.completions.create(model="base", prompt="Who", max_tokens=4, logprobs=2)
    assert len(short.choices[0].logprobs.tokens) == short.usage.completion_tokens


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError),
        ({"n": 2}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "a " * 400}]}, openai.BadRequestError),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError),
        ({"tools": TOOLS, "tool_choice": "required"}, openai.BadRequestError),
        ({"tools": TOOLS, "model": "base"}, openai.BadRequestError),
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "a"}]}, openai.BadRequestError),
        ({"max_tokens": 0}, openai.BadRequestError),
    ],
)
def test_what_cannot_be_done_is_an_error_of_its_kind_streamed_or_not(fields, error, client):
    for stream in (False, True):
        with pytest.raises(error):
            client.chat.completions.create(
                **{"model": "sft", "messages": ASKED, "max_tokens": 4} | fields, stream=stream
            )


def test_sixty_four_at_once_are_all_answered_as_each_alone(client):
    def ask(seed: int) -> str:
        made = client.chat.completions.create(model="sft", messages=ASKED, seed=seed, max_tokens=6)
        return made.choices[0].message.content

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert together[::13] == [ask(seed) for seed in range(0, 64, 13)]


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_closes_the_connection_ends_the_work(stream, address, asking):
    """As many leave as are served at once, each a reply that would take long: then it is another's turn."""
    body = {"model": "base", "prompt": "Who", "max_tokens": 8000, "temperature": 0, "stream": stream}

    def leave(number: int) -> None:
        asked = {"method": "POST", "url": f"{address}/v1/completions", "json": body, "timeout": 1}
        with suppress(httpx.ReadTimeout), httpx.stream(**asked) as answer:
            next(answer.iter_lines())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(4)))
    began = time.monotonic()
    asking.post("v1/completions", json=body | {"max_tokens": 1, "stream": False}).raise_for_status()
    assert time.monotonic() - began < 5


def test_a_hundred_visits_leave_nothing_behind(address, monkeypatch):
    """Guesses, picks, replies left in the middle: afterwards there are no more objects than before."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    visit = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))["visit"]

    def objects_after(seeds: range) -> int:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: visit(address, seed), seeds))
        time.sleep(0.2)
        gc.collect()
        return len(gc.get_objects())

    objects_after(range(30))
    counts = [objects_after(range(n, n + 30)) for n in range(30, 150, 30)]
    assert min(after - before for before, after in pairwise(counts)) < 15  # half an object a visit


# ---- What the page says is wrong


def test_runs_and_responses_of_different_worlds_are_named(tmp_path):
    folder = make_runs(tmp_path / "out")
    for address in serve(play.Options(runs=str(folder), port=0)):
        assert httpx.get(f"{address}/api/state").json()["note"] == ""
        write_json(folder / "base" / "run.json", {"stage": "train", "options": {"data": [], "seed": 3}})
        note = httpx.get(f"{address}/api/state").json()["note"]
        assert "base of 3" in note and "responses.jsonl of 0" in note


def test_what_is_damaged_is_left_out_and_named_and_the_rest_can_be_used(tmp_path):
    folder = make_runs(tmp_path / "out")
    shutil.copytree(folder / "sft", folder / "play" / "mine" / "ppo")
    for path in ("sft/run.json", "play/mine/ppo/config.json"):
        (folder / path).write_text("{ cut")
    (folder / "rlhf" / "responses.jsonl").write_text("{ cut\n{}\n")
    for address in serve(play.Options(runs=str(folder), port=0)):
        state = httpx.get(f"{address}/api/state").json()
        assert [run["name"] for run in state["runs"]] == ["base"]
        for path in ("sft/run.json: ", "play/mine/ppo/config.json: ", "rlhf/responses.jsonl, line 1: "):
            assert path in state["note"]
        asked = {"run": "base", "number": 0}
        assert httpx.post(f"{address}/api/guess", json=asked, timeout=60).is_success


@pytest.mark.parametrize("told", [{}, {"options": []}])
def test_a_run_json_that_tells_of_no_options_leaves_the_run_of_use(tmp_path, told):
    folder = make_runs(tmp_path / "out")
    write_json(folder / "base" / "run.json", {"stage": "train", **told})
    tale = tmp_path / "tale.txt"
    tale.write_text("The cat sat on the mat and then it went home to eat, and the dog came too.\n" * 20)
    for address in serve(play.Options(runs=str(folder), text=(str(tale),), port=0)):
        runs = httpx.get(f"{address}/api/state").json()["runs"]
        assert {"name": "base", "stage": "train", "world": None} in runs
        asked = {"run": "base", "number": 0}
        assert httpx.post(f"{address}/api/guess", json=asked, timeout=60).is_success


def test_too_little_memory_is_said_in_a_line(asking, monkeypatch):
    def reply(*_: object, **__: object) -> Iterator[dict]:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate memory")
        yield {}

    monkeypatch.setattr(app, "reply", reply)
    said = asking.post("api/chat", json={"run": "sft", "messages": [{"role": "user", "content": "Hi"}]}).text
    assert "error" in said and "not enough memory" in said and "fault of the server" not in said


# ---- Ranking


def test_a_ranking_is_on_the_disk_when_it_is_answered_and_an_old_window_changes_nothing(asking, runs):
    def rank(**fields: str) -> httpx.Response:
        return asking.post("api/rank", json={"name": "Ada", **fields})

    def kept() -> list:
        return [one for one in read_rankings(runs / "play" / "rankings.jsonl") if one.annotator == "Ada"]

    shown = rank().json()
    assert "scores" not in shown  # never before the pick
    answer = rank(key=shown["key"], action="B > A = D > C").json()
    assert len(answer["scores"]) == 4 and answer["done"] == 1
    (made,) = kept()
    best, tied, worst = made.ranking
    assert made.responses[best[0]] == shown["responses"][1]
    assert {made.responses[i] for i in tied} == {shown["responses"][0], shown["responses"][3]}
    assert made.responses[worst[0]] == shown["responses"][2]
    assert rank(key=shown["key"], action="A > B > C > D").status_code == 400  # it is another's turn
    assert rank(key=answer["key"], action="A > B").status_code == 400
    assert len(kept()) == 1
    assert rank(key="", action="undo").json()["key"] == shown["key"]
    assert kept() == []


def test_a_full_disk_refuses_a_ranking_and_loses_none(asking, runs, monkeypatch):
    """The limit on the size of files stands for the disk: a part of the line is written, the rest is not."""
    path = runs / "play" / "rankings.jsonl"

    def rank(**fields: str) -> httpx.Response:
        return asking.post("api/rank", json={"name": "Eve", **fields})

    first = rank(key=rank().json()["key"], action="A > B = C = D").json()
    before = path.read_bytes()
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        refused = rank(key=first["key"], action="A > B = C = D")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert refused.status_code == 400 and "free some space" in refused.json()["error"]
    assert path.read_bytes() == before
    assert rank(key=first["key"], action="B > A = C = D").json()["done"] == 2
    assert [one.annotator for one in read_rankings(path)].count("Eve") == 2


def test_a_server_that_is_killed_loses_no_ranking_and_leaves_no_training_behind(tmp_path):
    """The training notices, stops as by Ctrl-C, and can be continued; the next server finds all rankings."""
    folder = make_runs(tmp_path / "out")
    command = [sys.executable, "-m", "minillm.play", "--runs", str(folder), "--port", "0", "--auto"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        with httpx.Client(base_url=server.stdout.readline().split("/  ")[0], timeout=120) as client:
            shown = client.post("api/rank", json={"name": "Ada"}).json()
            while shown["done"] < 10:  # the tenth begins the training
                picked = {"name": "Ada", "key": shown["key"], "action": "A > B = C = D"}
                shown = client.post("api/rank", json=picked).json()
            with client.stream("GET", "api/train") as events:
                next(line for line in events.iter_lines() if '"of": "policy"' in line)
        server.kill()
    run = folder / "play" / "visit-1" / "ppo"
    with hold(run, wait=True):  # until the training has let it go
        steps = [event["step"] for event in read_metrics(run)]
    assert (run / "resume" / "state.safetensors").exists() and max(steps) < 20
    assert len(read_rankings(folder / "play" / "rankings.jsonl")) == 10
    for address in serve(play.Options(runs=str(folder), port=0)):
        assert httpx.get(f"{address}/api/state").json()["ranked"] == 10


STRUCK = """
import asyncio, os, signal, sys, threading
from contextlib import suppress
from urllib.request import urlopen
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from minillm.play.__main__ import Options, bind, serve
from minillm.tools.ending import one_line_errors

async def answer():
    yield "begun"
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        await asyncio.sleep(0.1)
    except KeyboardInterrupt:
        print("struck in the middle of an answer")
        raise
    yield "ended"

async def stream(request):
    return StreamingResponse(answer())

class Training:
    async def close(self):
        print("closed")

def ask(port):
    with suppress(OSError):
        print(urlopen(f"http://127.0.0.1:{port}/").read().decode(), flush=True)

with one_line_errors():
    listening = bind(Options(runs=".", port=0))
    visitor = threading.Thread(target=ask, args=listening.getsockname()[1:], daemon=True)
    visitor.start()
    try:
        asyncio.run(serve(Starlette(routes=[Route("/", stream)]), Training(), listening))
    finally:
        visitor.join()
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_after_the_answers_under_way_and_strikes_in_none(number):
    """Now and then Interrupted was raised between two lines of another library: a traceback."""
    command = [sys.executable, "-c", STRUCK, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert sorted(done.stdout.split()) == ["begunended", "closed"]
    assert (done.stderr, done.returncode) == ("interrupted\n", 128 + number)


def test_what_is_left_of_a_training_that_was_killed_goes_with_the_next_one(tmp_path, monkeypatch):
    """All but policies, which the page shows, and what a stage still works at. What is half taken away can be
    taken away, and nothing else can."""
    folder = make_runs(tmp_path / "out")
    visits = folder / "play"
    training = Training(Picking(Shelf(folder, torch.device("cpu"))), Worker(1), "cpu")
    for left in ("visit-1", "visit-2/reward", "visit-3/reward", "visit-4/reward", "kept/reward"):
        (visits / left).mkdir(parents=True)
    (visits / "visit-1" / "prompts.jsonl").touch()
    shutil.copytree(folder / "sft", visits / "visit-3" / "ppo")
    (visits / "visit-3" / "ppo" / "config.json").write_text("{ damaged")  # and yet somebody's policy
    monkeypatch.setattr(Training, "_run", lambda *_: asyncio.sleep(0))

    async def begin() -> str:
        return training.start(10)

    with hold(visits / "visit-4" / "reward", wait=False):
        assert asyncio.run(begin()) == "visit-1"
    assert {path.name for path in visits.glob("*/")} == {"visit-3", "visit-4", "kept"}
    (visits / "visit-3" / "reward").rmdir()
    training.undo("visit-3")
    assert not (visits / "visit-3").exists()
    for name in ("..", "", "visit-3", "rankings.jsonl"):
        with pytest.raises(InputError, match="no such run of a visit"):
            training.undo(name)


# ---- The command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "give a --token"),
        (["--token", "short"], "16 letters and digits"),
        (["--port", "70000"], "0 to 65535"),
        (["--together", "0"], "at least 1"),
        (["--runs", "nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(words, said, runs, capfd, monkeypatch):
    monkeypatch.chdir(runs)
    assert said in refusal(play, [*([] if "--runs" in words else ["--runs", "."]), *words], capfd)


def test_a_second_server_is_refused_in_one_line(address, runs, capfd):
    """On the port of the first, or on its runs."""
    for port, said in (
        (address.rpartition(":")[2], "give another --port"),
        ("0", "another process is writing"),
    ):
        assert said in refusal(play, ["--runs", str(runs), "--port", port], capfd)
