"""Every command under bad input: damaged files, missing ones, folders in their place, nonsense as options.

A folder is made once that holds a run of every stage, each stopped halfway. Then every command is run in it
after one of the files that it opens was damaged, by a table of cases that once went wrong or might, and by a
seeded fuzzer. Whatever is damaged, a command ends in one line and exit code 2, or it succeeds; it changes
nothing but what it is there to write, and of a file that only grows it loses no line.
"""

import ast
import builtins
import json
import math
import os
import random
import re
import shutil
import signal
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, make_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
from fuzz import damaged
from runs import ROOT, folder_bytes, killed_at_update, losses_of, metrics_of, refusal
from safetensors.torch import load, load_file, save

import rlhf
import sft
import train
from kernels.dev import bench, gate
from minillm.compare import __main__ as compare
from minillm.errors import InputError
from minillm.io.rankings import RankingFile, read_responses
from minillm.preferences import new_ranking
from minillm.tools import chat
from minillm.tools.commandline import options_of, parse_options

pytestmark = pytest.mark.usefixtures("quick_plots")

# ---- What there is to damage

EACH = "--precision float32 --warmup 0 --save-every 1 --val-every 2"
TEXT = "--batch-tokens 64 --steps 3 --val-tokens 128 --world-megabytes 0.01 --cache cache"
ASKED = "--data chats.jsonl --prompts 12 --max-new-tokens 4 --precision float32"
POLICY = (
    f"--stage policy {ASKED} --init sft --reward rlhf/reward --rankings rlhf/rankings.jsonl --iterations 3 "
    "--batch-responses 8 --group 2 --batch-sets 2 --unended-score None --val-prompts 2 "
    "--val-fraction 0.3 --warmup 0 --save-every 1 --val-every 2"
)
EVERYTHING = "--ptx 0.5 --text tale.txt --ptx-tokens 64 --cache cache --average 0.5"
COMPARED = "--data chats.jsonl --text tale.txt --text-bytes 200 --prompts 3 --max-new-tokens 4 --out compare"


def write_data() -> None:
    Path("tale.txt").write_text(
        "".join(f"On day {i} the {i % 7} cats met {i % 5} dogs.\n" for i in range(60))
    )
    chats = [
        [{"role": "user", "content": f"How many cats on day {i}?"},
         {"role": "assistant", "content": f"{i % 7} cats."}] for i in range(14)
    ]  # fmt: skip
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pairs = [{"instruction": f"Add {i} and 1.", "chosen": f"{i + 1}", "rejected": "no"} for i in range(6)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("short.txt").write_text("Short is better.")


def make_runs() -> None:
    """A run of every stage in the current folder, each stopped halfway."""
    write_data()
    with killed_at_update(3):
        train.main(f"--data tale.txt --out base --depth 1 --vocab-size 290 --block-size 256 {EACH} {TEXT} "
                   "--batch-tokens 256 --samples 1".split())  # fmt: skip
    with killed_at_update(3):
        sft.main(f"--init base --data chats.jsonl --out sft --text tale.txt {EACH} {TEXT}".split())
    rlhf.main(f"--stage sample --models sft --out rlhf --responses 3 --distractors 0 {ASKED}".split())
    responses = Path("rlhf/responses.jsonl")
    responses.write_bytes(b"".join(responses.read_bytes().splitlines(keepends=True)[:9]))
    rlhf.main("--stage rank --annotator model --judge sft --principles short.txt --out rlhf".split())
    rlhf.main("--stage rank --annotator file --data pairs.jsonl --out rlhf".split())
    with RankingFile(Path("rlhf/rankings.jsonl")) as file:
        for i, given in enumerate(read_responses(responses)):
            order = [[i % 3], [(i + 1) % 3, (i + 2) % 3]]
            file.append([new_ranking(given, order, name, 0) for name in ("Ada", "Bo")])
    with killed_at_update(3):
        rlhf.main(f"--stage reward --init sft --out rlhf --batch-sets 4 {EACH}".split())
    for algorithm, update, extra in (("ppo", 9, EVERYTHING), ("grpo", 9, ""), ("dpo", 3, "")):
        with killed_at_update(update):
            rlhf.main(f"{POLICY} --algorithm {algorithm} --out rlhf {extra}".split())
    compare.main(f"base sft {COMPARED} --judge person".split())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, bytes]:
    """The current folder's files while this module is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        patch.setattr(builtins, "input", lambda prompt="": "B > A")
        make_runs()
        patch.setattr(builtins, "input", end_of_input)
        yield folder_bytes(Path())


def end_of_input(prompt: str = "") -> str:
    raise EOFError


# ---- What opens it


@dataclass(frozen=True)
class Command:
    """A command line, the files that it opens, and the folder or file in which it may write."""

    script: ModuleType
    line: str
    opens: tuple[str, ...]
    writes: str = "new/"


def model(folder: str) -> tuple[str, ...]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return tuple(f"{folder}/{name}" for name in names)


def run(folder: str) -> tuple[str, ...]:
    names = ("run.json", "metrics.jsonl", "resume/state.safetensors", "generation_config.json")
    return (*model(folder), *(f"{folder}/{name}" for name in names))


RANKED = ("rlhf/responses.jsonl", "rlhf/rankings.jsonl")
ALIGNED = (*model("sft"), *model("rlhf/reward"), "chats.jsonl", "rlhf/rankings.jsonl")
COMMANDS = {
    "train": Command(
        train, f"--init base --data tale.txt --out new --samples 1 {EACH} {TEXT} --steps 1",
        (*model("base"), "tale.txt"),
    ),
    "train --resume": Command(train, "--resume --out base", (*run("base"), "tale.txt", "cache"), "base/"),
    "sft": Command(
        sft, f"--init base --data chats.jsonl --out new {EACH} {TEXT} --steps 1",
        (*model("base"), "chats.jsonl"),
    ),
    "sft --resume": Command(
        sft, "--resume --out sft", (*run("sft"), "chats.jsonl", "tale.txt", "cache"), "sft/"
    ),
    "sample": Command(
        rlhf, f"--stage sample --models sft base --out new --responses 3 {ASKED}",
        (*model("sft"), *model("base"), "chats.jsonl"),
    ),
    "sample --resume": Command(
        rlhf, "--stage sample --resume --out rlhf",
        (*model("sft"), "rlhf/run.json", "rlhf/responses.jsonl", "chats.jsonl"), "rlhf/responses.jsonl",
    ),
    "rank by model": Command(
        rlhf, "--stage rank --annotator model --judge sft --principles short.txt --out rlhf",
        (*model("sft"), *RANKED, "rlhf/rank-model.json", "short.txt"), "rlhf/ran",
    ),
    "rank by file": Command(
        rlhf, "--stage rank --annotator file --data pairs.jsonl --out rlhf",
        ("pairs.jsonl", "rlhf/rankings.jsonl", "rlhf/rank-file.json"), "rlhf/ran",
    ),
    "rank by person": Command(
        rlhf, "--stage rank --annotator person --name Ada --out rlhf", RANKED, "rlhf/ran"
    ),
    "agreement": Command(
        rlhf, "--stage agreement --out rlhf", ("rlhf/rankings.jsonl",), "rlhf/agreement.json"
    ),
    "reward": Command(
        rlhf, f"--stage reward --init sft --rankings {RANKED[1]} --out new --batch-sets 64 {EACH}",
        (*model("sft"), "rlhf/rankings.jsonl"),
    ),
    "reward --resume": Command(
        rlhf, "--stage reward --resume --out rlhf", (*run("rlhf/reward"), "rlhf/rankings.jsonl"),
        "rlhf/reward/",
    ),
    **{
        algorithm: Command(rlhf, f"{POLICY} --algorithm {algorithm} --out new --iterations 1", ALIGNED)
        for algorithm in ("ppo", "grpo", "dpo", "best-of-n")
    },
    **{
        f"{algorithm} --resume": Command(
            rlhf, f"--stage policy --algorithm {algorithm} --resume --out rlhf",
            (*run(f"rlhf/{algorithm}"), *ALIGNED), f"rlhf/{algorithm}/",
        ) for algorithm in ("ppo", "grpo", "dpo")
    },
    "compare": Command(
        compare,
        f"base sft rlhf/ppo {COMPARED} --judge reward model person --reward rlhf/reward --judge-model sft "
        "--principles short.txt",
        (*run("rlhf/ppo"), *model("base"), *model("rlhf/reward"), "short.txt", "tale.txt", "chats.jsonl",
         "compare/verdicts.jsonl"), "compare/",
    ),
    "chat": Command(chat, "sft --prompt Hello --max-new-tokens 8", model("sft"), "nothing"),
}  # fmt: skip


# ---- What may come of it

GROWING = ("responses.jsonl", "rankings.jsonl", "verdicts.jsonl")


def outcome(command: Command, capfd: pytest.CaptureFixture) -> str:
    """Nothing after success, else the line with which the command ends; checks what it did to the files."""
    before = folder_bytes(Path())
    capfd.readouterr()
    refused = 0
    try:
        command.script.main(command.line.split())
    except SystemExit as stop:
        refused = stop.code
    lines = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()
    after = folder_bytes(Path())
    shown = len(lines) > 1
    assert refused in (0, 2)
    assert [line for line in lines if line.startswith("error: ")] == (lines[-1:] if refused else [])
    own = (command.writes, "cache/") if shown or not refused else ()
    for name, content in before.items():
        assert name in after, f"{name} is lost"
        if name.endswith(GROWING):
            assert grew(name, before, after), f"{name} lost something"
        else:
            assert after[name] == content or name.startswith(own), f"{name} changed"
    assert all(name.startswith((command.writes, "cache/", *before)) for name in after)
    assert shown or not refused or not Path("new").exists(), "something was left half-written"
    check_written(after, before)
    return lines[-1] if refused else ""


def grew(name: str, before: dict[str, bytes], after: dict[str, bytes]) -> bool:
    """Whether a file only became longer; what a crash cut short at its end may have moved to FILE.torn."""
    if after[name].startswith(before[name]):
        return True
    common = before[name][: before[name].rfind(b"\n") + 1]
    return after[name].startswith(common) and before[name][len(common) :] in after.get(f"{name}.torn", b"")


def check_written(after: dict[str, bytes], before: dict[str, bytes]) -> None:
    """What a command has written is whole: JSON that parses, weights that are numbers, no temporary file."""
    for name, content in after.items():
        assert not name.endswith(".tmp")
        if before.get(name) == content or f"{name}.torn" in after:  # then damage of ours may still be in it
            continue
        if name.endswith(".json"):
            json.loads(content, parse_constant=pytest.fail)
        elif name.endswith(".jsonl"):
            assert all(isinstance(json.loads(line), dict) for line in content.splitlines() if line.strip())
        elif name.endswith("model.safetensors"):
            assert all(bool(value.isfinite().all()) for value in load_file(name).values())


# ---- Damage

GONE, FOLDER, LOOP = "gone", "folder", "loop"
Damage = bytes | str
"""Another content, or nothing, a folder, or a link to itself in the file's place."""


def put(name: str, damage: Damage) -> None:
    path = Path(name)
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    match damage:
        case bytes():
            path.write_bytes(damage)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.fixture
def restored(made, tmp_path_factory) -> Iterator[Callable[[], None]]:
    """Brings the folder back to what it was; so does the end of a test."""
    ours = tmp_path_factory.getbasetemp()

    def restore() -> None:
        # After an interrupt the current folder may be another one, with files that are not the tests' own.
        assert Path.cwd().is_relative_to(ours), "not the tests' own folder: nothing is removed here"
        folders = {str(parent) for name in made for parent in Path(name).parents}
        for path in sorted(Path().rglob("*"), reverse=True):
            file = path.is_file() and not path.is_symlink()
            if str(path) not in (made if file else folders) or path.is_symlink():
                remove(path)
        for name, content in made.items():
            if not Path(name).exists() or Path(name).read_bytes() != content:
                put(name, content)

    yield restore
    restore()


def field(*path: str | int, value: Any = MISSING) -> Callable[[bytes], bytes]:
    """Sets, or without a value removes, a field of a JSON file."""
    return lambda raw: json.dumps(edited(json.loads(raw), path, value)).encode()


def line(number: int, *path: str | int, value: Any = MISSING) -> Callable[[bytes], bytes]:
    """The same in a line of a file of JSON lines."""

    def change(raw: bytes) -> bytes:
        lines = raw.splitlines()
        lines[number] = field(*path, value=value)(lines[number])
        return b"\n".join([*lines, b""])

    return change


def header(*path: str | int, value: Any = MISSING) -> Callable[[bytes], bytes]:
    """The same in the header of a safetensors file."""

    def change(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        new = field(*path, value=value)(raw[8 : 8 + size])
        return struct.pack("<Q", len(new)) + new + raw[8 + size :]

    return change


def weight(name: str, value: float) -> Callable[[bytes], bytes]:
    """Sets every number of a tensor."""
    return lambda raw: save({n: torch.full_like(t, value) if n == name else t for n, t in load(raw).items()})


def tensors(**changes: torch.Tensor | None) -> Callable[[bytes], bytes]:
    """Sets tensors, or removes them; a dot in a name is written as __."""
    new = {name.replace("__", "."): value for name, value in changes.items()}
    return lambda raw: save({n: value for n, value in (load(raw) | new).items() if value is not None})


def cut_off(share: float) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: int(share * len(raw))]


def edited(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """The content with another value at a path, or with none there."""
    if not path:
        return value
    changed = content.copy()
    if len(path) == 1 and value is MISSING:
        del changed[path[0]]
    elif len(path) == 1:
        changed[path[0]] = value
    else:
        changed[path[0]] = edited(content[path[0]], path[1:], value)
    return changed


# ---- The table

NAN = float("nan")
STATE = "resume/state.safetensors"
TABLE: list[tuple[str, str, Damage | Callable[[bytes], bytes], str]] = [
    # A command, a file that it opens, what happens to it, and words of its last line; "" where it succeeds.
    *(("chat", "sft/config.json", damage, words) for damage, words in (
        (GONE, "cannot be read"), (FOLDER, "cannot be read"), (LOOP, "cannot be read"), (b"", "as JSON"),
        (b"[]", "no JSON object"), (b"[" * 10**5, "as JSON"), (b"\xff\xfe{}", "UTF-8"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "as JSON"), (field("rms_norm_eps", value=NAN), "NaN"),
        (field("rope_parameters", "rope_theta", value=math.inf), "Infinity"),
        (field("vocab_size", value=10**12), "different models"),
        (field("num_hidden_layers", value=10**12), "different models"),
        (field("num_hidden_layers", value=2), "missing"), (field("num_hidden_layers", value=0), "num_hidden"),
        (field("hidden_size", value=62), "config.json asks for"),
        (field("model_type", value="llama"), "not part of this model"),
        (field("vocab_size", value=261), "tokenizer.json"),
        (field("max_position_embeddings", value=2), "give less"))),
    *(("chat", "sft/model.safetensors", damage, words) for damage, words in (
        (GONE, "No such file"), (LOOP, "symbolic links"), (b"", "as safetensors"),
        (b"\0" * 100, "as safetensors"), (b"\xff" * 100, "as safetensors"),
        (b"\x80\x04K\x01.", "as safetensors"), (cut_off(0.9), "as safetensors"),
        (cut_off(0.01), "as safetensors"), (header("lm_head.weight"), "as safetensors"),
        (tensors(lm_head__weight=None), "lm_head.weight is missing"),
        (tensors(model__extra=torch.ones(2)), "model.extra is not part of this model"),
        (tensors(model__norm__weight=torch.ones(9)), "model.norm.weight is [9]"),
        (tensors(model__norm__weight=torch.ones(32, dtype=torch.int64)), "model.norm.weight is of"),
        (tensors(model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn)), "float8"),
        (tensors(score__weight=torch.ones(2, 64)), "classifier of 2 labels"))),
    *(("chat", "sft/tokenizer.json", damage, "tokenizer.json") for damage in (
        GONE, cut_off(0.5), field("model", "vocab", value=[]), field("pre_tokenizer", value="x"),
        field("added_tokens", 0, "id", value=10**40))),
    *(("chat", "sft/tokenizer_config.json", damage, words) for damage, words in (
        (GONE, ""), (cut_off(0.5), "as JSON"), (field("eos_token", value=[-1]), "eos_token"),
        (field("bos_token", value={"content": {}}), "bos_token"),
        (field("eos_token", value={"content": 3}), "eos_token"),
        (field("pad_token", value=math.inf), "Infinity"))),
    ("train", "base/config.json", field("num_attention_heads", value=0), "num_attention_heads"),
    ("train", "tale.txt", b"cats\xff", "byte 4"),
    ("train", "tale.txt", b"A cat.", "fewer than one row"),
    ("train --resume", "base/run.json", GONE, "no run"),
    ("train --resume", "base/run.json", field("options", value=3), "options"),
    ("train --resume", "base/run.json", field("options", "seed", value={}), "run.json"),
    ("train --resume", "base/run.json", field("options", "clip", value=NAN), "NaN"),
    ("train --resume", "base/run.json", field("options", "out", value="elsewhere"), ""),
    ("train --resume", "base/metrics.jsonl", GONE, "holds no step 2"),
    ("train --resume", "base/metrics.jsonl", FOLDER, "folder"),
    ("train --resume", "base/metrics.jsonl", line(0, value=[]), "line 1"),
    ("train --resume", "base/metrics.jsonl", line(1, "step", value="2"), "line 2"),
    ("train --resume", "base/metrics.jsonl", line(1, "nats_per_byte", value=[-1]), "line 2"),
    ("train --resume", "base/metrics.jsonl", line(1, "nats_per_byte"), ""),
    ("train --resume", f"base/{STATE}", GONE, ""),
    ("train --resume", f"base/{STATE}", FOLDER, "folder"),
    ("train --resume", f"base/{STATE}", header("__metadata__", "state", value="{}"), "not a restart point"),
    ("train --resume", f"base/{STATE}", header("__metadata__"), "not a restart point"),
    ("train --resume", "base/samples.txt", FOLDER, "folder"),
    ("train --resume", "tale.txt", b"Another text. " * 100, "content"),
    ("sft", "chats.jsonl", b"[]", "chats.jsonl"),
    ("sft", "chats.jsonl", line(3, value=5), ""),
    ("sft", "chats.jsonl", b"{" * 10**5 + b"\n", "line 1"),
    ("sft", "base/tokenizer_config.json", field("chat_template", value=3), "chat_template"),
    ("sft", "base/tokenizer_config.json", field("eos_token", value="nowhere"), "eos_token"),
    ("sft", "base/chat_template.jinja", b"\xff", "chat_template.jinja"),
    ("sft --resume", "sft/config.json", FOLDER, "folder"),
    ("sft --resume", "sft/generation_config.json", b"\xff", ""),
    ("sample", "chats.jsonl", b"\x80\n", "byte 0"),
    ("sample --resume", "rlhf/responses.jsonl", line(0, "messages", value=3), "other prompts"),
    ("sample --resume", "rlhf/responses.jsonl", line(0, value=[]), "line 1"),
    ("sample --resume", "rlhf/responses.jsonl", b"", ""),
    ("sample --resume", "rlhf/responses.jsonl", GONE, ""),
    ("sample --resume", "rlhf/responses.jsonl", FOLDER, "folder"),
    ("rank by model", "rlhf/rank-model.json", field("origin", value=[]), "rank-model.json"),
    ("rank by model", "rlhf/rank-model.json", field("origin", "--judge", value=3), "--judge"),
    ("rank by model", "short.txt", b" \n", "holds no principles"),
    ("rank by model", "short.txt", b"\xff", "UTF-8"),
    ("rank by model", "short.txt", FOLDER, "short.txt"),
    ("rank by model", "rlhf/responses.jsonl", line(2, "responses", value=["a", 3]), "line 3"),
    ("rank by model", "rlhf/responses.jsonl", line(2, "responses", 1, value="\ud800"), ""),
    ("rank by file", "pairs.jsonl", line(1, "chosen", value={"a": 1}), ""),
    ("rank by file", "rlhf/rankings.jsonl", FOLDER, "rankings.jsonl"),
    ("rank by file", "rlhf/rank-file.json", b"{", "as JSON"),
    ("rank by person", "rlhf/rankings.jsonl", line(0, "ranking", value=[[0, 1, 10**40]]), "line 1"),
    ("agreement", "rlhf/rankings.jsonl", line(3, "annotator", value=[]), "line 4"),
    ("agreement", "rlhf/rankings.jsonl", line(3, "withdraws", value=[]), "line 4"),
    ("reward", "rlhf/rankings.jsonl", line(0, "messages", 0, "role", value=3), "line 1"),
    ("reward", "sft/tokenizer_config.json", field("chat_template", value=[{"name": "x"}]), "chat_template"),
    ("reward --resume", "rlhf/reward/config.json", field("minillm_score_bias", value=NAN), "NaN"),
    ("reward --resume", "rlhf/reward/metrics.jsonl", line(0, "loss", value="x"), "line 1"),
    ("ppo", "rlhf/reward/config.json", field("minillm_score_bias", value="x"), "score_bias"),
    ("ppo", "rlhf/reward/model.safetensors", GONE, "No such file"),
    ("grpo", "rlhf/reward/tokenizer.json", GONE, "tokenizer.json"),
    ("rank by file", "rlhf/rankings.jsonl", LOOP, "cannot be"),
    ("sample --resume", "rlhf/responses.jsonl", line(0, "draws", value=[{}]), ""),
    ("sample --resume", "rlhf/responses.jsonl", line(0, "draws", value=[0]), "line 1"),
    ("dpo", "rlhf/rankings.jsonl", b"\n\n", "no ranking"),
    ("best-of-n", "sft/model.safetensors", weight("lm_head.weight", NAN), "not finite"),
    ("best-of-n", "sft/model.safetensors", weight("lm_head.weight", 3e38), "finite"),
    ("best-of-n", "rlhf/reward/model.safetensors", weight("score.weight", 3e38), "not finite"),
    ("ppo --resume", "rlhf/ppo/model.safetensors", b"", "as safetensors"),
    ("dpo --resume", "rlhf/dpo/model.safetensors", GONE, "No such file"),
    ("dpo --resume", "rlhf/dpo/metrics.jsonl", line(3, "score", value={"a": 1}), "line 4"),
    ("dpo --resume", "rlhf/dpo/metrics.jsonl", line(3, "loss"), ""),
    ("dpo --resume", "rlhf/dpo/tokenizer.json", FOLDER, "folder"),
    ("compare", "rlhf/ppo/run.json", field("options", value=5), ""),
    ("compare", "compare/verdicts.jsonl", line(0, "responses", value=["one"]), "line 1"),
    ("ppo", "rlhf/reward/model.safetensors", tensors(score__weight=None), "score.weight"),
    ("ppo", "rlhf/reward/model.safetensors", tensors(lm_head__weight=torch.ones(2, 64)), "lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "damage", "words"),
    TABLE,
    ids=[f"{i}: {row[0]}, {row[1]}" for i, row in enumerate(TABLE)],
)
def test_a_damaged_file_ends_in_one_line_or_does_no_harm(
    made, restored, capfd, name, file, damage, words
):  # fmt: skip
    content = damage(made[file]) if callable(damage) else damage
    put(file, content)
    said = outcome(COMMANDS[name], capfd)
    assert words in said and bool(words) == bool(said), said


# ---- The fuzzer


def spoiled(name: str, made: dict[str, bytes], rng: random.Random) -> Damage:
    """Another content in a file's place, another file's, or none."""
    if rng.random() < 0.2:
        return rng.choice((GONE, FOLDER, LOOP, made[rng.choice(sorted(made))]))
    return damaged(made[name], name, rng)


DESTROYED = (b"", GONE, FOLDER, LOOP)


def fuzz(name: str, count: int, seed: int, made, restored, capfd) -> None:
    """`count` times damages a file that a command opens, and runs it."""
    command, clean = COMMANDS[name], {}
    opens = [f for opened in command.opens for f in made if f == opened or f.startswith(f"{opened}/")]
    own = [
        f for f in opens if not f.endswith((*GROWING, "chats.jsonl", "pairs.jsonl", "tokenizer_config.json"))
    ]
    rng = random.Random(f"{name} {seed}")
    for _ in range(count):
        file = rng.choice(opens)
        damage = spoiled(file, made, rng)
        restored()
        put(file, damage)
        try:
            said = outcome(command, capfd)
        except BaseException as error:
            raise AssertionError(f"{name}, {file} of {len(made[file])} bytes: {damage!r:.2000}") from error
        if not said and damage in DESTROYED and file in own:
            clean = clean or clean_weights(command, restored, file, damage)
            assert weights(command) == clean, f"{name} without {file} gives other weights"


def weights(command: Command) -> dict[str, bytes]:
    return {n: c for n, c in folder_bytes(Path()).items() if n.startswith(command.writes) and "model.s" in n}


def clean_weights(command: Command, restored, file: str, damage: Damage) -> dict[str, bytes]:
    """What the command makes of files that nobody damaged; then the damaged ones are as they were."""
    found = weights(command)
    restored()
    command.script.main(command.line.split())
    expected = weights(command)
    for name, content in found.items():
        put(name, content)
    return expected


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))])
@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_happens_to_a_file_a_command_ends_in_one_line_or_does_no_harm(
    made, restored, capfd, name, seed
):
    fuzz(name, 30 if seed else 4, seed, made, restored, capfd)


def test_a_finished_run_whose_restart_point_was_deleted_is_left_alone(made, restored, capfd):
    command = COMMANDS["train --resume"]
    assert outcome(command, capfd) == ""
    shutil.rmtree("base/resume")
    assert "is finished" in outcome(command, capfd)


def test_a_run_that_was_moved_goes_on_in_its_new_place(made, restored, capfd):
    Path("base").rename("moved")
    assert outcome(Command(train, "--resume --out moved", (), "moved/"), capfd) == ""
    assert not Path("base").exists()


@pytest.mark.parametrize("name", ["train", "sft", "reward", "ppo", "grpo", "dpo"])
def test_a_run_whose_validations_are_lost_ends_in_one_line_when_its_end_is_to_be_made(
    made, restored, capfd, name
):
    command = COMMANDS[f"{name} --resume"]
    assert outcome(command, capfd) == ""
    path = Path(command.writes, "metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if json.loads(line)["event"] == "train"))
    assert "no val" in outcome(command, capfd)


def test_a_policy_stopped_in_its_first_validation_logs_that_once(made, restored, monkeypatch):
    validate, numbers = rlhf.Aligner.validate, [signal.SIGINT, signal.SIGTERM]

    def validate_and_stop(*given):
        if numbers:
            os.kill(os.getpid(), numbers.pop())
        return validate(*given)

    line = f"{POLICY} --algorithm grpo --out new"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rlhf.Aligner, "validate", validate_and_stop)
        rlhf.main(line.split())
    rlhf.main([*line.split(), "--resume"])
    events = [(event["event"], event["step"]) for event in metrics_of(Path("new/grpo"))]
    assert events.count(("val", 0)) == 1 and events[-1] == ("final", 3)


@pytest.mark.parametrize(
    "line",
    ["chat LONG", "compare LONG", "train --init LONG", "sft --init LONG", "rlhf --stage rank --out LONG"],
)
def test_a_name_that_no_disk_can_hold_ends_in_one_line(made, restored, capfd, line):
    script, *words = line.replace("LONG", "x" * 300).split()
    assert "too long" in refusal(SCRIPTS[script], words, capfd)


# ---- Options

SCRIPTS = {"train": train, "sft": sft, "rlhf": rlhf, "chat": chat, "compare": compare}
FIRST = defaultdict[str, list[str]](list, rlhf=["--stage", "policy"], compare=["x"])
NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "", " ", "0x10", "1e-400", str(10**40), "-0.0", "None")


def numeric_fields() -> Iterator[tuple[str, str, Any]]:
    for script, module in SCRIPTS.items():
        kinds = get_type_hints(module.Options, include_extras=True)
        for option in fields(module.Options):
            if "int" in str(option.type) or "float" in str(option.type):
                yield script, option.name, kinds[option.name]


@pytest.mark.parametrize(("script", "name", "kind"), list(numeric_fields()))
def test_a_number_that_is_nonsense_is_refused_in_one_line_or_is_a_finite_number(script, name, kind):
    """Read as one option alone, which is soon done, and put among the others."""
    alone, others = (
        make_dataclass("Alone", [(name, kind)]),
        parse_options(SCRIPTS[script].Options, FIRST[script]),
    )
    for text in NUMBERS:
        flag = f"--{name.replace('_', '-')}"
        try:
            value = getattr(options_of(alone, [f"{flag}={text}"]), name)
            replace(others, **{name: value})
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and name in str(error).replace("-", "_")
        else:
            assert value is None or math.isfinite(value), f"{flag} {text}"


def shipped() -> Iterator[ast.AST]:
    """The syntax of every shipped file."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("minillm/**/*.py")]:
        yield from ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def test_every_option_is_read_somewhere():
    read = {node.attr for node in shipped() if isinstance(node, ast.Attribute)}
    for template in ROOT.glob("minillm/**/*.j2"):
        read |= set(re.findall(r"\boptions\.(\w+)", template.read_text(encoding="utf-8")))
    by_name = {*train.SHAPE}  # the shape of train.py's model, in a table
    for script, module in SCRIPTS.items():
        unread = {option.name for option in fields(module.Options)} - read - by_name
        assert not unread, f"{script}: nothing reads {sorted(unread)}"


def test_every_option_occurs_in_a_test():
    words = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*.py"))
    for script, module in SCRIPTS.items():
        for name in {option.name for option in fields(module.Options)} - {"run", "runs"}:
            flag = name.replace("_", "-")
            assert re.search(rf"--(no-)?{flag}\b|\b{name}=", words), f"{script}: no test gives --{flag}"


LINES = {
    "train": (train, f"--data tale.txt --out new --depth 1 --vocab-size 290 --block-size 32 {EACH} {TEXT} "
                     "--samples 0"),
    "sft": (sft, f"--init base --data chats.jsonl --out new {EACH} {TEXT}"),
    **{algorithm: (rlhf, f"{POLICY} --algorithm {algorithm} --critic-warmup 1 --out new")
       for algorithm in ("ppo", "grpo", "dpo")},
}  # fmt: skip
EFFECTS = [
    ("train", "--decay 1"), ("train", "--clip 1e-3"), ("train", "--tie-embeddings True"),
    ("sft", "--decay 1"), ("dpo", "--decay 0.1"), ("dpo", "--val-sets 1"), ("ppo", "--decay 0.1"),
    ("ppo", "--minibatches 4"), ("ppo", "--stop-kl 1e-9"), ("ppo", "--gamma 0.5"),
    ("ppo", "--value-clip 1e-4"), ("ppo", "--value-weight 3"), ("ppo", "--no-whiten"),
    ("ppo", "--no-scale-scores"), ("grpo", "--kl-estimator exact"),
]  # fmt: skip
"""Options that no other test gives."""


def curve(name: str, option: str = "") -> list[tuple[str, int, float]]:
    """The losses of a short run."""
    script, given = LINES[name]
    script.main([*given.split(), *option.split()])
    return losses_of(metrics_of(next(Path("new").rglob("metrics.jsonl")).parent))


@pytest.fixture(scope="module")
def without() -> dict[str, list]:
    """The losses of the same runs without the option, each made once."""
    return {}


@pytest.mark.parametrize(("name", "option"), EFFECTS)
def test_an_option_of_training_changes_the_run(made, restored, without, name, option):
    if name not in without:
        without[name] = curve(name)
        restored()
    assert without[name] != curve(name, option)


# ---- The kernels' commands


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        *((bench, f"--runs {count}", "--runs") for count in ("0", "-3", "many")),
        (bench, "--only nothing", "--only"),
        *((bench, f"--json {path}", "--json") for path in ("no/such/folder/x.json", ".")),
        (bench, "--fast", "--fast"),
        (gate, "--write --sizes 64", "--write"),
        (gate, "--sizes 0", "--sizes"),
        (gate, "stray", "stray"),
    ],
)
def test_the_kernels_commands_refuse_in_one_line(module, line, words, capfd):
    assert words in refusal(module, line.split(), capfd)
