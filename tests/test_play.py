"""The page: its parts in a real browser, OpenAI's API by its own client, the queue, and who is let in."""

import asyncio
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from runs import ROOT

from minillm.chat import with_chat_template
from minillm.files import write_json
from minillm.generate import stream_text
from minillm.io.huggingface import save_model, save_scalar_model
from minillm.io.rankings import read_rankings
from minillm.model import LanguageModel, config_of_depth, initialize, scalar_from_language_model
from minillm.play import __main__ as play
from minillm.play import training
from minillm.play.shelf import Shelf, until
from minillm.play.words import kinds_of_tokens, likeliest_words
from minillm.play.worker import Worker
from minillm.tokenizer import Tokenizer
from minillm.world import World

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOKEN = "a" * 20


def make_runs(folder: Path) -> Path:
    """What the demo leaves, in small: base model, assistant, reward model, all untrained, and responses."""
    world = World(0)
    prompts = world.prompts("reward", n=24)
    text = [prompt.messages[-1]["content"] for prompt in world.prompts("train", n=200)]
    plain = Tokenizer.train(text, 400)
    model = LanguageModel(config_of_depth(1, plain.vocab_size, 160))
    initialize(model, torch.Generator().manual_seed(0))
    save_model(folder / "base", model, plain)
    options = {"world_megabytes": 0.3, "val_fraction": 0.2, "seed": 0}
    write_json(folder / "base" / "run.json", {"stage": "train", "options": options})
    chatty = with_chat_template(plain)
    save_model(folder / "sft", model, chatty)
    write_json(folder / "sft" / "run.json", {"stage": "sft", "options": {}})
    reward = scalar_from_language_model(model, torch.Generator().manual_seed(1))
    save_scalar_model(folder / "rlhf" / "reward", reward, chatty)
    lines = [
        {
            "messages": p.messages,
            "kind": p.kind,
            "world": 0,
            "responses": ["No.", f"Yes {i}, of course.", "", "<b>hm</b>"],
        }
        for i, p in enumerate(prompts)
    ]
    (folder / "rlhf" / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = folder / "compare" / "compare.html"
    compared.parent.mkdir()
    compared.write_text("<!doctype html><html lang=en><title>Compared</title><p>Three models</p></html>")
    lesson = {"lesson": "06_a", "claim": "A <b>claim</b>.", "verdict": "holds", "sentence": "50% → 8%"}
    write_json(folder / "lessons" / "06_a.json", lesson)
    Figure().savefig(folder / "lessons" / "06_a.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return make_runs(tmp_path_factory.mktemp("page") / "out")


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    yield from serve(play.Options(runs=str(runs), port=0))


def serve(options: play.Options) -> Iterator[str]:
    """The server in a thread."""
    listening = play.bind(options)
    port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(play.build(options, port)[0], log_level="critical", lifespan="off")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = server.force_exit = True
    thread.join(20)


# ---- Words


def test_the_likeliest_words_have_the_probabilities_of_all_their_spellings_in_tokens(runs):
    """Each found word is spelled in all ways that tokens allow; none of the words of one token, or of a space
    and one, is more probable."""
    model, tokenizer = Shelf(runs, torch.device("cpu")).model("base")
    begins, goes_on = kinds_of_tokens(tokenizer)
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
    found = list(until(texts, stops))
    # Two stops may end in one piece: then the one that begins first cuts. Else the first that is complete.
    said = "".join(text for text, _ in found)
    assert whole.startswith(said) and not any(stop in said for stop in stops)
    assert any(stopped for _, stopped in found) == bool(places)
    assert bool(places) or said == whole


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


def test_elsewhere_a_token_opens_and_a_cookie_remembers_it(runs):
    with httpx.Client() as client:
        for address in serve(play.Options(runs=str(runs), port=0, host="0.0.0.0", token=TOKEN)):
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = (
    "run number temperature name key action messages seed model prompt stop max_tokens logprobs stream what "
    "new top_p"
)
fields = st.sampled_from(names.split())
objects = st.dictionaries(fields, json_values, max_size=5).map(lambda fields: json.dumps(fields).encode())


@settings(max_examples=60)
@given(
    path=st.sampled_from(["guess", "rank", "chat", "change", "v1/completions", "v1/chat/completions"]),
    body=st.binary(max_size=20)
    | st.dictionaries(fields, json_values, max_size=5).map(lambda d: json.dumps(d).encode()),
)
@example(path="v1/chat/completions", body=b'{"model": "sft", "messages": [1]}')
@example(path="v1/chat/completions", body=b'{"model": "sft", "messages": []}')
@example(path="v1/completions", body=b'{"model": "base", "prompt": "a", "max_tokens": -1}')
@example(path="v1/completions", body=b'{"model": "base", "prompt": "a", "temperature": NaN}')
@example(path="v1/completions", body=b'{"model": "base", "prompt": "a", "seed": 99999999999999999999999}')
@example(path="guess", body=b'{"run": "../sft", "number": -1}')
@example(path="guess", body=b'{"run": "base", "number": 1, "temperature": 1e-30}')
@example(path="rank", body=b'{"name": "", "action": "A"}')
@example(path="change", body=b'{"what": "undo", "name": "../rlhf"}')
def test_garbage_is_refused_in_a_line_and_never_a_fault(path, body, address):
    url = f"{address}/{path}" if path.startswith("v1") else f"{address}/api/{path}"
    answer = httpx.post(url, content=body, timeout=60)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        line = answer.json()["error"]
        assert "fault" not in str(line) and "\n" not in str(line)


# ---- OpenAI's API


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


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
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
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


# ---- Ranking


def test_a_ranking_is_on_the_disk_when_it_is_answered_and_an_old_window_changes_nothing(address, runs):
    def rank(**fields: str) -> httpx.Response:
        return httpx.post(f"{address}/api/rank", json={"name": "Ada", **fields}, timeout=60)

    def kept() -> list:
        return [one for one in read_rankings(runs / "play" / "rankings.jsonl") if one.annotator == "Ada"]

    shown = httpx.get(f"{address}/api/rank?name=Ada").json()
    answer = rank(key=shown["key"], action="B > A = D > C").json()
    assert len(answer["scores"]) == 4
    (made,) = kept()
    best, tied, worst = made.ranking
    assert made.responses[best[0]] == shown["responses"][1]
    assert {made.responses[i] for i in tied} == {shown["responses"][0], shown["responses"][3]}
    assert made.responses[worst[0]] == shown["responses"][2]
    assert rank(key=shown["key"], action="A > B > C > D").status_code == 400  # it is another's turn
    assert (
        rank(key=httpx.get(f"{address}/api/rank?name=Ada").json()["key"], action="A > B").status_code == 400
    )
    assert len(kept()) == 1
    assert rank(key="", action="undo").is_success
    assert kept() == []
    assert httpx.get(f"{address}/api/rank?name=Ada").json()["key"] == shown["key"]


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
    with pytest.raises(SystemExit) as stop:
        play.main([*([] if "--runs" in words else ["--runs", "."]), *words])
    line = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and said in line and "\n" not in line


def test_a_port_that_is_taken_is_refused_in_one_line(runs, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        play.main(["--runs", str(runs), "--port", str(taken.getsockname()[1])])
    assert "give another --port" in capfd.readouterr().err


# ---- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[390, 1280])
def page(browser, request, address) -> Iterator:
    """A window; after each test nothing was wrong in it, nothing is wider than it, nobody is shut out."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": request.param, "height": 900})
    opened, wrong = context.new_page(), []
    opened.set_default_timeout(60_000)
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(address)
    yield opened
    assert wrong == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= request.param
    found = Axe().run(opened).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    context.close()


def visible(page, text: str):
    return page.get_by_text(re.compile(text)).locator("visible=true").first


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_word_is_guessed(page, by):
    page.locator("#guess-choices button").first.wait_for()
    if by == "mouse":
        page.locator("#guess-choices button").nth(1).click()
    else:
        page.keyboard.press("2")
    visible(page, "The model's first guess was").wait_for()
    assert page.locator("#guess-bars .truth").count() >= 2
    assert page.locator("#guess-you").inner_text() in ("0 of 1", "1 of 1")
    bars = page.locator("#guess-bars").inner_text()
    page.locator("#guess-temperature").fill("2")
    page.wait_for_function("before => document.querySelector('#guess-bars').innerText != before", arg=bars)
    (page.locator("#guess-next").click if by == "mouse" else lambda: page.keyboard.press("n"))()
    page.locator("#guess-typed").fill("zebra")
    page.keyboard.press("Enter")
    visible(page, "You said “zebra”, wrong").wait_for()
    assert page.locator("#guess-it").inner_text().endswith("of 2")


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_the_better_response_is_picked_and_taken_back(page, by, runs):
    page.goto(f"{page.url.partition('#')[0]}#pick")
    name = f"{by}{page.viewport_size['width']}"
    page.locator("#pick-name").fill(name)
    page.keyboard.press("Tab")
    visible(page, f"0 of 24 ranked by {name}").wait_for()

    def press(key: str, button: str) -> None:
        if by == "mouse":
            page.locator(button).click()
        else:
            page.evaluate("document.activeElement.blur()")
            page.keyboard.press(key)

    press("1", "#pick-responses li:nth-child(1) button")
    visible(page, f"1 of 24 ranked by {name}").wait_for()
    page.locator("#pick-candy").wait_for()
    assert page.locator("#pick-scores .bar").count() == 4
    page.locator("#pick-all").check()
    for number in (3, 1, 2, 4):
        press(str(number), f"#pick-responses li:nth-child({number}) button")
    press("Enter", "#pick-send")
    visible(page, f"2 of 24 ranked by {name}").wait_for()
    press("u", "#pick-undo")
    visible(page, f"1 of 24 ranked by {name}").wait_for()
    press("s", "#pick-skip")
    visible(page, "1 skipped").wait_for()
    made = [one for one in read_rankings(runs / "play" / "rankings.jsonl") if one.annotator == name]
    assert len(made) == 1 and [len(tied) for tied in made[0].ranking] == [1, 3]


def test_what_a_model_writes_is_never_markup(page):
    page.goto(f"{page.url.partition('#')[0]}#pick")
    visible(page, "<b>hm</b>").wait_for()
    assert page.locator("b").count() == 0


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_models_answer_side_by_side_and_say_how_sure_they_were(page, by):
    page.goto(f"{page.url.partition('#')[0]}#chat")
    page.locator("#chat-columns > div").nth(1).wait_for()
    page.locator("#chat-text").fill("Who are you?")
    if by == "mouse":
        page.get_by_role("button", name="Send").click()
    else:
        page.keyboard.press("Enter")
    page.locator("#chat-stop").wait_for(state="hidden")
    for number in (0, 1):
        page.locator("#chat-columns > div").nth(number).locator(".token").first.wait_for()
    token = page.locator("#chat-columns .token").first
    (token.hover if by == "mouse" else token.focus)()
    visible(page, "had .*%; most probable here").wait_for()


def test_results_are_shown(page):
    page.goto(f"{page.url.partition('#')[0]}#results")
    page.frame_locator("iframe").get_by_text("Three models").wait_for()
    visible(page, "A <b>claim</b>.").wait_for()
    visible(page, "holds: 50% → 8%").wait_for()
    picture = page.get_by_role("img", name="lesson 06_a")
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


@pytest.mark.parametrize("name", ["07_none", "..%2f06_a", "06_a.png%00", "..%5c..%5csft"])
def test_only_pictures_of_lessons_are_shown_as_such(name, address):
    assert httpx.get(f"{address}/lessons/{name}.png").status_code in (400, 404)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_ten_picks_train_a_policy_whose_answers_change_and_which_can_be_kept_downloaded_and_removed(
    browser, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Ten steps of the usual size change too little in a model that knows nothing.
    monkeypatch.setattr(training, "POLICY", f"{training.POLICY} --policy-rate 0.02")
    folder = make_runs(tmp_path / "out")
    for address in serve(play.Options(runs=str(folder), port=0)):
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/#train")
        visible(page, "0 picks so far; pick 10 more").wait_for()
        page.goto(f"{address}/#pick")
        for done in range(10):
            visible(page, f"{done} of 24 ranked").wait_for()
            page.keyboard.press("2")
        visible(page, "10 of 24 ranked").wait_for()
        page.goto(f"{address}/#train")
        visible(page, "10 picks to learn from").wait_for()
        page.locator("#train-iterations").fill("10")
        page.locator("#train-start").click()
        page.locator("#train-answers > div").nth(4).wait_for()
        assert page.locator("#train-answers > div").count() == 5
        visible(page, "Done in").wait_for()
        assert page.locator("#train-answers .good").count() > 0, "no answer has changed"
        assert page.locator("#train-plots svg").count() == 3
        with page.expect_download() as download:
            page.locator("#train-export").click()
        assert Path(download.value.path()).stat().st_size > 1000
        page.locator("#train-name").fill("mine")
        page.locator("#train-keep").click()
        visible(page, "Kept as play/mine").wait_for()
        assert httpx.get(f"{address}/v1/models").text.count("play/mine/ppo") == 1
        page.close()
        assert httpx.post(f"{address}/api/change", json={"what": "undo", "name": "mine"}).is_success
        assert not (folder / "play" / "mine").exists()


def test_where_nothing_is_yet_the_page_says_how_to_make_it(browser, tmp_path):
    for address in serve(play.Options(runs=str(tmp_path), port=0)):
        page = browser.new_page()
        for part, said in (
            ("guess", "run make demo"),
            ("pick", "no responses"),
            ("chat", "make demo"),
            ("results", "no comparison"),
        ):
            page.goto(f"{address}/#{part}")
            page.reload()
            page.get_by_role("alert").get_by_text(re.compile(said)).wait_for()
        page.close()
