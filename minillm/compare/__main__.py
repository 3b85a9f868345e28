"""What each stage did: the same prompts through several models, side by side, with figures.

    python -m minillm.compare out/base out/sft out/rlhf/ppo             a table here, a page in out/compare
    python -m minillm.compare out/base out/sft --show 2                 and two replies of each kind here
    python -m minillm.compare out/base out/sft --split test             on the prompts to report on
    python -m minillm.compare out/sft out/rlhf/ppo --judge rubric reward model --judge-model out/sft
    python -m minillm.compare out/sft out/rlhf/ppo --judge person       you judge, and do not see whose it is
    python -m minillm.compare out/mine out/helper --data chats.jsonl    your own prompts

Each model is asked in its own form (evaluate.py), greedily and at --temperature, the i-th prompt with the
same seed. Out come compare.json, all figures, and compare.html, a page made from it that needs nothing else.
The figures: measures.py, their intervals; verdicts.py, who wins; probes.py, what the models hold likely;
exhibits.py, which of them are shown, in which order and words.

Left out: figures of more than one sample to a prompt, and of more than one seed of training.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import tyro

if __name__ == "__main__":
    from minillm.errors import end_at_interrupts

    end_at_interrupts()  # before torch, whose import takes seconds

from minillm.compare.exhibits import how, section_text, sections
from minillm.compare.findings import (
    Said,
    contests,
    kl_figures,
    pair_figures,
    replies_json,
    reply_figures,
    sure_figures,
    text_figures,
    training_figures,
    world_pairs,
)
from minillm.compare.page import page
from minillm.compare.verdicts import Referee, by_model, by_person, by_reward, by_rubric
from minillm.data import Source
from minillm.errors import InputError, one_line_errors, printable
from minillm.files import read_json, write_json, write_text
from minillm.generate import SamplingOptions
from minillm.io.conversations import open_conversations
from minillm.io.huggingface import load_causal_model, load_scalar_model
from minillm.io.text import open_sources, world_sources
from minillm.options import options_json, parse_options
from minillm.preferences import RankingFile
from minillm.responses import Respondent
from minillm.run import Runtime, start_runtime
from minillm.tools.evaluate import sample_replies, world_prompts
from minillm.tools.judge import DEFAULT_PRINCIPLES, Judge, read_principles
from minillm.tools.provenance import provenance
from minillm.world import World
from minillm.world.rubric import Prompt

WORLD_MEGABYTES = 12.0  # of its text, some of which training held out
UNNAMED = "prompts"  # the kind of prompts that have none

JudgeName = Literal["rubric", "reward", "model", "person"]


@dataclass(frozen=True)
class Options:
    """Compare models on the same prompts: a table, and a page with all figures."""

    runs: tyro.conf.Positional[tuple[str, ...]]
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
    prompts: int = 100
    """Of each kind, at most."""
    show: int = 1
    """Prompts of each kind to print with every model's reply."""

    temperature: float = 1.0
    """Of sampling, beside the greedy replies; 0 for those alone."""
    max_new_tokens: int = 64
    """Tokens of a reply at most."""
    seed: int = 0
    """Of the little world, of sampling and of the blind order."""

    judge: tuple[JudgeName, ...] | None = None
    """Who says which of two replies is better, one or several. Default the rubric, where there is one."""
    reward: str = "out/rlhf/reward"
    """--judge reward: the reward model."""
    judge_model: str | None = None
    """--judge model: the model that judges, a run folder or a Hugging Face folder."""
    principles: str = str(DEFAULT_PRINCIPLES)
    """--judge model: a text file that says what makes a reply better."""
    name: str = "person"
    """--judge person: your name, under which your verdicts are kept in --out."""

    pairs: int = 100
    """Pairs of a helpful and a harmful reply of each sort, from the little world."""
    text_bytes: int = 40_000
    """Of held-out text, about."""
    out: str = "out/compare"
    """Where compare.html and compare.json go."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the computation; sampling on a CPU is fastest in float32."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run given: name at least one, as in out/sft")
        for name, least in (("prompts", 1), ("show", 0), ("seed", 0), ("pairs", 1), ("text_bytes", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least {least}")
        SamplingOptions(self.max_new_tokens, self.temperature)
        if self.data and "rubric" in self.judges:
            raise InputError("--judge rubric: knows the little world's prompts alone; leave --data out")
        if "model" in self.judges and self.judge_model is None:
            raise InputError("--judge model: name a --judge-model, as in out/sft")
        if not self.name.strip():
            raise InputError("--name: is empty; give a name")

    @property
    def on_world(self) -> bool:
        """Whether the prompts are the little world's."""
        return not self.data

    @property
    def judges(self) -> tuple[JudgeName, ...]:
        if self.judge is not None:
            return self.judge
        return () if self.data else ("rubric",)

    @property
    def samplings(self) -> dict[str, float]:
        """The temperature of each way to reply."""
        return {"greedy": 0.0} | ({"sampled": self.temperature} if self.temperature else {})


# ---- What is compared


def check_out(folder: Path) -> None:
    """InputError where nothing can be written, before anything is computed."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest}: is no folder that can be written; give another --out")


def open_respondents(options: Options, runtime: Runtime) -> list[Respondent]:
    """The models under short names. InputError for one that cannot reply, or that knows another world."""
    respondents = []
    for name, run in zip(names_of(options.runs), options.runs, strict=True):
        respondent = Respondent(name, *load_causal_model(Path(run), runtime.device, runtime.dtype))
        if not options.data:
            check_world(Path(run), options.seed)
        respondents.append(respondent)
    return respondents


def names_of(runs: Sequence[str]) -> list[str]:
    """The last parts of the paths, or the whole paths where these do not tell them apart; numbered where
    one run is given several times."""
    shorts = [Path(run).absolute().name for run in runs]
    apart = len(set(shorts)) == len(set(runs))
    names = shorts if apart else list(runs)
    return [
        name if name not in names[:i] else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def check_world(run: Path, seed: int) -> None:
    """InputError where a run was trained in the little world of another seed, whose facts are other ones."""
    path = run / "run.json"
    trained = read_json(path).get("options") if path.exists() else None
    if isinstance(trained, dict) and trained.get("data") == [] and trained.get("seed", seed) != seed:
        raise InputError(
            f"{run}: was trained in the little world of seed {trained['seed']}; give --seed {trained['seed']}"
        )


def prompts_of(options: Options, world: World | None) -> tuple[list[Prompt], Counter[str]]:
    """The little world's prompts, or those of the conversations given: all before their last reply. And what
    is left out, by reason."""
    if world is not None:
        return world_prompts(world, options.split, options.prompts), Counter()
    prompts, left_out = [], Counter[str]()
    for source in open_conversations(options.data, options.errors):
        left_out += source.skipped
        for conversation in source.conversations():
            prompts.append(Prompt(conversation[:-1], UNNAMED, ""))
    asked = [prompt for prompt in prompts if prompt.messages]
    left_out["replies to nothing"] = len(prompts) - len(asked)
    left_out["prompts beyond --prompts"] = len(asked[options.prompts :])
    return asked[: options.prompts], left_out


def fitting(prompts: Sequence[Prompt], respondents: Sequence[Respondent], options: Options) -> list[Prompt]:
    """The prompts that leave room for a reply in every model's context. InputError where none does."""
    length = options.max_new_tokens
    fit = [p for p in prompts if all(r.has_room(p.messages, length) for r in respondents)]
    if not fit:
        raise InputError(
            f"no prompt leaves every model room for {length} tokens of reply; give less than "
            f"--max-new-tokens {length}, or shorter prompts"
        )
    return fit


def text_of(options: Options, world: World | None) -> tuple[list[Source], str]:
    """The text of which a part was held out, and whose it is; none where none is known."""
    if options.text:
        return open_sources(options.text, options.errors), ", ".join(options.text)
    return [] if world is None else world_sources(world, WORLD_MEGABYTES), "the little world"


def open_referees(
    options: Options, world: World | None, runtime: Runtime, stack: ExitStack
) -> dict[JudgeName, tuple[str, Referee]]:
    """The judges and what they are called, opened before anything is sampled: what is wrong with one shows
    at once."""

    def open_referee(judge: JudgeName) -> tuple[str, Referee]:
        match judge:
            case "reward":
                loaded = load_scalar_model(Path(options.reward), runtime.device, runtime.dtype)
                return f"the reward model {options.reward}", by_reward(*loaded)
            case "model":
                principles = read_principles(Path(options.principles))
                model = load_causal_model(Path(str(options.judge_model)), runtime.device, runtime.dtype)
                return f"the model {options.judge_model}", by_model(Judge(*model, principles))
            case "person":
                file = stack.enter_context(RankingFile(Path(options.out) / "verdicts.jsonl"))
                return options.name, by_person(file, options.name, options.seed)
            case _:
                return "the rubric", by_rubric(world or World(options.seed))

    return {judge: open_referee(judge) for judge in options.judges}


# ---- All of it


def compare(options: Options, runtime: Runtime) -> dict[str, Any]:
    """What compare.json holds."""
    began = time.perf_counter()
    check_out(Path(options.out))
    world = World(options.seed) if options.on_world else None
    respondents = open_respondents(options, runtime)
    folders = {respondent.name: run for respondent, run in zip(respondents, options.runs, strict=True)}
    offered, left_out = prompts_of(options, world)
    prompts = fitting(offered, respondents, options)
    left_out["prompts without room for a reply"] = len(offered) - len(prompts)
    sources, origin = text_of(options, world)
    with ExitStack() as stack:
        referees = open_referees(options, world, runtime, stack)
        said = ask(respondents, prompts, options)
        judged = [
            contest
            for judge, (name, referee) in referees.items()
            for contest in contests(name, referee, prompts, shown_to(judge, said), options.seed)
        ]
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    pairs = {} if world is None else world_pairs(world, options.split, options.pairs)
    return {
        "runs": list(folders),
        "folders": folders,
        "options": options_json(options),
        **provenance(),
        "device": str(runtime.device),
        "on_world": options.on_world,
        "prompts": {kind: sum(prompt.kind == kind for prompt in prompts) for kind in kinds},
        "left_out": {what: count for what, count in left_out.items() if count},
        "samplings": options.samplings,
        "figures": reply_figures(prompts, said, world),
        "contests": judged,
        "pairs": pair_figures(respondents, pairs),
        "text": text_figures(respondents, sources, origin, options.text_bytes),
        "kl": kl_figures(respondents, prompts, said),
        "sure": {} if world is None else sure_figures(respondents, prompts, said, world, options.seed),
        "training": training_figures(folders),
        "replies": replies_json(prompts, said, world),
        "seconds": time.perf_counter() - began,
    }


def ask(respondents: Sequence[Respondent], prompts: Sequence[Prompt], options: Options) -> Said:
    """Every model's reply to every prompt, in each way to sample."""
    asked = [prompt.messages for prompt in prompts]
    return {
        sampling: {
            one.name: list(
                sample_replies(
                    one.model, one.tokenizer, asked, temperature, options.max_new_tokens, options.seed
                )
            )
            for one in respondents
        }
        for sampling, temperature in options.samplings.items()
    }


def shown_to(judge: JudgeName, said: Said) -> Said:
    """A person judges the replies of the last sampling alone: to read every prompt twice is much to ask."""
    last = list(said)[-1]
    return {last: said[last]} if judge == "person" else said


def side_by_side(content: dict[str, Any], count: int) -> str:
    """The first `count` prompts of every kind, with what each model said."""
    lines = []
    width = max(map(len, content["runs"]))
    for kind in content["prompts"] if count else ():
        for record in [one for one in content["replies"] if one["kind"] == kind][:count]:
            lines.append(f"\n{kind}: {_one_line(record['prompt'])}")
            for sampling, of_model in record["said"].items():
                lines.append(f"  {how(content, sampling)}")
                lines += [f"    {name:{width}}  {_one_line(said['text'])}" for name, said in of_model.items()]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return shorten(" ".join(printable(text).split()), 100, placeholder=" …")


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        with start_runtime(options.device, options.precision) as runtime:
            content = compare(options, runtime)
        folder = Path(options.out)
        write_json(folder / "compare.json", content)
        write_text(folder / "compare.html", page(content))
        print("\n\n".join(section_text(section) for section in sections(content) if section.tables))
        print(side_by_side(content, options.show))
        print(f"\n{folder / 'compare.html'}: the page; compare.json beside it has every figure and reply")


if __name__ == "__main__":
    main(sys.argv[1:])
