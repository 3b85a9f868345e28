"""Metrics for tensorboard and wandb, beside metrics.jsonl; a resumed run goes on in the same place.

What a tracker is told is told once: after a kill a run repeats the steps since its restart point, and those
that the tracker has already are hidden or passed over. One that fails ends no run.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.errors import InputError, reason_of
from minillm.tools.streams import printable

Opened = tuple[Callable[..., Any], Callable[..., Any]]
"""What takes the numbers of a step, as (values by name, step), and what is called at the end."""


def open_tensorboard(library: Any, folder: Path, run: dict[str, Any], step: int) -> Opened:
    """Event files in the run folder; what an earlier one holds of later steps is hidden."""
    writer = library.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
    writer.add_text("options", json.dumps(run["options"]))

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def open_wandb(library: Any, folder: Path, run: dict[str, Any], step: int) -> Opened:
    """A run on the server, under the id of the run folder; it takes no step twice."""
    opened = library.init(
        project="minillm", name=printable(folder.name), config=run["options"], id=run.get("id"),
        resume="allow",
    )  # fmt: skip
    return lambda values, step: opened.log(values, step=step), opened.finish


class Tracker:
    """One of them, by its name. InputError where it is not installed."""

    def __init__(self, name: str) -> None:
        modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
        self.name, self.begin = name, {"tensorboard": open_tensorboard, "wandb": open_wandb}[name]
        try:
            self.library = importlib.import_module(modules[name])
        except ImportError as error:
            raise InputError(f"--tracker {name}: {error}; pip install {name}, or leave it out") from error

    def open(self, folder: Path, run: dict[str, Any], step: int) -> None:
        """Before `log`: the run folder, what run.json holds, and the step that is done."""
        try:
            self.send, self.end = self.begin(self.library, folder, run, step)
        except Exception as error:  # no network, no login, no space: theirs, whatever it is
            hint = "mend that, or leave it out"
            raise InputError(f"--tracker {self.name}: {reason_of(error)}; {hint}") from error

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, under the name of its event."""
        values = {f"{record['event']}/{name}": value for name, value in record.items()
                  if name != "step" and isinstance(value, int | float)}  # fmt: skip
        self._tell(self.send, values, record["step"])

    def close(self) -> None:
        self._tell(self.end)

    def _tell(self, call: Callable[..., Any], *what: Any) -> None:
        try:
            call(*what)
        except Exception as error:
            print(f"--tracker {self.name}: {reason_of(error)}; the run goes on without it", file=sys.stderr)
            self.send = self.end = lambda *_: None
