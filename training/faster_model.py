"""What of the model itself is made faster where gradients are taken, the function staying the same.

    the norms          RMSNorm is ten passes over the hidden states and fifteen more backward;
                       compiled, one and one
    attention, on CPU  PyTorch's fused kernel for CPUs takes ten times as long backward as forward;
                       for sequences of SHORT tokens and fewer, matrix products are faster and the
                       probabilities no burden

Both round otherwise than the model as it is, so a perplexity of sparsify.py's table differs by
rounding from that of eval.py on the same tokens: with --bos if the tokenizer adds BOS, and
sparsify.py's windows.
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
    """Speed up a model that learns from sequences of so many tokens; returns a function that puts
    everything back. Norms whose weights FSDP gathers, or that are moved to a device and back when
    used, stay as they are."""
    norms = [
        module
        for module in model.modules()
        if "RMSNorm" in type(module).__name__ and "forward" not in vars(module) and not is_sharded
    ]
    for norm in norms:
        norm.forward = partial(kernels.fastest(type(norm).forward), norm)
    # transformers 4.56
    own = attention_of(model.config) if hasattr(model, "set_attn_implementation") else {}
    is_replaced = own.get("") == "sdpa" and tokens <= SHORT and input_device(model).type == "cpu"
    if is_replaced:
        model.set_attn_implementation("eager")

    def restore() -> None:
        for norm in norms:
            del norm.forward
        if is_replaced:
            model.set_attn_implementation(own)

    return restore
