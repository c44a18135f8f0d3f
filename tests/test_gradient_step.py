"""Kernels.vjp, the step along J^T G (masking/kernels.py): against enumeration."""

from masking.block_bits import bits_dtype, bits_to_mask
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace

import pytest
import torch
from exact import inclusion_by_drawings, jacobian
from masked import planes_of, seeded

KEY = layer_keys(0, 0, 1)[0]


def step(space, logits, saliency, *scale, dtype=torch.float32):
    """One step from logits `[blocks, M]`: the new ones, the mask `[blocks, M]`, and the squares of
    J^T G."""
    planes, bits = planes_of(logits, dtype), torch.zeros(len(logits), dtype=bits_dtype(space.m))
    squares = Kernels(space, "eager").vjp(
        planes, bits, saliency.contiguous(), torch.ones_like(saliency), torch.tensor(scale), KEY
    )
    return torch.stack(planes, 1), bits_to_mask(bits, space.m), squares


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (2, 4), (3, 4), (5, 6), (4, 8)])
def test_the_step_follows_the_jacobian(n, m):
    """pi - step * clip(J^T G * factor, +-1). The mask is the mode of the result."""
    made = LinearSpace(n, m)
    logits, saliency = (
        torch.randn(5, m, generator=seeded(n)),
        torch.randn(5, m, generator=seeded(m)),
    )
    vjp = torch.stack(
        [
            jacobian(lambda y: inclusion_by_drawings(y, n), x).T @ g.double()
            for x, g in zip(logits, saliency)
        ]
    )
    move = (8 * vjp).clamp(-1, 1)
    assert (move.abs() < 1).any() and (move.abs() == 1).any()  # some are clipped, some are not
    moved, mask, squares = step(made, logits, saliency, 8.0, 0.3)
    assert torch.allclose(moved.double(), logits - 0.3 * move, atol=1e-5)
    assert torch.allclose(squares.double(), vjp.square().sum(1), rtol=1e-4)
    assert torch.equal(mask, made.mode(moved))


def test_a_saliency_that_is_not_finite_moves_nothing_in_its_block():
    """float16 gradients overflow where one weight matters enormously."""
    made = LinearSpace(2, 4)
    logits, saliency = (
        torch.randn(3, 4, generator=seeded(0)),
        torch.randn(3, 4, generator=seeded(1)),
    )
    saliency[1, 2], saliency[2, 0] = torch.inf, torch.nan
    moved, _, squares = step(made, logits, saliency, 1.0, 1.0)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert squares.isnan().tolist() == [False, True, True]  # and is told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_read_as_words_to_the_bit(dtype):
    """Weights and gradients of 16 bits at M = 4 are unpacked inside the pass: the same logits as
    from planes."""
    weight = torch.randn(16, 32, generator=seeded(3)).to(dtype)
    gradient = torch.cat(
        [
            torch.randn(500, generator=seeded(4)).to(dtype),
            torch.tensor(
                [0.0, -0.0, 1e-7, -6e-8, 65504.0, -65504.0, 1e-5, 2e-38, 3.0, -1.0, 0.5, 7.0],
                dtype=torch.float64,
            ).to(dtype),
        ]
    )
    gradient, results = gradient.view(16, 32), []
    for given in ((weight, gradient), (weight.float(), gradient.float())):
        logits, bits = (
            [torch.linspace(-2, 2, 128) * (i + 1) for i in range(4)],
            torch.zeros(128, dtype=torch.uint8),
        )
        squares = Kernels(LinearSpace(2, 4), "eager").vjp(
            logits, bits, *given, torch.tensor([0.3, 0.1]), KEY
        )
        results.append((*logits, bits, squares))
    assert all(torch.equal(a, b) for a, b in zip(*results))
