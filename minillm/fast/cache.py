"""Token streams on disk, kept between runs: written once, and read only if they are as they were written.

    folder/train.bin  val.bin     token ids, uint16 or uint32, nothing else
    folder/counts.json            of each side tokens, bytes, documents and a checksum; written last

One process writes; others that want the same tokens wait for it, however long it takes. A folder shared with
others is trusted no further than this: ids that the vocabulary has, and whole numbers.
"""

import json
import shutil
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from minillm.corpus import SIDES
from minillm.data import Side
from minillm.digest import digest
from minillm.errors import BAD_FILE, writing
from minillm.io.disk import remove, write_json
from minillm.tools.folder import hold


def cached_streams(
    folder: Path, vocab_size: int, parts: Iterable[tuple[Side, np.ndarray, int]], dropped: Mapping[str, int]
) -> tuple[dict[Side, np.ndarray], dict[Side, dict[str, int]], dict[str, int]]:
    """The two streams, mapped, their counts, and what reading dropped; all from `folder` if it is whole. Else
    `parts` are written there: the side, the tokens and the bytes of each document, and whatever has no bytes.
    `dropped` is complete when they have been read. InputError where the disk refuses."""
    dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
    with writing(folder, "free some space or give another --cache"), hold(folder, wait=True):
        if not (sealed := _whole(folder, dtype, vocab_size)):
            try:
                sealed = _write(folder, dtype, parts, dropped)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        streams = {side: _map(folder / f"{side}.bin", dtype) for side in SIDES}
        return streams, sealed["sides"], sealed["dropped"]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped; and a plain view is quicker to slice than a np.memmap.
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _write(
    folder: Path, dtype: np.dtype, parts: Iterable[tuple[Side, np.ndarray, int]], dropped: Mapping[str, int]
) -> dict[str, Any]:
    for damaged in folder.iterdir():  # what another process has mapped outlives its name
        remove(damaged)
    counts = {side: dict.fromkeys(("tokens", "bytes", "documents", "checksum"), 0) for side in SIDES}
    with ExitStack() as opened:
        files = {side: opened.enter_context(open(folder / f"{side}.bin", "wb")) for side in SIDES}
        for side, ids, size in parts:
            raw, count = ids.astype(dtype).tobytes(), counts[side]
            files[side].write(raw)
            count["tokens"] += len(ids)
            count["bytes"] += size
            count["documents"] += size > 0
            count["checksum"] = zlib.crc32(raw, count["checksum"])
    sealed = {"sides": counts, "dropped": dict(dropped)}
    write_json(folder / "counts.json", {**sealed, "checksum": digest(sealed)})
    return sealed


def _whole(folder: Path, dtype: np.dtype, vocab_size: int) -> dict[str, Any] | None:
    """What counts.json says; None where any of it is missing or not as it was written."""
    try:
        sealed = json.loads((folder / "counts.json").read_text())
        checksum, sides = sealed.pop("checksum"), sealed["sides"]
        numbers = [*sealed["dropped"].values(), *(n for side in SIDES for n in sides[side].values())]
        found = [(sides[side]["tokens"], sides[side]["checksum"]) for side in SIDES]
        read = [_read(folder / f"{side}.bin", dtype, vocab_size) for side in SIDES]
    except BAD_FILE:
        return None
    known = all(type(number) is int for number in numbers)
    return sealed if known and checksum == digest(sealed) and found == read else None


def _read(path: Path, dtype: np.dtype, vocab_size: int) -> tuple[int, int]:
    """How many tokens a file holds, and its checksum. ValueError for an id that no token has."""
    size = checksum = 0
    with open(path, "rb") as file:  # read and not mapped: what is mapped counts as memory
        while raw := file.read(2**24):
            size, checksum = size + len(raw), zlib.crc32(raw, checksum)
            if np.frombuffer(raw, dtype).max() >= vocab_size:
                raise ValueError(f"{path} is damaged")
    return size // dtype.itemsize, checksum
