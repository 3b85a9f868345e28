"""Fine-tuning and PPO beside TRL's SFTTrainer and PPOTrainer: the same weights, data, updates and threads.

    pip install trl==1.12.0          (a peer, not a dependency; the last release that has PPOTrainer)
    python benchmarks/beside_trl.py sft [--json benchmarks/sft.json]
    python benchmarks/beside_trl.py ppo [--json benchmarks/ppo.json]

sft: both go through the same conversations of the little world as often, with AdamW at one rate, in bfloat16,
and their loss counts what the assistant says alone. TRL pads each batch to its longest conversation (its
packing needs kernels that exist on GPUs only); minillm packs. What counts is the seconds of the training
loop, and the held-out loss of both at the end, measured by the same code.

ppo: an iteration is 64 responses to the same 64 prompts, which end at their end token or after 64 tokens,
scored by the reference, the reward model and the critic, and then two passes of two updates each of policy
and critic. A run is a few of them, the first not counted. What counts is tokens of responses a second,
padding not counted. The rate is so small that the policy stays what it was, so that both sample from one
distribution. Not the same: minillm computes the old log-probabilities, and the exact KL to the reference, in
a forward pass of the policy, where TRL takes those of its sampler; it clips the gradient, TRL does not. TRL
pads every response to the longest, before the prompt and behind the end, and computes the logits of prompts
too. In bfloat16 its weights are that, which is its fastest; ours stay float32.
"""

import json
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
import trl
import trl.experimental.ppo.ppo_trainer as ppo_trainer
from datasets import Dataset
from harness import Side, parser, race, seconds, write

from minillm.chat import ChatTemplate, with_chat_template
from minillm.data import encode_source, positions, validation_batches
from minillm.io.conversations import world_conversations
from minillm.io.huggingface import load_model, save_model
from minillm.optim import held_out
from minillm.run import Runtime
from minillm.tools.ending import one_line_errors
from minillm.tools.folder import read_metrics
from minillm.tools.scripts import script
from minillm.world import World

CPU, WORLD = torch.device("cpu"), World(0)
LM = transformers.AutoModelForCausalLM
SCORER = transformers.AutoModelForSequenceClassification
NEVER = ["--val-every", 10**6, "--save-every", 10**6]

# ---- Fine-tuning

CONVERSATIONS, EPOCHS, BLOCK, RATE = 2000, 2, 128, 2e-3
ROWS = 16  # of a packed step; TRL's batch has as many conversations as such a step holds on average


def sft_sides(init: Path, scratch: Path) -> dict[str, Side]:
    """Seconds of the loop, and nats per token of the assistant's on conversations of another split."""
    model, tokenizer = load_model(init, CPU, torch.float32)
    tokenizer, shared, data = with_chat_template(tokenizer), scratch / "init", scratch / "said.jsonl"
    save_model(shared, model, tokenizer)  # with the chat template, which TRL asks for
    source = world_conversations(WORLD, "train", CONVERSATIONS)
    said = [*source.conversations()]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    pairs = Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in said])
    encode = ChatTemplate(tokenizer).encode
    training = encode_source(source, encode, BLOCK, 0)
    others = encode_source(world_conversations(WORLD, "dev", 400), encode, BLOCK, 1)  # all held out
    batch = round(ROWS * BLOCK / positions(training.train).mean())
    steps = round(EPOCHS * len(training.rows(BLOCK, 0).order) / ROWS)

    def figures(out: Path, taken: float) -> dict[str, float]:
        trained, _ = load_model(out, CPU, torch.float32)
        sizes = torch.from_numpy(tokenizer.token_lengths)
        batches = validation_batches([others], BLOCK, max_tokens=10**9)
        loss = held_out(trained, batches, sizes, Runtime(CPU, torch.float32)).per_target
        return {"s": taken, "held-out loss": loss}

    def ours(seed: int) -> dict[str, float]:
        out = scratch / f"minillm-{seed}"
        script(
            "sft.py", "--init", shared, "--data", data, "--out", out, "--steps", steps, "--seed", seed,
            *NEVER, "--block-size", BLOCK, "--batch-tokens", ROWS * BLOCK, "--optimizer", "adamw",
            "--warmup", 0, "--matrix-rate", RATE, "--embedding-rate", RATE, "--decay", 1, "--val-fraction", 0,
        )  # fmt: skip
        speeds = [event["tokens_per_second"] for event in read_metrics(out) if event["event"] == "train"]
        return figures(out, sum(ROWS * BLOCK / speed for speed in speeds))

    def theirs(seed: int) -> dict[str, float]:
        out = scratch / f"TRL-{seed}"
        config = trl.SFTConfig(
            output_dir=str(out), per_device_train_batch_size=batch, num_train_epochs=EPOCHS, seed=seed,
            learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0,
            adam_beta2=0.95, adam_epsilon=1e-10, weight_decay=0.0, bf16=True, use_cpu=True, max_length=BLOCK,
            gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        tokens = transformers.AutoTokenizer.from_pretrained(shared)
        begun = LM.from_pretrained(shared)
        trainer = trl.SFTTrainer(begun, args=config, train_dataset=pairs, processing_class=tokens)
        taken = seconds(trainer.train)
        trainer.save_model(str(out))
        return figures(out, taken)

    return {"minillm": ours, "TRL": theirs}


# ---- PPO

RESPONSES, LENGTH, ITERATIONS, MINIBATCHES, PASSES, BETA, POLICY_RATE = 64, 64, 4, 2, 2, 0.1, 1e-7


def ppo_sides(init: Path, reward: Path, scratch: Path, precision: str) -> dict[str, Side]:
    """Tokens of responses a second, in the median iteration of a run."""
    template = ChatTemplate(with_chat_template(load_model(init, CPU, torch.float32)[1]))
    prompts = [template.prompt(prompt.messages) for prompt in WORLD.prompts("reward", n=RESPONSES)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(init, padding_side="left")
    tokenizer.pad_token = tokenizer.mask_token  # which pads prompts, for <|endoftext|> begins them
    truncate = ppo_trainer.truncate_response

    def ours(number: int) -> dict[str, float]:
        out = scratch / f"minillm-{number}"
        script(
            "rlhf.py", "--stage", "policy", "--init", init, "--reward", reward, "--out", out, *NEVER,
            "--iterations", ITERATIONS, "--minibatches", MINIBATCHES, "--ppo-epochs", PASSES, "--beta", BETA,
            "--device", "cpu", "--precision", precision, "--policy-rate", POLICY_RATE,
            "--prompts", RESPONSES, "--rollout-batch", RESPONSES, "--max-new-tokens", LENGTH,
            "--critic-warmup", 0, "--missing-eos-score", None, "--val-prompts", 1,
        )  # fmt: skip
        steps = [event for event in read_metrics(out / "ppo") if event["event"] == "train"]
        return {"tokens/s": median(event["tokens_per_second"] for event in steps[1:])}

    def theirs(number: int) -> dict[str, float]:
        counts, times = list[int](), list[float]()

        def counting(*arguments: Any) -> Any:
            """Counts the tokens up to each response's end."""
            responses = truncate(*arguments)
            counts.append(int((responses != tokenizer.pad_token_id).sum()))
            return responses

        class Clock(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                times.append(perf_counter())

            on_step_end = on_train_begin

        config = ppo_trainer.PPOConfig(
            output_dir=str(scratch / f"TRL-{number}"), total_episodes=RESPONSES * ITERATIONS,
            # Gradient accumulation would make one update of several minibatches: a batch is the rollout.
            per_device_train_batch_size=RESPONSES, gradient_accumulation_steps=1,
            num_mini_batches=MINIBATCHES, num_ppo_epochs=PASSES, response_length=LENGTH,
            local_rollout_forward_batch_size=RESPONSES, stop_token_id=template.stop_ids[0], temperature=1.0,
            kl_coef=BETA, learning_rate=POLICY_RATE, bf16=False, use_cpu=True, report_to=[],
            gradient_checkpointing=False, num_sample_generations=0, save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        # PPOTrainer gives its precision to nobody: with bf16=True it computes in float32, as here in both.
        lm, scorer = (partial(kind.from_pretrained, dtype=getattr(torch, precision)) for kind in (LM, SCORER))
        ppo_trainer.truncate_response = counting
        ppo_trainer.PPOTrainer(
            args=config, processing_class=tokenizer, callbacks=[Clock()], model=lm(init), ref_model=lm(init),
            reward_model=scorer(reward), value_model=scorer(reward),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        ).train()  # fmt: skip
        spans = zip(counts, pairwise(times), strict=True)
        return {"tokens/s": median([count / (end - begin) for count, (begin, end) in spans][1:])}

    return {"minillm": ours, "TRL": theirs}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("what", choices=("sft", "ppo"))
    options.add_argument("--init", type=Path, help="to start from: out/base for sft, out/sft for ppo")
    options.add_argument("--reward", type=Path, default=Path("out/rlhf/reward"))
    arguments = options.parse_args()
    init = (arguments.init or Path("out", "base" if arguments.what == "sft" else "sft")).resolve()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "sft":
            contests = {"bfloat16": sft_sides(init, Path(folder))}
        else:
            kinds, reward = ("float32", "bfloat16"), arguments.reward.resolve()
            contests = {kind: ppo_sides(init, reward, Path(folder, kind), kind) for kind in kinds}
        results = {title: race(title, sides, arguments.runs) for title, sides in contests.items()}
    write(arguments.json, {"trl": trl.__version__, "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    with one_line_errors():
        main()
