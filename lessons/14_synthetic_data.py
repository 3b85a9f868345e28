"""A model can write its own training examples, provided that bad ones are filtered out.

    python lessons/14_synthetic_data.py

Every assistant here is the base model after the same number of fine-tuning steps; the demonstrations differ:

    a tenth       1,600 demonstrations of the little world, as people might have written them
    all           16,000 of them
    by reward     the tenth, and replies to 1,600 prompts by the assistant that learned from the tenth: it
                  replied four times to each, and the reward model picked one
    by agreement  the tenth, and of the same replies those that it gave twice or more often to one prompt
    generation n  1,600 replies of generation n - 1, unfiltered, and nothing else; generation 0 is the tenth

Measured on replies at temperature 1 to new prompts: the rubric's score (0 to 1), and "different", the share
of replies that repeat no earlier one.

What would refute the claim: replies filtered by reward or by agreement that close less than half of the gap
between a tenth and all; five unfiltered generations that do no harm (less than 0.02, or as many different
replies as before).
"""

from collections import Counter
from pathlib import Path

import numpy as np
from common import Figures, Options, Seeds, Verdict, load, scores_of, script, span, teach, write_lines
from matplotlib.axes import Axes

from minillm.preferences import ResponseSet
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World

GENERATIONS = [f"generation {n}" for n in (1, 2, 3, 4, 5)]
FILTERS = ("by reward", "by agreement")
NAMES = ("a tenth", *FILTERS, "all", *GENERATIONS)
Messages = list[dict[str, str]]


def demonstration(one: ResponseSet, text: str) -> Messages:
    """The conversation in which the assistant gave this response."""
    return [*one.messages, {"role": "assistant", "content": text}]


def experiment(options: Options) -> Figures:
    world, found = World(options.seed), Figures()
    asked = prompts_of_each_kind(world, "test", options.few(60, 2))
    people = [one.messages for one in world.conversations("train", options.few(16_000, 200))]
    tenth = people[: len(people) // 10]
    prompts = world.prompts("train", n=len(tenth))

    def assistant(name: str, shown: list[Messages]) -> Path:
        """The base model after these demonstrations; its figures are found on the way."""
        run = Path(options.out, f"14_seed{options.seed}_{name.replace(' ', '_')}")
        data = write_lines(run.with_suffix(".jsonl"), ({"messages": messages} for messages in shown))
        script(
            "sft.py", "--init", options.run("base"), "--data", data, "--out", run, "--overwrite",
            "--seed", options.seed, "--steps", options.few(200, 3),
        )  # fmt: skip
        replies = sample_replies(load(run), asked, 1.0, seed=options.seed, world=world)
        found[f"{name}, rubric"] = float(np.mean([one.utility for one in replies]))
        found[f"{name}, different"] = len({one.text for one in replies}) / len(replies)
        return run

    def own(run: Path, tries: int) -> list[ResponseSet]:
        """So many replies of the run's to each prompt, without prompts to which one has no word."""
        repeated = [prompt for prompt in prompts for _ in range(tries)]
        said = [one.text for one in sample_replies(load(run), repeated, 1.0, seed=options.seed)]
        groups = (said[i : i + tries] for i in range(0, len(said), tries))
        sets = [ResponseSet(one.messages, group) for one, group in zip(prompts, groups, strict=True)]
        return [one for one in sets if all(text.strip() for text in one.responses)]

    first = assistant("a tenth", tenth)
    assistant("all", people)
    tries = own(first, 4)
    best = scores_of(options.run("rlhf/reward"), tries).argmax(1)
    picked = [demonstration(one, one.responses[i]) for one, i in zip(tries, best, strict=True)]
    assistant("by reward", tenth + picked)
    likely = [(one, *Counter(one.responses).most_common(1)[0]) for one in tries]
    assistant("by agreement", tenth + [demonstration(one, text) for one, text, times in likely if times > 1])

    run = first
    for generation in GENERATIONS:
        run = assistant(generation, [demonstration(one, one.responses[0]) for one in own(run, 1)])
    return found


def verdict(seeds: Seeds) -> Verdict:
    start, goal, last = "a tenth, rubric", "all, rubric", GENERATIONS[-1]
    checks = {
        f"filtered {name}, its own replies close at least half of the gap": all(
            one[f"{name}, rubric"] >= (one[start] + one[goal]) / 2 for one in seeds
        )
        for name in FILTERS
    } | {
        "five unfiltered generations lose at least 0.02": all(
            one[f"{last}, rubric"] <= one[start] - 0.02 for one in seeds
        ),
        "and fewer of their replies are different": all(
            one[f"{last}, different"] < one["a tenth, different"] for one in seeds
        ),
    }
    said = ", ".join(f"{name} {span(seeds, f'{name}, rubric', '{:.2f}')}" for name in NAMES)
    variety = " → ".join(span(seeds, f"{name}, different") for name in ("a tenth", last))
    return checks, f"rubric: {said}; different replies: {variety}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("rubric", "different"):
        values = np.mean([[one[f"{of}, {name}"] for of in NAMES] for one in seeds], axis=0)
        axes.plot(NAMES, values, "o", label=name)
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(ylim=(0, 1), title="synthetic data")


if __name__ == "__main__":
    teach(experiment, verdict, picture)
