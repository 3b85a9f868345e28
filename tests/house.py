"""What the house is held to: its lines, its walls, and the functions that one step of each stage enters.

python tests/house.py        prints all three, with the names behind the numbers
"""

import ast
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

ROOT = Path(__file__).parents[1]
OUTER = (
    "minillm/io/",
    "minillm/tools/",
    "minillm/compare/",
    "minillm/world/",
    "minillm/fast/",
    "kernels/dev/",
    "benchmarks/",
)
"""The outer ring: what a learner never has to open."""
APART = ("tests/", "lessons/", "minillm/play/", "docs/")
"""Neither core nor outer ring: not counted."""
ENTRANCES = ("minillm/export.py", "kernels/gate.py", "kernels/bench.py")
"""Files that only give a command its short name."""


def files() -> list[str]:
    """Every Python file of the house, as paths from its root."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [file for file in listed if not file.startswith(APART) and (ROOT / file).exists()]


def is_core(file: str) -> bool:
    return not file.startswith(OUTER)


def lines(file: str) -> int:
    """All of them: blank ones and comments too."""
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def imports(file: str) -> Iterator[tuple[str, bool]]:
    """The modules of ours that a file imports, and whether only inside a function or a script's own lines."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    inside = {
        node
        for part in ast.walk(tree)
        if isinstance(part, ast.FunctionDef)
        or (isinstance(part, ast.If) and "__name__" in ast.unparse(part.test))
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if found := module_file(name):
                yield found, node in inside


def module_file(name: str) -> str | None:
    """The file of ours that holds a module, or a name in one."""
    for dotted in (name, name.rpartition(".")[0]):
        for end in (".py", "/__init__.py"):
            if dotted and (ROOT / (path := dotted.replace(".", "/") + end)).exists():
                return path
    return None


# ---- The functions that a step enters


def entered(script: ModuleType, arguments: list[str]) -> set[tuple[str, str]]:
    """File and name of each function of ours entered between the second and the third call of Run.goes_on."""
    from minillm.run import Run

    found: set[tuple[str, str]] = set()
    goes_on, steps = Run.goes_on, 0

    def notice(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(ROOT)):
            return
        file = str(Path(frame.f_code.co_filename).relative_to(ROOT))
        if not (file.startswith(APART) or ".venv" in file or "<" in frame.f_code.co_name):
            found.add((file, frame.f_code.co_qualname))

    def counted(run: Run) -> bool:
        nonlocal steps
        steps += 1
        sys.setprofile(notice if steps == 2 else None)
        return goes_on(run)

    Run.goes_on = counted  # type: ignore[method-assign]
    try:
        script.main(arguments)
    finally:
        Run.goes_on = goes_on  # type: ignore[method-assign]
        sys.setprofile(None)
    assert steps > 2, f"{script.__name__}: Run.goes_on was called {steps} times"
    return found


def trace(folder: Path) -> dict[str, set[tuple[str, str]]]:
    """What a step of each stage enters, on the smallest runs that there are."""
    import rlhf
    import sft
    import train

    base, chat, out = str(folder / "base"), str(folder / "sft"), str(folder / "rlhf")
    small = ["--device", "cpu", "--cache", str(folder / "cache")]
    step = ["--steps", "4", "--val-every", "9", "--save-every", "9", *small, "--world-megabytes", "0.05"]
    found = {"train.py": entered(train, [
        "--out", base, "--depth", "1", "--vocab-size", "300", "--batch-tokens", "256", "--samples", "0",
        *step,
    ])}  # fmt: skip
    found["sft.py"] = entered(sft, [
        "--init", base, "--out", chat, "--batch-tokens", "256", "--world-conversations", "50",
        "--eval-prompts", "0", *step,
    ])  # fmt: skip
    few = ["--init", chat, "--out", out, "--prompts", "8", "--max-new-tokens", "8", *small]
    rlhf.main(["--stage", "sample", "--models", chat, *few[2:]])
    rlhf.main(["--stage", "rank", *few[2:4]])
    rlhf.main(["--stage", "reward", *few, "--batch-sets", "2", "--val-fraction", "0.3"])
    found["PPO"] = entered(rlhf, [
        "--stage", "policy", *few, "--iterations", "4", "--critic-warmup", "1", "--val-prompts", "2",
        "--val-every", "9", "--save-every", "9", *ROLLOUT,
    ])  # fmt: skip
    return found


ROLLOUT = ["--batch-responses", "16"]


def main() -> None:
    """Everything as JSON: {"lines": {file: n}, "steps": {stage: [[file, function], ...]}}."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        found = trace(Path(folder))
    for stage, functions in found.items():
        by_file = Counter(file for file, _ in functions)
        print(f"{stage}: {len(functions)} functions in {len(by_file)} files", file=sys.stderr)
    print(json.dumps({stage: sorted(functions) for stage, functions in found.items()}))


if __name__ == "__main__":
    main()
