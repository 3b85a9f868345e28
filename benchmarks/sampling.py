"""Tokens a second of `generate` beside transformers' `generate`, with the same weights.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --json benchmarks/sampling.json --runs 9

Both sample 128 tokens behind 32, from random weights of the default depth 4 in float32, once greedily
and once from the whole distribution. First the greedy tokens of both must agree; then they take
turns, and the median of the runs counts. Prefill, set-up and the choice of tokens are part of the
time on both sides. transformers runs with its default cache.
"""

from collections.abc import Callable

import torch
from harness import in_turn, medians, parser, peer, timed, write

from minillm.generate import SamplingOptions, generate
from minillm.io.config import SAME_NAME
from minillm.model import LanguageModel, config_of_depth

PROMPT, NEW = 32, 128
CONFIG = config_of_depth(4, 1024, PROMPT + NEW)


def sides(rows: int, temperature: float) -> dict[str, Callable[[], list[list[int]]]]:
    """Each gives the responses to the same prompts, by the same weights."""
    transformers = peer("transformers", "pip install transformers")
    transformers.logging.set_verbosity_error()
    ours, generator = LanguageModel(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    shape = {name: getattr(CONFIG, name) for name in (*SAME_NAME, "rope_theta")}
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **no_tokens)).eval()
    theirs.load_state_dict(ours.state_dict())
    prompts = torch.randint(CONFIG.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    options, lists = SamplingOptions(NEW, temperature), prompts.tolist()
    choice = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}

    @torch.inference_mode()
    def transformers_generate() -> list[list[int]]:
        mask = torch.ones_like(prompts)
        found = theirs.generate(
            prompts, attention_mask=mask, max_new_tokens=NEW, do_sample=temperature > 0, **choice
        )
        return found[:, PROMPT:].tolist()

    return {
        "minillm": lambda: generate(ours, lists, options, range(rows)).responses,
        "transformers": transformers_generate,
    }


def measure(rows: int, temperature: float, runs: int) -> dict:
    """Tokens a second; greedy tokens must agree first."""
    both = sides(rows, temperature)
    said = [run() for run in both.values()]  # also the warm-up
    if not temperature and said[0] != said[1]:
        raise SystemExit(f"batch {rows}: the greedy tokens differ, so the times mean nothing")
    seconds = in_turn({name: timed(run) for name, run in both.items()}, runs)
    rates = {name: rows * NEW / value for name, value in medians(seconds).items()}
    found = {"batch": rows, "temperature": temperature, "tokens_per_second": rates, "seconds": seconds}
    ours, theirs = rates.values()
    print(f"{rows:5}  {temperature:11}  {ours:13.0f}  {theirs:18.0f}  {ours / theirs:5.2f}")
    return found | {"ratio": ours / theirs}


def main() -> None:
    arguments = parser(__doc__, runs=7).parse_args()
    threads = torch.get_num_threads()
    print(f"{threads} threads\nbatch  temperature  minillm tok/s  transformers tok/s  ratio")
    results = [measure(rows, T, arguments.runs) for rows in (1, 64) for T in (0.0, 1.0)]
    write(arguments.json, {"threads": threads, "results": results})


if __name__ == "__main__":
    main()
