"""Statistics of a masked model's blocks: how many have changed, how certain their distributions are."""
from math import comb

import torch

from masking.masked_model import MaskedModel

MOST_PROBS = 2**19  # pattern probabilities of a layer at once


def block_stats(masked: MaskedModel) -> dict[str, dict[str, float]]:
    """By layer name: `changed`, the share of blocks whose most probable mask is not the one they started from;
    `entropy` of their distributions, nats a block; `blocks`. From a sample of the blocks of this process's rows, evenly
    spaced."""
    masked.flush()
    stats = {"changed": {}, "entropy": {}, "blocks": {}}
    patterns = comb(masked.space.m, masked.space.n)
    for name, layer in masked.layers.items():
        planes = [plane[::layer.stride] for plane in layer.logits]
        stats["changed"][name] = float((masked.kernels.mode(planes) != layer.start_sample).float().mean())
        every = max(1, -(-len(planes[0]) * patterns // MOST_PROBS))  # fewer blocks of many patterns
        probs = masked.space.pattern_probs(torch.stack([plane[::every] for plane in planes], 1).float())
        stats["entropy"][name] = float(torch.special.entr(probs).sum(1).mean())
        stats["blocks"][name] = layer.shape.numel() // layer.m
    return stats
