"""A model can make its own training examples, as long as somebody sorts out the bad ones.

    python lessons/14_synthetic_data.py

All assistants here are the base model, fine-tuned in as many steps on different demonstrations:

    a tenth       1,600 of the little world's, which are as people might have written them
    all           16,000 of them
    filtered      the tenth, and 3,000 replies of the assistant that it made: to each prompt it replied four
                  times, and the reward model picked one
    generation n  1,600 replies of generation n - 1 and nothing else, as they come; generation 0 is the tenth

Judged by the rubric (0 to 1) on replies at temperature 1 to prompts that no stage has seen. "different" is
the share of replies that are unlike every earlier one.

What would refute the claim: own examples, sorted, that close less than half of the gap between a tenth and
all; unsorted ones that do no harm (less than 0.02 in three generations).
"""

import json
from pathlib import Path

import numpy as np
import torch
from common import CPU, Figures, Options, Seeds, Verdict, load, script, span, teach
from matplotlib.axes import Axes

from minillm.chat import ChatTemplate
from minillm.files import write_text
from minillm.io.huggingface import load_scalar_model
from minillm.reward import encode_response, score_rows
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World

GENERATIONS = (1, 2, 3)
Messages = list[dict[str, str]]


def experiment(options: Options) -> Figures:
    world, found = World(options.seed), Figures()
    asked = prompts_of_each_kind(world, "test", options.few(60, 2))
    tenth = [one.messages for one in world.conversations("train", options.few(1600, 20))]
    prompts = world.prompts("train", n=options.few(3000, 20))

    def assistant(name: str, shown: list[Messages]) -> Path:
        """The base model after these demonstrations; its figures are found on the way."""
        run = Path(options.out, f"14_seed{options.seed}_{name.replace(' ', '_')}")
        data = run.with_suffix(".jsonl")
        write_text(data, "".join(json.dumps({"messages": messages}) + "\n" for messages in shown))
        script(
            "sft.py", "--init", options.run("base"), "--data", data, "--out", run, "--overwrite",
            "--seed", options.seed, "--steps", options.few(300, 3),
        )  # fmt: skip
        replies = sample_replies(load(run), asked, 1.0, seed=options.seed, world=world)
        found[f"{name}, rubric"] = float(np.mean([one.utility for one in replies]))
        found[f"{name}, different"] = len({one.text for one in replies}) / len(replies)
        return run

    def own(run: Path, tries: int, count: int) -> list[list[Messages]]:
        """To each prompt so many conversations of it and a reply of the run's, less those without a word."""
        repeated = [prompt for prompt in prompts[:count] for _ in range(tries)]
        replies = sample_replies(load(run), repeated, 1.0, seed=options.seed)
        said = [[*r.prompt.messages, {"role": "assistant", "content": r.text}] for r in replies]
        groups = [said[i : i + tries] for i in range(0, len(said), tries)]
        return [full for group in groups if (full := [one for one in group if one[-1]["content"].strip()])]

    first = assistant("a tenth", tenth)
    assistant("all", [one.messages for one in world.conversations("train", options.few(16000, 40))])

    judge, tokenizer = load_scalar_model(options.run("rlhf/reward"), CPU, torch.float32)
    template, tries = ChatTemplate(tokenizer), own(first, 4, len(prompts))
    rows = [encode_response(template, said[:-1], said[-1]["content"]) for group in tries for said in group]
    scores = iter(score_rows(judge, rows))
    best = [group[int(np.argmax([next(scores) for _ in group]))] for group in tries]
    assistant("filtered", tenth + best)

    run = first
    for generation in GENERATIONS:
        run = assistant(f"generation {generation}", [said for (said,) in own(run, 1, len(tenth))])
    return found


def verdict(seeds: Seeds) -> Verdict:
    last = f"generation {GENERATIONS[-1]}"
    closed = [
        (one["filtered, rubric"] - one["a tenth, rubric"]) / (one["all, rubric"] - one["a tenth, rubric"])
        for one in seeds
    ]
    checks = {
        "sorted, its own examples close at least half of the gap": min(closed) >= 0.5,
        "unsorted, three generations lose at least 0.02": all(
            one[f"{last}, rubric"] <= one["a tenth, rubric"] - 0.02 for one in seeds
        ),
    }
    names = ("a tenth", "filtered", "all", *(f"generation {n}" for n in GENERATIONS))
    return checks, "rubric: " + ", ".join(
        f"{name} {span(seeds, f'{name}, rubric', '{:.2f}')}" for name in names
    )


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("rubric", "different"):
        keys = [key for key in seeds[0] if key.endswith(name)]
        values = np.mean([[one[key] for key in keys] for one in seeds], axis=0)
        axes.plot([key.split(",")[0] for key in keys], values, "o", label=name)
    axes.tick_params(axis="x", labelrotation=20)
    axes.set(ylim=(0, 1), title="synthetic data")


if __name__ == "__main__":
    teach(experiment, verdict, picture)
