"""What every test shares: shape checks and Triton's interpreter on, hypothesis without a clock, the data."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# The device that kernels are tested on. Without a GPU Triton interprets them on the CPU; it decides at
# their import, so this stands before any.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Every jaxtyping annotation of the project becomes a check at each call. Files without one are left as they
# are: mypy knows their types, and a check at each call would make the world's text ten times as slow.
# Triton's kernels hold none, and a wrapped kernel would lose sight of its module.
PROJECT = Path(__file__).parents[1]
CHECKED = [
    ".".join(file.relative_to(PROJECT).with_suffix("").parts)
    for folder in ("minillm", "kernels")
    for file in (PROJECT / folder).rglob("*.py")
    if "jaxtyping" in file.read_text(encoding="utf-8")
]
install_import_hook(CHECKED, "beartype.beartype")

if DEVICE == "cpu" and find_spec("triton"):
    import triton.language as tl
    from triton.runtime import interpreter

    # At each call of a function in a kernel the interpreter looks through all of Triton's language for what
    # is to be replaced, though nothing is left of it behind the first: half of the time that kernels took.
    replace_language = interpreter._patch_lang

    def replace_language_once(function: Any) -> Any:
        languages = [one for one in function.__globals__.values() if one is tl or one is tl.core]
        is_left = any(tl.core.is_builtin(language.arange) for language in languages)
        return replace_language(function) if is_left else interpreter._LangPatchScope()

    interpreter._patch_lang = replace_language_once

# Whether a write has reached the disk can be seen by a loss of power alone, and waiting for it takes longer
# than many a test: the file must be open, no more.
os.fsync = os.fstat

# A busy machine is slow now and then: time is not a property of ours.
# For more cases: pytest --hypothesis-profile long
hypothesis.settings.register_profile("minillm", deadline=None, max_examples=50)
hypothesis.settings.register_profile("long", deadline=None, max_examples=500)
hypothesis.settings.load_profile("minillm")


# With --dist loadfile a core has nothing to do while the other ends the last file: the longest begin.
LONGEST = (
    "gate", "play_page", "bad_input", "policy_stage", "readme", "attention", "accidents", "checkpoint",
    "losses", "run", "train", "play", "compare", "sft", "reward_stage", "rlhf", "lessons", "model",
    "tokenizer", "template",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of other people's text, vocabularies and rankings; a checkout without it skips."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not present at {folder}")
    return folder


@pytest.fixture
def quick_plots(monkeypatch) -> None:
    """No picture is drawn, which takes a third of a small run; the reference runs of each stage draw all."""
    from minillm.io.disk import write_atomically
    from minillm.tools import plots

    def save(figure: object, path: Path) -> None:
        write_atomically(path, lambda file: file.write_bytes(b"\x89PNG"))

    monkeypatch.setattr(plots, "save", save)


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
