"""Kernels.vjp, the step along J^T G (masking/kernels.py): what is not finite, and 16 bits. Its formula is in
test_straight_through.py."""
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace

import pytest
import torch
from masked import planes_of, seeded

KEY = layer_keys(0, 0, 1)[0]


def test_a_saliency_that_is_not_finite_moves_nothing_in_its_block():
    """float16 gradients overflow where one weight matters enormously."""
    logits, saliency = torch.randn(3, 4, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    saliency[1, 2], saliency[2, 0] = torch.inf, torch.nan
    planes = planes_of(logits)
    squares = Kernels(LinearSpace(2, 4), "eager").vjp(planes, torch.zeros(3, dtype=torch.uint8), saliency,
                                                      torch.ones_like(saliency), torch.tensor([1.0, 1.0]), KEY)
    moved = torch.stack(planes, 1)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert squares.isnan().tolist() == [False, True, True]  # and is told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_read_as_words_to_the_bit(dtype):
    """Weights and gradients of 16 bits at M = 4 are unpacked inside the pass: the same logits as from planes."""
    weight = torch.randn(16, 32, generator=seeded(3)).to(dtype)
    gradient = torch.cat([torch.randn(500, generator=seeded(4)).to(dtype), torch.tensor(
        [0.0, -0.0, 1e-7, -6e-8, 65504.0, -65504.0, 1e-5, 2e-38, 3.0, -1.0, 0.5, 7.0], dtype=torch.float64).to(dtype)])
    gradient, results = gradient.view(16, 32), []
    for given in ((weight, gradient), (weight.float(), gradient.float())):
        logits, bits = [torch.linspace(-2, 2, 128) * (i + 1) for i in range(4)], torch.zeros(128, dtype=torch.uint8)
        squares = Kernels(LinearSpace(2, 4), "eager").vjp(logits, bits, *given, torch.tensor([0.3, 0.1]), KEY)
        results.append((*logits, bits, squares))
    assert all(torch.equal(a, b) for a, b in zip(*results))
