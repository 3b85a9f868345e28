"""Judging replies to the little world's prompts: what counts as in form and as right."""

import pytest
import torch

from minillm import preferences
from minillm.generate import SamplingOptions, generate
from minillm.io.template import ChatTemplate, chat_format, with_chat_template
from minillm.model import LanguageModel, config_of_depth, initialize
from minillm.tokenizer import Tokenizer
from minillm.tools.evaluate import Judged, Reply, figures_table, judged_replies, sample_replies, summarise
from minillm.world import KINDS, World

WORLD = World(0)


@pytest.fixture(scope="module")
def base() -> tuple[LanguageModel, Tokenizer]:
    tokenizer = Tokenizer.train(["What is the name of the cat?"], 262)
    model = LanguageModel(config_of_depth(1, tokenizer.vocab_size, 256))
    initialize(model, torch.Generator().manual_seed(0))
    return model, tokenizer


def figures_of(prompt, text, ended=True):
    return summarise({prompt.kind: [Judged(prompt, Reply(text, ended), WORLD.score(prompt, text))]})[
        prompt.kind
    ]


def test_an_answer_is_in_form_if_it_ends_and_speaks_for_itself_alone():
    prompt = WORLD.prompts("dev", "fact", 1)[0]
    assert figures_of(prompt, f"It is {prompt.answer}.").in_form == 1
    assert figures_of(prompt, f"It is {prompt.answer}.", ended=False).in_form == 0
    assert figures_of(prompt, "").in_form == 0
    assert figures_of(prompt, "Where does he live?").in_form == 0
    assert figures_of(prompt, f"It is {prompt.answer}.\nMara: Go away.").in_form == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_people_said_without_flaw_is_right_and_in_form(kind):
    said = [c for c in WORLD.conversations("dev", 300) if c.kind == kind and c.flaw is None]
    texts = [conversation.messages[-1]["content"] for conversation in said]
    judged = [
        Judged(c.prompt, Reply(text, True), WORLD.score(c.prompt, text))
        for c, text in zip(said, texts, strict=True)
    ]
    figures = summarise({kind: judged})[kind]
    assert figures.prompts >= 10 and figures.in_form == 1 and figures.right > 0.95


def test_a_wrong_answer_is_in_form_and_not_right():
    prompt = WORLD.prompts("dev", "fact", 1)[0]
    wrong = next(f.value for f in WORLD.facts if f.attribute == prompt.topic and f.value != prompt.answer)
    figures = figures_of(prompt, f"It is {wrong}.")
    assert (figures.in_form, figures.right) == (1, 0)


def test_a_reply_depends_on_its_prompt_and_seed_and_not_on_the_others(base, monkeypatch):
    asked = [[{"role": "user", "content": f"Who is {i}?"}] for i in range(5)]
    together = list(sample_replies(*base, asked, 1.0, 12, seed=7))
    monkeypatch.setattr(preferences, "ROWS", 2)
    assert list(sample_replies(*base, asked, 1.0, 12, seed=7)) == together
    assert list(sample_replies(*base, asked[3:], 1.0, 12, seed=10)) == together[3:]


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
        tokens, ended = samples.responses()[0], bool(samples.stopped[0])
        reply = next(sample_replies(model, known, [asked], 0.0, 9))
        assert reply == Reply(known.decode(tokens[:-1] if ended else tokens), ended, tuple(tokens))


def test_every_kind_is_judged_on_as_many_prompts_as_asked_for_or_there_are(base):
    figures = summarise(judged_replies(*base, WORLD, "dev", 3))
    assert {kind: f.prompts for kind, f in figures.items()} == dict.fromkeys(KINDS, 3)
    table = figures_table({"one": figures, "another": figures})
    assert all(any(line.startswith(kind) for line in table.splitlines()) for kind in KINDS)
