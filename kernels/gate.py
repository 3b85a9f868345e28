"""The compile gate: python -m kernels.gate (kernels/dev/gate.py)."""

from kernels.dev.gate import main

if __name__ == "__main__":
    main()
