"""Time the kernels beside their peers, each held to plain PyTorch.

    python -m kernels.bench                                  # everything
    python -m kernels.bench --only decoding                  # only what has this in its name
    python -m kernels.bench --json benchmarks/kernels-gpu.json

A contest runs ours and its peers in turn, so that a GPU that slows down slows all of them, and the medians
count. First their results and gradients are compared: where ours are not plain PyTorch's, nothing is timed.
Peers that are not installed are named, and so are those that refuse a shape. Every contest states its floor:
the floating-point operations and bytes that no implementation can do without, and the time they take at the
rates of a large matrix product and a large copy on the same device in the same run. "of the ceiling" is that
time as a share of the time measured. Without a GPU the PyTorch versions are timed, beside plain PyTorch.

Left out: clocks and power (lock them for steady figures), several GPUs, peaks of memory on a CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from math import inf, isnan

import torch
from torch import Tensor

from benchmarks.harness import in_turn, medians, parser, seconds, write
from kernels.dev.peers import TABLE, Peers, contestants

# --- Contests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """One operation at one size: its operands, those who compute it, and what none of them can do without."""

    operands: tuple[Tensor, ...]
    contestants: Peers
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
    """The last T of S tokens: causal, or of several documents in a row, which see only themselves.

    A visible pair of query and key takes 2 C operations in each product: 2 products forward (q k^T, p v),
    5 backward (dv, dp, dq, dk, and the scores again, as the literature counts: nobody has room to keep them).
    Forward reads q, k and v and writes out; backward reads those and d out, and writes three gradients.
    """
    # In memory tokens come before heads, as projections leave them and as flash-attn wants them.
    shapes = (B, T, H, C), (B, S, K, C), (B, S, K, C)
    q, k, v = (x.transpose(1, 2) for x in normal(shapes, device, dtype))
    t, start = torch.arange(S - T, S, device=device), None
    pairs, backward = B * H * int((t + 1).sum()), "both ways" in name
    if "packed documents" in name:
        edges = torch.tensor([0, 1, 4, 5, 10, 13], device=device) * S // 16
        first = edges[torch.bucketize(t, edges, right=True) - 1]
        pairs, start = B * H * int((t + 1 - first).sum()), first.to(torch.int32).repeat(B, 1)
    everybody = contestants("attention", (q, k, v), start=start)
    moved = 2 * (q.numel() + k.numel()) * dtype.itemsize * (3 if backward else 1)
    return Contest((q, k, v), everybody, (14 if backward else 4) * C * pairs, moved, backward)


def row_contest(operation, N, V, device, dtype, D: int | None = None) -> Contest:
    """Over logits: they are read once, if a row stays on the chip, and one gradient is written. Over hidden
    states: three products of 2 N D V operations a matrix (the logits, d hidden, d weight)."""
    sides = 2 if "kl" in operation else 1
    operands = normal((((N, D), (V, D)) if D else ((N, V),)) * sides, device, dtype)
    if D:
        operands = tuple(x * D**-0.25 for x in operands)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    rest = {} if sides == 2 else {"targets": targets}
    everybody = contestants(operation, operands, **rest)
    moved = 2 * sum(x.numel() for x in operands) * dtype.itemsize
    return Contest(operands, everybody, sides * 6 * N * (D or 0) * V, moved)


def normal(shapes, device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)


# --- Measuring ------------------------------------------------------------------------------------

Run = Callable[[], list[Tensor]]
# What plain PyTorch may differ from ours by, as a share of the largest value: it rounds logits to bfloat16.
# How exact ours are, the tests know.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def prepare(function: Callable, contest: Contest) -> Run:
    """One whole run of a contestant: its results, and where there is a way back the gradients.

    It has operands of its own: some peers write their gradients over the logits.
    """
    operands = [x.clone().requires_grad_(contest.backward) for x in contest.operands]
    upstream: list[Tensor] = []  # filled by the first run

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(contest.backward):
            found = function(*operands)
        results = found if isinstance(found, tuple) else (found,)
        if not contest.backward:
            return list(results)
        if not upstream:
            drawn = normal([x.shape for x in results], operands[0].device, operands[0].dtype)
            upstream.extend(u.to(x.dtype) for u, x in zip(drawn, results, strict=True))
        return [x.detach() for x in (*results, *torch.autograd.grad(results, operands, upstream))]

    return run


def difference(found: list[Tensor], ours: list[Tensor]) -> float:
    """The largest one, as a share of the largest value of our result or gradient; nan counts as infinite."""
    pairs = [(x.double(), y.double()) for x, y in zip(found, ours, strict=True)]
    shares = [float((x - y).abs().max() / y.abs().max()) for x, y in pairs]
    return max(inf if isnan(share) else share for share in shares)


def figures(run: Callable, flush: Tensor | None) -> dict[str, float]:
    """Of one run: milliseconds, and on a GPU megabytes at its peak, on top of the operands. There `flush`,
    larger than the cache, is overwritten first: the operands come from memory, and while that goes on the
    launches of the run queue up behind it."""
    if flush is None:
        return {"ms": 1e3 * seconds(run)}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flush.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return {"ms": start.elapsed_time(end), "MB": (torch.cuda.max_memory_allocated() - before) / 1e6}


def ceilings(device: str, dtype: torch.dtype, flush: Tensor | None) -> dict[str, float]:
    """The operations and bytes a second of a large matrix product and a large copy: the best of many runs,
    for others on the machine only ever lower it."""
    n, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    (a,) = normal(((n, n),), device, dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = (lambda: a @ a, lambda: target.copy_(source))
    product_ms, copy_ms = (min(figures(run, flush)["ms"] for _ in range(40)) for run in work)
    return {"flops": 2e3 * n**3 / product_ms, "bytes": 2e3 * size / copy_ms}


def measure(name: str, contest: Contest, limits: dict[str, float], runs: int, flush=None) -> dict:
    """The record of one contest; contestants run in turn, ours first."""
    ready: dict[str, Run] = {}
    differences, missing = {}, {}
    ours = prepare(contest.contestants["minillm"], contest)()
    for who, function in contest.contestants.items():
        try:
            run = prepare(function, contest)
            # A peer that computes something else is no peer.
            differences[who], ready[who] = difference(run(), ours), run
        except Exception as problem:  # a peer that is absent or refuses this shape is news, not an end
            missing[who] = f"{type(problem).__name__}: {problem}".split("\n")[0]
    off, dtype = differences.get("plain PyTorch", 0.0), contest.operands[0].dtype
    if off > TOLERANCE[dtype]:
        raise SystemExit(f"error: {name} differs from plain PyTorch by {off:.1e}: not timed")
    sides = {who: lambda _, run=run: figures(run, flush) for who, run in ready.items()}
    if flush is not None:
        in_turn(sides, 2)  # on a GPU allocators and clocks settle over the first runs
    work = {"flops": contest.flops, "bytes": contest.moved}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "figures": in_turn(sides, runs),
        "difference": differences,
        "floor": work | {"ms": 1e3 * max(work[what] / limits[what] for what in work)},
        "missing": missing,
    }


# --- The program ----------------------------------------------------------------------------------


def lines(name: str, record: dict) -> Iterator[str]:
    """The floor, a line for each contestant, fastest first, and one for each that is missing."""
    floor, middle = record["floor"], medians(record["figures"])
    work = f"{floor['flops'] / 1e9:.3g} GFLOP and {floor['bytes'] / 1e6:.3g} MB"
    yield f"{name} ({record['dtype']}): no less than {work}, here {floor['ms']:.3f} ms"
    for who, own in sorted(middle.items(), key=lambda item: item[1]["ms"]):
        shown = "".join(f"{value:11.3f} {figure}" for figure, value in own.items())
        ratio, share = own["ms"] / middle["minillm"]["ms"], floor["ms"] / own["ms"]
        off = f"differs by {record['difference'][who]:.0e}"
        yield f"  {who:16}{shown} {ratio:6.2f}x {share:6.1%} of the ceiling, {off}"
    yield from (f"  {who:16} not timed: {why}" for who, why in record["missing"].items())


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__, runs=7)
    options_of.add_argument("--only", default="", metavar="NAME", help="contests with this in their names")
    options = options_of.parse_args(arguments)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    known = contests(TABLE[device], device, dtype)
    chosen = {name: make for name, make in known.items() if options.only in name}
    if not chosen:
        options_of.error(f"--only {options.only!r}: in no contest's name; these are {', '.join(known)}")
    gpu = torch.cuda.get_device_name() if cuda else None
    print(gpu or "No GPU: no Triton kernel is timed.")
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if cuda else None
    limits = ceilings(device, dtype, flush)
    flops, moved = limits.values()
    print(f"ceilings: {flops / 1e12:.3f} TFLOP/s of a product, {moved / 1e9:.1f} GB/s of a copy")
    results = {}
    for name, make in chosen.items():
        results[name] = measure(name, make(), limits, options.runs, flush)
        print(*lines(name, results[name]), sep="\n", flush=True)
    named = {row[1] for row in TABLE["libraries"]}
    libraries = {d.name: d.version for d in metadata.distributions() if d.name in named}
    machine = {"gpu": gpu, "threads": torch.get_num_threads(), "libraries": libraries, "ceilings": limits}
    write(options.json, machine | {"contests": results})
