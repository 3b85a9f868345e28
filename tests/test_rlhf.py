"""Whole stages through the command line: sampled, killed, resumed, ranked at a terminal, refused."""

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from runs import ROOT, Killed, folder_bytes, missing_words, refusal, tiny_model

import rlhf
from minillm import preferences, world
from minillm.chat import with_chat_template
from minillm.generate import SamplingOptions
from minillm.io.huggingface import save_model
from minillm.io.rankings import read_rankings, read_responses
from minillm.tools import annotators
from minillm.tools import folder as folder_tools
from minillm.world import World

SMALL = "--prompts 23 --responses 3 --distractors 0 --max-new-tokens 5 --precision float32".split()


def folder_of(place: Path, seed: int, longest: int = 160) -> Path:
    """A chat model that knows nothing, with weights of its own."""
    network, tokenizer = tiny_model(longest=longest, seed=seed)
    save_model(place, network, with_chat_template(tokenizer))
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("model") / "sft", 0)


WORLD_OF = functools.cache(World)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(preferences, "ROWS", 12)  # four prompts of three responses
    for place, name in ((world, "World"), (annotators, "World")):  # slow to make, and never changed
        monkeypatch.setattr(place, name, WORLD_OF)


def sample(model: Path, out: Path, *options: str) -> bytes:
    rlhf.main(["--stage", "sample", "--models", str(model), "--out", str(out), *SMALL, *options])
    return (out / "responses.jsonl").read_bytes()


@pytest.fixture(scope="module")
def sampled(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "rlhf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences, "ROWS", 12)
        patch.setattr(world, "World", WORLD_OF)
        sample(model, out)
    return out


@pytest.fixture
def out(sampled, tmp_path) -> Path:
    """A folder with responses to rank."""
    folder = tmp_path / "rlhf"
    folder.mkdir()
    (folder / "responses.jsonl").write_bytes((sampled / "responses.jsonl").read_bytes())
    return folder


def rank(out: Path, *options: str) -> list[tuple]:
    """The rankings after another go, without their time."""
    rlhf.main(["--stage", "rank", "--out", str(out), "--precision", "float32", *options])
    return [(r.annotator, r.messages, r.ranking) for r in read_rankings(out / "rankings.jsonl")]


# ---- sample


def test_sampling_writes_a_line_a_prompt_and_every_option(sampled):
    sets = read_responses(sampled / "responses.jsonl")
    assert len(sets) == 23 and all(len(s.responses) == 3 and s.kind and s.world == 0 for s in sets)
    run = json.loads((sampled / "run.json").read_text())
    assert run["options"]["temperature"] == 1 and run["options"]["stage"] == "sample"


@pytest.mark.parametrize("share", [0.0, 0.31, 0.999])
def test_cut_at_any_byte_it_resumes_to_the_same_file_bit_for_bit(model, sampled, tmp_path, share):
    out, whole = tmp_path / "rlhf", (sampled / "responses.jsonl").read_bytes()
    out.mkdir()
    (out / "run.json").write_bytes((sampled / "run.json").read_bytes())
    (out / "responses.jsonl").write_bytes(whole[: int(share * len(whole))])
    rlhf.main(["--stage", "sample", "--resume", "--out", str(out)])
    assert (out / "responses.jsonl").read_bytes() == whole


def test_prompts_of_ones_own_are_all_before_the_last_reply(model, tmp_path, capfd):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    data = tmp_path / "chats.jsonl"
    long = [[{"role": "user", "content": "x" * count}, messages[1]] for count in (200, 60)]
    records = [messages, messages[:2], [messages[1]], *long]
    data.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    both = ["--models", str(model), str(folder_of(tmp_path / "short", 1, 40))]
    sample(model, tmp_path / "rlhf", "--data", str(data), "--distractors", "1", *both)
    assert [s.messages for s in read_responses(tmp_path / "rlhf" / "responses.jsonl")] == [
        messages[:3], messages[:1],
    ]  # fmt: skip
    printed = capfd.readouterr().out
    assert (
        "1 conversations that are replies to nothing" in printed
        and "2 of 4 prompts left out: too long" in printed
    )
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (messages[:2], messages)))
    again = ["--stage", "sample", "--resume", "--out", str(tmp_path / "rlhf")]
    assert "other prompts" in refusal(rlhf, again, capfd)


def test_the_last_turn_is_asked_and_prompts_without_a_reply_are_prompts(model, tmp_path, capsys):
    hello = [{"role": "user", "content": "Hello 0"}, {"role": "assistant", "content": "Hello!"}]
    fox = {"role": "user", "content": "What does the fox eat 0?"}
    records = [
        {"messages": [*hello, fox]}, {"messages": [fox]}, {"prompt": "Who?"}, {"prompt": [*hello, fox]},
        {"instruction": "Add.", "input": "1 1"},
    ]  # fmt: skip
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    sample(model, tmp_path / "two", "--data", str(data), "--prompts", "2")
    assert "the first 2 of 5 prompts are used" in capsys.readouterr().out
    assert len(read_responses(tmp_path / "two" / "responses.jsonl")) == 2
    sample(model, tmp_path / "rlhf", "--data", str(data))
    asked = [given.messages for given in read_responses(tmp_path / "rlhf" / "responses.jsonl")]
    assert asked[:2] == [[*hello, fox], [fox]] and asked[3] == [*hello, fox]
    assert [messages[-1]["content"] for messages in asked] == [
        *[fox["content"]] * 2, "Who?", fox["content"], "Add.\n\n1 1",
    ]  # fmt: skip
    assert "asked.jsonl: 5 prompts" in capsys.readouterr().out


def test_responses_cut_at_the_longest_length_are_counted_and_marked_to_the_rankings(
    model, sampled, out, tmp_path, capsys
):
    """This model hardly ever ends a response within five tokens."""
    sample(model, tmp_path / "few", "--prompts", "4")
    lines = [json.loads(line) for line in (tmp_path / "few" / "responses.jsonl").read_text().splitlines()]
    few = sum(not draw["ended"] for line in lines for draw in line["draws"])
    assert f"\n{few} of all responses are cut at --max-new-tokens 5\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in (sampled / "responses.jsonl").read_text().splitlines()]
    cut = [[k for k, draw in enumerate(line["draws"]) if not draw["ended"]] for line in lines]
    assert sum(map(len, cut)) > 40
    assert [given.cut for given in read_responses(out / "responses.jsonl")] == cut
    rank(out, "--opinions", "1")
    assert [ranking.cut for ranking in read_rankings(out / "rankings.jsonl")] == cut


def test_responses_of_a_model_replaced_under_its_name_or_to_other_prompts_are_not_mixed(tmp_path, capfd):
    """Replaced weights; the same again go on; and prompts that differ only behind what is answered."""
    place, out, data = folder_of(tmp_path / "model", 0), tmp_path / "rlhf", tmp_path / "asked.jsonl"
    asked = [{"prompt": f"{i}?", "completion": "Yes."} for i in range(8)]
    data.write_text("".join(json.dumps(one) + "\n" for one in asked))
    whole = sample(place, out, "--data", str(data))
    path = out / "responses.jsonl"
    begun = b"".join(whole.splitlines(keepends=True)[:4])
    path.write_bytes(begun)
    folder_of(place, 1)
    capfd.readouterr()
    resume = ["--stage", "sample", "--resume", "--out", str(out)]
    assert "other weights" in refusal(rlhf, resume, capfd) and path.read_bytes() == begun
    folder_of(place, 0)
    data.write_text("".join(json.dumps(one) + "\n" for one in [*asked[:7], asked[7] | {"prompt": "Why?"}]))
    assert "other prompts" in refusal(rlhf, resume, capfd) and path.read_bytes() == begun
    data.write_text("".join(json.dumps(one) + "\n" for one in asked))
    path.write_bytes(begun.replace(b"3?", b"9?"))
    assert "answers other prompts than these" in refusal(rlhf, resume, capfd)
    path.write_bytes(begun)
    rlhf.main(resume)
    assert path.read_bytes() == whole


def test_a_run_of_sampling_says_what_is_asked_as_soon_as_there_is_one(model, tmp_path, monkeypatch):
    """Killed before its first response, it can still tell other prompts or weights from its own."""
    write = folder_tools.write_json

    def write_and_die(path: Path, content: dict) -> None:
        write(path, content)
        raise Killed

    monkeypatch.setattr(folder_tools, "write_json", write_and_die)
    with pytest.raises(Killed):
        sample(model, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["origin"].keys() == {
        "prompts", f"weights of {model}"
    }  # fmt: skip


def test_every_option_of_sampling_has_its_place():
    options = rlhf.Options(stage="sample", max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.75)
    assert options.sampling == SamplingOptions(5, 0.5, 3, 0.75)


# ---- rank


def test_rankings_of_other_responses_than_those_at_hand_are_counted(out, capsys):
    made = rank(out, "--opinions", "2")
    assert "of other responses" not in capsys.readouterr().out
    path = out / "responses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["responses"][0] += "!"  # as another model might have said
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(rank(out, "--opinions", "2")) == len(made) + 2
    assert "2 of the rankings there are of other responses" in capsys.readouterr().out


def test_rankings_of_a_judge_or_principles_replaced_under_their_names_are_not_mixed(out, tmp_path, capfd):
    judge, principles = folder_of(tmp_path / "judge", 0, 400), tmp_path / "mine.txt"
    principles.write_text("Short is better.")
    options = ["--annotator", "model", "--judge", str(judge), "--principles", str(principles)]
    made = rank(out, *options)
    words = ["--stage", "rank", "--out", str(out), "--precision", "float32", *options]
    capfd.readouterr()
    folder_of(judge, 1, 400)
    assert "other weights of --judge" in refusal(rlhf, words, capfd)
    folder_of(judge, 0, 400)
    principles.write_text("Long is better.")
    assert "other --principles" in refusal(rlhf, words, capfd)
    principles.write_text("Short is better.")
    assert rank(out, *options) == made


@pytest.mark.parametrize("there", [0, 1, 64, 65, 99, 100])
def test_rankings_of_a_file_are_the_same_after_an_interruption_at_any_of_them(tmp_path, there):
    """A hundred records, of which one is repeated and one contradicted further on."""

    def record(i: int, turned: bool = False) -> dict:
        better, worse = (f"{i} cats", f"{i} dogs")[:: -1 if turned else 1]
        return {"instruction": f"{i}?", "chosen": better, "rejected": worse}

    records = [record(i) for i in range(98)]
    records = [*records[:70], record(2), *records[70:90], record(3, turned=True), *records[90:]]
    data, out = tmp_path / "friends.jsonl", tmp_path / "rlhf"
    data.write_text("".join(json.dumps(one) + "\n" for one in records))
    options = ["--annotator", "file", "--data", str(data)]
    whole = rank(out, *options)
    assert len(whole) == 100
    path = out / "rankings.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:there]))
    assert rank(out, *options) == whole
    assert rank(out, *options) == whole, "nothing is left to add"


def test_simulated_annotators_give_each_set_their_opinions(out):
    made = rank(out, "--opinions", "2")
    asked = [json.dumps(given.messages) for given in read_responses(out / "responses.jsonl")]
    assert Counter(json.dumps(messages) for _, messages, _ in made) == dict.fromkeys(asked, 2)
    assert rank(out, "--opinions", "2") == made, "nothing is left to rank"
    rlhf.main(["--stage", "agreement", "--out", str(out)])
    report = json.loads((out / "agreement.json").read_text())
    assert report["rows"]["all"]["prompts"]["value"] == len(asked)


def test_ranking_stopped_at_any_byte_goes_on_to_the_same_rankings(out):
    made = rank(out)
    path = out / "rankings.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert rank(out) == made
    assert (out / "rankings.jsonl.torn").exists()


def test_rankings_of_other_settings_are_not_mixed_and_overwriting_keeps_the_old_ones(out, capfd):
    made = rank(out)
    capfd.readouterr()
    words = ["--stage", "rank", "--out", str(out), "--noise", "2"]
    assert "other --noise, 1.0 and not 2.0" in refusal(rlhf, words, capfd)
    assert rank(out, "--noise", "2", "--overwrite") != made
    kept = [(r.annotator, r.messages, r.ranking) for r in read_rankings(out / "rankings.jsonl.old1")]
    assert kept == made
    rank(out, "--noise", "3", "--overwrite")
    assert len(read_rankings(out / "rankings.jsonl.old2")) == len(made), "nothing is ever lost"


def test_where_no_ranking_is_left_any_setting_may_begin(out):
    rank(out)
    (out / "rankings.jsonl").unlink()
    assert rank(out, "--noise", "2")


def test_a_model_ranks_by_principles_and_published_rankings_are_added_under_their_names(
    out, model, tmp_path, capsys
):
    (tmp_path / "short.txt").write_text("Short is better.")
    judged = rank(
        out, "--annotator", "model", "--judge", str(model), "--principles", str(tmp_path / "short.txt")
    )
    assert {name for name, _, _ in judged} == {f"model-{model}"} and judged
    left_out = int(capsys.readouterr().out.split(" sets left out")[0].split()[-1]) if len(judged) < 23 else 0
    assert len(judged) + left_out == 23
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"instruction": "Add 1 and 1.", "chosen": "2", "rejected": "3"}\n{"title": "none"}\n')
    for _ in range(2):
        both = rank(out, "--annotator", "file", "--data", str(pairs))
        assert both == [*judged, ("pairs.jsonl", [{"role": "user", "content": "Add 1 and 1."}], [[0], [1]])]
    assert "left out or cut: 1 records in no known format" in capsys.readouterr().out


def test_sets_that_the_judge_cannot_read_are_counted(out, tmp_path, monkeypatch, capsys):
    asked, rank_set = [], annotators.ByPrinciples.__call__

    def rank_or_not(self, given):
        asked.append(given)
        return rank_set(self, given) if len(asked) > 3 else [None]

    monkeypatch.setattr(annotators.ByPrinciples, "__call__", rank_or_not)
    (tmp_path / "short.txt").write_text("Short is better.")
    judge, principles = folder_of(tmp_path / "judge", 0, 400), tmp_path / "short.txt"
    options = ["--annotator", "model", "--judge", str(judge), "--principles", str(principles)]
    assert len(rank(out, *options)) == 20
    assert "3 sets left out: too long for the judge" in capsys.readouterr().out
    (out / "rankings.jsonl").unlink()
    monkeypatch.setattr(annotators.ByPrinciples, "__call__", lambda self, given: [None])
    with pytest.raises(SystemExit):
        rank(out, *options)
    assert "no set fits its context" in capsys.readouterr().err


class Terminal:
    """A person at a pseudo-terminal, with rlhf.py on its other end."""

    def __init__(self, out: Path) -> None:
        master, slave = pty.openpty()
        words = ["rlhf.py", "--stage", "rank", "--annotator", "person", "--name", "Ada", "--out", str(out)]
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.master = master
        self.read()

    def read(self) -> str:
        """What shows up to the next prompt of the screen, which alone begins a line (or follows what
        readline says to a terminal first)."""
        shown = ""
        while not re.search(r"(\n|\x1b\[\?2004h)> $", shown):
            shown += os.read(self.master, 1).decode(errors="replace")
        return shown

    def type(self, line: str) -> str:
        os.write(self.master, line.encode() + b"\n")
        return self.read()

    def quit(self) -> None:
        os.write(self.master, b"q\n")
        try:
            while os.read(self.master, 1024):
                pass
        except OSError:  # how Linux says that the other end is closed
            pass
        assert self.process.wait() == 0
        os.close(self.master)


def test_a_person_ranks_undoes_quits_and_goes_on_at_a_terminal(out):
    def stored():
        return [r.messages for r in read_rankings(out / "rankings.jsonl")]

    asked = [s.messages for s in read_responses(out / "responses.jsonl")]
    ada = Terminal(out)
    assert "1 of 23 ranked" in ada.type("A > B > C")
    assert stored() == asked[:1], "on the disk before the next set shows"
    assert "2 of 23 ranked" in ada.type("b>A=c")
    assert "C missing; rank them all" in ada.type("A>B")
    assert stored() == asked[:2]
    assert "1 of 23 ranked" in ada.type("u")
    assert stored() == asked[:1]
    ada.quit()
    ada = Terminal(out)
    assert "2 of 23 ranked, 0 skipped" in ada.type("C>B>A")
    assert "2 of 23 ranked, 1 skipped" in ada.type("s")
    ada.process.send_signal(signal.SIGKILL)
    ada.process.wait()
    assert stored() == asked[:2]
    assert read_rankings(out / "rankings.jsonl")[0].annotator == "Ada"


# ---- Bad input: one line, exit 2, nothing lost

BAD_INPUT = {
    "unknown stage": ("--stage dance", "stage"),
    "unknown option": ("--stage sample --beam 3", "--beam"),
    "one response": ("--stage sample --responses 1", "--responses"),
    "ten responses": ("--stage sample --responses 10", "--responses"),
    "only distractors": ("--stage sample --distractors 4", "--distractors"),
    "a distractor without a second prompt": ("--stage sample --prompts 1 --distractors 1", "2 are needed"),
    "no prompts": ("--stage sample --prompts 0", "--prompts"),
    "greedy": ("--stage sample --temperature 0", "--temperature"),
    "nucleus of more than all": ("--stage sample --top-p 2", "--top-p"),
    "no room": ("--stage sample --max-new-tokens 160", "--max-new-tokens"),
    "models where responses go": ("--stage sample --models {m} --out {m} --overwrite", "this stage writes"),
    "missing model": ("--stage sample --models nowhere", "nowhere"),
    "no models": ("--stage sample --models", "--models"),
    "missing data": ("--stage sample --data nowhere.jsonl", "nowhere.jsonl"),
    "data without conversations": ("--stage sample --data {d}/fields.jsonl", "title"),
    "weighted prompts": ("--stage sample --data {d}/chats.jsonl:2", "weight"),
    "out holds something else": ("--stage sample --out {d}", "not a run"),
    "out holds a run": ("--stage sample --out {s}", "--overwrite"),
    "resume with other options": ("--stage sample --resume --out {s} --top-k 3", "--top-k"),
    "resume of nothing": ("--stage sample --resume --out {d}", "no run to resume"),
    "resume of a ranking": ("--stage rank --resume --out {s}", "--resume"),
    "no responses to rank": ("--stage rank", "--stage sample"),
    "unknown annotator": ("--stage rank --annotator oracle", "annotator"),
    "no annotators": ("--stage rank --annotators 0", "--annotators"),
    "negative noise": ("--stage rank --noise -1", "--noise"),
    "no opinion": ("--stage rank --opinions 0", "--opinions"),
    "responses that are none": ("--stage rank --out {b}", "line 1"),
    "responses to prompts of ones own": ("--stage rank --out {o}", "little world"),
    "no name": ("--stage rank --annotator person --name=", "--name"),
    "no judge": ("--stage rank --annotator model --out {s}", "--judge"),
    "missing judge": ("--stage rank --annotator model --judge nowhere --out {s}", "nowhere"),
    "no principles": (
        "--stage rank --annotator model --judge {m} --principles {d}/no.txt --out {s}",
        "no.txt",
    ),
    "no file to read": ("--stage rank --annotator file", "--data"),
    "a missing file of rankings": ("--stage rank --annotator file --data nowhere.jsonl", "nowhere.jsonl"),
    "a file without a ranking": ("--stage rank --annotator file --data {d}/chats.jsonl", "no ranking"),
    "a torn line of rankings": ("--stage rank --annotator file --data {d}/torn.jsonl", "line 2"),
    "weighted rankings": ("--stage rank --annotator file --data {d}/torn.jsonl:3", "weight"),
    "its own rankings": ("--stage rank --annotator file --data {o}/rankings.jsonl --out {o}", "rankings go"),
    "no rankings": ("--stage agreement", "--stage rank"),
    "no overlap": ("--stage agreement --out {o}", "two annotators"),
}


def write_bad_files(folder: Path) -> None:
    for name in ("data", "broken", "own"):
        (folder / name).mkdir(parents=True)
    said = [{"role": "user", "content": "Who?"}]
    (folder / "data" / "fields.jsonl").write_text('{"title": "no conversation"}\n')
    (folder / "data" / "chats.jsonl").write_text('{"question": "Who?", "answer": "I."}\n')
    (folder / "data" / "torn.jsonl").write_text(
        '{"instruction": "x", "chosen": "a", "rejected": "b"}\n{"inst'
    )
    (folder / "broken" / "responses.jsonl").write_text('{"messages": "Who?", "responses": ["a", "b"]}\n')
    given = {"messages": said, "responses": ["a", "b"]}
    (folder / "own" / "responses.jsonl").write_text(json.dumps(given) + "\n")
    ranked = {"ranking": [[0], [1]], "annotator": "Ada", "seed": 0, "time": "2026-01-31T12:00:00"}
    (folder / "own" / "rankings.jsonl").write_text(json.dumps(given | ranked) + "\n")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_and_exit_2_and_changes_nothing(case, model, sampled, tmp_path, capfd):
    write_bad_files(tmp_path)
    before = folder_bytes(tmp_path), folder_bytes(sampled)
    options, words = BAD_INPUT[case]
    places = {
        "d": tmp_path / "data",
        "b": tmp_path / "broken",
        "o": tmp_path / "own",
        "s": sampled,
        "m": model,
    }
    given = options.format(**places).split()
    defaults = {"--models": str(model), "--out": str(tmp_path / "out")}
    if "--resume" not in given:
        given += missing_words(given, defaults)
    assert words in refusal(rlhf, given, capfd)
    assert before == (folder_bytes(tmp_path), folder_bytes(sampled))
