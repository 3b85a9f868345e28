"""The benchmark: python -m kernels.bench (kernels/dev/bench.py)."""

from kernels.dev.bench import main

if __name__ == "__main__":
    main()
