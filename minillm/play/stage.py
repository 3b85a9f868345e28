"""A stage of rlhf.py that stops as by Ctrl-C once its standard input ends.

The server holds the other end of that pipe. It closes it to stop a training; if the server dies, however
suddenly, the system does. So no training goes on that nobody can see or stop.
"""

import os
import runpy
import signal
import sys
import threading

import minillm.tools.start  # noqa: F401  (stopped while torch loads, it ends in one word)


def stop_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    runpy.run_module("rlhf", run_name="__main__")
