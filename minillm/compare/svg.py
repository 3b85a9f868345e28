"""Plots drawn as SVG that stands inside a page: its colours and its letters are the page's own.

    intervals   a dot with its interval for each of several names, group by group
    bars        shares that add up to 1, as one bar a row
    curves      lines and dots over two axes

The n-th name has the colour of the style class s<n>, the same in every plot. Text is escaped; no script,
no style of its own, no reference to anything outside.
"""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

WIDTH = 420  # in units of the drawing, of which a letter is about 6 wide
LEFT, RIGHT, TOP = 96, 14, 8
ROW = 11  # between the dots of one group
COLOURS = 8  # classes s0 to s7 of the page; further names begin anew

Number = float | int
Point = tuple[Number, Number, Number]
"""x, y and how large its dot is, from 0 to 1."""
Interval = tuple[float | None, float | None, float | None]
"""Value, low, high."""


def intervals(groups: Mapping[str, Sequence[Interval]], label: str, lowest: Number, highest: Number) -> str:
    """For every group one line for each name, with a dot at the value and a stroke from low to high."""
    x = _scale(lowest, highest, LEFT, WIDTH - RIGHT)
    parts, y = [], float(TOP)
    for group, rows in groups.items():
        middle = y + ROW * len(rows) / 2
        parts.append(_text(LEFT - 8, middle + 4, group, "end"))
        for number, (value, low, high) in enumerate(rows):
            at = y + ROW * (number + 0.5)
            if low is not None and high is not None:
                parts.append(_line(x(max(low, lowest)), at, x(min(high, highest)), at, style_of(number)))
            if value is not None:
                parts.append(_dot(x(value), at, number))
        y += ROW * len(rows) + 8
    return _drawing([*_x_axis(x, lowest, highest, y, label), *parts], y + 32, label)


def bars(rows: Mapping[str, Sequence[tuple[float, str]]], label: str) -> str:
    """For every row the shares side by side, each with its style class."""
    x, parts, y = _scale(0, 1, LEFT, WIDTH - RIGHT), [], float(TOP)
    for name, shares in rows.items():
        parts.append(_text(LEFT - 8, y + 11, name, "end"))
        begin = 0.0
        for size, style in shares:
            left, width = x(begin), x(begin + size) - x(begin)
            parts.append(
                f'<rect class="{style}" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="14"/>'
            )
            if size >= 0.09:
                parts.append(_text(left + width / 2, y + 11, f"{size:.0%}", "middle", "inside"))
            begin += size
        y += 21
    return _drawing([*_x_axis(x, 0, 1, y, label), *parts], y + 32, label)


def curves(
    series: Sequence[Sequence[Point]],
    x_label: str,
    y_label: str,
    x_range: tuple[Number, Number],
    y_range: tuple[Number, Number],
    diagonal: bool = False,
) -> str:
    """A line with dots for each name, through its points in their order; with `diagonal` also y = x."""
    bottom, top, left = 230.0, 24.0, 46
    x, y = _scale(*x_range, left, WIDTH - RIGHT), _scale(*y_range, bottom, top)
    parts = [*_x_axis(x, *x_range, bottom, x_label, top), _text(left, 12, y_label, "start")]
    for tick in _ticks(*y_range):
        parts.append(_line(left, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:.3g}", "end"))
    if diagonal:
        ends = max(x_range[0], y_range[0]), min(x_range[1], y_range[1])
        parts.append(_line(x(ends[0]), y(ends[0]), x(ends[1]), y(ends[1]), "ideal"))
    for number, points in enumerate(series):
        for (x0, y0, _), (x1, y1, _) in pairwise(points):
            parts.append(_line(x(x0), y(y0), x(x1), y(y1), style_of(number)))
        parts += [_dot(x(px), y(py), number, 2 + 4 * size) for px, py, size in points]
    return _drawing(parts, bottom + 32, f"{y_label} by {x_label}")


def style_of(number: int) -> str:
    """The style class of the n-th name."""
    return f"s{number % COLOURS}"


def _scale(low: Number, high: Number, begin: Number, end: Number):
    """The straight line that takes low to begin and high to end."""
    span = (high - low) or 1
    return lambda value: begin + (value - low) / span * (end - begin)


def _ticks(low: Number, high: Number) -> list[float]:
    """Five marks from end to end."""
    return [low + (high - low) * i / 4 for i in range(5)]


def _x_axis(x, low: Number, high: Number, y: Number, label: str, top: Number = TOP - 4) -> list[str]:
    marks = []
    for tick in _ticks(low, high):
        marks.append(_line(x(tick), top, x(tick), y, "grid"))
        marks.append(_text(x(tick), y + 13, f"{tick:.3g}", "middle"))
    return [*marks, _text(x((low + high) / 2), y + 28, label, "middle")]


def _line(x1: Number, y1: Number, x2: Number, y2: Number, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(x: Number, y: Number, number: int, radius: Number = 3.2) -> str:
    return f'<circle class="{style_of(number)}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def _text(x: Number, y: Number, text: str, anchor: str, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _drawing(parts: Sequence[str], height: Number, label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *parts, "</svg>"])
