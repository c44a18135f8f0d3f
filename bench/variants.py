"""Estimators that train.py has not, tried in bench/estimators.py: each is an option that has to earn its place.

Forward-only: `LeaveOneOut`, several masks a step. With gradients: `ControlVariate`, unbiased; `Momentum` and `Sign`,
straight-through with another rule for the step; `sharpen`, to let C grow during a run.
"""

import torch
from torch import Tensor

import pge
from masking.block_bits import kept_planes
from masking.fused_ops import score, vjp, weights
from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from models.loss import batch_loss
from training.straight_through import StraightThrough


def score_planes(layer: MaskedLayer, bits: Tensor, n: int) -> Tensor:
    """d log p(bits) / d logits, float32 `[M, blocks]`; bits `[blocks]`."""
    return torch.stack(score(weights([plane.float() for plane in layer.logits], n), kept_planes(bits, layer.m), n))


def move(layer: MaskedLayer, change: Tensor) -> None:
    """Subtract a change `[M, blocks]` from a layer's logits."""
    for plane, part in zip(layer.logits, change):
        plane.sub_(part)


def sharpen(masked: MaskedModel, factor: float) -> None:
    """Multiply all logits: the distribution becomes more certain, the most probable mask stays."""
    masked.flush()
    for layer in masked.layers.values():
        for plane in layer.logits:
            plane.mul_(factor)


class LeaveOneOut:
    """K masks a step on one minibatch, A_k = f_k - the mean of the other f: unbiased, and needs no baseline.

    `estimator` may scale A_k, as pge.Normalized(pge.Vanilla()) does. Beside the logits a step keeps K masks' bits.
    """

    def __init__(self, masked: MaskedModel, samples: int, estimator: pge.Estimator | None = None):
        self.masked, self.samples, self.estimator = masked, samples, estimator or pge.Vanilla()

    def learn(self, batch: Tensor, lr: float) -> float:
        """Move the logits by K forward passes over int64 `[sequences, tokens]`; the mean loss, nats."""
        losses, drawn = [], []
        for _ in range(self.samples):
            self.masked.count_step(redraw=True)
            losses.append(batch_loss(self.masked.model, batch))
            drawn.append([layer.bits.clone() for layer in self.masked.layers.values()])
        mean = sum(losses) / self.samples
        advantages = [self.estimator.advantage((loss - mean) * self.samples / (self.samples - 1)) for loss in losses]
        for layer, masks in zip(self.masked.layers.values(), zip(*drawn)):
            scores = [score_planes(layer, bits, self.masked.space.n) for bits in masks]
            move(layer, lr / self.samples * sum(a * s for a, s in zip(advantages, scores)))
        return mean


class ControlVariate(StraightThrough):
    """pi <- pi - lr [(f(m) - b - G'.(m - mu)) score(m) + J^T G'], m drawn from p(pi).

    G' `[M, blocks]` bfloat16 is the mean of the saliencies df/dm of earlier minibatches, that of the newest weighing
    1 - decay, and b what the bracket was in them: both are independent of m, so the mean of the step is the gradient
    of E f whatever they are, and the better G' predicts f the smaller its variance. `consume` only collects saliencies.
    """

    def __init__(self, masked: MaskedModel, decay: float = 0.9):
        super().__init__(masked, sample=True)
        self.decay = decay
        self.saliencies: dict[str, Tensor] = {}  # G', by layer
        self.collected: dict[str, Tensor] = {}  # of this minibatch, by layer
        self.residual, self.steps = 0.0, 0
        masked.count_step(redraw=True)  # m0 was not drawn

    def consume(self, layer: MaskedLayer, gradient: Tensor) -> None:
        """Add a layer's saliency, from df/dW `[out, in]`, to this minibatch's."""
        saliency = (layer.weight.float() * gradient).view(-1, layer.m).T.contiguous()
        self.collected[layer.name] = self.collected.get(layer.name, 0) + saliency

    def learn(self, batch: Tensor, lr: float, baseline: float = 0.0) -> float:
        """One forward and one backward over int64 `[sequences, tokens]`; returns the loss, nats. baseline: any number
        that does not depend on m, such as m0's loss on this minibatch."""
        loss = super().learn(batch, 0.0)
        n, linear, known = self.masked.space.n, 0.0, bool(self.saliencies)
        mean = self.residual / (1 - self.decay**self.steps) if self.steps else 0.0
        if known:
            for layer in self.masked.layers.values():
                centred = torch.stack(kept_planes(layer.bits, layer.m)) - self._inclusion(layer, n)
                linear += float((self.saliencies[layer.name] * centred).sum())
        residual = loss - baseline - linear
        for layer in self.masked.layers.values():
            change = (residual - mean) * score_planes(layer, layer.bits, n)
            if known:
                saliency = list(self.saliencies[layer.name].float())
                change += torch.stack(vjp([plane.float() for plane in layer.logits], saliency, n))
            move(layer, lr * change)
        self._take_in(residual, batch.shape[0] * (batch.shape[1] - 1))
        return loss

    def _inclusion(self, layer: MaskedLayer, n: int) -> Tensor:
        return pge.inclusion(torch.stack(layer.logits, 1).float(), n).T

    def _take_in(self, residual: float, predictions: int) -> None:
        """Take this minibatch's residual and saliencies, of the loss summed over its predictions, into b and G'."""
        self.steps += 1
        self.residual = self.decay * self.residual + (1 - self.decay) * residual
        for name, saliency in self.collected.items():
            before = self.saliencies.get(name)
            saliency = saliency / predictions
            mixed = saliency if before is None else self.decay * before.float() + (1 - self.decay) * saliency
            self.saliencies[name] = mixed.bfloat16()
        self.collected = {}


class Momentum(StraightThrough):
    """Straight-through on a running mean of the weights' gradients, kept in bfloat16: 2 more bytes a weight."""

    def __init__(self, *args, momentum: float = 0.9, **kwargs):
        super().__init__(*args, **kwargs)
        self.momentum = momentum
        self.means: dict[str, Tensor] = {}  # by layer

    def consume(self, layer: MaskedLayer, gradient: Tensor) -> None:
        """One layer's step, from df/dW `[out, in]`."""
        before = self.means.get(layer.name)
        mean = gradient if before is None else self.momentum * before.float() + (1 - self.momentum) * gradient
        self.means[layer.name] = mean.bfloat16()
        super().consume(layer, mean)


class Sign(StraightThrough):
    """Straight-through whose logits all move by the whole rate, in the direction of their gradient's sign."""

    def _learn(self, sequences: Tensor) -> float:
        self.normalization.mean_squares.fill_(1e-30)  # any gradient will be clipped
        return super()._learn(sequences)
