"""SparseGPT against brute force: least squares, column by column."""

from pruning import sparsegpt
from utils import UserError

import pytest
import torch

OUT, IN = 24, 32


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator)
    # correlated, so that weights can make up for others
    inputs = torch.randn(600, IN, generator=generator) @ mixing
    return torch.randn(OUT, IN, generator=generator), inputs


def refit(row, fixed, inputs):
    """Columns before `fixed` of `row` stand; the others by least squares, so that row @ inputs is
    as it was. Returns (row as it becomes, with that column 0; squared error)."""
    target, free = inputs @ row, inputs[:, fixed + 1 :]
    new = row.clone()
    new[fixed] = 0
    new[fixed + 1 :] = torch.linalg.lstsq(free, target - inputs[:, :fixed] @ row[:fixed]).solution
    return new, float((inputs @ new - target).square().sum())


@pytest.mark.parametrize(
    "n, m, blocksize", [(2, 4, 128), (2, 4, 8), (1, 4, 6), (4, 8, 8), (1, 2, 32)]
)
def test_every_column_is_decided_as_least_squares_would(n, m, blocksize):
    """The algorithm as the paper defines it, without Hessians: from left to right, of each M
    columns go those whose removal costs least when all later columns make up for it, and those make
    up for it."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(16) + 0.2 * torch.randn(16, 16, generator=generator)
    inputs = (torch.randn(200, 16, generator=generator) @ mixing).double()
    weight = torch.randn(6, 16, generator=generator).double()
    expected, kept = weight.clone(), torch.ones(6, 16, dtype=torch.bool)
    for row in range(6):
        for column in range(16):
            if column % m == 0:
                costs = [refit(expected[row], column + i, inputs)[1] for i in range(m)]
                for i in sorted(range(m), key=costs.__getitem__)[: m - n]:
                    kept[row, column + i] = False
            if not kept[row, column]:
                expected[row] = refit(expected[row], column, inputs)[0]
    hessian = (inputs.T @ inputs).float()
    updated, mask = sparsegpt.solve(
        weight.float(), hessian, (n, m), percdamp=0, blocksize=blocksize
    )
    assert torch.equal(mask, kept) and not torch.signbit(updated[~mask]).any()
    assert torch.allclose(updated, expected.float(), atol=1e-4)


def test_dead_inputs_and_singular_hessians(layer):
    weight, inputs = layer
    inputs = inputs.clone()
    inputs[:, 5] = 0
    inputs[:, 6] = inputs[:, 7]
    updated = sparsegpt.solve(weight, inputs.T @ inputs, (2, 4))[0]
    assert updated.isfinite().all() and (updated[:, 5] == 0).all()


def test_m_must_divide(layer):
    with pytest.raises(ValueError, match="does not divide"):
        sparsegpt.solve(layer[0], torch.eye(IN), (2, 5))


def test_a_hessian_that_no_damping_mends_is_told():
    with pytest.raises(UserError, match="give more calibration text"):
        sparsegpt.inverse_factor(torch.ones(4, 4), 0.0)
