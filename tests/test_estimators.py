"""The estimators of pge.py: unbiased where they are meant to be, by sums over all masks in decimals, and by hand."""
from decimal import Decimal, localcontext
from itertools import combinations

import pytest
import torch
from exact import distribution
from hypothesis import given, settings
from hypothesis import strategies as st

import pge

TOY = [0.4, -1.1, 0.9, 0.2]  # one block of 2:4
LOSSES = [2.31, 1.87, 2.6, 2.02, 2.44, 1.95]  # f(S) of its six masks, arbitrary
TOY_PATTERNS = list(combinations(range(4), 2))


def true_gradient():
    """d/d pi of sum_S p(S | pi) f(S), by central differences in decimals of 120 digits."""
    h, gradient = Decimal(10) ** -30, []
    for i in range(4):
        def expected(shift, i=i):
            x = [Decimal(v) + (shift if j == i else 0) for j, v in enumerate(TOY)]
            return sum(chance(x, kept) * Decimal(f) for kept, f in zip(TOY_PATTERNS, LOSSES))
        gradient.append(float((expected(h) - expected(-h)) / (2 * h)))
    return torch.tensor(gradient, dtype=torch.float64)


def chance(x, kept):
    """p(S) of a pair in Decimals: a then b, or b then a."""
    w = [v.exp() for v in x]
    a, b = kept
    total = sum(w)
    return w[a] * w[b] / total * (1 / (total - w[a]) + 1 / (total - w[b]))


def mean_estimate(make_estimator, *baseline):
    """sum over S of p(S) A(f(S)) score(S): what the estimator gives on average."""
    table = pge.patterns(2, 4)
    logits = torch.tensor([TOY], dtype=torch.float64).expand(6, 4)
    advantages = torch.tensor([make_estimator().advantage(f, *baseline) for f in LOSSES], dtype=torch.float64)
    return (distribution(TOY, 2) * advantages) @ pge.score(logits, table)


def tracker(debias, delta, steps):
    estimator = pge.MaskPro(0.9, debias)
    estimator.delta, estimator.steps = delta, steps
    return estimator


@pytest.fixture(scope="module")
def gradient():
    with localcontext() as context:
        context.prec = 120
        return true_gradient()


def test_vanilla_is_unbiased(gradient):
    assert torch.allclose(mean_estimate(pge.Vanilla), gradient, atol=1e-12)


@pytest.mark.parametrize("baseline", [0.0, 2.2, -50.0])
def test_residual_is_unbiased_for_any_baseline(gradient, baseline):
    assert torch.allclose(mean_estimate(pge.Residual, baseline), gradient, atol=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.3, -5.0])
def test_maskpro_is_alpha_times_the_gradient_for_any_delta(gradient, delta):
    """delta is updated before it is used, so a share 1 - alpha of the residual cancels."""
    estimate = mean_estimate(lambda: tracker(False, delta, 7), 2.2)
    assert torch.allclose(estimate, 0.9 * gradient, atol=1e-12)


@pytest.mark.parametrize("t", [1, 2, 10, 100])
def test_the_debiased_tracker_scales_the_gradient_by_a_known_factor(gradient, t):
    """At step t the share is (1 - alpha) / (1 - alpha^t): the first step learns nothing, later ones alpha times."""
    factor = (0.9 - 0.9**t) / (1 - 0.9**t)
    estimate = mean_estimate(lambda: tracker(True, 0.3, t - 1), 2.2)
    assert torch.allclose(estimate, factor * gradient, atol=1e-12)


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


def test_a_constant_residual_is_taken_out_at_once_by_the_debiased_tracker():
    estimator = pge.MaskPro(0.99, debias=True)
    assert all(abs(estimator.advantage(2.5, 2.0)) < 1e-12 for _ in range(50))


def test_running_baselines_by_hand():
    """keep 0.8. Minibatch 0: 3, 2, 4 against nothing, 3, 0.8 * 3 + 0.2 * 2 = 2.8; minibatch 1 has a mean of its own."""
    estimator = pge.Running()
    losses = [(3.0, 0), (7.0, 1), (2.0, 0), (7.5, 1), (4.0, 0)]
    assert [estimator.advantage(loss, None, b) for loss, b in losses] == pytest.approx([0, 0, -1, 0.5, 1.2])
    assert estimator.means == pytest.approx({0: 0.8 * 2.8 + 0.2 * 4, 1: 7.1})


def test_running_is_unbiased_for_any_mean(gradient):
    def visited():
        estimator = pge.Running()
        estimator.means[0] = 1.7
        return estimator
    assert torch.allclose(mean_estimate(visited), gradient, atol=1e-12)


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


def test_normalized_asks_for_what_it_wraps():
    """And hands the minibatch on."""
    assert pge.Normalized(pge.Residual()).needs_baseline and not pge.Normalized(pge.Vanilla()).needs_baseline
    estimator = pge.Normalized(pge.Running())
    assert [estimator.advantage(loss, None, b) for loss, b in ((3.0, 0), (9.0, 1), (4.0, 0))] == [0, 0, 1]


def test_normalized_hands_on_the_tracker():
    normalized, plain = pge.Normalized(pge.MaskPro(0.9)), pge.MaskPro(0.9)
    for loss in (4.0, 2.5, 5.0):
        normalized.advantage(loss, 3.0), plain.advantage(loss, 3.0)
        assert normalized.delta == plain.delta != 0
    assert all(estimator.delta is None for estimator in (pge.Vanilla(), pge.Residual(), pge.Running(),
                                                         pge.Normalized(pge.Running())))


def test_which_estimators_need_a_baseline():
    assert [e.needs_baseline for e in (pge.Vanilla, pge.Residual, pge.MaskPro)] == [False, True, True]
    assert not pge.Running.needs_baseline
    assert pge.MaskPro().alpha == 0.99 and not pge.MaskPro().debias


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


@pytest.mark.parametrize("make_estimator", [pge.Vanilla, pge.Residual, pge.MaskPro, pge.Running,
                                            lambda: pge.Normalized(pge.MaskPro(debias=True))])
def test_one_evaluation_a_step_is_a_list_of_one(make_estimator):
    one, other = make_estimator(), make_estimator()
    for loss, baseline, minibatch in ((3.0, 2.5, 0), (2.0, 2.25, 1), (2.5, 2.5, 0), (4.0, 3.0, 1)):
        assert [one.advantage(loss, baseline, minibatch)] == other.advantages([loss], [baseline], [minibatch])
    assert one.state() == other.state()
