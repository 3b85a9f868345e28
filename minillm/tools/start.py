"""What a script imports before all that takes seconds, as torch does: Ctrl-C meanwhile ends it in one word.

From then on, `ending.one_line_errors` says how a script ends. A process that torchrun started ends with
torchrun, even where that is killed (on Linux): left alone, processes wait for one another for hours.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from minillm.tools.ending import handle_signals
from minillm.tools.streams import open_streams

PR_SET_PDEATHSIG = 1


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


open_streams()
handle_signals(_leave)
if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
