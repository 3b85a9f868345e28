"""What a run tells while it goes on and leaves behind: the bar, metrics.jsonl, the plot, a tracker.

metrics.jsonl holds one JSON object a line, each with its "event" and "step", flushed as it is
written. A resumed run drops the lines beyond the step it restarts from, so the file reads as if the
run had never stopped.
"""

import contextlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from minillm.errors import InputError
from minillm.files import write_atomically, write_text
from minillm.runtime import Runtime


@runtime_checkable
class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes the metrics of one run; in any but the main process it only remembers them."""

    def __init__(
        self, folder: Path, steps: int, resume_step: int, tracker: Tracker | None, runtime: Runtime
    ) -> None:
        self.path, self.tracker, self.writes = folder / "metrics.jsonl", tracker, runtime.is_main
        self.kept = [event for event in read_metrics(folder) if event["step"] <= resume_step]
        self.latest = {event["event"]: event for event in self.kept}
        self.figures: dict[str, str] = {}
        self.bar = tqdm(
            total=steps, initial=resume_step, unit="step", dynamic_ncols=True, disable=not self.writes
        )

    def __enter__(self) -> "Metrics":
        if self.writes:
            lines = "".join(json.dumps(event) + "\n" for event in self.kept)
            write_text(self.path, lines)
            # Unbuffered: a line is on its way to the disk when written, and none is left to close().
            self.file = open(self.path, "ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writes:
            self.file.close()
        if self.tracker:
            self.tracker.close()

    def log(self, event: str, step: int, **values: Any) -> None:
        """Appends one line; numbers also go to the tracker."""
        record = {"event": event, "step": step, **values}
        self.latest[event] = record
        if not self.writes:
            return
        try:
            self.file.write(f"{json.dumps(record)}\n".encode())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); free some space and --resume"
            ) from error
        if self.tracker:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self.tracker.log(numbers, step)

    def show(self, step: int, **figures: str) -> None:
        """Moves the bar to a step, with the latest figures at its end."""
        self.figures |= figures
        self.bar.set_postfix_str(", ".join(self.figures.values()), refresh=False)
        self.bar.update(step - self.bar.n)

    def last(self, event: str) -> dict[str, Any] | None:
        """The latest record of a kind."""
        return self.latest.get(event)

    def figure(self, event: str, name: str) -> float:
        """A figure of the latest record of a kind. InputError where a damaged file has none."""
        found = self.latest.get(event, {}).get(name)
        if found is None:
            raise InputError(f"{self.path}: no {event} with its {name}; restore it or --overwrite")
        return found

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.writes:
            self.bar.write(text)

    def sync(self) -> None:
        """Makes sure that what was logged is on the disk, before a checkpoint counts on it."""
        os.fsync(self.file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a last line torn by a crash is left out.

    Raises InputError for a file that cannot be read or holds anything but events.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it or --overwrite") from error
    return [_event(path, number, line) for number, line in enumerate(lines, start=1)]


def _event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line of metrics.jsonl; in those of training and validation every figure is a number."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(line):
            case {"event": "train" | "val", "step": int(), **figures} as event:
                if all(map(_is_number, (event["step"], *figures.values()))):
                    return event
            case {"event": str(), "step": int()} as event:
                return event
    raise InputError(f"{path}: line {number} is no event; restore the file or --overwrite")


def _is_number(value: object) -> bool:
    """Whether a value can be plotted."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def plot_loss(folder: Path, key: str, unit: str) -> None:
    """loss.png: what training and validation events hold under `key`, over the steps."""
    from matplotlib.figure import Figure  # a second of import that only the end of a run needs

    events = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for event, style in (("train", "-"), ("val", "o-")):
        points = [(e["step"], e[key]) for e in events if e["event"] == event and key in e]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=event, markersize=3)
    axes.set(xlabel="step", ylabel=unit, title=f"loss of {folder.name}")
    if axes.lines:
        axes.legend()
    write_atomically(folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=120))


def plot_policy(folder: Path) -> None:
    """curves.png: what a policy gained over the steps, and over √KL how far it went for that.

    As long as the reward model is right, score and rubric rise together; where it is exploited, the score
    goes on rising while the rubric falls (Gao et al. 2023, arXiv 2210.10760, figure 1: both over √KL).
    """
    from matplotlib.figure import Figure

    events = read_metrics(folder)
    figure = Figure(figsize=(10, 7), layout="constrained")
    for number, keys in enumerate(POLICY_CURVES, start=1):
        axes = figure.add_subplot(2, 2, number)
        for event, style in (("train", "-"), ("val", "o-")):
            for color, key in enumerate(keys):
                points = [(e["step"], e[key]) for e in events if e["event"] == event and key in e]
                if points:
                    label = key if event == "train" else f"{key}, held out"
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label, markersize=3)
        axes.set(xlabel="step")
        if axes.lines:
            axes.legend(fontsize=8)
    axes = figure.add_subplot(2, 2, 4)
    for key in ("score", "rubric"):
        points = [
            (max(0, e["kl"]) ** 0.5, e[key])
            for e in events
            if e["event"] == "val" and {"kl", key} <= e.keys()
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{key}, held out", markersize=3)
    axes.set(xlabel="√KL to the reference, nats a response")
    if axes.lines:
        axes.legend(fontsize=8)
    write_atomically(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=120))


POLICY_CURVES = (("score", "rubric"), ("kl", "length"), ("entropy", "explained_variance", "clip_share"))
"""What is drawn over the steps, one panel each."""


def open_tracker(name: str, folder: Path, options: dict[str, Any]) -> Tracker | None:
    """A tracker by name: "none", "tensorboard" (into the run folder) or "wandb"."""
    if name == "none":
        return None
    openers: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    try:
        return openers[name](folder, options)
    except ImportError as error:
        raise InputError(f"--tracker {name}: {error}; pip install {name}, or leave it out") from error


class TensorBoard:
    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(folder / "tensorboard"))
        self.writer.add_text("options", json.dumps(options))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(project="minillm", name=folder.name, config=options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
