"""The order is pretraining, then fine-tuning, then learning from feedback; other orders fail.

    python lessons/09_order_of_stages.py

Four roads to an assistant, with the same demonstrations, the same people and a PPO of 40 iterations:

    all three       pretraining → fine-tuning → PPO
    no pretraining  fine-tuning of a model that has read nothing
    no fine-tuning  pretraining → PPO: the base model is rewarded for what it happens to say
    wrong feedback  pretraining → fine-tuning → PPO with a reward model that has seen small talk only

Judged by the rubric (0 to 1) on replies at temperature 1, and by how many replies have the form of an answer.

What would refute the claim: a shorter road that ends within 0.05 of the whole one; feedback on other things
that helps as much as feedback on these.
"""

import json
from pathlib import Path

import numpy as np
from common import Figures, Options, Seeds, Verdict, load, script, span, teach
from matplotlib.axes import Axes

from minillm.files import read_text, write_text
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World

ROADS = ("all three", "no pretraining", "no fine-tuning", "wrong feedback")


def experiment(options: Options) -> Figures:
    world = World(options.seed)
    asked = prompts_of_each_kind(world, "test", options.few(60, 2))
    reward, made = options.run("rlhf/reward"), Path(options.out, f"09_seed{options.seed}")

    def aligned(name: str, init: Path, by: Path) -> Path:
        script(
            "rlhf.py", "--stage", "policy", "--out", made / name, "--init", init, "--reward", by,
            "--iterations", options.few(40, 2), "--val-prompts", options.few(256, 8),
            "--seed", options.seed, "--overwrite",
        )  # fmt: skip
        return made / name / "ppo"

    blank, untaught = made / "blank", made / "untaught"
    script("train.py", "--out", blank, "--seed", options.seed, "--steps", 1, "--warmup", 1, "--overwrite")
    script(
        "sft.py", "--init", blank, "--out", untaught, "--seed", options.seed, "--overwrite",
        "--steps", options.few(900, 3), "--eval-prompts", 0,
    )  # fmt: skip

    lines = read_text(options.run("rlhf") / "rankings.jsonl").splitlines(keepends=True)
    talk = [line for line in lines if json.loads(line)["kind"] == "small_talk"]
    write_text(made / "talk.jsonl", "".join(talk[: options.few(len(talk), 40)]))
    script(
        "rlhf.py", "--stage", "reward", "--out", made / "talk", "--init", options.run("sft"), "--overwrite",
        "--rankings", made / "talk.jsonl", "--seed", options.seed,
    )  # fmt: skip

    runs = {
        "all three": aligned("whole", options.run("sft"), reward),
        "no pretraining": untaught,
        "no fine-tuning": aligned("base", options.run("base"), reward),
        "wrong feedback": aligned("wrong", options.run("sft"), made / "talk" / "reward"),
    }
    found = Figures()
    for road, run in runs.items():
        replies = sample_replies(load(run), asked, 1.0, seed=options.seed, world=world)
        found[f"{road}, rubric"] = float(np.mean([one.utility for one in replies]))
        found[f"{road}, in form"] = float(np.mean([one.in_form for one in replies]))
    return found


def verdict(seeds: Seeds) -> Verdict:
    checks = {
        f"{road}: at least 0.05 behind the whole road": all(
            one[f"{road}, rubric"] <= one["all three, rubric"] - 0.05 for one in seeds
        )
        for road in ROADS[1:]
    }
    return checks, "rubric: " + ", ".join(
        f"{road} {span(seeds, f'{road}, rubric', '{:.2f}')}" for road in ROADS
    )


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("rubric", "in form"):
        values = np.mean([[one[f"{road}, {name}"] for road in ROADS] for one in seeds], axis=0)
        axes.plot(list(ROADS), values, "o", label=name)
    axes.set(ylim=(0, 1.02), title="order of the stages")


if __name__ == "__main__":
    teach(experiment, verdict, picture)
