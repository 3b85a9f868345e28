"""What the tests of whole runs share: reading a run, comparing two, ending one, and its bytes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from minillm.io.huggingface import read_tensors
from minillm.model import LanguageModel, ModelConfig, config_of_depth, initialize
from minillm.run import RESUME_FILE
from minillm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def tiny_model(causal: bool = True, longest: int = 80) -> tuple[LanguageModel, Tokenizer]:
    """A model that knows nothing yet, and a tokenizer of hardly more than bytes."""
    tokenizer = Tokenizer.train(["How many cats? No cats. 1 cat. 7 cats, and it is a fine day."], 290)
    shape = config_of_depth(1, tokenizer.vocab_size, longest)
    model = LanguageModel(ModelConfig(**vars(shape) | {"causal": causal}))
    initialize(model, torch.Generator().manual_seed(0))
    return model, tokenizer


def metrics_of(out: Path) -> list[dict]:
    """The events of a run; a last line still being written is left out."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def losses_of(events: list[dict]) -> list[tuple[str, int, float]]:
    """Event, step and loss of everything a run measured."""
    return [
        (e["event"], e["step"], e["nats_per_byte"] if "nats_per_byte" in e else e["loss"])
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


class Killed(BaseException):
    """Nothing in a script may catch it, as nothing can catch kill -9."""


@contextmanager
def killed_at_update(script: ModuleType, number: int) -> Iterator[None]:
    """Lets `script` die in the middle of its `number`-th update."""
    clip, calls = script.clip_gradients, []

    def clip_or_die(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "clip_gradients", clip_or_die)
        yield


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Returns once the run of a process has done so many steps."""
    for _ in range(2400):
        if (out / "metrics.jsonl").exists() and any(e["step"] >= step for e in metrics_of(out)):
            return
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within two minutes")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(script: ModuleType, arguments: list[str], capfd: pytest.CaptureFixture) -> str:
    """The one line with which a script refuses its arguments, exit code 2 checked."""
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    printed = capfd.readouterr().err
    lines = printed.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), printed
    return lines[0]


def missing_words(given: list[str], defaults: dict[str, str]) -> list[str]:
    """The flags of `defaults` that a command line lacks, with their values."""
    return [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
