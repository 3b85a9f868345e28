"""What the benchmarks share: runs that alternate, medians, and results with their provenance."""

import json
import runpy
from pathlib import Path

import pytest

from minillm.errors import InputError
from minillm.tools.stage import script

HARNESS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "harness.py"))


def test_sides_alternate_and_each_run_knows_its_number(capsys):
    order = []

    def side(name, seconds):
        return lambda number: order.append((name, number)) or {"s": seconds[number], "loss": number}

    results = HARNESS["race"]("both", {"ours": side("a", [9.0, 2.0, 1.0]), "theirs": side("b", [4.0] * 3)}, 3)
    assert order == [(name, number) for number in range(3) for name in "ab"]
    assert results["ours"] == {"s": [9.0, 2.0, 1.0], "loss": [0, 1, 2]}
    shown = "both ours 2 s 1 loss 1.000x theirs 4 s 1 loss 2.000x"
    assert capsys.readouterr().out.split() == shown.split()


def test_a_record_is_written_with_what_made_it_and_nothing_without_a_path(tmp_path):
    for path in (None, tmp_path / "x.json"):
        assert not list(tmp_path.iterdir())
        HARNESS["write"](path, {"ratio": 1.5})
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["ratio"] == 1.5 and record["versions"]["torch"] and "commit" in record


def test_a_script_that_fails_is_named_with_its_last_words(tmp_path):
    (tmp_path / "x.py").write_text("import minillm, sys; print('said'); sys.exit(*sys.argv[1:])")
    taken, printed = script(tmp_path / "x.py", folder=tmp_path)
    assert taken > 0 and printed == "said\n"
    with pytest.raises(InputError, match=r"x.py no: no$"):
        script(tmp_path / "x.py", "no", folder=tmp_path)
