"""The page of a comparison: one HTML file that needs nothing but itself.

It is made from what compare.json holds (exhibits.py says what of it is shown), reads on a phone, and is light
or dark as the reader's device is. No script, no font, no address: it can be kept and sent as it is. All that
a model said is escaped, so that it is shown and never obeyed.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minillm.compare.exhibits import Content, Plot, Section, Table, how, sections
from minillm.compare.svg import style_of
from minillm.errors import printable

SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all stand in compare.json

STYLE = Path(__file__).with_name("page.css")


def page(content: Content) -> str:
    """The whole file."""
    runs = ", ".join(content["runs"])
    title = f"What alignment did: {runs}"
    first, *rest = sections(content)
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(_opening(content))}</p>",
        _section(first),
        _replies(content),
        *map(_section, rest),
        _footer(content),
    ]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>",
        "<body>",
        *body,
        "</body></html>",
        "",
    ])  # fmt: skip


def _text(text: str) -> str:
    """Anybody's words, as what they are."""
    return escape(printable(text))


def _opening(content: Content) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in content["prompts"].items())
    left = "".join(f" Left out: {count} {what}." for what, count in content["left_out"].items())
    return f"Held-out prompts, the same for every model: {counts}.{left}"


def _section(section: Section) -> str:
    parts = [f"<section><h2>{_text(section.title)}</h2>", f"<p>{_text(section.text)}</p>"]
    if section.notes:
        parts += ["<ul>", *(f"<li>{_text(note)}</li>" for note in section.notes), "</ul>"]
    if section.plots:
        parts += ['<div class="plots">', *map(_plot, section.plots), "</div>"]
    if section.tables:
        parts += ['<div class="tables">', *map(_table, section.tables), "</div>"]
    return "\n".join([*parts, "</section>"])


def _plot(plot: Plot) -> str:
    keys = "".join(f'<span><i class="key {style}"></i>{_text(name)}</span>' for style, name in plot.legend)
    return f"<figure>{plot.svg}<figcaption>{keys}<br>{_text(plot.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in ("", *table.head))
    rows = [
        f"<tr><td>{_text(name)}</td>"
        + "".join(f"<td>{_text(figure)}<small>{_text(interval)}</small></td>" for figure, interval in row)
        + "</tr>"
        for name, row in table.rows
    ]
    return "\n".join(
        [f'<div class="wide"><table><caption>{_text(table.caption)}</caption>', f"<tr>{head}</tr>", *rows,
         "</table></div>"]
    )  # fmt: skip


# ---- The replies side by side


def _replies(content: Content) -> str:
    parts = [
        "<section><h2>The same prompts, side by side</h2>",
        "<p>The first prompts of each kind as they came, none chosen. Behind the manner of sampling stands "
        "what the rubric gives, where there is one.</p>",
    ]
    for kind in content["prompts"]:
        own = [record for record in content["replies"] if record["kind"] == kind]
        parts += [f"<h3>{_text(kind)}</h3>", *(_card(content, record) for record in own[:SHOWN])]
        folded = own[SHOWN : SHOWN + FOLDED]
        if folded:
            parts.append(
                f"<details><summary>{len(folded)} more of {len(own)}; all are in compare.json</summary>"
            )
            parts += [*(_card(content, record) for record in folded), "</details>"]
    return "\n".join([*parts, "</section>"])


def _card(content: Content, record: Mapping[str, Any]) -> str:
    columns = []
    for number, run in enumerate(content["runs"]):
        said = "".join(
            f'<p class="how">{_text(how(content, sampling) + _worth(of_run[run]))}</p>'
            f'<p class="reply">{_text(of_run[run]["text"]) or "(nothing)"}</p>'
            for sampling, of_run in record["said"].items()
        )
        columns.append(f'<div class="{style_of(number)}"><h4>{_text(run)}</h4>{said}</div>')
    asked = f'<p class="asked">{_text(record["prompt"])}</p>'
    return f'<article>{asked}<div class="said">{"".join(columns)}</div></article>'


def _worth(reply: Mapping[str, Any]) -> str:
    cut = "" if reply["ended"] else ", cut off"
    return cut if reply["utility"] is None else f": {reply['utility']:.2f}{cut}"


# ---- How it was made


def _footer(content: Content) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    commit = "outside git" if content["commit"] is None else f"commit {content['commit'][:12]}"
    changed = ", with changes" if content["dirty"] else ""
    lines = [
        f"Models: {'; '.join(f'{label} is {folder}' for label, folder in content['folders'].items())}.",
        f"Options: {_options(content['options'])}.",
        f"{content['cores']} cores of {content['cpu']}, on {content['device']}; Python {content['python']}, "
        f"{versions}; {commit}{changed}. It took {content['seconds']:.0f} seconds.",
        "Every figure of this page stands in compare.json beside it.",
    ]
    return "\n".join(["<footer><h2>How this was made</h2>", *(f"<p>{_text(line)}</p>" for line in lines),
                      "</footer>"])  # fmt: skip


def _options(options: Mapping[str, Any]) -> str:
    def said(value: Any) -> str:
        return (
            " ".join(map(str, value))
            if isinstance(value, Sequence) and not isinstance(value, str)
            else str(value)
        )

    return ", ".join(
        f"{name} {said(value)}" for name, value in options.items() if value not in (None, [], ())
    )
