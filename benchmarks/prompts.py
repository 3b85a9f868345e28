"""Is a policy better on the prompts it was trained on, and is the reward model kinder to those?

    python rlhf.py --stage policy --prompts 3500 --reward out/rlhf/reward --out out/half
    python benchmarks/prompts.py out/sft out/half/ppo --reward out/rlhf/reward --json benchmarks/prompts.json

The reward model learns from rankings of responses to nine tenths of its prompts, the policy from the first
3,500 of the same: half of those that the reward model holds out are new to both and ask about the same facts.
The development prompts ask about facts that no demonstration and no ranking speaks of. Replies are sampled at
temperature 1.
"""

import json
from pathlib import Path
from typing import Any

import torch
from harness import parser, write

from minillm.chat import ChatTemplate
from minillm.data import split_by_hash
from minillm.files import read_json
from minillm.io.huggingface import load_model, load_scalar_model
from minillm.reward import encode_response, score_rows
from minillm.tools.evaluate import sample_replies
from minillm.tools.measures import Estimate, mean
from minillm.world import KINDS, World
from minillm.world.rubric import Prompt

CPU = torch.device("cpu")


def key(prompt: Prompt) -> str:
    return json.dumps(prompt.messages, sort_keys=True)


def groups(world: World, own: dict[str, Any], trained: int, count: int) -> dict[str, list[Prompt]]:
    """At most `count` prompts of each group. The reward model has the options `own`, the policy learned from
    the first `trained` prompts."""
    place: dict[str, int] = {}  # where a prompt comes first: the later ones of a kind repeat earlier ones
    for number, prompt in enumerate(prompts := world.prompts("reward", n=own["prompts"])):
        place.setdefault(key(prompt), number)
    sides = split_by_hash([prompts[number] for number in place.values()], key, own["val_fraction"])
    found = {
        f"{ranked}, {said}trained on": [one for one in side if (place[key(one)] < trained) == (not said)]
        for ranked, side in zip(("ranked", "not ranked"), sides, strict=True)
        for said in ("", "not ")
    } | {"new facts": world.prompts("dev", n=count)}
    return {name: prompts[:count] for name, prompts in found.items() if prompts}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", type=Path, nargs="+", help="the assistant, then the policy")
    options.add_argument("--reward", type=Path, required=True, help="the reward model's folder")
    options.add_argument("--prompts", type=int, default=600, help="of each group, at most")
    arguments = options.parse_args()
    own = read_json(arguments.reward / "run.json")["options"]
    world = World(own["seed"])
    trained = read_json(arguments.models[-1] / "run.json")["options"]["prompts"]
    of_group = groups(world, own, trained, arguments.prompts)
    reward_model, _ = load_scalar_model(arguments.reward, CPU, torch.float32)
    results: dict[str, dict[str, dict[str, dict[str, Estimate]]]] = {}
    for folder in arguments.models:
        model, tokenizer = load_model(folder, CPU, torch.float32)
        template = ChatTemplate(tokenizer)
        for group, prompts in of_group.items():
            replies = sample_replies(model, tokenizer, prompts, temperature=1.0, world=world)
            rows = [encode_response(template, one.prompt.messages, one.text) for one in replies]
            scores = score_rows(reward_model, rows)
            numbers = {kind: [i for i, one in enumerate(prompts) if one.kind == kind] for kind in KINDS}
            numbers = {kind: some for kind, some in numbers.items() if some} | {"all": [*range(len(prompts))]}
            found = results.setdefault(str(folder), {})[group] = {
                kind: {
                    "score": mean([scores[i] for i in some]),
                    "rubric": mean([replies[i].score.utility for i in some]),
                }
                for kind, some in numbers.items()
            }
            means = [f"{k} {m['score']['value']:.2f} {m['rubric']['value']:.3f}" for k, m in found.items()]
            print(f"{folder} {group:24} {len(prompts)} prompts; score, rubric:", ", ".join(means), flush=True)
    write(arguments.json, {"reward": str(arguments.reward), "seed": own["seed"], "results": results})


if __name__ == "__main__":
    main()
