"""Time the kernels beside their peers, after holding each to the reference.

    python -m kernels.bench                                  # validate, then time everything
    python -m kernels.bench --only decoding                  # only what has this in its name
    python -m kernels.bench --json benchmarks/kernels-gpu.json

First every operation, forward and backward, is compared with reference.py on small shapes; one that is
wrong is not timed. Then each contest runs ours and its peers in turn, so that a GPU that slows down slows
all of them, and the medians count. Peers that are not installed are named, and so are those that refuse a
shape. Every contest states its floor: the floating-point operations and bytes that no implementation can
do without, and the time they take at the rates of a large matrix product and a large copy on the same
device in the same run. "of the ceiling" is that time as a share of the time measured.

Without a GPU the Triton kernels run in Triton's interpreter, which can validate them and says nothing of
their speed: what is timed then are the PyTorch versions, beside plain PyTorch.

Left out: clocks and power (lock them for steady figures), several GPUs.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from math import isnan
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention
from kernels.dev import peers
from kernels.dev.commandline import Parser
from kernels.losses import (
    cross_entropy,
    kl,
    linear_cross_entropy,
    linear_kl,
    linear_token_logprobs,
    token_logprobs,
)  # fmt: skip

LIBRARIES = ("liger-kernel", "quack-kernels", "cut-cross-entropy", "flash-attn", "flash-attn-4")

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: where a process forgets its peak of memory

# --- Validation -----------------------------------------------------------------------------------

# An error is a share of the exact result's largest value. Plain PyTorch in the same dtype errs too; twice
# its error and this are allowed: a unit in the last place of half types, and in float32, where plain PyTorch
# may happen to be right to the last digit, some for sums in another order and powers of two as exponentials.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Check:
    """An operation on small inputs, none of whose sizes divide a block."""

    operation: str
    shapes: tuple[tuple[int, ...], ...]  # of the operands, which have gradients
    rest: tuple[Tensor, ...] = ()


def checks(device: str) -> list[Check]:
    t = torch.arange(37, dtype=torch.int32, device=device)
    start = torch.stack([t // 13 * 13, t - 9])  # packed documents; a window of 10 tokens
    targets = torch.tensor([3, 0, 300, 299, 17], device=device)
    linear = ((5, 24), (301, 24))
    return [
        Check("attention", ((2, 4, 37, 24), (2, 2, 37, 24), (2, 2, 37, 24)), (start,)),
        Check("cross_entropy", ((5, 301),), (targets,)),
        Check("token_logprobs", ((5, 301),), (targets,)),
        Check("kl", ((5, 301),) * 2),
        Check("linear_cross_entropy", linear, (targets,)),
        Check("linear_token_logprobs", linear, (targets,)),
        Check("linear_kl", linear * 2),
    ]


def error(function: Callable, check: Check, dtype: torch.dtype, device: str) -> float:
    """The largest error of its results and gradients, against the reference on the same rounded operands.

    nan counts as infinite.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator) for shape in check.shapes)
    operands = [x.to(device, dtype).requires_grad_() for x in drawn]
    results = as_tuple(function(*operands, *check.rest))
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    gradients = torch.autograd.grad(results, operands, upstream)
    known = [exact(x) for x in (*operands, *check.rest)]
    backward = getattr(reference, f"{check.operation}_backward")
    expected = as_tuple(getattr(reference, check.operation)(*known))
    expected += as_tuple(backward(*map(exact, upstream), *known))
    pairs = zip((*results, *gradients), expected, strict=True)
    shares = [float(abs(exact(x) - y).max() / abs(y).max()) for x, y in pairs]
    return max(float("inf") if isnan(share) else share for share in shares)


def exact(x: Tensor) -> np.ndarray:
    return (x.detach().double() if x.is_floating_point() else x).cpu().numpy()


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def validate(device: str) -> list[dict]:
    """The error of every operation, implementation and dtype; SystemExit naming those that are too large."""
    impls = ("triton", "torch") if find_spec("triton") else ("torch",)
    found, wrong = [], []
    for check, (dtype, floor) in product(checks(device), FLOOR.items()):
        plain = error(getattr(peers, f"plain_{check.operation}"), check, dtype, device)
        for impl in impls:
            ours = error(partial(OPERATIONS[check.operation], impl=impl), check, dtype, device)
            found.append(
                {"operation": check.operation, "impl": impl, "dtype": dtype_name(dtype),
                 "error": ours, "error_of_plain": plain}
            )  # fmt: skip
            if ours > 2 * plain + floor:
                wrong.append(f"{check.operation} ({impl}, {dtype_name(dtype)}) is off by {ours:.1e}")
    if wrong:
        raise SystemExit("\n".join(["error: wrong results, so no times:", *wrong]))
    return found


# --- Contests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """One operation at one size: its operands, those who compute it, and what none of them can do without."""

    operands: tuple[Tensor, ...]
    contestants: peers.Makers
    flops: int  # multiplications and additions of the matrix products
    moved: int  # bytes that must cross between memory and chip
    backward: bool = True


def contests(device: str, quick: bool = False) -> dict[str, Callable[[], Contest]]:
    """Name -> maker, so that the operands of only one contest at a time fill memory."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = QUICK if quick else GPU if device == "cuda" else CPU
    return {
        ", ".join([name, *(f"{letter}={size}" for letter, size in sizes.items())]): partial(
            MAKERS[name.split(",")[0]], name, **sizes, device=device, dtype=dtype
        )
        for name, sizes in found
    }


def attention_contest(name, B, H, K, T, S, C, device, dtype) -> Contest:
    """The last T of S tokens; causal, and of the keys before a query those that the name leaves visible.

    A visible pair of query and key takes 2 C operations in each product: 2 products forward (q k^T, p v),
    5 backward (dv, dp, dq, dk, and the scores again, as the literature counts: nobody has room to keep them).
    Forward reads q, k and v and writes out; backward reads those and d out, and writes three gradients.
    """
    _, pattern, way = name.split(", ")
    # In memory tokens come before heads, as projections leave them and as flash-attn wants them.
    shapes = (B, T, H, C), (B, S, K, C), (B, S, K, C)
    q, k, v = (
        normal(*shape, device=device, dtype=dtype, seed=seed).transpose(1, 2)
        for seed, shape in enumerate(shapes)
    )
    t = torch.arange(S - T, S, device=device)
    window, backward = 1024 if pattern == "window of 1024" else None, way == "both ways"
    first = first_key(pattern, t, S)
    start = None if pattern in ("causal", "decoding") else first.to(torch.int32).repeat(B, 1)
    contestants: peers.Makers = {
        "minillm": lambda: partial(attention, start=start),
        "plain PyTorch": lambda: partial(peers.plain_attention, start=start),
    }
    if device == "cuda":
        contestants |= peers.attention_peers(start, window, grouped=H != K)
    pairs = B * H * int((t + 1 - first).sum())
    forward_bytes = 2 * (q.numel() + k.numel()) * dtype.itemsize
    flops, moved = (14 * C * pairs, 3 * forward_bytes) if backward else (4 * C * pairs, forward_bytes)
    return Contest((q, k, v), contestants, flops, moved, backward)


def first_key(pattern: str, t: Tensor, S: int) -> Tensor:
    """The first key that each query at position t of S sees."""
    if pattern == "window of 1024":
        return (t - 1023).clamp(min=0)
    sixteenths = [0, 1, 4, 5, 10, 13] if pattern == "packed documents" else [0]
    edges = torch.tensor(sixteenths, device=t.device) * S // 16
    return edges[torch.bucketize(t, edges, right=True) - 1]


def logits_contest(operation, N, V, device, dtype) -> Contest:
    """Forward and backward read the logits once, if a row stays on the chip, and write one gradient."""
    count = 2 if operation == "kl" else 1
    operands = tuple(normal(N, V, device=device, dtype=dtype, seed=seed) for seed in range(count))
    moved = 2 * len(operands) * N * V * dtype.itemsize
    return Contest(operands, row_contestants(operation, N, V, device), flops=0, moved=moved)


def linear_contest(operation, N, D, V, device, dtype) -> Contest:
    """Three products of 2 N D V operations for each output matrix: the logits, d hidden, d weight."""
    shapes = ((N, D), (V, D)) * (2 if operation == "linear_kl" else 1)
    operands = tuple(
        normal(*shape, device=device, dtype=dtype, seed=seed) * D**-0.25 for seed, shape in enumerate(shapes)
    )
    flops, moved = (len(shapes) // 2 * x for x in (6 * N * D * V, 2 * (N + V) * D * dtype.itemsize))
    return Contest(operands, row_contestants(operation, N, V, device), flops, moved)


def row_contestants(operation: str, N: int, V: int, device: str) -> peers.Makers:
    """Ours, plain PyTorch, on a GPU the same compiled, and whichever libraries have the operation."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    rest = {} if operation in ("kl", "linear_kl") else {"targets": targets}
    ours, plain = OPERATIONS[operation], partial(getattr(peers, f"plain_{operation}"), **rest)
    found: peers.Makers = {"minillm": lambda: partial(ours, **rest), "plain PyTorch": lambda: plain}
    if device == "cuda":
        found["torch.compile"] = lambda: torch.compile(plain)
    return found | peers.row_peers(operation, targets)


OPERATIONS: dict[str, Callable] = {
    "attention": attention,
    "cross_entropy": cross_entropy,
    "token_logprobs": token_logprobs,
    "kl": kl,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_token_logprobs": linear_token_logprobs,
    "linear_kl": linear_kl,
}


MAKERS: dict[str, Callable[..., Contest]] = {
    "attention": attention_contest,
    **dict.fromkeys(("cross_entropy", "token_logprobs", "kl"), logits_contest),
    **dict.fromkeys(("linear_cross_entropy", "linear_token_logprobs", "linear_kl"), linear_contest),
}


def normal(*shape: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


LONG = {"B": 2, "H": 16, "K": 16, "T": 8192, "S": 8192}
LARGE = {"N": 8192, "D": 4096, "V": 128256}
GPU = [
    *((f"attention, causal, {way}", LONG | {"C": C}) for C in (64, 128) for way in ("forward", "both ways")),
    ("attention, packed documents, forward", LONG | {"C": 128}),
    ("attention, packed documents, both ways", LONG | {"C": 128}),
    ("attention, window of 1024, forward", LONG | {"C": 128}),
    ("attention, window of 1024, both ways", LONG | {"C": 128}),
    ("attention, decoding, forward", {"B": 64, "H": 32, "K": 8, "T": 1, "S": 4096, "C": 128}),
    *(("cross_entropy", {"N": 8192, "V": V}) for V in (32000, 50257, 128256)),
    ("token_logprobs", {"N": 8192, "V": 128256}),
    ("kl", {"N": 8192, "V": 128256}),
    ("linear_cross_entropy", LARGE),
    ("linear_token_logprobs", LARGE),
    ("linear_kl", LARGE),
]
CPU = [
    ("attention, causal, both ways", {"B": 4, "H": 4, "K": 4, "T": 1024, "S": 1024, "C": 64}),
    ("attention, packed documents, both ways", {"B": 4, "H": 4, "K": 4, "T": 1024, "S": 1024, "C": 64}),
    ("attention, decoding, forward", {"B": 16, "H": 8, "K": 2, "T": 1, "S": 2048, "C": 64}),
    *(
        (name, sizes)
        for name in ("linear_cross_entropy", "linear_token_logprobs", "linear_kl")
        for sizes in ({"N": 4096, "D": 128, "V": 1024}, {"N": 2048, "D": 512, "V": 32768})
    ),
]
QUICK = [
    ("attention, packed documents, both ways", {"B": 1, "H": 4, "K": 2, "T": 128, "S": 128, "C": 32}),
    ("attention, decoding, forward", {"B": 2, "H": 4, "K": 2, "T": 1, "S": 128, "C": 32}),
    ("cross_entropy", {"N": 16, "V": 1001}),
    ("linear_cross_entropy", {"N": 2048, "D": 16, "V": 4096}),
    ("linear_kl", {"N": 64, "D": 32, "V": 1001}),
]

# --- Measuring ------------------------------------------------------------------------------------


def prepare(contest: Contest, who: str) -> Callable[[], Tensor]:
    """One whole run of a contestant, which gives its first result.

    It has operands of its own: some peers write their gradients over the logits.
    """
    function = contest.contestants[who]()
    operands = [x.clone().requires_grad_(contest.backward) for x in contest.operands]
    upstream: list[Tensor] = []  # filled by the first run

    def run() -> Tensor:
        with torch.set_grad_enabled(contest.backward):
            results = as_tuple(function(*operands))
            if not upstream:
                upstream.extend(torch.ones_like(x) for x in results)
            if contest.backward:
                torch.autograd.grad(results, operands, upstream)
        return results[0].detach()

    return run


def milliseconds(run: Callable, flush: Tensor | None) -> float:
    """One run. On a GPU `flush`, larger than its cache, is overwritten first: the operands come from memory,
    and while that goes on the launches of the run queue up behind it."""
    if flush is None:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in this run: a large matrix product and a large copy."""

    flops: float  # a second
    moved: float  # bytes a second, read and written

    def milliseconds(self, contest: Contest) -> float:
        """What nobody can be faster than."""
        return 1e3 * max(contest.flops / self.flops, contest.moved / self.moved)


def ceilings(device: str, dtype: torch.dtype, flush: Tensor | None) -> Ceilings:
    """The best of many runs: others on the machine only ever lower it."""
    n, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    a, source = (
        normal(n, n, device=device, dtype=dtype, seed=0),
        torch.ones(size, dtype=torch.uint8, device=device),
    )
    target = torch.empty_like(source)
    work = (lambda: a @ a, lambda: target.copy_(source))
    product_ms, copy_ms = (min(milliseconds(run, flush) for _ in range(40)) for run in work)
    return Ceilings(2e3 * n**3 / product_ms, 2e3 * size / copy_ms)


def measure(contest: Contest, limits: Ceilings, runs: int, flush: Tensor | None = None) -> dict:
    """The record of one contest, but for memory; contestants run in turn."""
    ready, results, missing = {}, {}, {}
    for who in contest.contestants:
        try:
            ready[who] = prepare(contest, who)
            results[who] = ready[who]().double()
        except Exception as problem:  # a peer that is absent or refuses this shape is news, not an end
            if who == "minillm":
                raise
            missing[who] = f"{type(problem).__name__}: {problem}".split("\n")[0]
            ready.pop(who, None)
    if flush is not None:  # on a GPU allocators and clocks settle over the first runs
        [run() for run in (*ready.values(), *ready.values())]
    times: dict[str, list[float]] = {who: [] for who in ready}
    for _ in range(runs):
        for who, run in ready.items():
            times[who].append(milliseconds(run, flush))
    medians = {who: median(t) for who, t in times.items()}
    others = {who: t for who, t in medians.items() if who != "minillm"}
    ours, floor = medians["minillm"], limits.milliseconds(contest)
    return {
        "dtype": dtype_name(contest.operands[0].dtype),
        "milliseconds": times,
        "median": medians,
        "ratio": {who: t / ours for who, t in others.items()},  # above 1: ours is faster
        "best_peer": min(others, key=others.__getitem__, default=None),
        "difference": {who: difference(x, results["minillm"]) for who, x in results.items()},
        "floor": {"flops": contest.flops, "bytes": contest.moved, "milliseconds": floor},
        "share_of_ceiling": {who: floor / t for who, t in medians.items()},
        "missing": missing,
    }


def difference(x: Tensor, ours: Tensor) -> float:
    """The largest, as a share of our largest value: a peer that computes something else is no peer."""
    return float((x - ours).abs().max() / ours.abs().max())


@contextmanager
def peaks(device: str, quick: bool) -> Iterator[Callable[[str, Contest, str], int | None]]:
    """Gives the function (name of a contest, contest, contestant) -> bytes that one run takes at its peak, on
    top of the operands. On a CPU only Linux tells: in a process of its own, which lives as long as this."""
    if device == "cuda":
        yield lambda _, contest, who: peak_on_gpu(prepare(contest, who))
    elif not CLEAR_REFS.exists():
        yield lambda *_: None
    else:
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=_return_memory) as pool:
            yield lambda name, _, who: pool.submit(_peak_on_cpu, name, quick, who).result()


def peak_on_gpu(run: Callable) -> int:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _return_memory() -> None:
    """glibc keeps freed blocks of up to 32 MB for later; then one run would hide what the next one takes."""
    CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: larger ones are the kernel's, and go back to it


def _peak_on_cpu(contest: str, quick: bool, who: str) -> int:
    run = prepare(contests("cpu", quick)[contest](), who)
    run()  # what the first use loads is not counted
    CLEAR_REFS.write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- The program ----------------------------------------------------------------------------------


def lines(contest: str, record: dict) -> Iterator[str]:
    """The floor, a line for each contestant, fastest first, and one for each that is missing."""
    floor, ours = record["floor"], record["median"]["minillm"]
    yield (
        f"{contest} ({record['dtype']}): no less than {floor['flops'] / 1e9:.3g} GFLOP and"
        f" {floor['bytes'] / 1e6:.3g} MB, here {floor['milliseconds']:.3f} ms"
    )
    for who, ms in sorted(record["median"].items(), key=lambda item: item[1]):
        peak = record["peak_bytes"][who]
        memory = "?" if peak is None else f"{peak / 1e6:.1f}"
        yield (
            f"  {who:20} {ms:10.3f} ms {ms / ours:6.2f}x {floor['flops'] / ms / 1e9:9.3g} TFLOP/s"
            f" {floor['bytes'] / ms / 1e6:9.3g} GB/s {floor['milliseconds'] / ms:6.1%} of the ceiling"
            f" {memory:>9} MB, differs by {record['difference'][who]:.0e}"
        )
    for who, why in record["missing"].items():
        yield f"  {who:20} not timed: {why}"


def run(device: str, only: str, quick: bool, runs: int) -> dict:
    """Validate, then all contests with `only` in their names; prints as it goes and returns the record."""
    validation = validate(device)
    print(f"{len(validation)} validations against the float64 reference passed")
    if device == "cpu":
        print("No GPU: the Triton kernels were validated in their interpreter, and none of them is timed.")
    absent = [name for name, version in libraries().items() if version is None]
    print(f"peers not installed: {', '.join(absent) or 'none'}")
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device == "cuda" else None
    limits = ceilings(device, torch.bfloat16 if device == "cuda" else torch.float32, flush)
    print(
        f"ceilings: {limits.flops / 1e12:.3f} TFLOP/s in a product, {limits.moved / 1e9:.1f} GB/s by copying"
    )
    results = {}
    with peaks(device, quick) as peak:
        for name, make in contests(device, quick).items():
            if only in name:
                contest = make()
                record = results[name] = measure(contest, limits, runs, flush)
                record["peak_bytes"] = {who: peak(name, contest, who) for who in record["median"]}
                print(*lines(name, record), sep="\n", flush=True)
    return {"validation": validation, "ceilings": vars(limits), "contests": results}


def libraries() -> dict[str, str | None]:
    """The versions of the peers' packages, None for those that are absent."""
    installed = {d.name: d.version for d in metadata.distributions()}
    return {name: installed.get(name) for name in LIBRARIES}


def where(device: str) -> dict:
    """The machine, the versions and the commit behind the figures.

    Kernels know nothing of minillm. This module is a script as much as train.py, though, and a script may:
    the import stays here, out of reach of everything that imports `kernels`.
    """
    from minillm.tools.provenance import provenance

    found = provenance() | {"libraries": libraries(), "threads": torch.get_num_threads(), "gpu": None}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the figures with their provenance here")
    parser.add_argument("--only", default="", metavar="NAME", help="contests with this in their names (all)")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each contestant (7)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: give at least 1")
    names = list(contests(device, options.quick))
    if not any(options.only in name for name in names):
        parser.error(f"--only {options.only!r}: in no contest's name; these are {', '.join(names)}")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        parser.error(f"--json {options.json}: is a folder, or in none; give a file in a folder that exists")
    if device == "cpu":  # Triton reads it when the first kernel is imported, which validation does
        os.environ["TRITON_INTERPRET"] = "1"
    record = run(device, options.only, options.quick, options.runs)
    if options.json:
        options.json.write_text(json.dumps(where(device) | record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
