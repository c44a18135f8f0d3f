"""Sets of channels that can change places without changing what a decoder computes, and how to
reorder them.

There are three kinds of sets. A set is reordered in every parameter that has its channels as a
dimension:

    residual   the residual stream: embeddings, norms, inputs of q, k, v and the MLP, outputs that
               are added to it
    value      within each KV head: outputs of v, and inputs of o, alike for all query heads of the
               group
    hidden     within each MLP: outputs of the first projections, inputs of the last

No other order matters to an N:M mask. Blocks lie within a head, so the order of heads does not
matter. No weight reads the product of q and k, so the order of their channels does not matter.
LayerNorm and RMSNorm treat all channels alike, and activations act on each channel alone. So the
reordered model computes the same, but for rounding."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from files import permutation_files
from models.layers import is_transposed
from models.loading import model_fingerprint
from utils import UserError

import torch
from torch import Tensor, nn

# The axes of each module's weight, outputs first, even if it is stored as [in, out]. A bias has the
# axis of the outputs.
#     r    residual stream
#     v    values [KV heads, head]
#     o    values, once for each query head
#     h    hidden channels of the MLP
#     hh   hidden channels of gate, then those of up
#     qkv  queries, keys, then values
#     q3   query, key and value of each head
#     -    not reordered
AXES = {
    "- r": "embed_tokens embed_positions embed_in wte wpe q_proj k_proj lm_head embed_out",
    "v r": "v_proj",
    "qkv r": "qkv_proj attn.c_attn",
    "q3 r": "query_key_value",
    "r o": "o_proj out_proj dense attn.c_proj",
    "h r": "gate_proj up_proj fc1 dense_h_to_4h mlp.c_fc",
    "hh r": "gate_up_proj",
    "r h": "down_proj fc2 dense_4h_to_h mlp.c_proj",
    "r": (
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
        "post_feedforward_layernorm norm self_attn_layer_norm final_layernorm final_layer_norm "
        "ln_1 ln_2 ln_f"
    ),
    "-": "q_norm k_norm q_layernorm k_layernorm",
}
ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "granite",
    "phi3",
    "phi",
    "opt",
    "gpt_neox",
    "gpt2",
)
LAYER = re.compile(r"(.+\.(?:layers|h)\.\d+)\.")
KINDS = {
    "r": "residual",
    "v": "value",
    "o": "value",
    "qkv": "value",
    "q3": "value",
    "h": "hidden",
    "hh": "hidden",
}

# set -> int [groups, size]: the channel of its group that comes to each position
Orders = dict[str, Tensor]


@dataclass
class ChannelSet:
    """`groups` groups of `size` channels; each group has its own order. places: parameter -> (its
    dimension with these channels, their positions along it: int64 `[groups, copies, size]`)."""

    groups: int
    size: int
    places: dict[str, tuple[int, Tensor]] = field(default_factory=dict)


def channel_sets(model: nn.Module) -> dict[str, ChannelSet]:
    """Return all sets of channels of this model that can be reordered, by name. Raises UserError if
    the architecture, or one of its parameters, is not in the table."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"the channels of the architecture {kind} cannot be reordered; those of these can: "
            f"{', '.join(ARCHITECTURES)}"
        )
    sets: dict[str, ChannelSet] = {}
    for name, parameter in model.named_parameters():
        for dim, axis in enumerate(_axes(model, name, parameter)):
            if axis != "-":
                places = _places(model.config, axis, parameter.shape[dim])
                key = KINDS[axis] if axis == "r" else f"{LAYER.match(name)[1]}.{KINDS[axis]}"
                channels = sets.setdefault(key, ChannelSet(places.shape[0], places.shape[2]))
                channels.places[name] = dim, places
    return sets


def _axes(model: nn.Module, name: str, parameter: nn.Parameter) -> list[str]:
    """Return the axis of each dimension of a parameter, in the order in which it is stored."""
    module, _, part = name.rpartition(".")
    axes = next(
        (
            axes
            for axes, suffixes in AXES.items()
            if any(f".{module}".endswith(f".{suffix}") for suffix in suffixes.split())
        ),
        "",
    ).split()
    if part == "bias":
        axes = axes[:1]
    if is_transposed(model.get_submodule(module)):
        axes = axes[::-1]
    if parameter.is_meta or part not in ("weight", "bias") or len(axes) != parameter.ndim:
        raise UserError(
            f"the channels of {name} cannot be reordered, or its weights are not loaded; load the "
            "model as it was published, and without --device auto"
        )
    return axes


def _places(config: object, axis: str, length: int) -> Tensor:
    """Return the positions of an axis's channels along a dimension of this length, int64 `[groups,
    copies, size]`."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    positions = torch.arange(length)
    return {
        "r": lambda: positions.view(1, 1, -1),
        "h": lambda: positions.view(1, 1, -1),
        "hh": lambda: positions.view(1, 2, -1),
        "v": lambda: positions.view(groups, 1, head),
        "o": lambda: positions.view(groups, heads // groups, head),
        "qkv": lambda: positions.view(heads + 2 * groups, head)[-groups:, None],
        "q3": lambda: positions.view(heads, 3, head)[:, 2:],
    }[axis]()


@torch.no_grad()
def reorder(model: nn.Module, orders: Orders) -> None:
    """Bring the channels into these orders, in place; sets without an order stay as they are.

    The model's config keeps a digest of the orders, and so do the configs of models that are pruned
    from it. So models in different orders have different fingerprints. Raises UserError if an order
    is not one of this model's channels."""
    sets = channel_sets(model)
    parameters = dict(model.named_parameters())
    for name, order in orders.items():
        if name not in sets or not torch.equal(
            order.sort().values.cpu(), torch.arange(sets[name].size).repeat(sets[name].groups, 1)
        ):
            raise UserError(
                f"the order of {name} is not one of this model's channels; give an order that was "
                "made for this model"
            )
    for name, order in orders.items():
        for parameter, (dim, places) in sets[name].places.items():
            weight = parameters[parameter]
            index = torch.arange(weight.shape[dim])
            index[places.flatten()] = places.gather(
                2, order.long().cpu()[:, None].expand_as(places)
            ).flatten()
            weight.copy_(weight.index_select(dim, index.to(weight.device)))
    model.config.channel_permutation = digest_of(orders)


def digest_of(orders: Orders) -> str:
    """Return 16 hex digits that change with any order."""
    digest = hashlib.sha256()
    for name, order in sorted(orders.items()):
        digest.update(
            f"{name} {tuple(order.shape)}".encode() + order.to(torch.int32).cpu().numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def apply_permutation(model: nn.Module, file: str | Path) -> None:
    """Reorder a model in place by a file that permute.py wrote. Raises UserError if the file is
    damaged or of another model, or if the model was reordered before."""
    orders, name, fingerprint = permutation_files.load(file)
    if fingerprint != model_fingerprint(model):
        raise UserError(
            f"{file} is of another model, or this model was reordered before; give the model that "
            f"the file was made for, {name}"
        )
    reorder(model, orders)
