"""A Python file that stops as by Ctrl-C once its standard input ends.

Whoever starts it, as `script` does for lessons and benchmarks, holds the other end of that pipe, and closes
it to stop it. If it dies, however suddenly, the system does. So no training goes on that nobody can see or
stop.

    python -m minillm.tools.stage train.py --out out/base
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (stopped while torch loads, it ends in one word)

from minillm.errors import InputError

ROOT = Path(__file__).parents[2]


def script(name: str | Path, *options: object, folder: Path | None = None) -> tuple[float, str]:
    """Runs a Python file, whose path is from the repository's root, in the current or another folder: the
    seconds, and what it printed. InputError with its last line where it fails."""
    began, words = time.perf_counter(), [str(name), *map(str, options)]
    command = [sys.executable, "-m", "minillm.tools.stage", str(ROOT / name), *words[1:]]
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    watched, held = os.pipe()
    try:
        done = subprocess.run(command, cwd=folder, env=own, stdin=watched, capture_output=True, text=True)
    finally:
        os.close(watched)
        os.close(held)
    if done.returncode:
        raise InputError(f"{' '.join(words)[:200]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return time.perf_counter() - began, done.stdout


def stop_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python has it for a file
    runpy.run_path(sys.argv[0], run_name="__main__")
