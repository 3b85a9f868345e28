"""An iteration of PPO beside TRL's PPOTrainer: the same weights, prompts, updates and threads.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.12.0     (the last release that has PPOTrainer)
    python benchmarks/ppo.py --peer-python /tmp/trl/bin/python [--json benchmarks/ppo.json]

An iteration is 64 responses to the same 64 prompts, scored by the reference, the reward model and the critic,
and then two passes of two updates each of policy and critic. On our side it is the loop of rlhf.py, on theirs
that of `PPOTrainer.train`. Both make one iteration in turn, each in a process of its own;
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, medians, parser, write

RESPONSES = 64
LENGTHS = {"fixed": 32, "ending": 64}
WORK = {"iterations": 10**6, "minibatches": 2, "ppo_epochs": 2, "beta": 0.1, "rate": 1e-7}
GET_TRL = "python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.12.0"


# ---- Each side in a process of its own, with the imports that its interpreter has


class Clock:
    """Stops the time, and the loop, between two iterations: one is made whenever a line comes, and answered
    by a line with its seconds and metrics."""

    def start(self) -> None:
        sys.stdin.readline()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def stop(self, tokens: int, metrics: dict[str, Any]) -> None:
        seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu_began
        line = {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, **metrics}
        print(json.dumps(line), file=sys.__stdout__, flush=True)


def minillm_side(work: dict[str, Any]) -> None:
    """The loop of rlhf.py."""
    import rlhf
    from minillm.run import Run, start_runtime

    clock, start_aligner = Clock(), rlhf.start_aligner

    class Turns(Run):
        def goes_on(self) -> bool:
            clock.start()
            return super().goes_on()

        def log_step(self, tokens: int, **metrics: Any) -> None:
            super().log_step(tokens, **metrics)
            clock.stop(tokens, metrics)

    def stopping(*arguments: Any) -> Any:
        aligner = start_aligner(*arguments)
        stops = () if work["stop"] is None else (work["stop"],)
        aligner.sampling = replace(aligner.sampling, stop_ids=stops)
        return aligner

    rlhf.Run, rlhf.start_aligner = Turns, stopping  # type: ignore[misc, assignment]
    same = ("init", "reward", "out", "precision", "iterations", "minibatches", "ppo_epochs", "beta")
    options = rlhf.Options(
        stage="policy", **{name: work[name] for name in same}, device="cpu", policy_rate=work["rate"],
        prompts=RESPONSES, rollout_batch=RESPONSES, max_new_tokens=work["length"], critic_warmup=0,
        missing_eos_score=None, val_prompts=1, val_every=10**6, save_every=10**6,
    )  # fmt: skip
    with start_runtime("cpu", work["precision"]) as runtime:
        rlhf.align(options, runtime)


def trl_side(work: dict[str, Any]) -> None:
    """PPOTrainer, which may pad a prompt with the mask token, for <|endoftext|> begins it."""
    import transformers
    import trl.experimental.ppo.ppo_trainer as ppo_trainer
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(work["init"], padding_side="left")
    tokenizer.pad_token = tokenizer.mask_token
    count, clock, truncate = len(work["prompts"]), Clock(), ppo_trainer.truncate_response
    tokens = count * work["length"]

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            clock.start()

        def on_step_end(self, args, state, control, **_):
            clock.stop(tokens, state.log_history[-1])
            clock.start()

    def counting(*arguments):
        """Counts the tokens up to each response's end."""
        nonlocal tokens
        responses = truncate(*arguments)
        tokens = (responses != tokenizer.pad_token_id).sum().item()
        return responses

    ppo_trainer.truncate_response = counting
    config = PPOConfig(
        output_dir=work["out"], total_episodes=count * work["iterations"], response_length=work["length"],
        # Gradient accumulation would make one update of several minibatches: a device batch is the rollout.
        per_device_train_batch_size=count, gradient_accumulation_steps=1,
        num_mini_batches=work["minibatches"], num_ppo_epochs=work["ppo_epochs"],
        local_rollout_forward_batch_size=count, stop_token_id=work["stop"], temperature=1.0,
        kl_coef=work["beta"], learning_rate=work["rate"], bf16=False, use_cpu=True,
        gradient_checkpointing=False, num_sample_generations=0, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    # PPOTrainer gives its precision to nobody: with bf16=True it computes in float32, as here in both.
    dtype, lm = getattr(torch, work["precision"]), transformers.AutoModelForCausalLM
    scorer = transformers.AutoModelForSequenceClassification
    PPOTrainer(
        args=config, processing_class=tokenizer, callbacks=[Turns()],
        model=lm.from_pretrained(work["init"], dtype=dtype),
        ref_model=lm.from_pretrained(work["init"], dtype=dtype),
        reward_model=scorer.from_pretrained(work["reward"], dtype=dtype),
        value_model=scorer.from_pretrained(work["reward"], dtype=dtype),
        train_dataset=Dataset.from_dict({"input_ids": work["prompts"]}),
    ).train()  # fmt: skip


# ---- The two in turn


def inputs_of(init: Path) -> tuple[list[list[int]], int]:
    """The prompts that rlhf.py takes, as tokens, and the token that ends a response."""
    import rlhf
    from minillm.chat import ChatTemplate, with_chat_template
    from minillm.io.huggingface import load_model

    model, tokenizer = load_model(init, torch.device("cpu"), torch.float32)
    template = ChatTemplate(with_chat_template(tokenizer))
    prompts = [template.prompt(one.messages) for one in rlhf.world_prompts(0, "reward", RESPONSES)]
    if max(map(len, prompts)) > model.config.max_position_embeddings - max(LENGTHS.values()):
        raise SystemExit("some prompts leave no room for a response; give a model with longer rows")
    return prompts, template.stop_ids[0]


def compare(pythons: dict[str, str], work: dict[str, Any], runs: int) -> dict[str, Any]:
    """Medians over the counted iterations, in tokens of responses a second."""
    processes: dict[str, subprocess.Popen[str]] = {}

    def iterate(name: str, number: int) -> dict[str, float]:
        pipe = processes[name]
        assert pipe.stdin and pipe.stdout
        pipe.stdin.write("\n")
        pipe.stdin.flush()
        if not (line := pipe.stdout.readline()):
            raise SystemExit(f"{Path(folder, name + '.log').read_text()[-2000:]}\n{name} has died")
        return json.loads(line)

    with tempfile.TemporaryDirectory() as folder:
        for name, python in pythons.items():
            own = json.dumps({**work, "side": name, "out": f"{folder}/{name}"})
            with open(f"{folder}/{name}.log", "w") as log:
                processes[name] = subprocess.Popen(
                    [python, __file__, own],
                    text=True,
                    stderr=log,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
        iterations = in_turn({name: partial(iterate, name) for name in pythons}, runs)
        for process in processes.values():
            process.kill()  # before what comes at a run's end, which is not compared
            process.wait()
    rates = medians({
        name: [line["tokens"] / line["seconds"] for line in lines[1:]] for name, lines in iterations.items()
    })  # fmt: skip
    return {"tokens_per_second": rates, "ratio": rates["minillm"] / rates["TRL"], "iterations": iterations}


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
    work = WORK | {"threads": arguments.threads, "init": str(arguments.init), "reward": str(arguments.reward)}
    pythons, results = {"minillm": sys.executable, "TRL": arguments.peer_python}, []
    print(f"{arguments.threads} threads\nlengths  precision  minillm tok/s  TRL tok/s  ratio")
    for kind, length in LENGTHS.items():
        for precision in ("float32", "bfloat16"):
            setting = {"precision": precision, "length": length, "stop": end if kind == "ending" else None}
            found = compare(pythons, {**work, **setting, "prompts": prompts}, arguments.runs)
            ours, theirs = found["tokens_per_second"].values()
            print(f"{kind:7}  {precision:9}  {ours:13.0f}  {theirs:9.0f}  {found['ratio']:5.2f}", flush=True)
            results.append({"lengths": kind, **setting, **found})
    write(arguments.json, {"peer": peer, "responses": RESPONSES, **work, "results": results})


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        task = json.loads(sys.argv[1])
        torch.set_num_threads(task["threads"])
        with redirect_stdout(sys.stderr):  # where a run shows how it goes
            {"minillm": minillm_side, "TRL": trl_side}[task["side"]](task)
    else:
        main()
