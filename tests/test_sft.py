"""Whole fine-tuning runs through the command line: trained, killed, resumed, shared out, refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from runs import (
    SHARDED,
    assert_same_run,
    assert_two_processes_follow,
    folder_bytes,
    killed_at_update,
    metrics_of,
    missing_words,
    refusal,
)

import sft
import train
from minillm.chat import ChatTemplate
from minillm.io.huggingface import load_model
from minillm.tools.sources import tell_rise
from minillm.world import KINDS

pytestmark = pytest.mark.usefixtures("quick_plots")

SHORT = (
    "--steps 12 --val-every 4 --save-every 3 --batch-tokens 128 --block-size 64 --precision float32".split()
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text("".join(f"On day {i} the {i % 7} cats met {i % 5} dogs.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def base(text, tmp_path_factory) -> Path:
    """A small base model."""
    out = tmp_path_factory.mktemp("base") / "base"
    shape = "--depth 1 --vocab-size 300 --block-size 256 --batch-tokens 256 --steps 10 --samples 0"
    train.main(["--data", str(text), "--out", str(out), "--cache", str(out.parent / "cache"),
                *shape.split(), "--precision", "float32"])  # fmt: skip
    return out


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Conversations of one and of two turns; one is longer than a row, one has nothing to learn."""
    records = [
        {"messages": [{"role": "user", "content": f"How many cats on day {i}?"},
                      {"role": "assistant", "content": f"{i % 7} cats."}]} for i in range(80)
    ]  # fmt: skip
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    records += [{"messages": records[i]["messages"] + more} for i in range(0, 80, 4)]
    records.append({"messages": records[0]["messages"] + [{"role": "user", "content": "x" * 400}, *more[1:]]})
    records.append({"messages": [{"role": "user", "content": "Anybody?"}]})
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def arguments(base: Path, chats: Path, out: Path, *options: str) -> list[str]:
    places = ["--init", str(base), "--data", str(chats), "--out", str(out)]
    return [*places, "--cache", str(out.parent / "cache"), *SHORT, *options]


@pytest.fixture(scope="module")
def reference(base, chats, tmp_path_factory) -> Path:
    """An uninterrupted run to compare with."""
    out = tmp_path_factory.mktemp("reference") / "sft"
    sft.main(arguments(base, chats, out))
    return out


def test_a_finished_run_leaves_a_complete_folder_and_a_final_line(reference):
    final = metrics_of(reference)[-1]
    assert final["event"] == "final" and final["step"] == 12 and final["tokens"] == 12 * 128
    assert final["val_perplexity"] == pytest.approx(torch.tensor(final["val_loss"]).exp().item())
    source = final["sources"][0]
    assert source["skipped"] == {
        "conversations without a message of the assistant's": 1,
        "ends of conversations longer than a row": 1,
    }
    assert {p.name for p in reference.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json",
        "generation_config.json", "metrics.jsonl", "loss.png", "resume",
    }  # fmt: skip
    assert json.loads((reference / "run.json").read_text())["stage"] == "sft"


def test_it_learns_to_answer_and_to_end_its_answer(base, chats, tmp_path):
    out = tmp_path / "sft"
    sft.main(arguments(base, chats, out, "--steps", "120", "--val-every", "5", "--val-fraction", "0.2"))
    val = [event["loss"] for event in metrics_of(out) if event["event"] == "val"]
    assert val[-1] < 0.2 * val[0]
    model, tokenizer = load_model(out, torch.device("cpu"), torch.float32)
    template = ChatTemplate(tokenizer)
    conversation = [{"role": "user", "content": "How many cats on day 9?"}]
    asked = template.prompt(conversation)
    whole = template.encode([*conversation, {"role": "assistant", "content": "2 cats."}]).tokens
    hidden = model.model(torch.tensor([whole]))
    best = model.logits(hidden[0]).argmax(dim=-1)[len(asked) :]
    assert best[-1] != template.end_id and template.end_id in best[-2:], "the reply must end, and not before"


def test_what_is_read_cut_and_left_out_is_said_before_the_first_step(
    base, chats, tmp_path, capfd, monkeypatch
):
    def stop(*_):
        raise sft.InputError("the first step")

    monkeypatch.setattr(sft, "backward", stop)
    with pytest.raises(SystemExit):
        sft.main(arguments(base, chats, tmp_path / "sft"))
    printed = capfd.readouterr()
    assert "the first step" in printed.err
    assert "left out or cut: 1 conversations without a message of the assistant's" in printed.out
    assert "left out or cut: 1 ends of conversations longer than a row" in printed.out
    numbers = re.search(r"chats\.jsonl: (\d+) conversations to train on, (\d+) to validate on", printed.out)
    assert sum(map(int, numbers.groups())) == len(chats.read_text().splitlines()) - 1


@pytest.mark.parametrize(("last", "told"), [(3.1, True), (2.05, False), (1.5, False)])
def test_a_validation_loss_that_rose_is_told(tmp_path, capsys, last, told):
    events = [
        {"event": "val", "step": step, "loss": loss} for step, loss in ((5, 3.0), (10, 2.0), (15, last))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    tell_rise(SimpleNamespace(folder=tmp_path, say=print))
    expected = "val rose from 2.000 at step 10 to 3.100 nats/token: " if told else ""
    assert capsys.readouterr().out.partition("the conv")[0] == expected


@pytest.mark.parametrize("case", ["one conversation", "the same thrice", "nothing held out"])
def test_without_a_conversation_to_validate_on_all_are_trained_on(base, chats, tmp_path, capfd, case):
    lines = chats.read_text().splitlines()[: {"one conversation": 1, "nothing held out": 9}.get(case, 1)]
    data, out = tmp_path / "chats.jsonl", tmp_path / "sft"
    data.write_text("".join(line + "\n" for line in lines * (3 if "thrice" in case else 1)))
    options = ["--val-fraction", "0" if case == "nothing held out" else "0.2", "--steps", "4"]
    sft.main(arguments(base, data, out, *options))
    events = metrics_of(out)
    assert "none to validate on" in capfd.readouterr().out
    assert [event["event"] for event in events] == ["train"] * 4 + ["final"]
    assert events[-1]["val_loss"] is None and (out / "model.safetensors").exists()
    sft.main(["--out", str(out), "--resume"])
    assert "already finished" in capfd.readouterr().out


def test_the_saved_folder_opens_in_transformers_with_the_same_chat_format_and_end(reference, tmp_path):
    _, tokenizer = load_model(reference, torch.device("cpu"), torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(reference)
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3 cats."}]
    template = ChatTemplate(tokenizer)
    assert (
        theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        == template.encode(messages).tokens
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(reference)
    assert set(model.generation_config.eos_token_id) == set(template.stop_ids)


def test_a_share_of_the_rows_is_raw_text_where_some_is_given(base, chats, text, tmp_path):
    out = tmp_path / "sft"
    sft.main(arguments(base, chats, out, "--text", str(text), "--text-share", "0.5", "--steps", "40"))
    shares = {source["name"]: source["realised"] for source in metrics_of(out)[-1]["sources"]}
    assert set(shares) == {"chats.jsonl", "tale.txt"} and 0.3 < shares["tale.txt"] < 0.7


def test_on_the_little_world_the_rubric_judges_before_and_after(base, tmp_path):
    out = tmp_path / "sft"
    sizes = "--world-conversations 60 --world-megabytes 0.2 --eval-prompts 2 --block-size 256"
    places = ["--init", str(base), "--out", str(out), "--cache", str(tmp_path / "cache")]
    sft.main([*places, *SHORT, "--steps", "2", *sizes.split()])
    final = metrics_of(out)[-1]
    assert [*final["metrics"]] == ["rubric, greedy", "in form, greedy", "in form and right, greedy"]
    for kinds in final["metrics"].values():
        assert {kind: own[str(out)]["count"] for kind, own in kinds.items()} == dict.fromkeys(KINDS, 2) | {
            "all": 12
        }
        assert all(set(own) == {str(base), str(out)} for own in kinds.values())
    assert len(final["sources"]) == 7, "conversations and the six sources of text"


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(base, chats, text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    mixed = ("--text", str(text), "--text-share", "0.3")
    sft.main(arguments(base, chats, whole, *mixed))
    with killed_at_update(6):  # two steps behind the restart point of step 3
        sft.main(arguments(base, chats, killed, *mixed))
    assert max(e["step"] for e in metrics_of(killed)) == 5
    sft.main(["--out", str(killed), "--resume", "--cache", str(tmp_path / "cache")])
    assert_same_run(whole, killed)


def test_two_processes_that_share_the_weights_follow_the_curve_of_one(base, chats, tmp_path, reference):
    """Where each holds all weights: tests/test_train.py."""
    words = arguments(base, chats, tmp_path / "sft", *SHARDED)
    assert_two_processes_follow(reference, sft, words, tmp_path / "sft", rel=1e-3)


# Bad input: one line, exit 2, nothing lost


BAD_INPUT = {
    "missing file": ("--data nowhere.jsonl", "nowhere.jsonl"),
    "all longer than a row": ("--data {d}/long.jsonl", "longer than a row"),
    "text and conversations of one name": ("--data same={c} --text same={t}", "name"),
    "missing text": ("--text nowhere.txt", "nowhere.txt"),
    "init from nowhere": ("--init nowhere", "nowhere"),
    "init from a folder that is no model": ("--init {d}", "config.json"),
    "longer rows than the model has positions": ("--block-size 257", "--block-size 257"),
    "text for all": ("--text-share 1", "--text-share"),
    "text of which nothing is read": ("--text {t} --text-share 0", "--text-share 0"),
    "validation of everything": ("--val-fraction 1", "--val-fraction"),
    "out holds a run": ("--out {r}", "--overwrite"),
    "out is another stage's run": ("--out {b} --resume", "another stage"),
    "resume with other options": ("--out {r} --resume --steps 3", "--steps"),
}
"""What is wrong with a file, test_conversations.py tries; numbers that are nonsense, test_bad_input.py."""


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_and_exit_2_and_changes_nothing(
    case, base, chats, text, reference, tmp_path, capfd
):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "long.jsonl").write_text(json.dumps({"question": "Who?", "answer": "I " * 500}) + "\n")
    before = folder_bytes(reference), folder_bytes(base), folder_bytes(bad)
    options, words = BAD_INPUT[case]
    given = options.format(d=bad, c=chats, t=text, r=reference, b=base).split()
    defaults = {"--data": str(chats), "--init": str(base), "--out": str(tmp_path / "out")}
    if "--resume" not in given:
        given += missing_words(given, defaults)
    assert words in refusal(sft, [*given, "--cache", str(tmp_path / "cache")], capfd)
    assert before == (folder_bytes(reference), folder_bytes(base), folder_bytes(bad))
    assert not (tmp_path / "out").exists()
