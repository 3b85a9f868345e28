"""The house stays small, its walls stand, a step is a few calls. Bounds only fall, or are argued for."""

import json
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser

import pytest
from house import ENTRANCES, OUTER, ROOT, files, imports, is_core, lines

CORE_LINES, ALL_LINES = 6_752, 16_450
STEPS = {"train.py": (30, 8), "sft.py": (29, 8), "PPO": (83, 14)}
"""Of each stage: the functions that a step enters, those of the progress bar included, and their files."""
SEAMS = {
    "minillm/chat.py": {"minillm/io/template.py", "minillm/tools/chat.py", "minillm/tools/start.py"},
    "minillm/corpus.py": {"minillm/fast/cache.py"},
    "minillm/generate.py": {"minillm/fast/decode.py"},
    "minillm/model.py": {"minillm/io/config.py"},
    "minillm/run.py": {
        "minillm/fast/sharding.py",
        "minillm/io/disk.py",
        "minillm/tools/commandline.py",
        "minillm/tools/device.py",
        "minillm/tools/ending.py",
        "minillm/tools/folder.py",
        "minillm/tools/trackers.py",
    },
    "minillm/tokenizer.py": {"minillm/fast/workers.py"},
    "minillm/reward.py": {"minillm/fast/shared_prompts.py"},
    "rlhf.py": {
        "minillm/io/conversations.py",
        "minillm/io/disk.py",
        "minillm/io/rankings.py",
        "minillm/io/text.py",
        "minillm/tools/annotators.py",
        "minillm/tools/folder.py",
        "minillm/tools/measures.py",
        "minillm/tools/plots.py",
        "minillm/tools/provenance.py",
        "minillm/tools/report.py",
        "minillm/tools/start.py",
        "minillm/world/__init__.py",
    },
    "sft.py": {
        "minillm/compare/metrics.py",
        "minillm/io/conversations.py",
        "minillm/io/files.py",
        "minillm/io/text.py",
        "minillm/tools/measures.py",
        "minillm/tools/plots.py",
        "minillm/tools/sources.py",
        "minillm/tools/start.py",
        "minillm/world/__init__.py",
    },
    "train.py": {
        "minillm/io/disk.py",
        "minillm/io/text.py",
        "minillm/tools/device.py",
        "minillm/tools/plots.py",
        "minillm/tools/sources.py",
        "minillm/tools/start.py",
    },
}
"""Where the core opens the outer ring, only inside functions: a file of the core, and what it opens."""
OPEN_DOOR = "minillm/io/huggingface.py"
"""The one layout on disk: whoever saves or opens a model imports it openly."""
TOPS = ("minillm", "kernels")
SCRIPTS = ("train.py", "sft.py", "rlhf.py")


def test_the_core_can_be_read_in_an_afternoon_and_the_whole_stays_small():
    core = {file: lines(file) for file in files() if is_core(file)}
    total = sum(lines(file) for file in files())
    assert sum(core.values()) <= CORE_LINES, sorted(core.items(), key=lambda item: -item[1])
    assert total <= ALL_LINES


def data_files() -> list[str]:
    """What is tracked in the packages besides Python."""
    command = ["git", "ls-files", *TOPS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [file for file in listed if not file.endswith(".py")]


def test_no_code_hides_in_a_data_file():
    allowed = {"toml", "txt", "css", "j2"}
    for file in data_files():  # what a browser runs is code, and stands in the page's folder alone
        page = {"html", "js"} if file.startswith("minillm/play/static/") else set()
        assert file.rpartition(".")[2] in allowed | page, file


def test_the_core_opens_the_outer_ring_only_inside_functions_and_at_named_seams():
    found = {
        (file, other, inside)
        for file in files()
        if is_core(file) and file not in ENTRANCES
        for other, inside in imports(file)
        if other.startswith(OUTER) and other != OPEN_DOOR
    }
    assert {(file, other) for file, other, inside in found if not inside} == set()
    assert {(file, other) for file, other, _ in found} == {(f, other) for f in SEAMS for other in SEAMS[f]}


def test_kernels_know_nothing_of_models_and_no_module_imports_a_script():
    for file in files():
        for other, _ in imports(file):
            if file.startswith("kernels/") and is_core(file):
                assert other.startswith("kernels/"), f"{file} imports {other}"
            if not file.startswith("benchmarks/"):
                assert other not in SCRIPTS, f"{file} imports {other}"


def test_a_walk_through_the_files_finds_imports_of_every_form():
    assert {("kernels/attention.py", False), ("minillm/world/__init__.py", False)} & set(
        imports("minillm/model.py")
    )
    assert any(inside for file in files() for _, inside in imports(file))


@pytest.fixture(scope="module")
def steps() -> dict[str, list[list[str]]]:
    """The functions that a step of each stage enters, from runs in a process without the tests' hooks."""
    command = [sys.executable, str(ROOT / "tests" / "house.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", STEPS)
def test_a_step_is_a_few_calls_in_a_few_files(steps, stage):
    by_file = Counter(file for file, _ in steps[stage])
    functions, in_files = STEPS[stage]
    assert sum(by_file.values()) <= functions, by_file
    assert len(by_file) <= in_files, by_file
    assert len(by_file) > 3  # a trace that sees nothing would pass every bound


def test_an_installed_copy_has_every_package_and_every_data_file():
    """Of a checkout, everything is found anyway; of a wheel, what setup.cfg names."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    found = [path.parent.relative_to(ROOT) for top in TOPS for path in (ROOT / top).rglob("__init__.py")]
    assert sorted(setup["options"]["packages"].split()) == sorted(".".join(path.parts) for path in found)
    listed = {
        file.relative_to(ROOT).as_posix()
        for package, names in setup["options.package_data"].items()
        for name in names.split(",")
        for file in (ROOT / package.replace(".", "/")).glob(name.strip())
    }
    assert listed == set(data_files())
