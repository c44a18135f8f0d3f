"""masking/spaces.py: the two spaces are one distribution, and how the first logits are made."""
from decimal import Decimal
from itertools import combinations
from math import comb

import pytest
import torch
from exact import chi_square, distribution, log, mask_of, pattern_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import seeded

import pge
from masking.spaces import LIMIT, MARGIN, SPACES, LinearSpace, PatternSpace, logits_from_scores


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 5), (4, 8)])
def test_pattern_space_expresses_any_linear_distribution(n, m):
    """With pattern logits log p(S | pi), plus any constant, the two spaces are one distribution."""
    linear, pattern = LinearSpace(n, m), PatternSpace(n, m)
    logits = torch.randn(1, m, generator=seeded(1), dtype=torch.float64) * 2
    table = pge.patterns(n, m)
    probs = distribution(logits[0].tolist(), n)
    pattern_logits = probs.log()[None] + 3.0
    assert pattern.width == comb(m, n) == pattern_logits.shape[1]
    linear_log_prob = linear.log_prob(logits.expand(len(table), m), table)
    assert torch.allclose(pattern.log_prob(pattern_logits.expand(len(table), -1), table), linear_log_prob, atol=1e-12)
    assert torch.equal(pattern.mode(pattern_logits), linear.mode(logits))
    for space, x in ((linear, logits), (pattern, pattern_logits)):
        drawn = space.sample(x.float().expand(200_000, -1), seeded(2))
        assert chi_square(pattern_counts(drawn), probs) > 1e-4


def test_one_of_m_is_the_same_in_both_spaces():
    linear, pattern = LinearSpace(1, 6), PatternSpace(1, 6)
    logits = torch.randn(300, 6, generator=seeded(0)) * 4
    mask = linear.sample(logits, seeded(1))
    assert torch.equal(pattern.sample(logits, seeded(1)), mask)
    assert torch.equal(pattern.mode(logits), linear.mode(logits))
    assert torch.equal(pattern.init(mask, 10.0), linear.init(mask, 10.0))
    assert torch.allclose(pattern.score(logits, mask), linear.score(logits, mask), atol=1e-6)
    assert torch.allclose(pattern.log_prob(logits, mask), linear.log_prob(logits, mask), rtol=1e-4, atol=1e-6)


def test_score_of_the_pattern_space_is_autograd_of_its_log_prob():
    space = PatternSpace(2, 5)
    logits = torch.randn(50, 10, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    mask = space.sample(logits.detach(), seeded(1))
    gradient = torch.autograd.grad(space.log_prob(logits, mask).sum(), logits)[0]
    assert torch.allclose(space.score(logits.detach(), mask), gradient, atol=1e-12)


@st.composite
def scored_masks(draw):
    """A space, a mask [4, M] of its N:M, scores [4, M] that may be 0, equal, or far apart, and C."""
    m = draw(st.sampled_from([*range(2, 9), 16]))
    n = draw(st.integers(1, m - 1))
    generator = seeded(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 15.0]))
    score = (torch.randn(4, m, generator=generator) * spread).exp()
    score[torch.rand(4, m, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    mask = pge.mode(draw(st.sampled_from([score, torch.rand(4, m, generator=generator)])), n)  # theirs, or any
    return n, m, mask, score, draw(st.sampled_from([0.0, 0.5, 4.0, 30.0]))


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=60, deadline=None)
@given(drawn=scored_masks())
def test_logits_from_scores_prefer_the_mask_and_by_the_margin(name, drawn):
    n, m, mask, score, magnitude = drawn
    space = SPACES[name](n, m)
    logits = space.init(mask, magnitude, score)
    assert logits.shape == (4, space.width) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert torch.equal(space.mode(logits), mask)
    best, second = logits.topk(2, dim=1).values.unbind(1) if name == "pattern" else (
        logits.masked_fill(~mask, torch.inf).amin(1), logits.masked_fill(mask, -torch.inf).amax(1))
    assert (best - second >= MARGIN - 1e-4).all()


@settings(max_examples=60, deadline=None)
@given(scored_masks())
def test_logits_from_scores_follow_the_formula(drawn):
    """C log(score / weakest kept score), cut off at the limit, a kept weight the margin more; 0 where they disagree."""
    *_, mask, score, magnitude = drawn
    logits = logits_from_scores(mask, magnitude, score)
    for kept, x, row in zip(mask.tolist(), score.double().clamp(min=1e-30).tolist(), logits.tolist()):
        weakest = min(value for value, k in zip(x, kept) if k)
        for value, k, logit in zip(x, kept, row):
            gap = magnitude * float(torch.tensor(value / weakest, dtype=torch.float64).log())
            expected = MARGIN + min(max(gap, 0), LIMIT) if k else max(min(gap, 0), -LIMIT)
            assert logit == pytest.approx(expected, abs=1e-3)


def test_pattern_logits_from_scores_add_up_what_they_keep():
    mask, score = mask_of([0, 2], 4)[None], torch.tensor([[4.0, 1.0, 2.0, 0.5]])
    linear, pattern = (SPACES[name](2, 4).init(mask, 2.0, score)[0] for name in ("linear", "pattern"))
    assert linear.tolist() == pytest.approx([1 + 2 * log(Decimal(2)), -2 * log(Decimal(2)), 1, -4 * log(Decimal(2))])
    assert pattern.tolist() == pytest.approx([float(linear[a] + linear[b]) for a, b in combinations(range(4), 2)])


def test_a_block_of_2_4_leaves_its_mask_once_in_7000_draws():
    """The rare flips the method learns from: 1 - p(m0) at C = 10."""
    left = -pge.log_prob(torch.tensor([[10.0, 10, 0, 0]]), torch.tensor([[True, True, False, False]])).expm1()
    assert float(left) == pytest.approx(1.36e-4, rel=0.01)
