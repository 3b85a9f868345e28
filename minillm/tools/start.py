"""What a script imports before all that takes seconds, as torch does: Ctrl-C meanwhile ends it in one word.

From then on, `ending.one_line_errors` says how a script ends.
"""

import os
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from minillm.tools.ending import handle_signals
from minillm.tools.streams import open_streams


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


open_streams()
handle_signals(_leave)
