"""Time our tokenizer against the `tokenizers` library: training and encoding, side by side.

    python benchmarks/tokenizer.py ../shared/data/text/books/*.txt --vocab-size 4096 --json out.json

Both get the same text, split pattern and vocabulary size; one thread each; the two alternate, so
that a busy machine slows both; the median of the runs is shown. Each encodes with its own
vocabulary (they break ties differently), from an empty cache.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from minillm.tokenizer import ENDOFTEXT, PATTERN, Tokenizer
from minillm.tools.provenance import provenance


def train_theirs(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    peer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDOFTEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator(texts, trainer)
    return peer


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(name: str, ours: Callable, theirs: Callable, runs: int) -> dict:
    """Median seconds of both, taken in turn, and the median of the runs' ratios."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    mine, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name:<24}{mine:>10.3f} s{peer:>14.3f} s{ratio:>10.2f}")
    return {"ours_s": mine, "theirs_s": peer, "ratio": ratio, "runs": pairs}


def main() -> None:
    books = Path(__file__).parents[2] / "shared" / "data" / "text" / "books"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(books.glob("*.txt")))
    parser.add_argument("--vocab-size", type=int, default=4096, help="entries (default 4096)")
    parser.add_argument("--runs", type=int, default=5, help="of each, alternating (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not options.files:
        parser.error("no files given, and no books beside the repository")
    texts = [file.read_bytes().decode("utf-8", errors="replace") for file in options.files]
    vocab_size, runs = options.vocab_size, options.runs

    # Trained once; a fresh tokenizer of the same vocabulary has an empty cache.
    vocabulary = Tokenizer.train(texts, vocab_size, [ENDOFTEXT]).vocabulary
    serialized = train_theirs(texts, vocab_size).to_str()
    ours = iter([Tokenizer(vocabulary) for _ in range(runs)])
    theirs = iter([tokenizers.Tokenizer.from_str(serialized) for _ in range(runs)])

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{megabytes:.1f} MB, {vocab_size} entries, median of {runs} runs")
    print(f"{'':<24}{'minillm':>12}{'tokenizers':>16}{'ratio':>10}")
    figures = {
        "training": compare(
            "training",
            lambda: Tokenizer.train(texts, vocab_size, [ENDOFTEXT]),
            lambda: train_theirs(texts, vocab_size),
            runs,
        ),
        "encoding": compare(
            "encoding, one thread",
            lambda: list(next(ours).encode_documents(texts)),
            lambda: next(theirs).encode_batch_fast(texts, add_special_tokens=False),
            runs,
        ),
    }
    if options.json:
        settings = {"megabytes": megabytes, "vocab_size": vocab_size}
        report = {"provenance": provenance(), **settings, **figures}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
