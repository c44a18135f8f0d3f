"""The update of `kernels.py` by the exact float64 routines of `pge.py`, for any space and any N:M.

Blocks are processed in chunks. Random numbers come from a generator that the key seeds.
"""

from masking.block_bits import bits_to_mask, mask_to_bits, write_masked
from masking.random_bits import round_stochastically
from masking.spaces import Space

import torch
from torch import Tensor

CHUNK = 2**18  # blocks per chunk on a CPU, so that temporaries stay small
GPU_CHUNK = 2**22  # blocks per chunk on a GPU: few launches, and 16 MiB per plane
CPU_NUMBERS = 64 * CHUNK  # numbers in a score at once on a CPU: those of a chunk at 4:8
BYTES = 35  # memory per number of a score (measured: float64, and what autograd keeps)
GPU_SHARE = 1 / 16  # share of a GPU's memory that a score may take


def chunk_of(tensor: Tensor) -> int:
    """Return the number of blocks per chunk on the tensor's device.

    A step without a compiler makes 500 launches per chunk. For 7B weights, chunks of 2^18 blocks
    mean 3.1 million launches, which take a GPU 15 s; chunks of 2^22 mean 0.2 million, or 1 s.
    """
    return GPU_CHUNK if tensor.is_cuda else CHUNK


def blocks_at_a_time(space: Space, device: torch.device) -> int:
    """Return how many blocks' scores are computed together. A block takes N 2^N numbers, or one per
    logit if that is more."""
    most_blocks = CHUNK
    most_numbers = CPU_NUMBERS
    if device.type == "cuda":
        most_blocks = GPU_CHUNK
        memory = torch.cuda.get_device_properties(device).total_memory
        most_numbers = int(GPU_SHARE * memory) // BYTES
    return max(1, min(most_blocks, most_numbers // max(space.width, space.n << space.n)))


def _generator(key: Tensor, start: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(key[:2].view(torch.int64)) ^ start)


def _store_blocks(
    logits: list[Tensor], blocks: Tensor, part: slice, generator: torch.Generator
) -> None:
    """Write float32 blocks `[part, width]` into the planes; 16-bit planes are rounded
    stochastically."""
    dtype = logits[0].dtype
    if dtype != torch.float32:
        noise = torch.randint(2**16, blocks.shape, generator=generator, device=blocks.device)
        blocks = round_stochastically(blocks.contiguous(), dtype, noise.int())
    for plane, column in zip(logits, blocks.unbind(1)):
        plane[part] = column


def update(
    logits: list[Tensor],
    bits: Tensor,
    weight: Tensor,
    out: Tensor,
    coefficient: Tensor,
    key: Tensor,
    space: Space,
    start: int = 0,
) -> None:
    """Do what `fused_update` does. logits: `space.width` planes; key: best on the CPU, as reading
    it from a GPU waits for the GPU; start: the first block's number in its layer, which also seeds
    the draws."""
    chunk = blocks_at_a_time(space, bits.device)
    generator = _generator(~key, start, bits.device)  # numbers other than those of the draws
    for begin in range(0, len(bits), chunk):
        part = slice(begin, begin + chunk)
        before = torch.stack([plane[part] for plane in logits], 1).float()
        moved = before - coefficient * space.score(before, bits_to_mask(bits[part], space.m))
        _store_blocks(logits, moved, part, generator)
    generator = _generator(key, start, bits.device)
    # draws depend on the chunk size; on a CPU it must not vary with the memory that a score takes
    draw_chunk = chunk if bits.is_cuda else CHUNK
    chunks = zip(*(plane.split(draw_chunk) for plane in logits))
    bits.copy_(
        torch.cat(
            [mask_to_bits(space.sample(torch.stack(part, 1).float(), generator)) for part in chunks]
        )
    )
    write_masked(weight, bits, out, space.m)
