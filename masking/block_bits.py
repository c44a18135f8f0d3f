"""Masks of blocks as the bits of an integer (bit i is set if weight i is kept), and the masking of
weights by these bits."""

import torch
from torch import Tensor


def bits_dtype(m: int) -> torch.dtype:
    """Return the integer dtype that holds the mask of a block of M weights."""
    return torch.uint8 if m <= 8 else torch.int32


def mask_to_bits(mask: Tensor) -> Tensor:
    """Pack bool `[blocks, M]` into integers `[blocks]`; bit i is set if weight i is kept."""
    powers = 2 ** torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    return (mask * powers).sum(1).to(bits_dtype(mask.shape[1]))


def bits_to_mask(bits: Tensor, m: int) -> Tensor:
    """Unpack integers `[blocks]` into bool `[blocks, M]`."""
    return (
        bits[:, None].int() >> torch.arange(m, device=bits.device, dtype=torch.int32) & 1
    ).bool()


def kept_planes(bits: Tensor, m: int) -> list[Tensor]:
    """Unpack bits `[blocks]` into M float32 planes `[blocks]` of 0 and 1."""
    return [(bits.int() >> i & 1).float() for i in range(m)]


def fits_a_word(m: int, dtype: torch.dtype) -> bool:
    """Return whether a block of M weights takes 8 bytes, so that it is read at once as an int64."""
    return m * dtype.itemsize == 8


def as_words(weight: Tensor, m: int) -> Tensor:
    """View 16- or 32-bit weights `[blocks * M]` as integers: int64 `[blocks]` if a block takes 8
    bytes, else `[blocks, M]` of the weights' size."""
    if fits_a_word(m, weight.dtype):
        return weight.view(-1).view(torch.int64)
    return weight.view(torch.int16 if weight.itemsize == 2 else torch.int32).view(-1, m)


def write_masked(weight: Tensor, bits: Tensor, out: Tensor, m: int) -> None:
    """Write the kept weights to `out`, and +0.0 for the pruned ones. weight and out: as returned by
    `as_words`; bits `[blocks]`.

    Zeroing is an AND of bit patterns, not a multiplication. So there is no -0.0, and a NaN or inf
    in a pruned weight does not survive.
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
    """Decode int64 words `[blocks]` into M float32 planes `[blocks]`.

    Each word holds M numbers of `dtype`: of 16 bits at M = 4, or float32 at M = 2. Only integer
    arithmetic is used, as it vectorizes everywhere. A float16 NaN becomes inf.
    """
    planes = []
    for i in range(m):
        number = (words >> (64 // m * i)).to(torch.int32)
        if dtype != torch.float16:
            planes.append((number if dtype == torch.float32 else number << 16).view(torch.float32))
            continue
        size = number & 0x7FFF
        # also right for subnormals
        plane = torch.where(size >= 0x7C00, torch.inf, (size << 13).view(torch.float32) * 2.0**112)
        planes.append(torch.where(number & 0x8000 != 0, -plane, plane))
    return planes
