"""What the tests of whole runs share: reading a run, comparing two, ending one, and its bytes."""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minillm.data import TokenizedSource
from minillm.io.weights import read_tensors
from minillm.model import LanguageModel, ModelConfig, config_of_depth, initialize
from minillm.optim import LearningRates, Optimizers, build_optimizers
from minillm.options import TrainingOptions
from minillm.run import RESUME_FILE, Run, Runtime, TrainingState
from minillm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
HERE = Runtime(torch.device("cpu"), torch.float32)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

SHARDED = ("--shard", "--checkpoint-activations")


def tiny_model(causal: bool = True, longest: int = 80, seed: int = 0) -> tuple[LanguageModel, Tokenizer]:
    """A model that knows nothing yet, and a tokenizer of hardly more than bytes."""
    tokenizer = Tokenizer.train(["How many cats? No cats. 1 cat. 7 cats, and it is a fine day."], 290)
    shape = config_of_depth(1, tokenizer.vocab_size, longest)
    model = LanguageModel(ModelConfig(**vars(shape) | {"causal": causal}))
    initialize(model, torch.Generator().manual_seed(seed))
    return model, tokenizer


class Position:
    """A stream of batches that is nothing but its position."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def fresh_state(config: ModelConfig | None = None, kind: str = "muon") -> TrainingState:
    """All that moves in a run, before its first step."""
    model = LanguageModel(config or config_of_depth(1, 260, 8))
    initialize(model, torch.Generator().manual_seed(0))
    rates = LearningRates(matrix=0.1, embedding=0.1, norm=0.1, weight_decay=0.0)
    return TrainingState(model, build_optimizers(model, rates, kind), Position())


def open_run(folder: Path, runtime: Runtime = HERE, **options) -> Run:
    """A run as of a process of its own."""
    return Run("train", TrainingOptions(str(folder), **options), replace(runtime, closing=ExitStack()))


def a_stream(
    train: np.ndarray, val: np.ndarray, name: str = "s", weight: float = 1.0, documents: int | None = None
) -> TokenizedSource:
    """A source of these tokens, none of which begins a document."""
    none = {"tokens": 0, "bytes": 0, "documents": len(train) if documents is None else documents}
    letters = [b"x"] * (1 + int(train.max(initial=0)))
    return TokenizedSource(
        name, weight, f"f-{name}", 10**9, train, val, {"train": none, "val": none}, {}, letters
    )


def document_starts(tokens: torch.Tensor, bos_id: int) -> torch.Tensor:
    """For every position the last position of `bos_id` up to it, or 0: its document's beginning."""
    positions = torch.arange(tokens.shape[1])
    return torch.where(tokens == bos_id, positions, 0).cummax(dim=1).values.to(torch.int32)


def metrics_of(out: Path) -> list[dict]:
    """The events of a run; a last line still being written is left out."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def losses_of(events: list[dict]) -> list[tuple[str, int, float]]:
    """Event, step and loss (or what else a validation judges by) of everything a run measured."""
    return [
        (e["event"], e["step"], next(e[name] for name in ("nats_per_byte", "objective", "loss") if name in e))
        for e in events
        if e["event"] in ("train", "val")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """The same curve and the same weights, bit for bit."""
    assert losses_of(metrics_of(one)) == losses_of(metrics_of(other))
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert_same_restart_point(one, other)


def assert_same_restart_point(one: Path, other: Path) -> None:
    """The same weights, optimizers, counts and positions, bit for bit; time alone may differ."""
    (tensors, numbers), (others, other_numbers) = (restart_point(folder) for folder in (one, other))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert numbers == other_numbers


def restart_point(folder: Path) -> tuple[dict, dict]:
    """The tensors of a restart point and its numbers, without the seconds."""
    tensors, metadata = read_tensors(folder / RESUME_FILE)
    numbers = json.loads(metadata["state"])
    assert numbers.pop("seconds") > 0
    return tensors, numbers


def assert_two_processes_follow(
    reference: Path, script: ModuleType, words: list[str], out: Path, rel: float
) -> None:
    """The same events from two processes, and losses but for float32's sums in another order."""
    in_two_processes(script, words)
    one, two = (losses_of(metrics_of(folder)) for folder in (reference, out))
    assert [x[:2] for x in one] == [x[:2] for x in two]
    assert [x[2] for x in two] == pytest.approx([x[2] for x in one], rel=rel)


def in_two_processes(script: ModuleType, words: list[str], status: int = 0) -> None:
    """What torchrun does with a script, in copies of this process, which need not import torch first; each
    must end with this status, as os.waitpid has it."""
    if torch.cuda.is_available():  # which no copy may use
        subprocess.run([*TORCHRUN, str(script.__file__), *words], cwd=ROOT, check=True, timeout=600)
        return
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    children = [os.fork() or as_process(rank, port, script, words) for rank in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [status, status]


def as_process(rank: int, port: int, script: ModuleType, words: list[str]) -> NoReturn:
    """The rest of this process is one of torchrun's two."""
    code = 1
    try:
        signal.alarm(600)
        torch.set_num_threads(1)  # a copy has no other threads
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ |= {name: str(value) for name, value in own.items()}
        script.main(words)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Killed(BaseException):
    """Nothing in a script may catch it, as nothing can catch kill -9."""


@contextmanager
def killed_at_update(number: int) -> Iterator[list[tuple[float, float]]]:
    """Lets a script die in the middle of its `number`-th update; the rate and the clip of each."""
    step, calls = Optimizers.step, []

    def step_or_die(self, rate, clip, *metrics):
        calls.append((rate, clip))
        if len(calls) == number:
            raise Killed
        return step(self, rate, clip, *metrics)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Optimizers, "step", step_or_die)
        yield calls


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(
    script: ModuleType, arguments: list[str], capfd: pytest.CaptureFixture, shown: bool = False
) -> str:
    """The one line with which a script ends, exit code 2 checked; `shown`: the last, behind its progress."""
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    printed = capfd.readouterr().err
    lines = printed.strip().splitlines()
    assert stop.value.code == 2
    assert (shown or len(lines) == 1) and lines[-1].startswith("error: "), printed
    return lines[-1]


def missing_words(given: list[str], defaults: dict[str, str]) -> list[str]:
    """The flags of `defaults` that a command line lacks, with their values."""
    return [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
