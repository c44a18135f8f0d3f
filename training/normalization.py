"""A step moves a logit by its size times J^T G / max(rms, FLOOR layer's rms), and by 0.3 at most.

rms is the root mean square of the block's J^T G, layer's rms that of all blocks of the layer; both
are from running means over minibatches. So a step is a distance in logits, whatever the model's
size and the loss's scale.

J^T G has heavy tails: in all models a few weights that matter enormously make most of a layer's
mean square. Divided by its block's rms, a logit moves as far as its gradients agree over
minibatches, however much the weight matters. Only blocks far below their layer, whose gradients are
mostly noise, move less. The limit matters in short runs, whose steps are large: there a gradient
that grows at once, as the masks around it change, would make its block jump. The blocks' means take
two bytes per block.
"""

from collections.abc import Callable

from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from models import processes
from utils import UserError

import torch
from torch import Tensor

FLOOR = 0.1  # of the layer's root mean square
DECAY = 0.9  # of the layers' running mean, per minibatch


class Normalization:
    """The running mean squares: of earlier minibatches per layer, and of all up to the present one
    per block. Nothing moves in the first minibatch, which is only measured.

    not_finite: number of blocks whose J^T G was not finite in the last backward pass, int64 `[]`.
    """

    def __init__(self, masked: MaskedModel):
        self.masked = masked
        layers = list(masked.layers.values())
        device = layers[0].weight.device
        self.index = {layer.name: index for index, layer in enumerate(layers)}
        # of J^T G per layer; NaN: not measured yet
        self.mean_squares = torch.full((len(layers),), torch.nan, device=device)
        # of J^T G per block, by layer; negative: not measured yet
        self.of_blocks = {
            layer.name: torch.full_like(layer.bits, -1, dtype=torch.bfloat16) for layer in layers
        }
        self._sizes = torch.tensor([float(layer.shape.numel()) for layer in layers], device=device)

    def begin_pass(self, size: float, temperature: float = 1.0) -> None:
        """Prepare a backward pass whose step is `size`, J at logits / temperature."""
        means = self.mean_squares
        factors = (means.clamp(min=1e-30).rsqrt() / FLOOR).masked_fill(means.isnan(), 0.0)
        # rows of 16 bytes, like those of keys
        given = [torch.full_like(factors, number) for number in (size, 1 / temperature, 0.0)]
        scales = torch.stack([factors, *given], 1)
        self._scales = {device: scales.to(device) for device in self.masked.devices()}
        self._squares: dict[int, Tensor] = {}  # this pass's sums over this process's rows
        self._not_finite: list[Tensor] = []
        self.not_finite = torch.zeros((), dtype=torch.int64, device=means.device)

    def move(self, layer: MaskedLayer, gradient: Tensor, key: Tensor) -> None:
        """Move one layer's logits by df/dW `[rows, in]`. Raises UserError if this is the second
        time in the pass, as the model then uses the layer twice."""
        index = self.index[layer.name]
        if index in self._squares:
            raise UserError(
                f"the model uses {layer.name} twice in a pass, which backward passes cannot "
                "learn: name other layers with --targets"
            )
        if not len(layer.bits):  # this process has no row of the layer
            self._squares[index] = torch.zeros(())
            return
        squares = self.masked.kernels.vjp(
            layer.logits,
            layer.bits,
            layer.weight,
            gradient,
            self.of_blocks[layer.name],
            self._scales[layer.weight.device][index],
            key,
            start=layer.start,
        )
        self._squares[index] = squares.nansum()
        self._not_finite.append(squares.isnan().sum())

    def end_pass(self) -> None:
        """Update the running mean squares of all layers after a backward pass. A pass that
        overflows is left out of a layer's mean, as is a pass that does not reach the layer."""
        previous = self.mean_squares
        current = torch.full_like(self.mean_squares, torch.nan)
        reached = list(self._squares)
        if self._not_finite:
            self.not_finite = torch.stack(
                [count.to(current.device) for count in self._not_finite]
            ).sum()
        if reached:
            sums = torch.stack([self._squares[index].to(current.device) for index in reached])
            if self.masked.is_sharded:  # sum over the rows of all processes
                sums = processes.all_reduce_mean_async(sums)() * processes.world_size()
            # no process reached the layer, or no block of it was finite
            sums[sums == 0] = torch.nan
            current[reached] = sums / self._sizes[reached]
        updated = torch.where(
            previous.isfinite(), DECAY * previous + (1 - DECAY) * current, current
        )
        self.mean_squares = torch.where(current.isfinite() | previous.isnan(), updated, previous)

    def state(self) -> dict[str, Tensor]:
        """Return the running mean squares: `[layers]`, and by layer `[blocks]`."""
        return {"mean_squares": self.mean_squares} | {
            f"of_blocks.{name}": self.masked.layers[name].shard(squares)
            for name, squares in self.of_blocks.items()
        }

    def restore(self, read: Callable) -> None:
        """Restore from `state`."""
        self.mean_squares = read("mean_squares", self.mean_squares).to(self.mean_squares.device)
        for name, squares in self.of_blocks.items():
            shard = self.masked.layers[name].shard(squares)
            squares.copy_(read(f"of_blocks.{name}", shard))
