"""The compile gate: the kernels that the product launches, built for three GPUs on a machine with none.

    python -m kernels.gate                    # builds, and prints the table
    python -m kernels.gate --write            # and puts the table into docs/kernels.md
    python -m kernels.gate --sizes 96 256     # heads of other widths, other vocabularies

Triton's interpreter shows that a kernel is right and nothing of the code a GPU gets. Triton's compiler needs
no GPU, though: a driver that claims to be an A100, an H100 or a B200 is all it asks for. So the gate runs
real steps of a model of one block on CPU tensors (a training step, a policy step, a sampling step) and turns
every launch into a build. Nothing is launched and no result means anything, but each kernel is compiled in
the very specialisation, to dtypes, strides, alignments and options, in which the product launches it.

What a build must be to pass, tests/test_gate.py says and holds. Left out: speed, which only a GPU can tell
(bench.py), and results, which other tests hold; float32.
"""

import os
import re
import signal
import subprocess
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

from benchmarks.harness import Parser, at_least_one
from kernels import attention, losses

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
MARKERS = ("<!-- gate: begin -->", "<!-- gate: end -->")

CAPABILITIES = (80, 90, 100)  # A100, H100, B200
# Blocks of fewer elements are not worth a rule: a thread may have less than 128 bits of them.
LARGE_BLOCK = 1024

# What the product launches: the widths of heads that the dial of depth leads to, and GPT-2's vocabulary,
# whose rows of logits are padded. A size up to WIDEST, the most that the kernels take, is a width of heads.
SIZES, WIDEST, DTYPE = [32, 64, 128, 50257], 256, torch.bfloat16


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one device; `size` is a head width or a vocabulary."""

    capability: int
    kernel: str
    size: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    tile_rows: int  # of its largest product of half types; 0 without one
    tensor_cores: str  # the newest instruction in it, "" for none
    load_bits: int  # its widest load from global memory; 128 where it reads no block of LARGE_BLOCK elements


# --- From a step to builds ------------------------------------------------------------------------


def attention_steps(width: int) -> None:
    """Training over packed documents, and sampling: prompts of two lengths and one token more."""
    from minillm.model import KVCache

    model, tokens = _model(width, 256)
    model.model(tokens, torch.zeros_like(tokens, dtype=torch.int32)).sum().backward()
    with torch.inference_mode():
        cache = KVCache(model, len(tokens), 256)
        cache.prefill(tokens, torch.tensor([128, 64]))
        cache.step(tokens[:, 0])


def row_steps(vocabulary: int) -> None:
    """The loss of a step of train.py, and the log-probabilities, entropies and KL of one of PPO."""
    model, tokens = _model(64, vocabulary)
    hidden = torch.randn(256, 64, dtype=DTYPE, requires_grad=True)
    other = hidden.detach(), model.lm_head.weight.detach()
    losses.linear_cross_entropy(hidden, model.lm_head.weight, tokens.flatten(), reduction="sum").backward()
    said = model.token_logprobs(hidden, tokens.flatten(), 0.7, None, other)
    torch.stack(said).sum().backward()


def _model(width: int, vocabulary: int):
    """A model of one block with two heads, and two rows of tokens for it."""
    from minillm.model import LanguageModel, config_of_depth

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": width}
    config = config_of_depth(2, vocabulary, 256, **shape)
    return LanguageModel(config, DTYPE), torch.zeros(2, 128, dtype=torch.int64)


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
        patch.object(losses, "check", lambda *_, **__: "triton"),
        patch.object(attention, "check", lambda *_, **__: "triton"),
    ):
        yield compiled


def inspect(compiled: CompiledKernel, capability: int, size: int) -> Build:
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
    plain = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsfu](\d+)\b", ptx)
    # Asynchronous copies count too: cp.async states its bytes, the tensor engine moves lines.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], .*?\], (0x[0-9a-f]+|\d+)", ptx)
    widths = [int(n or 1) * int(bits) for n, bits in plain] + [8 * int(count, 0) for count in copies]
    widths += [128] * ("cp.async.bulk" in ptx)
    large = any(int(a or 1) * int(b) >= LARGE_BLOCK for a, b in loads)
    return Build(
        capability, compiled.metadata.name, size, int(registers), int(stack), compiled.metadata.shared,
        tile_rows=max(rows, default=0), tensor_cores=kinds[0] if kinds else "",
        load_bits=max(widths, default=0) if large else 128,
    )  # fmt: skip


def builds(steps: Callable[[int], None], size: int, capability: int) -> list[Build]:
    """What the steps launch, each kernel and specialisation once."""
    with compiling(capability) as compiled:
        steps(size)
    return [inspect(kernel, capability, size) for kernel in {x.hash: x for x in compiled}.values()]


def build_all(sizes: Sequence[int]) -> list[Build]:
    """What these sizes lead to on all devices, in as many processes as there are cores."""
    steps = [(attention_steps if size <= WIDEST else row_steps, size) for size in sizes]
    jobs = [(*of_size, capability) for of_size in steps for capability in CAPABILITIES]
    # Fresh processes: torch's threads do not survive a fork. Ctrl-C just ends them.
    quiet = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), *quiet) as pool:
        return [build for job in [pool.submit(builds, *job) for job in jobs] for build in job.result()]


# --- The table ------------------------------------------------------------------------------------

# The worst of several specialisations of a kernel (with and without bounds, say) on one device.
COLUMNS: dict[str, Callable[[list[Build]], object]] = {
    "spilled": lambda own: max(b.spilled for b in own),
    "tensor cores": lambda own: ", ".join(sorted({b.tensor_cores for b in own if b.tile_rows})),
    "load bits": lambda own: min(b.load_bits for b in own),
    "registers": lambda own: max(b.registers for b in own),
    "shared KB": lambda own: f"{max(b.shared for b in own) / 1024:.0f}",
}


def table(found: list[Build]) -> str:
    """A line for each kernel and size; "sm_80 / sm_90 / sm_100" where the devices differ."""
    lines: list[list[str]] = [["kernel", "size", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for kernel, size in sorted({(b.kernel, b.size) for b in found}):
        group = [b for b in found if (b.kernel, b.size) == (kernel, size)]
        devices = [[b for b in group if b.capability == device] for device in CAPABILITIES]
        cells = [[str(worst(own)) if own else "not built" for own in devices] for worst in COLUMNS.values()]
        lines.append([kernel, str(size), *(" / ".join(c if len({*c}) > 1 else c[:1]) for c in cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str, found: list[Build]) -> str:
    """The page `text` with this table between the markers."""
    before, after = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\nTriton {triton.__version__}\n\n{table(found)}{MARKERS[1]}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    help = f"widths of heads, up to {WIDEST}, and vocabularies"
    parser.add_argument("--sizes", nargs="+", type=at_least_one, default=SIZES, metavar="SIZE", help=help)
    options = parser.parse_args(arguments)
    if options.write and options.sizes != SIZES:
        parser.error("--write: the page holds the product's own builds; leave out --sizes")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    found = build_all(options.sizes)
    print(f"Triton {triton.__version__}\n\n{table(found)}", end="")
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
