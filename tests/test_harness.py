"""What the benchmarks share: runs that alternate, medians, and results with their provenance."""

import json
import runpy
from pathlib import Path

HARNESS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "harness.py"))


def test_sides_alternate_and_each_run_knows_its_number():
    order = []
    sides = {name: lambda number, name=name: order.append((name, number)) or 10 * number for name in "ab"}
    results = HARNESS["in_turn"](sides, 3)
    assert order == [(name, number) for number in range(3) for name in "ab"]
    assert results == {"a": [0, 10, 20], "b": [0, 10, 20]}
    assert HARNESS["medians"]({"a": [9.0, 1.0, 2.0]}) == {"a": 2.0}


def test_a_record_is_written_with_what_made_it_and_nothing_without_a_path(tmp_path):
    HARNESS["write"](None, {"ratio": 1.5})
    assert not list(tmp_path.iterdir())
    HARNESS["write"](tmp_path / "x.json", {"ratio": 1.5})
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["ratio"] == 1.5 and record["versions"]["torch"] and "commit" in record


def test_runs_may_be_called_rounds():
    parser = HARNESS["parser"]("What it is.", runs=4)
    assert [parser.parse_args(words).runs for words in ([], ["--rounds", "2"], ["--runs", "3"])] == [4, 2, 3]
