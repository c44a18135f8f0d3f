"""training/faster_model.py: the same function and the same gradients, and the model as it was afterwards."""
import pytest
import tiny
import torch
import transformers
from masked import TOKENS

from masking.kernels import Kernels
from masking.spaces import LinearSpace
from training.faster_model import SHORT, speed_up

NORMED = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "gemma": lambda: transformers.GemmaConfig(num_key_value_heads=2, head_dim=16, **SIZES),
    "qwen3": lambda: transformers.Qwen3Config(num_key_value_heads=2, head_dim=16, **SIZES),  # norms of heads, too
}
SIZES = dict(vocab_size=64, hidden_size=tiny.HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             initializer_range=tiny.SPREAD, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def model_of(kind):
    if kind == "qwen3" and not hasattr(transformers, "Qwen3Config"):
        pytest.skip("Qwen3 came with transformers 4.51")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(NORMED[kind]()).eval().requires_grad_(False)


def run(model):
    """The logits, and the gradient of their squares in the embedded tokens."""
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("kind", NORMED)
def test_logits_and_gradients_are_the_models_own(kind):
    model = model_of(kind)
    logits, gradient = run(model)
    attention = model.config._attn_implementation
    restore = speed_up(model, Kernels(LinearSpace(2, 4)), TOKENS.shape[1])
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) >= 5 and all("forward" in vars(norm) for norm in norms)
    if hasattr(model, "set_attn_implementation"):
        assert (attention, model.config._attn_implementation) == ("sdpa", "eager")
    for _ in range(2):
        faster_logits, faster_gradient = run(model)
        torch.testing.assert_close(faster_logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(faster_gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    restore()
    assert not any("forward" in vars(norm) for norm in norms) and model.config._attn_implementation == attention
    assert torch.equal(run(model)[0], logits)


def test_norms_run_compiled(monkeypatch):
    seen, kernels, model = [], Kernels(LinearSpace(2, 4)), model_of("llama")
    monkeypatch.setattr(kernels, "fastest", lambda function: seen.append(function) or function)
    speed_up(model, kernels, TOKENS.shape[1])
    assert set(seen) == {type(model.model.norm).forward} and len(seen) == 5


def test_what_is_not_the_models_own_stays():
    """Long sequences keep their fused attention, and a norm that an offloading hook moves keeps that hook."""
    model = model_of("llama")
    moved = model.model.norm
    moved.forward = hooked = moved.forward
    speed_up(model, Kernels(LinearSpace(2, 4), "eager"), SHORT + 1)
    assert model.config._attn_implementation == "sdpa"
    assert vars(moved)["forward"] is hooked and "forward" in vars(model.model.layers[0].input_layernorm)
