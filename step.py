"""One mask step in one pass: update the logits, draw the next mask, write the masked weight.

    pi  <-  pi - coefficient * d log p(m | pi) / d pi        coefficient = eta * A, one scalar for all blocks
    m   ~   p(. | pi)
    out <-  m * w

It is plain PyTorch, element-wise over blocks: logits are kept as planes `[M, blocks]` and a mask as the bits of one
integer a block (bit i set: weight i is kept), so `torch.compile` turns it into a single loop, C++ on a CPU and Triton
on a GPU, that touches every byte once. Without a compiler the same functions run eagerly.

Random numbers are a hash of (seed, step, layer, block): the same on any device and layout, resumable without a state.
"""
import sys
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

import pge

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

def layer_keys(seed: int, step: int, layers: int) -> Tensor:
    """Two int32 keys a layer, `[layers, 2]`: SplitMix64 of (seed, step, layer)."""
    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31
    base = splitmix(splitmix(seed) ^ step)
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
    """
    dropped = (1 << (13 if dtype == torch.float16 else 16)) - 1
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)  # float16 ends at 65504
    return ((x.view(torch.int32) + (bits & dropped)) & ~dropped).view(torch.float32).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# the mathematics of pge.py on lists of M planes, float32

def _sum(planes):
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total


def _weights(logits):
    """exp(logits - max), so that the largest is 1."""
    top = logits[0]
    for plane in logits[1:]:
        top = torch.maximum(top, plane)
    return [torch.exp(plane - top) for plane in logits]


def _score(w, kept, n: int):
    """d log p / d logits. `kept` are planes of 0. and 1.; equal to `pge.score` up to float32.

    With r the weight of the rest, and for n = 2, S = {a, b}, Q_a = w_b + r, Z = w_a + Q_a (no difference is taken):
        g_a = Q_a r (Z + r + w_a) / (Z Q_b (Q_a + Q_b)),   g_i = -(w_i / r) (g_a + g_b) for i not in S.
    For n > 2 the draws are followed over the subsets of S: reach[T] and then win[T], the probability to get to the
    drawn set T and from there to S; g_i = [i in S] - w_i sum_{T not holding i} reach[T] win[T] / (rest[T] win[0]).
    """
    m = len(w)
    if n == 1:
        total = _sum(w)
        return [k - x / total for k, x in zip(kept, w)]
    inside = [x * k for x, k in zip(w, kept)]
    rest = _sum([x - y for x, y in zip(w, inside)]).clamp(min=1e-30)  # float32 exp ends at a gap of 87
    if n == 2:
        both = _sum(inside)
        total, double = both + rest, both + 2 * rest
        g = [(both - x + rest) * rest * (double + x) / (total * (x + rest) * double) * k for x, k in zip(inside, kept)]
        slope = _sum(g) / rest
        return [x - y * (1 - k) * slope for x, y, k in zip(g, w, kept)]
    rank, ranks, seats = torch.zeros_like(rest), [], []  # seat k: the (k+1)-th kept weight, so that subsets are static
    for k in kept:
        ranks.append(torch.where(k > 0, rank, -1.0))
        rank = rank + k
    for seat in range(n):
        seats.append(_sum([torch.where(r == seat, x, 0.0) for r, x in zip(ranks, w)]))
    full = 2**n - 1
    inverse_rest = [None] * full
    for drawn in range(full):
        inverse_rest[drawn] = 1 / (_sum([s for j, s in enumerate(seats) if not drawn >> j & 1]) + rest)
    reach, win = [torch.ones_like(rest)] + [None] * full, [None] * full + [torch.ones_like(rest)]
    for drawn in range(1, full):
        reach[drawn] = _sum([reach[drawn ^ 1 << j] * inverse_rest[drawn ^ 1 << j] * s
                             for j, s in enumerate(seats) if drawn >> j & 1])
    for drawn in reversed(range(full)):
        win[drawn] = _sum([win[drawn | 1 << j] * s for j, s in enumerate(seats) if not drawn >> j & 1]
                          ) * inverse_rest[drawn]
    visit = [reach[t] * win[t] * inverse_rest[t] for t in range(full)]
    always = _sum(visit) / win[0]
    slopes = [_sum([visit[t] for t in range(full) if not t >> seat & 1]) / win[0] for seat in range(n)]
    g = []
    for i in range(m):
        slope = always
        for seat in range(n):
            slope = torch.where(ranks[i] == seat, slopes[seat], slope)
        g.append(kept[i] - w[i] * slope)
    return g


def _draw_by_table(w, n: int, u: Tensor) -> Tensor:
    """One uniform number and the cumulative sum over the patterns, the most probable put last.

    So the rare patterns share the small u, whose resolution is 2^-32, instead of the large, whose it is 2^-24.
    n = 1: p(i) ~ w_i; n = 2: p(a, b) ~ w_a w_b (1/Q_a + 1/Q_b), Q_a = sum of all but w_a.
    """
    m = len(w)
    if n == 1:
        table = [(1 << i, w[i]) for i in range(m)]
    else:
        inverse = [1 / _sum(w[:i] + w[i + 1:]) for i in range(m)]
        table = [(1 << a | 1 << b, w[a] * w[b] * (inverse[a] + inverse[b])) for a, b in combinations(range(m), 2)]
    top = table[0][1]
    for _, p in table[1:]:
        top = torch.maximum(top, p)
    target = u * _sum([p for _, p in table])
    below = torch.zeros_like(u)
    mode = drawn = torch.zeros_like(u, dtype=torch.int32)
    for bits, p in table:
        is_mode = (p >= top) & (mode == 0)
        below = below + torch.where(is_mode, 0.0, p)
        drawn = torch.where((drawn == 0) & (target < below) & ~is_mode, bits, drawn)
        mode = torch.where(is_mode, bits, mode)
    return torch.where(drawn == 0, mode, drawn)


def _draw_by_race(w, n: int, u) -> Tensor:
    """Keep the n smallest E_i / w_i, E = -log(1 - u): a rank by M(M-1)/2 comparisons, a tie to the lower index."""
    m = len(w)
    arrival = [-torch.log1p(-x) / y for x, y in zip(u, w)]
    earlier = [torch.zeros_like(arrival[0], dtype=torch.int32) for _ in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            beats = (arrival[j] < arrival[i]).int()
            earlier[i] = earlier[i] + beats
            earlier[j] = earlier[j] + (1 - beats)
    bits = torch.zeros_like(earlier[0])
    for i in range(m):
        bits = bits | (earlier[i] < n).int() << i
    return bits


# ---------------------------------------------------------------------------------------------------------------------
# the pass

def write_masked(weight: Tensor, bits: Tensor, out: Tensor, m: int) -> None:
    """out <- weight where kept, +0.0 elsewhere. Contiguous `[blocks * M]` of 16 or 32 bits each, bits `[blocks]`.

    Zeroing is an AND of bit patterns: no multiplication, so no -0.0, and NaN or inf cannot leak out of a pruned weight.
    """
    if m * weight.itemsize == 8:  # a block fills one machine word
        width = 8 * weight.itemsize
        keep = torch.zeros_like(bits, dtype=torch.int64)
        for i in range(m):
            lane = ((1 << width) - 1) << (width * i)
            keep = keep | -(bits.long() >> i & 1) & (lane - (1 << 64) if lane >= 1 << 63 else lane)
        out.view(torch.int64).view(-1).copy_(weight.view(torch.int64).view(-1) & keep)
    else:
        words = torch.int16 if weight.itemsize == 2 else torch.int32
        lane = torch.arange(m, device=bits.device, dtype=torch.int32)
        keep = -(bits.int()[:, None] >> lane & 1)
        out.view(words).view(-1, m).copy_(weight.view(words).view(-1, m) & keep.to(words))


def fused_step(logits: Tensor, bits: Tensor, weight: Tensor, out: Tensor,
               coefficient: Tensor, key: Tensor, n: int, m: int, first: int = 0) -> None:
    """The whole step, in place. logits `[M, blocks]` float32/float16/bfloat16, bits `[blocks]`, weight and out
    `[blocks * M]`, coefficient float32 `[]`, key int32 `[2]`; `first` is the number of the first block in its layer.
    N <= 4, M <= 8."""
    planes = [logits[i].float() for i in range(m)]
    code = bits.int()
    kept = [(code >> i & 1).float() for i in range(m)]
    score = _score(_weights(planes), kept, n)
    planes = [plane - coefficient * g for plane, g in zip(planes, score)]

    by_table = n == 1 or (n == 2 and m <= 4)
    draws = 1 if by_table else m
    lanes = draws + (m + 1) // 2  # a block's own counters: its draws, then its rounding
    counter = (torch.arange(bits.shape[0], device=bits.device, dtype=torch.int32) + first) * lanes
    if logits.dtype != torch.float32:
        pairs = [random_bits(counter + draws + k, key) for k in range((m + 1) // 2)]  # two planes share 32 bits
        planes = [round_stochastically(plane, logits.dtype, pairs[i // 2] if i % 2 == 0 else pairs[i // 2] >> 16)
                  for i, plane in enumerate(planes)]
    for i in range(m):
        logits[i].copy_(planes[i])

    w = _weights([plane.float() for plane in planes])
    u = [uniform(random_bits(counter + k, key)) for k in range(draws)]
    drawn = _draw_by_table(w, n, u[0]) if by_table else _draw_by_race(w, n, u)
    bits.copy_(drawn.to(bits.dtype))
    write_masked(weight, drawn, out, m)


def reference_step(logits: Tensor, bits: Tensor, weight: Tensor, out: Tensor,
                   coefficient: Tensor, key: Tensor, space, chunk: int = CHUNK) -> None:
    """The same step by the exact routines of `pge.py`, for any space and N:M; logits `[width, blocks]`."""
    generator = torch.Generator(bits.device).manual_seed(int(key.cpu().view(torch.int64)))
    for start in range(0, len(bits), chunk):
        part = slice(start, start + chunk)
        block_logits = logits[:, part].T.float()
        mask = bits_to_mask(bits[part], space.m)
        block_logits = block_logits - coefficient * space.score(block_logits, mask)
        if logits.dtype != torch.float32:
            noise = torch.randint(2**16, block_logits.shape, generator=generator, device=bits.device)
            block_logits = round_stochastically(block_logits.contiguous(), logits.dtype, noise.int())
        logits[:, part] = block_logits.T
        bits[part] = mask_to_bits(space.sample(block_logits.float(), generator))
    write_masked(weight, bits, out, space.m)


def eager_step(logits, bits, weight, out, coefficient, key, n, m, chunk: int = CHUNK) -> None:
    """`fused_step` without a compiler, a slice at a time; the same numbers."""
    for start in range(0, len(bits), chunk):
        part, weights = slice(start, start + chunk), slice(start * m, (start + chunk) * m)
        fused_step(logits[:, part], bits[part], weight[weights], out[weights], coefficient, key, n, m, start)


@lru_cache
def compiled(function, eager):
    """`torch.compile`, one static specialisation a shape; `eager`, said once, where there is no working compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # shapes x dtypes of a model
    fast = torch.compile(function, dynamic=False)
    broken = []

    def run(*args):
        if not broken:
            try:
                return fast(*args)
            except Exception as error:  # a missing compiler comes in several classes, by version and backend
                if "compil" not in f"{type(error).__name__} {error}".lower():
                    raise
                broken.append(error)
                print("note: no working compiler for torch.compile: the mask step runs eagerly, several times slower",
                      file=sys.stderr)
        return eager(*args)
    return run


def write_function(compile: bool = True):
    """`write_masked`, compiled where wanted."""
    return compiled(write_masked, write_masked) if compile else write_masked


def step_function(space, compile: bool = True):
    """The step of a space, (logits, bits, weight, out, coefficient, key) -> None: fused where it can be, else exact."""
    n, m = space.n, space.m
    if isinstance(space, pge.PatternSpace) or n > FUSED_MAX_N or m > FUSED_MAX_M:
        return lambda *args: reference_step(*args, space)
    run = compiled(fused_step, eager_step) if compile else eager_step
    return lambda *args: run(*args, n, m)
