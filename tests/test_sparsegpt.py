"""SparseGPT against brute force: the exact least-squares reconstruction of a layer for its mask."""
import pytest
import torch

import prune
import sparsegpt

N, M, OUT, IN = 2, 4, 24, 32


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator)
    inputs = torch.randn(600, IN, generator=generator) @ mixing  # correlated, so that weights can make up for others
    return torch.randn(OUT, IN, generator=generator), inputs


def error(weight, other, inputs):
    return float(((weight - other) @ inputs.T).square().sum())


def best_reconstruction(weight, mask, inputs):
    """Row by row, the least-squares weights on the kept inputs; float64."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    inputs = inputs.double()
    for row in range(len(weight)):
        kept = mask[row]
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], inputs @ weight[row].double()).solution
    return best.float()


@pytest.mark.parametrize("n, m, blocksize", [(2, 4, 128), (2, 4, 8), (1, 4, 6), (4, 8, 16), (1, 2, 32)])
def test_the_mask_is_strict_and_the_update_closes_most_of_the_gap(layer, n, m, blocksize):
    weight, inputs = layer
    updated, mask = sparsegpt.solve(weight, inputs.T @ inputs, (n, m), percdamp=1e-4, blocksize=blocksize)
    assert (mask.reshape(-1, m).sum(1) == n).all()
    assert (updated[~mask] == 0).all() and not torch.signbit(updated[~mask]).any()
    least = error(weight, best_reconstruction(weight, mask, inputs), inputs)
    masked = error(weight, weight * mask, inputs)
    found = error(weight, updated, inputs)
    assert least <= found * 1.0001
    assert found < (least + masked) / 2
    magnitude = prune.best_mask(weight.abs(), n, m)
    assert found < error(weight, weight * magnitude, inputs)


def test_one_pruned_weight_is_made_up_for_exactly(layer):
    """Where a row loses its first column only, all others are free to move: the greedy solution is the optimum."""
    weight, inputs = layer[0][:, :8], layer[1][:, :8]
    updated, mask = sparsegpt.solve(weight, inputs.T @ inputs, (7, 8), percdamp=1e-6)
    rows = ~mask[:, 0]
    assert rows.any()
    best = best_reconstruction(weight, mask, inputs)
    assert torch.allclose(updated[rows], best[rows], atol=1e-2, rtol=1e-3)


def test_unstructured_takes_the_share_asked_for(layer):
    weight, inputs = layer
    updated, mask = sparsegpt.solve(weight, inputs.T @ inputs, None, sparsity=0.7, blocksize=8)
    assert abs(float(mask.float().mean()) - 0.3) < 0.01
    assert (updated[~mask] == 0).all()


def test_dead_inputs_and_singular_hessians(layer):
    weight, inputs = layer
    inputs = inputs.clone()
    inputs[:, 5] = 0
    inputs[:, 6] = inputs[:, 7]
    updated, mask = sparsegpt.solve(weight, inputs.T @ inputs, (2, 4))
    assert updated.isfinite().all() and (updated[:, 5] == 0).all()


def test_m_must_divide(layer):
    with pytest.raises(ValueError, match="does not divide"):
        sparsegpt.solve(layer[0], torch.eye(IN), (2, 5))
