"""An iteration of PPO beside TRL's PPOTrainer: the same weights, prompts, updates and threads.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.12.0     (the last release that has PPOTrainer)
    python benchmarks/ppo.py --peer-python /tmp/trl/bin/python [--json benchmarks/ppo.json]

An iteration is 64 responses to the same 64 prompts, scored by the reference, the reward model and the critic,
and then two passes of two updates each of policy and critic. On our side it is the loop of rlhf.py, on theirs
that of `PPOTrainer.train` (ppo_trl.py). Both make one iteration in turn, each in a process of its own;
the first of each is not counted; medians. What counts is tokens of responses a second, padding not counted.
Twice:

    fixed     every response has 32 tokens
    ending    as both are used: a response ends at its end token, or after 64

The rate is so small that the policy stays what it was, so that both sample from one distribution.

Not the same: minillm computes the old log-probabilities, and the exact KL to the reference, in a forward pass
of the policy, where TRL takes those of its sampler; it clips the gradient, TRL does not. TRL pads every
response to the longest, before the prompt and behind the end, and computes the logits of prompts too. In
bfloat16 its weights are that, which is its fastest; ours stay float32.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import in_turn, medians, parser, write

import rlhf
from minillm.chat import ChatTemplate, with_chat_template
from minillm.io.huggingface import load_model
from minillm.run import Run, start_runtime

RESPONSES = 64
LENGTHS = {"fixed": 32, "ending": 64}
WORK = {"iterations": 10**6, "minibatches": 2, "ppo_epochs": 2, "beta": 0.1, "rate": 1e-7}
GET_TRL = "python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.12.0"


# ---- minillm's side, in a process of its own


class Turns(Run):
    """A run that makes an iteration whenever it is sent a line, and answers with its seconds and figures."""

    def goes_on(self) -> bool:
        if self.state.step < self.steps:
            sys.stdin.readline()
        self.began_at, self.cpu_began = time.perf_counter(), time.process_time()
        return super().goes_on()

    def log_step(self, tokens: int, loss: float, **figures: float) -> None:
        super().log_step(tokens, loss, **figures)
        seconds, cpu = time.perf_counter() - self.began_at, time.process_time() - self.cpu_began
        line = {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, **figures}
        print(json.dumps(line), file=sys.__stdout__, flush=True)


def minillm_process(work: dict[str, Any]) -> None:
    torch.set_num_threads(work["threads"])
    same = ("init", "reward", "out", "precision", "iterations", "minibatches", "ppo_epochs", "beta")
    options = rlhf.Options(
        stage="policy", **{name: work[name] for name in same}, device="cpu", policy_rate=work["rate"],
        prompts=RESPONSES, rollout_batch=RESPONSES, max_new_tokens=work["length"], critic_warmup=0,
        missing_eos_score=None, val_prompts=1, val_every=10**6, save_every=10**6,
    )  # fmt: skip
    stops = () if work["stop"] is None else (work["stop"],)
    stopping, turns = patch.object(ChatTemplate, "stop_ids", stops), patch.object(rlhf, "Run", Turns)
    with stopping, turns, start_runtime("cpu", work["precision"]) as runtime:
        rlhf.align(options, runtime)


# ---- The two in turn


class Side:
    """One of the two processes."""

    def __init__(self, command: list[str | Path], work: dict[str, Any], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, json.dumps(work)], text=True, stderr=errors,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip

    def iterate(self, number: int) -> dict[str, float]:
        """Makes an iteration; its seconds, tokens and metrics."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.log.read_text()[-2000:]}\n{self.process.args[:2]} has died")
        return json.loads(line)


def compare(commands: dict[str, list], work: dict[str, Any], runs: int) -> dict[str, Any]:
    """Medians over the counted iterations, in tokens of responses a second."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(command, work | {"out": f"{folder}/{name}"}, Path(folder, f"{name}.log"))
            for name, command in commands.items()
        }
        iterations = in_turn({name: side.iterate for name, side in sides.items()}, runs)
        for side in sides.values():
            side.process.kill()  # before what comes at a run's end, which is not compared
            side.process.wait()
    rates = medians({
        name: [line["tokens"] / line["seconds"] for line in lines[1:]] for name, lines in iterations.items()
    })  # fmt: skip
    return {"tokens_per_second": rates, "ratio": rates["minillm"] / rates["TRL"], "iterations": iterations}


def inputs_of(init: Path) -> tuple[list[list[int]], int]:
    """The prompts that rlhf.py takes, as tokens, and the token that ends a response."""
    model, tokenizer = load_model(init, torch.device("cpu"), torch.float32)
    template = ChatTemplate(with_chat_template(tokenizer))
    questions = rlhf.world_prompts(0, "reward", RESPONSES)
    prompts = [template.prompt(question.messages) for question in questions]
    if max(map(len, prompts)) > model.config.max_position_embeddings - max(LENGTHS.values()):
        raise SystemExit("some prompts leave no room for a response; give a model with longer rows")
    return prompts, template.stop_ids[0]


def peer_versions(python: str) -> dict[str, str]:
    """What runs on the other side."""
    names = ("trl", "transformers", "torch", "accelerate")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    try:
        return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(f"--peer-python {python}: has no TRL: {GET_TRL}") from None


def main() -> None:
    options = parser(__doc__, runs=8)
    options.add_argument("--peer-python", required=True, help="an interpreter that has TRL 1.12.0")
    options.add_argument("--init", type=Path, default=Path("out/sft"))
    options.add_argument("--reward", type=Path, default=Path("out/rlhf/reward"))
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = options.parse_args()
    peer, (prompts, end) = peer_versions(arguments.peer_python), inputs_of(arguments.init)
    commands = {
        "minillm": [sys.executable, __file__, "--minillm"],
        "TRL": [arguments.peer_python, Path(__file__).with_name("ppo_trl.py")],
    }
    work = WORK | {"threads": arguments.threads, "init": str(arguments.init), "reward": str(arguments.reward)}
    results = []
    print(f"{arguments.threads} threads\nlengths  precision  minillm tok/s  TRL tok/s  ratio")
    for kind, length in LENGTHS.items():
        for precision in ("float32", "bfloat16"):
            setting = {"precision": precision, "length": length, "stop": end if kind == "ending" else None}
            found = compare(commands, work | setting | {"prompts": prompts}, arguments.runs)
            ours, theirs = found["tokens_per_second"].values()
            print(f"{kind:7}  {precision:9}  {ours:13.0f}  {theirs:9.0f}  {found['ratio']:5.2f}", flush=True)
            results.append({"lengths": kind, **setting, **found})
    write(arguments.json, {"peer": peer, "responses": RESPONSES, **work, "results": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--minillm"]:
        with redirect_stdout(sys.stderr):  # where a run shows how it goes
            minillm_process(json.loads(sys.argv[2]))
    else:
        main()
