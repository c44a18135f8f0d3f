"""N:M masks in less than a bit a weight.

A mask is a bool tensor `[out, in]`. A block, M consecutive elements of a row, keeps exactly N: it
is one of K = C(M, N) patterns, numbered from 0 as `pge.patterns` lists them.

2:4        three blocks in a byte, the first plus 6 times the second plus 36 times the third
           pattern's number: 0.667 bit a weight, where log2(6)/4 = 0.646 is the least possible
other N:M  a bit a weight, deflated by zlib: 0.51 (1:4), 0.77 (4:8), 0.99 (8:16)
"""

import zlib
from math import prod

from pge import patterns

import numpy as np
import torch
from torch import Tensor

# A 2:4 pattern's number is linear in its mask: positions a < b have number VALUE[a] + VALUE[b].
VALUES = torch.tensor([-1, 1, 2, 3])
# modulo 256, as all sums of bytes
BYTE_VALUES = torch.cat([VALUES, 6 * VALUES, 36 * VALUES]).to(torch.uint8)
BYTE_MASKS = (
    patterns(2, 4)[torch.arange(216)[:, None] // torch.tensor([1, 6, 36]) % 6].view(216, 12).numpy()
)


def pack(mask: Tensor, n: int, m: int) -> Tensor:
    """Mask bool `[out, in]` on the CPU, strictly N:M (not checked here) -> uint8 `[bytes]`."""
    if (n, m) == (2, 4):
        flat = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 12))
        return flat.view(torch.uint8).view(-1, 12) @ BYTE_VALUES
    # there are no repetitions worth a search
    deflate = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    deflated = deflate.compress(np.packbits(mask.numpy())) + deflate.flush()
    return torch.frombuffer(bytearray(deflated), dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, int], n: int, m: int) -> Tensor:
    """The inverse of `pack`: uint8 `[bytes]` -> bool of `shape`. Damaged bytes raise ValueError,
    IndexError or zlib.error, or give blocks that are not N:M."""
    if (n, m) == (2, 4):
        flat = np.take(BYTE_MASKS, packed.numpy(), axis=0).reshape(-1)[: prod(shape)]
    else:
        bits = np.frombuffer(zlib.decompress(packed.numpy()), np.uint8)
        flat = np.unpackbits(bits, count=prod(shape)).view(bool)
    return torch.from_numpy(flat).view(*shape)
