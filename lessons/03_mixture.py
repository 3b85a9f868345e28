"""Text from many sources makes a model that knows many kinds of text.

    python lessons/03_mixture.py

Seven small models are trained from nothing. The first reads from all sources, by the shares of tokens that
were published for LLaMA-1 (Touvron et al. 2023, table 1); the little world's six sources stand for its seven,
and the web for both of the first two. The others leave one of the six out each. Nothing else changes: of the
sources that are left they read as many tokens as before, in fewer steps. All are tested on pages of every
source that none has read, in nats a byte.

    asked, drawn    a source's share of the tokens: by its weight, and in what the first model has read
    with all        the loss on this source's pages of the model that has read from all
    without it      the same of the model that has read none of its pages: what is lost
    the others      the loss of that model on the other sources' pages, above that of the first, in percent:
                    more than 0 where this source helps to read the others

What would refute the claim: a source whose pages are read as well (less than 10% more nats) by a model that
has seen none of them; a source that does not help the others; shares 3 points off their weights.
"""

from common import Figures, Options, Seeds, load, means, script, span, teach, write_lines
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from minillm.corpus import split_documents
from minillm.tools.evaluate import token_values
from minillm.tools.folder import read_metrics
from minillm.world import SHARES, World

LLAMA = {
    "CommonCrawl": ("web", 67.0), "C4": ("web", 15.0), "GitHub": ("code", 4.5), "Wikipedia": ("wiki", 4.5),
    "Books": ("books", 4.5), "ArXiv": ("papers", 2.5), "StackExchange": ("qa", 2.0),
}  # fmt: skip


def losses(run: Path, tests: dict[str, list[str]]) -> dict[str, float]:
    """Of every source, the nats a byte of the first tokens of its pages."""
    model, found = load(run), {}
    for source, pages in tests.items():
        said = [model.tokenizer.encode(page)[:127] for page in pages]
        values = token_values(model.model, [(model.form.prompt([{"content": ""}]), own) for own in said])
        size = sum(len(model.tokenizer.decode_bytes(own)) for own in said)
        found[source] = -float(sum(own.sum() for own in values)) / size
    return found


def experiment(options: Options) -> Figures:
    world, folder, few = World(options.seed), Path(options.out, f"03_seed{options.seed}"), options.few
    pages, tests, nats = {}, {}, {}
    for name in SHARES:
        split = list(split_documents(world.documents(name, 1.2 if name == "web" else 0.25), 0.2))
        pages[name], held_out = ([page for side, page in split if side == own] for own in ("train", "val"))
        tests[name] = held_out[: few(50, 4)]
    fifth, texts = len(pages["web"]) // 5, {name: pages[source] for name, (source, _) in LLAMA.items()}
    texts |= {"C4": pages["web"][:fifth], "CommonCrawl": pages["web"][fifth:]}
    for name, own in {**texts, "tests": [page for some in tests.values() for page in some]}.items():
        write_lines(folder / f"{name}.jsonl", ({"text": page} for page in own))
    for left_out in ("nothing", *SHARES):
        kept = {name: weight for name, (source, weight) in LLAMA.items() if source != left_out}
        script(
            "train.py", "--data", *(f"{name}={folder / name}.jsonl:{kept[name]}" for name in kept),
            "--val-data", folder / "tests.jsonl", "--steps", round(few(160, 8) * sum(kept.values()) / 100),
            "--seed", options.seed, "--out", folder / left_out, "--overwrite",
        )  # fmt: skip
        nats[left_out] = losses(folder / left_out, tests)
    found = Figures()
    for one in read_metrics(folder / "nothing")[-1]["sources"]:
        found[f"{one['name']}, asked"], found[f"{one['name']}, drawn"] = one["share"], one["realised"]
    for source in SHARES:
        found[f"{source}, with all"] = nats["nothing"][source]
        found[f"{source}, without it"] = nats[source][source]
        rest = [nats[source][other] / nats["nothing"][other] - 1 for other in SHARES if other != source]
        found[f"{source}, the others"] = float(np.mean(rest))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    drawn = {name: abs(one[f"{name}, drawn"] - one[f"{name}, asked"]) for name in LLAMA}
    return {
        "every source's pages cost at least 10% more without it": all(
            one[f"{source}, without it"] >= 1.1 * one[f"{source}, with all"] for source in SHARES
        ),
        "every source helps to read the others": all(one[f"{source}, the others"] > 0 for source in SHARES),
        "shares are drawn as asked, within 3 points": max(drawn.values()) <= 0.03,
    }


def sentence(seeds: Seeds) -> str:
    said = []
    for source in SHARES:
        nats = span(seeds, f"{source}, with all", f"{source}, without it", form="{:.2f}")
        said.append(f"{source} {nats} (the others {span(seeds, f'{source}, the others', form='{:+.1%}')})")
    return f"nats a byte with all → without it: {', '.join(said)}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for name in ("with all", "without it"):
        axes.plot(list(SHARES), means(seeds, (f"{source}, {name}" for source in SHARES)), "o", label=name)
    axes.set(ylim=(0, None), ylabel="nats a byte of its pages", title="mixture")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
