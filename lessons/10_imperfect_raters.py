"""Inconsistent feedback at scale beats none, and beats each of those who gave it.

    python lessons/10_imperfect_raters.py

Five simulated people rank the assistant's responses. They lean to this and that and are noisy: one of them
orders a good and a worse response rightly in about five of six cases. A reward model learns from
what they say. It is never shown the rubric, but we can ask the rubric who was right: of pairs of held-out
responses that differ by it, how many does the model order rightly, and how many did the people?

Twice, with people as they are and with people three times as noisy, from 300, 1,000 and 3,000 prompts.

What would refute the claim: a model from the most prompts that orders fewer pairs rightly than the people
who taught it; a model that does not get better with more of them; with noisy people no better than chance.
"""

from common import Figures, Options, Seeds, means, script, span, teach
import shutil
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from minillm.io.disk import read_json, read_text, write_text

NOISE = (1, 3)
PROMPTS = (300, 1000, 3000)


def experiment(options: Options) -> Figures:
    found, lines = Figures(), read_text(options.run("rlhf") / "responses.jsonl").splitlines(keepends=True)
    for noise in NOISE:
        for count in PROMPTS:
            folder = Path(options.out, f"10_seed{options.seed}_{noise}_{count}")
            shutil.rmtree(folder, ignore_errors=True)
            write_text(folder / "responses.jsonl", "".join(lines[: options.few(count, count // 30)]))
            shared = ("--out", folder, "--init", options.run("sft"), "--seed", options.seed)
            script("rlhf.py", "--stage", "rank", "--noise", noise, *shared)
            script("rlhf.py", "--stage", "reward", *shared)
            pairs = read_json(folder / "reward" / "report.json")["pairs"]["all"]
            for who, share in (("scores", "truth"), ("annotators", "annotators")):
                found[f"noise {noise}, {count} prompts, {who}"] = pairs[share]["value"]
    return found


def people(one: Figures, noise: int) -> float:
    """How often they are right, by the most pairs there are."""
    return one[f"noise {noise}, {PROMPTS[-1]} prompts, annotators"]


def model(one: Figures, noise: int, count: int = PROMPTS[-1]) -> float:
    """How often the reward model is right that learned from so many prompts."""
    return one[f"noise {noise}, {count} prompts, scores"]


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "more prompts make a better model": all(model(one, n, PROMPTS[0]) < model(one, n) for n in NOISE),
        "people as they are: the model beats them": model(one, 1) > people(one, 1),
        "people three times as noisy: it beats them too": model(one, 3) > people(one, 3),
    }


def sentence(seeds: Seeds) -> str:
    said = []
    for noise in NOISE:
        who = (f"noise {noise}, {PROMPTS[-1]} prompts, {name}" for name in ("annotators", "scores"))
        taught, shown = (span(seeds, name) for name in who)
        enough = [n for n in PROMPTS if all(model(one, noise, n) > people(one, noise) for one in seeds)]
        start = f"from {enough[0]:,} prompts on" if enough else "with none of these sizes"
        said.append(f"noise {noise}: people {taught}, model {shown}, better {start}")
    return "; ".join(said)


def picture(axes: Axes, seeds: Seeds) -> None:
    for color, noise in zip(("C0", "C1"), NOISE, strict=True):
        values = means(seeds, (f"noise {noise}, {count} prompts, scores" for count in PROMPTS))
        axes.plot(PROMPTS, values, "o-", color=color, label=f"model, noise {noise}")
        taught = fmean(people(one, noise) for one in seeds)
        axes.axhline(taught, color=color, linestyle=":", label=f"people, noise {noise}")
    axes.set(xscale="log", xlabel="prompts", ylabel="pairs in the rubric's order", title="imperfect raters")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
