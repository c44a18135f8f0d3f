"""Faster norms and attention of the model for backward passes; the function that it computes stays
the same.

    the norms          RMSNorm makes ten passes over the hidden states forward and fifteen
                       backward; compiled, it makes one of each
    attention, on CPU  PyTorch's fused kernel for CPUs takes ten times as long backward as forward;
                       for sequences of at most SHORT tokens, matrix products are faster, and the
                       memory of the attention probabilities does not matter

Both round differently from the unchanged model. So a perplexity in sparsify.py's table differs by
rounding from that of eval.py on the same tokens (sparsify.py's windows, and --bos if the tokenizer
adds BOS).
"""

from collections.abc import Callable
from functools import partial

from masking.kernels import Kernels
from models.loading import attention_of, input_device

from torch import nn

SHORT = 256


def speed_up(
    model: nn.Module, kernels: Kernels, tokens: int, is_sharded: bool = False
) -> Callable[[], None]:
    """Speed up a model that learns from sequences of `tokens` tokens; return a function that undoes
    it. Norms stay as they are if FSDP gathers their weights, or if hooks move them to a device when
    used."""
    norms = [
        module
        for module in model.modules()
        if "RMSNorm" in type(module).__name__ and "forward" not in vars(module) and not is_sharded
    ]
    for norm in norms:
        norm.forward = partial(kernels.fastest(type(norm).forward), norm)
    # from transformers 4.56 on
    original = attention_of(model.config) if hasattr(model, "set_attn_implementation") else {}
    is_replaced = (
        original.get("") == "sdpa" and tokens <= SHORT and input_device(model).type == "cpu"
    )
    if is_replaced:
        model.set_attn_implementation("eager")

    def restore() -> None:
        for norm in norms:
            del norm.forward
        if is_replaced:
            model.set_attn_implementation(original)

    return restore
