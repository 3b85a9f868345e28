"""Text and pages from jinja's templates.

Whatever a template writes of a text is made printable, and on a page escaped, so that it is shown and never
obeyed.
"""

from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minillm.errors import printable


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
