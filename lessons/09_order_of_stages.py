"""The order is pretraining, then fine-tuning, then learning from feedback; other orders fail.

    python lessons/09_order_of_stages.py

Four ways to train an assistant, with the same demonstrations and the same people; PPO takes 25 iterations:

    all three       pretraining → fine-tuning → PPO
    no pretraining  fine-tuning of a model that has read nothing (but one batch)
    no fine-tuning  pretraining → PPO: the base model is rewarded for what it happens to say
    wrong feedback  pretraining → fine-tuning → PPO with a reward model that saw rankings of small talk only

Measured: the rubric's score (0 to 1) of replies at temperature 1, and the share of replies in the form of an
answer (ended, and by one speaker).

What would refute the claim: any other way that comes within 0.05 of all three stages.
"""

from common import Figures, Options, Seeds, learns, load, means, script, span, teach
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from minillm.io.rankings import read_rankings
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World

WAYS = ("all three", "no pretraining", "no fine-tuning", "wrong feedback")


def experiment(options: Options) -> Figures:
    world = World(options.seed)
    asked = prompts_of_each_kind(world, "test", options.few(60, 2))
    reward, made = options.run("rlhf/reward"), Path(options.out, f"09_seed{options.seed}")

    def aligned(name: str, init: Path, by: Path) -> Path:
        script(
            "rlhf.py", "--stage", "policy", "--out", made / name, "--init", init, "--reward", by,
            "--iterations", options.few(25, 2), "--val-prompts", options.few(64, 8),
            "--seed", options.seed, "--overwrite",
        )  # fmt: skip
        return made / name / "ppo"

    blank, untaught = made / "blank", made / "untaught"
    script("train.py", "--out", blank, "--seed", options.seed, "--steps", 1, "--warmup", 1, "--overwrite")
    script(
        "sft.py", "--init", blank, "--out", untaught, "--seed", options.seed, "--overwrite",
        "--steps", options.few(900, 3), "--eval-prompts", 0, "--text-share", 0,
    )  # fmt: skip

    rankings = read_rankings(options.run("rlhf") / "rankings.jsonl")
    talk = [one for one in rankings if one.kind == "small_talk"]
    of_talk = learns(options, made / "talk", talk[: options.few(len(talk), 40)])

    runs = {
        "all three": aligned("whole", options.run("sft"), reward),
        "no pretraining": untaught,
        "no fine-tuning": aligned("base", options.run("base"), reward),
        "wrong feedback": aligned("wrong", options.run("sft"), of_talk),
    }
    found = Figures()
    for way, run in runs.items():
        replies = sample_replies(load(run), asked, 1.0, seed=options.seed, world=world)
        found[f"{way}, rubric"] = float(np.mean([one.utility for one in replies]))
        found[f"{way}, in form"] = float(np.mean([one.in_form for one in replies]))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    most = one["all three, rubric"] - 0.05
    return {f"{way}: at least 0.05 below all three stages": one[f"{way}, rubric"] <= most for way in WAYS[1:]}


def sentence(seeds: Seeds) -> str:
    return "rubric: " + ", ".join(f"{way} {span(seeds, f'{way}, rubric', form='{:.2f}')}" for way in WAYS)


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("rubric", "in form"):
        axes.plot(list(WAYS), means(seeds, (f"{way}, {name}" for way in WAYS)), "o", label=name)
    axes.set(ylim=(0, 1.02), title="order of the stages")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
