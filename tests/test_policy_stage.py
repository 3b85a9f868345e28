"""Whole runs of the policy stage through the command line: it learns, stops and goes on exactly, refuses."""

import gzip
import json
import math
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import (
    HERE,
    ROOT,
    Killed,
    assert_same_run,
    folder_bytes,
    in_two_processes,
    killed_at_update,
    losses_of,
    metrics_of,
    missing_words,
    refusal,
    tiny_model,
)
from safetensors.torch import load_file

import rlhf
from minillm.chat import with_chat_template
from minillm.corpus import split_by_hash, unit_hash
from minillm.errors import InputError
from minillm.io.conversations import check_world_is_meant, read_all
from minillm.io.huggingface import load_model, save_model, save_scalar_model
from minillm.model import ScalarModel, scalar_from_language_model
from minillm.optim import lr_schedule
from minillm.ppo import adapted_beta
from minillm.preferences import Ranking, ranking_by
from minillm.tokenizer import Tokenizer
from minillm.world import World

pytestmark = pytest.mark.usefixtures("quick_plots")

ALGORITHMS = ("ppo", "grpo", "dpo")
SHORT = {
    "--iterations": "5", "--rollout-batch": "16", "--prompts": "40", "--max-new-tokens": "8",
    "--val-prompts": "8", "--val-fraction": "0.3", "--val-every": "2", "--save-every": "1", "--warmup": "0",
    "--critic-warmup": "1", "--precision": "float32", "--batch-sets": "4", "--ptx-tokens": "80",
    "--missing-eos-score": "None",  # such a model never ends a response
}  # fmt: skip


def reward_model() -> ScalarModel:
    """One whose blocks do something, those start at zero: else all rows that end alike would score alike."""
    trunk, generator = tiny_model()[0], torch.Generator().manual_seed(0)
    for name, weight in trunk.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return scalar_from_language_model(trunk, generator)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """An assistant that knows nothing yet, a reward model that likes what it likes, prompts and rankings."""
    folder = tmp_path_factory.mktemp("places")
    model, tokenizer = tiny_model()
    save_model(folder / "sft", model, with_chat_template(tokenizer))
    save_scalar_model(folder / "reward", reward_model(), with_chat_template(tokenizer))
    asked = [[{"role": "user", "content": f"How many cats on day {i}?"}] for i in range(40)]
    reply = {"role": "assistant", "content": "No cats."}
    (folder / "asked.jsonl").write_text(
        "".join(json.dumps({"messages": [*messages, reply]}) + "\n" for messages in asked)
    )
    rankings = [
        Ranking(m, ["No cats.", "7 cats.", "1 cat."], ranking_by([2, 0, 1]), "a", 0, "2026-01-31")
        for m in asked
    ]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in rankings))
    (folder / "raw.txt").write_text("A day without cats is a fine day for the birds in it. " * 60)
    return {
        "--init": str(folder / "sft"), "--reward": str(folder / "reward"),
        "--data": str(folder / "asked.jsonl"), "--rankings": str(folder / "rankings.jsonl"),
    }  # fmt: skip


def arguments(places: dict[str, str], out: Path, *options: str, algorithm: str = "ppo") -> list[str]:
    start = ["--stage", "policy", "--algorithm", algorithm, "--out", str(out), *options]
    return [*start, *missing_words(list(options), SHORT | places)]


def everything(places: dict[str, str], algorithm: str) -> list[str]:
    """Every part that a restart has to bring back: raw text, a moving average, a moving β."""
    if algorithm == "dpo":
        return []
    raw = str(Path(places["--data"]).parent / "raw.txt")
    moving = "--ptx 0.5 --ema-decay 0.8 --adaptive-kl-target 0.01 --group-size 4 --temperature 0.9 --warmup 3"
    return [*moving.split(), "--text", raw]


@pytest.fixture(scope="module", params=ALGORITHMS)
def reference(request, places, tmp_path_factory) -> tuple[str, Path]:
    """An uninterrupted run of each algorithm to compare with."""
    out = tmp_path_factory.mktemp("reference") / "rlhf"
    extra = everything(places, request.param)
    cache = ["--cache", str(out.parent / "cache")]
    rlhf.main(arguments(places, out, *extra, *cache, algorithm=request.param))
    return request.param, out / request.param


def test_a_finished_run_leaves_a_complete_folder_with_the_best_policy(reference):
    algorithm, out = reference
    events = metrics_of(out)
    final, vals = events[-1], [event for event in events if event["event"] == "val"]
    kept = next(val for val in vals if val["step"] == final["kept_step"])
    assert final["event"] == "final" and final["objective"] == kept["objective"]
    if algorithm == "dpo":  # β moves in the others: an earlier objective is not that of the β of now
        assert kept["objective"] == max(val["objective"] for val in vals) == -kept["loss"]
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "run.json", "metrics.jsonl", "loss.png", "curves.png", "resume",
    }  # fmt: skip
    assert {"score", "kl", "length", "unended", "entropy"} <= vals[0].keys()
    assert vals[-1]["step"] == final["step"], "also where the last step is no tenth"
    assert vals[0]["step"] == 0 and vals[0]["kl"] == pytest.approx(0, abs=1e-6)
    if algorithm != "dpo":
        trained = [event for event in events if event["event"] == "train"]
        assert {"ratio_max", "ratio_min", "clip_share", "beta", "text_loss"} <= trained[-1].keys()
        assert all(event["ratio_min"] <= 1 <= event["ratio_max"] for event in trained[1:])
        assert final["tokens"] == sum(round(16 * event["length"]) for event in trained)
    load_model(out, torch.device("cpu"), torch.float32)


def test_rates_and_beta_follow_their_schedule_and_target_and_only_a_critic_begins_alone(reference):
    algorithm, out = reference
    trained = [event for event in metrics_of(out) if event["event"] == "train"]
    each, warmup = (1, 0) if algorithm == "dpo" else (4, 3)
    for event in trained:
        first = (event["step"] - 1) * each
        updates = range(first, first + int(event.get("updates", 1)))
        rates = [lr_schedule(update, each * len(trained), warmup, 1.0) for update in updates]
        assert event["rate"] == pytest.approx(sum(rates) / len(rates))
    if algorithm != "dpo":
        moved = [event["step"] for event in trained if "policy_loss" in event]
        assert moved == list(range(1 + (algorithm == "ppo"), 6)), "--critic-warmup 1"
        for one, other in pairwise(trained):
            assert other["beta"] == pytest.approx(adapted_beta(one["beta"], one["kl"], 0.01))


def test_another_seed_deals_the_prompts_in_another_order_and_a_run_of_the_critic_alone_is_told(
    places, tmp_path, monkeypatch, capsys
):
    asked = []

    def noted(self, prompts, step):
        asked.append([prompt.messages for prompt in prompts])
        raise Killed

    monkeypatch.setattr(rlhf.Aligner, "rollout", noted)
    for seed in ("0", "1"):
        with pytest.raises(Killed):
            rlhf.main(arguments(places, tmp_path / seed, "--seed", seed, "--critic-warmup", "5"))
        assert "--critic-warmup 5: only the critic learns" in capsys.readouterr().out
    assert [len(prompts) for prompts in asked] == [16, 16] and asked[0] != asked[1]


def test_the_page_on_the_stages_explains_figures_that_a_run_has(reference):
    algorithm, out = reference
    page = (ROOT / "docs" / "stages.md").read_text().split("### Reading a run")[1]
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    held = {name for event in metrics_of(out) for name in event}
    rollouts = {"old_kl", "beta", "ratio_max", "ratio_min", "clip_share"}
    missing = {"ppo": set(), "grpo": {"explained_variance"}, "dpo": {"explained_variance", *rollouts}}
    assert explained - held == missing[algorithm] | {"rubric"}, "the rubric is the little world's alone"


# Four updates an iteration: before the first restart point, where only the critic has moved, and later.
@pytest.mark.parametrize("update", [3, 14])
def test_a_killed_run_goes_on_to_the_same_curve_and_weights(reference, places, tmp_path, update):
    algorithm, expected = reference
    update = 1 + update // 3 if algorithm == "dpo" else update  # one update a step there
    cache = ["--cache", str(tmp_path / "cache")]
    given = arguments(places, tmp_path / "out", *everything(places, algorithm), *cache, algorithm=algorithm)
    with killed_at_update(update):
        rlhf.main(given)
    rlhf.main(["--stage", "policy", "--algorithm", algorithm, "--out", str(tmp_path / "out"), "--resume"])
    assert_same_run(tmp_path / "out" / algorithm, expected)


def test_resuming_a_finished_run_changes_nothing(reference, places):
    algorithm, out = reference
    before = folder_bytes(out)
    rlhf.main(["--stage", "policy", "--algorithm", algorithm, "--out", str(out.parent), "--resume"])
    assert folder_bytes(out) == before


@pytest.mark.parametrize(("day", "without"), [("on Day", 0), ("on day", 1)], ids=["to learn", "held out"])
def test_a_run_does_not_go_on_with_other_prompts_or_rankings(
    reference, places, tmp_path, capfd, day, without
):
    algorithm, out = reference
    shutil.copytree(out, tmp_path / algorithm)
    name = "rankings" if algorithm == "dpo" else "data"
    lines = Path(places[f"--{name}"]).read_text().replace("on day", day).splitlines()
    asked = [
        [message for message in json.loads(line)["messages"] if message["role"] == "user"] for line in lines
    ]
    _, held_out = split_by_hash(lines, [unit_hash(json.dumps(messages)) for messages in asked], 0.3)
    less = set(held_out[:without])
    (tmp_path / "other.jsonl").write_text("".join(f"{line}\n" for line in lines if line not in less))
    run = json.loads((out / "run.json").read_text())
    run["options"][name] = [str(tmp_path / "other.jsonl")]
    (tmp_path / algorithm / "run.json").write_text(json.dumps(run))
    again = ["--stage", "policy", "--algorithm", algorithm, "--out", str(tmp_path), "--resume"]
    what = "rankings" if algorithm == "dpo" else "prompts"
    what = "what is held out" if without else f"content of '{what}'"
    assert what in refusal(rlhf, again, capfd, shown=True)


@pytest.fixture(scope="module")
def many(places, tmp_path_factory) -> dict[str, str]:
    """More prompts: with about 80 held out, a mean score is known to a ninth of its deviation."""
    path = tmp_path_factory.mktemp("many") / "asked.jsonl"
    asked = [f"How many cats on day {i}?" for i in range(160)]
    path.write_text("".join(json.dumps({"question": one, "answer": "No cats."}) + "\n" for one in asked))
    return places | {"--data": str(path), "--prompts": "160", "--val-prompts": "80", "--val-fraction": "0.5"}


@pytest.mark.parametrize(("algorithm", "group"), [("ppo", "1"), ("grpo", "4")])
def test_the_policy_comes_to_score_higher_than_it_did(many, tmp_path, algorithm, group):
    options = (
        "--iterations 30 --rollout-batch 32 --beta 0 --policy-rate 1e-2 --val-every 30 --max-new-tokens 2"
    )
    rlhf.main(arguments(many, tmp_path / "out", *options.split(), "--group-size", group, algorithm=algorithm))
    first, last = (e for e in metrics_of(tmp_path / "out" / algorithm) if e["event"] == "val")
    # It gains 1.2 to 2.7 deviations, by seed; chance moves a mean of 80 by a ninth of one.
    assert last["score"] > first["score"] + 0.7 * first["score_deviation"]


def test_without_named_prompts_the_little_worlds_are_taken_only_where_some_of_them_were_used(
    places, tmp_path, capfd
):
    """Own prompts may have been sampled, or published rankings hold prompts of their own, whatever comes
    after."""
    words = ["--stage", "sample", "--models", places["--init"], "--data", places["--data"]]
    rlhf.main([*words, "--out", str(tmp_path / "own"), "--max-new-tokens", "4", "--prompts", "8"])
    pairs = [{"instruction": f"Add {i} and 1.", "chosen": f"{i + 1}", "rejected": "0"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ranked = ["--stage", "rank", "--annotator", "file", "--data", str(tmp_path / "pairs.jsonl")]
    rlhf.main([*ranked, "--out", str(tmp_path)])
    (tmp_path / "reward").symlink_to(places["--reward"])
    capfd.readouterr()
    unnamed = {"--init": places["--init"]}
    scored = unnamed | {"--reward": places["--reward"]}
    responses = str(tmp_path / "own" / "responses.jsonl")
    assert f"as in --data {responses}" in refusal(rlhf, arguments(scored, tmp_path / "own"), capfd)
    assert len(read_all([responses], "prompt")) == 8
    for algorithm in ("ppo", "grpo", "dpo", "best-of-n"):
        line = refusal(rlhf, arguments(unnamed, tmp_path, algorithm=algorithm), capfd)
        assert "rankings.jsonl" in line and "--data" in line
    packed = tmp_path / "pairs.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    dpo = arguments(unnamed | {"--rankings": str(packed)}, tmp_path / "published", algorithm="dpo")
    assert f"as in --data {packed}" in refusal(rlhf, dpo, capfd)
    elsewhere = unnamed | {"--reward": str(tmp_path / "reward")}
    assert "--data" in refusal(rlhf, arguments(elsewhere, tmp_path / "other"), capfd)
    rlhf.main([*words[:4], "--out", str(tmp_path / "little"), "--max-new-tokens", "4", "--prompts", "30"])
    check_world_is_meant(rlhf.Options(stage="policy", out=str(tmp_path / "little")))


def test_no_prompt_is_trained_on_and_held_out(places):
    paths = {name: places[f"--{name}"] for name in ("init", "reward")}
    options = rlhf.Options(
        stage="policy", **paths, data=(places["--data"],), val_prompts=8, val_fraction=0.3, max_new_tokens=8
    )
    aligner = rlhf.start_aligner(options, HERE)
    both = rlhf.policy_prompts(options, aligner)
    training, held_out = ({prompt.messages[0]["content"] for prompt in prompts} for prompts in both)
    assert len(held_out) == 8 and len(training) > 20 and not training & held_out


def test_a_process_without_prompts_is_refused():
    options = rlhf.Options(stage="policy", rollout_batch=16, group_size=8)
    rlhf.check_shares(options, HERE)
    with pytest.raises(InputError, match="--rollout-batch 16: its 2 minibatches have 1 prompts"):
        rlhf.align(options, replace(HERE, world_size=2))


@pytest.mark.parametrize("critic", ["reward", "policy"])
def test_the_critic_starts_as_a_copy_of_the_reward_model_or_on_one_of_the_policys_trunk(places, critic):
    paths = {name: places[f"--{name}"] for name in ("init", "reward")}
    aligner = rlhf.start_aligner(rlhf.Options(stage="policy", critic=critic, **paths), HERE)
    found, reward = (dict(model.named_parameters()) for model in (aligner.critic, aligner.reward_model))
    trunk = "model.layers.0.self_attn.q_proj.weight"
    start = (reward if critic == "reward" else dict(aligner.policy.named_parameters()))[trunk]
    assert torch.equal(found[trunk], start) and found[trunk].data_ptr() != start.data_ptr()
    assert torch.equal(found["score.weight"], reward["score.weight"]) == (critic == "reward")
    assert found["score.weight"].data_ptr() != reward["score.weight"].data_ptr()


@pytest.mark.parametrize(("beta", "kept"), [(0.1, 0), (1.0, 4), (3.0, 4)])
def test_the_policy_that_is_kept_is_the_best_by_the_beta_that_moved(beta, kept, monkeypatch):
    """Where β falls, a policy that went farther for its score becomes the better one, where it rises the
    worse one: the one kept so far and the new one are held against each other at the β of now."""
    found = iter([{"score": 3.0, "kl": 2.0, "unended": 0.0}, {"score": 2.5, "kl": 1.0, "unended": 0.0}])
    aligner = SimpleNamespace(beta=1.0, kept={}, validate=lambda prompts: next(found))
    aligner.options = rlhf.Options(stage="policy")
    aligner.objective = lambda metrics: metrics["score"] - aligner.beta * metrics["kl"]
    aligner.best, aligner.template = "best", SimpleNamespace(tokenizer="tokenizer")
    logged, saved = [], []
    monkeypatch.setattr(rlhf, "save_model", lambda *what: saved.append(what))
    run = SimpleNamespace(folder="out", runtime=HERE, log=lambda *_, **metrics: logged.append(metrics))
    for step, aligner.beta in ((0, 1.0), (4, beta)):
        run.state = SimpleNamespace(step=step)
        rlhf.validate(run, aligner, [], [])
    assert [metrics["kept_step"] for metrics in logged] == [0, kept] == [0, aligner.kept["step"]]
    assert [metrics["objective"] for metrics in logged] == [1.0, 2.5 - beta]
    assert saved == [("out", "best", "tokenizer")] * (1 + (kept == 4))


def test_dpo_starts_from_a_validated_start_keeps_nothing_worse_and_stops_where_it_runs_away(
    places, tmp_path, capfd
):
    lines = Path(places["--rankings"]).read_text().splitlines()
    contradictory = [
        json.dumps(json.loads(line) | {"ranking": [[0], [1], [2]] if i % 2 else [[2], [1], [0]]}) + "\n"
        for i, line in enumerate(lines)
    ]
    (tmp_path / "random.jsonl").write_text("".join(contradictory))
    options = ["--rankings", str(tmp_path / "random.jsonl"), "--epochs", "3", "--policy-rate", "1e-2"]
    rlhf.main(arguments(places, tmp_path / "a", *options, algorithm="dpo"))
    losses = [event["loss"] for event in metrics_of(tmp_path / "a" / "dpo") if event["event"] == "val"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and max(losses) > 1.01 * losses[0]
    assert final_of(tmp_path / "a" / "dpo")["loss"] == min(losses)
    given = arguments(places, tmp_path / "b", *options, "--max-kl", "0.1", algorithm="dpo")
    line = refusal(rlhf, given, capfd, shown=True)
    assert "nats a response from the reference" in line


def test_dpo_without_a_reward_model_tells_no_score(places, tmp_path):
    unscored = {name: value for name, value in places.items() if name != "--reward"}
    rlhf.main(arguments(unscored, tmp_path, algorithm="dpo"))
    vals = [event for event in metrics_of(tmp_path / "dpo") if event["event"] == "val"]
    assert vals and all("kl" in val and not {"score", "score_deviation"} & val.keys() for val in vals)


def test_dpo_comes_to_prefer_what_the_rankings_prefer_by_rewards_of_beta_a_nat(places, tmp_path):
    def losses(beta: str, event: str, *options: str) -> list[float]:
        out = tmp_path / beta / event
        rlhf.main(arguments(places, out, "--beta", beta, "--policy-rate", "3e-3", *options, algorithm="dpo"))
        events = metrics_of(out / "dpo")
        assert [e for e in events if e["event"] == "val"][-1]["kl"] > 0
        return [e["loss"] for e in events if e["event"] in ("val", event)]

    learned = losses("0.15", "train", "--epochs", "12")
    assert learned[0] > 1.5 * learned[-1]
    # A reward of nothing a nat: whatever the policy says, every pair stays a toss.
    assert losses("1e-6", "train") == pytest.approx([math.log(2)] * 13, abs=1e-4)


def test_best_of_n_gives_the_best_scored_of_its_responses(places, tmp_path):
    reports = {}
    for n in ("2", "6"):
        out = tmp_path / n
        rlhf.main(arguments(places, out, "--group-size", n, algorithm="best-of-n"))
        reports[n] = json.loads((out / "best-of-n" / "report.json").read_text())
        records = [json.loads(line) for line in (out / "best-of-n" / "responses.jsonl").open()]
        assert len(records) == reports[n]["prompts"] == 8
        assert reports[n]["score"] == pytest.approx(sum(r["score"] for r in records) / 8)
        assert reports[n]["unended"] > 0.5, "such a model hardly ends a response"
    assert reports["6"]["score"] > reports["2"]["score"]
    assert reports["6"]["largest_kl"] == pytest.approx(0.9584, abs=1e-4)


def test_best_of_n_that_a_full_disk_ended_is_begun_again_and_a_finished_one_is_kept(places, tmp_path, capfd):
    words = arguments(places, tmp_path, "--group-size", "2", algorithm="best-of-n")
    rlhf.main(words)
    report = tmp_path / "best-of-n" / "report.json"
    first = json.loads(report.read_text())["score"]
    report.unlink()
    rlhf.main(words)
    assert json.loads(report.read_text())["score"] == first
    assert "already holds a run" in refusal(rlhf, words, capfd, shown=True)


def test_on_the_little_world_its_splits_are_asked_and_its_rubric_judges(places, tmp_path):
    model, tokenizer = tiny_model(longest=400)
    for name, saved, save in (
        ("sft", model, save_model),
        ("reward", scalar_from_language_model(deepcopy(model), torch.Generator()), save_scalar_model),
    ):
        save(tmp_path / name, saved, with_chat_template(tokenizer))
    paths = {name: str(tmp_path / name) for name in ("init", "reward")} | {"init": str(tmp_path / "sft")}
    options = rlhf.Options(stage="policy", out=str(tmp_path), prompts=30, val_prompts=8, seed=3, **paths)
    aligner, world = rlhf.start_aligner(options, HERE), World(3)
    for prompts, split in zip(rlhf.policy_prompts(options, aligner), ("reward", "dev"), strict=True):
        asked = world.prompts(split, n=len(prompts))
        assert [prompt.messages for prompt in prompts] == [prompt.messages for prompt in asked]
        texts = ["It is fine.", "I don't know, you lazy fool."]
        for one, text in product(asked[:8], texts):
            assert aligner.rubric(one.messages, text) == world.utility(one.messages, text)
    assert len(prompts) == 8


SHARED_OUT = {
    "ppo": ("ppo", ""),
    "ppo, sharded": (
        "ppo",
        "--shard --checkpoint-activations --ema-decay 0.8 --kl-estimator exact --micro-tokens 100",
    ),
    "grpo, sharded": ("grpo", "--shard --kl-estimator exact --micro-tokens 60"),
    "dpo, sharded": ("dpo", "--shard --micro-tokens 100"),
}


@pytest.mark.parametrize("case", SHARED_OUT)
def test_two_processes_roll_out_and_learn_as_one_does(case, places, tmp_path):
    algorithm, extra = SHARED_OUT[case]
    # Without a bound on ratios: which token is clipped could hang on the last digit of a sum.
    options = ["--clip-range", "1000", "--iterations", "3", "--critic-warmup", "1", "--group-size", "2"]
    options += extra.split()
    one, two = (arguments(places, tmp_path / name, *options, algorithm=algorithm) for name in ("one", "two"))
    rlhf.main(one)
    in_two_processes(rlhf, two)
    first, second = (losses_of(metrics_of(tmp_path / name / algorithm)) for name in ("one", "two"))
    for (event, step, loss), (event_two, step_two, loss_two) in zip(first, second, strict=True):
        assert (event, step) == (event_two, step_two)
        # A sample may turn on rounding once the weights differ in it: the first two steps are held tight.
        assert loss == pytest.approx(loss_two, abs=1e-4 if step < 2 else 0.05)


def final_of(out: Path) -> dict:
    return metrics_of(out)[-1]


def test_an_iterations_metrics_are_means_of_its_updates_and_the_extreme_ratios(places, tmp_path, monkeypatch):
    update, found = rlhf.Aligner.update, list[dict[str, float]]()

    def noted(self, *given):
        found.append(update(self, *given))
        return found[-1]

    monkeypatch.setattr(rlhf.Aligner, "update", noted)
    rlhf.main(arguments(places, tmp_path, "--iterations", "1", "--critic-warmup", "0"))
    (event,) = (event for event in metrics_of(tmp_path / "ppo") if event["event"] == "train")
    each = {name: [one[name] for one in found] for name in found[0]}
    assert event["updates"] == len(found) == 4 and len(set(each["loss"])) == 4
    extremes = {"ratio_max": max(each["ratio_max"]), "ratio_min": min(each["ratio_min"])}
    means = {name: sum(values) / 4 for name, values in each.items()}
    assert {name: event[name] for name in means} == pytest.approx(means | extremes)


def test_passes_are_made_until_the_last_one_found_the_policy_too_far_from_its_samples(places, tmp_path):
    options = "--iterations 1 --critic-warmup 0 --policy-rate 2e-3 --decay 0 --target-kl".split()

    def trained(name: str, target: float, passes: int) -> dict:
        out = tmp_path / name
        rlhf.main(arguments(places, out, *options, str(target), "--ppo-epochs", str(passes)))
        return next(event for event in metrics_of(out / "ppo") if event["event"] == "train")

    first, both = (trained(str(passes), 0.99, passes) for passes in (1, 2))
    assert (first["updates"], both["updates"]) == (2, 4)
    second = 2 * both["old_kl"] - first["old_kl"]  # what the second pass found alone
    assert 0 < first["old_kl"] < 0.9 * second
    for name, target, updates in (("a", 0.95 * second, 4), ("b", 1.05 * second, 6), ("c", 1e-9, 2)):
        assert trained(name, target, 3)["updates"] == updates


@pytest.mark.parametrize(
    ("options", "kept"),
    [("--beta 0", "best"), ("--beta 1000", "first"), ("--beta 1000 --keep last", "policy"),
     ("--beta 0 --ema-decay 0.9 --keep last", "ema")],
)  # fmt: skip
def test_what_is_kept_is_the_policy_of_the_best_validation_or_the_last_or_its_moving_average(
    places, tmp_path, options, kept
):
    """Without a penalty the best step is that of the highest score; with a prohibitive one, the start."""
    few = "--iterations 6 --policy-rate 3e-3 --critic-warmup 0 --val-every 1".split()
    rlhf.main(arguments(places, tmp_path, *few, *options.split()))
    out, final = tmp_path / "ppo", final_of(tmp_path / "ppo")
    vals = {event["step"]: event for event in metrics_of(out) if event["event"] == "val"}
    best = max(vals, key=lambda step: vals[step]["score"])
    assert final["kept_step"] == {"best": best, "first": 0}.get(kept, 6)
    assert final["score"] == vals[final["kept_step"]]["score"]
    name, moved = "model.layers.0.self_attn.q_proj.weight", load_file(out / "resume" / "state.safetensors")
    weights = {part: moved[f"model.{part}.{name}"] for part in ("policy", "ema")[: 1 + ("ema" in options)]}
    weights["first"] = load_file(Path(places["--init"]) / "model.safetensors")[name]
    saved = load_file(out / "model.safetensors")[name]
    if kept in weights:
        assert [part for part, weight in weights.items() if torch.equal(saved, weight)] == [kept]
    if kept == "ema":  # a tenth of the way in an iteration
        far, near = ((weights[part] - weights["first"]).norm() for part in ("policy", "ema"))
        assert 0 < near < 0.5 * far


def first_val(out: Path) -> dict:
    return next(event for event in metrics_of(out) if event["event"] == "val")


def test_cut_responses_are_counted_and_said_and_score_by_deviations_from_the_mean(places, tmp_path, capsys):
    vals = {}
    for missing in ("None", "-2", "-10"):
        out = tmp_path / missing
        rlhf.main(arguments(places, out, "--missing-eos-score", missing, "--iterations", "1"))
        vals[missing] = first_val(out / "ppo")
        printed = capsys.readouterr().out
        assert f"{vals[missing]['unended']:.0%} of the assistant's responses do not end" in printed
        assert "--max-new-tokens 8" in printed
    own, cut = vals["None"], vals["None"]["unended"]
    assert cut > 0.5
    # Each deviation takes the share of cut responses of one.
    moved = vals["-2"]["score"] - vals["-10"]["score"]
    assert moved == pytest.approx(8 * cut * own["score_deviation"], rel=1e-4)


def test_a_policy_that_runs_away_ends_in_one_line_and_its_best_is_kept(places, tmp_path, capfd):
    options = "--max-kl 0.0001 --beta 0 --policy-rate 1e-2 --iterations 20 --val-every 20".split()
    out = tmp_path / "out"
    line = refusal(rlhf, arguments(places, out, *options), capfd, shown=True)
    assert "nats a response from the reference" in line and "--policy-rate" in line
    assert int(re.search(r"at step (\d+)", line)[1]) < 20, "a rollout tells, before a validation does"
    load_model(out / "ppo", torch.device("cpu"), torch.float32)


REFUSED = [
    (["--rollout-batch", "15"], "multiple of 2"),
    (["--algorithm", "grpo", "--group-size", "1"], "at least 2"),
    (["--lam", "1.5"], "from 0 to 1"),
    (["--policy-rate", "0"], "--policy-rate"),
    (["--reward", "nowhere"], "nowhere"),
    (["--init", "nowhere"], "nowhere"),
    (["--ptx", "1"], "--text"),
    (["--text", "nowhere.txt"], "--ptx"),
    (["--max-new-tokens", "79"], "--max-new-tokens"),
    (["--algorithm", "dpo", "--rankings", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--algorithm", "best-of-n", "--resume"], "best-of-n"),
    (["--ppo-epochs", "0"], "--ppo-epochs"),
    (["--missing-eos-score", "nan"], "--missing-eos-score"),
    (["--warmup", "25", "--iterations", "6"], "the run has 24 updates"),
    (["--warmup", "25", "--algorithm", "dpo"], "the run has 8 updates"),
]


def test_the_rates_may_rise_over_all_updates_of_a_run(places, tmp_path, monkeypatch):
    def die(*_) -> None:
        raise Killed

    monkeypatch.setattr(rlhf.Aligner, "rollout", die)
    with pytest.raises(Killed):
        rlhf.main(arguments(places, tmp_path, "--warmup", "24", "--iterations", "6"))


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(places, tmp_path, capfd, options, said):
    out = tmp_path / "out"
    given = arguments(places, out, *options)
    if "--algorithm" in options:
        del given[2:4]  # the other one
    assert said in refusal(rlhf, given, capfd)
    assert not out.exists()


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "best-of-n"])
def test_a_run_that_would_write_over_its_own_reference_is_refused(places, tmp_path, capfd, algorithm):
    """Behind a better policy in its place the reference would be gone, and no resuming possible."""
    model, tokenizer = tiny_model()
    save_model(tmp_path / "out" / algorithm, model, with_chat_template(tokenizer))
    (tmp_path / "link").symlink_to(tmp_path / "out" / algorithm)
    for init in (tmp_path / "out" / algorithm, tmp_path / "link"):
        options = ["--init", str(init), "--overwrite"]
        before = folder_bytes(tmp_path)
        line = refusal(rlhf, arguments(places, tmp_path / "out", *options, algorithm=algorithm), capfd)
        assert "is where this stage writes" in line and folder_bytes(tmp_path) == before


@pytest.mark.parametrize("said", ["another tokenizer", "reads 16 tokens"])
def test_a_reward_model_that_cannot_read_what_the_policy_writes_is_refused(places, tmp_path, capfd, said):
    model, tokenizer = tiny_model(longest=16 if "16" in said else 80)
    if "tokenizer" in said:
        tokenizer = Tokenizer.train(["Dogs and birds and other beasts, all day."], 280)
    scalar = scalar_from_language_model(model, torch.Generator())
    save_scalar_model(tmp_path / "reward", scalar, with_chat_template(tokenizer))
    given = arguments(places, tmp_path / "out", "--reward", str(tmp_path / "reward"))
    assert said in refusal(rlhf, given, capfd)
