"""The options that training scripts have in common, and what values an option may have.

A script's options are one frozen dataclass, whose fields are the flags: tools/commandline.py makes one of the
words of the command line, with `--resume` from what run.json holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from minillm.errors import InputError

# ---- What an option may be


@dataclass(frozen=True)
class Limit:
    """Which values an option takes, and the words for refusing others. An option that is None passes."""

    wanted: str
    holds: Callable[[Any], object]


Count = Annotated[int, Limit("at least 1", lambda value: value >= 1)]
Whole = Annotated[int, Limit("at least 0", lambda value: value >= 0)]
Length = Annotated[int, Limit("at least 2, a token and the next", lambda value: value >= 2)]
Seed = Annotated[int, Limit("a number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)]
# Beyond these float32 has no room for a product or a sum.
Real = Annotated[float, Limit("a number from -1e30 to 1e30", lambda value: -1e30 <= value <= 1e30)]
Positive = Annotated[float, Limit("a number from 1e-30 to 1e30", lambda value: 1e-30 <= value <= 1e30)]
NotNegative = Annotated[float, Limit("a number from 0 to 1e30", lambda value: 0 <= value <= 1e30)]
Share = Annotated[float, Limit("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Mass = Annotated[float, Limit("a share above 0 and at most 1", lambda value: 0 < value <= 1)]
Part = Annotated[float, Limit("a share of at least 0 and below 1", lambda value: 0 <= value < 1)]
Fraction = Annotated[float, Limit("a share above 0 and below 1", lambda value: 0 < value < 1)]
Text = Annotated[str, Limit("a text that is not blank", str.strip)]


def check_limits(options: Any) -> None:
    """InputError, by its name, for an option beyond its limit."""
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        marks = [mark for part in (kind, *get_args(kind)) for mark in getattr(part, "__metadata__", ())]
        for limit in marks if value is not None else []:
            if isinstance(limit, Limit) and not limit.holds(value):
                given = f"--{name.replace('_', '-')} {value}".strip()
                raise InputError(f"{given}: give {limit.wanted}")


# ---- What scripts ask for


@dataclass(frozen=True)
class TrainingOptions:
    """The options of every training script; each adds its own, and may set other defaults."""

    out: str
    """The run folder."""
    resume: bool = False
    """Go on with the run in --out, exactly where it stopped."""
    overwrite: bool = False
    """Replace the run in --out."""

    micro_tokens: Count = 8192
    """Tokens in one forward pass of one process; a larger batch is accumulated. Memory grows with them; a CPU
    computes no faster with more."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of the block matrices."""
    warmup: Whole = 20
    """Updates over which the rates rise; 0 for none."""
    decay: Share = 0.5
    """Share of the run, at its end, over which the rates fall towards 0."""
    clip: Positive = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
    val_every: Count | None = None
    """Steps between validations. Default a tenth of the run."""
    save_every: Count | None = None
    """Steps between restart points. Default a tenth of the run."""

    seed: Seed = 0
    """Of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; the weights stay float32. auto: bfloat16 where the hardware has it."""
    shard: bool = False
    """Under torchrun: each process keeps a part of the weights, gradients and optimizer state (docs/scale.md)
    instead of all."""
    checkpoint_activations: bool = False
    """Keep only what enters each block and compute the rest anew in the backward pass: less memory, a third
    more work."""
    cache: str = "out/cache"
    """Where tokenized text is kept between runs."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send the metrics there."""

    free_to_change: ClassVar[frozenset[str]] = frozenset({
        "resume", "overwrite", "out", "device", "shard", "checkpoint_activations", "tracker", "cache",
        "workers", "micro_tokens", "save_every",
    })  # fmt: skip
    """Options that may differ between a run and its continuation: none of them changes what is learned."""

    @property
    def folder(self) -> Path:
        """Where the run is: --out itself, unless a script keeps several runs there."""
        return Path(self.out)

    @property
    def updates_per_step(self) -> int:
        """What --warmup counts, of a step of the run."""
        return 1

    def __post_init__(self) -> None:
        check_limits(self)
        if self.resume and self.overwrite:
            raise InputError("--resume --overwrite: go on with the run or replace it, not both")


@dataclass(frozen=True)
class DataOptions(TrainingOptions):
    """The options of the scripts that train on text or conversations."""

    val_fraction: Part = 0.05
    """Share of the conversations or documents (of each, where they are few) held out for validation."""
    val_tokens: Count = 32_768
    """Tokens of one validation, at most."""
    world_megabytes: Positive = 12.0
    """Size of the little world's text, where that is used."""
    errors: Literal["strict", "replace"] = "strict"
    """Stop at text not in the encoding or a line that does not parse, or replace and skip them, counted."""
    encoding: str = "utf-8"
    """Of the files of text or conversations: utf-8, utf-16, gb18030, shift_jis …"""
    field: tuple[str, ...] | None = None
    """The fields of a JSON record, or columns of a table, of which the first with text is the document.
    Default text and content."""
    workers: Count = 1
    """Processes that tokenize."""

    free_to_change: ClassVar[frozenset[str]] = TrainingOptions.free_to_change | {
        "val_every", "val_tokens", "samples", "eval_prompts",
    }  # fmt: skip


@dataclass(frozen=True)
class PolicyOptions(TrainingOptions):
    """The options for aligning a policy; each names first the algorithms that read it, or policy."""

    algorithm: Literal["ppo", "grpo", "dpo", "best-of-n"] = "ppo"
    """policy: how it learns. best-of-n learns nothing: of --group-size responses the best-scored is given."""
    reward: str | None = None
    """policy: the reward model's folder. Default the one in --out."""
    iterations: Count = 120
    """ppo, grpo: rollouts, each with its updates."""
    rollout_batch: Count = 64
    """ppo, grpo: responses in a rollout, over all processes."""
    group_size: Count | None = None
    """ppo, grpo, best-of-n: responses to a prompt. Default 1 for ppo, else 8."""
    minibatches: Count = 2
    """ppo, grpo: updates in one pass over a rollout."""
    ppo_epochs: Count = 2
    """ppo, grpo: passes over a rollout, at most."""
    target_kl: Positive = 0.05
    """ppo, grpo: no further pass once KL(π_old ‖ π), π_old having sampled, exceeds this, in nats a token."""
    policy_rate: Positive = 5e-4
    """ppo, grpo, dpo: learning rate of the policy's matrices, by AdamW; the critic's are the same."""
    beta: NotNegative = 0.15
    """ppo, grpo, dpo: β, the price of a nat of KL(π ‖ π_ref), both at the temperature sampled at, π after
    top-k and top-p; for dpo the β of its loss, which sets how far it may go."""
    adaptive_kl_target: Positive | None = None
    """ppo, grpo: the KL, nats a response, that β steers to, by at most 2% an iteration. Default: β stays."""
    max_kl: Positive = 200.0
    """ppo, grpo, dpo: nats a response beyond which the run ends, with the best policy so far kept."""
    keep: Literal["best", "last"] = "best"
    """ppo, grpo, dpo: the policy of the highest held-out score - β KL (dpo: lowest loss), or the last."""
    clip_range: Positive = 0.2
    """ppo, grpo: how far from 1 the ratio π/π_old of a token still has a gradient."""
    kl_estimator: Literal["k2", "k3", "exact"] = "k3"
    """grpo: the estimate of the KL in its loss; ppo's rewards use k1."""
    gamma: Share = 1.0
    """ppo: discount of a reward one token later."""
    lam: Share = 0.95
    """ppo: λ of the advantages, from 0 (one step, by the critic) to 1 (the rewards to come)."""
    value_clip: Positive = 0.2
    """ppo: how far a value may move from its old one in a rollout's updates."""
    vf_coef: NotNegative = 0.1
    """ppo: factor of the value loss."""
    critic: Literal["reward", "policy"] = "reward"
    """ppo: what the critic starts as: the reward model, or the policy's trunk with a new head."""
    critic_warmup: Whole = 3
    """ppo: first iterations in which only the critic learns."""
    whiten: bool = True
    """ppo: shift and scale advantages to mean 0 and standard deviation 1."""
    scale_scores: bool = True
    """ppo, grpo: divide scores by the standard deviation of the assistant's own, on held-out prompts."""
    missing_eos_score: Real | None = -1.0
    """policy: score of a response that was cut before its end, in standard deviations from the mean of the
    assistant's own; None for what the reward model says of its text."""
    ptx: NotNegative = 0.0
    """ppo, grpo: factor of the loss on raw text, which is mixed in."""
    ptx_tokens: Count = 1024
    """ppo, grpo: raw text in an update."""
    text: tuple[str, ...] = ()
    """ppo, grpo: raw text for ptx, as train.py's --data. Nothing: the little world's, with its prompts."""
    world_megabytes: Positive = 12.0
    """ppo, grpo: size of the little world's text, where that is used."""
    ema_decay: Share = 0.0
    """ppo, grpo: a moving average of the policy keeps this share of itself an iteration; 0 for no average."""
    val_prompts: Count = 256
    """policy: held-out prompts of one validation, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_kl >= 1:
            raise InputError(
                f"--target-kl {self.target_kl:g}: give nats a token, below 1; for nats a response, which it "
                f"was in the release before, give --adaptive-kl-target {self.target_kl:g}"
            )
        if self.text and not self.ptx:
            raise InputError("--text: is read for --ptx alone; say how much of it, as in --ptx 0.5")
        group = self.responses_per_prompt
        dealt = group * self.minibatches
        if self.algorithm in ("ppo", "grpo") and self.rollout_batch % dealt:
            raise InputError(
                f"--rollout-batch {self.rollout_batch}: cannot be dealt to {self.minibatches} "
                f"--minibatches in groups of {group} (--group-size); give a multiple of {dealt}"
            )
        if self.algorithm in ("grpo", "best-of-n") and group < 2:
            raise InputError(
                f"--group-size {self.group_size}: {self.algorithm} compares responses; give at least 2"
            )

    @property
    def updates_per_step(self) -> int:
        return self.ppo_epochs * self.minibatches if self.algorithm in ("ppo", "grpo") else 1

    @property
    def responses_per_prompt(self) -> int:
        """--group-size, or its default."""
        return self.group_size or (1 if self.algorithm in ("ppo", "dpo") else 8)
