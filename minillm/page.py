"""The page of a comparison: one HTML file that needs nothing but itself.

It is made from what compare.json holds (exhibits.py says what of it is shown), reads on a phone, and is light
or dark as the reader's device is. No script, no font, no address: it can be kept and sent as it is. All that
a model said is escaped, so that it is shown and never obeyed.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from minillm.exhibits import Content, Plot, Section, Table, how, sections

SHOWN = 3  # prompts of each kind in sight
FOLDED = 17  # further ones under a fold; all stand in compare.json

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #fbfaf7; --card: #fff;
  --rule: #e0ddd5; --c0: #7a828c; --c1: #0b6bb8; --c2: #c8501b; --c3: #0d8a67; --c4: #a6549b; --c5: #3c9fd4;
  --c6: #9a7b00; --c7: #5b4bc4; --won: #0d8a67; --tied: #8c929a; --lost: #b3453a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4df; --soft: #a2a9b1; --paper: #14171a; --card: #1c2024;
  --rule: #343a40; --c0: #9aa3ad; --c1: #5aaaf0; --c2: #ef8354; --c3: #45c29a; --c4: #d58acb; --c5: #7cc6ee;
  --c6: #d9b92f; --c7: #9d90f5; --won: #2a8a6a; --tied: #5d656d; --lost: #a84a40; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Georgia, "Times New Roman", serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; border-top: 1px solid var(--rule); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 44rem; }
small, caption, figcaption, .how, th, footer { color: var(--soft); font: .8rem/1.45 system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font: .88rem/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
td, th { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top; border-top: 1px solid var(--rule); }
td:first-child, th:first-child { text-align: left; }
td small { display: block; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
figcaption span { margin-right: .9rem; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
svg .label { fill: var(--soft); font: 10.5px system-ui, sans-serif; }
svg .inside { fill: #fff; font: 10px system-ui, sans-serif; }
svg .grid { stroke: var(--rule); } svg .ideal { stroke: var(--soft); stroke-dasharray: 3 4; }
line { stroke-width: 1; } line[class^=s] { stroke: var(--c); stroke-width: 2; } circle { fill: var(--c); }
.won { fill: var(--won); background: var(--won); } .tied { fill: var(--tied); background: var(--tied); }
.lost { fill: var(--lost); background: var(--lost); }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; background: var(--c);
  margin-right: .35em; }
.key.won { background: var(--won); } .key.tied { background: var(--tied); } .key.lost { background: var(--lost); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
article { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem;
  margin: .7rem 0; }
.asked { font-weight: bold; margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); gap: .8rem; }
.said > div { border-left: 3px solid var(--c); padding-left: .7rem; }
.said h4 { margin: 0; font: 600 .85rem system-ui, sans-serif; color: var(--c); }
.reply { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.how { margin: .2rem 0 0; }
summary { cursor: pointer; font: .9rem system-ui, sans-serif; color: var(--soft); }
"""


def page(content: Content) -> str:
    """The whole file."""
    runs = ", ".join(content["runs"])
    title = f"What alignment did: {runs}"
    first, *rest = sections(content)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_opening(content))}</p>",
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
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head>",
        "<body>",
        *body,
        "</body></html>",
        "",
    ])  # fmt: skip


def _opening(content: Content) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in content["prompts"].items())
    left = "".join(f" Left out: {count} {what}." for what, count in content["left_out"].items())
    return f"Held-out prompts, the same for every model: {counts}.{left}"


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
    if section.plots:
        parts += ['<div class="plots">', *map(_plot, section.plots), "</div>"]
    return "\n".join([*parts, *map(_table, section.tables), "</section>"])


def _plot(plot: Plot) -> str:
    keys = "".join(f'<span><i class="key {style}"></i>{escape(name)}</span>' for style, name in plot.legend)
    return f"<figure>{plot.svg}<figcaption>{keys}<br>{escape(plot.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *table.head))
    rows = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{escape(figure)}<small>{escape(interval)}</small></td>" for figure, interval in row)
        + "</tr>"
        for name, row in table.rows
    ]
    return "\n".join(
        [f'<div class="wide"><table><caption>{escape(table.caption)}</caption>', f"<tr>{head}</tr>", *rows,
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
        parts += [f"<h3>{escape(kind)}</h3>", *(_card(content, record) for record in own[:SHOWN])]
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
            f'<p class="how">{escape(how(content, sampling) + _worth(of_run[run]))}</p>'
            f'<p class="reply">{escape(of_run[run]["text"]) or "(nothing)"}</p>'
            for sampling, of_run in record["said"].items()
        )
        columns.append(f'<div class="s{number % 8}"><h4>{escape(run)}</h4>{said}</div>')
    asked = f'<p class="asked">{escape(record["prompt"])}</p>'
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
    return "\n".join(["<footer><h2>How this was made</h2>", *(f"<p>{escape(line)}</p>" for line in lines),
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
