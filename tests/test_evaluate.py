"""Judging replies to the little world's prompts: what counts as in form and as right."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tiny_model

from minillm import generate as generate_module
from minillm.chat import ChatTemplate, chat_format, with_chat_template
from minillm.generate import SamplingOptions, generate
from minillm.io.huggingface import save_model
from minillm.model import LanguageModel
from minillm.preferences import ChatModel
from minillm.tokenizer import Tokenizer
from minillm.tools.evaluate import Reply, TextLoss, main, sample_replies, text_loss
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt

WORLD = World(0)


@pytest.fixture(scope="module")
def base() -> tuple[LanguageModel, Tokenizer]:
    return tiny_model(longest=256)


def judged(prompt, text: str, ended: bool = True) -> Reply:
    return Reply(prompt, text, ended, score=WORLD.score(prompt, text))


def test_an_answer_is_in_form_if_it_ends_and_speaks_for_itself_alone_and_right_if_it_is_true_too():
    prompt = WORLD.prompts("dev", "fact", 1)[0]
    wrong = next(f.value for f in WORLD.facts if f.attribute == prompt.topic and f.value != prompt.answer)
    cases = [
        (f"It is {prompt.answer}.", True, (True, True)),
        (f"It is {wrong}.", True, (True, False)),
        (f"It is {prompt.answer}.", False, (False, False)),
        ("", True, (False, False)),
        ("Where does he live?", True, (False, False)),
        (f"It is {prompt.answer}.\nMara: Go away.", True, (False, False)),
    ]
    for text, ended, expected in cases:
        one = judged(prompt, text, ended)
        assert (one.in_form, one.right) == expected, text


def test_words_are_what_spaces_divide_and_repetition_the_share_of_pairs_of_them_said_before():
    asked = Prompt([], "prompts", "")
    said = {"a b a b": (4, 1 / 3), "A  b\na B": (4, 1 / 3), "one": (1, 0), "": (0, 0)}
    replies = {text: Reply(asked, text, True) for text in said}
    assert {text: (one.words, pytest.approx(one.repetition)) for text, one in replies.items()} == said


@pytest.mark.parametrize("kind", KINDS)
def test_what_people_said_without_flaw_is_right_and_in_form(kind):
    said = [c for c in WORLD.conversations("dev", 300) if c.kind == kind and c.flaw is None]
    replies = [judged(one.prompt, one.messages[-1]["content"]) for one in said]
    assert len(replies) >= 10 and all(one.in_form for one in replies)
    assert sum(one.right for one in replies) > 0.95 * len(replies)


def test_a_reply_depends_on_its_prompt_and_seed_and_not_on_the_others(base, monkeypatch):
    one, asked = ChatModel("", *base), WORLD.prompts("dev", n=5)
    together = sample_replies(one, asked, 1.0, 12, seed=7)
    monkeypatch.setattr(generate_module, "ROWS", 2)
    assert sample_replies(one, asked, 1.0, 12, seed=7) == together
    assert sample_replies(one, asked[3:], 1.0, 12, seed=10) == together[3:]
    scored = sample_replies(one, asked, 1.0, 12, seed=7, world=WORLD)
    assert [reply.score for reply in scored] == [WORLD.score(reply.prompt, reply.text) for reply in together]


def test_a_chat_model_is_asked_in_its_format_and_a_base_model_gets_a_line_of_text(base):
    model, tokenizer = base
    asked = [{"role": "user", "content": "Who?"}]
    chat = with_chat_template(tokenizer)
    form = chat_format(tokenizer)
    assert form.prompt(asked) == [tokenizer.bos_id, *tokenizer.encode("Who?")]
    assert form.stop_ids == (tokenizer.eos_id,)
    for known, prompt in ((tokenizer, [tokenizer.bos_id, *tokenizer.encode("Who?\n")]),
                          (chat, ChatTemplate(chat).prompt(asked))):  # fmt: skip
        stops = chat_format(known).stop_ids
        samples = generate(model, [prompt], SamplingOptions(9, 0.0, stop_ids=stops), [0])
        tokens, ended = samples.responses[0], samples.ended[0]
        question = Prompt(asked, "prompts", "")
        expected = Reply(question, known.decode(tokens[:-1] if ended else tokens), ended, tuple(tokens))
        assert sample_replies(ChatModel("", model, known), [question], 0.0, 9) == [expected]


# ---- The loss on a text


@settings(max_examples=10)
@given(size=st.integers(1, 700), ended=st.booleans())
def test_the_loss_on_a_text_counts_every_token_once_in_windows_of_the_context(size, ended):
    model, tokenizer = tiny_model(longest=7, seed=1)
    text = ("What is the name of the cat? Größe.\n" * 20)[:size]
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), *[tokenizer.eos_id] * ended]
    nats = 0.0
    for first in range(0, len(tokens) - 1, 7):
        window = torch.tensor(tokens[first : first + 8])
        with torch.no_grad():
            logprobs = model.logits(model.model(window[None, :-1]))[0].log_softmax(-1)
        nats -= float(logprobs[range(len(window) - 1), window[1:]].sum())
    found = text_loss(model, tokenizer, text, ended)
    assert (found.tokens, found.bytes) == (len(tokens) - 1, len(text.encode()))
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_the_loss_is_printed_in_every_unit_of_one_sum():
    said = str(TextLoss(nats=200.0, tokens=100, bytes=400))
    for figure in ("0.5000 nats/byte", "0.7213 bits/byte", "2.0000 nats/token", "perplexity 7.389"):
        assert figure in said


def test_text_is_read_as_training_reads_it_each_record_a_document(base, tmp_path, capsys):
    save_model(tmp_path / "run", *base)
    texts = ["The cat is red.\n", "", "Größe."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    main([str(tmp_path / "run"), "--text", str(tmp_path / "a.jsonl"), "--field", "body"])
    one, other = (text_loss(*base, text) for text in texts if text)
    whole = TextLoss(one.nats + other.nats, one.tokens + other.tokens, one.bytes + other.bytes)
    found, _, counts = capsys.readouterr().out.partition(" over ")
    assert counts == str(whole).partition(" over ")[2] + "\n  left out: 1 empty documents\n"
    # The command may compute in bfloat16.
    assert float(found.partition(" nats/byte")[0]) == pytest.approx(whole.nats / whole.bytes, rel=0.01)


@pytest.mark.parametrize(("content", "words"), [(None, "none.txt"), (b"", "empty"), (b"\xff\xfe", "UTF-8")])
def test_a_text_that_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, content, words):
    file = tmp_path / "none.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--text", str(file)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and words in printed
