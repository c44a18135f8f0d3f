"""The plain formulation of a 2:4 mask step, the yardstick: eager softmax, score, `torch.multinomial`, multiply.

Readable and not slowed down: one allocation for each thing that the formulas name, float32 logits `[blocks, 4]`, bool
masks, the masked weight kept beside the dense one. The score is a closed form, without the authors' 1e-8 terms.
"""
from collections import Counter

from common import queued_s

import torch
from torch import Tensor


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """d log p(mask) / d logits, float32 `[blocks, 4]`; logits `[blocks, 4]`, mask bool `[blocks, 4]`.

    u_i = [i in S] (1 + R p_i / q_i^2), q_i = sum_{j != i} p_j, R = 1 / (1/q_a + 1/q_b);  g = u - p sum(u).
    """
    probs = torch.softmax(logits, 1)
    others = probs.sum(1, keepdim=True) - probs
    ratio = 1 / (mask / others).sum(1, keepdim=True)
    u = mask * (1 + ratio * probs / others**2)
    return u - probs * u.sum(1, keepdim=True)


def update(logits: Tensor, mask: Tensor, coefficient: float) -> None:
    """pi <- pi - coefficient * score, in place; both `[blocks, 4]`."""
    logits -= coefficient * score(logits, mask)


def resample(logits: Tensor, mask: Tensor) -> None:
    """mask ~ p(pi), in place; both `[blocks, 4]`."""
    kept = torch.multinomial(torch.softmax(logits, 1), 2)
    mask.zero_().scatter_(1, kept, True)


def apply(weight: Tensor, mask: Tensor, masked: Tensor) -> None:
    """masked <- mask * weight; weight and masked `[out, in]`, mask bool `[blocks, 4]`."""
    torch.mul(weight, mask.view_as(weight), out=masked)


def layer_times(shape: tuple[int, int], dtype: torch.dtype, device: str, repeats: int) -> dict[str, float]:
    """Seconds of update, resample and apply on one layer `[out, in]` whose logits start at C = 10."""
    weight = torch.randn(shape, device=device, dtype=dtype)
    masked = torch.empty_like(weight)
    logits = torch.tensor([10.0, 10, 0, 0], device=device).repeat(weight.numel() // 4, 1)
    mask = logits > 5
    return {"update": queued_s(lambda: update(logits, mask, 0.01), device, repeats),
            "resample": queued_s(lambda: resample(logits, mask), device, repeats),
            "apply": queued_s(lambda: apply(weight, mask, masked), device, repeats)}


def model_times(shapes: list[tuple[int, int]], dtype: torch.dtype, device: str, repeats: int) -> dict[str, float]:
    """`layer_times` over all layers of a model: one of each shape is timed and counted as often as it occurs."""
    total = {"update": 0.0, "resample": 0.0, "apply": 0.0}
    for shape, count in sorted(Counter(shapes).items()):
        for part, seconds in layer_times(shape, dtype, device, repeats).items():
            total[part] += count * seconds
    return total
