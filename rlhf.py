"""Reinforcement learning from human feedback: an assistant → responses → rankings → reward model → policy.

    python rlhf.py --stage sample                          4 responses to each of 7,000 prompts
    python rlhf.py --stage rank                            five simulated people rank them, or
    python rlhf.py --stage rank --annotator person --name Ada          you do, at the terminal, or
    python rlhf.py --stage rank --annotator model --judge out/sft      a model does, by written principles, or
    python rlhf.py --stage rank --annotator file --data hh.jsonl.gz    other people did
    python rlhf.py --stage agreement                       how far they agree
    python rlhf.py --stage reward                          a model that scores as they would, and its report
    python rlhf.py --stage policy                          PPO; --algorithm grpo, dpo or best-of-n instead

    out/sft ──sample──► responses.jsonl ──rank──► rankings.jsonl ──reward──► reward/ ──policy──► ppo/

Each stage reads what the one before it wrote into --out, and has a section of its own below. `--resume`
continues sample, reward or policy after Ctrl-C, a crash or a kill; rank continues by itself where it
stopped, and several annotators may add to one file, one after another. Under torchrun, reward and policy
train in several processes.

Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), sections 3.1 to 3.5; for the policy see
minillm/ppo.py and dpo.py.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

import torch
from tqdm import tqdm

from minillm.chat import ChatTemplate, with_chat_template
from minillm.corpus import split_by_hash, tokenize, unit_hash
from minillm.data import Mixture, Shuffled, seed_of
from minillm.digest import digest
from minillm.dpo import rewards_of
from minillm.errors import InputError
from minillm.generate import SamplingOptions
from minillm.io.huggingface import load_causal_model, load_scalar_model, save_model, save_scalar_model
from minillm.model import scalar_from_language_model
from minillm.optim import LearningRates, build_optimizers, lr_schedule
from minillm.options import Count, Fraction, Mass, NotNegative, PolicyOptions, Positive, Share, Text, Whole
from minillm.ppo import Aligner, adapted_beta
from minillm.preferences import MOST_RESPONSES, ChatModel, Prompt, sample_sets
from minillm.reward import (
    EncodedSet,
    Scores,
    center,
    encode_rankings,
    encode_response,
    held_out_rankings,
    ranking_backward,
    ranking_stream,
    scores_of,
    split_by_prompt,
)
from minillm.run import Run, Runtime, TrainingState, run_script

DEMONSTRATIONS = 512  # how many, at most, set the zero of a reward model's scores
EXTREMES = {"ratio_max": max, "ratio_min": min}  # of an iteration's updates; other metrics are means of them


@dataclass(frozen=True)
class Options(PolicyOptions):
    """Sample responses, have them ranked, learn to score them, align a policy."""

    stage: Literal["sample", "rank", "agreement", "reward", "policy"] = field(kw_only=True)
    """What to do; each stage reads what the one before it left in --out."""
    out: str = "out/rlhf"
    """The folder of responses and rankings; the reward model has one of its own inside."""
    data: tuple[str, ...] = ()
    """sample, policy, rank --annotator file: prompts, or conversations, used without their last reply
    (nothing: the little world's prompts); to rank, what others published (minillm/io/formats.py)."""
    errors: Literal["strict", "replace"] = "strict"
    """Stop at data that is not UTF-8 or does not parse, or replace and skip it, counted."""

    models: tuple[str, ...] = ("out/sft",)
    """sample: the models that respond, in turn: run folders or Hugging Face folders."""
    prompts: Count = 7000
    """sample, policy: how many prompts; of --data at most this many."""
    responses: int = 4
    """sample: K, the responses to a prompt, 2 to 9."""
    distractors: Whole = 1
    """sample: how many of the K are responses to another prompt: without any, the reward model does not learn
    that an answer must fit its question."""
    temperature: Positive = 1.0
    """sample, policy: what the logits are divided by."""
    top_k: Whole = 0
    """sample, policy: sample among this many most probable tokens; 0 for all."""
    top_p: Mass = 1.0
    """sample, policy: sample among the fewest most probable tokens that together reach this probability."""
    max_new_tokens: Count = 64
    """sample, policy: tokens of a response at most."""

    annotator: Literal["person", "simulated", "model", "file"] = "simulated"
    """rank: who ranks."""
    name: Text = "person"
    """rank --annotator person: your name, under which your rankings are kept."""
    annotators: Count = 5
    """rank --annotator simulated: how many people."""
    opinions: Count = 5
    """rank --annotator simulated: how many of them rank each set; more reduce the noise of its labels."""
    noise: NotNegative = 1.0
    """rank --annotator simulated: factor on how far they stray from the rubric; 0 for not at all."""
    judge: str | None = None
    """rank --annotator model: the model that judges, a run folder or a Hugging Face folder."""
    principles: str | None = None
    """rank --annotator model: a text file that says what makes a reply better. Default: minillm's own."""

    init: str = "out/sft"
    """reward, policy: the assistant to start from: a run, or a Hugging Face folder (Llama, Qwen, Mistral)."""
    rankings: tuple[str, ...] = ()
    """reward, policy --algorithm dpo: rankings, ours or anybody's (files, folders or globs). Nothing:
    rankings.jsonl in --out."""

    decay: Share = 1.0
    """reward, policy: share of the run, at its end, over which the rates fall towards 0."""
    new_blocks: Whole = 1
    """reward: new blocks on top of the assistant's, see minillm/reward.py."""
    epochs: Count = 1
    """reward, dpo: passes over the rankings; more than one soon learns them by heart."""
    batch_sets: Count = 16
    """reward, dpo: sets of responses in a step, over all processes, each with all rankings of it."""
    matrix_rate: Positive = 3e-3
    """reward: learning rate of the block matrices, by AdamW."""
    embedding_rate: Positive = 9e-3
    """reward: learning rate of the embedding and the scalar head."""
    val_fraction: Fraction = 0.1
    """reward, policy: share of the prompts held out, for validation and the report; the little world has
    development prompts of its own for a policy."""
    val_sets: Count = 64
    """reward, dpo: held-out sets of one validation, at most; the report takes all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.responses <= MOST_RESPONSES:
            raise InputError(f"--responses {self.responses}: give 2 to {MOST_RESPONSES}")
        if self.distractors >= self.responses:
            raise InputError(f"--distractors {self.distractors}: leave one of {self.responses} responses")
        if not self.models:
            raise InputError("--models: name at least one, as in out/sft")
        if self.stage in ("rank", "agreement") and self.resume:
            raise InputError(f"--resume: --stage {self.stage} needs none; it goes on by itself")
        if self.stage == "policy" and self.algorithm == "best-of-n" and self.resume:
            raise InputError("--resume: best-of-n takes a minute; --overwrite to do it again")
        read = {"sample": self.models, "reward": (self.init,), "policy": (self.init, self.reward)}
        for name in filter(None, read.get(self.stage, ())):
            if os.path.realpath(name) == os.path.realpath(self.folder):
                raise InputError(
                    f"{name}: is where this stage writes, and is needed as it is to the end; copy it, or "
                    "give another --out"
                )

    @property
    def folder(self) -> Path:
        """The folder that the stage writes."""
        inside = {"reward": "reward", "policy": self.algorithm}.get(self.stage, "")
        return Path(self.out, inside)

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


# ---- sample: prompts → K responses to each


def sample(options: Options, runtime: Runtime) -> None:
    """Writes a line of responses.jsonl for each prompt, in order, after those that are there."""
    from minillm.io.rankings import JsonLines, check_origin, read_json_lines, read_responses
    from minillm.tools.folder import claim_folder, start_run_folder

    claim_folder(options, runtime)
    models = [ChatModel(name, *load_causal_model(Path(name), runtime.device, runtime.dtype))
              for name in options.models]  # fmt: skip
    needed = 2 if options.distractors else 1  # a distractor answers another prompt

    def fits(prompt: Prompt) -> bool:
        return all(model.has_room(prompt.messages, options.max_new_tokens) for model in models)

    prompts = with_room(prompts_of(options), fits, options, needed)
    path, run = options.folder / "responses.jsonl", options.folder / "run.json"
    origin = {"prompts": digest(*(json.dumps(prompt.messages) for prompt in prompts))}
    origin |= {f"weights of {model.name}": model.fingerprint for model in models}
    if options.resume:
        check_origin(run, origin)
    else:
        path.unlink(missing_ok=True)  # first: a crash must not leave them beside another run.json
        start_run_folder(options, "rlhf", origin=origin)
    with JsonLines(path) as file:
        answered = [record.get("messages") for _, record in read_json_lines(path, "")]
        done = len(answered)
        if answered != [prompt.messages for prompt in prompts[:done]]:
            raise InputError(f"{path}: answers other prompts than these; restore it, or --overwrite")
        plan = options.responses, options.distractors, options.sampling, options.seed
        with tqdm(total=len(prompts), initial=done, unit="prompt", dynamic_ncols=True) as bar:
            for lines in sample_sets(models, prompts, *plan, done):
                file.append(lines)
                bar.update(len(lines))
    written = read_responses(path)
    repeating = sum(len({text.strip() for text in one.responses}) < len(one.responses) for one in written)
    print(f"{path}: {len(prompts):,} prompts with {options.responses} responses each")
    print(f"{repeating:,} of them hold a response that repeats another")
    cut = sum(len(one.cut) for one in written)
    print(f"{cut:,} of all responses are cut at --max-new-tokens {options.max_new_tokens}")


def prompts_of(options: Options) -> list[Prompt]:
    """The little world's prompts for rankings, or those of the files given."""
    from minillm.io.conversations import read_all

    if not options.data:
        return world_prompts(options.seed, "reward", options.prompts)
    prompts = [Prompt(messages) for messages in read_all(options.data, "prompt", options.errors)]
    if len(prompts) > options.prompts:
        print(f"the first {options.prompts:,} of {len(prompts):,} prompts are used; see --prompts")
    return prompts[: options.prompts]


def world_prompts(seed: int, split: str, count: int) -> list[Prompt]:
    """Prompts of the little world of a seed."""
    from minillm.world import World

    return [Prompt(p.messages, p.kind, seed) for p in World(seed).prompts(split, n=count)]


def with_room(
    prompts: Sequence[Prompt], fits: Callable[[Prompt], bool], options: Options, needed: int, what: str = ""
) -> list[Prompt]:
    """The prompts that leave room for a response; says how many do not. InputError where too few are left."""
    length, kept = options.max_new_tokens, list(filter(fits, prompts))
    if len(kept) < len(prompts):
        few = f"{len(prompts) - len(kept):,} of {len(prompts):,} {what}prompts"
        print(f"{few} left out: too long for {length} tokens of response")
    if len(kept) < needed:
        raise InputError(
            f"{len(kept)} of {len(prompts)} prompts leave room for a response, and {needed} are needed; give "
            f"more or shorter ones, or less than --max-new-tokens {length}"
        )
    return kept


# ---- rank: responses → rankings


def rank(options: Options, runtime: Runtime) -> None:
    """Adds to rankings.jsonl what the chosen annotators have not ranked yet."""
    from minillm.tools.annotators import add_rankings

    add_rankings(options, runtime)


# ---- agreement: rankings → how far annotators agree


def agreement(options: Options, runtime: Runtime) -> None:
    """Prints the table of agreement and writes agreement.json."""
    from minillm.io.disk import write_json
    from minillm.io.rankings import read_rankings
    from minillm.tools.measures import table_text
    from minillm.tools.provenance import provenance
    from minillm.tools.report import agreements

    if not (rows := agreements(read_rankings(options.folder / "rankings.jsonl"))):
        raise InputError(
            "no prompt was ranked by two annotators; rank with more --opinions, or by another --name"
        )
    print(table_text(rows))
    write_json(options.folder / "agreement.json", {"rows": rows} | provenance())


# ---- reward: rankings → a model that scores responses


def train_reward_model(options: Options, runtime: Runtime) -> None:
    """One run, from the rankings to the report."""
    run = Run("reward", options, runtime, "rlhf.py --stage reward")
    if run.resuming:
        model, tokenizer = load_scalar_model(run.folder, runtime.opens_on, runtime.dtype)
    else:
        assistant, tokenizer = load_causal_model(Path(options.init), runtime.opens_on, runtime.dtype)
        tokenizer = with_chat_template(tokenizer)
        generator = torch.Generator().manual_seed(options.seed)
        model = scalar_from_language_model(assistant, generator, options.new_blocks)
    template, longest = ChatTemplate(tokenizer), model.config.max_position_embeddings
    training, held_out = encoded_rankings(options, template, longest)
    stream, steps = ranking_stream(training, options.seed), steps_of(training, options, runtime)
    rates = LearningRates(options.matrix_rate, options.embedding_rate, options.weight_decay)
    forward = runtime.wrap(model)
    state = TrainingState(model, build_optimizers(model, rates, "adamw"), stream)
    state.held_out = ranking_stream(held_out, 0).fingerprint

    def validate() -> None:
        val = held_out_rankings(scores_of(model), held_out[: options.val_sets], options.micro_tokens, runtime)
        run.log("val", f"val {val['loss']:.3f}, {val['accuracy']:.1%} in order", **val)

    with run.training(state, steps, lambda: save_scalar_model(run.folder, model, tokenizer)):
        if run.already_finished():
            return
        learn_rankings(run, stream, forward, scores_of(forward, means=True), validate)
        run.end()
        if runtime.is_main:
            finish_reward_model(run, template, training, held_out)


def learn_rankings(
    run: Run, stream: Shuffled[Any], forward: Any, scores: Scores, validate: Callable[[], None]
) -> None:
    """Learns from rankings to the end of the run: a reward model, or by DPO a policy, whose implicit rewards
    (dpo.py) are then the scores."""
    state, options = run.state, cast(Options, run.options)
    while run.goes_on():
        batch = stream.next(options.batch_sets)
        mean = ranking_backward(forward, scores, batch, options.micro_tokens, run.runtime)
        multiplier = lr_schedule(state.step, run.steps, options.warmup, options.decay)
        norm, loss = state.optimizers.step(multiplier, options.clip, mean)

        tokens = sum(one.size for one in batch)
        run.log_step(tokens, loss=loss, gradient_norm=norm, rate=multiplier)
        if state.step % run.val_every == 0 or state.step == run.steps:
            validate()


def encoded_rankings(
    options: Options, template: ChatTemplate, longest: int
) -> tuple[list[EncodedSet], list[EncodedSet]]:
    """All rankings given, those to train on and those held out; says what is left out.

    InputError where there are none, none fits, or none prefers anything.
    """
    from minillm.io.conversations import rankings_of_file
    from minillm.io.rankings import read_rankings

    own, files = Path(options.out) / "rankings.jsonl", options.rankings
    rankings = [one for file in files for one in rankings_of_file(file)] if files else read_rankings(own)
    if not any(ranking.pairs() for ranking in rankings):
        what = "every response is tied with all others" if rankings else "no ranking"
        where = ", ".join(files) or own
        raise InputError(f"{where}: {what}, so there is nothing to learn; rank some responses")
    encoded, skipped = encode_rankings(rankings, template, longest)
    if not encoded:
        raise InputError(f"no ranking can be used: {', '.join(f'{n} {why}' for why, n in skipped.items())}")
    for reason, count in skipped.items():
        print(f"left out: {count:,} {reason}")
    if cut := sum(len(one.rankings[0].cut) for one in encoded):
        print(f"{cut:,} of all responses are cut: their rows have no end token")
    training, held_out = split_by_prompt(encoded, options.val_fraction)
    print(f"{len(training):,} sets of ranked responses to train on, {len(held_out):,} held out")
    return training, held_out


def steps_of(training: Sequence[EncodedSet], options: Options, runtime: Runtime) -> int:
    """The steps in which every set is seen `epochs` times; the last one is filled up with sets once more."""
    return ceil(options.epochs * len(training) / runtime.rows_of_step("--batch-sets", options.batch_sets))


def finish_reward_model(
    run: Run, template: ChatTemplate, training: Sequence[EncodedSet], held_out: Sequence[EncodedSet]
) -> None:
    """The bias, the report, the plots and the last line of metrics.jsonl."""
    from minillm.tools.plots import plot_loss
    from minillm.tools.report import report_card, report_text, write_report
    from minillm.world import KINDS, World

    val_loss = run.metric("val", "loss")
    rankings = [ranking for one in (*training, *held_out) for ranking in one.rankings]
    world = World(run.options.seed) if any(ranking.kind in KINDS for ranking in rankings) else None
    model, tokenizer = load_scalar_model(run.folder, run.runtime.device, run.runtime.dtype)
    center(model, demonstrations(training, world, template))
    save_scalar_model(run.folder, model, tokenizer)
    card = report_card(model, template, held_out, rankings, world.utility if world else None)
    write_report(run.folder, card)
    plot_loss(run.folder, "loss", "nats per ranking")
    run.say(report_text(card))
    run.finish(val_loss=val_loss, accuracy=card["pairs"]["all"]["accuracy"]["value"], bias=model.bias.item())


def demonstrations(training: Sequence[EncodedSet], world: Any, template: ChatTemplate) -> list[list[int]]:
    """The rows that shall score 0 on average: the little world's conversations if the rankings are of its
    prompts, else the best response of each set, by its first ranking."""
    if world is None:
        return [one.rows[one.rankings[0].ranking[0][0]] for one in training[:DEMONSTRATIONS]]
    shown = [conversation.messages for conversation in world.conversations("train", DEMONSTRATIONS)]
    return [encode_response(template, messages[:-1], messages[-1]["content"]) for messages in shown]


# ---- policy: prompts → a policy that scores higher and stays near the assistant


def align(options: Options, runtime: Runtime) -> None:
    """PPO, GRPO or DPO: one run, from the prompts to the finished folder."""
    if options.algorithm == "best-of-n":
        best_of_n(options, runtime)
        return
    if options.algorithm != "dpo":
        check_shares(options, runtime)
    run = Run("policy", options, runtime, f"rlhf.py --stage policy --algorithm {options.algorithm}")
    aligner = start_aligner(options, runtime)
    training, prompts = policy_prompts(options, aligner)
    held_out: list[EncodedSet] = []
    if options.algorithm == "dpo":
        longest = aligner.policy.config.max_position_embeddings
        ranked, held_out = encoded_rankings(options, aligner.template, longest)
        aligner.stream, steps = ranking_stream(ranked, options.seed), steps_of(ranked, options, runtime)
    else:
        aligner.stream = Shuffled.of(training, "prompts", options.seed, digest([p.tokens for p in training]))
        aligner.text, steps = text_mixture(options, aligner), options.iterations
    state = TrainingState(aligner.models, aligner.optimizers, aligner)
    state.held_out = digest([prompt.tokens for prompt in prompts], ranking_stream(held_out, 0).fingerprint)

    def validate_all() -> None:
        validate(run, aligner, prompts, held_out[: options.val_sets])

    with run.training(state, steps, lambda: None):  # validate() saves the policy
        if run.resuming and aligner.kept:  # InputError where what may not be written anew is damaged
            load_causal_model(run.folder, runtime.opens_on, runtime.dtype)
        if run.already_finished():
            return
        if aligner.critic and options.critic_warmup >= steps:
            run.say(f"--critic-warmup {options.critic_warmup}: only the critic learns in this run")
        if not aligner.kept:  # else the start was validated before the run stopped
            validate_all()
        if options.algorithm == "dpo":
            forward = aligner.wrapped_policy
            rewards = rewards_of(forward, aligner.ref_model, options.beta)
            learn_rankings(run, aligner.stream, forward, rewards, validate_all)
        else:
            learn_from_rollouts(run, aligner, validate_all)
        run.end()
        if runtime.is_main:
            finish_policy(run, aligner)


def learn_from_rollouts(run: Run, aligner: Aligner, validate: Callable[[], None]) -> None:
    """PPO or GRPO to the end of the run: an iteration is a rollout and some passes of updates over it."""
    state, options = run.state, aligner.options
    prompt_count, each = options.rollout_batch // options.responses_per_prompt, options.updates_per_step
    while run.goes_on():
        began = time.perf_counter()
        rollout, metrics = aligner.rollout(aligner.stream.next(prompt_count), state.step)
        if metrics["kl"] > options.max_kl:
            raise run.exploded(f"the policy is {metrics['kl']:.0f} nats a response from the reference")
        metrics["rollout_seconds"] = time.perf_counter() - began

        updates: list[dict[str, float]] = []
        for _ in range(options.ppo_epochs):
            for minibatch in rollout.minibatches:
                done = state.step * each + len(updates)  # passes left out count too
                multiplier = lr_schedule(done, run.steps * each, options.warmup, options.decay)
                critic_only = aligner.critic is not None and state.step < options.critic_warmup
                updates.append(aligner.update(rollout, minibatch, multiplier, critic_only))
            moved = [one.get("old_kl", 0.0) for one in updates[-options.minibatches :]]
            if fmean(moved) > options.target_kl:
                break
        if aligner.ema:
            aligner.update_ema()
        if options.adaptive_kl_target:
            aligner.beta = adapted_beta(aligner.beta, metrics["kl"], options.adaptive_kl_target)

        shown = f", score {metrics['score']:.2f}, KL {metrics['kl']:.1f}"
        tokens = round(metrics["length"] * options.rollout_batch)
        means = {name: EXTREMES.get(name, fmean)([one[name] for one in updates]) for name in updates[0]}
        run.log_step(tokens, **means, updates=len(updates), **metrics, shown=shown)
        if state.step % run.val_every == 0 or state.step == run.steps:
            validate()


def best_of_n(options: Options, runtime: Runtime) -> None:
    """The best-scored of several responses of the assistant: what a policy must beat to be worth training.

    Its KL to the assistant is at most log n - (n - 1)/n nats a response (Stiennon et al. 2020, appendix G.3).
    """
    from minillm.io.disk import write_json, write_text
    from minillm.tools.folder import claim_folder, start_run_folder
    from minillm.tools.provenance import provenance

    unfinished = not (options.folder / "report.json").exists()  # an earlier one is begun again
    claim_folder(replace(options, overwrite=options.overwrite or unfinished), runtime)
    aligner, n, began = start_aligner(options, runtime), options.responses_per_prompt, time.perf_counter()
    _, prompts = policy_prompts(options, aligner)
    asked = [prompt for prompt in prompts for _ in range(n)]
    seeds = [seed_of(options.seed, i // n, i % n, 1) for i in range(len(asked))]
    samples, texts, scored = aligner.sample(aligner.policy, asked, seeds)
    scores = scored.tolist()
    best = [max(range(i, i + n), key=lambda j: scores[j]) for i in range(0, len(asked), n)]
    records = [
        {"messages": asked[j].messages, "kind": asked[j].kind, "response": texts[j], "score": scores[j]}
        for j in best
    ]
    start_run_folder(options, "policy")
    write_text(options.folder / "responses.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    metrics = {
        "score": fmean(scores[j] for j in best), "largest_kl": math.log(n) - (n - 1) / n,
        "unended": fmean(not samples.ended[j] for j in best), "seconds": time.perf_counter() - began,
    }  # fmt: skip
    if aligner.rubric:
        metrics["rubric"] = fmean(aligner.rubric(r["messages"], r["response"]) or 0.0 for r in records)
    write_json(options.folder / "report.json", {"n": n, "prompts": len(records), **metrics} | provenance())
    print(f"{options.folder}: best of {n}: {', '.join(f'{k} {v:.3f}' for k, v in metrics.items())}")


# -- its models, prompts and text


def start_aligner(options: Options, runtime: Runtime) -> Aligner:
    """The models: the assistant as the policy and as the reference, reward model, critic; and the rubric."""
    from minillm.world import World

    policy, tokenizer = load_causal_model(Path(options.init), runtime.opens_on, runtime.dtype)
    tokenizer = with_chat_template(tokenizer)
    folder = Path(options.reward or Path(options.out) / "reward")
    reward_model = critic = None
    if folder.exists():
        reward_model, own = load_scalar_model(folder, runtime.opens_on, runtime.dtype)
        if own.vocabulary != tokenizer.vocabulary:
            raise InputError(f"{folder}: has another tokenizer than --init; train it from the same assistant")
    elif options.algorithm != "dpo" or options.reward:
        raise InputError(f"{folder}: no such folder; python rlhf.py --stage reward makes a reward model")
    if options.algorithm == "ppo":
        critic = deepcopy(reward_model)
        if options.critic == "policy":
            generator = torch.Generator().manual_seed(options.seed)
            critic = scalar_from_language_model(deepcopy(policy), generator)
    rubric = None if options.data else World(options.seed).utility
    models = policy, reward_model, critic
    return Aligner(options, options.sampling, runtime, ChatTemplate(tokenizer), *models, rubric)


def policy_prompts(options: Options, aligner: Aligner) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out, for which the little world has a split of its own; as many
    for each process. InputError where a prompt with its response may outgrow the reward model."""
    from minillm.io.conversations import check_world_is_meant

    runtime, length = aligner.runtime, options.max_new_tokens
    if options.data:
        prompts = prompts_of(options)
        hashes = [unit_hash(json.dumps(prompt.messages)) for prompt in prompts]
        training, held_out = split_by_hash(prompts, hashes, options.val_fraction)
    else:
        check_world_is_meant(options)
        training = prompts_of(options)
        held_out = world_prompts(options.seed, "dev", options.val_prompts)
    longest = aligner.policy.config.max_position_embeddings

    def shared_out(some: Sequence[Prompt], what: str) -> list[Prompt]:
        asked = [replace(prompt, tokens=aligner.template.prompt(prompt.messages)) for prompt in some]
        kept = with_room(
            asked, lambda p: len(p.tokens) + length <= longest, options, runtime.world_size, what
        )
        return kept[: len(kept) // runtime.world_size * runtime.world_size]

    training, held_out = shared_out(training, ""), shared_out(held_out[: options.val_prompts], "held-out ")
    if aligner.reward_model:
        longest = aligner.reward_model.config.max_position_embeddings
        needed = max(len(prompt.tokens) for prompt in (*training, *held_out)) + length
        if longest < needed:
            raise InputError(
                f"the reward model reads {longest} tokens, a prompt with its response may have {needed}; "
                f"give less than --max-new-tokens {length}, shorter prompts, or a reward model trained from "
                "the same assistant"
            )
    return training, held_out


def check_shares(options: Options, runtime: Runtime) -> None:
    """InputError unless every process has a prompt of every minibatch."""
    prompts = options.rollout_batch // options.responses_per_prompt // options.minibatches
    if prompts < runtime.world_size:
        raise InputError(
            f"--rollout-batch {options.rollout_batch}: its {options.minibatches} minibatches have {prompts} "
            f"prompts each, too few for {runtime.world_size} processes; give at least "
            f"{runtime.world_size * options.responses_per_prompt * options.minibatches}"
        )


def text_mixture(options: Options, aligner: Aligner) -> Mixture | None:
    """Raw text to mix in (--ptx), as tokens on disk; None where its weight is 0."""
    from minillm.io.text import text_sources

    if not options.ptx:
        return None
    if not options.text and options.data:
        raise InputError(f"--ptx {options.ptx}: name the raw text with --text")
    block_size = min(aligner.policy.config.max_position_embeddings, options.ptx_tokens)
    sources = text_sources(options.text, options.seed, options.world_megabytes, options.errors)
    tokenizer = aligner.template.tokenizer
    tokens = [tokenize(s, tokenizer, Path(options.cache), 0.05, 1) for s in sources]
    return Mixture(tokens, block_size, options.seed)


# -- which policy is kept


def validate(run: Run, aligner: Aligner, prompts: Sequence[Prompt], held_out: Sequence[EncodedSet]) -> None:
    """Metrics of held-out prompts, for DPO of held-out rankings too; the policy is written where its
    objective is the highest so far, or with --keep last."""
    metrics, options = aligner.validate(prompts), aligner.options
    if held_out:
        rewards = rewards_of(aligner.policy, aligner.ref_model, options.beta)
        metrics |= held_out_rankings(rewards, held_out, options.micro_tokens, run.runtime)
    if run.state.step == 0 and metrics["unended"]:
        price = "score as if they had ended there"
        if options.missing_eos_score is not None:
            price = f"score {options.missing_eos_score:g} deviations from the mean of all"
        run.say(
            f"{metrics['unended']:.0%} of the assistant's responses do not end within --max-new-tokens "
            f"{aligner.sampling.max_new_tokens}: they are cut, and {price}"
        )
    if metrics["kl"] > options.max_kl:
        raise run.exploded(f"the policy is {metrics['kl']:.0f} nats a response from the reference")
    metrics["objective"] = aligner.objective(metrics)
    # β may have changed since the kept policy was validated, so its objective is computed anew.
    if not aligner.kept or options.keep == "last" or metrics["objective"] > aligner.objective(aligner.kept):
        aligner.kept = {"step": run.state.step} | metrics
        save_model(run.folder, aligner.best, aligner.template.tokenizer)
    shown = ", ".join(f"{k} {metrics[k]:.2f}" for k in ("score", "rubric", "kl") if k in metrics)
    run.log("val", f"val {shown}", **metrics, kept_step=aligner.kept["step"])


def finish_policy(run: Run, aligner: Aligner) -> None:
    """The plots and the last line of metrics.jsonl."""
    from minillm.tools.plots import plot_loss, plot_policy

    run.metric("val", "objective")  # InputError where a damaged file has none
    unit = "nats per ranking" if aligner.options.algorithm == "dpo" else "loss of an iteration"
    plot_loss(run.folder, "loss", unit)
    plot_policy(run.folder)
    step = aligner.kept["step"]
    what = f"the policy of step {step} is kept, the best on held-out prompts"
    if aligner.options.keep == "last":
        what = f"the policy of step {step} is kept, the last"
    elif step == 0:
        what = "no step was better on held-out prompts than the start, which is kept"
    run.say(f"{run.folder}: {what}")
    run.finish(**{"kept_step" if name == "step" else name: kept for name, kept in aligner.kept.items()})


# ---- The command


def work(options: Options, runtime: Runtime) -> None:
    """The stage asked for."""
    learns = options.stage == "reward" or (options.stage == "policy" and options.algorithm != "best-of-n")
    if runtime.world_size > 1 and not learns:
        raise InputError(f"--stage {options.stage} runs in one process; start it without torchrun")
    stages = {
        "sample": sample, "rank": rank, "agreement": agreement, "reward": train_reward_model, "policy": align,
    }  # fmt: skip
    stages[options.stage](options, runtime)


def main(arguments: list[str]) -> None:
    run_script(Options, work, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
