"""What a model knows is statistical: it has patterns from many examples, not rules from one.

    python lessons/04_patterns_not_rules.py

Three tests that somebody who knows facts and rules would pass:

    once       the base model is trained further on text that states new facts, about names it has never
               read, 1, 2, 4, 8 or 16 times. Is once enough? (Known: the right one of eight answers is the
               likeliest; chance is 12%.)
    two steps  it knows where Ida lives, and which river flows there. Which river flows where Ida lives?
    longer     its demonstrations showed the assistant how to copy 2 to 4 words. Can it copy 5 or 6?

What would refute the claim: facts stated once that are known (75% or more of them); two steps answered as
well as one; five words copied as often as four.
"""

from common import Figures, Options, Seeds, known, load, means, page_question, reads_on, span, teach
import random
from statistics import fmean

from matplotlib.axes import Axes

from minillm.preferences import ResponseSet
from minillm.tools.evaluate import sample_replies
from minillm.world import World, phrases, user
from minillm.world.facts import Facts, attributes_of, pick, shuffled, state
from minillm.world.rubric import Prompt

TIMES, WORDS = (1, 2, 4, 8, 16), (2, 3, 4, 5, 6)


def new_facts(options: Options, facts: Facts, rng: random.Random) -> Figures:
    """How many facts are known after text that states them once or more often."""
    said: list[str] = []
    asked: dict[int, list[ResponseSet]] = {times: [] for times in TIMES}
    for i, entity in enumerate(shuffled(rng, facts.unknown)[: options.few(120, 10)]):
        times = TIMES[i % len(TIMES)]
        for attribute in attributes_of(entity.type):
            values = shuffled(rng, facts.values[attribute])[:8]  # the first is to be true
            said += [pick(rng, state(attribute, entity, values[0])) for _ in range(times)]
            asked[times].append(page_question(attribute, entity, values))
    texts = shuffled(rng, [*said, *World(options.seed).documents("web", 1)])
    model = load(reads_on(options, "04", texts))
    return {f"said {times}×": known(model, own) for times, own in asked.items()}


def steps(options: Options, facts: Facts, rng: random.Random) -> Figures:
    """The river of a town, by its name and by the name of somebody who lives there."""
    rivers = {fact.entity.name: fact.value for fact in facts.facts if fact.attribute == "river"}
    asked: dict[str, list[ResponseSet]] = {"one step": [], "two steps": []}
    for fact in (fact for fact in facts.facts if fact.attribute == "home"):
        own = rivers[fact.value]
        others = shuffled(rng, [river for river in facts.values["river"] if river != own])[:7]
        answers = [f"A: The {river}." for river in (own, *others)]
        where = {"one step": fact.value, "two steps": f"the town where {fact.entity.name} lives"}
        for name in asked:
            question = user(f"Q: What is the river of {where[name]}?")
            asked[name].append(ResponseSet([question], answers))
    model = load(options.run("base"))
    return {name: known(model, own) for name, own in asked.items()}


def copies(options: Options, rng: random.Random) -> Figures:
    """How often the assistant copies so many words."""
    model, found = load(options.run("sft")), Figures()
    for length in WORDS:
        lines = [" ".join(shuffled(rng, phrases.SIMPLE_WORDS)[:length]) for _ in range(options.few(60, 4))]
        asked = [Prompt([user(f"Copy these words: {line}.")], "", "") for line in lines]
        said = [one.text for one in sample_replies(model, asked)]
        found[f"copy {length}"] = fmean(f": {line}." in text for line, text in zip(lines, said, strict=True))
    return found


def experiment(options: Options) -> Figures:
    facts, rng = Facts(options.seed), random.Random(options.seed)
    return new_facts(options, facts, rng) | steps(options, facts, rng) | copies(options, rng)


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "once is not enough: less than 75% known": one["said 1×"] < 0.75,
        "16 times teach at least 25 points more": one["said 16×"] - one["said 1×"] >= 0.25,
        "two steps are at least 25 points worse than one": one["one step"] - one["two steps"] >= 0.25,
        "five words are copied at least 25 points worse than four": one["copy 4"] - one["copy 5"] >= 0.25,
    }


def sentence(seeds: Seeds) -> str:
    said = span(seeds, *(f"said {times}×" for times in TIMES))
    copied = span(seeds, *(f"copy {length}" for length in WORDS))
    steps = span(seeds, "one step", "two steps")
    return f"known when said 1, 2, 4, 8, 16 times: {said}; one step, two: {steps}; copies 2-6 words: {copied}"


def picture(axes: Axes, seeds: Seeds) -> None:
    axes.plot(TIMES, means(seeds, (f"said {times}×" for times in TIMES)), "o-", label="known")
    axes.axhline(1 / 8, linestyle=":", color="black", label="chance")
    axes.set(xscale="log", xticks=TIMES, xticklabels=TIMES, xlabel="times that the text states a fact")
    axes.set(ylim=(0, 1), title="patterns, not rules")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
