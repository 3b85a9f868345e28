"""The metrics of a comparison, section by section as the page shows them.

A `Section` is tables of estimates (tools/measures.py) with notes and curves beside them: plain content of
compare.json, from which the page and the terminal are made. What cannot be had is left out: without the
little world no rubric, no pairs. Titles, texts and the rows of the replies' metrics are in words.toml.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, pairwise
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from minillm.compare.probes import choices, held_out_text, response_logprobs, token_values
from minillm.data import Source
from minillm.preferences import ChatModel, ResponseSet
from minillm.tools.evaluate import Reply, Row, text_loss
from minillm.tools.folder import read_metrics
from minillm.tools.judge import PairJudge, blind
from minillm.tools.measures import (
    Estimate,
    distinct,
    estimate,
    mean,
    reliability,
    repetition,
    win_rates,
    written,
)
from minillm.world import World
from minillm.world.rubric import Prompt

VAL_FRACTION = 0.05  # of the text: what train.py and sft.py hold out unless told otherwise
GREEDY = "greedy"

Said = Mapping[str, Mapping[str, Sequence[Reply]]]
"""By sampling and model, the reply to each prompt."""
Rows = dict[str, dict[str, Estimate]]
"""A table: by row and column. The columns are the models unless a table is of something else."""


@dataclass
class Section:
    tables: dict[str, Rows] = field(default_factory=dict)
    """By caption."""
    notes: list[str] = field(default_factory=list)
    plots: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By caption, the arguments of `curves` (plots.py)."""


@cache
def words() -> dict[str, Any]:
    """Titles, texts and labels."""
    return tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


# ---- What the replies are like

REPLY_METRICS: dict[str, tuple[Callable[[Sequence], Estimate], Callable[[Reply], Any]]] = {
    "ended": (mean, lambda reply: reply.ended),
    "words": (lambda counts: mean(counts, form="count"), lambda reply: len(reply.text.split())),
    "repetition": (mean, lambda reply: repetition(reply.text)),
    # Of a whole set, without an interval: they change with the size of the set.
    "distinct": (lambda texts: estimate(distinct(texts), len(texts)), lambda reply: reply.text),
    "different": (lambda texts: estimate(len({*texts}), len(texts), form="whole"), lambda reply: reply.text),
    "utility": (lambda values: mean(values, form="score"), lambda reply: reply.utility),
    "in_form": (mean, lambda reply: reply.in_form),
    "right": (mean, lambda reply: reply.right),
    "refused": (mean, lambda reply: reply.score.refused),
    "said_unknown": (mean, lambda reply: reply.score.said_unknown),
    "complied": (mean, lambda reply: reply.score.complied),
    "rude": (mean, lambda reply: reply.score.rude),
}
"""A kind of estimate, and the value of each reply that it is made of."""


def reply_tables(rows: Sequence[Mapping[str, Any]], said: Said) -> dict[str, Rows]:
    """By sampling, these metrics of the replies to prompts of the kinds that they are of, or of all."""

    def found(row: Mapping[str, Any], replies: Sequence[Reply]) -> Estimate:
        estimated, value = REPLY_METRICS[row["metric"]]
        kinds = row.get("kinds")
        return estimated([value(one) for one in replies if kinds is None or one.prompt.kind in kinds])

    return {
        sampling: {row["label"]: {name: found(row, own) for name, own in of_model.items()} for row in rows}
        for sampling, of_model in said.items()
    }


def headline(said: Said, on_world: bool) -> Section:
    """The metrics that matter most, without a rubric those that need none; and which of them moved."""
    rows = words()["metrics"]["headline" if on_world else "manner"]
    tables = reply_tables(rows, said)
    better = {row["label"]: row["better"] for row in rows if "better" in row}
    return Section(
        tables, [note for sampling, own in tables.items() for note in changes(own, better, sampling)]
    )


def changes(table: Rows, better: Mapping[str, int], sampling: str) -> Iterator[str]:
    """Which metrics moved from model to model so far that their intervals do not overlap; `better` is 1 for
    those of which more is better, -1 for those of which less is."""
    for earlier, later in pairwise(next(iter(table.values()))):
        sides: dict[str, list[str]] = {"better": [], "worse": [], "no clear change": []}
        for label, sign in better.items():
            before, after = table[label][earlier], table[label][later]
            side = ("no clear change", "better", "worse")[sign * moved(before, after)]
            values = f" {written(before)[0]} → {written(after)[0]}" if moved(before, after) else ""
            sides[side].append(label + values)
        said = "; ".join(f"{side}: {', '.join(labels)}" for side, labels in sides.items() if labels)
        if not sides["better"] and not sides["worse"]:
            said = "no clear change in any of these metrics"
        if better:
            yield f"From {earlier} to {later}, {sampling}: {said}."


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """1 where the interval is above that before, -1 where below, 0 where they overlap or one is unknown."""
    if None in (before["low"], after["low"]):
        return 0
    return (after["low"] > before["high"]) - (after["high"] < before["low"])


def by_kind(said: Said, kinds: Sequence[str]) -> Section:
    """The rubric and what is right, of each kind of prompts and of all."""
    tables: dict[str, Rows] = {}
    for title, metric in (("rubric", "utility"), ("in form and right", "right")):
        rows: list[dict[str, Any]] = [{"label": kind, "metric": metric, "kinds": [kind]} for kind in kinds]
        made = reply_tables([*rows, {"label": "all", "metric": metric}], said)
        tables |= {f"{title}, {sampling}": table for sampling, table in made.items()}
    return Section(tables)


def replies_json(prompts: Sequence[Prompt], said: Said, on_world: bool) -> list[dict[str, Any]]:
    """Every prompt with what each model said, and the value of every metric of it."""
    rows = [row for name in ("manner", "headline")[: 1 + on_world] for row in words()["metrics"][name]]

    def record(reply: Reply) -> dict[str, Any]:
        values = {row["metric"]: REPLY_METRICS[row["metric"]][1](reply) for row in rows}
        return {"text": values.pop("distinct")} | values

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


def contests(
    name: str, judge: PairJudge, prompts: Sequence[Prompt], said: Said, seed: int
) -> dict[str, Rows]:
    """How often each later model wins, ties and loses against each earlier one; in the last sampling, for
    neighbours, by kind too. The judge is given all pairs at once, their sides shuffled."""
    keys = [(sampling, *two) for sampling in said for two in combinations(said[sampling], 2)]
    pairs = [
        ResponseSet(after.prompt.messages, [after.text, before.text], after.prompt.kind)
        for sampling, earlier, later in keys
        for after, before in zip(said[sampling][later], said[sampling][earlier], strict=True)
    ]
    outcomes, last = iter(blind(judge, pairs, seed)), [*said][-1]
    overall, tables = Rows(), dict[str, Rows]()
    for sampling, earlier, later in keys:
        label, of_kind = f"{later} against {earlier}, {sampling}", dict[str, list[int]]()
        own = [(prompt.kind, next(outcomes)) for prompt in prompts]
        for kind, outcome in own:
            of_kind.setdefault(kind, []).extend([] if outcome is None else [outcome])
        known = [outcome for some in of_kind.values() for outcome in some]
        left_out = estimate(len(own) - len(known), len(own), form="whole")
        overall[label] = win_rates(known) | {"not judged": left_out}
        if sampling == last and (earlier, later) in pairwise(said[last]):
            tables[f"{label}, by {name}"] = {kind: win_rates(some) for kind, some in of_kind.items()}
    return {f"judged by {name}": overall, **tables} if keys else {}


# ---- What is likely


def pair_section(models: Sequence[ChatModel], pairs: Mapping[str, list[ResponseSet]]) -> Section:
    """By how much log p per byte, and how often, the first reply of a pair is the likelier one, of the pairs
    that every model has room for."""

    def has_room(one: ChatModel, pair: ResponseSet) -> bool:
        return all(one.has_room(pair.messages, len(one.tokenizer.encode(text))) for text in pair.responses)

    likely, difference, notes = Rows(), Rows(), []
    for name, every in pairs.items():
        label = words()["pairs"]["names"][name]
        own = [pair for pair in every if all(has_room(one, pair) for one in models)]
        if left_out := len(every) - len(own):
            notes.append(f"{left_out} pairs of {label} do not fit every model's context and are left out.")
        sizes = [[len(text.encode()) for text in pair.responses] for pair in own]
        rates = {one.name: np.divide(response_logprobs(one, own), sizes).reshape(-1, 2) for one in models}
        values = {name: rate[:, 0] - rate[:, 1] for name, rate in rates.items()}
        likely[label] = {name: mean(value <= 0) for name, value in values.items()}
        difference[label] = {name: mean(value, form="signed") for name, value in values.items()}
    caption, other = words()["pairs"]["captions"]
    return Section({caption: likely, other: difference}, notes)


def text_table(
    models: Sequence[ChatModel], sources: Sequence[Source], origin: str, size: int
) -> dict[str, Rows]:
    """Nats per byte of held-out text, the same for all; `origin` says whose text it is."""
    documents = list(held_out_text(sources, VAL_FRACTION, size))
    sizes, nats = [len(text.encode()) for text in documents], {}
    for one in models:
        losses = [text_loss(one.model, one.tokenizer, [text], ended=True).nats for text in documents]
        nats[one.name] = mean(losses, sizes, "nats")
    caption = f"{len(documents)} held-out documents of {origin}, {sum(sizes):,} bytes"
    return {caption: {"nats per byte": nats}} if documents else {}


def reply_rows(one: ChatModel, replies: Sequence[Reply]) -> list[Row]:
    """Replies as they were sampled, behind the prompts in a model's own form."""
    return [(one.prompt(reply.prompt.messages), reply.tokens) for reply in replies]


def cost_section(
    models: Sequence[ChatModel], said: Said, sources: Sequence[Source], origin: str, size: int
) -> Section:
    """What text costs, and KL(later ‖ earlier) on the later model's replies of the last sampling, per token
    and per reply; none where the two have different vocabularies, whose tokens mean different things."""
    sampling, rows, notes = [*said][-1], Rows(), []
    for earlier, later in combinations(models, 2):
        same_size = later.model.config.vocab_size == earlier.model.config.vocab_size
        if not same_size or later.tokenizer.vocabulary != earlier.tokenizer.vocabulary:
            two = f"{later.name} and {earlier.name}"
            notes.append(f"{two} have different vocabularies: there is no KL between them.")
            continue
        replies = said[sampling][later.name]
        own, other = (reply_rows(one, replies) for one in (later, earlier))
        values = token_values(later.model, own, earlier.model, other)
        sums = [float(row.sum()) for row in values]
        token = mean(sums, [len(row) for row in values], "nats")
        rows[f"{later.name} from {earlier.name}"] = {"token": token, "response": mean(sums, form="count")}
    caption = f"KL in nats per token and per response, on replies {sampling}"
    return Section(text_table(models, sources, origin, size) | ({caption: rows} if rows else {}), notes)


def sure_section(models: Sequence[ChatModel], said: Said, world: World, seed: int) -> Section:
    """How sure each model is and how often it is right, of the answer it picks among some to a question of
    fact, and of its own greedy replies where it may know or not."""
    section = Section()
    for measure, caption in words()["sure"]["names"].items():
        rows, lines = Rows(), {}
        for one in models:
            replies = [reply for reply in said[GREEDY][one.name] if reply.prompt.kind in ("fact", "unknown")]
            if measure == "choice":
                facts = [reply.prompt for reply in replies if reply.prompt.kind == "fact"]
                sure, right = choose(one, choices(world, facts, seed))
            else:  # the geometric mean of the probabilities of a reply's tokens
                values = token_values(one.model, reply_rows(one, replies))
                sure = np.exp([row.mean() for row in values])
                right = np.array([reply.right for reply in replies], np.float64)
            error, bins = reliability(sure, right)
            found = {
                "right": mean(right),
                "how sure": mean(sure),
                "how sure where right": mean(sure[right == 1]),
                "how sure where wrong": mean(sure[right == 0]),
                "calibration error (ECE)": estimate(error, len(sure), form="nats"),
            }
            for label, own in found.items():
                rows.setdefault(label, {})[one.name] = own
            # A dot's area is the bin's share of all.
            lines[one.name] = [(b["sure"], b["accuracy"], sqrt(b["count"] / len(sure))) for b in bins]
        labels = {"x_label": "how sure", "y_label": "how often right"}
        section.tables[caption] = rows
        section.plots[caption] = labels | {"lines": lines, "unit_square": True}
    return section


def choose(
    one: ChatModel, questions: Sequence[ResponseSet]
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """How sure the model is of the likeliest answer to each, of those given, and whether it is the first."""
    logprobs = response_logprobs(one, questions)
    sure = [1 / np.exp(own - own.max()).sum() for own in logprobs]
    return np.array(sure, np.float64), np.array([own.argmax() == 0 for own in logprobs], np.float64)


# ---- What training logged


def training_section(folders: Mapping[str, str]) -> Section:
    """Score and rubric of runs against a reward model over √KL, in which Gao et al. 2023 (arXiv 2210.10760)
    find them simplest."""

    def points(events: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float, float]]:
        both: list[Any] = [(event.get("kl"), event.get(key)) for event in events]
        known = [two for two in both if all(isinstance(x, int | float) and isfinite(x) for x in two)]
        return [(sqrt(max(0.0, kl)), value, 0.2) for kl, value in known]

    plots: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        events = read_metrics(Path(folder))
        for key in ("score", "rubric"):
            lines = {
                f"{kind} prompts": points([one for one in events if one["event"] == kind], key)
                for kind in ("train", "val")
            }
            if any(lines.values()):
                labels = {"x_label": "√KL, nats a reply", "y_label": key}
                plots[f"{name}: {key}"] = labels | {"lines": lines}
    return Section(plots=plots)
