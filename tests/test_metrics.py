"""What a run tells: a metrics file that reads as if the run had never stopped, the plot, the trackers."""

import json
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import HERE, fresh_state, open_run

from minillm.errors import InputError
from minillm.run import Run, Runtime
from minillm.tools.folder import read_metrics, save_state
from minillm.tools.plots import plot_loss
from minillm.tools.trackers import Tracker

LAW = settings(max_examples=25)
STEP = {"loss": 2.5, "gradient_norm": 1.25}
FULL = Path("/dev/full")


@contextmanager
def running(folder: Path, at: int | None = None, steps: int = 100, runtime: Runtime = HERE, **options):
    """A run in its loop, new or gone on with from the restart point of step `at`."""
    state = fresh_state()
    if at is not None:
        state.step = at
        save_state(state, folder)
    run = open_run(folder, runtime, resume=at is not None, **options)
    with run.runtime.closing, run.training(state, steps, lambda: None):
        yield run


def log(run: Run, events) -> None:
    for event, step, values in events:
        run.state.step = step
        run.log(event, **values)


# ---- metrics.jsonl

VALUES = st.floats(allow_nan=False) | st.integers() | st.text(max_size=5) | st.none() | st.booleans()
EVENTS = st.lists(
    st.tuples(st.sampled_from(["note", "final"]), st.integers(0, 9), st.dictionaries(st.just("x"), VALUES)),
    max_size=12,
)


@given(EVENTS, st.integers(0, 9), st.booleans(), st.data())
@LAW
def test_a_file_cut_anywhere_goes_on_with_its_whole_lines_up_to_the_restart_point(
    tmp_path_factory, events, step, over, data
):
    """And without the end that was logged, where more steps are to come."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "metrics.jsonl"
    with running(folder) as run:
        log(run, [("note", step, {}), *events])
    first, *rest = path.read_bytes().splitlines(keepends=True)
    content = b"".join(rest)
    content = first + content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    whole = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    assert read_metrics(folder) == [json.loads(line) for line in whole]
    with running(folder, at=step, steps=step if over else 100) as run:
        log(run, [("val", step, {"loss": 1.0})])
    read = [(line, json.loads(line)) for line in whole]
    kept = [line for line, e in read if e["step"] <= step and (over or e["event"] != "final")]
    last = {"event": "val", "step": step, "loss": 1.0}
    assert path.read_bytes() == b"".join(kept) + f"{json.dumps(last)}\n".encode()


def test_a_line_is_on_its_way_to_the_disk_as_soon_as_it_is_logged_and_the_latest_of_a_kind_is_at_hand(
    tmp_path,
):
    with running(tmp_path) as run:
        for step in (1, 2):
            run.log_step(10, **STEP, extra=2.0)
            logged = read_metrics(tmp_path)[-1]
            assert logged.pop("tokens_per_second") > 0
            assert logged == {"event": "train", "step": step, **STEP, "extra": 2.0}
        log(run, [("val", 2, {"loss": 3.0}), ("val", 3, {"loss": 2.0})])
        assert run.metric("val", "loss") == 2.0
        with pytest.raises(InputError, match=r"metrics.jsonl.*no val with its kl"):
            run.metric("val", "kl")
    with running(tmp_path, at=2) as run:
        assert run.metric("val", "loss") == 3.0


def test_the_other_processes_write_and_say_nothing(tmp_path, capsys):
    with running(tmp_path, runtime=Runtime(HERE.device, HERE.dtype, rank=1, world_size=1)) as run:
        run.log("val", "shown", loss=3.0)
        run.say("nothing")
        assert run.metric("val", "loss") == 3.0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line",
    ["{", "5", "[1]", "null", '{"event": "val"}', '{"step": 1}', '{"event": "val", "step": "1"}', "\udcff"],
)
def test_a_damaged_line_is_refused_by_its_file(tmp_path, line):
    content = '{"event": "val", "step": 1}\n' + line + '\n{"event": "val", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8", errors="surrogateescape")
    for read in (lambda: running(tmp_path, at=1).__enter__(), lambda: plot_loss(tmp_path, "loss", "nats")):
        with pytest.raises(InputError, match=r"metrics.jsonl: line 2"):
            read()


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_disk_that_takes_only_a_part_of_a_line_is_told_in_one_line_and_the_run_goes_on_from_before(
    tmp_path, room
):
    with running(tmp_path) as run:
        run.log_step(10, **STEP)
        run.save()
        before = run.path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
        try:
            with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written .*free some space"):
                run.log_step(10, **STEP)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert run.path.stat().st_size == len(before) + room
    with running(tmp_path, at=1) as run:
        assert run.path.read_bytes() == before


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_disk_that_takes_nothing_is_told_in_one_line(tmp_path):
    refused = pytest.raises(InputError, match=r"metrics.jsonl: cannot be written .No space left")
    with running(tmp_path) as run, open(FULL, "ab", buffering=0) as run.file, refused:
        run.log_step(1, **STEP)


# ---- The plot


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_plot_is_a_png_whatever_was_logged(tmp_path, steps, recwarn):
    with running(tmp_path) as run:
        for _ in range(steps):
            run.log_step(1, **STEP)
            run.log("val", loss=1.0)
    plot_loss(tmp_path, "loss", "nats")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]


# ---- Trackers

NAMES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


class Library:
    """Stands for either library: remembers what was opened, and every number."""

    def __init__(self) -> None:
        self.opened, self.told, self.closed, self.failing = [], [], 0, False

    def init(self, **how):
        self.opened.append(how)
        return self

    def SummaryWriter(self, place, purge_step=None):
        Path(place).mkdir(exist_ok=True)
        Path(place, f"events.out.tfevents.{len(self.opened)}").write_text("steps")
        return self.init(purge_step=purge_step)

    def add_text(self, name, text):
        self.opened[-1]["config"] = json.loads(text)

    def log(self, values, step):
        for name, value in values.items():
            self.add_scalar(name, value, step)

    def add_scalar(self, name, value, step):
        if self.failing:
            raise ConnectionError("no network\nat all")
        self.told.append((name, value, step))

    def close(self):
        self.closed += 1

    finish = close


@pytest.fixture
def library(monkeypatch) -> Library:
    made = Library()
    for module in NAMES.values():
        monkeypatch.setitem(sys.modules, module, made)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_is_told_every_number_once_and_sees_one_run_whatever_happens_to_it(tmp_path, library, name):
    with running(tmp_path, tracker=name) as run:
        log(run, [("train", 1, STEP), ("note", 1, {"x": 1.0, "y": "no number"})])
    assert library.closed == 1 and library.opened[0]["config"]["tracker"] == name
    assert library.told == [
        ("train/loss", 2.5, 1), ("train/gradient_norm", 1.25, 1), ("note/x", 1.0, 1),
    ]  # fmt: skip
    with running(tmp_path, at=1, tracker=name) as run:
        run.finish()
    with running(tmp_path, at=1, steps=1, tracker=name):
        pass
    assert len(library.opened) == 2, "a finished run has nothing to tell"
    with running(tmp_path, tracker=name, overwrite=True):
        pass
    first, second, third = library.opened
    if name == "wandb":
        assert first["id"] == second["id"] != third["id"] and second["resume"] == "allow"
    else:
        assert [how["purge_step"] for how in library.opened] == [None, 2, None]
        assert os.listdir(tmp_path / "tensorboard") == ["events.out.tfevents.2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_fails_ends_no_run_and_says_so_once(tmp_path, library, name, capsys):
    with running(tmp_path, tracker=name) as run:
        library.failing = True
        log(run, [("train", 1, STEP), ("train", 2, STEP)])
    assert len(read_metrics(tmp_path)) == 2
    assert capsys.readouterr().err.count("no network") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_cannot_be_opened_is_refused_in_one_line_and_costs_no_run(tmp_path, monkeypatch, name):
    with running(tmp_path) as run:
        run.log_step(1, **STEP)
    before = run.path.read_bytes()
    monkeypatch.setitem(sys.modules, NAMES[name], None)
    with pytest.raises(InputError, match=f"--tracker {name}.*pip install {name}"):
        running(tmp_path, tracker=name, overwrite=True).__enter__()
    assert run.path.read_bytes() == before
    with pytest.raises(KeyError):
        Tracker("another")
