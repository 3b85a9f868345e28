"""The frame around every training loop: what it counts, when it acts, and how it ends."""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import InputError
from minillm.model import LanguageModel, config_of_depth
from minillm.optim import LearningRates, build_optimizers
from minillm.options import TrainingOptions
from minillm.run import Run, Runtime, TrainingState, read_metrics

HERE = Runtime(torch.device("cpu"), torch.float32)


@dataclass
class Nothing:
    """A stream of batches without any."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def fresh_state() -> TrainingState:
    model = LanguageModel(config_of_depth(1, 260, 8))
    rates = LearningRates(matrix=0.1, embedding=0.1, norm=0.1, weight_decay=0.0)
    return TrainingState(model, build_optimizers(model, rates), Nothing())


def open_run(folder, **options) -> Run:
    """A run of a process of its own."""
    return Run("train", TrainingOptions(str(folder / "run"), **options), replace(HERE, closing=ExitStack()))


def update(state: TrainingState) -> None:
    sum(p.square().sum() for p in state.model.parameters()).backward()
    state.optimizers.step(1.0)


def test_a_loop_takes_each_step_once_and_acts_when_it_is_due(tmp_path):
    run, state, saved, acted = open_run(tmp_path), fresh_state(), [], []
    with run.training(state, 7, lambda: saved.append(state.step)):
        while run.goes_on():
            update(state)
            run.log_step(10, loss=1.0, extra=2.0)
            if run.due(3):
                acted.append(state.step)
                run.save()
        run.end()
    assert acted == [3, 6] and saved == [3, 6, 7]
    assert state.step == 7 and state.tokens == 70 and state.seconds > 0
    events = read_metrics(run.folder)
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert all(event["extra"] == 2.0 and event["tokens_per_second"] > 0 for event in events)


@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.integers(0, 2))
def test_any_figure_that_is_no_number_ends_the_run_by_name(value, place):
    figures = {"loss": 1.0, "gradient_norm": 2.0, "kl": 3.0}
    name = list(figures)[place]
    run = Run.__new__(Run)
    run.folder, run.state, run.rate_options, run.saved_step = "out/x", fresh_state(), "--rate", 0
    run.check_finite(**figures)
    with pytest.raises(InputError, match=f"{name.replace('_', ' ')} {value}.*at step 0.*is kept"):
        run.check_finite(**{**figures, name: value})


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    run, state, saved = open_run(tmp_path), fresh_state(), []
    with run.training(state, 2, lambda: saved.append(state.step)):
        run.log_step(1, loss=1.0)
        run.save()
        good = (run.folder / "resume" / "state.safetensors").read_bytes()
        with torch.no_grad():
            next(state.model.parameters())[0, 0] = torch.nan
        with pytest.raises(InputError, match="weights are no longer finite"):
            run.save()
    assert saved == [1] and (run.folder / "resume" / "state.safetensors").read_bytes() == good


def test_the_clock_runs_on_over_the_sittings_of_a_run(tmp_path):
    run, state = open_run(tmp_path), fresh_state()
    with run.training(state, 2, lambda: None):
        update(state)
        run.log_step(5, loss=1.0)
        state.seconds = 1.0
        run.earlier = 1000.0  # as if there had been a long sitting before
        run.save()
    run.runtime.closing.close()
    again, later = open_run(tmp_path, resume=True), fresh_state()
    with again.training(later, 2, lambda: None):
        assert again.resuming and later.step == 1 and later.tokens == 5 and 1000 < later.seconds < 1100
        again.log_step(5, loss=1.0)
        again.save()
    assert later.seconds > 1000 and later.tokens == 10
