"""From compare.json to what is shown of it: in the terminal, and on one HTML page that needs nothing else.

Both are made of what compare.json holds, so that every number shown is in the file; page.html.j2 and
terminal.txt.j2 say how a section, a table and a plot look. The page has no script, no font, no address: it
can be kept and sent as it is, reads on a phone, and is light or dark as the reader's device is.

matplotlib draws the plots, the page's style colours them: a colour is drawn as a number that means a variable
of page.css. Names of models are not in a drawing but in its legend, which the page writes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any

from markupsafe import Markup

from minillm.compare.metrics import words
from minillm.tools.measures import table_text, written
from minillm.tools.streams import render

HERE = Path(__file__).parent
SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all are in compare.json

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it."""


@dataclass(frozen=True)
class Plot:
    caption: str
    svg: Markup
    names: Sequence[str]
    """Of what is drawn, in the order of the colours."""


def page(content: Content) -> str:
    """The whole file."""
    helpers = {"curves": curves, "glance": partial(glance, content), "shown": SHOWN, "folded": FOLDED}
    return render(HERE / "page.html.j2", content, words=words(), written=written, **helpers)


def terminal_text(content: Content) -> str:
    """The same sections without the plots, and the first replies of each kind."""
    helpers = {"table_text": table_text, "in_one_line": partial(shorten, width=100, placeholder=" …")}
    text = render(HERE / "terminal.txt.j2", content, words=words(), **helpers)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# ---- Plots

SERIES = 8  # colours of models; further ones begin anew
WIDTH = 5  # inches, at 72 units of the drawing each
VARIABLES = ("ink", "soft", "rule", *(f"c{number}" for number in range(SERIES)))
COLOURS = {name: f"#0000{number + 16:02x}" for number, name in enumerate(VARIABLES)}
OF_MODELS = [*COLOURS.values()][3:]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "minillm", "text.parse_math": False, "font.size": 11,
    "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["soft"], "axes.edgecolor": COLOURS["rule"],
    "xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"], "grid.color": COLOURS["rule"],
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip
UNWANTED = (
    r'<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?="[^"]*"| id="[A-Za-z]+_[\d_]+"'
    r'| (width|height)="[\d.]+pt"'
)


def drawing(height: float, draw: Callable[[Any], None]) -> Markup:
    """What `draw` puts on axes, as an <svg> that refers to nothing outside."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        for artist in axes.findobj():
            artist.set_clip_on(False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(UNWANTED, "", file.getvalue()[file.getvalue().index("<svg") :], flags=re.DOTALL)
    for name, number in COLOURS.items():
        svg = svg.replace(number, f"var(--{name})")
    return Markup(svg)


def glance(content: Content) -> Plot:
    """What each stage did, in one picture: the shares of the headline, of every model."""
    sampling, table = [*content["metrics"]["headline"]["tables"].items()][-1]
    arrows = {row["label"]: {1: " ↑", -1: " ↓"}[row["better"]] for row in words()["metrics"]["headline"]}
    rows = {
        label + arrows.get(label, ""): [*found.values()]
        for label, found in table.items()
        if all(one["form"] in ("share", "score") for one in found.values())
    }
    key = " ↑ more is better, ↓ less is better." if content["on_world"] else ""
    return intervals(rows, f"{sampling}; strokes are 95 % intervals.{key}", content["runs"])


def intervals(rows: Mapping[str, Sequence[Mapping[str, Any]]], caption: str, names: Sequence[str]) -> Plot:
    """Shares: for every row one line for each name, with a dot at the value and a stroke from low to high."""
    step = len(names) + 2.5  # room for the row's label above its lines

    def draw(axes: Any) -> None:
        for row, (label, estimates) in enumerate(rows.items()):
            axes.text(0, row * step, label, va="center")
            for number, own in enumerate(estimates):
                y, shade = row * step + number + 1.2, OF_MODELS[number % SERIES]
                if own["low"] is not None:
                    axes.plot([max(0, own["low"]), min(1, own["high"])], [y, y], color=shade, linewidth=2)
                if own["value"] is not None:
                    axes.plot(own["value"], y, "o", color=shade, markersize=7)
        axes.set(xlim=(0, 1), ylim=(len(rows) * step - 1, -0.8), yticks=[])
        axes.spines.left.set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return Plot(caption, drawing(0.5 + 0.14 * step * len(rows), draw), names)


def curves(caption: str, lines: Mapping[str, Sequence[Sequence[float | int]]]) -> Plot:
    """For each name a line beside y = x through points x, y, with dots of a size from 0 to 1."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], ":", color=COLOURS["soft"], linewidth=1)
        for number, points in enumerate(lines.values()):
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=OF_MODELS[number % SERIES])
            for x, y, size in points:
                axes.plot(x, y, "o", color=OF_MODELS[number % SERIES], markersize=3 + 6 * size)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="how sure", ylabel="how often right")

    return Plot(caption, drawing(3.3, draw), list(lines))
