"""training/loop.py: when a run ends, by steps or epochs, and what it tells on the way."""

import json
import math
import os
import signal

from training.learner import Learner
from training.loop import Run, StepResult
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.validation import Validation

import pytest
from masked import TOKENS, Stack, make
from torch import nn


@pytest.fixture
def go(tmp_path):
    """Budget of `Run` -> for each step the progress, and the number of steps after each evaluation.
    Stopped after stop_after steps, it goes on in another Run."""

    def go(stop_after=math.inf, not_finite=None, loss=lambda step: 2.0, **budget):
        masked, seen = make(Stack(nn.Linear(16, 8)))[0], []
        arguments = {"checkpoint_every": "1000000"}
        with (
            RunFolder(tmp_path / "run", arguments, "sparsify.py") as folder,
            StopSignals() as signals,
        ):
            for saved in (False, True) if stop_after < math.inf else (False,):
                run = Run(folder, signals, Validation(Learner(masked), TOKENS[:0]), 4, **budget)
                folder.is_resumed = saved
                run.restore(masked=masked)
                for _ in run.steps():
                    step = run.step
                    seen.append(run.share_done)
                    run.advance(StepResult(loss(step), not_finite=not_finite))
                    if run.step == stop_after:
                        run.save()
                        break
            run.save()
            lines = map(json.loads, (folder.path / "metrics.jsonl").open())
            evaluated = [line["step"] for line in lines if "changed" in line]
        return seen, evaluated

    return go


@pytest.mark.parametrize(
    "budget, steps", [({"max_step": 6}, 6), ({"epoch": 2}, 8), ({"epoch": 1.5, "max_step": 9}, 6)]
)
@pytest.mark.parametrize("stop_after", [math.inf, 2])
def test_steps_and_epochs_end_a_run(go, budget, steps, stop_after):
    seen, evaluated = go(stop_after, evaluations=2, **budget)
    assert seen == pytest.approx([t / steps for t in range(steps)]) and evaluated == [
        steps / 2,
        steps,
    ]


def test_a_signal_while_the_last_state_is_saved_ends_the_run(go, monkeypatch):
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda run: (save(run), os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        go(max_step=3)
    assert stop.value.code == 128 + signal.SIGTERM


def test_the_mask_of_the_end_is_evaluated_though_the_last_loss_is_not_finite(go, monkeypatch):
    evaluated = []
    monkeypatch.setattr(Validation, "evaluate", lambda validation, step: evaluated.append(step))
    go(max_step=6, evaluations=2, loss=lambda step: math.nan if step == 5 else 2.0)
    assert evaluated == [3, 6]


@pytest.mark.parametrize("not_finite, said", [(None, 0), (0, 0), (1, 2)])
def test_many_gradients_that_are_not_finite_are_told_at_evaluations(go, capsys, not_finite, said):
    """One of the 32 blocks is more than a hundredth."""
    go(max_step=6, evaluations=2, not_finite=not_finite)
    assert capsys.readouterr().err.count("the gradients of 1 blocks are not finite") == said
