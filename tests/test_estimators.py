"""The estimators of pge.py: unbiased where they are meant to be, by sums over all masks, and by
hand."""

from itertools import combinations

import pge

import pytest
import torch
from exact import distribution

TOY = [0.4, -1.1, 0.9, 0.2]  # one block of 2:4
LOSSES = [2.31, 1.87, 2.6, 2.02, 2.44, 1.95]  # f(S) of its six masks, arbitrary


def chance(probs, a, b):
    """p(S) of a pair: a then b, or b then a."""
    return probs[a] * probs[b] * (1 / (1 - probs[a]) + 1 / (1 - probs[b]))


def mean_estimate(make, baseline):
    """sum over S of p(S) A(f(S)) score(S): what the estimator gives on average."""
    logits = torch.tensor([TOY], dtype=torch.float64).expand(6, 4)
    advantages = torch.tensor([make().advantage(f, baseline) for f in LOSSES], dtype=torch.float64)
    return (distribution(TOY, 2) * advantages) @ pge.score(logits, pge.patterns(2, 4))


def tracker(debias, delta, steps):
    estimator = pge.Estimator("maskpro", 0.9, debias)
    estimator.delta, estimator.steps = delta, steps
    return estimator


@pytest.fixture(scope="module")
def gradient():
    """d/d pi of sum_S p(S | pi) f(S)."""
    logits = torch.tensor(TOY, dtype=torch.float64, requires_grad=True)
    sum(
        chance(logits.softmax(0), *kept) * f for kept, f in zip(combinations(range(4), 2), LOSSES)
    ).backward()
    return logits.grad


@pytest.mark.parametrize(
    "make, baseline, factor",
    [
        *[
            (lambda name=name: pge.Estimator(name), baseline, 1)
            for name, baseline in (("vanilla", None), ("residual", 0.0), ("residual", -50.0))
        ],
        *[(lambda delta=delta: tracker(False, delta, 7), 2.2, 0.9) for delta in (0.0, 0.3, -5.0)],
        *[
            (lambda t=t: tracker(True, 0.3, t - 1), 2.2, (0.9 - 0.9**t) / (1 - 0.9**t))
            for t in (1, 2, 10, 100)
        ],
    ],
)
def test_each_is_the_gradient_or_a_known_share_of_it(gradient, make, baseline, factor):
    """Whatever the baseline and the mean. MaskPro updates delta before it is used, so a share 1 -
    alpha of the residual cancels: alpha times the gradient. Without the tracker's bias the share is
    (1 - alpha) / (1 - alpha^t)."""
    assert torch.allclose(mean_estimate(make, baseline), factor * gradient, atol=1e-12)


def test_a_delta_sequence_by_hand():
    """alpha 0.9, residuals 1, -0.5, 2: delta 0.1, 0.04, 0.236."""
    plain, debiased = pge.Estimator("maskpro", 0.9), pge.Estimator("maskpro", 0.9, debias=True)
    deltas, advantages, corrected = [], [], []
    for residual in (1.0, -0.5, 2.0):
        advantages.append(plain.advantage(3.0 + residual, 3.0))
        corrected.append(debiased.advantage(3.0 + residual, 3.0))
        deltas.append(plain.delta)
    assert deltas == pytest.approx([0.1, 0.04, 0.236])
    assert advantages == pytest.approx([0.9, -0.54, 1.764])
    assert corrected == pytest.approx([0.0, -0.5 - 0.04 / 0.19, 2.0 - 0.236 / 0.271])
