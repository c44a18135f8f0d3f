"""Random numbers as a hash of (seed, step, layer, block). They are the same on any device and
layout, and have no state to resume from.

The hash is plain integer arithmetic on tensors, so that it compiles into the loop that uses it.
"""

import torch
from torch import Tensor


def layer_keys(seed: int, step: int, layers: int) -> Tensor:
    """Return two int32 keys per layer, SplitMix64 of (seed, step, layer), followed by two zeros:
    `[layers, 4]`. Layers are 16 bytes apart, since a compiler copies what is aligned worse."""

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    base = splitmix(splitmix(seed) ^ step)
    words = torch.tensor(
        [splitmix(base ^ layer) - 2**63 for layer in range(layers)], dtype=torch.int64
    )
    return torch.nn.functional.pad(words.view(torch.int32).view(layers, 2), (0, 2))


def _mix(x: Tensor) -> Tensor:
    """Map int32 by a bijection that avalanches (C. Wellons' triple-shift, two-multiply hash). The
    masks make the shifts logical."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as int32
    return x ^ (x >> 16 & 0xFFFF)


def random_bits(counter: Tensor, key: Tensor) -> Tensor:
    """Return 32 random bits for each int32 counter, under the two keys of a layer and step."""
    return _mix(_mix(counter ^ key[0]) + key[1])


def uniform(bits: Tensor) -> Tensor:
    """Convert int32 random bits to float32 in (0, 1]. Steps are 2^-32 near 0, where rare patterns
    are looked up."""
    unsigned = torch.where(bits < 0, bits.float() + 2.0**32, bits.float())
    return (unsigned + 0.5) * 2.0**-32


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to float16 or bfloat16, up with the probability of the fraction that is cut
    off. This is unbiased, so small updates count.

    Random low bits are added below the cut, and the sum is truncated. float16 gets 13 bits (all
    that float32 has to spare), bfloat16 gets 16. Below 2^-14 float16 is a fixed grid of 2^-24, and
    a random fraction of its step is added instead.
    """
    if dtype != torch.float16:
        return ((x.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32).to(dtype)
    x = x.clamp(-6e4, 6e4)  # float16 ends at 65504
    bits = bits & 0x1FFF
    rounded = ((x.view(torch.int32) + bits) & ~0x1FFF).view(torch.float32)
    tiny = torch.floor(x * 2.0**24 + bits.float() * 2.0**-13) * 2.0**-24
    return torch.where(x.abs() < 2.0**-14, tiny, rounded).to(dtype)
