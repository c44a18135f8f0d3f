"""Other methods that learn an N:M mask from gradients, implemented for comparison by
bench/rivals.py and reproduce/rival.py.

    MaskLLM     Fang et al., arXiv 2409.17481: C(M,N) logits per block; the forward pass uses a soft
                mask from Gumbel noise
    RoI         Dinh et al., arXiv 2608.23048: M logits per block, which start without m0; a soft
                mask from draws without replacement
    ScoresSTE   the plain straight-through estimator: a real score per weight; the N largest are
                kept, and the gradient passes through

All update their parameters with Adam. Their result is a mask, which is evaluated on the frozen
weights. `distill`, the loss against the dense model's predictions, is not in MaskLLM's paper.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pge
from models.layers import find_layers
from training.distillation import summed_loss
from training.straight_through import decay

import torch
from torch import Tensor, nn


class Rival:
    """A model whose masked layers compute with a weight made from learned parameters, one float32
    tensor per layer.

    model: frozen, with plain nn.Linear layers. masks: m0, bool `[out, in]` by layer name. norms:
    ||x_j|| of the layers' inputs, `[in]`. lr: Adam's learning rate. distill: the share of the loss
    against the dense model in `learn`, 0 or 1. weights: the dense weights by name, if the layers
    hold others. A subclass defines the initial parameters, the weight made from them, and their
    mask. Without gradients (torch.no_grad), layers compute with the weights that they hold.
    """

    betas = (0.9, 0.999)
    weight_decay = 0.0

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        norms: dict[str, Tensor],
        n: int,
        m: int,
        lr: float,
        seed: int = 0,
        distill: float = 0.0,
        weights: dict[str, Tensor] | None = None,
    ):
        self.model = model
        self.n = n
        self.m = m
        self.lr = lr
        self.distill = distill
        self.layers = {name: layer for name, layer in find_layers(model).items() if name in masks}
        self.weights = weights or {name: layer.weight for name, layer in self.layers.items()}
        self.norms = norms
        self.device = model.get_input_embeddings().weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.penalty = 0.0
        self.progress = 0.0
        self.parameters = {
            name: self.start(name, masks[name]).requires_grad_() for name in self.layers
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=self.betas, weight_decay=self.weight_decay
        )
        for name, layer in self.layers.items():
            layer.forward = partial(self._forward, name, layer)

    def start(self, name: str, mask: Tensor) -> Tensor:
        """Return a layer's initial parameters, float32."""
        raise NotImplementedError

    def weight(self, name: str) -> Tensor:
        """Return the weight that a layer computes with, float32 `[out, in]`. It may add to
        `self.penalty`."""
        raise NotImplementedError

    def mask(self, name: str) -> Tensor:
        """Return the mask of a layer's parameters, bool `[out, in]`."""
        raise NotImplementedError

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of all layers, by name."""
        return {name: self.mask(name) for name in self.layers}

    def learn(self, batch: Tensor, step: int, steps: int) -> float:
        """Take step number `step` of `steps` on a batch, int64 `[sequences, tokens]`; return the
        loss, in nats per prediction."""
        batch = batch.to(self.device)
        teacher = None
        if self.distill:
            with torch.no_grad():
                teacher = self.model(input_ids=batch, use_cache=False).logits
        return self.move(batch, teacher, [self.distill] * len(batch), step / steps)

    def move(
        self, batch: Tensor, teacher: Tensor | None, distill: Sequence[float], progress: float
    ) -> float:
        """Take a step of Adam at this share of the run; return the loss, in nats per prediction.
        teacher: the dense model's logits; distill: each sequence's share of the loss against
        them."""
        self.progress = progress
        self.penalty = 0.0
        logits = self.model(input_ids=batch, use_cache=False).logits
        loss, gradient = summed_loss(logits.detach(), batch, teacher, distill)
        predictions = batch.shape[0] * (batch.shape[1] - 1)
        self.optimizer.param_groups[0]["lr"] = self.lr * self.multiplier()
        self.optimizer.zero_grad()
        outputs = [logits]
        gradients = [gradient / predictions]
        if isinstance(self.penalty, Tensor):
            outputs.append(self.penalty)
            gradients.append(torch.ones_like(self.penalty))
        torch.autograd.backward(outputs, gradients)
        self.optimizer.step()
        return loss / predictions

    def multiplier(self) -> float:
        """Return the factor of the learning rate at this point of the run: the decay of this
        project's runs."""
        return decay(self.progress)

    def state_bytes(self) -> float:
        """Return the bytes per weight that are kept in addition to the model after a step:
        parameters, gradients and moments."""
        tensors = [
            tensor
            for parameter in self.parameters.values()
            for tensor in (parameter, parameter.grad, *self.optimizer.state[parameter].values())
            if tensor.dim()
        ]
        return sum(tensor.nbytes for tensor in tensors) / sum(
            layer.weight.numel() for layer in self.layers.values()
        )

    def _forward(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return type(layer).forward(layer, x)
        return nn.functional.linear(x, self.weight(name).to(x.dtype), layer.bias)

    def largest(self, score: Tensor) -> Tensor:
        """Return the mask of the N largest scores of each block, bool `[out, in]`."""
        return pge.mode(score.detach().reshape(-1, self.m), self.n).view_as(score)

    def dense(self, name: str) -> Tensor:
        """Return a layer's dense weight, float32 `[out, in]`."""
        return self.weights[name].detach().float()


class MaskLLM(Rival):
    """Weights a block's patterns by softmax((kappa pi + Gumbel noise) / tau); the forward pass uses
    their weighted mean.

    tau falls from 4 to 0.05 and kappa grows from 100 to 500, linearly. pi starts as noise with
    standard deviation 0.01, plus 0.03 (`noise` times `prior`) for each weight that a pattern shares
    with m0 beyond the mean over patterns. The loss includes -`norm_reward` * ||masked weights||^2.
    The learning rate decays to a tenth along a cosine. Logits are stored as `[patterns, blocks]`,
    because a softmax over the first dimension is ten times as fast on a CPU as over a short last
    one.
    """

    betas = (0.9, 0.95)
    noise = 0.01
    prior = 3.0
    norm_reward = 1e-5
    temperatures = (4.0, 0.05)
    scales = (100.0, 500.0)

    def start(self, name: str, mask: Tensor) -> Tensor:
        self.patterns = pge.patterns(self.n, self.m).to(self.device)
        shared = self.patterns.float() @ mask.to(self.device).view(-1, self.m).float().T
        noise = self.noise * torch.randn(shared.shape, generator=self.generator, device=self.device)
        return noise + self.noise * self.prior * (shared - self.n * self.n / self.m)

    def weight(self, name: str) -> Tensor:
        temperature = self.between(*self.temperatures)
        scale = self.between(*self.scales)
        logits = self.parameters[name]
        uniform = torch.rand(logits.shape, generator=self.generator, device=self.device)
        keys = scale * logits - uniform.log_().neg_().log_()  # Gumbel noise
        weight = self.dense(name) * self.kept(keys, temperature).T.reshape(
            self.layers[name].weight.shape
        )
        self.penalty = self.penalty - self.norm_reward * weight.square().sum()
        return weight

    def between(self, first: float, last: float) -> float:
        """Return the value at this point of a schedule from `first` to `last`."""
        return first + (last - first) * self.progress

    def kept(self, keys: Tensor, temperature: float) -> Tensor:
        """Return the share of each weight that is kept, `[M, blocks]`, from logits with noise."""
        return self.patterns.float().T @ torch.softmax(keys / temperature, 0)

    def mask(self, name: str) -> Tensor:
        return self.patterns[self.parameters[name].argmax(0)].view_as(self.layers[name].weight)

    def multiplier(self) -> float:
        return 0.55 + 0.45 * math.cos(math.pi * self.progress)


class RoI(MaskLLM):
    """Learns M logits per block. Divided by lambda and with Gumbel noise, they are the keys of a
    weighted reservoir: the N largest are a draw without replacement. The forward pass uses N
    successive softmaxes of keys / tau; each adds log(1 - the softmax before) to the keys. Their sum
    may exceed 1 for a weight.

    In the first three quarters of the run, tau falls exponentially from 1 to 0.05 and lambda from 1
    to 0.002. The logits start as noise with the standard deviation 0.01. The optimizer is AdamW,
    whose rate falls to a tenth; its cosine is MaskLLM's, as the paper names only the ends.
    """

    norm_reward = 0.0
    weight_decay = 0.05
    temperatures = (1.0, 0.05)
    scales = (1.0, 500.0)  # 1 / lambda

    def start(self, name: str, mask: Tensor) -> Tensor:
        blocks = mask.to(self.device).view(-1, self.m).T
        return self.noise * torch.randn(blocks.shape, generator=self.generator, device=self.device)

    def between(self, first: float, last: float) -> float:
        return first * (last / first) ** min(1.0, self.progress / 0.75)

    def kept(self, keys: Tensor, temperature: float) -> Tensor:
        total = torch.zeros_like(keys)
        for _ in range(self.n):
            scaled = keys / temperature
            total = total + scaled.softmax(0)
            others = torch.stack([scaled.roll(k, 0) for k in range(1, self.m)]).logsumexp(0)
            keys = keys + others - scaled.logsumexp(0)  # log(1 - softmax), without cancellation
        return total

    def mask(self, name: str) -> Tensor:
        return self.largest(self.parameters[name].T.reshape(self.layers[name].weight.shape))


class ScoresSTE(Rival):
    """Computes with m * w, where m keeps the N largest scores of each block. d loss / d score = w *
    d loss / d(m * w), for kept and pruned weights alike. Scores start at log(|w| ||x||), the log of
    Wanda's score, so that their mask is m0."""

    def start(self, name: str, mask: Tensor) -> Tensor:
        return (self.dense(name).abs() * self.norms[name]).clamp(min=1e-30).log()

    def weight(self, name: str) -> Tensor:
        score = self.parameters[name]
        return self.dense(name) * (self.largest(score) + score - score.detach())

    def mask(self, name: str) -> Tensor:
        return self.largest(self.parameters[name])


RIVALS: dict[str, Callable[..., Rival]] = {
    "maskllm": MaskLLM,
    "roi": RoI,
    "scores_ste": ScoresSTE,
}
