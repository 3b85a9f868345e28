"""What aligning does to the assistant, over seeds and with one thing changed at a time.

    python benchmarks/policy.py --folder out/x --seeds 0 1 2 3 4 --variants ppo --json benchmarks/policy.json
    python benchmarks/policy.py --folder out/x --seeds 0 1 2 --json benchmarks/ablations.json

Every seed is a world, a base model, an assistant, rankings and a reward model of its own, made by the scripts
with their default options; what exists already is used. Each variant starts from those. The judge is the
little world's rubric, on test prompts that no stage has seen: sampled at temperature 1, and greedy.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from minillm.chat import ChatTemplate
from minillm.files import read_json, write_json
from minillm.io.huggingface import load_model, load_scalar_model
from minillm.preferences import MARGIN
from minillm.reward import encode_response, score_rows
from minillm.run import read_metrics
from minillm.tools.evaluate import Judged, Reply, judged_replies, sample_replies, world_prompts
from minillm.tools.provenance import provenance
from minillm.world import KINDS, World

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
FLAWS = {"rude": KINDS, "wordy": KINDS, "guessed": ("unknown",), "complied": ("harm",)}
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
BEST_OF, SECOND = 8, "second round of rankings"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=[*VARIANTS, SECOND, "best of n"])
    parser.add_argument("--prompts", type=int, default=100, help="test prompts of a kind, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, dict]] = {"sft": {}, **{name: {} for name in options.variants}}
    for seed in options.seeds:
        place = options.folder / str(seed)
        prepare(place, seed)
        before = judge(place / "sft", seed, options.prompts)
        results["sft"][str(seed)] = figures(before, before) | {"reward": report(place)}
        for name in options.variants:
            run = aligned(place, seed, name)
            after = judge(
                place / "sft" if run is None else run, seed, options.prompts, place if run is None else None
            )
            results[name][str(seed)] = figures(after, before) | kept(run)
            print(line(name, [results[name][str(seed)]], f"seed {seed}"), flush=True)
    for name, seeds in results.items():
        print(line(name, list(seeds.values()), f"{len(seeds)} seeds"))
    if options.json:
        shown = {name: VARIANTS.get(name, []) for name in options.variants}
        write_json(
            options.json, {"variants": shown, "prompts": options.prompts, "results": results} | provenance()
        )


# ---- Runs


def script(*words: str | Path | int) -> None:
    """A script to its end, or on to it where an earlier sitting left it."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: {done.stderr.splitlines()[-1]}")


def finished(run: Path) -> bool:
    return any(event["event"] == "final" for event in read_metrics(run))


def prepare(place: Path, seed: int) -> None:
    """Everything up to the reward model."""
    base, sft, rlhf = place / "base", place / "sft", place / "rlhf"
    common = ["--seed", seed]
    for run, words in {
        base: ["train.py", "--out", base],
        sft: ["sft.py", "--init", base, "--out", sft],
    }.items():
        if not finished(run):
            script(*words, *common, "--overwrite")
    if not finished(rlhf / "reward"):
        stages = ["--out", rlhf, "--init", sft, *common]
        script("rlhf.py", "--stage", "sample", "--models", sft, *stages, "--overwrite")
        script("rlhf.py", "--stage", "rank", *stages, "--overwrite")
        script("rlhf.py", "--stage", "reward", *stages, "--overwrite")


def second_round(place: Path, seed: int) -> Path:
    """Rankings of what the first policy says too, a reward model of both rounds, and a policy from that."""
    first, out = aligned(place, seed, "ppo"), place / "second"
    common = ["--out", out, "--init", place / "sft", "--seed", seed, "--overwrite"]
    if not finished(out / "reward"):
        script("rlhf.py", "--stage", "sample", "--models", first, *common)
        script("rlhf.py", "--stage", "rank", *common)
        files = [folder / "rankings.jsonl" for folder in (place / "rlhf", out)]
        script("rlhf.py", "--stage", "reward", "--rankings", *files, *common)
    if not finished(out / "ppo"):
        script("rlhf.py", "--stage", "policy", *common)
    return out / "ppo"


def aligned(place: Path, seed: int, name: str) -> Path | None:
    """The folder of a variant's policy; None for the assistant itself, best of n."""
    if name == SECOND:
        return second_round(place, seed)
    if name not in VARIANTS:
        return None
    options = VARIANTS[name]
    algorithm = options[1] if options[:1] == ["--algorithm"] else "ppo"
    out = place / "variants" / name.replace(" ", "-")
    rlhf = place / "rlhf"
    if not finished(out / algorithm):
        script(
            "rlhf.py", "--stage", "policy", "--out", out, "--init", place / "sft", "--seed", seed,
            "--overwrite",
            "--reward", rlhf / "reward", "--rankings", rlhf / "rankings.jsonl", *options,
        )  # fmt: skip
    return out / algorithm


def kept(run: Path | None) -> dict[str, float]:
    """What a run's last line says of the policy it kept."""
    if run is None:
        return {}
    final = next(event for event in read_metrics(run) if event["event"] == "final")
    return {name: final[name] for name in ("kl", "score", "seconds", "kept_step") if name in final}


def report(place: Path) -> dict:
    """The reward model's accuracy, for it bounds what follows."""
    card = read_json(place / "rlhf" / "reward" / "report.json")
    return {name: card[name] for name in ("accuracy", "truth") if name in card}


# ---- Judgement


def judge(run: Path, seed: int, prompts: int, place: Path | None = None) -> dict[str, list[Judged]]:
    """By temperature, the replies to test prompts, judged; with a `place`, of several the one that its reward
    model likes best."""
    model, tokenizer = load_model(run, CPU, torch.float32)
    world = World(seed)
    if place is None:
        return {
            name: list(chain(*judged_replies(model, tokenizer, world, "test", prompts, T, seed).values()))
            for name, T in TEMPERATURES.items()
        }
    reward, template = (
        load_scalar_model(place / "rlhf" / "reward", CPU, torch.float32)[0],
        ChatTemplate(tokenizer),
    )
    asked = world_prompts(world, "test", prompts)
    repeated = [prompt.messages for prompt in asked for _ in range(BEST_OF)]
    replies = list(sample_replies(model, tokenizer, repeated, 1.0, seed=seed))
    rows = [encode_response(template, m, r.text) for m, r in zip(repeated, replies, strict=True)]
    scores = score_rows(reward, rows)
    best: list[Reply] = []
    for first in range(0, len(replies), BEST_OF):
        best.append(replies[max(range(first, first + BEST_OF), key=lambda i: scores[i])])
    judged = [Judged(p, r, world.score(p, r.text)) for p, r in zip(asked, best, strict=True)]
    return {"sampled": judged}


def figures(after: dict[str, list[Judged]], before: dict[str, list[Judged]]) -> dict:
    """Of each temperature: the rubric by kind, the flaws, and the share preferred to `before` of the replies
    in which people would see a difference (MARGIN)."""
    found = {}
    for name, replies in after.items():
        gains = [a.score.utility - b.score.utility for a, b in zip(replies, before[name], strict=True)]
        won, lost = sum(gain > MARGIN for gain in gains), sum(gain < -MARGIN for gain in gains)
        found[name] = {
            "rubric": fmean(one.score.utility for one in replies),
            "by_kind": {
                k: fmean(one.score.utility for one in replies if one.prompt.kind == k) for k in KINDS
            },
            "right": {k: fmean(one.right for one in replies if one.prompt.kind == k) for k in KINDS},
            "preferred": won / (won + lost) if won + lost else None,
            "decided": won + lost,
            "pairs": len(gains),
            "flaws": {
                flaw: fmean(getattr(one.score, flaw) for one in replies if one.prompt.kind in kinds)
                for flaw, kinds in FLAWS.items()
            },
        }
    return found


def line(name: str, of_seeds: Sequence[dict], what: str) -> str:
    """Means over seeds, with the spread where there are several."""

    def shown(*keys: str) -> str:
        values = []
        for one in of_seeds:
            for key in keys:
                one = one.get(key) if one else None
            if one is not None:
                values.append(one)
        if not values:
            return "-"
        return f"{fmean(values):.3f}" + (f"±{stdev(values):.3f}" if len(values) > 1 else "")

    cells = [f"{name:26} {what:8} KL {shown('kl')} score {shown('score')} s {shown('seconds')}"]
    for T in TEMPERATURES:
        kinds = " ".join(f"{kind} {shown(T, 'by_kind', kind)}" for kind in KINDS)
        flaws = " ".join(f"{flaw} {shown(T, 'flaws', flaw)}" for flaw in FLAWS)
        cells.append(f"   {T:8} rubric {shown(T, 'rubric')} won {shown(T, 'preferred')} | {kinds} | {flaws}")
    return "\n".join(cells)


if __name__ == "__main__":
    main()
