"""Better masks for the weights as they are: exchanges within blocks, for as long as a layer's output comes closer.

One-shot scores judge each weight alone. What a layer gets wrong also depends on which weights go together: with inputs
X and Hessian H = X X^T, a row's error is

    e(m) = 1/2 ||(m*w - w) X||^2 = 1/2 (m*w - w)^T H (m*w - w)

and keeping b in place of a changes it, with g = H (m*w - w), by

    cost(a, b) = -w_a g_a + 1/2 w_a^2 H_aa  +  w_b g_b + 1/2 w_b^2 H_bb  -  w_a w_b H_ab

This is the 1-swap of SparseSwaps (Zimmer et al., arXiv 2512.10922), within N:M blocks. Of our own: masks are bettered
layer after layer on the inputs that the better ones make, and an exchange's cost says how sure its logits start.

H comes from few tokens, which know pairs of inputs less well than single ones: its off-diagonal counts 1 - SHRINK.

`improve` goes through the blocks and makes the exchange that lowers the error most, until none does or enough sweeps
are made: coordinate descent, rows independent of one another. N:M stays what it was and no weight changes.
"""
import torch
from torch import Tensor

from importance import Hessians, reach_in_order

RUN = 64  # columns, at least, whose changes are carried to the other columns at once
SHRINK = 0.3  # of H's off-diagonal
TOKENS = 30_000  # of text, at most, that `settle` measures the layers' inputs on


def _costs(weight: Tensor, kept: Tensor, slope: Tensor, hessian: Tensor) -> Tensor:
    """cost(a, b) `[M, M, rows]` of each exchange within a block of M columns, inf where a is not kept or b is. weight,
    kept and slope (g) `[M, rows]`, hessian `[M, M]`."""
    alone = 0.5 * weight.square() * hessian.diagonal()[:, None]
    linear = weight * slope
    dropping = (alone - linear).masked_fill(~kept, torch.inf)
    adding = (alone + linear).masked_fill(kept, torch.inf)
    together = weight[:, None] * weight * hessian[:, :, None]
    return dropping[:, None] + adding - together


def _shrunk(hessian: Tensor) -> Tensor:
    return hessian.lerp(hessian.diagonal().diag(), SHRINK)


def improve(weight: Tensor, mask: Tensor, hessian: Tensor, m: int, sweeps: int = 6) -> Tensor:
    """A mask of lower e(m), bool `[out, in]`. weight and mask `[out, in]`, hessian float32 `[in, in]`, M divides `in`;
    a mask that no exchange betters comes back as it was."""
    columns, hessian = weight.shape[1], _shrunk(hessian)
    weight, kept = weight.T.float().contiguous(), mask.T.contiguous().clone()  # a block's columns lie together
    slope = -(hessian @ weight.masked_fill(kept, 0.0))
    run = max(m, RUN // m * m)
    for _ in range(sweeps):
        exchanged = 0
        for start in range(0, columns, run):
            part = slice(start, min(start + run, columns))
            near, nearby = slope[part].clone(), hessian[part, part]
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
                exchanged += swap.sum()
            slope.addmm_(hessian[:, part], change)
        if not exchanged:
            break
    return kept.T.contiguous()


def scores(weight: Tensor, mask: Tensor, hessian: Tensor, m: int) -> Tensor:
    """How sure the mask is of each weight, float32 `[out, in]`, for `pge.graded`: within a block, 1 for the kept weight
    that is the cheapest to exchange.

    Were H diagonal, cost(a, b) would be (s_a^2 - s_b^2) / 2 with Wanda's scores s, and log(s_a / s_b) what `graded`
    asks for. So an exchange counts as the ratio of scores that would make it as dear: 1/2 log(1 + 2 cost / s_b^2).
    """
    columns, hessian = weight.shape[1], _shrunk(hessian)
    weight, kept = weight.T.float().contiguous(), mask.T.contiguous()
    slope = -(hessian @ weight.masked_fill(kept, 0.0))
    found = torch.empty_like(weight)
    for start in range(0, columns, m):
        block = slice(start, start + m)
        w, k = weight[block], kept[block]
        alone = w.square() * hessian.diagonal()[block, None]
        cost = _costs(w, k, slope[block], hessian[block, block]).clamp(min=0)
        ratio = 0.5 * torch.log1p(2 * cost / alone.clamp(min=1e-30))  # [a, b, out]
        dropping, adding = ratio.amin(1), ratio.amin(0)
        found[block] = torch.where(k, dropping - dropping.amin(0), -adding).exp()
    return found.T.contiguous()


def settle(masked, samples: Tensor, magnitude: float, sweeps: int = 6) -> None:
    """Have a MaskedModel start from better masks, and from logits as sure of them as exchanges are dear (`scores`).

    One pass of the samples, int64 `[rows, tokens]`, the first TOKENS of them, through the decoder without its head; a
    layer is settled when the pass reaches it, so that it sees what the better masks before it make of its inputs. One
    Hessian is kept at a time.
    """
    samples, hessians = samples[:-(-TOKENS // samples.shape[1])], Hessians()

    def settle_layer(name, inputs):
        layer = masked.layers[name]
        m, hessian = layer.m, hessians.of(inputs).to(layer.weight.device)
        mask = improve(layer.weight, layer.mask_of(layer.bits), hessian, m, sweeps)
        score = scores(layer.weight, mask, hessian, m)
        masked.begin_at(layer, mask.view(-1, m), magnitude, score.view(-1, m))
    modules = {name: layer.module for name, layer in masked.layers.items()}
    reach_in_order(masked.model, modules, samples, settle_layer, "exchanging")
