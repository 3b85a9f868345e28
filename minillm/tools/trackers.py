"""Metrics for tensorboard and wandb, beside metrics.jsonl; a resumed run goes on in the same place.

What a tracker is told is told once: after a kill a run repeats the steps since its restart point, and those
that the tracker has already are hidden (tensorboard) or passed over (wandb). One that fails ends no run.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.errors import InputError, reason_of
from minillm.io.disk import read_json
from minillm.tools.streams import printable

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker:
    """One of them, by its name. InputError where it is not installed."""

    def __init__(self, name: str) -> None:
        self.name, module = name, MODULES[name]
        try:
            self.library = importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"--tracker {name}: {error}; pip install {name}, or leave it out") from error

    def open(self, folder: Path, step: int) -> None:
        """Before `log`: the run folder, with its run.json, and the step that is done."""
        run = read_json(folder / "run.json")
        try:
            if self.name == "wandb":
                how = {"config": run["options"], "id": run.get("id"), "resume": "allow"}
                opened = self.library.init(project="minillm", name=printable(folder.name), **how)
                self.send, self.end = opened.log, opened.finish
            else:
                place, hidden = str(folder / "tensorboard"), step + 1 if step else None
                writer = self.library.SummaryWriter(place, purge_step=hidden)
                writer.add_text("options", json.dumps(run["options"]))
                self.send = lambda values, step: [writer.add_scalar(*one, step) for one in values.items()]
                self.end = writer.close
        except Exception as error:  # no network, no login, no space: theirs, whatever it is
            hint = "mend that, or leave it out"
            raise InputError(f"--tracker {self.name}: {reason_of(error)}; {hint}") from error

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, under the name of its event."""
        values = {f"{record['event']}/{name}": value for name, value in record.items()
                  if name != "step" and isinstance(value, int | float)}  # fmt: skip
        self._tell(self.send, values, step=record["step"])

    def close(self) -> None:
        self._tell(self.end)

    def _tell(self, call: Callable[..., Any], *what: Any, **more: Any) -> None:
        try:
            call(*what, **more)
        except Exception as error:
            print(f"--tracker {self.name}: {reason_of(error)}; the run goes on without it", file=sys.stderr)
            self.send = self.end = lambda *_, **__: None
