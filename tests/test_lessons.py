"""The lessons: verdicts that can fail, a table that says what was measured, records that add up over seeds.

That each lesson runs on the demo's runs is seen in .ci/run, behind the small demo.
"""

import importlib.util
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest
from matplotlib.figure import Figure
from runs import ROOT

LESSONS = ROOT / "lessons"
FILES = sorted(LESSONS.glob("[0-9]*.py"))
RECORDS = LESSONS / "records"
LONGEST, ALL = 148, 2_056  # lines of a lesson, and of all with common.py
NAMES = [file.stem for file in FILES]


def lesson(name: str) -> ModuleType:
    """The module of a lesson, beside which common.py is found."""
    spec = importlib.util.spec_from_file_location(name, LESSONS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LESSONS)
        spec.loader.exec_module(module)
    return module


def record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text())


def figures_of(name: str) -> dict[str, float]:
    """Names of the figures of a lesson, from its record."""
    return next(iter(record(name)["seeds"].values()))["figures"]


COMMON = lesson("common")
MEASURED = [name for name in NAMES if (RECORDS / f"{name}.json").exists()]


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_says_its_claim_its_command_and_what_would_refute_it_on_one_page(name):
    text = (LESSONS / f"{name}.py").read_text()
    doc = lesson(name).__doc__
    assert doc.split("\n\n")[0].endswith(".")
    assert f"\n    python lessons/{name}.py\n" in doc
    assert "What would refute the claim:" in doc
    assert len(text.splitlines()) <= LONGEST


def test_all_lessons_are_read_in_an_hour():
    assert sum(len(file.read_text().splitlines()) for file in LESSONS.glob("*.py")) <= ALL


@pytest.mark.parametrize("name", MEASURED)
def test_every_check_of_a_verdict_can_pass_and_can_fail(name):
    verdict, rng, seen = lesson(name).verdict, random.Random(0), dict[str, set[bool]]()
    measured = [one["figures"] for one in record(name)["seeds"].values()]
    for i in range(4000):  # figures anywhere, and near those that were measured
        if i % 2:
            figures = {key: rng.random() for key in measured[0]}
        else:
            figures = {key: value * rng.uniform(0.5, 1.5) for key, value in rng.choice(measured).items()}
        for check, passed in verdict(figures).items():
            seen.setdefault(check, set()).add(bool(passed))
    assert seen and all(outcomes == {True, False} for outcomes in seen.values()), seen


@pytest.mark.parametrize("name", MEASURED)
def test_a_record_says_what_its_figures_say_and_names_what_made_it(name):
    one, module = record(name), lesson(name)
    seeds = [own["figures"] for _, own in sorted(one["seeds"].items())]
    assert {key: one[key] for key in ("verdict", "checks")} == COMMON.conclusion(module.verdict, seeds)
    assert one["sentence"] == module.sentence(seeds) and one["lesson"] == name
    assert one["claim"] == " ".join(module.__doc__.split("\n\n")[0].split())
    assert len(one["seeds"]) >= 3
    assert all({"of", "seconds", "commit", "cpu", "versions"} <= own.keys() for own in one["seeds"].values())


@pytest.mark.parametrize("name", MEASURED)
def test_a_record_was_measured_by_the_experiment_as_it_is(name):
    for own in record(name)["seeds"].values():
        command = ["git", "show", f"{own['commit']}:lessons/{name}.py"]
        then = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if then.returncode:
            pytest.skip("a clone without its history")
        assert not own["dirty"]
        assert COMMON.decisive(then.stdout) == COMMON.decisive((LESSONS / f"{name}.py").read_text())


@pytest.mark.parametrize("name", MEASURED)
def test_a_picture_shows_every_seed_it_is_given(name):
    module, axes = lesson(name), Figure().add_subplot()
    module.picture(axes, [figures_of(name)])
    assert axes.lines or axes.patches


def test_the_readme_has_the_table_of_the_records(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["common.py", str(RECORDS)])
    runpy.run_path(str(LESSONS / "common.py"), run_name="__main__")
    table = capsys.readouterr().out.strip()
    assert table in (LESSONS / "README.md").read_text()
    assert [line.split("]")[0][3:] for line in table.splitlines()[2:]] == MEASURED


def test_the_rows_that_the_projects_readme_shows_are_those_of_the_table():
    text = (ROOT / "README.md").read_text().replace("](lessons/", "](")
    shown = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(shown) == 5
    table = (LESSONS / "README.md").read_text().splitlines()
    assert all(line in table for line in shown)


# ---- What every lesson does with its figures

TINY = '''"""A number is
what it is.
"""
from common import teach

def experiment(options):
    print("measured")
    return {{"number": {figure} + options.seed}}

def verdict(one):
    return {{"small": one["number"] < 2, "positive": one["number"] > 0}}

def sentence(seeds):
    return "said"

def picture(axes, seeds):
    axes.plot([one["number"] for one in seeds], label="number")

if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch, capsys):
    """Runs a lesson of one number; what it printed, and its record."""
    monkeypatch.syspath_prepend(LESSONS)
    for stage in ("base", "sft", "rlhf/ppo"):
        (tmp_path / "runs" / stage).mkdir(parents=True)
        (tmp_path / "runs" / stage / "run.json").write_text(json.dumps({"id": stage}))

    def run(*words: object, figure: float = 1) -> tuple[str, dict]:
        file = tmp_path / "00_tiny.py"
        file.write_text(TINY.format(figure=figure))
        command = [file, "--runs", tmp_path / "runs", "--out", tmp_path / "out", *words]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        runpy.run_path(str(file), run_name="__main__")
        record = tmp_path / "out" / ("quick" if "--quick" in words else "") / "00_tiny.json"
        return capsys.readouterr().out, json.loads(record.read_text())

    run.folder = tmp_path
    return run


def test_seeds_add_up_and_the_verdict_is_of_all(tiny):
    said, one = tiny()
    assert said.startswith("A number is what it is.\nmeasured\n") and said.endswith("holds: said (seeds 0)\n")
    said, two = tiny("--seed", 1)
    assert two["verdict"] == "holds in part" and two["checks"] == {"small": False, "positive": True}
    assert {seed: own["figures"]["number"] for seed, own in two["seeds"].items()} == {"0": 1, "1": 2}
    assert two["seeds"]["0"] == one["seeds"]["0"] and "1.5 (1–2)" in said
    assert (tiny.folder / "out" / "00_tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_a_seed_is_measured_again_where_the_runs_or_the_lesson_changed_and_only_there(tiny):
    tiny()
    assert "measured" not in tiny()[0]
    assert "measured" in tiny("--quick")[0]  # which is no measurement, and kept apart
    said, one = tiny(figure=-1)
    assert "measured" in said and one["verdict"] == "holds in part"
    assert "measured" not in tiny(figure=-1)[0]
    (tiny.folder / "runs" / "sft" / "run.json").write_text(json.dumps({"id": "another"}))
    assert "measured" in tiny(figure=-1)[0]


def test_a_lesson_without_the_demos_runs_says_how_to_make_them(tmp_path):
    command = [sys.executable, FILES[0], "--runs", tmp_path / "none", "--out", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert (
        done.stderr
        == f"error: {tmp_path}/none/base: no such run; make demo makes it, or name its folder with --runs\n"
    )


# ---- How a lesson ends


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_while_a_lesson_imports_torch_ends_in_one_word(tmp_path, name):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, LESSONS / f"{name}.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"interrupted\n" and process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_lesson_takes_its_stage_along(tmp_path, number):
    os.mkfifo(tmp_path / "held")
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import sys, time\nheld = open(sys.argv[1], 'w')\nprint(1, file=held, flush=True)\ntime.sleep(60)"
    )
    said = f"sys.path.insert(0, {str(LESSONS)!r}); from common import script; script(*sys.argv[1:])"
    killed = subprocess.Popen([sys.executable, "-c", f"import sys; {said}", stage, tmp_path / "held"])
    with open(tmp_path / "held") as held:
        assert held.read(2) == "1\n"
        began = time.monotonic()
        killed.send_signal(number)
        assert held.read() == ""  # nobody has it open any more
        assert time.monotonic() - began < 30
    assert killed.wait() < 0 or killed.returncode == 128 + number
