"""One mask step in one pass: update the logits, draw the next mask, write the masked weight.

    pi  <-  pi - coefficient * d log p(m | pi) / d pi        coefficient = eta * A, one scalar for all blocks
    m   ~   p(. | pi)
    out <-  m * w

It is plain PyTorch, element-wise over blocks: logits are kept as M planes `[blocks]` and a mask as the bits of one
integer a block (bit i set: weight i is kept), so `torch.compile` turns it into a single loop, C++ on a CPU and Triton
on a GPU, that touches every byte once. Without a compiler the same functions run eagerly.

Random numbers are a hash of (seed, step, layer, block): the same on any device and layout, resumable without a state.
"""
import sys
from functools import lru_cache
from math import comb

import torch
from torch import Tensor

import pge
from planes import draw, draws, most_probable, pullback, score, sum_of, weights

FUSED_MAX_N, FUSED_MAX_M = 4, 8  # beyond, the 2^N subsets make the fused code long: the exact routines of pge.py run
CHUNK = 2**18  # blocks at a time where temporaries exist (reference and eager paths), so that they stay small


def bits_dtype(m: int) -> torch.dtype:
    return torch.uint8 if m <= 8 else torch.int32


def mask_to_bits(mask: Tensor) -> Tensor:
    """bool `[blocks, M]` -> integer `[blocks]`, bit i set where weight i is kept."""
    powers = 2 ** torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    return (mask * powers).sum(1).to(bits_dtype(mask.shape[1]))


def bits_to_mask(bits: Tensor, m: int) -> Tensor:
    """integer `[blocks]` -> bool `[blocks, M]`."""
    return (bits[:, None].int() >> torch.arange(m, device=bits.device, dtype=torch.int32) & 1).bool()


# ---------------------------------------------------------------------------------------------------------------------
# random numbers

def layer_keys(seed: int, step: int, layers: int, sample: int = 0) -> Tensor:
    """Two int32 keys a layer, `[layers, 2]`: SplitMix64 of (seed, step, layer), and of which of the step's masks."""
    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31
    base = splitmix(splitmix(seed) ^ step)
    base = splitmix(base ^ sample) if sample else base
    words = torch.tensor([splitmix(base ^ layer) - 2**63 for layer in range(layers)], dtype=torch.int64)
    return words.view(torch.int32).view(layers, 2)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 that avalanches (C. Wellons' triple-shift, two-multiply hash); the masks make >> logical."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as int32
    return x ^ (x >> 16 & 0xFFFF)


def random_bits(counter: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each int32 counter, under the two keys of a layer and step."""
    return _mix(_mix(counter ^ key[0]) + key[1])


def uniform(bits: Tensor) -> Tensor:
    """int32 random bits -> float32 in (0, 1], in steps of 2^-32 near 0, where the rare patterns are looked up."""
    unsigned = torch.where(bits < 0, bits.float() + 2.0**32, bits.float())
    return (unsigned + 0.5) * 2.0**-32


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 -> float16/bfloat16, up with the probability of the fraction cut off: unbiased, so small updates count.

    Adds random low bits below the cut and truncates. float16 gets 13 bits (all that float32 has to spare), bfloat16 16.
    Under 2^-14 float16 is a fixed grid of 2^-24, and a random fraction of its step is added instead.
    """
    if dtype != torch.float16:
        return ((x.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32).to(dtype)
    x = x.clamp(-6e4, 6e4)  # float16 ends at 65504
    bits = bits & 0x1FFF
    rounded = ((x.view(torch.int32) + bits) & ~0x1FFF).view(torch.float32)
    tiny = torch.floor(x * 2.0**24 + bits.float() * 2.0**-13) * 2.0**-24
    return torch.where(x.abs() < 2.0**-14, tiny, rounded).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# the pass

def as_words(weight: Tensor, m: int) -> Tensor:
    """16- or 32-bit weights `[blocks * M]` seen as integers: `[blocks]` int64 where a block is 8 bytes, else
    `[blocks, M]`. Integers stay as they are."""
    if not weight.is_floating_point():
        return weight
    if m * weight.itemsize == 8:
        return weight.view(-1).view(torch.int64)
    return weight.view(torch.int16 if weight.itemsize == 2 else torch.int32).view(-1, m)


def write_masked(weight: Tensor, bits: Tensor, out: Tensor, m: int) -> None:
    """out <- weight where kept, +0.0 elsewhere; both as `as_words` takes or gives them, bits `[blocks]`.

    Zeroing is an AND of bit patterns: no multiplication, so no -0.0, and NaN or inf cannot leak out of a pruned weight.
    """
    weight, out = as_words(weight, m), as_words(out, m)
    if weight.dim() == 1:
        width = 64 // m
        keep = torch.zeros_like(weight)
        for i in range(m):
            lane = ((1 << width) - 1) << (width * i)
            keep = keep | (-(bits.long() >> i & 1) & (lane - (1 << 64) if lane >= 1 << 63 else lane))
    else:
        lane = torch.arange(m, device=bits.device, dtype=torch.int32)
        keep = (-(bits.int()[:, None] >> lane & 1)).to(weight.dtype)
    out.copy_(weight & keep)


def _counter(bits: Tensor, n: int, m: int, start: int) -> Tensor:
    """Each block's first random number, `[blocks]` int32; it has `draws(n, m)` for drawing, then some for rounding."""
    lanes = draws(n, m) + (m + 1) // 2
    return (torch.arange(bits.shape[0], device=bits.device, dtype=torch.int32) + start) * lanes


def kept_planes(bits: Tensor, m: int) -> list[Tensor]:
    """Bits `[blocks]` -> M planes `[blocks]` float32 of 0 and 1."""
    return [(bits.int() >> i & 1).float() for i in range(m)]


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


def draw_step(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor, key: Tensor, n: int, m: int,
              start: int = 0) -> None:
    """Draw the next mask and write the masked weight, the logits left as they are; arguments as `fused_step`."""
    drawn = _drawn(weights([plane.float() for plane in logits], n), _counter(bits, n, m, start), key, n)
    bits.copy_(drawn.to(bits.dtype))
    write_masked(weight, drawn, out, m)


def fused_step(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor,
               coefficient: Tensor, key: Tensor, n: int, m: int, start: int = 0) -> None:
    """The whole step, in place. logits: M planes `[blocks]` float32/float16/bfloat16, bits `[blocks]`, weight and out
    `[blocks * M]` or as words, coefficient float32 `[]`, key int32 `[2]`; `start` is the number of the first block in
    its layer. N <= 4, M <= 8."""
    planes = [plane.float() for plane in logits]
    gradient = score(weights(planes, n), kept_planes(bits, m), n)
    planes = [plane - coefficient * g for plane, g in zip(planes, gradient)]
    _store(logits, planes, _counter(bits, n, m, start), key, n)
    draw_step(logits, bits, weight, out, key, n, m, start)


def samples_step(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor,
                 coefficients: Tensor, keys: Tensor, n: int, m: int, start: int = 0) -> None:
    """The step from K masks of one distribution, pi <- pi - sum_k coefficient_k d log p(m_k | pi) / d pi. None of them
    is kept: each is drawn again by its key. Arguments as `fused_step`; coefficients float32 `[K]`; keys int32
    `[K + 2, 2]`: of the K masks, of the rounding, of the next mask."""
    planes = [plane.float() for plane in logits]
    w, counter = weights(planes, n), _counter(bits, n, m, start)
    for k in range(coefficients.shape[0]):
        gradient = score(w, kept_planes(_drawn(w, counter, keys[k], n), m), n)
        planes = [plane - coefficients[k] * g for plane, g in zip(planes, gradient)]
    _store(logits, planes, counter, keys[-2], n)
    draw_step(logits, bits, weight, out, keys[-1], n, m, start)


def gradient_step(logits: list[Tensor], bits: Tensor | None, gain: Tensor, scale: Tensor, key: Tensor, n: int, m: int,
                  start: int = 0) -> Tensor:
    """pi <- pi - clipped J^T gain and, where there are bits, m <- the most probable mask, in place; returns the sum of
    squares of each block's J^T gain, float32 `[blocks]`.

    J is the Jacobian of the inclusion probabilities; gain float32 `[M, blocks]`; scale float32 `[2]`: what J^T gain is
    multiplied with before it is clipped to +-1, and after.
    """
    planes = [plane.float() for plane in logits]
    slope = [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in pullback(planes, list(gain), n)]  # float16 may overflow
    planes = [plane - (g * scale[0]).clamp(-1, 1) * scale[1] for plane, g in zip(planes, slope)]
    planes = _store(logits, planes, _counter(logits[0], n, m, start), key, n)
    if bits is not None:
        bits.copy_(most_probable(planes, n).to(bits.dtype))
    return sum_of([g * g for g in slope])


def _generator(key: Tensor, start: int) -> torch.Generator:
    return torch.Generator(key.device).manual_seed(int(key.cpu().view(torch.int64)) ^ start)


def _store_blocks(logits: list[Tensor], blocks: Tensor, part: slice, generator: torch.Generator) -> Tensor:
    """`_store` of float32 blocks `[part, width]`; returns what is stored, float32."""
    dtype = logits[0].dtype
    if dtype != torch.float32:
        noise = torch.randint(2**16, blocks.shape, generator=generator, device=blocks.device)
        blocks = round_stochastically(blocks.contiguous(), dtype, noise.int())
    for plane, column in zip(logits, blocks.unbind(1)):
        plane[part] = column
    return blocks.float()


def _reference_move(logits: list[Tensor], masks: list[Tensor], coefficients, key: Tensor, space, start: int,
                    chunk: int) -> None:
    """The update from these masks (bits `[blocks]`), rounded by the key."""
    generator = _generator(~key, start)  # other numbers than this key's draws
    for first in range(0, len(logits[0]), chunk):
        part = slice(first, first + chunk)
        before = torch.stack([plane[part] for plane in logits], 1).float()
        moved = before
        for bits, coefficient in zip(masks, coefficients):
            moved = moved - coefficient * space.score(before, bits_to_mask(bits[part], space.m))
        _store_blocks(logits, moved, part, generator)


def _reference_drawn(logits: list[Tensor], key: Tensor, space, start: int, chunk: int) -> Tensor:
    """The mask that a key draws, bits `[blocks]`: another for the same blocks if they start elsewhere in the layer."""
    generator = _generator(key, start)
    chunks = zip(*(plane.split(chunk) for plane in logits))
    return torch.cat([mask_to_bits(space.sample(torch.stack(part, 1).float(), generator)) for part in chunks])


def reference_draw(logits, bits, weight, out, key, space, start: int = 0, chunk: int = CHUNK) -> None:
    """`draw_step` by the exact routines of `pge.py`, for any space and N:M; logits: `width` planes."""
    bits.copy_(_reference_drawn(logits, key, space, start, chunk))
    write_masked(weight, bits, out, space.m)


def reference_step(logits, bits, weight, out, coefficient, key, space, start: int = 0, chunk: int = CHUNK) -> None:
    """`fused_step` by the exact routines."""
    _reference_move(logits, [bits], [coefficient], key, space, start, chunk)
    reference_draw(logits, bits, weight, out, key, space, start, chunk)


def reference_samples(logits, bits, weight, out, coefficients, keys, space, start: int = 0,
                      chunk: int = CHUNK) -> None:
    """`samples_step` by the exact routines."""
    masks = [_reference_drawn(logits, key, space, start, chunk) for key in keys[:-2]]
    _reference_move(logits, masks, coefficients, keys[-2], space, start, chunk)
    reference_draw(logits, bits, weight, out, keys[-1], space, start, chunk)


def _sliced(function):
    """A step without a compiler, a slice of the blocks at a time; the same numbers."""
    def run(logits, bits, weight, out, *rest, start: int = 0, chunk: int = CHUNK) -> None:  # rest ends with n, m
        weight, out = as_words(weight, rest[-1]), as_words(out, rest[-1])
        for first in range(0, len(bits), chunk):
            part = slice(first, first + chunk)
            function([plane[part] for plane in logits], bits[part], weight[part], out[part], *rest, start + first)
    return run


eager_step, eager_samples, eager_draw = _sliced(fused_step), _sliced(samples_step), _sliced(draw_step)


def eager_gradient(logits, bits, gain, scale, key, n, m, start: int = 0, chunk: int = CHUNK) -> Tensor:
    """`gradient_step` without a compiler."""
    squares = []
    for first in range(0, len(logits[0]), chunk):
        part = slice(first, first + chunk)
        squares.append(gradient_step([plane[part] for plane in logits], None if bits is None else bits[part],
                                     gain[:, part], scale, key, n, m, start + first))
    return torch.cat(squares)


def reference_gradient(logits, bits, gain, scale, key, space, start: int = 0) -> Tensor:
    """`gradient_step` by autograd of the exact inclusion probabilities, for any space."""
    squares, generator = [], _generator(~key, start)  # masks may be drawn under the same key
    chunk = max(1, 2**20 // comb(space.m, space.n))
    for first in range(0, gain.shape[1], chunk):
        part = slice(first, first + chunk)
        block_logits = torch.stack([plane[part] for plane in logits], 1).double().requires_grad_()
        with torch.enable_grad():
            expected = (space.inclusion(block_logits) * gain[:, part].T).sum()
        slope = torch.nan_to_num(torch.autograd.grad(expected, block_logits)[0], 0.0, 0.0, 0.0)
        moved = block_logits.detach() - (slope * scale[0]).clamp(-1, 1) * scale[1]
        stored = _store_blocks(logits, moved.float(), part, generator)
        if bits is not None:
            bits[part] = mask_to_bits(space.mode(stored))
        squares.append(slope.square().sum(1).float())
    return torch.cat(squares)


@lru_cache
def compiled(function, eager):
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


MODES = ("compiled", "eager", "exact")


def write_function(mode: str = "compiled"):
    """`write_masked`, compiled where wanted."""
    run = compiled(write_masked, write_masked) if mode == "compiled" else write_masked
    return lambda weight, bits, out, m: run(as_words(weight, m), bits, as_words(out, m), m)


def _fused(space, mode: str) -> bool:
    return mode != "exact" and isinstance(space, pge.LinearSpace)


def _wrapped(fused, sliced, reference, space, mode: str, limited: bool):
    n, m = space.n, space.m
    if not _fused(space, mode) or limited and (n > FUSED_MAX_N or m > FUSED_MAX_M):
        return lambda *args, start=0: reference(*args, space, start=start)
    run = compiled(fused, sliced) if mode == "compiled" else sliced
    return lambda logits, bits, weight, out, *rest, start=0: run(
        list(logits), bits, as_words(weight, m), as_words(out, m), *rest, n, m, start=start)


def step_function(space, mode: str = "compiled"):
    """The step of a space, (logits, bits, weight, out, coefficient, key) -> None. Fused, compiled or eager, where the
    space and its N:M have a fused form; `exact`, and elsewhere always, by `pge.py`.

    Planes must not share a storage, and words are viewed outside: a compiler copies what might overlap.
    """
    return _wrapped(fused_step, eager_step, reference_step, space, mode, limited=True)


def samples_function(space, mode: str = "compiled"):
    """`samples_step` of a space, (logits, bits, weight, out, coefficients, keys) -> None, as `step_function`."""
    return _wrapped(samples_step, eager_samples, reference_samples, space, mode, limited=True)


def draw_function(space, mode: str = "compiled"):
    """`draw_step` of a space, (logits, bits, weight, out, key) -> None; any N:M has a fused form."""
    return _wrapped(draw_step, eager_draw, reference_draw, space, mode, limited=False)


def gradient_function(space, mode: str = "compiled"):
    """`gradient_step` of a space, (logits, bits, gain, scale, key) -> squares; any N:M has a fused form."""
    n, m = space.n, space.m
    if not _fused(space, mode):
        return lambda *args, start=0: reference_gradient(*args, space, start=start)
    run = compiled(gradient_step, eager_gradient) if mode == "compiled" else eager_gradient
    return lambda logits, bits, gain, scale, key, start=0: run(
        list(logits), bits, gain, scale, key, n, m, start=start)
