"""Run folders: nothing is lost, two runs never mix, and whatever is wrong in a folder is one line."""

import errno
import itertools
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Killed, fresh_state, open_run, restart_point
from safetensors.torch import load_file, save_file

from minillm.chat import with_chat_template
from minillm.digest import digest
from minillm.errors import InputError
from minillm.io import weights
from minillm.io.disk import read_json, read_text, write_atomically, write_json
from minillm.io.huggingface import load_model, load_scalar_model, save_model, save_scalar_model
from minillm.io.weights import read_tensors, read_weights, write_weights
from minillm.model import LanguageModel, ModelConfig, initialize, scalar_from_language_model
from minillm.options import TrainingOptions
from minillm.run import RESUME_FILE, TrainingState
from minillm.tokenizer import Tokenizer
from minillm.tools.device import start_runtime
from minillm.tools.folder import (
    RUN_FILES,
    claim_folder,
    read_metrics,
    restore_state,
    save_state,
    start_run_folder,
)
from minillm.tools.provenance import provenance

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=262, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, max_position_embeddings=32,
)  # fmt: skip


def refusal(action: Callable, *arguments, **options) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(InputError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert message.strip() and "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- Writing


@pytest.mark.parametrize("step", ["open", "write", "chmod", "fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), TypeError("ours"), Killed()]
)
def test_whatever_ends_a_write_at_whatever_step_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, step, error
):
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    scratch = tmp_path / f".weights.{os.getpid()}.tmp"
    scratch.symlink_to(tmp_path / "not ours")  # must not be written through

    def fail(*_, **__):
        raise error

    def write(file: Path) -> None:
        file.write_bytes(b"half of the n")
        assert path.read_bytes() == b"old"
        if step == "write":
            fail()

    with monkeypatch.context() as patch:
        if step != "write":
            patch.setattr(f"minillm.io.disk.os.{step}", fail)
        if isinstance(error, OSError):
            message = refusal(write_atomically, path, write)
            assert str(path) in message and "No space left" in message and "unchanged" in message
        else:
            with pytest.raises(type(error)):
                write_atomically(path, write)
    assert contents(tmp_path) == {"weights": b"old"} and os.listdir(tmp_path) == ["weights"]
    write_atomically(tmp_path / "deep" / "er" / "file", write if step != "write" else Path.touch)
    assert [*contents(tmp_path)] == ["weights", "deep/er/file"]


def test_a_full_disk_while_weights_are_written_keeps_the_old_ones(tmp_path, monkeypatch):
    save_model(tmp_path, small_model(), TOKENIZER)
    before = contents(tmp_path)

    written = []

    def full_at_the_third(tensor):
        written.append(tensor)
        if len(written) % 3 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return tensor

    monkeypatch.setattr("minillm.io.weights.whole_tensor", full_at_the_third)
    message = refusal(save_model, tmp_path, small_model(seed=1), TOKENIZER)
    assert "model.safetensors" in message and "No space left" in message
    refusal(save_state, trained_state(), tmp_path)
    assert contents(tmp_path) == before


def test_a_digest_follows_its_parts_and_where_they_end():
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest("abc"), digest()}) == 5


def test_options_with_file_names_of_any_bytes_can_be_written(tmp_path):
    """Python hands such bytes over as lone surrogates, which no UTF-8 file can hold as they are."""
    write_json(tmp_path / "run.json", {"data": ["caf\udce9.txt"]})
    assert json.loads((tmp_path / "run.json").read_text()) == {"data": ["caf\udce9.txt"]}


def test_a_byte_order_mark_is_no_part_of_a_text_or_of_json(tmp_path):
    (tmp_path / "x.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_text(tmp_path / "x.json") == '{"a": 1}' and read_json(tmp_path / "x.json") == {"a": 1}


def test_a_field_that_stands_twice_is_refused_for_readers_take_either(tmp_path):
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "c": 2, "b": 1}}')
    with pytest.raises(InputError, match=r"x\.json: .*field 'b' twice"):
        read_json(tmp_path / "x.json")


def test_a_field_that_stands_twice_is_found_soon_among_as_many_as_a_vocabulary_has(tmp_path):
    names = [*map(str, range(100_000)), "99999"]
    (tmp_path / "x.json").write_text("{" + ", ".join(f'"{name}": 1' for name in names) + "}")
    began = time.process_time()
    with pytest.raises(InputError, match="field '99999' twice"):
        read_json(tmp_path / "x.json")
    assert time.process_time() - began < 10  # were each field held against all before it, it took hours


# ---- A kill between any two file operations

DEADLY = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
left: list[int | None] = [None]
"""The file operations that are left until a kill; None where none is to come."""


def die(event: str, _: tuple) -> None:
    """An audit hook, which cannot be taken off again: it lets nothing more be done once none is left."""
    if left[0] is not None and event in DEADLY:
        left[0] -= 1
        if left[0] < 0:
            raise Killed


sys.addaudithook(die)


def small_run(folder: Path, **options) -> None:
    """A run of two steps that saves after each and writes what a stage leaves at its end."""
    state = new_state()
    run = open_run(folder, **options)

    def save_model() -> None:
        write_json(folder / "config.json", {"step": state.step})

    with run.runtime.closing, run.training(state, 2, save_model):
        if run.already_finished():
            return
        while run.goes_on():
            advance(state)
            run.log_step(7, loss=1.0 + state.step, gradient_norm=float(state.data.position))
        run.end()
        write_json(folder / "report.json", {})
        run.finish()


def killed_at(number: int, folder: Path, **options) -> bool:
    """Whether a run met its end before its file operation of that number."""
    left[0] = number
    try:
        small_run(folder, **options)
    except Killed:
        return True
    finally:
        left[0] = None
    return False


def left_by(folder: Path) -> tuple:
    """What a run leaves, but for the time it took and what tells one sitting from another."""
    events = [{k: v for k, v in e.items() if "second" not in k} for e in read_metrics(folder)]
    tensors, numbers = restart_point(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return events, {name: tensor.tolist() for name, tensor in tensors.items()}, numbers, names


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_killed_between_any_two_file_operations_goes_on_as_if_it_had_not_been(
    tmp_path, monkeypatch, overwrite
):
    monkeypatch.setattr("minillm.tools.folder.provenance", cache(provenance))  # git and versions, asked once
    small_run(tmp_path / "whole")
    expected = left_by(tmp_path / "whole")
    for number in itertools.count():
        folder = tmp_path / str(number)
        if overwrite:
            shutil.copytree(tmp_path / "whole", folder)
            (folder / "samples.txt").write_text("of the run before")
        before = json.loads((folder / "run.json").read_text())["id"] if overwrite else ""
        if not killed_at(number, folder, overwrite=overwrite):
            break
        how = {"resume": True}
        if not (folder / "run.json").exists():
            how = {}  # nothing was begun
        elif json.loads((folder / "run.json").read_text())["id"] == before:
            if (folder / RESUME_FILE).exists():
                assert left_by(folder)[0] == expected[0], "the run before is whole, or cannot be resumed"
            how = {"overwrite": True}
        small_run(folder, **how)
        assert left_by(folder) == expected, number
    assert number > 40


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_weights_in_any_number_of_files_are_the_old_ones_or_the_new_after_a_kill(
    tmp_path, monkeypatch, before, after
):
    """And the next to be written leave nothing of what the kill left."""
    models = [{str(i): torch.full((6,), i + shift) for i in range(6)} for shift in (0.0, 10.0)]
    for number in itertools.count():
        folder, dead = tmp_path / str(number), False
        for files, model, left[0] in ((before, models[0], None), (after, models[1], number)):
            monkeypatch.setattr(weights, "SHARD_BYTES", 144 // files)
            try:
                write_weights(folder, model)
            except Killed:
                dead = True
            finally:
                left[0] = None
        read = read_weights(folder)
        assert any(all(torch.equal(read[name], model[name]) for name in model) for model in models)
        if not dead:
            break
        write_weights(folder, models[1])
        assert torch.equal(read_weights(folder)["5"], models[1]["5"])
        assert len(os.listdir(folder)) == (1 if after == 1 else after + 1)
    assert number > 5


# ---- Claiming a folder


def claim(folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """What a run does first with its folder, and at its end."""
    with start_runtime("cpu") as runtime:
        claim_folder(TrainingOptions(str(folder), resume, overwrite and not resume), runtime)


@pytest.mark.parametrize(
    ("files", "resume", "overwrite", "refused"),
    [
        (None, False, False, None),
        (None, True, False, None),
        ([], False, False, None),
        ([".DS_Store"], False, False, None),
        (["notes.txt"], False, False, "not a run's"),
        (["notes.txt"], False, True, "not a run's"),
        (["run.json", "notes.txt"], False, False, "--overwrite"),
        (["run.json", "notes.txt"], False, True, None),
        (["run.json", "model.safetensors"], False, False, "--resume"),
        (["run.json"], True, False, None),
        (["config.json", "model.safetensors"], False, True, "not a run's"),
    ],
)
def test_two_runs_never_mix_in_a_folder(tmp_path, files, resume, overwrite, refused):
    folder = tmp_path / "out"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("mine")
    before = contents(tmp_path)
    if refused:
        message = refusal(claim, folder, resume, overwrite)
        assert str(folder) in message and refused in message
    else:
        claim(folder, resume, overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("below", [".", "run", "a/b"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, resume, below):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refusal(claim, tmp_path / "file" / below, resume, True)


def test_a_folder_no_disk_can_hold_is_refused_before_anything_is_computed(tmp_path):
    assert "too long" in refusal(claim, tmp_path / ("x" * 300))


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of somebody without rights over other people's, whom root becomes for the test."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        Path(name).chmod(0o777)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield Path(name)
        finally:
            if root:
                os.setresuid(0, 0, 0)


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o500, 0o600, 0o300, 0o100])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_without_one_of_the_rights_is_refused_in_one_line(nobody, mode, inside, how):
    out = nobody / "private" / "run" if inside else nobody / "private"
    out.mkdir(parents=True)
    (out / "run.json").write_text("{}")
    (nobody / "private").chmod(mode)
    try:
        if not inside or not mode & 0o100:  # a folder inside needs no more than the way to it
            assert "private" in refusal(claim, out, **how)
        with pytest.raises((InputError, OSError), match="private"):
            load_model(nobody / "private" / "model", CPU, torch.float32)
    finally:
        (nobody / "private").chmod(0o700)
    assert os.listdir(out) == ["run.json"]


def test_a_new_run_removes_the_files_of_the_old_one_and_nothing_else(tmp_path):
    mine = {
        "notes.txt": b"mine",
        "resume/mine": b"mine",
        ".hidden": b"mine",
        "model.safetensors.bak": b"mine",
    }
    for name in [*mine, *map(str, RUN_FILES), "model-00001-of-00002.safetensors"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    start_run_folder(TrainingOptions(str(tmp_path), clip=0.5), "train")
    left = contents(tmp_path)
    run = json.loads(left.pop("run.json"))
    assert left == mine
    assert (run["stage"], run["options"]["clip"]) == ("train", 0.5) and "versions" in run


def test_a_folder_in_the_place_of_a_run_file_is_one_line(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert "config.json" in refusal(start_run_folder, TrainingOptions(str(tmp_path)), "train")


# ---- Opening models

TOKENIZER = Tokenizer.train(["a little world"], 262)


def small_model(config: ModelConfig = CONFIG, seed: int = 0) -> LanguageModel:
    model = LanguageModel(config)
    initialize(model, torch.Generator().manual_seed(seed))
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tmp_path, small_model(), TOKENIZER)
    return tmp_path


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "missing", tmp_path / "file"):
        assert str(place) in refusal(load_model, place, CPU, torch.float32)


def test_shards_are_one_model_and_an_index_that_names_none_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {f"model-{i}-of-2.safetensors": sorted(tensors)[i - 1 :: 2] for i in (1, 2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: shard for shard, names in shards.items() for n in names}}))
    model, _ = load_model(folder, CPU, torch.float32)
    assert torch.equal(model.lm_head.weight, small_model().lm_head.weight)
    (folder / "model-2-of-2.safetensors").unlink()
    assert "model-2-of-2.safetensors" in refusal(load_model, folder, CPU, torch.float32)
    for wrong in (None, ["a"], {"a": 1, "b": "c"}, {"a": ["b"]}, {"a": "../elsewhere.safetensors"}):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert "index.json" in refusal(load_model, folder, CPU, torch.float32)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("stretched", [("default",), ("llama3", 8.0, 1.0, 4.0, 16)])
def test_a_model_comes_back_as_it_was_saved(tmp_path, scalar, tied, causal, qk_norm, stretched):
    shape = replace(CONFIG, tie_word_embeddings=tied, causal=causal, qk_norm=qk_norm, rope=stretched)
    model, tokenizer = small_model(shape, seed=3), TOKENIZER
    if scalar:
        model, tokenizer = scalar_from_language_model(model, torch.Generator()), with_chat_template(TOKENIZER)
        model.bias.fill_(0.1)  # no float32 number: it must not be rounded twice
    (save_scalar_model if scalar else save_model)(tmp_path, model, tokenizer)
    again, own = (load_scalar_model if scalar else load_model)(tmp_path, CPU, torch.bfloat16)
    assert again.config == model.config and own.fingerprint == tokenizer.fingerprint
    assert again.model.compute_dtype == torch.bfloat16 and ("chat_template" in own.config) == scalar
    if scalar:
        assert torch.equal(again.bias, model.bias)
    else:
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_model_may_be_saved_over_the_folder_it_was_opened_from_and_old_constants_are_passed_over(folder):
    before = contents(folder)
    tensors = load_file(folder / "model.safetensors")
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors | constant, folder / "model.safetensors", metadata={"format": "pt"})
    save_model(folder, *load_model(folder, CPU, torch.float32))
    assert contents(folder) == before


# ---- Any damage at all


def flip(content: bytes, places: list[tuple[float, int]], length: float) -> bytes:
    """Some bytes replaced, then cut to a share of its length."""
    damaged = bytearray(content)
    for place, byte in places:
        damaged[int(place * (len(damaged) - 1))] = byte
    return bytes(damaged[: round(length * len(damaged))])


DAMAGE = st.tuples(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255) | st.sampled_from(b'09-e"[]{},:n')), max_size=4),
    st.just(1.0) | st.floats(0, 1),
)


# ---- The restart point


def new_state(config: ModelConfig = CONFIG, kind: str = "muon") -> TrainingState:
    return fresh_state(config, kind)


def advance(state: TrainingState) -> None:
    """An update that follows from the step alone."""
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + state.step)
    state.optimizers.step(1.0, 1e9)
    state.data.position += 3


def trained_state(**options) -> TrainingState:
    state = new_state(**options)
    advance(state)
    state.step, state.tokens, state.seconds = 1, 64, 0.5
    return state


def edit_restart(folder: Path, edit: Callable[[dict, dict], None]) -> None:
    tensors, metadata = read_tensors(folder / RESUME_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors, metadata)
    save_file(tensors, folder / RESUME_FILE, metadata=metadata)


def first(tensors: dict, beginning: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(beginning))


RESTARTS = {
    "weight missing": lambda t, m: t.pop("model.lm_head.weight"),
    "weight of another shape": lambda t, m: t.update({"model.lm_head.weight": torch.ones(3)}),
    "muon's state missing": lambda t, m: t.pop(first(t, "optimizer.0.")),
    "all optimizers missing": lambda t, m: [t.pop(n) for n in list(t) if n.startswith("optimizer.")],
    "state of another shape": lambda t, m: t.update({first(t, "optimizer.0."): torch.ones(3)}),
    "state of no name": lambda t, m: t.update({"optimizer.x": torch.ones(())}),
    "no numbers": lambda t, m: m.clear(),
    "numbers not JSON": lambda t, m: m.update(state="{"),
    "another step": lambda t, m: m.update(state=m["state"].replace('"step": 1', '"step": -1')),
    "another place": lambda t, m: m.update(state=m["state"].replace('"position": 3', '"position": 3.5')),
}  # fmt: skip


@pytest.mark.parametrize("damage", RESTARTS)
def test_a_restart_point_that_does_not_fit_is_refused_in_one_line(tmp_path, damage):
    save_state(trained_state(), tmp_path)
    edit_restart(tmp_path, RESTARTS[damage])
    before = contents(tmp_path)
    assert str(tmp_path / RESUME_FILE) in refusal(restore_state, new_state(), tmp_path)
    assert contents(tmp_path) == before


OTHERS = [
    {"kind": "adamw"}, {"config": replace(CONFIG, num_hidden_layers=1)},
    {"config": replace(CONFIG, qk_norm=False)},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_the_restart_point_of_another_run_is_refused(tmp_path, other):
    for one, two in (({}, other), (other, {})):
        save_state(trained_state(**one), tmp_path)
        assert str(tmp_path / RESUME_FILE) in refusal(restore_state, new_state(**two), tmp_path)


def test_a_missing_restart_point_is_refused_and_one_of_the_release_before_needs_no_seal(tmp_path):
    assert str(tmp_path / RESUME_FILE) in refusal(restore_state, new_state(), tmp_path)
    save_state(trained_state(), tmp_path)
    edit_restart(tmp_path, lambda t, m: m.pop("seal"))
    restore_state(again := new_state(), tmp_path)
    assert (again.step, again.data.position) == (1, 3)


@given(st.data())
@settings(max_examples=100)
def test_any_damage_to_a_restart_point_ends_well_or_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    save_state(trained_state(), folder)
    path = folder / RESUME_FILE
    content = path.read_bytes()
    size = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(flip(content[:size], *data.draw(DAMAGE)) + content[size:])
    try:
        restore_state(new_state(), folder)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
