"""One-shot pruning: a score for each weight, of which the largest stay, or SparseGPT's way; layer by layer.

    magnitude   |w_ij|
    wanda       |w_ij| * ||x_j||      ||x_j||: norm of input feature j over the calibration tokens (arXiv 2306.11695)
    ria         (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||^(1/2)      (Zhang et al., ICLR 2024)
    sparsegpt   see sparsegpt.py
"""
from dataclasses import dataclass, replace

from utils import progress_bar

import torch
from torch import Tensor, nn

import pge
from masking.layers import apply_masks
from models.layers import weight_matrix
from pruning import sparsegpt
from pruning.calibration import Hessians, input_norms, visit_in_order
from pruning.swaps import refine_by_swaps


def magnitude(weight: Tensor, _norms: Tensor | None) -> Tensor:
    """|w|; the scores are all of weight `[out, in]` and norms `[in]`."""
    return weight.abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|w| ||x||."""
    return weight.abs() * norms


def ria(weight: Tensor, norms: Tensor) -> Tensor:
    """Relative importance and activations, see the top."""
    size = weight.abs()
    relative = size / size.sum(0, keepdim=True).clamp(min=1e-30) + size / size.sum(1, keepdim=True).clamp(min=1e-30)
    return relative * norms.sqrt()


SCORES = {"magnitude": magnitude, "wanda": wanda, "ria": ria}
METHODS = (*SCORES, "sparsegpt")


def largest(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest of every m along a row, ties to the lower index; float `[out, in]` -> bool `[out, in]`."""
    return pge.mode(score.reshape(-1, m), n).view(score.shape)


@dataclass
class OneShot:
    """A way to prune. sparsity_type: (N, M), or None for unstructured, the share `sparsity_ratio` of the weights;
    true_sequential: later layers see the earlier ones pruned; swaps: sweeps of `refine_by_swaps`, at most, over an N:M
    mask; percdamp and blocksize: sparsegpt's."""
    prune_method: str = "wanda"
    sparsity_type: tuple[int, int] | None = (2, 4)
    sparsity_ratio: float = 0.5
    true_sequential: bool = False
    swaps: int = 0
    percdamp: float = 0.01
    blocksize: int = 128

    @property
    def needs_text(self) -> bool:
        """Whether it is calibrated."""
        return self.prune_method != "magnitude" or self.swaps > 0

    @property
    def needs_one_pass(self) -> bool:
        """Whether all samples have to be at a layer together."""
        return self.needs_text and (self.prune_method == "sparsegpt" or self.true_sequential or self.swaps > 0)

    def mask(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """A layer's mask by the method's score, bool `[out, in]`; unstructured is N:M with the layer or a row for M."""
        score = SCORES[self.prune_method](weight, norms)
        if self.sparsity_type:
            n, m = self.sparsity_type
        else:
            m = score.numel() if self.prune_method == "magnitude" else score.shape[1]
            n = m - int(self.sparsity_ratio * m)
        return largest(score, n, m)

    def pruned_weight(self, weight: Tensor, inputs: Tensor, hessians: Hessians) -> Tensor:
        """A layer's sparse weight, float32 `[out, in]`, from its inputs on the calibration tokens
        `[sequences, tokens, in]`."""
        weight = weight.float()
        if self.prune_method == "sparsegpt":
            return sparsegpt.solve(weight, hessians.of(inputs), self.sparsity_type, self.sparsity_ratio, self.percdamp,
                                   self.blocksize)[0]
        norms = sum(part.float().square().sum(0) for part in inputs.flatten(0, -2).split(8192)).sqrt()
        mask = self.mask(weight, norms)
        if self.swaps:
            mask = refine_by_swaps(weight, mask, hessians.of(inputs), self.sparsity_type[1], self.swaps)
        return weight.masked_fill(~mask, 0.0)


@torch.no_grad()
def prune_model(model: nn.Module, layers: dict[str, nn.Module], samples: Tensor | None, way: OneShot) -> list[str]:
    """Prune these layers in place; samples int64 `[sequences, tokens]`, None for magnitude. Returns the names of those
    that the samples do not reach, such as experts: they are pruned by magnitude."""
    if samples is not None and way.needs_one_pass:
        reached = _prune_in_one_pass(model, layers, samples, way)
    else:
        norms = {} if samples is None else input_norms(model, layers, samples)
        reached = {name for name in layers if samples is None or norms[name].any()}
        for name in progress_bar([name for name in layers if name in reached], desc="pruning", unit="layer"):
            apply_masks(layers, {name: way.mask(weight_matrix(layers[name]).float(), norms.get(name))})
    missed, by_magnitude = [name for name in layers if name not in reached], replace(way, prune_method="magnitude")
    for name in missed:
        apply_masks(layers, {name: by_magnitude.mask(weight_matrix(layers[name]).float(), None)})
    return missed


def _prune_in_one_pass(model: nn.Module, layers: dict[str, nn.Module], samples: Tensor, way: OneShot) -> set[str]:
    """Prune each layer when the pass of all samples through the decoder, without its head, gets there; with
    true_sequential before the layer runs, else when the pass is over. Returns the names of the layers it got to."""
    pruned, hessians = {}, Hessians()

    def prune(name: str, inputs: Tensor) -> None:
        weight = weight_matrix(layers[name])
        pruned[name] = way.pruned_weight(weight.to(inputs.device), inputs, hessians).to(weight)
        if way.true_sequential:
            write(name)

    def write(name: str) -> None:
        weight_matrix(layers[name]).copy_(pruned[name]).add_(0.0)  # a kept weight that rounds to -0.0 becomes +0.0
        pruned[name] = None
    visit_in_order(model, layers, samples, prune, "pruning")
    for name in layers:
        if pruned.get(name) is not None:
            write(name)
    return set(pruned)
