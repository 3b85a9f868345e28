"""A Python file, or "-m" and a module, that stops as by Ctrl-C once its standard input ends.

Whoever starts it holds the other end of that pipe, and closes it to stop it. If it dies, however suddenly,
the system does. So no training goes on that nobody can see or stop.

    python -m minillm.tools.stage train.py --out out/base
    python -m minillm.tools.stage -m rlhf --stage reward
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import minillm.tools.start  # noqa: F401  (stopped while torch loads, it ends in one word)


def stop_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python has it for a file
        runpy.run_path(sys.argv[0], run_name="__main__")
