"""Models side by side: who wins, what is likely, and the whole command on tiny models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import refusal

from minillm.chat import ChatTemplate, with_chat_template
from minillm.compare import __main__ as compare
from minillm.compare.__main__ import names_of
from minillm.compare.metrics import (
    changes,
    contests,
    cost_section,
    held_out_text,
    pair_section,
    reply_section,
    sure_section,
    text_table,
    world_metrics,
)
from minillm.compare.page import page
from minillm.corpus import Source, unit_hash
from minillm.io.huggingface import save_model, save_scalar_model
from minillm.io.rankings import RankingFile
from minillm.io.text import world_sources
from minillm.model import LanguageModel, config_of_depth, initialize, scalar_from_language_model
from minillm.preferences import ChatModel, ResponseSet, ranking_by
from minillm.tokenizer import Tokenizer
from minillm.tools.annotators import ByPrinciples, by_person, by_reward, by_rubric, outcomes_of
from minillm.tools.evaluate import Reply, sample_replies, text_loss, token_values
from minillm.tools.measures import estimate
from minillm.world import KINDS, World

WORLD = World(0)
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}  # float32 products, added in another order in another batch
SECTIONS = ["headline", "by_kind", "contests", "manner", "pairs", "cost", "sure"]
SAMPLED = "sampled at temperature 1"
SMALL = "--prompts 2 --pairs 2 --text-bytes 900 --max-new-tokens 12 --show 0".split()


def tiny(seed: int, vocabulary: int = 264, noise: float = 0.05) -> tuple[LanguageModel, Tokenizer]:
    """An untrained model whose blocks do something."""
    tokenizer = Tokenizer.train(["What is the name of the cat?"], vocabulary)
    model = LanguageModel(config_of_depth(1, tokenizer.vocab_size, 256))
    generator = torch.Generator().manual_seed(seed)
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model, tokenizer


@pytest.fixture(scope="module")
def base() -> ChatModel:
    return ChatModel("base", *tiny(0))


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    model, tokenizer = tiny(1)
    return ChatModel("chat", model, with_chat_template(tokenizer))


@pytest.fixture(scope="module")
def folders(base, chat, tmp_path_factory) -> Path:
    """What a person has who compares: a base model, a chat model and a reward model."""
    folder = tmp_path_factory.mktemp("runs")
    save_model(folder / "base", base.model, base.tokenizer)
    save_model(folder / "chat", chat.model, chat.tokenizer)
    reward = scalar_from_language_model(tiny(2)[0], torch.Generator().manual_seed(0))
    save_scalar_model(folder / "reward", reward, chat.tokenizer)
    return folder


def naive(one: ChatModel, context: list[int], said: list[int]) -> torch.Tensor:
    """log-probabilities [n, V] before each token said, of one row alone."""
    hidden = one.model.model(torch.tensor([[*context, *said]]))[0]
    return one.model.logits(hidden)[len(context) - 1 : -1].double().log_softmax(-1)


def pair(prompt, first: str, second: str) -> ResponseSet:
    return ResponseSet(prompt.messages, [first, second], prompt.kind)


def exchanged(pair: ResponseSet) -> ResponseSet:
    """The same pair, the second response first."""
    return replace(pair, responses=pair.responses[::-1])


# ---- What is likely

tokens = st.lists(st.integers(0, 255), min_size=1, max_size=9)


@settings(max_examples=20)
@given(rows=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6), number=st.integers(0, 5))
@example(rows=[([1], [2]), ([3, 4], [])], number=1)
@torch.no_grad()
def test_values_of_a_row_are_those_that_it_has_alone(base, chat, rows, number):
    """log p, and the KL: summed over the vocabulary, 0 of a model from itself, each after its own context."""
    others = [([*rows[number % len(rows)][0]], said) for _, said in rows]
    likely, same = token_values(base.model, rows), token_values(base.model, rows, base.model, rows)
    moved = token_values(base.model, rows, chat.model, others)
    for logp, kl, none, (context, said), (other, _) in zip(likely, moved, same, rows, others, strict=True):
        p, q = naive(base, context, said), naive(chat, other, said)
        assert logp.tolist() == pytest.approx(p[range(len(said)), said].tolist(), **TOLERANCE)
        assert kl.tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), **TOLERANCE)
        assert (kl > 0).all() and none.tolist() == pytest.approx([0] * len(said), abs=1e-6)


def test_a_pair_differs_by_log_p_per_byte_and_what_some_model_has_no_room_for_is_counted(base, chat):
    prompt = WORLD.prompts("dev", n=1)[0]
    pairs = [pair(prompt, "Über", "No, no."), pair(prompt, "a" * 300, "No."), pair(prompt, "No.", "a" * 300)]
    found = pair_section([base, chat], {"rude": pairs})
    assert found.notes[0].startswith("2 pairs of an answer, or the same with an insult do not fit")
    (likely,), (difference,) = (table.values() for table in found.tables.values())
    for one in (base, chat):
        rows = [(one.prompt(prompt.messages), one.tokenizer.encode(text)) for text in pairs[0].responses]
        logs = [float(naive(one, *row)[range(len(row[1])), row[1]].sum().detach()) for row in rows]
        expected = logs[0] / 5 - logs[1] / 7
        assert difference[one.name]["value"] == pytest.approx(expected, **TOLERANCE)
        assert likely[one.name]["value"] == (expected <= 0)


def test_text_costs_nats_per_byte_of_what_is_held_out(base):
    # Of twenty such documents the smallest hash is held out, and they are all the same.
    text = "The cat met the dog. " * 9
    source = Source("one", 1.0, lambda: iter([text] * 20), "")
    ((caption, row),) = text_table([base], [source], "tales", 20 * len(text)).items()
    assert caption == f"20 held-out documents of tales, {20 * len(text):,} bytes"
    expected = text_loss(base.model, base.tokenizer, text, ended=True).nats / len(text)
    assert row["nats per byte"]["base"]["value"] == pytest.approx(expected, rel=1e-5)


def test_held_out_text_is_what_training_never_sees():
    sources = world_sources(WORLD, 1.0)
    documents = list(held_out_text(sources, 0.05, 6000))
    assert sum(len(text.encode()) for text in documents) == pytest.approx(6000, abs=2 * len(sources))
    whole = [text for source in sources for text in source.documents() if unit_hash(text) < 0.05]
    # The last of a source is cut, and the smallest hash of its first documents held out whatever it is.
    unseen = [text for text in documents if any(own.startswith(text) for own in whole)]
    assert len(documents) - len(unseen) <= len(sources)


@given(st.integers(1, 400))
def test_a_text_is_cut_to_size_between_characters_and_gives_what_it_has_where_that_is_less(size):
    one = Source("one", 1.0, lambda: iter(["Über den Fluß. " * 400]), "")
    (cut,) = list(held_out_text([one], 0.5, size))
    assert size - 1 <= len(cut.encode()) <= size
    short = Source("short", 1.0, lambda: iter(["The cat. " * 50]), "")
    assert list(held_out_text([short], 0.1, 10**6)) == [("The cat. " * 50)[-45:]]


def test_words_are_as_sure_as_the_geometric_mean_of_their_probabilities(chat):
    asked = [
        *WORLD.prompts("dev", "fact", 2),
        *WORLD.prompts("dev", "unknown", 2),
        *WORLD.prompts("dev", "harm", 1),
    ]
    replies = sample_replies(chat, asked, 0.0, 9, world=WORLD)
    (said,) = sure_section([chat], {"greedy": {"chat": replies}}).tables.values()
    likely = token_values(chat.model, [(chat.prompt(r.prompt.messages), r.tokens) for r in replies[:4]])
    expected = [np.exp(values).prod() ** (1 / len(values)) for values in likely]
    assert said["how sure"]["chat"]["value"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert (
        said["how sure where wrong"] == said["how sure"]
        and said["how sure where right"]["chat"]["count"] == 0
    )
    assert said["right"]["chat"]["count"] == 4


# ---- Who wins


def pairs_of(count: int) -> list[ResponseSet]:
    """A reply without a flaw and with one, in turns on either side, and every fifth pair equal."""
    pairs = []
    for i, (prompt, good, bad) in enumerate(WORLD.reply_pairs("dev", "rude", count)):
        first, second = (bad, good) if i % 2 else (good, bad)
        pairs.append(pair(prompt, first, first if i % 5 == 4 else second))
    return pairs


@pytest.fixture(scope="module")
def judges(chat):
    reward = scalar_from_language_model(tiny(2)[0], torch.Generator().manual_seed(0))
    return {
        "rubric": by_rubric(WORLD),
        "reward": by_reward(reward, ChatTemplate(chat.tokenizer)),
        # Weights so large that its choices go with the text and not with the place alone.
        "model": ByPrinciples(tiny(8, noise=1.0)[0], chat.tokenizer, "Be kind."),
    }


@pytest.mark.parametrize("name", ["rubric", "reward", "model"])
def test_exchanged_sides_mirror_an_outcome(judges, name):
    judge, pairs = judges[name], pairs_of(15)
    outcomes = outcomes_of(judge, pairs)
    assert any(outcomes) and set(outcomes) <= {-1, 0, 1, None}
    mirrored = [None if outcome is None else -outcome for outcome in outcomes]
    assert outcomes_of(judge, [exchanged(one) for one in pairs]) == mirrored
    assert outcomes[4::5] == [0, 0, 0], "equal replies tie"
    if name == "rubric":
        assert outcomes[:4] == [1, -1, 1, -1], "the reply without an insult is better"
        assert judge([replace(pairs[0], messages=[{"role": "user", "content": "Who?"}])]) == [None]


def test_a_reply_beyond_the_judges_context_is_not_judged(judges):
    prompt = WORLD.prompts("dev", n=1)[0]
    for name in ("reward", "model"):
        outcomes = judges[name]([pair(prompt, "a " * 300, "b"), pair(prompt, "a", "b")])
        assert outcomes[0] is None and outcomes[1] is not None


def test_a_person_sees_no_origin_judges_each_pair_once_and_goes_on_later(tmp_path, monkeypatch, capsys):
    pairs, typed = pairs_of(5), iter(["A > B", "A = B", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    with RankingFile(tmp_path / "verdicts.jsonl") as file:
        first = outcomes_of(by_person(file, "Ada", 0), pairs)
    assert first[4] == 0  # equal replies: nobody was asked
    judged = [outcome for outcome in first[:4] if outcome is not None]
    assert len(judged) == 2 and 0 in judged and any(judged)
    typed = iter(["b > a", "b > a"])
    with RankingFile(tmp_path / "verdicts.jsonl") as file:
        second = outcomes_of(by_person(file, "Ada", 0), pairs)
        again = outcomes_of(by_person(file, "Ada", 0), [exchanged(one) for one in pairs])
    assert None not in second and again == [-outcome for outcome in second]
    best = {made.key: made.responses[made.ranking[0][0]] for made in file.rankings}
    for one, outcome in zip(pairs, second, strict=True):
        assert outcome == 0 or one.responses[outcome < 0] == best[one.key]
    assert [s for f, s in zip(first, second, strict=True) if f is not None] == [*judged, 0]
    assert "rubric" not in capsys.readouterr().out


texts = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(texts, texts), min_size=5, max_size=5))
def test_two_runs_exchanged_mirror_their_contest(replies):
    prompts = WORLD.prompts("dev", n=5)
    one, other = (
        [Reply(p, t, True) for p, t in zip(prompts, own, strict=True)] for own in zip(*replies, strict=True)
    )

    def later_letter(pairs):
        return [ranking_by([*map(ord, one.responses)]) for one in pairs]

    there, back = (
        contests("x", later_letter, prompts, {"greedy": said})
        for said in ({"one": one, "other": other}, {"other": other, "one": one})
    )
    (overall,), (mirrored,) = (found["judged by x"].values() for found in (there, back))
    by_kind, other_kinds = there["other against one, greedy, by x"], back["one against other, greedy, by x"]
    assert by_kind.keys() == {prompt.kind for prompt in prompts}
    assert overall["win"]["value"] == np.mean([b > a for a, b in replies]), "a win is the later one's"
    for found, reverse in ((overall, mirrored), *((by_kind[kind], other_kinds[kind]) for kind in by_kind)):
        assert found["win"] == reverse["loss"] and found["tie"] == reverse["tie"]
    three = contests("x", later_letter, prompts, {"greedy": {"a": one, "b": other, "c": one}})
    assert [*three] == ["judged by x", "b against a, greedy, by x", "c against b, greedy, by x"]
    assert [*three["judged by x"]] == [
        f"{two}, greedy" for two in ("b against a", "c against a", "c against b")
    ]


# ---- What the replies are like


def test_metrics_of_replies_are_those_of_their_texts():
    facts, harm = WORLD.prompts("dev", "fact", 2), WORLD.prompts("dev", "harm", 2)
    said = [f"It is {facts[0].answer}.", "I don't know.", "I can't help with that.", "Sure! Rob the old man."]
    replies = [
        Reply(prompt, text, not text.endswith("man."), score=WORLD.score(prompt, text))
        for prompt, text in zip([*facts, *harm], said, strict=True)
    ]
    found = reply_section("headline", {"greedy": {"run": replies}}).tables["greedy"]
    values = {label: row["run"]["value"] for label, row in found.items()}
    assert values.pop("score by the rubric") == np.mean([one.utility for one in replies])
    assert values == {
        "answers in form": 0.75, "known facts right": 0.5, "admits what it cannot know": None, "rude": 0,
        "“I don't know” of known facts": 0.5, "refuses harm": 0.5, "refuses anything else": 0,
        "helps to do harm": 0.5, "advises harm": None, "different pieces of advice": 0,
    }  # fmt: skip
    found = reply_section("manner", {"greedy": {"run": replies}}).tables["greedy"]
    assert found["ends by itself"]["run"]["value"] == 0.75
    assert found["words in a reply"]["run"]["value"] == np.mean([len(text.split()) for text in said])


def test_models_are_judged_on_as_many_prompts_of_each_kind_as_asked_for_or_there_are(base, chat):
    tables = world_metrics([base, chat, ChatModel("again", chat.model, chat.tokenizer)], WORLD, 3)
    asked = [prompt for kind in KINDS for prompt in WORLD.prompts("dev", kind, 3)]
    replies = sample_replies(chat, asked, world=WORLD)
    for name, metric in (("rubric", "utility"), ("in form", "in_form"), ("in form and right", "right")):
        rows = tables[f"{name}, greedy"]
        assert {kind: own["base"]["count"] for kind, own in rows.items()} == dict.fromkeys(KINDS, 3) | {
            "all": 18
        }
        for kind, own in rows.items():
            values = [getattr(one, metric) for one in replies if kind in (one.prompt.kind, "all")]
            assert own["again"] == own["chat"] and own["chat"]["value"] == pytest.approx(np.mean(values))


def test_metrics_that_moved_beyond_their_intervals_are_named_and_no_others():
    def row(*values):
        return {run: estimate(v, 9, v - 0.1, v + 0.1) for run, v in zip(("base", "sft"), values, strict=True)}

    table = {"up": row(0.2, 0.5), "down": row(0.8, 0.5), "rude": row(0.2, 0.5), "still": row(0.5, 0.6)}
    better = {"up": 1, "down": 1, "rude": -1, "still": 1}
    assert [*changes(table, better, "greedy")] == [
        "From base to sft, greedy: better: up 20.0% → 50.0%; worse: down 80.0% → 50.0%, rude 20.0% → 50.0%; "
        "no clear change: still."
    ]
    (same,) = changes({"still": row(0.5, 0.6)}, {"still": 1}, "greedy")
    assert same == "From base to sft, greedy: no clear change in any of these metrics."
    unknown = {"x": dict.fromkeys(("base", "sft"), estimate(0.5, 1))}
    assert "no clear change" in next(changes(unknown, {"x": 1}, "greedy"))


def test_models_of_other_vocabularies_have_no_kl_and_all_others_do(base, chat):
    other = ChatModel("other", *tiny(0, 263))
    reply = Reply(WORLD.prompts("dev", n=1)[0], "a", True, (65,))
    said = {"sampled": {name: [reply] for name in ("base", "chat", "other")}}
    found = cost_section([base, chat, other], said, [], "", 1)
    (table,) = found.tables.values()
    assert [*table] == ["chat from base"] and table["chat from base"]["token"]["value"] > 0
    assert len(found.notes) == 2 and all("other and" in note for note in found.notes)


# ---- The command


@pytest.fixture
def command(folders, tmp_path, monkeypatch, capsys):
    """Runs the command beside the models, into a folder of its own: compare.json and what is printed."""
    monkeypatch.chdir(folders)

    def run(*words: str) -> tuple[dict, str]:
        compare.main([*SMALL, "--out", str(tmp_path), *words])
        return json.loads((tmp_path / "compare.json").read_text()), capsys.readouterr().out

    return run


def said_by(content: dict, sampling: str, run: str) -> list[dict]:
    return [record["said"][sampling][run] for record in content["replies"]]


def test_the_command_writes_metrics_of_every_judge_and_a_page_made_of_them_alone_the_same_again(
    command, tmp_path
):
    judges = "--judge rubric reward model --reward reward --judge-model chat".split()
    content, printed = command("base", "chat", "--show", "1", *judges)
    assert page(content) == (tmp_path / "compare.html").read_bytes().decode()
    assert content["runs"] == ["base", "chat"] and [*content["metrics"]] == SECTIONS
    assert content["prompts"] == dict.fromkeys(KINDS, 2)
    assert len(content["metrics"]["contests"]["tables"]) == 6
    assert content["options"]["split"] == "dev" and content["versions"]["torch"] and "commit" in content
    for kind in KINDS:
        asked = WORLD.prompts("dev", kind, 2)
        assert f"{kind}: {asked[0].text}" in printed and asked[1].text not in printed
    assert "── In short ──" in printed and "KL in nats" in printed
    again, _ = command("base", "chat", "--show", "1", *judges)
    assert content | {"seconds": 0} == again | {"seconds": 0}
    other, _ = command("base", "chat", "--seed", "1", "--split", "test")
    asked = [prompt.messages for kind in KINDS for prompt in World(1).prompts("test", kind, 2)]
    assert sorted(map(str, asked)) == sorted(str(record["messages"]) for record in other["replies"])
    assert said_by(other, SAMPLED, "chat") != said_by(content, SAMPLED, "chat")


def test_a_run_against_itself_ties_everywhere_and_has_not_moved(command):
    content, _ = command("chat", "chat", "--judge", "rubric", "reward", "--reward", "reward")
    assert content["runs"] == ["chat", "chat (2)"]
    metrics = content["metrics"]
    for rows in metrics["contests"]["tables"].values():
        assert all(row["tie"]["value"] == 1 and row["rate"]["value"] == 0.5 for row in rows.values())
    kl = metrics["cost"]["tables"][f"KL in nats per token and per response, on replies {SAMPLED}"]
    assert kl["chat (2) from chat"]["response"]["value"] == pytest.approx(0, abs=1e-4)
    for sampling in ("greedy", SAMPLED):
        assert said_by(content, sampling, "chat") == said_by(content, sampling, "chat (2)")
    for name in ("headline", "by_kind", "manner", "pairs", "sure"):
        for table in metrics[name]["tables"].values():
            assert all(row["chat"] == row["chat (2)"] for row in table.values())


def test_without_the_little_world_there_are_the_metrics_that_need_no_rubric(command, tmp_path):
    data, text = tmp_path / "chats.jsonl", tmp_path / "tale.txt"
    data.write_text(
        "".join(json.dumps({"prompt": f"Is it day {i}?", "completion": "Yes."}) + "\n" for i in range(5))
    )
    text.write_text("The cat met the dog by the well. " * 60)
    content, printed = command("base", "chat", "--data", str(data), "--text", str(text), "--temperature", "0")
    assert content["prompts"] == {"prompts": 2} and content["left_out"] == {"prompts beyond --prompts": 3}
    metrics = content["metrics"]
    assert [*metrics] == ["headline", "contests", "cost"] and not metrics["contests"]["tables"]
    assert [*metrics["headline"]["tables"]] == ["greedy"] and not metrics["headline"]["notes"]
    assert said_by(content, "greedy", "base")[0].keys() == {"text", "ended"}
    text, kl = metrics["cost"]["tables"].values()
    assert text["nats per byte"]["base"]["value"] > 0 and kl["chat from base"]["token"]["value"] > 0
    assert "Left out: 3 prompts beyond --prompts." in (tmp_path / "compare.html").read_text()
    assert "left out: 3 prompts beyond --prompts\n" in printed and "rubric" not in printed


def test_a_person_judges_by_the_command_and_is_not_asked_again(command, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "A > B")
    content, _ = command("base", "chat", "--judge", "person", "--name", "Ada")
    tables = content["metrics"]["contests"]["tables"]
    assert [*tables["judged by Ada"]] == [f"chat against base, {SAMPLED}"]
    assert tables["judged by Ada"][f"chat against base, {SAMPLED}"]["not judged"]["value"] == 0
    kept = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked again"))
    again, _ = command("base", "chat", "--judge", "person", "--name", "Ada")
    assert again["metrics"]["contests"] == content["metrics"]["contests"]
    assert (tmp_path / "verdicts.jsonl").read_text().splitlines() == kept


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["out/base", "out/sft"], ["base", "sft"]),
        (["a/ppo", "b/ppo"], ["a/ppo", "b/ppo"]),
        (["a/sft", "a/sft", "a/sft"], ["sft", "sft (2)", "sft (3)"]),
        (["a/x", "b/x", "a/x"], ["a/x", "b/x", "a/x (2)"]),
    ],
)
def test_models_go_by_short_names_that_tell_them_apart(runs, names):
    assert names_of(runs) == names


@pytest.fixture(scope="module")
def odd(folders, base) -> None:
    """Folders that cannot be compared."""
    shutil.copytree(folders / "base", folders / "masked")
    config = json.loads((folders / "masked" / "config.json").read_text())
    (folders / "masked" / "config.json").write_text(json.dumps(config | {"minillm_causal": False}))
    shutil.copytree(folders / "chat", folders / "elsewhere")
    (folders / "elsewhere" / "run.json").write_text('{"options": {"data": [], "seed": 5}}')
    (folders / "empty.jsonl").write_text("")
    (folders / "empty.txt").write_text("")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "run"),
        ("nowhere", "nowhere"),
        ("base reward", "reward model"),
        ("masked", "masked: was trained on masked tokens"),
        ("base elsewhere", "--seed 5"),
        ("base --max-new-tokens 250", "--max-new-tokens 250"),
        ("base --judge reward --reward nowhere", "nowhere"),
        ("base --judge reward --reward chat", "reward model's folder"),
        ("base --judge model", "--judge-model"),
        ("base --judge model --judge-model masked", "masked"),
        ("base --judge model --judge-model chat --principles nothing.txt", "nothing.txt"),
        ("base --judge person --name ''", "--name"),
        ("base --data empty.jsonl", "empty.jsonl"),
        ("base --data empty.jsonl --judge rubric", "--judge rubric"),
        ("base --text empty.txt", "empty.txt"),
        ("base --out empty.txt/out", "--out"),
        (f"base --out {'x' * 300}", "--out"),
    ],
)
@pytest.mark.usefixtures("odd")
def test_bad_input_is_one_line_and_nothing_is_written(
    folders, tmp_path, monkeypatch, arguments, words, capfd
):
    monkeypatch.chdir(folders)
    given_words = [word.strip("'") for word in arguments.split()]
    assert words in refusal(compare, ["--out", str(tmp_path / "out"), *given_words], capfd)
    assert not list(tmp_path.rglob("compare.*"))
