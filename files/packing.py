"""Packs N:M masks into less than one bit per weight.

A mask is a bool tensor `[out, in]`. A block, M consecutive elements of a row, keeps exactly N: it
is one of K = C(M, N) patterns, numbered from 0 in the order of `pge.patterns`.

2:4        three blocks per byte, a + 6 b + 36 c for patterns number a, b, c: 0.667 bits per weight;
           the least possible is log2(6)/4 = 0.646
other N:M  one bit per weight, then deflated by zlib: 0.51 (1:4), 0.77 (4:8), 0.99 (8:16) bits
"""

import zlib
from math import prod

from pge import patterns

import numpy as np
import torch
from torch import Tensor

# The number of a 2:4 pattern is linear in its mask: keeping a < b has number VALUES[a] + VALUES[b].
VALUES = torch.tensor([-1, 1, 2, 3])
# -1 is stored modulo 256; sums of bytes are modulo 256 as well
BYTE_VALUES = torch.cat([VALUES, 6 * VALUES, 36 * VALUES]).to(torch.uint8)
BYTE_MASKS = (
    patterns(2, 4)[torch.arange(216)[:, None] // torch.tensor([1, 6, 36]) % 6].view(216, 12).numpy()
)


def pack(mask: Tensor, n: int, m: int) -> Tensor:
    """Pack a mask, bool `[out, in]` on the CPU, into uint8 `[bytes]`. That it is strictly N:M is
    not checked."""
    if (n, m) == (2, 4):
        flat = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 12))
        return flat.view(torch.uint8).view(-1, 12) @ BYTE_VALUES
    # searching for repetitions does not pay
    deflate = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    deflated = deflate.compress(np.packbits(mask.numpy())) + deflate.flush()
    return torch.frombuffer(bytearray(deflated), dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, int], n: int, m: int) -> Tensor:
    """Unpack uint8 `[bytes]` of `pack` into a bool tensor of `shape`. Damaged bytes raise
    ValueError, IndexError or zlib.error, or give blocks that are not N:M."""
    if (n, m) == (2, 4):
        flat = np.take(BYTE_MASKS, packed.numpy(), axis=0).reshape(-1)[: prod(shape)]
    else:
        bits = np.frombuffer(zlib.decompress(packed.numpy()), np.uint8)
        flat = np.unpackbits(bits, count=prod(shape)).view(bool)
    return torch.from_numpy(flat).view(*shape)
