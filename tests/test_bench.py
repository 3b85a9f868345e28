"""bench.py: it times nothing that is wrong, counts work as it says, and writes down what it promises."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.dev import bench
from kernels.dev.bench import Ceilings, Contest, as_tuple, attention_contest, contests, measure

LIMITS = Ceilings(flops=1e12, moved=1e9)


@pytest.fixture
def only(monkeypatch):
    """Leaves one operation to be validated, in float32, by a function of the right one if given."""

    def leave(operation: str, replaced=None):
        if replaced:
            monkeypatch.setitem(bench.OPERATIONS, operation, replaced(bench.OPERATIONS[operation]))
        monkeypatch.setattr(bench, "SMALL", [x for x in bench.SMALL if x[0].split(",")[0] == operation])
        monkeypatch.setattr(bench, "FLOOR", {torch.float32: bench.FLOOR[torch.float32]})

    return leave


@pytest.mark.parametrize("operation", list(bench.OPERATIONS))
def test_every_operation_is_validated(only, device, operation):
    only(operation)
    assert [(f["operation"], f["impl"]) for f in bench.validate(device)] == [
        (operation, "triton"),
        (operation, "torch"),
    ]


WRONG = {
    "a result off by a thousandth": lambda right: lambda *a, impl, **o: right(*a, impl="torch", **o) * 1.001,
    "no number": lambda right: lambda *a, impl, **o: right(*a, impl="torch", **o) * float("nan"),
    # 2 x - x.detach() is x, with twice its gradient.
    "a gradient": lambda right: lambda x, *a, impl, **o: right(2 * x - x.detach(), *a, impl="torch", **o),
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("operation", ["kl", "attention"])
def test_what_is_wrong_is_named(device, only, operation, wrong):
    only(operation, WRONG[wrong])
    with pytest.raises(SystemExit, match=rf"wrong results.*:\n{operation} \(triton, float32\) is off by"):
        bench.validate(device)


@pytest.mark.parametrize(("name", "make"), contests(bench.SMALL, "cpu", torch.float64).items())
def test_plain_pytorch_is_the_reference_in_its_own_words(name, make):
    contest, name = make(), name.split(",")[0]
    arrays = [x.numpy() for x in contest.operands]
    function = contest.contestants["plain PyTorch"]()
    if "linear" in name:
        arrays = [hidden @ weight.T for hidden, weight in zip(arrays[::2], arrays[1::2], strict=True)]
    rest = {key: x.numpy() for key, x in function.keywords.items() if isinstance(x, torch.Tensor)}
    expected = as_tuple(getattr(reference, name.removeprefix("linear_"))(*arrays, **rest))
    for a, e in zip(as_tuple(function(*contest.operands)), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


@given(
    st.sampled_from(["causal", "packed documents", "window of 1024", "decoding"]),
    st.integers(1, 40), st.integers(0, 1300),
)  # fmt: skip
def test_the_operations_of_attention_are_counted_by_the_pairs_that_see_each_other(pattern, T, before):
    T = 1 if pattern == "decoding" else T
    S = T + (before if pattern == "decoding" else 0)
    sizes = {"B": 2, "H": 2, "K": 1, "T": T, "S": S, "C": 4, "device": "cpu", "dtype": torch.float32}
    forward, both = (
        attention_contest(f"attention, {pattern}, {way}", **sizes) for way in ("forward", "both ways")
    )
    first = bench.first_key(pattern, torch.arange(S - T, S), S)
    seen = reference.visible_keys(2, T, S, first.numpy()[None].repeat(2, 0))
    assert forward.flops == 2 * 2 * 4 * 2 * seen.sum()  # two products, 2 C operations a pair, 2 heads
    assert both.flops == 3.5 * forward.flops
    assert (
        both.moved
        == 3 * forward.moved
        == 3 * 4 * sum(x.numel() for x in (*forward.operands, forward.operands[0]))
    )


@pytest.mark.parametrize("make", contests(bench.QUICK, "cpu", torch.float32).values())
def test_contestants_compute_the_same(make):
    record = measure(make(), LIMITS, runs=1)
    assert set(record["median"]) >= {"minillm", "plain PyTorch"}
    assert max(record["difference"].values()) < 1e-5  # float32


def contest_of(**contestants) -> Contest:
    x = torch.arange(12.0).reshape(3, 4)
    makers = {"minillm": lambda: torch.exp, "plain PyTorch": lambda: torch.exp}
    return Contest((x,), makers | contestants, flops=24_000_000, moved=96_000)


def test_peers_that_are_absent_or_refuse_are_named_with_their_reasons_and_our_failure_is_an_error():
    def absent():
        import a_library_that_nobody_has  # noqa: F401

    def refuse(x):
        raise RuntimeError("no kernel\nfor this shape")

    record = measure(contest_of(lost=absent, shy=lambda: refuse), LIMITS, runs=2)
    assert "a_library_that_nobody_has" in record["missing"].pop("lost")
    assert record["missing"] == {"shy": "RuntimeError: no kernel"}
    assert set(record["median"]) == {"minillm", "plain PyTorch"}
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(contest_of(minillm=lambda: refuse), LIMITS, runs=1)


def test_a_record_is_consistent_with_its_times():
    record = measure(contest_of(other=lambda: partial(torch.mul, other=2.0)), LIMITS, runs=3)
    assert all(len(times) == 3 for times in record["milliseconds"].values())
    for who, times in record["milliseconds"].items():
        assert record["median"][who] == sorted(times)[1]
    ours = record["median"]["minillm"]
    assert record["ratio"] == {who: t / ours for who, t in record["median"].items() if who != "minillm"}
    assert record["ratio"][record["best_peer"]] == min(record["ratio"].values())
    # 24e6 operations at 1e12 a second take 0.024 ms; 96e3 bytes at 1e9 a second take longer.
    assert record["floor"] == {"flops": 24_000_000, "bytes": 96_000, "milliseconds": 0.096}
    assert record["difference"]["plain PyTorch"] == 0 and record["difference"]["other"] > 0.5


def test_operands_that_a_peer_overwrites_stay_its_own():
    def overwrite(x):
        with torch.no_grad():
            return torch.exp(x.zero_())

    contest = contest_of(rude=lambda: overwrite)
    record = measure(Contest(contest.operands, contest.contestants, 1, 1, backward=False), LIMITS, runs=1)
    assert record["difference"]["plain PyTorch"] == 0
    assert contest.operands[0].max() == 11


def test_the_program_writes_figures_hardware_versions_and_commit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "validate", lambda device: [{"operation": "kl", "error": 0.0}])
    path = tmp_path / "figures.json"
    bench.main(["--quick", "--only", "cross_entropy, N=16", "--runs", "2", "--json", str(path)])
    shown, record = capsys.readouterr().out, json.loads(path.read_text())
    if not torch.cuda.is_available():
        assert "none of them is timed" in shown and record["gpu"] is None
    assert record["cpu"] and record["cores"] and record["versions"]["torch"] == torch.__version__
    assert set(record) >= {"commit", "dirty", "threads", "libraries", "validation", "ceilings"}
    assert set(record["libraries"]) == set(bench.LIBRARIES)
    [absent] = [line for line in shown.splitlines() if line.startswith("peers not installed: ")]
    assert all(
        (version is None) == (name in absent.split(": ")[1].split(", "))
        for name, version in record["libraries"].items()
    )
    [(name, contest)] = record["contests"].items()
    assert name in shown and name.startswith("cross_entropy")
    for figures in ("milliseconds", "median", "peak_bytes", "share_of_ceiling"):
        assert contest[figures].keys() == contest["median"].keys() >= {"minillm", "plain PyTorch"}
