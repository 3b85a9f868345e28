"""Pretraining on tinyshakespeare beside nanoGPT: how low, how soon.

    git clone https://github.com/karpathy/nanoGPT       (needs requests and tiktoken)
    python benchmarks/pretraining.py --text tinyshakespeare.txt --nanogpt path/to/nanoGPT [--json FILE]

nanoGPT runs its README's command for a CPU. minillm runs twice: `short`, to nanoGPT's loss in a tenth
of its time, and `long`, within its whole time. Both train on the first 90% of the text and are judged
on the last 10%; nats per character and nats per byte are the same here, since the text is ASCII. Times
are wall times of the whole process: start-up, tokenizer, validation and saving included.
"""

import re
import shutil
import tempfile
from pathlib import Path

from harness import parser, race, write

from minillm.tools.ending import one_line_errors
from minillm.tools.folder import read_metrics
from minillm.tools.stage import script
from minillm.tools.streams import tables

SHORT, LONG, NANOGPT, JUDGED = (words.split() for words in tables(__file__).values())


def run_nanogpt(checkout: Path, text: Path, scratch: Path) -> dict[str, float]:
    data = checkout / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    script(data / "prepare.py")  # not timed: ours tokenizes in its time
    taken, printed = script(checkout / "train.py", *NANOGPT, f"--out_dir={scratch}", folder=checkout)
    return {"s": taken, "nats/byte": float(re.findall(r"val loss ([\d.]+)", printed)[-1])}


def run_minillm(text: Path, options: list[str], scratch: Path, seed: int) -> dict[str, float]:
    out, cache = scratch / "minillm", tempfile.mkdtemp(dir=scratch)
    given = ["--data", text, "--out", out, "--cache", cache, "--seed", seed]
    taken, _ = script("train.py", *given, *JUDGED, *options)
    return {"s": taken, "nats/byte": read_metrics(out)[-1]["val_nats_per_byte"]}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--nanogpt", type=Path, required=True)
    arguments = options.parse_args()
    text, checkout = arguments.text.resolve(), arguments.nanogpt.resolve()
    if not (checkout / "data" / "shakespeare_char" / "prepare.py").exists():
        options.error(f"--nanogpt {checkout}: is none; git clone https://github.com/karpathy/nanoGPT")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sides = {
            "nanoGPT": lambda _: run_nanogpt(checkout, text, scratch),  # the run does not change its seed
            "minillm short": lambda seed: run_minillm(text, SHORT, scratch, seed),
            "minillm long": lambda seed: run_minillm(text, LONG, scratch, seed),
        }
        results = race("tinyshakespeare", sides, arguments.runs)
    write(arguments.json, {"results": results, "short": SHORT, "long": LONG, "nanogpt": NANOGPT})


if __name__ == "__main__":
    with one_line_errors():
        main()
