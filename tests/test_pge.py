"""pge.py and masking/spaces.py against enumeration in decimals, finite differences, autograd, and ten million draws."""
from decimal import Decimal, localcontext
from itertools import combinations
from math import comb

import pytest
import torch
from exact import (
    by_inclusion_exclusion,
    by_orderings,
    chi_square,
    distribution,
    log,
    mask_of,
    pattern_counts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pge
from masking.spaces import LIMIT, MARGIN, SPACES, LinearSpace, PatternSpace, logits_from_scores

ALL_TO_SIX = [(n, m) for m in range(2, 7) for n in range(1, m)]
SHAPES = [*ALL_TO_SIX, (2, 8), (4, 8)]
SCALES = [0.1, 1.0, 5.0, 20.0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_blocks(n, m, scale, seed=0):
    """float32 logits with masks of all kinds: the mode twice, one drawn, two arbitrary ones."""
    logits = torch.randn(5, m, generator=seeded(seed)) * scale
    arbitrary = pge.mode(torch.rand(2, m, generator=seeded(seed + 1)), n)
    return logits, torch.cat([pge.mode(logits[:2], n), pge.sample(logits[2:3], n, seeded(seed + 2)), arbitrary])


def assert_exact(logits, mask, reference, tolerance=1e-5):
    log_probs, scores = pge.log_prob(logits, mask), pge.score(logits, mask)
    assert log_probs.dtype == scores.dtype == logits.dtype and scores.shape == logits.shape
    for x, kept, value, row in zip(logits, mask, log_probs, scores):
        p, expected = reference(x.tolist(), tuple(kept.nonzero().flatten().tolist()))
        assert float(value) == pytest.approx(log(p), rel=tolerance, abs=0)
        expected = torch.tensor([float(x) for x in expected], dtype=torch.float64)
        assert (row - expected).abs().max() <= tolerance * expected.abs().max()


# -------------------------------------------------------------------------------------------------- log_prob and score


@pytest.mark.parametrize("n, m", SHAPES)
def test_log_prob_and_score_equal_enumeration_over_orderings(n, m):
    for seed, scale in enumerate(SCALES):
        assert_exact(*some_blocks(n, m, scale, seed), by_orderings)


@pytest.mark.parametrize("scale", SCALES)
def test_log_prob_and_score_of_8_16(scale):
    """8! orderings are too many: the reference is inclusion-exclusion, itself held against orderings below."""
    assert_exact(*some_blocks(8, 16, scale), by_inclusion_exclusion)


def test_the_two_references_agree():
    logits, mask = some_blocks(3, 6, 5.0)
    for x, kept in zip(logits.tolist(), mask):
        kept = tuple(kept.nonzero().flatten().tolist())
        (p, score), (other_p, other_score) = by_orderings(x, kept), by_inclusion_exclusion(x, kept)
        assert all(abs(a - b) < Decimal(10) ** -100 for a, b in zip([p, *score], [other_p, *other_score]))


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_saturated_blocks_keep_their_relative_accuracy(n, m, gap):
    """log p of m0 is about -e^-gap: it must not round to 0; nor the score, which is as small."""
    m0 = mask_of(range(n), m)
    other = mask_of(range(m - n, m), m)
    logits = (m0 * gap).expand(2, m)
    assert_exact(logits, torch.stack([m0, other]), by_orderings)


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (3, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("gap", [40.0, 80.0])
def test_nothing_is_nan_at_large_gaps(n, m, gap):
    generator = seeded(0)
    rows = torch.stack([mask_of(range(k), m) * gap for k in (1, n, m - 1)]
                       + [torch.rand(m, generator=generator) * gap, -torch.rand(m, generator=generator) * gap])
    masks = torch.cat([pge.mode(rows, n), pge.mode(-rows, n), pge.sample(rows, n, generator)])
    logits = rows.repeat(3, 1).requires_grad_()
    log_probs = pge.log_prob(logits, masks)
    assert log_probs.isfinite().all() and (log_probs <= 0).all()
    assert torch.autograd.grad(log_probs.sum(), logits)[0].isfinite().all()
    assert pge.score(logits.detach(), masks).isfinite().all()
    if m <= 8:
        assert pge.inclusion(rows, n).isfinite().all()


@pytest.mark.parametrize("n, m", SHAPES)
def test_score_is_autograd_and_finite_differences_of_log_prob(n, m):
    logits, mask = some_blocks(n, m, 2.0)
    logits = logits.double().requires_grad_()
    score = pge.score(logits.detach(), mask)
    assert torch.allclose(score, torch.autograd.grad(pge.log_prob(logits, mask).sum(), logits)[0], atol=1e-12, rtol=0)
    step = 1e-5 * torch.eye(m, dtype=torch.float64)
    with torch.no_grad():
        for i in range(m):
            difference = (pge.log_prob(logits + step[i], mask) - pge.log_prob(logits - step[i], mask)) / 2e-5
            assert torch.allclose(score[:, i], difference, atol=1e-8, rtol=0)


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_probabilities_sum_to_one_and_scores_average_to_zero(n, m, scale):
    table = pge.patterns(n, m)
    logits = (torch.randn(1, m, generator=seeded(m), dtype=torch.float64) * scale).expand(len(table), m)
    probs = pge.log_prob(logits, table).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    assert (probs @ pge.score(logits, table)).abs().max() < 1e-12
    assert torch.allclose(pge.pattern_probs(logits[:1], n)[0], probs, atol=1e-14, rtol=1e-10)


def test_two_of_four_in_closed_form():
    """q_i = sum_{j != i} p_j, R = 1/(1/q_a + 1/q_b), u_i = 1[i in S] (1 + R p_i / q_i^2), g = u - p sum(u)."""
    logits = torch.randn(500, 4, generator=seeded(0), dtype=torch.float64) * 3
    mask = pge.sample(torch.zeros_like(logits), 2, seeded(1))
    p = logits.softmax(1)
    q = torch.stack([p[:, [j for j in range(4) if j != i]].sum(1) for i in range(4)], 1)
    R = 1 / (mask / q).sum(1, keepdim=True)
    u = mask * (1 + R * p / q**2)
    assert torch.allclose(pge.score(logits, mask), u - p * u.sum(1, keepdim=True), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_symmetries(data):
    """log p ignores a shift of the block; permuting a block permutes everything; the score pulls the kept up."""
    m = data.draw(st.integers(2, 10))
    n = data.draw(st.integers(1, min(m - 1, 5)))
    logits = torch.tensor([data.draw(st.lists(st.floats(-30, 30, width=32), min_size=m, max_size=m))]).double()
    mask = mask_of(data.draw(st.permutations(range(m)))[:n], m)[None]
    order = data.draw(st.permutations(range(m)))
    log_prob, score = pge.log_prob(logits, mask), pge.score(logits, mask)
    assert torch.allclose(pge.log_prob(logits + 17.0, mask), log_prob, rtol=1e-9, atol=1e-300)
    assert torch.allclose(pge.log_prob(logits[:, order], mask[:, order]), log_prob, rtol=1e-9, atol=1e-300)
    assert torch.allclose(pge.score(logits[:, order], mask[:, order]), score[:, order], rtol=1e-9, atol=1e-15)
    assert (score[mask] >= 0).all() and (score[~mask] <= 0).all() and (score <= n).all()
    assert score.sum().abs() < 1e-12


def test_a_mask_that_varies_in_n_is_refused():
    with pytest.raises(ValueError, match="same number"):
        pge.log_prob(torch.zeros(2, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool())


# ----------------------------------------------------------------------------------------------------------- inclusion


@pytest.mark.parametrize("n, m", SHAPES)
def test_inclusion_equals_enumeration_and_sums_to_n(n, m):
    logits = torch.randn(2, m, generator=seeded(n), dtype=torch.float64) * 3
    inclusion = pge.inclusion(logits, n)
    assert torch.allclose(inclusion.sum(1), torch.tensor(float(n), dtype=torch.float64), atol=1e-12)
    for x, row in zip(logits.tolist(), inclusion):
        probs = distribution(x, n)
        expected = [sum(float(p) for p, kept in zip(probs, combinations(range(m), n)) if i in kept) for i in range(m)]
        assert torch.allclose(row, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("n, m", [(1, 3), (2, 4), (3, 5), (4, 8)])
def test_jacobian_of_inclusion(n, m):
    """d mu_i / d pi_j = sum over S of p(S) 1[i in S] score_j(S), and finite differences."""
    logits = torch.randn(1, m, generator=seeded(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pge.inclusion(x, n), logits)
    jacobian = torch.autograd.functional.jacobian(lambda x: pge.inclusion(x[None], n)[0], logits[0].detach())
    table, block = pge.patterns(n, m), logits.detach()
    scores = pge.score(block.expand(len(table), m), table)
    assert torch.allclose(jacobian, (table * pge.pattern_probs(block, n)[0, :, None]).T @ scores, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- sample and mode

DRAWS = [  # logits of a block, N, millions of draws
    ([10.0, 10.0, 0.0, 0.0], 2, 4), ([10.0, 0.0, 0.0, 0.0], 2, 1), ([0.0, 0.0, 0.0, 0.0], 2, 1),
    ([1.0, -0.5, 2.0, 0.3], 2, 1), ([10.0, 0.0, 0.0, 0.0], 1, 2), ([3.0, 0.0, 3.0, 3.0], 3, 1),
    ([10.0, 0.0, 10.0, 0.0, 10.0, 0.0, 10.0, 0.0], 4, 1),
]


def test_draws_are_ten_million():
    assert sum(millions for *_, millions in DRAWS) >= 10


@pytest.mark.parametrize("logits, n, millions", DRAWS)
def test_pattern_frequencies(logits, n, millions):
    generator = seeded(len(logits) + n)
    blocks = torch.tensor(logits).expand(10**6, -1)
    counts = sum(pattern_counts(pge.sample(blocks, n, generator)) for _ in range(millions))
    assert chi_square(counts, distribution(logits, n)) > 1e-4


def test_chi_square_notices_a_wrong_distribution():
    counts = pattern_counts(pge.sample(torch.tensor([10.0, 10.0, 0.0, 0.0]).expand(10**6, 4), 2, seeded(0)))
    assert chi_square(counts, distribution([9.5, 9.5, 0.0, 0.0], 2)) < 1e-6


def test_sample_is_reproducible_and_strict():
    logits = torch.randn(1000, 16, generator=seeded(0)) * 20
    first, second = pge.sample(logits, 8, seeded(5)), pge.sample(logits, 8, seeded(5))
    assert torch.equal(first, second) and first.dtype == torch.bool and (first.sum(1) == 8).all()


def test_mode_keeps_the_largest_and_ties_go_to_the_lower_index():
    logits = torch.tensor([[0.0, 0, 0, 0], [1, 2, 2, 2], [0, 3, 1, 1], [-1, -2, -1, -1]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0]]).bool()
    assert torch.equal(pge.mode(logits, 2), expected)
    assert torch.equal(pge.mode(torch.zeros(1, 16), 8)[0], mask_of(range(8), 16))


def test_mode_is_the_most_probable_pattern():
    logits = torch.randn(200, 5, generator=seeded(0))
    assert torch.equal(pge.mode(logits, 2), pge.patterns(2, 5)[pge.pattern_probs(logits, 2).argmax(1)])


# -------------------------------------------------------------------------------------------------------------- spaces


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


@pytest.mark.parametrize("name", SPACES)
def test_initial_logits_prefer_the_initial_mask(name):
    space = SPACES[name](2, 4)
    mask = pge.sample(torch.zeros(100, 4), 2, seeded(0))
    logits = space.init(mask, 10.0)
    assert logits.shape == (100, space.width) and sorted(set(logits.flatten().tolist())) == [0.0, 10.0]
    assert torch.equal(space.mode(logits), mask)


@st.composite
def scored_masks(draw):
    """A space, a mask [4, M] of its N:M, scores [4, M] that may be 0, equal, or far apart, and C."""
    m = draw(st.integers(2, 8))
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


def test_logits_from_scores_of_8_16():
    score = torch.rand(50, 16, generator=seeded(0)) + 0.1
    mask = pge.mode(score, 8)
    for name in SPACES:
        space = SPACES[name](8, 16)
        assert torch.equal(space.mode(space.init(mask, 4.0, score)), mask)


def test_a_block_of_2_4_leaves_its_mask_once_in_7000_draws():
    """The rare flips the method learns from: 1 - p(m0) at C = 10."""
    left = -pge.log_prob(torch.tensor([[10.0, 10, 0, 0]]), torch.tensor([[True, True, False, False]])).expm1()
    assert float(left) == pytest.approx(1.36e-4, rel=0.01)


# ---------------------------------------------------------------------------------------------------------- estimators

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
