"""What every test shares: shape checks switched on, hypothesis without a clock, the real data."""

from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Every jaxtyping annotation of the project becomes a check at each call.
install_import_hook(["minillm", "kernels"], "beartype.beartype")

# A busy machine is slow now and then: time is not a property of ours.
hypothesis.settings.register_profile("minillm", deadline=None)
hypothesis.settings.load_profile("minillm")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of other people's text, vocabularies and rankings; a checkout without it skips."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not present at {folder}")
    return folder
