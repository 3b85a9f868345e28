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
goes on with sample, reward or policy after Ctrl-C, a crash or a kill; rank goes on by itself where it
stopped, and several annotators may add to one file, one after another. Under torchrun, reward and policy
train in several processes.

Method: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), sections 3.1 to 3.5; for the policy see
minillm/ppo.py, grpo.py and dpo.py.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

if __name__ == "__main__":
    from minillm.errors import end_at_interrupts

    end_at_interrupts()  # before torch, whose import takes seconds

import torch
from tqdm import tqdm

from minillm.chat import ChatTemplate, with_chat_template
from minillm.data import Mixture, Shuffled, split_by_hash, tokenize
from minillm.dpo import rewards_of
from minillm.errors import InputError, one_line_errors
from minillm.files import digest, read_json, write_json, write_text
from minillm.generate import SamplingOptions
from minillm.io.huggingface import (
    load_causal_model,
    load_model,
    load_scalar_model,
    save_model,
    save_scalar_model,
)
from minillm.io.text import open_sources, world_sources
from minillm.model import LanguageModel, ModelConfig, ScalarModel, scalar_from_language_model
from minillm.optim import LearningRates, build_optimizers, clip_gradients, lr_schedule
from minillm.options import PolicyOptions, parse_options
from minillm.policy import (
    Networks,
    Progress,
    Update,
    grpo_experience,
    policy_optimizers,
    ppo_experience,
    roll_out,
)
from minillm.ppo import adapted_beta
from minillm.preferences import (
    MOST_RESPONSES,
    ChatModel,
    Question,
    Ranking,
    ResponseSet,
    Simulated,
    assign_annotators,
    new_ranking,
    sample_sets,
    seed_of,
    simulated_annotators,
)
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
    training_scores_of,
)
from minillm.rollout import Observers, Prompt, encode_prompts, held_out_figures, shuffled_prompts
from minillm.run import (
    Run,
    Runtime,
    TrainingState,
    claim_folder,
    read_metrics,
    start_runtime,
)
from minillm.tokenizer import Tokenizer
from minillm.tools.provenance import provenance
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt as WorldPrompt

DEMONSTRATIONS = 512  # that score 0 on average


@dataclass(frozen=True)
class Options(PolicyOptions):
    """Sample responses, have them ranked, learn to score them, align a policy."""

    stage: Literal["sample", "rank", "agreement", "reward", "policy"] = field(kw_only=True)
    """What to do; each stage reads what the one before it left in --out."""
    out: str = "out/rlhf"
    """The folder of responses and rankings; the reward model has one of its own inside."""
    data: tuple[str, ...] = ()
    """sample, policy: prompts, or conversations, of which all before the last reply is one. Nothing: the
    little world's. rank --annotator file: rankings that others published (minillm/io/comparisons.py)."""
    errors: Literal["strict", "replace"] = "strict"
    """Stop at data that is not UTF-8 or does not parse, or replace and skip, counting."""

    models: tuple[str, ...] = ("out/sft",)
    """sample: the models that respond, in turn: run folders or Hugging Face folders."""
    prompts: int = 7000
    """sample, policy: how many prompts; of --data at most so many."""
    responses: int = 4
    """sample: K, the responses to a prompt, 2 to 9."""
    distractors: int = 1
    """sample: how many of the K are responses to another prompt: without any, whatever sounds like an
    answer is one to the reward model."""
    temperature: float = 1.0
    """sample, policy: divides the logits."""
    top_k: int = 0
    """sample, policy: among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """sample, policy: among the fewest most probable tokens that together reach this probability."""
    max_new_tokens: int = 64
    """sample, policy: tokens of a response at most."""

    annotator: Literal["person", "simulated", "model", "file"] = "simulated"
    """rank: who ranks."""
    name: str = "person"
    """rank --annotator person: your name, under which your rankings are kept."""
    annotators: int = 5
    """rank --annotator simulated: how many people."""
    opinions: int = 5
    """rank --annotator simulated: how many of them rank each set; more reduce the noise of its labels."""
    noise: float = 1.0
    """rank --annotator simulated: factor to how far they stray from the rubric; 0 for not at all."""
    judge: str | None = None
    """rank --annotator model: the model that judges, a run folder or a Hugging Face folder."""
    principles: str | None = None
    """rank --annotator model: a text file that says what makes a reply better. Default: minillm's own."""

    init: str = "out/sft"
    """reward, policy: the assistant to start from: a run or a Hugging Face folder (Llama or Qwen3 layout)."""
    rankings: tuple[str, ...] = ()
    """reward, policy --algorithm dpo: rankings, ours or anybody's. Nothing: rankings.jsonl in --out."""

    decay: float = 1.0
    """reward, policy: share of the run, at its end, over which the rates fall towards 0."""
    new_blocks: int = 1
    """reward: blocks on top of the assistant's, where the token that it expected meets the one that came."""
    epochs: int = 1
    """reward, dpo: passes over the rankings; more than one soon learns them by heart."""
    batch_sets: int = 16
    """reward, dpo: sets of responses in a step, over all processes, each with all rankings of it."""
    matrix_rate: float = 3e-3
    """reward: learning rate of the block matrices, by AdamW."""
    embedding_rate: float = 9e-3
    """reward: learning rate of the embedding and the scalar head."""
    val_fraction: float = 0.1
    """reward, policy: share of the prompts held out, for validation and the report; the little world has
    development prompts of its own for a policy."""
    val_sets: int = 64
    """reward, dpo: held-out sets of one validation, at most; the report takes all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("prompts", "max_new_tokens", "annotators", "opinions")
        self.require_counts("epochs", "batch_sets", "val_sets")
        self.require_positive("temperature", "top_p", "matrix_rate", "embedding_rate")
        self.require_not_negative("distractors", "top_k", "noise", "new_blocks")
        if not 2 <= self.responses <= MOST_RESPONSES:
            raise InputError(f"--responses {self.responses}: give 2 to {MOST_RESPONSES}")
        if self.distractors >= self.responses:
            raise InputError(f"--distractors {self.distractors}: leave one of {self.responses} responses")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val-fraction {self.val_fraction}: give a share between 0 and 1")
        if not self.models:
            raise InputError("--models: name at least one, as in out/sft")
        if not self.name.strip():
            raise InputError("--name: is empty; give a name")
        if self.stage in ("rank", "agreement") and self.resume:
            raise InputError(f"--resume: --stage {self.stage} needs none; it goes on by itself")
        if self.stage == "policy" and self.algorithm == "best-of-n" and self.resume:
            raise InputError("--resume: best-of-n takes a minute; --overwrite to do it again")

    @property
    def folder(self) -> Path:
        """The folder that the stage writes."""
        inside = {"reward": "reward", "policy": self.algorithm}.get(self.stage, "")
        return Path(self.out, inside)

    @property
    def learns(self) -> bool:
        """Whether a model is trained, and so can be in several processes."""
        return self.stage == "reward" or (self.stage == "policy" and self.algorithm != "best-of-n")

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


# ---- sample: prompts → K responses to each


def sample(options: Options, runtime: Runtime) -> None:
    """Writes a line of responses.jsonl for each prompt, in order, going on behind those that are there."""
    from minillm.io.rankings import JsonLines, check_origin, read_json_lines
    from minillm.tools.folder import start_run_folder

    sampling = options.sampling
    claim_folder(options, runtime)
    models = [ChatModel(name, *load_causal_model(Path(name), runtime.device, runtime.dtype))
              for name in options.models]  # fmt: skip
    questions = with_room(questions_of(options), models, options)
    path, run = options.folder / "responses.jsonl", options.folder / "run.json"
    origin = {"prompts": digest(*(json.dumps(q.messages) for q in questions))}
    origin |= {f"weights of {model.name}": model.fingerprint for model in models}
    if options.resume:
        check_origin(run, origin)
    else:
        path.unlink(missing_ok=True)  # first: a crash must not leave them beside another run.json
        start_run_folder(options, "rlhf")
        write_json(run, read_json(run) | {"origin": origin})
    with JsonLines(path) as file:
        if file.mended:
            print(file.mended)
        answered = [record.get("messages") for _, record in read_json_lines(path, "")]
        done = len(answered)
        if answered != [question.messages for question in questions[:done]]:
            raise InputError(f"{path}: answers other prompts than these; restore it, or --overwrite")
        with tqdm(total=len(questions), initial=done, unit="prompt", dynamic_ncols=True) as bar:
            for lines in sample_sets(
                models, questions, options.responses, options.distractors, sampling, options.seed, done
            ):
                file.append(lines)
                bar.update(len(lines))
    written = [record for _, record in read_json_lines(path, "")]
    cut = sum(not draw["ended"] for record in written for draw in record["draws"])
    print(f"{path}: {len(questions):,} prompts with {options.responses} responses each")
    print(f"{sum('note' in record for record in written):,} of them hold a response that repeats another")
    print(f"{cut:,} of all responses are cut at --max-new-tokens {options.max_new_tokens}")


def questions_of(options: Options) -> list[Question]:
    """The little world's prompts for rankings, or those of the files given."""
    from minillm.io.conversations import open_prompts

    if not options.data:
        return world_questions(options.seed, "reward", options.prompts)
    questions: list[Question] = []
    for source in open_prompts(options.data, options.errors):
        if source.weight != 1:
            raise InputError(f"data source {source.name!r}: prompts have no weight; leave it out")
        before = len(questions)
        questions += [Question(messages) for messages in source.conversations()]
        report(source.name, len(questions) - before, "prompts", source.skipped, source.first_skipped)
    if len(questions) > options.prompts:
        print(f"the first {options.prompts:,} of {len(questions):,} prompts are used; see --prompts")
    return questions[: options.prompts]


def world_questions(seed: int, split: str, count: int) -> list[Question]:
    """Prompts of the little world of a seed."""
    return [Question(p.messages, p.kind, seed) for p in World(seed).prompts(split, n=count)]


def with_room(questions: Sequence[Question], models: Sequence[ChatModel], options: Options) -> list[Question]:
    """The prompts that leave room for a response in each model's context; says how many do not."""
    length = options.max_new_tokens
    kept = [q for q in questions if all(model.has_room(q.messages, length) for model in models)]
    if len(kept) < len(questions):
        print(f"{len(questions) - len(kept):,} prompts left out: too long for {length} tokens of response")
    if not kept:
        raise InputError(
            "no prompt leaves a model room for its response; "
            f"give less than --max-new-tokens {length}, or shorter prompts"
        )
    if options.distractors and len(kept) < 2:
        raise InputError(f"--distractors {options.distractors}: needs a second prompt; give more --prompts")
    return kept


# ---- rank: responses → rankings

Job = tuple[str, str, Callable[[], Ranking | None]]
"""Whose ranking of which set is to be made (annotator and key), and how; None comes of a set that cannot be
ranked."""


def rank(options: Options, runtime: Runtime) -> None:
    """Adds to rankings.jsonl what the chosen annotators have not ranked yet."""
    from minillm.io.rankings import open_rankings, record_ranking

    if options.annotator == "person":
        rank_as_person(options)
        return
    jobs, origin = jobs_of(options, runtime)
    with open_rankings(options, origin) as file:
        there, left = file.made(), []
        for annotator, key, make in jobs:
            # Some files rank a set twice: as many are left as are not there.
            if there[annotator, key]:
                there[annotator, key] -= 1
            else:
                left.append(make)
        before, keys = len(file.rankings), {key for _, key, _ in jobs}
        others = sum(ranking.key not in keys for ranking in file.rankings)
        if others and options.annotator != "file":
            print(f"{others:,} of the rankings there are of other responses than responses.jsonl holds")
        for first in tqdm(range(0, len(left), 64), unit="×64 rankings", dynamic_ncols=True):
            rankings = [ranking for make in left[first : first + 64] if (ranking := make())]
            if rankings and len(file.rankings) == before:
                record_ranking(options, origin)
            file.append(rankings)
        made = file.rankings[before:]
    print(f"{file.lines.path}: {len(made):,} rankings added to {before:,}")
    if tied := sum(not ranking.pairs() for ranking in made):
        print(f"{tied:,} of them prefer nothing")
    if left and not made:
        raise InputError(
            f"--judge {options.judge}: no set fits its context; name a judge that reads more tokens at once "
            "(--block-size of train.py)"
        )
    if len(made) < len(left):
        print(f"{len(left) - len(made):,} sets left out: too long for the judge")


def jobs_of(options: Options, runtime: Runtime) -> tuple[list[Job], dict[str, str]]:
    """What there is to rank, and fingerprints of what the rankings hang on."""
    from minillm.io.rankings import read_responses
    from minillm.tools.judge import DEFAULT_PRINCIPLES, Judge, read_principles

    if options.annotator == "file":
        return published(options), {}
    sets = read_responses(options.folder / "responses.jsonl")
    if options.annotator == "simulated":
        return simulated(options, sets), {}
    if options.judge is None:
        raise InputError("--annotator model: name a --judge, as in out/sft")
    principles = read_principles(Path(options.principles or DEFAULT_PRINCIPLES))
    loaded = load_causal_model(Path(options.judge), runtime.device, runtime.dtype)
    model, judge = ChatModel(f"model-{options.judge}", *loaded), Judge(*loaded, principles)

    def make(given: ResponseSet) -> Ranking | None:
        ranking = judge.rank(given)
        return None if ranking is None else new_ranking(given, ranking, model.name, options.seed)

    origin = {"weights of --judge": model.fingerprint, "--principles": digest(principles)}
    return [(model.name, given.key, partial(make, given)) for given in sets], origin


def rank_as_person(options: Options) -> None:
    """At the terminal."""
    from minillm.io.rankings import open_rankings, read_responses, record_ranking
    from minillm.tools.ranking import RankingSession, rank_in_terminal

    sets = read_responses(options.folder / "responses.jsonl")
    with open_rankings(options, {}) as file:
        record_ranking(options, {})
        rank_in_terminal(RankingSession(sets, file, options.name, options.seed))


def simulated(options: Options, sets: Sequence[ResponseSet]) -> list[Job]:
    """Each set to some of the simulated annotators."""
    people, world = simulated_annotators(options.annotators), World(sets[0].world or 0)

    def make(person: Simulated, given: ResponseSet, prompt: WorldPrompt) -> Ranking:
        ranking = person.rank(partial(world.score, prompt), given, options.noise, options.seed)
        return new_ranking(given, ranking, person.name, options.seed)

    jobs: list[Job] = []
    for number, given in enumerate(sets, start=1):
        prompt = world.prompt_of(given.messages)
        if prompt is None or given.world != world.seed:
            raise InputError(
                f"prompt {number} is none of the little world's, whose rubric alone simulated annotators "
                "know; give --annotator person or model"
            )
        who = assign_annotators(given.key, len(people), options.opinions, options.seed)
        jobs += [(people[i].name, given.key, partial(make, people[i], given, prompt)) for i in who]
    return jobs


def published(options: Options) -> list[Job]:
    """The rankings of other people's files, under the names of the files."""
    from minillm.io.comparisons import open_comparisons

    if not options.data:
        raise InputError("--annotator file: name the files with --data, as in --data hh.jsonl.gz")
    jobs: list[Job] = []
    for source in open_comparisons(options.data, options.errors):
        report(source.name, len(source.rankings), "rankings", source.skipped, source.first_skipped)
        jobs += [(source.name, ranking.key, partial(replace, ranking)) for ranking in source.rankings]
    return jobs


# ---- agreement: rankings → how far annotators agree


def agreement(options: Options, runtime: Runtime) -> None:
    """Prints the table of agreement and writes agreement.json."""
    from minillm.io.rankings import read_rankings
    from minillm.tools.agreement import agreement_report, agreement_table
    from minillm.tools.provenance import provenance

    found = agreement_report(read_rankings(options.folder / "rankings.jsonl"))
    print(agreement_table(found))
    write_json(options.folder / "agreement.json", asdict(found) | provenance())


# ---- reward: rankings → a model that scores responses


def train_reward_model(options: Options, runtime: Runtime) -> None:
    """One run, from the rankings to the report."""
    run = Run("reward", options, runtime, "rlhf.py --stage reward")
    model, tokenizer = start_reward_model(run, options)
    template = ChatTemplate(tokenizer)
    training, held_out = encoded_rankings(options, template, model.config, runtime)
    stream, steps = ranking_stream(training, options.seed), steps_of(training, options, runtime)
    rates = LearningRates(
        options.matrix_rate, options.embedding_rate, 0.1 * options.matrix_rate, options.weight_decay
    )
    state = TrainingState(model, build_optimizers(model, rates, "adamw"), stream)
    forward = runtime.wrap(model)

    def validate() -> None:
        val = held_out_rankings(scores_of(model), held_out[: options.val_sets], options.micro_tokens, runtime)
        run.log("val", f"val {val['loss']:.3f}, {val['accuracy']:.1%} in order", **val)

    with run.training(state, steps, lambda: save_scalar_model(run.folder, model, tokenizer)):
        if run.already_finished():
            return
        learn_rankings(run, stream, forward, training_scores_of(forward), validate, options)
        if runtime.is_main:
            finish_reward_model(run, model, template, training, held_out, options)


def learn_rankings(
    run: Run,
    stream: Shuffled[EncodedSet],
    forward: Callable[..., Any],
    scores: Scores,
    validate: Callable[[], None],
    options: Options,
) -> None:
    """Learns from rankings to the end of the run: a reward model, or by DPO a policy whose implicit rewards
    are the scores."""
    state, tenth = run.state, max(1, run.steps // 10)
    while run.goes_on():
        batch = stream.next(options.batch_sets)
        loss = ranking_backward(forward, scores, batch, options.micro_tokens, run.runtime)
        gradient_norm = clip_gradients(state.optimizers.parameters(), options.clip)
        run.check_finite(loss=loss, gradient_norm=gradient_norm)
        rate = lr_schedule(state.step, run.steps, options.warmup, options.decay)
        state.optimizers.step(rate)

        tokens = sum(one.size for one in batch)
        run.log_step(tokens, loss=loss, gradient_norm=gradient_norm, rate=rate)
        if run.due(options.val_every or tenth) or state.step == run.steps:
            validate()
        if run.due(options.save_every or tenth):
            run.save()
    run.end()


def encoded_rankings(
    options: Options, template: ChatTemplate, config: ModelConfig, runtime: Runtime
) -> tuple[list[EncodedSet], list[EncodedSet]]:
    """All rankings given, those to train on and those held out; says what is left out.

    InputError where there are none, none fits, or none prefers anything.
    """
    from minillm.io.comparisons import rankings_of_file

    files = options.rankings or (str(Path(options.out) / "rankings.jsonl"),)
    rankings = [ranking for file in files for ranking in rankings_of_file(file)]
    if not any(ranking.pairs() for ranking in rankings):
        what = "every response is tied with all others" if rankings else "no ranking"
        raise InputError(f"{', '.join(files)}: {what}, so there is nothing to learn; rank some responses")
    encoded, skipped = encode_rankings(rankings, template, config.max_position_embeddings)
    if not encoded:
        raise InputError(f"no ranking can be used: {', '.join(f'{n} {why}' for why, n in skipped.items())}")
    if runtime.is_main:
        for reason, count in skipped.items():
            print(f"left out: {count} {reason}")
        if cut := sum(len(one.rankings[0].cut) for one in encoded):
            print(f"{cut:,} of all responses are cut: their rows have no end token")
    return split_by_prompt(encoded, options.val_fraction)


def start_reward_model(run: Run, options: Options) -> tuple[ScalarModel, Tokenizer]:
    """The run's own model, or a new head on the assistant's trunk."""
    if run.resuming:
        return load_scalar_model(run.folder, run.runtime.device, run.runtime.dtype)
    model, tokenizer = load_assistant(options, run.runtime)
    generator = torch.Generator().manual_seed(options.seed)
    return scalar_from_language_model(model, generator, options.new_blocks), tokenizer


def load_assistant(options: Options, runtime: Runtime) -> tuple[LanguageModel, Tokenizer]:
    """The model of --init, with a chat template. InputError where it sees both sides of a token."""
    model, tokenizer = load_causal_model(Path(options.init), runtime.device, runtime.dtype)
    return model, with_chat_template(tokenizer)


def steps_of(training: Sequence[EncodedSet], options: Options, runtime: Runtime) -> int:
    """The steps in which every set is seen `epochs` times; the last is filled from one pass more."""
    if options.batch_sets % runtime.world_size:
        raise InputError(
            f"--batch-sets {options.batch_sets}: cannot be shared by {runtime.world_size} processes; "
            f"give a multiple of {runtime.world_size}"
        )
    return ceil(options.epochs * len(training) / options.batch_sets)


def finish_reward_model(
    run: Run,
    model: ScalarModel,
    template: ChatTemplate,
    training: Sequence[EncodedSet],
    held_out: Sequence[EncodedSet],
    options: Options,
) -> None:
    """The shift to zero, the report, the plots and the last line of metrics.jsonl."""
    from minillm.tools.plots import plot_loss
    from minillm.tools.report import judge, report_card, report_text, unknown_score, write_report

    val_loss = run.metrics.figure("val", "loss")
    rankings = [ranking for one in (*training, *held_out) for ranking in one.rankings]
    world = World(options.seed) if any(ranking.kind in KINDS for ranking in rankings) else None
    center(model, demonstrations(training, world, template))
    run.save_model()
    judged = judge(model, held_out)
    card = report_card(model, template, judged, rankings, world.utility if world else unknown_score)
    write_report(run.folder, card, judged)
    plot_loss(run.folder, "loss", "nats per ranking")
    run.metrics.say(report_text(card))
    run.metrics.log(
        "final", run.state.step, seconds=run.state.seconds, tokens=run.state.tokens,
        val_loss=val_loss, accuracy=card["accuracy"]["value"],
        bias=model.bias.item(),
    )  # fmt: skip


def demonstrations(
    training: Sequence[EncodedSet], world: "World | None", template: ChatTemplate
) -> list[list[int]]:
    """What scores 0 on average: the little world's conversations if the rankings are of its prompts, else
    the best response of each set, by its first ranking."""
    if world is None:
        return [one.rows[one.rankings[0].ranking[0][0]] for one in training[:DEMONSTRATIONS]]
    shown = [conversation.messages for conversation in world.conversations("train", DEMONSTRATIONS)]
    return [encode_response(template, messages[:-1], messages[-1]["content"]) for messages in shown]


# ---- policy: prompts → a policy that scores higher and stays near


def train_policy(options: Options, runtime: Runtime) -> None:
    """PPO or GRPO: one run, from the prompts to the finished folder."""
    run = Run("policy", options, runtime, command_of(options))
    networks, observers = start_policy(options, runtime)
    training, held_out = policy_prompts(options, networks.policy, observers.tokenizer, runtime)
    text = text_mixture(options, networks.policy, observers.tokenizer, runtime)
    progress = Progress(shuffled_prompts(training, options.seed), text, options.beta, observers.fingerprint)
    state = TrainingState(networks, policy_optimizers(networks, options), progress)
    update = Update(run, options, networks, observers, progress)
    advantages_of = ppo_experience if options.algorithm == "ppo" else grpo_experience
    tenth = max(1, options.iterations // 10)

    with run.training(state, options.iterations, lambda: None):  # validate() saves the best policy
        check_best(run, progress)
        if run.already_finished():
            return
        if progress.best is None:  # else it was before a stop
            validate(run, options, networks, observers, progress, held_out)
        while run.goes_on():
            began = time.perf_counter()
            prompts = progress.prompts.next(options.batch_responses // options.samples)
            rollouts, figures = roll_out(run, options, networks, observers, prompts)
            if figures["kl"] > options.max_kl:
                raise run.exploded(f"the policy is {figures['kl']:.0f} nats a response from the reference")
            minibatches, foreseen = advantages_of(rollouts, options, progress, runtime)
            figures |= foreseen | {"beta": progress.beta, "rollout_seconds": time.perf_counter() - began}

            update.begin()
            for _ in range(options.inner_epochs):
                for minibatch in minibatches:
                    update.step(minibatch)
                if update.moved() > options.stop_kl:
                    break
            networks.follow(options.average)
            if options.target_kl:
                progress.beta = adapted_beta(progress.beta, figures["kl"], options.target_kl)

            tokens = round(figures["length"] * options.batch_responses)
            run.log_step(tokens, **update.figures(), **figures)
            run.metrics.show(state.step, score=f"score {figures['score']:.2f}", kl=f"KL {figures['kl']:.1f}")
            if run.due(options.val_every or tenth) or state.step == options.iterations:
                validate(run, options, networks, observers, progress, held_out)
            if run.due(options.save_every or tenth):
                run.save()
        run.end()
        if runtime.is_main:
            finish_policy(run, options)


def train_dpo(options: Options, runtime: Runtime) -> None:
    """DPO: one run, from the rankings to the finished folder."""
    run = Run("policy", options, runtime, command_of(options))
    networks, observers = start_policy(options, runtime)
    policy, tokenizer = networks.policy, observers.tokenizer
    _, prompts = policy_prompts(options, policy, tokenizer, runtime)
    training, held_out = encoded_rankings(options, ChatTemplate(tokenizer), policy.config, runtime)
    stream, steps = ranking_stream(training, options.seed), steps_of(training, options, runtime)
    progress = Progress(stream, None, options.beta, observers.fingerprint)
    state = TrainingState(networks, policy_optimizers(networks, options), progress)
    forward = runtime.wrap(policy)
    rewards = rewards_of(forward, observers.ref, options.beta)
    held_out_rewards = rewards_of(policy, observers.ref, options.beta)

    def validate_rankings() -> None:
        val = held_out_rankings(held_out_rewards, held_out[: options.val_sets], options.micro_tokens, runtime)
        validate(run, options, networks, observers, progress, prompts, **val)

    with run.training(state, steps, lambda: None):  # validate() saves the best policy
        check_best(run, progress)
        if run.already_finished():
            return
        learn_rankings(run, stream, forward, rewards, validate_rankings, options)
        if runtime.is_main:
            finish_policy(run, options)


def best_of_n(options: Options, runtime: Runtime) -> None:
    """Of several responses of the assistant the best-scored: what a policy must beat to be worth training.

    Its KL to the assistant is at most log n - (n - 1)/n nats a response (Stiennon et al. 2020, appendix G.3).
    """
    from minillm.tools.folder import start_run_folder

    claim_folder(options, runtime)
    networks, observers = start_policy(options, runtime)
    _, prompts = policy_prompts(options, networks.policy, observers.tokenizer, runtime)
    n, began = options.samples, time.perf_counter()
    asked = [prompt for prompt in prompts for _ in range(n)]
    seeds = [seed_of(options.seed, i // n, i % n, 1) for i in range(len(asked))]
    responses = observers.sample(networks.policy, asked, seeds)
    scores, texts = observers.scores(responses), responses.texts(observers.tokenizer.decode)
    best = [max(range(i, i + n), key=lambda j: scores[j]) for i in range(0, len(asked), n)]
    records = [
        {"messages": asked[j].question.messages, "kind": asked[j].question.kind, "response": texts[j],
         "score": scores[j]}
        for j in best
    ]  # fmt: skip
    start_run_folder(options, "policy")
    write_text(options.folder / "responses.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    figures = {"score": fmean(scores[j] for j in best), "largest_kl": math.log(n) - (n - 1) / n}
    figures["seconds"] = time.perf_counter() - began
    if observers.worth:
        figures["rubric"] = fmean(observers.worth(asked[j].question.messages, texts[j]) or 0.0 for j in best)
    write_json(options.folder / "report.json", {"n": n, "prompts": len(records), **figures} | provenance())
    print(f"{options.folder}: best of {n}: {', '.join(f'{k} {v:.3f}' for k, v in figures.items())}")


def policy_prompts(
    options: Options, policy: LanguageModel, tokenizer: Tokenizer, runtime: Runtime
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out: the little world has development prompts for that.

    InputError where --data is left out though the responses in --out are to prompts of somebody's own.
    """
    sampled = Path(options.out) / "run.json"
    earlier = read_json(sampled).get("options") if sampled.exists() and not options.data else None
    if isinstance(earlier, dict) and (data := earlier.get("data")) and isinstance(data, list):
        raise InputError(
            f"{sampled}: the responses are to prompts of {' '.join(map(str, data))}; give --data here too"
        )
    questions = questions_of(options)
    if options.data:
        questions, held_out = split_by_hash(questions, lambda q: json.dumps(q.messages), options.val_fraction)
    else:
        held_out = world_questions(options.seed, "dev", options.val_prompts)
    longest = policy.config.max_position_embeddings - options.max_new_tokens
    sides = []
    for side in (questions, held_out[: options.val_prompts]):
        prompts, left_out = encode_prompts(side, ChatTemplate(tokenizer), longest)
        if left_out and runtime.is_main:
            print(f"{left_out:,} prompts left out: too long for {options.max_new_tokens} tokens of response")
        if len(prompts) < runtime.world_size:
            raise InputError(
                f"{len(prompts)} prompts of at most {longest} tokens to train or validate on; "
                "give more or shorter ones, or less than --max-new-tokens"
            )
        sides.append(prompts[: len(prompts) // runtime.world_size * runtime.world_size])
    return sides[0], sides[1]


def start_policy(options: Options, runtime: Runtime) -> tuple[Networks, Observers]:
    """The assistant to move and its critic; the assistant as it was, the reward model and the rubric."""
    policy, tokenizer = load_assistant(options, runtime)
    reward_folder = Path(options.reward or Path(options.out) / "reward")
    needed = options.algorithm != "dpo" or options.reward
    reward = (
        load_reward_model(reward_folder, tokenizer, runtime) if needed or reward_folder.exists() else None
    )
    critic = average = None
    if options.algorithm == "ppo":
        critic = deepcopy(reward)
        if options.critic == "policy":
            generator = torch.Generator().manual_seed(options.seed)
            critic = scalar_from_language_model(deepcopy(policy), generator)
    if options.average:
        average = deepcopy(policy)
    worth = None if options.data else World(options.seed).utility
    observers = Observers(
        deepcopy(policy), reward, tokenizer, options.sampling, options.unended_score, worth,
        options.micro_tokens,
    )  # fmt: skip
    return Networks(policy, critic, average), observers


def load_reward_model(folder: Path, tokenizer: Tokenizer, runtime: Runtime) -> ScalarModel:
    """InputError where it reads other tokens than the assistant writes."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; python rlhf.py --stage reward makes a reward model")
    model, own = load_scalar_model(folder, runtime.device, runtime.dtype)
    if with_chat_template(own).vocabulary != tokenizer.vocabulary:
        raise InputError(f"{folder}: has another tokenizer than --init; train it from the same assistant")
    return model


def text_mixture(
    options: Options, policy: LanguageModel, tokenizer: Tokenizer, runtime: Runtime
) -> Mixture | None:
    """Raw text for ptx, as tokens on disk; None where it has no weight."""
    if not options.ptx:
        return None
    if not options.text and options.data:
        raise InputError(f"--ptx {options.ptx}: name the raw text with --text")
    block_size = min(policy.config.max_position_embeddings, options.ptx_tokens)
    with runtime.main_first():
        sources = (
            open_sources(options.text, options.errors)
            if options.text
            else world_sources(World(options.seed), options.world_megabytes)
        )
        tokens = [tokenize(s, tokenizer, Path(options.cache), 0.05, 1) for s in sources]
    return Mixture(tokens, block_size, options.seed)


def validate(
    run: Run,
    options: Options,
    networks: Networks,
    observers: Observers,
    progress: Progress,
    prompts: Sequence[Prompt],
    **figures: float,
) -> None:
    """Figures of held-out prompts; the policy is written where its objective is the best so far.

    The objective is what PPO maximises, score - β KL, with scores in units of their deviation at the start;
    for DPO, which needs no scores, the loss of held-out rankings with its sign turned.
    """
    found = held_out_figures(observers, networks.kept, prompts, options.seed, run.runtime)
    if progress.unit is None:
        progress.unit = found.get("score_deviation") or 1.0
    loss = figures.pop("loss", None)
    if loss is None:
        loss = options.beta * found["kl"] - found["score"] / progress.unit
    if progress.best is None or -loss > progress.best:
        progress.best = -loss
        if run.runtime.is_main:
            save_model(run.folder, networks.kept, observers.tokenizer)
    figures |= {"loss": loss, "best": progress.best, **found}
    shown = ", ".join(f"{name} {found[name]:.2f}" for name in ("score", "rubric", "kl") if name in found)
    run.log("val", f"val {shown}", **figures)


def check_best(run: Run, progress: Progress) -> None:
    """InputError where the best policy so far, which the rest of the run may not write anew, is damaged."""
    if run.resuming and progress.best is not None:
        load_model(run.folder, run.runtime.device, run.runtime.dtype)


def finish_policy(run: Run, options: Options) -> None:
    """The plots and the last line of metrics.jsonl."""
    from minillm.tools.plots import plot_loss, plot_policy

    state = run.state
    run.metrics.figure("val", "loss")  # InputError where a damaged file has none
    vals = [event for event in read_metrics(run.folder) if event["event"] == "val"]
    best = min(vals, key=lambda event: event.get("loss", math.inf))
    plot_loss(run.folder, "loss", "policy loss; held out: β KL - score")
    plot_policy(run.folder)
    what = f"the policy of step {best['step']} is kept, the best on held-out prompts"
    if best["step"] == 0:
        what = "no step was better on held-out prompts than the start, which is kept"
    run.metrics.say(f"{run.folder}: {what}")
    kept = {name: value for name, value in best.items() if name not in ("event", "step")}
    run.metrics.log(
        "final", state.step, seconds=state.seconds, tokens=state.tokens, kept_step=best["step"], **kept
    )


def command_of(options: Options) -> str:
    return f"rlhf.py --stage policy --algorithm {options.algorithm}"


def align(options: Options, runtime: Runtime) -> None:
    """The stage "policy", by any of its algorithms."""
    algorithms = {"ppo": train_policy, "grpo": train_policy, "dpo": train_dpo, "best-of-n": best_of_n}
    algorithms[options.algorithm](options, runtime)


# ---- The command


def report(name: str, count: int, what: str, skipped: Mapping[str, int], first: str | None) -> None:
    """Says how much a source gave and what was left out of it."""
    print(f"{name}: {count:,} {what}")
    for reason, number in sorted(skipped.items()):
        print(f"  left out: {number:,} {reason}")
    if first:
        print(f"  the first: {first}")


def main(arguments: list[str]) -> None:
    stages = {
        "sample": sample,
        "rank": rank,
        "agreement": agreement,
        "reward": train_reward_model,
        "policy": align,
    }
    with one_line_errors():
        options = parse_options(Options, arguments)
        with start_runtime(options.device, options.precision) as runtime:
            if runtime.world_size > 1 and not options.learns:
                raise InputError(f"--stage {options.stage} runs in one process; start it without torchrun")
            stages[options.stage](options, runtime)


if __name__ == "__main__":
    main(sys.argv[1:])
