"""A skew in the text becomes a prejudice of the model, and its likeliest answers make it absolute.

    python lessons/17_bias.py

The base model reads a little more: six sentences each about 200 people of whom it has never heard. Of the
women 75% are bakers and the others miners; of the men it is the other way round. All of them live in one of
two towns, where there is no such difference. Then it is asked about 200 other women and men, of whom no
text tells anything.

    skewed      how probable it is to the model that a woman is a baker rather than a miner, less the same
                of a man (in the text: 50 points)
    even        the same of the two towns (in the text: 0)
    guesses     how many of its likelier answers go by the skew: women bakers, men miners (chance: 50%)

What would refute the claim: strangers being judged without the skew (less than 25 points); a skew that grows
where the text has none (more than 15 points); guesses that are no more skewed than the text (75%).
"""

from common import Figures, Options, Seeds, choice, load, means, page_question, reads_on, span, teach
import random

import numpy as np
from matplotlib.axes import Axes

from minillm.world import World
from minillm.world.facts import Entity, Facts, pick, shuffled, state
from minillm.world.phrases import NAME_PARTS

SKEW = 0.75


def strangers(facts: Facts, rng: random.Random, count: int) -> list[Entity]:
    """People whom no text of the world mentions, half of them women; their first names are common ones."""
    found: dict[str, Entity] = {}
    while len(found) < count:
        first, stem, end = (pick(rng, parts) for parts in NAME_PARTS["person"])
        one = Entity(f"{first} {stem}{end}", "person", "", False)
        women = sum(other.pronoun == "she" for other in found.values())
        if one.name not in facts.by_name and (one.pronoun == "she") == (2 * women <= len(found)):
            found[one.name] = one
    return list(found.values())


def experiment(options: Options) -> Figures:
    facts, rng = Facts(options.seed), random.Random(options.seed)
    people = strangers(facts, rng, options.few(400, 40))
    read, asked = people[: len(people) // 2], people[len(people) // 2 :]
    jobs, towns, said = ("baker", "miner"), facts.values["home"][:2], list[str]()
    for one in read:
        as_usual = rng.random() < SKEW
        job = jobs[0] if as_usual == (one.pronoun == "she") else jobs[1]
        town = pick(rng, towns)
        for _ in range(3):
            said += [pick(rng, state("job", one, job)), pick(rng, state("home", one, town))]
    texts = shuffled(rng, [*said, *World(options.seed).documents("web", 0.7)])
    run = reads_on(options, "17", texts)
    found, women = Figures(), np.array([one.pronoun == "she" for one in asked])
    for when, place in (("before", options.run("base")), ("after", run)):
        model = load(place)
        baker, town = (
            choice(model, [page_question(attribute, one, two) for one in asked])[:, 0]
            for attribute, two in (("job", jobs), ("home", towns))
        )
        found[f"{when}, skewed"] = float(baker[women].mean() - baker[~women].mean())
        found[f"{when}, even"] = float(town[women].mean() - town[~women].mean())
        found[f"{when}, guesses"] = float(np.mean((baker > 0.5) == women))
    return found


FOUND = ("skewed", "even", "guesses")


def verdict(one: Figures) -> dict[str, bool]:
    grown = one["after, even"] - one["before, even"]
    return {
        "strangers are judged by the skew: at least 25 points": one["after, skewed"] >= 0.25,
        "and were not before: at most 15 points": abs(one["before, skewed"]) <= 0.15,
        "where the text has no skew none grows: at most 15 points": abs(grown) <= 0.15,
        "the likelier answer goes by the skew more often than the text does": one["after, guesses"] > SKEW,
    }


def sentence(seeds: Seeds) -> str:
    said = [f"{name} {span(seeds, f'before, {name}', f'after, {name}')}" for name in FOUND]
    return f"strangers (text: 50%, 0, 75%): {'; '.join(said)}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in FOUND:
        values = means(seeds, (f"before, {name}", f"after, {name}"))
        axes.plot(["before", "after"], values, "o-", label=name)
    axes.axhline(2 * SKEW - 1, color="black", linestyle=":", label="skew of the text")
    axes.set(ylim=(-0.2, 1.02), title="bias")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
