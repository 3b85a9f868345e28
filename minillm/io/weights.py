"""Weights on disk: safetensors, each file whole or not at all, with one tensor at a time in memory.

    model.safetensors                     all weights; or where these are more than SHARD_BYTES
    model-00001-of-00003.safetensors …    some of them each, and
    model.safetensors.index.json          which file has which

Of several processes all must call what writes: each tensor that is cut among them is gathered from all, and
the first process writes.
"""

import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minillm.errors import InputError, reading, writing
from minillm.io.disk import read_json, write_atomically, write_json
from minillm.model import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model*-of-*.safetensors"
SHARD_BYTES = 5 * 10**9
"""The most that a file holds, but for a single tensor that is larger."""
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights may be on disk."""


# ---- All weights of a folder


def weights_file(folder: Path) -> Path | None:
    """The file that says what weights a folder has: the single one, else the index; None for no weights."""
    return next((folder / name for name in (SINGLE, INDEX) if (folder / name).exists()), None)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Replaces the weights of a folder by these, in one file or in shards.

    The old ones are there, whole, until the one file that says what there is has been replaced: new shards
    are called otherwise than those of the index.
    """
    parts, index = list(_parts(weights)), folder / INDEX
    mark = "-b" if index.exists() and b'"model-0' in index.read_bytes() else ""
    names = [f"model{mark}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = [SINGLE] if len(parts) == 1 else names
    for name, part in zip(names, parts, strict=True):
        write_tensors(folder / name, part, {"format": "pt"})
    if not writes():
        return
    if len(parts) > 1:
        size = sum(tensor.nbytes for tensor in weights.values())
        places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        write_json(index, {"metadata": {"total_size": size}, "weight_map": places})
        names.append(INDEX)
    for path in [folder / SINGLE, index, *folder.glob(SHARDS)]:
        if path.name not in names:
            with writing(path, "the new model is complete; remove this file of the old one"):
                path.unlink(missing_ok=True)


def _parts(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights in their order, as many at once as a file may hold."""
    part, size = dict[str, Tensor](), 0
    for name, tensor in weights.items():
        if part and size + tensor.nbytes > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards its index names."""
    index, files, tensors = folder / INDEX, [SINGLE], dict[str, Tensor]()
    if weights_file(folder) == index:
        places = read_json(index).get("weight_map")
        files = list(places.values()) if isinstance(places, dict) else []
        if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise InputError(f"{index}: has no weight_map from weights to files; download the model again")
    for file in sorted({*files}):
        tensors |= read_tensors(folder / file)[0]
    return tensors


def load_weights(model: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copies tensors into a model with a `config`; every name and shape must match."""
    expected, config = model.state_dict(), cast(ModelConfig, model.config)
    # A constant, which old checkpoints hold too.
    tensors = {n: tensor for n, tensor in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        head, embedding = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            what = f"{origin}: weight lm_head.weight differs from the embedding, though config.json ties them"
            raise InputError(f"{what}; set tie_word_embeddings to false, or take the weight out")
    for names, what in ((expected.keys() - tensors.keys(), "missing"),
                        (tensors.keys() - expected.keys(), "not part of this model")):  # fmt: skip
        if names:
            raise InputError(f"{origin}: weight {min(names)} is {what} ({len(names)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != (shape := expected[name].shape):
            wrong = f"is {list(tensor.shape)}, config.json asks for {list(shape)}"
        elif tensor.dtype not in STORED:
            wrong = f"is of {tensor.dtype}, which is no weight's here"
        elif not tensor.isfinite().all():
            wrong = "holds values that are not finite; restore the file"
        else:
            expected[name].copy_(cut_like(tensor, expected[name]))
            continue
        raise InputError(f"{origin}: weight {name} {wrong}")


# ---- One file


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file: the length of a header in 8 bytes, the header in JSON, the tensors' bytes in its
    order."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so all are aligned
    ends = list(accumulate((tensor.nbytes for _, tensor in ordered), initial=0))
    header: dict[str, Any] = {"__metadata__": metadata} | {
        name: {"dtype": _code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
        for (name, tensor), begin, end in zip(ordered, ends, ends[1:], strict=False)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Path) -> None:
        with open(file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                out.write(whole_tensor(tensor).cpu().reshape(-1).view(torch.uint8).numpy().data)

    if writes():
        write_atomically(path, write)
    else:
        for _, tensor in ordered:
            whole_tensor(tensor)


def _code(dtype: torch.dtype) -> str:
    """What safetensors calls a type: BF16 for torch.bfloat16, U8 for torch.uint8."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("float", "f").replace("uint", "u").replace("int", "i").upper()


def writes() -> bool:
    """Whether this process writes what all of a run hold, or have a part of: the first alone does."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def cut_like(tensor: Tensor, like: Any) -> Tensor:
    """Of a tensor that every process has, this process's part, as `like` is cut; all where that is whole."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:  # as DTensors alone have it
        return tensor
    from torch.distributed.tensor import distribute_tensor  # which takes seconds

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_tensor(tensor: Any) -> Tensor:
    """A tensor gathered from all processes, which all must ask for it; one that is not cut as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata."""
    hint = "the folder is incomplete, or the file damaged: restore it"
    with reading(path, hint, "opened as safetensors", (SafetensorError, OSError)):
        open(path, "rb").close()  # of whatever forbids it the library says that the file is missing
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
