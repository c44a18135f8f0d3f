"""Decoders whose code differs much from Llama's: under a mask they are the model with masked
weights, and learn."""

import copy

from masking.layers import apply_masks
from models.layers import find_layers, layers_to_mask

import pytest
import tiny
import torch
from masked import TOKENS, all_logits, forward, learner_of, magnitude_masks


@pytest.mark.parametrize(
    "kind, layers, own",
    [
        ("Bloom", 4, {}),
        ("Cohere", 7, {}),
        ("Falcon", 4, {}),
        ("Gemma2", 7, {"head_dim": 16}),
        ("Mamba", 3, {"state_size": 8}),
        ("Mpt", 4, {"d_model": tiny.HIDDEN, "n_layers": 2, "n_heads": 4}),
        (
            "Gemma3",
            7,
            {
                "text_config": tiny.SIZES | {"head_dim": 16},
                "vision_config": {"num_hidden_layers": 1},
            },
        ),
    ],
)
def test_a_masked_decoder(kind, layers, own):
    model = tiny.random_model(kind, **tiny.SIZES | own)
    assert len(layers_to_mask(model, None, 4)) == 2 * layers
    sparse = copy.deepcopy(model)
    apply_masks(find_layers(sparse), magnitude_masks(find_layers(sparse)))
    learner, masked, _ = learner_of(model, checkpointing=True)
    assert torch.allclose(forward(model), forward(sparse), atol=1e-4)
    before = all_logits(masked)
    for _ in range(2):  # the first measures
        assert learner.step(TOKENS, 0.3).is_finite
    assert not any(torch.equal(logits, before[name]) for name, logits in all_logits(masked).items())
