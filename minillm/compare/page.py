"""From compare.json to what is shown of it: in the terminal, and on one HTML page that needs nothing else.

Both are made of what compare.json holds, so that every number shown is in the file: sections.j2 says what is
shown, in the words of page.toml; page.html.j2 and terminal.txt.j2 say how. The page has no script, no font,
no address: it can be kept and sent as it is, reads on a phone, and is light or dark as the reader's device
is.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from html import unescape
from itertools import pairwise, zip_longest
from math import sqrt
from pathlib import Path
from textwrap import shorten
from typing import Any

from minillm.compare.plots import Plot, curves, intervals
from minillm.errors import printable
from minillm.tools.render import render

SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all are in compare.json

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it, or a part of it."""


@cache
def words() -> dict[str, Any]:
    """Titles, texts and labels."""
    found = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    usual = {"group": "all", "form": "share", "better": 0}
    lists = {name: [usual | one for one in own] for name, own in found["metrics"].items()}
    return found | {"metrics": lists}


def page(content: Content) -> str:
    """The whole file."""
    return filled("page.html.j2", content)


def terminal_text(content: Content) -> str:
    """The same sections without the plots, and the first replies of each kind."""
    return re.sub(r"\n{3,}", "\n\n", filled("terminal.txt.j2", content)).strip()


def filled(template: str, content: Content) -> str:
    """A template with the content and all that helps to show it."""
    helpers = (listed, cells, columns, in_one_line, sure_plot, training_plots)
    return render(
        Path(__file__).with_name(template),
        content,
        words=words(),
        how={sampling: how(content, sampling) for sampling in content["samplings"]},
        headline=headline(content),
        changes=changes(content),
        neighbours=list(pairwise(content["runs"])),
        glance=partial(glance, content),
        shown=SHOWN,
        folded=FOLDED,
        **{helper.__name__: helper for helper in helpers},
    )


def how(content: Content, sampling: str) -> str:
    """A sampling in words."""
    temperature = content["samplings"][sampling]
    return "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"


def in_one_line(text: str) -> str:
    return shorten(" ".join(printable(text).split()), 100, placeholder=" …")


def columns(head: Sequence[str], lines: str) -> str:
    """Lines of cells, which tabs divide, below one another."""
    rows = [
        ["", *head],
        *(
            [cell.strip() for cell in line.split("\t")]
            for line in unescape(lines).splitlines()
            if line.strip()
        ),
    ]
    table = list(zip(*zip_longest(*rows, fillvalue=""), strict=True))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return "\n".join(f"  {line}".rstrip() for line in text)


# ---- Estimates as text

FORMS = {
    "share": ("{:.1%}", "({:.0f}–{:.0f})", 100),
    "score": ("{:.2f}", "({:.2f}–{:.2f})", 1),
    "nats": ("{:.3f}", "({:.3f}–{:.3f})", 1),
    "count": ("{:.1f}", "({:.1f}–{:.1f})", 1),
    "signed": ("{:+.3f}", "({:+.3f} to {:+.3f})", 1),
}
"""How a value is written, how its interval is, and by what that is multiplied."""


def cell(found: Content, form: str) -> tuple[str, str]:
    """72.0% and (64–80), or a dash where nothing is known."""
    value, interval, scale = FORMS[form]
    if found["value"] is None:
        return "–", ""
    bounds = (found["low"], found["high"])
    written = "" if None in bounds else interval.format(*(scale * bound for bound in bounds))
    return value.format(found["value"]), written


def cells(
    found: Content, names: Iterable[str], form: str, key: str | None = None
) -> list[tuple[str, str, str]]:
    """Of each column its name, its estimate and the interval; with a key, of what is found under it."""
    return [(name, *cell(found[name][key] if key else found[name], form)) for name in names]


# ---- Metrics of the replies: the lists of page.toml


def listed(metrics: Content, name: str) -> Iterator[tuple[Content, Content]]:
    """Each metric of a list that there is, and its estimates by model."""
    for one in words()["metrics"][name]:
        if found := metrics.get(one["metric"], {}).get(one["group"]):
            yield one, found


def headline(content: Content) -> str:
    """The list of the metrics that matter most; without a rubric of those that need none."""
    return "headline" if content["on_world"] else "manner"


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


# ---- What is drawn


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


def sure_plot(measure: str, of_run: Content) -> Plot:
    """How often each model is right over how sure it is; a dot's area is the bin's share of all."""
    lines = {
        run: [(b["sure"], b["accuracy"], sqrt(b["count"] / own["right"]["count"])) for b in own["bins"]]
        for run, own in of_run.items()
    }
    return curves(lines, words()["names"]["sure"][measure], "how sure", "how often right", unit_square=True)


def training_plots(run: str, events: Sequence[Content]) -> Iterator[Plot]:
    """Score and rubric of a run over √KL, in which Gao et al. 2023 (arXiv 2210.10760) find them simplest."""
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
