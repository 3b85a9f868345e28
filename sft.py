"""Supervised fine-tuning: a base model and conversations → an assistant.

    python sft.py                                    out/base → out/sft: the little world, a minute on 2 cores
    python sft.py --data chats.jsonl alpaca.json:0.5 --init out/mine --out out/helper    your conversations
    python sft.py --data chats.jsonl --text ../books --text-share 0.3    and raw text, against forgetting
    python sft.py --resume                           go on after Ctrl-C, a crash or a kill
    torchrun --nproc-per-node 2 sft.py               several processes, the same curve
    python -m minillm.chat out/sft                   talk with it

The model sees whole conversations and learns to produce what the assistant says in them, and the end of
each reply; nothing else is a target. A share of the rows is raw text, all of it target, as in pretraining:
without it, what pretraining taught is soon forgotten.

Reads top to bottom like train.py, whose frame, batches and loss it shares. Left out: LoRA.
Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5; the share of pretraining text as
in its PPO-ptx.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

import torch

from minillm.chat import ChatTemplate, with_chat_template
from minillm.corpus import Source, encode_source, tokenize
from minillm.data import EncodedSource, Mixture, RowSource, TokenizedSource, validation_batches
from minillm.errors import InputError
from minillm.io.huggingface import load_causal_model, save_model
from minillm.model import LanguageModel
from minillm.optim import LearningRates, backward, build_optimizers, lr_schedule, validation_loss
from minillm.options import Count, DataOptions, Length, Part, Positive, Whole
from minillm.preferences import ChatModel
from minillm.run import Run, Runtime, TrainingState, run_script


@dataclass(frozen=True)
class Options(DataOptions):
    """Fine-tune a base model on conversations."""

    data: tuple[str, ...] = ()
    """Conversations: files, folders or globs of JSON, CSV or Parquet, each as PATH, PATH:WEIGHT or
    NAME=PATH:WEIGHT, in any of the formats of minillm/io/formats.py. Nothing: the little world's."""
    out: str = "out/sft"
    """The run folder."""
    init: str = "out/base"
    """The model to start from: a run or a Hugging Face folder (Llama, Qwen, Mistral)."""
    text: tuple[str, ...] = ()
    """Raw text to mix in, as train.py's --data. Nothing: the little world's if --data is empty, else none."""
    text_share: Part = 0.25
    """Share of the rows that are raw text, where there is some."""

    block_size: Length | None = None
    """Tokens in a row; a longer conversation is cut behind a reply. Default the model's longest, or
    --batch-tokens where that is less."""
    batch_tokens: Count = 1024
    """Tokens in a step, over all processes, padding included."""
    steps: Count = 900
    """Updates."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Muon for the matrices and AdamW for the rest, or AdamW for everything."""
    matrix_rate: Positive = 2e-3
    """Learning rate of the block matrices."""
    embedding_rate: Positive = 6e-3
    """Learning rate of embedding and output matrix: higher, as the control tokens' rows are untrained."""

    eval_prompts: Whole = 48
    """Prompts of each kind on which the little world's rubric judges both models; 0 for none."""
    world_conversations: Count = 16_000
    """Conversations that the little world offers, where they are the data."""


def train(options: Options, runtime: Runtime) -> None:
    """One run, from the conversations to the finished folder."""
    from minillm.tools.sources import conversation_lines

    run = Run("sft", options, runtime)
    chats, texts = open_data(options)
    model, tokenizer = load_causal_model(
        run.folder if run.resuming else Path(options.init), runtime.opens_on, runtime.dtype
    )
    tokenizer, block_size = with_chat_template(tokenizer), block_size_of(options, model)
    rows = runtime.rows_of_step("--batch-tokens", options.batch_tokens, block_size)
    encode = ChatTemplate(tokenizer).encode
    conversations = [encode_source(chat, encode, block_size, options.val_fraction) for chat in chats]
    print(*map(conversation_lines, conversations), sep="\n")
    validation = validation_batches(conversations, block_size, options.val_tokens)
    token_bytes = torch.from_numpy(tokenizer.token_lengths)
    cache, workers = Path(options.cache), options.workers
    text = [tokenize(source, tokenizer, cache, options.val_fraction, workers) for source in texts]
    mixture = Mixture(mixed(conversations, text, options.text_share), block_size, options.seed)
    rates = LearningRates(options.matrix_rate, options.embedding_rate, options.weight_decay)
    forward = runtime.wrap(model)
    state = TrainingState(model, build_optimizers(model, rates, options.optimizer), mixture)

    with run.training(state, options.steps, lambda: save_model(run.folder, model, tokenizer)):
        if run.already_finished():
            return
        while run.goes_on():
            batch = mixture.next_rows(rows)
            mean = backward(forward, batch, options.micro_tokens, runtime)
            multiplier = lr_schedule(state.step, options.steps, options.warmup, options.decay)
            norm, loss = state.optimizers.step(multiplier, options.clip, mean)

            run.log_step(batch.tokens.numel(), loss=loss, gradient_norm=norm, rate=multiplier)
            if validation and (state.step % run.val_every == 0 or state.step == options.steps):
                val = validation_loss(model, validation, token_bytes, runtime).per_target
                run.log("val", f"val {val:.3f} nats/token", loss=val, perplexity=math.exp(val))
        run.end()
        if runtime.is_main:
            finish(run, mixture, options, bool(validation))


# Before the loop


def open_data(options: Options) -> tuple[list[Any], list[Source]]:
    """The conversations to learn from, and the raw text to mix in, from files or the little world."""
    from minillm.io.conversations import open_conversations, world_conversations
    from minillm.io.files import check_names
    from minillm.io.text import text_sources
    from minillm.world import World

    if options.data:
        chats = open_conversations(options.data, "conversation", options.errors, options.encoding)
    else:
        chats = [world_conversations(World(options.seed), "train", options.world_conversations)]
    if options.text and not options.text_share:
        raise InputError("--text-share 0: takes nothing of --text; leave one of the two out")
    with_text = options.text_share and (options.text or not options.data)
    how = options.seed, options.world_megabytes, options.errors, options.encoding, options.field
    texts = text_sources(options.text, *how) if with_text else []
    check_names([source.name for source in chats] + [source.name for source in texts])
    return chats, texts


def mixed(
    conversations: Sequence[EncodedSource], text: Sequence[TokenizedSource], text_share: float
) -> list[RowSource]:
    """All sources, with weights that give the text its share of the rows; ratios within each kind stay."""
    sides = (conversations, 1 - text_share if text else 1.0), (text, text_share)
    return [
        replace(source, weight=source.weight / sum(one.weight for one in side) * share)
        for side, share in sides
        for source in side
    ]


def block_size_of(options: Options, model: LanguageModel) -> int:
    """Tokens in a row: --block-size, or the smaller of the model's context and a step's tokens."""
    longest = model.config.max_position_embeddings
    if options.block_size and options.block_size > longest:
        raise InputError(
            f"--block-size {options.block_size}: {options.init} has {longest} positions; give no more"
        )
    return options.block_size or min(longest, options.batch_tokens)


# After the loop


def finish(run: Run, mixture: Mixture, options: Options, validated: bool) -> None:
    """The rubric's metrics on the little world, the plot, and the last line of metrics.jsonl."""
    from minillm.compare.metrics import world_metrics
    from minillm.tools.measures import table_text
    from minillm.tools.plots import plot_loss
    from minillm.tools.sources import tell_rise, tell_shares
    from minillm.world import World

    metrics = {}
    val_loss, perplexity = (run.metric("val", name) if validated else None for name in ("loss", "perplexity"))
    if options.eval_prompts and not options.data:
        folders, how = (options.init, str(run.folder)), (run.runtime.device, run.runtime.dtype)
        models = [ChatModel(folder, *load_causal_model(Path(folder), *how)) for folder in folders]
        metrics = world_metrics(models, World(options.seed), options.eval_prompts)
        for caption, rows in metrics.items():
            run.say(f"{caption}:\n{table_text(rows)}")
    sources = tell_shares(run.say, mixture)
    if validated:
        tell_rise(run)
    plot_loss(run.folder, "loss", "nats per target")
    run.finish(sources=sources, val_loss=val_loss, val_perplexity=perplexity, metrics=metrics)


def main(arguments: list[str]) -> None:
    run_script(Options, train, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
