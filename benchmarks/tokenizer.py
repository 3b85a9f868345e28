"""Time our tokenizer against the `tokenizers` library: training and encoding, side by side.

    python benchmarks/tokenizer.py books/*.txt [--vocab-size 4096] [--json benchmarks/tokenizer.json]

Both get the same text, split pattern and vocabulary size; one thread each; the two alternate. Each encodes
with its own vocabulary (they break ties differently), from an empty cache.
"""

import os
from pathlib import Path
from typing import Any

from harness import parser, race, seconds, write

from minillm.tokenizer import ENDOFTEXT, PATTERN, Tokenizer

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read at the import
import tokenizers


def train_theirs(texts: list[str], vocab_size: int) -> Any:
    pre, trained = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre.Split(tokenizers.Regex(PATTERN), "isolated")
    trained.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[ENDOFTEXT], initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(texts, trainer)
    return trained


def main() -> None:
    options = parser(__doc__, runs=5)
    options.add_argument("files", nargs="+", type=Path)
    options.add_argument("--vocab-size", type=int, default=4096, help="entries (4096)")
    arguments = options.parse_args()
    texts = [file.read_bytes().decode("utf-8", errors="replace") for file in arguments.files]
    vocab_size, runs = arguments.vocab_size, arguments.runs
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    vocabulary = Tokenizer.train(texts, vocab_size, [ENDOFTEXT]).vocabulary
    serialized = train_theirs(texts, vocab_size).to_str()

    def ours(_: int) -> dict[str, float]:
        tokenizer = Tokenizer(vocabulary)  # a fresh one has an empty cache
        return {"s": seconds(lambda: list(tokenizer.encode_documents(texts)))}

    def theirs(_: int) -> dict[str, float]:
        tokenizer = tokenizers.Tokenizer.from_str(serialized)
        return {"s": seconds(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False))}

    training = {
        "minillm": lambda _: {"s": seconds(lambda: Tokenizer.train(texts, vocab_size, [ENDOFTEXT]))},
        "tokenizers": lambda _: {"s": seconds(lambda: train_theirs(texts, vocab_size))},
    }
    results = {
        "training": race(f"training on {megabytes:.1f} MB, {vocab_size} entries", training, runs),
        "encoding": race("encoding the same", {"minillm": ours, "tokenizers": theirs}, runs),
    }
    write(arguments.json, {"megabytes": megabytes, "vocab_size": vocab_size, **results})


if __name__ == "__main__":
    main()
