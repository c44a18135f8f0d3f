"""The estimators of pge.py: unbiased where they are meant to be, by sums over all masks, and by hand."""
import json
import math
from itertools import combinations

import pge

import pytest
import torch
from exact import distribution
from hypothesis import given, settings
from hypothesis import strategies as st

TOY = [0.4, -1.1, 0.9, 0.2]  # one block of 2:4
LOSSES = [2.31, 1.87, 2.6, 2.02, 2.44, 1.95]  # f(S) of its six masks, arbitrary


def chance(probs, a, b):
    """p(S) of a pair: a then b, or b then a."""
    return probs[a] * probs[b] * (1 / (1 - probs[a]) + 1 / (1 - probs[b]))


def mean_estimate(make_estimator, *baseline):
    """sum over S of p(S) A(f(S)) score(S): what the estimator gives on average."""
    logits = torch.tensor([TOY], dtype=torch.float64).expand(6, 4)
    advantages = torch.tensor([make_estimator().advantage(f, *baseline) for f in LOSSES], dtype=torch.float64)
    return (distribution(TOY, 2) * advantages) @ pge.score(logits, pge.patterns(2, 4))


def running(mean):
    estimator = pge.Running()
    estimator.means[0] = mean
    return estimator


def tracker(debias, delta, steps):
    estimator = pge.MaskPro(0.9, debias)
    estimator.delta, estimator.steps = delta, steps
    return estimator


@pytest.fixture(scope="module")
def gradient():
    """d/d pi of sum_S p(S | pi) f(S)."""
    logits = torch.tensor(TOY, dtype=torch.float64, requires_grad=True)
    sum(chance(logits.softmax(0), *kept) * f for kept, f in zip(combinations(range(4), 2), LOSSES)).backward()
    return logits.grad


@pytest.mark.parametrize("make, baseline, factor", [
    (pge.Vanilla, (), 1), (pge.Residual, (0.0,), 1), (pge.Residual, (-50.0,), 1), (lambda: running(1.7), (), 1),
    *[(lambda delta=delta: tracker(False, delta, 7), (2.2,), 0.9) for delta in (0.0, 0.3, -5.0)],
    *[(lambda t=t: tracker(True, 0.3, t - 1), (2.2,), (0.9 - 0.9**t) / (1 - 0.9**t)) for t in (1, 2, 10, 100)]])
def test_each_is_the_gradient_or_a_known_share_of_it(gradient, make, baseline, factor):
    """Whatever the baseline and the mean. MaskPro updates delta before it is used, so a share 1 - alpha of the residual
    cancels: alpha times the gradient. Without the tracker's bias the share is (1 - alpha) / (1 - alpha^t)."""
    assert torch.allclose(mean_estimate(make, *baseline), factor * gradient, atol=1e-12)


def test_a_delta_sequence_by_hand():
    """alpha 0.9, residuals 1, -0.5, 2: delta 0.1, 0.04, 0.236."""
    plain, debiased = pge.MaskPro(0.9), pge.MaskPro(0.9, debias=True)
    deltas, advantages, corrected = [], [], []
    for residual in (1.0, -0.5, 2.0):
        advantages.append(plain.advantage(3.0 + residual, 3.0))
        corrected.append(debiased.advantage(3.0 + residual, 3.0))
        deltas.append(plain.delta)
    assert deltas == pytest.approx([0.1, 0.04, 0.236])
    assert advantages == pytest.approx([0.9, -0.54, 1.764])
    assert corrected == pytest.approx([0.0, -0.5 - 0.04 / 0.19, 2.0 - 0.236 / 0.271])


def test_running_baselines_by_hand():
    """keep 0.8. Minibatch 0: 3, 2, 4 against nothing, 3, 0.8 * 3 + 0.2 * 2 = 2.8; minibatch 1 has a mean of its own."""
    estimator = pge.Running()
    losses = [(3.0, 0), (7.0, 1), (2.0, 0), (7.5, 1), (4.0, 0)]
    assert [estimator.advantage(loss, None, b) for loss, b in losses] == pytest.approx([0, 0, -1, 0.5, 1.2])
    assert estimator.means == pytest.approx({0: 0.8 * 2.8 + 0.2 * 4, 1: 7.1})


def test_normalized_by_hand():
    """decay 0.9: mean squares 4; (0.9 * 0.4 + 0.1 * 1) / 0.19; 0 does not count; (0.9 * 0.46 + 0.1 * 9) / 0.271."""
    estimator = pge.Normalized(pge.Residual(), decay=0.9)
    advantages = [estimator.advantage(loss, 5.0) for loss in (7.0, 4.0, 5.0, 8.0)]
    assert advantages == pytest.approx([1, -1 / (0.46 / 0.19) ** 0.5, 0, 3 / (1.314 / 0.271) ** 0.5])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-6), min_size=1, max_size=30), st.floats(1e-6, 1e6))
def test_normalized_advantages_have_no_unit(losses, unit):
    one, other = (pge.Normalized(pge.Vanilla()) for _ in range(2))
    for loss in losses:
        assert other.advantage(loss * unit) == pytest.approx(one.advantage(loss), rel=1e-6)


def test_normalized_hands_on_the_minibatch_and_the_tracker():
    normalized, plain = pge.Normalized(pge.MaskPro(0.9)), pge.MaskPro(0.9)
    for loss in (4.0, 2.5, 5.0):
        normalized.advantage(loss, 3.0), plain.advantage(loss, 3.0)
        assert normalized.delta == plain.delta != 0
    estimator = pge.Normalized(pge.Running())
    assert [estimator.advantage(loss, None, b) for loss, b in ((3.0, 0), (9.0, 1), (4.0, 0))] == [0, 0, 1]


def test_estimators_by_name():
    made = {name: pge.make_estimator(name, 0.9, True) for name in ("vanilla", "residual", "maskpro", "running")}
    assert [name for name, estimator in made.items() if estimator.needs_baseline] == ["residual", "maskpro"]
    assert [name for name, estimator in made.items() if estimator.delta is not None] == ["maskpro"]
    assert (made["maskpro"].alpha, made["maskpro"].debias) == (0.9, True)
    for name, estimator in made.items():
        normalized = pge.make_estimator(name, normalize=True)
        assert type(normalized.estimator) is type(estimator)
        assert normalized.needs_baseline == estimator.needs_baseline and (normalized.delta is None) == (
            estimator.delta is None)


def test_several_evaluations_of_a_step_by_hand():
    """One delta for all, moved by the mean residual; a minibatch's running mean moved by the mean of its losses; one
    scale from the mean square."""
    tracker = pge.MaskPro(0.9)
    assert tracker.advantages([4.0, 2.0], [3.0, 3.5], [0, 1]) == pytest.approx([1 + 0.025, -1.5 + 0.025])
    assert tracker.delta == pytest.approx(0.1 * -0.25)
    running = pge.Running()
    assert running.advantages([3.0, 5.0, 7.0], [None] * 3, [0, 0, 1]) == pytest.approx([-1, 1, 0])
    assert running.means == pytest.approx({0: 4, 1: 7})
    assert running.advantages([3.0, 2.0], [None] * 2, [0, 0]) == pytest.approx([-1, -2])
    assert running.means == pytest.approx({0: 0.8 * 4 + 0.2 * 2.5, 1: 7})
    normalized = pge.Normalized(pge.Residual(), decay=0.9)
    assert normalized.advantages([4.0, 2.0], [3.0, 5.0], [0, 0]) == pytest.approx([1 / 5**0.5, -3 / 5**0.5])


@pytest.mark.parametrize("make", [pge.Vanilla, pge.Residual, lambda: pge.MaskPro(0.9, True), pge.Running,
                                  lambda: pge.Normalized(pge.Running()), lambda: pge.Normalized(pge.MaskPro())])
def test_each_goes_on_from_its_state(make):
    """Through JSON. A step's one evaluation is a list of one."""
    whole, first, second = make(), make(), make()
    given = [(math.sin(t), math.cos(t), t % 3) for t in range(12)]
    expected = [whole.advantage(*step) for step in given]
    found = [first.advantage(*step) for step in given[:5]]
    second.restore(json.loads(json.dumps(first.state()[0])))
    assert found + [second.advantages(*map(list, zip(step)))[0] for step in given[5:]] == expected
