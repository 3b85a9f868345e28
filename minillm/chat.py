"""Talk with a model: python -m minillm.chat RUN (minillm/tools/chat.py)."""

import sys

from minillm.tools.chat import main

if __name__ == "__main__":
    main(sys.argv[1:])
