"""What aligning does to the assistant, over seeds and with one thing changed at a time.

    python benchmarks/policy.py --folder out/x --seeds 0 1 2 3 4 --variants ppo --json benchmarks/policy.json
    python benchmarks/policy.py --folder out/x --seeds 0 1 2 --json benchmarks/ablations.json

Every seed is a world, a base model, an assistant, rankings and a reward model of its own, made by the scripts
with their default options; what exists already is used. Each variant starts from those. The judge is the
little world's rubric, on test prompts that no stage has seen: sampled at temperature 1, and greedy. Beside
it, for the base model too, the share of pairs (compare/metrics.py) whose harmful text is at least as likely.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from harness import parser, script, write

from minillm.chat import ChatTemplate
from minillm.compare.metrics import pair_section, words, world_pairs
from minillm.files import read_json
from minillm.io.huggingface import load_causal_model, load_model, load_scalar_model
from minillm.preferences import MARGIN, ChatModel
from minillm.reward import encode_response, score_rows
from minillm.tools.evaluate import Reply, prompts_of_each_kind, sample_replies
from minillm.tools.folder import read_metrics
from minillm.world import KINDS, World

CPU = torch.device("cpu")
TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
FLAWS = {"rude": KINDS, "wordy": KINDS, "guessed": ("unknown",), "complied": ("harm", "advice")}
"""What the rubric hears that it should not, and in which kinds of prompts it can."""

SHORT = ["--iterations", "60"]
"""Half of the default: what shows a difference need not be the best there is."""
VARIANTS: dict[str, list[str]] = {
    "ppo": [],
    "ppo, half as long": SHORT,
    "β 0": [*SHORT, "--beta", "0"],
    "β a third": [*SHORT, "--beta", "0.05"],
    "β three times": [*SHORT, "--beta", "0.45"],
    "critic from the assistant": [*SHORT, "--critic", "policy"],
    "no whitening": [*SHORT, "--no-whiten"],
    "no price of not ending": [*SHORT, "--missing-eos-score", "None"],
    "ptx 0.5": [*SHORT, "--ptx", "0.5"],
    "moving average 0.9": [*SHORT, "--ema-decay", "0.9"],
    "grpo": ["--algorithm", "grpo", "--iterations", "90"],  # in the time of ppo's 60, without a critic
    "dpo": ["--algorithm", "dpo", "--policy-rate", "1e-4"],
}
SECOND, BEST_OF_N, N = "second round of rankings", "best of n", 8


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="where all runs are kept")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--variants", nargs="*", default=[*VARIANTS, SECOND, BEST_OF_N])
    options.add_argument("--prompts", type=int, default=100, help="test prompts of a kind, at most")
    arguments = options.parse_args()
    names = arguments.variants
    results: dict[str, dict[str, dict]] = {name: {} for name in ["base", "sft", *names]}
    for seed in arguments.seeds:
        place, asked = arguments.folder / str(seed), (seed, arguments.prompts)
        prepare(place, seed)
        before = judge(place / "sft", *asked)
        card = read_json(place / "rlhf" / "reward" / "report.json")  # the reward model bounds what follows
        reward = {name: card[name] for name in ("accuracy", "truth") if name in card}
        results["base"][str(seed)] = harmful(place / "base", *asked)
        found = figures(before, before) | harmful(place / "sft", *asked)
        results["sft"][str(seed)] = found | {"reward": reward}
        for name in names:
            if name == BEST_OF_N:
                found = figures(judge_best(place, *asked), before)
            else:
                run = aligned(place, seed, name)
                final = next(event for event in read_metrics(run) if event["event"] == "final")
                kept = {key: final[key] for key in ("kl", "score", "seconds", "kept_step") if key in final}
                found = figures(judge(run, *asked), before) | harmful(run, *asked) | kept
            results[name][str(seed)] = found
            print(line(name, [found], f"seed {seed}"), flush=True)
    for name, seeds in results.items():
        print(line(name, list(seeds.values()), f"{len(seeds)} seeds"))
    variants = {name: VARIANTS.get(name, []) for name in names}
    write(arguments.json, {"variants": variants, "prompts": arguments.prompts, "results": results})


# ---- Runs


def finished(run: Path) -> bool:
    return any(event["event"] == "final" for event in read_metrics(run))


def prepare(place: Path, seed: int) -> None:
    """Everything up to the reward model."""
    base, sft = place / "base", place / "sft"
    if not finished(base):
        script("train.py", "--out", base, "--seed", seed, "--overwrite")
    if not finished(sft):
        script("sft.py", "--init", base, "--out", sft, "--seed", seed, "--overwrite")
    ranked(place / "rlhf", place, seed, sft)


def ranked(out: Path, place: Path, seed: int, asked: Path, *earlier: Path) -> list[object]:
    """Responses of the run `asked`, their rankings, and a reward model of those and `earlier` ones; the
    options that all stages in `out` share."""
    common = ["--out", out, "--init", place / "sft", "--seed", seed, "--overwrite"]
    if not finished(out / "reward"):
        script("rlhf.py", "--stage", "sample", "--models", asked, *common)
        script("rlhf.py", "--stage", "rank", *common)
        files = ["--rankings", *earlier, out / "rankings.jsonl"] if earlier else []
        script("rlhf.py", "--stage", "reward", *files, *common)
    return common


def aligned(place: Path, seed: int, name: str) -> Path:
    """The folder of a variant's policy."""
    rlhf, options = place / "rlhf", VARIANTS.get(name, [])
    if name == SECOND:  # rankings of what the first policy says too, and a reward model of both rounds
        out = place / "second"
        common = ranked(out, place, seed, aligned(place, seed, "ppo"), rlhf / "rankings.jsonl")
    else:
        out = place / "variants" / name.replace(" ", "-")
        common = ["--out", out, "--init", place / "sft", "--seed", seed, "--reward", rlhf / "reward",
                  "--rankings", rlhf / "rankings.jsonl", "--overwrite"]  # fmt: skip
    run = out / (options[1] if options[:1] == ["--algorithm"] else "ppo")
    if not finished(run):
        script("rlhf.py", "--stage", "policy", *common, *options)
    return run


# ---- Judgement


def judge(run: Path, seed: int, prompts: int) -> dict[str, list[Reply]]:
    """By temperature, the replies to test prompts, judged."""
    model, world = load_model(run, CPU, torch.float32), World(seed)
    asked = prompts_of_each_kind(world, "test", prompts)
    return {
        name: sample_replies(*model, asked, T, seed=seed, world=world) for name, T in TEMPERATURES.items()
    }


def harmful(run: Path, seed: int, count: int) -> dict[str, dict[str, float | None]]:
    """Of each kind of pairs the share in which the harmful text is at least as likely."""
    one = ChatModel("", *load_causal_model(run, CPU, torch.float32))
    shares, _ = pair_section([one], world_pairs(World(seed), "test", count)).tables.values()
    names = words()["pairs"]["names"]
    return {"harmful": {name: shares[label][""]["value"] for name, label in names.items()}}


def judge_best(place: Path, seed: int, prompts: int) -> dict[str, list[Reply]]:
    """Of N replies of the assistant to each test prompt the one that the reward model likes best, judged."""
    model, tokenizer = load_model(place / "sft", CPU, torch.float32)
    reward_model, _ = load_scalar_model(place / "rlhf" / "reward", CPU, torch.float32)
    world, template = World(seed), ChatTemplate(tokenizer)
    asked = prompts_of_each_kind(world, "test", prompts)
    repeated = [prompt for prompt in asked for _ in range(N)]
    replies = sample_replies(model, tokenizer, repeated, 1.0, seed=seed, world=world)
    rows = [encode_response(template, one.prompt.messages, one.text) for one in replies]
    scores = score_rows(reward_model, rows)
    best = [max(range(i, i + N), key=scores.__getitem__) for i in range(0, len(replies), N)]
    return {"sampled": [replies[i] for i in best]}


def figures(after: dict[str, list[Reply]], before: dict[str, list[Reply]]) -> dict:
    """Of each temperature: the rubric by kind, the flaws, and the share preferred to `before` of the replies
    in which people would see a difference (MARGIN)."""
    found = {}
    for name, replies in after.items():
        gains = [a.score.utility - b.score.utility for a, b in zip(replies, before[name], strict=True)]
        won, lost = sum(gain > MARGIN for gain in gains), sum(gain < -MARGIN for gain in gains)
        of_kind = {kind: [one for one in replies if one.prompt.kind == kind] for kind in KINDS}
        found[name] = {
            "rubric": fmean(one.score.utility for one in replies),
            "by_kind": {kind: fmean(one.score.utility for one in some) for kind, some in of_kind.items()},
            "right": {kind: fmean(one.right for one in some) for kind, some in of_kind.items()},
            "preferred": won / (won + lost) if won + lost else None,
            "different_advice": len({one.text for one in of_kind["advice"]}),
            "decided": won + lost,
            "pairs": len(gains),
            "flaws": {
                flaw: fmean(getattr(one.score, flaw) for kind in kinds for one in of_kind[kind])
                for flaw, kinds in FLAWS.items()
            },
        }
    return found


def line(name: str, of_seeds: Sequence[dict], what: str) -> str:
    """Means over seeds, with the spread where there are several; --json has the kinds and flaws."""

    def shown(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        spread = f"±{stdev(known):.3f}" if len(known) > 1 else ""
        return f"{fmean(known):.3f}{spread}" if known else "-"

    cells = [f"{key} {shown([found.get(key) for found in of_seeds])}" for key in ("kl", "score", "seconds")]
    for T in TEMPERATURES:
        for key in ("rubric", "preferred", "different_advice"):
            cells.append(f"{T} {key} {shown([found.get(T, {}).get(key) for found in of_seeds])}")
    for kind in words()["pairs"]["names"]:
        cells.append(f"harmful {kind} {shown([found.get('harmful', {}).get(kind) for found in of_seeds])}")
    return f"{name:26} {what:8} {'  '.join(cells)}"


if __name__ == "__main__":
    main()
