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

import random
from collections.abc import Sequence

import numpy as np
from common import Figures, Options, Seeds, Verdict, known, load, reads_on, span, teach
from matplotlib.axes import Axes

from minillm.preferences import ResponseSet
from minillm.tools.evaluate import sample_replies
from minillm.world import World, phrases
from minillm.world.facts import Facts, attributes_of, pick, shuffled, state
from minillm.world.rubric import Prompt

TIMES, WORDS = (1, 2, 4, 8, 16), (2, 3, 4, 5, 6)


def question(ask: str, answers: Sequence[str]) -> ResponseSet:
    """A question and answers to choose from, the right one first, as on a page of questions."""
    return ResponseSet([{"role": "user", "content": f"Q: {ask}"}], [f"A: {answer}" for answer in answers])


def new_facts(options: Options, facts: Facts, rng: random.Random) -> Figures:
    """How many facts are known after text that states them once or more often."""
    said: list[str] = []
    asked: dict[int, list[ResponseSet]] = {times: [] for times in TIMES}
    for i, entity in enumerate(shuffled(rng, facts.unknown)[: options.few(120, 10)]):
        times = TIMES[i % len(TIMES)]
        for attribute in attributes_of(entity.type):
            values = shuffled(rng, facts.values[attribute])[:8]  # the first is to be true
            said += [pick(rng, state(attribute, entity, values[0])) for _ in range(times)]
            answers = [state(attribute, entity, value, "answers")[0] for value in values]
            asked[times].append(question(state(attribute, entity, key="asks")[0], answers))
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
        answers = [f"The {river}." for river in (own, *others)]
        where = {"one step": fact.value, "two steps": f"the town where {fact.entity.name} lives"}
        for name in asked:
            asked[name].append(question(f"What is the river of {where[name]}?", answers))
    model = load(options.run("base"))
    return {name: known(model, own) for name, own in asked.items()}


def copies(options: Options, rng: random.Random) -> Figures:
    """How often the assistant copies so many words."""
    model, found = load(options.run("sft")), Figures()
    for length in WORDS:
        lines = [" ".join(shuffled(rng, phrases.SIMPLE_WORDS)[:length]) for _ in range(options.few(60, 4))]
        asked = [[{"role": "user", "content": f"Copy these words: {line}."}] for line in lines]
        replies = sample_replies(model, [Prompt(messages, "", "") for messages in asked])
        copied = [f": {line}." in one.text for line, one in zip(lines, replies, strict=True)]
        found[f"copy {length}"] = float(np.mean(copied))
    return found


def experiment(options: Options) -> Figures:
    facts, rng = Facts(options.seed), random.Random(options.seed)
    return new_facts(options, facts, rng) | steps(options, facts, rng) | copies(options, rng)


def verdict(seeds: Seeds) -> Verdict:
    def falls(high: str, low: str, by: float) -> bool:
        return all(one[high] - one[low] >= by for one in seeds)

    checks = {
        "once is not enough: less than 75% known": all(one["said 1×"] < 0.75 for one in seeds),
        "16 times teach at least 25 points more": falls("said 16×", "said 1×", 0.25),
        "two steps are at least 25 points worse than one": falls("one step", "two steps", 0.25),
        "five words are copied at least 25 points worse than four": falls("copy 4", "copy 5", 0.25),
    }
    said = " → ".join(span(seeds, f"said {times}×") for times in TIMES)
    steps = f"{span(seeds, 'one step')} → {span(seeds, 'two steps')}"
    copied = " → ".join(span(seeds, f"copy {length}") for length in WORDS)
    times = f"known when said 1, 2, 4, 8, 16 times: {said}"
    return checks, f"{times}; one step, two: {steps}; copies 2-6 words: {copied}"


def picture(axes: Axes, seeds: Seeds) -> None:
    values = np.mean([[one[f"said {times}×"] for times in TIMES] for one in seeds], axis=0)
    axes.plot(TIMES, values, "o-", label="known")
    axes.axhline(1 / 8, linestyle=":", color="black", label="chance")
    axes.set(xscale="log", xticks=TIMES, xticklabels=TIMES, xlabel="times that the text states a fact")
    axes.set(ylim=(0, 1), title="patterns, not rules")


if __name__ == "__main__":
    teach(experiment, verdict, picture)
