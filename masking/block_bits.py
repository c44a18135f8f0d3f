"""A block's mask as the bits of one integer, bit i set where weight i is kept, and weights masked
by them."""

import torch
from torch import Tensor


def bits_dtype(m: int) -> torch.dtype:
    """The integers that hold a block of M."""
    return torch.uint8 if m <= 8 else torch.int32


def mask_to_bits(mask: Tensor) -> Tensor:
    """bool `[blocks, M]` -> integer `[blocks]`, bit i set where weight i is kept."""
    powers = 2 ** torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    return (mask * powers).sum(1).to(bits_dtype(mask.shape[1]))


def bits_to_mask(bits: Tensor, m: int) -> Tensor:
    """integer `[blocks]` -> bool `[blocks, M]`."""
    return (
        bits[:, None].int() >> torch.arange(m, device=bits.device, dtype=torch.int32) & 1
    ).bool()


def kept_planes(bits: Tensor, m: int) -> list[Tensor]:
    """Bits `[blocks]` -> M planes `[blocks]` float32 of 0 and 1."""
    return [(bits.int() >> i & 1).float() for i in range(m)]


def fits_a_word(m: int, dtype: torch.dtype) -> bool:
    """Whether a block of M such weights is 8 bytes, so that all weights of a mask can be read at
    once."""
    return m * dtype.itemsize == 8


def as_words(weight: Tensor, m: int) -> Tensor:
    """16- or 32-bit weights `[blocks * M]` seen as integers: `[blocks]` int64 where a block is 8
    bytes, else `[blocks, M]`."""
    if fits_a_word(m, weight.dtype):
        return weight.view(-1).view(torch.int64)
    return weight.view(torch.int16 if weight.itemsize == 2 else torch.int32).view(-1, m)


def write_masked(weight: Tensor, bits: Tensor, out: Tensor, m: int) -> None:
    """out <- weight where kept, +0.0 elsewhere; both as `as_words` gives them, bits `[blocks]`.

    Zeroing is an AND of bit patterns: no multiplication, so no -0.0, and NaN or inf cannot leak out
    of a pruned weight.
    """
    if weight.dim() == 1:
        width = 64 // m
        keep = torch.zeros_like(weight)
        for i in range(m):
            lane = ((1 << width) - 1) << (width * i)
            keep = keep | (
                -(bits.long() >> i & 1) & (lane - (1 << 64) if lane >= 1 << 63 else lane)
            )
    else:
        lane = torch.arange(m, device=bits.device, dtype=torch.int32)
        keep = (-(bits.int()[:, None] >> lane & 1)).to(weight.dtype)
    out.copy_(weight & keep)


def planes_of_words(words: Tensor, m: int, dtype: torch.dtype) -> list[Tensor]:
    """int64 `[blocks]`, each M numbers of this dtype, 16 bits at M = 4 or float32 at M = 2 -> M
    planes `[blocks]` float32, by integer arithmetic, which vectorizes everywhere. A NaN of float16
    becomes inf."""
    planes = []
    for i in range(m):
        number = (words >> (64 // m * i)).to(torch.int32)
        if dtype != torch.float16:
            planes.append((number if dtype == torch.float32 else number << 16).view(torch.float32))
            continue
        size = number & 0x7FFF
        # subnormals too
        plane = torch.where(size >= 0x7C00, torch.inf, (size << 13).view(torch.float32) * 2.0**112)
        planes.append(torch.where(number & 0x8000 != 0, -plane, plane))
    return planes
