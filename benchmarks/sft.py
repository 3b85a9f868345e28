"""Fine-tuning beside TRL's SFTTrainer: the same model, conversations, optimizer and rates.

    pip install trl                                        (a peer, not a dependency)
    python benchmarks/sft.py --init out/base [--json benchmarks/sft.json]

Both go through the same conversations of the little world as often, with AdamW at one rate, in bfloat16,
and their loss counts what the assistant says alone. TRL pads each batch to its longest conversation (its
packing needs kernels that exist on GPUs only); minillm packs. What counts is the seconds of the training
loop for each token of a conversation, padding not counted, and the held-out loss of both at the end,
measured by the same code. The two take turns; medians.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import ROOT, in_turn, medians, parser, write

from minillm.chat import ChatTemplate, with_chat_template
from minillm.data import encode_source, packed_batches, split_conversations
from minillm.io.conversations import open_conversations, world_conversations
from minillm.io.huggingface import load_model, save_model
from minillm.optim import held_out
from minillm.run import Runtime
from minillm.tools.device import choose_dtype
from minillm.world import World

CONVERSATIONS, EPOCHS, BLOCK, RATE = 2000, 2, 128, 2e-3
VAL_FRACTION = 0.05
ROWS = 16  # of a packed step; TRL's batch has as many conversations as such a step holds on average
CPU = torch.device("cpu")


def write_conversations(every: Path, training: Path) -> None:
    """All conversations, for minillm, and those of them that it trains on, for TRL."""
    source = world_conversations(World(0), "train", CONVERSATIONS)
    with every.open("w") as all_lines, training.open("w") as training_lines:
        for side, conversation in split_conversations(source, VAL_FRACTION):
            line = json.dumps({"messages": conversation}) + "\n"
            all_lines.write(line)
            if side == "train":
                training_lines.write(line)


def run_minillm(init: Path, data: Path, out: Path, steps: int, seed: int) -> float:
    """Seconds in the training loop."""
    options = {
        "--init": init, "--data": data, "--out": out, "--steps": steps, "--batch-tokens": ROWS * BLOCK,
        "--matrix-rate": RATE, "--embedding-rate": RATE, "--optimizer": "adamw", "--warmup": 0, "--decay": 1,
        "--val-every": 10**6, "--save-every": 10**6, "--seed": seed, "--val-fraction": VAL_FRACTION,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    subprocess.run([sys.executable, "sft.py", *words], cwd=ROOT, check=True, capture_output=True)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sum(ROWS * BLOCK / e["tokens_per_second"] for e in events if e["event"] == "train")


def run_trl(init: Path, data: Path, out: Path, batch: int, seed: int) -> float:
    """Seconds in the training loop, in a process of its own."""
    words = [__file__, "--trl", str(init), str(data), str(out), str(batch), str(seed)]
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def trl_process(init: str, data: str, out: str, batch: int, seed: int) -> None:
    """What `run_trl` starts: trains, saves, prints the seconds of the loop."""
    import transformers
    import trl
    from datasets import Dataset

    records = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
    pairs = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in records]
    config = trl.SFTConfig(
        output_dir=f"{out}.trainer", per_device_train_batch_size=batch, num_train_epochs=EPOCHS,
        learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0, adam_beta2=0.95,
        adam_epsilon=1e-10, weight_decay=0.0, bf16=True, use_cpu=True, max_length=BLOCK, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(init),
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=transformers.AutoTokenizer.from_pretrained(init),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(out)
    print(seconds)


def held_out_loss(run: Path) -> float:
    """Nats per token of the assistant's, on conversations of another split."""
    model, tokenizer = load_model(run, CPU, torch.float32)
    source = encode_source(
        world_conversations(World(0), "dev", 400), ChatTemplate(tokenizer).encode, BLOCK, val_fraction=0
    )
    here = Runtime(CPU, torch.float32)
    sizes = torch.from_numpy(tokenizer.token_lengths)
    return held_out(model, packed_batches(source.train, BLOCK), sizes, here).per_target


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--init", type=Path, default=Path("out/base"))
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model, tokenizer = load_model(arguments.init, CPU, choose_dtype(CPU))
        tokenizer = with_chat_template(tokenizer)
        init, data, training = (scratch / name for name in ("init", "every.jsonl", "training.jsonl"))
        save_model(init, model, tokenizer)  # with the chat template, which TRL asks for
        write_conversations(data, training)
        encoded = encode_source(
            open_conversations([str(data)])[0], ChatTemplate(tokenizer).encode, BLOCK, VAL_FRACTION
        )
        tokens = EPOCHS * int(encoded.train.sizes.sum())
        batch = round(ROWS * BLOCK / encoded.train.sizes.mean())
        steps = round(tokens / (ROWS * BLOCK * encoded.rows(BLOCK, 0).fill))

        def measured(name: str, run: Callable[[Path, int], float], seed: int) -> tuple[float, float]:
            """Seconds of the loop, and the held-out loss."""
            out = scratch / f"{name}-{seed}"
            seconds, loss = run(out, seed), held_out_loss(out)
            print(f"{name:8} {seconds:6.1f} s   held-out loss {loss:.3f}", flush=True)
            return seconds, loss

        sides: dict[str, Callable[[Path, int], float]] = {
            "minillm": lambda out, seed: run_minillm(init, data, out, steps, seed),
            "TRL": lambda out, seed: run_trl(init, training, out, batch, seed),
        }
        results = in_turn({name: partial(measured, name, run) for name, run in sides.items()}, arguments.runs)
    seconds = medians({name: [second for second, _ in runs] for name, runs in results.items()})
    ratio = seconds["TRL"] / seconds["minillm"]
    print(f"{tokens:,} tokens; TRL takes {ratio:.2f} times as long for each")
    write(arguments.json, {"results": results, "tokens": tokens, "ratio": ratio, "trl_batch": batch,
                           "rate": RATE, "rows": ROWS, "block": BLOCK, "epochs": EPOCHS})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl_process(*sys.argv[2:5], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
