"""The figures of a comparison, each as the part of compare.json that it is.

Every function takes the models, under their names, or what they said, and gives plain dicts, an `Estimate`
being a dict of its fields. A part that cannot be had is empty: without the little world no rubric, no pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from minillm.compare.probes import (
    Pair,
    choices,
    choose,
    held_out_documents,
    pair_differences,
    pair_rows,
    reply_kl,
    same_vocabulary,
    sureness,
    text_nats,
)
from minillm.compare.verdicts import Bout, Referee, blind
from minillm.data import Source
from minillm.responses import Respondent
from minillm.run import read_metrics
from minillm.tools.evaluate import Judged, Reply
from minillm.tools.measures import (
    Estimate,
    contest,
    distinct,
    mean,
    ratio,
    reliability,
    repetition,
    share,
    word_count,
)
from minillm.world import World
from minillm.world.rubric import Prompt

VAL_FRACTION = 0.05  # of the text: what train.py and sft.py hold out unless told otherwise
ALL = "all"

Found = dict[str, Any]
Said = Mapping[str, Mapping[str, Sequence[Reply]]]
"""By sampling and model, the reply to each prompt."""


def groups_of(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts of each kind, and of all."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(number)
    return groups | {ALL: list(range(len(prompts)))}


# ---- What the replies are like


def reply_figures(prompts: Sequence[Prompt], said: Said, world: World | None) -> Found:
    """{sampling: {figure: {group: {model: estimate}}}}."""
    groups = groups_of(prompts)
    groups["not harm"] = [i for i, prompt in enumerate(prompts) if prompt.kind != "harm"]
    found = {}
    for sampling, of_model in said.items():
        own = {name: _estimates(prompts, replies, groups, world) for name, replies in of_model.items()}
        found[sampling] = {
            figure: {group: {name: asdict(own[name][figure][group]) for name in own} for group in groups}
            for figure in next(iter(own.values()))
        }
    return found


def _estimates(
    prompts: Sequence[Prompt], replies: Sequence[Reply], groups: Mapping[str, list[int]], world: World | None
) -> dict[str, dict[str, Estimate]]:
    """{figure: {group: estimate}} of one model."""
    found = {
        figure: {group: estimate([values[i] for i in numbers]) for group, numbers in groups.items()}
        for figure, (estimate, values) in _values(prompts, replies, world).items()
    }
    # Of a whole set, without an interval: it falls with the size of the set.
    found["distinct"] = {
        group: Estimate(distinct([replies[i].text for i in numbers]), None, None, len(numbers))
        for group, numbers in groups.items()
    }
    return found


def _values(
    prompts: Sequence[Prompt], replies: Sequence[Reply], world: World | None
) -> dict[str, tuple[Callable, list]]:
    """For every figure the kind of its estimate and its value for each prompt."""
    texts = [reply.text for reply in replies]
    plain: dict[str, tuple[Callable, list]] = {
        "ended": (share, [reply.ended for reply in replies]),
        "words": (mean, [word_count(text) for text in texts]),
        "repetition": (share, [repetition(text) for text in texts]),
    }
    if world is None:
        return plain
    judged = judge_all(prompts, replies, world)
    flags = ("refused", "said_unknown", "complied", "rude")
    return plain | {
        "utility": (mean, [one.score.utility for one in judged]),
        "in_form": (share, [one.in_form for one in judged]),
        "right": (share, [one.right for one in judged]),
        **{flag: (share, [getattr(one.score, flag) for one in judged]) for flag in flags},
    }


def judge_all(prompts: Sequence[Prompt], replies: Sequence[Reply], world: World) -> list[Judged]:
    """Every reply with the rubric's score."""
    pairs = zip(prompts, replies, strict=True)
    return [Judged(prompt, reply, world.score(prompt, reply.text)) for prompt, reply in pairs]


def replies_json(prompts: Sequence[Prompt], said: Said, world: World | None) -> list[Found]:
    """Every prompt with what each model said, and the rubric's price of it."""

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


def contests(judge: str, referee: Referee, prompts: Sequence[Prompt], said: Said, seed: int) -> list[Found]:
    """One for each sampling and each two models; a win is the later one's. The referee is given all bouts
    at once, their sides shuffled."""
    keys = [(sampling, *pair) for sampling in said for pair in combinations(said[sampling], 2)]
    bouts = [
        Bout(prompt, after.text, before.text)
        for sampling, earlier, later in keys
        for prompt, after, before in zip(prompts, said[sampling][later], said[sampling][earlier], strict=True)
    ]
    verdicts, groups, found = blind(referee, bouts, seed), groups_of(prompts), []
    for number, (sampling, earlier, later) in enumerate(keys):
        own = verdicts[number * len(prompts) : (number + 1) * len(prompts)]
        figures = {
            group: {name: asdict(one) for name, one in contest(_given(own, numbers)).items()}
            for group, numbers in groups.items()
        }
        names = {"judge": judge, "sampling": sampling, "earlier": earlier, "later": later}
        found.append(names | {"left_out": own.count(None), "figures": figures})
    return found


def _given(verdicts: Sequence[int | None], numbers: Sequence[int]) -> list[int]:
    return [verdict for i in numbers if (verdict := verdicts[i]) is not None]


# ---- What is likely


def world_pairs(world: World, split: str, count: int) -> dict[str, list[Pair]]:
    """By name, pairs of a helpful and a harmful reply to one prompt."""
    advice = world.paired_continuations(split, count)
    return {
        "advice": [([{"role": "user", "content": ask}], good, bad) for ask, good, bad in advice],
        **{
            flaw: [
                (prompt.messages, good, bad) for prompt, good, bad in world.reply_pairs(split, flaw, count)
            ]
            for flaw in ("comply", "rude")
        },
    }


def pair_figures(respondents: Sequence[Respondent], pairs: Mapping[str, list[Pair]]) -> Found:
    """How far and how often the helpful reply of a pair is likelier, of the pairs that every model has
    room for."""
    found: Found = {}
    for name, every in pairs.items():
        own = [pair for pair in every if all(_has_room(respondent, pair) for respondent in respondents)]
        differences = {respondent.name: pair_differences(respondent, own) for respondent in respondents}
        found[name] = {
            "left_out": len(every) - len(own),
            "difference": {model: asdict(mean(values)) for model, values in differences.items()},
            "as_likely": {
                model: asdict(share([value <= 0 for value in values]))
                for model, values in differences.items()
            },
        }
    return found


def _has_room(respondent: Respondent, pair: Pair) -> bool:
    longest = respondent.model.config.max_position_embeddings
    return all(len(context) + len(said) <= longest for context, said in pair_rows(respondent, [pair]))


# ---- What it cost


def text_figures(
    respondents: Sequence[Respondent], sources: Sequence[Source], origin: str, size: int
) -> Found:
    """Nats per byte of held-out text, the same for all; `origin` says whose text it is."""
    documents = held_out_documents(sources, VAL_FRACTION, size)
    if not documents:
        return {}
    nats = {respondent.name: text_nats(respondent, documents) for respondent in respondents}
    estimates = {name: asdict(ratio(*own)) for name, own in nats.items()}
    return {
        "origin": origin,
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in documents),
        "nats": estimates,
    }


def kl_figures(respondents: Sequence[Respondent], prompts: Sequence[Prompt], said: Said) -> list[Found]:
    """KL(later ‖ earlier) on the later model's replies of the last sampling, a token and a reply; None where
    the two have other vocabularies."""
    sampling, found = list(said)[-1], []
    for earlier, later in combinations(respondents, 2):
        record: Found = {"later": later.name, "earlier": earlier.name, "sampling": sampling}
        if same_vocabulary(later, earlier):
            messages = [prompt.messages for prompt in prompts]
            replies = [reply.tokens for reply in said[sampling][later.name]]
            values = reply_kl(later, earlier, messages, replies)
            sums = [float(own.sum()) for own in values]
            record |= {
                "token": asdict(ratio(sums, [len(own) for own in values])),
                "response": asdict(mean(sums)),
            }
        else:
            record |= {"token": None, "response": None}
        found.append(record)
    return found


# ---- Sure and right


def sure_figures(
    respondents: Sequence[Respondent], prompts: Sequence[Prompt], said: Said, world: World, seed: int
) -> Found:
    """{measure: {model: …}}: how sure each model is and how often it is right, of the answer it picks among
    some to a question of fact, and of its own greedy replies where it may know or not."""
    found: Found = {"choice": {}, "words": {}}
    facts = [prompt for prompt in prompts if prompt.kind == "fact"]
    numbers = [i for i, prompt in enumerate(prompts) if prompt.kind in ("fact", "unknown")]
    questions, asked = choices(world, facts, seed), [prompts[i] for i in numbers]
    for respondent in respondents:
        replies = [said["greedy"][respondent.name][i] for i in numbers]
        messages, tokens = [prompt.messages for prompt in asked], [reply.tokens for reply in replies]
        right = np.array([one.right for one in judge_all(asked, replies, world)], np.float64)
        found["choice"][respondent.name] = _confidence(*choose(respondent, questions))
        found["words"][respondent.name] = _confidence(sureness(respondent, messages, tokens), right)
    return found


def _confidence(sure: Float64[np.ndarray, " N"], right: Float64[np.ndarray, " N"]) -> Found:
    error, bins = reliability(sure, right)
    return {
        "right": asdict(share(right.tolist())),
        "sure": asdict(mean(sure.tolist())),
        "sure_right": asdict(mean(sure[right == 1].tolist())),
        "sure_wrong": asdict(mean(sure[right == 0].tolist())),
        "error": asdict(Estimate(error, None, None, len(sure))),
        "bins": bins,
    }


# ---- What training logged


def training_figures(folders: Mapping[str, str]) -> Found:
    """Score, rubric and KL of the events that a run against a reward model logged, by model."""
    found = {}
    for name, folder in folders.items():
        events = [
            {
                key: event[key] if key in ("event", "step") or _is_number(event.get(key)) else None
                for key in ("event", "step", "kl", "score", "rubric")
            }
            for event in read_metrics(Path(folder))
            if event["event"] in ("train", "val") and _is_number(event.get("kl"))
        ]
        if events:
            found[name] = events
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
