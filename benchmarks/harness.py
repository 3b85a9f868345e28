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
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `python benchmarks/x.py` runs beside the repository's own minillm

T = TypeVar("T")


def parser(doc: str, runs: int | None = None) -> argparse.ArgumentParser:
    """With --json, and where a benchmark has `runs` with --runs, also called --rounds."""
    from kernels.dev.commandline import Parser

    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs is not None:
        made.add_argument("--runs", "--rounds", type=int, default=runs, help=f"each side's, in turn ({runs})")
    made.add_argument("--json", type=Path, help="write the results with their provenance here")
    return made


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


def medians(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in results.items()}


def write(path: Path | None, record: dict[str, Any]) -> None:
    """The record beside what made it; nothing without a path."""
    from minillm.tools.provenance import provenance

    if path is not None:
        path.write_text(json.dumps(provenance() | record, indent=1) + "\n", encoding="utf-8")
