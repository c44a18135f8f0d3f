"""What one-shot pruning goes by: a score for each weight, and the norms of the inputs that it takes."""
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from layers import weight_matrix
from utils import UserError, input_device


def check_finite(inputs: Tensor, name: str, model) -> None:
    """UserError naming the layer unless its inputs are finite."""
    if not inputs.isfinite().all():
        raise UserError(f"the inputs of {name} are not finite; {model.dtype} may overflow here: try --dtype bfloat16 "
                        "or float32")


@contextmanager
def watching(layers: dict, watch):
    """Inside, `watch(name, inputs)` is called each time that a layer is about to compute."""
    hooks = [module.register_forward_pre_hook(lambda module, inputs, name=name: watch(name, inputs[0]))
             for name, module in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def input_norms(model, layers: dict, samples: Tensor) -> dict[str, Tensor]:
    """||x_j|| of every layer's input features over the tokens of samples `[rows, tokens]`; float32 `[in]` each.
    UserError where they are not finite."""
    squares = {name: torch.zeros(weight_matrix(module).shape[1], device=weight_matrix(module).device)
               for name, module in layers.items()}

    def add(name, inputs):
        squares[name] += inputs.float().flatten(0, -2).square().sum(0).to(squares[name].device)
    with watching(layers, add):
        for row in tqdm(samples, desc="calibrating", unit="row", disable=None):
            model(input_ids=row[None].to(input_device(model)), use_cache=False)
    for name, square in squares.items():
        check_finite(square, name, model)
    return {name: square.sqrt() for name, square in squares.items()}


@torch.no_grad()
def reach_in_order(model, layers: dict, samples: Tensor, reach, doing: str) -> None:
    """One pass of samples, int64 `[rows, tokens]`, through the decoder without its head: `reach(name, inputs)` is
    called when the pass first gets to a layer, before that computes. `doing`: for the progress bar. UserError where
    inputs are not finite."""
    reached = set()

    def reach_once(name, inputs):
        if name not in reached:
            check_finite(inputs, name, model)
            reach(name, inputs)
            reached.add(name)
            progress.update()
    with tqdm(total=len(layers), desc=doing, unit="layer", disable=None) as progress, watching(layers, reach_once):
        model.base_model(input_ids=samples.to(input_device(model)), use_cache=False)


class Hessians:
    """H = X X^T, float32 `[in, in]`, of one layer's inputs after another: layers that read the same tensor, as q, k and
    v do, share it."""

    def __init__(self):
        self.inputs, self.hessian = None, None

    def of(self, inputs: Tensor) -> Tensor:
        if inputs is not self.inputs:
            parts = inputs.flatten(0, -2).split(8192)
            self.inputs, self.hessian = inputs, sum(part.float().T @ part.float() for part in parts)
        return self.hessian


def magnitude(weight: Tensor, norms: Tensor | None) -> Tensor:
    return weight.abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    return weight.abs() * norms


def ria(weight: Tensor, norms: Tensor) -> Tensor:
    size = weight.abs()
    relative = size / size.sum(0, keepdim=True).clamp(min=1e-30) + size / size.sum(1, keepdim=True).clamp(min=1e-30)
    return relative * norms.sqrt()


METRICS = {"magnitude": magnitude, "wanda": wanda, "ria": ria}
