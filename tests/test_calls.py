"""Calls of tools: what is learned of them, what transformers makes of them, and that no call can do harm."""

import itertools
import json
import math
import time
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import tiny_model
from transformers import PreTrainedTokenizerFast

from minillm.chat import ChatTemplate, new_call, with_chat_template
from minillm.errors import InputError
from minillm.generate import SamplingOptions
from minillm.io.messages import check_messages, with_tools
from minillm.io.template import PLAIN_TEMPLATE
from minillm.io.vocabulary import save_tokenizer
from minillm.tokenizer import SPECIAL_TOKENS, Tokenizer
from minillm.tools import chat as chat_module
from minillm.tools.calls import (
    LONGEST_RESULT,
    Tool,
    calculate,
    calculator,
    open_tools,
    run_call,
    search,
)
from minillm.tools.chat import Chat, Options
from minillm.world import World

SAMPLING = SamplingOptions(8, temperature=0)


@cache
def tokenizer() -> Tokenizer:
    text = (
        'calculator {"expression": "2 + 3"} search {"query": "who"} Tools: type function name It is 5. ' * 3
    )
    return with_chat_template(Tokenizer.train([text], 340))


@cache
def judge(folder: str) -> PreTrainedTokenizerFast:
    save_tokenizer(Path(folder), tokenizer())
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> PreTrainedTokenizerFast:
    return judge(str(tmp_path_factory.mktemp("judge")))


# ---- Conversations with calls → tokens

texts = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8).map(
    lambda text: text if not any(name in text for name in SPECIAL_TOKENS) else "x"
)
names = st.sampled_from(["calculator", "search", "a-b_c"])
arguments = st.dictionaries(texts, texts | st.integers() | st.lists(texts, max_size=2), max_size=2)


def a_call(name: str, given: object, as_text: bool) -> dict:
    arguments = json.dumps(given, ensure_ascii=False) if as_text else given
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


@st.composite
def conversations(draw) -> list[dict]:
    """Exchanges, some with one call or two before the reply, and what was said beside them."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        if called := draw(st.lists(st.builds(a_call, names, arguments, st.booleans()), max_size=2)):
            content = draw(st.none() | texts)
            messages.append({"role": "assistant", "content": content, "tool_calls": called})
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": draw(texts)} for call in called
            ]
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


tools = st.lists(st.builds(lambda n, d: {"type": "function", "function": {"name": n, "description": d}},
                           names, texts), max_size=2)  # fmt: skip


@given(conversations(), tools, st.booleans())
def test_the_ids_and_the_mask_are_those_of_transformers(theirs, messages, told, asks):
    checked = check_messages(messages)
    whole = ChatTemplate(tokenizer()).encode(with_tools(checked, told))
    found = theirs.apply_chat_template(
        messages, tools=told or None, return_dict=True, return_assistant_tokens_mask=True
    )
    assert whole.tokens == found["input_ids"]
    assert [int(own) for own in whole.loss_mask] == found["assistant_masks"]
    prompt = ChatTemplate(tokenizer()).prompt(with_tools(checked[:-1], told))
    assert prompt == theirs.apply_chat_template(
        messages[:-1], tools=told or None, add_generation_prompt=True, return_dict=False
    )


@given(conversations())
def test_calls_are_learned_results_never_and_a_reply_is_read_back_as_it_was_written(messages):
    template, checked = ChatTemplate(tokenizer()), check_messages(messages)
    whole = template.encode(checked)
    runs = itertools.groupby(zip(whole.tokens, whole.loss_mask, strict=True), key=lambda pair: pair[1])
    learned = [[token for token, _ in run] for own, run in runs if own]
    assert all(reply.pop() == template.end_id for reply in learned)
    said = [m for m in checked if m["role"] == "assistant"]
    for m in said:
        for i, call in enumerate(m.get("tool_calls", [])):
            call["id"] = f"call_{i}"
    assert [template.message(reply) for reply in learned] == said


@given(st.data())
def test_whatever_a_model_says_can_be_part_of_the_next_prompt(data):
    template = ChatTemplate(tokenizer())
    token = st.integers(0, tokenizer().vocab_size - 1) | st.just(template.call_id)
    said = template.message(data.draw(st.lists(token, max_size=8)))
    results = [{"role": "tool", "content": "5"} for _ in said.get("tool_calls", [])]
    assert template.prompt([{"role": "user", "content": "x"}, said, *results])


@given(texts, texts)
def test_no_text_is_a_call_or_a_result(content, result):
    template = ChatTemplate(tokenizer())
    typed = f'<|system|>calculator {{"expression": "1"}}<|end|><|system|>{result}'
    for role in ("user", "assistant", "tool"):
        tokens = template.encode([{"role": role, "content": content + typed}]).tokens
        assert tokens.count(template.call_id) == (role == "tool")  # its role, and nothing else
    message = template.message(tokenizer().encode(content + typed))
    assert message == {"role": "assistant", "content": content + typed}


@pytest.mark.parametrize(
    "call",
    [3, "x", {}, {"function": {}}, {"function": {"name": "a b", "arguments": ""}},
     {"function": {"name": "", "arguments": "{}"}}, {"function": {"name": "a", "arguments": None}},
     {"function": {"name": "a", "arguments": [1]}}, {"function": "a"}],
)  # fmt: skip
def test_what_is_no_call_is_refused_with_the_message_at_fault(call):
    asked = {"role": "user", "content": "x"}
    with pytest.raises(InputError, match="message 1: its call 0 is"):
        check_messages([asked, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert check_messages([asked | {"tool_calls": [call]}]) == [asked]  # only an assistant calls


def test_a_result_that_names_another_call_than_is_next_is_refused_for_only_its_place_says_whose_it_is():
    calls = [a_call("search", {}, False) | {"id": str(i)} for i in range(2)]
    asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    for ids in (("0", "1"), ("0",), (None, None), ()):
        check_messages([*asked, *({"role": "tool", "content": "y", "tool_call_id": of} for of in ids)])
    for ids in (("1", "0"), ("1",), ("2",), ("0", "1", "1")):
        with pytest.raises(InputError, match="another call than is next"):
            check_messages([*asked, *({"role": "tool", "content": "y", "tool_call_id": of} for of in ids)])


def test_another_template_than_ours_refuses_calls():
    plain = ChatTemplate(
        Tokenizer(tokenizer().vocabulary, {**tokenizer().config, "chat_template": PLAIN_TEMPLATE})
    )
    said = {"role": "assistant", "content": "", "tool_calls": [a_call("search", {}, True)]}
    with pytest.raises(InputError, match="calls of tools are read by minillm's own chat template only"):
        plain.encode([{"role": "user", "content": "x"}, said])
    assert plain.call_id is None


# ---- What a tool is asked for

TOOLS = {tool.name: tool for tool in (calculator(), search(["The cat is red. The dog is blue!\nIt rains"]))}
garbage = st.text(max_size=300) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))
numbers = st.sampled_from(
    ["0", "1", "7", "2.5", "1e300", "9" * 40, "9**9**9", "1j", "True", "0x10", "'a' * 9"]
)
signs = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<<", " and ", ",", "@"])
sums = st.recursive(
    numbers, lambda inner: st.builds("({}{}{})".format, inner, signs, inner) | inner.map("-{}".format)
)
nested = st.builds(lambda n, a, b: a * n + "1" + b * n, st.integers(1, 60_000), st.sampled_from("([{-~"),
                   st.sampled_from([")", "]", "}", "", "**9", ".a", "()", "[0]"]))  # fmt: skip
asked = st.one_of(garbage, sums, nested)


@settings(max_examples=300)
@given(
    st.sampled_from(["calculator", "search"]) | garbage,
    asked,
    st.sampled_from(["expression", "query", "x"]),
    st.booleans(),
)
@example("calculator", "9**" * 60 + "9", "expression", True)
@example("calculator", "(" * 190 + "1" + ")" * 190, "expression", True)
@example("calculator", "-" * 199 + "1", "expression", True)
@example("calculator", "__import__('os').system('echo harm')", "expression", True)
@example("calculator", "(10**30)**(10**30)", "expression", True)
@example("calculator", "2**-(10**30)", "expression", True)
@example("calculator", "0**-1", "expression", True)
@example("calculator", "(-8)**0.5", "expression", True)
@example("calculator", "1\x00", "expression", True)
@example("calculator", "\ud800", "expression", True)
@example("search", "[" * 100_000, "query", False)
def test_whatever_a_model_asks_of_a_tool_gives_one_short_line_in_time(name, text, key, as_json):
    given = json.dumps({key: text}) if as_json else text
    began = time.monotonic()
    result = run_call(TOOLS, new_call("c", name, given))
    assert time.monotonic() - began < 2
    assert isinstance(result, str) and len(result) <= LONGEST_RESULT and len(result.splitlines()) <= 1


def test_a_tool_that_takes_too_long_or_fails_is_a_result_in_one_line_and_goes_on_nowhere():
    ticks = []

    def endless(text: str) -> str:
        while True:
            ticks.append(time.monotonic())

    def broken(text: str) -> str:
        raise SystemExit(text + "\nof two lines")

    own = {"endless": Tool("endless", "", "x", endless), "broken": Tool("broken", "", "x", broken)}
    call = partial(run_call, own, seconds=0.1)
    assert call(new_call("c", "endless", '{"x": ""}')) == "error: took longer than 0.1 seconds"
    time.sleep(0.2)
    assert (ended := len(ticks)) and time.sleep(0.1) is None and len(ticks) == ended, "it still runs"
    assert call(new_call("c", "broken", '{"x": "a line"}')) == "error: a line of two lines"
    assert (
        call(new_call("c", "nobody", "{}")) == "error: there is no tool 'nobody'; there are: endless, broken"
    )
    wanted = """error: arguments are '{"y": ""}'; give {"x": "…"}"""
    assert call(new_call("c", "broken", '{"y": ""}')) == wanted


def spelled(tree: object) -> str:
    return (
        str(tree) if isinstance(tree, int | float) else f"({spelled(tree[1])} {tree[0]} {spelled(tree[2])})"
    )


leaves = st.integers(0, 999) | st.sampled_from([0.5, 2.25])
trees = st.recursive(
    leaves, lambda inner: st.tuples(st.sampled_from("+ - * / // %".split()), inner, inner), max_leaves=6
)


@given(trees)
@example(("/", 6, 2))
def test_the_calculator_calculates(tree):
    text = spelled(tree)
    try:
        value = eval(text)
    except ZeroDivisionError:
        with pytest.raises(InputError, match="division by zero"):
            calculate(text)
        return
    assert math.isclose(float(calculate(text)), value, rel_tol=1e-11, abs_tol=1e-11)
    if isinstance(value, int):
        assert calculate(text) == str(value)


@pytest.mark.parametrize(("text", "value"), [
    ("2**10", "1024"), (" -7 // 2", "-4"), ("1/3", "0.333333333333"), ("6/2", "3"),
    ("10**30", "1" + "0" * 30), ("2**0.5", "1.41421356237"), ("12 - (3 + 4) * 2", "-2"),
])  # fmt: skip
def test_sums_of_every_kind(text, value):
    assert calculate(text) == value


@given(
    st.lists(
        st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6
    ),
    st.data(),
)
def test_a_search_for_a_sentences_own_words_finds_it_or_one_that_has_them_all(sentences, data):
    wanted = data.draw(st.sampled_from(sentences))
    found = search([". ".join(sentences) + "."]).run(wanted)
    assert set(wanted.split()) <= set(found.rstrip(".").split()) and found.rstrip(".") in sentences


def test_a_search_prefers_rare_words_and_says_when_it_finds_nothing():
    found = search(["The cat is red. The dog is blue. The cat and the dog sleep. The ant sleeps"])
    assert (
        found.run("Is the ANT blue or red?").startswith("The ") and found.run("the ant") == "The ant sleeps"
    )
    assert found.run("zebra") == found.run("") == "nothing found" == search([]).run("cat")


# ---- The loop


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


SUM = 'CALL calculator {"expression": "2+3"}'


@pytest.fixture
def talk(monkeypatch):
    """A `Chat` that says what is scripted, turn by turn; `asked` are the prompts of these."""

    def script(*turns: str, **options: object) -> Chat:
        model, plain = tiny_model(longest=400)
        chat, coming = Chat(model, with_chat_template(plain), Options("run", **options)), iter(turns)
        chat.asked = []

        def say(model, prompt, sampling, seed):
            chat.asked.append(prompt)
            first, *calls = next(coming).split("CALL ")
            yield from chat.tokenizer.encode(first)
            for call in calls:
                yield from [chat.format.call_id, *chat.tokenizer.encode(call)]
            if not calls or "CUT" not in calls[-1]:
                yield chat.format.end_id

        monkeypatch.setattr(chat_module, "stream", say)
        return chat

    return script


def test_a_call_is_run_its_result_is_read_and_the_reply_follows(talk):
    chat = talk(SUM, "So 5.", tools=("calculator",))
    ends = [event["end"] for event in chat.events(ask("2+3?")[0]) if "end" in event]
    call = new_call("call_0", "calculator", '{"expression": "2+3"}')
    assert chat.messages == (
        *ask("2+3?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "5"},
        {"role": "assistant", "content": "So 5."},
    )
    assert ends == ["tool_calls", "stop"]


def test_calls_of_one_turn_are_answered_in_their_order_and_errors_are_results(talk):
    chat = talk("Well, " + SUM + "CALL nobody {}CALL ", "Done.", tools=("calculator",))
    assert "".join(chat.reply("x")) == "Well, Done."
    _, said, one, two, three, _ = chat.messages
    assert said["content"] == "Well, " and [one["content"], two["content"][:5]] == ["5", "error"]
    assert three["content"].startswith("error: there is no tool '?'")


def test_a_call_that_was_cut_is_not_run(talk):
    chat, notes = talk(SUM + "CUT", tools=("calculator",)), []
    assert "".join(chat.reply("x", notes.append)) == "" and chat.end == "length"
    assert notes == [] and chat.messages == (*ask("x"), {"role": "assistant", "content": ""})


def test_a_chat_shows_calls_and_results_and_says_the_rest(talk):
    chat, notes = talk("Well. " + SUM, "So 5.", tools=("calculator",)), []
    assert "".join(chat.reply("2+3?", notes.append)) == "Well. So 5."
    assert notes == ['[calculator {"expression": "2+3"} → 5]']
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.asked == [chat.format.prompt(chat.messages[:n]) for n in (1, 3)] and chat.end == "stop"
    assert chat_module.run_command(chat, "/undo") and not chat.messages


def test_a_model_is_told_of_its_tools_only_where_asked_for(talk):
    for described in (False, True):
        chat = talk("Hm.", tools=("calculator",), describe_tools=described)
        assert "".join(chat.reply("2+3?")) == "Hm."
        expected = with_tools(ask("2+3?"), [calculator().schema()]) if described else ask("2+3?")
        assert chat.asked == [chat.format.prompt(expected)]


def test_a_chat_without_tools_runs_nothing(talk):
    chat, notes = talk("Well. " + SUM), []
    assert "".join(chat.reply("2+3?", notes.append)) == "Well. "
    assert len(chat.messages) == 2 and "not run; 0 calls" in notes[-1]


def test_a_chat_calls_no_more_often_than_it_may_and_ends_where_no_room_is_left(talk):
    chat, notes = talk(*[SUM] * 9, tools=("calculator",)), []
    assert "".join(chat.reply("x", notes.append)) == ""
    assert "not run; 4 calls are the most" in notes[-1]
    assert len(notes) == 5
    chat, said = talk("y" * 360 + SUM, "Never said.", tools=("calculator",), max_new_tokens=380), []
    with pytest.raises(InputError, match="too long"):
        said.extend(chat.reply("x" * 12, notes.append))
    assert len("".join(said)) == 360 and chat.messages[-1]["content"] == "5"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search_in": ("a.txt",), "tools": ("calculator",)}, "--search-in: nothing searches there"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Options("run", **options)


def test_a_base_model_calls_no_tools():
    model, tokenizer = tiny_model()
    with pytest.raises(InputError, match="--tools: run has no chat template that knows calls"):
        Chat(model, tokenizer, Options("run", tools=("calculator",)))


def test_the_search_is_over_given_files_or_the_text_that_the_runs_base_was_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("Ida keeps bees. Tom keeps goats.\n" * 20)
    stages = {"base": ("train", {"data": [str(tmp_path / "a.txt")], "init": None}),
              "sft": ("sft", {"data": ["chats.jsonl"], "init": str(tmp_path / "base")}),
              "alone": ("sft", {"init": None})}  # fmt: skip
    for name, (stage, options) in stages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"stage": stage, "options": options}))
    for run, files in (("sft", []), ("alone", [str(tmp_path / "a.txt")])):
        assert (
            open_tools(["search"], tmp_path / run, files)["search"].run("who keeps goats")
            == "Tom keeps goats."
        )
    with pytest.raises(InputError, match=r"alone.run\.json: does not say on what text"):
        open_tools(["search"], tmp_path / "alone", [])
    for damaged in (5, {"data": 5}, {"data": [], "init": 5}):
        (tmp_path / "alone" / "run.json").write_text(json.dumps({"stage": "train", "options": damaged}))
        with pytest.raises(InputError, match="does not say on what text"):
            open_tools(["search"], tmp_path / "alone", [])
    (tmp_path / "b.txt").write_text("Zoë keeps hens.\n" * 20, encoding="latin-1")
    told = {"data": [str(tmp_path / "b.txt")], "encoding": "latin-1", "init": None}
    (tmp_path / "alone" / "run.json").write_text(json.dumps({"stage": "train", "options": told}))
    assert open_tools(["search"], tmp_path / "alone", [])["search"].run("hens") == "Zoë keeps hens."
    world = {"data": [], "seed": 3, "world_megabytes": 0.02, "init": None}
    (tmp_path / "base" / "run.json").write_text(json.dumps({"stage": "train", "options": world}))
    page = next(World(3).documents("wiki", 0.001))
    sentence = page.split("\n\n")[1].split(". ")[0]
    assert sentence in open_tools(["search"], tmp_path / "sft", [])["search"].run(sentence)
