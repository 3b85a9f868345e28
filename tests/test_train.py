"""Whole pretraining runs through the command line: trained, killed, resumed, shared out, refused."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from runs import (
    ROOT,
    SHARDED,
    TORCHRUN,
    assert_same_run,
    assert_two_processes_follow,
    folder_bytes,
    in_two_processes,
    killed_at_update,
    losses_of,
    metrics_of,
    missing_words,
    refusal,
)
from safetensors.torch import load_file

import train
from minillm.errors import InputError
from minillm.generate import SamplingOptions, generate
from minillm.io.huggingface import load_model, save_model
from minillm.optim import Optimizers

pytestmark = pytest.mark.usefixtures("quick_plots")

TINY = (
    "--depth 1 --vocab-size 300 --block-size 16 --batch-tokens 64 --steps 12 --val-every 4 --save-every 3 "
    "--samples 1 --precision float32"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A few kilobytes to train on."""
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text(
        "".join(f"On day {i} the {i % 7} cats met {i % 5} dogs by the well.\n" for i in range(200))
    )
    return path


def arguments(text: Path, out: Path, *options: str) -> list[str]:
    return ["--data", str(text), "--out", str(out), "--cache", str(out.parent / "cache"), *TINY, *options]


def run_in_process(text: Path, out: Path, *options: str) -> list[dict]:
    """Trains here and returns the metrics."""
    train.main(arguments(text, out, *options))
    return metrics_of(out)


def resume(out: Path) -> None:
    train.main(["--out", str(out), "--resume", "--cache", str(out.parent / "cache")])


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory) -> Path:
    """An uninterrupted run to compare with."""
    out = tmp_path_factory.mktemp("reference") / "base"
    run_in_process(text, out)
    return out


def test_a_finished_run_leaves_a_complete_folder_and_a_final_line(reference):
    events = metrics_of(reference)
    final = events[-1]
    assert final["event"] == "final" and final["step"] == 12 and final["tokens"] == 12 * 64
    assert final["seconds"] > 0 and 0 < final["val_nats_per_byte"] < 10
    assert final["sources"][0]["skipped"] == {}
    assert [s["name"] for s in final["sources"]] == ["tale.txt"] and final["sources"][0]["epochs"] > 0
    assert final["val_nats_per_byte"] == [e for e in events if e["event"] == "val"][-1]["nats_per_byte"]
    assert {p.name for p in reference.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json",
        "metrics.jsonl", "loss.png", "samples.txt", "resume",
    }  # fmt: skip
    record = json.loads((reference / "run.json").read_text())
    assert record["options"]["seed"] == 0 and record["options"]["steps"] == 12
    assert record["commit"] and record["versions"]["torch"] == version("torch")
    assert (reference / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_lowers_the_loss(reference):
    events = metrics_of(reference)
    val = [e["nats_per_byte"] for e in events if e["event"] == "val"]
    uniform = events[0]["nats_per_byte"]
    assert uniform > val[0] > val[1] > val[2] and val[2] < 0.7 * uniform


def test_another_seed_gives_another_run(text, tmp_path, reference):
    assert losses_of(run_in_process(text, tmp_path / "other", "--seed", "1")) != losses_of(
        metrics_of(reference)
    )


@pytest.mark.parametrize("extra", [(), ("--objective", "masked"), ("--optimizer", "adamw")], ids=str)
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(text, tmp_path, reference, extra):
    """And so two runs with one seed are the same."""
    whole, killed = tmp_path / "whole" if extra else reference, tmp_path / "killed"
    if extra:
        run_in_process(text, whole, *extra)
    # Killed at step 5, after the restart point of step 3: two steps are lost and done again.
    with killed_at_update(6):
        run_in_process(text, killed, *extra)
    assert max(e["step"] for e in metrics_of(killed)) == 5
    resume(killed)
    assert_same_run(whole, killed)


@pytest.mark.parametrize("extra", [(), SHARDED], ids=["each holds all", "sharded"])
def test_two_processes_follow_the_curve_of_one(text, tmp_path, reference, extra):
    words = arguments(text, tmp_path / "base", *extra)
    assert_two_processes_follow(reference, train, words, tmp_path / "base", rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torchrun's processes are not patched")
def test_a_sharded_run_that_is_killed_goes_on_bit_for_bit_in_as_many_processes_and_in_one(text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    in_two_processes(train, arguments(text, whole, *SHARDED))
    step, updates = Optimizers.step, itertools.count(1)

    def step_or_die(*given):
        if next(updates) == 6:  # after the restart point of step 3
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizers, "step", step_or_die)
        in_two_processes(train, arguments(text, killed, *SHARDED), signal.SIGKILL)
    assert max(event["step"] for event in metrics_of(killed)) == 5
    alone = shutil.copytree(killed, tmp_path / "alone")
    in_two_processes(train, [*arguments(text, killed, *SHARDED), "--resume"])
    assert_same_run(whole, killed)
    train.main([*arguments(text, alone), "--resume"])
    one, two = (losses_of(metrics_of(out)) for out in (alone, whole))
    # Bit for bit up to the restart point, and but for float32's sums in another order after it.
    before = sum(step <= 3 for _, step, _ in two)
    assert one[:before] == two[:before] and [x[:2] for x in one] == [x[:2] for x in two]
    assert [x[2] for x in one] == pytest.approx([x[2] for x in two], rel=1e-4)


def test_under_torchrun_one_process_says_an_error_and_all_end_with_code_2(tmp_path):
    words = ["train.py", "--data", "nowhere.txt", "--out", str(tmp_path / "out")]
    done = subprocess.run([*TORCHRUN, *words], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "interrupted"))]
    assert len(said) == 1 and "nowhere.txt" in said[0] and done.stderr.count("exitcode  : 2 ") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="by an option of Linux")
def test_processes_of_torchrun_end_with_it_even_where_it_is_killed(text, tmp_path):
    """They waited for one another for more than an hour."""
    command = [*TORCHRUN, str(ROOT / "train.py"), "--data", str(text), "--out", str(tmp_path / "two")]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[Path] = []
    while not (len(started) == 2 and all("libtorch" in (one / "maps").read_text() for one in started)):
        assert launcher.poll() is None
        time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        started = [Path("/proc", child) for child in children.split()]
    launcher.kill()
    launcher.wait()
    limit = time.monotonic() + 30
    while any(one.exists() and "State:\tZ" not in (one / "status").read_text() for one in started):
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_accumulating_small_batches_follows_the_curve_of_one_batch(text, tmp_path, reference):
    events = run_in_process(text, tmp_path / "base", "--micro-tokens", "16")
    one = [x[2] for x in losses_of(metrics_of(reference))]
    assert [x[2] for x in losses_of(events)] == pytest.approx(one, rel=1e-4)


def test_a_masked_model_trains_on_other_masks_each_step_and_generate_refuses_it(text, tmp_path, monkeypatch):
    out, real, seeds = tmp_path / "masked", train.mask_tokens, []
    monkeypatch.setattr(
        train, "mask_tokens", lambda *args, seed: seeds.append(seed) or real(*args, seed=seed)
    )
    events = run_in_process(text, out, "--objective", "masked", "--steps", "40")
    losses = [e["loss"] for e in events if e["event"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert len(set(seeds[-40:])) == 40
    model, tokenizer = load_model(out, torch.device("cpu"), torch.float32)
    assert not model.config.causal
    with pytest.raises(InputError, match="masked"):
        generate(model, [[tokenizer.bos_id]], SamplingOptions(max_new_tokens=3), [0])


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_run_goes_on_from_another_model_with_its_tokenizer_and_longer_rows(
    text, tmp_path, reference, block_size
):
    out, own = tmp_path / "adapted", ("--depth", "--vocab-size", "--block-size")
    kept = [word for i in range(0, len(TINY), 2) if TINY[i] not in own for word in TINY[i : i + 2]]
    places = ["--data", str(text), "--init", str(reference), "--out", str(out)]
    train.main([*places, "--cache", str(tmp_path / "cache"), "--block-size", str(block_size), *kept])
    assert (out / "tokenizer.json").read_bytes() == (reference / "tokenizer.json").read_bytes()
    first = metrics_of(out)[0]["loss"]
    assert first < metrics_of(reference)[0]["loss"] - 0.5, "it must start from the trained weights"
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == block_size


def test_a_run_says_first_what_it_trains_on_and_each_validation_in_a_line(text, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(text.read_bytes())
    (tmp_path / "data" / "b.c").write_text("int x;")
    (tmp_path / "val.txt").write_text("On day 3 the cats met.\n" * 9)
    out = tmp_path / "base"
    run_in_process(tmp_path / "data", out, "--val-data", str(tmp_path / "val.txt"), "--vocab-size", "9999")
    lines = capsys.readouterr().out.splitlines()
    size = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert f"{size:,} parameters" in lines[0] and "9,999 asked for" in lines[0]
    sides = next(line for line in lines if line.startswith("data: "))
    assert f"train {text.stat().st_size:,} bytes" in sides and "1 .c" in sides and "held out" not in sides
    assert any(f"val.txt: held out {23 * 9} bytes" in line for line in lines)
    assert sum(line.startswith("step ") and "val" in line for line in lines) == 3


@pytest.mark.parametrize(
    ("options", "compiled"), [((), 0), (("--compile", "False"), 0), (("--compile", "True"), 1)]
)
def test_a_model_is_compiled_where_that_is_asked_for(text, tmp_path, monkeypatch, options, compiled):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: calls.append(model))
    run_in_process(text, tmp_path / "run", "--device", "cpu", "--steps", "1", *options)
    assert len(calls) == compiled


def test_where_validation_rises_the_best_model_is_kept_and_sampled(text, tmp_path, monkeypatch, capsys):
    scores, real = iter([2.0, 1.0, 3.0]), train.validation_loss
    kept: list[float] = []

    def rising(*arguments):
        return replace(real(*arguments), per_byte=next(scores))

    def save(folder, model, tokenizer):
        kept.append(next(model.parameters()).sum().item())
        save_model(folder, model, tokenizer)

    monkeypatch.setattr(train, "validation_loss", rising)
    monkeypatch.setattr(train, "save_model", save)
    out = tmp_path / "base"
    final = run_in_process(text, out, "--save-every", "1")[-1]
    assert final["val_nats_per_byte"] == 1.0
    model, _ = load_model(out, torch.device("cpu"), torch.float32)
    assert next(model.parameters()).sum().item() == pytest.approx(kept[-1])
    # Until the first validation each restart point has a model beside it, then only the best is written.
    assert len(kept) == 4 - 1 + 1 + 1
    assert "rose" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_another_validation_text(text, tmp_path, capfd):
    """The lowest loss on the old one would decide which model is kept, with losses on the new."""
    other, out = tmp_path / "val.txt", tmp_path / "run"
    other.write_text("Val day.\n" * 40)
    run_in_process(text, out, "--val-data", str(other))
    other.write_text("Val Day.\n" * 40)
    again = ["--out", str(out), "--resume", "--cache", str(tmp_path / "cache"), "--steps", "13"]
    assert "what is held out" in refusal(train, again, capfd, shown=True)


# Bad input: one line, exit 2, nothing lost


BAD_INPUT = {
    "missing file": ("--data nowhere.txt", "nowhere.txt"),
    "too short for a row": ("--data {d}/short.txt", "short.txt"),
    "two sources of one name": ("--data {t} {t}", "name"),
    "vocabulary too small": ("--vocab-size 100", "vocab"),
    "validation of everything": ("--val-fraction 1", "--val-fraction"),
    "validation of nothing": ("--val-fraction 0", "--val-fraction"),
    "heads that do not divide": ("--heads 3 --kv-heads 2", "heads"),
    "unknown device": ("--device abacus", "--device"),
    "CUDA where there is none": ("--device cuda:99", "--device"),
    "init from nowhere": ("--init nowhere", "nowhere"),
    "init from a folder that is no run": ("--init {d}", "config.json"),
    "init with another shape": ("--init {r} --width 64 --block-size 16", "--width"),
    "an encoding that is none": ("--encoding klingon", "--encoding"),
    "init with another objective": ("--init {r} --block-size 16 --objective masked", "objective"),
    "resume and overwrite at once": ("--resume --overwrite", "--overwrite"),
    "resume where nothing is": ("--resume", "--resume"),
    "out is a file": ("--out {t}", "is a file"),
    "out holds a run": ("--out {r}", "--overwrite"),
    "out holds other files": ("--out {d}", "not a run"),
    "resume with other options": ("--out {r} --resume --seed 7", "--seed"),
}
"""What is wrong with a file itself, test_sources.py tries; numbers that are nonsense, test_bad_input.py."""


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_and_exit_2_and_changes_nothing(case, text, reference, tmp_path, capfd):
    if "--device cuda" in BAD_INPUT[case][0] and torch.cuda.device_count() > 99:
        pytest.skip("a machine of a hundred GPUs")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "short.txt").write_text("too short")
    before = folder_bytes(reference), folder_bytes(bad), text.read_bytes()
    options, words = BAD_INPUT[case]
    given = options.format(d=bad, t=text, r=reference).split()
    defaults = {"--data": str(text), "--out": str(tmp_path / "out"), "--cache": str(tmp_path / "cache")}
    given += missing_words(given, defaults)
    assert words in refusal(train, given, capfd)
    assert before == (folder_bytes(reference), folder_bytes(bad), text.read_bytes())
    assert not (tmp_path / "out").exists()


def test_replace_reads_what_strict_refuses_and_counts_it(tmp_path):
    lines = "".join(json.dumps({"text": f"a line of text, number {i}"}) + "\n" for i in range(100))
    (tmp_path / "torn.jsonl").write_text(lines + '{"text": "to')
    events = run_in_process(tmp_path / "torn.jsonl", tmp_path / "base", "--errors", "replace")
    assert events[-1]["sources"][0]["skipped"] == {"lines that do not parse": 1}


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_restart_point(text, tmp_path):
    out = tmp_path / "base"
    with killed_at_update(5):
        run_in_process(text, out)
    before = (out / "resume" / "state.safetensors").read_bytes()
    limit = len(before) // 2

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "train.py", "--resume", "--out", str(out), "--cache", str(tmp_path / "cache")],
        cwd=ROOT, preexec_fn=small_disk, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert (out / "resume" / "state.safetensors").read_bytes() == before
    assert not list(out.rglob("*.tmp"))


def test_another_package_named_kernels_is_refused_in_one_line(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "import minillm"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "kernels" in done.stderr
