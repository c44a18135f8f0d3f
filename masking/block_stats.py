"""Statistics of a masked model's blocks: how many have changed, how certain their distributions are."""
from math import comb

from masking.masked_model import MaskedModel

import torch

MOST_PROBS = 2**19  # pattern probabilities of a layer at once


def block_stats(masked: MaskedModel) -> dict[str, float]:
    """`changed`, the share of blocks whose most probable mask is not the one they started from, and `entropy` of their
    distributions, nats a block: means over all blocks, from an evenly spaced sample of those of this process's rows."""
    masked.flush()
    changed = entropy = total = 0
    patterns = comb(masked.space.m, masked.space.n)
    for layer in masked.layers.values():
        planes, blocks = [plane[::layer.stride] for plane in layer.logits], layer.shape.numel() // layer.m
        changed += blocks * float((masked.kernels.mode(planes) != layer.start_sample).float().mean())
        every = max(1, -(-len(planes[0]) * patterns // MOST_PROBS))  # fewer blocks of many patterns
        probs = masked.space.pattern_probs(torch.stack([plane[::every] for plane in planes], 1).float())
        entropy += blocks * float(torch.special.entr(probs).sum(1).mean())
        total += blocks
    return {"changed": changed / total, "entropy": entropy / total}
