"""What the lessons share: their options, the runs that they read, and what each leaves behind.

    python lessons/common.py lessons/records        the table of lessons/README.md, from these records

A lesson is a script with four functions, which `teach` calls:

    experiment(options)     → figures of one seed, by name
    verdict(one)            → what the claim must pass by the figures of one seed, and whether it does
    sentence(seeds)         → what was found, in one line
    picture(axes, seeds)    draws the figures of all seeds

The record, NAME.json, holds the figures of every seed with commit, versions and hardware; NAME.png is the
picture. A check is passed if every seed passes it. A seed is not measured again while the lesson's code down
to `experiment` and the runs that it read are the same.
"""

import ast
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # beside which minillm is

import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

# isort: split

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.chat import ChatTemplate, Conversation
from minillm.digest import digest
from minillm.errors import InputError
from minillm.generate import SamplingOptions
from minillm.io.disk import read_json, read_text, write_json, write_text
from minillm.io.huggingface import load_causal_model, load_scalar_model
from minillm.model import score_rows
from minillm.preferences import ChatModel, Ranking, ResponseSet
from minillm.reward import encode_response
from minillm.tools.chat import Chat
from minillm.tools.chat import Options as ChatOptions
from minillm.tools.commandline import parse_options
from minillm.tools.ending import one_line_errors
from minillm.tools.evaluate import token_values
from minillm.tools.plots import save
from minillm.tools.provenance import provenance
from minillm.tools.stage import script as script
from minillm.tools.streams import columns
from minillm.world import user
from minillm.world.facts import Entity, Facts, pick, shuffled, state

CPU = torch.device("cpu")
STAGES = {"base": "base", "sft": "sft", "ppo": "rlhf/ppo"}
"""What `make demo` makes, and where in --runs."""

Figures = dict[str, float]
Seeds = Sequence[Figures]


@dataclass(frozen=True)
class Options:
    """Measure one claim about how language models are trained."""

    runs: str = "out"
    """The folder in which make demo left base, sft and rlhf."""
    seed: int = 0
    """The seed that they were made with; also that of the little world."""
    quick: bool = False
    """A few prompts and steps, which show that the lesson runs and nothing else."""
    out: str = "out/lessons"
    """Where the record, the picture and the lesson's own runs go."""

    def run(self, stage: str) -> Path:
        """The folder of one of the demo's runs."""
        return Path(self.runs, STAGES.get(stage, stage))

    def few(self, many: int, some: int) -> int:
        """How many prompts, steps …: `many`, or with --quick `some`."""
        return some if self.quick else many


# ---- What models know and prefer


def load(run: Path) -> ChatModel:
    """The model of a run folder, with the format in which it is asked."""
    return ChatModel(run.name, *load_causal_model(run, CPU, torch.float32))


def converse(model: ChatModel, prompts: Any, tools: Any, how: SamplingOptions, seeds: Any) -> list[Any]:
    """What follows each prompt: calls of the tools, their results, and the reply."""
    options = ChatOptions(max_new_tokens=how.max_new_tokens, temperature=how.temperature)
    chat, found = Chat(model.model, model.tokenizer, options), []
    chat.tools, chat.seeds = tools, iter(seeds)
    for prompt in prompts:
        chat.messages = tuple(prompt[:-1])
        for _ in chat.events(prompt[-1]):
            pass
        found.append(list(chat.messages[len(prompt) :]))
    return found


def response_logprobs(model: ChatModel, sets: Sequence[ResponseSet]) -> list[np.ndarray]:
    """log p of every response of each set, in nats, without its end token."""
    rows = [
        (model.prompt(one.messages), model.tokenizer.encode(text)) for one in sets for text in one.responses
    ]
    sums = iter([float(values.sum()) for values in token_values(model.model, rows)])
    return [np.array([next(sums) for _ in one.responses]) for one in sets]


def scores_of(run: Path, sets: Sequence[ResponseSet]) -> np.ndarray:
    """What the reward model of a run folder gives each response of each set. Float [sets, responses]."""
    model, tokenizer = load_scalar_model(run, CPU, torch.float32)
    template = ChatTemplate(tokenizer)
    rows = [encode_response(template, one.messages, text) for one in sets for text in one.responses]
    return np.reshape(score_rows(model, rows), (len(sets), -1))


def known(model: ChatModel, questions: Sequence[ResponseSet]) -> float:
    """The share of questions whose right answer, which is the first of each, is the likeliest."""
    return float(np.mean([own.argmax() == 0 for own in response_logprobs(model, questions)]))


def choice(model: ChatModel, questions: Sequence[ResponseSet]) -> np.ndarray:
    """How probable each answer is, of a question's. Float [questions, answers]."""
    logprobs = torch.from_numpy(np.stack(response_logprobs(model, questions)))
    return logprobs.softmax(-1).numpy()


def page_question(attribute: str, one: Entity, values: Iterable[str], before: str = "") -> ResponseSet:
    """A question and an answer for each value, as on the world's pages of questions, behind another text."""
    said = [f"A: {state(attribute, one, value, 'answers')[0]}" for value in values]
    return ResponseSet([user(f"{before}Q: {state(attribute, one, key='asks')[0]}")], said)


def fact_questions(seed: int, count: int) -> list[ResponseSet]:
    """Questions about facts of a world, none of them in a demonstration. Each has eight answers in the same
    words, the right one first."""
    facts, rng, found = Facts(seed), random.Random(seed), []
    for fact in shuffled(rng, [fact for fact in facts.facts if fact.entity.split == "test"])[:count]:
        others = [one for one in facts.values[fact.attribute] if one not in (fact.value, fact.entity.name)]
        values = (fact.value, *shuffled(rng, others)[:7])
        said = [state(fact.attribute, fact.entity, value, "answers")[0] for value in values]
        found.append(ResponseSet([user(pick(rng, fact.asks))], said))
    return found


# ---- What they are trained on


def write_lines(path: Path, records: Iterable[object]) -> Path:
    """The file, with a line of JSON for each record."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return path


def reads_on(
    options: Options, name: str, texts: Sequence[str], rates: Sequence[float] = (0.01, 0.005), *how: object
) -> Path:
    """The run of a base model that has gone on with these texts, in about one pass, at these rates for
    matrices and embeddings. One that was made before in the same way is finished or used again."""
    of = digest(run_id(options.run("base")), *texts, *rates, *how)
    run = Path(options.out, f"{name}_seed{options.seed}_{of[:8]}")
    data = write_lines(run.with_suffix(".jsonl"), ({"text": text} for text in texts))
    script(
        "train.py", "--init", options.run("base"), "--data", data, "--out", run, *how,
        "--steps", options.few(sum(map(len, texts)) // 3500, 3),  # 3,500 characters are some 1,024 tokens
        "--matrix-rate", rates[0], "--embedding-rate", rates[1], *["--resume"] * (run / "run.json").exists(),
    )  # fmt: skip
    return run


def imitates(options: Options, run: Path, shown: Iterable[Conversation], steps: int, init: str) -> Path:
    """The run in this folder: `init`, one of the demo's, fine-tuned on these demonstrations."""
    data = write_lines(run.with_suffix(".jsonl"), ({"messages": messages} for messages in shown))
    script(
        "sft.py", "--init", options.run(init), "--data", data, "--out", run, "--seed", options.seed,
        "--steps", options.few(steps, 3), "--overwrite",
    )  # fmt: skip
    return run


def learns(options: Options, run: Path, rankings: Iterable[Ranking]) -> Path:
    """The reward model, inside a folder of this name, that the assistant becomes by these rankings."""
    data = write_lines(run.with_suffix(".jsonl"), map(vars, rankings))
    script(
        "rlhf.py", "--stage", "reward", "--rankings", data, "--init", options.run("sft"), "--out", run,
        "--seed", options.seed, "--overwrite",
    )  # fmt: skip
    return run / "reward"


# ---- What is said of the figures


def means(seeds: Seeds, names: Iterable[str]) -> list[float]:
    """Each figure's mean over the seeds."""
    return [fmean(one[name] for one in seeds) for name in names]


def span(seeds: Seeds, *names: str, form: str = "{:.0%}") -> str:
    """Means over the seeds, each with the least and the most if there are several: 48% (45%–50%) → 6%."""
    said = []
    for name in names:
        values = sorted(one[name] for one in seeds)
        around = f" ({form.format(values[0])}–{form.format(values[-1])})" if len(values) > 1 else ""
        said.append(form.format(fmean(values)) + around)
    return " → ".join(said)


def teach(
    experiment: Callable[[Options], Figures],
    verdict: Callable[[Figures], dict[str, bool]],
    sentence: Callable[[Seeds], str],
    picture: Callable[[Axes, Seeds], None],
) -> None:
    """Measures one seed, says what all seeds so far have shown, and writes the record and the picture."""
    lesson = Path(sys.argv[0])
    with one_line_errors():
        options: Options = parse_options(Options, sys.argv[1:])
        claim = " ".join(str(sys.modules["__main__"].__doc__).split("\n\n")[0].split())
        print(claim, flush=True)
        path = Path(options.out, "quick" if options.quick else "", f"{lesson.stem}.json")
        measured: dict[str, Any] = read_json(path)["seeds"] if path.exists() else {}
        runs = [options.run(one) for one in STAGES]
        ids = [run_id(run) for run in runs if run == runs[0] or (run / "run.json").exists()]
        seed, of = str(options.seed), digest(decisive(read_text(lesson)), *ids)
        if measured.get(seed, {}).get("of") != of:
            began = time.perf_counter()
            own = {"figures": experiment(options), "of": of, "seconds": time.perf_counter() - began}
            measured[seed] = own | provenance()

        seeds = [one["figures"] for _, one in sorted(measured.items())]
        said = {"claim": claim, **conclusion(verdict, seeds), "sentence": sentence(seeds)}
        write_json(path, {"lesson": lesson.stem, **said, "seeds": measured})
        figure = Figure(figsize=(6, 4), layout="constrained")
        picture(axes := figure.add_subplot(), seeds)
        axes.legend()
        save(figure, path.with_suffix(".png"))

        rows = [[name, span(seeds, name, form="{:.3g}")] for name in seeds[0]]
        print(columns([["", "mean (least–most)"], *rows]))
        for check, passed in said["checks"].items():
            print(f"{'yes' if passed else 'NO':4}{check}")
        print(f"{said['verdict']}: {said['sentence']} (seeds {', '.join(sorted(measured))})")


def decisive(text: str) -> str:
    """What decides the figures of a lesson: its code down to `experiment`, without imports and comments."""
    code = ast.parse(text).body
    end = [getattr(node, "name", "") for node in code].index("experiment") + 1
    words = ast.Import | ast.ImportFrom | ast.Expr
    return "\n".join(ast.unparse(node) for node in code[:end] if not isinstance(node, words))


def conclusion(verdict: Callable[[Figures], dict[str, bool]], seeds: Seeds) -> dict[str, Any]:
    """Which checks all seeds pass, and in a word what that says of the claim."""
    each = [verdict(one) for one in seeds]
    checks = {check: all(bool(one[check]) for one in each) for check in each[0]}
    word = "holds in part" if any(checks.values()) else "does not hold"
    return {"verdict": "holds" if all(checks.values()) else word, "checks": checks}


def run_id(run: Path) -> str:
    """The id of the run in a folder, another for each run made there. InputError where there is none."""
    if not (run / "run.json").exists():
        raise InputError(f"{run}: no such run; make demo makes it, or name its folder with --runs")
    return str(read_json(run / "run.json").get("id"))


def table(folder: Path) -> str:
    """The records of a folder as a table in Markdown: claim, verdict, figures."""
    rows = ["| lesson | claim | verdict | what was found |", "|---|---|---|---|"]
    for path in sorted(folder.glob("[0-9]*.json")):
        one = read_json(path)
        link, seeds = f"[{one['lesson']}]({one['lesson']}.py)", ", ".join(sorted(one["seeds"]))
        rows.append(f"| {link} | {one['claim']} | {one['verdict']} | {one['sentence']} (seeds {seeds}) |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
