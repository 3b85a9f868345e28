"""Accidents: stages are killed, signalled or given a full disk, go on, and end as they would have in peace.

    python tests/torture.py --json benchmarks/torture.json          500 trials, 23 minutes on two cores
    python tests/torture.py --trials 4 --stages train sample        as test_accidents.py runs it
    python tests/torture.py --first 217 --trials 1                  a trial again, by its number

A project grows in peace, stage by stage. A trial copies it as it was before a stage and starts that stage,
which meets one to three accidents and goes on after each as the Makefile does, with --resume where there is a
run.json; then it is left in peace. After that every file must be what it was in peace, bit for bit but for
times and the ids of runs, and no other may be there. A process may end with its work done, by the signal, or
on a full disk with one line; never with a traceback, and never by itself with its work half done.

Accidents: a signal at a random time; a signal at the k-th file operation below the project (open, mkdir,
rename, remove, chmod, truncate and fsync, noticed by an audit hook in the child); a full disk, by a tmpfs
that another file fills (root on Linux only); a file that may grow no further, by RLIMIT_FSIZE.

A process is a fork of this one, which has imported everything already; those that it starts itself, as
torchrun, lessons and the page do, are not. Left out: power failure, which loses what was not synced. Linux
only.
"""

import argparse
import ctypes
import http.client
import importlib
import json
import math
import mmap
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from harness import at_least_one, parser, write  # which finds the minillm beside it
from page import ask, pick_longest

# isort: split

from minillm.tools.stage import ROOT

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPING = SIGNALS[1:]
OPERATIONS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.fsync",
}  # fmt: skip
VOLATILE = re.compile(r"\w*seconds?|tokens_per_second|time|id|overwrite|resume|of|commit|dirty")
"""Fields that differ from run to run: times, the id of a run and what follows from it, how it was started."""
PATIENCE = 60.0
"""Seconds after which a process counts as hanging, beyond three times what it takes in peace."""
HUNG = 124
"""The exit code of one, as `timeout` has it."""

EACH = "--device cpu --precision float32 --warmup 1 --save-every 1 --val-every 2"
TEXT = f"--steps 4 --batch-tokens 256 --val-tokens 128 --cache cache {EACH}"
SHAPE = "--data tale.txt --depth 1 --vocab-size 290"
MIXED = "--ptx 0.5 --ptx-tokens 64 --text tale.txt --cache cache"
RLHF = "rlhf.py --out rlhf --stage"
POLICY = f"policy --init sft --data chats.jsonl --prompts 24 --max-new-tokens 4 --val-prompts 4 {EACH}"
ROLLOUT = "--rollout-batch 8 --max-kl 1e9 --critic-warmup 1 --iterations 3"
TWO = f"-m torch.distributed.run --standalone --nproc-per-node 2 {ROOT}/"
STAGES = {
    "train": f"train.py {SHAPE} --out base --block-size 256 --samples 1 {TEXT}",
    "sft": f"sft.py --init base --data chats.jsonl --text tale.txt --out sft {TEXT}",
    "sample": f"{RLHF} sample --models sft base --data chats.jsonl --responses 3 --max-new-tokens 4",
    "rank": f"{RLHF} rank --annotator file --data pairs.jsonl again=pairs.jsonl",
    "agreement": f"{RLHF} agreement",
    "reward": f"{RLHF} reward --init sft --batch-sets 40 {EACH}",
    "policy": f"{RLHF} {POLICY} {ROLLOUT} {MIXED} --ema-decay 0.5",
    "grpo": f"{RLHF} {POLICY} {ROLLOUT} --algorithm grpo --group-size 2",
    "dpo": f"{RLHF} {POLICY} --algorithm dpo --batch-sets 60",
    "best-of-n": f"{RLHF} {POLICY} --algorithm best-of-n --group-size 2",
    "compare": "-m minillm.compare base sft rlhf/ppo --data chats.jsonl --text tale.txt --text-bytes 300 "
    "--prompts 3 --max-new-tokens 4 --out compare",
    "lesson": "lessons/18_knowledge_cutoff.py --quick --runs . --out lessons",
    "play": "-m minillm.play --runs . --text tale.txt --port 0 --device cpu",
    "train by 2": f"{TWO}train.py {SHAPE} --out two --block-size 64 {TEXT}",
    "policy by 2": f"{TWO}rlhf.py --out pair --stage {POLICY} --reward rlhf/reward {ROLLOUT}",
}
"""Of each stage its command. One may build on all that stand before it."""
RESUMED = ("train", "sft", "sample", "reward", "policy", "grpo", "dpo", "train by 2", "policy by 2")
"""Those with --resume; the others go on by themselves, or begin anew."""
SLOW = ("lesson", "play", "train by 2", "policy by 2")
"""Those with a third as many trials."""
IMPORTED = (
    "matplotlib.backends.backend_agg", "sympy", "torch._dynamo", "train", "sft", "rlhf",
    "minillm.compare.__main__", "minillm.tools.plots", "minillm.tools.report",
)  # fmt: skip
"""What most stages need, imported once for all forks."""
SUBREAPER = 36
"""Linux's option by which what a killed process has started becomes a child of this one, to be awaited."""


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code or minus its signal, what it said, its file operations, how long."""

    code: int = 0
    said: str = ""
    operations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Accident:
    """What happens to a process, if anything."""

    what: str = "peace"
    number: int = 0  # the signal
    after: float = 0.0  # seconds until it
    operation: int = 0  # or the file operation at which it comes
    room: int = 0  # bytes that the disk has left, or to which a file may grow


def accident(rng: random.Random, known: End, made: int, full: bool) -> Accident:
    """One of all, to a stage that ends like `known` in peace and makes files of `made` bytes."""
    number, third = rng.choice(SIGNALS), "full" if full else "limit"
    match rng.choice(["signal", "signal", "operation", "operation", "operation", third, "limit"]):
        case "signal":
            return Accident(number.name, number, after=rng.uniform(0, known.seconds))
        case "operation":
            number = rng.choice([number, signal.SIGKILL, signal.SIGKILL])
            return Accident("operation", number, operation=rng.randint(1, max(1, known.operations)))
        case "full":
            return Accident("full", room=round(made * rng.random()))
        case what:
            return Accident(what, room=round(made ** rng.random()))


# ---- A process and its end


def become(words: list[str], folder: Path, done: ctypes.c_int64, what: Accident) -> None:
    """What a fork does: runs a script or a module as Python does, and counts its file operations."""

    def is_elsewhere(path: Any) -> bool:
        named = isinstance(path, str | bytes | os.PathLike)  # else a file that is open already
        return named and not os.path.abspath(os.fsdecode(path)).startswith(str(folder))

    def notice(event: str, given: tuple[Any, ...]) -> None:
        if event in OPERATIONS and not is_elsewhere(given[0]):
            done.value += 1
            if done.value == what.operation:
                os.kill(os.getpid(), what.number)

    for number in STOPPING:  # as Python has them before a script's first line, or nearly: without traceback
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    os.chdir(folder)
    handle = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    fsync = os.fsync
    os.fsync = lambda handle: (sys.audit("os.fsync", handle), fsync(handle))[1]  # type: ignore[assignment,func-returns-value]
    sys.addaudithook(notice)
    if what.what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (what.room, what.room))
    sys.modules.pop("minillm.tools.start", None)  # a script imports it first
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str((ROOT / words[0]).parent)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def start(words: list[str], folder: Path, what: Accident, patience: float) -> End:
    """Runs a command to its end and those that it leaves to theirs; ends them where one hangs."""
    done, began = ctypes.c_int64.from_buffer(mmap.mmap(-1, 8)), time.monotonic()
    folder.with_suffix(".log").write_bytes(b"")  # no visitor must find the address of the server before
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    process = get_context("fork").Process(target=become, args=(words, folder, done, what), daemon=True)
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    pid, late, struck = cast(int, process.pid), 0.0, not what.after
    if "minillm.play" in words:
        threading.Thread(target=visit, args=(folder, pid), daemon=True).start()
    while process.exitcode is None or children(os.getpid()):
        late = time.monotonic() - began
        for orphan in set(children(os.getpid())) - {pid}:
            os.waitpid(orphan, os.WNOHANG)
        if late > patience:
            for left in children(os.getpid()):
                os.kill(left, signal.SIGKILL)
        elif not struck and late > what.after and process.exitcode is None:
            # Under torchrun, which starts processes itself, any of them.
            os.kill(random.Random(what.after).choice([pid, *children(pid)]), what.number)
            struck = True
        else:
            time.sleep(0.002)
    said = folder.with_suffix(".log").read_text(errors="replace")
    code = HUNG if late > patience else cast(int, process.exitcode)
    return End(code, said, done.value, late)


def children(pid: int) -> list[int]:
    """The processes that one has started and that are there."""
    own = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in own.read_text().split()] if own.exists() else []


def visit(folder: Path, server: int) -> None:
    """A visitor of the page: picks ten times, trains on it, keeps the run; then the server is ended."""
    log = folder.with_suffix(".log")
    try:
        while not (found := re.search(r"http://[\d.:]+", log.read_text())):
            os.kill(server, 0)  # ProcessLookupError once it is gone
            time.sleep(0.02)
        address = found[0]
        shown = json.load(ask(address, "/api/rank", {"name": "Ada"}))
        while shown["done"] < 10:
            shown = pick_longest(address, "Ada", shown)
        if not (folder / "play" / "kept").exists():
            for shown in json.load(ask(address, "/api/state"))["runs"]:
                if "visit-" in shown["name"]:
                    name = shown["name"].split("/")[1]
                    ask(address, "/api/change", {"what": "undo", "name": name}).read()
            run = json.load(ask(address, "/api/train", {"iterations": 1}))["run"]
            ask(address, "/api/train").read()  # to the end of the training
            if (folder / "play" / run / "ppo" / "loss.png").exists():
                ask(address, "/api/change", {"what": "keep", "name": run, "new": "kept"}).read()
    except urllib.error.HTTPError:
        pass  # it refuses something, as on a full disk
    except (OSError, ValueError, http.client.HTTPException):
        return  # it has gone, or is going
    with suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)


# ---- What must be the same


def contents(folder: Path) -> dict[str, Any]:
    """Every file and folder of a project, without what differs from run to run."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def content(path: Path) -> Any:
    if path.is_dir():
        return None
    if path.name == "state.safetensors":
        from minillm.io.weights import read_tensors  # not before main has set the number of threads

        tensors, metadata = read_tensors(path)
        metadata.pop("seal", None)  # of the time too
        numbers = {name: json.loads(value, object_hook=lasting) for name, value in metadata.items()}
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | numbers
    if path.suffix in (".json", ".jsonl") and path.name != "tokenizer.json":
        text = path.read_text(encoding="utf-8")
        records = text.splitlines() if path.suffix == ".jsonl" else [text]
        return [json.loads(record, object_hook=lasting) for record in records]
    return re.sub(rb"It took \d+ seconds", b"", path.read_bytes())  # compare.html


def lasting(fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object without its volatile fields."""
    return {name: value for name, value in fields.items() if not VOLATILE.fullmatch(name)}


def write_data(folder: Path) -> None:
    """A text, conversations and preferences."""
    tale = [f"On day {i} the {i % 7} cats met {i % 5} dogs.\n" for i in range(99)]
    (folder / "tale.txt").write_text("".join(tale))
    said = {"role": "assistant", "content": "I saw."}
    chats: list[Any] = [{"messages": [{"role": "user", "content": line}, said]} for line in tale]
    pairs: list[Any] = [{"prompt": line, "chosen": "I saw them.", "rejected": "No."} for line in tale]
    for name, records in (("chats.jsonl", chats), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- A trial


class Torture:
    """A project that grows in peace, stage by stage, and trials on copies of it."""

    def __init__(self, folder: Path, stack: ExitStack, given: argparse.Namespace) -> None:
        self.seed, stages = given.seed, given.stages
        fast = [stage for stage in stages if stage not in SLOW]
        self.ring = [*stages, *fast, *fast]
        self.disk, self.known = folder / "disk", dict[str, tuple[End, Path, Path]]()
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(self.disk)]
        self.is_small = subprocess.run(mount, capture_output=True).returncode == 0
        if self.is_small:
            stack.callback(lambda: subprocess.run(["umount", "-l", str(self.disk)], check=True))
        (before := folder / "data").mkdir()
        write_data(before)
        for stage in list(STAGES)[: max(map(list(STAGES).index, stages)) + 1]:
            after = shutil.copytree(before, folder / stage)
            end = start(STAGES[stage].split(), after, Accident(), 600)
            wrong = fault(stage, end, Accident())
            if stage == "play" and not (after / "play" / "kept").is_dir():
                wrong = "its visitor could not pick, train and keep"
            if wrong:
                sys.exit(f"error: {stage} in peace: {wrong}")
            print(f"{stage}: {end.seconds:.1f} s, {end.operations} file operations", flush=True)
            self.known[stage], before = (end, before, after), after

    def trial(self, number: int) -> tuple[str, list[Accident], str]:
        """The stage, its accidents, and what was wrong in the end, or nothing."""
        rng, stage = random.Random(f"{self.seed} {number}"), self.ring[number % len(self.ring)]
        known, before, after = self.known[stage]
        folder, ballast = self.disk / "trial", self.disk / "ballast"
        names = [path.relative_to(after) for path in after.rglob("*")]
        made = [name for name in names if not (before / name).exists()]
        size = sum((after / name).stat().st_size for name in made)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        met = [accident(rng, known, size, self.is_small) for _ in range(rng.choice((1, 1, 2, 3)))]
        for what in (*met, Accident()):
            if stage == "best-of-n" and (folder / "rlhf/best-of-n/report.json").exists():
                break  # done though by a signal: it has nothing to go on with, and would refuse to begin anew
            words = STAGES[stage].split()
            if stage in RESUMED and any((folder / name).exists() for name in made if name.name == "run.json"):
                words.append("--resume")
            if what.what == "full":
                ballast.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - what.room)))
            end = start(words, folder, what, PATIENCE + 3 * known.seconds)
            ballast.unlink(missing_ok=True)
            if wrong := fault(stage, end, what):
                return stage, met, f"{what}: {wrong}"
        found, expected = contents(folder), contents(after)
        every = sorted({*found, *expected})
        different = [name for name in every if found.get(name, ...) != expected.get(name, ...)]
        return stage, met, f"differ: {different}" if different else ""


def fault(stage: str, end: End, what: Accident) -> str:
    """What a process should not have done, or nothing. A lesson may say that the signal ended its stage."""
    errors = re.findall("^error: .*", end.said, re.MULTILINE)
    torchrun = stage.endswith("by 2")  # which has words and codes of its own
    by_signal = what.number and (end.code in (128 + what.number, -what.number, 130) or torchrun)
    told = len(errors) == 1 or (what.what == "limit" and not errors)  # what it says may not grow either
    by_disk = (what.room or (what.after and stage == "lesson")) and (torchrun or (end.code == 2 and told))
    done = end.code == (143 if stage == "play" else 0)
    if "Traceback" in end.said and not torchrun:
        return f"a traceback: {end.said[-1500:]}"
    if end.code == HUNG:
        return f"it still runs after {end.seconds:.0f} s"
    return "" if done or by_signal or by_disk else f"exit code {end.code}: {end.said[-1500:]}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--trials", type=at_least_one, default=500)
    options.add_argument("--first", type=int, default=0, help="the number of the first trial (0)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=math.inf, help="after which no trial begins")
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    given, began = options.parse_args(), time.monotonic()
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for module in IMPORTED:
        importlib.import_module(module)
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    counts, failures, done = dict[str, Counter[str]](), list[dict[str, Any]](), 0
    with ExitStack() as stack:
        torture = Torture(Path(stack.enter_context(tempfile.TemporaryDirectory())), stack, given)
        with suppress(KeyboardInterrupt):  # what is done counts
            while done < given.trials and time.monotonic() < began + 60 * given.minutes:
                stage, met, wrong = torture.trial(given.first + done)
                counts.setdefault(stage, Counter()).update(["trials", *(one.what for one in met)])
                if wrong:
                    failures.append({"trial": given.first + done, "stage": stage, "found": wrong})
                    print(f"trial {given.first + done}, {stage}, {met}: {wrong}", flush=True)
                done += 1
    print(f"{done - len(failures)} of {done} ended as in peace")
    figures = {"seed": given.seed, "trials": done, "same": done - len(failures), "stages": counts}
    write(given.json, {**figures, "failures": failures, "seconds": time.monotonic() - began})
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
