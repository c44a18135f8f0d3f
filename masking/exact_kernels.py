"""The update of `kernels.py` by the exact float64 routines of `pge.py`, for any space and any N:M.

Random numbers come from a generator seeded by the key, a chunk of blocks at a time.
"""
from masking.block_bits import bits_to_mask, mask_to_bits, write_masked
from masking.random_bits import round_stochastically
from masking.spaces import Space

import torch
from torch import Tensor

CHUNK, GPU_CHUNK = 2**18, 2**22  # blocks at a time where temporaries exist: they stay small, launches few


def chunk_of(tensor: Tensor) -> int:
    """Blocks at a time on the tensor's device. A step without a compiler makes 500 launches a chunk: for 7B weights 3.1
    million in chunks of 2^18, which take a GPU 15 s, and 0.2 million, a second, in chunks of 2^22, whose temporaries
    are 16 MiB a plane."""
    return GPU_CHUNK if tensor.device.type == "cuda" else CHUNK


def blocks_at_a_time(space: Space, most: int) -> int:
    """How many blocks of the score are computed together. It takes N 2^N numbers a block or, in the pattern space, one
    a pattern; there are never more of them at once than those of 2^18 blocks of 4:8."""
    return max(1, min(most, CHUNK * 64 // max(space.width, space.n << space.n)))


def _generator(key: Tensor, start: int) -> torch.Generator:
    return torch.Generator(key.device).manual_seed(int(key[:2].cpu().view(torch.int64)) ^ start)


def _store_blocks(logits: list[Tensor], blocks: Tensor, part: slice, generator: torch.Generator) -> None:
    """Write float32 blocks `[part, width]` into the planes, rounded where these have 16 bits."""
    dtype = logits[0].dtype
    if dtype != torch.float32:
        noise = torch.randint(2**16, blocks.shape, generator=generator, device=blocks.device)
        blocks = round_stochastically(blocks.contiguous(), dtype, noise.int())
    for plane, column in zip(logits, blocks.unbind(1)):
        plane[part] = column


def update(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, coefficient: Tensor, key: Tensor,
           space: Space, start: int = 0) -> None:
    """`fused_update`; logits: `width` planes. Blocks that start elsewhere in the layer draw other masks."""
    generator = _generator(~key, start)  # other numbers than this key's draws
    chunk = blocks_at_a_time(space, chunk_of(key))
    for begin in range(0, len(logits[0]), chunk):
        part = slice(begin, begin + chunk)
        before = torch.stack([plane[part] for plane in logits], 1).float()
        moved = before - coefficient * space.score(before, bits_to_mask(bits[part], space.m))
        _store_blocks(logits, moved, part, generator)
    generator = _generator(key, start)
    chunks = zip(*(plane.split(chunk_of(plane)) for plane in logits))
    bits.copy_(torch.cat([mask_to_bits(space.sample(torch.stack(part, 1).float(), generator)) for part in chunks]))
    write_masked(weight, bits, out, space.m)
