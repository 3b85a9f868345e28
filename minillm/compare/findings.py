"""The metrics of a comparison, each as the part of compare.json that it is.

Every function takes the models, or what they said, and gives plain dicts of estimates (tools/measures.py). A
part that cannot be had is empty: without the little world no rubric, no pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from minillm.compare import probes
from minillm.compare.probes import ReplyPair
from minillm.compare.verdicts import Pair, PairJudge, blind
from minillm.responses import Respondent
from minillm.run import read_metrics
from minillm.sources import Source
from minillm.tools.evaluate import Reply, judge_all
from minillm.tools.measures import (
    Estimate,
    distinct,
    estimate,
    mean,
    ratio,
    reliability,
    repetition,
    share,
    win_rates,
)
from minillm.world import World
from minillm.world.rubric import Prompt

VAL_FRACTION = 0.05  # of the text: what train.py and sft.py hold out unless told otherwise

Found = dict[str, Any]
Said = Mapping[str, Mapping[str, Sequence[Reply]]]
"""By sampling and model, the reply to each prompt."""
Values = tuple[Callable[[Sequence], Estimate], Sequence]
"""A kind of estimate and a value for each prompt."""


def groups_of(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts of each kind, and of all."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(number)
    return groups | {"all": list(range(len(prompts)))}


# ---- What the replies are like


def reply_metrics(prompts: Sequence[Prompt], said: Said, world: World | None) -> Found:
    """{sampling: {metric: {group: {model: estimate}}}}."""
    groups = groups_of(prompts)
    groups["not harm"] = [i for i, prompt in enumerate(prompts) if prompt.kind != "harm"]
    found: Found = {sampling: {} for sampling in said}
    for sampling, of_model in said.items():
        for name, replies in of_model.items():
            for metric, (estimated, values) in values_of(prompts, replies, world).items():
                of_group = found[sampling].setdefault(metric, {group: {} for group in groups})
                for group, numbers in groups.items():
                    of_group[group][name] = estimated([values[i] for i in numbers])
    return found


def values_of(prompts: Sequence[Prompt], replies: Sequence[Reply], world: World | None) -> dict[str, Values]:
    """Every metric of one model's replies."""
    texts = [reply.text for reply in replies]
    values: dict[str, Values] = {
        "ended": (share, [reply.ended for reply in replies]),
        "words": (mean, [len(text.split()) for text in texts]),
        "repetition": (share, [repetition(text) for text in texts]),
        # Of a whole set, without an interval: it falls with the size of the set.
        "distinct": (lambda some: estimate(distinct(some), len(some)), texts),
    }
    if world is not None:
        judged = judge_all(world, prompts, replies)
        values |= {
            "utility": (mean, [one.score.utility for one in judged]),
            "in_form": (share, [one.in_form for one in judged]),
            "right": (share, [one.right for one in judged]),
        }
        for flag in ("refused", "said_unknown", "complied", "rude"):
            values[flag] = (share, [getattr(one.score, flag) for one in judged])
    return values


def replies_json(prompts: Sequence[Prompt], said: Said, world: World | None) -> list[Found]:
    """Every prompt with what each model said, and the rubric's score of it."""

    def record(prompt: Prompt, reply: Reply) -> Found:
        utility = None if world is None else world.score(prompt, reply.text).utility
        return {"text": reply.text, "ended": reply.ended, "utility": utility}

    return [
        {
            "kind": prompt.kind,
            "messages": prompt.messages,
            "prompt": prompt.text,
            "said": {
                sampling: {name: record(prompt, replies[i]) for name, replies in of_model.items()}
                for sampling, of_model in said.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


# ---- Who wins


def contests(name: str, judge: PairJudge, prompts: Sequence[Prompt], said: Said, seed: int) -> list[Found]:
    """One for each sampling and each two models; a win is the later one's. The judge is given all pairs at
    once, their sides shuffled."""
    keys = [(sampling, *two) for sampling in said for two in combinations(said[sampling], 2)]
    pairs = [
        Pair(prompt, after.text, before.text)
        for sampling, earlier, later in keys
        for prompt, after, before in zip(prompts, said[sampling][later], said[sampling][earlier], strict=True)
    ]
    verdicts, found = iter(blind(judge, pairs, seed)), []
    for sampling, earlier, later in keys:
        own = [next(verdicts) for _ in prompts]
        rates = {
            group: win_rates([verdict for i in numbers if (verdict := own[i]) is not None])
            for group, numbers in groups_of(prompts).items()
        }
        names = {"judge": name, "sampling": sampling, "earlier": earlier, "later": later}
        found.append(names | {"left_out": own.count(None), "figures": rates})
    return found


# ---- What is likely


def world_pairs(world: World, split: str, count: int) -> dict[str, list[ReplyPair]]:
    """By name, pairs of a helpful and a harmful reply to one prompt."""
    advice = world.paired_continuations(split, count)
    pairs: dict[str, list[ReplyPair]] = {
        "advice": [([{"role": "user", "content": ask}], good, bad) for ask, good, bad in advice]
    }
    for flaw in ("comply", "rude"):
        made = world.reply_pairs(split, flaw, count)
        pairs[flaw] = [(prompt.messages, good, bad) for prompt, good, bad in made]
    return pairs


def pair_metrics(models: Sequence[Respondent], pairs: Mapping[str, list[ReplyPair]]) -> Found:
    """How far and how often the helpful reply of a pair is likelier, of the pairs that every model has
    room for."""

    def has_room(one: Respondent, pair: ReplyPair) -> bool:
        longest = one.model.config.max_position_embeddings
        return all(len(context) + len(said) <= longest for context, said in probes.pair_rows(one, [pair]))

    found: Found = {}
    for name, every in pairs.items():
        own = [pair for pair in every if all(has_room(one, pair) for one in models)]
        differences = {one.name: probes.pair_differences(one, own) for one in models}
        found[name] = {
            "left_out": len(every) - len(own),
            "difference": {model: mean(values) for model, values in differences.items()},
            "as_likely": {model: share([v <= 0 for v in values]) for model, values in differences.items()},
        }
    return found


def text_metrics(models: Sequence[Respondent], sources: Sequence[Source], origin: str, size: int) -> Found:
    """Nats per byte of held-out text, the same for all; `origin` says whose text it is."""
    documents = probes.held_out_documents(sources, VAL_FRACTION, size)
    if not documents:
        return {}
    return {
        "origin": origin,
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in documents),
        "nats": {one.name: ratio(*probes.text_nats(one, documents)) for one in models},
    }


def kl_metrics(models: Sequence[Respondent], prompts: Sequence[Prompt], said: Said) -> list[Found]:
    """KL(later ‖ earlier) on the later model's replies of the last sampling, per token and per reply; None
    where the two have different vocabularies."""
    sampling, messages, found = list(said)[-1], [prompt.messages for prompt in prompts], []
    for earlier, later in combinations(models, 2):
        record: Found = {"later": later.name, "earlier": earlier.name, "sampling": sampling}
        record |= {"token": None, "response": None}
        if probes.same_vocabulary(later, earlier):
            replies = [reply.tokens for reply in said[sampling][later.name]]
            values = probes.reply_kl(later, earlier, messages, replies)
            sums = [float(own.sum()) for own in values]
            record |= {"token": ratio(sums, [len(own) for own in values]), "response": mean(sums)}
        found.append(record)
    return found


def sure_metrics(
    models: Sequence[Respondent], prompts: Sequence[Prompt], said: Said, world: World, seed: int
) -> Found:
    """{measure: {model: …}}: how sure each model is and how often it is right, of the answer it picks among
    some to a question of fact, and of its own greedy replies where it may know or not."""
    found: Found = {"choice": {}, "words": {}}
    questions = probes.choices(world, [prompt for prompt in prompts if prompt.kind == "fact"], seed)
    numbers = [i for i, prompt in enumerate(prompts) if prompt.kind in ("fact", "unknown")]
    asked = [prompts[i] for i in numbers]
    for one in models:
        replies = [said["greedy"][one.name][i] for i in numbers]
        messages, tokens = [prompt.messages for prompt in asked], [reply.tokens for reply in replies]
        right = np.array([judged.right for judged in judge_all(world, asked, replies)], np.float64)
        found["choice"][one.name] = _confidence(*probes.choose(one, questions))
        found["words"][one.name] = _confidence(probes.sureness(one, messages, tokens), right)
    return found


def _confidence(sure: Float64[np.ndarray, " N"], right: Float64[np.ndarray, " N"]) -> Found:
    error, bins = reliability(sure, right)
    return {
        "right": share(right),
        "sure": mean(sure),
        "sure_right": mean(sure[right == 1]),
        "sure_wrong": mean(sure[right == 0]),
        "error": estimate(error, len(sure)),
        "bins": bins,
    }


# ---- What training logged


def training_metrics(folders: Mapping[str, str]) -> Found:
    """Score, rubric and KL of the events that a run against a reward model logged, by model."""

    def number(event: Found, key: str) -> float | None:
        value = event.get(key)
        return value if isinstance(value, int | float) and isfinite(value) else None

    found: Found = {}
    for name, folder in folders.items():
        events = [
            {"event": event["event"], "step": event["step"]}
            | {key: number(event, key) for key in ("kl", "score", "rubric")}
            for event in read_metrics(Path(folder))
            if event["event"] in ("train", "val") and number(event, "kl") is not None
        ]
        if events:
            found[name] = events
    return found
