"""The README is a promise: its commands run in their order, its files exist."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from runs import ROOT, TORCHRUN

import train
from minillm import chat

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
    "rlhf reward": "--batch-rankings 2",
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
    monkeypatch.setattr("builtins.input", lambda _: "q")  # the person at the terminal goes at once
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
            importlib.import_module(name).main(words)
    assert ran == {"train", "sft", "rlhf", chat.__name__, "minillm.compare", *SLOW}
    made = {path.name for path in (here / "out").iterdir()}
    assert made >= {"base", "again", "mine", "notes", "masked", "two", "sft", "helper", "both", "rlhf"}
    assert (here / "out" / "rlhf" / "reward" / "report.json").exists()


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_file_that_the_readme_names_exists():
    table = README.split("## The code, in reading order")[1].split("##")[0]
    for row in table.splitlines()[4:]:
        folder = Path()
        for name in re.findall(r"`([\w./]+)`", row.split("|")[1]) if row.startswith("|") else []:
            path = Path(name) if "/" in name or folder == Path() else folder / name
            folder = path.parent
            assert (ROOT / path).exists(), f"{path} of the README does not exist"


def test_every_module_stands_in_the_readme():
    table = README.split("## The code, in reading order")[1].split("##")[0]
    for module in [*(ROOT / "minillm").glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        assert module.name == "__init__.py" or module.name in table, f"{module.name} is not in the README"


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert not re.findall(r"^@[A-Z]+@|@[A-Z]{3,}@", README, re.MULTILINE)
