"""Files written whole or not at all; text and JSON read with errors in one line.

A file is written as `.NAME.PROCESS.tmp` beside its place, synced and renamed over the old one, so that a
reader, or a machine that stops in between, finds the old file or the new one and never half of either.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from minillm.errors import InputError, reading, writing

fcntl: Any = None
with suppress(ImportError):  # Windows has none
    import fcntl


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, syncs it, and renames it to `path`. Raises InputError where the
    disk is full or the folder cannot be written; `path` is then as it was."""
    scratch = path.with_name(f".{path.name[:60]}.{os.getpid()}.tmp")
    with writing(path, "what was there before is unchanged; free some space or choose another folder"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.unlink(missing_ok=True)
            remove_left(path.parent, escape(path.name[:60]))
            scratch.touch()
            mode = scratch.stat().st_mode  # as the umask has it, whatever the writer chooses
            write(scratch)
            scratch.chmod(mode)
            sync(scratch)
            os.replace(scratch, path)
            sync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)


def remove_left(folder: Path, pattern: str) -> None:
    """Removes what processes that were killed had written of a folder's files. Not on Windows, where asking
    after a process would end it."""
    for left in folder.glob(f".{pattern}.*.tmp") if fcntl is not None else ():
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (PermissionError, ValueError):  # another user's process, or no process's file
            pass


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    # In ASCII: a file name whose bytes are no UTF-8 is a string that UTF-8 cannot hold.
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_text(path: Path) -> str:
    """The text of a file without its byte order mark. InputError where it cannot be read or is not UTF-8."""
    with reading(path, "check the folder; was it copied whole?"):
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where there is none."""
    with reading(path, "was it copied whole?", "read as JSON", (ValueError, RecursionError)):
        content = json.loads(read_text(path), parse_constant=_refuse_constant, object_pairs_hook=fields_once)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; restore it")
    return content


def fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of some fields; ValueError where one is there twice, of which readers take either."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the field {name!r:.60} twice")
    return fields


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def typed(name: str, value: Any, kind: Any) -> Any:
    """A value as JSON has it, as one of a field's kind. TypeError where it is of another."""
    if type(value) is kind or kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (tuple, list) and isinstance(value, list):
        return origin([item if type(item) is inner[0] else typed(name, item, inner[0]) for item in value])
    if kind is float and type(value) is int:
        return float(value)
    if origin is Literal and value in inner:
        return value
    for option in inner if origin in (Union, UnionType) else ():
        with suppress(TypeError):
            return typed(name, value, option)
    raise TypeError(f"{name} is {value!r:.60}, which is no {kind if inner else kind.__name__}")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Windows keeps names by itself, and opens
    no folder."""
    is_folder = path.is_dir()
    if is_folder and fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs what may be written
    try:
        sync_open(handle)
    finally:
        os.close(handle)


def sync_open(handle: int) -> None:
    """The same for an open file. On macOS fsync alone leaves the data in the drive's memory."""
    os.fsync(handle)
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
