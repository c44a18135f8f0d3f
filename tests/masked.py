"""Tiny models under masks: made, run, and looked into."""

import json

import pge
from masking.block_bits import mask_to_bits
from masking.masked_model import MaskedModel
from masking.spaces import SPACES
from models.layers import find_layers, weight_matrix
from training.straight_through import StraightThrough

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
TOKENS = torch.arange(40).view(2, 20) % 32


class Stack(nn.Sequential):
    """Layers as a model of their own."""

    def get_input_embeddings(self):
        return nn.Embedding(2, 2)

    def get_output_embeddings(self):
        return None


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planes_of(logits: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """[blocks, M] -> M planes [blocks], each a tensor of its own."""
    return [plane.clone() for plane in logits.to(dtype).unbind(1)]


def random_mask(shape: tuple[int, ...], n: int, m: int, seed: int = 0) -> torch.Tensor:
    """bool, N of every M consecutive ones along the last dimension."""
    noise = torch.rand(*shape[:-1], shape[-1] // m, m, generator=seeded(seed))
    return (noise.argsort(-1).argsort(-1) < n).view(*shape)


def forward(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def inputs_of(model, name, sequences):
    """Those of a layer, [tokens, in]."""
    inputs = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: inputs.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=sequences)
    return inputs[0]


def magnitude_masks(layers, n=2, m=4):
    masks = {}
    for name, module in layers.items():
        weight = weight_matrix(module).float().abs()
        masks[name] = pge.mode(weight.reshape(-1, m), n).view_as(weight)
    return masks


def make(model, n=2, m=4, space="linear", init="mask", magnitude=10.0, seed=0, **kwargs):
    """(MaskedModel under its magnitude masks, those masks, its dense weights [out, in]); init: mask
    or random."""
    layers = find_layers(model)
    dense = {name: weight_matrix(module).clone() for name, module in layers.items()}
    masks = magnitude_masks(layers, n, m)
    masked = MaskedModel(
        model, masks, SPACES[space](n, m), magnitude, seed=seed, **({"backend": "eager"} | kwargs)
    )
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        for layer in masked.layers.values():
            logits = (
                torch.randn(len(layer.bits), masked.space.width, generator=generator) * magnitude
            )
            layer.set_logits(lambda part, logits=logits: logits[part])
            layer.bits.copy_(mask_to_bits(masked.space.mode(logits)))
    return masked, masks, dense


def used_weights(model):
    """One forward; the weights [out, in] its layers multiplied with."""
    used, hooks = {}, []
    for name, module in find_layers(model).items():

        def record(module, inputs, output, name=name):
            used[name] = weight_matrix(module).clone()

        hooks.append(module.register_forward_hook(record))
    forward(model)
    for hook in hooks:
        hook.remove()
    return used


def drawn_masks(masked):
    return masked.masks_of(masked.bits())


def logits_of(layer):
    """[blocks, width], a copy of the planes."""
    return torch.stack(list(layer.logits), 1)


def assert_masked(weight, dense, mask):
    """weight is dense where mask keeps, and +0.0 elsewhere."""
    assert torch.equal(weight, torch.where(mask, dense, torch.zeros_like(dense)))
    assert not torch.signbit(weight[~mask]).any()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def watch(learner):
    """A list that gets, of each gradient consumed: the layer, the gradient, and the logits it is
    about to move."""
    seen, consume = [], learner.consume

    def record(layer, gradient):
        seen.append((layer, gradient.clone(), logits_of(layer).double()))
        consume(layer, gradient)

    learner.consume = record
    return seen


LEARNERS = {"tokens", "checkpointing"}


def learner_of(model, n=2, m=4, space="linear", backend="eager", **kwargs):
    """(StraightThrough, its MaskedModel, the dense weights), the logits' magnitude 1."""
    of_learner = {key: kwargs.pop(key) for key in LEARNERS & kwargs.keys()}
    masked, _, dense = make(model, n, m, space, backend=backend, **({"magnitude": 1.0} | kwargs))
    return StraightThrough(masked, **of_learner), masked, dense


def all_logits(masked):
    return {name: logits_of(layer) for name, layer in masked.layers.items()}


class Launches(TorchDispatchMode):
    """Counts operations, each of which a GPU has launched at least once, and how often a number is
    fetched from the device, for which the host waits for a GPU."""

    operations = waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations += 1
        self.waits += operation in (aten._local_scalar_dense.default, aten.nonzero.default)
        return operation(*args, **kwargs or {})


def patch_file(path, state, pattern="2:4"):
    """A mask.npz as github.com/Paramathic/patch makes it of a sparse model's weights."""
    arrays = {"__meta__": np.array(json.dumps({"pattern": pattern, "base_model": "some/llama"}))}
    for name, weight in state.items():
        if ".layers." in name and weight.dim() == 2:
            arrays[name] = np.packbits((weight != 0).reshape(-1).numpy())
            arrays[f"{name}.__shape__"] = np.array(weight.shape, dtype=np.int64)
    np.savez_compressed(path, **arrays)
    return path
