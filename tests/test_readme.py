"""The README is a promise: its commands run in their order, its files exist."""

import importlib
import json
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from runs import ROOT, TORCHRUN

import rlhf
import sft
import train
from minillm.tools import chat

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip() for line in README.splitlines() if re.match(r"    (python|torchrun) ", line)
]
# What makes a command small: its size is no part of the promise.
SHAPE = "--vocab-size 300 --depth 1".split()
SMALL = {
    "train": "--block-size 256 --batch-tokens 512 --steps 3 --samples 1",
    "sft": "--batch-tokens 512 --steps 3 --world-conversations 60 --world-megabytes 0.2 --eval-prompts 1",
    "rlhf sample": "--prompts 12 --max-new-tokens 8",
    "rlhf reward": "--batch-sets 2",
    "rlhf policy": "--iterations 1 --batch-responses 16 --max-new-tokens 8 --val-prompts 4 --epochs 1",
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
        if name == "train" and "--out" not in words:
            words += ["--out", "out/again"]  # a run of that name is there
        if command.startswith("torchrun"):
            subprocess.run([*TORCHRUN, str(ROOT / f"{name}.py"), *words], check=True, capture_output=True)
        else:
            module = importlib.import_module(name)
            (module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")).main(words)
    assert ran == {"train", "sft", "rlhf", chat.__name__, "minillm.compare", *SLOW}
    made = {path.name for path in (here / "out").iterdir()}
    assert made >= {
        "base",
        "again",
        "mine",
        "notes",
        "masked",
        "two",
        "sft",
        "helper",
        "both",
        "rlhf",
        "ours",
    }
    aligned = {path.name for path in (here / "out" / "rlhf").iterdir()}
    assert aligned >= {"reward", "ppo", "grpo", "dpo", "best-of-n"}


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def rows_of_the_map() -> list[tuple[list[Path], int]]:
    """The files of each row of the README's map of the code, and how many lines it says they have."""
    table = README.split("## The code, in reading order")[1].split("##")[0]
    rows = []
    for row in table.splitlines():
        if not row.startswith("| `"):
            continue
        names, lines = row.split("|")[1:3]
        files, folder = [], ROOT
        for name in re.findall(r"`([\w./]+)`", names):
            path = ROOT / name if "/" in name else folder / name
            folder = path.parent
            files += sorted(path.glob("*.py")) if path.is_dir() else [path]
        rows.append((files, int(lines.replace(",", ""))))
    return rows


def test_the_map_of_the_code_names_files_that_exist_with_their_lines_to_the_nearest_ten():
    for files, said in rows_of_the_map():
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert said == round(lines, -1), f"{[file.name for file in files]} have {round(lines, -1)} lines"


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_file_and_option_that_a_page_names_exists(page):
    text = (ROOT / "docs" / page).read_text()
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "kernels" / name).exists(), name
    options = {field.name for kind in (train.Options, sft.Options, rlhf.Options) for field in fields(kind)}
    for option in re.findall(r"`--([\w-]+)", text):
        assert option.replace("-", "_") in options, option


def test_every_module_stands_in_the_map_once():
    mapped = [file for files, _ in rows_of_the_map() for file in files]
    modules = [file for place in ("minillm", "kernels") for file in (ROOT / place).rglob("*.py")]
    scripts = [ROOT / f"{name}.py" for name in ("train", "sft", "rlhf")]
    empty = [ROOT / "minillm" / "__init__.py", ROOT / "kernels" / "__init__.py"]
    wanted = sorted({*modules, *scripts} - {*empty})
    assert (
        sorted(file for file in mapped if file.is_relative_to(ROOT) and "tests" not in file.parts) == wanted
    )


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert not re.findall(r"^@[A-Z]+@|@[A-Z]{3,}@", README, re.MULTILINE)
