"""The step along J^T G on its own (masking/kernels.py): against enumeration and finite differences."""
import pytest
import torch
from exact import exact_vjp, inclusion_by_drawings, jacobian, pattern_inclusion
from masked import (
    seeded,
)

import pge
from masking.block_bits import bits_dtype, bits_to_mask
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import SPACES, LinearSpace


@pytest.mark.parametrize("space, n, m, mode", [
    *[("linear", n, m, mode) for n, m in ((1, 4), (2, 4), (3, 4), (4, 8)) for mode in ("eager", "exact")],
    ("linear", 5, 6, "exact"), ("pattern", 1, 4, "eager"), ("pattern", 2, 4, "eager"), ("pattern", 3, 6, "exact")])
def test_the_step_follows_the_jacobian_of_the_inclusion_probabilities(space, n, m, mode):
    """pi - clip(J^T G * scale, +-1) * rate, the squares of J^T G, and the mode of the result."""
    made = SPACES[space](n, m)
    logits, saliency = torch.randn(5, made.width, generator=seeded(n)), torch.randn(5, m, generator=seeded(m))
    inclusion = (lambda x: pattern_inclusion(x, n, m)) if space == "pattern" else lambda x: inclusion_by_drawings(x, n)
    vjp = torch.stack([jacobian(inclusion, x).T @ g.double() for x, g in zip(logits, saliency)])
    planes = [plane.clone() for plane in logits.unbind(1)]
    bits = torch.zeros(5, dtype=bits_dtype(m))
    squares = Kernels(made, mode).vjp(planes, bits, saliency, torch.ones_like(saliency), None,
                                      torch.tensor([4.0, 0.3, 1.0, 0.0]), layer_keys(0, 0, 1)[0])
    assert ((4 * vjp).abs() > 1).any() and ((4 * vjp).abs() < 1).any()  # some are clipped, some are not
    moved = torch.stack(planes, 1)
    assert torch.allclose(moved.double(), logits - (4 * vjp).clamp(-1, 1) * 0.3, atol=1e-5)
    assert torch.allclose(squares.double(), vjp.square().sum(1), rtol=1e-4)
    assert torch.equal(bits_to_mask(bits, m), made.mode(moved))


def test_the_exact_step_of_8_16_by_finite_differences():
    space = LinearSpace(8, 16)
    logits, saliency = torch.randn(1, 16, generator=seeded(0)), torch.randn(1, 16, generator=seeded(1))
    shift = 1e-5 * torch.eye(16).double()
    ends = pge.inclusion(torch.cat([logits.double() + shift, logits.double() - shift]), 8) @ saliency[0].double()
    planes = [plane.clone() for plane in logits.unbind(1)]
    scale, key = torch.tensor([0.1, 1.0, 1.0, 0.0]), layer_keys(0, 0, 1)[0]
    Kernels(space, "exact").vjp(planes, None, saliency, torch.ones_like(saliency), None, scale, key)
    expected = logits.double() - 0.1 * (ends[:16] - ends[16:]) / 2e-5
    assert torch.allclose(torch.stack(planes, 1).double(), expected, atol=1e-6)


@pytest.mark.parametrize("space", ["linear", "pattern"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_below_a_16_bit_step_count_on_average(space, dtype):
    """Rounded to the nearest, not one logit of 3 would move."""
    made, blocks = SPACES[space](2, 4), 2**16
    planes = [torch.full((blocks,), 3.0, dtype=dtype) for _ in range(made.width)]
    saliency = torch.tensor([1.0, -1.0, 0.5, 0.0]).expand(blocks, 4)
    rate = 1e-4
    scale, key = torch.tensor([1.0, rate, 1.0, 0.0]), layer_keys(0, 0, 1)[0]
    Kernels(made, "eager").vjp(planes, None, saliency.contiguous(), torch.ones(blocks, 4), None, scale, key)
    vjp = exact_vjp(made, torch.full((1, made.width), 3.0), saliency[:1])[0]
    moved = torch.stack(planes, 1).double() - 3
    assert vjp.abs().max() > 0.1 and planes[0].dtype == dtype
    assert ((moved.mean(0) + rate * vjp).abs() < 5 * moved.std(0) / blocks**0.5 + 1e-7).all()


@pytest.mark.parametrize("space, mode", [("linear", "eager"), ("linear", "exact"), ("pattern", "eager")])
def test_a_saliency_that_is_not_finite_moves_nothing_in_its_block(space, mode):
    """float16 gradients overflow where one weight matters enormously."""
    made = SPACES[space](2, 4)
    logits, saliency = torch.randn(3, made.width, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    saliency[1, 2], saliency[2, 0] = torch.inf, torch.nan
    planes = [plane.clone() for plane in logits.unbind(1)]
    squares = Kernels(made, mode).vjp(planes, None, saliency, torch.ones_like(saliency), None,
                                      torch.ones(4), layer_keys(0, 0, 1)[0])
    moved = torch.stack(planes, 1)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert squares[0] > 0 and squares[1:].isnan().all()  # and is told
