"""What J^T G is divided by before logits move by it, so that a step is a distance in logits, whatever the model's size
and the loss's scale. Two ways, one interface: begin_pass(size, temperature), move(layer, ...), end_pass(), and a state.

    ByLayer   clip(J^T G / (CLIP rms), +-1), the root mean square over the layer: no state of the model's size. J^T G
              has heavy tails: a few weights that matter enormously, in all models, make most of its mean square. With
              CLIP well below 1 they go no faster than the many that matter a little.
    ByBlock   J^T G / rms, each block's own, as Adam without momentum has it for each number: a number a block. All
              blocks then go as far as their gradients agree, however small these are, which pays in long runs.

Both are running means over the minibatches, in float32, of gradients in any unit.
"""
from collections.abc import Callable

from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from models import processes

import torch
from torch import Tensor

CLIP = 0.1  # root mean squares beyond which a layer's J^T G counts no more
KEPT_BY_LAYER, KEPT_BY_BLOCK = 0.9, 0.95  # what a running mean keeps of the earlier ones, a minibatch
State = dict[str, Tensor]


class ByLayer:
    """The running mean squares of earlier minibatches, one a layer; nothing moves in the first, which only measures."""

    def __init__(self, masked: MaskedModel):
        self.masked = masked
        layers = list(masked.layers.values())
        device = layers[0].weight.device
        self.place = {layer.name: place for place, layer in enumerate(layers)}
        self.mean_squares = torch.full((len(layers),), torch.nan, device=device)  # of J^T G; NaN: not measured yet
        self._sizes = torch.tensor([float(layer.shape.numel()) for layer in layers], device=device)
        self._squares: dict[int, Tensor] = {}  # sums over the rows that are here, of this backward pass

    def begin_pass(self, size: float, temperature: float) -> None:
        """Before a backward pass whose step is `size`, soft masks at this temperature (0: none)."""
        means = self.mean_squares
        factors = (means.clamp(min=1e-30).rsqrt() / CLIP).masked_fill(means.isnan(), 0.0)
        rest = torch.tensor([size, 1 / (temperature or 1.0), 0.0], device=means.device)
        scales = torch.cat([factors[:, None], rest.expand(len(means), 3)], 1)
        self._scales = {layer.weight.device: scales.to(layer.weight.device) for layer in self.masked.layers.values()}
        self._squares = {}

    def move(self, layer: MaskedLayer, gradient: Tensor, key: Tensor) -> Tensor:
        """One layer's step by df/dW `[rows, in]`; returns how many blocks' J^T G is not finite, int64 `[]`."""
        place = self.place[layer.name]
        if not len(layer.bits):  # a layer of fewer rows than there are processes
            self._squares[place] = torch.zeros(())
            return torch.zeros((), dtype=torch.int64)
        squares = self.masked.kernels.vjp(layer.logits, layer.bits, layer.weight, gradient, None,
                                          self._scales[layer.weight.device][place], key, start=layer.start)
        not_finite = squares.isnan().sum()
        self._squares[place] = squares.nan_to_num_(0.0).sum()
        return not_finite

    def end_pass(self) -> None:
        """After a backward pass: the running mean squares, of all layers at once. One that overflows, or follows one
        that did, is left out, and so are layers that the pass did not reach."""
        before, now = self.mean_squares, torch.full_like(self.mean_squares, torch.nan)
        reached = list(self._squares)
        if reached:
            sums = torch.stack([self._squares[place].to(now.device) for place in reached])
            if self.masked.is_sharded:  # over all their rows
                sums = processes.reduce_async(sums)() * processes.size()
            sums[sums == 0] = torch.nan  # no process reached the layer, or no block of it was finite
            now[reached] = sums / self._sizes[reached]
        mean = torch.where(before.isfinite(), KEPT_BY_LAYER * before + (1 - KEPT_BY_LAYER) * now, now)
        mean = torch.where(before.isnan(), now, torch.where(now.isfinite(), mean, before))
        self.mean_squares = torch.where(now.isnan(), before, mean)

    def state(self) -> State:
        """Float32 `[layers]`, NaN of layers that have none."""
        return {"mean_squares": self.mean_squares}

    def restore(self, read: Callable) -> None:
        """From `state`."""
        self.mean_squares = read("mean_squares", self.mean_squares).to(self.mean_squares.device)


class ByBlock:
    """The running mean squares, one a block, of the blocks that are here, this minibatch's included."""

    def __init__(self, masked: MaskedModel):
        self.masked = masked
        self.mean_squares = {layer.name: torch.full(layer.bits.shape, -1.0, device=layer.weight.device)
                             for layer in masked.layers.values()}  # of J^T G; negative: not measured yet

    def begin_pass(self, size: float, temperature: float) -> None:
        """As `ByLayer.begin_pass`."""
        scale = torch.tensor([0.0, size, 1 / (temperature or 1.0), KEPT_BY_BLOCK])
        self._scales = {layer.weight.device: scale.to(layer.weight.device) for layer in self.masked.layers.values()}

    def move(self, layer: MaskedLayer, gradient: Tensor, key: Tensor) -> Tensor:
        """As `ByLayer.move`."""
        if not len(layer.bits):
            return torch.zeros((), dtype=torch.int64)
        squares = self.masked.kernels.vjp(layer.logits, layer.bits, layer.weight, gradient,
                                          self.mean_squares[layer.name], self._scales[layer.weight.device], key,
                                          start=layer.start)
        return squares.isnan().sum()

    def end_pass(self) -> None:
        """Nothing is left to do."""

    def state(self) -> State:
        """Float32 `[blocks]`, a tensor a layer."""
        return {f"mean_squares.{name}": self.masked.layers[name].shard(squares)
                for name, squares in self.mean_squares.items()}

    def restore(self, read: Callable) -> None:
        """From `state`."""
        for name, squares in self.mean_squares.items():
            squares.copy_(read(f"mean_squares.{name}", self.masked.layers[name].shard(squares)))


NORMALIZATIONS = {"layer": ByLayer, "block": ByBlock}
