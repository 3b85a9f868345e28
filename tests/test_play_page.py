"""The page in a real browser: each part by mouse and by keyboard, on a phone and a desk, light and dark."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from runs import ROOT
from served import a_model_that_calls, make_runs, serve

from minillm.io.rankings import read_rankings
from minillm.io.vocabulary import load_tokenizer
from minillm.play import __main__ as play
from minillm.play import training

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


WINDOWS = {"mouse": (390, "dark"), "keyboard": (1280, "light")}
"""The width of a window and how the machine is set: a phone in the dark, a desk in the light."""


@contextmanager
def window(browser, address: str, width: int, scheme: str) -> Iterator:
    """A window; at its end nothing was wrong in it, nothing is wider than it, nobody is shut out."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, wrong = context.new_page(), []
    opened.set_default_timeout(120_000)
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(address)
    yield opened
    assert wrong == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(opened).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    context.close()


@pytest.fixture(params=["mouse", "keyboard"])
def by(request) -> str:
    return request.param


@pytest.fixture
def page(browser, by, address) -> Iterator:
    with window(browser, address, *WINDOWS[by]) as opened:
        yield opened


def visible(page, text: str):
    return page.get_by_text(re.compile(text)).locator("visible=true").first


def press(page, by: str, name: str) -> None:
    """A button or a link, by a click or by Enter where the Tab key leads."""
    named = [page.get_by_role(role, name=name, exact=True) for role in ("button", "link")]
    found = named[0].or_(named[1])
    if by == "mouse":
        found.click()
        return
    for _ in range(60):
        page.keyboard.press("Tab")
        if found.evaluate("element => element === document.activeElement"):
            page.keyboard.press("Enter")
            return
    raise AssertionError(f"the Tab key does not lead to {name}")


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
    for value in ("1.8", "1.9", "2"):  # quicker than the model
        page.locator("#guess-temperature").fill(value)
    assert page.locator("#guess-temperature-shown").inner_text() == "2.0"
    page.wait_for_function("before => document.querySelector('#guess-bars').innerText != before", arg=bars)
    (page.locator("#guess-next").click if by == "mouse" else lambda: page.keyboard.press("n"))()
    page.locator("#guess-typed").fill("zebra")
    page.keyboard.press("Enter")
    visible(page, "You said “zebra”, wrong").wait_for()
    assert page.locator("#guess-it").inner_text().endswith("of 2")


def test_a_question_that_comes_late_does_not_undo_a_guess(browser, address):
    """Whoever goes to and fro while the first question loads has asked for two."""
    page, held = browser.new_page(), []

    def hold(route) -> None:
        held.append(route) if len(held) == 0 else route.continue_()

    page.route("**/api/guess", hold)
    page.goto(address)
    page.goto(f"{address}/#results")
    page.goto(f"{address}/#guess")
    page.locator("#guess-choices button").first.click()
    visible(page, "The model's first guess was").wait_for()
    with page.expect_response("**/api/guess"):
        held[0].continue_()
    page.wait_for_timeout(300)
    assert page.locator("#guess-next").is_visible() and page.locator("#guess-form").is_hidden()
    page.close()


def test_the_better_response_is_picked_and_taken_back(page, by, runs):
    page.goto(f"{page.url.partition('#')[0]}#pick")
    page.locator("#pick-name").fill(by)
    page.keyboard.press("Tab")
    visible(page, f"0 of 24 ranked by {by}").wait_for()

    def press(key: str, button: str) -> None:
        if by == "mouse":
            page.locator(button).click()
        else:
            page.evaluate("document.activeElement.blur()")
            page.keyboard.press(key)

    press("1", "#pick-responses li:nth-child(1) button")
    visible(page, f"1 of 24 ranked by {by}").wait_for()
    page.locator("#pick-candy").wait_for()
    assert page.locator("#pick-scores .bar").count() == 4
    page.locator("#pick-all").check()
    for number in (3, 1, 2, 4):
        press(str(number), f"#pick-responses li:nth-child({number}) button")
        if number == 1:  # the key for a tie, which is said until the next is named
            page.keyboard.press("=")
            visible(page, "as a tie at place 2").wait_for()
    assert page.locator("#pick-pending").inner_text() == ""
    press("Enter", "#pick-send")
    visible(page, f"2 of 24 ranked by {by}").wait_for()
    made = read_rankings(runs / "play" / "rankings.jsonl")[-1]
    assert (made.annotator, [len(tied) for tied in made.ranking]) == (by, [1, 2, 1])
    press("u", "#pick-undo")
    visible(page, f"1 of 24 ranked by {by}").wait_for()
    press("s", "#pick-skip")
    visible(page, "1 skipped").wait_for()
    made = [one for one in read_rankings(runs / "play" / "rankings.jsonl") if one.annotator == by]
    assert len(made) == 1 and [len(tied) for tied in made[0].ranking] == [1, 3]


def test_the_focus_is_never_lost_where_responses_are_picked(browser, address):
    """A screen reader reads the next prompt, too, and how far one is."""
    page = browser.new_page()
    page.goto(address)
    press(page, "keyboard", "2 Pick")
    page.locator("#pick-title:focus").wait_for()
    page.locator("#pick-name").fill("Tabitha")
    press(page, "keyboard", "Best: response 2")
    visible(page, "1 of 24 ranked by Tabitha").wait_for()
    page.locator("[aria-label='Best: response 2']:focus").wait_for()
    page.locator("#pick-all").check()
    for number in (3, 1, 2, 4):
        press(page, "keyboard", f"Next best: response {number}")
    page.locator("#pick-send:focus").wait_for()
    page.keyboard.press("Enter")
    visible(page, "2 of 24 ranked by Tabitha").wait_for()
    page.locator("[aria-label='Next best: response 1']:focus").wait_for()
    page.locator("[aria-live]").filter(has_text="2 of 24").wait_for()
    assert page.locator("#pick-messages").get_attribute("aria-live") == "polite"
    page.close()


def test_what_a_model_writes_is_never_markup(page):
    page.goto(f"{page.url.partition('#')[0]}#pick")
    visible(page, "<b>hm</b>").wait_for()
    assert page.locator("b").count() == 0


def test_models_answer_side_by_side_and_say_how_sure_they_were(page, by):
    page.goto(f"{page.url.partition('#')[0]}#chat")
    page.locator("#chat-columns > div").nth(1).wait_for()
    visible(page, "Nothing is said yet").wait_for()
    page.locator("#chat-text").fill("Who are you?")
    if by == "mouse":
        page.get_by_role("button", name="Send").click()
    else:
        page.keyboard.press("Enter")
    visible(page, "All have answered").wait_for()
    for number in (0, 1):
        page.locator("#chat-columns > div").nth(number).locator(".token").first.wait_for()
    token = page.locator("#chat-columns .token").first
    (token.hover if by == "mouse" else token.focus)()
    visible(page, "had .*%; most probable here").wait_for()
    if by == "keyboard":  # the arrows lead through a reply, the Tab key to the next
        page.keyboard.press("ArrowRight")
        assert page.locator(".token:focus").evaluate("one => one.previousElementSibling.matches('.token')")
        page.keyboard.press("Tab")
        page.locator("[data-run=sft] .token:focus").wait_for()


def test_calls_of_tools_are_run_and_shown_with_their_results(page, runs):
    page.goto(f"{page.url.partition('#')[0]}#chat")
    page.get_by_label("base", exact=True).uncheck()
    with a_model_that_calls(load_tokenizer(runs / "sft")):
        assert "several" not in page.locator("#chat").inner_text()
        for _ in range(2):  # what was called stays part of the talk
            page.locator("#chat-text").fill("2+3?")
            page.keyboard.press("Enter")
            visible(page, r"calculator \{.expression.: .2\+3.\} → 5").wait_for()
            visible(page, "It is 5").wait_for()
            page.locator("#chat-stop").wait_for(state="hidden")
            visible(page, "It has answered").wait_for()


def test_results_are_shown(page, by):
    press(page, by, "5 Results")
    page.frame_locator("iframe").get_by_text("Three models").wait_for()
    visible(page, "A <b>claim</b>.").wait_for()
    visible(page, "holds: 50% → 8%").wait_for()
    picture = page.get_by_role("img", name="lesson 06_a")
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_ten_picks_train_a_policy_whose_answers_change(by, browser, tmp_path, monkeypatch):
    """By mouse to the end, then kept and downloaded; by keyboard stopped after a change, and removed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Ten steps of the usual size change too little in a model that knows nothing.
    monkeypatch.setattr(training, "POLICY", f"{training.POLICY} --policy-rate 0.02")
    folder = make_runs(tmp_path / "out")
    for address in serve(play.Options(runs=str(folder), port=0)):
        with window(browser, address, *WINDOWS[by]) as page:
            press(page, by, "3 Train")
            visible(page, "Picks so far: 0").wait_for()
            press(page, by, "2 Pick")
            for done in range(10):
                visible(page, f"{done} of 24 ranked").wait_for()
                if by == "mouse":
                    page.get_by_label("Best: response 2").click()
                else:
                    page.keyboard.press("2")
            visible(page, "10 of 24 ranked").wait_for()
            press(page, by, "3 Train")
            visible(page, "10 picks to learn from").wait_for()
            page.locator("#train-iterations").fill("10" if by == "mouse" else "1000")
            press(page, by, "Train")
            page.locator("#train-state:focus").wait_for()
            page.locator("#train-answers > div").nth(4).wait_for()
            assert page.locator("#train-answers > div").count() == 5
            visible(page, r"iteration \d+ of").wait_for()  # shown, and not read aloud
            assert "iteration" not in page.locator("#train [aria-live]").inner_text()
            page.locator("#train-answers .good").first.wait_for()
            if by == "keyboard":
                press(page, by, "Stop and keep what is learned")
            visible(page, "Done in" if by == "mouse" else "Stopped").wait_for()
            page.locator("#train-plots svg").nth(2).wait_for()
            if by == "keyboard":
                press(page, by, "Undo: remove it")
                visible(page, "It is gone").wait_for()
                page.locator("#train-state:focus").wait_for()
                assert not (folder / "play" / "visit-1").exists()
                continue
            with page.expect_download() as download:
                page.locator("#train-export").click()
            assert Path(download.value.path()).stat().st_size > 1000
            visible(page, "Talk with it").wait_for()
            page.locator("#train-name").fill("mine")
            press(page, by, "Keep under this name")
            visible(page, "Kept as play/mine").wait_for()
            assert httpx.get(f"{address}/v1/models").text.count("play/mine/ppo") == 1
            assert httpx.post(f"{address}/api/change", json={"what": "undo", "name": "mine"}).is_success
            assert not (folder / "play" / "mine").exists()


def test_where_nothing_is_yet_the_page_says_how_to_make_it_and_offers_nothing_else(browser, tmp_path):
    for address in serve(play.Options(runs=str(tmp_path), port=0)):
        page = browser.new_page()
        for part, said in (
            ("guess", "run make demo"),
            ("pick", "no responses"),
            ("train", "no responses"),
            ("chat", "make demo"),
            ("results", "no comparison"),
        ):
            page.goto(f"{address}/#{part}")
            page.reload()
            page.get_by_role("alert").get_by_text(re.compile(said)).wait_for()
            assert page.locator("main button:visible, main input:visible").count() == 0
        page.close()


def test_what_is_wrong_with_a_model_is_seen_on_a_phone_and_another_can_be_chosen(browser, tmp_path):
    """However long the path of its folder is, and however far down the page."""
    folder = make_runs(tmp_path / ("long" * 20) / "out")
    os.truncate(folder / "sft" / "model.safetensors", 1000)
    for address in serve(play.Options(runs=str(folder), port=0)):
        page = browser.new_page(viewport={"width": 390, "height": 400})
        page.goto(address)
        page.locator("#guess-choices button").first.wait_for()
        page.locator("#guess-run").select_option("sft")
        visible(page, "damaged: restore it").wait_for()
        page.locator("#guess-form").wait_for(state="hidden")
        page.locator("#guess-run").select_option("base")
        page.locator("#guess-choices button").first.click()
        visible(page, "The model's first guess was").wait_for()
        page.goto(f"{address}/#chat")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("alert").get_by_text("damaged: restore it").wait_for()
        page.locator("[data-run=sft]").get_by_text("damaged: restore it").wait_for()
        visible(page, "Not all have answered").wait_for()
        assert page.locator("#trouble").bounding_box()["y"] > -1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()
