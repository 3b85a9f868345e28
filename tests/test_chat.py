"""The conversation as a value, its commands, and the real thing in a terminal."""

import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import ROOT

from minillm.chat import with_chat_template
from minillm.errors import InputError
from minillm.generate import SamplingOptions, generate
from minillm.io.huggingface import save_model
from minillm.model import LanguageModel, ModelConfig
from minillm.tokenizer import Tokenizer
from minillm.tools import chat as chat_module
from minillm.tools.chat import HELP, Chat, Options, main, run_command
from minillm.tools.streams import printable

LAW = settings(max_examples=25)


@cache
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.train(["The cat sat on the mat. Where is the cat? On the mat it is. " * 4], 300)


def random_model(positions: int = 2048, causal: bool = True) -> LanguageModel:
    """Random weights, but for the row of the end token: at 0 it is never among the likeliest few."""
    V = plain_tokenizer().vocab_size
    config = ModelConfig(V, 32, 48, 2, 4, 4, 8, positions, causal=causal)
    model, generator = LanguageModel(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
        model.lm_head.weight[plain_tokenizer().special_tokens["<|end|>"]] = 0
    return model


MODEL = random_model()


def new_chat(model: LanguageModel = MODEL, base: bool = False, **options) -> Chat:
    tokenizer = plain_tokenizer() if base else with_chat_template(plain_tokenizer())
    return Chat(model, tokenizer, Options("run", **options))


def make_run(folder: Path, model: LanguageModel, base: bool = False) -> Path:
    save_model(folder, model, plain_tokenizer() if base else with_chat_template(plain_tokenizer()))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    (root / "empty").mkdir()
    return {
        "sft": make_run(root / "sft", MODEL),
        "base": make_run(root / "base", MODEL, base=True),
        "masked": make_run(root / "masked", random_model(causal=False), base=True),
        "empty": root / "empty",
    }


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10).filter(str.strip)
exchanges = st.lists(st.tuples(texts, texts), max_size=5)


def conversation(system: str | None, pairs: list[tuple[str, str]], last: str) -> tuple[dict[str, str], ...]:
    turns = [m for asked, said in pairs for m in (message("user", asked), message("assistant", said))]
    head = [] if system is None else [message("system", system)]
    return (*head, *turns, message("user", last))


# --- what no longer fits


@LAW
@given(st.none() | texts, exchanges, texts, st.integers(4, 150))
@example(None, [], "x", 8)
@example("It is.", [("cat", "a" * 9), ("é" * 9, "c"), ("t" * 9, "x")], "é" * 9, 60)
def test_the_oldest_exchanges_go_first_no_more_than_must_and_are_told(system, pairs, last, room):
    """What is asked is the system message and as many exchanges as leave room for the reply."""
    chat = new_chat(random_model(room + 6), max_new_tokens=6)
    *chat.messages, said = messages = conversation(system, pairs, last)
    head = messages[: system is not None]
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    kept = [head + messages[i:] for i in users if len(chat.format.prompt(head + messages[i:])) <= room]
    if not kept:
        with pytest.raises(InputError, match="too long"):
            list(chat.reply(last))
        assert chat.messages == list(messages[:-1])
        return
    asked, prompt, _, notes = chat.ask(messages)
    assert asked == list(kept[0]) and asked[-1] == said and prompt == chat.format.prompt(asked)
    dropped = len(messages) - len(asked)
    assert notes == [f"(no room for the {dropped} oldest messages: dropped)"] * bool(dropped)


# --- commands

actions = st.lists(
    st.tuples(st.sampled_from(["say", "/undo", "/reset", "/system"]), texts | st.just("")), max_size=8
)


@LAW
@given(actions)
def test_the_conversation_is_what_was_said_and_not_taken_back(actions):
    chat, system, turns = new_chat(max_new_tokens=2), "", []
    for action, text in actions:
        if action == "say":
            turns.append((text or "cat", "".join(chat.reply(text or "cat"))))
        elif action == "/system":
            system = text.strip()
            assert run_command(chat, f"/system {text}") == f"system message {'set' if system else 'removed'}"
        elif action == "/undo":
            told = "last exchange taken back" if turns else "nothing to take back"
            assert run_command(chat, "/undo") == told
            turns = turns[:-1]
        else:
            run_command(chat, "/reset")
            turns = []
        held = [message(m["role"], m["content"]) for m in chat.messages]
        assert held == list(conversation(system or None, turns, "next")[:-1])


def test_every_command_that_help_names_is_run_and_others_are_not():
    named = re.findall(r"^(/\w+)", HELP, flags=re.MULTILINE)
    assert named == ["/system", "/undo", "/reset", "/quit", "/help"]
    for name in named:
        assert "no such command" not in (run_command(new_chat(), name) or "")
    assert run_command(new_chat(), "/help") == HELP and run_command(new_chat(), "/quit") is None
    for wrong in ("/", "/hello", "/Quit", "/ quit"):
        assert "no such command" in run_command(new_chat(), wrong)
    assert run_command(new_chat(), "/quit now") == "/quit takes no text"
    run_command(chat := new_chat(), "/system\nBe kind.\nBe brief.")
    assert chat.messages == (message("system", "Be kind.\nBe brief."),)


def test_a_template_without_a_place_for_a_system_message_refuses_it_at_once():
    tokenizer = plain_tokenizer()
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}"
        "{% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer = Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "chat_template": template})
    chat = Chat(MODEL, tokenizer, Options("run"))
    with pytest.raises(InputError, match="no system message"):
        run_command(chat, "/system Be kind.")
    assert chat.messages == ()
    with pytest.raises(InputError, match="no system message"):
        Chat(MODEL, tokenizer, Options("run", system="Be kind."))


# --- replies


@LAW
@given(st.lists(texts, min_size=1, max_size=3), st.integers(0, 2**40), st.sampled_from([0.0, 0.7, 3.0]))
@example(["d:¾4v㓨\U00054bad\U0008071e\U000a5cb7\U000ec2af"], 4999961, 0.7)  # the reply is a call
def test_the_streamed_text_is_what_generate_gives_for_the_same_seed(said, seed, temperature):
    chat = new_chat(max_new_tokens=16, seed=seed, temperature=temperature, top_p=0.999)
    for number, text in enumerate(said):
        prompt = chat.format.prompt([*chat.messages, message("user", text)])
        options = SamplingOptions(16, temperature, 0, 0.999, stop_ids=chat.format.stop_ids)
        samples = generate(MODEL, [prompt], options, [seed + number])
        (response,), stopped = samples.responses, samples.ended[0]
        ours, call = response[: len(response) - stopped], chat.format.call_id
        spoken = ours[: ours.index(call)] if call in ours else ours
        assert "".join(chat.reply(text)) == plain_tokenizer().decode(spoken)
        assert chat.end == (("tool_calls" if call in ours else "stop") if stopped else "length")


@LAW
@given(st.integers(1, 8), st.integers(0, 100))
def test_a_reply_that_is_stopped_leaves_what_was_said(count, seed):
    chat, shown = new_chat(max_new_tokens=12, seed=seed, top_k=20), []
    for piece in chat.reply("Where is the cat?"):
        assert chat.messages == (), "nothing changes before the reply is whole"
        shown.append(piece)
        chat.stopped = len(shown) == count
    assert len(shown) <= count and chat.end == "length"
    said = message("assistant", "".join(shown))
    assert chat.messages == (message("user", "Where is the cat?"), said)
    list(chat.reply("And the mat?"))  # which can go on from it


def test_a_message_that_has_no_room_takes_no_seed_from_the_reply_to_the_next():
    chat, other = (new_chat(random_model(64), seed=3, max_new_tokens=8) for _ in range(2))
    with pytest.raises(InputError, match="too long"):
        list(chat.reply("cat " * 99))
    assert list(chat.reply("a")) == list(other.reply("a"))


@pytest.mark.parametrize("longest", [20, 512])
def test_without_a_length_a_reply_takes_what_the_context_leaves_up_to_a_limit(longest, monkeypatch):
    monkeypatch.setattr(chat_module, "LONGEST_REPLY", longest)
    _, prompt, sampling, _ = new_chat(random_model(64), top_k=20).ask([message("user", "a")])
    assert len(prompt) == 5 and sampling.max_new_tokens == min(longest, 64 - 5)


def test_a_base_model_remembers_nothing_and_takes_no_system_message():
    chat = new_chat(base=True, max_new_tokens=20, seed=5)
    bos = plain_tokenizer().bos_id
    for number, text in enumerate(["The cat", "sat <|end|>"]):
        options = SamplingOptions(20, 0.7, stop_ids=(bos,))
        (response,) = generate(MODEL, [[bos, *chat.tokenizer.encode(text)]], options, [5 + number]).responses
        assert "".join(chat.reply(text)) == chat.tokenizer.decode(t for t in response if t != bos)
        assert chat.messages == ()
    with pytest.raises(InputError, match="base model"):
        run_command(chat, "/system Be kind.")


# --- scripts


@pytest.mark.parametrize("kind", ["sft", "base"])
def test_prompt_prints_the_answer_alone(kind, runs, capfdbinary):
    main([str(runs[kind]), "--prompt", "Where is the cat?", "--max-new-tokens", "30", "--top-k", "20",
          "--seed", "3", "--device", "cpu"])  # fmt: skip
    printed = capfdbinary.readouterr()
    chat = new_chat(base=kind == "base", max_new_tokens=30, top_k=20, seed=3)
    expected = "".join(chat.reply("Where is the cat?"))
    assert printed.out == printable(expected).encode() + b"\n"
    assert (b"is a base model" in printed.err) == (kind == "base")
    assert b"[cut]" in printed.err


@pytest.mark.parametrize("length", [5, 40])
def test_samples_of_a_file_are_those_of_generate_past_the_context_too(tmp_path, capsys, length):
    model, file = random_model(32), tmp_path / "tale.txt"
    text = ("The cat sat on the mat. " * length)[:length]
    file.write_text(text)
    folder = make_run(tmp_path / "base", model, base=True)
    options = ["--prompt-file", str(file), "--max-new-tokens", "50", "--temperature", "1", "--seed", "3"]
    main([str(folder), *options, "--samples", "3"])
    printed = capsys.readouterr()
    tokenizer = plain_tokenizer()
    prompt, eos = [tokenizer.bos_id, *tokenizer.encode(text)], tokenizer.eos_id
    sampling = SamplingOptions(50, 1.0, stop_ids=(eos,), crop=True)
    responses = generate(model, [prompt] * 3, sampling, [3, 4, 5]).responses
    texts = [printable(tokenizer.decode(token for token in r if token != eos)) for r in responses]
    expected = "".join(f"--- sample {i} ---\n{said}\n" for i, said in enumerate(texts))
    assert printed.out == expected and printed.err.count("past them") == 1


BAD_INPUT = {
    "no prompt file": ("{base} --prompt-file missing.txt", "missing.txt"),
    "two prompts": ("{base} --prompt=Hi --prompt-file missing.txt", "--prompt-file"),
    "samples of nothing": ("{base} --samples 3", "--samples"),
    "missing folder": ("nowhere", "nowhere: no such folder"),
    "a name too long for a folder": ("x" * 300, "xxx"),
    "folder without a model": ("{empty}", "config.json"),
    "a masked model": ("{masked}", "masked tokens"),
    "empty prompt": ("{sft} --prompt=", "--prompt"),
    "blank prompt": ("{sft} --prompt=\n", "--prompt"),
    "prompt longer than the model": ("{sft} --prompt=" + "x0" * 2000, "too long"),
    "no run of the default name": ("", "out/sft"),
    "system message for a base model": ("{base} --system=Kind.", "base model"),
    "more new tokens than positions": ("{sft} --max-new-tokens 2048", "2048 positions"),
    "unknown device": ("{sft} --device abacus", "--device"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_and_exit_2(case, runs, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run is
    options, words = BAD_INPUT[case]
    with pytest.raises(SystemExit) as stop:
        main([word.format(**runs) for word in options.split(" ") if word])
    printed = capfd.readouterr()
    lines = printed.err.strip().splitlines()
    assert stop.value.code == 2 and printed.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], printed.err


# --- the terminal


def test_in_a_terminal_ctrl_c_stops_a_reply_alone_and_at_the_prompt_says_how_to_end(
    runs, monkeypatch, capsys
):
    """All of main but the keys: Ctrl-C is a signal, whoever reads the line."""
    typed = iter(
        ["/undo", "Where is\\", "the cat?", signal.SIGINT, "//undo", "  ", "/undo", "/nothing", "/quit", "x"]
    )
    prompts, given, asked = [], [], []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        line = next(typed)
        if line is signal.SIGINT:
            os.kill(os.getpid(), signal.SIGINT)
        return line

    def tokens(_, prompt: list[int], *__):
        asked.append(plain_tokenizer().decode(prompt))
        for letter in "abcdef":
            given.append(letter)
            if given == ["a", "b", "c"]:
                os.kill(os.getpid(), signal.SIGINT)
            yield plain_tokenizer().encode(letter)[0]

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat_module, "stream", tokens)
    before = signal.getsignal(signal.SIGINT)
    main([str(runs["sft"]), "--device", "cpu"])
    greeting, *said = capsys.readouterr().out.splitlines()
    assert greeting.endswith("2048 tokens of memory. /help lists the commands.")
    assert said == ["nothing to take back", "abc [cut]", "", "(Ctrl-D or /quit ends)", "abcdef [cut]",
                    "last exchange taken back", "/nothing: no such command; /help lists them"]  # fmt: skip
    assert prompts == [">>> ", ">>> ", "... ", *[">>> "] * 6] and next(typed) == "x"
    assert "Where is\nthe cat?" in asked[0] and asked[1].count("/undo") == 1 and "//undo" not in asked[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_piped_conversation_ends_with_its_input(runs):
    done = subprocess.run(
        [sys.executable, "-m", "minillm.chat", str(runs["base"]), "--max-new-tokens", "3", "--device", "cpu"],
        input=b"/system x\nThe cat\n\xff\nunfinished\\", cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert b"is a base model" in done.stdout
    assert b"error: a base model takes no system message" in done.stdout
    assert done.stdout.count(b">>> ") == 5
