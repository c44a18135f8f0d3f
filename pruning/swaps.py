"""Better masks for the weights as they are: swaps within blocks, for as long as a layer's output comes closer.

One-shot scores rate each weight alone. What a layer gets wrong also depends on which weights go together: with inputs
X and Hessian H = X X^T, a row's error is

    e(m) = 1/2 ||(m*w - w) X||^2 = 1/2 (m*w - w)^T H (m*w - w)

and keeping b in place of a changes it, with g = H (m*w - w), by

    cost(a, b) = -w_a g_a + 1/2 w_a^2 H_aa  +  w_b g_b + 1/2 w_b^2 H_bb  -  w_a w_b H_ab

This is the 1-swap of SparseSwaps (Zimmer et al., arXiv 2512.10922), within N:M blocks. Of our own: masks are improved
layer after layer on the inputs that the improved ones make, and a swap's cost says how confident its logits start.

H comes from few tokens, which know pairs of inputs less well than single ones: its off-diagonal counts 1 - SHRINK.

`refine_by_swaps` goes through the blocks and makes the swap that lowers the error most, until none does or enough
sweeps are made: coordinate descent, rows independent of one another. N:M stays what it was and no weight changes.
"""
import torch
from torch import Tensor

RUN = 64  # columns, at least, whose changes are carried to the other columns at once
SHRINK = 0.3  # of H's off-diagonal


def _costs(weight: Tensor, kept: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """cost(a, b) `[M, M, rows]` of each swap within a block of M columns, inf where a is not kept or b is. weight, kept
    and gradient (g) `[M, rows]`, hessian `[M, M]`."""
    alone = 0.5 * weight.square() * hessian.diagonal()[:, None]
    linear = weight * gradient
    dropping = (alone - linear).masked_fill(~kept, torch.inf)
    adding = (alone + linear).masked_fill(kept, torch.inf)
    together = weight[:, None] * weight * hessian[:, :, None]
    return dropping[:, None] + adding - together


def _shrunk(hessian: Tensor) -> Tensor:
    return hessian.lerp(hessian.diagonal().diag(), SHRINK)


def refine_by_swaps(weight: Tensor, mask: Tensor, hessian: Tensor, m: int, sweeps: int = 6) -> Tensor:
    """A mask of lower e(m), bool `[out, in]`. weight and mask `[out, in]`, hessian float32 `[in, in]`, M divides `in`;
    a mask that no swap improves comes back as it was."""
    columns, hessian = weight.shape[1], _shrunk(hessian)
    weight, kept = weight.T.float().contiguous(), mask.T.contiguous().clone()  # a block's columns lie together
    gradient = -(hessian @ weight.masked_fill(kept, 0.0))
    run = max(m, RUN // m * m)
    for _ in range(sweeps):
        swapped = 0
        for start in range(0, columns, run):
            part = slice(start, min(start + run, columns))
            near, nearby = gradient[part].clone(), hessian[part, part]
            change = torch.zeros_like(near)
            for i in range(0, len(near), m):
                block = slice(i, i + m)
                w, k = weight[part][block], kept[part][block]
                cost, pair = _costs(w, k, near[block], nearby[block, block]).flatten(0, 1).min(0)
                swap = torch.zeros_like(k)
                for member in (pair // m, pair % m):
                    swap.scatter_(0, member[None], (cost < 0)[None])
                step = torch.where(swap, torch.where(k, -w, w), 0.0)
                k ^= swap
                near.addmm_(nearby[:, block], step)
                change[block] = step
                swapped += swap.sum()
            gradient.addmm_(hessian[:, part], change)
        if not swapped:
            break
    return kept.T.contiguous()


def confidence(weight: Tensor, mask: Tensor, hessian: Tensor, m: int) -> Tensor:
    """How confident the mask is of each weight, float32 `[out, in]`, for `logits_from_scores`: within a block, 1 for
    the kept weight that is the cheapest to swap.

    Were H diagonal, cost(a, b) would be (s_a^2 - s_b^2) / 2 with Wanda's scores s, and log(s_a / s_b) what
    `logits_from_scores` asks for. So a swap counts as the ratio of scores that would make it as costly:
    1/2 log(1 + 2 cost / s_b^2).
    """
    columns, hessian = weight.shape[1], _shrunk(hessian)
    weight, kept = weight.T.float().contiguous(), mask.T.contiguous()
    gradient = -(hessian @ weight.masked_fill(kept, 0.0))
    found = torch.empty_like(weight)
    for start in range(0, columns, m):
        block = slice(start, start + m)
        w, k = weight[block], kept[block]
        alone = w.square() * hessian.diagonal()[block, None]
        cost = _costs(w, k, gradient[block], hessian[block, block]).clamp(min=0)
        ratio = 0.5 * torch.log1p(2 * cost / alone.clamp(min=1e-30))  # [a, b, out]
        dropping, adding = ratio.amin(1), ratio.amin(0)
        found[block] = torch.where(k, dropping - dropping.amin(0), -adding).exp()
    return found.T.contiguous()
