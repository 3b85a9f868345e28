"""The short forms of torture.py and fuzz.py, and that they notice what is wrong."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from runs import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and tmpfs")


def short(tmp_path: Path, name: str, *options: str) -> dict:
    """The record of a tool's short form."""
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / name), "--json", str(record), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(record.read_text())


@pytest.fixture
def torture(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    import torture

    return torture


def test_stages_that_meet_accidents_end_as_they_would_have_in_peace(tmp_path):
    record = short(tmp_path, "tests/torture.py", "--trials", "4", "--stages", "train", "sample")
    assert record["same"] == record["trials"] == 4 and record["failures"] == []
    assert sum(own["trials"] for own in record["stages"].values()) == 4


def test_whatever_comes_ends_well_or_in_one_line(tmp_path):
    record = short(tmp_path, "tests/fuzz.py", "--cases", "80")
    assert record["kinds"] == {"files": 20, "commands": 20, "templates": 20, "page": 20}


def test_a_project_differs_by_any_byte_but_times_and_ids(tmp_path, torture):
    run = {"id": "a", "options": {"seed": 1, "resume": False}}
    files = {"run.json": run, "metrics.jsonl": {"step": 1, "loss": 0.5, "seconds": 2.0}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    before = torture.contents(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run | {"id": "b"}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(files["metrics.jsonl"] | {"seconds": 3.0}))
    assert torture.contents(tmp_path) == before
    (tmp_path / ".run.json.tmp").touch()
    assert torture.contents(tmp_path) != before
    (tmp_path / ".run.json.tmp").unlink()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(files["metrics.jsonl"] | {"loss": 0.6}))
    assert torture.contents(tmp_path) != before


@pytest.mark.parametrize(
    ("code", "said", "accident", "wrong"),
    [
        (0, "", {}, False),
        (1, "Traceback (most recent call last)", {}, True),
        (0, "Traceback (most recent call last)", {}, True),
        (2, "error: a: no", {}, True),
        (2, "error: a: no", {"what": "full", "room": 9}, False),
        (2, "error: a: no\nerror: b: no", {"what": "full", "room": 9}, True),
        (-9, "", {"number": 9}, False),
        (143, "", {"number": 15}, False),
        (130, "", {"number": 15}, False),  # a loop that was stopped says how to go on
        (143, "", {"number": 1}, True),
        (-11, "", {"number": 9}, True),
        (124, "", {"number": 9}, True),  # it hung, and was ended
    ],
)
def test_a_process_may_end_with_its_work_done_by_the_signal_or_by_the_disk(
    torture, code, said, accident, wrong
):
    assert bool(torture.fault("train", torture.End(code, said), torture.Accident(**accident))) == wrong


def test_a_lesson_may_say_that_its_stage_was_ended_by_the_signal(torture):
    told = torture.End(2, "error: train.py: interrupted")
    assert not torture.fault("lesson", told, torture.Accident("SIGINT", 2, after=6.0))
    assert torture.fault("lesson", told, torture.Accident())
    assert torture.fault("train", told, torture.Accident("SIGINT", 2, after=6.0))


def test_a_trial_can_be_had_again(torture):
    known = torture.End(operations=50, seconds=2.0)
    draws = [[torture.accident(random.Random(seed), known, 9000, True) for seed in range(200)] for _ in "ab"]
    assert draws[0] == draws[1] and len({one.what for one in draws[0]}) == 7
