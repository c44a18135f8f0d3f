"""masking/spaces.py: the two spaces are one distribution, and how the first logits are made."""

from math import comb

import pge
from masking.spaces import LIMIT, MARGIN, SPACES, LinearSpace, PatternSpace

import pytest
import torch
from exact import chi_square, distribution, pattern_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import seeded


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 5), (4, 8)])
def test_pattern_space_expresses_any_linear_distribution(n, m):
    """With pattern logits log p(S | pi), plus any constant, the two spaces are one distribution."""
    linear, pattern = LinearSpace(n, m), PatternSpace(n, m)
    logits = torch.randn(1, m, generator=seeded(1), dtype=torch.float64) * 2
    probs = distribution(logits[0].tolist(), n)
    pattern_logits = probs.log()[None] + 3.0
    assert pattern.width == comb(m, n) == pattern_logits.shape[1]
    assert torch.equal(pattern.mode(pattern_logits), linear.mode(logits))
    for space, x in ((linear, logits), (pattern, pattern_logits)):
        drawn = space.sample(x.float().expand(200_000, -1), seeded(2))
        assert chi_square(pattern_counts(drawn), probs) > 1e-4


def test_score_of_the_pattern_space_is_autograd_of_the_log_probability():
    space = PatternSpace(2, 5)
    logits = torch.randn(50, 10, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    mask = space.sample(logits.detach(), seeded(1))
    drawn = (mask[:, None] == pge.patterns(2, 5)).all(2)
    gradient = torch.autograd.grad(logits.log_softmax(1)[drawn].sum(), logits)[0]
    assert torch.allclose(space.score(logits.detach(), mask), gradient, atol=1e-12)


@st.composite
def scored_masks(draw):
    """A space, a mask [4, M] of its N:M, scores [4, M] that may be 0, equal, or far apart, and
    C."""
    m = draw(st.sampled_from([*range(2, 9), 16]))
    n = draw(st.integers(1, m - 1))
    generator = seeded(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 15.0]))
    score = (torch.randn(4, m, generator=generator) * spread).exp()
    score[torch.rand(4, m, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    # theirs, or any
    mask = pge.mode(draw(st.sampled_from([score, torch.rand(4, m, generator=generator)])), n)
    return n, m, mask, score, draw(st.sampled_from([0.0, 0.5, 4.0, 30.0]))


@settings(max_examples=60, deadline=None)
@given(scored_masks())
def test_logits_from_scores_follow_the_formula(drawn):
    """C log(score / weakest kept score), cut off at the limit, a kept weight the margin more; 0
    where they disagree. A pattern's is the sum of what it keeps."""
    n, m, mask, score, magnitude = drawn
    linear, pattern = (SPACES[name](n, m) for name in ("linear", "pattern"))
    logits, of_patterns = (space.init(mask, magnitude, score) for space in (linear, pattern))
    assert torch.equal(linear.mode(logits), mask) and torch.equal(pattern.mode(of_patterns), mask)
    assert torch.allclose(of_patterns, logits @ pge.patterns(n, m).float().T, atol=1e-4)
    for kept, x, row in zip(
        mask.tolist(), score.double().clamp(min=1e-30).tolist(), logits.tolist()
    ):
        weakest = min(value for value, k in zip(x, kept) if k)
        for value, k, logit in zip(x, kept, row):
            gap = magnitude * float(torch.tensor(value / weakest, dtype=torch.float64).log())
            expected = MARGIN + min(max(gap, 0), LIMIT) if k else max(min(gap, 0), -LIMIT)
            assert logit == pytest.approx(expected, abs=1e-3)
