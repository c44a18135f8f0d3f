"""The fused passes of `kernels.py`: plain PyTorch, element-wise over blocks.

Logits are M planes `[blocks]`, and a mask is the bits of one integer per block (bit i is set if
weight i is kept). So `torch.compile` turns each function into a single loop, in C++ on a CPU and
Triton on a GPU, that touches every byte once. Without a compiler the same functions run eagerly.
"""

from masking.block_bits import kept_planes, planes_of_words, write_masked
from masking.fused_ops import draw, draws, most_probable, rates, score, sum_of
from masking.inclusion import inclusion, vjp
from masking.random_bits import random_bits, round_stochastically, uniform

import torch
from torch import Tensor

BLOCK_DECAY = 0.95  # of a block's running mean square of J^T G, per step
MOST = 0.3  # logits that a gradient's step moves, at most


def _counter(bits: Tensor, n: int, m: int, start: int) -> Tensor:
    """Return the counter of each block's first random number, int32 `[blocks]`. A block uses
    `draws(n, m)` numbers for drawing, then some for rounding."""
    lanes = draws(n, m) + (m + 1) // 2
    return (torch.arange(bits.shape[0], device=bits.device, dtype=torch.int32) + start) * lanes


def _store(
    logits: list[Tensor], planes: list[Tensor], counter: Tensor, key: Tensor, n: int
) -> list[Tensor]:
    """Write float32 planes into the logits, and return what is stored. Logits of 16 bits are
    rounded stochastically."""
    m = len(planes)
    dtype = logits[0].dtype
    if dtype != torch.float32:
        # two planes share 32 bits
        pairs = [random_bits(counter + draws(n, m) + k, key) for k in range((m + 1) // 2)]
        planes = [
            round_stochastically(plane, dtype, pairs[i // 2] if i % 2 == 0 else pairs[i // 2] >> 16)
            for i, plane in enumerate(planes)
        ]
    for stored, plane in zip(logits, planes):
        stored.copy_(plane)
    return [plane.float() for plane in planes]


def fused_update(
    logits: list[Tensor],
    bits: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    coefficient: Tensor,
    key: Tensor,
    n: int,
    m: int,
    start: int = 0,
) -> None:
    """Do the whole step in place, for N <= 4 and M <= 8.

    logits: M planes `[blocks]`, float32, float16 or bfloat16; bits `[blocks]`; weight and out: as
    words, or None to only draw the mask; coefficient: float32 `[]`; key: int32 `[2]` or longer;
    start: the first block's number in its layer.
    """
    planes = [plane.float() for plane in logits]
    counter = _counter(bits, n, m, start)
    gradient = score(rates(planes, n), kept_planes(bits, m), n)
    planes = _store(
        logits, [plane - coefficient * g for plane, g in zip(planes, gradient)], counter, key, n
    )
    drawn = draw(
        rates(planes, n), n, [uniform(random_bits(counter + k, key)) for k in range(draws(n, m))]
    )
    bits.copy_(drawn.to(bits.dtype))
    if weight is not None:
        write_masked(weight, drawn, out, m)


def fused_vjp(
    logits: list[Tensor],
    bits: Tensor,
    saliency: list[Tensor] | tuple[Tensor, Tensor],
    dtype: torch.dtype,
    mean_squares: Tensor,
    scale: Tensor,
    key: Tensor,
    n: int,
    m: int,
    start: int = 0,
) -> Tensor:
    """Move the logits and set bits to the most probable mask, in place:

        pi <- pi - clip(step * J^T G / max(rms, floor), +-MOST)

    Returns the sum of squares of each block's J^T G, float32 `[blocks]`. If it is not finite, it is
    NaN, and the block's logits stay.

    J is the Jacobian of the inclusion probabilities of pi / temperature. saliency: G as M float32
    planes `[blocks]`, or (weights, gradients) whose product is G, if a block fits a word. The
    weights are then int64 words `[blocks]` of numbers of this dtype, and the gradients are such
    words or float32 `[blocks, M]`. mean_squares: rms^2 of each block's J^T G, a running mean that
    this step is added to, bfloat16 `[blocks]`, negative before the first. scale: float32 `[3]`,
    1 / floor, the step and 1 / temperature.
    """
    if isinstance(saliency, tuple):
        weight, gradient = saliency
        gradient = (
            list(gradient.unbind(1)) if gradient.dim() == 2 else planes_of_words(gradient, m, dtype)
        )
        saliency = [w * g for w, g in zip(planes_of_words(weight, m, dtype), gradient)]
    planes = [plane.float() for plane in logits]
    gradient = vjp([plane * scale[2] for plane in planes], saliency, n)
    squares = sum_of([g * g for g in gradient])
    is_finite = squares < torch.inf
    before = mean_squares.float()
    updated = BLOCK_DECAY * before + (1 - BLOCK_DECAY) / m * squares
    mean = torch.where(before < 0, squares / m, updated)
    mean_squares.copy_(torch.where(is_finite, mean, before))
    rate = scale[1] * torch.minimum(torch.rsqrt(mean), scale[0])
    moves = [(g * rate).clamp(-MOST, MOST) for g in gradient]
    planes = [plane - torch.where(is_finite, move, 0.0) for plane, move in zip(planes, moves)]
    planes = _store(logits, planes, _counter(logits[0], n, m, start), key, n)
    bits.copy_(most_probable(planes, n).to(bits.dtype))
    return torch.where(is_finite, squares, torch.nan)


def write_soft(
    logits: list[Tensor], weight: Tensor, out: Tensor, inverse_temperature: Tensor, n: int
) -> None:
    """Write out <- mu * w, mu the inclusion probabilities of pi / temperature. weight and out
    `[blocks, M]`; inverse_temperature: float32 `[]`."""
    mu = inclusion([plane.float() * inverse_temperature for plane in logits], n)
    out.copy_(torch.stack(mu, 1) * weight)
