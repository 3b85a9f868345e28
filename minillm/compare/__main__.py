"""What each stage did: the same prompts through several models, side by side, with metrics.

    python -m minillm.compare out/base out/sft out/rlhf/ppo             a table here, a page in out/compare
    python -m minillm.compare out/base out/sft --show 2                 and two replies of each kind here
    python -m minillm.compare out/base out/sft --split test             on the prompts to report on
    python -m minillm.compare out/sft out/rlhf/ppo --judge rubric reward model --judge-model out/sft
    python -m minillm.compare out/sft out/rlhf/ppo --judge person       you judge, and do not see whose it is
    python -m minillm.compare out/mine out/helper --data chats.jsonl    your own prompts

Each model is asked in its own form (tools/evaluate.py), greedily and at --temperature, the i-th prompt with
the same seed. Out come compare.json, with all metrics, and compare.html, a page made from it that needs
nothing else.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

from minillm.chat import ChatTemplate
from minillm.compare import metrics
from minillm.compare.page import page, terminal_text
from minillm.errors import InputError, writing
from minillm.io import conversations
from minillm.io.disk import write_json, write_text
from minillm.io.huggingface import load_causal_model, load_scalar_model
from minillm.io.rankings import RankingFile
from minillm.io.text import text_sources
from minillm.options import Count, NotNegative, Seed, Text, Whole, check_limits
from minillm.preferences import ChatModel
from minillm.run import Runtime
from minillm.tools import annotators
from minillm.tools.commandline import parse_options
from minillm.tools.device import start_runtime
from minillm.tools.ending import one_line_errors
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.tools.folder import read_run
from minillm.tools.provenance import provenance
from minillm.world import World
from minillm.world.rubric import Prompt

WORLD_MEGABYTES = 12.0  # of its text, some of which training held out
UNNAMED = "prompts"  # the kind of prompts that have none

JudgeName = Literal["rubric", "reward", "model", "person"]


@dataclass(frozen=True)
class Options:
    """Compare models on the same prompts: a table, and a page with all metrics."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders or Hugging Face folders, from the first stage to the last."""
    data: tuple[str, ...] = ()
    """Conversations, as sft.py's --data, of which all before the last reply is a prompt. Nothing: the little
    world's prompts, which alone have a rubric."""
    text: tuple[str, ...] = ()
    """Text, as train.py's --data, whose held-out part tells what was forgotten. Nothing: the little world's,
    where the prompts are."""
    errors: Literal["strict", "replace"] = "strict"
    """Stop at data that is not UTF-8 or does not parse, or replace and skip, counting."""
    split: Literal["dev", "test"] = "dev"
    """Prompts of the little world to choose by, or to report on."""
    prompts: Count = 100
    """Of each kind, at most."""
    show: Whole = 1
    """Prompts of each kind to print with every model's reply."""

    temperature: NotNegative = 1.0
    """Of sampling, beside the greedy replies; 0 for those alone."""
    max_new_tokens: Count = 64
    """Tokens of a reply at most."""
    seed: Seed = 0
    """Of the little world, of sampling and of the blind order."""

    judge: tuple[JudgeName, ...] | None = None
    """Who says which of two replies is better, one or several. Default the rubric, where there is one."""
    reward: str = "out/rlhf/reward"
    """--judge reward: the reward model."""
    judge_model: str | None = None
    """--judge model: the model that judges, a run folder or a Hugging Face folder."""
    principles: str = str(annotators.DEFAULT_PRINCIPLES)
    """--judge model: a text file that says what makes a reply better."""
    name: Text = "person"
    """--judge person: your name, under which your judgments are kept in --out."""

    pairs: Count = 100
    """Pairs of a helpful and a harmful reply of each sort, from the little world."""
    text_bytes: Count = 40_000
    """Of held-out text, about."""
    out: str = "out/compare"
    """Where compare.html and compare.json go."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the computation; sampling on a CPU is fastest in float32."""

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.runs:
            raise InputError("no run given: name at least one, as in out/sft")
        if self.data and "rubric" in self.judges:
            raise InputError("--judge rubric: knows the little world's prompts alone; leave --data out")
        if "model" in self.judges and self.judge_model is None:
            raise InputError("--judge model: name a --judge-model, as in out/sft")

    @property
    def judges(self) -> tuple[JudgeName, ...]:
        if self.judge is not None:
            return self.judge
        return () if self.data else ("rubric",)


# ---- What is compared


def open_models(options: Options, runtime: Runtime) -> list[ChatModel]:
    """The models under short names. InputError for one that cannot reply, or that was trained in the little
    world of another seed, whose facts are other ones."""
    models = []
    for name, run in zip(names_of(options.runs), options.runs, strict=True):
        models.append(ChatModel(name, *load_causal_model(Path(run), runtime.device, runtime.dtype)))
        _, trained = read_run(Path(run))
        on_world = not options.data and trained.get("data") == []
        if on_world and (seed := trained.get("seed", options.seed)) != options.seed:
            raise InputError(f"{run}: was trained in the little world of seed {seed}; give --seed {seed}")
    return models


def names_of(runs: Sequence[str]) -> list[str]:
    """The last parts of the paths, or the whole paths where these are not distinct; numbered where one run is
    given several times."""
    shorts = [Path(run).absolute().name for run in runs]
    names = shorts if len(set(shorts)) == len(set(runs)) else list(runs)
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True)]


def open_prompts(
    options: Options, world: World | None, models: Sequence[ChatModel]
) -> tuple[list[Prompt], dict[str, int]]:
    """The little world's prompts, or those of the conversations given, all before their last reply; and how
    many are left out, by reason. InputError where none leaves every model room for a reply."""
    left_out: Counter[str] = Counter()
    if world is not None:
        prompts = prompts_of_each_kind(world, options.split, options.prompts)
    else:
        asked: list[Prompt] = []
        for source in conversations.open_conversations(options.data, "prompt", options.errors):
            asked += [Prompt(messages, UNNAMED, "") for messages in source.documents()]
            left_out += source.skipped
        left_out["prompts beyond --prompts"] = len(asked[options.prompts :])
        prompts = asked[: options.prompts]
    length = options.max_new_tokens
    fit = [prompt for prompt in prompts if all(one.has_room(prompt.messages, length) for one in models)]
    left_out["prompts without room for a reply"] = len(prompts) - len(fit)
    if not fit:
        raise InputError(
            f"no prompt leaves every model room for {length} tokens of reply; give less than "
            f"--max-new-tokens {length}, or shorter prompts"
        )
    return fit, {what: count for what, count in left_out.items() if count}


def open_judge(
    name: JudgeName, options: Options, world: Any, runtime: Runtime, stack: ExitStack
) -> tuple[str, annotators.Judge]:
    """What a judge is called, and the judge."""
    match name:
        case "reward":
            scalar, tokenizer = load_scalar_model(Path(options.reward), runtime.device, runtime.dtype)
            judge = annotators.by_reward(scalar, ChatTemplate(tokenizer))
            return f"the reward model {options.reward}", judge
        case "model":
            principles = annotators.read_principles(Path(options.principles))
            model = load_causal_model(Path(str(options.judge_model)), runtime.device, runtime.dtype)
            return f"the model {options.judge_model}", annotators.ByPrinciples(*model, principles)
        case "person":
            file = stack.enter_context(RankingFile(Path(options.out) / "verdicts.jsonl"))
            return options.name, annotators.by_person(file, options.name, options.seed)
        case _:
            return "the rubric", annotators.by_rubric(world)


# ---- All of it


def compare(options: Options, runtime: Runtime) -> dict[str, Any]:
    """What compare.json holds. All that can be wrong with files shows before the first reply is sampled."""
    began, length, seed = time.perf_counter(), options.max_new_tokens, options.seed
    world = None if options.data else World(seed)
    models = open_models(options, runtime)
    folders = {one.name: run for one, run in zip(models, options.runs, strict=True)}
    prompts, left_out = open_prompts(options, world, models)
    kinds = dict(Counter(prompt.kind for prompt in prompts))
    with_text, origin = options.text or world, ", ".join(options.text) or "the little world"
    sources = text_sources(options.text, seed, WORLD_MEGABYTES, options.errors) if with_text else []
    temperatures = {metrics.GREEDY: 0.0}  # of each way to reply
    if options.temperature:
        temperatures[f"sampled at temperature {options.temperature:g}"] = options.temperature
    with writing(options.out, "give another --out"):
        Path(options.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    with ExitStack() as stack:
        judges = {name: open_judge(name, options, world, runtime, stack) for name in options.judges}
        said = {
            name: {one.name: sample_replies(one, prompts, T, length, seed, world) for one in models}
            for name, T in temperatures.items()
        }
        contests: dict[str, metrics.Rows] = {}
        for name, judge in judges.items():
            # A person judges the last sampling alone: to read every prompt twice is much to ask.
            shown = dict([list(said.items())[-1]]) if name == "person" else said
            contests |= metrics.contests(*judge, prompts, shown)
    pairs = world and metrics.world_pairs(world, options.split, options.pairs)
    sections = {
        "headline": metrics.reply_section("headline" if world else "manner", said),
        "by_kind": world and metrics.by_kind(said, [*kinds]),
        "contests": metrics.Section(contests),
        "manner": world and metrics.reply_section("manner", said),
        "pairs": pairs and metrics.pair_section(models, pairs),
        "cost": metrics.cost_section(models, said, sources, origin, options.text_bytes),
        "sure": world and metrics.sure_section(models, said),
    }
    return {
        "runs": list(folders),
        "folders": folders,
        "options": asdict(options),
        **provenance(),
        "device": str(runtime.device),
        "on_world": world is not None,
        "prompts": kinds,
        "left_out": left_out,
        "metrics": {name: vars(section) for name, section in sections.items() if section},
        "replies": metrics.replies_json(prompts, said),
        "seconds": time.perf_counter() - began,
    }


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        with start_runtime(options.device, options.precision) as runtime:
            content = compare(options, runtime)
        folder = Path(options.out)
        write_json(folder / "compare.json", content)
        write_text(folder / "compare.html", page(content))
        print(terminal_text(content))
        print(f"\n{folder / 'compare.html'}: the page; compare.json beside it has every metric and reply")


if __name__ == "__main__":
    main(sys.argv[1:])
