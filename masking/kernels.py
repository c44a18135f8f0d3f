"""One mask step in one pass: update the logits, draw the next mask, write the masked weight.

    pi  <-  pi - coefficient * d log p(m | pi) / d pi        coefficient = eta * A, for all blocks
    m   ~   p(. | pi)
    out <-  m * w

`Kernels` has the passes of one space and N:M: update, vjp, write, write_soft and mode. They are
fused (fused_kernels.py), compiled or eager, or exact (exact_kernels.py). If a block of weights does
not take 8 bytes (it does in 16 bits at M = 4), the mask is drawn in one loop and the weight is
written in another, as a single loop would need temporaries.
"""

from collections.abc import Callable

from masking import exact_kernels
from masking.block_bits import (
    as_words,
    bits_dtype,
    bits_to_mask,
    fits_a_word,
    mask_to_bits,
    write_masked,
)
from masking.compiler import compiled
from masking.exact_kernels import chunk_of
from masking.fused_kernels import fused_update, fused_vjp, write_soft
from masking.fused_ops import most_probable
from masking.inclusion import transitions
from masking.slicing import one_block_a_thread, sliced
from masking.spaces import LinearSpace, Space

import torch
from torch import Tensor

# most transitions of a walk at which a thread's registers hold two blocks: 2:8 has 64, 3:8 232
MOST_OF_TWO_BLOCKS = 100
# above these, the 2^N subsets make the fused score long, and the exact routines run
FUSED_MAX_N = 4
FUSED_MAX_M = 8


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
