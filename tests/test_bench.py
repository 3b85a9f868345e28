"""bench.py: it times nothing that is wrong, counts work as it says, and writes down what it promises."""

import json
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.dev import bench
from kernels.dev.bench import Contest, attention_contest, contests, measure
from kernels.dev.peers import OPERATIONS, attention_peers

SMALL: list = [  # no size divides a block
    ("attention, packed documents, both ways", {"B": 2, "H": 4, "K": 2, "T": 37, "S": 37, "C": 24}),
    ("attention, decoding, forward", {"B": 2, "H": 4, "K": 2, "T": 1, "S": 37, "C": 24}),
    *((name, {"N": 5, "V": 301}) for name in ("cross_entropy", "token_logprobs", "kl")),
    *((name, {"N": 5, "D": 24, "V": 301}) for name in OPERATIONS if name.startswith("linear_")),
]
LIMITS = {"flops": 1e12, "bytes": 1e9}
WRONG = {
    "a result off by a thousandth": lambda right: lambda *a, **o: right(*a, **o) * 1.001,
    "no number": lambda right: lambda *a, **o: right(*a, **o) * float("nan"),
    # 2 x - x.detach() is x, with twice its gradient.
    "a gradient": lambda right: lambda x, *a, **o: right(2 * x - x.detach(), *a, **o),
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("name", ["kl, N=5, V=301", next(iter(contests(SMALL, "cpu", torch.float32)))])
def test_what_is_wrong_is_named_and_not_timed(monkeypatch, name, wrong):
    operation = name.split(",")[0]
    ours, plain = OPERATIONS[operation]
    monkeypatch.setitem(OPERATIONS, operation, (WRONG[wrong](ours), plain))
    with pytest.raises(SystemExit, match=f"error: {name} differs from plain PyTorch by .*: not timed"):
        measure(name, contests(SMALL, "cpu", torch.float32)[name](), LIMITS, runs=1)


@pytest.mark.parametrize(("name", "make"), contests(SMALL, "cpu", torch.float64).items())
def test_plain_pytorch_is_the_reference_in_its_own_words(name, make):
    contest, name = make(), name.split(",")[0]
    arrays = [x.numpy() for x in contest.operands]
    function = contest.contestants["plain PyTorch"]
    if "linear" in name:
        arrays = [hidden @ weight.T for hidden, weight in zip(arrays[::2], arrays[1::2], strict=True)]
    rest = {key: x.numpy() for key, x in function.keywords.items() if isinstance(x, torch.Tensor)}
    expected = getattr(reference, name.removeprefix("linear_"))(*arrays, **rest)
    np.testing.assert_allclose(function(*contest.operands), expected, rtol=1e-12, atol=1e-12)


@given(st.sampled_from(["causal", "packed documents", "decoding"]), st.integers(1, 40), st.integers(0, 90))
def test_the_operations_of_attention_are_counted_by_the_pairs_that_see_each_other(pattern, T, before):
    T, S = (1, 1 + before) if pattern == "decoding" else (T, T)
    sizes = {"B": 2, "H": 2, "K": 1, "T": T, "S": S, "C": 4, "device": "cpu", "dtype": torch.float32}
    forward, both = (
        attention_contest(f"attention, {pattern}, {way}", **sizes) for way in ("forward", "both ways")
    )
    start = forward.contestants["minillm"].keywords["start"]
    documents = 1 if start is None else len(start.unique())
    assert documents == (6 if pattern == "packed documents" else 1) or T < 16
    seen = reference.visible_keys(2, T, S, None if start is None else start.numpy())
    assert forward.flops == 2 * 2 * 4 * 2 * seen.sum()  # two products, 2 C operations a pair, 2 heads
    assert both.flops == 3.5 * forward.flops
    q, k, v = forward.operands
    assert both.moved == 3 * forward.moved == 3 * 4 * (2 * q.numel() + k.numel() + v.numel())


@pytest.mark.parametrize("make", contests(SMALL, "cpu", torch.float32).values())
def test_contestants_compute_the_same(make):
    contest = make()
    everybody = {"minillm", "plain PyTorch"}
    if len(contest.operands) == 3:  # of the peers on a GPU, this one runs here too
        q, k, _ = contest.operands
        peers = attention_peers(q, k, contest.contestants["minillm"].keywords["start"])
        contest.contestants["SDPA flash"] = peers["SDPA flash"]
        everybody.add("SDPA flash")
    record = measure("small", contest, LIMITS, runs=1)
    assert set(record["figures"]) >= everybody
    assert max(record["difference"].values()) < 1e-5  # float32


def contest_of(**contestants) -> Contest:
    x = torch.arange(12.0).reshape(3, 4)
    both = {"minillm": torch.exp, "plain PyTorch": torch.exp}
    return Contest((x,), both | contestants, flops=24_000_000, moved=96_000)


def test_peers_that_are_absent_or_refuse_are_named_with_their_reasons_and_our_failure_is_an_error():
    def absent(x):
        import a_library_that_nobody_has  # noqa: F401

    def refuse(x):
        raise RuntimeError("no kernel\nfor this shape")

    record = measure("it", contest_of(lost=absent, shy=refuse), LIMITS, runs=2)
    assert "a_library_that_nobody_has" in record["missing"].pop("lost")
    assert record["missing"] == {"shy": "RuntimeError: no kernel"}
    assert set(record["figures"]) == {"minillm", "plain PyTorch"}
    with pytest.raises(RuntimeError, match="no kernel"):
        measure("it", contest_of(minillm=refuse), LIMITS, runs=1)


def test_a_record_holds_every_run_the_floor_and_who_computes_something_else():
    record = measure("it", contest_of(other=partial(torch.mul, other=2.0)), LIMITS, runs=3)
    assert all(len(own["ms"]) == 3 for own in record["figures"].values())
    # 24e6 operations at 1e12 a second take 0.024 ms; 96e3 bytes at 1e9 a second take longer.
    assert record["floor"] == {"flops": 24_000_000, "bytes": 96_000, "ms": 0.096}
    assert record["difference"]["plain PyTorch"] == 0 and record["difference"]["other"] > 0.5


def test_operands_that_a_peer_overwrites_stay_its_own():
    def overwrite(x):
        with torch.no_grad():
            return torch.exp(x.zero_())

    contest = replace(contest_of(rude=overwrite), backward=False)
    record = measure("it", contest, LIMITS, runs=1)
    assert record["difference"]["plain PyTorch"] == 0
    assert contest.operands[0].max() == 11


def test_the_program_writes_figures_hardware_versions_and_commit(tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench.main(["--only", "decoding", "--runs", "2", "--json", str(path)])
    shown, record = capsys.readouterr().out, json.loads(path.read_text())
    if not torch.cuda.is_available():
        assert "no Triton kernel is timed" in shown and record["gpu"] is None
    assert record["cpu"] and record["cores"] and record["versions"]["torch"] == version("torch")
    assert set(record) >= {"commit", "dirty", "threads", "libraries", "ceilings"}
    [(name, contest)] = record["contests"].items()
    assert name in shown and name.startswith("attention, decoding")
    assert contest["figures"].keys() >= {"minillm", "plain PyTorch"}
