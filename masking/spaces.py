"""The two spaces of a block's logits: M logits (MaskPro), or one for each pattern (MaskLLM)."""

from math import comb

import pge
from pge import patterns

import torch
from torch import Generator, Tensor

# of `logits_from_scores`, in logits
MARGIN = 1.0  # lead of the kept weights
LIMIT = 12.0  # largest difference that scores make


def logits_from_scores(mask: Tensor, magnitude: float, score: Tensor) -> Tensor:
    """Return logits that are as confident of `mask` as the scores are, float32 `[blocks, M]`: C
    log(score / score of the weakest kept weight), plus MARGIN for kept weights.

    A pruned weight then takes a kept one's place with odds near (ratio of their scores)^C, so close
    calls are tried often and clear ones hardly ever. A pruned weight whose score is above that of
    the weakest kept one gets the same logit, but without MARGIN.

    mask: bool `[blocks, M]`; magnitude: C; score: `[blocks, M]`, positive.
    """
    log_score = score.float().clamp(min=1e-30).log()
    weakest = log_score.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    gap = magnitude * (log_score - weakest)
    return torch.where(mask, gap.clamp(0, LIMIT) + MARGIN, gap.clamp(-LIMIT, 0))


class LinearSpace:
    """MaskPro's space: M logits per block, from which N weights are drawn without replacement."""

    def __init__(self, n: int, m: int):
        self.n = n
        self.m = m
        self.width = m

    def init(self, mask: Tensor, magnitude: float, score: Tensor | None = None) -> Tensor:
        """Return logits that prefer `mask`, float32 `[blocks, width]`: C = `magnitude` where it
        keeps, 0 elsewhere. If scores `[blocks, M]` are given, see `logits_from_scores`."""
        return (
            mask.float() * magnitude
            if score is None
            else logits_from_scores(mask, magnitude, score)
        )

    def sample(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        return pge.sample(logits, self.n, generator)

    def mode(self, logits: Tensor) -> Tensor:
        return pge.mode(logits, self.n)

    def score(self, logits: Tensor, mask: Tensor) -> Tensor:
        return pge.score(logits, mask, self.n)


class PatternSpace:
    """MaskLLM's space behind the same interface: C(M,N) logits per block, one for each pattern."""

    def __init__(self, n: int, m: int):
        self.n = n
        self.m = m
        self.width = comb(m, n)

    def _index(self, mask: Tensor) -> Tensor:
        # the pattern with the most weights in common
        return (mask.float() @ patterns(self.n, self.m).to(mask.device, torch.float32).T).argmax(1)

    def init(self, mask: Tensor, magnitude: float, score: Tensor | None = None) -> Tensor:
        if score is None:
            zeros = torch.zeros(len(mask), self.width, device=mask.device)
            return zeros.scatter_(1, self._index(mask)[:, None], magnitude)
        return (
            logits_from_scores(mask, magnitude, score)
            @ patterns(self.n, self.m).to(mask.device, torch.float32).T
        )

    def sample(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        return self._patterns(pge.sample(logits, 1, generator))

    def mode(self, logits: Tensor) -> Tensor:
        return self._patterns(pge.mode(logits, 1))

    def _patterns(self, one_hot: Tensor) -> Tensor:
        return patterns(self.n, self.m).to(one_hot.device)[one_hot.int().argmax(1)]

    def score(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the categorical score, one_hot(S) - softmax(logits)."""
        return -torch.softmax(logits, 1).scatter_add(
            1, self._index(mask)[:, None], logits.new_full((len(mask), 1), -1.0)
        )


Space = LinearSpace | PatternSpace
SPACES = {"linear": LinearSpace, "pattern": PatternSpace}
