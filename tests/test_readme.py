"""The README is a promise: its commands run in their order, its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip() for line in README.splitlines() if re.match(r"    (python|torchrun) ", line)
]
SMALL = "--vocab-size 300 --depth 1 --block-size 16 --batch-tokens 64 --steps 3 --samples 1".split()


def words_of(command: str) -> list[str]:
    """The arguments of a command of the README, made small: its size is no part of the promise."""
    words = shlex.split(command.split("train.py", 1)[1])
    if "--help" in words or "--resume" in words:
        return words
    if "--init" in words:
        return [*words, *SMALL[4:]]
    return [*words, *SMALL]


def test_every_command_of_the_readme_runs_in_its_order(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "tale.txt").write_text("The cat met the dog by the well. " * 200)
    here = tmp_path / "minillm"
    here.mkdir()
    notes = (f'{{"text": "Note {i}: the cat drank at the well on day {i}."}}\n' for i in range(200))
    (here / "notes.jsonl").write_text("".join(notes))
    monkeypatch.chdir(here)
    train.main([*"--data ../books --out out/base".split(), *SMALL])  # what `make demo` leaves behind
    fresh = 0
    for command in COMMANDS:
        words = words_of(command)
        if "--out" not in words and "--help" not in words:
            fresh += 1
            words += ["--out", f"out/fresh{fresh}"]
        if command.startswith("torchrun"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            subprocess.run([*launch, str(ROOT / "train.py"), *words], check=True, capture_output=True)
        elif "--help" in words:
            with pytest.raises(SystemExit) as stop:
                train.main(words)
            assert stop.value.code == 0
        else:
            train.main(words)
    assert len(COMMANDS) >= 6
    assert {p.name for p in (here / "out").iterdir()} >= {"base", "mine", "notes", "masked", "two", "cache"}


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
    for module in (ROOT / "minillm").glob("*.py"):
        assert module.name == "__init__.py" or module.name in table, f"{module.name} is not in the README"
