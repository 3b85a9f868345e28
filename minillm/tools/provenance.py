"""Where a figure comes from: commit, machine and versions, to be written beside every result."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGES = ("minillm", "torch", "triton", "numpy", "regex", "tokenizers", "transformers")


def provenance() -> dict:
    """What made a figure; commit and dirty are None outside git, absent packages are left out."""
    status, cpuinfo, versions = _git("status", "--porcelain"), Path("/proc/cpuinfo"), {}
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""  # only Linux has that
    named = re.search(r"^model name\s*:\s*(.*)", text, re.MULTILINE)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else status != "",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
