"""Decoders whose code differs much from Llama's: under a mask they are the model with masked weights, and learn."""
import copy

from masking.layers import apply_masks
from models.layers import find_layers, layers_to_mask

import pytest
import tiny
import torch
import transformers
from masked import TOKENS, all_logits, forward, learner_of, magnitude_masks

SIZES = dict(vocab_size=64, hidden_size=tiny.HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, state_size=8, initializer_range=tiny.SPREAD, pad_token_id=0, eos_token_id=2)


@pytest.mark.parametrize("kind, layers, own", [
    ("Bloom", 4, {}), ("Cohere", 7, {}), ("Falcon", 4, {}), ("Gemma2", 7, {"head_dim": 16}), ("Mamba", 3, {}),
    ("Mpt", 4, {"d_model": tiny.HIDDEN, "n_layers": 2, "n_heads": 4})])
def test_a_masked_decoder(kind, layers, own):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | own)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert len(layers_to_mask(model, None, 4)) == 2 * layers
    sparse = copy.deepcopy(model)
    apply_masks(find_layers(sparse), magnitude_masks(find_layers(sparse)))
    learner, masked, _ = learner_of(model, checkpointing=True)
    assert torch.allclose(forward(model), forward(sparse), atol=1e-4)
    before = all_logits(masked)
    for _ in range(2):  # the first measures
        assert learner.step(TOKENS, 0.3).is_finite
    assert not any(torch.equal(logits, before[name]) for name, logits in all_logits(masked).items())
