"""Inclusion probabilities mu_i = P(i is kept) and their Jacobian, on planes as in fused_ops.py.
Learning from backward passes needs them."""

from itertools import combinations
from math import comb, log

from masking.fused_ops import Planes, rates, sum_of

import torch
from torch import Tensor

MOST_TRANSITIONS = 600  # in a short walk; 4:8 has 512, which take a minute to compile


def transitions(n: int, m: int) -> int:
    """Return the number of transitions T -> T + i that drawing may make; T is a set of fewer than N
    positions."""
    return sum(comb(m, size) * (m - size) for size in range(n))


def has_short_walk(n: int, m: int) -> bool:
    """Return whether `vjp` follows all sets that drawing may go through, instead of using
    `time_of`."""
    return transitions(n, m) <= MOST_TRANSITIONS


def time_of(w: Planes, n: int) -> Tensor:
    """Return the time tau `[blocks]` at which the race is stopped:
    sum_i P(i has arrived by tau) = N."""
    m = len(w)
    # starts below the root, from where Newton's steps only increase tau
    tau = torch.full_like(w[0], -log(1 - 1 / (m - n + 1)))
    for _ in range(16):
        late = [torch.exp(-x * tau) for x in w]
        tau = tau + (sum_of(late) - (m - n)) / sum_of([x * y for x, y in zip(w, late)]).clamp(
            min=1e-30
        )
    return tau


def sum_over(chosen: int, sums: dict[int, Tensor]) -> Tensor:
    """Return the sum over a set, given as the bits of an integer. `sums` has the sums over sets of
    one element; those of larger sets are added to it."""
    if chosen not in sums:
        last = 1 << chosen.bit_length() - 1
        sums[chosen] = sum_over(chosen - last, sums) + sums[last]
    return sums[chosen]


def flows(w: Planes, n: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return 1 / w(not in T) and P(the walk visits T) / w(not in T) for each set T of 0 to N - 1
    elements, by ascending size.

    Drawing is a walk through the sets T drawn so far, each given as the bits of an integer. The
    second value times w_i is the probability that i is drawn at T.
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


def inclusion(logits: Planes, n: int) -> Planes:
    """Return the inclusion probabilities mu_i = P(i is kept), as planes. They are those that `vjp`
    differentiates: exact if the walk is short, otherwise of the stopped race."""
    w = rates(logits, n)
    if not has_short_walk(n, len(w)):
        tau = time_of(w, n)
        return [1 - torch.exp(-x * tau) for x in w]
    flow = flows(w, n)[1]
    return [
        x * sum_of([flow[drawn] for drawn in flow if not drawn >> i & 1]) for i, x in enumerate(w)
    ]


def vjp(logits: Planes, saliency: Planes, n: int) -> Planes:
    """Return the vector-Jacobian product J^T saliency, J = d inclusion / d logits: the gradient of
    sum_i saliency_i P(i is kept) in the logits. Takes and returns planes.

    It is exact if the walk is short: N <= 4 and M <= 8, N <= 2, and a few more. Drawing is a walk
    through the sets drawn so far. It goes from T to T + i with probability w_i / w(not in T), and
    collects saliency_i (s_i). Let V(T) be the expected sum still to be collected at T. The policy
    gradient theorem says

        gradient_i = sum_{T without i} P(walk visits T) P(i | T) (s_i + V(T + i) - V(T))

    Otherwise the race is stopped at one time for all (`time_of`): inclusion_i = 1 - exp(-w_i tau),
    the limit of large blocks (Hajek 1964). This is within 0.1 of the exact probabilities. The
    direction of the gradient is off by less than 10 degrees in the median block; it may be off by
    far more in a block with few contested logits.
    """
    m = len(logits)
    w = rates(logits, n)
    if not has_short_walk(n, m):
        tau = time_of(w, n)
        rate = [x * tau * torch.exp(-x * tau) for x in w]  # d inclusion / d log tau
        mean = sum_of([x * y for x, y in zip(rate, saliency)]) / sum_of(rate).clamp(min=1e-30)
        return [x * (y - mean) for x, y in zip(rate, saliency)]
    (inverse, flow), expected = flows(w, n), {}
    immediate = {1 << i: x * y for i, (x, y) in enumerate(zip(w, saliency))}
    for drawn in reversed(flow):
        left = (1 << m) - 1 - drawn
        later = [
            w[i] * expected[drawn | 1 << i]
            for i in range(m)
            if left >> i & 1 and drawn | 1 << i in flow
        ]
        expected[drawn] = sum_of([sum_over(left, immediate), *later]) * inverse[drawn]
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
