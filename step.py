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
# the mathematics of pge.py on lists of M planes, float32

def _sum(planes):
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total


def _others(planes):
    """The sum of all but each, added up from both ends: no difference, so nothing cancels."""
    before, after = [torch.zeros_like(planes[0])], [torch.zeros_like(planes[0])]
    for plane in planes[:-1]:
        before.append(before[-1] + plane)
    for plane in planes[:0:-1]:
        after.append(after[-1] + plane)
    return [x + y for x, y in zip(before, reversed(after))]


def _weights(logits, n: int):
    """exp(logits - the n-th largest), cut off at e^24: the last place is contested at scale 1, and logits far above it,
    which are kept whatever they are, neither overflow nor drown the others."""
    largest = []
    for plane in logits:
        for k in range(len(largest)):
            largest[k], plane = torch.maximum(largest[k], plane), torch.minimum(largest[k], plane)
        if len(largest) < n:
            largest.append(plane)
    return [torch.exp((plane - largest[-1]).clamp(max=24.0)) for plane in logits]


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
        total = _sum(w)
        double = _sum(inside) + 2 * rest
        common = rest / total / double
        g = [torch.where(k > 0, (partner + rest) / (x + rest) * (double + x) * common, 0.0)
             for x, partner, k in zip(inside, _others(inside), kept)]
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
    probability = win[0].clamp(min=1e-37)  # less than that is never drawn
    always = _sum(visit) / probability
    slopes = [_sum([visit[t] for t in range(full) if not t >> seat & 1]) / probability for seat in range(n)]
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
        inverse = [1 / q for q in _others(w)]
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


def fused_step(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor,
               coefficient: Tensor, key: Tensor, n: int, m: int, first: int = 0) -> None:
    """The whole step, in place. logits: M planes `[blocks]` float32/float16/bfloat16, bits `[blocks]`, weight and out
    `[blocks * M]` or as words, coefficient float32 `[]`, key int32 `[2]`; `first` is the number of the first block in
    its layer. N <= 4, M <= 8."""
    dtype = logits[0].dtype
    planes = [plane.float() for plane in logits]
    code = bits.int()
    kept = [(code >> i & 1).float() for i in range(m)]
    score = _score(_weights(planes, n), kept, n)
    planes = [plane - coefficient * g for plane, g in zip(planes, score)]

    by_table = n == 1 or (n == 2 and m <= 4)
    draws = 1 if by_table else m
    lanes = draws + (m + 1) // 2  # a block's own counters: its draws, then its rounding
    counter = (torch.arange(bits.shape[0], device=bits.device, dtype=torch.int32) + first) * lanes
    if dtype != torch.float32:
        pairs = [random_bits(counter + draws + k, key) for k in range((m + 1) // 2)]  # two planes share 32 bits
        planes = [round_stochastically(plane, dtype, pairs[i // 2] if i % 2 == 0 else pairs[i // 2] >> 16)
                  for i, plane in enumerate(planes)]
    for stored, plane in zip(logits, planes):
        stored.copy_(plane)

    w = _weights([plane.float() for plane in planes], n)
    u = [uniform(random_bits(counter + k, key)) for k in range(draws)]
    drawn = _draw_by_table(w, n, u[0]) if by_table else _draw_by_race(w, n, u)
    bits.copy_(drawn.to(bits.dtype))
    write_masked(weight, drawn, out, m)


def reference_step(logits: list[Tensor], bits: Tensor, weight: Tensor, out: Tensor,
                   coefficient: Tensor, key: Tensor, space, chunk: int = CHUNK) -> None:
    """The same step by the exact routines of `pge.py`, for any space and N:M; logits: `width` planes."""
    dtype = logits[0].dtype
    generator = torch.Generator(bits.device).manual_seed(int(key.cpu().view(torch.int64)))
    for start in range(0, len(bits), chunk):
        part = slice(start, start + chunk)
        block_logits = torch.stack([plane[part] for plane in logits], 1).float()
        mask = bits_to_mask(bits[part], space.m)
        block_logits = block_logits - coefficient * space.score(block_logits, mask)
        if dtype != torch.float32:
            noise = torch.randint(2**16, block_logits.shape, generator=generator, device=bits.device)
            block_logits = round_stochastically(block_logits, dtype, noise.int())
        for plane, column in zip(logits, block_logits.unbind(1)):
            plane[part] = column
        bits[part] = mask_to_bits(space.sample(block_logits.float(), generator))
    write_masked(weight, bits, out, space.m)


def eager_step(logits, bits, weight, out, coefficient, key, n, m, chunk: int = CHUNK) -> None:
    """`fused_step` without a compiler, a slice at a time; the same numbers."""
    weight, out = as_words(weight, m), as_words(out, m)
    for start in range(0, len(bits), chunk):
        part = slice(start, start + chunk)
        planes = [plane[part] for plane in logits]
        fused_step(planes, bits[part], weight[part], out[part], coefficient, key, n, m, start)


@lru_cache
def compiled(function, eager):
    """`torch.compile`, one static specialisation a shape; `eager`, said once, where there is no working compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # shapes x dtypes of a model
    fast = torch.compile(function, dynamic=False, options={"max_fusion_size": 10_000})  # one loop, no temporaries
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


MODES = ("compiled", "eager", "exact")


def write_function(mode: str = "compiled"):
    """`write_masked`, compiled where wanted."""
    run = compiled(write_masked, write_masked) if mode == "compiled" else write_masked
    return lambda weight, bits, out, m: run(as_words(weight, m), bits, as_words(out, m), m)


def step_function(space, mode: str = "compiled"):
    """The step of a space, (logits, bits, weight, out, coefficient, key) -> None. Fused, compiled or eager, where the
    space and its N:M have a fused form; `exact`, and elsewhere always, by `pge.py`.

    Planes must not share a storage, and words are viewed outside: a compiler copies what might overlap.
    """
    n, m = space.n, space.m
    if mode == "exact" or isinstance(space, pge.PatternSpace) or n > FUSED_MAX_N or m > FUSED_MAX_M:
        return lambda *args: reference_step(*args, space)
    run = compiled(fused_step, eager_step) if mode == "compiled" else eager_step
    return lambda logits, bits, weight, out, coefficient, key: run(
        list(logits), bits, as_words(weight, m), as_words(out, m), coefficient, key, n, m)
