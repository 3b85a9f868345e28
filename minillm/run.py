"""A run and its folder: its device and processes, its metrics and files, how it stops and resumes.

    with start_runtime(device, precision) as runtime:     the device, and the processes that share the work
        run = Run("train", options, runtime)              claims the folder; knows whether it resumes a run
        ...                                               data, model, state
        with run.training(state, steps, save_model):
            while run.goes_on():                          saves every so many steps
                ...                                       one update: the script's own lines
                run.log_step(tokens, loss=loss, ...)
            run.end()

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json    io/huggingface.py
    run.json                  every option, versions, commit and hardware
    metrics.jsonl  loss.png   what happened
    resume/state.safetensors  all that an exact restart needs: weights, optimizer and position are in one
                              file, so that they can never belong to different steps

Every process of a run prepares the same global batch and takes its own rows, so the result does not depend
on how many there are. With --shard each keeps a part of the weights (fast/sharding.py); the files are the
same. No pickle anywhere. Left out: several machines with different devices.
"""

import contextlib
import errno
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minillm.errors import InputError, Interrupted, reason_of, writing
from minillm.options import TrainingOptions

# ---- Where it computes

Item = TypeVar("Item")
Sharded = TypeVar("Sharded", bound=Tensor | nn.Module)


@dataclass(frozen=True)
class Runtime:
    """One process's place in a run; with --shard it is of fast/sharding.py's kind."""

    device: torch.device
    dtype: torch.dtype
    """The precision of matrix products and of the residual stream; weights stay float32."""
    rank: int = 0
    world_size: int = 1
    recomputes: bool = False
    """Whether the backward pass computes the activations inside blocks anew."""
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)
    """What is released when the process is done, such as the lock on its run folder."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def opens_on(self) -> torch.device:
        """Where a model is opened that `wrap` or `shard` is given: whole it may not fit on the device."""
        return self.device

    def wrap(self, model: nn.Module, compiled: bool | None = None) -> Callable[..., Tensor]:
        """The model as the training loop calls it, averaging over processes; compiled, unless said
        otherwise, where CUDA and the Triton that torch.compile needs are there."""
        on_cuda = self.device.type == "cuda"
        if compiled is None:
            compiled = on_cuda and importlib.util.find_spec("triton") is not None
        if self.recomputes:
            from minillm.fast.sharding import recompute_blocks

            recompute_blocks(model)
        if self.shard(model, compiled):
            return model
        if compiled:
            model.compile()
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if on_cuda else None)

    def shard(self, model: nn.Module, compiled: bool = False) -> bool:
        """Where the run is sharded, leaves of the model what this process keeps; its parameters are others
        from then on. Returns whether it is."""
        return False

    def whole(self, part: Sharded) -> Sharded:
        """A sharded tensor, or a model to sample or score with, gathered from all processes, which all must
        ask for it; where nothing is sharded, what was given."""
        return part

    def even(self, parts: list[Item], idle: Item) -> list[Item]:
        """As many parts as the process with the most has, where the run is sharded: all must make as many
        forward passes. `idle` makes up for those missing."""
        return parts

    def rows_of_step(self, option: str, size: int, row: int = 1) -> int:
        """Rows of a step of this size, over all processes. InputError, by the option that sets it, where they
        cannot be shared out evenly."""
        rows = max(1, size // row)
        if rows % self.world_size:
            what = f"{option} {size}: cannot be shared by {self.world_size} processes"
            raise InputError(f"{what}; give a multiple of {self.world_size * row}")
        return rows

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on their device; a single one returns it as it is."""
        if self.world_size > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum of a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value


def run_script(kind: type[TrainingOptions], work: Callable[[Any, Runtime], None], words: list[str]) -> None:
    """What a training script does with the words of its command line: its `work`, by options of this kind."""
    from minillm.tools.commandline import parse_options
    from minillm.tools.device import start_runtime
    from minillm.tools.ending import one_line_errors

    with one_line_errors():
        options = parse_options(kind, words)
        how = options.device, options.precision, options.shard, options.checkpoint_activations
        with start_runtime(*how) as runtime:
            work(options, runtime)


# ---- What an exact restart needs

RESUME_FILE = Path("resume") / "state.safetensors"


@dataclass
class TrainingState:
    """Everything that changes while a model trains, and so all that a restart must bring back, from the file
    that tools/folder.py writes."""

    model: nn.Module
    optimizers: Any
    """An optim.Optimizers."""
    data: Any
    """The stream of batches: its state_dict() is JSON, and load_state_dict() continues from there."""
    step: int = 0
    """Updates done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Time spent training, over all sittings (processes) of the run."""
    held_out: str = ""
    """A digest of what is validated on that `data` has no part of: by it the best model is chosen."""


# ---- The run

NO_SCREEN = contextlib.suppress(OSError, ValueError)
"""For the progress bar: if it cannot be drawn, as on a closed or full stream, the run continues."""


class Run:
    """One stage's run in its folder, from the first check to the last line.

    `options` is the script's dataclass. `command` is what runs this stage, if it is not the script of its
    name. metrics.jsonl holds one JSON object a line, each with its "event" and "step". A resumed run drops
    the lines beyond its restart point, and the "final" one where more steps are to come, so the file reads
    as if the run had never stopped. Only the main process writes.
    """

    def __init__(
        self, stage: str, options: TrainingOptions, runtime: Runtime, command: str | None = None
    ) -> None:
        from minillm.tools.folder import claim_folder, earlier_events

        self.stage, self.options, self.runtime = stage, options, runtime
        self.command = command or f"{stage}.py"
        self.folder, self.began = options.folder, time.perf_counter()
        self.path = self.folder / "metrics.jsonl"
        claim_folder(options, runtime)
        earlier = earlier_events(options)
        self.resuming, self.logged = earlier is not None, earlier or []
        """Whether an earlier sitting left a restart point; and its events."""
        self.file: Any = None
        self.tracker: Any = None
        if options.tracker != "none" and runtime.is_main:
            from minillm.tools.trackers import Tracker

            self.tracker = Tracker(options.tracker)

    @contextlib.contextmanager
    def training(self, state: TrainingState, steps: int, save_model: Callable[[], None]) -> Iterator[None]:
        """Surrounds the loop: `state` is restored if the run resumes, metrics.jsonl is open, signals stop the
        loop after a step. `save_model` writes the model in Hugging Face's layout."""
        from minillm.tools.ending import signals
        from minillm.tools.folder import begin_folder, resume

        self.state, self.steps, self.save_model, tenth = state, steps, save_model, max(1, steps // 10)
        self.val_every, self.save_every = self.options.val_every or tenth, self.options.save_every or tenth
        updates = steps * self.options.updates_per_step
        if self.options.warmup > max(updates, TrainingOptions.warmup):
            raise InputError(f"--warmup {self.options.warmup}: the run has {updates:,} updates; give fewer")
        if self.resuming:
            resume(self)
        self.saved_step, self.earlier_seconds = state.step if self.resuming else None, state.seconds
        self.latest = {event["event"]: event for event in self.logged}
        self.shown: dict[str, str] = {}
        self.told_to_stop = math.inf
        with contextlib.ExitStack() as stack:
            stack.enter_context(signals(self._stop))
            begin_folder(self)
            if self.runtime.is_main:
                # Unbuffered: a line is on its way to the disk when written, and none is left to close().
                self.file = stack.enter_context(open(self.path, "ab", buffering=0))
                if self.tracker and "final" not in self.latest:
                    self.tracker.open(self.folder, state.step)
                    stack.callback(self.tracker.close)
            self.bar = tqdm(disable=True)
            with NO_SCREEN:
                # On the bare stream: what the bar shows is printable.
                self.bar = tqdm(
                    total=steps, initial=state.step, unit="step", dynamic_ncols=True, file=sys.__stderr__,
                    disable=not self.runtime.is_main,
                )  # fmt: skip
            self.step_began = time.perf_counter()
            try:
                yield
            finally:
                with NO_SCREEN:
                    self.bar.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C, SIGTERM or SIGHUP ends the loop after the step under way; a second one ends at once.

        One Ctrl-C under torchrun arrives twice: from the terminal and from torchrun.
        """
        if time.monotonic() > self.told_to_stop + 1:
            raise Interrupted(number)
        self.told_to_stop = min(self.told_to_stop, time.monotonic())

    # -- In the loop

    def already_finished(self) -> bool:
        """Whether this run was finished in an earlier sitting; says so."""
        if "final" in self.latest:
            self.say(f"{self.folder}: already finished; nothing to do")
        return "final" in self.latest

    def goes_on(self) -> bool:
        """Whether there is another step to take: none is left at the end, or once any process was told to
        stop. Saves where that is due, but for the end, where `end` does."""
        step = self.state.step
        if 0 < step < self.steps and step != self.saved_step and step % self.save_every == 0:
            self.save()
        self.step_began = time.perf_counter()
        told = self.runtime.total(torch.tensor(float(math.isfinite(self.told_to_stop))))
        return step < self.steps and not told.item()

    def log_step(
        self, tokens: int, *, loss: float, gradient_norm: float, shown: str = "", **metrics: float
    ) -> None:
        """Counts an update of `tokens` tokens and logs its metrics. InputError if one is not finite."""
        if not math.isfinite(loss + gradient_norm):
            found = f"loss {loss}, gradient norm {gradient_norm}"
            raise self.exploded(f"a metric is no longer finite ({found})")
        self.state.step += 1
        self.state.tokens += tokens
        speed = tokens / (time.perf_counter() - self.step_began)
        self.log(
            "train", f"loss {loss:.3f}, {speed:,.0f} tokens/s{shown}", loss=loss, gradient_norm=gradient_norm,
            **metrics, tokens_per_second=speed,
        )  # fmt: skip

    def log(self, event: str, shown: str = "", **metrics: Any) -> None:
        """Appends a line to metrics.jsonl; the bar shows `shown` until the next of its kind."""
        record = {"event": event, "step": self.state.step, **metrics}
        self.latest[event] = record
        if self.file is None:
            return
        line = f"{json.dumps(record)}\n".encode()
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "only a part was written: the disk is full")
        except OSError as error:
            hint = "free some space and --resume"
            raise InputError(f"{self.path}: cannot be written ({reason_of(error)}); {hint}") from error
        if self.tracker:
            self.tracker.log(record)
        self.shown[event] = shown
        with NO_SCREEN:
            self.bar.set_postfix_str(", ".join(filter(None, self.shown.values())), refresh=False)
            self.bar.update(self.state.step - self.bar.n)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.file:
            with NO_SCREEN:
                self.bar.clear()
            print(text)
            with NO_SCREEN:
                self.bar.refresh()

    def save(self) -> None:
        """Writes the model and the restart point; InputError if a weight is not finite."""
        from minillm.io.disk import sync_open
        from minillm.tools.folder import save_state

        weights = [getattr(weight, "_local_tensor", weight) for weight in self.state.model.parameters()]
        spoilt = torch.tensor(float(not all(bool(weight.isfinite().all()) for weight in weights)))
        if self.runtime.total(spoilt).item():
            raise self.exploded("some weights are no longer finite")
        self.state.seconds = self.earlier_seconds + time.perf_counter() - self.began
        if self.file:
            with writing(self.path, "free some space and --resume"):
                sync_open(self.file.fileno())  # before a restart point counts on what was logged
        self.save_model()
        save_state(self.state, self.folder)
        self.saved_step = self.state.step

    def exploded(self, what: str) -> InputError:
        """The error that ends a run which has diverged."""
        kept = "nothing was saved yet"
        if self.saved_step is not None:
            kept = f"a restart point is kept, of step {self.saved_step}, and would end the same way"
        rates = "--policy-rate" if self.stage == "policy" else "--matrix-rate or --embedding-rate"
        return InputError(
            f"{self.folder}: {what} at step {self.state.step}; {kept}: begin anew with --overwrite and "
            f"a lower {rates}"
        )

    # -- After it

    def end(self) -> None:
        """Saves and says where; after an early stop says how to go on, and exits."""
        self.save()
        if self.state.step == self.steps:
            self.say(f"{self.folder}: all {self.steps:,} steps done, in {self.state.seconds:.0f} s")
        else:
            self.say(
                f"stopped at step {self.state.step}; go on with: "
                f"python {self.command} --resume --out {shlex.quote(self.options.out)}"
            )
            sys.exit(130)

    def metric(self, event: str, name: str) -> float:
        """A metric of the latest record of a kind. InputError where a damaged file has none."""
        found = self.latest.get(event, {}).get(name)
        if found is None:
            raise InputError(f"{self.path}: no {event} with its {name}; restore it or --overwrite")
        return found

    def finish(self, **metrics: Any) -> None:
        """The last line of metrics.jsonl, written when everything else of the run is there."""
        self.log("final", seconds=self.state.seconds, tokens=self.state.tokens, **metrics)
