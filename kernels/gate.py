"""python -m kernels.gate: see kernels/dev/gate.py."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, also amid its imports
    from kernels.dev.gate import main

    main()
