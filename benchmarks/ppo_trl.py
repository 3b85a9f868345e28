"""TRL's side of ppo.py: its PPOTrainer, which makes an iteration whenever it is sent a line.

Run by ppo.py with an interpreter that has TRL; it imports nothing of this repository. After each iteration
it writes a line: its seconds, how many tokens were sampled, and the figures that TRL logs of it.
"""

import contextlib
import json
import sys
import time

import torch
import transformers
import trl.experimental.ppo.ppo_trainer as ppo_trainer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Turns(transformers.TrainerCallback):
    """Stops the clock, and the loop, between two iterations; counts the tokens up to each response's end."""

    def __init__(self, full: int, pad: int) -> None:
        self.tokens, self.pad, self.truncate = full, pad, ppo_trainer.truncate_response

    def truncate_response(self, *arguments):
        responses = self.truncate(*arguments)
        self.tokens = (responses != self.pad).sum().item()
        return responses

    def on_train_begin(self, args, state, control, **_):
        self.wait()

    def on_step_end(self, args, state, control, **_):
        seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu_began
        line = {"seconds": seconds, "cpu_seconds": cpu, "tokens": self.tokens, **state.log_history[-1]}
        print(json.dumps(line), file=sys.__stdout__, flush=True)
        if state.global_step < state.max_steps:
            self.wait()

    def wait(self) -> None:
        sys.stdin.readline()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()


def train(work: dict) -> None:
    """Iterations over the same prompts, forever as many as there are."""
    torch.set_num_threads(work["threads"])
    tokenizer = AutoTokenizer.from_pretrained(work["init"], padding_side="left")
    # TRL takes every pad token for padding, and <|endoftext|>, which pads elsewhere, begins each prompt.
    tokenizer.pad_token = tokenizer.mask_token
    # PPOTrainer gives its precision to nobody: with bf16=True it computes in float32, as here in both.
    dtype = getattr(torch, work["precision"])
    policy, ref = (AutoModelForCausalLM.from_pretrained(work["init"], dtype=dtype) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(work["reward"], dtype=dtype) for _ in range(2)
    )
    count = len(work["prompts"])
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
    turns = Turns(count * work["length"], tokenizer.pad_token_id)
    ppo_trainer.truncate_response = turns.truncate_response
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=ref, reward_model=reward,
        value_model=value, train_dataset=Dataset.from_dict({"input_ids": work["prompts"]}),
        callbacks=[turns],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # where TRL prints its figures
        train(json.loads(sys.argv[1]))
