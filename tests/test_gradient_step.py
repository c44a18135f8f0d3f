"""Kernels.vjp, the step along J^T G, and Kernels.write_soft (masking/kernels.py): against
enumeration."""

from masking.block_bits import bits_dtype, bits_to_mask
from masking.fused_kernels import BLOCK_DECAY, MOST
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace

import pytest
import torch
from exact import inclusion_by_drawings, jacobian
from masked import planes_of, seeded

KEY = layer_keys(0, 0, 1)[0]


def step(space, logits, saliency, mean_squares, *scale):
    """One step from logits `[blocks, M]`: the new ones, the mask `[blocks, M]`, and the squares of
    J^T G. Changes mean_squares."""
    planes = planes_of(logits, torch.float32)
    bits = torch.zeros(len(logits), dtype=bits_dtype(space.m))
    ones = torch.ones_like(saliency)
    squares = Kernels(space, "eager").vjp(
        planes, bits, saliency.contiguous(), ones, mean_squares, torch.tensor(scale), KEY
    )
    return torch.stack(planes, 1), bits_to_mask(bits, space.m), squares


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (2, 4), (3, 4), (5, 6), (4, 8)])
def test_the_step_follows_the_jacobian(n, m):
    """pi - clip(step * J^T G / max(rms, floor), +-MOST), J at pi / temperature. The mask is the
    mode of the result."""
    made = LinearSpace(n, m)
    logits, saliency = (
        torch.randn(5, m, generator=seeded(n)),
        torch.randn(5, m, generator=seeded(m)),
    )
    vjp = torch.stack(
        [
            jacobian(lambda y: inclusion_by_drawings(y, n), 0.5 * x).T @ g.double()
            for x, g in zip(logits, saliency)
        ]
    )
    before = torch.tensor(
        [-1.0, 0.0, 1.0, 4.0, -1.0], dtype=torch.bfloat16
    )  # negative: not measured yet
    now = vjp.square().mean(1)
    mean = torch.where(before < 0, now, BLOCK_DECAY * before.double() + (1 - BLOCK_DECAY) * now)
    floor = float(mean.sqrt().median())
    move = (0.4 * vjp / mean.sqrt().clamp(min=floor)[:, None]).clamp(-MOST, MOST)
    assert (move.abs() < MOST).any() and (move.abs() == MOST).any()  # some are clipped, some not
    mean_squares = before.clone()
    moved, mask, squares = step(made, logits, saliency, mean_squares, 1 / floor, 0.4, 0.5)
    assert torch.allclose(moved.double(), logits - move, atol=1e-5)
    assert torch.equal(mean_squares, mean.float().bfloat16())
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
    mean_squares = torch.tensor([1.0, 2.0, -1.0], dtype=torch.bfloat16)
    moved, _, squares = step(made, logits, saliency, mean_squares, 1.0, 1.0, 1.0)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert mean_squares[1:].tolist() == [2.0, -1.0] and mean_squares[0] != 1.0
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
        scale = torch.tensor([0.3, 0.1, 1.0])
        squares = Kernels(LinearSpace(2, 4), "eager").vjp(
            logits, bits, *given, torch.full((128,), -1.0).bfloat16(), scale, KEY
        )
        results.append((*logits, bits, squares))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (4, 8)])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_soft_masks_are_inclusion_probabilities(n, m, backend):
    logits = 3 * torch.randn(6, m, generator=seeded(n))
    weight = torch.randn(6 * m, generator=seeded(m))
    out = torch.full((6 * m,), torch.nan)
    Kernels(LinearSpace(n, m), backend).write_soft(
        planes_of(logits, torch.float32), weight, out, torch.tensor(0.5)
    )
    mu = torch.stack([inclusion_by_drawings(0.5 * x, n) for x in logits])
    assert torch.allclose(out.view(6, m).double(), mu * weight.view(6, m), atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_process_without_rows_has_no_soft_masks(backend):
    none = torch.zeros(0)
    Kernels(LinearSpace(2, 4), backend).write_soft(
        planes_of(torch.zeros(0, 4), torch.float32), none, none.clone(), torch.tensor(1.0)
    )
