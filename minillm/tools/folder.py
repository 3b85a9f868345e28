"""Whose a run folder is: one run's at a time, never two mixed, and nothing half-written from a killed one."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from minillm.errors import InputError, writing
from minillm.files import remove_scratch, scratch_of, write_json
from minillm.options import TrainingOptions, options_json
from minillm.tools.provenance import provenance

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MODEL_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
RUN_FILES = (
    Path("resume", "state.safetensors"), "metrics.jsonl", "loss.png", "samples.txt", "report.json",
    "report.png", "curves.png",
    "responses.jsonl", *MODEL_FILES, "run.json",
)  # fmt: skip
SCRATCH = {scratch_of(Path(name)).name for name in RUN_FILES}


@contextlib.contextmanager
def claimed(options: TrainingOptions) -> Iterator[None]:
    """The folder of a run for this process alone. Refuses to mix two runs, before anything is computed."""
    folder = options.folder
    with contextlib.ExitStack() as stack:
        with writing(folder, "give another --out"):
            nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
            if not nearest.is_dir():
                raise InputError(f"{nearest}: is a file; give --out a folder")
            stack.enter_context(locked(folder))
            check_run_folder(folder, options.resume, options.overwrite)
            for path in [*folder.glob(".*"), *folder.glob("resume/.*")]:
                # Scratch of files.py, and what safetensors leaves where it is killed.
                if path.name in SCRATCH or re.fullmatch(r"\.tmp[A-Za-z0-9]{6}", path.name):
                    remove_scratch(path)
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it until the end of this process, however it ends.

    The lock is the system's and leaves no file. OSError where the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "its permissions forbid it", str(folder))
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError, AttributeError):  # a file system or Python without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{folder}: another run is writing there; wait for its end, or give another --out"
                ) from None
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for place in made:
            with contextlib.suppress(OSError):  # only what stayed empty goes
                place.rmdir()


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


def start_run_folder(options: TrainingOptions, stage: str) -> None:
    """Removes the files of an earlier run, nothing that a run did not write, and says what starts.

    The restart point goes first and run.json is replaced last: whenever this is interrupted, it can be begun
    again. A model that the new run starts from stays until there is another.
    """
    folder = options.folder
    kept = {"run.json", *(MODEL_FILES if starts_from(options) == folder.resolve() else ())}
    events = (folder / "tensorboard").glob("events.out.tfevents.*")
    for path in [*(folder / name for name in RUN_FILES if name not in kept), *events]:
        with writing(path, "give another --out"):
            path.unlink(missing_ok=True)
    run = {"stage": stage, "id": uuid4().hex, "options": options_json(options), **provenance()}
    write_json(folder / "run.json", run)


def starts_from(options: TrainingOptions) -> Path | None:
    """The folder of the model that a run starts from, where it has one."""
    init = getattr(options, "init", None)
    return Path(init).resolve() if init else None
