"""Guess the next word or a hidden one: either way the weights learn the language.

    python lessons/02_masked_words.py

Two models of one shape read the same text in the same number of steps. One guesses every next token, as GPT
does. For the other, 15% of the tokens are hidden, and it guesses these from both sides, as BERT does. Then
both fill in blanks in pages that neither has read, about the same world: in each page one token is missing.

    left       the first model, which sees the text before the blank
    both       the second model, which sees the text before the blank and after it
    right      the share of blanks in which the model's likeliest token is the missing one
    nats       -log p of the missing token

Both are measured half-way and at the end. What would refute the claim: a model that fills in less than half
of the blanks at the end, or no more at the end than half-way. What to notice: seeing both sides helps, but in
each step the first model learns from seven times as many tokens.
"""

from common import CPU, Figures, Options, Seeds, means, script, span, teach
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from minillm.io.huggingface import load_model
from minillm.world import World

SIDES = {"left": "causal", "both": "masked"}
STEPS = (350, 700)
UNREAD = 4000  # articles before these are in the training text
LENGTH = 48  # tokens of a page that are shown


@torch.no_grad()
def blanks(run: Path, pages: list[str]) -> tuple[float, float]:
    """The share of blanks filled in rightly, and the mean -log p of the missing tokens, in nats."""
    model, tokenizer = load_model(run, CPU, torch.float32)
    assert tokenizer.mask_id is not None
    hits, nats = [], []
    for i, page in enumerate(pages):
        tokens = torch.tensor([tokenizer.encode(page)[:LENGTH]])
        blank = 8 + i % (tokens.shape[1] - 8)  # anywhere after the title
        missing = int(tokens[0, blank])
        if model.config.causal:
            hidden = model.model(tokens[:, :blank])[0, -1]  # predicts the next token
        else:
            tokens[0, blank] = tokenizer.mask_id
            hidden = model.model(tokens)[0, blank]
        logprobs = model.logits(hidden).float().log_softmax(-1)
        hits.append(int(logprobs.argmax()) == missing)
        nats.append(-float(logprobs[missing]))
    return float(np.mean(hits)), float(np.mean(nats))


def experiment(options: Options) -> Figures:
    unread = islice(World(options.seed).documents("wiki", 100), UNREAD, UNREAD + options.few(600, 8))
    pages, found = [page for page in unread if len(page) > 150], Figures()
    for side, objective in SIDES.items():
        run = Path(options.out, f"02_seed{options.seed}_{objective}")
        for steps in STEPS:
            goes_on = ("--resume",) if steps > STEPS[0] else ("--overwrite", "--seed", options.seed)
            script(
                "train.py", "--out", run, "--objective", objective, *goes_on,
                "--steps", options.few(steps, 1 + STEPS.index(steps)), "--samples", 0,
            )  # fmt: skip
            right, nats = blanks(run, pages)
            found |= {f"{side}, {steps} steps, right": right, f"{side}, {steps} steps, nats": nats}
    return found


def verdict(one: Figures) -> dict[str, bool]:
    right = {(side, steps): one[f"{side}, {steps} steps, right"] for side in SIDES for steps in STEPS}
    half, end = STEPS
    return {
        "left: at least half of the blanks at the end": right["left", end] >= 0.5,
        "left: more than half-way": right["left", end] > right["left", half],
        "both: at least half of the blanks at the end": right["both", end] >= 0.5,
        "both: more than half-way": right["both", end] > right["both", half],
    }


def sentence(seeds: Seeds) -> str:
    left, both = (span(seeds, *(f"{side}, {steps} steps, right" for steps in STEPS)) for side in SIDES)
    half, end = STEPS
    return f"blanks filled in after {half} and {end} steps: from the left {left}; from both sides {both}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for side in SIDES:
        axes.plot(STEPS, means(seeds, (f"{side}, {steps} steps, right" for steps in STEPS)), "o-", label=side)
    axes.set(xlabel="steps", ylabel="blanks filled in", ylim=(0, 1), title="next word, hidden word")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
