"""From the command line to the options: each flag in its place, one line for each mistake, and --resume."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROOT

import rlhf
import sft
import train
from minillm.compare import __main__ as compare
from minillm.errors import InputError
from minillm.options import Count, Positive, Seed, TrainingOptions, check_limits
from minillm.tools import chat, commandline
from minillm.tools.commandline import parse_options

SCRIPTS = [train, sft, rlhf, chat, compare]


@dataclass(frozen=True)
class Options:
    """A small script's options, one of every kind."""

    out: str = "out/x"
    resume: bool = False
    overwrite: bool = False
    data: tuple[str, ...] = ()
    steps: Count | None = None
    rate: Positive = 0.5
    kind: Literal["causal", "masked"] = "causal"
    loud: bool = False
    quick: bool = True
    qk_norm: bool | None = None
    device: str = "auto"
    # Renamed in this release:
    ppo_epochs: int = 2
    target_kl: float = 0.05
    adaptive_kl_target: float | None = None

    free_to_change: ClassVar = TrainingOptions.free_to_change

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def __post_init__(self) -> None:
        check_limits(self)


VALUES = {
    "out": st.sampled_from(["a", "b/c", "with space"]),
    "data": st.lists(st.sampled_from(["a.txt", "b=c:0.5", "*.md"]), min_size=1, max_size=3).map(tuple),
    "steps": st.integers(1, 10**6),
    "rate": st.floats(min_value=1e-30, max_value=1e30),
    "kind": st.sampled_from(["causal", "masked"]),
    "loud": st.just(True),
    "quick": st.just(False),
    "qk_norm": st.booleans(),
    "device": st.sampled_from(["cpu", "cuda:1"]),
}
GIVEN = st.fixed_dictionaries({}, optional=VALUES)
LAW = settings(max_examples=25)


def flags(given: dict, underscores: bool = False) -> list[str]:
    """The command line that gives these values."""
    words = []
    for name, value in given.items():
        name = f"no_{name}" if name == "quick" and not value else name
        words.append("--" + (name if underscores else name.replace("_", "-")))
        if isinstance(value, tuple):
            words += value
        elif not isinstance(value, bool) or name == "qk_norm":
            words.append(str(value))
    return words


def refusal(arguments: list[str], kind: type = Options) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(InputError) as caught:
        parse_options(kind, arguments)
    message = str(caught.value)
    assert message.strip() and "\n" not in message and "│" not in message
    return message


def start_run(folder: Path, given: dict) -> None:
    """What a script leaves in run.json."""
    options = parse_options(Options, flags({**given, "out": str(folder)}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"options": asdict(options)}))


def resume(folder: Path, given: dict) -> list[str]:
    return flags({**given, "out": str(folder), "resume": True})


# ---- One command line


@given(GIVEN, st.booleans())
@LAW
def test_every_flag_reaches_its_field_and_the_others_keep_their_defaults(given_values, underscores):
    options = parse_options(Options, flags(given_values, underscores))
    assert asdict(options) == asdict(Options()) | given_values


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--stepps 3", "--stepps"),
        ("--steps three", "--steps"),
        ("--steps 1.5", "--steps"),
        ("--steps", "--steps"),
        ("--steps 3 --data --rate 1", "--data: names nothing"),
        ("--data", "--data: names nothing"),
        ("--rate fast", "--rate"),
        ("--kind other", "--kind"),
        ("--qk-norm perhaps", "--qk-norm"),
        ("stray", "stray"),
        ("--loud yes", "yes"),
        ("--steps 0", "--steps 0: give at least 1"),
        ("--steps 0 --resume", "--steps 0"),
        ("--rate inf", "--rate inf"),
        ("--rate 1e39", "from 1e-30 to 1e30"),  # no float32
        ("--rate 1e-320", "from 1e-30 to 1e30"),
    ],
)
def test_a_command_line_that_does_not_fit_is_refused_in_one_line(arguments, named):
    assert named in refusal(arguments.split())


def test_a_missing_option_is_told_without_the_marks_of_a_help_page():
    assert "--stage" in (said := refusal([], rlhf.Options)) and "(required)" not in said


WORDS = st.text(min_size=1, max_size=8) | st.sampled_from(
    ["--steps", "--data", "--kind", "3", "~", "--out=~"]
)


@given(st.lists(WORDS, max_size=4))
@LAW
def test_no_command_line_ends_in_anything_but_options_or_one_line(words):
    if not {"-h", "--help", "--resume"} & set(words):
        try:
            parse_options(Options, words)
        except InputError as error:
            assert len(str(error).splitlines()) == 1


@given(st.integers() | st.floats())
@LAW
def test_a_limit_is_met_wherever_options_are_made(value):
    @dataclass(frozen=True)
    class Limited:
        count: Count | None = None
        seed: Seed = 0
        rate: Positive = 1.0

    holds = {"count": value >= 1, "seed": 0 <= value < 2**63, "rate": 1e-30 <= value <= 1e30}
    for name, fits in holds.items():
        if fits:
            check_limits(Limited(**{name: value}))
        else:
            with pytest.raises(InputError, match=f"--{name} .*: give "):
                check_limits(Limited(**{name: value}))


# ---- --resume


@given(GIVEN, GIVEN)
@LAW
def test_resume_brings_back_every_option_and_refuses_another_value_unless_it_changes_no_result(
    tmp_path_factory, first, second
):
    folder = tmp_path_factory.mktemp("run")
    start_run(folder, first)
    expected = asdict(Options()) | first | {"out": str(folder), "resume": True}
    for again in ({}, first):
        assert asdict(parse_options(Options, resume(folder, again))) == expected
    free = Options.free_to_change | (
        {"steps"} if second.get("steps", 0) > (expected["steps"] or 0) else set()
    )
    changed = {name for name, value in second.items() if value != expected[name]} - free
    if changed:
        message = refusal(resume(folder, second))
        for name in VALUES:
            assert (f"--{name.replace('_', '-')} " in message) == (name in changed)
    else:
        assert asdict(parse_options(Options, resume(folder, second))) == expected | second | {
            "out": str(folder)
        }


def test_going_back_to_a_default_is_a_change_too(tmp_path):
    start_run(tmp_path, {"kind": "masked", "overwrite": True})
    assert "--kind causal (was masked)" in refusal(resume(tmp_path, {"kind": "causal"}))
    assert parse_options(Options, resume(tmp_path, {"overwrite": True})).resume


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"options": []}', '{"options": {"epochs": 3}}',
                                     '{"options": {"steps": 0}}'])  # fmt: skip
def test_a_run_file_of_another_script_or_damaged_is_refused(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert str(path) in refusal(resume(tmp_path, {}))


@given(st.floats(0.1, 1), st.integers(-(2**70), 2**70), st.text(max_size=3))
@LAW
def test_a_stored_value_is_of_its_field_s_kind_or_refused(tmp_path_factory, real, whole, text):
    path = tmp_path_factory.mktemp("run") / "run.json"
    for name, kind in {"rate": float, "steps": int, "loud": bool, "kind": str, "data": tuple}.items():
        for value in (real, whole, text, "masked", True, None, [text], [1], {}):
            path.write_text(json.dumps({"options": {name: value}}))
            try:
                found = getattr(commandline.stored_options(Options, path), name)
            except InputError as error:
                assert str(path) in str(error)
            else:
                assert type(found) is kind or (name == "steps" and found is None)
                assert found == (kind(value) if kind in (tuple, float) else value)


# ---- --help


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_gives_every_option_once_with_its_line_and_default_what_is_changed_first_on_top(
    script, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    explained: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        indent, cell = re.fullmatch(r"(?:[│ ] ( *))?(.*?)[ │]*", line).groups()  # in a frame, or in ASCII
        if indent == "" and re.match("--|RUN", cell):
            name, *text = cell.removeprefix("--").split()
            assert name not in explained
            explained[name] = " ".join(text)
        elif indent and cell and explained:
            explained[name] += f" {cell}"
    for field in fields(script.Options):
        name = field.name.replace("_", "-")
        name = f"{name}," if field.default is True else name  # the way to turn it off stands beside it
        text = explained.pop(name, "") or explained.pop("RUN")
        assert field.default is not True or text.startswith(f"--no-{name[:-1]} ")
        assert len(text.split()) >= 3 and (field.default is not None or "None" not in text.split()[0])
        # The explanation says what None and () mean.
        assert bool(re.search(r"\((default: |required)[^()]*\)$", text)) == (field.default not in (None, ()))
    assert not explained
    groups = commandline.grouped(script.Options)
    names = [*groups["main"]]
    assert next(iter(groups)) == "main" and "more" not in groups and len(names) < 12
    wanted = ["data", "out", "init", "depth", "steps"] if script is train else []
    assert [name for name in names if name in wanted] == wanted


@pytest.mark.parametrize(
    ("command", "begins"),
    [
        ("train.py", "usage: python train.py [-h] [OPTIONS]"),
        ("-m minillm.chat", "usage: python -m minillm.chat "),
    ],
)
def test_help_says_how_to_start_the_command_on_a_stream_that_knows_ascii_only(command, begins):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, *command.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(begins)


def test_a_wrong_flag_is_one_line_on_a_stream_that_knows_ascii_only():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = [sys.executable, "train.py", "--wrong", "1"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr == "error: Unrecognized options: --wrong, 1; see --help\n"


def test_help_whose_reader_leaves_ends_without_a_word():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "rlhf.py", "--help"]
    ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert ended.stderr == b"" and ended.returncode == 141


# ---- Renamed flags, and ~


@pytest.mark.parametrize("old", ["--inner-epochs 7", "--inner_epochs 7", "--inner-epochs=7"])
def test_an_old_flag_works_and_names_the_new_one_which_is_taken_without_a_word(old, capsys):
    assert parse_options(Options, old.split()).ppo_epochs == 7
    printed = capsys.readouterr().err
    assert "--ppo-epochs" in printed and len(printed.splitlines()) == 1
    assert "--inner-epochs" in refusal(["--inner-epochs", "7"], train.Options), "only where the new one is"
    options = parse_options(Options, "--ppo-epochs 7 --adaptive-kl-target 6".split())
    assert (options.ppo_epochs, options.adaptive_kl_target) == (7, 6.0)
    assert capsys.readouterr().err == ""


def test_a_name_that_now_means_another_option_is_explained_and_never_misread(capsys):
    assert parse_options(Options, ["--stop-kl", "0.1"]).target_kl == 0.1
    assert "--target-kl" in capsys.readouterr().err
    assert parse_options(Options, ["--target-kl=0.1"]).target_kl == 0.1
    printed = capsys.readouterr().err
    assert "--adaptive-kl-target" in printed and "--stop-kl" in printed
    for words in (["--target-kl", "6"], ["--target-kl=6.0"]):
        message = refusal(["--stage", "policy", *words], rlhf.Options)
        assert "--target-kl 6:" in message and "--adaptive-kl-target 6" in message


@pytest.mark.parametrize(("line", "unread"), [
    ("policy --algorithm dpo --beta 0.3 --epochs 2 --iterations 4 --rankings x", "--iterations"),
    ("policy --no-whiten --iterations 4 --epochs=2 --data x --rankings x", "--epochs=2, --rankings"),
    ("policy --algorithm grpo --no-whiten --kl-estimator k2 --top-k 3", "--no-whiten"),
    ("policy --algorithm best-of-n --group-size 4 --minibatches 1 --beta 1", "--minibatches, --beta"),
    ("reward --epochs 2 --algorithm dpo --beta 1 --seed 3 --warmup 3", "--algorithm, --beta"),
    ("rank --annotator person --name Ada --noise 2 --data x", "--noise, --data"),
    ("rank --annotator file --data x --out xxbeta", ""),
    ("sample --data x --temperature 2 --keep last --annotator person", "--keep, --annotator"),
])  # fmt: skip
def test_options_that_a_stage_does_not_read_are_said_at_its_start_and_no_others(
    line, unread, capsys, monkeypatch
):
    parse_options(rlhf.Options, ["--stage", *line.split()])
    said = f"note: {unread}: not read by this stage, see --help\n" if unread else ""
    assert capsys.readouterr() == (said, "")
    monkeypatch.setenv("RANK", "1")  # another process of torchrun's
    parse_options(rlhf.Options, ["--stage", *line.split()])
    assert capsys.readouterr() == ("", "")


def test_a_run_of_the_release_before_resumes_with_all_options_under_their_new_names(tmp_path):
    stored = {"inner_epochs": 7, "stop_kl": 0.1, "target_kl": 6.0, "out": "elsewhere"}
    (tmp_path / "run.json").write_text(json.dumps({"options": stored}))
    options = parse_options(Options, resume(tmp_path, {}))
    assert (options.ppo_epochs, options.target_kl, options.adaptive_kl_target) == (7, 0.1, 6.0)


@pytest.mark.parametrize(("before", "now"), [(None, None), ("story", ("story",))])
def test_a_run_of_the_release_before_resumes_where_an_option_has_come_to_take_several_values(
    tmp_path, before, now
):
    (tmp_path / "run.json").write_text(json.dumps({"options": {"field": before, "out": "elsewhere"}}))
    assert parse_options(train.Options, resume(tmp_path, {})).field == now


def test_a_tilde_is_the_home_folder_where_a_place_is_given_and_itself_in_a_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    options = parse_options(Options, "--out=~/x --device ~ --data n=~/a:2 ~/b a~/c ~d x=~".split())
    assert options.out == "/home/ada/x" and options.device == "/home/ada"
    assert options.data == ("n=/home/ada/a:2", "/home/ada/b", "a~/c", "~d", "x=/home/ada")
    given = parse_options(chat.Options, ["~/run", "--prompt", "~/ is my home", "--system=~/"])
    assert (given.run, given.prompt, given.system) == ("/home/ada/run", "~/ is my home", "~/")
