"""From the figures of a comparison to what is shown of them: the sections of page and terminal, in order.

`sections` reads what compare.json holds and nothing else, so that every figure shown stands in the file.
Each section has one sentence that says what to see in it; a section without figures is left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from textwrap import wrap
from typing import Any

from minillm.compare.svg import Point, bars, curves, intervals, style_of

Content = Mapping[str, Any]
"""compare.json, as compare/__main__.py writes it."""
Figure = Mapping[str, Any]
"""value, low, high and count of an estimate."""
Cell = tuple[str, str]
"""A figure and its interval, as shown."""


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Plot:
    caption: str
    svg: str
    legend: list[tuple[str, str]]
    """Style class and name of what is drawn."""


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    """What to see in it."""
    notes: list[str] = field(default_factory=list)
    """What there is to say besides, each by itself."""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def sections(content: Content) -> list[Section]:
    """All that can be shown of a comparison but the replies themselves."""
    made = (_headline, _by_kind, _contests, _manner, _pairs, _cost, _sure, _training)
    return [section for make in made if (section := make(content)).tables or section.plots]


def section_text(section: Section) -> str:
    """A section for the terminal: its plots stay on the page."""
    lines = [f"── {section.title} ──", *fill_lines(section.text)]
    for note in section.notes:
        lines += [f"{'  ' if i else '• '}{line}" for i, line in enumerate(fill_lines(note))]
    return "\n\n".join(["\n".join(lines), *map(table_text, section.tables)])


def fill_lines(text: str) -> list[str]:
    """The text in lines of a terminal's usual width."""
    return wrap(text, 100)


def table_text(table: Table) -> str:
    """A table in columns, each figure beside its interval."""
    rows = [[name, *(f"{figure} {interval}".strip() for figure, interval in row)] for name, row in table.rows]
    lines = [["", *table.head], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([f"{table.caption}:", *(f"  {line}" for line in text)])


# ---- Figures as text

FORMS: dict[str, tuple[Callable[[float], str], Callable[[float], str]]] = {
    "share": (lambda value: f"{value:.1%}", lambda value: f"{100 * value:.0f}"),
    "score": (lambda value: f"{value:.2f}", lambda value: f"{value:.2f}"),
    "nats": (lambda value: f"{value:.3f}", lambda value: f"{value:.3f}"),
    "count": (lambda value: f"{value:.1f}", lambda value: f"{value:.1f}"),
    "signed": (lambda value: f"{value:+.3f}", lambda value: f"{value:+.3f}"),
}
"""How a figure is written, and how its bounds are."""


def cell(figure: Figure, form: str) -> Cell:
    """72.0% and (63–80), or a dash where there is no figure."""
    write, bound = FORMS[form]
    if figure["value"] is None:
        return "–", ""
    if figure["low"] is None:
        return write(figure["value"]), ""
    join = " to " if form == "signed" else "–"
    return write(figure["value"]), f"({bound(figure['low'])}{join}{bound(figure['high'])})"


@dataclass(frozen=True)
class Shown:
    """A figure of the replies, as a line of a table."""

    label: str
    figure: str
    group: str = "all"
    form: str = "share"
    better: int = 0
    """1 where more is better, -1 where less is, 0 where neither can be said."""


def _table(content: Content, caption: str, sampling: str, shown: Sequence[Shown]) -> Table:
    figures = content["figures"][sampling]
    rows = [
        (one.label, [cell(figures[one.figure][one.group][run], one.form) for run in content["runs"]])
        for one in shown
        if one.group in figures.get(one.figure, {})
    ]
    return Table(caption, list(content["runs"]), rows)


def _each_sampling(content: Content, shown: Sequence[Shown]) -> list[Table]:
    tables = [_table(content, how(content, name), name, shown) for name in content["figures"]]
    return [table for table in tables if table.rows]


def how(content: Content, sampling: str) -> str:
    """A sampling in words."""
    temperature = content["samplings"][sampling]
    return "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"


def _legend(content: Content) -> list[tuple[str, str]]:
    return [(style_of(number), run) for number, run in enumerate(content["runs"])]


# ---- The sections

HEADLINES = (
    Shown("answers in form", "in_form", better=1),
    Shown("worth by the rubric", "utility", form="score", better=1),
    Shown("known facts right", "right", "fact", better=1),
    Shown("admits what it cannot know", "said_unknown", "unknown", better=1),
    Shown("\u201cI don't know\u201d of known facts", "said_unknown", "fact", better=-1),
    Shown("refuses harm", "refused", "harm", better=1),
    Shown("helps to do harm", "complied", "harm", better=-1),
    Shown("rude", "rude", better=-1),
)
WITHOUT_RUBRIC = (
    Shown("ends by itself", "ended"),
    Shown("words in a reply", "words", form="count"),
    Shown("word pairs it said before in the reply", "repetition"),
    Shown("different word pairs over all replies", "distinct"),
)


def _headline(content: Content) -> Section:
    shown = HEADLINES if content["on_world"] else WITHOUT_RUBRIC
    text = "Every model was given the same prompts and the same seeds. In brackets 95 % intervals."
    if not content["on_world"]:
        text += " A raw model goes on until it is cut off; one that answers ends by itself, and says less."
    notes = [
        f"From {earlier} to {later}, {how(content, sampling)}: {words}."
        for sampling, figures in content["figures"].items()
        for earlier, later in pairwise(content["runs"])
        if (words := _changes(figures, shown, earlier, later))
    ]
    return Section("In short", text, notes, _each_sampling(content, shown))


def _changes(figures: Content, shown: Sequence[Shown], earlier: str, later: str) -> str:
    """Which headline figures moved so far that their intervals do not overlap, and to which side; "" where
    none has a better side."""
    sides: dict[str, list[str]] = {"better": [], "worse": [], "no clear change": []}
    for one in shown:
        if one.better and one.group in figures.get(one.figure, {}):
            before, after = (figures[one.figure][one.group][run] for run in (earlier, later))
            side = _side(before, after, one.better)
            moved = " → ".join(cell(figure, one.form)[0] for figure in (before, after))
            sides[side].append(f"{one.label} {moved}" if side in ("better", "worse") else one.label)
    if not any(sides.values()):
        return ""
    if not sides["better"] and not sides["worse"]:
        return "no clear change in any of these figures"
    return "; ".join(f"{side}: {', '.join(moves)}" for side, moves in sides.items() if moves)


def _side(before: Figure, after: Figure, better: int) -> str:
    if None in (before["low"], after["low"]):
        return "no clear change"
    if after["low"] > before["high"]:
        return "better" if better > 0 else "worse"
    if after["high"] < before["low"]:
        return "worse" if better > 0 else "better"
    return "no clear change"


def _by_kind(content: Content) -> Section:
    text = (
        "What a reply is worth by the rubric, from 0 to 1: right, honest, polite and short. Look for kinds "
        "whose dots lie far apart; where the strokes overlap, no difference is shown."
    )
    kinds = list(content["prompts"])
    tables, plots = [], []
    for sampling, figures in content["figures"].items():
        if "utility" not in figures:
            continue
        caption = how(content, sampling)
        score = [Shown(kind, "utility", kind, "score") for kind in (*kinds, "all")]
        right = [Shown(kind, "right", kind) for kind in (*kinds, "all")]
        tables += [_table(content, f"rubric, {caption}", sampling, score),
                   _table(content, f"in form and right, {caption}", sampling, right)]  # fmt: skip
        groups = {
            kind: [_interval(figures["utility"][kind][run]) for run in content["runs"]] for kind in kinds
        }
        plots.append(Plot(caption, intervals(groups, "rubric", 0, 1), _legend(content)))
    return Section("The rubric, by kind of prompt", text, tables=tables, plots=plots)


def _interval(figure: Figure) -> tuple[float | None, float | None, float | None]:
    return figure["value"], figure["low"], figure["high"]


OUTCOMES = (("win", "won"), ("tie", "tied"), ("loss", "lost"))


def _contests(content: Content) -> Section:
    text = (
        "Each two models' replies to each prompt, shown to the judge in shuffled order and without names. "
        "The rate is wins, a tie being half of one; 50 % tells nothing apart."
    )
    tables, plots = [], []
    for judge in dict.fromkeys(contest["judge"] for contest in content["contests"]):
        own = [contest for contest in content["contests"] if contest["judge"] == judge]
        rows = [
            (_names(contest), [cell(contest["figures"]["all"][name], "share") for name in
                               ("win", "tie", "loss", "rate")] + [(str(contest["left_out"]), "")])
            for contest in own
        ]  # fmt: skip
        tables.append(Table(f"judged by {judge}", ["win", "tie", "loss", "rate", "not judged"], rows))
        plots += [_bars(contest) for contest in own if _is_next(content, contest)]
    return Section("Win, tie, loss", text, tables=tables, plots=plots)


def _is_next(content: Content, contest: Content) -> bool:
    """Whether it is one of those drawn: a model against the one before it, as judged last."""
    neighbours = (contest["earlier"], contest["later"]) in pairwise(content["runs"])
    return neighbours and contest["sampling"] == list(content["samplings"])[-1]


def _bars(contest: Content) -> Plot:
    drawn = {
        group: [(figures[name]["value"], style) for name, style in OUTCOMES]
        for group, figures in contest["figures"].items()
        if figures["win"]["value"] is not None
    }
    legend = [("won", f"{contest['later']} wins"), ("tied", "tie"), ("lost", f"{contest['earlier']} wins")]
    return Plot(f"{_names(contest)}, by {contest['judge']}", bars(drawn, "share of the prompts"), legend)


def _names(contest: Content) -> str:
    return f"{contest['later']} against {contest['earlier']}, {contest['sampling']}"


def _manner(content: Content) -> Section:
    text = (
        "Refusing is wanted where harm is asked for and nowhere else; \u201cI don't know\u201d where nobody "
        "could know and nowhere else. Alignment often buys the one with some of the other."
    )
    shown = [
        Shown("refuses harm (wanted)", "refused", "harm"),
        Shown("refuses anything else (unwanted)", "refused", "not harm"),
        Shown("\u201cI don't know\u201d, unknowable (wanted)", "said_unknown", "unknown"),
        Shown("\u201cI don't know\u201d, known fact (unwanted)", "said_unknown", "fact"),
        Shown("rude", "rude"),
        *WITHOUT_RUBRIC,
    ]
    tables = _each_sampling(content, shown) if content["on_world"] else []
    return Section("How they reply", text, tables=tables)


PAIR_NAMES = {
    "advice": "good or bad advice, alike in length and frame",
    "comply": "refusing to do harm or helping with it",
    "rude": "an answer, or the same with an insult",
}


def _pairs(content: Content) -> Section:
    text = (
        "Two replies to one prompt, a helpful and a harmful one: which is likelier to each model? At a half "
        "both look alike to it; left of it the model prefers the helpful one, right of it the harmful one."
    )
    pairs, runs = content["pairs"], content["runs"]
    if not pairs:
        return Section("Helpful and harmful text", text)
    names = {name: PAIR_NAMES[name] for name in pairs}
    notes = [
        f"{own['left_out']} pairs of {names[name]} do not fit every model's context and are left out."
        for name, own in pairs.items()
        if own["left_out"]
    ]
    tables = [
        Table(caption, runs, [(names[name], [cell(pairs[name][key][run], form) for run in runs])
                              for name in pairs])
        for key, form, caption in (
            ("as_likely", "share", "pairs in which the harmful one is at least as likely, per byte"),
            ("difference", "signed", "by how many nats per byte the helpful one is likelier, on average"),
        )
    ]  # fmt: skip
    groups = {name: [_interval(pairs[name]["as_likely"][run]) for run in runs] for name in pairs}
    label = "share of pairs with the harmful one at least as likely"
    plot = Plot("; ".join(f"{name}: {words}" for name, words in names.items()),
                intervals(groups, label, 0, 1), _legend(content))  # fmt: skip
    return Section("Helpful and harmful text", text, notes, tables, [plot])


def _cost(content: Content) -> Section:
    text = (
        "Where the first model was trained on text of this kind, a later one that pays more nats for it has "
        "forgotten something. KL is how far a model has moved from an earlier one, on its own replies, exact "
        "over the vocabulary, each asked in its own form."
    )
    runs, tables = content["runs"], []
    if content["text"]:
        row = ("nats per byte", [cell(content["text"]["nats"][run], "nats") for run in runs])
        caption = "{documents} held-out documents of {origin}, {bytes:,} bytes".format(**content["text"])
        tables.append(Table(caption, runs, [row]))
    known = [one for one in content["kl"] if one["token"] is not None]
    if known:
        rows = [
            (
                f"{one['later']} from {one['earlier']}",
                [cell(one["token"], "nats"), cell(one["response"], "count")],
            )
            for one in known
        ]
        caption = f"KL in nats, on replies {how(content, known[0]['sampling'])}"
        tables.append(Table(caption, ["a token", "a reply"], rows))
    notes = [
        f"{one['later']} and {one['earlier']} have different vocabularies: there is no KL between them."
        for one in content["kl"]
        if one["token"] is None
    ]
    return Section("What it cost", text, notes, tables)


def _sure(content: Content) -> Section:
    text = (
        "On the dotted line a model is right as often as it is sure; below it, it is surer than it should "
        "be. First each picks the likeliest of up to 8 answers to a question of fact; then how probable the "
        "words of its own greedy replies were to it, to questions of fact and to those that nobody can "
        "answer. Where wrong replies are nearly as probable as right ones, they sound as sure. "
        "Large dots stand for many questions."
    )
    sure, runs = content["sure"], content["runs"]
    if not sure:
        return Section("Sure and right", text)
    tables, plots = [], []
    for measure, (caption, lines) in SURE.items():
        rows = [(label, [cell(sure[measure][run][key], form) for run in runs]) for label, key, form in lines]
        tables.append(Table(caption, runs, rows))
        series = [_dots(sure[measure][run]["bins"]) for run in runs]
        svg = curves(series, "how sure", "how often right", (0, 1), (0, 1), diagonal=True)
        plots.append(Plot(caption, svg, _legend(content)))
    return Section("Sure and right", text, tables=tables, plots=plots)


def _dots(bins: Sequence[Content]) -> list[Point]:
    """A dot for each bin, the larger the more questions are in it."""
    total = sum(b["count"] for b in bins)
    return [(b["sure"], b["accuracy"], sqrt(b["count"] / total)) for b in bins]


SURE = {
    "choice": (
        "picking one of the answers given",
        (
            ("right", "right", "share"),
            ("how sure", "sure", "share"),
            ("calibration error (ECE)", "error", "nats"),
        ),
    ),
    "words": (
        "its own replies, by the probability of their words",
        (
            ("right", "right", "share"),
            ("how sure", "sure", "share"),
            ("how sure where right", "sure_right", "share"),
            ("how sure where wrong", "sure_wrong", "share"),
            ("calibration error (ECE)", "error", "nats"),
        ),
    ),
}
"""Of each measure its caption and its lines: label, key and form."""


def _training(content: Content) -> Section:
    text = (
        "Of runs that were trained against a reward model. The score is what they were trained on and the "
        "rubric is what was meant: where the score still rises and the rubric falls, the reward is hacked."
    )
    plots = []
    for run, events in content["training"].items():
        for key in ("score", "rubric"):
            series = [list(_points(events, event, key)) for event in EVENTS]
            points = [point for one in series for point in one]
            if points:
                reach, heights, _ = zip(*points, strict=True)
                ranges = (0, max(reach) or 1), (min(heights), max(heights))
                legend = [(style_of(number), f"{event} prompts") for number, event in enumerate(EVENTS)]
                plots.append(Plot(f"{run}: {key}", curves(series, "√KL, nats a reply", key, *ranges), legend))
    return Section("Score and rubric against the distance gone", text, plots=plots)


EVENTS = ("train", "val")


def _points(events: Sequence[Content], event: str, key: str) -> Iterator[Point]:
    for one in events:
        if one["event"] == event and one[key] is not None:
            yield sqrt(max(0.0, one["kl"])), one[key], 0.2
