"""Fine-tuning reshapes how a model answers and leaves what it knows.

    python lessons/07_format_not_knowledge.py

What the base model knows is measured without asking it anything: of eight answers to a question of fact,
which does it find likeliest? The assistant is measured in the same way, and then asked. Between the two we
look at the weights, and at how few different demonstrations it takes until replies have the form of an
answer, each time in 300 steps (which see less than half of 16,000).

    known       the right one of eight answers is the likeliest (chance: 12%)
    in form     a greedy reply that ends by itself, as one speaker's answer
    said        in form, and the fact is right
    moved       how far weights went, as a share of their length: ‖after - before‖ / ‖before‖

What would refute the claim: facts that the assistant knows and the base model did not, or the other way
round, by more than 3 points; a form that fewer than nine of ten replies have after 100 demonstrations;
facts that are known and after 16,000 are not said (more than 5 points).
"""

from common import Figures, Options, Seeds, fact_questions, known, load, means, script, span, teach
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from minillm.tools.evaluate import sample_replies
from minillm.world import World

DEMONSTRATIONS = (10, 100, 1000, 16000)
PARTS = {"words": ("embed_tokens", "lm_head"), "attention": ("self_attn",), "mlp": ("mlp",)}


def experiment(options: Options) -> Figures:
    world = World(options.seed)
    facts = world.prompts("test", "fact", options.few(200, 8))
    found: Figures = {}
    for stage in ("base", "sft"):
        questions = fact_questions(options.seed, len(facts))
        found[f"{stage}, known"] = known(load(options.run(stage)), questions)
    before, after = (load(options.run(stage)).model.state_dict() for stage in ("base", "sft"))
    for part, names in PARTS.items():
        own = [name for name in before if any(word in name for word in names)]
        moved = sum(float((after[name] - before[name]).square().sum()) for name in own)
        found[f"moved, {part}"] = (moved / sum(float(before[name].square().sum()) for name in own)) ** 0.5
    for count in DEMONSTRATIONS:
        run = Path(options.out, f"07_seed{options.seed}_{count}")
        script(
            "sft.py", "--init", options.run("base"), "--out", run, "--seed", options.seed, "--overwrite",
            "--world-conversations", count, "--steps", options.few(300, 3), "--eval-prompts", 0,
        )  # fmt: skip
        replies = sample_replies(load(run), facts, world=world)
        found[f"{count} shown, in form"] = float(np.mean([one.in_form for one in replies]))
        found[f"{count} shown, said"] = float(np.mean([one.right for one in replies]))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    base, sft = one["base, known"], one["sft, known"]
    return {
        "as many facts are known after as before, within 3 points": abs(sft - base) <= 0.03,
        "a hundred demonstrations give nine of ten replies the form": one["100 shown, in form"] >= 0.9,
        "from 16,000 the facts are said that were known, within 5 points": one["16000 shown, said"]
        >= base - 0.05,
    }


def sentence(seeds: Seeds) -> str:
    shown = ", ".join(span(seeds, f"{count} shown, in form") for count in DEMONSTRATIONS)
    facts = span(seeds, "base, known", "sft, known")
    return f"facts known {facts}; in form after 10, 100, 1,000, 16,000 demonstrations: {shown}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("in form", "said"):
        axes.plot(
            DEMONSTRATIONS, means(seeds, (f"{n} shown, {name}" for n in DEMONSTRATIONS)), "o-", label=name
        )
    axes.axhline(*means(seeds, ["base, known"]), linestyle=":", label="known to the base model")
    axes.set(xscale="log", xlabel="demonstrations", ylim=(0, 1.02), title="format, not knowledge")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
