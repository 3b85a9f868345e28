"""The page of a comparison: one HTML file that needs nothing but itself.

It is made from what compare.json holds (sections.py says what of it is shown), reads on a phone, and is light
or dark as the reader's device is. No script, no font, no address: it can be kept and sent as it is. Whatever
page.html.j2 writes of a text is made printable and escaped, so that it is shown and never obeyed; only the
drawings are not, which are ours.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from minillm.compare.plots import colour
from minillm.compare.sections import Content, glance, how, sections
from minillm.errors import printable

SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all stand in compare.json


def page(content: Content) -> str:
    """The whole file."""
    return template().render(
        content,
        picture=glance(content),
        sections=sections(content),
        shown=SHOWN,
        folded=FOLDED,
        colour=colour,
        how=lambda sampling: how(content, sampling),
        svg=lambda plot: Markup(plot.svg),
        option=lambda value: " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value),
    )


def template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.get_template("page.html.j2")
