"""Pretraining: raw text → a base model that predicts the next token.

    python train.py                                       the embedded little world, 3 minutes on 2 cores
    python train.py --data books=../books:2 notes.jsonl   your own text, each source with a weight
    python train.py --init out/base --data notes.txt --out out/notes     go on from a model
    python train.py --resume                              go on after Ctrl-C, a crash or a kill
    torchrun --nproc-per-node 2 train.py                  several processes, the same curve

Reads top to bottom: the options, then `train` with its loop, then the pieces the loop calls.
Leaves a run folder (minillm/run.py) that transformers can open too.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from minillm.errors import end_at_interrupts

    end_at_interrupts()  # before torch, whose import takes seconds

import torch

from minillm.data import (
    Batch,
    Mixture,
    TokenizedSource,
    document_marks,
    mask_tokens,
    source_line,
    split_documents,
    tokenize,
    validation_rows,
)
from minillm.errors import InputError, one_line_errors
from minillm.files import write_text
from minillm.generate import SamplingOptions, generate
from minillm.io.huggingface import config_from_json, load_model, save_model
from minillm.loss import backward, held_out, per_byte
from minillm.model import LanguageModel, ModelConfig, config_of_depth, initialize, parameter_count
from minillm.optim import LearningRates, build_optimizers, clip_gradients, lr_schedule
from minillm.options import DataOptions, parse_options
from minillm.run import Run, Runtime, TrainingState, start_runtime
from minillm.sources import Source, open_sources, world_sources
from minillm.tokenizer import Tokenizer
from minillm.world import World


@dataclass(frozen=True)
class Options(DataOptions):
    """Train a base model on raw text."""

    data: tuple[str, ...] = ()
    """Text: files, folders or globs of .txt, .md, .py, .jsonl(.gz), each as PATH, PATH:WEIGHT or
    NAME=PATH:WEIGHT. Nothing: the embedded little world."""
    out: str = "out/base"
    """The run folder."""
    init: str | None = None
    """Start from this run or Hugging Face folder (Llama or Qwen3 layout), with its tokenizer."""

    depth: int | None = None
    """Blocks: the one dial; every value below that says "by depth" follows from it. Default 4."""
    width: int | None = None
    """Width of the residual stream. By depth: 32 per block."""
    heads: int | None = None
    """Query heads. By depth: so that a head is 32, 64 or 128 wide."""
    kv_heads: int | None = None
    """Key/value heads, a divisor of the heads. By depth: as many as heads."""
    qk_norm: bool | None = None
    """Normalise queries and keys (the Qwen3 layout) or not (Llama's). Default True."""
    tie_embeddings: bool | None = None
    """Use the embedding as output matrix too. Default False."""
    vocab_size: int | None = None
    """Entries of the tokenizer trained on the text: 256 bytes, merges, specials. By depth: 512 per
    block."""
    objective: Literal["causal", "masked"] = "causal"
    """Predict the next token, or (BERT) masked tokens from both sides; the second cannot generate."""

    block_size: int = 128
    """Tokens in a row, the longest context seen in training."""
    batch_tokens: int | None = None
    """Tokens in a step, over all processes. By depth: 1,024 at 4, growing with its cube."""
    steps: int | None = None
    """Updates. By depth: 450 per block."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices and AdamW for the rest, or AdamW for everything."""
    matrix_rate: float | None = None
    """Learning rate of the block matrices. Default 0.03 for Muon, 5e-3 · (128/width) for AdamW."""
    embedding_rate: float | None = None
    """Learning rate of embedding and output matrix. By depth: 0.02 · (128/width)^0.5."""

    samples: int = 4
    """Texts sampled at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("depth", "width", "heads", "kv_heads", "vocab_size", "block_size")
        self.require_counts("batch_tokens", "steps")
        self.require_positive("matrix_rate", "embedding_rate")
        self.require_not_negative("samples")
        if self.block_size < 2:
            raise InputError(f"--block-size {self.block_size}: give at least 2, a token and the next")


SHAPE = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "qk_norm": "qk_norm",
    "tie_embeddings": "tie_word_embeddings",
}
"""Options that set the shape of a new model, and their names in its config."""


def train(options: Options, runtime: Runtime) -> None:
    """One pretraining run, from the text to the finished folder."""
    run = Run("train", options, runtime)
    with runtime.main_first():
        sources = text_sources(options)
        model, tokenizer = start_model(options, sources, run.folder if run.resuming else None, runtime)
        streams = [tokenize(source, tokenizer, Path(options.cache), options.val_fraction, options.workers)
                   for source in sources]  # fmt: skip
    plan = plan_of(options, model, runtime)
    validation = validation_batches(streams, tokenizer, options)
    token_bytes = torch.from_numpy(tokenizer.token_lengths)
    mixture = Mixture(streams, options.block_size, options.seed)
    state = TrainingState(model, build_optimizers(model, plan.rates, options.optimizer), mixture)
    forward = runtime.wrap(model)

    with run.training(state, plan.steps, lambda: save_model(run.folder, model, tokenizer)):
        if run.already_finished():
            return
        while run.goes_on():
            batch = next_batch(mixture, state.step, plan, options, tokenizer)
            loss = backward(forward, batch, options.micro_tokens, runtime)
            gradient_norm = clip_gradients(state.optimizers.parameters(), options.clip)
            run.check_finite(loss=loss, gradient_norm=gradient_norm)
            rate = lr_schedule(state.step, plan.steps, options.warmup, options.decay)
            state.optimizers.step(rate)

            run.log_step(
                batch.tokens.numel(), loss=loss, nats_per_byte=per_byte(loss, batch, token_bytes),
                gradient_norm=gradient_norm, rate=rate,
            )  # fmt: skip
            if run.due(plan.val_every) or state.step == plan.steps:
                val = held_out(model, validation, token_bytes, runtime).per_byte
                run.log("val", f"val {val:.3f} nats/byte", nats_per_byte=val)
            if run.due(plan.save_every):
                run.save()
        run.end()
        if runtime.is_main:
            finish(run, model, mixture, tokenizer, options)


# Before the loop


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that follow from the model's shape unless they are given."""

    steps: int
    rows: int
    """Rows of a step, over all processes."""
    val_every: int
    save_every: int
    rates: LearningRates


def plan_of(options: Options, model: LanguageModel, runtime: Runtime) -> Plan:
    """The rules of the one dial: a deeper model takes more steps, larger batches, smaller rates.

    batch = 1024 · (depth/4)^3 tokens, to a power of two; steps = 450 · depth. Muon's steps have a fixed
    spectral norm, so its rate needs no width; AdamW's fall with the root of the width (embeddings)
    or with the width (matrices).
    """
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    steps = options.steps or 450 * depth
    tokens = options.batch_tokens or 2 ** round(math.log2(1024 * (depth / 4) ** 3))
    rows = runtime.rows_of_step(tokens, options.block_size)
    muon = options.optimizer == "muon"
    rates = LearningRates(
        matrix=options.matrix_rate or (0.03 if muon else 5e-3 * 128 / width),
        embedding=options.embedding_rate or 0.02 * (128 / width) ** 0.5,
        norm=0.01,
        weight_decay=options.weight_decay,
    )
    tenth = max(1, steps // 10)
    return Plan(steps, rows, options.val_every or tenth, options.save_every or tenth, rates)


def text_sources(options: Options) -> list[Source]:
    if options.data:
        return open_sources(options.data, options.errors)
    return world_sources(World(options.seed), options.world_megabytes)


def start_model(
    options: Options, sources: list[Source], resumed: Path | None, runtime: Runtime
) -> tuple[LanguageModel, Tokenizer]:
    """The model of an earlier folder, or a new one with a tokenizer trained on the text."""
    from minillm.tools.device import check_memory

    if resumed:
        return load_model(resumed, runtime.device, runtime.dtype)
    if options.init:
        folder = Path(options.init)
        check_initial_model(folder, config_from_json(folder / "config.json"), options)
        return load_model(folder, runtime.device, runtime.dtype)
    depth = options.depth or 4
    sample = text_sample(sources, options.val_fraction)
    tokenizer = Tokenizer.train(sample, options.vocab_size or 512 * depth)
    if options.vocab_size and runtime.is_main and tokenizer.vocab_size < options.vocab_size:
        print(f"--vocab-size {options.vocab_size:,}: the text gives {tokenizer.vocab_size:,} entries")
    shape = {name: getattr(options, flag) for flag, name in SHAPE.items()}
    config = config_of_depth(depth, tokenizer.vocab_size, options.block_size, **shape)
    check_memory(parameter_count(config))
    model = LanguageModel(replace(config, causal=options.objective == "causal"), runtime.dtype)
    initialize(model, torch.Generator().manual_seed(options.seed))
    return model.to(runtime.device), tokenizer


def check_initial_model(folder: Path, config: ModelConfig, options: Options) -> None:
    """Refuses options that ask for another model than the one of --init."""
    given = [flag for flag in ("depth", "vocab_size", *SHAPE) if getattr(options, flag) is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise InputError(f"--init {folder} sets the shape of the model: leave out --{flag}")
    if config.causal != (options.objective == "causal"):
        raise InputError(f"--init {folder} was trained with another objective than {options.objective}")
    if options.block_size > config.max_position_embeddings:
        raise InputError(
            f"--init {folder} has {config.max_position_embeddings} positions: "
            f"give --block-size no more (now {options.block_size})"
        )


def text_sample(sources: list[Source], val_fraction: float, characters: int = 4_000_000) -> Iterator[str]:
    """Training text from the beginning of every source, each as much as its share, for the tokenizer."""
    total = sum(source.weight for source in sources)
    for source in sources:
        left = round(characters * source.weight / total)
        for side, text in split_documents(source.documents(), val_fraction):
            if side == "train" and left > 0:
                yield text[:left]
                left -= len(text)
            elif left <= 0:
                break


def validation_batches(streams: list[TokenizedSource], tokenizer: Tokenizer, options: Options) -> list[Batch]:
    """The same rows at every validation; for masked tokens, with the same tokens hidden."""
    batches = list(validation_rows(streams, options.block_size, options.val_tokens))
    if options.objective == "causal":
        return batches
    return [hide_tokens(batch, tokenizer, seed=i) for i, batch in enumerate(batches)]


# Inside the loop


def next_batch(mixture: Mixture, step: int, plan: Plan, options: Options, tokenizer: Tokenizer) -> Batch:
    """The rows of one step, the same in every process."""
    batch = mixture.next_rows(plan.rows)
    if options.objective == "causal":
        return batch
    return hide_tokens(batch, tokenizer, seed=((options.seed << 32) + step) % 2**64)


def hide_tokens(batch: Batch, tokenizer: Tokenizer, seed: int) -> Batch:
    """The batch with some tokens masked and only those as targets."""
    if tokenizer.mask_id is None:
        raise InputError(
            "--objective masked: this tokenizer has no <|mask|> token; train one, without --init"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = mask_tokens(
        batch.tokens,
        tokenizer.mask_id,
        tokenizer.vocab_size,
        generator,
        set(tokenizer.special_tokens.values()),
    )
    return replace(batch, tokens=tokens, targets=targets)


# After the loop


def finish(run: Run, model: LanguageModel, mixture: Mixture, tokenizer: Tokenizer, options: Options) -> None:
    """The plot, the samples and, when all is there, the last line of metrics.jsonl."""
    from minillm.tools.plots import plot_loss

    state, metrics = run.state, run.metrics
    sources = mixture.report()
    plot_loss(run.folder, "nats_per_byte", "nats per byte")
    for source in sources:
        metrics.say(source_line(source))
    if model.config.causal and options.samples:
        write_samples(run, model, tokenizer, options)
    metrics.log(
        "final", state.step, seconds=state.seconds, tokens=state.tokens,
        val_nats_per_byte=metrics.figure("val", "nats_per_byte"), sources=sources,
    )  # fmt: skip


def write_samples(run: Run, model: LanguageModel, tokenizer: Tokenizer, options: Options) -> None:
    """A few texts from nothing but a document's beginning, on the screen and in samples.txt."""
    bos, eos = document_marks(tokenizer)
    sampling = SamplingOptions(max_new_tokens=options.block_size - 1, temperature=0.8, stop_ids=(eos,))
    seeds = [options.seed + i for i in range(options.samples)]
    samples = generate(model, [[bos]] * options.samples, sampling, seeds)
    texts = [
        tokenizer.decode(token for token in response if token != eos).strip()
        for response in samples.responses()
    ]
    content = "\n\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts))
    write_text(run.folder / "samples.txt", content + "\n")
    run.metrics.say(content)


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        with start_runtime(options.device, options.precision) as runtime:
            train(options, runtime)


if __name__ == "__main__":
    main(sys.argv[1:])
