"""workers.py: an ordered map over processes that know nothing of the main script."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

from minillm.errors import InputError
from minillm.fast.workers import map_in_processes


@pytest.mark.parametrize(("items", "workers"), [(0, 2), (1, 3), (7, 1), (50, 3)])
def test_results_come_in_the_order_of_the_items(items, workers):
    numbers = range(items)
    assert list(map_in_processes(abs, (-i for i in numbers), workers)) == list(numbers)


def test_every_process_gets_its_share():
    assert len(set(map_in_processes(eval, ["__import__('os').getpid()"] * 6, 3))) == 3


def test_what_a_function_prints_does_not_disturb_its_results():
    assert list(map_in_processes(print, ["aloud"], 1)) == [None]


def test_a_process_that_dies_ends_in_one_line():
    with pytest.raises(InputError, match="use fewer workers") as caught:
        list(map_in_processes(os._exit, range(9), 2))
    assert "\n" not in str(caught.value)


def test_an_error_of_the_item_source_comes_through_and_ends_the_processes():
    def items():
        yield 1
        raise InputError("line 7: not JSON")

    with pytest.raises(InputError, match="line 7"):
        list(map_in_processes(abs, items(), 2))


def test_a_script_without_a_main_guard_is_run_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from minillm.fast.workers import map_in_processes\n"
        "print('started', list(map_in_processes(abs, [-1, -2, -3], 2)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "started [1, 2, 3]\n"
