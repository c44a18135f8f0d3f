"""A logit moves by the step's size times clip(J^T G / (CLIP rms), +-1). rms is the root mean square
of a layer's J^T G, from a running mean over earlier minibatches, in float32. So a step is a
distance in logits, whatever the model's size and the loss's scale, and nothing of the model's size
is kept.

J^T G has heavy tails: a few weights that matter enormously, in all models, make most of its mean
square. With CLIP well below 1 they go no faster than the many that matter a little.
"""

from collections.abc import Callable

from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from models import processes
from utils import UserError

import torch
from torch import Tensor

CLIP = 0.1  # root mean squares beyond which a layer's J^T G counts no more
DECAY = 0.9  # of the running mean, a minibatch


class Normalization:
    """The running mean squares of earlier minibatches, one per layer; nothing moves in the first,
    which only measures.

    not_finite: the number of blocks whose J^T G was not finite in the last backward pass, int64
    `[]`.
    """

    def __init__(self, masked: MaskedModel):
        self.masked = masked
        layers = list(masked.layers.values())
        device = layers[0].weight.device
        self.place = {layer.name: place for place, layer in enumerate(layers)}
        # of J^T G; NaN: not measured yet
        self.mean_squares = torch.full((len(layers),), torch.nan, device=device)
        self._sizes = torch.tensor([float(layer.shape.numel()) for layer in layers], device=device)

    def begin_pass(self, size: float) -> None:
        """Before a backward pass whose step is `size`."""
        means = self.mean_squares
        factors = (means.clamp(min=1e-30).rsqrt() / CLIP).masked_fill(means.isnan(), 0.0)
        # 16 bytes apart, as keys
        scales = torch.stack([factors, torch.full_like(factors, size), factors, factors], 1)
        self._scales = {device: scales.to(device) for device in self.masked.devices()}
        self._squares: dict[int, Tensor] = {}  # sums over the rows that are here, of this pass
        self._not_finite: list[Tensor] = []
        self.not_finite = torch.zeros((), dtype=torch.int64, device=means.device)

    def move(self, layer: MaskedLayer, gradient: Tensor, key: Tensor) -> None:
        """One layer's step by df/dW `[rows, in]`. UserError for a second one in the pass: the model
        uses the layer twice."""
        place = self.place[layer.name]
        if place in self._squares:
            raise UserError(
                f"the model uses {layer.name} twice in a pass, which backward passes cannot "
                "learn: name other layers with --targets"
            )
        if not len(layer.bits):  # a layer of fewer rows than there are processes
            self._squares[place] = torch.zeros(())
            return
        squares = self.masked.kernels.vjp(
            layer.logits,
            layer.bits,
            layer.weight,
            gradient,
            self._scales[layer.weight.device][place],
            key,
            start=layer.start,
        )
        self._squares[place] = squares.nansum()
        self._not_finite.append(squares.isnan().sum())

    def end_pass(self) -> None:
        """After a backward pass: the running mean squares, of all layers at once. One that
        overflows, or follows one that did, is left out, and so are layers that the pass did not
        reach."""
        before = self.mean_squares
        now = torch.full_like(self.mean_squares, torch.nan)
        reached = list(self._squares)
        if self._not_finite:
            self.not_finite = torch.stack(
                [count.to(now.device) for count in self._not_finite]
            ).sum()
        if reached:
            sums = torch.stack([self._squares[place].to(now.device) for place in reached])
            if self.masked.is_sharded:  # over all their rows
                sums = processes.all_reduce_mean_async(sums)() * processes.world_size()  # their sum
            # no process reached the layer, or no block of it was finite
            sums[sums == 0] = torch.nan
            now[reached] = sums / self._sizes[reached]
        mean = torch.where(before.isfinite(), DECAY * before + (1 - DECAY) * now, now)
        self.mean_squares = torch.where(now.isfinite() | before.isnan(), mean, before)

    def state(self) -> dict[str, Tensor]:
        """Float32 `[layers]`, NaN of layers that have none."""
        return {"mean_squares": self.mean_squares}

    def restore(self, read: Callable) -> None:
        """From `state`."""
        self.mean_squares = read("mean_squares", self.mean_squares).to(self.mean_squares.device)
