"""The laws of devices.py, in a process of its own.

A device once registered stays, and with two of them autograd computes in threads, which no fork of the
testing process survives.
"""

import subprocess
import sys

from runs import ROOT


def test_every_step_stays_on_its_device_and_waits_for_it_once():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/devices.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
