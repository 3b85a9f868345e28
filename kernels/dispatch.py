"""What every entrance does with its arguments: it checks them once, and chooses the version that runs.

Triton is imported only where its kernels run: without it, as on macOS, everything else works.
"""

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

IMPLEMENTATIONS = ("triton", "torch")
TRITON = find_spec("triton") is not None
CAPABILITY = (8, 0)  # older GPUs have neither the shared memory that the tiles need nor bfloat16
Arguments = Mapping[str, tuple[Tensor | None, str]]  # name -> the tensor, and its shape as letters


def check(operands: Arguments, positions: Arguments) -> None:
    """Floating `operands` and integer `positions` on one device, in shapes where a letter is one size.

    ValueError, or TypeError for a dtype, naming the argument. NotImplementedError under forward-mode
    differentiation, where a custom operator would answer with a derivative of zero.
    """
    sizes: dict[str, int] = {}
    device = next(x.device for x, _ in operands.values() if x is not None)
    for name, (x, letters) in {**operands, **positions}.items():
        if x is None:
            continue
        shape = letters.split()
        if x.dim() != len(shape) or any(
            sizes.setdefault(s, n) != n for s, n in zip(shape, x.shape, strict=True)
        ):
            known = ", ".join(f"{s}={sizes[s]}" for s in shape if s in sizes)
            raise ValueError(f"{name} has the shape {list(x.shape)}, not [{', '.join(shape)}] with {known}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, other arguments are on {device}")
        if x.is_floating_point() != (name in operands) or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name} is {x.dtype}; give {'floats' if name in operands else 'integers'}")
        if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: no forward-mode derivatives; use backward()")
    if sizes.get("V") == 0:
        raise ValueError("a vocabulary of no tokens has no softmax")


def choose_impl(impl: str | None, operand: Tensor) -> str:
    """The version asked for; by default Triton's on CUDA from sm_80 on and PyTorch's everywhere else.

    float64 exists for tests, and goes to PyTorch unless asked for otherwise. ValueError for an unknown name.
    """
    if impl in IMPLEMENTATIONS:
        return impl
    if impl is not None:
        raise ValueError(f"unknown impl {impl!r}: there are None, 'triton' and 'torch'")
    if not operand.is_cuda or operand.dtype == torch.float64 or not TRITON:
        return "torch"
    device = torch.cuda.get_device_properties(operand.device.index)  # which torch.compile takes as constant
    return "triton" if (device.major, device.minor) >= CAPABILITY else "torch"


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where one is in force."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
