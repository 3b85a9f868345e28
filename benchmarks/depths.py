"""What a step of train.py reaches against --depth: its FLOP/s beside those of one large matrix product.

    python benchmarks/depths.py --text book.txt [--depths 2 4 8 12] [--runs 3] [--json FILE]

Each run takes the batch and the rates that the depth gives. A token costs 6 FLOP a weight of the matrices
that it meets (Kaplan et al. 2020, section 2.1; the embedding is looked up and costs none), and 6 · layers ·
width · block size for the scores and sums of causal attention, of which half are masked and not computed.
What the optimizer, the norms and the softmax cost is in the time and not in the count.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from harness import at_least_one, parser, race, seconds, write

from minillm.io.huggingface import load_causal_model
from minillm.tools.device import choose_dtype
from minillm.tools.ending import one_line_errors
from minillm.tools.folder import read_metrics
from minillm.tools.stage import script

CPU, SIDE, TOKENS = torch.device("cpu"), 2048, 98_304
"""Rows and columns of the ceiling's matrices; the tokens of a run, in three steps or more."""
ALONE = "--overwrite --samples 0 --val-every 1000000 --save-every 1000000 --val-tokens 1024".split()


def ceiling(_: int) -> dict[str, float]:
    """The best of ten products of two square matrices, in the precision in which train.py multiplies."""
    a = torch.ones(SIDE, SIDE, dtype=choose_dtype(CPU))
    return {"GFLOP/s": 2e-9 * SIDE**3 / min(seconds(lambda: a @ a) for _ in range(10))}


def pretrain(text: Path, depth: int, scratch: Path, _: int) -> dict[str, float]:
    """FLOP/s, seconds and tokens of a step by the median of all steps, and the weights."""
    steps = max(3, TOKENS // (1024 * depth**3 // 64))
    how = ("--data", text, "--depth", depth, "--steps", steps, "--warmup", 1, "--out", scratch)
    script("train.py", *how, *ALONE)
    *events, final = read_metrics(scratch)
    speed = median(event["tokens_per_second"] for event in events if event["event"] == "train")
    model, _tokenizer = load_causal_model(scratch, CPU, torch.float32)
    looked_up, config = model.model.embed_tokens.weight, model.config
    weights = sum(p.numel() for p in model.parameters())
    met = weights - (0 if model.lm_head.weight is looked_up else looked_up.numel())
    flop = 6 * (met + config.num_hidden_layers * config.hidden_size * config.max_position_embeddings)
    tokens = final["tokens"] / steps
    return {"GFLOP/s": 1e-9 * speed * flop, "s a step": tokens / speed, "tokens": tokens, "weights": weights}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--depths", type=at_least_one, nargs="+", default=[2, 4, 8, 12])
    given = options.parse_args()
    text, sides = given.text.resolve(), {"matrix product": ceiling}
    with tempfile.TemporaryDirectory() as folder:
        for depth in given.depths:
            sides[f"depth {depth}"] = partial(pretrain, text, depth, Path(folder, str(depth)))
        found = race("a step", sides, given.runs)
    write(given.json, {"threads": torch.get_num_threads(), "results": found})


if __name__ == "__main__":
    with one_line_errors():
        main()
