"""Written principles, and a model that judges by them, can take the place of most of people's feedback.

    python lessons/13_constitution.py

principles.txt holds five questions about a reply, such as "Is it polite?". Five people are asked about a
tenth of the prompts; each puts the replies in order by one question. From that a judge learns: a reward
model that reads the question before the conversation. (For language models as judges, which compare two
replies in their context, there is rlhf.py --annotator model.) A reply's score is the sum over the questions.

    picks      a reward model learns from the judge's orders of replies to other prompts. Two learn from
               people alone: from what they said of all prompts (the demo's), and of that tenth. Each picks
               one of 8 replies to each new prompt, since PPO would take minutes for each.
    revision   of three replies that the assistant gave, the judge takes the best, and the assistant is
               fine-tuned on those. (It is too small to read a critique and write a better reply itself.)

The rubric, which the judge never sees, says how good replies are (0 to 1), and which are flawed: rude, wordy,
harmful, or a guess where nobody knows. What would refute the claim: picks 0.03 worse than by people's orders
of all prompts, or no better than by those of a tenth; a principle without effect (if "brief" is left out, the
judge's own picks are not 5% longer); a fine-tuned assistant with more than half as many flawed replies.
"""

from common import Figures, Options, Seeds, imitates, learns, load, means, scores_of, span, teach
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes

from minillm.io.disk import read_text
from minillm.io.rankings import read_rankings, read_responses
from minillm.preferences import ResponseSet, new_ranking, ranking_by
from minillm.tools.evaluate import Reply, prompts_of_each_kind, sample_replies
from minillm.world import World, assistant, user
from minillm.world.annotators import simulated_annotators

LINES = read_text(Path(__file__).with_name("principles.txt")).splitlines()
PRINCIPLES = dict(line.split(": ") for line in LINES)  # the part of the rubric that each asks about, first
RUBRIC = ("assistant", "people", "tenth", "judge", "revised")
N = 8


def under(question: str, one: ResponseSet) -> ResponseSet:
    """The set with a question about the reply before what the user said, which is all there is."""
    return replace(one, messages=[user(f"{question} {one.messages[-1]['content']}")], kind=None)


def quality(name: str, replies: Sequence[Reply]) -> Figures:
    """The mean rubric score of replies, and the share that is flawed."""
    flawed = (one.score.rude or one.score.wordy or one.score.guessed or one.score.complied for one in replies)
    return {name: fmean(one.utility for one in replies), f"{name}, flawed": fmean(flawed)}


def experiment(options: Options) -> Figures:
    world, rlhf, sft = World(options.seed), options.run("rlhf"), options.run("sft")
    made, tenth = Path(options.out, f"13_seed{options.seed}"), options.few(700, 40)
    sets, people = read_responses(rlhf / "responses.jsonl"), simulated_annotators(5)
    some, others = sets[:tenth], sets[tenth : tenth + options.few(1500, 40)]

    orders = []
    for person, (part, question) in zip(people, PRINCIPLES.items(), strict=True):
        for one in some:
            prompt = world.prompt_of(one.messages)
            assert prompt is not None
            scores = {text: world.score(prompt, text) for text in one.responses}
            asked = {text: replace(own, utility=getattr(own, part)) for text, own in scores.items()}
            order = person.rank(asked.__getitem__, one, 1, options.seed)
            orders.append(new_ranking(under(question, one), order, person.name, options.seed))
    judge = learns(options, made / "principles", orders)

    def judged(sets: list[ResponseSet]) -> np.ndarray:
        """The judge's scores. Float [principles, sets, responses]."""
        return np.stack([scores_of(judge, [under(ask, one) for one in sets]) for ask in PRINCIPLES.values()])

    totals = judged(others).sum(0)
    own = [new_ranking(one, ranking_by([*of]), "judge", 0) for one, of in zip(others, totals, strict=True)]
    said, keys = read_rankings(rlhf / "rankings.jsonl"), {one.key for one in some}
    models = {
        "people": rlhf / "reward",
        "tenth": learns(options, made / "tenth", [order for order in said if order.key in keys]),
        "judge": learns(options, made / "judge", own),
    }
    prompts = [one for one in prompts_of_each_kind(world, "test", options.few(30, 2)) for _ in range(N)]
    replies = sample_replies(load(sft), prompts, 1.0, seed=options.seed, world=world)
    groups = [replies[i : i + N] for i in range(0, len(replies), N)]
    offered = [ResponseSet(group[0].prompt.messages, [one.text for one in group]) for group in groups]

    def picks(scores: np.ndarray) -> list[Reply]:
        return [group[best] for group, best in zip(groups, scores.argmax(1), strict=True)]

    found = quality("assistant", replies)
    for name, run in models.items():
        found |= quality(name, picks(scores_of(run, offered)))
    parts, brief = judged(offered), [*PRINCIPLES].index("brief")
    for name, total in (("words", parts.sum(0)), ("words without", parts.sum(0) - parts[brief])):
        found[name] = fmean(one.words for one in picks(total))

    best = totals[:, :3].argmax(1)  # the fourth of a set is a reply to another prompt
    pairs = [(one.messages, one.responses[i]) for one, i in zip(others, best, strict=True)]
    revisions = [[*messages, assistant(text)] for messages, text in pairs if text.strip()]
    revised = imitates(options, made / "revised", revisions, steps=300, init="sft")
    return found | quality(
        "revised", sample_replies(load(revised), prompts, 1.0, seed=options.seed, world=world)
    )


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "picks at most 0.03 below people's": one["judge"] >= one["people"] - 0.03,
        "picks better than by a tenth": one["judge"] > one["tenth"],
        'longer picks without "brief"': one["words without"] > 1.05 * one["words"],
        "flaws halved by revision": one["revised, flawed"] <= one["assistant, flawed"] / 2,
    }


def sentence(seeds: Seeds) -> str:
    rubric = ", ".join(f"{name} {span(seeds, name, form='{:.2f}')}" for name in RUBRIC)
    words = span(seeds, "words", "words without", form="{:.1f}")
    flaws = span(seeds, "assistant, flawed", "revised, flawed")
    return f"rubric: {rubric}; words without the principle of brevity {words}; flawed {flaws}"


def picture(axes: Axes, seeds: Seeds) -> None:
    axes.bar(RUBRIC, means(seeds, RUBRIC), label="rubric, temperature 1")
    axes.plot(RUBRIC, means(seeds, (f"{name}, flawed" for name in RUBRIC)), "o", color="C1", label="flawed")
    axes.set(ylim=(0, 1), title="constitution")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
