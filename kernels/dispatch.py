"""What every entrance does with its arguments: it checks them once, and chooses the version that runs.

Triton is imported only where its kernels run: without it, as on macOS, everything else works.
"""

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

TRITON = find_spec("triton") is not None
CAPABILITY = (8, 0)  # older GPUs have neither the shared memory that the tiles need nor bfloat16
Arguments = Mapping[str, tuple[Tensor | None, str]]  # name -> the tensor, and its shape as letters


def check(
    operands: Arguments, positions: Arguments, impl: str | None,
    reduction: str = "sum", ignore_index: int = 0, temperature: float = 1.0,
) -> str:  # fmt: skip
    """The version that runs, for floating `operands` and integer `positions` on one device, in shapes where
    a letter is one size.

    ValueError, or TypeError for a dtype, naming the argument; IndexError for a target that is neither among
    V tokens nor `ignore_index` (0, a token anyway, for none). NotImplementedError under forward-mode
    differentiation, where a custom operator would answer with a derivative of zero.
    """
    if impl not in (None, "triton", "torch"):
        raise ValueError(f"unknown impl {impl!r}: there are None, 'triton' and 'torch'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: there are 'mean', 'sum' and 'none'")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    sizes: dict[str, int] = {}
    first = next(x for x, _ in operands.values() if x is not None)
    for name, (x, letters) in {**operands, **positions}.items():
        if x is None:
            continue
        shape = letters.split()
        if x.dim() != len(shape) or any(
            sizes.setdefault(s, n) != n for s, n in zip(shape, x.shape, strict=True)
        ):
            known = ", ".join(f"{s}={sizes[s]}" for s in shape if s in sizes)
            raise ValueError(f"{name} has the shape {list(x.shape)}, not [{', '.join(shape)}] with {known}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, other arguments are on {first.device}")
        if x.is_floating_point() != (name in operands) or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name} is {x.dtype}; give {'floats' if name in operands else 'integers'}")
        if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: no forward-mode derivatives; use backward()")
    if sizes.get("V") == 0:
        raise ValueError("a vocabulary of no tokens has no softmax")
    # On a GPU reading the answer would stall it, and in a graph it would break that: PyTorch's kernels assert
    # their bounds themselves, and Triton's give nan for such a row.
    targets, V = positions.get("targets", (None, ""))[0], sizes.get("V", 0)
    if targets is not None and not (first.is_cuda or torch.compiler.is_compiling()):
        targets = targets.long()
        wrong = (targets < 0).logical_or(targets >= V).logical_and(targets != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(f"target {int(targets[row])} in row {row} is outside 0..{V - 1}")
    return impl or ("triton" if first.is_cuda and runs_triton(first) else "torch")


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's version is the one for a tensor on CUDA: from sm_80 on, and not in float64, which is
    for tests."""
    device = torch.cuda.get_device_properties(x.device.index)  # which torch.compile takes as constant
    return TRITON and x.dtype != torch.float64 and (device.major, device.minor) >= CAPABILITY
