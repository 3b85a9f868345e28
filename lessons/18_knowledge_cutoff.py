"""A model does not know what happened after its text was written, unless it is told.

    python lessons/18_knowledge_cutoff.py

After the base model's text was written, a third of the people in it moved to another town. The model is
asked where they live, in three ways: as it is; with the news in its context, above the question ("Ida
Ashberry lives in Corton now."); and after further training, on text that states the news eight times.

    old, new     how often the likeliest of eight towns is the old home, or the new one
    sure         how probable that likeliest town is, among the eight
    others       people who have not moved: how often the old home, which is right, is the likeliest

What would refute the claim: a model that was not told and knows the new town (more than 25%; chance is 12%),
or is unsure (less than 80%); a model that was told and gives the old town more often than the new one. To
notice: a small model may lack the skill of reading an answer from its context, and training on the news may
cost it what it knew.
"""

from common import Figures, Options, Seeds, choice, load, means, page_question, reads_on, span, teach
import random
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from minillm.preferences import ChatModel
from minillm.world import World
from minillm.world.facts import Fact, Facts, pick, shuffled, state

TOLD = 8  # times, by training
WAYS = ("untold", "told on the page", "told by training")
Move = tuple[Fact, str, list[str]]  # where somebody lived, where they live now, and six other towns


def towns(model: ChatModel, moves: Sequence[Move], told: bool = False) -> np.ndarray:
    """How probable each of eight towns is, of these: the old home, the new one, six others."""
    news = [f"{fact.entity.name} lives in {now} now.\n" * told for fact, now, _ in moves]
    asked = [("home", fact.entity, (fact.value, now, *others)) for fact, now, others in moves]
    return choice(model, [page_question(*one, before) for one, before in zip(asked, news, strict=True)])


def experiment(options: Options) -> Figures:
    facts, rng, found = Facts(options.seed), random.Random(options.seed), Figures()
    everybody: list[Move] = []
    for fact in shuffled(rng, [fact for fact in facts.facts if fact.attribute == "home"]):
        now, *others = shuffled(rng, [town for town in facts.values["home"] if town != fact.value])[:7]
        everybody.append((fact, now, others))
    moved, stayed = everybody[::3], [one for i, one in enumerate(everybody) if i % 3]

    news = [pick(rng, state("home", fact.entity, now)) for fact, now, _ in moved for _ in range(TOLD)]
    texts = shuffled(rng, [*news, *World(options.seed).documents("books", 0.5)])
    run = reads_on(options, "18", texts)
    for way in WAYS:
        model = load(run if way == "told by training" else options.run("base"))
        likely = towns(model, moved, told=way == "told on the page")
        found[f"{way}, old"], found[f"{way}, new"] = (float(np.mean(likely.argmax(1) == i)) for i in (0, 1))
        found[f"{way}, sure"] = float(likely.max(1).mean())
        found[f"{way}, others"] = float(np.mean(towns(model, stayed).argmax(1) == 0))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "untold, it does not know the new town (at most 25%)": one["untold, new"] <= 0.25,
        "and is sure all the same: at least 80%": one["untold, sure"] >= 0.8,
    } | {
        f"{way}, it gives the new one more often than the old": one[f"{way}, new"] > one[f"{way}, old"]
        for way in WAYS[1:]
    }


def sentence(seeds: Seeds) -> str:
    said = [f"{way} old {span(seeds, f'{way}, old')}, new {span(seeds, f'{way}, new')}" for way in WAYS]
    return f"{'; '.join(said)}; untold it is {span(seeds, 'untold, sure')} sure"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("old", "new", "others"):
        axes.plot(list(WAYS), means(seeds, (f"{way}, {name}" for way in WAYS)), "o", label=name)
    axes.set(ylim=(0, 1.02), title="knowledge cutoff")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
