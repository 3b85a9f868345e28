"""From compare.json to what is shown of it: in the terminal, and on one HTML page that needs nothing else.

`sections` and `page` read what compare.json holds and nothing else: every number shown is in the file.
Titles, texts and labels are in page.toml; a section without tables and plots is left out. The page has no
script, no font, no address: it can be kept and sent as it is, reads on a phone, and is light or dark as the
reader's device is. Whatever page.html.j2 writes of a text is made printable and escaped, so that it is shown
and never obeyed; only the drawings are not, which are ours.
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

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minillm.compare.plots import Plot, curves, intervals
from minillm.errors import printable

SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all are in compare.json

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it, or a part of it."""
Row = tuple[str, list[tuple[str, str]]]
"""A label, and in each column an estimate and its interval, as shown."""


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: list[Row]


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    """What to see in it."""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What there is to say besides, each by itself."""


@cache
def words() -> dict[str, Any]:
    """Titles, texts and labels."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def page(content: Content) -> str:
    """The whole file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    hows = {sampling: how(content, sampling) for sampling in content["samplings"]}
    own = {"picture": glance(content), "sections": sections(content), "how": hows}
    return environment.get_template("page.html.j2").render(content, shown=SHOWN, folded=FOLDED, **own)


def section_text(section: Section) -> str:
    """A section for the terminal: its plots are on the page."""
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
"""How a value is written, how its bounds are, and what is between those."""


def cell(found: Content, form: str) -> tuple[str, str]:
    """72.0% and (64–80), or a dash where nothing is known."""
    value, bound, to = FORMS[form]
    if found["value"] is None:
        return "–", ""
    interval = "" if found["low"] is None else f"({bound(found['low'])}{to}{bound(found['high'])})"
    return value(found["value"]), interval


def row(label: str, found: Content, columns: Iterable[str], form: str = "share") -> Row:
    """A line of a table: the estimate of every column, which is a model or an outcome."""
    return label, [cell(found[column], form) for column in columns]


def how(content: Content, sampling: str) -> str:
    """A sampling in words."""
    temperature = content["samplings"][sampling]
    return "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"


# ---- Metrics of the replies: the lists of page.toml


def listed(metrics: Content, name: str) -> Iterator[tuple[Content, Content]]:
    """Each metric of a list that there is, and its estimates by model."""
    for one in words()["metrics"][name]:
        if found := metrics.get(one["metric"], {}).get(one.get("group", "all")):
            yield {"form": "share", "better": 0} | one, found


def metric_rows(metrics: Content, name: str, runs: Iterable[str]) -> list[Row]:
    return [row(one["label"], found, runs, one["form"]) for one, found in listed(metrics, name)]


def metric_tables(content: Content, name: str) -> list[Table]:
    """For every sampling a table of the metrics of a list."""
    runs = content["runs"]
    tables = [
        Table(how(content, sampling), runs, metric_rows(metrics, name, runs))
        for sampling, metrics in content["figures"].items()
    ]
    return [table for table in tables if table.rows]


def headline(content: Content) -> str:
    """The list of the metrics that matter most; without a rubric of those that need none."""
    return "headline" if content["on_world"] else "manner"


def glance(content: Content) -> Plot:
    """What each stage did, in one picture: the headline shares of every model."""
    sampling, metrics = list(content["figures"].items())[-1]
    arrows = {1: " ↑", 0: "", -1: " ↓"}
    rows = {
        one["label"] + arrows[one["better"]]: [found[run] for run in content["runs"]]
        for one, found in listed(metrics, headline(content))
        if one["form"] != "count"
    }
    key = " ↑ more is better, ↓ less is better." if content["on_world"] else ""
    return intervals(rows, f"{how(content, sampling)}; strokes are 95 % intervals.{key}", content["runs"])


def changes(content: Content) -> list[str]:
    """Which headline metrics moved from model to model so far that their intervals do not overlap."""
    notes = []
    for sampling, metrics in content["figures"].items():
        for earlier, later in pairwise(content["runs"]):
            sides: dict[str, list[str]] = {"better": [], "worse": [], "no clear change": []}
            for one, found in listed(metrics, headline(content)):
                if better := one["better"]:
                    side = change(found[earlier], found[later], better)
                    moved = " → ".join(cell(found[run], one["form"])[0] for run in (earlier, later))
                    sides[side].append(one["label"] + ("" if side == "no clear change" else f" {moved}"))
            said = [f"{side}: {', '.join(moves)}" for side, moves in sides.items() if moves]
            if said and not sides["better"] and not sides["worse"]:
                said = ["no clear change in any of these metrics"]
            if said:
                notes.append(f"From {earlier} to {later}, {how(content, sampling)}: {'; '.join(said)}.")
    return notes


def change(before: Content, after: Content, better: int) -> str:
    """Whether a metric, of which more is better (1) or less (-1), is beyond its interval before."""
    if None in (before["low"], after["low"]):
        return "no clear change"
    rose, fell = after["low"] > before["high"], after["high"] < before["low"]
    return "no clear change" if not (rose or fell) else "better" if rose == (better > 0) else "worse"


# ---- The sections


def sections(content: Content) -> list[Section]:
    """All that can be shown of a comparison but the replies themselves."""
    parts: dict[str, dict[str, Any]] = {
        "headline": {"tables": metric_tables(content, headline(content)), "notes": changes(content)},
        "by_kind": {"tables": list(kind_tables(content))},
        "contests": {"tables": list(contest_tables(content))},
        "manner": {"tables": metric_tables(content, "manner") if content["on_world"] else []},
        "pairs": pair_section(content),
        "cost": cost_section(content),
        "sure": sure_section(content),
        "training": {"plots": list(training_plots(content))},
    }
    made = [Section(**words()[name], **part) for name, part in parts.items()]
    return [section for section in made if section.tables or section.plots]


def kind_tables(content: Content) -> Iterator[Table]:
    for sampling, metrics in content["figures"].items():
        for metric, title, form in (("utility", "rubric", "score"), ("right", "in form and right", "share")):
            if found := metrics.get(metric):
                rows = [row(k, found[k], content["runs"], form) for k in (*content["prompts"], "all")]
                yield Table(f"{title}, {how(content, sampling)}", content["runs"], rows)


def contest_tables(content: Content) -> Iterator[Table]:
    """Of every judge all contests; then by kind those of neighbours, in the last sampling."""
    outcomes = ("win", "tie", "loss", "rate")
    for judge in dict.fromkeys(contest["judge"] for contest in content["contests"]):
        rows, by_kind = [], []
        for one in content["contests"]:
            if one["judge"] != judge:
                continue
            name = f"{one['later']} against {one['earlier']}, {one['sampling']}"
            label, cells = row(name, one["figures"]["all"], outcomes)
            rows.append((label, [*cells, (str(one["left_out"]), "")]))
            neighbours = (one["earlier"], one["later"]) in pairwise(content["runs"])
            if neighbours and one["sampling"] == list(content["samplings"])[-1]:
                kinds = [
                    row(kind, rates, outcomes) for kind, rates in one["figures"].items() if kind != "all"
                ]
                by_kind.append(Table(f"{name}, by {judge}", outcomes, kinds))
        yield Table(f"judged by {judge}", [*outcomes, "not judged"], rows)
        yield from by_kind


def pair_section(content: Content) -> dict[str, Any]:
    pairs, runs, names = content["pairs"], content["runs"], words()["names"]["pairs"]
    captions = (
        ("as_likely", "share", "pairs in which the harmful one is at least as likely, per byte"),
        ("difference", "signed", "by how many nats per byte the helpful one is likelier, on average"),
    )
    return {
        "tables": [
            Table(caption, runs, [row(names[name], own[key], runs, form) for name, own in pairs.items()])
            for key, form, caption in captions
            if pairs
        ],
        "notes": [
            f"{own['left_out']} pairs of {names[name]} do not fit every model's context and are left out."
            for name, own in pairs.items()
            if own["left_out"]
        ],
    }


def cost_section(content: Content) -> dict[str, Any]:
    tables, rows, notes = [], [], []
    if text := content["text"]:
        caption = "{documents} held-out documents of {origin}, {bytes:,} bytes".format(**text)
        nats = row("nats per byte", text["nats"], content["runs"], "nats")
        tables.append(Table(caption, content["runs"], [nats]))
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
    return {"tables": tables, "notes": notes}


def sure_section(content: Content) -> dict[str, Any]:
    tables, plots, runs = [], [], content["runs"]
    for measure, of_run in content["sure"].items():
        metrics = {key: {"all": {run: of_run[run][key] for run in runs}} for key in of_run[runs[0]]}
        caption = words()["names"]["sure"][measure]
        tables.append(Table(caption, runs, metric_rows(metrics, measure, runs)))
        lines = {
            run: [(b["sure"], b["accuracy"], sqrt(b["count"] / own["right"]["count"])) for b in own["bins"]]
            for run, own in of_run.items()
        }
        plots.append(curves(lines, caption, "how sure", "how often right", unit_square=True))
    return {"tables": tables, "plots": plots}


def training_plots(content: Content) -> Iterator[Plot]:
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
