"""Train on it: a reward model from the visitors' rankings, then PPO, by rlhf.py in a process of its own.

What happens is a list of events that only grows; whoever opens the page is told it from the beginning:

    {"stage": "reward", "policy", "done", "stopped" or "failed", "run": name, "seconds": since the start,
     "iterations": of PPO}
    {"of": stage, "event": "train" or "val", …}       a line of the stage's metrics.jsonl
    {"answers": [{"prompt", "text"}, …], "step": n}   what the policy of now says to the same five prompts
"""

import asyncio
import json
import os
import shutil
import sys
import time
import zipfile
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minillm.errors import InputError
from minillm.io.disk import write_text
from minillm.io.weights import weights_file
from minillm.play.parts import Picking
from minillm.play.shelf import answers
from minillm.play.web import words_for
from minillm.play.worker import Event, Worker
from minillm.tools.folder import hold, read_metrics
from minillm.tools.stage import ROOT

FEWEST_RANKINGS = 10
REWARD = "--epochs 8 --batch-sets 4 --val-every 1000"
POLICY = "--keep last --prompts 512 --val-prompts 24 --val-every 5 --critic-warmup 2"
POLICY += " --rollout-batch 32 --beta 0.02"
"""Options of the stages on a visitor's rankings alone: tens of seconds instead of minutes."""


class Training:
    """At most one at a time, in play/visit-1, play/visit-2, …"""

    def __init__(self, picking: Picking, worker: Worker, device: str) -> None:
        self.picking, self.shelf, self.worker, self.device = picking, picking.shelf, worker, device
        self.folder = self.shelf.folder / "play"
        self.events = list[Event]()
        self.task: asyncio.Task[None] | None = None
        self.name, self.stopped, self.began, self.iterations = "", False, 0.0, 0

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()

    def start(self, count: int, beside: bool = False, iterations: int = 20) -> str:
        """Begins, with the `count` rankings that there are, or with those of the simulated people `beside`
        them; the name of the run. InputError where it cannot be."""
        if self.running:
            raise InputError("a training is under way; stop it first")
        if count < FEWEST_RANKINGS:
            raise InputError(f"{max(0, count)} picks so far; it takes {FEWEST_RANKINGS}")
        if not 1 <= iterations <= 1000:
            raise InputError(f"iterations {iterations}: give 1 to 1000")
        init, others = self.shelf.folder / "sft", [self.shelf.folder / "rlhf" / "rankings.jsonl"] * beside
        for needed in (init, *others):
            if not needed.exists():
                raise InputError(f"{needed}: is not there; make demo makes it")
        self._clear()
        visits = (f"visit-{number}" for number in range(1, 100_000))
        self.name = next(name for name in visits if not (self.folder / name).exists())
        shared = ["--init", str(init), "--out", str(self.folder / self.name), "--device", self.device]
        ranked = ["--rankings", *map(str, [self.picking.file.path, *others])]
        stages = {
            "reward": [*ranked, *([] if beside else REWARD.split()), *shared],
            "policy": ["--iterations", str(iterations), *POLICY.split(), *self._prompts(), *shared],
        }
        self.events, self.stopped, self.began = [], False, time.monotonic()
        self.iterations = iterations
        self.task = asyncio.create_task(self._run(stages))
        return self.name

    def _prompts(self) -> list[str]:
        """Which prompts the policy trains on: those of the world that was ranked, or else what was ranked."""
        sets = self.picking.sets
        if sets[0].world is not None:
            return ["--seed", str(sets[0].world)]
        path = self.folder / self.name / "prompts.jsonl"
        path.parent.mkdir()
        write_text(path, "".join(json.dumps({"messages": given.messages}) + "\n" for given in sets))
        return ["--data", str(path)]

    async def _run(self, stages: dict[str, list[str]]) -> None:
        try:
            await self._ask("sft", 0)
            for stage, arguments in stages.items():
                if not self.stopped:
                    self._say(stage)
                    await self._stage(stage, arguments)
            self._say("stopped" if self.stopped else "done")
        except Exception as error:  # whatever it is, nobody must wait for what will not come
            self._say("failed", error=words_for(error))

    async def _stage(self, stage: str, arguments: list[str]) -> None:
        """Runs a stage and tells what it logs. InputError with the line of its error, if it ends in one."""
        run = self.folder / self.name / ("reward" if stage == "reward" else "ppo")
        process: Any = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "minillm.tools.stage", ROOT / "rlhf.py", "--stage", stage, *arguments,
            stdin=PIPE, stdout=PIPE, stderr=STDOUT, start_new_session=True,
        )  # fmt: skip
        printed, told, over = asyncio.create_task(process.stdout.read()), 0, False
        try:
            while not over:
                await asyncio.wait([printed], timeout=0.3)
                over = printed.done()  # once more after its end: its last lines
                told = await self._tell(stage, run, told)
                if self.stopped:
                    process.stdin.close()
        finally:
            process.stdin.close()
        if (code := await process.wait()) and not self.stopped:
            lines = printed.result().decode(errors="replace").splitlines()
            errors = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
            raise InputError(next(errors, f"the stage {stage} ended with code {code}"))

    async def _tell(self, stage: str, run: Path, told: int) -> int:
        """Tells the events of metrics.jsonl behind the first `told`; how many are told then."""
        events = read_metrics(run)[told:]
        self.events += [{"of": stage} | event for event in events if event["event"] in ("train", "val")]
        if stage == "policy" and any(event["event"] == "val" for event in events):
            await self._ask(run.relative_to(self.shelf.folder).as_posix(), events[-1]["step"])
        return told + len(events)

    async def _ask(self, name: str, step: int) -> None:
        """Tells what a run answers to the prompts that are watched."""

        def asked() -> Event:
            return {"answers": answers(self.shelf, name, self.picking.watched), "step": step}

        self.events.append(await self.worker.result(asked))

    def _say(self, stage: str, **more: Any) -> None:
        now = {"seconds": time.monotonic() - self.began, "iterations": self.iterations}
        self.events.append({"stage": stage, "run": self.name} | now | more)

    async def follow(self) -> AsyncGenerator[Event]:
        """All events of the latest training, from its beginning to its end."""
        events, told = self.events, 0
        while told < len(events) or (self.running and events is self.events):
            for event in events[told:]:
                told += 1
                yield event
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        """As Ctrl-C does, within a second: the run is saved, and can be used."""
        if not self.running:
            raise InputError("no training is under way")
        self.stopped = True

    async def close(self) -> None:
        """Stops what is under way and waits until it has saved."""
        if self.running and self.task:
            self.stop()
            await self.task

    def _clear(self) -> None:
        """Takes away what visits left that ended, or were killed, with no policy to show or to go on with."""
        for visit in self.folder.glob("visit-*"):
            if weights_file(visit / "ppo") is None:
                with suppress(BlockingIOError), hold(visit / "reward", False), hold(visit / "ppo", False):
                    shutil.rmtree(visit)  # no stage is still at it

    def undo(self, name: str) -> None:
        """Takes the run of a visit away."""
        shutil.rmtree(self._visit(name))

    def keep(self, name: str, new: str) -> None:
        """Gives the run of a visit a name."""
        if not new.replace("-", "").replace("_", "").isalnum() or len(new) > 40:
            raise InputError(f"{new!r:.60}: give letters, digits, - and _, at most 40")
        if new != name and (self.folder / new).exists():
            raise InputError(f"{new}: is there already; give another name")
        os.rename(self._visit(name), self.folder / new)

    def _visit(self, name: str) -> Path:
        """The folder of a visit, of which nothing is told any more: another training can begin."""
        if self.running and name == self.name:
            raise InputError("it is still training; stop it first")
        if name not in [path.parent.name for path in self.folder.glob("*/*")]:
            raise InputError(f"{name!r:.60}: no such run of a visit")
        if name == self.name:
            self.events, self.name = [], ""
        return self.folder / name


def pack(run: Path, target: Path) -> None:
    """A run's files as a zip, without its restart point."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(run.iterdir()):
            if path.is_file():
                archive.write(path, f"{run.name}/{path.name}")
