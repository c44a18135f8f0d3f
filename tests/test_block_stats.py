"""masking/block_stats.py, by the definitions."""
import math

import pytest
import torch
from masked import logits_of, make

from masking.block_stats import block_stats


@pytest.mark.parametrize("n, m, space", [(2, 4, "linear"), (2, 4, "pattern"), (8, 16, "linear")])
def test_block_stats(load, n, m, space):
    """Shares and entropies by the definition, on a layer small enough to be looked at whole."""
    masked, m0, _ = make(load(), n, m, space, magnitude=1.0, learned=["model.layers.0.self_attn.k_proj"])
    layer, = masked.layers.values()
    for plane in layer.logits[::3]:
        plane.add_(torch.randn(len(plane), generator=torch.Generator().manual_seed(1)))
    found = block_stats(masked)
    logits, name = logits_of(layer), "model.layers.0.self_attn.k_proj"
    changed = (masked.space.mode(logits) != m0[name].view(-1, m)).any(1).float().mean()
    assert found["changed"][name] == pytest.approx(float(changed)) and 0 < changed < 1
    if m == 4:
        probs = masked.space.pattern_probs(logits.double())
        assert found["entropy"][name] == pytest.approx(float(-(probs * probs.log()).sum(1).mean()), rel=1e-4)
    assert 0 < found["entropy"][name] < math.log(math.comb(m, n)) and found["blocks"][name] == 32 * 64 // m
