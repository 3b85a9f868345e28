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
import transformers
from harness import in_turn, medians, parser, timed, write
from torch import Tensor

from minillm.generate import SamplingOptions, generate
from minillm.model import LanguageModel, ModelConfig

PROMPT, NEW = 32, 128
SHAPE = ModelConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32, max_position_embeddings=PROMPT + NEW,
)  # fmt: skip


def random_models() -> tuple[LanguageModel, transformers.Qwen3ForCausalLM]:
    """The same weights in both programs."""
    ours, generator = LanguageModel(SHAPE), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
             "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
             "rope_theta", "tie_word_embeddings")  # fmt: skip
    config = transformers.Qwen3Config(
        **{name: getattr(SHAPE, name) for name in names},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def contestants(rows: int, temperature: float) -> dict[str, Callable[[], Tensor]]:
    """Each gives the tokens of prompts and responses, [rows, PROMPT + NEW]."""
    ours, theirs = random_models()
    prompts = torch.randint(SHAPE.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    options, lists = SamplingOptions(NEW, temperature), prompts.tolist()
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    @torch.inference_mode()
    def transformers_generate() -> Tensor:
        return theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW,
            **(choice if temperature else {"do_sample": False}),
        )  # fmt: skip

    return {
        "minillm": lambda: generate(ours, lists, options, range(rows)).responses,
        "transformers": transformers_generate,
    }


def measure(rows: int, temperature: float, runs: int) -> dict:
    """Tokens a second; greedy tokens must agree first."""
    sides = contestants(rows, temperature)
    outputs = [run() for run in sides.values()]  # also the warm-up
    if not temperature and not torch.equal(*outputs):
        raise SystemExit(f"batch {rows}: the greedy tokens differ, so the times mean nothing")
    seconds = in_turn({name: timed(run) for name, run in sides.items()}, runs)
    rates = {name: rows * NEW / value for name, value in medians(seconds).items()}
    return {
        "batch": rows,
        "temperature": temperature,
        "tokens_per_second": rates,
        "ratio": rates["minillm"] / rates["transformers"],
        "seconds": seconds,
    }


def main() -> None:
    arguments = parser(__doc__, runs=7).parse_args()
    transformers.logging.set_verbosity_error()
    results = []
    print(f"{torch.get_num_threads()} threads\nbatch  temperature  minillm tok/s  transformers tok/s  ratio")
    for rows in (1, 64):
        for temperature in (0.0, 1.0):
            result = measure(rows, temperature, arguments.runs)
            ours, theirs = result["tokens_per_second"].values()
            print(f"{rows:5}  {temperature:11}  {ours:13.0f}  {theirs:18.0f}  {result['ratio']:5.2f}")
            results.append(result)
    write(arguments.json, {"threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
