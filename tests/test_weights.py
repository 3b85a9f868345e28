"""Weights in one file or in shards with an index: transformers' layout, and never half of two models."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runs import tiny_model
from safetensors.torch import load_file
from torch import Tensor

from minillm.io import weights
from minillm.io.huggingface import load_model, save_model
from minillm.io.weights import INDEX, SINGLE, read_weights, write_weights
from minillm.play.shelf import Shelf

CPU = torch.device("cpu")


def some(sizes: list[int], fill: float = 1.0) -> dict[str, Tensor]:
    """Tensors of these numbers of weights."""
    return {f"layer.{i}": torch.full((size,), fill + i) for i, size in enumerate(sizes)}


def assert_holds(folder: Path, tensors: dict[str, Tensor], limit: int) -> None:
    """These weights and no other file, each file as small as asked, or one tensor."""
    read = read_weights(folder)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    total, there = sum(tensor.nbytes for tensor in tensors.values()), {path.name for path in folder.iterdir()}
    if total <= limit or len(tensors) == 1:
        assert there == {SINGLE}
        return
    index = json.loads((folder / INDEX).read_text())
    assert there == {INDEX, *index["weight_map"].values()} and index["metadata"] == {"total_size": total}
    for shard in there - {INDEX}:
        held = load_file(folder / shard)
        assert {name for name, place in index["weight_map"].items() if place == shard} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 90)), min_size=1)
)
@example([([4, 4], 16), ([4, 4], 16), ([4, 4], 16)])  # shards of the same number, again and again
@example([([4, 4], 16), ([4, 4], 32), ([4, 4], 16)])  # to one file and back
def test_whatever_was_there_before_a_folder_holds_the_last_weights_in_files_of_at_most_a_shard(
    tmp_path_factory, writings
):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        for number, (sizes, limit) in enumerate(writings):
            patch.setattr(weights, "SHARD_BYTES", limit)
            write_weights(folder, some(sizes, 100.0 * number))
            assert_holds(folder, some(sizes, 100.0 * number), limit)


def test_a_model_in_shards_opens_here_and_in_transformers_and_on_the_page(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_model()
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    for _ in range(2):  # the second time under other names
        save_model(tmp_path / "run", model, tokenizer)
        assert len(list((tmp_path / "run").glob("model*.safetensors"))) > 3
        tokens = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            ours = model.logits(load_model(tmp_path / "run", CPU, torch.float32)[0](tokens))
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)(
                tokens
            ).logits
            torch.testing.assert_close(theirs[0], ours, rtol=0, atol=1e-4)
    shelf = Shelf(tmp_path, CPU)
    assert [run["name"] for run in shelf.look()[0]] == ["run"]
    opened, _ = shelf.model("run")
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    model.lm_head.weight.data.zero_()
    save_model(tmp_path / "run", model, tokenizer)
    assert not shelf.model("run")[0].lm_head.weight.any(), "the model of before is kept"


def test_an_index_that_cannot_be_read_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 16)
    (tmp_path / INDEX).write_text("{")
    write_weights(tmp_path, some([4, 4]))
    assert_holds(tmp_path, some([4, 4]), 16)
