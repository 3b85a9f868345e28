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

from minillm.compare.probes import Row, choices, held_out_text, response_logprobs, token_values
from minillm.data import Source
from minillm.preferences import ChatModel, ResponseSet
from minillm.run import read_metrics
from minillm.tools.evaluate import Reply, text_loss
from minillm.tools.judge import PairJudge, blind
from minillm.tools.measures import (
    Estimate,
    distinct,
    estimate,
    mean,
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


def groups_of(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts of each kind, and of all."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(number)
    return groups | {"all": list(range(len(prompts)))}


# ---- What the replies are like

Metric = tuple[Callable[[Sequence], Estimate], Callable[[Any], Any]]
REPLY_METRICS: dict[str, Metric] = {
    "ended": (share, lambda reply: reply.ended),
    "words": (mean, lambda reply: len(reply.text.split())),
    "repetition": (share, lambda reply: repetition(reply.text)),
    # Of a whole set, without an interval: it falls with the size of the set.
    "distinct": (lambda texts: estimate(distinct(texts), len(texts)), lambda reply: reply.text),
}
RUBRIC_METRICS: dict[str, Metric] = {
    "utility": (mean, lambda reply: reply.score.utility),
    "in_form": (share, lambda reply: reply.in_form),
    "right": (share, lambda reply: reply.right),
    "refused": (share, lambda reply: reply.score.refused),
    "said_unknown": (share, lambda reply: reply.score.said_unknown),
    "complied": (share, lambda reply: reply.score.complied),
    "rude": (share, lambda reply: reply.score.rude),
}
"""A kind of estimate, and the value of each reply that it is made of; the latter where there is a rubric."""


def reply_metrics(prompts: Sequence[Prompt], said: Said, on_world: bool) -> Found:
    """{sampling: {metric: {group: {model: estimate}}}}."""
    groups = groups_of(prompts)
    groups["not harm"] = [i for i, prompt in enumerate(prompts) if prompt.kind != "harm"]
    metrics = REPLY_METRICS | (RUBRIC_METRICS if on_world else {})
    return {
        sampling: {
            metric: {
                group: {name: estimated([value(own[i]) for i in numbers]) for name, own in of_model.items()}
                for group, numbers in groups.items()
            }
            for metric, (estimated, value) in metrics.items()
        }
        for sampling, of_model in said.items()
    }


def replies_json(prompts: Sequence[Prompt], said: Said) -> list[Found]:
    """Every prompt with what each model said, and the rubric's score of it."""

    def record(reply: Reply) -> Found:
        utility = reply.score and reply.score.utility
        return {"text": reply.text, "ended": reply.ended, "utility": utility}

    return [
        {
            "kind": prompt.kind,
            "messages": prompt.messages,
            "prompt": prompt.text,
            "said": {
                sampling: {name: record(replies[i]) for name, replies in of_model.items()}
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
        ResponseSet(after.prompt.messages, [after.text, before.text], after.prompt.kind)
        for sampling, earlier, later in keys
        for after, before in zip(said[sampling][later], said[sampling][earlier], strict=True)
    ]
    outcomes, found = iter(blind(judge, pairs, seed)), []
    for sampling, earlier, later in keys:
        own = [next(outcomes) for _ in prompts]
        rates = {
            group: win_rates([outcome for i in numbers if (outcome := own[i]) is not None])
            for group, numbers in groups_of(prompts).items()
        }
        names = {"judge": name, "sampling": sampling, "earlier": earlier, "later": later}
        found.append(names | {"left_out": own.count(None), "figures": rates})
    return found


# ---- What is likely


def pair_metrics(models: Sequence[ChatModel], pairs: Mapping[str, list[ResponseSet]]) -> Found:
    """By how much log p per byte, and how often, the first reply of a pair is the likelier one, of the pairs
    that every model has room for."""

    def has_room(one: ChatModel, pair: ResponseSet) -> bool:
        return all(one.has_room(pair.messages, len(one.tokenizer.encode(text))) for text in pair.responses)

    found: Found = {}
    for name, every in pairs.items():
        own = [pair for pair in every if all(has_room(one, pair) for one in models)]
        sizes = [[len(text.encode()) for text in pair.responses] for pair in own]
        found[name] = {"left_out": len(every) - len(own), "difference": {}, "as_likely": {}}
        for one in models:
            rates = np.divide(response_logprobs(one, own), sizes).reshape(-1, 2)
            values = rates[:, 0] - rates[:, 1]
            found[name]["difference"][one.name] = mean(values)
            found[name]["as_likely"][one.name] = share(values <= 0)
    return found


def text_metrics(models: Sequence[ChatModel], sources: Sequence[Source], origin: str, size: int) -> Found:
    """Nats per byte of held-out text, the same for all; `origin` says whose text it is."""
    documents = list(held_out_text(sources, VAL_FRACTION, size))
    if not documents:
        return {}
    sizes, nats = [len(text.encode()) for text in documents], {}
    for one in models:
        losses = [text_loss(one.model, one.tokenizer, [text], ended=True).nats for text in documents]
        nats[one.name] = mean(losses, sizes)
    return {"origin": origin, "documents": len(documents), "bytes": sum(sizes), "nats": nats}


def reply_rows(one: ChatModel, replies: Sequence[Reply]) -> list[Row]:
    """Replies as they were sampled, behind the prompts in a model's own form."""
    return [(one.prompt(reply.prompt.messages), reply.tokens) for reply in replies]


def kl_metrics(models: Sequence[ChatModel], said: Said) -> list[Found]:
    """KL(later ‖ earlier) on the later model's replies of the last sampling, per token and per reply; None
    where the two have different vocabularies, whose tokens mean different things."""
    sampling, found = list(said)[-1], []
    for earlier, later in combinations(models, 2):
        record: Found = {"later": later.name, "earlier": earlier.name, "sampling": sampling}
        record |= {"token": None, "response": None}
        same_size = later.model.config.vocab_size == earlier.model.config.vocab_size
        if same_size and later.tokenizer.vocabulary == earlier.tokenizer.vocabulary:
            replies = said[sampling][later.name]
            own, other = (reply_rows(one, replies) for one in (later, earlier))
            values = token_values(later.model, own, earlier.model, other)
            sums = [float(row.sum()) for row in values]
            record |= {"token": mean(sums, [len(row) for row in values]), "response": mean(sums)}
        found.append(record)
    return found


def sure_metrics(models: Sequence[ChatModel], said: Said, world: World, seed: int) -> Found:
    """{measure: {model: …}}: how sure each model is and how often it is right, of the answer it picks among
    some to a question of fact, and of its own greedy replies where it may know or not."""
    found: Found = {"choice": {}, "words": {}}
    for one in models:
        replies = [reply for reply in said["greedy"][one.name] if reply.prompt.kind in ("fact", "unknown")]
        facts = [reply.prompt for reply in replies if reply.prompt.kind == "fact"]
        found["choice"][one.name] = confidence(*choose(one, choices(world, facts, seed)))
        # The geometric mean of the probabilities of a reply's tokens.
        sure = np.exp([row.mean() for row in token_values(one.model, reply_rows(one, replies))])
        right = np.array([reply.right for reply in replies], np.float64)
        found["words"][one.name] = confidence(sure, right)
    return found


def choose(
    one: ChatModel, questions: Sequence[ResponseSet]
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """How sure the model is of the likeliest answer to each, of those given, and whether it is the first."""
    logprobs = response_logprobs(one, questions)
    sure = [1 / np.exp(own - own.max()).sum() for own in logprobs]
    return np.array(sure, np.float64), np.array([own.argmax() == 0 for own in logprobs], np.float64)


def confidence(sure: Float64[np.ndarray, " N"], right: Float64[np.ndarray, " N"]) -> Found:
    """How sure on average, how often right, and how far the two are apart."""
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
