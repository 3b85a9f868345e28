"""Stages and other people's programs, run by lessons and benchmarks in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from minillm.errors import InputError

ROOT = Path(__file__).parents[2]


def script(name: str | Path, *options: object, folder: Path | None = None) -> tuple[float, str]:
    """Runs a Python file, whose path is from the repository's root, or "-m" and a module, in the current or
    another folder: the seconds, and what it printed. InputError with its last line where it fails. It ends
    with this process (minillm/tools/stage.py)."""
    began, words = time.perf_counter(), [str(name), *map(str, options)]
    what = ["-m", *words[1:]] if name == "-m" else [str(ROOT / name), *words[1:]]
    command = [sys.executable, "-m", "minillm.tools.stage", *what]
    own = os.environ | {"PYTHONPATH": str(ROOT)}  # for "-m" in another folder
    watched, held = os.pipe()  # the system closes `held` when this process ends, however suddenly
    try:
        done = subprocess.run(command, cwd=folder, env=own, stdin=watched, capture_output=True, text=True)
    finally:
        os.close(watched)
        os.close(held)
    if done.returncode:
        raise InputError(f"{' '.join(words)[:200]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return time.perf_counter() - began, done.stdout
