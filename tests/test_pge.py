"""pge.py against enumeration in decimals, autograd, and ten million draws."""

from decimal import Decimal
from itertools import combinations

import pge

import pytest
import torch
from exact import (
    by_inclusion_exclusion,
    by_orderings,
    chi_square,
    distribution,
    inclusion,
    log,
    mask_of,
    pattern_counts,
)
from masked import seeded

ALL_TO_SIX = [(n, m) for m in range(2, 7) for n in range(1, m)]
SHAPES = [*ALL_TO_SIX, (2, 8), (4, 8)]
SCALES = [0.1, 1.0, 5.0, 20.0]


def some_blocks(n, m, scale, seed=0):
    """float32 logits with masks of all kinds: the mode twice, one drawn, two arbitrary ones."""
    logits = torch.randn(5, m, generator=seeded(seed)) * scale
    arbitrary = pge.mode(torch.rand(2, m, generator=seeded(seed + 1)), n)
    return logits, torch.cat(
        [pge.mode(logits[:2], n), pge.sample(logits[2:3], n, seeded(seed + 2)), arbitrary]
    )


def assert_exact(logits, mask, reference, tolerance=1e-5):
    log_probs, scores = pge.log_prob(logits, mask), pge.score(logits, mask)
    assert log_probs.dtype == scores.dtype == logits.dtype and scores.shape == logits.shape
    for x, kept, value, row in zip(logits, mask, log_probs, scores):
        p, expected = reference(x.tolist(), tuple(kept.nonzero().flatten().tolist()))
        assert float(value) == pytest.approx(log(p), rel=tolerance, abs=0)
        expected = torch.tensor([float(x) for x in expected], dtype=torch.float64)
        assert (row - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------------- log_prob and score


@pytest.mark.parametrize("n, m", SHAPES)
def test_log_prob_and_score_equal_enumeration_over_orderings(n, m):
    for seed, scale in enumerate(SCALES):
        assert_exact(*some_blocks(n, m, scale, seed), by_orderings)


@pytest.mark.parametrize("scale", SCALES)
def test_log_prob_and_score_of_8_16(scale):
    """8! orderings are too many: the reference is inclusion-exclusion, itself held against
    orderings below."""
    assert_exact(*some_blocks(8, 16, scale), by_inclusion_exclusion)


def test_the_two_references_agree():
    logits, mask = some_blocks(3, 6, 5.0)
    for x, kept in zip(logits.tolist(), mask):
        kept = tuple(kept.nonzero().flatten().tolist())
        (p, score), (other_p, other_score) = by_orderings(x, kept), by_inclusion_exclusion(x, kept)
        assert all(
            abs(a - b) < Decimal(10) ** -100 for a, b in zip([p, *score], [other_p, *other_score])
        )


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_saturated_blocks_keep_their_relative_accuracy(n, m, gap):
    """log p of m0 is about -e^-gap: it must not round to 0; nor the score, which is as small."""
    m0 = mask_of(range(n), m)
    other = mask_of(range(m - n, m), m)
    logits = (m0 * gap).expand(2, m)
    assert_exact(logits, torch.stack([m0, other]), by_orderings)


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (3, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("gap", [40.0, 80.0, 800.0])
def test_nothing_is_nan_at_large_gaps(n, m, gap):
    generator = seeded(0)
    rows = torch.stack(
        [mask_of(range(k), m) * gap for k in (1, n, m - 1)]
        + [torch.rand(m, generator=generator) * gap, -torch.rand(m, generator=generator) * gap]
    )
    masks = torch.cat([pge.mode(rows, n), pge.mode(-rows, n), pge.sample(rows, n, generator)])
    logits = rows.repeat(3, 1).requires_grad_()
    log_probs = pge.log_prob(logits, masks)
    assert log_probs.isfinite().all() and (log_probs <= 0).all()
    assert torch.autograd.grad(log_probs.sum(), logits)[0].isfinite().all()
    assert pge.score(logits.detach(), masks).isfinite().all()


def test_the_score_of_two_kept_is_its_closed_form():
    logits = torch.randn(100, 4, generator=seeded(0), dtype=torch.float64) * 3
    mask = pge.sample(logits, 2, seeded(1))
    p = logits.softmax(1)
    q = 1 - p
    r = 1 / (1 / q)[mask].view(-1, 2).sum(1, keepdim=True)
    u = mask * (1 + r * p / q**2)
    assert torch.allclose(pge.score(logits, mask), u - p * u.sum(1, keepdim=True), atol=1e-9)


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_probabilities_sum_to_one_and_scores_average_to_zero(n, m, scale):
    table = pge.patterns(n, m)
    logits = (torch.randn(1, m, generator=seeded(m), dtype=torch.float64) * scale).expand(
        len(table), m
    )
    probs = pge.log_prob(logits, table).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    assert (probs @ pge.score(logits, table)).abs().max() < 1e-12


def test_a_mask_that_varies_in_n_is_refused():
    with pytest.raises(ValueError, match="same number"):
        pge.log_prob(torch.zeros(2, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool())


@pytest.mark.parametrize("n, m", SHAPES)
def test_inclusion_equals_enumeration_and_sums_to_n(n, m):
    logits = torch.randn(2, m, generator=seeded(n), dtype=torch.float64) * 3
    found = inclusion(logits, n)
    assert torch.allclose(found.sum(1), torch.tensor(float(n), dtype=torch.float64), atol=1e-12)
    for x, row in zip(logits.tolist(), found):
        probs = distribution(x, n)
        expected = [
            sum(float(p) for p, kept in zip(probs, combinations(range(m), n)) if i in kept)
            for i in range(m)
        ]
        assert torch.allclose(row, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


# ---------------------------------------------------------------------------------- sample and mode

DRAWS = [  # logits of a block, N, millions of draws
    ([10.0, 10.0, 0.0, 0.0], 2, 4),
    ([10.0, 0.0, 0.0, 0.0], 2, 1),
    ([0.0, 0.0, 0.0, 0.0], 2, 1),
    ([1.0, -0.5, 2.0, 0.3], 2, 1),
    ([10.0, 0.0, 0.0, 0.0], 1, 2),
    ([3.0, 0.0, 3.0, 3.0], 3, 1),
    ([10.0, 0.0, 10.0, 0.0, 10.0, 0.0, 10.0, 0.0], 4, 1),
]


@pytest.mark.parametrize("logits, n, millions", DRAWS)
def test_pattern_frequencies(logits, n, millions):
    generator = seeded(len(logits) + n)
    blocks = torch.tensor(logits).expand(10**6, -1)
    counts = sum(pattern_counts(pge.sample(blocks, n, generator)) for _ in range(millions))
    assert chi_square(counts, distribution(logits, n)) > 1e-4


def test_chi_square_notices_a_wrong_distribution():
    counts = pattern_counts(
        pge.sample(torch.tensor([10.0, 10.0, 0.0, 0.0]).expand(10**6, 4), 2, seeded(0))
    )
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
    table = pge.patterns(2, 5)
    for logits in torch.randn(200, 1, 5, generator=seeded(0)):
        best = pge.log_prob(logits.expand(len(table), 5), table).argmax()
        assert torch.equal(pge.mode(logits, 2)[0], table[best])
