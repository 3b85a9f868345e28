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
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from harness import in_turn, medians, parser, peer, script, write

from minillm.chat import ChatTemplate, with_chat_template
from minillm.data import encode_source, positions, split_conversations, validation_batches
from minillm.io.conversations import open_conversations, world_conversations
from minillm.io.huggingface import load_model, save_model
from minillm.optim import held_out
from minillm.run import Runtime
from minillm.tools.device import choose_dtype
from minillm.tools.folder import read_metrics
from minillm.world import World

CONVERSATIONS, EPOCHS, BLOCK, RATE = 2000, 2, 128, 2e-3
VAL_FRACTION = 0.05
ROWS = 16  # of a packed step; TRL's batch has as many conversations as such a step holds on average
CPU = torch.device("cpu")
GET_TRL = "pip install trl"


def run_minillm(init: Path, data: Path, out: Path, steps: int, seed: int) -> float:
    """Seconds in the training loop."""
    script(
        "sft.py", "--init", init, "--data", data, "--out", out, "--steps", steps, "--seed", seed,
        "--batch-tokens", ROWS * BLOCK, "--matrix-rate", RATE, "--embedding-rate", RATE, "--warmup", 0,
        "--optimizer", "adamw", "--decay", 1, "--val-every", 10**6, "--save-every", 10**6,
        "--val-fraction", VAL_FRACTION,
    )  # fmt: skip
    steps_of = [event for event in read_metrics(out) if event["event"] == "train"]
    return sum(ROWS * BLOCK / event["tokens_per_second"] for event in steps_of)


def run_trl(init: Path, data: Path, out: Path, batch: int, seed: int) -> float:
    """Seconds in the training loop, in a process of its own, which leaves them beside the model."""
    script(__file__, "--trl", init, data, out, batch, seed)
    return float((out / "seconds").read_text())


def trl_process(init: str, data: str, out: str, batch: str, seed: str) -> None:
    trl, transformers = peer("trl", GET_TRL), peer("transformers", GET_TRL)
    records = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
    pairs = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in records]
    config = trl.SFTConfig(
        output_dir=f"{out}.trainer", per_device_train_batch_size=int(batch), num_train_epochs=EPOCHS,
        learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0, adam_beta2=0.95,
        adam_epsilon=1e-10, weight_decay=0.0, bf16=True, use_cpu=True, max_length=BLOCK, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=int(seed),
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(init), args=config,
        train_dataset=peer("datasets", GET_TRL).Dataset.from_list(pairs),
        processing_class=transformers.AutoTokenizer.from_pretrained(init),
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(out)
    Path(out, "seconds").write_text(str(seconds))


def held_out_loss(run: Path) -> float:
    """Nats per token of the assistant's, on conversations of another split."""
    model, tokenizer = load_model(run, CPU, torch.float32)
    others = world_conversations(World(0), "dev", 400)
    source = encode_source(others, ChatTemplate(tokenizer).encode, BLOCK, 0)
    batches = validation_batches([replace(source, val=source.train)], BLOCK, max_tokens=10**9)
    sizes = torch.from_numpy(tokenizer.token_lengths)
    return held_out(model, batches, sizes, Runtime(CPU, torch.float32)).per_target


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--init", type=Path, default=Path("out/base"))
    arguments = options.parse_args()
    peer("trl", GET_TRL)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        init, data, training = (scratch / name for name in ("init", "every.jsonl", "training.jsonl"))
        model, tokenizer = load_model(arguments.init, CPU, choose_dtype(CPU))
        tokenizer = with_chat_template(tokenizer)
        save_model(init, model, tokenizer)  # with the chat template, which TRL asks for
        # All conversations, for minillm, and those of them that it trains on, for TRL.
        source = world_conversations(World(0), "train", CONVERSATIONS)
        sides = [(side, json.dumps({"messages": said}) + "\n")
                 for side, said in split_conversations(source, VAL_FRACTION)]  # fmt: skip
        data.write_text("".join(line for _, line in sides))
        training.write_text("".join(line for side, line in sides if side == "train"))
        opened = open_conversations([str(data)])[0]
        encoded = encode_source(opened, ChatTemplate(tokenizer).encode, BLOCK, VAL_FRACTION)
        sizes = positions(encoded.train)
        tokens, batch = EPOCHS * int(sizes.sum()), round(ROWS * BLOCK / sizes.mean())
        steps = round(EPOCHS * len(encoded.rows(BLOCK, 0).order) / ROWS)

        runs: dict[str, Callable[[Path, int], float]] = {
            "minillm": lambda out, seed: run_minillm(init, data, out, steps, seed),
            "TRL": lambda out, seed: run_trl(init, training, out, batch, seed),
        }

        def side(name: str, seed: int) -> tuple[float, float]:
            """Seconds of the loop, and the held-out loss."""
            out = scratch / f"{name}-{seed}"
            seconds, loss = runs[name](out, seed), held_out_loss(out)
            print(f"{name:8} {seconds:6.1f} s   held-out loss {loss:.3f}", flush=True)
            return seconds, loss

        results = in_turn({name: partial(side, name) for name in runs}, arguments.runs)
    seconds = medians(results)
    ratio = seconds["TRL"] / seconds["minillm"]
    print(f"{tokens:,} tokens; TRL takes {ratio:.2f} times as long for each")
    write(arguments.json, {"results": results, "tokens": tokens, "ratio": ratio, "trl_batch": batch,
                           "rate": RATE, "rows": ROWS, "block": BLOCK, "epochs": EPOCHS})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl_process(*sys.argv[2:])
    else:
        main()
