"""A model can write its own training examples, provided that bad ones are filtered out.

    python lessons/14_synthetic_data.py

Every assistant here is the base model after the same number of fine-tuning steps; the demonstrations differ:

    a tenth       160 demonstrations of the little world, as people might have written them
    all           1,600 of them
    by reward     the tenth, and replies to 1,440 prompts by the assistant that learned from the tenth: it
                  replied four times to each, and the reward model picked one
    by agreement  the tenth, and of the same replies those that it gave twice or more often to one prompt
    generation n  1,440 replies of generation n - 1, unfiltered, and nothing else; generation 0 is the tenth

Measured on replies at temperature 1 to new prompts: the rubric's score (0 to 1), and "different", the share
of replies that repeat no earlier one.

What would refute the claim: replies filtered by reward or by agreement that close less than half of the gap
between a tenth and all; five unfiltered generations that do no harm (less than 0.02, or as many different
replies as before).
"""

from common import Figures, Options, Seeds, imitates, load, means, scores_of, span, teach
from collections import Counter
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from minillm.chat import Conversation
from minillm.preferences import ResponseSet
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World, assistant

GENERATIONS = [f"generation {n}" for n in (1, 2, 3, 4, 5)]
FILTERS = ("by reward", "by agreement")
NAMES = ("a tenth", *FILTERS, "all", *GENERATIONS)


def demonstration(one: ResponseSet, text: str) -> Conversation:
    """The conversation in which the assistant gave this response."""
    return [*one.messages, assistant(text)]


def experiment(options: Options) -> Figures:
    world, found = World(options.seed), Figures()
    asked = prompts_of_each_kind(world, "test", options.few(50, 2))
    people = [one.messages for one in world.conversations("train", options.few(1600, 200))]
    tenth = people[: len(people) // 10]
    prompts = world.prompts("train", n=options.few(1440, 20))

    def taught(name: str, shown: list[Conversation]) -> Path:
        """The base model after these demonstrations; its figures are found on the way."""
        run = Path(options.out, f"14_seed{options.seed}_{name.replace(' ', '_')}")
        imitates(options, run, shown, steps=150, init="base")
        replies = sample_replies(load(run), asked, 1.0, seed=options.seed, world=world)
        found[f"{name}, rubric"] = fmean(one.utility for one in replies)
        found[f"{name}, different"] = len({one.text for one in replies}) / len(replies)
        return run

    def own(run: Path, tries: int) -> list[ResponseSet]:
        """So many replies of the run's to each prompt, without prompts to which one has no word."""
        repeated = [prompt for prompt in prompts for _ in range(tries)]
        said = [one.text for one in sample_replies(load(run), repeated, 1.0, seed=options.seed)]
        groups = (said[i : i + tries] for i in range(0, len(said), tries))
        sets = [ResponseSet(one.messages, group) for one, group in zip(prompts, groups, strict=True)]
        return [one for one in sets if all(text.strip() for text in one.responses)]

    run = taught("a tenth", tenth)
    taught("all", people)
    tries = own(run, 4)
    best = scores_of(options.run("rlhf/reward"), tries).argmax(1)
    picked = [demonstration(one, one.responses[i]) for one, i in zip(tries, best, strict=True)]
    taught("by reward", tenth + picked)
    likely = [(one, *Counter(one.responses).most_common(1)[0]) for one in tries]
    taught("by agreement", tenth + [demonstration(one, text) for one, text, times in likely if times > 1])
    for generation in GENERATIONS:
        run = taught(generation, [demonstration(one, one.responses[0]) for one in own(run, 1)])
    return found


def verdict(one: Figures) -> dict[str, bool]:
    middle = (one["a tenth, rubric"] + one["all, rubric"]) / 2
    filtered = "its own replies close at least half of the gap"
    return {f"filtered {name}, {filtered}": one[f"{name}, rubric"] >= middle for name in FILTERS} | {
        "five unfiltered generations lose at least 0.02": one["generation 5, rubric"]
        <= one["a tenth, rubric"] - 0.02,
        "and fewer of their replies are different": one["generation 5, different"]
        < one["a tenth, different"],
    }


def sentence(seeds: Seeds) -> str:
    said = ", ".join(f"{name} {span(seeds, f'{name}, rubric', form='{:.2f}')}" for name in NAMES)
    variety = span(seeds, "a tenth, different", "generation 5, different")
    return f"rubric: {said}; different replies: {variety}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("rubric", "different"):
        axes.plot(NAMES, means(seeds, (f"{of}, {name}" for of in NAMES)), "o", label=name)
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(ylim=(0, 1), title="synthetic data")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
