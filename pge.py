"""The mathematics of MaskPro: distributions over (N:M) masks, their scores, and policy-gradient
estimators.

A block is M consecutive weights, of which a mask S keeps N. The linear space (MaskPro, arXiv
2506.12876, section 4) gives a block M logits. S is the unordered outcome of drawing N of M items
without replacement, with p = softmax(logits):

    p(S) = sum over orderings s of S of  prod_k  p[s_k] / (1 - p[s_1] - ... - p[s_k-1])

`log_prob` is this equation, `score` its gradient, `sample` the sampler, and `Estimator` the
advantage. `PolicyGradient.step` in train.py is the update that joins them.

All functions take logits `[blocks, M]` and bool masks `[blocks, M]`, and are exact and plain. The
arithmetic is float64, on recursions whose every term is positive, so nothing cancels however
saturated a block is. The training loop runs the same mathematics fused, in float32
(masking/fused_ops.py); the tests compare the two.
"""

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor


@lru_cache
def patterns(n: int, m: int) -> Tensor:
    """Return all C(m, n) masks of a block, bool `[C(m, n), m]`, in lexicographic order of the kept
    indices. The tensor is shared: do not modify it. Raises ValueError unless 1 <= n < m <= 16."""
    if not 1 <= n < m <= 16:
        raise ValueError(f"N:M must satisfy 1 <= N < M <= 16, not {n}:{m}")
    kept = torch.tensor(list(combinations(range(m), n)))
    return torch.zeros(len(kept), m, dtype=torch.bool).scatter_(1, kept, True)


def kept_indices(mask: Tensor, n: int | None = None) -> Tensor:
    """Return each block's kept positions, ascending: bool `[blocks, M]` -> int64 `[blocks, N]`.

    n: how many weights each block keeps. If None, they are counted, which waits for a GPU and
    raises ValueError if N varies.
    """
    if n is None:
        counts = mask.sum(-1)
        n = int(counts[0]) if len(counts) else 0
        if not bool((counts == n).all()):
            raise ValueError("every block of a mask must keep the same number of weights")
    return mask.int().sort(dim=1, descending=True, stable=True).indices[:, :n]


@lru_cache
def _subsets(n: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the subsets R of `size` out of N seats: their members j, and for each j the index of
    R - j among the subsets that are smaller by one. Both are int64 `[subsets, size]`."""
    subsets = list(combinations(range(n), size))
    number = {smaller: row for row, smaller in enumerate(combinations(range(n), size - 1))}
    without = [[number[subset[:k] + subset[k + 1 :]] for k in range(size)] for subset in subsets]
    return torch.tensor(subsets, device=device), torch.tensor(without, device=device)


def log_prob(logits: Tensor, mask: Tensor, n: int | None = None) -> Tensor:
    """Return log p(S | logits), `[blocks]`, in the dtype of the logits. It is differentiable. n:
    see `kept_indices`.

    Drawing without replacement (Plackett-Luce, Gumbel top-k) is a race with rates w = exp(logits):
    S wins if all its members arrive before any of the rest, whose joint rate is r. For a subset R
    of S that has not arrived yet,

        total(R) = sum_{j in R} w_j + r
        win(R)   = sum_{j in R} w_j win(R - j) / total(R)            win({}) = 1
        fail(R)  = (r + sum_{j in R} w_j fail(R - j)) / total(R)     fail({}) = 0;  fail = 1 - win

    p = win(S), and log p = -log(1 + fail / win) stays accurate, relative to log p, when p is close
    to 1. All subsets of one size are computed at once, `[subsets, blocks]`; together they take
    O(2^N N) numbers per block.
    """
    exact = logits.double()
    log_w = exact.gather(1, kept_indices(mask, n)).T
    log_r = exact.masked_fill(mask, -torch.inf).logsumexp(1)
    log_win = torch.zeros_like(log_r)[None]
    log_fail = torch.full_like(log_r, -torch.inf)[None]
    for size in range(1, len(log_w) + 1):
        members, without = _subsets(len(log_w), size, logits.device)
        first = log_w[members]  # log w_j of the j that arrives first, [subsets, size, blocks]
        log_total = torch.logaddexp(first.logsumexp(1), log_r)
        late = log_r.expand(len(first), 1, -1)
        log_fail = torch.cat([first + log_fail[without], late], 1).logsumexp(1) - log_total
        log_win = (first + log_win[without]).logsumexp(1) - log_total
    return -torch.logaddexp(torch.zeros_like(log_r), (log_fail - log_win)[0]).to(logits.dtype)


def score(logits: Tensor, mask: Tensor, n: int | None = None) -> Tensor:
    """Return the score function d log p(S | logits) / d logits, `[blocks, M]`, in the dtype of the
    logits, by autograd. n: see `kept_indices`.

    For N = 2, S = {a, b} and p = softmax(logits), with q_i = 1 - p_i and R = 1 / (1 / q_a + 1 /
    q_b), it is

        u_i = [i in S] (1 + R p_i / q_i^2),   g = u - p sum(u);   for N = 1, g = [i in S] - p
    """
    with torch.enable_grad():
        exact = logits.detach().double().requires_grad_()
        return torch.autograd.grad(log_prob(exact, mask, n).sum(), exact)[0].to(logits.dtype)


def sample(logits: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw one mask per block, bool `[blocks, M]`, by an exponential race: keep the n smallest
    E_i / w_i, E_i ~ Exp(1).

    The distribution is that of `torch.multinomial(softmax(logits), n, replacement=False)` and of
    Gumbel top-n. E is drawn in float64, because rare flips are the learning signal, and 24-bit
    uniform numbers have none below 6e-8.
    """
    arrival = torch.empty(logits.shape, dtype=torch.float64, device=logits.device).exponential_(
        generator=generator
    )
    kept = (arrival.log_() - logits).topk(n, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, kept, True)


def mode(logits: Tensor, n: int) -> Tensor:
    """Return the most probable mask, bool `[blocks, M]`: the n largest logits, ties to the lower
    index."""
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)


# --------------------------------------------------------------------------------------------------
# estimators: from a loss to an advantage


class Estimator:
    """Turns a step's loss f_t into its advantage A (section 4 of the paper). f_0 is f(m0 * w) on
    the same minibatch.

        vanilla     A = f_t                  plain policy gradient
        residual    A = f_t - f_0            removes the minibatch's own difficulty
        maskpro     A = f_t - f_0 - delta    removes a moving average, too:
                                             delta <- alpha delta + (1 - alpha) (f_t - f_0)

    The authors update delta first and then use it, which scales the gradient by alpha. This order
    is kept. As delta starts at 0, the first advantages all have the sign of the mean residual.
    `debias` divides delta by 1 - alpha^t.
    """

    def __init__(self, name: str = "maskpro", alpha: float = 0.99, debias: bool = False):
        self.name = name
        self.alpha = alpha
        self.debias = debias
        self.needs_baseline = name != "vanilla"
        self.delta = 0.0 if name == "maskpro" else None
        self.steps = 0

    def advantage(self, loss: float, baseline: float | None) -> float:
        """Return the advantage A of a loss f_t, in nats. baseline: f_0, or None if not needed."""
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
        """Return the state for a checkpoint: numbers by name, and no tensors."""
        return {"delta": self.delta, "steps": self.steps}, {}

    def restore(self, scalars: dict, read: object = None) -> None:
        """Restore what `state` returned; there are no tensors to read."""
        self.delta = scalars["delta"]
        self.steps = scalars["steps"]
