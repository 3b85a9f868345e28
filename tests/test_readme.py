"""The README is a promise: its commands run in their order, its files exist."""

import importlib
import json
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import house
import pytest
from runs import ROOT, TORCHRUN

import rlhf
import sft
import train

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
        if name == "train" and "--out" not in words:
            words += ["--out", "out/again"]  # a run of that name is there
        if command.startswith("torchrun"):
            subprocess.run([*TORCHRUN, str(ROOT / f"{name}.py"), *words], check=True, capture_output=True)
        else:
            module = importlib.import_module(name.replace("minillm.chat", "minillm.tools.chat"))
            (module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")).main(words)
    assert ran == {"train", "sft", "rlhf", "minillm.chat", "minillm.compare", "minillm.tools.evaluate", *SLOW}
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


def files_of_the_map() -> list[str]:
    """The files that the README's map of the core names, as paths from the root."""
    table = README.split("## The code, in reading order")[1].split("Around it")[0]
    named, folder = [], ""
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`([\w./]+)`", row):
            folder = name.rpartition("/")[0] if "/" in name or row.startswith(f"`{name}`") else folder
            named.append(name if "/" in name or not folder else f"{folder}/{name}")
    return named


def test_every_file_of_the_core_stands_in_the_map_once():
    core = [file for file in house.files() if house.is_core(file)]
    read = [file for file in core if not file.endswith("__init__.py") and file not in house.ENTRANCES]
    assert sorted(files_of_the_map()) == sorted(read)


def test_every_room_of_the_outer_ring_stands_in_the_map():
    rooms = re.findall(r"^\| `([\w/]+)` \|", README.split("Around it")[1].split("##")[0], re.MULTILINE)
    assert sorted(f"{room}/" for room in rooms) == sorted(house.OUTER)


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_file_and_option_that_a_page_names_exists(page):
    text = (ROOT / "docs" / page).read_text()
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "kernels" / name).exists(), name
    options = {field.name for kind in (train.Options, sft.Options, rlhf.Options) for field in fields(kind)}
    for option in re.findall(r"`--([\w-]+)", text):
        assert option.replace("-", "_") in options, option


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert not re.findall(r"^@[A-Z]+@|@[A-Z]{3,}@", README, re.MULTILINE)
