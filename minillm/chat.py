"""Talk with a model: python -m minillm.chat RUN (minillm/tools/chat.py)."""

import sys

if __name__ == "__main__":
    from minillm.errors import end_at_interrupts

    end_at_interrupts()  # before torch, whose import takes seconds

from minillm.tools.chat import main

if __name__ == "__main__":
    main(sys.argv[1:])
