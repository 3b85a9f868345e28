"""What aligning does to the assistant, over seeds and with one thing changed at a time.

    python benchmarks/policy.py --folder out/x --seeds 0 1 2 3 4 --variants ppo --json benchmarks/policy.json
    python benchmarks/policy.py --folder out/x --seeds 0 1 2 --json benchmarks/ablations.json

Every seed is a world, a base model, an assistant, rankings and a reward model of its own, made by the scripts
with their default options; what exists already is used. Each variant starts from those, and is compared with
the assistant by minillm.compare, on test prompts of the little world that no stage has seen. Shown are means
over the seeds of what it has in short.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import parser, write

from minillm.io.disk import read_json
from minillm.tools.ending import one_line_errors
from minillm.tools.folder import read_metrics
from minillm.tools.stage import script
from minillm.tools.streams import tables

VARIANTS = {name: options.split() for name, options in tables(__file__).items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="where all runs are kept")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--variants", nargs="*", default=[*VARIANTS], choices=[*VARIANTS])
    arguments = options.parse_args()
    found = {}
    for seed in arguments.seeds:
        place = arguments.folder.resolve() / str(seed)
        place.mkdir(parents=True, exist_ok=True)
        runs = ["base", "sft", *made(place, seed, arguments.variants)]
        options_of = ["--split", "test", "--seed", seed, "--out", "compare"]
        script("minillm/compare/__main__.py", *runs, *options_of, folder=place)
        compared = read_json(place / "compare" / "compare.json")["metrics"]
        found[seed] = {
            "compared": {name: section["tables"] for name, section in compared.items()},
            "ends": {run: read_metrics(place / run)[-1] for run in runs},
            "reward": read_json(place / "rlhf" / "reward" / "report.json"),
        }
    print(*means([of_seed["compared"]["headline"] for of_seed in found.values()]), sep="\n")
    variants = {name: VARIANTS[name] for name in arguments.variants}
    write(arguments.json, {"variants": variants, "seeds": found})


def made(place: Path, seed: int, variants: Sequence[str]) -> Iterator[str]:
    """The folders of the variants, in `place`; what is not finished there is made."""
    rlhf = ["rlhf.py", "--init", "sft", "--stage"]

    def make(run: str, *commands: list[str]) -> None:
        if not any(event["event"] == "final" for event in read_metrics(place / run)):
            for stage, *words in commands:
                script(stage, *words, "--seed", seed, "--overwrite", folder=place)

    make("base", ["train.py", "--out", "base"])
    make("sft", ["sft.py", "--init", "base", "--out", "sft"])
    stages = (["sample", "--models", "sft"], ["rank"], ["reward"])
    make("rlhf/reward", *([*rlhf, *stage, "--out", "rlhf"] for stage in stages))
    for name in variants:
        out, options = f"variants/{name.replace(' ', '-')}", VARIANTS[name]
        run = f"{out}/{options[1] if options[:1] == ['--algorithm'] else 'ppo'}"
        given = ["--reward", "rlhf/reward", "--rankings", "rlhf/rankings.jsonl", "--out", out]
        make(run, [*rlhf, "policy", *given, *options])
        yield run


def means(of_seeds: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each run, with its means; a heading for each metric, of each sampling."""
    for sampling, rows in of_seeds[0].items():
        for label, cells in rows.items():
            yield f"{label}, {sampling}"
            for run in cells:
                yield f"  {run:40} {fmean(one[sampling][label][run]['value'] for one in of_seeds):8.3f}"


if __name__ == "__main__":
    with one_line_errors():
        main()
