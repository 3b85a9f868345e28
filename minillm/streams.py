"""Token streams on disk: written once, whole or not at all, and mapped into memory.

    folder/train.bin  folder/val.bin    token ids, uint16 or uint32, nothing else
    folder/counts.json                  tokens, bytes of text, documents and a checksum of each

A stream is one long array of tokens: every document is [bos] + its tokens, followed by [eos] only
where eos is another token than bos. Where they are the same token (in our own tokenizers), the one
that opens a document also ends the one before it, and one more closes the stream: every token of
text has a next token to predict. Streams longer than memory are written and read piece by piece.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import UInt

from minillm.errors import InputError
from minillm.files import sync_file, sync_folder

Side = Literal["train", "val"]
SIDES: tuple[Side, Side] = ("train", "val")
Tokens = UInt[np.ndarray, " L"]


def token_dtype(vocab_size: int) -> str:
    """The smaller of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_streams(
    folder: Path,
    documents: Iterable[tuple[Side, Tokens, int]],
    dtype: str,
    bos: int,
    eos: int,
    notes: Mapping[str, int],
) -> None:
    """Write documents (side, token ids, bytes of text) to the streams of `folder`.

    They are written under a temporary name, synced and renamed: a folder that is there is whole,
    and an exception leaves nothing. (A process killed here leaves `*.tmp-*`, never used, which may
    be deleted.) `notes`, read when all is written, is kept beside the counts. Raises InputError
    where the disk refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as scratch:
            written = Path(scratch, "streams")
            written.mkdir()
            _fill(written, documents, dtype, bos, eos, notes)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            written.rename(folder)
            sync_folder(folder.parent)
    except OSError as error:
        if not folder.exists():  # else another process was faster, and the folder is its work
            raise InputError(
                f"cannot write tokens to {str(folder.parent)!r}: {error.strerror}; "
                "free some space or choose another folder"
            ) from error


def open_streams(folder: Path) -> tuple[dict[str, Tokens], dict[str, Any]] | None:
    """The streams of `folder` by side, and their counts; None where missing, cut or damaged.

    Every byte is read once, for the checksums.
    """
    try:
        sealed = json.loads((folder / "counts.json").read_text())
        counts = sealed["counts"]
        if _checksum(counts) != sealed["checksum"]:
            return None
        return {s: _map(folder / f"{s}.bin", counts["dtype"], counts[s]) for s in SIDES}, counts
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path, dtype: str, counts: Mapping[str, int]) -> Tokens:
    """One stream, mapped; ValueError unless size and checksum are as counted."""
    # An empty file cannot be mapped; and a plain view is quicker to slice than a np.memmap.
    empty = path.stat().st_size == 0
    tokens = np.empty(0, dtype) if empty else np.asarray(np.memmap(path, dtype, "r"))
    if len(tokens) != counts["tokens"] or zlib.crc32(tokens.data) != counts["checksum"]:
        raise ValueError(f"{path} is damaged")
    return tokens


def _fill(
    folder: Path,
    documents: Iterable[tuple[Side, Tokens, int]],
    dtype: str,
    bos: int,
    eos: int,
    notes: Mapping[str, int],
) -> None:
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        writers = {s: _Writer(f, dtype, bos, eos) for s, f in zip(SIDES, (train, val), strict=True)}
        for side, ids, size in documents:
            writers[side].add(ids, size)
        counts: dict[str, Any] = {side: writer.finish() for side, writer in writers.items()}
    counts |= {"dtype": dtype, "notes": dict(notes)}
    with open(folder / "counts.json", "w") as file:
        json.dump({"counts": counts, "checksum": _checksum(counts)}, file)
        sync_file(file)
    sync_folder(folder)


class _Writer:
    """Appends documents to the file of one stream, counting as it goes."""

    def __init__(self, file: BinaryIO, dtype: str, bos: int, eos: int):
        self.file = file
        self.bos = np.array([bos], dtype)
        self.eos = np.array([eos] if eos != bos else [], dtype)
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0, "checksum": 0}

    def add(self, ids: Tokens, size: int) -> None:
        self._append(np.concatenate([self.bos, ids.astype(self.bos.dtype), self.eos]))
        self.counts["bytes"] += size
        self.counts["documents"] += 1

    def finish(self) -> dict[str, int]:
        """Close the last document and sync; returns the counts."""
        if self.counts["documents"] and not len(self.eos):
            self._append(self.bos)
        sync_file(self.file)
        return self.counts

    def _append(self, tokens: Tokens) -> None:
        raw = tokens.tobytes()
        self.file.write(raw)
        self.counts["tokens"] += len(tokens)
        self.counts["checksum"] = zlib.crc32(raw, self.counts["checksum"])


def _checksum(counts: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(counts, sort_keys=True).encode())
