"""Train on it: a reward model from the visitors' rankings, then PPO, by rlhf.py in a process of its own.

What happens is a list of events that only grows; whoever opens the page is told it from the beginning:

    {"stage": "reward", "policy", "done", "stopped" or "failed", "run": name, "seconds": since the start}
    {"of": stage, "event": "train" or "val", …}       a line of the stage's metrics.jsonl
    {"answers": [{"prompt", "text"}, …], "step": n}   what the policy of now says to the same five prompts
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import AsyncGenerator
from pathlib import Path

from minillm.errors import InputError
from minillm.play.parts import Picking
from minillm.play.shelf import answers
from minillm.play.worker import Event, Worker

FEWEST_RANKINGS = 10
REWARD = "--epochs 8 --batch-sets 4 --val-every 1000"
POLICY = "--keep last --prompts 512 --val-prompts 24 --val-every 5 --critic-warmup 2"
POLICY += " --rollout-batch 32 --beta 0.02"
"""Options of the stages on a visitor's rankings alone: tens of seconds instead of minutes."""


class Training:
    """At most one at a time, in play/visit-1, play/visit-2, …"""

    def __init__(self, runs: Path, picking: Picking, worker: Worker) -> None:
        self.runs, self.folder, self.picking, self.worker = runs, runs / "play", picking, worker
        self.events, self.grown = list[Event](), asyncio.Condition()
        self.process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task[None] | None = None
        self.name, self.stopped, self.began = "", False, 0.0

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()

    def start(self, count: int, beside: bool, iterations: int) -> str:
        """Begins, with the `count` rankings that there are, or with those of the simulated people `beside`
        them; the name of the run. InputError where it cannot be."""
        if self.running:
            raise InputError("a training is under way; stop it first")
        if count < FEWEST_RANKINGS:
            raise InputError(f"{max(0, count)} picks so far; it takes {FEWEST_RANKINGS}")
        if not 1 <= iterations <= 1000:
            raise InputError(f"iterations {iterations}: give 1 to 1000")
        init, simulated = self.runs / "sft", self.runs / "rlhf" / "rankings.jsonl"
        for needed in (init, *([simulated] if beside else [])):
            if not needed.exists():
                raise InputError(f"{needed}: is not there; make demo makes it")
        visits = (f"visit-{number}" for number in range(1, 100_000))
        self.name = next(name for name in visits if not (self.folder / name).exists())
        shared = ["--init", str(init), "--out", str(self.folder / self.name)]
        reward = ["--rankings", str(self.picking.rankings), *([str(simulated)] if beside else REWARD.split())]
        policy = ["--iterations", str(iterations), *POLICY.split()]
        stages = {"reward": [*reward, *shared], "policy": [*policy, *shared]}
        self.events, self.stopped, self.began = [], False, time.monotonic()
        self.task = asyncio.create_task(self._run(stages))
        return self.name

    async def _run(self, stages: dict[str, list[str]]) -> None:
        end: Event = {"stage": "done"}
        try:
            for stage, arguments in stages.items():
                await self._say({"stage": stage})
                line = await self._stage(stage, arguments)
                if self.stopped or line:
                    end = {"stage": "stopped"} if self.stopped else {"stage": "failed", "error": line}
                    break
        except Exception as error:  # whatever it is, nobody must wait for what will not come
            end = {"stage": "failed", "error": f"{type(error).__name__}: {error}"}
        await self._say(end)

    async def _stage(self, stage: str, arguments: list[str]) -> str:
        """Runs a stage and tells what it logs; the line of its error, if it ends in one."""
        run = self.folder / self.name / ("reward" if stage == "reward" else "ppo")
        log = self.folder / f"{self.name}.log"
        with open(log, "wb") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "rlhf", "--stage", stage, *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        ending, told, over = asyncio.create_task(self.process.wait()), 0, False
        while not over:
            await asyncio.wait([ending], timeout=0.3)
            over = ending.done()  # once more after its end: its last lines
            told = await self._tell(stage, run, told)
        lines = log.read_text(errors="replace").splitlines()
        log.unlink()
        if (code := ending.result()) == 0:
            return ""
        return next(
            (line for line in lines if line.startswith("error:")), f"error: it ended with code {code}"
        )

    async def _tell(self, stage: str, run: Path, told: int) -> int:
        """Tells the whole lines of metrics.jsonl behind its first `told` bytes; how far it is told then."""
        path = run / "metrics.jsonl"
        coming = path.read_bytes()[told:] if path.exists() else b""
        whole = coming[: coming.rfind(b"\n") + 1]
        events = [json.loads(line) for line in whole.splitlines()]
        for event in events:
            if event["event"] in ("train", "val"):
                await self._say({"of": stage} | event)
        if stage == "policy" and any(event["event"] == "val" for event in events):
            name = run.relative_to(self.runs).as_posix()

            def asked() -> Event:
                return {"answers": answers(self.picking.shelf, name, self.picking.watched)}

            await self._say(await self.worker.result(asked) | {"step": events[-1]["step"]})
        return told + len(whole)

    async def _say(self, event: Event) -> None:
        if "stage" in event:
            event |= {"run": self.name, "seconds": time.monotonic() - self.began}
        async with self.grown:
            self.events.append(event)
            self.grown.notify_all()

    async def follow(self) -> AsyncGenerator[Event]:
        """All events of the latest training, from its beginning to its end."""
        events, told = self.events, 0
        while told < len(events) or (self.running and events is self.events):
            for event in events[told:]:
                told += 1
                yield event
            async with self.grown:
                while told == len(events) and self.running and events is self.events:
                    await self.grown.wait()

    def stop(self) -> None:
        """As Ctrl-C does: the run is saved, and can be used."""
        if not self.running or self.process is None:
            raise InputError("no training is under way")
        self.stopped = True
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)

    async def close(self) -> None:
        """Stops what is under way and waits until it has saved."""
        if self.running and self.task:
            self.stop()
            await self.task

    def undo(self, name: str) -> None:
        """Takes the run of a visit away."""
        shutil.rmtree(self._visit(name))

    def keep(self, name: str, new: str) -> None:
        """Gives the run of a visit a name."""
        if not new.replace("-", "").replace("_", "").isalnum() or len(new) > 40:
            raise InputError(f"{new!r:.60}: give letters, digits, - and _, at most 40")
        if (self.folder / new).exists():
            raise InputError(f"{new}: is there already; give another name")
        os.rename(self._visit(name), self.folder / new)

    def _visit(self, name: str) -> Path:
        if self.running and name == self.name:
            raise InputError("it is still training; stop it first")
        if name not in [path.parent.name for path in self.folder.glob("*/reward")]:
            raise InputError(f"{name!r:.60}: no such run of a visit")
        return self.folder / name


def pack(run: Path, target: Path) -> None:
    """A run's files as a zip, without its restart point."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(run.iterdir()):
            if path.is_file():
                archive.write(path, f"{run.name}/{path.name}")
