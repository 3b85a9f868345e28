"""Plots as SVG inside a page: matplotlib draws them, the page's style colours them.

A colour is drawn as a number that means a variable of page.css, so that a plot is light or dark as the page
is. Names of models are not in the drawing but in its legend, which the page writes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from markupsafe import Markup

SERIES = 8  # colours of models; further ones begin anew
WIDTH = 5  # inches, at 72 units of the drawing each
VARIABLES = ("ink", "soft", "rule", *(f"c{number}" for number in range(SERIES)))
COLOURS = {name: f"#0000{number + 16:02x}" for number, name in enumerate(VARIABLES)}
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


@dataclass(frozen=True)
class Plot:
    caption: str
    svg: Markup
    names: Sequence[str]
    """Of what is drawn, in the order of the colours."""


def colour(number: int) -> str:
    """Of the n-th model, the same in every plot."""
    return COLOURS[f"c{number % SERIES}"]


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


def intervals(rows: Mapping[str, Sequence[Mapping[str, Any]]], caption: str, names: Sequence[str]) -> Plot:
    """Shares: for every row one line for each name, with a dot at the value and a stroke from low to high."""
    step = len(names) + 2.5  # room for the row's label above its lines

    def draw(axes: Any) -> None:
        for row, (label, estimates) in enumerate(rows.items()):
            axes.text(0, row * step, label, va="center")
            for number, own in enumerate(estimates):
                y, shade = row * step + number + 1.2, colour(number)
                if own["low"] is not None:
                    axes.plot([max(0, own["low"]), min(1, own["high"])], [y, y], color=shade, linewidth=2)
                if own["value"] is not None:
                    axes.plot(own["value"], y, "o", color=shade, markersize=7)
        axes.set(xlim=(0, 1), ylim=(len(rows) * step - 1, -0.8), yticks=[])
        axes.spines.left.set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return Plot(caption, drawing(0.5 + 0.14 * step * len(rows), draw), names)


def curves(
    lines: Mapping[str, Sequence[Sequence[float | int]]],
    caption: str,
    x_label: str,
    y_label: str,
    unit_square: bool = False,
) -> Plot:
    """For each name a line through points x, y, with dots of a size from 0 to 1; in the unit square beside
    y = x."""

    def draw(axes: Any) -> None:
        for number, points in enumerate(lines.values()):
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour(number))
            for x, y, size in points:
                axes.plot(x, y, "o", color=colour(number), markersize=3 + 6 * size)
        if unit_square:
            axes.plot([0, 1], [0, 1], ":", color=COLOURS["soft"], linewidth=1)
            axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set(xlabel=x_label, ylabel=y_label)

    return Plot(caption, drawing(3.3, draw), list(lines))
