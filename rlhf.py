"""Learning from human feedback: an assistant and rankings of its answers → a better assistant.

    python rlhf.py --stage reward                    out/rlhf/rankings.jsonl + out/sft → out/rlhf/reward
    python rlhf.py --stage reward --rankings mine.jsonl theirs.jsonl --init out/helper --out out/better
    python rlhf.py --stage reward --resume           go on after Ctrl-C, a crash or a kill
    torchrun --nproc-per-node 2 rlhf.py --stage reward    several processes, the same curve

Every stage has a folder of its own in --out, and a section of its own below; each reads top to bottom
like train.py and sft.py. Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Literal

import torch

from minillm.checkpoint import TrainingState
from minillm.errors import InputError, one_line_errors
from minillm.huggingface import load_model, load_scalar_model, save_scalar_model
from minillm.metrics import plot_loss
from minillm.model import ScalarModel, scalar_from_language_model
from minillm.optim import Rates, build_optimizers, clip_gradients, rate_multiplier
from minillm.options import TrainingOptions, parse_options
from minillm.preferences import Ranking, read_rankings
from minillm.report import judge, report_card, report_text, unknown_worth, world_worth, write_report
from minillm.reward import (
    EncodedRanking,
    RankingStream,
    center,
    encode_rankings,
    encode_response,
    held_out_rankings,
    ranking_backward,
    split_by_prompt,
)
from minillm.run import Run
from minillm.runtime import Runtime, start_runtime
from minillm.template import ChatTemplate, with_chat_template
from minillm.tokenizer import Tokenizer
from minillm.world import KINDS, World

DEMONSTRATIONS = 512  # that score 0 on average


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Learn from rankings, a stage at a time."""

    stage: Literal["reward"] = field(kw_only=True)
    """What to do."""
    out: str = "out/rlhf"
    """The folder of all stages."""
    init: str = "out/sft"
    """The assistant to start from: a run or a Hugging Face folder (Llama or Qwen3 layout)."""
    rankings: tuple[str, ...] = ()
    """Files of rankings. Nothing: rankings.jsonl in --out."""

    epochs: int = 1
    """Passes over the rankings; more than one soon learns them by heart."""
    batch_rankings: int = 16
    """Rankings in a step, over all processes, each with all of its responses."""
    matrix_rate: float = 2e-3
    """Learning rate of the block matrices, by AdamW."""
    embedding_rate: float = 6e-3
    """Learning rate of the embedding and the scalar head."""
    val_fraction: float = 0.1
    """Share of the prompts held out, for validation and the report."""
    val_rankings: int = 128
    """Held-out rankings of one validation, at most; the report takes all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("epochs", "batch_rankings", "val_rankings")
        self.require_positive("matrix_rate", "embedding_rate")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val-fraction {self.val_fraction}: give a share between 0 and 1")

    @property
    def folder(self) -> Path:
        """The folder of this stage."""
        return Path(self.out) / self.stage


# ---- reward: rankings → a model that scores responses


def train_reward_model(options: Options, runtime: Runtime) -> None:
    """One run, from the rankings to the report."""
    run = Run("reward", options, runtime, "rlhf.py --stage reward")
    rankings = rankings_of(options)
    model, tokenizer = start_reward_model(run, options)
    template = ChatTemplate(tokenizer)
    encoded, skipped = encode_rankings(rankings, template, model.config.max_position_embeddings)
    if not encoded:
        raise InputError(f"no ranking can be used: {', '.join(f'{n} {why}' for why, n in skipped.items())}")
    training, held_out = split_by_prompt(encoded, options.val_fraction)
    stream, steps = RankingStream(training, options.seed), steps_of(training, options, runtime)
    rates = Rates(
        options.matrix_rate, options.embedding_rate, 0.1 * options.matrix_rate, options.weight_decay
    )
    state = TrainingState(model, build_optimizers(model, rates, "adamw"), stream)
    forward = runtime.wrap(model)
    tenth = max(1, steps // 10)

    with run.training(state, steps, lambda: save_scalar_model(run.folder, model, tokenizer)):
        if run.already_finished():
            return
        for reason, count in skipped.items():
            run.metrics.say(f"left out: {count} {reason}")
        while run.goes_on():
            batch = stream.next(options.batch_rankings)
            loss = ranking_backward(forward, batch, options.micro_tokens, runtime)
            gradient_norm = clip_gradients(state.optimizers.parameters(), options.clip)
            run.check_finite(loss=loss, gradient_norm=gradient_norm)
            rate = rate_multiplier(state.step, steps, options.warmup, options.decay)
            state.optimizers.step(rate)

            tokens = sum(len(row) for one in batch for row in one.rows)
            run.log_step(tokens, loss=loss, gradient_norm=gradient_norm, rate=rate)
            if run.due(options.val_every or tenth) or state.step == steps:
                val = held_out_rankings(
                    model, held_out[: options.val_rankings], options.micro_tokens, runtime
                )
                run.log("val", f"val {val.loss:.3f}, {val.accuracy:.1%} in order", **asdict(val))
            if run.due(options.save_every or tenth):
                run.save()
        run.end()
        if runtime.is_main:
            finish_reward_model(run, model, template, training, held_out, options)


def rankings_of(options: Options) -> list[Ranking]:
    """All rankings given; InputError where there are none, or none that prefers anything."""
    files = options.rankings or (str(Path(options.out) / "rankings.jsonl"),)
    rankings = [ranking for file in files for ranking in read_rankings(Path(file))]
    if not any(ranking.pairs() for ranking in rankings):
        what = "every response is tied with all others" if rankings else "no ranking"
        raise InputError(f"{', '.join(files)}: {what}, so there is nothing to learn; rank some responses")
    return rankings


def start_reward_model(run: Run, options: Options) -> tuple[ScalarModel, Tokenizer]:
    """The run's own model, or a new head on the assistant's trunk."""
    device, dtype = run.runtime.device, run.runtime.dtype
    if run.resuming:
        return load_scalar_model(run.folder, device, dtype)
    model, tokenizer = load_model(Path(options.init), device, dtype)
    if not model.config.causal:
        raise InputError(f"--init {options.init}: sees both sides of a token; give a causal model")
    generator = torch.Generator().manual_seed(options.seed)
    return scalar_from_language_model(model, generator), with_chat_template(tokenizer)


def steps_of(training: Sequence[EncodedRanking], options: Options, runtime: Runtime) -> int:
    """The steps in which every ranking is seen `epochs` times; the last is filled from one pass more."""
    if options.batch_rankings % runtime.world:
        raise InputError(
            f"--batch-rankings {options.batch_rankings}: cannot be shared by {runtime.world} processes; "
            f"give a multiple of {runtime.world}"
        )
    return ceil(options.epochs * len(training) / options.batch_rankings)


def finish_reward_model(
    run: Run,
    model: ScalarModel,
    template: ChatTemplate,
    training: Sequence[EncodedRanking],
    held_out: Sequence[EncodedRanking],
    options: Options,
) -> None:
    """The shift to zero, the report, the plots and the last line of metrics.jsonl."""
    rankings = [one.ranking for one in (*training, *held_out)]
    world = World(options.seed) if any(ranking.kind in KINDS for ranking in rankings) else None
    worth = world_worth(world) if world else unknown_worth
    center(model, demonstrations(training, world, template))
    run.save_model()
    judged = judge(model, held_out)
    card = report_card(model, template, judged, rankings, worth)
    write_report(run.folder, card, judged)
    plot_loss(run.folder, "loss", "nats per ranking")
    run.metrics.say(report_text(card))
    state, val = run.state, run.metrics.latest["val"]
    run.metrics.log(
        "final", state.step, seconds=state.seconds, tokens=state.tokens, val_loss=val["loss"],
        accuracy=card["accuracy"]["value"], bias=model.bias.item(),
    )  # fmt: skip


def demonstrations(
    training: Sequence[EncodedRanking], world: World | None, template: ChatTemplate
) -> list[list[int]]:
    """What scores 0 on average: the little world's conversations if the rankings are of its prompts, else
    the best response of each ranking."""
    if world is None:
        return [one.rows[one.ranking.ranking[0][0]] for one in training[:DEMONSTRATIONS]]
    shown = [conversation.messages for conversation in world.conversations("train", DEMONSTRATIONS)]
    return [encode_response(template, messages[:-1], messages[-1]["content"]) for messages in shown]


STAGES = {"reward": train_reward_model}


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        with start_runtime(options.device, options.precision) as runtime:
            STAGES[options.stage](options, runtime)


if __name__ == "__main__":
    main(sys.argv[1:])
