"""What every test shares: shape checks and Triton's interpreter on, hypothesis without a clock, the data."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# The device that kernels are tested on. Without a GPU Triton interprets them on the CPU; it decides at
# their import, so this stands before any.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Every jaxtyping annotation of the project becomes a check at each call. The files of Triton's kernels hold
# none, and a wrapped kernel would lose sight of its module.
KERNELS = Path(__file__).parents[1] / "kernels"
CHECKED = [f"kernels.{file.stem}" for file in KERNELS.glob("*.py") if not file.stem.endswith("_triton")]
install_import_hook(["minillm", *CHECKED], "beartype.beartype")

# A busy machine is slow now and then: time is not a property of ours.
# For more cases: pytest --hypothesis-profile long
hypothesis.settings.register_profile("minillm", deadline=None, max_examples=50)
hypothesis.settings.register_profile("long", deadline=None, max_examples=500)
hypothesis.settings.load_profile("minillm")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of other people's text, vocabularies and rankings; a checkout without it skips."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not present at {folder}")
    return folder


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run in tests: a GPU, or the CPU under Triton's interpreter."""
    return DEVICE


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What the tests of the page are served from (served.py)."""
    from served import make_runs

    return make_runs(tmp_path_factory.mktemp("page") / "out")


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    """A server of them."""
    from served import serve

    from minillm.play.__main__ import Options

    yield from serve(Options(runs=str(runs), port=0))
