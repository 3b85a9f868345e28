"""The rules of the compile gate (kernels/dev/gate.py), and that every kernel keeps them; what it says of toys
that break one, and that the table in docs/kernels.md is true.

Builds run in processes without Triton's interpreter, which cannot be switched off once imported. Sources of
the rules: NVIDIA, "CUDA C++ Programming Guide", section "Compute Capabilities" (shared memory per block);
"PTX ISA", sections "mma", "wgmma.mma_async" and "tcgen05.mma" (tile sizes).
"""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import triton
from runs import ROOT

import kernels.attention
from kernels import attention_triton
from kernels.dev import gate
from kernels.dev.gate import CAPABILITIES, MARKERS, PAGE, SIZES, Build, page, table

# By compute capability: the bytes of shared memory that one block may use, and the newest tensor-core
# instruction. Tiles of under 64 rows can fill none but the oldest.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
# (capability, kernel, size): bytes a thread may spill where that is the better choice. Here ptxas stops at
# 128 registers, which let another block onto the multiprocessor.
SPILLS = {(80, "_backward_dq", 32): 8}

# Columns of the table that hold for any version of Triton: kernel, size and what the rules assert.
ASSERTED = 5


def faults(build: Build) -> list[str]:
    """The rules a build breaks: no register is spilled to memory, or no more than SPILLS allows; a block's
    shared memory is what the device has; every product of half types runs on the newest tensor cores that
    its tile can fill; large blocks are read 128 bits at a time."""
    allowed = SPILLS.get((build.capability, build.kernel, build.size), 0)
    limit, newest = SHARED_LIMITS[build.capability], TENSOR_CORES[build.capability]
    wanted = newest if build.tile_rows >= 64 else TENSOR_CORES[80]
    slow = build.tile_rows > 0 and build.tensor_cores not in (wanted, newest)
    broken = {
        f"spills {build.spilled} bytes a thread, {allowed} are allowed": build.spilled > allowed,
        f"needs {build.shared} bytes of shared memory, the device has {limit}": build.shared > limit,
        f"multiplies with {build.tensor_cores or 'no tensor cores'} instead of {wanted}": slow,
        f"loads at most {build.load_bits} bits at a time": build.load_bits < 128,
    }
    return [fault for fault, is_broken in broken.items() if is_broken]


# The kernels, and after them their launches: one that breaks no rule, then one a rule.
TOYS = """
import json, sys
from dataclasses import asdict
import torch, triton, triton.language as tl
from kernels.dev.gate import CAPABILITIES, builds

@triton.jit
def copies(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at + n) + 1)

@triton.jit
def strided(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + n * at))

@triton.jit
def hoards(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    kept = tl.load(x + at)
    for i in range(n):
        kept += tl.load(x + at + 16 * i) * kept
    tl.store(x + at, kept)

@triton.jit
def multiplies(x, n, ROWS: tl.constexpr):
    rows, inner = tl.arange(0, ROWS)[:, None] * 64, tl.arange(0, 64)
    y = tl.zeros((ROWS, 64), tl.float32)
    for i in range(n):
        a = tl.load(x + i * 64 + rows + inner)
        b = tl.load(x + i * 64 + 64 * inner[:, None] + inner)
        y = tl.dot(a, b, y)
    tl.store(x + rows + inner, y.to(x.dtype.element_ty))

def toys(size):
    x = torch.zeros(1 << 16, dtype=torch.float16)
    copies[(1,)](x, 1024, BLOCK=2048)
    copies[(1,)](x, 2048, BLOCK=2048)  # the same specialisation: built once
    strided[(1,)](x, 7, BLOCK=2048)
    hoards[(1,)](x, 7, BLOCK=1 << 15, num_warps=1)
    multiplies[(1,)](x, 7, ROWS=64)
    multiplies[(1,)](x, 7, ROWS=16)
    multiplies[(1,)](x, 7, ROWS=64, num_warps=2)  # newer tensor cores need four warps
    multiplies[(1,)](x, 7, ROWS=128, num_stages=12)

json.dump([asdict(build) for capability in CAPABILITIES for build in builds(toys, 7, capability)], sys.stdout)
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def built(*command: str) -> list[Build]:
    """What a script of Python builds, which it prints as JSON."""
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return [Build(**one) for one in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> list[Build]:
    """What the gate says of each toy, in the order of their launches, for each device."""
    script = tmp_path_factory.mktemp("toys") / "toys.py"  # Triton reads a kernel's source from its file
    script.write_text(TOYS)
    return built(str(script))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_broken_rule_is_reported_and_no_other(toys, capability):
    newest = TENSOR_CORES[capability]
    expected = [
        ("copies", []),
        ("strided", ["loads at most 16 bits at a time"]),
        ("hoards", ["spills"]),
        ("multiplies", []),
        ("multiplies", []),
        ("multiplies", [f"multiplies with mma instead of {newest}"] if newest != "mma" else []),
        ("multiplies", ["needs"]),
    ]
    own = [build for build in toys if build.capability == capability]
    for build, (kernel, words) in zip(own, expected, strict=True):
        assert build.kernel == kernel
        assert len(faults(build)) == len(words), build
        assert all(map(str.startswith, faults(build), words)), build
    large, small = own[3:5]  # the newest that a tile can fill
    assert (large.tile_rows, large.tensor_cores) == (64, newest)
    assert (small.tile_rows, small.tensor_cores) == (16, "mma")


GOOD = Build(90, "forward", 64, 128, 0, 64 << 10, 64, "wgmma", 128)
SPILLED = "spills 8 bytes a thread, 0 are allowed"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spilled": 8}, None),  # as SPILLS allows this kernel, and no more
        ({"spilled": 12}, "spills 12 bytes a thread, 8 are allowed"),
        ({"spilled": 8, "size": 128}, SPILLED),
        ({"shared": 227 << 10}, None),
        ({"shared": (227 << 10) + 1}, "needs 232449 bytes of shared memory, the device has 232448"),
        ({"capability": 80, "tensor_cores": "mma", "shared": (163 << 10) + 1}, "needs 166913 bytes"),
        ({"tensor_cores": ""}, "multiplies with no tensor cores instead of wgmma"),
        ({"tensor_cores": "mma"}, "multiplies with mma instead of wgmma"),
        ({"tile_rows": 16, "tensor_cores": ""}, "multiplies with no tensor cores instead of mma"),
        ({"tile_rows": 16}, None),  # newer than it need be
        ({"load_bits": 64}, "loads at most 64 bits at a time"),
    ],
)
def test_every_rule_can_fail_at_its_bound_and_exceptions_have_bounds_too(change, fault, monkeypatch):
    monkeypatch.setitem(SPILLS, (90, "forward", 64), 8)
    found = faults(replace(GOOD, **change))
    assert faults(GOOD) == [] and len(found) == (fault is not None)
    assert not found or found[0].startswith(fault)


def test_a_line_of_the_table_shows_the_worst_of_its_builds_for_each_device():
    two = ((100, 80, 32), (120, 60, 128))
    found = [replace(GOOD, registers=r, shared=s << 10, load_bits=bits) for r, s, bits in two]
    found.append(replace(GOOD, capability=80, tensor_cores="mma", registers=90, load_bits=64))
    [_, _, line] = table(found).splitlines()
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "forward", "64", "0 / 0 / not built", "mma / wgmma / not built", "64 / 32 / not built",
        "90 / 120 / not built", "64 / 80 / not built",
    ]  # fmt: skip


def test_writing_the_table_keeps_the_page_around_it_and_is_stable():
    before, after = "# Kernels\n\n", "\nThe end.\n"
    once = page(before + "\n".join(MARKERS) + after, [GOOD])
    assert once.startswith(before + MARKERS[0]) and once.endswith(MARKERS[1] + after)
    assert table([GOOD]) in once
    assert page(once, [GOOD]) == once


@pytest.mark.parametrize("interpret", [False, True])
def test_the_gate_prints_its_table_or_says_that_nothing_would_be_compiled(interpret, monkeypatch, capsys):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    monkeypatch.setattr(gate, "build_all", lambda sizes: [replace(GOOD, size=size) for size in sizes])
    with pytest.raises(SystemExit, match="2") if interpret else nullcontext():
        gate.main(["--sizes", "64"])
    shown = capsys.readouterr()
    assert ("error: TRITON_INTERPRET is set" in shown.err) == interpret
    assert (table([GOOD]) in shown.out) != interpret


def test_the_code_in_the_docs_is_the_code():
    """But for indentation: an excerpt begins at the margin, however deep it stands in its file."""

    def flush_left(code: str) -> str:
        return "".join(line.strip() + "\n" for line in code.splitlines())

    sources = [flush_left(file.read_text(encoding="utf-8")) for file in (ROOT / "kernels").glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        assert any(flush_left(block) in source for source in sources), block


ALL = """
import json, sys
from dataclasses import asdict
from kernels.dev.gate import build_all
if __name__ == "__main__":
    json.dump([asdict(build) for build in build_all(list(map(int, sys.argv[1:])))], sys.stdout)
"""


@pytest.mark.parametrize("sizes", [[64], pytest.param(SIZES, marks=pytest.mark.slow)], ids=str)
def test_every_kernel_passes_the_gate_and_the_table_in_the_docs_is_true(sizes):
    """Rules and asserted columns hold for any Triton; registers and shared memory are one version's own."""
    found = built("-c", ALL, *map(str, sizes))
    broken = [(build, faults(build)) for build in found if faults(build)]
    assert found and not broken, broken
    done = run("-m", "kernels.gate", "--sizes", *map(str, sizes))
    assert done.returncode == 0 and done.stdout.endswith("\n\n" + table(found)), done.stderr
    written = PAGE.read_text(encoding="utf-8").split(MARKERS[0])[1].split(MARKERS[1])[0]
    version, documented = written.strip("\n").split("\n\n")
    exact = version == f"Triton {triton.__version__}"
    lines, documented = columns(table(found), exact), columns(documented, exact)
    for line in lines[2:]:
        assert line in documented
    assert sizes != SIZES or len(lines) == len(documented)


def columns(lines: str, every: bool) -> list[list[str]]:
    return [
        line.strip("| ").split(" | ")[: None if every else ASSERTED] for line in lines.strip().splitlines()
    ]


def test_the_gate_builds_what_a_step_launches_with_gradients_as_a_model_leaves_them():
    """Behind a projection the upstream gradient of attention is dense; that of a sum has strides of 0."""
    launched = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((self.name, arguments, options))

    names = ["_forward", "_backward_dq", "_backward_dkdv", "_list_row_blocks"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.attention, "check", lambda *_: "triton")
        for name in names:
            patch.setattr(attention_triton, name, Watched(name))
        gate.attention_steps(16)
    assert sorted({name for name, *_ in launched}) == sorted(names)
    [(d_out, strides)] = [arguments[6] for name, arguments, _ in launched if name == "_backward_dq"]
    assert 0 not in strides and d_out.shape[1:] == (2, 128, 16)
    forward = [arguments for name, arguments, _ in launched if name == "_forward"]
    assert [x[3] is not None for x in forward] == [True, False, False]  # packed; a prompt; one token more
    assert [x[0][0].shape[2] for x in forward] == [128, 128, 1]


def test_every_operation_takes_the_way_of_a_gpu_whatever_it_has_checked():
    with gate.compiling(90):
        assert kernels.attention.check({}, {}, None) == "triton"
        assert gate.losses.check({}, {}, None, reduction="sum", temperature=0.7) == "triton"
