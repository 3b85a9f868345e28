"""Written principles, and a model that judges by them, can take the place of most of people's feedback.

    python lessons/13_constitution.py

principles.txt holds five questions about a reply, such as "Is it polite?". Five people are asked about a
tenth of the prompts; each puts the replies in order by one question. From that a judge learns: a reward
model that reads the question before the conversation. (For language models as judges, which compare two
replies in their context, there is rlhf.py --annotator model.) A reply's score is the sum over the questions.

    picks      a reward model learns from the judge's orders of replies to other prompts. Two learn from
               people alone: from what they said of all prompts (the demo's), and of that tenth. Each picks
               one of 8 replies to each new prompt, since PPO would take minutes for each.
    revision   of three replies that the assistant gave, the judge takes the best as the revision of the
               first; the question by which the first falls shortest is the critique. The assistant is
               fine-tuned on the revisions. (It is too small to read a critique and write a better reply.)

The rubric, which the judge never sees, says how good replies are (0 to 1), and which are flawed: rude, wordy,
harmful, or a guess where nobody knows. What would refute the claim: picks 0.03 worse than by people's orders
of all prompts, or no better than by those of a tenth; a principle without effect (if "brief" is left out, the
judge's own picks are not 5% longer); a fine-tuned assistant with more than half as many flawed replies.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from common import Figures, Options, Seeds, Verdict, learns, load, scores_of, script, span, teach, write_lines
from matplotlib.axes import Axes

from minillm.files import read_text
from minillm.io.rankings import read_rankings, read_responses
from minillm.preferences import ResponseSet, new_ranking, ranking_by, simulated_annotators
from minillm.tools.evaluate import Reply, prompts_of_each_kind, sample_replies
from minillm.world import World, assistant, user
from minillm.world.rubric import Score

LINES = read_text(Path(__file__).with_name("principles.txt")).splitlines()
PRINCIPLES = dict(line.split(": ") for line in LINES)  # the part of the rubric that each asks about, first
FLAWS = {"polite": "rude", "brief": "wordy", "honest": "guessed", "safe": "complied"}
RUBRIC = ("assistant", "people", "tenth", "judge", "revised")
N = 8


def under(question: str, one: ResponseSet) -> ResponseSet:
    """The set with a question about the reply before what the user said, which is all there is."""
    return replace(one, messages=[user(f"{question} {one.messages[-1]['content']}")], kind=None)


def flawed(score: Score) -> bool:
    return any(getattr(score, flaw) for flaw in FLAWS.values())


def experiment(options: Options) -> Figures:
    world, rlhf, sft = World(options.seed), options.run("rlhf"), options.run("sft")
    made, tenth = Path(options.out, f"13_seed{options.seed}"), options.few(700, 40)
    sets, found = read_responses(rlhf / "responses.jsonl"), Figures()
    some, others = sets[:tenth], sets[tenth : tenth + options.few(1500, 40)]

    def rubric(part: str, one: ResponseSet, text: str) -> Score:
        """The score of a reply, with the part that somebody is asked about in place of the whole."""
        prompt = world.prompt_of(one.messages)
        assert prompt is not None
        score = world.score(prompt, text)
        return replace(score, utility=getattr(score, part))

    orders = []
    for person, (part, question) in zip(simulated_annotators(5), PRINCIPLES.items(), strict=True):
        for one in some:
            order = person.rank(partial(rubric, part, one), one, 1, options.seed)
            orders.append(new_ranking(under(question, one), order, person.name, options.seed))
    judge = learns(options, made / "principles", orders)

    def judged(sets: list[ResponseSet]) -> np.ndarray:
        """The judge's scores. Float [principles, sets, responses]."""
        return np.stack([scores_of(judge, [under(ask, one) for one in sets]) for ask in PRINCIPLES.values()])

    by = judged(others)
    own = [new_ranking(one, ranking_by([*of]), "judge", 0) for one, of in zip(others, by.sum(0), strict=True)]
    said, keys = read_rankings(rlhf / "rankings.jsonl"), {one.key for one in some}
    models = {
        "people": rlhf / "reward",
        "tenth": learns(options, made / "tenth", [order for order in said if order.key in keys]),
        "judge": learns(options, made / "judge", own),
    }

    asked = [one for one in prompts_of_each_kind(world, "test", options.few(30, 2)) for _ in range(N)]
    replies = sample_replies(load(sft), asked, 1.0, seed=options.seed, world=world)
    groups = [replies[i : i + N] for i in range(0, len(replies), N)]
    offered = [ResponseSet(group[0].prompt.messages, [one.text for one in group]) for group in groups]

    def picks(scores: np.ndarray) -> list[Reply]:
        return [group[best] for group, best in zip(groups, scores.argmax(1), strict=True)]

    for name, run in models.items():
        found[name] = fmean(one.utility for one in picks(scores_of(run, offered)))
    parts, brief = judged(offered), [*PRINCIPLES].index("brief")
    for name, total in (("words", parts.sum(0)), ("words without", parts.sum(0) - parts[brief])):
        found[name] = fmean(one.words for one in picks(total))

    best = by.sum(0)[:, :3].argmax(1)  # the fourth of a set is a reply to another prompt
    worst = (by[:, :, 0] - by[:, range(len(best)), best]).argmin(0)
    first = [rubric("utility", one, one.responses[0]) for one in others]
    revised = [i for i, score in enumerate(first) if best[i] and flawed(score)]
    hits = [getattr(first[i], FLAWS.get([*PRINCIPLES][worst[i]], ""), False) for i in revised]
    found["critiques right"] = fmean(hits or [0])
    pairs = ((one.messages, one.responses[i]) for one, i in zip(others, best, strict=True))
    lines = ({"messages": [*before, assistant(text)]} for before, text in pairs if text.strip())
    data, run = write_lines(made / "revised.jsonl", lines), made / "revised"
    how = ("--steps", options.few(300, 3), "--seed", options.seed, "--overwrite")
    script("sft.py", "--init", sft, "--data", data, "--out", run, *how)
    after = sample_replies(load(run), asked, 1.0, seed=options.seed, world=world)
    for name, share, of in (("assistant", "flawed", replies), ("revised", "flawed after", after)):
        found |= {name: fmean(one.utility for one in of), share: fmean(flawed(one.score) for one in of)}
    return found


def verdict(seeds: Seeds) -> Verdict:
    checks = {
        "picks at most 0.03 below people's": all(one["judge"] >= one["people"] - 0.03 for one in seeds),
        "picks better than by a tenth": all(one["judge"] > one["tenth"] for one in seeds),
        'longer picks without "brief"': all(one["words without"] > 1.05 * one["words"] for one in seeds),
        "flaws halved by revision": all(one["flawed after"] <= one["flawed"] / 2 for one in seeds),
    }
    rubric = ", ".join(f"{name} {span(seeds, name, '{:.2f}')}" for name in RUBRIC)
    words = " → ".join(span(seeds, name, "{:.1f}") for name in ("words", "words without"))
    flawed = " → ".join(span(seeds, name) for name in ("flawed", "flawed after"))
    return checks, f"rubric: {rubric}; words without the principle of brevity {words}; flawed {flawed}"


def picture(axes: Axes, seeds: Seeds) -> None:
    axes.bar(RUBRIC, [fmean(one[name] for one in seeds) for name in RUBRIC], label="rubric, temperature 1")
    shares = [fmean(one[name] for one in seeds) for name in ("flawed", "flawed after")]
    axes.plot(["assistant", "revised"], shares, "o", color="C1", label="flawed replies")
    axes.set(ylim=(0, 1), title="constitution")


if __name__ == "__main__":
    teach(experiment, verdict, picture)
