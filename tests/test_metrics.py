"""What a run tells: a metrics file that reads as if the run had never stopped, the plot, the trackers."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import InputError
from minillm.run import Metrics, Runtime, read_metrics
from minillm.tools.plots import plot_loss
from minillm.tools.trackers import find_tracker

MAIN = Runtime(torch.device("cpu"), torch.float32)
LAW = settings(deadline=None, max_examples=25)
TRAIN = {"loss": 2.5, "nats_per_byte": 1.25, "tokens_per_second": 1000.0}


@contextmanager
def metrics_of(folder: Path, resume_step: int = 0, steps: int = 100, runtime: Runtime = MAIN):
    with Metrics(folder, steps, resume_step, runtime) as metrics:
        yield metrics


def refusal(action, *arguments) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(InputError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- metrics.jsonl

NUMBERS = st.floats(allow_nan=False) | st.integers() | st.text(max_size=5) | st.none() | st.booleans()
EVENTS = st.lists(
    st.tuples(st.sampled_from(["sample", "note"]), st.integers(0, 9), st.dictionaries(st.just("x"), NUMBERS)),
    max_size=12,
)


def write(folder: Path, events, resume_step: int = 0) -> None:
    with metrics_of(folder, resume_step) as metrics:
        for name, step, values in events:
            metrics.log(name, step, nats_per_byte=1.0, **values)


@given(EVENTS, st.integers(0, 9))
@LAW
def test_resuming_keeps_the_lines_up_to_its_step_byte_for_byte_and_drops_the_rest(
    tmp_path_factory, events, step
):
    folder = tmp_path_factory.mktemp("run")
    write(folder, events)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    write(folder, [], resume_step=step)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    assert (folder / "metrics.jsonl").read_bytes() == b"".join(kept)
    assert read_metrics(folder) == [json.loads(line) for line in kept]


@given(EVENTS, st.data())
@LAW
def test_a_file_cut_anywhere_gives_its_whole_lines(tmp_path_factory, events, data):
    folder = tmp_path_factory.mktemp("run")
    write(folder, events)
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    cut = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(cut)
    whole = cut[: cut.rfind(b"\n") + 1]
    assert read_metrics(folder) == [json.loads(line) for line in whole.splitlines()]
    write(folder, [("val", 9, {})], resume_step=9)
    assert path.read_bytes().startswith(whole)
    assert read_metrics(folder)[-1] == {"event": "val", "step": 9, "nats_per_byte": 1.0}


def test_a_stopped_and_resumed_run_leaves_the_file_of_an_unbroken_one(tmp_path):
    events = [("train", step, TRAIN) for step in range(1, 9)]
    for folder, parts in (("whole", [(0, events)]), ("broken", [(0, events[:6]), (4, events[4:])])):
        for resume_step, part in parts:
            with metrics_of(tmp_path / folder, resume_step) as metrics:
                for name, step, values in part:
                    metrics.log(name, step, **values)
    whole, broken = ((tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("whole", "broken"))
    assert whole == broken


def test_every_line_is_on_its_way_to_the_disk_as_soon_as_it_is_logged(tmp_path):
    with metrics_of(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log("train", step, **TRAIN)
            assert read_metrics(tmp_path)[-1] == {"event": "train", "step": step, **TRAIN}
            metrics.sync()


def test_the_latest_of_each_kind_is_remembered_and_survives_a_restart(tmp_path):
    with metrics_of(tmp_path) as metrics:
        metrics.log("val", 1, nats_per_byte=3.0)
        metrics.log("val", 2, nats_per_byte=2.0)
        assert metrics.last("val")["nats_per_byte"] == 2.0
        assert metrics.last("final") is None
    with metrics_of(tmp_path, resume_step=1) as metrics:
        assert metrics.last("val")["nats_per_byte"] == 3.0


def test_the_other_processes_write_nothing(tmp_path):
    with metrics_of(tmp_path, runtime=Runtime(MAIN.device, MAIN.dtype, rank=1, world_size=2)) as metrics:
        metrics.log("val", 1, nats_per_byte=3.0)
        metrics.say("nothing")
        assert metrics.last("val")["step"] == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["{", "5", "[1]", "null", '{"event": "val"}', '{"step": 1}', '{"event": "val", "step": "1"}', "\udcff"],
)
def test_a_damaged_line_is_refused_by_its_file(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = '{"event": "val", "step": 1}\n' + line + '\n{"event": "val", "step": 2}\n'
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert str(path) in refusal(Metrics, tmp_path, 10, 5, MAIN)
    assert str(path) in refusal(plot_loss, tmp_path, "loss", "nats")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_one_line(tmp_path):
    metrics = Metrics(tmp_path, 10, 0, MAIN).__enter__()
    metrics.file.close()
    metrics.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (metrics closes it)
    message = refusal(lambda: metrics.log("train", 1, **TRAIN))
    metrics.__exit__()
    assert "metrics.jsonl" in message and "space" in message


# ---- The plot


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_plot_is_a_png_whatever_was_logged(tmp_path, steps, recwarn):
    with metrics_of(tmp_path) as metrics:
        for step in range(1, steps + 1):
            metrics.log("train", step, **TRAIN)
            metrics.log("val", step, nats_per_byte=1.0)
    plot_loss(tmp_path, "nats_per_byte", "nats per byte")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]


# ---- Trackers


class Recorder:
    """Stands for a run of wandb and for a writer of tensorboard: remembers every call."""

    def __init__(self, *arguments, **options) -> None:
        self.opened, self.calls, self.closed = (arguments, options), [], False

    def log(self, values, step):
        self.calls += [(name, value, step) for name, value in values.items()]

    def add_scalar(self, name, value, step):
        self.calls.append((name, value, step))

    def add_text(self, name, text):
        self.text = text

    def finish(self):
        self.closed = True

    close = finish


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_receives_every_number_under_its_event(tmp_path, monkeypatch, name):
    made = []

    def make(*arguments, **options):
        made.append(Recorder(*arguments, **options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=make))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=make))
    tracker = find_tracker(name)(tmp_path, {"id": "abc", "options": {"depth": 4}}, 0)
    with metrics_of(tmp_path) as metrics:
        metrics.tracker = tracker
        metrics.log("train", 1, **TRAIN)
        metrics.log("val", 2, nats_per_byte=1.0, note="words are no number")
    assert made[0].calls == [
        ("train/loss", 2.5, 1),
        ("train/nats_per_byte", 1.25, 1),
        ("train/tokens_per_second", 1000.0, 1),
        ("val/nats_per_byte", 1.0, 2),
    ]
    assert made[0].closed
    assert "depth" in f"{made[0].opened} {getattr(made[0], 'text', '')}"


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(find_tracker, name)
    assert name in message and "pip install" in message
