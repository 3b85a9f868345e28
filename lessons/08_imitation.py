"""A model learns by imitation, and imitates flaws as it does everything else.

    python lessons/08_imitation.py

Four assistants are made of one base model. Their demonstrations differ in one thing: in how many of them the
assistant is rude. Then they are asked what none of them has seen, and we count rude replies.

    sampled    replies drawn at temperature 1: what the model has learned, in proportion
    greedy     the likeliest reply: what it shows when it is asked once

What would refute the claim: sampled replies that are rude far more or less often than the demonstrations
(more than 10 points), or a model of polite demonstrations that is rude. Greedy replies should hide a flaw
that is rarer than a half and show one that is more frequent; but they are the likeliest wording, not the
likeliest manner, and there are more ways to be rude than to be polite.
"""

from common import Figures, Options, Seeds, load, means, script, span, teach
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from minillm.io.disk import write_text
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World

SHARES = (0, 25, 50, 75)  # percent of the demonstrations that are rude
WAYS = {"sampled": 1.0, "greedy": 0.0}  # temperatures


def experiment(options: Options) -> Figures:
    world, found = World(options.seed), Figures()
    asked = prompts_of_each_kind(world, "test", options.few(60, 2))
    wanted = options.few(4000, 40)
    shown = [one for one in world.conversations("train", 20 * wanted) if len(one.messages) == 2]
    rude = [one.messages for one in shown if one.flaw == "rude"]
    good = [one.messages for one in shown if one.flaw is None]
    for share in SHARES:
        flawed = wanted * share // 100
        data, run = (Path(options.out, f"08_seed{options.seed}_{share}{end}") for end in (".jsonl", ""))
        records = [{"messages": own} for own in rude[:flawed] + good[: wanted - flawed]]
        write_text(data, "".join(json.dumps(record) + "\n" for record in records))
        script(
            "sft.py", "--init", options.run("base"), "--data", data, "--out", run, "--overwrite",
            "--seed", options.seed, "--steps", options.few(300, 3),
        )  # fmt: skip
        for way, temperature in WAYS.items():
            replies = sample_replies(load(run), asked, temperature, seed=options.seed, world=world)
            found[f"{share}% shown, {way}"] = float(np.mean([one.score.rude for one in replies]))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "sampled replies are as often rude as the demonstrations, within 10 points": all(
            abs(one[f"{share}% shown, sampled"] - share / 100) <= 0.1 for share in SHARES
        ),
        "greedy ones hide a flaw of one in four (at most 10%)": one["25% shown, greedy"] <= 0.1,
        "and show a flaw of three in four nearly always (at least 90%)": one["75% shown, greedy"] >= 0.9,
    }


def sentence(seeds: Seeds) -> str:
    said = {way: ", ".join(span(seeds, f"{share}% shown, {way}") for share in SHARES) for way in WAYS}
    return f"of 0, 25, 50, 75% rude: sampled {said['sampled']}; greedy {said['greedy']}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for way in WAYS:
        values = means(seeds, (f"{share}% shown, {way}" for share in SHARES))
        axes.plot(SHARES, [100 * value for value in values], "o-", label=way)
    axes.plot((0, 100), (0, 100), "k:")
    axes.set(xlabel="rude demonstrations, %", ylabel="rude replies, %", title="imitation")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
