"""Pretraining: raw text → a base model that predicts the next token.

    python train.py                                       the embedded little world, 3 minutes on 2 cores
    python train.py --data books=../books:2 notes.jsonl   your own text, each source with a weight
    python train.py --data 'src/**/*.c' --val-data held_out.txt      files by a glob, validation of your own
    python train.py --init out/base --data notes.txt --out out/notes     start from a model
    python train.py --resume                              go on after Ctrl-C, a crash or a kill
    torchrun --nproc-per-node 2 train.py                  several processes, the same curve
    torchrun --nproc-per-node 8 train.py --shard          each with a part of the model (docs/scale.md)

Reads top to bottom: the options (the rest, and types such as Count, are in minillm/options.py), then `train`
with its loop, then what that calls. Leaves a run folder (minillm/run.py), which transformers can open too,
with the model of the lowest validation loss.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

import torch

from minillm.corpus import Source, document_marks, text_sample, tokenize
from minillm.data import IGNORED, Mixture, mask_tokens, validation_batches
from minillm.errors import InputError
from minillm.generate import SamplingOptions, generate
from minillm.io.huggingface import config_from_json, load_model, save_model
from minillm.model import LanguageModel, ModelConfig, config_of_depth, initialize
from minillm.optim import LearningRates, backward, build_optimizers, lr_schedule, validation_loss
from minillm.options import Count, DataOptions, Fraction, Length, Positive, Whole
from minillm.run import Run, Runtime, TrainingState, run_script
from minillm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options(DataOptions):
    """Train a base model on raw text."""

    data: tuple[str, ...] = ()
    """Text: files, folders or globs of text, JSON, CSV or Parquet (minillm/io/text.py), each as PATH,
    PATH:WEIGHT or NAME=PATH:WEIGHT. Nothing: the embedded little world."""
    val_data: tuple[str, ...] = ()
    """Text to validate on, given in the same way. Nothing: a share of --data, see --val-fraction."""
    val_fraction: Fraction = 0.05
    """Share of the documents (of each, where they are few) held out for validation; more than 0."""
    out: str = "out/base"
    """The run folder."""
    init: str | None = None
    """Start from this run or Hugging Face folder (Llama, Qwen, Mistral), with its tokenizer; --block-size may
    exceed the length that it was trained on."""

    depth: Count | None = None
    """Blocks: the one dial; every value below that says "by depth" follows from it. Default 4."""
    width: Count | None = None
    """Width of the residual stream. By depth: 32 per block."""
    heads: Count | None = None
    """Query heads. By depth: so that a head is 32, 64 or 128 wide."""
    kv_heads: Count | None = None
    """Key/value heads, a divisor of the heads. By depth: as many as heads."""
    qk_norm: bool | None = None
    """Normalise queries and keys (the Qwen3 layout) or not (Llama's). Default True."""
    tie_embeddings: bool | None = None
    """Use the embedding as output matrix too. Default False."""
    vocab_size: Count | None = None
    """Entries of the tokenizer trained on the text: 256 bytes, merges, specials. By depth: 512 per
    block."""
    objective: Literal["causal", "masked"] = "causal"
    """Predict the next token, or (BERT) masked tokens from both sides; the second cannot generate."""

    block_size: Length = 128
    """Tokens in a row, the longest context seen in training."""
    batch_tokens: Count | None = None
    """Tokens in a step, over all processes. By depth: 1,024 at 4, growing with its cube."""
    steps: Count | None = None
    """Updates. By depth: 450 per block."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices and AdamW for the rest, or AdamW for everything."""
    matrix_rate: Positive | None = None
    """Learning rate of the block matrices. Default 0.03 for Muon, 5e-3 · (128/width) for AdamW."""
    embedding_rate: Positive | None = None
    """Learning rate of embedding and output matrix. By depth: 0.02 · (128/width)^0.5."""

    compile: bool | None = None
    """Compile the model by torch.compile. Default where CUDA and Triton are there."""
    samples: Whole = 4
    """Texts sampled at the end."""


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
    from minillm.io.text import open_sources, text_sources
    from minillm.tools.sources import pretraining_lines

    run = Run("train", options, runtime)
    file_options = options.errors, options.encoding, options.field
    sources = text_sources(options.data, options.seed, options.world_megabytes, *file_options)
    val_sources = open_sources(options.val_data, *file_options) if options.val_data else []
    model, tokenizer = start_model(options, sources, run.folder if run.resuming else None, runtime)
    cache, val_fraction = Path(options.cache), 0.0 if val_sources else options.val_fraction
    tokenized = [tokenize(source, tokenizer, cache, val_fraction, options.workers) for source in sources]
    val_tokenized = [tokenize(source, tokenizer, cache, 1.0, options.workers) for source in val_sources]
    steps, rows, rates = plan_of(options, model.config, runtime)
    masked = options.objective == "masked"
    validation = validation_batches(val_tokenized or tokenized, options.block_size, options.val_tokens)
    if masked:  # the same tokens are hidden at every validation
        validation = [mask_tokens(batch, tokenizer, seed=i) for i, batch in enumerate(validation)]
    token_bytes = torch.from_numpy(tokenizer.token_lengths)
    mixture = Mixture(tokenized, options.block_size, options.seed)
    forward = runtime.wrap(model, options.compile)
    state = TrainingState(model, build_optimizers(model, rates, options.optimizer), mixture)
    state.held_out = " ".join(source.fingerprint for source in val_tokenized)
    best = math.inf  # the lowest validation loss so far; the run folder holds the model that had it

    def save() -> None:
        if best == math.inf:  # until the first validation the newest model is kept
            save_model(run.folder, model, tokenizer)

    with run.training(state, steps, save):
        if run.already_finished():
            return
        best = min((e["nats_per_byte"] for e in run.logged if e["event"] == "val"), default=best)
        shape = f"{steps:,} steps of {rows} rows of {options.block_size} tokens"
        run.say(pretraining_lines(model, tokenizer, tokenized, val_tokenized, options.vocab_size, shape))
        while run.goes_on():
            batch = mixture.next_rows(rows)  # the same in every process
            if masked:
                batch = mask_tokens(batch, tokenizer, seed=((options.seed << 32) + state.step) % 2**64)
            mean = backward(forward, batch, options.micro_tokens, runtime)  # on the device: step reads it
            multiplier = lr_schedule(state.step, steps, options.warmup, options.decay)
            norm, loss = state.optimizers.step(multiplier, options.clip, mean)

            targets = batch.targets[batch.targets != IGNORED]
            per_byte = loss * len(targets) / max(1, int(token_bytes[targets].sum()))
            run.log_step(  # and counts it
                batch.tokens.numel(), loss=loss, gradient_norm=norm, nats_per_byte=per_byte, rate=multiplier
            )
            if state.step % run.val_every == 0 or state.step == steps:
                val = validation_loss(model, validation, token_bytes, runtime).per_byte
                run.log("val", f"val {val:.3f} nats/byte", nats_per_byte=val)
                run.say(f"step {state.step:,}: loss {loss:.3f}, val {val:.4f} nats/byte")
                if val <= best:
                    best = val
                    save_model(run.folder, model, tokenizer)
        run.end()
        if runtime.is_main:
            finish(run, best, mixture, options)


# Before the loop


def plan_of(options: Options, config: ModelConfig, runtime: Runtime) -> tuple[int, int, LearningRates]:
    """(steps, rows of a step, rates), as given or as they follow from --depth: a deeper model takes more
    steps, larger batches, smaller rates.

    batch = 1024 · (depth/4)^3 tokens, rounded to a power of two; steps = 450 · depth. Muon's updates have a
    fixed spectral norm, so its rate does not depend on the width; AdamW's rates fall with the root of the
    width (embeddings) or with the width (matrices, as in muP: Yang et al. 2022, arXiv 2203.03466).
    """
    depth, width = config.num_hidden_layers, config.hidden_size
    steps = options.steps or 450 * depth
    tokens = options.batch_tokens or 2 ** round(math.log2(1024 * (depth / 4) ** 3))
    rates = LearningRates(
        matrix=options.matrix_rate or (0.03 if options.optimizer == "muon" else 5e-3 * 128 / width),
        embedding=options.embedding_rate or 0.02 * (128 / width) ** 0.5,
        weight_decay=options.weight_decay,
        norm=0.01,
    )
    return steps, runtime.rows_of_step("--batch-tokens", tokens, options.block_size), rates


def start_model(
    options: Options, sources: list[Source], resumed: Path | None, runtime: Runtime
) -> tuple[LanguageModel, Tokenizer]:
    """The model of an earlier folder, or a new one with a tokenizer trained on the text."""
    from minillm.tools.device import check_memory

    if resumed:
        return load_model(resumed, runtime.opens_on, runtime.dtype)
    if options.init:
        folder = Path(options.init)
        check_initial_model(folder, config_from_json(folder / "config.json"), options)
        model, tokenizer = load_model(folder, runtime.opens_on, runtime.dtype)
        longest = max(options.block_size, model.config.max_position_embeddings)
        # Rotary positions exist for any length; how to use those beyond the old longest one is learned.
        model.config = replace(model.config, max_position_embeddings=longest)
        return model, tokenizer
    depth = options.depth or 4
    sample = text_sample(sources, 0.0 if options.val_data else options.val_fraction)
    tokenizer = Tokenizer.train(sample, options.vocab_size or 512 * depth)
    shape = {name: getattr(options, flag) for flag, name in SHAPE.items()}
    config = config_of_depth(depth, tokenizer.vocab_size, options.block_size, **shape)
    check_memory(config)
    model = LanguageModel(replace(config, causal=options.objective == "causal"), runtime.dtype)
    initialize(model, torch.Generator().manual_seed(options.seed))
    return model.to(runtime.opens_on), tokenizer


def check_initial_model(folder: Path, config: ModelConfig, options: Options) -> None:
    """Refuses options that ask for another model than the one of --init."""
    for flag in ("depth", "vocab_size", *SHAPE):
        if getattr(options, flag) is not None:
            name = flag.replace("_", "-")
            raise InputError(f"--init {folder} sets the shape of the model: leave out --{name}")
    if config.causal != (options.objective == "causal"):
        raise InputError(f"--init {folder} was trained with another objective than {options.objective}")


# After the loop


def finish(run: Run, best: float, mixture: Mixture, options: Options) -> None:
    """The plot, samples of the model that was kept, and the last line of metrics.jsonl."""
    from minillm.tools.plots import plot_loss
    from minillm.tools.sources import tell_shares

    sources = tell_shares(run.say, mixture)
    if best < run.metric("val", "nats_per_byte"):
        run.say(f"validation rose after its lowest, {best:.4f} nats/byte: the model of that step is kept")
    plot_loss(run.folder, "nats_per_byte", "nats per byte")
    if options.objective == "causal" and options.samples:
        write_samples(run, *load_model(run.folder, run.runtime.device, run.runtime.dtype), options)
    run.finish(val_nats_per_byte=best, sources=sources)


def write_samples(run: Run, model: LanguageModel, tokenizer: Tokenizer, options: Options) -> None:
    """A few texts sampled from the document token alone, on the screen and in samples.txt."""
    from minillm.io.disk import write_text

    bos, eos = document_marks(tokenizer)
    sampling = SamplingOptions(max_new_tokens=options.block_size - 1, temperature=0.8, stop_ids=(eos,))
    seeds = [options.seed + i for i in range(options.samples)]
    samples = generate(model, [[bos]] * options.samples, sampling, seeds)
    texts = [tokenizer.decode(i for i in response if i != eos).strip() for response in samples.responses]
    content = "\n\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts))
    write_text(run.folder / "samples.txt", content + "\n")
    run.say(content)


def main(arguments: list[str]) -> None:
    run_script(Options, train, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
