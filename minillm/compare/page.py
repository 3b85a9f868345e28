"""From compare.json to what is shown of it: in the terminal, and on one HTML page that needs nothing else.

Both are made of what compare.json holds, so that every number shown is in the file; page.html.j2,
plots.html.j2 and terminal.txt.j2 say how a section, a table and a plot look. The page has no script, no
font, no address: it can be kept and sent as it is, reads on a phone, and is light or dark as the reader's
device is.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from minillm.compare.metrics import WORDS
from minillm.tools.measures import table_text, written
from minillm.tools.streams import render

HERE = Path(__file__).parent
SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all are in compare.json

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it."""


def page(content: Content) -> str:
    """The whole file."""
    helpers = {"glance": glance(content), "shown": SHOWN, "folded": FOLDED}
    return render(HERE / "page.html.j2", content, words=WORDS, written=written, **helpers)


def terminal_text(content: Content) -> str:
    """The same sections without the plots, and the first replies of each kind."""
    helpers = {"table_text": table_text, "in_one_line": partial(shorten, width=100, placeholder=" …")}
    text = render(HERE / "terminal.txt.j2", content, words=WORDS, **helpers)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def glance(content: Content) -> dict[str, Any]:
    """What each stage did, in one picture: the shares of the headline, of every model, and what they are."""
    sampling, table = [*content["metrics"]["headline"]["tables"].items()][-1]
    arrows = {row["label"]: {1: " ↑", -1: " ↓"}[row["better"]] for row in WORDS["metrics"]["headline"]}
    rows = {
        label + arrows.get(label, ""): [*found.values()]
        for label, found in table.items()
        if all(one["form"] in ("share", "score") for one in found.values())
    }
    key = " ↑ more is better, ↓ less is better." if content["on_world"] else ""
    return {"rows": rows, "caption": f"{sampling}; strokes are 95 % intervals.{key}"}
