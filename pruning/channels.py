"""Channels of a decoder that can change places without changing what it computes, and reordering them for good.

Three kinds of sets, each reordered in every parameter that names its channels:

    residual   the residual stream: embeddings, norms, inputs of q, k, v and the MLP, outputs that are added to it
    value      within each KV head, what v computes and, for all query heads of the group, o reads
    hidden     what an MLP computes between its two or three projections

Nothing else decides which weights share a block of an input dimension: blocks lie within a head, so that the order of
heads is of no account, and q and k meet in a dot product that no weight reads. LayerNorm and RMSNorm treat all channels
alike, and activations act on each alone. So the function stays what it was, to the rounding of sums in another order.
"""
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

import torch
from torch import Tensor, nn

from files import permutation_files
from models.loading import model_fingerprint

# What the dimensions of each module's weight are, outputs first whatever way they are stored; a bias is an output.
#   r  residual stream          v    values [KV heads, head]                   h   hidden channels of the MLP
#   -  stays as it is           o    the same for all query heads              hh  gate's and then up's
#                               qkv  queries, keys, and values at the end      q3  each head's query, key and value
LLAMA = {"embed_tokens": "- r", "q_proj": "- r", "k_proj": "- r", "v_proj": "v r", "o_proj": "r o",
         "q_norm": "-", "k_norm": "-", "gate_proj": "h r", "up_proj": "h r", "down_proj": "r h",
         "input_layernorm": "r", "post_attention_layernorm": "r", "pre_feedforward_layernorm": "r",
         "post_feedforward_layernorm": "r", "norm": "r", "lm_head": "- r"}
PHI3 = {"embed_tokens": "- r", "qkv_proj": "qkv r", "o_proj": "r o", "gate_up_proj": "hh r", "down_proj": "r h",
        "input_layernorm": "r", "post_attention_layernorm": "r", "norm": "r", "lm_head": "- r"}
PHI = {"embed_tokens": "- r", "q_proj": "- r", "k_proj": "- r", "v_proj": "v r", "dense": "r o", "q_layernorm": "-",
       "k_layernorm": "-", "fc1": "h r", "fc2": "r h", "input_layernorm": "r", "final_layernorm": "r", "lm_head": "- r"}
OPT = {"embed_tokens": "- r", "embed_positions": "- r", "q_proj": "- r", "k_proj": "- r", "v_proj": "v r",
       "out_proj": "r o", "self_attn_layer_norm": "r", "fc1": "h r", "fc2": "r h", "final_layer_norm": "r",
       "lm_head": "- r"}
GPT_NEOX = {"embed_in": "- r", "query_key_value": "q3 r", "dense": "r o", "dense_h_to_4h": "h r",
            "dense_4h_to_h": "r h", "input_layernorm": "r", "post_attention_layernorm": "r", "final_layer_norm": "r",
            "embed_out": "- r", "lm_head": "- r"}
GPT2 = {"wte": "- r", "wpe": "- r", "ln_1": "r", "attn.c_attn": "qkv r", "attn.c_proj": "r o", "ln_2": "r",
        "mlp.c_fc": "h r", "mlp.c_proj": "r h", "ln_f": "r", "lm_head": "- r"}
ARCHITECTURES = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2",
                                  "smollm3", "granite"), LLAMA),
                 "phi3": PHI3, "phi": PHI, "opt": OPT, "gpt_neox": GPT_NEOX, "gpt2": GPT2}
LAYER = re.compile(r"(.+\.(?:layers|h)\.\d+)\.")
KINDS = {"r": "residual", "v": "value", "o": "value", "qkv": "value", "q3": "value", "h": "hidden", "hh": "hidden"}

Orders = dict[str, Tensor]  # set -> int [groups, size]: which channel of its group comes to each place


@dataclass
class ChannelSet:
    """`groups` times `size` channels, each group in an order of its own. places: parameter -> (the dimension that these
    channels are, where they lie along it: int64 `[groups, copies, size]`)."""
    groups: int
    size: int
    places: dict[str, tuple[int, Tensor]] = field(default_factory=dict)


def channel_sets(model: nn.Module) -> dict[str, ChannelSet]:
    """Name -> set of channels that can change places, all of this model's; UserError naming an architecture, or a
    parameter of it, of which that is not known."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(f"how the channels of the architecture {kind} can be reordered is not known; it is for "
                        f"{', '.join(ARCHITECTURES)}")
    if getattr(model.config, "word_embed_proj_dim", model.config.hidden_size) != model.config.hidden_size:
        raise UserError(f"this {kind} has embeddings of another width than its residual stream, which cannot be "
                        "reordered here; use the model as it is")
    sets: dict[str, ChannelSet] = {}
    for name, parameter in model.named_parameters():
        module, _, part = name.rpartition(".")
        owner = model.get_submodule(module)
        axes = next((axes for known, axes in ARCHITECTURES[kind].items() if f".{module}".endswith(f".{known}")), "")
        axes = axes.split()
        if part == "bias" and len(axes) == 2:
            axes = axes[:1]
        if type(owner).__name__ == "Conv1D":  # kept as [in, out]
            axes = axes[::-1]
        if parameter.is_meta or part not in ("weight", "bias") or len(axes) != parameter.ndim:
            raise UserError(f"how the channels of {name} can be reordered is not known, or its weights are not here; "
                            "load the model as it was published, and without --device auto")
        for dim, axis in enumerate(axes):
            if axis != "-":
                _add(sets, model.config, name, dim, axis, parameter.shape[dim])
    return sets


def _add(sets: dict[str, ChannelSet], config: object, name: str, dim: int, axis: str, length: int) -> None:
    """Enter a dimension of a parameter where its channels belong."""
    places = _places(config, axis, length, name)
    layer = LAYER.match(name)
    key = KINDS[axis] if axis == "r" else f"{layer[1]}.{KINDS[axis]}"
    found = sets.setdefault(key, ChannelSet(places.shape[0], places.shape[2]))
    if (found.groups, found.size) != (places.shape[0], places.shape[2]):
        raise UserError(f"the channels of {name} are not those that config.json tells of: restore the model's folder")
    found.places[name] = dim, places


def _places(config: object, axis: str, length: int, name: str) -> Tensor:
    """Where the channels of an axis lie along a dimension of this length, int64 `[groups, copies, size]`."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    along = torch.arange(length)
    try:
        return {"r": lambda: along.view(1, 1, config.hidden_size), "h": lambda: along.view(1, 1, -1),
                "hh": lambda: along.view(1, 2, -1), "v": lambda: along.view(groups, 1, head),
                "o": lambda: along.view(groups, heads // groups, head),
                "qkv": lambda: along.view(heads + 2 * groups, head)[-groups:, None],
                "q3": lambda: along.view(heads, 3, head)[:, 2:]}[axis]()
    except RuntimeError:
        raise UserError(f"{name} has {length} channels, which is not what config.json tells of: restore the model's "
                        "folder")


def reorder(model: nn.Module, orders: Orders) -> None:
    """Bring the channels into these orders, in place; sets without an order stay as they are. The model's config keeps
    the name of the orders, so that its fingerprint, and that of what is pruned from it, differs from other orders'."""
    sets, parameters = channel_sets(model), dict(model.named_parameters())
    for name, order in orders.items():
        for parameter, (dim, places) in sets[name].places.items():
            weight = parameters[parameter].data
            index = torch.arange(weight.shape[dim])
            index[places.flatten()] = places.gather(2, order.long().cpu()[:, None].expand_as(places)).flatten()
            weight.copy_(weight.index_select(dim, index.to(weight.device)))
    model.config.channel_permutation = name_of(orders)


def name_of(orders: Orders) -> str:
    """16 hex digits."""
    digest = hashlib.sha256()
    for name, order in sorted(orders.items()):
        digest.update(f"{name} {tuple(order.shape)}".encode() + order.to(torch.int32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def apply_permutation(model: nn.Module, file: str | Path) -> nn.Module:
    """The model itself, its channels brought into the order of a file that permute.py wrote, in place.

    UserError for a file that is damaged or of another model, or a model whose channels are in another order already.
    """
    shapes = {name: (found.groups, found.size) for name, found in channel_sets(model).items()}
    found = permutation_files.load(file, shapes)
    if found.model_fingerprint != model_fingerprint(model):
        raise UserError(f"{file} is of another model than this one, or its channels are reordered already: it was made "
                        f"from {found.model}; give that one as --model")
    reorder(model, found.orders)
    if found.permuted_fingerprint != model_fingerprint(model):
        raise UserError(f"{file} is damaged or of another model: the reordered model is not the one it was made for")
    return model
