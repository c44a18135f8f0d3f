"""A model's maskable layers.

Blocks run along the input dimension. nn.Linear stores its weight as `[out, in]`; GPT-2's Conv1D
stores `[in, out]` and is viewed transposed. Masks need only whole-model forwards, so any decoder
works if its projections are such modules.
"""

import re
from contextlib import suppress

from utils import UserError

from torch import Tensor, nn

# names of layers that stay dense: the output head; routers of experts, which are nn.Linear before
# transformers 5; Mamba's dt_proj, whose weight is used without calling the module; encoders of
# images and sound, which text does not reach
DENSE = re.compile(
    r"lm_head|(^|\.)(gate|router|shared_expert_gate|dt_proj)(\.|$)"
    r"|(^|\.)(embed_)?(vision|image|audio|multi_modal)"
)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is stored as `[in, out]`."""
    return type(module).__name__ == "Conv1D"


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a view of the weight as `[out, in]`."""
    weight = module.weight.data
    return weight.T if is_transposed(module) else weight


def find_layers(model: nn.Module, targets: list[str] | None = None) -> dict[str, nn.Module]:
    """Return name -> module of every nn.Linear and Conv1D, in model order, except those that stay
    dense: names that match DENSE, the output head, and a weight shared with the input embedding.

    With `targets`, only layers whose name contains one of them are returned; a target that no name
    contains is searched as a regular expression. Raises UserError if a target matches nothing.
    """
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_transposed(module))
        and module is not head
        and not DENSE.search(name)
        and module.weight is not model.get_input_embeddings().weight
    }
    if targets is None:
        return layers
    chosen = set()
    for target in targets:
        matches = [name for name in layers if target in name]
        if not matches:
            with suppress(re.error):
                matches = [name for name in layers if re.search(target, name)]
        if not matches:
            raise UserError(
                f"--targets {target} matches no layer; names look like "
                f"{', '.join(list(layers)[:3])}"
            )
        chosen.update(matches)
    return {name: module for name, module in layers.items() if name in chosen}


def layers_to_mask(model: nn.Module, targets: list[str] | None, m: int) -> dict[str, nn.Module]:
    """Return the layers of `find_layers`, checked that all can be masked in blocks of M.

    Raises UserError if M does not divide a layer's inputs, if two layers share a weight, if there
    are no layers, and if the model has fused experts but no targets are given: the experts would
    silently stay dense.
    """
    layers = find_layers(model, targets)
    experts = [
        (name, tuple(p.shape))
        for name, p in model.named_parameters()
        if name.removesuffix(".weight") not in layers
        and (
            (p.ndim == 3 and ("expert" in name or "moe" in name))
            or (p.ndim == 2 and ".experts." in name)
        )
    ]
    if experts and targets is None:
        raise UserError(
            f"{experts[0][0]} {list(experts[0][1])} and {len(experts) - 1} more are fused "
            "experts, not nn.Linear, and cannot be masked; name the layers to mask with "
            "--targets, such as --targets self_attn, and the experts stay dense"
        )
    if not layers:
        raise UserError(
            "the model has no nn.Linear or Conv1D layer to mask; give one that is not quantised"
        )
    owners: dict[int, str] = {}
    for name, module in layers.items():
        if (owner := owners.setdefault(id(module.weight), name)) != name:
            raise UserError(
                f"{owner} and {name} share a weight, which cannot have two masks; name other "
                "layers with --targets"
            )
    check_divisible(layers, m)
    return layers


def check_divisible(layers: dict[str, nn.Module], m: int) -> None:
    """Raise UserError unless M divides the in_features of every layer."""
    for name, module in layers.items():
        width = weight_matrix(module).shape[1]
        if width % m:
            raise UserError(
                f"M = {m} does not divide the {width} input features of {name}; choose another "
                "--sparsity_type or leave the layer out with --targets"
            )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the outermost nn.ModuleLists, such as a decoder's layers, in order."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    return [
        layer
        for name, module in lists.items()
        for layer in module
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
