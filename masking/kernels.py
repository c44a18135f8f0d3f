"""One mask step in one pass: update the logits, draw the next mask, write the masked weight.

    pi  <-  pi - coefficient * d log p(m | pi) / d pi        coefficient = eta * A, one scalar for all blocks
    m   ~   p(. | pi)
    out <-  m * w

It is plain PyTorch, element-wise over blocks: logits are kept as M planes `[blocks]` and a mask as the bits of one
integer a block (bit i set: weight i is kept), so `torch.compile` turns it into a single loop, C++ on a CPU and Triton
on a GPU, that touches every byte once. Without a compiler the same functions run eagerly.

`Kernels` has the passes of one space and N:M: update, update_many, draw, vjp, write, and mode.
"""
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from masking import exact_kernels
from masking.block_bits import as_words, bits_dtype, kept_planes, mask_to_bits, write_masked
from masking.exact_kernels import CHUNK
from masking.fused_ops import draw, draws, most_probable, score, sum_of, vjp, weights
from masking.random_bits import random_bits, round_stochastically, uniform
from masking.spaces import LinearSpace, Space

FUSED_MAX_N, FUSED_MAX_M = 4, 8  # beyond, the 2^N subsets make the fused score long: the exact routines run
MODES = ("compiled", "eager", "exact")


# ---------------------------------------------------------------------------------------------------------------------
# the passes, fused

def _counter(bits: Tensor, n: int, m: int, start: int) -> Tensor:
    """Each block's first random number, `[blocks]` int32; it has `draws(n, m)` for drawing, then some for rounding."""
    lanes = draws(n, m) + (m + 1) // 2
    return (torch.arange(bits.shape[0], device=bits.device, dtype=torch.int32) + start) * lanes


def _drawn(w: list[Tensor], counter: Tensor, key: Tensor, n: int) -> Tensor:
    """The mask that a key draws, bits `[blocks]` int32."""
    return draw(w, n, [uniform(random_bits(counter + k, key)) for k in range(draws(n, len(w)))])


def _store(logits: list[Tensor], planes: list[Tensor], counter: Tensor, key: Tensor, n: int) -> list[Tensor]:
    """Write float32 planes into the logits, rounded stochastically where these have 16 bits; returns what is stored."""
    m, dtype = len(planes), logits[0].dtype
    if dtype != torch.float32:
        pairs = [random_bits(counter + draws(n, m) + k, key) for k in range((m + 1) // 2)]  # two planes share 32 bits
        planes = [round_stochastically(plane, dtype, pairs[i // 2] if i % 2 == 0 else pairs[i // 2] >> 16)
                  for i, plane in enumerate(planes)]
    for stored, plane in zip(logits, planes):
        stored.copy_(plane)
    return [plane.float() for plane in planes]


def fused_draw(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, key: Tensor, n: int, m: int,
               start: int = 0) -> None:
    """Draw the next mask and write the masked weight, the logits left as they are; arguments as `fused_update`."""
    drawn = _drawn(weights([plane.float() for plane in logits], n), _counter(bits, n, m, start), key, n)
    bits.copy_(drawn.to(bits.dtype))
    write_masked(weight, drawn, out, m)


def fused_update(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor,
                 coefficient: Tensor, key: Tensor, n: int, m: int, start: int = 0) -> None:
    """The whole step, in place. logits: M planes `[blocks]` float32/float16/bfloat16, bits `[blocks]`, weight and out
    `[blocks * M]` or as words, coefficient float32 `[]`, key int32 `[2]`; `start` is the number of the first block in
    its layer. N <= 4, M <= 8."""
    planes = [plane.float() for plane in logits]
    gradient = score(weights(planes, n), kept_planes(bits, m), n)
    planes = [plane - coefficient * g for plane, g in zip(planes, gradient)]
    _store(logits, planes, _counter(bits, n, m, start), key, n)
    fused_draw(logits, bits, weight, out, key, n, m, start)


def fused_update_many(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor,
                      coefficients: Tensor, keys: Tensor, n: int, m: int, start: int = 0) -> None:
    """The step from K masks of one distribution, pi <- pi - sum_k coefficient_k d log p(m_k | pi) / d pi. None of them
    is kept: each is drawn again by its key. Arguments as `fused_update`; coefficients float32 `[K]`; keys int32
    `[K + 2, 2]`: of the K masks, of the rounding, of the next mask."""
    planes = [plane.float() for plane in logits]
    w, counter = weights(planes, n), _counter(bits, n, m, start)
    for k in range(coefficients.shape[0]):
        gradient = score(w, kept_planes(_drawn(w, counter, keys[k], n), m), n)
        planes = [plane - coefficients[k] * g for plane, g in zip(planes, gradient)]
    _store(logits, planes, counter, keys[-2], n)
    fused_draw(logits, bits, weight, out, keys[-1], n, m, start)


def fused_vjp(logits: list[Tensor], bits: Tensor | None, saliency: Tensor, scale: Tensor, key: Tensor, n: int, m: int,
              start: int = 0) -> Tensor:
    """pi <- pi - clipped J^T saliency and, where there are bits, m <- the most probable mask, in place; returns the sum
    of squares of each block's J^T saliency, float32 `[blocks]`.

    J is the Jacobian of the inclusion probabilities; saliency float32 `[M, blocks]`; scale float32 `[2]`: what
    J^T saliency is multiplied with before it is clipped to +-1, and after.
    """
    planes = [plane.float() for plane in logits]
    gradient = [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in vjp(planes, list(saliency), n)]  # float16 may overflow
    planes = [plane - (g * scale[0]).clamp(-1, 1) * scale[1] for plane, g in zip(planes, gradient)]
    planes = _store(logits, planes, _counter(logits[0], n, m, start), key, n)
    if bits is not None:
        bits.copy_(most_probable(planes, n).to(bits.dtype))
    return sum_of([g * g for g in gradient])


# ---------------------------------------------------------------------------------------------------------------------
# the same without a compiler, and with one

def _sliced(function: Callable) -> Callable:
    """A pass without a compiler, a slice of the blocks at a time; the same numbers."""
    def run(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, *rest, start: int = 0,
            chunk: int = CHUNK) -> None:  # rest ends with n, m
        weight, out = as_words(weight, rest[-1]), as_words(out, rest[-1])
        for begin in range(0, len(bits), chunk):
            part = slice(begin, begin + chunk)
            function([plane[part] for plane in logits], bits[part], weight[part], out[part], *rest, start + begin)
    return run


eager_update, eager_update_many, eager_draw = map(_sliced, (fused_update, fused_update_many, fused_draw))


def eager_vjp(logits: list[Tensor], bits: Tensor | None, saliency: Tensor, scale: Tensor, key: Tensor, n: int, m: int,
              start: int = 0, chunk: int = CHUNK) -> Tensor:
    """`fused_vjp` without a compiler."""
    squares = []
    for begin in range(0, len(logits[0]), chunk):
        part = slice(begin, begin + chunk)
        squares.append(fused_vjp([plane[part] for plane in logits], None if bits is None else bits[part],
                                 saliency[:, part], scale, key, n, m, start + begin))
    return torch.cat(squares)


@lru_cache
def compiled(function: Callable, eager: Callable) -> Callable:
    """`torch.compile`, one static specialisation a shape; `eager`, said once, where there is no working compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # shapes x dtypes of a model
    fast = torch.compile(function, dynamic=False, options={"max_fusion_size": 10_000})  # one loop, no temporaries
    broken = []

    def run(*args, **names):
        if not broken:
            try:
                return fast(*args, **names)
            except Exception as error:  # a missing compiler comes in several classes, by version and backend
                if "compil" not in f"{type(error).__name__} {error}".lower():
                    raise
                broken.append(error)
                print("note: no working compiler for torch.compile: the mask step runs eagerly, several times slower",
                      file=sys.stderr)
        return eager(*args, **names)
    return run


class Kernels:
    """The passes of a space over one layer. Fused, compiled or eager, where the space and its N:M have a fused form;
    with mode `exact`, and elsewhere always, by `exact_kernels.py`.

    logits: `space.width` planes `[blocks]`, no two of which share a storage, as a compiler would copy what might
    overlap; bits `[blocks]`; weight and out `[blocks * M]`; key int32 `[2]`; start: the first block's number in its
    layer.
    """

    def __init__(self, space: Space, mode: str = "compiled"):
        self.space, self._compiled = space, mode == "compiled"
        self._is_linear = isinstance(space, LinearSpace)
        fused = self._is_linear and mode != "exact"
        scored = fused and space.n <= FUSED_MAX_N and space.m <= FUSED_MAX_M
        self._update = self._pass(fused_update, eager_update, exact_kernels.update, scored)
        self._update_many = self._pass(fused_update_many, eager_update_many, exact_kernels.update_many, scored)
        self._draw = self._pass(fused_draw, eager_draw, exact_kernels.draw, fused)
        self._vjp = self._pass(fused_vjp, eager_vjp, exact_kernels.vjp, fused)
        self._write = compiled(write_masked, write_masked) if self._compiled else write_masked

    def _pass(self, fused: Callable, eager: Callable, exact: Callable, is_fused: bool) -> Callable:
        """A function of (logits, bits, ..., start) by the best of three forms."""
        space = self.space
        if not is_fused:
            return lambda *tensors, start: exact(*tensors, space, start=start)
        run = compiled(fused, eager) if self._compiled else eager
        return lambda *tensors, start: run(*tensors, space.n, space.m, start=start)

    def update(self, logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, coefficient: Tensor, key: Tensor,
               start: int = 0) -> None:
        """pi <- pi - coefficient * score(pi, m); m ~ p(pi); out <- m * w, all in place; coefficient float32 `[]`."""
        self._update(list(logits), bits, *self._words(weight, out), coefficient, key, start=start)

    def update_many(self, logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, coefficients: Tensor,
                    keys: Tensor, start: int = 0) -> None:
        """`update` from K masks drawn by their keys; coefficients float32 `[K]`, keys int32 `[K + 2, 2]`."""
        self._update_many(list(logits), bits, *self._words(weight, out), coefficients, keys, start=start)

    def draw(self, logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, key: Tensor,
             start: int = 0) -> None:
        """m ~ p(pi); out <- m * w."""
        self._draw(list(logits), bits, *self._words(weight, out), key, start=start)

    def vjp(self, logits: list[Tensor], bits: Tensor | None, saliency: Tensor, scale: Tensor, key: Tensor,
            start: int = 0) -> Tensor:
        """pi <- pi - clipped J^T saliency, and m <- its most probable mask where there are bits; see `fused_vjp`."""
        return self._vjp(list(logits), bits, saliency, scale, key, start=start)

    def write(self, weight: Tensor, bits: Tensor, out: Tensor, once: bool = False) -> None:
        """out <- m * w; `once`: it is not worth a compilation."""
        write = write_masked if once else self._write
        weight, out = self._words(weight, out)
        write(weight, bits, out, self.space.m)

    def _words(self, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Viewed as integers out here: inside, a compiler would copy what might overlap."""
        return as_words(weight, self.space.m), as_words(out, self.space.m)

    def mode(self, logits: list[Tensor]) -> Tensor:
        """The most probable mask, bits `[blocks]`."""
        return torch.cat([self._mode(chunk) for chunk in zip(*(plane.split(CHUNK) for plane in logits))])

    def _mode(self, planes: tuple[Tensor, ...]) -> Tensor:
        if self._is_linear:
            found = most_probable([plane.float() for plane in planes], self.space.n)
            return found.to(bits_dtype(self.space.m))
        return mask_to_bits(self.space.mode(torch.stack(planes, 1).float()))
