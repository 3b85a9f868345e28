"""A run under way: what every script does around its training loop, whatever it trains.

    run = Run("train", options, runtime)        refuses to mix two runs, knows whether it resumes one
    ...                                         data, model, state
    with run.training(state, steps, save_model):
        while run.goes_on():
            ...                                 one update: the script's own lines
            run.log_step(tokens, loss=loss, ...)
            if run.due(val_every): ...
            if run.due(save_every): run.save()
        run.end()

The loop itself stands in the script. Here stand the clock, the log, the restart points, Ctrl-C and
the refusal of numbers that are no longer finite.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from minillm.checkpoint import RESUME_FILE, TrainingState, check_run_folder, start_run_folder
from minillm.errors import InputError
from minillm.metrics import Metrics, open_tracker, read_metrics
from minillm.options import TrainingOptions, options_json
from minillm.runtime import Runtime, StopRequest


class Run:
    """One stage's run in its folder, from the first check to the last line.

    `options` is the script's dataclass, of which `folder`, `out`, `resume`, `overwrite` and `tracker` are
    read. `command` is what runs this stage, where it is not the script of its name.
    """

    def __init__(
        self, stage: str, options: TrainingOptions, runtime: Runtime, command: str | None = None
    ) -> None:
        self.stage, self.options, self.runtime = stage, options, runtime
        self.command = command or f"{stage}.py"
        self.rate_options = "--policy-rate" if stage == "policy" else "--matrix-rate or --embedding-rate"
        self.folder, self.began = options.folder, time.perf_counter()
        check_run_folder(self.folder, options.resume, options.overwrite)
        self.resuming = options.resume and (self.folder / RESUME_FILE).exists()
        if options.resume and not self.resuming:
            self._check_unfinished()

    @contextlib.contextmanager
    def training(self, state: TrainingState, steps: int, save_model: Callable[[], None]) -> Iterator[None]:
        """The time between the first step and the last: `state` goes on from its restart point or
        starts anew, and `save_model` writes what others open."""
        if self.resuming:
            state.restore(self.folder)
            self._check_metrics(state.step)
        elif self.runtime.is_main:
            start_run_folder(self.folder, options_json(self.options), self.stage)
        self.state, self.steps, self.save_model, self.earlier = state, steps, save_model, state.seconds
        tracker = None
        if self.runtime.is_main:
            tracker = open_tracker(self.options.tracker, self.folder, options_json(self.options))
        with (
            Metrics(self.folder, steps, state.step, tracker, self.runtime) as self.metrics,
            StopRequest(self.runtime) as self.stop,
        ):
            self.step_began = time.perf_counter()
            yield

    def _check_unfinished(self) -> None:
        """Without a restart point a run begins anew, which would destroy one that has come to its end."""
        if any(event["event"] == "final" for event in read_metrics(self.folder)):
            raise InputError(
                f"{self.folder}: is finished, and has no {RESUME_FILE} any more; leave it as it is, or "
                "--overwrite to begin anew"
            )

    def _check_metrics(self, step: int) -> None:
        """What was logged is on the disk before its restart point: a crash cannot have lost it."""
        if step and all(event["step"] != step for event in read_metrics(self.folder)):
            raise InputError(
                f"{self.folder / 'metrics.jsonl'}: holds no step {step}, where the run goes on; restore it "
                "or --overwrite"
            )

    def already_finished(self) -> bool:
        """Whether this run had come to its end before; says so."""
        if self.metrics.last("final"):
            self.metrics.say(f"{self.folder}: already finished; nothing to do")
            return True
        return False

    def goes_on(self) -> bool:
        """Whether there is another step to take: none is left at the end, or after Ctrl-C."""
        self.step_began = time.perf_counter()
        return self.state.step < self.steps and not self.stop.asked()

    def check_finite(self, **figures: float) -> None:
        """Ends the run, before the weights move, where a figure of this step is no number."""
        if not all(map(math.isfinite, figures.values())):
            values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
            raise self.exploded(f"a figure is no longer finite ({values})")

    def log_step(self, tokens: int, loss: float, **figures: float) -> None:
        """Counts an update of `tokens` tokens, logs its figures and moves the bar."""
        self.state.step += 1
        self.state.tokens += tokens
        speed = tokens / (time.perf_counter() - self.step_began)
        self.metrics.log("train", self.state.step, loss=loss, **figures, tokens_per_second=speed)
        self.metrics.show(self.state.step, loss=f"loss {loss:.3f}", speed=f"{speed:,.0f} tokens/s")

    def log(self, event: str, shown: str, **figures: Any) -> None:
        """Logs figures that are not of every step; the bar goes on showing `shown`."""
        self.metrics.log(event, self.state.step, **figures)
        self.metrics.show(self.state.step, **{event: shown})

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps happens now."""
        return self.state.step % every == 0

    def save(self) -> None:
        """The model as others open it, and the restart point; refused where a weight is no number."""
        if not self.state.is_finite():
            raise self.exploded("some weights are no longer finite")
        self.state.seconds = self.earlier + time.perf_counter() - self.began
        if self.runtime.is_main:
            self.metrics.sync()
            self.save_model()
            self.state.save(self.folder)

    def end(self) -> None:
        """Saves and says where; after an early stop says how to go on, and exits."""
        self.save()
        if self.state.step == self.steps:
            self.metrics.say(f"{self.folder}: all {self.steps:,} steps done, in {self.state.seconds:.0f} s")
        else:
            self.metrics.say(
                f"stopped at step {self.state.step}; go on with: "
                f"python {self.command} --resume --out {self.options.out}"
            )
            sys.exit(130)

    def exploded(self, what: str) -> InputError:
        """The end of a run that has gone wrong beyond repair."""
        return InputError(
            f"{self.folder}: {what} at step {self.state.step}; the last good restart point is kept: "
            f"try a lower {self.rate_options}"
        )
