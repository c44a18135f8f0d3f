"""One mask step in one pass: update the logits, draw the next mask, write the masked weight.

    pi  <-  pi - coefficient * d log p(m | pi) / d pi        coefficient = eta * A, for all blocks
    m   ~   p(. | pi)
    out <-  m * w

The step is plain PyTorch, element-wise over blocks. Logits are kept as M planes `[blocks]`, and a
mask as the bits of one integer per block (bit i is set if weight i is kept). So `torch.compile`
turns the step into a single loop, in C++ on a CPU and Triton on a GPU, that touches every byte
once. Without a compiler the same functions run eagerly. If a block of weights does not take 8 bytes
(it does in 16 bits at M = 4), the mask is drawn in one loop and the weight is written in another,
as a single loop would need temporaries.

`Kernels` has the passes of one space and N:M: update, vjp, write and mode.
"""

from collections.abc import Callable

from masking import exact_kernels
from masking.block_bits import (
    as_words,
    bits_dtype,
    bits_to_mask,
    fits_a_word,
    kept_planes,
    mask_to_bits,
    planes_of_words,
    write_masked,
)
from masking.compiler import compiled
from masking.exact_kernels import chunk_of
from masking.fused_ops import draw, draws, most_probable, rates, score, sum_of
from masking.inclusion import inclusion, transitions, vjp
from masking.random_bits import random_bits, round_stochastically, uniform
from masking.slicing import one_block_a_thread, sliced
from masking.spaces import LinearSpace, Space

import torch
from torch import Tensor

# most transitions of a walk at which a thread's registers hold two blocks: 2:8 has 64, 3:8 232
MOST_OF_TWO_BLOCKS = 100
# above these, the 2^N subsets make the fused score long, and the exact routines run
FUSED_MAX_N = 4
FUSED_MAX_M = 8
BLOCK_DECAY = 0.95  # of a block's running mean square of J^T G, per step
MOST = 0.3  # logits that a gradient's step moves, at most


# --------------------------------------------------------------------------------------------------
# the passes, fused


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


class Kernels:
    """The passes of a space over one layer, compiled or eager.

    backend: compiled, eager or exact. `update` comes from `exact_kernels.py` if the backend is
    exact, or if the space and N:M have no fused form. `vjp` is for the linear space only.

    Arguments of the passes: logits: `space.width` planes `[blocks]`, no two of which share a
    storage, as a compiler would copy what might overlap; bits `[blocks]`; weight and out
    `[blocks * M]`; coefficient: float32 `[]`; key: int32 `[2]` or longer; start: the first block's
    number in its layer.
    """

    def __init__(self, space: Space, backend: str = "compiled"):
        self.space = space
        self._compiled = backend == "compiled"
        self._is_linear = isinstance(space, LinearSpace)
        self.is_fused = (
            self._is_linear
            and backend != "exact"
            and space.n <= FUSED_MAX_N
            and space.m <= FUSED_MAX_M
        )
        self._update = self.fastest(fused_update, sliced(fused_update))
        self._vjp = self.fastest(fused_vjp, sliced(fused_vjp))
        self._vjp_on_gpu = self._vjp
        if self._compiled and transitions(space.n, space.m) > MOST_OF_TWO_BLOCKS:
            self._vjp_on_gpu = one_block_a_thread(fused_vjp, sliced(fused_vjp))
        self._write = self.fastest(write_masked)
        self._write_soft = self.fastest(write_soft, sliced(write_soft))

    def fastest(self, function: Callable, eager: Callable | None = None) -> Callable:
        """Return `function` compiled, if this backend compiles; else `eager` (default: the function
        itself)."""
        eager = eager or function
        return compiled(function, eager) if self._compiled else eager

    @torch.no_grad()
    def update(
        self,
        logits: list[Tensor],
        bits: Tensor,
        weight: Tensor,
        out: Tensor,
        coefficient: Tensor,
        key: Tensor,
        start: int = 0,
    ) -> None:
        """Do one step: pi <- pi - coefficient * score(pi, m); m ~ p(pi); out <- m * w."""
        # viewed as integers here, as a compiler would copy what might overlap
        n = self.space.n
        m = self.space.m
        weight = as_words(weight, m)
        out = as_words(out, m)
        if not self.is_fused:
            exact_kernels.update(logits, bits, weight, out, coefficient, key, self.space, start)
        elif weight.dim() == 1:
            self._update(list(logits), bits, weight, out, coefficient, key, n, m, start=start)
        else:
            self._update(list(logits), bits, None, None, coefficient, key, n, m, start=start)
            self._write(weight, bits, out, m)

    @torch.no_grad()
    def vjp(
        self,
        logits: list[Tensor],
        bits: Tensor,
        weight: Tensor,
        gradient: Tensor,
        mean_squares: Tensor,
        scale: Tensor,
        key: Tensor,
        start: int = 0,
    ) -> Tensor:
        """Move the logits by J^T (weight * gradient), normalized, and set bits to the most probable
        mask. weight and gradient `[out, in]`; mean_squares, scale and what is returned: see
        `fused_vjp`."""
        space = self.space
        dtype = weight.dtype
        if fits_a_word(space.m, dtype):
            gradient = (
                as_words(gradient.reshape(-1), space.m)
                if gradient.dtype == dtype
                else gradient.float().reshape(-1, space.m)
            )
            saliency = as_words(weight.view(-1), space.m), gradient
        else:  # as planes, since reading blocks is three times slower
            blocks = logits[0].numel()
            saliency = torch.empty(space.m, blocks, device=weight.device).copy_(
                weight.view(blocks, -1).T
            )
            saliency = list(saliency.mul_(gradient.reshape(blocks, -1).T))
        run = self._vjp_on_gpu if bits.is_cuda else self._vjp
        return run(
            list(logits),
            bits,
            saliency,
            dtype,
            mean_squares,
            scale,
            key,
            space.n,
            space.m,
            start=start,
        )

    @torch.no_grad()
    def write(self, weight: Tensor, bits: Tensor, out: Tensor) -> None:
        """Write out <- m * w."""
        self._write(as_words(weight, self.space.m), bits, as_words(out, self.space.m), self.space.m)

    @torch.no_grad()
    def write_soft(
        self, logits: list[Tensor], weight: Tensor, out: Tensor, inverse_temperature: Tensor
    ) -> None:
        """Write out <- mu * w; see the function `write_soft`."""
        m = self.space.m
        self._write_soft(
            list(logits), weight.view(-1, m), out.view(-1, m), inverse_temperature, self.space.n
        )

    def mode(
        self, logits: list[Tensor], m0: Tensor | None = None, magnitude: float = 0.0
    ) -> Tensor:
        """Return the most probable mask, bits `[blocks]`. If m0 is given, also as bits, it is the
        most probable mask of logits - magnitude * m0."""
        blocks = len(logits[0])
        chunk = chunk_of(logits[0])
        bits = []
        for begin in range(0, max(blocks, 1), chunk):
            part = slice(begin, begin + chunk)
            planes = [plane[part].float() for plane in logits]
            if m0 is not None:
                prior = self.space.init(bits_to_mask(m0[part], self.space.m), magnitude)
                planes = [plane - column for plane, column in zip(planes, prior.unbind(1))]
            bits.append(
                most_probable(planes, self.space.n).to(bits_dtype(self.space.m))
                if self._is_linear
                else mask_to_bits(self.space.mode(torch.stack(planes, 1)))
            )
        return torch.cat(bits)
