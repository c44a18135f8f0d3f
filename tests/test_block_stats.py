"""masking/block_stats.py, by the definitions."""
import math

import pytest
import torch
from masked import logits_of, make, seeded

from masking.block_stats import block_stats

NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]  # small enough to be looked at whole


@pytest.mark.parametrize("n, m, space", [(2, 4, "linear"), (2, 4, "pattern"), (8, 16, "linear")])
def test_block_stats(load, n, m, space):
    masked, m0, _ = make(load(), n, m, space, magnitude=1.0, learned=NAMES)
    for layer in masked.layers.values():
        for plane in layer.logits[::3]:
            plane.add_(torch.randn(len(plane), generator=seeded(1)))
    found = block_stats(masked)
    logits = torch.cat([logits_of(layer) for layer in masked.layers.values()])
    changed = masked.space.mode(logits) != torch.cat([m0[name].view(-1, m) for name in NAMES])
    assert found["changed"] == pytest.approx(float(changed.any(1).float().mean())) and 0 < found["changed"] < 1
    if m == 4:
        probs = masked.space.pattern_probs(logits.double())
        assert found["entropy"] == pytest.approx(float(-(probs * probs.log()).sum(1).mean()), rel=1e-4)
    assert 0 < found["entropy"] < math.log(math.comb(m, n))
