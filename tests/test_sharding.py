"""Weights cut among processes: the files, the models and the bytes that each process holds.

Whole stages with --shard run in test_train.py, test_sft.py, test_reward_stage.py and test_policy_stage.py,
beside the same stages whole.
"""

import json
import weakref
from types import SimpleNamespace

import pytest
import sharded
import torch
from runs import in_two_processes, tiny_model
from safetensors.torch import load_file, save_file

import rlhf
from minillm.errors import InputError
from minillm.io import weights
from minillm.io.huggingface import save_model
from minillm.io.weights import read_tensors, write_tensors
from minillm.run import Runtime
from minillm.tools.device import start_runtime


def test_restart_points_are_the_same_bytes_sharded_and_whole_and_each_process_holds_its_share(tmp_path):
    """sharded.py has what is compared: restart points of 2 processes and of 1, the steps after them, gathered
    models."""
    sharded.main([str(tmp_path)])
    in_two_processes(sharded, [str(tmp_path)])
    processes = ((0, 1), (0, 2), (1, 2))
    whole, *parts = (json.loads((tmp_path / f"held by {i} of {n}.json").read_text()) for i, n in processes)
    for name, size in whole.items():
        # What cannot be halved is one row of a matrix, or a number of an optimizer, for each of 21 tensors.
        assert size <= sum(part[name] for part in parts) < 1.01 * size
        assert max(part[name] for part in parts) < 0.505 * size


def test_a_file_written_tensor_by_tensor_is_what_safetensors_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    some = {
        "b.odd": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "a": torch.randn(2, 3, 4, generator=generator),
        "step": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor([True, False, True]),
        "count": torch.arange(3),
        "double": torch.randn(2, generator=generator, dtype=torch.float64).T,
        "turned": torch.randn(4, 3, generator=generator).T,
    }
    write_tensors(tmp_path / "ours", some, {"format": "pt", "note": "ä"})
    save_file({name: tensor.contiguous() for name, tensor in some.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == some.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert read_tensors(tmp_path / "ours")[1] == {"format": "pt", "note": "ä"}


def test_saving_gathers_one_tensor_at_a_time(tmp_path, monkeypatch):
    held = list[weakref.ref]()

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        assert all(one() is None for one in held), "the one before is still there"
        whole = tensor.clone()
        held.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(weights, "whole_tensor", gathered)
    save_model(tmp_path, *tiny_model())
    assert len(held) == len(load_file(tmp_path / "model.safetensors")) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="torchrun's processes are not patched")
def test_a_wrapped_model_is_gone_before_the_group_of_its_processes_after_an_error_too():
    """Else the group ends with it, while its threads wait for Python: now and then for ever."""
    held, destroy = list[weakref.ref](), torch.distributed.destroy_process_group

    def destroy_alone() -> None:
        assert [one() for one in held] == [None]
        destroy()

    def fail(runtime: Runtime) -> None:
        wrapped = runtime.wrap(tiny_model()[0])
        assert wrapped(torch.tensor([[1, 2]])) is not None
        held.append(weakref.ref(wrapped))
        raise InputError("while it is trained")

    def main(_: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="while it is trained"):
            patch.setattr(torch.distributed, "destroy_process_group", destroy_alone)
            with start_runtime("cpu", "float32") as runtime:
                fail(runtime)

    in_two_processes(SimpleNamespace(main=main), [])  # type: ignore[arg-type]


def test_more_processes_than_prompts_of_a_minibatch_are_refused_before_anything_starts():
    options = rlhf.Options(stage="policy", algorithm="grpo", rollout_batch=16, group_size=8, minibatches=2)
    one, two = (Runtime(torch.device("cpu"), torch.float32, world_size=n) for n in (1, 2))
    rlhf.check_shares(options, one)
    with pytest.raises(InputError, match=r"too few for 2 processes; give at least 32"):
        rlhf.check_shares(options, two)
