"""A device that there is not: its tensors say that they are on it, and are computed with on the CPU.

    with Pretend() as device:       torch's open registration (PrivateUse1) makes its name known
        ...                         as on a GPU, RuntimeError where a tensor of the CPU meets one of it
    device.waits                    what would have waited for a GPU, with the line of the project that asked
    device.uploads                  what went to the device from the CPU

A mode sees every operation below autograd, and runs it on the tensors that those of the device wrap. Those
answer is_cuda with yes: so the project takes the ways of a GPU that Triton does not serve.
"""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
DEVICE, PRIVATE = torch.device("pretend", 0), torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
ROOT = Path(__file__).parents[1]
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""What asks for a number, or has a result as large as a number says that only the device knows."""


class OnDevice(torch.Tensor):
    """A tensor of the device; `raw` has its numbers."""

    raw: torch.Tensor
    is_cuda = True

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "OnDevice":
        shape = raw.shape, raw.stride(), raw.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(cls, *shape, dtype=raw.dtype, device=DEVICE)
        made.raw = raw
        return made

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise RuntimeError(f"{op}: outside of Pretend")


# What torch.tensor(…, device=…) calls, unseen by any mode.
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl(
    "empty_strided",
    lambda size, stride, *, dtype=None, **_: OnDevice(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
LIBRARY.impl("_copy_from", lambda source, target, _=False: target.raw.copy_(source), "PrivateUse1")


class Pretend(TorchDispatchMode):
    """The device, for as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.uploads = list[str](), list[str]()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = kwargs or {}
        with self:
            if op.namespace == "minillm":  # an operation of ours is seen from inside
                return op.redispatch(PRIVATE, *args, **given)
            # So is what consists of others, which in inference mode comes here whole.
            if (found := op.decompose(*args, **given)) is not NotImplemented:
                return found
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, torch.Tensor)]
        there, target = [x for x in tensors if isinstance(x, OnDevice)], given.get("device")
        goes = bool(there) if target is None else torch.device(target).type == DEVICE.type
        if op.overloadpacket is torch.ops.aten.copy_:
            goes = isinstance(args[0], OnDevice)
        if not there and not goes:
            return op(*args, **given)
        self._note(op, args, tensors, there, goes)
        raws, named = tree_map(lambda x: x.raw if isinstance(x, OnDevice) else x, (args, given))
        if target is not None:
            named["device"] = torch.device("cpu")
        same = {id(x.raw): x for x in there}  # what was written into is given back

        def placed(x: Any) -> Any:
            if not goes or not isinstance(x, torch.Tensor):
                return x
            return same[id(x)] if id(x) in same else OnDevice(x)

        with torch.inference_mode(False):
            return tree_map(placed, op(*raws, **named))

    def _note(self, op, args, tensors, there, goes) -> None:
        """Writes down what waits and what is sent. RuntimeError where tensors are of two devices."""
        name = op._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            if goes and len(there) < len(tensors):
                self.uploads.append(noted(op))
            elif not goes:
                self.waits.append(noted(op))
        elif len(there) < len(tensors):
            raise RuntimeError(f"{noted(op)}: some tensors are on the device and some are not")
        elif name in WAITS or (name.startswith("index") and any(map(is_mask, tree_leaves(args[1])))):
            self.waits.append(noted(op))


def is_mask(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.bool


def noted(op: Any) -> str:
    """The innermost line of the project, tests left out, and the operation."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            return f"{file.relative_to(ROOT)}:{frame.lineno} {frame.line}  {op}"
    return f"?  {op}"
