"""Whole runs of the reward stage through the command line: trained, killed, resumed, shared out, refused."""

import json
from pathlib import Path

import pytest
import torch
from runs import (
    SHARDED,
    assert_same_run,
    assert_two_processes_follow,
    folder_bytes,
    killed_at_update,
    metrics_of,
    missing_words,
    refusal,
    tiny_model,
)

import rlhf
from minillm.chat import ChatTemplate, with_chat_template
from minillm.io.huggingface import load_model, load_scalar_model, save_model, save_scalar_model
from minillm.io.rankings import read_rankings
from minillm.model import scalar_from_language_model, score_rows
from minillm.optim import LearningRates
from minillm.preferences import Ranking, ranking_by
from minillm.reward import encode_response
from minillm.tools.report import report_text
from minillm.world import KINDS, World

pytestmark = pytest.mark.usefixtures("quick_plots")

SHORT = "--batch-sets 4 --val-every 4 --save-every 3 --warmup 2 --precision float32".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> Path:
    """A model that knows nothing yet, in the layout that the stage starts from."""
    folder = tmp_path_factory.mktemp("assistant") / "sft"
    model, tokenizer = tiny_model()
    save_model(folder, model, with_chat_template(tokenizer))
    return folder


def ranking_of(i: int, annotator: str = "a") -> Ranking:
    """The more cats the better, whatever was asked; two of three tie now and then."""
    counts = [i % 5, (i * 7) % 4, (i + 3) % 6]
    responses = [f"{count} cats." for count in counts]
    messages = [{"role": "user", "content": f"How many cats on day {i}?"}]
    return Ranking(messages, responses, ranking_by(counts), annotator, 0, "2026-01-31T12:00:00")


def write_rankings(path: Path, rankings: list[Ranking]) -> Path:
    path.write_text("".join(json.dumps(vars(ranking)) + "\n" for ranking in rankings))
    return path


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> Path:
    """Rankings of 48 prompts, every sixth by two annotators."""
    rankings = [ranking_of(i, annotator) for i in range(48) for annotator in ("a", "b")[: 1 + (i % 6 == 0)]]
    return write_rankings(tmp_path_factory.mktemp("ranked") / "rankings.jsonl", rankings)


def arguments(assistant: Path, ranked: Path, out: Path, *options: str) -> list[str]:
    places = ["--stage", "reward", "--init", str(assistant), "--rankings", str(ranked), "--out", str(out)]
    return [*places, *SHORT, *options]


@pytest.fixture(scope="module")
def reference(assistant, ranked, tmp_path_factory) -> Path:
    """An uninterrupted run to compare with."""
    out = tmp_path_factory.mktemp("reference") / "rlhf"
    rlhf.main(arguments(assistant, ranked, out))
    return out / "reward"


def test_a_finished_run_leaves_a_complete_folder_and_a_final_line(reference, ranked):
    events = metrics_of(reference)
    final, report = events[-1], json.loads((reference / "report.json").read_text())
    held_out = report["rankings"]
    assert final["event"] == "final"
    assert final["step"] == -(-(48 - report["prompts"]) // 4), "every set once, whoever ranked it"
    assert final["accuracy"] == report["pairs"]["all"]["accuracy"]["value"]
    val = [event for event in events if event["event"] == "val"][-1]
    assert val["step"] == final["step"], "also where the last step is no tenth"
    assert val["accuracy"] == pytest.approx(final["accuracy"]), "validation is on the held-out rankings too"
    texts = read_rankings(ranked)
    assert next(iter(report["whole"].values()))["value"]["value"] == 1 and report[
        "prompts"
    ] <= held_out < len(texts)
    assert {p.name for p in reference.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json",
        "metrics.jsonl", "loss.png", "report.json", "report.png", "resume",
    }  # fmt: skip
    assert json.loads((reference / "run.json").read_text())["stage"] == "reward"


def test_it_learns_the_order_of_responses_it_has_not_seen(assistant, ranked, tmp_path, capfd):
    rlhf.main(arguments(assistant, ranked, tmp_path / "out", "--epochs", "6", "--val-fraction", "0.3"))
    report = json.loads((tmp_path / "out" / "reward" / "report.json").read_text())
    assert report["pairs"]["all"]["accuracy"]["value"] > 0.9
    assert report_text(report) in capfd.readouterr().out


def test_the_best_responses_score_zero_on_average_where_there_are_no_demonstrations(reference, ranked):
    model, tokenizer = load_scalar_model(reference, CPU, torch.float32)
    template, held_out = ChatTemplate(tokenizer), json.loads((reference / "report.json").read_text())
    best = [
        encode_response(template, ranking.messages, ranking.responses[ranking.ranking[0][0]])
        for ranking in read_rankings(ranked)
    ]
    scores = score_rows(model, best)
    # Over all rankings, of which the held-out ones were not among those shifted to zero.
    most = held_out["rankings"] / len(best) * (max(scores) - min(scores))
    assert abs(sum(scores) / len(scores)) <= most
    assert model.bias != 0 and model.bias == metrics_of(reference)[-1]["bias"]


def test_on_the_little_world_its_conversations_score_zero_and_the_rubric_judges(tmp_path):
    world, rankings = World(0), []
    for prompt in world.prompts("reward", n=30):
        texts = ["No.", "It is fine."]
        values = [world.score(prompt, text).utility for text in texts]
        rankings.append(
            Ranking(prompt.messages, texts, ranking_by(values), "a", 0, "2026-01-31", prompt.kind)
        )
    wide, out, (model, tokenizer) = tmp_path / "wide", tmp_path / "out", tiny_model(longest=600)
    save_model(wide, model, with_chat_template(tokenizer))
    path = write_rankings(tmp_path / "world.jsonl", rankings)
    rlhf.main(arguments(wide, path, out, "--val-fraction", "0.3"))
    report = json.loads((out / "reward" / "report.json").read_text())
    kinds = {label.removeprefix("of ") for label in report["pairs"] if label.startswith("of ")}
    assert report["pairs"]["all"]["ceiling"]["value"] == 1 and kinds and kinds <= set(KINDS)
    model, tokenizer = load_scalar_model(out / "reward", CPU, torch.float32)
    template = ChatTemplate(tokenizer)
    shown = [c.messages for c in world.conversations("train", rlhf.DEMONSTRATIONS)]
    scores = score_rows(model, [encode_response(template, m[:-1], m[-1]["content"]) for m in shown])
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)


def test_training_is_at_the_rates_asked_for_and_learns_from_the_mean_values_too(
    assistant, ranked, tmp_path, monkeypatch
):
    seen = []

    def noted(made):
        return lambda *given, **more: seen.append((given[1:], more)) or made(*given, **more)

    for name in ("scalar_from_language_model", "build_optimizers", "scores_of"):
        monkeypatch.setattr(rlhf, name, noted(getattr(rlhf, name)))
    rates = "--matrix-rate 1e-3 --embedding-rate 2e-3 --weight-decay 0.1 --decay 0 --clip 0.3 --seed 7"
    with killed_at_update(2) as updates:
        rlhf.main(arguments(assistant, ranked, tmp_path / "out", *rates.split()))
    assert updates == [(1 / 3, 0.3), (2 / 3, 0.3)], "the schedule's rates after --warmup 2, and --clip"
    ((generator, blocks), _), *seen = seen
    assert (generator.initial_seed(), blocks) == (7, 1)
    assert seen == [((LearningRates(1e-3, 2e-3, 0.1), "adamw"), {}), ((), {"means": True})]


@pytest.mark.parametrize("blocks", [0, 2])
def test_it_starts_from_the_assistants_trunk_under_new_blocks(assistant, ranked, tmp_path, blocks):
    """At rates too small to matter the trunk that comes out is the one that went in."""
    slow = ("--matrix-rate", "1e-12", "--embedding-rate", "1e-12", "--new-blocks", str(blocks))
    rlhf.main(arguments(assistant, ranked, tmp_path / "out", *slow))
    before, _ = load_model(assistant, CPU, torch.float32)
    after, _ = load_scalar_model(tmp_path / "out" / "reward", CPU, torch.float32)
    assert len(after.model.layers) == len(before.model.layers) + blocks
    found = dict(after.model.named_parameters())
    for name, one in before.model.named_parameters():
        torch.testing.assert_close(one, found[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("update", [1, 6])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(assistant, ranked, reference, tmp_path, update):
    """Before there is a restart point, and two steps behind one."""
    with killed_at_update(update):
        rlhf.main(arguments(assistant, ranked, tmp_path / "out"))
    rlhf.main(["--stage", "reward", "--out", str(tmp_path / "out"), "--resume"])
    assert_same_run(reference, tmp_path / "out" / "reward")
    first, second = ((p / "report.json").read_bytes() for p in (reference, tmp_path / "out" / "reward"))
    assert first == second


def test_a_finished_run_has_nothing_to_resume(reference, capfd):
    before = folder_bytes(reference)
    rlhf.main(["--stage", "reward", "--out", str(reference.parent), "--resume"])
    assert "already finished" in capfd.readouterr().out
    assert folder_bytes(reference) == before


@pytest.mark.parametrize("extra", [(), SHARDED], ids=["each holds all", "sharded"])
def test_two_processes_follow_the_curve_of_one(assistant, ranked, tmp_path, reference, extra):
    out = tmp_path / "rlhf"
    words = arguments(assistant, ranked, out, *extra)
    assert_two_processes_follow(reference, rlhf, words, out / "reward", rel=5e-3)


# Bad input: one line, exit 2, nothing lost


def write_bad_files(folder: Path) -> None:
    """Rankings that teach nothing, and models that cannot be started from."""
    (folder / "empty.jsonl").touch()
    good = json.dumps(vars(ranking_of(1)))
    (folder / "torn.jsonl").write_text(f"{good[:40]}\n{good}\n")
    write_rankings(folder / "prompt.jsonl", [ranking_of(1)])
    tied = [{**vars(ranking_of(i)), "ranking": [[0, 1, 2]]} for i in range(4)]
    (folder / "tied.jsonl").write_text("".join(json.dumps(one) + "\n" for one in tied))
    one = {**vars(ranking_of(1)), "responses": ["Yes."], "ranking": [[0]]}
    (folder / "alone.jsonl").write_text(json.dumps(one) + "\n")
    long = [{**vars(ranking_of(i)), "responses": ["cats " * 200] * 3} for i in range(4)]
    (folder / "long.jsonl").write_text("".join(json.dumps(one) + "\n" for one in long))
    model, tokenizer = tiny_model(causal=False)
    save_model(folder / "both", model, tokenizer)
    model, tokenizer = tiny_model()
    scalar = scalar_from_language_model(model, torch.Generator().manual_seed(0))
    save_scalar_model(folder / "scalar", scalar, with_chat_template(tokenizer))


BAD_INPUT = {
    "missing file": ("--rankings nowhere.jsonl", "nowhere.jsonl"),
    "no rankings": ("--rankings {d}/empty.jsonl", "no ranking"),
    "unreadable line": ("--rankings {d}/torn.jsonl", "line 1"),
    "all tied": ("--rankings {d}/tied.jsonl", "tied"),
    "one response": ("--rankings {d}/alone.jsonl", "at least 2"),
    "one prompt": ("--rankings {d}/prompt.jsonl", "one prompt"),
    "all too long for the model": ("--rankings {d}/long.jsonl", "80 positions"),
    "init from nowhere": ("--init nowhere", "nowhere"),
    "init from a folder that is no model": ("--init {d}", "config.json"),
    "init from a reward model": ("--init {d}/scalar", "reward model"),
    "init from a model that sees both sides": ("--init {d}/both", "causal"),
    "no stage": ("--stage nothing", "stage"),
    "no epochs": ("--epochs 0", "--epochs"),
    "a rate of nothing": ("--matrix-rate 0", "--matrix-rate"),
    "validation of everything": ("--val-fraction 1", "--val-fraction"),
    "out holds a run": ("--out {r}", "--overwrite"),
    "resume with other options": ("--out {r} --resume --epochs 2", "--epochs"),
    "resume of nothing": ("--out {d} --resume", "no run"),
    "unknown option": ("--lora 3", "--lora"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_and_exit_2_and_changes_nothing(
    case, assistant, ranked, reference, tmp_path, capfd
):
    bad = tmp_path / "bad"
    bad.mkdir()
    write_bad_files(bad)
    before = folder_bytes(reference), folder_bytes(bad)
    options, words = BAD_INPUT[case]
    given = options.format(d=bad, r=reference.parent).split()
    defaults = {"--stage": "reward"}
    if "--resume" not in given:
        defaults |= {"--rankings": str(ranked), "--init": str(assistant), "--out": str(tmp_path / "out")}
    given += missing_words(given, defaults)
    assert words in refusal(rlhf, given, capfd)
    assert before == (folder_bytes(reference), folder_bytes(bad))
    assert not (tmp_path / "out").exists()


def test_a_step_that_processes_cannot_share_is_refused():
    options = rlhf.Options(stage="reward", batch_sets=5)
    with pytest.raises(rlhf.InputError, match="--batch-sets 5"):
        rlhf.steps_of([], options, rlhf.Runtime(CPU, torch.float32, rank=0, world_size=2))
