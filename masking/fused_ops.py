"""The mathematics of pge.py on planes: float32, element-wise over blocks, made to be fused.

Logits are a list of M planes `[blocks]`, one for each position in a block, and so is everything
computed from them. A mask is one integer plane, whose bit i is set if weight i is kept. No function
here gathers, sorts or indexes, so `torch.compile` turns a step made of them into a single loop over
blocks. `fused_kernels.py` has those steps. The tests compare each function with its exact float64
counterpart.
"""

from itertools import combinations

import torch
from torch import Tensor

Planes = list[Tensor]  # M tensors [blocks], float32


def sum_of(planes: Planes) -> Tensor:
    """Return the sum of the planes, added from left to right."""
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total


def others(planes: Planes) -> Planes:
    """Return for each plane the sum of all others, added up from both ends. No difference is taken,
    so nothing cancels."""
    before = [torch.zeros_like(planes[0])]
    after = [torch.zeros_like(planes[0])]
    for plane in planes[:-1]:
        before.append(before[-1] + plane)
    for plane in planes[:0:-1]:
        after.append(after[-1] + plane)
    return [x + y for x, y in zip(before, reversed(after))]


def nth_largest(planes: Planes, n: int) -> Tensor:
    """Return the n-th largest of the planes' values, element-wise. There are at least n planes."""
    largest = []
    for plane in planes:
        for k in range(len(largest)):
            largest[k], plane = torch.maximum(largest[k], plane), torch.minimum(largest[k], plane)
        if len(largest) < n:
            largest.append(plane)
    return largest[-1]


def rates(logits: Planes, n: int) -> Planes:
    """Return the rates of the race that draws a mask: exp(logit - n-th largest logit), at most
    e^24. Weights that compete for the last place have rates near 1. Logits far above are kept in
    any case; the limit keeps them from overflowing and from drowning the others."""
    threshold = nth_largest(logits, n)
    return [torch.exp((plane - threshold).clamp(max=24.0)) for plane in logits]


def score(w: Planes, kept: Planes, n: int) -> Planes:
    """Return d log p / d logits, which equals `pge.score` up to float32. `w`: rates; `kept`: planes
    of 0. and 1.

    Let r be the sum of the pruned weights' rates. For n = 2, S = {a, b}, Q_a = w_b + r and
    Z = w_a + Q_a:

        g_a = Q_a r (Z + r + w_a) / (Z Q_b (Q_a + Q_b))       no difference is taken
        g_i = -(w_i / r) (g_a + g_b)                           for i not in S
    """
    total = sum_of(w)
    if n == 1:
        return [k - x / total for k, x in zip(kept, w)]
    inside = [x * k for x, k in zip(w, kept)]
    # exp underflows in float32 at a gap of 87
    rest = sum_of([x - y for x, y in zip(w, inside)]).clamp(min=1e-30)
    if n > 2:
        return score_by_subsets(w, kept, n, rest)
    double = sum_of(inside) + 2 * rest
    common = rest / total / double
    g = [
        torch.where(k > 0, (partner + rest) / (x + rest) * (double + x) * common, 0.0)
        for x, partner, k in zip(inside, others(inside), kept)
    ]
    share = sum_of(g) / rest
    return [x - y * (1 - k) * share for x, y, k in zip(g, w, kept)]


def score_by_subsets(w: Planes, kept: Planes, n: int, rest: Tensor) -> Planes:
    """Return `score` for n > 2, by following the draws over the subsets T of S.

    reach[T] is the probability of getting to the drawn set T, and win[T] of getting from T to S:

        g_i = [i in S] - w_i sum_{T without i} reach[T] win[T] / (rest[T] win[0])
    """
    # seat k is the (k+1)-th kept weight, so that subsets are static
    rank = torch.zeros_like(rest)
    ranks = []
    for k in kept:
        ranks.append(torch.where(k > 0, rank, -1.0))
        rank = rank + k
    seats = [
        sum_of([torch.where(r == seat, x, 0.0) for r, x in zip(ranks, w)]) for seat in range(n)
    ]
    reach, win, inverse_rest = walk(seats, rest)
    visit = [a * b * c for a, b, c in zip(reach, win, inverse_rest)]
    probability = win[0].clamp(min=1e-37)  # less probable masks are never drawn
    always = sum_of(visit) / probability
    unseated = [
        sum_of([visit[t] for t in range(len(visit)) if not t >> seat & 1]) / probability
        for seat in range(n)
    ]
    g = []
    for i in range(len(w)):
        contested = always
        for seat in range(n):
            contested = torch.where(ranks[i] == seat, unseated[seat], contested)
        g.append(kept[i] - w[i] * contested)
    return g


def walk(seats: Planes, rest: Tensor) -> tuple[Planes, Planes, Planes]:
    """Return reach[T], win[T] and 1 / rest[T] for each proper subset T of the seats, the bits of an
    index. rest[T] is the sum of the rates outside T. See `score_by_subsets`."""
    full = 2 ** len(seats) - 1
    inverse_rest = []
    for drawn in range(full):
        left = sum_of([s for j, s in enumerate(seats) if not drawn >> j & 1])
        inverse_rest.append(1 / (left + rest))
    reach = [torch.ones_like(rest)]
    for drawn in range(1, full):
        previous = [(drawn ^ 1 << j, s) for j, s in enumerate(seats) if drawn >> j & 1]
        reach.append(sum_of([reach[t] * inverse_rest[t] * s for t, s in previous]))
    win = {full: torch.ones_like(rest)}
    for drawn in reversed(range(full)):
        following = [(drawn | 1 << j, s) for j, s in enumerate(seats) if not drawn >> j & 1]
        win[drawn] = sum_of([win[t] * s for t, s in following]) * inverse_rest[drawn]
    return reach, [win[t] for t in range(full)], inverse_rest


def draw_by_table(w: Planes, n: int, u: Tensor) -> Tensor:
    """Draw masks by one uniform number u and the cumulative sum over the patterns, in which the
    most probable pattern comes last.

    So rare patterns get small u, with a resolution of 2^-32, rather than large u, with 2^-24.
    n = 1: p(i) ~ w_i; n = 2: p(a, b) ~ w_a w_b (1/Q_a + 1/Q_b), Q_a = sum of all but w_a.
    """
    m = len(w)
    if n == 1:
        table = [(1 << i, w[i]) for i in range(m)]
    else:
        inverse = [1 / q for q in others(w)]
        table = [
            (1 << a | 1 << b, w[a] * w[b] * (inverse[a] + inverse[b]))
            for a, b in combinations(range(m), 2)
        ]
    top = table[0][1]
    for _, p in table[1:]:
        top = torch.maximum(top, p)
    target = u * sum_of([p for _, p in table])
    below = torch.zeros_like(u)
    mode = drawn = torch.zeros_like(u, dtype=torch.int32)
    for bits, p in table:
        is_mode = (p >= top) & (mode == 0)
        below = below + torch.where(is_mode, 0.0, p)
        drawn = torch.where((drawn == 0) & (target < below) & ~is_mode, bits, drawn)
        mode = torch.where(is_mode, bits, mode)
    return torch.where(drawn == 0, mode, drawn)


def draw_by_race(w: Planes, n: int, u: Planes) -> Tensor:
    """Draw masks by keeping the n smallest E_i / w_i, E_i = -log(1 - u_i)."""
    return earliest([-torch.log1p(-x) / y for x, y in zip(u, w)], n)


def earliest(arrival: Planes, n: int) -> Tensor:
    """Return bits int32 `[blocks]` of the n smallest arrivals, ties to the lower index. M(M-1)/2
    comparisons rank them."""
    m = len(arrival)
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


def draw(w: Planes, n: int, u: Planes) -> Tensor:
    """Draw masks, bits int32 `[blocks]`, by `draws(n, M)` uniform numbers per block."""
    return draw_by_table(w, n, u[0]) if len(u) == 1 else draw_by_race(w, n, u)


def draws(n: int, m: int) -> int:
    """Return how many uniform numbers per block `draw` takes: one to look up in a table if that is
    short, else one per weight for the race."""
    return 1 if n == 1 or (n == 2 and m <= 4) else m


def most_probable(logits: Planes, n: int) -> Tensor:
    """Return bits int32 `[blocks]` of the n largest logits, ties to the lower index."""
    return earliest([-plane for plane in logits], n)
