"""Kernels.vjp, the step along J^T G, and soft masks (masking/kernels.py): against enumeration."""
import pge
from masking.block_bits import bits_dtype, bits_to_mask
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace

import pytest
import torch
from exact import inclusion_by_drawings, jacobian
from masked import planes_of, seeded

KEY = layer_keys(0, 0, 1)[0]
BLOCKS = [(1, 2), (1, 4), (2, 4), (3, 4), (5, 6), (4, 8)]


def step(space, logits, saliency, mean_squares, *scale, dtype=torch.float32):
    """One step from logits `[blocks, M]`: the new ones, the mask `[blocks, M]`, and the squares of J^T G."""
    planes, bits = planes_of(logits, dtype), torch.zeros(len(logits), dtype=bits_dtype(space.m))
    squares = Kernels(space, "eager").vjp(planes, bits, saliency.contiguous(), torch.ones_like(saliency), mean_squares,
                                       torch.tensor(scale), KEY)
    return torch.stack(planes, 1), bits_to_mask(bits, space.m), squares


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("n, m", BLOCKS)
def test_the_step_follows_the_jacobian_at_the_temperature(n, m, by_block):
    """J at the logits times 0.5. By block: pi - step * J^T G / rms, and the running mean squares. By layer:
    pi - step * clip(J^T G * factor, +-1). The mask is the mode of the result."""
    made = LinearSpace(n, m)
    logits, saliency = torch.randn(5, m, generator=seeded(n)), torch.randn(5, m, generator=seeded(m))
    vjp = torch.stack([jacobian(lambda y: inclusion_by_drawings(y, n), 0.5 * x).T @ g.double()
                       for x, g in zip(logits, saliency)])
    mean_squares = torch.tensor([-1.0, -1.0, 0.0, 0.01, 2.0]) if by_block else None
    if by_block:
        now, before = vjp.square().mean(1), mean_squares.double()
        expected = torch.where(before < 0, now, 0.9 * before + 0.1 * now)
        move = vjp / expected.sqrt()[:, None]
    else:
        move = (8 * vjp).clamp(-1, 1)
        assert (move.abs() < 1).any() and (move.abs() == 1).any()  # some are clipped, some are not
    moved, mask, squares = step(made, logits, saliency, mean_squares, 8.0, 0.3, 0.5, 0.9)
    assert torch.allclose(moved.double(), logits - 0.3 * move, atol=1e-5)
    assert torch.allclose(squares.double(), vjp.square().sum(1), rtol=1e-4)
    assert torch.equal(mask, made.mode(moved))
    assert not by_block or torch.allclose(mean_squares.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_saliency_that_is_not_finite_moves_nothing_in_its_block(by_block):
    """float16 gradients overflow where one weight matters enormously."""
    made = LinearSpace(2, 4)
    logits, saliency = torch.randn(3, 4, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    saliency[1, 2], saliency[2, 0] = torch.inf, torch.nan
    mean_squares = torch.tensor([-1.0, -1.0, 2.0]) if by_block else None
    moved, _, squares = step(made, logits, saliency, mean_squares, 1.0, 1.0, 1.0, 0.9)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert squares.isnan().tolist() == [False, True, True]  # and is told
    assert not by_block or (mean_squares[0] > 0 and mean_squares[1:].tolist() == [-1.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_read_as_words_to_the_bit(dtype):
    """Weights and gradients of 16 bits at M = 4 are unpacked inside the pass: the same logits as from planes."""
    weight = torch.randn(16, 32, generator=seeded(3)).to(dtype)
    gradient = torch.cat([torch.randn(500, generator=seeded(4)).to(dtype), torch.tensor(
        [0.0, -0.0, 1e-7, -6e-8, 65504.0, -65504.0, 1e-5, 2e-38, 3.0, -1.0, 0.5, 7.0], dtype=torch.float64).to(dtype)])
    gradient, results = gradient.view(16, 32), []
    for given in ((weight, gradient), (weight.float(), gradient.float())):
        logits, bits = [torch.linspace(-2, 2, 128) * (i + 1) for i in range(4)], torch.zeros(128, dtype=torch.uint8)
        scale = torch.tensor([0.3, 0.1, 1.0, 0.0])
        squares = Kernels(LinearSpace(2, 4), "eager").vjp(logits, bits, *given, None, scale, KEY)
        results.append((*logits, bits, squares))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ---------------------------------------------------------------------------------------------------------- soft masks


@pytest.mark.parametrize("n, m", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_soft_mask_is_the_probability_of_being_kept(n, m, dtype):
    logits, weight = torch.randn(50, m, generator=seeded(n)), torch.randn(50, m, generator=seeded(m)).to(dtype)
    out = torch.empty(50 * m, dtype=dtype)
    Kernels(LinearSpace(n, m), "eager").write_soft(list(logits.unbind(1)), weight.view(-1), out, torch.tensor(0.5))
    expected = torch.stack([inclusion_by_drawings(0.5 * x.double(), n) for x in logits]) * weight.double()
    assert torch.allclose(out.view(50, m).double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.01)


def test_soft_masks_of_large_blocks_add_up_to_n():
    """8:16 by the race stopped at one time: near the exact probabilities, and with their sum."""
    logits, out = torch.randn(20, 16, generator=seeded(0)), torch.empty(320)
    Kernels(LinearSpace(8, 16), "eager").write_soft(list(logits.unbind(1)), torch.ones(320), out, torch.tensor(1.0))
    assert torch.allclose(out.view(20, 16).sum(1), torch.tensor(8.0), atol=1e-4)
    assert (out.view(20, 16) - pge.inclusion(logits, 8)).abs().max() < 0.1
