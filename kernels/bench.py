"""python -m kernels.bench: see kernels/dev/bench.py."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, also amid its imports
    from kernels.dev.bench import main

    main()
