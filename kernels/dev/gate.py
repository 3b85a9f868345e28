"""The compile gate: the kernels that the product launches, built for three GPUs on a machine with none.

    python -m kernels.gate            # builds, prints the table, fails if a kernel breaks a rule
    python -m kernels.gate --write    # and puts the table into docs/kernels.md
    python -m kernels.gate --only 64  # heads of this width
    python -m kernels.gate --all      # widths of other models and float32 as well

Triton's interpreter shows that a kernel is right and nothing of the code a GPU gets. Triton's compiler needs
no GPU, though: a driver that claims to be an A100, an H100 or a B200 is all it asks for. So the gate runs
real steps of a model of one block on CPU tensors (a training step, a policy step, a sampling step) and turns
every launch into a build. Nothing is launched and no result means anything, but each kernel is compiled in
the very specialisation, to dtypes, strides, alignments and options, in which the product launches it.
`faults` has the rules each build is held to.

Left out: speed, which only a GPU can tell (bench.py), and results, which the tests hold.
Sources: NVIDIA, "CUDA C++ Programming Guide", section "Compute Capabilities" (shared memory per block);
"PTX ISA", sections "mma", "wgmma.mma_async" and "tcgen05.mma" (tile sizes).
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.harness import Parser
from kernels import attention, losses

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
PACKED = "ptxas stops at 128 registers, which let another block onto the multiprocessor"
EXCEPTIONS: dict[tuple[int, str, str, int], tuple[int, str]] = {
    (80, "_backward_dq", "bfloat16", 32): (8, PACKED),
    (80, "_forward", "float32", 64): (16, PACKED),
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
    """The rules a build breaks, in words:

    - no register is spilled to memory, or no more than EXCEPTIONS allows, with its reason;
    - shared memory fits into what the device gives one block;
    - every product of half types runs on tensor cores, of the newest kind its tile can fill;
    - a kernel that reads large blocks reads them 128 bits at a time.
    """
    allowed, _ = EXCEPTIONS.get((build.capability, build.kernel, build.dtype, build.size), (0, ""))
    limit, newest = SHARED_LIMITS[build.capability], TENSOR_CORES[build.capability]
    wanted = newest if build.tile_rows >= TILE_ROWS else SMALL_TILES
    words = {
        f"spills {build.spilled} bytes a thread, {allowed} are allowed": build.spilled > allowed,
        f"needs {build.shared} bytes of shared memory, the device has {limit}": build.shared > limit,
        f"multiplies with {build.tensor_cores or 'no tensor cores'} instead of {wanted}": (
            build.tile_rows > 0 and build.tensor_cores not in (wanted, newest)
        ),
        f"loads at most {build.load_bits} bits at a time": (
            build.large_loads and build.load_bits < 128 and build.kernel not in NARROW
        ),
    }
    return [fault for fault, broken in words.items() if broken]


# --- From a step to compiled kernels --------------------------------------------------------------


@contextmanager
def compiling(capability: int) -> Iterator[list[CompiledKernel]]:
    """Inside, CPU tensors take the way of CUDA tensors, and every launch is a build, added to the list."""
    compiled, run = [], JITFunction.run

    def build(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    device = SimpleNamespace(  # what Triton asks a driver before a launch
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # Triton remembers builds by device number
        get_current_stream=lambda device: 0,
    )
    with (
        patch.object(driver, "_active", device),
        patch.object(JITFunction, "run", build),
        patch.dict(losses.PLANS, cpu=losses.PLANS["cuda"]),
        patch.object(losses, "check", lambda *_: "triton"),
        patch.object(attention, "check", lambda *_: "triton"),
    ):
        yield compiled


def inspect(compiled: CompiledKernel, capability: int, dtype: str, size: int) -> Build:
    """What the rules need to know, read from the machine code, the PTX and Triton's own first stage."""
    ptx, blocks = compiled.asm["ptx"], compiled.asm["ttir"]
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Triton uses the stack for spilled registers alone.
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    rows = [int(m) for m in re.findall(r"tt\.dot .*tensor<(\d+)x\d+xb?f16> \*", blocks)]
    kinds = [kind for kind in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{kind}\.(mma|sync)", ptx)]
    loads = re.findall(r"tt\.(?:load|descriptor_load) .*tensor<(?:(\d+)x)?(\d+)x", blocks)
    return Build(
        *(capability, compiled.metadata.name, dtype, size),
        *(int(registers), int(stack), compiled.metadata.shared),
        tile_rows=max(rows, default=0),
        tensor_cores=kinds[0] if kinds else "",
        large_loads=any(int(a or 1) * int(b) >= LARGE_BLOCK for a, b in loads),
        load_bits=_widest_load(ptx),
    )


def _widest_load(ptx: str) -> int:
    """In bits. Asynchronous copies count too: cp.async states its bytes, the tensor engine moves lines."""
    plain = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsfu](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], .*?\], (0x[0-9a-f]+|\d+)", ptx)
    widths = [int(n or 1) * int(bits) for n, bits in plain] + [8 * int(size, 0) for size in copies]
    return 128 if "cp.async.bulk" in ptx else max(widths, default=0)


# --- The steps ------------------------------------------------------------------------------------


def attention_steps(dtype: str, width: int) -> None:
    """Training over packed documents, and sampling: prompts of two lengths and one token more."""
    from minillm.model import KVCache

    model, tokens = _model(dtype, width, 256)
    model.model(tokens, torch.zeros_like(tokens, dtype=torch.int32)).sum().backward()
    with torch.inference_mode():
        cache = KVCache(model, len(tokens), 256)
        cache.prefill(tokens, torch.tensor([128, 64]))
        cache.step(tokens[:, 0])


def row_steps(dtype: str, vocabulary: int) -> None:
    """The loss of a step of train.py, and the log-probabilities, entropies and KL of one of PPO."""
    model, tokens = _model(dtype, 64, vocabulary)
    hidden = torch.randn(256, 64, dtype=getattr(torch, dtype), requires_grad=True)
    other = hidden.detach(), model.lm_head.weight.detach()
    losses.linear_cross_entropy(hidden, model.lm_head.weight, tokens.flatten(), reduction="sum").backward()
    said = model.token_logprobs(hidden, tokens.flatten(), 0.7, None, other)
    torch.stack(said).sum().backward()


def _model(dtype: str, width: int, vocabulary: int):
    """A model of one block with two heads, and two rows of tokens for it."""
    from minillm.model import LanguageModel, ModelConfig

    config = ModelConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=width,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LanguageModel(config, getattr(torch, dtype)), torch.zeros(2, 128, dtype=torch.int64)


Case = tuple[Callable[[str, int], None], str, int]
# The widths of heads that the dial of depth leads to; GPT-2's vocabulary, whose rows of logits are padded.
PRODUCT: list[Case] = [(attention_steps, "bfloat16", C) for C in (32, 64, 128)]
PRODUCT += [(row_steps, "bfloat16", 50257)]
OTHERS: list[Case] = [(attention_steps, "bfloat16", 96), (attention_steps, "bfloat16", 256)]
OTHERS += [(attention_steps, "float32", 64), (row_steps, "float32", 50257)]


def builds(steps: Callable[[str, int], None], dtype: str, size: int, capability: int) -> list[Build]:
    """What the steps launch, each kernel and specialisation once."""
    with compiling(capability) as compiled:
        steps(dtype, size)
    return [inspect(kernel, capability, dtype, size) for kernel in {x.hash: x for x in compiled}.values()]


def build_all(cases: Sequence[Case]) -> list[Build]:
    """What the cases lead to on all devices, in as many processes as there are cores."""
    jobs = [(*case, capability) for case in cases for capability in SHARED_LIMITS]
    # Fresh processes: torch's threads do not survive a fork. Ctrl-C just ends them.
    quiet = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), *quiet) as pool:
        return [build for job in [pool.submit(builds, *job) for job in jobs] for build in job.result()]


# --- The table ------------------------------------------------------------------------------------

COLUMNS = ("kernel", "dtype", "size", "spilled", "tensor cores", "load bits", "registers", "shared KB")


def table(found: list[Build]) -> str:
    """One line a kernel, dtype and size; where the devices differ, "sm_80 / sm_90 / sm_100".

    Several specialisations share a line (with and without bounds, say): it shows the worst of them.
    """
    lines: list[Sequence[str]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for key in sorted({(b.kernel, b.dtype, b.size) for b in found}):
        group = [b for b in found if (b.kernel, b.dtype, b.size) == key]
        devices = [_worst([b for b in group if b.capability == device]) for device in SHARED_LIMITS]
        cells = [" / ".join(cell if len(set(cell)) > 1 else cell[:1]) for cell in zip(*devices, strict=True)]
        lines.append([*map(str, key), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _worst(group: list[Build]) -> list[str]:
    """The cells behind kernel, dtype and size, of builds for one device."""
    if not group:
        return ["not built"] * (len(COLUMNS) - 3)
    load_bits = min((b.load_bits for b in group if b.large_loads), default="")
    cores = ", ".join(sorted({b.tensor_cores for b in group if b.tile_rows}))
    spilled, registers, shared = (
        max(getattr(b, n) for b in group) for n in ("spilled", "registers", "shared")
    )
    return [str(spilled), cores, str(load_bits), str(registers), f"{shared / 1024:.0f}"]


def page(text: str, found: list[Build]) -> str:
    """The page `text` with this table between the markers."""
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\nTriton {triton.__version__}\n\n{table(found)}{MARKERS[1]}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--all", action="store_true", help="widths of other models and float32 as well")
    parser.add_argument("--only", type=int, metavar="SIZE", help="one width of heads, or one vocabulary")
    options = parser.parse_args(arguments)
    if options.write and (options.all or options.only is not None):
        parser.error("--write: the page holds the product's own builds; leave out --all and --only")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    known = PRODUCT + (OTHERS if options.all else [])
    cases = [case for case in known if options.only in (None, case[2])]
    if not cases:
        parser.error(f"--only {options.only}: there are {', '.join(str(case[2]) for case in known)}")
    found = build_all(cases)
    print(f"Triton {triton.__version__}\n\n{table(found)}", end="")
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    broken = [f"sm_{b.capability} {b.kernel} {b.dtype} {b.size}: {f}" for b in found for f in faults(b)]
    sys.exit("\n".join(broken) if broken else 0)
