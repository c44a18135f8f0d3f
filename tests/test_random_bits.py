"""masking/random_bits.py: keys, uniform numbers and rounding, by their statistics."""

from masking.random_bits import layer_keys, random_bits, round_stochastically, uniform

import pytest
import torch
from exact import chi_square
from masked import seeded


def test_keys_differ_by_seed_step_and_layer_and_are_the_same_every_time():
    keys = torch.cat(
        [layer_keys(seed, t, 5)[:, :2] for seed in (0, 1, 2, 2**40) for t in range(50)]
    )
    assert keys.shape == (1000, 2) and keys.dtype == torch.int32
    assert len({tuple(key) for key in keys.tolist()}) == 1000
    assert len(keys[:, 0].unique()) == len(keys[:, 1].unique()) == 1000
    assert torch.equal(layer_keys(3, 7, 5), layer_keys(3, 7, 5))
    # more layers do not move the others
    assert torch.equal(layer_keys(3, 7, 2), layer_keys(3, 7, 5)[:2])


def test_uniform_lies_in_0_to_1_with_fine_steps_near_0():
    bits = torch.tensor([0, 1, 2, 2**31 - 1, -(2**31), -2, -1], dtype=torch.int32)
    u = uniform(bits)
    assert u.dtype == torch.float32 and (u > 0).all() and (u <= 1).all()
    expected = [0.5 * 2**-32, 1.5 * 2**-32, 2.5 * 2**-32, 0.5, 0.5, 1, 1]
    assert torch.allclose(
        u.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_random_bits_are_uniform_and_do_not_repeat():
    counter, key = torch.arange(2**18, dtype=torch.int32), layer_keys(0, 0, 1)[0]
    bits = random_bits(counter, key)
    assert len(bits.unique()) == len(bits)  # a bijection
    flat = torch.full((256,), 1 / 256, dtype=torch.float64)
    for shift in (0, 8, 16, 24):
        assert chi_square(torch.bincount(bits >> shift & 255, minlength=256), flat) > 1e-4


def test_draws_of_neighbours_are_not_correlated():
    """Blocks, lanes of a block, steps, layers and seeds; also the pairs' joint distribution on an 8
    x 8 grid."""
    size = 2**18
    counter = torch.arange(size, dtype=torch.int32)

    def draws(seed=0, t=0, layer=0, shift=0):
        return uniform(random_bits(counter + shift, layer_keys(seed, t, layer + 1)[layer]))

    first = draws()
    assert abs(float(first.mean()) - 0.5) < 5 / (12 * size) ** 0.5
    others = [draws(shift=s) for s in (1, 2, 3, 4, 5, 8, 64, 4096)] + [
        draws(seed=1),
        draws(t=1),
        draws(layer=1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 5 / size**0.5
        grid = torch.bincount(
            (first * 8).long().clamp(max=7) * 8 + (other * 8).long().clamp(max=7), minlength=64
        )
        assert chi_square(grid, torch.full((64,), 1 / 64, dtype=torch.float64)) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [3.0, -3.0, 0.1, 10.0, -1000.0, 0.0, 6e-5])
def test_stochastic_rounding_is_unbiased(dtype, value):
    """A hundredth of a step between two 16-bit numbers is kept on average, and only the two
    neighbours occur. Next to zero, where the logits of pruned weights start, float16 has a fixed
    step of 2^-24 = 6e-8."""
    low = torch.tensor(value).to(dtype)
    high = torch.nextafter(low, torch.tensor(torch.inf, dtype=dtype))
    gap = float(high) - float(low)
    x = (low.float() + 0.01 * gap).expand(2**20).contiguous()
    share = (float(x[0]) - float(low)) / gap
    bits = random_bits(torch.arange(2**20, dtype=torch.int32), layer_keys(0, 0, 1)[0])
    rounded = round_stochastically(x, dtype, bits)
    assert rounded.dtype == dtype and set(rounded.unique().tolist()) == {float(low), float(high)}
    assert abs(float((rounded == high).double().mean()) - share) < 5 * (share / 2**20) ** 0.5


def test_numbers_that_fit_are_not_rounded():
    x = torch.randn(1000, generator=seeded(0)) * 10
    for dtype in (torch.float16, torch.bfloat16):
        exact = torch.cat([x.to(dtype).float(), torch.zeros(1)])
        # all bits set
        noise = torch.full_like(exact, -1, dtype=torch.float32).view(torch.int32) | -1
        assert torch.equal(round_stochastically(exact, dtype, noise).float(), exact)


def test_float16_logits_do_not_overflow():
    x = torch.tensor([1e6, -1e6, 65504.0, torch.inf])
    rounded = round_stochastically(x, torch.float16, torch.full((4,), -1, dtype=torch.int32))
    assert rounded.isfinite().all() and (rounded.abs() >= 59968).all()
