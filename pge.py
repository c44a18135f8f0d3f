"""The mathematics of MaskPro: distributions over (N:M) masks, their scores, and policy-gradient estimators.

A block is M consecutive weights, of which a mask S keeps N. Linear space (MaskPro, arXiv 2506.12876, section 4)
gives a block M logits; S is the unordered outcome of drawing N of M items without replacement with p = softmax(logits):

    p(S) = sum over orderings s of S of  prod_k  p[s_k] / (1 - p[s_1] - ... - p[s_k-1])

The equation is `log_prob`, its gradient `score`, the sampler `sample`, the advantage `Estimator`; the update that joins
them is `PolicyGradient.step` in train.py.

Everything here takes logits `[blocks, M]` and bool masks `[blocks, M]`, and is exact and plain: the arithmetic is done
in float64 on recursions whose every term is positive, so that nothing cancels however saturated a block is.
The training loop runs the same mathematics fused, in float32 (masking/fused_ops.py); the tests hold the two together.
"""
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor


@lru_cache
def patterns(n: int, m: int) -> Tensor:
    """All C(m, n) masks of a block, bool `[C(m, n), m]`, in lexicographic order of the kept indices (shared: not to be
    modified). ValueError unless 1 <= n < m <= 16."""
    if not 1 <= n < m <= 16:
        raise ValueError(f"N:M must satisfy 1 <= N < M <= 16, not {n}:{m}")
    kept = torch.tensor(list(combinations(range(m), n)))
    return torch.zeros(len(kept), m, dtype=torch.bool).scatter_(1, kept, True)


def kept_indices(mask: Tensor) -> Tensor:
    """Each block's kept positions, ascending: bool `[blocks, M]` -> int64 `[blocks, N]`; ValueError if N varies."""
    counts = mask.sum(-1)
    n = int(counts[0]) if len(counts) else 0
    if not bool((counts == n).all()):
        raise ValueError("every block of a mask must keep the same number of weights")
    return mask.nonzero()[:, 1].view(-1, n)


def _race(logits: Tensor, mask: Tensor):
    """The drawing seen from S: what `log_prob` and `score` share.

    Drawing without replacement (Plackett-Luce, Gumbel top-k) is a race with rates w = exp(logits): S wins if all of it
    arrives before any of the rest, whose joint rate is r. For a subset R of S still to arrive (a bit set over the N
    kept positions),

        log_win[R] = log P(R arrives before the rest),  win(R) = sum_{j in R} w_j win(R - j) / total(R)
        log_total[R] = log(w(R) + r), summed from its own terms

    Returns log w of the kept `[blocks, N]`, log r `[blocks]`, and the two lists of 2^N tensors `[blocks]`, float64.
    """
    logits = logits.double()
    log_w = logits.gather(1, kept_indices(mask))
    log_r = logits.masked_fill(mask, -torch.inf).logsumexp(1)
    n = log_w.shape[1]
    log_total, log_win = [log_r], [torch.zeros_like(log_r)]
    for subset in range(1, 2**n):
        lowest = (subset & -subset).bit_length() - 1
        log_total.append(torch.logaddexp(log_total[subset & (subset - 1)], log_w[:, lowest]))
        first = [log_w[:, j] + log_win[subset ^ 1 << j] for j in range(n) if subset >> j & 1]
        log_win.append(torch.stack(first).logsumexp(0) - log_total[subset])
    return log_w, log_r, log_total, log_win


def log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """log p(S | logits), `[blocks]`, in the dtype of the logits; differentiable.

    p = win(S); beside it runs fail(R) = (r + sum_j w_j fail(R - j)) / total(R) = 1 - win(R), so that
    log p = -log(1 + fail/win) keeps its relative accuracy when p is next to 1. O(2^N N) a block.
    """
    log_w, log_r, log_total, log_win = _race(logits, mask)
    n = log_w.shape[1]
    log_fail = [None]
    for subset in range(1, 2**n):
        terms = [log_r] + [log_w[:, j] + log_fail[subset ^ 1 << j] for j in range(n)
                           if subset >> j & 1 and subset != 1 << j]
        log_fail.append(torch.stack(terms).logsumexp(0) - log_total[subset])
    return -torch.logaddexp(torch.zeros_like(log_r), log_fail[-1] - log_win[-1]).to(logits.dtype)


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """The score function d log p(S | logits) / d logits, `[blocks, M]`, in the dtype of the logits.

    g_i >= 0 for kept i: log win grows with w_i exactly where i is the only one to come too late,

        late_i(R) = P(i after the rest | R - i before it) = total(R - i)/total(R) sum_j c_j(R - i) late_i(R - j)
        g_i(R) = c_i(R) late_i(R) + sum_{j != i} c_j(R) g_i(R - j),   c_j(R) = P(j is first | R wins)

    and for pruned i, g_i = -(w_i / r) sum_{kept k} g_k, since p depends on ratios only. O(2^N N^2) a block.
    """
    log_w, log_r, log_total, log_win = _race(logits, mask)
    n = log_w.shape[1]
    late, gradient = [{} for _ in range(2**n)], [{} for _ in range(2**n)]
    first = [{}]  # first[R][j] = c_j(R)
    for subset in range(1, 2**n):
        members = [j for j in range(n) if subset >> j & 1]
        first.append({j: (log_w[:, j] + log_win[subset ^ 1 << j] - log_total[subset] - log_win[subset]).exp()
                      for j in members})
        for i in members:
            others = subset ^ 1 << i
            share = (log_total[others] - log_total[subset]).exp()
            beaten = [first[others][j] * late[subset ^ 1 << j][i] for j in members if j != i]
            late[subset][i] = share * sum(beaten) if beaten else share
            gradient[subset][i] = first[subset][i] * late[subset][i] + sum(
                first[subset][j] * gradient[subset ^ 1 << j][i] for j in members if j != i)
    kept = torch.stack([gradient[-1][i] for i in range(n)], 1)
    share_of_rest = (logits.double().masked_fill(mask, -torch.inf) - log_r[:, None]).exp()
    pruned = -share_of_rest * kept.sum(1, keepdim=True)
    return pruned.scatter(1, kept_indices(mask), kept).to(logits.dtype)


@lru_cache
def _lattice(n: int, m: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each size k to n of the sets T drawn so far, in lexicographic order: what the sets of one less leave over,
    bool `[C(m, k - 1), m]`; and for each place in T, the number of the set T - i and i itself, int64 `[k, C(m, k)]`."""
    levels, number, left = [], {(): 0}, torch.ones(1, m, dtype=torch.bool)
    for k in range(1, n + 1):
        sets = list(combinations(range(m), k))
        before = torch.tensor([[number[t[:place] + t[place + 1:]] for t in sets] for place in range(k)])
        levels.append((left, before, torch.tensor(sets).T))
        number, left = {t: index for index, t in enumerate(sets)}, ~patterns(k, m)
    return levels


def pattern_probs(logits: Tensor, n: int) -> Tensor:
    """p(S) of every pattern, `[blocks, C(M, n)]` in the order of `patterns(n, M)`, in the dtype of the logits.

    One pass up the lattice of sets drawn so far, a size at a time: f(T) = sum_{i in T} f(T - i) w_i / w(all but T - i).
    """
    pivot = logits.double().topk(n).values[:, -1:]  # its place is contested at scale 1; far above it nothing overflows
    w = (logits.double() - pivot).clamp(max=300).exp().T
    drawn = torch.ones_like(w[:1])  # [sets, blocks]
    for left, before, last in _lattice(n, logits.shape[1]):
        hazard = drawn / (left.to(w) @ w)
        drawn = sum(hazard[b] * w[i] for b, i in zip(before.to(w.device), last.to(w.device)))
    return drawn.T.to(logits.dtype)


def inclusion(logits: Tensor, n: int) -> Tensor:
    """P(i is kept), `[blocks, M]`, summing to n over a block: the patterns' probabilities added up. Differentiable."""
    probs = pattern_probs(logits, n)
    return probs @ patterns(n, logits.shape[1]).to(probs.device, probs.dtype)


def sample(logits: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw one mask a block, bool `[blocks, M]`: the exponential race, keep the n smallest E_i / w_i, E_i ~ Exp(1).

    The same distribution as `torch.multinomial(softmax(logits), n, replacement=False)` and as Gumbel top-n. E is drawn
    in float64: rare flips are the learning signal, and 24-bit uniform numbers have none below 6e-8.
    """
    arrival = torch.empty(logits.shape, dtype=torch.float64, device=logits.device).exponential_(generator=generator)
    kept = (arrival.log_() - logits).topk(n, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, kept, True)


def mode(logits: Tensor, n: int) -> Tensor:
    """The most probable mask, bool `[blocks, M]`: the n largest logits, ties to the lower index."""
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)


# ---------------------------------------------------------------------------------------------------------------------
# estimators: from a loss to an advantage

class Estimator:
    """Turns a step's loss f_t into its advantage A (section 4 of the paper); f_0 is f(m0 * w) of the same minibatch:

        vanilla     A = f_t                  plain policy gradient
        residual    A = f_t - f_0            takes the minibatch's own difficulty out
        maskpro     A = f_t - f_0 - delta    less a moving average: delta <- alpha delta + (1 - alpha) (f_t - f_0)

    The authors update delta first and then use it, which scales the gradient by alpha; this order is kept. From
    delta = 0 the first advantages all carry the sign of the mean residual; `debias` divides delta by 1 - alpha^t.
    """

    def __init__(self, name: str = "maskpro", alpha: float = 0.99, debias: bool = False):
        self.name, self.alpha, self.debias = name, alpha, debias
        self.needs_baseline = name != "vanilla"
        self.delta, self.steps = (0.0 if name == "maskpro" else None), 0

    def advantage(self, loss: float, baseline: float | None) -> float:
        """The advantage A of a loss f_t, nats; baseline: f_0, None where not needed."""
        if self.name == "vanilla":
            return loss
        residual = loss - baseline
        if self.name == "residual":
            return residual
        self.steps += 1
        self.delta = self.alpha * self.delta + (1 - self.alpha) * residual
        correction = 1 - self.alpha**self.steps if self.debias else 1.0
        return residual - self.delta / correction

    def state(self) -> tuple[dict, dict]:
        """For a checkpoint: numbers by name, and no tensors."""
        return {"delta": self.delta, "steps": self.steps}, {}

    def restore(self, scalars: dict, read: object = None) -> None:
        """From `state`; there are no tensors to read."""
        self.delta, self.steps = scalars["delta"], scalars["steps"]
