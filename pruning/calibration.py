"""Statistics of layers' inputs on calibration text: norms, Hessians, and a pass that visits the
layers in order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from models.layers import weight_matrix
from models.loading import input_device
from utils import UserError, progress_bar

import torch
from torch import Tensor, nn


def check_finite(inputs: Tensor, name: str, model: nn.Module) -> None:
    """Raise UserError, with the layer's name, unless its inputs are finite."""
    # aminmax needs no memory of the inputs' size
    if inputs.numel() and not all(edge.isfinite() for edge in inputs.aminmax()):
        raise UserError(
            f"the inputs of {name} are not finite; {model.dtype} may overflow here: try --dtype "
            "bfloat16 or float32"
        )


@contextmanager
def watching(layers: dict[str, nn.Module], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `watch(name, inputs)` each time before a layer computes, within the context."""
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: watch(name, inputs[0]))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def input_norms(
    model: nn.Module, layers: dict[str, nn.Module], samples: Tensor
) -> dict[str, Tensor]:
    """Return ||x_j|| of each layer's input features over all tokens: layer name -> float32 `[in]`.
    samples: int64 `[sequences, tokens]`. Raises UserError if inputs are not finite."""
    squares = {
        name: torch.zeros(weight_matrix(module).shape[1], device=weight_matrix(module).device)
        for name, module in layers.items()
    }

    def add(name: str, inputs: Tensor) -> None:
        squares[name] += inputs.float().flatten(0, -2).square().sum(0).to(squares[name].device)

    with watching(layers, add):
        for sequence in progress_bar(samples, desc="calibrating", unit="sequence"):
            model.base_model(input_ids=sequence[None].to(input_device(model)), use_cache=False)
    for name, square in squares.items():
        check_finite(square, name, model)
    return {name: square.sqrt() for name, square in squares.items()}


@torch.no_grad()
def for_each_layer(
    model: nn.Module,
    layers: dict[str, nn.Module],
    samples: Tensor,
    visit: Callable[[str, Tensor], None],
    label: str,
) -> None:
    """Run all samples, int64 `[sequences, tokens]`, through the decoder without its head, in one
    pass. `visit(name, inputs)` is called once for each layer, before it computes. label: text of
    the progress bar. Raises UserError if inputs are not finite."""
    visited = set()

    def visit_once(name: str, inputs: Tensor) -> None:
        if name not in visited:
            check_finite(inputs, name, model)
            visit(name, inputs)
            visited.add(name)
            progress.update()

    with (
        progress_bar(total=len(layers), desc=label, unit="layer") as progress,
        watching(layers, visit_once),
    ):
        model.base_model(input_ids=samples.to(input_device(model)), use_cache=False)


def hessian_of(inputs: Tensor) -> Tensor:
    """Return H = X X^T of inputs `[..., in]`, float32 `[in, in]`."""
    return sum((wide := part.float()).T @ wide for part in inputs.flatten(0, -2).split(8192))
