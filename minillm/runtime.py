"""Where a run computes: the device, its precision, the processes it is shared by, and interrupts.

One process, or several under `torchrun`, which tells each its rank through the environment. Every
process prepares the same global batch and takes its own rows, so the result does not depend on how
many there are. Left out: sharded weights, several nodes with different devices.
"""

import contextlib
import gc
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.errors import InputError


@dataclass(frozen=True)
class Runtime:
    """One process's place in a run."""

    device: torch.device
    dtype: torch.dtype
    """The precision of matrix products and of the residual stream; weights stay float32."""
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, compiled: bool | None = None) -> Callable[..., Tensor]:
        """The model as the training loop calls it, averaging over processes; compiled, unless said
        otherwise, where CUDA and the Triton that torch.compile needs are there."""
        if compiled is None:
            compiled = self.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        if compiled:
            model.compile()
        if self.world == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def rows_of_step(self, batch_tokens: int, block_size: int) -> int:
        """Rows of a step, over all processes. InputError where they cannot be shared out evenly."""
        rows = max(1, batch_tokens // block_size)
        if rows % self.world:
            raise InputError(
                f"a step of {rows} rows cannot be shared by {self.world} processes; "
                f"give --batch-tokens a multiple of {self.world * block_size}"
            )
        return rows

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the main process go first, so that the others find what it wrote."""
        if self.world > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.world > 1 and self.is_main:
            dist.barrier()

    def sync_gradients(self, forward: Any, last: bool) -> contextlib.AbstractContextManager:
        """Averages gradients over processes with the last micro-batch only. `forward` is from `wrap`."""
        return contextlib.nullcontext() if self.world == 1 or last else forward.no_sync()

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value


@contextlib.contextmanager
def start_runtime(device: str, precision: str = "auto") -> Iterator[Runtime]:
    """Joins the other processes, if any; leaves them at the end, also after an error."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    try:
        dtype = choose_dtype(chosen) if precision == "auto" else getattr(torch, precision)
        yield Runtime(chosen, dtype, rank, world)
        if world > 1:
            dist.barrier()  # the main process has more to do at the end: nobody hangs up on it
    finally:
        if world > 1:
            # What DistributedDataParallel wrapped holds the group too; were it to outlive this, the group's
            # threads would end only when the process does, which is an abort now and then.
            gc.collect()
            dist.destroy_process_group()


def choose_device(name: str, local_rank: int) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; several processes take one GPU each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; give auto, cpu, cuda or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: no CUDA device is available; give --device cpu")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: only {torch.cuda.device_count()} CUDA devices here")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: not available here; give --device cpu")
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32; never float16."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


class StopRequest:
    """Ctrl-C or a polite kill: ends a loop after the step under way. A second Ctrl-C ends at once."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.signalled = runtime, False

    def __enter__(self) -> "StopRequest":
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def asked(self) -> bool:
        """Whether any process was told to stop: all of them then stop at the same step."""
        if self.runtime.world == 1:
            return self.signalled
        flag = torch.tensor(float(self.signalled), device=self.runtime.device)
        return self.runtime.total(flag).item() > 0
