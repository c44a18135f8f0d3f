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


def _shrunk(hessian: Tensor) -> Tensor:
    return hessian.lerp(hessian.diagonal().diag(), SHRINK)


def _alone(weight: Tensor, hessian: Tensor) -> Tensor:
    """The curvature's part of what a weight costs or saves by itself, 1/2 w^2 H_ii; weight `[in, out]`."""
    return 0.5 * weight.square() * hessian.diagonal()[:, None]


def _together(weight: Tensor, kept: Tensor, hessian: Tensor, m: int) -> Tensor:
    """What each pair's cost has beside those of its two weights, -w_a w_b H_ab, inf where a is not kept or b is;
    `[blocks, M, M, out]` of weight and kept `[columns, out]`, hessian `[columns, columns]`."""
    weight, kept = weight.unflatten(0, (-1, m)), kept.unflatten(0, (-1, m))
    blocks = len(weight)
    hessian = hessian.reshape(blocks, m, blocks, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # of each block alone
    costs = -(weight[:, :, None] * weight[:, None] * hessian[..., None])
    return costs.masked_fill_(~kept[:, :, None] | kept[:, None], torch.inf)


def _costs(weight: Tensor, kept: Tensor, gradient: Tensor, hessian: Tensor, m: int) -> Tensor:
    """cost(a, b) `[blocks, M, M, out]` of each swap within blocks, inf where a is not kept or b is. weight, kept and
    gradient (g) `[columns, out]`, hessian `[columns, columns]`."""
    own = _alone(weight, hessian) + torch.where(kept, -weight, weight) * gradient
    own = own.unflatten(0, (-1, m))
    return own[:, :, None] + own[:, None] + _together(weight, kept, hessian, m)


def refine_by_swaps(weight: Tensor, mask: Tensor, hessian: Tensor, m: int, sweeps: int = 6) -> Tensor:
    """A mask of lower e(m), bool `[out, in]`. weight and mask `[out, in]`, hessian float32 `[in, in]`, M divides `in`;
    a mask that no swap improves comes back as it was."""
    columns, hessian = weight.shape[1], _shrunk(hessian)
    weight, kept = weight.T.float().contiguous(), mask.T.contiguous().clone()  # a block's columns lie together
    gradient = -(hessian @ weight.masked_fill(kept, 0.0))
    alone, members = _alone(weight, hessian), _members(m, weight.device)
    run = max(m, RUN // m * m)
    for _ in range(sweeps):
        swapped = 0
        for start in range(0, columns, run):
            part = slice(start, min(start + run, columns))
            near, nearby, flipped = gradient[part].clone(), hessian[part, part], kept[part]
            signed = torch.where(flipped, -weight[part], weight[part])  # what flipping a weight adds to m*w
            together, change = _together(weight[part], flipped, nearby, m), torch.zeros_like(near)
            for i, pairs in enumerate(together):
                block = slice(i * m, i * m + m)
                cost = alone[part][block] + signed[block] * near[block]
                cost, pair = (cost[:, None] + cost + pairs).flatten(0, 1).min(0)
                swap = members[:, pair] & (cost < 0)
                torch.mul(signed[block], swap, out=change[block])
                flipped[block].logical_xor_(swap)
                near.addmm_(nearby[:, block], change[block])
            gradient.addmm_(hessian[:, part], change)
            swapped += change.count_nonzero()
        if not swapped:
            break
    return kept.T.contiguous()


def _members(m: int, device: torch.device) -> Tensor:
    """Whether a place of a block is in the pair a * M + b, bool `[M, M * M]`."""
    place, pair = torch.arange(m, device=device)[:, None], torch.arange(m * m, device=device)
    return (place == pair // m) | (place == pair % m)


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
    found, run = torch.empty_like(weight), max(m, RUN // m * m)
    for start in range(0, columns, run):
        part = slice(start, min(start + run, columns))
        w, k, nearby = weight[part], kept[part], hessian[part, part]
        cost = _costs(w, k, gradient[part], nearby, m).clamp(min=0)
        square = (2 * _alone(w, nearby)).clamp(min=1e-30).unflatten(0, (-1, 1, m))  # s_b^2
        ratio = 0.5 * torch.log1p(2 * cost / square)  # [blocks, a, b, out]
        dropping, adding = ratio.amin(2), ratio.amin(1)
        best = torch.where(k.unflatten(0, (-1, m)), dropping - dropping.amin(1, keepdim=True), -adding)
        found[part] = best.flatten(0, 1).exp()
    return found.T.contiguous()
