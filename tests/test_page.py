"""The page of a comparison: whole, safe, and made of nothing but the metrics in the file."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.compare.metrics import WORDS
from minillm.compare.page import page, terminal_text
from minillm.tools.measures import estimate
from minillm.tools.streams import printable

KINDS = ("fact", "harm")
RUNS = ["base", "sft", "ppo"]
SECTIONS = [name for name in WORDS if name != "metrics"]
VOID = {"meta", "br"}


def shares() -> dict:
    return {run: estimate(0.2 + 0.3 * i, 100, 0.1 + 0.3 * i, 0.3 + 0.3 * i) for i, run in enumerate(RUNS)}


def content_of(text: str = "It is red.", plotted: bool = True) -> dict:
    """What a comparison of three models finds, every reply being this text."""
    plot = {run: [(0.4, 0.3, 0.9), (0.8, 0.9, 0.1)] for run in RUNS}
    reply = {"text": text, "ended": True, "utility": 0.9}
    return {
        "runs": RUNS, "folders": {run: f"out/{run}" for run in RUNS},
        "options": {"seed": 0, "show": 1, "judge": ["x"]},
        "commit": "0" * 40, "dirty": False, "python": "3.11", "cpu": "a <CPU>", "cores": 2, "device": "cpu",
        "versions": {"torch": "2"}, "on_world": True, "prompts": dict.fromkeys(KINDS, 30),
        "left_out": {"prompts without room for a reply": 3}, "seconds": 1.5,
        "metrics": {
            name: {
                "tables": {f"{name}, contest": {"ppo <sft>": {"not judged": estimate(7, 9, form="whole")}},
                           f"{name}, greedy": {"refuses harm": shares(), "rude & so": shares()}},
                "notes": [f"a note on {name}"],
                "plots": {"a plot": plot} if plotted and name == "sure" else {},
            }
            for name in SECTIONS
        },
        "replies": [
            {"kind": kind, "messages": [], "prompt": f"What is {text}?",
             "said": {s: dict.fromkeys(RUNS, reply) for s in ("greedy", "sampled")}}
            for kind in KINDS for _ in range(30)
        ],
    }  # fmt: skip


class Reader(HTMLParser):
    """Reads a page as a browser does: its tags, which must be balanced, their attributes and its text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.said: dict[str, list[str]] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.said.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.said[tag][-1] += data


HOSTILE = [
    "<script>alert(1)</script>", "</p></article></body>", "<!-- ", "&lt;b&gt; & &amp;", "\"'><img src=x>",
    "<svg><style>*{display:none}</style>", "http://x.example/a.png", "]]>", "{{ 7 * 7 }}",
]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> str:
    """A page with everything on it."""
    return page(content_of())


@pytest.fixture(scope="module")
def reader(made) -> Reader:
    return Reader(made)


@pytest.fixture(scope="module")
def harmless() -> list[str]:
    """The tags of a page on which nobody says anything odd."""
    return [tag for tag, _ in Reader(page(content_of("harmless", plotted=False))).tags]


@settings(max_examples=8)
@given(text=st.text())
@example(text="\x1b[2J\x00")
@example(text="".join(HOSTILE))
@example(text="")
def test_whatever_a_model_says_is_shown_as_text_and_opens_no_tag(harmless, text):
    content = content_of(text, plotted=False)
    made = page(content)
    reader = Reader(made)
    assert [tag for tag, _ in reader.tags] == harmless and reader.open == []
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", made + terminal_text(content))
    if "\r" not in text:  # which a browser reads as a line's end
        assert reader.said["p"].count(printable(text) or "(nothing)") == 2 * len(KINDS) * 20 * len(RUNS)


def test_names_of_models_judges_and_folders_are_escaped_too_and_what_no_file_can_hold_is_left_out():
    text = json.dumps(content_of()).replace("out/ppo", "out/\\udcff").replace("ppo", "<b>ppo")
    made = page(json.loads(text))
    reader = Reader(made)
    assert reader.open == [] and not {"b", "sft", "cpu"} & {tag for tag, _ in reader.tags}
    assert "<b>ppo" in reader.said["h4"] and "out/\N{REPLACEMENT CHARACTER}" in made.encode().decode()


def test_the_page_needs_nothing_but_itself(made, reader):
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "a", "base", "form"}
    attributes = {name for _, own in reader.tags for name in own}
    assert not attributes & {"src", "href", "srcset", "action", "data"}
    assert not any(name.startswith("on") for name in attributes)
    assert all(own.get("xlink:href", "#").startswith("#") for _, own in reader.tags)
    assert not re.search(r"https?:|//\w|@import|url\(", made)
    assert made.startswith("<!doctype html>\n<html lang=") and ("meta", {"charset": "utf-8"}) in reader.tags


def test_on_a_phone_every_value_of_a_table_stands_under_the_name_of_its_column(reader):
    """There the head of a table is hidden; nothing is as wide as the whole table."""
    assert any(own.get("name") == "viewport" and "device-width" in own["content"] for _, own in reader.tags)
    names = {own.get("data-name") for tag, own in reader.tags if tag == "td"}
    assert names == {*RUNS, "not judged"}
    phone = reader.said["style"][0].split("@media (max-width")[1]
    assert "thead { display: none" in phone and "attr(data-name)" in phone


def test_every_class_and_colour_that_the_page_uses_has_a_style_by_day_and_by_night(made, reader):
    used = {name for _, own in reader.tags for name in (own.get("class") or "").split()}
    style = reader.said["style"][0]
    assert used and all(f".{name}" in style for name in used)
    colours = set(re.findall(r"var\((--\w+)\)", made))
    assert {"--ink", "--rule", "--c0", "--c2"} <= colours and "prefers-color-scheme: dark" in style
    assert all(style.count(f"{name}: #") == 2 for name in colours - {"--c"})


def test_the_page_is_made_of_the_file_and_begins_with_the_picture_then_replies_then_tables(made):
    assert page(json.loads(json.dumps(content_of()))) == made
    places = [made.index(part) for part in ("<svg", "<h2>", 'class="reply"', "<table")]
    assert places == sorted(places)
    assert "refuses harm ↑" in made and ">rude &amp; so<" in made


def test_what_was_left_out_is_said(made):
    assert "Left out: 3 prompts without room for a reply." in made
    assert "a note on pairs" in made and 'data-name="not judged">7<' in made
    assert "17 more of 30; all are in compare.json" in made


def test_the_terminal_shows_every_table_and_note_of_the_page_and_the_first_replies(reader):
    printed = terminal_text(content_of())
    text = " ".join(printed.split())
    cells = {cell.replace("(", " (").strip() for cell in reader.said["td"]}
    for said in (*reader.said["caption"], *reader.said["li"], *cells, "rude & so 20.0% (10–30)"):
        assert " ".join(said.split()) in text, said
    titles = ["The same prompts, side by side", *re.findall("── (.*) ──", printed), "How this was made"]
    assert titles == reader.said["h2"]
    assert text.count("What is It is red.?") == len(KINDS)


def test_parts_that_are_not_there_leave_no_section_on_the_page_or_in_the_terminal():
    content = content_of() | {"on_world": False}
    empty = {"tables": {}, "notes": [], "plots": {}}
    content["metrics"] = dict.fromkeys(SECTIONS, empty) | {"headline": content["metrics"]["headline"]}
    reader = Reader(page(content))
    assert reader.said["h2"] == ["The same prompts, side by side", "In short", "How this was made"]
    assert re.findall("── (.*) ──", terminal_text(content)) == ["In short"] and reader.open == []


# ---- Plots

values = st.floats(0, 1)
estimates = st.lists(
    st.tuples(values, values, values)
    .map(sorted)
    .map(lambda three: dict(zip(("low", "value", "high"), three, strict=True))),
    min_size=1,
    max_size=9,
)


def drawing(table: dict) -> str:
    """The first plot of a page, with this as the headline's table."""
    content = content_of() | {"replies": []}
    content["metrics"]["headline"]["tables"] = {"greedy": table}
    return re.search("<svg.*?</svg>", page(content), re.DOTALL)[0]


def numbers(svg: str, tag: str, *names: str) -> list[list[float]]:
    """The attributes of the tags of models, in order."""
    own = re.findall(rf"<{tag} (?!class)(.*?)/>", svg)
    return [[float(re.search(rf'\b{name}="([^"]*)"', one)[1]) for name in names] for one in own]


@settings(max_examples=20)
@given(estimates)
@example([{"value": None, "low": None, "high": None}])
@example([{"value": 1.0, "low": -0.2, "high": 1.3}])
def test_intervals_stay_inside_the_drawing_and_hold_their_dots(rows):
    svg = drawing({"kind": {str(i): row | {"form": "share"} for i, row in enumerate(rows)}})
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    strokes, dots = numbers(svg, "line", "x1", "y1", "x2", "y2"), numbers(svg, "circle", "cx", "cy")
    assert len(strokes) == len(dots) == sum(row["value"] is not None for row in rows)
    for (x1, y1, x2, y2), (cx, cy) in zip(strokes, dots, strict=True):
        assert 0 <= x1 <= cx <= x2 <= width and y1 == y2 == cy and 0 <= cy <= height
    known = [row["value"] for row in rows if row["value"] is not None]
    assert [cx for cx, _ in dots] == pytest.approx([12 + 330 * value for value in known], abs=0.05)
    assert Reader(svg).open == []


points = st.lists(st.tuples(values, values, values), max_size=5)


@settings(max_examples=20)
@given(st.lists(points, min_size=1, max_size=9))
def test_curves_have_a_dot_for_each_point_on_its_line_beside_the_diagonal(series):
    content = content_of() | {"replies": []}
    content["metrics"]["sure"]["plots"] = {"caption": {str(i): own for i, own in enumerate(series)}}
    svg = re.findall("<svg.*?</svg>", page(content), re.DOTALL)[-1]
    dots, lines = numbers(svg, "circle", "cx", "cy"), re.findall('<polyline points="(.*?)"/>', svg)
    assert len(lines) == len(series) and len(dots) == sum(map(len, series))
    assert [f"{x:.1f},{y:.1f}" for x, y in dots] == " ".join(lines).split()
    wanted = [(40 + 310 * x, 200 - 190 * y) for own in series for x, y, _ in own]
    assert dots == [pytest.approx(one, abs=0.051) for one in wanted]
    assert svg.count('class="even"') == 1 and Reader(svg).open == []


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=20))
@example("$x^2$ \\alpha %s {} <b>&")
def test_labels_are_no_markup(label):
    svg = drawing({label: {"one": estimate(0.5, 9)}})
    assert Reader(svg).open == [] and "<b" not in svg
    assert Reader(svg).said["text"][6:] == [printable(label)] or "\r" in label
