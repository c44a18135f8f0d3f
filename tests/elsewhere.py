"""A second device, for machines that have no GPU. Its numbers are kept on the CPU, but an operation
on tensors of both devices is an error, as it is on a GPU. tests/test_elsewhere.py starts it, with
command lines of scripts:

    python tests/elsewhere.py "prune.py --device elsewhere ..." "train.py --device both ..."

`both` puts the last decoder layer there and leaves the others on the CPU, as accelerate spreads a
model over two GPUs.
"""

import importlib
import sys

import pytest
import torch
from torch.utils import _device, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
aten = torch.ops.aten
# places may be on the CPU
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor of the device, whose numbers are in `here`."""

    @staticmethod
    def __new__(cls, here):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            here.stride(),
            here.storage_offset(),
            dtype=here.dtype,
            device=f"{NAME}:0",
        )
        tensor.here = here
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))

    def numpy(self):
        raise TypeError("numpy has no tensors of another device: copy it by cpu()")

    # what PyTorch does with the memory itself, where `run` does not see it

    def tolist(self):
        return self.here.tolist()

    def storage(self):
        return self.here.storage()

    def __getitem__(self, key):
        return super().__getitem__(torch.tensor(key) if isinstance(key, list) else key)

    def __setitem__(self, key, value):
        super().__setitem__(torch.tensor(key) if isinstance(key, list) else key, value)


def run(operation, *args, **kwargs):
    """An operation on the numbers; its result is where its tensors are. RuntimeError where they are
    on both devices."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    device = kwargs.get("device")
    is_ours = bool(ours) if device is None else torch.device(device).type == NAME
    if not ours and not is_ours:
        return operation(*args, **kwargs)
    may_mix = operation is aten.copy_.default or (
        operation in INDEXING and isinstance(args[0], Elsewhere)
    )
    if (
        ours
        and not may_mix
        and any(tensor.ndim and not isinstance(tensor, Elsewhere) for tensor in tensors)
    ):
        raise RuntimeError(f"{operation} of tensors of both devices")
    if operation is aten._fused_sdp_choice.default:
        return 0  # attention by products of matrices
    # an operation in place returns one
    known = {id(getattr(tensor, "here", tensor)): tensor for tensor in tensors}
    args, kwargs = tree_map(lambda value: getattr(value, "here", value), (args, kwargs))
    result = operation(*args, **{**kwargs, **({} if device is None else {"device": "cpu"})})

    def placed(value):
        if not (is_ours and isinstance(value, torch.Tensor)):
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(placed, result)


class Everywhere(TorchDispatchMode):
    """Also operations without a tensor, such as torch.zeros, are run by `run`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))


class Backend(backend_registration._DummyBackendModule):
    """What torch asks a device."""

    def get_amp_supported_dtype(self):
        return [torch.float32]


def tensor(data, *, device=None, of=torch.tensor, **settings):
    """torch.tensor, which copies to a device where `run` does not see it."""
    data = tree_map(lambda value: value.item() if isinstance(value, torch.Tensor) else value, data)
    return of(data, **settings, **({} if device is None else {"device": "cpu"})).to(device)


def spread(load):
    """A function that loads a model, with the model's last decoder layer on the device."""

    def place(value, device):
        return tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, value)

    def run(*args, **settings):
        model, tokenizer = load(*args, **settings)
        layer = model.model.layers[-1].to(NAME)
        layer.register_forward_pre_hook(
            lambda _, args, names: place((args, names), NAME), with_kwargs=True
        )
        layer.register_forward_hook(lambda _, args, output: place(output, "cpu"))
        return model, tokenizer

    return run


if __name__ == "__main__":
    _device._device_constructors()  # torch.tensor as it is, before it is another
    torch.tensor = tensor
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    with Everywhere():
        with pytest.raises(RuntimeError, match="of both devices"):
            torch.ones(2, device=NAME) + torch.ones(2)
        for line in sys.argv[1:]:
            script, *flags = line.split()
            module = importlib.import_module(script.removesuffix(".py"))
            load = module.load_model
            if "both" in flags:
                module.load_model = spread(load)
                flags[flags.index("both")] = "cpu"
            module.main(flags)
            module.load_model = load
