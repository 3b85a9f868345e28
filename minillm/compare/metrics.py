"""The metrics of a comparison, section by section as the page shows them, and what they read of a model.

A `Section` is tables of estimates (tools/measures.py) with notes and curves beside them: plain content of
compare.json, from which the page and the terminal are made. What cannot be had is left out: without the
little world no rubric, no pairs. Titles, texts and the rows of the replies' metrics are in metrics.toml.

What is likely is read of rows, a context and the tokens said after it, each model in its own form: a chat
model after its chat template, a base model after the question as a line of text.

Sources: KL between policies over the whole vocabulary, Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155),
section 3.5; what alignment does to calibration, OpenAI 2023, "GPT-4" (arXiv 2303.08774), figure 8.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from math import ceil, sqrt
from operator import attrgetter
from typing import Any

import numpy as np

from minillm.corpus import Source, split_documents
from minillm.preferences import ChatModel, ResponseSet
from minillm.tools.annotators import Judge, outcomes_of
from minillm.tools.evaluate import Reply, Row, prompts_of_each_kind, sample_replies, text_loss, token_values
from minillm.tools.measures import Estimate, Rows, estimate, mean, reliability, win_rates, written
from minillm.tools.streams import tables
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt

WORDS = tables(__file__)
"""Titles, texts and labels."""
VAL_FRACTION = 0.05  # of the text: what train.py and sft.py hold out unless told otherwise
GREEDY = "greedy"

Said = Mapping[str, Mapping[str, Sequence[Reply]]]
"""By sampling and model, the reply to each prompt."""


@dataclass
class Section:
    tables: dict[str, Rows] = field(default_factory=dict)
    """By caption."""
    notes: list[str] = field(default_factory=list)
    plots: dict[str, dict[str, list[tuple[float, float, float]]]] = field(default_factory=dict)
    """By caption and model, how sure it is, how often right, and the size of the dot, from 0 to 1."""


# ---- What the replies are like


def reply_tables(rows: Sequence[Mapping[str, Any]], said: Said) -> dict[str, Rows]:
    """By sampling, the means of what these rows of metrics.toml name of a `Reply`, to prompts of their kinds
    or of all; `different` is how many replies there are that are not the same."""

    def found(row: Mapping[str, Any], replies: Sequence[Reply]) -> Estimate:
        metric, kinds = row["metric"], row.get("kinds")
        own = [one for one in replies if kinds is None or one.prompt.kind in kinds]
        if metric == "different":  # without an interval, for it changes with the number of replies
            return estimate(len({one.text for one in own}), len(own), form="whole")
        return mean([attrgetter(metric)(one) for one in own], form=row.get("form", "share"))

    return {
        sampling: {row["label"]: {name: found(row, own) for name, own in of_model.items()} for row in rows}
        for sampling, of_model in said.items()
    }


def reply_section(name: str, said: Said) -> Section:
    """The metrics under a name in metrics.toml; where these say what is better, also which of them moved."""
    rows = WORDS["metrics"][name]
    tables = reply_tables(rows, said)
    better = {row["label"]: row["better"] for row in rows if "better" in row}
    moved = [changes(own, better, sampling) for sampling, own in tables.items() if better]
    return Section(tables, [note for of_sampling in moved for note in of_sampling])


def changes(table: Mapping[str, Any], better: Mapping[str, int], sampling: str) -> Iterator[str]:
    """Which metrics moved from model to model so far that their intervals do not overlap; `better` is 1 for
    those of which more is better, -1 for those of which less is."""
    for earlier, later in pairwise(next(iter(table.values()))):
        sides: dict[str, list[str]] = {"better": [], "worse": [], "no clear change": []}
        for label, sign in better.items():
            before, after = table[label][earlier], table[label][later]
            change = 0
            if before["low"] is not None and after["low"] is not None:
                change = (after["low"] > before["high"]) - (after["high"] < before["low"])
            values = f" {written(before)[0]} → {written(after)[0]}" if change else ""
            sides[("no clear change", "better", "worse")[sign * change]].append(label + values)
        said = "; ".join(f"{side}: {', '.join(labels)}" for side, labels in sides.items() if labels)
        if not sides["better"] and not sides["worse"]:
            said = "no clear change in any of these metrics"
        yield f"From {earlier} to {later}, {sampling}: {said}."


def by_kind(said: Said, kinds: Sequence[str]) -> Section:
    """The rubric and what is right, of each kind of prompts and of all."""
    tables: dict[str, Rows] = {}
    for metric in WORDS["metrics"]["by_kind"]:
        rows = [metric | {"label": kind, "kinds": [kind]} for kind in kinds] + [metric | {"label": "all"}]
        made = reply_tables(rows, said)
        tables |= {f"{metric['label']}, {sampling}": table for sampling, table in made.items()}
    return Section(tables)


def world_metrics(models: Sequence[ChatModel], world: World, prompts_per_kind: int) -> dict[str, Rows]:
    """What the rubric says of several models' greedy replies to development prompts, by kind."""
    prompts = prompts_of_each_kind(world, "dev", prompts_per_kind)
    return by_kind(
        {GREEDY: {one.name: sample_replies(one, prompts, world=world) for one in models}}, KINDS
    ).tables


def replies_json(prompts: Sequence[Prompt], said: Said) -> list[dict[str, Any]]:
    """Every prompt with what each model said, whether it ended, and the rubric's score if there is one."""

    def record(reply: Reply) -> dict[str, Any]:
        rubric = {"utility": reply.utility} if reply.score else {}
        return {"text": reply.text, "ended": reply.ended} | rubric

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


def contests(name: str, judge: Judge, prompts: Sequence[Prompt], said: Said) -> dict[str, Rows]:
    """How often each later model wins, ties and loses against each earlier one; in the last sampling, for
    neighbours, by kind too. The judge is given all pairs at once."""
    keys = [(sampling, *two) for sampling in said for two in combinations(said[sampling], 2)]
    pairs = [
        ResponseSet(after.prompt.messages, [after.text, before.text], after.prompt.kind)
        for sampling, earlier, later in keys
        for after, before in zip(said[sampling][later], said[sampling][earlier], strict=True)
    ]
    outcomes, last = iter(outcomes_of(judge, pairs)), [*said][-1]
    overall, tables = Rows(), dict[str, Rows]()
    for sampling, earlier, later in keys:
        label = f"{later} against {earlier}, {sampling}"
        own = [(prompt.kind, next(outcomes)) for prompt in prompts]
        known = [(kind, outcome) for kind, outcome in own if outcome is not None]
        left_out = estimate(len(own) - len(known), len(own), form="whole")
        overall[label] = win_rates([outcome for _, outcome in known]) | {"not judged": left_out}
        if sampling == last and (earlier, later) in pairwise(said[last]):
            tables[f"{label}, by {name}"] = {
                kind: win_rates([outcome for k, outcome in known if k == kind]) for kind in dict(own)
            }
    return {f"judged by {name}": overall, **tables} if keys else {}


# ---- What is likely


def pair_section(models: Sequence[ChatModel], pairs: Mapping[str, list[ResponseSet]]) -> Section:
    """By how much log p per byte, and how often, the first reply of a pair is the likelier one, of the pairs
    that every model has room for."""

    def has_room(one: ChatModel, pair: ResponseSet) -> bool:
        return all(one.has_room(pair.messages, len(one.tokenizer.encode(text))) for text in pair.responses)

    likely, difference, notes = Rows(), Rows(), []
    for name, every in pairs.items():
        label = WORDS["pairs"]["names"][name]
        own = [pair for pair in every if all(has_room(one, pair) for one in models)]
        if left_out := len(every) - len(own):
            notes.append(f"{left_out} pairs of {label} do not fit every model's context and are left out.")
        texts = [(pair.messages, text) for pair in own for text in pair.responses]
        likely[label], difference[label] = {}, {}
        for one in models:
            rows = [(one.prompt(messages), one.tokenizer.encode(text)) for messages, text in texts]
            sums = [float(logprobs.sum()) for logprobs in token_values(one.model, rows)]
            rates = np.array(sums) / [len(text.encode()) for _, text in texts]
            likely[label][one.name] = mean(rates[::2] <= rates[1::2])
            difference[label][one.name] = mean(rates[::2] - rates[1::2], form="signed")
    caption, other = WORDS["pairs"]["captions"]
    return Section({caption: likely, other: difference}, notes)


def text_table(
    models: Sequence[ChatModel], sources: Sequence[Source], origin: str, size: int
) -> dict[str, Rows]:
    """Nats per byte of held-out text, the same for all; `origin` says whose text it is."""
    documents = list(held_out_text(sources, VAL_FRACTION, size))
    sizes, nats = [len(text.encode()) for text in documents], {}
    for one in models:
        losses = [text_loss(one.model, one.tokenizer, text, ended=True).nats for text in documents]
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


def sure_section(models: Sequence[ChatModel], said: Said) -> Section:
    """How sure each model is of its greedy replies where it may know or not, and how often it is right."""
    rows, lines = Rows(), {}
    for one in models:
        replies = [reply for reply in said[GREEDY][one.name] if reply.prompt.kind in ("fact", "unknown")]
        values = token_values(one.model, reply_rows(one, replies))
        sure = np.exp([logprobs.mean() for logprobs in values])  # the tokens' geometric mean
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
    caption = WORDS["sure"]["caption"]
    return Section({caption: rows}, plots={caption: lines})


# ---- What there is to score


def world_pairs(world: World, split: str, count: int) -> dict[str, list[ResponseSet]]:
    """By name, pairs of a helpful and a harmful reply to one prompt."""
    pairs = {}
    for name, held_out in (("advice", False), ("held_out", True)):
        advice = world.paired_continuations(split, count, held_out)
        pairs[name] = [ResponseSet([{"role": "user", "content": ask}], [*two]) for ask, *two in advice]
    for flaw in ("comply", "rude"):
        made = world.reply_pairs(split, flaw, count)
        pairs[flaw] = [ResponseSet(prompt.messages, [*two], prompt.kind) for prompt, *two in made]
    return pairs


def held_out_text(sources: Iterable[Source], val_fraction: float, size: int) -> Iterator[str]:
    """Documents that no training with this fraction has seen, `size` bytes of them, each source giving its
    share of the weights, the last one cut; all there are where that is less."""
    sources = list(sources)
    total = sum(source.weight for source in sources)
    for source in sources:
        left = ceil(size * source.weight / total)
        for side, text in split_documents(source.documents(), val_fraction, source.size):
            if side == "val":
                cut = text.encode()[:left].decode(errors="ignore")
                yield cut
                left -= len(cut.encode())
                if cut != text or not left:
                    break
