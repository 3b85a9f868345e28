"""A run folder as a GGUF file: python -m minillm.export RUN --gguf FILE (minillm/tools/export.py)."""

import sys

from minillm.tools.export import main

if __name__ == "__main__":
    main(sys.argv[1:])
