"""training/loop.py: when a run ends, by steps, epochs or a clock of our own, and the sizes of its steps."""
import json
import math
import os
import signal
import time
from itertools import pairwise
from types import SimpleNamespace

from training.loop import Run, StepResult
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.straight_through import step_size
from training.validation import Validation

import pytest
from masked import TOKENS, Stack, make
from torch import nn


@pytest.fixture
def go(tmp_path, monkeypatch):
    """(seconds of each step from its number, budget of `Run`) -> for each step (progress, expected steps, size for lr =
    1), and the number of steps after each evaluation. Stopped after stop_after steps, it goes on in another Run."""
    clock = SimpleNamespace(now=1e6)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def go(seconds, stop_after=math.inf, not_finite=None, loss=lambda step: 2.0, max_s=math.inf, **budget):
        masked, seen = make(Stack(nn.Linear(16, 8)))[0], []
        arguments = {"checkpoint_every": "1000000"}
        with RunFolder(tmp_path / "run", arguments, "sparsify.py") as folder, StopSignals() as signals:
            for saved in (False, True) if stop_after < math.inf else (False,):
                run = Run(folder, signals, Validation(masked, TOKENS[:0]), 4, **budget)
                folder.is_resumed = saved
                run.restore(masked=masked)
                for _ in run.steps(max_s):
                    step, expected = run.step, run.expected_steps()
                    seen.append((run.progress, expected, step_size(1.0, run.progress, expected)))
                    clock.now += seconds(step)
                    run.advance(StepResult(loss(step), not_finite=not_finite))
                    if run.step == stop_after:
                        run.save()
                        break
                clock.now += 1000  # stopped, or over
            run.save()
            lines = map(json.loads, (folder.path / "metrics.jsonl").open())
            evaluated = [line["step"] for line in lines if "changed" in line]
        return seen, evaluated
    return go


@pytest.mark.parametrize("budget, steps", [({"max_step": 6}, 6), ({"epoch": 2}, 8), ({"epoch": 1.5, "max_step": 9}, 6)])
def test_steps_and_epochs_end_a_run(go, budget, steps):
    seen, evaluated = go(lambda step: 1.0, evaluations=2, **budget)
    assert [progress for progress, *_ in seen] == pytest.approx([t / steps for t in range(steps)])
    assert {expected for _, expected, _ in seen} == {steps} and evaluated == [steps / 2, steps]


@pytest.mark.parametrize("stop_after", [math.inf, 100])
def test_a_time_budget_counts_from_the_end_of_the_first_step(go, stop_after):
    """It compiles for half of the time. The warm-up is not skipped, and the step after it is as small as any."""
    seen, evaluated = go(lambda step: 0.5 if step else 100.0, stop_after, max_s=200.0, evaluations=4)
    assert len(seen) == 201 and evaluated == [51, 101, 151, 201]
    assert [progress for progress, *_ in seen] == pytest.approx([0, *[t / 200 for t in range(200)]])
    assert [expected for _, expected, _ in seen[2:]] == pytest.approx([201] * 199)
    sizes = [size for *_, size in seen]
    assert sizes[2:] == pytest.approx([step_size(1.0, t / 200, 201) for t in range(1, 200)])
    assert max(sizes[:2]) < 0.1 * max(sizes) and sizes[1] < sizes[2] < sizes[3] < sizes[4]  # the warm-up: 4 steps


def test_sizes_follow_the_speed_of_recent_steps(go):
    """Half way through the time, steps take three times as long: from 201 expected steps to the 134 it will have."""
    seen, _ = go(lambda step: 20.0 if step == 0 else 1.0 if step <= 100 else 3.0, max_s=220.0)
    expected = [expected for _, expected, _ in seen]
    assert len(seen) == 135 and expected[100] == pytest.approx(201)
    assert expected[125:134] == pytest.approx([134.3] * 9, abs=0.1)
    assert all(a >= b - 1e-9 for a, b in pairwise(expected[100:134]))


@pytest.mark.parametrize("first_s, steps", [(150.0, 51), (200.0, 1), (500.0, 1)])
def test_a_first_step_longer_than_half_the_time_does_not_prolong_a_run(go, first_s, steps):
    assert len(go(lambda step: 1.0 if step else first_s, max_s=200.0)[0]) == steps


def test_a_signal_while_the_last_state_is_saved_ends_the_run(go, monkeypatch):
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda run: (save(run), os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        go(lambda step: 1.0, max_step=3)
    assert stop.value.code == 128 + signal.SIGTERM


def test_the_mask_of_the_end_is_evaluated_though_the_last_loss_is_not_finite(go, monkeypatch):
    evaluated = []
    monkeypatch.setattr(Validation, "evaluate", lambda validation, step: evaluated.append(step))
    go(lambda step: 1.0, max_step=6, evaluations=2, loss=lambda step: math.nan if step == 5 else 2.0)
    assert evaluated == [3, 6]


@pytest.mark.parametrize("not_finite, said", [(None, 0), (0, 0), (1, 2)])
def test_many_gradients_that_are_not_finite_are_told_at_evaluations(go, capsys, not_finite, said):
    """One of the 32 blocks is more than a hundredth."""
    go(lambda step: 1.0, max_step=6, evaluations=2, not_finite=not_finite)
    assert capsys.readouterr().err.count("the gradients of 1 blocks are not finite") == said
