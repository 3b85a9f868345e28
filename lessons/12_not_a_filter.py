"""Alignment is not a filter in front of a model: it is in the weights.

    python lessons/12_not_a_filter.py

A filter would be a part that one can take away. Three things that a filter could not do are tried:

    halfway     the mean of the assistant's weights and the aligned model's: is that model aligned by half?
    best of 8   the filter that alignment is not: the assistant answers eight times and the reward model picks
    text        100 more steps of plain pretraining text at the rate that aligning had: does it wear off?

Judged by the rubric (0 to 1) on replies at temperature 1 to prompts that no stage has seen.

What would refute the claim: weights halfway that are no better than the assistant; a policy that does worse
than the filter, which costs eight times as much; alignment gone after a little text (less than half is left).
"""

from common import CPU, Figures, Options, Seeds, load, means, script, span, teach
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from minillm.chat import ChatTemplate
from minillm.io.huggingface import load_scalar_model
from minillm.model import score_rows
from minillm.preferences import ChatModel
from minillm.reward import encode_response
from minillm.tools.evaluate import prompts_of_each_kind, sample_replies
from minillm.world import World

N = 8


def experiment(options: Options) -> Figures:
    world = World(options.seed)
    asked = prompts_of_each_kind(world, "test", options.few(60, 2))

    def rubric(model: ChatModel) -> float:
        replies = sample_replies(model, asked, 1.0, seed=options.seed, world=world)
        return float(np.mean([one.utility for one in replies]))

    assistant, aligned = load(options.run("sft")), load(options.run("ppo"))
    halfway = ChatModel("halfway", deepcopy(assistant.model), assistant.tokenizer)
    with torch.no_grad():
        for middle, end in zip(halfway.model.parameters(), aligned.model.parameters(), strict=True):
            middle.lerp_(end, 0.5)

    judge, _ = load_scalar_model(options.run("rlhf/reward"), CPU, torch.float32)
    tries = [prompt for prompt in asked for _ in range(N)]
    replies = sample_replies(assistant, tries, 1.0, seed=options.seed, world=world)
    template = ChatTemplate(assistant.tokenizer)
    scores = score_rows(judge, [encode_response(template, r.prompt.messages, r.text) for r in replies])
    picked = [replies[i + int(np.argmax(scores[i : i + N]))] for i in range(0, len(replies), N)]

    run = Path(options.out, f"12_seed{options.seed}_text")
    script(
        "train.py", "--init", options.run("ppo"), "--out", run, "--overwrite", "--seed", options.seed,
        "--steps", options.few(100, 2), "--optimizer", "adamw",
        "--matrix-rate", 5e-4, "--embedding-rate", 5e-4,
    )  # fmt: skip
    return {
        "assistant": rubric(assistant),
        "halfway": rubric(halfway),
        "aligned": rubric(aligned),
        f"best of {N}": float(np.mean([one.utility for one in picked])),
        "aligned, then text": rubric(load(run)),
    }


def verdict(one: Figures) -> dict[str, bool]:
    middle = (one["assistant"] + one["aligned"]) / 2
    return {
        "halfway weights are better than the assistant's": one["halfway"] > one["assistant"],
        f"one reply of the policy is as good as the best of {N}, within 0.05": one["aligned"]
        >= one[f"best of {N}"] - 0.05,
        "after 100 steps of text more than half of the gain is left": one["aligned, then text"] > middle,
    }


def sentence(seeds: Seeds) -> str:
    return "rubric: " + ", ".join(f"{name} {span(seeds, name, form='{:.2f}')}" for name in seeds[0])


def picture(axes: Axes, seeds: Seeds) -> None:
    axes.bar(list(seeds[0]), means(seeds, seeds[0]), label="rubric, temperature 1")
    axes.tick_params(axis="x", labelrotation=20)
    axes.set(ylim=(0, 1), title="not a filter")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
