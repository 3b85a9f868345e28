"""Time our tokenizer against the `tokenizers` library: training and encoding, side by side.

    python benchmarks/tokenizer.py ../shared/data/text/books/*.txt --vocab-size 4096 --json out.json

Both get the same text, split pattern and vocabulary size; one thread each; the two alternate, so
that a busy machine slows both; the median of the runs is shown. Each encodes with its own
vocabulary (they break ties differently), from an empty cache.
"""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from harness import ROOT, in_turn, medians, parser, peer, timed, write

from minillm.tokenizer import ENDOFTEXT, PATTERN, Tokenizer

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read at their import


def train_theirs(tokenizers: Any, texts: list[str], vocab_size: int) -> Any:
    pre, trained = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre.Split(tokenizers.Regex(PATTERN), "isolated")
    trained.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[ENDOFTEXT], initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(texts, trainer)
    return trained


def compare(name: str, ours: Callable, theirs: Callable, runs: int) -> dict:
    """Median seconds of both and the median of the runs' ratios."""
    seconds = in_turn({"ours_s": timed(ours), "theirs_s": timed(theirs)}, runs)
    found, pairs = medians(seconds), list(zip(*seconds.values(), strict=True))
    ratio = median(a / b for a, b in pairs)
    print(f"{name:<24}{found['ours_s']:>10.3f} s{found['theirs_s']:>14.3f} s{ratio:>10.2f}")
    return found | {"ratio": ratio, "runs": pairs}


def main() -> None:
    options = parser(__doc__, runs=5)
    books = ROOT.parent / "shared" / "data" / "text" / "books"
    options.add_argument("files", nargs="*", type=Path, default=sorted(books.glob("*.txt")))
    options.add_argument("--vocab-size", type=int, default=4096, help="entries (default 4096)")
    arguments = options.parse_args()
    if not arguments.files:
        options.error("no files given, and no books beside the repository")
    tokenizers = peer("tokenizers", "pip install tokenizers")
    texts = [file.read_bytes().decode("utf-8", errors="replace") for file in arguments.files]
    vocab_size, runs = arguments.vocab_size, arguments.runs
    # Trained once; a fresh tokenizer of the same vocabulary has an empty cache.
    vocabulary = Tokenizer.train(texts, vocab_size, [ENDOFTEXT]).vocabulary
    serialized = train_theirs(tokenizers, texts, vocab_size).to_str()
    ours = iter([Tokenizer(vocabulary) for _ in range(runs)])
    theirs = iter([tokenizers.Tokenizer.from_str(serialized) for _ in range(runs)])

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{megabytes:.1f} MB, {vocab_size} entries, median of {runs} runs")
    print(f"{'':<24}{'minillm':>12}{'tokenizers':>16}{'ratio':>10}")
    tasks: dict[str, tuple[Callable, Callable]] = {
        "training": (
            lambda: Tokenizer.train(texts, vocab_size, [ENDOFTEXT]),
            lambda: train_theirs(tokenizers, texts, vocab_size),
        ),
        "encoding": (  # one thread
            lambda: list(next(ours).encode_documents(texts)),
            lambda: next(theirs).encode_batch_fast(texts, add_special_tokens=False),
        ),
    }
    results = {name: compare(name, *both, runs) for name, both in tasks.items()}
    write(arguments.json, {"megabytes": megabytes, "vocab_size": vocab_size, **results})


if __name__ == "__main__":
    main()
