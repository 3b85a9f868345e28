"""Which version of an operation runs: PyTorch's, on any device, or the hand-written Triton kernels.

Triton is imported only where its kernels run: without it, as on macOS, everything else works.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

IMPLEMENTATIONS = ("triton", "torch")


def choose_impl(impl: str | None, operand: Tensor) -> str:
    """The version asked for; by default Triton's for CUDA tensors and PyTorch's for all others.

    float64 exists for tests, and goes to PyTorch unless asked for otherwise. ValueError for an unknown name.
    """
    if impl in IMPLEMENTATIONS:
        return impl
    if impl is not None:
        raise ValueError(f"unknown impl {impl!r}: there are None, 'triton' and 'torch'")
    fast = operand.is_cuda and operand.dtype != torch.float64 and find_spec("triton") is not None
    return "triton" if fast else "torch"
