"""References: enumeration in long decimals, Pearson's chi-square test, and exact steps by pge.py in
float64."""

from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import combinations, permutations

import pge

import torch


def by_orderings(logits, kept, digits: int = 120):
    """(p(S), its score [M]) as Decimals, from the definition: all N! orders of drawing the kept
    indices."""
    with localcontext() as context:
        context.prec = digits
        w = [Decimal(float(x)).exp() for x in logits]
        p, gradient = Decimal(0), [Decimal(0)] * len(w)
        for order in permutations(kept):
            left, chance, score = (
                set(range(len(w))),
                Decimal(1),
                [Decimal(i in kept) for i in range(len(w))],
            )
            for drawn in order:
                total = sum(w[j] for j in left)
                chance *= w[drawn] / total
                for j in left:
                    score[j] -= w[j] / total
                left.remove(drawn)
            p += chance
            gradient = [g + chance * x for g, x in zip(gradient, score)]
        return p, [g / p for g in gradient]


def by_inclusion_exclusion(logits, kept, digits: int = 400):
    """The same in 2^N terms: p(S) = sum over R in S of (-1)^|R| r / (r + w(R)), r the rate of the
    pruned.

    The terms cancel down to p: hence the many digits.
    """
    with localcontext() as context:
        context.prec = digits
        w = [Decimal(float(x)).exp() for x in logits]
        r = sum(x for i, x in enumerate(w) if i not in kept)
        p, gradient, gradient_r = Decimal(0), [Decimal(0)] * len(w), Decimal(0)
        for size in range(len(kept) + 1):
            for late in combinations(kept, size):
                sign, rate = (-1) ** size, sum((w[i] for i in late), Decimal(0))
                p += sign * r / (r + rate)
                gradient_r += sign * rate / (r + rate) ** 2
                for i in late:
                    gradient[i] -= sign * r / (r + rate) ** 2
        return p, [x * (gradient[i] if i in kept else gradient_r) / p for i, x in enumerate(w)]


def log(p) -> float:
    """ln of a Decimal, exact next to 1 as well."""
    with localcontext() as context:
        context.prec = 600
        return float(p.ln())


def distribution(logits, n: int) -> torch.Tensor:
    """p(S) of all patterns, float64 [C(M, N)], in lexicographic order of the kept indices."""
    return torch.tensor(
        [float(by_orderings(logits, kept)[0]) for kept in combinations(range(len(logits)), n)],
        dtype=torch.float64,
    )


def mask_of(kept, m: int) -> torch.Tensor:
    """bool [M] with True at the kept indices."""
    return torch.tensor([i in kept for i in range(m)])


def pattern_counts(mask: torch.Tensor) -> torch.Tensor:
    """How often each pattern occurs in bool [blocks, M], in lexicographic order; fails where a
    block keeps not N."""
    m, n = mask.shape[1], int(mask[0].sum())
    counts = torch.bincount((mask * 2 ** torch.arange(m)).sum(1), minlength=2**m)
    counts = counts[[sum(1 << i for i in kept) for kept in combinations(range(m), n)]]
    assert int(counts.sum()) == len(mask), "a block keeps another number of weights"
    return counts


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """P(a worse fit) of counts under probs, both [K]. Cells that expect fewer than 5 are pooled."""
    order = probs.argsort()
    observed, expected = counts[order].double(), probs[order] * counts.sum()
    rare = int((expected < 5).sum())
    while 0 < rare < len(expected) and expected[:rare].sum() < 5:
        rare += 1
    if rare:
        observed = torch.cat([observed[:rare].sum(0, keepdim=True), observed[rare:]])
        expected = torch.cat([expected[:rare].sum(0, keepdim=True), expected[rare:]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(
            torch.tensor((len(observed) - 1) / 2, dtype=torch.float64), statistic / 2
        )
    )


def drawings(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All ways to draw n of a block's M weights one after the other, from the definition in
    float64: their probabilities `[M!/(M-n)!]`, differentiable in the logits `[M]`, and the drawn
    indices `[M!/(M-n)!, n]`."""
    m = len(logits)
    order = torch.tensor(list(permutations(range(m), n)))
    left = torch.ones(len(order), m, dtype=torch.bool)
    log_chance = torch.zeros(len(order), dtype=torch.float64)
    for drawn in order.T:
        log_chance = (
            log_chance
            + logits.double()[drawn]
            - logits.double().masked_fill(~left, -torch.inf).logsumexp(1)
        )
        left = left.scatter(1, drawn[:, None], False)
    return log_chance.exp(), order


@lru_cache
def _lattice(n: int, m: int) -> list[tuple]:
    """For each size k to n of the sets T drawn so far, in lexicographic order: what the sets of one
    less leave over, bool `[C(m, k - 1), m]`; and for each place in T, the number of the set T - i
    and i itself, int64 `[k, C(m, k)]`."""
    levels, number, left = [], {(): 0}, torch.ones(1, m, dtype=torch.bool)
    for k in range(1, n + 1):
        sets = list(combinations(range(m), k))
        before = torch.tensor(
            [[number[t[:place] + t[place + 1 :]] for t in sets] for place in range(k)]
        )
        levels.append((left, before, torch.tensor(sets).T))
        number, left = {t: index for index, t in enumerate(sets)}, ~pge.patterns(k, m)
    return levels


def pattern_probs(logits: torch.Tensor, n: int) -> torch.Tensor:
    """p(S) of every pattern, `[blocks, C(M, n)]` in the order of `pge.patterns(n, M)`, in the dtype
    of the logits.

    One pass up the lattice of sets drawn so far, a size at a time: f(T) = sum_{i in T} f(T - i) w_i
    / w(all but T - i).
    """
    # its place is contested at scale 1; far above it nothing overflows
    pivot = logits.double().topk(n).values[:, -1:]
    w = (logits.double() - pivot).clamp(max=300).exp().T
    drawn = torch.ones_like(w[:1])  # [sets, blocks]
    for left, before, last in _lattice(n, logits.shape[1]):
        hazard = drawn / (left.to(w) @ w)
        drawn = sum(hazard[b] * w[i] for b, i in zip(before.to(w.device), last.to(w.device)))
    return drawn.T.to(logits.dtype)


def inclusion(logits: torch.Tensor, n: int) -> torch.Tensor:
    """P(i is kept), `[blocks, M]`, summing to n over a block: the patterns' probabilities added up.
    Differentiable."""
    probs = pattern_probs(logits, n)
    return probs @ pge.patterns(n, logits.shape[1]).to(probs.device, probs.dtype)


def inclusion_by_drawings(logits: torch.Tensor, n: int) -> torch.Tensor:
    """P(i is kept), float64 `[M]`, differentiable: `drawings` added up."""
    chance, order = drawings(logits, n)
    return chance @ torch.nn.functional.one_hot(order, len(logits)).sum(1).double()


def jacobian(inclusion, logits: torch.Tensor) -> torch.Tensor:
    """d inclusion_i / d logits_j of one block, float64 `[M, width]`, by autograd."""
    return torch.autograd.functional.jacobian(inclusion, logits.double())


def exact_vjp(logits, n, saliency):
    """J^T saliency of `[blocks, M]` logits, float64, by autograd of the inclusion probabilities."""
    logits = logits.double().requires_grad_()
    return torch.autograd.grad((inclusion(logits, n) * saliency).sum(), logits)[0]
