"""From compare.json to what is shown of it: the sections of page and terminal, in order.

`sections` reads what compare.json holds and nothing else, so that every number shown stands in the file.
Titles, texts and labels are in sections.toml. A section without tables and plots is left out.
"""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import sqrt
from pathlib import Path
from textwrap import wrap
from typing import Any

from minillm.compare.plots import Plot, curves, intervals

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it, or a part of it."""
Cell = tuple[str, str]
"""An estimate and its interval, as shown."""


@cache
def words() -> dict[str, Any]:
    """Titles, texts and labels."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    """What to see in it."""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What there is to say besides, each by itself."""


def sections(content: Content) -> list[Section]:
    """All that can be shown of a comparison but the replies themselves."""
    made = [
        Section(
            **words()["headline"], tables=_samplings(content, headlines(content)), notes=changes(content)
        ),
        Section(**words()["by_kind"], tables=list(_by_kind(content))),
        Section(**words()["contests"], tables=list(_contests(content))),
        Section(**words()["manner"], tables=_samplings(content, "manner") if content["on_world"] else []),
        _pairs(content),
        _cost(content),
        _sure(content),
        Section(**words()["training"], plots=list(_training(content))),
    ]
    return [section for section in made if section.tables or section.plots]


def section_text(section: Section) -> str:
    """A section for the terminal: its plots stay on the page."""
    lines = [f"── {section.title} ──", *wrap(section.text, 100)]
    for note in section.notes:
        lines += wrap(note, 100, initial_indent="• ", subsequent_indent="  ")
    return "\n\n".join(["\n".join(lines), *map(table_text, section.tables)])


def table_text(table: Table) -> str:
    """A table in columns, each estimate beside its interval."""
    rows = [[name, *(" ".join(cell).strip() for cell in row)] for name, row in table.rows]
    lines = [["", *table.head], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([f"{table.caption}:", *(f"  {line}".rstrip() for line in text)])


# ---- Estimates as text

FORMS: dict[str, tuple[Callable[[float], str], Callable[[float], str], str]] = {
    "share": ("{:.1%}".format, lambda value: f"{100 * value:.0f}", "–"),
    "score": ("{:.2f}".format, "{:.2f}".format, "–"),
    "nats": ("{:.3f}".format, "{:.3f}".format, "–"),
    "count": ("{:.1f}".format, "{:.1f}".format, "–"),
    "signed": ("{:+.3f}".format, "{:+.3f}".format, " to "),
}
"""How a value is written, how its bounds are, and what stands between those."""


def cell(found: Content, form: str) -> Cell:
    """72.0% and (64–80), or a dash where nothing is known."""
    value, bound, to = FORMS[form]
    if found["value"] is None:
        return "–", ""
    interval = "" if found["low"] is None else f"({bound(found['low'])}{to}{bound(found['high'])})"
    return value(found["value"]), interval


def by_run(label: str, found: Content, runs: Iterable[str], form: str = "share") -> tuple[str, list[Cell]]:
    """A line of a table: an estimate of every model."""
    return label, [cell(found[run], form) for run in runs]


def _rows(metrics: Content, shown: str, runs: Iterable[str]) -> list[tuple[str, list[Cell]]]:
    """The lines of those metrics, of a list in sections.toml, that there are."""
    return [by_run(one["label"], found, runs, _form(one)) for one, found in _found(metrics, shown)]


def _found(metrics: Content, shown: str) -> Iterator[tuple[Content, Content]]:
    """Each metric of a list and its estimates by model."""
    for one in words()["metrics"][shown]:
        if found := metrics.get(one["metric"], {}).get(one.get("group", "all")):
            yield one, found


def _form(metric: Content) -> str:
    return metric.get("form", "share")


def _samplings(content: Content, shown: str) -> list[Table]:
    """For every sampling a table of the metrics of a list."""
    rows = {name: _rows(metrics, shown, content["runs"]) for name, metrics in content["figures"].items()}
    return [Table(how(content, name), content["runs"], own) for name, own in rows.items() if own]


def how(content: Content, sampling: str) -> str:
    """A sampling in words."""
    temperature = content["samplings"][sampling]
    return "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"


# ---- What each stage did


def headlines(content: Content) -> str:
    """The list of the metrics that matter most; without a rubric those that need none."""
    return "headline" if content["on_world"] else "manner"


def glance(content: Content) -> Plot:
    """What each stage did, in one picture: the headline shares of every model."""
    sampling, metrics = list(content["figures"].items())[-1]
    arrows = {1: " ↑", 0: "", -1: " ↓"}
    rows = {
        one["label"] + arrows[one.get("better", 0)]: [found[run] for run in content["runs"]]
        for one, found in _found(metrics, headlines(content))
        if _form(one) != "count"
    }
    key = " ↑ more is better, ↓ less is better." if content["on_world"] else ""
    return intervals(rows, f"{how(content, sampling)}; strokes are 95 % intervals.{key}", content["runs"])


def changes(content: Content) -> list[str]:
    """Which headline metrics moved from model to model so far that their intervals do not overlap."""
    notes = []
    for sampling, metrics in content["figures"].items():
        for earlier, later in pairwise(content["runs"]):
            sides: dict[str, list[str]] = {"better": [], "worse": [], "no clear change": []}
            for one, found in _found(metrics, headlines(content)):
                if better := one.get("better"):
                    side = _side(found[earlier], found[later], better)
                    moved = " → ".join(cell(found[run], _form(one))[0] for run in (earlier, later))
                    sides[side].append(one["label"] + ("" if side == "no clear change" else f" {moved}"))
            said = [f"{side}: {', '.join(moves)}" for side, moves in sides.items() if moves]
            if said and not sides["better"] and not sides["worse"]:
                said = ["no clear change in any of these metrics"]
            if said:
                notes.append(f"From {earlier} to {later}, {how(content, sampling)}: {'; '.join(said)}.")
    return notes


def _side(before: Content, after: Content, better: int) -> str:
    if None in (before["low"], after["low"]):
        return "no clear change"
    rose, fell = after["low"] > before["high"], after["high"] < before["low"]
    return "no clear change" if not (rose or fell) else "better" if rose == (better > 0) else "worse"


# ---- The sections


def _by_kind(content: Content) -> Iterator[Table]:
    for sampling, metrics in content["figures"].items():
        for metric, title, form in (("utility", "rubric", "score"), ("right", "in form and right", "share")):
            if found := metrics.get(metric):
                kinds = (*content["prompts"], "all")
                rows = [by_run(kind, found[kind], content["runs"], form) for kind in kinds]
                yield Table(f"{title}, {how(content, sampling)}", content["runs"], rows)


def _contests(content: Content) -> Iterator[Table]:
    """Of every judge all contests; then by kind those of neighbours, in the last sampling."""
    outcomes = ("win", "tie", "loss", "rate")

    def row(label: str, rates: Content) -> tuple[str, list[Cell]]:
        return by_run(label, rates, outcomes)

    for judge in dict.fromkeys(contest["judge"] for contest in content["contests"]):
        own = [contest for contest in content["contests"] if contest["judge"] == judge]
        names = [f"{one['later']} against {one['earlier']}, {one['sampling']}" for one in own]
        rows = [row(name, one["figures"]["all"]) for name, one in zip(names, own, strict=True)]
        for (_, cells), one in zip(rows, own, strict=True):
            cells.append((str(one["left_out"]), ""))
        yield Table(f"judged by {judge}", [*outcomes, "not judged"], rows)
        for name, one in zip(names, own, strict=True):
            neighbours = (one["earlier"], one["later"]) in pairwise(content["runs"])
            if neighbours and one["sampling"] == list(content["samplings"])[-1]:
                kinds = [row(kind, rates) for kind, rates in one["figures"].items() if kind != "all"]
                yield Table(f"{name}, by {judge}", outcomes, kinds)


def _pairs(content: Content) -> Section:
    pairs, runs, names = content["pairs"], content["runs"], words()["names"]["pairs"]
    notes = [
        f"{own['left_out']} pairs of {names[name]} do not fit every model's context and are left out."
        for name, own in pairs.items()
        if own["left_out"]
    ]
    captions = (
        ("as_likely", "share", "pairs in which the harmful one is at least as likely, per byte"),
        ("difference", "signed", "by how many nats per byte the helpful one is likelier, on average"),
    )
    tables = [
        Table(caption, runs, [by_run(names[name], own[key], runs, form) for name, own in pairs.items()])
        for key, form, caption in captions
        if pairs
    ]
    return Section(**words()["pairs"], tables=tables, notes=notes)


def _cost(content: Content) -> Section:
    tables, rows, notes = [], [], []
    if text := content["text"]:
        caption = "{documents} held-out documents of {origin}, {bytes:,} bytes".format(**text)
        row = by_run("nats per byte", text["nats"], content["runs"], "nats")
        tables.append(Table(caption, content["runs"], [row]))
    for one in content["kl"]:
        if one["token"] is None:
            names = f"{one['later']} and {one['earlier']}"
            notes.append(f"{names} have different vocabularies: there is no KL between them.")
        else:
            cells = [cell(one["token"], "nats"), cell(one["response"], "count")]
            rows.append((f"{one['later']} from {one['earlier']}", cells))
    if rows:
        caption = f"KL in nats, on replies {how(content, content['kl'][0]['sampling'])}"
        tables.append(Table(caption, ["a token", "a reply"], rows))
    return Section(**words()["cost"], tables=tables, notes=notes)


def _sure(content: Content) -> Section:
    tables, plots, runs = [], [], content["runs"]
    for measure, of_run in content["sure"].items():
        metrics = {key: {"all": {run: of_run[run][key] for run in runs}} for key in of_run[runs[0]]}
        caption = words()["names"]["sure"][measure]
        tables.append(Table(caption, runs, _rows(metrics, measure, runs)))
        lines = {
            run: [(b["sure"], b["accuracy"], sqrt(b["count"] / own["right"]["count"])) for b in own["bins"]]
            for run, own in of_run.items()
        }
        plots.append(curves(lines, caption, "how sure", "how often right", unit_square=True))
    return Section(**words()["sure"], tables=tables, plots=plots)


def _training(content: Content) -> Iterator[Plot]:
    for run, events in content["training"].items():
        for key in ("score", "rubric"):
            lines = {
                f"{event} prompts": [
                    (sqrt(max(0.0, one["kl"])), one[key], 0.2)
                    for one in events
                    if one["event"] == event and one[key] is not None
                ]
                for event in ("train", "val")
            }
            if any(lines.values()):
                yield curves(lines, f"{run}: {key}", "√KL, nats a reply", key)
