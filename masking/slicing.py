"""Passes over a few of a layer's blocks at a time: slices without a compiler, so that temporaries
stay small; one block per thread on a GPU, if a thread has too few registers for more."""

from collections.abc import Callable
from functools import lru_cache

from masking.compiler import compiled
from masking.exact_kernels import chunk_of

import torch
from torch import Tensor

FEW = 128  # blocks in a first call, few enough for Inductor to give each thread one


def blocks_of(argument: object, part: slice, blocks: int) -> object:
    """Return an argument of a pass for a part of the blocks: tensors with one element per block are
    sliced, within lists and tuples, too."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(blocks_of(item, part, blocks) for item in argument)
    has_blocks = isinstance(argument, Tensor) and argument.dim() and len(argument) == blocks
    return argument[part] if has_blocks else argument


@lru_cache
def sliced(function: Callable) -> Callable:
    """Return a pass that calls `function` on a slice of the blocks at a time, so that temporaries
    stay small. The results are the same. Its only keyword argument is `start`."""

    def run(logits: list[Tensor], *args, **kwargs: int) -> Tensor | None:
        blocks = len(logits[0])
        chunk = chunk_of(logits[0])
        results = []
        for begin in range(0, max(blocks, 1), chunk):
            part = blocks_of((logits, *args), slice(begin, begin + chunk), blocks)
            shifted = {name: start + begin for name, start in kwargs.items()}
            results.append(function(*part, **shifted))
        return None if results[0] is None else torch.cat(results)

    return run


def copies(argument: object) -> object:
    """Return new tensors of FEW equal blocks for tensors `[1, ...]`, and anything else as it is."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(copies(item) for item in argument)
    is_block = isinstance(argument, Tensor) and argument.dim() and len(argument) == 1
    return argument.repeat(FEW, *[1] * (argument.dim() - 1)) if is_block else argument


def one_block_a_thread(function: Callable, eager: Callable) -> Callable:
    """Return a pass that is compiled once for all sizes, with one block per GPU thread.

    Inductor chooses how many elements a thread computes by the size of the first arguments: 8 or 2
    if there are many, one if there are FEW. The walk of 4:8 has hundreds of live values: one block
    fills a thread's 255 registers, and two blocks spill kilobytes (bench/gpu_code.py counts them).
    So the first call for each device and dtypes is made with a few copies of the first block.
    """
    fast = compiled(function, eager, any_size=True)
    prepared = set()

    def run(
        logits: list[Tensor],
        bits: Tensor,
        saliency: list[Tensor],
        dtype: torch.dtype,
        *args,
        **kwargs: int,
    ) -> Tensor:
        key = logits[0].device, logits[0].dtype, dtype
        if key not in prepared:
            prepared.add(key)
            first_block = blocks_of((logits, bits, saliency, dtype, *args), slice(0, 1), len(bits))
            fast(*copies(first_block), **kwargs)
        return fast(logits, bits, saliency, dtype, *args, **kwargs)

    return run
