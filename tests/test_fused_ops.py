"""masking/fused_ops.py and masking/inclusion.py, plane by plane in float32, against the definition
enumerated in float64."""

from math import cos, radians

from masking import fused_ops
from masking.inclusion import vjp

import pytest
import torch
from exact import drawings, inclusion, inclusion_by_drawings, jacobian
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from masked import planes_of, seeded

# where the M!/(M-N)! ways to draw are few
CHEAP = [(n, m) for m in range(2, 9) for n in range(1, min(m, 5))]


def joined(found):
    return torch.stack(list(found), 1)


def kept_by(bits, m):
    """The indices that each block's bits keep, ascending."""
    return [[i for i in range(m) if code >> i & 1] for code in bits.tolist()]


@st.composite
def blocks(draw, patterns=CHEAP, scale=(0.01, 0.1, 1.0, 5.0)):
    """N, M and float32 logits [4, M] of some scale."""
    n, m = draw(st.sampled_from(patterns))
    logits = torch.randn(4, m, generator=seeded(draw(st.integers(0, 2**31)))) * draw(
        st.sampled_from(scale)
    )
    return n, m, logits


PATTERNS_TO_16 = st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


# ---------------------------------------------------------------------------------------- the ranks


@settings(max_examples=100, deadline=None)
@given(PATTERNS_TO_16, st.data())
def test_the_earliest_and_the_most_probable_are_the_sorted_ones(pattern, data):
    """Few values, so that ties are common; a tie goes to the lower index."""
    n, m = pattern
    numbers = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, torch.inf])
    rows = data.draw(st.lists(st.lists(numbers, min_size=m, max_size=m), min_size=1, max_size=5))
    x = torch.tensor(rows)
    assert kept_by(fused_ops.earliest(planes_of(x), n), m) == [
        sorted(sorted(range(m), key=lambda i: (row[i], i))[:n]) for row in rows
    ]
    assert kept_by(fused_ops.most_probable(planes_of(x), n), m) == [
        sorted(sorted(range(m), key=lambda i: (-row[i], i))[:n]) for row in rows
    ]


# -------------------------------------------------------------------------------- score and drawing


@settings(max_examples=40, deadline=None)
@given(blocks([(1, m) for m in range(2, 9)] + [(2, 3), (2, 4)], scale=(0.1, 1.0, 3.0)))
def test_the_table_gives_each_mask_its_share_of_the_unit_interval(block):
    """u over a fine grid: each mask comes for one interval (the mode for the last), as long as it
    is probable."""
    n, m, logits = block
    grid = 4096
    u = (torch.arange(grid) + 0.5) / grid
    for x in logits:
        bits = fused_ops.draw_by_table(fused_ops.rates(planes_of(x.expand(grid, m)), n), n, u)
        chance, order = drawings(x, n)
        probs = torch.zeros(2**m, dtype=torch.float64).index_add(0, (1 << order).sum(1), chance)
        assert ((torch.bincount(bits, minlength=2**m) - grid * probs).abs() <= 1.01).all()
        assert len(torch.unique_consecutive(bits)) == len(torch.unique(bits))
        first, second = probs.topk(2).values
        assert bits[-1] == probs.argmax() or first - second < 1e-6


@settings(max_examples=60, deadline=None)
@given(PATTERNS_TO_16, st.integers(0, 2**31))
def test_the_race_keeps_the_first_to_arrive(pattern, seed):
    n, m = pattern
    w = torch.rand(8, m, generator=seeded(seed)) + 0.01
    u = torch.rand(8, m, generator=seeded(seed + 1))
    arrival = -(1 - u.double()).log() / w.double()
    found = kept_by(fused_ops.draw_by_race(planes_of(w), n, planes_of(u)), m)
    for row, indices in zip(arrival.tolist(), found):
        times = sorted(row)
        assume(times[n] - times[n - 1] > 1e-5 * times[n])
        assert indices == sorted(sorted(range(m), key=row.__getitem__)[:n])


# ---------------------------------------------------------------------------------------------- vjp


def vjp_of(logits, saliency, n):
    return joined(vjp(planes_of(logits), planes_of(saliency), n)).double()


@settings(max_examples=40, deadline=None)
@given(blocks(), st.integers(0, 2**31))
def test_vjp_is_the_transposed_jacobian_times_the_saliency(block, seed):
    n, m, logits = block
    saliency = torch.randn(4, m, generator=seeded(seed))
    for x, g, row in zip(logits, saliency, vjp_of(logits, saliency, n)):
        expected = jacobian(lambda y: inclusion_by_drawings(y, n), x).T @ g.double()
        assert torch.allclose(row, expected, rtol=1e-4, atol=3e-6 * float(g.abs().max()))


def race_to_one_time(logits, n):
    """inclusion_i = 1 - exp(-w_i tau), sum_i inclusion_i = n: log tau by bisection, float64
    `[blocks, M]`."""
    logits = logits.double() - logits.double().amax(1, keepdim=True)
    low, high = (
        torch.full((len(logits), 1), -60.0).double(),
        torch.full((len(logits), 1), 200.0).double(),
    )
    for _ in range(70):
        middle = (low + high) / 2
        early = (-torch.expm1(-(logits + middle).exp())).sum(1, keepdim=True) < n
        low, high = torch.where(early, middle, low), torch.where(early, high, middle)
    return -torch.expm1(-(logits + low).exp())


LARGE = [(n, m) for m in (9, 12, 16) for n in (m // 2, m - 2)] + [
    (3, 12),
    (4, 16),
    (5, 8),
    (6, 8),
    (7, 8),
]


@settings(max_examples=20, deadline=None)
@given(blocks(LARGE, scale=(0.01, 1.0, 3.0)), st.integers(0, 2**31))
def test_vjp_of_large_blocks_is_that_of_a_race_stopped_at_one_time(block, seed):
    """By central differences of the stopped race, which shares no formula with it."""
    n, m, logits = block
    saliency = torch.randn(4, m, generator=seeded(seed))
    for x, g, row in zip(logits, saliency, vjp_of(logits, saliency, n)):
        shift = 1e-4 * torch.eye(m, dtype=torch.float64)
        difference = (
            (race_to_one_time(x + shift, n) - race_to_one_time(x - shift, n)) @ g.double() / 2e-4
        )
        assert torch.allclose(row, difference, rtol=1e-3, atol=1e-5 * float(g.abs().max()))


@pytest.mark.parametrize(
    "n, m, degrees",
    [
        (1, 16, 0.1),
        (2, 16, 0.1),
        (3, 10, 0.1),
        (5, 6, 0.1),
        (6, 8, 10),
        (4, 16, 10),
        (8, 16, 10),
        (11, 12, 10),
    ],
)
def test_large_blocks_come_near_the_exact_probabilities(n, m, degrees):
    """In the median direction, as inclusion.py says; those whose walk is short are exact. In
    probability within 0.1. The exact ones are held against enumeration in test_pge.py."""
    for scale in (0.1, 1.0, 3.0, 6.0):
        logits = torch.randn(50, m, generator=seeded(m)) * scale
        saliency = torch.randn(50, m, generator=seeded(n))
        exact = logits.double().requires_grad_()
        probs = inclusion(exact, n)
        (expected,) = torch.autograd.grad((probs * saliency).sum(), exact)
        assert degrees < 1 or (race_to_one_time(logits.double(), n) - probs).abs().max() < 0.1
        assert torch.cosine_similarity(vjp_of(logits, saliency, n), expected).median() > cos(
            radians(degrees)
        )


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (4, 8), (8, 16), (1, 16)])
@pytest.mark.parametrize("lead", [10.0, 40.0, 300.0])
def test_vjp_of_saturated_blocks_is_finite_and_small(n, m, lead):
    """A saliency of 1 of what is kept anyway moves nothing; all saliencies alike never do."""
    logits = torch.zeros(1, m)
    logits[:, :n] = lead
    saliency = torch.randn(1, m, generator=seeded(0))
    found = vjp_of(logits, saliency, n)
    assert found.isfinite().all() and found.abs().max() < 50 * m * n * max(
        torch.tensor(-lead).exp().item(), 1e-6
    )
    assert vjp_of(torch.randn(1, m, generator=seeded(1)), torch.ones(1, m), n).abs().max() < 1e-5
