"""Weights that accelerate keeps in the host's memory and lends to a GPU for each forward pass (--device auto).

Such a module's own weight is on the meta device, and a hook of accelerate holds a map from names to tensors. Pruning
changes those tensors in place. Learning puts there a masked weight that is made on the host, one layer at a time.
"""
import torch
from torch import Tensor, nn


def _hook(module: nn.Module):
    """accelerate's hook that lends this module its weights; None if they are its own."""
    hook = getattr(module, "_hf_hook", None) if module.weight.is_meta else None
    for part in getattr(hook, "hooks", [hook]):  # it may be a sequence of them
        if getattr(part, "offload", False):
            return part
    return None


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight where it is kept."""
    hook = _hook(module)
    return hook.weights_map["weight"] if hook else module.weight.data


def device_of(module: nn.Module) -> torch.device:
    """Where the module is run."""
    hook = _hook(module)
    return torch.device(hook.execution_device) if hook else module.weight.device


def is_on_disk(module: nn.Module) -> bool:
    """Whether the weight is read anew each time, so that what is written to it would be lost."""
    return weight_of(module) is not weight_of(module) if _hook(module) else False


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Have the module use another weight, or, where its own is lent, have that one lent."""
    hook = _hook(module)
    if not hook:
        module.weight = nn.Parameter(weight, requires_grad=False)
        return
    names = [name for name, _ in module.named_parameters(recurse=False)]
    hook.weights_map = {**{name: hook.weights_map[name] for name in names}, "weight": weight}
