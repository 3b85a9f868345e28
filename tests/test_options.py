"""From the command line to the options: each flag in its place, one line for each mistake, and --resume."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf
import sft
import train
from minillm.compare import __main__ as compare
from minillm.errors import InputError
from minillm.options import TrainingOptions, options_json, parse_options, stored_options
from minillm.tools import chat, commandline


@dataclass(frozen=True)
class Options:
    """A small script's options, one of every kind."""

    out: str = "out/x"
    """Where it writes."""
    resume: bool = False
    """Goes on with it."""
    overwrite: bool = False
    """Replaces it."""
    data: tuple[str, ...] = ()
    """Files to read."""
    steps: int | None = None
    """How many updates."""
    rate: float = 0.5
    """How far each goes."""
    kind: Literal["causal", "masked"] = "causal"
    """What is predicted."""
    loud: bool = False
    """Says more."""
    qk_norm: bool | None = None
    """Whether queries are normalised."""
    device: str = "auto"
    """Where it computes."""

    free_to_change: ClassVar = TrainingOptions.free_to_change

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps {self.steps}: give at least 1")


VALUES = {
    "out": st.sampled_from(["a", "b/c", "with space"]),
    "data": st.lists(st.sampled_from(["a.txt", "b=c:0.5", "*.md"]), max_size=3).map(tuple),
    "steps": st.integers(1, 10**6),
    "rate": st.floats(allow_nan=False, allow_infinity=False, min_value=0),
    "kind": st.sampled_from(["causal", "masked"]),
    "loud": st.just(True),
    "qk_norm": st.booleans(),
    "device": st.sampled_from(["cpu", "cuda:1"]),
}
GIVEN = st.fixed_dictionaries({}, optional=VALUES)
LAW = settings(deadline=None, max_examples=25)


def flags(given: dict, underscores: bool = False) -> list[str]:
    """The command line that gives these values."""
    words = []
    for name, value in given.items():
        words.append("--" + (name if underscores else name.replace("_", "-")))
        if isinstance(value, tuple):
            words += value
        elif name not in ("loud", "overwrite", "resume"):
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
    (folder / "run.json").write_text(json.dumps({"options": options_json(options)}))


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
        (["--stepps", "3"], "--stepps"),
        (["--steps", "three"], "--steps"),
        (["--steps", "1.5"], "--steps"),
        (["--steps"], "--steps"),
        (["--rate", "fast"], "--rate"),
        (["--kind", "other"], "--kind"),
        (["--qk-norm", "perhaps"], "--qk-norm"),
        (["stray"], "stray"),
        (["--loud", "yes"], "yes"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "0", "--resume"], "--steps 0"),
    ],
)
def test_a_command_line_that_does_not_fit_is_refused_in_one_line(arguments, named):
    assert named in refusal(arguments)


@given(
    st.lists(
        st.text(min_size=1, max_size=8) | st.sampled_from(["--steps", "--data", "--kind", "3"]), max_size=4
    )
)
@LAW
def test_no_command_line_ends_in_anything_but_options_or_one_line(words):
    if not {"-h", "--help", "--resume"} & set(words):
        try:
            parse_options(Options, words)
        except InputError as error:
            assert len(str(error).splitlines()) == 1


def test_help_names_every_option_with_its_line_and_default_and_ends_well(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, ["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, explanation in DOCUMENTATION.items():
        after = shown.split(f" --{name.replace('_', '-')} ", 1)[1]
        assert f"{explanation} (default: " in after[: len(explanation) + 40], name


DOCUMENTATION = {
    "out": "Where it writes.", "resume": "Goes on with it.", "overwrite": "Replaces it.",
    "data": "Files to read.", "steps": "How many updates.", "rate": "How far each goes.",
    "kind": "What is predicted.", "loud": "Says more.", "qk_norm": "Whether queries are normalised.",
    "device": "Where it computes.",
}  # fmt: skip


def test_the_help_of_train_explains_every_option(capsys, monkeypatch):
    import train

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_options(train.Options, ["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(train.Options):
        flag = f"--{field.name.replace('_', '-')} "
        assert flag in shown
        explained = shown.split(flag, 1)[1].split("(default")[0]
        assert len(explained.split()) >= 4, field.name


# ---- --resume


@given(GIVEN)
@LAW
def test_the_same_command_with_resume_goes_on(tmp_path_factory, given_values):
    folder = tmp_path_factory.mktemp("run")
    start_run(folder, given_values)
    given_values = given_values | {"out": str(folder)}
    options = parse_options(Options, resume(folder, given_values))
    assert asdict(options) == asdict(Options()) | given_values | {"resume": True}


@given(GIVEN)
@LAW
def test_resume_alone_brings_back_every_option(tmp_path_factory, given_values):
    folder = tmp_path_factory.mktemp("run")
    start_run(folder, given_values)
    options = parse_options(Options, resume(folder, {}))
    expected = given_values | {"out": str(folder), "resume": True}
    assert asdict(options) == asdict(Options()) | expected


@given(GIVEN, GIVEN)
@LAW
def test_another_value_is_refused_by_name_unless_it_changes_no_result(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("run")
    start_run(folder, first)
    stored = asdict(Options()) | first
    changed = {n for n, value in second.items() if value != stored[n] and n not in Options.free_to_change}
    if second.get("steps", 0) > (stored["steps"] or 0):
        changed -= {"steps"}  # a finished run may go on
    arguments = resume(folder, second)
    if changed:
        message = refusal(arguments)
        for name in asdict(Options()):
            assert (f"--{name.replace('_', '-')} " in message) == (name in changed)
    else:
        resumed = parse_options(Options, arguments)
        assert resumed.device == second.get("device", stored["device"])


def test_going_back_to_a_default_is_a_change_too(tmp_path):
    start_run(tmp_path, {"kind": "masked"})
    assert "--kind causal (was masked)" in refusal(resume(tmp_path, {"kind": "causal"}))


def test_a_run_that_replaced_another_resumes_with_the_same_command(tmp_path):
    start_run(tmp_path, {"overwrite": True})
    assert parse_options(Options, resume(tmp_path, {})).resume
    assert parse_options(Options, resume(tmp_path, {"overwrite": True})).resume


def test_a_run_that_was_moved_resumes_in_its_new_place(tmp_path):
    start_run(tmp_path / "old", {"steps": 7})
    (tmp_path / "old").rename(tmp_path / "new")
    options = parse_options(Options, resume(tmp_path / "new", {}))
    assert (options.steps, options.out) == (7, str(tmp_path / "new"))


def test_a_folder_without_a_run_has_nothing_to_resume(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert str(folder) in refusal(resume(folder, {}))


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "5", "{}", '{"options": []}', '{"options": null}', '{"options": {"epochs": 3}}',
        '{"options": {"steps": "many"}}', '{"options": {"steps": [3, 4]}}', '{"options": {"rate": null}}',
        '{"options": {"kind": "other"}}', '{"options": {"rate": {}}}', '{"options": {"steps": 1.5}}',
        '{"options": {"steps": 0}}', '{"options": {"steps": true}}',
    ],
)  # fmt: skip
def test_a_run_file_of_another_script_or_damaged_is_refused(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert str(path) in refusal(resume(tmp_path, {}))
    assert path.read_text() == content


# ---- The scripts


def test_help_whose_reader_leaves_ends_without_a_word():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "rlhf.py", "--help"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert ended.stderr == b"" and ended.returncode == 141


@pytest.mark.parametrize("script", [train, sft, rlhf, chat, compare], ids=lambda script: script.__name__)
def test_help_names_every_option_with_its_meaning(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    named = {field.name for field in fields(script.Options)} - {"run", "runs"}  # these have no flag
    flags = {name: name.replace("_", "-") for name in named}
    missing = [n for n, flag in flags.items() if f"--{flag}" not in printed and f"--no-{flag}" not in printed]
    assert missing == []


@pytest.mark.parametrize("script", [train, sft, rlhf, chat, compare], ids=lambda script: script.__name__)
def test_help_begins_with_what_is_changed_first_and_every_group_has_a_name(script):
    groups = commandline.grouped(script.Options)
    names = [field.name for field in next(iter(groups.values()))]
    assert next(iter(groups)) == "changed first" and "more" not in groups
    wanted = ["data", "out", "init", "depth", "steps"] if script is train else []
    assert [name for name in names if name in wanted] == wanted and len(names) < 12
    assert sorted(f.name for group in groups.values() for f in group) == sorted(
        f.name for f in fields(script.Options)
    )


def test_help_works_on_a_stream_that_knows_ascii_only():
    command = [sys.executable, "train.py", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--matrix-rate" in done.stdout and done.stderr == ""


# ---- Renamed flags


@dataclass(frozen=True)
class Renamed(Options):
    """Options of which some had other names in the release before."""

    ppo_epochs: int = 2
    """Was inner_epochs."""
    target_kl: float = 0.05
    """Was stop_kl."""
    adaptive_kl_target: float | None = None
    """Was target_kl."""


@pytest.mark.parametrize("old", ["--inner-epochs 7", "--inner_epochs 7", "--inner-epochs=7"])
def test_an_old_flag_works_and_names_the_new_one(old, capsys):
    assert parse_options(Renamed, old.split()).ppo_epochs == 7
    assert "--ppo-epochs" in capsys.readouterr().err
    assert "--inner-epochs" in refusal(["--inner-epochs", "7"], Options), "only where the new one is"


def test_new_names_are_taken_without_a_word(capsys):
    given = "--ppo-epochs 7 --adaptive-kl-target 6".split()
    options = parse_options(Renamed, given)
    assert (options.ppo_epochs, options.adaptive_kl_target) == (7, 6.0)
    assert capsys.readouterr().err == ""


def test_a_name_that_now_means_another_option_is_explained_and_never_misread(capsys):
    assert parse_options(Renamed, ["--stop-kl", "0.1"]).target_kl == 0.1
    assert "--target-kl" in capsys.readouterr().err
    assert parse_options(Renamed, ["--target-kl=0.1"]).target_kl == 0.1
    assert "--adaptive-kl-target" in capsys.readouterr().err
    for words in (["--target-kl", "6"], ["--target-kl=6.0"]):
        message = refusal(words, Renamed)
        assert "--adaptive-kl-target 6" in message and "--stop-kl" in message


def test_a_run_of_the_release_before_resumes_with_all_options_under_their_new_names(tmp_path):
    stored = {"inner_epochs": 7, "stop_kl": 0.1, "target_kl": 6.0, "out": "elsewhere"}
    (tmp_path / "run.json").write_text(json.dumps({"options": stored}))
    options = parse_options(Renamed, resume(tmp_path, {}))
    assert (options.ppo_epochs, options.target_kl, options.adaptive_kl_target) == (7, 0.1, 6.0)


@given(st.floats(0, 1), st.integers(-(2**70), 2**70), st.text(max_size=3))
@LAW
def test_a_stored_value_is_of_its_field_s_kind_or_refused(tmp_path_factory, real, whole, text):
    path = tmp_path_factory.mktemp("run") / "run.json"
    for name, kind in {"rate": float, "steps": int, "loud": bool, "kind": str, "data": tuple}.items():
        for value in (real, whole, text, True, None, [text], [1], {}):
            path.write_text(json.dumps({"options": {name: value}}))
            try:
                found = getattr(stored_options(Options, path), name)
            except InputError as error:
                assert str(path) in str(error)
            else:
                assert type(found) is kind or (name == "steps" and found is None)
                assert (
                    list(found) == value
                    if kind is tuple
                    else found == (float(value) if kind is float else value)
                )
