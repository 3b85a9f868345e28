"""What the benchmarks share: options, peers, scripts, runs in turn, medians, and records with provenance."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NoReturn, TypeVar

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `python benchmarks/x.py` runs beside the repository's own minillm

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line, "error: what", without the usage before it; exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def parser(doc: str, runs: int | None = None) -> Parser:
    """With --json, and where a benchmark has `runs` with --runs, also called --rounds."""
    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs is not None:
        help = f"each side's, in turn ({runs})"
        made.add_argument("--runs", "--rounds", type=at_least_one, default=runs, help=help)
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


def peer(module: str, how: str) -> ModuleType:
    """What minillm is compared with; one line that says how to get it where it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        sys.exit(f"{module} is not there ({error}): {how}")


def script(*words: object) -> float:
    """Runs a Python file from the repository's root to its end; the seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return time.perf_counter() - began


def in_turn(sides: Mapping[str, Callable[[int], T]], runs: int) -> dict[str, list[T]]:
    """What each side returns, run after run: they alternate, so that a busy machine slows both. A side is
    given the number of its run."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(runs):
        for name, run in sides.items():
            results[name].append(run(number))
    return results


def timed(action: Callable[[], object]) -> Callable[[int], float]:
    """The seconds that an action takes."""

    def run(number: int) -> float:
        began = time.perf_counter()
        action()
        return time.perf_counter() - began

    return run


def medians(results: Mapping[str, Sequence[float | tuple[float, ...]]]) -> dict[str, float]:
    """Of each side; where a run gives several numbers, of the first."""
    firsts = {name: [run[0] if isinstance(run, tuple) else run for run in of] for name, of in results.items()}
    return {name: median(values) for name, values in firsts.items()}


def write(path: Path | None, record: dict[str, Any]) -> None:
    """The record beside what made it; nothing without a path."""
    from minillm.tools.provenance import provenance

    if path is not None:
        path.write_text(json.dumps(provenance() | record, indent=1) + "\n", encoding="utf-8")
