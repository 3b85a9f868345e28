"""minillm: from raw text to an aligned assistant, small enough to read."""

import sys
from importlib.util import find_spec
from pathlib import Path


def _refuse_another_kernels_package() -> None:
    """`kernels` is also the name of an unrelated package: say so where that one would be imported."""
    here, spec = Path(__file__).resolve().parents[1], find_spec("kernels")
    found = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
    if found != here:
        print(f"error: `import kernels` finds {found or 'nothing'} instead of minillm's package; "
              f"run from {here}", file=sys.stderr)  # fmt: skip
        sys.exit(2)


_refuse_another_kernels_package()
