"""Time the kernels beside their peers, after holding each to plain PyTorch in float64.

    python -m kernels.bench                                  # validate, then time everything
    python -m kernels.bench --only decoding                  # only what has this in its name
    python -m kernels.bench --json benchmarks/kernels-gpu.json

An operation that is wrong on small shapes, forward or backward, is not timed. Each contest runs ours and its
peers in turn, so that a GPU that slows down slows all of them, and the medians count. Peers that are not
installed are named, and so are those that refuse a shape. Every contest states its floor: the floating-point
operations and bytes that no implementation can do without, and the time they take at the rates of a large
matrix product and a large copy on the same device in the same run. "of the ceiling" is that time as a share
of the time measured.

Without a GPU the Triton kernels run in Triton's interpreter, which can validate them and says nothing of
their speed: what is timed then are the PyTorch versions, beside plain PyTorch.

Left out: clocks and power (lock them for steady figures), several GPUs, peaks of memory on a CPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from math import isnan

import torch
from torch import Tensor

from benchmarks.harness import in_turn, medians, parser, timed, write
from kernels import losses
from kernels.attention import attention
from kernels.dev import peers
from kernels.dev.peers import LINEAR, LOGITS, PLAIN

LIBRARIES = ("liger-kernel", "quack-kernels", "cut-cross-entropy", "flash-attn", "flash-attn-4")
OPERATIONS: dict[str, Callable] = {"attention": attention, **{n: getattr(losses, n) for n in LOGITS + LINEAR}}

# --- Contests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """One operation at one size: its operands, those who compute it, and what none of them can do without."""

    operands: tuple[Tensor, ...]
    contestants: peers.Makers
    flops: int  # multiplications and additions of the matrix products
    moved: int  # bytes that must cross between memory and chip
    backward: bool = True


def contests(table: list, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Contest]]:
    """Name -> maker, so that the operands of only one contest at a time fill memory."""
    found: dict[str, Callable[[], Contest]] = {}
    for name, sizes in table:
        make = attention_contest if name.startswith("attention") else row_contest
        of_sizes = [f"{letter}={size}" for letter, size in sizes.items()]
        found[", ".join([name, *of_sizes])] = partial(make, name, **sizes, device=device, dtype=dtype)
    return found


def attention_contest(name, B, H, K, T, S, C, device, dtype) -> Contest:
    """The last T of S tokens; causal, and of the keys before a query those that the name leaves visible.

    A visible pair of query and key takes 2 C operations in each product: 2 products forward (q k^T, p v),
    5 backward (dv, dp, dq, dk, and the scores again, as the literature counts: nobody has room to keep them).
    Forward reads q, k and v and writes out; backward reads those and d out, and writes three gradients.
    """
    _, pattern, way = name.split(", ")
    # In memory tokens come before heads, as projections leave them and as flash-attn wants them.
    shapes = (B, T, H, C), (B, S, K, C), (B, S, K, C)
    q, k, v = (x.transpose(1, 2) for x in normal(shapes, device, dtype))
    t = torch.arange(S - T, S, device=device)
    first = first_key(pattern, t, S)
    start = None if pattern in ("causal", "decoding") else first.to(torch.int32).repeat(B, 1)
    contestants: peers.Makers = {
        "minillm": lambda: partial(OPERATIONS["attention"], start=start),
        "plain PyTorch": lambda: partial(PLAIN["attention"], start=start),
    }
    if device == "cuda":
        window = 1024 if pattern == "window of 1024" else None
        contestants |= peers.attention_peers(start, window, grouped=H != K)
    pairs, backward = B * H * int((t + 1 - first).sum()), way == "both ways"
    moved = 2 * (q.numel() + k.numel()) * dtype.itemsize * (3 if backward else 1)
    return Contest((q, k, v), contestants, (14 if backward else 4) * C * pairs, moved, backward)


def first_key(pattern: str, t: Tensor, S: int) -> Tensor:
    """The first key that each query at position t of S sees."""
    if pattern == "window of 1024":
        return (t - 1023).clamp(min=0)
    sixteenths = [0, 1, 4, 5, 10, 13] if pattern == "packed documents" else [0]
    edges = torch.tensor(sixteenths, device=t.device) * S // 16
    return edges[torch.bucketize(t, edges, right=True) - 1]


def row_contest(operation, N, V, device, dtype, D: int | None = None) -> Contest:
    """Over logits: they are read once, if a row stays on the chip, and one gradient is written. Over hidden
    states: three products of 2 N D V operations a matrix (the logits, d hidden, d weight)."""
    sides = 2 if "kl" in operation else 1
    operands = normal((((N, D), (V, D)) if D else ((N, V),)) * sides, device, dtype)
    if D:
        operands = tuple(x * D**-0.25 for x in operands)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    rest = {} if sides == 2 else {"targets": targets}
    plain = partial(PLAIN[operation], **rest)
    found: peers.Makers = {
        "minillm": lambda: partial(OPERATIONS[operation], **rest),
        "plain PyTorch": lambda: plain,
    }
    if device == "cuda":
        found["torch.compile"] = lambda: torch.compile(plain)
    moved = 2 * sum(x.numel() for x in operands) * dtype.itemsize
    return Contest(operands, found | peers.row_peers(operation, targets), sides * 6 * N * (D or 0) * V, moved)


def normal(shapes, device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)


LONG = {"B": 2, "H": 16, "K": 16, "T": 8192, "S": 8192}
BOTH = ("forward", "both ways")
GPU: list = [
    *((f"attention, causal, {way}", LONG | {"C": C}) for C in (64, 128) for way in BOTH),
    *((f"attention, packed documents, {way}", LONG | {"C": 128}) for way in BOTH),
    *((f"attention, window of 1024, {way}", LONG | {"C": 128}) for way in BOTH),
    ("attention, decoding, forward", {"B": 64, "H": 32, "K": 8, "T": 1, "S": 4096, "C": 128}),
    *(("cross_entropy", {"N": 8192, "V": V}) for V in (32000, 50257, 128256)),
    *((name, {"N": 8192, "V": 128256}) for name in LOGITS[1:]),
    *((name, {"N": 8192, "D": 4096, "V": 128256}) for name in LINEAR),
]
SHORT = {"B": 4, "H": 4, "K": 4, "T": 1024, "S": 1024, "C": 64}
SIZES = ({"N": 4096, "D": 128, "V": 1024}, {"N": 2048, "D": 512, "V": 32768})
CPU: list = [
    *((f"attention, {pattern}, both ways", SHORT) for pattern in ("causal", "packed documents")),
    ("attention, decoding, forward", {"B": 16, "H": 8, "K": 2, "T": 1, "S": 2048, "C": 64}),
    *((name, sizes) for name in LINEAR for sizes in SIZES),
]
SMALL: list = [  # to be validated: no size divides a block
    ("attention, packed documents, both ways", {"B": 2, "H": 4, "K": 2, "T": 37, "S": 37, "C": 24}),
    *((name, {"N": 5, "V": 301}) for name in LOGITS),
    *((name, {"N": 5, "D": 24, "V": 301}) for name in LINEAR),
]
QUICK: list = [
    ("attention, packed documents, both ways", {"B": 1, "H": 4, "K": 2, "T": 128, "S": 128, "C": 32}),
    ("attention, decoding, forward", {"B": 2, "H": 4, "K": 2, "T": 1, "S": 128, "C": 32}),
    ("cross_entropy", {"N": 16, "V": 1001}),
    ("linear_cross_entropy", {"N": 2048, "D": 16, "V": 4096}),
    ("linear_kl", {"N": 64, "D": 32, "V": 1001}),
]

# --- Validation -----------------------------------------------------------------------------------

# An error is a share of the exact result's largest value. Plain PyTorch in the same dtype errs too; twice
# its error and this are allowed: a unit in the last place of half types, and in float32, where plain PyTorch
# may happen to be right to the last digit, some for sums in another order and powers of two as exponentials.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def error(function: Callable, contest: Contest) -> float:
    """The largest error of its results and gradients against float64, nan counting as infinite."""
    plain = contest.contestants["plain PyTorch"]()
    exact = results_and_gradients(plain, contest, torch.float64)
    found = results_and_gradients(function, contest, contest.operands[0].dtype)
    shares = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, exact, strict=True)]
    return max(float("inf") if isnan(share) else share for share in shares)


def results_and_gradients(function: Callable, contest: Contest, dtype: torch.dtype) -> list[Tensor]:
    """In float64, as computed in `dtype` from operands and upstream gradients that were rounded before."""
    operands = [x.to(dtype).detach().requires_grad_() for x in contest.operands]
    results = as_tuple(function(*operands))
    drawn = normal([x.shape for x in results], operands[0].device, contest.operands[0].dtype)
    upstream = [u.to(x.dtype) for u, x in zip(drawn, results, strict=True)]
    return [x.detach().double() for x in (*results, *torch.autograd.grad(results, operands, upstream))]


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def validate(device: str) -> list[dict]:
    """The error of every operation, implementation and dtype; SystemExit naming those that are too large."""
    found, wrong = [], []
    for dtype, floor in FLOOR.items():
        for name, make in contests(SMALL, device, dtype).items():
            contest, operation, kind = make(), name.split(",")[0], dtype_name(dtype)
            plain = error(contest.contestants["plain PyTorch"](), contest)
            for impl in ("triton", "torch") if find_spec("triton") else ("torch",):
                off = error(partial(contest.contestants["minillm"](), impl=impl), contest)
                record = {"operation": operation, "impl": impl, "dtype": kind}
                found.append(record | {"error": off, "error_of_plain": plain})
                if off > 2 * plain + floor:
                    wrong.append(f"{operation} ({impl}, {kind}) is off by {off:.1e}")
    if wrong:
        raise SystemExit("\n".join(["error: wrong results, so no times:", *wrong]))
    return found


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
            upstream[:] = upstream or [torch.ones_like(x) for x in results]
            if contest.backward:
                torch.autograd.grad(results, operands, upstream)
        return results[0].detach()

    return run


def milliseconds(run: Callable, flush: Tensor | None) -> float:
    """One run. On a GPU `flush`, larger than its cache, is overwritten first: the operands come from memory,
    and while that goes on the launches of the run queue up behind it."""
    if flush is None:
        return 1e3 * timed(run)(0)
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
    (a,) = normal(((n, n),), device, dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = (lambda: a @ a, lambda: target.copy_(source))
    product_ms, copy_ms = (min(milliseconds(run, flush) for _ in range(40)) for run in work)
    return Ceilings(2e3 * n**3 / product_ms, 2e3 * size / copy_ms)


def measure(contest: Contest, limits: Ceilings, runs: int, flush: Tensor | None = None) -> dict:
    """The record of one contest; contestants run in turn."""
    ready, results, missing = {}, {}, {}
    for who in contest.contestants:
        try:
            run = prepare(contest, who)
            results[who], ready[who] = run().double(), run
        except Exception as problem:  # a peer that is absent or refuses this shape is news, not an end
            if who == "minillm":
                raise
            missing[who] = f"{type(problem).__name__}: {problem}".split("\n")[0]
    if flush is not None:  # on a GPU allocators and clocks settle over the first runs
        [run() for run in (*ready.values(), *ready.values())]
    sides = {who: lambda _, run=run: milliseconds(run, flush) for who, run in ready.items()}
    times = in_turn(sides, runs)
    middle, floor, right = medians(times), limits.milliseconds(contest), results["minillm"]
    others = {who: t for who, t in middle.items() if who != "minillm"}
    return {
        "dtype": dtype_name(contest.operands[0].dtype),
        "milliseconds": times,
        "median": middle,
        "ratio": {who: t / middle["minillm"] for who, t in others.items()},  # above 1: ours is faster
        "best_peer": min(others, key=others.__getitem__, default=None),
        # As a share of our largest value: a peer that computes something else is no peer.
        "difference": {who: float((x - right).abs().max() / right.abs().max()) for who, x in results.items()},
        "floor": {"flops": contest.flops, "bytes": contest.moved, "milliseconds": floor},
        "share_of_ceiling": {who: floor / t for who, t in middle.items()},
        "peak_bytes": {who: None if flush is None else peak(run) for who, run in ready.items()},
        "missing": missing,
    }


def peak(run: Callable) -> int:
    """Bytes that one run takes on a GPU at its peak, on top of the operands."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- The program ----------------------------------------------------------------------------------


def lines(contest: str, record: dict) -> Iterator[str]:
    """The floor, a line for each contestant, fastest first, and one for each that is missing."""
    floor, ours = record["floor"], record["median"]["minillm"]
    work = f"{floor['flops'] / 1e9:.3g} GFLOP and {floor['bytes'] / 1e6:.3g} MB"
    yield f"{contest} ({record['dtype']}): no less than {work}, here {floor['milliseconds']:.3f} ms"
    for who, ms in sorted(record["median"].items(), key=lambda item: item[1]):
        taken = record["peak_bytes"][who]
        rates = f"{floor['flops'] / ms / 1e9:9.3g} TFLOP/s {floor['bytes'] / ms / 1e6:9.3g} GB/s"
        yield (
            f"  {who:20} {ms:10.3f} ms {ms / ours:6.2f}x {rates} {floor['milliseconds'] / ms:6.1%} of the"
            f" ceiling{'' if taken is None else f' {taken / 1e6:.1f} MB'},"
            f" differs by {record['difference'][who]:.0e}"
        )
    yield from (f"  {who:20} not timed: {why}" for who, why in record["missing"].items())


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__, runs=7)
    options_of.add_argument("--only", default="", metavar="NAME", help="contests with this in their names")
    options_of.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    options = options_of.parse_args(arguments)
    device, table, dtype = "cpu", CPU, torch.float32
    if torch.cuda.is_available():
        device, table, dtype = "cuda", GPU, torch.bfloat16
    known = contests(QUICK if options.quick else table, device, dtype)
    chosen = {name: make for name, make in known.items() if options.only in name}
    if not chosen:
        options_of.error(f"--only {options.only!r}: in no contest's name; these are {', '.join(known)}")
    if device == "cpu":  # Triton reads it when the first kernel is imported, which validation does
        os.environ["TRITON_INTERPRET"] = "1"
    write(options.json, run(device, dtype, chosen, options.runs))


def run(device: str, dtype: torch.dtype, chosen: dict[str, Callable[[], Contest]], runs: int) -> dict:
    """Validate, then the contests; prints as it goes and returns the record."""
    cuda, validation = device == "cuda", validate(device)
    print(f"{len(validation)} validations against plain PyTorch in float64 passed")
    if not cuda:
        print("No GPU: the Triton kernels were validated in their interpreter, and none of them is timed.")
    installed = {d.name: d.version for d in metadata.distributions()}
    libraries = {name: installed.get(name) for name in LIBRARIES}
    print(f"peers not installed: {', '.join(n for n, v in libraries.items() if v is None) or 'none'}")
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if cuda else None
    limits = ceilings(device, dtype, flush)
    print(
        f"ceilings: {limits.flops / 1e12:.3f} TFLOP/s of a product, {limits.moved / 1e9:.1f} GB/s of a copy"
    )
    results = {}
    for name, make in chosen.items():
        results[name] = measure(make(), limits, runs, flush)
        print(*lines(name, results[name]), sep="\n", flush=True)
    gpu = torch.cuda.get_device_name() if cuda else None
    machine = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpu": gpu}
    found = {"libraries": libraries, "validation": validation, "ceilings": vars(limits), "contests": results}
    return machine | found
