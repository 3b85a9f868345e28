"""A run folder: one run's at a time, never two mixed, nothing half-written; and its restart point."""

import errno
import importlib
import itertools
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from minillm.data import check_same
from minillm.digest import digest
from minillm.errors import BAD_FILE, InputError, reading, writing
from minillm.io import disk
from minillm.io.disk import read_json, remove_left, write_json, write_text
from minillm.io.files import parse_specs
from minillm.io.weights import INDEX, SHARDS, SINGLE, cut_like, load_weights, read_tensors, write_tensors
from minillm.optim import Optimizers
from minillm.options import TrainingOptions
from minillm.run import RESUME_FILE, Run, Runtime, TrainingState
from minillm.tools.provenance import provenance

MODEL_FILES = (
    "config.json", SINGLE, INDEX, SHARDS, "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
RUN_FILES = (
    str(RESUME_FILE), "metrics.jsonl", "loss.png", "samples.txt", "report.json", "report.png", "curves.png",
    "responses.jsonl", *MODEL_FILES, "run.json",
)  # fmt: skip
"""What a run leaves, where one is a pattern."""


@contextmanager
def hold(folder: Path, wait: bool) -> Iterator[None]:
    """Makes `folder` and holds it: another process that asks for it waits, or meets a BlockingIOError.

    The lock is the system's. It leaves no file, and goes with the process, however that ends.
    """
    # Windows opens no folder: there it is a file inside, which goes when it is closed.
    inside, how = "", os.O_RDONLY
    if disk.fcntl is None:
        inside, how = ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_TEMPORARY", 0)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / inside, how)
        try:
            lock(handle, wait)
            is_there = False
            with suppress(FileNotFoundError):  # another process may have removed it meanwhile
                is_there = os.path.samestat(os.fstat(handle), os.stat(folder / inside))
            if is_there:
                yield
                return
        finally:
            os.close(handle)


def lock(handle: int, wait: bool) -> None:
    """Keeps an open file, or folder, for this process until it is closed. Where another has it, this waits or
    raises BlockingIOError. A file system without locks has none."""
    while disk.fcntl is None:  # Windows, where nobody can read what is locked: a byte far behind the end
        os.lseek(handle, 2**40, os.SEEK_SET)
        windows = importlib.import_module("msvcrt")
        try:
            windows.locking(handle, windows.LK_NBLCK, 1)
            return
        except OSError:
            if not wait:
                raise BlockingIOError from None
            time.sleep(0.1)
    try:
        disk.fcntl.flock(handle, disk.fcntl.LOCK_EX | (0 if wait else disk.fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


def claim_folder(options: TrainingOptions, runtime: Runtime) -> None:
    """Makes the folder of a run and keeps others out until this process is done; removes what a killed one
    left half-written. InputError, before anything is computed, where two runs would mix."""
    if not runtime.is_main:
        return
    folder, hint = options.folder, "give another --out"
    if re.search("[\ud800-\udfff]", str(folder)):
        raise InputError(f"{folder}: its name is no UTF-8, and no model in it could be opened; {hint}")

    def remove_empty(folders: list[Path]) -> None:
        for made in folders:
            with suppress(OSError):  # what holds something stays
                made.rmdir()

    with writing(folder, hint):
        places = [folder, *folder.parents]
        made = list(itertools.takewhile(lambda place: not os.path.lexists(place), places))
        if not places[len(made)].is_dir():
            raise InputError(f"{places[len(made)]}: is a file; give --out a folder")
        runtime.closing.callback(remove_empty, made)
        try:
            runtime.closing.enter_context(hold(folder, wait=False))
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing there; wait for its end, or {hint}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "its permissions forbid it")
        check_run_folder(folder, options.resume, options.overwrite)
        specs = [*getattr(options, "data", ()), *getattr(options, "text", ())]
        for _, source, _ in parse_specs(specs) if specs else ():
            if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
                what = f"{folder}: is inside {source}, which would hold its files when it is read again"
                raise InputError(f"{what}; {hint}")
        for place in [folder / name for name in RUN_FILES]:
            remove_left(place.parent, place.name)


def check_run_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """InputError unless the folder is empty, or a run's that is to go on or to be replaced."""
    for name in RUN_FILES:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: is a folder where a run has a file; move it away")
    if resume or all(entry.name[0] == "." for entry in folder.iterdir()):
        return
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: holds files that are not a run's; give another --out")
    if not overwrite:
        raise InputError(
            f"{folder}: already holds a run; add --resume to go on with it, "
            "--overwrite to replace it, or give another --out"
        )


def start_run_folder(options: TrainingOptions, stage: str, **more: Any) -> None:
    """Removes the files of an earlier run, nothing that a run did not write, and says what starts, with
    `more` in run.json.

    The restart point goes first and run.json is replaced last: whenever this is interrupted, it can be begun
    again. A model that the new run starts from stays until there is another.
    """
    folder = options.folder
    kept = {"run.json", *(MODEL_FILES if starts_from(options) == os.path.realpath(folder) else ())}
    events = (folder / "tensorboard").glob("events.out.tfevents.*")
    shards = folder.glob(SHARDS) if SHARDS not in kept else ()
    for path in [*(folder / name for name in RUN_FILES if name not in kept), *shards, *events]:
        with writing(path, "give another --out"):
            path.unlink(missing_ok=True)
    run = {"stage": stage, "id": uuid4().hex, "options": asdict(options), **provenance(), **more}
    write_json(folder / "run.json", run)


def begin_folder(run: Run) -> None:
    """Writes run.json of a new run, or into that of a resumed one the options that have changed; and the
    events up to here."""
    if run.runtime.is_main:
        if run.resuming:
            path, options = run.folder / "run.json", asdict(run.options)
            written = read_json(path)
            options |= {name: written["options"].get(name) for name in ("resume", "overwrite", "out")}
            write_json(path, written | {"options": options})
        else:
            start_run_folder(run.options, run.stage)
        write_text(run.path, "".join(json.dumps(event) + "\n" for event in run.logged))
    if not run.resuming and starts_from(run.options) == os.path.realpath(run.folder):
        # The first model that is written replaces the one of --init: from now on it is here.
        save_state(run.state, run.folder)


def read_run(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The stage and the options that run.json of a folder tells of; None and none where it tells nothing."""
    path = folder / "run.json"
    run = read_json(path) if path.exists() else {}
    return run.get("stage"), run["options"] if isinstance(run.get("options"), dict) else {}


def starts_from(options: TrainingOptions) -> str | None:
    """The folder of the model that a run starts from, links followed, where it has one."""
    init = getattr(options, "init", None)
    return os.path.realpath(init) if init else None  # Path.resolve fails in a loop of links


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a last line torn by a crash is left out.

    InputError for a file that cannot be read or holds anything but events; in those of training and
    validation every metric is a number that can be plotted.
    """
    path, hint, events = folder / "metrics.jsonl", "restore the file or --overwrite", []
    with reading(path, hint):
        lines = path.read_bytes().split(b"\n")[:-1] if os.path.lexists(path) else []
    for number, line in enumerate(lines, start=1):
        with reading(f"{path}: line {number}", hint):
            match json.loads(line):
                case {"event": "train" | "val", "step": int(), **metrics} as event if not all(
                    isinstance(metric, float) or (isinstance(metric, int) and abs(metric) < 2**63)
                    for metric in (event["step"], *metrics.values())
                ):
                    raise ValueError("one of its metrics is no number")
                case {"event": str(), "step": int()} as event:
                    events.append(event)
                case _:
                    raise ValueError("it is no event")
    return events


def earlier_events(options: TrainingOptions) -> list[dict[str, Any]] | None:
    """The events of the run that is resumed; None where none is, or where it left no restart point and begins
    anew. InputError where it has none any more."""
    folder = options.folder
    events = read_metrics(folder) if options.resume else []
    if options.resume and (folder / RESUME_FILE).exists():
        return events
    if any(event["event"] == "final" for event in events):
        raise InputError(
            f"{folder}: is finished, and has no {RESUME_FILE} any more; leave it as it is, or --overwrite to "
            "begin anew"
        )
    return None


# ---- What an exact restart needs, in one file


def resume(run: Run) -> None:
    """Goes back to the restart point of a run, and leaves of its events those up to there.

    Those are synced before the restart point is written, so no crash can have lost one.
    """
    restore_state(run.state, run.folder)
    step, hint = run.state.step, "restore it or --overwrite"
    if step and all(event["step"] != step for event in run.logged):
        raise InputError(f"{run.path}: holds no step {step}, where the run goes on; {hint}")
    if step > run.steps:
        raise InputError(f"{run.folder}: has done {step:,} steps already; ask for no fewer")
    ends = "final" if step < run.steps else None
    run.logged = [e for e in run.logged if e["step"] <= step and e["event"] != ends]


def save_state(state: TrainingState, folder: Path) -> None:
    """Writes the restart file, the same for sharded weights as for whole ones."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(state.optimizers).items()}
    numbers = {name: getattr(state, name) for name in ("step", "tokens", "seconds", "held_out")}
    saved = json.dumps(numbers | {"data": state.data.state_dict()})
    metadata = {"state": saved, "seal": _seal(state, saved, tensors)}
    write_tensors(folder / RESUME_FILE, tensors, metadata)


def restore_state(state: TrainingState, folder: Path) -> None:
    """Brings everything back; data that has changed since is refused by name."""
    path = folder / RESUME_FILE
    tensors, metadata = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    try:
        seal = _seal(state, metadata["state"], tensors)
        if metadata.get("seal", seal) != seal:  # the release before wrote none
            raise ValueError("damaged, or of another run")
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        saved = json.loads(metadata["state"])
        state.step, state.tokens, state.seconds = (saved[name] for name in ("step", "tokens", "seconds"))
        state.data.load_state_dict(saved["data"])
        check_same("what is held out", saved.get("held_out", state.held_out), state.held_out)
        load_optimizer_tensors(state.optimizers, parts["optimizer"])
    except BAD_FILE as error:
        raise InputError(f"{path}: is not a restart point of this run; use --overwrite") from error
    load_weights(state.model, parts["model"], path)


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """All state, flat: "<optimizer>.<parameter>.<name>" → tensor. The rates are not state."""
    return {
        f"{i}.{j}.{name}": value
        for i, optimizer in enumerate(optimizers.optimizers)
        for j, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def load_optimizer_tensors(optimizers: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Takes over what `optimizer_tensors` gave; an optimizer that has not stepped yet has no state."""
    states: list[dict[int, dict[str, Tensor]]] = [defaultdict(dict) for _ in optimizers.optimizers]
    for key, value in tensors.items():
        i, j, name = key.split(".")
        states[int(i)][int(j)][name] = value
    for optimizer, state in zip(optimizers.optimizers, states, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state.items():
            state[number] = {name: cut_like(value, parameters[number]) for name, value in values.items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _seal(state: TrainingState, saved: str, tensors: dict[str, Tensor]) -> str:
    """A digest of the numbers, the tensors' names and shapes, and the kinds of optimizers."""
    kinds = [type(optimizer).__name__ for optimizer in state.optimizers.optimizers]
    return digest(saved, kinds, sorted((name, list(value.shape)) for name, value in tensors.items()))
