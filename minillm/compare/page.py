"""From compare.json to what is shown of it: in the terminal, and on one HTML page that needs nothing else.

Both are made of what compare.json holds, so that every number shown is in the file; page.html.j2 and
terminal.txt.j2 say how a section, a table and a plot look. The page has no script, no font, no address: it
can be kept and sent as it is, reads on a phone, and is light or dark as the reader's device is.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from minillm.compare.metrics import Rows, words
from minillm.compare.plots import Plot, curves, intervals
from minillm.tools.measures import written
from minillm.tools.render import columns, render
from minillm.tools.streams import printable

SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all are in compare.json

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it."""


def page(content: Content) -> str:
    """The whole file."""
    return filled("page.html.j2", content)


def terminal_text(content: Content) -> str:
    """The same sections without the plots, and the first replies of each kind."""
    return re.sub(r"\n{3,}", "\n\n", filled("terminal.txt.j2", content)).strip()


def filled(template: str, content: Content) -> str:
    """A template with the content and all that helps to show it."""
    helpers = {
        "words": words(), "written": written, "table_text": table_text, "in_one_line": in_one_line,
        "curves": curves, "glance": partial(glance, content), "shown": SHOWN, "folded": FOLDED,
    }  # fmt: skip
    return render(Path(__file__).with_name(template), content, **helpers)


def table_text(rows: Rows) -> str:
    """A table as text."""
    head = ["", *next(iter(rows.values()))]
    return columns(
        [head, *([label, *(" ".join(written(x)) for x in own.values())] for label, own in rows.items())]
    )


def in_one_line(text: str) -> str:
    return shorten(" ".join(printable(text).split()), 100, placeholder=" …")


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
