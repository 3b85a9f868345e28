"""The frame around every training loop: what it counts, when it acts, and how it ends."""

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    HERE,
    ROOT,
    Killed,
    assert_same_run,
    folder_bytes,
    fresh_state,
    killed_at_update,
    metrics_of,
    open_run,
    refusal,
)

import sft
import train
from minillm.errors import InputError
from minillm.optim import Optimizers
from minillm.options import TrainingOptions
from minillm.run import RESUME_FILE, Run, Runtime, TrainingState
from minillm.tools import folder as folder_rules
from minillm.tools import plots
from minillm.tools.device import start_runtime
from minillm.tools.ending import one_line_errors, signals
from minillm.tools.folder import MODEL_FILES, claim_folder, hold, read_metrics
from minillm.tools.plots import save as draw

pytestmark = pytest.mark.usefixtures("quick_plots")


def update(state: TrainingState) -> None:
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizers.step(1.0, 1e9)


def test_a_loop_takes_each_step_once_and_acts_when_it_is_due(tmp_path):
    run, state, saved = open_run(tmp_path / "run", save_every=3), fresh_state(), []
    with run.training(state, 7, lambda: saved.append(state.step)):
        while run.goes_on():
            update(state)
            run.log_step(10, loss=1.0, gradient_norm=1.0, extra=2.0)
        run.end()
    assert saved == [3, 6, 7]
    assert state.step == 7 and state.tokens == 70 and state.seconds > 0
    events = read_metrics(run.folder)
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert all(event["extra"] == 2.0 and event["tokens_per_second"] > 0 for event in events)


@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.integers(0, 1))
def test_any_figure_that_is_no_number_ends_the_run_by_name(value, place):
    figures = {"loss": 1.0, "gradient_norm": 2.0}
    name = list(figures)[place]
    run = Run.__new__(Run)
    run.folder, run.state, run.stage, run.saved_step = "out/x", fresh_state(), "train", 0
    with pytest.raises(InputError, match=f"{name.replace('_', ' ')} {value}.*at step 0.*is kept"):
        run.log_step(1, **{**figures, name: value})


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    run, state, saved = open_run(tmp_path / "run"), fresh_state(), []
    with run.training(state, 2, lambda: saved.append(state.step)):
        run.log_step(1, loss=1.0, gradient_norm=1.0)
        run.save()
        good = (run.folder / "resume" / "state.safetensors").read_bytes()
        with torch.no_grad():
            next(state.model.parameters())[0, 0] = torch.nan
        with pytest.raises(InputError, match="weights are no longer finite"):
            run.save()
    assert saved == [1] and (run.folder / "resume" / "state.safetensors").read_bytes() == good


def test_the_clock_runs_on_over_the_sittings_of_a_run(tmp_path):
    run, state = open_run(tmp_path / "run"), fresh_state()
    with run.training(state, 2, lambda: None):
        update(state)
        run.log_step(5, loss=1.0, gradient_norm=1.0)
        state.seconds = 1.0
        run.earlier_seconds = 1000.0  # as if there had been a long sitting before
        run.save()
    run.runtime.closing.close()
    again, later = open_run(tmp_path / "run", resume=True), fresh_state()
    with again.training(later, 2, lambda: None):
        assert again.resuming and later.step == 1 and later.tokens == 5 and 1000 < later.seconds < 1100
        again.log_step(5, loss=1.0, gradient_norm=1.0)
        again.save()
    assert later.seconds > 1000 and later.tokens == 10


# ---- Whole runs, through the command line

TINY = (
    "--depth 1 --width 32 --vocab-size 270 --block-size 16 --batch-tokens 32 --steps 4 --save-every 2 "
    "--val-every 2 --val-tokens 32 --samples 1 --precision float32 --warmup 0"
).split()


def write_data() -> None:
    """In the current folder a text and conversations to train on."""
    Path("tale.txt").write_text("".join(f"On day {i} the {i % 7} cats met.\n" for i in range(80)))
    chats = [
        [{"role": "user", "content": f"Day {i}?"}, {"role": "assistant", "content": f"{i % 7} cats."}]
        for i in range(14)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with data."""
    monkeypatch.chdir(tmp_path)
    write_data()
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        write_data()
        return pretrain().resolve()


def pretrain(*options: str, out: str = "base") -> Path:
    train.main(["--data", "tale.txt", "--out", out, *TINY, "--cache", "cache", *options])
    return Path(out)


def resume(out: str = "base", *options: str) -> Path:
    train.main(["--resume", "--out", out, *options])
    return Path(out)


def events_of(out: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in metrics_of(out)]


def failing(*_: object) -> None:
    raise Killed


def test_a_step_that_processes_cannot_share_is_refused_by_the_option_that_sets_it():
    three = Runtime(torch.device("cpu"), torch.float32, world_size=3)
    assert three.rows_of_step("--batch-tokens", 800, 128) == 6 and three.rows_of_step("--batch-sets", 6) == 6
    for option, size, row, least in (("--batch-tokens", 640, 128, 384), ("--ptx-tokens", 9, 128, 384),
                                     ("--batch-sets", 4, 1, 3)):  # fmt: skip
        with pytest.raises(InputError, match=rf"{option} {size}: .* 3 processes; .* multiple of {least}$"):
            three.rows_of_step(option, size, row)


# ---- One run in a folder at a time


def test_a_second_start_in_the_same_folder_ends_in_one_line_and_the_first_is_not_disturbed(here, capfd):
    out = pretrain()
    before = folder_bytes(out)
    with start_runtime("cpu") as runtime:
        claim_folder(TrainingOptions("base", resume=True), runtime)
        capfd.readouterr()
        for how in ("--resume", "--overwrite"):
            line = refusal(train, ["--data", "tale.txt", "--out", "base", how, *TINY[:2]], capfd)
            assert "another run" in line and "base" in line
    assert folder_bytes(out) == before
    resume()


def test_two_new_runs_of_one_name_do_not_both_start(here, capfd):
    with start_runtime("cpu") as runtime:
        claim_folder(TrainingOptions("base"), runtime)
        line = refusal(train, ["--data", "tale.txt", "--out", "base", *TINY], capfd)
    assert "another run" in line and not Path("base").exists()


def test_a_lock_goes_with_its_process_however_that_ends(here):
    code = (
        "import os, sys; from minillm.tools.folder import hold; from pathlib import Path\n"
        "with hold(Path('base'), wait=False): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError), hold(Path("base"), wait=False):
        pass
    holder.kill()
    holder.communicate()
    with hold(Path("base"), wait=False):
        pass


def test_a_folder_that_is_removed_while_it_is_waited_for_is_made_and_held_anew(tmp_path, monkeypatch):
    flock, asked, folder = fcntl.flock, [], tmp_path / "held"

    def removed_at_first(handle: int, how: int) -> None:
        flock(handle, how)
        asked.append(how)
        if len(asked) == 1:
            folder.rmdir()

    monkeypatch.setattr(fcntl, "flock", removed_at_first)
    with hold(folder, wait=True):
        assert folder.is_dir() and len(asked) == 2


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(here):
    out = pretrain()
    dead = 2**22 + 1  # no process has so high a number
    files = ("loss.png", "model-00001-of-00002.safetensors", "resume/.state.safetensors")
    gone = {f".{name}.{dead}.tmp" for name in files[:2]} | {f"{files[2]}.{dead}.tmp"}
    for name in gone:
        (out / name).write_bytes(b"half")
    mine = {"resume/.hidden": b"mine", ".mine.tmp": b"mine", ".tmp": b"mine", f".mine.{dead}.tmp": b"mine"}
    for name, content in mine.items():
        (out / name).write_bytes(content)
    before = set(folder_bytes(out))
    resume()
    assert before - set(folder_bytes(out)) == gone


def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(here):
    before = os.umask(0o027)
    try:
        out = pretrain()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o640}


# ---- The end of a run, and going on from there


def test_what_a_kill_at_the_end_left_out_is_made_at_the_next_start(here, monkeypatch, whole):
    for seam in ("write_samples", "plot_loss"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train if seam == "write_samples" else plots, seam, failing)
            pretrain(out=seam)
        assert ("final", 4) not in events_of(Path(seam))
        assert folder_bytes(resume(seam)).keys() == folder_bytes(whole).keys()
        assert events_of(Path(seam)) == events_of(whole) and events_of(whole)[-1] == ("final", 4)


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_asked_for_them_at_once(here):
    steady = ("--decay", "0")
    whole, out = pretrain(*steady, "--steps", "6", out="whole"), pretrain(*steady)
    resume("base", "--steps", "6")
    assert_same_run(whole, out)
    assert events_of(out) == events_of(whole)
    before = folder_bytes(out)
    resume("base")
    assert folder_bytes(out) == before, "the new number of steps is the run's"


def test_a_continuation_takes_what_changes_no_weight_and_refuses_the_rest_by_name(here, capfd, whole):
    with killed_at_update(4):
        pretrain()
    free = "--save-every 1 --samples 0 --micro-tokens 9999 --val-tokens 16 --device cpu"
    resume("base", *free.split())
    assert_same_weights(whole, Path("base"))
    assert json.loads(Path("base/run.json").read_text())["options"]["samples"] == 0
    capfd.readouterr()
    for words in ("--matrix-rate 1", "--steps 3", "--seed 1", "--decay 0.1"):
        assert words.split()[0] in refusal(train, ["--resume", "--out", "base", *words.split()], capfd)


def assert_same_weights(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("update", [1, 4])
def test_a_run_over_the_model_it_starts_from_keeps_that_until_there_is_another(here, update):
    pretrain()
    given = ["--init", "base", "--data", "tale.txt", "--cache", "cache", *TINY[6:]]
    train.main([*given, "--out", "whole"])
    before = folder_bytes(Path("base"))
    with killed_at_update(update):
        train.main([*given, "--out", "base", "--overwrite"])
    if update == 1:
        for name in MODEL_FILES:
            assert folder_bytes(Path("base")).get(name) == before.get(name), name
    resume()
    assert_same_weights(Path("base"), Path("whole"))


def test_sft_over_its_base_model_goes_on_from_that_after_a_kill_at_its_first_save(here, monkeypatch):
    pretrain("--block-size", "64")
    given = "--init base --data chats.jsonl --cache cache --batch-tokens 64 --steps 4 --save-every 2 "
    given += "--val-every 2 --warmup 0 --precision float32 --val-fraction 0.3"
    sft.main([*given.split(), "--out", "whole"])
    save = folder_rules.save_state
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # The new model is written, its restart point is not.
        patch.setattr(folder_rules, "save_state", lambda s, folder: failing() if s.step else save(s, folder))
        sft.main([*given.split(), "--out", "base", "--overwrite"])
    sft.main(["--resume", "--out", "base"])
    assert_same_weights(Path("base"), Path("whole"))


@pytest.mark.parametrize("save_every", ["1", "4"])
def test_after_an_explosion_the_message_is_true_and_its_advice_works(here, capfd, save_every):
    exploding = ["--matrix-rate", "1e30", "--weight-decay", "1e-15", "--save-every", save_every]
    line = refusal_at_end(["--data", "tale.txt", "--out", "base", *TINY, *exploding], capfd)
    saved = Path("base", RESUME_FILE).exists()
    assert ("a restart point is kept, of step" in line) == saved and ("nothing was saved" in line) != saved
    assert saved == (save_every == "1")
    assert "--overwrite" in line and "lower --matrix-rate" in line
    pretrain("--overwrite")


def refusal_at_end(arguments: list[str], capfd: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


# ---- Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_polite_signal_saves_and_says_how_to_go_on(here, monkeypatch, capfd, whole, number):
    step = Optimizers.step

    def step_and_ask(*arguments):
        os.kill(os.getpid(), number)
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Optimizers, "step", step_and_ask)
        pretrain(out="a base")
    assert stop.value.code == 130
    assert "python train.py --resume --out 'a base'" in capfd.readouterr().out
    resume("a base")
    assert_same_run(Path("a base"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_in_one_word_and_leaves_nothing(here, monkeypatch, capfd, number):
    monkeypatch.setattr(train, "tokenize", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        pretrain()
    assert stop.value.code == 128 + number and capfd.readouterr().err == "interrupted\n"
    assert not Path("base").exists()


@pytest.mark.parametrize(
    "command", ["train.py", "sft.py", "rlhf.py", "-m minillm.chat", "-m minillm.compare"]
)
def test_ctrl_c_while_torch_is_imported_ends_in_one_word(tmp_path, command):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"interrupted\n" and process.returncode == 130


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals(failing):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is failing
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_same_one_told_twice(monkeypatch):
    run, clock = Run.__new__(Run), [0.0]
    run.runtime, run.state, run.steps, run.told_to_stop = HERE, fresh_state(), 1, math.inf
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert run.goes_on()
    run._stop(signal.SIGINT, None)
    clock[0] = 0.5
    run._stop(signal.SIGINT, None)
    assert not run.goes_on()
    clock[0] = 5.0
    with pytest.raises(KeyboardInterrupt):
        run._stop(signal.SIGINT, None)


# ---- Streams, names and options


def test_a_folder_of_any_name_is_trained_in_and_commands_no_terminal(here, monkeypatch, capfd):
    monkeypatch.setattr(plots, "save", draw)
    out = pretrain(out="cost_$5_$6\x1b[31m_{\\")
    assert events_of(out)[-1] == ("final", 4) and (out / "loss.png").exists()
    assert "\x1b" not in capfd.readouterr().out


def test_data_in_a_file_whose_name_is_no_utf8_is_trained_on_and_a_run_of_such_a_name_is_refused(here, capfd):
    name = os.fsdecode(b"caf\xe9.txt")
    Path("tale.txt").rename(name)
    train.main(["--data", name, "--out", "base", *TINY, "--cache", "cache"])
    train.main(["--resume", "--out", "base", "--steps", "6"])
    capfd.readouterr()
    assert "no UTF-8" in refusal(train, ["--data", name, "--out", os.fsdecode(b"\xe9"), *TINY], capfd)


@pytest.mark.parametrize("given", ["--data books", "--data b=books:0.5", "--data tale.txt books"])
def test_a_run_inside_a_folder_that_it_reads_is_refused_for_it_would_read_its_own_files(here, capfd, given):
    Path("books/more").mkdir(parents=True)
    Path("books/a.txt").write_bytes(Path("tale.txt").read_bytes())
    before = folder_bytes(here)
    said = refusal(train, [*given.split(), "--out", "books/more/base", *TINY], capfd)
    assert "is inside books" in said and folder_bytes(here) == before
    train.main([*given.split(), "--out", "books2", *TINY, "--cache", "cache"])


SMALL = "import sys; from minillm.tools.ending import one_line_errors\nwith one_line_errors():\n    "


@pytest.mark.parametrize(
    ("action", "streams", "code", "told"),
    [
        ("print('x' * 99999)", ">/dev/full", 2, "No space left"),
        ("print('x')", ">/dev/full", 2, "No space left"),
        ("raise SystemExit(print('x'))", ">/dev/full", 2, "No space left"),
        ("print('x')", ">&-", 0, ""),
        ("print('x', file=sys.stderr)", "2>&-", 0, ""),
        ("open('y' * 300)", "", 2, "File name too long"),
        ("input()", "<&-", 1, "EOFError"),
        ("print('é→')", "", 0, ""),
        ("raise MemoryError", "", 2, "memory"),
        ("raise RuntimeError('[gloo] Connection closed by peer')", "", 2, "another process"),
    ],
)
def test_a_closed_or_full_stream_is_told_or_ignored(action, streams, code, told):
    command = ["bash", "-c", f'"$0" -c "$1" {streams}', sys.executable, SMALL + action]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    assert code == 1 or ("Traceback" not in done.stderr and "Exception ignored" not in done.stderr)


@pytest.mark.parametrize("ended", [True, False])
def test_a_later_process_of_torchrun_says_an_error_only_where_it_outlives_the_first(
    monkeypatch, capfd, ended
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM) if ended else None)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise InputError("of its own")
    assert stop.value.code == 2 and ("of its own" in capfd.readouterr().err) != ended


def test_text_of_others_commands_no_terminal_wherever_it_is_printed():
    action = (
        "print('a\\r\\n\\x1b[2J\\r\\tb'); print('\\x1b[2Jc', file=sys.stderr); raise InputError('\\x1b[2Jd')"
    )
    code = SMALL.replace("import one", "import InputError, one") + action
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "\x1b" not in done.stdout + done.stderr
    assert done.stdout.endswith("a\n\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\tb\n")


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-"])
def test_a_bar_that_cannot_be_shown_ends_no_run(here, stream):
    command = shlex.join(
        [sys.executable, str(ROOT / "train.py"), "--data", "tale.txt", "--out", "base", *TINY]
    )
    done = subprocess.run(["bash", "-c", f"{command} {stream}"], capture_output=True, text=True)
    assert done.returncode == 0 and events_of(Path("base"))[-1] == ("final", 4)


OPTIONS = {
    "--seed 9223372036854775808": "--seed",
    "--seed 18446744073709551616": "--seed",
    "--device meta": "--device",
    "--device vulkan": "--device",
    "--device xla": "--device",
    "--device xpu": "--device",
    "--width 3000000 --heads 1": "memory",
    "--decay 7": "--decay",
    "--warmup 100000": "--warmup",
    "--block-size 1": "--block-size",
}


@pytest.mark.parametrize("given", OPTIONS)
def test_an_option_that_torch_would_trip_over_is_refused_in_one_line(here, capfd, given):
    words = ["--data", "tale.txt", "--out", "base", "--cache", "cache", *TINY[4:], *given.split()]
    assert OPTIONS[given] in refusal(train, words, capfd)
    assert not Path("base").exists()


def test_the_largest_seed_trains_masked_and_causal(here):
    for objective in ("masked", "causal"):
        pretrain("--seed", str(2**63 - 1), "--objective", objective, out=objective)


def test_processes_without_torchrun_are_refused_in_one_line(here, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refusal(train, ["--data", "tale.txt", "--out", "base", *TINY], capfd)


def test_a_vocabulary_that_the_text_cannot_give_is_said(here, capfd):
    pretrain("--vocab-size", "200000")
    assert "no more of the 200,000 asked for are in the text" in capfd.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(here, monkeypatch, capfd):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "permissions" in refusal(train, ["--data", "nowhere", "--out", "base", *TINY], capfd)
    assert not Path("base").exists()
