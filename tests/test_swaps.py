"""pruning/swaps.py against brute force: the layer's error in float64, for every swap that could be
made."""

from itertools import pairwise, product

from pruning import swaps
from pruning.calibration import hessian_of
from pruning.one_shot import largest, wanda
from pruning.swaps import confidence, refine_by_swaps

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def layer_of(seed, out, columns, n, m, diagonal=False):
    """weight, Hessian and Wanda's mask; inputs correlated, or `diagonal` H."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(3 * columns, columns, generator=generator) @ mixing
    weight, hessian = torch.randn(out, columns, generator=generator), inputs.T @ inputs
    hessian = hessian.diag().diag() if diagonal else hessian
    return weight, hessian, largest(weight.abs() * hessian.diagonal().sqrt(), n, m)


def errors(weight, mask, hessian):
    """e(m) of each row, float64 `[out]`, H's off-diagonal shrunk as the module says."""
    off = (weight * mask - weight).double()
    hessian = hessian * (1 - swaps.SHRINK) + hessian.diagonal().diag() * swaps.SHRINK
    return 0.5 * ((off @ hessian.double()) * off).sum(1)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 8)])
def test_costs_are_the_change_of_the_error(n, m):
    weight, hessian, mask = layer_of(0, 5, 3 * m, n, m)
    before, shrunk = errors(weight, mask, hessian), swaps._shrunk(hessian)
    gradient = shrunk @ (weight * mask - weight).T
    for start, a, b in product(range(0, 3 * m, m), range(m), range(m)):
        block, other, rows = (
            slice(start, start + m),
            mask.clone(),
            mask[:, start + a] & ~mask[:, start + b],
        )
        other[rows, start + a], other[rows, start + b] = False, True
        costs = swaps._costs(
            weight.T[block], mask.T[block], gradient[block], shrunk[block, block], m
        )[0, a, b]
        assert torch.allclose(
            costs[rows].double(), (errors(weight, other, hessian) - before)[rows], atol=1e-4
        )
        assert costs[~rows].isinf().all()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(1, 2), (2, 4), (3, 6), (2, 8), (8, 16), (20, 80)]),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(0, 2**30),
)
def test_no_swap_is_left_that_improves_a_row(pattern, blocks, out, seed):
    n, m = pattern
    weight, hessian, mask = layer_of(seed, out, blocks * m, n, m)
    found = refine_by_swaps(weight, mask, hessian, m, sweeps=200)
    assert found.dtype == torch.bool and (found.view(-1, m).sum(1) == n).all()
    after = errors(weight, found, hessian)
    assert (after <= errors(weight, mask, hessian) * (1 + 1e-5)).all()
    block = torch.arange(blocks * m) // m
    for row, kept, error in zip(weight, found, after):
        gone, come = (kept[:, None] & ~kept & (block[:, None] == block)).nonzero().T
        others = kept.repeat(blocks * n * (m - n), 1)  # one a swap
        others.scatter_(1, gone[:, None], False).scatter_(1, come[:, None], True)
        assert (errors(row, others, hessian) >= error * (1 - 1e-5) - 1e-6).all()


def test_sweeps_go_down_step_by_step_and_far():
    """Across several runs of columns, whose changes are carried over at their end."""
    weight, hessian, mask = layer_of(1, 64, 5 * swaps.RUN + 8, 2, 4)
    path = [errors(weight, mask, hessian).sum()]
    for sweeps in (1, 2, 3, 20):
        path.append(
            errors(weight, refine_by_swaps(weight, mask, hessian, 4, sweeps), hessian).sum()
        )
    assert all(a > b for a, b in pairwise(path))
    assert path[-1] < 0.85 * path[0]


def test_independent_inputs_make_wandas_mask_the_best():
    weight, hessian, by_wanda = layer_of(2, 9, 48, 2, 4, diagonal=True)
    assert torch.equal(refine_by_swaps(weight, by_wanda, hessian, 4), by_wanda)
    worst = largest(-weight.abs(), 2, 4)
    assert torch.equal(refine_by_swaps(weight, worst, hessian, 4), by_wanda)


def test_confidence_of_independent_inputs_is_wandas_score_to_a_factor_a_block():
    weight, hessian, mask = layer_of(3, 9, 48, 2, 4, diagonal=True)
    found = confidence(weight, mask, hessian, 4).view(-1, 4)
    expected = wanda(weight, hessian.diagonal().sqrt()).view(-1, 4)
    kept = mask.view(-1, 4)
    expected = expected / expected.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_confidence_prefers_the_mask_once_no_swap_improves_it():
    weight, hessian, mask = layer_of(4, 16, 64, 2, 4)
    mask = refine_by_swaps(weight, mask, hessian, 4, 100)
    found = confidence(weight, mask, hessian, 4).view(-1, 4)
    kept = mask.view(-1, 4)
    assert (found[kept] >= 1).all() and (found[~kept] <= 1).all() and found.isfinite().all()
    assert torch.equal(found.masked_fill(~kept, torch.inf).amin(1), torch.ones(len(found)))


def test_inputs_that_never_fire_and_weights_of_zero_change_nothing():
    weight, hessian, mask = layer_of(5, 4, 16, 2, 4)
    assert torch.equal(refine_by_swaps(weight, mask, torch.zeros_like(hessian), 4), mask)
    assert torch.equal(refine_by_swaps(torch.zeros_like(weight), mask, hessian, 4), mask)
    assert (confidence(weight, mask, torch.zeros_like(hessian), 4) == 1).all()


def test_the_hessian_of_many_tokens():
    inputs = torch.randn(3, 3000, 8, dtype=torch.bfloat16)
    expected = inputs.double().flatten(0, 1).T @ inputs.double().flatten(0, 1)
    assert torch.allclose(hessian_of(inputs).double(), expected, atol=1e-2)
