"""Tokens a second of `generate` beside transformers' `generate`, with the same weights.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --json benchmarks/sampling.json --runs 9

Both sample 128 tokens behind 32, from random weights of the default depth 4 in float32, once greedily
and once from the whole distribution. First the greedy tokens of both must agree; then they take
turns, and the median of the runs counts. Prefill, set-up and the choice of tokens are part of the
time on both sides. transformers runs with its default cache.
"""

from typing import Any

import torch
import transformers
from harness import Figures, parser, race, seconds, write

from minillm.generate import SamplingOptions, generate
from minillm.io.config import SAME_NAME
from minillm.model import LanguageModel, config_of_depth

PROMPT, NEW = 32, 128
CONFIG = config_of_depth(4, 1024, PROMPT + NEW)


def measure(rows: int, temperature: float, runs: int) -> Figures:
    """Both sides' tokens a second; greedy tokens must agree first."""
    ours, generator = LanguageModel(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    shape: dict[str, Any] = {name: getattr(CONFIG, name) for name in (*SAME_NAME, "rope_theta")}
    config = transformers.Qwen3Config(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    prompts = torch.randint(CONFIG.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    options, lists = SamplingOptions(NEW, temperature), prompts.tolist()
    choice = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}

    @torch.inference_mode()
    def transformers_generate() -> list[list[int]]:
        every = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW}
        return theirs.generate(prompts, do_sample=temperature > 0, **every, **choice)[:, PROMPT:].tolist()

    both = {
        "minillm": lambda: generate(ours, lists, options, range(rows)).responses,
        "transformers": transformers_generate,
    }
    said = [run() for run in both.values()]  # also the warm-up
    if not temperature and said[0] != said[1]:
        raise SystemExit(f"batch {rows}: the greedy tokens differ, so the times mean nothing")
    sides = {name: lambda _, run=run: {"tokens/s": rows * NEW / seconds(run)} for name, run in both.items()}
    return race(f"batch {rows}, temperature {temperature:g}", sides, runs)


def main() -> None:
    transformers.logging.set_verbosity_error()
    arguments = parser(__doc__, runs=7).parse_args()
    cases = [(rows, temperature) for rows in (1, 64) for temperature in (0.0, 1.0)]
    results = [{"batch": rows, "temperature": T, **measure(rows, T, arguments.runs)} for rows, T in cases]
    write(arguments.json, {"threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
