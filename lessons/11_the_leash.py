"""A penalty for drifting away keeps a policy from exploiting its reward model.

    python lessons/11_the_leash.py

PPO maximises what the reward model says, less β for every nat of KL from the assistant it started as: β is
the leash. The same assistant is aligned with leashes of four lengths, and what comes out is judged twice, by
the reward model that paid for it and by the rubric that nobody trained on.

    score     the reward model's, on held-out prompts
    rubric    what the little world says of the same replies, from 0 to 1
    KL        nats a response from the assistant

What would refute the claim: a KL that does not fall as β rises; no leash at all being as good by the rubric
as the best one. Where the score rises and the rubric falls, the reward model is being exploited: look whether
that happens without a leash.
"""

from common import Figures, Options, Seeds, means, script, span, teach
from pathlib import Path

from matplotlib.axes import Axes

from minillm.tools.folder import read_metrics

LEASHES = (0, 0.05, 0.15, 1.5)


def experiment(options: Options) -> Figures:
    found = Figures()
    for beta in LEASHES:
        out = Path(options.out, f"11_seed{options.seed}_{beta}")
        script(
            "rlhf.py", "--stage", "policy", "--out", out, "--init", options.run("sft"), "--overwrite",
            "--reward", options.run("rlhf/reward"), "--seed", options.seed, "--beta", beta, "--keep", "last",
            "--iterations", options.few(40, 2), "--val-prompts", options.few(256, 8),
        )  # fmt: skip
        final = next(event for event in read_metrics(out / "ppo") if event["event"] == "final")
        for name, key in (("score", "score"), ("rubric", "rubric"), ("KL", "kl")):
            found[f"β {beta}, {name}"] = final[key]
    return found


def verdict(one: Figures) -> dict[str, bool]:
    score, rubric, kl = ([one[f"β {beta}, {name}"] for beta in LEASHES] for name in ("score", "rubric", "KL"))
    return {
        "the longer the leash, the farther it goes": kl == sorted(kl, reverse=True),
        "by the rubric a leash is better than none": max(rubric) > rubric[0],
        "without one the score is the highest and the rubric is not: exploited": max(score) == score[0]
        and max(rubric) > rubric[0],
    }


def sentence(seeds: Seeds) -> str:
    def of(name: str) -> str:
        return span(seeds, name, form="{:.2f}")

    return "; ".join(f"β {b:g}: KL {of(f'β {b}, KL')}, rubric {of(f'β {b}, rubric')}" for b in LEASHES)


def picture(axes: Axes, seeds: Seeds) -> None:
    root_kl = [max(0, kl) ** 0.5 for kl in means(seeds, (f"β {beta}, KL" for beta in LEASHES))]
    for name in ("score", "rubric"):
        values = means(seeds, (f"β {beta}, {name}" for beta in LEASHES))
        axes.plot(root_kl, values, "o-", label=name)
    for x, y, beta in zip(root_kl, values, LEASHES, strict=True):
        axes.annotate(f"β {beta:g}", (x, y), textcoords="offset points", xytext=(0, -14))
    axes.set(xlabel="√KL from the assistant, nats a response", title="the leash")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
