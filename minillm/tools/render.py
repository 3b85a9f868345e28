"""Text and pages: jinja's templates, and columns of text.

Whatever a template writes of a text is made printable, and on a page escaped, so that it is shown and never
obeyed.
"""

from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minillm.tools.streams import printable


def render(template: Path, content: Mapping[str, Any], **helpers: Any) -> str:
    """A template filled in; text, unless its name says that it is HTML."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    made = environment.get_template(template.name).render(content, **helpers)
    return made if ".html." in template.name else unescape(made)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells below one another, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
