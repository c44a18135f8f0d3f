"""Passes over a few of a layer's blocks at a time: slices without a compiler, so that temporaries
stay small; one block per thread on a GPU, if a thread has too few registers for more."""

from collections.abc import Callable
from functools import lru_cache

from masking.compiler import compiled
from masking.exact_kernels import chunk_of

import torch
from torch import Tensor

FEW = 128  # blocks in a first call, few enough for Inductor to give each thread one


def blocks_of(given: object, part: slice, blocks: int) -> object:
    """Return an argument of a pass for a part of the blocks: tensors with one element per block are
    sliced, within lists and tuples, too."""
    if isinstance(given, (list, tuple)):
        return type(given)(blocks_of(one, part, blocks) for one in given)
    return (
        given[part] if isinstance(given, Tensor) and given.dim() and len(given) == blocks else given
    )


@lru_cache
def sliced(function: Callable) -> Callable:
    """Return a pass that calls `function` on a slice of the blocks at a time, so that temporaries
    stay small. The results are the same. Its only keyword argument is `start`."""

    def run(logits: list[Tensor], *rest, **start: int) -> Tensor | None:
        blocks = len(logits[0])
        chunk = chunk_of(logits[0])
        found = []
        for begin in range(0, blocks, chunk):
            part = blocks_of((logits, *rest), slice(begin, begin + chunk), blocks)
            found.append(
                function(*part, **{name: number + begin for name, number in start.items()})
            )
        return None if found[0] is None else torch.cat(found)

    return run


def copies(given: object) -> object:
    """Return new tensors of FEW equal blocks for tensors `[1, ...]`, and anything else as it is."""
    if isinstance(given, (list, tuple)):
        return type(given)(copies(one) for one in given)
    is_block = isinstance(given, Tensor) and given.dim() and len(given) == 1
    return given.repeat(FEW, *[1] * (given.dim() - 1)) if is_block else given


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
        *rest,
        **start: int,
    ) -> Tensor:
        kind = logits[0].device, logits[0].dtype, dtype
        if kind not in prepared:
            prepared.add(kind)
            few = blocks_of((logits, bits, saliency, dtype, *rest), slice(0, 1), len(bits))
            fast(*copies(few), **start)
        return fast(logits, bits, saliency, dtype, *rest, **start)

    return run
