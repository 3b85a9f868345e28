"""The README is a promise: its commands run in their order, its files exist."""

import ast
import importlib
import json
import re
import shlex
import subprocess
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path

import house
import pytest
from runs import ROOT, TORCHRUN

import rlhf
import sft
import train
from minillm.compare import __main__ as compare
from minillm.errors import InputError
from minillm.play import __main__ as play
from minillm.tools import chat, evaluate, export
from minillm.tools.commandline import parse_options

pytestmark = pytest.mark.usefixtures("quick_plots")

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line.split("  #")[0].strip() for line in README.splitlines() if re.match(r"    (python|torchrun) ", line)
]
OPTIONS = {
    "train.py": train, "sft.py": sft, "rlhf.py": rlhf, "minillm.chat": chat, "minillm.compare": compare,
    "minillm.export": export, "minillm.play": play, "minillm.tools.evaluate": evaluate,
}  # fmt: skip
# What makes a command small: its size is no part of the promise.
SHAPE = "--vocab-size 300 --depth 1".split()
SMALL = {
    "train": "--block-size 256 --batch-tokens 512 --steps 3 --samples 1",
    "sft": "--batch-tokens 512 --steps 3 --world-conversations 60 --world-megabytes 0.2 --eval-prompts 1",
    "rlhf sample": "--prompts 12 --max-new-tokens 8",
    "rlhf reward": "--batch-sets 2",
    "rlhf policy": "--iterations 1 --rollout-batch 16 --max-new-tokens 8 --val-prompts 4 --epochs 1",
    "minillm.compare": "--prompts 1 --pairs 1 --text-bytes 500 --max-new-tokens 16",
    "minillm.chat": "--prompt Who? --max-new-tokens 5",
}
SLOW = ("kernels.gate", "kernels.bench")  # run by tests of their own


def parts_of(command: str) -> tuple[str, list[str]]:
    """The script or module of a command, and its arguments, made small."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    name, rest = (words[at + 1], words[at + 2 :]) if words[at] == "-m" else (words[at][:-3], words[at + 1 :])
    if "--resume" in rest:
        return name, rest
    stage = f"{name} {rest[rest.index('--stage') + 1]}" if "--stage" in rest else name
    shape = SHAPE if name == "train" and "--init" not in rest else []
    return name, [*rest, *shape, *SMALL.get(stage, "").split()]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the README speaks of, and what `make demo` leaves behind."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "tale.txt").write_text("The cat met the dog by the well. " * 200)
    here = tmp_path / "minillm"
    here.mkdir()
    notes = (f'{{"text": "Note {i}: the cat drank at the well on day {i}."}}\n' for i in range(200))
    (here / "notes.jsonl").write_text("".join(notes))
    chats = ({"prompt": f"Is it day {i}?", "completion": "Yes."} for i in range(60))
    (here / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    monkeypatch.chdir(here)
    train.main([*"--data ../books --out out/base".split(), *SHAPE, *SMALL["train"].split()])
    return here


def test_every_command_of_the_readme_runs_in_its_order(here, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "A > B > C = D")  # the person at the terminal
    ran = set()
    for command in COMMANDS:
        name, words = parts_of(command)
        ran.add(name)
        if name in SLOW:
            continue
        if command.startswith("torchrun"):
            subprocess.run([*TORCHRUN, str(ROOT / f"{name}.py"), *words], check=True, capture_output=True)
        else:
            module = importlib.import_module(name.replace("minillm.chat", "minillm.tools.chat"))
            (module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")).main(words)
    assert ran == {"train", "sft", "rlhf", "minillm.chat", "minillm.compare", "minillm.tools.evaluate", *SLOW}
    made = {path.name for path in (here / "out").iterdir()}
    assert made >= set("base books mine notes masked two sft helper both rlhf ours".split())
    aligned = {path.name for path in (here / "out" / "rlhf").iterdir()}
    assert aligned >= {"reward", "ppo", "grpo", "dpo", "best-of-n"}


def test_what_else_the_readme_asks_to_type_is_there_and_run_by_ci_or_a_test():
    typed = [line.split("#")[0].split() for line in README.splitlines() if line.startswith("    ")]
    ci, makefile = (ROOT / ".ci" / "run").read_text(), (ROOT / "Makefile").read_text()
    targets = [words[1] for words in typed if words[0] == "make"]
    assert targets == ["demo", "play", "lessons", "test"]
    for target in targets:
        assert re.search(f"^(timeout .* )?make {target}", ci, re.M)
        assert f"\n{target}: .venv/installed\n" in makefile
    for name in (name for words in typed if words[0] == "pytest" for name in words[1:]):
        assert (ROOT / name).exists(), name
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for extra in re.findall(r"pip install '\.\[(\w+)\]'", README):
        assert extra in setup["options.extras_require"], extra
    assert re.findall(r"`python -m ([\w.]+)", README) == ["minillm.export"]  # test_export.py runs it


def texts() -> dict[str, str]:
    """All pages, and the docstrings of all modules."""
    pages = {str(page): page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "lessons" / "README.md"]}
    files = [*ROOT.glob("*.py"), *(ROOT / "minillm").rglob("*.py"), *(ROOT / "lessons").glob("*.py")]
    docs = {str(file): ast.get_docstring(ast.parse(file.read_text())) or "" for file in files}
    return pages | docs


def test_every_command_that_a_page_or_a_docstring_shows_is_taken_by_its_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "elsewhere"):  # play refuses a folder that is not there
        (tmp_path / folder).mkdir()
    checked = set()
    for place, text in texts().items():
        for line in re.sub(r"\\\n +", "", text).splitlines():
            found = re.match(r" {4,}(?:srun )?(?:python|torchrun) .*?(?=  |$)", line)
            words = shlex.split(found[0].replace("$stage", "rank")) if found else []
            if at := next((i for i, word in enumerate(words) if word in OPTIONS), 0):
                try:
                    given = [word for word in words[at + 1 :] if word != "--resume"]
                    parse_options(OPTIONS[words[at]].Options, given)
                except InputError as error:
                    pytest.fail(f"{place}: {line.strip()}: {error}")
                checked.add((words[at], place))
    assert {name for name, _ in checked} == OPTIONS.keys() and len(checked) > 20


def test_every_file_of_the_core_and_every_room_around_it_stands_in_the_map_once():
    core, _, ring = README.split("## The code, in reading order")[1].partition("Around it")
    named, folder = [], ""
    for row in re.findall(r"^\| (`.*?) \|", core, re.MULTILINE):
        for name in re.findall(r"`([\w./]+)`", row):
            folder = name.rpartition("/")[0] if "/" in name or row.startswith(f"`{name}`") else folder
            named.append(name if "/" in name or not folder else f"{folder}/{name}")
    files = [file for file in house.files() if house.is_core(file) and file not in house.ENTRANCES]
    assert sorted(named) == sorted(file for file in files if not file.endswith("__init__.py"))
    rooms = re.findall(r"^- `([\w/]+)`:", ring, re.MULTILINE)
    assert sorted(f"{room}/" for room in rooms) == sorted([*house.OUTER, "minillm/play/"])


def test_every_page_that_a_page_links_to_exists():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_option_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any((ROOT / folder / name).exists() for folder in ("", "kernels", "minillm")), name
    options = {"help"} | {field.name for script in OPTIONS.values() for field in fields(script.Options)}
    for option in re.findall(r"`--([\w-]+)", text):
        assert option.replace("-", "_") in options, option
