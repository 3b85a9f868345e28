"""Metrics for tensorboard and wandb, beside metrics.jsonl; a resumed run goes on in the same place.

A tracker has `log(values, step)` and `close()`. What it is told is told once: after a kill a run repeats
the steps since its restart point, and those that the tracker has already are hidden or passed over.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from minillm.errors import InputError, printable, reason_of


@runtime_checkable
class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


Opener = Callable[[Path, dict[str, Any], int], Tracker]
"""(run folder, what run.json holds, the step after which it logs) → tracker."""


def find_tracker(name: str) -> Opener:
    """The tracker of a name, "tensorboard" or "wandb". InputError where it is not installed."""
    opener: Any = {"tensorboard": TensorBoard, "wandb": Wandb}[name]
    try:
        library = importlib.import_module(opener.module)
    except ImportError as error:
        raise InputError(f"--tracker {name}: {error}; pip install {name}, or leave it out") from error

    def open_tracker(folder: Path, run: dict[str, Any], step: int) -> Tracker:
        try:
            return opener(library, folder, run, step)
        except Exception as error:  # no network, no login, no space: theirs, whatever it is
            raise InputError(f"--tracker {name}: {reason_of(error)}; mend that, or leave it out") from error

    return open_tracker


class TensorBoard:
    """Event files in the run folder."""

    module = "torch.utils.tensorboard"

    def __init__(self, library: Any, folder: Path, run: dict[str, Any], step: int) -> None:
        # What an earlier file holds of later steps is hidden.
        self.writer = library.SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )
        self.writer.add_text("options", json.dumps(run["options"]))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run on the server, under the id of the run folder; it takes no step twice."""

    module = "wandb"

    def __init__(self, library: Any, folder: Path, run: dict[str, Any], step: int) -> None:
        self.run = library.init(
            project="minillm", name=printable(folder.name), config=run["options"], id=run.get("id"),
            resume="allow",
        )  # fmt: skip

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
