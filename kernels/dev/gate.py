"""The compile gate: every kernel, as the library dispatches it, built for three GPUs on a machine with none.

    python -m kernels.gate            # builds, prints the table, fails if a kernel breaks a rule
    python -m kernels.gate --write    # and puts the table into docs/kernels.md
    python -m kernels.gate --all      # every dtype at every width of heads, not only some

A machine without a GPU can run the kernels in Triton's interpreter, which shows that they are right but
nothing of the code a GPU gets. Triton's compiler needs no GPU, though: a driver that claims to be an
A100, an H100 or a B200 is all it asks for. So the gate makes the library's public calls on CPU tensors,
forward and backward, and turns every launch into a build. Nothing is launched and no result means
anything, but each kernel is compiled exactly as a GPU would get it: chosen by the library's own
dispatch, specialised to real strides, alignments and options.

The rules each build is held to:

    spills       no register is spilled to memory, or as much as EXCEPTIONS allows, with its reason
    shared       shared memory fits into what the device gives one block
    products     every product of half types runs on tensor cores, of the newest kind its tile can fill
    loads        a kernel that reads large blocks reads them 128 bits at a time

Left out: speed, which only a GPU can tell (bench.py), and results, which the tests hold.
Sources: NVIDIA, "CUDA C++ Programming Guide", section "Compute Capabilities" (shared memory per block);
"PTX ISA", sections "mma", "wgmma.mma_async" and "tcgen05.mma" (tile sizes).
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.attention import attention
from kernels.dev.commandline import Parser
from kernels.losses import (
    cross_entropy,
    kl,
    linear_cross_entropy,
    linear_kl,
    linear_token_logprobs,
    token_logprobs,
)  # fmt: skip

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
MARKERS = ("<!-- gate: begin -->", "<!-- gate: end -->")

# Shared memory one block may use, in bytes, by compute capability: A100, H100, B200.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The newest tensor-core instruction of each, and the older one that tiles of under 64 rows are left with.
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
SMALL_TILES, TILE_ROWS = "mma", 64
# Blocks of fewer elements are not worth a rule: a thread may have less than 128 bits of them.
LARGE_BLOCK = 1024

# (capability, kernel, dtype, size): bytes a thread may spill, and why that is the better choice.
PACKED = "ptxas stops at a number of registers that lets another block onto the multiprocessor"
EXACT = "exact float32 products keep their factors in registers; the blocks are the smallest already"
EXCEPTIONS: dict[tuple[int, str, str, int], tuple[int, str]] = {
    (80, "_forward", "bfloat16", 32): (8, PACKED),
    (80, "_forward", "float16", 32): (8, PACKED),
    (80, "_forward", "float32", 32): (8, PACKED),
    (100, "_forward", "bfloat16", 32): (16, PACKED),
    (100, "_forward", "float16", 32): (16, PACKED),
    (90, "_backward_dkdv", "float32", 64): (8, PACKED),
    (80, "_backward_dq", "float32", 256): (248, EXACT),
    (90, "_backward_dq", "float32", 256): (272, EXACT),
    (100, "_backward_dq", "float32", 256): (272, EXACT),
}
# Kernels that may load narrowly, and why.
NARROW = {
    "_list_row_blocks": "reads the bounds, 4 bytes a query, and the same ones for every head of a group"
}


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one device; `size` is a head width or a vocabulary."""

    capability: int
    kernel: str
    dtype: str
    size: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    tile_rows: int  # of its largest product of half types; 0 without one
    tensor_cores: str  # the newest instruction in it, "" for none
    large_loads: bool  # reads blocks of at least LARGE_BLOCK elements
    load_bits: int  # its widest load from global memory


def faults(build: Build) -> list[str]:
    """The rules a build breaks, in words."""
    found, limit = [], SHARED_LIMITS[build.capability]
    where = (build.capability, build.kernel, build.dtype, build.size)
    allowed, _ = EXCEPTIONS.get(where, (0, ""))
    if build.spilled > allowed:
        found.append(f"spills {build.spilled} bytes a thread, {allowed} are allowed")
    if build.shared > limit:
        found.append(f"needs {build.shared} bytes of shared memory, the device has {limit}")
    newest = TENSOR_CORES[build.capability]
    wanted = newest if build.tile_rows >= TILE_ROWS else SMALL_TILES
    if build.tile_rows and build.tensor_cores not in (wanted, newest):
        found.append(f"multiplies with {build.tensor_cores or 'no tensor cores'} instead of {wanted}")
    if build.large_loads and build.load_bits < 128 and build.kernel not in NARROW:
        found.append(f"loads at most {build.load_bits} bits at a time")
    return found


# --- From a public call to compiled kernels -------------------------------------------------------


@dataclass(frozen=True)
class _Device:
    """What Triton asks a driver before a launch, answered without a GPU."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton remembers builds by device number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[CompiledKernel]]:
    """Inside, every launch of a Triton kernel is a build for `capability`, added to the list."""
    compiled = []
    run = JITFunction.run

    def build(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    with patch.object(driver, "_active", _Device(capability)), patch.object(JITFunction, "run", build):
        yield compiled


def inspect(compiled: CompiledKernel, capability: int, dtype: torch.dtype, size: int) -> Build:
    """What the rules need to know, read from the machine code, the PTX and Triton's own first stage."""
    ptx, blocks = compiled.asm["ptx"], compiled.asm["ttir"]
    registers, spilled = _resources(compiled.asm["cubin"])
    rows = [int(m) for m in re.findall(r"tt\.dot .*tensor<(\d+)x\d+xb?f16> \*", blocks)]
    kinds = [kind for kind in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{kind}\.(mma|sync)", ptx)]
    loads = re.findall(r"tt\.(?:load|descriptor_load) .*tensor<(?:(\d+)x)?(\d+)x", blocks)
    return Build(
        capability=capability,
        kernel=compiled.metadata.name,
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tile_rows=max(rows, default=0),
        tensor_cores=kinds[0] if kinds else "",
        large_loads=any(int(a or 1) * int(b) >= LARGE_BLOCK for a, b in loads),
        load_bits=_widest_load(ptx),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread; Triton uses the stack for spilled registers alone."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(registers), int(stack)


def _widest_load(ptx: str) -> int:
    """In bits. Asynchronous copies count too: cp.async states its bytes, the tensor engine moves lines."""
    plain = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsfu](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], .*?\], (0x[0-9a-f]+|\d+)", ptx)
    widths = [int(n or 1) * int(bits) for n, bits in plain] + [8 * int(size, 0) for size in copies]
    return 128 if "cp.async.bulk" in ptx else max(widths, default=0)


# --- The calls ------------------------------------------------------------------------------------


def attention_calls(dtype: torch.dtype, width: int) -> None:
    """Causal, causal with bounds (packed documents, windows), and one new token over a long cache."""
    q, k, v = (zeros(2, 1024, heads, width, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
    bounds = torch.zeros(2, 1024, dtype=torch.int32)
    attention(q, k, v, impl="triton").sum().backward()
    attention(q, k, v, start=bounds, impl="triton").sum().backward()
    cache = zeros(2, 2, 8192, width, dtype=dtype)
    with torch.no_grad():  # keys are split over programs
        attention(q[:, :, :1], cache, cache, end=bounds[:, :1], causal=False, impl="triton")


def row_calls(dtype: torch.dtype, vocabulary: int) -> None:
    """32 rows of logits that exist, and of those that hidden states of any width make."""
    logits, targets = zeros(32, vocabulary, dtype=dtype), torch.zeros(32, dtype=torch.int64)
    hidden, weight = zeros(32, 16, dtype=dtype), zeros(vocabulary, 16, dtype=dtype)
    for reduction in ("mean", "none"):
        cross_entropy(logits, targets, reduction=reduction, impl="triton").sum().backward()
        linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl="triton").sum().backward()
    for logprob_entropy in (
        token_logprobs(logits, targets, impl="triton"),
        linear_token_logprobs(hidden, weight, targets, impl="triton"),
    ):
        torch.stack(logprob_entropy).sum().backward()
    kl(logits, zeros(32, vocabulary, dtype=dtype), impl="triton").sum().backward()
    linear_kl(hidden, weight, hidden, weight, impl="triton").sum().backward()


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


WIDTHS = (32, 64, 96, 128, 256)  # of heads; one is no power of two
VOCABULARIES = (32000, 50257)  # the rows of one begin between two borders of 128 bits
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERYTHING = list(product((attention_calls,), DTYPES, WIDTHS)) + list(
    product((row_calls,), DTYPES, VOCABULARIES)
)
# What is built unless all is asked for, in less than three minutes: dtypes differ less than widths.
SOME = [
    *product((attention_calls,), DTYPES[:1], WIDTHS),
    (attention_calls, torch.float16, 128),
    (attention_calls, torch.float32, 64),
    *product((row_calls,), DTYPES, VOCABULARIES),
]


def builds(calls, dtype: torch.dtype, size: int, capability: int) -> list[Build]:
    """What `calls` launches, each kernel and specialisation once."""
    with compiling(capability) as compiled:
        calls(dtype, size)
    unique = {kernel.hash: kernel for kernel in compiled}
    return [inspect(kernel, capability, dtype, size) for kernel in unique.values()]


def build_all(cases) -> list[Build]:
    """What the cases (calls, dtype, size) lead to on all devices, in as many processes as there are cores."""
    jobs = [(*case, capability) for case in cases for capability in SHARED_LIMITS]
    # Fresh processes rather than forks: torch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return [build for job in [pool.submit(builds, *job) for job in jobs] for build in job.result()]


# --- The table ------------------------------------------------------------------------------------

COLUMNS = ("kernel", "dtype", "size", "spilled", "tensor cores", "load bits", "registers", "shared KB")


def table(found: list[Build]) -> str:
    """One line a kernel, dtype and size; where the devices differ, "sm_80 / sm_90 / sm_100".

    Several specialisations share a line (with and without bounds, say): it shows the worst of them.
    """
    groups: dict[tuple[str, str, int], list[Build]] = {}
    for build in found:
        groups.setdefault((build.kernel, build.dtype, build.size), []).append(build)
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for key, group in sorted(groups.items()):
        devices = ([b for b in group if b.capability == capability] for capability in SHARED_LIMITS)
        cells = zip(*(_worst(device) for device in devices), strict=True)
        lines.append((*map(str, key), *(" / ".join(c if len(set(c)) > 1 else c[:1]) for c in cells)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _worst(group: list[Build]) -> tuple[str, ...]:
    """The cells behind kernel, dtype and size, of builds for one device."""
    if not group:
        return ("not built",) * (len(COLUMNS) - 3)
    tensor_cores = {b.tensor_cores for b in group if b.tile_rows}
    load_bits = [b.load_bits for b in group if b.large_loads]
    return (
        str(max(b.spilled for b in group)),
        ", ".join(sorted(tensor_cores)),
        str(min(load_bits)) if load_bits else "",
        str(max(b.registers for b in group)),
        f"{max(b.shared for b in group) / 1024:.0f}",
    )


def page(text: str, found: list[Build]) -> str:
    """The page `text` with this table between the markers."""
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\nTriton {triton.__version__}\n\n{table(found)}{MARKERS[1]}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    choice.add_argument("--all", action="store_true", help="every dtype at every width, not some")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    found = build_all(EVERYTHING if options.all else SOME)
    print(f"Triton {triton.__version__}\n\n{table(found)}", end="")
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    broken = [
        f"sm_{b.capability} {b.kernel} {b.dtype} {b.size}: {fault}" for b in found for fault in faults(b)
    ]
    sys.exit("\n".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
