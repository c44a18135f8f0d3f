"""Llamas with random weights, by shape: these suffice to measure time and memory."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
SHAPES = {
    name: dict(zip(FIELDS, values))
    for name, *values in (
        ("tiny", 64, 128, 1, 4, 4, 256, True),
        ("smollm2-135m", 576, 1536, 30, 9, 3, 49152, True),
        ("llama3.2-1b", 2048, 8192, 16, 32, 8, 128256, True),
        ("llama2-7b", 4096, 11008, 32, 32, 32, 32000, False),
        ("llama2-13b", 5120, 13824, 40, 40, 40, 32000, False),
        ("llama2-70b", 8192, 28672, 80, 64, 8, 32000, False),
        ("llama3.1-405b", 16384, 53248, 126, 128, 8, 128256, False),
    )
}


def random_llama(
    shape: str, device: str, dtype: torch.dtype, seed: int = 0, layers: int | None = None, **config
) -> LlamaForCausalLM:
    """Return a frozen Llama of a named shape with random weights, created directly in its dtype on
    its device. layers: number of decoder layers, None for the shape's; config: further fields of
    LlamaConfig."""
    config = {"max_position_embeddings": 4096, **SHAPES[shape], **config}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**config))
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).eval()
