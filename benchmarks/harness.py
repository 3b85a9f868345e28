"""What the benchmarks share: options, sides that race in turn, records with provenance."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))  # `python benchmarks/x.py` runs beside its own minillm

from minillm.io.disk import write_json
from minillm.tools.provenance import provenance

Side = Callable[[int], dict[str, float]]
"""One run of a side, given the run's number: its figures by name, first the one that counts."""
Figures = dict[str, dict[str, list[float]]]
"""Of every side, every figure of its runs."""


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line, "error: what", without the usage before it; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def parser(doc: str, runs: int | None = None) -> Parser:
    """With --json, and where a benchmark has `runs` with --runs."""
    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs is not None:
        made.add_argument("--runs", type=at_least_one, default=runs, help=f"each side's, in turn ({runs})")
    made.add_argument("--json", type=new_file, help="write the results with their provenance here")
    return made


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least 1")
    return int(text)


def new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder, or in none; give a file in a folder there is")
    return path


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def in_turn(sides: Mapping[str, Side], runs: int) -> Figures:
    """All figures, run after run: the sides alternate, so that a busy machine slows all of them."""
    found: Figures = {name: {} for name in sides}
    for number in range(runs):
        for name, run in sides.items():
            for figure, value in run(number).items():
                found[name].setdefault(figure, []).append(value)
    return found


def medians(found: Figures) -> dict[str, dict[str, float]]:
    return {name: {figure: median(own) for figure, own in of.items()} for name, of in found.items()}


def race(title: str, sides: Mapping[str, Side], runs: int) -> Figures:
    """The figures; shows medians, and how many times the first side's first figure another's is."""
    found, ours = in_turn(sides, runs), 0.0
    print(title)
    for name, figures in medians(found).items():
        first = next(iter(figures.values()))
        ours = ours or first
        shown = "".join(f"{value:12.5g} {figure}" for figure, value in figures.items())
        print(f"  {name:16}{shown}{first / ours:8.3f}x", flush=True)
    return found


def write(path: Path | None, record: dict[str, Any]) -> None:
    """The record beside what made it; nothing without a path."""
    if path is not None:
        write_json(path, provenance() | record)
