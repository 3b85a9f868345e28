"""Guessing the next word, and nothing else, teaches grammar, facts and style.

    python lessons/01_next_word.py

A model is trained from nothing to guess the next token of the little world's text, and stopped on the way to
be asked things that nobody has taught it:

    grammar   of a sentence and the same with a verb in the wrong number ("they is"), the first is likelier;
              the sentences are of another world, about people of whom the model has never read
    facts     the right one of eight answers to a question about its own world is the likeliest
    style     whether a text is web, book, code, wiki, paper or questions: the nearest mean of the model's
              states over texts of each kind, again of another world (chance: 17%)
    nats      a byte of held-out text

What would refute the claim: less than 95% of grammar or facts at the end, or less than 90% of styles. Which
of them came first is told by the steps.
"""

from common import Figures, Options, Seeds, fact_questions, known, load, means, script, span, teach
import re
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from minillm.preferences import ChatModel
from minillm.tools.evaluate import token_values
from minillm.tools.folder import read_metrics
from minillm.world import SHARES, World

STEPS = (25, 100, 400, 1800)
WRONG = {"is": "are", "are": "is", "was": "were", "has": "have", "have": "has"}


def agreement(model: ChatModel, world: World, count: int) -> float:
    """How often a sentence is likelier than the same with its one verb in the wrong number."""
    rows: list[tuple[list[int], list[int]]] = []
    for page in world.documents("wiki", 1):
        for sentence in re.findall(r"[A-Z][^.\n]{15,60}\.", page):
            words = sentence.split(" ")
            verbs = [i for i, word in enumerate(words) if word in WRONG]
            if len(verbs) == 1 and len(rows) < 2 * count:
                changed = [*words[: verbs[0]], WRONG[words[verbs[0]]], *words[verbs[0] + 1 :]]
                for text in (sentence, " ".join(changed)):
                    rows.append((model.form.prompt([{"content": ""}]), model.tokenizer.encode(text)))
    sums = [own.sum() for own in token_values(model.model, rows)]
    return float(np.mean([good > bad for good, bad in zip(sums[::2], sums[1::2], strict=True)]))


@torch.no_grad()
def styles(model: ChatModel, world: World, count: int) -> float:
    """How often a text is nearest to the others of its own kind."""
    states = {}
    for source in SHARES:
        tokens = [model.tokenizer.encode(text)[:96] for text in islice(world.documents(source, 5), 2 * count)]
        states[source] = torch.stack([model.model.model(torch.tensor([row]))[0].mean(0) for row in tokens])
    means = torch.stack([own[:count].mean(0) for own in states.values()])
    nearest = [torch.cdist(own[count:], means).argmin(1) == i for i, own in enumerate(states.values())]
    return float(torch.cat(nearest).double().mean())


def experiment(options: Options) -> Figures:
    other = World(options.seed + 1000)
    facts = fact_questions(options.seed, options.few(200, 8))
    run, found = Path(options.out, f"01_seed{options.seed}"), Figures()
    for steps in STEPS:
        goes_on = ("--resume",) if steps > STEPS[0] else ("--overwrite", "--seed", options.seed)
        script("train.py", "--out", run, "--steps", options.few(steps, 1 + STEPS.index(steps)), *goes_on)
        model = load(run)
        found[f"{steps} steps, grammar"] = agreement(model, other, options.few(300, 8))
        found[f"{steps} steps, facts"] = known(model, facts)
        found[f"{steps} steps, style"] = styles(model, other, options.few(40, 3))
        last = [event["nats_per_byte"] for event in read_metrics(run) if event["event"] == "val"][-1]
        found[f"{steps} steps, nats"] = last
    return found


ASKED = ("grammar", "facts", "style")


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "grammar: at least 95% at the end": one[f"{STEPS[-1]} steps, grammar"] >= 0.95,
        "facts: at least 95% at the end": one[f"{STEPS[-1]} steps, facts"] >= 0.95,
        "style: at least 90% at the end": one[f"{STEPS[-1]} steps, style"] >= 0.9,
    }


def sentence(seeds: Seeds) -> str:
    said = [f"{name} {span(seeds, *(f'{steps} steps, {name}' for steps in STEPS))}" for name in ASKED]
    return f"after {', '.join(map(str, STEPS))} steps: {'; '.join(said)}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ASKED:
        axes.plot(STEPS, means(seeds, (f"{steps} steps, {name}" for steps in STEPS)), "o-", label=name)
    axes.set(xscale="log", xlabel="steps", ylim=(0, 1.02), title="guessing the next word")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
