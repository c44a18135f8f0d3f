"""The mathematics of pge.py on planes: float32, element-wise over blocks, made to be fused.

Logits are a list of M planes `[blocks]`, one for each place in a block, and so is everything
computed from them; a mask is the bits of an integer plane (bit i set: weight i is kept). No
function here gathers, sorts or indexes, so that `torch.compile` turns a step made of them into a
single loop over blocks. `kernels.py` has those steps; the tests hold each function against its
exact float64 twin.
"""

from itertools import combinations
from math import comb, log

import torch
from torch import Tensor

Planes = list[Tensor]  # M tensors [blocks], float32


def sum_of(planes: Planes) -> Tensor:
    """Their sum, left to right."""
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total


def others(planes: Planes) -> Planes:
    """The sum of all but each, added up from both ends: no difference, so nothing cancels."""
    before = [torch.zeros_like(planes[0])]
    after = [torch.zeros_like(planes[0])]
    for plane in planes[:-1]:
        before.append(before[-1] + plane)
    for plane in planes[:0:-1]:
        after.append(after[-1] + plane)
    return [x + y for x, y in zip(before, reversed(after))]


def nth_largest(planes: Planes, n: int) -> Tensor:
    """The n-th largest of each place's numbers, of which there are at least n."""
    largest = []
    for plane in planes:
        for k in range(len(largest)):
            largest[k], plane = torch.maximum(largest[k], plane), torch.minimum(largest[k], plane)
        if len(largest) < n:
            largest.append(plane)
    return largest[-1]


def rates(logits: Planes, n: int) -> Planes:
    """Rates of the race that a draw is: exp(logits - the n-th largest), cut off at e^24. The last
    place is contested at scale 1, and logits far above it, which are kept whatever they are,
    neither overflow nor drown the others."""
    last = nth_largest(logits, n)
    return [torch.exp((plane - last).clamp(max=24.0)) for plane in logits]


def score(w: Planes, kept: Planes, n: int) -> Planes:
    """d log p / d logits. `kept` are planes of 0. and 1.; equal to `pge.score` up to float32.

    With r the weight of the rest, and for n = 2, S = {a, b}, Q_a = w_b + r, Z = w_a + Q_a:

        g_a = Q_a r (Z + r + w_a) / (Z Q_b (Q_a + Q_b))       no difference is taken
        g_i = -(w_i / r) (g_a + g_b)                           for i not in S
    """
    total = sum_of(w)
    if n == 1:
        return [k - x / total for k, x in zip(kept, w)]
    inside = [x * k for x, k in zip(w, kept)]
    # float32 exp ends at a gap of 87
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
    """`score` for n > 2: the draws are followed over the subsets T of S.

    reach[T] and win[T] are the probabilities to get to the drawn set T, and from there to S:

        g_i = [i in S] - w_i sum_{T not holding i} reach[T] win[T] / (rest[T] win[0])
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
    probability = win[0].clamp(min=1e-37)  # less than that is never drawn
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
    """For each proper subset T of the seats, the bits of an index: reach[T], win[T], and
    1 / rest[T], the weight of all that T does not hold. See `score_by_subsets`."""
    full = 2 ** len(seats) - 1
    inverse_rest = []
    for drawn in range(full):
        left = sum_of([s for j, s in enumerate(seats) if not drawn >> j & 1])
        inverse_rest.append(1 / (left + rest))
    reach = [torch.ones_like(rest)]
    for drawn in range(1, full):
        last = [(drawn ^ 1 << j, s) for j, s in enumerate(seats) if drawn >> j & 1]
        reach.append(sum_of([reach[t] * inverse_rest[t] * s for t, s in last]))
    win = {full: torch.ones_like(rest)}
    for drawn in reversed(range(full)):
        following = [(drawn | 1 << j, s) for j, s in enumerate(seats) if not drawn >> j & 1]
        win[drawn] = sum_of([win[t] * s for t, s in following]) * inverse_rest[drawn]
    return reach, [win[t] for t in range(full)], inverse_rest


def draw_by_table(w: Planes, n: int, u: Tensor) -> Tensor:
    """One uniform number and the cumulative sum over the patterns, the most probable put last.

    So the rare patterns share the small u, whose resolution is 2^-32, instead of the large, whose
    it is 2^-24. n = 1: p(i) ~ w_i; n = 2: p(a, b) ~ w_a w_b (1/Q_a + 1/Q_b), Q_a = sum of all but
    w_a.
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
    """Keep the n smallest E_i / w_i, E = -log(1 - u)."""
    return earliest([-torch.log1p(-x) / y for x, y in zip(u, w)], n)


def earliest(arrival: Planes, n: int) -> Tensor:
    """Bits `[blocks]` int32 of the n smallest arrivals: a rank by M(M-1)/2 comparisons, a tie to
    the lower index."""
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
    """Bits `[blocks]` int32 of a mask drawn by `draws(n, M)` uniform numbers a block."""
    return draw_by_table(w, n, u[0]) if len(u) == 1 else draw_by_race(w, n, u)


def draws(n: int, m: int) -> int:
    """Uniform numbers that `draw` takes: one to look up in a table where that is short, else one a
    weight to race."""
    return 1 if n == 1 or (n == 2 and m <= 4) else m


def most_probable(logits: Planes, n: int) -> Tensor:
    """Bits `[blocks]` int32 of the n largest logits, ties to the lower index."""
    return earliest([-plane for plane in logits], n)


# --------------------------------------------------------------------------------------------------
# the inclusion probabilities, and what a gradient in them says about the logits

MOST_TRANSITIONS = 600  # of a short walk: 4:8 has 512, which compile for a minute


def transitions(n: int, m: int) -> int:
    """How many steps T -> T + i, T a set of fewer than N places, drawing may make."""
    return sum(comb(m, size) * (m - size) for size in range(n))


def has_short_walk(n: int, m: int) -> bool:
    """Whether all sets that drawing goes through are followed; beyond, `time_of` stands in."""
    return transitions(n, m) <= MOST_TRANSITIONS


def time_of(w: Planes, n: int) -> Tensor:
    """The one time at which the race is stopped, `[blocks]`: tau with sum_i P(i has come) = N."""
    m = len(w)
    # below the root, from where Newton's steps only grow
    tau = torch.full_like(w[0], -log(1 - 1 / (m - n + 1)))
    for _ in range(16):
        late = [torch.exp(-x * tau) for x in w]
        tau = tau + (sum_of(late) - (m - n)) / sum_of([x * y for x, y in zip(w, late)]).clamp(
            min=1e-30
        )
    return tau


def sum_over(chosen: int, sums: dict[int, Tensor]) -> Tensor:
    """The sum over a set, the bits of an integer. `sums`: those of the sets of one, to which it
    adds others."""
    if chosen not in sums:
        last = 1 << chosen.bit_length() - 1
        sums[chosen] = sum_over(chosen - last, sums) + sums[last]
    return sums[chosen]


def flows(w: Planes, n: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Drawing is a walk through the sets T drawn so far, the bits of an integer. Returns, for sizes
    ascending from 0 to N - 1: 1 / w(not in T), and P(the walk visits T) / w(not in T), which times
    w_i is the chance that i is drawn at T.
    """
    m = len(w)
    sums = {1 << i: x for i, x in enumerate(w)}
    inverse = {}
    flow = {}
    for size in range(n):
        for places in combinations(range(m), size):
            drawn = sum(1 << i for i in places)
            inverse[drawn] = 1 / sum_over((1 << m) - 1 - drawn, sums)
            visits = [flow[drawn ^ 1 << i] * w[i] for i in places]
            flow[drawn] = sum_of(visits) * inverse[drawn] if visits else inverse[drawn]
    return inverse, flow


def vjp(logits: Planes, saliency: Planes, n: int) -> Planes:
    """J^T saliency, J = d inclusion / d logits: the gradient of sum_i saliency_i P(i is kept) in
    the logits, a vector-Jacobian product; planes in and out.

    Exact where the walk is short: N <= 4 and M <= 8, N <= 2, and a few more. Drawing is a walk
    through the sets drawn so far, T -> T + i with chance w_i / w(not in T), that collects
    saliency_i (s_i); with V(T) what is still to be expected at T, the policy gradient theorem says

        gradient_i = sum_{T not holding i} P(walk visits T) P(i | T) (s_i + V(T + i) - V(T))

    Elsewhere the race is stopped at one time for all (`time_of`): inclusion_i = 1 - exp(-w_i tau),
    the limit of large blocks (Hajek 1964). It is within 0.1 of the exact probabilities. Its
    direction is off by less than 10 degrees in the median block; where few logits of a block are
    still contested, it may be off by far more.
    """
    m = len(logits)
    w = rates(logits, n)
    if not has_short_walk(n, m):
        tau = time_of(w, n)
        rate = [x * tau * torch.exp(-x * tau) for x in w]  # d inclusion / d log tau
        mean = sum_of([x * y for x, y in zip(rate, saliency)]) / sum_of(rate).clamp(min=1e-30)
        return [x * (y - mean) for x, y in zip(rate, saliency)]
    (inverse, flow), expected = flows(w, n), {}
    at_once = {1 << i: x * y for i, (x, y) in enumerate(zip(w, saliency))}
    for drawn in reversed(flow):
        left = (1 << m) - 1 - drawn
        later = [
            w[i] * expected[drawn | 1 << i]
            for i in range(m)
            if left >> i & 1 and drawn | 1 << i in flow
        ]
        expected[drawn] = sum_of([sum_over(left, at_once), *later]) * inverse[drawn]
    gradient = []
    for i in range(m):
        without = [drawn for drawn in flow if not drawn >> i & 1]
        gains = [
            flow[drawn]
            * (
                expected[drawn | 1 << i] - expected[drawn]
                if drawn | 1 << i in flow
                else -expected[drawn]
            )
            for drawn in without
        ]
        gradient.append(
            w[i] * (saliency[i] * sum_of([flow[drawn] for drawn in without]) + sum_of(gains))
        )
    return gradient
