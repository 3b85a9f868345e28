"""What runs in each process for test_sharding.py: weights cut among processes against the same weights whole.

    torchrun --nproc-per-node 2 tests/sharded.py FOLDER

A property that does not hold ends it. Each process writes a file of JSON: the bytes it holds.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from runs import Position

from minillm.generate import SamplingOptions, generate
from minillm.io import weights
from minillm.io.weights import write_weights
from minillm.model import LanguageModel, ScalarModel, config_of_depth, initialize
from minillm.optim import LearningRates, build_optimizers
from minillm.run import RESUME_FILE, Runtime, TrainingState
from minillm.tools.device import start_runtime
from minillm.tools.folder import optimizer_tensors, restore_state, save_state

ROWS, LENGTH, VOCABULARY = 8, 16, 301  # 301: rows that no number of processes divides
RATES = LearningRates(matrix=0.02, embedding=0.01, norm=0.01, weight_decay=0.1)


def state_of(runtime: Runtime, kind: str, tied: bool, seed: int) -> TrainingState:
    """A model before its first step, sharded if the runtime is."""
    config = config_of_depth(2, VOCABULARY, LENGTH, tie_word_embeddings=tied)
    model = LanguageModel(config, runtime.dtype)
    initialize(model, torch.Generator().manual_seed(seed))
    runtime.wrap(model)
    return TrainingState(model, build_optimizers(model, RATES, kind), Position())


def gradients(state: TrainingState, runtime: Runtime) -> None:
    """The gradient of a step's mean loss, of this process's rows of a batch that follows from the step."""
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(state.step))
    own = slice(ROWS * runtime.rank // runtime.world_size, ROWS * (runtime.rank + 1) // runtime.world_size)
    loss = state.model(tokens[own], targets=tokens.roll(-1, 1)[own])
    (loss * (runtime.world_size / tokens.numel())).backward()


def update(state: TrainingState, runtime: Runtime) -> None:
    gradients(state, runtime)
    state.optimizers.step(1.0, 1.0)
    state.step += 1


def held(state: TrainingState, runtime: Runtime) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that this process holds before an update."""
    gradients(state, runtime)
    parameters = state.optimizers.parameters
    tensors = {
        "weights": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": list(optimizer_tensors(state.optimizers).values()),
    }
    return {
        name: sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in some)
        for name, some in tensors.items()
    }


def check_files(folder: Path, runtime: Runtime, whole: Runtime, kind: str, tied: bool) -> None:
    """A restart point goes from sharded to whole and back bit for bit, and so do the steps after it."""
    ours, again = (state_of(runtime, kind, tied, seed) for seed in (0, 1))
    for _ in range(2):
        update(ours, runtime)
    places = [folder / f"{kind}-{tied}-{name}" for name in ("ours", "whole", "again", "third", "fourth")]
    save_state(ours, places[0])
    torch.distributed.barrier()  # the first process writes
    if runtime.is_main:
        plain = state_of(whole, kind, tied, seed=2)
        restore_state(plain, places[0])
        save_state(plain, places[1])
    restore_state(again, places[0])
    save_state(again, places[2])
    for state, place in ((ours, places[3]), (again, places[4])):
        update(state, runtime)
        save_state(state, place)
    if runtime.is_main:
        first, second, third, *later = ((place / RESUME_FILE).read_bytes() for place in places)
        assert first == second == third, "a restart point changed on its way"
        assert later[0] == later[1] != first, "the step after it is another one"


def check_shards(folder: Path, runtime: Runtime, whole: Runtime) -> None:
    """Weights in several files are the same from processes that each have a part as from one."""
    weights.SHARD_BYTES = 50_000
    write_weights(folder / "ours", state_of(runtime, "adamw", False, seed=5).model.state_dict())
    if runtime.is_main:
        write_weights(folder / "whole", state_of(whole, "adamw", False, seed=5).model.state_dict())
        ours, plain = (
            {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("ours", "whole")
        )
        assert ours == plain and len(ours) > 3


def check_whole_models(runtime: Runtime) -> None:
    """A gathered model gives what the sharded one gives, in every head, and samples."""
    tokens = torch.arange(12)[None]
    model: LanguageModel = state_of(runtime, "adamw", True, seed=3).model  # type: ignore[assignment]
    scalar = ScalarModel(model.config, runtime.dtype)
    initialize(scalar, torch.Generator().manual_seed(4))
    scalar.bias.fill_(0.5)
    runtime.shard(scalar)
    copy, scalar_copy = runtime.whole(model), runtime.whole(scalar)
    with torch.no_grad():
        assert torch.equal(copy(tokens), model(tokens))
        assert torch.equal(copy.logits(copy(tokens)), model.logits(model(tokens)))
        assert torch.equal(scalar_copy(tokens), scalar(tokens))
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    samples = generate(copy, [[1], [2, 3]], SamplingOptions(max_new_tokens=4), [0, 1])
    assert [len(row) for row in samples.responses] == [4, 4]


def main(words: list[str]) -> None:
    folder = Path(words[0])
    folder.mkdir(parents=True, exist_ok=True)
    with start_runtime("cpu", "float32", shard=True) as runtime:
        is_silent = getattr(sys.stdout, "name", None) == os.devnull
        assert is_silent == (runtime.rank > 0), "what each would say, the first says"
        if runtime.world_size > 1:
            whole, half = Runtime(runtime.device, runtime.dtype), replace(runtime, dtype=torch.bfloat16)
            check_files(folder / "32", runtime, whole, "muon", tied=False)
            check_files(folder / "16", half, replace(whole, dtype=half.dtype), "adamw", tied=True)
            check_shards(folder, runtime, whole)
            check_whole_models(runtime)
            check_whole_models(half)
        state = state_of(runtime, "adamw", False, seed=0)
        update(state, runtime)
        path = folder / f"held by {runtime.rank} of {runtime.world_size}.json"
        path.write_text(json.dumps(held(state, runtime)))


if __name__ == "__main__":
    main(sys.argv[1:])
