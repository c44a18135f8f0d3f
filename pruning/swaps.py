"""Improve a mask by swaps within blocks: a kept and a pruned weight change places if that lowers
the layer's error.

One-shot scores rate each weight alone, but the error of a layer's output also depends on pairs of
weights. With inputs X and Hessian H = X X^T, the error of a row is

    e(m) = 1/2 ||(m*w - w) X||^2 = 1/2 (m*w - w)^T H (m*w - w)

Keeping b instead of a changes it, with g = H (m*w - w), by

    cost(a, b) = -w_a g_a + 1/2 w_a^2 H_aa  +  w_b g_b + 1/2 w_b^2 H_bb  -  w_a w_b H_ab

This is the 1-swap of SparseSwaps (Zimmer et al., arXiv 2512.10922), within N:M blocks. New here:
with --true_sequential each layer is improved on the inputs that the improved earlier layers give
it, and the costs of swaps set the initial logits (`confidence`).

H is estimated from few tokens, its off-diagonal less precisely than its diagonal. So the
off-diagonal is multiplied by 1 - SHRINK.

`refine_by_swaps` is coordinate descent: it visits the blocks and makes in each the swap that lowers
the error most. It ends when no swap lowers it, or after the given number of sweeps. Rows are
independent. The mask stays N:M; weights stay unchanged.
"""

import torch
from torch import Tensor

RUN = 64  # columns, about, after which the gradient of all columns is updated
SHRINK = 0.3  # share that H's off-diagonal loses


def _shrunk(hessian: Tensor) -> Tensor:
    return hessian.lerp(hessian.diagonal().diag(), SHRINK)


def _alone(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the term of one weight in a swap's cost, 1/2 w^2 H_ii; weight `[in, out]`."""
    return 0.5 * weight.square() * hessian.diagonal()[:, None]


def _together(weight: Tensor, kept: Tensor, hessian: Tensor, m: int) -> Tensor:
    """Return the term of a pair in a swap's cost, -w_a w_b H_ab, `[blocks, M, M, out]`; inf if a is
    not kept or b is. weight and kept `[columns, out]`, hessian `[columns, columns]`."""
    weight = weight.unflatten(0, (-1, m))
    kept = kept.unflatten(0, (-1, m))
    blocks = len(weight)
    # only pairs within a block
    hessian = hessian.reshape(blocks, m, blocks, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    costs = -(weight[:, :, None] * weight[:, None] * hessian[..., None])
    return costs.masked_fill_(~kept[:, :, None] | kept[:, None], torch.inf)


def _costs(weight: Tensor, kept: Tensor, gradient: Tensor, hessian: Tensor, m: int) -> Tensor:
    """Return cost(a, b) of each swap within blocks, `[blocks, M, M, out]`; inf if a is not kept or
    b is. weight, kept and gradient (g) `[columns, out]`, hessian `[columns, columns]`."""
    single = _alone(weight, hessian) + torch.where(kept, -weight, weight) * gradient
    single = single.unflatten(0, (-1, m))
    return single[:, :, None] + single[:, None] + _together(weight, kept, hessian, m)


def refine_by_swaps(
    weight: Tensor, mask: Tensor, hessian: Tensor, m: int, sweeps: int = 6
) -> Tensor:
    """Return a mask of lower e(m), bool `[out, in]`, or the same mask if no swap improves it.
    weight and mask `[out, in]`; hessian: float32 `[in, in]`; M divides `in`; sweeps: most sweeps.
    """
    columns = weight.shape[1]
    hessian = _shrunk(hessian)
    # a block's columns lie together
    weight = weight.T.float().contiguous()
    kept = mask.T.contiguous().clone()
    gradient = -(hessian @ weight.masked_fill(kept, 0.0))
    alone = _alone(weight, hessian)
    members = _members(m, weight.device)
    run = max(m, RUN // m * m)
    for _ in range(sweeps):
        swapped = 0
        for start in range(0, columns, run):
            part = slice(start, min(start + run, columns))
            part_gradient = gradient[part].clone()
            part_hessian = hessian[part, part]
            part_kept = kept[part]
            # what flipping a weight adds to m*w
            signed = torch.where(part_kept, -weight[part], weight[part])
            together = _together(weight[part], part_kept, part_hessian, m)
            change = torch.zeros_like(part_gradient)
            for i, pairs in enumerate(together):
                block = slice(i * m, i * m + m)
                cost = alone[part][block] + signed[block] * part_gradient[block]
                cost, pair = (cost[:, None] + cost + pairs).flatten(0, 1).min(0)
                swap = members[:, pair] & (cost < 0)
                torch.mul(signed[block], swap, out=change[block])
                part_kept[block].logical_xor_(swap)
                part_gradient.addmm_(part_hessian[:, block], change[block])
            gradient.addmm_(hessian[:, part], change)
            swapped += change.count_nonzero()
        if not swapped:
            break
    return kept.T.contiguous()


def _members(m: int, device: torch.device) -> Tensor:
    """Return whether each position in a block is in the pair a * M + b, bool `[M, M * M]`."""
    place = torch.arange(m, device=device)[:, None]
    pair = torch.arange(m * m, device=device)
    return (place == pair // m) | (place == pair % m)


def confidence(weight: Tensor, mask: Tensor, hessian: Tensor, m: int) -> Tensor:
    """Return scores that rank the weights of a block by the costs of swaps, float32 `[out, in]`,
    for initializing logits: 1 for the kept weight that is cheapest to swap, more for the other kept
    ones, less for the pruned ones.

    If H is diagonal, cost(a, b) = (s_a^2 - s_b^2) / 2 with Wanda's scores s, so log(s_a / s_b) =
    1/2 log(1 + 2 cost / s_b^2). The right-hand side is taken as the log ratio of the scores for any
    H. If H is diagonal, the result is Wanda's score over that of the cheapest kept weight.
    """
    columns = weight.shape[1]
    hessian = _shrunk(hessian)
    weight = weight.T.float().contiguous()
    kept = mask.T.contiguous()
    gradient = -(hessian @ weight.masked_fill(kept, 0.0))
    scores = torch.empty_like(weight)
    run = max(m, RUN // m * m)
    for start in range(0, columns, run):
        part = slice(start, min(start + run, columns))
        w = weight[part]
        k = kept[part]
        part_hessian = hessian[part, part]
        cost = _costs(w, k, gradient[part], part_hessian, m).clamp(min=0)
        square = (2 * _alone(w, part_hessian)).clamp(min=1e-30).unflatten(0, (-1, 1, m))  # s_b^2
        ratio = 0.5 * torch.log1p(2 * cost / square)  # [blocks, a, b, out]
        dropping = ratio.amin(2)
        adding = ratio.amin(1)
        log_score = torch.where(
            k.unflatten(0, (-1, m)), dropping - dropping.amin(1, keepdim=True), -adding
        )
        scores[part] = log_score.flatten(0, 1).exp()
    return scores.T.contiguous()
