"""How the rate falls over a run, by steps or by the clock."""
import math
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import GRADIENTS, column
from training.progress import lr_multiplier

from masking.masked_model import MaskedModel
from training.straight_through import StraightThrough, random_walk_step


def sizes(monkeypatch, clock=None):
    """A list that gets the size of each gradient step; with a clock, each step takes 12 seconds of it."""
    seen, learn_from = [], StraightThrough.learn

    def record(self, batch, size):
        seen.append(size)
        if clock:
            clock.now += 12
        return learn_from(self, batch, size)
    monkeypatch.setattr(StraightThrough, "learn", record)
    return seen


@given(st.floats(0, 1))
def test_lr_multiplier(progress):
    warm = min(1, (progress + 0.001) / 0.02)
    assert lr_multiplier("constant", progress) == 1
    assert lr_multiplier("linear", progress) == pytest.approx((1 - progress) * warm)
    assert lr_multiplier("cosine", progress) == pytest.approx(math.cos(math.pi * progress / 2) ** 2 * warm, abs=1e-12)


@pytest.mark.parametrize("steps", [100, 1000])
def test_random_walk_step_lets_noise_come_as_far_in_any_run(steps):
    """Random walks of linearly decaying steps, 20,000 of them: their standard deviation is what was asked for."""
    size = random_walk_step(0.4, steps) * (1 - torch.arange(steps) / steps)
    signs = torch.randint(2, (20_000, steps), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float((signs * size).sum(1).std()) == pytest.approx(0.4, rel=0.03)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_is_in_force(learn, monkeypatch, schedule):
    seen = sizes(monkeypatch)
    learn(f"{GRADIENTS} --schedule {schedule} --epoch 2 --max_step 10 --targets k_proj")
    assert seen == pytest.approx([0.3 * (3 / 10) ** 0.5 * lr_multiplier(schedule, t / 10) for t in range(10)])


def test_the_schedule_is_in_force_for_advantages(learn, monkeypatch):
    seen, update = [], MaskedModel.update

    def record(self, coefficient):
        seen.append(coefficient)
        update(self, coefficient)
    monkeypatch.setattr(MaskedModel, "update", record)
    run = learn("--estimator vanilla --logits 1 --lr 0.5 --tokens 768 --max_step 8 --schedule linear --targets k_proj")
    expected = [0.5 * lr_multiplier("linear", t / 8) * line["loss"] for t, line in enumerate(run.metrics)]
    assert seen == pytest.approx(expected)


def test_minutes_end_a_run_and_its_schedule(learn, monkeypatch):
    """Steps of 12 seconds by a clock of our own: of one minute, five, the rate falling with the clock."""
    clock = SimpleNamespace(now=1e9)
    for name in ("time", "monotonic"):  # whichever the run goes by
        monkeypatch.setattr(time, name, lambda: clock.now)
    seen = sizes(monkeypatch, clock)
    run = learn(f"{GRADIENTS} --schedule linear --epoch 100 --max_minutes 1 --targets k_proj --val_fraction 0.2 "
                "--num_evals 5")
    assert len(run.metrics) == 5 and column(run, "seconds") == [12, 24, 36, 48, 60]
    assert [line["step"] for line in run.layers] == [1, 2, 3, 4, 5]
    expected = [0.3 * lr_multiplier("linear", t / 5) * (3 / 5) ** 0.5 for t in range(1, 5)]
    assert seen[1:] == pytest.approx(expected)
    assert run.record["arguments"]["max_minutes"] == 1
