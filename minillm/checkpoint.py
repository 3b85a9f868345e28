"""Run folders: what a run leaves on disk, written so that no crash can spoil it.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json    huggingface.py
    run.json                  every option, the seed, versions, commit and hardware
    metrics.jsonl  loss.png   what happened (metrics.py)
    resume/state.safetensors  all that an exact restart needs, in one file

Every file is written whole or not at all (files.py). The restart state is a single one, so that
weights, optimizer and position can never belong to different steps. No pickle anywhere.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from minillm.errors import InputError
from minillm.files import write_json
from minillm.io.huggingface import load_weights, read_tensors, write_tensors
from minillm.optim import Optimizers
from minillm.provenance import provenance


@runtime_checkable
class Stateful(Protocol):
    """A stream that can be stopped at any batch and continued: its state is JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


RESUME_FILE = Path("resume") / "state.safetensors"
RUN_FILES = (
    RESUME_FILE, "metrics.jsonl", "loss.png", "samples.txt", "report.json", "report.png", "curves.png",
    "responses.jsonl", "config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "run.json",
)  # fmt: skip


def check_run_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuses to mix two runs in one folder, before anything is computed or written."""
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        if not nearest.is_dir():
            raise InputError(f"{nearest}: is a file; give --out a folder")
        visible = [entry for entry in folder.iterdir() if entry.name[0] != "."] if nearest == folder else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be used ({error.strerror}); give another --out") from error
    for name in RUN_FILES:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: is a folder where a run has a file; move it away")
    if resume or not visible:
        return
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: holds files that are not a run's; give another --out")
    if not overwrite:
        raise InputError(
            f"{folder}: already holds a run; add --resume to go on with it, "
            "--overwrite to replace it, or give another --out"
        )


def start_run_folder(folder: Path, options: dict[str, Any], stage: str) -> None:
    """Removes the files of an earlier run, nothing that a run did not write, and says what starts."""
    for name in RUN_FILES:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{folder / name}: cannot be removed ({error.strerror}); give another --out"
            ) from error
    write_json(folder / "run.json", {"stage": stage, "options": options, **provenance()})


@dataclass
class TrainingState:
    """Everything that moves while a model trains, and therefore all that a restart must bring back."""

    model: nn.Module
    optimizers: Optimizers
    data: Stateful
    """The stream of batches."""
    step: int = 0
    """Updates done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Time spent training, over all the sittings of the run."""

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def save(self, folder: Path) -> None:
        """Writes the restart file."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, value in self.optimizers.state_tensors().items():
            tensors[f"optimizer.{name}"] = value
        numbers = {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "moved": self.optimizers.moved(), "data": self.data.state_dict(),
        }  # fmt: skip
        # A copy each: safetensors refuses tensors that share memory, as tied weights do.
        separate = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        write_tensors(folder / RESUME_FILE, separate, {"state": json.dumps(numbers)})

    def restore(self, folder: Path) -> None:
        """Brings everything back; data that has changed since is refused by name."""
        path = folder / RESUME_FILE
        tensors, metadata = read_tensors(path)
        try:
            numbers = json.loads(metadata["state"])
            self.step, self.tokens = int(numbers["step"]), int(numbers["tokens"])
            self.seconds = float(numbers["seconds"])
            self.data.load_state_dict(numbers["data"])
            if min(self.step, self.tokens, self.seconds) < 0:
                raise ValueError("negative counts")
            self.optimizers.load_state_tensors(_with_prefix("optimizer.", tensors), numbers["moved"])
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{path}: is not a restart point of this run; use --overwrite") from error
        load_weights(self.model, _with_prefix("model.", tensors), path)


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
